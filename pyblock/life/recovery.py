"""What a sandbox knows against what its VMM has: found differences are settled in favour of the
VMM, and nothing is settled by guessing.

The VMM is asked before a sandbox first changes it, when a sandbox with a past is opened, and again
after a connection was lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from enum import StrEnum
from functools import partial
from typing import NamedTuple

import msgspec

from pyblock.disk.model import BlockDrive, DeviceInfo
from pyblock.errors import (
    DeadlinePassed,
    PyblockError,
    SandboxClosed,
    TransportError,
    VmmUnreachable,
)
from pyblock.life import road
from pyblock.life.device import BlockDevice
from pyblock.life.machine import Machine
from pyblock.life.registry import DeviceManager
from pyblock.life.table import Phase
from pyblock.tasks import Ended, Operation, SharedWork, passed
from pyblock.vmm.base import CONNECT_TIMEOUT, Held, Inventory, Unsettled, typed

log = logging.getLogger(__name__)

# seconds that opening waits for removals; those that take longer go on by themselves
SETTLE_TIME = 2.0


class Found(StrEnum):
    """What a difference is."""

    LOST = "lost"  # attached, and the VMM has it no more
    ATTACH = "unfinished attach"
    DETACH = "unfinished detach"
    ORPHAN = "orphan"  # named as ours, and known to nobody


class Outcome(StrEnum):
    """What became of it."""

    FREED = "freed"  # nothing of it was there; what it took is free
    REMOVED = "removed"  # the VMM had something of it, and has no more
    FINISHED = "finished"  # the VMM has it whole and does not let it go: it is attached
    KEPT = "kept"  # the guest or the VMM declined the removal: it is attached as before
    PENDING = "pending"  # the VMM has not confirmed the removal; everything stays taken
    LEFT = "left"  # nobody asked for more


class Finding(msgspec.Struct, frozen=True):
    """One difference.

    :ivar device_id: the device's ID, "" for an orphan.
    :ivar drive_id: what the VMM calls it.
    :ivar path: the host's path of the image, "" for an orphan.
    :ivar note: what the VMM said, where it said something.
    """

    found: Found
    outcome: Outcome
    device_id: str
    drive_id: str
    path: str
    note: str = ""


# Shared by all: most never have any.
NONE: tuple[Finding, ...] = ()


class Seen(NamedTuple):
    """A device as it stood before the VMM was asked. One that moved meanwhile is not judged by an
    answer that is older."""

    device: BlockDevice
    drive: BlockDrive
    phase: Phase

    @property
    def stands(self) -> bool:
        """Whether it stands so still, and nothing of it is under way."""
        return (
            self.device.drive is self.drive
            and self.device.phase is self.phase
            and self.device.operation is None
        )


class Difference(NamedTuple):
    """A device, or an orphan, that does not stand as it should, and what the VMM has of it (None:
    nothing)."""

    found: Found
    drive: BlockDrive | None
    drive_id: str
    device: BlockDevice | None
    held: Held | None
    elsewhere: bool = False  # the VMM may have it under a name that we do not know
    seen: Seen | None = None  # the device, as it was judged

    @property
    def stands(self) -> bool:
        """Whether nobody has had a go at it since: of two who ask at once, both find it."""
        return self.seen is None or self.seen.stands


def _found(device: BlockDevice) -> Found:
    """What a device is that does not stand as it should. One that nobody has is to be undone,
    whatever is pending."""
    if device.phase is Phase.ATTACHED:
        return Found.LOST
    return Found.DETACH if device.attach_count else Found.ATTACH


def at_rest(manager: DeviceManager) -> list[Seen]:
    """The devices that hold a drive and have nothing under way."""
    devices = (device for device in manager if isinstance(device, BlockDevice))
    return [
        Seen(device, device.drive, device.phase)
        for device in devices
        if device.drive is not None and device.operation is None
    ]


def differences(
    before: Collection[Seen], ours: Collection[str], inventory: Inventory
) -> list[Difference]:
    """Where `before`, as far as it still holds, and the VMM's inventory differ; nothing is changed.

    :param ours: the drive IDs that are, or were while the VMM was asked, the sandbox's own, and
        those that other sandboxes of the store may have in this machine.
    """
    found: list[Difference] = []
    for seen in before:
        device, drive, phase = seen
        if not seen.stands:
            continue
        held = inventory.held.get(drive.id)
        if held is not None and _is_another(device, held):
            held = None
        elsewhere = held is None and drive.imported and drive.file in inventory.files
        if phase is Phase.ATTACHED and (elsewhere or (held is not None and held.whole)):
            continue
        found.append(Difference(_found(device), drive, drive.id, device, held, elsewhere, seen))
    found += [
        Difference(Found.ORPHAN, None, name, None, held)
        for name, held in inventory.held.items()
        if name not in ours and not held.cold
    ]
    return found


def _is_another(device: BlockDevice, held: Held) -> bool:
    """Whether what is there under a device's drive ID has another image open than the device is. Of
    files alone: a block device may be known by the number of what it is a loop over."""
    has, is_ = held.image, device.identity
    return has is not None and is_ is not None and has[0] == is_[0] == "file" and has != is_


class Recovery:
    """:param machine: what belongs together with the VMM."""

    __slots__ = ("_asking", "_ended", "_machine", "_questions", "_renamed", "_settling", "findings")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._asking: SharedWork[None] | None = None  # while somebody asks
        self._ended = False
        self._questions: list[asyncio.Task[list[Difference]]] = []
        self._settling: list[asyncio.Task[Finding]] = []
        # imported drives whose names were learnt, and are not written down yet
        self._renamed: Sequence[BlockDrive] = ()
        self.findings: tuple[Finding, ...] = NONE  # of the last time that somebody waited for them

    def begin(self) -> None:
        """Takes questions on, until `end`."""
        self._ended = False
        self.findings = NONE

    async def ask(self, deadline: float | None) -> None:
        """Asks the machine, unless that was done, and begins to settle what differs. All who wait
        for it share one question.

        Raises TransportError when it does not answer, DeadlinePassed (nothing is then changed),
        SandboxClosed.
        """
        if not self._machine.doubtful:
            return
        asking = self._asking = self._asking or SharedWork()
        try:
            async with asyncio.timeout_at(deadline):
                await asking.join(self._ask)
        except TimeoutError:
            raise self._passed(deadline) from None
        except Ended:
            raise self._closed() from None
        finally:
            if self._asking is asking and asking.idle:
                self._asking = None

    async def end(self) -> None:
        """Ends questions that are under way, and the wait for what is being settled; removals that
        were begun belong to their devices."""
        self._ended = True
        if self._asking is not None:
            await self._asking.end()
        tasks = [*self._questions, *self._settling]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def reconcile(
        self,
        deadline: float | None,
        *,
        patience: float | None = None,
        dry_run: bool = False,
        orphans: bool = False,
    ) -> list[Finding]:
        """Asks the machine now, settles what differs, and returns what it found.

        :param deadline: event-loop time in seconds; removals that take longer go on by themselves.
        :param patience: seconds that removals are waited for at most.
        :param dry_run: settles nothing.
        :param orphans: removes what is named as ours and is known to nobody.
        Raises TransportError when the machine does not answer, DeadlinePassed; nothing is then
        changed.
        """
        now = self._machine.happened
        try:
            async with asyncio.timeout_at(deadline):
                found = await self._question()
        except TimeoutError:
            raise self._passed(deadline) from None
        if dry_run:
            return [_finding(one, Outcome.LEFT) for one in found]
        tasks = self._settle_all(found, now, orphans=orphans)
        await self._recognize()
        if tasks:
            left = (
                None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
            )
            await asyncio.wait(
                tasks,
                timeout=min((each for each in (left, patience) if each is not None), default=None),
            )
        findings = [
            task.result()
            if task.done() and not task.cancelled()
            else _finding(one, Outcome.PENDING, "the VMM has not confirmed the removal")
            for one, task in zip(found, tasks, strict=True)
        ]
        self.findings = tuple(findings)
        return findings

    async def _ask(self) -> None:
        now = self._machine.happened
        self._settle_all(await self._differences(), now, orphans=False)
        await self._recognize()

    async def _recognize(self) -> None:
        """Has the machine tell where drives are that another program plugged in, and what was
        learnt of them be written down."""
        machine = self._machine
        renamed, self._renamed = {drive.id for drive in self._renamed}, ()
        learnt: list[BlockDevice] = []
        for seen in at_rest(machine.manager):
            device, drive, phase = seen
            if phase is not Phase.ATTACHED or not drive.imported or not seen.stands:
                continue
            before = drive.guest_match, drive.pci_path
            if drive.guest_match is None:
                try:
                    await machine.locate(drive)
                except TransportError:
                    self._machine.doubt()
                    break
                except PyblockError as error:
                    log.info(
                        "sandbox %s: drive %s cannot be located: %s", machine.id, drive.id, error
                    )
            if drive.id in renamed or before != (drive.guest_match, drive.pci_path):
                learnt.append(device)
        if learnt:
            await machine.write_soon(*learnt)

    async def _question(self) -> list[Difference]:
        """Asks in a task of its own, which `end` can end without ending whoever waits for it."""
        if self._ended:
            raise self._closed()
        task = asyncio.create_task(self._differences())
        self._questions.append(task)
        try:
            await asyncio.wait([task])
        finally:
            self._questions.remove(task)
            task.cancel()
        if self._ended or task.cancelled():
            raise self._closed()
        return task.result()

    def _passed(self, deadline: float | None) -> DeadlinePassed:
        waits = f" (it waits for {why})" if (why := self._machine.vmm.waits_for) else ""
        error = passed(
            deadline,
            f"the VMM of sandbox {self._machine.id} was being asked which disks it has{waits}",
        )
        self._machine.about(error)
        return error

    def _closed(self) -> SandboxClosed:
        text = f"sandbox {self._machine.id} was closed while its VMM was being asked for its disks"
        return SandboxClosed(text, sandbox=self._machine.id)

    async def _differences(self) -> list[Difference]:
        machine = self._machine
        before = at_rest(machine.manager)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                # what comes and goes while the VMM is being asked may be in its answer
                with machine.allotment.watched() as ours:
                    with typed(f"sandbox {machine.id}: asking the VMM which disks it has"):
                        inventory = await machine.vmm.inventory([seen.drive for seen in before])
                        if not isinstance(inventory, Inventory):
                            raise TypeError(f"{inventory!r:.100} is no Inventory")
                    await machine.meet(inventory.machine)
                    others = (
                        await machine.drives_of_others(inventory.machine)
                        if inventory.held.keys() - ours
                        else set()
                    )
        except PyblockError as error:
            machine.about(error)
            if isinstance(error, TransportError):
                machine.voice.vmm_lost(error)
            raise
        except TimeoutError:
            silent = VmmUnreachable(
                f"the VMM of sandbox {machine.id} did not answer within {CONNECT_TIMEOUT:g} s"
            )
            machine.about(silent)
            machine.voice.vmm_lost(silent)
            raise silent from None
        machine.voice.vmm_back()
        self._renamed = machine.allotment.learn(inventory, ours) or self._renamed
        return differences(before, ours | others, inventory)

    def _settle_all(
        self, found: list[Difference], asked_at: int, *, orphans: bool
    ) -> list[asyncio.Task[Finding]]:
        """Begins to settle all of it; what can be settled at once is. What somebody else settles
        meanwhile is taken out of `found`."""
        # it is asked again if a connection was lost while the answer was on its way
        self._machine.asked_at = asked_at
        found[:] = [one for one in found if one.stands]
        tasks = [
            asyncio.create_task(self._settle(one, self._step(one, orphans=orphans)))
            for one in found
        ]
        self._settling += tasks
        for task in tasks:
            task.add_done_callback(self._settling.remove)
        return tasks

    def _step(self, one: Difference, *, orphans: bool) -> Callable[[], Awaitable[Outcome]] | None:
        """What there is to wait for, begun where it belongs to a device: nobody else may have a go
        at it in between."""
        device = one.device
        if device is None:
            return partial(self._remove_orphan, one) if orphans else None
        if one.held is None and not one.elsewhere:
            road.free(self._machine, device)
            # what is there under its ID all the same, or at its place, is somebody else's
            self._machine.doubt()
            return partial(self._freed, device)
        return partial(
            self._removed,
            road.reclaim(self._machine, device, whole=one.held is not None and one.held.whole),
        )

    async def _settle(
        self, one: Difference, step: Callable[[], Awaitable[Outcome]] | None
    ) -> Finding:
        try:
            return _finding(one, await step() if step is not None else Outcome.LEFT)
        except PyblockError as error:
            device = one.device
            if device is not None and device.phase is Phase.ATTACHED:
                if one.found is not Found.LOST:
                    return _finding(
                        one,
                        Outcome.FINISHED if one.found is Found.ATTACH else Outcome.KEPT,
                        str(error),
                    )
                self._machine.doubt()  # it is not there, whatever kept it from being taken down
            return _finding(one, Outcome.PENDING, str(error))

    async def _freed(self, device: BlockDevice) -> Outcome:
        await self._machine.write_soon(device)
        return Outcome.FREED

    async def _removed(self, operation: Operation) -> Outcome:
        await operation.watch()
        return Outcome.REMOVED

    async def _remove_orphan(self, one: Difference) -> Outcome:
        assert one.held is not None  # an orphan is something that is there
        try:
            await self._machine.unplug(
                BlockDrive(one.drive_id, 0, 0, 0, one.held.driver, DeviceInfo())
            )
        except Unsettled as unsettled:
            raise unsettled.error.about(sandbox=self._machine.id, drive=one.drive_id) from unsettled
        self._machine.doubt()  # its ID and place are free, which asking again tells
        return Outcome.REMOVED


def _finding(one: Difference, outcome: Outcome, note: str = "") -> Finding:
    device = one.device
    return Finding(
        one.found,
        outcome,
        device.id if device else "",
        one.drive_id,
        device.info.path if device else "",
        note,
    )
