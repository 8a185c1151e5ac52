"""JOBS.toml: read, its defaults filled in, and lists of models and methods multiplied out."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from reap_stream.batch.keys import PASS, WRITING, Values, base_name, read_value
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
_TARGET: Final = re.compile(r"keep-([0-9]{1,9})")
_UNFIT: Final = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Job:
    """One pruning and what follows it.

    Attributes:
        name: names its log; unlike that of any other job.
        model: directory, relative to `base`, or id on the Hub.
        output: absolute path of the pruned checkpoint, or of one for each target.
        options: options of prune without dashes, and their values.
        base: directory that relative paths start from.
        overwrite: replace an output that is there.
        verify: compare the result with the source.
        upload: repository to upload to; may hold ``{keep}``; None: nothing is uploaded.
        public: everyone may see it there.
    """

    name: str
    model: str
    output: Path
    options: Mapping[str, Values]
    base: Path
    overwrite: bool = False
    verify: bool = False
    upload: str | None = None
    public: bool = False

    @property
    def has_targets(self) -> bool:
        """Whether there are several, each in a directory of its own."""
        return any("," in value for key in _TARGETS for value in self.options.get(key, ()))

    def option(self, key: str, default: str = "") -> str:
        """The value of an option that is given once at most."""
        return next(iter(self.options.get(key, ())), default)

    def directories(self) -> list[Path]:
        """The checkpoints that were written."""
        if not self.has_targets:
            return [self.output]
        found = {_TARGET.fullmatch(path.name): path for path in self.output.glob("keep-*")}
        return [path for _, path in sorted((int(m[1]), path) for m, path in found.items() if m)]


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
        yield _job(path, found, where)


def _job(path: Path, found: Mapping[str, Values], where: str) -> Job:
    for key in ("model", "output", "calibration"):
        if not found.get(key):
            raise UsageError(f"{where}: {key} is missing")
    if not any(found.get(key) for key in _TARGETS):
        raise UsageError(f"{where}: sparsity or keep is missing")
    model = found["model"][0]
    if model.startswith("-"):
        raise UsageError(f"{where}: model {shown(model)} looks like an option")
    places = {"model": base_name(model), "method": next(iter(found.get("method", ())), "reap")}
    base = path.absolute().parent
    output = _filled(found["output"][0], places, where)
    name = _filled(found["name"][0], places, where) if "name" in found else output
    upload = found.get("upload")
    job = Job(
        _UNFIT.sub("-", name).strip("-.") or "job",
        model,
        base / output,
        {key: values for key, values in found.items() if key in {**PASS, **WRITING} and values},
        base,
        overwrite=bool(found.get("overwrite")),
        verify=bool(found.get("verify")),
        upload=None if upload is None else _filled(upload[0], {**places, "keep": "{keep}"}, where),
        public=bool(found.get("public")),
    )
    if job.upload is not None and job.has_targets and "{keep}" not in job.upload:
        raise UsageError(f"{where}: upload {job.upload!r} of several targets: put {{keep}} into it")
    return job


def _filled(text: str, places: Mapping[str, str], where: str) -> str:
    """The text with its ``{...}`` filled in."""

    def fill(match: re.Match[str]) -> str:
        if match[1] not in places:
            known = ", ".join(f"{{{place}}}" for place in places)
            raise UsageError(f"{where}: {text!r}: no {match[0]} here, there are {known}")
        return places[match[1]]

    return _PLACE.sub(fill, text)
