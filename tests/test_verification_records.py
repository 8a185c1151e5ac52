"""Verification of what stands beside the weights: config, index, further files, the record."""

from __future__ import annotations

import pytest

from tests import verified
from tests.verified import edit_json, refuse

source, kept, pruned = verified.source, verified.kept, verified.pruned


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(n_routed_experts=6), "n_routed_experts: '6' found, '3' expected"),
        (lambda c: c.update(n_routed_experts=3.0), r"n_routed_experts: '3\.0' found"),
        (lambda c: c.pop("architectures"), "architectures: 'nothing' found"),
        (lambda c: c.update(extra=True), "extra: 'true' found, 'nothing' expected"),
        (lambda c: c["quantization_config"].update(ignore=[]), "quantization_config: "),
        (lambda c: c.update(num_nextn_predict_layers=0), "num_nextn_predict_layers: '0' found"),
    ],
)
def test_a_wrong_config_is_found(pruned, source, change, match):
    edit_json(pruned / "config.json", change)
    refuse(pruned, source, rf"config\.json: {match}")


def test_a_wrong_index_is_found(pruned, source):
    path = pruned / "model.safetensors.index.json"
    edit_json(path, lambda index: index["metadata"].update(total_size=7))
    refuse(pruned, source, r"index\.json: total_size is 7, the tensors have \d+ bytes")
    edit_json(path, lambda index: index["weight_map"].pop("model.embed_tokens.weight"))
    refuse(pruned, source, r"damaged: .*index\.json: does not list tensor")
    path.unlink()
    refuse(pruned, source, r"index\.json: missing")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b'{"model": "bytez"}', r"tokenizer\.json: byte 15 is not the source's"),
        (b'{"model": "byt', r"tokenizer\.json: byte 14 is not the source's"),
        (b'{"model": "bytes"} ', r"tokenizer\.json: 19 bytes, 18 expected"),
    ],
)
def test_a_wrong_side_file_is_found(pruned, source, data, match):
    (pruned / "tokenizer.json").write_bytes(data)
    refuse(pruned, source, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.update(num_experts=7), "num_experts is 7, the source has 6 experts"),
        (lambda r: r.pop("num_experts"), "num_experts is None"),
        (lambda r: r.pop("kept"), "kept must map layers 1, 2, 3 to experts, not be None"),
        (lambda r: r["kept"].pop("2"), "kept must map layers 1, 2, 3"),
        (lambda r: r["kept"].update({"9": [0, 1, 2]}), "kept must map layers 1, 2, 3"),
        (lambda r: r["kept"].update({"2": "all"}), "layer 2: 1 to 6 expert numbers .* not 'all'"),
        (lambda r: r["kept"].update({"2": []}), r"layer 2: 1 to 6 expert numbers .* not \[\]"),
        (lambda r: r["kept"].update({"2": [0, True, 2]}), r"layer 2: .* not \[0, True, 2\]"),
        (lambda r: r["kept"].update({"2": [0, 1]}), "layer 2: 2 kept experts, 3 expected"),
        (lambda r: r["kept"].update({"2": [2, 1, 0]}), "layer 2: .* not in rising order"),
        (lambda r: r["kept"].update({"2": [0, 1, 1]}), "layer 2: .* not in rising order"),
        (lambda r: r["kept"].update({"2": [0, 1, 6]}), r"layer 2: .* not all in 0\.\.5"),
    ],
)
def test_a_wrong_record_of_kept_experts_is_found(pruned, source, change, match):
    edit_json(pruned / "reap/kept_experts.json", change)
    refuse(pruned, source, rf"kept_experts\.json: {match}")


@pytest.mark.parametrize("text", [None, "", "[]", '{"kept": {}, "kept": {}}'])
def test_a_record_that_cannot_be_read_is_found(pruned, source, text):
    path = pruned / "reap/kept_experts.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    refuse(pruned, source, r"kept_experts\.json: ")
