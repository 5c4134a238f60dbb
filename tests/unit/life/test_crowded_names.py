"""Names of drives that come together: the guest may see them in any order, so none is predicted."""

from __future__ import annotations

import asyncio

import pytest
from support.held_store import HeldStore, reached
from support.snapshot import MakeImage
from support.turns import SOON, until

from pyblock import AttachPending, BlockDevice, DetachPending, Sandbox, VmmRefused, VmmUnreachable
from pyblock.disk.drivers import SD
from pyblock.kata.schema import encode
from pyblock.vmm.base import FoundDisk
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio


def names(*devices: BlockDevice) -> list[str | None]:
    return [device.held.predicted_name for device in devices]


async def test_one_after_the_other(make_image: MakeImage) -> None:
    async with Sandbox("one", MemoryHypervisor()) as sandbox:
        devices = [await sandbox.attach(make_image(name), driver="virtio-blk") for name in "abc"]
        assert names(*devices) == ["/dev/vda", "/dev/vdb", "/dev/vdc"]
        [alone] = await sandbox.attach_many([make_image("d")], driver="virtio-blk")
        assert names(alone) == ["/dev/vdd"] and alone.held.virt_path == "/dev/vdd"


async def test_a_batch(make_image: MakeImage) -> None:
    async with Sandbox("one", MemoryHypervisor()) as sandbox:
        first = await sandbox.attach(make_image("a"), driver="virtio-blk")
        batch = await sandbox.attach_many([make_image(name) for name in "bcd"], driver="virtio-blk")
        assert names(first, *batch) == ["/dev/vda", None, None, None]
        assert [device.held.virt_path for device in batch] == [None] * 3
        assert [device.held.guess for device in batch] == ["/dev/vdb", "/dev/vdc", "/dev/vdd"]
        assert all(device.held.guest_match for device in batch)
        assert names(await sandbox.attach(make_image("e"), driver="virtio-blk")) == ["/dev/vde"]
        await sandbox.detach(batch[0])
        # the first may have left any of three free
        assert names(await sandbox.attach(make_image("f"), driver="virtio-blk")) == [None]
        assert names(await sandbox.attach(make_image("g"), driver="virtio-blk")) == ["/dev/vdf"]


async def test_families_do_not_crowd_each_other(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-add", Fault("hold"), times=2)
    async with Sandbox("one", vm) as sandbox:
        both = [
            asyncio.create_task(sandbox.attach(make_image(driver), driver=driver))
            for driver in ("virtio-scsi", "virtio-blk")
        ]
        await reached(vm, "device-add", 2)
        vm.let_go("device-add")
        assert names(*await asyncio.gather(*both)) == ["/dev/sda", "/dev/vda"]


async def test_attaches_that_overlap(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-add", Fault("hold"))
    async with Sandbox("one", vm) as sandbox:
        slow = asyncio.create_task(sandbox.attach(make_image("slow")))
        await reached(vm, "device-add")
        quick = await sandbox.attach(make_image("quick"))
        more = await sandbox.attach(make_image("more"))
        vm.let_go("device-add")
        assert names(await slow, quick, more) == [None, None, None]
        assert names(await sandbox.attach(make_image("last"))) == ["/dev/sdd"]


async def test_beside_one_that_is_pending(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-add", Fault("hold"))
    async with Sandbox("one", vm) as sandbox:
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("slow"), timeout=SOON)
        assert names(await sandbox.attach(make_image("quick"))) == [None]
        vm.let_go("device-add")
        await until(lambda: len(sandbox.devices) == 1)
        # the guest may have seen one only, and called it sda
        assert names(await sandbox.attach(make_image("later"))) == [None]


async def test_what_was_refused_is_on_its_way_no_more(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm) as sandbox:
        vm.fail("device-add", Fault("refuse"))
        with pytest.raises(VmmRefused):
            await sandbox.attach(make_image("a"))
        assert names(await sandbox.attach(make_image("b"))) == ["/dev/sda"]
        assert not sandbox._machine.allotment._crowds


async def test_it_is_saved(store: HeldStore, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        await sandbox.attach_many([make_image(name) for name in "ab"], driver="virtio-blk")
        text = encode(sandbox.state())
        # as Kata wants it
        assert b'"VirtPath": "/dev/vda"' in text and b'"VirtPath": "/dev/vdb"' in text
    async with Sandbox("one", vm, store=store) as sandbox:
        devices = [device for device in sandbox.devices if isinstance(device, BlockDevice)]
        assert names(*devices) == [None, None]
        last = await sandbox.attach(make_image("c"), driver="virtio-blk")
        assert names(last) == [None]  # there may have been more of them, who have left
        for device in [*devices, last]:
            await sandbox.detach(device)
        assert names(await sandbox.attach(make_image("d"), driver="virtio-blk")) == ["/dev/vda"]


async def test_one_that_comes_while_another_leaves(make_image: MakeImage) -> None:
    """The guest takes the name back before the machine says that the disk is gone: in a guest the
    next disk had it each time."""
    vm = MemoryHypervisor()
    async with Sandbox("one", vm) as sandbox:
        first = await sandbox.attach(make_image("first"))
        vm.fail("device-gone", Fault("hold"))
        leaving = asyncio.create_task(sandbox.detach(first))
        await reached(vm, "device-gone")
        second = await sandbox.attach(make_image("second"))
        assert names(second) == [None]
        vm.let_go("device-gone")
        await leaving
        # it is sda or sdb, and so is the second
        assert names(await sandbox.attach(make_image("third"))) == [None]
        assert names(await sandbox.attach(make_image("fourth"))) == ["/dev/sdc"]


async def test_one_that_leaves_while_another_comes(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm) as sandbox:
        first = await sandbox.attach(make_image("first"))
        vm.fail("device-add", Fault("hold"))
        coming = asyncio.create_task(sandbox.attach(make_image("second")))
        await reached(vm, "device-add")
        await sandbox.detach(first)
        vm.let_go("device-add")
        assert names(await coming, await sandbox.attach(make_image("third"))) == [None, None]


async def test_one_that_comes_below_what_leaves(make_image: MakeImage) -> None:
    """The lowest free name is its own, whenever that of the other becomes free."""
    vm = MemoryHypervisor()
    async with Sandbox("one", vm) as sandbox:
        first, second = [await sandbox.attach(make_image(name)) for name in ("first", "second")]
        await sandbox.detach(first)
        vm.fail("device-gone", Fault("hold"))
        leaving = asyncio.create_task(sandbox.detach(second))
        await reached(vm, "device-gone")
        assert names(await sandbox.attach(make_image("third"))) == ["/dev/sda"]
        vm.let_go("device-gone")
        await leaving
        assert names(await sandbox.attach(make_image("fourth"))) == ["/dev/sdb"]


@pytest.mark.parametrize("why", [VmmRefused, VmmUnreachable])
async def test_one_that_was_kept_has_its_name(why: type[Exception], make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm) as sandbox:
        first = await sandbox.attach(make_image("first"))
        vm.fail("device-gone", Fault("refuse"))
        vm.dead = why is VmmUnreachable
        with pytest.raises(why):
            await sandbox.detach(first)
        vm.dead = False
        assert names(first, await sandbox.attach(make_image("second"))) == ["/dev/sda", "/dev/sdb"]


async def test_a_removal_that_was_pending_before_a_restart(
    store: HeldStore, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        first = await sandbox.attach(make_image("first"))
        vm.fail("device-gone", Fault("hold"))
        with pytest.raises(DetachPending):
            await sandbox.detach(first, timeout=SOON)
    vm.fail("device-gone", Fault("hold"))
    async with Sandbox("one", vm, store=store, recover=False) as sandbox:
        assert names(await sandbox.attach(make_image("second"))) == [None]


@pytest.mark.parametrize("change", ["one more", "one less"])
async def test_the_machines_own_disks_change(change: str, make_image: MakeImage) -> None:
    """Which names they had nobody tells: in a guest the next disk had the name of one that had
    left, or one more than was predicted."""
    own = [FoundDisk("own1", SD), FoundDisk("own2", SD)]
    vm = MemoryHypervisor(existing=tuple(own))
    async with Sandbox("one", vm) as sandbox:
        first = await sandbox.attach(make_image("first"))
        assert await sandbox.reconcile() == []
        assert names(first, await sandbox.attach(make_image("second"))) == ["/dev/sdc", "/dev/sdd"]
        vm._existing = (*own, FoundDisk("own3", SD)) if change == "one more" else (own[0],)
        await sandbox.reconcile()
        third = await sandbox.attach(make_image("third"))
        assert names(
            first, third, await sandbox.attach(make_image("other"), driver="virtio-blk")
        ) == ["/dev/sdc", None, "/dev/vda"]
        vm._existing = tuple(own)
        await sandbox.reconcile()
        assert names(await sandbox.attach(make_image("fourth"))) == [None]
        await sandbox.detach_many(sandbox.devices)
        # each that was crowded has been counted, and has gone
        assert not sandbox._machine.allotment._crowds


async def test_an_offset_that_was_given_is_no_count(make_image: MakeImage) -> None:
    async with Sandbox("one", MemoryHypervisor(), block_offset=3) as sandbox:
        assert names(await sandbox.attach(make_image("a"), driver="virtio-blk")) == ["/dev/vdd"]
        await sandbox.reconcile()
        assert names(await sandbox.attach(make_image("b"), driver="virtio-blk")) == ["/dev/vde"]
