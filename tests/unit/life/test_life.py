"""The life of a device against the in-memory VMM: counts, deadlines, cancellation, and every fault
at every step.

After each case `consistent` compares what the sandbox holds with what the machine has: the
invariants of docs/design.md.
"""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.turns import LATE, SOON, at_rest, until

import pyblock
from pyblock.disk.drivers import SD, VD
from pyblock.life.allotment import Allotment
from pyblock.life.machine import Machine
from pyblock.life.registry import DeviceManager
from pyblock.life.table import (
    FOLLOWS,
    HOLDING,
    LIFE,
    PENDING,
    Aim,
    Event,
    Failure,
    IllegalEvent,
    Phase,
)
from pyblock.vmm.base import FoundDisk
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio

DRIVERS = list(pyblock.DRIVERS)
ATTACH_STEPS = ("backend-add", "device-add")
DETACH_STEPS = ("device-del", "device-gone", "backend-del")


@pytest.fixture
def image(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(1 << 20)
        return path

    return make


Make = Callable[[str], Path]


def consistent(sandbox: pyblock.Sandbox, vm: MemoryHypervisor) -> None:
    """What every moment between two operations must satisfy."""
    blocks = [device for device in sandbox.devices if isinstance(device, pyblock.BlockDevice)]
    holding = [device for device in blocks if device.phase in HOLDING]
    drives = [device.held for device in holding]
    assert sorted(sandbox.index) == sorted(drive.index for drive in drives)
    assert len({drive.id for drive in drives}) == len(drives)
    assert all(device.drive is None for device in blocks if device.phase is Phase.DETACHED)
    attached = {device.held.id for device in holding if device.phase is Phase.ATTACHED}
    known = {drive.id for drive in drives}
    assert attached <= vm.devices.keys() <= known
    assert attached <= vm.backends.keys() <= known
    for device in blocks:
        assert (device.attach_count > 0) >= (device.phase is Phase.ATTACHED)


def nothing_left(sandbox: pyblock.Sandbox, vm: MemoryHypervisor) -> None:
    consistent(sandbox, vm)
    assert not sandbox.devices
    assert not len(sandbox.index)
    assert not vm.devices
    assert not vm.backends
    assert not sandbox._machine.running


@pytest.mark.parametrize("driver", DRIVERS)
async def test_the_main_job(driver: str, image: Make) -> None:
    vm = MemoryHypervisor()
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        device = await sandbox.attach(image("a"), driver=driver)
        drive = device.held
        assert (drive.index, drive.driver, device.attach_count, device.phase) == (
            0,
            driver,
            1,
            Phase.ATTACHED,
        )
        assert drive.id == f"drive-{device.id}" and vm.backends == {drive.id: str(device.info.path)}
        consistent(sandbox, vm)
        await sandbox.detach(device)
        nothing_left(sandbox, vm)


async def test_names_follow_ordinals_and_addresses_follow_indexes(image: Make) -> None:
    async with pyblock.Sandbox("sb1", "memory:") as sandbox:
        scsi = await sandbox.attach_many([image(f"s{number}") for number in range(20)])
        blk = await sandbox.attach(image("b"), driver="virtio-blk")
        mmio = await sandbox.attach(image("m"), driver="virtio-mmio")
        pmem = await sandbox.attach(image("p"), driver="nvdimm")
        assert [device.held.scsi_addr for device in scsi] == [f"0:{number}" for number in range(20)]
        assert [device.held.virt_path for device in scsi] == [None] * 20
        assert [device.held.predicted_name for device in scsi] == [None] * 20  # they came together
        assert [device.held.guess for device in scsi] == [
            f"/dev/sd{letter}" for letter in "abcdefghijklmnopqrst"
        ]
        assert (blk.held.index, blk.held.virt_path, blk.held.predicted_name) == (
            20,
            "/dev/vda",
            "/dev/vda",
        )
        # ordinal 1 of the family, behind Firecracker's root disk
        assert (mmio.held.index, mmio.held.predicted_name) == (21, "/dev/vdc")
        assert (pmem.held.index, pmem.held.predicted_name, pmem.held.pmem, pmem.held.virt_path) == (
            22,
            "/dev/pmem0",
            True,
            None,
        )


async def test_the_machines_own_disks_are_counted(image: Make) -> None:
    own = (
        FoundDisk("boot", VD),
        FoundDisk("", VD),
        FoundDisk("old", SD, 0),
        FoundDisk("drive-mine", SD, 2),
    )
    vm = MemoryHypervisor(existing=own)
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        blk = await sandbox.attach(image("b"), driver="virtio-blk")
        assert blk.held.predicted_name == "/dev/vdc"
        assert blk.held.index == 1  # 0 and 2 sit at addresses that the machine uses
        with pytest.raises(pyblock.DeviceConflict, match="drive-mine"):
            await sandbox.attach(image("s"), device_id="mine")
        scsi = await sandbox.attach(image("s"))
        assert (scsi.held.scsi_addr, scsi.held.predicted_name) == ("0:3", "/dev/sdc")
        assert (await shifted(vm, image("c"))).held.predicted_name == "/dev/vdf"


async def shifted(vm: MemoryHypervisor, path: Path) -> pyblock.BlockDevice:
    async with pyblock.Sandbox("sb2", vm, block_offset=5) as sandbox:
        return await sandbox.attach(path, driver="virtio-blk")


async def test_the_lowest_index_is_reused(image: Make) -> None:
    async with pyblock.Sandbox("sb1", "memory:") as sandbox:
        devices = await sandbox.attach_many([image(str(number)) for number in range(6)])
        await sandbox.detach_many([devices[1], devices[4]])
        again = await sandbox.attach_many([image("x"), image("y"), image("z")])
        assert [device.held.index for device in again] == [1, 4, 6]


async def test_n_attaches_need_n_detaches(image: Make) -> None:
    vm = MemoryHypervisor()
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        path = image("a")
        devices = [await sandbox.attach(path) for _ in range(3)]
        assert devices[0] is devices[1] is devices[2] and devices[0].attach_count == 3
        for left in (2, 1):
            await sandbox.detach(devices[0])
            assert devices[0].attach_count == left
        assert [step for step, _ in vm.journal] == list(ATTACH_STEPS)
        await sandbox.detach(devices[0].id)
        nothing_left(sandbox, vm)
        with pytest.raises(pyblock.UnknownDevice):
            await sandbox.detach(devices[0].id)


async def test_two_attaches_at_once_plug_once(image: Make) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-add", Fault("hold"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        path = image("a")
        both = [asyncio.create_task(sandbox.attach(path)) for _ in range(2)]
        await until(lambda: ("device-add", next(iter(vm.backends), "")) in vm.journal)
        assert not any(task.done() for task in both)
        vm.let_go("device-add")
        one, other = await asyncio.gather(*both)
        assert one is other and one.attach_count == 2
        assert [step for step, _ in vm.journal] == list(ATTACH_STEPS)


async def test_a_slow_device_does_not_delay_another(image: Make) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-add", Fault("hold"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        slow = asyncio.create_task(sandbox.attach(image("slow")))
        await until(lambda: len(vm.journal) == 2)
        await sandbox.attach(image("quick"))
        assert not slow.done()
        vm.let_go("device-add")
        await slow


@pytest.mark.parametrize("step", ATTACH_STEPS)
@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_refused_attach_leaves_nothing(step: str, driver: str, image: Make) -> None:
    vm = MemoryHypervisor(slots=1)
    vm.fail(step, Fault("refuse"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        with pytest.raises(pyblock.VmmRefused, match=step) as caught:
            await sandbox.attach(image("a"), driver=driver)
        assert caught.value.step == step and caught.value.reply == "told to refuse"
        nothing_left(sandbox, vm)
        assert (await sandbox.attach(image("a"), driver=driver)).held.index == 0


async def test_trouble_in_undoing_is_a_note_and_everything_stays_taken(image: Make) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-add", Fault("refuse"))
    vm.fail("backend-del", Fault("refuse"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        with pytest.raises(pyblock.VmmRefused, match="device-add") as caught:
            await sandbox.attach(image("a"))
        assert any("backend-del" in note for note in caught.value.__notes__)
        consistent(sandbox, vm)
        [device] = sandbox.devices
        assert (
            isinstance(device, pyblock.BlockDevice)
            and device.phase is Phase.ATTACH_PENDING
            and len(sandbox.index) == 1
        )
        await sandbox.detach(device)
        nothing_left(sandbox, vm)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("step", ATTACH_STEPS)
async def test_a_lost_attach_is_quarantined_until_detach_settles_it(
    step: str, done: bool, image: Make
) -> None:
    vm = MemoryHypervisor()
    vm.fail(step, Fault("lose", done=done))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        with pytest.raises(pyblock.AttachPending) as caught:
            await sandbox.attach(image("a"), driver="virtio-blk")
        assert isinstance(caught.value.__cause__, pyblock.ConnectionLost)
        consistent(sandbox, vm)
        [device] = sandbox.devices
        assert isinstance(device, pyblock.BlockDevice) and device.phase is Phase.ATTACH_PENDING
        assert list(sandbox.index) == [0]
        vm.dead = True
        with pytest.raises(pyblock.VmmUnreachable):
            await sandbox.attach(image("b"), driver="virtio-blk")
        assert sandbox.devices == [device] and list(sandbox.index) == [0]  # nobody could be asked
        vm.dead = False
        await sandbox.attach(image("b"), driver="virtio-blk")
        await sandbox.detach(device)
        assert len(sandbox.index) == len(vm.backends) == len(vm.devices) == 1


@pytest.mark.parametrize("step", ATTACH_STEPS)
async def test_an_attach_past_its_deadline_undoes_itself(step: str, image: Make) -> None:
    vm = MemoryHypervisor()
    vm.fail(step, Fault("hold"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        with pytest.raises(pyblock.AttachPending):
            await sandbox.attach(image("a"), timeout=SOON)
        consistent(sandbox, vm)
        assert len(sandbox.index) == 1
        vm.let_go(step)
        await until(lambda: not sandbox.devices)
        nothing_left(sandbox, vm)


@pytest.mark.parametrize("step", [*ATTACH_STEPS, None])
async def test_a_cancelled_attach_is_undone(step: str | None, image: Make) -> None:
    vm = MemoryHypervisor()
    if step:
        vm.fail(step, Fault("hold"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        task = asyncio.create_task(sandbox.attach(image("a")))
        if step:
            await until(lambda: any(one == step for one, _ in vm.journal))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if step:
            vm.let_go(step)
        await until(lambda: not sandbox.devices)
        nothing_left(sandbox, vm)


async def test_cancellation_at_every_turn_of_the_loop(image: Make) -> None:
    """An attach and a detach are cancelled after 0, 1, 2… turns of the event loop, until they
    finish before the cancellation."""
    turns = 0
    outcomes: set[str] = set()
    while turns < 200:
        vm = MemoryHypervisor()
        for step in MemoryHypervisor.STEPS:
            vm.fail(step, Fault("delay"))  # zero seconds: each step gives the loop a turn
        async with pyblock.Sandbox("sb1", vm) as sandbox:
            keep = await sandbox.attach(image("keep"))
            for work in ("attach", "detach"):
                if work == "attach":
                    task: asyncio.Task[object] = asyncio.create_task(sandbox.attach(image("a")))
                else:
                    device = await sandbox.attach(image("a"))
                    task = asyncio.create_task(sandbox.detach(device))
                for _ in range(turns):
                    await asyncio.sleep(0)
                done = task.done()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                outcomes.add(f"{work} {'done' if done else 'cut'}")
                await until(lambda: not sandbox._machine.running)
                consistent(sandbox, vm)
                for left in [one for one in sandbox.devices if one is not keep]:
                    # not cancelled in time, or cancelled before it began
                    await sandbox.detach(left)
                assert sandbox.devices == [keep] and list(sandbox.index) == [0]
        if outcomes >= {"attach done", "detach done"}:
            break
        turns += 1
    assert outcomes == {"attach cut", "attach done", "detach cut", "detach done"}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("step", ["device-del", "device-gone"])
async def test_a_refused_detach_keeps_the_device(step: str, driver: str, image: Make) -> None:
    vm = MemoryHypervisor()
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        device = await sandbox.attach(image("a"), driver=driver)
        before = (device.held.id, device.held.index, device.held.place)
        vm.fail(step, Fault("refuse"))
        with pytest.raises(pyblock.VmmRefused):
            await sandbox.detach(device)
        assert (device.phase, device.attach_count) == (Phase.ATTACHED, 1)
        assert before == (device.held.id, device.held.index, device.held.place)
        consistent(sandbox, vm)
        await sandbox.detach(device)
        nothing_left(sandbox, vm)


async def test_a_backend_that_stays_keeps_everything_taken(image: Make) -> None:
    vm = MemoryHypervisor()
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        device = await sandbox.attach(image("a"))
        vm.fail("backend-del", Fault("refuse"))
        with pytest.raises(pyblock.VmmRefused):
            await sandbox.detach(device)
        assert device.phase is Phase.DETACH_PENDING and list(sandbox.index) == [0]
        consistent(sandbox, vm)
        await sandbox.detach(device)
        nothing_left(sandbox, vm)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("step", DETACH_STEPS)
async def test_a_lost_detach_is_pending_and_a_retry_finishes(
    step: str, done: bool, image: Make
) -> None:
    vm = MemoryHypervisor(slots=1)
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        device = await sandbox.attach(image("a"), driver="virtio-blk")
        vm.fail(step, Fault("lose", done=done))
        with pytest.raises(pyblock.DetachPending):
            await sandbox.detach(device)
        consistent(sandbox, vm)
        assert (
            device.phase is Phase.DETACH_PENDING and list(sandbox.index) == [0] and vm._slots == 1
        )
        await sandbox.detach(device)
        nothing_left(sandbox, vm)


async def test_a_late_confirmation_finishes_the_detach_by_itself(image: Make) -> None:
    vm = MemoryHypervisor(slots=1)
    vm.fail("device-gone", Fault("hold"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        device = await sandbox.attach(image("a"), driver="virtio-blk")
        with pytest.raises(pyblock.DetachPending):
            await sandbox.detach(device, timeout=SOON)
        assert device.attach_count == 1 and list(sandbox.index) == [0]
        with pytest.raises(pyblock.SlotsExhausted):
            await sandbox.attach(image("b"), driver="virtio-blk")
        with pytest.raises(pyblock.DetachPending):
            await sandbox.attach(image("a"), timeout=SOON)
        vm.let_go("device-gone")
        await until(lambda: not sandbox.devices)
        nothing_left(sandbox, vm)
        await sandbox.detach(device)  # calling again is safe
        with pytest.raises(pyblock.UnknownDevice):
            await sandbox.detach(device)


async def test_a_retry_asks_the_guest_again_and_waits(image: Make) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-gone", Fault("hold"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        device = await sandbox.attach(image("a"))
        with pytest.raises(pyblock.DetachPending):
            await sandbox.detach(device, timeout=SOON)
        asked = sum(step == "device-del" for step, _ in vm.journal)
        retry = asyncio.create_task(sandbox.detach(device, timeout=LATE))
        await until(lambda: sum(step == "device-del" for step, _ in vm.journal) == asked + 1)
        assert not retry.done()
        vm.let_go("device-gone")
        await retry
        nothing_left(sandbox, vm)


async def test_a_dead_vmm_changes_nothing(image: Make) -> None:
    vm = MemoryHypervisor()
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        device = await sandbox.attach(image("a"))
        vm.dead = True
        with pytest.raises(pyblock.VmmUnreachable):
            await sandbox.attach(image("b"))
        with pytest.raises(pyblock.VmmUnreachable):
            await sandbox.detach(device)
        assert (device.phase, device.attach_count) == (Phase.ATTACHED, 1)
        consistent(sandbox, vm)
        vm.dead = False
        await sandbox.detach(device)
        nothing_left(sandbox, vm)


async def test_closing_undoes_what_nobody_waits_for(image: Make) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-add", Fault("hold"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        with pytest.raises(pyblock.AttachPending):
            await sandbox.attach(image("a"), timeout=SOON)
        closing = asyncio.create_task(sandbox.close())
        await at_rest()
        assert not closing.done()
        vm.let_go("device-add")
        await closing
    nothing_left(sandbox, vm)


async def test_closing_leaves_a_pending_detach_pending(image: Make) -> None:
    vm = MemoryHypervisor()
    vm.fail("device-gone", Fault("hold"))
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        device = await sandbox.attach(image("a"))
        with pytest.raises(pyblock.DetachPending):
            await sandbox.detach(device, timeout=SOON)
    assert device.phase is Phase.DETACH_PENDING and vm.devices and list(sandbox.index) == [0]


async def test_one_failure_in_a_batch_undoes_the_batch(image: Make) -> None:
    vm = MemoryHypervisor()
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        kept = await sandbox.attach(image("kept"))
        vm.fail("device-add", Fault("delay"))
        vm.fail("device-add", Fault("refuse"))
        with pytest.raises(pyblock.VmmRefused):
            await sandbox.attach_many([image(str(number)) for number in range(5)])
        assert sandbox.devices == [kept] and list(sandbox.index) == [0] and len(vm.devices) == 1
        consistent(sandbox, vm)


async def test_a_batch_may_hold_one_image_twice(image: Make) -> None:
    vm = MemoryHypervisor()
    async with pyblock.Sandbox("sb1", vm) as sandbox:
        one, other = await sandbox.attach_many([image("a"), image("a")])
        assert one is other and one.attach_count == 2 and list(sandbox.index) == [0]
        await sandbox.detach_many([one, one])
        nothing_left(sandbox, vm)


# In which phases an operation may be when a step of it fails: a caller who goes away makes it
# pending, a detach that joins it going.
WHERE = {
    Aim.PLUG: {Phase.ATTACHING, Phase.ATTACH_PENDING},
    Aim.UNPLUG: {Phase.DETACHING, Phase.DETACH_PENDING},
    Aim.RESUME: {Phase.ATTACH_PENDING, Phase.DETACHING, Phase.DETACH_PENDING},
    Aim.UNDO: {Phase.ATTACH_PENDING, Phase.DETACHING, Phase.DETACH_PENDING},
}


def test_whatever_fails_is_followed_by_something_that_can_happen() -> None:
    assert FOLLOWS.keys() == {(aim, failure) for aim in Aim for failure in Failure}
    for (aim, failure), event in FOLLOWS.items():
        for phase in WHERE[aim]:
            if event is Event.UNKNOWN and phase in PENDING:
                continue  # it is that already
            assert (phase, event) in LIFE, f"{aim}, {failure}: {event} in {phase}"


def test_nothing_that_was_sent_and_whose_outcome_is_unknown_gives_anything_back() -> None:
    free = {Event.UNDONE, Event.GONE, Event.LOST}
    assert not [
        aim for aim in Aim if FOLLOWS[aim, Failure.UNKNOWN] in free | {Event.KEPT, Event.PLUGGED}
    ]
    assert {aim for aim, failure in FOLLOWS if FOLLOWS[aim, failure] in free} == {Aim.PLUG}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_an_event_that_cannot_happen_is_a_named_fault_of_ours(phase: Phase, event: Event) -> None:
    machine = Machine(
        "m", MemoryHypervisor(), DeviceManager("virtio-scsi", MemoryHypervisor.offers), Allotment(1)
    )
    device = pyblock.BlockDevice("a", pyblock.DeviceInfo())
    device.phase = phase
    if (phase, event) in LIFE:
        machine.move(device, event)
        assert device.phase is LIFE[phase, event]
        return
    with pytest.raises(IllegalEvent, match=f"'{event}'.* {phase}: a fault in pyblock") as raised:
        machine.move(device, event)
    assert device.phase is phase
    assert (raised.value.phase, raised.value.event) == (phase, event)
    assert not isinstance(raised.value, pyblock.PyblockError)


def test_the_table_of_life_is_complete() -> None:
    """Every phase can be reached, can be left, and leads back to detached."""
    assert {phase for phase, _ in LIFE} == set(Phase) == set(LIFE.values())
    assert {event for _, event in LIFE} == set(Event)
    home = {Phase.DETACHED}
    for _ in Phase:
        home |= {phase for (phase, _), then in LIFE.items() if then in home}
    assert home == set(Phase)


async def test_operations_leave_no_garbage_task(image: Make) -> None:
    async with pyblock.Sandbox("sb1", "memory:") as sandbox:
        before = asyncio.all_tasks()
        for _ in range(20):
            await sandbox.detach(await sandbox.attach(image("a")))
        gc.collect()
        assert asyncio.all_tasks() == before


def test_the_diagram_in_the_docs_is_the_table() -> None:
    text = (Path(__file__).parents[3] / "docs" / "recovery.md").read_text()
    drawn = re.findall(r"^    ([a-z-]+) --> ([a-z-]+): (.+)$", text, re.MULTILINE)
    assert sorted(drawn) == sorted(
        (before.value, then.value, event.value) for (before, event), then in LIFE.items()
    )
