"""The parent: it starts the processes and the machines, stops, kills and replaces them at random,
and compares what is left.

What happens when is drawn from the seed, so a seed repeats the plan; how far a process has got when
it is killed, the host decides.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import random
import re
import select
import signal
import sqlite3
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from .hog import Hog
from .judge import HANGS, SANDBOXES, SHARED, Judge, Options, Tenure
from .life import Life, Plan, Site
from .notes import Ear, Note, Pen
from .running import Running
from .sky import Sky
from .witness import Images, Stored, ask_qemu, differences, read_rows, rivals

SLOTS = 2  # processes at once
AGREES = 10.0  # seconds within which what is written in the background is written
# idle sets of a paused QEMU, which closes none, before it is replaced; each costs it a descriptor
# of its 1,024
SETS_MAX = 300


class Storm(Judge):
    """:param folder: for the images, the store and the machines' sockets; short, for a unix
    socket's path ends at 107 bytes."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.random = random.Random(options.seed)
        own = {name: [f"{name}-{letter}" for letter in "abc"] for name in SANDBOXES}
        sticky = {
            name: {"s3-blk0": "virtio-blk", "s3-blk1": "virtio-blk", "s3-nv": "nvdimm"}
            if name == "s3"
            else {}
            for name in SANDBOXES
        }
        probes = [f"{name}-probe" for name in SANDBOXES]
        (folder / "images").mkdir()
        images = Images(
            folder / "images",
            [*SHARED, *probes, *itertools.chain(*own.values()), *itertools.chain(*sticky.values())],
        )
        super().__init__(options, folder / "state.db", images)
        # A paused QEMU works faster; one that runs closes the descriptors that it is told to.
        # Neither has a guest.
        self.skies = {
            name: Sky(name, folder, runs=name == "s2", sticky=bool(sticky[name]))
            for name in SANDBOXES
        }
        self.sites = {
            name: Site(
                name,
                f"qemu:{self.skies[name].path}",
                "virtio-blk" if sticky[name] else "virtio-scsi",
                own[name],
                sticky[name],
            )
            for name in SANDBOXES
        }
        self.running: list[Running | None] = [None] * SLOTS
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count = itertools.count()
        self.hog: Hog | None = None
        # sandboxes in which something was wrong, which is gone when they have another QEMU
        self.unfit: set[str] = set()
        self.finishing = False
        self.emptied: set[str] = set()  # sandboxes that were told to empty themselves, at the end

    # The run.

    def run(self) -> None:
        """Raises Violation."""
        try:
            for sky in self.skies.values():
                sky.start()
            pipes = [file for sky in self.skies.values() for file in sky.files()]
            self.hog = Hog(self.store, f"{self.options.seed} hog", pipes)
            self._birth(0, {"s0", "s1"})
            self._birth(1, {"s2", "s3"})
            self._chaos()
            end = self.began + self.options.seconds
            while time.monotonic() < end and not (
                self.options.deaths and self.deaths >= self.options.deaths
            ):
                self._turn()
            self._finish()
        finally:
            self._close()

    def _turn(self) -> None:
        """What happens next: notes, deaths, and what is due."""
        wait = max(0.0, self.events[0][0] - time.monotonic()) if self.events else 0.05
        ears = [one.ear.file for one in self._living()]
        select.select(ears, [], [], min(wait, 0.05))
        self._listen()
        now = time.monotonic()
        while self.events and self.events[0][0] <= now:
            heapq.heappop(self.events)[2]()
        for one in self._living():
            for note in one.calls.values():
                if now - note.at > max(0.0, note.limit) + HANGS:
                    self._wrong("hang", f"{one}: a call hangs for {now - note.at:.0f} s: {note}")
            for name, since in one.opening.items():
                if now - since > 2 * HANGS:
                    self._wrong("hang", f"{one}: opening {name} hangs for {now - since:.0f} s")

    def _listen(self) -> None:
        checks, self.to_check = self.to_check, []
        for one in self._living():
            for note in one.ear.read():
                self._hear(one, note)
        for slot, running in enumerate(self.running):
            if running is not None and (done := os.waitpid(running.pid, os.WNOHANG))[0]:
                self._bury(slot, running, os.waitstatus_to_exitcode(done[1]))
        # What was said by the others before that has been heard by now.
        for name, tenure in checks:
            self._check_tenure(name, tenure)

    def _finish(self) -> None:
        """Both die once more; then one process takes everything out again, and nothing is left."""
        self.finishing = True
        self.events.clear()
        self._calm()
        for one in self._living():
            if not one.ended:
                self._kill(one)
        while any(self.running):
            self._turn()
        self._birth(0, set(SANDBOXES), last=True)
        while any(self.running):
            self._turn()
        left = [
            row
            for row in read_rows(self.store, self.images)
            if row.image not in self._sticky_images()
        ]
        if left:
            self._wrong("left over", f"everything is detached and closed, and the store has {left}")
        for name, sky in self.skies.items():
            lists = ask_qemu(sky.machine, self.images)
            backends = {
                drive: one
                for drive, one in lists.backends.items()
                if one.image not in self._sticky_images()
            }
            if backends or lists.others:
                self._wrong(
                    "left over",
                    f"everything is detached and closed, and the QEMU of {name} has {backends} "
                    f"{lists.others}",
                )

    def _sticky_images(self) -> set[str]:
        return {image for site in self.sites.values() for image in site.sticky}

    def _close(self) -> None:
        for one in self._living():
            one.go_on()
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
            os.close(one.ear.file)
            os.close(one.orders)
        self.running = [None] * SLOTS
        if self.hog is not None:
            self.hog.close()
        for sky in self.skies.values():
            if sky.started:
                sky.close()

    # Processes.

    def _living(self) -> list[Running]:
        return [one for one in self.running if one is not None]

    def _birth(self, slot: int, names: set[str], *, last: bool = False) -> None:
        choose = self.random
        self.lives += 1
        ending = (
            "empty"
            if last
            else choose.choices(("kill", "step", "pounce", "end", "long"), (35, 25, 25, 8, 7))[0]
        )
        step = choose.randint(0, 250) if ending == "step" else None
        plan = Plan(
            self.lives,
            f"{self.options.seed} {self.lives}",
            self.store,
            self.images.folder,
            list(SHARED),
            step,
            not last,
        )
        notes, write = os.pipe()
        read, orders = os.pipe()
        os.set_blocking(notes, False)
        with warnings.catch_warnings():
            # of forking beside threads: there are none
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            self._live(plan, names, write, read, {notes, orders})
        os.close(write)
        os.close(read)
        one = Running(plan, pid, Ear(notes), orders)
        one.sandboxes = set(names)
        self.running[slot] = one
        self._log(
            f"{one} begins with {' '.join(sorted(names))}, to {ending}"
            + (f" at step {step}" if step is not None else "")
        )
        if ending == "pounce":
            one.pounce = choose.randint(1, 5)
        if ending in ("kill", "step"):
            # A step may never be reached; in the first half second recovery is under way.
            self._later(
                choose.choice((0.2, 0.5, 1.0, 2.0)) * choose.random()
                + (5.0 if step is not None else 0.0),
                lambda: self._kill(one),
            )
        elif ending in ("end", "long"):
            self._later(
                choose.uniform(0.3, 1.5) if ending == "end" else choose.uniform(4.0, 10.0),
                lambda: self._end(one),
            )

    def _live(self, plan: Plan, names: set[str], write: int, read: int, others: set[int]) -> None:
        """The child, which never returns."""
        status = 97
        try:
            assert self.hog is not None
            files = {file for one in self._living() for file in (one.ear.file, one.orders)}
            for file in (
                others
                | files
                | {self.hog.file}
                | {file for sky in self.skies.values() for file in sky.files()}
            ):
                os.close(file)
            Life(plan, self.sites, write, read).run(sorted(names))
            status = 0
        except BaseException:
            Pen(write).write("fault", text=traceback.format_exc()[-3000:])
        finally:
            os._exit(status)

    def _kill(self, one: Running) -> None:
        if one in self.running and one.killed is None:
            one.killed = time.monotonic()
            os.kill(one.pid, signal.SIGKILL)
            self._log(f"{one} is killed")

    def _end(self, one: Running) -> None:
        """Ends it in good order."""
        if one in self.running and one.killed is None:
            one.go_on()
            one.ended = True
            one.order("end")
            self._log(f"{one} is to end")

    def _bury(self, slot: int, one: Running, status: int) -> None:
        for note in one.ear.read():
            self._hear(one, note)
        self._log(f"{one} is dead: {status}")
        meant = status == -signal.SIGKILL and (one.killed is not None or one.plan.step is not None)
        if not meant and not (status == 0 and one.ended):
            self._wrong("exit", f"{one} ended with {status}")
        os.close(one.ear.file)
        os.close(one.orders)
        self.running[slot] = None
        until = one.killed if one.killed is not None else one.last
        for name in SANDBOXES:
            self.tenures[name] = [
                each._replace(until=until)
                if each.process == one.plan.number and each.until is None
                else each
                for each in self.tenures[name][-50:]
            ]
        if status:
            self.deaths += 1
        self._weigh(one)
        if self.finishing:
            return
        names = one.sandboxes
        for name in sorted(names):
            sky = self.skies[name]
            worn = name in self.unfit or self._is_worn(sky)
            if self.random.random() < (0.3 if self.sites[name].sticky else 0.03) or worn:
                self._replace(name)
        other = next(iter(self._living()), None)
        choose = self.random
        if (
            other is not None
            and other.killed is None
            and not other.ended
            and len(names) > 1
            and (len(names) > 2 or choose.random() < 0.3)
        ):
            name = choose.choice(sorted(names))
            if len(other.sandboxes) < 3:
                names = names - {name}
                other.sandboxes.add(name)
                other.opening[name] = time.monotonic()
                other.order(f"open {name}")
                self._log(f"{other} is to take over {name}")
        self._birth(slot, names)

    def _is_worn(self, sky: Sky) -> bool:
        if sky.runs:
            return False
        self._calm()
        return len(ask_qemu(sky.machine, self.images).idle) > SETS_MAX

    def _replace(self, name: str) -> None:
        """Another QEMU at the same address; nobody has the sandbox open. Where something was wrong,
        the store begins anew too."""
        sky = self.skies[name]
        sky.close()
        sky.start()
        if name in self.unfit:
            self.unfit.discard(name)
            with contextlib.closing(sqlite3.connect(self.store, timeout=30)) as db:
                db.execute("DELETE FROM device WHERE sandbox = ?", (name,))
                db.commit()
        self.books[name].replace_machine()
        self.weather["QEMU started anew"] += 1
        self._log(f"the QEMU of {name} is started anew")

    # What happens to them.

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time.monotonic() + seconds, next(self.count), what))

    def _chaos(self) -> None:
        """Something happens, and then again."""
        choose = self.random
        what = choose.choices(
            (self._stop_process, self._stop_qemu, self._watch, self._intrude, self._squeeze),
            (2, 3, 3, 1, 1),
        )[0]
        what()
        self._later(choose.expovariate(10.0), self._chaos)

    def _stop_process(self) -> None:
        if living := [one for one in self._living() if one.killed is None and not one.stopped]:
            one = self.random.choice(living)
            seconds = self.random.choice((0.01, 0.05, 0.4)) * self.random.random()
            one.stop()
            self._log(f"{one} is stopped for {seconds * 1000:.0f} ms")
            self.weather["process stopped"] += 1
            self._later(seconds, lambda: one.go_on() if one in self.running else None)

    def _squeeze(self) -> None:
        """One is stopped, maybe in the middle of a transaction; when it goes on, another, which may
        have waited for that, is killed."""
        living = [
            one
            for one in self._living()
            if one.killed is None and not one.stopped and not one.ended
        ]
        if len(living) == SLOTS:
            one, other = self.random.sample(living, 2)
            seconds, more = 0.05 * self.random.random(), 0.01 * self.random.random()
            one.stop()
            self._log(
                f"{one} is stopped for {seconds * 1000:.0f} ms, and {other} to be killed "
                f"{more * 1000:.1f} ms later"
            )
            self.weather["squeezed"] += 1
            self._later(seconds, lambda: one.go_on() if one in self.running else None)
            self._later(seconds + more, lambda: self._kill(other))

    def _stop_qemu(self) -> None:
        name = self.random.choice(SANDBOXES)
        sky, number = self.skies[name], self.skies[name].started
        seconds = self.random.choice((0.005, 0.02, 0.1, 0.6)) * self.random.random()
        sky.stop()
        self._log(f"the QEMU of {name} is stopped for {seconds * 1000:.0f} ms")
        self.weather["QEMU stopped"] += 1
        self._later(seconds, lambda: sky.go_on() if sky.started == number else None)

    def _intrude(self) -> None:
        living = [one for one in self._living() if one.killed is None and not one.ended]
        if len(living) == SLOTS and not self.finishing:
            one, other = self.random.sample(living, 2)
            if other.sandboxes:
                name = self.random.choice(sorted(other.sandboxes))
                one.order(f"intrude {name}")
                self.weather["tried to open another's"] += 1

    def _calm(self) -> None:
        for sky in self.skies.values():
            sky.go_on()
        for one in self._living():
            one.go_on()

    def _watch(self) -> None:
        """What is open in every QEMU at one moment: no writer beside another, and nothing of which
        the store does not know."""
        for sky in self.skies.values():
            sky.go_on()
        before = {name: ask_qemu(sky.machine, self.images) for name, sky in self.skies.items()}
        rows = {(row.sandbox, row.drive): row for row in read_rows(self.store, self.images)}
        after = {name: ask_qemu(sky.machine, self.images) for name, sky in self.skies.items()}
        self.watches += 1
        # What both lists have and what did not leave in between was there at the moment between
        # them.
        there = [
            (name, drive, opened)
            for name, lists in before.items()
            for drive, opened in lists.backends.items()
            if after[name].backends.get(drive) == opened
            and drive not in lists.gone | after[name].gone
        ]
        known: list[Stored] = []
        for name, drive, opened in there:
            row = rows.get((name, drive))
            if row is None and not self.books[name].replaced:
                self._wrong(
                    "unclaimed",
                    f"{name}: QEMU has {drive} open ({opened}), of which the store knew nothing "
                    "at that moment",
                )
            if row is not None:
                if row.image != opened.image:
                    self._wrong(
                        "wrong image",
                        f"{name}: QEMU has {opened} open as {drive}, and {row.image} is claimed "
                        f"for it: {row}",
                    )
                known.append(row)
        if wrong := rivals(known):
            self._wrong("two writers", f"at one moment, in two QEMUs: {wrong[0]}")
        if wrong := rivals(list(rows.values())):
            self._wrong("two claims", wrong[0])
        for one in self._living():
            if one.memory:
                one.measure()

    # What they say.

    def _hear(self, one: Running, note: Note) -> None:
        one.last = note.at
        self.trail.append(f"{note} [{one.plan.number}]")
        book = self.books.get(note.sandbox)
        match note.what:
            case "fault":
                self._wrong("fault", f"{one}, {note.sandbox}: {note.text}")
                self.unfit.update({note.sandbox} & set(SANDBOXES))
                self._kill(one)
            case "begin":
                one.calls[note.call] = note
                assert book is not None
                book.begin(note)
            case "end":
                begun = one.calls.pop(note.call)
                assert book is not None
                book.end(note)
                self._judge(one, note, note.at - begun.at)
                self._pounce(one, note)
            case "opening":
                one.opening[note.sandbox] = note.at
            case "opened":
                tenure = Tenure(one.plan.number, note.at, None)
                self.tenures[note.sandbox].append(tenure)
                self.to_check.append((note.sandbox, tenure))
            case "settled":
                one.opening.pop(note.sandbox, None)
                self._settle(one, note)
            case "closing":
                self.tenures[note.sandbox] = [
                    each._replace(until=note.at)
                    if each.process == one.plan.number and each.until is None
                    else each
                    for each in self.tenures[note.sandbox]
                ]
                self._judge_findings(note.sandbox, note.findings)

    def _pounce(self, one: Running, note: Note) -> None:
        """Kills it just after a call whose work goes on."""
        if one.pounce and (
            note.result == "AttachPending" or (note.result and self.random.random() < 0.1)
        ):
            one.pounce -= 1
            if not one.pounce:
                self._later(
                    self.random.choice((0.0, 0.001, 0.004)) * self.random.random(),
                    lambda: self._kill(one),
                )

    def _settle(self, one: Running, note: Note) -> None:
        """A sandbox was opened and is at rest until it is told to go on: everything is compared."""
        name, picture, sky = note.sandbox, note.picture, self.skies[note.sandbox]
        assert picture is not None
        if one.killed is not None:  # it may have gone since; who opens it next will say the same
            return
        self._calm()
        self._judge_findings(name, picture.findings)
        wrong = [f"{name}: {text}" for text in self.books[name].settle(picture.devices)]
        if picture.probe is None or picture.probe[0] != picture.probe[1]:
            wrong.append(
                f"{name}: one more image was given an index as (given, lowest free): "
                f"{picture.probe}"
            )
        end = time.monotonic() + AGREES
        while True:
            lists = ask_qemu(sky.machine, self.images)
            rows = read_rows(self.store, self.images)
            differs = differences(
                picture.devices,
                picture.indexes,
                [row for row in rows if row.sandbox == name],
                lists,
            )
            differs += self._idle_sets(sky, lists)
            if not differs or time.monotonic() > end:
                break
            time.sleep(0.01)
            if os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
        wrong += [f"{name}: {text}" for text in differs] + rivals(rows)
        if wrong:
            seen = [f"the sandbox: {picture}", *map(str, rows), str(lists)]
            kind = re.sub(
                r"\b(s\d|[0-9a-f]{16}|s\d-\w+|[xyz]|\d+)\b",
                "_",
                wrong[0].partition("\n")[0].partition(" (")[0],
            )[:80]
            self._wrong(
                kind,
                "\n  ".join([f"{one}, {name} has settled, and it does not fit:", *wrong, *seen]),
            )
            self.unfit.add(name)
            return self._kill(one)
        self.settled += 1
        one.measure()
        one.order(f"{'empty' if self.finishing else 'go'} {name}")
        if self.finishing:
            self.emptied.add(name)
            if len(self.emptied) == len(SANDBOXES):
                one.ended = True
                one.order("end")


@contextlib.contextmanager
def storm(options: Options) -> Iterator[Storm]:
    """A storm in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="storm-", dir="/tmp") as folder:
        yield Storm(Path(folder), options)
