"""Many processes at one store: an image has one writer, a sandbox one owner, and no operation is
lost or fails because others were there.

PYBLOCK_LONG=1 has the crowd go on for a minute instead of five seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import mmap
import os
import random
import sqlite3
import struct
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.snapshot import MakeImage
from support.store_scene import as_written

from pyblock import BlockDevice, ImageInUse, Sandbox, SandboxBusy
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.timeout(900)

LONG = os.environ.get("PYBLOCK_LONG") == "1"
SECONDS = 60.0 if LONG else 5.0
WATCH, PAUSE = 20, 0.0003  # looks without and seconds between looks with a pause
LATE = 300.0  # seconds: others that have not come by then never will


class OtherFailed(Exception):
    """Another process has failed, and will not come."""


class Board:
    """Numbers that forked processes share; what one of them writes, the others see.

    :param members: how many processes meet here.
    """

    def __init__(self, members: int, size: int = 0) -> None:
        self._members = members
        self._stage = 0  # of this process
        self._size = 1 + members + size
        self._memory = mmap.mmap(-1, 8 * self._size)

    def _get(self, place: int) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * place)[0])

    def _set(self, place: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * place, value)

    def __getitem__(self, place: int) -> int:
        return self._get(1 + self._members + place)

    def __setitem__(self, place: int, value: int) -> None:
        self._set(1 + self._members + place, value)

    def give_up(self) -> None:
        """Has everybody who waits, or is going to, fail."""
        self._set(0, 1)

    def meet(self, number: int) -> None:
        """Returns in all members when all have come. They watch for each other a while, so that
        they leave at the same moment where there are processors for them; where there are not, who
        waits makes room."""
        self._stage += 1
        self._set(1 + number, self._stage)
        deadline = time.monotonic() + LATE
        watched = 0
        while any(self._get(1 + other) < self._stage for other in range(self._members)):
            if self._get(0):
                raise OtherFailed
            assert time.monotonic() < deadline, "the others have not come"
            watched += 1
            time.sleep(0 if watched < WATCH else PAUSE)


def crowd(board: Board, members: int, work: Callable[[int], Any]) -> list[Any]:
    """Runs the function in so many forked processes at once, and returns what it returned in each;
    AssertionError when one fails."""
    readers = []
    for number in range(members):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # of forking beside threads; the child touches none of theirs
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            failed = True
            try:
                os.close(reader)
                text = json.dumps(work(number))
                failed = False
            except OtherFailed:
                text = ""
            except BaseException:
                board.give_up()
                text = traceback.format_exc()
            finally:
                with os.fdopen(writer, "w") as pipe:
                    pipe.write(text)
                os._exit(failed)
        os.close(writer)
        readers.append((child, reader))
    results = []
    for child, reader in readers:
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        results.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text))
    trouble = "\n".join(text for status, text in results if status != 0)
    assert all(status == 0 for status, _ in results), trouble or results
    return [json.loads(text) for _, text in results]


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def test_two_claim_one_image_for_writing(tmp_path: Path, make_image: MakeImage) -> None:
    rounds, image, path = 1000, make_image("a"), tmp_path / "state.db"
    board = Board(2)

    async def duel(number: int) -> list[bool]:
        store, vm, won = SqliteStore(path), MemoryHypervisor(), []
        async with Sandbox(f"sb{number}", vm, store=store) as sandbox:
            for _ in range(rounds):
                board.meet(number)
                try:
                    device = await sandbox.attach(image)
                except ImageInUse as error:
                    assert f"sb{1 - number}" in str(error)
                    assert not sandbox.devices and not len(sandbox.index) and not vm.backends
                    won.append(False)
                else:
                    won.append(True)
                board.meet(number)
                if won[-1]:
                    await sandbox.detach(device)
            steps = [step for step, _ in vm.journal[-1000:]]
            assert steps.count("backend-add") == steps.count("backend-del")
        store.close()
        return won

    first, second = crowd(board, 2, lambda number: asyncio.run(duel(number)))
    assert len(first) == len(second) == rounds
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert rows(path, "SELECT * FROM device") == rows(path, "SELECT * FROM sandbox") == []


@pytest.mark.parametrize("dies", [False, True], ids=["closed", "dropped"])
def test_many_open_one_sandbox(dies: bool, tmp_path: Path, make_image: MakeImage) -> None:
    """Who has it closes it, or dies with it: its lock goes, and nothing is written."""
    members, rounds, path, image = 8, 50, tmp_path / "state.db", make_image("a")
    board = Board(members, 1)

    async def contend(number: int) -> list[bool]:
        won = []
        for turn in range(rounds):
            store, vm = SqliteStore(path), MemoryHypervisor()
            sandbox = Sandbox("prize", vm, store=store, recover=False)
            await store.sandboxes()  # it is open, so that the race is for the sandbox
            board.meet(number)
            try:
                await sandbox.__aenter__()
            except SandboxBusy as error:
                assert "process " in str(error) and not sandbox.devices
                won.append(False)
            else:
                assert board[0] == 0
                board[0] = 1 + number
                won.append(True)
                assert len(sandbox.devices) == (turn > 0)
                if not turn:
                    await sandbox.attach(image)
            board.meet(number)
            if won[-1]:
                assert board[0] == 1 + number
                board[0] = 0
                if not dies:
                    await sandbox.close()
            store.close()
            board.meet(number)
        return won

    results = crowd(board, members, lambda number: asyncio.run(contend(number)))
    assert [sum(won) for won in zip(*results, strict=True)] == [1] * rounds


class Member:
    """One process of the crowd: some sandboxes, images of its own, images that all read, and one
    that all want to write.

    :ivar counts: how often each image is attached in each sandbox, counted here.
    """

    SANDBOXES = 2
    AT_ONCE = 3  # how often a device is attached at most

    def __init__(self, number: int, board: Board, folder: Path) -> None:
        self.number = number
        self.board = board
        self.choose = random.Random(number)
        self.store = SqliteStore(folder / "state.db")
        self.read = [str(folder / f"read-{one}") for one in range(4)]
        self.wanted = str(folder / "wanted")
        self.own = {
            f"sb{number}-{one}": [str(folder / f"own-{number}-{one}-{more}") for more in range(4)]
            for one in range(self.SANDBOXES)
        }
        self.vms = {name: MemoryHypervisor() for name in self.own}
        self.sandboxes: dict[str, Sandbox] = {}
        self.counts: dict[str, dict[str, int]] = {name: {} for name in self.own}
        self.done = self.lost = self.won = 0

    async def run(self) -> dict[str, Any]:
        self.board.meet(self.number)  # they make the store at once, too
        for name in self.own:
            await self.open(name)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            # its own sandboxes get in each other's way as well
            await asyncio.gather(*(self.step(name) for name in self.own))
        for name, sandbox in self.sandboxes.items():
            self.compare(name, sandbox)
            # The outcome of a detach is written when the store is free, be it after the detach has
            # returned.
            assert sandbox._machine.ledger is not None
            await sandbox._machine.ledger.flush()
        self.board.meet(self.number)
        # All are still there, with their sandboxes open, while one looks.
        seen = (
            rows(self.store.path, "SELECT sandbox, id, access FROM device")
            if self.number == 0
            else []
        )
        self.board.meet(self.number)
        kept = {
            name: [[one.id, str(one.info.path), one.attach_count] for one in self.blocks(name)]
            for name in self.sandboxes
        }
        return {"kept": kept, "seen": seen, "done": self.done, "lost": self.lost, "won": self.won}

    def blocks(self, name: str) -> list[BlockDevice]:
        return [one for one in self.sandboxes[name].devices if isinstance(one, BlockDevice)]

    async def open(self, name: str) -> None:
        self.sandboxes[name] = await Sandbox(name, self.vms[name], store=self.store).__aenter__()

    def compare(self, name: str, sandbox: Sandbox) -> None:
        assert {str(one.info.path): one.attach_count for one in self.blocks(name)} == self.counts[
            name
        ]
        assert (
            self.vms[name].devices.keys()
            == {one.held.id for one in self.blocks(name)}
            == self.vms[name].backends.keys()
        )
        assert not sandbox.recovered

    async def step(self, name: str) -> None:
        sandbox, counts = self.sandboxes[name], self.counts[name]
        kind = self.choose.randrange(20)
        if kind == 0:
            await sandbox.close()
            await self.open(name)
            self.compare(name, self.sandboxes[name])
        elif kind == 1:
            free = [image for image in self.own[name] if image not in counts]
            await sandbox.attach_many(free)
            counts |= dict.fromkeys(free, 1)
        elif kind <= 4:
            await self.contend(name)
        elif kind <= 12:
            image = self.choose.choice([*self.own[name], *self.read])
            if counts.get(image, 0) < self.AT_ONCE:
                attached = await sandbox.attach(image, read_only=image in self.read)
                counts[image] = counts.get(image, 0) + 1
                assert attached.attach_count == counts[image]
        elif others := [one for one in self.blocks(name) if str(one.info.path) != self.wanted]:
            device = self.choose.choice(others)
            await sandbox.detach(device)
            image = str(device.info.path)
            counts[image] -= 1
            if not counts[image]:
                del counts[image]
        self.done += 1

    async def contend(self, name: str) -> None:
        """Attaches or detaches what only one in the crowd can have; nobody else has it at the same
        time."""
        sandbox, counts = self.sandboxes[name], self.counts[name]
        if self.wanted in counts:
            assert self.board[0] == 1 + self.number
            self.board[0] = 0
            await sandbox.detach(
                next(one for one in self.blocks(name) if str(one.info.path) == self.wanted)
            )
            del counts[self.wanted]
            return
        try:
            await sandbox.attach(self.wanted)
        except ImageInUse:
            self.lost += 1
        else:
            assert self.board[0] == 0
            self.board[0] = 1 + self.number
            counts[self.wanted] = 1
            self.won += 1


def test_a_crowd_loses_nothing(
    tmp_path: Path, make_image: MakeImage, capsys: pytest.CaptureFixture[str]
) -> None:
    members = 10
    for one in range(4):
        make_image(f"read-{one}")
    for number, one, more in itertools.product(range(members), range(Member.SANDBOXES), range(4)):
        make_image(f"own-{number}-{one}-{more}")
    make_image("wanted")
    board = Board(members, 1)
    results = crowd(
        board, members, lambda number: asyncio.run(Member(number, board, tmp_path).run())
    )
    [*seen] = results[0]["seen"]
    told = {
        (name, device, path, count)
        for result in results
        for name, kept in result["kept"].items()
        for device, path, count in kept
    }
    reads = {(name, device): int("/read-" in path) for name, device, path, _ in told}
    assert {(name, device): access for name, device, access in seen} == reads and len(seen) == len(
        told
    )

    async def compare() -> None:
        store = SqliteStore(tmp_path / "state.db")
        names = [
            f"sb{number}-{one}" for number in range(members) for one in range(Member.SANDBOXES)
        ]
        assert await store.sandboxes() == sorted(names)
        found = set()
        for name in names:
            for device in (await as_written(store, name)).devices:
                assert isinstance(device, BlockDevice) and device.attached
                found.add((name, device.id, str(device.info.path), device.attach_count))
            assert (await store.read(name)).owner == ""  # they have all ended
        assert found == told
        store.close()

    asyncio.run(compare())
    done, lost, won = (sum(result[what] for result in results) for what in ("done", "lost", "won"))
    assert lost and won
    with capsys.disabled():
        print(
            f"\n{members} processes: {done:,} operations in {SECONDS:g} s; the wanted image was "
            f"had {won:,} times, refused {lost:,} times"
        )
