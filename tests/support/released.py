"""What pyblock 0.1 wrote, before it was held against both versions of the original: it must be read
for ever.

All drivers (one twice attached, one shared, one with options), a detach that was pending, a counted
character device; and a sandbox of the original's with unknown keys, saved while a detach was
pending.
"""

from __future__ import annotations

OWN = b"""
{"Pyblock": {"Version": 1, "Sandbox": "s1", "Offsets": {}}, "Devices": [{"ID": "virtio-scsi", "Type": "block", "RefCount": 2,
"AttachCount": 2, "DevType": "b", "Major": 0, "Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/virtio-scsi", "Format": "raw", "ID": "drive-virtio-scsi", "Index": 0, "MmioAddr": "",
"PCIPath": "", "SCSIAddr": "0:0", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false, "ReadOnly": false, "Pyblock":
{"Driver": "virtio-scsi", "Ordinal": 0, "Serial": "virtio-scsi", "GuestMatch": "/0:0:0:0/"}}, "Pyblock": {"Phase": "attached",
"Path": "/run/images/virtio-scsi", "Driver": "virtio-scsi", "Serial": "virtio-scsi", "Identity": ["file", 65024, 9980099]}},
{"ID": "virtio-blk", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": 0, "Minor": 0, "DriverOptions":
{"block-driver": "virtio-blk"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/virtio-blk", "Format": "raw", "ID":
"drive-virtio-blk", "Index": 1, "MmioAddr": "", "PCIPath": "02/00", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vda",
"DevNo": "", "Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 0, "Serial": "virtio-blk",
"GuestMatch": "0000:00:02.0/0000:01:00.0", "Slot": "0"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/virtio-blk",
"Driver": "virtio-blk", "Serial": "virtio-blk", "Identity": ["file", 65024, 9980115]}}, {"ID": "virtio-blk-ccw", "Type": "block",
"RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": 0, "Minor": 0, "DriverOptions": {"block-driver": "virtio-blk-ccw"},
"ColdPlug": false, "BlockDrive": {"File": "/run/images/virtio-blk-ccw", "Format": "raw", "ID": "drive-virtio-blk-ccw", "Index": 2,
"MmioAddr": "", "PCIPath": "", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vdb", "DevNo": "fe.0.0002", "Pmem": false,
"ReadOnly": false, "Pyblock": {"Driver": "virtio-blk-ccw", "Ordinal": 1, "Serial": "virtio-blk-ccw", "GuestMatch": "/0.0.0002/"}},
"Pyblock": {"Phase": "attached", "Path": "/run/images/virtio-blk-ccw", "Driver": "virtio-blk-ccw", "Serial": "virtio-blk-ccw",
"Identity": ["file", 65024, 9980353]}}, {"ID": "virtio-mmio", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b",
"Major": 0, "Minor": 0, "DriverOptions": {"block-driver": "virtio-mmio"}, "ColdPlug": false, "BlockDrive": {"File":
"/run/images/virtio-mmio", "Format": "raw", "ID": "drive-virtio-mmio", "Index": 3, "MmioAddr": "", "PCIPath": "", "SCSIAddr": "",
"NvdimmID": "", "VirtPath": "/dev/vdd", "DevNo": "", "Pmem": false, "ReadOnly": true, "Pyblock": {"Driver": "virtio-mmio",
"Ordinal": 2, "Offset": 1, "GuestMatch": "/vdd"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/virtio-mmio", "Driver":
"virtio-mmio", "ReadOnly": true, "Identity": ["file", 65024, 9980377]}}, {"ID": "nvdimm", "Type": "block", "RefCount": 1,
"AttachCount": 1, "DevType": "b", "Major": 0, "Minor": 0, "DriverOptions": {"block-driver": "nvdimm"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/nvdimm", "Format": "raw", "ID": "drive-nvdimm", "Index": 4, "MmioAddr": "", "PCIPath": "",
"SCSIAddr": "", "NvdimmID": "drive-nvdimm", "VirtPath": "", "DevNo": "", "Pmem": true, "ReadOnly": false, "Pyblock": {"Driver":
"nvdimm", "Ordinal": 0, "GuestMatch": "/region0/"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/nvdimm", "Driver":
"nvdimm", "Identity": ["file", 65024, 9980378]}}, {"ID": "shared", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType":
"b", "Major": 0, "Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive": {"File":
"/run/images/shared", "Format": "raw", "ID": "drive-shared", "Index": 5, "MmioAddr": "", "PCIPath": "", "SCSIAddr": "0:5",
"NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false, "ShareRW": true, "ReadOnly": false, "Pyblock": {"Driver":
"virtio-scsi", "Ordinal": 1, "Serial": "shared", "GuestMatch": "/0:0:0:5/"}}, "Pyblock": {"Phase": "attached", "Path":
"/run/images/shared", "Driver": "virtio-scsi", "Serial": "shared", "Share": true, "Identity": ["file", 65024, 9980379]}}, {"ID":
"ext4", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": 0, "Minor": 0, "DriverOptions": {"fstype":
"ext4", "other": "kept", "block-driver": "virtio-scsi"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/ext4", "Format":
"ext4", "ID": "drive-ext4", "Index": 6, "MmioAddr": "", "PCIPath": "", "SCSIAddr": "0:6", "NvdimmID": "", "VirtPath": "", "DevNo":
"", "Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 2, "Serial": "ext4", "GuestMatch":
"/0:0:0:6/"}}, "Pyblock": {"Phase": "attached", "Path": "/run/images/ext4", "Driver": "virtio-scsi", "Serial": "ext4", "Identity":
["file", 65024, 9980380]}}, {"ID": "dp", "Type": "block", "RefCount": 1, "AttachCount": 1, "DevType": "b", "Major": 0, "Minor": 0,
"DriverOptions": {"block-driver": "virtio-blk"}, "ColdPlug": false, "BlockDrive": {"File": "/run/images/dp", "Format": "raw",
"ID": "drive-dp", "Index": 7, "MmioAddr": "", "PCIPath": "02/01", "SCSIAddr": "", "NvdimmID": "", "VirtPath": "/dev/vdd", "DevNo":
"", "Pmem": false, "ReadOnly": false, "Pyblock": {"Driver": "virtio-blk", "Ordinal": 3, "Serial": "dp", "GuestMatch":
"0000:00:02.0/0000:01:01.0", "Slot": "1"}}, "Pyblock": {"Phase": "detach-pending", "Path": "/run/images/dp", "Driver":
"virtio-blk", "Serial": "dp", "Identity": ["file", 65024, 9980382]}}, {"ID": "fuse", "Type": "generic", "RefCount": 1,
"AttachCount": 1, "DevType": "c", "Major": 10, "Minor": 229, "DriverOptions": {}, "ColdPlug": false}], "HypervisorState":
{"BlockIndexMap": {"0": {}, "1": {}, "2": {}, "3": {}, "4": {}, "5": {}, "6": {}, "7": {}}}}
"""  # noqa: E501

KATA = b"""
{"Pyblock": {"Version": 1, "Sandbox": "s1", "Offsets": {}}, "Devices": [{"ID": "0000000000000000", "Type": "block", "RefCount": 1,
"AttachCount": 1, "DevType": "b", "Major": 8, "Minor": 0, "DriverOptions": {"block-driver": "virtio-scsi"}, "ColdPlug": false,
"BlockDrive": {"File": "/run/images/0", "Format": "raw", "ID": "drive-0000000000000000", "Index": 0, "MmioAddr": "", "SCSIAddr":
"0:0", "NvdimmID": "", "VirtPath": "", "DevNo": "", "Pmem": false, "Pyblock": {"Driver": "virtio-scsi", "Ordinal": 0}, "Swap":
true, "Deep": {"a": [1, {"b": null}]}}, "Pyblock": {"Phase": "detach-pending", "Path": "/run/images/0", "Driver": "virtio-scsi"},
"NewKey": [1, 2], "VhostUserDev": {"Type": "x"}}], "HypervisorState": {"BlockIndexMap": {"0": {"since": 1}}, "Type": "qemu",
"UUID": "5f1e", "Pid": 4711, "HotpluggedCPUs": [{"ID": "cpu-2"}]}, "PersistVersion": 2, "State": "running", "Network":
{"NetworkID": ""}, "Agent": {"URL": "vsock://3"}}
"""  # noqa: E501
