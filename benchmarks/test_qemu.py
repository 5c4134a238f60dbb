"""100 disks to a paused QEMU: pyblock, libvirt, and a bare socket with prepared bytes as the floor. A new QEMU for every round of each."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bare_qmp import BareQmp, encode, scsi_commands
from kit.fixtures import started
from kit.machine import Machine, find_qemu
from libvirt_rival import LibvirtMachine
from rows import Row

import pyblock
from pyblock.stores.sqlite import SqliteStore

DISKS = 100


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"{number}.img" for number in range(DISKS)]
    for path in made:
        with path.open("wb") as file:
            file.truncate(1 << 20)
    return made


def ours(paths: list[Path], *, at_once: bool) -> float:
    async def run(machine: Machine) -> float:
        store = SqliteStore(machine.folder / "state.db")
        async with pyblock.Sandbox("bench", f"qemu:{machine.qmp_path}", store=store) as sandbox:
            # The connection and the question for the machine's own disks belong to the first use, not to the attach of a disk.
            await sandbox.detach(await sandbox.attach(machine.image("first", 1 << 20)))
            start = time.perf_counter()
            if at_once:
                await sandbox.attach_many(paths)
            else:
                for path in paths:
                    await sandbox.attach(path)
            return time.perf_counter() - start

    with started(guest=False) as machine:
        return asyncio.run(run(machine))


def floor(paths: list[Path], *, at_once: bool) -> float:
    lines = encode(scsi_commands(paths))
    with started(guest=False) as machine:
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


def test_100_disks(paths: list[Path], short: bool, record: Callable[[Row], None], note: Callable[[str], None]) -> None:
    times: dict[str, list[float]] = {name: [] for name in ("single", "many", "floor single", "floor many", "libvirt")}
    without_libvirt = ""
    for _ in range(2 if short else 5):
        times["single"].append(ours(paths, at_once=False))
        times["many"].append(ours(paths, at_once=True))
        times["floor single"].append(floor(paths, at_once=False))
        times["floor many"].append(floor(paths, at_once=True))
        if not without_libvirt:
            try:
                times["libvirt"].append(libvirt(paths))
            except Exception as error:  # whatever it lacks here: it is said, and the other rows stand
                without_libvirt = f"{type(error).__name__}: {error}"
    median = {name: statistics.median(spent) for name, spent in times.items() if spent}

    def row(what: str, mine: str, rival: str, target: float | None) -> None:
        if rival in median:
            ours_ns, rival_ns = median[mine] * 1e9 / DISKS, median[rival] * 1e9 / DISKS
            record(Row(what, rival, median[mine] / median[rival], target, True, ours_ns, rival_ns, "disk", slack=2))

    row("100 disks to a paused QEMU, one by one", "single", "libvirt", 0.5)
    row("100 disks to a paused QEMU, in one call", "many", "libvirt", 0.3)
    row("100 disks to a paused QEMU, in one call", "many", "floor many", 1.25)
    row("100 disks to a paused QEMU, one by one", "single", "floor single", None)
    if without_libvirt:
        note(f"SKIPPED: no row against libvirt ({without_libvirt}); scripts/setup bench installs what it needs")
