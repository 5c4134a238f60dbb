"""The original's own schema of a saved sandbox, as it was in 2020-05 and as it is in 2026-08, with
the strictness of the decoder it uses.

That decoder refuses a whole file for one value of another kind, takes null for anything, matches
keys whatever their case, and skips keys that it does not know: it is never told to refuse them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
from msgspec import Meta

Json = Any
Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
UInt = Annotated[int, Meta(ge=0)]
UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Object = dict[str, Any]


class Kind(msgspec.Struct, rename={}, kw_only=True):
    """An object of the original; a field is a key as it spells it. Values of other kinds are
    refused, other keys are skipped."""


class Drive2020(Kind):
    File: str = ""
    Format: str = ""
    ID: str = ""
    Index: Int = 0
    MmioAddr: str = ""
    PCIAddr: str = ""
    SCSIAddr: str = ""
    NvdimmID: str = ""
    VirtPath: str = ""
    DevNo: str = ""
    Pmem: bool = False


class PciPath(Kind):
    """Its only field is none that JSON can reach: it is written as {}, and what stands in it is
    skipped."""


class Drive2026(Kind):
    File: str = ""
    Format: str = ""
    ID: str = ""
    MmioAddr: str = ""
    SCSIAddr: str = ""
    NvdimmID: str = ""
    VirtPath: str = ""
    DevNo: str = ""
    PCIPath: PciPath = msgspec.field(default_factory=PciPath)
    Index: Int = 0
    ShareRW: bool = False
    ReadOnly: bool = False
    DiscardUnmap: bool = False
    Pmem: bool = False
    Swap: bool = False


class VhostUser2020(Kind):
    DevID: str = ""
    SocketPath: str = ""
    Type: str = ""
    MacAddress: str = ""
    PCIAddr: str = ""
    Index: Int = 0


class VhostUser2026(Kind):
    DevID: str = ""
    SocketPath: str = ""
    MacAddress: str = ""
    Tag: str = ""
    Cache: str = ""
    Type: str = ""
    PCIPath: PciPath = msgspec.field(default_factory=PciPath)
    Index: Int = 0
    CacheSize: UInt32 = 0
    QueueSize: UInt32 = 0
    ReconnectTime: UInt32 = 0


class Vfio2020(Kind):
    ID: str = ""
    Type: UInt32 = 0
    BDF: str = ""
    SysfsDev: str = ""


class Vfio2026(Kind):
    ID: str = ""
    BDF: str = ""
    SysfsDev: str = ""
    DevfsDev: str = ""
    VendorID: str = ""
    DeviceID: str = ""
    Class: str = ""
    Bus: str = ""
    GuestPciPath: PciPath = msgspec.field(default_factory=PciPath)
    Type: UInt32 = 0
    NUMANode: Int = 0
    IsPCIe: bool = False
    APDevices: list[str] = []
    Port: str = ""
    HostPath: str = ""


class Device2020(Kind):
    ID: str = ""
    Type: str = ""
    RefCount: UInt = 0
    AttachCount: UInt = 0
    DevType: str = ""
    Major: Int = 0
    Minor: Int = 0
    DriverOptions: dict[str, str] = {}
    BlockDrive: Drive2020 | None = None
    VFIODevs: list[Vfio2020] = []
    VhostUserDev: VhostUser2020 | None = None


class Device2026(Kind):
    DriverOptions: dict[str, str] = {}
    VhostUserDev: VhostUser2026 | None = None
    BlockDrive: Drive2026 | None = None
    ID: str = ""
    Type: str = ""
    DevType: str = ""
    VFIODevs: list[Vfio2026] = []
    RefCount: UInt = 0
    AttachCount: UInt = 0
    Major: Int = 0
    Minor: Int = 0
    ColdPlug: bool = False


class Cpu(Kind):
    ID: str = ""


class Hypervisor2020(Kind):
    Pid: Int = 0
    Type: str = ""
    BlockIndexMap: dict[int, Object] = {}
    UUID: str = ""
    Bridges: list[Object] = []
    HotpluggedVCPUs: list[Cpu] = []
    HotpluggedMemory: Int = 0
    VirtiofsdPid: Int = 0
    HotplugVFIOOnRootBus: bool = False
    PCIeRootPort: Int = 0
    APISocket: str = ""


class Hypervisor2026(Kind):
    BlockIndexMap: dict[int, Object] = {}
    Type: str = ""
    UUID: str = ""
    APISocket: str = ""
    Bridges: list[Object] = []
    HotpluggedVCPUs: list[Cpu] = []
    HotpluggedMemory: Int = 0
    VirtiofsDaemonPid: Int = 0
    Pid: Int = 0
    HotPlugVFIO: str = ""
    ColdPlugVFIO: str = ""
    PCIeRootPort: UInt32 = 0
    PCIeSwitchPort: UInt32 = 0


class Sandbox2020(Kind):
    PersistVersion: UInt = 0
    State: str = ""
    GuestMemoryBlockSizeMB: UInt32 = 0
    GuestMemoryHotplugProbe: bool = False
    SandboxContainer: str = ""
    CgroupPath: str = ""
    CgroupPaths: dict[str, str] = {}
    Devices: list[Device2020] = []
    HypervisorState: Hypervisor2020 = msgspec.field(default_factory=Hypervisor2020)
    AgentState: Object = {}
    Network: Object = {}
    Config: Object = {}


class Sandbox2026(Kind):
    CgroupPaths: dict[str, str] = {}
    Devices: list[Device2026] = []
    State: str = ""
    SandboxContainer: str = ""
    SandboxCgroupPath: str = ""
    OverheadCgroupPath: str = ""
    HypervisorState: Hypervisor2026 = msgspec.field(default_factory=Hypervisor2026)
    AgentState: Object = {}
    Network: Object = {}
    Config: Object = {}
    PersistVersion: UInt = 0
    GuestMemoryBlockSizeMB: UInt32 = 0
    GuestMemoryHotplugProbe: bool = False


VERSIONS: dict[str, type[Kind]] = {"2020-05": Sandbox2020, "2026-08": Sandbox2026}


def load(version: str, text: bytes) -> Any:
    """What that version of the original reads out of a file. Raises msgspec.ValidationError where
    it would refuse the file."""
    kind = VERSIONS[version]
    return msgspec.json.decode(json.dumps(_seen(json.loads(text), kind)), type=kind)


def strangers(text: bytes) -> set[str]:
    """The keys, as dotted paths, that neither version knows."""
    state = json.loads(text)
    return set.intersection(*(_unknown(state, kind, "") for kind in VERSIONS.values()))


def _children(kind: type[Kind]) -> dict[str, tuple[str, type[Kind] | None]]:
    """Lower-case key to how the original spells it, and the kind of object behind it."""
    found: dict[str, tuple[str, type[Kind] | None]] = {}
    for field in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
        inner = field.type
        while not isinstance(inner, msgspec.inspect.StructType):
            options = getattr(inner, "types", None) or (getattr(inner, "item_type", None),)
            inner = next(
                (
                    one
                    for one in options
                    if isinstance(one, msgspec.inspect.StructType | msgspec.inspect.ListType)
                ),
                None,
            )
            if inner is None:
                break
        found[field.encode_name.lower()] = (
            field.encode_name,
            inner.cls if inner is not None else None,
        )
    return found


def _seen(value: Json, kind: type[Kind]) -> Json:
    """The value with the keys that the original takes, as it spells them, and without nulls, which
    leave what is there."""
    if isinstance(value, list):
        return [_seen(one, kind) for one in value]
    if not isinstance(value, dict):
        return value
    children = _children(kind)
    seen: dict[str, Json] = {}
    for key, inner in value.items():
        if inner is not None and key.lower() in children:
            name, child = children[key.lower()]
            seen[name] = _seen(inner, child) if child is not None else inner
    return seen


def _unknown(value: Json, kind: type[Kind], path: str) -> set[str]:
    if isinstance(value, list):
        return set().union(*(_unknown(one, kind, path) for one in value))
    if not isinstance(value, dict):
        return set()
    children = _children(kind)
    found: set[str] = set()
    for key, inner in value.items():
        if key.lower() not in children:
            found.add(f"{path}{key}")
        elif (child := children[key.lower()][1]) is not None:
            found |= _unknown(inner, child, f"{path}{key}.")
    return found
