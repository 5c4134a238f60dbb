"""One virtual machine: its VMM's adapter, the numbers that are given out, the registry of its
devices, and its part of the store. What a sandbox has, and what the road of its devices goes
through.

What it takes up from a store, it gives up again when it is closed.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from pyblock.disk.formats import RAW
from pyblock.disk.image import open_claimed
from pyblock.disk.model import BlockDrive
from pyblock.errors import (
    CallerError,
    InvalidState,
    PyblockError,
    SandboxClosed,
    TransportError,
    UnknownDriver,
    WrongEventLoop,
)
from pyblock.life.allotment import Allotment
from pyblock.life.device import BlockDevice
from pyblock.life.generic import GenericDevice
from pyblock.life.registry import Device, DeviceManager
from pyblock.life.table import LIFE, End, Event, IllegalEvent, Phase
from pyblock.life.voice import Voice
from pyblock.loading import loading
from pyblock.tasks import Operation, passed
from pyblock.vmm.base import Hypervisor, Unsettled, fault, typed

if TYPE_CHECKING:
    from pyblock.life.ledger import Ledger
    from pyblock.store.base import Store
    from pyblock.store.record import Record, SandboxRecord

Error = TypeVar("Error", bound=BaseException)

log = logging.getLogger(__name__)
spoken = logging.getLogger("pyblock.life.voice")

# What only a saved state and a store need is imported there: its typed schema is a tenth of the
# time to import pyblock.

GRACE = 5.0  # seconds for what is undone or written when nobody waits for it any more
# devices that are remembered for callers who were told "pending" and may call again
LATE_MAX = 1024


class Machine:
    """:param sandbox_id: what the store and errors call it.
    :param vmm: the adapter of its VMM.
    :param manager: the devices.
    :param allotment: what it gives out.
    :param voice: what is told of all that happens.

    :ivar ledger: its part of a store; None while it is in none.
    :ivar late: devices whose callers were told "pending", and which are gone since.
    :ivar asked_at: as `happened` was when the VMM was last asked what it has.
    :ivar opened: it takes operations on.
    :ivar loop: while it is open, the event loop that it was opened in.
    """

    __slots__ = (
        "_doubts", "_lanes", "_loading", "_met", "allotment", "asked_at", "id", "kata", "late",
        "ledger", "loop",
        "manager", "opened", "vmm", "voice",
    )  # fmt: skip

    def __init__(
        self,
        sandbox_id: str,
        vmm: Hypervisor,
        manager: DeviceManager,
        allotment: Allotment,
        voice: Voice | None = None,
    ) -> None:
        self.id = sandbox_id
        self.vmm = vmm
        self.manager = manager
        self.allotment = allotment
        self.voice = voice or Voice(sandbox_id)
        self.ledger: Ledger | None = None
        self.late: dict[str, None] = {}
        self.kata = b""  # of the saved state that was taken in, what pyblock does not know
        self._doubts = 0
        self.asked_at = -1
        self.opened = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._lanes: asyncio.Semaphore | None = None  # of the event loop that it is open in
        self._loading = False
        self._met = ""  # the machine, as its adapter tells it from others

    def __del__(self) -> None:
        if (voice := getattr(self, "voice", None)) is not None and voice.listeners:
            voice.close()
        if (ledger := getattr(self, "ledger", None)) is not None and ledger.abandon():
            # Not its repr: what it consists of may have been deleted before it.
            warnings.warn(
                f"unclosed sandbox {self.id}: use 'async with', or close it",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    @property
    def running(self) -> list[Operation]:
        """The attaches and detaches that are under way."""
        return [
            device.operation
            for device in self.manager
            if isinstance(device, BlockDevice) and device.operation is not None
        ]

    def check(self) -> None:
        """Raises SandboxClosed unless it takes anything on, WrongEventLoop in another event
        loop."""
        if not self.opened:
            raise SandboxClosed(
                f"sandbox {self.id} is not open; use it inside 'with'", sandbox=self.id
            )
        if self.loop is not asyncio._get_running_loop():
            self.check_loop()

    def check_loop(self) -> None:
        """What its operations wait for happens in the event loop that it was opened in. To look at
        it from outside of any is harmless."""
        loop = asyncio._get_running_loop()
        if loop is not self.loop and loop is not None and self.loop is not None:
            text = (
                f"sandbox {self.id} was opened in another event loop; use it there, or share a "
                "pyblock.blocking.Sandbox between threads"
            )
            raise WrongEventLoop(text, sandbox=self.id)

    def about(self, error: Error, device: BlockDevice | None = None) -> Error:
        """Has an error of pyblock know whose machine it is about, and which device; returns it."""
        if isinstance(error, PyblockError):
            error.about(sandbox=self.id, vm=self.vmm.address or None)
            if device is not None:
                error.about(**device.facts)
        return error

    # The gate: whatever changes a device's phase.

    def move(self, device: BlockDevice, event: Event, error: BaseException | None = None) -> None:
        """Moves the device on, has its row written with the next flush, and whoever listens told
        when that is done. Raises IllegalEvent.

        :param error: why, where something failed.
        """
        was = device.phase
        try:
            device.phase = LIFE[was, event]
        except KeyError:
            raise IllegalEvent(was, event) from None
        if self.ledger is not None:
            self.ledger.touched[device.id] = next(self.ledger.stamps)
        voice = self.voice
        if voice.listeners or voice.on_event is not None or spoken.isEnabledFor(logging.INFO):
            voice.moved(device, was, event, error, stored=self.ledger is not None)

    def take(self, device: BlockDevice) -> None:
        """Takes index, ordinal and drive ID for a device that is to be attached. No I/O. Raises a
        CapacityError or CallerError, having taken nothing."""
        try:
            if device.info.driver not in self.vmm.offers:
                raise UnknownDriver(
                    f"this VMM has no driver {device.info.driver!r}; it has "
                    f"{', '.join(sorted(self.vmm.offers))}"
                )
            if not self.opened or self.loop is not asyncio._get_running_loop():
                self.check()  # it may have waited for its turn
            if self._loading:
                raise CallerError(
                    f"a saved state is being loaded into sandbox {self.id}; attach when that is "
                    "done"
                )
            device.drive = self.allotment.reserve(device)
        except PyblockError as error:
            self.about(error, device)
            raise
        self.late.pop(device.id, None)
        self.move(device, Event.ATTACH)

    def give_back(
        self, device: BlockDevice, event: Event, end: End, error: BaseException | None = None
    ) -> None:
        """Gives back all that a device holds, which the VMM has nothing of; without users it is
        then forgotten. Whoever was told "pending" may call again with the same object: so a LATE
        end is the object's own, and who waits to attach its image gets a new one."""
        drive = device.held
        self.move(device, event, error)
        device.drive, device.attach_count = None, 0
        self._vacate(drive)
        self.allotment.release(drive)
        if end is End.LATE:
            self.late[device.id] = None
            if len(self.late) > LATE_MAX:
                del self.late[next(iter(self.late))]
            self.manager.forget(device)
        elif end is End.DETACHED:
            self.manager.drop(device)
        else:
            self.manager.tidy(device)

    # What the store is told.

    def touch(self, device: Device) -> None:
        """Takes note that the device stands otherwise than it is written down."""
        if self.ledger is not None:
            self.ledger.touch(device.id)

    def drop(self, device: Device) -> None:
        """Takes note that a device has one user less."""
        self.touch(device)
        self.manager.drop(device)

    async def count(self, device: GenericDevice, more: int, deadline: float | None) -> None:
        """Counts an attach (1) or a detach (-1) of what is no disk, and writes that down. Raises
        NotAttached, AttachCountExhausted, StoreError; nothing is then counted."""
        change, undo = (
            (device.attach, device.detach) if more > 0 else (device.detach, device.attach)
        )
        change()
        self.touch(device)
        try:
            await self.write(device, deadline)
        except BaseException:
            undo()
            raise

    async def intend(self, device: BlockDevice, deadline: float | None) -> None:
        """Chooses the drive's place, writes down that the device is to be attached, and claims its
        image.

        Raises SlotsExhausted, ImageInUse, StoreError (StoreBusy past the deadline), TransportError,
        having changed nothing.
        """
        try:
            async with asyncio.timeout_at(deadline):
                assert device.drive is not None
                device.drive.sit(await self.vmm.place(device.drive))
        except TimeoutError:
            raise passed(
                deadline, f"the VMM of sandbox {self.id} was being asked which places are free"
            ) from None
        except PyblockError:
            raise
        except Exception as error:
            raise fault(f"choosing a place for device {device.id}", error) from error
        if self.ledger is not None:
            await self.ledger.write(device.id, deadline)

    async def write(self, device: Device, deadline: float | None = None) -> None:
        """Returns when it is written down how the device stands, which sets its `said_count`.
        Raises StoreError."""
        if self.ledger is not None:
            await self.ledger.write(device.id, deadline)

    async def write_soon(self, *devices: BlockDevice) -> None:
        """The same for what need not be waited for: tries once, and else has it written in the
        background. Raises nothing."""
        if self.ledger is not None:
            for device in devices:
                self.ledger.touch(device.id)
            await self.ledger.flush_soon()

    async def meet(self, machine: str) -> None:
        """Takes note of which machine answers. Raises SandboxConflict when the same one answers for
        another sandbox of the store."""
        if self.ledger is not None and machine and machine != self._met:
            await self.ledger.meet(machine)
            self._met = machine

    async def drives_of_others(self, machine: str) -> set[str]:
        """The drive IDs that other sandboxes of the store may have in this machine."""
        return await self.ledger.drives_of_others(machine) if self.ledger is not None else set()

    # What the VMM is asked.

    def doubt(self, error: BaseException | None = None) -> None:
        """Has the VMM asked what it has before it is next changed, and what is then found pending
        settled.

        :param error: what the VMM was asked in vain ended in.
        """
        self._doubts += 1
        if isinstance(error, Unsettled):
            error = error.error
        if isinstance(error, TransportError):
            self.voice.vmm_lost(error)

    @property
    def happened(self) -> int:
        """Counts what has the VMM asked anew what it has: doubts, and connections that were lost.
        It never grows less."""
        return self._doubts + self.vmm.losses

    @property
    def doubtful(self) -> bool:
        """Whether it is to be asked before it is next changed."""
        return self.asked_at != self._doubts + self.vmm.losses

    async def plug(self, device: BlockDevice) -> None:
        """Opens what was claimed for the device, plugs its drive in and fills in the addresses
        really used. On an error nothing is left in the VMM, except on Unsettled.

        Raises InvalidImage, DescriptorsExhausted; ImageReplaced when the path leads to something
        else by now.
        """
        drive, info, lanes = device.drive, device.info, self._lanes
        assert drive is not None
        if self.vmm.lanes is not None:
            if lanes is None:
                lanes = self._lanes = asyncio.Semaphore(self.vmm.lanes)
            await lanes.acquire()  # an image that waits for its turn is not open yet
        image = None
        try:
            image = open_claimed(
                info.path,
                device.identity,
                device.under,
                read_only=info.read_only,
                raw=info.format == RAW,
            )
            await self.vmm.plug(drive, image)
        except PyblockError as error:
            if isinstance(error, TransportError):
                self.doubt(error)
            raise
        except Unsettled as error:
            self.doubt(error)
            raise
        except Exception as error:
            self.doubt()
            raise Unsettled(fault(f"plugging in drive {drive.id}", error)) from error
        finally:
            if image is not None and image.fd >= 0:
                image.close()
            if lanes is not None:
                lanes.release()
        self.allotment.came(drive)

    async def unplug(self, drive: BlockDrive) -> None:
        """Removes whatever the VMM has of a drive; returns when the VMM says that it is gone.
        Unsettled: not known; other errors: it is kept."""
        first = self.allotment.leaves(drive)
        try:
            await self.vmm.unplug(drive)
        except (TransportError, Unsettled) as error:
            self.doubt(error)
            if first and isinstance(error, TransportError):  # nothing was sent
                self.allotment.stays(drive)
            raise
        except PyblockError:
            self.allotment.stays(drive)
            raise
        except Exception as error:
            self.doubt()
            raise Unsettled(fault(f"unplugging drive {drive.id}", error)) from error

    async def locate(self, drive: BlockDrive) -> None:
        """Fills in the addresses really used of a drive that the VMM has. Raises TransportError."""
        with typed(f"locating drive {drive.id}"):
            await self.vmm.locate(drive)
        self.allotment.came(drive)

    def nudge(self, drive: BlockDrive) -> None:
        """Has a removal that is under way asked for once more."""
        try:
            self.vmm.nudge(drive)
        except Exception as error:
            log.warning(
                "sandbox %s: drive %s was not asked for again: %r", self.id, drive.id, error
            )

    def _vacate(self, drive: BlockDrive) -> None:
        """Whatever an adapter makes of it, what is gone is free."""
        try:
            self.vmm.give_back(drive)
        except Exception as error:
            log.warning(
                "sandbox %s: the place of drive %s may stay taken in the adapter: %r",
                self.id,
                drive.id,
                error,
            )

    # The past and the end of a sandbox.

    async def take_up(self, store: Store, deadline: float | None) -> None:
        """Becomes the sandbox's owner, and takes up what the store knows of it."""
        with loading("the store"):
            from pyblock.life.ledger import Ledger  # noqa: PLC0415

        stored = await store.open_sandbox(self.id, self.vmm.address, deadline)
        try:
            self.clear()  # of an earlier opening; the store knows what came of it
            if stored.devices or stored.own:
                own = stored.record()
                devices, allotment = self.restored(own, stored.records(), where=stored.where)
                self._adopt(devices, where=stored.where)
                self.take_in(devices, allotment, bytes(own.kata))
        except BaseException:
            await store.close_sandbox(self.id)
            raise
        self.ledger, self._met = (
            Ledger(store, self.id, self.manager, stored.opening, self.voice),
            "",
        )
        self.voice.owned(stored.owner)

    async def load(self, own: SandboxRecord, records: list[Record], *, where: str) -> None:
        """Takes in the records of a saved state, and has the store keep them; all of it or nothing.
        See Sandbox.restore."""
        self.check()
        if len(self.manager) or self._loading:
            text = (
                f"sandbox {self.id} has {len(self.manager)} devices; a state is loaded into one "
                "without"
            )
            raise CallerError(text, sandbox=self.id)
        devices, allotment = self.restored(own, records, where=where)
        kata = bytes(own.kata)
        adopted: list[BlockDrive] = []
        self._loading = True  # nothing is attached until it is known whether these come in
        try:
            adopted = self._adopt(devices, where=where)
            if self.ledger is not None:
                await self.ledger.replace(devices, self.own_record(devices, allotment, kata))
        except BaseException:
            for drive in adopted:
                self._vacate(drive)
            if allotment is self.allotment:
                self.allotment = Allotment(allotment.capacity, allotment.given)
            raise
        finally:
            self._loading = False
        self.take_in(devices, allotment, kata)

    def restored(
        self, own: SandboxRecord, records: list[Record], *, where: str
    ) -> tuple[list[Device], Allotment]:
        """What records say. Raises StateError; nothing is changed by it but the allotment, if that
        was unused."""
        device_of = _device_of()
        allotment = (
            self.allotment
            if self.allotment.unused
            else Allotment(self.allotment.capacity, self.allotment.given)
        )
        devices = [device_of(record) for record in records]
        drives = [
            device.drive
            for device in devices
            if isinstance(device, BlockDevice) and device.drive is not None
        ]
        try:
            self.manager.check_new(devices)
            allotment.restore(drives, own.taken, own.offsets)
        except PyblockError as error:
            raise InvalidState(
                f"{where} contradicts itself: {error}; it is left as it is"
            ) from error
        return devices, allotment

    def take_in(self, devices: list[Device], allotment: Allotment, kata: bytes) -> None:
        self.manager.take_in(devices)
        self.allotment, self.kata = allotment, kata
        self.doubt()  # the machine's own disks are asked for anew
        attached, coming, leaving = Phase.ATTACHED, Phase.ATTACH_PENDING, Phase.DETACH_PENDING
        for device in devices:
            if isinstance(device, BlockDevice):
                phase = device.phase
                if phase is attached:
                    device.said_count = device.attach_count
                elif phase is coming and device.drive is not None:
                    allotment.comes(device.drive)
                elif phase is leaving and device.drive is not None:
                    allotment.leaves(device.drive)

    def _adopt(self, devices: list[Device], *, where: str) -> list[BlockDrive]:
        """Has the adapter take the places of drives that were plugged in before; all of them or
        none. Raises InvalidState."""
        adopted: list[BlockDrive] = []
        for device in devices:
            drive = device.drive if isinstance(device, BlockDevice) else None
            if drive is None:
                continue
            try:
                if drive.imported and drive.guest_match is None:
                    self.vmm.recognize(drive)
                if drive.place is None:
                    continue
                self.vmm.take(drive)
            except Exception as error:
                for one in adopted:
                    self._vacate(one)
                text = (
                    f"{where}: device {device.id} cannot be at {drive.place!r}: {error}; it is "
                    "left as it is"
                )
                raise InvalidState(text, **drive.facts) from error
            adopted.append(drive)
        return adopted

    def own_record(
        self, devices: Iterable[Device], allotment: Allotment, kata: bytes
    ) -> SandboxRecord:
        """What there is to be known of the sandbox beside its devices."""
        with loading("a saved state"):
            from pyblock.life.recorded import sandbox_record  # noqa: PLC0415

        held = {
            device.drive.index
            for device in devices
            if isinstance(device, BlockDevice) and device.drive is not None
        }
        taken = [index for index in allotment.own_indexes() if index not in held]
        return sandbox_record(allotment.offsets, taken, kata)

    def clear(self) -> list[str]:
        """Forgets all devices, as if none had ever been there; returns their IDs."""
        devices = list(self.manager)
        for device in devices:
            if self.ledger is not None:
                self.ledger.touch(device.id)
            if isinstance(device, BlockDevice) and device.drive is not None:
                self._vacate(device.drive)
        self.manager.clear()
        self.allotment = Allotment(self.allotment.capacity, self.allotment.given)
        self.kata, self.late = b"", {}
        self.doubt()
        return [device.id for device in devices]

    async def cut_off(self) -> None:
        """Ends what is under way where it stands."""
        # an operation that was made just now marks its device before it can be ended
        await asyncio.sleep(0)
        operations = self.running
        for operation in operations:
            operation.cancel()
        for operation in operations:
            await operation.settled(None)

    async def disconnect(self, deadline: float | None) -> None:
        self.vmm.watch(None)
        try:
            async with asyncio.timeout_at(deadline):
                with typed(f"sandbox {self.id}: ending the connection to its VMM"):
                    await self.vmm.close()
        except (PyblockError, TimeoutError) as error:
            log.warning(
                "sandbox %s: the connection to its VMM did not end as it should: %s",
                self.id,
                error or "its time was up",
            )

    async def close_ledger(self, deadline: float | None) -> None:
        """Writes what is not written yet, and has the sandbox be nobody's."""
        ledger, self.ledger = self.ledger, None
        self._lanes = None
        if ledger is None:
            return
        try:
            await ledger.close(deadline)
            self.voice.owned("")
        except PyblockError as error:
            log.warning(
                "sandbox %s: what was not written yet, recovery will find: %s", self.id, error
            )


@cache
def _device_of() -> Callable[[Record], Device]:
    """What makes a device of a record. It is loaded when it is first needed: the types of a record
    are a tenth of the time to import pyblock."""
    with loading("a saved state"):
        from pyblock.life.recorded import device_of  # noqa: PLC0415

    return device_of
