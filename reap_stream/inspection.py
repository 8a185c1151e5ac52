"""What a checkpoint is: layers, experts, formats, and whether it can be run and pruned.

Every fact comes from headers and config.json, or from config.json and the index where there are
no weights; of tensors no more is read than the sample behind the fingerprint.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from reap_stream.checkpoint.configedit import mtp_layer_count
from reap_stream.checkpoint.source import CONFIG_NAME
from reap_stream.formats import group_weights, known_formats
from reap_stream.model.described import DescribedModel, open_or_describe
from reap_stream.model.feeds import layer_feeds
from reap_stream.model.opened import OpenedModel, forward_faults

_SHOWN_REFUSALS = 3


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What `inspect` and `plan` both say of a model.

    Attributes:
        architecture: model class, as config.json has it.
        num_layers: decoder layers.
        moe_layers: how many of them have routed experts.
        mtp_layers: next-token-prediction layers in the checkpoint.
        num_experts: routed experts of each MoE layer.
        experts_per_token: experts a token is sent to.
        total_parameters: of the decoder, MTP layers left out; scales do not count.
        active_parameters: of these, what one token uses; embeddings and head count.
        mtp_parameters: of MTP layers, embeddings and heads of their own counted.
        bytes: of all tensors, headers left out.
        largest_layer_bytes: of the largest decoder layer on disk.
        estimated: no weights were there; sizes follow from config.json and the index.
    """

    architecture: str
    num_layers: int
    moe_layers: int
    mtp_layers: int
    num_experts: int
    experts_per_token: int
    total_parameters: int
    active_parameters: int
    mtp_parameters: int
    bytes: int
    largest_layer_bytes: int
    estimated: bool


@dataclass(frozen=True, slots=True)
class Refusals:
    """Weights that the forward cannot decode: `prune` and `observe` refuse, `compact` does not.

    Attributes:
        count: how many.
        reasons: the first few, each with file and tensor.
    """

    count: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Consecutive decoder layers of one kind.

    Attributes:
        first: index of the first.
        last: index of the last.
        kind: ``dense`` or ``moe``.
        bytes: of all of them together.
    """

    first: int
    last: int
    kind: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything `inspect` says.

    Attributes:
        facts: what `plan` says too.
        model_type: config.json's.
        groups: groups a router's experts are divided into; 1: none.
        topk_groups: groups a token chooses from.
        layers: the decoder.
        mtp_layer_indices: numbers of the MTP layers.
        config_mtp_layers: MTP layers that config.json speaks of.
        tensors: how many.
        shards: weight files, or those that the index names; 0 where nothing tells.
        tied_embeddings: the head shares the embedding.
        formats: weights by format; ``unknown``: tensors that no format claims.
        dtypes: safetensors dtype tag → tensors and bytes.
        quantization: `quant_method` and `format` of config.json, where it has any.
        refusals: weights the forward cannot decode.
        side_files: files that go along to a pruned checkpoint.
        skipped_files: files that do not.
        notes: what the user should know beside the figures.
    """

    facts: ModelFacts
    model_type: str | None
    groups: int
    topk_groups: int
    layers: tuple[LayerRun, ...]
    mtp_layer_indices: tuple[int, ...]
    config_mtp_layers: int
    tensors: int
    shards: int
    tied_embeddings: bool
    formats: dict[str, int]
    dtypes: dict[str, dict[str, int]]
    quantization: dict[str, str]
    refusals: Refusals
    side_files: tuple[str, ...]
    skipped_files: tuple[str, ...]
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """`inspect --json`: the facts beside the rest, not below it."""
        rest = asdict(self)
        facts: dict[str, Any] = rest.pop("facts")
        return {**facts, **rest, "forward_runs": self.refusals.count == 0}


def inspect_model(directory: Path, *, trust_remote_code: bool = False) -> Inspection:
    """Inspects a checkpoint, or what config.json and the index let expect of one.

    Args:
        directory: the checkpoint.
        trust_remote_code: let the checkpoint's own code build the model.

    Raises:
        CheckpointError: files are damaged, inconsistent or unsafe.
        UnsupportedError: it is no model that can be pruned.
    """
    described = open_or_describe(directory, trust_remote_code=trust_remote_code)
    model = described.model
    checkpoint, architecture = model.checkpoint, model.architecture
    return Inspection(
        facts=model_facts(described),
        model_type=checkpoint.config.get("model_type"),
        groups=architecture.routing.groups,
        topk_groups=architecture.routing.topk_groups,
        layers=tuple(_layer_runs(model)),
        mtp_layer_indices=model.tensor_map.mtp_layers,
        config_mtp_layers=mtp_layer_count(checkpoint.config),
        tensors=len(checkpoint.tensors),
        shards=_shards(model),
        tied_embeddings=_is_tied(model),
        formats=_formats(model),
        dtypes=_dtypes(model),
        quantization=_quantization(model),
        refusals=forward_refusals(model),
        side_files=checkpoint.side_files,
        skipped_files=checkpoint.skipped_files,
        notes=(*described.notes, *mtp_notes(model)),
    )


def model_facts(described: DescribedModel) -> ModelFacts:
    """The facts that `inspect` and `plan` share."""
    model = described.model
    architecture = model.architecture
    return ModelFacts(
        architecture=architecture.name,
        num_layers=architecture.num_layers,
        moe_layers=len(architecture.experts_paths),
        mtp_layers=len(model.tensor_map.mtp_layers),
        num_experts=architecture.num_experts,
        experts_per_token=architecture.routing.experts_per_token,
        total_parameters=architecture.total_parameters(),
        active_parameters=architecture.active_parameters(),
        mtp_parameters=mtp_parameters(model),
        bytes=model.checkpoint.nbytes,
        largest_layer_bytes=max(_layer_nbytes(model)),
        estimated=described.estimated,
    )


def mtp_parameters(model: OpenedModel, keep: int | None = None) -> int:
    """Parameters of MTP layers with `keep` experts a layer (default: all); scales do not count."""
    architecture, mapped = model.architecture, model.tensor_map
    kept = architecture.num_experts if keep is None else keep
    checkpoint = model.checkpoint
    tensors = {name: checkpoint.tensors[name] for name in mapped.mtp_tensors}
    total = 0
    for weight in group_weights(tensors, known_formats(checkpoint.config)).values():
        role, count = mapped.roles[next(iter(weight.parts.values())).name], 1
        for axis, length in enumerate(weight.shape):
            held = length - role.extra
            pruned = held // architecture.num_experts * kept + role.extra
            count *= pruned if axis == role.dim else length
        total += count if role.expert is None or role.expert < kept else 0
    return total


def mtp_notes(model: OpenedModel) -> list[str]:
    """Where config.json and tensors disagree about MTP layers."""
    said, found = mtp_layer_count(model.checkpoint.config), len(model.tensor_map.mtp_layers)
    if said and not found:
        note = (
            f"config.json speaks of {said} next-token-prediction layers, the checkpoint holds "
            "none: engines that use them for speculation will not find them"
        )
        return [note]
    if found and not said:
        note = (
            f"the checkpoint holds {found} next-token-prediction layers, config.json does not "
            "speak of them: some engines refuse their tensors"
        )
        return [note]
    if found < said:
        note = (
            f"config.json speaks of {said} next-token-prediction layers, the checkpoint holds "
            f"{found}: engines will not find the others"
        )
        return [note]
    return []


def forward_refusals(model: OpenedModel) -> Refusals:
    """Why `prune` and `observe` would refuse the weights; see `forward_faults`."""
    reasons = list(forward_faults(model))
    return Refusals(len(reasons), tuple(reasons[:_SHOWN_REFUSALS]))


def _layer_nbytes(model: OpenedModel) -> list[int]:
    return [feeds.nbytes for feeds in layer_feeds(model.architecture, model.tensor_map)]


def _layer_runs(model: OpenedModel) -> Iterator[LayerRun]:
    moe = set(model.architecture.moe_layers)
    nbytes = _layer_nbytes(model)
    for is_moe, run in groupby(range(len(nbytes)), key=lambda layer: layer in moe):
        layers = list(run)
        total = sum(nbytes[layer] for layer in layers)
        yield LayerRun(layers[0], layers[-1], "moe" if is_moe else "dense", total)


def _shards(model: OpenedModel) -> int:
    if model.checkpoint.shards:
        return len(model.checkpoint.shards)
    files = {ref.file for ref in model.checkpoint.tensors.values()}
    return len(files - {model.checkpoint.directory / CONFIG_NAME})


def _is_tied(model: OpenedModel) -> bool:
    head = model.architecture.text_model.get_output_embeddings()
    return head is not None and head.weight is model.architecture.embedding.weight


def _formats(model: OpenedModel) -> dict[str, int]:
    tensors = model.checkpoint.tensors
    weights = group_weights(tensors, known_formats(model.checkpoint.config))
    counts = Counter(weight.format.name for weight in weights.values())
    claimed = {ref.name for weight in weights.values() for ref in weight.parts.values()}
    unknown = len(tensors.keys() - claimed)
    return {**dict(sorted(counts.items())), **({"unknown": unknown} if unknown else {})}


def _dtypes(model: OpenedModel) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for ref in model.checkpoint.tensors.values():
        found[ref.dtype]["tensors"] += 1
        found[ref.dtype]["bytes"] += ref.nbytes
    return dict(sorted(found.items()))


def _quantization(model: OpenedModel) -> dict[str, str]:
    settings = model.checkpoint.config.get("quantization_config") or {}
    return {key: str(settings[key]) for key in ("quant_method", "format") if key in settings}
