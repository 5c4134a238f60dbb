"""The host's store: one SQLite database in WAL mode, used by many processes at once.

Machines die with the host, so it has to survive the death of any process and no more: a commit is in the kernel's page cache, which
outlives its process, and is not waited for on the disk (`synchronous=NORMAL`). A crash of the host can lose the last commits, never the
file's order. What an earlier boot left is removed when the store is opened, since none of its machines runs any more.

A transaction is some tens of microseconds, so it runs in the event loop; only waiting for another process's lock yields to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pyblock.errors import (
    ImageInUse,
    InvalidState,
    NewerState,
    PyblockError,
    SandboxBusy,
    SandboxConflict,
    StoreBusy,
    StoreError,
    UnknownSandbox,
)
from pyblock.stores.base import PATIENCE, Claim, Row, Store, Stored
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
)
FIRST_PAUSE = 0.0005  # seconds until a lock is tried again; a transaction holds it for less
LAST_PAUSE = 0.02
READ_ONLY, SHARE = 1, 2  # the bits of `access`
_BOOT_ID = "/proc/sys/kernel/random/boot_id"

Result = TypeVar("Result")


class SqliteStore(Store):
    """:param path: the database; made if absent, private to its user. Its folder must be there, on a local file system."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._db: sqlite3.Connection | None = None
        self._mutex = threading.Lock()  # of threads with event loops of their own
        self._pid = -1  # of the process that opened it
        self._lock: OwnerLock | None = None
        self._number = 0  # of this process as an owner; 0: none yet
        self._mine: set[str] = set()  # sandboxes that this process has open

    def __repr__(self) -> str:
        return f"<SqliteStore {str(self.path)!r}>"

    async def open_sandbox(self, sandbox_id: str, vm: str, deadline: float | None = None) -> Stored:
        return await self._patiently(lambda db: self._take(db, sandbox_id, vm), deadline)

    async def close_sandbox(self, sandbox_id: str, deadline: float | None = None) -> None:
        def work(db: sqlite3.Connection) -> None:
            key = (sandbox_id, self._number)
            kept = "EXISTS (SELECT 1 FROM device WHERE sandbox = sandbox.id)"
            if not db.execute(f"DELETE FROM sandbox WHERE id = ? AND owner = ? AND state = x'' AND NOT {kept}", key).rowcount:
                db.execute("UPDATE sandbox SET owner = NULL, owner_text = '' WHERE id = ? AND owner = ?", key)

        try:
            await self._patiently(work, deadline)
        finally:
            self._mine.discard(sandbox_id)  # what could not be written down is taken over once this process has ended

    async def write(
        self, sandbox_id: str, rows: Callable[[], Sequence[Row]], deadline: float | None = None, *, state: bytes | None = None
    ) -> dict[str, ImageInUse]:
        return await self._patiently(lambda db: self._write(db, sandbox_id, rows(), state), deadline)

    async def read(self, sandbox_id: str, deadline: float | None = None) -> Stored:
        return await self._patiently(lambda db: self._read(db, sandbox_id), deadline, writes=False)

    async def find(self, vm: str, deadline: float | None = None) -> str | None:
        def work(db: sqlite3.Connection) -> str | None:
            found = db.execute("SELECT id FROM sandbox WHERE vm = ?", (vm,)).fetchone()
            return found[0] if found else None

        return await self._patiently(work, deadline, writes=False)

    async def sandboxes(self, deadline: float | None = None) -> list[str]:
        return await self._patiently(
            lambda db: [row[0] for row in db.execute("SELECT id FROM sandbox ORDER BY id")], deadline, writes=False
        )

    def close(self) -> None:
        with self._mutex:
            db, self._db = self._db, None
            if db is not None and self._pid == os.getpid():
                db.close()
            if self._lock is not None:
                self._lock.close()
            self._lock, self._number = None, 0
            self._mine.clear()

    # The transactions.

    def _take(self, db: sqlite3.Connection, sandbox_id: str, vm: str) -> Stored:
        lock, number = self._register(db)
        self._forget_empty(db, vm, lock)
        other = db.execute("SELECT id FROM sandbox WHERE vm = ? AND id <> ?", (vm, sandbox_id)).fetchone() if vm else None
        if other:
            raise SandboxConflict(
                f"the machine {vm} belongs to sandbox {other[0]!r} in the store {str(self.path)!r}, not to {sandbox_id!r}"
            )
        row = db.execute("SELECT vm, owner, owner_text FROM sandbox WHERE id = ?", (sandbox_id,)).fetchone()
        if row is None:
            db.execute("INSERT INTO sandbox VALUES (?, ?, NULL, '', x'')", (sandbox_id, vm or None))
        else:
            had, owner, text = row
            if (owner == number and sandbox_id in self._mine) or (owner is not None and owner != number and lock.lives(owner)):
                raise SandboxBusy(f"sandbox {sandbox_id!r} belongs to {text}; it is free when that closes it or ends")
            if had is not None and had != vm:
                raise SandboxConflict(
                    f"sandbox {sandbox_id!r} is in the store with the machine {had}, not {vm or 'one in memory'}; "
                    f"if that machine is gone, give it up with: pyblock forget {sandbox_id}"
                )
        text = f"process {os.getpid()} ({Path(sys.argv[0]).name or 'python'})"
        db.execute("UPDATE sandbox SET owner = ?, owner_text = ?, vm = ? WHERE id = ?", (number, text, vm or None, sandbox_id))
        stored = self._read(db, sandbox_id)
        self._mine.add(sandbox_id)  # nothing of ours comes after this but the commit; a sandbox that it fails for was not open before
        return stored

    def _forget_empty(self, db: sqlite3.Connection, vm: str, lock: OwnerLock) -> None:
        """A process that died with a sandbox open and nothing in it does not keep the machine from others."""
        row = db.execute("SELECT id, owner, state FROM sandbox WHERE vm = ?", (vm,)).fetchone() if vm else None
        if row is None or row[1] is None or row[1] == self._number or lock.lives(row[1]) or row[2]:
            return
        if db.execute("SELECT 1 FROM device WHERE sandbox = ? LIMIT 1", row[:1]).fetchone() is None:
            db.execute("DELETE FROM sandbox WHERE id = ?", row[:1])

    def _register(self, db: sqlite3.Connection) -> tuple[OwnerLock, int]:
        """The lock that shows that this process lives, and its number."""
        if self._lock is None or not self._number:
            lock = OwnerLock(self.path.with_name(self.path.name + "-owners"))
            while True:
                db.execute("UPDATE host SET owners = owners + 1")
                [number] = db.execute("SELECT owners FROM host").fetchone()
                try:
                    lock.take(number)
                    break
                except BlockingIOError:
                    continue  # of a process that uses a database which was here before this one
            self._lock, self._number = lock, number
        return self._lock, self._number

    def _write(self, db: sqlite3.Connection, sandbox_id: str, rows: Sequence[Row], state: bytes | None) -> dict[str, ImageInUse]:
        refused: dict[str, ImageInUse] = {}
        if state is not None:
            db.execute("UPDATE sandbox SET state = ? WHERE id = ?", (state, sandbox_id))
        for row in rows:  # those that go come first: another may have their image, or their index, by now
            if row.state is None:
                db.execute("DELETE FROM device WHERE sandbox = ? AND id = ?", (sandbox_id, row.device_id))
        for row in rows:
            if row.state is None:
                continue
            claim = row.claim
            if claim is not None and not row.claiming:
                key = (row.state, sandbox_id, row.device_id)
                if db.execute("UPDATE device SET state = ? WHERE sandbox = ? AND id = ?", key).rowcount:
                    continue
            if claim is not None and (holder := self._holder(db, sandbox_id, claim)):
                refused[row.device_id] = holder
                continue
            image, access = (None, None) if claim is None else (_image(claim), _access(claim))
            db.execute(
                "INSERT INTO device VALUES (?, ?, ?, ?, ?) ON CONFLICT (sandbox, id) "
                "DO UPDATE SET state = excluded.state, image = excluded.image, access = excluded.access",
                (sandbox_id, row.device_id, row.state, image, access),
            )
        return refused

    def _holder(self, db: sqlite3.Connection, sandbox_id: str, claim: Claim) -> ImageInUse | None:
        """Who holds a claim that this one does not fit."""
        against = ", ".join(str(access) for access in range(4) if not claim.fits(_claim(claim, access)))
        query = f"SELECT sandbox, id, access FROM device WHERE image = ? AND access IN ({against}) AND sandbox <> ? LIMIT 1"
        found = db.execute(query, (_image(claim), sandbox_id)).fetchone()
        if found is None:
            return None
        holder, device_id, access = found
        [owner, text] = db.execute("SELECT owner, owner_text FROM sandbox WHERE id = ?", (holder,)).fetchone() or (None, "")
        lives = owner is not None and (owner == self._number or (self._lock is not None and self._lock.lives(owner)))
        wants, has = ("read" if each else "write" for each in (claim.read_only, access & READ_ONLY))
        who = f"of {text}" if lives else f"that no process has open (if its machine is gone: pyblock forget {holder})"
        return ImageInUse(
            f"cannot be claimed to {wants} it: device {device_id} of sandbox {holder!r}, {who}, has claimed it to {has} it; "
            "detach it there, or have both share it on purpose"
        )

    def _read(self, db: sqlite3.Connection, sandbox_id: str) -> Stored:
        row = db.execute("SELECT vm, owner, owner_text, state FROM sandbox WHERE id = ?", (sandbox_id,)).fetchone()
        if row is None:
            raise UnknownSandbox(f"no sandbox {sandbox_id!r} in the store {str(self.path)!r}")
        vm, owner, text, state = row
        lives = owner is not None and (owner == self._number or self._lives(owner))
        devices = [state for (state,) in db.execute("SELECT state FROM device WHERE sandbox = ? ORDER BY rowid", (sandbox_id,))]
        return Stored(sandbox_id, vm or "", text if lives else "", state, devices)

    def _lives(self, owner: int) -> bool:
        lock = self._lock or OwnerLock(self.path.with_name(self.path.name + "-owners"))
        return lock.lives(owner)

    # The connection.

    async def _patiently(self, work: Callable[[sqlite3.Connection], Result], deadline: float | None, *, writes: bool = True) -> Result:
        """Runs a transaction as soon as no other process holds the lock. Raises StoreBusy when that is not before the deadline."""
        loop = asyncio.get_running_loop()
        if deadline is None:
            deadline = loop.time() + PATIENCE
        pause = FIRST_PAUSE
        while True:
            try:
                if self._db is None or self._pid != os.getpid():
                    await asyncio.to_thread(self._connect, max(0.0, deadline - loop.time()))
                return self._run(work, writes=writes)
            except StoreBusy:
                left = deadline - loop.time()
                if left <= 0:
                    raise
            # Not in step with others that wait.
            await asyncio.sleep(min(left, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, LAST_PAUSE)

    def _run(self, work: Callable[[sqlite3.Connection], Result], *, writes: bool) -> Result:
        if not self._mutex.acquire(blocking=False):
            raise StoreBusy(f"store {str(self.path)!r}: another thread uses it")
        try:
            db = self._db
            if db is None:
                raise StoreBusy(f"store {str(self.path)!r} was closed at this moment")
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

    def _connect(self, wait: float) -> None:
        """Opens the database, made or brought to this version where that is needed; runs in a thread of its own."""
        if not self._mutex.acquire(timeout=wait):
            raise StoreBusy(f"store {str(self.path)!r}: another thread has been opening it for {wait:g} s")
        try:
            if self._pid != os.getpid():
                # SQLite's connections must not be used, nor closed, in a forked child.
                _inherited.extend(db for db in [self._db] if db is not None)
                self._db, self._lock, self._number, self._mine = None, None, 0, set()
            if self._db is None:
                self._db, self._pid = self._connected(wait), os.getpid()
        finally:
            self._mutex.release()

    def _connected(self, wait: float) -> sqlite3.Connection:
        db = None
        try:
            # One that exists is not opened here: closing it would drop the locks that SQLite has on it in this process.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(self.path, timeout=wait, isolation_level=None, check_same_thread=False)
            self._check(db)
            [mode] = _busy_is_retried(lambda: db.execute("PRAGMA journal_mode = WAL").fetchone(), wait)
            if mode != "wal":
                raise StoreError(f"store {str(self.path)!r}: SQLite has no WAL there (journal mode {mode}); put it on a local file system")
            db.execute("PRAGMA synchronous = NORMAL")
            [[damage], *_] = db.execute("PRAGMA quick_check(1)").fetchall()
            if damage != "ok":
                raise InvalidState(f"store {str(self.path)!r} is damaged ({damage}); it is left as it is")
            self._migrate(db)
            self._clear_after_boot(db)
            db.execute("PRAGMA busy_timeout = 0")
        except BaseException as error:
            if db is not None:
                db.close()
            if isinstance(error, (sqlite3.Error, OSError)):
                raise self._translated(error) from error
            raise
        return db

    def _check(self, db: sqlite3.Connection) -> None:
        """Raises unless the database is one of ours, or empty."""
        [whose] = db.execute("PRAGMA application_id").fetchone()
        [version] = db.execute("PRAGMA user_version").fetchone()
        if whose != APPLICATION_ID and (whose or version or db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()):
            raise InvalidState(f"store {str(self.path)!r} is a SQLite database of something else; it is left as it is")
        if version > len(MIGRATIONS):
            raise NewerState(
                f"store {str(self.path)!r} was written by a newer pyblock (version {version}, this one reads up to {len(MIGRATIONS)}); "
                "it is left as it is"
            )

    def _migrate(self, db: sqlite3.Connection) -> None:
        [version] = db.execute("PRAGMA user_version").fetchone()
        if version == len(MIGRATIONS):
            return
        db.execute("BEGIN IMMEDIATE")
        self._check(db)  # another process may have been here first
        [version] = db.execute("PRAGMA user_version").fetchone()
        for script in MIGRATIONS[version:]:
            for statement in filter(str.strip, script.split(";")):
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
            log.warning(
                "store %s: %d devices of an earlier boot of this host are forgotten; their machines ended with it", self.path, count
            )
        db.execute("UPDATE host SET boot = ?", (boot,))
        db.execute("COMMIT")

    def _translated(self, error: sqlite3.Error | OSError) -> PyblockError:
        where = f"store {str(self.path)!r}"
        if isinstance(error, OSError):
            return StoreError(f"{where}: {error.strerror}; name another folder in PYBLOCK_STATE_DIR, or mend this one")
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreBusy(f"{where}: another process has been holding its lock; nothing was changed")
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
            return InvalidState(f"{where} is not a store, or is damaged: {error}; it is left as it is")
        return StoreError(f"{where}: {error}; nothing was changed (a full disk or a folder that may not be written?)")


_inherited: list[sqlite3.Connection] = []


def _busy_is_retried(work: Callable[[], Result], wait: float) -> Result:
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


def _image(claim: Claim) -> str:
    return ":".join(map(str, claim.identity))


def _access(claim: Claim) -> int:
    return READ_ONLY * claim.read_only | SHARE * claim.share


def _claim(claim: Claim, access: int) -> Claim:
    return Claim(claim.identity, bool(access & READ_ONLY), bool(access & SHARE))
