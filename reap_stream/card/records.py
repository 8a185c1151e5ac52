"""The records of a pruned checkpoint as others may read them: without paths of the machine."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from reap_stream.card.inputs import EVALUATION_FILE, as_json, read_evaluation, read_run
from reap_stream.card.privacy import Shortener, of_run
from reap_stream.pruning import RUN_FILE, SCORES_FILE
from reap_stream.scoring.saliency import Scores
from reap_stream.scoring.scores_file import load_scores, save_scores


def records_without_paths(directory: Path) -> dict[str, bytes]:
    """Records of a checkpoint that name paths of a machine, as they are without.

    Checkpoints of this version have none.

    Returns:
        Contents by relative path; empty where there is nothing to change.

    Raises:
        CheckpointError: a record is missing or damaged.
        CalibrationError: the scores are.
    """
    run, public = read_run(directory / RUN_FILE)
    found = {RUN_FILE: as_json(public)} if public != run else {}
    evaluation = directory / EVALUATION_FILE
    if evaluation.exists():
        given, public = read_evaluation(evaluation)
        found |= {EVALUATION_FILE: as_json(public)} if public != given else {}
    path = directory / SCORES_FILE
    if path.exists():
        scores = load_scores(path)
        renamed = relabelled(scores, of_run(run))
        found |= {SCORES_FILE: _rendered(renamed)} if renamed is not scores else {}
    return found


def relabelled(scores: Scores, shorten: Shortener) -> Scores:
    """Scores whose sources are called as in a record without paths; the same ones if they are."""
    sources = tuple(map(shorten, scores.sources))
    metadata = {key: shorten(text) for key, text in scores.metadata.items()}
    if sources == scores.sources and metadata == scores.metadata:
        return scores
    return replace(scores, sources=sources, metadata=metadata)


def _rendered(scores: Scores) -> bytes:
    with tempfile.TemporaryDirectory(prefix="reap-stream-") as folder:
        path = Path(folder) / "scores.safetensors"
        save_scores(path, scores)
        return path.read_bytes()
