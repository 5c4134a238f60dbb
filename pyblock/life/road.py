"""The one road of every operation: what is intended is written down, the VMM is asked, the outcome
is written down.

Each operation runs in a task of its own, so that its caller may go away at any moment. Cut off
before the VMM was touched it has changed nothing; after, nobody knows, and everything stays taken.
What follows a failure stands in table.FOLLOWS.
"""

from __future__ import annotations

import asyncio
import contextlib

from pyblock.errors import (
    AttachCountExhausted,
    NotAttached,
    NotReleased,
    PyblockError,
    SandboxClosed,
    StoreBusy,
    TransportError,
    VmmRefused,
)
from pyblock.life.device import BlockDevice
from pyblock.life.machine import Machine
from pyblock.life.table import (
    ATTACH_COUNT_MAX,
    FOLLOWS,
    GOING,
    PENDING,
    Aim,
    End,
    Event,
    Failure,
    Phase,
    Stage,
)
from pyblock.tasks import SANDBOX, Operation, Waiters, given, over
from pyblock.vmm.base import Unsettled

# Seconds that a cancelled call waits for what it leaves behind to be written down, before its
# caller goes on.
CORRECTING = 1.0

_LATER = "the deadline passed; it will be undone as soon as the VMM answers"
_AGAIN = "the VMM did not confirm the removal before the deadline; call detach again to resume"
_CUT_OFF = "it was cut off before the VMM answered"


async def attach(machine: Machine, device: BlockDevice, deadline: float | None) -> bool:
    """Counts one attach; the first plugs the device in. Returns when the VMM has it; False when the
    device ended while this waited for its turn, so that another one is to be made.

    :param deadline: event-loop time in seconds, or None.
    Raises what the machine raises, having undone everything; AttachPending when the deadline passes
    (the attach is then undone by itself as soon as the VMM answers) or the connection breaks
    half-way;
    AttachPending or DetachPending when an earlier outcome is not known yet; AttachCountExhausted;
    ImageInUse or StoreError before the VMM was touched. Cancelled, it is undone.
    """
    if device.operation is not None:
        await turn(machine, device, deadline)
    if device.phase is Phase.ATTACHED:
        await _count(machine, device, 1, deadline)
        return True
    if device.drive is not None:
        raise machine.about(device.pending("settle it with detach first"))
    if machine.manager.by_id.get(device.id) is not device:
        return False
    machine.take(device)
    operation = Attach(machine, device, deadline, undoing=True)  # should its caller go away
    try:
        await operation.outcome(deadline, _LATER)
    except asyncio.CancelledError:
        if operation.succeeded and not operation.abandoned:
            # in the very moment of the cancellation
            await over(asyncio.ensure_future(_take_back(machine, device)))
        raise
    return True


async def detach(
    machine: Machine, device: BlockDevice, deadline: float | None, *, released: bool = False
) -> bool:
    """Takes one attach back; the last unplugs the device. Returns when the VMM says that it is
    gone;
    True when others are left.

    :param released: the guest has let go of it, which some VMMs cannot tell.
    Raises NotAttached, NotReleased; what the machine raises when the device is kept (it stays
    attached); DetachPending when the deadline passes or the connection breaks: everything stays
    taken, calling again resumes, and a late confirmation finishes the job by itself.
    """
    operation = device.operation
    removing = isinstance(operation, Road) and operation.stage is Stage.REMOVING
    if isinstance(operation, Road) and operation.abandoned and (removing or device.phase in GOING):
        operation.undoing = False  # somebody wants it gone, and is to hear of that
        if device.phase in PENDING:
            machine.move(device, Event.DETACH)
        if removing:
            machine.nudge(device.held)
    else:
        if operation is not None:
            await turn(machine, device, deadline)
        machine.check()
        if device.phase is Phase.DETACHED:
            text = f"device {device.id} is not attached; every detach needs an attach of its own"
            raise machine.about(NotAttached(text), device)
        if device.phase is Phase.ATTACHED and device.attach_count > 1:
            await _count(machine, device, -1, deadline)
            return True
        offer = machine.vmm.offers.get(device.info.driver or "")
        if offer is not None and offer.removal == "forced" and not released:
            raise machine.about(_not_released(device))
        if device.phase in PENDING:
            machine.move(device, Event.DETACH)
        operation = Removal(machine, device, deadline)
    await operation.outcome(deadline, _AGAIN)
    return False


def _not_released(device: BlockDevice) -> NotReleased:
    text = (
        f"device {device.id}: this VMM takes a disk away without a word from the guest; have the "
        "guest "
        "unmount and close it, then detach it with released=True"
    )
    return NotReleased(text, **device.facts)


def free(machine: Machine, device: BlockDevice) -> None:
    """Takes note that the VMM has nothing of it; nothing may be under way. What it took is given
    back, and the device ends."""
    machine.give_back(
        device, Event.LOST if device.phase is Phase.ATTACHED else Event.GONE, End.LATE
    )


def reclaim(machine: Machine, device: BlockDevice, *, whole: bool) -> Operation:
    """Has whatever the VMM has of it removed, for nobody in particular; nothing may be under way.

    :param whole: the VMM has all of it. If it then does not let go of a device that nobody has, its
        attach is thereby finished.
    """
    return Removal(machine, device, None, Waiters.ABANDONED, whole=whole)


class Road(Operation):
    """An operation of one device, which begins with the object.

    :ivar stage: how far it got. Until ACTING it keeps to its caller's deadline by itself, and
        changes nothing when it fails.
    """

    __slots__ = ("_deadline", "_device", "_machine", "stage")

    def __init__(
        self,
        machine: Machine,
        device: BlockDevice,
        deadline: float | None,
        waiters: Waiters = Waiters.AWAITED,
        *,
        undoing: bool = False,
    ) -> None:
        super().__init__(waiters, undoing=undoing)
        self.stage = Stage.WRITING
        self._machine = machine
        self._device = device
        self._deadline = deadline
        device.operation = self  # before the work, which may be over at once, takes it away
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def outcome(self, deadline: float | None, why: str) -> None:
        """Waits for it. When the deadline passes, or the caller goes away, while the VMM has it in
        hand, it is pending: AttachPending or DetachPending, saying `why`."""
        while True:
            try:
                return await self.result(deadline)
            except TimeoutError:
                if self.done:  # in the very moment of the deadline
                    return await self.result(None)
                if (
                    self.undoing
                    and self._device.phase is Phase.ATTACHED
                    and self._device.said_count
                ):
                    # it is written down, with another device: what it waits for changes nothing
                    return None
                if self.stage >= Stage.ACTING:
                    _give_up(self._machine, self._device)
                    raise self._pending(why).about(timeout=given(deadline)) from None
                deadline = None  # until then, the work keeps to the deadline itself
            except asyncio.CancelledError:
                if self.abandoned and self.stage >= Stage.ACTING:
                    _give_up(self._machine, self._device)
                    if self._device.said_count and self._device.phase is Phase.ATTACH_PENDING:
                        await _correct(self._machine, self._device)
                raise

    async def _step(self, aim: Aim, deadline: float | None) -> bool:
        """Writes down what is intended, and has the VMM do it. False: nobody waits for it any more,
        so the VMM was not touched, and all is as before."""
        machine, device = self._machine, self._device
        SANDBOX.set(machine.id)
        begun = False
        try:
            if aim is Aim.PLUG:
                await machine.intend(device, deadline)
            elif aim is Aim.UNPLUG or device.said_count:
                await machine.write(device, deadline)
            abandoned = self.waiters is Waiters.ABANDONED
            if not (aim is Aim.PLUG and abandoned):
                if (
                    machine.ledger is not None
                    and deadline is not None
                    and deadline <= asyncio.get_running_loop().time()
                ):
                    raise self._too_late(deadline)
                if abandoned:
                    _unsure(machine, device)
                begun = True  # from here on the VMM is touched
                self.stage = Stage.ACTING if aim is Aim.PLUG else Stage.REMOVING
                await (machine.plug(device) if aim is Aim.PLUG else machine.unplug(device.held))
        except BaseException as error:
            why = error.error if isinstance(error, Unsettled) else error
            machine.about(why, device)
            failure = _failure(error) if begun else Failure.UNSENT
            event = FOLLOWS[aim, failure]
            if event is not Event.UNKNOWN:
                await self._follow(event, why)
            else:
                _unsure(machine, device, why)
                if failure is Failure.UNSENT:
                    machine.doubt()  # else nothing would settle it
                    # what is written for others may have taken this along
                    await machine.write_soon(device)
            self._raise(error, failure, event)
        if not begun:
            await self._follow(Event.UNDONE, None)
        return begun

    def _too_late(self, deadline: float) -> StoreBusy:
        """What to raise when writing took all the time there was."""
        text = "the deadline passed while the store was being written; nothing was changed"
        return StoreBusy(f"device {self._device.id}: {text}", timeout=given(deadline))

    async def _follow(self, event: Event, error: BaseException | None) -> None:
        if event is Event.UNDONE:
            self._machine.give_back(self._device, event, End.UNDONE, error)
        else:
            self._machine.move(self._device, event, error)
        # what is written for others may have taken this along
        await self._machine.write_soon(self._device)

    def _raise(self, error: BaseException, failure: Failure, event: Event) -> None:
        """Raises what the caller is to see of an error."""
        if isinstance(error, asyncio.CancelledError):
            if event is Event.UNKNOWN:
                raise self._pending(_CUT_OFF) from None
            raise self._unwritten() from None
        if isinstance(error, Unsettled):
            raise self._unknown(error.error) from error.error
        if failure is Failure.UNKNOWN and isinstance(error, Exception):
            raise self._pending(f"what was to do it failed: {error!r:.200}") from error
        raise error

    def _unknown(self, error: PyblockError) -> PyblockError:
        """A refusal stays what it is, since its caller asks for it; of what else happened, that the
        outcome is open says more."""
        if not isinstance(error, VmmRefused):
            return self._pending(str(error))
        text = (
            f"the VMM may still hold part of device {self._device.id}; what it took stays taken "
            "until detach has settled it"
        )
        error.add_note(text)
        return error

    def _pending(self, why: str) -> PyblockError:
        return self._machine.about(self._device.pending(why))

    def _unwritten(self) -> PyblockError:
        text = (
            f"device {self._device.id}: the sandbox was closed before the VMM was touched; "
            "nothing was changed"
        )
        return self._machine.about(SandboxClosed(text), self._device)

    async def _take_out(self, aim: Aim, deadline: float | None) -> None:
        """Has the VMM remove what it has of it."""
        await self._step(aim, deadline)
        left = self.waiters is not Waiters.AWAITED and not self.undoing
        counted = self._device.attach_count > 0
        end = End.LATE if left else End.DETACHED if counted else End.UNDONE
        self._machine.give_back(self._device, Event.GONE, end)
        await self._machine.write_soon(self._device)


class Attach(Road):
    """The first attach of a device."""

    __slots__ = ()

    async def work(self) -> None:
        device = self._device
        try:
            if not await self._step(Aim.PLUG, self._deadline):
                return
            trouble = await self._written() if device.phase is Phase.ATTACHING else None
            if device.phase is not Phase.ATTACHED:
                # its caller gave it up, or it could not be written down
                await self._undo(trouble)
        finally:
            device.operation = None

    async def _written(self) -> Exception | None:
        """Writes down that it is attached; the trouble with that, if there is any: should this
        process die then, nobody would know of it."""
        machine, device = self._machine, self._device
        machine.move(device, Event.PLUGGED)
        device.attach_count = 1
        try:
            if machine.ledger is not None:
                await machine.ledger.write(device.id)
        except asyncio.CancelledError:
            # the sandbox is being closed; whoever opens it next may find the intent only
            _give_up(machine, device)
            await machine.write_soon(device)
            raise self._pending("it was cut off before it was written down") from None
        except Exception as error:
            if device.phase is Phase.ATTACHED and device.said_count:
                return None  # it is written down all the same
            _give_up(machine, device, error)
            return error
        return None

    async def _undo(self, trouble: Exception | None) -> None:
        try:
            await self._take_out(Aim.UNDO, None)
        except PyblockError as error:
            if trouble is None:
                raise
            trouble.add_note(f"undoing it failed too: {error}")
        if trouble is not None:
            raise trouble


class Removal(Road):
    """The last detach of a device, or the end of what nobody has."""

    __slots__ = ("_aim", "_whole")

    def __init__(
        self,
        machine: Machine,
        device: BlockDevice,
        deadline: float | None,
        waiters: Waiters = Waiters.AWAITED,
        *,
        undoing: bool = False,
        whole: bool = False,
    ) -> None:
        self._whole = whole
        self._aim = Aim.RESUME if device.attach_count else Aim.UNDO
        if device.phase is Phase.ATTACHED:
            self._aim = Aim.UNPLUG
            machine.move(device, Event.DETACH)
        super().__init__(machine, device, deadline, waiters, undoing=undoing)

    async def work(self) -> None:
        try:
            await self._take_out(self._aim, self._deadline)
        except VmmRefused as error:
            if self._whole and self._aim is Aim.UNDO and error.keeps:
                self.stage = Stage.OVER  # a detach that comes now asks anew
                await self._finish()
            raise
        finally:
            self._device.operation = None

    async def _finish(self) -> None:
        """The VMM has it whole and does not let it go: so it is attached."""
        await self._machine.locate(self._device.held)
        self._machine.move(self._device, Event.KEPT)
        self._device.attach_count = 1
        await self._machine.write_soon(self._device)


class Count(Road):
    """A further attach, or a detach that is not the last: only written down."""

    __slots__ = ("_more",)

    def __init__(
        self, machine: Machine, device: BlockDevice, deadline: float | None, more: int
    ) -> None:
        self._more = more
        super().__init__(machine, device, deadline)

    async def work(self) -> None:
        machine, device = self._machine, self._device
        device.attach_count += self._more
        machine.touch(device)
        try:
            try:
                await machine.write(device, self._deadline)
            except BaseException as error:
                cut_off = isinstance(error, asyncio.CancelledError)
                if cut_off or device.said_count != device.attach_count:
                    # else it was written along with another
                    device.attach_count -= self._more
                    await machine.write_soon(device)
                    if cut_off:
                        raise self._unwritten() from None
                    raise
            if self._more < 0:
                machine.drop(device)
            elif self.abandoned:  # whoever would have detached it has gone
                device.attach_count -= self._more
                machine.touch(device)
                await _correct(machine, device)
        finally:
            device.operation = None


async def turn(machine: Machine, device: BlockDevice, deadline: float | None) -> None:
    """Returns when nothing is under way on the device. Raises StoreBusy, AttachPending or
    DetachPending past the deadline."""
    while (operation := device.operation) is not None and not operation.done:
        try:
            await operation.settled(deadline)
        except TimeoutError:
            if device.phase is Phase.ATTACHED:
                text = (
                    "the deadline passed while its count was being written for another; nothing "
                    "was changed"
                )
                raise machine.about(
                    StoreBusy(f"device {device.id}: {text}", timeout=given(deadline)), device
                ) from None
            why = "the deadline passed while an earlier operation on it was under way"
            raise machine.about(device.pending(why)).about(timeout=given(deadline)) from None


async def _count(machine: Machine, device: BlockDevice, more: int, deadline: float | None) -> None:
    if more > 0 and device.attach_count >= ATTACH_COUNT_MAX:
        text = (
            f"device {device.id} is attached {device.attach_count} times, which is all the count "
            "can hold"
        )
        raise machine.about(AttachCountExhausted(text), device)
    machine.check()
    if machine.ledger is None:
        device.attach_count += more
        if more < 0:
            machine.drop(device)
        return
    operation = Count(machine, device, deadline, more)
    try:
        await operation.result(None)  # it keeps to the deadline
    except asyncio.CancelledError:
        if more > 0 and not operation.done:
            # it takes the count back, and the row may have it already
            with contextlib.suppress(TimeoutError):
                await operation.settled(asyncio.get_running_loop().time() + 2 * CORRECTING)
        elif more > 0 and operation.succeeded and not operation.abandoned:
            # in the very moment of the cancellation
            await over(asyncio.ensure_future(_take_back(machine, device)))
        raise


async def _take_back(machine: Machine, device: BlockDevice) -> None:
    """Takes back an attach that succeeded when nobody was there any more to hear of it; returns
    when that is written down, or will be.

    Others may have had their turn since: a detach of theirs may be counting, and the disk may be
    lost.
    """
    await turn(machine, device, None)
    if device.phase is not Phase.ATTACHED:
        return
    if device.attach_count > 1:
        device.attach_count -= 1
        machine.touch(device)
    else:
        _give_up(machine, device)
        Removal(machine, device, None, Waiters.ABANDONED, undoing=True)
    await _correct(machine, device)


def _give_up(machine: Machine, device: BlockDevice, error: BaseException | None = None) -> None:
    """Takes note that its caller was told that the outcome is open, or has gone: an attach is then
    to be undone, not to be finished."""
    _unsure(machine, device, error)
    if device.phase is Phase.ATTACH_PENDING:
        device.attach_count = 0
        machine.touch(device)


def _unsure(machine: Machine, device: BlockDevice, error: BaseException | None = None) -> None:
    """The outcome is not known, or nobody hears of it."""
    if device.phase not in PENDING:
        machine.move(device, Event.UNKNOWN, error)


async def _correct(machine: Machine, device: BlockDevice) -> None:
    """Has a row that says more than is so say it no more, before its caller is told: should this
    process die then, nobody would have what it says. Waits a moment for the store's lock, and else
    has it written later."""
    try:
        await machine.write(device, asyncio.get_running_loop().time() + CORRECTING)
    except PyblockError:
        await machine.write_soon(device)


def _failure(error: BaseException) -> Failure:
    if isinstance(error, TransportError):
        return Failure.UNREACHED
    return Failure.REFUSED if isinstance(error, PyblockError) else Failure.UNKNOWN
