"""Ranks that are threads of one process, for what needs no processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from reap_stream.ranks.base import Ranks


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, board, barrier):
        self.rank = self.local_rank = rank
        self.machines, self.local_size = (tuple(range(size)),), size
        self._board, self._barrier = board, barrier

    def gather(self, message):
        self._board[self.rank] = message
        self._barrier.wait(10)
        found = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait(10)
        return found


def together(size, call):
    """What a function gives on each of several ranks."""
    board, barrier = {}, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        ranks = [Threads(rank, size, board, barrier) for rank in range(size)]
        return [future.result() for future in [pool.submit(call, own) for own in ranks]]
