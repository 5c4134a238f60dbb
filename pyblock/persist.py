"""Sandboxes, devices and drives to their saved form and back.

What the saved form had and pyblock does not know comes out again as it went in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from pyblock.allotment import Allotment
from pyblock.device import BlockDevice
from pyblock.drivers import DRIVERS, NVDIMM, VIRTIO_BLK, VIRTIO_BLK_CCW, VIRTIO_MMIO, VIRTIO_SCSI, Driver
from pyblock.errors import InvalidID, InvalidIndex, InvalidState, PyblockError
from pyblock.formats import RAW
from pyblock.generic import GenericDevice
from pyblock.image import identity_of, is_file
from pyblock.lineage import Identity, lineage_of
from pyblock.manager import NO_OPTIONS, Device, DeviceManager
from pyblock.model import BlockDrive, DeviceInfo, check_device_id
from pyblock.naming import scsi_address
from pyblock.state import DeviceNotes, DeviceState, DriveNotes, DriveState, HypervisorState, SandboxNotes, SandboxState
from pyblock.table import Phase

# An operation that was under way when the state was saved has an unknown outcome for whoever loads it.
_SAVED_PHASE = {Phase.ATTACHING: Phase.ATTACH_PENDING, Phase.DETACHING: Phase.DETACH_PENDING}
_PHASES = {phase.value: phase for phase in (Phase.DETACHED, Phase.ATTACHED, Phase.ATTACH_PENDING, Phase.DETACH_PENDING)}

# Bound once: a member of an enum takes three times as long as a name, and each device asks for six.
_ATTACHED, _DETACHED, _DETACH_PENDING = Phase.ATTACHED, Phase.DETACHED, Phase.DETACH_PENDING

_LOWEST, _SIGNED, _UNSIGNED = -(2**63), 2**63, 2**64  # what the original's integers hold

GENERIC = "generic"
BLOCK = "block"

# Major and minor of a file. The original of 2020 had 0 and 0, and took two devices with the same numbers for one.
FILE = (-1, 0)


def device_to_state(device: Device) -> DeviceState:
    """The saved form of a device."""
    saved = device.saved or DeviceState(notes=UNSET if isinstance(device, GenericDevice) else DeviceNotes())
    state = msgspec.structs.replace(saved, id=device.id, ref_count=device.ref_count, attach_count=device.attach_count)
    info = device.info
    if isinstance(device, GenericDevice):
        if device.saved is None:
            state.type, state.dev_type, state.major, state.minor = GENERIC, info.dev_type, info.major, info.minor
            state.driver_options = info.options
        return state
    identity, drive = device.identity, device.drive
    if device.saved is None:
        state.dev_type = "b"
        state.major, state.minor = (info.major, info.minor) if info.major > 0 else FILE
        state.driver_options = {**info.options, "block-driver": info.driver or ""}
    before = saved.block_drive if isinstance(saved.block_drive, DriveState) else None
    same = drive is not None and before is not None and _is_same(drive, before)
    if drive is not None:
        state.block_drive = _drive_to_state(drive, before if same else None)
    elif device.saved is None:
        state.block_drive = UNSET
    # What the original wrote stays as it wrote it as long as it has words for where the device stands.
    told = same or drive is None
    if saved.notes is UNSET and device.phase in (Phase.ATTACHED, Phase.DETACHED) and told and info.share == _is_shared(before):
        return state
    state.notes = DeviceNotes(
        phase=_SAVED_PHASE.get(device.phase, device.phase).value, path=info.path, driver=info.driver, serial=info.serial,
        read_only=info.read_only, share=info.share, format="raw" if info.format == RAW else None, identity=identity,
    )  # fmt: skip
    return state


def _is_same(drive: BlockDrive, saved: DriveState) -> bool:
    """Whether this is the drive that was saved, and not one that the device got since."""
    return drive.imported == _is_imported(saved) and (drive.id, drive.index, drive.file) == (saved.id, saved.index, saved.file)


def _is_imported(saved: DriveState) -> bool:
    """Whether another program plugged it in. What pyblock wrote of such drives before it marked them lacks ReadOnly where the original
    had none."""
    return saved.notes is UNSET or saved.notes.imported or saved.read_only is UNSET


def _is_shared(saved: DriveState | None) -> bool:
    return saved is not None and saved.share_rw is True


def _drive_to_state(drive: BlockDrive, saved: DriveState | None) -> DriveState:
    """`saved`: the same drive's saved form, if there is one, whose unknown keys are kept; so are all its keys where another program
    plugged it in, but for a PCI address that the machine told."""
    if saved is None or not drive.imported:
        state = DriveState(
            file=drive.info.path, format=drive.info.options.get("fstype") or "raw", id=drive.id, index=drive.index,
            pci_addr=drive.pci_path or "", scsi_addr=drive.scsi_addr or "",
            nvdimm_id=drive.nvdimm_id or "", virt_path=drive.guess if drive.kind.guest_path else "", dev_no=drive.dev_no or "",
            pmem=drive.pmem, read_only=drive.info.read_only, share_rw=True if drive.info.share else UNSET,
        )  # fmt: skip
        if saved is not None:
            state.extra, state.pci_path, state.mmio_addr = saved.extra, saved.pci_path, saved.mmio_addr
            state.share_rw = saved.share_rw if state.share_rw is UNSET else True
    else:
        state = msgspec.structs.replace(saved)
        if drive.pci_path is not None:
            state.pci_addr = drive.pci_path
    state.notes = DriveNotes(
        driver=drive.driver, ordinal=drive.ordinal, offset=drive.offset, serial=drive.info.serial, guest_match=drive.guest_match,
        slot=drive.place, known_name=drive.known_name, imported=drive.imported, unverified=not drive.verified, crowded=drive.crowded,
    )  # fmt: skip
    return state


def device_from_state(state: DeviceState, default: Driver, *, where: str, share: bool = False) -> Device | None:
    """The device of a saved form; None for a kind that pyblock keeps untouched. Its drive's ordinal is -1 where the saved form does not
    tell.

    :param share: others may write its image as well, whatever the saved form says.
    Raises InvalidState, naming the device, when the values contradict each other.
    """
    if state.type not in (BLOCK, GENERIC):
        return None
    try:
        check_device_id(state.id)
        if state.ref_count < 0 or state.attach_count < 0:
            raise InvalidState(f"AttachCount {state.attach_count} or RefCount {state.ref_count} is negative")
        fits = _LOWEST <= state.major < _SIGNED and _LOWEST <= state.minor < _SIGNED
        if not fits or state.ref_count >= _UNSIGNED or state.attach_count >= _UNSIGNED:
            raise InvalidState("a count, or Major:Minor, is a number of more than 64 bits, which the original cannot read")
        return _generic(state) if state.type == GENERIC else _block(_readable(state), default, share=share)
    except (InvalidState, InvalidID, InvalidIndex) as error:
        raise InvalidState(f"{where}: device {state.id!r}: {error}; the file is left as it is") from error


def _generic(state: DeviceState) -> GenericDevice:
    info = DeviceInfo(id=state.id, dev_type=state.dev_type, major=state.major, minor=state.minor, options=state.driver_options or {})
    device = GenericDevice(state.id, info)
    device.ref_count, device.attach_count, device.saved = state.ref_count, state.attach_count, state
    return device


def _readable(state: DeviceState) -> DeviceState:
    """The saved form with its addresses as both versions of the original read them; pyblock wrote other ones before."""
    drive = state.block_drive
    if not isinstance(drive, DriveState) or (drive.pci_path is UNSET and not drive.dev_no):
        return state  # nearly all
    new = drive
    if isinstance(drive.pci_path, str):
        new = msgspec.structs.replace(drive, pci_path=UNSET, pci_addr=drive.pci_path or drive.pci_addr or "")
    if drive.dev_no.startswith(_HOST_CSS) and not _is_imported(drive):
        new = msgspec.structs.replace(new, dev_no=_GUEST_CSS + drive.dev_no.removeprefix(_HOST_CSS))
    return state if new is drive else msgspec.structs.replace(state, block_drive=new)


def _block(state: DeviceState, default: Driver, *, share: bool) -> BlockDevice:
    notes = state.notes if state.notes is not UNSET else _NO_NOTES
    saved = state.block_drive or None
    phase = _phase(notes, state, saved)
    options = state.driver_options or NO_OPTIONS
    driver = _driver(notes.driver or options.get("block-driver"), saved, default)
    path = notes.path or (saved.file if saved is not None else "")
    serial = notes.serial
    if serial == state.id:
        serial = state.id  # one text in memory, not two
    read_only, share = notes.read_only, share or notes.share
    if saved is not None and phase is not _DETACHED:
        read_only = read_only or saved.read_only is True
        share = share or saved.share_rw is True
    ours = _is_our_own(state, saved, driver)
    if ours and len(options) == 1:
        options = NO_OPTIONS  # the driver alone, which is written anew
    plain = ours and (state.major, state.minor) == FILE  # which the original has no words for
    special = ("", -1, -1) if plain else (state.dev_type, state.major, state.minor)
    info = DeviceInfo(path, driver.name, read_only, serial, state.id, *special, options, share, notes.format)
    drive = _drive(saved, driver, info) if saved is not None and phase is not _DETACHED else None
    identity = notes.identity or _identity(state, path, driver)
    if identity is None or identity[0] == "file":  # nothing lies under a file
        device = BlockDevice(state.id, info, identity)
    else:
        lineage = lineage_of(identity)
        device = BlockDevice(state.id, info, lineage.identity, lineage.claims)
    device.ref_count, device.attach_count, device.phase, device.drive = state.ref_count, state.attach_count, phase, drive
    if not ours:
        device.saved = state
    return device


def _identity(state: DeviceState, path: str, driver: Driver) -> Identity | None:
    """What the image is. The original wrote a path of it and, for a block special, its numbers.

    Those hold, whatever the path leads to now and here; but a file that is mounted as pmem has the numbers of its loop device.
    """
    if state.dev_type == "b" and state.major > 0 <= state.minor and driver is not NVDIMM and not is_file(path):
        return ("block", state.major, state.minor)
    return identity_of(path)


def _is_our_own(state: DeviceState, drive: DriveState | None, driver: Driver) -> bool:
    """Whether pyblock wrote all of it, and would write it again from what the device knows."""
    return (
        state.notes is not UNSET
        and bool(state.notes.path)
        and state.extra is UNSET
        and not state.cold_plug
        and state.dev_type == "b"
        and (state.driver_options or NO_OPTIONS).get("block-driver") == driver.name
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


def _phase(notes: DeviceNotes, state: DeviceState, saved: DriveState | None) -> Phase:
    if notes.phase:
        if (known := _PHASES.get(notes.phase)) is None:
            raise InvalidState(f"phase {notes.phase!r} is not one that is saved")
        phase = known
    else:
        phase = _ATTACHED if state.attach_count else _DETACHED
    if saved is None and phase is not _DETACHED:
        raise InvalidState(f"it is {phase.value} but has no BlockDrive")
    if (phase is _ATTACHED) != (state.attach_count > 0) and phase is not _DETACH_PENDING:
        raise InvalidState(f"it is {phase.value} with AttachCount {state.attach_count}")
    return phase


def _driver(name: str | None, saved: DriveState | None, default: Driver) -> Driver:
    if saved is not None and (saved.pmem or saved.nvdimm_id):
        return NVDIMM  # the original writes the sandbox's driver beside it, whatever the device
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


def _drive(saved: DriveState, driver: Driver, info: DeviceInfo) -> BlockDrive:
    notes = saved.notes if saved.notes is not UNSET else _NO_DRIVE_NOTES
    if driver.scsi and saved.scsi_addr and saved.scsi_addr != scsi_address(saved.index):
        raise InvalidState(f"SCSIAddr {saved.scsi_addr!r} does not belong to Index {saved.index} ({scsi_address(saved.index)})")
    if not saved.id:
        raise InvalidState("its BlockDrive has no ID")
    if notes.offset < 0:
        raise InvalidState(f"its Offset {notes.offset} is negative")
    if notes.driver and notes.driver != driver.name:
        notes = _NO_DRIVE_NOTES  # it was taken for what it is not
    known_name = _told_name(saved, driver) if saved.notes is UNSET or notes.ordinal < 0 else notes.known_name
    return BlockDrive(
        saved.id, saved.index, notes.ordinal, notes.offset if notes.ordinal >= 0 else driver.offset, driver, info,
        saved.pci_addr or None, saved.dev_no or None, notes.guest_match, notes.slot, known_name,
        _is_imported(saved), not notes.unverified, notes.crowded,
    )  # fmt: skip


def _told_name(saved: DriveState, driver: Driver) -> str | None:
    """The guest path that the original told. Of a pmem device it is in NvdimmID; VirtPath is what the sandbox's driver would have had."""
    if driver is not NVDIMM:
        return saved.virt_path or None
    number = saved.nvdimm_id
    return NVDIMM.family.path(int(number)) if number.isascii() and number.isdigit() and len(number) < _DIGITS else None


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
    state.extra = loaded.extra
    return state


def sandbox_to_row(sandbox_id: str, devices: Iterable[Device], allotment: Allotment, kept: Kept | None) -> SandboxState | None:
    """What a store keeps of a sandbox beside its devices: what was loaded and has no other place; None for nothing."""
    state = kept.sandbox if kept is not None else SandboxState()
    indexes = {device.drive.index for device in devices if isinstance(device, BlockDevice) and device.drive is not None}
    taken = [index for index in allotment.own_indexes() if index not in indexes]
    if kept is None and not taken:
        return None
    notes = SandboxNotes(sandbox=sandbox_id, offsets=allotment.offsets, taken=taken)
    return msgspec.structs.replace(state, notes=notes, devices=kept.devices if kept is not None else [])


def restore_sandbox(
    state: SandboxState, manager: DeviceManager, allotment: Allotment, *, where: str, share: bool = False
) -> tuple[list[Device], Kept | None]:
    """The devices of a saved form, which an empty manager can take in, and what there is no place for; an unused allotment is told what
    they take.

    :param share: others may write their images as well.
    Raises InvalidState when the state contradicts itself, having changed nothing.
    """
    devices: list[Device] = []
    drives: list[BlockDrive] = []
    untouched: list[DeviceState] = []
    default = manager.driver
    for saved in state.devices or ():
        device = device_from_state(saved, default, where=where, share=share)
        if device is None:
            untouched.append(saved)
            continue
        devices.append(device)
        if isinstance(device, BlockDevice) and device.drive is not None:
            drives.append(device.drive)
    try:
        manager.check_new(devices)
        offsets = state.notes.offsets if state.notes is not UNSET else {}
        if offsets and (lowest := min(offsets.values())) < 0:
            raise InvalidIndex(f"block offset {lowest} is negative")
        taken = state.notes.taken if state.notes is not UNSET else UNSET
        others = _mapped(state.hypervisor_state, drives) if taken is UNSET else set(taken)
        allotment.restore(drives, others, offsets)
    except PyblockError as error:
        raise InvalidState(f"{where} contradicts itself: {error}; it is left as it is") from error
    hypervisor = state.hypervisor_state
    if not untouched and state.extra is UNSET and (hypervisor is UNSET or (hypervisor is not None and _is_plain(hypervisor))):
        return devices, None
    return devices, Kept(untouched, SandboxState(hypervisor_state=hypervisor, extra=state.extra))


def _is_plain(hypervisor: HypervisorState) -> bool:
    return hypervisor.extra is UNSET and not any((hypervisor.block_index_map or {}).values())


def _mapped(hypervisor: HypervisorState | UnsetType | None, drives: Sequence[BlockDrive]) -> set[int]:
    """The indexes of BlockIndexMap that no drive has: something that pyblock does not know took them."""
    texts = hypervisor.block_index_map if isinstance(hypervisor, HypervisorState) else None
    if not texts or texts.keys() == {str(drive.index) for drive in drives}:
        return set()
    for text in texts:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise InvalidIndex(f"index {text[:40]!r} in BlockIndexMap is not a number, or not a possible one")
    return {int(text) for text in texts}
