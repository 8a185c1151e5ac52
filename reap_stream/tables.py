"""What `inspect` and `plan` print for people: the figures of their JSON, in short lines."""

from __future__ import annotations

from collections.abc import Sequence

from reap_stream.download import Download
from reap_stream.inspection import Inspection, LayerRun, ModelFacts
from reap_stream.planning import PassPlan, PruningPlan, VariantPlan
from reap_stream.resident import gib

_SHOWN_FILES = 4


def inspection_text(inspection: Inspection) -> str:
    """An inspection as lines."""
    rows = [
        ("layers", ", ".join(_layer_run(run) for run in inspection.layers)),
        ("experts", _experts(inspection)),
        ("MTP layers", ", ".join(map(str, inspection.mtp_layer_indices)) or "none"),
        ("weights", _counts(inspection.formats)),
        ("dtypes", _dtypes(inspection)),
        ("quantised", " ".join(inspection.quantization.values()) or "no"),
        ("tensors", f"{inspection.tensors} in {inspection.shards or 'no'} shards"),
        ("embeddings", "tied to the head" if inspection.tied_embeddings else "apart from the head"),
        ("goes along", _files(inspection.side_files)),
        ("left behind", _files(inspection.skipped_files)),
        ("forward", _forward(inspection)),
    ]
    lines = [f"{label:<12}{text}" for label, text in rows]
    reasons = [f"cannot decode: {reason}" for reason in inspection.refusals.reasons]
    notes = [f"note: {note}" for note in inspection.notes]
    return "\n".join([*_headline(inspection.facts), *lines, *reasons, *notes])


def plan_text(plan: PruningPlan) -> str:
    """A plan as a table, with what is common to all targets said once."""
    header = ("keep", "sparsity", "parameters", "active", "on disk", "host memory", "device memory")
    rows = [header, *(_variant_row(variant) for variant in plan.variants)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(
        [
            *_headline(plan.facts),
            "",
            *table,
            "",
            *_pass_lines(plan.calibration),
            f"disk: {_gigabytes(plan.disk_bytes)} free needed for the output",
            *_download_lines(plan.download, plan.disk_bytes),
            *_warning_lines(plan.variants),
            *(f"note: {note}" for note in plan.notes),
        ]
    )


def _headline(facts: ModelFacts) -> list[str]:
    mtp = f" + {_billions(facts.mtp_parameters)} in MTP layers" if facts.mtp_layers else ""
    estimated = " (estimated: no weights here)" if facts.estimated else ""
    parameters = f"{_billions(facts.total_parameters)} parameters"
    active = f"{_billions(facts.active_parameters)} active"
    layers = f"{facts.num_layers} layers, {facts.moe_layers} of them with"
    experts = f"{facts.num_experts} experts, {facts.experts_per_token} per token"
    largest = f"largest layer {_gigabytes(facts.largest_layer_bytes)}"
    return [
        f"{facts.architecture}: {layers} {experts}",
        f"{parameters}, {active}{mtp}",
        f"{_gigabytes(facts.bytes)}, {largest}{estimated}",
    ]


def _variant_row(variant: VariantPlan) -> tuple[str, ...]:
    device = variant.peak_device_bytes
    return (
        str(variant.keep),
        f"{variant.sparsity:.4g}",
        _billions(variant.total_parameters),
        _billions(variant.active_parameters),
        _gigabytes(variant.bytes),
        gib(variant.peak_host_bytes),
        gib(device) if device else "none",
    )


def _pass_lines(calibration: PassPlan) -> list[str]:
    where = "in a file" if calibration.hidden_states_in_file else "in memory"
    tokens = f"{calibration.tokens} tokens at most, batches of {calibration.batch_tokens}"
    budget = f"{gib(calibration.memory_budget_bytes)}, {calibration.expert_slots} experts at a time"
    states = f"hidden states {gib(calibration.hidden_state_bytes)} {where}"
    return [
        f"pass: {tokens}, {calibration.compute_dtype} on {calibration.device}",
        f"memory: budget {budget}, {states}",
    ]


def _download_lines(download: Download | None, written: int) -> list[str]:
    if download is None:
        return []
    whole, peak = _gigabytes(download.bytes), _gigabytes(download.evicted_peak_bytes)
    line = (
        f"download: {whole} of shards, kept in the Hub's cache; with --evict at most {peak} of them "
        f"on the output's disk at a time, {_gigabytes(download.evicted_peak_bytes + written)} with "
        "the output"
    )
    return [line]


def _warning_lines(variants: Sequence[VariantPlan]) -> list[str]:
    """Warnings in order of appearance; the targets are named where not all share one."""
    owners: dict[str, list[int]] = {}
    for variant in variants:
        for warning in variant.warnings:
            owners.setdefault(warning, []).append(variant.keep)
    return [
        f"warning: {text}"
        if len(keeps) == len(variants)
        else f"warning (keep {', '.join(map(str, keeps))}): {text}"
        for text, keeps in owners.items()
    ]


def _layer_run(run: LayerRun) -> str:
    name = "MoE" if run.kind == "moe" else run.kind
    layers = str(run.first) if run.first == run.last else f"{run.first}-{run.last}"
    return f"{layers} {name} ({_gigabytes(run.bytes)})"


def _experts(inspection: Inspection) -> str:
    facts = inspection.facts
    text = f"{facts.num_experts} a layer, {facts.experts_per_token} per token"
    if inspection.groups > 1:
        text += f" from {inspection.topk_groups} of {inspection.groups} groups"
    return text


def _counts(formats: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in formats.items())


def _dtypes(inspection: Inspection) -> str:
    return ", ".join(
        f"{tag} {_gigabytes(found['bytes'])}" for tag, found in inspection.dtypes.items()
    )


def _files(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_FILES]) or "nothing"
    return shown if len(names) <= _SHOWN_FILES else f"{shown} and {len(names) - _SHOWN_FILES} more"


def _forward(inspection: Inspection) -> str:
    count = inspection.refusals.count
    if not count:
        return "can run: every weight can be decoded"
    return f"cannot run: {count} weights cannot be decoded (compact works with scores of the model in another format)"


def _billions(parameters: int) -> str:
    if parameters < 10**8:
        return f"{parameters / 1e6:.2f} M"
    return f"{parameters / 1e9:.2f} B"


def _gigabytes(nbytes: int) -> str:
    if nbytes < 10**8:
        return f"{nbytes / 1e6:.2f} MB"
    return f"{nbytes / 1e9:.2f} GB"
