"""What a sandbox says by itself, on a real QEMU; and at each moment the store says no less."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit import Machine
from support.held_store import rows
from support.turns import LATE, SOON, until

from pyblock import (
    AttachPending,
    DetachPending,
    EventKind,
    Sandbox,
    SandboxEvent,
    TransportError,
    VmmRefused,
)
from pyblock.store.sqlite.store import SqliteStore

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

Start = Callable[..., Machine]

SAYS = {
    "attached": ("attached",),
    "detached": (None,),
    "detached-late": (None,),
    "pending": ("attach-pending", "detach-pending"),
    "refused": ("attached", None),
    "lost": (None,),
}


class Witness:
    """An `on_event` that looks into the store whenever it is told something."""

    def __init__(self, store: SqliteStore) -> None:
        self.events: list[SandboxEvent] = []
        self.wrong: list[str] = []
        self._store = store

    def __call__(self, event: SandboxEvent) -> None:
        self.events.append(event)
        phase = (
            rows(self._store).get(event.device, (None, 0))[0] if event.device is not None else None
        )
        if event.device is not None and phase not in SAYS[event.kind.value]:
            self.wrong.append(f"{event.kind} of {event.device}, which is {phase} in the store")

    def kinds(self) -> list[str]:
        return [
            event.kind.value for event in self.events if event.kind is not EventKind.OWNER_CHANGED
        ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state.db")
    yield store
    store.close()


@pytest.fixture
def witness(store: SqliteStore) -> Iterator[Witness]:
    witness = Witness(store)
    yield witness
    assert witness.wrong == []


def opened(machine: Machine, store: SqliteStore, witness: Witness) -> Sandbox:
    return Sandbox("one", f"qemu:{machine.qmp_path}", store=store, on_event=witness)


async def test_attached_detached_refused_and_pending(
    start_machine: Start, store: SqliteStore, witness: Witness
) -> None:
    machine = start_machine(guest=False, nvdimm_slots=2)
    async with opened(machine, store, witness) as sandbox:
        disk = await sandbox.attach(machine.image("scsi"), device_id="scsi", timeout=LATE)
        await sandbox.detach(disk, timeout=LATE)
        assert witness.kinds() == ["attached", "detached"]
        attached = witness.events[1]
        assert (attached.device, attached.drive, attached.index, attached.path) == (
            "scsi",
            "drive-scsi",
            0,
            disk.info.path,
        )

        # QEMU lets go of no memory module, and a guest that does not run lets go of no PCI device.
        module = await sandbox.attach(
            machine.image("nvdimm"), device_id="nvdimm", driver="nvdimm", timeout=LATE
        )
        with pytest.raises(VmmRefused) as refused:
            await sandbox.detach(module, timeout=LATE)
        assert (refused.value.sandbox, refused.value.device, refused.value.keeps) == (
            "one",
            "nvdimm",
            True,
        )
        assert witness.kinds()[2:] == ["attached", "refused"]
        blk = await sandbox.attach(
            machine.image("blk"), device_id="blk", driver="virtio-blk", timeout=LATE
        )
        with pytest.raises(DetachPending) as pending:
            await sandbox.detach(blk, timeout=SOON)
        assert (pending.value.vm, pending.value.timeout) == (
            f"qemu:{os.path.realpath(machine.qmp_path)}",
            SOON,
        )
        assert witness.kinds()[4:] == ["attached", "pending"]


async def test_an_attach_that_a_stopped_qemu_finishes_late(
    start_machine: Start, store: SqliteStore, witness: Witness
) -> None:
    machine = start_machine(guest=False)
    async with opened(machine, store, witness) as sandbox:
        await sandbox.detach(
            await sandbox.attach(machine.image("first"), timeout=LATE), timeout=LATE
        )
        witness.events.clear()
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            with pytest.raises(AttachPending):
                await sandbox.attach(machine.image("late"), device_id="late", timeout=SOON)
            assert witness.kinds() == ["pending"]
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        await until(lambda: witness.kinds() == ["pending", "detached-late"])


async def test_a_qemu_that_ends_is_lost_at_once_and_another_is_back(
    start_machine: Start, store: SqliteStore, witness: Witness, tmp_path: Path
) -> None:
    first, second = start_machine(guest=False), start_machine(guest=False)
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    async with opened(first, store, witness) as sandbox:
        await sandbox.attach(image, device_id="a", timeout=LATE)
        events = sandbox.events()
        first.kill()
        lost = await asyncio.wait_for(anext(events), LATE)  # nobody asks it anything
        assert lost.kind is EventKind.VMM_LOST and isinstance(lost.error, TransportError)
        first.qmp_path.unlink()
        first.qmp_path.symlink_to(second.qmp_path)
        await sandbox.attach(second.image("b"), device_id="b", timeout=LATE)
        assert witness.kinds() == ["attached", "vmm-lost", "vmm-back", "lost", "attached"]
        await sandbox.detach("b", timeout=LATE)
    assert witness.kinds()[5:] == ["detached"]  # that pyblock ends a connection is no loss
