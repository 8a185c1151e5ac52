"""Vision-language and omni models: the text decoder is pruned, all else is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from reap_stream.checkpoint.reader import Reader
from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import read_architecture
from reap_stream.model.opened import check_forward, open_model
from reap_stream.model.skeleton import Skeleton
from reap_stream.model.transformers_api import build_meta_model
from tests.builders import (
    load_tensors,
    read_config,
    save,
    tiny_config,
    tiny_model,
    write_checkpoint,
)
from tests.engine import prune_to, read_kept
from tests.families import BY_ID, FAMILIES, NUM_EXPERTS
from tests.families_multimodal import DEEPSEEK, composite

COMPOSITES = [family.id for family in FAMILIES if family.text]
KEEP = 4


@pytest.mark.parametrize("family_id", COMPOSITES)
def test_no_weight_of_a_tower_is_loaded(family_id, tiny):
    opened = open_model(tiny(family_id), dtype=torch.float32)
    with Reader() as reader:
        skeleton = Skeleton(opened, reader, torch.device("cpu"))
        skeleton.embed(np.array([[5, 9, 7]]))
    architecture = opened.architecture
    parameters = dict(architecture.model.named_parameters())
    others = {name for name in parameters if not architecture.runs_on_text(name)}
    assert others, "a composite model has more than a decoder"
    assert all(parameters[name].is_meta for name in others)


@pytest.mark.parametrize("family_id", ["qwen3_vl_moe", "llama4"])
def test_a_towers_tensors_may_be_missing_or_in_any_format(family_id, tiny, tmp_path):
    source = tiny(family_id)
    tensors = {n: t for n, t in load_tensors(source).items() if "norm" not in n or "vis" not in n}
    name = next(name for name in tensors if "vis" in name)
    tensors[name] = torch.zeros(3, dtype=torch.int32)
    changed = write_checkpoint(tmp_path / "changed", tensors, read_config(source))
    check_forward(open_model(changed, dtype=torch.float32))


def test_a_talkers_experts_are_left_whole(tiny, calibration, tmp_path):
    source = tiny("qwen3_omni_moe")
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP)
    config = read_config(output)
    assert config["thinker_config"]["text_config"]["num_experts"] == KEEP
    assert config["talker_config"]["text_config"]["num_local_experts"] == NUM_EXPERTS
    before, after = load_tensors(source), load_tensors(output)
    talker = [name for name in before if name.startswith("talker.")]
    assert any(".experts.7." in name for name in talker)
    assert all(torch.equal(before[name], after[name]) for name in talker)
    assert sorted(read_kept(output)) == [0, 1, 2]


def test_a_talker_with_another_number_of_experts_is_left_whole_too(tiny):
    source = tiny("qwen3_omni_moe")
    config = read_config(source)
    config["talker_config"]["text_config"]["num_local_experts"] = 6
    found = read_architecture(source, config)
    assert found.count_paths == (("thinker_config", "text_config", "num_experts"),)
    assert found.layers_path.startswith(found.text_path + ".")
    assert {name.split(".")[0] for name in found.sliced} == {"thinker"}


@pytest.mark.skipif("dots3_note" not in BY_ID, reason="an older transformers lacks it")
def test_a_vision_towers_experts_are_left_whole(tiny):
    source = tiny("dots3_note")
    found = read_architecture(source, read_config(source))
    assert read_config(source)["vision_config"]["num_local_experts"] == NUM_EXPERTS
    assert found.count_paths == (("text_config", "n_routed_experts"),)
    assert not [name for name in found.sliced if "vision" in name]


@pytest.mark.parametrize(
    ("named", "built"),
    [
        (["Qwen3_5MoeForConditionalGeneration"], "Qwen3_5MoeForConditionalGeneration"),
        (["Qwen3_5MoeForCausalLM"], "Qwen3_5MoeForCausalLM"),
        (["SomethingElse"], "Qwen3_5MoeForCausalLM"),
        (None, "Qwen3_5MoeForCausalLM"),
    ],
)
def test_the_model_is_of_the_class_that_the_config_names(named, built):
    config = tiny_config(BY_ID["qwen3_5_moe"])
    config.architectures = named
    model = build_meta_model(config, torch.bfloat16, trust_remote_code=False)
    assert type(model).__name__ == built
    assert all(tensor.is_meta for tensor in model.parameters())


def test_the_text_part_alone_of_a_composite_checkpoint_is_found(tiny, calibration, tmp_path):
    # Text models are published with the whole model's names, and their class in `architectures`.
    source = tiny("qwen3_5_moe")
    tensors = {n: t for n, t in load_tensors(source).items() if "visual" not in n}
    config = {**read_config(source), "architectures": ["Qwen3_5MoeForCausalLM"]}
    text = write_checkpoint(tmp_path / "text", tensors, config)
    output = prune_to(tmp_path / "pruned", text, calibration, KEEP)
    whole = prune_to(tmp_path / "whole", source, calibration, KEEP)
    assert read_kept(output) == read_kept(whole)
    assert load_tensors(output).keys() == {n for n in load_tensors(whole) if "visual" not in n}


def test_experts_outside_the_layers_list_are_refused(tmp_path, monkeypatch):
    family = composite("llava", {"model_type": "deepseek_v3", **DEEPSEEK})
    model = tiny_model(family)
    source = save(model, tmp_path / "source")
    # Both towers of this model would be text to transformers: nothing tells which is the decoder.
    config = read_config(source)
    config["vision_config"] = config["text_config"]
    with pytest.raises(UnsupportedError, match=r"one list of decoder layers|cannot build"):
        read_architecture(source, config)


def test_parts_are_told_apart_by_what_has_a_forward():
    config = tiny_config(BY_ID["qwen3_omni_moe"])
    model = build_meta_model(config, torch.float32, trust_remote_code=False)
    # What the choice of the text part rests on.
    assert type(model).forward is nn.Module.forward
    assert type(model.thinker).forward is not nn.Module.forward
