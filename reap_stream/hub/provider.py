"""Which shards are here, on their way, or not needed any more.

Shards come by two threads. What the pass waits for goes before what it will want next. The threads
die with the process, so that an interrupt need not wait for gigabytes; what they leave half-done
is taken up or thrown away by the next run.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from reap_stream.checkpoint.header import read_header_bytes
from reap_stream.checkpoint.providers import Origin, ShardStart
from reap_stream.errors import CheckpointError, ReadError
from reap_stream.hub.errors import explained
from reap_stream.hub.starts import fetch_starts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from reap_stream.hub.listing import Listing, RemoteFile
    from reap_stream.hub.transfer import Place

_THREADS: Final = 2
_PATIENCE_SECONDS: Final = 5.0


class HubProvider:
    """Brings the shards of a model on the Hub; see `ShardProvider`.

    Args:
        listing: the repository.
        directory: the checkpoint as the rest of the package sees it.
        place: where shards go.
    """

    def __init__(self, listing: Listing, directory: Path, place: Place) -> None:
        self._listing = listing
        self._directory = directory
        self._place = place
        self._starts: dict[str, ShardStart] = {}
        self._condition = threading.Condition()
        self._queue: deque[str] = deque()
        self._coming: dict[str, Future[Path]] = {}
        self._unwanted: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def directory(self) -> Path:
        """The snapshot in the Hub's cache."""
        return self._directory

    @property
    def origin(self) -> Origin:
        """Repository and commit."""
        return self._listing.origin

    @property
    def names(self) -> Sequence[str]:
        """The repository's files."""
        return list(self._listing.files)

    @property
    def evicts(self) -> bool:
        """Whether shards go to a work directory."""
        return self._place.evicts

    @property
    def place(self) -> Path:
        """The work directory, or the cache's snapshot."""
        return self._place.directory

    def read_starts(self, names: Sequence[str]) -> list[ShardStart]:
        """Headers: of shards that are here from the disk, of the others by range requests.

        Raises:
            CheckpointError: the repository lacks a shard, or a header cannot be had.
        """
        # A command may open a checkpoint more than once.
        files = [self._file(name) for name in names if name not in self._starts]
        here = {file.name: path for file in files if (path := self._present(file)) is not None}
        away = [file for file in files if file.name not in here]
        found = fetch_starts(self.origin, self._directory, away)
        self._starts.update(zip((file.name for file in away), found, strict=True))
        for file in files:
            if file.name in here:
                raw, nbytes = read_header_bytes(here[file.name])
                self._starts[file.name] = ShardStart(raw, nbytes, file.identity)
        return [self._starts[name] for name in names]

    def remote_nbytes(self, name: str) -> int:
        """Bytes of a shard that are still to come; 0 of one that is here."""
        return self._place.missing_nbytes(self._file(name))

    def ensure(self, names: Sequence[str]) -> list[Path]:
        """Waits for shards; those that nothing asked for yet are fetched now.

        Raises:
            ReadError: one cannot be had; the message names repository and file.
        """
        files = {name: self._file(name) for name in names}
        for name in reversed(names):
            self._send_for(files[name], urgent=True)
        return [self._wait(files[name]) for name in names]

    def prefetch(self, names: Iterable[str]) -> None:
        """Sends for shards, behind those that are waited for."""
        for name in names:
            self._send_for(self._file(name), urgent=False)

    def release(self, names: Iterable[str]) -> None:
        """Lets go of shards: in a work directory they are deleted, once they are there."""
        for name in names:
            with self._condition:
                coming = self._coming.get(name)
                if coming is not None and not coming.done() and name not in self._queue:
                    self._unwanted.add(name)
                else:
                    self._let_go(name)

    def _let_go(self, name: str) -> None:
        self._coming.pop(name, None)
        if name in self._queue:
            self._queue.remove(name)
        self._place.drop(self._file(name))

    def stop(self) -> None:
        """Sends for nothing more; who waits for a shard is told so.

        Waits for nothing, and may be called from a signal handler.
        """
        with self._condition:
            self._closed = True
            self._queue.clear()
            self._condition.notify_all()
            coming = list(self._coming.values())
        self._place.stop()
        for future in coming:
            _fail(future, _broken_off())

    def close(self) -> None:
        """`stop`, and breaks off what is on its way where that can be done."""
        self.stop()
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)

    def _file(self, name: str) -> RemoteFile:
        file = self._listing.files.get(name)
        if file is None and self._listing.offline:
            self._refuse_offline(name)
        if file is None:
            raise CheckpointError(
                f"{self.origin}: has no file {name}, which its index names: the repository is not"
                " whole"
            )
        return file

    def _present(self, file: RemoteFile) -> Path | None:
        return self._place.present(file)

    def _send_for(self, file: RemoteFile, *, urgent: bool) -> None:
        with self._condition:
            self._unwanted.discard(file.name)
            coming = self._coming.get(file.name)
            if coming is not None and not (coming.done() and coming.exception() is not None):
                if urgent and file.name in self._queue:
                    self._queue.remove(file.name)
                    self._queue.appendleft(file.name)
                return
            if self._closed:
                raise _broken_off()
            # What can fail comes first: a shard that is said to come is waited for.
            place = self._present(file)
            made: Future[Path] = Future()
            if place is not None:
                made.set_result(place)
            else:
                self._start_threads()
                (self._queue.appendleft if urgent else self._queue.append)(file.name)
                self._condition.notify()
            self._coming[file.name] = made

    def _wait(self, file: RemoteFile) -> Path:
        with explained(self.origin.repository, f"fetching {file.name}", ReadError):
            return self._coming[file.name].result()

    def _start_threads(self) -> None:
        while len(self._threads) < _THREADS:
            name = f"reap-hub-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                name = self._queue.popleft()
                coming = self._coming[name]
            try:
                place = self._place.fetch(self._listing.files[name])
            except BaseException as error:  # noqa: BLE001 - raised again where the shard is waited for
                _fail(coming, error)
            else:
                # `stop` may have told those who wait already.
                with suppress(InvalidStateError):
                    coming.set_result(place)
            with self._condition:
                if name in self._unwanted:
                    self._unwanted.remove(name)
                    self._let_go(name)

    def _refuse_offline(self, name: str) -> NoReturn:
        raise CheckpointError(
            f"{self.origin}: {name} is not in the cache and offline mode is on: unset"
            " HF_HUB_OFFLINE, or fetch the model where there is a network"
        )


def _fail(coming: Future[Path], error: BaseException) -> None:
    with suppress(InvalidStateError):
        coming.set_exception(error)


def _broken_off() -> ReadError:
    return ReadError("the transfer was broken off, since the command ended")
