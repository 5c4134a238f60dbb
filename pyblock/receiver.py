"""One virtual machine as its devices see it: what it has given out, its VMM's adapter, its part of the store, and what recovery knows.

Devices ask it to reserve, claim, plug, record, unplug and release. What it takes up from a store, it gives up again when it is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyblock.allotment import Allotment
from pyblock.device import BlockDevice, DeviceReceiver, Forgotten
from pyblock.errors import CallerError, InvalidState, PyblockError, SandboxClosed, TransportError, UnknownDriver, WrongEventLoop
from pyblock.formats import RAW
from pyblock.host import open_claimed
from pyblock.hypervisors.base import Hypervisor, Unsettled, fault, typed
from pyblock.loading import loading
from pyblock.manager import Device, DeviceManager
from pyblock.model import BlockDrive
from pyblock.recovery import Recovery
from pyblock.table import Phase
from pyblock.tasks import Operation, log, passed

if TYPE_CHECKING:
    from pyblock.ledger import Ledger
    from pyblock.persist import Kept
    from pyblock.state import SandboxState
    from pyblock.stores.base import Store

# What only a saved state and a store need is imported there: its typed schema is a tenth of the time to import pyblock.

# Bound once: a member of an enum takes three times as long as a name.
_ATTACHED, _ATTACH_PENDING = Phase.ATTACHED, Phase.ATTACH_PENDING

GRACE = 5.0  # seconds for what is undone or written when nobody waits for it any more
LATE_MAX = 1024  # devices that are remembered for callers who were told "pending" and may call again


class Receiver(DeviceReceiver):
    """:param sandbox_id: what the store and errors call it.
    :param vmm: the adapter of its machine.
    :param manager: the devices.
    :param allotment: what it gives out.
    """

    __slots__ = (
        "_allotment", "_kept", "_lanes", "_late", "_ledger", "_loading", "_loop", "_met", "_open", "_recovery", "_vmm", "id", "manager",
    )  # fmt: skip

    def __init__(self, sandbox_id: str, vmm: Hypervisor, manager: DeviceManager, allotment: Allotment) -> None:
        self.id = sandbox_id
        self.manager = manager
        self._allotment = allotment
        self._vmm = vmm
        self._late: dict[str, None] | None = None  # devices whose callers were told "pending", and which are gone since
        self._kept: Kept | None = None
        self._lanes: asyncio.Semaphore | None = None  # of the event loop that it is open in
        self._ledger: Ledger | None = None
        self._loading = False
        self._met = ""  # the machine, as its adapter tells it from others
        self._open = False
        self._loop: asyncio.AbstractEventLoop | None = None  # while it is open, the one that it was opened in
        self._recovery = Recovery(self)

    @property
    def vmm(self) -> Hypervisor:
        """The adapter of its machine."""
        return self._vmm

    @property
    def allotment(self) -> Allotment:
        """What it has given out."""
        return self._allotment

    @property
    def running(self) -> list[Operation]:
        """The attaches and detaches that are under way."""
        return [device.operation for device in self.manager if isinstance(device, BlockDevice) and device.operation is not None]

    def check(self) -> None:
        """See DeviceReceiver. Raises WrongEventLoop as well."""
        if not self._open:
            raise SandboxClosed(f"sandbox {self.id} is not open; use it inside 'with'")
        self._check_loop()

    def _check_loop(self) -> None:
        """What its operations wait for happens in the event loop that it was opened in. To look at it from outside of any is harmless."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if self._loop is not None and self._loop is not loop:
            raise WrongEventLoop(
                f"sandbox {self.id} was opened in another event loop; use it there, or share a pyblock.blocking.Sandbox between threads"
            )

    def reserve(self, device: BlockDevice) -> BlockDrive:
        """Takes index, ordinal and drive ID for a device; see DeviceReceiver."""
        if device.info.driver not in self._vmm.offers:
            raise UnknownDriver(f"this VMM has no driver {device.info.driver!r}; it has {', '.join(sorted(self._vmm.offers))}")
        self.check()
        if self._loading:
            raise CallerError(f"a saved state is being loaded into sandbox {self.id}; attach when that is done")
        if self.manager.get(device.id) is not device:
            raise Forgotten
        drive = self._allotment.reserve(device)
        if self._late is not None:
            self._late.pop(device.id, None)
        if self._ledger is not None:
            self._ledger.touch(device.id)
        return drive

    def release(self, device: BlockDevice, drive: BlockDrive, *, late: bool, counted: bool) -> None:
        """Gives back what `reserve` and `claim` took; see DeviceReceiver."""
        self._vacate(drive)
        self._allotment.release(drive)
        if self._ledger is not None:
            self._ledger.touch(device.id)
        if late:
            # Whoever was told "pending" may call again with this device. So it ends here, and who waits to attach its image gets a new one.
            self._late = self._late or {}
            self._late[device.id] = None
            if len(self._late) > LATE_MAX:
                del self._late[next(iter(self._late))]
            self.manager.forget(device)
        elif counted:
            self.manager.drop(device)
        else:
            self.manager.tidy(device)

    def touch(self, device: BlockDevice) -> None:
        """See DeviceReceiver."""
        if self._ledger is not None:
            self._ledger.touch(device.id)

    def doubt(self) -> None:
        """See DeviceReceiver."""
        self._recovery.doubt()

    def drop(self, device: Device) -> None:
        """Takes note that a device has one user less."""
        if self._ledger is not None:
            self._ledger.touch(device.id)
        self.manager.drop(device)

    @property
    def records(self) -> bool:
        """See DeviceReceiver."""
        return self._ledger is not None

    async def claim(self, device: BlockDevice, deadline: float | None) -> None:
        """See DeviceReceiver."""
        try:
            async with asyncio.timeout_at(deadline):
                with typed(f"choosing a place for device {device.id}"):
                    await self._vmm.place(device.held)
        except TimeoutError:
            raise passed(deadline, f"the VMM of sandbox {self.id} was being asked which places are free") from None
        if self._ledger is not None:
            await self._ledger.claim(device.id, deadline)

    async def record(self, device: Device, deadline: float | None = None) -> None:
        """See DeviceReceiver."""
        if self._ledger is not None:
            await self._ledger.record(device.id, deadline)

    async def note(self, device: BlockDevice) -> None:
        """See DeviceReceiver."""
        if self._ledger is not None:
            self._ledger.touch(device.id)
            await self._ledger.flush_soon()

    async def note_all(self, devices: Iterable[BlockDevice]) -> None:
        """The same for many at once."""
        if self._ledger is not None:
            for device in devices:
                self._ledger.touch(device.id)
            await self._ledger.flush_soon()

    async def plug(self, device: BlockDevice) -> None:
        """See DeviceReceiver."""
        if self._lanes is None and self._vmm.lanes is not None:
            self._lanes = asyncio.Semaphore(self._vmm.lanes)
        async with self._lanes or contextlib.nullcontext():  # an image that waits for its turn is not open yet
            drive = device.held
            raw = device.info.format == RAW
            with open_claimed(drive.info.path, device.identity, device.under, read_only=drive.info.read_only, raw=raw) as image:
                try:
                    await self._vmm.plug(drive, image)
                except (TransportError, Unsettled):
                    self._recovery.doubt()
                    raise
                except PyblockError:
                    raise
                except Exception as error:
                    self._recovery.doubt()
                    raise Unsettled(fault(f"plugging in drive {drive.id}", error)) from error
        self._allotment.came(drive)

    async def unplug(self, drive: BlockDrive) -> None:
        """See DeviceReceiver."""
        first = self._allotment.leaves(drive)
        try:
            await self._vmm.unplug(drive)
        except (TransportError, Unsettled) as error:
            self._recovery.doubt()
            if first and isinstance(error, TransportError):  # nothing was sent
                self._allotment.stays(drive)
            raise
        except PyblockError:
            self._allotment.stays(drive)
            raise
        except Exception as error:
            self._recovery.doubt()
            raise Unsettled(fault(f"unplugging drive {drive.id}", error)) from error

    async def locate(self, drive: BlockDrive) -> None:
        """See DeviceReceiver."""
        with typed(f"locating drive {drive.id}"):
            await self._vmm.locate(drive)
        self._allotment.came(drive)

    def nudge(self, drive: BlockDrive) -> None:
        """See DeviceReceiver."""
        try:
            self._vmm.nudge(drive)
        except Exception as error:
            log.warning("sandbox %s: drive %s was not asked for again: %r", self.id, drive.id, error)

    async def meet(self, machine: str) -> None:
        """Takes note of which machine answers. Raises SandboxConflict when the same one answers for another sandbox of the store."""
        if self._ledger is not None and machine and machine != self._met:
            await self._ledger.meet(machine)
            self._met = machine

    async def drives_of_others(self, machine: str) -> set[str]:
        """The drive IDs that other sandboxes of the store may have in this machine."""
        return await self._ledger.drives_of_others(machine) if self._ledger is not None else set()

    # The past and the end of a sandbox.

    async def _take_up(self, store: Store, deadline: float | None) -> None:
        """Becomes the sandbox's owner, and takes up what the store knows of it."""
        with loading("the store"):
            from pyblock.ledger import Ledger  # noqa: PLC0415
            from pyblock.state import decode_rows  # noqa: PLC0415

        stored = await store.open_sandbox(self.id, self._vmm.address, deadline)
        try:
            self._clear()  # of an earlier opening; the store knows what came of it
            if stored.devices or stored.state:
                where = f"{store!r}, sandbox {self.id!r}"
                devices, allotment, kept = self._restored(decode_rows(stored.state, stored.devices, where=where), where=where)
                self._adopt(devices, where=where)
                self._take_in(devices, allotment, kept)
                for device in self.manager:
                    if device.saved is None:
                        device.ref_count = device.attach_count  # other users died with the process that they were in
        except BaseException:
            await store.close_sandbox(self.id)
            raise
        self._ledger, self._met = Ledger(store, self.id, self.manager, stored.opening), ""

    async def _load(self, state: SandboxState, *, where: str, share: bool = False) -> None:
        """Takes in a saved state, and has the store keep it; all of it or nothing. See Sandbox.restore."""
        self.check()
        if len(self.manager) or self._loading:
            raise CallerError(f"sandbox {self.id} has {len(self.manager)} devices; a state is loaded into one without")
        devices, allotment, kept = self._restored(state, where=where, share=share)
        adopted: list[BlockDrive] = []
        self._loading = True  # nothing is attached until it is known whether these come in
        try:
            adopted = self._adopt(devices, where=where)
            if self._ledger is not None:
                await self._ledger.replace(devices, self._row(devices, allotment, kept))
        except BaseException:
            for drive in adopted:
                self._vacate(drive)
            if allotment is self._allotment:
                self._allotment = Allotment(allotment.capacity, allotment.given)
            raise
        finally:
            self._loading = False
        self._take_in(devices, allotment, kept)

    def _restored(self, state: SandboxState, *, where: str, share: bool = False) -> tuple[list[Device], Allotment, Kept | None]:
        """What a saved state says. Raises StateError; nothing is changed by it but the allotment, if that was unused."""
        with loading("a saved state"):
            from pyblock.persist import restore_sandbox  # noqa: PLC0415

        allotment = self._allotment if self._allotment.unused else Allotment(self._allotment.capacity, self._allotment.given)
        devices, kept = restore_sandbox(state, self.manager, allotment, where=where, share=share)
        return devices, allotment, kept

    def _take_in(self, devices: list[Device], allotment: Allotment, kept: Kept | None) -> None:
        self.manager.take_in(devices)
        self._allotment, self._kept = allotment, kept
        self._recovery.doubt()  # the machine's own disks are asked for anew
        for device in devices:
            if isinstance(device, BlockDevice):
                phase = device.phase
                device.said_count = device.attach_count if phase is _ATTACHED else 0
                if phase is _ATTACH_PENDING and device.drive is not None:
                    allotment.comes(device.drive)
                elif phase is Phase.DETACH_PENDING and device.drive is not None:
                    allotment.leaves(device.drive)

    def _adopt(self, devices: list[Device], *, where: str) -> list[BlockDrive]:
        """Has the adapter take the places of drives that were plugged in before; all of them or none. Raises InvalidState."""
        adopted: list[BlockDrive] = []
        for device in devices:
            drive = device.drive if isinstance(device, BlockDevice) else None
            if drive is None:
                continue
            try:
                if drive.imported and drive.guest_match is None:
                    self._vmm.recognize(drive)
                if drive.slot is None:
                    continue
                self._vmm.adopt(drive)
            except Exception as error:
                for one in adopted:
                    self._vacate(one)
                raise InvalidState(f"{where}: device {device.id} cannot be at {drive.slot!r}: {error}; it is left as it is") from error
            adopted.append(drive)
        return adopted

    def _vacate(self, drive: BlockDrive) -> None:
        """Whatever an adapter makes of it, what is gone is free."""
        try:
            self._vmm.vacate(drive)
        except Exception as error:
            log.warning("sandbox %s: the place of drive %s may stay taken in the adapter: %r", self.id, drive.id, error)

    def _row(self, devices: list[Device], allotment: Allotment, kept: Kept | None) -> bytes:
        """What the store keeps of the sandbox beside its devices; b"" for nothing."""
        with loading("a saved state"):
            from pyblock.persist import sandbox_to_row  # noqa: PLC0415
            from pyblock.state import encode_row  # noqa: PLC0415

        row = sandbox_to_row(self.id, devices, allotment, kept)
        return encode_row(row) if row is not None else b""

    def _clear(self) -> list[str]:
        """Forgets all devices, as if none had ever been there; returns their IDs."""
        devices = list(self.manager)
        for device in devices:
            if self._ledger is not None:
                self._ledger.touch(device.id)
            if isinstance(device, BlockDevice) and device.drive is not None:
                self._vacate(device.drive)
        self.manager.clear()
        self._allotment = Allotment(self._allotment.capacity, self._allotment.given)
        self._kept = self._late = None
        self._recovery.doubt()
        return [device.id for device in devices]

    async def _cut_off(self) -> None:
        """Ends what is under way where it stands."""
        await asyncio.sleep(0)  # an operation that was made just now marks its device before it can be ended
        operations = self.running
        for operation in operations:
            operation.cancel()
        for operation in operations:
            await operation.settled(None)

    async def _disconnect(self, deadline: float | None) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                with typed(f"sandbox {self.id}: ending the connection to its VMM"):
                    await self._vmm.close()
        except (PyblockError, TimeoutError) as error:
            log.warning("sandbox %s: the connection to its VMM did not end as it should: %s", self.id, error or "its time was up")

    async def _give_up(self, deadline: float | None) -> None:
        """Writes what is not written yet, and has the sandbox be nobody's."""
        ledger, self._ledger = self._ledger, None
        self._lanes = None
        if ledger is None:
            return
        try:
            await ledger.close(deadline)
        except PyblockError as error:
            log.warning("sandbox %s: what was not written yet, recovery will find: %s", self.id, error)
