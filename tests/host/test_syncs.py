"""No thread that may be an event loop's waits for the disk: the store has to survive its processes,
not its host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WATCH = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

static void note(const char *what) {
    if (gettid() == getpid()) dprintf(2, "%s in the main thread\\n", what);
}
int fsync(int file) { note("fsync"); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file); }
int fdatasync(int file) { note("fdatasync"); return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(file); }
"""  # noqa: E501
BUSY = """
import asyncio, os, sys
from pathlib import Path
from pyblock.store.base import Row
from pyblock.store.sqlite.store import SqliteStore

async def work():
    store = SqliteStore(sys.argv[1])
    await store.open_sandbox("one", "")
    most = 0
    for number in range(3000):
        await store.write("one", lambda: [Row(f"device{number % 50}", os.urandom(700))])
        most = max(most, Path(sys.argv[1] + "-wal").stat().st_size)
    await store.close_sandbox("one")
    store.close()
    print(most)

if len(sys.argv) > 2:
    os.fsync(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600))
asyncio.run(work())
"""


@pytest.fixture
def watch(tmp_path: Path) -> Path:
    """A library that says when the main thread waits for a disk."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "watch.c", tmp_path / "watch.so"
    source.write_text(WATCH)
    subprocess.run(
        [compiler, "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True
    )
    return library


def busy(path: Path, watch: Path, *more: str) -> tuple[int, str]:
    """How large the journal became, and what the watch said."""
    environment = os.environ | {
        "LD_PRELOAD": f"{watch}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    }
    command = [sys.executable, "-c", BUSY, str(path), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout), done.stderr


def test_nothing_is_waited_for(tmp_path: Path, watch: Path) -> None:
    """Through many checkpoints, and the closing of the last connection; and the journal does not
    grow for it."""
    journal, said = busy(tmp_path / "state.db", watch)
    assert said == ""
    assert 100_000 < journal < 4_000_000
    # the watch sees what there is to see
    assert "fsync in the main thread" in busy(tmp_path / "other.db", watch, "and wait")[1]
