"""What the VMM opens is what was claimed: the image is opened right before it is plugged in, and
looked at again."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.children import in_child
from support.descriptors import descriptors, no_more_than
from support.held_store import Gate, HeldStore, ended, nothing_left, query
from support.snapshot import Busy, MakeImage, refused
from support.turns import until

from pyblock import (
    BlockDevice,
    DescriptorsExhausted,
    DeviceInfo,
    ImageReplaced,
    InvalidImage,
    PyblockError,
    Sandbox,
    SlotsExhausted,
)
from pyblock.disk.image import OpenedImage, open_image
from pyblock.disk.model import BlockDrive
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio


class Watched(MemoryHypervisor):
    """Looks at each image when its backend is added, and waits there.

    :ivar seen: what the descriptors were, and how they were open.
    :ivar most: how many drives were in flight at once.
    """

    lanes: int | None = 4

    def __init__(self, gate: Gate | None = None) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, int], int]] = []
        self.images: list[OpenedImage] = []
        self.most = self.now = 0
        self.gate = gate

    async def backend_add(self, drive: BlockDrive, image: OpenedImage) -> None:
        status, flags = os.fstat(image.fd), fcntl.fcntl(image.fd, fcntl.F_GETFL)
        self.images.append(image)
        self.seen.append(((status.st_dev, status.st_ino), flags))
        assert not os.get_inheritable(image.fd)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await super().backend_add(drive, image)
        finally:
            self.now -= 1


@pytest.mark.parametrize("read_only", [False, True])
async def test_the_adapter_is_handed_the_open_image(make_image: MakeImage, read_only: bool) -> None:
    vm, path = Watched(), make_image("img")
    before = descriptors()
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.attach(path, read_only=read_only)
        [(identity, flags)] = vm.seen
        assert identity == (path.stat().st_dev, path.stat().st_ino)
        assert flags & os.O_ACCMODE == (os.O_RDONLY if read_only else os.O_RDWR)
        assert descriptors() == before


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(b"n" * 512)
    new.rename(path)


def swap_link(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"o" * 512)
    path.unlink()  # after the other was made, which would else be given its inode's number
    path.symlink_to(other)


def put(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def instead(path: Path) -> None:
        path.unlink()
        make(path)

    return instead


AFTER_THE_CLAIM: dict[str, tuple[Callable[[Path], object], type[PyblockError], str]] = {
    "replaced": (replace, ImageReplaced, "is not what was claimed"),
    "a link": (swap_link, ImageReplaced, "is not what was claimed"),
    "removed": (Path.unlink, InvalidImage, "No such file"),
    "a FIFO": (put(os.mkfifo), InvalidImage, "a FIFO"),
    "a terminal": (
        put(lambda path: path.symlink_to("/dev/tty")),
        InvalidImage,
        "a character device",
    ),
    "a folder": (put(Path.mkdir), InvalidImage, "a directory"),
    "emptied": (lambda path: os.truncate(path, 0), InvalidImage, "is empty"),
}


@pytest.mark.parametrize("what", AFTER_THE_CLAIM)
async def test_what_is_there_after_the_claim(
    make_image: MakeImage, store: HeldStore, what: str
) -> None:
    """Nothing is sent, everything is given back, and the image is nobody's."""
    change, kind, text = AFTER_THE_CLAIM[what]
    path, vm = make_image("img"), MemoryHypervisor()
    before = descriptors()
    async with Sandbox("s1", vm, store=store) as sandbox:
        await sandbox.attach(make_image("first"), device_id="first")
        first = list(sandbox.devices)
        journal = list(vm.journal)
        gate = store.hold()
        attach = asyncio.create_task(sandbox.attach(path))
        await until(lambda: gate.reached)
        change(path)
        gate.let_go()
        await ended(attach)
        error = attach.exception()
        assert type(error) is kind
        assert text in str(error) and str(path) in str(error)
        assert (vm.journal, sandbox.devices, list(sandbox.index)) == (journal, first, [0])
        assert query(store, "SELECT id FROM device") == [("first",)]
        await sandbox.detach("first")
        nothing_left(sandbox)
    store.close()
    assert descriptors() == before


async def test_a_new_attempt_claims_what_is_there_now(
    make_image: MakeImage, store: HeldStore
) -> None:
    path, vm = make_image("img"), MemoryHypervisor()
    async with Sandbox("s1", vm, store=store) as sandbox:
        gate = store.hold()
        attach = asyncio.create_task(sandbox.attach(path))
        await until(lambda: gate.reached)
        replace(path)
        gate.let_go()
        with pytest.raises(ImageReplaced):
            await attach
        device = await sandbox.attach(path)
        assert device.identity == ("file", path.stat().st_dev, path.stat().st_ino)


async def test_a_fifo_in_its_place_is_not_opened(busy: Busy, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(InvalidImage, match="a FIFO"):
        open_image(str(path), read_only=True)
    with pytest.raises(OSError, match="No such device"):  # ENXIO: nobody has it open for reading
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)


async def test_a_refused_backend_leaves_no_descriptor(busy: Busy, make_image: MakeImage) -> None:
    before = descriptors()
    busy.vm.fail("backend-add", Fault("refuse"))
    with pytest.raises(PyblockError):
        await busy.sandbox.attach(make_image("img"))
    assert descriptors() == before


async def test_no_descriptor_left(busy: Busy, make_image: MakeImage) -> None:
    path = make_image("img")
    with (
        refused(busy.sandbox, busy.vm, DescriptorsExhausted, str(path), "Too many open files"),
        no_more_than(0),
    ):
        await busy.sandbox.attach(path)


async def test_no_descriptor_left_when_it_is_plugged_in(
    make_image: MakeImage, store: HeldStore
) -> None:
    path, vm = make_image("img"), MemoryHypervisor()
    async with Sandbox("s1", vm, store=store) as sandbox:
        await sandbox.attach(make_image("first"))
        gate = store.hold()
        attach = asyncio.create_task(sandbox.attach(path))
        await until(lambda: gate.reached)
        with no_more_than(1):  # the look at the path gets one, the image itself none
            gate.let_go()
            await ended(attach)
        assert type(attach.exception()) is DescriptorsExhausted
        assert (len(sandbox.devices), list(sandbox.index), len(vm.devices)) == (1, [0], 1)


async def test_a_forked_child_has_no_image_open(make_image: MakeImage) -> None:
    """It would share the description with whoever was handed it, and keep its locks when that has
    ended."""
    path, gate = make_image("img"), Gate()
    vm = Watched(gate)

    def look() -> str:
        open_here = str(path) in descriptors().values()
        os.open("/dev/null", os.O_RDONLY)
        before = descriptors()
        # as the end of what was under way would: the number may be another's by now
        vm.images[0].close()
        return f"{open_here} {descriptors() == before}"

    async with Sandbox("s1", vm, store=None) as sandbox:
        attach = asyncio.create_task(sandbox.attach(path))
        await until(lambda: gate.reached)
        assert str(path) in descriptors().values()
        assert in_child(look) == (0, "False True")
        assert str(path) in descriptors().values()
        gate.let_go()
        await attach


async def test_a_crowd_does_not_use_up_the_descriptors(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(300)]
    for path in paths:
        path.write_bytes(b"x" * 512)
    gate = Gate()
    vm = Watched(gate)
    async with Sandbox("s1", vm, store=None) as sandbox:
        with no_more_than(8):
            attach = asyncio.create_task(sandbox.attach_many(paths))
            await until(lambda: gate.reached)
            gate.let_go()
            await attach
        assert (len(vm.devices), vm.most) == (300, 4)


async def test_a_crowd_in_memory(tmp_path: Path) -> None:
    """The machine in memory takes any number at once, and keeps no image open while a fault befalls
    it."""
    paths = [tmp_path / str(number) for number in range(300)]
    for path in paths:
        path.write_bytes(b"x" * 512)
    vm = MemoryHypervisor()
    vm.fail("backend-add", Fault("hold"), times=300)
    async with Sandbox("s1", vm, store=None) as sandbox:
        with no_more_than(8):
            attach = asyncio.create_task(sandbox.attach_many(paths))
            await until(lambda: len(vm.journal) == 300)
            vm.let_go("backend-add")
            await attach
        assert len(vm.devices) == 300


async def test_a_sandbox_that_is_opened_in_another_event_loop_has_new_lanes(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(9)]
    for path in paths:
        path.write_bytes(b"x" * 512)
    sandbox = Sandbox("s1", Watched(), store=None)

    async def burst() -> int:
        async with sandbox:
            devices = await sandbox.attach_many(paths)
            await sandbox.detach_many(devices)
            return len(devices)

    assert await asyncio.to_thread(lambda: asyncio.run(burst())) == 9
    assert await asyncio.to_thread(lambda: asyncio.run(burst())) == 9


async def test_a_full_machine_opens_nothing(make_image: MakeImage) -> None:
    vm = Watched()
    vm._slot_count = 0
    async with Sandbox("s1", vm) as sandbox:
        with pytest.raises(SlotsExhausted):
            await sandbox.attach(make_image("img"), driver="virtio-blk")
    assert not vm.seen


async def test_a_loaded_device_whose_image_was_not_there(tmp_path: Path) -> None:
    """It was claimed by nobody, so nothing may be opened for it."""
    path = tmp_path / "img"
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        sandbox.manager.take_in(
            [BlockDevice("loaded", DeviceInfo(path=str(path), driver="virtio-scsi", id="loaded"))]
        )
        path.write_bytes(b"x" * 512)
        with pytest.raises(ImageReplaced, match="was not there"):
            await sandbox.manager.attach("loaded", sandbox)
        assert (vm.journal, list(sandbox.index)) == ([], [])
