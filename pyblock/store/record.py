"""A device as a store keeps it: one flat object of JSON, in which only what follows from nothing
else is written. The sandbox has a record of its own beside those of its devices.

A record says all that pyblock knows of a device. What only the original has words for is `kata`:
JSON that nothing but its translation looks into. A field is added to `Record`, and FORM is raised:
a reader of an older version then refuses the record, and drops nothing of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from operator import attrgetter
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw

from pyblock.core.naming import DRIVE, ID_MAX, make_name_id
from pyblock.disk.drivers import DRIVERS
from pyblock.disk.lineage import Identity
from pyblock.disk.model import BlockDrive, DeviceInfo, check_device_id
from pyblock.errors import InvalidID, InvalidState, NewerState, StateError

FORM = 1  # of what this version writes; it reads those up to it
# bytes; as many as a saved file may have, whose leftovers may all be in one record
RECORD_MAX = 256 * 2**20
COUNT_MAX = 2**64 - 1  # what the original's counts hold

NO_DRIVE = -1  # an index
UNTOLD = -2  # an ordinal that a saved state does not tell
_AS_INDEX = -1  # an ordinal that is the index as well
_AS_ID = ""  # a serial that is the device ID, a drive ID that follows from it
_INDEX_MAX = 2**20 - 1

NOTHING = Raw()
SavedPhase = Literal["detached", "attached", "attach-pending", "detach-pending"]
_Count = Annotated[int, Meta(ge=0)]


class Record(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """One device. What `DeviceInfo` and `BlockDrive` have as well is explained there.

    :ivar form: which fields there may be; 1 is not written.
    :ivar id: the device ID. Not written: it is the key under which the record stands.
    :ivar phase: as what the device is taken up; what is under way is pending.
    :ivar attach_count: attaches that no detach stands against yet.
    :ivar users: how many use it, where that is not the attach count.
    :ivar drive_id: the drive's ID.
    :ivar index: NO_DRIVE where nothing is held; the rest of the drive's fields then say nothing.
    :ivar place: the adapter's own word for the place that the drive takes in the machine.
    :ivar generic: it is a device node that is only counted.
    :ivar kata: what the original wrote of it; empty where that would be written again from the
        rest.
    """

    # As in DeviceInfo, in its order.
    path: str = ""
    driver: str = ""
    read_only: bool = False
    serial: str | None = _AS_ID
    id: str = ""
    dev_type: str = ""
    major: int = -1
    minor: int = -1
    options: dict[str, str] = {}
    share: bool = False
    format: str | None = None

    form: int = 1
    identity: Identity | None = None
    phase: SavedPhase = "attached"
    attach_count: _Count = 1
    users: _Count | None = None

    drive_id: str = _AS_ID
    index: Annotated[int, Meta(ge=NO_DRIVE, le=_INDEX_MAX)] = NO_DRIVE
    ordinal: Annotated[int, Meta(ge=UNTOLD, le=_INDEX_MAX)] = _AS_INDEX
    offset: _Count = 0
    place: str | None = None
    pci_path: str | None = None
    dev_no: str | None = None
    guest_match: str | None = None
    known_name: str | None = None
    imported: bool = False
    unverified: bool = False
    crowded: bool = False

    generic: bool = False
    kata: Raw = NOTHING

    @property
    def holds(self) -> bool:
        """Whether it has a drive."""
        return self.index != NO_DRIVE

    def info(self) -> DeviceInfo:
        """What was asked for."""
        info = DeviceInfo(*_asked(self))
        return info if info.driver else msgspec.structs.replace(info, driver=None)

    def drive(self, info: DeviceInfo) -> BlockDrive | None:
        """How it is presented, None where nothing is held."""
        if self.index == NO_DRIVE:
            return None
        return BlockDrive(
            self.drive_id, self.index, self.ordinal, self.offset, DRIVERS[self.driver], info,
            self.pci_path, self.dev_no,
            self.guest_match, self.place, self.known_name, self.imported, not self.unverified,
            self.crowded,
        )  # fmt: skip


class SandboxRecord(
    msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False
):
    """What there is to be kept of a sandbox beside its devices.

    :ivar form: which fields there may be.
    :ivar offsets: the block offsets, by family.
    :ivar taken: indexes that something other than its drives took.
    :ivar kata: the rest of a file that was loaded.
    """

    form: int = 1
    offsets: dict[str, _Count] = {}
    taken: list[int] = []
    kata: Raw = NOTHING


class _Form(msgspec.Struct):
    form: int = 1


class _OldDrive(msgspec.Struct):
    id: str = msgspec.field(name="ID", default="")


class _Drive(msgspec.Struct):
    """What tells a drive's ID, in a record that may be damaged otherwise, or of another version."""

    old: _OldDrive | None = msgspec.field(name="BlockDrive", default=None)
    drive_id: str = _AS_ID
    index: int = NO_DRIVE


ASKED = DeviceInfo.__struct_fields__
_asked = attrgetter(*ASKED)

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Record).decode
_decode_sandbox = msgspec.json.Decoder(SandboxRecord).decode
_decode_form = msgspec.json.Decoder(_Form).decode
_decode_drive = msgspec.json.Decoder(_Drive).decode

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def encode(record: Record) -> bytes:
    """Writes a record. Raises UnicodeError for text that is none."""
    return encode_in_place(copy.copy(record))


def encode_in_place(short: Record) -> bytes:
    """The same for a record that is not used after it."""
    short.form = FORM
    if not short.serial:
        short.serial = None  # an empty serial is none to a guest, and "" says the device ID here
    elif short.serial == short.id:
        short.serial = _AS_ID
    if short.index != NO_DRIVE:
        # A loaded state may have an ID that is longer than any of ours: the VMM knows it by that.
        fits = len(short.drive_id) <= ID_MAX and short.drive_id == f"{DRIVE}-{short.id}"
        if fits or short.drive_id == make_name_id(DRIVE, short.id):
            short.drive_id = _AS_ID
        if short.ordinal == short.index:
            short.ordinal = _AS_INDEX
    short.id = ""
    if not short.kata:
        short.kata = NOTHING  # a default is told by its identity
    return _encode(short)


def decode(device_id: str, data: bytes, *, where: str) -> Record:
    """Reads a record.

    :param where: what errors call it.
    Raises InvalidState when it is damaged, or says what cannot be; NewerState when a later version
    wrote it.
    """
    try:
        check_device_id(device_id)
        if len(data) > RECORD_MAX:
            raise InvalidState(f"it has over {RECORD_MAX} bytes")
        record = _decode(data)
        if record.form <= FORM:
            record.id = device_id
            _complete(record)
            check(record)
            return record
        raise msgspec.ValidationError
    except (InvalidState, InvalidID) as error:
        text = f"{where}: device {device_id!r}: {error}; it is left as it is"
        raise InvalidState(text, device=device_id) from error
    except _UNREADABLE as error:
        raise _unreadable(data, f"{where}: device {device_id!r}", error) from error


def _complete(record: Record) -> None:
    """Fills in what follows from the rest."""
    if record.serial == _AS_ID:
        record.serial = record.id
    if record.index != NO_DRIVE:
        if record.drive_id == _AS_ID:
            record.drive_id = make_name_id(DRIVE, record.id)
        if record.ordinal == _AS_INDEX:
            record.ordinal = record.index


def check(record: Record) -> None:
    """Raises InvalidState when a record contradicts itself."""
    if record.identity is not None and record.identity[0] not in ("file", "block"):
        raise InvalidState(f"its image is {record.identity[0]!r}, which is no kind of image")
    if record.attach_count > COUNT_MAX or (record.users or 0) > COUNT_MAX:
        raise InvalidState(f"it is counted more than {COUNT_MAX} times")
    phase, index = record.phase, record.index
    if (phase == "attached") != (record.attach_count > 0) and phase != "detach-pending":
        raise InvalidState(f"it is {phase} with an attach count of {record.attach_count}")
    if not record.generic:
        if record.driver not in DRIVERS:
            raise InvalidState(
                f"block driver {record.driver!r} is unknown; known are {', '.join(DRIVERS)}"
            )
        if (phase == "detached") != (index == NO_DRIVE):
            raise InvalidState(
                f"it is {phase} and has {'no index' if index == NO_DRIVE else f'index {index}'}"
            )


def encode_sandbox(record: SandboxRecord) -> bytes:
    """Writes a sandbox's own record; b"" for one whose offsets alone are known, which the machine
    is asked for."""
    record.form = FORM
    if not record.kata:
        record.kata = NOTHING
        if not record.taken:
            return b""
    return _encode(record)


def decode_sandbox(data: bytes, *, where: str) -> SandboxRecord:
    """Reads a sandbox's own record. Raises as `decode`."""
    if not data:
        return SandboxRecord()
    try:
        if len(data) > RECORD_MAX:
            raise InvalidState(
                f"{where}: its own record has over {RECORD_MAX} bytes; it is left as it is"
            )
        record = _decode_sandbox(data)
        if record.form <= FORM:
            return record
        raise msgspec.ValidationError
    except _UNREADABLE as error:
        raise _unreadable(data, where, error) from error


def drive_id_of(device_id: str, data: bytes) -> str:
    """The drive ID in a record, "" where it has none, or cannot be read: that is said by whoever
    takes the device up."""
    try:
        drive = _decode_drive(data)
        if drive.old is not None:
            return drive.old.id
        if drive.index == NO_DRIVE:
            return ""
        return drive.drive_id or make_name_id(DRIVE, device_id)
    except (*_UNREADABLE, InvalidID):
        return ""


def _unreadable(data: bytes, what: str, error: Exception) -> StateError:
    try:
        form = _decode_form(data).form
    except _UNREADABLE:
        form = 0
    if form > FORM:
        return NewerState(
            f"{what} was written by a newer pyblock (form {form}, this one reads up to {FORM}); "
            "it is left as it is"
        )
    return InvalidState(f"{what} is damaged: {error}; it is left as it is")


def decode_all(rows: Iterable[tuple[str, bytes]], *, where: str) -> list[Record]:
    """Reads the records of a sandbox's devices, by their IDs, in their order. Raises as `decode`,
    for the first that cannot be read."""
    return [decode(device_id, data, where=where) for device_id, data in rows]
