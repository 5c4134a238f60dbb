"""What gets in each other's way when a store is written meanwhile: each case once left a row, a
claim or a disk that contradicted the rest.

A write is held back where it would wait for another process, so that what happens meanwhile happens
every time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.children import in_child
from support.held_store import (
    Gate,
    HeldStore,
    SlowMachine,
    ended,
    facts,
    kept_only,
    locked,
    nothing_left,
    query,
    reached,
    rows,
    saved_with,
)
from support.snapshot import MakeImage, MakeStore
from support.turns import LATE, SOON, until

from pyblock import (
    AttachPending,
    BlockDevice,
    CallerError,
    DetachPending,
    ImageInUse,
    InvalidImage,
    InvalidValue,
    Sandbox,
    SandboxClosed,
    StoreBusy,
    StoreError,
    blocking,
)
from pyblock.disk.drivers import SD
from pyblock.disk.model import BlockDrive, DeviceInfo
from pyblock.kata.schema import decode
from pyblock.life import ledger, machine
from pyblock.life.recovery import Found, Outcome
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.base import FoundDisk, Inventory
from pyblock.vmm.memory.file import FileMachine
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


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
    """Whoever was told "nothing was changed" finds that so after a restart, too; a count that was
    written along has been changed."""
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        if name == "one detach of two":
            await sandbox.attach(device.info.path)
        before = rows(store)
        gate = store.hold(fails=True)
        change = asyncio.ensure_future(CHANGES[name](sandbox, device))
        await until(lambda: gate.reached)
        await sandbox.attach(make_image("b"), device_id="b")
        along = rows(store)
        assert along["a"] != before["a"]
        if note_fails and name == "last detach":
            store.hold(fails=True).let_go()
        gate.let_go()
        if name == "last detach":  # what is written is that it is to go, and it was not asked to
            with pytest.raises(StoreBusy):
                await change
            after = before["a"]
        else:
            await change
            after = along["a"]
            assert rows(store)["a"] == after
        await sandbox.attach(make_image("c"), device_id="c")
        assert (
            rows(store)
            == facts(sandbox)
            == {"a": after, "b": ("attached", 1), "c": ("attached", 1)}
        )


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


async def test_the_guest_is_asked_when_the_intent_is_written_not_before(
    store: HeldStore, make_image: MakeImage
) -> None:
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
async def test_the_store_is_free_in_the_moment_of_the_deadline(
    attaches: bool, store: HeldStore, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        vm.journal.clear()
        vm.fail("backend-add", Fault("hold"))
        vm.fail("device-gone", Fault("hold"))
        gate = store.hold()
        b = make_image("b")
        work: Awaitable[Any] = (
            sandbox.attach(b, timeout=SOON) if attaches else sandbox.detach(device, timeout=SOON)
        )
        task = asyncio.ensure_future(work)
        await until(lambda: gate.reached)
        late = asyncio.get_running_loop().time() + SOON  # its own deadline began before
        await until(lambda: asyncio.get_running_loop().time() > late)
        gate.let_go()
        await ended(task)
        with pytest.raises(StoreBusy):
            task.result()
        assert vm.journal == []
        assert rows(store) == facts(sandbox) == {"a": ("attached", 1)}
        vm.let_go("backend-add")
        vm.let_go("device-gone")


async def test_a_row_that_cannot_be_written_is_its_own_devices_trouble(
    store: HeldStore, make_image: MakeImage
) -> None:
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
    async with (
        Sandbox("other", MemoryHypervisor(), store=store) as other,
        Sandbox("one", vm := MemoryHypervisor(), store=store) as sandbox,
    ):
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


async def test_a_load_that_fails_keeps_what_an_earlier_one_kept(
    store: HeldStore, make_image: MakeImage
) -> None:
    image = make_image("a")
    state = await saved_with(image)
    sandbox_row = "SELECT state FROM sandbox WHERE id = 'one'"
    async with (
        Sandbox("other", MemoryHypervisor(), store=store) as other,
        Sandbox("one", MemoryHypervisor(), store=store) as sandbox,
    ):
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


async def test_a_load_that_fails_gives_back_its_own_indexes_only(
    store: HeldStore, make_image: MakeImage
) -> None:
    """Not those of an earlier load, nor those of the machine's own disks."""
    image, more = make_image("a"), make_image("b")
    state = await saved_with(image)
    vm = SlowMachine()
    vm._existing = (FoundDisk("boot", SD, 0),)
    async with (
        Sandbox("other", MemoryHypervisor(), store=store) as other,
        Sandbox("one", vm, store=store) as sandbox,
    ):
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


async def test_a_load_that_close_overtakes_claims_nothing(
    store: HeldStore, make_image: MakeImage
) -> None:
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


def test_killed_when_a_load_is_refused(
    make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    """A refused load is one transaction: nobody has to tidy up after it."""
    images = [make_image(name) for name in ("first", "used", "last")]
    devices = [
        samples.device(number, samples.drive(number, File=str(image), SCSIAddr=f"0:{number}"))
        for number, image in enumerate(images)
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

        async def last_write(
            self: SqliteStore, *arguments: Any, **more: Any
        ) -> dict[str, ImageInUse]:
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
    """Count, users and row agree; as many detaches end the device, whose image is then free for
    other access."""
    await until(lambda: device.operation is None)
    assert device.attach_count == device.ref_count
    assert (
        rows(store)
        == facts(sandbox)
        == ({device.id: ("attached", device.attach_count)} if device.attach_count else {})
    )
    for _ in range(device.attach_count):
        await sandbox.detach(device)
    nothing_left(sandbox)
    assert rows(store) == {}
    await sandbox.detach(await sandbox.attach(image, read_only=True))


@pytest.mark.parametrize(
    ("attaches", "before"), [(True, 0), (True, 1), (True, 2), (False, 1), (False, 2)]
)
async def test_cancelled_at_each_turn(
    attaches: bool, before: int, make_store: MakeStore, make_image: MakeImage
) -> None:
    """A count belongs to whoever was told that it has one."""
    store, outcomes = make_store(), []
    for turn in range(200):
        image = make_image(f"{turn}")
        async with Sandbox(f"sb{turn}", MemoryHypervisor(), store=store) as sandbox:
            for _ in range(before):
                device: BlockDevice = await sandbox.attach(image, device_id="a")
            work: Awaitable[Any] = (
                sandbox.attach(image, device_id="a") if attaches else sandbox.detach(device)
            )
            task = asyncio.ensure_future(work)
            for _ in range(turn):
                await asyncio.sleep(0)
            in_time = task.cancel()
            await ended(task)
            await until(lambda: not sandbox._machine.running)
            if sandbox.devices:
                device = next(one for one in sandbox.devices if isinstance(one, BlockDevice))
            if sandbox.devices or before:
                # A detach goes on by itself once it has begun; an attach that nobody hears of is
                # undone.
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
    assert outcomes[0] and not outcomes[-1] and len(outcomes) > 2


@pytest.mark.parametrize("attaches", [True, False], ids=["attach", "detach"])
async def test_cancelled_at_each_turn_after_the_store_was_waited_for(
    attaches: bool, store: HeldStore, make_image: MakeImage
) -> None:
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
    monkeypatch.setattr(machine, "GRACE", SOON)
    monkeypatch.setattr(Sandbox.settle, "__defaults__", (SOON,))
    monkeypatch.setattr("pyblock.sandbox.GRACE", SOON)
    monkeypatch.setattr("pyblock.sandbox.CLOSE_TIME", 10 * SOON)  # the lock is held for all of it
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
        assert [(one.found, one.outcome) for one in sandbox.recovered] == [
            (Found.ATTACH, Outcome.REMOVED)
        ]
        nothing_left(sandbox)
        assert not vm.devices and not vm.backends and rows(store) == {}
        await sandbox.attach(image)


async def test_closed_while_the_machine_is_being_asked(
    store: HeldStore, make_store: MakeStore, make_image: MakeImage
) -> None:
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
    assert [(one.found, one.outcome) for one in reconciling.result()] == [
        (Found.ATTACH, Outcome.PENDING)
    ]
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


def test_interrupted_while_a_blocking_sandbox_is_being_opened(
    tmp_path: Path, make_store: MakeStore, make_image: MakeImage
) -> None:
    asking = threading.Event()

    class Silent(FileMachine):
        async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
            asking.set()
            await asyncio.Event().wait()
            return await super().inventory(ours)

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
    with (
        pytest.raises(KeyboardInterrupt),
        blocking.Sandbox("one", Silent(tmp_path / "vm"), store=store),
    ):
        pass
    thread.join()
    with blocking.Sandbox("one", f"memory:{tmp_path / 'vm'}", store=store) as sandbox:
        assert [device.id for device in sandbox.devices] == ["a"]


async def test_a_count_that_cannot_be_written_is_not_counted(
    store: HeldStore, make_image: MakeImage
) -> None:
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        fuse = sandbox.manager.obtain(
            DeviceInfo(dev_type="c", major=10, minor=229, id="fuse", options={"x": "caf\udce9"})
        )
        with pytest.raises(InvalidValue, match="fuse"):
            await sandbox.manager.attach("fuse", sandbox)
        assert fuse.attach_count == 0
        sandbox.manager.drop(fuse)
        await sandbox.attach(make_image("disk"), device_id="fuse")  # the refusal was the other's
