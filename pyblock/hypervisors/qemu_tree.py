"""The machine as QEMU's object tree shows it: PCI buses with their slots and disks, SCSI controllers.

The tree is asked, not `query-pci`: that sees nothing behind a bridge until the firmware has numbered the buses. It is read from the host
bridges down, so devices without an ID are seen as well.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec

from pyblock.drivers import VD, Family
from pyblock.errors import VmmRefused
from pyblock.hypervisors.qmp import QmpSession

BRIDGE_SLOTS = range(1, 32)  # of a conventional PCI bus: 5 bits of device number; slot 0 of a bridge may be its hot-plug controller's
PORT_SLOTS = range(1)  # behind a PCIe port there is one device, number 0

_PCI_BUS = ("child<PCI>", "child<PCIE>")
_BUS_CHILD = re.compile(r"child\[\d+\]")
_LINK = re.compile(r"link<(.*)>")
_ACPI_NUMBER = "acpi-pcihp-bsel"
_PORTS = frozenset({"pcie-root-port", "ioh3420", "xio3130-downstream"})
_BRIDGES = _PORTS | {"pci-bridge", "pci-bridge-seat", "pcie-pci-bridge", "i82801b11-bridge", "x3130-upstream"}
_FAMILIES: tuple[tuple[re.Pattern[str], Family], ...] = ((re.compile(r"(virtio-blk|vhost-user-blk)-.*"), VD),)
_SCSI_CONTROLLER = re.compile(r"virtio-scsi-.*")


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
        """What `BlockDrive.slot` holds."""
        return f"{self.bus}/{self.number:02x}"

    @property
    def pci_path(self) -> str:
        """See BlockDrive.pci_path."""
        hops = [f"{hop.slot:02x}" + (f".{hop.function}" if hop.function else "") for hop in self.route]
        return "/".join([*hops, f"{self.number:02x}"])

    def guest_match(self, buses: dict[tuple[Hop, ...], int]) -> str | None:
        """See BlockDrive.guest_match; None where it needs a bus number that the firmware has not given out yet."""
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
    """A disk on a PCI bus: its ID ("" without one) and family."""

    id: str
    family: Family


class Tree(msgspec.Struct):
    """What was found. `free` are the hot-pluggable slots that nothing sits in, in the order of their paths; `scsi_buses` are sorted."""

    free: list[Slot] = []
    scsi_buses: list[str] = []
    disks: list[Disk] = []


async def read_tree(qmp: QmpSession) -> Tree:
    """Reads the tree. Changes nothing in the machine."""
    tree = Tree()
    machine = await properties(qmp, "/machine")
    hosts = [f"/machine/{name}" for name, kind in machine.items() if "host" in kind and kind.startswith("child<")]
    for host in sorted(hosts):
        for bus in await _buses(qmp, host, _PCI_BUS):
            await _pci_bus(qmp, tree, bus, (), port=False)
    tree.scsi_buses.sort()
    tree.free.sort(key=lambda slot: ([(hop.slot, hop.function) for hop in slot.route], slot.number))
    return tree


async def bus_numbers(qmp: QmpSession) -> dict[tuple[Hop, ...], int]:
    """The number of the bus behind each bridge, by its route, as the guest's firmware gave them out; those without one are absent."""
    numbers: dict[tuple[Hop, ...], int] = {}

    def walk(devices: list[dict[str, Any]], route: tuple[Hop, ...]) -> None:
        for device in devices:
            bridge = device.get("pci_bridge")
            if bridge and bridge["bus"]["secondary"]:
                here = (*route, Hop(device["slot"], device["function"]))
                numbers[here] = bridge["bus"]["secondary"]
                walk(bridge.get("devices", []), here)

    for bus in await qmp.execute("query-pci"):
        if bus["bus"] == 0:
            walk(bus["devices"], ())
    return numbers


async def properties(qmp: QmpSession, path: str) -> dict[str, str]:
    """Name to type; empty for an object that left while it was being looked at."""
    try:
        return {entry["name"]: entry["type"] for entry in await qmp.execute("qom-list", {"path": path})}
    except VmmRefused:
        return {}


async def get_property(qmp: QmpSession, path: str, name: str) -> Any:
    try:
        return await qmp.execute("qom-get", {"path": path, "property": name})
    except VmmRefused:
        return None


async def _buses(qmp: QmpSession, path: str, kinds: tuple[str, ...]) -> list[str]:
    return [f"{path}/{name}" for name, kind in (await properties(qmp, path)).items() if kind in kinds]


async def _children(qmp: QmpSession, bus: str) -> tuple[list[tuple[str, str]], bool]:
    """The devices on a bus as (path, type), and whether it takes hot-plug."""
    have = await properties(qmp, bus)
    links = [(name, match[1]) for name, kind in have.items() if _BUS_CHILD.fullmatch(name) and (match := _LINK.fullmatch(kind))]
    handler, *paths = await asyncio.gather(get_property(qmp, bus, "hotplug-handler"), *(get_property(qmp, bus, name) for name, _ in links))
    # A bridge that is its bus's own handler takes what is plugged in. Where the handler is the chipset (ACPI), it does so only on the buses
    # that it has numbered: since QEMU 8 it is named on q35's root bus as well, and refuses there.
    hotplug = bool(handler) and (handler == bus.rpartition("/")[0] or _ACPI_NUMBER in have)
    return [(path, kind) for path, (_, kind) in zip(paths, links, strict=True) if path], hotplug


async def _pci_bus(qmp: QmpSession, tree: Tree, bus: str, route: tuple[Hop, ...], *, port: bool) -> None:
    children, hotplug = await _children(qmp, bus)
    places = await asyncio.gather(*(get_property(qmp, path, "addr") for path, _ in children))
    # PCI devfn: the slot in the upper five bits. A device that left meanwhile has none.
    devices = [
        (path, kind, Hop(place >> 3, place & 7)) for (path, kind), place in zip(children, places, strict=True) if isinstance(place, int)
    ]
    if hotplug:
        taken = {hop.slot for _, _, hop in devices}
        name = bus.rpartition("/")[2]
        numbers = [] if port and taken else [number for number in (PORT_SLOTS if port else BRIDGE_SLOTS) if number not in taken]
        tree.free.extend(Slot(name, number, route, port) for number in numbers)
    await asyncio.gather(*(_pci_device(qmp, tree, path, kind, (*route, hop)) for path, kind, hop in devices))


async def _pci_device(qmp: QmpSession, tree: Tree, path: str, kind: str, route: tuple[Hop, ...]) -> None:
    if kind in _BRIDGES:
        for bus in await _buses(qmp, path, _PCI_BUS):
            await _pci_bus(qmp, tree, bus, route, port=kind in _PORTS)
    elif _SCSI_CONTROLLER.fullmatch(kind):
        tree.scsi_buses += [bus.rpartition("/")[2] for bus in await _buses(qmp, f"{path}/virtio-backend", ("child<SCSI>",))]
    elif family := _family(kind):
        tree.disks.append(Disk(_id(path), family))


def _family(kind: str) -> Family | None:
    return next((family for pattern, family in _FAMILIES if pattern.fullmatch(kind)), None)


def _id(path: str) -> str:
    container, _, name = path.rpartition("/")
    return name if container == "/machine/peripheral" else ""
