"""A sandbox with a past in a store, the operations that a fault can befall, and what must agree
when they are over."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from pyblock import (
    BlockDevice,
    Phase,
    Sandbox,
)
from pyblock.kata.schema import encode_device
from pyblock.kata.translate import device_to_state
from pyblock.life.recorded import device_of
from pyblock.life.registry import Device
from pyblock.store import record
from pyblock.store.base import Store
from pyblock.store.sqlite import file as sqlite_file
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor
from support.snapshot import MakeImage


def rows(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that a database holds. Through SQLite: to open and close the file otherwise would drop
    the locks that this process has on it."""
    with closing(sqlite3.connect(path)) as db:
        tables = [
            name
            for (name,) in db.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
            )
        ]
        return {table: db.execute(f"SELECT rowid, * FROM {table}").fetchall() for table in tables}


def first_version(path: Path, target: Path, boot: str = "") -> None:
    """Writes what a database holds as version 1 of it did."""
    with closing(sqlite3.connect(path)) as new, closing(sqlite3.connect(target)) as old:
        old.executescript(sqlite_file.MIGRATIONS[0])
        for table in ("sandbox", "device"):
            columns = ", ".join(name for _, name, *_ in old.execute(f"PRAGMA table_info({table})"))
            for row in new.execute(f"SELECT {columns} FROM {table} ORDER BY rowid"):
                old.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        for rowid, device_id, data in old.execute("SELECT rowid, id, state FROM device").fetchall():
            old.execute(
                "UPDATE device SET state = ? WHERE rowid = ?",
                (as_first_version(device_id, data), rowid),
            )
        old.execute(
            "UPDATE host SET boot = ?, owners = ?",
            (boot, *new.execute("SELECT owners FROM host").fetchone()),
        )
        old.execute(f"PRAGMA application_id = {sqlite_file.APPLICATION_ID}")
        old.execute("PRAGMA user_version = 1")
        old.commit()


def older_store(
    path: Path,
    version: int,
    devices: Mapping[str, Sequence[Sequence[Any]]],
    sandboxes: Mapping[str, bytes] | None = None,
) -> None:
    """Makes a database of a version before 5.

    :param devices: by sandbox: ID, row, and perhaps image and access of each.
    :param sandboxes: the sandboxes' own rows, where they have any.
    """
    with closing(sqlite3.connect(path)) as db:
        for script in sqlite_file.MIGRATIONS[:version]:
            db.executescript(script)
        for name, rows in devices.items():
            db.execute(
                "INSERT INTO sandbox (id, owner_text, state) VALUES (?, '', ?)",
                (name, (sandboxes or {}).get(name, b"")),
            )
            for device_id, row, *claim in rows:
                db.execute(
                    "INSERT INTO device VALUES (?, ?, ?, ?, ?)",
                    (name, device_id, row, *(claim or (None, None))),
                )
        db.execute(f"PRAGMA application_id = {sqlite_file.APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()
    path.chmod(0o600)


def as_first_version(device_id: str, data: bytes) -> bytes:
    """A row as the versions before 5 had it: what a saved file still says of the device. What is no
    record stays what it is."""
    if data == b"{}":
        return data
    return encode_device(device_to_state(record.decode(device_id, data, where="a row")))


async def agreed(store: SqliteStore, sandbox: Sandbox, vm: MemoryHypervisor) -> None:
    """The store, the sandbox and the machine hold the same devices, and each of them is claimed."""
    other = SqliteStore(store.path)
    try:
        kept = await as_written(other, sandbox.id)
    finally:
        other.close()
    assert facts(kept) == facts(sandbox)
    drives = {device.held.id for device in sandbox.devices if isinstance(device, BlockDevice)}
    assert vm.backends.keys() == vm.devices.keys() == drives
    assert len(sandbox.index) == len(drives)
    claimed = [
        row for row in rows(store.path)["device"] if row[1] == sandbox.id and row[4] is not None
    ]
    assert len(claimed) == len(drives)


class AsWritten(NamedTuple):
    """A sandbox's devices as a store has them, in no sandbox."""

    devices: list[Device]


async def as_written(store: Store, sandbox_id: str) -> AsWritten:
    return AsWritten([device_of(one) for one in (await store.read(sandbox_id)).records()])


def facts(sandbox: Sandbox | AsWritten) -> list[tuple[str, Phase, int, int]]:
    return [
        (one.id, one.phase, one.attach_count, one.held.index)
        for one in sandbox.devices
        if isinstance(one, BlockDevice)
    ]


class Scene(NamedTuple):
    """A sandbox with a device that is attached once and one that is attached twice, and two images
    that are not attached."""

    store: SqliteStore
    sandbox: Sandbox
    vm: MemoryHypervisor
    once: BlockDevice
    twice: BlockDevice
    free: list[Path]

    def images(self) -> dict[str, int]:
        """How often each image is attached."""
        return {
            Path(one.info.path).name: one.attach_count
            for one in self.sandbox.devices
            if isinstance(one, BlockDevice)
        }


BEFORE = {"once": 1, "twice": 2}


async def make_scene(store: SqliteStore, make_image: MakeImage) -> Scene:
    vm = MemoryHypervisor()
    sandbox = await Sandbox("victim", vm, store=store).__aenter__()
    once, twice = await sandbox.attach_many([make_image("once"), make_image("twice")])
    await sandbox.attach(twice.info.path)
    return Scene(store, sandbox, vm, once, twice, [make_image("free"), make_image("more")])


class Doing(NamedTuple):
    """An operation and how often each image is attached after it; whether it first writes to the
    VMM when it has written an intent."""

    run: Callable[[Scene, float], Awaitable[object]]
    after: dict[str, int]


OPERATIONS = {
    "attach": Doing(
        lambda at, timeout: at.sandbox.attach(at.free[0], timeout=timeout), BEFORE | {"free": 1}
    ),
    "attach many": Doing(
        lambda at, timeout: at.sandbox.attach_many(at.free, timeout=timeout),
        BEFORE | {"free": 1, "more": 1},
    ),
    "attach again": Doing(
        lambda at, timeout: at.sandbox.attach(at.once.info.path, timeout=timeout),
        {"once": 2, "twice": 2},
    ),
    "detach": Doing(lambda at, timeout: at.sandbox.detach(at.once, timeout=timeout), {"twice": 2}),
    "detach one of two": Doing(
        lambda at, timeout: at.sandbox.detach(at.twice, timeout=timeout), {"once": 1, "twice": 1}
    ),
    "detach many": Doing(
        lambda at, timeout: at.sandbox.detach_many([at.once, at.twice], timeout=timeout),
        {"twice": 1},
    ),
}
