"""A job: one pruning, and what follows it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from reap_stream.batch.keys import Values

_TARGETS: Final = ("sparsity", "keep")


@dataclass(frozen=True, slots=True)
class Job:
    """One pruning and what follows it.

    Attributes:
        name: names its log; unlike that of any other job.
        model: directory, or id on the Hub.
        output: absolute path of the pruned checkpoint, or of one for each target.
        options: options of prune without dashes, and their values.
        base: directory that relative paths start from.
        overwrite: replace an output that is there.
        verify: compare the result with the source.
        evaluation: options of `eval`, by name without dashes; empty: it is not evaluated.
        report: absolute path of the report's page; may hold ``{keep}``; None: there is none.
        card: render README.md anew, with the evaluation.
        base_model: id on the Hub of the model, for the card; None: as it is known.
        upload: repository to upload to; may hold ``{keep}``; None: nothing is uploaded.
        upload_options: options of `upload`, by name without dashes.
        commit: id and commit of a model on the Hub, once it is known; empty: not known, or a
            directory.
        keeps: kept experts of each target, once they are known.
    """

    name: str
    model: str
    output: Path
    options: Mapping[str, Values]
    base: Path
    overwrite: bool = False
    verify: bool = False
    evaluation: Mapping[str, Values] | None = None
    report: Path | None = None
    card: bool = False
    base_model: str | None = None
    upload: str | None = None
    upload_options: Mapping[str, Values] | None = None
    commit: str = ""
    keeps: tuple[int, ...] = ()

    @property
    def number(self) -> str:
        """What tells it from others in the batch's own files: its name may change, its output not."""
        return hashlib.sha256(str(self.output).encode()).hexdigest()[:10]

    @property
    def source(self) -> str:
        """MODEL of its commands: the commit of a model on the Hub, where it is known."""
        return self.commit or self.model

    @property
    def has_targets(self) -> bool:
        """Whether there are several, each in a directory of its own."""
        return any("," in value for key in _TARGETS for value in self.options.get(key, ()))

    def option(self, key: str, default: str = "") -> str:
        """The value of an option that is given once at most."""
        return next(iter(self.options.get(key, ())), default)

    def directory(self, keep: int) -> Path:
        """The checkpoint of a target."""
        return self.output / f"keep-{keep}" if self.has_targets else self.output

    @property
    def remaining(self) -> Job:
        """The job without targets that are gone: what was uploaded may be deleted to make room."""
        there = tuple(keep for keep in self.keeps if self.directory(keep).exists())
        return replace(self, keeps=there)

    @property
    def directories(self) -> list[Path]:
        """The checkpoints, where `keeps` is known."""
        return [self.directory(keep) for keep in self.keeps]


def as_options(values: Mapping[str, Values] | None, keys: tuple[str, ...] = ()) -> list[str]:
    """Options as the command line has them.

    Args:
        values: by name without dashes.
        keys: those that are wanted, in their order; none: all.
    """
    found = values or {}
    return [
        f"--{key}={value}" if value else f"--{key}"
        for key in keys or found
        for value in found.get(key, ())
    ]
