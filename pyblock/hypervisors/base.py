"""What an adapter offers, and the one order of steps in which a drive comes and goes.

A drive has a backend (what the VMM reads and writes) and a device (what the guest sees). It comes backend first and goes device first,
and the backend may go only after the VMM has confirmed that the device is gone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Collection, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import msgspec

from pyblock.drivers import Driver, Family
from pyblock.errors import PyblockError, TransportError, VmmProtocolError, VmmRefused
from pyblock.host import OpenedImage
from pyblock.lineage import Identity
from pyblock.model import BlockDrive

Result = TypeVar("Result")

CONNECT_TIMEOUT = 30.0  # seconds that making a connection may take when the caller's own deadline is later


class Unsettled(Exception):
    """Raised by an adapter when the VMM may still hold part of a drive; `error` is what the caller is to see."""

    def __init__(self, error: PyblockError) -> None:
        super().__init__(str(error))
        self.error = error


def fault(doing: str, error: Exception) -> PyblockError:
    """What an adapter raised, as one of ours; what is none (an answer of a form that nobody thought of, a mistake in an adapter) is a
    VmmProtocolError with that as its cause."""
    if isinstance(error, PyblockError):
        return error
    wrong = VmmProtocolError(
        f"{doing} failed with {error!r:.200}: the VMM answered in another form than its protocol's, or its adapter is at fault"
    )
    wrong.__cause__ = error
    return wrong


@contextmanager
def typed(doing: str) -> Iterator[None]:
    """Has the body raise errors of ours only. For what changes nothing in the machine; what may is Unsettled."""
    try:
        yield
    except Exception as error:
        wrong = fault(doing, error)
        if wrong is error:
            raise
        raise wrong from error


class FoundDisk(msgspec.Struct, frozen=True):
    """A disk that the machine has.

    :ivar id: the VMM's ID of it, "" when it has none.
    :ivar family: whose names it uses up in the guest.
    :ivar index: the block index whose SCSI address it sits at, None where it is at none of ours.
    """

    id: str
    family: Family
    index: int | None = None


class Held(msgspec.Struct, frozen=True):
    """What the machine has under a drive ID.

    :ivar device: the guest has, or may have, the device.
    :ivar backend: what the device reads and writes is there.
    :ivar kind: a driver whose steps remove it.
    :ivar cold: it was there when the machine started, so it is nobody's to remove.
    :ivar image: what the backend has open, where the VMM can tell.
    """

    device: bool
    backend: bool
    kind: Driver
    cold: bool = False
    image: Identity | None = None

    @property
    def whole(self) -> bool:
        return self.device and self.backend


class Inventory(msgspec.Struct, frozen=True):
    """What a machine has now.

    :ivar disks: its disks, whoever plugged them in.
    :ivar held: drive ID to what is there, for all that is named as drives are, and for no other.
    :ivar files: the host's paths that its disks use.
    :ivar images: what its disks have open, as far as the VMM can tell.
    :ivar machine: what two addresses of one machine have in common; "" where that cannot be told.
    """

    disks: list[FoundDisk] = []
    held: dict[str, Held] = {}
    files: frozenset[str] = frozenset()
    images: frozenset[Identity] = frozenset()
    machine: str = ""


class Hypervisor(Protocol):
    """One machine's VMM. Every method may raise TransportError; none takes a deadline, since the operations around them outlive theirs."""

    @property
    def drivers(self) -> frozenset[str]:
        """The names of the drivers that this VMM offers."""

    @property
    def address(self) -> str:
        """What finds this machine again from another process, as `open_hypervisor` takes it; "" when nothing does."""

    @property
    def lanes(self) -> int | None:
        """How many drives it is to be given at once to plug in; None for any number. Each has its image open until then."""

    @property
    def waits_for(self) -> str:
        """What it waits for now, in words for whoever loses patience; "" where it knows of nothing."""
        return ""

    @property
    def losses(self) -> int:
        """How many connections were lost so far. At each the machine may have been started anew, whether anybody waited for it or not."""
        return 0

    async def inventory(self, known: Collection[str] = ()) -> Inventory:
        """Connects where that is needed, and lists what the machine has now. Changes nothing.

        :param known: IDs of drives whose place need not be looked at.
        """

    async def is_gone(self) -> bool:
        """Whether nothing answers at its address any more: its socket is absent, or nobody listens there. Changes nothing, and is not
        answered by waiting."""

    def adopt(self, drive: BlockDrive) -> None:
        """Takes note of a drive that was plugged in before this adapter was opened: what it takes stays taken until it is unplugged."""

    def recognize(self, drive: BlockDrive) -> None:
        """Fills in the guest match, and the place, of a drive that another program plugged in, as far as its address alone tells them.
        Asks nothing, takes nothing; `locate` asks."""

    def vacate(self, drive: BlockDrive) -> None:
        """Takes note that a drive's place is free: the machine has nothing of it."""

    async def place(self, drive: BlockDrive) -> None:
        """Chooses and takes the drive's place, or raises SlotsExhausted; sends nothing that changes the machine."""

    async def plug(self, drive: BlockDrive, image: OpenedImage) -> None:
        """Plugs in a drive that has its place, and fills in where it went. On an error nothing is left behind, except on Unsettled.

        :param image: what was claimed for it, open as the drive is (read-only or not). It is closed when this returns; an adapter that
            needs it no longer may close it before.
        """

    async def locate(self, drive: BlockDrive) -> None:
        """Fills in the addresses that only the VMM knows, of a drive that is plugged in. Changes nothing in the machine."""

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
    async def backend_add(self, drive: BlockDrive, image: OpenedImage) -> None: ...

    @abstractmethod
    async def device_add(self, drive: BlockDrive) -> None: ...

    @abstractmethod
    async def device_del(self, drive: BlockDrive) -> bool:
        """Asks for the removal of the device; False when there is none."""

    @abstractmethod
    async def device_gone(self, drive: BlockDrive) -> None:
        """Returns when the removal asked for is confirmed; VmmRefused when the guest declined it."""

    @abstractmethod
    async def backend_del(self, drive: BlockDrive) -> None:
        """Removes the backend; content when there is none."""

    async def plug(self, drive: BlockDrive, image: OpenedImage) -> None:
        await _sorted("adding the backend", drive, self.backend_add(drive, image), sent=False)
        try:
            await _sorted("adding the device", drive, self.device_add(drive), sent=True)
        except PyblockError as error:
            await self._undo(drive, error)
            raise
        try:
            await self.locate(drive)
        except Exception as error:  # it is plugged in: whatever went wrong, the VMM has it
            raise _unsettled("locating it", drive, error) from error

    async def _undo(self, drive: BlockDrive, error: PyblockError) -> None:
        try:
            await self.backend_del(drive)
        except Exception as trouble:
            error.add_note(f"undoing it failed too: {trouble if isinstance(trouble, PyblockError) else repr(trouble)}")
            raise Unsettled(error) from error

    async def unplug(self, drive: BlockDrive) -> None:
        if await _sorted("asking for the removal", drive, self.device_del(drive), sent=False):
            await _sorted("waiting for the removal", drive, self.device_gone(drive), sent=True)
        elif drive.imported:
            await _sorted("looking for it under other names", drive, self._check_names(drive), sent=True)
        try:
            await self.backend_del(drive)
        except Exception as error:  # the device is gone, its backend is not: not attached any more, but not free either
            raise _unsettled("removing the backend", drive, error) from error

    async def _check_names(self, drive: BlockDrive) -> None:
        """Raises VmmRefused when the machine has nothing under the names that an imported drive may have, but its image under another: to
        take that for gone would free an image that the guest goes on writing."""
        found = await self.inventory()
        if drive.id not in found.held and drive.file in found.files:
            raise VmmRefused(
                f"the machine has no drive {drive.id}, but has its image {drive.file!r} in use under a name that whoever plugged it in did "
                "not tell; it stays attached until it is unplugged there",
                step="device-del",
                request=drive.id,
                reply="in use under another name",
            )


async def _sorted(doing: str, drive: BlockDrive, step: Awaitable[Result], *, sent: bool) -> Result:
    """Runs a step after whose refusal all is as it was before it. Whatever is no refusal may have been carried out.

    :param sent: something was sent before; else the error tells.
    """
    try:
        return await step
    except TransportError as error:
        if not (sent or error.sent):
            raise
        raise Unsettled(error) from error
    except PyblockError:
        raise
    except Exception as error:
        raise _unsettled(doing, drive, error) from error


def _unsettled(doing: str, drive: BlockDrive, error: Exception) -> Unsettled:
    return Unsettled(fault(f"drive {drive.id}: {doing}", error))
