"""A checkpoint whose settings name experts by number, and the experts that stay."""

from __future__ import annotations

from hypothesis import strategies as st

from reap_stream.checkpoint.configedit import edit_config

NUM_EXPERTS = 12
NUM_LAYERS = 12
# Layer 0 is dense, 12 the prediction layer; numbers of one and of two digits change places.
KEPT = {1: [0, 2, 3, 10], 2: [1, 4, 10, 11], 11: [5, 6, 7, 8], 12: [0, 1, 10, 11]}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def module(layer, expert, projection="up_proj"):
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}"


NAMES = [
    "lm_head.weight",
    *(f"model.layers.{layer}.self_attn.q_proj.qweight" for layer in range(13)),
    *(f"model.layers.{layer}.mlp.gate.weight" for layer in KEPT),
    *(
        f"{module(layer, expert, projection)}.{suffix}"
        for layer in KEPT
        for expert in range(NUM_EXPERTS)
        for projection in PROJECTIONS
        for suffix in ("qweight", "scales")
    ),
]


def renumbered(settings, names=NAMES, kept=KEPT, mtp_dropped=False):
    config = {"num_hidden_layers": NUM_LAYERS, "quantization_config": settings}
    edited = edit_config(config, (), (12, 4), kept, names=names, mtp_dropped=mtp_dropped)
    return edited["quantization_config"]


def new(layer, expert, projection="up_proj"):
    """The new name of a kept expert."""
    return module(layer, KEPT[layer].index(expert), projection)


PATTERNS = [
    ("ignore", r"re:.*mlp\.experts\.5\..*"),
    ("ignore", r"re:.*\.experts\.1\d\..*"),
    ("ignore", r"re:model\.layers\.1\.mlp\.experts\.(1|2|10)\.up_proj"),
    ("ignore", r"re:model\.layers\.1\.mlp\.experts\.10\.up_proj"),
    ("ignore", r"re:^model\.layers\.1\.mlp\.experts\.10\..*$"),
    ("ignore", "re:model.layers.1.mlp.experts.10.up_proj"),
    ("ignore", r"re:.*layers\.(1|2)\..*experts\.\d\.(up|gate)_proj"),
    ("ignore", r"re:.*experts\.[1-5]\."),
    ("ignore", r"re:.*experts\..\.down_proj"),
    ("ignore", r"re:model\.layers\.1\.mlp\.experts\.1"),
    ("ignore", "re:model.layers.1.mlp.experts.1..*"),
    ("exclude_modules", "model.layers.1.mlp.experts.1*"),
    ("exclude_modules", "*experts.10.*"),
    ("exclude_modules", "*layers.1.mlp.experts.10.*"),
    ("exclude_modules", "*experts.?.up_proj"),
    ("exclude_modules", "*experts.[0-4].up_proj"),
    ("modules_to_not_convert", r"model.layers.1.mlp.experts.(2|3).up_proj"),
    ("modules_to_not_convert", r"model.layers.2.mlp.experts.1+\."),
    ("ignore", "re:.*experts.*"),
    ("ignore", r"re:.*experts\.\d+\.up_proj"),
    ("ignore", r"re:.*layers\.1\.mlp\.experts\.[0-9]+\.w2"),
    ("ignore", r"re:.*self_attn.*"),
    ("exclude_modules", "*mlp.experts*"),
    ("exclude_modules", "model.layers.1.*"),
    ("modules_to_not_convert", "*mlp.experts*"),
]
choices = st.lists(st.integers(0, 11), min_size=4, max_size=4, unique=True).map(sorted)
