"""From bytes of the checkpoint to parameters of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import CheckpointError
from reap_stream.formats import TORCH_DTYPES, Weight
from reap_stream.model.roles import Feed
from reap_stream.model.transformers_api import KeyMap, get_tensor, parameter_dtype, set_tensor

# Of a large tensor no more is held twice, as it is stored and as it is computed with.
_PIECE_NBYTES = 32 * 2**20

RawSink = Callable[[TensorRef, "np.ndarray[Any, Any]"], None]


def typed(ref: TensorRef, raw: torch.Tensor) -> torch.Tensor:
    """Bytes of a tensor seen in its own dtype and shape; uint8 where torch has no such dtype."""
    dtype = TORCH_DTYPES.get(ref.dtype)
    return raw if dtype is None else raw.view(dtype).view(ref.shape)


def decode(
    weight: Weight,
    raw: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """A weight's values.

    Args:
        weight: the weight.
        raw: role → uint8 bytes of that part, on the CPU.
        dtype: dtype of the values; integer and boolean buffers keep their own.
        device: where the values go; bytes travel there before they are decoded.
    """
    parts = {role: typed(ref, raw[role]).to(device) for role, ref in weight.parts.items()}
    if weight.is_plain:
        tensor = parts["weight"]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    out = weight.empty(dtype, device)
    weight.format.decode(weight, parts, out)
    return out


def load_parameters(
    model: Any,
    keys: KeyMap,
    feeds: Iterable[Feed],
    reader: Reader,
    device: torch.device,
    sink: RawSink | None = None,
) -> None:
    """Reads, decodes and sets parameters, one at a time so that little is held twice.

    Args:
        model: the model, its parameters on the meta device.
        keys: the checkpoint's key mapping.
        feeds: what to load.
        reader: reads the bytes.
        device: where the parameters go.
        sink: is shown the raw bytes of every tensor before they are dropped.
    """
    for feed in feeds:
        for name, tensor in read_parameters(model, keys, feed, reader, device, sink).items():
            set_tensor(model, name, tensor)


def read_parameters(
    model: Any,
    keys: KeyMap,
    feed: Feed,
    reader: Reader,
    device: torch.device,
    sink: RawSink | None = None,
) -> dict[str, torch.Tensor]:
    """Reads and decodes what one feed makes; sets nothing. Arguments as `load_parameters` has them.

    Returns:
        Parameter name → its values.

    Raises:
        CheckpointError: they are not of the parameter's shape.
    """
    dtype = parameter_dtype(model, feed.target, model.dtype)
    groups: list[tuple[str | None, list[torch.Tensor]]] = []
    for pattern, weights in feed.groups:
        values = [_read(weight, dtype, reader, device, sink) for weight in weights]
        groups.append((pattern, values))
    made = keys.convert(feed.target, groups)
    for name, tensor in made.items():
        expected = get_tensor(model, name)
        if tensor.shape != expected.shape:
            source = next(iter(feed.groups[0][1][0].parts.values()))
            message = (
                f"{source.file}: {source.name!r} makes {name} {list(tensor.shape)}, the model "
                f"has {list(expected.shape)}; config.json and weights are of two models"
            )
            raise CheckpointError(message)
    return made


def _read(
    weight: Weight,
    dtype: torch.dtype,
    reader: Reader,
    device: torch.device,
    sink: RawSink | None,
) -> torch.Tensor:
    if sink is None and weight.is_plain:
        return _read_plain(weight.parts["weight"], dtype, reader, device)
    raw: dict[str, torch.Tensor] = {}
    for role, ref in weight.parts.items():
        data = reader.read(ref)
        if sink is not None:
            sink(ref, data)
        raw[role] = torch.from_numpy(data)
    return decode(weight, raw, dtype, device)


def _read_plain(
    ref: TensorRef, dtype: torch.dtype, reader: Reader, device: torch.device
) -> torch.Tensor:
    """Numbers as they are stored; where they change or move, read piece by piece."""
    stored = TORCH_DTYPES[ref.dtype]
    kept = dtype if stored.is_floating_point else stored
    if ref.nbytes <= _PIECE_NBYTES or (stored == kept and device.type == "cpu"):
        return typed(ref, torch.from_numpy(reader.read(ref))).to(device=device, dtype=kept)
    out = torch.empty(ref.shape, dtype=kept, device=device)
    buffer = np.empty(_PIECE_NBYTES, dtype=np.uint8)
    for start in range(0, ref.nbytes, _PIECE_NBYTES):
        piece = buffer[: ref.nbytes - start]
        reader.read_into([(ref, start, len(piece), piece)])
        first, values = start // stored.itemsize, torch.from_numpy(piece).view(stored)
        out.view(-1)[first : first + len(values)].copy_(values)
    return out


def release_parameters(model: Any, names: Sequence[str]) -> None:
    """Puts parameters back on the meta device, which frees them."""
    for name in names:
        tensor = get_tensor(model, name)
        set_tensor(model, name, torch.empty_like(tensor, device="meta"))
