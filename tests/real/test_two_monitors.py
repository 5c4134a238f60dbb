"""Two monitors of one machine are two addresses: the second sandbox is told, and takes no disk of
the first for an orphan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit import Machine, Qmp

from pyblock import Sandbox, SandboxConflict, TransportError
from pyblock.life.recovery import Found
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.qemu import adapter as qemu

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

Start = Callable[..., Machine]

ENOUGH = 60.0  # seconds: a deadline that is not meant to pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state.db")
    yield store
    store.close()


def is_there(machine: Machine, drive_id: str) -> bool:
    side = Qmp(machine.side_qmp_path)
    try:
        return any(
            entry["name"] == drive_id
            for entry in side.command("qom-list", path="/machine/peripheral")
        )
    finally:
        side.close()


@pytest.mark.parametrize("found_by", ["process", "uuid"])
async def test_the_second_is_told(
    start_machine: Start, store: SqliteStore, found_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = start_machine(guest=False, extra=["-uuid", "0b5e7c52-7a55-4a9c-9d2e-5c1a55f0a001"])
    machine.side.close()  # QEMU serves one client a monitor
    if found_by == "uuid":
        monkeypatch.setattr(qemu, "qemu_process", lambda pid: "")
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as one:
        device = await one.attach(machine.image("a"), timeout=ENOUGH)
        async with Sandbox("two", f"qemu:{machine.side_qmp_path}", store=store) as two:
            for _ in range(2):
                with pytest.raises(SandboxConflict, match="'one'"):
                    await two.attach(machine.image(f"b{_}"), timeout=ENOUGH)
                with pytest.raises(SandboxConflict, match="'one'"):
                    await two.reconcile(orphans=True)
            assert not two.devices
        assert is_there(machine, device.held.id)
        assert await one.reconcile() == []
        await one.detach(device, timeout=ENOUGH)
    # the first has nothing there any more
    async with Sandbox("two", f"qemu:{machine.side_qmp_path}", store=store) as two:
        await two.detach(await two.attach(machine.image("c"), timeout=ENOUGH), timeout=ENOUGH)


async def test_where_it_cannot_be_told(
    start_machine: Start, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another sandbox of the store knows is no orphan; what none knows is one."""
    monkeypatch.setattr(qemu, "qemu_process", lambda pid: "")
    machine = start_machine(guest=False)
    machine.side.command(
        "blockdev-add", {"driver": "null-co", "node-name": "drive-left", "size": 1 << 20}
    )
    machine.side.close()
    async with Sandbox("one", f"qemu:{machine.qmp_path}", store=store) as one:
        device = await one.attach(machine.image("a"), timeout=ENOUGH)
        async with Sandbox("two", f"qemu:{machine.side_qmp_path}", store=store) as two:
            found = await two.reconcile(orphans=True)
            assert [(each.found, each.drive_id) for each in found] == [(Found.ORPHAN, "drive-left")]
        assert is_there(machine, device.held.id)
        await one.detach(device, timeout=ENOUGH)


async def test_another_machine_with_a_drive_of_that_name(
    start_machine: Start, store: SqliteStore
) -> None:
    """Device IDs are the callers', so two machines may well have one each."""
    first, second = start_machine(guest=False), start_machine(guest=False)
    second.side.command(
        "blockdev-add", {"driver": "null-co", "node-name": "drive-data", "size": 1 << 20}
    )
    async with Sandbox("one", f"qemu:{first.qmp_path}", store=store) as one:
        await one.attach(first.image("a"), device_id="data", timeout=ENOUGH)
        async with Sandbox("two", f"qemu:{second.qmp_path}", store=store) as two:
            found = await two.reconcile()
            assert [(each.found, each.drive_id) for each in found] == [(Found.ORPHAN, "drive-data")]


async def test_a_machine_that_was_started_anew(start_machine: Start, store: SqliteStore) -> None:
    """Its process is another one, its address and sandbox the same."""
    first, second = start_machine(guest=False), start_machine(guest=False)
    link = first.folder / "link"
    link.symlink_to(first.qmp_path)
    async with Sandbox("one", f"qemu:{first.qmp_path}", store=store) as one:
        await one.detach(await one.attach(first.image("a"), timeout=ENOUGH), timeout=ENOUGH)
        first.kill()
        first.qmp_path.unlink()
        first.qmp_path.symlink_to(second.qmp_path)
        image = second.image("a")
        # the end of the connection may not have been noticed yet
        with contextlib.suppress(TransportError):
            await one.reconcile()
        await one.detach(await one.attach(image, timeout=ENOUGH), timeout=ENOUGH)
