"""What goes from layer to layer, family by family, and what cannot be taken apart."""

from __future__ import annotations

import pytest
import torch

from reap_stream.errors import UnsupportedError
from reap_stream.model import wiring as module
from reap_stream.model.calls import LayerCall
from reap_stream.model.handover import Kind, Origin
from reap_stream.model.opened import open_model
from reap_stream.model.recording import Recorded
from reap_stream.model.wiring import read_handover
from tests.engine import prepare, prune_to, stream
from tests.families import BY_ID

CPU = torch.device("cpu")
PLAIN = ["glm4_moe", "deepseek_v32", "gpt_oss", "jamba", "granitemoe"]


def handover_of(source, longest_row=16):
    return read_handover(open_model(source, dtype=torch.float32).architecture, CPU, longest_row)


@pytest.mark.parametrize("family_id", PLAIN)
def test_most_families_hand_on_hidden_states_alone(family_id, tiny):
    found = handover_of(tiny(family_id))
    assert (found.token_shape, found.dtype, found.carried_nbytes) == ((32,), torch.float32, 0)
    for layer, (sources, live) in enumerate(zip(found.sources, found.live, strict=True)):
        assert live == {Origin(layer - 1, 0)}
        assert set(sources) == {Origin(layer - 1, 0), Kind.CONSTANT}
        assert found.carried(layer) == []


@pytest.mark.parametrize(
    ("family_id", "shape"),
    [("deepseek_v4", (2, 32)), ("hy_v4", (3, 32)), ("qwen4_exp_text", (64,)), ("zaya", (32,))],
)
def test_hidden_states_of_other_shapes(family_id, shape, tiny):
    found = handover_of(tiny(family_id))
    assert found.token_shape == shape
    assert found.token_nbytes >= 4 * torch.Size(shape).numel()


def test_a_choice_of_tokens_is_kept_only_for_layers_that_look_at_it(tiny):
    found = handover_of(tiny("glm_moe_dsa"))
    types = BY_ID["glm_moe_dsa"].values["indexer_types"]
    for layer in range(1, len(types)):
        shared = types[layer] == "shared"
        assert found.carried(layer) == ([Origin(layer - 1, 1)] if shared else [])


@pytest.mark.parametrize(("longest_row", "tokens"), [(4, 4), (8, 8), (100, 8)])
def test_what_is_kept_is_counted_at_the_longest_row(longest_row, tokens, tiny):
    # int32 numbers of as many tokens as the indexer chooses, of a short row all of them.
    assert handover_of(tiny("glm_moe_dsa"), longest_row).carried_nbytes == 4 * tokens


def test_keys_and_values_that_later_layers_use_again(tiny):
    found = handover_of(tiny("gemma4_text"))
    # Layer 3 attends with what layer 1 left, layer 2 only passes that dictionary on.
    assert {Origin(1, 1), Origin(1, 2)} <= found.live[3]
    # Each layer's own input is made of the tokens.
    assert all(found.is_computed(layer) for layer in range(4))


def test_hidden_states_of_earlier_blocks(tiny):
    found = handover_of(tiny("inkling2_text"))
    # Blocks of two layers: what went into layers 2 and 4 comes back later.
    assert found.live[3] == {Origin(1, 0), Origin(2, 0)}
    assert found.carried(3) == [Origin(1, 0)]
    assert found.carried(2) == [Origin(1, 0)]


def test_tokens_are_handed_on_as_they_are(tiny):
    found = handover_of(tiny("deepseek_v4"))
    assert all(Kind.TOKENS in sources for sources in found.sources)
    assert not any(found.is_computed(layer) for layer in range(4))


def test_nothing_of_the_probe_stays_in_the_model(tiny):
    architecture = open_model(tiny("gemma4_text"), dtype=torch.float32).architecture
    read_handover(architecture, CPU)
    assert all(parameter.is_meta for parameter in architecture.model.parameters())
    for layer in architecture.model.model.layers:
        assert "forward" not in vars(layer)


def test_a_model_that_runs_a_layer_twice(tiny):
    architecture = open_model(tiny("qwen3_moe"), dtype=torch.float32).architecture
    layers = architecture.model.model.layers
    layers[1] = layers[0]
    with pytest.raises(UnsupportedError, match=r"Qwen3Moe.*cannot be run one by one.*layer 0"):
        read_handover(architecture, CPU)


def test_layers_that_say_nothing_without_values_are_refused(
    tiny, calibration, tmp_path, monkeypatch
):
    def fail(layer, hidden, call):
        message = "does not run on tensors without values: it looks at one"
        raise UnsupportedError(message)

    monkeypatch.setattr("reap_stream.model.probing.trace_outline", fail)
    with pytest.raises(UnsupportedError, match=r"GlmMoeDsaForCausalLM.*one by one.*looks at one"):
        prune_to(tmp_path / "pruned", tiny("glm_moe_dsa"), calibration)
    assert list(tmp_path.iterdir()) == []


def test_what_is_computed_from_more_than_hidden_states_is_refused(tiny, monkeypatch):
    architecture = open_model(tiny("glm_moe_dsa"), dtype=torch.float32).architecture
    given = module.Probe.run

    def shifted(self, outlines, width, **options):
        # As a model that calls a layer with the choice of tokens before it plus one.
        made = given(self, outlines, width, **options)
        hidden, call = made.calls[1].hidden, made.calls[1].call
        kwargs = {**call.kwargs, "prev_topk_indices": call.kwargs["prev_topk_indices"] + 1}
        made.calls[1] = Recorded(hidden, LayerCall(call.args, kwargs))
        return made

    monkeypatch.setattr(module.Probe, "run", shifted)
    with pytest.raises(UnsupportedError, match=r"layer 1 .*computes from more than"):
        read_handover(architecture, CPU)


def test_states_are_the_same_in_a_file(tiny, calibration, tmp_path):
    ready = prepare(tiny("gemma4_text"), calibration)
    for name in ("memory", "file"):
        (tmp_path / name).mkdir()
    memory = stream(ready, tmp_path / "memory", spill=False).states
    file = stream(ready, tmp_path / "file", spill=True).states
    for mine, theirs in zip(memory, file, strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert not any((tmp_path / "file").iterdir())
