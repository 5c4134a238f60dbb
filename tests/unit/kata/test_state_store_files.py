"""A saved state is never written over a file of a store, nor read from one: to open and close a
database that this process uses drops the locks that SQLite has on it, and another process then
takes what was written last for nobody's."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.children import in_child
from support.snapshot import MakeImage, MakeStore
from support.store_scene import facts, make_scene, rows

from pyblock import InvalidState, Sandbox, StoreError
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio

FILES = ["state.db", "state.db-wal", "state.db-shm", "state.db-owners", "state.db-journal"]


def looked_at(path: Path) -> str:
    """What another process does that opens the database and closes it: if nobody seems to have it
    open, it ends the journal."""
    with closing(sqlite3.connect(path)) as db:
        return str(db.execute("SELECT count(*) FROM device").fetchone()[0])


@pytest.mark.parametrize("through", ["name", "link", "hard link"])
@pytest.mark.parametrize("name", FILES)
async def test_a_file_of_a_store_in_use(
    name: str, through: str, make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    store = make_store()
    scene = await make_scene(store, make_image)
    file = where = tmp_path / name
    if through == "link":
        where = tmp_path / "link"
        where.symlink_to(file)
    elif through == "hard link" and file.exists():
        where = tmp_path / "linked"
        os.link(file, where)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("state.db-[wo]*")}
    async with Sandbox("empty", MemoryHypervisor(), store=None) as empty:
        for doing in (scene.sandbox.save, empty.load):
            with pytest.raises(InvalidState, match="of a store"):
                await doing(where)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("state.db-[wo]*")} == before
    if through == "hard link":
        where.unlink(missing_ok=True)  # no store is opened under two names, not even again
    assert in_child(lambda: looked_at(store.path)) == (0, "2")
    await scene.sandbox.attach(scene.free[0])
    assert in_child(lambda: looked_at(store.path)) == (0, "3")
    await scene.sandbox.close()
    async with Sandbox("victim", scene.vm, store=make_store(store.path)) as again:
        assert facts(again) == facts(scene.sandbox)


@pytest.mark.parametrize("name", FILES)
async def test_a_file_of_a_store_that_nobody_has_open(
    name: str, make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    store = SqliteStore(tmp_path / "state.db")
    scene = await make_scene(store, make_image)
    await scene.sandbox.close()
    store.close()
    before = rows(store.path)
    async with Sandbox("other", MemoryHypervisor(), store=None) as sandbox:
        with pytest.raises(InvalidState):
            await sandbox.save(tmp_path / name)
        with pytest.raises(InvalidState):
            await sandbox.load(tmp_path / name)
    assert rows(store.path) == before
    assert not list(tmp_path.glob("*.new"))


async def test_an_error_of_the_disk_is_typed(tmp_path: Path) -> None:
    async with Sandbox("one", MemoryHypervisor(), store=None) as sandbox:
        with pytest.raises(StoreError, match="nowhere"):
            await sandbox.save(tmp_path / "nowhere" / "state.json")


async def test_a_name_that_cannot_be_one(tmp_path: Path) -> None:
    async with Sandbox("one", MemoryHypervisor(), store=None) as sandbox:
        for doing in (sandbox.save, sandbox.load):
            with pytest.raises(InvalidState):
                await doing(tmp_path / "a\0b")
