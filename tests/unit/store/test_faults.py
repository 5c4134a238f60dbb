"""Faults on the store: a disk that is full or read-only, a file that is no store, a lock that
another process keeps, a write that fails.

An operation that meets one raises its typed error and changes nothing, neither here nor in the VMM
nor in the file; when the fault is gone it succeeds. What the VMM has done already is undone, or
written later.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from support.children import NOBODY, in_child
from support.snapshot import MakeImage, MakeStore, machine, refused, snapshot
from support.store_scene import BEFORE, OPERATIONS, Scene, agreed, facts, make_scene, rows
from support.turns import LATE, SOON, at_rest, until

from pyblock import (
    ImageInUse,
    PyblockError,
    Sandbox,
    StoreBusy,
    StoreError,
)
from pyblock.store.base import Row
from pyblock.store.sqlite import file as sqlite_file
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system to fill")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k,mode=700", "tmpfs", folder],
        check=False,
        capture_output=True,
        text=True,
    )
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
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
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


# that one needs it closed
@pytest.mark.parametrize(
    "what", [name for name, fault in FAULTS.items() if fault.befall is not read_only]
)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_operation_under_a_fault_changes_nothing_and_succeeds_later(
    name: str, what: str, scene: Scene
) -> None:
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
        await at_rest()  # others have their turns while it waits
        assert not task.done() and len(scene.vm.devices) == 2
    await task
    await agreed(scene.store, scene.sandbox, scene.vm)


@pytest.mark.parametrize("there", [True, False], ids=["known sandbox", "new sandbox"])
async def test_opening_a_sandbox_under_a_fault(
    there: bool,
    fault: Fault,
    disk: Path,
    make_store: MakeStore,
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
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
async def test_a_store_that_cannot_be_made_is_made_later(
    name: str, disk: Path, make_store: MakeStore, make_image: MakeImage
) -> None:
    vm = MemoryHypervisor()
    store = make_store(disk / "state.db")
    sandbox = Sandbox("s1", vm, store=store)
    with FAULTS[name].befall(store), refused(sandbox, vm, StoreError, str(store.path)):
        await sandbox.__aenter__()
    async with sandbox:
        await sandbox.attach(make_image("a"))
        await agreed(store, sandbox, vm)


async def test_closing_a_sandbox_under_a_fault(
    fault: Fault, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is closed all the same, and nothing is lost: the devices stay in the machine and in the
    store."""
    monkeypatch.setattr("pyblock.life.machine.GRACE", SOON)
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
            assert (
                type(error) is StoreError
                and str(folder / "state.db") in str(error)
                and not vm.journal
            )
            return "refused"
        finally:
            store.close()
        return "done"

    base = Path(tempfile.mkdtemp())  # pytest's own folders are not to be entered by others
    try:
        base.chmod(0o755)
        (base / "image").write_bytes(bytes(4096))
        (base / "image").chmod(0o666)
        if uid is not None:
            os.chown(base, uid, uid)
        base.chmod(0o555)
        assert in_child(lambda: asyncio.run(attempt(base)), uid=uid) == (0, "refused")
        assert [path.name for path in base.iterdir()] == ["image"]
        base.chmod(0o755)
        assert in_child(lambda: asyncio.run(attempt(base)), uid=uid) == (0, "done")
        base.chmod(0o555)
        before = (base / "state.db").read_bytes()
        assert in_child(lambda: asyncio.run(attempt(base)), uid=uid) == (0, "refused")
        assert (base / "state.db").read_bytes() == before
    finally:
        base.chmod(0o777)
        shutil.rmtree(base)


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
        own: bytes | None = None,
        all_or_none: bool = False,
    ) -> dict[str, ImageInUse]:
        self.count += 1
        if self.count - 1 in self._bad:
            raise self._error(f"store {str(self.path)!r}: told to fail")
        return await super().write(sandbox_id, rows, deadline, own=own, all_or_none=all_or_none)


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
    name: str,
    times: int,
    error: type[PyblockError],
    tmp_path: Path,
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then the process dies, or it goes on: the store and the machine agree again in either
    case."""
    # the next operation writes what is left over
    monkeypatch.setattr("pyblock.life.ledger.RETRY", 2 * LATE)
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
            elif name == "attach many" and times > 1 and number > 1:
                # taking back the first could not be written down, so it stays
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
            assert last.held.index == min(
                set(range(4)) - {index for _, _, _, index in facts(scene.sandbox)[:-1]}
            ), where
            await scene.sandbox.close()
            store.close()


@pytest.mark.parametrize("name", ["attach", "attach many"])
async def test_an_attach_that_cannot_be_written_down_is_undone_in_the_machine(
    name: str, tmp_path: Path, make_image: MakeImage
) -> None:
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
    monkeypatch.setattr("pyblock.life.ledger.RETRY", 0.001)
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
        await until(lambda: len(rows(store.path)["device"]) == 1)
        await agreed(store, scene.sandbox, scene.vm)
        await sandbox.attach(tmp_path / "once")
    other.close()
    await scene.sandbox.close()
    store.close()
