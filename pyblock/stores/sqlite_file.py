"""The host's database file: opened, checked, brought to this version, and shared with other processes, threads and event loops.

Machines die with the host, so it has to survive the death of any process and no more: a commit is in the kernel's page cache, which
outlives its process, and is not waited for on the disk (`synchronous=NORMAL`). A crash of the host can lose the last commits, never the
file's order. What an earlier boot left is removed when it is opened, since none of its machines runs any more.

A transaction is some tens of microseconds, so it runs in the event loop; only waiting for another process's lock yields to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from pyblock.errors import InvalidState, NewerState, PyblockError, StoreBusy, StoreError
from pyblock.stores.base import PATIENCE
from pyblock.stores.owner import OwnerLock

log = logging.getLogger("pyblock")

APPLICATION_ID = 0x7062_6C6B  # "pblk" in the file's header: whose database it is
# Each brings the database from the version before to its own, which is its place in this list, counted from 1.
MIGRATIONS = (
    """
    CREATE TABLE host (boot TEXT NOT NULL, owners INTEGER NOT NULL);
    CREATE TABLE sandbox (id TEXT PRIMARY KEY, vm TEXT UNIQUE, owner INTEGER, owner_text TEXT NOT NULL, state BLOB NOT NULL);
    CREATE TABLE device (sandbox TEXT NOT NULL, id TEXT NOT NULL, state BLOB NOT NULL, image TEXT, access INTEGER, UNIQUE (sandbox, id));
    CREATE INDEX claim ON device (image, access, sandbox) WHERE image IS NOT NULL;
    INSERT INTO host VALUES ('', 0);
    """,
    # A device's row has its claim on the image itself (`top`); these are on what lies under that. They hold while that claim does.
    """
    CREATE TABLE under (image TEXT NOT NULL, access INTEGER NOT NULL, sandbox TEXT NOT NULL, device TEXT NOT NULL, top TEXT NOT NULL);
    CREATE INDEX under_image ON under (image, access);
    CREATE INDEX under_device ON under (sandbox, device);
    CREATE TRIGGER under_goes AFTER DELETE ON device BEGIN
        DELETE FROM under WHERE sandbox = OLD.sandbox AND device = OLD.id;
    END;
    """,
    # What two addresses of one machine have in common, '' where nobody knows.
    """
    ALTER TABLE sandbox ADD COLUMN machine TEXT NOT NULL DEFAULT '';
    CREATE INDEX machine ON sandbox (machine) WHERE machine <> '';
    """,
)
FIRST_PAUSE = 0.0005  # seconds until a lock is tried again; a transaction holds it for less
LAST_PAUSE = 0.02
_BOOT_ID = "/proc/sys/kernel/random/boot_id"

Result = TypeVar("Result")


class SqliteFile:
    """:param path: the database; made if absent, private to its user. Its folder must be there, on a local file system.

    :ivar lock: shows that this process lives; None until the file is open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.lock: OwnerLock | None = None
        self._db: sqlite3.Connection | None = None
        self._inode = (0, 0)  # of what was opened
        self._mutex = threading.Lock()  # of threads with event loops of their own
        _files.add(self)

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"store {str(self.path)!r}"

    async def transact(self, work: Callable[[sqlite3.Connection], Result], deadline: float | None, *, writes: bool = True) -> Result:
        """Runs a transaction as soon as no other process holds the lock. Raises StoreBusy when that is not before the deadline, an
        event-loop time in seconds (None: PATIENCE from now)."""
        loop = asyncio.get_running_loop()
        if deadline is None:
            deadline = loop.time() + PATIENCE
        pause = FIRST_PAUSE
        while True:
            try:
                if self._db is None:
                    await asyncio.to_thread(self._open, max(0.0, deadline - loop.time()))
                return self._run(work, writes=writes)
            except StoreBusy:
                left = deadline - loop.time()
                if left <= 0:
                    raise
            # Not in step with others that wait.
            await asyncio.sleep(min(left, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, LAST_PAUSE)

    def close(self) -> None:
        """Closes what is open, and drops the lock; a later call opens it again."""
        with self._mutex:
            db, self._db = self._db, None
            lock, self.lock = self.lock, None
            if db is not None:
                db.close()
            if lock is not None:
                lock.close()

    # A child that had the parent's connection would believe in the parent's locks, and could delete the journal under others or have it
    # deleted. So a fork finds it closed, and parent and child open it anew when they next need it.

    def before_fork(self) -> None:
        """Closes the connection, and keeps threads from opening it until the fork is over. The owner's lock stays."""
        self._mutex.acquire()
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def after_fork(self, *, child: bool) -> None:
        """Lets the parent go on; the child begins anew, and its lock, which is the parent's, has closed itself."""
        if child:
            self.lock = None
            self._mutex = threading.Lock()
        else:
            self._mutex.release()

    def _run(self, work: Callable[[sqlite3.Connection], Result], *, writes: bool) -> Result:
        if not self._mutex.acquire(blocking=False):
            raise StoreBusy(f"{self.name}: another thread uses it")
        try:
            db = self._db
            if db is None:
                raise StoreBusy(f"{self.name} was closed at this moment")
            if self._on_disk() != self._inode:
                raise StoreError(f"{self.name} was removed or replaced while it was in use; end what uses it, and look which one is right")
            try:
                db.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                result = work(db)
                db.execute("COMMIT")
            except BaseException as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if isinstance(error, (sqlite3.Error, OSError)):
                    raise self._translated(error) from error
                raise
            return result
        finally:
            self._mutex.release()

    def _on_disk(self) -> tuple[int, int]:
        try:
            status = os.stat(self.path)  # noqa: PTH116 - of every transaction
        except OSError:
            return (0, 0)
        return (status.st_dev, status.st_ino)

    def _open(self, wait: float) -> None:
        """Opens the database, made or brought to this version where that is needed; runs in a thread of its own."""
        if not self._mutex.acquire(timeout=wait):
            raise StoreBusy(f"{self.name}: another thread has been opening it for {wait:g} s")
        try:
            if self._db is None:
                self._db, self.lock = self._connected(wait, self.lock)
                self._inode = self._on_disk()
        finally:
            self._mutex.release()

    def _connected(self, wait: float, lock: OwnerLock | None) -> tuple[sqlite3.Connection, OwnerLock]:
        db, had = None, lock
        try:
            # One that exists is not opened here: closing it would drop the locks that SQLite has on it in this process.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(self.path, timeout=wait, isolation_level=None, check_same_thread=False)
            self._check(db)
            lock = lock or OwnerLock(self.path.with_name(self.path.name + "-owners"))
            if not lock.accompanied():  # else whoever has it open has looked, and it may be large
                self._check_whole(db)
            lock.accompany()
            self._migrate(db)
            self._clear_after_boot(db)
            [mode] = _patiently(lambda: db.execute("PRAGMA journal_mode = WAL").fetchone(), wait)
            if mode != "wal":
                raise StoreError(f"{self.name}: SQLite has no WAL there (journal mode {mode}); put it on a local file system")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA busy_timeout = 0")
        except BaseException as error:
            if lock is not None and had is None:
                lock.close()
            if db is not None:
                db.close()
            if isinstance(error, (sqlite3.Error, OSError)):
                raise self._translated(error) from error
            raise
        return db, lock

    def _check(self, db: sqlite3.Connection) -> int:
        """The version of the database, 0 for an empty one. Raises unless it is one of ours."""
        inside = db.in_transaction
        if not inside:
            db.execute("BEGIN")  # what is read belongs to one moment: another process may be making the tables
        [whose] = db.execute("PRAGMA application_id").fetchone()
        [version] = db.execute("PRAGMA user_version").fetchone()
        tables = db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        if not inside:
            db.execute("COMMIT")
        if whose != APPLICATION_ID and (whose or version or tables):
            raise InvalidState(f"{self.name} is a SQLite database of something else; it is left as it is")
        if version > len(MIGRATIONS):
            raise NewerState(
                f"{self.name} was written by a newer pyblock (version {version}, this one reads up to {len(MIGRATIONS)}); "
                "it is left as it is"
            )
        return int(version)

    def _check_whole(self, db: sqlite3.Connection) -> None:
        """Raises InvalidState when something is missing, indexes included. Nobody else has the database open, so its file holds whole
        pages."""
        [size] = db.execute("PRAGMA page_size").fetchone()
        if rest := self.path.stat().st_size % size:
            raise InvalidState(f"{self.name} is cut off: {rest} bytes are no page of {size}; it is left as it is")
        [[damage], *_] = db.execute("PRAGMA integrity_check(1)").fetchall()
        if damage != "ok":
            raise InvalidState(f"{self.name} is damaged ({' '.join(damage.split())}); it is left as it is")

    def _migrate(self, db: sqlite3.Connection) -> None:
        version = self._check(db)
        if version == len(MIGRATIONS):
            return
        if version:
            db.execute("SELECT 1 FROM host, sandbox, device LIMIT 0")  # nothing is written to what is ours by name only
        db.execute("BEGIN IMMEDIATE")
        for script in MIGRATIONS[self._check(db) :]:  # another process may have been here first
            for statement in _statements(script):
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")

    def _clear_after_boot(self, db: sqlite3.Connection) -> None:
        boot = _boot_id()
        [before] = db.execute("SELECT boot FROM host").fetchone()
        if before == boot or not boot:
            return
        db.execute("BEGIN IMMEDIATE")
        [before] = db.execute("SELECT boot FROM host").fetchone()
        if before not in ("", boot):
            count = db.execute("DELETE FROM device").rowcount
            db.execute("DELETE FROM sandbox")
            log.warning("%s: %d devices of an earlier boot of this host are forgotten; their machines ended with it", self.name, count)
        db.execute("UPDATE host SET boot = ?", (boot,))
        db.execute("COMMIT")

    def _translated(self, error: sqlite3.Error | OSError) -> PyblockError:
        if isinstance(error, OSError):
            return StoreError(f"{self.name}: {error.strerror}; name another folder in PYBLOCK_STATE_DIR, or mend this one")
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreBusy(f"{self.name}: another process has been holding its lock; nothing was changed")
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
            return InvalidState(f"{self.name} is not a store, or is damaged: {error}; it is left as it is")
        return StoreError(f"{self.name}: {error}; nothing was changed (a full disk, or a folder that may not be written?)")


_files: weakref.WeakSet[SqliteFile] = weakref.WeakSet()
_forking: list[SqliteFile] = []
_one_fork = threading.RLock()  # at a time; the child has it of the thread that it is


def _before_fork() -> None:
    _one_fork.acquire()
    _forking[:] = list(_files)
    for file in _forking:
        file.before_fork()


def _after_fork(*, child: bool) -> None:
    for file in _forking:
        file.after_fork(child=child)
    _forking.clear()
    _one_fork.release()


os.register_at_fork(before=_before_fork, after_in_parent=partial(_after_fork, child=False), after_in_child=partial(_after_fork, child=True))


def _statements(script: str) -> Iterator[str]:
    """A script's statements, one by one; `executescript` would end the transaction."""
    statement = ""
    for part in script.split(";"):
        statement += part
        if sqlite3.complete_statement(statement + ";") and statement.strip():
            yield statement
            statement = ""
        else:
            statement += ";" if statement.strip() else ""


def _patiently(work: Callable[[], Result], wait: float) -> Result:
    """SQLite does not itself wait when it changes the journal mode."""
    deadline = time.monotonic() + wait
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(LAST_PAUSE)


def _boot_id() -> str:
    try:
        with open(_BOOT_ID) as file:  # noqa: PTH123
            return file.read().strip()
    except OSError:
        return ""
