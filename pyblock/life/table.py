"""What may follow what when a disk comes and goes: pure tables, without a clock, a task or any I/O.

Five small state machines drive a device, and each has one place where its state lives:

- Phase, where a device stands: `BlockDevice.phase`. LIFE says where an Event leads; what it does
  not say cannot be. The phase changes in `Machine.move` and nowhere else.
- Stage, how far an operation got: `Road.stage`. It only grows.
- tasks.Waiters, who hears of an operation's outcome: `Operation.waiters`.
- Failure, how a step of it failed; with Aim, what the step was for, FOLLOWS says which Event that
  is.
- End, how a device came to hold nothing: an argument of `Machine.give_back`, which forgets the
  device or not.

docs/recovery.md draws its diagram from LIFE.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

# The original's count is a Go uint, which JSON readers hold in 64 bits with a sign.
ATTACH_COUNT_MAX = 2**63 - 1


class Phase(StrEnum):
    """Where a device stands."""

    DETACHED = "detached"
    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"
    ATTACH_PENDING = "attach-pending"
    DETACH_PENDING = "detach-pending"


class Event(StrEnum):
    """What moves it on."""

    ATTACH = "first attach"
    PLUGGED = "VMM has it"
    UNDONE = "failed and undone"
    UNKNOWN = "outcome unknown"
    DETACH = "last detach"
    GONE = "VMM says gone"
    KEPT = "refused, VMM keeps it"
    LOST = "VMM has it no more"


LIFE: dict[tuple[Phase, Event], Phase] = {
    (Phase.DETACHED, Event.ATTACH): Phase.ATTACHING,
    (Phase.ATTACHING, Event.PLUGGED): Phase.ATTACHED,
    (Phase.ATTACHING, Event.UNDONE): Phase.DETACHED,
    (Phase.ATTACHING, Event.UNKNOWN): Phase.ATTACH_PENDING,
    (Phase.ATTACH_PENDING, Event.UNDONE): Phase.DETACHED,
    (Phase.ATTACH_PENDING, Event.DETACH): Phase.DETACHING,
    (Phase.ATTACH_PENDING, Event.GONE): Phase.DETACHED,
    (Phase.ATTACH_PENDING, Event.KEPT): Phase.ATTACHED,
    (Phase.ATTACHED, Event.DETACH): Phase.DETACHING,
    (Phase.ATTACHED, Event.LOST): Phase.DETACHED,
    (Phase.ATTACHED, Event.UNKNOWN): Phase.ATTACH_PENDING,
    (Phase.DETACHING, Event.GONE): Phase.DETACHED,
    (Phase.DETACHING, Event.KEPT): Phase.ATTACHED,
    (Phase.DETACHING, Event.UNKNOWN): Phase.DETACH_PENDING,
    (Phase.DETACH_PENDING, Event.DETACH): Phase.DETACHING,
    (Phase.DETACH_PENDING, Event.GONE): Phase.DETACHED,
    (Phase.DETACH_PENDING, Event.KEPT): Phase.ATTACHED,
}

# In these phases an index, an ID, a slot and an address are taken.
HOLDING = frozenset(Phase) - {Phase.DETACHED}
# In these nobody knows what the VMM has, or nobody was told.
PENDING = frozenset({Phase.ATTACH_PENDING, Phase.DETACH_PENDING})
# In these a removal was asked for by a detach.
GOING = frozenset({Phase.DETACHING, Phase.DETACH_PENDING})


class IllegalEvent(RuntimeError):
    """Something happened that cannot happen in that phase: a fault of pyblock's own.

    :ivar phase: where the device stood.
    :ivar event: what is said to have happened.
    """

    def __init__(self, phase: Phase, event: Event) -> None:
        super().__init__(f"'{event}' cannot happen to a device that is {phase}: a fault in pyblock")
        self.phase = phase
        self.event = event


class Stage(IntEnum):
    """How far an operation got. Cut off before ACTING it has changed nothing; after, nobody
    knows."""

    WRITING = 0  # what is intended is being written down
    ACTING = 1  # the VMM is asked, or may be
    REMOVING = 2  # the VMM is asked to remove it
    OVER = 3  # what is left of it changes nothing any more


class Aim(StrEnum):
    """What a step on the road is for."""

    PLUG = "plug in"
    UNPLUG = "remove what is attached"
    RESUME = "remove what a detach left pending"
    UNDO = "remove what nobody has"


class Failure(StrEnum):
    """How a step failed."""

    UNSENT = "before the VMM was touched"
    REFUSED = "VMM or guest said no"
    UNREACHED = "VMM could not be asked"
    UNKNOWN = "nobody knows how far it got"


FOLLOWS: dict[tuple[Aim, Failure], Event] = {
    (Aim.PLUG, Failure.UNSENT): Event.UNDONE,
    (Aim.PLUG, Failure.REFUSED): Event.UNDONE,
    (Aim.PLUG, Failure.UNREACHED): Event.UNDONE,
    (Aim.PLUG, Failure.UNKNOWN): Event.UNKNOWN,
    (Aim.UNPLUG, Failure.UNSENT): Event.KEPT,
    (Aim.UNPLUG, Failure.REFUSED): Event.KEPT,
    (Aim.UNPLUG, Failure.UNREACHED): Event.KEPT,
    (Aim.UNPLUG, Failure.UNKNOWN): Event.UNKNOWN,
    (Aim.RESUME, Failure.UNSENT): Event.UNKNOWN,
    (Aim.RESUME, Failure.REFUSED): Event.KEPT,
    (Aim.RESUME, Failure.UNREACHED): Event.UNKNOWN,
    (Aim.RESUME, Failure.UNKNOWN): Event.UNKNOWN,
    (Aim.UNDO, Failure.UNSENT): Event.UNKNOWN,
    (Aim.UNDO, Failure.REFUSED): Event.UNKNOWN,
    (Aim.UNDO, Failure.UNREACHED): Event.UNKNOWN,
    (Aim.UNDO, Failure.UNKNOWN): Event.UNKNOWN,
}


class End(StrEnum):
    """How a device came to hold nothing."""

    UNDONE = "an attach was undone"  # whoever uses it still may
    DETACHED = "its last detach succeeded"  # and its caller hears of it
    LATE = "it ended when nobody waited for that"  # its caller was told "pending", or has gone
