"""The streamed head against the logits of whole models in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from reap_stream.errors import UnsupportedError
from reap_stream.model import loading
from reap_stream.model.lm_head import LmHead, slice_tokens
from reap_stream.model.opened import open_model
from reap_stream.model.skeleton import Skeleton
from tests.builders import load_tensors, quantise, read_config, write_checkpoint
from tests.engine import head_of, prune_to
from tests.families import BY_ID, FAMILIES
from tests.oracle import Reference, run
from tests.packed_checkpoints import WIDTHS, everywhere, head_only, pack

CPU = torch.device("cpu")
VARIANTS = [
    pytest.param("qwen3_moe", {"tie_word_embeddings": True}, id="tied"),
    pytest.param("jamba", {"tie_word_embeddings": True}, id="tied-hybrid"),
    pytest.param("gemma4", {"tie_word_embeddings": True}, id="tied-multimodal"),
    pytest.param("qwen3_omni_moe_thinker", {"tie_word_embeddings": True}, id="tied-omni"),
    # Some releases have it in their config.json, for training.
    pytest.param("mixtral", {"output_router_logits": True}, id="router-logits"),
]
EVERY = [pytest.param(family.id, {}, id=family.id) for family in FAMILIES] + VARIANTS
# Families whose logits are not the product of hidden states and matrix alone.
MORE_THAN_A_PRODUCT = [
    (family_id, changes)
    for family_id, changes in [
        ("granitemoe", {"logits_scaling": 4.0}),
        ("cohere2_moe", {}),
        ("beam", {"final_logit_softcapping": 5.0}),
        ("gemma4_text", {"final_logit_softcapping": 2.0}),
        ("gemma4", {"final_logit_softcapping": 2.0}),
        ("inkling_text", {}),
        ("inkling2_text", {"unpadded_vocab_size": 80, "final_logit_softcapping": 2.0}),
        ("mistral_large4", {}),
        ("muse_spark", {}),
    ]
    if family_id in BY_ID
]


def last_states(model, path, row):
    """What the whole model's decoder gives to its head on a row, [tokens, hidden]."""
    seen = []

    def keep(_module, _args, output):
        first = output[0] if isinstance(output, tuple) else output.last_hidden_state
        seen.append(first[0].clone())

    handle = model.get_submodule(path).register_forward_hook(keep)
    run(model, row)
    handle.remove()
    return seen[0]


def assert_same_log_probabilities(got, expected):
    assert (got.dtype, got.shape) == (torch.float32, expected.shape)
    mine, theirs = got.log_softmax(-1), expected.float().log_softmax(-1)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family_id", "options"), EVERY)
def test_logits_are_the_whole_models(family_id, options, tiny, rows, reference, reader):
    source = tiny(family_id, **options)
    whole = reference(source)
    opened = open_model(source, dtype=torch.float32)
    with LmHead(opened, reader, CPU) as head:
        for row, expected in zip(rows, whole.logits, strict=True):
            hidden = last_states(whole.model, opened.architecture.decoder_path, row)
            assert_same_log_probabilities(head.logits(hidden), expected)
            assert head.vocab_size == expected.shape[-1]


@pytest.mark.parametrize(("family_id", "changes"), MORE_THAN_A_PRODUCT)
def test_what_families_do_with_logits_is_done(family_id, changes, tiny, rows, reference, reader):
    source = tiny(family_id, **changes)
    whole = reference(source)
    opened = open_model(source, dtype=torch.float32)
    hidden = last_states(whole.model, opened.architecture.decoder_path, rows[0])
    with LmHead(opened, reader, CPU) as head:
        got = head.logits(hidden)
    assert_same_log_probabilities(got, whole.logits[0])
    product = hidden @ whole.model.get_output_embeddings().weight.T
    if product.shape == got.shape:
        apart = (product.log_softmax(-1) - got.log_softmax(-1)).abs().max()
        assert apart > 0.01, "the head is its matrix alone: this shows nothing"


def test_slices_are_the_whole(tiny, reader):
    head, hidden = head_of(tiny("glm4_moe"), reader), torch.randn(23, 32)
    with head:
        whole = head.logits(hidden)
        slices = [head.logits(hidden[start : start + 5]) for start in range(0, 23, 5)]
    torch.testing.assert_close(torch.cat(slices), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family_id", [f for f in ("glm4_moe", "hy_v4", "beam") if f in BY_ID])
def test_bfloat16_logits_are_transformers_bit_for_bit(family_id, tiny, rows, reference, reader):
    source = tiny(family_id, dtype=torch.bfloat16)
    whole = reference(source, torch.bfloat16)
    opened = open_model(source, dtype=torch.bfloat16)
    hidden = last_states(whole.model, opened.architecture.decoder_path, rows[0])
    assert hidden.dtype == torch.bfloat16
    with LmHead(opened, reader, CPU) as head:
        assert torch.equal(head.logits(hidden), whole.logits[0].float())
        # One family's head stays in float32.
        width = whole.model.get_output_embeddings().weight.dtype.itemsize
        assert head.nbytes == width * 96 * 32


PACKED = {
    "fp8-block": lambda source, made: quantise(source, made, "block"),
    "fp8-channel": lambda source, made: quantise(source, made, "channel"),
    "int4": lambda source, made: pack(source, made, everywhere("int4")),
    **{
        f"{packing}-head": lambda source, made, p=packing: pack(source, made, head_only(p))
        for packing in ("int4", "int4-zero-points", "int8-channel", "nvfp4", "mxfp4")
    },
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_checkpoints_give_the_logits_of_what_they_mean(case, tiny, rows, tmp_path, reader):
    source = tiny("qwen3_moe", **WIDTHS)
    packed, meant = PACKED[case](source, tmp_path)
    whole = Reference(meant, rows[:1], torch.float32)
    hidden = last_states(whole.model, "model", rows[0])
    head = head_of(packed, reader)
    assert (len(head.refs()) > 1) == case.endswith("-head")
    with head:
        assert_same_log_probabilities(head.logits(hidden), whole.logits[0])
    codes = sum(ref.nbytes for ref in head.refs()) if case.endswith("-head") else 0
    assert head.nbytes == 4 * 96 * 64
    assert head.loading_nbytes == head.nbytes + (codes + 2 * head.nbytes if codes else 0)


@pytest.mark.parametrize("tie", [False, True])
def test_weights_are_there_only_while_it_is_open(tie, tiny, reader):
    opened = open_model(tiny("qwen3_moe", tie_word_embeddings=tie), dtype=torch.float32)
    model = opened.architecture.model
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    head = LmHead(opened, reader, CPU)
    assert reader.bytes_read == 0
    for _ in range(2):
        with head:
            held = [name for name, tensor in model.state_dict().items() if not tensor.is_meta]
            assert held == ["lm_head.weight"]
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        now = model.state_dict(keep_vars=True).items()
        assert {name: id(tensor) for name, tensor in now} == before
    head.close()
    assert reader.bytes_read == 2 * head.nbytes == 2 * 4 * 96 * 32


def test_it_runs_beside_the_skeleton(tiny, rows, reference, reader):
    """Rows of the tied matrix are looked up while the head holds all of it."""
    source = tiny("gemma4", tie_word_embeddings=True)
    whole, opened = reference(source), open_model(source, dtype=torch.float32)
    skeleton, tokens = Skeleton(opened, reader, CPU), rows[0][None]
    last = whole.states[-1][0][None]
    with LmHead(opened, reader, CPU) as head:
        embedded, _ = skeleton.embed(tokens)
        got = head.logits(skeleton.last_hidden_state(tokens, last)[0])
        again, _ = skeleton.embed(tokens)
    assert_same_log_probabilities(got, whole.logits[0])
    assert torch.equal(embedded, again)
    assert embedded.abs().max() > 0


def test_a_head_that_config_ties_but_the_checkpoint_holds_is_its_own(tiny, rows, tmp_path, reader):
    source = tiny("qwen3_moe")
    both = write_checkpoint(
        tmp_path / "both",
        load_tensors(source),
        {**read_config(source), "tie_word_embeddings": True},
    )
    whole = Reference(both, rows[:1], torch.float32)
    hidden = last_states(whole.model, "model", rows[0])
    with head_of(both, reader) as head:
        assert [ref.name for ref in head.refs()] == ["lm_head.weight"]
        assert_same_log_probabilities(head.logits(hidden), whole.logits[0])


def test_large_weights_are_read_piece_by_piece(tiny, reader, monkeypatch):
    source = tiny("glm4_moe", dtype=torch.bfloat16)
    weight = load_tensors(source)["lm_head.weight"]
    monkeypatch.setattr(loading, "_PIECE_NBYTES", 100)
    opened = open_model(source, dtype=torch.float32)
    with LmHead(opened, reader, CPU):
        loaded = opened.architecture.model.get_output_embeddings().weight
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, weight.float())


def test_the_head_of_a_pruned_checkpoint_is_its_sources(tiny, calibration, tmp_path, reader):
    source = tiny("glm4_moe")
    pruned = prune_to(tmp_path / "pruned", source, calibration)
    mine, theirs = head_of(source, reader), head_of(pruned, reader)
    read = reader.bytes_read
    assert mine.same_weights(theirs)
    assert theirs.same_weights(mine)
    assert reader.bytes_read == read + 4 * mine.nbytes
    assert mine.same_weights(head_of(source, reader))
    assert reader.bytes_read == read + 4 * mine.nbytes


def test_a_checkpoint_without_a_head_is_refused(tiny, tmp_path, reader):
    source = tiny("qwen3_moe")
    tensors = load_tensors(source)
    del tensors["lm_head.weight"]
    cut = write_checkpoint(tmp_path / "cut", tensors, read_config(source))
    with pytest.raises(UnsupportedError, match=r"cut: no tensor for parameter 'lm_head\.weight'"):
        head_of(cut, reader)


def test_a_model_without_logits_is_refused(tiny, reader, monkeypatch):
    opened = open_model(tiny("qwen3_moe"), dtype=torch.float32)
    kind = type(opened.architecture.model)
    monkeypatch.setattr(kind, "forward", lambda self, **given: self.model(**given))
    with pytest.raises(UnsupportedError, match="gives no logits for each token"):
        LmHead(opened, reader, CPU)


def test_logits_that_need_more_than_the_head_are_refused(tiny, reader, monkeypatch):
    opened = open_model(tiny("qwen3_moe"), dtype=torch.float32)

    def forward(self, **given):
        hidden = self.model(**given).last_hidden_state * self.model.norm.weight
        return CausalLMOutput(logits=self.lm_head(hidden))

    monkeypatch.setattr(type(opened.architecture.model), "forward", forward)
    match = "computes logits with more than the weights of its head"
    with LmHead(opened, reader, CPU) as head, pytest.raises(UnsupportedError, match=match):
        head.logits(torch.randn(3, 32))


@pytest.mark.parametrize(
    ("vocab_size", "budget", "expected"),
    [(96, 100_000, 52), (150_000, 256 * 2**20, 89), (150_000, 1, 1), (10, 2**40, 1024)],
)
def test_slices_of_five_tensors_fit_the_budget(vocab_size, budget, expected):
    assert slice_tokens(vocab_size, budget) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family_id", [family.id for family in FAMILIES])
def test_logits_on_a_device_are_the_cpus(family_id, tiny, reader):
    opened = open_model(tiny(family_id), dtype=torch.float32)
    hidden = torch.randn(9, opened.architecture.embedding.weight.shape[-1])
    found = []
    for device in (CPU, torch.device("cuda")):
        with LmHead(opened, reader, device) as head:
            found.append(head.logits(hidden).cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
