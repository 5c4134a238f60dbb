"""A path leads where the kernel says that it leads, now and when it is opened later; never where
its text seems to lead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.children import in_child
from support.snapshot import Busy, refused

from pyblock import InvalidImage, Sandbox
from pyblock.disk.image import inspect_image, open_image
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio


def image(path: Path, mark: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mark * 512)
    return path


async def test_two_dots_behind_a_link_lead_to_the_links_parent(tmp_path: Path) -> None:
    wrong = image(tmp_path / "dir" / "img", b"w")
    right = image(tmp_path / "elsewhere" / "img", b"r")
    (tmp_path / "elsewhere" / "sub").mkdir()
    (tmp_path / "dir" / "link").symlink_to(tmp_path / "elsewhere" / "sub")
    path = f"{tmp_path}/dir/link/../img"
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        device = await sandbox.attach(path)
        assert device.identity == ("file", right.stat().st_dev, right.stat().st_ino)
        [plugged] = vm.backends.values()
        assert Path(plugged).read_bytes()[:1] == b"r"
        assert await sandbox.attach(right) is device
        assert await sandbox.attach(wrong) is not device


@pytest.mark.parametrize("end", ["/", "/.", "/..", "//", "/./"])
async def test_a_file_is_no_folder(busy: Busy, tmp_path: Path, end: str) -> None:
    """What open() refuses is refused."""
    path = f"{image(tmp_path / 'img', b'x')}{end}"
    with refused(busy.sandbox, busy.vm, InvalidImage, f"{tmp_path}/img/", "Not a directory"):
        await busy.sandbox.attach(path)


async def test_a_relative_path_stays_the_same_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image(tmp_path / "one" / "img", b"1")
    image(tmp_path / "two" / "img", b"2")
    monkeypatch.chdir(tmp_path / "one")
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        device = await sandbox.attach("img")
        other = await sandbox.attach(".././two//img")
        await sandbox.detach(device)
        monkeypatch.chdir(tmp_path / "two")
        again = await sandbox.attach(device.info.path)
        assert (again.info.path, again.identity) == (f"{tmp_path}/one/img", device.identity)
        assert other.info.path == f"{tmp_path}/one/../two/img"
        assert await sandbox.attach("img") is other


def test_what_is_kept_is_the_callers_path(tmp_path: Path) -> None:
    """Links stay in it: what is behind them later, a listing and another program know under this
    path."""
    image(tmp_path / "disk", b"x")
    link = tmp_path / "by-id"
    link.symlink_to("disk")
    assert inspect_image(str(link), read_only=True).path == str(link)
    with open_image(f"/{link}", read_only=True) as opened:
        assert opened.path == str(link)


def test_a_file_without_a_name(tmp_path: Path) -> None:
    path = image(tmp_path / "img", b"x")
    with path.open("r+b") as file:
        path.unlink()
        found = inspect_image(f"/proc/self/fd/{file.fileno()}", read_only=False)
        assert (found.identity[2], found.size) == (os.fstat(file.fileno()).st_ino, 512)


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    def look() -> str:
        os.chdir(gone)
        gone.rmdir()
        with pytest.raises(
            InvalidImage, match="'img' is relative, and the working directory is gone"
        ):
            inspect_image("img", read_only=True)
        return "refused"

    assert in_child(look) == (0, "refused")


def test_a_working_directory_that_is_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)  # noqa: PTH102

    def look() -> str:
        os.chdir(folder)
        image(Path("img"), b"x")
        with pytest.raises(InvalidImage, match="is not UTF-8"):
            inspect_image("img", read_only=True)
        return "refused"

    assert in_child(look) == (0, "refused")
