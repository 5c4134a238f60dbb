"""What a sandbox says of what happened, by itself: bounded, in order, never ahead of the store, and
nothing that a listener does or leaves undone is felt by anybody else."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import weakref

import pytest

from pyblock import AttachPending, DeviceInfo, Phase, StoreError
from pyblock.life.device import BlockDevice
from pyblock.life.table import LIFE, Event
from pyblock.life.voice import OUTCOMES, WAITING_MAX, EventKind, Events, SandboxEvent, Voice

pytestmark = pytest.mark.anyio


def drain(events: Events) -> list[SandboxEvent]:
    return list(iter(events.take, None))


def kinds(events: Events) -> list[str]:
    return [event.kind.value for event in drain(events)]


def device(name: str = "d1") -> BlockDevice:
    return BlockDevice(name, DeviceInfo(f"/images/{name}"))


def move(
    voice: Voice,
    device: BlockDevice,
    event: Event,
    error: Exception | None = None,
    *,
    stored: bool = False,
) -> None:
    was, device.phase = device.phase, LIFE[device.phase, event]
    voice.moved(device, was, event, error, stored=stored)


def test_every_change_of_phase_is_an_outcome_or_a_beginning() -> None:
    assert {pair for pair in LIFE if pair[1] not in (Event.ATTACH, Event.DETACH)} == OUTCOMES.keys()
    machine = {EventKind.VMM_LOST, EventKind.VMM_BACK, EventKind.OWNER_CHANGED}
    assert {*OUTCOMES.values(), *machine} == {*EventKind}


async def test_a_listener_hears_in_order_what_came_after_him() -> None:
    voice, disk = Voice("s1"), device()
    move(voice, disk, Event.ATTACH)
    first = voice.events()
    move(voice, disk, Event.PLUGGED)
    second = voice.events()
    move(voice, disk, Event.DETACH)
    move(voice, disk, Event.UNKNOWN, AttachPending("text"))
    move(voice, disk, Event.GONE)
    assert kinds(first) == ["attached", "pending", "detached-late"]
    assert kinds(second) == ["pending", "detached-late"]


async def test_what_an_event_knows() -> None:
    voice, disk = Voice("s1"), device()
    events = voice.events()
    error = StoreError("full\x1b[2J", sandbox="s1")
    error.__cause__ = OSError(28, "no space")
    move(voice, disk, Event.ATTACH)
    move(voice, disk, Event.UNDONE, error)
    [event] = drain(events)
    assert (event.sandbox, event.device, event.path, event.drive) == (
        "s1",
        "d1",
        "/images/d1",
        None,
    )
    assert event.seconds is not None and event.seconds >= 0
    assert type(event.error) is StoreError and event.error is not error
    assert (
        event.error.__cause__ is None
        and event.error.__context__ is None
        and event.error.__traceback__ is None
    )
    body = json.loads(json.dumps(event.to_dict()))
    assert (
        body["kind"] == "refused"
        and body["error"]["code"] == "store-error"
        and "\x1b" not in body["error"]["message"]
    )
    with pytest.raises(AttributeError):
        event.kind = EventKind.LOST  # type: ignore[misc]


async def test_nothing_is_said_before_the_store_has_it() -> None:
    voice, one, two = Voice("s1"), device("d1"), device("d2")
    events = voice.events()
    for disk in (one, two):
        move(voice, disk, Event.ATTACH)
        move(voice, disk, Event.PLUGGED, stored=True)
    move(voice, one, Event.DETACH)
    move(voice, one, Event.GONE, stored=True)
    assert drain(events) == []
    voice.written(["d2"])
    assert [(event.device, event.kind.value) for event in drain(events)] == [("d2", "attached")]
    voice.written(["d1", "d2"])
    assert kinds(events) == ["attached", "detached"]
    voice.written(["d1", "d2"])
    assert drain(events) == []


async def test_an_attach_that_could_not_be_written_down_was_never_attached() -> None:
    voice, disk = Voice("s1"), device()
    events = voice.events()
    move(voice, disk, Event.ATTACH)
    move(voice, disk, Event.PLUGGED, stored=True)
    move(voice, disk, Event.UNKNOWN, StoreError("full"))
    assert kinds(events) == ["pending"]
    voice.written(["d1"])
    assert drain(events) == []


async def test_what_waits_for_the_store_is_not_overtaken() -> None:
    voice, disk = Voice("s1"), device()
    events = voice.events()
    disk.phase = Phase.DETACH_PENDING
    move(voice, disk, Event.GONE, stored=True)
    move(voice, disk, Event.ATTACH)
    move(voice, disk, Event.UNKNOWN)  # of the same ID, and nothing to be written for it
    assert drain(events) == []
    voice.written(["d1"])
    assert kinds(events) == ["detached-late", "pending"]


async def test_a_slow_listener_loses_the_oldest_and_is_told() -> None:
    voice = Voice("s1")
    slow, quick = voice.events(), voice.events()
    for number in range(WAITING_MAX + 3):
        voice.owned(str(number))
        assert quick.take() is not None
    assert len(slow._waiting) == WAITING_MAX
    first, second = slow.take(), slow.take()
    assert first is not None and second is not None
    assert (first.owner, first.lost_events, second.owner, second.lost_events) == ("3", 3, "4", 0)
    slow.put_back(second)
    slow.put_back(first)
    again = slow.take()
    assert again is not None and (again.owner, again.lost_events) == ("3", 3)


async def test_listeners_end_with_the_sandbox() -> None:
    voice = Voice("s1")
    late, waiting = voice.events(), voice.events()
    task = asyncio.ensure_future(anext(waiting))
    await asyncio.sleep(0)
    voice.owned("a")
    voice.close()
    assert (await task).owner == "a"
    assert [event.owner async for event in waiting] == []
    assert [event.owner async for event in late] == ["a"]
    voice.owned("b")
    assert await late.next() is None


async def test_who_waits_when_it_closes_is_woken() -> None:
    voice = Voice("s1")
    events = voice.events()
    tasks = [asyncio.ensure_future(events.next()) for _ in range(3)]
    await asyncio.sleep(0)
    voice.close()
    assert await asyncio.gather(*tasks) == [None, None, None]


async def test_one_listener_may_leave_another_goes_on() -> None:
    voice = Voice("s1")
    leaving, staying = voice.events(), voice.events()
    leaving.close()
    voice.owned("a")
    assert drain(leaving) == [] and [event.owner for event in drain(staying)] == ["a"]


async def test_a_listener_that_is_dropped_is_not_held() -> None:
    voice = Voice("s1")
    kept, dropped = voice.events(), weakref.ref(voice.events())
    gc.collect()
    assert dropped() is None and len(voice.listeners) == 1
    del kept
    gc.collect()
    assert voice.listeners == []


async def test_two_tasks_may_share_a_listener() -> None:
    voice = Voice("s1")
    events = voice.events()
    tasks = [asyncio.ensure_future(events.next()) for _ in range(2)]
    await asyncio.sleep(0)
    voice.owned("a")
    voice.owned("b")
    found = await asyncio.gather(*tasks)
    assert sorted(event.owner or "" for event in found if event is not None) == ["a", "b"]


async def test_a_cancelled_wait_loses_nothing() -> None:
    voice = Voice("s1")
    events = voice.events()
    task = asyncio.ensure_future(events.next())
    await asyncio.sleep(0)
    voice.owned("a")
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() and [event.owner for event in drain(events)] == ["a"]


async def test_what_on_event_raises_is_logged_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard = []

    def listener(event: SandboxEvent) -> None:
        heard.append(event.owner)
        raise ZeroDivisionError("of the listener")

    voice = Voice("s1", listener)
    events = voice.events()
    voice.owned("a")
    voice.owned("b")
    assert heard == ["a", "b"] == [event.owner for event in drain(events)]
    assert "of the listener" in caplog.text and {record.name for record in caplog.records} == {
        "pyblock.life.voice"
    }


async def test_the_log_has_the_facts_as_fields(caplog: pytest.LogCaptureFixture) -> None:
    voice, disk = Voice("s1"), device()
    caplog.set_level(logging.INFO, logger="pyblock")
    move(voice, disk, Event.ATTACH)
    move(voice, disk, Event.UNDONE, StoreError("full\x1b[2J"))
    [record] = caplog.records
    fields = vars(record)
    assert (record.name, record.levelname) == ("pyblock.life.voice", "INFO")
    assert (fields["sandbox"], fields["device"], fields["drive"], fields["event"]) == (
        "s1",
        "d1",
        None,
        "refused",
    )
    assert fields["seconds"] >= 0 and "\x1b" not in record.getMessage()


async def test_the_vmm_is_lost_once_and_back_once() -> None:
    voice = Voice("s1")
    events = voice.events()
    voice.vmm_back()
    for _ in range(2):
        voice.vmm_lost(StoreError("text"))
    for _ in range(2):
        voice.vmm_back()
    assert kinds(events) == ["vmm-lost", "vmm-back"]
