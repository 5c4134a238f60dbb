"""What QEMU has plugged in, out of its own listings: block nodes, memory objects, named devices,
and who uses what.

One reply lists all of a kind, so that a thousand drives cost no more round trips than one; only
disks that are not ours are looked at one by one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection

import msgspec

from pyblock.core.naming import DRIVE, LUNS
from pyblock.disk.drivers import NVDIMM, VIRTIO_SCSI, Family
from pyblock.errors import VmmRefused
from pyblock.vmm.base import FoundDisk, Held, Inventory
from pyblock.vmm.qemu.descriptors import MarkedSet, set_behind
from pyblock.vmm.qemu.qmp import QmpSession, Question
from pyblock.vmm.qemu.tree import (
    Tree,
    Types,
    child,
    disk_type,
    get_properties,
    get_property,
    list_of,
    listed,
)

_OURS = f"{DRIVE}-"
# Kata names an nvdimm and its memory after the drive, with these before it; its other devices
# ("virtio-drive-…") are found by their node.
KATA_NVDIMM, KATA_MEMORY = "nvdimm", "nvdimmbackmem"
_PERIPHERAL = "/machine/peripheral"
# that take drives: on no other can a device be one of ours
_BUSES = ("pci", "mmio", "scsi", "memory")
_CDROM = Family("sr", letters=False)  # no disk name, but an address
_MEMORY = re.compile(r"child<memory-backend-.*>")
_FILE_MEMORY = re.compile(r"child<memory-backend-file>")


class _Node(msgspec.Struct, frozen=True):
    file: str
    name: str | None = msgspec.field(name="node-name", default=None)


class _Inserted(msgspec.Struct, frozen=True):
    node: str | None = msgspec.field(name="node-name", default=None)


class _Block(msgspec.Struct, frozen=True):
    device: str
    qdev: str | None = None
    inserted: _Inserted | None = None

    @property
    def node(self) -> str:
        return (self.inserted and self.inserted.node) or ""


class _ModuleData(msgspec.Struct, frozen=True):
    id: str | None = None


class _Module(msgspec.Struct, frozen=True):
    type: str
    data: _ModuleData


_NODES = Question(list[_Node], "query-named-block-nodes", {"flat": True})
_SETS = Question(list[MarkedSet], "query-fdsets")
_BLOCKS = Question(list[_Block], "query-block")
_MODULES = Question(list[_Module], "query-memory-devices")


class Listing(msgspec.Struct, frozen=True):
    """What QEMU has, as the adapter needs it.

    :ivar inventory: see Hypervisor.inventory.
    :ivar sets: drive ID to the set of descriptors that its node has open, None where it opened a
        path.
    :ivar unused: sets of ours that no node uses: of an attach that was cut off, or left by a paused
        machine.
    """

    inventory: Inventory
    sets: dict[str, int | None]
    unused: list[int]


async def nodes(qmp: QmpSession) -> dict[str, str]:
    """The block nodes: name to the path of their file, "" where they have none."""
    return _files(await qmp.ask(*_NODES))


def _files(nodes: list[_Node]) -> dict[str, str]:
    return {node.name: node.file for node in nodes if node.name}


async def memory_modules(qmp: QmpSession) -> list[tuple[str, str]]:
    """The memory modules: type, and ID ("" for one without)."""
    return _named(await qmp.ask(*_MODULES))


def _named(modules: list[_Module]) -> list[tuple[str, str]]:
    return [(module.type, module.data.id or "") for module in modules]


async def user_of(qmp: QmpSession, node: str) -> str | None:
    """The ID of the device that uses a block node, if there is one."""
    blocks: list[_Block] = await qmp.ask(*_BLOCKS)
    return next((peripheral(block.qdev) for block in blocks if block.node == node), None)


async def take_listing(
    qmp: QmpSession, tree: Tree, types: Types, known: Collection[str]
) -> Listing:
    """Lists what the machine has; see Hypervisor.inventory. `tree` was read just before. Changes
    nothing in the machine."""
    answers = await qmp.ask_all(
        (_NODES, _SETS, _BLOCKS, _MODULES, list_of("/objects"), list_of(_PERIPHERAL))
    )
    for answer in answers[:4]:
        if isinstance(answer, VmmRefused):
            raise answer
    files, modules = _files(answers[0]), _named(answers[3])
    sets: list[MarkedSet] = answers[1]
    blocks: list[_Block] = answers[2]
    objects, peripherals = listed(qmp, "/objects", answers[4]), listed(qmp, _PERIPHERAL, answers[5])
    backends = {_drive_id(name): VIRTIO_SCSI for name in files}
    backends |= {
        _drive_id(name, KATA_MEMORY): NVDIMM
        for name, kind in objects.items()
        if _MEMORY.fullmatch(kind)
    }
    devices = {
        _drive_id(name, KATA_NVDIMM): name
        for name, kind in peripherals.items()
        if disk_type(types, child(kind), *_BUSES)
    }
    # Kata names a disk otherwise than its node; whoever uses the node is the device.
    for block in blocks:
        name = peripheral(block.qdev)
        if name in peripherals or (name is None and block.qdev):
            devices.setdefault(_drive_id(block.node), name or "")
    # by what QEMU calls their devices
    drives = {name: drive_id for drive_id, name in devices.items() if drive_id and name}
    names = (backends.keys() | devices.keys()) - {""}
    strange = [name for name in names if name not in known and devices.get(name)]
    hot = await get_properties(
        qmp, [(f"{_PERIPHERAL}/{devices[name]}", "hotplugged") for name in strange], bool
    )
    # there when the machine started
    cold = {name for name, each in zip(strange, hot, strict=True) if each is False}
    images = {each.number: image for each in sets if (image := each.image) is not None}
    behind = {name: set_behind(file) for name, file in files.items()}
    opened = {
        name: image
        for name, number in behind.items()
        if number is not None and (image := images.get(number)) is not None
    }
    held = {
        name: Held(name in devices, backends.get(name, VIRTIO_SCSI), name in cold, opened.get(name))
        for name in sorted(names)
    }
    users = {block.qdev: peripheral(block.qdev) or "" for block in blocks if block.qdev}
    others = [qdev for qdev, name in users.items() if drives.get(name, name) not in known]
    scsi = await asyncio.gather(*(_scsi_disk(qmp, tree, types, qdev) for qdev in others))
    disks = [
        *(FoundDisk(disk.id, disk.family) for disk in tree.disks),
        *(
            FoundDisk(name, kind.family)
            for module, name in modules
            if (kind := disk_type(types, module, "memory")) and kind.family
        ),
        *(disk for disk in scsi if disk is not None),
    ]
    mapped = [
        name
        for name, kind in objects.items()
        if _FILE_MEMORY.fullmatch(kind) and _drive_id(name, KATA_MEMORY) not in known
    ]
    paths = await get_properties(qmp, [(f"/objects/{name}", "mem-path") for name in mapped], str)
    used = set(behind.values())
    return Listing(
        Inventory(
            [
                FoundDisk(drive_id, disk.family, disk.occupies)
                for disk in disks
                if (drive_id := drives.get(disk.id, disk.id)) not in known
            ],
            held,
            frozenset(filter(None, (*files.values(), *paths))),
            frozenset(opened.values()),
        ),
        {name: number for name, number in behind.items() if name in held},
        [number for number in images if number not in used],
    )


def peripheral(qdev: str | None) -> str | None:
    """The ID of the device that `query-block` names by ID or path; None where it has none."""
    if not qdev:
        return None
    name = qdev.removeprefix(f"{_PERIPHERAL}/").partition("/")[0]
    return name or None


def _drive_id(name: str, prefix: str = "") -> str:
    """The drive ID behind a name of ours or of Kata's; "" for others."""
    name = name.removeprefix(prefix)
    return name if name.startswith(_OURS) else ""


async def _scsi_disk(qmp: QmpSession, tree: Tree, types: Types, qdev: str) -> FoundDisk | None:
    """The SCSI or IDE disk of that ID or path; None for others, which the walk over the PCI buses
    has found."""
    path = qdev if qdev.startswith("/") else f"{_PERIPHERAL}/{qdev}"
    kind = await get_property(qmp, path, "type", str)
    name = "" if path == qdev else qdev
    disk = disk_type(types, kind or "", "scsi", "ide")
    if disk is None:
        return None
    family = disk.family or _CDROM
    if disk.bus != "scsi":
        return FoundDisk(name, family)
    bus = await get_property(qmp, path, "parent_bus", str)
    target, lun = await get_properties(qmp, [(path, "scsi-id"), (path, "lun")], int)
    index = None
    if (
        tree.scsi_buses
        and bus is not None
        and bus.rpartition("/")[2] == tree.scsi_buses[0]
        and target is not None
        and lun is not None
    ):
        index = target * LUNS + lun if target >= 0 and 0 <= lun < LUNS else None
    return FoundDisk(name, family, index)
