"""A process of the storm, as its parent sees it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from .life import Plan
from .notes import Ear, Note


class Running:
    """:ivar killed: when it was sent SIGKILL.
    :ivar last: when it last said something.
    :ivar calls: those that are under way.
    :ivar opening: since when it has been opening a sandbox.
    :ivar ended: it was told to end.
    :ivar pounce: how many more calls end with their work going on until it is killed just after
        one; 0: it is not.
    :ivar memory: bytes, each time that it was looked at.
    :ivar files: the most descriptors that it had.
    """

    def __init__(self, plan: Plan, pid: int, ear: Ear, orders: int) -> None:
        self.plan = plan
        self.pid = pid
        self.ear = ear
        self.orders = orders
        self.stopped = False
        self.killed: float | None = None
        self.last = time.monotonic()
        self.calls: dict[int, Note] = {}
        self.opening: dict[str, float] = {}
        self.sandboxes: set[str] = set()
        self.ended = False
        self.pounce = 0
        self.memory: list[int] = []
        self.files = 0

    def __str__(self) -> str:
        return f"process {self.plan.number} (pid {self.pid})"

    def order(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has just died
            os.write(self.orders, f"{text}\n".encode())

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        if self.stopped:
            self.stopped = False
            os.kill(self.pid, signal.SIGCONT)

    def measure(self) -> None:
        try:
            self.memory.append(
                int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
                * os.sysconf("SC_PAGE_SIZE")
            )
            self.files = max(self.files, len(os.listdir(f"/proc/{self.pid}/fd")))  # noqa: PTH208
        except (OSError, IndexError):
            pass  # it has just died
