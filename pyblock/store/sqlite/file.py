"""The host's database file: opened, checked, brought to this version, and shared with other
processes, threads and event loops.

Machines die with the host, so it has to survive the death of any process and no more. What is
written is in the kernel's page cache, which outlives its process; nothing is ever waited for on the
disk (`synchronous=OFF`), neither a commit nor a checkpoint, for both happen in the event loop and a
slow disk would stop all sandboxes for a second. So a crash of the host may leave the file with some
pages old and some new. That is seen, and does no harm: whoever opens the database when nobody else
has it checks it as a whole; and the owners' file, which *is* synced once a boot, tells what an
earlier boot wrote (`boot.py`), which is removed, or put aside where it is damaged. Of what is kept
in doubt no machine runs either, if it is of an earlier boot; recovery asks for them, and `forget`
gives them up.

A transaction is some tens of microseconds, so it runs in the event loop; only waiting for another
process's lock yields to others. A signal handler may run at any bytecode of it, raise, and fork.
Hence the two things that must end with a transaction, the mutex and the transaction itself, are
held by `with` on objects of C: an exception cannot come between their beginning and the promise of
their end.
"""

from __future__ import annotations

import asyncio

# else asyncio.to_thread imports it, at a moment when no file can be opened perhaps
import concurrent.futures.thread  # noqa: F401
import contextlib
import errno
import logging
import os
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pyblock.disk.lineage import Identity, lineage_of
from pyblock.errors import (
    DescriptorsExhausted,
    InvalidState,
    NewerState,
    PyblockError,
    StoreBusy,
    StoreError,
)
from pyblock.store import files
from pyblock.store.base import PATIENCE
from pyblock.store.record import encode, encode_sandbox
from pyblock.store.sqlite import boot, forks
from pyblock.store.sqlite.owner import OwnerLock

log = logging.getLogger(__name__)

APPLICATION_ID = 0x7062_6C6B  # "pblk" in the file's header: whose database it is
# Each brings the database from the version before to its own, which is its place in this list,
# counted from 1.
MIGRATIONS = (
    """
    CREATE TABLE host (boot TEXT NOT NULL, owners INTEGER NOT NULL);
    CREATE TABLE sandbox (id TEXT PRIMARY KEY, vm TEXT UNIQUE, owner INTEGER, owner_text TEXT NOT NULL, state BLOB NOT NULL);
    CREATE TABLE device (sandbox TEXT NOT NULL, id TEXT NOT NULL, state BLOB NOT NULL, image TEXT, access INTEGER, UNIQUE (sandbox, id));
    CREATE INDEX claim ON device (image, access, sandbox) WHERE image IS NOT NULL;
    INSERT INTO host VALUES ('', 0);
    """,  # noqa: E501
    # A device's row has its claim on the image itself (`top`); these are on what lies under that.
    # They hold while that claim does.
    """
    CREATE TABLE under (image TEXT NOT NULL, access INTEGER NOT NULL, sandbox TEXT NOT NULL, device TEXT NOT NULL, top TEXT NOT NULL);
    CREATE INDEX under_image ON under (image, access);
    CREATE INDEX under_device ON under (sandbox, device);
    CREATE TRIGGER under_goes AFTER DELETE ON device BEGIN
        DELETE FROM under WHERE sandbox = OLD.sandbox AND device = OLD.id;
    END;
    """,  # noqa: E501
    # What two addresses of one machine have in common, '' where nobody knows.
    """
    ALTER TABLE sandbox ADD COLUMN machine TEXT NOT NULL DEFAULT '';
    CREATE INDEX machine ON sandbox (machine) WHERE machine <> '';
    """,
    # Which boot it is of is noted beside it since. Without a boot_id here a process of version 1,
    # which would believe it, clears nothing.
    """
    UPDATE host SET boot = '';
    """,
    # `state` has records since (`record.py`), which `_rewrite` makes of the rows of before. One
    # that cannot be read stays as it is.
    "",
)
RECORDS = 5  # the first version whose rows are records
# of the journal, until they are copied into the database: some tenths of a millisecond
CHECKPOINT_PAGES = 200
FIRST_PAUSE = 0.0005  # seconds until a lock is tried again; a transaction holds it for less
LAST_PAUSE = 0.02
INTERRUPTED = 0.01  # seconds between two tries of a fork to end what another thread opens

# the last: a table is not there
_DAMAGE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR)

Result = TypeVar("Result")

_spoiled: set[str] = set()  # databases that a parent had open in the middle of a fork


class SqliteFile:
    """:param path: the database; made if absent, private to its user. Its folder must be there, on
    a local file system, and writable by
        this user only.

    Raises StoreError where there is no such path.

    :ivar lock: shows that this process lives; None until the file is open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._db: sqlite3.Connection | None = None
        self.lock: OwnerLock | None = None
        try:
            self.path = Path(path).absolute()
        except OSError as error:
            text = (
                f"store {os.fspath(path)!r}: the working folder is gone ({error.strerror}); give "
                "an absolute path"
            )
            raise StoreError(text, path=os.fsdecode(path)) from error
        self._where = str(self.path)
        self._inode = (0, 0)  # of what was opened
        # of threads with event loops of their own; a signal handler comes in where its thread is
        # inside
        self._mutex = threading.RLock()
        self._opening: sqlite3.Connection | None = None
        self._in_opening = False
        forks.watch(self)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at the end of the interpreter contextlib may be gone
            self.close()
        except Exception:
            pass

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"store {str(self.path)!r}"

    async def transact(
        self,
        work: Callable[[sqlite3.Connection], Result],
        deadline: float | None,
        *,
        writes: bool = True,
    ) -> Result:
        """Runs a transaction as soon as no other process holds the lock; what it runs may be run
        again, after a transaction that came to nothing. Raises StoreBusy when that is not before
        the deadline, an event-loop time in seconds (None: PATIENCE from now)."""
        loop = asyncio.get_running_loop()
        if deadline is None:
            deadline = loop.time() + PATIENCE
        pause = FIRST_PAUSE
        while True:
            try:
                if self._db is None:
                    await self._in_thread(self._open)
                return self.transact_now(work, writes=writes)
            except StoreBusy as busy:
                busy.about(path=str(self.path))
                left = deadline - loop.time()
                if left <= 0:
                    raise
            except PyblockError as error:
                error.about(path=str(self.path))
                raise
            # Not in step with others that wait.
            await asyncio.sleep(min(left, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, LAST_PAUSE)

    def transact_now(
        self, work: Callable[[sqlite3.Connection], Result], *, writes: bool = True
    ) -> Result:
        """The same without waiting: raises StoreBusy when another process holds the lock, or the
        file is not open."""
        db, before = None, sys.exception()
        try:
            with self._mutex:
                db = self._db
                if db is None:
                    raise StoreBusy(f"{self.name} was closed at this moment")
                try:
                    status = os.stat(self._where)  # noqa: PTH116 - of every transaction
                    found = status.st_dev, status.st_ino
                except FileNotFoundError:
                    found = (0, 0)
                if found != self._inode:
                    raise StoreError(
                        f"{self.name} was removed or replaced while it was in use; end what uses "
                        "it, and look which one is right"
                    )
                with db:  # commits, or rolls back
                    db.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                    result = work(db)
        except (sqlite3.Error, OSError) as error:
            ended_by = error.__context__
            if (
                ended_by is not None
                and ended_by is not before
                and not isinstance(ended_by, Exception)
            ):
                # what a signal handler raised; that nothing could be rolled back is no news then
                raise ended_by from None
            if db is not None and self._db is not db:
                raise StoreBusy(
                    f"{self.name} was closed in the middle of a transaction; nothing was changed"
                ) from error
            raise self._translated(error) from error
        return result

    def close(self) -> None:
        """Closes what is open, and drops the lock; a later call opens it again."""
        with self._mutex:
            self._close()
            lock, self.lock = self.lock, None
            if lock is not None:
                lock.close()

    # What a fork and the end of the process ask for; see forks.py.

    def close_for_fork(self, deadline: float) -> None:
        """See forks.Database."""
        if self._acquired(deadline):
            try:
                self._close()
            finally:
                self._mutex.release()

    def begin_in_child(self) -> None:
        """See forks.Database."""
        if self._db is not None or self._in_opening:
            _spoiled.add(os.path.realpath(self.path))
            _keep_for_ever(self._db, self._opening)
            self._db = None
        self._opening, self._in_opening = None, False
        self.lock = None  # it is the parent's, and has closed itself
        # the old one may be another thread's, which is not in the child
        self._mutex = threading.RLock()

    def close_at_exit(self, deadline: float) -> None:
        """See forks.Database."""
        if self._acquired(deadline):
            try:
                self.close()
            finally:
                self._mutex.release()

    def _acquired(self, deadline: float) -> bool:
        """Takes the mutex, and has a thread that is opening the database break off. False: it was
        not to be had before the deadline."""
        while not self._mutex.acquire(timeout=INTERRUPTED):
            if (opening := self._opening) is not None:
                with contextlib.suppress(sqlite3.Error):  # it was closed at this moment
                    opening.interrupt()
            if time.monotonic() > deadline:
                return False
        return True

    def _close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _on_disk(self) -> tuple[int, int]:
        try:
            status = os.stat(self._where)  # noqa: PTH116 - of every transaction
        except FileNotFoundError:
            return (0, 0)
        return (status.st_dev, status.st_ino)

    # Opening.

    async def _in_thread(self, work: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(work)
        except RuntimeError as error:
            # no thread can be started: there are too many, or the interpreter ends
            raise StoreError(f"{self.name} cannot be opened: {error}") from error

    def _open(self) -> None:
        """Opens the database, made or brought to this version where that is needed; runs in a
        thread of its own. Waits for nobody, for a fork would wait with it: raises StoreBusy."""
        if not self._mutex.acquire(blocking=False):
            raise StoreBusy(f"{self.name}: another thread uses it")
        try:
            if self._db is None:
                if forks.forking():
                    raise StoreBusy(f"{self.name}: another thread is forking the process")
                self._in_opening = True
                self._db, self.lock = self._connected(self.lock)
                self._inode = self._on_disk()
        finally:
            self._opening, self._in_opening = None, False
            self._mutex.release()

    def _connected(self, had: OwnerLock | None) -> tuple[sqlite3.Connection, OwnerLock]:
        """:param had: the lock that has accompanied the database all the time, if there is one:
        then it is as it was."""
        lock = had
        try:
            self._check_files()
            lock = lock or OwnerLock(files.owners_of(self.path))
            alone = had is None and lock.exclude()
            if not alone and not lock.accompany():
                raise StoreBusy(f"{self.name} is being opened and checked by another process")
            db = self._connected_alone(lock) if alone else self._connection()
        except BaseException as error:
            if lock is not None and had is None:
                lock.close()
            if isinstance(error, (sqlite3.Error, OSError, _Damage)):
                raise self._translated(error) from error
            raise
        return db, lock

    def _check_files(self) -> None:
        try:
            where = os.path.realpath(self.path)
            files.check(self.path)
        except ValueError as error:  # a NUL, or half a surrogate pair
            raise StoreError(f"{self.name} cannot be a file: {error}; give another path") from error
        if where in _spoiled:
            raise StoreError(
                f"{self.name}: this process was forked while another thread was in the middle of "
                "a transaction, and can never use it; "
                "use the store in a process that was started otherwise"
            )
        # One that exists is not opened here: closing it would drop the locks that SQLite has on it
        # in this process.
        with contextlib.suppress(FileExistsError):
            os.close(
                os.open(
                    self.path,
                    os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                    0o600,
                )
            )
        files.used.add(where)

    def _connected_alone(self, lock: OwnerLock) -> sqlite3.Connection:
        """The database, while nobody else can open it: looked at as a whole, and without what an
        earlier boot left. Others may, after."""
        now, noted = boot.this_boot(), boot.decode(lock.read_note())
        earlier = now.is_not(noted)
        try:
            db = self._connection(whole=True, clear=earlier)
        except (_Damage, sqlite3.DatabaseError) as error:
            if not earlier or not _is_damage(error):
                raise
            self._put_aside(noted.id)
            db = self._connection()
        try:
            if not now.says_as_much_as(noted):
                lock.write_note(boot.encode(now))  # before anything is written that is of this boot
            lock.accompany()
        except BaseException:
            db.close()
            raise
        return db

    def _connection(self, *, whole: bool = False, clear: bool = False) -> sqlite3.Connection:
        """A connection to a database of this version. Raises also sqlite3.Error, OSError.

        :param whole: it is checked as a whole; nobody else has it open.
        :param clear: what is in it goes.
        """
        db = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        self._opening = db
        try:
            self._check(db)
            db.execute("PRAGMA synchronous = OFF")
            if whole:
                self._check_whole(db)
            self._migrate(db)
            if clear:
                self._clear(db)
            [mode] = db.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StoreError(
                    f"{self.name}: SQLite has no WAL there (journal mode {mode}); put it on a "
                    "local file system"
                )
            db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        except BaseException:
            db.close()
            raise
        return db

    def _check(self, db: sqlite3.Connection) -> int:
        """The version of the database, 0 for an empty one. Raises unless it is one of ours."""
        inside = db.in_transaction
        if not inside:
            # what is read belongs to one moment: another process may be making the tables
            db.execute("BEGIN")
        [whose] = db.execute("PRAGMA application_id").fetchone()
        [version] = db.execute("PRAGMA user_version").fetchone()
        tables = db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        if not inside:
            db.execute("COMMIT")
        if whose != APPLICATION_ID and (whose or version or tables):
            raise InvalidState(
                f"{self.name} is a SQLite database of something else; it is left as it is"
            )
        if version > len(MIGRATIONS):
            raise NewerState(
                f"{self.name} was written by a newer pyblock (version {version}, this one reads "
                f"up to {len(MIGRATIONS)}); "
                "it is left as it is"
            )
        return int(version)

    def _check_whole(self, db: sqlite3.Connection) -> None:
        """Raises _Damage when something is missing, indexes included. Nobody else has the database
        open, so its file holds whole pages."""
        [size] = db.execute("PRAGMA page_size").fetchone()
        if rest := self.path.stat().st_size % size:
            raise _Damage(f"cut off: {rest} bytes are no page of {size}")
        [[damage], *_] = db.execute("PRAGMA integrity_check(1)").fetchall()
        if damage != "ok":
            raise _Damage(f"damaged ({' '.join(damage.split())})")

    def _migrate(self, db: sqlite3.Connection) -> None:
        version = self._check(db)
        if version == len(MIGRATIONS):
            return
        if version:
            # nothing is written to what is ours by name only
            db.execute("SELECT 1 FROM host, sandbox, device LIMIT 0")
        db.execute("BEGIN IMMEDIATE")
        version = self._check(db)  # another process may have been here first
        for script in MIGRATIONS[version:]:
            for statement in _statements(script):
                db.execute(statement)
        if version == 1:
            self._tell_what_lies_under(db)
        if 0 < version < RECORDS:
            _rewrite(db)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")

    def _tell_what_lies_under(self, db: sqlite3.Connection) -> None:
        """Has the claims of version 1, which looked at a block device and no further, hold as those
        of now do."""
        rows = db.execute(
            "SELECT rowid, sandbox, id, image, access FROM device WHERE image LIKE 'block:%'"
        ).fetchall()
        for rowid, sandbox, device, image, access in rows:
            _, major, minor = image.split(":")
            try:
                lineage = lineage_of(("block", int(major), int(minor)))
            except DescriptorsExhausted as error:
                raise StoreError(
                    f"{self.name} cannot be brought to this version now: {error}"
                ) from error
            top = image_text(lineage.identity)
            db.execute("UPDATE device SET image = ? WHERE rowid = ?", (top, rowid))
            values = [(image_text(lower), access, sandbox, device, top) for lower in lineage.claims]
            db.executemany("INSERT INTO under VALUES (?, ?, ?, ?, ?)", values)

    def _clear(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")
        count = db.execute("DELETE FROM device").rowcount
        db.execute("DELETE FROM sandbox")
        db.execute("COMMIT")
        log.warning(
            "%s: %d devices of an earlier boot of this host are forgotten; their machines ended "
            "with it",
            self.name,
            count,
        )

    def _put_aside(self, boot_id: str) -> None:
        """Renames a damaged database of an earlier boot, with what SQLite kept beside it."""
        aside = f"{self.path}.damaged-{boot_id}"
        for suffix in ("-wal", "-journal", ""):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")  # noqa: PTH105
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}-shm")  # noqa: PTH108
        log.warning(
            "%s was damaged when the host went down, and is %r now; its machines ended with the "
            "host",
            self.name,
            aside,
        )
        self._check_files()  # makes it anew

    def _translated(self, error: sqlite3.Error | OSError | _Damage) -> PyblockError:
        if isinstance(error, _Damage):
            return InvalidState(f"{self.name} is {error}; it is left as it is")
        if isinstance(error, OSError):
            full = error.errno in (errno.EMFILE, errno.ENFILE)
            advice = (
                "close some, or raise the limit (ulimit -n)"
                if full
                else "name another folder in PYBLOCK_STATE_DIR, or mend this one"
            )
            return StoreError(f"{self.name}: {error.strerror or error}; {advice}")
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreBusy(
                f"{self.name}: another process has been holding its lock; nothing was changed"
            )
        if code == sqlite3.SQLITE_INTERRUPT:
            return StoreBusy(
                f"{self.name}: another thread has forked the process while it was being opened; "
                "nothing was changed"
            )
        if code in _DAMAGE:
            return InvalidState(
                f"{self.name} is not a store, or is damaged: {error}; it is left as it is"
            )
        return StoreError(
            f"{self.name}: {error}; nothing was changed (a full disk, or a folder that may not be "
            "written?)"
        )


def _rewrite(db: sqlite3.Connection) -> None:
    """Makes records of rows of an older version; see old_rows.py."""
    # once in a store's life
    from pyblock.store.sqlite.old_rows import DAMAGE, record_of, sandbox_record_of  # noqa: PLC0415

    held: dict[str, set[int]] = {}
    for rowid, sandbox, device, data, image in db.execute(
        "SELECT rowid, sandbox, id, state, image FROM device"
    ).fetchall():
        with contextlib.suppress(*DAMAGE):
            record = record_of(device, data, image)
            db.execute("UPDATE device SET state = ? WHERE rowid = ?", (encode(record), rowid))
            held.setdefault(sandbox, set()).add(record.index)
    for sandbox, data in db.execute("SELECT id, state FROM sandbox WHERE state <> x''").fetchall():
        with contextlib.suppress(*DAMAGE):
            own = encode_sandbox(sandbox_record_of(data, held.get(sandbox, ())))
            db.execute("UPDATE sandbox SET state = ? WHERE id = ?", (own, sandbox))


def image_told(text: str) -> Identity:
    """The image that a text stands for."""
    kind, major, minor = text.split(":")
    return (kind, int(major), int(minor))


def image_text(identity: Identity) -> str:
    """An image as the database has it."""
    kind, major, minor = identity
    return f"{kind}:{major}:{minor}"


class _Damage(Exception):
    """The database is not whole; in words."""


def _is_damage(error: _Damage | sqlite3.Error) -> bool:
    """Whether the file is not whole, or is none of SQLite's; an error of the disk is another
    matter."""
    return isinstance(error, _Damage) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def _keep_for_ever(*connections: sqlite3.Connection | None) -> None:
    """Has them never be closed, not even at the end of the process: that would be done to the
    parent's files, with its locks."""
    import ctypes  # noqa: PLC0415 - of no use but here, where a fork came in the worst of moments

    for each in filter(None, connections):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


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
