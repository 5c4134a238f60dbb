"""Plans: the numbers that a drive is given before it is plugged in, taken in one crossing.

A plan takes a block index and an ordinal. The index is the sandbox's, one for all drivers; SCSI
addresses and slots follow from it. The ordinal belongs to one family of names (sd, vd, pmem), since
the guest counts each family for itself; the predicted name follows from it. Both are the lowest
that are free, and either both are taken or neither. They are given back with `BlockIndex.release`.
"""

from __future__ import annotations

from pyblock.core import _native
from pyblock.core.index import BlockIndex

__all__ = ["plan", "plan_many"]

_plan = _native.raw_plan


def plan(index: BlockIndex, ordinals: BlockIndex) -> tuple[int, int]:
    """Takes one index and one ordinal; returns both.

    Raises `IndexesExhausted` when either is used up (nothing is taken then), `InvalidValue` when
    both are one object.
    """
    got = _plan(index._handle, ordinals._handle)
    if got < 0:
        _native.plan_refused("pb_plan", got, index._handle, ordinals._handle, n=1)
    return got & 0xFFFFFFFF, got >> 32


def plan_many(index: BlockIndex, ordinals: BlockIndex, n: int) -> tuple[list[int], list[int]]:
    """Takes `n` indexes and `n` ordinals, all or none; returns both lists, ascending.

    Raises like `plan`, and `InvalidIndex` for a negative `n`.
    """
    return _native.plan_many(index._handle, ordinals._handle, n)
