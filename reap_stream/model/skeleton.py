"""The model around its decoder layers: embeddings, and what each layer is called with.

The model's own forward is run with every layer replaced by a recorder that hands its input on.
So position embeddings, masks and whatever else a family passes its layers are the model's own,
and the same run gives the embedded tokens. The recorders also check that nothing happens to the
hidden states between two layers, which is what lets us run the layers one by one.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from reap_stream.checkpoint.reader import Reader
from reap_stream.errors import UnsupportedError
from reap_stream.formats import Weight
from reap_stream.formats.plain import TORCH_DTYPES
from reap_stream.model.loading import load_parameters
from reap_stream.model.opened import OpenedModel
from reap_stream.model.roles import TensorMap
from reap_stream.model.transformers_api import KeyMap, materialize_buffers

# Rows come sorted by length, so batches of one shape are neighbours. Calls hold masks and position
# embeddings: those of all shapes would grow with the calibration data.
KEPT_SHAPES = 4


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What a layer is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends the model's forward once the last layer was reached."""


class _NotHandedOnError(Exception):
    """The model did something to the hidden states between two layers."""


class Skeleton:
    """Embeds tokens and learns the calls of the layers; holds no layer's weights.

    The embedding matrix is never loaded: only the rows of a batch's tokens are read.
    """

    def __init__(self, opened: OpenedModel, reader: Reader, device: torch.device) -> None:
        architecture = opened.architecture
        self._architecture = architecture
        self._reader = reader
        self._device = device
        model = architecture.model
        self._base = getattr(model, model.base_model_prefix, model)
        self._layers = list(model.get_submodule(architecture.layers_path).children())
        self._embedding: nn.Module = model.get_input_embeddings()
        self._calls: OrderedDict[tuple[int, int], tuple[list[LayerCall], bool]] = OrderedDict()
        self._checked = False
        self._returns_tuple: bool | None = None
        materialize_buffers(model, device)
        self._embedding_weight = self._find_embedding(opened.tensor_map)
        self._load_rest(opened.tensor_map, opened.keys)

    def _find_embedding(self, tensor_map: TensorMap) -> Weight:
        named = self._architecture.model.named_parameters()
        name = next(n for n, p in named if p is self._embedding.weight)
        feed = tensor_map.feeds.get(name)
        weight = feed.groups[0][1][0] if feed else None
        if weight is None or not weight.is_plain or len(weight.shape) != 2:
            message = f"the embedding {name!r} is not a plain matrix of the checkpoint"
            raise UnsupportedError(message)
        return weight

    def _load_rest(self, tensor_map: TensorMap, keys: KeyMap) -> None:
        """Loads what stands outside the layers and takes part in the calls (norms, projections)."""
        model = self._architecture.model
        head = model.get_output_embeddings()
        skip = {id(self._embedding.weight), id(getattr(head, "weight", None))}
        base = {id(t) for t in (*self._base.parameters(), *self._base.buffers())}
        wanted = [
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if self._architecture.layer_of(name) is None
            and id(tensor) not in skip
            and id(tensor) in base
        ]
        feeds = [tensor_map.feeds[name] for name in wanted if name in tensor_map.feeds]
        load_parameters(model, keys, feeds, self._reader, self._device)

    def embed(self, tokens: np.ndarray[Any, Any]) -> tuple[torch.Tensor, list[LayerCall]]:
        """Runs the model around its layers.

        Args:
            tokens: int64 [rows, width] token ids.

        Returns:
            Hidden states before the first layer [rows, width, hidden], and each layer's call.

        Raises:
            UnsupportedError: the model does something between its layers, or calls them with
                values that depend on the tokens.
        """
        recorded, hidden = self._record(tokens)
        shape = (tokens.shape[0], tokens.shape[1])
        known = self._calls.get(shape)
        if known is None:
            return hidden, self._keep(shape, recorded, checked=False)
        if not known[1]:
            self._check(known[0], recorded)
        return hidden, self._keep(shape, known[0], checked=True)

    def calls(self, tokens: np.ndarray[Any, Any]) -> list[LayerCall]:
        """Each layer's call for a batch of this shape.

        Args:
            tokens: int64 [rows, width] token ids.

        Raises:
            UnsupportedError: the model calls its layers with values that depend on the tokens.
        """
        shape = (tokens.shape[0], tokens.shape[1])
        known = self._calls.get(shape)
        if known is not None:
            return self._keep(shape, *known)
        # Any tokens give these calls, and those of one id read one row of the embedding matrix.
        recorded, _ = self._record(np.zeros_like(tokens))
        if not self._checked:
            self._check(recorded, self._record(tokens)[0])
        return self._keep(shape, recorded, checked=True)

    def _check(self, known: list[LayerCall], recorded: list[LayerCall]) -> None:
        _check_same(self._architecture.name, known, recorded)
        self._checked = True

    def _keep(
        self, shape: tuple[int, int], calls: list[LayerCall], checked: bool
    ) -> list[LayerCall]:
        self._calls[shape] = (calls, checked)
        self._calls.move_to_end(shape)
        while len(self._calls) > KEPT_SHAPES:
            self._calls.popitem(last=False)
        return calls

    def _record(self, tokens: np.ndarray[Any, Any]) -> tuple[list[LayerCall], torch.Tensor]:
        ids, rows = np.unique(tokens, return_inverse=True)
        inputs = torch.from_numpy(rows.reshape(tokens.shape)).to(self._device)
        whole = self._embedding.weight
        self._embedding.weight = nn.Parameter(self._read_rows(ids), requires_grad=False)
        try:
            return self._record_inputs(inputs)
        finally:
            # The matrix stands for itself again: others count its rows.
            self._embedding.weight = whole

    def _record_inputs(self, inputs: torch.Tensor) -> tuple[list[LayerCall], torch.Tensor]:
        options = (False, True) if self._returns_tuple is None else (self._returns_tuple,)
        failure: Exception | None = None
        for returns_tuple in options:
            try:
                result = self._run(inputs, returns_tuple=returns_tuple)
            except (_NotHandedOnError, IndexError, ValueError, TypeError, RuntimeError) as error:
                failure = error
                continue
            self._returns_tuple = returns_tuple
            return result
        message = (
            f"{self._architecture.name} does not hand the hidden states from layer to layer "
            f"unchanged ({failure}); this version has no adapter for it"
        )
        raise UnsupportedError(message) from failure

    def _run(
        self, inputs: torch.Tensor, *, returns_tuple: bool
    ) -> tuple[list[LayerCall], torch.Tensor]:
        calls: list[LayerCall] = []
        first: list[torch.Tensor] = []
        handed: list[torch.Tensor] = []

        def record(index: int, hidden: torch.Tensor, args: Any, kwargs: Any) -> Any:
            if index != len(calls) or (handed and hidden is not handed[-1]):
                reason = f"before layer {index}"
                raise _NotHandedOnError(reason)
            calls.append(LayerCall(args, kwargs))
            if index == 0:
                first.append(hidden)
            if index == len(self._layers) - 1:
                raise _Stop
            handed.append(hidden.view_as(hidden))
            return (handed[-1],) if returns_tuple else handed[-1]

        for index, layer in enumerate(self._layers):
            layer.forward = _recorder(record, index)
        try:
            self._base(input_ids=inputs, use_cache=False)
        except _Stop:
            return calls, first[0]
        finally:
            for layer in self._layers:
                del layer.forward
        reason = f"only {len(calls)} of {len(self._layers)} layers were called"
        raise _NotHandedOnError(reason)

    def _read_rows(self, ids: np.ndarray[Any, Any]) -> torch.Tensor:
        ref = self._embedding_weight.parts["weight"]
        row_nbytes = ref.nbytes // ref.shape[0]
        if ids[-1] >= ref.shape[0]:
            message = f"token id {ids[-1]} is outside the {ref.shape[0]} rows of {ref.name!r}"
            raise UnsupportedError(message)
        raw = np.empty(len(ids) * row_nbytes, dtype=np.uint8)
        requests = []
        for start, stop in _runs(ids):
            piece = raw[start * row_nbytes : stop * row_nbytes]
            requests.append((ref, int(ids[start]) * row_nbytes, len(piece), piece))
        self._reader.read_into(requests)
        rows = torch.from_numpy(raw).view(TORCH_DTYPES[ref.dtype]).view(len(ids), ref.shape[1])
        return rows.to(device=self._device, dtype=self._architecture.model.dtype)


def _recorder(record: Any, index: int) -> Any:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return record(index, hidden_states, args, kwargs)

    return forward


def _runs(ids: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Positions [start, stop) of runs of consecutive numbers in sorted `ids`."""
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    edges = [0, *breaks.tolist(), len(ids)]
    return list(itertools.pairwise(edges))


def _check_same(name: str, known: list[LayerCall], recorded: list[LayerCall]) -> None:
    checked: set[int] = set()
    for index, (one, other) in enumerate(zip(known, recorded, strict=True)):
        pairs = list(zip(one.args, other.args, strict=True))
        pairs += [(one.kwargs[key], other.kwargs[key]) for key in one.kwargs]
        for left, right in pairs:
            if id(right) in checked:
                continue
            checked.add(id(right))
            if not _equal(left, right):
                message = (
                    f"{name} calls layer {index} with values that depend on the tokens; this "
                    "version cannot run its layers one by one"
                )
                raise UnsupportedError(message)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and bool(torch.equal(left, right))
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left is right or left == right)
