"""Callers that get in each other's way: each case once lost a disk, an index, or the truth."""

from __future__ import annotations

import asyncio
import copy
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal
from support.held_store import Gate, SlowMachine
from support.turns import LATE, SOON, at_rest, until

import pyblock
from pyblock import BlockDevice, Phase, blocking
from pyblock.disk.drivers import SD
from pyblock.disk.model import BlockDrive
from pyblock.kata import file as json_file
from pyblock.life.recovery import Found, Outcome
from pyblock.vmm.base import FoundDisk
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio

MakeImage = Callable[..., Path]


async def test_one_attaches_while_another_resumes_its_detach(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    image = make_image("a")
    async with pyblock.Sandbox("sb", vm) as sandbox:
        mine = await sandbox.attach(image)
        vm.fail("device-gone", Fault("hold"))
        with pytest.raises(pyblock.DetachPending):
            await sandbox.detach(mine, timeout=SOON)
        other = asyncio.create_task(sandbox.attach(image))
        await at_rest()
        resumed = asyncio.create_task(sandbox.detach(mine))
        await at_rest()
        assert not other.done() and not resumed.done()
        vm.let_go("device-gone")
        await resumed
        theirs = await other
        assert (
            sandbox.devices == [theirs] and theirs.attach_count == 1 and list(sandbox.index) == [0]
        )
        await sandbox.detach(theirs)
        assert not sandbox.devices and not len(sandbox.index) and not vm.devices


async def test_a_safe_retry_takes_nobody_elses_disk(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    image = make_image("a")
    async with pyblock.Sandbox("sb", vm) as sandbox:
        mine = await sandbox.attach(image)
        vm.fail("device-gone", Fault("hold"))
        with pytest.raises(pyblock.DetachPending):
            await sandbox.detach(mine, timeout=SOON)
        other = asyncio.create_task(sandbox.attach(image))
        await at_rest()
        assert not other.done()
        vm.let_go("device-gone")
        theirs = await other
        assert theirs is not mine
        await sandbox.detach(mine)
        assert theirs.phase is Phase.ATTACHED and len(vm.devices) == 1


async def test_two_batches_of_the_same_images(make_image: MakeImage) -> None:
    async with pyblock.Sandbox("sb", "memory:") as sandbox:
        images = [make_image("a"), make_image("b")]
        both = await asyncio.gather(sandbox.attach_many(images), sandbox.attach_many(images))
        assert [device.attach_count for device in both[0]] == [2, 2]
        await sandbox.detach_many([*both[0], *both[1]])
        assert not len(sandbox.index)
        assert (await sandbox.attach(images[0])).held.predicted_name == "/dev/sda"


async def test_an_unknown_outcome_is_not_guessed_when_the_vmm_is_away(
    make_image: MakeImage,
) -> None:
    vm = MemoryHypervisor()
    async with pyblock.Sandbox("sb", vm) as sandbox:
        image = make_image("a")
        device = await sandbox.attach(image)
        vm.fail("device-gone", Fault("lose"))
        with pytest.raises(pyblock.DetachPending):
            await sandbox.detach(device)
        vm.dead = True
        with pytest.raises(pyblock.VmmUnreachable):
            await sandbox.detach(device)
        assert device.phase is Phase.DETACH_PENDING
        vm.dead = False
        # It answers again: it is asked, the removal is finished, and the image is free for a new
        # device.
        again = await sandbox.attach(image)
        assert again is not device and sandbox.devices == [again]
        await sandbox.detach(device)  # whoever was told "pending" may call again
        assert sandbox.devices == [again] and again.attached


async def test_a_cancelled_batch_does_not_wait_for_its_slowest(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-add", Fault("hold"), times=2)
    async with pyblock.Sandbox("sb", vm) as sandbox:
        task = asyncio.create_task(
            sandbox.attach_many([make_image("a"), make_image("b")], timeout=None)
        )
        await until(lambda: len(vm.backends) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, LATE)
        vm.let_go("device-add")
        await until(lambda: not sandbox.devices)
        assert not len(sandbox.index) and not vm.backends


async def test_nothing_is_plugged_after_close(make_image: MakeImage) -> None:
    vm = SlowMachine()
    async with pyblock.Sandbox("sb", vm) as sandbox:
        asked = vm.answer = Gate()
        task = asyncio.create_task(sandbox.attach(make_image("a")))
        await until(lambda: asked.reached)
    asked.let_go()
    with pytest.raises(pyblock.SandboxClosed):
        await task
    await at_rest()
    assert not vm.backends


async def test_an_operation_that_close_meets_before_its_first_step(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    sandbox = pyblock.Sandbox("sb", vm)
    image = make_image("a")
    async with sandbox:
        await sandbox.detach(await sandbox.attach(image))
        vm.fail("backend-add", Fault("hold"))
        task = asyncio.create_task(sandbox.attach(image))
        await asyncio.sleep(0)
    with pytest.raises(pyblock.AttachPending):
        await task
    assert len(sandbox.devices) == 1
    vm.let_go("backend-add")
    async with sandbox:  # asks the machine, which has nothing of it
        assert [(one.found, one.outcome) for one in sandbox.recovered] == [
            (Found.ATTACH, Outcome.FREED)
        ]
        assert not sandbox.devices and not len(sandbox.index) and not vm.backends


async def test_the_newer_of_two_saves_stays(
    make_image: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    write = json_file.write

    def slow(path: Any, state: Any) -> None:
        if not writing.is_set():
            writing.set()
            assert go_on.wait(LATE)
        write(path, state)

    monkeypatch.setattr(json_file, "write", slow)
    async with pyblock.Sandbox("sb", "memory:") as sandbox:
        old = asyncio.create_task(sandbox.save(tmp_path / "state"))
        await until(writing.is_set)
        await sandbox.attach(make_image("a"))
        new = asyncio.create_task(sandbox.save(tmp_path / "state"))
        await at_rest()
        go_on.set()
        await asyncio.gather(old, new)
    assert len(json.loads((tmp_path / "state").read_text())["Devices"]) == 1


async def test_what_is_plugged_in_stays_taken_when_it_cannot_be_located(
    make_image: MakeImage,
) -> None:
    class Broken(MemoryHypervisor):
        async def locate(self, drive: BlockDrive) -> None:
            raise KeyError("a reply of another shape")

    vm = Broken()
    async with pyblock.Sandbox("sb", vm) as sandbox:
        with pytest.raises(pyblock.AttachPending, match="another shape"):
            await sandbox.attach(make_image("a"))
        [device] = sandbox.devices
        assert (
            isinstance(device, BlockDevice)
            and device.phase is Phase.ATTACH_PENDING
            and list(sandbox.index) == [0]
        )
        await sandbox.detach(device)
        assert not vm.devices and not vm.backends and not sandbox.devices


async def test_a_load_after_asking_counts_the_machines_disks_anew(make_image: MakeImage) -> None:
    vm = MemoryHypervisor(existing=(FoundDisk("boot", SD, 0),))
    async with pyblock.Sandbox("sb", vm) as sandbox:
        await sandbox.attach(make_image("a"))
        saved = sandbox.state()
    async with pyblock.Sandbox("sb", vm) as sandbox:
        await sandbox.detach(await sandbox.attach(make_image("x"), driver="virtio-blk"))
        await sandbox.restore(saved)
        assert (await sandbox.attach(make_image("b"))).held.predicted_name == "/dev/sdc"


def test_an_index_has_one_owner() -> None:
    index = pyblock.BlockIndex(8)
    for attempt in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(index)


def test_an_interrupted_blocking_call_is_undone(make_image: MakeImage) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    class Journal(list[tuple[str, str]]):
        """Interrupts the caller at the step that is held back."""

        def append(self, entry: tuple[str, str]) -> None:
            super().append(entry)
            if entry[0] == "device-add":
                loops.append(asyncio.get_running_loop())
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    vm = MemoryHypervisor()
    vm.journal = Journal()
    vm.fail("device-add", Fault("hold"))
    with blocking.Sandbox("sb", vm) as sandbox:
        with pytest.raises(KeyboardInterrupt):
            sandbox.attach(make_image("a"))
        loops[0].call_soon_threadsafe(vm.let_go, "device-add")
        sandbox.settle(LATE)
        assert not sandbox.devices and not vm.devices and not vm.backends


def test_a_blocking_sandbox_may_be_opened_again(make_image: MakeImage) -> None:
    sandbox = blocking.Sandbox("sb", "memory:")
    images = [make_image(f"{number}") for number in range(8)]
    for _ in range(2):
        with sandbox:
            sandbox.detach_many(sandbox.attach_many(images))
    with pytest.raises(pyblock.SandboxClosed):
        sandbox.attach(images[0])


async def test_paths_that_are_no_list(make_image: MakeImage) -> None:
    async with pyblock.Sandbox("sb", "memory:") as sandbox:
        with pytest.raises(pyblock.InvalidValue, match="is one; give a list"):
            await sandbox.attach_many(str(make_image("a")))
        assert await sandbox.attach_many([]) == []


@pytest.mark.parametrize("moment", ["it was handed over", "it has succeeded"])
@pytest.mark.parametrize("many", [False, True])
def test_a_blocking_call_interrupted_as_soon_as(
    moment: str, many: bool, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is interrupted never has the device, so nobody has: it is taken back, and what was
    attached before stays."""
    vm = MemoryHypervisor()
    start = BlockingPortal.start_task_soon
    interruptions = [KeyboardInterrupt()]

    def start_and_interrupt(self: BlockingPortal, function: Any, *more: Any, **named: Any) -> Any:
        future = start(self, function, *more, **named)
        if interruptions:
            interruption = interruptions.pop()
            if moment == "it has succeeded":
                while sum(device.attach_count for device in sandbox.devices) < 2 + many:
                    time.sleep(0)
                sandbox.settle()
            raise interruption
        return future

    first, image = make_image("first"), make_image("a")
    with blocking.Sandbox("one", vm, store=None) as sandbox:
        sandbox.attach(first)
        monkeypatch.setattr(BlockingPortal, "start_task_soon", start_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            if many:
                sandbox.attach_many([first, image])
            else:
                sandbox.attach(image)
        assert [(device.attach_count, device.info.path) for device in sandbox.devices] == [
            (1, str(first))
        ]
        assert len(vm.devices) == 1 and len(sandbox.index) == 1
