"""The command that gives the same bytes, put together from the settings on record."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Final

from reap_stream.card.inputs import CardInputs

_SCORES: Final = "reap/scores.safetensors"
# Option and setting, in the order in which they are printed; what is empty is left out.
_RUN: Final = (
    ("--samples", "samples"),
    ("--sequence-length", "sequence_length"),
    ("--batch-tokens", "batch_tokens"),
    ("--device", "device"),
    ("--compute-dtype", "compute_dtype"),
    ("--propagate", "propagate"),
)
_CHOICE: Final = (("--method", "method"), ("--seed", "seed"), ("--protect", "protect"))
_OUTPUT: Final = (
    ("--weights", "weights"),
    ("--max-shard-size", "max_shard_nbytes"),
    ("--mtp", "mtp"),
)
_FLAGS: Final = (
    ("--pack", "pack"),
    ("--fp8-experts-only", "fp8_experts_only"),
    ("--scores-of-other-weights", "scores_of_other_weights"),
    ("--trust-remote-code", "trust_remote_code"),
)


def command(inputs: CardInputs) -> list[str]:
    """The command's words: everything that decides a byte, whether or not it is the default."""
    settings = inputs.settings
    scored = "calibration" in settings
    words = ["reap-stream", "prune" if scored else "compact", _model(inputs)]
    words += ["--output", inputs.name, "--keep", str(inputs.keep)]
    if scored:
        words += [word for spec in settings["calibration"] for word in ("--calibration", spec)]
        words += _options(settings, _RUN)
    else:
        words += ["--scores", _SCORES]
    words += _options(settings, _CHOICE)
    words += _pairs("--source-weights", settings.get("source_weights", {}))
    words += _pairs("--map", settings.get("field_map", {}))
    words += _options(settings, _OUTPUT)
    return words + [option for option, key in _FLAGS if settings.get(key)]


def command_text(inputs: CardInputs) -> str:
    """The command for a shell, an option a line."""
    lines: list[str] = []
    for word in command(inputs):
        if not lines or word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join(lines)


def _model(inputs: CardInputs) -> str:
    base = inputs.facts["base"]
    # Scores taken on a directory fit no model on the Hub, even one of the same files.
    on_disk = "calibration" not in inputs.settings and "repository" not in inputs.run["source"]
    if base["repository"] is None or on_disk:
        return str(inputs.settings.get("model", inputs.run["source"]["path"]))
    revision = base["revision"]
    return f"{base['repository']}@{revision}" if revision else str(base["repository"])


def _options(settings: Mapping[str, Any], options: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for option, key in options:
        if settings.get(key) is not None:
            yield option
            yield str(settings[key])


def _pairs(option: str, pairs: Mapping[str, Any]) -> list[str]:
    if not pairs:
        return []
    listed = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in pairs.items())
    return [option, ",".join(listed)]
