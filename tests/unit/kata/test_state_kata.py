"""What the original runtime wrote loads, and comes out again with every key and value; unknown keys
survive wherever they are."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import samples
from support.snapshot import MakeImage, drive_ids, ordinals, plug_in

from pyblock import BlockDevice, DetachPending, DeviceInfo, Phase, Sandbox
from pyblock.kata.schema import decode, encode
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio


def drives(sandbox: Sandbox) -> dict[str, tuple[Any, ...]]:
    """By device ID: driver, index, predicted name, PCI path, phase and counts."""
    found: dict[str, tuple[Any, ...]] = {}
    for device in sandbox.devices:
        assert isinstance(device, BlockDevice)
        drive = device.held
        found[device.id[-1]] = (
            drive.driver,
            drive.index,
            drive.predicted_name,
            drive.pci_path,
            device.phase,
            device.attach_count,
            device.ref_count,
        )
    return found


async def through(state: Any, path: Path, *, times: int = 1) -> Any:
    """The parsed JSON after that many loads and saves."""
    path.write_bytes(samples.text(state))
    for _ in range(times):
        async with Sandbox("s1", MemoryHypervisor()) as sandbox:
            await sandbox.load(path)
            await sandbox.save(path)
    return json.loads(path.read_bytes())


@pytest.mark.parametrize("name", samples.KATA)
@pytest.mark.parametrize("times", [1, 2])
async def test_every_key_comes_out_again(tmp_path: Path, name: str, times: int) -> None:
    state = samples.KATA[name]
    written = await through(state, tmp_path / "state", times=times)
    assert samples.without_pyblock(written) == samples.without_pyblock(samples.as_written(state))


EXPECTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "PCIAddr": {"0": ("virtio-scsi", 0, "/dev/sda", "02/00", Phase.ATTACHED, 1, 1)},
    "PCIPath as text": {
        str(n): ("virtio-blk", n, f"/dev/vd{'abc'[n]}", f"02/0{n}", Phase.ATTACHED, 1, 1)
        for n in range(3)
    },
    "PCIPath as object": {"0": ("virtio-scsi", 0, "/dev/sda", None, Phase.ATTACHED, 1, 1)},
    "counts": {
        str(n): ("virtio-scsi", n, f"/dev/sd{'abc'[n]}", None, Phase.ATTACHED, n + 1, n + 1)
        for n in range(3)
    },
    "vfio between": {
        str(n): ("virtio-scsi", n, f"/dev/sd{'abc'[n]}", None, Phase.ATTACHED, n + 1, n + 1)
        for n in range(2)
    },
    "nvdimm": {"0": ("nvdimm", 0, "/dev/pmem0", None, Phase.ATTACHED, 1, 1)},
    "pmem": {"0": ("nvdimm", 0, "/dev/pmem0", None, Phase.ATTACHED, 1, 1)},
    "ccw": {"0": ("virtio-blk-ccw", 0, "/dev/vda", None, Phase.ATTACHED, 1, 1)},
    "mmio": {"0": ("virtio-mmio", 0, "/dev/vdb", None, Phase.ATTACHED, 1, 1)},
}


@pytest.mark.parametrize("name", EXPECTED)
async def test_what_it_means(tmp_path: Path, name: str) -> None:
    path = tmp_path / "state"
    path.write_bytes(samples.text(samples.KATA[name]))
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        await sandbox.load(path)
        assert drives(sandbox) == EXPECTED[name]


async def test_it_goes_on_with_the_lowest_free(tmp_path: Path, make_image: MakeImage) -> None:
    path = tmp_path / "state"
    path.write_bytes(samples.text(samples.KATA["index without device"]))
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.load(path)
        assert list(sandbox.index) == [0, 1, 2, 7]
        plug_in(vm, sandbox)
        devices = [
            await sandbox.attach(make_image(f"image{n}"), driver=driver)
            for n, driver in enumerate(["virtio-scsi", "virtio-blk"] * 3)
        ]
        assert [device.held.index for device in devices] == [3, 4, 5, 6, 8, 9]
        assert [device.held.predicted_name for device in devices] == [
            f"/dev/{name}" for name in ("sdc", "vda", "sdd", "vdb", "sde", "vdc")
        ]
        await sandbox.detach(f"{0:016x}")
        assert (await sandbox.attach(make_image("again"))).held.predicted_name == "/dev/sda"


async def test_names_of_two_drivers_after_a_load(tmp_path: Path, make_image: MakeImage) -> None:
    """The original named by index whatever the driver: vdc is taken, and pyblock keeps to what was
    told to the guest's owner."""
    path = tmp_path / "state"
    path.write_bytes(samples.text(samples.sandbox([*samples.SCSI[:2], samples.BLK[2]], [0, 1, 2])))
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.load(path)
        plug_in(vm, sandbox)
        assert [name for _, _, name, *_ in drives(sandbox).values()] == [
            "/dev/sda",
            "/dev/sdb",
            "/dev/vdc",
        ]
        blk = [await sandbox.attach(make_image(f"image{n}"), driver="virtio-blk") for n in range(3)]
        assert [device.held.predicted_name for device in blk] == [
            "/dev/vda",
            "/dev/vdb",
            "/dev/vdd",
        ]
        for device in sandbox.devices:
            while device.id in sandbox.manager:
                await sandbox.detach(device.id)
        assert (list(sandbox.index), ordinals(sandbox), drive_ids(sandbox)) == ([], {}, set())


async def test_an_attach_after_the_originals_is_saved_as_it_is(
    tmp_path: Path, make_image: MakeImage
) -> None:
    path = tmp_path / "state"
    state = samples.sandbox(
        [
            samples.device(
                0,
                samples.drive(0, File=str(make_image("image")), SCSIAddr="0:0"),
                AttachCount=1,
                RefCount=2,
            )
        ],
        [0],
    )
    path.write_bytes(samples.text(state))
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.load(path)
        plug_in(vm, sandbox)
        await sandbox.attach(make_image("new"), device_id="new", driver="nvdimm")
        [old, _] = sandbox.devices
        await sandbox.detach(old)
        assert isinstance(old, BlockDevice)
        assert old.phase is Phase.DETACHED
        await sandbox.attach(make_image("newer"), device_id="newer")  # takes index 0
        await sandbox.manager.attach(old.id, sandbox)
        assert old.held.index == 2
        await sandbox.save(path)
    saved = {
        device["ID"]: device["BlockDrive"]["Index"]
        for device in json.loads(path.read_bytes())["Devices"]
    }
    assert saved == {old.id: 2, "new": 1, "newer": 0}
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        await sandbox.load(path)
        assert list(sandbox.index) == [0, 1, 2]


def levels(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Every object in a state whose keys are a matter between its writer and pyblock."""
    found = [state, state["HypervisorState"], *state["HypervisorState"]["BlockIndexMap"].values()]
    for device in state["Devices"]:
        found += [device, *([device["BlockDrive"]] if "BlockDrive" in device else [])]
    return found


async def pyblocks_own(folder: Path) -> Any:
    """A state that pyblock wrote."""
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        for driver in ("virtio-scsi", "virtio-blk"):
            image = folder / driver
            image.write_bytes(b"x")
            await sandbox.attach(image, driver=driver)
        generic = sandbox.manager.obtain(DeviceInfo(dev_type="c", major=10, minor=229))
        await sandbox.manager.attach(generic.id, sandbox)
        return json.loads(encode(sandbox.state()))


async def in_memory(state: Any) -> Any:
    """The parsed JSON after two restores, without a file."""
    text = samples.text(state)
    for _ in range(2):
        async with Sandbox("s1", MemoryHypervisor()) as sandbox:
            await sandbox.restore(decode(text, where="the sample"))
            text = encode(sandbox.state())
    return json.loads(text)


@pytest.fixture(scope="module")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return asyncio.run(pyblocks_own(tmp_path_factory.mktemp("own")))


KNOWN = {
    *(
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
        "File",
        "Format",
        "Index",
    ),
    *(
        "MmioAddr",
        "PCIAddr",
        "PCIPath",
        "SCSIAddr",
        "NvdimmID",
        "VirtPath",
        "DevNo",
        "Pmem",
        "ShareRW",
        "ReadOnly",
        "Devices",
        "HypervisorState",
    ),
    *("BlockIndexMap", "Pyblock"),
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text().filter(lambda key: key != "Pyblock"), inner, max_size=3)
    ),
)
KEYS = st.text().filter(lambda key: key not in KNOWN)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("own", [False, True])
def test_unknown_keys_survive_at_every_level(
    own_state: Any, own: bool, data: st.DataObject
) -> None:
    state = copy.deepcopy(
        own_state if own else samples.sandbox([*samples.SCSI, samples.VFIO], [0, 1, 2])
    )
    for level in levels(state):
        level.update(data.draw(st.dictionaries(KEYS, VALUES, max_size=2)))
    assert samples.without_pyblock(asyncio.run(in_memory(state))) == samples.without_pyblock(state)


async def test_a_pending_device_of_the_originals_stays_pending(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(samples.text(samples.KATA["counts"]))
    vm = MemoryHypervisor()
    device_id = f"{0:016x}"
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.load(path)
        plug_in(vm, sandbox)
        vm.fail("device-del", Fault("lose", done=False))
        with pytest.raises(DetachPending):
            await sandbox.detach(device_id)
        await sandbox.save(path)
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.load(path)
        await sandbox.save(path)
    state = json.loads(path.read_bytes())
    assert (
        samples.without_pyblock(state)["Devices"][0]["BlockDrive"] == samples.SCSI[0]["BlockDrive"]
    )
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.load(path)
        device = sandbox.manager.find(device_id)
        assert isinstance(device, BlockDevice)
        assert device.phase is Phase.DETACH_PENDING
        assert list(sandbox.index) == [0, 1, 2]
        await sandbox.detach(device_id)
        assert list(sandbox.index) == [1, 2]
