"""What is known of the pruned model's quality, and what is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reap_stream.card.inputs import CardInputs
from reap_stream.card.markdown import code, table
from reap_stream.scoring.agreement import Agreement

_HEADER = ("model", "experts", "tokens predicted (n)", "loss", "perplexity", "KL", "same top-1")


def evaluation_section(inputs: CardInputs) -> str:
    """The section: figures with their n, or the words ``not evaluated``."""
    return "\n\n".join(["## Evaluation", *_evaluation(inputs)])


def _evaluation(inputs: CardInputs) -> Iterator[str]:
    evaluation = inputs.evaluation
    if evaluation is None:
        yield "Quality: not evaluated."
        return
    text = evaluation["text"]
    yield (
        f"`reap-stream eval` on {text['rows']} rows{_how(evaluation)}, {text['tokens']} tokens (SHA-256 "
        f"`{text['sha256']}`). Loss in nats a predicted token; KL: mean divergence from the first "
        "model's predictions in nats; same top-1: how often both find the same token likeliest."
    )
    candidates = evaluation["candidates"]
    own = inputs.evaluated(candidates)
    if len(own) == 1:
        yield f"This model is {code(own[0]['label'])}."
    sources = list(candidates[0]["sources"])
    for source in sources if len(sources) > 1 else ():
        rows = [_row(candidate, candidate["sources"][source]) for candidate in candidates]
        yield f"On {code(source)}:"
        yield table(_HEADER, rows)
    yield "On all of it:" if len(sources) > 1 else f"On {', '.join(map(code, sources))}:"
    yield table(_HEADER, [_row(candidate, candidate["all"]) for candidate in candidates])
    for note in evaluation.get("notes", ()):
        yield f"Note: {note}."
    yield "Tasks, generation and conversations: not evaluated."


def _how(evaluation: Mapping[str, Any]) -> str:
    """Perplexity depends on how long rows are."""
    settings = evaluation.get("settings", {})
    length, dtype = settings.get("sequence_length"), settings.get("compute_dtype")
    longest = f" of at most {length} tokens" if length else ""
    return f"{longest}, computed in {dtype}" if dtype else longest


def _row(candidate: Mapping[str, Any], figures: Mapping[str, Any]) -> tuple[str, ...]:
    agreed = figures["top1_agreement"]
    return (
        code(candidate["label"]),
        str(candidate["keep"]),
        str(figures["tokens"]),
        *(
            _number(figures[key], digits)
            for key, digits in (("loss", ".4f"), ("perplexity", ".2f"))
        ),
        _number(figures["kl"], ".4f"),
        "-" if agreed is None else f"{agreed:.2%}",
    )


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None else format(value, digits)


def limits_section(inputs: CardInputs) -> str:
    """The section."""
    return "\n".join(["## Limits", "", *(f"- {line}" for line in _limits(inputs))])


def _limits(inputs: CardInputs) -> Iterator[str]:
    yield (
        "Experts went by what the calibration data above needs of them: languages, domains and "
        "formats that it lacks lose most."
    )
    if inputs.evaluation is None:
        yield "Nothing is known of its quality; measure it on your own use before you rely on it."
    else:
        yield (
            "Loss on given text says little of long generation: look for repetition and for answers "
            "that do not end."
        )
    yield from _choice_limits(inputs.run, inputs.keep)
    yield from _mtp_limits(inputs)
    serving = inputs.run.get("serving", {}).get(str(inputs.keep), {})
    yield from (f"{_sentence(warning)}" for warning in serving.get("warnings", ()))
    changed = serving.get("activation_scale_changes", {})
    if changed:
        yield (
            f"The largest static activation scale went with its expert in {len(changed)} places "
            "(listed in `reap/run.json`)."
        )


def _choice_limits(run: Mapping[str, Any], keep: int) -> Iterator[str]:
    other = run["settings"].get("scores_of_other_weights")
    if other:
        yield (
            "Its experts were chosen by scores of other weights than these (fingerprint "
            f"`{other[:12]}`), said to be of the same model."
        )
    unreached = run.get("unreached_experts", {})
    if unreached:
        count = sum(len(experts) for experts in unreached.values())
        yield (
            f"{count} experts in {len(unreached)} layers were reached by no calibration token: they "
            "went first, and of them nothing is known."
        )
    lost = sum(run.get("non_finite_outputs", {}).values())
    if lost:
        yield f"{lost} expert outputs were not finite and are not in the scores."
    found = run.get("split_half", {}).get(str(keep))
    if found is not None and Agreement(**found).low:
        yield "Two halves of the calibration rows choose rather different experts: see above."
    yield from (_sentence(note) for note in run["calibration"].get("notes", ()))


def _mtp_limits(inputs: CardInputs) -> Iterator[str]:
    before, after = inputs.facts["source"], inputs.facts["pruned"]
    kind = inputs.settings["mtp"]
    if before["mtp_layers"] and kind == "drop":
        yield "No speculative decoding with the model's own next-token-prediction layers."
    if after["mtp_layers"] and kind == "keep":
        yield (
            f"Next-token-prediction layers keep {after['mtp_experts']} experts where config.json "
            f"counts {after['experts']} for all layers: llama.cpp's converter and vLLM's speculation "
            "refuse such a checkpoint; it serves where these layers are ignored."
        )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")
