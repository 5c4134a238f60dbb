"""A QEMU that ends while nobody asks it anything, and another one at its address: what the first
had, the second has not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit import Machine

from pyblock import Sandbox
from pyblock.life.recovery import Found
from pyblock.store.sqlite.store import SqliteStore

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

Start = Callable[..., Machine]

ENOUGH = 60.0  # seconds: a deadline that is not meant to pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state.db")
    yield store
    store.close()


async def replaced(sandbox: Sandbox, first: Machine, second: Machine) -> None:
    """The second machine is at the address of the first, and the end of the first was noticed."""
    losses = sandbox._machine.vmm.losses
    first.kill()
    first.qmp_path.unlink()
    first.qmp_path.symlink_to(second.qmp_path)
    while sandbox._machine.vmm.losses == losses:
        await asyncio.sleep(0)


@pytest.mark.parametrize("then", ["the same", "another"])
async def test_the_next_attach_finds_it_out(
    then: str, start_machine: Start, store: SqliteStore, tmp_path: Path
) -> None:
    first, second = start_machine(guest=False), start_machine(guest=False)
    images = {"the same": tmp_path / "a", "another": tmp_path / "b"}
    for image in images.values():
        image.write_bytes(bytes(1 << 20))
    async with Sandbox("one", f"qemu:{first.qmp_path}", store=store) as sandbox:
        lost = await sandbox.attach(images["the same"], device_id="lost", timeout=ENOUGH)
        await replaced(sandbox, first, second)
        device = await sandbox.attach(images[then], timeout=ENOUGH)
        assert (device.attach_count, device.held.index) == (1, 0)
        assert [one.id for one in sandbox.devices] == [device.id] != [lost.id]
        assert device.held.id in {
            node["node-name"] for node in second.side.command("query-named-block-nodes", flat=True)
        }
        assert [fdset["fdset-id"] for fdset in second.side.command("query-fdsets")] == [0]
        # quiet, as everything that was found to be gone
        await sandbox.detach("lost", timeout=ENOUGH)
        assert await sandbox.reconcile() == []


async def test_it_is_reported_where_somebody_asks(
    start_machine: Start, store: SqliteStore, tmp_path: Path
) -> None:
    first, second = start_machine(guest=False), start_machine(guest=False)
    image = tmp_path / "a"
    image.write_bytes(bytes(1 << 20))
    async with Sandbox("one", f"qemu:{first.qmp_path}", store=store) as sandbox:
        await sandbox.attach(image, timeout=ENOUGH)
        await replaced(sandbox, first, second)
        assert [one.found for one in await sandbox.reconcile()] == [Found.LOST]
