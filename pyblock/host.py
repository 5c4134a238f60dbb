"""The host's side of a device: what a path really is, and when two paths are the same thing.

A block special is its major:minor, a file its (st_dev, st_ino): never its spelling.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from pyblock.errors import InvalidImage

_SYSFS_BLOCK = "/sys/dev/block"
_SECTOR = 512  # bytes: the unit of a block device's `size` in sysfs, whatever the disk's own sector size

_WHAT = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
}


# What makes two devices the same one: ("block", major, minor) or ("file", st_dev, st_ino).
Identity = tuple[str, int, int]


class HostImage(NamedTuple):
    """What a path was found to be: absolute path and identity."""

    path: str
    identity: Identity

    @property
    def is_block(self) -> bool:
        return self.identity[0] == "block"


def identity_of(path: str) -> Identity | None:
    """The identity of a file or block special; None when there is none, or it cannot be looked at."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    if stat.S_ISBLK(status.st_mode):
        return ("block", os.major(status.st_rdev), os.minor(status.st_rdev))
    return ("file", status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def block_special_path(major: int, minor: int, *, sysfs: str = _SYSFS_BLOCK) -> str:
    """The path under /dev of the block special major:minor, out of `/sys/dev/block/M:m/uevent`. Raises InvalidImage when there is none."""
    where = f"{sysfs}/{major}:{minor}/uevent"
    try:
        lines = _read(where).splitlines()
    except OSError as error:
        raise InvalidImage(f"no block device {major}:{minor} on this host ({where}: {error.strerror})") from error
    name = next((line[len("DEVNAME=") :] for line in lines if line.startswith("DEVNAME=")), "")
    if not name:
        raise InvalidImage(f"block device {major}:{minor} has no DEVNAME in {where}")
    return f"/dev/{name}"


def inspect_image(path: str, *, read_only: bool) -> HostImage:
    """Looks at a disk image or host block special. Opens nothing.

    Raises InvalidImage when it is missing, may not be read (or written, unless `read_only`), is empty, or is something else.
    """
    if not path or "\0" in path:
        raise InvalidImage(f"image path {path!r} is empty or holds a NUL; give the path of a disk image or block device")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InvalidImage(f"image path {path!r} is not UTF-8; neither a VMM's JSON nor a saved state can hold it") from None
    path = os.path.abspath(path)  # noqa: PTH100 - pathlib would follow or keep "..", abspath does neither I/O nor surprise
    try:
        status = os.stat(path)  # noqa: PTH116 - a str goes in, no Path object is needed on the hot path
    except OSError as error:
        raise InvalidImage(f"image {path!r}: {error.strerror}") from error
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        identity: Identity = ("file", status.st_dev, status.st_ino)
        size = status.st_size
    elif kind == stat.S_IFBLK:
        major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        identity, size = ("block", major, minor), _block_size(major, minor)
    else:
        raise InvalidImage(f"image {path!r} is {_WHAT.get(kind, 'not a file')}; a regular file or a block device is needed")
    wanted = os.R_OK if read_only else os.R_OK | os.W_OK
    if not os.access(path, wanted, effective_ids=os.access in os.supports_effective_ids):
        need = "read" if read_only else "read and written (attach it read-only if that is meant)"
        raise InvalidImage(f"image {path!r} may not be {need} by user {os.geteuid()}")
    if size == 0:
        raise InvalidImage(f"image {path!r} is empty; give it a size first, for example with truncate")
    return HostImage(path, identity)


def is_block_special(path: str) -> bool:
    """False also for what is not there: whoever opens it will say so."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)  # noqa: PTH116
    except OSError:
        return False


def image_size(path: str) -> int:
    """Bytes of a disk image or block special. Raises InvalidImage when it is gone."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise InvalidImage(f"image {path!r}: {error.strerror}") from error
    if stat.S_ISBLK(status.st_mode):
        return _block_size(os.major(status.st_rdev), os.minor(status.st_rdev))
    return status.st_size


def _read(path: str) -> str:
    with open(path) as file:  # noqa: PTH123 - pathlib would be a tenth of the time to import pyblock
        return file.read()


def _block_size(major: int, minor: int) -> int:
    where = f"{_SYSFS_BLOCK}/{major}:{minor}/size"
    try:
        return int(_read(where)) * _SECTOR
    except (OSError, ValueError) as error:
        raise InvalidImage(f"block device {major}:{minor} has no readable size in {where}") from error
