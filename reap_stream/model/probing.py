"""Runs of a model without its weights, to see how its layers are wired.

Weights outside the layers are random, so is what the layers answer. Real weights that are there
already stay.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from typing_extensions import Self

from reap_stream.errors import UnsupportedError
from reap_stream.model.adapters import attach_experts
from reap_stream.model.architecture import Architecture
from reap_stream.model.calls import shared_dicts
from reap_stream.model.outline import Outline, outline_at, plain_outline, trace_outline
from reap_stream.model.recording import Answer, Lookup, Recorded, Surroundings
from reap_stream.model.transformers_api import get_tensor, materialize_buffers, set_tensor

_IDS = 8
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a model on tokens.

    Attributes:
        ids: the tokens.
        calls: what each layer was called with.
        outputs: what each layer but the last answered.
    """

    ids: torch.Tensor
    calls: list[Recorded]
    outputs: list[list[Any]]


class Probe:
    """Runs a model whose layers answer at random; a context, after which weights are gone again.

    Args:
        architecture: the model.
        device: where its code around the layers runs.
    """

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        self._architecture = architecture
        self._device = device
        self._surroundings = Surroundings(architecture)
        self._filled: list[str] = []
        self._lookups: Mapping[int, Lookup] = {}
        self._style = ""

    def __enter__(self) -> Self:
        """Makes up weights."""
        model = self._architecture.model
        materialize_buffers(model, self._device)
        prefix = self._architecture.layers_path.rpartition(".")[0]
        rows = self._surroundings.embeddings()
        tables = {f"{prefix}.{path}.weight".lstrip(".") for path in rows}
        self._lookups = {id(m.weight): self._random_rows(m.embedding_dim) for m in rows.values()}
        for name, tensor in model.state_dict().items():
            inside = self._architecture.layer_of(name) is not None or name in tables
            if tensor.is_meta and not inside and name.startswith(prefix):
                set_tensor(model, name, _random(tensor, self._generator(name), self._device))
                self._filled.append(name)
        for path in self._architecture.experts_paths.values():
            attach_experts(model, path, lambda hidden, _index, _weights: torch.empty_like(hidden))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Forgets them."""
        model = self._architecture.model
        for path in self._architecture.experts_paths.values():
            attach_experts(model, path, None)
        for name in self._filled:
            set_tensor(model, name, torch.empty_like(get_tensor(model, name), device="meta"))

    def learn_outlines(self, width: int) -> tuple[Outline, ...]:
        """What each layer but the last gives, on one row of `width` tokens.

        Raises:
            UnsupportedError: the model does not run with any form of answers.
        """
        reasons = []
        for style in (self._style,) if self._style else ("tensor", "tuple", "traced"):
            try:
                outlines, run = self._try(style, width)
            except (*_FAILURES, UnsupportedError) as error:
                reasons.append(str(error))
                continue
            if style == "traced" or self._only_hidden_states(run):
                self._style = style
                return outlines
            reasons.append("layers share more than their hidden states")
        message = (
            f"the layers of {self._architecture.name} cannot be run one by one: {reasons[-1]}; "
            "this version has no adapter for it"
        )
        raise UnsupportedError(message)

    def run(
        self, outlines: tuple[Outline, ...], width: int, *, tokens: int = 0, answers: Any = 0
    ) -> Run:
        """Runs the model on one row.

        Args:
            outlines: what layers give.
            width: number of tokens.
            tokens: seed of the tokens.
            answers: seed of the answers, or a mapping (layer, number) → seed of single ones.
        """
        given: list[list[Any]] = []
        ids = self._tokens(width, tokens)
        answer = self._answer(outlines, answers, given)
        return Run(ids, self._surroundings.record(ids, answer, self._lookups), given)

    def finish(
        self, outlines: tuple[Outline, ...], width: int, *, answers: Mapping[Any, int]
    ) -> torch.Tensor:  # fmt: skip
        """Runs the model on one row to its end.

        Args:
            outlines: what layers give, the last like the one before it.
            width: number of tokens.
            answers: (layer, number) → seed of single answers.

        Returns:
            What the head sees, [1, width, hidden].
        """
        answer = self._answer(outlines, answers, [])
        return self._surroundings.finish(self._tokens(width, 0), answer, self._lookups)

    def _answer(
        self, outlines: tuple[Outline, ...], answers: Any, given: list[list[Any]]
    ) -> Answer:  # fmt: skip
        """Acts as the layers, at random, and notes in `given` what it gave."""
        seeds = answers if isinstance(answers, Mapping) else {}
        usual = 0 if isinstance(answers, Mapping) else answers

        def answer(index: int, recorded: Recorded) -> Any:
            outline = outline_at(outlines, index) or plain_outline(recorded.hidden, in_tuple=False)
            outputs = [
                self._output(spec, f"{index} {number} {seeds.get((index, number), usual)}")
                for number, spec in enumerate(outline.outputs)
            ]
            given.append(outputs)
            return outline.give(outputs, recorded.call)

        return answer

    def _try(self, style: str, width: int) -> tuple[tuple[Outline, ...], Run]:
        outlines: list[Outline] = []
        given: list[list[Any]] = []

        def answer(index: int, recorded: Recorded) -> Any:
            if style == "traced":
                layer = self._surroundings.layers[index]
                outlines.append(trace_outline(layer, recorded.hidden, recorded.call))
            else:
                outlines.append(plain_outline(recorded.hidden, in_tuple=style == "tuple"))
            given.append([self._stand_in(spec) for spec in outlines[-1].outputs])
            return outlines[-1].give(given[-1], recorded.call)

        ids = self._tokens(width, 0)
        calls = self._surroundings.record(ids, answer, self._lookups)
        return tuple(outlines), Run(ids, calls, given)

    def _only_hidden_states(self, run: Run) -> bool:
        """Whether nothing but hidden states, and these as they are, goes from layer to layer."""
        for call, outputs in zip(run.calls[1:], run.outputs, strict=True):
            if call.hidden is not outputs[0]:
                return False
        for layer, recorded in zip(self._surroundings.layers, run.calls, strict=True):
            shares = shared_dicts(recorded.call)
            if shares and trace_outline(layer, recorded.hidden, recorded.call).left:
                return False
        return True

    def _tokens(self, width: int, seed: int) -> torch.Tensor:
        ids = (torch.arange(width, device=self._device) * (2 * seed + 1) + seed) % _IDS
        return ids[None]

    def _output(self, spec: Any, name: str) -> Any:
        if not isinstance(spec, torch.Tensor):
            return spec
        return _random(spec, self._generator(name), self._device)

    def _stand_in(self, spec: Any) -> Any:
        # Of any shape in little memory.
        if not isinstance(spec, torch.Tensor):
            return spec
        return torch.zeros((), dtype=spec.dtype, device=self._device).expand(spec.shape)

    def _random_rows(self, width: int) -> Lookup:
        table = torch.randn((_IDS, width), generator=self._generator(f"rows {width}"))
        rows = table.to(self._device, self._architecture.model.dtype)
        return lambda ids: rows[ids]

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _random(spec: torch.Tensor, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    if spec.is_floating_point():
        made = torch.randn(spec.shape, generator=generator)
    else:
        made = torch.randint(0, 2, spec.shape, generator=generator)
    return made.to(device, spec.dtype)
