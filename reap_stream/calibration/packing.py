"""Documents drawn until they fill N packs of a sequence length, and nothing thrown away.

Engines that train pack documents into one row and must then keep them from seeing each other, and
must not count what stands at their joints. Here hidden states are stored without padding and rows
of like length run together, so a pack need not be a row at all: it is a number of tokens. Every
document is a row of its own, with its own attention, positions from 0 and own state of convolutions
and recurrences, in every family alike. There is no joint, hence nothing to mask and nothing to
leave out.

A document longer than a sequence becomes consecutive rows; where one token would be left over, the
row before it ends one earlier. Documents are drawn in a random order
until N x length tokens are full, and the last of that order is cut to fill them exactly.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from reap_stream.calibration.encoding import Tokens
from reap_stream.calibration.sampling import MIN_ROW_TOKENS, Candidate, Drawn, Window


def fill(
    candidates: Iterable[Candidate],
    budget: tuple[int | None, int],
    seed: int,
    window: Window | None = None,
) -> Drawn:
    """Draw documents and cut them into rows that fill packs.

    Args:
        candidates: whole documents, to be made.
        budget: how many packs, or None for all there is; and the tokens of a pack, at least 2.
        seed: of the random order.
        window: when to stop reading; None: at the end.

    Returns:
        Rows of 2 tokens up to those of a pack. Together they have exactly the packs' tokens unless
        there are too few documents, or all drawn have 2 tokens and an odd number is to fill.
    """
    packs, length = budget
    room = None if packs is None else packs * length
    documents = _Documents(room, length)
    random = np.random.default_rng(seed)
    skipped = seen = 0
    gave_up = False
    for number, make in enumerate(candidates if room != 0 else ()):
        key = -random.random()
        seen += 1
        if documents.wants(key):
            skipped += not documents.add(key, number, make())
        if window is not None and documents.full and window.is_enough(seen, documents.count):
            break
        if window is not None and not documents.full and window.is_hopeless(seen, documents.count):
            gave_up = True
            break
    rows = [row for document in documents.fitted() for row in _segments(document, length)]
    return Drawn(rows, skipped, seen, gave_up)


def _segments(document: Tokens, length: int) -> list[Tokens]:
    """Cut a document into consecutive rows, none of a single token."""
    cuts = list(range(length, document.size, length))
    if document.size % length == 1 and cuts:
        cuts[-1] -= 1
    return [part.copy() for part in np.split(document, cuts)]


class _Documents:
    """The shortest beginning of a random order of documents that has enough tokens.

    Attributes:
        tokens: of the documents held.
    """

    def __init__(self, room: int | None, length: int) -> None:
        self.tokens = 0
        self._room = room
        self._length = length
        # The last of the random order lies on top.
        self._heap: list[tuple[float, int, Tokens]] = []

    @property
    def full(self) -> bool:
        """Whether there are enough tokens."""
        return self._room is not None and self.tokens >= self._room

    @property
    def count(self) -> int:
        """Documents held."""
        return len(self._heap)

    def wants(self, key: float) -> bool:
        """Whether a document of this key would be among them."""
        return not self.full or key > self._heap[0][0]

    def add(self, key: float, number: int, document: Tokens) -> bool:
        """Take a document in, and let go of those no longer needed; False: it is too short."""
        if self._length == MIN_ROW_TOKENS:
            # Rows of two tokens have none to give to a tail of one.
            document = document[: document.size // 2 * 2]
        if document.size < MIN_ROW_TOKENS:
            return False
        heapq.heappush(self._heap, (key, number, document))
        self.tokens += document.size
        while self._room is not None and self.tokens - self._heap[0][2].size >= self._room:
            self.tokens -= heapq.heappop(self._heap)[2].size
        return True

    def fitted(self) -> list[Tokens]:
        """The documents in their own order, the last of the random order cut to what has room."""
        held = {number: document for _, number, document in self._heap}
        if self._room is not None and self.tokens > self._room:
            last = self._heap[0][1]
            held[last] = held[last][: held[last].size - (self.tokens - self._room)]
            if held[last].size == 1:
                self._lengthen(held, last)
        return [held[number] for number in sorted(held)]

    def _lengthen(self, held: dict[int, Tokens], last: int) -> None:
        """Make the last document's one token a row: others, the longest first, give up tokens."""
        longest = max((n for n in held if n != last), key=lambda n: (held[n].size, n))
        document = self._heap[0][2]
        if held[longest].size > MIN_ROW_TOKENS:
            held[longest] = held[longest][:-1]
            held[last] = document[:MIN_ROW_TOKENS]
        elif document.size > MIN_ROW_TOKENS:
            del held[longest]
            held[last] = document[: MIN_ROW_TOKENS + 1]
        else:
            del held[last]
