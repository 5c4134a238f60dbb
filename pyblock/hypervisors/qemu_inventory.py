"""What QEMU has plugged in, out of its own listings: block nodes, memory objects, named devices, and who uses what.

One reply lists all of a kind, so that a thousand drives cost no more round trips than one; only disks that are not ours are looked at
one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from pyblock.drivers import NVDIMM, PMEM, SD, VIRTIO_BLK, VIRTIO_SCSI, Driver, Family
from pyblock.hypervisors.base import FoundDisk, Held, Inventory
from pyblock.hypervisors.qemu_tree import Tree, get_property, properties
from pyblock.hypervisors.qmp import QmpSession

OURS = "drive-"  # what every drive ID begins with; the original's nodes as well
LUNS = 256  # a SCSI ID has as many LUNs in Kata's numbering

_PERIPHERAL = "/machine/peripheral"
_CDROM = Family("sr", letters=False)  # no disk name, but an address


async def take_inventory(qmp: QmpSession, tree: Tree, known: Collection[str]) -> Inventory:
    """Lists what the machine has; see Hypervisor.inventory. `tree` was read just before. Changes nothing in the machine."""
    nodes, blocks, objects, peripherals, memory = await asyncio.gather(
        qmp.execute("query-named-block-nodes", {"flat": True}),
        qmp.execute("query-block"),
        properties(qmp, "/objects"),
        properties(qmp, _PERIPHERAL),
        qmp.execute("query-memory-devices"),
    )
    backends = {node["node-name"] for node in nodes} | objects.keys()
    modules = [entry["data"] for entry in memory if entry["type"] in ("nvdimm", "virtio-pmem")]
    # The original names a device otherwise than its node; whoever uses the node is the device.
    used = {
        block["inserted"]["node-name"]
        for block in blocks
        if "node-name" in block.get("inserted", {}) and _is_there(block.get("qdev"), peripherals)
    }
    used |= {module["memdev"].rpartition("/")[2] for module in modules if "memdev" in module}
    held = {
        name: Held(name in peripherals or name in used, name in backends, _kind(peripherals.get(name, ""), name in objects))
        for name in (*backends, *(name for name in peripherals if name not in backends))
        if name.startswith(OURS)
    }
    others = [block["qdev"] for block in blocks if block.get("qdev") and block["qdev"] not in known]
    scsi = await asyncio.gather(*(_scsi_disk(qmp, tree, qdev) for qdev in others))
    disks = [
        *(FoundDisk(disk.id, disk.family) for disk in tree.disks),
        *(FoundDisk(module.get("id", ""), PMEM) for module in modules),
        *(disk for disk in scsi if disk is not None),
    ]
    return Inventory(disks, held)


def _is_there(qdev: str | None, peripherals: Collection[str]) -> bool:
    """Whether the user of a node is still in the machine: one that left is listed until QEMU has freed it."""
    if not qdev:
        return False
    name = qdev.removeprefix(f"{_PERIPHERAL}/")
    return name.startswith("/") or name.partition("/")[0] in peripherals


def _kind(device_type: str, is_object: bool) -> Driver:
    if is_object:
        return NVDIMM
    return VIRTIO_BLK if "virtio-blk" in device_type else VIRTIO_SCSI


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
