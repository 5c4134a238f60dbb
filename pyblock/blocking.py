"""The blocking front door: the same sandbox, driven from ordinary threads through one event-loop thread for the whole process.

It repeats none of the logic. The thread starts with the first open sandbox and ends with the last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from anyio.from_thread import BlockingPortal, BlockingPortalProvider

from pyblock import sandbox as door
from pyblock.device import BlockDevice
from pyblock.errors import SandboxClosed
from pyblock.hypervisors.base import Hypervisor
from pyblock.index import BlockIndex
from pyblock.manager import Device, DeviceManager

if TYPE_CHECKING:
    from pyblock.state import SandboxState

_provider = BlockingPortalProvider(backend="asyncio")


def _after_fork() -> None:
    global _provider  # noqa: PLW0603 - the thread stayed in the parent
    _provider = BlockingPortalProvider(backend="asyncio")


os.register_at_fork(after_in_child=_after_fork)


class Sandbox:
    """pyblock.Sandbox for callers without an event loop; safe to share between threads. Every method blocks until it is done; for
    parameters and errors see pyblock.Sandbox."""

    def __init__(
        self,
        sandbox_id: str,
        vm: str | Hypervisor,
        *,
        driver: str = "virtio-scsi",
        capacity: int = door.CAPACITY,
        block_offset: int | None = None,
    ) -> None:
        self._sandbox = door.Sandbox(sandbox_id, vm, driver=driver, capacity=capacity, block_offset=block_offset)
        self._portal: BlockingPortal | None = None
        self._stack = ExitStack()

    def __repr__(self) -> str:
        return f"<blocking {self._sandbox!r}>"

    def __enter__(self) -> Self:
        self._portal = self._stack.enter_context(_provider)
        self._portal.call(self._sandbox.__aenter__)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        """See pyblock.DeviceManager."""
        return self._sandbox.manager

    @property
    def index(self) -> BlockIndex:
        """The block index."""
        return self._sandbox.index

    def attach(
        self,
        image: door.Image,
        *,
        driver: str | None = None,
        read_only: bool = False,
        serial: str | None = None,
        device_id: str | None = None,
        timeout: float | None = door.TIMEOUT,
    ) -> BlockDevice:
        """See pyblock.Sandbox.attach."""
        attach = partial(
            self._sandbox.attach, image, driver=driver, read_only=read_only, serial=serial, device_id=device_id, timeout=timeout
        )
        return self._loop.call(attach)

    def attach_many(
        self,
        images: Iterable[door.Image],
        *,
        driver: str | None = None,
        read_only: bool = False,
        timeout: float | None = door.TIMEOUT,
        progress: Callable[[BlockDevice], None] | None = None,
    ) -> list[BlockDevice]:
        """See pyblock.Sandbox.attach_many. `progress` is called in the event-loop thread."""
        images = list(images)
        return self._loop.call(
            partial(self._sandbox.attach_many, images, driver=driver, read_only=read_only, timeout=timeout, progress=progress)
        )

    def detach(self, device: Device | str, *, timeout: float | None = door.TIMEOUT) -> None:
        """See pyblock.Sandbox.detach."""
        self._loop.call(partial(self._sandbox.detach, device, timeout=timeout))

    def detach_many(self, devices: Iterable[Device | str], *, timeout: float | None = door.TIMEOUT) -> None:
        """See pyblock.Sandbox.detach_many."""
        self._loop.call(partial(self._sandbox.detach_many, list(devices), timeout=timeout))

    def save(self, path: str | os.PathLike[str]) -> None:
        """See pyblock.Sandbox.save."""
        self._loop.call(self._sandbox.save, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """See pyblock.Sandbox.load."""
        self._loop.call(self._sandbox.load, path)

    def state(self) -> SandboxState:
        """See pyblock.Sandbox.state."""
        return self._loop.call(self._sandbox.state)

    def close(self) -> None:
        """See pyblock.Sandbox.close."""
        if self._portal is not None:
            self._portal.call(self._sandbox.close)
            self._portal = None
            self._stack.close()

    @property
    def _loop(self) -> BlockingPortal:
        if self._portal is None:
            raise SandboxClosed(f"sandbox {self.id} is not open; use it inside 'with'")
        return self._portal
