"""One sandbox's part of a store, kept in step with what the sandbox knows.

Whoever changes a device touches it; a flush writes all that was touched in one transaction, as it
is at that moment. So a crowd shares its transactions, and what could not be written is written with
whatever comes next.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Sequence

from pyblock.errors import ImageInUse, InvalidValue, PyblockError, StoreError
from pyblock.life.device import BlockDevice
from pyblock.life.generic import GenericDevice
from pyblock.life.recorded import record_of
from pyblock.life.registry import Device, DeviceManager
from pyblock.life.table import Phase
from pyblock.life.voice import Voice
from pyblock.store.base import Claim, Row, Store
from pyblock.store.record import SandboxRecord, encode_in_place, encode_sandbox

log = logging.getLogger(__name__)

RETRY = 1.0  # seconds between two tries to write what could not be written at once


class Ledger:
    """:param manager: the devices that there are; a touched device that it does not know has gone.
    :param opening: which opening of the sandbox it belongs to, as the store counts them.
    :param voice: is told what has been written.

    :ivar touched: device ID to when it was touched last, as `stamps` counts.
    """

    __slots__ = (
        "_later", "_loop", "_manager", "_opening", "_own", "_refused", "_sandbox_id", "_store",
        "_voice", "stamps", "touched",
    )  # fmt: skip

    def __init__(
        self, store: Store, sandbox_id: str, manager: DeviceManager, opening: int, voice: Voice
    ) -> None:
        self._store = store
        self._opening = opening
        self._voice = voice
        self._loop = asyncio.get_running_loop()
        self._sandbox_id = sandbox_id
        self._manager = manager
        self.touched: dict[str, int] = {}
        self._own: bytes | None = None  # the sandbox's own record, while it is to be written
        self.stamps = itertools.count()
        self._refused: dict[str, ImageInUse | InvalidValue | StoreError] = {}
        self._later: asyncio.Task[None] | None = None

    def touch(self, device_id: str) -> None:
        """Has the device's row written with the next flush."""
        self.touched[device_id] = next(self.stamps)

    async def flush(self, deadline: float | None = None, *, own: bytes | None = None) -> None:
        """Writes what was touched. Raises StoreError, StoreBusy; it is then written with the next
        flush.

        :param own: the sandbox's own record, where it is to change.
        """
        if own is not None:
            self._own = own
        if not self.touched and self._own is None:
            return
        taken: dict[str, int] = {}
        said: list[tuple[BlockDevice, int]] = []
        pending, known = self._own, self._manager.by_id

        def rows() -> list[Row]:
            taken.clear()
            taken.update(self.touched)
            said.clear()
            found = []
            for device_id in taken:
                self._refused.pop(device_id, None)  # of an earlier try
                device = known.get(device_id)
                try:
                    found.append(_row(device) if device is not None else Row(device_id, None))
                except (UnicodeError, ValueError, TypeError) as error:
                    # it is this device's trouble, not that of others
                    # Once the VMM has been sent something, it is no fault of the caller's any more.
                    sent = isinstance(device, BlockDevice) and device.phase is not Phase.ATTACHING
                    kind = StoreError if sent else InvalidValue
                    self._refused[device_id] = kind(
                        f"device {device_id} cannot be written down: {error}", device=device_id
                    )
                    continue
                if isinstance(device, BlockDevice):
                    said.append(
                        (device, device.attach_count if device.phase is Phase.ATTACHED else 0)
                    )
            return found

        began = time.monotonic()
        try:
            refused = await self._store.write(self._sandbox_id, rows, deadline, own=pending)
            if log.isEnabledFor(logging.DEBUG):
                facts = {
                    "sandbox": self._sandbox_id,
                    "step": "write",
                    "seconds": time.monotonic() - began,
                }
                log.debug(
                    "sandbox %(sandbox)s: a transaction took %(seconds).6f s",
                    facts,
                    extra=facts | {"devices": [*taken]},
                )
        except StoreError as taken_away:
            if taken_away.owner is not None:
                self._voice.owned(taken_away.owner, taken_away)
            raise
        if self._own is pending:
            self._own = None
        for device, count in said:
            device.said_count = count
        for device_id, stamp in taken.items():
            if self.touched.get(device_id) == stamp:
                # it was not touched again while the store was writing
                del self.touched[device_id]
        if self._voice.unsaid:
            self._voice.written([device_id for device_id in taken if device_id not in self.touched])
        for device_id, error in refused.items():
            self._refused[device_id] = _named(error, known.get(device_id))

    async def flush_soon(self) -> None:
        """Writes what was touched now if that can be done without waiting, else in the background
        as soon as it can. Raises nothing."""
        try:
            await self.flush(asyncio.get_running_loop().time())
        except PyblockError as error:
            log.warning(
                "sandbox %s: what was done will be written later: %s", self._sandbox_id, error
            )
            if self._later is None or self._later.done():
                self._later = asyncio.create_task(self._flush_later())

    async def _flush_later(self) -> None:
        while True:
            with contextlib.suppress(PyblockError):
                return await self.flush()
            await asyncio.sleep(RETRY)

    async def write(self, device_id: str, deadline: float | None = None) -> None:
        """Flushes, for a device that was touched; it may have been written along with another
        since. Raises also ImageInUse when its claim was refused, InvalidValue when it cannot be
        written down."""
        try:
            await self.flush(deadline)
        finally:
            refused = self._refused.pop(device_id, None)
        if refused is not None:
            raise refused

    async def replace(self, devices: Sequence[Device], own: SandboxRecord) -> None:
        """Writes the rows of devices that are to come in, and the sandbox's own record: all of it
        or nothing. Raises ImageInUse, StoreError."""
        rows = [_row(device) for device in devices]
        refused = await self._store.write(
            self._sandbox_id, lambda: rows, own=encode_sandbox(own), all_or_none=True
        )
        for device in devices:
            if device.id in refused:
                raise _named(refused[device.id], device)
        self._own = None

    async def meet(self, machine: str) -> None:
        """Writes down which machine answers. Raises SandboxConflict, StoreError."""
        await self._store.meet(self._sandbox_id, machine)

    async def drives_of_others(self, machine: str) -> set[str]:
        """The drive IDs that other sandboxes may have in this machine. Raises StoreError."""
        return await self._store.drives_of_others(self._sandbox_id, machine)

    async def close(self, deadline: float | None) -> None:
        """Writes what was touched, and gives the sandbox's ownership up. Raises StoreError; it is
        then given up when the process ends."""
        if self._later is not None:
            self._later.cancel()
            await asyncio.wait([self._later])
        try:
            await self.flush(deadline)
        finally:
            await self._store.close_sandbox(self._sandbox_id, deadline)

    def abandon(self) -> bool:
        """Gives the sandbox's ownership up without waiting, from whatever thread deletes it; what
        is not written yet, recovery will find. Returns whether there was something to give up."""
        if self._later is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it was closed at this moment
                self._loop.call_soon_threadsafe(self._later.cancel)
        return self._store.abandon(self._sandbox_id, self._opening, self._loop)


def _row(device: Device) -> Row:
    held = isinstance(device, BlockDevice) and device.drive is not None
    if not (held or device.attach_count or device.kata):
        # there is nothing to remember: mere users die with their process
        return Row(device.id, None)
    record = record_of(device)
    if not device.kata:
        record.users = None  # others die with their process
    if isinstance(device, GenericDevice) or not held or device.identity is None:
        return Row(device.id, encode_in_place(record))
    claim = Claim(device.identity, record.read_only, record.share, device.under)
    return Row(device.id, encode_in_place(record), claim, device.phase is Phase.ATTACHING)


def _named(error: ImageInUse, device: Device | None) -> ImageInUse:
    if device is None:
        return error
    path = device.info.path
    return ImageInUse(
        f"image {path!r} {error}",
        device=device.id,
        path=path,
        holder=error.holder,
        owner=error.owner,
    )
