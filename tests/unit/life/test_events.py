"""Each event is provoked for real, through the doors, on a machine in memory; and whenever one
comes, the store says no less than it does. tests/real/test_events_qemu.py has the same on QEMU."""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from support.held_store import HeldStore, ended, locked, query, reached, rows
from support.snapshot import MakeImage, MakeStore
from support.turns import LATE, SOON, at_rest, until

from pyblock import (
    AttachPending,
    DetachPending,
    EventKind,
    Events,
    ImageInUse,
    Sandbox,
    SandboxEvent,
    StoreError,
    TransportError,
    VmmRefused,
    blocking,
)
from pyblock.life.voice import WAITING_MAX, Voice
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

# What the store has to say of a device when an event of it comes.
SAYS: dict[str, Callable[[str], bool]] = {
    "attached": lambda phase: phase == "attached",
    "detached": lambda phase: phase == "",
    "detached-late": lambda phase: phase == "",
    "pending": lambda phase: phase in ("attach-pending", "detach-pending"),
    "refused": lambda phase: phase in ("attached", ""),
    "lost": lambda phase: phase == "",
}


class Witness:
    """An `on_event` that compares what it is told with what the store says at that moment."""

    def __init__(self, store: SqliteStore | None) -> None:
        self.events: list[SandboxEvent] = []
        self.wrong: list[str] = []
        self._store = store

    def __call__(self, event: SandboxEvent) -> None:
        self.events.append(event)
        if self._store is not None and event.device is not None:
            phase = rows(self._store).get(event.device, ("", 0))[0]
            if not SAYS[event.kind.value](phase):
                self.wrong.append(
                    f"{event.kind} of {event.device}, which is {phase or 'not there'} in the store"
                )

    def of(self, device: str) -> list[str]:
        return [event.kind.value for event in self.events if event.device == device]

    def kinds(self) -> list[str]:
        return [event.kind.value for event in self.events]

    def last(self, kind: str) -> SandboxEvent:
        return next(event for event in reversed(self.events) if event.kind.value == kind)


@pytest.fixture(params=["store", "no store"])
def witness(request: pytest.FixtureRequest, make_store: MakeStore) -> Iterator[Witness]:
    witness = Witness(make_store() if request.param == "store" else None)
    yield witness
    assert witness.wrong == []


def drain(events: Events) -> list[str]:
    return [event.kind.value for event in iter(events.take, None)]


def sandbox_of(witness: Witness, vm: MemoryHypervisor, **more: Any) -> Sandbox:
    return Sandbox("one", vm, store=witness._store, on_event=witness, **more)


async def test_attached_and_detached(witness: Witness, make_image: MakeImage) -> None:
    image = make_image("a")
    async with sandbox_of(witness, MemoryHypervisor(), driver="virtio-blk") as sandbox:
        events = sandbox.events()
        device = await sandbox.attach(image, device_id="a")
        drive = device.held
        await sandbox.attach(image)
        await sandbox.detach(device)
        assert drain(events) == ["attached"]  # further attaches are only counted
        await sandbox.detach(device)
        assert drain(events) == ["detached"]
    for kind in ("attached", "detached"):
        event = witness.last(kind)
        told = (event.sandbox, event.device, event.drive, event.path, event.index, event.error)
        assert told == ("one", "a", drive.id, str(image), drive.index, None)
        assert event.seconds is not None and 0 < event.seconds < LATE


async def test_refused(witness: Witness, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with sandbox_of(witness, vm) as sandbox:
        vm.fail("device-add", Fault("refuse"))
        with pytest.raises(VmmRefused):
            await sandbox.attach(make_image("a"), device_id="a")
        event = witness.last("refused")
        assert isinstance(event.error, VmmRefused) and event.error.step == "device-add"
        assert (event.error.sandbox, event.error.device, event.drive) == ("one", "a", "drive-a")
        device = await sandbox.attach(make_image("b"), device_id="b")
        vm.fail("device-del", Fault("refuse"))
        with pytest.raises(VmmRefused):
            await sandbox.detach(device)
    assert witness.of("a") == ["refused"] and witness.of("b") == ["attached", "refused"]


async def test_refused_because_of_a_claim(make_store: MakeStore, make_image: MakeImage) -> None:
    witness = Witness(make_store())
    image = make_image("a")
    async with Sandbox("other", MemoryHypervisor(), store=make_store()) as other:
        await other.attach(image, device_id="theirs")
        async with sandbox_of(witness, MemoryHypervisor()) as sandbox:
            with pytest.raises(ImageInUse):
                await sandbox.attach(image, device_id="a")
        error = witness.last("refused").error
        assert (
            isinstance(error, ImageInUse)
            and error.holder == "other"
            and witness.of("a") == ["refused"]
        )
    assert witness.wrong == []


async def test_an_attach_that_is_pending_and_undone_late(
    witness: Witness, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    async with sandbox_of(witness, vm) as sandbox:
        vm.fail("device-add", Fault("hold"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("a"), device_id="a", timeout=SOON)
        assert witness.of("a") == ["pending"]
        vm.let_go("device-add")
        await until(lambda: witness.of("a") == ["pending", "detached-late"])
        first, late = (event.seconds for event in witness.events if event.device == "a")
        # since the attach began
        assert first is not None and late is not None and 0 < first <= late


async def test_a_detach_that_is_pending_and_done_late(
    witness: Witness, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    async with sandbox_of(witness, vm) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        vm.fail("device-gone", Fault("hold"))
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=SOON)
        assert witness.of("a") == ["attached", "pending"]
        vm.let_go("device-gone")
        await until(lambda: witness.of("a") == ["attached", "pending", "detached-late"])


async def test_a_detach_that_is_resumed(witness: Witness, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with sandbox_of(witness, vm) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        vm.fail("device-gone", Fault("hold"))
        for _ in range(2):
            with pytest.raises(DetachPending):
                await sandbox.detach(device, timeout=SOON)
        again = asyncio.create_task(sandbox.detach(device))
        await at_rest()
        vm.let_go("device-gone")
        await again
        assert witness.of("a") == ["attached", "pending", "pending", "detached"]


async def test_lost(witness: Witness, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with sandbox_of(witness, vm) as sandbox:
        await sandbox.attach(make_image("a"), device_id="a")
        vm.devices.clear()
        vm.backends.clear()
        vm._places.clear()
        await sandbox.reconcile()
    assert witness.of("a") == ["attached", "lost"]


async def test_the_vmm_is_lost_and_back(witness: Witness, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with sandbox_of(witness, vm) as sandbox:
        await sandbox.attach(make_image("a"), device_id="a")
        vm.dead = True
        image = make_image("b")
        for _ in range(2):
            with pytest.raises(TransportError):
                await sandbox.attach(image, device_id="b")
        vm.dead = False
        await sandbox.reconcile()
        await sandbox.reconcile()
    machine = [
        event for event in witness.events if event.kind in (EventKind.VMM_LOST, EventKind.VMM_BACK)
    ]
    assert [event.kind.value for event in machine] == ["vmm-lost", "vmm-back"]
    assert isinstance(machine[0].error, TransportError) and machine[1].error is None
    assert witness.of("b") == ["refused"]  # the second was not begun: the machine was asked first


async def test_a_connection_that_breaks_in_the_middle(
    witness: Witness, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    async with sandbox_of(witness, vm) as sandbox:
        vm.fail("device-add", Fault("lose"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("a"), device_id="a")
        assert witness.kinds()[-2:] == ["vmm-lost", "pending"]
        error = witness.last("pending").error
        assert isinstance(error, TransportError) and error.sandbox == "one"
        await sandbox.attach(make_image("b"), device_id="b")
        await until(lambda: witness.of("a") == ["pending", "detached-late"])
        assert witness.kinds().count("vmm-back") == 1


async def test_owners(make_store: MakeStore, make_image: MakeImage) -> None:
    store = make_store()
    witness = Witness(store)
    async with sandbox_of(witness, MemoryHypervisor()) as sandbox:
        [[owner]] = query(store, "SELECT owner_text FROM sandbox")
        assert owner.startswith("process ") and witness.last("owner-changed").owner == owner
        await sandbox.attach(make_image("a"), device_id="a")
    assert [event.owner for event in witness.events if event.kind is EventKind.OWNER_CHANGED] == [
        owner,
        "",
    ]
    assert witness.of("a") == ["attached"] and witness.wrong == []


async def test_a_sandbox_that_is_taken_away_says_so_once(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    store = make_store()
    witness = Witness(store)
    async with sandbox_of(witness, MemoryHypervisor()) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        with closing(sqlite3.connect(store.path)) as db, db:
            db.execute("UPDATE sandbox SET owner = NULL, owner_text = ''")
        for _ in range(2):
            with pytest.raises(StoreError, match="not this process's any more") as caught:
                await sandbox.detach(device)
        assert (caught.value.sandbox, caught.value.owner, caught.value.path) == (
            "one",
            "",
            str(store.path),
        )
        assert [event.owner for event in witness.events if event.kind is EventKind.OWNER_CHANGED][
            1:
        ] == [""]
    # that it is kept is not written down, and nobody is told
    assert witness.of("a") == ["attached"]


async def test_what_opening_finds_is_heard_by_who_listens_before(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        await sandbox.attach(make_image("a"), device_id="a")
    vm.devices.clear()
    vm.backends.clear()
    again = Sandbox("one", vm, store=make_store())
    events = again.events()
    async with again:
        assert drain(events) == ["owner-changed", "lost"]
    assert [event.kind.value async for event in events] == ["owner-changed"] and events.ended


async def test_forgotten_disks_are_lost(make_store: MakeStore, make_image: MakeImage) -> None:
    vm, witness = MemoryHypervisor(), Witness(make_store())
    async with sandbox_of(witness, vm) as sandbox:
        for name in "ab":
            await sandbox.attach(make_image(name), device_id=name)
        vm.dead = True
        assert await sandbox.forget() == ["a", "b"]
    assert witness.of("a") == witness.of("b") == ["attached", "lost"] and witness.wrong == []


async def test_nothing_is_said_while_the_store_is_being_written(
    store: HeldStore, make_image: MakeImage
) -> None:
    witness = Witness(store)
    async with Sandbox("one", MemoryHypervisor(), store=store, on_event=witness) as sandbox:
        store.hold().let_go()
        gate = store.hold()
        attach = asyncio.create_task(sandbox.attach(make_image("a"), device_id="a"))
        await until(lambda: gate.reached)
        await at_rest()
        assert witness.of("a") == []
        gate.let_go()
        await attach
        assert witness.of("a") == ["attached"]
        store.hold().let_go()
        gate = store.hold()
        detach = asyncio.create_task(sandbox.detach("a"))
        await until(lambda: gate.reached)
        await at_rest()
        assert witness.of("a") == ["attached"]
        gate.let_go()
        await detach
        assert witness.of("a") == ["attached", "detached"]
    assert witness.wrong == []


async def test_a_detach_is_said_when_its_row_has_gone_at_last(
    store: HeldStore, make_image: MakeImage
) -> None:
    """The VMM has confirmed it and the call has returned, but the store is locked by another
    process."""
    witness = Witness(store)
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store, on_event=witness) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        vm.fail("device-gone", Fault("hold"))
        detach = asyncio.create_task(sandbox.detach(device))
        await reached(vm, "device-gone")
        with locked(store):
            vm.let_go("device-gone")
            await detach
            assert witness.of("a") == ["attached"]
        await until(lambda: witness.of("a") == ["attached", "detached"])
    assert witness.wrong == []


async def test_an_attach_that_could_not_be_written_down_is_never_said(
    store: HeldStore, make_image: MakeImage
) -> None:
    witness = Witness(store)
    async with Sandbox("one", MemoryHypervisor(), store=store, on_event=witness) as sandbox:
        store.hold().let_go()
        store.hold(fails=True).let_go()
        with pytest.raises(StoreError):
            await sandbox.attach(make_image("a"), device_id="a")
        assert witness.of("a") == ["pending", "detached-late"]
        assert isinstance(witness.last("pending").error, StoreError)
    assert witness.wrong == []


async def test_a_crowd_is_told_in_order_for_each(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    witness = Witness(make_store())
    async with sandbox_of(witness, MemoryHypervisor()) as sandbox:
        events = sandbox.events()

        async def cycles(name: str) -> None:
            image = make_image(name)
            for _ in range(5):
                await sandbox.detach(await sandbox.attach(image, device_id=name))

        await asyncio.gather(*(cycles(f"d{number}") for number in range(20)))
        heard = [event for event in iter(events.take, None) if event.device is not None]
    for number in range(20):
        assert witness.of(f"d{number}") == ["attached", "detached"] * 5
    assert heard == [event for event in witness.events if event.device is not None]
    assert witness.wrong == []


async def test_a_listener_that_never_listens_holds_nothing_up(make_image: MakeImage) -> None:
    image = make_image("a")
    async with Sandbox("one", MemoryHypervisor(), store=None) as sandbox:
        lazy = sandbox.events()
        for _ in range(WAITING_MAX):
            await sandbox.detach(await sandbox.attach(image))
        first = lazy.take()
        assert first is not None and first.lost_events == WAITING_MAX
        assert len(drain(lazy)) == WAITING_MAX - 1


@pytest.mark.parametrize("kind", [ZeroDivisionError, asyncio.CancelledError])
async def test_what_on_event_raises_changes_nothing(
    kind: type[BaseException], make_image: MakeImage, caplog: pytest.LogCaptureFixture
) -> None:
    def listener(event: SandboxEvent) -> None:
        raise kind(event.kind)

    async with Sandbox("one", MemoryHypervisor(), store=None, on_event=listener) as sandbox:
        await sandbox.detach(await sandbox.attach(make_image("a")))
        assert sandbox.devices == []
    assert caplog.text.count("on_event failed") == 2


async def test_nothing_is_done_when_nobody_listens(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*_: object, **__: object) -> None:
        pytest.fail("nobody listens")

    monkeypatch.setattr(Voice, "moved", said)
    async with Sandbox("one", MemoryHypervisor(), store=None) as sandbox:
        await sandbox.detach(await sandbox.attach(make_image("a")))


async def test_a_sandbox_that_is_dropped_ends_its_listeners() -> None:
    sandbox = Sandbox("one", MemoryHypervisor(), store=None)
    await sandbox.__aenter__()
    waiting = asyncio.create_task(sandbox.events().next())
    await at_rest()
    del sandbox
    await ended(waiting)
    assert waiting.result() is None


async def test_the_log_has_outcomes_and_steps_with_fields(
    make_store: MakeStore, make_image: MakeImage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="pyblock")
    async with Sandbox("one", MemoryHypervisor(), store=make_store()) as sandbox:
        await sandbox.detach(await sandbox.attach(make_image("a"), device_id="a"))
    outcomes = [vars(record) for record in caplog.records if record.levelname == "INFO"]
    assert [fields["event"] for fields in outcomes if fields["device"] == "a"] == [
        "attached",
        "detached",
    ]
    steps = [
        vars(record)
        for record in caplog.records
        if record.levelname == "DEBUG" and hasattr(record, "step")
    ]
    assert all(fields["sandbox"] == "one" and fields["seconds"] >= 0 for fields in steps)
    asked = [fields for fields in steps if fields["name"] == "pyblock.vmm.base"]
    assert all((fields["device"], fields["drive"]) == ("a", "drive-a") for fields in asked)
    assert [fields["step"] for fields in asked] == [
        "backend-add", "device-add", "asking for the removal", "waiting for the removal",
        "removing what is left",
    ]  # fmt: skip
    written = [fields for fields in steps if fields["step"] == "write"]
    assert len(written) == 4 and all(fields["devices"] == ["a"] for fields in written)


def test_the_blocking_door_says_the_same(make_image: MakeImage) -> None:
    heard: list[str] = []
    listener = threading.Thread(target=lambda: heard.extend(event.kind.value for event in events))
    with blocking.Sandbox("one", MemoryHypervisor(), store=None) as sandbox:
        events = sandbox.events()
        listener.start()
        sandbox.detach(sandbox.attach(make_image("a")))
    listener.join(LATE)
    assert not listener.is_alive() and heard == ["attached", "detached"]


def test_events_that_wait_are_had_while_another_thread_closes(make_image: MakeImage) -> None:
    closing, go_on = threading.Event(), threading.Event()

    class Slow(MemoryHypervisor):
        async def close(self) -> None:
            closing.set()
            await asyncio.to_thread(go_on.wait, LATE)

    sandbox = blocking.Sandbox("one", Slow(), store=None).open()
    events = sandbox.events()
    sandbox.attach(make_image("a"))
    closer = threading.Thread(target=sandbox.close)
    closer.start()
    assert closing.wait(LATE)
    heard: list[str] = []
    listener = threading.Thread(target=lambda: heard.extend(event.kind.value for event in events))
    listener.start()
    go_on.set()
    listener.join(LATE)
    closer.join(LATE)
    assert not listener.is_alive() and heard == ["attached"]
    assert events.next() is None


def test_a_listener_that_is_interrupted_at_the_blocking_door_loses_nothing() -> None:
    with blocking.Sandbox("one", MemoryHypervisor(), store=None) as sandbox:
        events = sandbox.events()
        timer = threading.Timer(
            SOON, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
        )
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            next(events)
        timer.join()
        sandbox._sandbox._machine.voice.owned("somebody")
        event = next(events)
        assert event.owner == "somebody"
        events._events.put_back(event)
        events.close()
        assert [one.owner for one in events] == ["somebody"]


def test_the_blocking_door_calls_on_event(make_image: MakeImage) -> None:
    heard: list[tuple[str, str]] = []

    def listener(event: SandboxEvent) -> None:
        heard.append((event.kind.value, threading.current_thread().name))

    with blocking.Sandbox("one", MemoryHypervisor(), store=None, on_event=listener) as sandbox:
        left = sandbox.events()
        sandbox.detach(sandbox.attach(make_image("a")))
        assert [kind for kind, _ in heard] == ["attached", "detached"]
        assert {name for _, name in heard} != {threading.current_thread().name}
    # what waits may be taken after the end
    assert [event.kind.value for event in left] == ["attached", "detached"]
