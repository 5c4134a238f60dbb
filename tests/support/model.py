"""Processes that can die at any moment, and a plain model of what their sandboxes must hold: a set
of possible attach counts an image.

A process is an event loop, a store of its own, and sandboxes; dead, its loop never runs again, and
nothing of it is cleaned up. What a call returned or raised narrows the set down; a cancellation or
a death widens it; when all is at rest what is there must be one of the set.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyblock
from pyblock import BlockDevice, EventKind, Phase, PyblockError, Sandbox, SandboxEvent
from pyblock.disk.model import BlockDrive
from pyblock.life.machine import Machine
from pyblock.life.road import Road
from pyblock.life.table import HOLDING, Stage
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor
from support import eager
from support.written import written

PENDING = (Phase.ATTACH_PENDING, Phase.DETACH_PENDING)
ADDING = ("backend-add", "device-add")
LETTING_GO = ("device-del", "device-gone")  # whoever refuses one of these keeps the device
HELD_TEXT = "may still hold part"  # the note on an error that leaves a device pending


class Stuck(Exception):
    """Somebody waits, and nothing that could happen is under way."""


class Instant(selectors.SelectSelector):
    """Waits for nothing: where a loop would sleep, its clock jumps. A deadline of minutes costs
    nothing, and no test depends on speed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck
        self.now += max(0.0, timeout)
        return []


class Loop(asyncio.SelectorEventLoop):
    """An event loop on that clock, which knows its tasks."""

    def __init__(self) -> None:
        self.instant = Instant()
        self._tasks: list[asyncio.Task[Any]] = []
        super().__init__(self.instant)
        if eager.WANTED:
            eager.make_eager(self)

    def create_task(self, coro: Any, **more: Any) -> asyncio.Task[Any]:
        self._tasks.append(super().create_task(coro, **more))
        return self._tasks[-1]

    @property
    def at_work(self) -> set[asyncio.Task[Any]]:
        self._tasks = [task for task in self._tasks if not task.done()]
        return set(self._tasks)

    def time(self) -> float:
        return self.instant.now


class Vm(MemoryHypervisor):
    """A machine in memory that notes which faults it met; it outlives the processes.

    :ivar met: (step, drive ID, kind of fault), in order.
    :ivar kept: drives whose removal was refused since they were last seen attached.
    :ivar gone: drives that were removed since they were last seen pending.
    """

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self.met: list[tuple[str, str, str]] = []
        self.kept: set[str] = set()
        self.gone: set[str] = set()

    @property
    def healthy(self) -> bool:
        return not self.dead and all(
            fault.kind == "delay" for faults in (self._faults or {}).values() for fault in faults
        )

    async def _step(self, step: str, drive: BlockDrive, do: Callable[[], None]) -> None:
        faults = self._faults.get(step) if self._faults else None
        while (
            faults
            and faults[0].kind == "refuse"
            and step in LETTING_GO
            and drive.id not in self.devices
        ):
            faults.popleft()  # no machine refuses to remove what it does not have
        if faults and not self.dead:
            fault = faults[0]
            how = (
                f" {'done' if fault.done else 'undone'}" if fault.kind in ("lose", "break") else ""
            )
            self.met.append((step, drive.id, fault.kind + how))
            if fault.kind == "refuse" and step in LETTING_GO:
                self.kept.add(drive.id)
        await super()._step(step, drive, do)
        if step == "backend-del":
            self.gone.add(drive.id)

    def die(self) -> None:
        self.dead = True
        self.met.append(("", "", "dead"))

    def cut(self) -> None:
        """The process that held its connection is gone: what was held back for it will never be
        answered."""
        self._gates = None

    def lose(self, drive_id: str) -> None:
        """The guest lets go of a device, asked or not."""
        self._places.discard(self.devices.pop(drive_id, ""))

    def heal(self) -> None:
        self.dead = False
        self._faults = None
        for step in self.STEPS:
            self.let_go(step)


class WatchedMachine(Machine):
    """One whose every new index must be the lowest free one."""

    __slots__ = ()

    def take(self, device: BlockDevice) -> None:
        taken = set(self.allotment.index)
        planned = device.id in self.allotment._planned
        super().take(device)
        assert planned or device.held.index == lowest(taken)


class Watched(Sandbox):
    """A sandbox with such a machine."""

    def __init__(self, *what: Any, **how: Any) -> None:
        super().__init__(*what, **how)
        self._machine.__class__ = WatchedMachine


def lowest(taken: set[int], count: int = 1) -> int:
    """The `count`-th lowest number that is not taken."""
    free = (number for number in range(len(taken) + count) if number not in taken)
    return [next(free) for _ in range(count)][-1]


class Wish(NamedTuple):
    """How an image is to be attached."""

    driver: str
    read_only: bool
    share: bool

    def fits(self, other: Wish) -> bool:
        return (self.read_only and other.read_only) or (self.share and other.share)


class Known:
    """What is known of one image in one sandbox.

    :ivar counts: how often it may be attached.
    :ivar unsure: an outcome is open, so it may be pending, or under way with nobody waiting.
    :ivar taken_back: a batch was cut off, and is taken back with nobody waiting for that.
    :ivar device_id: its last device.
    :ivar wish: how that is to be attached.
    :ivar asked: all the ways in which it was ever to be attached.
    """

    def __init__(self) -> None:
        self.counts = {0}
        self.unsure = False
        self.taken_back = False
        self.device_id = ""
        self.wish = Wish("virtio-scsi", False, False)
        self.asked: set[Wish] = set()

    def __repr__(self) -> str:
        return f"{sorted(self.counts)}{'?' if self.unsure else ''}"

    def open_up(self, *more: int) -> None:
        self.unsure = True
        self.counts |= {max(0, count + each) for count in self.counts for each in more}


# What the store may say of a device when an event of it comes.
SAID = {
    EventKind.ATTACHED: ("attached",),
    EventKind.DETACHED: ("detached",),
    EventKind.DETACHED_LATE: ("detached",),
    EventKind.PENDING: ("attach-pending", "detach-pending"),
    EventKind.REFUSED: ("attached", "detached"),
    EventKind.LOST: ("detached",),
}


class Box:
    """A sandbox through all its processes.

    :ivar told: IDs of devices whose detach was said to be pending, by this process.
    :ivar doubtful: drives that were pending when they were last looked at.
    :ivar lost: drives that the guest let go of without this sandbox having been told.
    :ivar letting_go: drives that the guest may yet let go of, asked by a process that is gone.
    :ivar ahead: events that said more than the store did at that moment.
    """

    def __init__(self, name: str, images: int) -> None:
        self.name = name
        self.vm = Vm(name)
        self.sandbox: Watched | None = None
        self.known = [Known() for _ in range(images)]
        self.told: set[str] = set()
        self.doubtful: set[str] = set()
        self.lost: set[str] = set()
        self.letting_go: set[str] = set()
        self.ahead: list[str] = []

    @property
    def open(self) -> Watched:
        assert self.sandbox is not None
        return self.sandbox

    @property
    def blocks(self) -> list[BlockDevice]:
        return [device for device in self.open.devices if isinstance(device, BlockDevice)]


class Process:
    """One that lives: an event loop, and a store."""

    def __init__(self, path: Path) -> None:
        self.loop = Loop()
        self.store = SqliteStore(path)
        # connects, with a thread's help, for which a loop on that clock would not wait
        asyncio.run(self.store.sandboxes())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def turn(self, turns: int) -> None:
        self.run(_turns(turns))

    def close(self) -> None:
        """Its clean end: no task is left."""
        self.turn(5)
        assert not self.loop.at_work
        self.store.close()
        self.loop.close()

    def die(self) -> set[asyncio.Task[Any]]:
        """Its death: no task of it runs again, nor is cleaned up as long as the caller keeps
        them."""
        tasks = self.loop.at_work
        self.store.close()
        self.loop.close()
        return tasks


def _wish_of(device: BlockDevice) -> Wish:
    return Wish(device.info.driver or "", device.info.read_only, device.info.share)


def _plainly(row: StoredRow) -> StoredRow:
    """What never was attached is undone, whichever way it is pending."""
    return row._replace(phase="pending") if row.phase in PENDING and not row.attaches else row


async def _turns(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


def bury(tasks: set[asyncio.Task[Any]]) -> None:
    """Lets go of the tasks of the dead when nothing is left that their clean-up could spoil; it has
    no event loop any more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what their clean-up would have awaited
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            work = task.get_coro()
            assert work is not None
            for _ in range(10):
                try:
                    work.close()
                    break
                except Exception:
                    continue


class StoredRow(NamedTuple):
    """A row of the store, as another program reads it."""

    device_id: str
    drive_id: str
    number: int
    phase: str
    attaches: int
    image: str | None
    access: int | None


class Call:
    """A call of a sandbox that is under way.

    :ivar expect: what it may raise, None being success; None: anything that the faults explain.
    :ivar mark: how many faults its machine had met before.
    """

    def __init__(
        self,
        kind: str,
        place: int,
        box: Box,
        images: Sequence[int],
        work: Coroutine[Any, Any, Any],
        process: Process,
        device_id: str = "",
    ) -> None:
        self.kind, self.place, self.box, self.images, self.device_id = (
            kind,
            place,
            box,
            list(images),
            device_id,
        )
        self.expect: tuple[type[BaseException] | None, ...] | None = None
        self.quiet = False  # a detach that has nothing to do, and must not say so
        self.mark = len(box.vm.met)
        self.began_dead = box.vm.dead
        self.wish: Wish | None = None
        self.rivals = False  # somebody was seen to hold an image of it
        self.indexes: list[int] | None = None  # those that a batch must get
        self.task: asyncio.Task[Any] = process.loop.create_task(work)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.box.name} images {self.images} {self.device_id}>"

    def interrupted(self) -> None:
        """Others come in between."""
        self.expect = self.indexes = None

    @property
    def met(self) -> list[tuple[str, str, str]]:
        dead = [("", "", "dead")] if self.began_dead else []
        return dead + self.box.vm.met[self.mark :]


class World:
    """Two processes on one store, three sandboxes, some images; the model, and the comparison with
    what is there.

    :param folder: of this run's store.
    :param images: each image under all the paths that it has.
    :param reached: counts what was reached.
    """

    BOXES = (2, 1)  # sandboxes of each process

    def __init__(self, folder: Path, images: list[list[Path]], reached: Counter[str]) -> None:
        self.path = folder / "state.db"
        self.images = images
        self.reached = reached
        self._image_of = {
            str(path): number for number, paths in enumerate(images) for path in paths
        }
        self.identities = ["file:{0.st_dev}:{0.st_ino}".format(paths[0].stat()) for paths in images]
        self.boxes = [Box(f"sb{number}", len(images)) for number in range(sum(self.BOXES))]
        # whose process each box is in
        self.places = [place for place, count in enumerate(self.BOXES) for _ in range(count)]
        self.processes: list[Process | None] = [None] * len(self.BOXES)
        self.calls: list[Call] = []
        self.dead: list[set[asyncio.Task[Any]]] = []
        self.ends = 0  # of processes
        for place in range(len(self.BOXES)):
            self.start(place, recover=True)
        self._looking = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, isolation_level=None)

    # Processes.

    def process(self, box: Box) -> Process:
        process = self.processes[self.place(box)]
        assert process is not None
        return process

    def place(self, box: Box) -> int:
        return self.places[self.boxes.index(box)]

    def of(self, place: int) -> list[Box]:
        return [box for box in self.boxes if self.place(box) == place]

    def start(self, place: int, *, recover: bool) -> None:
        process = self.processes[place] = Process(self.path)
        for box in self.of(place):
            sandbox = Watched(
                box.name,
                box.vm,
                store=process.store,
                recover=recover,
                on_event=partial(self.hear, box),
            )
            mark = len(box.vm.met)
            process.run(sandbox.__aenter__())
            box.sandbox = sandbox
            for finding in sandbox.recovered:
                self.reached[f"recovered: {finding.found.value} {finding.outcome.value}"] += 1
                # Only what the machine refused, or did not answer, is left.
                assert (
                    finding.outcome in ("freed", "removed") or box.vm.dead or len(box.vm.met) > mark
                )

    def close(self, place: int) -> None:
        """The process ends as it should."""
        process = self.processes[place]
        assert process is not None
        for box in self.of(place):
            for device in box.blocks:
                self._meet(device, box.known[self._image_of[device.info.path]])
            self._see_the_guest(box)
            process.run(box.open.close())
        process.turn(20)  # callers that were cut off
        self.judge_all()
        assert not [call for call in self.calls if call.place == place]
        process.close()
        self._gone(place)

    def die(self, place: int) -> None:
        """The process is killed. What its callers were in the middle of has happened, or has
        not."""
        process = self.processes[place]
        assert process is not None
        for call in [call for call in self.calls if call.place == place]:
            self.calls.remove(call)
            for image in call.images:
                call.box.known[image].open_up(1 if call.kind.startswith("attach") else -1)
        for box in self.of(place):
            for device in box.blocks:
                self._meet(device, box.known[self._image_of[device.info.path]])
                if isinstance(device.operation, Road) and device.operation.stage >= Stage.ACTING:
                    self.reached[f"died while {device.phase.value}"] += 1
                    drive = device.held.id
                    if drive in box.vm.backends and drive not in box.vm.devices:
                        self.reached["died with half a disk in the machine"] += 1
            self._see_the_guest(box)
        self.dead.append(process.die())
        self._gone(place)

    def _gone(self, place: int) -> None:
        self.processes[place] = None
        self.ends += 1
        for box in self.of(place):
            box.vm.cut()
            box.sandbox = None
            box.told.clear()
            rows = self.rows(box)
            box.doubtful = {row.drive_id for row in rows if row.phase in PENDING}

    def _see_the_guest(self, box: Box) -> None:
        """Removals that were asked for, and that the guest may confirm when nobody listens any
        more."""
        last = {drive: (step, kind) for step, drive, kind in box.vm.met}
        for device in box.blocks:
            if (
                device.operation is not None
                and device.drive is not None
                and last.get(device.drive.id) == ("device-gone", "hold")
            ):
                box.letting_go |= {device.drive.id} & box.vm.devices.keys()

    def end(self) -> None:
        """Takes everything down, however it stands."""
        self._looking.close()
        for process in self.processes:
            if process is not None:
                self.dead.append(process.die())
        for tasks in self.dead:
            bury(tasks)

    # Calls.

    def paths(self, images: Sequence[int], spelling: int) -> list[Path]:
        return [self.images[image][spelling % len(self.images[image])] for image in images]

    def calm(self, box: Box) -> bool:
        """Nothing of its process is under way, and its machine does as it is asked."""
        return (
            box.vm.healthy
            and not any(call.place == self.place(box) for call in self.calls)
            and not self.at_work(box)
        )

    def at_work(self, box: Box) -> bool:
        """Whether its process does something that nobody called for, or not any more."""
        return bool(self.process(box).loop.at_work - {call.task for call in self.calls})

    def device(self, box: Box, image: int) -> BlockDevice | None:
        found = [device for device in box.blocks if self._image_of[device.info.path] == image]
        assert len(found) < 2, "one image is two devices"
        return found[0] if found else None

    def rivals(self, box: Box, image: int, wish: Wish, *, surely: bool) -> list[Box]:
        """Other sandboxes whose hold of the image does not fit the wish."""
        return [
            other
            for other in self.boxes
            if other is not box
            and self.holds(other, image, surely=surely)
            and not all(wish.fits(each) for each in self.wishes(other, image, surely=surely))
        ]

    def wishes(self, box: Box, image: int, *, surely: bool) -> set[Wish]:
        device = self.device(box, image) if box.sandbox is not None else None
        calls = (
            []
            if surely
            else [call.wish for call in self.calls if call.box is box and image in call.images]
        )
        return {
            _wish_of(device) if device is not None else box.known[image].wish,
            *(wish for wish in calls if wish is not None),
        }

    def holds(self, box: Box, image: int, *, surely: bool) -> bool:
        known = box.known[image]
        device = self.device(box, image) if box.sandbox is not None else None
        if surely:  # one under way may not have its claim yet, or no more
            return (
                min(known.counts) > 0
                if box.sandbox is None
                else device is not None and device.phase in HOLDING and device.operation is None
            )
        if device is not None and device.phase in HOLDING:
            return True
        return (
            known.unsure
            or max(known.counts) > 0
            or any(call.box is box and image in call.images for call in self.calls)
        )

    def attach(
        self, box: Box, image: int, wish: Wish, spelling: int, timeout: float | None
    ) -> Call:
        [path] = self.paths([image], spelling)
        expect = self._expected(box, image, wish) if self.calm(box) else None
        work = box.open.attach(
            path, driver=wish.driver, read_only=wish.read_only, share=wish.share, timeout=timeout
        )
        call = Call("attach", self.place(box), box, [image], work, self.process(box))
        call.expect = expect
        return self._begun(call, wish)

    def attach_many(
        self, box: Box, images: list[int], wish: Wish, spelling: int, timeout: float | None
    ) -> Call:
        paths = self.paths(images, spelling)
        expect = None
        if self.calm(box) and images:
            each = [self._expected(box, image, wish) for image in images]
            expect = tuple(
                {
                    kind
                    for one in each
                    for kind in one
                    if kind is not None or all(None in other for other in each)
                }
            )
        fresh = [image for image in dict.fromkeys(images) if self.device(box, image) is None]
        taken = set(box.open.index)
        work = box.open.attach_many(
            paths, driver=wish.driver, read_only=wish.read_only, share=wish.share, timeout=timeout
        )
        call = Call("attach_many", self.place(box), box, images, work, self.process(box))
        call.expect = expect
        if expect == (None,) and not box.open._machine.doubtful and len(fresh) == len(images):
            call.indexes = [lowest(taken, count + 1) for count in range(len(fresh))]
        return self._begun(call, wish)

    def detach(self, box: Box, device: BlockDevice, timeout: float | None) -> Call:
        expect: tuple[type[BaseException] | None, ...] | None = None
        if self.calm(box):
            expect = (None,) if device.phase in HOLDING else (pyblock.NotAttached,)
            if device.drive is not None and device.drive.id in box.lost:
                expect = (None, pyblock.UnknownDevice, pyblock.NotAttached)  # it learns of that now
        image = self._image_of[device.info.path]
        work = box.open.detach(device.id, timeout=timeout)
        call = Call("detach", self.place(box), box, [image], work, self.process(box), device.id)
        call.expect = expect
        return self._begun(call)

    def detach_again(self, box: Box, device_id: str) -> Call:
        """Calls with the ID of a device whose detach was said to be pending, and which has gone
        since."""
        call = Call(
            "detach again",
            self.place(box),
            box,
            [],
            box.open.detach(device_id),
            self.process(box),
            device_id,
        )
        call.quiet = True
        box.told.discard(device_id)
        return self._begun(call)

    def _begun(self, call: Call, wish: Wish | None = None) -> Call:
        self.calls.append(call)
        call.wish = wish
        if wish is not None:
            for image in call.images:
                call.box.known[image].asked.add(wish)
        call.rivals = self._has_rivals(call)
        return call

    def _has_rivals(self, call: Call) -> bool:
        return call.wish is not None and any(
            self.rivals(call.box, image, call.wish, surely=False) for image in call.images
        )

    def _expected(self, box: Box, image: int, wish: Wish) -> tuple[type[BaseException] | None, ...]:
        """What an attach comes to when everything is calm."""
        device, known = self.device(box, image), box.known[image]
        if device is not None:
            if known.wish != wish:
                return (pyblock.DeviceConflict,)
            if device.phase in PENDING and not box.open._machine.doubtful:
                return (pyblock.AttachPending, pyblock.DetachPending)
            return (None,)
        if self.rivals(box, image, wish, surely=True):
            return (pyblock.ImageInUse,)
        return (
            (None, pyblock.ImageInUse) if self.rivals(box, image, wish, surely=False) else (None,)
        )

    def judge_all(self) -> None:
        for call in [call for call in self.calls if call.task.done()]:
            self.calls.remove(call)
            error = asyncio.CancelledError() if call.task.cancelled() else call.task.exception()
            self.reached[f"{call.kind}: {type(error).__name__ if error else 'done'}"] += 1
            try:
                self._judge(call, error)
            except AssertionError as wrong:
                wrong.add_note(f"{call} came to {error!r}; met {call.met}")
                raise wrong from error

    def _judge(self, call: Call, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, (PyblockError, asyncio.CancelledError)):
            raise error
        if call.expect is not None:
            assert (type(error) if error is not None else None) in call.expect, (
                f"expected {call.expect}"
            )
        self._explained(call, error)
        if call.quiet:
            assert error is None, "it was told 'pending', and calling again is not quiet"
            self.reached["finished late, and calling again was quiet"] += 1
        elif call.kind == "detach":
            self._detached(call, error)
        elif call.kind == "attach":
            self._attached(call, error, call.images[0])
        else:
            self._attached_many(call, error)

    def _explained(self, call: Call, error: BaseException | None) -> None:
        """No error without somebody's fault."""
        kinds = {kind for _, _, kind in call.met}
        if isinstance(error, pyblock.VmmRefused):
            assert error.reply == "told to refuse" and "refuse" in kinds
        elif isinstance(error, pyblock.VmmUnreachable):
            assert "dead" in kinds
        elif isinstance(error, pyblock.ImageInUse):
            assert call.rivals or self._has_rivals(call)
        elif isinstance(error, pyblock.UnknownDevice):
            assert call.kind == "detach"

    def _attached(self, call: Call, error: BaseException | None, image: int) -> None:
        known = call.box.known[image]
        if error is None:
            known.counts = {count + 1 for count in known.counts}
            assert _wish_of(call.task.result()) == call.wish
        elif isinstance(error, asyncio.CancelledError):
            known.open_up(*([1] if self._trouble(call) else []))
        elif isinstance(error, (pyblock.AttachPending, pyblock.DetachPending)) or HELD_TEXT in str(
            getattr(error, "__notes__", "")
        ):
            known.unsure = True
            if 0 in known.counts:
                known.counts |= {1}
            # else it may have been asked again, and be settled
            last = call.met[-1][2] if call.met else ""
            # another call may have had it asked and settled since
            device = self.device(call.box, image)
            pending = device is not None and device.phase in PENDING
            if last.startswith(("lose", "break")) and pending and not self.at_work(call.box):
                assert call.box.open._machine.doubtful, (
                    "nobody knows what the machine has, and it is not asked again"
                )

    def _attached_many(self, call: Call, error: BaseException | None) -> None:
        for image in call.images:
            known = call.box.known[image]
            if error is None:
                known.counts = {count + 1 for count in known.counts}
            elif self._trouble(call, also=ADDING) or isinstance(
                error, (asyncio.CancelledError, pyblock.AttachPending)
            ):
                known.open_up(1)  # what was attached is taken back, which can fail
                known.taken_back |= isinstance(error, asyncio.CancelledError)
        if error is None and call.indexes is not None:
            assert [device.held.index for device in call.task.result()] == call.indexes

    def _detached(self, call: Call, error: BaseException | None) -> None:
        known = call.box.known[call.images[0]]
        # It may have taken back what another call, not over yet, has attached.
        others = any(
            other.box is call.box and call.images[0] in other.images for other in self.calls
        )
        less = {count - 1 if others else max(0, count - 1) for count in known.counts}
        if error is None:
            known.counts = less
            call.box.told.discard(call.device_id)
        elif isinstance(
            error, (pyblock.DetachPending, pyblock.AttachPending, asyncio.CancelledError)
        ):
            known.unsure = True
            known.counts |= less
            others = any(
                other.box is call.box and other.images == call.images for other in self.calls
            )
            if isinstance(error, pyblock.DetachPending) and not others:
                # one of two detaches of one attach has nothing to come back to
                call.box.told.add(call.device_id)
        elif HELD_TEXT in str(getattr(error, "__notes__", "")):
            known.unsure = True
            known.counts |= less  # below 0 while the attach that it takes back has not been judged

    def _trouble(self, call: Call, also: tuple[str, ...] = ()) -> bool:
        """Whether the undoing may have failed. A refusal to add needs no more undoing than any
        failure."""
        return any(
            kind != "delay" and not (kind == "refuse" and step in also)
            for step, _, kind in call.met
        )

    # What must hold.

    def rows(self, box: Box) -> list[StoredRow]:
        found = []
        query = "SELECT id, state, image, access FROM device WHERE sandbox = ? ORDER BY rowid"
        for device_id, state, image, access in self._looking.execute(query, (box.name,)):
            said = written(device_id, state)
            found.append(
                StoredRow(
                    device_id,
                    said.drive_id,
                    said.number,
                    said.phase,
                    said.attach_count,
                    image,
                    access,
                )
            )
        return found

    def hear(self, box: Box, event: SandboxEvent) -> None:
        """Compares what a sandbox says with what the store says at that moment."""
        self.reached[f"heard: {event.kind}"] += 1
        if event.device is not None:
            phase = next(
                (row.phase for row in self.rows(box) if row.device_id == event.device), "detached"
            )
            if phase not in SAID[event.kind]:
                box.ahead.append(f"{event.kind} of {event.device}, which is {phase} in the store")

    def check(self) -> None:
        self.judge_all()
        assert [said for box in self.boxes for said in box.ahead] == []
        rows = {box.name: self.rows(box) for box in self.boxes}
        for box in self.boxes:
            try:
                self._check_rows(box, rows[box.name])
                if box.sandbox is not None:
                    self._check_open(box)
                    self._look(box)
                self._compare_rows(box, rows[box.name])
            except AssertionError as wrong:
                wrong.add_note(f"{box.sandbox!r} {box.known} {box.blocks if box.sandbox else ''}")
                wrong.add_note(
                    f"rows {rows[box.name]}; machine {box.vm.backends.keys()} {box.vm.devices}; "
                    f"asked {box.vm.journal[-12:]}"
                )
                raise
        self._check_claims(rows)
        for call in self.calls:
            call.rivals = call.rivals or self._has_rivals(call)

    def _check_rows(self, box: Box, rows: list[StoredRow]) -> None:
        """At every moment, and whoever may be dead: the store knows all that the machine has, and
        never says more than is true."""
        assert len({row.number for row in rows}) == len({row.drive_id for row in rows}) == len(rows)
        vm = box.vm
        assert vm.backends.keys() | vm.devices.keys() <= {row.drive_id for row in rows}, (
            "the machine has what no row tells of"
        )
        box.lost &= {row.drive_id for row in rows}
        for row in rows:
            if row.drive_id in box.lost:
                box.known[self.identities.index(row.image or "")].open_up()
                box.known[self.identities.index(row.image or "")].counts.add(0)
        whole = vm.backends.keys() & vm.devices.keys()
        assert {row.drive_id for row in rows if row.phase == Phase.ATTACHED} - box.lost <= whole
        assert all(row.phase != Phase.DETACHED for row in rows)

    def _check_claims(self, rows: dict[str, list[StoredRow]]) -> None:
        claims = [(name, row.image, row.access or 0) for name, some in rows.items() for row in some]
        for name, image, access in claims:
            for other, other_image, other_access in claims:
                if name != other and image == other_image:
                    assert access & other_access, (
                        f"{name} and {other} both hold {image}: {access} and {other_access}"
                    )
        for number in range(len(self.images)):
            for box in self.boxes:
                if self.holds(box, number, surely=True):
                    assert not self.rivals(box, number, box.known[number].wish, surely=True)

    def _check_open(self, box: Box) -> None:
        holding = [device for device in box.blocks if device.phase in HOLDING]
        drives = {device.held.id for device in holding}
        assert len(drives) == len(holding)
        # of a batch that is just beginning
        planned = [index for index, _ in box.open._machine.allotment._planned.values()]
        assert sorted(box.open.index) == sorted(
            [*(device.held.index for device in holding), *planned]
        )
        assert all(device.drive is None for device in box.blocks if device.phase is Phase.DETACHED)
        assert box.vm.backends.keys() | box.vm.devices.keys() <= drives
        attached = {
            device.held.id for device in holding if device.phase is Phase.ATTACHED
        } - box.lost
        assert attached <= box.vm.backends.keys() & box.vm.devices.keys()

    def _look(self, box: Box) -> None:
        """The sandbox against the model, which learns what it could not know."""
        for image, known in enumerate(box.known):
            device = self.device(box, image)
            known.taken_back = known.taken_back and self.at_work(box)
            calls = known.taken_back or any(
                call.box is box and image in call.images for call in self.calls
            )
            if not calls:
                known.counts = {max(0, count) for count in known.counts}
            if device is None:
                if not calls:
                    assert 0 in known.counts, f"image {image} is lost"
                    known.counts, known.unsure = {0}, False
                continue
            self._meet(device, known)
            if device.operation is not None:
                assert calls or known.unsure, f"image {image}: for whom?"
            elif device.phase in PENDING:
                assert calls or known.unsure, f"image {image} is pending"
                box.doubtful.add(device.held.id)
                box.vm.gone.discard(device.held.id)
            elif device.phase is Phase.ATTACHED:
                self._look_attached(box, device, known, calls)
            else:
                assert calls, f"image {image} is not attached, and nobody wants it"

    def _meet(self, device: BlockDevice, known: Known) -> None:
        """A device is as it was asked for, and stays so."""
        wish = _wish_of(device)
        assert wish == known.wish if device.id == known.device_id else wish in known.asked
        known.device_id, known.wish = device.id, wish

    def _look_attached(self, box: Box, device: BlockDevice, known: Known, calls: bool) -> None:
        drive_id = device.held.id
        if drive_id not in box.vm.gone:  # else it may have been plugged in again under the same ID
            assert drive_id not in box.doubtful or drive_id in box.vm.kept, (
                "a pending device became attached though nobody kept it"
            )
        box.doubtful.discard(drive_id)
        box.vm.kept.discard(drive_id)
        box.told.discard(device.id)
        if calls:
            return
        assert device.ref_count <= device.attach_count, f"{device} has {device.ref_count} users"
        assert device.attach_count in known.counts, (
            f"image {device.info.path}: count {device.attach_count}"
        )
        known.counts, known.unsure = {device.attach_count}, False
        if drive_id in box.lost:
            known.counts.add(0)
            known.unsure = True

    def _compare_rows(self, box: Box, rows: list[StoredRow]) -> None:
        """At rest the store says what the sandbox knows."""
        if box.sandbox is None:
            found = {self.identities.index(row.image or ""): row for row in rows}
            for image, known in enumerate(box.known):
                row = found.get(image)
                count = row.attaches if row is not None and row.phase == Phase.ATTACHED else 0
                assert count in known.counts or (row is not None and known.unsure), (
                    f"image {image}: {row}"
                )
                assert row is None or known.unsure or count, f"image {image}: {row}"
            return
        if self.at_work(box) or any(call.box is box for call in self.calls):
            return
        have = [
            StoredRow(
                device.id, device.held.id, device.held.index, device.phase.value,
                device.attach_count,
                self.identities[self._image_of[device.info.path]],
                device.info.read_only + 2 * device.info.share,
            )
            for device in box.blocks if device.phase in HOLDING
        ]  # fmt: skip
        assert sorted(map(_plainly, rows)) == sorted(map(_plainly, have))

    def lose(self, box: Box, drive_id: str) -> None:
        """The guest lets go of a device; whether the sandbox learns of it is up to what it does
        next."""
        box.vm.lose(drive_id)
        for row in self.rows(box):
            if row.drive_id == drive_id:
                known = box.known[self.identities.index(row.image or "")]
                device = (
                    self.device(box, box.known.index(known)) if box.sandbox is not None else None
                )
                if (device.phase if device is not None else row.phase) == Phase.ATTACHED:
                    box.lost.add(drive_id)
                    known.open_up()
                    known.counts.add(0)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Another process holds the store's lock."""
        other = sqlite3.connect(self.path, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")
        finally:
            other.close()
