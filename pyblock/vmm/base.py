"""What an adapter offers, and the one road on which drives are plugged in and out, whatever the
VMM.

An adapter translates: in which steps a drive comes, how its removal is asked for and confirmed,
what the machine has. What a step's failure means (nothing sent, refused, nobody knows) is sorted
here.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol, TypeVar

import msgspec

from pyblock.disk.drivers import Driver, Family
from pyblock.disk.image import OpenedImage
from pyblock.disk.lineage import Identity
from pyblock.disk.model import BlockDrive, Place
from pyblock.errors import PyblockError, TransportError, VmmProtocolError, VmmRefused
from pyblock.tasks import SANDBOX

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# seconds that making a connection may take when the caller's own deadline is later
CONNECT_TIMEOUT = 30.0


class Unsettled(Exception):
    """Raised by an adapter when the VMM may still hold part of a drive; `error` is what the caller
    is to see."""

    def __init__(self, error: PyblockError) -> None:
        super().__init__(str(error))
        self.error = error


def fault(doing: str, error: Exception) -> PyblockError:
    """What an adapter raised, as one of ours; what is none (an answer of a form that nobody thought
    of, a mistake in an adapter) is a VmmProtocolError with that as its cause."""
    if isinstance(error, PyblockError):
        return error
    wrong = VmmProtocolError(
        f"{doing} failed with {error!r:.200}: the VMM answered in another form than its "
        "protocol's, or its adapter is at fault"
    )
    wrong.__cause__ = error
    return wrong


@contextmanager
def typed(doing: str) -> Iterator[None]:
    """Has the body raise errors of ours only. For what changes nothing in the machine; what may is
    Unsettled."""
    try:
        yield
    except Exception as error:
        wrong = fault(doing, error)
        if wrong is error:
            raise
        raise wrong from error


class Offer(msgspec.Struct, frozen=True):
    """What a driver can do on a VMM.

    :ivar serial_max: bytes of the longest serial that it carries; 0: none can be set.
    :ivar read_only: it can keep the guest from writing.
    :ivar share: the image may be shared with other writers.
    :ivar resize: its size can be changed while it is plugged in.
    :ivar limits: its bandwidth and operations can be limited.
    :ivar cold_plug: it can be plugged in before the machine starts.
    :ivar descriptors: the VMM takes the image as an open file; else it is told a path.
    :ivar unlocated: why a drive of it has no guest match; "" where it has one.
    :ivar seen: the signal by which it is known that the guest has taken the disk; "" where there is
        none.
    :ivar removal: "confirmed": the VMM says when the guest has let go. "forced": it takes the disk
        away at once and nothing tells whether the guest had closed it, so that the caller has to
        say so (`detach(released=True)`).
    :ivar removal_time: seconds that a removal usually takes at most, with a guest that does its
        part; None where nobody measured it.
    """

    serial_max: int = 0
    read_only: bool = True
    share: bool = True
    resize: bool = False
    limits: bool = False
    cold_plug: bool = False
    descriptors: bool = False
    unlocated: str = ""
    seen: str = ""
    removal: Literal["confirmed", "forced"] = "confirmed"
    removal_time: float | None = None


class Step(NamedTuple):
    """One step of plugging in.

    An adapter may send the commands of two steps in one write: the first step's `do` sends both and
    awaits its own answer, the second's awaits the other. Where the first is refused its `do` has to
    see that the second came to nothing too, or raise Unsettled.

    :ivar name: what errors and the log call it.
    :ivar do: carries it out. When that raises one of pyblock's errors (but for Unsettled, and a
        TransportError whose request was sent), all is as it was before the step.
    :ivar undo: takes it back when a later step failed; None where there is nothing to take back.
    """

    name: str
    do: Callable[[], Awaitable[None]]
    undo: Callable[[], Awaitable[None]] | None = None


class FoundDisk(msgspec.Struct, frozen=True):
    """A disk that the machine has, and that is none of ours.

    :ivar id: the drive ID that nobody else can have beside it, "" where it takes none.
    :ivar family: whose names it uses up in the guest.
    :ivar occupies: the block index whose drive could not be plugged in beside it (on SCSI the seat
        follows from the index); None for none.
    """

    id: str
    family: Family
    occupies: int | None = None


class Held(msgspec.Struct, frozen=True):
    """What the machine has of a drive.

    :ivar whole: the guest has it, or may have it; False: only what is behind it is there.
    :ivar driver: one that can remove it.
    :ivar cold: it was there when the machine started, so it is nobody's to remove.
    :ivar image: what it has open, where the VMM can tell.
    """

    whole: bool
    driver: Driver
    cold: bool = False
    image: Identity | None = None


class Inventory(msgspec.Struct, frozen=True):
    """What a machine has now.

    :ivar disks: the strangers: its own disks, and whatever others plugged in. A drive of ours that
        was plugged in while the machine was being asked may be among them, by our drive ID.
    :ivar held: by our drive ID: what is there of the drives that were asked about, of those that
        were plugged in meanwhile, and of what is only named as ours. A VMM that calls them
        otherwise translates.
    :ivar files: the host's paths that its disks use.
    :ivar images: what its disks have open, as far as the VMM can tell.
    :ivar machine: what two addresses of one machine have in common; "" where that cannot be told.

    A place that waits for an image (a pool's member) is neither a stranger nor held: it has had its
    name since boot, and uses up no other.
    """

    disks: list[FoundDisk] = []
    held: dict[str, Held] = {}
    files: frozenset[str] = frozenset()
    images: frozenset[Identity] = frozenset()
    machine: str = ""


class Hypervisor(Protocol):
    """One machine's VMM. Every method may raise TransportError; none takes a deadline, since the
    operations around them outlive theirs.

    An adapter says `steps`, `request_removal`, `removed` and `remove_rest`; `plug` and `unplug`,
    which are called, are made of them here.
    """

    @property
    @abstractmethod
    def offers(self) -> Mapping[str, Offer]:
        """By the names of the drivers that this VMM has: what each can do here."""

    @property
    @abstractmethod
    def address(self) -> str:
        """What finds this machine again from another process, as `open_hypervisor` takes it; ""
        when nothing does."""

    @property
    def lanes(self) -> int | None:
        """How many drives it is to be given at once to plug in; None for any number. Each has its
        image open until then."""
        return None

    @property
    def waits_for(self) -> str:
        """What it waits for now, in words for whoever loses patience; "" where it knows of
        nothing."""
        return ""

    @property
    def losses(self) -> int:
        """How many connections were lost so far. At each the machine may have been started anew,
        whether anybody waited for it or not."""
        return 0

    def watch(self, lost: Callable[[TransportError], None] | None) -> None:
        """Has `lost` be called whenever a connection breaks, as soon as that is seen; None: nobody
        any more. An adapter that only sees it when it next asks need not."""
        return None

    @abstractmethod
    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        """Connects where that is needed, and lists what the machine has now. Changes nothing.

        :param ours: the drives that are known to be plugged in and have nothing under way; where
            they sit need not be looked at.
        """

    @abstractmethod
    async def is_gone(self) -> bool:
        """Whether nothing answers at its address any more: its socket is absent, or nobody listens
        there. Changes nothing, and is not answered by waiting."""

    def take(self, drive: BlockDrive) -> None:
        """Takes note of the place of a drive that was plugged in before this adapter was opened: it
        stays taken until it is given back. Raises InvalidValue for a place that is none."""
        return None

    def recognize(self, drive: BlockDrive) -> None:
        """Fills in the guest match, and the place, of a drive that another program plugged in, as
        far as its address alone tells them. Asks nothing, takes nothing; `locate` asks."""
        return None

    def give_back(self, drive: BlockDrive) -> None:
        """Takes note that a drive's place is free: the machine has nothing of it. It may never have
        had one."""
        return None

    @abstractmethod
    async def place(self, drive: BlockDrive) -> Place:
        """Chooses and takes a place for a drive, or raises SlotsExhausted; sends nothing that
        changes the machine.

        Where the VMM itself chooses, the place is empty, a step has the drive `sit`, and
        SlotsExhausted comes from there. Until then, and for whoever takes up a record that was
        written before, the drive has to be found without its place: by its ID or its image.
        """

    @abstractmethod
    def steps(self, drive: BlockDrive, image: OpenedImage) -> Sequence[Step]:
        """The steps of plugging in a drive that has its place, in their order.

        :param image: what was claimed for it, open as the drive is (read-only or not). It is closed
            when the last step is done; an adapter that needs it no longer may close it before.
        """

    @abstractmethod
    async def request_removal(self, drive: BlockDrive) -> bool:
        """Asks for the removal of a drive; False when the machine has nothing that could be asked
        to leave. VmmRefused: it stays."""

    async def removed(self, drive: BlockDrive) -> None:
        """Returns when the removal that was asked for is confirmed, by whatever confirms it on this
        VMM; VmmRefused when the guest declined it. At once where the VMM has no word for that
        (`Offer.removal` is "forced").

        A TransportError says that no confirmation can come any more. Where it can be asked for
        again, asking again is this method's (`Poller`): a question that fails says nothing about
        the drive.
        """
        return None

    async def remove_rest(self, drive: BlockDrive) -> None:
        """Removes what the machine keeps of a drive that has left the guest; content when there is
        nothing."""
        return None

    async def plug(self, drive: BlockDrive, image: OpenedImage) -> None:
        """Plugs in a drive that has its place, and fills in where it went. On an error nothing is
        left behind, except on Unsettled."""
        done: list[Step] = []
        began = time.monotonic()
        for step in self.steps(drive, image):
            try:
                await step.do()
                if log.isEnabledFor(logging.DEBUG):
                    began = _tell(step.name, drive, began)
            except Exception as error:
                what = _sorted(step.name, drive, error, sent=bool(done))
                if isinstance(what, PyblockError):
                    await _undo(done, what)
                raise what from (error if what is not error else error.__cause__)
            done.append(step)
        drive.fresh = False
        try:
            await self.locate(drive)
        except Exception as error:  # it is plugged in: whatever went wrong, the VMM has it
            raise _unsettled("locating it", drive, error) from error

    async def unplug(self, drive: BlockDrive) -> None:
        """Removes whatever the machine has of a drive; returns when it is confirmed gone. Unsettled
        when that is not known. VmmRefused: the VMM keeps it, if its `keeps` says so."""
        began = time.monotonic()
        try:
            doing = "asking for the removal"
            asked = await self.request_removal(drive)
            if log.isEnabledFor(logging.DEBUG):
                began = _tell(doing, drive, began)
            if asked:
                doing = "waiting for the removal"
                await self.removed(drive)
                if log.isEnabledFor(logging.DEBUG):
                    began = _tell(doing, drive, began)
            elif drive.imported:
                doing = "looking for it under other names"
                await self._check_names(drive)
        except VmmRefused as refusal:
            refusal.keeps = True
            raise
        except Exception as error:
            what = _sorted(doing, drive, error, sent=doing != "asking for the removal")
            raise what from (error if what is not error else error.__cause__)
        try:
            await self.remove_rest(drive)
            if log.isEnabledFor(logging.DEBUG):
                _tell("removing what is left", drive, began)
        except Exception as error:
            # it has left the guest, but not all of it has left the VMM: neither attached nor free
            raise _unsettled("removing what is left", drive, error) from error

    async def locate(self, drive: BlockDrive) -> None:
        """Fills in the addresses that only the VMM knows, of a drive that is plugged in. Changes
        nothing in the machine."""
        return None

    def nudge(self, drive: BlockDrive) -> None:
        """Has an `unplug` that waits for its confirmation ask the guest once more."""
        return None

    async def close(self) -> None:
        """Ends the connection, if there is one. The machine keeps what it has; a later call
        connects again."""
        return None

    async def _check_names(self, drive: BlockDrive) -> None:
        """Raises VmmRefused when the machine has nothing under the names that an imported drive may
        have, but its image under another: to take that for gone would free an image that the guest
        goes on writing."""
        found = await self.inventory([drive])
        if drive.id not in found.held and drive.file in found.files:
            raise VmmRefused(
                f"the machine has no drive {drive.id}, but has its image {drive.file!r} in use "
                "under a name that whoever plugged it in did "
                "not tell; it stays attached until it is unplugged there",
                step="device-del",
                request=drive.id,
                reply="in use under another name",
                **drive.facts,
            )


async def _undo(done: list[Step], error: PyblockError) -> None:
    """Takes back what was done, the last first. Trouble with that is added to the error, which is
    Unsettled by it."""
    try:
        for step in reversed(done):
            if step.undo is not None:
                await step.undo()
    except Exception as trouble:
        error.add_note(
            "undoing it failed too: "
            f"{trouble if isinstance(trouble, PyblockError) else repr(trouble)}"
        )
        raise Unsettled(error) from error


def _sorted(doing: str, drive: BlockDrive, error: Exception, *, sent: bool) -> Exception:
    """What the error of a step is, after whose refusal all is as it was before it. Whatever is no
    refusal may have been carried out.

    :param sent: something was sent before; else the error tells.
    """
    if isinstance(error, TransportError) and (sent or error.sent):
        return Unsettled(error)
    return error if isinstance(error, PyblockError | Unsettled) else _unsettled(doing, drive, error)


def _tell(step: str, drive: BlockDrive, began: float) -> float:
    """Logs a step; returns when it was over, which is when the next one begins."""
    now = time.monotonic()
    facts = {
        "sandbox": SANDBOX.get(),
        "device": drive.info.id,
        "drive": drive.id,
        "step": step,
        "seconds": now - began,
    }
    log.debug(
        "sandbox %(sandbox)s: drive %(drive)s: %(step)s took %(seconds).6f s", facts, extra=facts
    )
    return now


def _unsettled(doing: str, drive: BlockDrive, error: Exception) -> Unsettled:
    return Unsettled(fault(f"drive {drive.id}: {doing}", error))
