"""Records to the original's saved form and back: at import, export, save and load, and nowhere
else.

What the saved form had and pyblock does not know comes out again as it went in: it travels in a
record's `kata`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import msgspec
from msgspec import UNSET, Raw, UnsetType

from pyblock.core.naming import scsi_address
from pyblock.disk.drivers import (
    DRIVERS,
    NVDIMM,
    VIRTIO_BLK,
    VIRTIO_BLK_CCW,
    VIRTIO_MMIO,
    VIRTIO_SCSI,
    Driver,
)
from pyblock.disk.image import identity_of, is_file
from pyblock.disk.lineage import Identity
from pyblock.disk.model import check_device_id
from pyblock.errors import InvalidID, InvalidIndex, InvalidState, NewerState
from pyblock.kata.schema import (
    PLAIN,
    VERSION,
    DeviceNotes,
    DeviceState,
    DriveNotes,
    DriveState,
    HypervisorState,
    SandboxNotes,
    SandboxState,
    decode,
    decode_device,
    encode_device,
    encode_short,
)
from pyblock.store.record import NO_DRIVE, NOTHING, UNTOLD, Record, SandboxRecord, SavedPhase

_LOWEST, _SIGNED, _UNSIGNED = -(2**63), 2**63, 2**64  # what the original's integers hold

GENERIC = "generic"
BLOCK = "block"

# Major and minor of a file. The original of 2020 had 0 and 0, and took two devices with the same
# numbers for one.
FILE = (-1, 0)

_NO_OPTIONS: dict[str, str] = {}
_DRIVER_OPTION = "block-driver"

# What the translation writes itself; the other fields of a record travel under their own names.
_OURS = (
    "form id path driver read_only share serial format options dev_type major minor identity "
    "phase attach_count users drive_id index "
    "ordinal offset place pci_path dev_no guest_match known_name imported unverified crowded "
    "generic kata"
)
_TOLD = frozenset(_OURS.split())
_MORE = {
    field.name: field.default for field in msgspec.structs.fields(Record) if field.name not in _TOLD
}


def device_to_state(record: Record) -> DeviceState:
    """The saved form of a device."""
    saved = (
        decode_device(bytes(record.kata), where=f"device {record.id!r}") if record.kata else None
    )
    state = saved or DeviceState(notes=UNSET if record.generic else DeviceNotes())
    untold = state.notes is UNSET
    state.id, state.attach_count = record.id, record.attach_count
    state.ref_count = record.attach_count if record.users is None else record.users
    if record.generic:
        if saved is None:
            state.type, state.dev_type, state.major, state.minor = (
                GENERIC,
                record.dev_type,
                record.major,
                record.minor,
            )
            state.driver_options = record.options
        return state
    if saved is None:
        state.dev_type = "b"
        state.major, state.minor = (record.major, record.minor) if record.major > 0 else FILE
        state.driver_options = {**record.options, _DRIVER_OPTION: record.driver}
    before = state.block_drive if isinstance(state.block_drive, DriveState) else None
    same = record.holds and before is not None and _is_same(record, before)
    shared = _is_shared(before)
    if record.holds:
        state.block_drive = _drive_to_state(record, before if same else None)
    # What the original wrote stays as it wrote it as long as it has words for where the device
    # stands.
    told = same or not record.holds
    more = {
        name: getattr(record, name)
        for name, default in _MORE.items()
        if getattr(record, name) != default
    }
    if (
        untold
        and record.phase in ("attached", "detached")
        and told
        and record.share == shared
        and not more
    ):
        return state
    state.notes = DeviceNotes(
        phase=record.phase, path=record.path, driver=record.driver, serial=record.serial,
        read_only=record.read_only, share=record.share, format="raw" if record.format else None,
        identity=record.identity, more=more,
    )  # fmt: skip
    return state


def _is_same(record: Record, saved: DriveState) -> bool:
    """Whether this is the drive that was saved, and not one that the device got since."""
    return record.imported == _is_imported(saved) and (
        record.drive_id,
        record.index,
        record.path,
    ) == (saved.id, saved.index, saved.file)


def _is_imported(saved: DriveState) -> bool:
    """Whether another program plugged it in. What pyblock wrote of such drives before it marked
    them lacks ReadOnly where the original had none."""
    return saved.notes is UNSET or saved.notes.imported or saved.read_only is UNSET


def _is_shared(saved: DriveState | None) -> bool:
    return saved is not None and saved.share_rw is True


def _drive_to_state(record: Record, saved: DriveState | None) -> DriveState:
    """`saved`: the same drive's saved form, if there is one, whose unknown keys are kept; so are
    all its keys where another program plugged it in, but for a PCI address that the machine
    told."""
    if saved is None or not record.imported:
        drive = record.drive(record.info())
        assert drive is not None
        state = DriveState(
            file=drive.file, format=drive.format, id=drive.id, index=drive.index,
            pci_addr=drive.pci_path or "", scsi_addr=drive.scsi_addr or "",
            nvdimm_id=drive.nvdimm_id or "", virt_path=drive.guess if drive.kind.guest_path else "",
            dev_no=drive.dev_no or "",
            pmem=drive.pmem, read_only=drive.read_only, share_rw=True if drive.share else UNSET,
        )  # fmt: skip
        if saved is not None:
            state.extra, state.pci_path, state.mmio_addr = (
                saved.extra,
                saved.pci_path,
                saved.mmio_addr,
            )
            state.share_rw = saved.share_rw if state.share_rw is UNSET else True
    else:
        state = msgspec.structs.replace(saved)
        if record.pci_path is not None:
            state.pci_addr = record.pci_path
    state.notes = DriveNotes(
        driver=record.driver, ordinal=record.ordinal, offset=record.offset, serial=record.serial,
        guest_match=record.guest_match,
        slot=record.place, known_name=record.known_name, imported=record.imported,
        unverified=record.unverified, crowded=record.crowded,
    )  # fmt: skip
    return state


def device_from_state(
    state: DeviceState, default: Driver, *, where: str, share: bool = False
) -> Record | None:
    """The record of a saved form; None for a kind that pyblock keeps untouched. Its drive's ordinal
    is UNTOLD where the saved form does not tell.

    :param share: others may write its image as well, whatever the saved form says.
    Raises InvalidState, naming the device, when the values contradict each other.
    """
    if state.type not in (BLOCK, GENERIC):
        return None
    try:
        check_device_id(state.id)
        if state.ref_count < 0 or state.attach_count < 0:
            raise InvalidState(
                f"AttachCount {state.attach_count} or RefCount {state.ref_count} is negative"
            )
        fits = _LOWEST <= state.major < _SIGNED and _LOWEST <= state.minor < _SIGNED
        if not fits or state.ref_count >= _UNSIGNED or state.attach_count >= _UNSIGNED:
            raise InvalidState(
                "a count, or Major:Minor, is a number of more than 64 bits, which the original "
                "cannot read"
            )
        record = (
            _generic(state)
            if state.type == GENERIC
            else _block(_readable(state), default, share=share)
        )
    except (InvalidState, InvalidID, InvalidIndex, NewerState) as error:
        text = f"{where}: device {state.id!r}: {error}; the file is left as it is"
        kind = NewerState if isinstance(error, NewerState) else InvalidState
        raise kind(text, device=state.id) from error
    record.id, record.attach_count = state.id, state.attach_count
    record.users = state.ref_count if state.ref_count != state.attach_count else None
    return record


def _generic(state: DeviceState) -> Record:
    return Record(
        generic=True, dev_type=state.dev_type, major=state.major, minor=state.minor, serial=None,
        options=state.driver_options or _NO_OPTIONS,
        phase="attached" if state.attach_count else "detached",
        kata=Raw(encode_device(state)),
    )  # fmt: skip


def _readable(state: DeviceState) -> DeviceState:
    """The saved form with its addresses as both versions of the original read them; pyblock wrote
    other ones before."""
    drive = state.block_drive
    if not isinstance(drive, DriveState) or (drive.pci_path is UNSET and not drive.dev_no):
        return state  # nearly all
    new = drive
    if isinstance(drive.pci_path, str):
        new = msgspec.structs.replace(
            drive, pci_path=UNSET, pci_addr=drive.pci_path or drive.pci_addr or ""
        )
    if drive.dev_no.startswith(_HOST_CSS) and not _is_imported(drive):
        new = msgspec.structs.replace(new, dev_no=_GUEST_CSS + drive.dev_no.removeprefix(_HOST_CSS))
    return state if new is drive else msgspec.structs.replace(state, block_drive=new)


def _block(state: DeviceState, default: Driver, *, share: bool) -> Record:
    notes = state.notes if state.notes is not UNSET else _NO_NOTES
    saved = state.block_drive or None
    phase = _phase(notes, state, saved)
    options = state.driver_options or _NO_OPTIONS
    driver = _driver(notes.driver or options.get(_DRIVER_OPTION), saved, default)
    held = saved if phase != "detached" else None
    path = notes.path or (saved.file if saved is not None else "")
    ours = options.get(_DRIVER_OPTION) == driver.name and _is_our_own(state, saved)
    if ours:  # it is written anew from the driver
        if len(options) > 1:
            options = {name: value for name, value in options.items() if name != _DRIVER_OPTION}
        else:
            options = _NO_OPTIONS
    plain = ours and state.major <= 0  # a file, which the original has no words for
    special = ("", -1, -1) if plain else (state.dev_type, state.major, state.minor)
    record = Record(
        path=path, driver=driver.name, serial=notes.serial, format=notes.format, options=options,
        read_only=notes.read_only or (held is not None and held.read_only is True),
        share=share or notes.share or _is_shared(held),
        dev_type=special[0], major=special[1], minor=special[2],
        identity=notes.identity or _identity(state, path, driver), phase=phase,
        kata=NOTHING if ours else Raw(encode_device(state)),
    )  # fmt: skip
    if held is not None:
        _take_drive(record, held, driver)
    if notes.more:
        _take_more(record, notes.more)
    return record


def _take_more(record: Record, more: dict[str, Any]) -> None:
    """Has the record tell what the saved form says under its own fields' names."""
    if strange := more.keys() - _MORE.keys():
        raise NewerState(
            f"it has {', '.join(map(repr, sorted(strange)))}, which a newer pyblock wrote"
        )
    try:
        told = msgspec.convert(more, Record)
    except msgspec.ValidationError as error:
        raise InvalidState(f"{error}") from error
    for name in more:
        setattr(record, name, getattr(told, name))


def _identity(state: DeviceState, path: str, driver: Driver) -> Identity | None:
    """What the image is. The original wrote a path of it and, for a block special, its numbers.

    Those hold, whatever the path leads to now and here; but a file that is mounted as pmem has the
    numbers of its loop device.
    """
    if (
        state.dev_type == "b"
        and state.major > 0 <= state.minor
        and driver is not NVDIMM
        and not is_file(path)
    ):
        return ("block", state.major, state.minor)
    return identity_of(path)


def _is_our_own(state: DeviceState, drive: DriveState | None) -> bool:
    """Whether pyblock wrote all of it but for the driver, and would write it again from the
    record."""
    return (
        state.notes is not UNSET
        and bool(state.notes.path)
        and state.extra is UNSET
        and not state.cold_plug
        and state.dev_type == "b"
        and (
            drive is None
            or (
                drive.notes is not UNSET
                and not drive.notes.imported
                and drive.extra is UNSET
                and drive.pci_path is UNSET
                and drive.read_only is not UNSET
                and drive.share_rw is not False
                and not drive.mmio_addr
            )
        )
    )


def _phase(notes: DeviceNotes, state: DeviceState, saved: DriveState | None) -> SavedPhase:
    if notes.phase:
        if (known := _PHASES.get(notes.phase)) is None:
            raise InvalidState(f"phase {notes.phase!r} is not one that is saved")
        phase = known
    else:
        phase = "attached" if state.attach_count else "detached"
    if saved is None and phase != "detached":
        raise InvalidState(f"it is {phase} but has no BlockDrive")
    if (phase == "attached") != (state.attach_count > 0) and phase != "detach-pending":
        raise InvalidState(f"it is {phase} with AttachCount {state.attach_count}")
    return phase


_PHASES: dict[str, SavedPhase] = {phase: phase for phase in get_args(SavedPhase)}


def _driver(name: str | None, saved: DriveState | None, default: Driver) -> Driver:
    if saved is not None and (saved.pmem or saved.nvdimm_id):
        # the original writes the sandbox's driver beside it, whatever the device
        named = DRIVERS.get(name or "")
        return named if named is not None and named.family is NVDIMM.family else NVDIMM
    if name:
        if (driver := DRIVERS.get(name)) is None:
            raise InvalidState(f"block driver {name!r} is unknown; known are {', '.join(DRIVERS)}")
        return driver
    if saved is None:
        return default
    for present, driver in (
        (saved.scsi_addr, VIRTIO_SCSI),
        (saved.dev_no, VIRTIO_BLK_CCW),
        (saved.mmio_addr, VIRTIO_MMIO),
        (saved.virt_path, VIRTIO_BLK),
    ):
        if present:
            return driver
    return default


_NO_NOTES, _NO_DRIVE_NOTES = DeviceNotes(), DriveNotes()
_DIGITS = 8  # of a number behind /dev/pmem; a machine has 256 memory slots
# The channel subsystem in a CCW device number, as QEMU takes it and as the guest has it.
_HOST_CSS, _GUEST_CSS = "fe.", "0."


def _take_drive(record: Record, saved: DriveState, driver: Driver) -> None:
    """Has the record tell of a drive that is held."""
    notes = saved.notes if saved.notes is not UNSET else _NO_DRIVE_NOTES
    if driver.scsi and saved.scsi_addr and saved.scsi_addr != scsi_address(saved.index):
        raise InvalidState(
            f"SCSIAddr {saved.scsi_addr!r} does not belong to Index {saved.index} "
            f"({scsi_address(saved.index)})"
        )
    if not saved.id:
        raise InvalidState("its BlockDrive has no ID")
    if saved.index < 0:
        raise InvalidState(f"its Index {saved.index} is negative")
    if notes.offset < 0:
        raise InvalidState(f"its Offset {notes.offset} is negative")
    if notes.driver and notes.driver != driver.name:
        notes = _NO_DRIVE_NOTES  # it was taken for what it is not
    told = notes.ordinal >= 0
    record.drive_id, record.index = saved.id, saved.index
    record.ordinal, record.offset = (
        (notes.ordinal, notes.offset) if told else (UNTOLD, driver.offset)
    )
    record.known_name = (
        notes.known_name if told and saved.notes is not UNSET else _told_name(saved, driver)
    )
    record.pci_path, record.dev_no = saved.pci_addr or None, saved.dev_no or None
    record.guest_match, record.place = notes.guest_match, notes.slot
    record.imported, record.unverified, record.crowded = (
        _is_imported(saved),
        notes.unverified,
        notes.crowded,
    )


def _told_name(saved: DriveState, driver: Driver) -> str | None:
    """The guest path that the original told. Of a pmem device it is in NvdimmID; VirtPath is what
    the sandbox's driver would have had."""
    if driver is not NVDIMM:
        return saved.virt_path or None
    number = saved.nvdimm_id
    return (
        NVDIMM.family.path(int(number))
        if number.isascii() and number.isdigit() and len(number) < _DIGITS
        else None
    )


def sandbox_to_state(
    sandbox_id: str, own: SandboxRecord, records: Iterable[Record]
) -> SandboxState:
    """The saved form of a sandbox."""
    records = list(records)
    loaded = decode(bytes(own.kata), where="what was loaded") if own.kata else SandboxState()
    hypervisor = (
        loaded.hypervisor_state
        if isinstance(loaded.hypervisor_state, HypervisorState)
        else HypervisorState()
    )
    was = hypervisor.block_index_map or {}
    taken = sorted({*own.taken, *(record.index for record in records if record.holds)})
    indexes = {(text := str(index)): was.get(text, {}) for index in taken}
    devices = [device_to_state(record) for record in records]
    more = any(one.notes is not UNSET and one.notes.more for one in devices)
    state = SandboxState(
        notes=SandboxNotes(
            version=VERSION if more else PLAIN, sandbox=sandbox_id, offsets=own.offsets
        ),
        devices=[*devices, *(loaded.devices or ())],
        hypervisor_state=msgspec.structs.replace(hypervisor, block_index_map=indexes),
    )
    state.extra = loaded.extra
    return state


def sandbox_from_state(
    state: SandboxState, default: Driver, *, where: str, share: bool = False
) -> tuple[SandboxRecord, list[Record]]:
    """The records of a saved form: the sandbox's own, and those of its devices.

    :param default: the driver of what tells none.
    :param share: others may write their images as well.
    Raises InvalidState when a device contradicts itself.
    """
    records: list[Record] = []
    untouched: list[DeviceState] = []
    for saved in state.devices or ():
        record = device_from_state(saved, default, where=where, share=share)
        if record is None:
            untouched.append(saved)
        else:
            records.append(record)
    offsets = state.notes.offsets if state.notes is not UNSET else {}
    held = {record.index for record in records}
    held.discard(NO_DRIVE)
    if offsets and (lowest := min(offsets.values())) < 0:
        raise InvalidState(
            f"{where} contradicts itself: block offset {lowest} is negative; it is left as it is"
        )
    try:
        taken = sorted(_mapped(state.hypervisor_state, held) - held)
    except InvalidIndex as error:
        raise InvalidState(f"{where} contradicts itself: {error}; it is left as it is") from error
    hypervisor = state.hypervisor_state
    own = SandboxRecord(offsets=offsets, taken=taken)
    if untouched or state.extra is not UNSET or not _is_plain(hypervisor):
        own.kata = Raw(
            encode_short(
                SandboxState(devices=untouched, hypervisor_state=hypervisor, extra=state.extra)
            )
        )
    return own, records


def _is_plain(hypervisor: HypervisorState | UnsetType | None) -> bool:
    if hypervisor is UNSET:
        return True
    return (
        hypervisor is not None
        and hypervisor.extra is UNSET
        and not any((hypervisor.block_index_map or {}).values())
    )


def _mapped(hypervisor: HypervisorState | UnsetType | None, held: set[int]) -> set[int]:
    """The indexes of BlockIndexMap, where it has others than the drives': something that pyblock
    does not know took them."""
    texts = hypervisor.block_index_map if isinstance(hypervisor, HypervisorState) else None
    if not texts or texts.keys() == {str(index) for index in held}:
        return set()
    for text in texts:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise InvalidIndex(
                f"index {text[:40]!r} in BlockIndexMap is not a number, or not a possible one"
            )
    return {int(text) for text in texts}
