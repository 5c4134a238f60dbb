"""The host's store: sandboxes, their owners, and a row for each device, in one SQLite database
(WAL) that many processes use at once.

Every method is one transaction. What it costs does not depend on how much is in the database: every
look-up has an index.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sqlite3
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from pyblock.disk.lineage import Identity, in_words
from pyblock.errors import (
    ImageInUse,
    InvalidValue,
    SandboxBusy,
    SandboxConflict,
    StateError,
    StoreError,
    UnknownSandbox,
)
from pyblock.store.base import Claim, Claimant, Relation, Row, Standing, Store, Stored
from pyblock.store.record import drive_id_of
from pyblock.store.sqlite.file import SqliteFile, image_text, image_told
from pyblock.store.sqlite.owner import OwnerLock

Result = TypeVar("Result")

READ_ONLY, SHARE = 1, 2  # the bits of `access`


# A device of a sandbox that is its owner's, whose number comes last.
_ITS = (
    "sandbox = ? AND id = ? AND EXISTS (SELECT 1 FROM sandbox WHERE sandbox.id = device.sandbox "
    "AND owner = ?)"
)
_DELETE = f"DELETE FROM device WHERE {_ITS}"
_UPDATE = f"UPDATE device SET state = ? WHERE {_ITS}"


def _against(access: int) -> str:
    """The accesses of claims that one with this access does not fit."""
    claims = [Claim(("", 0, 0), bool(each & READ_ONLY), bool(each & SHARE)) for each in range(4)]
    return ", ".join(str(each) for each in range(4) if not claims[access].fits(claims[each]))


# By access: who holds a claim on an image that this one does not fit, or on what lies on it. The
# same image a second time in one sandbox is that sandbox's own business.
_SAME = "SELECT sandbox, id, access, 1 FROM device WHERE image = :image AND access IN ({})"
_HOLDERS = tuple(
    (
        _SAME
        + " AND sandbox <> :own UNION ALL SELECT device.sandbox, id, device.access, 0 FROM under "
        "JOIN device ON device.sandbox = under.sandbox AND id = device AND device.image = top "
        "WHERE under.image = :image AND under.access IN ({}) AND (device.sandbox, id) <> (:own, "
        ":device) LIMIT 1"
    ).format(against, against)
    for against in map(_against, range(4))
)
_HOLDERS_UNDER = tuple(
    (_SAME + " AND (sandbox, id) <> (:own, :device) LIMIT 1").format(_against(access))
    for access in range(4)
)


class SqliteStore(Store):
    """:param path: the database; made if absent, private to its user. Its folder must be there, on
    a local file system."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = SqliteFile(path)
        # the lock that shows that this process lives, and its number there
        self._owner: tuple[OwnerLock, int] | None = None
        # sandboxes that this process has open, and which opening of all it was
        self._mine: dict[str, int] = {}
        self._openings = itertools.count(1)
        self._given_up: set[str] = set()  # sandboxes that it closed, which is not written down yet

    def __repr__(self) -> str:
        return f"<SqliteStore {str(self.path)!r}>"

    @property
    def path(self) -> Path:
        """The database."""
        return self._file.path

    async def open_sandbox(self, sandbox_id: str, vm: str, deadline: float | None = None) -> Stored:
        if not vm.isascii():
            _check_text(vm)
        opening = next(self._openings)

        def take(db: sqlite3.Connection) -> Stored:
            self._drop(sandbox_id, opening)  # of a transaction that came to nothing
            stored = self._take(db, sandbox_id, vm)
            self._mine[sandbox_id] = opening  # while no other thread is in here
            return stored

        try:
            stored = await self._change(take, deadline)
        except BaseException:
            self._drop(sandbox_id, opening)
            raise
        self._given_up.discard(sandbox_id)
        return stored._replace(opening=opening)

    def _drop(self, sandbox_id: str, opening: int) -> None:
        if self._mine.get(sandbox_id) == opening:
            del self._mine[sandbox_id]

    async def close_sandbox(self, sandbox_id: str, deadline: float | None = None) -> None:
        self._mine.pop(sandbox_id, None)
        self._given_up.add(sandbox_id)  # with the next transaction, if not with this one
        await self._change(lambda db: None, deadline)

    def abandon(
        self, sandbox_id: str, opening: int, loop: asyncio.AbstractEventLoop | None = None
    ) -> bool:
        if (
            self._mine.get(sandbox_id) != opening
            or self._owner is None
            or self._owner[0] is not self._file.lock
        ):
            return False
        del self._mine[sandbox_id]
        self._given_up.add(sandbox_id)
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(self._write_down_given_up)
        return True

    def _write_down_given_up(self) -> None:
        given_up: list[str] = []
        with contextlib.suppress(StoreError, StateError):  # with the next transaction
            self._file.transact_now(lambda db: given_up.extend(self._give_up(db)))
            self._given_up.difference_update(given_up)

    async def _change(
        self, work: Callable[[sqlite3.Connection], Result], deadline: float | None
    ) -> Result:
        """A transaction that also writes down what was given up."""
        given_up: list[str] = []

        def both(db: sqlite3.Connection) -> Result:
            given_up[:] = self._give_up(db)
            return work(db)

        result = await self._file.transact(both, deadline)
        self._given_up.difference_update(given_up)
        return result

    async def write(
        self,
        sandbox_id: str,
        rows: Callable[[], Sequence[Row]],
        deadline: float | None = None,
        *,
        own: bytes | None = None,
        all_or_none: bool = False,
    ) -> dict[str, ImageInUse]:
        work = partial(
            self._write, sandbox_id=sandbox_id, rows=rows, own=own, all_or_none=all_or_none
        )
        try:
            # Mostly nothing was given up, and it is a transaction of its own.
            return await (
                self._change(work, deadline)
                if self._given_up
                else self._file.transact(work, deadline)
            )
        except _Refused as refused:
            return refused.errors

    async def meet(self, sandbox_id: str, machine: str, deadline: float | None = None) -> None:
        await self._change(lambda db: self._meet(db, sandbox_id, machine), deadline)

    async def drives_of_others(
        self, sandbox_id: str, machine: str, deadline: float | None = None
    ) -> set[str]:
        def work(db: sqlite3.Connection) -> set[str]:
            others = (
                "SELECT id FROM sandbox WHERE id <> :own AND (machine = '' OR :machine = '' OR "
                "machine = :machine)"
            )
            rows = db.execute(
                f"SELECT id, state FROM device WHERE sandbox IN ({others})",
                {"own": sandbox_id, "machine": machine},
            )
            return {
                drive_id for device_id, data in rows if (drive_id := drive_id_of(device_id, data))
            }

        return await self._file.transact(work, deadline, writes=False)

    async def read(self, sandbox_id: str, deadline: float | None = None) -> Stored:
        return await self._file.transact(
            lambda db: self._read(db, sandbox_id), deadline, writes=False
        )

    async def find(self, vm: str, deadline: float | None = None) -> str | None:
        if not vm.isascii():
            _check_text(vm)

        def work(db: sqlite3.Connection) -> str | None:
            found = db.execute("SELECT id FROM sandbox WHERE vm = ?", (vm,)).fetchone()
            return found[0] if found else None

        return await self._file.transact(work, deadline, writes=False)

    async def sandboxes(self, deadline: float | None = None) -> list[str]:
        return await self._file.transact(
            lambda db: [row[0] for row in db.execute("SELECT id FROM sandbox ORDER BY id")],
            deadline,
            writes=False,
        )

    async def standings(self, deadline: float | None = None) -> list[Standing]:
        query = (
            "SELECT id, vm, owner, owner_text, (SELECT COUNT(*) FROM device WHERE sandbox = "
            "sandbox.id) FROM sandbox ORDER BY id"
        )

        def work(db: sqlite3.Connection) -> list[Standing]:
            return [
                Standing(name, vm or "", self._living(owner, text), count)
                for name, vm, owner, text, count in db.execute(query)
            ]

        return await self._file.transact(work, deadline, writes=False)

    async def holders(
        self, image: Identity, under: Sequence[Identity] = (), deadline: float | None = None
    ) -> list[Claimant]:
        return await self._file.transact(
            lambda db: self._holders(db, image, under), deadline, writes=False
        )

    def close(self) -> None:
        self._file.close()
        self._mine.clear()
        self._given_up.clear()

    # The transactions.

    def _take(self, db: sqlite3.Connection, sandbox_id: str, vm: str) -> Stored:
        lock, number = self._register(db)
        if vm:
            self._take_machine(db, sandbox_id, vm)
        row = db.execute(
            "SELECT vm, owner, owner_text FROM sandbox WHERE id = ?", (sandbox_id,)
        ).fetchone()
        if row is None:
            db.execute(
                "INSERT INTO sandbox (id, vm, owner_text, state) VALUES (?, ?, '', x'')",
                (sandbox_id, vm or None),
            )
        else:
            had, owner, text = row
            if (owner == number and sandbox_id in self._mine) or (
                owner is not None and owner != number and lock.lives(owner)
            ):
                why = (
                    f"sandbox {sandbox_id!r} belongs to {text}; it is free when that closes it or "
                    "ends"
                )
                raise SandboxBusy(why, sandbox=sandbox_id, owner=text)
            if had is not None and had != vm:
                raise SandboxConflict(
                    f"sandbox {sandbox_id!r} is in the store with the machine {had}, not "
                    f"{vm or 'one in memory'}; "
                    f"if that machine is gone, give it up with: pyblock forget {sandbox_id}",
                    sandbox=sandbox_id,
                    vm=had,
                    holder=sandbox_id,
                )
        program = Path(sys.argv[0]).name.encode(errors="backslashreplace").decode() or "python"
        text = f"process {os.getpid()} ({program})"
        db.execute(
            "UPDATE sandbox SET owner = ?, owner_text = ?, vm = ? WHERE id = ?",
            (number, text, vm or None, sandbox_id),
        )
        return self._read(db, sandbox_id)

    def _take_machine(self, db: sqlite3.Connection, sandbox_id: str, vm: str) -> None:
        """Raises SandboxConflict when the machine belongs to another sandbox. One whose process
        died with nothing in it does not count."""
        row = db.execute(
            "SELECT id, owner, state FROM sandbox WHERE vm = ? AND id <> ?", (vm, sandbox_id)
        ).fetchone()
        if row is None:
            return
        other, owner, state = row
        empty = (
            not state
            and db.execute("SELECT 1 FROM device WHERE sandbox = ? LIMIT 1", (other,)).fetchone()
            is None
        )
        if not empty or (owner is not None and self._lives(owner)):
            text = (
                f"the machine {vm} belongs to sandbox {other!r} in the {self._file.name}, not to "
                f"{sandbox_id!r}"
            )
            raise SandboxConflict(text, sandbox=sandbox_id, vm=vm, holder=other)
        db.execute("DELETE FROM sandbox WHERE id = ?", (other,))

    def _meet(self, db: sqlite3.Connection, sandbox_id: str, machine: str) -> None:
        self._check_owned(db, sandbox_id)
        row = db.execute(
            "SELECT id, vm, owner FROM sandbox WHERE machine = ? AND id <> ?", (machine, sandbox_id)
        ).fetchone()
        if row is not None:
            other, vm, owner = row
            if (owner is not None and self._lives(owner)) or db.execute(
                "SELECT 1 FROM device WHERE sandbox = ? LIMIT 1", (other,)
            ).fetchone():
                raise SandboxConflict(
                    f"the machine of sandbox {sandbox_id!r} is that of sandbox {other!r}, which "
                    f"has another address for it ({vm}); "
                    "one machine belongs to one sandbox",
                    sandbox=sandbox_id,
                    vm=vm,
                    holder=other,
                )
            db.execute("UPDATE sandbox SET machine = '' WHERE id = ?", (other,))
        db.execute("UPDATE sandbox SET machine = ? WHERE id = ?", (machine, sandbox_id))

    def _register(self, db: sqlite3.Connection) -> tuple[OwnerLock, int]:
        """The lock that shows that this process lives, and its number, which it keeps even if the
        transaction comes to nothing."""
        lock = self._file.lock
        if lock is None:
            raise StoreError(f"{self._file.name} was closed at this moment")
        if self._owner is not None and self._owner[0] is lock:
            # The transaction that counted it may have come to nothing: nobody else may have it
            # after this process.
            db.execute(
                "UPDATE host SET owners = :number WHERE owners < :number",
                {"number": self._owner[1]},
            )
            return self._owner
        self._mine.clear()  # of a parent, or of the time before `close`
        self._given_up.clear()
        while True:
            db.execute("UPDATE host SET owners = owners + 1")
            [number] = db.execute("SELECT owners FROM host").fetchone()
            try:
                lock.take(number)
            except BlockingIOError:
                # of a process whose transaction came to nothing, or that uses a database which was
                # here before this one
                continue
            self._owner = lock, number
            return self._owner

    def _give_up(self, db: sqlite3.Connection) -> list[str]:
        """Has the sandboxes that were closed be nobody's; one of which nothing is kept goes.
        Returns them."""
        if not self._given_up or self._owner is None or self._owner[0] is not self._file.lock:
            return []
        given_up = list(self._given_up)  # one more may come at any moment, out of a deleted object
        for sandbox_id in given_up:
            key = (sandbox_id, self._owner[1])
            kept = "EXISTS (SELECT 1 FROM device WHERE sandbox = sandbox.id)"
            if not db.execute(
                f"DELETE FROM sandbox WHERE id = ? AND owner = ? AND state = x'' AND NOT {kept}",
                key,
            ).rowcount:
                db.execute(
                    "UPDATE sandbox SET owner = NULL, owner_text = '' WHERE id = ? AND owner = ?",
                    key,
                )
        return given_up

    def _write(
        self,
        db: sqlite3.Connection,
        *,
        sandbox_id: str,
        rows: Callable[[], Sequence[Row]],
        own: bytes | None,
        all_or_none: bool,
    ) -> dict[str, ImageInUse]:
        number = (
            self._owner[1]
            if self._owner is not None and self._owner[0] is self._file.lock
            else None
        )
        owned = False  # whoever has changed a row as its owner is that
        refused: dict[str, ImageInUse] = {}
        found = rows()
        # those that go come first: another may have their image, or their index, by now
        for row in found:
            if (
                row.record is None
                and db.execute(_DELETE, (sandbox_id, row.device_id, number)).rowcount
            ):
                owned = True
        for row in found:
            if row.record is None:
                continue
            key = (row.record, sandbox_id, row.device_id, number)
            if row.claim is not None and not row.claiming and db.execute(_UPDATE, key).rowcount:
                owned = True
            elif (holder := self._insert(db, sandbox_id, row, row.record)) is not None:
                refused[row.device_id] = holder
        if not owned:
            self._check_owned(db, sandbox_id)
        if refused and all_or_none:
            raise _Refused(refused)
        if own is not None:
            db.execute("UPDATE sandbox SET state = ? WHERE id = ?", (own, sandbox_id))
        return refused

    def _check_owned(self, db: sqlite3.Connection, sandbox_id: str) -> None:
        number = (
            self._owner[1]
            if self._owner is not None and self._owner[0] is self._file.lock
            else None
        )
        if (
            db.execute(
                "SELECT 1 FROM sandbox WHERE id = ? AND owner = ?", (sandbox_id, number)
            ).fetchone()
            is None
        ):
            owner, text = db.execute(
                "SELECT owner, owner_text FROM sandbox WHERE id = ?", (sandbox_id,)
            ).fetchone() or (None, "")
            why = (
                f"{self._file.name}: sandbox {sandbox_id!r} is not this process's any more; "
                "nothing was changed"
            )
            raise StoreError(why, sandbox=sandbox_id, owner=self._living(owner, text))

    def _insert(
        self, db: sqlite3.Connection, sandbox_id: str, row: Row, record: bytes
    ) -> ImageInUse | None:
        """Writes a row that is new, or whose claim is; who holds a claim that it does not fit, if
        somebody does."""
        claim = row.claim
        image = access = None
        if claim is not None:
            image, access = (
                image_text(claim.identity),
                READ_ONLY * claim.read_only | SHARE * claim.share,
            )
            asked = {"image": image, "own": sandbox_id, "device": row.device_id}
            if (found := db.execute(_HOLDERS[access], asked).fetchone()) is not None:
                return self._held(db, claim, found[:3], "it" if found[3] else "what lies on it")
            if claim.under and (holder := self._holder_under(db, asked, claim, access)) is not None:
                return holder
        db.execute(
            "INSERT INTO device VALUES (?, ?, ?, ?, ?) ON CONFLICT (sandbox, id) "
            "DO UPDATE SET state = excluded.state, image = excluded.image, access = "
            "excluded.access",
            (sandbox_id, row.device_id, record, image, access),
        )
        if claim is not None and claim.under:  # most have nothing under them
            db.execute(
                "DELETE FROM under WHERE sandbox = ? AND device = ?", (sandbox_id, row.device_id)
            )
            values = [
                (image_text(lower), access, sandbox_id, row.device_id, image)
                for lower in claim.under
            ]
            db.executemany("INSERT INTO under VALUES (?, ?, ?, ?, ?)", values)
        return None

    def _holder_under(
        self, db: sqlite3.Connection, asked: dict[str, str], claim: Claim, access: int
    ) -> ImageInUse | None:
        """Who holds a claim on what lies under the image that this one does not fit."""
        for lower in claim.under:
            found = db.execute(
                _HOLDERS_UNDER[access], {**asked, "image": image_text(lower)}
            ).fetchone()
            if found is not None:
                return self._held(db, claim, found[:3], f"what lies under it ({in_words(lower)})")
        return None

    def _held(
        self, db: sqlite3.Connection, claim: Claim, found: tuple[str, str, int], what: str
    ) -> ImageInUse:
        holder, device_id, access = found
        [owner, text] = db.execute(
            "SELECT owner, owner_text FROM sandbox WHERE id = ?", (holder,)
        ).fetchone() or (None, "")
        lives = owner is not None and self._lives(owner)
        wants, has = ("read" if each else "write" for each in (claim.read_only, access & READ_ONLY))
        who = (
            f"of {text}"
            if lives
            else f"that no process has open (if its machine is gone: pyblock forget {holder})"
        )
        return ImageInUse(
            f"cannot be claimed to {wants} it: device {device_id} of sandbox {holder!r}, {who}, "
            f"has claimed {what} to {has} it; "
            "detach it there, or have both share it on purpose",
            holder=holder,
            owner=text if lives else "",
        )

    def _read(self, db: sqlite3.Connection, sandbox_id: str) -> Stored:
        row = db.execute(
            "SELECT vm, owner, owner_text, state FROM sandbox WHERE id = ?", (sandbox_id,)
        ).fetchone()
        if row is None:
            raise UnknownSandbox(
                f"no sandbox {sandbox_id!r} in the {self._file.name}", sandbox=sandbox_id
            )
        vm, owner, text, own = row
        devices = db.execute(
            "SELECT id, state FROM device WHERE sandbox = ? ORDER BY rowid", (sandbox_id,)
        ).fetchall()
        return Stored(
            sandbox_id,
            vm or "",
            self._living(owner, text),
            own,
            devices,
            f"{self._file.name}, sandbox {sandbox_id!r}",
        )

    def _holders(
        self, db: sqlite3.Connection, image: Identity, under: Sequence[Identity]
    ) -> list[Claimant]:
        whose = (
            "SELECT device.sandbox, owner, owner_text, device.id, device.image, device.access, "
            "device.state FROM device"
        )
        whose += " JOIN sandbox ON sandbox.id = device.sandbox"
        itself = f"{whose} WHERE device.image = ? ORDER BY device.rowid"
        on_it = (
            f"{whose} JOIN under ON under.sandbox = device.sandbox AND device = device.id AND top "
            "= device.image WHERE under.image = ?"
        )
        queries: list[tuple[Relation, str, Identity]] = [
            ("it", itself, image),
            *(("under it", itself, lower) for lower in under),
            ("on it", on_it, image),
        ]
        found: dict[tuple[str, str], Claimant] = {}
        for relation, query, asked in queries:
            for sandbox_id, owner, text, device_id, claimed, access, data in db.execute(
                query, (image_text(asked),)
            ):
                holder = Claimant(
                    sandbox_id, self._living(owner, text), device_id, image_told(claimed), relation,
                    bool(access & READ_ONLY), bool(access & SHARE), data,
                )  # fmt: skip
                found.setdefault((sandbox_id, device_id), holder)
        return list(found.values())

    def _living(self, owner: int | None, text: str) -> str:
        """What an owner is called, "" where it lives no more."""
        return text if owner is not None and self._lives(owner) else ""

    def _lives(self, owner: int) -> bool:
        if self._owner is not None and self._owner[1] == owner:
            return True
        return self._file.lock is not None and self._file.lock.lives(owner)


class _Refused(Exception):
    """Ends a transaction that is to write all or nothing."""

    def __init__(self, errors: dict[str, ImageInUse]) -> None:
        super().__init__()
        self.errors = errors


def _check_text(vm: str) -> None:
    try:
        vm.encode()
    except UnicodeEncodeError:
        text = (
            f"the VMM's address {vm!r} is no UTF-8 and cannot be written down; give its socket "
            "another name"
        )
        raise InvalidValue(text, vm=vm, value=vm) from None
