"""Soak: thousands of sandboxes on machines in memory, one store, a million operations with restarts
and crashes among them.

    PYTHONPATH=tests python -m support.soak --operations 1000000 --sandboxes 10000

A naive count of what was attached stands beside it. At every checkpoint the store's rows and
claims, the sandboxes' devices and indexes, and what the machines hold are compared with it, and
memory, files and tasks must be what they were after the warm-up. Exit status 1 when they are not.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import sqlite3
import sys
import tempfile
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from pyblock import BlockDevice, ImageInUse, Phase, PyblockError, Sandbox, StoreError
from pyblock.life.recovery import Outcome
from pyblock.store.base import Row
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor
from support.written import written

READERS = 100  # sandboxes that read one shared image
AT_ONCE = 3  # how often a device is attached at most
CRASHES = 5  # in a run, the first of them in the warm-up
CUT_OFF = 20  # operations that are under way when a crash comes
# of all operations: what the allocator and the caches take by then is what they are to need
WARM_UP = 0.2
SLACK = 8 << 20  # bytes that memory may grow by in any case
WAL_MAX = 32 << 20  # bytes; SQLite begins the journal anew after 4 MiB
SAMPLES = 200_000
ATTACH_STEPS, DETACH_STEPS = (
    ("backend-add", "device-add"),
    ("device-del", "device-gone", "backend-del"),
)


class Violation(Exception):
    """What must hold does not."""


def hold(condition: object, what: str) -> None:
    if not condition:
        raise Violation(what)


class Options(msgspec.Struct, frozen=True):
    """What a run is to be."""

    operations: int
    sandboxes: int
    devices: int
    checkpoints: int
    tolerance: float
    seed: int


class MortalStore(SqliteStore):
    """A store as one process has it; its death leaves everything as it is.

    :ivar dead: the process is.
    :ivar ghosts: writes that came after its death.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.dead = False
        self.ghosts = 0

    async def write(
        self,
        sandbox_id: str,
        rows: Callable[[], Sequence[Row]],
        deadline: float | None = None,
        *,
        own: bytes | None = None,
        all_or_none: bool = False,
    ) -> dict[str, ImageInUse]:
        if self.dead:
            self.ghosts += 1
            raise StoreError("the process that had this store has died")
        return await super().write(sandbox_id, rows, deadline, own=own, all_or_none=all_or_none)

    def die(self) -> None:
        self.dead = True
        self.close()


class Place:
    """A sandbox, its machine, and what should be in them.

    :ivar images: the first is shared with others, which all read it.
    :ivar counts: how often each is attached.
    """

    __slots__ = ("counts", "devices", "images", "sandbox", "vm")

    def __init__(self, images: list[str]) -> None:
        self.vm = MemoryHypervisor()
        self.vm._keep_journal = False
        self.images = images
        self.counts = dict.fromkeys(images, 0)
        self.devices: dict[str, BlockDevice] = {}
        self.sandbox: Sandbox

    async def open(self, name: str, store: SqliteStore) -> None:
        self.sandbox = await Sandbox(name, self.vm, store=store).__aenter__()
        self.devices = {
            str(one.info.path): one for one in self.sandbox.devices if isinstance(one, BlockDevice)
        }

    def with_count(self, *counts: int) -> list[str]:
        return [image for image, count in self.counts.items() if count in counts]

    def compare(self) -> None:
        """The sandbox, its indexes and its machine against the counts."""
        name, sandbox, vm = self.sandbox.id, self.sandbox, self.vm
        have = {
            str(one.info.path): one.attach_count
            for one in sandbox.devices
            if isinstance(one, BlockDevice)
        }
        want = {image: count for image, count in self.counts.items() if count}
        hold(have == want, f"sandbox {name} has {have}, and {want} was attached")
        hold(
            all(one.phase is Phase.ATTACHED for one in self.devices.values()),
            f"sandbox {name}: {sandbox.devices} are not all attached",
        )
        drives = [one.held for one in self.devices.values()]
        hold(
            sorted(sandbox.index) == sorted(drive.index for drive in drives),
            f"sandbox {name}: indexes {list(sandbox.index)} for {drives}",
        )
        named = {drive.id: drive.file for drive in drives}
        hold(
            vm.backends == named,
            f"the machine of {name} has the backends {vm.backends}, not {named}",
        )
        hold(
            vm.devices.keys() == named.keys(),
            f"the machine of {name} has the devices {vm.devices}, not {named}",
        )
        hold(
            not sandbox._machine.running,
            f"sandbox {name} has {len(sandbox._machine.running)} operations under way",
        )


class Timings:
    """Some of the durations that were measured, in seconds, in room that is taken at once."""

    def __init__(self, choose: random.Random) -> None:
        self._kept = array("d", bytes(8 * SAMPLES))
        self._choose = choose
        self.count = 0

    def add(self, seconds: float) -> None:
        place = self.count if self.count < SAMPLES else self._choose.randrange(self.count + 1)
        if place < SAMPLES:
            self._kept[place] = seconds
        self.count += 1

    def __str__(self) -> str:
        kept = sorted(self._kept[: min(self.count, SAMPLES)])
        if not kept:
            return "none"
        p50, p99 = (kept[int(part * (len(kept) - 1))] * 1e6 for part in (0.5, 0.99))
        return f"p50 {p50:,.0f} µs, p99 {p99:,.0f} µs ({self.count:,} measured)"


class Resources:
    """What the process takes of its host."""

    def __init__(self) -> None:
        gc.collect()
        self.memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
        # it lists the descriptor that lists, each time
        self.files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        self.tasks = len(asyncio.all_tasks())

    def __str__(self) -> str:
        return f"memory {self.memory / 2**20:,.1f} MiB, {self.files} files, {self.tasks} tasks"


class Soak:
    """:param say: is given lines of progress."""

    def __init__(self, folder: Path, options: Options, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.options = options
        self.say = say
        self.choose = random.Random(options.seed)
        self.path = folder / "state.db"
        self.store = MortalStore(self.path)
        self.places: list[Place] = []
        self.done = 0
        self.restarts = self.crashes = self.recovered = 0
        self.attaching, self.detaching = Timings(random.Random(1)), Timings(random.Random(2))
        self.began = time.monotonic()

    async def run(self) -> None:
        options = self.options
        await self.fill()
        warm: Resources | None = None
        checkpoints = [
            options.operations * number // options.checkpoints
            for number in range(1, options.checkpoints + 1)
        ]
        crashes = [
            int(options.operations * (WARM_UP / 2 + number / CRASHES)) for number in range(CRASHES)
        ]
        while self.done < options.operations:
            await self.step()
            if crashes and self.done >= crashes[0]:
                crashes.pop(0)
                await self.crash()
            if checkpoints and self.done >= checkpoints[0]:
                checkpoints.pop(0)
                self.compare()
                now = Resources()
                self.tell(now)
                if warm is not None:
                    self.compare_resources(warm, now)
                elif self.done >= WARM_UP * options.operations:
                    warm = now
                    self.say("  warm: from here on it may not grow")
        hold(warm is not None, "there was no checkpoint after the warm-up")
        await self.empty()

    async def fill(self) -> None:
        """Makes the images, opens the sandboxes and attaches everything once."""
        options = self.options
        self.say(
            f"{options.sandboxes:,} sandboxes of {options.devices} devices, "
            f"{options.operations:,} operations, seed {options.seed}"
        )
        shared = [
            self.image(f"shared-{number}") for number in range(-(-options.sandboxes // READERS))
        ]
        for number in range(options.sandboxes):
            own = [self.image(f"{number}-{more}") for more in range(1, options.devices)]
            place = Place([shared[number // READERS], *own])
            self.places.append(place)
            await place.open(f"sb{number}", self.store)
            await self.attach(place, place.images[0])
            await self.attach_many(place)
        self.done = 0
        self.compare()
        self.tell(Resources())

    def image(self, name: str) -> str:
        path = self.folder / name
        with path.open("xb") as file:
            file.truncate(1 << 20)
        return str(path)

    async def step(self) -> None:
        """One operation, or a batch of them, of a sandbox that is chosen at random."""
        place = self.choose.choice(self.places)
        free, counted, last = (
            place.with_count(0),
            place.with_count(*range(1, AT_ONCE)),
            place.with_count(1),
        )
        kinds: list[tuple[int, bool, Callable[[], Awaitable[None]]]] = [
            (40, bool(free), lambda: self.attach(place, self.choose.choice(free))),
            (30, bool(last), lambda: self.detach(place, self.choose.choice(last))),
            (12, bool(counted), lambda: self.attach(place, self.choose.choice(counted))),
            (
                12,
                len(last) < len(place.with_count(*range(1, AT_ONCE + 1))),
                lambda: self.detach(place, self.choose.choice(more)),
            ),
            (5, len(free) > 1, lambda: self.attach_many(place)),
            (3, len(place.devices) > 1, lambda: self.detach_many(place)),
            (1, True, lambda: self.restart(place)),
        ]
        more = place.with_count(*range(2, AT_ONCE + 1))
        possible = [(weight, run) for weight, can, run in kinds if can]
        [run] = self.choose.choices(
            [run for _, run in possible], [weight for weight, _ in possible]
        )
        await run()

    async def attach(self, place: Place, image: str) -> None:
        taken = {one.held.index for one in place.devices.values()}
        first = not place.counts[image]
        began = time.perf_counter()
        device = await place.sandbox.attach(image, read_only=image == place.images[0])
        if first:
            self.attaching.add(time.perf_counter() - began)
            lowest = min(set(range(len(taken) + 1)) - taken)
            hold(
                device.held.index == lowest,
                f"sandbox {place.sandbox.id} gave out the index {device.held.index}, and {lowest} "
                "was free",
            )
        self.attached(place, image, device)

    def attached(self, place: Place, image: str, device: BlockDevice) -> None:
        place.counts[image] += 1
        place.devices[image] = device
        self.done += 1
        hold(
            device.attach_count == place.counts[image],
            f"{device!r} of {place.sandbox.id} was attached {place.counts[image]} times",
        )

    async def detach(self, place: Place, image: str) -> None:
        last = place.counts[image] == 1
        began = time.perf_counter()
        await place.sandbox.detach(place.devices[image])
        if last:
            self.detaching.add(time.perf_counter() - began)
        self.detached(place, image)

    def detached(self, place: Place, image: str) -> None:
        place.counts[image] -= 1
        self.done += 1
        if not place.counts[image]:
            del place.devices[image]

    async def attach_many(self, place: Place) -> None:
        images = [image for image in place.images[1:] if not place.counts[image]]
        for image, device in zip(images, await place.sandbox.attach_many(images), strict=True):
            self.attached(place, image, device)

    async def detach_many(self, place: Place) -> None:
        await place.sandbox.detach_many(place.devices.values())
        for image in list(place.devices):
            self.detached(place, image)

    async def restart(self, place: Place) -> None:
        """The sandbox is closed with everything in it, and opened again."""
        await place.sandbox.close()
        await place.open(place.sandbox.id, self.store)
        hold(
            not place.sandbox.recovered,
            f"sandbox {place.sandbox.id} was closed in order, and {place.sandbox.recovered} "
            "differed",
        )
        place.compare()
        self.restarts += 1
        self.done += 1

    async def crash(self) -> None:
        """The process dies in the middle of some operations, and another one opens all its
        sandboxes."""
        cut_off = {
            id(place) for place in self.choose.sample(self.places, min(CUT_OFF, len(self.places)))
        }
        running: list[asyncio.Future[object]] = []
        for place in self.places:
            if id(place) in cut_off:
                running += await self.begin(place)
        self.store.die()
        for place in self.places:
            for operation in place.sandbox._machine.running:
                operation.cancel()
        for ended in await asyncio.gather(*running, return_exceptions=True):
            hold(
                isinstance(ended, PyblockError), f"an operation that was cut off ended in {ended!r}"
            )
        hold(not self.store.ghosts, f"{self.store.ghosts} writes came after the process had died")
        running.clear()
        self.store = MortalStore(self.path)
        for place in self.places:
            for step in (*ATTACH_STEPS, *DETACH_STEPS):
                place.vm.let_go(step)
            await place.open(place.sandbox.id, self.store)
            found = place.sandbox.recovered
            hold(
                len(found) == (id(place) in cut_off),
                f"sandbox {place.sandbox.id}: recovery found {found}",
            )
            hold(
                all(one.outcome in (Outcome.REMOVED, Outcome.FREED) for one in found),
                f"sandbox {place.sandbox.id}: {found}",
            )
            place.compare()
            self.recovered += len(found)
        self.crashes += 1

    async def begin(self, place: Place) -> list[asyncio.Future[object]]:
        """Begins an attach or a last detach that does not end; recovery shall find that the image
        is not attached."""
        free = [image for image in place.images[1:] if not place.counts[image]]
        last = place.with_count(1)
        if not free and not last:
            image = self.choose.choice(place.images)
            while place.counts[image] > 1:
                await self.detach(place, image)
            last = [image]
        attaches = bool(free) and (not last or self.choose.random() < 0.5)
        step = self.choose.choice(ATTACH_STEPS if attaches else DETACH_STEPS)
        place.vm.fail(step, Fault("hold"))
        if attaches:
            running: asyncio.Future[object] = asyncio.ensure_future(
                place.sandbox.attach(self.choose.choice(free))
            )
        else:
            image = self.choose.choice(last)
            running = asyncio.ensure_future(place.sandbox.detach(place.devices[image]))
            place.counts[image] = 0
        while not (place.vm._gates and step in place.vm._gates):
            hold(
                not running.done(),
                f"an operation of {place.sandbox.id} did not wait at {step}: {running!r}",
            )
            await asyncio.sleep(0)
        return [running]

    async def empty(self) -> None:
        """Takes everything out and closes all; nothing is left."""
        for place in self.places:
            for image, count in list(place.counts.items()):
                for _ in range(count):
                    await self.detach(place, image)
            place.compare()
            await place.sandbox.close()
        with closing(sqlite3.connect(self.path)) as db:
            for table in ("device", "under", "sandbox"):
                [left] = db.execute(f"SELECT count(*) FROM {table}").fetchone()
                hold(
                    left == 0,
                    f"{left} rows are left in the table {table} when all is detached and closed",
                )
        self.store.close()

    def compare(self) -> None:
        """Everything against the counts, the rows of the store among it."""
        claims: dict[tuple[str, str], tuple[str, int, int, str]] = {}
        for place in self.places:
            place.compare()
            for image, device in place.devices.items():
                assert device.identity is not None
                claimed = ":".join(map(str, device.identity))
                claims[place.sandbox.id, device.id] = (
                    claimed,
                    int(image == place.images[0]),
                    place.counts[image],
                    "attached",
                )
        with closing(sqlite3.connect(self.path)) as db:
            found = {}
            for sandbox, device_id, state, image, access in db.execute(
                "SELECT sandbox, id, state, image, access FROM device"
            ):
                said = written(device_id, state)
                found[sandbox, device_id] = (image, access, said.attach_count, said.phase)
            sandboxes = {
                sandbox
                for (sandbox,) in db.execute("SELECT id FROM sandbox WHERE owner IS NOT NULL")
            }
            [damage] = db.execute("PRAGMA integrity_check(1)").fetchone()
        for key in claims.keys() | found.keys():
            hold(
                claims.get(key) == found.get(key),
                f"device {key}: the store has {found.get(key)}, and should have {claims.get(key)}",
            )
        hold(
            sandboxes == {place.sandbox.id for place in self.places},
            f"the store has {len(sandboxes)} sandboxes that somebody owns",
        )
        hold(damage == "ok", f"the store is damaged: {damage}")

    def compare_resources(self, warm: Resources, now: Resources) -> None:
        allowed = int(warm.memory * (1 + self.options.tolerance)) + SLACK
        hold(
            now.memory <= allowed,
            f"memory grew from {warm.memory / 2**20:,.1f} MiB after the warm-up to "
            f"{now.memory / 2**20:,.1f} MiB; "
            f"allowed are {self.options.tolerance:.0%} and {SLACK >> 20} MiB more",
        )
        hold(
            (now.files, now.tasks) == (warm.files, warm.tasks),
            f"after the warm-up: {warm}; now: {now}",
        )
        journal = self.path.with_name(self.path.name + "-wal").stat().st_size
        hold(journal <= WAL_MAX, f"the store's journal has grown to {journal / 2**20:,.1f} MiB")

    def tell(self, now: Resources) -> None:
        devices = sum(len(place.devices) for place in self.places)
        seconds = time.monotonic() - self.began
        self.say(f"{seconds:7.1f} s  {self.done:>9,} operations, {devices:,} devices, {now}")

    def summary(self) -> list[str]:
        return [
            f"attach: {self.attaching}",
            f"detach: {self.detaching}",
            (
                f"restarts: {self.restarts:,}; crashes: {self.crashes}, after which recovery "
                "settled "
                f"{self.recovered} devices"
            ),
        ]


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--sandboxes", type=int, default=10_000)
    parser.add_argument(
        "--devices",
        type=int,
        default=4,
        help="images of a sandbox; the first is shared with others, which read it",
    )
    parser.add_argument(
        "--checkpoints", type=int, default=20, help="how often everything is compared"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        help=f"how much memory may grow after the warm-up, beside {SLACK >> 20} MiB",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where a temporary folder is made for the images and the store"
    )
    given = vars(parser.parse_args(arguments))
    where = given.pop("folder")
    with tempfile.TemporaryDirectory(dir=where) as folder:
        soak = Soak(Path(folder), Options(**given), say)
        try:
            asyncio.run(soak.run())
        except Violation as violation:
            say(f"VIOLATION after {soak.done:,} operations: {violation}")
            return 1
        except PyblockError as error:
            say(
                f"VIOLATION after {soak.done:,} operations: an operation that should succeed "
                f"ended in {type(error).__name__}: {error}"
            )
            return 1
        finally:
            for line in soak.summary():
                say(line)
            soak.store.close()
    say("nothing was leaked, lost or there twice")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
