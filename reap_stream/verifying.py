"""Verification of a directory against a source that must first be understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reap_stream.auditing import audit
from reap_stream.checkpoint.configedit import mtp_layer_count
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.source import CONFIG_NAME, Checkpoint, open_checkpoint
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.download import check_download
from reap_stream.errors import CheckpointError, UsageError, VerificationError
from reap_stream.kept_record import KEPT_FILE
from reap_stream.model.opened import OpenedModel, open_model
from reap_stream.progress import byte_bar
from reap_stream.pruning import RUN_FILE, source_facts
from reap_stream.recoding.recode import recode
from reap_stream.settings import WEIGHT_CHOICES
from reap_stream.shard_order import copy_order
from reap_stream.verification import VerificationReport, verify


def verify_directory(
    directory: Path, source: Path, *, trust_remote_code: bool = False
) -> VerificationReport:
    """Checks every byte of a pruned checkpoint against its source.

    Whether next-token-prediction layers were dropped is seen from the checkpoint: it holds all of
    their tensors or none. Where the source has none either, config.json tells. They were left as
    they are where the kept experts speak of the decoder alone.

    Weights are compared in the format in which `reap/run.json` says that they were written.

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
    mtp = _mtp_kind(model, written, directory / KEPT_FILE)
    model = _recoded(model, directory, mtp)
    facts = source_facts(model, mtp)
    order = copy_order(model, mtp)
    check_download(model, order.shards, directory)
    with byte_bar(model.checkpoint.nbytes) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify(directory, source, facts, advance, order)
    faults = audit(directory, model)
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        message = f"{directory}: holds the source's bytes, but no engine could use it{lines}"
        raise VerificationError(message)
    return replace(report, mtp_layers=len(model.mtp_kept_layers()) if mtp == "match" else 0)


def _recoded(model: OpenedModel, directory: Path, mtp: str) -> OpenedModel:
    """The source with its weights as the run's record says they were written.

    What the record says is proved by the comparison: nothing but the weights of that format,
    computed from the source anew, passes it.
    """
    path = directory / RUN_FILE
    try:
        settings = parse_object(read_small(path, MAX_JSON_NBYTES), path).get("settings")
    except CheckpointError:
        settings = None
    said = settings if isinstance(settings, dict) else {}
    weights = said.get("weights", "keep")
    if weights not in WEIGHT_CHOICES:
        message = f"{path}: settings.weights is {shown(weights)}, not of {list(WEIGHT_CHOICES)}"
        raise VerificationError(message)
    return recode(model, weights, experts_only=said.get("fp8_experts_only") is True, mtp=mtp)


def _mtp_kind(model: OpenedModel, written: Checkpoint, kept: Path) -> str:
    """What seems to have been done to prediction layers; the verification holds it to that."""
    if _is_dropped(model, written.tensors, written.config):
        return "drop"
    try:
        entries = parse_object(read_small(kept, MAX_JSON_NBYTES), kept).get("kept")
    except CheckpointError:
        entries = None
    layers = model.mtp_kept_layers()
    pruned = not isinstance(entries, dict) or any(str(layer) in entries for layer in layers)
    return "match" if pruned else "keep"


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
