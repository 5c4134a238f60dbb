"""Every wrong argument has its own error, which names the value; and nothing was changed, nothing
sent."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from support.snapshot import Busy, MakeImage, machine, refused, snapshot

import pyblock
from pyblock import (
    DeviceInfo,
    IndexesExhausted,
    IndexFree,
    InvalidAddress,
    InvalidID,
    InvalidImage,
    InvalidIndex,
    InvalidName,
    InvalidTimeout,
    InvalidValue,
    NotAttached,
    Sandbox,
    SandboxClosed,
    SlotsExhausted,
    UnknownDevice,
    UnknownDriver,
    UnknownScheme,
    VmmRefused,
)
from pyblock.blocking import Sandbox as BlockingSandbox
from pyblock.life import road
from pyblock.vmm.base import Offer
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("driver", ["virtio-ide", "VIRTIO-SCSI", "virtio-scsi ", "scsi", "\0"])
async def test_unknown_driver(busy: Busy, make_image: MakeImage, driver: str) -> None:
    path = make_image("new")
    with refused(busy.sandbox, busy.vm, UnknownDriver, repr(driver), *pyblock.DRIVERS):
        await busy.sandbox.attach(path, driver=driver)
    with refused(busy.sandbox, busy.vm, UnknownDriver, repr(driver)):
        await busy.sandbox.attach(DeviceInfo(path=str(path), options={"block-driver": driver}))
    with pytest.raises(UnknownDriver, match="known are"):
        Sandbox("s1", "memory:", driver=driver)


async def test_driver_that_this_vmm_does_not_have(make_image: MakeImage) -> None:
    class NoMmio(MemoryHypervisor):
        offers: Mapping[str, Offer] = {name: Offer() for name in ("virtio-scsi", "virtio-blk")}

    vm = NoMmio()
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.attach(make_image("fine"))
        with refused(sandbox, vm, UnknownDriver, "'virtio-mmio'", "virtio-blk, virtio-scsi"):
            await sandbox.attach(make_image("new"), driver="virtio-mmio")


@pytest.mark.parametrize(
    "address", ["", "qemu", "xen:/run/vm", "QEMU:/run/vm", ":", "/run/vm1/qmp.sock", " qemu:/run"]
)
def test_unknown_scheme(address: str) -> None:
    for kind in (Sandbox, BlockingSandbox):
        with pytest.raises(UnknownScheme) as caught:
            kind("s1", address)
        assert repr(address) in str(caught.value)
        assert "qemu:" in str(caught.value)


@pytest.mark.parametrize("capacity", [0, -1, 2**20 + 1, 2**63, -(2**64)])
def test_capacity(capacity: int) -> None:
    with pytest.raises(InvalidIndex, match=str(capacity)):
        Sandbox("s1", "memory:", capacity=capacity)


async def test_numbers_that_python_does_not_write(make_image: MakeImage) -> None:
    for offset in (10**5000, -(10**5000)):
        with pytest.raises(InvalidValue, match="bits"):
            Sandbox("s1", "memory:", block_offset=offset)
    with pytest.raises(InvalidID, match="bits"):
        Sandbox(10**5000, "memory:")  # type: ignore[arg-type]
    async with Sandbox("s1", "memory:") as sandbox:
        with pytest.raises(InvalidTimeout, match="bits"):
            await sandbox.attach(make_image("image"), timeout=10**5000)


@pytest.mark.parametrize("offset", [-1, 65536, 2**70])
def test_block_offset(offset: int) -> None:
    with pytest.raises(InvalidValue, match=str(offset)):
        Sandbox("s1", "memory:", block_offset=offset)


def test_slots_of_the_machine_in_memory() -> None:
    for slots in (-1, 961):
        with pytest.raises(InvalidValue, match=str(slots)):
            MemoryHypervisor(slots=slots)
    with pytest.raises(InvalidValue, match="'device-sub'"):
        MemoryHypervisor().fail("device-sub", Fault("refuse"))


@pytest.mark.parametrize("number", [-1, 2**63])
def test_numbers_without_a_name(number: int) -> None:
    with pytest.raises(InvalidIndex, match=str(number)):
        pyblock.drive_name(number)


@pytest.mark.parametrize(
    "name", ["", "vd", "vdA", "vd1", "sda", "/dev/vda", "vda ", "vd" + "z" * 30]
)
def test_malformed_names(name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        pyblock.drive_index(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("index", [-1, 65536])
def test_indexes_without_an_address(index: int) -> None:
    with pytest.raises(InvalidIndex, match=str(index)):
        pyblock.scsi_address(index)


@pytest.mark.parametrize(
    "address",
    [
        "",
        ":",
        "1",
        "1:",
        ":1",
        "256:0",
        "0:256",
        "-1:0",
        "01:0",
        "1:2:3",
        " 1:2",
        "1:2\n",
        "\uff11:2",
        "0x1:0",
    ],
)
def test_malformed_scsi_addresses(address: str) -> None:
    with pytest.raises(InvalidAddress) as caught:
        pyblock.scsi_index(address)
    assert repr(address) in str(caught.value)


def test_release_of_a_free_index() -> None:
    index = pyblock.BlockIndex(4)
    with pytest.raises(IndexFree, match="0"):
        index.release(0)
    index.release(index.acquire())
    with pytest.raises(IndexFree, match="0"):
        index.release(0)
    with pytest.raises(InvalidIndex, match="4"):
        index.release(4)
    assert list(index) == []


@pytest.mark.parametrize(
    "timeout", [-1, -0.001, math.nan, math.inf, -math.inf, True, False, "5", b"5", [5], 1 + 0j]
)
async def test_timeouts(busy: Busy, make_image: MakeImage, timeout: Any) -> None:
    path = make_image("new")
    with refused(busy.sandbox, busy.vm, InvalidTimeout, repr(timeout)):
        await busy.sandbox.attach(path, timeout=timeout)
    with refused(busy.sandbox, busy.vm, InvalidTimeout, repr(timeout)):
        await busy.sandbox.attach_many([path], timeout=timeout)
    with refused(busy.sandbox, busy.vm, InvalidTimeout, repr(timeout)):
        await busy.sandbox.detach(busy.scsi, timeout=timeout)
    with refused(busy.sandbox, busy.vm, InvalidTimeout, repr(timeout)):
        await busy.sandbox.detach_many([busy.scsi, busy.blk], timeout=timeout)


async def test_no_free_slot(make_image: MakeImage) -> None:
    vm = MemoryHypervisor(slots=1)
    async with Sandbox("s1", vm, driver="virtio-blk") as sandbox:
        device = await sandbox.attach(make_image("first"))
        with refused(sandbox, vm, SlotsExhausted, "drive-second"):
            await sandbox.attach(make_image("second"), device_id="second")
        scsi = await sandbox.attach(make_image("scsi"), driver="virtio-scsi")
        assert scsi.held.index == 1
        await sandbox.detach(device)
        assert (await sandbox.attach(make_image("third"))).held.index == 0


async def test_no_slots_at_all(make_image: MakeImage) -> None:
    vm = MemoryHypervisor(slots=0)
    async with Sandbox("s1", vm, driver="virtio-blk") as sandbox:
        with refused(sandbox, vm, SlotsExhausted, "drive-first"):
            await sandbox.attach(make_image("first"), device_id="first")


async def test_all_indexes_taken(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm, capacity=2) as sandbox:
        devices = await sandbox.attach_many([make_image("a"), make_image("b")])
        with refused(sandbox, vm, IndexesExhausted, "2"):
            await sandbox.attach(make_image("c"), driver="virtio-blk")
        assert await sandbox.attach(devices[0].info.path) is devices[0]  # needs no index
        await sandbox.detach(devices[0])
        await sandbox.detach(devices[0])
        assert (await sandbox.attach(make_image("d"))).held.index == 0


async def test_no_scsi_address_left(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm, capacity=65537) as sandbox:
        sandbox.index.acquire_many(65536)
        with refused(sandbox, vm, IndexesExhausted, "65536"):
            await sandbox.attach(make_image("scsi"))
        assert (await sandbox.attach(make_image("blk"), driver="virtio-blk")).held.index == 65536


async def test_unknown_devices(busy: Busy) -> None:
    for device_id in ("nothing", "", "scsi ", "drive-scsi"):
        with refused(busy.sandbox, busy.vm, UnknownDevice, repr(device_id)):
            await busy.sandbox.detach(device_id)
        with refused(busy.sandbox, busy.vm, UnknownDevice, repr(device_id)):
            await busy.sandbox.manager.attach(device_id, busy.sandbox)
    with pytest.raises(KeyError):  # which it also is
        await busy.sandbox.detach("nothing")


async def test_detach_twice(busy: Busy) -> None:
    await busy.sandbox.detach(busy.scsi)
    with refused(busy.sandbox, busy.vm, UnknownDevice, "'scsi'"):
        await busy.sandbox.detach(busy.scsi)
    with refused(busy.sandbox, busy.vm, UnknownDevice, "'scsi'"):
        await busy.sandbox.detach("scsi")
    with refused(busy.sandbox, busy.vm, NotAttached, "scsi"):
        await road.detach(busy.sandbox._machine, busy.scsi, None)


async def test_detach_of_what_was_never_attached(busy: Busy, make_image: MakeImage) -> None:
    device = busy.sandbox.manager.obtain(DeviceInfo(path=str(make_image("new")), id="new"))
    with refused(busy.sandbox, busy.vm, NotAttached, "new"):
        await busy.sandbox.detach(device)
    generic = busy.sandbox.manager.obtain(DeviceInfo(dev_type="c", major=10, minor=229, id="fuse"))
    with refused(busy.sandbox, busy.vm, NotAttached, "fuse"):
        await busy.sandbox.detach(generic)


async def test_detach_of_another_sandboxes_device(busy: Busy, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s2", vm) as other:
        same_id = await other.attach(make_image("theirs"), device_id="scsi")
        own_id = await other.attach(make_image("theirs too"), device_id="theirs")
        theirs = snapshot(other), machine(vm)
        with refused(busy.sandbox, busy.vm, UnknownDevice, "'scsi'", "another object"):
            await busy.sandbox.detach(same_id)
        with refused(busy.sandbox, busy.vm, UnknownDevice, "'theirs'"):
            await busy.sandbox.detach(own_id)
        assert (snapshot(other), machine(vm)) == theirs


async def test_outside_with(make_image: MakeImage, tmp_path: Any) -> None:
    vm = MemoryHypervisor()
    sandbox = Sandbox("s1", vm)
    path = make_image("image")

    async def all_refused() -> None:
        for call in (
            lambda: sandbox.attach(path),
            lambda: sandbox.attach_many([path]),
            lambda: sandbox.detach("x"),
            lambda: sandbox.save(tmp_path / "state"),
        ):
            with refused(sandbox, vm, SandboxClosed, "s1"):
                await call()
        with refused(sandbox, vm, SandboxClosed, "s1"):
            sandbox.state()

    await all_refused()
    async with sandbox:
        pass
    await all_refused()
    assert not (tmp_path / "state").exists()


def test_outside_with_blocking(make_image: MakeImage) -> None:
    sandbox = BlockingSandbox("s1", "memory:")
    with pytest.raises(SandboxClosed, match="s1"):
        sandbox.attach(make_image("image"))
    with pytest.raises(SandboxClosed, match="s1"):
        sandbox.state()


@pytest.mark.parametrize(
    "more", [{"driver": "nvdimm"}, {"read_only": True}, {"serial": "S"}, {"device_id": "i"}]
)
async def test_a_device_info_says_all_itself(
    busy: Busy, make_image: MakeImage, more: dict[str, Any]
) -> None:
    with refused(busy.sandbox, busy.vm, InvalidValue, "DeviceInfo"):
        await busy.sandbox.attach(DeviceInfo(path=str(make_image("new"))), **more)


@pytest.mark.parametrize("value", [True, False, None])
async def test_an_unknown_option_beside_a_device_info(
    busy: Busy, make_image: MakeImage, value: object
) -> None:
    unknown: dict[str, Any] = {"readonly": value}
    before = snapshot(busy.sandbox)
    with pytest.raises(TypeError, match="readonly"):
        await busy.sandbox.attach(DeviceInfo(path=str(make_image("new"))), **unknown)
    assert snapshot(busy.sandbox) == before


async def test_one_name_where_many_are_asked_for(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_image("a").parent)
    make_image("b")
    async with Sandbox("s1", "memory:") as sandbox:
        for name in ("a", "b"):
            await sandbox.attach(name, device_id=name)
        with pytest.raises(InvalidValue, match="'ab' is one"):
            await sandbox.attach_many("ab")
        with pytest.raises(InvalidValue, match="'ab' is one"):
            await sandbox.detach_many("ab")
        assert len(sandbox.devices) == 2
    await asyncio.to_thread(one_name_at_the_blocking_door)


def one_name_at_the_blocking_door() -> None:
    with BlockingSandbox("s1", "memory:") as sandbox:
        with pytest.raises(InvalidValue, match="'ab' is one"):
            sandbox.attach_many("ab")
        assert not sandbox.devices
        sandbox.attach("a", device_id="a")
        with pytest.raises(InvalidValue, match="'a' is one"):
            sandbox.detach_many("a")
        assert len(sandbox.devices) == 1


def test_another_thread_closes_it_in_the_moment_of_a_call(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = BlockingSandbox("s1", "memory:").open()
    getpid, closed = os.getpid, threading.Event()

    def closing() -> int:
        if not closed.is_set():
            closed.set()
            sandbox.close()
        return getpid()

    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", closing)  # the door asks for it at each call
        with pytest.raises(SandboxClosed, match="s1"):
            sandbox.attach(make_image("image"))


@pytest.mark.parametrize("place", [0, 2, 4])
async def test_one_bad_image_among_many(busy: Busy, make_image: MakeImage, place: int) -> None:
    images = [make_image(f"image{number}") for number in range(5)]
    images[place].write_bytes(b"")
    with refused(busy.sandbox, busy.vm, InvalidImage, str(images[place])):
        await busy.sandbox.attach_many(images)
    with refused(busy.sandbox, busy.vm, InvalidImage, str(images[place])):
        await busy.sandbox.attach_many([busy.scsi.info.path, *images])


async def test_more_images_than_indexes(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm, capacity=3) as sandbox:
        with pytest.raises(IndexesExhausted):
            await sandbox.attach_many([make_image(f"image{number}") for number in range(5)])
        assert (sandbox.devices, list(sandbox.index), vm.devices, vm.backends) == ([], [], {}, {})


@pytest.mark.parametrize("step", ["backend-add", "device-add"])
async def test_one_image_among_many_is_refused_by_the_vmm(
    busy: Busy, make_image: MakeImage, step: str
) -> None:
    before = snapshot(busy.sandbox)
    had = set(busy.vm.devices), set(busy.vm.backends)
    busy.vm.fail(step, Fault("refuse"), times=2)
    images = [make_image(f"image{number}") for number in range(4)]
    with pytest.raises(VmmRefused, match="told to be") as caught:
        await busy.sandbox.attach_many([busy.scsi.info.path, *images])
    assert any("also: " in note for note in caught.value.__notes__)
    assert snapshot(busy.sandbox) == before
    assert (set(busy.vm.devices), set(busy.vm.backends)) == had
    devices = await busy.sandbox.attach_many(images)
    assert [device.held.index for device in devices] == [2, 3, 4, 5]


async def test_one_image_twice_among_many(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        image = make_image("image")
        first, other, again = await sandbox.attach_many([image, make_image("other"), image])
        assert first is again is not other
        assert (first.attach_count, other.attach_count, list(sandbox.index)) == (2, 1, [0, 1])
        await sandbox.detach_many([first, other, again])
        assert (sandbox.devices, list(sandbox.index), vm.devices) == ([], [], {})
