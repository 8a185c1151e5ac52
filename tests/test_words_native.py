"""Every way of decoding gives the same, and the extension checks what it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap_stream import _native
from tests.word_weights import claimed, random_awq, random_gptq

ISAS = _native.available_isas()


@pytest.mark.parametrize("kind", ["gptq", "gptq8", "scattered", "awq", "int8"])
def test_every_way_of_decoding_gives_the_same(kind):
    tensors = {
        "gptq": random_gptq(264, 160, 32, 4),
        "gptq8": random_gptq(264, 160, 32, 8),
        "scattered": random_gptq(264, 160, 32, 4, scattered=True),
        "awq": random_awq(264, 160, 32),
        "int8": {
            "m.weight": torch.arange(-128, 128).repeat(165).view(264, 160).to(torch.int8),
            "m.weight_scale": torch.rand(264, 1),
        },
    }[kind]
    weight, parts = claimed(tensors, {"group_size": 32})
    whole = torch.zeros(264, 200)
    weight.format.decode(weight, parts, whole[:, 8:168])
    alone = torch.empty(264, 160)
    weight.format.decode(weight, parts, alone)
    assert torch.equal(whole[:, 8:168], alone)
    assert not whole[:, :8].any()
    assert not whole[:, 168:].any()


def native(tensors, layout, bits, dtype, **options):
    rows, columns = tensors["m.scales"].shape[1], tensors["m.qweight"].shape[0]
    columns *= 32 // bits if layout == "gptq" else 1
    out = np.full((rows, columns), 0x55, np.int16 if dtype == "bf16" else np.int32)
    scale, order = tensors["m.scales"], tensors.get("m.g_idx")
    _native.rearranged_decode(
        tensors["m.qweight"].numpy(),
        layout,
        bits,
        scale.view(torch.int16).numpy(),
        "f16",
        tensors["m.qzeros"].numpy(),
        1,
        None if order is None else order.numpy(),
        out,
        rows,
        columns,
        columns // len(scale),
        dtype,
        **options,
    )
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", [(8, 8), (136, 160), (520, 48), (1032, 224)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_instruction_sets_and_threads_do_not_show(isa, dtype, shape, threads):
    rows, columns = shape
    group = 16 if columns % 16 == 0 else columns
    cases = [
        (random_gptq(rows, columns, group, 4), "gptq", 4),
        (random_gptq(rows, columns, group, 8), "gptq", 8),
        (random_gptq(rows, columns, group, 4, scattered=True), "gptq", 4),
        (random_awq(rows, columns, group), "awq", 4),
    ]
    for tensors, layout, bits in cases:
        plain = native(tensors, layout, bits, dtype, isa="scalar", threads=1)
        fast = native(tensors, layout, bits, dtype, isa=isa, threads=threads)
        np.testing.assert_array_equal(fast, plain)


def test_buffers_may_start_anywhere():
    tensors = random_awq(136, 160, 32)
    plain = native(tensors, "awq", 4, "bf16")
    raw = tensors["m.qweight"].numpy().tobytes()
    out = np.zeros_like(plain)
    moved = memoryview(b"\xa5" + raw)[1:]
    scale = memoryview(b"\xa5" + tensors["m.scales"].numpy().tobytes())[1:]
    zero = memoryview(b"\xa5" + tensors["m.qzeros"].numpy().tobytes())[1:]
    _native.rearranged_decode(
        moved, "awq", 4, scale, "f16", zero, 1, None, out, 136, 160, 32, "bf16"
    )
    np.testing.assert_array_equal(out, plain)


ARGUMENTS = {
    "codes": bytes(32),
    "layout": "gptq",
    "bits": 4,
    "scale": bytes(32),
    "scale_dtype": "f32",
    "zero": bytes(4),
    "zero_offset": 1,
    "group_of": None,
    "out": bytearray(256),
    "rows": 8,
    "cols": 8,
    "group": 8,
    "out_dtype": "f32",
}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layout": "gemv"}, "layout is 'gemv'"),
        ({"bits": 3}, "bits is 3"),
        ({"layout": "awq", "bits": 8}, "bits is 8"),
        ({"layout": "int8"}, "bits is 4"),
        ({"codes": bytes(31)}, "codes has 31 bytes where the shape needs 32"),
        ({"scale": bytes(33)}, "scale has 33 bytes where the shape needs 32"),
        ({"zero": bytes(5)}, "zero has 5 bytes where the shape needs 4"),
        ({"out": bytearray(255)}, "out has 255 bytes where the shape needs 256"),
        ({"out": bytes(256)}, "out must be C-contiguous and writable"),
        ({"rows": 12}, "rows is 12, no multiple of the 8"),
        ({"cols": 4}, "cols is 4, no multiple of the 8"),
        ({"group": 3}, "group is 3; groups of 4-bit codes"),
        ({"group": 0}, "group is 0"),
        ({"rows": 2**62, "cols": 8}, "more than 2"),
        ({"zero_offset": 2}, "zero_offset is 2"),
        ({"group_of": np.array([0] * 7 + [1], np.int32)}, r"group_of\[7\] is 1; there are 1"),
        ({"group_of": np.array([-1] * 8, np.int32)}, r"group_of\[0\] is -1"),
        ({"group_of": np.zeros(7, np.int32)}, "group_of"),
        ({"group_of": np.zeros(8, np.int64)}, "group_of"),
        ({"scale_dtype": "u8"}, "scale_dtype is 'u8'"),
        ({"out_dtype": "f16"}, "out_dtype is 'f16'"),
    ],
)
def test_arguments_are_checked(changes, match):
    with pytest.raises(ValueError, match=match):
        _native.rearranged_decode(**{**ARGUMENTS, **changes})


def test_overlapping_buffers_are_refused():
    shared = bytearray(256)
    with pytest.raises(ValueError, match="overlap"):
        _native.rearranged_decode(**{**ARGUMENTS, "out": shared, "codes": memoryview(shared)[:32]})
