"""INT4 and INT8 weights packed in 32-bit words: compressed-tensors' ``pack-quantized``.

Layout of a weight X.weight [N, K] of b-bit codes, 32 / b of them in a word, lowest bits first:

* ``X.weight_packed`` I32 [N, ceil(K·b / 32)]: code + 2^(b-1);
* ``X.weight_scale`` float [N, G]: G groups of neighbours in a row, or one (by channel);
* ``X.weight_shape`` [2]: N and K;
* ``X.weight_zero_point``, of asymmetric schemes: I32 [ceil(N·b / 32), G], packed as the codes are
  but down the rows; older files have it unpacked, I8 [N, G];
* ``X.weight_g_idx`` I32 [K], of older files quantised in the order of activations: the group of
  each column; −1 everywhere says nothing.

value = (code − zero point) × scale. How many bits a code has only config.json says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import CheckpointError
from reap_stream.formats.base import Weight
from reap_stream.formats.packed import Code, PackedRows
from reap_stream.formats.settings import Scheme

_PACKED: Final = "weight_packed"
_ROLES: Final = {
    "scale": "weight_scale",
    "zero_point": "weight_zero_point",
    "g_idx": "weight_g_idx",
    "shape": "weight_shape",
}
_CODES: Final[dict[int, Code]] = {4: "u4", 8: "u8"}
_WORD_BITS: Final = 32


class PackedInt:
    """Integer codes in 32-bit words along the rows.

    Args:
        schemes: what config.json says of integer weights.
    """

    name = "pack-quantized"

    def __init__(self, schemes: Sequence[Scheme]) -> None:
        self._schemes = [scheme for scheme in schemes if scheme.kind == "int"]

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims I32 `weight_packed`, together with what lies beside it."""
        ref = tensors[name]
        module, _, leaf = name.rpartition(".")
        if leaf != _PACKED or ref.dtype != "I32":
            return None
        parts = {"codes": ref}
        for role, companion in _ROLES.items():
            found = tensors.get(f"{module}.{companion}")
            if found is not None:
                parts[role] = found
        fitting = self._fitting(parts)
        columns = 0 if len(ref.shape) != 2 else _columns(parts, fitting or self._first())
        rows = ref.shape[0] if ref.shape else 0
        return Weight(f"{module}.weight", (rows, columns), self, parts)

    def refusal(self, weight: Weight) -> str | None:
        """Refuses a missing scale, shapes that fit no scheme of config.json, and odd codes."""
        codes, scale = weight.parts["codes"], weight.parts.get("scale")
        if scale is None:
            return f"packed tensor {codes.name!r} has no scale ({weight.name}_scale)"
        if len(codes.shape) != 2 or len(scale.shape) != 2:
            return (
                f"packed tensor {codes.name!r} {list(codes.shape)} and its scale "
                f"{list(scale.shape)} must both have 2 dimensions"
            )
        return self._scheme_fault(weight, scale)

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Subtracts zero points and multiplies by scales, whatever the order of the groups."""
        scheme = self._fitting(weight.parts)
        assert scheme is not None
        _check_shape(weight, parts)
        rows, columns = weight.shape
        groups = parts["scale"].shape[1]
        zero = parts.get("zero_point")
        packed = PackedRows(
            code=_CODES[scheme.bits],
            codes=parts["codes"].view(torch.uint8),
            scale=parts["scale"],
            group=-(-columns // groups),
            zero=None if zero is None else _unpacked_zero(zero, scheme.bits, rows),
        )
        order = parts.get("g_idx")
        if order is None or bool((order < 0).all()):
            packed.decode(out)
            return
        _check_index(weight, order, groups)
        index = order.long()
        middle = 1 << (scheme.bits - 1)
        offset = middle if packed.zero is None else packed.zero.to(torch.float32)[:, index]
        out.copy_((packed.numbers(columns) - offset) * packed.scale.to(torch.float32)[:, index])

    def _scheme_fault(self, weight: Weight, scale: TensorRef) -> str | None:
        codes = weight.parts["codes"]
        if not self._schemes:
            return (
                f"packed tensor {codes.name!r}: config.json has no config_groups of integer weights, "
                "so the bits of a code are not known"
            )
        scheme = self._fitting(weight.parts)
        if scheme is None and self._fitting({**weight.parts, "zero_point": scale}) is not None:
            return (
                f"packed tensor {codes.name!r} has no zero point ({weight.name}_zero_point), though "
                "config.json says that its scheme is not symmetric"
            )
        if scheme is None:
            said = " or ".join(_described(scheme) for scheme in self._schemes)
            return (
                f"packed tensor {codes.name!r} {list(codes.shape)} with scale {scale.name!r} "
                f"{list(scale.shape)} is none of what config.json says: {said}"
            )
        if scheme.bits not in _CODES:
            return f"packed tensor {codes.name!r} has codes of {scheme.bits} bits, not 4 or 8"
        return _zero_fault(weight, scheme) or _index_fault(weight)

    def _first(self) -> Scheme:
        return (
            self._schemes[0] if self._schemes else Scheme(4, "int", "group", 32, True, None, None)
        )

    def _fitting(self, parts: Mapping[str, TensorRef]) -> Scheme | None:
        """The first scheme of config.json that makes tensors of these shapes."""
        codes, scale = parts["codes"], parts.get("scale")
        if scale is None or len(codes.shape) != 2 or len(scale.shape) != 2:
            return None
        fits = (
            s for s in self._schemes if _fits(s, codes.shape, scale.shape, "zero_point" in parts)
        )
        return next(fits, None)


def _fits(scheme: Scheme, codes: tuple[int, ...], scale: tuple[int, ...], has_zero: bool) -> bool:
    if scale[0] != codes[0] or not (scheme.symmetric or has_zero):
        return False
    if scheme.group_size is None:
        return scale[1] == 1
    return codes[1] == -(-scale[1] * scheme.group_size * scheme.bits // _WORD_BITS)


def _columns(parts: Mapping[str, TensorRef], scheme: Scheme) -> int:
    """K: of groups their number times their size, else as many codes as the words hold."""
    scale = parts.get("scale")
    if scheme.group_size is not None and scale is not None and len(scale.shape) == 2:
        return scale.shape[1] * scheme.group_size
    return parts["codes"].shape[1] * _WORD_BITS // scheme.bits


def _described(scheme: Scheme) -> str:
    group = "one scale a row" if scheme.group_size is None else f"groups of {scheme.group_size}"
    zeros = "" if scheme.symmetric else " with zero points"
    return f"{scheme.bits} bits in {group}{zeros}"


def _zero_fault(weight: Weight, scheme: Scheme) -> str | None:
    zero = weight.parts.get("zero_point")
    if zero is None:
        return None
    rows, groups = weight.shape[0], weight.parts["scale"].shape[1]
    packed = (-(-rows * scheme.bits // _WORD_BITS), groups)
    if (zero.dtype, zero.shape) in (("I32", packed), ("I8", (rows, groups))):
        return None
    return (
        f"zero point {zero.name!r} is {zero.dtype} {list(zero.shape)}, expected I32 {list(packed)} "
        f"or I8 {[rows, groups]}"
    )


def _index_fault(weight: Weight) -> str | None:
    order = weight.parts.get("g_idx")
    if order is None or (order.dtype in ("I32", "I64") and order.shape == weight.shape[1:]):
        return None
    return (
        f"group index {order.name!r} is {order.dtype} {list(order.shape)}, expected I32 "
        f"{list(weight.shape[1:])}"
    )


def _check_index(weight: Weight, order: torch.Tensor, groups: int) -> None:
    if int(order.min()) < 0 or int(order.max()) >= groups:
        ref = weight.parts["g_idx"]
        message = (
            f"{ref.file}: {ref.name!r} names groups {int(order.min())} to {int(order.max())}, "
            f"{weight.parts['scale'].name!r} has {groups}"
        )
        raise CheckpointError(message)


def _check_shape(weight: Weight, parts: Mapping[str, torch.Tensor]) -> None:
    said = parts.get("shape")
    if said is not None and said.tolist() != list(weight.shape):
        ref = weight.parts["shape"]
        message = (
            f"{ref.file}: {ref.name!r} says {said.tolist()}, the codes and scales of "
            f"{weight.name!r} make {list(weight.shape)}"
        )
        raise CheckpointError(message)


def _unpacked_zero(zero: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Zero points uint8 [rows, groups] on the scale of the unsigned codes."""
    if zero.dtype == torch.int8:
        return (zero.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    per_word = _WORD_BITS // bits
    shifts = torch.arange(per_word, device=zero.device, dtype=torch.int32) * bits
    codes = (zero[:, None, :] >> shifts[None, :, None]) & ((1 << bits) - 1)
    return codes.reshape(-1, zero.shape[1])[:rows].to(torch.uint8)
