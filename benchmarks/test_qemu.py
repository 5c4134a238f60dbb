"""Disks to paused QEMUs: pyblock, libvirt, and a bare socket with prepared bytes as the floor. A
new QEMU for every round of each."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import islice
from pathlib import Path

import many_qemus
import pytest
from bare_qmp import BareQmp, encode, plain_commands
from kit.fixtures import started
from kit.machine import Machine, find_qemu
from libvirt_rival import LibvirtMachine
from rows import Row

import pyblock
from pyblock.store.sqlite.store import SqliteStore

DISKS = 100
QEMUS = 40
PORTS = [
    f"pcie-root-port,id=rp{n},chassis={n},slot={n},multifunction=on,addr={4 + n // 8:#x}.{n % 8}"
    for n in range(DISKS + 1)
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path: QEMU reads its monitor byte by byte, and a long one would make the floor
    higher."""
    with tempfile.TemporaryDirectory(prefix="pb-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def paths(folder: Path) -> list[Path]:
    return many_qemus.make_images(folder, DISKS)


def machine_for(driver: str) -> AbstractContextManager[Machine]:
    """A machine with a place for each disk and for one more."""
    extra = [word for port in PORTS for word in ("-device", port)] if driver == "virtio-blk" else []
    return started(guest=False, ports=0, extra=extra)


def ours(paths: list[Path], driver: str, *, at_once: bool) -> float:
    async def run(machine: Machine) -> float:
        store = SqliteStore(machine.folder / "state.db")
        async with pyblock.Sandbox(
            "bench", f"qemu:{machine.qmp_path}", driver=driver, store=store
        ) as sandbox:
            # The connection and the question for the machine's own disks belong to the first use,
            # not to the attach of a disk.
            await sandbox.detach(
                await sandbox.attach(machine.image("first", 1 << 20), driver="virtio-scsi")
            )
            start = time.perf_counter()
            if at_once:
                await sandbox.attach_many(paths)
            else:
                for path in paths:
                    await sandbox.attach(path)
            return time.perf_counter() - start

    with machine_for(driver) as machine:
        return asyncio.run(run(machine))


def bare(paths: list[Path], driver: str, *, at_once: bool = False) -> float:
    with machine_for(driver) as machine:
        return bare_on(machine, paths, driver, at_once=at_once)


def bare_on(machine: Machine, paths: list[Path], driver: str, *, at_once: bool = False) -> float:
    lines = encode(plain_commands(paths, driver))
    qmp = BareQmp(machine.qmp_path)
    start = time.perf_counter()
    (qmp.at_once if at_once else qmp.one_by_one)(lines)
    spent = time.perf_counter() - start
    qmp.close()
    return spent


def libvirt(paths: list[Path]) -> float:
    with LibvirtMachine(find_qemu()) as machine:
        start = time.perf_counter()
        for unit, path in enumerate(paths):
            machine.attach(path, unit)
        return time.perf_counter() - start


class Medians:
    """Runs each of some works in turn, round after round; the median of each."""

    def __init__(self, rounds: int, works: dict[str, Callable[[], float]]) -> None:
        self.times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                self.times[name].append(work())

    def row(self, what: str, ours: str, rival: str, target: float | None) -> Row:
        mine, theirs = statistics.median(self.times[ours]), statistics.median(self.times[rival])
        return Row(
            what,
            rival,
            mine / theirs,
            target,
            True,
            mine * 1e9 / DISKS,
            theirs * 1e9 / DISKS,
            "disk",
            slack=2,
        )


def test_100_disks(
    paths: list[Path], short: bool, record: Callable[[Row], None], note: Callable[[str], None]
) -> None:
    works: dict[str, Callable[[], float]] = {
        "single": lambda: ours(paths, "virtio-scsi", at_once=False),
        "bare socket, one by one": lambda: bare(paths, "virtio-scsi"),
        "many": lambda: ours(paths, "virtio-scsi", at_once=True),
        "bare socket, all at once": lambda: bare(paths, "virtio-scsi", at_once=True),
        "libvirt": lambda: libvirt(paths),
    }
    try:
        libvirt(paths[:1])
    except Exception as error:  # whatever it lacks here: it is said, and the other rows stand
        note(
            f"SKIPPED: no row against libvirt ({type(error).__name__}: {error}); scripts/setup "
            "bench installs what it needs"
        )
        del works["libvirt"]
    medians = Medians(2 if short else 7, works)
    if "libvirt" in works:
        record(medians.row("100 disks to a paused QEMU, one by one", "single", "libvirt", 0.5))
        record(medians.row("100 disks to a paused QEMU, in one call", "many", "libvirt", 0.3))
    record(
        medians.row(
            "100 disks to a paused QEMU, one by one", "single", "bare socket, one by one", 1.35
        )
    )
    record(
        medians.row(
            "100 disks to a paused QEMU, in one call", "many", "bare socket, one by one", 1.0
        )
    )
    record(
        medians.row(
            "100 disks to a paused QEMU, in one call", "many", "bare socket, all at once", 1.25
        )
    )


def test_100_disks_behind_ports(
    paths: list[Path], short: bool, record: Callable[[Row], None]
) -> None:
    medians = Medians(
        2 if short else 5,
        {
            "single": lambda: ours(paths, "virtio-blk", at_once=False),
            "bare socket, one by one": lambda: bare(paths, "virtio-blk"),
            "many": lambda: ours(paths, "virtio-blk", at_once=True),
        },
    )
    what = "100 virtio-blk disks behind 101 ports"
    record(medians.row(f"{what}, one by one", "single", "bare socket, one by one", 1.35))
    record(medians.row(f"{what}, in one call", "many", "bare socket, one by one", 0.8))


def test_many_qemus(
    folder: Path, short: bool, record: Callable[[Row], None], note: Callable[[str], None]
) -> None:
    """A long form: it starts 40 QEMUs for each round of each."""
    if short:
        pytest.skip("only in the long form")
    found: list[dict[str, float]] = []
    floors: list[float] = []
    for round_ in range(3):
        with ExitStack() as stack:
            machines = [stack.enter_context(started(guest=False)) for _ in range(QEMUS)]
            here = folder / f"round-{round_}"
            here.mkdir()
            command = [
                sys.executable,
                many_qemus.__file__,
                str(here),
                *(str(machine.qmp_path) for machine in machines),
            ]
            found.append(
                json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout
                )
            )
        with ExitStack() as stack:
            machines = [stack.enter_context(started(guest=False)) for _ in range(QEMUS)]
            images = iter(many_qemus.make_images(folder, QEMUS * many_qemus.DISKS))
            floors.append(
                sum(
                    bare_on(machine, list(islice(images, many_qemus.DISKS)), "virtio-scsi")
                    for machine in machines
                )
            )

    def median(name: str) -> float:
        return statistics.median(one[name] for one in found)

    what, disks, floor = (
        f"{QEMUS} QEMUs in one process, all active",
        QEMUS * many_qemus.DISKS,
        statistics.median(floors),
    )
    spent, lag, memory = median("seconds"), median("lag"), median("memory")
    record(
        Row(
            f"{what}: time",
            "the sum of bare sockets",
            spent / floor,
            0.75,
            True,
            spent * 1e9 / disks,
            floor * 1e9 / disks,
            "disk",
        )
    )
    record(
        Row(f"{what}: the event loop's lag, p99", "ms", lag * 1e3, 10, True, lag * 1e9, 0, "look")
    )
    note(
        "the lag of an idle event loop in another process meanwhile, p99: "
        f"{median('idle') * 1e3:.1f} ms"
    )
    record(
        Row(f"{what}: memory of a connection", "bytes", memory, 35 * 1024, True, 0, 0, "connection")
    )
