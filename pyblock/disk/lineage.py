"""What lies under a block device: the file behind a loop device, the disk of a partition, the parts
of a device-mapper or md node.

Who writes to one of them writes to the other. So a claim on an image holds against what lies under
it and what lies on it; two that only have something under them in common (two partitions of a disk)
do not meet. A loop device over the whole of something *is* that thing, under another name.

Sysfs tells it by number. Of a loop device it tells a path only, in whoever's mount namespace,
perhaps of a deleted file; the device itself tells device and inode (LOOP_GET_STATUS64). Where that
may not be asked, what the path leads to is taken to lie under it, which holds against others and
makes nothing the same.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from typing import NamedTuple

from pyblock.errors import DescriptorsExhausted

# What makes two devices the same one: ("block", major, minor) or ("file", st_dev, st_ino).
Identity = tuple[str, int, int]

SYSFS_BLOCK = "/sys/dev/block"
USED_UP = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

_LOOP_GET_STATUS64 = 0x4C05
# struct loop_info64: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit, and more
_LOOP_INFO64 = struct.Struct("=QQQQQ192x")
_DELETED = " (deleted)"


class Lineage(NamedTuple):
    """What a file or block device is.

    :ivar identity: what makes it the same as another.
    :ivar under: what lies under it, down to the last.
    :ivar names: its own other names: the loop devices over the whole of it that led here.
    """

    identity: Identity
    under: tuple[Identity, ...] = ()
    names: tuple[Identity, ...] = ()

    @property
    def claims(self) -> tuple[Identity, ...]:
        """What a claim on it holds against besides itself."""
        return self.under + self.names


def lineage_of(identity: Identity, node: str = "", *, sysfs: str = SYSFS_BLOCK) -> Lineage:
    """The lineage of what has this number.

    :param node: a path of it; a loop device is opened there, or under its name in /dev, for reading
        only and where it may be.
    :param sysfs: the folder with a link for each block device.
    Raises DescriptorsExhausted.
    """
    if identity[0] != "block":
        return Lineage(identity)  # nothing lies under a file
    names: list[Identity] = []
    under: dict[Identity, None] = {}
    try:
        below, whole = _below(identity, node, sysfs)
        while whole:
            names.append(identity)
            [identity] = below
            below, whole = _below(identity, "", sysfs)
        for one in below:
            _collect(one, under, sysfs)
    except OSError as error:
        # what cannot be looked at for this reason is not taken to be nothing; other reasons do not
        # come here
        why = f"{error.strerror}; raise the limit of open files (ulimit -n)"
        raise DescriptorsExhausted(
            f"{in_words(identity)} cannot be looked at now: {why}", path=node or None
        ) from error
    return Lineage(identity, tuple(under), tuple(names))


def identity_from(status: os.stat_result) -> Identity | None:
    """What stat says: the number of a block special, the device and inode of a file; None for
    anything else."""
    if stat.S_ISBLK(status.st_mode):
        return _block(status.st_rdev)
    return ("file", status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def in_words(identity: Identity) -> str:
    """What errors call it; a file's device as `stat` shows it (Device, in hex)."""
    kind, major, minor = identity
    return (
        f"block device {major}:{minor}"
        if kind == "block"
        else f"inode {minor} of device {major:#x}"
    )


def _block(number: int) -> Identity:
    return ("block", os.major(number), os.minor(number))


def _collect(identity: Identity, under: dict[Identity, None], sysfs: str) -> None:
    """Adds it and all that lies under it."""
    if identity not in under:
        under[identity] = None
        for one in _below(identity, "", sysfs)[0]:
            _collect(one, under, sysfs)


def _below(identity: Identity, node: str, sysfs: str) -> tuple[list[Identity], bool]:
    """What lies right under it, and whether it is just that, under another name."""
    kind, major, minor = identity
    if kind != "block":
        return [], False
    folder = f"{sysfs}/{major}:{minor}"
    if os.path.exists(f"{folder}/partition"):  # noqa: PTH110
        # first: a partition of a loop device answers what is asked of its disk
        disk = _number(f"{os.path.realpath(folder)}/..")
        return [disk] if disk is not None else [], False
    if os.path.exists(f"{folder}/loop/backing_file"):  # noqa: PTH110
        return _behind_loop(identity, node, folder)
    return _slaves(folder), False


def _slaves(folder: str) -> list[Identity]:
    try:
        names = sorted(os.listdir(f"{folder}/slaves"))  # noqa: PTH208
    except OSError as error:
        _raise_if_used_up(error)
        return []
    return [one for name in names if (one := _number(f"{folder}/slaves/{name}")) is not None]


def _number(folder: str) -> Identity | None:
    """Of the block device with this folder in sysfs."""
    try:
        major, _, minor = _read(f"{folder}/dev").partition(":")
        return ("block", int(major), int(minor))
    except (OSError, ValueError) as error:
        _raise_if_used_up(error)
        return None


def _behind_loop(identity: Identity, node: str, folder: str) -> tuple[list[Identity], bool]:
    """What a loop device reads and writes, and whether it is the whole of it."""
    status = bytearray(_LOOP_INFO64.size)
    try:
        fd = _opened(identity, node or f"/dev/{_name(folder)}")
        try:
            fcntl.ioctl(fd, _LOOP_GET_STATUS64, status)
        finally:
            os.close(fd)
    except OSError as error:
        _raise_if_used_up(error)
        return _backing_file(folder), False
    device, inode, number, offset, limit = _LOOP_INFO64.unpack(status)
    return [_block(number) if number else ("file", device, inode)], not offset and not limit


def _opened(identity: Identity, node: str) -> int:
    """A descriptor for reading on the block device of that number. Raises OSError."""
    there = os.open(node, os.O_PATH | os.O_CLOEXEC)
    try:
        if identity_from(os.fstat(there)) != identity:
            raise OSError(errno.ENODEV, f"{node} is something else")
        return os.open(f"/proc/self/fd/{there}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(there)


def _name(folder: str) -> str:
    """Of the block device with this folder in sysfs, as it is under /dev; "" where that is not
    told."""
    lines = _read(f"{folder}/uevent").splitlines()
    return next((line[len("DEVNAME=") :] for line in lines if line.startswith("DEVNAME=")), "")


def _backing_file(folder: str) -> list[Identity]:
    try:
        path = _read(f"{folder}/loop/backing_file").removesuffix("\n")
        found = identity_from(os.stat(path)) if path and not path.endswith(_DELETED) else None  # noqa: PTH116
    except (OSError, ValueError) as error:
        _raise_if_used_up(error)
        return []
    return [found] if found is not None else []


def _raise_if_used_up(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno in USED_UP:
        raise error


def _read(path: str) -> str:
    # pathlib would be a tenth of the time to import pyblock
    with open(path, errors="surrogateescape") as file:  # noqa: PTH123
        return file.read()
