"""Verification of a directory against a source that must first be understood."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.errors import CheckpointError, VerificationError
from reap_stream.model.opened import open_model
from reap_stream.progress import is_shown
from reap_stream.pruning import source_facts
from reap_stream.verification import VerificationReport, verify


def verify_directory(
    directory: Path, source: Path, *, trust_remote_code: bool = False
) -> VerificationReport:
    """Checks every byte of a pruned checkpoint against its source.

    Whether next-token-prediction layers were dropped is seen from the checkpoint: it holds all of
    their tensors or none.

    Raises:
        VerificationError: the checkpoint is not what its source and its kept experts say.
        ReapStreamError: the source cannot be read or understood.
    """
    model = open_model(source, trust_remote_code=trust_remote_code)
    try:
        written = open_checkpoint(directory)
    except CheckpointError as error:
        message = f"the pruned checkpoint is damaged: {error}"
        raise VerificationError(message) from error
    mtp = set(model.tensor_map.mtp_layers)
    first = {name for name in model.tensor_map.mtp_tensors if ".experts." not in name}
    dropped = bool(mtp) and not (first & written.tensors.keys())
    facts = source_facts(model, "drop" if dropped else "match")
    with tqdm(
        total=model.checkpoint.nbytes, unit="B", unit_scale=True, disable=not is_shown()
    ) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return verify(directory, source, facts, advance)
