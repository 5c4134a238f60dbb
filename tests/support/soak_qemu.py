"""Soak on a real QEMU: memory over thousands of attaches and detaches in one process, and under a
flood of events.

    PYTHONPATH=tests python -m support.soak_qemu --pairs 5000 --events 1000000

Resident memory is what the host pays, and what is printed; the short form counts what Python itself
holds (tracemalloc), which nothing else on the machine changes. Exit status 1 when it grows.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

from kit import KitMissing, Machine
from kit.flood import Flood

from pyblock import AttachPending, DetachPending, PyblockError, Sandbox, TransportError
from pyblock.store.sqlite.store import SqliteStore

AT_ONCE = 20  # pairs; QEMU takes as long to let go of one disk as of many
# of all pairs: what the allocator and the caches take by then is what they are to need
WARM_UP = 0.2
PAIR_MAX = 200  # bytes that a pair may leave behind; an event that is kept for ever is 1,700
SLACK = 1 << 20  # bytes of resident memory that may come beside it
FLOOD_MAX = 64 << 20  # bytes that a flood may take at most
TIMEOUT = 60.0  # seconds


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most that it had, since `forget_peak`."""
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def traced() -> int:
    """Bytes that Python objects hold."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def pairs(
    machine: Machine, count: int, measure: Callable[[], int], say: Callable[[str], None]
) -> float:
    """Attaches and detaches so many times in one sandbox; returns the bytes that a pair after the
    warm-up left behind."""
    store = SqliteStore(machine.folder / "soak.db")
    images = [machine.image(f"soak-{number}.img") for number in range(AT_ONCE)]
    done = warm = begin = 0
    began = time.monotonic()

    async def pair(image: Path) -> None:
        await sandbox.detach(await sandbox.attach(image, timeout=TIMEOUT), timeout=TIMEOUT)

    async with Sandbox("soak", f"qemu:{machine.qmp_path}", store=store) as sandbox:
        while done < count:
            await asyncio.gather(*map(pair, images))
            before, done = done, done + len(images)
            if not begin and done >= count * WARM_UP:
                warm, begin = measure(), done
            if before * 10 // count < done * 10 // count:
                say(
                    f"{time.monotonic() - began:7.1f} s  {done:>6,} pairs, resident "
                    f"{resident() / 2**20:.2f} MiB"
                )
        grown = measure() - warm
        assert not sandbox.devices and not len(sandbox.index)
    store.close()
    return grown / (done - begin)


async def flood(machine: Machine, events: int, say: Callable[[str], None]) -> int:
    """An attach that is flooded ends, typed, and the next goes as ever; returns the bytes that the
    process grew by at most."""
    path = machine.folder / "flood"
    images = [machine.image(f"flood-{number}.img") for number in range(2)]
    with Flood(path, machine.qmp_path, events):
        async with Sandbox("flood", f"qemu:{path}", store=None) as sandbox:
            before = resident()
            forget_peak()
            began = time.monotonic()
            try:
                await sandbox.attach(images[0], timeout=600)
                ended = "it succeeded"
            except PyblockError as error:
                ended = f"{type(error).__name__}: {error}"
            grown = peak() - before
            say(
                f"{events:,} events in {time.monotonic() - began:.1f} s during one attach: "
                f"{ended}; {grown / 2**20:.1f} MiB more at most"
            )
            await works_again(sandbox, images[1])
            say(
                f"after it the sandbox works as before, with {len(sandbox.devices)} devices; "
                f"{(resident() - before) / 2**20:.1f} MiB more"
            )
    return grown


async def works_again(sandbox: Sandbox, image: Path) -> None:
    """Returns when an image came and went. The flood may have cost the connection once more: then
    what was cut off is called again."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                device = await sandbox.attach(image, timeout=TIMEOUT)
                break
            except (TransportError, AttachPending, DetachPending):
                await asyncio.sleep(0.1)
        while True:
            try:
                return await sandbox.detach(device, timeout=TIMEOUT)
            except (TransportError, DetachPending):
                await asyncio.sleep(0.1)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--events", type=int, default=1_000_000)
    given = parser.parse_args(arguments)
    try:
        machine = Machine(guest=False)
    except KitMissing as missing:
        say(f"no soak here: {missing}")
        return 2
    good = True
    with machine:
        a_pair = asyncio.run(pairs(machine, given.pairs, resident, say))
        allowed = PAIR_MAX + SLACK / (given.pairs * (1 - WARM_UP))
        say(f"a pair leaves {a_pair:.0f} bytes behind; allowed are {allowed:.0f}")
        good &= a_pair <= allowed
        grown = asyncio.run(flood(machine, given.events, say))
        good &= grown <= FLOOD_MAX
    say(
        "memory stays"
        if good
        else f"VIOLATION: memory grows ({PAIR_MAX} bytes a pair and {FLOOD_MAX >> 20} MiB for a "
        "flood are allowed)"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
