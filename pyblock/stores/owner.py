"""How a process shows that it lives: it holds a lock on one byte of a file, which the kernel drops when the process ends, however it ends.

A process ID could be given to another process, and means nothing in another PID namespace. The byte's offset is the owner's number. OFD
locks: a second descriptor on the same file, opened and closed anywhere in the process, does not drop them as it would POSIX locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
import weakref
from collections.abc import Callable
from pathlib import Path

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks)
_EVERYBODY = 0  # owners' numbers begin at 1
_FLOCK = struct.Struct("hhqqi4x")


class OwnerLock:
    """:param path: the file with a byte for each owner; made if absent, private to its user. Raises OSError."""

    __slots__ = ("__weakref__", "_file")

    def __init__(self, path: Path) -> None:
        self._file = -1
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _open.add(self)

    def take(self, number: int) -> None:
        """Locks an owner's byte until `close` or the end of the process. Raises OSError when another lives under that number."""
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))

    def lives(self, number: int) -> bool:
        """Whether another owner holds that number; one's own is not seen. Takes no lock, so that two who ask do not see each other."""
        answer = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def accompany(self) -> None:
        """Shows, at a byte that many may hold at once, that the database is in use."""
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _EVERYBODY, 1, 0))

    def accompanied(self) -> bool:
        """Whether somebody else does."""
        return self.lives(_EVERYBODY)

    def close(self, _close: Callable[[int], None] = os.close) -> None:  # bound early: `os` may be gone when the last ones are deleted
        """Drops the locks."""
        if self._file >= 0:
            _close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


_open: weakref.WeakSet[OwnerLock] = weakref.WeakSet()


def _after_fork() -> None:
    # The child shares the descriptor's locks: while it kept one, its dead parent would seem to live.
    for lock in list(_open):
        lock.close()


os.register_at_fork(after_in_child=_after_fork)
