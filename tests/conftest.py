"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import eager
from support.held_store import HeldStore
from support.shell import Shell
from support.snapshot import Busy, MakeImage, MakeStore

import pyblock
from pyblock import Sandbox
from pyblock import store as stores
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

# Programs that tests start use the pyblock that is tested, not what lies in their working folder:
# that of an unpacked sdist has no core.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(pyblock.__file__).parents[1]), os.environ.get("PYTHONPATH")])
)


@pytest.fixture
def anyio_backend() -> str | tuple[str, dict[str, Any]]:
    """Everything that waits is asyncio. With PYBLOCK_EAGER=1 its tasks begin at once."""
    return ("asyncio", {"loop_factory": eager.new_event_loop}) if eager.WANTED else "asyncio"


@pytest.fixture(autouse=True)
def state_dir(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Each test has a host's store of its own."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("PYBLOCK_STATE_DIR", str(folder))
    yield folder
    while stores._opened:
        stores._opened.popitem()[1].close()


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[MakeStore]:
    """Makes stores, in the test's folder or at a path; two of one path are as those of two
    processes."""
    made: list[SqliteStore] = []

    def make(path: Path | None = None) -> SqliteStore:
        made.append(SqliteStore(path or tmp_path / "state.db"))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """Makes sparse disk images of 1 MiB in the test's folder."""

    def make(name: str) -> Path:
        path = tmp_path / name
        with path.open("xb") as file:
            file.truncate(1 << 20)
        return path

    return make


@pytest.fixture
async def busy(make_image: MakeImage) -> AsyncIterator[Busy]:
    """A sandbox on a machine in memory with two disks in it, so that there is something that a
    refusal could spoil."""
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        scsi = await sandbox.attach(make_image("scsi.img"), device_id="scsi", serial="SCSI-1")
        blk = await sandbox.attach(make_image("blk.img"), device_id="blk", driver="virtio-blk")
        yield Busy(sandbox, vm, scsi, blk)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HeldStore]:
    """A store whose writes can be held back."""
    store = HeldStore(tmp_path / "state.db")
    yield store
    store.close()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """The command line, with a state folder and a machine of its own."""
    return Shell(tmp_path / "states")
