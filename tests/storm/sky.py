"""A machine of the storm: where a QEMU without a guest listens, whichever QEMU that is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from kit import Machine


class Sky:
    """:param runs: QEMU's clock does; a paused one is quicker, and closes no descriptor that it is
    told to.
    :param sticky: it has places for disks that do not leave without a guest.

    :ivar stopped: QEMU's process is.
    """

    def __init__(self, name: str, folder: Path, *, runs: bool, sticky: bool) -> None:
        self.name = name
        self.path = folder / f"{name}.qmp"
        self.runs = runs
        self._sticky = sticky
        self.stopped = False
        self.machine: Machine
        self.started = 0

    def start(self) -> None:
        extra = ("-qmp", f"unix:{self.path},server=on,wait=off")
        ports, slots = (4, 4) if self._sticky else (0, 0)
        self.machine = Machine(guest=False, ports=ports, nvdimm_slots=slots, extra=extra)
        self.machine.__enter__()
        if self.runs:
            self.machine.side.command("cont")
        self.started += 1

    def files(self) -> list[int]:
        """Descriptors that only this process may have: QEMU's watcher waits until the pipe is
        nobody's."""
        assert self.machine._process is not None and self.machine._process.stdin is not None
        return [self.machine.side._socket.fileno(), self.machine._process.stdin.fileno()]

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            os.kill(self.machine.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        if self.stopped:
            self.stopped = False
            os.kill(self.machine.pid, signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        self.machine.close()
