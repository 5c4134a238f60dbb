"""Names, addresses and IDs of drives: texts that follow from a number, and the numbers back.

The guest's kernel names its disks by itself, in the order in which it finds them, so a drive name
made here is a prediction. A SCSI address is a fact: it is told to the VMM when the drive is plugged
in.

Crossing into C costs more than making one such text, so the texts of the first numbers, which is
all that nearly every sandbox uses, are made by the core in one crossing on first use and then kept;
a single one past them is put together here, and many at once are made by the core again. Tests hold
both to the same oracle.
"""

from __future__ import annotations

from typing import Final

from pyblock.core import _native

__all__ = [
    "DRIVE",
    "ID_MAX",
    "LUNS",
    "NAME_MAX",
    "SCSI_INDEX_MAX",
    "drive_index",
    "drive_name",
    "drive_names",
    "make_name_id",
    "scsi_address",
    "scsi_index",
]

NAME_MAX: Final = _native.NAME_MAX
"""Bytes of a drive name: 31, Linux's DISK_NAME_LEN of 32 less the terminating NUL."""

LUNS: Final = 256
"""LUNs of a SCSI ID, as Kata numbers them: a byte."""

DRIVE: Final = "drive"
"""What every drive ID begins with, and a hyphen; Kata's as well."""

SCSI_INDEX_MAX: Final = _native.SCSI_INDEX_MAX
"""The last index with a SCSI address: 65,535, as Kata numbers an ID and a LUN of a byte each."""

ID_MAX: Final = _native.ID_MAX
"""Bytes of a drive ID: 31, the length of a node name in QEMU."""

_READY: Final = 1024
_COMPOSED: Final = 2**20  # as many as a sandbox can hold
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
# those that Linux uses; any other would let a caller grow the store without end
_KEPT_PREFIXES: Final = frozenset({"vd", "sd"})

# Two threads that come first at once both fill in the same texts, so no lock is needed.
_ready_names: Final[dict[str, tuple[str, ...]]] = {}
_ready_addresses: tuple[str, ...] = ()


def drive_name(number: int, prefix: str = "vd") -> str:
    """The name that Linux gives the disk of that number: base 26 without a zero, behind the prefix.

    0 is vda, 25 vdz, 26 vdaa, 701 vdzz, 702 vdaaa. The number counts from 0 and goes up to 2^63 -
    1, as long as the whole name has at most 31 bytes (`NAME_MAX`); so the prefix has at most 30.
    Persistent memory is named otherwise (pmem0, pmem1 …), not here.

    Raises `InvalidIndex` for a number outside that range, and `InvalidName` when the name gets too
    long.
    """
    if prefix in _KEPT_PREFIXES and 0 <= number < _COMPOSED:
        if prefix not in _ready_names:
            _ready_names[prefix] = tuple(_native.drive_names(0, _READY, prefix))
        if number < _READY:
            return _ready_names[prefix][number]
        head, last = divmod(number, 26)
        return drive_name(head - 1, prefix) + _LETTERS[last]
    return _native.drive_name(number, prefix)


def drive_names(first: int, count: int, prefix: str = "vd") -> list[str]:
    """The names of `first` … `first + count - 1`, made in one crossing; far cheaper than one by
    one.

    Raises `InvalidIndex` when one of the numbers is out of range or the count is negative,
    `InvalidName` when the last name has more than 31 bytes or the prefix holds a newline.
    """
    return _native.drive_names(first, count, prefix)


def drive_index(name: str, prefix: str = "vd") -> int:
    """The number of a drive name, without "/dev/": the inverse of `drive_name`.

    Raises `InvalidName` for anything that `drive_name` does not write: another prefix, no letters
    behind it, anything but a-z, more than 31 bytes, a number above 2^63 - 1.
    """
    return _native.drive_index(name, prefix)


def scsi_address(index: int) -> str:
    """The SCSI address "id:lun" of a block index: id = index // 256, lun = index % 256. 703 is
    "2:191".

    The index is 0 … 65,535 (`SCSI_INDEX_MAX`), since Kata gives the ID and the LUN a byte each.
    Raises `InvalidIndex` outside of it.
    """
    global _ready_addresses  # noqa: PLW0603 - filled once, then only read
    if 0 <= index < _READY:
        if not _ready_addresses:
            _ready_addresses = tuple(_native.scsi_addresses(0, _READY))
        return _ready_addresses[index]
    if 0 < index <= SCSI_INDEX_MAX:
        return f"{index >> 8}:{index & 255}"
    return _native.scsi_address(index)


def scsi_index(address: str) -> int:
    """The block index of a SCSI address: the inverse of `scsi_address`.

    Raises `InvalidAddress` for any other spelling (signs, spaces, leading zeros, digits other than
    0-9) and for a part above 255.
    """
    return _native.scsi_index(address)


def make_name_id(kind: str, device_id: str, limit: int = ID_MAX, salt: int = 0) -> str:
    """The ID "kind-device_id" in at most `limit` bytes of UTF-8 (31 by default: a node name in QEMU
    holds no more).

    An ID that fits is returned as it is. A longer one keeps the kind and as many whole characters
    of the beginning of the device ID as leave room for "." and 13 characters, a digest of the whole
    device ID and of `salt`. So two device IDs get one ID only if their 64-bit digests meet, or if a
    device ID spells out another's shortened form; whoever knows the IDs in use then asks again with
    another salt (0 … 2^63 - 1). The salt changes nothing in an ID that fits. The result never
    changes between versions of pyblock.

    Raises `InvalidID` when the kind or the device ID is empty, or the kind is too long for
    shortening to help; `InvalidValue` for a limit below 1 or a salt out of range.
    """
    # No f-string: it would take a None for text.
    if (
        salt
        or not kind
        or not device_id
        or len(text := kind + "-" + device_id) > limit
        or not text.isascii()
    ):
        return _native.make_id(kind, device_id, salt, limit)
    return text
