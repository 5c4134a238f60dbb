"""What the store costs, on the in-memory VMM, and how that grows; and what recovery costs on a real
QEMU."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_qmp import BareQmp, encode
from kit.fixtures import started
from rows import Row
from test_sandbox import images

import pyblock
from pyblock.store.sqlite.store import SqliteStore

Versus = Callable[..., Any]

PAIRS = 100
FEW = 10


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


async def opened(name: str, store: SqliteStore | None) -> pyblock.Sandbox:
    return await pyblock.Sandbox(name, "memory:", store=store).__aenter__()


async def pairs(sandbox: pyblock.Sandbox, image: Path) -> None:
    for _ in range(PAIRS):
        await sandbox.detach(await sandbox.attach(image))


def test_pair_with_many_devices(
    versus: Versus, short: bool, loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    many = 10_000
    one, *others = images(tmp_path, many + 1)
    stores = [SqliteStore(tmp_path / name) for name in ("few.db", "many.db")]

    async def filled(store: SqliteStore, count: int) -> pyblock.Sandbox:
        sandbox = await opened("filled", store)
        await sandbox.attach_many(others[:count])
        return sandbox

    few, full = (
        loop.run_until_complete(filled(store, count))
        for store, count in zip(stores, (FEW, many), strict=True)
    )
    gc.collect()
    # what is there already is no garbage of this work; a full collection would visit it all the
    # same
    gc.freeze()
    units: dict[str, Any] = {"ours_units": PAIRS, "rival_units": PAIRS, "unit": "pair"}
    run = loop.run_until_complete
    name = f"attach + detach through the store, {many:,} devices there"
    versus(
        name,
        lambda: run(pairs(full, one)),
        f"with {FEW} there",
        lambda: run(pairs(few, one)),
        at_most=1.3,
        **units,
    )
    gc.unfreeze()
    for sandbox in (few, full):
        run(sandbox.close())
    for store in stores:
        store.close()


def test_pair_with_many_sandboxes(
    versus: Versus, short: bool, loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    """Four devices in each of the sandboxes that are there, which share their images to read."""
    many = 10_000
    one, *shared = images(tmp_path, 5)
    few_store, full_store = (SqliteStore(tmp_path / name) for name in ("few.db", "full.db"))

    async def fill(store: SqliteStore, count: int) -> pyblock.Sandbox:
        for number in range(count):
            async with pyblock.Sandbox(f"sandbox-{number}", "memory:", store=store) as sandbox:
                await sandbox.attach_many(shared, read_only=True)
        return await opened("measured", store)

    run = loop.run_until_complete
    few, full = run(fill(few_store, FEW)), run(fill(full_store, many))
    units: dict[str, Any] = {"ours_units": PAIRS, "rival_units": PAIRS, "unit": "pair"}
    name = f"attach + detach through the store, {many:,} sandboxes there"
    versus(
        name,
        lambda: run(pairs(full, one)),
        f"with {FEW} there",
        lambda: run(pairs(few, one)),
        at_most=1.3,
        **units,
    )
    run(few.close())
    run(full.close())
    few_store.close()
    full_store.close()


def test_pair_against_none(versus: Versus, loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    [one] = images(tmp_path, 1)
    store = SqliteStore(tmp_path / "state.db")
    run = loop.run_until_complete
    ours, bare = run(opened("ours", store)), run(opened("bare", None))
    units: dict[str, Any] = {"ours_units": PAIRS, "rival_units": PAIRS, "unit": "pair"}
    versus(
        "attach + detach through the store",
        lambda: run(pairs(ours, one)),
        "without a store",
        lambda: run(pairs(bare, one)),
        **units,
    )
    run(ours.close())
    run(bare.close())
    store.close()


def test_write_transactions(
    record: Callable[[Row], None], loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    [one] = images(tmp_path, 1)
    store = SqliteStore(tmp_path / "state.db")
    commits: list[str] = []

    async def run() -> None:
        async with pyblock.Sandbox("counted", "memory:", store=store) as sandbox:
            await sandbox.detach(await sandbox.attach(one))
            assert store._file._db is not None
            store._file._db.set_trace_callback(
                lambda sql: commits.append(sql) if sql == "COMMIT" else None
            )
            await sandbox.detach(await sandbox.attach(one))
            store._file._db.set_trace_callback(None)

    loop.run_until_complete(run())
    store.close()
    count = len(commits)
    record(
        Row("write transactions of attach + detach", "count", count, 4, True, 0, 0, "pair", slack=1)
    )


def test_recovery(record: Callable[[Row], None], short: bool, tmp_path: Path) -> None:
    """Opening a sandbox with 1,000 devices, against QEMU's own listing replies read from a bare
    socket."""
    count = 1000
    paths = images(tmp_path, count)
    listing = encode(
        [
            ("query-named-block-nodes", {"flat": True}),
            ("qom-list", {"path": "/machine/peripheral"}),
            ("query-pci", {}),
        ]
    )
    ours: list[float] = []
    floor: list[float] = []

    async def fill(address: str) -> None:
        store = SqliteStore(tmp_path / "state.db")
        async with pyblock.Sandbox("thousand", address, store=store) as sandbox:
            await sandbox.attach_many(paths, timeout=None)
        store.close()

    async def recover(address: str) -> float:
        store = SqliteStore(tmp_path / "state.db")  # as a process that has just been started
        start = time.perf_counter()
        async with pyblock.Sandbox("thousand", address, store=store) as sandbox:
            spent = time.perf_counter() - start
            assert len(sandbox.devices) == count and not sandbox.recovered
        store.close()
        return spent

    with started(guest=False, ports=0) as machine:
        address = f"qemu:{machine.qmp_path}"
        asyncio.run(fill(address))
        for _ in range(2 if short else 7):
            ours.append(asyncio.run(recover(address)))
            qmp = BareQmp(machine.qmp_path)
            start = time.perf_counter()
            qmp.one_by_one(listing)
            floor.append(time.perf_counter() - start)
            qmp.close()
    mine, theirs = statistics.median(ours), statistics.median(floor)
    name = f"recovery of a sandbox with {count:,} devices on QEMU"
    record(
        Row(
            name,
            "QEMU's listings",
            mine / theirs,
            3,
            True,
            mine * 1e9,
            theirs * 1e9,
            "sandbox",
            slack=1.5,
        )
    )
