"""The floor: a bare blocking QMP socket, every byte prepared beforehand, each command sent when the
last was answered, or all at once."""

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
    return [
        json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
        for name, arguments in commands
    ]


def plain_commands(paths: Sequence[Path], driver: str = "virtio-scsi") -> list[Command]:
    """Two commands a disk as anybody would write them: short names, a serial, the image's path,
    nothing that QEMU assumes anyway.

    virtio-blk: the ports are `rp0`, `rp1`, ….
    """
    commands: list[Command] = []
    for index, path in enumerate(paths):
        name, file = f"d{index}", {"driver": "file", "filename": str(path)}
        commands.append(("blockdev-add", {"driver": "raw", "node-name": name, "file": file}))
        target, lun = divmod(index, 256)
        place: dict[str, Any] = {"driver": "virtio-blk-pci", "bus": f"rp{index}"}
        if driver == "virtio-scsi":
            place = {"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": target, "lun": lun}
        commands.append(
            ("device_add", {**place, "id": name, "drive": name, "serial": f"serial{index}"})
        )
    return commands
