"""The life of a block device in one sandbox: attach, detach, counts.

The logic exists once and does no I/O of its own: it reserves, calls the receiver, then commits or rolls back. LIFE is the table of what
may follow what; docs draw their diagram from it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from pyblock.errors import (
    AttachCountExhausted,
    AttachPending,
    DetachPending,
    NotAttached,
    PyblockError,
    SandboxClosed,
    StoreBusy,
    TransportError,
    VmmRefused,
)
from pyblock.hypervisors.base import Unsettled
from pyblock.table import ATTACH_COUNT_MAX, PENDING, Event, Phase, after
from pyblock.tasks import Operation, over

if TYPE_CHECKING:
    from pyblock.generic import GenericDevice
    from pyblock.lineage import Identity
    from pyblock.model import BlockDrive, DeviceInfo
    from pyblock.state import DeviceState

CORRECTING = 1.0  # seconds that a cancelled call waits for what it leaves behind to be written down, before its caller goes on


_NEW = Phase.DETACHED  # bound once: a member of an enum takes three times as long as a name


class Forgotten(Exception):
    """Raised by a receiver's `reserve` when the device ended while an attach of it waited for its turn: another one is to be made."""


class DeviceReceiver(Protocol):
    """Whatever devices are attached to. What it writes down outlives the process; one without a store writes nothing."""

    __slots__ = ()

    @property
    def records(self) -> bool:
        """Whether it writes anything down."""

    def check(self) -> None:
        """Raises SandboxClosed unless it takes anything on."""

    def touch(self, device: BlockDevice) -> None:
        """Takes note that the device stands otherwise than it is written down."""

    def doubt(self) -> None:
        """Has the machine asked what it has before it is next changed, and what is then found pending settled."""

    def drop(self, device: BlockDevice) -> None:
        """Takes note that the device has one user less."""

    def reserve(self, device: BlockDevice) -> BlockDrive:
        """Takes index, ordinal and drive ID for a device. No I/O. Raises a CapacityError or CallerError, having taken nothing."""

    def release(self, device: BlockDevice, drive: BlockDrive, *, late: bool, counted: bool) -> None:
        """Gives back what `reserve` took, the device being detached.

        :param late: a detach ended whose caller was told that it is pending, or went away.
        :param counted: it was attached, and this was its last detach; else an attach was undone.
        """

    async def claim(self, device: BlockDevice, deadline: float | None) -> None:
        """Chooses the drive's place, writes down that the device is to be attached, and claims its image.

        Raises SlotsExhausted, ImageInUse, StoreError (StoreBusy past the deadline), TransportError, having changed nothing.
        """

    async def record(self, device: BlockDevice | GenericDevice, deadline: float | None = None) -> None:
        """Writes down how the device stands, sets its `said_count`, and returns when that is done. Raises StoreError."""

    async def note(self, device: BlockDevice) -> None:
        """The same for what need not be waited for: tries once, and else has it written in the background. Raises nothing."""

    async def plug(self, device: BlockDevice) -> None:
        """Opens what was claimed for the device, plugs its drive in and fills in the addresses really used. On an error nothing is left in
        the VMM, except on Unsettled.

        Raises InvalidImage, DescriptorsExhausted; ImageReplaced when the path leads to something else by now.
        """

    async def unplug(self, drive: BlockDrive) -> None:
        """Removes whatever the VMM has of a drive; returns when the VMM says that it is gone. Unsettled: not known; other errors: it is
        kept."""

    async def locate(self, drive: BlockDrive) -> None:
        """Fills in the addresses really used of a drive that the VMM has. Raises TransportError."""

    def nudge(self, drive: BlockDrive) -> None:
        """Has a removal that is under way asked for once more."""


class BlockDevice:
    """A disk that can be attached to one receiver, any number of times at once.

    :ivar id: the device ID.
    :ivar info: what the caller asked for.
    :ivar identity: what makes two devices the same; None for one out of a saved state whose image was not looked at.
    :ivar under: what lies under it, and its other names.
    :ivar drive: how the receiver presents it; None while it is detached.
    :ivar phase: where it stands in LIFE.
    :ivar attach_count: attaches that no detach stands against yet.
    :ivar ref_count: how many users the manager has given it to.
    :ivar saved: the saved state it came from, kept for what pyblock does not know; None otherwise.
    :ivar said_count: the count that is written down, where what is written says that it is attached: before a removal is asked for, it must
        not. It may have been written along with another device's row.
    """

    __slots__ = (
        "_operation", "attach_count", "drive", "id", "identity", "info", "phase", "ref_count", "said_count", "saved", "under",
    )  # fmt: skip

    def __init__(self, device_id: str, info: DeviceInfo, identity: Identity | None = None, under: tuple[Identity, ...] = ()) -> None:
        self.id = device_id
        self.info = info
        self.identity = identity
        self.under = under
        self.drive: BlockDrive | None = None
        self.phase = _NEW
        self.attach_count = 0
        self.ref_count = 0
        self.saved: DeviceState | None = None
        self.said_count = 0
        self._operation: Operation | None = None

    def __repr__(self) -> str:
        return f"<BlockDevice {self.id} {self.phase} count={self.attach_count} {self.info.path!r}>"

    async def attach(self, receiver: DeviceReceiver, deadline: float | None) -> None:
        """Counts one attach; the first plugs the device in. Returns when the VMM has it.

        :param deadline: event-loop time in seconds, or None.
        Raises what the receiver raises, having undone everything; AttachPending when the deadline passes (the attach is then undone by
        itself as soon as the VMM answers) or the connection breaks half-way; AttachPending or DetachPending when an earlier outcome is
        not known yet; AttachCountExhausted; ImageInUse or StoreError before the VMM was touched. Cancelled, it is undone.
        """
        await self._turn(deadline)
        if self.phase is Phase.ATTACHED:
            if self.attach_count >= ATTACH_COUNT_MAX:
                raise AttachCountExhausted(f"device {self.id} is attached {self.attach_count} times, which is all the count can hold")
            await self._count(receiver, 1, deadline)
            return
        if self.drive is not None:
            raise self._pending("settle it with detach first")
        self.drive = receiver.reserve(self)
        self._move(Event.ATTACH)
        operation = Operation(undoing=True)  # should its caller go away
        self._start(operation, self._plug(receiver, operation, deadline))
        try:
            await self._result(receiver, operation, deadline, "the deadline passed; it will be undone as soon as the VMM answers")
        except asyncio.CancelledError:
            if operation.succeeded and not operation.abandoned:  # in the very moment of the cancellation
                await over(asyncio.ensure_future(self._take_back(receiver)))
            raise

    async def detach(self, receiver: DeviceReceiver, deadline: float | None) -> bool:
        """Takes one attach back; the last unplugs the device. Returns when the VMM says that it is gone; True when others are left.

        Raises NotAttached; what the receiver raises when the device is kept (it stays attached); DetachPending when the deadline passes
        or the connection breaks: everything stays taken, calling again resumes, and a late confirmation finishes the job by itself.
        """
        operation = self._operation
        if operation is not None and operation.abandoned and (operation.removing or self.phase in (Phase.DETACHING, Phase.DETACH_PENDING)):
            operation.undoing = False  # somebody wants it gone, and is to hear of that
            if self.phase in PENDING:
                self._move(Event.DETACH)
            if operation.removing:
                receiver.nudge(self.held)
        else:
            await self._turn(deadline)
            receiver.check()
            if self.phase is Phase.DETACHED:
                raise NotAttached(f"device {self.id} is not attached; every detach needs an attach of its own")
            if self.phase is Phase.ATTACHED and self.attach_count > 1:
                await self._count(receiver, -1, deadline)
                return True
            if self.phase in PENDING:
                self._move(Event.DETACH)
            operation = self._remove(receiver, deadline, Operation())
        why = "the VMM did not confirm the removal before the deadline; call detach again to resume"
        await self._result(receiver, operation, deadline, why)
        return False

    def free(self, receiver: DeviceReceiver) -> None:
        """Takes note that the VMM has nothing of it; nothing may be under way. What it took is given back, and the device ends."""
        self._free(receiver, Event.LOST if self.phase is Phase.ATTACHED else Event.GONE, late=True)

    def reclaim(self, receiver: DeviceReceiver, *, whole: bool) -> Operation:
        """Has whatever the VMM has of it removed, for nobody in particular; nothing may be under way.

        :param whole: the VMM has all of it. If it then does not let go of a device that nobody has, its attach is thereby finished.
        """
        return self._remove(receiver, None, Operation(abandoned=True), whole=whole)

    @property
    def operation(self) -> Operation | None:
        """The attach or detach of it that is under way, if there is one."""
        return self._operation

    @property
    def attached(self) -> bool:
        """True while the VMM is known to have it and nothing is under way."""
        return self.phase is Phase.ATTACHED

    @property
    def held(self) -> BlockDrive:
        """The drive of a device that holds one."""
        if self.drive is None:
            raise NotAttached(f"device {self.id} is not attached and has no drive")
        return self.drive

    async def _turn(self, deadline: float | None) -> None:
        while (operation := self._operation) is not None and not operation.done:
            try:
                await operation.settled(deadline)
            except TimeoutError:
                if self.phase is Phase.ATTACHED:
                    text = f"device {self.id}: the deadline passed while its count was being written for another; nothing was changed"
                    raise StoreBusy(text) from None
                raise self._pending("the deadline passed while an earlier operation on it was under way") from None

    def _start(self, operation: Operation, work: Coroutine[Any, Any, None]) -> None:
        self._operation = operation  # before the work, which may be over at once, takes it away
        operation.start(work)

    async def _result(self, receiver: DeviceReceiver, operation: Operation, deadline: float | None, why: str) -> None:
        while True:
            try:
                return await operation.result(deadline)
            except TimeoutError:
                if operation.done:  # in the very moment of the deadline
                    return await operation.result(None)
                if operation.undoing and self.phase is Phase.ATTACHED and self.said_count:
                    return None  # an attach that is written down, along with another device: what it still waits for changes nothing
                if operation.begun:
                    self._give_up(receiver)
                    raise self._pending(why) from None
                deadline = None  # until it has begun, the work keeps to the deadline itself
            except asyncio.CancelledError:
                if operation.abandoned and operation.begun:
                    self._give_up(receiver)
                    if self.said_count and self.phase is Phase.ATTACH_PENDING:
                        await self._correct(receiver)
                raise

    def _give_up(self, receiver: DeviceReceiver) -> None:
        """Takes note that its caller was told that the outcome is open, or has gone: an attach is then to be undone, not to be finished."""
        self._unsure()
        if self.phase is Phase.ATTACH_PENDING:
            self.attach_count = 0
            receiver.touch(self)

    async def _correct(self, receiver: DeviceReceiver) -> None:
        """Has a row that says more than is so say it no more, before its caller is told: should this process die then, nobody would have
        what it says. Waits a moment for the store's lock, and else has it written later."""
        try:
            await receiver.record(self, asyncio.get_running_loop().time() + CORRECTING)
        except PyblockError:
            await receiver.note(self)

    async def _count(self, receiver: DeviceReceiver, more: int, deadline: float | None) -> None:
        receiver.check()
        if not receiver.records:
            self.attach_count += more
            if more < 0:
                receiver.drop(self)
            return
        operation = Operation()
        self._start(operation, self._recount(receiver, operation, more, deadline))
        try:
            await operation.result(None)  # it keeps to the deadline
        except asyncio.CancelledError:
            if more > 0 and not operation.done:  # it takes the count back, and the row may have it already
                with contextlib.suppress(TimeoutError):
                    await operation.settled(asyncio.get_running_loop().time() + 2 * CORRECTING)
            elif more > 0 and operation.succeeded and not operation.abandoned:  # in the very moment of the cancellation
                await over(asyncio.ensure_future(self._take_back(receiver)))
            raise

    async def _take_back(self, receiver: DeviceReceiver) -> None:
        """Takes back an attach that succeeded when nobody was there any more to hear of it; returns when that is written down, or will be.

        Others may have had their turn since: a detach of theirs may be counting, and the disk may be lost.
        """
        await self._turn(None)
        if self.phase is not Phase.ATTACHED:
            return
        if self.attach_count > 1:
            self.attach_count -= 1
        else:
            self._give_up(receiver)
            self._remove(receiver, None, Operation(abandoned=True, undoing=True))
        await self._correct(receiver)

    async def _recount(self, receiver: DeviceReceiver, operation: Operation, more: int, deadline: float | None) -> None:
        self.attach_count += more
        try:
            try:
                await receiver.record(self, deadline)
            except BaseException as error:
                cut_off = isinstance(error, asyncio.CancelledError)
                if cut_off or self.said_count != self.attach_count:  # else it was written along with another device
                    self.attach_count -= more
                    await receiver.note(self)
                    if cut_off:
                        raise self._unwritten() from None
                    raise
            if more < 0:
                receiver.drop(self)
            elif operation.abandoned:  # whoever would have detached it has gone
                self.attach_count -= more
                await self._correct(receiver)
        finally:
            self._operation = None

    def _remove(self, receiver: DeviceReceiver, deadline: float | None, operation: Operation, *, whole: bool = False) -> Operation:
        """Starts the removal. Without a detach, an attach that is pending stays that: it is undone."""
        unsure = self.phase is not Phase.ATTACHED
        if not unsure:
            self._move(Event.DETACH)
        self._start(operation, self._detach(receiver, operation, deadline, unsure=unsure, whole=whole))
        return operation

    async def _plug(self, receiver: DeviceReceiver, operation: Operation, deadline: float | None) -> None:
        try:
            if not await self._come(receiver, operation, deadline):
                return
            trouble = await self._written(receiver) if self.phase is Phase.ATTACHING else None
            if self.phase is Phase.ATTACHED:
                return
            try:
                await self._take_out(receiver, operation, None, unsure=True)
            except PyblockError as error:
                if trouble is None:
                    raise
                trouble.add_note(f"undoing it failed too: {error}")
            if trouble is not None:
                raise trouble
        finally:
            self._operation = None

    async def _come(self, receiver: DeviceReceiver, operation: Operation, deadline: float | None) -> bool:
        """Claims it and plugs it in. False when nobody waits for it any more before the VMM was touched: nothing is then left of it."""
        try:
            await receiver.claim(self, deadline)
            if wanted := not operation.abandoned:
                self._begin(receiver, operation, deadline)
                await receiver.plug(self)
        except Unsettled as unsettled:
            self._unsure()
            raise self._unknown(unsettled.error) from unsettled.error
        except BaseException as error:
            cut_off = isinstance(error, asyncio.CancelledError)
            if operation.begun and not isinstance(error, PyblockError):
                raise self._broken(error) from _cause(error)
            await self._undone(receiver)
            if cut_off:
                raise self._unwritten() from None
            raise
        if not wanted:
            await self._undone(receiver)
        return wanted

    async def _undone(self, receiver: DeviceReceiver) -> None:
        self._free(receiver, Event.UNDONE if self.phase is Phase.ATTACHING else Event.GONE, late=False)
        await receiver.note(self)

    def _begin(self, receiver: DeviceReceiver, operation: Operation, deadline: float | None) -> None:
        """From here on the VMM is touched. Raises StoreBusy when writing took all the time there was."""
        if receiver.records and deadline is not None and asyncio.get_running_loop().time() >= deadline:
            raise StoreBusy(f"device {self.id}: the deadline passed while the store was being written; nothing was changed")
        operation.begun = True

    async def _written(self, receiver: DeviceReceiver) -> Exception | None:
        """Writes down that it is attached; the trouble with that, if there is any: should this process die then, nobody would know of it.

        It is attached afterwards, or given up: because of the trouble, or by its caller meanwhile.
        """
        self._move(Event.PLUGGED)
        self.attach_count = 1
        try:
            await receiver.record(self)
        except asyncio.CancelledError:  # the sandbox is being closed; whoever opens it next may find the intent only
            self._give_up(receiver)
            await receiver.note(self)
            raise self._pending("it was cut off before it was written down") from None
        except Exception as error:
            if self.phase is Phase.ATTACHED and self.said_count:
                return None  # it is written down all the same
            self._give_up(receiver)
            return error
        return None

    async def _detach(self, receiver: DeviceReceiver, operation: Operation, deadline: float | None, *, unsure: bool, whole: bool) -> None:
        try:
            await self._take_out(receiver, operation, deadline, unsure=unsure)
        except VmmRefused as error:
            if whole and not self.attach_count and error.keeps:
                operation.removing = False  # a detach that comes now asks anew
                await self._finish(receiver)
            raise
        finally:
            self._operation = None

    async def _finish(self, receiver: DeviceReceiver) -> None:
        """The VMM has it whole and does not let it go: so it is attached."""
        await receiver.locate(self.held)
        self._move(Event.KEPT)
        self.attach_count = 1
        await receiver.note(self)

    async def _take_out(self, receiver: DeviceReceiver, operation: Operation, deadline: float | None, *, unsure: bool) -> None:
        """Writes down that it is to go, unless that is written, and has the VMM remove what it has.

        :param unsure: it is not known to be attached, so that it is pending when this comes to nothing.
        """
        try:
            if not unsure or self.said_count:
                await receiver.record(self, deadline)
            self._begin(receiver, operation, deadline)
        except BaseException as error:
            if unsure:
                self._unsure()
                receiver.doubt()  # else nothing would settle it
            else:
                self._move(Event.KEPT)
            await receiver.note(self)  # what is written for others may have taken this along
            if isinstance(error, asyncio.CancelledError):
                raise (self._broken(error) if unsure else self._unwritten()) from None
            raise
        if operation.abandoned:
            self._unsure()
        operation.removing = True
        await self._unplug(receiver, operation, unsure=unsure)

    async def _unplug(self, receiver: DeviceReceiver, operation: Operation, *, unsure: bool) -> None:
        try:
            await receiver.unplug(self.held)
        except Unsettled as unsettled:
            self._unsure()
            raise self._unknown(unsettled.error) from unsettled.error
        except PyblockError as error:
            if self.attach_count and not (unsure and isinstance(error, TransportError)):
                self._move(Event.KEPT)
                await receiver.note(self)
            else:
                self._unsure()
            raise
        except BaseException as error:
            raise self._broken(error) from _cause(error)
        self._free(receiver, Event.GONE, late=operation.left and not operation.undoing)
        await receiver.note(self)

    def _free(self, receiver: DeviceReceiver, event: Event, *, late: bool) -> None:
        drive, counted = self.held, self.attach_count > 0
        self._move(event)
        self.drive = None
        self.attach_count = 0
        receiver.release(self, drive, late=late, counted=counted)

    def _move(self, event: Event) -> None:
        self.phase = after(self.phase, event)

    def _unsure(self) -> None:
        """The outcome is not known, or nobody hears of it."""
        if self.phase not in PENDING:
            self._move(Event.UNKNOWN)

    def _pending(self, why: str) -> AttachPending | DetachPending:
        going = self.phase in (Phase.DETACHING, Phase.DETACH_PENDING)
        what = DetachPending if going else AttachPending
        drive = f" (index {self.drive.index}, drive {self.drive.id})" if self.drive else ""
        stands = "attached, but not written down yet" if self.phase is Phase.ATTACHED else str(self.phase)
        return what(f"device {self.id}{drive} is {stands}, and what it took stays taken: {why}")

    def _broken(self, error: BaseException) -> BaseException:
        """What to raise for what ended in the middle: nobody knows how far it got."""
        self._unsure()
        if isinstance(error, asyncio.CancelledError):
            return self._pending("it was cut off before the VMM answered")
        return self._pending(f"what was to do it failed: {error!r:.200}") if isinstance(error, Exception) else error

    def _unwritten(self) -> SandboxClosed:
        return SandboxClosed(f"device {self.id}: the sandbox was closed before the VMM was touched; nothing was changed")

    def _unknown(self, error: PyblockError) -> PyblockError:
        if isinstance(error, TransportError):
            return self._pending(str(error))
        error.add_note(f"the VMM may still hold part of device {self.id}; what it took stays taken until detach has settled it")
        return error


def _cause(error: BaseException) -> BaseException | None:
    """What is shown as the cause of what `_broken` makes of an error."""
    return error if isinstance(error, Exception) else None


if TYPE_CHECKING:

    class AttachedDevice(BlockDevice):
        """What `attach` returns: a BlockDevice, whose drive is there until it is detached. So a type checker asks nobody to look whether
        it is; when the program runs, both are one class."""

        drive: BlockDrive

else:
    AttachedDevice = BlockDevice
