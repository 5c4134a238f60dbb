"""QEMU's drivers, one class each: what a drive is there (a backend and the device that uses it),
which place it takes, and where the guest then finds it.

A new driver is a class here and a row in DRIVERS; what the machine's own disks are follows from the
classes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import msgspec

from pyblock.core.naming import LUNS
from pyblock.disk.drivers import NVDIMM, PMEM, SD, VD, VIRTIO_BLK, VIRTIO_SCSI, Driver
from pyblock.disk.image import OpenedImage
from pyblock.disk.model import BlockDrive, Place
from pyblock.errors import (
    ImageReplaced,
    PyblockError,
    SlotsExhausted,
    TransportError,
    UnknownDriver,
    VmmRefused,
)
from pyblock.vmm.base import Offer, Unsettled
from pyblock.vmm.qemu.descriptors import DescriptorSets, Passed, set_behind
from pyblock.vmm.qemu.inventory import KATA_MEMORY, KATA_NVDIMM, memory_modules, nodes, user_of
from pyblock.vmm.qemu.places import Places
from pyblock.vmm.qemu.qmp import QmpSession
from pyblock.vmm.qemu.qmp_connection import Command as Sent
from pyblock.vmm.qemu.tree import DiskType, properties
from pyblock.vmm.unix import has_open

log = logging.getLogger(__name__)

_BUSY_TRIES = 6  # the node may stay in use for a moment after DEVICE_DELETED, while requests drain
_BUSY_PAUSE = 0.02  # seconds before the first new try; doubled each time

NOWHERE = Place()

Command = tuple[str, dict[str, Any]]
Answer = asyncio.Future[msgspec.Raw]


class QemuDriver(ABC):
    """:param qmp: QEMU's monitor.
    :param sets: what was handed over to it.
    :param places: where drives can go.

    :cvar driver: what it implements.
    :cvar types: how QEMU calls its devices.
    """

    driver: ClassVar[Driver]
    offer: ClassVar[Offer]
    types: ClassVar[tuple[DiskType, ...]]

    def __init__(self, qmp: QmpSession, sets: DescriptorSets, places: Places) -> None:
        self._qmp = qmp
        self._sets = sets
        self._places = places

    # Its place. One whose place follows from its index, or does not matter, takes none.

    async def place(self, drive: BlockDrive) -> Place:
        """See Hypervisor.place."""
        return NOWHERE

    def take(self, drive: BlockDrive) -> None:  # noqa: B027 - most need none
        """See Hypervisor.take."""

    def give_back(self, drive: BlockDrive) -> None:  # noqa: B027 - most need none
        """See Hypervisor.give_back."""

    def recognize(self, drive: BlockDrive) -> None:  # noqa: B027 - most need none
        """See Hypervisor.recognize."""

    async def locate(self, drive: BlockDrive) -> None:
        """See Hypervisor.locate."""
        self.recognize(drive)

    # Its device.

    @abstractmethod
    def device(self, drive: BlockDrive) -> dict[str, Any]:
        """The arguments of device_add. What QEMU assumes anyway is left out: it takes 4 µs to read
        a byte."""

    @abstractmethod
    async def user(self, drive: BlockDrive) -> str | None:
        """The ID of the device that uses the drive's backend, whoever named it; None where there is
        none."""

    # Its backend.

    @abstractmethod
    def backend(self, drive: BlockDrive, image: OpenedImage, file: str) -> Command:
        """What adds the backend, with the image under that path of QEMU's."""

    @abstractmethod
    async def add_passed(
        self, drive: BlockDrive, image: OpenedImage, passed: Passed
    ) -> Answer | None:
        """Adds the backend, with the image as it was handed over. See `add_backend`."""

    @abstractmethod
    def deletion(self, name: str) -> Command:
        """What removes a backend of that name. Nothing but its name is told: it must work when the
        image is long gone."""

    @abstractmethod
    async def backend_name(self, drive: BlockDrive) -> str | None:
        """What QEMU calls the drive's backend, which another program may have named; None where it
        has none."""

    async def add_backend(self, drive: BlockDrive, image: OpenedImage) -> Answer | None:
        """Hands the image over and adds the backend that reads and writes it. Where device_add was
        sent along with it, returns the answer to that; else None."""
        passed = await self._sets.pass_image(drive.id, image)
        if passed is not None:
            return await self.add_passed(drive, image, passed)
        await self._add_by_path(drive, image)
        return None

    async def _add_by_path(self, drive: BlockDrive, image: OpenedImage) -> None:
        """For a QEMU that no descriptor reaches: what it opened is looked at before the guest gets
        it (`check_opened`)."""
        image.check_path()
        self._sets.note(drive.id, None)
        await self._execute(self.backend(drive, image, drive.file), "backend-add")
        drive.verified = False

    def check_opened(self, drive: BlockDrive, image: OpenedImage) -> None:
        """Raises ImageReplaced when QEMU can be seen to have opened something else than was
        claimed."""
        has = has_open(self._qmp.peer, image)
        drive.verified = bool(has)
        if has is None:
            log.warning(
                "drive %s: QEMU takes no descriptor, and what it opened as %r cannot be seen",
                drive.id,
                drive.file,
            )
        elif not has:
            text = (
                f"what QEMU opened as {drive.file!r} is not what was claimed: its path leads "
                "elsewhere there"
            )
            raise ImageReplaced(text, **drive.facts)

    async def remove_backend(self, drive: BlockDrive) -> None:
        """Removes the backend; content when there is none."""
        pause, name = _BUSY_PAUSE, drive.id
        for last in [False] * (_BUSY_TRIES - 1) + [True]:
            try:
                await self._execute(self.deletion(name), "backend-del")
            except VmmRefused as error:
                if (have := await self.backend_name(drive)) is None:
                    break
                if last:
                    raise error
                if have != name:
                    name = have
                    continue
                await asyncio.sleep(pause)
                pause *= 2
            else:
                break
        self._sets.remove(drive.id)

    async def _execute(self, command: Command, step: str) -> None:
        await self._qmp.execute(*command, step=step)


class OnNode(QemuDriver):
    """A drive whose backend is a block node."""

    def backend(self, drive: BlockDrive, image: OpenedImage, file: str) -> Command:
        """No `raw` node above it: that would only pass on what it is asked."""
        access = {"read-only": True} if drive.read_only else {}
        driver = "host_device" if image.is_block else "file"
        return "blockdev-add", {"driver": driver, "node-name": drive.id, "filename": file, **access}

    async def add_passed(
        self, drive: BlockDrive, image: OpenedImage, passed: Passed
    ) -> Answer | None:
        """Sends both commands in one write where nobody else can have a node of that name: QEMU
        adds the device whatever became of the node, and the guest would get the other's image."""
        node = self.backend(drive, image, f"/dev/fdset/{passed.set}")
        answer: Answer | None = None
        try:
            if drive.fresh:
                added, answer = await self._qmp.send_both(
                    Sent(*node, "backend-add"), Sent("device_add", self.device(drive), "device-add")
                )
                # is answered last; what it says is the next step's
                with contextlib.suppress(PyblockError):
                    await answer
                await added
            else:
                await self._execute(node, "backend-add")
        except VmmRefused as refusal:
            if answer is not None:
                await self._see_it_come_to_nothing(drive, answer, refusal)
            self._sets.remove(drive.id)
            raise
        return answer

    async def _see_it_come_to_nothing(
        self, drive: BlockDrive, answer: Answer, refusal: VmmRefused
    ) -> None:
        """Returns when the guest has no device of a node that was refused. Unsettled when it
        may."""
        try:
            await answer
        except VmmRefused:
            return  # as it has to be
        except TransportError as error:
            if not error.sent:
                return
            raise
        refusal.add_note(
            f"the node was somebody else's, and the guest had it until {drive.id} was unplugged "
            "again"
        )
        try:
            leaving = await self._qmp.leaving(drive.id)
            await self._qmp.execute("device_del", {"id": drive.id}, step="device-del")
            await leaving
        except PyblockError as error:
            refusal.add_note(f"unplugging it failed: {error}")
            raise Unsettled(refusal) from error

    def deletion(self, name: str) -> Command:
        return "blockdev-del", {"node-name": name}

    async def remove_backend(self, drive: BlockDrive) -> None:
        if drive.id not in self._sets.drive_ids:
            file = (await nodes(self._qmp)).get(drive.id)
            self._sets.note(drive.id, set_behind(file or ""))
        await super().remove_backend(drive)

    async def backend_name(self, drive: BlockDrive) -> str | None:
        return drive.id if drive.id in await nodes(self._qmp) else None

    async def user(self, drive: BlockDrive) -> str | None:
        return await user_of(self._qmp, drive.id)

    def _options(self, drive: BlockDrive) -> dict[str, Any]:
        """What the devices on a node have in common."""
        options: dict[str, Any] = {"id": drive.id, "drive": drive.id}
        if drive.serial is not None:
            options["serial"] = drive.serial
        if drive.share:
            options["share-rw"] = True
        return options


class OnMemory(QemuDriver):
    """A drive whose backend is a memory object, which has the file mapped."""

    def backend(self, drive: BlockDrive, image: OpenedImage, file: str) -> Command:
        access = {"readonly": True} if drive.read_only else {}
        memory = {"qom-type": "memory-backend-file", "id": drive.id, "mem-path": file}
        return "object-add", {**memory, "size": image.size, "share": True, **access}

    # device_add never goes along
    async def add_passed(self, drive: BlockDrive, image: OpenedImage, passed: Passed) -> None:
        """Memory opens no set, but a path of QEMU's own to the descriptor in it. It has the file
        mapped from then on."""
        try:
            await self._execute(
                self.backend(drive, image, f"/proc/self/fd/{passed.descriptor}"), "backend-add"
            )
        except VmmRefused as refusal:
            self._sets.remove(drive.id)
            if "No such file" not in refusal.reply["desc"]:  # which is to say: it has no /proc
                raise
            await self._add_by_path(drive, image)
        else:
            self._sets.remove(drive.id)

    def deletion(self, name: str) -> Command:
        return "object-del", {"id": name}

    async def backend_name(self, drive: BlockDrive) -> str | None:
        objects = await properties(self._qmp, "/objects")
        return next((name for name in (drive.id, KATA_MEMORY + drive.id) if name in objects), None)

    async def user(self, drive: BlockDrive) -> str | None:
        return next(
            (name for _, name in await memory_modules(self._qmp) if name == KATA_NVDIMM + drive.id),
            None,
        )


class OnPci(QemuDriver):
    """A drive whose device sits in the first free PCI slot that takes hot-plug."""

    async def place(self, drive: BlockDrive) -> Place:
        slot = await self._places.take_slot(drive.id)
        if slot is None:
            raise SlotsExhausted(
                f"no free hot-pluggable PCI slot for drive {drive.id}; start QEMU with more "
                "pcie-root-port (q35) or pci-bridge (pc) devices",
                **drive.facts,
            )
        return Place(slot.name, pci_path=slot.pci_path)

    def take(self, drive: BlockDrive) -> None:
        if drive.place is not None:
            self._places.take(drive.place, drive.id)

    def give_back(self, drive: BlockDrive) -> None:
        self._places.give_back(drive.place, drive.id)

    async def locate(self, drive: BlockDrive) -> None:
        slot = self._places.slot(drive.place)
        if slot is None and drive.imported:
            user = await self.user(drive)
            disks = (await self._places.seen()).disks
            slot = next((disk.slot for disk in disks if user and disk.id == user), None)
            if slot is not None:
                drive.pci_path = slot.pci_path
        if slot is not None:
            drive.guest_match = await self._places.guest_match(slot)

    def _seat(self, drive: BlockDrive) -> dict[str, Any]:
        """Where the device goes, as device_add takes it."""
        bus, _, number = (drive.place or "").rpartition("/")
        slot = self._places.slot(drive.place)
        # behind a port there is one place
        where = {} if slot is not None and slot.port else {"addr": f"0x{number}"}
        return {"bus": bus, **where}


class ScsiDisk(OnNode):
    """A LUN of the first virtio-scsi controller, whose seat follows from the index."""

    driver = VIRTIO_SCSI
    offer = Offer(serial_max=36, descriptors=True, removal_time=0.1)
    types = (DiskType("scsi", r"scsi-(hd|block)", SD),)

    async def place(self, drive: BlockDrive) -> Place:
        bus = await self._places.scsi_bus()
        if bus is None:
            raise UnknownDriver(
                "this machine has no virtio-scsi controller; start QEMU with "
                "-device virtio-scsi-pci,id=scsi0 (microvm: virtio-scsi-device)",
                **drive.facts,
            )
        return Place(bus)

    def device(self, drive: BlockDrive) -> dict[str, Any]:
        target, lun = divmod(drive.index, LUNS)
        return {
            "driver": "scsi-hd",
            "bus": drive.place,
            "scsi-id": target,
            "lun": lun,
            **self._options(drive),
        }

    def recognize(self, drive: BlockDrive) -> None:
        target, lun = divmod(drive.index, LUNS)
        # The guest numbers its SCSI hosts itself, and SATA ports count among them: only what
        # follows the host's number is a fact.
        drive.guest_match = f":0:{target}:{lun}/block/"


class VirtioBlk(OnPci, OnNode):
    """A PCI device of its own."""

    driver = VIRTIO_BLK
    # with ACPI hot-plug; 6.3 s with native PCIe hot-plug
    offer = Offer(serial_max=20, descriptors=True, removal_time=0.2)
    types = (DiskType("pci", r"virtio-blk-.*", VD), DiskType("mmio", r"virtio-blk-device", VD))

    def device(self, drive: BlockDrive) -> dict[str, Any]:
        return {"driver": "virtio-blk-pci", **self._seat(drive), **self._options(drive)}


class Nvdimm(OnMemory):
    """A memory module, in the lowest free memory slot. QEMU 7.2 lets go of none: it says so to each
    removal."""

    driver = NVDIMM
    offer = Offer(share=True, descriptors=True)
    types = (DiskType("memory", r"nvdimm", PMEM),)

    def device(self, drive: BlockDrive) -> dict[str, Any]:
        return {"driver": "nvdimm", "id": drive.id, "memdev": drive.id, "unarmed": drive.read_only}

    def recognize(self, drive: BlockDrive) -> None:
        drive.guest_match = f"/region{drive.nvdimm_id}/"


class Other(OnNode):
    """What another program plugged in by a driver that is not offered here: it can be told to
    leave, and no more."""

    types = ()

    def device(self, drive: BlockDrive) -> dict[str, Any]:
        raise UnknownDriver(
            f"QEMU is not told to plug in drives by driver {drive.driver!r}", **drive.facts
        )


DRIVERS: tuple[type[QemuDriver], ...] = (ScsiDisk, VirtioBlk, Nvdimm)

# Disks that a machine may have and that no driver here plugs in; they use up names all the same.
STRANGERS = (
    DiskType("pci", r"vhost-user-blk-.*", VD),
    DiskType("mmio", r"vhost-user-blk", VD),
    DiskType("memory", r"virtio-pmem(-.*)?", PMEM),
    DiskType("scsi", r"scsi-(generic|cd)", None),  # no name of a disk, but a seat
    DiskType("ide", r"ide-hd", SD),
)
TYPES = (*(kind for one in DRIVERS for kind in one.types), *STRANGERS)
