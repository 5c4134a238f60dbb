"""Devices as records, and back: what of them is written down, and how they are taken up again."""

from __future__ import annotations

from operator import attrgetter

from msgspec import Raw

from pyblock.device import BlockDevice
from pyblock.generic import GenericDevice
from pyblock.lineage import Identity, lineage_of
from pyblock.stores.record import ASKED, Record, SandboxRecord, SavedPhase
from pyblock.table import Phase

_asked = attrgetter(*ASKED)

# An operation that is under way has an unknown outcome for whoever takes the record up.
_SAVED: dict[Phase, SavedPhase] = {
    Phase.DETACHED: "detached",
    Phase.ATTACHING: "attach-pending",
    Phase.ATTACHED: "attached",
    Phase.DETACHING: "detach-pending",
    Phase.ATTACH_PENDING: "attach-pending",
    Phase.DETACH_PENDING: "detach-pending",
}


def record_of(device: BlockDevice | GenericDevice) -> Record:
    """What is to be known of a device."""
    info, count, users = device.info, device.attach_count, device.ref_count
    record = Record(**dict(zip(ASKED, _asked(info), strict=True)))
    record.id, record.driver = device.id, info.driver or ""
    record.attach_count, record.users = count, users if users != count else None
    record.kata = Raw(device.kata)
    if isinstance(device, GenericDevice):
        record.generic, record.phase = True, "attached" if count else "detached"
        return record
    record.identity, record.phase = device.identity, _SAVED[device.phase]
    if (drive := device.drive) is not None:
        record.drive_id, record.index, record.ordinal, record.offset = drive.id, drive.index, drive.ordinal, drive.offset
        record.place, record.pci_path, record.dev_no = drive.place, drive.pci_path, drive.dev_no
        record.guest_match, record.known_name = drive.guest_match, drive.known_name
        record.imported, record.unverified, record.crowded = drive.imported, not drive.verified, drive.crowded
    return record


def device_of(record: Record) -> BlockDevice | GenericDevice:
    """The device of a record; of a block device it is looked at what lies under it. Raises DescriptorsExhausted."""
    info = record.info()
    device: BlockDevice | GenericDevice
    if record.generic:
        device = GenericDevice(record.id, info)
    else:
        identity, under = record.identity, _NOTHING
        if identity is not None and identity[0] != "file":  # nothing lies under a file
            lineage = lineage_of(identity)
            identity, under = lineage.identity, lineage.claims
        device = BlockDevice(record.id, info, identity, under)
        device.phase, device.drive = _PHASES[record.phase], record.drive(info)
    device.attach_count = record.attach_count
    device.ref_count = record.attach_count if record.users is None else record.users
    device.kata = bytes(record.kata)
    return device


_NOTHING: tuple[Identity, ...] = ()
_PHASES = {phase.value: phase for phase in Phase}


def sandbox_record(offsets: dict[str, int], taken: list[int], kata: bytes) -> SandboxRecord:
    """The record of a sandbox.

    :param taken: indexes that something other than its drives has.
    :param kata: what a saved state had, and pyblock does not know.
    """
    return SandboxRecord(offsets=offsets, taken=taken, kata=Raw(kata))
