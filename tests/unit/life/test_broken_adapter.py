"""An adapter that fails with what is no error of pyblock's: an answer of a form that nobody thought
of, or a mistake in the adapter.

Nobody knows then how far a change of the machine got: the device is pending, neither free nor
attached. Where nothing is changed, it is a VmmProtocolError.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.snapshot import MakeImage, refused
from support.turns import BEGUN

from pyblock import (
    AttachPending,
    BlockDevice,
    DetachPending,
    InvalidState,
    Phase,
    Sandbox,
    VmmProtocolError,
    VmmRefused,
)
from pyblock.disk.drivers import SD
from pyblock.disk.model import BlockDrive, Place
from pyblock.kata.schema import decode
from pyblock.life.recovery import Outcome
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.base import FoundDisk, Inventory
from pyblock.vmm.memory.file import FileMachine
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio

BROKEN = [Fault("break", done=True), Fault("break", done=False)]
done_or_not = pytest.mark.parametrize("fault", BROKEN, ids=["done", "not done"])


def pending(sandbox: Sandbox, phase: Phase) -> BlockDevice:
    [device] = sandbox.devices
    assert isinstance(device, BlockDevice) and device.phase is phase
    assert list(sandbox.index) == [device.held.index]
    return device


def gone(sandbox: Sandbox, vm: MemoryHypervisor) -> None:
    assert not sandbox.devices and not len(sandbox.index) and not vm.devices and not vm.backends


@done_or_not
@pytest.mark.parametrize("step", ["backend-add", "device-add"])
async def test_in_an_attach(
    step: str, fault: Fault, store: SqliteStore, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    vm.fail(step, fault)
    async with Sandbox("one", vm, store=store) as sandbox:
        with pytest.raises(AttachPending, match="told to break") as caught:
            await sandbox.attach(make_image("a"))
        assert isinstance(caught.value.__cause__, VmmProtocolError) and isinstance(
            caught.value.__cause__.__cause__, KeyError
        )
        pending(sandbox, Phase.ATTACH_PENDING)
        await sandbox.attach(make_image("b"))  # asks first, and undoes
        assert len(vm.backends) == len(vm.devices) == len(sandbox.devices) == 1


@done_or_not
async def test_in_the_undoing_of_an_attach(fault: Fault, make_image: MakeImage) -> None:
    """Once it freed index and claim while the machine held the image."""
    vm = MemoryHypervisor()
    vm.fail("device-add", Fault("refuse"))
    vm.fail("backend-del", fault)
    async with Sandbox("one", vm) as sandbox:
        with pytest.raises(VmmRefused, match="device-add") as caught:
            await sandbox.attach(make_image("a"))
        assert any("told to break" in note for note in caught.value.__notes__)
        device = pending(sandbox, Phase.ATTACH_PENDING)
        await sandbox.detach(device)
        gone(sandbox, vm)


@done_or_not
@pytest.mark.parametrize("step", ["device-del", "device-gone", "backend-del"])
async def test_in_a_detach(step: str, fault: Fault, make_image: MakeImage) -> None:
    """Once it left the device "attached" with nothing there."""
    vm = MemoryHypervisor()
    async with Sandbox("one", vm) as sandbox:
        device = await sandbox.attach(make_image("a"))
        vm.fail(step, fault)
        with pytest.raises(DetachPending, match="told to break"):
            await sandbox.detach(device)
        assert pending(sandbox, Phase.DETACH_PENDING) is device
        await sandbox.detach(device)
        gone(sandbox, vm)


class Broken(MemoryHypervisor):
    """Its methods, as they are named, fail."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: set[str] = set()
        self.answer: Any = None

    def check(self, method: str) -> None:
        if method in self.broken:
            raise AttributeError(f"{method} is broken")

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        self.check("inventory")
        answer: Inventory = await super().inventory(ours) if self.answer is None else self.answer
        return answer

    async def place(self, drive: BlockDrive) -> Place:
        self.check("place")
        return await super().place(drive)

    async def plug(self, drive: BlockDrive, *more: Any) -> None:
        await super().plug(drive, *more)
        self.check("plug")

    async def unplug(self, drive: BlockDrive) -> None:
        await super().unplug(drive)
        self.check("unplug")

    async def locate(self, drive: BlockDrive) -> None:
        self.check("locate")
        await super().locate(drive)

    def give_back(self, drive: BlockDrive) -> None:
        self.check("give_back")
        super().give_back(drive)

    def nudge(self, drive: BlockDrive) -> None:
        self.check("nudge")
        super().nudge(drive)

    async def is_gone(self) -> bool:
        self.check("is_gone")
        return await super().is_gone()


@pytest.mark.parametrize("method", ["inventory", "place"])
async def test_what_changes_nothing_is_a_protocol_error(method: str, make_image: MakeImage) -> None:
    vm = Broken()
    vm.broken.add(method)
    async with Sandbox("one", vm) as sandbox:
        with refused(sandbox, vm, VmmProtocolError, f"{method} is broken"):
            await sandbox.attach(make_image("a"))


@pytest.mark.parametrize("method", ["plug", "locate"])
async def test_an_adapter_of_another_make_breaks_in_plug(
    method: str, make_image: MakeImage
) -> None:
    vm = Broken()
    vm.broken.add(method)
    async with Sandbox("one", vm) as sandbox:
        with pytest.raises(AttachPending, match=f"{method} is broken"):
            await sandbox.attach(make_image("a"))
        pending(sandbox, Phase.ATTACH_PENDING)


async def test_an_adapter_of_another_make_breaks_in_unplug(make_image: MakeImage) -> None:
    vm = Broken()
    async with Sandbox("one", vm) as sandbox:
        device = await sandbox.attach(make_image("a"))
        vm.broken.add("unplug")
        with pytest.raises(DetachPending, match="unplug is broken"):
            await sandbox.detach(device)
        pending(sandbox, Phase.DETACH_PENDING)


async def test_whatever_vacate_does_what_is_gone_is_free(make_image: MakeImage) -> None:
    vm = Broken()
    async with Sandbox("one", vm) as sandbox:
        device = await sandbox.attach(make_image("a"))
        vm.broken.add("give_back")
        await sandbox.detach(device)
        gone(sandbox, vm)


async def test_a_nudge_that_fails_changes_nothing(make_image: MakeImage) -> None:
    vm = Broken()
    async with Sandbox("one", vm) as sandbox:
        device = await sandbox.attach(make_image("a"))
        vm.fail("device-gone", Fault("hold"))
        vm.broken.add("nudge")
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=BEGUN)
        again = asyncio.create_task(sandbox.detach(device))
        await asyncio.sleep(0)
        vm.let_go("device-gone")
        await again
        gone(sandbox, vm)


async def test_forget_on_a_machine_that_cannot_be_told(make_image: MakeImage) -> None:
    vm = Broken()
    async with Sandbox("one", vm) as sandbox:
        await sandbox.attach(make_image("a"))
        vm.broken.add("is_gone")
        with refused(sandbox, vm, VmmProtocolError, "is_gone is broken"):
            await sandbox.forget()


@pytest.mark.parametrize("answer", [{}, [], 7, ("disks", {})])
async def test_an_answer_that_is_no_inventory(answer: object, make_image: MakeImage) -> None:
    vm = Broken()
    async with Sandbox("one", vm) as sandbox:
        await sandbox.attach(make_image("a"))
        vm.answer = answer
        with refused(sandbox, vm, VmmProtocolError, "is no Inventory"):
            await sandbox.reconcile()


async def test_a_disk_at_an_impossible_index_is_at_none_of_ours(make_image: MakeImage) -> None:
    vm = Broken()
    vm.answer = Inventory([FoundDisk("x", SD, -3)])
    async with Sandbox("one", vm) as sandbox:
        assert (await sandbox.attach(make_image("a"))).held.index == 0


@done_or_not
@pytest.mark.parametrize("step", ["device-del", "device-gone", "backend-del"])
async def test_what_breaks_while_it_is_settled_is_pending(
    step: str, fault: Fault, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm) as sandbox:
        vm.fail("device-add", Fault("lose"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("a"))
        vm.fail(step, fault)
        [one] = await sandbox.reconcile()
        assert one.outcome is Outcome.PENDING and "told to break" in one.note
        pending(sandbox, Phase.ATTACH_PENDING)
        await sandbox.reconcile()
        gone(sandbox, vm)


async def test_locating_what_the_machine_does_not_let_go_of(make_image: MakeImage) -> None:
    vm = Broken()
    async with Sandbox("one", vm) as sandbox:
        vm.fail("device-add", Fault("lose"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("a"))
        vm.fail("device-del", Fault("refuse"))
        vm.broken.add("locate")
        [one] = await sandbox.reconcile()
        assert one.outcome is Outcome.PENDING
        pending(sandbox, Phase.ATTACH_PENDING)


# What a file says.


@pytest.mark.parametrize("slot", ["", "x", "-1", "960", "9" * 5000, "٣", "rp0/0"])
async def test_a_slot_that_no_such_machine_has(slot: str, store: SqliteStore) -> None:
    """It stands in a saved state, which anybody may have written. Once a ValueError, with half of
    the state loaded."""
    drive = samples.drive(
        0, PCIPath="02/00", Pyblock={"Driver": "virtio-blk", "Ordinal": 0, "Slot": slot}
    )
    good = samples.drive(
        1, PCIPath="02/01", Pyblock={"Driver": "virtio-blk", "Ordinal": 1, "Slot": "1"}
    )
    options = {"block-driver": "virtio-blk"}
    devices = [
        samples.device(1, good, DriverOptions=options),
        samples.device(0, drive, DriverOptions=options),
    ]
    text = samples.text(samples.sandbox(devices, [0, 1]))
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        with refused(sandbox, vm, InvalidState, "slot", "device 0000000000000000"):
            await sandbox.restore(decode(text, where="it"), where="it")
        assert sandbox._machine.allotment.unused and vm._slots == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda have: have.update(backends=[]),
        lambda have: have.update(devices={"drive-a": 7}),
        lambda have: have.update(devices={"drive-a": []}),
        lambda have: have.update(devices={"drive-a": "no-such-driver 1"}),
        lambda have: have.update(devices=None),
        lambda have: have.update(backends={"drive-a": {"x": 1}}),
    ],
)
async def test_a_machine_in_a_file_of_another_form(
    change: Callable[[Any], None], tmp_path: Path, make_image: MakeImage
) -> None:
    path = tmp_path / "machine"
    path.write_bytes(b"")
    async with Sandbox("one", FileMachine(path), store=None) as sandbox:
        await sandbox.attach(make_image("a"))
        have = json.loads(path.read_text())
        change(have)
        path.write_text(json.dumps(have))
        with pytest.raises(VmmProtocolError, match="no machine in memory"):
            await sandbox.reconcile()
