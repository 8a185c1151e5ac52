"""What is checked of the steps that follow a job's writing, before the first job starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token

from reap_stream.batch.steps import with_keep
from reap_stream.calibration.hub import open_hub_set
from reap_stream.calibration.records import require_pyarrow
from reap_stream.calibration.spec import FILE_SUFFIXES, parse_spec
from reap_stream.errors import CalibrationError, UsageError
from reap_stream.hub.names import parse_hub_name
from reap_stream.reporting.command import check_output, require_matplotlib
from reap_stream.upload.rights import Target, check_name, check_rights
from reap_stream.upload.sending import LIBRARY


class StepChecks:
    """Checks of many jobs' texts and steps; the Hub is asked once for each data set and namespace."""

    def __init__(self) -> None:
        self._namespaces: set[str] = set()
        self._data_sets: set[str] = set()

    def check_spec(self, text: str, key: str) -> None:
        """Refuses a SPEC whose rows are not there or cannot be read.

        Args:
            text: the SPEC.
            key: what it is given as, for messages.

        Raises:
            UsageError: it is no SPEC, or a file of another kind.
            CalibrationError: there is no such file or data set, or nothing that reads it.
        """
        spec = parse_spec(text)
        if spec.kind == "hub" and text not in self._data_sets:
            open_hub_set(spec)
            self._data_sets.add(text)
        if spec.kind != "file":
            return
        if not spec.path.is_file():
            raise CalibrationError(f"{key} SPEC {text!r}: there is no file {spec.path}")
        if spec.path.suffix not in FILE_SUFFIXES:
            raise UsageError(f"{key} SPEC {text!r}: no {', '.join(FILE_SUFFIXES)} file")
        if spec.path.suffix == ".parquet":
            require_pyarrow(spec.path)

    def check(self, question: Mapping[str, Any], keeps: Sequence[int]) -> list[str]:
        """Refuses steps that would be refused later.

        Args:
            question: as `reap_stream.batch.asking` puts it.
            keeps: kept experts of the job's targets.

        Returns:
            What to know of them.

        Raises:
            UsageError: no matplotlib for a report, a page that is something else, a name that is no
                repository's, or a token that may not write there.
        """
        if question["report"]:
            require_matplotlib()
            for keep in keeps:
                page = Path(with_keep(question["report"], keep))
                _check_page(page, own=question["own_report"], overwrite=question["overwrite"])
        if question["upload"]:
            for keep in keeps:
                self._check_repository(with_keep(question["upload"], keep))
        name = question["base_model"]
        if name and parse_hub_name(name) is None:
            raise UsageError(f"base-model {name!r}: no id on the Hub such as org/name[@revision]")
        return list(_notes(question))

    def _check_repository(self, repository: str) -> None:
        check_name(repository)
        namespace = repository.partition("/")[0]
        if namespace not in self._namespaces:
            if get_token() is None:
                raise UsageError(
                    f"upload to {repository}: there is no token: log in with one that may write: hf"
                    " auth login"
                )
            check_rights(HfApi(library_name=LIBRARY), Target(repository))
            self._namespaces.add(namespace)


def _check_page(page: Path, *, own: bool, overwrite: bool) -> None:
    """Refuses a page that is none, or is there; its folder is made when the time comes."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"report {page}: a page is written; give a name that ends in .html")
    if page.parent.is_dir():
        check_output(page, overwrite=own or overwrite)


def _notes(question: Mapping[str, Any]) -> Iterator[str]:
    """Text that is calibrated on is not held out."""
    used = {parse_spec(text).name for text in question["calibration"]}
    for text in question["text"]:
        if parse_spec(text).name in used:
            yield (
                f"eval on {text!r}, which it is calibrated on too: unless the rows are others, the"
                " figures flatter"
            )
