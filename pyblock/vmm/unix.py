"""A VMM's unix socket, whatever is spoken there: what can be told of it before, and about who is at
the other end.

Linux tells the peer of a connection; /proc tells more of it where it may be read.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct

from pyblock.disk.image import OpenedImage
from pyblock.errors import VmmUnreachable

SOCKET_PATH_MAX = 107  # bytes: sun_path of sockaddr_un less its NUL
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid


def check_socket(path: str, where: str, *, hint: str) -> None:
    """Raises VmmUnreachable, with nothing sent, unless there is a socket at the path.

    :param where: what errors call it.
    :param hint: what they ask when nothing is there.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise VmmUnreachable(
            f"{where}: a unix socket's path has at most {SOCKET_PATH_MAX} bytes", path=path
        )
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        raise VmmUnreachable(f"{where}: {why}; {hint}", path=path) from error
    if not stat.S_ISSOCK(mode):
        raise VmmUnreachable(f"{where} is not a socket", path=path)


def is_gone(path: str) -> bool:
    """Whether the socket is absent or nobody listens there. A peer that is there and says nothing
    is not gone."""
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    with contextlib.closing(socket.socket(socket.AF_UNIX, kind)) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            return True
        except (OSError, ValueError):
            pass  # taken, or not to be touched by this user: something is there
    return False


def real_path(path: str) -> str:
    """The path without links, as far as it has one: connecting will say what is wrong with it."""
    with contextlib.suppress(ValueError):  # of a NUL in it
        return os.path.realpath(path)
    return path


def peer_of(connected: socket.socket) -> int:
    """The process ID at the other end, in this process's namespace; 0 where it cannot be told."""
    try:
        got = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid, _, _ = _PEER.unpack(got)
    except (OSError, struct.error):
        return 0
    return int(pid)


def process(pid: int, *programs: str) -> str:
    """What tells a process from all others of this boot, if the name of its program holds one of
    those words and it can be looked at; else ""."""
    try:
        name = os.readlink(f"/proc/{pid}/exe").rpartition("/")[2]  # noqa: PTH115
        started = _stat(pid)[19]
    except (OSError, IndexError):
        return ""
    return f"process {pid} {started}" if any(word in name for word in programs) else ""


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as far as can be told."""
    try:
        return _stat(pid)[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def is_open_as(pid: int, descriptor: int, image: OpenedImage) -> bool | None:
    """Whether that descriptor of a process is the image; None where that cannot be seen."""
    if pid in (0, os.getpid()):  # not known, or a pair of sockets that this process made
        return None
    try:
        return _is_same(os.stat(f"/proc/{pid}/fd/{descriptor}"), os.fstat(image.fd))  # noqa: PTH116
    except OSError:
        return None


def has_open(pid: int, image: OpenedImage) -> bool | None:
    """Whether a process has the image open (True), or something else under the image's path
    (False); None where neither can be seen."""
    if pid in (0, os.getpid()):
        return None
    other, wanted = None, os.fstat(image.fd)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                if _is_same(os.stat(f"/proc/{pid}/fd/{name}"), wanted):  # noqa: PTH116
                    return True
                if os.readlink(f"/proc/{pid}/fd/{name}") == image.path:  # noqa: PTH115
                    other = False
    except OSError:
        return None
    return other


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    if stat.S_ISBLK(other.st_mode):
        return stat.S_ISBLK(one.st_mode) and one.st_rdev == other.st_rdev
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _stat(pid: int) -> list[str]:
    """The words of /proc/PID/stat from the state on, which is the third; the name before it may
    hold anything."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - of a file of one line
        return file.read().rpartition(")")[2].split()
