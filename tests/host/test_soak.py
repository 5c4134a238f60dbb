"""The short form of the soak, and that the soak would notice: each kind of damage that is done to
the code here must end in a violation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from support import soak

from pyblock.errors import ImageInUse
from pyblock.life import road
from pyblock.life.allotment import Allotment
from pyblock.life.device import BlockDevice
from pyblock.life.machine import Machine
from pyblock.store.base import Row
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.timeout(300)


def run(operations: int, sandboxes: int, *more: str) -> tuple[int, str]:
    lines: list[str] = []
    status = soak.main(
        ["--operations", str(operations), "--sandboxes", str(sandboxes), *more], lines.append
    )
    return status, "\n".join(lines)


def test_the_short_form() -> None:
    status, text = run(6000, 200, "--checkpoints", "10")
    assert status == 0, text
    assert "crashes: 5, after which recovery settled 100 devices" in text
    assert text.count(" operations, ") == 1 + 1 + 10  # its first line, the filling, the checkpoints
    assert text.count("p50") == text.count("p99") == 2


Patch = pytest.MonkeyPatch


def change_rows(patch: Patch, change: Callable[[Sequence[Row]], Sequence[Row]]) -> None:
    write = SqliteStore.write

    async def changed(
        store: SqliteStore,
        sandbox_id: str,
        rows: Callable[[], Sequence[Row]],
        deadline: float | None = None,
        **more: Any,
    ) -> dict[str, ImageInUse]:
        return await write(store, sandbox_id, lambda: change(rows()), deadline, **more)

    patch.setattr(SqliteStore, "write", changed)


def forget_to_delete(patch: Patch) -> None:
    change_rows(patch, lambda rows: [row for row in rows if row.record is not None])


def forget_the_claim(patch: Patch) -> None:
    change_rows(patch, lambda rows: [row._replace(claim=None) for row in rows])


def lose_a_count(patch: Patch) -> None:
    """Every so often a count is not written down."""
    count = road.Count.work
    calls = 0

    async def forgetful(operation: road.Count) -> None:
        nonlocal calls
        calls += 1
        if calls % 50:
            return await count(operation)
        operation._device.attach_count += operation._more
        operation._device.operation = None

    patch.setattr(road.Count, "work", forgetful)


def leak_an_index(patch: Patch) -> None:
    release = Allotment.release
    calls = 0

    def leaky(allotment: Allotment, drive: Any) -> None:
        nonlocal calls
        calls += 1
        release(allotment, drive)
        if calls % 50 == 0:
            allotment.index.reserve(drive.index)

    patch.setattr(Allotment, "release", leaky)


def leave_a_backend(patch: Patch) -> None:
    # which does nothing to the machine
    patch.setattr(MemoryHypervisor, "remove_rest", MemoryHypervisor.locate)


def leak_memory(patch: Patch) -> None:
    attach = road.attach
    leaked = []

    async def leaky(machine: Machine, device: BlockDevice, deadline: float | None) -> bool:
        leaked.append(b"\1" * 100_000)
        return await attach(machine, device, deadline)

    patch.setattr(road, "attach", leaky)


def write_after_death(patch: Patch) -> None:
    """Whoever is cut off writes that down, as the dead cannot."""
    remove = road.Removal.work

    async def talkative(operation: road.Removal) -> None:
        try:
            await remove(operation)
        except BaseException:
            await operation._machine.write_soon(operation._device)
            raise

    patch.setattr(road.Removal, "work", talkative)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (forget_to_delete, "the store has|recovery found|differed"),
        (forget_the_claim, "the store has"),
        (lose_a_count, "was attached|the store has"),
        (leak_an_index, "indexes|gave out the index"),
        (leave_a_backend, "exists already|backends|did not wait"),
        (leak_memory, "memory grew"),
        (write_after_death, "after the process had died"),
    ],
)
def test_it_notices(
    damage: Callable[[Patch], None], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch)
    monkeypatch.setattr(soak, "SLACK", 2 << 20)
    status, said = run(1500, 40, "--checkpoints", "10", "--tolerance", "0")
    assert status == 1
    [violation] = [line for line in said.splitlines() if line.startswith("VIOLATION")]
    assert any(one in violation for one in text.split("|")), violation
