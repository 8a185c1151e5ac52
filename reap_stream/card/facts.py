"""What the card says that only the job knows: figures of the model before and after, in JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from reap_stream.card.base import base_of
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.layout import OutputPlan
from reap_stream.checkpoint.source import Checkpoint
from reap_stream.errors import CheckpointError
from reap_stream.formats.settings import quantization_settings
from reap_stream.model.opened import OpenedModel
from reap_stream.pruning import Variant

CARD_FILE: Final = "reap/card.json"
SOURCE_CARD_FILE: Final = "reap/source_card.md"
CARD_NAME: Final = "README.md"

# Longer ones are no cards, and the Hub shows none of that length.
MAX_CARD_NBYTES: Final = 2_000_000
_CONTEXT: Final = "max_position_embeddings"


def card_facts(model: OpenedModel, variant: Variant, mtp: str) -> dict[str, Any]:
    """reap/card.json, as JSON values.

    Args:
        model: the source.
        variant: what was written.
        mtp: what happened to next-token-prediction layers.
    """
    architecture, keep = model.architecture, variant.target.keep
    written = model.change.seen_on(model.checkpoint)
    layers = model.mtp_kept_layers()
    before = _figures(model, architecture.num_experts, layers, architecture.num_experts)
    after = _figures(
        model,
        keep,
        () if mtp == "drop" else layers,
        architecture.num_experts if mtp == "keep" else keep,
    )
    dtypes = _dtypes((out.dtype, out.nbytes) for out in variant.plan.tensors.values())
    source_dtypes = _dtypes((ref.dtype, ref.nbytes) for ref in model.checkpoint.tensors.values())
    config = model.checkpoint.config
    return {
        "format_version": 1,
        "base": base_of(model.checkpoint).record(),
        "architecture": architecture.name,
        "model_type": config.get("model_type"),
        "vision": any("vision" in key for key in config),
        "custom_code": not type(architecture.model).__module__.startswith("transformers."),
        "context": _context(config),
        "layers": architecture.num_layers,
        "moe_layers": len(architecture.moe_layers),
        "experts_per_token": architecture.routing.experts_per_token,
        "source": {**before, "nbytes": model.checkpoint.nbytes, "dtypes": source_dtypes},
        "pruned": {**after, "nbytes": variant.plan.total_size, "dtypes": dtypes},
        "tensors": _kinds(variant.plan),
        "quantization": quantization_label(written.config, dtypes),
        "side_files": list(model.checkpoint.side_files),
    }


def source_card(checkpoint: Checkpoint) -> bytes | None:
    """The source's README.md as it is; None where it has none of readable size."""
    if CARD_NAME not in checkpoint.side_files:
        return None
    try:
        return read_small(checkpoint.directory / CARD_NAME, MAX_CARD_NBYTES)
    except CheckpointError:
        return None


def quantization_label(config: Mapping[str, Any], dtypes: Mapping[str, int]) -> str | None:
    """What the weights' format is called, or None where they are plain numbers.

    Args:
        config: config.json.
        dtypes: dtype → bytes of tensors that have it.
    """
    settings = quantization_settings(dict(config))
    if not settings:
        return None
    if max(dtypes, key=lambda dtype: dtypes[dtype], default="") == "F8_E4M3":
        return "FP8"
    algorithm = settings.get("quant_algo") or settings.get("quant_method") or "quantised"
    return str(algorithm).upper()


def _figures(
    model: OpenedModel, experts: int, mtp_layers: Iterable[int], mtp_experts: int
) -> dict[str, Any]:
    return {
        "experts": experts,
        "parameters": model.architecture.total_parameters(experts),
        "active_parameters": model.architecture.active_parameters(experts),
        "mtp_layers": list(mtp_layers),
        "mtp_experts": mtp_experts,
    }


def _dtypes(tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Bytes of each dtype, the most first."""
    found: Counter[str] = Counter()
    for dtype, nbytes in tensors:
        found[dtype] += nbytes
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def _kinds(plan: OutputPlan) -> dict[str, int]:
    """How many tensors came about in which way."""
    found = dict.fromkeys(("whole", "experts", "entries", "computed"), 0)
    for out in plan.tensors.values():
        if out.recipe is not None:
            found["computed"] += 1
        elif out.slot is not None:
            found["experts"] += 1
        else:
            found["whole" if out.dim is None else "entries"] += 1
    return found


def _context(config: Mapping[str, Any]) -> int | None:
    """Positions that config.json, or the config of a multimodal model's text part, speaks of."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    found = [part[_CONTEXT] for part in parts if isinstance(part.get(_CONTEXT), int)]
    return found[0] if found else None
