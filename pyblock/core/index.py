"""The block index: hands out the lowest free of the integers 0 … capacity - 1, at the same price
however many are taken.

The work is done by the core (csrc/index.c), which locks itself: any number of threads may use one
BlockIndex at the same time, and a child that is forked meanwhile may use it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NoReturn, SupportsIndex

from pyblock.core import _native

__all__ = ["CAPACITY_DEFAULT", "CAPACITY_MAX", "BlockIndex"]

CAPACITY_MAX: Final = _native.CAPACITY_MAX
"""The largest capacity: 2^20 = 1,048,576."""

CAPACITY_DEFAULT: Final = _native.CAPACITY_DEFAULT
"""The capacity for one sandbox: 65,536, as many as there are SCSI addresses."""

_CHUNK: Final = 1024

_acquire = _native.raw_acquire
_release = _native.raw_release


class BlockIndex:
    """The integers 0 … capacity - 1, each of them free or taken.

    Supports `in`, `len()` (how many are taken) and iteration over those that are taken, in
    ascending order. An iteration reads in chunks of 1,024: each chunk is one consistent picture,
    but an index that is acquired or released meanwhile may or may not come.

    Every method may be called from many threads. A method that raises has changed nothing.
    """

    __slots__ = ("_handle",)

    def __init__(self, capacity: int = CAPACITY_DEFAULT) -> None:
        """An index with everything free. Raises `InvalidIndex` unless the capacity is 1 … 2^20
        (`CAPACITY_MAX`)."""
        self._handle = _native.index_new(capacity)

    def __del__(self, free: Callable[[_native.Handle], None] = _native.raw_free) -> None:
        if (handle := getattr(self, "_handle", None)) is not None:  # None: the capacity was refused
            del self._handle  # others that are deleted with it may still ask it something
            free(handle)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a BlockIndex cannot be copied or pickled: its memory is the core's")

    def acquire(self) -> int:
        """Takes the lowest free index and returns it. Raises `IndexesExhausted` when all are
        taken."""
        got = _acquire(self._handle)
        if got < 0:
            _native.index_refused("pb_index_acquire", got, self._handle, n=1)
        return got

    def acquire_many(self, n: int) -> list[int]:
        """Takes the `n` lowest free indexes, all or none, and returns them in ascending order.

        Raises `IndexesExhausted` when fewer than `n` are free, and `InvalidIndex` for a negative
        `n`.
        """
        return _native.index_acquire_many(self._handle, n)

    def reserve(self, index: int) -> None:
        """Takes this very index. Raises `IndexTaken`, or `InvalidIndex` when it is not in 0 …
        capacity - 1."""
        _native.index_reserve(self._handle, index)

    def reserve_many(self, indexes: Iterable[int]) -> None:
        """Takes these very indexes, in any order, all or none.

        Raises `IndexTaken` when one is taken already or is named twice, `InvalidIndex` when one is
        not in 0 … capacity - 1; the message names the first such.
        """
        _native.index_reserve_many(self._handle, list(indexes))

    def release(self, index: int) -> None:
        """Gives an index back. Raises `IndexFree` when it is free already, `InvalidIndex` when it
        is not in 0 … capacity - 1."""
        try:
            got = _release(self._handle, index)
        except OverflowError:
            got = _native.ERANGE
        if got < 0:
            _native.index_refused("pb_index_release", got, self._handle, value=index)

    def __contains__(self, index: int) -> bool:
        """Whether the index is taken; one outside 0 … capacity - 1 never is."""
        return _native.index_test(self._handle, index)

    def __len__(self) -> int:
        """How many indexes are taken."""
        return _native.index_count(self._handle)

    def __bool__(self) -> bool:
        """Always true, as for any object that is more than what is in it."""
        return True

    def __iter__(self) -> Iterator[int]:
        """The taken indexes in ascending order; see the class about changes meanwhile."""
        start = 0
        while chunk := _native.index_list(self._handle, start, _CHUNK):
            yield from chunk
            start = chunk[-1] + 1

    @property
    def capacity(self) -> int:
        """How many indexes there are."""
        return _native.index_capacity(self._handle)

    @property
    def memory(self) -> int:
        """Bytes that the core holds for this index: 88 while all that were ever taken are below 64,
        then two bits or less for each up to the highest. Memory is not given back before the index
        itself is."""
        return _native.index_memory(self._handle)

    def __repr__(self) -> str:
        return f"BlockIndex(capacity={self.capacity}, taken={len(self)})"
