"""Devices and drives to their saved form and back. What the saved form had and pyblock does not know comes out again as it went in."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from pyblock.device import BlockDevice, Phase
from pyblock.drivers import DRIVERS, NVDIMM, VIRTIO_BLK, VIRTIO_BLK_CCW, VIRTIO_MMIO, VIRTIO_SCSI, Driver
from pyblock.errors import InvalidID, InvalidIndex, InvalidState
from pyblock.generic import GenericDevice
from pyblock.host import Identity
from pyblock.model import BlockDrive, DeviceInfo, check_device_id
from pyblock.naming import scsi_address
from pyblock.state import DeviceNotes, DeviceState, DriveNotes, DriveState

# An operation that was under way when the state was saved has an unknown outcome for whoever loads it.
_SAVED_PHASE = {Phase.ATTACHING: Phase.ATTACH_PENDING, Phase.DETACHING: Phase.DETACH_PENDING}
_RESTING = frozenset({Phase.DETACHED, Phase.ATTACHED, Phase.ATTACH_PENDING, Phase.DETACH_PENDING})

GENERIC = "generic"
BLOCK = "block"


def device_to_state(device: BlockDevice | GenericDevice) -> DeviceState:
    """The saved form of a device."""
    if isinstance(device, GenericDevice):
        info = device.info
        return DeviceState(
            id=device.id, type=GENERIC, ref_count=device.ref_count, attach_count=device.attach_count,
            dev_type=info.dev_type, major=info.major, minor=info.minor, driver_options=info.options,
        )  # fmt: skip
    saved = device.saved or DeviceState(notes=DeviceNotes())
    state = msgspec.structs.replace(saved, id=device.id, ref_count=device.ref_count, attach_count=device.attach_count)
    if saved.extra:
        state.__dict__["extra"] = saved.extra
    info, identity = device.info, device.identity
    if device.saved is None:
        state.dev_type = "b"
        state.major, state.minor = (identity.first, identity.second) if identity and identity.kind == "block" else (0, 0)
        state.driver_options = {**info.options, "block-driver": info.driver or ""}
    if state.notes is not UNSET:
        state.notes = DeviceNotes(
            phase=_SAVED_PHASE.get(device.phase, device.phase).value, path=info.path, driver=info.driver, serial=info.serial,
            read_only=info.read_only, identity=(identity.kind, identity.first, identity.second) if identity else None,
        )  # fmt: skip
    if device.drive is not None:
        state.block_drive = _drive_to_state(device.drive, saved.block_drive if isinstance(saved.block_drive, DriveState) else None)
    elif device.saved is None:
        state.block_drive = UNSET
    return state


def _drive_to_state(drive: BlockDrive, saved: DriveState | None) -> DriveState:
    if saved is not None and saved.notes is UNSET:
        return saved  # the original wrote it, and nothing of a drive changes while it is attached
    return DriveState(
        file=drive.file, format=drive.format, id=drive.id, index=drive.index,
        pci_path=drive.pci_path or "", scsi_addr=drive.scsi_addr or "",
        nvdimm_id=drive.nvdimm_id or "", virt_path=drive.virt_path or "", dev_no=drive.dev_no or "",
        pmem=drive.pmem, read_only=drive.read_only,
        notes=DriveNotes(
            driver=drive.driver, ordinal=drive.ordinal, offset=drive.offset, serial=drive.serial, guest_match=drive.guest_match,
            slot=drive.slot, known_name=drive.known_name,
        ),
    )  # fmt: skip


def device_from_state(state: DeviceState, default: Driver, *, where: str) -> BlockDevice | GenericDevice | None:
    """The device of a saved form; None for a kind that pyblock keeps untouched. Its drive's ordinal is -1 where the saved form does not
    tell.

    Raises InvalidState, naming the device, when the values contradict each other.
    """
    if state.type not in (BLOCK, GENERIC):
        return None
    try:
        check_device_id(state.id)
        if state.ref_count < 0 or state.attach_count < 0:
            raise InvalidState(f"AttachCount {state.attach_count} or RefCount {state.ref_count} is negative")
        return _generic(state) if state.type == GENERIC else _block(state, default)
    except (InvalidState, InvalidID, InvalidIndex) as error:
        raise InvalidState(f"{where}: device {state.id!r}: {error}; the file is left as it is") from error


def _generic(state: DeviceState) -> GenericDevice:
    info = DeviceInfo(id=state.id, dev_type=state.dev_type, major=state.major, minor=state.minor, options=state.driver_options or {})
    device = GenericDevice(state.id, info)
    device.ref_count, device.attach_count = state.ref_count, state.attach_count
    return device


def _block(state: DeviceState, default: Driver) -> BlockDevice:
    notes = state.notes if state.notes is not UNSET else DeviceNotes()
    saved = state.block_drive if isinstance(state.block_drive, DriveState) else None
    phase = _phase(notes, state, saved)
    driver = _driver(notes.driver or (state.driver_options or {}).get("block-driver"), saved, default)
    drive = _drive(saved, driver) if saved is not None and phase is not Phase.DETACHED else None
    info = DeviceInfo(
        path=notes.path or (saved.file if saved else ""), driver=driver.name, serial=notes.serial, id=state.id, dev_type=state.dev_type,
        read_only=notes.read_only or bool(drive and drive.read_only), major=state.major, minor=state.minor,
        options=state.driver_options or {},
    )  # fmt: skip
    device = BlockDevice(state.id, info, Identity(*notes.identity) if notes.identity else None)
    device.ref_count, device.attach_count, device.phase, device.drive = state.ref_count, state.attach_count, phase, drive
    if state.notes is UNSET or state.extra or (saved and saved.extra):
        device.saved = state
    return device


def _phase(notes: DeviceNotes, state: DeviceState, saved: DriveState | None) -> Phase:
    if notes.phase:
        try:
            phase = Phase(notes.phase)
        except ValueError:
            raise InvalidState(f"phase {notes.phase!r} is unknown") from None
    else:
        phase = Phase.ATTACHED if state.attach_count else Phase.DETACHED
    if phase not in _RESTING:
        raise InvalidState(f"phase {phase.value!r} is not one that is saved")
    if phase is not Phase.DETACHED and saved is None:
        raise InvalidState(f"it is {phase.value} but has no BlockDrive")
    if (phase is Phase.ATTACHED) != (state.attach_count > 0) and phase is not Phase.DETACH_PENDING:
        raise InvalidState(f"it is {phase.value} with AttachCount {state.attach_count}")
    return phase


def _driver(name: str | None, saved: DriveState | None, default: Driver) -> Driver:
    if name:
        if name not in DRIVERS:
            raise InvalidState(f"block driver {name!r} is unknown; known are {', '.join(DRIVERS)}")
        return DRIVERS[name]
    if saved is None:
        return default
    for present, driver in (
        (saved.scsi_addr, VIRTIO_SCSI),
        (saved.pmem or saved.nvdimm_id, NVDIMM),
        (saved.dev_no, VIRTIO_BLK_CCW),
        (saved.mmio_addr, VIRTIO_MMIO),
        (saved.virt_path, VIRTIO_BLK),
    ):
        if present:
            return driver
    return default


def _drive(saved: DriveState, driver: Driver) -> BlockDrive:
    notes = saved.notes if saved.notes is not UNSET else DriveNotes()
    if driver.scsi and saved.scsi_addr and saved.scsi_addr != scsi_address(saved.index):
        raise InvalidState(f"SCSIAddr {saved.scsi_addr!r} does not belong to Index {saved.index} ({scsi_address(saved.index)})")
    if not saved.id:
        raise InvalidState("its BlockDrive has no ID")
    pci_path = saved.pci_path if isinstance(saved.pci_path, str) else saved.pci_addr
    return BlockDrive(
        id=saved.id, index=saved.index, ordinal=notes.ordinal, offset=notes.offset if notes.ordinal >= 0 else driver.offset, kind=driver,
        file=saved.file, format=saved.format or "raw", read_only=saved.read_only is True, serial=notes.serial,
        pci_path=(pci_path if isinstance(pci_path, str) else "") or None, nvdimm_id=saved.nvdimm_id or None, dev_no=saved.dev_no or None,
        guest_match=notes.guest_match, slot=notes.slot,
        known_name=notes.known_name or (saved.virt_path if saved.notes is UNSET and saved.virt_path else None),
    )  # fmt: skip
