"""What gets in each other's way while a machine is being asked what it has: an answer is older than
what happened meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from support.children import in_child
from support.held_store import Gate, HeldStore, SlowMachine, facts, nothing_left, reached, rows
from support.snapshot import MakeImage
from support.turns import until

from pyblock import (
    AttachPending,
    BlockDevice,
    DetachPending,
    DeviceConflict,
    Phase,
    Sandbox,
    UnknownDevice,
)
from pyblock.disk.drivers import SD
from pyblock.disk.model import BlockDrive
from pyblock.life import machine
from pyblock.life.recovery import Found, Outcome
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.base import FoundDisk
from pyblock.vmm.memory.file import FileMachine
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


async def test_a_detach_that_ends_while_the_machine_is_being_asked(make_image: MakeImage) -> None:
    vm = SlowMachine()
    async with Sandbox("one", vm, store=None) as sandbox:
        image = make_image("a")
        device = await sandbox.attach(image, device_id="a")
        gate = vm.answer = Gate()
        reconciling = asyncio.create_task(sandbox.reconcile())
        await until(lambda: gate.reached)
        await sandbox.detach(device)
        gate.let_go()
        assert await reconciling == []
        nothing_left(sandbox)
        again = await sandbox.attach(image, device_id="a")
        assert (again.held.index, again.held.predicted_name) == (0, "/dev/sda")


async def test_the_machines_own_disks_come_and_go(make_image: MakeImage) -> None:
    vm = SlowMachine()
    vm._existing = (FoundDisk("drive-x", SD, 0), FoundDisk("own", SD, 2))
    async with Sandbox("one", vm, store=None) as sandbox:
        first = await sandbox.attach(make_image("a"), device_id="a")
        assert first.held.index == 1 and list(sandbox.index) == [0, 1, 2]
        image = make_image("x")
        with pytest.raises(DeviceConflict, match="drive-x"):
            await sandbox.attach(image, device_id="x")
        vm._existing = (FoundDisk("other", SD, 3),)
        await sandbox.reconcile()
        assert list(sandbox.index) == [1, 3]
        assert (await sandbox.attach(image, device_id="x")).held.index == 0
        assert (await sandbox.attach(make_image("b"))).held.index == 2


async def test_the_id_of_an_orphan_that_was_removed_is_free(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    vm.backends["drive-q"], vm.devices["drive-q"] = "/somewhere", "virtio-scsi 0"
    vm._places.add("virtio-scsi 0")
    async with Sandbox("one", vm, store=None) as sandbox:
        image = make_image("q")
        with pytest.raises(DeviceConflict, match="drive-q"):
            await sandbox.attach(image, device_id="q")
        assert [one.outcome for one in await sandbox.reconcile(orphans=True)] == [Outcome.REMOVED]
        await sandbox.attach(image, device_id="q")
        assert vm.backends == {"drive-q": str(image)}


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_lost_device_ends_however_often_it_was_attached(
    count: int, store: HeldStore, make_image: MakeImage
) -> None:
    vm, image = MemoryHypervisor(), make_image("a")
    async with Sandbox("one", vm, store=store) as sandbox:
        for _ in range(count):
            device = await sandbox.attach(image, device_id="a")
        vm.devices.clear()
        vm.backends.clear()
        vm._places.clear()
        assert [(one.found, one.outcome) for one in await sandbox.reconcile()] == [
            (Found.LOST, Outcome.FREED)
        ]
        nothing_left(sandbox)
        assert rows(store) == {}
        # quiet once, as after any end that its user has not been told of
        await sandbox.detach(device)
        with pytest.raises(UnknownDevice):
            await sandbox.detach(device)
        await sandbox.attach(image, read_only=True)


async def test_a_detach_that_begins_while_an_attach_is_being_finished(
    store: HeldStore, make_image: MakeImage
) -> None:
    vm = SlowMachine()
    async with Sandbox("one", vm, store=store) as sandbox:
        vm.fail("device-add", Fault("lose"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("a"), device_id="a")
        gate = vm.place_told = Gate()
        vm.fail("device-del", Fault("refuse"))
        vm.fail("device-gone", Fault("hold"))
        reconciling = asyncio.create_task(sandbox.reconcile(timeout=None))
        await until(lambda: gate.reached)
        detach = asyncio.create_task(sandbox.detach("a"))  # waits for its turn
        await asyncio.sleep(0)
        gate.let_go()
        assert [(one.found, one.outcome) for one in await reconciling] == [
            (Found.ATTACH, Outcome.FINISHED)
        ]
        await reached(vm, "device-gone")
        assert facts(sandbox)["a"] == (Phase.DETACHING, 1)
        vm.let_go("device-gone")
        await detach
        nothing_left(sandbox)
        assert not vm.devices and not vm.backends and rows(store) == {}


async def test_a_doubt_that_arises_while_the_machine_is_being_asked(make_image: MakeImage) -> None:
    vm = SlowMachine()
    async with Sandbox("one", vm, store=None) as sandbox:
        await sandbox.attach(make_image("z"), device_id="z")
        gate = vm.answer = Gate()
        reconciling = asyncio.create_task(sandbox.reconcile())
        await until(lambda: gate.reached)
        vm.fail("device-add", Fault("lose"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("a"), device_id="a")
        gate.let_go()
        assert await reconciling == []
        vm.answer, asked = None, vm.asked
        await sandbox.attach(make_image("b"), device_id="b")
        assert vm.asked == asked + 1
        await until(lambda: facts(sandbox).keys() == {"z", "b"})
        assert vm.devices.keys() == {"drive-z", "drive-b"}


def test_the_slot_of_an_attach_is_known_after_its_process_died(
    make_image: MakeImage, tmp_path: Path
) -> None:
    machine, path = tmp_path / "vm", tmp_path / "state.db"
    machine.touch()
    images = {name: make_image(name) for name in ("first", "a", "b", "c")}

    class Last(FileMachine):
        async def device_add(self, drive: BlockDrive) -> None:
            await super().device_add(drive)
            if drive.id == "drive-a":
                os.kill(os.getpid(), signal.SIGKILL)

    def victim() -> str:
        async def run() -> None:
            async with Sandbox(
                "one", Last(machine), driver="virtio-blk", store=SqliteStore(path)
            ) as sandbox:
                for name in ("first", "a"):
                    await sandbox.attach(images[name], device_id=name)

        asyncio.run(run())
        return "it was not killed"

    async def take_over(store: SqliteStore) -> None:
        vm = FileMachine(machine)
        vm.fail("device-del", Fault("refuse"))
        async with Sandbox("one", vm, driver="virtio-blk", store=store) as sandbox:
            assert [(one.device_id, one.outcome) for one in sandbox.recovered] == [
                ("a", Outcome.FINISHED)
            ]
            drives = {one.id: one.held for one in sandbox.devices if isinstance(one, BlockDevice)}
            assert {name: (drive.place, drive.pci_path) for name, drive in drives.items()} == {
                "first": ("0", "02/00"),
                "a": ("1", "02/01"),
            }
            assert drives["a"].guest_match
            assert (await sandbox.attach(images["b"])).held.place == "2"
            await sandbox.detach("a")
            assert (await sandbox.attach(images["c"])).held.place == "1"
        store.close()

    status, text = in_child(victim)
    assert status == -signal.SIGKILL, text
    asyncio.run(take_over(SqliteStore(path)))


async def test_what_is_remembered_for_late_callers_is_bounded(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = 4
    monkeypatch.setattr(machine, "LATE_MAX", bound)
    vm, image = MemoryHypervisor(), make_image("a")
    async with Sandbox("one", vm, store=None) as sandbox:
        for number in range(2 * bound):
            await sandbox.attach(image, device_id=f"{number}")
            vm.fail("device-gone", Fault("hold"))
            with pytest.raises(DetachPending):
                await sandbox.detach(f"{number}", timeout=0)
            vm.let_go("device-gone")
            await until(lambda: not sandbox.devices)
        for number in range(bound):
            with pytest.raises(UnknownDevice):
                await sandbox.detach(f"{number}")
        for number in range(bound, 2 * bound):
            await sandbox.detach(f"{number}")


@pytest.mark.parametrize("left", ["nothing", "backend"])
async def test_two_who_ask_at_once_find_the_same(left: str, make_image: MakeImage) -> None:
    """One of them settles it; the other has nothing to settle any more."""
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=None) as sandbox:
        await sandbox.attach(make_image("a"))
        vm.devices.clear()
        vm._places.clear()
        if left == "nothing":
            vm.backends.clear()
        found = await asyncio.gather(sandbox.reconcile(), sandbox.reconcile())
        assert sorted(map(len, found)) == [0, 1]
        assert [one.found for one in found[0] + found[1]] == [Found.LOST]
        nothing_left(sandbox)
        assert not vm.backends
