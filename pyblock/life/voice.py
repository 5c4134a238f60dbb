"""What a sandbox says of what happened to its disks: to whoever iterates over its events, to its
`on_event`, and to the log.

The one gate for phases (`Machine.move`) tells it of each change. What is an outcome is said when
the store has it: a listener never knows more than the store. Nobody who listens holds anything up:
what a slow one has not taken is dropped, the oldest first, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

import msgspec

from pyblock.errors import PyblockError, plain, shown
from pyblock.life.table import Event, Phase

if TYPE_CHECKING:
    from pyblock.life.device import BlockDevice

log = logging.getLogger(__name__)

WAITING_MAX = 1024  # events that wait for one listener


class EventKind(StrEnum):
    """What happened."""

    ATTACHED = "attached"
    DETACHED = "detached"
    # what was pending is gone: a detach is done, or an attach undone
    DETACHED_LATE = "detached-late"
    PENDING = "pending"  # the outcome is unknown, or its caller was told so: everything stays taken
    REFUSED = "refused"  # an attach or a detach came to nothing: all is as before
    LOST = "lost"  # the machine has it no more, and nobody asked for that
    VMM_LOST = "vmm-lost"  # the VMM does not answer, or the connection to it broke
    VMM_BACK = "vmm-back"  # it answers again
    OWNER_CHANGED = "owner-changed"  # the sandbox was opened, closed, or taken by another process


class SandboxEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a sandbox, or to a disk of it. What is not known, or does not
    apply, is None.

    :ivar kind: what.
    :ivar sandbox: the sandbox ID.
    :ivar time: when it was said, in seconds since 1970.
    :ivar device: the device ID.
    :ivar drive: the drive ID.
    :ivar path: of the image on the host.
    :ivar index: the block index.
    :ivar seconds: since the attach or detach began in this process.
    :ivar error: why it is pending, refused, or the VMM is lost; None where its caller went away, or
        had no more time.
    :ivar owner: who has the sandbox open from now on, in words; "" for nobody.
    :ivar lost_events: how many events this listener lost right before this one, since he took them
        too slowly.
    """

    kind: EventKind
    sandbox: str
    time: float
    device: str | None = None
    drive: str | None = None
    path: str | None = None
    index: int | None = None
    seconds: float | None = None
    error: PyblockError | None = None
    owner: str | None = None
    lost_events: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What of it is known, as JSON has it; texts of others are escaped as in
        PyblockError.to_dict."""
        # Its words are those of the errors' facts; one road to JSON is enough.
        told = {
            name: value
            for name in self.__struct_fields__
            if (value := getattr(self, name)) is not None
        }
        return {
            name: value.to_dict() if isinstance(value, PyblockError) else plain(value)
            for name, value in told.items()
        }


# What is said of a change of phase; of what is not here, nothing is.
OUTCOMES: dict[tuple[Phase, Event], EventKind] = {
    (Phase.ATTACHING, Event.PLUGGED): EventKind.ATTACHED,
    (Phase.ATTACHING, Event.UNDONE): EventKind.REFUSED,
    (Phase.ATTACHING, Event.UNKNOWN): EventKind.PENDING,
    (Phase.ATTACH_PENDING, Event.GONE): EventKind.DETACHED_LATE,
    (Phase.ATTACH_PENDING, Event.UNDONE): EventKind.DETACHED_LATE,
    (Phase.ATTACH_PENDING, Event.KEPT): EventKind.ATTACHED,
    (Phase.ATTACHED, Event.LOST): EventKind.LOST,
    (Phase.ATTACHED, Event.UNKNOWN): EventKind.PENDING,
    (Phase.DETACHING, Event.GONE): EventKind.DETACHED,
    (Phase.DETACHING, Event.KEPT): EventKind.REFUSED,
    (Phase.DETACHING, Event.UNKNOWN): EventKind.PENDING,
    (Phase.DETACH_PENDING, Event.GONE): EventKind.DETACHED_LATE,
    (Phase.DETACH_PENDING, Event.KEPT): EventKind.REFUSED,
}


class Events:
    """The events of a sandbox for one listener, from when it was made until the sandbox closes: an
    async iterator, which may be waited on in the event loop that the sandbox is open in.

    At most WAITING_MAX wait for their listener; beyond that the oldest are dropped, and the next
    one that he gets says how many. Closing it, or having no reference to it any more, ends it.

    :ivar ended: nothing comes any more; what waits may still be taken.
    """

    __slots__ = ("__weakref__", "_lost", "_waiting", "_wakers", "ended")

    def __init__(self) -> None:
        self._waiting: deque[SandboxEvent] = deque()
        self._lost = 0
        self.ended = False
        self._wakers: list[asyncio.Future[None]] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SandboxEvent:
        if (event := await self.next()) is None:
            raise StopAsyncIteration
        return event

    async def next(self) -> SandboxEvent | None:
        """The next event; None when the sandbox was closed, or this was."""
        while not self._waiting:
            if self.ended:
                return None
            waker = asyncio.get_running_loop().create_future()
            self._wakers.append(waker)
            try:
                await waker
            finally:
                self._wakers.remove(waker)
        return self.take()

    def take(self) -> SandboxEvent | None:
        """The next event, if one waits. Waits for nothing."""
        if not self._waiting:
            return None
        event, lost = self._waiting.popleft(), self._lost
        self._lost = 0
        return msgspec.structs.replace(event, lost_events=lost) if lost else event

    def put(self, event: SandboxEvent) -> None:
        """Has it be the last that waits."""
        if self.ended:
            return
        if len(self._waiting) >= WAITING_MAX:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        for waker in self._wakers:
            _wake(waker)

    def put_back(self, event: SandboxEvent) -> None:
        """Has it be the first that waits, for one who took it and could not go on."""
        self._lost += event.lost_events
        self._waiting.appendleft(msgspec.structs.replace(event, lost_events=0))

    def close(self) -> None:
        """Ends it, from whatever thread: what waits may still be taken, and nothing comes any
        more."""
        self.ended = True
        for waker in list(self._wakers):
            # its event loop is closed, and nobody waits there any more
            with contextlib.suppress(RuntimeError):
                waker.get_loop().call_soon_threadsafe(_wake, waker)


def _wake(waker: asyncio.Future[None]) -> None:
    if not waker.done():
        waker.set_result(None)


class Voice:
    """:param sandbox: the sandbox ID.
    :param on_event: is called with each event, in the event loop; what it raises is logged.

    :ivar listeners: without any, and without `on_event` and a log that takes INFO, nobody hears it:
        then it need be told nothing.
    :ivar unsaid: by device ID: what the store does not have yet.
    """

    __slots__ = ("_began", "_down", "_owner", "_sandbox", "listeners", "on_event", "unsaid")

    def __init__(
        self, sandbox: str, on_event: Callable[[SandboxEvent], None] | None = None
    ) -> None:
        self.listeners: list[weakref.ref[Events]] = []
        self.unsaid: dict[str, list[SandboxEvent]] = {}
        self._sandbox = sandbox
        self.on_event = on_event
        self._began: dict[str, float] = {}  # device ID to when its attach or detach began
        self._down = False
        self._owner = ""

    def events(self) -> Events:
        """A new listener's events."""
        events = Events()
        self.listeners.append(weakref.ref(events, self.listeners.remove))
        return events

    def close(self) -> None:
        """Ends all listening, from whatever thread. What the store never got is not said."""
        self.unsaid.clear()
        self._began.clear()
        listeners = list(self.listeners)
        self.listeners.clear()
        for listener in listeners:
            if (events := listener()) is not None:
                events.close()

    def moved(
        self,
        device: BlockDevice,
        was: Phase,
        event: Event,
        error: BaseException | None,
        *,
        stored: bool,
    ) -> None:
        """A device's phase has changed.

        :param error: why, where something failed.
        :param stored: there is a store. It has been told of what is begun before, and not yet of
            what came of it: that is said when `written` is told so.
        """
        if event in (Event.ATTACH, Event.DETACH):
            self._began[device.id] = time.monotonic()
            return
        kind = OUTCOMES[was, event]
        began = self._began.get(device.id)
        if kind is not EventKind.PENDING:
            self._began.pop(device.id, None)
        said = self._of(kind, device, None if began is None else time.monotonic() - began, error)
        unsaid = self.unsaid.pop(device.id, [])
        if kind is EventKind.PENDING and unsaid and unsaid[-1].kind is EventKind.ATTACHED:
            unsaid.pop()  # the store was not told, and is not going to be
        if unsaid or (stored and (kind is not EventKind.PENDING or device.said_count)):
            self.unsaid[device.id] = [*unsaid, said]
        else:  # a row that says no more than what is intended says that it is pending
            self._say(said)

    def written(self, device_ids: Iterable[str]) -> None:
        """The store has these devices as they are."""
        for device_id in device_ids:
            for event in self.unsaid.pop(device_id, ()):
                self._say(event)

    def given_up(self, devices: Iterable[BlockDevice]) -> None:
        """A machine that is no more had these, and the store has them no more."""
        for device in devices:
            self._say(self._of(EventKind.LOST, device))

    def vmm_lost(self, error: PyblockError) -> None:
        """The VMM could not be asked."""
        if not self._down:
            self._down = True
            self._say(self._event(EventKind.VMM_LOST, error=_alone(error)))

    def vmm_back(self) -> None:
        """The VMM has answered."""
        if self._down:
            self._down = False
            self._say(self._event(EventKind.VMM_BACK))

    def owned(self, owner: str, error: PyblockError | None = None) -> None:
        """Whose the sandbox is from now on."""
        if owner != self._owner:
            self._owner = owner
            self._say(self._event(EventKind.OWNER_CHANGED, owner=owner, error=_alone(error)))

    def _of(
        self,
        kind: EventKind,
        device: BlockDevice,
        seconds: float | None = None,
        error: BaseException | None = None,
    ) -> SandboxEvent:
        drive = device.drive
        where = {} if drive is None else {"drive": drive.id, "index": drive.index}
        return self._event(
            kind,
            device=device.id,
            path=device.info.path or None,
            seconds=seconds,
            error=_alone(error),
            **where,
        )

    def _event(self, kind: EventKind, **facts: Any) -> SandboxEvent:
        return SandboxEvent(kind=kind, sandbox=self._sandbox, time=time.time(), **facts)

    def _say(self, event: SandboxEvent) -> None:
        if log.isEnabledFor(logging.INFO):
            facts = {
                name: getattr(event, name)
                for name in ("sandbox", "device", "drive", "path", "seconds")
            }
            log.info("%s", _in_words(event), extra=facts | {"event": event.kind.value})
        for listener in list(self.listeners):
            if (events := listener()) is not None:
                events.put(event)
        if self.on_event is not None:
            try:
                self.on_event(event)
            except (Exception, asyncio.CancelledError):  # of a future of its own, say
                log.exception("sandbox %s: on_event failed at: %s", self._sandbox, event.kind)


def _alone(error: BaseException | None) -> PyblockError | None:
    """An error as an event has it: what waits for a slow listener is to hold no frames, and
    nobody's notes."""
    if not isinstance(error, PyblockError):
        return None
    twin = copy.copy(error).with_traceback(None)
    twin.__cause__ = twin.__context__ = None
    return twin


def _in_words(event: SandboxEvent) -> str:
    words = [f"sandbox {event.sandbox}:"]
    if event.device is not None:
        words.append(
            f"device {event.device}"
            + (f" (drive {event.drive})" if event.drive is not None else "")
        )
    words.append(event.kind.value)
    if event.owner is not None:
        words.append(f"to {event.owner or 'nobody'}")
    if event.seconds is not None:
        words.append(f"after {event.seconds:.3f} s")
    return " ".join(words) + (f": {shown(str(event.error))}" if event.error is not None else "")
