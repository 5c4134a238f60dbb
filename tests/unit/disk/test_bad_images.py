"""What cannot be plugged in is refused before anything happens, and one host object is one device,
however it is spelled."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.children import NOBODY, in_child
from support.snapshot import Busy, MakeImage, refused

from pyblock import DeviceConflict, DeviceInfo, InvalidImage, NotAttached, Phase, Sandbox
from pyblock.disk.image import block_special_path
from pyblock.life import road
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio


def make_socket(path: Path) -> None:
    # bound through the folder, so that the path stays under 107 bytes
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


NOT_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "empty": (Path.touch, "is empty"),
    "directory": (Path.mkdir, "a directory"),
    "fifo": (os.mkfifo, "a FIFO"),
    "socket": (make_socket, "a socket"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
}


@pytest.mark.parametrize("what", NOT_IMAGES)
@pytest.mark.parametrize("read_only", [False, True])
async def test_what_is_no_image(busy: Busy, tmp_path: Path, what: str, read_only: bool) -> None:
    make, text = NOT_IMAGES[what]
    path = tmp_path / "thing"
    make(path)
    with refused(busy.sandbox, busy.vm, InvalidImage, str(path), text):
        await busy.sandbox.attach(path, read_only=read_only)


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("/dev/null", ("/dev/null", "a character device")),
        ("", ("''", "empty")),
        ("a\0b", ("'a\\x00b'", "NUL")),
        ("/" + "x" * 300, ("x" * 300, "too long")),
        ("/proc/self/stat/under", ("/proc/self/stat/under", "Not a directory")),
    ],
)
async def test_paths_that_lead_nowhere(busy: Busy, path: str, texts: tuple[str, ...]) -> None:
    with refused(busy.sandbox, busy.vm, InvalidImage, *texts):
        await busy.sandbox.attach(path)


async def test_a_special_that_is_none(busy: Busy, make_image: MakeImage) -> None:
    path = str(make_image("plain"))
    with refused(busy.sandbox, busy.vm, InvalidImage, path, "not the block device"):
        await busy.sandbox.attach(DeviceInfo(path=path, dev_type="b"))
    with refused(busy.sandbox, busy.vm, InvalidImage, "4095:1048575"):
        await busy.sandbox.attach(DeviceInfo(dev_type="b", major=4095, minor=1048575))
    with refused(busy.sandbox, busy.vm, InvalidImage, "-1:-1"):
        await busy.sandbox.attach(DeviceInfo(dev_type="b"))
    with refused(busy.sandbox, busy.vm, InvalidImage, "10:229", "character device"):
        await busy.sandbox.attach(DeviceInfo(path="/dev/fuse", dev_type="c", major=10, minor=229))


def as_nobody(mode: int, *, read_only: bool) -> str:
    """What a user who owns nothing is told about root's image of that mode: the error, or
    "attached"."""
    # pytest's own folder shuts out other users
    folder = tempfile.mkdtemp(prefix="pyblock-", dir="/tmp")
    try:
        os.chmod(folder, 0o755)  # noqa: PTH101
        path = Path(folder, "image")
        path.write_bytes(b"x" * 512)
        path.chmod(mode)

        async def attempt() -> str:
            vm = MemoryHypervisor()
            async with Sandbox("s1", vm) as sandbox:
                try:
                    with refused(sandbox, vm, InvalidImage, str(path), str(NOBODY)):
                        await sandbox.attach(path, read_only=read_only)
                except pytest.fail.Exception:
                    return "attached"
                return "refused"

        status, text = in_child(lambda: asyncio.run(attempt()), uid=NOBODY)
        assert status == 0, text
        return text
    finally:
        shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("mode", "read_only", "outcome"),
    [
        (0o600, False, "refused"),
        (0o600, True, "refused"),
        (0o644, False, "refused"),
        (0o644, True, "attached"),
        (0o622, True, "refused"),
        (0o666, False, "attached"),
    ],
)
def test_image_of_another_user(mode: int, read_only: bool, outcome: str) -> None:
    assert as_nobody(mode, read_only=read_only) == outcome


async def test_image_that_may_not_be_opened(
    busy: Busy, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_image("locked")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with refused(busy.sandbox, busy.vm, InvalidImage, str(path), "read and written"):
        await busy.sandbox.attach(path)


SPELLINGS: dict[str, Callable[[Path], str]] = {
    "itself": str,
    "relative": os.path.relpath,
    "dots": lambda path: f"{path.parent}/other/../{path.name}",
    "slashes": lambda path: f"//{path.parent}//./{path.name}",
    "symlink": lambda path: link(path, os.symlink),
    "hard link": lambda path: link(path, os.link),
    "linked folder": lambda path: f"{link(path.parent, os.symlink)}/{path.name}",
}


def link(path: Path, how: Callable[[Path, Path], object]) -> str:
    new = path.with_name("link")
    how(path, new)
    return str(new)


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_another_spelling_is_the_same_device(tmp_path: Path, spelling: str) -> None:
    (tmp_path / "one" / "other").mkdir(parents=True)
    image = tmp_path / "one" / "image"
    image.write_bytes(b"x" * 512)
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        device = await sandbox.attach(image)
        again = await sandbox.attach(SPELLINGS[spelling](image))
        assert again is device
        assert device.attach_count == 2
        assert (len(sandbox.devices), list(sandbox.index), len(vm.devices)) == (1, [0], 1)
        await sandbox.detach(again)
        assert (device.phase, device.attach_count, len(vm.devices)) == (Phase.ATTACHED, 1, 1)
        await sandbox.detach(device)
        assert (sandbox.devices, list(sandbox.index), vm.devices, vm.backends) == ([], [], {}, {})
        with pytest.raises(NotAttached):
            await road.detach(sandbox._machine, device, None)


@pytest.mark.parametrize(
    ("asked", "texts"),
    [
        ({"driver": "virtio-blk"}, ("driver", "'virtio-scsi'", "'virtio-blk'")),
        ({"read_only": True}, ("read_only", "False", "True")),
        ({"serial": "OTHER"}, ("serial", "'SCSI-1'", "'OTHER'")),
        ({"device_id": "other"}, ("ID", "'scsi'", "'other'")),
    ],
)
@pytest.mark.parametrize("spelling", ["itself", "hard link"])
async def test_same_image_in_another_form(
    busy: Busy, spelling: str, asked: dict[str, object], texts: tuple[str, ...]
) -> None:
    path = SPELLINGS[spelling](Path(busy.scsi.info.path))
    with refused(busy.sandbox, busy.vm, DeviceConflict, path, *texts):
        await busy.sandbox.attach(path, **asked)  # type: ignore[arg-type]


async def test_same_image_with_another_driver_among_the_options(busy: Busy) -> None:
    info = DeviceInfo(path=busy.scsi.info.path, options={"block-driver": "nvdimm"})
    with refused(busy.sandbox, busy.vm, DeviceConflict, "'nvdimm'", "'virtio-scsi'"):
        await busy.sandbox.attach(info)


async def test_same_id_for_another_image(busy: Busy, make_image: MakeImage) -> None:
    with refused(busy.sandbox, busy.vm, DeviceConflict, "'scsi'"):
        await busy.sandbox.attach(make_image("new"), device_id="scsi")


async def test_an_image_replaced_under_its_name_is_another_device(
    busy: Busy, make_image: MakeImage
) -> None:
    path = Path(busy.scsi.info.path)
    new = make_image("new")
    new.rename(path)
    device = await busy.sandbox.attach(path)
    assert device is not busy.scsi
    assert device.held.index != busy.scsi.held.index


def test_block_special_by_number(tmp_path: Path) -> None:
    def node(name: str, uevent: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "uevent").write_text(uevent)

    node("8:16", "MAJOR=8\nMINOR=16\nDEVNAME=sdb\nDEVTYPE=disk\n")
    node("252:0", "MAJOR=252\nMINOR=0\nDEVNAME=mapper/data\n")
    node("9:9", "MAJOR=9\nMINOR=9\n")
    assert block_special_path(8, 16, sysfs=str(tmp_path)) == "/dev/sdb"
    assert block_special_path(252, 0, sysfs=str(tmp_path)) == "/dev/mapper/data"
    with pytest.raises(InvalidImage, match="9:9 has no DEVNAME"):
        block_special_path(9, 9, sysfs=str(tmp_path))
    with pytest.raises(InvalidImage, match="8:17 on this host"):
        block_special_path(8, 17, sysfs=str(tmp_path))


async def test_a_real_block_special(make_image: MakeImage) -> None:
    image = make_image("backing")
    made = (
        subprocess.run(
            ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False
        )
        if shutil.which("losetup")
        else None
    )
    if made is None or made.returncode:
        pytest.skip(
            f"no loop device can be made here: {made.stderr.strip() if made else 'no losetup'}"
        )
    loop = made.stdout.strip()
    try:
        number = Path(loop).stat().st_rdev
        vm = MemoryHypervisor()
        async with Sandbox("s1", vm) as sandbox:
            by_number = await sandbox.attach(
                DeviceInfo(dev_type="b", major=os.major(number), minor=os.minor(number))
            )
            assert by_number.info.path == loop
            assert await sandbox.attach(loop) is by_number
            assert await sandbox.attach(DeviceInfo(path=loop, dev_type="b")) is by_number
            assert by_number.attach_count == 3
            state = sandbox.state()
            assert state.devices
            assert (state.devices[0].major, state.devices[0].minor) == (
                os.major(number),
                os.minor(number),
            )
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
