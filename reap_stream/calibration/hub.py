"""Data sets on the Hugging Face Hub, streamed with the `datasets` library at one commit.

A data set is never downloaded whole: its records come over the network as they are read, and
reading ends once there are enough to draw from. The branch that a SPEC means is resolved to a
commit first, everything is read from that commit, and the run record names it.

No code of a data set is run: `datasets` has none of that since version 4.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from reap_stream.calibration.hub_errors import choose, close_matches, explained
from reap_stream.calibration.records import without_nulls
from reap_stream.calibration.spec import CalibrationSpec
from reap_stream.errors import CalibrationError, UsageError

# Files are opened in a seeded order, several at a time where the library can, and their records
# taken in turns. It need not be large: what is drawn is drawn from many times as many records.
_SHUFFLE_BUFFER: Final = 100


@dataclass(frozen=True, slots=True)
class HubSet:
    """A split of a data set at one commit; make it with `open_hub_set`.

    Attributes:
        name: its id.
        config: the configuration.
        split: the split.
        revision: the commit, 40 hexadecimal digits.
        reader: name and version of the library that reads it.
        stream: the split as `datasets.IterableDataset`.
    """

    name: str
    config: str
    split: str
    revision: str
    reader: str
    stream: Any

    def records(self, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield records with their places, files in an order that the seed decides.

        Args:
            seed: of the order. Which records come first also depends on the version of `datasets`.

        Raises:
            CalibrationError: the data set cannot be read, or not any further.
        """
        number = 0
        records = iter(self.stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
        while True:
            with explained(self.name, f"reading record {number + 1}"):
                record = next(records, None)
            if record is None:
                return
            number += 1
            # The library fills in every field that any record has, as Parquet does.
            yield f"{self.name}, record {number}", without_nulls(record, keep=set(record))


def open_hub_set(spec: CalibrationSpec) -> HubSet:
    """Find a data set, its configuration and its split; no record is read yet.

    Raises:
        UsageError: the SPEC leaves open which configuration or split it means.
        CalibrationError: there is none of that name, access to it must be asked for, or the Hub
            cannot be reached.
    """
    _require_datasets(spec)
    if Path(spec.name).is_dir():
        raise UsageError(f"SPEC {spec.text!r}: {spec.name} is a directory here: give its files")
    name, revision = _resolve(spec)
    return open_splits(spec, name, revision)


def open_splits(spec: CalibrationSpec, name: str, revision: str) -> HubSet:
    """Choose configuration and split of what `datasets` knows as `name`.

    Args:
        spec: says which, or leaves it open where there is only one.
        name: id on the Hub.
        revision: its commit.

    Raises:
        UsageError: the SPEC leaves open which it means.
        CalibrationError: there is none of that name, or the data set cannot be read.
    """
    import datasets

    with explained(name, "listing its configurations"):
        configs = datasets.get_dataset_config_names(name, revision=revision)
    config = choose(spec, "configuration", spec.config, configs)
    with explained(name, "listing its splits"):
        splits = datasets.load_dataset(name, config, revision=revision, streaming=True)
    split = choose(spec, "split", spec.split, list(splits))
    reader = f"datasets {datasets.__version__}"
    return HubSet(name, config, split, revision, reader, splits[split])


def _resolve(spec: CalibrationSpec) -> tuple[str, str]:
    """Return the id, which may have been renamed, and the commit of a data set."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = HfApi()
    with explained(spec.name, "looking it up (there is no file of that name)"):
        try:
            info = api.dataset_info(spec.name, revision=spec.revision)
            if info.gated:
                api.auth_check(info.id, repo_type="dataset")
        except GatedRepoError:
            raise
        except RepositoryNotFoundError as error:
            raise CalibrationError(
                f"SPEC {spec.text!r}: there is no such file, and the Hub has no data"
                f" set {spec.name}.{close_matches(api, spec.name)} For a private one: hf auth login"
            ) from error
        if info.sha is None:
            raise CalibrationError(f"data set {spec.name}: the Hub names no commit of it")
    return info.id, info.sha


def _require_datasets(spec: CalibrationSpec) -> None:
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            f"SPEC {spec.text!r}: there is no such file, and data sets of the Hub need"
            ' the library datasets: pip install "reap-stream[data]"'
        ) from error
