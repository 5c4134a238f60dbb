"""A store whose writes are held back where they would wait for another process, and what to ask
while they are."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pyblock import (
    BlockDevice,
    ImageInUse,
    Sandbox,
    StoreBusy,
)
from pyblock.disk.model import BlockDrive
from pyblock.kata.schema import SandboxState, decode
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.base import FoundDisk, Inventory
from pyblock.vmm.memory.machine import MemoryHypervisor
from support import samples
from support.snapshot import drive_ids
from support.turns import LATE, until
from support.written import written


class Gate:
    """Where something waits until it is let go.

    :ivar reached: it has come here.
    """

    def __init__(self, *, fails: bool = False) -> None:
        self.reached = False
        self._fails = fails
        self._event = asyncio.Event()

    def let_go(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        self.reached = True
        await self._event.wait()
        if self._fails:
            raise StoreBusy("another process has been holding the lock")


class HeldStore(SqliteStore):
    """A store that can hold back its next writes, and have them fail then."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._gates: deque[Gate] = deque()

    def hold(self, *, fails: bool = False) -> Gate:
        """Where the next write that is not held back yet will wait."""
        self._gates.append(Gate(fails=fails))
        return self._gates[-1]

    async def write(self, *arguments: Any, **more: Any) -> dict[str, ImageInUse]:
        if self._gates:
            await self._gates.popleft().wait()
        return await super().write(*arguments, **more)


class SlowMachine(MemoryHypervisor):
    """Says what it has, and where a drive went, when the gate lets it; what it says is what it had
    when it was asked.

    :ivar asked: how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answer: Gate | None = None
        self.place_told: Gate | None = None
        self.asked = 0

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        self.asked += 1
        found = await super().inventory(ours)
        # As QEMU tells it of SCSI disks: with the index that belongs to the address.
        disks = [
            FoundDisk(disk.id, disk.family, int(self.devices[disk.id].split()[1]))
            for disk in found.disks
            if disk.id in self.devices
        ]
        if self.answer is not None:
            await self.answer.wait()
        return Inventory([*self._existing, *disks], found.held, found.files)

    async def locate(self, drive: BlockDrive) -> None:
        if self.place_told is not None:
            await self.place_told.wait()
        await super().locate(drive)


@contextmanager
def locked(store: SqliteStore) -> Iterator[None]:
    """Another process stands in the middle of its transaction."""
    with closing(sqlite3.connect(store.path, isolation_level=None, timeout=LATE)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Returns when they are over; fails when they never are. What they raised counts as seen."""
    done, going = await asyncio.wait(tasks, timeout=LATE)
    for task in going:
        task.cancel()
    assert not going
    for task in done:
        _ = task.cancelled() or task.exception()


async def reached(vm: MemoryHypervisor, step: str, times: int = 1) -> None:
    await until(lambda: [name for name, _ in vm.journal].count(step) >= times)


def query(store: SqliteStore, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(store.path)) as db:
        return db.execute(sql).fetchall()


def rows(store: SqliteStore) -> dict[str, tuple[str, int]]:
    """Phase and count of each device, as the store has them."""
    found = {
        device_id: written(device_id, data)
        for device_id, data in query(store, "SELECT id, state FROM device")
    }
    return {device_id: (row.phase, row.attach_count) for device_id, row in found.items()}


def facts(sandbox: Sandbox) -> dict[str, tuple[str, int]]:
    """The same as the sandbox has them."""
    return {
        one.id: (str(one.phase), one.attach_count)
        for one in sandbox.devices
        if isinstance(one, BlockDevice)
    }


def nothing_left(sandbox: Sandbox) -> None:
    assert not sandbox.devices and not list(sandbox.index) and not drive_ids(sandbox)


async def saved_with(image: Path) -> SandboxState:
    """What another machine's sandbox saved that had this image as device "loaded"."""
    async with Sandbox("elsewhere", MemoryHypervisor(), store=None) as sandbox:
        await sandbox.attach(image, device_id="loaded")
        return sandbox.state()


def kept_only() -> SandboxState:
    """A state of the original without disks: a device of a kind that is not plugged here, and an
    index that something took."""
    return decode(samples.text(samples.sandbox([samples.VFIO], [7])), where="a sample")
