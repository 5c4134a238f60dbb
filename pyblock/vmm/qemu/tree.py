"""The machine as QEMU's object tree shows it: PCI buses with their slots and disks, SCSI
controllers.

The tree is asked, not `query-pci`: that sees nothing behind a bridge until the firmware has
numbered the buses. It is read from the host bridges down, so devices without an ID are seen as
well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, NamedTuple, TypeVar

import msgspec

from pyblock.disk.drivers import Family
from pyblock.errors import VmmProtocolError, VmmRefused
from pyblock.vmm.qemu.qmp import QmpSession, Question

# of a conventional PCI bus: 5 bits of device number; slot 0 of a bridge may be its hot-plug
# controller's
BRIDGE_SLOTS = range(1, 32)
PORT_SLOTS = range(1)  # behind a PCIe port there is one device, number 0

_PCI_BUS = ("child<PCI>", "child<PCIE>")
_BUS_CHILD = re.compile(r"child\[\d+\]")
_LINK = re.compile(r"link<(.*)>")
_ACPI_NUMBER = "acpi-pcihp-bsel"
_PORTS = frozenset({"pcie-root-port", "ioh3420", "xio3130-downstream"})
_BRIDGES = _PORTS | {
    "pci-bridge",
    "pci-bridge-seat",
    "pcie-pci-bridge",
    "i82801b11-bridge",
    "x3130-upstream",
}
_CHILD = re.compile(r"child<(.*)>")
_SCSI_CONTROLLER = re.compile(r"child<(virtio-scsi-[a-z-]+)>")
# where QEMU keeps what it was told to add
_NAMED, _UNNAMED = "/machine/peripheral", "/machine/peripheral-anon"
_DEPTH_MAX = 256  # bridges in a row: PCI has as many buses

Value = TypeVar("Value")
# PCI's device number and function in one byte; -1: not given out yet
_Devfn = Annotated[int, msgspec.Meta(ge=-1, le=255)]


class DiskType(NamedTuple):
    """How QEMU calls a disk.

    :ivar bus: where it sits: "pci", "mmio", "scsi", "ide", "memory".
    :ivar pattern: of the types of its devices.
    :ivar family: whose names it uses up in the guest; None for those of no disk.
    """

    bus: str
    pattern: str
    family: Family | None


Types = tuple[DiskType, ...]


def disk_type(types: Types, kind: str, *buses: str) -> DiskType | None:
    """What disk a device of that type is, on one of those buses; None for what is none."""
    return next(
        (one for one in types if one.bus in buses and re.fullmatch(one.pattern, kind)), None
    )


def child(kind: str) -> str:
    """The type of what QEMU lists as a child, "" for what is none."""
    found = _CHILD.fullmatch(kind)
    return found[1] if found else ""


class Property(msgspec.Struct, frozen=True):
    """One of `qom-list`."""

    name: str
    type: str


class _Numbers(msgspec.Struct, frozen=True):
    secondary: Annotated[int, msgspec.Meta(ge=0, le=255)]


class _Bridge(msgspec.Struct, frozen=True):
    bus: _Numbers
    devices: list[_Device] = []


class _Device(msgspec.Struct, frozen=True):
    """Of `query-pci`, what tells a bus number."""

    slot: Annotated[int, msgspec.Meta(ge=0, le=31)]
    function: Annotated[int, msgspec.Meta(ge=0, le=7)]
    pci_bridge: _Bridge | None = None


class _Bus(msgspec.Struct, frozen=True):
    bus: int
    devices: list[_Device]


class Hop(msgspec.Struct, frozen=True):
    """One bridge on the way down from the root bus: its slot and function there."""

    slot: int
    function: int


class Slot(msgspec.Struct, frozen=True):
    """A place that takes a hot-plugged PCI device.

    :ivar bus: the bus's name, as device_add takes it.
    :ivar number: the device number on that bus.
    :ivar route: the bridges from the root bus down.
    :ivar port: True behind a PCIe port, where the device is the only one.
    """

    bus: str
    number: int
    route: tuple[Hop, ...]
    port: bool

    @property
    def name(self) -> str:
        """What `BlockDrive.place` holds."""
        return f"{self.bus}/{self.number:02x}"

    @property
    def pci_path(self) -> str:
        """See BlockDrive.pci_path."""
        hops = [
            f"{hop.slot:02x}" + (f".{hop.function}" if hop.function else "") for hop in self.route
        ]
        return "/".join([*hops, f"{self.number:02x}"])

    def guest_match(self, buses: dict[tuple[Hop, ...], int]) -> str | None:
        """See BlockDrive.guest_match; None where it needs a bus number that the firmware has not
        given out yet."""
        addresses: list[str] = []
        bus: int | None = 0
        for depth, hop in enumerate((*self.route, Hop(self.number, 0))):
            if bus is None:
                # The port alone tells the disk, for there is only one behind it.
                return f"/{addresses[-1]}/" if self.port and depth == 1 == len(self.route) else None
            addresses.append(f"0000:{bus:02x}:{hop.slot:02x}.{hop.function}")
            bus = buses.get(self.route[: depth + 1])
        return "/".join(addresses)


class Disk(msgspec.Struct, frozen=True):
    """A disk on a PCI bus, or on a virtio-mmio bus (no slot): its ID ("" without one), its family,
    and where it sits."""

    id: str
    family: Family
    slot: Slot | None = None


class Tree(msgspec.Struct):
    """What was found. `free` are the hot-pluggable slots that nothing sits in, in the order of
    their paths; `scsi_buses` are sorted."""

    free: list[Slot] = []
    scsi_buses: list[str] = []
    disks: list[Disk] = []


async def read_tree(qmp: QmpSession, types: Types) -> Tree:
    """Reads the tree. Changes nothing in the machine. Raises VmmProtocolError when it makes no
    sense.

    :param types: what of it is a disk.
    """
    tree = Tree()
    hosts, named, unnamed = await _seen(qmp, types)
    buses = [
        _PciBus(bus, (), port=False) for host in hosts for bus in await _buses(qmp, host, _PCI_BUS)
    ]
    while buses:
        buses = await _pci_level(qmp, tree, types, buses)
    for container, devices in ((_NAMED, named), (_UNNAMED, unnamed)):
        for name, kind in devices.items():
            if controller := _SCSI_CONTROLLER.fullmatch(kind):
                tree.scsi_buses += await _scsi_buses(qmp, f"{container}/{name}", controller[1])
            elif (disk := disk_type(types, child(kind), "mmio")) is not None and disk.family:
                tree.disks.append(Disk(name if container == _NAMED else "", disk.family))
    tree.scsi_buses.sort()
    tree.free.sort(key=lambda slot: ([(hop.slot, hop.function) for hop in slot.route], slot.number))
    return tree


async def _seen(qmp: QmpSession, types: Types) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The host bridges; and by name the types of the devices with and without an ID, as far as they
    are SCSI controllers, or disks that the walk over the PCI buses does not find."""
    machine, named, unnamed = await properties_of_each(qmp, ("/machine", _NAMED, _UNNAMED))
    hosts = sorted(
        f"/machine/{name}"
        for name, kind in machine.items()
        if "host" in kind and kind.startswith("child<")
    )

    def those(devices: dict[str, str]) -> dict[str, str]:
        return {
            name: kind
            for name, kind in devices.items()
            if _SCSI_CONTROLLER.fullmatch(kind) or disk_type(types, child(kind), "mmio")
        }

    return hosts, those(named), those(unnamed)


async def bus_numbers(qmp: QmpSession) -> dict[tuple[Hop, ...], int]:
    """The number of the bus behind each bridge, by its route, as the guest's firmware gave them
    out; those without one are absent."""
    numbers: dict[tuple[Hop, ...], int] = {}

    def walk(devices: list[_Device], route: tuple[Hop, ...]) -> None:
        for device in devices:
            bridge = device.pci_bridge
            if bridge is not None and bridge.bus.secondary:
                here = _further(qmp, route, Hop(device.slot, device.function))
                numbers[here] = bridge.bus.secondary
                walk(bridge.devices, here)

    for bus in await qmp.ask(list[_Bus], "query-pci"):
        if bus.bus == 0:
            walk(bus.devices, ())
    return numbers


async def properties(qmp: QmpSession, path: str) -> dict[str, str]:
    """Name to type; empty for an object that left while it was being looked at."""
    [found] = await properties_of_each(qmp, (path,))
    return found


async def properties_of_each(qmp: QmpSession, paths: Sequence[str]) -> list[dict[str, str]]:
    """The same for many objects."""
    answers = await qmp.ask_all([list_of(path) for path in paths])
    return [listed(qmp, path, answer) for path, answer in zip(paths, answers, strict=True)]


def list_of(path: str) -> Question:
    """The question for an object's properties; `listed` reads its answer."""
    return Question(list[Property], "qom-list", {"path": path})


def listed(qmp: QmpSession, path: str, answer: list[Property] | VmmRefused) -> dict[str, str]:
    """See `properties`."""
    if isinstance(answer, VmmRefused):
        return {}
    found = {entry.name: entry.type for entry in answer}
    if "type" not in found:  # every object has that
        raise VmmProtocolError(
            f"QMP socket {qmp.path!r}: the list of {path} is none, for it has no type"
        )
    return found


async def get_property(qmp: QmpSession, path: str, name: str, kind: type[Value]) -> Value | None:
    """The value of a property; None for an object that left, or has none of that name."""
    [value] = await get_properties(qmp, [(path, name)], kind)
    return value


async def get_properties(
    qmp: QmpSession, wanted: Sequence[tuple[str, str]], kind: type[Value]
) -> list[Value | None]:
    """The same for many, as (path, name)."""
    answers = await qmp.ask_all(
        [Question(kind, "qom-get", {"path": path, "property": name}) for path, name in wanted]
    )
    return [None if isinstance(answer, VmmRefused) else answer for answer in answers]


async def _buses(qmp: QmpSession, path: str, kinds: tuple[str, ...]) -> list[str]:
    return [
        f"{path}/{name}" for name, kind in (await properties(qmp, path)).items() if kind in kinds
    ]


async def _scsi_buses(qmp: QmpSession, path: str, controller: str) -> list[str]:
    """The names of a controller's buses. Behind PCI or CCW its backend has them, on a virtio-mmio
    bus it has them itself."""
    where = path if controller == "virtio-scsi-device" else f"{path}/virtio-backend"
    return [bus.rpartition("/")[2] for bus in await _buses(qmp, where, ("child<SCSI>",))]


class _PciBus(NamedTuple):
    """:ivar path: in the object tree.
    :ivar route: see Slot.
    :ivar port: behind a PCIe port.
    """

    path: str
    route: tuple[Hop, ...]
    port: bool


class _Child(NamedTuple):
    path: str
    kind: str
    hop: Hop


async def _pci_level(
    qmp: QmpSession, tree: Tree, types: Types, buses: Sequence[_PciBus]
) -> list[_PciBus]:
    """Takes into the tree what is on those buses, and returns the buses one bridge further down.
    All of a level are asked for together, so that a hundred ports cost as many turns as one."""
    bridges: list[tuple[str, _PciBus]] = []
    for bus, (children, hotplug) in zip(buses, await _children(qmp, buses), strict=True):
        name = bus.path.rpartition("/")[2]
        if hotplug:
            taken = {each.hop.slot for each in children}
            numbers = [
                number
                for number in (PORT_SLOTS if bus.port else BRIDGE_SLOTS)
                if number not in taken
            ]
            tree.free.extend(
                Slot(name, number, bus.route, bus.port)
                for number in numbers
                if not (bus.port and taken)
            )
        for path, kind, hop in children:
            if kind in _BRIDGES:
                bridges.append((path, _PciBus(path, _further(qmp, bus.route, hop), kind in _PORTS)))
            elif (disk := disk_type(types, kind, "pci")) is not None and disk.family:
                tree.disks.append(
                    Disk(_id(path), disk.family, Slot(name, hop.slot, bus.route, bus.port))
                )
    behind = await properties_of_each(qmp, [path for path, _ in bridges])
    return [
        bus._replace(path=f"{path}/{name}")
        for (path, bus), have in zip(bridges, behind, strict=True)
        for name, kind in have.items()
        if kind in _PCI_BUS
    ]


async def _children(qmp: QmpSession, buses: Sequence[_PciBus]) -> list[tuple[list[_Child], bool]]:
    """The devices on each bus, and whether it takes hot-plug."""
    links: list[tuple[str, str, str]] = []  # bus, name, type
    numbered: list[str] = []
    for bus, have in zip(
        buses, await properties_of_each(qmp, [bus.path for bus in buses]), strict=True
    ):
        links += [
            (bus.path, name, match[1])
            for name, kind in have.items()
            if _BUS_CHILD.fullmatch(name) and (match := _LINK.fullmatch(kind))
        ]
        numbered += [bus.path] if _ACPI_NUMBER in have else []
    handlers = await get_properties(qmp, [(bus.path, "hotplug-handler") for bus in buses], str)
    paths = await get_properties(qmp, [(bus, name) for bus, name, _ in links], str)
    devices = [(path, kind, bus) for path, (bus, _, kind) in zip(paths, links, strict=True) if path]
    places = await get_properties(qmp, [(path, "addr") for path, _, _ in devices], _Devfn)
    found: dict[str, list[_Child]] = {bus.path: [] for bus in buses}
    for (path, kind, on), place in zip(devices, places, strict=True):
        if place is not None and place >= 0:  # a device that left meanwhile has none
            # PCI devfn: the slot in the upper five bits
            found[on].append(_Child(path, kind, Hop(place >> 3, place & 7)))
    # A bridge that is its bus's own handler takes what is plugged in. Where the handler is the
    # chipset (ACPI), it does so only on the buses that it has numbered: since QEMU 8 it is named on
    # q35's root bus as well, and refuses there.
    return [
        (
            found[bus.path],
            bool(handler) and (handler == bus.path.rpartition("/")[0] or bus.path in numbered),
        )
        for bus, handler in zip(buses, handlers, strict=True)
    ]


def _further(qmp: QmpSession, route: tuple[Hop, ...], hop: Hop) -> tuple[Hop, ...]:
    if len(route) >= _DEPTH_MAX:
        raise VmmProtocolError(
            f"QMP socket {qmp.path!r}: its PCI tree has over {_DEPTH_MAX} bridges in a row"
        )
    return (*route, hop)


def _id(path: str) -> str:
    container, _, name = path.rpartition("/")
    return name if container == _NAMED else ""
