"""QEMU, over its QMP socket: drives as a block node (or memory object) and a device that uses it.

A reply to device_del is no removal: DEVICE_DELETED is, and until it came the node is in use.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Annotated

import msgspec

from pyblock.disk.image import OpenedImage
from pyblock.disk.model import BlockDrive, Place
from pyblock.errors import PyblockError, TransportError, VmmRefused
from pyblock.vmm.base import Hypervisor, Inventory, Offer, Step
from pyblock.vmm.qemu.descriptors import DescriptorSets
from pyblock.vmm.qemu.drivers import DRIVERS, TYPES, Answer, Other, QemuDriver
from pyblock.vmm.qemu.inventory import take_listing
from pyblock.vmm.qemu.places import Places
from pyblock.vmm.qemu.qmp import QmpSession, qemu_process
from pyblock.vmm.unix import real_path

OFFERS = {each.driver.name: each.offer for each in DRIVERS}

# QEMU works off its commands one by one, and each takes longer the more block nodes there are: with
# a hundred drives begun at once, every device would be added among a hundred nodes. A few in flight
# keep QEMU busy.
_LANES = 4


class _Uuid(msgspec.Struct):
    UUID: Annotated[str, msgspec.Meta(max_length=64)]


class QemuHypervisor(Hypervisor):
    """:param address: the path of the machine's QMP socket. QEMU serves one client at a time there;
    give pyblock a monitor of its own."""

    def __init__(self, address: str) -> None:
        self._qmp = QmpSession(address)
        self._descriptors = DescriptorSets(self._qmp)
        self._places = Places(self._qmp, TYPES)
        self._drivers = {
            each.driver.name: each(self._qmp, self._descriptors, self._places) for each in DRIVERS
        }
        self._other = Other(self._qmp, self._descriptors, self._places)
        # drive ID to the device that was asked to leave
        self._leaving: dict[str, tuple[str, asyncio.Future[None]]] = {}
        self._nudges: dict[str, asyncio.Task[None]] = {}  # by drive ID

    @property
    def offers(self) -> Mapping[str, Offer]:
        return OFFERS

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

    def watch(self, lost: Callable[[TransportError], None] | None) -> None:
        self._qmp.lost = lost

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        with self._descriptors.watched() as moved:
            listing = await take_listing(
                self._qmp, await self._places.look(), TYPES, {drive.id for drive in ours}
            )
        self._descriptors.learn(listing.sets, listing.unused, moved)
        return msgspec.structs.replace(listing.inventory, machine=await self._machine())

    async def _machine(self) -> str:
        """What two monitors of this machine have in common: QEMU's process, or its UUID where the
        peer is something in between."""
        if process := qemu_process(self._qmp.peer):
            return process
        uuid = (await self._qmp.ask(_Uuid, "query-uuid")).UUID
        return f"uuid {uuid}" if uuid.strip("0-") else ""

    async def is_gone(self) -> bool:
        return self._qmp.is_gone()

    def take(self, drive: BlockDrive) -> None:
        self._driver(drive).take(drive)

    async def place(self, drive: BlockDrive) -> Place:
        return await self._driver(drive).place(drive)

    def recognize(self, drive: BlockDrive) -> None:
        self._driver(drive).recognize(drive)

    async def locate(self, drive: BlockDrive) -> None:
        await self._driver(drive).locate(drive)

    def give_back(self, drive: BlockDrive) -> None:
        self._driver(drive).give_back(drive)

    def steps(self, drive: BlockDrive, image: OpenedImage) -> Sequence[Step]:
        # to device_add, where that went along with the backend
        driver, sent = self._driver(drive), list[Answer]()
        return (
            Step(
                "backend-add",
                partial(self._add_backend, driver, drive, image, sent),
                partial(self.remove_rest, drive),
            ),
            Step("device-add", partial(self._add_device, driver, drive, image, sent)),
        )

    async def _add_backend(
        self, driver: QemuDriver, drive: BlockDrive, image: OpenedImage, sent: list[Answer]
    ) -> None:
        if (answer := await driver.add_backend(drive, image)) is not None:
            sent.append(answer)

    async def _add_device(
        self, driver: QemuDriver, drive: BlockDrive, image: OpenedImage, sent: list[Answer]
    ) -> None:
        if not drive.verified:
            driver.check_opened(drive, image)
        try:
            if sent:
                await sent[0]
            else:
                await self._qmp.execute("device_add", driver.device(drive), step="device-add")
        except VmmRefused:
            self._places.doubt()  # whatever made QEMU refuse, our picture of the machine may be old
            raise

    async def request_removal(self, drive: BlockDrive) -> bool:
        if await self._ask_to_leave(drive, drive.id):
            return True
        # The original names the device otherwise than its node ("virtio-drive-…"), and its drives
        # can be loaded from its state.
        user = await self._driver(drive).user(drive)
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

    async def removed(self, drive: BlockDrive) -> None:
        _, leaving = self._leaving[drive.id]
        try:
            # a cancellation ends the waiting, not what others may wait for
            await asyncio.wait([leaving])
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
        # the operation that waits for the confirmation hears of a lost connection itself
        with contextlib.suppress(PyblockError):
            try:
                await self._qmp.execute("device_del", {"id": device_id}, step="device-del")
            except VmmRefused as error:
                if _not_found(error):
                    self._qmp.left(device_id)

    async def remove_rest(self, drive: BlockDrive) -> None:
        await self._driver(drive).remove_backend(drive)

    def _driver(self, drive: BlockDrive) -> QemuDriver:
        return self._drivers.get(drive.driver, self._other)

    async def close(self) -> None:
        for task in list(self._nudges.values()):
            task.cancel()
        await self._qmp.close()
        self._descriptors.closed()


def _not_found(error: VmmRefused) -> bool:
    return bool(error.reply["class"] == "DeviceNotFound")


def _is_pending(error: VmmRefused) -> bool:
    # QEMU 6.0 and later refuse a second device_del while the first is pending; there is no error
    # class of its own for it.
    return "already in the process of unplug" in error.reply["desc"]
