"""What QEMU has that only looks as if it were ours, or was named by Kata: none of it is taken for
an orphan, and none of it for lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kit import Machine
from support import samples
from support.snapshot import drive_ids

from pyblock import BlockDevice, DeviceConflict, Sandbox, SlotsExhausted, UnknownDriver
from pyblock.disk.model import BlockDrive
from pyblock.kata.schema import decode
from pyblock.life.recovery import Found, Outcome
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.base import Inventory
from pyblock.vmm.qemu.adapter import QemuHypervisor

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

Start = Callable[..., Machine]

ENOUGH = 60.0  # seconds: a deadline that is not meant to pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state.db")
    yield store
    store.close()


def names(machine: Machine) -> dict[str, set[str]]:
    """What QEMU has, by where it has it."""
    side = machine.side
    found = {
        path: {entry["name"] for entry in side.command("qom-list", path=path)}
        for path in ("/objects", "/machine/peripheral")
    }
    return found | {
        "nodes": {node["node-name"] for node in side.command("query-named-block-nodes", flat=True)}
    }


def add_disk(
    machine: Machine, image: Path, *, node: str, device: str, lun: int, target: int = 0
) -> None:
    """Plugs a SCSI disk in as another program would."""
    machine.side.command(
        "blockdev-add",
        {"driver": "raw", "node-name": node, "file": {"driver": "file", "filename": str(image)}},
    )
    machine.side.command(
        "device_add",
        {
            "driver": "scsi-hd",
            "id": device,
            "drive": node,
            "bus": "scsi0.0",
            "scsi-id": target,
            "lun": lun,
        },
    )


def remove_disk(machine: Machine, *, node: str, device: str) -> None:
    machine.side.command("device_del", id=device)
    machine.side.wait_event("DEVICE_DELETED", device=device)
    machine.side.command("blockdev-del", {"node-name": node})


async def test_what_is_no_drive_is_no_orphan(start_machine: Start, tmp_path: Path) -> None:
    """Objects that are no backends, devices that are no disks, and disks that were there from the
    start, all named as drives are."""
    root, memory = tmp_path / "root", tmp_path / "memory"
    for image in (root, memory):
        with image.open("xb") as file:
            file.truncate(16 << 20)
    extra = [
        *(
            "-object",
            "secret,id=drive-key,data=hunter2",
            "-object",
            "throttle-group,id=drive-limits",
            "-object",
            "iothread,id=drive-io",
        ),
        *("-blockdev", f"driver=raw,node-name=drive-root,file.driver=file,file.filename={root}"),
        *(
            "-device",
            "virtio-blk-pci,drive=drive-root,id=root",
            "-device",
            "virtio-rng-pci,id=drive-entropy",
        ),
        *("-object", f"memory-backend-file,id=drive-cold,mem-path={memory},size=16M,share=on"),
        *("-device", "nvdimm,id=drive-cold,memdev=drive-cold"),
    ]
    machine = start_machine(guest=False, nvdimm_slots=2, extra=extra)
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=None) as sandbox:
        device = await sandbox.attach(machine.image("a"), device_id="a", timeout=ENOUGH)
        before = names(machine)
        assert {"drive-key", "drive-limits", "drive-io", "drive-cold"} <= before[
            "/objects"
        ] and "drive-root" in before["nodes"]
        assert await sandbox.reconcile(dry_run=True) == []
        assert await sandbox.reconcile(orphans=True) == []
        assert names(machine) == before
        await sandbox.detach(device, timeout=ENOUGH)


async def test_what_kata_plugged_in_is_there(start_machine: Start, store: SqliteStore) -> None:
    """It names an nvdimm, its memory and a disk with words of its own before the drive's ID."""
    machine = start_machine(guest=False, nvdimm_slots=2)
    pmem, disk, loose = (machine.image(name) for name in ("pmem", "disk", "loose"))
    memory = {
        "qom-type": "memory-backend-file",
        "id": "nvdimmbackmemdrive-a",
        "mem-path": str(pmem),
        "size": 16 << 20,
        "share": True,
    }
    machine.side.command("object-add", memory)
    machine.side.command(
        "device_add", driver="nvdimm", id="nvdimmdrive-a", memdev="nvdimmbackmemdrive-a"
    )
    add_disk(machine, disk, node="drive-b", device="virtio-drive-b", lun=1)
    add_disk(machine, loose, node="drive-c", device="virtio-drive-c", lun=2)

    def kata(number: int, device_id: str, image: Path, **more: Any) -> dict[str, Any]:
        drive = samples.drive(number, File=str(image), ID=f"drive-{device_id}", **more)
        return samples.device(number, drive, ID=device_id, DriverOptions=None)

    devices = [
        kata(0, "a", pmem, NvdimmID="drive-a", Pmem=True),
        kata(1, "b", disk, SCSIAddr="0:1"),
        kata(2, "c", loose, SCSIAddr="0:2"),
    ]
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as sandbox:
        await sandbox.restore(
            decode(samples.text(samples.sandbox(devices, [0, 1, 2])), where="a sample")
        )
        assert await sandbox.reconcile(orphans=True) == []
        assert [
            (one.id, one.attached) for one in sandbox.devices if isinstance(one, BlockDevice)
        ] == [
            ("a", True),
            ("b", True),
            ("c", True),
        ]
        with closing(sqlite3.connect(store.path)) as db:
            assert db.execute(
                "SELECT id FROM device WHERE image IS NOT NULL ORDER BY id"
            ).fetchall() == [("a",), ("b",), ("c",)]
        assert {"nvdimmdrive-a", "virtio-drive-b", "virtio-drive-c"} <= names(machine)[
            "/machine/peripheral"
        ]
        new = await sandbox.attach(machine.image("new"), timeout=ENOUGH)
        assert new.held.index == 3
        # What is gone all the same is lost, and what goes by its own name is detached by it.
        remove_disk(machine, node="drive-c", device="virtio-drive-c")
        assert [(one.found, one.outcome, one.device_id) for one in await sandbox.reconcile()] == [
            (Found.LOST, Outcome.FREED, "c")
        ]
        await sandbox.detach("b", timeout=ENOUGH)
        left = names(machine)
        assert (
            "virtio-drive-b" not in left["/machine/peripheral"] and "drive-b" not in left["nodes"]
        )
        assert list(sandbox.index) == [0, 3]


async def test_a_detach_that_ends_while_qemu_is_being_asked(
    bare_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, answered = asyncio.Event(), asyncio.Event()
    inventory = QemuHypervisor.inventory

    async def late(self: QemuHypervisor, ours: Collection[BlockDrive] = ()) -> Inventory:
        found = await inventory(self, ours)
        answered.set()
        await answer.wait()
        return found

    image = bare_machine.image("a")
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=None) as sandbox:
        own = await sandbox.attach(bare_machine.image("own"), device_id="own", timeout=ENOUGH)
        device = await sandbox.attach(image, device_id="a", timeout=ENOUGH)
        monkeypatch.setattr(QemuHypervisor, "inventory", late)
        reconciling = asyncio.create_task(sandbox.reconcile())
        await asyncio.wait_for(answered.wait(), ENOUGH)
        await sandbox.detach(device, timeout=ENOUGH)
        answer.set()
        assert await reconciling == []
        assert list(sandbox.index) == [own.held.index] and drive_ids(sandbox) == {"drive-own"}
        again = await sandbox.attach(image, device_id="a", timeout=ENOUGH)
        assert (again.held.index, again.held.predicted_name) == (1, "/dev/sdb")


async def test_a_detach_that_begins_while_qemu_is_being_asked(bare_machine: Machine) -> None:
    """The listings are of different moments, so one of them may know a disk of which the others
    know nothing."""
    image = bare_machine.image("a")
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=None) as sandbox:
        for _ in range(30):
            device = await sandbox.attach(image, device_id="a", timeout=ENOUGH)
            detach = asyncio.create_task(sandbox.detach(device, timeout=ENOUGH))
            assert await sandbox.reconcile() == []
            await detach
            assert not list(sandbox.index) and not drive_ids(sandbox)
        assert (
            await sandbox.attach(image, device_id="a", timeout=ENOUGH)
        ).held.predicted_name == "/dev/sda"


async def test_the_machines_own_disks_come_and_go(bare_machine: Machine) -> None:
    images = [bare_machine.image(f"own{number}") for number in range(3)]
    for lun in (0, 2):
        add_disk(bare_machine, images[lun], node=f"n{lun}", device=f"own{lun}", lun=lun)
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=None) as sandbox:
        device = await sandbox.attach(bare_machine.image("a"), timeout=ENOUGH)
        assert device.held.index == 1 and list(sandbox.index) == [0, 1, 2]
        remove_disk(bare_machine, node="n0", device="own0")
        assert await sandbox.reconcile() == []
        assert list(sandbox.index) == [1, 2]
        assert (await sandbox.attach(bare_machine.image("b"), timeout=ENOUGH)).held.index == 0
        assert (await sandbox.attach(bare_machine.image("c"), timeout=ENOUGH)).held.index == 3


async def test_an_orphan_that_was_removed_is_forgotten(bare_machine: Machine) -> None:
    image = bare_machine.image("q")
    add_disk(bare_machine, image, node="drive-q", device="drive-q", lun=0)
    before = names(bare_machine)
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=None) as sandbox:
        with pytest.raises(DeviceConflict, match="drive-q"):
            await sandbox.attach(image, device_id="q", timeout=ENOUGH)
        assert [(one.found, one.outcome) for one in await sandbox.reconcile()] == [
            (Found.ORPHAN, Outcome.LEFT)
        ]
        assert names(bare_machine) == before
        assert [(one.found, one.outcome) for one in await sandbox.reconcile(orphans=True)] == [
            (Found.ORPHAN, Outcome.REMOVED)
        ]
        assert "drive-q" not in names(bare_machine)["nodes"]
        device = await sandbox.attach(image, device_id="q", timeout=ENOUGH)
        assert (device.held.id, device.held.index) == ("drive-q", 0)


async def test_an_orphan_that_two_remove_at_once(bare_machine: Machine) -> None:
    """Each of them may find it, and each hears that it is gone."""
    add_disk(bare_machine, bare_machine.image("q"), node="drive-q", device="drive-q", lun=0)
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=None) as sandbox:
        found = await asyncio.gather(
            sandbox.reconcile(orphans=True), sandbox.reconcile(orphans=True)
        )
        assert {one.outcome for each in found for one in each} == {Outcome.REMOVED}
        assert "drive-q" not in names(bare_machine)["nodes"]


async def test_a_controller_that_is_not_on_pci(start_machine: Start, store: SqliteStore) -> None:
    """QEMU's microvm has no PCI: its SCSI controller sits on a virtio-mmio bus."""
    machine = start_machine("microvm", guest=False)
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as sandbox:
        devices = await sandbox.attach_many([machine.image(name) for name in "abc"], timeout=ENOUGH)
        assert [device.held.scsi_addr for device in devices] == ["0:0", "0:1", "0:2"]
        with pytest.raises(SlotsExhausted):
            await sandbox.attach(machine.image("d"), driver="virtio-blk", timeout=ENOUGH)
        await sandbox.detach_many(devices, timeout=ENOUGH)
        assert not sandbox.devices and not list(sandbox.index)


async def test_no_controller_at_all(start_machine: Start) -> None:
    machine = start_machine("microvm", guest=False, scsi=False)
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=None) as sandbox:
        with pytest.raises(UnknownDriver, match="virtio-scsi-device"):
            await sandbox.attach(machine.image("a"), timeout=ENOUGH)
        assert not sandbox.devices


async def test_controllers_without_an_id(start_machine: Start) -> None:
    machine = start_machine(
        guest=False, scsi=False, extra=["-device", "virtio-scsi-pci", "-device", "virtio-scsi-pci"]
    )
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=None) as sandbox:
        device = await sandbox.attach(machine.image("a"), timeout=ENOUGH)
        assert device.held.place == "scsi.0"
        await sandbox.detach(device, timeout=ENOUGH)
