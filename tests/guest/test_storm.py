"""The short form of the storm (`make storm` is the long one), and that the storm would notice: each
kind of damage that is done to the code here must end in its violation.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from kit import Machine
from kit.initramfs import KitMissing
from kit.machine import find_qemu
from storm.__main__ import main
from storm.book import Book
from storm.judge import Options, Violation
from storm.notes import DeviceSeen, Note
from storm.weather import Storm
from storm.witness import Images, Open, ask_qemu

from pyblock.disk.image import OpenedImage, open_image
from pyblock.errors import ImageInUse
from pyblock.life import machine as life
from pyblock.life.allotment import Allotment
from pyblock.life.device import BlockDevice
from pyblock.life.recovery import Difference, Found, Recovery
from pyblock.store.base import Row
from pyblock.store.sqlite import store as sqlite
from pyblock.store.sqlite.owner import OwnerLock
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.qemu.adapter import QemuHypervisor
from pyblock.vmm.qemu.descriptors import DescriptorSets, Passed

pytestmark = pytest.mark.timeout(300)

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def needs_qemu() -> None:
    try:
        find_qemu()
    except KitMissing as missing:
        if os.environ.get("PYBLOCK_REQUIRE_GUEST") == "1":
            pytest.fail(f"PYBLOCK_REQUIRE_GUEST=1 and {missing}", pytrace=False)
        pytest.skip(str(missing))


def test_the_short_form(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    status = main(["--seconds", os.environ.get("PYBLOCK_STORM_SECONDS", "20")], lines.append)
    with capsys.disabled():
        print("", *lines[-7:], sep="\n")
    assert status == 0, "\n".join(lines)


class Looking(Storm):
    """A storm that ends with one kind of violation, and overlooks others."""

    wanted = ""

    def _wrong(self, kind: str, text: str) -> None:
        if re.search(self.wanted, f"{kind}: {text.partition('the sandbox: ')[0]}"):
            raise Violation(kind, text)


def change_rows(patch: Patch, change: Callable[[Sequence[Row]], Sequence[Row]]) -> None:
    write = SqliteStore.write

    async def changed(
        store: SqliteStore,
        sandbox_id: str,
        rows: Callable[[], Sequence[Row]],
        deadline: float | None = None,
        **more: Any,
    ) -> dict[str, ImageInUse]:
        return await write(store, sandbox_id, lambda: change(rows()), deadline, **more)

    patch.setattr(SqliteStore, "write", changed)


def forget_to_delete(patch: Patch) -> None:
    change_rows(patch, lambda rows: [row for row in rows if row.record is not None])


def forget_the_claim(patch: Patch) -> None:
    change_rows(patch, lambda rows: [row._replace(claim=None) for row in rows])


def let_two_write(patch: Patch) -> None:
    patch.setattr(sqlite, "_HOLDERS", ("SELECT 1 WHERE 0",) * 4)


def write_after_the_plug(patch: Patch) -> None:
    """The intent is not written: who is killed in between leaves something of which the store knows
    nothing."""

    async def unwritten(machine: life.Machine, device: BlockDevice, deadline: float | None) -> None:
        device.held.sit(await machine.vmm.place(device.held))

    patch.setattr(life.Machine, "intend", unwritten)


def lose_a_count(patch: Patch) -> None:
    write = life.Machine.write
    calls = 0

    async def forgetful(
        machine: life.Machine, device: BlockDevice, deadline: float | None = None
    ) -> None:
        nonlocal calls
        calls += 1
        if calls % 10:
            await write(machine, device, deadline)
        elif machine.ledger is not None:
            machine.ledger.touched.pop(device.id, None)

    patch.setattr(life.Machine, "write", forgetful)


def leak_an_index(patch: Patch) -> None:
    release = Allotment.release
    calls = 0

    def leaky(allotment: Allotment, drive: Any) -> None:
        nonlocal calls
        calls += 1
        release(allotment, drive)
        if calls % 5 == 0:
            allotment.index.reserve(drive.index)

    patch.setattr(Allotment, "release", leaky)


def leave_a_backend(patch: Patch) -> None:
    async def nothing(vmm: QemuHypervisor, drive: Any) -> None:
        pass

    patch.setattr(QemuHypervisor, "remove_rest", nothing)


def open_another_image(patch: Patch) -> None:
    """What is opened is not what was claimed."""
    pass_image = DescriptorSets.pass_image

    async def other(sets: DescriptorSets, drive_id: str, image: OpenedImage) -> Passed | None:
        if not image.path.endswith("s1-a"):
            return await pass_image(sets, drive_id, image)
        read_only = fcntl.fcntl(image.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with open_image(image.path[:-1] + "b", read_only=read_only) as another:
            return await pass_image(sets, drive_id, another)

    patch.setattr(DescriptorSets, "pass_image", other)


def see_no_owner(patch: Patch) -> None:
    patch.setattr(OwnerLock, "lives", lambda lock, number: False)


def lose_what_is_there(patch: Patch) -> None:
    """Recovery takes a device that is there for one that is not."""
    look = Recovery._differences

    async def blind(recovery: Recovery) -> list[Difference]:
        found = await look(recovery)
        if not recovery._machine.running and recovery._machine.manager:
            for device in recovery._machine.manager:
                if (drive := getattr(device, "drive", None)) is not None and device.attached:  # type: ignore[union-attr]
                    return [*found, Difference(Found.LOST, drive, drive.id, device, None)]  # type: ignore[arg-type]
        return found

    patch.setattr(Recovery, "_differences", blind)


def leak_descriptors(patch: Patch) -> None:
    plug = QemuHypervisor.plug

    async def leaky(vmm: QemuHypervisor, drive: Any, image: OpenedImage) -> None:
        os.dup(1)
        await plug(vmm, drive, image)

    patch.setattr(QemuHypervisor, "plug", leaky)


def leak_memory(patch: Patch) -> None:
    plug = QemuHypervisor.plug
    leaked = []

    async def leaky(vmm: QemuHypervisor, drive: Any, image: OpenedImage) -> None:
        leaked.append(b"\1" * (1 << 20))
        await plug(vmm, drive, image)

    patch.setattr(QemuHypervisor, "plug", leaky)


def hang_for_ever(patch: Patch) -> None:
    """A fault of ours in a task that nobody waits for."""

    def broken(allotment: Allotment, drive: Any) -> None:
        raise KeyError(drive.id)

    patch.setattr(Allotment, "release", broken)


# some seconds each
SHORT = (forget_to_delete, leave_a_backend, open_another_image, lose_what_is_there, hang_for_ever)


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (forget_to_delete, "its row says .* the sandbox None|has the device|unclaimed"),
        (forget_the_claim, "write. lock|its row says"),
        (let_two_write, "the store lets two|write. lock"),
        (write_after_the_plug, "unclaimed|orphan"),
        (lose_a_count, "by what its callers were told|its row says"),
        (leak_an_index, "the indexes .* are taken|lowest free"),
        (leave_a_backend, "has the backend|backend-del|Duplicate|duplicate|orphan"),
        (open_another_image, "wrong image|as the backend of|write. lock"),
        (see_no_owner, "two owners"),
        (lose_what_is_there, "false lost"),
        (leak_descriptors, "descriptors"),
        (leak_memory, "^memory"),
        (hang_for_ever, "KeyError"),
    ],
)
def test_it_notices(
    damage: Callable[[Patch], None],
    wanted: str,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if damage not in SHORT and os.environ.get("PYBLOCK_LONG") != "1":
        pytest.skip("one of the others is of its kind; PYBLOCK_LONG=1 runs it")
    damage(monkeypatch)
    monkeypatch.setattr(Looking, "wanted", wanted)
    with TemporaryDirectory(prefix="storm-", dir="/tmp") as folder:
        storm = Looking(Path(folder), Options(60, 1))
        with pytest.raises(Violation):
            storm.run()
        with capsys.disabled():
            print(f"\n{damage.__name__}: {storm.lives} processes", end="")


def test_the_book() -> None:
    """What counts may be, by what was told."""

    def device(count: int) -> list[DeviceSeen]:
        return (
            [DeviceSeen("id", "drive-id", "i", "virtio-scsi", "attached", count, 0, 0)]
            if count
            else []
        )

    def calls(*ends: tuple[str, str | None]) -> Book:
        book = Book()
        for kind, result in ends:
            book.begin(Note(0, "begin", "s", kind=kind, images=["i"]))
            if result is not None:
                book.end(Note(0, "end", "s", kind=kind, images=["i"], result=result))
        return book

    told: list[tuple[list[tuple[str, str | None]], set[int]]] = [
        ([("attach", "")], {1}),
        ([("attach", None)], {0, 1}),
        ([("attach", "AttachPending")], {0}),
        ([("attach", "CancelledError")], {0}),
        ([("attach", ""), ("attach", ""), ("detach", "")], {1}),
        ([("attach", ""), ("detach", None)], {0, 1}),
        ([("attach", ""), ("detach", "DetachPending")], {0}),
        ([("attach", ""), ("detach", "DetachPending"), ("resume", None)], {0}),
        ([("attach", ""), ("detach", "StoreBusy")], {1}),
        ([("attach", ""), ("detach", "CancelledError")], {0, 1}),
        ([("attach", ""), ("attach_many", "ImageInUse")], {1}),
        ([("attach", ""), ("detach_many", "DetachPending")], {0, 1}),
    ]
    for ends, possible in told:
        assert {
            count for count in range(4) if not calls(*ends).settle(device(count))
        } == possible, ends
    for count in (0, 1):  # another machine has nothing of it
        book = calls(("attach", ""))
        book.replace_machine()
        assert bool(book.settle(device(count))) == bool(count)


def test_the_witness(tmp_path: Path, start_machine: Callable[..., Machine]) -> None:
    """Images are told by inode, whether they were opened by path or handed over; a set of
    descriptors that nothing uses is seen."""
    images = Images(tmp_path, ["a", "b"])
    machine = start_machine(guest=False, nvdimm_slots=1)
    assert ask_qemu(machine, images) == ({}, set(), [], [], set())

    def hand_over(name: str) -> int:
        file = os.open(tmp_path / name, os.O_RDWR)
        try:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [file]))]
            machine.side._socket.sendmsg([b" "], ancillary)
            return int(machine.side.command("add-fd")["fdset-id"])
        finally:
            os.close(file)

    def add(drive: str, path: str, *, read_only: bool = False) -> None:
        file = {"driver": "file", "filename": path, "read-only": read_only}
        machine.side.command(
            "blockdev-add",
            {"driver": "raw", "node-name": drive, "read-only": read_only, "file": file},
        )

    number = hand_over("a")
    assert ask_qemu(machine, images).idle
    add("drive-1", f"/dev/fdset/{number}")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    add("drive-2", str(tmp_path / "link"), read_only=True)
    lists = ask_qemu(machine, images)
    assert lists.backends == {"drive-1": Open("a", False), "drive-2": Open("b", True)}
    assert not (lists.idle or lists.devices or lists.others)
    # What is mapped as memory is told by the mapping.
    number = machine.side.command("query-fdsets")[0]["fds"][0]["fd"]
    memory = {
        "qom-type": "memory-backend-file",
        "id": "drive-3",
        "mem-path": f"/proc/self/fd/{number}",
        "size": 1 << 20,
        "share": True,
    }
    machine.side.command("object-add", memory)
    assert ask_qemu(machine, images).backends["drive-3"] == Open("a", False)
    machine.side.command("object-del", id="drive-3")
    machine.side.command(
        "device_add", {"driver": "scsi-hd", "id": "drive-1", "drive": "drive-1", "bus": "scsi0.0"}
    )
    assert ask_qemu(machine, images).devices == {"drive-1"}
    machine.side.command("device_del", id="drive-1")
    while not (lists := ask_qemu(machine, images)).gone:  # QEMU says so a moment later
        pass
    assert lists.gone == {"drive-1"} and not lists.devices
