"""README.md of a pruned checkpoint: what was cut from what, from the facts of the run alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
_PAPER = "https://arxiv.org/abs/2510.13999"


def render_card(
    model: OpenedModel, variant: Variant, kept: Mapping[int, Sequence[int]], summary: Summary
) -> bytes:
    """The model card.

    Args:
        model: the source.
        variant: what was written.
        kept: kept experts by layer.
        summary: what the job did.
    """
    architecture, keep = model.architecture, variant.target.keep
    before, after = architecture.total_parameters(), architecture.total_parameters(keep)
    settings, calibration = summary.details["settings"], summary.details["calibration"]
    mtp = [layer for layer in kept if layer >= architecture.num_layers]
    name = model.checkpoint.directory.resolve().name
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
        _UNCHANGED,
        f"Criterion: {settings['method']} ([REAP]({_PAPER})).",
        f"Calibration: {sources}{tokens}.",
    ]
    if mtp:
        lines += ["", f"Next-token-prediction layers {mtp} keep the choice of the last MoE layer."]
    lines += ["", "Quality: not evaluated.", ""]
    return "\n".join(lines).encode()


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"
