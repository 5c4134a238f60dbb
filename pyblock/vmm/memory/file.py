"""A machine in memory that outlives its process, kept in a file: for callers' own tests of what a
restart finds.

The file is the machine: an empty one is a machine that was just started, and one that is not there
is a machine that has ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from pyblock.disk.drivers import DRIVERS
from pyblock.disk.model import BlockDrive
from pyblock.errors import VmmProtocolError, VmmUnreachable
from pyblock.vmm.base import Inventory
from pyblock.vmm.memory.machine import MemoryHypervisor


class _Contents(msgspec.Struct):
    """What the file holds: see MemoryHypervisor."""

    backends: dict[str, str] = {}
    devices: dict[str, str] = {}

    def __post_init__(self) -> None:
        for place in self.devices.values():
            if place.partition(" ")[0] not in DRIVERS:
                raise ValueError(f"a device is at {place[:40]!r}, which no driver begins")


class FileMachine(MemoryHypervisor):
    """:param path: the file."""

    __slots__ = ("_path",)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.fspath(path))
        self._path = Path(path).absolute()

    @property
    def address(self) -> str:
        return f"memory:{self._path}"

    async def is_gone(self) -> bool:
        return not self._path.exists()

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        self._read()
        return await super().inventory(ours)

    async def _step(self, step: str, drive: BlockDrive, do: Callable[[], None]) -> None:
        def do_and_keep() -> None:
            self._read()
            do()
            self._write()

        self._read()
        await super()._step(step, drive, do_and_keep)

    def _read(self) -> None:
        try:
            text = self._path.read_bytes()
        except OSError as error:
            why = f"{error.strerror}; an empty file there would be a new machine"
            raise VmmUnreachable(
                f"machine in memory {str(self._path)!r}: {why}", path=str(self._path)
            ) from error
        try:
            have = msgspec.json.decode(text or b"{}", type=_Contents)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            why = f"is no machine in memory: {error!r}"
            raise VmmProtocolError(
                f"file {str(self._path)!r} {why}", path=str(self._path)
            ) from error
        self.backends, self.devices, self._places = (
            have.backends,
            have.devices,
            set(have.devices.values()),
        )

    def _write(self) -> None:
        new = self._path.with_name(self._path.name + ".new")
        new.write_bytes(
            msgspec.json.format(
                msgspec.json.encode(_Contents(self.backends, self.devices)), indent=1
            )
        )
        new.replace(self._path)


_NO_JOURNAL: list[tuple[str, str]] = []  # one for all


def open_memory(address: str) -> MemoryHypervisor:
    """The machine behind `memory:`, or the one in a file behind `memory:/tmp/vm1`. Nobody can look
    at its journal, so it keeps none: there may be thousands of them."""
    machine = FileMachine(address) if "/" in address else MemoryHypervisor(address)
    machine._keep_journal, machine.journal = False, _NO_JOURNAL
    return machine
