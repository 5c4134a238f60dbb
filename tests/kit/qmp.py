"""A small synchronous QMP client, for looking at QEMU behind pyblock's back.

Tests compare what pyblock believes with what QEMU says, so this must share no code with pyblock.
One request is in flight at a time; events that arrive meanwhile are kept in the order in which they
came.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

Message = dict[str, Any]


class QmpRefused(Exception):
    """QEMU answered with an error; `reply` is the whole answer."""

    def __init__(self, request: Message, reply: Message) -> None:
        super().__init__(f"{request} -> {reply['error']['desc']}")
        self.reply = reply
        self.error_class: str = reply["error"]["class"]
        self.desc: str = reply["error"]["desc"]


class Qmp:
    def __init__(self, path: Path, timeout: float = 30) -> None:
        self.timeout = timeout
        self.events: list[Message] = []
        self._rest = b""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            self._read(time.monotonic() + timeout)  # the greeting
            self.command("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def command(self, name: str, arguments: Message | None = None, **more: Any) -> Any:
        """The `return` of a command. A key that is no Python name (`scsi-id`) goes into
        `arguments`."""
        request = {"execute": name, "arguments": {**(arguments or {}), **more}}
        reply = self.raw(request)
        if "error" in reply:
            raise QmpRefused(request, reply)
        return reply["return"]

    def raw(self, request: Message) -> Message:
        """Sends one request and returns the whole reply, errors too."""
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + self.timeout
        while "event" in (message := self._read(deadline)):
            self.events.append(message)
        return message

    def wait_event(self, name: str, timeout: float = 30, **data: Any) -> Message:
        """Takes the first event of this name whose data has these values, kept or still to come."""
        deadline = time.monotonic() + timeout
        while True:
            for event in self.events:
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    self.events.remove(event)
                    return event
            try:
                self.events.append(self._read(deadline))
            except TimeoutError:
                raise TimeoutError(
                    f"no {name} {data} within {timeout} s; other events: {self.events}"
                ) from None

    def close(self) -> None:
        self._socket.close()

    def _read(self, deadline: float) -> Message:
        while b"\n" not in self._rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            if not (data := self._socket.recv(65536)):
                raise ConnectionError("QEMU closed its monitor")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: Message = json.loads(line)
        return message
