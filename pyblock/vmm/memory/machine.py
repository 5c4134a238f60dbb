"""A machine that exists in memory only, for callers' own tests: it keeps what it was given, and
fails when it is told to.

Any of its STEPS can be refused, delayed, held back or lost. It is no guest: names stay predictions.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Literal

import msgspec

from pyblock.core.naming import LUNS
from pyblock.disk.drivers import (
    DRIVERS,
    NVDIMM,
    VIRTIO_BLK,
    VIRTIO_BLK_CCW,
    VIRTIO_MMIO,
    VIRTIO_SCSI,
)
from pyblock.disk.image import OpenedImage
from pyblock.disk.model import BlockDrive, Place
from pyblock.errors import ConnectionLost, InvalidValue, SlotsExhausted, VmmRefused, VmmUnreachable
from pyblock.vmm.base import FoundDisk, Held, Hypervisor, Inventory, Offer, Step

BRIDGES = 30  # PCI bridges in slots 2 … 31 of the root bus
BRIDGE_SLOTS = 32
JOURNAL = 1000
NOWHERE = Place()
_DEV_NO = re.compile(r"(0|fe)\.[0-3]\.[0-9a-f]{4}")
_PCI_PATH = re.compile(r"([0-9a-f]{2})/([0-9a-f]{2})")


class Fault(msgspec.Struct, frozen=True):
    """What befalls a step once: `refuse` (the VMM says no), `delay` (it takes `seconds`), `hold`
    (it waits for `let_go`), `lose` (the connection breaks before the reply), `break` (the adapter
    fails with what is no error of pyblock's, a KeyError). Of the last two `done` tells whether the
    request had been carried out."""

    kind: Literal["refuse", "delay", "hold", "lose", "break"]
    seconds: float = 0.0
    done: bool = True


class _Driver:
    """How a drive is presented there: the place that it takes, if it takes one, and where a guest
    would find it."""

    offer = Offer()

    def place(self, machine: MemoryHypervisor, drive: BlockDrive) -> Place:
        return NOWHERE

    def take(self, machine: MemoryHypervisor, drive: BlockDrive) -> None:
        return None

    def give_back(self, machine: MemoryHypervisor, drive: BlockDrive) -> None:
        return None

    def recognize(self, drive: BlockDrive) -> None:
        self.locate(drive)

    def locate(self, drive: BlockDrive) -> None:
        drive.guest_match = f"/{drive.kind.name}{drive.index}/"


class _Scsi(_Driver):
    offer = Offer(serial_max=36)

    def locate(self, drive: BlockDrive) -> None:
        drive.guest_match = f"/0:0:{drive.index // LUNS}:{drive.index % LUNS}/"


class _Pci(_Driver):
    """In the lowest free slot of its bridges."""

    offer = Offer(serial_max=20)

    def place(self, machine: MemoryHypervisor, drive: BlockDrive) -> Place:
        number = machine.take_slot(drive)
        return Place(str(number), pci_path=_pci_path(number))

    def take(self, machine: MemoryHypervisor, drive: BlockDrive) -> None:
        if drive.place is not None:
            machine.mark_slot(_number(drive.place), taken=True)

    def give_back(self, machine: MemoryHypervisor, drive: BlockDrive) -> None:
        if drive.place is not None:
            machine.mark_slot(_number(drive.place), taken=False)

    def recognize(self, drive: BlockDrive) -> None:
        told = _PCI_PATH.fullmatch(drive.pci_path or "")
        bridge, slot = (int(told[1], 16) - 2, int(told[2], 16)) if told else (BRIDGES, 0)
        if drive.place is None and 0 <= bridge < BRIDGES and slot < BRIDGE_SLOTS:
            drive.place = str(bridge * BRIDGE_SLOTS + slot)
        self.locate(drive)

    def locate(self, drive: BlockDrive) -> None:
        if drive.place is not None:
            number = _number(drive.place)
            bridge, slot = divmod(number, BRIDGE_SLOTS)
            drive.pci_path = _pci_path(number)
            drive.guest_match = f"0000:00:{bridge + 2:02x}.0/0000:{bridge + 1:02x}:{slot:02x}.0"


class _Ccw(_Driver):
    offer = Offer(serial_max=20)

    def recognize(self, drive: BlockDrive) -> None:
        if _DEV_NO.fullmatch(drive.dev_no or ""):
            drive.guest_match = f"/0.{(drive.dev_no or '').partition('.')[2]}/"

    def locate(self, drive: BlockDrive) -> None:
        drive.dev_no = f"0.{drive.index >> 16:x}.{drive.index & 0xFFFF:04x}"
        self.recognize(drive)


class _Mmio(_Driver):
    def locate(self, drive: BlockDrive) -> None:
        drive.guest_match = f"/{drive.guess.removeprefix('/dev/')}"


class _Nvdimm(_Driver):
    def locate(self, drive: BlockDrive) -> None:
        drive.guest_match = f"/region{drive.nvdimm_id}/"


_DRIVERS: dict[str, _Driver] = {
    VIRTIO_SCSI.name: _Scsi(),
    VIRTIO_BLK.name: _Pci(),
    VIRTIO_BLK_CCW.name: _Ccw(),
    VIRTIO_MMIO.name: _Mmio(),
    NVDIMM.name: _Nvdimm(),
}
_OTHER = _Driver()  # what every other driver is
OFFERS = {name: _DRIVERS.get(name, _OTHER).offer for name in DRIVERS}


class MemoryHypervisor(Hypervisor):
    """:param label: what errors call it.
    :param slots: PCI slots for virtio-blk, at most 960.
    :param existing: disks that the machine has from the start.

    :ivar backends: drive ID to host path, as the machine has them now.
    :ivar devices: drive ID to slot or address, likewise.
    :ivar journal: the last steps that were asked for, at least 1,000 of them, as (step, drive ID).
    :ivar dead: set it to have every connection refused.
    """

    offers: Mapping[str, Offer] = OFFERS
    lanes: int | None = None
    losses = 0
    STEPS: tuple[str, ...] = (
        "backend-add",
        "device-add",
        "device-del",
        "device-gone",
        "backend-del",
    )

    __slots__ = (
        "_existing", "_faults", "_gates", "_keep_journal", "_places", "_slot_count", "_slots",
        "backends", "dead", "devices", "journal", "label",
    )  # fmt: skip

    def __init__(
        self,
        label: str = "",
        *,
        slots: int = BRIDGES * BRIDGE_SLOTS,
        existing: tuple[FoundDisk, ...] = (),
    ) -> None:
        if not 0 <= slots <= BRIDGES * BRIDGE_SLOTS:
            raise InvalidValue(
                f"slots {slots!r} is not in 0 … {BRIDGES * BRIDGE_SLOTS}", value=slots
            )
        self.label = label
        self.backends: dict[str, str] = {}
        self.devices: dict[str, str] = {}
        self.journal: list[tuple[str, str]] = []
        self._keep_journal = True
        self.dead = False
        self._existing = existing
        self._places: set[str] = set()  # what `devices` holds, for looking up
        self._slot_count = slots
        self._slots = 0  # a bit for each that is taken
        self._faults: dict[str, deque[Fault]] | None = None
        self._gates: dict[str, asyncio.Event] | None = None

    @property
    def address(self) -> str:
        return ""  # it ends with its process

    def fail(self, step: str, fault: Fault, *, times: int = 1) -> None:
        """Has the next `times` runs of a step meet with a fault. Raises InvalidValue for a step
        that is not in STEPS."""
        if step not in self.STEPS:
            raise InvalidValue(
                f"step {step!r} is unknown; known are {', '.join(self.STEPS)}", value=step
            )
        self._faults = self._faults or {}
        self._faults.setdefault(step, deque()).extend([fault] * times)

    def let_go(self, step: str) -> None:
        """Lets go of what a `hold` holds back at a step, now and from here on."""
        if self._faults and (faults := self._faults.get(step)):
            self._faults[step] = deque(fault for fault in faults if fault.kind != "hold")
        if self._gates and (gate := self._gates.pop(step, None)):
            gate.set()

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        if self.dead:
            raise self._dead()
        known = {drive.id for drive in ours}
        kinds = {
            drive_id: DRIVERS[place.partition(" ")[0]] for drive_id, place in self.devices.items()
        }
        others = [
            FoundDisk(drive_id, kind.family)
            for drive_id, kind in kinds.items()
            if drive_id not in known
        ]
        ids = dict.fromkeys([*self.backends, *self.devices])
        held = {one: Held(one in self.devices, kinds.get(one, VIRTIO_SCSI)) for one in ids}
        return Inventory([*self._existing, *others], held, frozenset(self.backends.values()))

    async def is_gone(self) -> bool:
        return self.dead

    def take(self, drive: BlockDrive) -> None:
        _DRIVERS.get(drive.kind.name, _OTHER).take(self, drive)

    def recognize(self, drive: BlockDrive) -> None:
        _DRIVERS.get(drive.kind.name, _OTHER).recognize(drive)

    async def place(self, drive: BlockDrive) -> Place:
        return _DRIVERS.get(drive.kind.name, _OTHER).place(self, drive)

    def give_back(self, drive: BlockDrive) -> None:
        _DRIVERS.get(drive.kind.name, _OTHER).give_back(self, drive)
        drive.place = None

    def take_slot(self, drive: BlockDrive) -> int:
        """Takes the lowest free PCI slot. Raises SlotsExhausted."""
        lowest = (~self._slots & (self._slots + 1)).bit_length() - 1
        if lowest >= self._slot_count:
            text = (
                f"no free PCI slot for drive {drive.id}: the machine in memory has "
                f"{self._slot_count}"
            )
            raise SlotsExhausted(text, **drive.facts)
        self._slots |= 1 << lowest
        return lowest

    def mark_slot(self, number: int, *, taken: bool) -> None:
        """Takes note of a PCI slot."""
        self._slots = self._slots | 1 << number if taken else self._slots & ~(1 << number)

    def steps(self, drive: BlockDrive, image: OpenedImage) -> Sequence[Step]:
        return (
            Step(
                "backend-add",
                partial(self.backend_add, drive, image),
                partial(self.remove_rest, drive),
            ),
            Step("device-add", partial(self.device_add, drive)),
        )

    async def backend_add(self, drive: BlockDrive, image: OpenedImage) -> None:
        image.close()  # it notes the path only, and any number may be held back here

        def do() -> None:
            if drive.id in self.backends:
                raise VmmRefused(
                    f"backend {drive.id} exists already",
                    step="backend-add",
                    request=drive.id,
                    reply="duplicate",
                )
            self.backends[drive.id] = image.path

        await self._step("backend-add", drive, do)

    async def device_add(self, drive: BlockDrive) -> None:
        def do() -> None:
            if drive.id in self.devices:
                raise VmmRefused(
                    f"device {drive.id} exists already",
                    step="device-add",
                    request=drive.id,
                    reply="duplicate",
                )
            place = f"{drive.kind.name} {drive.place or drive.index}"
            if place in self._places:
                raise VmmRefused(
                    f"place {place} is taken", step="device-add", request=drive.id, reply="in use"
                )
            self.devices[drive.id] = place
            self._places.add(place)

        await self._step("device-add", drive, do)

    async def locate(self, drive: BlockDrive) -> None:
        _DRIVERS.get(drive.kind.name, _OTHER).locate(drive)

    async def request_removal(self, drive: BlockDrive) -> bool:
        await self._step("device-del", drive, lambda: None)
        return drive.id in self.devices

    async def removed(self, drive: BlockDrive) -> None:
        def do() -> None:
            self._places.discard(self.devices.pop(drive.id, ""))

        await self._step("device-gone", drive, do)

    def nudge(self, drive: BlockDrive) -> None:
        if self._keep_journal:
            self.journal.append(("device-del", drive.id))

    async def remove_rest(self, drive: BlockDrive) -> None:
        def do() -> None:
            if drive.id in self.devices:
                raise VmmRefused(
                    f"backend {drive.id} is in use",
                    step="backend-del",
                    request=drive.id,
                    reply="in use",
                )
            self.backends.pop(drive.id, None)

        await self._step("backend-del", drive, do)

    async def close(self) -> None:
        return None

    def _dead(self) -> VmmUnreachable:
        return VmmUnreachable(f"the machine in memory {self.label!r} is dead")

    async def _step(self, step: str, drive: BlockDrive, do: Callable[[], None]) -> None:
        if self.dead:
            raise self._dead()
        if self._keep_journal:
            self.journal.append((step, drive.id))
            if len(self.journal) > 2 * JOURNAL:
                del self.journal[:JOURNAL]
        faults = self._faults.get(step) if self._faults else None
        fault = faults.popleft() if faults else None
        if fault is None:
            return do()
        if fault.kind == "refuse":
            raise VmmRefused(
                f"{step} of drive {drive.id} was refused, as it was told to be",
                step=step,
                request=drive.id,
                reply="told to refuse",
            )
        if fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
        elif fault.kind == "hold":
            self._gates = self._gates or {}
            await self._gates.setdefault(step, asyncio.Event()).wait()
        elif not fault.done:
            if fault.kind == "break":
                raise KeyError(f"told to break before {step}")
            raise ConnectionLost(
                f"the connection broke before {step} of drive {drive.id} was carried out"
            )
        do()
        if fault.kind == "lose":
            raise ConnectionLost(
                f"the connection broke before {step} of drive {drive.id} was answered"
            )
        if fault.kind == "break":
            raise KeyError(f"told to break after {step}")


def _pci_path(number: int) -> str:
    """See BlockDrive.pci_path."""
    bridge, slot = divmod(number, BRIDGE_SLOTS)
    return f"{bridge + 2:02x}/{slot:02x}"


def _number(slot: str) -> int:
    """Raises InvalidValue for what is no slot of such a machine."""
    if slot.isascii() and slot.isdigit() and len(slot) < 4 and int(slot) < BRIDGES * BRIDGE_SLOTS:
        return int(slot)
    raise InvalidValue(f"slot {slot!r} is not in 0 … {BRIDGES * BRIDGE_SLOTS - 1}", value=slot)
