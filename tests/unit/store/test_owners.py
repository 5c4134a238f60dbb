"""Whose an image is, and whose a sandbox: one writes or many read or all share; an owner is whoever
lives."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.snapshot import MakeImage, MakeStore, refused
from support.store_scene import agreed, facts

from pyblock import (
    ImageInUse,
    Phase,
    Sandbox,
    SandboxBusy,
)
from pyblock.store.base import Row
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio


ACCESS = [(reads, shares) for reads in (False, True) for shares in (False, True)]


def may_have(holders: list[tuple[bool, bool]], access: tuple[bool, bool]) -> bool:
    """The rule, as one would say it: they all only read, or they all say that they share."""
    everybody = [*holders, access]
    return (
        len(everybody) == 1
        or all(reads for reads, _ in everybody)
        or all(shares for _, shares in everybody)
    )


@pytest.mark.parametrize("second", ACCESS)
@pytest.mark.parametrize("first", ACCESS)
async def test_one_writes_or_many_read_or_all_share(
    first: tuple[bool, bool],
    second: tuple[bool, bool],
    make_store: MakeStore,
    make_image: MakeImage,
) -> None:
    image = make_image("a")
    ours, theirs = make_store(), make_store()
    vms = MemoryHypervisor(), MemoryHypervisor()
    async with (
        Sandbox("s1", vms[0], store=ours) as one,
        Sandbox("s2", vms[1], store=theirs) as other,
    ):
        device = await one.attach(image, read_only=first[0], share=first[1])
        if not may_have([first], second):
            with refused(other, vms[1], ImageInUse, str(image), "'s1'", f"process {os.getpid()}"):
                await other.attach(image, read_only=second[0], share=second[1])
            await one.detach(device)
        await other.attach(image, read_only=second[0], share=second[1])
        await agreed(theirs, other, vms[1])
        await agreed(ours, one, vms[0])


async def test_claims_of_many_against_the_rule(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    choose = random.Random(11)
    image = make_image("a")
    sandboxes = [
        Sandbox(f"s{number}", MemoryHypervisor(), store=make_store()) for number in range(4)
    ]
    held: dict[int, tuple[bool, bool]] = {}
    refusals = 0
    for sandbox in sandboxes:
        await sandbox.__aenter__()
    for _ in range(400):
        number = choose.randrange(4)
        sandbox = sandboxes[number]
        if number in held:
            await sandbox.detach(sandbox.devices[0])
            del held[number]
            continue
        access = choose.choice(ACCESS)
        try:
            await sandbox.attach(image, read_only=access[0], share=access[1])
        except ImageInUse:
            assert not may_have(list(held.values()), access)
            refusals += 1
        else:
            assert may_have(list(held.values()), access)
            held[number] = access
    assert 50 < refusals < 200
    for sandbox in sandboxes:
        await sandbox.close()


class Child:
    """A forked process that runs a function and then waits to be ended; the process ID is that of
    `Child`'s own child."""

    def __init__(self, function: Callable[[], str]) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.write(writer, function().encode())
                signal.pause()
            finally:
                os._exit(99)
        os.close(writer)
        self.said = os.read(self._reader, 1000).decode()

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._reader)
            self.pid = 0


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[], str]], Child]]:
    children: list[Child] = []

    def make(function: Callable[[], str]) -> Child:
        children.append(Child(function))
        assert children[-1].said
        return children[-1]

    yield make
    for child in children:
        child.kill()


Start = Callable[[Callable[[], str]], Child]


@pytest.fixture
def owned(tmp_path: Path, make_image: MakeImage) -> Callable[[], str]:
    """What a process does that opens a sandbox on a machine that outlives it, and attaches a
    disk."""
    (tmp_path / "vm").touch()
    image = make_image("a")

    async def own() -> None:
        sandbox = Sandbox(
            "s1", f"memory:{tmp_path / 'vm'}", store=SqliteStore(tmp_path / "state.db")
        )
        await (await sandbox.__aenter__()).attach(image)
        _kept.append(sandbox)

    def run() -> str:
        asyncio.run(own())
        return "owned"

    return run


_kept: list[Sandbox] = []  # a process's sandboxes, which are neither closed nor deleted


def test_a_sandbox_is_its_owners_until_that_ends(
    owned: Callable[[], str], start: Start, tmp_path: Path
) -> None:
    vm = f"memory:{tmp_path / 'vm'}"
    owner = start(owned)

    async def attempts() -> None:
        store = SqliteStore(tmp_path / "state.db")
        assert (await store.read("s1")).owner.startswith(f"process {owner.pid} ")
        machine_before = (tmp_path / "vm").read_bytes()
        with pytest.raises(SandboxBusy, match=rf"'s1'.* process {owner.pid} "):
            await Sandbox("s1", vm, store=store).__aenter__()
        other = MemoryHypervisor()
        async with Sandbox("s2", other, store=store) as sandbox:
            with refused(
                sandbox, other, ImageInUse, "'s1'", f"process {owner.pid} ", str(tmp_path / "a")
            ):
                await sandbox.attach(tmp_path / "a")
            owner.kill()
            # The claim stays, for the machine may still write the image.
            with refused(
                sandbox, other, ImageInUse, "'s1'", "no process has open", str(tmp_path / "a")
            ):
                await sandbox.attach(tmp_path / "a")
        assert (await store.read("s1")).owner == ""
        assert (tmp_path / "vm").read_bytes() == machine_before
        async with Sandbox("s1", vm, store=store) as sandbox:
            assert [phase for _, phase, _, _ in facts(sandbox)] == [
                Phase.ATTACHED
            ] and not sandbox.recovered
            with pytest.raises(SandboxBusy, match=f"process {os.getpid()} "):
                await Sandbox("s1", vm, store=store).__aenter__()
            second = SqliteStore(store.path)
            with pytest.raises(SandboxBusy, match=f"process {os.getpid()} "):
                await Sandbox("s1", vm, store=second).__aenter__()
            second.close()
            assert (await store.read("s1")).owner.startswith(f"process {os.getpid()} ")
            await sandbox.detach(sandbox.devices[0])
        assert await store.sandboxes() == []
        store.close()

    asyncio.run(attempts())


def test_a_child_that_outlives_its_parent_owns_nothing(
    owned: Callable[[], str], start: Start, tmp_path: Path
) -> None:
    ask, answer = os.pipe(), os.pipe()

    def parent() -> str:
        owned()
        if os.fork() == 0:
            os.close(ask[1])
            while question := os.read(ask[0], 1):  # until this test closes its end
                os.write(answer[1], question)
            os._exit(0)
        return "owned"

    def child_lives() -> None:
        os.write(ask[1], b"?")
        assert os.read(answer[0], 1) == b"?"

    async def take_over() -> None:
        store = SqliteStore(tmp_path / "state.db")
        with pytest.raises(SandboxBusy, match=f"process {owner.pid} "):
            await Sandbox("s1", f"memory:{tmp_path / 'vm'}", store=store).__aenter__()
        child_lives()
        owner.kill()
        child_lives()
        async with Sandbox("s1", f"memory:{tmp_path / 'vm'}", store=store) as sandbox:
            assert len(sandbox.devices) == 1
        child_lives()
        store.close()

    owner = start(parent)
    try:
        asyncio.run(take_over())
    finally:
        for end in (*ask, *answer):
            os.close(end)


@pytest.mark.parametrize(
    ("second", "ends"), [("one", ["first", "SandboxBusy"]), ("two", ["first", "second"])]
)
async def test_two_threads_open_at_once(
    second: str, ends: list[str], make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes when the first's transaction has ended, and the first has not gone on
    yet."""
    store = make_store()
    transact = store._file.transact
    ended: list[str] = []

    async def other() -> None:
        try:
            await store.open_sandbox(second, "")
            ended.append("second")
        except SandboxBusy:
            ended.append("SandboxBusy")

    async def interrupted(*arguments: Any, **options: Any) -> Any:
        result = await transact(*arguments, **options)
        monkeypatch.setattr(store._file, "transact", transact)
        await asyncio.to_thread(asyncio.run, other())
        return result

    monkeypatch.setattr(store._file, "transact", interrupted)
    await store.open_sandbox("one", "")
    assert ["first", *ended] == ends
    for sandbox in {"one", second}:
        assert await store.write(sandbox, lambda: [Row("device", b"{}")]) == {}
        await store.close_sandbox(sandbox)
