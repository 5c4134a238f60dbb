"""What befalls a real QEMU and its guest while disks come and go, and what is known after it:
killed, stopped, cut off, deaf, and worn.

Faults at each QMP command are in tests/real/test_qmp_faults.py, deaths of our own process in
test_kill.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from kit import Machine
from kit.proxy import Fault, Proxy
from support.snapshot import MakeStore

from pyblock import (
    AttachPending,
    BlockDevice,
    DeadlinePassed,
    DetachPending,
    MachineAnswers,
    Phase,
    PyblockError,
    Sandbox,
    TransportError,
)
from pyblock.life.recovery import Found, Outcome

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

Start = Callable[..., Machine]

TIMEOUT = 60.0
SOON = 0.3  # seconds: a deadline that is meant to pass
MIB = 1 << 20


def ours(machine: Machine) -> tuple[set[str], set[str]]:
    """The IDs of our devices and block nodes, as QEMU lists them."""
    devices = {
        entry["name"] for entry in machine.side.command("qom-list", path="/machine/peripheral")
    }
    nodes = {
        node["node-name"] for node in machine.side.command("query-named-block-nodes", flat=True)
    }
    return {name for name in devices if name.startswith("drive-")}, {
        name for name in nodes if name.startswith("drive-")
    }


def facts(device: BlockDevice) -> tuple[object, ...]:
    """What a quarantined device keeps."""
    drive = device.held
    return (
        device.id,
        device.phase,
        device.attach_count,
        drive.id,
        drive.index,
        drive.ordinal,
        drive.place,
        drive.pci_path,
    )


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("command", ["blockdev-add", "device_add", "device_del", "blockdev-del"])
async def test_qemu_is_killed(
    bare_machine: Machine, make_store: MakeStore, command: str, tmp_path: Path
) -> None:
    """At each of the four commands of an attach and a detach: nothing is guessed, the image stays
    claimed, and `forget` gives it free."""
    kept, image = bare_machine.image("kept"), tmp_path / "image"  # one that outlives the machine
    image.write_bytes(bytes(MIB))
    path = bare_machine.folder / "proxy"
    async with (
        Proxy(path, bare_machine.qmp_path) as proxy,
        Sandbox("one", f"qemu:{path}", store=make_store()) as sandbox,
    ):
        await sandbox.attach(kept)
        if command in ("device_del", "blockdev-del"):
            device = await sandbox.attach(image)
            proxy.expect(Fault.HOLD, command)
            task: asyncio.Task[object] = asyncio.create_task(sandbox.detach(device))
        else:
            proxy.expect(Fault.HOLD, command)
            task = asyncio.create_task(sandbox.attach(image))
        await asyncio.wait_for(proxy.held.wait(), TIMEOUT)
        bare_machine.kill()
        proxy.let_go.set()
        with pytest.raises((AttachPending, DetachPending)):
            await task
        assert len(sandbox.devices) == 2 and list(sandbox.index) == [0, 1]
        with pytest.raises(TransportError):
            await sandbox.attach(image, timeout=TIMEOUT)
        assert len(sandbox.devices) == 2
    # The proxy's socket is gone, as a dead QEMU's own is refused. Another process finds all as it
    # was.
    async with Sandbox("one", f"qemu:{path}", store=make_store()) as sandbox:
        assert len(sandbox.devices) == 2 and list(sandbox.index) == [0, 1] and not sandbox.recovered
        assert {device.phase for device in sandbox.devices if isinstance(device, BlockDevice)} > {
            Phase.ATTACHED
        }
        async with Sandbox("two", "memory:", store=make_store()) as other:
            with pytest.raises(PyblockError, match="'one'"):
                await other.attach(image)
            assert len(await sandbox.forget()) == 2
            assert not sandbox.devices and not len(sandbox.index)
            await other.attach(image)


async def test_a_dead_qemu_behind_its_socket_is_gone(
    bare_machine: Machine, make_store: MakeStore
) -> None:
    """QEMU leaves its socket's file behind when it is killed; one that is stopped still listens,
    and is not gone."""
    async with Sandbox("one", f"qemu:{bare_machine.qmp_path}", store=make_store()) as sandbox:
        await sandbox.attach(bare_machine.image("disk"))
        with pytest.raises(MachineAnswers):
            await sandbox.forget()
        os.kill(bare_machine.pid, signal.SIGSTOP)
        try:
            with pytest.raises(MachineAnswers):
                await sandbox.forget()
        finally:
            os.kill(bare_machine.pid, signal.SIGCONT)
        bare_machine.kill()
        assert bare_machine.qmp_path.exists()
        assert len(await sandbox.forget()) == 1


async def test_a_stopped_qemu(guest_machine: Machine, make_store: MakeStore) -> None:
    """Stopped for longer than the deadline, then going on: the attach undoes itself, the detach
    finishes, without another call."""
    machine = guest_machine
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=make_store()) as sandbox:
        device = await sandbox.attach(machine.image("disk"), driver="virtio-blk")
        await asyncio.to_thread(machine.guest.wait_for_disks, 1, TIMEOUT)
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            with pytest.raises(AttachPending):
                await sandbox.attach(machine.image("late"), timeout=SOON)
            with pytest.raises(DetachPending):
                await sandbox.detach(device, timeout=SOON)
            assert len(sandbox.devices) == 2 and list(sandbox.index) == [0, 1]
            async with Sandbox("two", "memory:", store=make_store()) as other:
                for name in ("disk", "late"):
                    with pytest.raises(PyblockError, match="'one'"):
                        await other.attach(machine.folder / name)
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        await until(lambda: not sandbox.devices)
        assert not len(sandbox.index) and ours(machine) == (set(), set())
        await asyncio.to_thread(machine.guest.wait_for_disks, 0, TIMEOUT)
        await sandbox.detach(device)  # safe, and quiet


async def test_a_stopped_qemu_and_a_restart(guest_machine: Machine, make_store: MakeStore) -> None:
    """The process that gave up on a stopped QEMU ends; the next one cannot ask it either, changes
    nothing, and settles it afterwards."""
    machine = guest_machine
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=make_store()) as sandbox:
        kept = await sandbox.attach(machine.image("kept"))
        device = await sandbox.attach(machine.image("disk"), driver="virtio-blk")
        await asyncio.to_thread(machine.guest.wait_for_disks, 2, TIMEOUT)
        os.kill(machine.pid, signal.SIGSTOP)
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=SOON)
        before = [facts(kept), (*facts(device)[:1], Phase.DETACH_PENDING, *facts(device)[2:])]
    try:
        store = make_store()
        async with Sandbox(
            "one", f"qemu:{machine.qmp_path}", store=store, recover=False
        ) as sandbox:
            assert [
                facts(each) for each in sandbox.devices if isinstance(each, BlockDevice)
            ] == before
            with pytest.raises(DeadlinePassed):
                await sandbox.detach(device.id, timeout=SOON)
            assert [
                facts(each) for each in sandbox.devices if isinstance(each, BlockDevice)
            ] == before
    finally:
        os.kill(machine.pid, signal.SIGCONT)
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=make_store()) as sandbox:
        assert [(one.device_id, one.found) for one in sandbox.recovered] == [
            (device.id, Found.DETACH)
        ]
        await until(lambda: len(sandbox.devices) == 1)
        assert ours(machine) == ({kept.held.id}, {kept.held.id})
        await asyncio.to_thread(machine.guest.wait_for_disks, 1, TIMEOUT)


async def test_a_socket_that_is_closed(guest_machine: Machine, make_store: MakeStore) -> None:
    """The monitor goes away while a removal is awaited, and comes back: asking finds what no event
    told."""
    machine = guest_machine
    path = machine.folder / "proxy"
    async with Sandbox("one", f"qemu:{path}", driver="virtio-blk", store=make_store()) as sandbox:
        async with Proxy(path, machine.qmp_path) as proxy:
            device = await sandbox.attach(machine.image("disk"))
            await asyncio.to_thread(machine.guest.wait_for_disks, 1, TIMEOUT)
            machine.guest.ignore_pci()
            task = asyncio.create_task(sandbox.detach(device, timeout=TIMEOUT))
            await until(lambda: "device_del" in proxy.answered)
            assert not task.done()
        with pytest.raises(DetachPending):
            await task
        with pytest.raises(TransportError):
            await sandbox.reconcile()
        assert device.phase is Phase.DETACH_PENDING and list(sandbox.index) == [0]
        machine.guest.heed_pci()
        await until(lambda: not ours(machine)[0])  # it left, and nobody was there to hear it
        async with Proxy(path, machine.qmp_path):
            assert [(one.found, one.outcome) for one in await sandbox.reconcile()] == [
                (Found.DETACH, Outcome.REMOVED)
            ]
            assert (
                not sandbox.devices and not len(sandbox.index) and ours(machine) == (set(), set())
            )
            await sandbox.detach(device)


async def test_a_deaf_guest_and_a_restart(start_machine: Start, make_store: MakeStore) -> None:
    """A guest without hot-plug for now: the quarantine outlives the process, keeps the slot, and a
    late confirmation ends it by itself."""
    machine = start_machine(ports=2)
    address = f"qemu:{machine.qmp_path}"
    async with Sandbox("one", address, driver="virtio-blk", store=make_store()) as sandbox:
        device = await sandbox.attach(machine.image("disk"))
        await asyncio.to_thread(machine.guest.wait_for_disks, 1, TIMEOUT)
        machine.guest.ignore_pci()
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=SOON)
        before = facts(device)[2:]
    spare = machine.image("other")
    for _ in range(2):
        async with Sandbox("one", address, driver="virtio-blk", store=make_store()) as sandbox:
            assert [(one.found, one.outcome) for one in sandbox.recovered] == [
                (Found.DETACH, Outcome.PENDING)
            ]
            again = sandbox.manager.find(device.id)
            assert isinstance(again, BlockDevice) and facts(again)[2:] == before
            other = await sandbox.attach(spare)
            assert other.held.index == 1 and other.held.place != again.held.place
            with pytest.raises(DetachPending):
                await sandbox.detach(again.id, timeout=SOON)
            async with Sandbox("two", "memory:", store=make_store()) as third:
                with pytest.raises(PyblockError, match="'one'"):
                    await third.attach(machine.folder / "disk")
    async with Sandbox("one", address, driver="virtio-blk", store=make_store()) as sandbox:
        machine.guest.heed_pci()
        await until(lambda: device.id not in sandbox.manager)
        assert 0 not in sandbox.index
        await sandbox.detach(device.id)  # safe, and quiet
        for left in sandbox.devices:
            for _ in range(left.attach_count):
                await sandbox.detach(left, timeout=TIMEOUT)
        assert ours(machine) == (set(), set())


async def test_a_guest_that_never_hot_plugs(start_machine: Start, make_store: MakeStore) -> None:
    machine = start_machine(ports=1, kernel_arguments="acpiphp.disable=1 pcie_ports=compat")
    async with Sandbox(
        "one", f"qemu:{machine.qmp_path}", driver="virtio-blk", store=make_store()
    ) as sandbox:
        device = await sandbox.attach(machine.image("disk"))
        for _ in range(2):
            with pytest.raises(DetachPending):
                await sandbox.detach(device, timeout=SOON)
        assert list(sandbox.index) == [0]
    async with Sandbox(
        "one", f"qemu:{machine.qmp_path}", driver="virtio-blk", store=make_store()
    ) as sandbox:
        assert [one.outcome for one in sandbox.recovered] == [Outcome.PENDING]
        machine.kill()
        assert await sandbox.forget() == [device.id]


async def test_an_orphan_and_a_lost_disk(guest_machine: Machine, make_store: MakeStore) -> None:
    """Somebody else unplugs one of our disks, and leaves one that is named as ours."""
    machine = guest_machine
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=make_store()) as sandbox:
        kept, lost = [await sandbox.attach(machine.image(name)) for name in ("kept", "lost")]
        machine.side.command("device_del", id=lost.held.id)
        await until(lambda: lost.held.id not in ours(machine)[0])
        node = {
            "driver": "raw",
            "node-name": "drive-orphan",
            "file": {"driver": "file", "filename": str(machine.image("orphan"))},
        }
        machine.side.command("blockdev-add", node)
        machine.side.command(
            "device_add",
            {
                "driver": "scsi-hd",
                "id": "drive-orphan",
                "drive": "drive-orphan",
                "bus": "scsi0.0",
                "lun": 7,
            },
        )
        lost_id = lost.held.id
        dry = {
            (one.drive_id, one.found, one.outcome) for one in await sandbox.reconcile(dry_run=True)
        }
        assert dry == {
            (lost_id, Found.LOST, Outcome.LEFT),
            ("drive-orphan", Found.ORPHAN, Outcome.LEFT),
        }
        assert len(sandbox.devices) == 2 and lost_id in ours(machine)[1]
        real = {(one.drive_id, one.found, one.outcome) for one in await sandbox.reconcile()}
        assert real == {
            (lost_id, Found.LOST, Outcome.REMOVED),
            ("drive-orphan", Found.ORPHAN, Outcome.LEFT),
        }
        # 7: where the orphan sits
        assert sandbox.devices == [kept] and list(sandbox.index) == [0, 7]
        assert [(one.drive_id, one.outcome) for one in await sandbox.reconcile(orphans=True)] == [
            ("drive-orphan", Outcome.REMOVED)
        ]
        assert ours(machine) == ({kept.held.id}, {kept.held.id})


async def test_a_machine_that_was_started_anew(
    start_machine: Start, make_store: MakeStore, tmp_path: Path
) -> None:
    """The same address, another QEMU: nothing is believed to be attached that is not."""
    images = [tmp_path / name for name in "abc"]
    for image in images:
        image.write_bytes(bytes(MIB))
    link = tmp_path / "qmp"  # what a proxy is to a socket, for two machines one after the other
    first, second = (start_machine(guest=False) for _ in range(2))
    async with (
        Proxy(link, first.qmp_path),
        Sandbox("one", f"qemu:{link}", store=make_store()) as sandbox,
    ):
        await sandbox.attach_many(images)
    first.kill()
    async with (
        Proxy(link, second.qmp_path),
        Sandbox("one", f"qemu:{link}", store=make_store()) as sandbox,
    ):
        assert [(one.found, one.outcome) for one in sandbox.recovered] == [
            (Found.LOST, Outcome.FREED)
        ] * 3
        assert not sandbox.devices and not len(sandbox.index)
        assert [device.held.index for device in await sandbox.attach_many(images)] == [0, 1, 2]


async def test_two_machines_share_an_image_on_purpose(
    start_machine: Start, make_store: MakeStore, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    one, two = (start_machine(guest=False) for _ in range(2))
    async with (
        Sandbox("one", f"qemu:{one.qmp_path}", store=make_store()) as first,
        Sandbox("two", f"qemu:{two.qmp_path}", store=make_store()) as second,
    ):
        for driver in ("virtio-scsi", "virtio-blk"):
            device = await first.attach(image, driver=driver, share=True)
            with pytest.raises(PyblockError, match="'one'"):
                await second.attach(image, driver=driver)
            await second.attach(image, driver=driver, share=True)
            assert ours(one)[0] and ours(two)[0]
            if driver == "virtio-scsi":  # without a guest, QEMU confirms the removal of these only
                await first.detach(device)
                await second.detach_many(second.devices)


async def test_a_thousand_cycles_of_one_disk(guest_machine: Machine, make_store: MakeStore) -> None:
    machine = guest_machine
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=make_store()) as sandbox:
        image = machine.image("disk")
        for _ in range(1000):
            device = await sandbox.attach(image, timeout=TIMEOUT)
            assert device.held.index == 0
            await sandbox.detach(device, timeout=TIMEOUT)
        await asyncio.to_thread(machine.guest.wait_for_disks, 0, TIMEOUT)
        last = await sandbox.attach(image)
        [disk] = (await asyncio.to_thread(machine.guest.wait_for_disks, 1, TIMEOUT)).values()
        assert (
            last.held.guest_match is not None
            and last.held.guest_match in disk.link
            and disk.serial == last.id
        )
        assert ours(machine) == ({last.held.id}, {last.held.id})


async def test_two_hundred_cycles_of_sixty_disks(
    guest_machine: Machine, make_store: MakeStore
) -> None:
    machine = guest_machine
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=make_store()) as sandbox:
        images = [machine.image(f"disk{number}", MIB) for number in range(60)]
        for _ in range(200):
            devices = await sandbox.attach_many(images, timeout=TIMEOUT)
            assert [device.held.index for device in devices] == [*range(60)]
            await sandbox.detach_many(devices, timeout=TIMEOUT)
        await asyncio.to_thread(machine.guest.wait_for_disks, 0, TIMEOUT)
        assert not sandbox.devices and not len(sandbox.index) and ours(machine) == (set(), set())
        one = await sandbox.attach(images[0])
        # After 12,000 plugs the guest may still be working off old events: a disk that left is
        # shown for a moment once more.
        only = lambda disks: [disk.serial for disk in disks.values()] == [one.id]  # noqa: E731
        await asyncio.to_thread(machine.guest.wait_for_disks, only, TIMEOUT)
