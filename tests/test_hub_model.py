"""MODEL from the Hub, against a server on loopback: what is fetched, when, and what stays."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from filecmp import cmpfiles
from pathlib import Path

import pytest

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.cli import main
from reap_stream.hub.names import parse_hub_name
from reap_stream.shard_order import ShardOrder, Uses
from tests.hub_server import TOKEN, Fault, serving
from tests.model_hub_client import RUN_IN_PIECES, environment, point_at

NAME = "org/tiny-moe"
RUN = ("--keep", "4", "--compute-dtype", "float32", "--batch-tokens", "72", "--device", "cpu")


@pytest.fixture(scope="module")
def source(tiny):
    """A checkpoint of seven shards, about a layer each."""
    directory = tiny(
        "glm4_moe",
        max_shard_size="500KB",
        num_hidden_layers=7,
        hidden_size=64,
        moe_intermediate_size=64,
        num_nextn_predict_layers=0,
    )
    (directory / "README.md").write_text("# the source", encoding="utf-8")
    (directory / "original").mkdir(exist_ok=True)
    (directory / "original" / "weights.pth").write_bytes(b"not fetched")
    assert len(shards(directory)) >= 6
    return directory


@pytest.fixture
def hub(monkeypatch, tmp_path, source):
    """A server that has the checkpoint, and an empty cache."""
    with serving() as server:
        server.commit = server.add(NAME, source)
        point_at(monkeypatch, server.url, tmp_path / "cache")
        yield server


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def specs(calibration):
    return [part for spec in calibration for part in ("--calibration", spec)]


def prune(model, output, calibration, *more):
    return main(["prune", str(model), "--output", str(output), *specs(calibration), *RUN, *more])


def assert_same_weights(output, expected):
    names = [path.name for path in shards(expected)]
    assert names == [path.name for path in shards(output)]
    assert cmpfiles(output, expected, [*names, "config.json"], shallow=False)[1:] == ([], [])


@pytest.fixture(scope="module")
def from_directory(source, calibration, tmp_path_factory):
    """What pruning the directory itself gives."""
    output = tmp_path_factory.mktemp("expected") / "out"
    assert prune(source, output, calibration) == 0
    return output


def cached_shards(cache):
    return sorted(cache.rglob("snapshots/*/*.safetensors"))


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("zai-org/GLM-4.6-FP8@refs/pr/3", "zai-org/GLM-4.6-FP8", "refs/pr/3"),
    ],
)
def test_ids_of_the_hub(text, repository, revision):
    name = parse_hub_name(text)
    assert (name.repository, name.revision, str(name)) == (repository, revision, text)


@pytest.mark.parametrize(
    "text", ["name", "./org/name", "/org/name", "a/b/c", "org/", "../x", "org/name@", "org /name"]
)
def test_paths_are_no_ids(text):
    assert parse_hub_name(text) is None


def test_a_path_that_exists_wins(hub, source, monkeypatch, tmp_path, capsys):
    (tmp_path / "org").mkdir()
    (tmp_path / NAME).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", NAME]) == 0
    assert not hub.requests


def test_inspect_reads_headers_alone(hub, source, capsys, tmp_path):
    assert main(["inspect", NAME, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(source), "--json"]) == 0
    assert found == json.loads(capsys.readouterr().out)
    assert not cached_shards(tmp_path / "cache")
    headers = sum(int.from_bytes(path.read_bytes()[:8], "little") for path in shards(source))
    assert hub.sent("safetensors") <= headers + 100_000 * len(shards(source))
    assert all(request.range for request in hub.asked("GET", "safetensors"))
    assert not hub.asked("GET", "README.md")


def test_a_header_longer_than_the_first_request(hub, source, capsys, monkeypatch):
    monkeypatch.setattr("reap_stream.hub.starts._FIRST_NBYTES", 50)
    assert main(["inspect", NAME]) == 0
    assert hub.sent("safetensors") < 50_000


def test_plan_tells_what_is_fetched(hub, source, capsys):
    assert main(["plan", NAME, "--keep", "4", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    total = sum(path.stat().st_size for path in shards(source))
    assert planned["download"]["bytes"] == total
    assert 0 < planned["download"]["evicted_peak_bytes"] < total
    assert not planned["facts" if "facts" in planned else "estimated"]
    assert main(["plan", NAME, "--keep", "4"]) == 0
    assert "with --evict at most" in capsys.readouterr().out
    assert main(["plan", str(source), "--keep", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["download"] is None


def test_prune_gives_what_the_directory_gives(hub, source, calibration, from_directory, tmp_path):
    output = tmp_path / "out"
    assert prune(NAME, output, calibration) == 0
    assert_same_weights(output, from_directory)
    total = sum(path.stat().st_size for path in shards(source))
    assert len(cached_shards(tmp_path / "cache")) == len(shards(source))
    # Each shard once, and its header before.
    assert hub.sent("safetensors") <= total + 100_000 * len(shards(source))
    assert not hub.asked("GET", "weights.pth")
    record = json.loads((output / "reap" / "run.json").read_text(encoding="utf-8"))
    assert record["source"]["repository"] == NAME
    assert record["source"]["revision"] == hub.commit
    assert record["settings"]["model"] == f"{NAME}@{hub.commit}"
    assert (output / "README.md").read_text(encoding="utf-8").count("# tiny-moe,") == 1
    assert main(["verify", str(output), "--source", NAME]) == 0


def test_a_cache_is_used_and_works_offline(
    hub, source, calibration, from_directory, tmp_path, monkeypatch
):
    assert prune(NAME, tmp_path / "first", calibration) == 0
    hub.forget()
    assert prune(NAME, tmp_path / "second", calibration, "--evict") == 0
    assert hub.sent("safetensors") == 0
    assert len(cached_shards(tmp_path / "cache")) == len(shards(source))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.forget()
    assert prune(NAME, tmp_path / "third", calibration) == 0
    assert not hub.requests
    assert_same_weights(tmp_path / "third", from_directory)
    records = [
        json.loads((tmp_path / name / "reap" / "run.json").read_text(encoding="utf-8"))
        for name in ("first", "second", "third")
    ]
    assert len({record["source"]["fingerprint"] for record in records}) == 1


def test_offline_without_a_cache(hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["inspect", NAME]) == 2
    assert "offline mode is on (HF_HUB_OFFLINE)" in capsys.readouterr().err
    assert not hub.requests


def test_offline_with_shards_missing(hub, monkeypatch, capsys, calibration, tmp_path):
    assert main(["inspect", NAME]) == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert prune(NAME, tmp_path / "out", calibration) != 0
    assert "unset HF_HUB_OFFLINE" in capsys.readouterr().err


def nbytes_of(path):
    """A file's length; nothing if it was deleted meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class Watch:
    """Looks at the bytes of a directory over and over."""

    def __init__(self, directory: Path) -> None:
        self.peak = self.looks = 0
        self._directory = directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, self.now())
            self.looks += 1
            time.sleep(0.0005)

    def now(self) -> int:
        return sum(map(nbytes_of, self._directory.rglob("*.safetensors*")))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *args):
        self._stop.set()
        self._thread.join()


def test_evict_keeps_a_few_shards(
    hub, source, calibration, from_directory, tmp_path, capsys, monkeypatch
):
    assert main(["plan", NAME, "--keep", "4", "--json"]) == 0
    bound = json.loads(capsys.readouterr().out)["download"]["evicted_peak_bytes"]
    hub.forget()
    total = sum(path.stat().st_size for path in shards(source))
    work = tmp_path / ".out.reap-source"
    seen = []
    done = ShardOrder.done

    def look(order, step):
        seen.append(watch.now())
        done(order, step)
        seen.append(watch.now())

    monkeypatch.setattr(ShardOrder, "done", look)
    with Watch(work) as watch:
        assert prune(NAME, tmp_path / "out", calibration, "--evict") == 0
    assert_same_weights(tmp_path / "out", from_directory)
    assert 0 < max(seen) <= bound < total
    assert watch.looks
    assert watch.peak <= bound
    assert not work.exists()
    assert not cached_shards(tmp_path / "cache")
    # Fetched once each: nothing was deleted too early.
    assert hub.sent("safetensors") <= total + 100_000 * len(shards(source))


def test_observe_evicts_and_its_scores_fit(hub, source, calibration, tmp_path, capsys):
    scores = tmp_path / "scores.safetensors"
    options = [*RUN[2:], *specs(calibration)]
    assert main(["observe", NAME, "--output", str(scores), *options, "--evict"]) == 0
    assert not (tmp_path / ".scores.safetensors.reap-source").exists()
    arguments = ["compact", NAME, "--scores", str(scores), "--keep", "4"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--source", str(source)]) == 0


def test_evict_is_for_models_on_the_hub(source, calibration, tmp_path, capsys):
    assert prune(source, tmp_path / "out", calibration, "--evict") == 2
    assert "no other files are ever deleted" in capsys.readouterr().err
    assert shards(source)


def test_peak_counts_what_is_held_and_what_comes_next():
    a, b, c, d = (Path(name) for name in "abcd")
    uses = {a: Uses(0, 4), b: Uses(0, 1), c: Uses(1, 2), d: Uses(3, 3)}
    order = ShardOrder(uses, end=4)
    # Step 0: a, b and, fetched meanwhile, c; step 2: a, c, d.
    assert order.peak_nbytes({a: 1, b: 10, c: 100, d: 1000}) == 1101
    assert order.peak_nbytes({a: 1, b: 1000, c: 100, d: 10}) == 1101
    assert ShardOrder({}, end=0).peak_nbytes({}) == 0


def test_a_full_disk_is_found_first(hub, calibration, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reap_stream.hub.opening.free_nbytes", lambda _: 1000)
    assert prune(NAME, tmp_path / "out", calibration) == 2
    assert "1000 free" in capsys.readouterr().err
    assert not cached_shards(tmp_path / "cache")
    monkeypatch.setattr("reap_stream.shard_order.free_nbytes", lambda _: 100_000)
    assert prune(NAME, tmp_path / "out", calibration, "--evict") == 2
    assert "100000 bytes free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_revision_is_pinned_on_resume(hub, source, calibration, tmp_path, from_directory):
    """A killed run goes on at its commit, though the branch has moved on."""
    process = start_pruning(hub, tmp_path, calibration, "--evict")
    hub.faults.append(Fault("00005-of-00007.safetensors", "slow", times=99, seconds=0.05))
    wait_for(lambda: hub.sent("00005-of-00007.safetensors") > 150_000)
    process.kill()
    process.wait()
    partial = list((tmp_path / ".out.reap-source").rglob("*.partial"))
    assert len(partial) == 1
    done = partial[0].stat().st_size
    assert done > 0
    hub.faults.clear()
    hub.forget()
    old, moved = hub.repositories[NAME], hub.repositories[NAME]
    hub.repositories[NAME] = type(moved)(
        moved.directory, "f" * 40, also={old.commit: old.directory}
    )
    assert prune(NAME, tmp_path / "out", calibration, "--evict", "--resume") == 0
    assert_same_weights(tmp_path / "out", from_directory)
    ranges = [request.range for request in hub.asked("GET", "00005-of-00007.safetensors")]
    assert f"bytes={done}-" in ranges
    record = json.loads((tmp_path / "out" / "reap" / "run.json").read_text(encoding="utf-8"))
    assert record["source"]["revision"] == old.commit
    assert not (tmp_path / ".out.reap-source").exists()


def start_pruning(hub, folder, calibration, *more):
    arguments = ["prune", NAME, "--output", str(folder / "out"), *specs(calibration), *RUN, *more]
    return subprocess.Popen(
        [sys.executable, "-c", RUN_IN_PIECES, *arguments],
        env={**environment(hub.url, folder / "cache"), "PATH": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to that within half a minute")


def test_identity_of_a_hub_model_needs_no_weights(hub, source, tmp_path):
    """The same commit has one fingerprint, another commit's bytes another."""
    from reap_stream.hub.names import HubName
    from reap_stream.hub.opening import Need, opened_hub_model

    with opened_hub_model(HubName(NAME, None), Need.HEADERS) as directory:
        first = open_checkpoint(directory)
    assert str(first.origin) == f"{NAME}@{hub.commit}"
    assert [ref.shape for ref in first.tensors.values()] == [
        ref.shape for ref in open_checkpoint(source).tensors.values()
    ]
    assert first.side_files == open_checkpoint(source).side_files
    assert first.skipped_files == open_checkpoint(source).skipped_files
    assert TOKEN not in str(first)
