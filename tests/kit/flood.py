"""A process before a QMP monitor that floods its client with events: between the first `device_add`
and the reply to it, as many as wanted.

It is a process of its own, so that what it needs is not taken for what its client needs. Everything
else it passes on as it comes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

# As QEMU writes them. Nobody asked for the first; the second is one that whoever unplugs disks
# listens for.
EVENTS = (
    b'{"timestamp": {"seconds": 1700000000, "microseconds": 123456}, "event": "RTC_CHANGE", '
    b'"data": {"offset": 1, "qom-path": "/machine/rtc"}}\r\n'
    b'{"timestamp": {"seconds": 1700000000, "microseconds": 123457}, "event": "DEVICE_DELETED", '
    b'"data": {"device": "strange", "path": "/machine/peripheral/strange"}}\r\n'
)
AT_ONCE = 500  # pairs of events in one write


class Flood:
    """A context manager. :param path: where it listens. :param target: QEMU's own socket. :param
    events: how many, once."""

    def __init__(self, path: Path, target: Path, events: int) -> None:
        self.path = path
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(8)
        with warnings.catch_warnings():
            # of forking beside threads; the child touches none of theirs
            warnings.simplefilter("ignore", DeprecationWarning)
            self._child = os.fork()
        if self._child == 0:
            try:
                _serve(listener, target, events)
            finally:
                os._exit(0)
        listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)
        self.path.unlink(missing_ok=True)


def _serve(listener: socket.socket, target: Path, events: int) -> None:
    to_come = [events]
    while True:
        client, _ = listener.accept()
        # the client hung up
        with client, socket.socket(socket.AF_UNIX) as qemu, contextlib.suppress(OSError):
            qemu.connect(str(target))
            _pass_on(client, qemu, to_come)


def _pass_on(client: socket.socket, qemu: socket.socket, to_come: list[int]) -> None:
    """Until either hangs up. QEMU's lines are passed on whole, so the flood comes between two."""
    rest = b""
    while True:
        for ready in select.select([client, qemu], [], [])[0]:
            data = ready.recv(65536)
            if not data:
                return
            if ready is qemu:
                lines, newline, rest = (rest + data).rpartition(b"\n")
                client.sendall(lines + newline)
                continue
            if to_come and b'"device_add"' in data:
                for _ in range(to_come.pop() // (2 * AT_ONCE)):
                    client.sendall(EVENTS * AT_ONCE)
            qemu.sendall(data)
