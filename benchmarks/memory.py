"""Bytes that one object adds to a process, in a fresh process each: the kernel's count of resident
memory, C's share included.

`python benchmarks/memory.py index|sandbox|stored [DRIVES]` prints the bytes of one. A fresh
process, for in a used one freed memory takes up what is new.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# what is measured is the pyblock beside this file, whatever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PAGE = os.sysconf("SC_PAGE_SIZE")
WARM, COUNT = 200, 4000


def per_object(what: str, drives: int = 4) -> float:
    """Bytes of one block index with 64 in use ("index"), of one sandbox with its drives
    ("sandbox"), or of one in a store ("stored")."""
    command = [sys.executable, __file__, what, str(drives)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * PAGE


def _grown(make: Callable[[int], object]) -> float:
    kept = [make(number) for number in range(WARM)]  # caches and arenas that come with the first
    gc.collect()
    before = _resident()
    kept += [make(number) for number in range(COUNT)]
    gc.collect()
    return (_resident() - before) / COUNT


def _index(_: int) -> object:
    import pyblock  # noqa: PLC0415 - only here

    index = pyblock.BlockIndex()
    index.acquire_many(64)
    return index


def _sandboxes(drives: int, *, stored: bool) -> float:
    """Each sandbox has images of its own; a tenth of the drives, at least one, is virtio-blk, the
    others virtio-scsi."""
    import pyblock  # noqa: PLC0415 - only here
    from pyblock.store.sqlite.store import SqliteStore  # noqa: PLC0415

    async def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            store = SqliteStore(f"{folder}/state.db") if stored else None
            names = [
                [f"{folder}/sandbox-{number}-disk-{drive}.img" for drive in range(drives)]
                for number in range(WARM + COUNT)
            ]
            for each in names:
                for name in each:
                    with Path(name).open("wb") as file:
                        file.truncate(1 << 20)

            async def one(number: int) -> object:
                sandbox = await pyblock.Sandbox(
                    f"sandbox-{number}", "memory:", store=store
                ).__aenter__()
                split = drives - drives // 10 - 1 if drives > 1 else drives
                await sandbox.attach_many(names[number][:split])
                for name in names[number][split:]:
                    await sandbox.attach(name, driver="virtio-blk")
                names[number] = []
                return sandbox

            kept = [await one(number) for number in range(WARM)]
            gc.collect()
            before = _resident()
            kept += [await one(number) for number in range(WARM, WARM + COUNT)]
            gc.collect()
            return (_resident() - before) / COUNT

    return asyncio.run(run())


if __name__ == "__main__":
    print(
        _grown(_index)
        if sys.argv[1] == "index"
        else _sandboxes(int(sys.argv[2]), stored=sys.argv[1] == "stored")
    )
