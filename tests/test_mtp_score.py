"""`--mtp score`: prediction layers run as transformers runs them, scored and pruned by themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_layers import MtpModel

from reap_stream.errors import UnsupportedError
from reap_stream.model.transformers_api import mtp
from reap_stream.verifying import verify_directory
from tests.builders import add_mtp, read_config
from tests.engine import prepare, prune_to, read_kept, read_scores, stream
from tests.mtp_oracle import MtpReference, load_head, loadable, prune_head
from tests.oracle_pruning import assert_kept_bytes, best

KEEP = 4
# Older releases of transformers do not know how these families' prediction layers are named.
NAMED_LATE = {"qwen3_next", "mimo_v2_flash"}
KNOWS_ALL = Version(transformers.__version__) >= Version("5.23")
# Family, layout of names, prediction layers, what transformers' config lacks.
LISTED = [
    ("glm4_moe", "nextn", 1, {}),
    ("glm4_moe", "nextn", 2, {"num_mtp_layers": 2}),
    ("deepseek_v3", "nextn", 1, {}),
    ("qwen3_next", "mtp", 1, {"num_mtp_layers": 1, "mtp_layer_types": ["full_attention"]}),
    (
        "mimo_v2_flash",
        "mimo",
        2,
        {
            "num_mtp_layers": 2,
            "mtp_layer_types": ["full_attention"] * 2,
            "mtp_mlp_layer_types": ["sparse"] * 2,
        },
    ),
]
CASES = [case for case in LISTED if KNOWS_ALL or case[0] not in NAMED_LATE]
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}")
GROUPS = {"deepseek_v3": 2}
FIELDS = ("tokens", "gate_sum", "norm_sum", "gate_norm_sum", "norm_max")


@pytest.fixture(scope="session")
def source_of(tiny, tmp_path_factory):
    made = {}

    def make(family_id, style, count):
        key = (family_id, style, count)
        if key not in made:
            made[key] = add_mtp(tiny(family_id), tmp_path_factory.mktemp("mtp"), style, count)
        return made[key]

    return make


@pytest.fixture(scope="session")
def whole(source_of, rows):
    made = {}

    def make(case):
        family_id, style, count, kinds = case
        if case[:3] not in made:
            source = source_of(family_id, style, count)
            made[case[:3]] = MtpReference(loadable(source), rows, **kinds)
        return made[case[:3]]

    return make


@EVERY
def test_streamed_equals_transformers(case, source_of, whole, calibration, tmp_path):
    family_id, style, count, _ = case
    source = source_of(family_id, style, count)
    ready = prepare(source, calibration, mtp="score")
    first = ready.model.architecture.num_layers
    assert ready.moe_layers[-count:] == list(range(first, first + count))
    streamed, expected = stream(ready, tmp_path), whole(case)
    for number in range(count):
        for row, states in enumerate(expected.states[number]):
            found = streamed.states[first + number][row][: len(states)]
            torch.testing.assert_close(found, states, rtol=1e-4, atol=1e-4)
            logits = expected.head._project_to_logits(found)
            torch.testing.assert_close(logits, expected.logits[number][row], rtol=1e-3, atol=1e-3)


@EVERY
def test_scores_equal_a_naive_oracle(case, source_of, whole, calibration, tmp_path):
    family_id, style, count, _ = case
    source = source_of(family_id, style, count)
    streamed = stream(prepare(source, calibration, mtp="score"), tmp_path)
    first, expected = read_config(source)["num_hidden_layers"], whole(case)
    for number in range(count):
        stats, sums = streamed.stats[first + number], expected.sums(number)
        for field in FIELDS:
            found = getattr(stats, field)
            found = found.max(axis=0) if field == "norm_max" else found.sum(axis=0)
            np.testing.assert_allclose(found, getattr(sums, field), rtol=1e-5, err_msg=field)


@EVERY
def test_pruned_as_the_oracle_says(case, source_of, whole, calibration, tmp_path):
    family_id, style, count, _ = case
    source = source_of(family_id, style, count)
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP)
    kept, scores, first = read_kept(output), read_scores(output), layers_of(source)
    for number in range(count):
        sums = whole(case).sums(number)
        expected = best(sums.scores("reap"), KEEP, GROUPS.get(family_id, 1))
        assert kept[first + number] == expected
        tokens = scores[f"layers.{first + number}.tokens"]
        assert np.array_equal(tokens.sum(axis=0), sums.tokens)
    assert_kept_bytes(source, output, kept, first)
    assert verify_directory(output, source).mtp_layers == count
    record = json.loads((output / "reap" / "run.json").read_text(encoding="utf-8"))
    layers = list(range(first, first + count))
    assert record["mtp"] == {"choice": "score", "layers": layers, "notes": []}
    assert record["settings"]["mtp"] == "score"


@EVERY
def test_the_pruned_head_equals_one_pruned_by_hand(case, source_of, rows, calibration, tmp_path):
    family_id, style, count, kinds = case
    source = source_of(family_id, style, count)
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP)
    main, head = load_head(loadable(output), **kinds)
    kept, first = read_kept(output), layers_of(source)
    _, whole_head = load_head(loadable(source), **kinds)
    expected = prune_head(whole_head, head, kept, first)
    found = MtpReference.of(main, head, rows)
    by_hand = MtpReference.of(main, expected, rows)
    for number in range(count):
        for one, other in zip(found.logits[number], by_hand.logits[number], strict=True):
            assert torch.equal(one, other)


def test_later_layers_see_the_pruned_model(source_of, rows, calibration, tmp_path):
    case = CASES[1]
    source = source_of(*case[:3])
    output = prune_to(tmp_path / "out", source, calibration, KEEP, propagate="pruned")
    kept, scores = read_kept(output), read_scores(output)
    main, _ = load_head(output, **case[3])
    _, whole_head = load_head(source, **case[3])
    # The first layer is scored whole on the pruned decoder, the second on the first, pruned.
    for number in range(2):
        mixed = prune_head(whole_head, whole_head, {3: kept[3]} if number else {}, 3)
        sums = MtpReference.of(main, mixed, rows).sums(number)
        found = scores[f"layers.{3 + number}.gate_norm_sum"].sum(axis=0)
        np.testing.assert_allclose(found, sums.gate_norm_sum, rtol=1e-4)
        assert kept[3 + number] == best(sums.scores("reap"), KEEP, 1)


def test_names_that_transformers_does_not_know_leave_the_layers_unscored(
    source_of, calibration, tmp_path, monkeypatch
):
    def without_own(model, **options):
        known = get_model_conversion_mapping(model, **options)
        return [] if isinstance(model, MtpModel) else known

    monkeypatch.setattr(mtp, "get_model_conversion_mapping", without_own)
    source = source_of("qwen3_next", "mtp", 1)
    with pytest.raises(
        UnsupportedError, match=r"--mtp score: .*does not know the names.*--mtp match"
    ):
        prepare(source, calibration, mtp="score")
    record = json.loads(
        (prune_to(tmp_path / "out", source, calibration) / "reap/run.json").read_text()
    )
    assert record["mtp"]["choice"] == "match"
    assert "no place for tensor 'mtp." in record["mtp"]["notes"][0]


def layers_of(source):
    return read_config(source)["num_hidden_layers"]
