"""Sandboxes, devices and drives to their saved form and back.

What the saved form had and pyblock does not know comes out again as it went in.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from pyblock.allotment import Allotment
from pyblock.device import BlockDevice, Phase
from pyblock.drivers import DRIVERS, NVDIMM, VIRTIO_BLK, VIRTIO_BLK_CCW, VIRTIO_MMIO, VIRTIO_SCSI, Driver
from pyblock.errors import InvalidID, InvalidIndex, InvalidState, PyblockError
from pyblock.generic import GenericDevice
from pyblock.host import Identity, identity_of
from pyblock.manager import DeviceManager
from pyblock.model import BlockDrive, DeviceInfo, check_device_id
from pyblock.naming import scsi_address
from pyblock.state import DeviceNotes, DeviceState, DriveNotes, DriveState, HypervisorState, SandboxNotes, SandboxState

# An operation that was under way when the state was saved has an unknown outcome for whoever loads it.
_SAVED_PHASE = {Phase.ATTACHING: Phase.ATTACH_PENDING, Phase.DETACHING: Phase.DETACH_PENDING}
_RESTING = frozenset({Phase.DETACHED, Phase.ATTACHED, Phase.ATTACH_PENDING, Phase.DETACH_PENDING})

GENERIC = "generic"
BLOCK = "block"


def device_to_state(device: BlockDevice | GenericDevice) -> DeviceState:
    """The saved form of a device."""
    saved = device.saved or DeviceState(notes=UNSET if isinstance(device, GenericDevice) else DeviceNotes())
    state = msgspec.structs.replace(saved, id=device.id, ref_count=device.ref_count, attach_count=device.attach_count)
    if saved.extra:
        state.__dict__["extra"] = saved.extra
    info = device.info
    if isinstance(device, GenericDevice):
        if device.saved is None:
            state.type, state.dev_type, state.major, state.minor = GENERIC, info.dev_type, info.major, info.minor
            state.driver_options = info.options
        return state
    identity, drive = device.identity, device.drive
    if device.saved is None:
        state.dev_type = "b"
        state.major, state.minor = (identity.first, identity.second) if identity and identity.kind == "block" else (0, 0)
        state.driver_options = {**info.options, "block-driver": info.driver or ""}
    before = saved.block_drive if isinstance(saved.block_drive, DriveState) else None
    same = drive is not None and before is not None and _is_same(drive, before)
    # What the original wrote stays as it wrote it as long as it has words for where the device stands.
    if saved.notes is UNSET and device.phase in (Phase.ATTACHED, Phase.DETACHED) and (same or drive is None):
        return state
    state.notes = DeviceNotes(
        phase=_SAVED_PHASE.get(device.phase, device.phase).value, path=info.path, driver=info.driver, serial=info.serial,
        read_only=info.read_only, identity=(identity.kind, identity.first, identity.second) if identity else None,
    )  # fmt: skip
    if drive is not None:
        state.block_drive = _drive_to_state(drive, before if same else None)
    elif device.saved is None:
        state.block_drive = UNSET
    return state


def _is_same(drive: BlockDrive, saved: DriveState) -> bool:
    """Whether this is the drive that was saved, and not one that the device got since."""
    notes = saved.notes if saved.notes is not UNSET else DriveNotes()
    have = (drive.id, drive.index, drive.file, drive.slot, drive.guest_match)
    return have == (saved.id, saved.index, saved.file, notes.slot, notes.guest_match)


def _drive_to_state(drive: BlockDrive, saved: DriveState | None) -> DriveState:
    """`saved`: the same drive's saved form, if there is one; nothing of a drive changes while it is there."""
    state = msgspec.structs.replace(saved) if saved is not None else DriveState(
        file=drive.file, format=drive.format, id=drive.id, index=drive.index,
        pci_path=drive.pci_path or "", scsi_addr=drive.scsi_addr or "",
        nvdimm_id=drive.nvdimm_id or "", virt_path=drive.virt_path or "", dev_no=drive.dev_no or "",
        pmem=drive.pmem, read_only=drive.read_only,
    )  # fmt: skip
    if saved is not None and saved.extra:
        state.__dict__["extra"] = saved.extra
    state.notes = DriveNotes(
        driver=drive.driver, ordinal=drive.ordinal, offset=drive.offset, serial=drive.serial, guest_match=drive.guest_match,
        slot=drive.slot, known_name=drive.known_name,
    )  # fmt: skip
    return state


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
    device.ref_count, device.attach_count, device.saved = state.ref_count, state.attach_count, state
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
    # The original writes no identity; what its path is now is the best there is.
    device = BlockDevice(state.id, info, Identity(*notes.identity) if notes.identity else identity_of(info.path))
    device.ref_count, device.attach_count, device.phase, device.drive = state.ref_count, state.attach_count, phase, drive
    if not _is_our_own(state, saved, driver):
        device.saved = state
    return device


def _is_our_own(state: DeviceState, drive: DriveState | None, driver: Driver) -> bool:
    """Whether pyblock wrote all of it, and would write it again from what the device knows."""
    return (
        state.notes is not UNSET
        and not state.extra
        and not state.cold_plug
        and state.dev_type == "b"
        and (state.driver_options or {}).get("block-driver") == driver.name
        and (
            drive is None
            or (
                drive.notes is not UNSET
                and not drive.extra
                and drive.pci_addr is UNSET
                and drive.share_rw is UNSET
                and not drive.mmio_addr
                and isinstance(drive.pci_path, str)
            )
        )
    )


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
    if notes.offset < 0:
        raise InvalidState(f"its Offset {notes.offset} is negative")
    pci_path = saved.pci_path if isinstance(saved.pci_path, str) else saved.pci_addr
    return BlockDrive(
        id=saved.id, index=saved.index, ordinal=notes.ordinal, offset=notes.offset if notes.ordinal >= 0 else driver.offset, kind=driver,
        file=saved.file, format=saved.format or "raw", read_only=saved.read_only is True, serial=notes.serial,
        pci_path=(pci_path if isinstance(pci_path, str) else "") or None, nvdimm_id=saved.nvdimm_id or None, dev_no=saved.dev_no or None,
        guest_match=notes.guest_match, slot=notes.slot,
        known_name=notes.known_name or (saved.virt_path if saved.notes is UNSET and saved.virt_path else None),
    )  # fmt: skip


class Kept(msgspec.Struct, frozen=True, gc=False):
    """What a loaded state had and pyblock has no place for.

    :ivar devices: those of kinds that pyblock does not plug.
    :ivar sandbox: the rest of the file, without its devices.
    """

    devices: list[DeviceState]
    sandbox: SandboxState


def sandbox_to_state(sandbox_id: str, manager: DeviceManager, allotment: Allotment, kept: Kept | None) -> SandboxState:
    """The saved form of a sandbox."""
    loaded = kept.sandbox if kept is not None else SandboxState()
    hypervisor = loaded.hypervisor_state if isinstance(loaded.hypervisor_state, HypervisorState) else HypervisorState()
    was = hypervisor.block_index_map or {}
    indexes = {(text := str(index)): was.get(text, {}) for index in allotment.own_indexes()}
    state = SandboxState(
        notes=SandboxNotes(sandbox=sandbox_id, offsets=allotment.offsets),
        devices=[*(device_to_state(device) for device in manager), *(kept.devices if kept is not None else ())],
        hypervisor_state=msgspec.structs.replace(hypervisor, block_index_map=indexes),
    )
    for new, old in ((state, loaded), (state.hypervisor_state, hypervisor)):
        if old.extra and isinstance(new, SandboxState | HypervisorState):
            new.__dict__["extra"] = old.extra
    return state


def restore_sandbox(state: SandboxState, manager: DeviceManager, allotment: Allotment, *, where: str) -> Kept | None:
    """Puts what a saved form says into an empty manager and an unused allotment; returns what there is no place for.

    Raises InvalidState when the state contradicts itself, having changed neither.
    """
    devices: list[BlockDevice | GenericDevice] = []
    drives: list[BlockDrive] = []
    untouched: list[DeviceState] = []
    default = manager.driver
    for saved in state.devices or ():
        device = device_from_state(saved, default, where=where)
        if device is None:
            untouched.append(saved)
            continue
        devices.append(device)
        if isinstance(device, BlockDevice) and device.drive is not None:
            drives.append(device.drive)
    try:
        manager.check_new(devices)
        offsets = state.notes.offsets if state.notes is not UNSET else {}
        if (lowest := min(offsets.values(), default=0)) < 0:
            raise InvalidIndex(f"block offset {lowest} is negative")
        allotment.restore(drives, _mapped(state.hypervisor_state, drives), offsets)
    except PyblockError as error:
        raise InvalidState(f"{where} contradicts itself: {error}; it is left as it is") from error
    manager.load(devices)
    hypervisor = state.hypervisor_state
    plain = not state.extra and (hypervisor is UNSET or (isinstance(hypervisor, HypervisorState) and _is_plain(hypervisor)))
    if plain and not untouched:
        return None
    return Kept(untouched, SandboxState(hypervisor_state=hypervisor)) if not state.extra else Kept(untouched, _without_devices(state))


def _is_plain(hypervisor: HypervisorState) -> bool:
    return not hypervisor.extra and not any((hypervisor.block_index_map or {}).values())


def _without_devices(state: SandboxState) -> SandboxState:
    rest = SandboxState(hypervisor_state=state.hypervisor_state)
    rest.__dict__["extra"] = state.extra
    return rest


def _mapped(hypervisor: HypervisorState | UnsetType | None, drives: Sequence[BlockDrive]) -> set[int]:
    """The indexes of BlockIndexMap that no drive has: something that pyblock does not know took them."""
    texts = hypervisor.block_index_map if isinstance(hypervisor, HypervisorState) else None
    if not texts or texts.keys() == {str(drive.index) for drive in drives}:
        return set()
    for text in texts:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise InvalidIndex(f"index {text[:40]!r} in BlockIndexMap is not a number, or not a possible one")
    return {int(text) for text in texts}
