"""A process is killed at every SQL statement of what writes many rows at once: an import, a forget.
It has happened, or it has not."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from kit.points import Points
from support import samples
from support.children import in_child
from support.snapshot import MakeImage

from pyblock import Sandbox
from pyblock.store.sqlite.store import SqliteStore

Work = Callable[[SqliteStore], Coroutine[Any, Any, None]]


def at_every_step(
    work: Work, prepare: Callable[[int], Path], check: Callable[[Path], str]
) -> tuple[int, set[str]]:
    """Runs `work` in a child that is killed at step 0, 1, 2… until it lives; returns how many there
    were, and what the checks said."""
    said: set[str] = set()
    step = 0
    while True:
        path = prepare(step)

        def victim(path: Path = path, step: int = step) -> str:
            Points(step)
            store = SqliteStore(path)
            asyncio.run(work(store))
            store.close()
            return ""

        status, text = in_child(victim)
        said.add(check(path))
        if status == 0:
            return step, said
        assert status == -signal.SIGKILL, text
        step += 1


def devices_in(path: Path) -> int:
    """How many devices the store has; its sandbox can be taken over, so that nothing of it
    contradicts the rest."""

    async def count() -> int:
        store = SqliteStore(path)
        try:
            if not await store.sandboxes():
                return 0
            async with Sandbox(
                "one", f"memory:{path.parent / 'vm'}", store=store, recover=False
            ) as sandbox:
                assert len(sandbox.index) == len(sandbox.devices)
                return len(sandbox.devices)
        finally:
            store.close()

    return asyncio.run(count())


@pytest.fixture
def kata(tmp_path: Path, make_image: MakeImage) -> Path:
    path = tmp_path / "kata.json"
    drives = [
        samples.drive(number, File=str(make_image(f"disk{number}")), SCSIAddr=f"0:{number}")
        for number in range(3)
    ]
    devices = [
        samples.device(number, drive, AttachCount=1, RefCount=1)
        for number, drive in enumerate(drives)
    ]
    path.write_bytes(samples.text(samples.sandbox(devices, [0, 1, 2])))
    return path


def test_import(tmp_path: Path, kata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vm").touch()

    async def load(store: SqliteStore) -> None:
        async with Sandbox("one", f"memory:{tmp_path / 'vm'}", store=store) as sandbox:
            await sandbox.load(kata)

    steps, said = at_every_step(
        load, lambda step: tmp_path / f"state-{step}.db", lambda path: str(devices_in(path))
    )
    assert said == {"0", "3"}
    with capsys.disabled():
        print(f"\nimport: {steps} kill points")


def test_forget(tmp_path: Path, kata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vm = tmp_path / "vm"

    def prepare(step: int) -> Path:
        async def fill() -> None:
            vm.touch()
            store = SqliteStore(path)
            async with Sandbox("one", f"memory:{vm}", store=store) as sandbox:
                await sandbox.load(kata)
            store.close()
            vm.unlink()

        path = tmp_path / f"state-{step}.db"
        asyncio.run(fill())
        return path

    async def forget(store: SqliteStore) -> None:
        async with Sandbox("one", f"memory:{vm}", store=store, recover=False) as sandbox:
            await sandbox.forget()

    steps, said = at_every_step(forget, prepare, lambda path: str(devices_in(path)))
    assert said == {"0", "3"}
    with capsys.disabled():
        print(f"\nforget: {steps} kill points")
