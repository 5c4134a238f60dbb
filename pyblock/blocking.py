"""The blocking front door: the same sandbox, driven from ordinary threads through one event-loop
thread for the whole process.

It repeats none of the logic. The thread starts with the first open sandbox and ends with the last.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Literal, Self, TypeVar, Unpack

try:
    from anyio.from_thread import BlockingPortal, BlockingPortalProvider
except ModuleNotFoundError as error:
    why = "pyblock.blocking needs anyio: pip install pyblock-hotplug[blocking]"
    raise ImportError(why, name=error.name) from error

from pyblock import overview
from pyblock import sandbox as door
from pyblock.core.index import BlockIndex
from pyblock.disk.model import DiskOptions, Options, SharedOptions
from pyblock.errors import PyblockError, SandboxClosed
from pyblock.life import voice
from pyblock.life.device import AttachedDevice, BlockDevice
from pyblock.life.machine import GRACE
from pyblock.life.recovery import Finding
from pyblock.life.registry import Device, DeviceManager
from pyblock.life.voice import SandboxEvent
from pyblock.overview import Holder, KnownDevice, KnownSandbox
from pyblock.vmm.base import Hypervisor

if TYPE_CHECKING:
    from pyblock.kata.schema import SandboxState
    from pyblock.store.base import Store

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_provider = BlockingPortalProvider(backend="asyncio")


def _after_fork() -> None:
    global _provider  # noqa: PLW0603 - the thread stayed in the parent
    _provider = BlockingPortalProvider(backend="asyncio")


os.register_at_fork(after_in_child=_after_fork)


class Sandbox:
    """pyblock.Sandbox for callers without an event loop; safe to share between threads. Every
    method blocks until it is done; for parameters and errors see pyblock.Sandbox."""

    def __init__(
        self,
        sandbox_id: str,
        vm: str | Hypervisor,
        *,
        driver: str = "virtio-scsi",
        capacity: int = door.CAPACITY,
        block_offset: int | None = None,
        store: Store | Literal["host"] | None = "host",
        recover: bool = True,
        open_timeout: float | None = None,
        on_event: Callable[[SandboxEvent], None] | None = None,
    ) -> None:
        self._sandbox = door.Sandbox(
            sandbox_id, vm, driver=driver, capacity=capacity, block_offset=block_offset,
            store=store, recover=recover,
            open_timeout=open_timeout, on_event=on_event,
        )  # fmt: skip
        self._portal: BlockingPortal | None = None
        self._pid = -1  # of the process that opened it
        self._closed = threading.Event()
        self._stack = ExitStack()

    def __repr__(self) -> str:
        return f"<blocking {self._sandbox!r}>"

    def open(self) -> Self:
        """See pyblock.Sandbox.open."""
        if self._portal is not None and self._pid == os.getpid():
            self._call(self._sandbox.open)
            return self
        self._closed.clear()
        self._portal, self._pid = self._stack.enter_context(_provider), os.getpid()
        try:
            self._call(self._sandbox.open, lambda _: self._sandbox.close())
        except BaseException:
            self._portal = None
            self._stack.close()
            raise
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def id(self) -> str:
        """The sandbox ID."""
        return self._sandbox.id

    @property
    def devices(self) -> list[Device]:
        """See pyblock.Sandbox.devices."""
        return self._sandbox.devices

    @property
    def manager(self) -> DeviceManager:
        """The devices by ID, and their counts."""
        return self._sandbox.manager

    @property
    def index(self) -> BlockIndex:
        """The block index."""
        return self._sandbox.index

    def events(self) -> Events:
        """See pyblock.Sandbox.events: an iterator, which blocks the thread that waits for the next
        one. `on_event` is called in the event-loop thread."""
        return Events(self, self._sandbox.events())

    def attach(
        self,
        image: door.Image,
        *,
        timeout: float | None = door.TIMEOUT,
        **options: Unpack[Options],
    ) -> AttachedDevice:
        """See pyblock.Sandbox.attach."""
        take_back: Callable[[AttachedDevice], Awaitable[None]] = partial(
            self._sandbox.detach, timeout=GRACE
        )
        return self._call(
            partial(self._sandbox.attach, image, timeout=timeout, **options), take_back
        )

    def ensure(
        self,
        path: str | os.PathLike[str],
        *,
        device_id: str,
        timeout: float | None = door.TIMEOUT,
        **options: Unpack[DiskOptions],
    ) -> AttachedDevice:
        """See pyblock.Sandbox.ensure."""
        ensure = partial(self._sandbox._ensure, path, {**options, "device_id": device_id}, timeout)

        async def take_back(done: tuple[AttachedDevice, bool]) -> None:
            if done[1]:
                await self._sandbox.detach(done[0], timeout=GRACE)

        return self._call(ensure, take_back)[0]

    def attach_many(
        self,
        images: Iterable[door.Image],
        *,
        timeout: float | None = door.TIMEOUT,
        progress: Callable[[BlockDevice], None] | None = None,
        **options: Unpack[SharedOptions],
    ) -> list[AttachedDevice]:
        """See pyblock.Sandbox.attach_many. `progress` is called in the event-loop thread."""
        attach = partial(
            self._sandbox.attach_many, door.several(images, "images", "attach"),
            timeout=timeout, progress=progress, **options,
        )  # fmt: skip
        take_back: Callable[[list[AttachedDevice]], Awaitable[None]] = partial(
            self._sandbox.detach_many, timeout=GRACE
        )
        return self._call(attach, take_back)

    def detach(
        self, device: Device | str, *, timeout: float | None = door.TIMEOUT, released: bool = False
    ) -> None:
        """See pyblock.Sandbox.detach."""
        self._call(partial(self._sandbox.detach, device, timeout=timeout, released=released))

    def detach_many(
        self,
        devices: Iterable[Device | str],
        *,
        timeout: float | None = door.TIMEOUT,
        released: bool = False,
    ) -> None:
        """See pyblock.Sandbox.detach_many."""
        self._call(
            partial(
                self._sandbox.detach_many, door.several(devices, "devices", "detach"),
                timeout=timeout, released=released,
            )
        )  # fmt: skip

    @property
    def recovered(self) -> tuple[Finding, ...]:
        """See pyblock.Sandbox.recovered."""
        return self._sandbox.recovered

    def reconcile(
        self,
        *,
        dry_run: bool = False,
        orphans: bool = False,
        timeout: float | None = door.RECONCILE_TIME,
    ) -> list[Finding]:
        """See pyblock.Sandbox.reconcile."""
        return self._call(
            partial(self._sandbox.reconcile, dry_run=dry_run, orphans=orphans, timeout=timeout)
        )

    def forget(self) -> list[str]:
        """See pyblock.Sandbox.forget."""
        return self._call(self._sandbox.forget)

    def save(self, path: str | os.PathLike[str]) -> None:
        """See pyblock.Sandbox.save."""
        self._call(partial(self._sandbox.save, path))

    def load(self, path: str | os.PathLike[str], *, share: bool = False) -> None:
        """See pyblock.Sandbox.load."""
        self._call(partial(self._sandbox.load, path, share=share))

    def settle(self, timeout: float = GRACE) -> None:
        """See pyblock.Sandbox.settle."""
        self._call(partial(self._sandbox.settle, timeout))

    def state(self) -> SandboxState:
        """See pyblock.Sandbox.state."""
        return self._loop.call(self._sandbox.state)

    def restore(
        self, state: SandboxState, *, where: str = "the state", share: bool = False
    ) -> None:
        """See pyblock.Sandbox.restore."""
        self._call(partial(self._sandbox.restore, state, where=where, share=share))

    def close(self) -> None:
        """See pyblock.Sandbox.close."""
        portal, self._portal = self._portal, None
        if portal is None or self._pid != os.getpid():
            return  # the event-loop thread stayed in the process that opened it
        try:
            portal.call(self._sandbox.close)
        finally:
            self._stack.close()
            self._closed.set()

    def _call(
        self,
        function: Callable[[], Awaitable[Result]],
        undo: Callable[[Result], Awaitable[None]] | None = None,
    ) -> Result:
        """Runs it in the event-loop thread. If this thread is interrupted (Ctrl-C), it is ended
        there, and given time for that.

        :param undo: takes back what it did, when this thread was interrupted in the moment of its
            success.
        """
        portal = self._loop
        call = _Call(function, undo)
        try:
            try:
                portal.start_task_soon(call.run)
            except RuntimeError as error:
                if self._portal is portal:
                    raise
                raise self._not_open() from error  # another thread has closed it since
            return call.result()
        except BaseException as error:
            if error is not call.error:
                # the event-loop thread has ended, and the call with it
                with suppress(RuntimeError):
                    portal.start_task_soon(call.end)
                    call.over.wait(GRACE)
            raise

    @property
    def _loop(self) -> BlockingPortal:
        portal = self._portal  # once: another thread may be closing it
        if portal is None or self._pid != os.getpid():
            raise self._not_open()
        return portal

    def _not_open(self) -> SandboxClosed:
        text = f"sandbox {self.id} is not open in this process; use it inside 'with'"
        return SandboxClosed(text, sandbox=self.id)


class Host:
    """pyblock.Host for callers without an event loop."""

    def __init__(self, store: Store | None = None) -> None:
        self._host = overview.Host(store)

    def __repr__(self) -> str:
        return f"<blocking {self._host!r}>"

    def sandboxes(self) -> list[KnownSandbox]:
        """See pyblock.Host.sandboxes."""
        return self._call(self._host.sandboxes)

    def devices(self, sandbox: str) -> list[KnownDevice]:
        """See pyblock.Host.devices."""
        return self._call(partial(self._host.devices, sandbox))

    def holders(self, path: str | os.PathLike[str]) -> list[Holder]:
        """See pyblock.Host.holders."""
        return self._call(partial(self._host.holders, path))

    def export(self, sandbox: str, path: str | os.PathLike[str]) -> None:
        """See pyblock.Host.export."""
        self._call(partial(self._host.export, sandbox, path))

    def forget(self, sandbox: str) -> list[str]:
        """See pyblock.Host.forget."""
        return self._call(partial(self._host.forget, sandbox))

    def _call(self, function: Callable[[], Awaitable[Result]]) -> Result:
        with _provider as portal:
            return portal.call(function)


def host(store: Store | None = None) -> Host:
    """See pyblock.host."""
    return Host(store)


class Events:
    """The events of a blocking sandbox for one listener; see pyblock.Events. Its thread may be
    another than those that use the sandbox."""

    def __init__(self, sandbox: Sandbox, events: voice.Events) -> None:
        self._sandbox = sandbox
        self._events = events

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> SandboxEvent:
        if (event := self.next()) is None:
            raise StopIteration
        return event

    def next(self) -> SandboxEvent | None:
        """The next event; None when the sandbox was closed, or this was. Raises SandboxClosed
        before it was opened."""
        if not self._events.ended:
            try:
                return self._sandbox._call(self._events.next, self._put_back)
            except SandboxClosed:
                if self._sandbox._pid != os.getpid():
                    raise
                # another thread is closing it, and has not ended this yet
                self._sandbox._closed.wait()
                if not self._events.ended:
                    raise
        return self._events.take()

    def close(self) -> None:
        """Ends it: what waits may still be taken, and nothing comes any more."""
        self._events.close()

    async def _put_back(self, event: SandboxEvent | None) -> None:
        if event is not None:
            self._events.put_back(event)


class _Call(Generic[Result]):
    """A function that runs in the event-loop thread, for another that waits. Both may be at any
    point when that one is interrupted, so what becomes of the function is decided in the event-loop
    thread alone.

    :ivar error: what it raised.
    :ivar over: nothing of it goes on after its end was asked for.
    """

    def __init__(
        self,
        function: Callable[[], Awaitable[Result]],
        undo: Callable[[Result], Awaitable[None]] | None,
    ) -> None:
        self.error: BaseException | None = None
        self.over = threading.Event()
        self._function = function
        self._undo = undo
        self._results: list[Result] = []
        self._task: asyncio.Task[None] | None = None
        self._done = threading.Event()

    async def run(self) -> None:
        self._task = asyncio.current_task()
        try:
            self._results.append(await self._function())
        except BaseException as error:
            self.error = error
        finally:
            self._done.set()

    def result(self) -> Result:
        """Waits for it, and returns or raises what it did."""
        self._done.wait()
        if self.error is not None:
            raise self.error
        return self._results[0]

    async def end(self) -> None:
        """Ends it, and takes back what it did all the same. What does not end in time goes on by
        itself."""
        try:
            if self._task is None:
                return  # the interruption came before it was on its way
            if not self._done.is_set():
                self._task.cancel()
                await asyncio.wait([self._task])
            if self._results and self._undo is not None:
                await self._undo(self._results[0])
        except PyblockError as error:
            log.warning(
                "what was done when its caller was interrupted could not be taken back: %s", error
            )
        finally:
            self.over.set()
