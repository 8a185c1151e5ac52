"""The job `upload`: checks, transfer, and a look at what arrived."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, constants

from reap_stream.card.usage import CHECKSUMS_FILE
from reap_stream.errors import OutputError
from reap_stream.hub.errors import TRANSPORT_ERROR
from reap_stream.hub.retrying import persist
from reap_stream.progress import byte_bar
from reap_stream.upload.checks import added_note, card_notes, check_directory
from reap_stream.upload.checksums import (
    check_hashes,
    hash_files,
    read_checksums,
    write_checksums,
)
from reap_stream.upload.errors import explained
from reap_stream.upload.files import LocalFile
from reap_stream.upload.readback import read_back
from reap_stream.upload.rights import (
    Target,
    check_name,
    check_replaced,
    check_repository,
    check_rights,
)

LIBRARY: Final = "reap-stream"
_MESSAGE: Final = "Pruned checkpoint, by reap-stream"


@dataclass(frozen=True, slots=True)
class UploadReport:
    """What was sent, or would be.

    Attributes:
        files: the files.
        url: page of the repository.
        commit: at which it holds them; None: nothing was sent.
        notes: what to know beside that.
    """

    files: tuple[LocalFile, ...]
    url: str
    commit: str | None
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def table(self) -> str:
        """Every file and its length."""
        width = len(f"{self.nbytes:,}")
        lines = [f"{file.nbytes:>{width},}  {file.name}" for file in self.files]
        return "\n".join([*lines, f"{self.nbytes:>{width},}  bytes in {len(self.files)} files"])


def survey(directory: Path, target: Target) -> UploadReport:
    """What an upload would send; checks the directory's headers and records, asks nobody.

    Raises:
        UsageError: the repository's name is none.
        CheckpointError: the directory is no whole pruned checkpoint with a card.
    """
    check_name(target.repository)
    files = check_directory(directory)
    added = added_note(directory, files)
    notes = [*card_notes(directory), *([added] if added else [])]
    return UploadReport(tuple(files), _url(target), None, tuple(notes))


def upload(
    directory: Path, target: Target, message: str | None = None, api: HfApi | None = None
) -> UploadReport:
    """Puts a pruned checkpoint on the Hub. Begun again, it sends what is not there yet.

    Args:
        directory: the checkpoint.
        target: the repository, made if it is not there.
        message: of the commit.
        api: the Hub; None: as huggingface_hub is set up.

    Raises:
        UsageError: the token, the name or the repository does not allow it; nothing was sent.
        CheckpointError: the directory is no whole pruned checkpoint with a card.
        VerificationError: its files are not those of which hashes are on record.
        OutputError: the transfer failed, or what arrived is something else.
    """
    api = HfApi(library_name=LIBRARY) if api is None else api
    surveyed = survey(directory, target)
    names = {*(file.name for file in surveyed.files), CHECKSUMS_FILE}
    check_rights(api, target)
    standing = check_repository(api, target, names)
    hashes = _checked_hashes(directory, surveyed.files)
    check_replaced(target, standing, hashes)
    files = check_directory(directory)
    hashes |= hash_files([file for file in files if file.name == CHECKSUMS_FILE])
    _make(api, target, standing.start)
    _send(api, directory, target, files, message or _MESSAGE)
    found = read_back(api, target, files, hashes)
    notes = [*surveyed.notes, *([standing.note] if standing.note else [])]
    if found.others:
        notes.append(f"also in the repository, from before: {', '.join(found.others[:10])}")
    return UploadReport(tuple(files), surveyed.url, found.commit, tuple(notes))


def _checked_hashes(directory: Path, files: Sequence[LocalFile]) -> dict[str, str]:
    """Hashes of all files but their record's own, held against it and put on record."""
    recorded = read_checksums(directory)
    listed = [file for file in files if file.name != CHECKSUMS_FILE]
    with byte_bar(sum(file.nbytes for file in listed)) as bar:
        hashes = hash_files(listed, bar.update)
    check_hashes(directory, recorded, hashes)
    write_checksums(directory, hashes)
    return hashes


def _make(api: HfApi, target: Target, start: str | None) -> None:
    """Makes the repository and the branch, where they are not there."""
    name, branch = target.repository, target.revision
    with explained(name, "making the repository", OutputError):
        persist(lambda: api.create_repo(name, private=not target.public, exist_ok=True))
        if branch is not None and not branch.startswith("refs/"):
            persist(lambda: api.create_branch(name, branch=branch, revision=start, exist_ok=True))


def _send(
    api: HfApi, directory: Path, target: Target, files: Sequence[LocalFile], message: str
) -> None:
    # Resumes by itself: files that are there are not sent again, nor are parts of large ones.
    with explained(target.repository, "sending", OutputError):
        persist(
            lambda: _plainly(
                lambda: api.upload_folder(
                    repo_id=target.repository,
                    folder_path=directory,
                    revision=target.revision,
                    commit_message=message,
                    allow_patterns=[glob.escape(file.name) for file in files],
                )
            )
        )


def _plainly(send: Callable[[], object]) -> None:
    """Raises what broke a transfer: huggingface_hub hides it in an error that says which file."""
    try:
        send()
    except RuntimeError as error:
        if isinstance(error.__cause__, (TRANSPORT_ERROR, OSError)):
            raise error.__cause__ from error
        raise


def _url(target: Target) -> str:
    url = f"{constants.ENDPOINT}/{target.repository}"
    return url if target.revision is None else f"{url}/tree/{target.revision}"
