"""A process that holds the store's lock now and then for some milliseconds, as many others on a
busy host do together.

Without it a write is hardly ever waited for, and what happens while one waits is hardly ever cut
off.
"""

from __future__ import annotations

import os
import random
import select
import sqlite3
import warnings
from contextlib import closing
from pathlib import Path

# seconds: on average until it takes the lock, and at most until it lets go
PAUSE, HOLD = 0.03, 0.012


class Hog:
    """:param store: the database. :param others: descriptors that it is not to have."""

    def __init__(self, store: Path, seed: str, others: list[int]) -> None:
        end, self._ours = os.pipe()
        with warnings.catch_warnings():
            # of forking beside threads: there are none
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                for file in [self._ours, *others]:
                    os.close(file)
                _hog(store, random.Random(seed), end)
            finally:
                os._exit(0)
        os.close(end)

    @property
    def file(self) -> int:
        """The descriptor whose end is its end."""
        return self._ours

    def close(self) -> None:
        os.close(self._ours)
        os.waitpid(self.pid, 0)


def _hog(store: Path, choose: random.Random, end: int) -> None:
    while not select.select([end], [], [], choose.expovariate(1 / PAUSE))[0]:
        if not store.exists() or not store.stat().st_size:
            continue
        with closing(sqlite3.connect(store, timeout=0, isolation_level=None)) as db:
            try:
                db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                continue  # another has it
            select.select([end], [], [], HOLD * choose.random())
            db.execute("ROLLBACK")
