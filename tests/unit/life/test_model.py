"""Sandboxes, their processes and their machines against a plain model (tests/support/model.py),
through whatever hypothesis thinks of: faults, cancellations at every turn, clean ends and deaths of
processes. PYBLOCK_MODEL_STEPS=N takes N steps of chance, not always the same.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.model import ADDING, PENDING, Box, Call, Process, Watched, Wish, World
from support.snapshot import machine, snapshot

import pyblock
from pyblock import BlockDevice, Phase
from pyblock.life.recovery import Found
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

STEPS = 5000  # at least; some twice as many are taken, so that what is rare is reached
REMOVING = tuple(step for step in MemoryHypervisor.STEPS if step not in ADDING)
LENGTH = 50  # steps of one example, most of which get there
IMAGES = 4
# seconds on the processes' clocks: a deadline that a held step passes, and more than any deadline
SOON, LATE = 5.0, 100.0

boxes = st.integers(0, sum(World.BOXES) - 1)
places = st.integers(0, len(World.BOXES) - 1)
images = st.sampled_from([0, 0, 1, 1, 2, 3])
spellings = st.integers(0, 1)
turns = st.integers(0, 12)
# Most want the same: to write the image alone. Drivers differ in their steps' places, not in the
# steps.
wishes = st.builds(
    Wish,
    st.sampled_from(["virtio-scsi", "virtio-scsi", "virtio-blk", "nvdimm"]),
    st.sampled_from([False, False, True]),
    st.sampled_from([False, False, False, True]),
)
steps = st.sampled_from(MemoryHypervisor.STEPS)
faults = st.sampled_from(
    [
        *(
            Fault("refuse"),
            Fault("refuse"),
            Fault("delay"),
            Fault("hold"),
            Fault("hold"),
            Fault("lose", done=True),
            Fault("lose", done=False),
        ),
        *(Fault("break", done=True), Fault("break", done=False)),
    ]
)
kinds = st.sampled_from(["attach", "attach", "detach", "detach", "attach_many"])


class Model(RuleBasedStateMachine):
    """Calls run to their end, or are begun and left under way for other rules to meet."""

    def __init__(self, folder: Path, images: list[list[Path]], reached: Counter[str]) -> None:
        super().__init__()
        folder.mkdir()
        self.reached = reached
        self.world = World(folder, images, reached)

    def box(self, number: int) -> Box | None:
        """That one or the next whose process lives."""
        order = self.world.boxes[number:] + self.world.boxes[:number]
        return next((box for box in order if box.sandbox is not None), None)

    def some_live(self) -> bool:
        return any(self.world.processes)

    def some_dead(self) -> bool:
        return not all(self.world.processes)

    def attached(self, box: Box, number: int) -> BlockDevice | None:
        return box.blocks[number % len(box.blocks)] if box.blocks else None

    def wish(self, box: Box, image: int, wish: Wish, alike: bool) -> Wish:
        """As the image is attached already, so that it is counted once more; else as it is
        drawn."""
        return (
            box.known[image].wish if alike and self.world.device(box, image) is not None else wish
        )

    def finish(self, call: Call) -> None:
        self.world.process(call.box).run(_over(call.task))

    def begin(
        self,
        box: Box,
        kind: str,
        some: list[int],
        wish: Wish,
        alike: bool,
        timeout: float | None,
        slow: bool,
    ) -> Call | None:
        world = self.world
        device = self.attached(box, some[0])
        if kind == "detach" and device is None:
            return None
        if slow:  # each step gives the loop a turn, so that something can come in between
            for step in box.vm.STEPS:
                box.vm.fail(step, Fault("delay"))
        if kind == "detach":
            assert device is not None
            return world.detach(box, device, timeout)
        wish = self.wish(box, some[0], wish, alike)
        if kind == "attach_many":
            return world.attach_many(box, some, wish, 0, timeout)
        return world.attach(box, some[0], wish, 0, timeout)

    # Calls that run to their end.

    @precondition(some_live)
    @rule(number=boxes, image=images, wish=wishes, alike=st.booleans(), spelling=spellings)
    def attach(self, number: int, image: int, wish: Wish, alike: bool, spelling: int) -> None:
        if (box := self.box(number)) is not None:
            self.finish(
                self.world.attach(box, image, self.wish(box, image, wish, alike), spelling, SOON)
            )

    @precondition(some_live)
    @rule(number=boxes, image=images, spelling=spellings)
    def attach_once_more(self, number: int, image: int, spelling: int) -> None:
        if (box := self.box(number)) is not None and self.world.device(box, image) is not None:
            self.finish(self.world.attach(box, image, box.known[image].wish, spelling, SOON))

    @precondition(some_live)
    @rule(
        number=boxes,
        some=st.lists(st.integers(0, IMAGES - 1), max_size=4),
        wish=wishes,
        alike=st.booleans(),
        spelling=spellings,
    )
    def attach_many(
        self, number: int, some: list[int], wish: Wish, alike: bool, spelling: int
    ) -> None:
        if (box := self.box(number)) is not None:
            if some:
                wish = self.wish(box, some[0], wish, alike)
            self.finish(self.world.attach_many(box, some, wish, spelling, SOON))

    @precondition(some_live)
    @rule(number=boxes, which=st.integers(0, IMAGES))
    def detach(self, number: int, which: int) -> None:
        if (box := self.box(number)) is not None and (
            device := self.attached(box, which)
        ) is not None:
            self.finish(self.world.detach(box, device, SOON))

    @precondition(some_live)
    @rule(
        number=boxes,
        image=images,
        wish=wishes,
        spelling=spellings,
        step=st.sampled_from(ADDING),
        fault=faults,
        more=faults,
    )
    def attach_with_a_fault(
        self,
        number: int,
        image: int,
        wish: Wish,
        spelling: int,
        step: str,
        fault: Fault,
        more: Fault,
    ) -> None:
        if (box := self.box(number)) is not None:
            box.vm.dead = False
            box.vm.fail(step, fault)
            if fault.kind == "refuse":
                box.vm.fail("backend-del", more)  # undoing it
            self.finish(
                self.world.attach(box, image, self.wish(box, image, wish, True), spelling, SOON)
            )

    @precondition(some_live)
    @rule(number=boxes, which=st.integers(0, IMAGES), step=st.sampled_from(REMOVING), fault=faults)
    def detach_with_a_fault(self, number: int, which: int, step: str, fault: Fault) -> None:
        if (box := self.box(number)) is not None and (
            device := self.attached(box, which)
        ) is not None:
            box.vm.dead = False
            box.vm.fail(step, fault)
            self.finish(self.world.detach(box, device, SOON))
            self.world.check()
            self.reconcile(number=self.world.boxes.index(box), dry_run=True)

    @precondition(some_live)
    @rule(number=boxes)
    def detach_what_is_pending(self, number: int) -> None:
        if (box := self.box(number)) is not None:
            pending = [
                device
                for device in box.blocks
                if device.phase in PENDING or device.operation is not None
            ]
            if pending:
                self.finish(self.world.detach(box, pending[0], SOON))

    @precondition(some_live)
    @rule(number=boxes)
    def detach_what_finished_late(self, number: int) -> None:
        if (box := self.box(number)) is not None:
            gone = sorted(device_id for device_id in box.told if device_id not in box.open.manager)
            for device_id in gone[:1]:
                if self.world.calm(box):
                    self.finish(self.world.detach_again(box, device_id))
                    with pytest.raises(pyblock.UnknownDevice):
                        self.world.process(box).run(box.open.detach(device_id))

    @precondition(some_live)
    @rule(number=boxes, which=st.integers(0, IMAGES))
    def detach_finishes_late(self, number: int, which: int) -> None:
        box = self.box(number)
        if box is None or (device := self.attached(box, which)) is None or not self.world.calm(box):
            return
        box.vm.fail("device-gone", Fault("hold"))
        call = self.world.detach(box, device, SOON)
        call.interrupted()
        self.finish(call)
        self.world.check()
        self.let_go(number=self.world.boxes.index(box), after=20)
        self.world.check()
        self.detach_what_finished_late(number=self.world.boxes.index(box))

    @precondition(some_live)
    @rule(number=boxes, dry_run=st.booleans())
    def reconcile(self, number: int, dry_run: bool) -> None:
        box = self.box(number)
        if box is None:
            return
        world, calm = self.world, self.world.calm(box)
        process, before = world.process(box), (snapshot(box.open), machine(box.vm))
        expected = sorted(
            (
                Found.LOST
                if device.phase is Phase.ATTACHED
                else Found.DETACH
                if device.attach_count
                else Found.ATTACH,
                device.id,
            )
            for device in box.blocks
            if device.phase in PENDING
            or (device.phase is Phase.ATTACHED and device.held.id not in box.vm.devices)
        )
        if box.vm.dead:
            with pytest.raises(pyblock.VmmUnreachable):
                process.run(box.open.reconcile(dry_run=dry_run))
            assert (snapshot(box.open), machine(box.vm)) == before or world.calls
            return
        found = process.run(box.open.reconcile(dry_run=dry_run))
        for one in found:
            self.reached[f"reconciled: {one.found.value} {one.outcome.value}"] += 1
        if calm:
            assert sorted((one.found, one.device_id) for one in found) == expected
            if dry_run:
                assert (snapshot(box.open), machine(box.vm)) == before
            else:
                assert {one.outcome for one in found} <= {"freed", "removed"}
                assert not any(device.phase in PENDING for device in box.blocks)

    # Calls that are left under way, or cut off.

    @precondition(some_live)
    @rule(
        number=boxes, kind=kinds, some=st.lists(images, min_size=1, max_size=3), wish=wishes,
        alike=st.booleans(),
        timeout=st.sampled_from([None, SOON]), slow=st.booleans(), after=turns,
    )  # fmt: skip
    def start_call(
        self,
        number: int,
        kind: str,
        some: list[int],
        wish: Wish,
        alike: bool,
        timeout: float | None,
        slow: bool,
        after: int,
    ) -> None:
        if (box := self.box(number)) is not None and (
            call := self.begin(box, kind, some, wish, alike, timeout, slow)
        ) is not None:
            call.interrupted()
            self.world.process(box).turn(after)

    @precondition(some_live)
    @rule(
        number=boxes, kind=kinds, some=st.lists(images, min_size=1, max_size=3), wish=wishes,
        alike=st.booleans(), slow=st.booleans(),
        after=turns, then=turns,
    )  # fmt: skip
    def cancel_a_new_call(
        self,
        number: int,
        kind: str,
        some: list[int],
        wish: Wish,
        alike: bool,
        slow: bool,
        after: int,
        then: int,
    ) -> None:
        box = self.box(number)
        if (
            box is not None
            and (call := self.begin(box, kind, some, wish, alike, None, slow)) is not None
        ):
            call.interrupted()
            self.world.process(box).turn(after)
            call.task.cancel()
            self.world.process(box).turn(then)

    @precondition(lambda self: self.world.calls)
    @rule(which=st.integers(0, 5), then=turns)
    def cancel_a_call(self, which: int, then: int) -> None:
        call = self.world.calls[which % len(self.world.calls)]
        call.task.cancel()
        self.world.process(call.box).turn(then)

    @precondition(some_live)
    @rule(place=places, after=turns)
    def turn(self, place: int, after: int) -> None:
        if (process := self.world.processes[place]) is not None:
            process.turn(after)

    @precondition(some_live)
    @rule(place=places, seconds=st.sampled_from([1.0, SOON, LATE]))
    def wait(self, place: int, seconds: float) -> None:
        if (process := self.world.processes[place]) is not None:
            process.run(asyncio.sleep(seconds))

    # What befalls machines.

    @rule(number=boxes, step=steps, fault=faults)
    def fault(self, number: int, step: str, fault: Fault) -> None:
        self.world.boxes[number].vm.fail(step, fault)

    @rule(number=boxes, after=turns)
    def let_go(self, number: int, after: int) -> None:
        box = self.world.boxes[number]
        for step in box.vm.STEPS:
            box.vm.let_go(step)
        if (process := self.world.processes[self.world.place(box)]) is not None:
            process.turn(after)

    @rule(number=boxes)
    def be_healthy(self, number: int) -> None:
        self.world.boxes[number].vm.heal()

    @rule(number=boxes)
    def machine_dies_or_comes_back(self, number: int) -> None:
        vm = self.world.boxes[number].vm
        if vm.dead:
            vm.dead = False
        else:
            vm.die()

    @rule(number=boxes)
    def guest_confirms_to_nobody(self, number: int) -> None:
        box = self.world.boxes[number]
        while box.letting_go:
            self.reached["the guest confirmed to nobody"] += 1
            self.world.lose(box, box.letting_go.pop())

    @precondition(some_live)
    @rule(number=boxes, which=st.integers(0, IMAGES), whole=st.booleans())
    def somebody_else_unplugs(self, number: int, which: int, whole: bool) -> None:
        box = self.box(number)
        if (
            box is None
            or (device := self.attached(box, which)) is None
            or not self.world.calm(box)
            or device.phase is not Phase.ATTACHED
        ):
            return
        self.world.lose(box, device.held.id)
        if whole:
            box.vm.backends.pop(device.held.id, None)

    @precondition(some_live)
    @rule(number=boxes, which=st.integers(0, IMAGES), whole=st.booleans())
    def lost_while_nobody_looks(self, number: int, which: int, whole: bool) -> None:
        box = self.box(number)
        if (
            box is None
            or (device := self.attached(box, which)) is None
            or not self.world.calm(box)
            or device.phase is not Phase.ATTACHED
        ):
            return
        drive_id = device.held.id
        self.world.die(self.world.place(box))
        self.world.lose(box, drive_id)
        if whole:
            box.vm.backends.pop(drive_id, None)
        self.world.check()
        self.world.start(self.world.place(box), recover=True)

    # What befalls processes and their store.

    @precondition(some_live)
    @rule(place=places)
    def close(self, place: int) -> None:
        if self.world.processes[place] is not None:
            self.world.close(place)

    @precondition(some_live)
    @rule(place=places)
    def kill(self, place: int) -> None:
        if self.world.processes[place] is not None:
            self.world.die(place)

    @precondition(some_live)
    @rule(
        number=boxes, kind=kinds, some=st.lists(images, min_size=1, max_size=3), wish=wishes,
        after=turns, recover=st.booleans(),
    )  # fmt: skip
    def kill_in_a_call(
        self, number: int, kind: str, some: list[int], wish: Wish, after: int, recover: bool
    ) -> None:
        box = self.box(number)
        if (
            box is not None
            and (call := self.begin(box, kind, some, wish, True, None, True)) is not None
        ):
            call.interrupted()
            self.world.process(box).turn(after)
            self.world.judge_all()
            self.world.die(self.world.place(box))
            self.world.check()
            self.world.start(self.world.place(box), recover=recover)

    @precondition(some_live)
    @rule(
        number=boxes,
        which=st.integers(0, IMAGES),
        step=st.sampled_from(REMOVING),
        recover=st.booleans(),
    )
    def kill_in_a_detach(self, number: int, which: int, step: str, recover: bool) -> None:
        box = self.box(number)
        if box is None or (device := self.attached(box, which)) is None or not self.world.calm(box):
            return
        box.vm.fail(step, Fault("hold"))
        self.world.detach(box, device, None).interrupted()
        self.world.process(box).turn(20)
        self.world.judge_all()
        self.world.die(self.world.place(box))
        self.world.check()
        self.world.start(self.world.place(box), recover=recover)

    @precondition(some_dead)
    @rule(place=places, recover=st.booleans())
    def start_process(self, place: int, recover: bool) -> None:
        if self.world.processes[place] is None:
            self.world.start(place, recover=recover)

    @precondition(some_live)
    @rule(number=boxes, place=places)
    def two_processes_want_one_sandbox(self, number: int, place: int) -> None:
        box, process = self.box(number), self.world.processes[place]
        if box is not None and process is not None:
            intruder = Watched(box.name, MemoryHypervisor(), store=process.store)
            with pytest.raises(pyblock.SandboxBusy):
                process.run(intruder.__aenter__())

    @precondition(some_live)
    @rule(
        number=boxes,
        kind=kinds,
        some=st.lists(images, min_size=1, max_size=3),
        wish=wishes,
        slow=st.booleans(),
    )
    def call_while_the_store_is_locked(
        self, number: int, kind: str, some: list[int], wish: Wish, slow: bool
    ) -> None:
        box = self.box(number)
        if box is None or not self.world.calm(box):
            return
        process = self.world.process(box)
        # What was written before the lock was taken can be finished without it.
        sure = not box.lost and all(device.phase is Phase.ATTACHED for device in box.blocks)
        with self.world.locked():
            if (call := self.begin(box, kind, some, wish, True, 0.1, slow)) is not None:
                if kind == "attach_many":
                    # by its own images, which wait for each other where one is named twice
                    call.interrupted()
                elif call.expect is not None:
                    call.expect = (
                        (pyblock.StoreBusy,)
                        if call.expect == (None,) and sure
                        else (*call.expect, pyblock.StoreBusy)
                    )
                self.finish(call)
        process.run(asyncio.sleep(SOON))  # what could not be written is written

    @invariant()
    def holds(self) -> None:
        self.reached["steps"] += 1
        self.world.check()

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.take_all_out()
        finally:
            for box in self.world.boxes:
                self.reached.update(f"met {kind} at {step}" for step, _, kind in box.vm.met if step)
            self.world.end()

    def take_all_out(self) -> None:
        """With healthy machines, N detaches for N attaches leave nothing anywhere."""
        world = self.world
        for place, process in enumerate(world.processes):
            for box in world.of(place):
                box.vm.heal()
            if process is None:
                world.start(place, recover=True)
            live = self._live(place)
            live.run(asyncio.sleep(LATE))
            world.check()
            assert not [call for call in world.calls if call.place == place]
            for box in world.of(place):
                assert not box.open._machine.running
                live.run(box.open.reconcile())
                world.check()
                self._empty(box, live)
                # A slot that was chosen and not written down stays taken here, since this machine's
                # adapter outlives its process.
                assert world.ends or not box.vm._slots
            world.close(place)
        assert not world._looking.execute("SELECT * FROM sandbox").fetchall()

    def _live(self, place: int) -> Process:
        process = self.world.processes[place]
        assert process is not None
        return process

    def _empty(self, box: Box, process: Process) -> None:
        for device in box.blocks:
            assert device.phase is Phase.ATTACHED
            for _ in range(device.attach_count):
                process.run(box.open.detach(device.id))
                known = box.known[self.world._image_of[device.info.path]]
                known.counts = {count - 1 for count in known.counts}
                self.world.check()
            with pytest.raises(pyblock.UnknownDevice):
                process.run(box.open.detach(device.id))
        assert not box.open.devices and not len(box.open.index) and not self.world.rows(box)
        assert not box.vm.backends and not box.vm.devices


async def _over(task: asyncio.Task[Any]) -> None:
    await asyncio.wait([task])


# Without these the model would look at nothing; each is met several times in a run.
REACHED = (
    "attach: AttachPending",
    "attach: CancelledError",
    "attach: DeviceConflict",
    "attach: ImageInUse",
    "attach: StoreBusy",
    "attach: VmmRefused",
    "attach: VmmUnreachable",
    "attach: done",
    "attach_many: ImageInUse",
    "attach_many: done",
    "detach: CancelledError",
    "detach: DetachPending",
    "detach: VmmRefused",
    "detach: done",
    "died while attaching",
    "died while detaching",
    "died with half a disk in the machine",
    "finished late, and calling again was quiet",
    *(
        f"met {kind} at "
        for kind in (
            "refuse",
            "delay",
            "hold",
            "lose done",
            "lose undone",
            "break done",
            "break undone",
        )
    ),
    "recovered: lost",
    "recovered: unfinished attach",
    "recovered: unfinished detach",
)


def test_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("pyblock", "asyncio"):
        caplog.set_level(logging.CRITICAL, logger=name)
    images = []
    for number in range(IMAGES):
        path, other = tmp_path / f"image{number}", tmp_path / f"other{number}"
        with path.open("wb") as file:
            file.truncate(1 << 20)
        other.hardlink_to(path)
        images.append([path, other])
    reached: Counter[str] = Counter()
    numbers = itertools.count()
    wanted = int(os.environ.get("PYBLOCK_MODEL_STEPS", STEPS))

    class Here(Model):
        def __init__(self) -> None:
            super().__init__(tmp_path / str(next(numbers)), images, reached)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=2 * wanted // LENGTH,
            stateful_step_count=LENGTH,
            deadline=None,
            database=None,
            print_blob=True,
            derandomize="PYBLOCK_MODEL_STEPS" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
    with capsys.disabled():
        print(f"\nmodel: {reached['steps']} steps; {dict(sorted(reached.items()))}")
    assert reached["steps"] >= wanted
    assert not [start for start in REACHED if not any(name.startswith(start) for name in reached)]
