"""A sandbox that is dropped without being closed: its ownership ends with the object, with a
warning, as a file would be closed."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support.children import in_child
from support.held_store import HeldStore, facts, locked
from support.snapshot import MakeImage, MakeStore
from support.turns import until

from pyblock import Sandbox, SandboxBusy, StoreBusy
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio


async def drop(store: SqliteStore, vm: MemoryHypervisor, image: Path | None = None) -> None:
    """Opens the sandbox "one" and forgets it."""
    sandbox = await Sandbox("one", vm, store=store).__aenter__()
    if image is not None:
        await sandbox.attach(image)


async def dropped(store: SqliteStore, vm: MemoryHypervisor, image: Path | None = None) -> None:
    with pytest.warns(ResourceWarning, match=r"unclosed sandbox one: .* close it"):
        await drop(store, vm, image)
        gc.collect()


async def test_it_can_be_opened_again(make_store: MakeStore, make_image: MakeImage) -> None:
    store, vm = make_store(), MemoryHypervisor()
    await dropped(store, vm, make_image("a"))
    async with Sandbox("one", vm, store=store) as again:
        assert len(facts(again)) == 1 and not again.recovered
        with pytest.raises(SandboxBusy):
            await Sandbox("one", vm, store=store).__aenter__()


async def test_others_can_have_it_without_another_call(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    store, other, vm = make_store(), make_store(), MemoryHypervisor()
    await dropped(store, vm, make_image("a"))
    await asyncio.sleep(0)  # the loop's next turn
    async with Sandbox("one", vm, store=other) as again:
        assert len(facts(again)) == 1


async def test_dropped_in_another_thread(make_store: MakeStore) -> None:
    """Where it was collected by chance."""
    store, other, vm, cell = make_store(), make_store(), MemoryHypervisor(), list[Sandbox]()
    cell.append(await Sandbox("one", vm, store=store).__aenter__())

    def clear() -> None:
        cell.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed"):
        await asyncio.to_thread(clear)
    await until(lambda: not store._given_up)
    async with Sandbox("one", vm, store=other):
        pass


async def test_dropped_while_another_process_has_the_lock(
    store: HeldStore, make_store: MakeStore
) -> None:
    vm = MemoryHypervisor()
    with locked(store):
        pass
    sandbox = await Sandbox("one", vm, store=store).__aenter__()
    with pytest.warns(ResourceWarning, match="unclosed"), locked(store):
        del sandbox
        gc.collect()
        await asyncio.sleep(0)
        with pytest.raises(StoreBusy):
            await store.open_sandbox("two", "", asyncio.get_running_loop().time())
    async with Sandbox("one", vm, store=store):
        pass


def test_dropped_after_its_loop(make_store: MakeStore, make_image: MakeImage) -> None:
    store, vm, cell = make_store(), MemoryHypervisor(), list[Sandbox]()

    async def open_it() -> None:
        cell.append(await Sandbox("one", vm, store=store).__aenter__())
        await cell[0].attach(make_image("a"))

    asyncio.run(open_it())
    with pytest.warns(ResourceWarning, match="unclosed"):
        cell.clear()
        gc.collect()

    async def again() -> None:
        async with Sandbox("one", vm, store=store) as sandbox:
            assert len(facts(sandbox)) == 1

    asyncio.run(again())


async def test_what_is_not_the_owner_any_more_gives_nothing_up(make_store: MakeStore) -> None:
    """Closed; of a store that was closed; of a parent."""
    store, vm = make_store(), MemoryHypervisor()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sandbox = await Sandbox("one", vm, store=store).__aenter__()
        await sandbox.close()
        del sandbox
        first = await Sandbox("one", vm, store=store).__aenter__()
        store.close()
        second = await Sandbox("one", vm, store=store).__aenter__()
        del first
        gc.collect()
        with pytest.raises(SandboxBusy):
            await Sandbox("one", vm, store=store).__aenter__()

        def child() -> str:
            nonlocal second
            del second
            gc.collect()
            return "nothing"

        assert in_child(child) == (0, "nothing")
        with pytest.raises(SandboxBusy):
            await Sandbox("one", vm, store=make_store()).__aenter__()
        await second.close()


EXIT = """
import asyncio, sys
from pyblock import Sandbox

kept = []

async def work(how):
    kept.append(await Sandbox("one", f"memory:{sys.argv[1]}", store="host").__aenter__())
    await kept[0].attach(sys.argv[2])
    if how == "closed":
        await kept.pop().close()

asyncio.run(work(sys.argv[3]))
"""


@pytest.mark.parametrize("how", ["closed", "open"])
def test_the_end_of_a_process_says_nothing(how: str, tmp_path: Path, make_image: MakeImage) -> None:
    (tmp_path / "vm").touch()
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        EXIT,
        str(tmp_path / "vm"),
        str(make_image("a")),
        how,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_end_of_a_process_closes_its_databases(tmp_path: Path) -> None:
    """Python 3.13 warns of each that is not: so its journal is gone as well."""
    (tmp_path / "vm").touch()
    (tmp_path / "image").write_bytes(bytes(4096))
    command = [sys.executable, "-c", EXIT, str(tmp_path / "vm"), str(tmp_path / "image"), "open"]
    folder = Path(os.environ["PYBLOCK_STATE_DIR"])
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[3])
    assert sorted(path.name for path in folder.iterdir()) == ["state.db", "state.db-owners"]


async def test_a_store_that_is_dropped_is_closed(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    await store.sandboxes()
    assert (tmp_path / "state.db-wal").exists()
    del store
    # the thread that opened it lets go of it, too
    await until(lambda: gc.collect() >= 0 and not (tmp_path / "state.db-wal").exists())
