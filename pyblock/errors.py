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
│   ├── UnknownDriver          a block driver that pyblock, or this VMM, does not have
│   ├── UnknownScheme          a VMM address that no adapter answers to
│   ├── UnknownDevice          no such device in this sandbox (also a KeyError)
│   ├── UnknownSandbox         no such sandbox in the store (also a KeyError)
│   ├── NotAttached            a detach that no attach stands against
│   ├── NotOffered             what this VMM, or the driver on it, has no way to do
│   ├── NotReleased            a detach that needs the caller's word that the guest let go
│   ├── IndexTaken             reserving an index that is taken
│   ├── IndexFree              releasing an index that is free
│   ├── SandboxClosed          the sandbox was closed, or not opened yet
│   └── WrongEventLoop         the sandbox was opened in another event loop
├── Conflict                   the request is fine, and somebody else has what it is about; nothing
│                              was changed
│   ├── SandboxBusy            the sandbox belongs to another process that lives
│   ├── ImageInUse             another sandbox of this host has claimed the image
│   ├── ImageReplaced          the image's path leads to something else than what was claimed
│   ├── MachineAnswers         what belongs to a machine that still answers cannot be given up
│   ├── SandboxConflict        the store knows the sandbox, or its machine, in a form that does not
│   │                          fit the request
│   └── DeviceConflict         the device exists already, in another form
├── CapacityError              something is used up
│   ├── IndexesExhausted         all block indexes are taken
│   ├── SlotsExhausted           no free hot-pluggable slot in the machine
│   ├── DescriptorsExhausted     this process can open no more files
│   └── AttachCountExhausted     more attaches than the count can hold
├── StateError                 a saved state or a store that cannot be used; it is left as it is
│   ├── InvalidState             cut off, not JSON or not SQLite, or of the wrong shape
│   └── NewerState               written by a newer pyblock
├── StoreError                 the store could not be read or written: full, read-only, an I/O error
│   └── StoreBusy                another process held its lock past the deadline
├── VmmRefused                 the VMM said no; `request` and `reply` are kept
├── TransportError             the VMM could not be asked
│   ├── VmmUnreachable           no connection: socket absent, not a socket, nobody listening
│   ├── VmmProtocolError         what answered does not speak the VMM's protocol
│   └── ConnectionLost           the connection broke while an answer was awaited
├── DeadlinePassed             the caller's deadline passed before anything was changed (also a
│                              TimeoutError)
├── ClosedMeanwhile            the sandbox was closed while the work was under way; what it had done
│                              is undone
├── AttachPending              attach: the outcome is unknown, everything stays taken
└── DetachPending              detach: not confirmed before the deadline, everything stays taken

Each class has a `code`, a text that never changes, and says whether the same call may be made again
(`retryable`); each error has the facts that its raiser knew as fields. `to_dict` is all of it as
JSON.

What a tenant, a guest or a VMM wrote stands in an error as it was written; `shown` makes it fit for
a terminal and a log. A file name may hold anything but NUL and "/", and a VMM's error repeats it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self, TypedDict, Unpack

# fmt: off
__all__ = [  # noqa: RUF022 - as the tree has them
    "PyblockError", "DeviceOutcome",
    "CallerError", "InvalidValue", "InvalidIndex", "InvalidName", "InvalidAddress", "InvalidID",
    "InvalidSerial", "InvalidTimeout", "InvalidImage", "UnknownDriver", "UnknownScheme",
     "UnknownDevice", "UnknownSandbox", "NotAttached", "NotOffered", "NotReleased", "IndexTaken",
     "IndexFree",
    "SandboxClosed", "WrongEventLoop",
    "Conflict", "SandboxBusy", "ImageInUse", "ImageReplaced", "MachineAnswers", "SandboxConflict",
    "DeviceConflict",
    "CapacityError", "IndexesExhausted", "SlotsExhausted", "DescriptorsExhausted",
    "AttachCountExhausted",
    "StateError", "InvalidState", "NewerState",
    "StoreError", "StoreBusy",
    "VmmRefused",
    "TransportError", "VmmUnreachable", "VmmProtocolError", "ConnectionLost",
    "DeadlinePassed", "ClosedMeanwhile", "AttachPending", "DetachPending",
]
# fmt: on

SHOWN_MAX = 500  # characters, where nobody says otherwise
# characters of one text in `to_dict`: a path of PATH_MAX bytes, each of them escaped
TEXT_MAX = 40960
ITEMS_MAX = 64  # of one list or mapping there
DEPTH_MAX = 6  # of what is in one another there
INT_MAX = 2**63 - 1  # larger ones are texts there: few readers of JSON hold them

# str.isprintable() is False for controls, format characters (bidi, zero-width), lone surrogates (a
# byte that is no UTF-8), unassigned and private ones, and separators but the space. These it lets
# through, and they show as nothing: joiner, fillers, variation selectors, the vowels and free
# selectors of Khmer and Mongolian, the empty Braille cell.
_NOTHING = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0").union(
    *(
        map(chr, codes)
        for codes in (range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))
    )
)


def shown(text: str, limit: int = SHOWN_MAX) -> str:
    """The text, at most `limit` characters of it after escaping, and where more was there a mark
    that says how many are left out.

    A backslash stays one backslash, so that text which was escaped before (by `!r`) stays readable;
    no escape is cut in two.
    """
    beginning = text[:limit]
    if len(beginning) == len(text) and _is_plain(beginning):
        return text
    kept: list[str] = []
    room = limit
    for char in beginning:
        piece = char if _is_plain(char) else char.encode("unicode_escape").decode()
        room -= len(piece)
        if room < 0:
            break
        kept.append(piece)
    left_out = len(text) - len(kept)
    return "".join(kept) + (f"… (+{left_out})" if left_out else "")


def _is_plain(text: str) -> bool:
    return text.isprintable() and _NOTHING.isdisjoint(text)


class Facts(TypedDict, total=False):
    """What an error may know; see PyblockError."""

    sandbox: str | None
    device: str | None
    drive: str | None
    path: str | None
    index: int | None
    driver: str | None
    vm: str | None
    holder: str | None
    owner: str | None
    timeout: float | None
    value: object


_FACTS = tuple(Facts.__annotations__)


class PyblockError(Exception):
    """Base of every error that pyblock raises on purpose. A fact that is not known is None.

    :cvar code: says which error this is, and never changes; each class has its own.
    :cvar retryable: the same call may succeed when it is made again later, once somebody else has
        let go or answers; it does no harm. False: first something has to be changed, in the call or
        on the host.
    :ivar sandbox: the sandbox ID.
    :ivar device: the device ID.
    :ivar drive: the drive ID.
    :ivar path: what it is about on the host: an image, a store, a saved state, a machine's socket.
    :ivar index: the block index.
    :ivar driver: the name of the driver.
    :ivar vm: the address of the machine.
    :ivar holder: the ID of the sandbox that has what was asked for.
    :ivar owner: who has that sandbox open, in words; "" for nobody who lives.
    :ivar timeout: the seconds that the caller had given.
    :ivar value: what was refused, as it was given.
    :ivar outcomes: of a call about many (`attach_many`, `detach_many`): what became of each, in the
        order given; empty where nothing was begun with any.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    sandbox: str | None = None
    device: str | None = None
    drive: str | None = None
    path: str | None = None
    index: int | None = None
    driver: str | None = None
    vm: str | None = None
    holder: str | None = None
    owner: str | None = None
    timeout: float | None = None
    value: object = None
    outcomes: tuple[DeviceOutcome, ...] = ()

    def __init__(self, message: str = "", **facts: Unpack[Facts]) -> None:
        super().__init__(message)
        self.about(**facts)

    def about(self, **facts: Unpack[Facts]) -> Self:
        """Adds facts that it did not know yet, and returns it: whoever passes an error on may know
        more than who raised it."""
        for name, value in facts.items():
            if name not in _FACTS:
                raise TypeError(f"an error has no fact {name!r}; it has {', '.join(_FACTS)}")
            if value is not None and getattr(self, name) is None:
                setattr(self, name, value)
        return self

    def __copy__(self) -> Self:
        """An error of its own for each who waits for the same thing; with the cause and the
        traceback, which a pickle leaves behind."""
        twin = type(self)(*self.args)
        twin.__dict__.update(self.__dict__)
        if notes := getattr(self, "__notes__", None):
            twin.__notes__ = list(notes)
        twin.__cause__, twin.__context__ = self.__cause__, self.__context__
        twin.__suppress_context__ = self.__suppress_context__
        return twin.with_traceback(self.__traceback__)

    def to_dict(self) -> dict[str, Any]:
        """All that it says, as JSON has it: `code`, `branch` (the code of its first level),
        `message`, `retryable`, the facts that it knows, `notes`, and `outcomes` of a call about
        many. What others wrote in it is escaped as for a terminal, and what is too long is cut,
        with a mark."""
        body: dict[str, Any] = {
            "code": self.code,
            "branch": self._branch(),
            "message": shown(str(self), TEXT_MAX),
            "retryable": self.retryable,
        }
        body |= {name: plain(value) for name, value in self._known()}
        if notes := getattr(self, "__notes__", None):
            body["notes"] = plain(notes)
        if self.outcomes:
            body["outcomes"] = _outcomes(self.outcomes)
        return body

    def _branch(self) -> str:
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, PyblockError)]
        return kinds[-2].code if len(kinds) > 1 else self.code

    def _known(self) -> Iterable[tuple[str, object]]:
        return [(name, value) for name in _FACTS if (value := getattr(self, name)) is not None]


class knowing:
    """Around a body: errors of pyblock that it raises get these facts, where they did not know
    them.

    A class, because a generator made a context manager takes longer than what it is around.
    """

    __slots__ = ("_facts",)

    def __init__(self, **facts: Unpack[Facts]) -> None:
        self._facts = facts

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, PyblockError):
            error.about(**self._facts)


class DeviceOutcome(NamedTuple):
    """What became of one device of a call about many.

    `attach_many` raises when one could not be attached: then `error` says why, all that were
    attached are `undone`, and what could not be detached again has an `undoing`. `detach_many`
    raises when one could not be detached; those without `error` are.

    :ivar device: its ID, None where it has none: its image was refused, or was not looked at.
    :ivar path: of its image, None where only the device was named, and is not known.
    :ivar error: what went wrong with it; None: nothing did.
    :ivar undone: it was attached, and was detached again, since another failed.
    :ivar undoing: what went wrong in detaching it again: it is still attached, or pending.
    """

    device: str | None = None
    path: str | None = None
    error: BaseException | None = None
    undone: bool = False
    undoing: BaseException | None = None


def _outcomes(outcomes: Sequence[DeviceOutcome]) -> list[Any]:
    """Of many, those that something is to be said of: the first ones."""
    told = [
        (position, one)
        for position, one in enumerate(outcomes)
        if one.error is not None or one.undoing is not None
    ]
    kept: list[Any] = [{"position": position} | _of_one(one) for position, one in told[:ITEMS_MAX]]
    return [*kept, *_left_out(len(outcomes) - len(kept))]


def _of_one(outcome: DeviceOutcome) -> dict[str, Any]:
    return {
        name: plain(value)
        for name, value in outcome._asdict().items()
        if value is not None and value is not False
    }


def _left_out(count: int) -> list[str]:
    return [f"… (+{count})"] if count else []


def said(value: object) -> str:
    """What was given instead of something else, in an error's message: as Python writes it, where
    it writes it (of an int it writes 4,300 digits at most)."""
    try:
        return repr(value)
    except Exception:
        return str(plain(value))


def plain(value: object, depth: int = 0) -> Any:
    """Anything as JSON has it: bounded, escaped, and free of what JSON cannot say."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return (
            int(value) if -INT_MAX <= value <= INT_MAX else f"an int of {value.bit_length()} bits"
        )
    if isinstance(value, float):
        return float(value) if -float("inf") < value < float("inf") else repr(value)
    if isinstance(value, str):
        return shown(value, TEXT_MAX)
    if isinstance(value, PyblockError):
        facts = {name: plain(fact, depth + 1) for name, fact in value._known()}
        return {"code": value.code, "message": shown(str(value), TEXT_MAX)} | facts
    if depth < DEPTH_MAX and isinstance(value, Mapping):
        items = list(value.items())
        kept = {
            shown(key if isinstance(key, str) else str(plain(key, DEPTH_MAX)), SHOWN_MAX): plain(
                item, depth + 1
            )
            for key, item in items[:ITEMS_MAX]
        }
        return kept | dict.fromkeys(_left_out(len(items) - len(items[:ITEMS_MAX])))
    if depth < DEPTH_MAX and isinstance(value, list | tuple | set | frozenset):
        several = list(value)
        return [plain(item, depth + 1) for item in several[:ITEMS_MAX]] + _left_out(
            len(several) - len(several[:ITEMS_MAX])
        )
    try:
        text = repr(value)
    except Exception as error:  # whoever handles an error is not to get another
        text = f"a {type(value).__name__} whose repr raises {type(error).__name__}"
    return shown(text, SHOWN_MAX)


class CallerError(PyblockError):
    """The caller's arguments are wrong. Nothing was changed, and nothing was sent to the VMM that
    could change anything."""

    code = "caller-error"


class InvalidValue(CallerError, ValueError):
    """A value is malformed or out of its range."""

    code = "invalid-value"


class InvalidIndex(InvalidValue):
    """A block index, a number or a capacity is out of its range."""

    code = "invalid-index"


class InvalidName(InvalidValue):
    """A drive name or its prefix is malformed or too long."""

    code = "invalid-name"


class InvalidAddress(InvalidValue):
    """A SCSI address is malformed."""

    code = "invalid-address"


class InvalidID(InvalidValue):
    """An ID is empty, too long, or holds a character that a VMM refuses."""

    code = "invalid-id"


class InvalidSerial(InvalidValue):
    """A serial cannot be carried whole by the chosen driver."""

    code = "invalid-serial"


class InvalidTimeout(InvalidValue):
    """A deadline is not a number of seconds that is zero or more."""

    code = "invalid-timeout"


class InvalidImage(CallerError):
    """What should be plugged in cannot be: missing, unreadable, empty, a directory, a FIFO…"""

    code = "invalid-image"


class UnknownDriver(CallerError):
    """A block driver that pyblock does not know, or that this VMM does not offer."""

    code = "unknown-driver"


class UnknownScheme(CallerError):
    """A VMM address whose scheme no adapter answers to."""

    code = "unknown-scheme"


class UnknownDevice(CallerError, KeyError):
    """No device of that ID is known in this sandbox."""

    code = "unknown-device"

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class UnknownSandbox(CallerError, KeyError):
    """The store has no sandbox of that ID."""

    code = "unknown-sandbox"

    def __str__(self) -> str:  # as in UnknownDevice
        return str(self.args[0]) if self.args else ""


class NotAttached(CallerError):
    """A detach that no attach stands against."""

    code = "not-attached"


class NotOffered(CallerError):
    """This VMM, or the driver on it, has no way to do what was asked for; its offers say what it
    can."""

    code = "not-offered"


class NotReleased(CallerError):
    """This VMM takes a disk away without a word from the guest, so that the caller has to say that
    the guest has let go of it (`detach(released=True)`)."""

    code = "not-released"


class IndexTaken(CallerError):
    """The index to reserve is taken."""

    code = "index-taken"


class IndexFree(CallerError):
    """The index to release is free."""

    code = "index-free"


class SandboxClosed(CallerError):
    """The sandbox was closed, or is not open yet."""

    code = "sandbox-closed"


class WrongEventLoop(CallerError):
    """A sandbox is used in another event loop, or another thread's, than the one that it was opened
    in."""

    code = "wrong-event-loop"


class Conflict(PyblockError):
    """The request is fine, but somebody else has what it is about. Nothing was changed."""

    code = "conflict"


class SandboxBusy(Conflict):
    """Another process, which lives, has the sandbox open (or this one has, a second time): its
    `owner`."""

    code = "sandbox-busy"
    retryable = True


class ImageInUse(Conflict):
    """Another sandbox of this host has claimed the image, or somebody what lies under it or on it:
    one may write it, or many may read it. The message names the `holder`; `owner` is the process
    that has it open, "" where none does: it then takes `pyblock forget`."""

    code = "image-in-use"
    retryable = True


class ImageReplaced(Conflict):
    """What is at the image's path now is not what was claimed there: somebody replaced it
    meanwhile. Attaching it anew claims what is there now."""

    code = "image-replaced"
    retryable = True


class MachineAnswers(Conflict):
    """A sandbox cannot be forgotten: its machine still answers, or it cannot be told whether it
    would."""

    code = "machine-answers"
    retryable = True


class SandboxConflict(Conflict):
    """The store knows the sandbox with another machine, or the machine with another sandbox, its
    `holder`."""

    code = "sandbox-conflict"


class DeviceConflict(Conflict):
    """The same host object, or the same ID, is there already in a form that does not fit the
    request."""

    code = "device-conflict"


class CapacityError(PyblockError):
    """Something is used up; the request was fine. What others give back makes room."""

    code = "capacity"
    retryable = True


class IndexesExhausted(CapacityError):
    """Every block index up to the capacity is taken."""

    code = "indexes-exhausted"


class SlotsExhausted(CapacityError):
    """The machine has no free slot that takes a hot-plugged device."""

    code = "slots-exhausted"


class DescriptorsExhausted(CapacityError):
    """This process, or the host, can open no more files."""

    code = "descriptors-exhausted"


class AttachCountExhausted(CapacityError):
    """The attach count of a device is at its limit."""

    code = "attach-count-exhausted"


class StateError(PyblockError):
    """A saved state, or a store, cannot be used. The file is left as it is."""

    code = "state-error"


class InvalidState(StateError):
    """The saved state is cut off, not JSON (the store: not SQLite), or of the wrong shape."""

    code = "invalid-state"


class NewerState(StateError):
    """The saved state, or the store, was written by a newer pyblock."""

    code = "newer-state"


class StoreError(PyblockError):
    """The store could not be read or written: a full disk, a folder that may not be written, an I/O
    error."""

    code = "store-error"


class StoreBusy(StoreError):
    """Another process held the store's lock past the deadline."""

    code = "store-busy"
    retryable = True


class VmmRefused(PyblockError):
    """The VMM refused a request.

    :ivar step: names it.
    :ivar keeps: it was a removal, and the VMM keeps the drive.
    :ivar request: what was asked for.
    :ivar reply: what it answered.
    """

    code = "vmm-refused"

    def __init__(
        self,
        message: str = "",
        *,
        step: str = "",
        request: Any = None,
        reply: Any = None,
        **facts: Unpack[Facts],
    ) -> None:
        super().__init__(message, **facts)
        self.step = step
        self.keeps = False
        self.request = request
        self.reply = reply

    def _known(self) -> Iterable[tuple[str, object]]:
        both = (("step", self.step), ("request", self.request), ("reply", self.reply))
        keeps = [("keeps", True)] if self.keeps else []
        return [
            *super()._known(),
            *((name, value) for name, value in both if value not in (None, "")),
            *keeps,
        ]


class TransportError(PyblockError):
    """The VMM could not be asked.

    :ivar sent: the request, or part of it, may have reached the VMM, so nobody knows whether it was
        carried out.
    """

    code = "transport-error"
    retryable = True

    def __init__(self, message: str = "", *, sent: bool = True, **facts: Unpack[Facts]) -> None:
        super().__init__(message, **facts)
        self.sent = sent

    def _known(self) -> Iterable[tuple[str, object]]:
        return [*super()._known(), ("sent", self.sent)]


class VmmUnreachable(TransportError):
    """No connection to the VMM could be made; nothing was sent."""

    code = "vmm-unreachable"

    def __init__(self, message: str = "", *, sent: bool = False, **facts: Unpack[Facts]) -> None:
        super().__init__(message, sent=sent, **facts)


class VmmProtocolError(TransportError):
    """What answered does not speak the VMM's protocol, or answered what makes no sense there."""

    code = "vmm-protocol-error"
    retryable = False


class ConnectionLost(TransportError):
    """The connection broke while an answer was awaited."""

    code = "connection-lost"


class DeadlinePassed(PyblockError, TimeoutError):
    """The deadline that the caller gave passed before anything was changed. Whether it was too
    short or the VMM hangs cannot be told."""

    code = "deadline-passed"
    retryable = True


class ClosedMeanwhile(PyblockError):
    """The sandbox was closed while the work was under way. What had been done is undone; what could
    not be is pending."""

    code = "closed-meanwhile"


class AttachPending(PyblockError):
    """The outcome of an attach is unknown. Index, ID, place and address stay taken until it is
    settled.

    Attaching the same image again has the machine asked what it has, where that can be told: it
    succeeds when that has settled it.
    """

    code = "attach-pending"
    retryable = True


class DetachPending(PyblockError):
    """The VMM did not confirm a removal before the deadline.

    Index, ID, place and address stay taken. Calling detach again is safe, and a late confirmation
    finishes the job by itself.
    """

    code = "detach-pending"
    retryable = True
