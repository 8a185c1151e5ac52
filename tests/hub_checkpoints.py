"""Checkpoints of many shards for tests of the Hub, jobs on them, and a watch on the disk."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from filecmp import cmpfiles
from pathlib import Path

import pytest
from safetensors.torch import save_file

from reap_stream.cli import main
from reap_stream.hub.names import HubName
from reap_stream.hub.opening import Need, opened_hub_model
from tests.builders import load_tensors

RUN = ("--compute-dtype", "float32", "--batch-tokens", "72", "--device", "cpu")
INDEX = "model.safetensors.index.json"
# What is read of a shard for its header, at most.
HEADER_NBYTES = 100_000


def seven_shards(tiny) -> Path:
    """A checkpoint of seven shards, about a layer each, and files that nobody needs."""
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


def reshard(source: Path, directory: Path, shard_of: Callable[[str], str]) -> Path:
    """The same checkpoint, each tensor in the shard that is said; with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name != INDEX and path.suffix != ".safetensors":
            shutil.copy(path, directory)
    groups = defaultdict(dict)
    for name, tensor in load_tensors(source).items():
        groups[shard_of(name)][name] = tensor.contiguous()
    for shard, tensors in groups.items():
        path = directory / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
    mapping = {name: shard for shard, tensors in groups.items() for name in tensors}
    document = {"metadata": {}, "weight_map": mapping}
    (directory / INDEX).write_text(json.dumps(document), encoding="utf-8")
    return directory


def by_layer(name: str) -> str:
    """A shard for each layer, and one for the rest."""
    parts = name.split(".")
    return f"layer-{parts[2]}.safetensors" if parts[1] == "layers" else "rest.safetensors"


def shards(directory: Path) -> list[Path]:
    """Weights of a checkpoint."""
    return sorted(directory.glob("*.safetensors"))


def shard_nbytes(directory: Path) -> int:
    """Bytes of all of them."""
    return sum(path.stat().st_size for path in shards(directory))


def cached_shards(cache: Path) -> list[Path]:
    """Weights in the Hub's cache."""
    return sorted(cache.rglob("snapshots/*/**/*.safetensors"))


def specs(calibration: Iterable[str]) -> list[str]:
    """Options that name calibration data."""
    return [part for spec in calibration for part in ("--calibration", spec)]


def prune(model: object, output: Path, calibration: Iterable[str], *more: str) -> int:
    """Prunes a model to four experts; the exit code."""
    line = ["prune", str(model), "--output", str(output), *specs(calibration), *RUN, "--keep", "4"]
    return main([*line, *more])


def assert_same_weights(output: Path, expected: Path) -> None:
    """Holds a checkpoint against one that is right, byte by byte."""
    names = [path.name for path in shards(expected)]
    assert names == [path.name for path in shards(output)]
    assert cmpfiles(output, expected, [*names, "config.json"], shallow=False)[1:] == ([], [])


def opened(name: str, work: Path | None = None, need: Need = Need.HEADERS):
    """A model of the Hub behind a directory."""
    return opened_hub_model(HubName(name, None), need, work=work)


class Watch:
    """Looks at the bytes of shards below directories, over and over.

    Attributes:
        peak: the most that were seen.
        looks: how often.
    """

    def __init__(self, *directories: Path) -> None:
        self.peak = self.looks = 0
        self._directories = directories
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.is_set():
            self.look()
            time.sleep(0.0005)

    def look(self) -> None:
        """Looks now."""
        self.peak = max(self.peak, sum(map(_nbytes_below, self._directories)))
        self.looks += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *args):
        self._stop.set()
        self._thread.join()


def _nbytes_below(directory: Path) -> int:
    """Bytes of shards and halves of them; those that are deleted meanwhile may be left out."""
    nbytes = 0
    with suppress(FileNotFoundError):
        for path in directory.rglob("*.safetensors*"):
            with suppress(FileNotFoundError):
                nbytes += path.stat().st_size
    return nbytes


def wait_for(condition: Callable[[], object]) -> None:
    """Waits until something is so."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to that within half a minute")
