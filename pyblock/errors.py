"""The exceptions of pyblock: one tree, whose first level says whose fault it is.

PyblockError
├── CallerError                the arguments are wrong; nothing was changed and nothing was sent
│   ├── InvalidValue           malformed or out of range (also a ValueError)
│   │   ├── InvalidIndex         a block index, number or capacity
│   │   ├── InvalidName          a drive name or prefix
│   │   ├── InvalidAddress       a SCSI address
│   │   ├── InvalidID            a device, drive or sandbox ID
│   │   ├── InvalidSerial        a serial that the driver cannot carry whole
│   │   └── InvalidTimeout       a deadline that is not a number of seconds >= 0
│   ├── InvalidImage           what should be plugged in cannot be (missing, empty, a directory…)
│   │   └── ImageReplaced        its path leads to something else than what was claimed
│   ├── UnknownDriver          a block driver that pyblock, or this VMM, does not have
│   ├── UnknownScheme          a VMM address that no adapter answers to
│   ├── UnknownDevice          no such device in this sandbox (also a KeyError)
│   ├── DeviceConflict         the device exists already, in another form
│   ├── NotAttached            a detach that no attach stands against
│   ├── IndexTaken             reserving an index that is taken
│   ├── IndexFree              releasing an index that is free
│   ├── SandboxClosed          the sandbox was closed, or not opened yet
│   ├── WrongEventLoop         the sandbox was opened in another event loop
│   ├── SandboxBusy            the sandbox belongs to another process that lives
│   ├── MachineAnswers         what belongs to a machine that still answers cannot be given up
│   ├── SandboxConflict        the store knows the sandbox, or its machine, in a form that does not fit the request
│   ├── UnknownSandbox         no such sandbox in the store (also a KeyError)
│   ├── ImageInUse             another sandbox of this host has claimed the image
│   └── StateError             a saved state or a store that cannot be used
│       ├── InvalidState         cut off, not JSON or not SQLite, or of the wrong shape
│       └── NewerState           written by a newer pyblock; it is left as it is
├── CapacityError              something is used up
│   ├── IndexesExhausted         all block indexes are taken
│   ├── SlotsExhausted           no free hot-pluggable slot in the machine
│   ├── DescriptorsExhausted     this process can open no more files
│   └── AttachCountExhausted     more attaches than the count can hold
├── VmmRefused                 the VMM said no; `request` and `reply` are kept
├── TransportError             the VMM could not be asked
│   ├── VmmUnreachable           no connection: socket absent, not a socket, nobody listening
│   ├── VmmProtocolError         what answered does not speak the VMM's protocol
│   └── ConnectionLost           the connection broke while an answer was awaited
├── StoreError                 the store could not be read or written: full, read-only, an I/O error
│   └── StoreBusy                another process held its lock past the deadline
├── DeadlinePassed             the caller's deadline passed before anything was changed (also a TimeoutError)
├── AttachPending              attach: the outcome is unknown, everything stays taken
└── DetachPending              detach: not confirmed before the deadline, everything stays taken
"""

from __future__ import annotations

from typing import Any


class PyblockError(Exception):
    """Base of every error that pyblock raises on purpose."""


class CallerError(PyblockError):
    """The caller's arguments are wrong. Nothing was changed and nothing was sent to the VMM."""


class InvalidValue(CallerError, ValueError):
    """A value is malformed or out of its range."""


class InvalidIndex(InvalidValue):
    """A block index, a number or a capacity is out of its range."""


class InvalidName(InvalidValue):
    """A drive name or its prefix is malformed or too long."""


class InvalidAddress(InvalidValue):
    """A SCSI address is malformed."""


class InvalidID(InvalidValue):
    """An ID is empty, too long, or holds a character that a VMM refuses."""


class InvalidSerial(InvalidValue):
    """A serial cannot be carried whole by the chosen driver."""


class InvalidTimeout(InvalidValue):
    """A deadline is not a number of seconds that is zero or more."""


class InvalidImage(CallerError):
    """What should be plugged in cannot be: missing, unreadable, empty, a directory, a FIFO…"""


class ImageReplaced(InvalidImage):
    """What is at the image's path now is not what was claimed there. Attaching it anew claims what is there now."""


class UnknownDriver(CallerError):
    """A block driver that pyblock does not know, or that this VMM does not offer."""


class UnknownScheme(CallerError):
    """A VMM address whose scheme no adapter answers to."""


class UnknownDevice(CallerError, KeyError):
    """No device of that ID is known in this sandbox."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class DeviceConflict(CallerError):
    """The same host object, or the same ID, is there already in a form that does not fit the request."""


class NotAttached(CallerError):
    """A detach that no attach stands against."""


class IndexTaken(CallerError):
    """The index to reserve is taken."""


class IndexFree(CallerError):
    """The index to release is free."""


class SandboxClosed(CallerError):
    """The sandbox was closed, or is not open yet."""


class WrongEventLoop(CallerError):
    """A sandbox is used in another event loop, or another thread's, than the one that it was opened in."""


class SandboxBusy(CallerError):
    """Another process, which lives, has the sandbox open (or this one has, a second time)."""


class SandboxConflict(CallerError):
    """The store knows the sandbox with another machine, or the machine with another sandbox."""


class MachineAnswers(CallerError):
    """A sandbox cannot be forgotten: its machine still answers, or it cannot be told whether it would."""


class UnknownSandbox(CallerError, KeyError):
    """The store has no sandbox of that ID."""

    def __str__(self) -> str:  # as in UnknownDevice
        return str(self.args[0]) if self.args else ""


class ImageInUse(CallerError):
    """Another sandbox of this host has claimed the image, or somebody what lies under it or on it: one may write it, or many may read it.
    The message names the holder."""


class StateError(CallerError):
    """A saved state, or a store, cannot be used. The file is left as it is."""


class InvalidState(StateError):
    """The saved state is cut off, not JSON (the store: not SQLite), or of the wrong shape."""


class NewerState(StateError):
    """The saved state, or the store, was written by a newer pyblock."""


class CapacityError(PyblockError):
    """Something is used up; the request was fine."""


class IndexesExhausted(CapacityError):
    """Every block index up to the capacity is taken."""


class SlotsExhausted(CapacityError):
    """The machine has no free slot that takes a hot-plugged device."""


class DescriptorsExhausted(CapacityError):
    """This process, or the host, can open no more files."""


class AttachCountExhausted(CapacityError):
    """The attach count of a device is at its limit."""


class VmmRefused(PyblockError):
    """The VMM refused a request; `step` names it, `request` and `reply` hold both sides."""

    def __init__(self, message: str, *, step: str = "", request: Any = None, reply: Any = None) -> None:
        super().__init__(message)
        self.step = step
        self.request = request
        self.reply = reply


class TransportError(PyblockError):
    """The VMM could not be asked.

    :ivar sent: the request, or part of it, may have reached the VMM, so nobody knows whether it was carried out.
    """

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class VmmUnreachable(TransportError):
    """No connection to the VMM could be made; nothing was sent."""

    def __init__(self, message: str, *, sent: bool = False) -> None:
        super().__init__(message, sent=sent)


class VmmProtocolError(TransportError):
    """What answered does not speak the VMM's protocol, or answered what makes no sense there."""


class ConnectionLost(TransportError):
    """The connection broke while an answer was awaited."""


class StoreError(PyblockError):
    """The store could not be read or written: a full disk, a folder that may not be written, an I/O error."""


class StoreBusy(StoreError):
    """Another process held the store's lock past the deadline."""


class DeadlinePassed(PyblockError, TimeoutError):
    """The deadline that the caller gave passed before anything was changed. Whether it was too short or the VMM hangs cannot be told."""


class AttachPending(PyblockError):
    """The outcome of an attach is unknown. Index, ID, slot and address stay taken until it is settled."""


class DetachPending(PyblockError):
    """The VMM did not confirm a removal before the deadline.

    Index, ID, slot and address stay taken. Calling detach again is safe, and a late confirmation finishes the job by itself.
    """
