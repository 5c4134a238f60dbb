"""What the guest itself sees: its shell over a serial port, and its block devices.

This is the judge of every test with a real guest, so it asks sysfs and believes nobody else. A
serial port and not virtio-serial: it answers before any virtio driver is loaded and takes no PCI
slot from the tests.
"""

from __future__ import annotations

import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Two processes in the guest however many disks there are: under TCG a process takes longer than
# everything that it reads here.
LIST_DISKS = (
    "cd /sys/block && ls -l && head -v -c 4096 */size */ro */serial */device/vpd_pg80 2>/dev/null"
)


@dataclass(frozen=True)
class GuestDisk:
    name: str
    link: str  # where /sys/block/<name> leads: /sys/devices/…
    size_bytes: int
    serial: str
    read_only: bool


Wanted = int | set[str] | Callable[[dict[str, GuestDisk]], bool]


class GuestError(Exception):
    """A command in the guest ended with another status than 0."""


class Guest:
    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._rest = b""

    def wait_ready(self, timeout: float) -> None:
        self._read_until(re.compile(rb"ready\n"), time.monotonic() + timeout)

    def run(self, command: str, timeout: float = 30) -> str:
        """The output (both streams) of a shell command in the guest."""
        return self.run_bytes(command, timeout).decode(errors="replace")

    def run_bytes(self, command: str, timeout: float = 30) -> bytes:
        with self._lock:
            # The newline first ends whatever half a line is still in the port; an answer to an
            # earlier request that was given up carries another id and is skipped with the rest of
            # the bytes before ours.
            begin, end = secrets.token_hex(8), secrets.token_hex(8)
            framed = re.sub(
                rb"[^!-\[\]-~]",
                lambda byte: b"\\0%03o" % byte[0][0],
                f"echo {begin}\n{command}".encode(),
            ).decode()
            self._socket.settimeout(timeout)
            self._socket.sendall(f"\n{end} {framed}\n".encode())
            try:
                before, found = self._read_until(
                    re.compile(rf"\n{end} (\d+)\n".encode()), time.monotonic() + timeout
                )
            except TimeoutError:
                raise TimeoutError(
                    f"the guest did not finish {command!r} within {timeout} s"
                ) from None
        output = before.partition(f"{begin}\n".encode())[2]
        if int(found[1]) != 0:
            raise GuestError(
                f"{command!r} ended with {int(found[1])}: {output.decode(errors='replace')}"
            )
        return output

    def disks(self, timeout: float = 30) -> dict[str, GuestDisk]:
        """The guest's disks by name, in no fixed order; never loop and ram disks."""
        listing, *parts = re.split(
            rb"(?:^|\n)==> ([^ ]+) <==\n", self.run_bytes(LIST_DISKS + "; true", timeout)
        )
        values = dict(zip((name.decode() for name in parts[::2]), parts[1::2], strict=True))
        disks = {}
        for name, target in re.findall(r"(\S+) -> \.\./(\S+)", listing.decode()):
            # One without attributes, or with empty ones, is coming or going at this moment.
            if (
                re.match("loop|ram", name)
                or not values.get(f"{name}/size")
                or not values.get(f"{name}/ro")
            ):
                continue
            page = values.get(f"{name}/device/vpd_pg80")
            serial = page[4:] if page is not None else values.get(f"{name}/serial", b"")
            disks[name] = GuestDisk(
                name=name,
                link=f"/sys/{target}",
                size_bytes=int(values[f"{name}/size"]) * 512,
                serial=serial.rstrip(b"\0\n ").decode(errors="replace"),
                read_only=int(values[f"{name}/ro"]) != 0,
            )
        return disks

    def wait_for_disks(self, wanted: Wanted, timeout: float = 30) -> dict[str, GuestDisk]:
        """Asks until the guest has this many disks, exactly these names, or what the predicate
        wants; returns them.

        By count or name, every disk must have a size as well: sd shows the name first and reads the
        size a moment later. Many scsi disks plugged back to back into a slow guest can leave one at
        size 0 for good; a predicate alone decides for itself.
        """
        check: Callable[[dict[str, GuestDisk]], bool]
        if callable(wanted):
            check = wanted
        elif isinstance(wanted, int):
            check = lambda disks: (  # noqa: E731
                len(disks) == wanted and all(disk.size_bytes for disk in disks.values())
            )
        else:
            check = lambda disks: (  # noqa: E731
                disks.keys() == wanted and all(disk.size_bytes for disk in disks.values())
            )
        deadline = time.monotonic() + timeout
        while True:
            disks = self.disks()
            if check(disks):
                return disks
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not the disks wanted ({wanted}) within {timeout} s; the guest has {disks}"
                )
            time.sleep(0.02)

    def ignore_pci(self) -> None:
        """PCI plug and unplug requests reach this guest no more; they wait in the hardware until
        `heed_pci()`.

        The firmware announces them by general purpose event 1, on q35 and on pc. (`disable` in
        place of `mask` would lose them.)
        """
        self.run("echo mask > /sys/firmware/acpi/interrupts/gpe01")

    def heed_pci(self) -> None:
        self.run("echo unmask > /sys/firmware/acpi/interrupts/gpe01")

    def close(self) -> None:
        self._socket.close()

    def _read_until(
        self, pattern: re.Pattern[bytes], deadline: float
    ) -> tuple[bytes, re.Match[bytes]]:
        while not (found := pattern.search(self._rest)):
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            if not (data := self._socket.recv(65536)):
                raise ConnectionError("QEMU closed the guest's serial port")
            self._rest += data
        before, self._rest = self._rest[: found.start()], self._rest[found.end() :]
        return before, found
