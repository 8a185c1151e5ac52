"""Writes the planned shards: headers and room first, then each layer into its own byte ranges.

The room is taken before the first byte, so a full disk is found in the first second. A layer's
ranges are fixed, so layers may come in any order and a layer interrupted half-way is simply
written again. Bytes that are in memory go out from there; all others go from the source's file to
ours without passing through Python.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from reap_stream import _native
from reap_stream.checkpoint.disk import free_nbytes, output_errors, sync_directory
from reap_stream.checkpoint.layout import layer_tensors, origin_tensors
from reap_stream.checkpoint.pieces import kept_faults, pieces
from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.recipes import check_filled, group_by_recipe
from reap_stream.checkpoint.transfers import Batch, view_of
from reap_stream.errors import NoRoomError, OutputError, ResumeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from typing_extensions import Buffer

    from reap_stream.checkpoint.layout import OutputPlan, OutputTensor
    from reap_stream.checkpoint.reader import ReadRequest
    from reap_stream.checkpoint.recipes import Bytes, Recipe, Step
    from reap_stream.checkpoint.refs import Role, TensorRef

    Resident = Callable[[TensorRef], Buffer | None]


class Written(NamedTuple):
    """How much a call wrote.

    Attributes:
        nbytes: bytes put into the shards.
        copied_nbytes: bytes that had to be read from the source's files for that.
    """

    nbytes: int
    copied_nbytes: int


def check_free_space(directory: Path, nbytes: int) -> None:
    """Check that a disk has room, before anything is written to it.

    Args:
        directory: where the files will lie; it need not exist yet.
        nbytes: bytes of all of them; with several targets, their sum.

    Raises:
        OutputError: there is less room than that.
    """
    free = free_nbytes(directory)
    if free < nbytes:
        raise NoRoomError(
            f"{directory}: the disk has {free} bytes free, the pruned checkpoint needs {nbytes}; "
            "make room or choose another --output"
        )


class OutputWriter:
    """The shards of one pruned checkpoint while they are being written."""

    def __init__(
        self,
        directory: Path,
        plan: OutputPlan,
        source: Mapping[str, TensorRef],
        roles: Mapping[str, Role],
        own: frozenset[str] | None = None,
    ) -> None:
        """Bind a plan to a directory; nothing is touched yet.

        Args:
            directory: where the shards will lie.
            plan: what they hold.
            source: the source's tensors by name.
            roles: as given to `plan_layout`.
            own: output tensors that this process writes, the others being written by others; None:
                all. See `division`.
        """
        self.directory = directory
        self.plan = plan
        self._source = source
        self._roles = roles
        self._own = own
        self._groups = layer_tensors(plan)
        self._origins = origin_tensors(plan)
        self._paths = [directory / shard.filename for shard in plan.shards]
        self._lock = threading.Lock()
        self._touched: set[int] = set()
        self._loss: str | None = None
        self._reader = Reader()

    def allocate(self) -> None:
        """Take the room of every shard and write its header; what was there before is gone.

        Raises:
            OutputError: there is not enough room, or a shard cannot be created.
        """
        with output_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self._paths:
                path.unlink(missing_ok=True)
        check_free_space(self.directory, self.plan.nbytes)
        for path, shard in zip(self._paths, self.plan.shards, strict=True):
            with output_errors(path, shard.nbytes):
                path.write_bytes(shard.header)
                _native.preallocate(str(path), shard.nbytes)
        self._touch(range(len(self._paths)))
        with output_errors(self.directory):
            sync_directory(self.directory)

    def reopen(self) -> None:
        """Take up shards allocated earlier, with whatever layers they already hold.

        Raises:
            ResumeError: a shard is missing, or its length or header is not what the plan says.
        """
        for path, shard in zip(self._paths, self.plan.shards, strict=True):
            if not path.is_file():
                raise ResumeError(f"{path}: missing; start anew with --overwrite")
            nbytes = path.stat().st_size
            if nbytes != shard.nbytes:
                raise ResumeError(
                    f"{path}: {nbytes} bytes, the plan says {shard.nbytes}; "
                    "start anew with --overwrite"
                )
            with path.open("rb") as file:
                header = file.read(len(shard.header))
            if header != shard.header:
                raise ResumeError(
                    f"{path}: its header is not the planned one; start anew with --overwrite"
                )

    def from_origin(self, name: str) -> list[OutputTensor]:
        """The output tensors that lie in the place of a source tensor; none if it was dropped."""
        return self._origins.get(name, [])

    def write_layer(
        self,
        layer: int | None,
        kept: Mapping[int, Sequence[int]],
        resident: Callable[[TensorRef], Buffer | None],
    ) -> Written:
        """Write all tensors whose bytes the kept experts of one layer decide.

        Args:
            layer: the layer; None for all tensors copied whole.
            kept: source numbers of the kept experts by layer, rising; new number = position.
            resident: gives the bytes of a source tensor (`nbytes` of it, contiguous) if they are in
                memory, None if they are to be copied from its file.

        Raises:
            OutputError: the kept experts do not fit the plan, or writing failed.
            ReadError: a shard of the source could not be read.
        """
        return self.write(self._groups.get(layer, []), kept, resident)

    def write(
        self,
        outs: Sequence[OutputTensor],
        kept: Mapping[int, Sequence[int]],
        resident: Callable[[TensorRef], Buffer | None],
    ) -> Written:
        """Write some tensors of the plan, others' left out; else as `write_layer`."""
        layers = {out.layer for out in outs if out.layer is not None}
        faults = kept_faults(kept, sorted(layers), self.plan)
        if faults:
            raise OutputError(f"{self.directory}: {faults[0]}")
        written = copied = 0
        batch = Batch(self.directory)
        outs = [out for out in outs if self._own is None or out.name in self._own]
        for out in outs:
            if out.recipe is not None:
                continue
            for piece in pieces(out, self._source, self._roles, kept):
                buffer = resident(piece.ref)
                batch.add(piece, buffer, self._paths[out.shard], out.offset + piece.dst_offset)
                written += piece.nbytes
                copied += piece.nbytes if buffer is None else 0
        for recipe, results in group_by_recipe(outs):
            copied += self._compute(recipe, results, kept, resident, batch)
            written += sum(out.nbytes for out in results.values())
        batch.flush()
        self._touch(out.shard for out in outs)
        return Written(written, copied)

    def _compute(
        self,
        recipe: Recipe,
        results: Mapping[str, OutputTensor],
        kept: Mapping[int, Sequence[int]],
        resident: Resident,
        batch: Batch,
    ) -> int:
        """Run a recipe; gives the bytes that had to be read for it."""
        layer = next(iter(results.values())).layer
        filled = dict.fromkeys(results, 0)
        copied = 0
        for step in recipe.steps(() if layer is None else kept[layer]):
            raws, nbytes = self._fetch(step, resident)
            copied += nbytes
            for name, offset, data in step.compute(raws):
                out = results[name]
                filled[name] += data.nbytes
                batch.add_bytes(data, self._paths[out.shard], out.offset + offset)
        check_filled(results, filled)
        return copied

    def _fetch(self, step: Step, resident: Resident) -> tuple[list[Bytes], int]:
        """The bytes of a step's spans, and how many of them had to be read."""
        raws: list[Bytes] = []
        requests: list[ReadRequest] = []
        for ref, offset, nbytes in step.spans:
            buffer = resident(ref)
            if buffer is not None:
                view = view_of(buffer, ref)[offset : offset + nbytes]
                raws.append(np.frombuffer(view, dtype=np.uint8))
                continue
            raws.append(np.empty(nbytes, dtype=np.uint8))
            requests.append((ref, offset, nbytes, raws[-1]))
        self._reader.read_into(requests)
        return raws, sum(nbytes for _, _, nbytes, _ in requests)

    def sync(self) -> None:
        """Bring everything written before this call onto the disk.

        May run in another thread than `write`: what is written meanwhile is left to the next call.

        Raises:
            OutputError: the system reports that bytes were lost on the way. So does every later
                call: the system reports a loss once, and what was lost is not known.
        """
        with self._lock:
            touched, self._touched = self._touched, set()
        if self._loss is not None:
            raise OutputError(self._loss)
        try:
            for shard in sorted(touched):
                with output_errors(self._paths[shard]):
                    _native.sync_file(str(self._paths[shard]))
        except OutputError as error:
            self._loss = str(error)
            raise

    def _touch(self, shards: Iterable[int]) -> None:
        with self._lock:
            self._touched.update(shards)
