"""One sandbox's part of a store, kept in step with what the sandbox knows.

Whoever changes a device touches it; a flush writes all that was touched in one transaction, as it is at that moment. So a crowd shares its
transactions, and what could not be written is written with whatever comes next.
"""

from __future__ import annotations

import asyncio
import contextlib

from pyblock.device import HOLDING, BlockDevice, Phase
from pyblock.errors import ImageInUse, StoreError
from pyblock.manager import Device, DeviceManager
from pyblock.operation import log
from pyblock.persist import device_to_state
from pyblock.state import encode_device
from pyblock.stores.base import Claim, Row, Store

RETRY = 1.0  # seconds between two tries to write what could not be written at once


class Ledger:
    """:param manager: the devices that there are; a touched device that it does not know has gone."""

    __slots__ = ("_later", "_manager", "_refused", "_sandbox_id", "_stamp", "_store", "_touched")

    def __init__(self, store: Store, sandbox_id: str, manager: DeviceManager) -> None:
        self._store = store
        self._sandbox_id = sandbox_id
        self._manager = manager
        self._touched: dict[str, int] = {}  # device ID to when it was touched last
        self._stamp = 0
        self._refused: dict[str, ImageInUse] = {}
        self._later: asyncio.Task[None] | None = None

    def touch(self, device_id: str) -> None:
        """Has the device's row written with the next flush."""
        self._stamp += 1
        self._touched[device_id] = self._stamp

    async def flush(self, deadline: float | None = None, *, state: bytes | None = None) -> None:
        """Writes what was touched. Raises StoreError, StoreBusy; it is then written with the next flush.

        :param state: the sandbox's own saved form, where it is to change.
        """
        if not self._touched and state is None:
            return
        taken: dict[str, int] = {}

        def rows() -> list[Row]:
            taken.clear()
            taken.update(self._touched)
            return [self._row(device_id) for device_id in taken]

        refused = await self._store.write(self._sandbox_id, rows, deadline, state=state)
        for device_id, stamp in taken.items():
            if self._touched.get(device_id) == stamp:  # it was not touched again while the store was writing
                del self._touched[device_id]
        for device_id, error in refused.items():
            device = self._manager.get(device_id)
            self._refused[device_id] = ImageInUse(f"image {device.info.path if device else device_id!r} {error}")

    async def flush_soon(self, *, state: bytes | None = None) -> None:
        """Writes what was touched now if that can be done without waiting, else in the background as soon as it can."""
        try:
            await self.flush(asyncio.get_running_loop().time(), state=state)
        except StoreError as error:
            log.warning("sandbox %s: what was done will be written later: %s", self._sandbox_id, error)
            if self._later is None or self._later.done():
                self._later = asyncio.create_task(self._flush_later(state))

    async def _flush_later(self, state: bytes | None) -> None:
        while True:
            await asyncio.sleep(RETRY)
            with contextlib.suppress(StoreError):
                return await self.flush(state=state)

    async def close(self, deadline: float | None) -> None:
        """Writes what was touched, and gives the sandbox's ownership up. Raises StoreError; it is then given up when the process ends."""
        if self._later is not None:
            self._later.cancel()
        try:
            await self.flush(deadline)
        finally:
            await self._store.close_sandbox(self._sandbox_id, deadline)

    async def claim(self, device_id: str, deadline: float | None) -> None:
        """Flushes, and raises ImageInUse when the device's claim was refused."""
        try:
            await self.flush(deadline)
        finally:
            refused = self._refused.pop(device_id, None)
        if refused is not None:
            raise refused

    def refusals(self) -> list[ImageInUse]:
        """The claims that were refused since it was last asked."""
        refused, self._refused = list(self._refused.values()), {}
        return refused

    def _row(self, device_id: str) -> Row:
        device = self._manager.get(device_id)
        if device is None or not _is_kept(device):
            return Row(device_id, None)
        claim = None
        if isinstance(device, BlockDevice) and device.identity is not None and device.phase in HOLDING:
            claim = Claim(device.identity, device.info.read_only, device.info.share)
        # Until the outcome is written the claim may be new; a device that was loaded with one is claimed when it is first written.
        return Row(device_id, encode_device(device_to_state(device)), claim, claiming=getattr(device, "phase", None) is Phase.ATTACHING)


def _is_kept(device: Device) -> bool:
    """Whether there is something to remember: a drive, a count, or what another program has written down. Mere users die with their
    process."""
    if device.attach_count or device.saved is not None:
        return True
    return isinstance(device, BlockDevice) and device.phase in HOLDING
