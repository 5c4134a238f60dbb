"""One database file that many processes, threads and forked children use: none spoils it for
another."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from support.children import in_child
from support.held_store import facts
from support.snapshot import MakeImage, MakeStore
from support.turns import LATE

from pyblock import (
    ImageInUse,
    InvalidState,
    Sandbox,
    SandboxBusy,
    StoreError,
)
from pyblock.store.base import Row
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


def test_many_processes_make_one_store(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from pyblock.store.sqlite.store import SqliteStore
for line in sys.stdin:
    store = SqliteStore(line.strip())
    try:
        print(asyncio.run(store.sandboxes()), flush=True)
    except Exception as error:
        print(repr(error), flush=True)
    store.close()
"""
    command = [sys.executable, "-c", program]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said: set[str] = set()
    try:
        for number in range(60):
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{tmp_path / str(number)}\n")
            for process in processes:  # all at once
                assert process.stdin is not None
                process.stdin.flush()
            for process in processes:
                assert process.stdout is not None
                said.add(process.stdout.readline())
    finally:
        for process in processes:
            process.communicate()
    assert said == {"[]\n"}


def test_forked_while_another_thread_is_in_a_transaction(make_store: MakeStore) -> None:
    """The fork waits for its end: a child that began in the middle would have half of it, and the
    locks."""
    store, inside, leave, over = (
        make_store(),
        threading.Event(),
        threading.Event(),
        threading.Event(),
    )

    def stay() -> list[Row]:
        inside.set()
        leave.wait(LATE)
        return []

    async def work() -> None:
        async with Sandbox("one", MemoryHypervisor(), store=store):
            await store.write("one", stay)
            await asyncio.to_thread(over.wait, LATE)

    def child() -> str:
        async def look() -> list[str]:
            return await store.sandboxes(asyncio.get_running_loop().time() + 10)

        return str(asyncio.run(look()))

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        assert inside.wait(LATE)
        with ThreadPoolExecutor(1) as pool:
            forked = pool.submit(in_child, child)
            leave.set()
            assert forked.result() == (0, "['one']")
    finally:
        leave.set()
        over.set()
        thread.join()


@pytest.mark.parametrize("name", ["removed", "replaced"])
async def test_the_database_is_not_the_one_that_was_opened(
    name: str, make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    store, vm = make_store(), MemoryHypervisor()
    free, more = make_image("free"), make_image("more")
    async with Sandbox("one", vm, store=store) as sandbox:
        device = await sandbox.attach(make_image("a"), device_id="a")
        await sandbox.attach(more, device_id="more")
        await sandbox.attach(more)
        if name == "replaced":
            other = make_store(tmp_path / "other.db")
            await other.sandboxes()
            other.close()
            (tmp_path / "other.db").replace(store.path)
        else:
            for suffix in ("", "-wal", "-shm"):
                store.path.with_name(store.path.name + suffix).unlink()
        vm.journal.clear()
        before = facts(sandbox)
        doings: list[Callable[[], Awaitable[object]]] = [
            lambda: sandbox.attach(free),
            lambda: sandbox.detach(device),
            lambda: sandbox.attach(more),
            lambda: sandbox.detach("more"),
            store.sandboxes,
        ]
        for doing in doings:
            with pytest.raises(StoreError, match="removed or replaced"):
                await doing()
        assert vm.journal == [] and facts(sandbox) == before


def test_a_damaged_row_hides_its_own_sandbox_only(
    make_store: MakeStore,
    make_image: MakeImage,
    state_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    store = make_store(state_dir / "state.db")

    async def prepare() -> None:
        for name in ("one", "two", "three", "wide"):
            (tmp_path / name).touch()
            capacity = 1 << 17 if name == "wide" else 1 << 16
            async with Sandbox(
                name,
                f"memory:{tmp_path / name}",
                store=store,
                capacity=capacity,
                driver="virtio-blk",
            ) as sandbox:
                if name == "wide":
                    sandbox.index.reserve_many(range(1 << 16))
                await sandbox.attach(make_image(f"{name}.img"), device_id=f"device-{name}")

    asyncio.run(prepare())

    def run(command: str) -> tuple[int, str, str]:
        program = [sys.executable, "-c", "from pyblock.cli import main; main()", command]
        done = subprocess.run(
            program, capture_output=True, text=True, timeout=2 * LATE, check=False
        )
        return done.returncode, done.stdout, done.stderr

    status, out, complaints = run("list")
    assert (status, complaints) == (0, "") and all(
        f"device-{name}" in out for name in ("one", "two", "three", "wide")
    )
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("UPDATE device SET state = x'7b' WHERE sandbox = 'two'")
        db.commit()
    (tmp_path / "three").write_bytes(b"")  # a machine that was started anew
    status, out, complaints = run("list")
    assert status == 1 and "pyblock: sandbox two:" in complaints and complaints.count("\n") == 1
    assert (
        all(f"device-{name}" in out for name in ("one", "three", "wide"))
        and "device-two" not in out
    )
    status, out, complaints = run("reconcile")
    assert status == 1 and "pyblock: sandbox two:" in complaints
    assert "device-three" in out and "device-one" not in out


async def test_a_number_that_came_to_nothing(make_store: MakeStore) -> None:
    """An owner's number is given to another when the transaction that took it failed; whoever dies
    with it seems not to live."""
    busy, dies, lives, last = (make_store() for _ in range(4))
    await busy.open_sandbox("s0", "")
    with pytest.raises(SandboxBusy):
        await dies.open_sandbox("s0", "")
    await dies.open_sandbox("s2", "")
    dies.close()
    await lives.open_sandbox("s3", "")
    await last.open_sandbox("s2", "")


def test_a_store_cut_off_in_its_last_page(
    tmp_path: Path, make_store: MakeStore, make_image: MakeImage
) -> None:
    """The last page may be of the index that claims are found by."""
    path = tmp_path / "whole.db"

    async def fill() -> None:
        async with Sandbox("one", MemoryHypervisor(), store=make_store(path)) as sandbox:
            await sandbox.attach_many([make_image(f"image{number}") for number in range(4)])

    asyncio.run(fill())
    make_store(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    for missing in (1, 10, 26, 100, 4095, len(whole) - 1):
        cut = tmp_path / f"cut-{missing}.db"
        cut.write_bytes(whole[:-missing])
        with pytest.raises(InvalidState) as caught:
            asyncio.run(make_store(cut).sandboxes())
        assert "\n" not in str(caught.value)
        assert cut.read_bytes() == whole[:-missing]


def test_a_child_that_opens_the_store_of_its_parent(
    tmp_path: Path, make_store: MakeStore, make_image: MakeImage
) -> None:
    """The parent closes it; what the child writes then is seen by others."""
    store = make_store()
    image = make_image("image")
    asyncio.run(store.sandboxes())
    to_child, from_parent = os.pipe()
    from_child, to_parent = os.pipe()
    from_third, to_third = os.pipe()

    def child() -> str:
        async def use() -> None:
            sandbox = await Sandbox("child", MemoryHypervisor(), store=store).__aenter__()
            os.write(to_parent, b".")
            await asyncio.to_thread(os.read, to_child, 1)  # the parent has closed
            await sandbox.attach(image)
            os.write(to_third, b".")
            await asyncio.to_thread(os.read, to_child, 1)

        asyncio.run(use())
        return ""

    def others() -> str:
        async def look() -> str:
            async with Sandbox(
                "other", MemoryHypervisor(), store=SqliteStore(store.path)
            ) as sandbox:
                try:
                    await sandbox.attach(image)
                except ImageInUse as error:
                    return str(error)
            return "nobody has it"

        os.read(from_third, 1)
        return asyncio.run(look())

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(in_child, child)
        os.read(from_child, 1)
        store.close()
        os.write(from_parent, b".")
        status, text = in_child(others)
        os.write(from_parent, b".")
        assert running.result()[0] == 0
    for end in (to_child, from_parent, from_child, to_parent, from_third, to_third):
        os.close(end)
    assert status == 0 and "'child'" in text
