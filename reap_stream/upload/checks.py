"""Checks of a directory before anything is asked of the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCard

from reap_stream.card.facts import CARD_NAME, MAX_CARD_NBYTES
from reap_stream.card.inputs import read_inputs
from reap_stream.card.privacy import is_path
from reap_stream.card.records import records_without_paths
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.index import INDEX_NAME
from reap_stream.checkpoint.publish import RECORDS
from reap_stream.checkpoint.source import CONFIG_NAME, Checkpoint, open_checkpoint
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError
from reap_stream.kept_record import KEPT_FILE
from reap_stream.upload.files import LocalFile, local_files

MAX_FILE_NBYTES: Final = 50 * 10**9
"""Longest file that the Hub takes by every way of transfer."""

_SHOWN: Final = 5
_HINT: Final = "`reap-stream card` renders it anew"
_WANTED: Final = (
    ("base_model", "`reap-stream card {directory} --base-model ORG/NAME[@REVISION]` names it"),
    ("license", "the source's card named none; ask whoever made the source before you publish"),
)
# Where transformers writes the directory that a model was loaded from.
_NAMING: Final = ((CONFIG_NAME, "_name_or_path"), ("tokenizer_config.json", "name_or_path"))
_TEXTS: Final = ("license", "license_name", "license_link", "library_name", "pipeline_tag")


def check_directory(directory: Path) -> list[LocalFile]:
    """Refuse what is no whole pruned checkpoint with a card; nothing but headers and JSON is read.

    Returns:
        The files to send.

    Raises:
        CheckpointError: a shard, the index, a record or the card is missing, damaged or too long, or
            a record names paths of a machine.
    """
    _refuse_several(directory)
    checkpoint = open_checkpoint(directory)
    _check_index(checkpoint)
    _check_kept(directory, read_inputs(directory).keep)
    _check_private(directory)
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
    """What to know before others see it."""
    data = vars(_card(directory / CARD_NAME).data)
    notes = [f"README.md has no {key}: {hint}" for key, hint in _WANTED if not data.get(key)]
    return [*(note.format(directory=directory) for note in notes), *_source_paths(directory)]


def added_note(directory: Path, files: Sequence[LocalFile]) -> str | None:
    """What is to say of files that somebody put beside the checkpoint's own: they are sent as well."""
    came_along = read_inputs(directory).facts.get("side_files")
    if came_along is None:
        return None
    own = {*came_along, CONFIG_NAME, INDEX_NAME, CARD_NAME}
    added = [
        file.name
        for file in files
        if file.name not in own
        and not file.name.startswith(f"{RECORDS}/")
        # Weights that are not the checkpoint's own are refused.
        and not file.name.endswith(".safetensors")
    ]
    if not added:
        return None
    more = f" and {len(added) - _SHOWN} more" if len(added) > _SHOWN else ""
    return (
        f"put beside the checkpoint by somebody, and sent with it: {', '.join(added[:_SHOWN])}{more};"
        " move away what others should not read"
    )


def _source_paths(directory: Path) -> Iterator[str]:
    """Paths that the source's own files hold, of whoever made it."""
    for name, key in _NAMING:
        path = directory / name
        if not path.exists():
            continue
        said = parse_object(read_small(path, MAX_JSON_NBYTES), path, finite=False).get(key)
        if isinstance(said, str) and is_path(said):
            yield f"{name} says {key}: {said}, as the source's does: for all to read"


def _check_private(directory: Path) -> None:
    named = sorted(records_without_paths(directory))
    if named:
        raise CheckpointError(
            f"{directory}: {', '.join(named)} name paths of the machine that pruned it, for all to"
            f" read: another version wrote them; `reap-stream card {directory}` takes them out"
        )


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
