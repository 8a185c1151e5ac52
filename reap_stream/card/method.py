"""How the experts were chosen: criterion, calibration data, and what bore on the choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from reap_stream.card.inputs import CardInputs
from reap_stream.card.markdown import code, table
from reap_stream.choice_record import choice_notes

_PAPER: Final = "https://arxiv.org/abs/2510.13999"
_SUPER_EXPERTS: Final = "https://arxiv.org/abs/2507.23279"
_CRITERIA: Final = {
    "reap": f"the mean, over the tokens sent to an expert, of its gate weight times the L2 norm of its output ([REAP]({_PAPER}))",
    "ean": "the mean L2 norm of an expert's output over the tokens sent to it",
    "frequency": "the number of tokens sent to an expert",
    "gate": "the mean gate weight of the tokens sent to an expert",
    "random": "chance: a control, not a method",
}


def method_section(inputs: CardInputs) -> str:
    """The section."""
    return "\n\n".join(["## How experts were chosen", *_paragraphs(inputs)])


def _paragraphs(inputs: CardInputs) -> Iterator[str]:
    settings, run = inputs.settings, inputs.run
    method = settings["method"]
    seed = f", seed {settings['seed']}" if method == "random" else ""
    yield (
        f"Criterion: `{method}`{seed}: {_CRITERIA.get(method, 'see the documentation')}. The "
        "same number stayed in every layer, those with the highest scores. Tokens went where the "
        "model's own routers sent them."
    )
    propagate = settings.get("propagate", run["calibration"].get("propagate"))
    if propagate is not None:
        seen = "the source's" if propagate == "original" else "the already pruned layers'"
        yield f"Layers were run on {seen} activations (`--propagate {propagate}`)."
    yield _calibration(run["calibration"], run["versions"]["reap-stream"])
    yield from _choice(inputs)


def _calibration(calibration: Mapping[str, Any], version: str) -> str:
    tokens = f", {calibration['tokens']} tokens" if "tokens" in calibration else ""
    sha256 = calibration.get("sha256", calibration.get("calibration_sha256"))
    total = f"Calibration data{tokens}" + (f" (SHA-256 `{sha256}`)" if sha256 else "") + ":"
    origins = calibration.get("origins")
    if not origins:
        listed = "\n".join(f"- {code(source)}" for source in calibration["sources"])
        return f"{total}\n\n{listed}"
    header = ("data", "config, split", "revision", "rows", "tokens", "SHA-256 of token ids")
    return f"{total}\n\n" + table(header, [_origin(origin, version) for origin in origins])


def _origin(origin: Mapping[str, Any], version: str) -> tuple[str, ...]:
    where = ", ".join(str(origin[key]) for key in ("config", "split") if key in origin)
    known = f"reap-stream {version}" if origin["kind"] == "builtin" else "a file"
    revision = code(origin["revision"]) if "revision" in origin else known
    counts = (str(origin["rows"]), str(origin["tokens"]))
    return (code(origin["source"]), where or "-", revision, *counts, code(origin["sha256"]))


def _choice(inputs: CardInputs) -> Iterator[str]:
    settings = inputs.settings
    weights = settings.get("source_weights", {})
    if weights:
        listed = ", ".join(f"{code(source)} {weight:g}" for source, weight in weights.items())
        yield f"Weights of calibration sources (others 1): {listed}."
    if settings.get("protect") == "super":
        count = sum(len(experts) for experts in inputs.run["protected"].values())
        yield f"Kept whatever their score: {count} [super experts]({_SUPER_EXPERTS})."
    missing = inputs.run.get("split_half_missing")
    if missing is not None:
        yield f"Agreement between two halves of the calibration rows: unknown, {missing}."
    mark = f"keep {inputs.keep}: "
    for note in choice_notes(inputs.run):
        if note.startswith(mark):
            text = note.removeprefix(mark)
            yield f"{text[0].upper()}{text[1:]}."
