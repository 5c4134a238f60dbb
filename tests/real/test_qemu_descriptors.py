"""What QEMU has open is what was claimed, whatever the image's path leads to by then; and nothing
that was handed over is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kit import Machine
from kit.proxy import Fault, Proxy
from support.loops import loop_devices

from pyblock import BlockDevice, ImageReplaced, Sandbox
from pyblock.disk.image import OpenedImage
from pyblock.life.recovery import Found, Outcome
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.qemu.adapter import QemuHypervisor
from pyblock.vmm.qemu.descriptors import DescriptorSets

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

Start = Callable[..., Machine]

ENOUGH = 60.0  # seconds: a deadline that is not meant to pass
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state.db")
    yield store
    store.close()


def opened(machine: Machine) -> list[tuple[int, int]]:
    """Device and inode of all that QEMU has open, as the kernel tells it."""
    found = []
    for entry in Path(f"/proc/{machine.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(inode(entry))
    return found


def inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def size_of(machine: Machine, device: BlockDevice) -> int:
    """Bytes of the image behind a drive, as QEMU has it."""
    nodes = machine.side.command("query-named-block-nodes", flat=True)
    [size] = [
        node["image"]["virtual-size"] for node in nodes if node["node-name"] == device.held.id
    ]
    return int(size)


def sets(machine: Machine) -> list[Any]:
    return [one for one in machine.side.command("query-fdsets") if one["fds"]]


def use_descriptors_of(machine: Machine) -> None:
    """A paused QEMU 7.2 closes nothing that it is told to remove; one that runs does, with or
    without a guest."""
    machine.side.command("cont")


@asynccontextmanager
async def held_back(
    machine: Machine, sandbox_of: Callable[[str], Sandbox], command: str
) -> AsyncIterator[tuple[Sandbox, Proxy]]:
    async with (
        Proxy(machine.folder / "proxy", machine.qmp_path) as proxy,
        sandbox_of(f"qemu:{proxy.path}") as sandbox,
    ):
        proxy.expect(Fault.HOLD, command)
        yield sandbox, proxy


@pytest.mark.parametrize("driver", ["virtio-scsi", "virtio-blk", "nvdimm"])
@pytest.mark.parametrize("how", ["link", "rename"])
async def test_a_path_that_leads_elsewhere_meanwhile(
    start_machine: Start, store: SqliteStore, driver: str, how: str
) -> None:
    machine = start_machine(guest=False, nvdimm_slots=2)
    first, second = machine.image("first", 4 * MIB), machine.image("second", 8 * MIB)
    was, path = inode(first), machine.folder / "path"
    if how == "link":
        path.symlink_to(first)
    else:
        first.rename(path)
    add = "object-add" if driver == "nvdimm" else "blockdev-add"
    async with held_back(
        machine, lambda vm: Sandbox("one", vm, driver=driver, store=store), add
    ) as (sandbox, proxy):
        attach = asyncio.create_task(sandbox.attach(path, timeout=ENOUGH))
        await asyncio.wait(
            [attach, asyncio.ensure_future(proxy.held.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        if how == "link":
            path.unlink()
            path.symlink_to(second)
        else:
            second.rename(path)
        proxy.let_go.set()
        device = await attach
        assert device.identity == ("file", *was)
        assert was in opened(machine) and inode(path) not in opened(machine)
        if driver != "nvdimm":
            assert size_of(machine, device) == 4 * MIB
        else:
            [module] = machine.side.command("query-memory-devices")
            assert module["data"]["size"] == 4 * MIB


async def test_an_image_that_vanishes_is_not_made_anew(
    start_machine: Start, store: SqliteStore
) -> None:
    machine = start_machine(guest=False, nvdimm_slots=2)
    image = machine.image("pmem", 4 * MIB)
    async with held_back(
        machine, lambda vm: Sandbox("one", vm, driver="nvdimm", store=store), "object-add"
    ) as (sandbox, proxy):
        attach = asyncio.create_task(sandbox.attach(image, timeout=ENOUGH))
        await proxy.held.wait()
        was = inode(image)
        image.unlink()
        proxy.let_go.set()
        await attach
        assert not image.exists()
        assert was in opened(machine)


async def test_paths_that_mean_something_to_this_process_alone(
    bare_machine: Machine, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bare_machine.image("image")
    monkeypatch.chdir(bare_machine.folder)
    with image.open("rb+") as file:
        async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=store) as sandbox:
            for path in (
                "/proc/self/cwd/image",
                f"/proc/self/fd/{file.fileno()}",
                "/proc/thread-self/cwd/image",
            ):
                device = await sandbox.attach(path, timeout=ENOUGH)
                assert inode(image) in opened(bare_machine) and device.held.verified
                await sandbox.detach(device, timeout=ENOUGH)


async def test_many_at_once_each_get_their_own(bare_machine: Machine, store: SqliteStore) -> None:
    images = [bare_machine.image(f"image-{number}", (number + 1) * MIB) for number in range(60)]
    ours = len(list(Path("/proc/self/fd").iterdir()))
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=store) as sandbox:
        for _ in range(3):
            devices = await sandbox.attach_many(images, timeout=ENOUGH)
            assert [size_of(bare_machine, device) for device in devices] == [
                (number + 1) * MIB for number in range(60)
            ]
            await sandbox.detach_many(devices, timeout=ENOUGH)
        assert len(list(Path("/proc/self/fd").iterdir())) <= ours + 5, (
            "descriptors of images are still open here"
        )


async def test_qemu_outlives_descriptors_among_other_commands(bare_machine: Machine) -> None:
    """QEMU 7.2 frees a descriptor in one thread while another reads: it died, in some of such runs,
    of what had been sent behind it."""
    images = [bare_machine.image(f"image-{number}", MIB) for number in range(100)]
    adapter = QemuHypervisor(str(bare_machine.qmp_path))

    async def ask() -> None:
        while True:
            await asyncio.gather(*(adapter._qmp.execute("query-status") for _ in range(5)))

    async with Sandbox("one", adapter, store=None) as sandbox:
        await sandbox.reconcile()
        asking = asyncio.create_task(ask())
        for _ in range(2):
            devices = await sandbox.attach_many(images, timeout=ENOUGH)
            await sandbox.detach_many(devices, timeout=ENOUGH)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled(), "QEMU answers no more"


async def test_an_attach_that_is_cancelled_leaves_no_descriptor(
    bare_machine: Machine, store: SqliteStore
) -> None:
    """Cut off at every command, by a sandbox that is closed; the next one finds what is left."""
    image, other = bare_machine.image("image"), bare_machine.image("other")
    use_descriptors_of(bare_machine)
    for command in ("add-fd", "blockdev-add", "device_add"):
        async with held_back(bare_machine, lambda vm: Sandbox("one", vm, store=store), command) as (
            sandbox,
            proxy,
        ):
            attach = asyncio.create_task(sandbox.attach(image, timeout=ENOUGH))
            await proxy.held.wait()
            closing = asyncio.create_task(sandbox.close())
            await asyncio.sleep(0)
            proxy.let_go.set()
            await asyncio.gather(attach, closing, return_exceptions=True)
        async with (
            Proxy(bare_machine.folder / "proxy", bare_machine.qmp_path) as proxy,
            Sandbox("one", f"qemu:{proxy.path}", store=store) as sandbox,
        ):
            assert not sandbox.devices
            # what nobody uses goes before something is passed
            device = await sandbox.attach(other, timeout=ENOUGH)
            assert len(sets(bare_machine)) == 1, command
            await sandbox.detach(device, timeout=ENOUGH)
            await sandbox.reconcile()
            assert not sets(bare_machine), command
            assert inode(image) not in opened(bare_machine)


async def test_a_set_that_was_left_behind(bare_machine: Machine, store: SqliteStore) -> None:
    """A second monitor keeps QEMU from closing it by itself, and the machine is paused."""
    image = bare_machine.image("image")
    async with (
        Proxy(bare_machine.folder / "proxy", bare_machine.qmp_path) as proxy,
        Sandbox("one", f"qemu:{proxy.path}", store=store) as sandbox,
    ):
        await sandbox.reconcile()
        proxy.expect(Fault.CLOSE_AFTER, "add-fd")
        with pytest.raises(Exception, match="broke"):
            await sandbox.attach(image, timeout=ENOUGH)
        assert len(sets(bare_machine)) == 1
        assert {one.outcome for one in await sandbox.reconcile()} <= {Outcome.FREED}
        use_descriptors_of(bare_machine)
        device = await sandbox.attach(image, timeout=ENOUGH)
        assert len(sets(bare_machine)) == 1
        await sandbox.detach(device, timeout=ENOUGH)
        await sandbox.reconcile()
        assert not sets(bare_machine)


async def test_what_a_paused_machine_did_not_close(
    bare_machine: Machine, store: SqliteStore
) -> None:
    image, other = bare_machine.image("image"), bare_machine.image("other")
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=store) as sandbox:
        for _ in range(3):
            await sandbox.detach(await sandbox.attach(image, timeout=ENOUGH), timeout=ENOUGH)
        use_descriptors_of(bare_machine)
        bare_machine.side.wait_event("RESUME")
        await sandbox.attach(other, timeout=ENOUGH)  # it may go out before the event comes in
        await sandbox.attach(bare_machine.image("third"), timeout=ENOUGH)
        assert inode(image) not in opened(bare_machine)
        assert len(sets(bare_machine)) == 2


@pytest.mark.parametrize("read_only", [False, True])
async def test_the_descriptor_is_as_the_drive(
    bare_machine: Machine, store: SqliteStore, read_only: bool
) -> None:
    image = bare_machine.image("image")
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=store) as sandbox:
        device = await sandbox.attach(image, read_only=read_only, timeout=ENOUGH)
        flags = set()
        for entry in Path(f"/proc/{bare_machine.pid}/fd").iterdir():
            if inode(entry) == inode(image):
                text = Path(f"/proc/{bare_machine.pid}/fdinfo/{entry.name}").read_text()
                flags.add(int(text.split("flags:")[1].split()[0], 8) & os.O_ACCMODE)
        assert flags == {os.O_RDONLY if read_only else os.O_RDWR}
        await sandbox.detach(device, timeout=ENOUGH)


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_block_device(bare_machine: Machine, store: SqliteStore, read_only: bool) -> None:
    with loop_devices() as loops:
        path = loops.loop(bare_machine.image("image", 4 * MIB))
        async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=store) as sandbox:
            device = await sandbox.attach(path, read_only=read_only, timeout=ENOUGH)
            assert size_of(bare_machine, device) == 4 * MIB and device.held.verified
            await sandbox.detach(device, timeout=ENOUGH)


# Where no descriptor arrives.


async def test_a_proxy_that_passes_no_descriptors(
    bare_machine: Machine, store: SqliteStore
) -> None:
    """The image is attached by its path, and said not to be verified, since the peer is not
    QEMU."""
    async with (
        Proxy(bare_machine.folder / "proxy", bare_machine.qmp_path) as proxy,
        Sandbox("one", f"qemu:{proxy.path}", store=store) as sandbox,
    ):
        proxy.passes_descriptors = False
        device = await sandbox.attach(bare_machine.image("image"), timeout=ENOUGH)
        assert not device.held.verified
        assert not sets(bare_machine)
        await sandbox.detach(device, timeout=ENOUGH)


@pytest.fixture
def without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(self: DescriptorSets, drive_id: str, image: OpenedImage) -> None:
        return None

    monkeypatch.setattr(DescriptorSets, "pass_image", none)


@pytest.mark.usefixtures("without_descriptors")
@pytest.mark.parametrize("driver", ["virtio-scsi", "nvdimm"])
async def test_a_path_is_verified_where_qemu_can_be_looked_at(
    start_machine: Start, store: SqliteStore, driver: str
) -> None:
    machine = start_machine(guest=False, nvdimm_slots=1)
    async with Sandbox("one", f"qemu:{machine.qmp_path}", driver=driver, store=store) as sandbox:
        assert (await sandbox.attach(machine.image("image"), timeout=ENOUGH)).held.verified


ELSEWHERE = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'


def in_another_namespace(start: Start, folder: Path) -> tuple[Machine, Path, Path]:
    """A QEMU for which a path is another file than for us: the machine, the path, and what is there
    for QEMU."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("another mount namespace needs root and unshare")
    ours, theirs = folder / "image", folder / "theirs"
    for path, size in ((ours, 4 * MIB), (theirs, 8 * MIB)):
        with path.open("xb") as file:
            file.truncate(size)
    before = [
        "unshare",
        "-m",
        "--propagation",
        "private",
        "sh",
        "-c",
        ELSEWHERE,
        "sh",
        str(theirs),
        str(ours),
    ]
    return start(guest=False, before=before), ours, theirs


async def test_another_mount_namespace(
    start_machine: Start, store: SqliteStore, tmp_path: Path
) -> None:
    machine, ours, theirs = in_another_namespace(start_machine, tmp_path)
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as sandbox:
        device = await sandbox.attach(ours, timeout=ENOUGH)
        assert size_of(machine, device) == 4 * MIB
        assert inode(ours) in opened(machine) and inode(theirs) not in opened(machine)
        await sandbox.detach(device, timeout=ENOUGH)


@pytest.mark.usefixtures("without_descriptors")
async def test_another_mount_namespace_by_path(
    start_machine: Start, store: SqliteStore, tmp_path: Path
) -> None:
    machine, ours, theirs = in_another_namespace(start_machine, tmp_path)
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as sandbox:
        with pytest.raises(ImageReplaced, match="leads elsewhere"):
            await sandbox.attach(ours, timeout=ENOUGH)
        assert not sandbox.devices and not list(sandbox.index)
        assert inode(theirs) not in opened(machine)


async def test_another_image_under_a_drives_id_is_another_disk(
    bare_machine: Machine, store: SqliteStore, tmp_path: Path
) -> None:
    """A row that is older than the machine: what is there is not what it says, so it is neither
    believed nor removed."""
    first, second = bare_machine.image("first"), bare_machine.image("second")
    other = SqliteStore(tmp_path / "other.db")
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=store) as sandbox:
        await sandbox.attach(first, device_id="data", timeout=ENOUGH)
        await sandbox.save(tmp_path / "saved.json")
        await sandbox.detach("data", timeout=ENOUGH)
        await sandbox.attach(second, device_id="data", timeout=ENOUGH)
    try:
        async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=other) as sandbox:
            await sandbox.load(tmp_path / "saved.json")
            [lost] = await sandbox.reconcile()
            assert (lost.found, lost.outcome, lost.device_id) == (Found.LOST, Outcome.FREED, "data")
            assert inode(second) in opened(bare_machine) and not sandbox.devices
            [orphan] = await sandbox.reconcile()
            assert (orphan.found, orphan.drive_id) == (Found.ORPHAN, "drive-data")
            third = await sandbox.attach(bare_machine.image("third"), timeout=ENOUGH)
            assert third.held.index == 1  # the other one sits at 0
            await sandbox.detach(third, timeout=ENOUGH)
    finally:
        other.close()
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=store) as sandbox:
        assert not sandbox.recovered
        await sandbox.detach("data", timeout=ENOUGH)
