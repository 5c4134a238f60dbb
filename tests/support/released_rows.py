"""What stores of version 4 held, as pyblock wrote it before a store had records: it is taken up
for ever.

Own devices of all kinds (one in doubt, one leaving, one counted), and a sandbox that came from the
original, with unknown keys; and what was exported of the two.
"""

# ruff: noqa: E501 - what was written stays as it was written

from __future__ import annotations

# ID, row, image, access.
DEVICES: dict[str, list[tuple[str, bytes, str | None, int | None]]] = {
    "own": [
        (
            "virtio-scsi",
            b"""{"ID": "virtio-scsi", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major":
-1, "Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/virtio-scsi", "Format": "raw", "ID": "drive-virtio-scsi", "Index": 0,
"MmioAddr": "", "PCIAddr": "", "SCSIAddr": "0:0", "NvdimmID": "", "VirtPath": "", "DevNo": "",
"Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 0, "Serial":
"virtio-scsi", "GuestMatch": "/0:0:0:0/"}}, "Pyblock": {"Phase": "attached", "Path":
"/run/images/virtio-scsi", "Driver": "virtio-scsi", "Serial": "virtio-scsi", "Identity": ["file",
65024, 10152112]}}""",
            "file:65024:10152112",
            0,
        ),
        (
            "virtio-blk",
            b"""{"ID": "virtio-blk", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major":
-1, "Minor": 0, "DriverOptions": {"block-driver": "virtio-blk"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/virtio-blk", "Format": "raw", "ID": "drive-virtio-blk", "Index": 1,
"MmioAddr": "", "PCIAddr": "02/00", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vda",
"DevNo": "", "Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 0,
"Serial": "virtio-blk", "GuestMatch": "0000:00:02.0/0000:01:00.0", "Slot": "0"}}, "Pyblock":
{"Phase": "attached", "Path": "/run/images/virtio-blk", "Driver": "virtio-blk", "Serial":
"virtio-blk", "Identity": ["file", 65024, 10152113]}}""",
            "file:65024:10152113",
            0,
        ),
        (
            "virtio-blk-ccw",
            b"""{"ID": "virtio-blk-ccw", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b",
"Major": -1, "Minor": 0, "DriverOptions": {"block-driver": "virtio-blk-ccw"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/virtio-blk-ccw", "Format": "raw", "ID":
"drive-virtio-blk-ccw", "Index": 2, "MmioAddr": "", "PCIAddr": "", "SCSIAddr": "", "NvdimmID": "",
"VirtPath": "/dev/vdb", "DevNo": "0.0.0002", "Pmem": false, "ReadOnly": false, "Pyblock":
{"Driver": "virtio-blk-ccw", "Ordinal": 1, "Serial": "virtio-blk-ccw", "GuestMatch":
"/0.0.0002/"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/virtio-blk-ccw", "Driver":
"virtio-blk-ccw", "Serial": "virtio-blk-ccw", "Identity": ["file", 65024, 10152114]}}""",
            "file:65024:10152114",
            0,
        ),
        (
            "virtio-mmio",
            b"""{"ID": "virtio-mmio", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major":
-1, "Minor": 0, "DriverOptions": {"block-driver": "virtio-mmio"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/virtio-mmio", "Format": "raw", "ID": "drive-virtio-mmio", "Index": 3,
"MmioAddr": "", "PCIAddr": "", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vdd", "DevNo":
"", "Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-mmio", "Ordinal": 2, "Offset":
1, "GuestMatch": "/vdd"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/virtio-mmio",
"Driver": "virtio-mmio", "Identity": ["file", 65024, 10152115]}}""",
            "file:65024:10152115",
            0,
        ),
        (
            "nvdimm",
            b"""{"ID": "nvdimm", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1,
"Minor": 0, "DriverOptions": {"block-driver": "nvdimm"}, "ColdPlug": false, "BlockDrive": {"File":
"/run/images/nvdimm", "Format": "raw", "ID": "drive-nvdimm", "Index": 4, "MmioAddr": "",
"PCIAddr": "", "SCSIAddr": "", "NvdimmID": "0", "VirtPath": "", "DevNo": "", "Pmem": true,
"ReadOnly": false, "Pyblock": {"Driver": "nvdimm", "Ordinal": 0, "GuestMatch": "/region0/"}},
"Pyblock": {"Phase": "attached", "Path": "/run/images/nvdimm", "Driver": "nvdimm", "Identity":
["file", 65024, 10152116]}}""",
            "file:65024:10152116",
            0,
        ),
        (
            "shared",
            b"""{"ID": "shared", "Type": "block", "RefCount": 2, "AttachCount": 2, "DevType": "b", "Major": -1,
"Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/shared", "Format": "raw", "ID": "drive-shared", "Index": 5, "MmioAddr": "",
"PCIAddr": "", "SCSIAddr": "0:5", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false,
"ShareRW": true, "ReadOnly": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 1, "Serial":
"shared", "GuestMatch": "/0:0:0:5/"}}, "Pyblock": {"Phase": "attached", "Path":
"/run/images/shared", "Driver": "virtio-scsi", "Serial": "shared", "Share": true, "Identity":
["file", 65024, 10152117]}}""",
            "file:65024:10152117",
            2,
        ),
        (
            "ro",
            b"""{"ID": "ro", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1,
"Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/ro", "Format": "raw", "ID": "drive-ro", "Index": 6, "MmioAddr": "",
"PCIAddr": "", "SCSIAddr": "0:6", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false,
"ReadOnly": true, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 2, "Serial": "SERIAL-7",
"GuestMatch": "/0:0:0:6/"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/ro", "Driver":
"virtio-scsi", "Serial": "SERIAL-7", "ReadOnly": true, "Identity": ["file", 65024, 10152118]}}""",
            "file:65024:10152118",
            1,
        ),
        (
            "ext4",
            b"""{"ID": "ext4", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1,
"Minor": 0, "DriverOptions": {"fstype": "ext4", "block-driver": "virtio-scsi"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/ext4", "Format": "ext4", "ID": "drive-ext4", "Index": 7,
"MmioAddr": "", "PCIAddr": "", "SCSIAddr": "0:7", "NvdimmID": "", "VirtPath": "", "DevNo": "",
"Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 3, "Serial":
"ext4", "GuestMatch": "/0:0:0:7/"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/ext4",
"Driver": "virtio-scsi", "Serial": "ext4", "Identity": ["file", 65024, 10152298]}}""",
            "file:65024:10152298",
            0,
        ),
        (
            "raw",
            b"""{"ID": "raw", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1,
"Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/raw", "Format": "raw", "ID": "drive-raw", "Index": 8, "MmioAddr": "",
"PCIAddr": "", "SCSIAddr": "0:8", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false,
"ReadOnly": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 4, "Serial": "raw",
"GuestMatch": "/0:0:0:8/"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/raw", "Driver":
"virtio-scsi", "Serial": "raw", "Format": "raw", "Identity": ["file", 65024, 10152299]}}""",
            "file:65024:10152299",
            0,
        ),
        (
            "19da39dffc34db91",
            b"""{"ID": "19da39dffc34db91", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b",
"Major": -1, "Minor": 0, "DriverOptions": {"block-driver": "virtio-blk"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/m1", "Format": "raw", "ID": "drive-19da39dffc34db91", "Index":
9, "MmioAddr": "", "PCIAddr": "02/01", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vdd",
"DevNo": "", "Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 3,
"Serial": "19da39dffc34db91", "GuestMatch": "0000:00:02.0/0000:01:01.0", "Slot": "1", "Crowded":
true}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/m1", "Driver": "virtio-blk",
"Serial": "19da39dffc34db91", "Identity": ["file", 65024, 10152300]}}""",
            "file:65024:10152300",
            0,
        ),
        (
            "7bb69d0eed3fe108",
            b"""{"ID": "7bb69d0eed3fe108", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b",
"Major": -1, "Minor": 0, "DriverOptions": {"block-driver": "virtio-blk"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/m2", "Format": "raw", "ID": "drive-7bb69d0eed3fe108", "Index":
10, "MmioAddr": "", "PCIAddr": "02/02", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vde",
"DevNo": "", "Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 4,
"Serial": "7bb69d0eed3fe108", "GuestMatch": "0000:00:02.0/0000:01:02.0", "Slot": "2", "Crowded":
true}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/m2", "Driver": "virtio-blk",
"Serial": "7bb69d0eed3fe108", "Identity": ["file", 65024, 10152301]}}""",
            "file:65024:10152301",
            0,
        ),
        (
            "long-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
            b"""{"ID": "long-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "Type": "block",
"RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0, "DriverOptions":
{"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/long",
"Format": "raw", "ID": "drive-long-xxxxxx.i4n5zzmwdtpqz", "Index": 11, "MmioAddr": "", "PCIAddr":
"", "SCSIAddr": "0:11", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false, "ReadOnly":
false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 5, "GuestMatch": "/0:0:0:11/"}}, "Pyblock":
{"Phase": "attached", "Path": "/run/images/long", "Driver": "virtio-scsi", "Identity": ["file",
65024, 10152302]}}""",
            "file:65024:10152302",
            0,
        ),
        (
            "fuse",
            b"""{"ID": "fuse", "Type": "generic", "RefCount": 1, "AttachCount": 1, "DevType": "c", "Major": 10,
"Minor": 229, "DriverOptions": {}, "ColdPlug": false}""",
            None,
            None,
        ),
        (
            "dp",
            b"""{"ID": "dp", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1,
"Minor": 0, "DriverOptions": {"block-driver": "virtio-blk"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/dp", "Format": "raw", "ID": "drive-dp", "Index": 12, "MmioAddr": "",
"PCIAddr": "02/03", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vdf", "DevNo": "", "Pmem":
false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 5, "Serial": "dp",
"GuestMatch": "0000:00:02.0/0000:01:03.0", "Slot": "3"}}, "Pyblock": {"Phase": "detach-pending",
"Path": "/run/images/dp", "Driver": "virtio-blk", "Serial": "dp", "Identity": ["file", 65024,
10152303]}}""",
            "file:65024:10152303",
            0,
        ),
        (
            "ap",
            b"""{"ID": "ap", "Type": "block", "RefCount": 1, "AttachCount": 0, "DevType": "b", "Major": -1,
"Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/ap", "Format": "raw", "ID": "drive-ap", "Index": 13, "MmioAddr": "",
"PCIAddr": "", "SCSIAddr": "0:13", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false,
"ReadOnly": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 6, "Serial": "ap"}}, "Pyblock":
{"Phase": "attach-pending", "Path": "/run/images/ap", "Driver": "virtio-scsi", "Serial": "ap",
"Identity": ["file", 65024, 10152304]}}""",
            "file:65024:10152304",
            0,
        ),
    ],
    "kata": [
        (
            "0000000000000000",
            b"""{"ID": "0000000000000000", "Type": "block", "RefCount": 3, "AttachCount": 2, "DevType": "b",
"Major": 8, "Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/0", "Format": "raw", "ID": "drive-0000000000000000", "Index":
0, "MmioAddr": "", "SCSIAddr": "0:0", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false,
"Pyblock": {"Driver": "virtio-scsi", "Ordinal": 0, "GuestMatch": "/0:0:0:0/", "Imported": true},
"Swap": true, "Deep": {"a": [1, {"b": null}]}}, "NewKey": [1, 2]}""",
            "block:8:0",
            0,
        ),
        (
            "0000000000000001",
            b"""{"ID": "0000000000000001", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b",
"Major": 8, "Minor": 16, "DriverOptions": {"block-driver": "virtio-blk", "fstype": "ext4"},
"ColdPlug": false, "BlockDrive": {"File": "/run/images/1", "Format": "raw", "ID":
"drive-0000000000000001", "Index": 1, "MmioAddr": "", "PCIAddr": "02/01", "SCSIAddr": "",
"NvdimmID": "", "VirtPath": "/dev/vdb", "DevNo": "", "Pmem": false, "Pyblock": {"Driver":
"virtio-blk", "Ordinal": 1, "GuestMatch": "0000:00:02.0/0000:01:01.0", "Slot": "1", "KnownName":
"/dev/vdb", "Imported": true}}}""",
            "block:8:16",
            0,
        ),
        (
            "0000000000000002",
            b"""{"ID": "0000000000000002", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b",
"Major": 8, "Minor": 32, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/2", "Format": "raw", "ID": "drive-0000000000000002", "Index":
2, "MmioAddr": "", "PCIAddr": "", "SCSIAddr": "", "NvdimmID": "4", "VirtPath": "", "DevNo": "",
"Pmem": true, "Pyblock": {"Driver": "nvdimm", "Ordinal": 4, "GuestMatch": "/region4/",
"KnownName": "/dev/pmem4", "Imported": true}}}""",
            None,
            None,
        ),
        (
            "0000000000000003",
            b"""{"ID": "0000000000000003", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b",
"Major": 8, "Minor": 48, "DriverOptions": {"block-driver": "virtio-blk-ccw"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/3", "Format": "raw", "ID": "drive-0000000000000003", "Index":
3, "MmioAddr": "", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vda", "DevNo": "fe.1.0005",
"Pmem": false, "Pyblock": {"Driver": "virtio-blk-ccw", "Ordinal": 0, "GuestMatch": "/0.1.0005/",
"KnownName": "/dev/vda", "Imported": true}}}""",
            "block:8:48",
            0,
        ),
        (
            "0000000000000004",
            b"""{"ID": "0000000000000004", "Type": "block", "RefCount": 1, "AttachCount": 0, "DevType": "b",
"Major": 8, "Minor": 64, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/4", "Format": "raw", "ID": "drive-0000000000000004", "Index":
4, "MmioAddr": "", "SCSIAddr": "0:4", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false}}""",
            None,
            None,
        ),
        (
            "0000000000000005",
            b"""{"ID": "0000000000000005", "Type": "block", "RefCount": 1, "AttachCount": 0, "DevType": "b",
"Major": 8, "Minor": 80, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false}""",
            None,
            None,
        ),
        (
            "0000000000000006",
            b"""{"ID": "0000000000000006", "Type": "generic", "RefCount": 2, "AttachCount": 2, "DevType": "c",
"Major": 10, "Minor": 229, "DriverOptions": null, "ColdPlug": false}""",
            None,
            None,
        ),
        (
            "0000000000000007",
            b"""{"ID": "0000000000000007", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b",
"Major": 8, "Minor": 112, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/7", "Format": "raw", "ID": "drive-0000000000000007", "Index":
7, "MmioAddr": "", "SCSIAddr": "0:7", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false,
"Pyblock": {"Driver": "virtio-scsi", "Ordinal": 4, "GuestMatch": "/0:0:0:7/", "Imported": true}},
"Pyblock": {"Phase": "detach-pending", "Path": "/run/images/7", "Driver": "virtio-scsi",
"Identity": ["block", 8, 112]}}""",
            "block:8:112",
            0,
        ),
    ],
}

SANDBOXES: dict[str, bytes] = {
    "own": b"""""",
    "kata": b"""{"Pyblock": {"Version": 1, "Sandbox": "kata", "Offsets": {}, "Taken": [9]}, "Devices": [{"ID":
"0000000000000063", "Type": "vfio", "RefCount": 1, "AttachCount": 1, "DevType": "c", "Major": 240,
"Minor": 3, "DriverOptions": null, "ColdPlug": false, "VFIODevs": [{"ID": "vfio-1", "BDF":
"02:10.0", "SysfsDev": "/sys/x", "Guest": {"Path": "02/01"}}], "VhostUserDevAttrs": {"DevID": "",
"Type": ""}}], "HypervisorState": {"BlockIndexMap": {"0": {}, "1": {}, "2": {}, "3": {}, "7": {},
"9": {}}, "Type": "qemu", "UUID": "5f1e", "Pid": 4711, "HotpluggedCPUs": [{"ID": "cpu-2"}]},
"PersistVersion": 2, "State": "running", "Network": {"NetworkID": ""}, "Agent": {"URL":
"vsock://3"}}""",
}

EXPORTS: dict[str, bytes] = {
    "own": b"""{"Pyblock": {"Version": 1, "Sandbox": "own", "Offsets": {}}, "Devices": [{"ID": "virtio-scsi",
"Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0,
"DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive": {"File":
"/run/images/virtio-scsi", "Format": "raw", "ID": "drive-virtio-scsi", "Index": 0, "MmioAddr": "",
"PCIAddr": "", "SCSIAddr": "0:0", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false,
"ReadOnly": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 0, "Serial": "virtio-scsi",
"GuestMatch": "/0:0:0:0/"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/virtio-scsi",
"Driver": "virtio-scsi", "Serial": "virtio-scsi", "Identity": ["file", 65024, 10152112]}}, {"ID":
"virtio-blk", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1,
"Minor": 0, "DriverOptions": {"block-driver": "virtio-blk"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/virtio-blk", "Format": "raw", "ID": "drive-virtio-blk", "Index": 1,
"MmioAddr": "", "PCIAddr": "02/00", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vda",
"DevNo": "", "Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 0,
"Serial": "virtio-blk", "GuestMatch": "0000:00:02.0/0000:01:00.0", "Slot": "0"}}, "Pyblock":
{"Phase": "attached", "Path": "/run/images/virtio-blk", "Driver": "virtio-blk", "Serial":
"virtio-blk", "Identity": ["file", 65024, 10152113]}}, {"ID": "virtio-blk-ccw", "Type": "block",
"RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0, "DriverOptions":
{"block-driver": "virtio-blk-ccw"}, "ColdPlug": false, "BlockDrive": {"File":
"/run/images/virtio-blk-ccw", "Format": "raw", "ID": "drive-virtio-blk-ccw", "Index": 2,
"MmioAddr": "", "PCIAddr": "", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vdb", "DevNo":
"0.0.0002", "Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk-ccw", "Ordinal":
1, "Serial": "virtio-blk-ccw", "GuestMatch": "/0.0.0002/"}}, "Pyblock": {"Phase": "attached",
"Path": "/run/images/virtio-blk-ccw", "Driver": "virtio-blk-ccw", "Serial": "virtio-blk-ccw",
"Identity": ["file", 65024, 10152114]}}, {"ID": "virtio-mmio", "Type": "block", "RefCount": 1,
"AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0, "DriverOptions": {"block-driver":
"virtio-mmio"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/virtio-mmio", "Format":
"raw", "ID": "drive-virtio-mmio", "Index": 3, "MmioAddr": "", "PCIAddr": "", "SCSIAddr": "",
"NvdimmID": "", "VirtPath": "/dev/vdd", "DevNo": "", "Pmem": false, "ReadOnly": false, "Pyblock":
{"Driver": "virtio-mmio", "Ordinal": 2, "Offset": 1, "GuestMatch": "/vdd"}}, "Pyblock": {"Phase":
"attached", "Path": "/run/images/virtio-mmio", "Driver": "virtio-mmio", "Identity": ["file",
65024, 10152115]}}, {"ID": "nvdimm", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType":
"b", "Major": -1, "Minor": 0, "DriverOptions": {"block-driver": "nvdimm"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/nvdimm", "Format": "raw", "ID": "drive-nvdimm", "Index": 4,
"MmioAddr": "", "PCIAddr": "", "SCSIAddr": "", "NvdimmID": "0", "VirtPath": "", "DevNo": "",
"Pmem": true, "ReadOnly": false, "Pyblock": {"Driver": "nvdimm", "Ordinal": 0, "GuestMatch":
"/region0/"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/nvdimm", "Driver": "nvdimm",
"Identity": ["file", 65024, 10152116]}}, {"ID": "shared", "Type": "block", "RefCount": 2,
"AttachCount": 2, "DevType": "b", "Major": -1, "Minor": 0, "DriverOptions": {"block-driver":
"virtio-scsi"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/shared", "Format": "raw",
"ID": "drive-shared", "Index": 5, "MmioAddr": "", "PCIAddr": "", "SCSIAddr": "0:5", "NvdimmID":
"", "VirtPath": "", "DevNo": "", "Pmem": false, "ShareRW": true, "ReadOnly": false, "Pyblock":
{"Driver": "virtio-scsi", "Ordinal": 1, "Serial": "shared", "GuestMatch": "/0:0:0:5/"}},
"Pyblock": {"Phase": "attached", "Path": "/run/images/shared", "Driver": "virtio-scsi", "Serial":
"shared", "Share": true, "Identity": ["file", 65024, 10152117]}}, {"ID": "ro", "Type": "block",
"RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0, "DriverOptions":
{"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/ro",
"Format": "raw", "ID": "drive-ro", "Index": 6, "MmioAddr": "", "PCIAddr": "", "SCSIAddr": "0:6",
"NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false, "ReadOnly": true, "Pyblock":
{"Driver": "virtio-scsi", "Ordinal": 2, "Serial": "SERIAL-7", "GuestMatch": "/0:0:0:6/"}},
"Pyblock": {"Phase": "attached", "Path": "/run/images/ro", "Driver": "virtio-scsi", "Serial":
"SERIAL-7", "ReadOnly": true, "Identity": ["file", 65024, 10152118]}}, {"ID": "ext4", "Type":
"block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0,
"DriverOptions": {"fstype": "ext4", "block-driver": "virtio-scsi"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/ext4", "Format": "ext4", "ID": "drive-ext4", "Index": 7,
"MmioAddr": "", "PCIAddr": "", "SCSIAddr": "0:7", "NvdimmID": "", "VirtPath": "", "DevNo": "",
"Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 3, "Serial":
"ext4", "GuestMatch": "/0:0:0:7/"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/ext4",
"Driver": "virtio-scsi", "Serial": "ext4", "Identity": ["file", 65024, 10152298]}}, {"ID": "raw",
"Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0,
"DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive": {"File":
"/run/images/raw", "Format": "raw", "ID": "drive-raw", "Index": 8, "MmioAddr": "", "PCIAddr": "",
"SCSIAddr": "0:8", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false, "ReadOnly": false,
"Pyblock": {"Driver": "virtio-scsi", "Ordinal": 4, "Serial": "raw", "GuestMatch": "/0:0:0:8/"}},
"Pyblock": {"Phase": "attached", "Path": "/run/images/raw", "Driver": "virtio-scsi", "Serial":
"raw", "Format": "raw", "Identity": ["file", 65024, 10152299]}}, {"ID": "19da39dffc34db91",
"Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0,
"DriverOptions": {"block-driver": "virtio-blk"}, "ColdPlug": false, "BlockDrive": {"File":
"/run/images/m1", "Format": "raw", "ID": "drive-19da39dffc34db91", "Index": 9, "MmioAddr": "",
"PCIAddr": "02/01", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vdd", "DevNo": "", "Pmem":
false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 3, "Serial":
"19da39dffc34db91", "GuestMatch": "0000:00:02.0/0000:01:01.0", "Slot": "1", "Crowded": true}},
"Pyblock": {"Phase": "attached", "Path": "/run/images/m1", "Driver": "virtio-blk", "Serial":
"19da39dffc34db91", "Identity": ["file", 65024, 10152300]}}, {"ID": "7bb69d0eed3fe108", "Type":
"block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0,
"DriverOptions": {"block-driver": "virtio-blk"}, "ColdPlug": false, "BlockDrive": {"File":
"/run/images/m2", "Format": "raw", "ID": "drive-7bb69d0eed3fe108", "Index": 10, "MmioAddr": "",
"PCIAddr": "02/02", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vde", "DevNo": "", "Pmem":
false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 4, "Serial":
"7bb69d0eed3fe108", "GuestMatch": "0000:00:02.0/0000:01:02.0", "Slot": "2", "Crowded": true}},
"Pyblock": {"Phase": "attached", "Path": "/run/images/m2", "Driver": "virtio-blk", "Serial":
"7bb69d0eed3fe108", "Identity": ["file", 65024, 10152301]}}, {"ID":
"long-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "Type": "block", "RefCount":
1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0, "DriverOptions": {"block-driver":
"virtio-scsi"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/long", "Format": "raw",
"ID": "drive-long-xxxxxx.i4n5zzmwdtpqz", "Index": 11, "MmioAddr": "", "PCIAddr": "", "SCSIAddr":
"0:11", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false, "ReadOnly": false, "Pyblock":
{"Driver": "virtio-scsi", "Ordinal": 5, "GuestMatch": "/0:0:0:11/"}}, "Pyblock": {"Phase":
"attached", "Path": "/run/images/long", "Driver": "virtio-scsi", "Identity": ["file", 65024,
10152302]}}, {"ID": "fuse", "Type": "generic", "RefCount": 1, "AttachCount": 1, "DevType": "c",
"Major": 10, "Minor": 229, "DriverOptions": {}, "ColdPlug": false}, {"ID": "dp", "Type": "block",
"RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": -1, "Minor": 0, "DriverOptions":
{"block-driver": "virtio-blk"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/dp",
"Format": "raw", "ID": "drive-dp", "Index": 12, "MmioAddr": "", "PCIAddr": "02/03", "SCSIAddr":
"", "NvdimmID": "", "VirtPath": "/dev/vdf", "DevNo": "", "Pmem": false, "ReadOnly": false,
"Pyblock": {"Driver": "virtio-blk", "Ordinal": 5, "Serial": "dp", "GuestMatch":
"0000:00:02.0/0000:01:03.0", "Slot": "3"}}, "Pyblock": {"Phase": "detach-pending", "Path":
"/run/images/dp", "Driver": "virtio-blk", "Serial": "dp", "Identity": ["file", 65024, 10152303]}},
{"ID": "ap", "Type": "block", "RefCount": 1, "AttachCount": 0, "DevType": "b", "Major": -1,
"Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/ap", "Format": "raw", "ID": "drive-ap", "Index": 13, "MmioAddr": "",
"PCIAddr": "", "SCSIAddr": "0:13", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false,
"ReadOnly": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 6, "Serial": "ap"}}, "Pyblock":
{"Phase": "attach-pending", "Path": "/run/images/ap", "Driver": "virtio-scsi", "Serial": "ap",
"Identity": ["file", 65024, 10152304]}}], "HypervisorState": {"BlockIndexMap": {"0": {}, "1": {},
"2": {}, "3": {}, "4": {}, "5": {}, "6": {}, "7": {}, "8": {}, "9": {}, "10": {}, "11": {}, "12":
{}, "13": {}}}}""",
    "kata": b"""{"Pyblock": {"Version": 1, "Sandbox": "kata", "Offsets": {}}, "Devices": [{"ID":
"0000000000000000", "Type": "block", "RefCount": 3, "AttachCount": 2, "DevType": "b", "Major": 8,
"Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/0", "Format": "raw", "ID": "drive-0000000000000000", "Index": 0, "MmioAddr":
"", "SCSIAddr": "0:0", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false, "Pyblock":
{"Driver": "virtio-scsi", "Ordinal": 0, "GuestMatch": "/0:0:0:0/", "Imported": true}, "Swap":
true, "Deep": {"a": [1, {"b": null}]}}, "NewKey": [1, 2]}, {"ID": "0000000000000001", "Type":
"block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": 8, "Minor": 16,
"DriverOptions": {"block-driver": "virtio-blk", "fstype": "ext4"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/1", "Format": "raw", "ID": "drive-0000000000000001", "Index":
1, "MmioAddr": "", "PCIAddr": "02/01", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vdb",
"DevNo": "", "Pmem": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 1, "GuestMatch":
"0000:00:02.0/0000:01:01.0", "Slot": "1", "KnownName": "/dev/vdb", "Imported": true}}}, {"ID":
"0000000000000002", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": 8,
"Minor": 32, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/2", "Format": "raw", "ID": "drive-0000000000000002", "Index": 2, "MmioAddr":
"", "PCIAddr": "", "SCSIAddr": "", "NvdimmID": "4", "VirtPath": "", "DevNo": "", "Pmem": true,
"Pyblock": {"Driver": "nvdimm", "Ordinal": 4, "GuestMatch": "/region4/", "KnownName":
"/dev/pmem4", "Imported": true}}}, {"ID": "0000000000000003", "Type": "block", "RefCount": 1,
"AttachCount": 1, "DevType": "b", "Major": 8, "Minor": 48, "DriverOptions": {"block-driver":
"virtio-blk-ccw"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/3", "Format": "raw",
"ID": "drive-0000000000000003", "Index": 3, "MmioAddr": "", "SCSIAddr": "", "NvdimmID": "",
"VirtPath": "/dev/vda", "DevNo": "fe.1.0005", "Pmem": false, "Pyblock": {"Driver":
"virtio-blk-ccw", "Ordinal": 0, "GuestMatch": "/0.1.0005/", "KnownName": "/dev/vda", "Imported":
true}}}, {"ID": "0000000000000004", "Type": "block", "RefCount": 1, "AttachCount": 0, "DevType":
"b", "Major": 8, "Minor": 64, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/4", "Format": "raw", "ID": "drive-0000000000000004", "Index":
4, "MmioAddr": "", "SCSIAddr": "0:4", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem":
false}}, {"ID": "0000000000000005", "Type": "block", "RefCount": 1, "AttachCount": 0, "DevType":
"b", "Major": 8, "Minor": 80, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug":
false}, {"ID": "0000000000000006", "Type": "generic", "RefCount": 2, "AttachCount": 2, "DevType":
"c", "Major": 10, "Minor": 229, "DriverOptions": null, "ColdPlug": false}, {"ID":
"0000000000000007", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": 8,
"Minor": 112, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive":
{"File": "/run/images/7", "Format": "raw", "ID": "drive-0000000000000007", "Index": 7, "MmioAddr":
"", "SCSIAddr": "0:7", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false, "Pyblock":
{"Driver": "virtio-scsi", "Ordinal": 4, "GuestMatch": "/0:0:0:7/", "Imported": true}}, "Pyblock":
{"Phase": "detach-pending", "Path": "/run/images/7", "Driver": "virtio-scsi", "Identity":
["block", 8, 112]}}, {"ID": "0000000000000063", "Type": "vfio", "RefCount": 1, "AttachCount": 1,
"DevType": "c", "Major": 240, "Minor": 3, "DriverOptions": null, "ColdPlug": false, "VFIODevs":
[{"ID": "vfio-1", "BDF": "02:10.0", "SysfsDev": "/sys/x", "Guest": {"Path": "02/01"}}],
"VhostUserDevAttrs": {"DevID": "", "Type": ""}}], "HypervisorState": {"BlockIndexMap": {"0": {},
"1": {}, "2": {}, "3": {}, "7": {}, "9": {}}, "Type": "qemu", "UUID": "5f1e", "Pid": 4711,
"HotpluggedCPUs": [{"ID": "cpu-2"}]}, "PersistVersion": 2, "State": "running", "Network":
{"NetworkID": ""}, "Agent": {"URL": "vsock://3"}}""",
}
