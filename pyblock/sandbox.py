"""One virtual machine and what is plugged into it: the asyncio front door.

It connects to its VMM when it first has to, which is at once when the store knows devices of it.
What it has is a machine; here is what a caller may do with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack

from pyblock.core.index import BlockIndex
from pyblock.disk.model import DeviceInfo, DiskOptions, Options, SharedOptions
from pyblock.errors import (
    ClosedMeanwhile,
    DeviceOutcome,
    InvalidID,
    InvalidImage,
    InvalidValue,
    MachineAnswers,
    PyblockError,
    UnknownDevice,
    knowing,
    said,
)
from pyblock.life import road
from pyblock.life.allotment import Allotment
from pyblock.life.batch import Batch, raise_first
from pyblock.life.device import AttachedDevice, BlockDevice
from pyblock.life.machine import GRACE, Machine
from pyblock.life.recovery import SETTLE_TIME, Finding, Recovery
from pyblock.life.registry import Device, DeviceManager
from pyblock.life.table import Phase
from pyblock.life.voice import Events, SandboxEvent, Voice
from pyblock.loading import loading
from pyblock.tasks import deadline_after, over
from pyblock.vmm import open_hypervisor
from pyblock.vmm.base import Hypervisor, typed

if TYPE_CHECKING:
    from pyblock.kata.schema import SandboxState
    from pyblock.store.base import Store
    from pyblock.store.record import Record, SandboxRecord

log = logging.getLogger(__name__)

# What only a saved state and a store need is imported there: its typed schema is a tenth of the
# time to import pyblock.

CAPACITY = 65536
CAPACITY_MAX = 1 << 20
TIMEOUT = 60.0  # seconds: the deadline of attach and detach unless the caller gives another
OPEN_TIME = 10.0  # seconds that opening a sandbox waits for its VMM to say what it has
RECONCILE_TIME = 10.0  # seconds: the deadline of reconcile unless the caller gives another
CLOSE_TIME = 2 * GRACE  # seconds that closing a sandbox takes at most

SANDBOX_ID_MAX = 128


Image = str | os.PathLike[str] | DeviceInfo

T = TypeVar("T")


class Sandbox:
    """:param sandbox_id: 1 to 128 of A-Z a-z 0-9 _ . - beginning with a letter or digit. Raises
    InvalidID.
    :param vm: the VMM's address (`qemu:/path/to/qmp.sock`, `memory:`), or an adapter. Raises
        UnknownScheme.
    :param driver: the driver of devices that ask for none. Raises UnknownDriver.
    :param capacity: how many drives it may hold, 1 to 2^20. Raises InvalidIndex.
    :param block_offset: how many virtio-block names the guest uses before the first drive; None has
        the VMM asked.
    :param store: where it is written down what is plugged in; "host": this host's store, unless the
        machine ends with this process (`memory:`); None: nowhere, and no image is claimed.
    :param recover: open also asks the VMM what it has and settles what differs; else that waits for
        the first attach, detach or reconcile.
    :param open_timeout: seconds for all of opening; None: 60 s for the store, whose lock another
        process may have, and 10 s for the VMM.
    :param on_event: is called with each event (see `events`), in the event loop, so it must not
        wait; what it raises is logged.

    Opening (`async with`, or `open`) makes this process the owner, and takes up what the store
    knows. Raises SandboxBusy, SandboxConflict, StateError, StoreError. A VMM that does not answer
    is no error then: what is known stays as it is, and it is asked again later.

    Everything runs in the event loop in which it was opened; another one gets WrongEventLoop. It is
    not safe to share between threads (pyblock.blocking is).
    """

    __slots__ = (
        "__weakref__", "_batches", "_machine", "_open_timeout", "_opening", "_recover", "_recovery",
        "_saving", "_store",
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
        open_timeout: float | None = None,
        on_event: Callable[[SandboxEvent], None] | None = None,
    ) -> None:
        if not _is_sandbox_id(sandbox_id):
            text = (
                f"sandbox ID {said(sandbox_id)} is not 1 to 128 of A-Z a-z 0-9 _ . - beginning "
                "with a letter or digit"
            )
            raise InvalidID(text, value=sandbox_id)
        if block_offset is not None and not 0 <= block_offset < capacity:
            raise InvalidValue(
                f"block offset {said(block_offset)} is not in 0 … {capacity - 1}",
                value=block_offset,
            )
        vmm = open_hypervisor(vm) if isinstance(vm, str) else vm
        offsets = None if block_offset is None else {"vd": block_offset}
        voice = Voice(sandbox_id, on_event)
        self._machine = Machine(
            sandbox_id, vmm, DeviceManager(driver, vmm.offers), Allotment(capacity, offsets), voice
        )
        self._recovery = Recovery(self._machine)
        # that are under way; an empty set would be four times an empty list
        self._batches: list[asyncio.Task[list[AttachedDevice]]] = []
        # the last save, which may still be under way
        self._saving: asyncio.Future[None] | None = None
        self._store = store
        self._recover = recover
        self._open_timeout = open_timeout
        self._opening = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {len(self.manager)} devices, {len(self.index)} indexes taken>"

    async def open(self) -> Self:
        """Opens the sandbox as `async with` does, and returns it; `close` ends that. One that is
        open stays as it is, and two calls at once open it once."""
        if self._machine.opened:
            self._machine.check_loop()
            return self
        async with self._opening:
            if not self._machine.opened:
                await self._open()
        return self

    async def _open(self) -> None:
        store = self._find_store()
        deadline = deadline_after(self._open_timeout)
        if store is not None:
            with knowing(sandbox=self.id, vm=self._machine.vmm.address or None):
                await self._machine.take_up(store, deadline)
        self._machine.opened, self._machine.loop = True, asyncio.get_running_loop()
        self._machine.vmm.watch(self._machine.voice.vmm_lost)
        self._recovery.begin()
        if self._recover and len(self.manager):
            try:
                await self._recovery.reconcile(
                    deadline_after(OPEN_TIME) if deadline is None else deadline,
                    patience=SETTLE_TIME,
                )
            except PyblockError as error:
                log.warning(
                    "sandbox %s: its VMM could not be asked what it has: %s", self.id, error
                )
            except BaseException:
                await self.close()
                raise

    def _find_store(self) -> Store | None:
        if self._store != "host":
            return self._store
        if not self._machine.vmm.address:
            return None
        with loading("the store"):
            from pyblock.store import host_store  # noqa: PLC0415

        return host_store()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def id(self) -> str:
        """The sandbox ID."""
        return self._machine.id

    @property
    def manager(self) -> DeviceManager:
        """The registry of its devices; it also counts those that are no disks."""
        return self._machine.manager

    @property
    def index(self) -> BlockIndex:
        """The block index: which indexes are taken."""
        return self._machine.allotment.index

    @property
    def devices(self) -> list[Device]:
        """The devices it knows, attached or pending, in the order in which they came."""
        return list(self.manager)

    @property
    def recovered(self) -> tuple[Finding, ...]:
        """What differed when the VMM was last asked what it has, and what became of it."""
        return self._recovery.findings

    def events(self) -> Events:
        """What happens to this sandbox from now on: an async iterator of SandboxEvent, which ends
        when the sandbox is closed. Any number may listen. It may be asked for before the sandbox is
        opened, to hear what opening finds.

        An event comes when its outcome is written down, and for each device in the order in which
        things happened. What a listener does not take in time is dropped (see Events), and holds
        nothing up.
        """
        return self._machine.voice.events()

    async def attach(
        self,
        image: Image,
        *,
        timeout: float | None = TIMEOUT,
        **options: Unpack[Options],
    ) -> AttachedDevice:
        """Attaches an image and returns its device when the VMM has it. The same image again is the
        same device, counted once more.

        :param image: a path (file or block device), or a DeviceInfo, which then says all the rest.
        :param timeout: seconds, None for no deadline.
        :param options: any of `driver` (a name out of pyblock.DRIVERS; None: the sandbox's),
            `read_only`, `serial`, `share` (others of this host may write the image too, if they say
            so as well), `format` ("raw": it is plugged in whatever it begins with) and `device_id`,
            as DeviceInfo explains them.
        Raises CallerError, Conflict (ImageInUse among them), CapacityError, StoreError,
        DeadlinePassed (nothing was changed), VmmRefused, TransportError (everything was undone),
        AttachPending (the outcome is not known; it is undone as soon as the VMM answers).
        """
        info = _info(image, options)
        deadline = deadline_after(timeout)
        [device] = self._obtain([info])
        return await self._attach(device, info, deadline)

    async def ensure(
        self,
        path: str | os.PathLike[str],
        *,
        device_id: str,
        timeout: float | None = TIMEOUT,
        **options: Unpack[DiskOptions],
    ) -> AttachedDevice:
        """Attaches an image under that ID unless it is attached so already, and returns its device.

        However often it is called it counts one attach, so one detach ends it. An attach or detach
        of it that is under way is waited for. For parameters see `attach`.

        Raises DeviceConflict where the image is there under another ID, the ID with another image,
        or both with another driver, access or serial than asked for; and what `attach` raises.
        """
        return (await self._ensure(path, {**options, "device_id": device_id}, timeout))[0]

    async def _ensure(
        self,
        path: str | os.PathLike[str],
        options: Options,
        timeout: float | None,
    ) -> tuple[AttachedDevice, bool]:
        """The device, and whether it was attached for this."""
        info = _info(path, options)
        deadline = deadline_after(timeout)
        while True:
            [device] = self._obtain([info])
            try:
                await road.turn(self._machine, device, deadline)
                await self._recovery.ask(deadline)
                if there := device.phase is Phase.ATTACHED and device.operation is None:
                    self.manager.drop(device)
                elif device.operation is not None or not await road.attach(
                    self._machine, device, deadline
                ):
                    self.manager.drop(device)
                    continue
            except BaseException:
                self.manager.drop(device)
                raise
            return device, not there  # type: ignore[return-value]  # it is attached

    async def attach_many(
        self,
        images: Iterable[Image],
        *,
        timeout: float | None = TIMEOUT,
        progress: Callable[[BlockDevice], None] | None = None,
        **options: Unpack[SharedOptions],
    ) -> list[AttachedDevice]:
        """Attaches many images at once, with indexes in the order given, and returns their devices
        in that order. All or none.

        When one fails, the others are detached again and the first error is raised; trouble in
        undoing is added to it as notes, and its `outcomes` say of each position what became of it
        (DeviceOutcome). Closed meanwhile, it raises ClosedMeanwhile.

        :param timeout: seconds for all of them together, None for no deadline.
        :param progress: called with each device when it is attached.
        :param options: as for `attach`, without `serial` and `device_id`.
        """
        infos = [
            _info(image, options, SharedOptions) for image in several(images, "images", "attach")
        ]
        deadline = deadline_after(timeout)
        devices = self._obtain(infos, many=True)
        if not devices:
            return []
        try:
            await self._recovery.ask(deadline)
            fresh = [
                device
                for device in dict.fromkeys(devices)
                if device.phase is Phase.DETACHED and device.operation is None
            ]
            self._machine.allotment.plan(fresh)
        except BaseException:
            for device in devices:
                self.manager.drop(device)
            raise
        batch = Batch(
            devices,
            lambda position: self._attach(devices[position], infos[position], deadline),
            partial(self.detach, timeout=GRACE),
            # all have reserved by now but those that wait for their turn
            begun=lambda: self._machine.allotment.unplan(fresh),
            progress=progress,
        )
        task = asyncio.ensure_future(batch.run())
        self._batches.append(task)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await over(task)
            if not task.cancelled() and task.exception() is None:
                # in the very moment of its success
                await batch.take_back()
            raise
        finally:
            self._batches.remove(task)
        if task.cancelled():
            text = (
                f"sandbox {self.id} was closed while {len(devices)} devices were being attached; "
                "those that were are detached"
            )
            closed = ClosedMeanwhile(text, sandbox=self.id)
            closed.outcomes = batch.outcomes()
            raise closed
        return task.result()

    async def detach(
        self, device: Device | str, *, timeout: float | None = TIMEOUT, released: bool = False
    ) -> None:
        """Takes one attach of a device back; the last one unplugs it. Returns when the VMM says
        that it is gone.

        :param device: a device of this sandbox, or its ID.
        :param timeout: seconds, None for no deadline.
        :param released: the guest has let go of the disk. It has to be said where the VMM cannot
            tell (an offer's `removal` is "forced"): such a VMM takes the disk away at once,
            whatever the guest still does with it.
        Raises UnknownDevice, NotAttached, NotReleased; StoreError, DeadlinePassed (nothing was
        changed); VmmRefused (it stays attached); DetachPending (not confirmed: everything stays
        taken, and calling again is safe, also after a late confirmation has finished the job).
        """
        machine = self._machine
        machine.check()
        deadline = deadline_after(timeout)
        device_id = device if isinstance(device, str) else device.id
        found = machine.manager.get(device_id)
        if found is not None and machine.doubtful:
            await self._recovery.ask(deadline)
            found = machine.manager.get(device_id)
        if found is None:
            if device_id in machine.late:
                del machine.late[device_id]
                return  # it was told "pending", and is gone since
            try:
                found = machine.manager.find(device_id)
            except UnknownDevice as error:
                machine.about(error)
                raise
        if not isinstance(device, str) and device is not found:
            text = (
                f"device {device_id!r} of this sandbox is another object; the one given was "
                "detached, or belongs elsewhere"
            )
            raise UnknownDevice(text, sandbox=self.id, device=device_id)
        if isinstance(found, BlockDevice):
            await road.detach(machine, found, deadline, released=released)
        else:
            await machine.count(found, -1, deadline)
            machine.drop(found)

    async def detach_many(
        self,
        devices: Iterable[Device | str],
        *,
        timeout: float | None = TIMEOUT,
        released: bool = False,
    ) -> None:
        """Detaches many devices at once. All are tried; the first error is raised, the others are
        its notes, and its `outcomes` say of each position what became of it (DeviceOutcome)."""
        wanted = several(devices, "devices", "detach")
        known = [
            self.manager.get(device) or device if isinstance(device, str) else device
            for device in wanted
        ]
        done = await asyncio.gather(
            *(self.detach(device, timeout=timeout, released=released) for device in wanted),
            return_exceptions=True,
        )
        errors = [error if isinstance(error, BaseException) else None for error in done]
        raise_first(
            [error for error in errors if error is not None], tuple(map(_outcome, known, errors))
        )

    async def save(self, path: str | os.PathLike[str]) -> None:
        """Writes devices, counts and indexes to a JSON file, atomically and synced. Raises
        StateError when the file there is something else, StoreError when it cannot be written."""
        self._machine.check()
        # One after the other, and each whole: an older picture must not come after a newer one, nor
        # a cancelled one be half awaited.
        saving = self._saving = asyncio.ensure_future(self._save(path, self._saving))
        saving.add_done_callback(lambda task: task.cancelled() or task.exception())
        await over(saving)
        with knowing(sandbox=self.id, path=os.fsdecode(path)):
            saving.result()

    async def _save(
        self, path: str | os.PathLike[str], previous: asyncio.Future[None] | None
    ) -> None:
        with loading("a state file"):
            from pyblock.kata import file as json_file  # noqa: PLC0415

        if previous is not None:
            await over(previous)
        await asyncio.to_thread(json_file.write, path, self.state())

    async def load(self, path: str | os.PathLike[str], *, share: bool = False) -> None:
        """Restores what `save` (or the original) wrote, into an open sandbox without devices.
        Touches no VMM.

        :param share: others of this host may write its images too, if they say so as well; the
            original claims none.
        Raises StateError; ImageInUse when another sandbox has claimed an image of it; StoreError.
        Nothing is then changed.
        """
        with loading("a state file"):
            from pyblock.kata import file as json_file  # noqa: PLC0415

        self._machine.check()
        with knowing(sandbox=self.id, path=os.fsdecode(path)):
            state = await asyncio.to_thread(json_file.read, path)
            await self.restore(state, where=f"state file {os.fspath(path)!r}", share=share)

    def state(self) -> SandboxState:
        """What `save` writes. An operation under way is saved as pending."""
        with loading("a saved state"):
            from pyblock.kata.translate import sandbox_to_state  # noqa: PLC0415
            from pyblock.life.recorded import record_of  # noqa: PLC0415

        machine = self._machine
        machine.check()
        own = machine.own_record(self.manager, machine.allotment, machine.kata)
        return sandbox_to_state(self.id, own, map(record_of, self.manager))

    async def restore(
        self, state: SandboxState, *, where: str = "the state", share: bool = False
    ) -> None:
        """Restores a decoded state; see `load`."""
        with knowing(sandbox=self.id):
            self._machine.check()
            own, records = _sandbox_from_state()(
                state, self.manager.driver, where=where, share=share
            )
            await self._machine.load(own, records, where=where)

    async def reconcile(
        self,
        *,
        dry_run: bool = False,
        orphans: bool = False,
        timeout: float | None = RECONCILE_TIME,
    ) -> list[Finding]:
        """Asks the VMM now what it has, settles what differs from what is known, and returns the
        differences.

        A device that the VMM has no more is lost, and what it took is free; an unfinished attach is
        undone, or finished where the VMM does not let go of it; an unfinished detach is finished;
        what is named as ours and is known to nobody is an orphan.

        :param dry_run: changes nothing.
        :param orphans: removes orphans.
        :param timeout: seconds for all of it, None for no deadline; removals that take longer are
            pending, and go on by themselves.
        Raises DeadlinePassed or TransportError when the VMM does not answer; nothing is then
        changed.
        """
        self._machine.check()
        return await self._recovery.reconcile(
            deadline_after(timeout), dry_run=dry_run, orphans=orphans
        )

    async def forget(self) -> list[str]:
        """Gives up everything that belongs to a machine which no longer exists: devices, indexes,
        claims. Returns the devices' IDs.

        Raises MachineAnswers unless its socket is absent or nobody listens there; StoreError.
        """
        self._machine.check()
        with (
            knowing(sandbox=self.id),
            typed(f"sandbox {self.id}: finding out whether its machine is gone"),
        ):
            gone = await self._machine.vmm.is_gone()
        if not gone:
            address = self._machine.vmm.address
            text = (
                f"sandbox {self.id}: its machine {address} still answers; detach its devices, or "
                "end it first"
            )
            raise MachineAnswers(text, sandbox=self.id, vm=address or None)
        machine = self._machine
        await machine.cut_off()
        disks = [
            device
            for device in self.manager
            if isinstance(device, BlockDevice) and device.drive is not None
        ]
        given_up = machine.clear()
        if machine.ledger is not None:
            await machine.ledger.flush(own=b"")
        machine.voice.given_up(disks)
        return given_up

    async def settle(self, timeout: float = GRACE) -> None:
        """Waits, so many seconds at most, until attaches that nobody waits for any more are undone,
        and saves are written."""
        self._machine.check_loop()
        await self._settle(timeout)

    async def _settle(self, timeout: float) -> None:
        undoing = [
            operation.settled(None)
            for operation in self._machine.running
            if operation.abandoned and operation.undoing
        ]
        if self._saving is not None:
            undoing.append(over(self._saving))
        if undoing:
            await asyncio.wait(
                [asyncio.ensure_future(one) for one in undoing], timeout=max(0.0, timeout)
            )

    async def close(self) -> None:
        """Ends the connection to the VMM; the machine keeps what it has. Attaches that nobody waits
        for any more, and batches that are under way, are first undone, within 5 s; what is then
        still under way is left pending. Takes 10 s at most."""
        machine = self._machine
        if machine.loop is not None and not machine.loop.is_closed():
            machine.check_loop()
        loop = asyncio.get_running_loop()
        undone, over_ = loop.time() + GRACE, loop.time() + CLOSE_TIME
        try:
            if batches := list(self._batches):
                # a batch that was made just now has to have begun, to give back what was planned
                # for it
                await asyncio.sleep(0)
                for task in batches:
                    task.cancel()
                await asyncio.wait(batches, timeout=GRACE)
            await self._settle(undone - loop.time())
        finally:
            machine.opened = False
            try:
                await self._recovery.end()
                await machine.cut_off()
            finally:
                machine.loop = None
                try:
                    await machine.disconnect(over_)
                finally:
                    await machine.close_ledger(over_)
                    machine.voice.close()

    def _obtain(self, infos: Sequence[DeviceInfo], *, many: bool = False) -> list[BlockDevice]:
        """The devices for what the caller wants, one user counted on each; all or none."""
        self._machine.check()
        devices: list[BlockDevice] = []
        try:
            for info in infos:
                devices.append(self._machine.manager.disk(info))  # _info let nothing else through
        except BaseException as error:
            for device in devices:
                self.manager.drop(device)
            self._machine.about(error)
            if many and isinstance(error, PyblockError):
                bad = len(devices)
                error.outcomes = tuple(
                    DeviceOutcome(one.id, one.path or None, error if at == bad else None)
                    for at, one in enumerate(infos)
                )
            raise
        return devices

    async def _attach(
        self, device: BlockDevice, info: DeviceInfo, deadline: float | None
    ) -> AttachedDevice:
        while True:
            try:
                if self._machine.doubtful:
                    await self._recovery.ask(deadline)
                if await road.attach(self._machine, device, deadline):
                    return device  # type: ignore[return-value]  # it is attached
            except BaseException:
                self.manager.drop(device)
                raise
            [device] = self._obtain([info])  # the other has ended meanwhile

    # What the manager asks for.

    async def _attach_known(self, device: Device, deadline: float | None) -> None:
        if not isinstance(device, BlockDevice):
            await self._machine.count(device, 1, deadline)
        elif not await road.attach(self._machine, device, deadline):
            raise UnknownDevice(
                f"device {device.id!r} has ended meanwhile; attach its image anew", **device.facts
            )

    async def _detach_known(self, device: Device, deadline: float | None) -> None:
        if isinstance(device, BlockDevice):
            await road.detach(self._machine, device, deadline)
        else:
            await self._machine.count(device, -1, deadline)


def several(given: Iterable[T], what: str, one_by_one: str) -> list[T]:
    """All of what a call about many was given. Raises InvalidValue for a text or a path, whose
    letters would be taken for names."""
    if isinstance(given, str | bytes | os.PathLike):
        raise InvalidValue(
            f"{what} {given!r} is one; give a list of them, or use {one_by_one}", value=given
        )
    return list(given)


def _outcome(device: Device | str, error: BaseException | None) -> DeviceOutcome:
    return (
        DeviceOutcome(device, None, error)
        if isinstance(device, str)
        else DeviceOutcome(device.id, device.info.path or None, error)
    )


def _info(image: Image, options: Mapping[str, object], known: type = Options) -> DeviceInfo:
    """What is wanted. Raises TypeError for an option that is none of those."""
    if strange := options.keys() - known.__annotations__.keys():
        raise TypeError(
            f"unexpected options {', '.join(sorted(strange))}; there are "
            f"{', '.join(known.__annotations__)}"
        )
    if not isinstance(image, DeviceInfo):
        told: dict[str, Any] = dict(options)
        return DeviceInfo(os.fsdecode(image), id=told.pop("device_id", None), **told)
    if any(value is not None and value is not False for value in options.values()):
        raise InvalidValue(f"a DeviceInfo says {', '.join(options)} itself; give that there")
    if image.dev_type in ("c", "u"):
        raise InvalidImage(
            f"a character device ({image.major}:{image.minor}) is no disk; count it through "
            "sandbox.manager",
            path=image.path or None,
        )
    return image


def _is_sandbox_id(text: object) -> bool:
    if (
        not isinstance(text, str)
        or not 0 < len(text) <= SANDBOX_ID_MAX
        or not text.isascii()
        or not text[0].isalnum()
    ):
        return False
    return text.isalnum() or text.translate(_WITHOUT_MARKS).isalnum()


_WITHOUT_MARKS = str.maketrans("", "", "_.-")


@cache
def _sandbox_from_state() -> Callable[..., tuple[SandboxRecord, list[Record]]]:
    """What makes records of a saved state, loaded when it is first needed."""
    with loading("a saved state"):
        from pyblock.kata.translate import sandbox_from_state  # noqa: PLC0415

    return sandbox_from_state
