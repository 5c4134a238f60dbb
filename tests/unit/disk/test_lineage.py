"""What lies under a block device, out of a sysfs that was put together here and out of the real
one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.children import NOBODY, in_child
from support.descriptors import no_more_than
from support.loops import Loops, loop_devices
from support.snapshot import MakeImage

from pyblock import DescriptorsExhausted
from pyblock.disk.image import identity_of, inspect_image, open_image
from pyblock.disk.lineage import Identity, Lineage, in_words, lineage_of


class Sysfs:
    """A tree of folders as /sys/devices has them, and links to them by number."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = str(root / "dev" / "block")
        Path(self.path).mkdir(parents=True)

    def disk(
        self, name: str, number: str, *, slaves: tuple[Path, ...] = (), backing: str | None = None
    ) -> Path:
        folder = self.root / "devices" / name
        folder.mkdir(parents=True)
        (folder / "dev").write_text(f"{number}\n")
        (folder / "slaves").mkdir()
        for slave in slaves:
            (folder / "slaves" / slave.name).symlink_to(slave)
        if backing is not None:
            (folder / "loop").mkdir()
            (folder / "loop" / "backing_file").write_text(f"{backing}\n")
        Path(self.path, number).symlink_to(folder)
        return folder

    def partition(self, disk: Path, name: str, number: str) -> Path:
        folder = disk / name
        folder.mkdir()
        (folder / "dev").write_text(f"{number}\n")
        (folder / "partition").write_text("1\n")
        Path(self.path, number).symlink_to(folder)
        return folder

    def lineage(self, major: int, minor: int) -> Lineage:
        return lineage_of(("block", major, minor), sysfs=self.path)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path / "sys")


@pytest.fixture
def loops() -> Iterator[Loops]:
    with loop_devices() as loops:
        yield loops


def block(major: int, minor: int) -> Identity:
    return ("block", major, minor)


def file(path: Path | str) -> Identity:
    status = Path(path).stat()
    return ("file", status.st_dev, status.st_ino)


def number(path: str) -> Identity:
    status = Path(path).stat()
    return ("block", os.major(status.st_rdev), os.minor(status.st_rdev))


def test_a_disk_of_its_own(sysfs: Sysfs) -> None:
    sysfs.disk("sda", "8:0")
    assert sysfs.lineage(8, 0) == Lineage(block(8, 0))
    assert sysfs.lineage(8, 16) == Lineage(block(8, 16))  # sysfs knows nothing of it
    assert lineage_of(("file", 1, 2)) == Lineage(("file", 1, 2))


def test_a_partition_lies_on_its_disk(sysfs: Sysfs) -> None:
    disk = sysfs.disk("sda", "8:0")
    sysfs.partition(disk, "sda1", "8:1")
    assert sysfs.lineage(8, 1) == Lineage(block(8, 1), (block(8, 0),))


def test_a_device_mapper_node_lies_on_all_its_parts(sysfs: Sysfs) -> None:
    one, two = sysfs.disk("sda", "8:0"), sysfs.disk("sdb", "8:16")
    md = sysfs.disk(
        "md0",
        "9:0",
        slaves=(sysfs.partition(one, "sda1", "8:1"), sysfs.partition(two, "sdb1", "8:17")),
    )
    sysfs.disk("dm-0", "252:0", slaves=(md, one))
    assert sysfs.lineage(252, 0).identity == block(252, 0)
    assert set(sysfs.lineage(252, 0).under) == {
        block(9, 0),
        block(8, 0),
        block(8, 1),
        block(8, 16),
        block(8, 17),
    }


def test_no_descriptor_left(sysfs: Sysfs, make_image: MakeImage) -> None:
    """What cannot be looked at is not taken to be nothing."""
    disk = sysfs.disk("sda", "8:0")
    sysfs.partition(disk, "sda1", "8:1")
    sysfs.disk("dm-0", "252:0", slaves=(disk,))
    sysfs.disk("loop900", "7:900", backing=str(make_image("img")))
    for number in ((8, 1), (252, 0), (7, 900)):
        for more in (0, 1):
            with no_more_than(more):
                try:
                    found = sysfs.lineage(*number)
                except DescriptorsExhausted as error:
                    assert "Too many open files" in str(error)
                    continue
            assert found == sysfs.lineage(*number)
    with no_more_than(0), pytest.raises(DescriptorsExhausted):
        sysfs.lineage(252, 0)


def test_what_is_neither() -> None:
    """A saved state may say anything."""
    for identity in (("x", 8, 0), ("block", -1, 2**62), ("../..", 0, 0)):
        assert lineage_of(identity) == Lineage(identity)
        assert in_words(identity)


def test_a_loop_device_that_cannot_be_asked_lies_on_what_its_path_leads_to(
    sysfs: Sysfs, make_image: MakeImage
) -> None:
    """A path of another mount namespace may lead elsewhere here: nothing is the same because of
    it."""
    image = make_image("img")
    sysfs.disk("loop900", "7:900", backing=str(image))
    sysfs.disk("loop901", "7:901", backing=f"{image} (deleted)")
    sysfs.disk("loop902", "7:902", backing="/nowhere/at/all")
    assert sysfs.lineage(7, 900) == Lineage(block(7, 900), (file(image),))
    assert sysfs.lineage(7, 901) == Lineage(block(7, 901))
    assert sysfs.lineage(7, 902) == Lineage(block(7, 902))


def test_a_loop_device_is_its_file(loops: Loops, make_image: MakeImage) -> None:
    image = make_image("img")
    loop = loops.loop(image)
    assert lineage_of(number(loop)) == Lineage(file(image), names=(number(loop),))
    assert identity_of(loop) == identity_of(str(image)) == file(image)
    found = inspect_image(loop, read_only=False)
    assert (found.identity, found.under, found.is_block, found.number) == (
        file(image),
        (number(loop),),
        True,
        number(loop)[1:],
    )
    with open_image(loop, read_only=True) as opened:
        assert (opened.identity, opened.under, opened.is_block, opened.size) == (
            file(image),
            (),
            True,
            1 << 20,
        )


def test_a_loop_device_on_a_loop_device_is_the_same_file(
    loops: Loops, make_image: MakeImage
) -> None:
    image = make_image("img")
    lower = loops.loop(image)
    upper = loops.loop(lower)
    assert lineage_of(number(upper)) == Lineage(file(image), names=(number(upper), number(lower)))


@pytest.mark.parametrize("more", [("--offset", "4096"), ("--sizelimit", "8192")])
def test_a_loop_device_over_a_part_lies_on_its_file(
    loops: Loops, make_image: MakeImage, more: tuple[str, ...]
) -> None:
    image = make_image("img")
    loop = loops.loop(image, *more)
    assert lineage_of(number(loop)) == Lineage(number(loop), (file(image),))


def test_a_file_that_was_deleted_or_lies_elsewhere(loops: Loops, make_image: MakeImage) -> None:
    """The device knows its inode, whatever its path is."""
    image = make_image("img")
    loop = loops.loop(image)
    kept = image.with_name("kept")
    kept.hardlink_to(image)
    image.unlink()
    image.write_bytes(b"another" * 512)
    assert lineage_of(number(loop)).identity == file(kept)


def test_a_partition_of_a_loop_device_lies_on_its_file(loops: Loops, make_image: MakeImage) -> None:
    """The kernel answers for the whole loop device what it is asked of the partition."""
    image = make_image("img")
    loop = loops.loop(image)
    first, second = loops.partition(loop, 1, 0, 1024), loops.partition(loop, 2, 1024, 1024)
    for one in (first, second):
        assert lineage_of(number(one)) == Lineage(number(one), (number(loop), file(image)))
        assert inspect_image(one, read_only=False).identity == number(one)


def test_who_may_not_open_a_loop_device_goes_by_its_path(loops: Loops) -> None:
    with tempfile.TemporaryDirectory(prefix="pyblock-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)  # noqa: PTH101 - pytest's own folder shuts out other users
        image = Path(folder, "img")
        image.write_bytes(bytes(1 << 20))
        loop = loops.loop(image)
        Path(loop).chmod(0o600)
        had = shutil.which("losetup")
        assert had
        want = Lineage(number(loop), (file(image),))
        assert in_child(lambda: str(lineage_of(number(loop)) == want), uid=NOBODY) == (0, "True")
