"""What may follow what in the life of a device: a pure table, without a clock or any I/O.

LIFE says where each event leads from each phase; what it does not say cannot be. The phase itself
lives in `BlockDevice.phase`. docs/recovery.md draws its diagram from this table.
"""

from __future__ import annotations

from enum import StrEnum

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


class IllegalEvent(RuntimeError):
    """Something happened that cannot happen in that phase: a fault of pyblock's own.

    :ivar phase: where the device stood.
    :ivar event: what is said to have happened.
    """

    def __init__(self, phase: Phase, event: Event) -> None:
        super().__init__(f"'{event}' cannot happen to a device that is {phase}: a fault in pyblock")
        self.phase = phase
        self.event = event


def after(phase: Phase, event: Event) -> Phase:
    """The phase that an event leads to. Raises IllegalEvent."""
    try:
        return LIFE[phase, event]
    except KeyError:
        raise IllegalEvent(phase, event) from None
