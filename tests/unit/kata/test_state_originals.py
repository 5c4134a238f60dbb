"""Whatever pyblock writes, the original of 2020-05 and that of 2026-08 load: values of their kinds,
and no key that neither knows."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import originals, released, samples
from support.snapshot import MakeImage, MakeStore, plug_in
from support.store_scene import older_store

from pyblock import DRIVERS, AttachPending, BlockDevice, DetachPending, DeviceInfo, Phase, Sandbox
from pyblock.kata.schema import decode, encode
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio

OURS = {"Pyblock", "Devices.Pyblock", "Devices.BlockDrive.Pyblock"}  # which both skip
VERSIONS = [*originals.VERSIONS]


def both_load(text: bytes, *, read: bytes = b"{}") -> dict[str, Any]:
    """What each version reads, by version; beside our own keys there are only strangers that were
    in what had been read."""
    assert originals.strangers(text) - originals.strangers(read) <= OURS
    return {version: originals.load(version, text) for version in VERSIONS}


def drives(state: Any) -> dict[str, Any]:
    return {device.ID: device.BlockDrive for device in state.Devices}


async def saved_again(text: bytes, *, times: int = 1) -> bytes:
    """What comes out after that many loads and saves."""
    for _ in range(times):
        async with Sandbox("s1", MemoryHypervisor()) as sandbox:
            await sandbox.restore(decode(text, where="a sample"))
            text = encode(sandbox.state())
    return text


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_is_as_strict_as_the_originals_decoder(version: str) -> None:
    good = samples.sandbox([samples.device(0, samples.drive(0))], [0])
    originals.load(version, samples.text(good))
    for place, value in [
        ("Index", "0"),
        ("Index", 0.5),
        ("Pmem", "true"),
        ("DevNo", 2),
        ("NvdimmID", 0),
        ("File", ["x"]),
    ]:
        bad = samples.sandbox([samples.device(0, samples.drive(0, **{place: value}))], [0])
        with pytest.raises(msgspec.ValidationError):
            originals.load(version, samples.text(bad))
    for place, value in [
        ("Major", 2**63),
        ("AttachCount", -1),
        ("DriverOptions", {"a": 1}),
        ("BlockDrive", "x"),
    ]:
        with pytest.raises(msgspec.ValidationError):
            originals.load(
                version,
                samples.text(samples.sandbox([samples.device(0, None, **{place: value})], [])),
            )
    with pytest.raises(msgspec.ValidationError):
        originals.load(version, samples.text({"HypervisorState": {"BlockIndexMap": {"x": {}}}}))
    # null, other keys, and keys in another case
    state = samples.sandbox([samples.device(0, samples.drive(0, New=[1]), DriverOptions=None)], [0])
    originals.load(version, samples.text(state))
    with pytest.raises(msgspec.ValidationError):
        originals.load(
            version,
            samples.text(samples.sandbox([samples.device(0, samples.drive(0, index="0"))], [0])),
        )


def test_the_two_versions_differ_in_the_pci_address() -> None:
    text = samples.text(
        samples.sandbox([samples.device(0, samples.drive(0, PCIPath="02/00"))], [0])
    )
    originals.load("2020-05", text)  # it knows no such key
    with pytest.raises(msgspec.ValidationError, match="PCIPath"):
        originals.load("2026-08", text)
    text = samples.text(
        samples.sandbox(
            [samples.device(0, samples.drive(0, PCIAddr="02/00", PCIPath={"slots": [2]}))], [0]
        )
    )
    assert originals.load("2020-05", text).Devices[0].BlockDrive.PCIAddr == "02/00"
    originals.load("2026-08", text)


async def test_every_driver_phase_and_count(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        for driver in DRIVERS:
            await sandbox.attach(image := make_image(driver), driver=driver, device_id=driver)
            await sandbox.attach(image, driver=driver)
            await sandbox.attach(
                make_image(f"{driver}-ro"), driver=driver, read_only=True, device_id=f"{driver}-ro"
            )
            await sandbox.attach(
                make_image(f"{driver}-share"),
                driver=driver,
                share=True,
                device_id=f"{driver}-share",
            )
        await sandbox.attach(
            DeviceInfo(path=str(make_image("ext4")), id="ext4", options={"fstype": "ext4"})
        )
        await sandbox.attach(make_image("serial"), serial="A-SERIAL", device_id="x" * 60)
        sandbox.manager.obtain(DeviceInfo(path=str(make_image("detached")), id="detached"))
        for kind, number in (("c", 229), ("u", 230)):
            generic = sandbox.manager.obtain(DeviceInfo(dev_type=kind, major=10, minor=number))
            await sandbox.manager.attach(generic.id, sandbox)
        leaving = await sandbox.attach(
            make_image("leaving"), device_id="leaving", driver="virtio-blk"
        )
        vm.fail("device-add", Fault("lose"))
        vm.fail("device-gone", Fault("lose", done=False))
        images = make_image("coming"), make_image("under-way")
        errors = await asyncio.gather(
            sandbox.attach(images[0], device_id="coming"),
            sandbox.detach(leaving),
            return_exceptions=True,
        )
        assert [type(error) for error in errors] == [AttachPending, DetachPending]
        text = encode(sandbox.state())
        phases = {device.phase for device in sandbox.devices if isinstance(device, BlockDevice)}
        assert phases == {
            Phase.ATTACHED,
            Phase.DETACHED,
            Phase.ATTACH_PENDING,
            Phase.DETACH_PENDING,
        }
    for one in (text, await saved_again(text), await saved_again(text, times=2)):
        for version, state in both_load(one).items():
            assert len(state.Devices) == len(json.loads(text)["Devices"])
            found = drives(state)
            assert (found["virtio-scsi"].SCSIAddr, found["virtio-scsi"].VirtPath) == ("0:0", "")
            assert found["virtio-blk"].VirtPath == "/dev/vda"
            assert re.fullmatch(r"0\.0\.000[0-9]", found["virtio-blk-ccw"].DevNo)
            assert (found["nvdimm"].NvdimmID, found["nvdimm"].Pmem) == ("0", True)
            assert found["nvdimm-share"].NvdimmID == "2"
            if version == "2020-05":
                assert found["virtio-blk"].PCIAddr == "02/00"
            else:
                assert found["virtio-blk-ro"].ReadOnly and found["virtio-blk-share"].ShareRW
            # 2020 takes two devices of one Major:Minor for the same; 2026 knows a file by -1.
            assert {
                (device.Major, device.Minor) for device in state.Devices if device.Type == "block"
            } == {(-1, 0)}


@pytest.mark.parametrize("name", samples.KATA)
@pytest.mark.parametrize("times", [1, 2])
async def test_what_the_original_wrote(name: str, times: int) -> None:
    read = samples.text(samples.KATA[name])
    both_load(await saved_again(read, times=times), read=read)


@pytest.mark.parametrize("name", samples.KATA)
async def test_what_the_original_wrote_when_its_detach_is_pending(name: str) -> None:
    read = samples.text(samples.KATA[name])
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.restore(decode(read, where="a sample"))
        plug_in(vm, sandbox)
        device = next(
            (one for one in sandbox.devices if isinstance(one, BlockDevice) and one.attached), None
        )
        if device is not None:
            device.attach_count = 1
            vm.fail("device-del", Fault("lose", done=False))
            with pytest.raises(DetachPending):
                await sandbox.detach(device)
        text = encode(sandbox.state())
    for one in (text, await saved_again(text), await saved_again(text, times=2)):
        both_load(one, read=read)


RELEASED = {"own": released.OWN, "kata": released.KATA}


@pytest.mark.parametrize("name", RELEASED)
async def test_what_was_released_is_read_and_written_for_both(name: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(RELEASED[name])
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        await sandbox.load(path)
        held = {device.id: device for device in sandbox.devices}
        await sandbox.save(path)
    text = path.read_bytes()
    assert held.keys() == {device["ID"] for device in json.loads(RELEASED[name])["Devices"]}
    both_load(text, read=RELEASED[name])
    assert await saved_again(text) == text


async def test_what_was_released_means_the_same(tmp_path: Path, make_store: MakeStore) -> None:
    """Out of a file, and out of the rows of a store."""
    store = make_store()
    older_store(
        store.path,
        1,
        {"s1": [(row["ID"], json.dumps(row)) for row in json.loads(released.OWN)["Devices"]]},
    )
    path = tmp_path / "state"
    path.write_bytes(released.OWN)
    for kept in (None, store):
        async with Sandbox("s1", MemoryHypervisor(), store=kept, recover=False) as sandbox:
            if kept is None:
                await sandbox.load(path)
            found = {
                device.id: device for device in sandbox.devices if isinstance(device, BlockDevice)
            }
            names = {one: device.held.predicted_name for one, device in found.items()}
            assert (names["virtio-scsi"], names["virtio-blk"], names["virtio-blk-ccw"]) == (
                "/dev/sda",
                "/dev/vda",
                "/dev/vdb",
            )
            assert (names["virtio-mmio"], names["nvdimm"], names["dp"]) == (
                "/dev/vdd",
                "/dev/pmem0",
                "/dev/vdd",
            )
            blk, nvdimm, ccw = (
                found[one].held for one in ("virtio-blk", "nvdimm", "virtio-blk-ccw")
            )
            assert (blk.pci_path, blk.place, blk.guest_match) == (
                "02/00",
                "0",
                "0000:00:02.0/0000:01:00.0",
            )
            assert (nvdimm.nvdimm_id, nvdimm.guest_match, ccw.dev_no) == (
                "0",
                "/region0/",
                "0.0.0002",
            )
            assert found["dp"].phase is Phase.DETACH_PENDING and found["shared"].info.share
            assert found["virtio-scsi"].attach_count == 2 and found["virtio-scsi"].identity == (
                "file",
                65024,
                9980099,
            )
            assert (
                found["virtio-mmio"].info.read_only
                and found["ext4"].info.options["fstype"] == "ext4"
            )
            assert all(not device.kata for one, device in found.items() if one != "ext4")
