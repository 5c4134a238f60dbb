"""A signal handler comes at any bytecode of a transaction: it may fork, or raise, and the store is
neither stuck nor lost. A fork waits for no other process."""

from __future__ import annotations

import asyncio
import dis
import inspect
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.children import in_child
from support.snapshot import MakeStore
from support.turns import LATE, until

from pyblock import StoreBusy
from pyblock.store.base import Row
from pyblock.store.sqlite.store import SqliteStore

pytestmark = pytest.mark.timeout(300)

HANGS = 60  # seconds, after which a child that hangs is ended by SIGALRM


async def names(store: SqliteStore) -> str:
    return " ".join(await store.sandboxes(asyncio.get_running_loop().time() + LATE))


def elsewhere(path: Path) -> str:
    """What another process does with the store."""

    async def use() -> str:
        store = SqliteStore(path)
        await store.open_sandbox("other", "", asyncio.get_running_loop().time() + LATE)
        return await names(store)

    return asyncio.run(use())


def test_a_signal_handler_forks_inside_a_transaction(tmp_path: Path) -> None:
    path = tmp_path / "state.db"

    def parent() -> str:
        signal.alarm(HANGS)
        store, forked = SqliteStore(path), list[str]()

        def fork(*_: object) -> None:
            # the store is nobody's while it forks, so the child may use it
            forked.append(str(in_child(lambda: elsewhere(path))))

        signal.signal(signal.SIGUSR1, fork)
        tries = 0

        def rows() -> list[Row]:
            nonlocal tries
            tries += 1
            if tries == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return [Row("device", b"saved")]

        async def work() -> str:
            await store.open_sandbox("one", "")
            await store.write("one", rows)
            return f"{tries} {len((await store.read('one')).devices)} {await names(store)}"

        return f"{asyncio.run(work())} {forked}"

    assert in_child(parent) == (0, "2 1 one other [\"(0, 'one other')\"]")


def test_the_child_of_such_a_fork_goes_on_itself(tmp_path: Path) -> None:
    """It comes out of the handler into the middle of its parent's transaction, which is none of its
    own."""
    path = tmp_path / "state.db"

    def parent() -> str:
        signal.alarm(HANGS)
        store, child = SqliteStore(path), 0

        def fork(*_: object) -> None:
            nonlocal child
            child = os.fork()
            signal.alarm(HANGS)

        def rows() -> list[Row]:
            os.kill(os.getpid(), signal.SIGUSR1)
            return [Row("device", b"saved")]

        async def work() -> None:
            await store.open_sandbox("one", "")
            try:
                await store.write("one", rows, asyncio.get_running_loop().time())
            except StoreBusy:  # the deadline leaves no time to begin it again
                if child == 0:
                    os._exit(elsewhere(path) != "one other")

        signal.signal(signal.SIGUSR1, fork)
        asyncio.run(work())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return f"{status} {elsewhere(path)}"

    assert in_child(parent) == (0, "0 one other")


class Thrown(BaseException):
    """What the signal handler raises."""


# Python runs signal handlers when one of these has been executed, and at no other time.
LOOKS = ("RESUME", "CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD")


class Thrower:
    """Raises at the n-th place in a function of the store's at which a signal handler could.

    :ivar thrown: where.
    """

    def __init__(self, number: int) -> None:
        self.thrown = ""
        self._left = number
        self._operations: dict[Any, dict[int, str]] = {}
        self._last: dict[FrameType, int] = {}

    def watch(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        """To be given to sys.settrace."""
        code = frame.f_code
        if (
            not code.co_filename.endswith(("/store/sqlite/file.py", "/store/sqlite/store.py"))
            or code.co_flags & inspect.CO_COROUTINE
        ):
            return None
        frame.f_trace = self.watch
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        operations = self._operations.get(frame.f_code)
        if operations is None:
            operations = self._operations[frame.f_code] = {
                each.offset: each.opname for each in dis.get_instructions(frame.f_code)
            }
        if event == "opcode":
            last = self._last.get(frame, -1)
            self._last[frame] = frame.f_lasti
            if operations.get(last) in LOOKS:
                self._left -= 1
                if self._left == -1:
                    self.thrown = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                    raise Thrown
        return self.watch


def test_a_signal_handler_raises_anywhere_in_a_transaction(
    make_store: MakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then no lock is left, neither this process's nor the database's, and what is in it is the old
    or the new."""
    store, other = make_store(), make_store()
    content = [b"0"]

    async def write(store: SqliteStore, text: bytes, soon: float) -> None:
        await store.write(
            "one", lambda: [Row("device", text)], asyncio.get_running_loop().time() + soon
        )

    async def elsewhere() -> None:
        """Another process, or one that stands for it, and another thread of this one."""
        await other.open_sandbox("other", "", asyncio.get_running_loop().time() + LATE)
        await other.close_sandbox("other", asyncio.get_running_loop().time() + LATE)
        await asyncio.to_thread(asyncio.run, write(store, content[0], LATE))

    asyncio.run(store.open_sandbox("one", ""))
    asyncio.run(write(store, content[0], LATE))
    # Python 3.12 traces operations only if they are wanted before anything is traced
    sys._getframe().f_trace_opcodes = True
    number = 0
    while True:
        thrower, text = Thrower(number), str(number + 1).encode()
        sys.settrace(thrower.watch)
        try:
            asyncio.run(write(store, text, LATE))
        except Thrown:
            pass
        finally:
            sys.settrace(None)
        with closing(sqlite3.connect(store.path)) as db:
            [(now,)] = db.execute("SELECT state FROM device").fetchall()
        assert now in (content[0], text), thrower.thrown
        content[0] = now
        if not thrower.thrown:
            break
        try:
            asyncio.run(elsewhere())
        except Exception as error:
            pytest.fail(f"after one thrown in {thrower.thrown}: {error!r}")
        number += 1
    assert number > 10
    with capsys.disabled():
        print(f"\nthrown in {number} places")


def test_a_fork_does_not_wait_for_another_process(tmp_path: Path) -> None:
    """One that holds the lock while this one opens the store."""
    path = tmp_path / "state.db"
    store, tried = SqliteStore(path), threading.Event()
    connect = sqlite3.connect

    def watched(*arguments: Any, **more: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*arguments, **more)
        db.set_trace_callback(lambda sql: tried.set())
        return db

    def open_it() -> str:
        return asyncio.run(names(store))

    with closing(connect(path, isolation_level=None)) as db, ThreadPoolExecutor(1) as pool:
        # else SQLite takes the file for empty, and locks nothing
        db.execute("CREATE TABLE mine (one)")
        db.execute("DROP TABLE mine")
        db.execute("BEGIN EXCLUSIVE")
        sqlite3.connect = watched  # type: ignore[assignment]
        try:
            opening = pool.submit(open_it)
            assert tried.wait(LATE)
            assert in_child(lambda: "") == (0, "")
            waits = not opening.done()
        finally:
            sqlite3.connect = connect
            db.execute("ROLLBACK")
        assert waits
        assert opening.result() == ""
    store.close()


def test_forked_beside_a_transaction_that_does_not_end(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork goes on; its child is told that it cannot use the store, and its parent loses
    nothing."""
    # the rest of this file says what was so before there was one
    from pyblock.store.sqlite import forks  # noqa: PLC0415

    monkeypatch.setattr(forks, "FORK_WAIT", 0.05)
    store, inside, leave = make_store(), threading.Event(), threading.Event()

    def stay() -> list[Row]:
        inside.set()
        assert leave.wait(LATE)
        return [Row("device", b"saved")]

    async def work() -> int:
        await store.open_sandbox("one", "")
        await store.write("one", stay)
        return len((await store.read("one")).devices)

    def child() -> str:
        said = []
        for each in (store, SqliteStore(store.path)):
            try:
                said.append(asyncio.run(names(each)))
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        return "\n".join(said)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(lambda: asyncio.run(work()))
        try:
            assert inside.wait(LATE)
            status, text = in_child(child)
        finally:
            leave.set()
        assert working.result() == 1
    assert status == 0
    assert [line.partition(":")[0] for line in text.splitlines()] == [
        "StoreError"
    ] * 2 and "was forked while" in text


@pytest.mark.anyio
async def test_many_forks_beside_many_transactions(make_store: MakeStore) -> None:
    """Children use the store, and what the parent was doing is done."""
    store, count = make_store(), 0
    await store.open_sandbox("one", "")
    over = False

    def rows() -> list[Row]:
        return [Row("device", str(count).encode())]

    async def write() -> None:
        nonlocal count
        while not over:
            count += 1
            await store.write("one", rows)
            await asyncio.sleep(0)

    writing = asyncio.create_task(write())
    for number in range(10):
        before = count
        await until(lambda: count > before + 3)  # noqa: B023 - called at once
        assert await asyncio.to_thread(in_child, lambda: elsewhere(store.path)) == (
            0,
            "one other",
        ), number
    over = True
    await writing
    assert (await store.read("one")).devices == [("device", str(count).encode())]


def test_an_interrupted_fork_keeps_nobody_out_for_ever(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler has thrown a fork off its way, so that its end was never seen."""
    from pyblock.store.sqlite import forks  # noqa: PLC0415

    monkeypatch.setitem(forks._under_way, 1, time.monotonic() - 2 * forks.FORK_WAIT)
    assert asyncio.run(names(make_store())) == ""
