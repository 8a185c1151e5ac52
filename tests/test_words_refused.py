"""GPTQ, AWQ and INT8 weights that cannot be decoded are refused."""

from __future__ import annotations

import pytest
import torch

from reap_stream.errors import CheckpointError
from tests.word_weights import claimed, decoded, random_awq, random_gptq

GPTQ = random_gptq(32, 64, 32, 4)
AWQ = random_awq(32, 64, 32)
INT8 = {"m.weight": torch.zeros(8, 8, dtype=torch.int8), "m.weight_scale": torch.ones(8, 1)}


@pytest.mark.parametrize(
    ("tensors", "changes", "config", "match"),
    [
        (GPTQ, {"m.qzeros": None}, {}, r"has no m\.qzeros"),
        (GPTQ, {"m.scales": None}, {}, r"has no m\.scales"),
        (GPTQ, {}, {"checkpoint_format": "marlin"}, "'marlin' is not one of gptq, gptq_v2"),
        (GPTQ, {"m.qzeros": torch.zeros(2, 2, dtype=torch.int32)}, {}, "of 2"),
        (GPTQ, {"m.qzeros": torch.zeros(2, 3, dtype=torch.int32)}, {}, "of 3"),
        (GPTQ, {"m.qzeros": torch.zeros(3, 4, dtype=torch.int32)}, {}, r"m\.qzeros' is I32 \[3"),
        (
            GPTQ,
            {"m.qweight": torch.zeros(8, 32)},
            {},
            "F32",
        ),
        (GPTQ, {"m.g_idx": torch.zeros(63, dtype=torch.int32)}, {}, r"m\.g_idx' is I32 \[63\]"),
        (GPTQ, {"m.scales": torch.ones(2, 32, dtype=torch.int32)}, {}, r"m\.scales' is I32"),
        (GPTQ, {"m.scales": torch.ones(())}, {}, "4 or 8 bits"),
        (AWQ, {}, {"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
        (AWQ, {}, {"quant_method": "awq", "version": "GEMV_FAST"}, "version 'gemv_fast'"),
        (AWQ, {"m.qzeros": None}, {}, r"has no m\.qzeros"),
        (AWQ, {"m.qzeros": torch.zeros(2, 8, dtype=torch.int32)}, {}, "codes of 8 bits, not 4"),
        (
            AWQ,
            {"m.qzeros": torch.zeros(1, 4, dtype=torch.int32)},
            {},
            r"m\.qzeros' is I32 \[1, 4\]",
        ),
        (INT8, {"m.weight_scale": None}, {}, "has no scale"),
        (INT8, {"m.weight_scale": torch.ones(7, 1)}, {}, r"\[7, 1\], which is neither"),
        (INT8, {"m.weight_scale": torch.ones(8, 3)}, {}, r"\[8, 3\], which is neither"),
        (INT8, {"m.weight_scale": torch.ones(8, 1, dtype=torch.int32)}, {}, "dtype I32"),
        (
            INT8,
            {"m.weight_zero_point": torch.zeros(7, 1, dtype=torch.int8)},
            {},
            r"expected I8 \[8",
        ),
        (
            {
                "m.weight": torch.zeros(2, 8, 8, dtype=torch.int8),
                "m.weight_scale": torch.ones(3, 8, 1),
            },
            {},
            {},
            "2 experts in front",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused(tensors, changes, config, match):
    changed = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
    weight, _ = claimed(changed, config)
    reason = weight.format.refusal(weight)
    assert reason is not None
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(reason)


def test_groups_that_do_not_exist_are_found_when_they_are_read():
    tensors = {**GPTQ, "m.g_idx": torch.full((64,), 2, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"m\.g_idx' names groups 2 to 2.*has 2"):
        decoded(tensors, {})


@pytest.mark.parametrize("size", ["128", 1.5, [128, 128], True, None, 0, -1, 7])
def test_a_group_size_that_says_nothing_is_told_by_the_shapes(size):
    config = {"quant_method": "gptq", "group_size": size}
    assert torch.equal(decoded(GPTQ, config), decoded(GPTQ, {"group_size": 32}))


@pytest.mark.parametrize(
    "config",
    [
        {"checkpoint_format": 7, "packing_format": [], "version": {}, "format": None},
        {"quant_method": None, "bits": "four", "desc_act": 3},
    ],
    ids=str,
)
def test_malformed_settings_are_no_tracebacks(config):
    for tensors in (GPTQ, AWQ):
        weight, _ = claimed(tensors, config)
        weight.format.refusal(weight)
