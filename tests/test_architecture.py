"""What is learnt of a model without weights, against the model itself."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import read_architecture, with_expert_count
from reap_stream.model.routing import Routing, read_routing
from tests.builders import load_tensors, model_class, read_config, tiny_config
from tests.engine import prepare
from tests.families import BY_ID, FAMILIES, NUM_EXPERTS
from tests.oracle import decoder_layers, experts_modules

EVERY = pytest.mark.parametrize("family_id", [family.id for family in FAMILIES])


@pytest.fixture(scope="session")
def architecture(tiny):
    made = {}

    def make(family_id):
        if family_id not in made:
            source = tiny(family_id)
            made[family_id] = read_architecture(source, read_config(source))
        return made[family_id]

    return make


def whole_model(family_id, count=NUM_EXPERTS):
    family = BY_ID[family_id]
    config = tiny_config(family, **{family.count_key: count})
    return model_class(family).from_config(config)


@EVERY
def test_layers_and_experts_are_found(family_id, architecture):
    found, model = architecture(family_id), whole_model(family_id)
    assert found.moe_layers == sorted(experts_modules(model))
    assert found.num_layers == len(decoder_layers(model))
    assert found.num_experts == NUM_EXPERTS
    modules = dict(model.named_modules())
    for layer, path in found.experts_paths.items():
        assert modules[path] is experts_modules(model)[layer]
    assert found.name == type(model).__name__


@EVERY
def test_routing_is_the_configs(family_id, architecture):
    routing = architecture(family_id).routing
    assert routing.experts_per_token == BY_ID[family_id].experts_per_token
    assert routing.groups == BY_ID[family_id].groups
    assert routing.topk_groups == BY_ID[family_id].topk_groups


@EVERY
def test_sliced_parameters_are_those_that_shrink(family_id, architecture):
    found = architecture(family_id)
    before = whole_model(family_id).state_dict()
    after = whole_model(family_id, 5).state_dict()
    expected = {
        name: next(d for d in range(t.dim()) if t.shape[d] != after[name].shape[d])
        for name, t in before.items()
        if t.shape != after[name].shape
    }
    assert found.sliced == expected
    # Experts and at least a router in every MoE layer.
    for layer in found.moe_layers:
        assert sum(found.layer_of(name) == layer for name in found.sliced) >= 3


def parameters(family_id, experts=NUM_EXPERTS):
    """As transformers counts them, but for projections of LongCat's identity experts."""
    model = whole_model(family_id, experts)
    idle = BY_ID[family_id].values.get("zero_expert_num", 0)
    unread = [m.gate_up_proj[0].numel() * idle for m in experts_modules(model).values() if idle]
    return model.num_parameters() - sum(unread)


@EVERY
def test_parameters_are_counted_as_transformers_does(family_id, architecture):
    found = architecture(family_id)
    assert found.total_parameters() == parameters(family_id)
    assert found.total_parameters(5) == parameters(family_id, 5)
    assert found.active_parameters(5) <= found.total_parameters(5)
    experts = sum(
        # Behind its experts LongCat has projections that nothing reads.
        (tensor[:NUM_EXPERTS] if family_id == "longcat_flash" else tensor).numel()
        for module in experts_modules(whole_model(family_id)).values()
        for tensor in module.parameters()
        # Not a norm that all experts of the layer share.
        if tensor.dim() > 1
    )
    idle = experts // NUM_EXPERTS * (NUM_EXPERTS - BY_ID[family_id].experts_per_token)
    assert found.active_parameters() == found.total_parameters() - idle


@EVERY
def test_the_config_key_of_the_count_is_found(family_id, architecture, tiny):
    raw = read_config(tiny(family_id))
    found = architecture(family_id)
    changed = with_expert_count(raw, found.count_paths, 5)
    assert {key for key in raw if raw[key] != changed[key]} == {p[0] for p in found.count_paths}
    smaller = read_architecture(tiny(family_id), changed)
    assert smaller.num_experts == 5
    assert with_expert_count(changed, found.count_paths, NUM_EXPERTS) == raw


@EVERY
def test_counting_survives_a_pass(family_id, tiny, calibration):
    # Preparing runs the model around its layers, which must leave it as it was.
    ready = prepare(tiny(family_id), calibration)
    found = ready.model.architecture
    assert found.total_parameters() == parameters(family_id)
    layers = [t for n, t in found.model.named_parameters() if found.layer_of(n) is not None]
    assert all(tensor.is_meta for tensor in layers)


@EVERY
def test_every_tensor_of_the_checkpoint_has_a_use(family_id, tiny, calibration):
    ready = prepare(tiny(family_id), calibration)
    tensor_map = ready.model.tensor_map
    used = {
        ref.name
        for feed in tensor_map.feeds.values()
        for _, weights in feed.groups
        for weight in weights
        for ref in weight.parts.values()
    }
    names = set(load_tensors(tiny(family_id)))
    # Projections of identity experts, which nothing reads.
    unread = {name for name in names if re.search(r"\.experts\.(8|9|10|11)\.", name)}
    assert bool(unread) == (family_id == "longcat_flash")
    assert used == names - unread
    assert set(tensor_map.roles) == names


def test_keys_that_speak_of_experts_but_not_of_their_number_stay(tiny):
    source = tiny("glm4_moe", n_shared_experts=8, num_experts_per_tok=8)
    found = read_architecture(source, read_config(source))
    assert found.count_paths == (("n_routed_experts",),)
    assert found.routing.experts_per_token == 8


def test_the_compute_dtype_is_that_of_the_parameters(tiny):
    source = tiny("glm4_moe")
    found = read_architecture(source, read_config(source), dtype=torch.bfloat16)
    assert found.model.dtype == torch.bfloat16


def test_a_config_transformers_cannot_read_is_refused(tiny):
    source = tiny("glm4_moe")
    raw = {**read_config(source), "hidden_size": "wide"}
    with pytest.raises(UnsupportedError, match="glm4_moe"):
        read_architecture(source, raw)


def test_groups_of_other_modules_are_not_the_routers():
    model = nn.Module()
    model.config = SimpleNamespace(num_experts_per_tok=3)
    model.layer = nn.Module()
    model.layer.mixer = nn.Module()
    model.layer.mixer.n_groups = model.layer.mixer.n_group = model.layer.mixer.num_group = 8
    model.layer.mixer.top_k = 5
    model.layer.mlp = nn.Module()
    model.layer.mlp.gate = nn.Linear(4, 8)
    model.layer.mlp.experts = nn.Module()
    sliced = {"layer.mlp.gate.weight": 0, "layer.mlp.experts.up_proj": 0}
    where = (model, "layer", "layer.mlp.experts", sliced)
    model.layer.mlp.top_k = 2
    assert read_routing(*where) == Routing(2, 1, 1)
    model.layer.mlp.gate.num_group, model.layer.mlp.gate.topk_group = 4, 2
    assert read_routing(*where) == Routing(2, 4, 2)
