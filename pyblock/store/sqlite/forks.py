"""What a fork, and the end of a process, find of its databases: all closed.

SQLite does not know of forks. A child that had the parent's connection would believe in the
parent's locks, and could delete the journal under others or have it deleted. So before a fork each
database is closed, and parent and child open it anew when they next need it. A fork inside a
transaction, out of a signal handler, ends the transaction, which is then begun again. Another
thread's is waited for, but not for ever: a child that was forked all the same is told so, and never
touches the database.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from typing import Protocol

# seconds that a fork, or the end of the process, waits for other threads' transactions, which take
# far less than one
FORK_WAIT = 5.0


class Database(Protocol):
    """What is closed."""

    def close_for_fork(self, deadline: float) -> None:
        """Closes the connection, if no other thread keeps it past the deadline
        (`time.monotonic()`); the owner's lock stays. It must not be opened while `forking`."""

    def begin_in_child(self) -> None:
        """Has a child begin anew, with nothing open."""

    def close_at_exit(self, deadline: float) -> None:
        """Closes everything."""


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_under_way: dict[int, float] = {}  # the thread that forks, and since when


def watch(database: Database) -> None:
    """Has it closed for each fork, and at the end of the process."""
    _databases.add(database)


def forking() -> bool:
    """Whether some thread is in the middle of a fork, so that nothing may be opened. One that has
    not come to its end after twice its time never will: a signal handler has thrown it off its
    way."""
    now = time.monotonic()
    return any(now - since < 2 * FORK_WAIT for since in list(_under_way.values()))


def _before() -> None:
    now = time.monotonic()
    _under_way[threading.get_ident()] = now
    for database in list(_databases):
        database.close_for_fork(now + FORK_WAIT)


def _after_in_parent() -> None:
    _under_way.pop(threading.get_ident(), None)


def _after_in_child() -> None:
    _under_way.clear()
    for database in list(_databases):
        database.begin_in_child()


def _at_exit() -> None:
    deadline = time.monotonic() + FORK_WAIT
    for database in list(_databases):
        database.close_at_exit(deadline)


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
atexit.register(_at_exit)
