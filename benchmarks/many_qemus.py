"""Many QEMUs in one process, all busy: how long that takes, how long the event loop keeps others
waiting meanwhile, and what one connection adds to the process's memory.

`python benchmarks/many_qemus.py FOLDER SOCKET…` is given paused QEMUs without disks, and prints one
line of JSON. A process of its own, for in a used one freed memory takes up what is new.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# what is measured is the pyblock beside this file, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PAGE = os.sysconf("SC_PAGE_SIZE")
WARM = 8  # connections that pay for what comes with the first ones
DISKS = 20  # for each
LOOK = 0.002  # seconds between two looks at the event loop's clock


def make_images(folder: Path, count: int) -> list[Path]:
    paths = [folder / str(number) for number in range(count)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(1 << 20)
    return paths


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


async def _lags(until: asyncio.Event, lags: list[float]) -> None:
    """Adds by how much each of many short sleeps was late."""
    while not until.is_set():
        due = time.perf_counter() + LOOK
        await asyncio.sleep(LOOK)
        lags.append(time.perf_counter() - due)


async def idle() -> None:
    """Prints by how much the sleeps of a loop that does nothing else were late, until its standard
    input ends: what the machine alone makes of them."""
    over, lags = asyncio.Event(), list[float]()
    asyncio.get_running_loop().add_reader(sys.stdin, over.set)
    await _lags(over, lags)
    print(_last_percent(lags))


def _last_percent(lags: Sequence[float]) -> float:
    return statistics.quantiles(lags, n=100)[-1]


async def measure(folder: Path, sockets: Sequence[str]) -> dict[str, float]:
    import pyblock  # noqa: PLC0415 - the one beside this file
    from pyblock.store.sqlite.store import SqliteStore  # noqa: PLC0415

    store = SqliteStore(folder / "state.db")
    images = make_images(folder, len(sockets) * DISKS)
    sandboxes = [
        pyblock.Sandbox(f"bench-{number}", f"qemu:{path}", store=store)
        for number, path in enumerate(sockets)
    ]
    for sandbox in sandboxes:
        await sandbox.__aenter__()

    async def connect(number: int) -> None:
        await sandboxes[number].detach(await sandboxes[number].attach(images[number * DISKS]))

    async def fill(number: int) -> None:
        for image in images[number * DISKS : (number + 1) * DISKS]:
            await sandboxes[number].attach(image)

    for number in range(WARM):
        await connect(number)
    before = _resident()
    await asyncio.gather(*map(connect, range(WARM, len(sandboxes))))
    memory = (_resident() - before) / (len(sandboxes) - WARM)
    over, lags = asyncio.Event(), list[float]()
    beside = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    looking = asyncio.create_task(_lags(over, lags))
    start = time.perf_counter()
    await asyncio.gather(*map(fill, range(len(sandboxes))))
    spent = time.perf_counter() - start
    over.set()
    await looking
    idle, _ = beside.communicate()
    for sandbox in sandboxes:
        await sandbox.__aexit__(None, None, None)
    store.close()
    return {"seconds": spent, "lag": _last_percent(lags), "idle": float(idle), "memory": memory}


def main(arguments: list[str]) -> Any:
    return asyncio.run(measure(Path(arguments[0]), arguments[1:]))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(main(sys.argv[1:])))
    else:
        asyncio.run(idle())
