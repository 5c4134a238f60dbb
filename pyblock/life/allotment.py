"""What a sandbox has given out: block indexes, ordinals of each family of names, drive IDs. Plain
bookkeeping, no I/O.

A drive takes one of each, or nothing. The machine's own disks have theirs as well, so that no drive
is given the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from pyblock.core.index import BlockIndex
from pyblock.core.naming import DRIVE, ID_MAX, SCSI_INDEX_MAX, drive_index, make_name_id
from pyblock.core.plan import plan, plan_many
from pyblock.disk.drivers import DRIVERS, FAMILIES, NVDIMM, Driver, Family
from pyblock.disk.model import BlockDrive
from pyblock.errors import DeviceConflict, IndexesExhausted, IndexTaken, InvalidName
from pyblock.life.crowd import Crowd
from pyblock.life.device import BlockDevice
from pyblock.vmm.base import Inventory

Place = tuple[int, int]

# Shared by all allotments: most never have any.
NO_INDEXES: frozenset[int] = frozenset()
NO_IDS: frozenset[str] = frozenset()
NOTHING: Mapping[str, int] = {}


class Allotment:
    """:param capacity: how many indexes there are, 1 to 2^20. Raises InvalidIndex.
    :param offsets: names of a family ("vd", "sd", "pmem") that the guest uses before the first
        drive; for others the machine is asked.

    :ivar index: the block index.
    :ivar capacity: as it was given.
    :ivar given: the offsets as they were given.
    :ivar unused: nothing was ever given out or learnt.
    """

    __slots__ = (
        "_counts",
        "_crowds",
        "_drive_ids",
        "_foreign",
        "_foreign_ids",
        "_imported",
        "_moved",
        "_offsets",
        "_ordinals",
        "_planned",
        "_watches",
        "capacity",
        "given",
        "index",
        "unused",
    )

    def __init__(self, capacity: int, offsets: Mapping[str, int] | None = None) -> None:
        self.index = BlockIndex(capacity)
        self.capacity = capacity
        self.unused = True
        self._ordinals: dict[str, BlockIndex] = {}
        self.given: Mapping[str, int] = dict(offsets) if offsets else NOTHING
        self._offsets = self.given
        self._drive_ids: set[str] = set()
        self._foreign_ids = NO_IDS  # of the machine's own disks, and of orphans
        self._foreign = NO_INDEXES  # indexes whose address one of these sits at
        self._watches: tuple[set[str], ...] = ()
        self._planned: dict[str, Place] = {}  # device ID to what a batch took for it
        self._imported: Sequence[BlockDrive] = ()  # whose names wait for the offset of their family
        # by the prefix of a family; most of the time there is none
        self._crowds: dict[str, Crowd] = {}
        # of the machine's own disks, by prefix, when it was last asked
        self._counts: Mapping[str, int] | None = None
        self._moved = NO_IDS  # prefixes of which that number has changed

    @property
    def offsets(self) -> dict[str, int]:
        """The block offsets that are known, by family."""
        return dict(self._offsets)

    def own_indexes(self) -> Iterable[int]:
        """The taken indexes without those of the machine's own disks, ascending."""
        return (index for index in self.index if index not in self._foreign)

    @property
    def drive_ids(self) -> frozenset[str]:
        """The drive IDs that are given out."""
        return frozenset(self._drive_ids)

    @contextmanager
    def watched(self) -> Iterator[set[str]]:
        """The drive IDs that are given out, and those that are given out meanwhile, whatever
        becomes of them."""
        seen = set(self._drive_ids)
        self._watches = (*self._watches, seen)
        try:
            yield seen
        finally:
            self._watches = tuple(one for one in self._watches if one is not seen)

    def learn(self, found: Inventory, ours: Collection[str] = NO_IDS) -> list[BlockDrive]:
        """Takes what the machine's own disks use: IDs, indexes of SCSI addresses, and names, unless
        their offset is known already. What they used when it was last asked, and do not use now, is
        free, but for names: the guest does not name its disks anew. Where their number has changed,
        nobody knows which names are free there, and none is predicted any more.

        Returns the imported drives whose predicted names have changed by it: the original does not
        count the machine's own disks.

        :param ours: drive IDs that were given out when the machine was asked.
        """
        self.unused = False
        disks = [
            disk
            for disk in found.disks
            if not disk.id or (disk.id not in ours and disk.id not in self._drive_ids)
        ]
        at = {
            disk.occupies
            for disk in disks
            if disk.occupies is not None and 0 <= disk.occupies < self.capacity
        }
        for index in self._foreign - at:
            self.index.release(index)
        kept = self._foreign & at
        taken = sorted(index for index in at - kept if index not in self.index)
        for index in taken:
            self.index.reserve(index)
        self._foreign = kept.union(taken) or NO_INDEXES
        names = (*(disk.id for disk in disks if disk.id), *found.held)
        self._foreign_ids = (
            frozenset(name for name in names if name not in ours and name not in self._drive_ids)
            or NO_IDS
        )
        counts: dict[str, int] = {}
        for disk in disks:
            counts[disk.family.prefix] = counts.get(disk.family.prefix, 0) + 1
        # a saved offset is no count: it may have been given
        before = counts if self._counts is None else self._counts
        if before != counts:
            self._moved |= {
                prefix
                for prefix in {*before, *counts}
                if before.get(prefix, 0) != counts.get(prefix, 0)
            }
        self._counts = counts or NOTHING
        if counts:
            self._offsets = {**counts, **self._offsets}
        imported, self._imported = self._imported, ()
        return [drive for drive in imported if self._shift(drive)]

    def _shift(self, drive: BlockDrive) -> bool:
        """Has an imported drive's name come after those of the machine's own disks; whether that
        changed it."""
        family = drive.kind.family
        offset = self._offsets.get(family.prefix, drive.offset)
        before = drive.offset, drive.ordinal
        if drive.kind is NVDIMM and drive.known_name is not None:
            # its number counts the machine's own
            ordinals, likely = self._ordinals[family.prefix], _number(drive) - offset
            if likely != drive.ordinal and 0 <= likely < self.capacity and likely not in ordinals:
                ordinals.release(drive.ordinal)
                ordinals.reserve(likely)
                drive.ordinal, drive.offset = likely, offset
        elif offset != drive.offset:
            drive.offset, drive.known_name = offset, None
        return before != (drive.offset, drive.ordinal)

    def plan(self, devices: Sequence[BlockDevice]) -> None:
        """Takes the places of many devices in one crossing, in their order; `reserve` then finds
        them, `unplan` gives back the rest.

        Devices of several families are left to `reserve`. Raises IndexesExhausted, having taken
        nothing.
        """
        devices = [device for device in devices if device.id not in self._planned]
        kinds = {_kind(device) for device in devices}
        if len(devices) < 2 or len({kind.family for kind in kinds}) != 1:
            return
        self.unused = False
        [family] = {kind.family for kind in kinds}
        indexes, ordinals = plan_many(self.index, self._family(family), len(devices))
        places = zip(indexes, ordinals, strict=True)
        self._planned |= zip((device.id for device in devices), places, strict=True)

    def unplan(self, devices: Sequence[BlockDevice]) -> None:
        """Gives back what `plan` took and `reserve` did not use."""
        for device in devices:
            if (place := self._planned.pop(device.id, None)) is not None:
                self._give_back(_kind(device).family, place)

    def reserve(self, device: BlockDevice) -> BlockDrive:
        """The drive of a device: lowest free index and ordinal, and an ID that no other drive of
        the machine has.

        Raises IndexesExhausted, or DeviceConflict when the ID cannot be made unique; nothing is
        then taken.
        """
        self.unused = False
        kind = DRIVERS[device.info.driver or ""]
        prefix = kind.family.prefix
        place = self._planned.pop(device.id, None)
        planned = place is not None
        if place is None:
            ordinals = self._ordinals.get(prefix)
            place = plan(
                self.index, ordinals if ordinals is not None else self._family(kind.family)
            )
        index, ordinal = place
        try:
            if kind.scsi and index > SCSI_INDEX_MAX:
                text = (
                    f"index {index} has no SCSI address: the last is {SCSI_INDEX_MAX}, ID 255 and "
                    "LUN 255"
                )
                raise IndexesExhausted(text, index=index)
            drive_id = f"drive-{device.id}"  # as make_name_id has it where it fits
            if (
                len(drive_id) > ID_MAX
                or drive_id in self._drive_ids
                or drive_id in self._foreign_ids
            ):
                drive_id = self._new_id(device.id)
        except BaseException:
            self._give_back(kind.family, place)
            raise
        self._drive_ids.add(drive_id)
        for seen in self._watches:
            seen.add(drive_id)
        fresh, device.fresh = device.fresh, False
        drive = BlockDrive(
            drive_id,
            index,
            ordinal,
            self._offsets.get(prefix, kind.offset),
            kind,
            device.info,
            fresh=fresh,
        )
        crowd = self._crowds.get(prefix)
        if crowd is None:
            crowd = self._crowds[prefix] = Crowd(prefix)
        # what comes alone is not planned
        crowd.comes(drive, unsure=planned or prefix in self._moved)
        return drive

    def comes(self, drive: BlockDrive) -> None:
        """Takes note that a drive is on its way."""
        self._crowd(drive).comes(drive, unsure=drive.kind.family.prefix in self._moved)

    def came(self, drive: BlockDrive) -> None:
        """Takes note that the machine has a drive."""
        crowd = self._crowds.get(drive.kind.family.prefix)
        if crowd is not None and crowd.came(drive):
            del self._crowds[crowd.prefix]

    def leaves(self, drive: BlockDrive) -> bool:
        """Takes note that the guest is asked to let go of a drive: one that comes meanwhile may get
        its name. False when it was asked before."""
        if drive.id not in self._drive_ids:  # an orphan has none of ours
            return False
        return self._crowd(drive).leaves(drive)

    def stays(self, drive: BlockDrive) -> None:
        """Takes note that the guest keeps it."""
        crowd = self._crowds.get(drive.kind.family.prefix)
        if crowd is not None and crowd.stays(drive):
            del self._crowds[crowd.prefix]

    def _crowd(self, drive: BlockDrive) -> Crowd:
        """That of a drive's family, which is made where there is none."""
        prefix = drive.kind.family.prefix
        if prefix not in self._crowds:
            self._crowds[prefix] = Crowd(prefix)
        return self._crowds[prefix]

    def release(self, drive: BlockDrive) -> None:
        """Gives back what `reserve` took."""
        prefix = drive.kind.family.prefix
        crowd = self._crowds.get(prefix)
        if crowd is not None and crowd.gone(drive):
            del self._crowds[prefix]
        self.index.release(drive.index)
        self._ordinals[prefix].release(drive.ordinal)
        self._drive_ids.discard(drive.id)

    def restore(
        self, drives: Sequence[BlockDrive], others: Collection[int], offsets: Mapping[str, int]
    ) -> None:
        """Takes what the drives of a saved state have, and other indexes that the state says are
        taken. The allotment must be unused.

        An ordinal that the state does not tell (-1) is found: the original wrote none; names of
        imported drives are those beside none of the machine's own disks until `learn` has heard of
        them. Raises IndexTaken, DeviceConflict or InvalidIndex when the state contradicts itself;
        nothing is then taken.
        """
        drive_ids: set[str] = set()
        indexes: list[int] = []
        imported: list[BlockDrive] = []
        crowded: list[BlockDrive] = []
        for drive in drives:
            drive_ids.add(drive.id)
            indexes.append(drive.index)
            if drive.imported and drive.offset == drive.kind.offset:
                imported.append(drive)
            if drive.crowded:
                crowded.append(drive)
        if len(drive_ids) != len(drives):
            raise DeviceConflict("two drives have one ID")
        if others:
            indexes += set(others).difference(indexes)
        ordinals = self._restored_ordinals(drives)
        try:
            self.index.reserve_many(indexes)
        except IndexTaken as error:
            raise IndexTaken("an index belongs to two drives: " + str(error)) from error
        self._ordinals, self._drive_ids, self.unused = ordinals, drive_ids, False
        if imported:
            self._imported = sorted(imported, key=lambda drive: drive.ordinal)
        for drive in crowded:
            self._crowd(drive).restore(drive)
        if offsets:
            self._offsets = {
                **self._offsets,
                **{name: offset for name, offset in offsets.items() if name in FAMILIES},
            }

    def _restored_ordinals(self, drives: Sequence[BlockDrive]) -> dict[str, BlockIndex]:
        told: dict[str, list[int]] = {}
        untold: list[BlockDrive] = []
        for drive in drives:
            ordinals_told = told.setdefault(drive.kind.family.prefix, [])
            if drive.ordinal >= 0:
                ordinals_told.append(drive.ordinal)
            else:
                untold.append(drive)
        below = _Below(drives) if untold else None
        ordinals: dict[str, BlockIndex] = {}
        for prefix, numbers in told.items():
            ordinals[prefix] = family = BlockIndex(self.capacity)
            family.reserve_many(numbers)
        for drive in untold:
            family = ordinals[drive.kind.family.prefix]
            likely = _likely_ordinal(drive, below) if below is not None else 0
            if 0 <= likely < self.capacity and likely not in family:
                family.reserve(likely)
                drive.ordinal = likely
            else:
                drive.ordinal = family.acquire()
        return ordinals

    def _family(self, family: Family) -> BlockIndex:
        ordinals = self._ordinals.get(family.prefix)
        if ordinals is None:
            ordinals = self._ordinals[family.prefix] = BlockIndex(self.capacity)
        return ordinals

    def _give_back(self, family: Family, place: Place) -> None:
        self.index.release(place[0])
        self._ordinals[family.prefix].release(place[1])

    def _new_id(self, device_id: str) -> str:
        drive_id = make_name_id(DRIVE, device_id)
        salt = 0
        while drive_id in self._drive_ids or drive_id in self._foreign_ids:
            salt += 1  # it changes an ID that was shortened, and none that fits
            if salt > len(self._drive_ids) + len(self._foreign_ids) + 1:
                text = (
                    f"drive ID {drive_id!r} is taken in this machine; give device {device_id} "
                    "another ID"
                )
                raise DeviceConflict(text, device=device_id, drive=drive_id)
            drive_id = make_name_id(DRIVE, device_id, salt=salt)
        return drive_id


def _kind(device: BlockDevice) -> Driver:
    return DRIVERS[device.info.driver or ""]


class _Below:
    """How many drives of other families have lower indexes: they take no name of this one's."""

    def __init__(self, drives: Sequence[BlockDrive]) -> None:
        self._all = sorted(drive.index for drive in drives)
        self._families: dict[str, list[int]] = {}
        for drive in sorted(drives, key=lambda drive: drive.index):
            self._families.setdefault(drive.kind.family.prefix, []).append(drive.index)

    def others(self, drive: BlockDrive) -> int:
        return bisect_left(self._all, drive.index) - bisect_left(
            self._families[drive.kind.family.prefix], drive.index
        )


def _likely_ordinal(drive: BlockDrive, below: _Below) -> int:
    """The ordinal behind a drive that the original wrote: by its name, or the index, which is the
    same number while all have one family."""
    family = drive.kind.family
    if drive.known_name is not None and drive.kind is NVDIMM:
        return _number(drive)
    with suppress(InvalidName):
        if drive.known_name is not None and family.letters:
            return drive_index(drive.known_name.removeprefix("/dev/"), family.prefix) - drive.offset
    return drive.index - below.others(drive)


def _number(drive: BlockDrive) -> int:
    return int(drive.nvdimm_id or 0)
