"""The steps of a process that it can be killed at: every SQL statement of its store, and every command that changes its machine, before it
is sent and after it was answered.

They are counted where they pass, not listed, so a step that is new is one more point by itself.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Mapping
from typing import Any

from pyblock.hypervisors.qmp import QmpSession
from pyblock.stores.owner import OwnerLock
from pyblock.stores.sqlite_file import SqliteFile

LOOKING = ("query-", "qom-list", "qom-get")  # commands that change nothing: to die at one is to die at the point before


class Points:
    """Counts the steps of this process from now on, and kills it at one of them. For a forked child: it cannot be undone.

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

        async def watched(session: QmpSession, command: str, arguments: Mapping[str, Any] | None = None, **more: Any) -> Any:
            if command.startswith(LOOKING):
                return await execute(session, command, arguments, **more)
            self.reach(f"before {command}")
            try:
                return await execute(session, command, arguments, **more)
            finally:
                self.reach(f"after {command}")

        QmpSession.execute = watched  # type: ignore[method-assign, assignment]

    def _watch_sql(self) -> None:
        connected = SqliteFile._connected

        def watched(file: SqliteFile, wait: float, lock: OwnerLock | None) -> tuple[sqlite3.Connection, OwnerLock]:
            db, lock = connected(file, wait, lock)
            db.set_trace_callback(lambda sql: self.reach(f"before {sql[:40]}"))
            return db, lock

        SqliteFile._connected = watched  # type: ignore[method-assign, assignment]
