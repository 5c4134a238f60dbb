"""Plans: everything that a drive is given before it is plugged in, taken in one crossing.

A plan takes a block index and an ordinal. The index is the sandbox's, one for all drivers; SCSI addresses and slots follow from it.
The ordinal belongs to one family of names (sd, vd, pmem), since the guest counts each family for itself; the predicted name follows
from it. Both are the lowest that are free, and either both are taken or neither. They are given back with `BlockIndex.release`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import msgspec

from pyblock import _native
from pyblock.index import BlockIndex

__all__ = ["PlannedDrive", "plan", "plan_many", "plan_text"]


class PlannedDrive(msgspec.Struct, frozen=True, gc=False):
    """What one drive was given."""

    index: int
    """The block index."""
    ordinal: int
    """The number within the family of names, without the block offset."""
    id: str
    """The drive ID, of at most 31 bytes."""
    scsi_address: str | None
    """"id:lun"; None when no SCSI address was asked for."""
    name: str
    """The predicted drive name, without "/dev/"."""


def plan(index: BlockIndex, ordinals: BlockIndex) -> tuple[int, int]:
    """Takes one index and one ordinal; returns both.

    Raises `IndexesExhausted` when either is used up (nothing is taken then), `InvalidValue` when both are one object.
    """
    return _native.plan(index._handle, ordinals._handle)


def plan_many(index: BlockIndex, ordinals: BlockIndex, n: int) -> tuple[list[int], list[int]]:
    """Takes `n` indexes and `n` ordinals, all or none; returns both lists, ascending.

    Raises like `plan`, and `InvalidIndex` for a negative `n`.
    """
    return _native.plan_many(index._handle, ordinals._handle, n)


def plan_text(
    index: BlockIndex,
    ordinals: BlockIndex,
    device_ids: Iterable[str],
    *,
    kind: str = "drive",
    prefix: str,
    offset: int = 0,
    scsi: bool,
) -> list[PlannedDrive]:
    """Plans one drive for each device ID, all or none, with its texts.

    The drive IDs are those of `make_name_id(kind, device_id)`: no look-out is kept here for one that is in use already. The names
    are those of `drive_name(ordinal + offset, prefix)`, where `offset` says how many names the guest uses before ordinal 0. With
    `scsi`, every index must have a SCSI address, so be at most 65,535.

    Raises `IndexesExhausted`; `InvalidID` for a device ID or kind that is empty, holds a newline or cannot be shortened; `InvalidName`
    for a prefix that is too long or holds a newline; `InvalidIndex` for an offset or index out of range; `InvalidValue` when index and
    ordinals are one object.
    """
    ids = list(device_ids)
    n = len(ids)
    indexes, numbers, texts = _native.plan_text(index._handle, ordinals._handle, ids, kind, prefix, offset, scsi)
    addresses = texts[n : 2 * n] if scsi else repeat(None, n)
    return list(map(PlannedDrive, indexes, numbers, texts[:n], addresses, texts[2 * n :]))
