"""Operations that nobody waits for any more: what they are called from then on, and what stands in
the store before the machine is touched.

tests/guest/test_kill_given_up.py has the same on QEMU, with the process killed after each step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from support.held_store import HeldStore, ended, facts, nothing_left, reached, rows
from support.snapshot import MakeImage
from support.turns import LATE, SOON, until

from pyblock import AttachPending, BlockDevice, ClosedMeanwhile, DetachPending, Phase, Sandbox
from pyblock.disk.model import BlockDrive
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


class Reading(MemoryHypervisor):
    """Notes what the store says whenever a step that changes the machine is asked for."""

    def __init__(self, store: HeldStore) -> None:
        super().__init__()
        self._store = store
        self.said: list[tuple[str, dict[str, tuple[str, int]]]] = []

    async def _step(self, step: str, drive: BlockDrive, do: Callable[[], None]) -> None:
        self.said.append((step, rows(self._store)))
        await super()._step(step, drive, do)


@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_given_up_while_the_outcome_is_written(
    how: str, store: HeldStore, make_image: MakeImage
) -> None:
    vm = Reading(store)
    async with Sandbox("one", vm, store=store) as sandbox:
        store.hold().let_go()
        gate = store.hold()
        attach = asyncio.create_task(
            sandbox.attach(
                make_image("a"), device_id="a", timeout=SOON if how == "deadline" else LATE
            )
        )
        await until(lambda: gate.reached)
        assert facts(sandbox) == {"a": ("attached", 1)}
        if how == "cancel":
            attach.cancel()
        await ended(attach)
        assert facts(sandbox) == {"a": ("attach-pending", 0)}
        vm.said.clear()
        gate.let_go()
        await until(lambda: not sandbox.devices)
        assert vm.said == [
            (step, {"a": ("attach-pending", 0)})
            for step in ("device-del", "device-gone", "backend-del")
        ]
        nothing_left(sandbox)
        assert rows(store) == {}


async def test_cancelled_when_the_outcome_was_just_written(
    store: HeldStore, make_image: MakeImage
) -> None:
    """The store says that it is attached; that is taken back before the removal is asked for."""
    vm = Reading(store)
    async with Sandbox("one", vm, store=store) as sandbox:
        store.hold().let_go()
        gate = store.hold()
        attach = asyncio.create_task(sandbox.attach(make_image("a"), device_id="a"))
        await until(lambda: gate.reached)
        gate.let_go()
        while rows(store) != {"a": ("attached", 1)}:
            await asyncio.sleep(0)
        vm.said.clear()
        attach.cancel()
        await ended(attach)
        await until(lambda: not sandbox.devices)
        assert attach.cancelled()
        assert vm.said == [
            (step, {"a": ("attach-pending", 0)})
            for step in ("device-del", "device-gone", "backend-del")
        ]


async def test_no_removal_without_its_row(store: HeldStore, make_image: MakeImage) -> None:
    """What cannot be written down first is not sent: the device stays pending, and the next change
    settles it."""
    vm = Reading(store)
    async with Sandbox("one", vm, store=store) as sandbox:
        store.hold().let_go()
        gate = store.hold(fails=True)  # of the outcome
        attach = asyncio.create_task(sandbox.attach(make_image("a"), device_id="a"))
        await until(lambda: gate.reached)
        await sandbox.attach(make_image("b"), device_id="b")  # takes the other's outcome along
        assert rows(store)["a"] == ("attached", 1)
        # what is to be said before its caller goes on, the intent, and the note that follows each
        for _ in range(4):
            store.hold(fails=True).let_go()
        vm.said.clear()
        attach.cancel()
        await ended(attach)
        gate.let_go()
        await until(lambda: not sandbox._machine.running)
        assert vm.said == [] and facts(sandbox)["a"] == ("attach-pending", 0)
        await sandbox.attach(make_image("c"), device_id="c")
        await until(lambda: "a" not in facts(sandbox))
        assert all(
            said["a"] == ("attach-pending", 0)
            for step, said in vm.said
            if step in ("device-del", "device-gone")
        )


@pytest.mark.parametrize(
    "timeout", [30.0, 0.05], ids=["its own write fails", "its caller waits no longer"]
)
async def test_an_outcome_that_was_written_along_is_one(
    timeout: float, store: HeldStore, make_image: MakeImage
) -> None:
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        store.hold().let_go()
        gate = store.hold(fails=True)
        attach = asyncio.create_task(
            sandbox.attach(make_image("a"), device_id="a", timeout=timeout)
        )
        await until(lambda: gate.reached)
        await sandbox.attach(make_image("b"), device_id="b")
        if timeout > 1:
            gate.let_go()
        await attach
        assert rows(store)["a"] == facts(sandbox)["a"] == ("attached", 1)
        gate.let_go()
        await until(lambda: not sandbox._machine.running)
        assert rows(store)["a"] == facts(sandbox)["a"] == ("attached", 1)


async def test_nobody_waits_before_the_machine_was_touched(
    store: HeldStore, make_image: MakeImage
) -> None:
    vm = Reading(store)
    async with Sandbox("one", vm, store=store) as sandbox:
        gate = store.hold()
        attach = asyncio.create_task(sandbox.attach(make_image("a"), device_id="a"))
        await until(lambda: gate.reached)
        attach.cancel()
        await ended(attach)
        gate.let_go()
        await until(lambda: not sandbox.devices)
        assert vm.said == [] and rows(store) == {}
        nothing_left(sandbox)


@pytest.mark.parametrize("step", ["backend-add", "device-add"])
async def test_an_attach_is_pending_from_the_moment_that_is_said(
    step: str, store: HeldStore, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    vm.fail(step, Fault("hold"))
    async with Sandbox("one", vm, store=store) as sandbox:
        with pytest.raises(AttachPending, match="attach-pending"):
            await sandbox.attach(make_image("a"), device_id="a", timeout=SOON)
        assert facts(sandbox) == rows(store) == {"a": ("attach-pending", 0)}
        vm.let_go(step)
        await until(lambda: not sandbox.devices)
        assert not vm.backends and not vm.devices


@pytest.mark.parametrize("step", ["device-del", "device-gone", "backend-del"])
async def test_a_detach_is_pending_from_the_moment_that_is_said(
    step: str, store: HeldStore, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        vm.fail(step, Fault("hold"))
        for _ in range(2):
            with pytest.raises(DetachPending, match="detach-pending"):
                await sandbox.detach(device, timeout=SOON)
            assert facts(sandbox) == rows(store) == {"a": ("detach-pending", 1)}
        again = asyncio.create_task(sandbox.detach(device))
        await until(lambda: device.phase is Phase.DETACHING)  # somebody waits for it again
        vm.let_go(step)
        await again
        nothing_left(sandbox)


async def test_a_late_confirmation_finishes_what_is_pending(
    store: HeldStore, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        vm.fail("device-gone", Fault("hold"))
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=SOON)
        vm.let_go("device-gone")
        await until(lambda: not sandbox.devices)
        await sandbox.detach(device)  # quiet: it was told "pending"


async def test_a_late_refusal_leaves_it_attached(store: HeldStore, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        vm.fail("device-del", Fault("hold"))
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=SOON)
        vm.fail("device-gone", Fault("refuse"))
        vm.let_go("device-del")
        await until(lambda: device.phase is Phase.ATTACHED)
        await until(lambda: rows(store) == {"a": ("attached", 1)})


async def test_a_detach_that_joins_an_undoing_is_quiet_when_that_ends_late(
    make_image: MakeImage,
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm) as sandbox:
        vm.fail("device-add", Fault("hold"))
        vm.fail("device-gone", Fault("hold"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("a"), device_id="a", timeout=SOON)
        vm.let_go("device-add")
        await reached(vm, "device-gone")
        with pytest.raises(DetachPending):
            await sandbox.detach("a", timeout=SOON)
        [device] = sandbox.devices
        assert isinstance(device, BlockDevice) and device.phase is Phase.DETACH_PENDING
        vm.let_go("device-gone")
        await until(lambda: not sandbox.devices)
        await sandbox.detach("a")


async def test_closed_while_a_batch_is_taken_back(store: HeldStore, make_image: MakeImage) -> None:
    """Once the close cut off what was half taken back."""
    vm = MemoryHypervisor()
    sandbox = await Sandbox("one", vm, store=store).__aenter__()
    vm.fail("backend-add", Fault("delay"))
    vm.fail("backend-add", Fault("refuse"))
    vm.fail("device-gone", Fault("hold"))
    batch = asyncio.create_task(sandbox.attach_many([make_image("a"), make_image("b")]))
    await reached(vm, "device-gone")
    closing = asyncio.create_task(sandbox.close())
    for _ in range(5):
        await asyncio.sleep(0)
    vm.let_go("device-gone")
    await closing
    with pytest.raises(ClosedMeanwhile):
        await batch
    assert rows(store) == {} and not vm.backends and not vm.devices
