"""Memory on a real QEMU: what an attach and its detach leave behind, what a flood of events takes.
`make soak-qemu` is the long form."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from kit import Machine
from support import soak_qemu

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

PAIRS = 400
EVENTS = 100_000


@pytest.fixture
def traces() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traces")
async def test_a_pair_leaves_nothing_behind(
    bare_machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    left = await soak_qemu.pairs(bare_machine, PAIRS, soak_qemu.traced, lambda text: None)
    with capsys.disabled():
        print(f"\n{PAIRS} pairs: each leaves {left:.0f} bytes behind")
    assert left <= soak_qemu.PAIR_MAX


async def test_a_flood_costs_the_connection_not_the_memory(bare_machine: Machine) -> None:
    said: list[str] = []
    grown = await soak_qemu.flood(bare_machine, EVENTS, said.append)
    assert grown <= soak_qemu.FLOOD_MAX, said
