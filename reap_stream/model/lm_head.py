"""The model's own head, run on slices of tokens: last hidden states in, logits out.

    with LmHead(opened, reader, device) as head:
        logits = head.logits(hidden)                 # [n, hidden] → float32 [n, vocabulary]

Families scale their logits, cap them, cut them to fewer tokens or compute them in another dtype. So
the model's own forward is run, in which the decoder answers with the given hidden states. It is run
once without values when the head is made, and the parameters that it then comes to use outside
the decoder are the head's weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from typing_extensions import Self

from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import UnsupportedError
from reap_stream.formats import Weight
from reap_stream.model.feeds import feed_refs
from reap_stream.model.head_forward import HeadForward
from reap_stream.model.loading import read_parameters
from reap_stream.model.opened import OpenedModel
from reap_stream.model.roles import Feed
from reap_stream.model.same_head import same_bytes, same_computation, same_decoding
from reap_stream.model.transformers_api import (
    get_tensor,
    materialize_buffers,
    parameter_dtype,
    set_tensor,
    tied_names,
)

# Rows enough for products to run at full rate; some families make a mask of them, [n, n].
_MOST_TOKENS = 1024
# float32 [n, vocabulary] held at a time: the reference's log-probabilities, the logits of one
# candidate, and three more while a model that caps its logits makes those of the next.
_SLICES = 5
_FLOAT_NBYTES = 4


class LmHead:
    """The head of a model; a context in which its weights are loaded.

    Args:
        opened: the model.
        reader: reads the weights.
        device: where the head runs.

    Attributes:
        vocab_size: logits of a token; a family may give fewer than its embedding has rows.

    Raises:
        UnsupportedError: the model gives no logits, or the checkpoint lacks a weight for them.
    """

    def __init__(self, opened: OpenedModel, reader: Reader, device: torch.device) -> None:
        self._opened = opened
        self._reader = reader
        self._device = device
        self._forward = HeadForward(opened.architecture)
        names, self.vocab_size = self._forward.learn()
        state = opened.architecture.model.state_dict(keep_vars=True)
        self._computed = [name for name in names if name not in state]
        self._feeds = {name: self._feed(name) for name in names if name in state}
        self._replaced: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its weights as they are computed with."""
        model = self._opened.architecture.model
        dtypes = {
            name: parameter_dtype(model, feed.target, model.dtype)
            for name, feed in self._feeds.items()
        }
        return sum(get_tensor(model, n).numel() * dtype.itemsize for n, dtype in dtypes.items())

    @property
    def loading_nbytes(self) -> int:
        """The most bytes that are held while it is loaded: weights, and what one is decoded from.

        Weights that are not packed are read piece by piece.
        """
        model, beside = self._opened.architecture.model, [0]
        for name, feed in self._feeds.items():
            if not all(weight.is_plain for weight in _weights([feed])):
                stored = sum(ref.nbytes for ref in feed_refs([feed]))
                # Decoding on a device makes float32 matrices of values and of scales.
                beside.append(stored + 2 * _FLOAT_NBYTES * get_tensor(model, name).numel())
        return self.nbytes + max(beside)

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors of the checkpoint that it is made of, in the order in which it uses them."""
        return tuple(feed_refs(self._feeds.values()))

    def same_weights(self, other: LmHead) -> bool:
        """Whether another checkpoint's head is this one: it gives the same logits.

        True only where both are of one class with configs that say the same but for experts, names
        and formats of weights, and the bytes of all tensors behind both are equal. Names of
        tensors may differ. Reads both in small pieces unless they are the same tensors of a file.

        Raises:
            ReadError: a tensor cannot be read.
        """
        if list(self._feeds) != list(other._feeds):
            return False
        mine = (self._opened, list(self._feeds.values()))
        theirs = (other._opened, list(other._feeds.values()))
        if not (same_computation(self._opened, other._opened) and same_decoding(mine, theirs)):
            return False
        return same_bytes(self._reader, self.refs(), other.refs())

    def open(self) -> None:
        """Loads the weights.

        Raises:
            ReadError: a tensor cannot be read.
            CheckpointError: a tensor has another shape than the model's parameter.
        """
        model = self._opened.architecture.model
        if self._computed:
            materialize_buffers(model, self._device)
        for name, feed in self._feeds.items():
            made = read_parameters(model, self._opened.keys, feed, self._reader, self._device)
            # Where the head is the embedding matrix too, that stays without values.
            values = made[feed.target]
            self._replaced[name] = get_tensor(model, name)
            set_tensor(model, name, values)

    def close(self) -> None:
        """Releases the weights; may be called twice."""
        model = self._opened.architecture.model
        for name, before in self._replaced.items():
            module, _, leaf = name.rpartition(".")
            # The very tensor that was there: the embedding's is tied to it.
            setattr(model.get_submodule(module), leaf, before)
        self._replaced.clear()

    def __enter__(self) -> Self:
        """Loads the weights."""
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Releases the weights."""
        self.close()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model's forward makes of its decoder's output.

        Args:
            hidden: [n, hidden], last hidden states behind the final norm, as
                `Skeleton.last_hidden_state` gives them.

        Returns:
            float32 [n, vocabulary] on the head's device.

        Raises:
            UnsupportedError: the forward computes logits with more than was found when the head
                was made.
        """
        assert len(self._replaced) == len(self._feeds), "the head is not open"
        return self._forward.run(hidden[None].to(self._device))[0].float()

    def _feed(self, name: str) -> Feed:
        """What a parameter is made of: its own tensors, or those of one that is tied to it."""
        feeds = self._opened.tensor_map.feeds
        for candidate in (name, *tied_names(self._opened.architecture.model, name)):
            if candidate in feeds:
                return self._checked(feeds[candidate])
        message = (
            f"{self._opened.checkpoint.directory}: no tensor for parameter {name!r} of the head, "
            "or none in a format that is known: the checkpoint is not whole"
        )
        raise UnsupportedError(message)

    def _checked(self, feed: Feed) -> Feed:
        for weight in _weights([feed]):
            reason = weight.format.refusal(weight)
            if reason is not None:
                message = f"{next(iter(weight.parts.values())).file}: {reason}"
                raise UnsupportedError(message)
        return feed


def slice_tokens(vocab_size: int, budget_nbytes: int) -> int:
    """Tokens of a slice whose logits, and what is computed with them, take at most a budget.

    At least one, and no more than products need to run at full rate.

    Args:
        vocab_size: logits of a token.
        budget_nbytes: bytes that a slice may take.
    """
    return max(1, min(_MOST_TOKENS, budget_nbytes // (vocab_size * _SLICES * _FLOAT_NBYTES)))


def _weights(feeds: Iterable[Feed]) -> list[Weight]:
    groups = (group for feed in feeds for _, group in feed.groups)
    return [weight for group in groups for weight in group]
