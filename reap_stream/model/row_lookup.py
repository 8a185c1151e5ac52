"""Embedding matrices of which only the rows that are looked up are read.

The largest tensors of a model are often such tables (a vocabulary's, or those that map n-grams of
tokens, tens of gigabytes), and a batch needs few of their rows.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from reap_stream.checkpoint.reader import Reader, ReadRequest
from reap_stream.errors import UnsupportedError
from reap_stream.formats import Weight
from reap_stream.formats.plain import TORCH_DTYPES
from reap_stream.model.recording import Lookup
from reap_stream.model.roles import Feed

_DIMS = 2


def row_weights(feed: Feed | None, shape: torch.Size) -> tuple[Weight, ...] | None:
    """The weights whose rows, one below the other, are those of a matrix; None if they are not.

    Args:
        feed: what the matrix is made of.
        shape: its shape.
    """
    if feed is None or len(feed.groups) != 1:
        return None
    weights = feed.groups[0][1]
    alike = all(
        weight.is_plain and len(weight.shape) == _DIMS and weight.shape[1] == shape[1]
        for weight in weights
    )
    if not alike or sum(weight.shape[0] for weight in weights) != shape[0]:
        return None
    return weights


def row_lookup(
    weights: tuple[Weight, ...], reader: Reader, device: torch.device, dtype: torch.dtype
) -> Lookup:
    """Gives rows of a matrix on `device` in `dtype`, each number's row read once a call."""
    table = _Rows(weights, reader)

    def lookup(ids: torch.Tensor) -> torch.Tensor:
        numbers, places = np.unique(ids.cpu().numpy(), return_inverse=True)
        rows = table.read(numbers).to(device=device, dtype=dtype)
        return rows[torch.from_numpy(places.reshape(tuple(ids.shape))).to(device)]

    return lookup


class _Rows:
    """The rows of matrices that lie one below the other."""

    def __init__(self, weights: tuple[Weight, ...], reader: Reader) -> None:
        self._refs = [weight.parts["weight"] for weight in weights]
        self._reader = reader
        self._ends = list(itertools.accumulate(ref.shape[0] for ref in self._refs))

    def read(self, ids: np.ndarray[Any, Any]) -> torch.Tensor:
        """Rows [n, width] of sorted numbers, as they are stored."""
        if ids[0] < 0 or ids[-1] >= self._ends[-1]:
            wrong = ids[0] if ids[0] < 0 else ids[-1]
            message = (
                f"token id {wrong} is outside the {self._ends[-1]} rows of {self._refs[0].name!r}"
            )
            raise UnsupportedError(message)
        parts = []
        cuts = np.searchsorted(ids, self._ends)
        for number, (first, last) in enumerate(itertools.pairwise([0, *cuts.tolist()])):
            if first < last:
                above = self._ends[number] - self._refs[number].shape[0]
                parts.append(self._read_part(number, ids[first:last] - above))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_part(self, number: int, ids: np.ndarray[Any, Any]) -> torch.Tensor:
        ref = self._refs[number]
        row_nbytes = ref.nbytes // ref.shape[0]
        raw = np.empty(len(ids) * row_nbytes, dtype=np.uint8)
        requests: list[ReadRequest] = []
        for start, stop in _runs(ids):
            piece = raw[start * row_nbytes : stop * row_nbytes]
            requests.append((ref, int(ids[start]) * row_nbytes, len(piece), piece))
        self._reader.read_into(requests)
        return torch.from_numpy(raw).view(TORCH_DTYPES[ref.dtype]).view(len(ids), ref.shape[1])


def _runs(ids: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Positions [start, stop) of runs of consecutive numbers in sorted `ids`."""
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    edges = [0, *breaks.tolist(), len(ids)]
    return list(itertools.pairwise(edges))
