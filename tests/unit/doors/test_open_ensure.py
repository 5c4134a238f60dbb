"""`open` and `ensure`: a call that is made again finds what it wants done already."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from support.snapshot import MakeImage, MakeStore

from pyblock import (
    AttachPending,
    DetachPending,
    DeviceConflict,
    Fault,
    InvalidID,
    MemoryHypervisor,
    Phase,
    Sandbox,
    SandboxBusy,
    SandboxClosed,
    VmmRefused,
    blocking,
)

pytestmark = pytest.mark.anyio


def plugs(vm: MemoryHypervisor) -> int:
    return sum(step == "device-add" for step, _ in vm.journal)


# open


async def test_open_is_what_async_with_does(make_store: MakeStore, make_image: MakeImage) -> None:
    store, vm, image = make_store(), MemoryHypervisor(), make_image("a")
    sandbox = Sandbox("s1", vm, store=store)
    with pytest.raises(SandboxClosed):
        await sandbox.attach(image)
    assert await sandbox.open() is sandbox
    await sandbox.attach(image)
    with pytest.raises(SandboxBusy):
        await Sandbox("s1", vm, store=store).open()
    await sandbox.close()
    with pytest.raises(SandboxClosed):
        await sandbox.attach(image)
    # and once more, as often as one likes
    assert [len(one.devices) for one in [await sandbox.open()]] == [1]
    await sandbox.close()


async def test_an_open_sandbox_stays_as_it_is(make_store: MakeStore, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    sandbox = await Sandbox("s1", vm, store=make_store()).open()
    device = await sandbox.attach(make_image("a"))
    assert await sandbox.open() is sandbox and sandbox.devices == [device]
    async with sandbox as same:
        assert same is sandbox and sandbox.devices == [device]
    with pytest.raises(SandboxClosed):  # whoever leaves closes it
        await sandbox.detach(device)


async def test_two_who_open_at_once_open_once(make_store: MakeStore) -> None:
    store = make_store()
    sandbox = Sandbox("s1", MemoryHypervisor(), store=store)
    opened = 0
    take = store.open_sandbox

    async def counted(*arguments: object) -> object:
        nonlocal opened
        opened += 1
        return await take(*arguments)  # type: ignore[arg-type]

    store.open_sandbox = counted  # type: ignore[method-assign, assignment]
    assert await asyncio.gather(*(sandbox.open() for _ in range(3))) == [sandbox] * 3
    assert opened == 1
    await sandbox.close()


async def test_opening_that_fails_can_be_tried_again(make_store: MakeStore) -> None:
    store = make_store()
    async with Sandbox("s1", MemoryHypervisor(), store=store):
        sandbox = Sandbox("s1", MemoryHypervisor(), store=store)
        outcomes = await asyncio.gather(sandbox.open(), sandbox.open(), return_exceptions=True)
        assert [type(one) for one in outcomes] == [SandboxBusy] * 2
    await sandbox.open()
    await sandbox.close()


def test_open_without_an_event_loop(make_store: MakeStore, make_image: MakeImage) -> None:
    sandbox = blocking.Sandbox("s1", MemoryHypervisor(), store=make_store())
    assert sandbox.open() is sandbox and sandbox.open() is sandbox
    device = sandbox.attach(make_image("a"))
    sandbox.close()
    with pytest.raises(SandboxClosed):
        sandbox.detach(device)
    with sandbox:
        assert len(sandbox.devices) == 1


# ensure


async def test_ensure_attaches_once_and_counts_once(
    make_image: MakeImage, make_store: MakeStore
) -> None:
    vm, image, store = MemoryHypervisor(), make_image("a"), make_store()
    async with Sandbox("s1", vm, store=store) as sandbox:
        device = await sandbox.ensure(device_id="data", path=image)
        assert (device.id, device.attach_count, device.drive.index) == ("data", 1, 0)
        for _ in range(3):
            assert (
                await sandbox.ensure(device_id="data", path=image, driver="virtio-scsi") is device
            )
        assert (device.attach_count, device.ref_count, plugs(vm)) == (1, 1, 1)
    async with Sandbox("s1", vm, store=store) as sandbox:  # a program that was started anew
        device = await sandbox.ensure(device_id="data", path=image)
        assert (device.attach_count, plugs(vm)) == (1, 1)
        await sandbox.detach(device)
        assert (sandbox.devices, vm.devices, list(sandbox.index)) == ([], {}, [])
        assert (await sandbox.ensure(device_id="data", path=image)).attach_count == 1


async def test_two_at_once_plug_once(make_image: MakeImage, make_store: MakeStore) -> None:
    vm, image = MemoryHypervisor(), make_image("a")
    async with Sandbox("s1", vm, store=make_store()) as sandbox:
        devices = await asyncio.gather(
            *(sandbox.ensure(device_id="data", path=image) for _ in range(5))
        )
        assert len(set(devices)) == 1
        assert (devices[0].attach_count, devices[0].ref_count, plugs(vm)) == (1, 1, 1)
        await sandbox.detach("data")
        assert not sandbox.devices


async def test_an_attach_under_way_is_waited_for(make_image: MakeImage) -> None:
    vm, image = MemoryHypervisor(), make_image("a")
    async with Sandbox("s1", vm) as sandbox:
        vm.fail("device-add", Fault("hold"))
        attaching = asyncio.ensure_future(sandbox.attach(image, device_id="data"))
        while not vm.journal:
            await asyncio.sleep(0)
        ensuring = asyncio.ensure_future(sandbox.ensure(device_id="data", path=image))
        with pytest.raises(AttachPending):
            await sandbox.ensure(device_id="data", path=image, timeout=0)
        vm.let_go("device-add")
        device = await attaching
        assert await ensuring is device
        assert (device.attach_count, plugs(vm)) == (1, 1)


async def test_a_detach_under_way_is_waited_for(make_image: MakeImage) -> None:
    vm, image = MemoryHypervisor(), make_image("a")
    async with Sandbox("s1", vm) as sandbox:
        first = await sandbox.ensure(device_id="data", path=image)
        vm.fail("device-gone", Fault("hold"))
        detaching = asyncio.ensure_future(sandbox.detach(first))
        while vm.journal[-1][0] != "device-gone":
            await asyncio.sleep(0)
        ensuring = asyncio.ensure_future(sandbox.ensure(device_id="data", path=image))
        with pytest.raises(DetachPending):
            await sandbox.ensure(device_id="data", path=image, timeout=0)
        vm.let_go("device-gone")
        await detaching
        device = await ensuring
        assert (device.id, device.attach_count, plugs(vm)) == ("data", 1, 2)
        assert [one.id for one in sandbox.devices] == ["data"]


Asked = Callable[[Path, Path], dict[str, object]]
CONFLICTS: dict[str, Asked] = {
    "the ID with another image": lambda image, other: {"device_id": "data", "path": other},
    "the image under another ID": lambda image, other: {"device_id": "more", "path": image},
    "another driver": lambda image, other: {
        "device_id": "data",
        "path": image,
        "driver": "virtio-blk",
    },
    "another access": lambda image, other: {"device_id": "data", "path": image, "read_only": True},
    "another serial": lambda image, other: {"device_id": "data", "path": image, "serial": "x"},
    "another sharing": lambda image, other: {"device_id": "data", "path": image, "share": True},
}


@pytest.mark.parametrize("name", CONFLICTS)
async def test_what_is_there_otherwise_is_a_conflict(name: str, make_image: MakeImage) -> None:
    vm, image, other = MemoryHypervisor(), make_image("a"), make_image("b")
    async with Sandbox("s1", vm) as sandbox:
        device = await sandbox.ensure(device_id="data", path=image)
        with pytest.raises(DeviceConflict):
            await sandbox.ensure(**CONFLICTS[name](image, other))  # type: ignore[arg-type]
        assert sandbox.devices == [device]
        assert (device.attach_count, device.ref_count, plugs(vm)) == (1, 1, 1)


async def test_one_that_fails_leaves_nothing(make_image: MakeImage) -> None:
    vm, image = MemoryHypervisor(), make_image("a")
    async with Sandbox("s1", vm) as sandbox:
        vm.fail("device-add", Fault("refuse"))
        with pytest.raises(VmmRefused):
            await sandbox.ensure(device_id="data", path=image)
        with pytest.raises(InvalidID):
            await sandbox.ensure(device_id="", path=image)
        assert (sandbox.devices, list(sandbox.index)) == ([], [])
        vm.fail("device-add", Fault("refuse"))
        first, *others = await asyncio.gather(
            *(sandbox.ensure(device_id="data", path=image) for _ in range(3)),
            return_exceptions=True,
        )
        # whoever waited tries it again, and is the one that plugs it in
        assert isinstance(first, VmmRefused)
        assert [one.attach_count for one in others if not isinstance(one, BaseException)] == [1, 1]


async def test_beside_what_is_counted_otherwise(make_image: MakeImage) -> None:
    """What others attach and detach is theirs; what was ensured goes with the last of them, as any
    attach does."""
    image = make_image("a")
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        device = await sandbox.ensure(device_id="data", path=image)
        await sandbox.attach(image)
        assert (
            await sandbox.ensure(device_id="data", path=image) is device
            and device.attach_count == 2
        )
        await sandbox.detach(device)
        assert device.phase is Phase.ATTACHED
        await sandbox.detach(device)
        assert not sandbox.devices


def test_ensure_without_an_event_loop(make_image: MakeImage) -> None:
    vm, image = MemoryHypervisor(), make_image("a")
    with blocking.Sandbox("s1", vm) as sandbox:
        device = sandbox.ensure(device_id="data", path=image)
        assert sandbox.ensure(image, device_id="data") is device
        assert (device.attach_count, plugs(vm)) == (1, 1)
        with pytest.raises(DeviceConflict):
            sandbox.ensure(image, device_id="other")
