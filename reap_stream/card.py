"""README.md of a pruned checkpoint: what was cut from what, from the facts of the run alone."""

from __future__ import annotations

from reap_stream.model.opened import OpenedModel
from reap_stream.pruning import Variant
from reap_stream.records import Summary

_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [moe, reap, pruning, expert-pruning]
---
"""
_UNCHANGED = """Every kept tensor is byte-identical to the source's. Router rows and biases are those
of the kept experts, and experts are renumbered: `reap/kept_experts.json` says which stayed.
"""
_RECODED = {
    "fp8": "FP8 (E4M3, a scale for each block of 128 × 128)",
    "fp8-channel": "FP8 (E4M3, a scale for each output channel)",
    "bf16": "bfloat16",
}
_PAPER = "https://arxiv.org/abs/2510.13999"
_SUPER_EXPERTS = "https://arxiv.org/abs/2507.23279"


def render_card(model: OpenedModel, variant: Variant, summary: Summary) -> bytes:
    """The model card.

    Args:
        model: the source.
        variant: what was written.
        summary: what the job did.
    """
    architecture, keep = model.architecture, variant.target.keep
    before, after = architecture.total_parameters(), architecture.total_parameters(keep)
    settings, calibration = summary.details["settings"], summary.details["calibration"]
    name = model.checkpoint.name
    total, top_k = architecture.num_experts, architecture.routing.experts_per_token
    tokens = f", {calibration['tokens']} tokens" if "tokens" in calibration else ""
    sources = ", ".join(f"`{source}`" for source in calibration["sources"])
    lines = [
        _FRONT_MATTER,
        f"# {name}, {keep} of {total} experts\n",
        f"`{architecture.name}` with {total - keep} of {total} routed experts removed from every",
        "Mixture-of-Experts layer.\n",
        "| | source | pruned |",
        "|---|---|---|",
        f"| experts a layer | {total} | {keep} |",
        f"| experts a token | {top_k} | {top_k} |",
        f"| parameters | {before / 1e9:.4g} B | {after / 1e9:.4g} B |",
        f"| bytes | {_gb(model.checkpoint.nbytes)} | {_gb(variant.plan.total_size)} |",
        "",
        _changes(model),
        f"Criterion: {settings['method']} ([REAP]({_PAPER})).",
        f"Calibration: {sources}{tokens}.",
    ]
    lines += _choice_lines(summary)
    lines += _mtp_lines(model, settings["mtp"])
    lines += ["", "Quality: not evaluated.", ""]
    return "\n".join(lines).encode()


def _choice_lines(summary: Summary) -> list[str]:
    """What bore on the choice of experts beside the criterion."""
    settings, lines = summary.details["settings"], []
    weights = settings.get("source_weights", {})
    if weights:
        listed = ", ".join(f"`{source}` {weight:g}" for source, weight in weights.items())
        lines.append(f"Weights of calibration sources (others 1): {listed}.")
    if settings.get("protect") == "super":
        count = sum(len(experts) for experts in summary.details["protected"].values())
        lines.append(f"Kept whatever their score: {count} [super experts]({_SUPER_EXPERTS}).")
    return lines


def _mtp_lines(model: OpenedModel, mtp: str) -> list[str]:
    layers = list(model.mtp_kept_layers())
    said = {
        "score": "were scored and pruned by their own routing",
        "match": "keep the choice of the last MoE layer",
        "keep": "have all their experts, more than config.json counts",
        "drop": "were left out",
    }
    return ["", f"Next-token-prediction layers {layers} {said[mtp]}."] if layers else []


def _changes(model: OpenedModel) -> str:
    """What happened to the tensors that stay."""
    if not model.change.replaced:
        return _UNCHANGED
    return f"{_recoded(model)}\n{_UNCHANGED.replace('Every kept', 'Every other kept')}"


def _recoded(model: OpenedModel) -> str:
    """What was written in another format than the source's."""
    counts = model.change.counts
    written = " and ".join(
        f"{counts[name]} are stored as {text}" for name, text in _RECODED.items() if name in counts
    )
    return (
        f"Computed from the source's values: of its {sum(counts.values())} weights, those of removed "
        f"experts counted, {written}.\n"
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"
