"""What all tests share: quiet libraries, no network, and tiny checkpoints made once a session."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Read when the libraries are imported, which only some tests do.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Models are tiny: on a busy machine more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines that run tests are busy: a slow example is not a failure. The same examples every time, so
# that a change is judged by what it changed; --hypothesis-profile=explore looks for new ones.
settings.register_profile("reap", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("reap")

TinyFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyFactory:
    """Makes a family's tiny checkpoint; the same call gives the same directory.

    Arguments: the family's id; `dtype`: as stored; `max_shard_size`; further config values.
    """
    from transformers.utils import logging

    from tests.builders import save, tiny_model
    from tests.families import BY_ID

    logging.disable_progress_bar()
    made: dict[str, Path] = {}

    def make(
        family_id: str, *, dtype: Any = None, max_shard_size: str = "", **changes: Any
    ) -> Path:
        key = repr((family_id, dtype, max_shard_size, sorted(changes.items())))
        if key not in made:
            model = tiny_model(BY_ID[family_id], **changes)
            model = model if dtype is None else model.to(dtype)
            options = {"max_shard_size": max_shard_size} if max_shard_size else {}
            made[key] = save(model, tmp_path_factory.mktemp(family_id), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def calibration(tmp_path_factory) -> tuple[str, ...]:
    """SPECs of three files whose rows differ in length."""
    from tests.builders import make_rows, write_rows

    return write_rows(tmp_path_factory.mktemp("calibration"), make_rows())


@pytest.fixture(scope="session")
def halved(tmp_path_factory) -> tuple[str, ...]:
    """SPECs of two files of several rows, so that each has halves."""
    import numpy as np

    from tests.builders import write_rows

    arrays = [np.random.default_rng(n).integers(3, 96, (7, 21)) for n in range(2)]
    return write_rows(tmp_path_factory.mktemp("halved"), arrays)


@pytest.fixture(scope="session")
def rows() -> list[Any]:
    """The rows of `calibration`, in the order of its files."""
    from tests.builders import make_rows

    return [row for array in make_rows() for row in array]


@pytest.fixture
def reader():
    """Reads byte ranges of files."""
    from reap_stream.checkpoint.reader import Reader

    with Reader() as made:
        yield made


@pytest.fixture(scope="session")
def reference(rows) -> Callable[..., Any]:
    """The oracle of a checkpoint on `rows`, made once."""
    from torch import float32

    from tests.oracle import Reference

    made: dict[tuple[Path, Any], Reference] = {}

    def make(directory: Path, dtype: Any = float32) -> Reference:
        if (directory, dtype) not in made:
            made[directory, dtype] = Reference(directory, rows, dtype)
        return made[directory, dtype]

    return make


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Callable[..., Path]:
    """Makes a family's checkpoint, wide enough to be quantised; the same call, the same directory.

    Arguments: the family's id; `dtype`: bfloat16 unless told otherwise.
    """
    from torch import bfloat16

    from tests.builders import save
    from tests.recoding import wide_model

    made: dict[tuple[str, Any], Path] = {}

    def make(family_id: str, dtype: Any = bfloat16) -> Path:
        key = (family_id, dtype)
        if key not in made:
            made[key] = save(wide_model(family_id, dtype), tmp_path_factory.mktemp(family_id))
        return made[key]

    return make


@pytest.fixture(scope="session")
def pruned_to(wide, calibration, tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """Prunes what `wide` makes into a format of weights, once; the source and the output."""
    from torch import bfloat16

    from tests.engine import prune_to
    from tests.recoding import KEEP

    made: dict[tuple[str, str, Any], Path] = {}

    def make(family_id: str, mode: str, dtype: Any = bfloat16) -> tuple[Path, Path]:
        source, key = wide(family_id, dtype), (family_id, mode, dtype)
        if key not in made:
            output = tmp_path_factory.mktemp("pruned") / mode
            made[key] = prune_to(output, source, calibration, KEEP, weights=mode)
        return source, made[key]

    return make


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Interrupts raise, also where a shell that runs this in its background has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def hub(monkeypatch, tmp_path, request, source):
    """A server that has `source` as the module's `NAME`, and an empty cache."""
    from tests.hub_server import serving
    from tests.model_hub_client import point_at

    with serving() as server:
        server.commit = server.add(request.module.NAME, source)
        point_at(monkeypatch, server.url, tmp_path / "cache")
        yield server


@pytest.fixture(scope="module")
def from_directory(source, calibration, tmp_path_factory):
    """What pruning the directory `source` itself gives."""
    from tests.hub_checkpoints import prune

    output = tmp_path_factory.mktemp("expected") / "out"
    assert prune(source, output, calibration) == 0
    return output


@pytest.fixture
def sent_for(monkeypatch):
    """The shards that are sent for, from then on."""
    from reap_stream.hub.provider import HubProvider

    names = []
    send = HubProvider._send_for

    def note(provider, file, **options):
        names.append(file.name)
        send(provider, file, **options)

    monkeypatch.setattr(HubProvider, "_send_for", note)
    return names
