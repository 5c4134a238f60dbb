"""The core through pyblock's public Python: index, names, addresses, IDs, plans."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from empty_call import empty_call
from rivals import Bits, Heap, LinearProbe, Roaring, make_name_id, plan_drives
from rivals import drive_name as plain_name
from rivals import scsi_address as plain_address

import pyblock
from pyblock.core._core import ffi, lib
from pyblock.core.plan import plan_many
from pyblock.disk.drivers import VIRTIO_SCSI
from pyblock.disk.model import BlockDrive, DeviceInfo

# Nothing here waits: the thread's own processor time leaves out what else the machine does.
pytestmark = pytest.mark.benchmark(timer=time.thread_time)

FULLNESS = 0.999
Versus = Callable[..., Any]


def pairs(index: Any, count: int) -> Callable[[], None]:
    def run() -> None:
        acquire, release = index.acquire, index.release
        for _ in repeat(None, count):
            release(acquire())

    return run


def calls(function: Callable[..., object], *arguments: object, count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in repeat(None, count):
            function(*arguments)

    return run


def filled(capacity: int, occupancy: float) -> pyblock.BlockIndex:
    index = pyblock.BlockIndex(capacity)
    index.acquire_many(int(capacity * occupancy))
    return index


OCCUPANCIES = [(65536, 0.0), (65536, 0.5), (65536, FULLNESS), (2**20, FULLNESS)]


@pytest.mark.parametrize(("capacity", "occupancy"), OCCUPANCIES)
def test_pair_against_empty_calls(versus: Versus, capacity: int, occupancy: float) -> None:
    nothing = empty_call()

    def two() -> None:
        for _ in repeat(None, 5000):
            nothing()
            nothing()

    name = f"acquire + release, {occupancy:.1%} of {capacity:,}"
    versus(
        name,
        pairs(filled(capacity, occupancy), 5000),
        "two empty cffi calls",
        two,
        at_most=2,
        ours_units=5000,
        rival_units=5000,
        slack=2,
    )


@pytest.mark.parametrize(("capacity", "occupancy"), OCCUPANCIES[1:])
def test_pair_at_any_occupancy(versus: Versus, capacity: int, occupancy: float) -> None:
    rival = pairs(filled(65536, 0), 5000)
    name = f"acquire + release, {occupancy:.1%} of {capacity:,}"
    versus(
        name,
        pairs(filled(capacity, occupancy), 5000),
        "0 % of 65,536",
        rival,
        at_most=1.2,
        ours_units=5000,
        rival_units=5000,
    )


@pytest.mark.parametrize(
    ("rival", "capacity", "at_least", "count"),
    [
        (Bits, 65536, 1.5, 2000),
        (LinearProbe, 65536, 500, 2),
        (Bits, 2**20, 15, 200),
        (Heap, 65536, None, 2000),
        (Roaring, 65536, None, 2000),
    ],
)
def test_pair_against_others(
    versus: Versus, rival: Any, capacity: int, at_least: float | None, count: int
) -> None:
    taken = int(capacity * FULLNESS)
    versus(
        f"acquire + release, 99.9% of {capacity:,}",
        pairs(filled(capacity, FULLNESS), 2000),
        rival.__name__,
        pairs(rival(capacity, taken), count),
        at_least=at_least,
        ours_units=2000,
        rival_units=count,
    )


def test_acquire_many(versus: Versus) -> None:
    def one_by_one(index: pyblock.BlockIndex) -> object:
        acquire = index.acquire
        return [acquire() for _ in repeat(None, 1000)]

    versus(
        "acquire_many(1000)",
        lambda index: index.acquire_many(1000),
        "1,000 acquires",
        one_by_one,
        at_most=1 / 8,
        unit="batch",
        prepare_ours=lambda: (pyblock.BlockIndex(),),
        prepare_rival=lambda: (pyblock.BlockIndex(),),
    )


def test_drive_names(versus: Versus) -> None:
    versus(
        "drive_names(0, 10_000)",
        lambda: pyblock.drive_names(0, 10_000),
        "plain Python",
        lambda: [plain_name(number) for number in range(10_000)],
        at_least=10,
        ours_units=10_000,
        rival_units=10_000,
        unit="name",
    )


LONG = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("what", "ours", "plain", "arguments", "at_most"),
    [
        ("drive_name, kept ready", pyblock.drive_name, plain_name, (17,), 1.0),
        ("drive_name, not ready", pyblock.drive_name, plain_name, (50_000,), 1.6),
        ("scsi_address, kept ready", pyblock.scsi_address, plain_address, (703,), 1.0),
        ("scsi_address, not ready", pyblock.scsi_address, plain_address, (50_000,), 1.6),
        ("make_name_id, fits", pyblock.make_name_id, make_name_id, ("drive", LONG[:16]), 1.0),
        ("make_name_id, shortened", pyblock.make_name_id, make_name_id, ("drive", LONG), 1.6),
    ],
)
def test_single_texts(
    versus: Versus, what: str, ours: Any, plain: Any, arguments: tuple[object, ...], at_most: float
) -> None:
    work = calls(ours, *arguments, count=2000)
    versus(
        what,
        work,
        "plain Python",
        calls(plain, *arguments, count=2000),
        at_most=at_most,
        ours_units=2000,
        rival_units=2000,
    )


@pytest.mark.parametrize("texts", [False, True], ids=["objects", "objects and their texts read"])
def test_plan_to_drives(versus: Versus, texts: bool) -> None:
    """The rival makes its texts at once, as plain Python does; ours makes them when they are read,
    and the second row reads them all."""
    ids = [f"{number:016x}" for number in range(1000)]
    files = [f"/images/{device_id}.img" for device_id in ids]

    def ours(index: pyblock.BlockIndex, ordinals: pyblock.BlockIndex) -> object:
        indexes, numbers = plan_many(index, ordinals, len(ids))
        drives = [
            BlockDrive(
                "drive-" + device_id,
                place,
                ordinal,
                0,
                VIRTIO_SCSI,
                DeviceInfo(file, VIRTIO_SCSI.name, False, device_id),
            )
            for device_id, file, place, ordinal in zip(ids, files, indexes, numbers, strict=True)
        ]
        return [(drive.scsi_addr, drive.predicted_name) for drive in drives] if texts else drives

    versus(
        "plan of 1,000 BlockDrives" + (", texts read" if texts else ""),
        ours,
        "heaps and f-strings",
        lambda free, names: plan_drives(free, names, ids, files),
        at_least=None if texts else 2,
        at_most=1 if texts else None,
        ours_units=1000,
        rival_units=1000,
        unit="drive",
        prepare_ours=lambda: (pyblock.BlockIndex(), pyblock.BlockIndex()),
        prepare_rival=lambda: (Heap(65536, 0), Heap(65536, 0)),
    )


def test_the_core_alone(versus: Versus) -> None:
    nothing = empty_call()
    room = ffi.new("uint32_t[]", 20_000)

    versus(
        "the core alone, plan of 10,000 devices",
        lambda index, ordinals: lib.pb_plan_many(
            index._handle, ordinals._handle, 10_000, room, room + 10_000
        ),
        "an empty cffi call",
        calls(nothing, count=10_000),
        at_most=1 / 6,
        ours_units=10_000,
        rival_units=10_000,
        unit="device",
        prepare_ours=lambda: (pyblock.BlockIndex(), pyblock.BlockIndex()),
    )


@pytest.mark.benchmark(timer=time.perf_counter)  # it waits for other processes
def test_import(versus: Versus, rounds: int) -> None:
    """Both byte-compiled, as pip leaves what it installs: the first rounds, which do not count,
    fill a cache of their own."""
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    environment["PYTHONPYCACHEPREFIX"] = str(Path("build/bench/pycache").resolve())

    def fresh(module: str) -> Callable[[], object]:
        return lambda: subprocess.check_call(
            [sys.executable, "-c", f"import {module}"], env=environment
        )

    versus(
        "import pyblock",
        fresh("pyblock"),
        "import asyncio",
        fresh("asyncio"),
        at_most=1.5,
        unit="process",
        rounds=rounds,
    )


def test_threads(note: Callable[[str], None]) -> None:
    """Throughput of several threads on one index and on one each, against one thread. No target:
    the GIL bounds it."""

    def run(indexes: list[pyblock.BlockIndex], count: int = 40_000) -> float:
        threads = [threading.Thread(target=pairs(index, count)) for index in indexes]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(indexes) * count / (time.perf_counter() - start)

    one = run([pyblock.BlockIndex()])
    for threads in (2, 4, 8):
        shared = pyblock.BlockIndex()
        note(
            f"threads: {threads} on one index {run([shared] * threads) / one:.2f} x the "
            "throughput of one thread, "
            f"on an index each {run([pyblock.BlockIndex() for _ in range(threads)]) / one:.2f} x"
        )
        assert len(shared) == 0
