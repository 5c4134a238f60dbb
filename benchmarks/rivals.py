"""What a user would write or take instead: plain Python with a linear probe, with a heap, with
f-strings; bitarray; pyroaring.

Each is written as well as its author could, and does the same job: the lowest free index, the same
objects.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from typing import Any

from bitarray import bitarray
from pyroaring import BitMap
from support.oracle import letters

from pyblock.disk.drivers import VIRTIO_SCSI
from pyblock.disk.model import BlockDrive, DeviceInfo


class LinearProbe:
    """A set, and a loop from 0 up: what the original does (Go's map there)."""

    def __init__(self, capacity: int, taken: int) -> None:
        self.capacity = capacity
        self.taken = set(range(taken))

    def acquire(self) -> int:
        taken = self.taken
        for index in range(self.capacity):
            if index not in taken:
                taken.add(index)
                return index
        raise OverflowError

    def release(self, index: int) -> None:
        self.taken.remove(index)


class Bits:
    """bitarray: find the first 0, set it."""

    def __init__(self, capacity: int, taken: int) -> None:
        self.bits = bitarray(capacity)
        self.bits.setall(0)
        self.bits[:taken] = 1

    def acquire(self) -> int:
        index: int = self.bits.find(0)
        self.bits[index] = 1
        return index

    def release(self, index: int) -> None:
        self.bits[index] = 0


class Roaring:
    """pyroaring: the free indexes as a bitmap, the lowest taken out."""

    def __init__(self, capacity: int, taken: int) -> None:
        self.free = BitMap(range(taken, capacity))

    def acquire(self) -> int:
        index: int = self.free.min()
        self.free.remove(index)
        return index

    def release(self, index: int) -> None:
        self.free.add(index)


class Heap:
    """heapq over the free indexes."""

    def __init__(self, capacity: int, taken: int) -> None:
        self.free = list(range(taken, capacity))

    def acquire(self) -> int:
        return heapq.heappop(self.free)

    def release(self, index: int) -> None:
        heapq.heappush(self.free, index)


def drive_name(number: int, prefix: str = "vd") -> str:
    return f"{prefix}{letters(number)}"


def scsi_address(index: int) -> str:
    return f"{index // 256}:{index % 256}"


def make_name_id(kind: str, device_id: str, limit: int = 31) -> str:
    """With the same promise: nothing empty, bytes counted, nothing cut inside a character, a digest
    for what does not fit."""
    if not kind or not device_id:
        raise ValueError
    text = f"{kind}-{device_id}"
    raw = text.encode()
    if len(raw) <= limit:
        return text
    digest = hashlib.sha256(raw).hexdigest()[:13]
    return raw[: limit - 14].decode(errors="ignore") + "." + digest


def plan_drives(
    indexes: Heap, ordinals: Heap, device_ids: Sequence[str], files: Sequence[str]
) -> list[BlockDrive]:
    """The best plain Python for a batch: heaps, f-strings, the same BlockDrive with the same texts
    ready to read."""
    drives: list[BlockDrive] = []
    for device_id, file in zip(device_ids, files, strict=True):
        index, ordinal = heapq.heappop(indexes.free), heapq.heappop(ordinals.free)
        info = DeviceInfo(file, VIRTIO_SCSI.name, False, device_id)
        drive = BlockDrive(f"drive-{device_id}", index, ordinal, 0, VIRTIO_SCSI, info)
        texts: Any = (f"{index // 256}:{index % 256}", f"/dev/sd{letters(ordinal)}")
        assert texts
        drives.append(drive)
    return drives
