"""The command line as a program, with a state folder of its own; and on a terminal."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-c", "from pyblock.cli import main; main()"]
OWN = "its own"  # the machine that a shell comes with
LONG = 60.0  # seconds: nothing takes that long that ends by itself

Done = subprocess.CompletedProcess[str]


class Shell:
    """Runs pyblock with a state folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vm = self.machine("vm1")
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYBLOCK_VM", "PYBLOCK_SANDBOX", "COLUMNS")
        }
        self.environment["PYBLOCK_STATE_DIR"] = str(folder)

    def __call__(self, *arguments: str | Path, vm: str | None = OWN, patch: str = "") -> Done:
        """One command, whatever its end. `patch` is Python that runs before it."""
        command = self.command(*arguments, vm=vm, patch=patch)
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=LONG, check=False
        )

    def run_in_store(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs what another program would do that uses the same state folder."""
        had = os.environ.get("PYBLOCK_STATE_DIR")
        os.environ["PYBLOCK_STATE_DIR"] = str(self.folder)
        try:
            asyncio.run(work())
        finally:
            if had is not None:
                os.environ["PYBLOCK_STATE_DIR"] = had

    def machine(self, name: str) -> str:
        """The address of a machine that outlives the commands, made where it is not there yet."""
        path = self.folder.parent / name
        path.touch()
        return f"memory:{path}"

    def command(self, *arguments: str | Path, vm: str | None = OWN, patch: str = "") -> list[str]:
        vm = self.vm if vm == OWN else vm
        program = (
            [sys.executable, "-c", f"{patch}\nfrom pyblock.cli import main; main()"]
            if patch
            else PROGRAM
        )
        return [*program, *(["--vm", vm] if vm is not None else []), *map(str, arguments)]

    def fine(self, *arguments: str | Path, vm: str | None = OWN) -> str:
        """The output of a command that ends well and complains of nothing."""
        done = self(*arguments, vm=vm)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def json(self, *arguments: str | Path, vm: str | None = OWN) -> Any:
        return json.loads(self.fine(*arguments, "--json", vm=vm))

    def refused(self, *arguments: str | Path, vm: str | None = OWN) -> str:
        """The one line that a refused command says."""
        done = self(*arguments, vm=vm)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("pyblock: ")
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    def misused(self, *arguments: str | Path, vm: str | None = OWN) -> str:
        done = self(*arguments, vm=vm)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
        return done.stderr


def on_terminal(
    shell: Shell, *arguments: str | Path, vm: str | None = OWN, columns: int = 100
) -> tuple[int, str]:
    """The status of a command, and what it wrote to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**shell.environment, "TERM": "xterm"}
    command = shell.command(*arguments, vm=vm)
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        text = b""
        try:
            while data := os.read(ours, 65536):
                text += data
        except OSError:  # how Linux reports that nobody has the other end open
            pass
        finally:
            os.close(ours)
    return process.returncode, text.decode().replace("\r\n", "\n")
