"""The card's text, put together; what each part says follows from facts alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from huggingface_hub import ModelCard

from reap_stream.card.inputs import CardInputs
from reap_stream.card.markdown import code, table
from reap_stream.card.metadata import card_data
from reap_stream.card.method import method_section
from reap_stream.card.results import evaluation_section, limits_section
from reap_stream.card.source import SourceCard
from reap_stream.card.usage import (
    citation_section,
    files_section,
    reproduce_section,
    serving_section,
)

_WEIGHTS: Final = {
    "fp8": "FP8 (E4M3, a scale for each block of 128 × 128)",
    "fp8-channel": "FP8 (E4M3, a scale for each output channel)",
    "bf16": "bfloat16",
}


def render(inputs: CardInputs) -> str:
    """README.md.

    Args:
        inputs: what it is made of.

    Returns:
        Front matter, the card, and the source's own card.
    """
    parts = [
        _introduction(inputs),
        _figures(inputs),
        _changes(inputs),
        method_section(inputs),
        evaluation_section(inputs),
        limits_section(inputs),
        serving_section(inputs),
        reproduce_section(inputs),
        files_section(inputs),
        citation_section(inputs),
    ]
    text = "\n\n".join(parts)
    if inputs.source.text:
        text += f"\n\n## The card of {inputs.base}\n\n{inputs.source.text}"
    card = ModelCard(f"---\n{card_data(inputs).to_yaml()}\n---\n\n{text}\n")
    return str(card)


def _introduction(inputs: CardInputs) -> str:
    facts = inputs.facts
    total, gone = facts["source"]["experts"], facts["source"]["experts"] - inputs.keep
    return (
        f"# {inputs.name}\n\n"
        f"{_linked(facts['base'])} with {gone} of {total} routed experts removed from every "
        f"Mixture-of-Experts layer, so {inputs.keep} are left. Architecture: "
        f"`{facts['architecture']}`. No weight was trained. {_licence(inputs)}"
    )


def _licence(inputs: CardInputs) -> str:
    inherited = inputs.source.inherited()
    if inputs.source == SourceCard():
        return "The source had no card, so its licence is not on record here."
    if "license" not in inherited:
        return "The source's card names no licence."
    named = inherited.get("license_name") or inherited["license"]
    return f"The licence is the source's: {code(named)}."


def _linked(base: Mapping[str, Any]) -> str:
    if base["repository"] is None:
        return f"`{base['name']}` (a directory; its id on the Hub is not on record)"
    revision = f" at commit `{base['revision']}`" if base["revision"] else ""
    return f"[{base['repository']}](https://huggingface.co/{base['repository']}){revision}"


def _figures(inputs: CardInputs) -> str:
    facts, before, after = inputs.facts, inputs.facts["source"], inputs.facts["pruned"]
    rows = [
        ("experts a layer", str(before["experts"]), str(after["experts"])),
        ("experts a token", *[str(facts["experts_per_token"])] * 2),
        ("layers with experts", *[f"{facts['moe_layers']} of {facts['layers']}"] * 2),
        ("parameters", _count(before["parameters"]), _count(after["parameters"])),
        (
            "parameters a token uses",
            _count(before["active_parameters"]),
            _count(after["active_parameters"]),
        ),
        ("next-token-prediction (MTP) layers", _mtp(before), _mtp(after)),
        ("bytes of tensors", _size(before["nbytes"]), _size(after["nbytes"])),
        ("stored as (share of bytes)", _dtypes(before["dtypes"]), _dtypes(after["dtypes"])),
    ]
    if facts["context"] is not None:
        rows.append(("context (tokens)", *[str(facts["context"])] * 2))
    return (
        f"{table(('', 'source', 'pruned'), rows)}\n\n"
        "Parameters are those of the decoder: MTP layers and the scales of quantised weights are not "
        "counted."
    )


def _mtp(figures: Mapping[str, Any]) -> str:
    count = len(figures["mtp_layers"])
    return f"{count}, {figures['mtp_experts']} experts" if count else "none with experts"


def _count(count: int) -> str:
    return f"{count / 1e9:.4g} B" if count >= 10**9 else f"{count / 1e6:.4g} M"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.2f} MB"


def _dtypes(nbytes: Mapping[str, int]) -> str:
    total = sum(nbytes.values()) or 1
    shares = [f"{dtype} {_share(own / total)}" for dtype, own in nbytes.items()]
    return shares[0].split()[0] if len(shares) == 1 else ", ".join(shares)


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"


def _changes(inputs: CardInputs) -> str:
    return "\n".join(["## What was changed", "", *(f"- {line}" for line in _change_lines(inputs))])


def _change_lines(inputs: CardInputs) -> Iterator[str]:
    tensors = inputs.facts["tensors"]
    computed = tensors["computed"]
    if tensors["whole"]:
        yield (
            f"{tensors['whole']} tensors without a part for each expert are byte-identical to the "
            "source's."
        )
    if tensors["experts"]:
        yield (
            f"{tensors['experts']} tensors of kept experts are byte-identical to the source's; "
            "experts are renumbered from 0."
        )
    if tensors["entries"]:
        yield (
            f"{tensors['entries']} tensors with an entry for each expert (routers, their biases, "
            "weights of all experts in one) hold the entries of the kept ones, byte-identical."
        )
    if computed:
        yield f"{computed} tensors were computed from the source's values: {_recoded(inputs)}."
    yield "`reap/kept_experts.json` says which experts of the source stayed."
    yield from _mtp_lines(inputs)
    stored = "; quantisation settings follow what is stored" if computed else ""
    yield (
        "In `config.json` the number of experts follows; settings that name experts are renumbered"
        f"{stored}."
    )


def _recoded(inputs: CardInputs) -> str:
    counts = inputs.run["weights"]
    written = [text for name, text in _WEIGHTS.items() if counts.get(name)]
    return f"weights stored as {' and '.join(written)}"


def _mtp_lines(inputs: CardInputs) -> Iterator[str]:
    layers = inputs.facts["source"]["mtp_layers"]
    said = {
        "score": "were scored and pruned by their own routing",
        "match": "keep the choice of the last MoE layer",
        "keep": "have all their experts, more than config.json counts",
        "drop": "were left out",
    }
    if layers:
        yield f"Next-token-prediction layers {layers} {said[inputs.settings['mtp']]}."
