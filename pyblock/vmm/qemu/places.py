"""Which places a QEMU has for drives: what its object tree showed when it was last looked at, less
what was given out since.

The tree is read anew when nothing is free, and after whatever says that the picture is old.
"""

from __future__ import annotations

import msgspec

from pyblock.vmm.qemu.qmp import QmpSession
from pyblock.vmm.qemu.tree import Hop, Slot, Tree, Types, bus_numbers, read_tree


class _Status(msgspec.Struct):
    running: bool


class Places:
    """:param qmp: QEMU's monitor.
    :param types: what of the machine is a disk.
    """

    def __init__(self, qmp: QmpSession, types: Types) -> None:
        self._qmp = qmp
        self._types = types
        self._tree: Tree | None = None
        # name to our drive, and the slot if we chose it
        self._slots: dict[str, tuple[str, Slot | None]] = {}
        self._buses: dict[tuple[Hop, ...], int] = {}
        self._asked_at = (-1, -1)  # as _now was when a stopped machine had numbered no more buses
        self._losses = 0

    async def look(self) -> Tree:
        """The tree as it is now."""
        self._tree = await read_tree(self._qmp, self._types)
        return self._tree

    async def seen(self) -> Tree:
        """The tree as it was last read."""
        return self._tree or await self.look()

    def doubt(self) -> None:
        """Has the tree read anew when it is next needed."""
        self._tree = None

    async def scsi_bus(self) -> str | None:
        """The bus of the first virtio-scsi controller."""
        buses = (await self.seen()).scsi_buses or (await self.look()).scsi_buses
        return buses[0] if buses else None

    async def take_slot(self, drive_id: str) -> Slot | None:
        """Takes the first free PCI slot for a drive; None when there is none."""
        slot = self._free(await self.seen()) or self._free(await self.look())
        if slot is not None:
            self._slots[slot.name] = (drive_id, slot)
        return slot

    def _free(self, tree: Tree) -> Slot | None:
        return next((slot for slot in tree.free if slot.name not in self._slots), None)

    def take(self, name: str, drive_id: str) -> None:
        """Takes note that a drive sits in the slot of that name."""
        self._slots[name] = (drive_id, None)

    def slot(self, name: str | None) -> Slot | None:
        """The slot of that name, where it was chosen here."""
        return self._slots.get(name or "", ("", None))[1]

    def give_back(self, name: str | None, drive_id: str) -> None:
        """Takes note that the drive's slot is free. Of one that was never taken it is not known
        which that is."""
        if name is None or self._slots.get(name, ("", None))[0] != drive_id:
            self._tree = None
            return
        del self._slots[name]
        if self._tree is not None and all(slot.name != name for slot in self._tree.free):
            # it was read while the drive was there, so it does not list the slot as free
            self._tree = None

    async def guest_match(self, slot: Slot) -> str | None:
        """See BlockDrive.guest_match. Asks for the numbers of the buses only while one on the way
        is not known and may be by now."""
        if self._losses != self._qmp.losses:  # another machine may answer by now
            self._losses = self._qmp.losses
            self._buses = {}
        if any(slot.route[:depth] not in self._buses for depth in range(1, len(slot.route) + 1)):
            await self._number()
        return slot.guest_match(self._buses)

    async def _number(self) -> None:
        """While a machine is stopped, its firmware numbers nothing: what was not there will not be
        until it goes on."""
        now = (self._qmp.losses, self._qmp.resumes)
        if self._asked_at == now:
            return
        self._buses = await bus_numbers(self._qmp)
        if not (await self._qmp.ask(_Status, "query-status")).running:
            self._asked_at = now
