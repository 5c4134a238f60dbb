"""A sandbox taken over from the original: which driver a drive has, what it is called, what tells
it, whose image it is, how it goes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.snapshot import MakeImage, MakeStore, plug_in
from support.store_scene import AsWritten, as_written, rows
from support.turns import BEGUN

from pyblock import (
    BlockDevice,
    DetachPending,
    ImageInUse,
    InvalidState,
    Phase,
    Sandbox,
    VmmRefused,
    blocking,
    stored,
)
from pyblock.disk.drivers import NVDIMM, PMEM, SD, VD
from pyblock.kata.schema import SandboxState, decode, encode
from pyblock.life.recovery import Found, Outcome
from pyblock.vmm.base import FoundDisk
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio


def kata(*devices: dict[str, Any], indexes: list[int] | None = None) -> SandboxState:
    taken = (
        [one["BlockDrive"]["Index"] for one in devices if one.get("BlockDrive")]
        if indexes is None
        else indexes
    )
    return decode(samples.text(samples.sandbox([*devices], taken)), where="a sample")


def disk(
    number: int,
    image: object = None,
    *,
    driver: str = "virtio-scsi",
    more: dict[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """A device of the original's; keyword arguments are keys of its drive."""
    if image is not None:
        keys["File"] = str(image)
    if driver == "virtio-scsi":
        keys.setdefault("SCSIAddr", f"0:{number}")
    return samples.device(
        number,
        samples.drive(number, **keys),
        **{"DriverOptions": {"block-driver": driver}, **(more or {})},
    )


def block(sandbox: Sandbox | AsWritten, number: int = 0) -> BlockDevice:
    device = sandbox.devices[number]
    assert isinstance(device, BlockDevice)
    return device


def names(sandbox: Sandbox) -> list[str]:
    return [
        one.held.guess.removeprefix("/dev/")
        for one in sandbox.devices
        if isinstance(one, BlockDevice)
    ]


PMEM_KEYS: dict[str, Any] = {"Pmem": True, "NvdimmID": "0"}

# What makes it an nvdimm.

WORDS: dict[str, dict[str, Any]] = {
    "Pmem": {"Pmem": True},
    "NvdimmID": {"NvdimmID": "1"},
    "both": {"Pmem": True, "NvdimmID": "1"},
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("driver", ["virtio-scsi", "virtio-blk", "virtio-blk-ccw", "nvdimm", None])
@pytest.mark.parametrize("attached", [True, False])
async def test_pmem_decides_the_driver(word: str, driver: str | None, attached: bool) -> None:
    """The original writes the sandbox's driver among the options of a pmem device too, and fills in
    what that driver would have."""
    filled = {"virtio-scsi": {"SCSIAddr": "0:0"}, "virtio-blk": {"VirtPath": "/dev/vda"}}.get(
        driver or "", {}
    )
    options = {"block-driver": driver, "fstype": "ext4"} if driver else {"fstype": "ext4"}
    drive = samples.drive(0, **WORDS[word], **filled)
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        await sandbox.restore(
            kata(samples.device(0, drive, DriverOptions=options, AttachCount=int(attached)))
        )
        device = block(sandbox)
        assert device.info.driver == NVDIMM.name
        if attached:
            assert (device.held.driver, device.held.pmem, device.held.scsi_addr) == (
                NVDIMM.name,
                True,
                None,
            )
            assert device.held.predicted_name == ("/dev/pmem0" if word == "Pmem" else "/dev/pmem1")
        [saved] = [one for one in sandbox.state().devices or () if one.id == device.id]
        assert saved.driver_options == options
        assert saved.block_drive and (saved.block_drive.scsi_addr, saved.block_drive.virt_path) == (
            drive["SCSIAddr"],
            drive["VirtPath"],
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [("Major", 2**63), ("Minor", -(2**63) - 1), ("RefCount", 2**64), ("AttachCount", 2**64)],
)
async def test_numbers_that_the_original_cannot_read_are_refused(key: str, value: int) -> None:
    """They would be written back, and the original refuses a whole file for one of them."""
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        with pytest.raises(InvalidState, match="64 bits"):
            await sandbox.restore(kata(disk(0, more={key: value})))
        assert not sandbox.devices


async def test_a_pmem_drive_that_was_taken_for_another_before() -> None:
    """A state that pyblock wrote when it believed the option."""
    device = disk(0, Pmem=True, NvdimmID="0", Pyblock={"Driver": "virtio-scsi", "Ordinal": 0})
    device["Pyblock"] = {
        "Phase": "detach-pending",
        "Path": "/run/images/0",
        "Driver": "virtio-scsi",
    }
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        await sandbox.restore(kata(device))
        found = block(sandbox)
        assert (found.phase, found.held.driver, found.info.driver) == (
            Phase.DETACH_PENDING,
            "nvdimm",
            "nvdimm",
        )


# How it goes.


@pytest.mark.parametrize("pmem", [True, False])
async def test_a_detach_that_finds_nothing_is_no_detach(
    pmem: bool, make_image: MakeImage, make_store: MakeStore
) -> None:
    """The machine has the image, under names that nobody told us."""
    image, vm, store = make_image("image"), MemoryHypervisor(), make_store()
    vm.backends["nvdimmbackmemdrive-x"], vm.devices["nvdimmdrive-x"] = str(image), "nvdimm 7"
    async with Sandbox("s1", vm, store=store) as sandbox:
        await sandbox.restore(kata(disk(0, image, **(PMEM_KEYS if pmem else {}))))
        device = block(sandbox)
        for _ in range(2):
            with pytest.raises(VmmRefused, match="image' in use") as caught:
                await sandbox.detach(device)
            assert caught.value.step == "device-del"
            assert (device.phase, device.attach_count, list(sandbox.index)) == (
                Phase.ATTACHED,
                1,
                [0],
            )
        assert [(one.found, one.outcome) for one in await sandbox.reconcile()] == [
            (Found.ORPHAN, Outcome.LEFT)
        ] * 2
    async with Sandbox("other", MemoryHypervisor(), store=store) as other:
        with pytest.raises(ImageInUse):
            await other.attach(image)
    async with Sandbox("s1", vm, store=store) as sandbox:
        with pytest.raises(VmmRefused):
            await sandbox.detach(block(sandbox))
        vm.backends.clear()
        vm.devices.clear()
        assert [(one.found, one.outcome) for one in await sandbox.reconcile()] == [
            (Found.LOST, Outcome.FREED)
        ]
        assert not sandbox.devices and not len(sandbox.index)


async def test_a_pending_detach_that_finds_nothing_is_not_finished(make_image: MakeImage) -> None:
    image, vm = make_image("image"), MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.restore(kata(disk(0, image)))
        plug_in(vm, sandbox)
        device = block(sandbox)
        vm.fail("device-del", Fault("lose", done=False))
        with pytest.raises(DetachPending):
            await sandbox.detach(device)
        vm.devices["theirs"], vm.backends["theirs"] = (
            vm.devices.pop(device.held.id),
            vm.backends.pop(device.held.id),
        )
        found = {one.found: one.outcome for one in await sandbox.reconcile()}
        assert found == {Found.DETACH: Outcome.KEPT, Found.ORPHAN: Outcome.LEFT}
        assert device.attached and list(sandbox.index) == [0]


async def test_a_detach_asks_for_other_names_only_where_nothing_was_found(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, vm = make_image("image"), MemoryHypervisor()
    asked = 0
    inventory = MemoryHypervisor.inventory

    async def counted(self: MemoryHypervisor, ours: Any = ()) -> Any:
        nonlocal asked
        asked += 1
        return await inventory(self, ours)

    monkeypatch.setattr(MemoryHypervisor, "inventory", counted)
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.detach(await sandbox.attach(image))
        assert asked == 1
    async with Sandbox("s2", vm) as sandbox:
        await sandbox.restore(kata(disk(0, image), disk(1, make_image("gone"))))
        plug_in(vm, sandbox)
        await sandbox.detach(block(sandbox))
        assert asked == 2
        vm.devices.clear()  # behind our back, after the machine was asked
        vm.backends.clear()
        await sandbox.detach(block(sandbox))
        assert asked == 3 and not sandbox.devices


# What it is called.


async def test_names_go_on_beside_the_machines_own_disks(make_image: MakeImage) -> None:
    """The original numbers pmem devices with the machine's own, which come first, and the others
    without."""
    vm = MemoryHypervisor(
        existing=(FoundDisk("image", PMEM), FoundDisk("root", SD), FoundDisk("data", VD))
    )
    devices = [
        disk(0, Pmem=True, NvdimmID="1"),
        disk(1),
        disk(2, driver="virtio-blk", VirtPath="/dev/vdc", PCIAddr="02/00"),
        disk(3, Pmem=True, NvdimmID="3"),
        disk(5),
    ]
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.restore(kata(*devices))
        plug_in(vm, sandbox)
        new = [
            await sandbox.attach(make_image(f"{n}"), driver=driver)
            for n, driver in enumerate(["nvdimm", "virtio-scsi", "virtio-blk"] * 2)
        ]
        # Of the indexes below 5, 1 is a SCSI disk's and 4 was one's: sda is the machine's, sdb
        # index 1, sdc was index 4. The original told vdc for what is the third disk beside the
        # machine's vda.
        assert names(sandbox)[:5] == ["pmem1", "sdb", "vdd", "pmem3", "sdd"]
        assert [one.held.guess.removeprefix("/dev/") for one in new] == [
            "pmem2",
            "sdc",
            "vdb",
            "pmem4",
            "sde",
            "vdc",
        ]
        found = json.loads(
            json.dumps(
                [
                    one.block_drive.nvdimm_id
                    for one in sandbox.state().devices or ()
                    if one.block_drive
                ]
            )
        )
        assert found == ["1", "", "", "3", "", "2", "", "", "4", "", ""]


async def test_names_after_a_restart_are_the_same(
    make_image: MakeImage, make_store: MakeStore
) -> None:
    vm, store = (
        MemoryHypervisor(existing=(FoundDisk("image", PMEM), FoundDisk("root", SD))),
        make_store(),
    )
    async with Sandbox("s1", vm, store=store) as sandbox:
        await sandbox.restore(kata(disk(0), disk(1, Pmem=True, NvdimmID="1"), disk(2)))
        plug_in(vm, sandbox)
        await sandbox.attach(make_image("new"), driver="nvdimm")
        before = names(sandbox)
        assert before == ["sdb", "pmem1", "sdc", "pmem2"]
    for number in range(2):
        async with Sandbox("s1", vm, store=store) as sandbox:
            assert names(sandbox) == before
            device = await sandbox.attach(make_image(f"more{number}"), driver="nvdimm")
            assert device.held.predicted_name == "/dev/pmem3"
            await sandbox.detach(device)


# What tells it in the guest.

TOLD = {
    "virtio-scsi": (disk(0x105, SCSIAddr="1:5"), "/0:0:1:5/"),
    "virtio-blk by PCIAddr": (
        disk(0, driver="virtio-blk", VirtPath="/dev/vda", PCIAddr="03/02"),
        "0000:00:03.0/0000:02:02.0",
    ),
    "virtio-blk by PCIPath": (
        disk(0, driver="virtio-blk", VirtPath="/dev/vda", PCIPath="03/02"),
        "0000:00:03.0/0000:02:02.0",
    ),
    "virtio-blk by nothing": (disk(0, driver="virtio-blk", VirtPath="/dev/vda", PCIPath={}), None),
    "virtio-blk by nonsense": (
        disk(0, driver="virtio-blk", VirtPath="/dev/vda", PCIAddr="x/../1"),
        None,
    ),
    "virtio-blk-ccw": (
        disk(0, driver="virtio-blk-ccw", VirtPath="/dev/vda", DevNo="0.1.0005"),
        "/0.1.0005/",
    ),
    "nvdimm": (disk(0, Pmem=True, NvdimmID="4"), "/region4/"),
}


@pytest.mark.parametrize("name", TOLD)
async def test_the_guest_match_of_an_imported_drive(name: str, make_store: MakeStore) -> None:
    device, match = TOLD[name]
    store, vm = make_store(), MemoryHypervisor()
    async with Sandbox("s1", vm, store=store) as sandbox:
        await sandbox.restore(kata(device))
        assert block(sandbox).held.guest_match == match
        plug_in(vm, sandbox)
    kept = await as_written(store, "s1")  # what `pyblock list` shows
    assert block(kept).held.guest_match == match
    async with Sandbox("s1", vm, store=store) as sandbox:
        assert block(sandbox).held.guest_match == match
        assert samples.without_pyblock(
            json.loads(samples.text(_plain(sandbox)))
        ) == samples.without_pyblock(_expected(device))


def _plain(sandbox: Sandbox) -> Any:
    return json.loads(encode(sandbox.state()))


def _expected(device: dict[str, Any]) -> Any:
    return samples.as_written(samples.sandbox([device], [device["BlockDrive"]["Index"]]))


async def test_a_place_that_the_original_took_is_nobody_elses(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm, driver="virtio-blk") as sandbox:
        await sandbox.restore(
            kata(disk(0, driver="virtio-blk", VirtPath="/dev/vda", PCIAddr="02/00"))
        )
        plug_in(vm, sandbox)
        new = await sandbox.attach(make_image("new"))
        assert (new.held.pci_path, new.held.guest_match) == ("02/01", "0000:00:02.0/0000:01:01.0")
        await sandbox.detach(block(sandbox))
        assert (await sandbox.attach(make_image("newer"))).held.pci_path == "02/00"


# Whose image it is.


async def test_major_and_minor_are_an_identity(make_store: MakeStore) -> None:
    """The path need not lead there any more, nor be seen from here."""
    store = make_store()
    one = disk(0, "/dev/of-another-name-space", more={"Major": 259, "Minor": 7})
    two = disk(0, "/dev/by-another-name", more={"Major": 259, "Minor": 7})
    async with Sandbox("s1", MemoryHypervisor(), store=store) as sandbox:
        await sandbox.restore(kata(one))
        assert block(sandbox).identity == ("block", 259, 7)
        async with Sandbox("s2", MemoryHypervisor(), store=store) as other:
            with pytest.raises(ImageInUse, match="by-another-name"):
                await other.restore(kata(two))
            await other.restore(
                kata(disk(0, "/dev/by-another-name", more={"Major": 259, "Minor": 8}))
            )
    assert [row[4] for row in rows(store.path)["device"]] == ["block:259:7", "block:259:8"]


@pytest.mark.parametrize(("major", "minor"), [(-1, 0), (0, 0), (-1, -1), (8, 0)])
async def test_the_identity_of_a_file_is_the_files(
    major: int, minor: int, make_image: MakeImage, make_store: MakeStore
) -> None:
    """-1 stands for a file, or 0 in older states; a file that is mounted as pmem has the numbers of
    its loop device."""
    image, store = make_image("image"), make_store()
    device = disk(
        0, image, **(PMEM_KEYS if major == 8 else {}), more={"Major": major, "Minor": minor}
    )
    lost = disk(1, "/run/no/such/file", more={"Major": min(major, 0), "Minor": minor})
    async with Sandbox("s1", MemoryHypervisor(), store=store) as sandbox:
        await sandbox.restore(kata(device, lost))
        status = image.stat()
        assert [block(sandbox, n).identity for n in range(2)] == [
            ("file", status.st_dev, status.st_ino),
            None,
        ]
        async with Sandbox("s2", MemoryHypervisor(), store=store) as other:
            with pytest.raises(ImageInUse):
                await other.attach(image)


async def test_two_of_the_originals_sandboxes_share_an_image(
    make_image: MakeImage, make_store: MakeStore, tmp_path: Path
) -> None:
    store, image = make_store(), make_image("image")
    path = tmp_path / "kata.json"
    path.write_bytes(
        samples.text(samples.sandbox([disk(0, image), disk(1, more={"AttachCount": 0})], [0]))
    )
    vms = {name: MemoryHypervisor() for name in ("s1", "s2", "s3")}
    for name in ("s1", "s2"):
        async with Sandbox(name, vms[name], store=store) as sandbox:
            await sandbox.load(path, share=True)
            plug_in(vms[name], sandbox)
    async with Sandbox("s3", vms["s3"], store=store) as sandbox:
        with pytest.raises(ImageInUse, match="share"):
            await sandbox.load(path)
        assert not sandbox.devices
        with pytest.raises(ImageInUse):
            await sandbox.attach(image)
        await sandbox.attach(image, share=True)
    for name in ("s1", "s2"):
        for _ in range(2):  # it stays shared, whoever takes it up
            async with Sandbox(name, vms[name], store=store) as sandbox:
                device = block(sandbox)
                assert device.info.share and device.held.share
                assert samples.without_pyblock(_plain(sandbox)) == samples.without_pyblock(
                    json.loads(path.read_bytes())
                )
        async with Sandbox(name, vms[name], store=store) as sandbox:
            await sandbox.detach(block(sandbox))
    assert [row[1] for row in rows(store.path)["device"] if row[4] is not None] == ["s3"]


def test_the_blocking_door_shares_too(
    make_image: MakeImage, make_store: MakeStore, tmp_path: Path
) -> None:
    store, image = make_store(), make_image("image")
    path = tmp_path / "kata.json"
    path.write_bytes(samples.text(samples.sandbox([disk(0, image)], [0])))
    with (
        blocking.Sandbox("s1", MemoryHypervisor(), store=store) as one,
        blocking.Sandbox("s2", MemoryHypervisor(), store=store) as two,
    ):
        one.load(path, share=True)
        with pytest.raises(ImageInUse):
            two.load(path)
        two.restore(decode(path.read_bytes(), where="a sample"), share=True)


async def test_the_match_stays_while_a_pending_detach_is_kept(
    make_image: MakeImage, make_store: MakeStore, tmp_path: Path
) -> None:
    """The keys that the original wrote, and what we found out, outlive each other's changes."""
    vm, store, image = MemoryHypervisor(), make_store(), make_image("image")
    told = disk(0, image, driver="virtio-blk", VirtPath="/dev/vda", PCIAddr="02/00", Swap=True)
    async with Sandbox("s1", vm, store=store) as sandbox:
        await sandbox.restore(kata(told))
        plug_in(vm, sandbox)
        vm.fail("device-gone", Fault("hold"))
        with pytest.raises(DetachPending):
            await sandbox.detach(block(sandbox), timeout=BEGUN)
        await asyncio.sleep(0)
    for _ in range(2):
        kept = await as_written(store, "s1")
        assert block(kept).phase is Phase.DETACH_PENDING
        assert block(kept).held.guest_match == "0000:00:02.0/0000:01:00.0"
        await stored.export(store, "s1", tmp_path / "exported")
        [device] = samples.without_pyblock(json.loads((tmp_path / "exported").read_bytes()))[
            "Devices"
        ]
        assert device["BlockDrive"] == told["BlockDrive"]
