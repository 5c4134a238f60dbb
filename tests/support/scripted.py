"""Adapters of VMMs that are not like QEMU, each a dictionary: a pool whose members have had their
names since boot, one that chooses places itself, one that is asked whether a disk has left, one
that takes it away without a word, one whose every step can fail.

What they do is no more than the contract in pyblock/vmm/base.py asks for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import msgspec

from pyblock import SlotsExhausted, VmmRefused
from pyblock.disk.drivers import DRIVERS, VD, VIRTIO_BLK, VIRTIO_MMIO
from pyblock.disk.image import OpenedImage
from pyblock.disk.model import BlockDrive, Place
from pyblock.vmm.base import FoundDisk, Held, Hypervisor, Inventory, Offer, Step
from pyblock.vmm.poller import Poller

NOWHERE = Place()


class Scripted(Hypervisor):
    """:param address: what finds it again; "" where nothing does.

    :ivar disks: what the machine has: the VMM's own name of a disk, to the image's path.
    :ivar sent: what it was asked to do, in order.
    :ivar script: what the next requests of a name fail with.
    """

    offers: Mapping[str, Offer] = {VIRTIO_BLK.name: Offer()}

    def __init__(self, address: str = "") -> None:
        self._address = address
        self.disks: dict[str, str] = {}
        self.sent: list[str] = []
        self.script: dict[str, list[BaseException]] = {}

    @property
    def address(self) -> str:
        return self._address

    def request(self, name: str) -> None:
        self.sent.append(name)
        if errors := self.script.get(name):
            raise errors.pop(0)

    async def place(self, drive: BlockDrive) -> Place:
        return NOWHERE

    async def is_gone(self) -> bool:
        return False

    async def locate(self, drive: BlockDrive) -> None:
        drive.guest_match = f"/{drive.id}/"

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        self.request("inventory")
        held = {name: Held(True, VIRTIO_BLK) for name in self.disks}
        strangers = [
            FoundDisk(name, VD) for name in self.disks.keys() - {drive.id for drive in ours}
        ]
        return Inventory(strangers, held, frozenset(self.disks.values()))

    def steps(self, drive: BlockDrive, image: OpenedImage) -> Sequence[Step]:
        return (Step("add", partial(self._add, drive, image)),)

    async def _add(self, drive: BlockDrive, image: OpenedImage) -> None:
        self.request("add")
        self.disks[drive.id] = image.path

    async def request_removal(self, drive: BlockDrive) -> bool:
        self.request("remove")
        return self.disks.pop(drive.id, None) is not None


class Member(msgspec.Struct, frozen=True):
    """A place of a pool: the number behind its name in the guest, and whether the guest may write
    there."""

    number: int
    read_only: bool = False


class Pool(Scripted):
    """Drives that the machine has had since boot, into which images are swapped. Nothing tells
    whether the guest closed what was there."""

    offers: Mapping[str, Offer] = {VIRTIO_MMIO.name: Offer(removal="forced")}
    PLACEHOLDER = ""

    def __init__(self, members: Mapping[str, Member], address: str = "") -> None:
        super().__init__(address)
        self.members = members
        self.disks = dict.fromkeys(members, self.PLACEHOLDER)
        self.taken: dict[str, str] = {}  # member to the ID of our drive there

    def restarted(self) -> Pool:
        """Another process's adapter of the same machine."""
        other = Pool(self.members, self.address)
        other.disks = self.disks
        return other

    async def place(self, drive: BlockDrive) -> Place:
        for name, member in self.members.items():
            if name not in self.taken and member.read_only == drive.read_only:
                self.taken[name] = drive.id
                return Place(name, number=member.number)
        raise SlotsExhausted(
            "no member of the pool is free; prepare more before boot", **drive.facts
        )

    def take(self, drive: BlockDrive) -> None:
        assert drive.place is not None
        self.taken[drive.place] = drive.id

    def give_back(self, drive: BlockDrive) -> None:
        if drive.place is not None and self.taken.get(drive.place) == drive.id:
            del self.taken[drive.place]

    async def locate(self, drive: BlockDrive) -> None:
        drive.guest_match = f"/{drive.guess.removeprefix('/dev/')}"

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        names = {drive.id: drive.place for drive in ours} | {
            drive_id: name for name, drive_id in self.taken.items()
        }
        held = {
            drive_id: Held(True, VIRTIO_MMIO)
            for drive_id, name in names.items()
            if name is not None and self.disks[name] != self.PLACEHOLDER
        }
        return Inventory(
            [FoundDisk("root", VD)], held, frozenset(self.disks.values()) - {self.PLACEHOLDER}
        )

    async def _add(self, drive: BlockDrive, image: OpenedImage) -> None:
        self.request("swap")
        assert drive.place is not None
        self.disks[drive.place] = image.path

    async def request_removal(self, drive: BlockDrive) -> bool:
        self.request("swap back")
        assert drive.place is not None
        self.disks[drive.place] = self.PLACEHOLDER
        return True


class Chooser(Scripted):
    """A VMM that puts a disk where it likes, under a name of its own, and says so in its reply."""

    def __init__(self, slots: int, address: str = "") -> None:
        super().__init__(address)
        self.free = [f"slot{number}" for number in reversed(range(slots))]
        self.ours: dict[str, str] = {}  # its name of a disk to ours, as far as there was a reply
        self.answer = asyncio.Event()
        self.answer.set()

    def take(self, drive: BlockDrive) -> None:
        assert drive.place in self.disks
        self.ours[drive.place] = drive.id

    async def _add(self, drive: BlockDrive, image: OpenedImage) -> None:
        self.request("add")
        if not self.free:
            raise SlotsExhausted("the VMM has no slot left", **drive.facts)
        name = self.free.pop()
        self.disks[name] = image.path
        self.request("reply to add")
        self.ours[name] = drive.id
        drive.sit(Place(name, pci_path=f"{name.removeprefix('slot'):0>2}"))

    async def locate(self, drive: BlockDrive) -> None:
        drive.guest_match = f"/{drive.place}/"

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        self.request("inventory")
        await self.answer.wait()
        known = {drive.id for drive in ours}
        self.ours |= {
            name: drive.id for drive in ours if (name := self._name_of(drive)) is not None
        }
        held = {self.ours[name]: Held(True, VIRTIO_BLK) for name in self.disks if name in self.ours}
        names = [self.ours.get(name, "") for name in self.disks]
        return Inventory([FoundDisk(name, VD) for name in names if name not in known], held)

    async def request_removal(self, drive: BlockDrive) -> bool:
        self.request("remove")
        if (name := self._name_of(drive)) is None:
            return False
        del self.disks[name]
        self.ours.pop(name, None)
        self.free.append(name)
        return True

    def _name_of(self, drive: BlockDrive) -> str | None:
        """What the VMM calls a drive. Before it has told that, the image does: no other drive has
        it."""
        if drive.place is not None:
            return drive.place if drive.place in self.disks else None
        return next(
            (
                name
                for name, path in self.disks.items()
                if path == drive.file and self.ours.get(name, drive.id) == drive.id
            ),
            None,
        )


class Polled(Scripted):
    """A VMM that answers a removal at once, and shows only to who asks when the guest has let
    go."""

    def __init__(self, address: str = "") -> None:
        super().__init__(address)
        self.leaving: set[str] = set()
        self.poller = Poller(self._ask, "the scripted VMM")

    async def _ask(self) -> Collection[str]:
        self.request("poll")
        return self.disks.keys()

    def eject(self, drive_id: str) -> None:
        """The guest lets go."""
        del self.disks[drive_id]
        self.leaving.discard(drive_id)

    async def request_removal(self, drive: BlockDrive) -> bool:
        self.request("remove")
        if drive.id not in self.disks:
            return False
        self.leaving.add(drive.id)
        return True

    async def removed(self, drive: BlockDrive) -> None:
        await self.poller.gone(drive.id)

    def nudge(self, drive: BlockDrive) -> None:
        self.poller.hurry()

    async def close(self) -> None:
        await self.poller.close()


class Stepped(Scripted):
    """A VMM that wants a disk in three parts, each of which can fail, and so can taking it back.

    :ivar parts: what it has of each drive.
    """

    NAMES = ("one", "two", "three")

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, list[str]] = {}

    def steps(self, drive: BlockDrive, image: OpenedImage) -> Sequence[Step]:
        return [
            Step(name, partial(self._do, drive, name), partial(self._undo, drive, name))
            for name in self.NAMES
        ]

    async def _do(self, drive: BlockDrive, name: str) -> None:
        self.request(name)
        self.parts.setdefault(drive.id, []).append(name)

    async def _undo(self, drive: BlockDrive, name: str) -> None:
        self.request(f"undo {name}")
        self.parts[drive.id].remove(name)

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        return Inventory(
            held={
                name: Held(parts == [*self.NAMES], VIRTIO_BLK)
                for name, parts in self.parts.items()
                if parts
            }
        )

    async def request_removal(self, drive: BlockDrive) -> bool:
        self.request("remove")
        return self.NAMES[-1] in self.parts.get(drive.id, [])

    async def removed(self, drive: BlockDrive) -> None:
        self.request("wait")
        self.parts[drive.id].remove(self.NAMES[-1])

    async def remove_rest(self, drive: BlockDrive) -> None:
        self.request("rest")
        self.parts.pop(drive.id, None)


def refusal(step: str) -> VmmRefused:
    """What a VMM says that does not want to."""
    return VmmRefused(f"{step}: no", step=step, request=step, reply="no")


assert set(Pool.offers) <= set(DRIVERS)
