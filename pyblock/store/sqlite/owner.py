"""How a process shows that it lives: it holds a lock on one byte of a file, which the kernel drops
when the process ends, however it ends.

A process ID could be given to another process, and means nothing in another PID namespace. The
byte's offset is the owner's number; byte 0 is held by everybody who has the database open,
together, or by one who is alone with it. OFD locks: a second descriptor on the same file, opened
and closed anywhere in the process, does not drop them as it would POSIX locks.

The file's text is a note for whoever comes first in the next boot, when there are no locks any
more.
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
_NOTE_MAX = 200  # bytes


class OwnerLock:
    """:param path: the file with a byte for each owner; made if absent, private to its user. Raises
    OSError."""

    __slots__ = ("__weakref__", "_file")

    def __init__(self, path: Path) -> None:
        self._file = -1
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        _open.add(self)

    def take(self, number: int) -> None:
        """Locks an owner's byte until `close` or the end of the process. Raises OSError when
        another lives under that number."""
        self._set(fcntl.F_WRLCK, number)

    def lives(self, number: int) -> bool:
        """Whether another owner holds that number; one's own is not seen. Takes no lock, so that
        two who ask do not see each other."""
        answer = fcntl.fcntl(
            self._file, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
        )
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def exclude(self) -> bool:
        """Keeps everybody from accompanying the database until this owner does itself. False:
        somebody accompanies it, or excludes."""
        try:
            self._set(fcntl.F_WRLCK, _EVERYBODY)
        except BlockingIOError:
            return False
        return True

    def accompany(self) -> bool:
        """Shows, at a byte that many may hold at once, that the database is in use. False: somebody
        keeps all others from it now."""
        try:
            self._set(fcntl.F_RDLCK, _EVERYBODY)
        except BlockingIOError:
            return False
        return True

    def read_note(self) -> bytes:
        """What was noted last, b"" for nothing."""
        return os.pread(self._file, _NOTE_MAX, 0)

    def write_note(self, note: bytes) -> None:
        """Notes something, on the disk when it returns."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, note, 0)
        os.fsync(self._file)

    # bound early: `os` may be gone when the last ones are deleted
    def close(self, _close: Callable[[int], None] = os.close) -> None:
        """Drops the locks."""
        if self._file >= 0:
            file, self._file = self._file, -1
            _close(file)

    def __del__(self) -> None:
        self.close()

    def _set(self, kind: int, number: int) -> None:
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, number, 1, 0))


_open: weakref.WeakSet[OwnerLock] = weakref.WeakSet()


def _after_fork() -> None:
    # The child shares the descriptor's locks: while it kept one, its dead parent would seem to
    # live.
    for lock in list(_open):
        lock.close()


os.register_at_fork(after_in_child=_after_fork)
