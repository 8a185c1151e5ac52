"""When shards are read: whatever a step takes from a checkpoint, its shards are held in that step."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch

from reap_stream.checkpoint.layout import plan_layout
from reap_stream.checkpoint.pieces import pieces
from reap_stream.checkpoint.providers import provided
from reap_stream.checkpoint.shard_uses import ShardOrder
from reap_stream.model.opened import open_model
from reap_stream.mtp_choice import choose_mtp
from reap_stream.pruning import recoded, source_facts
from reap_stream.settings import OutputSettings
from reap_stream.shard_order import copy_order, shard_order
from tests.builders import add_mtp
from tests.hub_checkpoints import reshard

KEEP = 4
# Experts one by one and in one tensor; prediction layers under names of three kinds.
SOURCES = [
    ("glm4_moe", "nextn", 2),
    ("qwen3_moe", "mtp", 1),
    ("gpt_oss", None, 0),
    ("glm4_moe", "mimo", 1),
]


@pytest.fixture(scope="module", params=SOURCES, ids=lambda p: f"{p[0]}-{p[1]}")
def model(request, tiny, tmp_path_factory):
    """A checkpoint whose tensors lie in nine shards without any order."""
    family, style, count = request.param
    folder = tmp_path_factory.mktemp("scattered")
    source = tiny(family)
    if style is not None:
        source = add_mtp(source, folder / "mtp", style, count)
    many = reshard(source, folder / "many", lambda n: f"s{crc32(n.encode()) % 9}.safetensors")
    return open_model(many, dtype=torch.float32)


def holds(order: ShardOrder, shard, step) -> bool:
    return order.uses[shard].first <= step <= order.uses[shard].last


@pytest.mark.parametrize("weights", ["keep", "bf16"])
@pytest.mark.parametrize("mtp", ["score", "match", "keep", "drop"])
def test_what_is_copied_in_a_step_is_there(model, mtp, weights):
    recoded_model = recoded(model, OutputSettings(output=None, weights=weights), mtp)
    facts, order = source_facts(recoded_model, mtp), copy_order(recoded_model, mtp)
    tensors = recoded_model.checkpoint.tensors
    plan = plan_layout(
        tensors, facts.roles, facts.num_experts, KEEP, dropped=facts.dropped
    )  # fmt: skip
    kept = dict.fromkeys(facts.layers, range(facts.num_experts - KEEP, facts.num_experts))
    decoder, scored = model.architecture.num_layers, model.mtp_kept_layers()
    for out in plan.tensors.values():
        step = order.steps[out.origin]
        if out.recipe is None:
            files = {piece.ref.file for piece in pieces(out, tensors, facts.roles, kept)}
        else:
            steps = out.recipe.steps(() if out.layer is None else kept[out.layer])
            files = {span.ref.file for part in steps for span in part.spans}
        assert all(holds(order.shards, file, step) for file in files), out.name
        if out.layer is None:
            assert out.origin in order.whole[step]
        elif out.layer < decoder or (mtp == "score" and out.layer in scored):
            assert step == out.layer
        else:
            assert step == order.shards.end
    dropped = set(tensors) - set(order.steps)
    assert dropped == set(facts.dropped)


@pytest.mark.parametrize("writes", [False, True])
def test_what_a_pass_reads_in_a_layer_is_there(model, writes):
    head = choose_mtp(model, None, torch.device("cpu")).head
    order = shard_order(model, head, writes=writes)
    layers = model.architecture.num_layers + (len(head.moe_layers) if head else 0)
    assert order.end >= layers
    for name, ref in model.checkpoint.tensors.items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if name.startswith("model.layers.") and number < model.architecture.num_layers:
            assert holds(order, ref.file, number), name
        if "embed_tokens" in name and name.startswith("model.embed"):
            assert holds(order, ref.file, 0)
            assert holds(order, ref.file, order.end)
        if writes:
            assert ref.file in order.uses


def test_shards_that_nothing_reads_are_left_out(tiny, tmp_path):
    """A pass that writes nothing fetches no prediction layers that cannot be run."""
    source = add_mtp(tiny("glm4_moe"), tmp_path / "mtp", "nextn")
    apart = reshard(
        source,
        tmp_path / "many",
        lambda n: "mtp.safetensors" if n.startswith("model.layers.3.") else "rest.safetensors",
    )
    model = open_model(apart, dtype=torch.float32)
    assert {path.name for path in shard_order(model, None, writes=False).uses} == {
        "rest.safetensors"
    }
    assert {path.name for path in copy_order(model, "drop").shards.uses} == {"rest.safetensors"}
    dropped = shard_order(model, None, writes=True, mtp="drop")
    assert {path.name for path in dropped.uses} == {"rest.safetensors"}
    assert len(shard_order(model, None, writes=True).uses) == 2
    assert len(copy_order(model, "match").shards.uses) == 2


class NotingProvider:
    """Brings nothing, and notes what it is asked for."""

    def __init__(self, directory, *, evicts):
        self.directory, self.evicts = directory, evicts
        self.asked, self.released = [], []

    def prefetch(self, names):
        self.asked += names

    def release(self, names):
        self.released += names

    def told(self):
        """What was asked for and let go since the last call."""
        told = "".join(self.asked), "".join(self.released)
        self.asked, self.released = [], []
        return told


@pytest.mark.parametrize("evicts", [True, False])
def test_the_next_shards_are_fetched_while_a_step_runs(tmp_path, evicts):
    reads = [("a", 0), ("b", 0), ("b", 1), ("c", 1), ("d", 2), ("e", 3), ("a", 4)]
    order = ShardOrder.of([(tmp_path / shard, step) for shard, step in reads], end=4)
    provider = NotingProvider(tmp_path, evicts=evicts)
    with provided(provider):
        order.begin(0)
        asked, released = provider.told()
        # What stays may come at once, in the order in which it is read.
        assert (asked, released) == ("abc" if evicts else "abcabcde", "")
        assert [order.done(step) or provider.told() for step in range(5)] == [
            ("d", ""),
            ("e", "bc"),
            ("", "bcd"),
            ("", "bcde"),
            ("", "abcde"),
        ]
        order.begin(2)
        assert provider.told()[0] == ("ade" if evicts else "adeade")
