"""Real loop devices and partitions on them, which only root can make; where there are none, the
test says so and is skipped."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Loops:
    """What was made, to be taken down in the opposite order."""

    def __init__(self) -> None:
        self._undo: list[list[str]] = []

    def loop(self, image: Path | str, *more: str) -> str:
        """A loop device over an image; `more` is for losetup."""
        loop = self._run("losetup", *more, "--find", "--show", str(image))
        self._undo.append(["losetup", "--detach", loop])
        return loop

    def partition(self, disk: str, number: int, start: int, length: int) -> str:
        """A partition, which the kernel is told of (it need not know any kind of table); start and
        length in sectors of 512 bytes."""
        self._run("addpart", disk, str(number), str(start), str(length))
        self._undo.append(["delpart", disk, str(number)])
        partition = f"{disk}p{number}"
        if not Path(partition).exists():
            pytest.skip(f"no device node {partition} appears here")
        return partition

    def over_another(self, loop: str, image: Path) -> None:
        """Has the loop device be one over another image."""
        self._run("losetup", "--detach", loop)
        self._run("losetup", loop, str(image))

    def _run(self, *command: str) -> str:
        if shutil.which(command[0]) is None:
            pytest.skip(f"no {command[0]} here")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def take_down(self) -> None:
        for command in reversed(self._undo):
            subprocess.run(command, check=False, capture_output=True)


@contextmanager
def loop_devices() -> Iterator[Loops]:
    loops = Loops()
    try:
        yield loops
    finally:
        loops.take_down()
