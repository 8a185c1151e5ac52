"""What is kept beside hidden states: in memory, in a file, in a snapshot."""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from reap_stream.calibration.activations import HiddenStates
from reap_stream.calibration.carried import Carried, Key
from reap_stream.checkpoint.reader import Reader
from reap_stream.errors import ResumeError
from reap_stream.forward import ForwardPass
from reap_stream.progress import Progress
from tests.engine import prepare

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8]


@pytest.fixture(params=["memory", "file"])
def carried(request, tmp_path):
    made = Carried(tmp_path / "carried" if request.param == "file" else None)
    yield made
    made.close()


def states(spill_path=None):
    return HiddenStates.create(4, (2, 3), torch.float32, spill_path=spill_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5), (4,), (), (2, 0, 3)], ids=str)
def test_what_was_kept_comes_back(dtype, shape, carried):
    value = (torch.rand(shape) * 9).to(dtype)
    carried.store(Key(1, 2, 0), value)
    found = carried.load(Key(1, 2, 0))
    assert found.dtype == dtype
    assert torch.equal(found, value)


def test_it_is_a_copy(carried):
    value = torch.ones(3)
    carried.store(Key(0, 1, 0), value)
    value.zero_()
    assert carried.load(Key(0, 1, 0)).tolist() == [1, 1, 1]


def test_a_batch_forgets_what_is_not_needed_and_others_do_not(carried):
    for number, start in itertools.product((1, 2), (0, 7)):
        carried.store(Key(3, number, start), torch.tensor(float(number + start)))
    carried.keep_only(0, [(3, 2)])
    assert carried.load(Key(3, 2, 0)) == 2
    assert carried.load(Key(3, 1, 7)) == 8
    with pytest.raises(KeyError):
        carried.load(Key(3, 1, 0))


def test_a_file_does_not_grow_with_the_layers(tmp_path):
    carried = Carried(tmp_path / "carried")
    for layer in range(50):
        for start in (0, 5):
            carried.keep_only(start, [])
            carried.store(Key(layer, 1, start), torch.full((100,), layer))
    assert carried.load(Key(49, 1, 5)).unique() == 49
    assert carried._end == 2 * 100 * 8
    assert not any(tmp_path.iterdir()), "the file must have no name"
    carried.close()


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("spilled_again", [False, True])
def test_a_snapshot_holds_it(spilled, spilled_again, tmp_path):
    one = states(tmp_path / "one" if spilled else None)
    two = states(tmp_path / "two" if spilled_again else None)
    one.store(0, torch.rand(4, 2, 3))
    for number, dtype in enumerate(DTYPES):
        one.carried.store(Key(number, 1, 0), (torch.rand(3, 5) * 9).to(dtype))
    two.carried.store(Key(9, 9, 9), torch.ones(1))
    one.save(tmp_path / "snapshot", layer=3)
    assert two.restore(tmp_path / "snapshot")["layer"] == "3"
    assert torch.equal(two.load(0, 4), one.load(0, 4))
    for number in range(len(DTYPES)):
        key = Key(number, 1, 0)
        assert torch.equal(two.carried.load(key), one.carried.load(key))
    with pytest.raises(KeyError):
        two.carried.load(Key(9, 9, 9))
    one.close()
    two.close()


def test_a_snapshot_of_other_streams_is_refused(tmp_path):
    with states() as mine:
        mine.store(0, torch.zeros(4, 2, 3))
        mine.save(tmp_path / "snapshot", layer=1)
    other = HiddenStates.create(4, (3, 2), torch.float32, spill_path=None)
    with pytest.raises(ResumeError, match=r"\(4, 2, 3\).*\(4, 3, 2\)"):
        other.restore(tmp_path / "snapshot")


@pytest.mark.parametrize(
    "family_id", ["glm_moe_dsa", "gemma4_text", "inkling2_text", "zaya", "deepseek_v4"]
)
@pytest.mark.parametrize("spill", [False, True])
def test_a_pass_goes_on_from_its_snapshot(family_id, spill, tiny, calibration, tmp_path):
    ready = prepare(tiny(family_id), calibration)
    ready = replace(ready, memory=replace(ready.memory, spill=spill))
    layers = ready.model.architecture.num_layers
    for number in ("whole", *range(1, layers)):
        (tmp_path / str(number)).mkdir()
    with pass_over(ready, tmp_path / "whole") as whole:
        whole.embed()
        for layer in range(layers):
            if layer:
                whole.states.save(tmp_path / f"{layer}.safetensors", layer=layer)
            advance(whole, layer)
        expected = whole.states.load(0, ready.corpus.num_tokens).clone()
    for first in range(1, layers):
        with pass_over(ready, tmp_path / str(first)) as resumed:
            found = resumed.states.restore(tmp_path / f"{first}.safetensors")
            assert found["layer"] == str(first)
            for layer in range(first, layers):
                advance(resumed, layer)
            assert torch.equal(resumed.states.load(0, ready.corpus.num_tokens), expected)


@contextmanager
def pass_over(ready, directory):
    with ExitStack() as stack:
        reader = stack.enter_context(Reader())
        progress = stack.enter_context(Progress(9, 9, lambda: 0, shown=False))
        spill = directory / "spill"
        yield stack.enter_context(ForwardPass(ready, reader, spill_path=spill, progress=progress))


def advance(forward, layer):
    with forward.layer(layer) as streamed:
        forward.advance(layer, streamed)
