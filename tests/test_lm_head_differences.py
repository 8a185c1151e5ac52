"""Which models share a head, and which do not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from reap_stream.model import same_head
from tests.builders import load_tensors, read_config, write_checkpoint
from tests.engine import head_of
from tests.packed_checkpoints import WIDTHS, head_only, pack


def changed(source, directory, tensors=None, **config):
    """A copy of a checkpoint with other tensors and config values."""
    return write_checkpoint(
        directory, {**load_tensors(source), **(tensors or {})}, {**read_config(source), **config}
    )


def with_another_bit(source):
    weight = load_tensors(source)["lm_head.weight"].clone()
    weight[-1, -1] += 0.25
    return {"tensors": {"lm_head.weight": weight}}


DIFFERENT = {
    "weights": with_another_bit,
    "dtype": lambda source: {
        "tensors": {"lm_head.weight": load_tensors(source)["lm_head.weight"].bfloat16()}
    },
    "scaling": lambda _: {"logits_scaling": 2.0},
    "norm": lambda _: {"rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_heads_that_differ_are_told_apart(case, tiny, tmp_path, reader, monkeypatch):
    monkeypatch.setattr(same_head, "_PIECE_NBYTES", 100)
    source = tiny("granitemoe")
    mine = head_of(source, reader)
    assert mine.same_weights(head_of(changed(source, tmp_path / "same"), reader))
    other = head_of(changed(source, tmp_path / "other", **DIFFERENT[case](source)), reader)
    assert not mine.same_weights(other)
    assert not other.same_weights(mine)


def test_heads_of_other_dtypes_and_families_are_told_apart(tiny, reader):
    mine = head_of(tiny("qwen3_moe"), reader)
    assert not mine.same_weights(head_of(tiny("qwen3_moe"), reader, torch.bfloat16))
    assert not mine.same_weights(head_of(tiny("mixtral"), reader))
    assert not mine.same_weights(head_of(tiny("qwen3_moe", vocab_size=112), reader))


def test_equal_codes_of_unlike_formats_are_told_apart(tiny, tmp_path, reader):
    packed, _ = pack(tiny("qwen3_moe", **WIDTHS), tmp_path / "packed", head_only("int4"))
    mine = head_of(packed, reader)
    twin, other = tmp_path / "twin", tmp_path / "other"
    for copy in (twin, other):
        shutil.copytree(packed, copy)
    config = read_config(packed)
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = None
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert mine.same_weights(head_of(twin, reader))
    assert not mine.same_weights(head_of(other, reader))
