"""A small source checkpoint of every kind of tensor pruning tells apart, and its numpy oracle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from reap_stream.checkpoint.configedit import edit_config, render_config
from reap_stream.checkpoint.layout import OutputPlan, plan_layout
from reap_stream.checkpoint.output import OutputWriter
from reap_stream.checkpoint.publish import finish_directory
from reap_stream.checkpoint.refs import Role
from reap_stream.checkpoint.source import Checkpoint, open_checkpoint
from reap_stream.verification import SourceFacts

COUNT_PATHS = (("n_routed_experts",),)
MTP_LAYER = 3
SIDE_FILES = {
    "tokenizer.json": b'{"model": "bytes"}',
    "README.md": b"# the source's own card",
    "templates/chat.jinja": b"{{ messages }}\n" * 200_000,
    "reap/run.json": b"{}",
}


@dataclass(frozen=True)
class Source:
    """The checkpoint on disk, what is in it, and what pruning does to that."""

    directory: Path
    arrays: dict[str, np.ndarray]
    roles: dict[str, Role]
    num_experts: int
    layers: tuple[int, ...] = (1, 2, MTP_LAYER)

    @property
    def mtp_tensors(self) -> frozenset[str]:
        return frozenset(name for name in self.arrays if f"layers.{MTP_LAYER}." in name)

    def open(self) -> Checkpoint:
        return open_checkpoint(self.directory)

    def facts(self, dropped: frozenset[str] = frozenset()) -> SourceFacts:
        return SourceFacts(self.roles, self.num_experts, COUNT_PATHS, dropped)

    def choose(self, keep: int, seed: int = 0) -> dict[int, list[int]]:
        rng = np.random.default_rng(seed)
        return {
            layer: sorted(rng.choice(self.num_experts, keep, replace=False).tolist())
            for layer in self.layers
        }


def make_source(directory: Path, num_experts: int = 6, seed: int = 0) -> Source:
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    roles: dict[str, Role] = {}

    def add(name: str, shape: tuple[int, ...], role: Role, dtype: str = "float32") -> None:
        raw = rng.integers(0, 100, shape)
        arrays[name] = raw.astype(dtype)
        roles[name] = role

    add("model.embed_tokens.weight", (7, 4), Role(), "float16")
    for layer in (1, 2, MTP_LAYER):
        prefix = f"model.layers.{layer}"
        add(f"{prefix}.self_attn.q_proj.weight", (4, 4), Role(), "float16")
        add(f"{prefix}.mlp.gate.weight", (num_experts, 4), Role(layer=layer, dim=0))
        add(f"{prefix}.mlp.gate.e_score_correction_bias", (num_experts,), Role(layer=layer, dim=0))
        add(f"{prefix}.mlp.transposed", (3, num_experts, 2), Role(layer=layer, dim=1), "uint8")
        for expert in range(num_experts):
            role = Role(layer=layer, expert=expert, component=5)
            stem = f"{prefix}.mlp.experts.{expert}"
            add(f"{stem}.up_proj.weight", (5, 4), role, "uint8")
            add(f"{stem}.up_proj.weight_scale", (), role)
            add(f"{stem}.empty", (0, 4), role)
    _save(directory, arrays)
    config = {
        "architectures": ["Glm4MoeForCausalLM"],
        "n_routed_experts": num_experts,
        "num_hidden_layers": MTP_LAYER,
        "num_nextn_predict_layers": 1,
        "quantization_config": {"ignore": ["lm_head", "model.layers.1.mlp.experts.0.up_proj"]},
    }
    (directory / "config.json").write_text(render_config(config))
    for name, data in SIDE_FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return Source(directory, arrays, roles, num_experts)


def _save(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    names = list(arrays)
    half = len(names) // 2
    weight_map = {}
    for number, group in enumerate((names[:half], names[half:]), start=1):
        filename = f"model-{number:05}-of-00002.safetensors"
        save_file({name: arrays[name] for name in group}, directory / filename)
        weight_map.update(dict.fromkeys(group, filename))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def pruned_arrays(
    arrays: dict[str, np.ndarray],
    roles: dict[str, Role],
    kept: dict[int, list[int]],
    each: int = 1,
) -> dict[str, np.ndarray]:
    """What the pruned checkpoint must hold, by numpy's own slicing; `each`: entries of an expert."""
    pruned = {}
    for name, array in arrays.items():
        role = roles[name]
        if role.expert is not None:
            if role.expert in kept[role.layer]:
                parts = name.split(".")
                parts[role.component] = str(kept[role.layer].index(role.expert))
                pruned[".".join(parts)] = array
        elif role.dim is not None:
            length = array.shape[role.dim]
            own = [expert * each + entry for expert in kept[role.layer] for entry in range(each)]
            places = [*own, *range(length - role.extra, length)]
            pruned[name] = np.take(array, places, axis=role.dim)
        else:
            pruned[name] = array
    return pruned


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def load_shards(directory: Path) -> dict[str, np.ndarray]:
    loaded: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        shard = load_file(path)
        assert not loaded.keys() & shard.keys()
        loaded.update(shard)
    return loaded


def write_pruned(
    source: Source,
    directory: Path,
    kept: dict[int, list[int]],
    dropped: frozenset[str] = frozenset(),
    max_shard_nbytes: int = 300,
) -> OutputPlan:
    """Write a whole pruned checkpoint, every byte copied from the source's files."""
    checkpoint = source.open()
    keep = len(kept[source.layers[0]])
    plan = plan_layout(
        checkpoint.tensors, source.roles, source.num_experts, keep, max_shard_nbytes, dropped
    )
    writer = OutputWriter(directory, plan, checkpoint.tensors, source.roles)
    writer.allocate()
    layers = {out.layer for out in plan.tensors.values()}
    for layer in layers:
        writer.write_layer(layer, kept, lambda _: None)
    writer.sync()
    config = edit_config(
        checkpoint.config,
        COUNT_PATHS,
        (source.num_experts, keep),
        kept,
        names=checkpoint.tensors,
        mtp_dropped=bool(dropped),
    )
    record = {
        "num_experts": source.num_experts,
        "kept": {str(layer): kept[layer] for layer in layers if layer is not None},
    }
    documents = {
        "README.md": b"# pruned",
        "reap/kept_experts.json": json.dumps(record).encode(),
    }
    finish_directory(directory, plan, checkpoint, kept, render_config(config), documents)
    return plan
