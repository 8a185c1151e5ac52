"""Checks of a directory before anything is asked of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCard

from reap_stream.card.facts import CARD_NAME, MAX_CARD_NBYTES
from reap_stream.card.inputs import CardInputs, read_inputs
from reap_stream.card.privacy import Shortener
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.index import INDEX_NAME
from reap_stream.checkpoint.source import CONFIG_NAME, Checkpoint, open_checkpoint
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError
from reap_stream.kept_record import KEPT_FILE
from reap_stream.upload.files import LocalFile, local_files

MAX_FILE_NBYTES: Final = 50 * 10**9
"""Longest file that the Hub takes by every way of transfer."""

_HINT: Final = "`reap-stream card` renders it anew"
_TEXTS: Final = ("license", "license_name", "license_link", "library_name", "pipeline_tag")


def check_directory(directory: Path) -> list[LocalFile]:
    """Refuse what is no whole pruned checkpoint with a card; nothing but headers and JSON is read.

    Returns:
        The files to send.

    Raises:
        CheckpointError: a shard, the index, a record or the card is missing, damaged or too long.
    """
    _refuse_several(directory)
    checkpoint = open_checkpoint(directory)
    _check_index(checkpoint)
    inputs = read_inputs(directory)
    _check_kept(directory, inputs.keep)
    check_card(directory)
    files = local_files(checkpoint)
    for file in files:
        if file.nbytes > MAX_FILE_NBYTES:
            raise CheckpointError(
                f"{file.path}: {file.nbytes} bytes, the Hub takes {MAX_FILE_NBYTES} a file: write it"
                " anew with --max-shard-size 5GB"
            )
    return files


def card_notes(directory: Path) -> list[str]:
    """What to know of the card before it is public."""
    data = vars(_card(directory / CARD_NAME).data)
    missing = [key for key in ("license", "base_model") if not data.get(key)]
    if not missing:
        return []
    named = " and no ".join(missing)
    return [
        f"README.md has no {named} in its front matter: the source's card, or `card`, gives them"
    ]


def machine_paths(directory: Path) -> list[str]:
    """Paths of this machine that the records speak of, which will be read by others."""
    inputs: CardInputs = read_inputs(directory)
    return Shortener(inputs.run, inputs.evaluation).paths


def check_card(directory: Path) -> None:
    """Refuse a README.md that the Hub would refuse or show a warning about.

    Raises:
        CheckpointError: it is missing, or its front matter is.
    """
    path = directory / CARD_NAME
    data: dict[str, Any] = vars(_card(path).data)
    for key in _TEXTS:
        value = data.get(key)
        if value is not None and not isinstance(value, str) and key != "license":
            raise CheckpointError(
                f"{path}: front matter: {key} is {shown(value)}, not text; {_HINT}"
            )
    if not data.get("tags"):
        raise CheckpointError(f"{path}: front matter has no tags; {_HINT}")


def _card(path: Path) -> ModelCard:
    text = read_small(path, 2 * MAX_CARD_NBYTES).decode("utf-8", errors="replace")
    if not text.startswith("---"):
        raise CheckpointError(f"{path}: has no front matter; {_HINT}")
    try:
        return ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{path}: front matter cannot be read: {said}; {_HINT}") from error


def _check_index(checkpoint: Checkpoint) -> None:
    # That index and shards name the same tensors was checked when it was opened.
    path = checkpoint.directory / INDEX_NAME
    if not path.exists():
        raise CheckpointError(f"{path}: missing; every pruned checkpoint has one")
    said = checkpoint.index_metadata.get("total_size")
    if said != checkpoint.nbytes:
        raise CheckpointError(
            f"{path}: total_size is {shown(said)}, the tensors have {checkpoint.nbytes} bytes"
        )


def _check_kept(directory: Path, keep: int) -> None:
    path = directory / KEPT_FILE
    kept = parse_object(read_small(path, MAX_JSON_NBYTES), path).get("kept")
    layers = kept if isinstance(kept, dict) else {}
    if not layers or any(not isinstance(e, list) or len(e) != keep for e in layers.values()):
        raise CheckpointError(f"{path}: does not list {keep} kept experts for every layer")


def _refuse_several(directory: Path) -> None:
    if (directory / CONFIG_NAME).exists():
        return
    found = sorted(path for path in directory.glob("keep-*") if (path / CONFIG_NAME).is_file())
    if found:
        raise CheckpointError(
            f"{directory}: holds {len(found)} pruned checkpoints, not one; each has a repository of"
            f" its own, e.g. {found[0]}"
        )
