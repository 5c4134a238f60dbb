"""Devices as records, and back: what of them is written down, and how they are taken up again."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from msgspec import Raw

from pyblock.disk.lineage import Identity, lineage_of
from pyblock.life.device import BlockDevice
from pyblock.life.generic import GenericDevice
from pyblock.life.table import Phase
from pyblock.store.record import ASKED, Record, SandboxRecord, SavedPhase

_asked = attrgetter(*ASKED)
_new: Callable[..., Record] = Record

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
    asked = _asked(device.info)
    if isinstance(device, GenericDevice):
        record = _new(*asked, generic=True, phase="attached" if device.attach_count else "detached")
    elif (drive := device.drive) is None:
        record = _new(*asked, identity=device.identity, phase=_SAVED[device.phase])
    else:
        record = _new(
            *asked, identity=device.identity, phase=_SAVED[device.phase],
            drive_id=drive.id, index=drive.index, ordinal=drive.ordinal, offset=drive.offset,
            place=drive.place, pci_path=drive.pci_path, dev_no=drive.dev_no,
            guest_match=drive.guest_match,
            known_name=drive.known_name, imported=drive.imported, unverified=not drive.verified,
            crowded=drive.crowded,
        )  # fmt: skip
    record.id, record.driver, record.attach_count = (
        device.id,
        record.driver or "",
        device.attach_count,
    )
    if device.ref_count != device.attach_count:
        record.users = device.ref_count
    if device.kata:
        record.kata = Raw(device.kata)
    return record


def device_of(record: Record) -> BlockDevice | GenericDevice:
    """The device of a record; of a block device it is looked at what lies under it. Raises
    DescriptorsExhausted."""
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
    if record.kata:
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
