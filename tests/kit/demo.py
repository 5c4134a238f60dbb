"""`make demo`: the main job on a real guest, with what pyblock predicted beside what the guest
says.

Each disk is plugged in after the guest has seen the one before, so that its name can be predicted;
addresses hold whatever the order.
"""

from __future__ import annotations

import subprocess
import sys

from pyblock import BlockDevice, VmmRefused, blocking
from pyblock.cli import show
from pyblock.store.sqlite.store import SqliteStore

from .guest import GuestDisk
from .initramfs import KitMissing
from .machine import Machine

PLAN = (("virtio-scsi", 3), ("virtio-blk", 3), ("nvdimm", 1))
MIB = 1 << 20


def main() -> int:
    try:
        machine = Machine(ports=4, nvdimm_slots=1)
    except KitMissing as missing:
        print(
            f"No real guest here: {missing}. The same job on the in-memory VMM instead:", flush=True
        )
        return subprocess.call([sys.executable, "-m", "pyblock", "demo"])
    print("Booting the test guest (QEMU without acceleration, a few seconds)…", flush=True)
    # A store of its own, which goes with the machine: the host's would remember the nvdimm that
    # QEMU does not let go of.
    store = SqliteStore(machine.folder / "state.db")
    with machine, blocking.Sandbox("demo", f"qemu:{machine.qmp_path}", store=store) as sandbox:
        before = set(machine.guest.disks())
        plugged: list[BlockDevice] = []
        for driver, count in PLAN:
            for number in range(count):
                size = 128 * MIB if driver == "nvdimm" else (len(plugged) + 1) * MIB
                image = machine.image(f"{driver}-{number}.img", size)
                plugged.append(sandbox.attach(image, driver=driver, read_only=number == 2))
                machine.guest.wait_for_disks(len(before) + len(plugged))
        good = compare(plugged, machine.guest.disks())
        good &= unplug(sandbox, plugged)
        print(
            "\nIn the guest now:",
            ", ".join(sorted(set(machine.guest.disks()) - before)) or "nothing",
        )
        good &= left_in_qemu(
            machine,
            {device.held.id for device in sandbox.devices if isinstance(device, BlockDevice)},
        )
    print(
        "The machine is ended, its folder removed."
        if not machine.folder.exists()
        else f"LEFT BEHIND: {machine.folder}"
    )
    good &= not machine.folder.exists()
    print("Nothing is left." if good else "Something did not match.")
    return 0 if good else 1


def compare(plugged: list[BlockDevice], disks: dict[str, GuestDisk]) -> bool:
    """Prints the table; True when every row matches."""
    rows: list[list[str]] = []
    good = True
    for device in plugged:
        drive = device.held
        seen = [
            disk for disk in disks.values() if drive.guest_match and drive.guest_match in disk.link
        ]
        size = device.info.path and _size(device.info.path)
        match = (
            len(seen) == 1
            and f"/dev/{seen[0].name}" == drive.predicted_name
            and seen[0].size_bytes == size
            and seen[0].serial == (drive.serial or "")
            and seen[0].read_only == drive.read_only
        )
        good &= match
        disk = seen[0] if seen else None
        rows.append(
            [
                drive.driver,
                str(drive.index),
                drive.predicted_name or "?",
                f"/dev/{disk.name}" if disk else "-",
                drive.guest_match or "",
                disk.link.removeprefix("/sys/devices/") if disk else "-",
                f"{disk.size_bytes // MIB} MiB" if disk else "-",
                (disk.serial or "-") if disk else "-",
                "yes" if match else "NO",
            ]
        )
    columns = [
        "driver",
        "index",
        "predicted",
        "guest",
        "guest_match",
        "link in the guest's /sys/devices",
        "size",
        "serial",
        "match",
    ]
    print("predicted by pyblock, and what the guest reports:")
    show.table(columns, rows)
    return good


def unplug(sandbox: blocking.Sandbox, plugged: list[BlockDevice]) -> bool:
    """Detaches all; True when only what QEMU itself cannot unplug stays."""
    good = True
    for device in plugged:
        driver = device.held.driver
        try:
            sandbox.detach(device, timeout=30)
        except VmmRefused as refusal:
            print(f"{driver}: {refusal} It stays until the machine ends.")
            good &= driver == "nvdimm"
    print(
        f"Detached the others: {len(sandbox.devices)} device known, {len(sandbox.index)} index "
        "taken."
    )
    return good


def left_in_qemu(machine: Machine, expected: set[str]) -> bool:
    """Prints what QEMU's own lists still hold, asked past pyblock; True when that is just what is
    expected."""
    nodes = [
        node["node-name"]
        for node in machine.side.command("query-named-block-nodes")
        if node["node-name"].startswith("drive-")
    ]
    devices = [
        entry["name"]
        for entry in machine.side.command("qom-list", path="/machine/peripheral")
        if entry["name"].startswith("drive-")
    ]
    print("In QEMU's lists now:", ", ".join([*nodes, *devices]) or "nothing")
    return not nodes and set(devices) == expected


def _size(path: str) -> int:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.seek(0, 2)


if __name__ == "__main__":
    sys.exit(main())
