"""`--evict`: a few shards are on the disk at a time, each is fetched once, and the result is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reap_stream.checkpoint.shard_uses import ShardOrder, Uses
from reap_stream.cli import main
from tests.builders import add_mtp, quantise
from tests.hub_checkpoints import (
    HEADER_NBYTES,
    RUN,
    Watch,
    assert_same_weights,
    by_layer,
    cached_shards,
    prune,
    reshard,
    seven_shards,
    shard_nbytes,
    shards,
    specs,
)

NAME = "org/evicted-moe"


@pytest.fixture(scope="module")
def source(tiny):
    return seven_shards(tiny)


@pytest.fixture(scope="module")
def with_mtp(source, tmp_path_factory):
    """The checkpoint with a next-token-prediction layer, in a shard for each layer."""
    folder = tmp_path_factory.mktemp("mtp")
    return reshard(add_mtp(source, folder / "one", "nextn"), folder / "many", by_layer)


def planned_peak(capsys, *more):
    capsys.readouterr()
    assert main(["plan", NAME, "--keep", "4", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)["download"]["evicted_peak_bytes"]


@pytest.fixture
def check(hub, source, monkeypatch, tmp_path, capsys):
    """Runs a command that evicts; holds the disk to a bound, and the Hub to one transfer a shard."""

    def call(line, work, *, bound=None, directory=source):
        bound = planned_peak(capsys) if bound is None else bound
        hub.forget()
        done = ShardOrder.done

        def look(order, step):
            watch.look()
            done(order, step)
            watch.look()

        monkeypatch.setattr(ShardOrder, "done", look)
        with Watch(tmp_path / work) as watch:
            assert main([str(part) for part in line]) == 0, capsys.readouterr().err
        total = shard_nbytes(directory)
        assert 0 < watch.peak <= bound < total
        assert not (tmp_path / work).exists()
        assert not cached_shards(tmp_path / "cache")
        # Nothing was deleted too early, or it would have been fetched again.
        assert total <= hub.sent("safetensors") <= total + HEADER_NBYTES * len(shards(directory))

    return call


def prune_line(output, calibration, *more):
    return ["prune", NAME, "--output", output, *specs(calibration), *RUN, "--keep", 4, *more]


def test_prune(check, calibration, from_directory, tmp_path):
    check(prune_line(tmp_path / "out", calibration, "--evict"), ".out.reap-source")
    assert_same_weights(tmp_path / "out", from_directory)


@pytest.mark.parametrize("mtp", ["score", "match", "keep"])
def test_prune_with_prediction_layers(
    hub, check, with_mtp, calibration, tmp_path, capsys, mtp
):  # fmt: skip
    hub.add(NAME, with_mtp)
    options = ("--mtp", mtp)
    assert prune(with_mtp, tmp_path / "expected", calibration, *options) == 0
    line = prune_line(tmp_path / "out", calibration, "--evict", *options)
    bound = planned_peak(capsys, *options)
    check(line, ".out.reap-source", bound=bound, directory=with_mtp)
    assert_same_weights(tmp_path / "out", tmp_path / "expected")


def test_layers_that_are_left_out_are_not_fetched(hub, with_mtp, calibration, tmp_path, capsys):
    hub.add(NAME, with_mtp)
    left_out = with_mtp / "layer-7.safetensors"
    assert main(["plan", NAME, "--keep", "4", "--json", "--mtp", "drop"]) == 0
    planned = json.loads(capsys.readouterr().out)["download"]["bytes"]
    assert planned == shard_nbytes(with_mtp) - left_out.stat().st_size
    assert prune(with_mtp, tmp_path / "expected", calibration, "--mtp", "drop") == 0
    hub.forget()
    assert prune(NAME, tmp_path / "out", calibration, "--evict", "--mtp", "drop") == 0
    assert_same_weights(tmp_path / "out", tmp_path / "expected")
    assert hub.sent(left_out.name) <= HEADER_NBYTES < left_out.stat().st_size


@pytest.mark.parametrize("mtp", ["score", "match", "keep", "drop"])
def test_compact_with_prediction_layers(
    hub, check, with_mtp, calibration, tmp_path, capsys, mtp
):  # fmt: skip
    hub.add(NAME, with_mtp)
    scores = tmp_path / "scores.safetensors"
    observe = ["observe", NAME, "--output", scores, *specs(calibration), *RUN]
    check([*observe, "--evict"], ".scores.safetensors.reap-source", directory=with_mtp)
    write = ["compact", NAME, "--scores", scores, "--keep", 4, "--mtp", mtp, "--output"]
    if mtp == "drop":
        # The shard of the layer that is left out is not fetched.
        hub.forget()
        assert main([str(part) for part in (*write, tmp_path / "out", "--evict")]) == 0
        left_out = with_mtp / "layer-7.safetensors"
        assert hub.sent(left_out.name) <= HEADER_NBYTES < left_out.stat().st_size
    else:
        check([*write, tmp_path / "out", "--evict"], ".out.reap-source", directory=with_mtp)
    assert prune(with_mtp, tmp_path / "expected", calibration, "--mtp", mtp) == 0
    assert_same_weights(tmp_path / "out", tmp_path / "expected")
    assert main(["verify", str(tmp_path / "out"), "--source", NAME, "--evict"]) == 0
    assert not cached_shards(tmp_path / "cache")


def test_observe_compact_and_verify(check, source, calibration, from_directory, tmp_path, capsys):
    scores = tmp_path / "scores.safetensors"
    observe = ["observe", NAME, "--output", scores, *specs(calibration), *RUN]
    check([*observe, "--evict"], ".scores.safetensors.reap-source")
    compact = ["compact", NAME, "--scores", scores, "--keep", 4, "--output"]
    # Nothing outside the layers is held: less than a pass needs.
    bound = planned_peak(capsys) - min(path.stat().st_size for path in shards(source)) // 2
    check([*compact, tmp_path / "out", "--evict"], ".out.reap-source", bound=bound)
    assert_same_weights(tmp_path / "out", from_directory)
    verify = ["verify", tmp_path / "out", "--source", NAME]
    check([*verify, "--evict"], ".out.reap-source", bound=bound)


def test_compact_and_verify_leave_a_cache(hub, source, calibration, from_directory, tmp_path):
    scores = tmp_path / "scores.safetensors"
    options = [*specs(calibration), *RUN]
    assert main(["observe", NAME, "--output", str(scores), *options, "--evict"]) == 0
    compact = ["compact", NAME, "--scores", str(scores), "--keep", "4", "--output"]
    assert main([*compact, str(tmp_path / "out")]) == 0
    assert_same_weights(tmp_path / "out", from_directory)
    assert len(cached_shards(tmp_path / "cache")) == len(shards(source))
    hub.forget()
    # What is in the cache is used, and not deleted.
    assert main([*compact, str(tmp_path / "again"), "--evict"]) == 0
    assert main(["verify", str(tmp_path / "again"), "--source", NAME, "--evict"]) == 0
    assert hub.sent("safetensors") == 0
    assert len(cached_shards(tmp_path / "cache")) == len(shards(source))


@pytest.mark.parametrize("mode", ["fp8", "bf16"])
def test_other_formats_are_computed_on_the_way(
    hub, check, calibration, tmp_path, tmp_path_factory, tiny, mode
):  # fmt: skip
    """Weights and scales of a layer may lie in different shards."""
    plain = tiny("glm4_moe", hidden_size=128, moe_intermediate_size=128)
    source = plain if mode == "fp8" else quantise(plain, tmp_path / "quantised", "block")[0]
    many = reshard(
        source,
        tmp_path / "many",
        lambda name: ("scales-" if name.endswith("_scale_inv") else "") + by_layer(name),
    )
    hub.add(NAME, many)
    options = ("--weights", mode)
    assert prune(many, tmp_path / "expected", calibration, *options) == 0
    assert prune(NAME, tmp_path / "pruned", calibration, *options, "--evict") == 0
    assert_same_weights(tmp_path / "pruned", tmp_path / "expected")
    scores = tmp_path / "scores.safetensors"
    line = ["observe", NAME, "--output", str(scores), *specs(calibration), *RUN]
    assert main([*line, "--evict"]) == 0
    compact = ["compact", NAME, "--scores", scores, "--keep", 4, *options, "--output"]
    bound = shard_nbytes(many) - 1
    line = [*compact, tmp_path / "out", "--evict"]
    check(line, ".out.reap-source", bound=bound, directory=many)
    assert_same_weights(tmp_path / "out", tmp_path / "expected")
    verify = ["verify", tmp_path / "out", "--source", NAME, "--evict"]
    check(verify, ".out.reap-source", bound=bound, directory=many)


def figures(capsys):
    document = json.loads(capsys.readouterr().out)
    return [{"all": c["all"], "layers": c["layers"]} for c in document["candidates"]]


def eval_line(models, calibration, *more):
    texts = [part for spec in calibration for part in ("--text", spec)]
    return ["eval", *models, *texts, *RUN, "--json", *more]


def test_eval(check, source, calibration, from_directory, tmp_path, capsys):
    """A reference on the Hub, and a pruned directory that is never touched."""
    (tmp_path / "scratch").mkdir()
    bound = planned_peak(capsys)
    line = eval_line([NAME, from_directory], calibration, "--scratch", tmp_path / "scratch")
    check([*line, "--evict"], "scratch/.eval.reap-source", bound=bound)
    found = figures(capsys)
    assert main([str(p) for p in eval_line([source, from_directory], calibration)]) == 0
    assert found == figures(capsys)
    assert not list((tmp_path / "scratch").iterdir())


def test_eval_of_what_was_never_written(check, source, calibration, tmp_path, capsys):
    """All candidates share one reading; scores of the Hub's model fit the directory too."""
    scores = tmp_path / "scores.safetensors"
    observe = ["observe", NAME, "--output", str(scores), *specs(calibration), *RUN, "--evict"]
    assert main(observe) == 0
    candidates = ["--scores", scores, "--keep", "4,6"]
    check(
        eval_line([NAME], calibration, *candidates, "--scratch", tmp_path, "--evict"),
        ".eval.reap-source",
    )
    found = figures(capsys)
    assert len(found) == 3
    assert main([str(part) for part in eval_line([source], calibration, *candidates)]) == 0
    assert found == figures(capsys)


@pytest.mark.parametrize("evict", [False, True], ids=["cache", "evict"])
def test_eval_of_two_models_on_the_hub(
    hub, source, calibration, from_directory, tmp_path, capsys, evict
):
    hub.add("org/pruned-moe", from_directory)
    names = [NAME, "org/pruned-moe"]
    options = ["--output", tmp_path / "eval.json", *(["--evict"] if evict else [])]
    works = [tmp_path / f".eval.json.reap-source{more}" for more in ("", "-2")]
    with Watch(*works) as watch:
        assert main([str(p) for p in eval_line(names, calibration, *options)]) == 0
    total = shard_nbytes(source) + shard_nbytes(from_directory)
    assert hub.sent("safetensors") <= total + HEADER_NBYTES * 2 * len(shards(source))
    assert (0 < watch.peak < total) == evict
    assert not any(work.exists() for work in works)
    assert bool(cached_shards(tmp_path / "cache")) != evict
    found = figures(capsys)
    assert main([str(p) for p in eval_line([source, from_directory], calibration)]) == 0
    assert found == figures(capsys)
    document = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    commits = [hub.repositories[name].commit for name in names]
    expected = [f"{name}@{commit}" for name, commit in zip(names, commits, strict=True)]
    assert [c["model"] for c in document["candidates"]] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["prune", "{source}", "--output", "{out}", "--keep", "4"], "no other files are ever"),
        (["eval", "{source}", "--scratch", "{out}"], "no other files are ever deleted"),
        (["eval", NAME], "--evict: say with --scratch or --output where shards may lie"),
    ],
)
def test_what_evict_cannot_do_is_refused(
    hub, source, calibration, tmp_path, capsys, line, message
):  # fmt: skip
    option = "--text" if line[0] == "eval" else "--calibration"
    line = [part.format(source=source, out=tmp_path / "out") for part in line]
    assert main([*line, option, calibration[0], "--evict"]) == 2
    assert message in capsys.readouterr().err
    assert shards(source)
    assert not hub.requests


def test_peak_counts_what_is_held_and_what_comes_next():
    a, b, c, d = (Path(name) for name in "abcd")
    uses = {a: Uses(0, 4), b: Uses(0, 1), c: Uses(1, 2), d: Uses(3, 3)}
    order = ShardOrder(uses, end=4)
    # Step 0: a, b and, fetched meanwhile, c; step 2: a, c, d.
    assert order.peak_nbytes({a: 1, b: 10, c: 100, d: 1000}) == 1101
    assert order.peak_nbytes({a: 1, b: 1000, c: 100, d: 10}) == 1101
    assert ShardOrder({}, end=0).peak_nbytes({}) == 0
