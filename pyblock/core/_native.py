"""The C core as typed Python functions; the only module that touches ffi and lib.

Each function here crosses once, and turns a negative status into the exception that one table
names. What goes in is checked by the core itself: Python looks closer only after the core has
refused, so that a call that succeeds pays for no check.

Buffers are made anew for every call. The core runs without the GIL, so one that threads share would
mix up their results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NewType, NoReturn

from pyblock.core._core import ffi, lib
from pyblock.errors import (
    IndexesExhausted,
    IndexFree,
    IndexTaken,
    InvalidAddress,
    InvalidID,
    InvalidIndex,
    InvalidName,
    InvalidValue,
    PyblockError,
)

Handle = NewType("Handle", object)
"""A pb_index. BlockIndex frees it when it goes itself: an owning cdata would cost 80 bytes and a
third of the time to make one."""

CAPACITY_MAX: Final[int] = lib.PB_CAPACITY_MAX
CAPACITY_DEFAULT: Final[int] = lib.PB_CAPACITY_DEFAULT
NAME_MAX: Final[int] = lib.PB_NAME_MAX
SCSI_INDEX_MAX: Final[int] = lib.PB_SCSI_INDEX_MAX
SCSI_ADDRESS_MAX: Final[int] = lib.PB_SCSI_ADDRESS_MAX
ID_MAX: Final[int] = lib.PB_ID_MAX
ID_DIGEST: Final[int] = lib.PB_ID_DIGEST
INT64_MAX: Final[int] = 2**63 - 1

EINVAL: Final[int] = lib.PB_EINVAL
ERANGE: Final[int] = lib.PB_ERANGE
EFULL: Final[int] = lib.PB_EFULL
ETAKEN: Final[int] = lib.PB_ETAKEN
EFREE: Final[int] = lib.PB_EFREE
ENOMEM: Final[int] = lib.PB_ENOMEM
ETOOLONG: Final[int] = lib.PB_ETOOLONG

# --- statuses to exceptions
# --------------------------------------------------------------------------------------------------

_FULL = (
    IndexesExhausted,
    (
        f"{{n}} indexes needed, {{free}} of {{capacity}} free: release some, or use a capacity up "
        "to "
        f"{CAPACITY_MAX}"
    ),
)
_NO_MEMORY = (MemoryError, "no memory for the block index to grow")
_OUTSIDE = (
    InvalidIndex,
    (
        "index {value} is outside 0 ... {last}: give one in that range, or use an index of a "
        "larger "
        "capacity"
    ),
)
_COUNT = (InvalidIndex, "count {n} is negative: give 0 or more")
_NAME_LONG = (
    InvalidName,
    (
        f"prefix {{prefix}} and the letters of number {{number}} exceed {NAME_MAX} bytes: shorten "
        "the "
        "prefix"
    ),
)
_ADDRESS_ROOM = (
    InvalidValue,
    f"a SCSI address needs {SCSI_ADDRESS_MAX} bytes: give a larger buffer",
)
_SAME = (InvalidValue, "index and ordinals are one object: give two BlockIndexes")

FAULTS: Final[dict[str, dict[int, tuple[type[Exception], str]]]] = {
    "pb_index_acquire": {EFULL: _FULL, ENOMEM: _NO_MEMORY},
    "pb_index_acquire_many": {EFULL: _FULL, ENOMEM: _NO_MEMORY, ERANGE: _COUNT},
    "pb_index_reserve": {
        ERANGE: _OUTSIDE,
        ETAKEN: (IndexTaken, "index {value} is taken: release it first, or reserve another"),
        ENOMEM: _NO_MEMORY,
    },
    "pb_index_reserve_many": {
        ERANGE: _OUTSIDE,
        ETAKEN: (
            IndexTaken,
            (
                "index {value}, at position {position}, is taken or named twice: leave it out, "
                "none "
                "was reserved"
            ),
        ),
        ENOMEM: _NO_MEMORY,
    },
    "pb_index_release": {
        ERANGE: _OUTSIDE,
        EFREE: (IndexFree, "index {value} is free: release each index once"),
    },
    "pb_index_list": {ERANGE: _COUNT},
    "pb_drive_name": {
        ERANGE: (
            InvalidIndex,
            f"number {{number}} has no drive name: give one of 0 ... {INT64_MAX}",
        ),
        ETOOLONG: _NAME_LONG,
    },
    "pb_drive_names": {
        ERANGE: (
            InvalidIndex,
            (
                f"the {{n}} numbers from {{first}} on are not a count >= 0 within 0 ... "
                f"{INT64_MAX}: "
                "correct either"
            ),
        ),
        EINVAL: (InvalidName, "prefix {prefix} holds a newline: give one without"),
        ETOOLONG: _NAME_LONG,
    },
    "pb_drive_index": {
        EINVAL: (
            InvalidName,
            (
                f"{{name}} is no drive name: give {{prefix}} and letters a-z behind it, {NAME_MAX} "
                "bytes at most"
            ),
        ),
        ERANGE: (
            InvalidName,
            f"drive name {{name}} stands for a number above {INT64_MAX}: give a shorter one",
        ),
    },
    "pb_scsi_address": {
        ERANGE: (
            InvalidIndex,
            f"index {{value}} has no SCSI address: give one of 0 ... {SCSI_INDEX_MAX}",
        ),
        ETOOLONG: _ADDRESS_ROOM,
    },
    "pb_scsi_addresses": {
        ERANGE: (
            InvalidIndex,
            (
                f"the {{n}} indexes from {{first}} on are not a count >= 0 within 0 ... "
                f"{SCSI_INDEX_MAX}: correct either"
            ),
        ),
        ETOOLONG: _ADDRESS_ROOM,
    },
    "pb_scsi_index": {
        EINVAL: (
            InvalidAddress,
            (
                "{address} is no SCSI address: give 'id:lun' in decimal digits without leading "
                "zeros, "
                "such as '2:191'"
            ),
        ),
        ERANGE: (
            InvalidAddress,
            "SCSI address {address} has a part above 255: give an ID and a LUN of 0 ... 255 each",
        ),
    },
    "pb_make_id": {
        EINVAL: (
            InvalidID,
            "kind {kind} and ID {id} must not be empty: give at least one character each",
        ),
        ERANGE: (
            InvalidValue,
            f"limit {{limit}} must be 1 or more, and salt {{salt}} in 0 ... {INT64_MAX}",
        ),
        ETOOLONG: (
            InvalidID,
            (
                "kind {kind} and ID {id} cannot be shortened to {limit} bytes: give a limit >= "
                "{least}, or a shorter kind"
            ),
        ),
    },
    "pb_plan": {EFULL: _FULL, ENOMEM: _NO_MEMORY, EINVAL: _SAME},
    "pb_plan_many": {EFULL: _FULL, ENOMEM: _NO_MEMORY, EINVAL: _SAME, ERANGE: _COUNT},
}
"""What each function of the core may answer besides a result: the exception, and the text that says
what to do."""

_SHOWN = 80


def _show(value: object) -> str:
    """The repr of a value, cut for a message; an int can be too long even to be printed."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"of {value.bit_length()} bits"
    text = repr(value[:_SHOWN] if isinstance(value, str) else value)
    return (
        f"{text} and {len(value) - _SHOWN} characters more"
        if isinstance(value, str) and len(value) > _SHOWN
        else text
    )


def _fail(function: str, status: int, **facts: object) -> NoReturn:
    """:param facts: what the text is made of; the first is what was asked for."""
    error, template = FAULTS[function][status]
    text = template.format_map({name: _show(value) for name, value in facts.items()})
    if not issubclass(error, PyblockError):
        raise error(text)
    index = facts.get("value")
    raise error(
        text,
        index=index if isinstance(index, int) else None,
        value=next(iter(facts.values()), None),
    )


def _fail_index(function: str, status: int, handle: Handle, **facts: object) -> NoReturn:
    capacity = index_capacity(handle)
    _fail(
        function,
        status,
        **facts,
        capacity=capacity,
        last=capacity - 1,
        free=capacity - index_count(handle),
    )


def plan_refused(
    function: str, status: int, handle: Handle, ordinals: Handle, **facts: object
) -> NoReturn:
    """Speaks of the fuller of the two indexes, which is the one that was found full."""
    room = [(index_capacity(each) - index_count(each), each) for each in (ordinals, handle)]
    _fail_index(function, status, min(room, key=lambda pair: pair[0])[1], **facts)


def _encode(text: str, error: type[InvalidValue]) -> bytes:
    try:
        return str.encode(text)
    except UnicodeEncodeError:
        why = "holds half a surrogate pair, which UTF-8 cannot carry: give whole characters"
        raise error(f"{_show(text)} {why}", value=text) from None


def _count(n: int, most: int) -> int:
    """A count that fits an int64 and a buffer, with the same answer from the core: negative, or
    more than there can be."""
    return max(-1, min(n, most + 1))


def _int64(value: int) -> int:
    """A number that fits an int64; one that does not becomes the -1 that the core refuses as it
    would refuse the number."""
    return value if -INT64_MAX <= value <= INT64_MAX else -1


# Buffers that are written before they are read need no zeroes first. A type that is looked up by
# its text takes as long as the call.
_new_raw: Any = ffi.new_allocator(should_clear_after_alloc=False)
_CHARS: Any = ffi.typeof("char[]")
_UINT32S: Any = ffi.typeof("uint32_t[]")
_INT64_OUT: Any = ffi.typeof("int64_t *")


def _numbers(out: Any, count: int) -> list[int]:
    """What ffi.unpack does, in half the time."""
    numbers: list[int] = memoryview(ffi.buffer(out)).cast("I")[:count].tolist()
    return numbers


def _text(out: Any, length: int) -> str:
    text: str = ffi.unpack(out, length).decode()
    return text


# --- the block index
# --------------------------------------------------------------------------------------------------

# Bound once: looking a function up in lib costs a fifth of a call. The raw ones are hot, and
# BlockIndex calls them itself, for another Python function between would cost half a crossing; a
# negative status goes to index_refused.
raw_acquire: Callable[[Handle], int] = lib.pb_index_acquire
raw_release: Callable[[Handle, int], int] = lib.pb_index_release
_new: Any = lib.pb_index_new
_reserve: Any = lib.pb_index_reserve
_reserve_many: Any = lib.pb_index_reserve_many
_test: Any = lib.pb_index_test
raw_free: Callable[[Handle], None] = lib.pb_index_free


def index_new(capacity: int) -> Handle:
    try:
        index: Handle = _new(capacity)
    except OverflowError:
        index = ffi.NULL
    if index:
        return index
    if 1 <= capacity <= CAPACITY_MAX:
        raise MemoryError("no memory for a block index")
    text = f"capacity {_show(capacity)} is outside 1 ... {CAPACITY_MAX}: give one in that range"
    raise InvalidIndex(text, value=capacity)


def index_refused(function: str, status: int, handle: Handle, **facts: object) -> NoReturn:
    """Raises what a negative status of one of the raw functions means."""
    _fail_index(function, status, handle, **facts)


def index_acquire_many(handle: Handle, n: int) -> list[int]:
    asked = _count(n, CAPACITY_MAX)
    out = _new_raw(_UINT32S, max(asked, 0))
    got = lib.pb_index_acquire_many(handle, asked, out)
    if got < 0:
        _fail_index("pb_index_acquire_many", got, handle, n=n)
    return _numbers(out, asked)


def index_reserve(handle: Handle, value: int) -> None:
    try:
        got: int = _reserve(handle, value)
    except OverflowError:
        got = ERANGE
    if got < 0:
        _fail_index("pb_index_reserve", got, handle, value=value)


def index_reserve_many(handle: Handle, values: Sequence[int]) -> None:
    bad = ffi.new(_INT64_OUT)
    try:
        got = _reserve_many(handle, len(values), values, bad)
    except OverflowError:
        got = _reserve_many(handle, len(values), [_int64(value) for value in values], bad)
    if got < 0:
        position = bad[0]
        _fail_index(
            "pb_index_reserve_many",
            got,
            handle,
            value=values[position] if position >= 0 else None,
            position=position,
        )


def index_test(handle: Handle, value: int) -> bool:
    try:
        return bool(_test(handle, value))
    except OverflowError:
        return False


def index_count(handle: Handle) -> int:
    count: int = lib.pb_index_count(handle)
    return count


def index_capacity(handle: Handle) -> int:
    capacity: int = lib.pb_index_capacity(handle)
    return capacity


def index_memory(handle: Handle) -> int:
    memory: int = lib.pb_index_memory(handle)
    return memory


def index_list(handle: Handle, start: int, n: int) -> list[int]:
    asked = _count(n, CAPACITY_MAX)
    out = _new_raw(_UINT32S, max(asked, 0))
    got = lib.pb_index_list(handle, start, asked, out)
    if got < 0:
        _fail_index("pb_index_list", got, handle, n=n)
    return _numbers(out, got)


# --- names, addresses, IDs
# --------------------------------------------------------------------------------------------------


def drive_name(number: int, prefix: str) -> str:
    start = _encode(prefix, InvalidName)
    out = _new_raw(_CHARS, NAME_MAX)
    try:
        got: int = lib.pb_drive_name(number, start, len(start), out, NAME_MAX)
    except OverflowError:
        got = ERANGE
    if got < 0:
        _fail("pb_drive_name", got, number=number, prefix=prefix)
    return _text(out, got)


def drive_names(first: int, count: int, prefix: str) -> list[str]:
    start = _encode(prefix, InvalidName)
    room = max(count, 0) * (NAME_MAX + 1)
    try:
        # The last name is asked for first: it tells whether the batch can be made before a buffer
        # is.
        got: int = lib.pb_drive_name(
            first + max(count, 1) - 1, start, len(start), _new_raw(_CHARS, NAME_MAX), NAME_MAX
        )
        if got >= 0:
            out = _new_raw(_CHARS, room)
            got = lib.pb_drive_names(first, count, start, len(start), out, room)
    except OverflowError:
        got = ERANGE
    if got < 0:
        _fail("pb_drive_names", got, first=first, n=count, number=first + count - 1, prefix=prefix)
    return _text(out, got).split("\n")[:-1]


def drive_index(name: str, prefix: str) -> int:
    text, start = _encode(name, InvalidName), _encode(prefix, InvalidName)
    got: int = lib.pb_drive_index(text, len(text), start, len(start))
    if got < 0:
        _fail("pb_drive_index", got, name=name, prefix=prefix)
    return got


def scsi_address(index: int) -> str:
    out = _new_raw(_CHARS, SCSI_ADDRESS_MAX)
    try:
        got: int = lib.pb_scsi_address(index, out, SCSI_ADDRESS_MAX)
    except OverflowError:
        got = ERANGE
    if got < 0:
        _fail("pb_scsi_address", got, value=index)
    return _text(out, got)


def scsi_addresses(first: int, count: int) -> list[str]:
    asked = _count(count, SCSI_INDEX_MAX + 1)
    room = max(asked, 0) * (SCSI_ADDRESS_MAX + 1)
    out = _new_raw(_CHARS, room)
    got = lib.pb_scsi_addresses(_int64(first), asked, out, room)
    if got < 0:
        _fail("pb_scsi_addresses", got, first=first, n=count)
    return _text(out, got).split("\n")[:-1]


def scsi_index(address: str) -> int:
    text = _encode(address, InvalidAddress)
    got: int = lib.pb_scsi_index(text, len(text))
    if got < 0:
        _fail("pb_scsi_index", got, address=address)
    return got


def make_id(kind: str, device_id: str, salt: int, limit: int) -> str:
    head, tail = _encode(kind, InvalidID), _encode(device_id, InvalidID)
    room = len(head) + 1 + len(tail)  # no larger limit makes a longer ID
    if limit < room:
        room = limit if limit > 0 else 0
    out = _new_raw(_CHARS, room)
    try:
        got: int = lib.pb_make_id(head, len(head), tail, len(tail), salt, room, out, room)
    except OverflowError:
        got = ERANGE
    if got < 0:
        _fail(
            "pb_make_id",
            got,
            id=device_id,
            kind=kind,
            salt=salt,
            limit=limit,
            least=len(head) + ID_DIGEST + 2,
        )
    return _text(out, got)


# --- plans
# --------------------------------------------------------------------------------------------------


raw_plan: Callable[[Handle, Handle], int] = lib.pb_plan


def plan_many(handle: Handle, ordinals: Handle, n: int) -> tuple[list[int], list[int]]:
    asked = _count(n, CAPACITY_MAX)
    indexes = _new_raw(_UINT32S, max(asked, 0))
    numbers = _new_raw(_UINT32S, max(asked, 0))
    got = lib.pb_plan_many(handle, ordinals, asked, indexes, numbers)
    if got < 0:
        plan_refused("pb_plan_many", got, handle, ordinals, n=n)
    return _numbers(indexes, asked), _numbers(numbers, asked)
