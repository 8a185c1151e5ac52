"""A model's own code that fails, and a machine or device without memory: one line, no traceback."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention, Glm4MoeModel

from reap_stream.cli import main
from reap_stream.errors import ForwardError, UnsupportedError
from tests.engine import prune_to


def failing(error):
    def forward(*args, **kwargs):
        raise error

    return forward


def prune_by_command(source, calibration, output):
    arguments = ["--output", str(output), "--keep", "4"]
    for spec in calibration:
        arguments += ["--calibration", spec]
    return main(["prune", str(source), *arguments])


def test_code_around_the_layers_is_refused_before_the_pass(
    tiny, calibration, tmp_path, monkeypatch
):
    monkeypatch.setattr(Glm4MoeModel, "forward", failing(KeyError("rope_type")))
    match = (
        r"Glm4MoeForCausalLM: its own code fails: KeyError: 'rope_type' \(test_own_code.py, line"
    )
    with pytest.raises(UnsupportedError, match=match):
        prune_to(tmp_path / "out", tiny("glm4_moe"), calibration, 4)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_fails_is_named_and_the_job_stays(tiny, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(Glm4MoeAttention, "forward", failing(TypeError("no such argument")))
    with pytest.raises(ForwardError, match=r"model\.layers\.0: its own code fails: TypeError: no"):
        prune_to(tmp_path / "out", tiny("glm4_moe"), calibration, 4)
    monkeypatch.undo()
    prune_to(tmp_path / "out", tiny("glm4_moe"), calibration, 4, resume=True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "device is out of memory: give smal",
        ),
        (MemoryError(), "machine is out of memory: give --memory less than"),
        (np.exceptions.AxisError("none"), None),
    ],
    ids=["device", "host", "other"],
)
def test_want_of_memory_says_what_to_do(
    error, told, tiny, calibration, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Glm4MoeAttention, "forward", failing(error))
    assert prune_by_command(tiny("glm4_moe"), calibration, tmp_path / "out") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    if told is None:
        assert "its own code fails: AxisError" in last
    else:
        assert told in last
        assert last.endswith("The same command with --resume goes on.")


def test_what_the_allocator_says_is_known(tiny, calibration, tmp_path, monkeypatch, capsys):
    def greedy(*args, **kwargs):
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(Glm4MoeAttention, "forward", greedy)
    assert prune_by_command(tiny("glm4_moe"), calibration, tmp_path / "out") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the machine is out of memory" in last
    assert "tried to allocate 1152921504606846976 bytes" in last
