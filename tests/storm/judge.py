"""What must hold whatever the weather is, and the log that a failure is shown with.

A process has a sandbox for certain from when it said that it had opened it until it said that it
was about to close it, or died. So two such times that overlap are a fault, however late they were
heard of.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from .book import Book
from .notes import FindingSeen, Note
from .running import Running
from .sky import Sky
from .witness import Images, Lists

SANDBOXES = ("s0", "s1", "s2", "s3")
SHARED = ("x", "y", "z")
# seconds that a call may take beyond its deadline, which is far more than any pause here
HANGS = 60.0
TRAIL = 60  # lines of a failure's report
FILES_MAX = 64  # descriptors of a process with four sandboxes at most
GROWTH_MAX = 32 << 20  # bytes that a process may grow by after its first sandbox has settled
# What ends a call of a client that did nothing wrong. Another error is a fault, and so is an
# exception that is none of pyblock's.
MAY_END = {
    "attach": {"ImageInUse", "DeviceConflict"},
    "attach_many": {"ImageInUse", "DeviceConflict"},
    "detach": set[str](),
    "resume": set[str](),
    "detach_many": set[str](),
    "reconcile": set[str](),
}
MAY_END_ANY = {
    "DeadlinePassed",
    "AttachPending",
    "DetachPending",
    "StoreBusy",
    "VmmUnreachable",
    "ConnectionLost",
    "SandboxClosed",
    "ClosedMeanwhile",
    "CancelledError",
}
MAY_END_STICKY = {"VmmRefused", "SlotsExhausted"}


class Violation(Exception):
    """What must hold does not; :param kind: a word for what."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Tenure(NamedTuple):
    """From when till when a process had a sandbox for certain."""

    process: int
    since: float
    until: float | None


class Options(NamedTuple):
    """What a run is to be.

    :ivar deaths: ends it before the seconds are over; 0 for no such end.
    :ivar keep_going: notes what is wrong, and goes on.
    """

    seconds: float
    seed: int
    deaths: int = 0
    keep_going: bool = False


class Judge:
    """:param store: the database. :param images: all that there are."""

    def __init__(self, options: Options, store: Path, images: Images) -> None:
        self.options = options
        self.store = store
        self.images = images
        self.books = {name: Book() for name in SANDBOXES}
        self.tenures: dict[str, list[Tenure]] = {name: [] for name in SANDBOXES}
        self.to_check: list[tuple[str, Tenure]] = []
        self.trail: deque[str] = deque(maxlen=20_000)
        self.lives = self.deaths = self.watches = self.settled = self.calls = 0
        self.ends: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.weather: Counter[str] = Counter()
        self.most_memory = self.most_growth = self.most_files = 0
        self.wrong: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.began = time.monotonic()

    def _wrong(self, kind: str, text: str) -> None:
        """What must hold does not."""
        violation = Violation(kind, text)
        if not self.options.keep_going:
            raise violation
        self.wrong[kind] += 1
        self.examples.setdefault(kind, self.report(violation))

    def _log(self, text: str) -> None:
        self.trail.append(f"{time.monotonic():.4f} -- {text}")

    def _judge(self, one: Running, note: Note, took: float) -> None:
        self.calls += 1
        self.ends[f"{note.kind} {note.result or 'ok'}"] += 1
        allowed = note.result in MAY_END[note.kind] | MAY_END_ANY or (
            note.sticky and note.result in MAY_END_STICKY
        )
        if note.result and not allowed:
            self._wrong(
                f"{note.kind} {note.result}", f"{one}: a call that should not ended so: {note}"
            )
        if note.result == "ImageInUse" and not any(image in SHARED for image in note.images):
            self._wrong("false ImageInUse", f"{one}: nobody else has the image: {note}")
        if took > max(0.0, note.limit) + HANGS:
            self._wrong("late", f"{one}: took {took:.1f} s: {note}")
        self._judge_findings(note.sandbox, note.findings)

    def _judge_findings(self, name: str, findings: list[FindingSeen]) -> None:
        for one in findings:
            self.found[f"{one.found} {one.outcome}"] += 1
            if one.found == "orphan":
                self._wrong("orphan", f"{name}: QEMU has something that nobody knows: {one}")
            if one.found == "lost" and not self.books[name].replaced:
                self._wrong(
                    "false lost", f"{name}: reported lost, and its QEMU never lost it: {one}"
                )

    def _check_tenure(self, name: str, tenure: Tenure) -> None:
        for other in self.tenures[name]:
            if (
                other.process != tenure.process
                and other.since <= tenure.since
                and (other.until is None or other.until > tenure.since)
            ):
                self._wrong(
                    "two owners",
                    f"{name} was opened by process {tenure.process} while process {other.process} "
                    "had it open",
                )

    def _weigh(self, one: Running) -> None:
        if not one.memory:
            return
        growth = max(one.memory) - one.memory[0]
        self.most_memory = max(self.most_memory, *one.memory)
        self.most_growth, self.most_files = (
            max(self.most_growth, growth),
            max(self.most_files, one.files),
        )
        if growth > GROWTH_MAX:
            self._wrong(
                "memory", f"{one} grew by {growth / 2**20:.1f} MiB; {GROWTH_MAX >> 20} are allowed"
            )
        if one.files > FILES_MAX:
            self._wrong(
                "descriptors", f"{one} had {one.files} descriptors open; {FILES_MAX} are allowed"
            )

    def _idle_sets(self, sky: Sky, lists: Lists) -> list[str]:
        return (
            [f"QEMU, which runs, has sets of descriptors that nothing uses: {lists.idle}"]
            if sky.runs and lists.idle
            else []
        )

    # What is said of it.

    def summary(self) -> list[str]:
        seconds = time.monotonic() - self.began
        return [
            f"{seconds:.0f} s, seed {self.options.seed}: {self.lives} processes, {self.deaths} "
            f"killed, {self.calls:,} calls, "
            f"{self.settled} sandboxes compared after opening, {self.watches} looks at all QEMUs "
            "at once",
            "calls: " + ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.ends.items())),
            "weather: "
            + ", ".join(f"{kind} {count}" for kind, count in sorted(self.weather.items())),
            "recovery found: "
            + (
                ", ".join(f"{kind} {count}" for kind, count in sorted(self.found.items()))
                or "nothing"
            ),
            *(f"WRONG {count} times: {kind}" for kind, count in self.wrong.most_common()),
            f"a process: at most {self.most_memory / 2**20:.1f} MiB, "
            f"{self.most_growth / 2**20:.1f} more than when its first sandbox "
            f"had settled, {self.most_files} descriptors",
        ]

    def report(self, violation: BaseException) -> str:
        """Readable: what differs, the seed, and the last that was done."""
        text = str(violation) or repr(violation)
        named = [name for name in SANDBOXES if name in text]
        lines = [
            line
            for line in self.trail
            if not named or " -- " in line or any(f" {name} " in line for name in named)
        ]
        return "\n".join(
            [
                (
                    f"VIOLATION after {self.deaths} deaths and {self.calls:,} calls, seed "
                    f"{self.options.seed}: {text}"
                ),
                "the last of it:",
                *lines[-TRAIL:],
            ]
        )
