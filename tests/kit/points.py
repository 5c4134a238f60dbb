"""The steps of a process that it can be killed at: every SQL statement of its store, and every
command that changes its machine, before it is sent and after it was answered.

They are counted where they pass, not listed, so a step that is new is one more point by itself.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from support.written import written

from pyblock.store.sqlite.file import SqliteFile
from pyblock.store.sqlite.owner import OwnerLock
from pyblock.vmm.qemu.qmp import QmpSession
from pyblock.vmm.qemu.qmp_connection import Command

# commands that change nothing: to die at one is to die at the point before
LOOKING = ("query-", "qom-list", "qom-get")


class Points:
    """Counts the steps of this process from now on, and kills it at one of them. For a forked
    child: it cannot be undone.

    :param last: the number of the step to die at; None to live.
    """

    def __init__(self, last: int | None) -> None:
        self.reached: list[str] = []
        self._last = last
        self._watch_qmp()
        self._watch_sql()

    def reach(self, name: str) -> None:
        if len(self.reached) == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.reached.append(name)

    def _watch_qmp(self) -> None:
        execute = QmpSession.execute

        async def watched(
            session: QmpSession,
            command: str,
            arguments: Mapping[str, Any] | None = None,
            **more: Any,
        ) -> Any:
            if command.startswith(LOOKING):
                return await execute(session, command, arguments, **more)
            self.reach(f"before {command}")
            try:
                return await execute(session, command, arguments, **more)
            finally:
                self.reach(f"after {command}")

        send_both = QmpSession.send_both

        async def both_watched(session: QmpSession, first: Command, second: Command) -> Any:
            self.reach(f"before {first.name} and {second.name}")
            answers = await send_both(session, first, second)
            for command, answer in zip((first, second), answers, strict=True):
                answer.add_done_callback(lambda _, name=command.name: self.reach(f"after {name}"))  # type: ignore[misc]
            return answers

        QmpSession.execute = watched  # type: ignore[method-assign, assignment]
        QmpSession.send_both = both_watched  # type: ignore[method-assign, assignment]

    def _watch_sql(self) -> None:
        connected = SqliteFile._connected

        def watched(
            file: SqliteFile, had: OwnerLock | None
        ) -> tuple[sqlite3.Connection, OwnerLock]:
            db, lock = connected(file, had)
            db.set_trace_callback(lambda sql: self.reach(f"before {sql[:40]}"))
            return db, lock

        SqliteFile._connected = watched  # type: ignore[method-assign, assignment]


class TurningPoints(Points):
    """Fewer steps, at each of which the event loop turns, so that others come in between: every
    transaction of the store, and every command that changes the machine, before and after. At one
    of them `give_up` is called.

    :param path: the store. What is sent to the machine while the store says otherwise is found in
        `unsaid`.
    """

    def __init__(
        self, path: Path, last: int | None, at: int | None, give_up: Callable[[], None]
    ) -> None:
        self.unsaid: list[str] = []
        self._path = path
        self._at = at
        self._give_up = give_up
        super().__init__(last)

    async def turn(self, name: str) -> None:
        if len(self.reached) == self._at:
            self._give_up()
        self.reach(name)
        for _ in range(3):
            await asyncio.sleep(0)

    def _watch_qmp(self) -> None:
        execute = QmpSession.execute

        async def watched(
            session: QmpSession,
            command: str,
            arguments: Mapping[str, Any] | None = None,
            **more: Any,
        ) -> Any:
            if command.startswith(LOOKING):
                return await execute(session, command, arguments, **more)
            await self.turn(f"before {command}")
            self._compare(command, arguments or {})
            try:
                return await execute(session, command, arguments, **more)
            finally:
                await self.turn(f"after {command}")

        send_both = QmpSession.send_both

        async def turned(answer: asyncio.Future[Any], name: str) -> Any:
            try:
                return await answer
            finally:
                await self.turn(f"after {name}")

        async def both_watched(session: QmpSession, first: Command, second: Command) -> Any:
            await self.turn(f"before {first.name} and {second.name}")
            for command in (first, second):
                self._compare(command.name, command.arguments)
            answers = await send_both(session, first, second)
            return [
                asyncio.ensure_future(turned(answer, command.name))
                for answer, command in zip(answers, (first, second), strict=True)
            ]

        QmpSession.execute = watched  # type: ignore[method-assign, assignment]
        QmpSession.send_both = both_watched  # type: ignore[method-assign, assignment]

    def _watch_sql(self) -> None:
        transact = SqliteFile.transact

        async def watched(file: SqliteFile, *arguments: Any, **more: Any) -> Any:
            await self.turn("before a transaction")
            result = await transact(file, *arguments, **more)
            await self.turn("after a transaction")
            return result

        SqliteFile.transact = watched  # type: ignore[method-assign, assignment]

    def _compare(self, command: str, arguments: Mapping[str, Any]) -> None:
        """The store must say that what this command is about is on its way in or out."""
        drive = arguments.get("node-name") or arguments.get("id")
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as db:
            rows = [
                written(device_id, data)
                for device_id, data in db.execute("SELECT id, state FROM device")
            ]
        if command == "add-fd":  # it says which image it hands over, and not for which drive
            kind, device, inode = re.fullmatch(r"pb:(.)(\w+):(\w+)", arguments["opaque"]).groups()  # type: ignore[union-attr]
            image = ({"f": "file", "b": "block"}[kind], int(device, 16), int(inode, 16))
            drive = next((row.drive_id for row in rows if row.identity == image), None)
        said = [row.phase for row in rows if row.drive_id == drive]
        if said not in (["attach-pending"], ["detach-pending"]):
            self.unsaid.append(f"{command} {drive} while the store says {said or 'nothing'}")
