"""One virtual machine and what is plugged into it: block index, ordinals, drive IDs, and the VMM adapter.

A sandbox is the device receiver: devices ask it to reserve, plug, unplug and release. It connects to its VMM when it first has to.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pyblock.allotment import Allotment
from pyblock.device import BlockDevice, Phase
from pyblock.errors import (
    CallerError,
    InvalidID,
    InvalidImage,
    InvalidValue,
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
from pyblock.operation import Operation, deadline_after

if TYPE_CHECKING:
    from pyblock.persist import Kept
    from pyblock.state import SandboxState

# What only save and load need is imported there: its typed schema is a tenth of the time to import pyblock.

CAPACITY = 65536
TIMEOUT = 60.0  # seconds: the deadline of attach and detach unless the caller gives another
NOTES = 5  # different errors of a batch that are shown beside the first
CLOSE_GRACE = 5.0  # seconds that close waits for attaches to be undone

SANDBOX_ID_MAX = 128

NO_IDS: frozenset[str] = frozenset()

Image = str | os.PathLike[str] | DeviceInfo


class Sandbox:
    """:param sandbox_id: 1 to 128 of A-Z a-z 0-9 _ . - beginning with a letter or digit. Raises InvalidID.
    :param vm: the VMM's address (`qemu:/path/to/qmp.sock`, `memory:`), or an adapter. Raises UnknownScheme.
    :param driver: the driver of devices that ask for none. Raises UnknownDriver.
    :param capacity: how many drives it may hold, 1 to 2^20. Raises InvalidIndex.
    :param block_offset: how many virtio-block names the guest uses before the first drive; None has the VMM asked.

    Everything runs in the event loop in which it is first used; it is not safe to share between threads (pyblock.blocking is).
    """

    __slots__ = (
        "__weakref__", "_allotment", "_asked", "_askers", "_asking", "_finished_late", "_kept", "_open", "_vmm", "id", "manager",
    )  # fmt: skip

    def __init__(
        self,
        sandbox_id: str,
        vm: str | Hypervisor,
        *,
        driver: str = "virtio-scsi",
        capacity: int = CAPACITY,
        block_offset: int | None = None,
    ) -> None:
        if not _is_sandbox_id(sandbox_id):
            raise InvalidID(f"sandbox ID {sandbox_id!r} is not 1 to 128 of A-Z a-z 0-9 _ . - beginning with a letter or digit")
        if block_offset is not None and not 0 <= block_offset < capacity:
            raise InvalidValue(f"block offset {block_offset!r} is not in 0 … {capacity - 1}")
        self.id = sandbox_id
        self.manager = DeviceManager(driver)
        self._allotment = Allotment(capacity, None if block_offset is None else {"vd": block_offset})
        self._vmm = open_hypervisor(vm) if isinstance(vm, str) else vm
        self._finished_late = NO_IDS  # devices whose callers were told "pending", and which are gone since
        self._kept: Kept | None = None
        self._open = False
        self._asked = False  # the machine has been asked which disks it has
        self._asking: asyncio.Task[None] | None = None
        self._askers = 0  # who wait for it

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {len(self.manager)} devices, {len(self.index)} indexes taken>"

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def index(self) -> BlockIndex:
        """The block index: which indexes are taken."""
        return self._allotment.index

    @property
    def running(self) -> list[Operation]:
        """The attaches and detaches that are under way."""
        return [device.operation for device in self.manager if isinstance(device, BlockDevice) and device.operation is not None]

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

        try:
            await self._ask(deadline)
            fresh = [device for device in dict.fromkeys(devices) if device.phase is Phase.DETACHED and device.operation is None]
            self._allotment.plan(fresh)
        except BaseException:
            for device in devices:
                self.manager.drop(device)
            raise
        # The tasks start in this order, and an attach reserves before it first waits: so the indexes follow the order of the images.
        tasks = [asyncio.ensure_future(one(device)) for device in devices]
        try:
            try:
                await asyncio.sleep(0)
            finally:
                self._allotment.unplan(fresh)  # all have reserved by now but those that wait for their turn
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
            self._finished_late -= {device_id}
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
        from pyblock.stores import json_file  # noqa: PLC0415

        await asyncio.to_thread(json_file.write, path, self.state())

    async def load(self, path: str | os.PathLike[str]) -> None:
        """Restores what `save` (or the original) wrote, into an open sandbox without devices. Touches no VMM; a StateError changes
        nothing."""
        from pyblock.stores import json_file  # noqa: PLC0415

        self.restore(await asyncio.to_thread(json_file.read, path), where=f"state file {os.fspath(path)!r}")

    def state(self) -> SandboxState:
        """What `save` writes. An operation under way is saved as pending."""
        from pyblock.persist import sandbox_to_state  # noqa: PLC0415

        self._check_open()
        return sandbox_to_state(self.id, self.manager, self._allotment, self._kept)

    def restore(self, state: SandboxState, *, where: str = "the state") -> None:
        """Restores a decoded state; see `load`."""
        from pyblock.persist import restore_sandbox  # noqa: PLC0415

        self._check_open()
        if len(self.manager):
            raise CallerError(f"sandbox {self.id} has {len(self.manager)} devices; a state is loaded into one without")
        # One that was asked for holds the machine's own disks, and they are asked for anew.
        allotment = Allotment(self._allotment.capacity, self._allotment.offsets) if self._asked else self._allotment
        self._kept = restore_sandbox(state, self.manager, allotment, where=where)
        self._allotment = allotment
        self._asked = False
        for device in self.manager:
            if isinstance(device, BlockDevice) and device.drive is not None and device.drive.slot is not None:
                self._vmm.adopt(device.drive)

    async def close(self) -> None:
        """Ends the connection to the VMM; the machine keeps what it has. Attaches that nobody waits for any more are first undone,
        within 5 s."""
        undoing = [operation for operation in self.running if operation.abandoned and operation.undoing]
        if undoing:
            await asyncio.wait([asyncio.ensure_future(operation.settled(None)) for operation in undoing], timeout=CLOSE_GRACE)
        self._open = False
        operations = self.running
        for operation in operations:
            operation.cancel()
        for operation in operations:
            await operation.settled(None)
        await self._vmm.close()

    # The device receiver: what devices call.

    def reserve(self, device: BlockDevice) -> BlockDrive:
        """Takes index, ordinal and drive ID for a device; see DeviceReceiver."""
        if device.info.driver not in self._vmm.drivers:
            raise UnknownDriver(f"this VMM has no driver {device.info.driver!r}; it has {', '.join(sorted(self._vmm.drivers))}")
        drive = self._allotment.reserve(device)
        if self._finished_late:
            self._finished_late -= {device.id}
        return drive

    def release(self, device: BlockDevice, drive: BlockDrive, *, late: bool) -> None:
        """Gives back what `reserve` took; see DeviceReceiver."""
        self._allotment.release(drive)
        if late:
            self._finished_late |= {device.id}
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
        if self._asked:
            return
        if self._asking is None:
            self._asking = asyncio.create_task(self._learn())
        asking = self._asking
        self._askers += 1
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(asking)
        except TimeoutError:
            raise VmmUnreachable(f"the VMM of sandbox {self.id} did not say before the deadline which disks it has") from None
        finally:
            if self._asking is asking:
                self._askers -= 1
                if asking.done() or not self._askers:  # an answer is for those who asked: whoever comes later asks anew
                    asking.cancel()
                    self._asking, self._askers = None, 0

    async def _learn(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                found = await self._vmm.inventory()
        except TimeoutError:
            raise VmmUnreachable(f"the VMM of sandbox {self.id} did not answer within {CONNECT_TIMEOUT:g} s") from None
        self._allotment.learn(found)
        self._asked = True


def _is_sandbox_id(text: object) -> bool:
    if not isinstance(text, str) or not 0 < len(text) <= SANDBOX_ID_MAX or not text.isascii() or not text[0].isalnum():
        return False
    return text.isalnum() or text.translate(_WITHOUT_MARKS).isalnum()


_WITHOUT_MARKS = str.maketrans("", "", "_.-")


def _raise_first(errors: list[BaseException]) -> None:
    """Raises the first of the errors with the others as its notes; returns when there is none."""
    if errors:
        for other, count in Counter(str(error) for error in errors[1:]).most_common(NOTES):
            errors[0].add_note(f"also: {other}" + (f" ({count} times)" if count > 1 else ""))
        if len(errors) > NOTES + 1:
            errors[0].add_note(f"{len(errors)} failed in all")
        raise errors[0]
