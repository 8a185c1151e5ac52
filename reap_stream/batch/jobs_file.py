"""JOBS.toml: read, its defaults filled in, and lists of models and methods multiplied out."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from reap_stream.batch.job import Job
from reap_stream.batch.keys import (
    EVALUATING,
    PASS,
    UPLOADING,
    WRITING,
    Values,
    base_name,
    read_value,
)
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import CheckpointError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_NBYTES: Final = 10_000_000
_MULTIPLIED: Final = ("model", "method")
_TARGETS: Final = ("sparsity", "keep")
_PLACE: Final = re.compile(r"\{([^{}]*)\}")
_UNFIT: Final = re.compile(r"[^A-Za-z0-9._-]+")


def read_jobs(path: Path) -> list[Job]:
    """All jobs of a file, in its order.

    Raises:
        UsageError: the file cannot be read, is no such file, or two jobs share a name.
    """
    try:
        document = tomllib.loads(read_small(path, _MAX_NBYTES).decode("utf-8"))
    except (CheckpointError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        message = str(error) if isinstance(error, CheckpointError) else f"{path}: {error}"
        raise UsageError(message) from error
    unknown = document.keys() - {"defaults", "job"}
    if unknown:
        message = f"{path}: no table {shown(min(unknown))}: there are [defaults] and [[job]]"
        raise UsageError(message)
    defaults, tables = document.get("defaults", {}), document.get("job", [])
    if not isinstance(defaults, dict) or not _is_tables(tables):
        raise UsageError(f"{path}: [defaults] once and [[job]] for each job are expected")
    jobs = [
        job for number, table in enumerate(tables) for job in _jobs(path, defaults, table, number)
    ]
    if not jobs:
        raise UsageError(f"{path}: there is no [[job]]")
    names = [job.name for job in jobs]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UsageError(f"{path}: two jobs are called {repeated[0]!r}: give each its own name")
    return jobs


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _jobs(
    path: Path, defaults: Mapping[str, Any], table: Mapping[str, Any], number: int
) -> Iterator[Job]:
    where = f"{path}: job {shown(table.get('name', number + 1))}"
    # A target of a job takes the place of whichever target the defaults have.
    own = set(_TARGETS) if table.keys() & set(_TARGETS) else set()
    merged = {**{key: value for key, value in defaults.items() if key not in own}, **table}
    lists = [
        merged[key] if isinstance(merged.get(key), list) else [merged.get(key)]
        for key in _MULTIPLIED
    ]
    for chosen in product(*lists):
        given = dict(zip(_MULTIPLIED, chosen, strict=True))
        values = {key: value for key, value in {**merged, **given}.items() if value is not None}
        found = {key: read_value(key, value, where) for key, value in values.items()}
        yield _job(path, found, _evaluation(values, found, where), where)


def _evaluation(
    values: Mapping[str, Any], found: Mapping[str, Values], where: str
) -> dict[str, Values]:
    """The options of `eval`: those of its table, and for the rest those of the job."""
    if not found.get("eval"):
        return {}
    table = values["eval"] if isinstance(values["eval"], dict) else {"text": values["eval"]}
    own = {
        key: read_value(key, value, f"{where}: eval", EVALUATING) for key, value in table.items()
    }
    return {key: own[key] if key in own else found.get(key, ()) for key in EVALUATING}


def _job(
    path: Path, found: Mapping[str, Values], evaluation: Mapping[str, Values], where: str
) -> Job:
    _check_present(found, where)
    base, model = path.absolute().parent, found["model"][0]
    method = next(iter(found.get("method", ())), "reap")
    places = {"model": base_name(model), "method": method}
    later = {**places, "keep": "{keep}"}

    def text(key: str, known: Mapping[str, str]) -> str | None:
        return _filled(found[key][0], known, where) if found.get(key) else None

    output = text("output", places) or ""
    name = _UNFIT.sub("-", text("name", places) or output).strip("-.") or "job"
    job = Job(
        name,
        # Commands run in `base`; what is a path there must not be looked for elsewhere.
        str(base / model) if os.path.lexists(base / model) else model,
        base / output,
        {key: values for key, values in found.items() if key in {**PASS, **WRITING} and values},
        base,
        overwrite=bool(found.get("overwrite")),
        verify=bool(found.get("verify")),
        evaluation=evaluation,
        base_model=text("base-model", places),
        upload=text("upload", later),
        upload_options={key: found[key] for key in UPLOADING if found.get(key)},
    )
    page = _default_page(job) if found.get("report") == ("",) else text("report", later)
    wants_card = bool(evaluation) or job.base_model is not None
    job = replace(
        job,
        report=None if page is None else base / page,
        card=bool(found["card"]) if "card" in found else wants_card,
    )
    _check_steps(job, where)
    return job


def _default_page(job: Job) -> str:
    return f"{job.output}-keep-{{keep}}.html" if job.has_targets else f"{job.output}.html"


def _check_present(found: Mapping[str, Values], where: str) -> None:
    for key in ("model", "output", "calibration"):
        if not found.get(key):
            raise UsageError(f"{where}: {key} is missing")
    if not any(found.get(key) for key in _TARGETS):
        raise UsageError(f"{where}: sparsity or keep is missing")
    model = found["model"][0]
    if model.startswith("-"):
        raise UsageError(f"{where}: model {shown(model)} looks like an option")


def _check_steps(job: Job, where: str) -> None:
    """Refuses steps that could not be done after the writing."""
    for key, value in (("upload", job.upload), ("report", job.report)):
        if value is not None and job.has_targets and "{keep}" not in str(value):
            text = f"{where}: {key} {str(value)!r} of several targets: put {{keep}} into it"
            raise UsageError(text)
    if job.upload is None and (job.upload_options or {}).get("revision"):
        raise UsageError(
            f"{where}: revision is the branch to upload to, and there is no upload; of a model on"
            ' the Hub it is said so: model = "org/name@revision"'
        )
    if job.options.get("evict") and job.option("protect", "none") != "none":
        raise UsageError(
            f"{where}: protect chooses experts when all layers are scored, and evict has deleted"
            " them by then: leave out one of them"
        )


def _filled(text: str, places: Mapping[str, str], where: str) -> str:
    """The text with its ``{...}`` filled in."""

    def fill(match: re.Match[str]) -> str:
        if match[1] not in places:
            known = ", ".join(f"{{{place}}}" for place in places)
            raise UsageError(f"{where}: {text!r}: no {match[0]} here, there are {known}")
        return places[match[1]]

    return _PLACE.sub(fill, text)
