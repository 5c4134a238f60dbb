"""What is saved comes back: counts, phases, names and numbers, and the sandbox goes on where the
other one stopped."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from support.snapshot import MakeImage
from support.turns import BEGUN

from pyblock import (
    DRIVERS,
    AttachPending,
    BlockDevice,
    CallerError,
    DetachPending,
    DeviceInfo,
    GenericDevice,
    Phase,
    Sandbox,
)
from pyblock.kata.schema import PLAIN
from pyblock.life.recovery import Found, Outcome
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio

DEVICE_KEYS = {
    "ID",
    "Type",
    "RefCount",
    "AttachCount",
    "DevType",
    "Major",
    "Minor",
    "DriverOptions",
    "ColdPlug",
    "BlockDrive",
}
DRIVE_KEYS = {
    "File",
    "Format",
    "ID",
    "Index",
    "MmioAddr",
    "SCSIAddr",
    "NvdimmID",
    "VirtPath",
    "DevNo",
    "Pmem",
}
# those that only some versions of the original have, and that pyblock writes
OTHER_KEYS = {"PCIAddr", "ReadOnly"}


def facts(sandbox: Sandbox) -> dict[str, tuple[Any, ...]]:
    """Each device as a value that must survive a save and load."""
    found: dict[str, tuple[Any, ...]] = {}
    for device in sandbox.devices:
        if isinstance(device, GenericDevice):
            found[device.id] = (device.attach_count, device.ref_count, device.info)
        else:
            drive = device.drive
            shown = None
            if drive is not None:
                own = [getattr(drive, name) for name in drive.__struct_fields__ if name != "info"]
                asked_for = (
                    drive.driver,
                    drive.file,
                    drive.format,
                    drive.read_only,
                    drive.serial,
                    drive.share,
                )
                shown = (*own, *asked_for, drive.predicted_name, drive.virt_path, drive.scsi_addr)
            info = device.info
            asked = (info.path, info.driver, info.read_only, info.serial, device.identity)
            found[device.id] = (device.phase, device.attach_count, device.ref_count, asked, shown)
    return found


async def reload(sandbox: Sandbox, vm: MemoryHypervisor, path: Path) -> Sandbox:
    """The sandbox as another process would have it after a save."""
    await sandbox.save(path)
    other = Sandbox(sandbox.id, vm)
    await other.__aenter__()
    await other.load(path)
    return other


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


async def test_everything_comes_back(make_image: MakeImage, path: Path) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        for driver in DRIVERS:
            once = await sandbox.attach(make_image(f"{driver}-once"), driver=driver)
            await sandbox.attach(make_image(f"{driver}-read-only"), driver=driver, read_only=True)
            for _ in range(3):
                await sandbox.attach(
                    make_image(f"{driver}-3") if once.attach_count == 0 else Path(once.info.path),
                    driver=driver,
                )
        await sandbox.attach(make_image("serial"), serial="A-SERIAL", device_id="x" * 60)
        await sandbox.attach(DeviceInfo(path=str(make_image("ext4")), options={"fstype": "ext4"}))
        fuse = sandbox.manager.obtain(DeviceInfo(dev_type="c", major=10, minor=229, id="fuse"))
        await sandbox.manager.attach("fuse", sandbox)
        assert fuse.attach_count == 1
        other = await reload(sandbox, vm, path)
        assert facts(other) == facts(sandbox)
        assert list(other.index) == list(sandbox.index)
        assert other.state() == sandbox.state()
        first = path.read_bytes()
        await other.save(path)
        assert path.read_bytes() == first


async def test_keys_are_the_originals(make_image: MakeImage, path: Path) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        for driver in DRIVERS:
            await sandbox.attach(make_image(driver), driver=driver, device_id=driver)
        sandbox.manager.obtain(DeviceInfo(path=str(make_image("detached")), id="detached"))
        await sandbox.save(path)
    state = json.loads(path.read_bytes())
    assert state.keys() == {"Pyblock", "Devices", "HypervisorState"}
    assert state["HypervisorState"] == {
        "BlockIndexMap": {str(index): {} for index in range(len(DRIVERS))}
    }
    assert state["Pyblock"]["Version"] == PLAIN
    devices = {device["ID"]: device for device in state["Devices"]}
    assert devices.pop("detached").keys() == (DEVICE_KEYS | {"Pyblock"}) - {"BlockDrive"}
    for device in devices.values():
        assert device.keys() == DEVICE_KEYS | {"Pyblock"}
        assert device["BlockDrive"].keys() == DRIVE_KEYS | OTHER_KEYS | {"Pyblock"}
    drives = {driver: devices[driver]["BlockDrive"] for driver in DRIVERS}
    assert (drives["virtio-scsi"]["SCSIAddr"], drives["virtio-scsi"]["VirtPath"]) == ("0:0", "")
    assert (
        drives["virtio-blk"]["PCIAddr"],
        drives["virtio-blk"]["VirtPath"],
        drives["virtio-blk"]["Index"],
    ) == ("02/00", "/dev/vda", 1)
    assert (
        drives["nvdimm"]["NvdimmID"],
        drives["nvdimm"]["Pmem"],
        drives["nvdimm"]["VirtPath"],
    ) == ("0", True, "")
    assert drives["virtio-blk-ccw"]["DevNo"] == "0.0.0002"
    assert devices["virtio-blk"]["DriverOptions"] == {"block-driver": "virtio-blk"}
    assert (devices["virtio-blk"]["Type"], devices["virtio-blk"]["DevType"]) == ("block", "b")
    assert (devices["virtio-blk"]["Major"], devices["virtio-blk"]["Minor"]) == (-1, 0)


async def test_pending_devices_come_back_and_are_settled(make_image: MakeImage, path: Path) -> None:
    vm = MemoryHypervisor()
    sandbox = Sandbox("s1", vm)
    async with sandbox:
        await sandbox.attach(make_image("kept"), device_id="kept")
        leaving = await sandbox.attach(
            make_image("detach"), device_id="detach", driver="virtio-blk"
        )
        for done in (True, False):
            vm.fail("device-add", Fault("lose", done=done))
        vm.fail("device-gone", Fault("lose", done=False))
        errors = await asyncio.gather(
            *(
                sandbox.attach(make_image(f"attach-{done}"), device_id=f"attach-{done}")
                for done in (True, False)
            ),
            sandbox.detach(leaving),
            return_exceptions=True,
        )
        assert [type(error) for error in errors] == [AttachPending, AttachPending, DetachPending]
        expected = facts(sandbox)
        other = await reload(sandbox, vm, path)
    assert facts(other) == expected
    assert {device.phase for device in other.devices if isinstance(device, BlockDevice)} == {
        Phase.ATTACHED,
        Phase.ATTACH_PENDING,
        Phase.DETACH_PENDING,
    }
    found = {(one.device_id, one.found, one.outcome) for one in await other.reconcile()}
    assert found == {
        ("attach-True", Found.ATTACH, Outcome.REMOVED),
        ("attach-False", Found.ATTACH, Outcome.REMOVED),
        ("detach", Found.DETACH, Outcome.REMOVED),
    }
    # whoever was told "pending" may call again
    await other.detach_many(["attach-True", "attach-False", "detach"])
    assert list(facts(other)) == ["kept"]
    assert vm.devices.keys() == vm.backends.keys() == {"drive-kept"}
    assert list(other.index) == [0]
    await other.close()


@pytest.mark.parametrize(
    ("step", "phase"), [("device-add", Phase.ATTACH_PENDING), ("device-gone", Phase.DETACH_PENDING)]
)
async def test_what_is_under_way_is_saved_as_pending(
    make_image: MakeImage, path: Path, step: str, phase: Phase
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        image = make_image("image")
        vm.fail(step, Fault("hold"))
        with pytest.raises((AttachPending, DetachPending)):
            await sandbox.attach(image, device_id="x", timeout=BEGUN)
            await sandbox.detach("x", timeout=BEGUN)
        other = await reload(sandbox, vm, path)
        [device] = other.devices
        assert isinstance(device, BlockDevice)
        assert device.phase is phase
        assert list(other.index) == [0]
        vm.let_go(step)
        await other.detach("x")
        assert (other.devices, list(other.index)) == ([], [])


async def test_numbers_and_names_go_on(make_image: MakeImage, path: Path) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        drivers = [
            "virtio-scsi",
            "virtio-blk",
            "virtio-scsi",
            "virtio-blk",
            "nvdimm",
            "virtio-scsi",
            "virtio-blk",
        ]
        devices = [
            await sandbox.attach(make_image(f"image{n}"), driver=driver, device_id=f"d{n}")
            for n, driver in enumerate(drivers)
        ]
        names = {device.id: device.held.predicted_name for device in devices}
        assert [*names.values()] == [
            "/dev/sda",
            "/dev/vda",
            "/dev/sdb",
            "/dev/vdb",
            "/dev/pmem0",
            "/dev/sdc",
            "/dev/vdc",
        ]
        await sandbox.detach("d1")  # vda, index 1
        await sandbox.detach("d2")  # sdb, index 2
        other = await reload(sandbox, vm, path)
        # the one that was saved is the oracle for the one that was loaded
        for front in (sandbox, other):
            if front is other:
                for device_id in ("e0", "e1", "e2", "e3"):
                    await sandbox.detach(device_id)
            found = [
                await front.attach(make_image(f"{id(front)}-{n}"), driver=driver, device_id=f"e{n}")
                for n, driver in enumerate(["virtio-blk", "virtio-blk", "virtio-scsi", "nvdimm"])
            ]
            got = [(device.held.index, device.held.predicted_name) for device in found]
            assert got == [(1, "/dev/vda"), (2, "/dev/vdd"), (7, "/dev/sdb"), (8, "/dev/pmem1")]
        for device in other.devices:
            await other.detach(device.id)
        assert (other.devices, list(other.index), vm.devices, vm.backends) == ([], [], {}, {})
        await other.close()


async def test_image_is_known_again_after_a_load(make_image: MakeImage, path: Path) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        image = make_image("image")
        await sandbox.attach(image, device_id="x")
        other = await reload(sandbox, vm, path)
        assert (await other.attach(image)).id == "x"
        assert [step for step, _ in vm.journal].count("device-add") == 1
        await other.detach("x")
        assert len(vm.devices) == 1
        await other.detach("x")
        assert len(vm.devices) == 0


async def test_block_offset_comes_back(make_image: MakeImage, path: Path) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm, driver="virtio-blk", block_offset=3) as sandbox:
        assert (await sandbox.attach(make_image("one"))).held.predicted_name == "/dev/vdd"
        other = await reload(sandbox, vm, path)
        assert (
            await other.attach(make_image("two"), driver="virtio-blk")
        ).held.predicted_name == "/dev/vde"


async def test_load_wants_a_sandbox_without_devices(make_image: MakeImage, path: Path) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.attach(make_image("image"))
        await sandbox.save(path)
        before = facts(sandbox)
        with pytest.raises(CallerError, match="1 devices"):
            await sandbox.load(path)
        assert facts(sandbox) == before


async def test_the_file_is_private_and_a_link_stays_a_link(
    make_image: MakeImage, tmp_path: Path
) -> None:
    real, linked = tmp_path / "real", tmp_path / "linked"
    linked.symlink_to(real)
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        await sandbox.attach(make_image("image"))
        for _ in range(2):
            await sandbox.save(linked)
            assert linked.is_symlink()
            assert stat.S_IMODE(real.stat().st_mode) == 0o600
        assert sorted(os.listdir(tmp_path)) == ["image", "linked", "real"]  # noqa: PTH208
