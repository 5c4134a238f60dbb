"""Saved sandboxes as the Kata Containers runtime writes them, and JSON compared apart from what
pyblock adds."""

from __future__ import annotations

import copy
import json
from typing import Any

Json = Any


def drive(number: int, **more: Json) -> dict[str, Json]:
    """A BlockDrive with every key that all of the original's versions write."""
    return {
        "File": f"/run/images/{number}",
        "Format": "raw",
        "ID": f"drive-{number:016x}",
        "MmioAddr": "",
        "SCSIAddr": "",
        "NvdimmID": "",
        "VirtPath": "",
        "DevNo": "",
        "Pmem": False,
        "Index": number,
        **more,
    }


def device(number: int, block_drive: dict[str, Json] | None, **more: Json) -> dict[str, Json]:
    """A DeviceState; without a drive the key is left out, as Go's omitempty does."""
    state = {
        "ID": f"{number:016x}",
        "Type": "block",
        "RefCount": 1,
        "AttachCount": 1,
        "DevType": "b",
        "Major": 8,
        "Minor": 16 * number,
        "DriverOptions": {"block-driver": "virtio-scsi"},
        "ColdPlug": False,
        **more,
    }
    return state if block_drive is None else {**state, "BlockDrive": block_drive}


def sandbox(devices: list[dict[str, Json]], indexes: list[int], **more: Json) -> dict[str, Json]:
    """A sandbox's file with those devices and BlockIndexMap."""
    hypervisor = {
        "Type": "qemu",
        "UUID": "5f1e",
        "Pid": 4711,
        "HotpluggedCPUs": [{"ID": "cpu-2"}],
        "BlockIndexMap": {str(n): {} for n in indexes},
    }
    return {
        "PersistVersion": 2,
        "State": "running",
        "HypervisorState": hypervisor,
        "Devices": devices,
        "Network": {"NetworkID": ""},
        **more,
    }


VFIO = device(
    99,
    None,
    Type="vfio",
    DevType="c",
    Major=240,
    Minor=3,
    DriverOptions=None,
    VFIODevs=[{"ID": "vfio-1", "BDF": "02:10.0", "SysfsDev": "/sys/x", "Guest": {"Path": "02/01"}}],
    VhostUserDevAttrs={"DevID": "", "Type": ""},
)

SCSI = [
    device(n, drive(n, SCSIAddr=f"0:{n}", PCIAddr=""), AttachCount=n + 1, RefCount=n + 1)
    for n in range(3)
]
BLK = [
    device(
        n,
        drive(n, VirtPath=f"/dev/vd{'abcdef'[n]}", PCIPath=f"02/0{n}"),
        DriverOptions={"block-driver": "virtio-blk", "fstype": "ext4"},
    )
    for n in range(3)
]

# What versions and settings of the original differ in.
KATA: dict[str, dict[str, Json]] = {
    "PCIAddr": sandbox(
        [device(0, drive(0, SCSIAddr="0:0", PCIAddr="02/00", ShareRW=False, ReadOnly=True))], [0]
    ),
    "PCIPath as text": sandbox(BLK, [0, 1, 2]),
    "PCIPath as object": sandbox([device(0, drive(0, SCSIAddr="0:0", PCIPath={}))], [0]),
    "PCIPath as object with keys": sandbox(
        [device(0, drive(0, SCSIAddr="0:0", PCIPath={"slots": [2, 0]}))], [0]
    ),
    "counts": sandbox(SCSI, [0, 1, 2]),
    "vfio between": sandbox([SCSI[0], VFIO, SCSI[1]], [0, 1]),
    "vfio only": sandbox([VFIO], []),
    "index without device": sandbox(SCSI[:2], [0, 1, 2, 7]),
    "no device": sandbox([], []),
    "nvdimm": sandbox(
        [
            device(
                0,
                drive(0, NvdimmID="nvdimm-0", PCIAddr=""),
                DriverOptions={"block-driver": "nvdimm"},
            )
        ],
        [0],
    ),
    "pmem": sandbox([device(0, drive(0, NvdimmID="nvdimm-0", Pmem=True), DriverOptions={})], [0]),
    "ccw": sandbox(
        [
            device(
                0,
                drive(0, DevNo="fe.1.0005", VirtPath="/dev/vda"),
                DriverOptions={"block-driver": "virtio-blk-ccw"},
            )
        ],
        [0],
    ),
    "mmio": sandbox(
        [device(0, drive(0, VirtPath="/dev/vdb"), DriverOptions={"block-driver": "virtio-mmio"})],
        [0],
    ),
    "detached, drive kept": sandbox([device(0, drive(0, SCSIAddr="0:0"), AttachCount=0)], []),
    "detached, no drive": sandbox([device(0, None, AttachCount=0)], []),
    "generic": sandbox(
        [
            device(
                0,
                None,
                Type="generic",
                DevType="c",
                Major=10,
                Minor=229,
                DriverOptions=None,
                AttachCount=2,
                RefCount=2,
            )
        ],
        [],
    ),
    "unknown keys": sandbox(
        [
            device(
                0,
                drive(0, SCSIAddr="0:0", Swap=True, Deep={"a": [1, {"b": None}]}),
                NewKey=[1, 2],
                VhostUserDev={"Type": "x"},
            )
        ],
        [0],
        Agent={"URL": "vsock://3"},
    ),
}
KATA["unknown keys"]["HypervisorState"]["BlockIndexMap"] = {"0": {"since": 1}}


def as_written(state: dict[str, Json]) -> dict[str, Json]:
    """What is to come out for a state that went in: a PCI path that is a text, which the original
    of today refuses, as its PCIAddr."""
    state = copy.deepcopy(state)
    for one in state["Devices"]:
        drive = one.get("BlockDrive") or {}
        if isinstance(drive.get("PCIPath"), str):
            drive["PCIAddr"] = drive.pop("PCIPath")
    return state


def without_pyblock(value: Json) -> Json:
    """The JSON without what stands under "Pyblock", and its devices in the order of their IDs."""
    value = copy.deepcopy(value)

    def strip(one: Json) -> Json:
        if isinstance(one, dict):
            return {key: strip(inner) for key, inner in one.items() if key != "Pyblock"}
        return [strip(inner) for inner in one] if isinstance(one, list) else one

    value = strip(value)
    if value.get("Devices"):
        value["Devices"].sort(key=lambda one: str(one["ID"]))
    return value


def text(value: Json) -> bytes:
    return json.dumps(value).encode()
