"""A model's own forward, in which its decoder answers with given hidden states.

Nothing that comes before them matters for the logits, so it needs no values: the embeddings of
tokens are zeros, and where a vision-language model computes something with weights that are not
there, the result has a shape and no values, and goes to the decoder, which does not look at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import Architecture
from reap_stream.model.calls import leaves, map_leaves
from reap_stream.model.transformers_api import BaseOutput

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
_META = torch.device("meta")
_PROBE_TOKENS = 2


class HeadForward:
    """What a model does behind its decoder.

    Args:
        architecture: the model.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._name = architecture.name
        self._model: nn.Module = architecture.model
        self._dtype: torch.dtype = architecture.model.dtype
        self._text: nn.Module = architecture.text_model
        self._base: nn.Module = architecture.model.get_submodule(architecture.decoder_path)
        self._embedding: nn.Module = architecture.embedding
        self._width = int(architecture.embedding.weight.shape[-1])

    def learn(self) -> tuple[list[str], int]:
        """Runs it without values.

        Returns:
            Parameters and buffers outside the decoder that it uses, in that order; logits a token.

        Raises:
            UnsupportedError: the model has no head, or does not run without values.
        """
        hidden = torch.empty((1, _PROBE_TOKENS, self._width), dtype=self._dtype, device=_META)
        mode = _Valueless(self._outside())
        try:
            logits = _logits(self._run(hidden, torch.device("cpu"), mode))
        except _FAILURES as error:
            message = f"{self._name} does not compute logits on tensors without values: {error}"
            raise UnsupportedError(message) from error
        if logits is None or logits.shape[:-1] != hidden.shape[:-1]:
            message = f"{self._name} gives no logits for each token: it cannot be evaluated"
            raise UnsupportedError(message)
        return list(mode.used), int(logits.shape[-1])

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Runs it.

        Args:
            hidden: [rows, width, hidden], last hidden states.

        Returns:
            Logits [rows, width, vocabulary].

        Raises:
            UnsupportedError: they depend on weights that are not there.
        """
        logits = _logits(self._run(hidden, hidden.device, _Valueless({})))
        if logits is None or logits.is_meta:
            message = f"{self._name} computes logits with more than the weights of its head"
            raise UnsupportedError(message)
        return logits

    def _run(self, hidden: torch.Tensor, device: torch.device, mode: TorchFunctionMode) -> Any:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=device)

        def answer(*_args: Any, **_kwargs: Any) -> BaseOutput:
            return BaseOutput(last_hidden_state=hidden)

        def embed(given: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
            return torch.zeros((*given.shape, self._width), dtype=self._dtype, device=device)

        with _acting(self._base, answer), _acting(self._embedding, embed), torch.no_grad(), mode:
            return self._text(input_ids=ids, use_cache=False)

    def _outside(self) -> dict[int, str]:
        """``id`` → name of the model's tensors outside the decoder; tied ones are there twice."""
        inside = {id(module) for module in self._base.modules()}
        named: dict[int, str] = {}
        for path, module in self._model.named_modules():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if id(module) not in inside:
                named.update((id(tensor), f"{path}.{name}".lstrip(".")) for name, tensor in own)
        return named


def _logits(output: Any) -> torch.Tensor | None:
    found = getattr(output, "logits", None)
    return found if isinstance(found, torch.Tensor) else None


@contextmanager
def _acting(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class _Valueless(TorchFunctionMode):
    """Lets tensors with values meet such without, which gives tensors without.

    Args:
        named: ``id`` → name of the tensors whose use is noted.

    Attributes:
        used: names of those that were used, in that order.
    """

    def __init__(self, named: Mapping[int, str]) -> None:
        super().__init__()
        self._named = named
        self.used: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = leaves([args, kwargs])
        tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        self.used.update((self._named[id(t)], None) for t in tensors if id(t) in self._named)
        without = [tensor.is_meta for tensor in tensors]
        if func is torch.Tensor.to and not without[0] and (any(without) or _names_meta(given)):
            # Some models send ids to the device of the embedding matrix, which is on none.
            return args[0]
        if any(without):
            args, kwargs = map_leaves((args, kwargs), _without_values)
        return func(*args, **kwargs)


def _names_meta(given: list[Any]) -> bool:
    return any(leaf == _META for leaf in given if isinstance(leaf, torch.device))


def _without_values(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.to(_META)
    return _META if isinstance(leaf, torch.device) else leaf
