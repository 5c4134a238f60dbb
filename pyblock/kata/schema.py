"""The saved form of a sandbox: the JSON of the Kata Containers runtime, as data, and nothing else.

What pyblock adds stands under the key `Pyblock`, which the original skips. Keys that are not known
are carried along as `extra`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from pyblock.errors import InvalidState, NewerState

PLAIN = 1  # the version that is written while every field of a record has a key here
VERSION = 2  # the one with `More`, and the last that this version reads


# A key that no file has: what is behind it is written out as keys of its own.
_EXTRA = "\ue000pyblock"


class _Kept(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A JSON object whose unknown keys are kept beside the known ones."""

    extra: dict[str, Any] | UnsetType = msgspec.field(name=_EXTRA, default=UNSET)


class DriveNotes(msgspec.Struct, kw_only=True, omit_defaults=True, rename="pascal", gc=False):
    """What the original's BlockDrive has no key for."""

    driver: str = ""
    ordinal: int = -1
    offset: int = 0
    serial: str | None = None
    guest_match: str | None = None
    slot: str | None = None
    known_name: str | None = None
    # another program plugged it in: the keys of that program's are written back as they were read
    imported: bool = False
    unverified: bool = False
    crowded: bool = False


class DriveState(_Kept):
    """The original's BlockDrive. Keys that only some of its versions write are unset where they
    were absent.

    A PCI address is `PCIAddr`, a text, for the original of 2020, which knows no PCIPath. For that
    of today PCIPath is an object without keys, and a text there has it refuse the whole file;
    pyblock wrote one once, so it is still read.
    """

    file: str = msgspec.field(name="File", default="")
    format: str = msgspec.field(name="Format", default="")
    id: str = msgspec.field(name="ID", default="")
    index: int = msgspec.field(name="Index", default=0)
    mmio_addr: str = msgspec.field(name="MmioAddr", default="")
    pci_addr: str | UnsetType = msgspec.field(name="PCIAddr", default=UNSET)
    pci_path: str | dict[str, Any] | UnsetType = msgspec.field(name="PCIPath", default=UNSET)
    scsi_addr: str = msgspec.field(name="SCSIAddr", default="")
    nvdimm_id: str = msgspec.field(name="NvdimmID", default="")
    virt_path: str = msgspec.field(name="VirtPath", default="")
    dev_no: str = msgspec.field(name="DevNo", default="")
    pmem: bool = msgspec.field(name="Pmem", default=False)
    share_rw: bool | UnsetType = msgspec.field(name="ShareRW", default=UNSET)
    read_only: bool | UnsetType = msgspec.field(name="ReadOnly", default=UNSET)
    notes: DriveNotes | UnsetType = msgspec.field(name="Pyblock", default=UNSET)


class DeviceNotes(msgspec.Struct, kw_only=True, omit_defaults=True, rename="pascal", gc=False):
    """What the original's DeviceState has no key for."""

    phase: str = ""
    path: str = ""
    driver: str | None = None
    serial: str | None = None
    read_only: bool = False
    share: bool = False
    format: Literal["raw"] | None = None
    identity: tuple[str, int, int] | None = None
    more: dict[str, Any] = {}  # fields of a record that have no key here, under their own names


class DeviceState(_Kept):
    """The original's DeviceState."""

    id: str = msgspec.field(name="ID", default="")
    type: str = msgspec.field(name="Type", default="block")
    ref_count: int = msgspec.field(name="RefCount", default=0)
    attach_count: int = msgspec.field(name="AttachCount", default=0)
    dev_type: str = msgspec.field(name="DevType", default="")
    major: int = msgspec.field(name="Major", default=0)
    minor: int = msgspec.field(name="Minor", default=0)
    driver_options: dict[str, str] | None = msgspec.field(name="DriverOptions", default=None)
    cold_plug: bool = msgspec.field(name="ColdPlug", default=False)
    block_drive: DriveState | UnsetType | None = msgspec.field(name="BlockDrive", default=UNSET)
    notes: DeviceNotes | UnsetType = msgspec.field(name="Pyblock", default=UNSET)


class HypervisorState(_Kept):
    """Of the original's HypervisorState, the one key that concerns drives."""

    block_index_map: dict[str, dict[str, Any]] | None = msgspec.field(
        name="BlockIndexMap", default=None
    )


class SandboxNotes(msgspec.Struct, kw_only=True, rename="pascal", gc=False):
    """What pyblock says of the sandbox as a whole. `version` comes first in the file."""

    version: int = PLAIN
    sandbox: str = ""
    offsets: dict[str, int] = {}


class SandboxState(_Kept):
    """A sandbox's file."""

    notes: SandboxNotes | UnsetType = msgspec.field(name="Pyblock", default=UNSET)
    devices: list[DeviceState] | None = msgspec.field(name="Devices", default=None)
    hypervisor_state: HypervisorState | UnsetType | None = msgspec.field(
        name="HypervisorState", default=UNSET
    )


class _Version(msgspec.Struct):
    version: int = msgspec.field(name="Version", default=PLAIN)


class _Peek(msgspec.Struct):
    notes: _Version | UnsetType = msgspec.field(name="Pyblock", default=UNSET)


_strict = msgspec.json.Decoder(SandboxState)
_peek = msgspec.json.Decoder(_Peek)


def decode(text: bytes, *, where: str) -> SandboxState:
    """Reads a sandbox's file. `where` is what errors call it.

    Raises NewerState when a newer pyblock wrote it, InvalidState when it is cut off, not JSON, or
    of the wrong shape.
    """
    try:
        # the common case: every key is known, nothing else need be looked at
        state = _strict.decode(text)
        if state.notes is UNSET or state.notes.version <= VERSION:
            return state
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    try:
        notes = _peek.decode(text).notes
        if notes is not UNSET and notes.version > VERSION:
            raise NewerState(
                f"{where} was written by a newer pyblock (version {notes.version}, this one reads "
                f"up to {VERSION}); it is left as it is"
            )
        data = msgspec.json.decode(text)
        state = msgspec.convert(_known(data, SandboxState), SandboxState)
        _remember(state, data)
        return state
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidState(
            f"{where} is not a saved sandbox: {error}; it is left as it is"
        ) from error


def decode_device(text: bytes, *, where: str) -> DeviceState:
    """Reads one device. Raises as `decode`."""
    [device] = decode(b'{"Devices":[' + text + b"]}", where=where).devices or [DeviceState()]
    return device


def encode_short(state: SandboxState) -> bytes:
    """Writes a sandbox in as few bytes as it takes."""
    return msgspec.json.encode(_builtins(state))


def encode_device(state: DeviceState) -> bytes:
    """Writes one device in as few bytes as it takes."""
    drive = state.block_drive
    if state.extra is UNSET and (not isinstance(drive, DriveState) or drive.extra is UNSET):
        return msgspec.json.encode(state)
    return msgspec.json.encode(_builtins(state))


def encode(state: SandboxState) -> bytes:
    """Writes a sandbox's file, unknown keys included."""
    return msgspec.json.format(msgspec.json.encode(_builtins(state)), indent=1) + b"\n"


_CHILDREN: dict[type[_Kept], dict[str, type[_Kept]]] = {
    SandboxState: {"Devices": DeviceState, "HypervisorState": HypervisorState},
    DeviceState: {"BlockDrive": DriveState},
}
_FIELDS: dict[type[_Kept], dict[str, str]] = {
    kind: {
        field.encode_name: field.name
        for field in msgspec.structs.fields(kind)
        if field.encode_name != _EXTRA
    }
    for kind in (SandboxState, DeviceState, DriveState, HypervisorState)
}


def _known(data: Any, kind: type[_Kept]) -> Any:
    """`data` without the keys that `kind` does not have."""
    if not isinstance(data, dict):
        return data
    known = {key: value for key, value in data.items() if key in _FIELDS[kind]}
    for key, child in _CHILDREN.get(kind, {}).items():
        if isinstance(value := known.get(key), list):
            known[key] = [_known(one, child) for one in value]
        elif key in known:
            known[key] = _known(value, child)
    return known


def _remember(struct: _Kept, data: dict[str, Any]) -> None:
    """Puts the keys of `data` that `struct` does not have beside it."""
    fields = _FIELDS[type(struct)]
    if extra := {key: value for key, value in data.items() if key not in fields}:
        struct.extra = extra
    for key in _CHILDREN.get(type(struct), {}):
        value = getattr(struct, fields[key])
        if isinstance(value, list):
            for one, raw in zip(value, data[key], strict=True):
                _remember(one, raw)
        elif isinstance(value, _Kept):
            _remember(value, data[key])


def _builtins(struct: _Kept) -> dict[str, Any]:
    """`struct` as JSON objects, with its unknown keys."""
    data: dict[str, Any] = msgspec.to_builtins(struct)
    fields = _FIELDS[type(struct)]
    for key in _CHILDREN.get(type(struct), {}):
        value = getattr(struct, fields[key])
        if isinstance(value, list):
            data[key] = [_builtins(one) for one in value]
        elif isinstance(value, _Kept):
            data[key] = _builtins(value)
    extra: dict[str, Any] = data.pop(_EXTRA, {})
    return data | extra
