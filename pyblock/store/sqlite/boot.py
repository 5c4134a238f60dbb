"""Which boot of the host this is: machines end with their host, so what an earlier boot wrote down
is of no machine any more.

Taking a boot for another would give running machines' images to others, so it has to be proved, and
by more than one witness:

- the kernel's boot_id. A container may have a file of its own in its place, so it counts only where
  the kernel itself says that the file read is the one of procfs (the mount that it was opened on),
  and is unknown otherwise.
- the time at which the host was started, as its clocks tell it. It is no proof by itself: it moves
  when the date is set, and in a time namespace; so it only has to differ too.

What is unknown, or told by one witness alone, is doubt; what is kept in doubt costs no more than a
`pyblock forget`.
"""

from __future__ import annotations

import errno
import re
import time
from typing import NamedTuple

# seconds that the start may seem to move within a boot: rounding, a leap second. No host is started
# again so soon
SLACK = 5.0
# seconds between two looks at one clock, for another clock's time between them to be of the same
# moment
BRIEF = 0.1
TRIES = 100

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_IN_PROCFS = "/sys/kernel/random/boot_id"
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM)


class Boot(NamedTuple):
    """A boot of the host.

    :ivar id: the kernel's boot_id, "" where it cannot be told.
    :ivar started: the date in seconds at which it began, None where it cannot be told.
    """

    id: str
    started: float | None

    def is_not(self, other: Boot) -> bool:
        """Whether the two are certainly different boots. False: the same one, or it cannot be
        told."""
        return bool(self.id and other.id and self.id != other.id) and self._began_apart(other)

    def says_as_much_as(self, other: Boot) -> bool:
        """Whether both would be told apart from a third alike."""
        return (
            self.id == other.id
            and (self.started is None) == (other.started is None)
            and not self._began_apart(other)
        )

    def _began_apart(self, other: Boot) -> bool:
        return (
            self.started is not None
            and other.started is not None
            and abs(self.started - other.started) > SLACK
        )


def this_boot() -> Boot:
    """The boot in which this process lives. Raises OSError when it cannot be looked at now (no
    descriptor free)."""
    return Boot(_boot_id(), _started())


def _boot_id() -> str:
    """The kernel's own, "" where something else stands in its place."""
    try:
        with open(_BOOT_ID) as file:  # noqa: PTH123
            text = file.read(100).strip()
            return (
                text
                if _is_the_kernels(file.fileno()) and re.fullmatch("[0-9a-f-]{36}", text)
                else ""
            )
    except OSError as error:
        if error.errno in _ABSENT:
            return ""
        raise


def _is_the_kernels(file: int) -> bool:
    """Whether an open file is procfs's boot_id: its mount is of procfs, and has it at that
    place."""
    with open(f"/proc/self/fdinfo/{file}") as info:  # noqa: PTH123
        found = re.search(r"^mnt_id:\s*(\d+)$", info.read(), re.MULTILINE)
    if found is None:
        return False
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:  # noqa: PTH123
        for line in mounts:
            # ID, parent's ID, device, root within the file system, where it is mounted, options…,
            # "-", type, source, options
            mount, _, _, root, place, *rest = line.split(" ")
            if mount == found[1]:
                kind = rest[rest.index("-") + 1]
                within = root.rstrip("/") + _BOOT_ID.removeprefix(place)
                return kind == "proc" and _BOOT_ID.startswith(place) and within == _IN_PROCFS
    return False


def _started() -> float | None:
    for _ in range(TRIES):
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        now = time.time()
        after = time.clock_gettime(time.CLOCK_BOOTTIME)
        if after - before < BRIEF:
            return now - before
    return None


def encode(boot: Boot) -> bytes:
    """As a line of text."""
    return (
        f"boot {boot.id or '-'} {'-' if boot.started is None else format(boot.started, '.3f')}\n"
    ).encode()


def decode(line: bytes) -> Boot:
    """What `encode` wrote; an unknown boot for anything else."""
    found = re.fullmatch(rb"boot ([0-9a-f-]{36}|-) (-|\d{1,12}\.\d{3})\n", line)
    if found is None:
        return Boot("", None)
    boot_id, started = (text.decode() for text in found.groups())
    return Boot("" if boot_id == "-" else boot_id, None if started == "-" else float(started))
