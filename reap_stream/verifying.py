"""Verification of a directory against a source that must first be understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reap_stream.auditing import audit
from reap_stream.checkpoint.configedit import mtp_layer_count
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.source import CONFIG_NAME, open_checkpoint
from reap_stream.errors import CheckpointError, UsageError, VerificationError
from reap_stream.model.opened import OpenedModel, open_model
from reap_stream.progress import byte_bar
from reap_stream.pruning import source_facts
from reap_stream.verification import VerificationReport, verify


def verify_directory(
    directory: Path, source: Path, *, trust_remote_code: bool = False
) -> VerificationReport:
    """Checks every byte of a pruned checkpoint against its source.

    Whether next-token-prediction layers were dropped is seen from the checkpoint: it holds all of
    their tensors or none. Where the source has none either, config.json tells.

    Raises:
        UsageError: `directory` holds not a checkpoint but one for each of several targets.
        VerificationError: the checkpoint is not what its source and its kept experts say.
        ReapStreamError: the source cannot be read or understood.
    """
    _refuse_several(directory)
    model = open_model(source, trust_remote_code=trust_remote_code)
    try:
        written = open_checkpoint(directory)
    except CheckpointError as error:
        message = f"the pruned checkpoint is damaged: {error}"
        raise VerificationError(message) from error
    dropped = _is_dropped(model, written.tensors, written.config)
    facts = source_facts(model, "drop" if dropped else "match")
    with byte_bar(model.checkpoint.nbytes) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify(directory, source, facts, advance)
    faults = audit(directory, model)
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        message = f"{directory}: holds the source's bytes, but no engine could use it{lines}"
        raise VerificationError(message)
    return replace(report, mtp_layers=0 if dropped else len(model.mtp_kept_layers()))


def _is_dropped(
    model: OpenedModel, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> bool:
    """Whether the pruned checkpoint of these tensors and config was left without MTP layers."""
    names = model.tensor_map.mtp_tensors
    if names:
        return not any(".experts." not in name and name in tensors for name in names)
    return mtp_layer_count(config) == 0 < mtp_layer_count(model.checkpoint.config)


def _refuse_several(directory: Path) -> None:
    if (directory / CONFIG_NAME).exists():
        return
    found = [path for path in directory.glob("keep-*") if (path / CONFIG_NAME).is_file()]
    if found:
        found.sort(key=lambda path: (len(path.name), path.name))
        message = (
            f"{directory}: holds {len(found)} pruned checkpoints "
            f"({', '.join(path.name for path in found)}), not one; verify each, e.g. {found[0]}"
        )
        raise UsageError(message)
