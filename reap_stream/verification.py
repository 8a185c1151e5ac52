"""Holds a pruned checkpoint against its source: every tensor, every byte, every file beside them.

Engines load damaged checkpoints without a word (a missing FP8 scale stays 1, a missing expert is
whatever the memory held), so the only proof of a pruned checkpoint is its source. Nothing the
writer knew is trusted here: the kept experts are read back from the output, and all else follows
from the source and them.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from reap_stream.checkpoint.compare import Comparison
from reap_stream.checkpoint.configedit import edit_config
from reap_stream.checkpoint.files import open_regular
from reap_stream.checkpoint.format_change import KEPT, FormatChange
from reap_stream.checkpoint.index import INDEX_NAME
from reap_stream.checkpoint.layout import plan_layout
from reap_stream.checkpoint.pieces import kept_faults
from reap_stream.checkpoint.publish import RECORDS, carried_files, side_file_chunks
from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.source import CONFIG_NAME, Checkpoint, open_checkpoint
from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import CheckpointError, VerificationError
from reap_stream.kept_record import KEPT_FILE, read_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from reap_stream.checkpoint.layout import OutputPlan, OutputTensor
    from reap_stream.checkpoint.refs import Role
    from reap_stream.checkpoint.shard_uses import CopyOrder

_MAX_FAULTS: Final = 20
# Written anew for every pruned checkpoint.
_MODEL_CARD: Final = "README.md"


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What is known of the source beside its files.

    Attributes:
        roles: what pruning does to each of its tensors.
        num_experts: experts in every layer.
        count_paths: the keys of config.json that hold that number.
        dropped: tensors that pruning left out.
        mtp_dropped: next-token-prediction layers were left out, so config.json speaks of none;
            the source may have had no tensor of them.
        change: how weights are written where not as the source has them.
    """

    roles: Mapping[str, Role]
    num_experts: int
    count_paths: tuple[tuple[str, ...], ...]
    dropped: frozenset[str] = frozenset()
    mtp_dropped: bool = False
    change: FormatChange = KEPT

    @property
    def layers(self) -> set[int]:
        """Layers whose experts were pruned."""
        return {
            role.layer
            for name, role in self.roles.items()
            if role.layer is not None and name not in self.dropped
        }


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """What was compared and found equal.

    Attributes:
        tensors: number of tensors.
        nbytes: bytes of all of them.
        keep: experts in every layer.
        layers: number of layers with experts.
        side_files: number of files copied along.
        mtp_layers: how many of the layers are next-token-prediction layers, where that is known.
        computed: how many of the tensors were computed from the source and not copied.
    """

    tensors: int
    nbytes: int
    keep: int
    layers: int
    side_files: int
    mtp_layers: int = 0
    computed: int = 0


def verify(
    directory: Path,
    source_directory: Path,
    facts: SourceFacts,
    progress: Callable[[int, int], None] | None = None,
    order: CopyOrder | None = None,
) -> VerificationReport:
    """Check that a pruned checkpoint is what its source and its kept experts say.

    Args:
        directory: the pruned checkpoint.
        source_directory: what it was pruned from.
        facts: what is known of the source.
        progress: called with (bytes compared so far, bytes in all).
        order: when each tensor is compared; None: as they lie in the files.

    Raises:
        VerificationError: it is not; the message lists up to 20 faults.
        CheckpointError: the source is damaged.
        UnsupportedError: the source cannot be pruned at all.
        ReadError: a file could not be read while it was compared.
    """
    source = facts.change.seen_on(open_checkpoint(source_directory))
    kept = read_kept(directory, facts.num_experts, facts.layers)
    keep = len(next(iter(kept.values())))
    plan = plan_layout(source.tensors, facts.roles, facts.num_experts, keep, dropped=facts.dropped)
    faults = kept_faults(kept, sorted(facts.layers), plan)
    if faults:
        raise VerificationError(f"{directory / KEPT_FILE}: {faults[0]}")
    try:
        written = open_checkpoint(directory)
    except CheckpointError as error:
        raise VerificationError(f"the pruned checkpoint is damaged: {error}") from error
    check = _Check(written, source, plan, facts, order)
    faults = []
    for fault in check.faults(kept, progress or _no_progress):
        faults.append(fault)
        if len(faults) == _MAX_FAULTS:
            break
    if faults:
        raise VerificationError(_summary(directory, faults))
    side_files = len(carried_files(source, {_MODEL_CARD}))
    computed = sum(out.recipe is not None for out in plan.tensors.values())
    return VerificationReport(
        len(plan.tensors), plan.total_size, keep, len(kept), side_files, computed=computed
    )


class _Check:
    """One verification under way."""

    def __init__(
        self,
        written: Checkpoint,
        source: Checkpoint,
        plan: OutputPlan,
        facts: SourceFacts,
        order: CopyOrder | None,
    ) -> None:
        self._written = written
        self._source = source
        self._plan = plan
        self._facts = facts
        self._order = order

    def faults(
        self, kept: Mapping[int, list[int]], progress: Callable[[int, int], None]
    ) -> Iterator[str]:
        """Every fault there is, the cheap ones to find first."""
        yield from self._index_faults()
        yield from self._config_faults(kept)
        yield from self._side_file_faults(kept)
        comparable: list[OutputTensor] = []
        yield from self._tensor_faults(comparable)
        yield from self._byte_faults(comparable, kept, progress)

    def _index_faults(self) -> Iterator[str]:
        # That index and shards name the same tensors was checked when the output was opened.
        path = self._written.directory / INDEX_NAME
        if not path.exists():
            yield f"{path}: missing"
            return
        total = self._written.index_metadata.get("total_size")
        if total != self._plan.total_size:
            yield (
                f"{path}: total_size is {shown(total)}, "
                f"the tensors have {self._plan.total_size} bytes"
            )

    def _config_faults(self, kept: Mapping[int, list[int]]) -> Iterator[str]:
        facts, found = self._facts, self._written.config
        expected = edit_config(
            self._source.config,
            facts.count_paths,
            (facts.num_experts, self._plan.keep),
            kept,
            names=self._source.tensors,
            mtp_dropped=facts.mtp_dropped or bool(facts.dropped),
        )
        for key in sorted(expected.keys() | found.keys()):
            right, wrong = _canonical(expected, key), _canonical(found, key)
            if right != wrong:
                path = self._written.directory / CONFIG_NAME
                yield f"{path}: {key}: {shown(wrong)} found, {shown(right)} expected"

    def _side_file_faults(self, kept: Mapping[int, list[int]]) -> Iterator[str]:
        for name in carried_files(self._source, {_MODEL_CARD}):
            path = self._written.directory / name
            try:
                fault = _content_fault(path, side_file_chunks(self._source, name, kept))
            except CheckpointError as error:
                fault = str(error)
            if fault is not None:
                yield fault

    def _tensor_faults(self, comparable: list[OutputTensor]) -> Iterator[str]:
        """Names, dtypes and shapes; `comparable` receives the tensors in which these are right."""
        found, expected = self._written.tensors, self._plan.tensors
        for name in found.keys() - expected.keys():
            yield f"{found[name].file}: tensor {shown(name)} does not belong to the checkpoint"
        for name in self._written.skipped_files:
            if name.endswith(".safetensors") and not name.startswith(f"{RECORDS}/"):
                yield f"{self._written.directory / name}: does not belong to the checkpoint"
        for name, out in expected.items():
            ref = found.get(name)
            if ref is None:
                yield f"{self._written.directory}: tensor {shown(name)} is missing"
            elif (ref.dtype, ref.shape) != (out.dtype, out.shape):
                yield (
                    f"{ref.file}: tensor {shown(name)} is {ref.dtype} {list(ref.shape)}, "
                    f"{out.dtype} {list(out.shape)} expected"
                )
            else:
                comparable.append(out)

    def _byte_faults(
        self,
        outs: Iterable[OutputTensor],
        kept: Mapping[int, list[int]],
        progress: Callable[[int, int], None],
    ) -> Iterator[str]:
        total, done = self._plan.total_size, 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        comparison = Comparison(
            self._written.tensors, self._source.tensors, self._facts.roles, kept
        )
        with Reader() as reader:
            for group in self._in_order(outs):
                for difference in comparison.differences(group, reader, advance):
                    yield str(difference)

    def _in_order(self, outs: Iterable[OutputTensor]) -> Iterator[list[OutputTensor]]:
        """The tensors in groups; shards of the source are let go behind the last that needs them."""
        if self._order is None:
            yield list(outs)
            return
        groups: dict[int, list[OutputTensor]] = defaultdict(list)
        for out in outs:
            groups[self._order.steps[out.origin]].append(out)
        shards = self._order.shards
        shards.begin(0)
        for step in range(shards.end + 1):
            yield groups[step]
            shards.done(step)


def _content_fault(path: Path, chunks: Iterable[bytes]) -> str | None:
    """Where a file stops being what the chunks say; None where it is all that."""
    position = 0
    with open_regular(path) as (descriptor, nbytes):
        for chunk in chunks:
            found = os.pread(descriptor, len(chunk), position)
            if found != chunk:
                pairs = enumerate(zip(found, chunk, strict=False))
                first = next((i for i, (a, b) in pairs if a != b), min(len(found), len(chunk)))
                return f"{path}: byte {position + first} is not the source's"
            position += len(chunk)
    if position != nbytes:
        return f"{path}: {nbytes} bytes, {position} expected"
    return None


def _canonical(config: Mapping[str, Any], key: str) -> str:
    """One text for each value, so that 1, 1.0 and true are three."""
    return json.dumps(config[key], sort_keys=True) if key in config else "nothing"


def _summary(directory: Path, faults: list[str]) -> str:
    count = f"the first {_MAX_FAULTS}" if len(faults) == _MAX_FAULTS else str(len(faults))
    lines = "".join(f"\n  {fault}" for fault in faults)
    return (
        f"{directory}: is not what its source says, faults: {count}; prune or fetch it again{lines}"
    )


def _no_progress(_done: int, _total: int) -> None:
    pass
