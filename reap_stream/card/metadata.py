"""The front matter, by huggingface_hub's own class: what the Hub's search and pages go by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub import ModelCardData

from reap_stream.calibration.spec import parse_spec
from reap_stream.card.inputs import CardInputs
from reap_stream.errors import UsageError


def card_data(inputs: CardInputs) -> ModelCardData:
    """The front matter; what is not known is left out."""
    inherited = inputs.source.inherited()
    if "license_link" in inherited:
        inherited["license_link"] = _reachable(inherited["license_link"], inputs.facts)
    return ModelCardData(
        base_model=inputs.facts["base"]["repository"],
        library_name="transformers",
        pipeline_tag=inherited.pop("pipeline_tag", None) or _pipeline(inputs.facts),
        tags=list(_tags(inputs)),
        datasets=data_sets(inputs.run) or None,
        **inherited,
    )


def _reachable(link: str, facts: Any) -> str:
    """A link to the licence: into the source's repository, if its file did not come along."""
    base = facts["base"]
    relative = "://" not in link and not link.startswith("/")
    if not relative or base["repository"] is None or link in facts.get("side_files", [link]):
        return link
    return f"https://huggingface.co/{base['repository']}/blob/{base['revision'] or 'main'}/{link}"


def data_sets(run: Any) -> list[str]:
    """Ids of the calibration's data sets on the Hub, each once."""
    calibration = run["calibration"]
    origins = calibration.get("origins")
    if origins is None:
        names = [_hub_name(source) for source in calibration["sources"]]
    else:
        names = [origin["name"] if origin["kind"] == "hub" else None for origin in origins]
    return list(dict.fromkeys(name for name in names if name is not None))


def _hub_name(source: str) -> str | None:
    try:
        spec = parse_spec(source)
    except UsageError:
        return None
    return spec.name if spec.kind == "hub" else None


def _pipeline(facts: Any) -> str | None:
    if facts["vision"]:
        return "image-text-to-text"
    return "text-generation" if facts["architecture"].endswith("ForCausalLM") else None


def _tags(inputs: CardInputs) -> Iterator[str]:
    yield "moe"
    yield "pruning"
    yield "expert-pruning"
    if inputs.settings["method"] == "reap":
        yield "reap"
    if inputs.facts["model_type"]:
        yield str(inputs.facts["model_type"])
    if inputs.facts["quantization"]:
        yield str(inputs.facts["quantization"]).lower()
    yield "reap-stream"
