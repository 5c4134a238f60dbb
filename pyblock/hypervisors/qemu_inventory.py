"""What QEMU has plugged in, out of its own listings: block nodes, memory objects, named devices, and who uses what.

One reply lists all of a kind, so that a thousand drives cost no more round trips than one; only disks that are not ours are looked at
one by one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from typing import Any

from pyblock.drivers import NVDIMM, PMEM, SD, VIRTIO_SCSI, Family
from pyblock.hypervisors.base import FoundDisk, Held, Inventory
from pyblock.hypervisors.qemu_tree import Tree, get_property, properties
from pyblock.hypervisors.qmp import QmpSession

LUNS = 256  # a SCSI ID has as many LUNs in Kata's numbering

_OURS = "drive-"  # what every drive ID begins with; Kata's as well
# Kata names an nvdimm and its memory after the drive, with these before it; its other devices ("virtio-drive-…") are found by their node.
KATA_NVDIMM, KATA_MEMORY = "nvdimm", "nvdimmbackmem"
_PERIPHERAL = "/machine/peripheral"
_CDROM = Family("sr", letters=False)  # no disk name, but an address
_DISKS = re.compile(r"child<(scsi-(hd|block|generic)|(virtio|vhost-user)-blk-.*|nvdimm|virtio-pmem-.*)>")
_MEMORY = re.compile(r"child<memory-backend-.*>")


async def take_inventory(qmp: QmpSession, tree: Tree, known: Collection[str]) -> Inventory:
    """Lists what the machine has; see Hypervisor.inventory. `tree` was read just before. Changes nothing in the machine."""
    nodes, blocks, objects, peripherals, memory = await asyncio.gather(
        qmp.execute("query-named-block-nodes", {"flat": True}),
        qmp.execute("query-block"),
        properties(qmp, "/objects"),
        properties(qmp, _PERIPHERAL),
        qmp.execute("query-memory-devices"),
    )
    modules = [entry["data"] for entry in memory if entry["type"] in ("nvdimm", "virtio-pmem")]
    backends = {_drive_id(node["node-name"]): VIRTIO_SCSI for node in nodes}
    backends |= {_drive_id(name, KATA_MEMORY): NVDIMM for name, kind in objects.items() if _MEMORY.fullmatch(kind)}
    devices = {_drive_id(name, KATA_NVDIMM): name for name, kind in peripherals.items() if _DISKS.fullmatch(kind)}
    # Kata names a disk otherwise than its node; whoever uses the node is the device.
    for block in blocks:
        node, name = block.get("inserted", {}).get("node-name", ""), peripheral(block.get("qdev"))
        if name in peripherals or (name is None and block.get("qdev")):
            devices.setdefault(_drive_id(node), name or "")
    names = (backends.keys() | devices.keys()) - {""}
    strange = [name for name in names if name not in known and devices.get(name)]
    is_cold = await asyncio.gather(*(_is_cold(qmp, devices[name]) for name in strange))
    cold = {name for name, each in zip(strange, is_cold, strict=True) if each}
    held = {name: Held(name in devices, name in backends, backends.get(name, VIRTIO_SCSI), name in cold) for name in sorted(names)}
    others = [block["qdev"] for block in blocks if block.get("qdev") and peripheral(block["qdev"]) not in known]
    scsi = await asyncio.gather(*(_scsi_disk(qmp, tree, qdev) for qdev in others))
    disks = [
        *(FoundDisk(disk.id, disk.family) for disk in tree.disks),
        *(FoundDisk(module.get("id", ""), PMEM) for module in modules),
        *(disk for disk in scsi if disk is not None),
    ]
    return Inventory(disks, held, frozenset(node["file"] for node in nodes if "file" in node))


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


async def _is_cold(qmp: QmpSession, device: str) -> bool:
    """Whether a device was there when the machine started."""
    return await get_property(qmp, f"{_PERIPHERAL}/{device}", "hotplugged") is False


async def _scsi_disk(qmp: QmpSession, tree: Tree, qdev: str) -> FoundDisk | None:
    """The SCSI or IDE disk of that ID or path; None for others, which the walk over the PCI buses has found."""
    path = qdev if qdev.startswith("/") else f"{_PERIPHERAL}/{qdev}"
    kind: Any = await get_property(qmp, path, "type")
    name = "" if path == qdev else qdev
    if kind == "ide-hd":
        return FoundDisk(name, SD)
    if not isinstance(kind, str) or not kind.startswith("scsi-"):
        return None
    bus, target, lun = await asyncio.gather(*(get_property(qmp, path, key) for key in ("parent_bus", "scsi-id", "lun")))
    ours = tree.scsi_buses and isinstance(bus, str) and bus.rpartition("/")[2] == tree.scsi_buses[0]
    index = target * LUNS + lun if ours and isinstance(target, int) and isinstance(lun, int) and 0 <= lun < LUNS else None
    return FoundDisk(name, SD if kind in ("scsi-hd", "scsi-block") else _CDROM, index)
