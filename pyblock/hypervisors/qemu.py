"""QEMU, over its QMP socket: drives as a block node (or memory object) and a device that uses it.

A reply to device_del is no removal: DEVICE_DELETED is, and until it came the node is in use.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from typing import Annotated, Any

import msgspec

from pyblock.drivers import NVDIMM, VIRTIO_BLK, VIRTIO_SCSI
from pyblock.errors import ImageReplaced, PyblockError, SlotsExhausted, UnknownDriver, VmmRefused
from pyblock.host import OpenedImage
from pyblock.hypervisors.base import Inventory, SteppedHypervisor
from pyblock.hypervisors.qemu_descriptors import DescriptorSets, Passed, set_behind
from pyblock.hypervisors.qemu_inventory import KATA_MEMORY, KATA_NVDIMM, LUNS, memory_modules, nodes, take_listing, user_of
from pyblock.hypervisors.qemu_tree import Slot, Tree, bus_numbers, properties, read_tree
from pyblock.hypervisors.qmp import QmpSession, qemu_process
from pyblock.hypervisors.unix import has_open, real_path
from pyblock.model import BlockDrive
from pyblock.tasks import log

# QEMU works off its commands one by one, and each takes longer the more block nodes there are: with a hundred drives begun at once, every
# device would be added among a hundred nodes. A few in flight keep QEMU busy.
_LANES = 4
_BUSY_TRIES = 6  # the node may stay in use for a moment after DEVICE_DELETED, while requests drain
_BUSY_PAUSE = 0.02  # seconds before the first new try; doubled each time


def _node(drive: BlockDrive, image: OpenedImage, file: str) -> dict[str, Any]:
    """The arguments of blockdev-add. What QEMU assumes anyway is left out: it takes 4 µs to read a byte."""
    access = {"read-only": True} if drive.read_only else {}
    below = {"driver": "host_device" if image.is_block else "file", "filename": file, **access}
    return {"driver": "raw", "node-name": drive.id, **access, "file": below}


def _memory(drive: BlockDrive, image: OpenedImage, file: str) -> dict[str, Any]:
    """The arguments of object-add."""
    access = {"readonly": True} if drive.read_only else {}
    return {"qom-type": "memory-backend-file", "id": drive.id, "mem-path": file, "size": image.size, "share": True, **access}


def _device(drive: BlockDrive) -> dict[str, Any]:
    """The arguments of device_add."""
    if drive.kind is NVDIMM:
        return {"driver": "nvdimm", "id": drive.id, "memdev": drive.id, "unarmed": drive.read_only}
    device: dict[str, Any]
    if drive.kind is VIRTIO_SCSI:
        target, lun = divmod(drive.index, LUNS)
        device = {"driver": "scsi-hd", "bus": drive.slot, "scsi-id": target, "lun": lun}
    else:
        bus, _, number = (drive.slot or "").rpartition("/")
        device = {"driver": "virtio-blk-pci", "bus": bus, "addr": f"0x{number}"}
    device |= {"id": drive.id, "drive": drive.id}
    if drive.serial is not None:
        device["serial"] = drive.serial
    if drive.share:
        device["share-rw"] = True
    return device


class _Uuid(msgspec.Struct):
    UUID: Annotated[str, msgspec.Meta(max_length=64)]


class QemuHypervisor(SteppedHypervisor):
    """:param address: the path of the machine's QMP socket. QEMU serves one client at a time there; give pyblock a monitor of its own."""

    def __init__(self, address: str) -> None:
        self._qmp = QmpSession(address)
        self._descriptors = DescriptorSets(self._qmp)
        self._tree: Tree | None = None
        self._slots: dict[str, tuple[str, Slot | None]] = {}  # slot name to the ID of our drive in it, and the slot if we chose it
        self._buses: dict[Any, int] = {}
        self._leaving: dict[str, tuple[str, asyncio.Future[None]]] = {}  # drive ID to the device that was asked to leave
        self._nudges: dict[str, asyncio.Task[None]] = {}  # by drive ID

    @property
    def drivers(self) -> frozenset[str]:
        return frozenset({VIRTIO_SCSI.name, VIRTIO_BLK.name, NVDIMM.name})

    @property
    def address(self) -> str:
        return f"qemu:{real_path(self._qmp.path)}"

    @property
    def waits_for(self) -> str:
        return self._qmp.waits_for

    @property
    def losses(self) -> int:
        return self._qmp.losses

    @property
    def lanes(self) -> int | None:
        return _LANES

    async def inventory(self, known: Collection[str] = ()) -> Inventory:
        with self._descriptors.watched() as moved:
            listing = await take_listing(self._qmp, await self._look(), known)
        self._descriptors.learn(listing.sets, listing.unused, moved)
        return msgspec.structs.replace(listing.inventory, machine=await self._machine())

    async def _machine(self) -> str:
        """What two monitors of this machine have in common: QEMU's process, or its UUID where the peer is something in between."""
        if process := qemu_process(self._qmp.peer):
            return process
        uuid = (await self._qmp.ask(_Uuid, "query-uuid")).UUID
        return f"uuid {uuid}" if uuid.strip("0-") else ""

    async def is_gone(self) -> bool:
        return self._qmp.is_gone()

    def adopt(self, drive: BlockDrive) -> None:
        if drive.kind is VIRTIO_BLK and drive.slot is not None:
            self._slots[drive.slot] = (drive.id, None)

    async def place(self, drive: BlockDrive) -> None:
        if drive.kind is VIRTIO_SCSI:
            buses = (self._tree or await self._look()).scsi_buses or (await self._look()).scsi_buses
            if not buses:
                raise UnknownDriver(
                    "this machine has no virtio-scsi controller; start QEMU with -device virtio-scsi-pci,id=scsi0 "
                    "(microvm: virtio-scsi-device)"
                )
            drive.slot = buses[0]
        elif drive.kind is VIRTIO_BLK:
            slot = self._free(self._tree or await self._look()) or self._free(await self._look())
            if slot is None:
                raise SlotsExhausted(
                    f"no free hot-pluggable PCI slot for drive {drive.id}; "
                    "start QEMU with more pcie-root-port (q35) or pci-bridge (pc) devices"
                )
            drive.slot, drive.pci_path = slot.name, slot.pci_path
            self._slots[slot.name] = (drive.id, slot)

    def _free(self, tree: Tree) -> Slot | None:
        return next((slot for slot in tree.free if slot.name not in self._slots), None)

    async def _look(self) -> Tree:
        self._tree = await read_tree(self._qmp)
        return self._tree

    def recognize(self, drive: BlockDrive) -> None:
        if drive.kind is VIRTIO_SCSI:
            target, lun = divmod(drive.index, LUNS)
            # The guest numbers its SCSI hosts itself, and SATA ports count among them: only what follows the host's number is a fact.
            drive.guest_match = f":0:{target}:{lun}/block/"
        elif drive.kind is NVDIMM:
            drive.guest_match = f"/region{drive.nvdimm_id}/"

    def vacate(self, drive: BlockDrive) -> None:
        held = self._slots.get(drive.slot) if drive.slot is not None else None
        if drive.slot is not None and held is not None and held[0] == drive.id:
            del self._slots[drive.slot]
            if self._tree is not None and all(slot.name != drive.slot for slot in self._tree.free):
                self._tree = None  # it was read while the drive was there, so it does not list the slot as free
        elif drive.kind is VIRTIO_BLK:
            self._tree = None  # another program plugged it in, and did not say where

    async def backend_add(self, drive: BlockDrive, image: OpenedImage) -> None:
        passed = await self._descriptors.pass_image(drive.id, image)
        if passed is None:
            await self._add_by_path(drive, image)
        elif drive.kind is NVDIMM:
            await self._add_memory(drive, image, passed)
        else:
            await self._add_node(drive, _node(drive, image, f"/dev/fdset/{passed.set}"))

    async def _add_node(self, drive: BlockDrive, node: dict[str, Any]) -> None:
        try:
            await self._qmp.execute("blockdev-add", node, step="backend-add")
        except VmmRefused:
            self._descriptors.remove(drive.id)
            raise

    async def _add_memory(self, drive: BlockDrive, image: OpenedImage, passed: Passed) -> None:
        """Memory opens no set, but a path of QEMU's own to the descriptor in it. It has the file mapped from then on."""
        try:
            memory = _memory(drive, image, f"/proc/self/fd/{passed.descriptor}")
            await self._qmp.execute("object-add", memory, step="backend-add")
        except VmmRefused as refusal:
            self._descriptors.remove(drive.id)
            if "No such file" not in refusal.reply["desc"]:  # which is to say: it has no /proc
                raise
            await self._add_by_path(drive, image)
        else:
            self._descriptors.remove(drive.id)

    async def _add_by_path(self, drive: BlockDrive, image: OpenedImage) -> None:
        """For a QEMU that no descriptor reaches: what it opened is looked at afterwards, where it can be seen."""
        image.check_path()
        self._descriptors.note(drive.id, None)
        if drive.kind is NVDIMM:
            await self._qmp.execute("object-add", _memory(drive, image, drive.file), step="backend-add")
        else:
            await self._qmp.execute("blockdev-add", _node(drive, image, drive.file), step="backend-add")
        has = has_open(self._qmp.peer, image)
        drive.verified = bool(has)
        if has is None:
            log.warning("drive %s: QEMU takes no descriptor, and what it opened as %r cannot be seen", drive.id, drive.file)
        elif not has:
            error = ImageReplaced(f"what QEMU opened as {drive.file!r} is not what was claimed: its path leads elsewhere there")
            await self._undo(drive, error)
            raise error

    async def device_add(self, drive: BlockDrive) -> None:
        try:
            await self._qmp.execute("device_add", _device(drive), step="device-add")
        except VmmRefused:
            self._tree = None  # whatever made QEMU refuse, our picture of the machine may be old
            raise

    async def locate(self, drive: BlockDrive) -> None:
        if drive.kind is not VIRTIO_BLK:
            self.recognize(drive)
        else:
            _, slot = self._slots.get(drive.slot or "", ("", None))
            if slot is None and drive.imported and (slot := await self._slot_of(drive)) is not None:
                drive.pci_path = slot.pci_path
            if slot is not None:
                if any(slot.route[:depth] not in self._buses for depth in range(1, len(slot.route) + 1)):
                    self._buses = await bus_numbers(self._qmp)
                drive.guest_match = slot.guest_match(self._buses)

    async def _slot_of(self, drive: BlockDrive) -> Slot | None:
        """Where another program put a drive's device."""
        user = await self._user_of(drive)
        tree = self._tree or await self._look()
        return next((disk.slot for disk in tree.disks if user and disk.id == user), None)

    async def device_del(self, drive: BlockDrive) -> bool:
        if await self._ask_to_leave(drive, drive.id):
            return True
        # The original names the device otherwise than its node ("virtio-drive-…"), and its drives can be loaded from its state.
        user = await self._user_of(drive)
        return user is not None and await self._ask_to_leave(drive, user)

    async def _ask_to_leave(self, drive: BlockDrive, device_id: str) -> bool:
        leaving = await self._qmp.leaving(device_id)
        try:
            await self._qmp.execute("device_del", {"id": device_id}, step="device-del")
        except VmmRefused as error:
            if _not_found(error):
                self._qmp.left(device_id)  # for whoever asked before and waits for it
                return False
            if not _is_pending(error):
                raise
        self._leaving[drive.id] = (device_id, leaving)
        return True

    async def _user_of(self, drive: BlockDrive) -> str | None:
        """The ID of the device that uses the drive's node, if there is one."""
        if drive.kind is NVDIMM:
            return next((name for name in await memory_modules(self._qmp) if name == KATA_NVDIMM + drive.id), None)
        return await user_of(self._qmp, drive.id)

    async def device_gone(self, drive: BlockDrive) -> None:
        _, leaving = self._leaving[drive.id]
        try:
            await asyncio.wait([leaving])  # a cancellation ends the waiting, not what others may wait for
        finally:
            self._leaving.pop(drive.id, None)  # two may wait for one that is nobody's
        leaving.result()

    def nudge(self, drive: BlockDrive) -> None:
        if drive.id in self._nudges:  # QEMU has not answered the last one yet
            return
        task = self._nudges[drive.id] = asyncio.create_task(self._nudge(drive))
        task.add_done_callback(lambda _: self._nudges.pop(drive.id, None))

    async def _nudge(self, drive: BlockDrive) -> None:
        device_id, _ = self._leaving.get(drive.id, (drive.id, None))
        with contextlib.suppress(PyblockError):  # the operation that waits for the confirmation hears of a lost connection itself
            try:
                await self._qmp.execute("device_del", {"id": device_id}, step="device-del")
            except VmmRefused as error:
                if _not_found(error):
                    self._qmp.left(device_id)

    async def backend_del(self, drive: BlockDrive) -> None:
        if drive.kind is not NVDIMM and drive.id not in self._descriptors.drive_ids:
            file = (await nodes(self._qmp)).get(drive.id)
            self._descriptors.note(drive.id, set_behind(file or ""))
        pause, backend = _BUSY_PAUSE, drive.id
        for last in [False] * (_BUSY_TRIES - 1) + [True]:
            try:
                # Nothing but its name: it must work when the image is long gone.
                if drive.kind is NVDIMM:
                    await self._qmp.execute("object-del", {"id": backend}, step="backend-del")
                else:
                    await self._qmp.execute("blockdev-del", {"node-name": drive.id}, step="backend-del")
            except VmmRefused as error:
                if (have := await self._backend_of(drive)) is None:
                    break
                if last:
                    raise error
                if have != backend:
                    backend = have
                    continue
                await asyncio.sleep(pause)
                pause *= 2
            else:
                break
        self._descriptors.remove(drive.id)

    async def _backend_of(self, drive: BlockDrive) -> str | None:
        """What QEMU calls the drive's backend, which another program may have named; None where it has none."""
        if drive.kind is NVDIMM:
            objects = await properties(self._qmp, "/objects")
            return next((name for name in (drive.id, KATA_MEMORY + drive.id) if name in objects), None)
        return drive.id if drive.id in await nodes(self._qmp) else None

    async def close(self) -> None:
        for task in list(self._nudges.values()):
            task.cancel()
        await self._qmp.close()
        self._descriptors.closed()


def _not_found(error: VmmRefused) -> bool:
    return bool(error.reply["class"] == "DeviceNotFound")


def _is_pending(error: VmmRefused) -> bool:
    # QEMU 6.0 and later refuse a second device_del while the first is pending; there is no error class of its own for it.
    return "already in the process of unplug" in error.reply["desc"]
