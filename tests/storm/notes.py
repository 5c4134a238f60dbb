"""What a process of the storm says of itself: one JSON line before each call and one after it, so
that its last words outlive it.

A line that was cut off by death is no line: the call that it would have told the end of is then
still under way.
"""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec


class DeviceSeen(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device as its sandbox sees it."""

    id: str
    drive: str
    image: str
    driver: str
    phase: str
    count: int
    index: int
    ordinal: int
    read_only: bool = False
    share: bool = False

    def __str__(self) -> str:
        access = "reads" if self.read_only else "shares" if self.share else "writes"
        return (
            f"{self.image} ({self.id}, {self.driver}, {access}): {self.phase}, count "
            f"{self.count}, index {self.index}, drive {self.drive}"
        )


class FindingSeen(msgspec.Struct, frozen=True, omit_defaults=True):
    """A difference that recovery found, and what became of it."""

    found: str
    outcome: str
    image: str
    drive: str
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.found} {self.outcome}: {self.image or '?'} as {self.drive} {self.note}".rstrip()
        )


class Picture(msgspec.Struct, frozen=True, omit_defaults=True):
    """A sandbox in which nothing is under way.

    :ivar probe: the index that one more image was given, and the lowest that was free.
    """

    devices: list[DeviceSeen] = []
    indexes: list[int] = []
    findings: list[FindingSeen] = []
    probe: tuple[int, int] | None = None


class Note(msgspec.Struct, omit_defaults=True):
    """One line.

    :ivar at: seconds on the host's monotonic clock, which all processes share.
    :ivar what: "begin" and "end" of a call; "opening", "opened", "settled", "closing", "closed";
        "intruded"; "fault", which never is right.
    :ivar call: the number of the call in its process.
    :ivar kind: the method that is called.
    :ivar how: its arguments, for the reader.
    :ivar sticky: its driver lets no disk go without a guest.
    :ivar result: "" for success, else the name of the exception.
    :ivar limit: the deadline that was given, in seconds; negative for none.
    """

    at: float
    what: str
    sandbox: str = ""
    call: int = 0
    kind: str = ""
    images: list[str] = []
    how: str = ""
    sticky: bool = False
    result: str = ""
    text: str = ""
    limit: float = -1.0
    picture: Picture | None = None
    findings: list[FindingSeen] = []

    def __str__(self) -> str:
        head = f"{self.at:.4f} {self.sandbox} {self.what}"
        if self.what in ("begin", "end"):
            head += f" #{self.call} {self.kind} {' '.join(self.images)} {self.how}".rstrip()
        if self.what == "end":
            head += f" -> {self.result or 'ok'}"
        if self.text:
            head += f" ({self.text})"
        if self.findings:
            head += f" found {'; '.join(map(str, self.findings))}"
        if self.picture is not None:
            head += f" with {'; '.join(map(str, self.picture.devices)) or 'nothing'}"
            if self.picture.findings:
                head += f", found {'; '.join(map(str, self.picture.findings))}"
        return head


class Pen:
    """Writes notes; :param file: the pipe's descriptor."""

    def __init__(self, file: int) -> None:
        self._file = file

    def write(self, what: str, sandbox: str = "", **more: Any) -> None:
        line = msgspec.json.encode(Note(time.monotonic(), what, sandbox, **more)) + b"\n"
        while line:  # a long one may be taken in parts
            line = line[os.write(self._file, line) :]


class Ear:
    """Reads them; :param file: the pipe's other end, which does not block."""

    _decoder = msgspec.json.Decoder(Note)

    def __init__(self, file: int) -> None:
        self.file = file
        self._rest = b""

    def read(self) -> list[Note]:
        """All that was written since."""
        parts = [self._rest]
        while True:
            try:
                data = os.read(self.file, 1 << 20)
            except BlockingIOError:
                break
            if not data:
                break
            parts.append(data)
        *lines, self._rest = b"".join(parts).split(b"\n")
        return [self._decoder.decode(line) for line in lines]
