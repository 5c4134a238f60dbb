"""At every step of every operation its deadline passes, or its caller is cancelled, and at every
later step the process is killed.

What is undone or finished for nobody is compared as in test_kill.py. Nobody else unplugs here, so
nothing may be found lost; and what is sent to the machine must stand in the store, which is looked
at before each command.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import pytest
from kit import Machine
from kit.points import TurningPoints
from support.children import in_child

from pyblock import BlockDevice, Sandbox
from pyblock.life.recovery import Found, Outcome
from pyblock.store.sqlite.store import SqliteStore

from .test_kill import TIMEOUT, Scene

pytestmark = pytest.mark.timeout(1800)

DONE, GIVEN_UP, SETTLED = b"d", b"g", b"s"


class Doing(NamedTuple):
    """An operation on the images a and b: how often they are attached before it, and after it."""

    work: str
    names: str
    before: tuple[int, int]
    after: tuple[int, int]


OPERATIONS = {
    "attach": Doing("attach", "a", (0, 0), (1, 0)),
    "attach once more": Doing("attach", "a", (1, 0), (2, 0)),
    "detach": Doing("detach", "a", (1, 0), (0, 0)),
    "detach one of two": Doing("detach", "a", (2, 0), (1, 0)),
    "attach_many": Doing("attach_many", "ab", (0, 0), (1, 1)),
    "detach_many": Doing("detach_many", "ab", (1, 1), (0, 0)),
}


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time can jump ahead."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


class Victim(Scene):
    """:param number: of its store."""

    def __init__(self, machine: Machine, doing: Doing, number: int) -> None:
        super().__init__(machine, "virtio-scsi", number)
        self.doing = doing

    def live(self, how: str, at: int | None, last: int | None) -> tuple[int, list[str], bytes]:
        """The process: its exit status, the steps that it counted (if it lives), and what it
        reported.

        :param how: "deadline" or "cancel", which is what happens at step `at`.
        """
        reader, writer = os.pipe()

        def victim() -> str:
            with asyncio.Runner(loop_factory=Clock) as runner:
                return "\n".join(runner.run(self._given_up(writer, how, at, last)))

        status, text = in_child(victim)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            report = pipe.read()
        return status, text.splitlines(), report

    async def _given_up(self, report: int, how: str, at: int | None, last: int | None) -> list[str]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Clock)
        store = SqliteStore(self.path)
        async with self.sandbox(store) as sandbox:
            for image, count in zip(self.images.values(), self.doing.before, strict=True):
                for _ in range(count):
                    await sandbox.attach(image, device_id=image.name, timeout=TIMEOUT)
            task: asyncio.Task[None] | None = None

            def give_up() -> None:
                if how == "deadline":
                    loop.ahead += TIMEOUT + 1
                elif task is not None:
                    task.cancel()

            points = TurningPoints(self.path, last, at, give_up)
            task = asyncio.create_task(self._do(sandbox))
            await asyncio.wait([task])
            ended = DONE if not task.cancelled() and task.exception() is None else GIVEN_UP
            os.write(report, ended)
            steps = len(points.reached)
            while running := sandbox._machine.running:
                await running[0].settled(None)
            os.write(report, SETTLED)
        store.close()
        assert not points.unsaid, points.unsaid
        return points.reached if at is not None else points.reached[:steps]

    async def _do(self, sandbox: Sandbox) -> None:
        images = [self.images[name] for name in self.doing.names]
        match self.doing.work:
            case "attach":
                await sandbox.attach(*images, timeout=TIMEOUT)
            case "attach_many":
                await sandbox.attach_many(images, timeout=TIMEOUT)
            case "detach":
                await sandbox.detach(*self.doing.names, timeout=TIMEOUT)
            case "detach_many":
                await sandbox.detach_many(self.doing.names, timeout=TIMEOUT)

    async def recover(self, report: bytes) -> Counter[str]:
        """Opens the sandbox as the next process would, and compares; then takes everything out."""
        given_up_for_good = report == GIVEN_UP + SETTLED and self.doing.work.startswith("attach")
        possible = {self.doing.before, self.doing.after}
        if report.startswith(DONE):
            possible = {self.doing.after}
        elif given_up_for_good:
            possible = {self.doing.before}
        store = SqliteStore(self.path)
        try:
            async with self.sandbox(store) as sandbox:
                found = sandbox.recovered
                devices = [device for device in sandbox.devices if isinstance(device, BlockDevice)]
                assert all(device.attached for device in devices), found
                counts = {device.info.path: device.attach_count for device in devices}
                for image, each in zip(
                    self.images.values(), zip(*possible, strict=True), strict=True
                ):
                    assert counts.pop(str(image), 0) in each, f"{image.name}: {found}"
                assert not counts
                assert not [
                    one
                    for one in found
                    if one.found is Found.LOST or one.outcome is Outcome.PENDING
                ], found
                self._compare(sandbox, devices)
                for device in devices:
                    for _ in range(device.attach_count):
                        await sandbox.detach(device, timeout=TIMEOUT)
                assert not sandbox.devices and not len(sandbox.index)
            assert self.held_by_qemu() == (set(), set())
            assert await store.sandboxes() == []
            return Counter(f"{one.found.value} {one.outcome.value}" for one in found)
        finally:
            store.close()


@pytest.mark.parametrize("how", ["deadline", "cancel"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_given_up_and_killed(
    name: str, how: str, bare_machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    number, points = 0, 0
    outcomes: Counter[str] = Counter()

    def run(at: int | None, last: int | None) -> tuple[int, list[str]]:
        nonlocal number
        number += 1
        victim = Victim(bare_machine, OPERATIONS[name], number)
        status, steps, report = victim.live(how, at, last)
        try:
            assert status in (0, -signal.SIGKILL), "\n".join(steps)
            outcomes.update(asyncio.run(victim.recover(report)))
        except BaseException as error:
            error.add_note(
                f"given up at step {at}, killed at step {last}; the process reported {report!r}"
            )
            with suppress(Exception):
                error.add_note(
                    "steps of one that was not killed: "
                    f"{list(enumerate(victim.live(how, at, None)[1]))}"
                )
            raise
        return status, steps

    _, steps = run(None, None)
    # Two devices of a batch take each step one after the other; to give up in between is for the
    # long form.
    given_up_at = [
        at
        for at in range(len(steps))
        if os.environ.get("PYBLOCK_LONG") or not at or steps[at] != steps[at - 1]
    ]
    for at in given_up_at:
        _, later = run(at, None)
        for last in range(at + 1, len(later)):
            points += run(at, last)[0] != 0
    with capsys.disabled():
        print(
            f"\n{name}, {how} at each of {len(given_up_at)} steps: {points} kill points; recovery "
            f"found {dict(outcomes)}"
        )
