"""Which names of a family can be told. The guest gives each disk its lowest free name, in the order
in which it sees disks come and go.

It may see first whichever it likes of drives that come together, and of one that comes while
another leaves. Which name such a drive has is not known; nor is it known which name is free when
one of them has gone while others are still there.
"""

from __future__ import annotations

import msgspec

from pyblock.disk.model import BlockDrive


class Crowd(msgspec.Struct, gc=False, eq=False):
    """The drives of one family that come, leave, or were crowded. It is forgotten when it holds
    nothing.

    :ivar prefix: of the family's names.
    :ivar crowded: how many of the drives that are there are crowded.
    :ivar restored: some are of a saved state; which of their companions left before, it does not
        tell.
    :ivar coming: by ID.
    :ivar leaving: likewise.
    :ivar met: IDs of leaving drives during whose leaving another came.
    :ivar vague: ordinals that were given back, and are not known to be what the guest has free.
    """

    prefix: str
    crowded: int = 0
    restored: bool = False
    coming: dict[str, BlockDrive] = {}
    leaving: dict[str, BlockDrive] = {}
    met: set[str] = set()
    vague: set[int] = set()

    def restore(self, drive: BlockDrive) -> None:
        """Takes note of a crowded drive of a saved state."""
        assert drive.crowded
        self.crowded += 1
        self.restored = True

    def comes(self, drive: BlockDrive, *, unsure: bool) -> None:
        """Takes note that a drive is on its way. `unsure`: its name is not known, whatever the
        crowd knows."""
        met = (
            [one.id for one in self.leaving.values() if _may_leave_its_name(one, drive)]
            if self.leaving
            else ()
        )
        if unsure or self.coming or met or self.restored or drive.ordinal in self.vague:
            self._crowd(drive)
        # of more than one all are crowded already
        for other in self.coming.values() if len(self.coming) == 1 else ():
            self._crowd(other)
        self.met.update(met)
        self.vague.discard(drive.ordinal)
        self.coming[drive.id] = drive

    def came(self, drive: BlockDrive) -> bool:
        """Takes note that the machine has it. Returns whether there is nothing left to remember."""
        self.coming.pop(drive.id, None)
        return not (self.coming or self.leaving or self.crowded)

    def leaves(self, drive: BlockDrive) -> bool:
        """Takes note that the guest is asked to let go of it; False when it was asked before."""
        for other in self.coming.values():
            if _may_leave_its_name(drive, other):
                self._crowd(other)
                self.met.add(drive.id)
        asked = drive.id in self.leaving
        self.leaving[drive.id] = drive
        return not asked

    def stays(self, drive: BlockDrive) -> bool:
        """Takes note that it does not leave. Returns whether there is nothing left to remember."""
        self.leaving.pop(drive.id, None)
        self.met.discard(drive.id)
        return not (self.coming or self.leaving or self.crowded)

    def gone(self, drive: BlockDrive) -> bool:
        """Takes note that the machine has it no more, or never had it. Returns whether there is
        nothing left to remember."""
        unsure = drive.crowded or drive.id in self.met
        self.coming.pop(drive.id, None)
        self.leaving.pop(drive.id, None)
        self.met.discard(drive.id)
        self.crowded -= drive.crowded
        if not self.crowded:  # nobody is left who may have another's name
            self.vague.clear()
            self.restored = False
        elif unsure:
            self.vague.add(drive.ordinal)
        return not (self.coming or self.leaving or self.crowded)

    def _crowd(self, drive: BlockDrive) -> None:
        if not drive.crowded:
            drive.crowded = True
            self.crowded += 1


def _may_leave_its_name(leaving: BlockDrive, coming: BlockDrive) -> bool:
    """Whether the name of one would be the lowest that is free for the other."""
    return leaving is not coming and (leaving.crowded or leaving.ordinal < coming.ordinal)
