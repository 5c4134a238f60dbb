"""Whatever befalls the writing of a state, the file is the old one or the new one; and a failure
leaves no temporary file."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.children import in_child
from support.snapshot import MakeImage

from pyblock import Sandbox, StoreError
from pyblock.kata import file as json_file
from pyblock.kata.schema import SandboxState, encode
from pyblock.vmm.memory.machine import MemoryHypervisor

Blow = Callable[[], object]


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten:
    """A file that takes half of what it is given before the blow falls."""

    def __init__(self, file: Any, blow: Blow) -> None:
        self._file = file
        self._blow = blow

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, text: bytes) -> None:
        self._file.write(text[: len(text) // 2])
        self._file.flush()
        self._blow()


def before(blow: Blow, real: Callable[..., Any]) -> Callable[..., Any]:
    def struck(*arguments: Any, **more: Any) -> Any:
        blow()
        return real(*arguments, **more)

    return struck


def after(blow: Blow, real: Callable[..., Any]) -> Callable[..., Any]:
    def struck(*arguments: Any, **more: Any) -> Any:
        result = real(*arguments, **more)
        blow()
        return result

    return struck


def nth(
    number: int, strike: Callable[..., Any]
) -> Callable[[Blow, Callable[..., Any]], Callable[..., Any]]:
    def make(blow: Blow, real: Callable[..., Any]) -> Callable[..., Any]:
        struck = strike(blow, real)
        calls = 0

        def counted(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            return (struck if calls == number else real)(*arguments, **more)

        return counted

    return make


# Where the blow falls: the function that is struck, how, and which file must be found afterwards.
STEPS: dict[str, tuple[Any, str, Callable[[Blow, Callable[..., Any]], Callable[..., Any]], str]] = {
    "before the temporary file": (tempfile, "mkstemp", before, "old"),
    "half-written": (
        os,
        "fdopen",
        lambda blow, real: lambda *a, **k: HalfWritten(real(*a, **k), blow),
        "old",
    ),
    "before its fsync": (os, "fsync", nth(1, before), "old"),
    "after its fsync": (os, "fsync", nth(1, after), "old"),
    "before the rename": (os, "replace", before, "old"),
    "after the rename": (os, "replace", after, "new"),
    "before the folder's fsync": (os, "fsync", nth(2, before), "new"),
    "after the folder's fsync": (os, "fsync", nth(2, after), "new"),
}


@contextmanager
def struck(step: str, blow: Blow) -> Iterator[None]:
    module, name, strike, _ = STEPS[step]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, strike(blow, getattr(module, name)))
        yield


class Files:
    """A state file, what it held before and what it is to hold."""

    def __init__(self, folder: Path, old: SandboxState, new: SandboxState) -> None:
        self.folder = folder
        self.path = folder / "state.json"
        self.new = new
        self.texts = {"old": encode(old), "new": encode(new)}
        json_file.write(self.path, old)

    def are(self, which: str, *, temporary: int = 0) -> None:
        assert self.path.read_bytes() == self.texts[which]
        assert len(list(self.folder.iterdir())) == 1 + temporary
        json_file.write(self.path, self.new)
        assert json_file.read(self.path) == self.new


@pytest.fixture
def files(tmp_path: Path, make_image: MakeImage) -> Files:
    async def states() -> tuple[SandboxState, SandboxState]:
        async with Sandbox("s1", MemoryHypervisor()) as sandbox:
            await sandbox.attach(make_image("one"))
            old = sandbox.state()
            await sandbox.attach_many([make_image(f"more{number}") for number in range(20)])
            return old, sandbox.state()

    (tmp_path / "states").mkdir()
    return Files(tmp_path / "states", *asyncio.run(states()))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("blow", [fail, interrupt])
def test_a_failure_at_each_step(files: Files, step: str, blow: Blow) -> None:
    with struck(step, blow), pytest.raises((StoreError, KeyboardInterrupt)):
        json_file.write(files.path, files.new)
    files.are(STEPS[step][3])


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_each_step(files: Files, step: str) -> None:
    def write() -> str:
        with struck(step, die):
            json_file.write(files.path, files.new)
        return "survived"

    assert in_child(write) == (-signal.SIGKILL, "")
    left = STEPS[step][3] == "old" and step != "before the temporary file"
    files.are(STEPS[step][3], temporary=left)


def test_a_disk_that_takes_no_more(files: Files) -> None:
    def write() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            json_file.write(files.path, files.new)
        except StoreError as error:
            assert isinstance(error.__cause__, OSError)
            return errno.errorcode[error.__cause__.errno or 0]
        return "written"

    assert len(files.texts["new"]) > 2000
    assert in_child(write) == (0, "EFBIG")
    files.are("old")


def test_a_first_file_that_fails_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with struck("before the rename", fail), pytest.raises(StoreError, match="No space"):
        json_file.write(path, SandboxState())
    assert list(tmp_path.iterdir()) == []
