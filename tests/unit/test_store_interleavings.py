"""What gets in each other's way when a store is written meanwhile: each case once left a row, a claim or a disk that contradicted the rest.

A write is held back where it would wait for another process, so that what happens meanwhile happens every time.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import samples
from children import in_child
from snapshot import MakeImage, MakeStore, drive_ids

from pyblock import (
    AttachPending,
    BlockDevice,
    CallerError,
    DetachPending,
    DeviceConflict,
    ImageInUse,
    InvalidImage,
    InvalidState,
    InvalidValue,
    Phase,
    Sandbox,
    SandboxBusy,
    SandboxClosed,
    StoreBusy,
    StoreError,
    UnknownDevice,
    blocking,
    ledger,
    receiver,
)
from pyblock.drivers import SD
from pyblock.hypervisors.base import FoundDisk, Inventory
from pyblock.hypervisors.memory import Fault, MemoryHypervisor
from pyblock.hypervisors.memory_file import FileMachine
from pyblock.model import BlockDrive, DeviceInfo
from pyblock.recovery import Found, Outcome
from pyblock.state import SandboxState, decode
from pyblock.stores.base import Row
from pyblock.stores.sqlite import SqliteStore

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

SOON, LATE = 0.05, 30.0  # seconds: a deadline meant to pass, and one that is not


class Gate:
    """Where something waits until it is let go.

    :ivar reached: it has come here.
    """

    def __init__(self, *, fails: bool = False) -> None:
        self.reached = False
        self._fails = fails
        self._event = asyncio.Event()

    def let_go(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        self.reached = True
        await self._event.wait()
        if self._fails:
            raise StoreBusy("another process has been holding the lock")


class HeldStore(SqliteStore):
    """A store that can hold back its next writes, and have them fail then."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._gates: deque[Gate] = deque()

    def hold(self, *, fails: bool = False) -> Gate:
        """Where the next write that is not held back yet will wait."""
        self._gates.append(Gate(fails=fails))
        return self._gates[-1]

    async def write(self, *arguments: Any, **more: Any) -> dict[str, ImageInUse]:
        if self._gates:
            await self._gates.popleft().wait()
        return await super().write(*arguments, **more)


class SlowMachine(MemoryHypervisor):
    """Says what it has, and where a drive went, when the gate lets it; what it says is what it had when it was asked.

    :ivar asked: how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answer: Gate | None = None
        self.place_told: Gate | None = None
        self.asked = 0

    async def inventory(self, known: Collection[str] = ()) -> Inventory:
        self.asked += 1
        found = await super().inventory(known)
        # As QEMU tells it of SCSI disks: with the index that belongs to the address.
        disks = [FoundDisk(disk.id, disk.family, int(self.devices[disk.id].split()[1])) for disk in found.disks if disk.id in self.devices]
        if self.answer is not None:
            await self.answer.wait()
        return Inventory([*self._existing, *disks], found.held, found.files)

    async def locate(self, drive: BlockDrive) -> None:
        if self.place_told is not None:
            await self.place_told.wait()
        await super().locate(drive)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HeldStore]:
    store = HeldStore(tmp_path / "state.db")
    yield store
    store.close()


@contextmanager
def locked(store: SqliteStore) -> Iterator[None]:
    """Another process stands in the middle of its transaction."""
    with closing(sqlite3.connect(store.path, isolation_level=None, timeout=LATE)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LATE):
        while not condition():
            await asyncio.sleep(0.001)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Returns when they are over; fails when they never are."""
    _, going = await asyncio.wait(tasks, timeout=LATE)
    for task in going:
        task.cancel()
    assert not going


async def reached(vm: MemoryHypervisor, step: str, times: int = 1) -> None:
    await until(lambda: [name for name, _ in vm.journal].count(step) >= times)


def query(store: SqliteStore, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(store.path)) as db:
        return db.execute(sql).fetchall()


def rows(store: SqliteStore) -> dict[str, tuple[str, int]]:
    """Phase and count of each device, as the store has them."""
    found = {device_id: json.loads(state) for device_id, state in query(store, "SELECT id, state FROM device")}
    return {device_id: (state["Pyblock"]["Phase"], state["AttachCount"]) for device_id, state in found.items()}


def facts(sandbox: Sandbox) -> dict[str, tuple[str, int]]:
    """The same as the sandbox has them."""
    return {one.id: (str(one.phase), one.attach_count) for one in sandbox.devices if isinstance(one, BlockDevice)}


def nothing_left(sandbox: Sandbox) -> None:
    assert not sandbox.devices and not list(sandbox.index) and not drive_ids(sandbox)


async def saved_with(image: Path) -> SandboxState:
    """What another machine's sandbox saved that had this image as device "loaded"."""
    async with Sandbox("elsewhere", MemoryHypervisor(), store=None) as sandbox:
        await sandbox.attach(image, device_id="loaded")
        return sandbox.state()


def kept_only() -> SandboxState:
    """A state of the original without disks: a device of a kind that is not plugged here, and an index that something took."""
    return decode(samples.text(samples.sandbox([samples.VFIO], [7])), where="a sample")


# Writes that take others' rows along.


CHANGES: dict[str, Callable[[Sandbox, BlockDevice], Awaitable[object]]] = {
    "last detach": lambda sandbox, device: sandbox.detach(device),
    "second attach": lambda sandbox, device: sandbox.attach(device.info.path),
    "one detach of two": lambda sandbox, device: sandbox.detach(device),
}


@pytest.mark.parametrize("note_fails", [False, True], ids=["", "so does the next"])
@pytest.mark.parametrize("name", CHANGES)
async def test_what_failed_was_written_along_with_another_device(
    name: str, note_fails: bool, store: HeldStore, make_image: MakeImage
) -> None:
    """Whoever was told "nothing was changed" finds that so after a restart, too."""
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        if name == "one detach of two":
            await sandbox.attach(device.info.path)
        before = rows(store)
        gate = store.hold(fails=True)
        change = asyncio.ensure_future(CHANGES[name](sandbox, device))
        await until(lambda: gate.reached)
        await sandbox.attach(make_image("b"), device_id="b")
        assert rows(store)["a"] != before["a"]  # taken along
        if note_fails:
            store.hold(fails=True).let_go()
        gate.let_go()
        with pytest.raises(StoreBusy):
            await change
        await sandbox.attach(make_image("c"), device_id="c")
        assert rows(store) == facts(sandbox) == {**before, "b": ("attached", 1), "c": ("attached", 1)}


async def test_what_failed_is_written_without_another_call(
    store: HeldStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "RETRY", 0.001)
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        gate = store.hold(fails=True)
        change = asyncio.create_task(sandbox.detach(device))
        await until(lambda: gate.reached)
        await sandbox.attach(make_image("b"), device_id="b")
        for _ in range(3):
            store.hold(fails=True).let_go()
        gate.let_go()
        with pytest.raises(StoreBusy):
            await change
        await until(lambda: rows(store) == {"a": ("attached", 1), "b": ("attached", 1)})


async def test_the_guest_is_asked_when_the_intent_is_written_not_before(store: HeldStore, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        vm.journal.clear()
        gate = store.hold()
        first = asyncio.create_task(sandbox.detach(device))
        await until(lambda: gate.reached)
        first.cancel()
        await ended(first)
        operation = device.operation
        assert operation is not None and operation.abandoned
        second = asyncio.create_task(sandbox.detach(device))
        await until(lambda: not operation.abandoned)  # it has joined
        assert vm.journal == []
        gate.let_go()
        await second
        assert [step for step, _ in vm.journal] == ["device-del", "device-gone", "backend-del"]
        assert rows(store) == {}


@pytest.mark.parametrize("attaches", [True, False], ids=["attach", "detach"])
async def test_the_store_is_free_in_the_moment_of_the_deadline(attaches: bool, store: HeldStore, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        vm.journal.clear()
        vm.fail("backend-add", Fault("hold"))
        vm.fail("device-gone", Fault("hold"))
        gate = store.hold()
        b = make_image("b")
        work: Awaitable[Any] = sandbox.attach(b, timeout=SOON) if attaches else sandbox.detach(device, timeout=SOON)
        late = asyncio.get_running_loop().time() + SOON
        task = asyncio.ensure_future(work)
        await until(lambda: gate.reached and asyncio.get_running_loop().time() > late)
        gate.let_go()
        await ended(task)
        with pytest.raises(StoreBusy):
            task.result()
        assert vm.journal == []
        assert rows(store) == facts(sandbox) == {"a": ("attached", 1)}
        vm.let_go("backend-add")
        vm.let_go("device-gone")


async def test_a_row_that_cannot_be_written_is_its_own_devices_trouble(store: HeldStore, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        vm.fail("device-add", Fault("hold"))
        good = asyncio.create_task(sandbox.attach(make_image("good"), device_id="good"))
        await reached(vm, "device-add")
        bad = DeviceInfo(str(make_image("bad")), id="bad", options={"fstype": "caf\udce9"})
        gate = store.hold()
        refused = asyncio.create_task(sandbox.attach(bad))
        await until(lambda: gate.reached)
        vm.let_go("device-add")
        await good
        gate.let_go()
        with pytest.raises(InvalidValue, match="device bad"):
            await refused
        assert rows(store) == facts(sandbox) == {"good": ("attached", 1)}
        assert vm.devices.keys() == {"drive-good"} and list(sandbox.index) == [0]
        await sandbox.detach("good")
        assert rows(store) == {}


@pytest.mark.parametrize("kept", [True, False], ids=["store", "no store"])
async def test_a_path_that_is_not_utf8(kept: bool, store: HeldStore, make_image: MakeImage) -> None:
    image = os.fsencode(make_image("caf")) + b"\xe9"
    with open(image, "xb") as file:  # noqa: PTH123 - a Path cannot hold it
        file.truncate(1 << 20)
    async with Sandbox("one", vm := MemoryHypervisor(), store=store if kept else None) as sandbox:
        with pytest.raises(InvalidImage, match="UTF-8"):
            await sandbox.attach(os.fsdecode(image))
        nothing_left(sandbox)
        assert vm.journal == []


# Loading a state.


@pytest.mark.parametrize("free", [True, False], ids=["free", "used elsewhere"])
async def test_an_attach_beside_a_load(free: bool, store: HeldStore, make_image: MakeImage) -> None:
    state, image = await saved_with(make_image("loaded")), make_image("a")
    async with Sandbox("other", MemoryHypervisor(), store=store) as other, Sandbox("one", vm := MemoryHypervisor(), store=store) as sandbox:
        if not free:
            await other.attach(image, device_id="theirs")
        theirs = rows(store)
        gate = store.hold()
        load = asyncio.create_task(sandbox.restore(state))
        await until(lambda: gate.reached)
        with pytest.raises(CallerError, match="being loaded"):
            await sandbox.attach(image)
        assert not sandbox.devices and not vm.journal
        with pytest.raises(CallerError):
            await sandbox.restore(state)
        gate.let_go()
        await load
        assert facts(sandbox) == {"loaded": ("attached", 1)} and list(sandbox.index) == [0]
        assert rows(store) == {**theirs, **facts(sandbox)}


async def test_a_load_that_fails_keeps_what_an_earlier_one_kept(store: HeldStore, make_image: MakeImage) -> None:
    image = make_image("a")
    state = await saved_with(image)
    sandbox_row = "SELECT state FROM sandbox WHERE id = 'one'"
    async with Sandbox("other", MemoryHypervisor(), store=store) as other, Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        await other.attach(image)
        await sandbox.restore(kept_only())
        before = query(store, sandbox_row)
        assert b"VFIODevs" in before[0][0]
        with pytest.raises(ImageInUse, match="'other'"):
            await sandbox.restore(state)
        assert query(store, sandbox_row) == before
        await sandbox.detach(await sandbox.attach(make_image("b")))
        assert query(store, sandbox_row) == before
        assert "VFIODevs" in str(sandbox.state().devices)


async def test_a_load_that_fails_gives_back_its_own_indexes_only(store: HeldStore, make_image: MakeImage) -> None:
    """Not those of an earlier load, nor those of the machine's own disks."""
    image, more = make_image("a"), make_image("b")
    state = await saved_with(image)
    vm = SlowMachine()
    vm._existing = (FoundDisk("boot", SD, 0),)
    async with Sandbox("other", MemoryHypervisor(), store=store) as other, Sandbox("one", vm, store=store) as sandbox:
        await other.attach(image)
        await sandbox.restore(kept_only())
        await sandbox.detach(await sandbox.attach(more))
        assert list(sandbox.index) == [0, 7]
        with pytest.raises(ImageInUse, match="'other'"):
            await sandbox.restore(state)
        assert list(sandbox.index) == [0, 7]
        again = await sandbox.attach(more)
        assert (again.held.index, again.held.predicted_name) == (1, "/dev/sdb")


async def test_a_load_that_was_cancelled_does_not_overwrite_the_next(
    store: HeldStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "RETRY", 0.001)
    state = await saved_with(make_image("a"))
    sandbox_row = "SELECT state FROM sandbox WHERE id = 'one'"
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        gate = store.hold()
        load = asyncio.create_task(sandbox.restore(state))
        await until(lambda: gate.reached)
        store.hold(fails=True).let_go()  # whatever tidies up after it
        load.cancel()
        await ended(load)
        nothing_left(sandbox)
        while store._gates:
            store._gates.popleft()
        await sandbox.restore(kept_only())
        before = query(store, sandbox_row)
        assert b"VFIODevs" in before[0][0]
        gate.let_go()
        for name in "bc":
            await sandbox.detach(await sandbox.attach(make_image(name)))
        assert query(store, sandbox_row) == before and rows(store) == {}


async def test_a_load_that_close_overtakes_claims_nothing(store: HeldStore, make_image: MakeImage) -> None:
    image = make_image("a")
    state = await saved_with(image)
    sandbox = await Sandbox("one", MemoryHypervisor(), store=store).__aenter__()
    gate = store.hold()
    load = asyncio.create_task(sandbox.restore(state))
    await until(lambda: gate.reached)
    await sandbox.close()
    gate.let_go()
    with pytest.raises(StoreError, match="not this process's"):
        await load
    assert rows(store) == {} and await store.sandboxes() == []
    async with Sandbox("two", MemoryHypervisor(), store=store) as other:
        await other.attach(image)


def test_killed_when_a_load_is_refused(make_store: MakeStore, make_image: MakeImage, tmp_path: Path) -> None:
    """A refused load is one transaction: nobody has to tidy up after it."""
    images = [make_image(name) for name in ("first", "used", "last")]
    devices = [
        samples.device(number, samples.drive(number, File=str(image), SCSIAddr=f"0:{number}")) for number, image in enumerate(images)
    ]
    state = samples.text(samples.sandbox(devices, [0, 1, 2]))
    store = make_store()

    async def use() -> None:
        async with Sandbox("other", MemoryHypervisor(), store=store) as other:
            await other.attach(images[1], device_id="used")

    async def load(child: SqliteStore) -> None:
        async with Sandbox("one", f"memory:{tmp_path / 'vm'}", store=child) as sandbox:
            await sandbox.restore(decode(state, where="a sample"))

    def victim() -> str:
        write = SqliteStore.write

        async def last_write(self: SqliteStore, *arguments: Any, **more: Any) -> dict[str, ImageInUse]:
            refused = await write(self, *arguments, **more)
            if refused:
                os.kill(os.getpid(), signal.SIGKILL)
            return refused

        SqliteStore.write = last_write  # type: ignore[method-assign]
        asyncio.run(load(SqliteStore(store.path)))
        return "it was not refused"

    (tmp_path / "vm").touch()
    asyncio.run(use())
    status, text = in_child(victim)
    assert status == -signal.SIGKILL, text
    assert query(store, "SELECT sandbox, id FROM device") == [("other", "used")]


# Cancellations.


async def agree(store: SqliteStore, sandbox: Sandbox, device: BlockDevice, image: Path) -> None:
    """Count, users and row agree; as many detaches end the device, whose image is then free for other access."""
    await until(lambda: device.operation is None)
    assert device.attach_count == device.ref_count
    assert rows(store) == facts(sandbox) == ({device.id: ("attached", device.attach_count)} if device.attach_count else {})
    for _ in range(device.attach_count):
        await sandbox.detach(device)
    nothing_left(sandbox)
    assert rows(store) == {}
    await sandbox.detach(await sandbox.attach(image, read_only=True))


@pytest.mark.parametrize(("attaches", "before"), [(True, 0), (True, 1), (True, 2), (False, 1), (False, 2)])
async def test_cancelled_at_each_turn(attaches: bool, before: int, make_store: MakeStore, make_image: MakeImage) -> None:
    """A count belongs to whoever was told that it has one."""
    store, outcomes = make_store(), []
    for turn in range(200):
        image = make_image(f"{turn}")
        async with Sandbox(f"sb{turn}", MemoryHypervisor(), store=store) as sandbox:
            for _ in range(before):
                device = await sandbox.attach(image, device_id="a")
            work: Awaitable[Any] = sandbox.attach(image, device_id="a") if attaches else sandbox.detach(device)
            task = asyncio.ensure_future(work)
            for _ in range(turn):
                await asyncio.sleep(0)
            in_time = task.cancel()
            await ended(task)
            await until(lambda: not sandbox.running)
            if sandbox.devices:
                device = next(one for one in sandbox.devices if isinstance(one, BlockDevice))
            if sandbox.devices or before:
                # A detach goes on by itself once it has begun; an attach that nobody hears of is undone.
                possible = (
                    (before - 1, before)
                    if not attaches and task.cancelled()
                    else (before + (not task.cancelled()) * (1, -1)[not attaches],)
                )
                assert device.attach_count in possible
                await agree(store, sandbox, device, image)
            nothing_left(sandbox)
        outcomes.append(task.cancelled())
        if not in_time:
            break
    assert outcomes[0] and not outcomes[-1] and len(outcomes) > 3


@pytest.mark.parametrize("attaches", [True, False], ids=["attach", "detach"])
async def test_cancelled_at_each_turn_after_the_store_was_waited_for(attaches: bool, store: HeldStore, make_image: MakeImage) -> None:
    outcomes = []
    for turn in range(-1, 200):  # first before the store is free, when the work goes on alone
        image = make_image(f"{turn}")
        async with Sandbox(f"sb{turn}", MemoryHypervisor(), store=store) as sandbox:
            device = await sandbox.attach(image, device_id="a")
            await sandbox.attach(image)
            gate = store.hold()
            work: Awaitable[Any] = sandbox.attach(image) if attaches else sandbox.detach(device)
            task = asyncio.ensure_future(work)
            await until(lambda gate=gate: gate.reached)  # type: ignore[misc]
            if turn >= 0:
                gate.let_go()
            for _ in range(turn):
                await asyncio.sleep(0)
            in_time = task.cancel()
            await ended(task)
            gate.let_go()
            await until(lambda device=device: device.operation is None)  # type: ignore[misc]
            if attaches:
                assert device.attach_count == 2 + (not task.cancelled())
            await agree(store, sandbox, device, image)
        outcomes.append(task.cancelled())
        if not in_time:
            break
    assert outcomes[0] and not outcomes[-1]


# Closing.


@pytest.mark.parametrize("waits", [True, False], ids=["its caller waits", "its caller has gone"])
async def test_closed_while_the_outcome_of_an_attach_is_being_written(
    waits: bool, make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "GRACE", SOON)
    monkeypatch.setattr(Sandbox.settle, "__defaults__", (SOON,))
    vm, store, image = MemoryHypervisor(), make_store(), make_image("a")
    sandbox = await Sandbox("one", vm, store=store).__aenter__()
    vm.fail("device-add", Fault("hold"))
    vm.fail("device-gone", Fault("hold"))
    attach = asyncio.create_task(sandbox.attach(image, device_id="a"))
    await reached(vm, "device-add")
    with locked(store):
        vm.let_go("device-add")
        await until(lambda: "drive-a" in vm.devices)
        if not waits:
            attach.cancel()
            await ended(attach)
        closing_ = asyncio.create_task(sandbox.close())
        await ended(closing_, attach)
        closing_.result()
        with pytest.raises(AttachPending if waits else asyncio.CancelledError):
            attach.result()
        assert rows(store) == {"a": ("attach-pending", 0)}
    store.close()  # as its process ends
    vm.let_go("device-gone")
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        assert [(one.found, one.outcome) for one in sandbox.recovered] == [(Found.ATTACH, Outcome.REMOVED)]
        nothing_left(sandbox)
        assert not vm.devices and not vm.backends and rows(store) == {}
        await sandbox.attach(image)


async def test_closed_while_the_machine_is_being_asked(store: HeldStore, make_store: MakeStore, make_image: MakeImage) -> None:
    vm = SlowMachine()
    sandbox = await Sandbox("one", vm, store=store).__aenter__()
    vm.fail("device-add", Fault("lose"))
    with pytest.raises(AttachPending):
        await sandbox.attach(make_image("a"), device_id="a")
    gate = vm.answer = Gate()
    vm.journal.clear()
    reconciling = asyncio.create_task(sandbox.reconcile())
    await until(lambda: gate.reached)
    await sandbox.close()
    gate.let_go()
    await ended(reconciling)
    with pytest.raises(SandboxClosed):
        reconciling.result()
    vm.answer = None
    async with Sandbox("one", vm, store=make_store(), recover=False) as other:
        for _ in range(100):
            await asyncio.sleep(0)
        assert vm.journal == [] and vm.devices.keys() == {"drive-a"}
        assert rows(store) == facts(other) == {"a": ("attach-pending", 0)}
    with pytest.raises(SandboxClosed):
        await sandbox.reconcile()


async def test_closed_while_a_removal_is_waited_for(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    sandbox = await Sandbox("one", vm, store=None).__aenter__()
    vm.fail("device-add", Fault("lose"))
    with pytest.raises(AttachPending):
        await sandbox.attach(make_image("a"), device_id="a")
    vm.fail("device-gone", Fault("hold"))
    reconciling = asyncio.create_task(sandbox.reconcile(timeout=None))
    await reached(vm, "device-gone")
    await sandbox.close()
    await ended(reconciling)
    assert not reconciling.cancelled()
    assert [(one.found, one.outcome) for one in reconciling.result()] == [(Found.ATTACH, Outcome.PENDING)]
    assert vm.devices.keys() == {"drive-a"}


async def test_who_waits_for_a_turn_does_nothing_after_close(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    sandbox = await Sandbox("one", vm, store=None).__aenter__()
    image = make_image("a")
    device = await sandbox.attach(image, device_id="a")
    vm.fail("device-gone", Fault("hold"))
    first = asyncio.create_task(sandbox.detach(device))
    await reached(vm, "device-gone")
    others = [asyncio.create_task(work) for work in (sandbox.detach(device), sandbox.detach("a"))]
    attach = asyncio.create_task(sandbox.attach(image))
    for _ in range(10):
        await asyncio.sleep(0)
    vm.journal.clear()
    await sandbox.close()
    await ended(first, *others, attach)
    with pytest.raises(DetachPending):
        first.result()
    for task in (*others, attach):
        assert isinstance(task.exception(), SandboxClosed | DetachPending)
    assert vm.journal == []


def test_interrupted_while_a_blocking_sandbox_is_being_opened(tmp_path: Path, make_store: MakeStore, make_image: MakeImage) -> None:
    asking = threading.Event()

    class Silent(FileMachine):
        async def inventory(self, known: Collection[str] = ()) -> Inventory:
            asking.set()
            await asyncio.Event().wait()
            return await super().inventory(known)

    (tmp_path / "vm").touch()
    store, main_thread = make_store(), threading.main_thread().ident or 0
    with blocking.Sandbox("one", f"memory:{tmp_path / 'vm'}", store=store) as sandbox:
        sandbox.attach(make_image("a"), device_id="a")

    def interrupt() -> None:
        assert asking.wait(LATE)
        while True:  # until it waits for the answer
            frame, names = sys._current_frames()[main_thread], set()
            while frame.f_back is not None:
                names.add(frame.f_code.co_qualname)
                frame = frame.f_back
            if {"Sandbox._call", "Condition.wait"} <= names:
                break
        signal.pthread_kill(main_thread, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt), blocking.Sandbox("one", Silent(tmp_path / "vm"), store=store):
        pass
    thread.join()
    with blocking.Sandbox("one", f"memory:{tmp_path / 'vm'}", store=store) as sandbox:
        assert [device.id for device in sandbox.devices] == ["a"]


# While the machine is being asked.


async def test_a_detach_that_ends_while_the_machine_is_being_asked(make_image: MakeImage) -> None:
    vm = SlowMachine()
    async with Sandbox("one", vm, store=None) as sandbox:
        image = make_image("a")
        device = await sandbox.attach(image, device_id="a")
        gate = vm.answer = Gate()
        reconciling = asyncio.create_task(sandbox.reconcile())
        await until(lambda: gate.reached)
        await sandbox.detach(device)
        gate.let_go()
        assert await reconciling == []
        nothing_left(sandbox)
        again = await sandbox.attach(image, device_id="a")
        assert (again.held.index, again.held.predicted_name) == (0, "/dev/sda")


async def test_the_machines_own_disks_come_and_go(make_image: MakeImage) -> None:
    vm = SlowMachine()
    vm._existing = (FoundDisk("drive-x", SD, 0), FoundDisk("own", SD, 2))
    async with Sandbox("one", vm, store=None) as sandbox:
        first = await sandbox.attach(make_image("a"), device_id="a")
        assert first.held.index == 1 and list(sandbox.index) == [0, 1, 2]
        image = make_image("x")
        with pytest.raises(DeviceConflict, match="drive-x"):
            await sandbox.attach(image, device_id="x")
        vm._existing = (FoundDisk("other", SD, 3),)
        await sandbox.reconcile()
        assert list(sandbox.index) == [1, 3]
        assert (await sandbox.attach(image, device_id="x")).held.index == 0
        assert (await sandbox.attach(make_image("b"))).held.index == 2


async def test_the_id_of_an_orphan_that_was_removed_is_free(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    vm.backends["drive-q"], vm.devices["drive-q"] = "/somewhere", "virtio-scsi 0"
    vm._places.add("virtio-scsi 0")
    async with Sandbox("one", vm, store=None) as sandbox:
        image = make_image("q")
        with pytest.raises(DeviceConflict, match="drive-q"):
            await sandbox.attach(image, device_id="q")
        assert [one.outcome for one in await sandbox.reconcile(orphans=True)] == [Outcome.REMOVED]
        await sandbox.attach(image, device_id="q")
        assert vm.backends == {"drive-q": str(image)}


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_lost_device_ends_however_often_it_was_attached(count: int, store: HeldStore, make_image: MakeImage) -> None:
    vm, image = MemoryHypervisor(), make_image("a")
    async with Sandbox("one", vm, store=store) as sandbox:
        for _ in range(count):
            device = await sandbox.attach(image, device_id="a")
        vm.devices.clear()
        vm.backends.clear()
        vm._places.clear()
        assert [(one.found, one.outcome) for one in await sandbox.reconcile()] == [(Found.LOST, Outcome.FREED)]
        nothing_left(sandbox)
        assert rows(store) == {}
        await sandbox.detach(device)  # quiet once, as after any end that its user has not been told of
        with pytest.raises(UnknownDevice):
            await sandbox.detach(device)
        await sandbox.attach(image, read_only=True)


async def test_a_detach_that_begins_while_an_attach_is_being_finished(store: HeldStore, make_image: MakeImage) -> None:
    vm = SlowMachine()
    async with Sandbox("one", vm, store=store) as sandbox:
        vm.fail("device-add", Fault("lose"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("a"), device_id="a")
        gate = vm.place_told = Gate()
        vm.fail("device-del", Fault("refuse"))
        vm.fail("device-gone", Fault("hold"))
        reconciling = asyncio.create_task(sandbox.reconcile(timeout=None))
        await until(lambda: gate.reached)
        detach = asyncio.create_task(sandbox.detach("a"))
        await reached(vm, "device-gone")
        gate.let_go()
        assert [(one.found, one.outcome) for one in await reconciling] == [(Found.ATTACH, Outcome.PENDING)]
        assert facts(sandbox)["a"][0] == Phase.DETACHING
        vm.let_go("device-gone")
        await detach
        nothing_left(sandbox)
        assert not vm.devices and not vm.backends and rows(store) == {}


async def test_a_doubt_that_arises_while_the_machine_is_being_asked(make_image: MakeImage) -> None:
    vm = SlowMachine()
    async with Sandbox("one", vm, store=None) as sandbox:
        await sandbox.attach(make_image("z"), device_id="z")
        gate = vm.answer = Gate()
        reconciling = asyncio.create_task(sandbox.reconcile())
        await until(lambda: gate.reached)
        vm.fail("device-add", Fault("lose"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("a"), device_id="a")
        gate.let_go()
        assert await reconciling == []
        vm.answer, asked = None, vm.asked
        await sandbox.attach(make_image("b"), device_id="b")
        assert vm.asked == asked + 1
        await until(lambda: facts(sandbox).keys() == {"z", "b"})
        assert vm.devices.keys() == {"drive-z", "drive-b"}


def test_the_slot_of_an_attach_is_known_after_its_process_died(make_image: MakeImage, tmp_path: Path) -> None:
    machine, path = tmp_path / "vm", tmp_path / "state.db"
    machine.touch()
    images = {name: make_image(name) for name in ("first", "a", "b", "c")}

    class Last(FileMachine):
        async def device_add(self, drive: BlockDrive) -> None:
            await super().device_add(drive)
            if drive.id == "drive-a":
                os.kill(os.getpid(), signal.SIGKILL)

    def victim() -> str:
        async def run() -> None:
            async with Sandbox("one", Last(machine), driver="virtio-blk", store=SqliteStore(path)) as sandbox:
                for name in ("first", "a"):
                    await sandbox.attach(images[name], device_id=name)

        asyncio.run(run())
        return "it was not killed"

    async def take_over(store: SqliteStore) -> None:
        vm = FileMachine(machine)
        vm.fail("device-del", Fault("refuse"))
        async with Sandbox("one", vm, driver="virtio-blk", store=store) as sandbox:
            assert [(one.device_id, one.outcome) for one in sandbox.recovered] == [("a", Outcome.FINISHED)]
            drives = {one.id: one.held for one in sandbox.devices if isinstance(one, BlockDevice)}
            assert {name: (drive.slot, drive.pci_path) for name, drive in drives.items()} == {"first": ("0", "02/00"), "a": ("1", "02/01")}
            assert drives["a"].guest_match
            assert (await sandbox.attach(images["b"])).held.slot == "2"
            await sandbox.detach("a")
            assert (await sandbox.attach(images["c"])).held.slot == "1"
        store.close()

    status, text = in_child(victim)
    assert status == -signal.SIGKILL, text
    asyncio.run(take_over(SqliteStore(path)))


async def test_what_is_remembered_for_late_callers_is_bounded(make_image: MakeImage, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 4
    monkeypatch.setattr(receiver, "LATE_MAX", bound)
    vm, image = MemoryHypervisor(), make_image("a")
    async with Sandbox("one", vm, store=None) as sandbox:
        for number in range(2 * bound):
            await sandbox.attach(image, device_id=f"{number}")
            vm.fail("device-gone", Fault("hold"))
            with pytest.raises(DetachPending):
                await sandbox.detach(f"{number}", timeout=0)
            vm.let_go("device-gone")
            await until(lambda: not sandbox.devices)
        for number in range(bound):
            with pytest.raises(UnknownDevice):
                await sandbox.detach(f"{number}")
        for number in range(bound, 2 * bound):
            await sandbox.detach(f"{number}")


# The store's file.


def test_many_processes_make_one_store(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from pyblock.stores.sqlite import SqliteStore
for line in sys.stdin:
    store = SqliteStore(line.strip())
    try:
        print(asyncio.run(store.sandboxes()), flush=True)
    except Exception as error:
        print(repr(error), flush=True)
    store.close()
"""
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said: set[str] = set()
    try:
        for number in range(60):
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{tmp_path / str(number)}\n")
            for process in processes:  # all at once
                assert process.stdin is not None
                process.stdin.flush()
            for process in processes:
                assert process.stdout is not None
                said.add(process.stdout.readline())
    finally:
        for process in processes:
            process.communicate()
    assert said == {"[]\n"}


def test_forked_while_another_thread_is_in_a_transaction(make_store: MakeStore) -> None:
    """The fork waits for its end: a child that began in the middle would have half of it, and the locks."""
    store, inside, leave, over = make_store(), threading.Event(), threading.Event(), threading.Event()

    def stay() -> list[Row]:
        inside.set()
        leave.wait(LATE)
        return []

    async def work() -> None:
        async with Sandbox("one", MemoryHypervisor(), store=store):
            await store.write("one", stay)
            await asyncio.to_thread(over.wait, LATE)

    def child() -> str:
        async def look() -> list[str]:
            return await store.sandboxes(asyncio.get_running_loop().time() + 10)

        return str(asyncio.run(look()))

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        assert inside.wait(LATE)
        with ThreadPoolExecutor(1) as pool:
            forked = pool.submit(in_child, child)
            leave.set()
            assert forked.result() == (0, "['one']")
    finally:
        leave.set()
        over.set()
        thread.join()


@pytest.mark.parametrize("name", ["removed", "replaced"])
async def test_the_database_is_not_the_one_that_was_opened(name: str, make_store: MakeStore, make_image: MakeImage, tmp_path: Path) -> None:
    store, vm = make_store(), MemoryHypervisor()
    free, more = make_image("free"), make_image("more")
    async with Sandbox("one", vm, store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        await sandbox.attach(more, device_id="more")
        await sandbox.attach(more)
        if name == "replaced":
            other = make_store(tmp_path / "other.db")
            await other.sandboxes()
            other.close()
            (tmp_path / "other.db").replace(store.path)
        else:
            for suffix in ("", "-wal", "-shm"):
                store.path.with_name(store.path.name + suffix).unlink()
        vm.journal.clear()
        before = facts(sandbox)
        doings: list[Callable[[], Awaitable[object]]] = [
            lambda: sandbox.attach(free),
            lambda: sandbox.detach(device),
            lambda: sandbox.attach(more),
            lambda: sandbox.detach("more"),
            store.sandboxes,
        ]
        for doing in doings:
            with pytest.raises(StoreError, match="removed or replaced"):
                await doing()
        assert vm.journal == [] and facts(sandbox) == before


def test_a_damaged_row_hides_its_own_sandbox_only(
    make_store: MakeStore, make_image: MakeImage, state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    store = make_store(state_dir / "state.db")

    async def prepare() -> None:
        for name in ("one", "two", "three", "wide"):
            (tmp_path / name).touch()
            capacity = 1 << 17 if name == "wide" else 1 << 16
            async with Sandbox(name, f"memory:{tmp_path / name}", store=store, capacity=capacity, driver="virtio-blk") as sandbox:
                if name == "wide":
                    sandbox.index.reserve_many(range(1 << 16))
                await sandbox.attach(make_image(f"{name}.img"), device_id=f"device-{name}")

    asyncio.run(prepare())

    def run(command: str) -> tuple[int, str, str]:
        program = [sys.executable, "-c", "from pyblock.cli import main; main()", command]
        done = subprocess.run(program, capture_output=True, text=True, timeout=2 * LATE, check=False)
        return done.returncode, done.stdout, done.stderr

    status, out, complaints = run("list")
    assert (status, complaints) == (0, "") and all(f"device-{name}" in out for name in ("one", "two", "three", "wide"))
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("UPDATE device SET state = x'7b' WHERE sandbox = 'two'")
        db.commit()
    (tmp_path / "three").write_bytes(b"")  # a machine that was started anew
    status, out, complaints = run("list")
    assert status == 1 and "pyblock: sandbox two:" in complaints and complaints.count("\n") == 1
    assert all(f"device-{name}" in out for name in ("one", "three", "wide")) and "device-two" not in out
    status, out, complaints = run("reconcile")
    assert status == 1 and "pyblock: sandbox two:" in complaints
    assert "device-three" in out and "device-one" not in out


async def test_a_count_that_cannot_be_written_is_not_counted(store: HeldStore, make_image: MakeImage) -> None:
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        fuse = sandbox.manager.obtain(DeviceInfo(dev_type="c", major=10, minor=229, id="fuse", options={"x": "caf\udce9"}))
        with pytest.raises(InvalidValue, match="fuse"):
            await sandbox.manager.attach("fuse", sandbox)
        assert fuse.attach_count == 0
        sandbox.manager.drop(fuse)
        await sandbox.attach(make_image("disk"), device_id="fuse")  # the refusal was the other's


async def test_a_number_that_came_to_nothing(make_store: MakeStore) -> None:
    """An owner's number is given to another when the transaction that took it failed; whoever dies with it seems not to live."""
    busy, dies, lives, last = (make_store() for _ in range(4))
    await busy.open_sandbox("s0", "")
    with pytest.raises(SandboxBusy):
        await dies.open_sandbox("s0", "")
    await dies.open_sandbox("s2", "")
    dies.close()
    await lives.open_sandbox("s3", "")
    await last.open_sandbox("s2", "")


def test_a_store_cut_off_in_its_last_page(tmp_path: Path, make_store: MakeStore, make_image: MakeImage) -> None:
    """The last page may be of the index that claims are found by."""
    path = tmp_path / "whole.db"

    async def fill() -> None:
        async with Sandbox("one", MemoryHypervisor(), store=make_store(path)) as sandbox:
            await sandbox.attach_many([make_image(f"image{number}") for number in range(4)])

    asyncio.run(fill())
    make_store(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    for missing in (1, 10, 26, 100, 4095, len(whole) - 1):
        cut = tmp_path / f"cut-{missing}.db"
        cut.write_bytes(whole[:-missing])
        with pytest.raises(InvalidState) as caught:
            asyncio.run(make_store(cut).sandboxes())
        assert "\n" not in str(caught.value)
        assert cut.read_bytes() == whole[:-missing]


def test_a_child_that_opens_the_store_of_its_parent(tmp_path: Path, make_store: MakeStore, make_image: MakeImage) -> None:
    """The parent closes it; what the child writes then is seen by others."""
    store = make_store()
    image = make_image("image")
    asyncio.run(store.sandboxes())
    to_child, from_parent = os.pipe()
    from_child, to_parent = os.pipe()
    from_third, to_third = os.pipe()

    def child() -> str:
        async def use() -> None:
            sandbox = await Sandbox("child", MemoryHypervisor(), store=store).__aenter__()
            os.write(to_parent, b".")
            await asyncio.to_thread(os.read, to_child, 1)  # the parent has closed
            await sandbox.attach(image)
            os.write(to_third, b".")
            await asyncio.to_thread(os.read, to_child, 1)

        asyncio.run(use())
        return ""

    def others() -> str:
        async def look() -> str:
            async with Sandbox("other", MemoryHypervisor(), store=SqliteStore(store.path)) as sandbox:
                try:
                    await sandbox.attach(image)
                except ImageInUse as error:
                    return str(error)
            return "nobody has it"

        os.read(from_third, 1)
        return asyncio.run(look())

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(in_child, child)
        os.read(from_child, 1)
        store.close()
        os.write(from_parent, b".")
        status, text = in_child(others)
        os.write(from_parent, b".")
        assert running.result()[0] == 0
    for end in (to_child, from_parent, from_child, to_parent, from_third, to_third):
        os.close(end)
    assert status == 0 and "'child'" in text
