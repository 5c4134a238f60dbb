"""Which names of a family can be told. The guest gives each disk its lowest free name, in the order in which it sees disks come and go.

It may see first whichever it likes of drives that come together, and of one that comes while another leaves. Which name such a drive has is
not known; nor is it known which name is free when one of them has gone while others are still there.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyblock.model import BlockDrive


class Crowd:
    """The drives of one family that come, leave, or were crowded.

    :param restored: crowded drives of a saved state; which of their companions left before, it does not tell.
    """

    __slots__ = ("_coming", "_crowded", "_leaving", "_met", "_restored", "_vague")

    def __init__(self, restored: Iterable[BlockDrive] = ()) -> None:
        self._coming: dict[str, BlockDrive] = {}
        self._leaving: dict[str, BlockDrive] = {}
        self._met: set[str] = set()  # leaving drives during whose leaving another came
        self._crowded = {drive.id: drive for drive in restored}
        self._vague: set[int] = set()  # ordinals that were given back, and are not known to be what the guest has free
        self._restored = bool(self._crowded)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to remember."""
        return not (self._coming or self._leaving or self._crowded)

    def comes(self, drive: BlockDrive) -> None:
        """Takes note that a drive is on its way."""
        met = [one.id for one in self._leaving.values() if _may_leave_its_name(one, drive)]
        if drive.crowded or self._coming or met or self._restored or drive.ordinal in self._vague:
            self._crowd(drive)
        for other in self._coming.values() if len(self._coming) == 1 else ():  # of more than one all are crowded already
            self._crowd(other)
        self._met.update(met)
        self._vague.discard(drive.ordinal)
        self._coming[drive.id] = drive

    def came(self, drive: BlockDrive) -> None:
        """Takes note that the machine has it."""
        self._coming.pop(drive.id, None)

    def leaves(self, drive: BlockDrive) -> bool:
        """Takes note that the guest is asked to let go of it; False when it was asked before."""
        asked = drive.id in self._leaving
        for other in self._coming.values():
            if _may_leave_its_name(drive, other):
                self._crowd(other)
                self._met.add(drive.id)
        self._leaving[drive.id] = drive
        return not asked

    def stays(self, drive: BlockDrive) -> None:
        """Takes note that it does not leave."""
        self._leaving.pop(drive.id, None)
        self._met.discard(drive.id)

    def gone(self, drive: BlockDrive) -> None:
        """Takes note that the machine has it no more, or never had it."""
        self.came(drive)
        unsure = self._crowded.pop(drive.id, None) is not None or drive.id in self._met
        self.stays(drive)
        if not self._crowded:  # nobody is left who may have another's name
            self._vague.clear()
            self._restored = False
        elif unsure:
            self._vague.add(drive.ordinal)

    def _crowd(self, drive: BlockDrive) -> None:
        drive.crowded = True
        self._crowded[drive.id] = drive


def _may_leave_its_name(leaving: BlockDrive, coming: BlockDrive) -> bool:
    """Whether the name of one would be the lowest that is free for the other."""
    return leaving is not coming and (leaving.crowded or leaving.ordinal < coming.ordinal)
