"""What ends in the very moment in which it succeeded: whoever was told that it did not, has
nothing; and nobody loses what was his.

Found by the storm (tests/storm), where a process that was stopped goes on with a deadline, a
cancellation and an answer at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

import pytest
from support.snapshot import MakeImage, MakeStore

from pyblock import (
    BlockDevice,
    ClosedMeanwhile,
    DetachPending,
    ImageInUse,
    NotAttached,
    Sandbox,
    UnknownDevice,
)
from pyblock.disk.model import BlockDrive
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.base import Inventory
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


async def test_a_batch_is_cancelled(make_image: MakeImage) -> None:
    async with Sandbox("one", "memory:", store=None) as sandbox:
        attaching = asyncio.create_task(sandbox.attach_many([make_image("a")]))
        while not sandbox._batches:
            await asyncio.sleep(0)
        [batch] = sandbox._batches
        while not batch.done():
            await asyncio.sleep(0)
        assert not attaching.done()
        attaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        await sandbox.settle()
        assert not sandbox.devices and not len(sandbox.index)


@pytest.mark.parametrize("turns", range(4))
async def test_an_attach_is_cancelled_while_another_is_taken_back(
    turns: int, make_image: MakeImage, make_store: MakeStore
) -> None:
    """Each takes one off the count; at 0 it would be attached for nobody, and its row could not be
    read again."""
    vm, store = MemoryHypervisor(), make_store()
    async with Sandbox("one", vm, store=store) as sandbox:
        image = make_image("a")
        device = await sandbox.attach(image)
        attaching = asyncio.create_task(sandbox.attach(image))
        while device.attach_count != 2 or device.operation is not None:
            await asyncio.sleep(0)
        detaching = asyncio.create_task(sandbox.detach(device))
        for _ in range(turns):
            await asyncio.sleep(0)
        attaching.cancel()
        told = await asyncio.gather(attaching, detaching, return_exceptions=True)
        await sandbox.settle()
        assert told[1] is None
        left = 0 if isinstance(told[0], asyncio.CancelledError) else 1
    async with Sandbox("one", vm, store=store) as sandbox:
        assert [one.attach_count for one in sandbox.devices] == [1] * left
        assert len(vm.devices) == left


async def test_a_failed_batch_is_taken_back_while_its_sandbox_is_closed(
    make_image: MakeImage, tmp_path: Path
) -> None:
    """The caller is told that what was attached is detached, so it is, though the store makes it
    wait."""
    path = tmp_path / "state.db"
    vm, store = MemoryHypervisor(), SqliteStore(path)
    mine, taken = make_image("mine"), make_image("taken")
    async with Sandbox("other", "memory:", store=store) as other:
        await other.attach(taken)
        sandbox = await Sandbox("one", vm, store=store).__aenter__()
        device = await sandbox.attach(mine)
        attaching = asyncio.create_task(sandbox.attach_many([mine, taken]))
        while device.attach_count != 2 or device.operation is not None:
            await asyncio.sleep(0)
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")  # as another process would
            while device.attach_count == 2:  # until taking it back has begun
                await asyncio.sleep(0)
            closing_it = asyncio.create_task(sandbox.close())
            for _ in range(20):
                await asyncio.sleep(0)
            db.execute("ROLLBACK")
        await closing_it
        with pytest.raises((ClosedMeanwhile, ImageInUse)):
            await attaching
        async with Sandbox("one", vm, store=store) as again:
            assert [one.attach_count for one in again.devices] == [1]
    store.close()


async def test_a_disk_that_came_and_went_while_the_machine_was_asked_is_no_orphan(
    make_image: MakeImage,
) -> None:
    """Its ID was given out neither before nor after; QEMU's answer has it. Nor does its place stay
    taken."""

    class Slow(MemoryHypervisor):
        sandbox: Sandbox | None = None

        async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
            sandbox, self.sandbox = self.sandbox, None
            device: BlockDevice | None = (
                await sandbox.attach(image) if sandbox is not None else None
            )
            found = await super().inventory(ours)
            if sandbox is not None and device is not None:
                await sandbox.detach(device)
            return found

    image, vm = make_image("a"), Slow()
    async with Sandbox("one", vm, store=None) as sandbox:
        await sandbox.detach(await sandbox.attach(image))  # the machine has been asked
        vm.sandbox = sandbox
        assert await sandbox.reconcile() == []
        assert not len(sandbox.index) and not sandbox._machine.allotment._foreign_ids


@pytest.mark.parametrize("turns", range(6))
async def test_a_detach_that_is_called_again_is_cancelled(
    turns: int, make_image: MakeImage
) -> None:
    """Its caller was told that it is pending and that calling again is safe: that takes nobody
    else's disk, however often he calls."""
    vm, image = MemoryHypervisor(), make_image("a")
    async with Sandbox("one", vm, store=None) as sandbox:
        device = await sandbox.attach(image)
        vm.fail("device-gone", Fault("hold"))
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=0)
        another = asyncio.create_task(sandbox.attach(image))
        again = asyncio.create_task(sandbox.detach(device))
        for _ in range(20):
            await asyncio.sleep(0)
        vm.let_go("device-gone")
        for _ in range(turns):
            await asyncio.sleep(0)
        again.cancel()
        await asyncio.wait([again])
        his = await another
        if again.cancelled():  # else he was told that it is gone
            with contextlib.suppress(UnknownDevice, NotAttached):
                await sandbox.detach(device)
        assert his.attached and his.attach_count == 1


async def test_closed_in_the_moment_in_which_a_batch_ends(make_image: MakeImage) -> None:
    """At each turn of the event loop: close waits for batches that it found, even if they are over
    when it comes to it."""
    image = make_image("a")
    for turns in range(20):
        sandbox = Sandbox("one", MemoryHypervisor(), store=None)
        async with sandbox:
            attaching = asyncio.create_task(sandbox.attach_many([image]))
            for _ in range(turns):
                await asyncio.sleep(0)
            await sandbox.close()
            await asyncio.gather(attaching, return_exceptions=True)
        assert not sandbox._batches


async def test_closed_in_the_moment_in_which_a_batch_is_made(make_image: MakeImage) -> None:
    """What was planned for it is given back, though not one of its attaches had its turn."""
    sandbox = Sandbox("one", MemoryHypervisor(), store=None)
    async with sandbox:
        # the machine has been asked
        await sandbox.detach(await sandbox.attach(make_image("first")))
        attaching = asyncio.create_task(sandbox.attach_many([make_image("a"), make_image("b")]))
        while not sandbox._batches:
            await asyncio.sleep(0)
        await sandbox.close()
        with pytest.raises(ClosedMeanwhile):
            await attaching
    async with sandbox:
        assert not len(sandbox.index) and not sandbox.devices
