"""The database's file: one that is no store is left as it is, an older one is brought to this
version, an earlier boot's is cleared."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.children import in_child
from support.snapshot import MakeImage, MakeStore
from support.store_scene import agreed, facts, make_scene, rows
from support.turns import LATE

from pyblock import (
    InvalidState,
    NewerState,
    PyblockError,
    Sandbox,
)
from pyblock.store.sqlite import file as sqlite_file
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio


def foreign(path: Path, *, application: int = 0, version: int = 0) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA journal_mode = {'WAL' if application == OURS else 'DELETE'}")
        db.execute("CREATE TABLE theirs (one, two)")
        db.execute("INSERT INTO theirs VALUES (1, 2)")
        db.execute(f"PRAGMA application_id = {application}")
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()


def changed(pragma: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as db:
            db.execute(pragma)

    return change


def overwritten(start: int, length: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\xa5" * length)

    return spoil


def new(write: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        write(path)

    return replace


NEWER, OURS = len(sqlite_file.MIGRATIONS) + 1, sqlite_file.APPLICATION_ID
SPOILS: dict[str, tuple[Callable[[Path], None], type[PyblockError], str]] = {
    "text": (
        new(lambda path: path.write_text("not a store\n" * 1000)),
        InvalidState,
        "not a database",
    ),
    "short text": (new(lambda path: path.write_text("xy")), InvalidState, "not a database"),
    "random bytes": (
        new(lambda path: path.write_bytes(random.Random(7).randbytes(20000))),
        InvalidState,
        "not a database",
    ),
    "zeros": (new(lambda path: path.write_bytes(bytes(8192))), InvalidState, "not a database"),
    "something else's": (new(foreign), InvalidState, "something else"),
    "something else's, with a version": (
        new(lambda path: foreign(path, version=NEWER)),
        InvalidState,
        "something else",
    ),
    "something else's, with its name": (
        new(lambda path: foreign(path, application=77)),
        InvalidState,
        "something else",
    ),
    "ours by name only": (
        new(lambda path: foreign(path, application=OURS, version=1)),
        InvalidState,
        "no such table",
    ),
    "not ours by name": (changed("PRAGMA application_id = 77"), InvalidState, "something else"),
    "newer": (changed(f"PRAGMA user_version = {NEWER}"), NewerState, f"version {NEWER}"),
    "much newer": (changed("PRAGMA user_version = 2000000000"), NewerState, "version 2000000000"),
    "a page overwritten": (overwritten(5 * 4096, 4096), InvalidState, "damaged"),
    "the first page overwritten": (overwritten(100, 3000), InvalidState, "damaged"),
}
# The middle of each page, its edges, and the edges of what is in the header. An empty file, or one
# of one byte, which SQLite takes for empty, is a store that was not made yet.
PAGE, PAGES = 4096, 12
CUTS = sorted(
    {2, 15, 16, 17, 28, 99, 100, 101, 511, 512, 513}
    | {page * PAGE + more for page in range(PAGES) for more in (-1, 0, 1, 100, 2000)}
)
SPOILS |= {
    f"cut to {length}": (
        lambda path, length=length: os.truncate(path, length),  # type: ignore[misc]
        InvalidState,
        "not a store|damaged|cut off",
    )
    for length in CUTS
    if length > 1
}


@pytest.mark.parametrize("what", SPOILS)
async def test_what_is_no_store_is_left_as_it_is(
    what: str, make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, kind, text = SPOILS[what]
    monkeypatch.setattr(sqlite_file, "PATIENCE", LATE)
    store = make_store()
    scene = await make_scene(store, make_image)
    known = facts(scene.sandbox)
    await scene.sandbox.close()
    store.close()
    good = store.path.read_bytes()
    assert len(good) == PAGE * PAGES
    spoil(store.path)
    bad, files = store.path.read_bytes(), sorted(store.path.parent.iterdir())
    journal = list(scene.vm.journal)
    for sandbox_id in ("victim", "new"):
        sandbox = Sandbox(sandbox_id, scene.vm, store=store)
        with pytest.raises(kind, match=text) as caught:
            await sandbox.__aenter__()
        assert type(caught.value) is kind and str(store.path) in str(caught.value)
        assert not sandbox.devices and not len(sandbox.index) and scene.vm.journal == journal
    with pytest.raises(kind):
        await store.sandboxes()
    store.close()
    assert store.path.read_bytes() == bad and sorted(store.path.parent.iterdir()) == files
    store.path.write_bytes(good)
    async with Sandbox("victim", scene.vm, store=store) as again:
        assert facts(again) == known and scene.vm.journal == journal
        await again.attach(scene.free[0])
        await agreed(store, again, scene.vm)


def test_the_files_are_private(tmp_path: Path) -> None:
    def make() -> str:
        os.umask(0)
        store = SqliteStore(tmp_path / "state.db")
        asyncio.run(store.open_sandbox("s1", ""))
        return " ".join(
            f"{path.name}:{stat.S_IMODE(path.stat().st_mode):o}"
            for path in sorted(tmp_path.iterdir())
        )

    assert in_child(make) == (
        0,
        "state.db:600 state.db-owners:600 state.db-shm:600 state.db-wal:600",
    )


MORE = "CREATE TABLE more (device TEXT); INSERT INTO more SELECT id FROM device;"


async def test_an_older_version_is_brought_to_this_one(
    make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    scene = await make_scene(store, make_image)
    known = facts(scene.sandbox)
    await scene.sandbox.close()
    store.close()
    old, released = rows(store.path), len(sqlite_file.MIGRATIONS)
    monkeypatch.setattr(
        sqlite_file,
        "MIGRATIONS",
        (*sqlite_file.MIGRATIONS, MORE + "INSERT INTO nowhere VALUES (1);"),
    )
    with pytest.raises(InvalidState, match="nowhere"):
        await store.sandboxes()
    assert rows(store.path) == old and version(store.path) == released
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", (*sqlite_file.MIGRATIONS[:-1], MORE))
    async with Sandbox("victim", scene.vm, store=store) as again:
        assert facts(again) == known and not again.recovered
        await agreed(store, again, scene.vm)
    store.close()
    assert version(store.path) == released + 1
    assert {device for _, device in rows(store.path)["more"]} == {device for device, *_ in known}
    monkeypatch.undo()
    with pytest.raises(NewerState):
        await store.sandboxes()


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        [number] = db.execute("PRAGMA user_version").fetchone()
        return int(number)


@pytest.mark.parametrize("made", [True, False], ids=["older", "absent"])
def test_killed_at_each_statement_of_the_making(
    made: bool, tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one finds the old version or the new one, and goes on from there."""
    path = tmp_path / "state.db"
    known = []

    async def begin() -> None:
        scene = await make_scene(SqliteStore(path), make_image)
        known.extend(facts(scene.sandbox))
        await scene.sandbox.close()
        scene.store.close()

    if made:
        asyncio.run(begin())
        monkeypatch.setattr(sqlite_file, "MIGRATIONS", (*sqlite_file.MIGRATIONS, MORE))
    target = len(sqlite_file.MIGRATIONS)
    start = target - 1 if made else 0
    old = path.read_bytes() if made else b""

    def open_it(last: int) -> str:
        connect, reached = sqlite3.connect, 0

        def step(_: str) -> None:
            nonlocal reached
            if reached == last:
                os.kill(os.getpid(), signal.SIGKILL)
            reached += 1

        def watched(*arguments: Any, **more: Any) -> sqlite3.Connection:
            db: sqlite3.Connection = connect(*arguments, **more)
            db.set_trace_callback(step)
            return db

        sqlite3.connect = watched  # type: ignore[assignment]
        return " ".join(asyncio.run(SqliteStore(path).sandboxes()))

    async def after() -> None:
        assert version(path) in (start, target)
        store = SqliteStore(path)
        sandbox = Sandbox("victim", MemoryHypervisor(), store=store, recover=False)
        async with sandbox:
            assert facts(sandbox) == known
        store.close()
        assert version(path) == target

    kills = 0
    while True:
        path.write_bytes(old)
        status, text = in_child(lambda: open_it(kills))  # noqa: B023 - called at once
        if status == 0:
            assert text == ("victim" if made else "")
            break
        assert status == -signal.SIGKILL, text
        kills += 1
        asyncio.run(after())
        for extra in ("-wal", "-shm"):
            path.with_name(path.name + extra).unlink(missing_ok=True)
    assert kills > 8
