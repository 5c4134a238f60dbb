"""Faults on the store: a disk that is full or read-only, a file that is no store, a lock that another process keeps, a write that fails.

An operation that meets one raises its typed error and changes nothing, neither here nor in the VMM nor in the file; when the fault is gone
it succeeds. What the VMM has done already is undone, or written later.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from children import NOBODY, in_child
from snapshot import MakeImage, MakeStore, machine, refused, snapshot

from pyblock import (
    BlockDevice,
    ImageInUse,
    InvalidState,
    NewerState,
    Phase,
    PyblockError,
    Sandbox,
    SandboxBusy,
    StoreBusy,
    StoreError,
)
from pyblock.hypervisors.memory import MemoryHypervisor
from pyblock.stores import sqlite_file
from pyblock.stores.base import Row
from pyblock.stores.sqlite import SqliteStore

pytestmark = pytest.mark.anyio

SOON = 0.05  # seconds: a deadline meant to pass
LATE = 30.0  # seconds: one that is not


async def settle(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LATE):
        while not condition():
            await asyncio.sleep(0.001)


def rows(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that a database holds. Through SQLite: to open and close the file otherwise would drop the locks that this process has on it."""
    with closing(sqlite3.connect(path)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        return {table: db.execute(f"SELECT rowid, * FROM {table}").fetchall() for table in tables}


async def agreed(store: SqliteStore, sandbox: Sandbox, vm: MemoryHypervisor) -> None:
    """The store, the sandbox and the machine hold the same devices, and each of them is claimed."""
    other = SqliteStore(store.path)
    try:
        kept = await Sandbox.stored(other, sandbox.id)
    finally:
        other.close()
    assert facts(kept) == facts(sandbox)
    drives = {device.held.id for device in sandbox.devices if isinstance(device, BlockDevice)}
    assert vm.backends.keys() == vm.devices.keys() == drives
    assert len(sandbox.index) == len(drives)
    claimed = [row for row in rows(store.path)["device"] if row[1] == sandbox.id and row[4] is not None]
    assert len(claimed) == len(drives)


def facts(sandbox: Sandbox) -> list[tuple[str, Phase, int, int]]:
    return [(one.id, one.phase, one.attach_count, one.held.index) for one in sandbox.devices if isinstance(one, BlockDevice)]


class Scene(NamedTuple):
    """A sandbox with a device that is attached once and one that is attached twice, and two images that are not attached."""

    store: SqliteStore
    sandbox: Sandbox
    vm: MemoryHypervisor
    once: BlockDevice
    twice: BlockDevice
    free: list[Path]

    def images(self) -> dict[str, int]:
        """How often each image is attached."""
        return {Path(one.info.path).name: one.attach_count for one in self.sandbox.devices if isinstance(one, BlockDevice)}


BEFORE = {"once": 1, "twice": 2}


async def make_scene(store: SqliteStore, make_image: MakeImage) -> Scene:
    vm = MemoryHypervisor()
    sandbox = await Sandbox("victim", vm, store=store).__aenter__()
    once, twice = await sandbox.attach_many([make_image("once"), make_image("twice")])
    await sandbox.attach(twice.info.path)
    return Scene(store, sandbox, vm, once, twice, [make_image("free"), make_image("more")])


class Doing(NamedTuple):
    """An operation and how often each image is attached after it; whether it first writes to the VMM when it has written an intent."""

    run: Callable[[Scene, float], Awaitable[object]]
    after: dict[str, int]


OPERATIONS = {
    "attach": Doing(lambda at, timeout: at.sandbox.attach(at.free[0], timeout=timeout), BEFORE | {"free": 1}),
    "attach many": Doing(lambda at, timeout: at.sandbox.attach_many(at.free, timeout=timeout), BEFORE | {"free": 1, "more": 1}),
    "attach again": Doing(lambda at, timeout: at.sandbox.attach(at.once.info.path, timeout=timeout), {"once": 2, "twice": 2}),
    "detach": Doing(lambda at, timeout: at.sandbox.detach(at.once, timeout=timeout), {"twice": 2}),
    "detach one of two": Doing(lambda at, timeout: at.sandbox.detach(at.twice, timeout=timeout), {"once": 1, "twice": 1}),
    "detach many": Doing(lambda at, timeout: at.sandbox.detach_many([at.once, at.twice], timeout=timeout), {"twice": 1}),
}


# Faults outside of this process.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system to fill")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system to fill cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazily: a test that failed may have left the store open.
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def full(store: SqliteStore) -> Iterator[None]:
    """The store's disk takes no more."""
    ballast = store.path.with_name("ballast")
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(store: SqliteStore) -> Iterator[None]:
    """The store's disk was made read-only, and the store has to be opened again."""
    store.close()
    before = store.path.read_bytes() if store.path.exists() else None
    subprocess.run(["mount", "-o", "remount,ro", store.path.parent], check=True)
    try:
        yield
    finally:
        store.close()
        assert (store.path.read_bytes() if store.path.exists() else None) == before
        subprocess.run(["mount", "-o", "remount,rw", store.path.parent], check=True)


HOLDER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN " + sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(store: SqliteStore, begin: str = "IMMEDIATE") -> Iterator[None]:
    """Another process holds the store's lock."""
    # Not a forked one: it would share SQLite's idea of the locks that this process has.
    command = [sys.executable, "-c", HOLDER, str(store.path), begin]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield
            assert process.poll() is None
        finally:
            process.stdin.close()


class Fault(NamedTuple):
    befall: Callable[[SqliteStore], AbstractContextManager[None]]
    kind: type[PyblockError]
    timeout: float  # seconds that an operation is given under it


FAULTS = {
    "full disk": Fault(full, StoreError, LATE),
    "read-only disk": Fault(read_only, StoreError, LATE),
    "lock held": Fault(locked, StoreBusy, SOON),
    "lock held exclusively": Fault(lambda store: locked(store, "EXCLUSIVE"), StoreBusy, SOON),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> Fault:
    return FAULTS[request.param]


@pytest.fixture
async def scene(disk: Path, make_store: MakeStore, make_image: MakeImage) -> AsyncIterator[Scene]:
    scene = await make_scene(make_store(disk / "state.db"), make_image)
    yield scene
    await scene.sandbox.close()


@pytest.mark.parametrize("what", [name for name, fault in FAULTS.items() if fault.befall is not read_only])  # that one needs it closed
@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_operation_under_a_fault_changes_nothing_and_succeeds_later(name: str, what: str, scene: Scene) -> None:
    doing, fault = OPERATIONS[name], FAULTS[what]
    before = rows(scene.store.path)
    with fault.befall(scene.store):
        if "many" in name:  # a batch has the others' errors in its notes
            held = snapshot(scene.sandbox), machine(scene.vm)
            with pytest.raises(fault.kind) as caught:
                await doing.run(scene, fault.timeout)
            assert type(caught.value) is fault.kind
            assert (snapshot(scene.sandbox), machine(scene.vm)) == held
        else:
            with refused(scene.sandbox, scene.vm, fault.kind, str(scene.store.path)):
                await doing.run(scene, fault.timeout)
    assert rows(scene.store.path) == before
    assert scene.images() == BEFORE
    await doing.run(scene, LATE)
    assert scene.images() == doing.after
    await agreed(scene.store, scene.sandbox, scene.vm)


async def test_a_lock_that_is_let_go_in_time_is_waited_for(scene: Scene) -> None:
    with locked(scene.store):
        task = asyncio.create_task(scene.sandbox.attach(scene.free[0], timeout=LATE))
        turn = asyncio.create_task(asyncio.sleep(SOON))
        await turn  # others have their turns while it waits
        assert not task.done() and len(scene.vm.devices) == 2
    await task
    await agreed(scene.store, scene.sandbox, scene.vm)


@pytest.mark.parametrize("there", [True, False], ids=["known sandbox", "new sandbox"])
async def test_opening_a_sandbox_under_a_fault(
    there: bool, fault: Fault, disk: Path, make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "PATIENCE", fault.timeout)
    vm = MemoryHypervisor()
    store = make_store(disk / "state.db")
    image = make_image("a")
    async with Sandbox("s1" if there else "s2", vm, store=store) as sandbox:
        await sandbox.attach(image)
    before = rows(store.path)
    journal = list(vm.journal)
    store.close()
    again = Sandbox("s1", vm, store=make_store(store.path))
    with fault.befall(store):
        with refused(again, vm, fault.kind, str(store.path)):
            await again.__aenter__()
        with pytest.raises(PyblockError, match="not open"):
            await again.attach(image)
    assert rows(store.path) == before and vm.journal == journal
    monkeypatch.setattr(sqlite_file, "PATIENCE", LATE)
    async with again:
        assert len(again.devices) == there
        await again.attach(image, share=False) if there else None
        assert vm.journal == journal


@pytest.mark.parametrize("name", ["full disk", "read-only disk"])
async def test_a_store_that_cannot_be_made_is_made_later(name: str, disk: Path, make_store: MakeStore, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    store = make_store(disk / "state.db")
    sandbox = Sandbox("s1", vm, store=store)
    with FAULTS[name].befall(store), refused(sandbox, vm, StoreError, str(store.path)):
        await sandbox.__aenter__()
    async with sandbox:
        await sandbox.attach(make_image("a"))
        await agreed(store, sandbox, vm)


async def test_closing_a_sandbox_under_a_fault(fault: Fault, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed all the same, and nothing is lost: the devices stay in the machine and in the store."""
    monkeypatch.setattr("pyblock.receiver.GRACE", SOON)
    monkeypatch.setattr(sqlite_file, "PATIENCE", LATE)
    before, journal = rows(scene.store.path), list(scene.vm.journal)
    with fault.befall(scene.store):
        await scene.sandbox.close()
    assert rows(scene.store.path) == before and scene.vm.journal == journal
    async with Sandbox("victim", scene.vm, store=scene.store) as again:
        assert facts(again) == facts(scene.sandbox) and not again.recovered
        await agreed(scene.store, again, scene.vm)


def test_a_folder_that_may_not_be_written() -> None:
    uid = NOBODY if os.geteuid() == 0 else None

    async def attempt(folder: Path) -> str:
        vm = MemoryHypervisor()
        store = SqliteStore(folder / "state.db")
        try:
            async with Sandbox("s1", vm, store=store) as sandbox:
                await sandbox.attach(folder / "image")
        except StoreError as error:
            assert type(error) is StoreError and str(folder / "state.db") in str(error) and not vm.journal
            return "refused"
        finally:
            store.close()
        return "done"

    base = Path(tempfile.mkdtemp())  # pytest's own folders are not to be entered by others
    try:
        base.chmod(0o755)
        (base / "image").write_bytes(bytes(4096))
        (base / "image").chmod(0o666)
        base.chmod(0o555)
        assert in_child(lambda: asyncio.run(attempt(base)), uid=uid) == (0, "refused")
        assert [path.name for path in base.iterdir()] == ["image"]
        base.chmod(0o777)
        assert in_child(lambda: asyncio.run(attempt(base)), uid=uid) == (0, "done")
        base.chmod(0o555)
        before = (base / "state.db").read_bytes()
        assert in_child(lambda: asyncio.run(attempt(base)), uid=uid) == (0, "refused")
        assert (base / "state.db").read_bytes() == before
    finally:
        base.chmod(0o777)
        shutil.rmtree(base)


# A file that is no store.


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
    "text": (new(lambda path: path.write_text("not a store\n" * 1000)), InvalidState, "not a database"),
    "short text": (new(lambda path: path.write_text("xy")), InvalidState, "not a database"),
    "random bytes": (new(lambda path: path.write_bytes(random.Random(7).randbytes(20000))), InvalidState, "not a database"),
    "zeros": (new(lambda path: path.write_bytes(bytes(8192))), InvalidState, "not a database"),
    "something else's": (new(foreign), InvalidState, "something else"),
    "something else's, with a version": (new(lambda path: foreign(path, version=NEWER)), InvalidState, "something else"),
    "something else's, with its name": (new(lambda path: foreign(path, application=77)), InvalidState, "something else"),
    "ours by name only": (new(lambda path: foreign(path, application=OURS, version=1)), InvalidState, "no such table"),
    "not ours by name": (changed("PRAGMA application_id = 77"), InvalidState, "something else"),
    "newer": (changed(f"PRAGMA user_version = {NEWER}"), NewerState, f"version {NEWER}"),
    "much newer": (changed("PRAGMA user_version = 2000000000"), NewerState, "version 2000000000"),
    "a page overwritten": (overwritten(5 * 4096, 4096), InvalidState, "damaged"),
    "the first page overwritten": (overwritten(100, 3000), InvalidState, "damaged"),
}
# The middle of each page, its edges, and the edges of what is in the header. An empty file, or one of one byte, which SQLite takes for
# empty, is a store that was not made yet.
PAGE, PAGES = 4096, 8
CUTS = sorted(
    {2, 15, 16, 17, 28, 99, 100, 101, 511, 512, 513} | {page * PAGE + more for page in range(PAGES) for more in (-1, 0, 1, 100, 2000)}
)
SPOILS |= {
    f"cut to {length}": (lambda path, length=length: os.truncate(path, length), InvalidState, "not a store|damaged|cut off")  # type: ignore[misc]
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


# A write that fails, wherever it comes.


class Failing(SqliteStore):
    """A store whose writes fail from the one that is told on.

    :ivar count: writes so far.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.count = 0
        self._bad: range = range(0)
        self._error: type[PyblockError] = StoreError

    def fail(self, error: type[PyblockError], first: int, *, times: int = 2**31) -> None:
        """Has the `first` write from now, counted from 0, and so many in all, raise an error."""
        self.count = 0
        self._bad, self._error = range(first, first + times), error

    async def write(
        self,
        sandbox_id: str,
        rows: Callable[[], Sequence[Row]],
        deadline: float | None = None,
        *,
        state: bytes | None = None,
        all_or_none: bool = False,
    ) -> dict[str, ImageInUse]:
        self.count += 1
        if self.count - 1 in self._bad:
            raise self._error(f"store {str(self.path)!r}: told to fail")
        return await super().write(sandbox_id, rows, deadline, state=state, all_or_none=all_or_none)


async def writes_of(name: str, path: Path, make_image: MakeImage) -> int:
    """How many writes an operation makes."""
    store = Failing(path)
    scene = await make_scene(store, make_image)
    store.fail(StoreError, 0, times=0)
    await OPERATIONS[name].run(scene, LATE)
    count = store.count
    await scene.sandbox.close()
    store.close()
    for image in (*scene.images(), "free", "more", "once"):
        path.with_name(image).unlink(missing_ok=True)
    return count


@pytest.mark.parametrize("error", [StoreError, StoreBusy])
@pytest.mark.parametrize("times", [1, 2**31], ids=["once", "from then on"])
@pytest.mark.parametrize("name", OPERATIONS)
async def test_each_write_of_an_operation_fails(
    name: str, times: int, error: type[PyblockError], tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the process dies, or it goes on: the store and the machine agree again in either case."""
    monkeypatch.setattr("pyblock.ledger.RETRY", 2 * LATE)  # the next operation writes what is left over
    doing = OPERATIONS[name]
    count = await writes_of(name, tmp_path / "count.db", make_image)
    assert count >= (1 if name in ("attach again", "detach one of two") else 2)
    for number, dies in itertools.product(range(count), (True, False)):
        where = f"{name}, write {number + 1} of {count}, {'death' if dies else 'life'}"
        folder = tmp_path / f"{number}-{dies}"
        folder.mkdir()

        def image(name: str, folder: Path = folder) -> Path:
            (folder / name).write_bytes(bytes(4096))
            return folder / name

        store = Failing(folder / "state.db")
        scene = await make_scene(store, image)
        kept = list(scene.vm.journal)
        store.fail(error, number, times=times)
        try:
            await doing.run(scene, LATE)
        except PyblockError as trouble:
            assert type(trouble) is error, where
            if name == "detach many":  # each for itself: one of the two may have gone through
                assert scene.images() in (BEFORE, {"twice": 2}, {"once": 1, "twice": 1}), where
            elif name == "attach many" and times > 1 and number > 1:  # taking back the first could not be written down, so it stays
                assert scene.images() == BEFORE | {"free": 1} and trouble.__notes__, where
            else:
                assert scene.images() == BEFORE, where
                held = {device.held.id for device in (scene.once, scene.twice)}
                assert scene.vm.backends.keys() == scene.vm.devices.keys() == held, where
            if number == 0 and times > 1:
                assert scene.vm.journal == kept, where
        else:
            # What the machine has let go of is gone, whether that can be written or not.
            assert scene.images() == doing.after and "detach" in name and number > 0, where
        now = scene.images()
        if dies:
            store.fail(StoreError, 0)
            store.close()
            other = SqliteStore(store.path)
            async with Sandbox("victim", scene.vm, store=other) as again:
                assert scene._replace(sandbox=again).images() == now, where
                await agreed(other, again, scene.vm)
            other.close()
        else:
            store.fail(StoreError, 0, times=0)
            last = await scene.sandbox.attach(image("last"))
            await agreed(store, scene.sandbox, scene.vm)
            assert last.held.index == min(set(range(4)) - {index for _, _, _, index in facts(scene.sandbox)[:-1]}), where
            await scene.sandbox.close()
            store.close()


@pytest.mark.parametrize("name", ["attach", "attach many"])
async def test_an_attach_that_cannot_be_written_down_is_undone_in_the_machine(name: str, tmp_path: Path, make_image: MakeImage) -> None:
    store = Failing(tmp_path / "state.db")
    scene = await make_scene(store, make_image)
    store.fail(StoreError, 1)
    before = len(scene.vm.journal)
    with pytest.raises(StoreError, match="told to fail"):
        await OPERATIONS[name].run(scene, LATE)
    steps = [step for step, _ in scene.vm.journal[before:]]
    assert steps.count("device-add") == steps.count("backend-del") >= 1
    assert scene.images() == BEFORE and len(scene.sandbox.index) == len(scene.vm.devices) == 2
    store.fail(StoreError, 0, times=0)
    await OPERATIONS[name].run(scene, LATE)
    await agreed(store, scene.sandbox, scene.vm)
    await scene.sandbox.close()
    store.close()


async def test_what_could_not_be_written_is_written_by_itself(
    tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyblock.ledger.RETRY", 0.001)
    store = Failing(tmp_path / "state.db")
    scene = await make_scene(store, make_image)
    store.fail(StoreError, 1, times=1_000_000)
    await scene.sandbox.detach(scene.once)
    assert store.count >= 2 and len(rows(store.path)["device"]) == 2
    other = SqliteStore(store.path)
    async with Sandbox("other", MemoryHypervisor(), store=other) as sandbox:
        with pytest.raises(ImageInUse, match="victim"):
            await sandbox.attach(tmp_path / "once")
        store.fail(StoreError, 0, times=0)
        await settle(lambda: len(rows(store.path)["device"]) == 1)
        await agreed(store, scene.sandbox, scene.vm)
        await sandbox.attach(tmp_path / "once")
    other.close()
    await scene.sandbox.close()
    store.close()


# The file itself.


def test_the_files_are_private(tmp_path: Path) -> None:
    def make() -> str:
        os.umask(0)
        asyncio.run(SqliteStore(tmp_path / "state.db").open_sandbox("s1", ""))
        return " ".join(f"{path.name}:{stat.S_IMODE(path.stat().st_mode):o}" for path in sorted(tmp_path.iterdir()))

    assert in_child(make) == (0, "state.db:600 state.db-owners:600 state.db-shm:600 state.db-wal:600")


MORE = "CREATE TABLE more (device TEXT); INSERT INTO more SELECT id FROM device;"


async def test_an_older_version_is_brought_to_this_one(
    make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    scene = await make_scene(store, make_image)
    known = facts(scene.sandbox)
    await scene.sandbox.close()
    store.close()
    old = rows(store.path)
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", (*sqlite_file.MIGRATIONS, MORE + "INSERT INTO nowhere VALUES (1);"))
    with pytest.raises(InvalidState, match="nowhere"):
        await store.sandboxes()
    assert rows(store.path) == old and version(store.path) == 1
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", (*sqlite_file.MIGRATIONS[:-1], MORE))
    async with Sandbox("victim", scene.vm, store=store) as again:
        assert facts(again) == known and not again.recovered
        await agreed(store, again, scene.vm)
    store.close()
    assert version(store.path) == 2
    assert {device for _, device in rows(store.path)["more"]} == {device for device, *_ in known}
    monkeypatch.undo()
    with pytest.raises(NewerState):
        await store.sandboxes()


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        [number] = db.execute("PRAGMA user_version").fetchone()
        return int(number)


@pytest.mark.parametrize("made", [True, False], ids=["older", "absent"])
def test_killed_at_each_statement_of_the_making(made: bool, tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert version(path) in (target - 1, target)
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


async def test_an_earlier_boot_is_forgotten(make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = "first"
    monkeypatch.setattr(sqlite_file, "_boot_id", lambda: boot)
    store = make_store()
    scene = await make_scene(store, make_image)
    for seen in ("first", "", "first"):  # where it cannot be read, nothing is known of it
        boot = seen
        store.close()
        assert await store.sandboxes() == ["victim"] and len((await store.read("victim")).devices) == 2
    boot = "second"
    store.close()
    assert await store.sandboxes() == []
    async with Sandbox("victim", MemoryHypervisor(), store=store) as sandbox:
        assert not sandbox.devices
        async with Sandbox("other", MemoryHypervisor(), store=store) as other:
            await other.attach_many([scene.once.info.path, scene.twice.info.path])  # the claims went with them


# Claims, and whose a sandbox is.

ACCESS = [(reads, shares) for reads in (False, True) for shares in (False, True)]


def may_have(holders: list[tuple[bool, bool]], access: tuple[bool, bool]) -> bool:
    """The rule, as one would say it: they all only read, or they all say that they share."""
    everybody = [*holders, access]
    return len(everybody) == 1 or all(reads for reads, _ in everybody) or all(shares for _, shares in everybody)


@pytest.mark.parametrize("second", ACCESS)
@pytest.mark.parametrize("first", ACCESS)
async def test_one_writes_or_many_read_or_all_share(
    first: tuple[bool, bool], second: tuple[bool, bool], make_store: MakeStore, make_image: MakeImage
) -> None:
    image = make_image("a")
    ours, theirs = make_store(), make_store()
    vms = MemoryHypervisor(), MemoryHypervisor()
    async with Sandbox("s1", vms[0], store=ours) as one, Sandbox("s2", vms[1], store=theirs) as other:
        device = await one.attach(image, read_only=first[0], share=first[1])
        if not may_have([first], second):
            with refused(other, vms[1], ImageInUse, str(image), "'s1'", f"process {os.getpid()}"):
                await other.attach(image, read_only=second[0], share=second[1])
            await one.detach(device)
        await other.attach(image, read_only=second[0], share=second[1])
        await agreed(theirs, other, vms[1])
        await agreed(ours, one, vms[0])


async def test_claims_of_many_against_the_rule(make_store: MakeStore, make_image: MakeImage) -> None:
    choose = random.Random(11)
    image = make_image("a")
    sandboxes = [Sandbox(f"s{number}", MemoryHypervisor(), store=make_store()) for number in range(4)]
    held: dict[int, tuple[bool, bool]] = {}
    refusals = 0
    for sandbox in sandboxes:
        await sandbox.__aenter__()
    for _ in range(400):
        number = choose.randrange(4)
        sandbox = sandboxes[number]
        if number in held:
            await sandbox.detach(sandbox.devices[0])
            del held[number]
            continue
        access = choose.choice(ACCESS)
        try:
            await sandbox.attach(image, read_only=access[0], share=access[1])
        except ImageInUse:
            assert not may_have(list(held.values()), access)
            refusals += 1
        else:
            assert may_have(list(held.values()), access)
            held[number] = access
    assert 50 < refusals < 200
    for sandbox in sandboxes:
        await sandbox.close()


class Child:
    """A forked process that runs a function and then waits to be ended; the process ID is that of `Child`'s own child."""

    def __init__(self, function: Callable[[], str]) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.write(writer, function().encode())
                signal.pause()
            finally:
                os._exit(99)
        os.close(writer)
        self.said = os.read(self._reader, 1000).decode()

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._reader)
            self.pid = 0


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[], str]], Child]]:
    children: list[Child] = []

    def make(function: Callable[[], str]) -> Child:
        children.append(Child(function))
        assert children[-1].said
        return children[-1]

    yield make
    for child in children:
        child.kill()


Start = Callable[[Callable[[], str]], Child]


@pytest.fixture
def owned(tmp_path: Path, make_image: MakeImage) -> Callable[[], str]:
    """What a process does that opens a sandbox on a machine that outlives it, and attaches a disk."""
    (tmp_path / "vm").touch()
    image = make_image("a")

    async def own() -> None:
        sandbox = Sandbox("s1", f"memory:{tmp_path / 'vm'}", store=SqliteStore(tmp_path / "state.db"))
        await (await sandbox.__aenter__()).attach(image)
        _kept.append(sandbox)

    def run() -> str:
        asyncio.run(own())
        return "owned"

    return run


_kept: list[Sandbox] = []  # a process's sandboxes, which are neither closed nor deleted


def test_a_sandbox_is_its_owners_until_that_ends(owned: Callable[[], str], start: Start, tmp_path: Path) -> None:
    vm = f"memory:{tmp_path / 'vm'}"
    owner = start(owned)

    async def attempts() -> None:
        store = SqliteStore(tmp_path / "state.db")
        assert (await store.read("s1")).owner.startswith(f"process {owner.pid} ")
        machine_before = (tmp_path / "vm").read_bytes()
        with pytest.raises(SandboxBusy, match=rf"'s1'.* process {owner.pid} "):
            await Sandbox("s1", vm, store=store).__aenter__()
        other = MemoryHypervisor()
        async with Sandbox("s2", other, store=store) as sandbox:
            with refused(sandbox, other, ImageInUse, "'s1'", f"process {owner.pid} ", str(tmp_path / "a")):
                await sandbox.attach(tmp_path / "a")
            owner.kill()
            # The claim stays, for the machine may still write the image.
            with refused(sandbox, other, ImageInUse, "'s1'", "no process has open", str(tmp_path / "a")):
                await sandbox.attach(tmp_path / "a")
        assert (await store.read("s1")).owner == ""
        assert (tmp_path / "vm").read_bytes() == machine_before
        async with Sandbox("s1", vm, store=store) as sandbox:
            assert [phase for _, phase, _, _ in facts(sandbox)] == [Phase.ATTACHED] and not sandbox.recovered
            with pytest.raises(SandboxBusy, match=f"process {os.getpid()} "):
                await Sandbox("s1", vm, store=store).__aenter__()
            second = SqliteStore(store.path)
            with pytest.raises(SandboxBusy, match=f"process {os.getpid()} "):
                await Sandbox("s1", vm, store=second).__aenter__()
            second.close()
            assert (await store.read("s1")).owner.startswith(f"process {os.getpid()} ")
            await sandbox.detach(sandbox.devices[0])
        assert await store.sandboxes() == []
        store.close()

    asyncio.run(attempts())


def test_a_child_that_outlives_its_parent_owns_nothing(owned: Callable[[], str], start: Start, tmp_path: Path) -> None:
    ask, answer = os.pipe(), os.pipe()

    def parent() -> str:
        owned()
        if os.fork() == 0:
            os.close(ask[1])
            while question := os.read(ask[0], 1):  # until this test closes its end
                os.write(answer[1], question)
            os._exit(0)
        return "owned"

    def child_lives() -> None:
        os.write(ask[1], b"?")
        assert os.read(answer[0], 1) == b"?"

    async def take_over() -> None:
        store = SqliteStore(tmp_path / "state.db")
        with pytest.raises(SandboxBusy, match=f"process {owner.pid} "):
            await Sandbox("s1", f"memory:{tmp_path / 'vm'}", store=store).__aenter__()
        child_lives()
        owner.kill()
        child_lives()
        async with Sandbox("s1", f"memory:{tmp_path / 'vm'}", store=store) as sandbox:
            assert len(sandbox.devices) == 1
        child_lives()
        store.close()

    owner = start(parent)
    try:
        asyncio.run(take_over())
    finally:
        for end in (*ask, *answer):
            os.close(end)
