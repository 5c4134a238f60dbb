"""Rows as the versions 1 to 4 of a store had them, read as records: the original's JSON, with what
pyblock added under `Pyblock`. What belongs to a released version stays as it is here, whatever
becomes of the rest.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from msgspec import Raw

from pyblock.disk.image import identity_of, is_file
from pyblock.disk.lineage import Identity
from pyblock.disk.model import check_device_id
from pyblock.errors import InvalidID, StateError
from pyblock.store.record import NO_DRIVE, UNTOLD, Record, SandboxRecord, check

Json = dict[str, Any]

_DEVICE_KEYS = {
    "ID",
    "Type",
    "RefCount",
    "AttachCount",
    "DevType",
    "Major",
    "Minor",
    "DriverOptions",
    "ColdPlug",
    "BlockDrive",
    "Pyblock",
}
_DRIVE_KEYS = {
    "File", "Format", "ID", "Index", "MmioAddr", "PCIAddr", "PCIPath", "SCSIAddr", "NvdimmID",
    "VirtPath", "DevNo", "Pmem",
    "ShareRW", "ReadOnly", "Pyblock",
}  # fmt: skip
_SANDBOX_KEYS = {"Pyblock", "Devices", "HypervisorState"}
_OFFSETS = {"virtio-mmio": 1}  # where the guest's names begin while nothing else is known
_SIGNS = (
    ("SCSIAddr", "virtio-scsi"),
    ("DevNo", "virtio-blk-ccw"),
    ("MmioAddr", "virtio-mmio"),
    ("VirtPath", "virtio-blk"),
)

# What reading something else than such a row may come to.
DAMAGE = (
    msgspec.MsgspecError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    InvalidID,
    StateError,
)


def record_of(device_id: str, row: bytes, image: str | None) -> Record:
    """The record of a device.

    :param image: what its row says that it claims.
    Raises one of DAMAGE.
    """
    old = _object(msgspec.json.decode(row))
    if check_device_id(old["ID"]) != device_id:
        raise ValueError("the row is another device's")
    told = _generic(old) if old.get("Type", "block") == "generic" else _block(old, image)
    told["attach_count"] = old.get("AttachCount", 0)
    if (users := old.get("RefCount", 0)) != told["attach_count"]:
        told["users"] = users
    ours = told.pop("ours", False)
    record: Record = msgspec.convert(told, Record)
    record.id = device_id
    if not ours:
        record.kata = Raw(_readable(old, row))
    check(record)
    return record


def sandbox_record_of(row: bytes, held: Collection[int]) -> SandboxRecord:
    """The record of a sandbox, of whose indexes its drives hold those. Raises one of DAMAGE."""
    old = _object(msgspec.json.decode(row))
    notes = _object(old.pop("Pyblock", {}))
    hypervisor = old.get("HypervisorState", {"BlockIndexMap": {}})
    mapped = (hypervisor or {}).get("BlockIndexMap") or {}
    taken = notes["Taken"] if "Taken" in notes else [int(text) for text in mapped]
    record: SandboxRecord = msgspec.convert(
        {"offsets": notes.get("Offsets", {}), "taken": sorted(set(taken) - set(held))},
        SandboxRecord,
    )
    plain = (
        hypervisor is not None
        and hypervisor.keys() <= {"BlockIndexMap"}
        and not any(mapped.values())
    )
    if old.get("Devices") or old.keys() - _SANDBOX_KEYS or not plain:
        record.kata = Raw(msgspec.json.encode(old))
    return record


def _object(value: Any) -> Json:
    if not isinstance(value, dict):
        raise TypeError("no object")
    return value


def _generic(old: Json) -> Json:
    return {
        "generic": True, "serial": None, "dev_type": old.get("DevType", ""),
        "major": old.get("Major", 0),
        "minor": old.get("Minor", 0), "options": old.get("DriverOptions") or {},
        "phase": _phase(old, {}),
    }  # fmt: skip


def _block(old: Json, image: str | None) -> Json:
    notes, drive = _object(old.get("Pyblock", {})), _object(old.get("BlockDrive") or {})
    options = old.get("DriverOptions") or {}
    driver = _driver(notes.get("Driver") or options.get("block-driver"), drive)
    ours = _is_our_own(old, notes, drive, driver)
    path = notes.get("Path") or drive.get("File", "")
    phase = _phase(old, notes)
    held = drive if phase != "detached" else {}
    special = (old.get("DevType", ""), old.get("Major", 0), old.get("Minor", 0))
    identity = notes.get("Identity") or _identity(image, special, path, driver)
    if ours:
        options = {name: value for name, value in options.items() if name != "block-driver"}
        special = ("", -1, -1) if special[1] <= 0 else special
    told = {
        "path": path, "driver": driver, "serial": notes.get("Serial"), "options": options,
        "format": notes.get("Format"),
        "read_only": notes.get("ReadOnly", False) or held.get("ReadOnly", False),
        "share": notes.get("Share", False) or held.get("ShareRW", False),
        "dev_type": special[0], "major": special[1], "minor": special[2],
        "identity": identity, "phase": phase, "ours": ours,
    }  # fmt: skip
    return told | _drive(held, driver) if held else told


def _phase(old: Json, notes: Json) -> str:
    return notes.get("Phase") or ("attached" if old.get("AttachCount", 0) else "detached")


def _driver(name: str | None, drive: Json) -> str:
    if drive.get("Pmem") or drive.get("NvdimmID"):
        return "nvdimm"
    told = drive.get("Pyblock", {}).get("Driver")
    signs = (driver for key, driver in _SIGNS if drive.get(key))
    return name or told or next(signs, "virtio-scsi")


def _is_our_own(old: Json, notes: Json, drive: Json, driver: str) -> bool:
    if (
        not notes.get("Path")
        or old.keys() - _DEVICE_KEYS
        or old.get("ColdPlug")
        or old.get("DevType") != "b"
    ):
        return False
    if (old.get("DriverOptions") or {}).get("block-driver") != driver:
        return False
    return not drive or not (
        _is_imported(drive)
        or drive.keys() - _DRIVE_KEYS
        or drive.get("ShareRW") is False
        or drive.get("MmioAddr")
        or not isinstance(drive.get("PCIPath", ""), str)
    )


def _is_imported(drive: Json) -> bool:
    return (
        "Pyblock" not in drive or drive["Pyblock"].get("Imported", False) or "ReadOnly" not in drive
    )


def _identity(
    image: str | None, special: tuple[str, int, int], path: str, driver: str
) -> Identity | None:
    if image is not None:
        kind, major, minor = image.split(":")
        return (kind, int(major), int(minor))
    if (
        special[0] == "b"
        and special[1] > 0 <= special[2]
        and driver != "nvdimm"
        and not is_file(path)
    ):
        return ("block", special[1], special[2])
    return identity_of(path)


def _drive(drive: Json, driver: str) -> Json:
    notes = drive.get("Pyblock", {})
    if notes.get("Driver", driver) != driver:
        notes = {}  # it was taken for what it is not
    told = notes.get("Ordinal", -1) >= 0
    if drive["Index"] <= NO_DRIVE or not drive["ID"]:
        raise ValueError("no index, or no ID")
    return {
        "drive_id": drive["ID"], "index": drive["Index"], "place": notes.get("Slot"),
        "ordinal": notes["Ordinal"] if told else UNTOLD,
        "offset": notes.get("Offset", 0) if told else _OFFSETS.get(driver, 0),
        "pci_path": _pci_path(drive), "dev_no": _dev_no(drive),
        "guest_match": notes.get("GuestMatch"),
        "known_name": notes.get("KnownName") if told else _told_name(drive, driver),
        "imported": _is_imported(drive), "unverified": notes.get("Unverified", False),
        "crowded": notes.get("Crowded", False),
    }  # fmt: skip


def _pci_path(drive: Json) -> str | None:
    path = drive.get("PCIPath")
    return (path if isinstance(path, str) else None) or drive.get("PCIAddr") or None


def _dev_no(drive: Json) -> str | None:
    number = drive.get("DevNo", "")
    if number.startswith("fe.") and not _is_imported(drive):
        number = "0." + number.removeprefix("fe.")
    return number or None


def _told_name(drive: Json, driver: str) -> str | None:
    if driver != "nvdimm":
        return drive.get("VirtPath") or None
    number = drive.get("NvdimmID", "")
    return (
        f"/dev/pmem{int(number)}"
        if number.isascii() and number.isdigit() and len(number) < 8
        else None
    )


def _readable(old: Json, row: bytes) -> bytes:
    """The row with its addresses as both versions of the original read them."""
    drive = old.get("BlockDrive") or {}
    path, number = drive.get("PCIPath"), _dev_no(drive)
    if not isinstance(path, str) and number == (drive.get("DevNo") or None):
        return row
    if isinstance(path, str):
        drive["PCIAddr"] = drive.pop("PCIPath") or drive.get("PCIAddr") or ""
    if number is not None:
        drive["DevNo"] = number
    return msgspec.json.encode(old)
