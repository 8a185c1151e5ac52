"""What a pruning job knows before it runs: source, targets, and where every byte will lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reap_stream.checkpoint.configedit import (
    SIDE_FILES_NAMING_MODULES,
    edit_config,
    render_config,
)
from reap_stream.checkpoint.division import divide
from reap_stream.checkpoint.layout import OutputPlan, plan_layout
from reap_stream.checkpoint.output import OutputWriter, check_free_space
from reap_stream.checkpoint.publish import carried_files, side_file_chunks
from reap_stream.checkpoint.refs import WHOLE, Role
from reap_stream.model.opened import OpenedModel
from reap_stream.ranks.base import ALONE, Ranks
from reap_stream.recoding.recode import recode
from reap_stream.scoring.choosing import Chooser, new_chooser
from reap_stream.scoring.selection import Target, check_routing, parse_targets
from reap_stream.settings import ChoiceSettings, OutputSettings
from reap_stream.verification import SourceFacts

SCORES_FILE = "reap/scores.safetensors"
RUN_FILE = "reap/run.json"

Kept = dict[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One target and the checkpoint it leads to.

    Attributes:
        target: how many experts stay.
        plan: where every byte lies.
        folder: its directory below the output; empty for a single target.
    """

    target: Target
    plan: OutputPlan
    folder: str


def read_targets(model: OpenedModel, output: OutputSettings) -> list[Target]:
    """The targets, checked against what the router can choose from.

    Raises:
        UsageError: a target that leaves the router too few experts, or malformed ones.
    """
    architecture = model.architecture
    routing = architecture.routing
    targets = parse_targets(output.sparsity, output.keep, architecture.num_experts, routing.groups)
    for target in targets:
        check_routing(target.keep, routing.experts_per_token, routing.groups, routing.topk_groups)
    return targets


def model_chooser(model: OpenedModel, sources: Sequence[str], choice: ChoiceSettings) -> Chooser:
    """What chooses the experts of a model's layers, which are still to be scored.

    Raises:
        UsageError: weights of sources that there are not, or no such kind of protection.
    """
    groups, num_layers = model.architecture.routing.groups, model.architecture.num_layers
    return new_chooser(sources, choice, groups=groups, num_layers=num_layers)


def source_facts(model: OpenedModel, mtp: str | None) -> SourceFacts:
    """What writing and verifying must know of the source."""
    return SourceFacts(
        roles=written_roles(model, mtp),
        num_experts=model.architecture.num_experts,
        count_paths=model.architecture.count_paths,
        dropped=model.tensor_map.mtp_tensors if mtp == "drop" else frozenset(),
        mtp_dropped=mtp == "drop",
        change=model.change,
    )


def written_roles(model: OpenedModel, mtp: str | None) -> dict[str, Role]:
    """What pruning does to each tensor: nothing to prediction layers that are kept as they are."""
    roles = dict(model.tensor_map.roles)
    for name in model.tensor_map.mtp_tensors if mtp == "keep" else ():
        roles[name] = replace(WHOLE, recipe=roles[name].recipe)
    return roles


def recoded(model: OpenedModel, output: OutputSettings, mtp: str) -> OpenedModel:
    """The model with its weights to be written as `output` says, prediction layers as `mtp` does.

    Raises:
        UnsupportedError: a weight cannot be decoded, or engines know no names for the result.
        UsageError: weights that are to stay are quantised in another way.
    """
    return recode(model, output.weights, experts_only=output.fp8_experts_only, mtp=mtp)


def plan_variants(
    model: OpenedModel, targets: Sequence[Target], output: OutputSettings
) -> list[Variant]:
    """Lays out one checkpoint for each target."""
    facts = source_facts(model, output.mtp)
    return [
        Variant(
            target,
            plan_layout(
                model.checkpoint.tensors,
                facts.roles,
                facts.num_experts,
                target.keep,
                max_shard_nbytes=output.max_shard_nbytes,
                dropped=facts.dropped,
            ),
            f"keep-{target.keep}" if len(targets) > 1 else "",
        )
        for target in targets
    ]


def open_writers(
    model: OpenedModel,
    variants: Sequence[Variant],
    out: Path,
    ranks: Ranks = ALONE,
    *,
    resume: bool,
) -> list[OutputWriter]:
    """Writers of all variants: room taken and headers written by rank 0, or taken up again.

    Raises:
        OutputError: the disk has no room for all of them.
        ResumeError: what an earlier run left is not what the plan says.
    """
    tensors, roles = model.checkpoint.tensors, model.tensor_map.roles
    own = [divide(variant.plan, ranks.machines)[ranks.rank] for variant in variants]
    writers = [
        OutputWriter(out / variant.folder, variant.plan, tensors, roles, names)
        for variant, names in zip(variants, own, strict=True)
    ]
    allocates = ranks.leads and not resume
    if allocates:
        check_free_space(out, sum(variant.plan.nbytes for variant in variants))
        for writer in writers:
            writer.allocate()
    ranks.wait_for_all()
    if not allocates:
        for writer in writers:
            writer.reopen()
    return writers


def with_mtp(model: OpenedModel, kept: Kept, mtp: str | None) -> Kept:
    """Adds the next-token-prediction layers where these borrow the last MoE layer's choice."""
    if mtp != "match":
        return dict(kept)
    last = kept[model.architecture.moe_layers[-1]]
    return {**kept, **dict.fromkeys(model.mtp_kept_layers(), last)}


def config_text(model: OpenedModel, kept: Kept, keep: int, mtp: str | None) -> str:
    """config.json of a pruned checkpoint."""
    edited = edit_config(
        model.change.seen_on(model.checkpoint).config,
        model.architecture.count_paths,
        (model.architecture.num_experts, keep),
        kept,
        names=model.checkpoint.tensors,
        mtp_dropped=mtp == "drop",
    )
    return render_config(edited)


def kept_document(model: OpenedModel, kept: Mapping[int, Sequence[int]]) -> bytes:
    """reap/kept_experts.json."""
    document = {
        "num_experts": model.architecture.num_experts,
        "kept": {str(layer): list(kept[layer]) for layer in sorted(kept)},
    }
    return (json.dumps(document) + "\n").encode()


def check_config(model: OpenedModel, variants: Sequence[Variant], mtp: str | None) -> None:
    """Refuses, before any work, settings that could not be written for a pruned model.

    Raises:
        UnsupportedError: an entry of config.json, or of a file with quantisation settings beside
            it, names experts in a way that cannot be renumbered.
        CheckpointError: such a file is damaged.
    """
    source = model.change.seen_on(model.checkpoint)
    architecture = model.architecture
    side_files = SIDE_FILES_NAMING_MODULES.intersection(carried_files(source, set()))
    for variant in variants:
        keep = variant.target.keep
        for supposed in supposed_choices(architecture.moe_layers, architecture.num_experts, keep):
            kept = with_mtp(model, supposed, "match" if mtp == "score" else mtp)
            config_text(model, kept, keep, mtp)
            for name in side_files:
                for _ in side_file_chunks(source, name, kept):
                    pass


def supposed_choices(layers: Sequence[int], num_experts: int, keep: int) -> Iterator[Kept]:
    """Choices by which settings that name experts are tried before the real one is known.

    Neighbouring layers keep different experts, and every expert is kept by one choice: an entry
    that speaks of all layers and can be renumbered for all of these can be for any.
    """
    starts = [min(start, num_experts - keep) for start in range(0, num_experts, keep)]
    for turn in range(len(starts)):
        places = [starts[(turn + place % 2) % len(starts)] for place in range(len(layers))]
        yield {
            layer: tuple(range(start, start + keep))
            for layer, start in zip(layers, places, strict=True)
        }
