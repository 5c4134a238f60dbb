"""What an adapter offers, and the one order of steps in which a drive comes and goes.

A drive has a backend (what the VMM reads and writes) and a device (what the guest sees). It comes backend first and goes device first,
and the backend may go only after the VMM has confirmed that the device is gone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import msgspec

from pyblock.device import Unsettled
from pyblock.drivers import Family
from pyblock.errors import PyblockError, TransportError, VmmProtocolError, VmmUnreachable
from pyblock.model import BlockDrive

CONNECT_TIMEOUT = 30.0  # seconds that making a connection may take when the caller's own deadline is later


class FoundDisk(msgspec.Struct, frozen=True):
    """A disk that the machine has.

    :ivar id: the VMM's ID of it, "" when it has none.
    :ivar family: whose names it uses up in the guest.
    :ivar index: the block index whose SCSI address it sits at, None where it is at none of ours.
    """

    id: str
    family: Family
    index: int | None = None


class Hypervisor(Protocol):
    """One machine's VMM. Every method may raise TransportError; none takes a deadline, since the operations around them outlive theirs."""

    @property
    def drivers(self) -> frozenset[str]:
        """The names of the drivers that this VMM offers."""

    async def inventory(self) -> list[FoundDisk]:
        """Connects where that is needed, and lists the disks that the machine has now. Changes nothing."""

    def adopt(self, drive: BlockDrive) -> None:
        """Takes note of a drive that was plugged in before this adapter was opened: what it takes stays taken until it is unplugged."""

    async def plug(self, drive: BlockDrive) -> None:
        """Plugs a drive in and fills in where it went. On an error nothing is left behind, except on Unsettled."""

    async def unplug(self, drive: BlockDrive) -> None:
        """Removes whatever the machine has of a drive; returns when it is confirmed gone. Unsettled when that is not known."""

    def nudge(self, drive: BlockDrive) -> None:
        """Has an `unplug` that waits for its confirmation ask the guest once more."""

    async def close(self) -> None:
        """Ends the connection, if there is one. The machine keeps what it has; a later call connects again."""


class SteppedHypervisor(Hypervisor, Protocol):
    """An adapter whose VMM works in the five steps below; it implements them, and the order and the undoing are here."""

    STEPS: tuple[str, ...] = ("backend-add", "device-add", "device-del", "device-gone", "backend-del")

    @abstractmethod
    async def place(self, drive: BlockDrive) -> None:
        """Chooses and takes the drive's place, or raises SlotsExhausted; sends nothing that changes the machine."""

    @abstractmethod
    def vacate(self, drive: BlockDrive) -> None:
        """Gives the place back."""

    @abstractmethod
    async def backend_add(self, drive: BlockDrive) -> None: ...

    @abstractmethod
    async def device_add(self, drive: BlockDrive) -> None: ...

    @abstractmethod
    async def locate(self, drive: BlockDrive) -> None:
        """Fills in the addresses that only the VMM knows, after the device was added. Changes nothing in the machine."""

    @abstractmethod
    async def device_del(self, drive: BlockDrive) -> bool:
        """Asks for the removal of the device; False when there is none."""

    @abstractmethod
    async def device_gone(self, drive: BlockDrive) -> None:
        """Returns when the removal asked for is confirmed; VmmRefused when the guest declined it."""

    @abstractmethod
    async def backend_del(self, drive: BlockDrive) -> None:
        """Removes the backend; content when there is none."""

    async def plug(self, drive: BlockDrive) -> None:
        await self.place(drive)
        sent = False
        try:
            await self.backend_add(drive)
            sent = True
            await self.device_add(drive)
        except (VmmUnreachable, VmmProtocolError) as error:
            if sent:
                raise Unsettled(error) from error
            self.vacate(drive)
            raise
        except TransportError as error:
            raise Unsettled(error) from error
        except PyblockError as error:
            if sent:
                await self._undo(drive, error)
            self.vacate(drive)
            raise
        except Exception as error:  # a fault of ours, not of the VMM
            if sent:
                raise Unsettled(VmmProtocolError(f"drive {drive.id}: {error!r}")) from error
            self.vacate(drive)
            raise
        try:
            await self.locate(drive)
        except Exception as error:  # it is plugged in: whatever went wrong, the VMM has it
            raise Unsettled(error if isinstance(error, PyblockError) else VmmProtocolError(f"drive {drive.id}: {error!r}")) from error

    async def _undo(self, drive: BlockDrive, error: PyblockError) -> None:
        try:
            await self.backend_del(drive)
        except PyblockError as trouble:
            error.add_note(f"undoing it failed too: {trouble}")
            raise Unsettled(error) from error

    async def unplug(self, drive: BlockDrive) -> None:
        try:
            there = await self.device_del(drive)
        except (VmmUnreachable, VmmProtocolError):
            raise  # nothing was sent
        except TransportError as error:
            raise Unsettled(error) from error
        try:
            if there:
                await self.device_gone(drive)
        except TransportError as error:
            raise Unsettled(error) from error
        try:
            await self.backend_del(drive)
        except PyblockError as error:  # the device is gone, its backend is not: not attached any more, but not free either
            raise Unsettled(error) from error
        self.vacate(drive)
