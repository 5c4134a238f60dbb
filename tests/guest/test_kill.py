"""A process that attaches and detaches on a real QEMU is killed at every step; then recovery runs:
nothing is leaked, lost or there twice.

The steps are counted in a run that lives (kit/points.py). What the dead process had been told is
compared as well: what it saw succeed has happened, and what it was in the middle of has happened or
has not.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit import Machine
from kit.points import Points
from support.children import in_child

from pyblock import BlockDevice, Phase, Sandbox
from pyblock.life.recovery import Finding, Outcome
from pyblock.store.sqlite.store import SqliteStore

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1200)]

Start = Callable[..., Machine]

# What the process does, and how often each of two images is attached when it has done it.
LIFE: tuple[tuple[str, str, tuple[int, int]], ...] = (
    ("attach", "a", (1, 0)),
    ("attach", "a", (2, 0)),
    ("attach", "b", (2, 1)),
    ("detach", "a", (1, 1)),
    ("detach", "a", (0, 1)),
    ("detach", "b", (0, 0)),
    ("attach_many", "ab", (1, 1)),
    ("detach_many", "ab", (0, 0)),
)
# QEMU does not let go of an nvdimm, so its process only attaches.
ATTACHES = (("attach", "a", (1, 0)), ("attach", "b", (1, 1)), ("attach", "a", (2, 1)))
TIMEOUT = 60.0


class Scene:
    """A machine, its images, and a store that outlives the processes that use it."""

    def __init__(self, machine: Machine, driver: str, number: int) -> None:
        self.machine = machine
        self.driver = driver
        self.images = {name: self._image(name) for name in "ab"}
        self.path = machine.folder / f"state-{number}.db"
        self.script = ATTACHES if driver == "nvdimm" else LIFE

    def _image(self, name: str) -> Path:
        path = self.machine.folder / name
        return path if path.exists() else self.machine.image(name)

    def sandbox(self, store: SqliteStore) -> Sandbox:
        return Sandbox("victim", f"qemu:{self.machine.qmp_path}", driver=self.driver, store=store)

    def run(self, last: int | None) -> tuple[int, list[str], int]:
        """The process: its exit status, the steps that it counted (if it lives), and how many of
        its calls it saw succeed."""
        reader, writer = os.pipe()

        def victim() -> str:
            points = Points(last)
            asyncio.run(self._live(writer))
            return "\n".join(points.reached)

        status, text = in_child(victim)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            done = len(pipe.read())
        return status, text.splitlines(), done

    async def _live(self, report: int) -> None:
        store = SqliteStore(self.path)
        async with self.sandbox(store) as sandbox:
            devices = {}
            for work, names, _ in self.script:
                match work:
                    case "attach":
                        devices[names] = await sandbox.attach(self.images[names], timeout=TIMEOUT)
                    case "attach_many":
                        attached = await sandbox.attach_many(
                            [self.images[name] for name in names], timeout=TIMEOUT
                        )
                        devices |= dict(zip(names, attached, strict=True))
                    case "detach":
                        await sandbox.detach(devices[names], timeout=TIMEOUT)
                    case "detach_many":
                        await sandbox.detach_many(
                            [devices[name] for name in names], timeout=TIMEOUT
                        )
                os.write(report, b".")
        store.close()

    def run_recovery(self, last: int | None) -> tuple[int, list[str]]:
        """A process that opens the sandbox and closes it: its exit status, and the steps that it
        counted (if it lives)."""

        async def open_it() -> None:
            store = SqliteStore(self.path)
            async with self.sandbox(store):
                pass
            store.close()

        def victim() -> str:
            points = Points(last)
            asyncio.run(open_it())
            return "\n".join(points.reached)

        status, text = in_child(victim)
        return status, text.splitlines()

    def held_by_qemu(self) -> tuple[set[str], set[str]]:
        """The IDs of our devices and of our backends, as QEMU lists them."""
        side = self.machine.side
        devices = {entry["name"] for entry in side.command("qom-list", path="/machine/peripheral")}
        objects = {entry["name"] for entry in side.command("qom-list", path="/objects")}
        nodes = {node["node-name"] for node in side.command("query-named-block-nodes", flat=True)}
        return {name for name in devices if name.startswith("drive-")}, {
            name for name in objects | nodes if name.startswith("drive-")
        }

    async def recover_and_compare(self, done: int) -> tuple[Finding, ...]:
        """Opens the sandbox as the next process would, and compares all there is to compare; then
        takes everything out."""
        store = SqliteStore(self.path)
        try:
            async with self.sandbox(store) as sandbox:
                found = sandbox.recovered
                devices = [device for device in sandbox.devices if isinstance(device, BlockDevice)]
                assert all(device.phase is Phase.ATTACHED for device in devices), found
                counts = {str(device.info.path): device.attach_count for device in devices}
                before = self.script[done - 1][2] if done else (0, 0)
                after = self.script[done][2] if done < len(self.script) else before
                for image, *possible in zip(self.images.values(), before, after, strict=True):
                    assert counts.pop(str(image), 0) in possible, (
                        f"{image.name} after {done} calls: {found}"
                    )
                assert not counts
                self._compare(sandbox, devices)
                if self.driver != "nvdimm":
                    for device in devices:
                        for _ in range(device.attach_count):
                            await sandbox.detach(device, timeout=TIMEOUT)
                    assert not sandbox.devices and self.held_by_qemu() == (set(), set())
                # The lowest index is given out, and the images are free.
                lowest = min(
                    set(range(3))
                    - {device.held.index for device in devices if device.drive is not None}
                )
                other = await sandbox.attach(self._image("other"), timeout=TIMEOUT)
                assert other.held.index == lowest
                self._compare(
                    sandbox, [*(device for device in devices if device.drive is not None), other]
                )
                if self.driver != "nvdimm":
                    await sandbox.detach(other, timeout=TIMEOUT)
            left = await store.sandboxes()
            assert left == (["victim"] if self.driver == "nvdimm" else [])
            return found
        finally:
            store.close()

    def _compare(self, sandbox: Sandbox, devices: list[BlockDevice]) -> None:
        drives = {device.held.id for device in devices}
        assert len(drives) == len(devices)
        assert self.held_by_qemu() == (drives, drives)
        assert sorted(sandbox.index) == sorted(device.held.index for device in devices)
        assert {device.held.index for device in devices} == set(
            range(len(devices))
        ) or self.driver != "nvdimm"


def kill_at_every_step(
    scene: Callable[[int], Scene], driver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = scene(0)
    status, steps, done = first.run(None)
    assert (status, done) == (0, len(first.script)), steps
    if driver == "nvdimm":
        assert len(first.held_by_qemu()[0]) == 2
    outcomes: dict[str, int] = {}
    for number, step in enumerate(steps):
        place = scene(number + 1)
        status, _, done = place.run(number)
        assert status == -signal.SIGKILL, step
        try:
            for one in asyncio.run(place.recover_and_compare(done)):
                outcomes[f"{one.found.value} {one.outcome.value}"] = (
                    outcomes.get(f"{one.found.value} {one.outcome.value}", 0) + 1
                )
                assert one.outcome is not Outcome.PENDING
        except BaseException as error:
            error.add_note(f"killed at step {number} of {len(steps)}: {step}, after {done} calls")
            raise
    with capsys.disabled():
        print(f"\n{driver}: {len(steps)} kill points; recovery found {outcomes}")
    # An unfinished attach and, where there are detaches, an unfinished detach were among them.
    assert any(name.startswith("unfinished attach") for name in outcomes)
    assert driver == "nvdimm" or any(name.startswith("unfinished detach") for name in outcomes)


def test_virtio_scsi(bare_machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    kill_at_every_step(
        lambda number: Scene(bare_machine, "virtio-scsi", number), "virtio-scsi", capsys
    )


def test_recovery_itself(bare_machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """For each kind of thing that there is to settle: the process that settles it is killed at
    every step as well."""
    first = Scene(bare_machine, "virtio-scsi", 0)
    _, steps, _ = first.run(None)
    number = 0
    kinds: dict[str, int] = {}  # what recovery finds, and a step after which it finds that
    for step in range(len(steps)):
        scene = Scene(bare_machine, "virtio-scsi", number := number + 1)
        _, _, done = scene.run(step)
        found = asyncio.run(scene.recover_and_compare(done))
        kinds.setdefault(
            " and ".join(sorted({f"{one.found.value} {one.outcome.value}" for one in found})), step
        )
    assert len(kinds) >= 5
    points = 0
    for step in kinds.values():
        last = 0
        while True:
            scene = Scene(bare_machine, "virtio-scsi", number := number + 1)
            _, _, done = scene.run(step)
            status, _ = scene.run_recovery(last)
            asyncio.run(scene.recover_and_compare(done))
            if status == 0:
                break
            assert status == -signal.SIGKILL
            last += 1
        points += last
    with capsys.disabled():
        print(
            f"\nrecovery: {points} kill points in {len(kinds)} kinds of it: "
            f"{', '.join(kind or 'nothing to do' for kind in kinds)}"
        )


def test_virtio_blk_with_a_guest(
    guest_machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at_every_step(
        lambda number: Scene(guest_machine, "virtio-blk", number), "virtio-blk", capsys
    )


@pytest.fixture
def fresh(start_machine: Start) -> Iterator[Callable[[int], Scene]]:
    """A new machine each time: QEMU lets go of no nvdimm."""
    machines: list[Machine] = []

    def scene(number: int) -> Scene:
        while machines:
            machines.pop().close()
        machines.append(start_machine(guest=False, nvdimm_slots=4))
        return Scene(machines[-1], "nvdimm", number)

    yield scene


def test_nvdimm(fresh: Callable[[int], Scene], capsys: pytest.CaptureFixture[str]) -> None:
    kill_at_every_step(fresh, "nvdimm", capsys)
