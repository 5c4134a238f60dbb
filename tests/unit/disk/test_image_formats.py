"""A container is not plugged in as if it were a raw disk, unless the caller says that it is one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.held_store import HeldStore, ended, nothing_left
from support.loops import Loops, loop_devices
from support.snapshot import Busy, MakeImage, refused
from support.turns import until

from pyblock import DeviceInfo, InvalidImage, InvalidState, InvalidValue, Sandbox, blocking
from pyblock.disk.formats import format_of
from pyblock.kata.schema import decode, encode
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio

HEADS = {
    "qcow": b"QFI\xfb\x00\x00\x00\x01",
    "qcow2": b"QFI\xfb\x00\x00\x00\x03",
    "qed": b"QED\x00",
    "vmdk": b"KDMV\x01\x00\x00\x00",
    "vmdk, old": b"COWD",
    "vmdk, text": b"# Disk DescriptorFile\nversion=1\n",
    "vhdx": b"vhdxfile",
    "vhd": b"conectix",
    "vdi": b"<<< QEMU VM Virtual Disk Image >>>\n".ljust(0x40, b"\0") + b"\x7f\x10\xda\xbe",
    "luks": b"LUKS\xba\xbe\x00\x02",
    "parallels": b"WithoutFreeSpace",
    "parallels, extended": b"WithouFreSpacExt",
    "bochs": b"Bochs Virtual HD Image\0",
}
QCOW2 = HEADS["qcow2"]


def write_head(path: Path, head: bytes) -> Path:
    with path.open("r+b") as file:
        file.write(head)
    return path


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("what", HEADS)
async def test_a_container_is_refused_by_name(
    busy: Busy, make_image: MakeImage, what: str, read_only: bool
) -> None:
    path = write_head(make_image("img"), HEADS[what])
    name = what.partition(",")[0]
    with refused(
        busy.sandbox,
        busy.vm,
        InvalidImage,
        repr(str(path)),
        f"begins like {name},",
        "format='raw'",
        "a guest can write",
    ):
        await busy.sandbox.attach(path, read_only=read_only)


@pytest.mark.parametrize("what", HEADS)
async def test_who_says_that_it_is_raw_is_believed(make_image: MakeImage, what: str) -> None:
    path, vm = write_head(make_image("img"), HEADS[what]), MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        device = await sandbox.attach(path, format="raw")
        assert device.info.format == "raw"
        assert device.held.format == "raw"
        await sandbox.detach(device)
        await sandbox.attach(DeviceInfo(path=str(path), format="raw"))
        [again] = await sandbox.attach_many([path], format="raw")
        assert (len(vm.devices), again.attach_count) == (1, 2)


def test_what_is_no_container() -> None:
    for head in (
        b"",
        b"QFI",
        b"\0" * 4096,
        b"\xeb\x63\x90" + b"\0" * 4093,
        b" QFI\xfb",
        b"LUKS",
        b"# Disk",
        b"hsqs",
        b"\0" * 0x41 + b"\x7f\x10\xda\xbe",
    ):
        assert format_of(head) is None


@pytest.fixture
def loops() -> Iterator[Loops]:
    with loop_devices() as loops:
        yield loops


async def test_a_block_device(busy: Busy, loops: Loops, make_image: MakeImage) -> None:
    loop = loops.loop(write_head(make_image("img"), QCOW2))
    with refused(busy.sandbox, busy.vm, InvalidImage, repr(loop), "begins like qcow2"):
        await busy.sandbox.attach(loop)
    await busy.sandbox.attach(loop, format="raw")


async def test_one_of_many(busy: Busy, make_image: MakeImage) -> None:
    path = write_head(make_image("img"), QCOW2)
    with refused(busy.sandbox, busy.vm, InvalidImage, repr(str(path)), "qcow2"):
        await busy.sandbox.attach_many([make_image("good"), path])


async def test_what_was_written_after_the_look(make_image: MakeImage, store: HeldStore) -> None:
    path, vm = make_image("img"), MemoryHypervisor()
    async with Sandbox("s1", vm, store=store) as sandbox:
        gate = store.hold()
        attach = asyncio.create_task(sandbox.attach(path))
        await until(lambda: gate.reached)
        write_head(path, QCOW2)
        gate.let_go()
        await ended(attach)
        assert type(attach.exception()) is InvalidImage
        assert "qcow2" in str(attach.exception())
        assert not vm.journal
        nothing_left(sandbox)


async def test_a_guest_that_writes_to_its_disk_is_in_nobodys_way(make_image: MakeImage) -> None:
    """The disk is there as raw, and counting it once more plugs nothing in. When it is to come
    anew, somebody has to say what it is."""
    path, vm = make_image("img"), MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        device = await sandbox.attach(path)
        write_head(path, HEADS["luks"])
        assert await sandbox.attach(path) is device
        assert await sandbox.attach(path, format="raw") is device
        for _ in range(3):
            await sandbox.detach(device)
        with refused(sandbox, vm, InvalidImage, "luks"):
            await sandbox.attach(path)
        await sandbox.attach(path, format="raw")


async def test_a_device_that_is_known_and_detached(make_image: MakeImage) -> None:
    """Whoever says later that it is raw is believed as well."""
    path, vm = make_image("img"), MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        device = sandbox.manager.obtain(DeviceInfo(path=str(path)))
        write_head(path, QCOW2)
        with refused(sandbox, vm, InvalidImage, "begins like qcow2"):
            await sandbox.attach(path)
        assert await sandbox.attach(path, format="raw") is device


@pytest.mark.parametrize("wrong", ["qcow2", "", "RAW", "ext4", 5, b"raw"])
async def test_only_raw_can_be_said(busy: Busy, make_image: MakeImage, wrong: str) -> None:
    path = make_image("img")
    with refused(busy.sandbox, busy.vm, InvalidValue, f"format {wrong!r}", "'raw'"):
        await busy.sandbox.attach(path, format=wrong)
    with refused(busy.sandbox, busy.vm, InvalidValue, f"format {wrong!r}"):
        await busy.sandbox.attach_many([path], format=wrong)
    with refused(busy.sandbox, busy.vm, InvalidValue, f"format {wrong!r}"):
        await busy.sandbox.attach(DeviceInfo(path=str(path), format=wrong))


async def test_a_device_info_says_it_itself(busy: Busy, make_image: MakeImage) -> None:
    with refused(busy.sandbox, busy.vm, InvalidValue, "format"):
        await busy.sandbox.attach(DeviceInfo(path=str(make_image("img"))), format="raw")


def test_the_blocking_door(make_image: MakeImage) -> None:
    path = write_head(make_image("img"), QCOW2)
    with blocking.Sandbox("s1", MemoryHypervisor()) as sandbox:
        with pytest.raises(InvalidImage, match="qcow2"):
            sandbox.attach(path)
        assert sandbox.attach(path, format="raw").info.format == "raw"
        assert sandbox.attach_many([path], format="raw")[0].attach_count == 2


def test_the_command_line(make_image: MakeImage) -> None:
    path, other = str(write_head(make_image("img"), QCOW2)), str(make_image("other"))

    def attach(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pyblock", "--vm", "memory:", "attach", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    status, text = attach(path)
    assert status == 1 and "begins like qcow2" in text and "Traceback" not in text
    assert attach(path, "--format", "raw") == (0, "")
    assert attach(path, other, "--format", "raw") == (0, "")
    status, text = attach(path, "--format", "qcow2")
    assert status == 2 and "'qcow2' is not" in text


async def test_what_was_said_is_saved(make_image: MakeImage) -> None:
    path = write_head(make_image("img"), QCOW2)
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        await sandbox.attach(path, device_id="said", format="raw")
        await sandbox.attach(make_image("other"), device_id="unsaid")
        text = encode(sandbox.state())
    async with Sandbox("s2", MemoryHypervisor()) as other:
        await other.restore(decode(text, where="here"))
        assert {device.id: device.info.format for device in other.devices} == {
            "said": "raw",
            "unsaid": None,
        }
        assert encode(other.state()).replace(b'"s2"', b'"s1"') == text
    other_way = json.loads(text)
    assert other_way["Devices"][0]["Pyblock"].pop("Format") == "raw"
    other_way["Devices"][0]["Pyblock"]["Format"] = "qcow2"
    with pytest.raises(InvalidState, match="qcow2"):
        decode(json.dumps(other_way).encode(), where="here")


async def test_a_filesystem_type_is_no_format(make_image: MakeImage) -> None:
    """What Kata calls Format is the type of the file system that the guest shall expect."""
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        device = await sandbox.attach(
            DeviceInfo(path=str(make_image("img")), options={"fstype": "ext4"})
        )
        assert (device.info.format, device.held.format) == (None, "ext4")


async def test_a_disk_whose_beginning_cannot_be_read(
    busy: Busy, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    path = make_image("img")
    monkeypatch.setattr("os.pread", broken)
    with refused(busy.sandbox, busy.vm, InvalidImage, repr(str(path)), "Input/output error"):
        await busy.sandbox.attach(path)
    await busy.sandbox.attach(path, format="raw")
