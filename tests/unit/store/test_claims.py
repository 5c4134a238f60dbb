"""Who has claimed an image has claimed what lies under it and what lies on it, and no more."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.held_store import HeldStore, ended
from support.loops import Loops, loop_devices
from support.snapshot import MakeImage, MakeStore, refused
from support.store_scene import first_version, rows
from support.turns import until

from pyblock import DeviceInfo, ImageInUse, ImageReplaced, Sandbox
from pyblock.disk.lineage import Identity
from pyblock.store.base import Claim, Row
from pyblock.store.sqlite import file as sqlite_file
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio

DISK, OTHER_DISK = ("block", 8, 0), ("block", 8, 16)
FIRST, SECOND = ("block", 8, 1), ("block", 8, 2)
RAID = ("block", 9, 0)
FILE, LOOP = ("file", 2049, 77), ("block", 7, 0)
# What lies under each, as lineage_of says it, and what else it is called.
UNDER: dict[Identity, tuple[Identity, ...]] = {
    FIRST: (DISK,),
    SECOND: (DISK,),
    RAID: (FIRST, DISK, OTHER_DISK),
    FILE: (LOOP,),
}


def claim(identity: Identity, *, read_only: bool = False, share: bool = False) -> Claim:
    return Claim(identity, read_only, share, UNDER.get(identity, ()))


class Claims:
    """Sandboxes of one store that claim images, one device for each."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store

    async def __call__(self, sandbox: str, device: str, wanted: Claim) -> str:
        """Why it was refused; "" for granted."""
        if sandbox not in await self.store.sandboxes():
            await self.store.open_sandbox(sandbox, "")
        refused = await self.store.write(
            sandbox, lambda: [Row(device, b"{}", wanted, claiming=True)]
        )
        return str(refused[device]) if refused else ""

    async def drop(self, sandbox: str, device: str) -> None:
        await self.store.write(sandbox, lambda: [Row(device, None)])


@pytest.fixture
def claims(make_store: MakeStore) -> Claims:
    return Claims(make_store())


@pytest.fixture
def loops() -> Iterator[Loops]:
    with loop_devices() as loops:
        yield loops


@pytest.mark.parametrize("where", ["one", "two"])
@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (DISK, FIRST, "what lies under it (block device 8:0) to write it"),
        (FIRST, DISK, "what lies on it to write it"),
        (RAID, DISK, "what lies on it"),
        (DISK, RAID, "what lies under it (block device 8:0)"),
        (SECOND, FIRST, ""),
        (RAID, SECOND, ""),
        (OTHER_DISK, DISK, ""),
        (OTHER_DISK, RAID, "what lies under it (block device 8:16)"),
        # a row of before a loop device was its file
        (LOOP, FILE, "what lies under it (block device 7:0)"),
        (FILE, LOOP, "what lies on it"),  # somebody may not ask the loop device what it is
    ],
)
async def test_what_meets(
    claims: Claims, where: str, first: Identity, second: Identity, what: str
) -> None:
    """In one sandbox and in two; in whichever order."""
    assert await claims("one", "a", claim(first)) == ""
    said = await claims(where, "b", claim(second))
    assert ("device a of sandbox 'one'" in said and what in said) if what else not said
    await claims.drop("one", "a")
    assert await claims(where, "b", claim(second)) == ""


@pytest.mark.parametrize(("first", "second"), [(DISK, FIRST), (FIRST, DISK)])
async def test_readers_and_those_who_share_do_not_meet(
    claims: Claims, first: Identity, second: Identity
) -> None:
    assert await claims("one", "a", claim(first, read_only=True)) == ""
    assert await claims("two", "b", claim(second, read_only=True)) == ""
    assert "has claimed what lies" in await claims("two", "c", claim(second))
    await claims.drop("one", "a")
    await claims.drop("two", "b")
    assert await claims("one", "a", claim(first, share=True)) == ""
    assert await claims("two", "b", claim(second, share=True)) == ""
    assert await claims("three", "c", claim(second)) != ""


async def test_the_same_image_in_one_sandbox_is_its_own_business(claims: Claims) -> None:
    for device in "ab":
        assert await claims("one", device, claim(FIRST)) == ""
    assert await claims("two", "c", claim(FIRST)) != ""


async def test_a_device_does_not_stand_in_its_own_way(claims: Claims) -> None:
    for _ in range(2):
        assert await claims("one", "a", claim(RAID)) == ""
    assert await claims("one", "a", claim(FIRST)) == ""
    assert await claims("two", "b", claim(OTHER_DISK)) == ""  # which lay under what it had before
    assert await claims("two", "c", claim(DISK)) != ""
    await claims.drop("one", "a")
    assert rows(claims.store.path)["under"] == []


async def test_each_look_up_has_an_index(claims: Claims) -> None:
    """With ten thousand readers on a disk, it costs the same."""
    assert await claims("one", "a", claim(RAID)) == ""
    db = claims.store._file._db
    assert db is not None
    asked: list[str] = []
    db.set_trace_callback(lambda sql: asked.append(sql) if sql.startswith("SELECT") else None)
    assert await claims("two", "b", claim(SECOND)) == ""
    db.set_trace_callback(None)
    plans = [
        step[-1]
        for sql in asked
        for step in db.execute(f"EXPLAIN QUERY PLAN {sql}")
        if "image" in sql
    ]
    assert len(plans) >= 4
    assert not [plan for plan in plans if "SCAN" in plan and "sqlite" not in plan]


def test_no_parameter_has_a_number() -> None:
    """`?1` beside a tuple: Python 3.12.0 to 3.12.3 take it for a name, and warn at each statement
    of its being an error some day."""
    folder = Path(sqlite_file.__file__).parent
    assert not [
        text for path in folder.glob("*.py") for text in re.findall(r".*\?\d.*", path.read_text())
    ]


async def test_a_database_of_before(
    make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows, claims and owners are there as they were."""
    image, vm = make_image("img"), MemoryHypervisor()
    store = make_store()
    async with Sandbox("one", vm, store=store) as sandbox:
        device = await sandbox.attach(image)
    store.close()
    old = store.path.with_name("old.db")
    first_version(store.path, old)
    kept = rows(store.path)["device"]
    taken_up = make_store(old)
    with pytest.raises(ImageInUse, match="'one'"):
        async with Sandbox("two", MemoryHypervisor(), store=taken_up) as other:
            await other.attach(image)
    assert rows(old)["device"] == kept
    async with Sandbox("one", vm, store=taken_up) as again:
        assert (await again.attach(image)).id == device.id
        assert not again.recovered


# Real loop devices.


async def test_a_database_of_before_knew_block_devices_by_number_only(
    loops: Loops, make_image: MakeImage, make_store: MakeStore
) -> None:
    """Whose claims must hold against their files and disks all the same, before their sandboxes are
    opened again."""
    whole, parted = make_image("whole"), make_image("parted")
    loop, disk = loops.loop(whole), loops.loop(parted)
    partition = loops.partition(disk, 1, 128, 512)
    before = Claims(make_store())
    for device, path in (("a", loop), ("b", partition)):
        number = Path(path).stat().st_rdev
        assert (
            await before("one", device, claim(("block", os.major(number), os.minor(number)))) == ""
        )
    before.store.close()
    old = before.store.path.with_name("old.db")
    first_version(before.store.path, old)
    async with Sandbox("two", MemoryHypervisor(), store=make_store(old)) as two:
        for image in (whole, loop, parted, disk, partition):
            with pytest.raises(ImageInUse, match="'one'"):
                await two.attach(image)


async def test_a_file_and_the_loop_device_on_it_are_one(
    loops: Loops, make_image: MakeImage, make_store: MakeStore
) -> None:
    image = make_image("img")
    loop = loops.loop(image)
    vm, vm2, store = MemoryHypervisor(), MemoryHypervisor(), make_store()
    async with Sandbox("one", vm, store=store) as one, Sandbox("two", vm2, store=store) as two:
        device = await one.attach(image)
        assert await one.attach(loop) is device
        assert (device.attach_count, len(vm.devices)) == (2, 1)
        with pytest.raises(ImageInUse, match="'one'"):
            await two.attach(loop)
        await one.detach(device)
        await one.detach(device)
        device = await two.attach(DeviceInfo(path=loop, dev_type="b"))
        assert device.info.path == loop
        with pytest.raises(ImageInUse, match="'two'"):
            await one.attach(image)
    async with Sandbox("two", vm2, store=store) as two, Sandbox("one", vm, store=store) as one:
        [again] = two.devices
        assert await two.attach(image) is again
        with pytest.raises(ImageInUse, match="'two'"):
            await one.attach(loop)


async def test_a_partition_its_disk_and_its_file(
    loops: Loops, make_image: MakeImage, make_store: MakeStore
) -> None:
    image = make_image("img")
    loop = loops.loop(image)
    first, second = loops.partition(loop, 1, 0, 1024), loops.partition(loop, 2, 1024, 1024)
    vm, vm2, store = MemoryHypervisor(), MemoryHypervisor(), make_store()
    async with Sandbox("one", vm, store=store) as one, Sandbox("two", vm2, store=store) as two:
        device = await one.attach(first)
        for sandbox, at in ((one, vm), (two, vm2)):
            for path in (loop, image):
                with refused(
                    sandbox,
                    at,
                    ImageInUse,
                    f"{str(path)!r}",
                    "has claimed what lies on it to write it",
                ):
                    await sandbox.attach(path)
        await two.attach(second)
        await one.detach(device)
        await two.detach(two.devices[0].id)
        await one.attach(loop, read_only=True)
        await one.attach(first, read_only=True)
        with refused(two, vm2, ImageInUse, "has claimed what lies under it"):
            await two.attach(second)


async def test_a_loop_device_over_something_else_by_now(
    loops: Loops, make_image: MakeImage, store: HeldStore
) -> None:
    image, other = make_image("img"), make_image("other")
    loop, vm = loops.loop(image), MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        gate = store.hold()
        attach = asyncio.create_task(sandbox.attach(loop))
        await until(lambda: gate.reached)
        loops.over_another(loop, other)
        gate.let_go()
        await ended(attach)
        assert type(attach.exception()) is ImageReplaced
        assert not vm.journal


async def test_a_partition_of_something_else_by_now(
    loops: Loops, make_image: MakeImage, store: HeldStore
) -> None:
    """Its number may be the same; what lies under it was not claimed."""
    image, other = make_image("img"), make_image("other")
    loop, vm = loops.loop(image), MemoryHypervisor()
    partition = loops.partition(loop, 1, 0, 1024)
    number = Path(partition).stat().st_rdev
    async with Sandbox("one", vm, store=store) as sandbox:
        gate = store.hold()
        attach = asyncio.create_task(sandbox.attach(partition))
        await until(lambda: gate.reached)
        loops.over_another(loop, other)
        if Path(partition).exists() and Path(partition).stat().st_rdev != number:
            pytest.skip(f"the kernel gave {partition} another number")
        gate.let_go()
        await ended(attach)
        assert type(attach.exception()) is ImageReplaced
        assert not vm.journal
