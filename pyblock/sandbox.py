"""One virtual machine and what is plugged into it: block index, ordinals, drive IDs, and the VMM adapter.

A sandbox is the device receiver: devices ask it to reserve, plug, unplug and release. It connects to its VMM when it first has to.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import msgspec
from msgspec import UNSET

from pyblock.device import BlockDevice, Phase
from pyblock.drivers import DRIVERS, FAMILIES, Family
from pyblock.errors import (
    CallerError,
    DeviceConflict,
    IndexesExhausted,
    IndexTaken,
    InvalidID,
    InvalidImage,
    InvalidIndex,
    InvalidName,
    InvalidState,
    InvalidValue,
    PyblockError,
    SandboxClosed,
    UnknownDevice,
    UnknownDriver,
    VmmUnreachable,
)
from pyblock.hypervisors import open_hypervisor
from pyblock.hypervisors.base import CONNECT_TIMEOUT, Hypervisor
from pyblock.index import BlockIndex
from pyblock.manager import Device, DeviceManager
from pyblock.model import BlockDrive, DeviceInfo
from pyblock.naming import drive_index, make_name_id
from pyblock.operation import Operation, deadline_after
from pyblock.persist import device_from_state, device_to_state
from pyblock.plan import plan
from pyblock.state import DeviceState, HypervisorState, SandboxNotes, SandboxState
from pyblock.stores import json_file

CAPACITY = 65536
TIMEOUT = 60.0  # seconds: the deadline of attach and detach unless the caller gives another
CLOSE_GRACE = 5.0  # seconds that close waits for attaches to be undone

_SANDBOX_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

Image = str | os.PathLike[str] | DeviceInfo


class Sandbox:
    """:param sandbox_id: 1 to 128 of A-Z a-z 0-9 _ . - beginning with a letter or digit. Raises InvalidID.
    :param vm: the VMM's address (`qemu:/path/to/qmp.sock`, `memory:`), or an adapter. Raises UnknownScheme.
    :param driver: the driver of devices that ask for none. Raises UnknownDriver.
    :param capacity: how many drives it may hold, 1 to 2^20. Raises InvalidIndex.
    :param block_offset: how many virtio-block names the guest uses before the first drive; None has the VMM asked.

    Everything runs in the event loop in which it is first used; it is not safe to share between threads (pyblock.blocking is).
    """

    def __init__(
        self,
        sandbox_id: str,
        vm: str | Hypervisor,
        *,
        driver: str = "virtio-scsi",
        capacity: int = CAPACITY,
        block_offset: int | None = None,
    ) -> None:
        if not isinstance(sandbox_id, str) or not _SANDBOX_ID.fullmatch(sandbox_id):
            raise InvalidID(f"sandbox ID {sandbox_id!r} is not 1 to 128 of A-Z a-z 0-9 _ . - beginning with a letter or digit")
        if block_offset is not None and not 0 <= block_offset < capacity:
            raise InvalidValue(f"block offset {block_offset!r} is not in 0 … {capacity - 1}")
        self.id = sandbox_id
        self.running: set[Operation] = set()
        self.manager = DeviceManager(driver)
        self.index = BlockIndex(capacity)
        self._vmm = open_hypervisor(vm) if isinstance(vm, str) else vm
        self._ordinals: dict[str, BlockIndex] = {}
        self._offsets: dict[str, int] = {} if block_offset is None else {"vd": block_offset}
        self._drive_ids: set[str] = set()
        self._foreign: set[int] = set()  # indexes whose address a disk of the machine's own sits at
        self._finished_late: set[str] = set()  # devices whose callers were told "pending", and which are gone since
        self._untouched: list[DeviceState] = []
        self._loaded: SandboxState | None = None
        self._open = False
        self._known = False  # the machine's own disks have been asked for
        self._asking: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {len(self.manager)} devices, {len(self.index)} indexes taken>"

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def devices(self) -> list[Device]:
        """The devices it knows, attached or pending, in the order in which they came."""
        return list(self.manager)

    async def attach(
        self,
        image: Image,
        *,
        driver: str | None = None,
        read_only: bool = False,
        serial: str | None = None,
        device_id: str | None = None,
        timeout: float | None = TIMEOUT,
    ) -> BlockDevice:
        """Attaches an image and returns its device when the VMM has it. The same image again is the same device, counted once more.

        :param image: a path (file or block device), or a DeviceInfo, which then says all the rest.
        :param driver: a name out of pyblock.DRIVERS; None takes the sandbox's.
        :param timeout: seconds, None for no deadline.
        Raises CallerError, CapacityError (nothing was changed), VmmRefused, TransportError (everything was undone), AttachPending (the
        outcome is not known yet; see BlockDevice.attach).
        """
        info = self._info(image, driver=driver, read_only=read_only, serial=serial, device_id=device_id)
        deadline = deadline_after(timeout)
        [device] = self._obtain([info])
        await self._attach(device, deadline)
        return device

    async def attach_many(
        self,
        images: Iterable[Image],
        *,
        driver: str | None = None,
        read_only: bool = False,
        timeout: float | None = TIMEOUT,
        progress: Callable[[BlockDevice], None] | None = None,
    ) -> list[BlockDevice]:
        """Attaches many images at once, with indexes in the order given, and returns their devices in that order. All or none.

        When one fails, the others are detached again and the first error is raised; trouble in undoing is added to it as notes.

        :param timeout: seconds for all of them together, None for no deadline.
        :param progress: called with each device when it is attached.
        """
        infos = [self._info(image, driver=driver, read_only=read_only) for image in images]
        deadline = deadline_after(timeout)
        devices = self._obtain(infos)
        attached: list[BlockDevice] = []
        errors: list[BaseException] = []

        async def one(device: BlockDevice) -> None:
            try:
                await self._attach(device, deadline)
            except BaseException as error:
                errors.append(error)
                if isinstance(error, asyncio.CancelledError):
                    raise
            else:
                attached.append(device)
                if progress is not None:
                    progress(device)

        # The tasks start in this order, and an attach reserves before it first waits: so the indexes follow the order of the images.
        tasks = [asyncio.ensure_future(one(device)) for device in devices]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            await asyncio.wait(tasks)
            await self._take_back(attached, [])
            raise
        if errors:
            await self._take_back(attached, errors)
            _raise_first(errors)
        return devices

    async def detach(self, device: Device | str, *, timeout: float | None = TIMEOUT) -> None:
        """Takes one attach of a device back; the last one unplugs it. Returns when the VMM says that it is gone.

        :param device: a device of this sandbox, or its ID.
        :param timeout: seconds, None for no deadline.
        Raises UnknownDevice, NotAttached; VmmRefused (it stays attached); DetachPending (not confirmed: everything stays taken, and
        calling again is safe, also after a late confirmation has finished the job).
        """
        self._check_open()
        deadline = deadline_after(timeout)
        device_id = device if isinstance(device, str) else device.id
        if device_id in self._finished_late and device_id not in self.manager:
            self._finished_late.discard(device_id)
            return
        found = self.manager.find(device_id)
        if not isinstance(device, str) and device is not found:
            raise UnknownDevice(f"device {device_id!r} of this sandbox is another object; the one given was detached, or belongs elsewhere")
        try:
            await self.manager.detach(device_id, self, deadline)
        except BaseException as error:
            # Its user has asked for the end: a late confirmation completes it, or it was there in the very moment of a cancellation.
            ended = (Phase.DETACHING, Phase.DETACH_PENDING, *((Phase.DETACHED,) if isinstance(error, asyncio.CancelledError) else ()))
            if isinstance(found, BlockDevice) and found.phase in ended:
                self.manager.drop(found)
            raise
        self.manager.drop(found)

    async def detach_many(self, devices: Iterable[Device | str], *, timeout: float | None = TIMEOUT) -> None:
        """Detaches many devices at once. All are tried; the first error is raised, the others are its notes."""
        done = await asyncio.gather(*(self.detach(device, timeout=timeout) for device in list(devices)), return_exceptions=True)
        _raise_first([error for error in done if isinstance(error, BaseException)])

    async def save(self, path: str | os.PathLike[str]) -> None:
        """Writes devices, counts and indexes to a JSON file, atomically and synced. Raises StateError when the file there is something
        else."""
        state = self.state()
        await asyncio.to_thread(json_file.write, path, state)

    async def load(self, path: str | os.PathLike[str]) -> None:
        """Restores what `save` (or the original) wrote, into an open sandbox without devices. Touches no VMM; a StateError changes
        nothing."""
        self.restore(await asyncio.to_thread(json_file.read, path), where=f"state file {os.fspath(path)!r}")

    def state(self) -> SandboxState:
        """What `save` writes. An operation under way is saved as pending."""
        self._check_open()
        loaded = self._loaded or SandboxState()
        hypervisor = loaded.hypervisor_state if isinstance(loaded.hypervisor_state, HypervisorState) else HypervisorState()
        kept = hypervisor.block_index_map or {}
        indexes = {str(index): kept.get(str(index), {}) for index in self.index if index not in self._foreign}
        saved_hypervisor = msgspec.structs.replace(hypervisor, block_index_map=indexes)
        saved = SandboxState(
            notes=SandboxNotes(sandbox=self.id, offsets=dict(self._offsets)),
            devices=[*(device_to_state(device) for device in self.manager), *self._untouched],
            hypervisor_state=saved_hypervisor,
        )
        for new, old in ((saved, loaded), (saved_hypervisor, hypervisor)):
            if old.extra:
                new.__dict__["extra"] = old.extra
        return saved

    def restore(self, state: SandboxState, *, where: str = "the state") -> None:
        """Restores a decoded state; see `load`."""
        self._check_open()
        if len(self.manager):
            raise CallerError(f"sandbox {self.id} has {len(self.manager)} devices; a state is loaded into one without")
        devices: list[Device] = []
        untouched: list[DeviceState] = []
        for saved in state.devices or []:
            device = device_from_state(saved, self.manager.driver, where=where)
            if device is None:
                untouched.append(saved)
            else:
                devices.append(device)
        drives = [device.drive for device in devices if isinstance(device, BlockDevice) and device.drive is not None]
        manager = DeviceManager(self.manager.driver.name)
        try:
            manager.load(devices)
            index = self._restored_index(state, drives)
            ordinals = self._restored_ordinals(drives)
        except PyblockError as error:
            raise InvalidState(f"{where} contradicts itself: {error}; it is left as it is") from error
        if len({drive.id for drive in drives}) != len(drives):
            raise InvalidState(f"{where} contradicts itself: two drives have one ID; it is left as it is")
        self.manager, self.index, self._ordinals, self._untouched, self._loaded = manager, index, ordinals, untouched, state
        self._drive_ids = {drive.id for drive in drives}
        if state.notes is not UNSET:
            self._offsets = {name: offset for name, offset in state.notes.offsets.items() if name in FAMILIES and offset >= 0}
        self._foreign = set()
        self._known = False
        for drive in drives:
            self._vmm.adopt(drive)

    async def close(self) -> None:
        """Ends the connection to the VMM; the machine keeps what it has. Attaches that nobody waits for any more are first undone,
        within 5 s."""
        undoing = [operation for operation in self.running if operation.abandoned and operation.undoing]
        if undoing:
            await asyncio.wait([asyncio.ensure_future(operation.settled(None)) for operation in undoing], timeout=CLOSE_GRACE)
        self._open = False
        operations = list(self.running)
        for operation in operations:
            operation.cancel()
        for operation in operations:
            await operation.settled(None)
        await self._vmm.close()

    # The device receiver: what devices call.

    def reserve(self, device: BlockDevice) -> BlockDrive:
        """Takes index, ordinal and drive ID for a device; see DeviceReceiver."""
        info = device.info
        kind = DRIVERS[info.driver or ""]
        if kind.name not in self._vmm.drivers:
            raise UnknownDriver(f"this VMM has no driver {kind.name!r}; it has {', '.join(sorted(self._vmm.drivers))}")
        ordinals = self._family(kind.family)
        index, ordinal = plan(self.index, ordinals)
        try:
            if kind.scsi and index >= CAPACITY:
                raise IndexesExhausted(f"index {index} has no SCSI address: there are {CAPACITY} of them, 256 IDs of 256 LUNs")
            drive_id = make_name_id("drive", device.id)
            salt = 0
            while drive_id in self._drive_ids:
                salt += 1
                drive_id = make_name_id("drive", device.id, salt=salt)
                if salt > len(self._drive_ids):
                    raise DeviceConflict(f"drive ID {drive_id!r} is taken in this machine; give device {device.id} another ID")
            offset = self._offsets.get(kind.family.prefix, kind.offset)
            drive = BlockDrive(
                id=drive_id, index=index, ordinal=ordinal, offset=offset, kind=kind, file=info.path,
                format=info.options.get("fstype") or "raw", read_only=info.read_only, serial=info.serial,
            )  # fmt: skip
        except BaseException:
            self.index.release(index)
            ordinals.release(ordinal)
            raise
        self._drive_ids.add(drive_id)
        self._finished_late.discard(device.id)
        return drive

    def release(self, device: BlockDevice, drive: BlockDrive, *, late: bool) -> None:
        """Gives back what `reserve` took; see DeviceReceiver."""
        self.index.release(drive.index)
        self._family(drive.kind.family).release(drive.ordinal)
        self._drive_ids.discard(drive.id)
        if late:
            self._finished_late.add(device.id)
            self.manager.tidy(device)

    async def plug(self, drive: BlockDrive) -> None:
        """See DeviceReceiver."""
        await self._vmm.plug(drive)

    async def unplug(self, drive: BlockDrive) -> None:
        """See DeviceReceiver."""
        await self._vmm.unplug(drive)

    def nudge(self, drive: BlockDrive) -> None:
        """See DeviceReceiver."""
        self._vmm.nudge(drive)

    def _check_open(self) -> None:
        if not self._open:
            raise SandboxClosed(f"sandbox {self.id} is not open; use it inside 'with'")

    def _info(
        self, image: Image, *, driver: str | None, read_only: bool, serial: str | None = None, device_id: str | None = None
    ) -> DeviceInfo:
        if not isinstance(image, DeviceInfo):
            return DeviceInfo(path=os.fspath(image), driver=driver, read_only=read_only, serial=serial, id=device_id)
        if driver is not None or read_only or serial is not None or device_id is not None:
            raise InvalidValue("a DeviceInfo says driver, read_only, serial and ID itself; give them there")
        if image.dev_type in ("c", "u"):
            raise InvalidImage(f"a character device ({image.major}:{image.minor}) is no disk; count it through sandbox.manager")
        return image

    def _obtain(self, infos: Iterable[DeviceInfo]) -> list[BlockDevice]:
        """The devices for what the caller wants, one user counted on each; all or none."""
        self._check_open()
        devices: list[BlockDevice] = []
        try:
            for info in infos:
                device = self.manager.obtain(info)
                assert isinstance(device, BlockDevice)  # _info let no other through
                devices.append(device)
        except BaseException:
            for device in devices:
                self.manager.drop(device)
            raise
        return devices

    async def _attach(self, device: BlockDevice, deadline: float | None) -> None:
        try:
            if not self._known:
                await self._ask(deadline)
            await device.attach(self, deadline)
        except BaseException:
            self.manager.drop(device)
            raise

    async def _take_back(self, devices: Iterable[BlockDevice], errors: list[BaseException]) -> None:
        """Undoes the attaches of a batch; trouble goes behind `errors`."""
        done = await asyncio.gather(*(self.detach(device) for device in devices), return_exceptions=True)
        errors.extend(error for error in done if isinstance(error, BaseException))

    async def _ask(self, deadline: float | None) -> None:
        """Learns, once, which disks the machine has already. All who wait for it share one question."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._learn())
        asking = self._asking
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(asking)
        except TimeoutError:
            raise VmmUnreachable(f"the VMM of sandbox {self.id} did not say before the deadline which disks it has") from None
        finally:
            if asking.done():
                self._asking = None

    async def _learn(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                found = await self._vmm.inventory()
        except TimeoutError:
            raise VmmUnreachable(f"the VMM of sandbox {self.id} did not answer within {CONNECT_TIMEOUT:g} s") from None
        counts: dict[str, int] = {}
        for disk in found:
            if disk.id in self._drive_ids:
                continue
            counts[disk.family.prefix] = counts.get(disk.family.prefix, 0) + 1
            if disk.id:
                self._drive_ids.add(disk.id)
            if disk.index is not None and disk.index < self.index.capacity and disk.index not in self.index:
                self.index.reserve(disk.index)
                self._foreign.add(disk.index)
        for prefix, count in counts.items():
            self._offsets.setdefault(prefix, count)
        self._known = True

    def _family(self, family: Family) -> BlockIndex:
        ordinals = self._ordinals.get(family.prefix)
        if ordinals is None:
            ordinals = self._ordinals[family.prefix] = BlockIndex(self.index.capacity)
        return ordinals

    def _restored_index(self, state: SandboxState, drives: list[BlockDrive]) -> BlockIndex:
        indexes = [drive.index for drive in drives]
        taken = set(indexes)
        if len(taken) != len(indexes):
            twice = next(index for index in indexes if indexes.count(index) > 1)
            raise IndexTaken(f"index {twice} belongs to two drives")
        if isinstance(state.hypervisor_state, HypervisorState):
            for text in state.hypervisor_state.block_index_map or {}:
                if not (text.isascii() and text.isdigit()):
                    raise InvalidIndex(f"index {text!r} in BlockIndexMap is not a number")
                taken.add(int(text))
        index = BlockIndex(self.index.capacity)
        index.reserve_many(taken)
        return index

    def _restored_ordinals(self, drives: list[BlockDrive]) -> dict[str, BlockIndex]:
        """Reserves the ordinals that the state tells, then finds one for each drive of a state that does not: the original wrote none."""
        ordinals = {drive.kind.family.prefix: BlockIndex(self.index.capacity) for drive in drives}
        for prefix, family in ordinals.items():
            family.reserve_many(drive.ordinal for drive in drives if drive.kind.family.prefix == prefix and drive.ordinal >= 0)
        for drive in drives:
            if drive.ordinal >= 0:
                continue
            family = ordinals[drive.kind.family.prefix]
            likely = _ordinal_of(drive)
            free = 0 <= likely < family.capacity and likely not in family
            drive.ordinal = likely if free else family.acquire()
            if free:
                family.reserve(likely)
        return ordinals


def _ordinal_of(drive: BlockDrive) -> int:
    """The ordinal behind a drive that the original wrote: by its name, or the index, which was the same number while it knew one driver."""
    prefix = drive.kind.family.prefix
    if drive.known_name is None or not drive.kind.family.letters:
        return drive.index
    try:
        return drive_index(drive.known_name.removeprefix("/dev/"), prefix) - drive.offset
    except InvalidName:
        return drive.index


def _raise_first(errors: list[BaseException]) -> None:
    """Raises the first of the errors with the others as its notes; returns when there is none."""
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"also: {other}")
        raise errors[0]
