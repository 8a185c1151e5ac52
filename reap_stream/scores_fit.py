"""Whether scores were taken on the model that they are used with."""

from __future__ import annotations

import threading
from pathlib import Path

from reap_stream.checkpoint.content import content_fingerprint
from reap_stream.checkpoint.providers import model_name
from reap_stream.errors import UsageError
from reap_stream.model.opened import OpenedModel
from reap_stream.progress import byte_bar
from reap_stream.scoring.saliency import Scores
from reap_stream.stored_scores import TAKEN_ON

_OTHER_WEIGHTS = (
    " (if these are the same model in another format, compact takes them with "
    "--scores-of-other-weights)"
)


def check_scores(
    model: OpenedModel, scores: Scores, path: Path, *, other_weights: bool = False
) -> bool:
    """Refuse scores that are not those of a model.

    Scores that were taken on a model of the Hub fit a directory with the same files. To find that
    out the directory is read whole.

    Args:
        model: what they are used with.
        scores: the scores.
        path: their file, for messages.
        other_weights: the user says that they are of the same model in other weights, another
            format perhaps; then they only need the same layers of as many experts.

    Returns:
        Whether they were taken on these weights.

    Raises:
        UsageError: they are of another model, or lack a layer.
        ReadError: a shard of the model cannot be read.
    """
    architecture = model.architecture
    missing = [layer for layer in architecture.moe_layers if layer not in scores.layers]
    unlike = missing or scores.num_experts != architecture.num_experts
    is_same = scores.model_fingerprint == model.checkpoint.fingerprint
    if unlike and (is_same or other_weights):
        message = (
            f"{path}: scores of {len(scores.layers)} layers of {scores.num_experts} experts, the "
            f"model has {len(architecture.moe_layers)} MoE layers of {architecture.num_experts}"
        )
        raise UsageError(message)
    if is_same or (not unlike and _same_files(model, scores)):
        return True
    if other_weights:
        return False
    message = (
        f"{path}: these scores were taken on another model (fingerprint "
        f"{scores.model_fingerprint[:12]}…, {model_name(model.checkpoint.directory)} has "
        f"{model.checkpoint.fingerprint[:12]}…){_other_identity(model, scores)}"
    )
    raise UsageError(message if unlike else f"{message}{_OTHER_WEIGHTS}")


def _same_files(model: OpenedModel, scores: Scores) -> bool:
    """Whether a directory holds, file by file, the model on the Hub that scores were taken on."""
    if model.checkpoint.origin is not None or TAKEN_ON not in scores.metadata:
        return False
    lock = threading.Lock()
    with byte_bar(sum(path.stat().st_size for path in model.checkpoint.shards)) as bar:

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        return content_fingerprint(model.checkpoint, advance) == scores.model_fingerprint


def _other_identity(model: OpenedModel, scores: Scores) -> str:
    """What to do where both are one model after all, told apart by where it was read."""
    taken_on = scores.metadata.get(TAKEN_ON)
    if model.checkpoint.origin is None:
        return f"; they were taken on {taken_on}, whose files are others" if taken_on else ""
    if taken_on is not None:
        return f"; they were taken on {taken_on}: give that"
    return (
        "; scores that were taken on a directory need that directory here, or one with the same "
        "files (hf download), and not the Hub's id"
    )
