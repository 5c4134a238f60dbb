"""A machine that the original filled, under names of its own, taken over: what is there, what it is
called, and how it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import Machine
from support import samples
from support.store_scene import AsWritten, as_written

from pyblock import BlockDevice, ImageInUse, Phase, Sandbox, VmmRefused
from pyblock.kata.schema import SandboxState, decode, encode
from pyblock.life.recovery import Found, Outcome
from pyblock.store.sqlite.store import SqliteStore

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

Start = Callable[..., Machine]

ENOUGH = 60.0  # seconds: a deadline that is not meant to pass
UNSUPPORTED = "nvdimm device hot unplug is not supported yet"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state.db")
    yield store
    store.close()


class Kata:
    """What the original does in a machine, and the state that it writes of it."""

    def __init__(self, machine: Machine, driver: str = "virtio-scsi") -> None:
        self.machine = machine
        self.driver = driver
        self.devices: list[dict[str, Any]] = []
        self.pmem = 0  # as it counts them

    def state(self) -> SandboxState:
        return decode(
            samples.text(samples.sandbox(self.devices, [*range(len(self.devices))])),
            where="a sample",
        )

    def plug(self, name: str, **keys: Any) -> Path:
        """A disk of the sandbox's driver, behind the PCI bridge or root port `bus` where that is
        virtio-blk."""
        image, number, drive = self.machine.image(name), len(self.devices), f"drive-{name}"
        node = {
            "driver": "raw",
            "node-name": drive,
            "file": {"driver": "file", "filename": str(image)},
        }
        self.machine.side.command("blockdev-add", node)
        bus = keys.pop("bus", None)
        if self.driver == "virtio-scsi":
            where = {"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": 0, "lun": number}
            keys["SCSIAddr"] = f"0:{number}"
        else:
            where = {"driver": "virtio-blk-pci", "bus": bus, "addr": "0"}
            keys["VirtPath"] = f"/dev/vd{'abc'[number]}"
        self.machine.side.command(
            "device_add", {**where, "id": f"virtio-{drive}", "drive": drive, "share-rw": True}
        )
        self._write(name, image, **keys)
        return image

    def plug_pmem(self, name: str) -> Path:
        image, drive = self.machine.image(name), f"drive-{name}"
        memory = {
            "qom-type": "memory-backend-file",
            "id": f"nvdimmbackmem{drive}",
            "mem-path": str(image),
            "size": 16 << 20,
            "share": True,
        }
        self.machine.side.command("object-add", memory)
        self.machine.side.command(
            "device_add", driver="nvdimm", id=f"nvdimm{drive}", memdev=f"nvdimmbackmem{drive}"
        )
        # The driver of the sandbox fills in what it would have.
        filled = (
            {"SCSIAddr": f"0:{len(self.devices)}"}
            if self.driver == "virtio-scsi"
            else {"VirtPath": "/dev/vda"}
        )
        self._write(name, image, Pmem=True, NvdimmID=str(self.pmem), **filled)
        self.pmem += 1
        return image

    def _write(self, name: str, image: Path, **keys: Any) -> None:
        drive = samples.drive(len(self.devices), File=str(image), ID=f"drive-{name}", **keys)
        options = {"block-driver": self.driver}
        self.devices.append(
            samples.device(
                len(self.devices), drive, ID=name, Major=-1, Minor=0, DriverOptions=options
            )
        )


def names(sandbox: Sandbox | AsWritten) -> dict[str, str]:
    return {
        one.id: one.held.guess.removeprefix("/dev/")
        for one in sandbox.devices
        if isinstance(one, BlockDevice)
    }


def find(sandbox: Sandbox | AsWritten, device_id: str) -> BlockDevice:
    [device] = [device for device in sandbox.devices if device.id == device_id]
    assert isinstance(device, BlockDevice)
    return device


def listed(machine: Machine, path: str) -> set[str]:
    return {entry["name"] for entry in machine.side.command("qom-list", path=path)}


@pytest.mark.parametrize("driver", ["virtio-scsi", "virtio-blk"])
async def test_a_pmem_disk_stays(
    driver: str, start_machine: Start, store: SqliteStore, tmp_path: Path
) -> None:
    machine = start_machine(guest=False, nvdimm_slots=2)
    kata = Kata(machine, driver)
    image = kata.plug_pmem("a")
    path = tmp_path / "kata.json"
    path.write_bytes(encode(kata.state()))
    for opening in range(2):
        async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as sandbox:
            if opening == 0:
                await sandbox.load(path)
            assert await sandbox.reconcile(orphans=True) == []
            device = find(sandbox, "a")
            with pytest.raises(VmmRefused, match=UNSUPPORTED):
                await sandbox.detach("a", timeout=ENOUGH)
            assert (device.phase, device.attach_count, device.held.driver) == (
                Phase.ATTACHED,
                1,
                "nvdimm",
            )
            assert (device.held.predicted_name, device.held.guest_match, list(sandbox.index)) == (
                "/dev/pmem0",
                "/region0/",
                [0],
            )
        assert "nvdimmdrive-a" in listed(
            machine, "/machine/peripheral"
        ) and "nvdimmbackmemdrive-a" in listed(machine, "/objects")
        async with Sandbox("other", "memory:", store=store) as other:
            with pytest.raises(ImageInUse):
                await other.attach(image)


async def test_memory_that_was_left_behind_goes(start_machine: Start) -> None:
    """The original was cut off between the two commands of an attach, or after the machine was
    started anew."""
    machine = start_machine(guest=False, nvdimm_slots=2)
    kata = Kata(machine)
    image = machine.image("a")
    memory = {
        "qom-type": "memory-backend-file",
        "id": "nvdimmbackmemdrive-a",
        "mem-path": str(image),
        "size": 16 << 20,
        "share": True,
    }
    machine.side.command("object-add", memory)
    kata._write("a", image, Pmem=True, NvdimmID="0")
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=None) as sandbox:
        await sandbox.restore(kata.state())
        assert [(one.found, one.outcome) for one in await sandbox.reconcile()] == [
            (Found.LOST, Outcome.REMOVED)
        ]
        assert "nvdimmbackmemdrive-a" not in listed(machine, "/objects") and not len(sandbox.index)


@pytest.mark.parametrize("mapped", [True, False])
async def test_a_detach_that_finds_nothing_is_refused(mapped: bool, start_machine: Start) -> None:
    """The machine has the image under a name that the state does not tell, as memory or as a block
    node."""
    machine = start_machine(guest=False, nvdimm_slots=2)
    kata = Kata(machine)
    image = machine.image("a")
    if mapped:
        memory = {
            "qom-type": "memory-backend-file",
            "id": "m",
            "mem-path": str(image),
            "size": 16 << 20,
            "share": True,
        }
        machine.side.command("object-add", memory)
        machine.side.command("device_add", driver="nvdimm", id="n", memdev="m")
    else:
        machine.side.command(
            "blockdev-add",
            {"driver": "raw", "node-name": "m", "file": {"driver": "file", "filename": str(image)}},
        )
        machine.side.command(
            "device_add",
            {
                "driver": "scsi-hd",
                "id": "n",
                "drive": "m",
                "bus": "scsi0.0",
                "scsi-id": 0,
                "lun": 7,
            },
        )
    kata._write("a", image, SCSIAddr="0:0")
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=None) as sandbox:
        await sandbox.restore(kata.state())
        for _ in range(2):
            with pytest.raises(VmmRefused, match="in use"):
                await sandbox.detach("a", timeout=ENOUGH)
            assert find(sandbox, "a").attached and 0 in sandbox.index
        assert await sandbox.reconcile() == []
        if not mapped:
            machine.side.command("device_del", id="n")
            machine.side.wait_event("DEVICE_DELETED", device="n")
            machine.side.command("blockdev-del", {"node-name": "m"})
            assert [(one.found, one.outcome) for one in await sandbox.reconcile()] == [
                (Found.LOST, Outcome.FREED)
            ]


async def test_names_go_on_after_the_originals(start_machine: Start, store: SqliteStore) -> None:
    machine = start_machine(guest=False, nvdimm_slots=4)
    kata = Kata(machine)
    kata.plug("a")
    kata.plug_pmem("b")
    kata.plug("c")
    own = machine.image("own")
    machine.side.command(
        "blockdev-add",
        {"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": str(own)}},
    )
    machine.side.command(
        "device_add",
        {"driver": "scsi-hd", "id": "own", "drive": "n", "bus": "scsi0.0", "scsi-id": 0, "lun": 9},
    )
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as sandbox:
        await sandbox.restore(kata.state())
        for name, driver in [
            ("d", "virtio-scsi"),
            ("e", "virtio-scsi"),
            ("f", "virtio-blk"),
            ("g", "nvdimm"),
        ]:
            await sandbox.attach(machine.image(name), driver=driver, device_id=name, timeout=ENOUGH)
        # One name is the machine's own disk's.
        expected = {
            "a": "sdb",
            "b": "pmem0",
            "c": "sdc",
            "d": "sdd",
            "e": "sde",
            "f": "vda",
            "g": "pmem1",
        }
        assert names(sandbox) == expected
        found = {
            one.id: one.held.guest_match for one in sandbox.devices if isinstance(one, BlockDevice)
        }
        assert (found["a"], found["b"], found["c"]) == (
            ":0:0:0/block/",
            "/region0/",
            ":0:0:2/block/",
        )
    kept = await as_written(store, "one")
    assert names(kept) == expected and find(kept, "c").held.guest_match == ":0:0:2/block/"
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as sandbox:
        assert names(sandbox) == expected
        device = await sandbox.attach(machine.image("h"), timeout=ENOUGH)
        assert device.held.predicted_name == "/dev/sdf"
        await sandbox.detach("a", timeout=ENOUGH)
        assert "virtio-drive-a" not in listed(machine, "/machine/peripheral")


@pytest.mark.parametrize("told", ["PCIAddr", "PCIPath", None])
async def test_a_disk_behind_a_port_is_told_by_it(
    told: str | None, start_machine: Start, store: SqliteStore
) -> None:
    """The original of today writes no PCI address at all; the machine knows it."""
    machine = start_machine(guest=False)
    kata = Kata(machine, "virtio-blk")
    kata.plug(
        "a",
        bus="rp1",
        **({"PCIAddr": "03/00"} if told == "PCIAddr" else {"PCIPath": "03/00" if told else {}}),
    )
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as sandbox:
        await sandbox.restore(kata.state())
        assert await sandbox.reconcile(dry_run=True) == []
        new = await sandbox.attach(machine.image("new"), driver="virtio-blk", timeout=ENOUGH)
        held = find(sandbox, "a").held
        assert held.pci_path is not None and held.guest_match == f"/0000:00:{held.pci_path[:2]}.0/"
        assert (
            new.held.guest_match not in (None, held.guest_match)
            and new.held.predicted_name == "/dev/vdb"
        )
        expected = held.pci_path, held.guest_match
    kept = find(await as_written(store, "one"), "a").held
    assert (kept.pci_path, kept.guest_match) == expected
