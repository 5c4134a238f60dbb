"""One virtual machine and what is plugged into it: block index, ordinals, drive IDs, the VMM adapter, and its part of the store.

A sandbox is the device receiver: devices ask it to reserve, claim, plug, record, unplug and release. It connects to its VMM when it first
has to, which is at once when the store knows devices of it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from pyblock.allotment import Allotment
from pyblock.batch import Batch, raise_first
from pyblock.device import BlockDevice, Forgotten, Phase, Unsettled
from pyblock.errors import (
    CallerError,
    InvalidID,
    InvalidImage,
    InvalidValue,
    MachineAnswers,
    PyblockError,
    SandboxClosed,
    StoreError,
    TransportError,
    UnknownDevice,
    UnknownDriver,
)
from pyblock.hypervisors import open_hypervisor
from pyblock.hypervisors.base import Hypervisor, Inventory
from pyblock.index import BlockIndex
from pyblock.manager import Device, DeviceManager
from pyblock.model import BlockDrive, DeviceInfo
from pyblock.operation import Operation, deadline_after, log, over
from pyblock.recovery import SETTLE_TIME, Finding, Recovery

if TYPE_CHECKING:
    from pyblock.ledger import Ledger
    from pyblock.persist import Kept
    from pyblock.state import SandboxState
    from pyblock.stores.base import Store

# What only a saved state and a store need is imported there: its typed schema is a tenth of the time to import pyblock.

CAPACITY = 65536
TIMEOUT = 60.0  # seconds: the deadline of attach and detach unless the caller gives another
GRACE = 5.0  # seconds for undoing attaches whose caller is not there any more, in close and after a failed batch
OPEN_TIME = 10.0  # seconds that opening a sandbox waits for its VMM to say what it has

SANDBOX_ID_MAX = 128

NO_IDS: frozenset[str] = frozenset()

Image = str | os.PathLike[str] | DeviceInfo


class Sandbox:
    """:param sandbox_id: 1 to 128 of A-Z a-z 0-9 _ . - beginning with a letter or digit. Raises InvalidID.
    :param vm: the VMM's address (`qemu:/path/to/qmp.sock`, `memory:`), or an adapter. Raises UnknownScheme.
    :param driver: the driver of devices that ask for none. Raises UnknownDriver.
    :param capacity: how many drives it may hold, 1 to 2^20. Raises InvalidIndex.
    :param block_offset: how many virtio-block names the guest uses before the first drive; None has the VMM asked.
    :param store: where it is written down what is plugged in; "host": this host's store, unless the machine ends with this process
        (`memory:`); None: nowhere, and no image is claimed.
    :param recover: open also asks the VMM what it has and settles what differs; else that waits for the first attach, detach or reconcile.

    Opening (`async with`) makes this process the owner, and takes up what the store knows. Raises SandboxBusy, SandboxConflict,
    StateError, StoreError. A VMM that does not answer is no error then: what is known stays as it is, and it is asked again later.

    Everything runs in the event loop in which it is first used; it is not safe to share between threads (pyblock.blocking is).
    """

    __slots__ = (
        "__weakref__", "_allotment", "_finished_late", "_kept", "_ledger", "_open", "_recover", "_recovery", "_saving", "_store", "_vmm",
        "id", "manager",
    )  # fmt: skip

    def __init__(
        self,
        sandbox_id: str,
        vm: str | Hypervisor,
        *,
        driver: str = "virtio-scsi",
        capacity: int = CAPACITY,
        block_offset: int | None = None,
        store: Store | Literal["host"] | None = "host",
        recover: bool = True,
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
        self._saving: asyncio.Future[None] | None = None  # the last save, which may still be under way
        self._open = False
        self._store = store
        self._ledger: Ledger | None = None
        self._recover = recover
        self._recovery = Recovery(self.id, self._vmm, self.manager, self, self._learn)

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {len(self.manager)} devices, {len(self.index)} indexes taken>"

    async def __aenter__(self) -> Self:
        store = self._find_store()
        if store is not None:
            await self._take_up(store)
        self._open = True
        if self._recover and len(self.manager):
            try:
                async with asyncio.timeout(OPEN_TIME):
                    await self._recovery.reconcile()
            except (PyblockError, TimeoutError) as error:
                log.warning("sandbox %s: its VMM could not be asked what it has: %s", self.id, error)
            except BaseException:
                await self.close()
                raise
        return self

    def _find_store(self) -> Store | None:
        if self._store != "host":
            return self._store
        from pyblock.stores import host_store  # noqa: PLC0415

        return host_store() if self._vmm.address else None

    async def _take_up(self, store: Store) -> None:
        """Becomes the sandbox's owner, and takes up what the store knows of it."""
        from pyblock.ledger import Ledger  # noqa: PLC0415
        from pyblock.state import decode_rows  # noqa: PLC0415

        stored = await store.open_sandbox(self.id, self._vmm.address)
        self._clear()  # of an earlier opening; the store knows what came of it
        try:
            where = f"{store!r}, sandbox {self.id!r}"
            if stored.devices or stored.state:
                self._restore(decode_rows(stored.state, stored.devices, where=where), where=where)
                self._adopt()
                for device in self.manager:
                    if device.saved is None:
                        device.ref_count = device.attach_count  # other users died with the process that they were in
        except BaseException:
            await store.close_sandbox(self.id)
            raise
        self._ledger = Ledger(store, self.id, self.manager)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @classmethod
    async def stored(cls, store: Store, sandbox_id: str) -> Self:
        """A sandbox as a store has it, whoever has it open: to be looked at, not to be opened. Raises UnknownSandbox, StateError,
        StoreError."""
        from pyblock.state import decode_rows  # noqa: PLC0415

        stored = await store.read(sandbox_id)
        sandbox = cls(sandbox_id, "memory:", store=None)
        where = f"{store!r}, sandbox {sandbox_id!r}"
        sandbox._restore(decode_rows(stored.state, stored.devices, where=where), where=where)
        return sandbox

    @classmethod
    async def export(cls, store: Store, sandbox_id: str, path: str | os.PathLike[str]) -> None:
        """Writes a sandbox of a store as `save` does. Raises also what `stored` does."""
        sandbox = await cls.stored(store, sandbox_id)
        sandbox._open = True
        await sandbox.save(path)

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

    @property
    def recovered(self) -> tuple[Finding, ...]:
        """What differed when the VMM was last asked what it has, and what became of it."""
        return self._recovery.findings

    async def attach(
        self,
        image: Image,
        *,
        driver: str | None = None,
        read_only: bool = False,
        serial: str | None = None,
        device_id: str | None = None,
        share: bool = False,
        timeout: float | None = TIMEOUT,
    ) -> BlockDevice:
        """Attaches an image and returns its device when the VMM has it. The same image again is the same device, counted once more.

        :param image: a path (file or block device), or a DeviceInfo, which then says all the rest.
        :param driver: a name out of pyblock.DRIVERS; None takes the sandbox's.
        :param share: others of this host may write the image too, if they say so as well.
        :param timeout: seconds, None for no deadline.
        Raises CallerError (ImageInUse among them), CapacityError, StoreError (nothing was changed), VmmRefused, TransportError (everything
        was undone), AttachPending (the outcome is not known yet; see BlockDevice.attach).
        """
        info = self._info(image, driver=driver, read_only=read_only, serial=serial, device_id=device_id, share=share)
        deadline = deadline_after(timeout)
        [device] = self._obtain([info])
        return await self._attach(device, info, deadline)

    async def attach_many(
        self,
        images: Iterable[Image],
        *,
        driver: str | None = None,
        read_only: bool = False,
        share: bool = False,
        timeout: float | None = TIMEOUT,
        progress: Callable[[BlockDevice], None] | None = None,
    ) -> list[BlockDevice]:
        """Attaches many images at once, with indexes in the order given, and returns their devices in that order. All or none.

        When one fails, the others are detached again and the first error is raised; trouble in undoing is added to it as notes.

        :param timeout: seconds for all of them together, None for no deadline.
        :param progress: called with each device when it is attached.
        """
        if isinstance(images, str | bytes | os.PathLike):
            raise InvalidValue(f"images {images!r} is one path; give a list of them, or use attach")
        infos = [self._info(image, driver=driver, read_only=read_only, share=share) for image in images]
        deadline = deadline_after(timeout)
        devices = self._obtain(infos)
        if not devices:
            return []
        try:
            await self._recovery.ask(deadline)
            fresh = [device for device in dict.fromkeys(devices) if device.phase is Phase.DETACHED and device.operation is None]
            self._allotment.plan(fresh)
        except BaseException:
            for device in devices:
                self.manager.drop(device)
            raise
        batch = Batch(
            lambda position: self._attach(devices[position], infos[position], deadline),
            partial(self.detach, timeout=GRACE),
            begun=lambda: self._allotment.unplan(fresh),  # all have reserved by now but those that wait for their turn
            progress=progress,
        )
        return await batch.run(len(devices))

    async def detach(self, device: Device | str, *, timeout: float | None = TIMEOUT) -> None:
        """Takes one attach of a device back; the last one unplugs it. Returns when the VMM says that it is gone.

        :param device: a device of this sandbox, or its ID.
        :param timeout: seconds, None for no deadline.
        Raises UnknownDevice, NotAttached; StoreError (the VMM was not touched); VmmRefused (it stays attached); DetachPending (not
        confirmed: everything stays taken, and calling again is safe, also after a late confirmation has finished the job).
        """
        self._check_open()
        deadline = deadline_after(timeout)
        device_id = device if isinstance(device, str) else device.id
        if device_id in self.manager:
            await self._recovery.ask(deadline)
        if device_id in self._finished_late and device_id not in self.manager:
            self._finished_late -= {device_id}
            return  # it was told "pending", and is gone since
        found = self.manager.find(device_id)
        if not isinstance(device, str) and device is not found:
            raise UnknownDevice(f"device {device_id!r} of this sandbox is another object; the one given was detached, or belongs elsewhere")
        if isinstance(found, BlockDevice):
            stays = await found.detach(self, deadline)
        else:
            await self.manager.detach(device_id, self, deadline)
            stays = True
        if stays:
            self.touch(found)
            self.manager.drop(found)  # the last one is dropped by `release`, whenever that comes

    async def detach_many(self, devices: Iterable[Device | str], *, timeout: float | None = TIMEOUT) -> None:
        """Detaches many devices at once. All are tried; the first error is raised, the others are its notes."""
        done = await asyncio.gather(*(self.detach(device, timeout=timeout) for device in list(devices)), return_exceptions=True)
        raise_first([error for error in done if isinstance(error, BaseException)])

    async def save(self, path: str | os.PathLike[str]) -> None:
        """Writes devices, counts and indexes to a JSON file, atomically and synced. Raises StateError when the file there is something
        else."""
        self._check_open()
        # One after the other, and each whole: an older picture must not come after a newer one, nor a cancelled one be half awaited.
        saving = self._saving = asyncio.ensure_future(self._save(path, self._saving))
        saving.add_done_callback(lambda task: task.cancelled() or task.exception())
        await over(saving)
        saving.result()

    async def _save(self, path: str | os.PathLike[str], previous: asyncio.Future[None] | None) -> None:
        from pyblock.stores import json_file  # noqa: PLC0415

        if previous is not None:
            await over(previous)
        await asyncio.to_thread(json_file.write, path, self.state())

    async def load(self, path: str | os.PathLike[str]) -> None:
        """Restores what `save` (or the original) wrote, into an open sandbox without devices. Touches no VMM.

        Raises StateError; ImageInUse when another sandbox has claimed an image of it; StoreError. Nothing is then changed.
        """
        from pyblock.stores import json_file  # noqa: PLC0415

        await self.restore(await asyncio.to_thread(json_file.read, path), where=f"state file {os.fspath(path)!r}")

    def state(self) -> SandboxState:
        """What `save` writes. An operation under way is saved as pending."""
        from pyblock.persist import sandbox_to_state  # noqa: PLC0415

        self._check_open()
        return sandbox_to_state(self.id, self.manager, self._allotment, self._kept)

    async def restore(self, state: SandboxState, *, where: str = "the state") -> None:
        """Restores a decoded state; see `load`."""
        self._check_open()
        if len(self.manager):
            raise CallerError(f"sandbox {self.id} has {len(self.manager)} devices; a state is loaded into one without")
        self._restore(state, where=where)
        self._adopt()
        if (ledger := self._ledger) is not None:
            try:
                for device in self.manager:
                    ledger.touch(device.id)
                await ledger.flush(state=self._row())
                if refused := ledger.refusals():
                    raise refused[0]
            except BaseException:
                self._clear()
                await ledger.flush_soon(state=b"")
                raise

    def _row(self) -> bytes:
        """What the store keeps of the sandbox beside its devices; nothing where nothing was loaded."""
        from pyblock.persist import sandbox_to_row  # noqa: PLC0415
        from pyblock.state import encode_row  # noqa: PLC0415

        row = sandbox_to_row(self.id, self.manager, self._allotment, self._kept)
        return encode_row(row) if row is not None else b""

    def _clear(self) -> None:
        """Forgets all devices, as if none had ever been there."""
        for device in self.manager:
            self.touch(device)
            if isinstance(device, BlockDevice) and device.drive is not None:
                self._vmm.vacate(device.drive)
        self.manager.clear()
        self._allotment = Allotment(self._allotment.capacity, self._allotment.given)
        self._kept = None
        self._recovery.doubt()

    def _restore(self, state: SandboxState, *, where: str) -> None:
        from pyblock.persist import restore_sandbox  # noqa: PLC0415

        # One that was asked for holds the machine's own disks, and they are asked for anew.
        allotment = Allotment(self._allotment.capacity, self._allotment.given) if self._recovery.asked else self._allotment
        self._kept = restore_sandbox(state, self.manager, allotment, where=where)
        self._allotment = allotment
        self._recovery.doubt()

    def _adopt(self) -> None:
        for device in self.manager:
            if isinstance(device, BlockDevice) and device.drive is not None and device.drive.slot is not None:
                self._vmm.adopt(device.drive)

    async def reconcile(self, *, dry_run: bool = False, orphans: bool = False, timeout: float | None = SETTLE_TIME) -> list[Finding]:
        """Asks the VMM now what it has, settles what differs from what is known, and returns the differences.

        A device that the VMM has no more is lost, and what it took is free; an unfinished attach is undone, or finished where the VMM
        does not let go of it; an unfinished detach is finished; what is named as ours and is known to nobody is an orphan.

        :param dry_run: changes nothing.
        :param orphans: removes orphans.
        :param timeout: seconds that removals may take; those that take longer are pending, and go on by themselves.
        Raises TransportError when the VMM does not answer; nothing is then changed.
        """
        self._check_open()
        deadline_after(timeout)
        return await self._recovery.reconcile(dry_run=dry_run, orphans=orphans, timeout=timeout)

    async def forget(self) -> list[str]:
        """Gives up everything that belongs to a machine which no longer exists: devices, indexes, claims. Returns the devices' IDs.

        Raises MachineAnswers unless its socket is absent or nobody listens there; StoreError.
        """
        self._check_open()
        if not await self._vmm.gone():
            raise MachineAnswers(f"sandbox {self.id}: its machine {self._vmm.address} still answers; detach its devices, or end it first")
        await self._cut_off()
        given_up = [device.id for device in self.manager]
        self._clear()
        self._finished_late = NO_IDS
        if self._ledger is not None:
            await self._ledger.flush(state=b"")
        return given_up

    async def settle(self, timeout: float = GRACE) -> None:
        """Waits, so many seconds at most, until attaches that nobody waits for any more are undone, and saves are written."""
        undoing = [operation.settled(None) for operation in self.running if operation.abandoned and operation.undoing]
        if self._saving is not None:
            undoing.append(over(self._saving))
        if undoing:
            await asyncio.wait([asyncio.ensure_future(one) for one in undoing], timeout=timeout)

    async def close(self) -> None:
        """Ends the connection to the VMM; the machine keeps what it has. Attaches that nobody waits for any more are first undone,
        within 5 s; what is then still under way is left pending."""
        try:
            await self.settle()
        finally:
            self._open = False
            try:
                await self._recovery.end()
                await self._cut_off()
            finally:
                try:
                    await self._vmm.close()
                finally:
                    await self._give_up()

    async def _cut_off(self) -> None:
        """Ends what is under way where it stands."""
        await asyncio.sleep(0)  # an operation that was made just now marks its device before it can be ended
        operations = self.running
        for operation in operations:
            operation.cancel()
        for operation in operations:
            await operation.settled(None)

    async def _give_up(self) -> None:
        """Writes what is not written yet, and has the sandbox be nobody's."""
        ledger, self._ledger = self._ledger, None
        if ledger is None:
            return
        try:
            await ledger.close(deadline_after(GRACE))
        except StoreError as error:
            log.warning("sandbox %s: what was not written yet, recovery will find: %s", self.id, error)

    # The device receiver: what devices call.

    def reserve(self, device: BlockDevice) -> BlockDrive:
        """Takes index, ordinal and drive ID for a device; see DeviceReceiver."""
        if device.info.driver not in self._vmm.drivers:
            raise UnknownDriver(f"this VMM has no driver {device.info.driver!r}; it has {', '.join(sorted(self._vmm.drivers))}")
        self._check_open()
        if device.id not in self.manager or self.manager.find(device.id) is not device:
            raise Forgotten
        drive = self._allotment.reserve(device)
        if self._finished_late:
            self._finished_late -= {device.id}
        self.touch(device)
        return drive

    def release(self, device: BlockDevice, drive: BlockDrive, *, late: bool, counted: bool) -> None:
        """Gives back what `reserve` took; see DeviceReceiver."""
        self._allotment.release(drive)
        self.touch(device)
        if late:
            # Whoever was told "pending" may call again with this device. So it ends here, and who waits to attach its image gets a new one.
            self._finished_late |= {device.id}
            self.manager.forget(device)
        elif counted:
            self.manager.drop(device)
        else:
            self.manager.tidy(device)

    @property
    def records(self) -> bool:
        """See DeviceReceiver."""
        return self._ledger is not None

    def touch(self, device: Device) -> None:
        """See DeviceReceiver."""
        if self._ledger is not None:
            self._ledger.touch(device.id)

    async def flush(self, deadline: float | None) -> None:
        """See DeviceReceiver."""
        if self._ledger is not None:
            await self._ledger.flush(deadline)

    async def claim(self, device: BlockDevice, deadline: float | None) -> None:
        """See DeviceReceiver."""
        if self._ledger is not None:
            await self._ledger.claim(device.id, deadline)

    async def record(self, device: Device, deadline: float | None = None) -> None:
        """See DeviceReceiver."""
        if self._ledger is not None:
            self._ledger.touch(device.id)
            await self._ledger.flush(deadline)

    async def note(self, device: BlockDevice) -> None:
        """See DeviceReceiver."""
        if self._ledger is not None:
            self._ledger.touch(device.id)
            await self._ledger.flush_soon()

    async def plug(self, drive: BlockDrive) -> None:
        """See DeviceReceiver."""
        try:
            await self._vmm.plug(drive)
        except (TransportError, Unsettled):
            self._recovery.doubt()
            raise

    async def unplug(self, drive: BlockDrive) -> None:
        """See DeviceReceiver."""
        try:
            await self._vmm.unplug(drive)
        except (TransportError, Unsettled):
            self._recovery.doubt()
            raise

    def nudge(self, drive: BlockDrive) -> None:
        """See DeviceReceiver."""
        self._vmm.nudge(drive)

    def _check_open(self) -> None:
        if not self._open:
            raise SandboxClosed(f"sandbox {self.id} is not open; use it inside 'with'")

    def _learn(self, inventory: Inventory) -> None:
        self._allotment.learn(inventory)

    def _info(
        self,
        image: Image,
        *,
        driver: str | None,
        read_only: bool,
        share: bool,
        serial: str | None = None,
        device_id: str | None = None,
    ) -> DeviceInfo:
        if not isinstance(image, DeviceInfo):
            return DeviceInfo(path=os.fsdecode(image), driver=driver, read_only=read_only, serial=serial, id=device_id, share=share)
        if driver is not None or read_only or serial is not None or device_id is not None or share:
            raise InvalidValue("a DeviceInfo says driver, read_only, serial, ID and share itself; give them there")
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

    async def _attach(self, device: BlockDevice, info: DeviceInfo, deadline: float | None) -> BlockDevice:
        while True:
            try:
                await self._recovery.ask(deadline)
                await device.attach(self, deadline)
            except Forgotten:
                [device] = self._obtain([info])
            except BaseException:
                self.manager.drop(device)
                raise
            else:
                return device


def _is_sandbox_id(text: object) -> bool:
    if not isinstance(text, str) or not 0 < len(text) <= SANDBOX_ID_MAX or not text.isascii() or not text[0].isalnum():
        return False
    return text.isalnum() or text.translate(_WITHOUT_MARKS).isalnum()


_WITHOUT_MARKS = str.maketrans("", "", "_.-")
