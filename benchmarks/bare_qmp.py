"""The floor: a bare QMP socket, every byte prepared beforehand, the next command sent when the last was answered or all at once."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Command = tuple[str, dict[str, Any]]


class BareQmp:
    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.one_by_one(encode([("qmp_capabilities", {})]))

    def one_by_one(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            self._socket.sendall(line)
            self._answers(1)

    def at_once(self, lines: Sequence[bytes]) -> None:
        self._socket.sendall(b"".join(lines))
        self._answers(len(lines))

    def _answers(self, count: int) -> None:
        while count:
            line = self._file.readline()
            if line.startswith(b'{"return"'):
                count -= 1
            elif b'"error"' in line or not line:
                raise RuntimeError(line.decode())

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def encode(commands: Sequence[Command]) -> list[bytes]:
    return [json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n" for name, arguments in commands]


def scsi_commands(paths: Sequence[Path]) -> list[Command]:
    """What pyblock sends for these disks at indexes 0, 1, 2…."""
    commands: list[Command] = []
    for index, path in enumerate(paths):
        file = {"driver": "file", "filename": str(path), "read-only": False}
        commands.append(("blockdev-add", {"driver": "raw", "node-name": f"d{index}", "read-only": False, "file": file}))
        target, lun = divmod(index, 256)
        place = {"bus": "scsi0.0", "channel": 0, "scsi-id": target, "lun": lun}
        commands.append(("device_add", {"driver": "scsi-hd", **place, "id": f"d{index}", "drive": f"d{index}", "serial": f"serial{index}"}))
    return commands
