"""The kit proves itself, without pyblock: what raw QMP plugs in, the guest's own sysfs shows; and
no QEMU outlives its test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit import GuestDisk, GuestError, Machine, QmpRefused
from kit.fixtures import started

MiB = 1 << 20


def blockdev(machine: Machine, node: str, size: int, read_only: bool = False) -> None:
    file = {"driver": "file", "filename": str(machine.image(node, size))}
    machine.side.command(
        "blockdev-add", {"driver": "raw", "node-name": node, "read-only": read_only, "file": file}
    )


def plug_blk(machine: Machine, name: str, bus: str, **more: str) -> None:
    machine.side.command(
        "device_add",
        {"driver": "virtio-blk-pci", "id": name, "drive": name, "bus": bus, "addr": "0", **more},
    )


def unplug(machine: Machine, name: str) -> None:
    machine.side.command("device_del", id=name)
    machine.side.wait_event("DEVICE_DELETED", device=name)
    machine.side.command("blockdev-del", {"node-name": name})


def test_every_kind_of_disk_appears_and_leaves(guest_machine: Machine) -> None:
    machine, guest = guest_machine, guest_machine.guest
    assert guest.disks() == {}

    blockdev(machine, "scsi", 3 * MiB)
    scsi = {
        "driver": "scsi-hd",
        "id": "scsi",
        "drive": "scsi",
        "bus": "scsi0.0",
        "scsi-id": 7,
        "lun": 9,
        "serial": "ten\tbytes!",
    }
    machine.side.command("device_add", scsi)
    sda = guest.wait_for_disks({"sda"})["sda"]
    controller = "/sys/devices/pci0000:00/0000:00:01.0/virtio0/host0"
    assert sda == GuestDisk(
        "sda", f"{controller}/target0:0:7/0:0:7:9/block/sda", 3 * MiB, "ten\tbytes!", False
    )

    blockdev(machine, "blk", 5 * MiB, read_only=True)
    plug_blk(machine, "blk", "rp1", serial="serial-of-20-bytes..")
    vda = guest.wait_for_disks({"sda", "vda"})["vda"]
    port = "/sys/devices/pci0000:00/0000:00:03.0/0000:02:00.0"
    assert vda == GuestDisk(
        "vda", f"{port}/virtio1/block/vda", 5 * MiB, "serial-of-20-bytes..", True
    )

    memory = {
        "qom-type": "memory-backend-file",
        "id": "memory",
        "mem-path": str(machine.image("pmem", 16 * MiB)),
    }
    machine.side.command("object-add", {**memory, "size": 16 * MiB, "share": True})
    machine.side.command("device_add", driver="nvdimm", id="nv", memdev="memory")
    pmem0 = guest.wait_for_disks({"sda", "vda", "pmem0"})["pmem0"]
    # below LNXSYSTM:00 or, from Linux 7 on, below platform
    bus = pmem0.link.partition("/ACPI0012:00/")[0] + "/ACPI0012:00/ndbus0"
    assert pmem0 == GuestDisk(
        "pmem0", f"{bus}/region0/namespace0.0/block/pmem0", 16 * MiB, "", False
    )

    unplug(machine, "scsi")
    guest.wait_for_disks({"vda", "pmem0"})
    unplug(machine, "blk")
    guest.wait_for_disks({"pmem0"})
    with pytest.raises(QmpRefused, match="nvdimm device hot unplug is not supported yet"):
        machine.side.command("device_del", id="nv")


@pytest.mark.parametrize(("kind", "bus"), [("q35", "rp0"), ("pc", "br0")])
def test_a_guest_that_does_not_listen_lets_go_later(
    start_machine: Callable[..., Machine], kind: str, bus: str
) -> None:
    machine = start_machine(kind)
    blockdev(machine, "blk", MiB)
    plug_blk(machine, "blk", bus)
    machine.guest.wait_for_disks({"vda"})
    machine.guest.ignore_pci()
    machine.side.command("device_del", id="blk")
    with pytest.raises(TimeoutError):
        machine.side.wait_event("DEVICE_DELETED", timeout=1, device="blk")
    assert machine.guest.disks().keys() == {"vda"}
    machine.guest.heed_pci()
    machine.side.wait_event("DEVICE_DELETED", device="blk")
    machine.guest.wait_for_disks(0)


def test_sixty_disks_are_listed_at_once(guest_machine: Machine) -> None:
    for number in range(60):
        node = {"driver": "null-co", "node-name": f"n{number}", "size": MiB, "read-zeroes": True}
        guest_machine.side.command("blockdev-add", node)
        disk = {
            "driver": "scsi-hd",
            "id": f"n{number}",
            "drive": f"n{number}",
            "scsi-id": number // 8,
            "lun": number % 8,
        }
        guest_machine.side.command(
            "device_add", {**disk, "bus": "scsi0.0", "serial": f"serial-{number}"}
        )
    # Sizes are not waited for: under load this kernel now and then keeps one disk at 0 when they
    # arrive in one burst.
    disks = guest_machine.guest.wait_for_disks(
        lambda disks: len(disks) == 60 and all(disk.serial for disk in disks.values()), 60
    )
    assert {(disk.serial, disk.link.split("/")[-3]) for disk in disks.values()} == {
        (f"serial-{number}", f"0:0:{number // 8}:{number % 8}") for number in range(60)
    }


def test_the_agent_passes_any_byte_and_survives_nonsense(guest_machine: Machine) -> None:
    guest = guest_machine.guest
    octal = "".join(f"\\{byte:03o}" for byte in range(256))
    assert guest.run_bytes(f"printf '{octal}'") == bytes(range(256))
    guest._socket.sendall(bytes(range(256)) + b"\n1 2 3\nhalf a line")
    assert guest.run('echo "ü \' $((1 + 1))"; echo two >&2') == "ü ' 2\ntwo\n"
    with pytest.raises(GuestError, match="ended with 3: said"):
        guest.run("echo said; exit 3")
    with pytest.raises(TimeoutError):
        guest.run("sleep 1; echo late", timeout=0.2)
    assert guest.run("echo after") == "after\n"


def test_nothing_is_left_of_a_closed_machine() -> None:
    with started("pc", guest=False) as machine:
        assert machine.side.command("query-status")["status"] == "prelaunch"
    with pytest.raises(ProcessLookupError):
        os.kill(machine.pid, 0)
    assert not machine.folder.exists()


def test_qemu_lives_on_when_its_thread_ends(start_machine: Callable[..., Machine]) -> None:
    with ThreadPoolExecutor(1) as pool:  # unlike a bare thread it passes a skip on
        thread = Path("/proc/self/task", str(pool.submit(threading.get_native_id).result()))
        machine = pool.submit(start_machine, guest=False).result()
    while thread.exists():  # when it has gone, the kernel has sent what it sends for that
        time.sleep(0.01)
    assert machine.side.command("query-status")["status"] == "prelaunch"


def test_qemu_dies_with_its_test_process(bare_machine: Machine) -> None:
    program = (
        "from kit import Machine\nwith Machine(guest=False) as machine: print(machine.pid, "
        "flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        qemu = Path("/proc", process.stdout.readline().decode().strip())
        command = (qemu / "cmdline").read_text()
        folder = Path(command.partition("unix:")[2].partition(",")[0]).parent
        assert folder.is_dir()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while folder.exists() or (qemu.exists() and (qemu / "cmdline").read_text()):
        # a zombie without a command line is dead, too
        assert time.monotonic() < deadline
        time.sleep(0.02)
