"""Where a store may be: a folder and files that only this user can write, reached by one absolute
path and through no link."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.children import NOBODY, in_child

from pyblock import InvalidState, PyblockError, StoreError
from pyblock.store import host_store
from pyblock.store.sqlite.store import SqliteStore

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
FILES = ["state.db", "state.db-owners", "state.db-wal", "state.db-shm", "state.db-journal"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that others can reach; pytest's own cannot be entered."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def opened(path: Path) -> str:
    """The error of opening a store there, or "opened"."""
    store = SqliteStore(path)
    try:
        asyncio.run(store.sandboxes())
    except PyblockError as error:
        assert "\n" not in str(error)
        return f"{type(error).__name__}: {error}"
    finally:
        store.close()
    return "opened"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@root_only
@pytest.mark.parametrize(
    "who", [NOBODY, 0], ids=["of root, used by another", "of another, used by root"]
)
@pytest.mark.parametrize("name", ["", *FILES])
def test_of_somebody_else(name: str, who: int, folder: Path) -> None:
    user, other = (NOBODY, 0) if who == NOBODY else (0, NOBODY)
    os.chown(folder, other if not name else user, -1)
    folder.chmod(0o777 if not name else 0o755)
    if name:
        (folder / name).touch(mode=0o666)
        os.chown(folder / name, other, other)
    before = everything(folder)
    status, text = in_child(lambda: opened(folder / "state.db"), uid=user or None)
    assert (
        status == 0
        and text.startswith("StoreError: ")
        and f"belongs to user {other}, not to {user}" in text
    )
    assert everything(folder) == before


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702, 0o720])
def test_a_folder_that_others_may_write(mode: int, folder: Path) -> None:
    if mode & 0o020:
        if os.geteuid() != 0:
            pytest.skip("a group of others is only root's to give")
        os.chown(folder, -1, NOBODY)
    folder.chmod(mode)
    assert opened(folder / "state.db").startswith("StoreError: ") and not everything(folder)
    folder.chmod(0o755)
    assert opened(folder / "state.db") == "opened"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_others_may_write(name: str, folder: Path) -> None:
    (folder / name).touch()
    (folder / name).chmod(0o602)
    text = opened(folder / "state.db")
    assert (
        text.startswith("StoreError: ")
        and "chmod go-w" in text
        and repr(str(folder / name)) in text
    )
    (folder / name).chmod(0o600)
    assert opened(folder / "state.db") == "opened"


@pytest.mark.parametrize("there", [True, False], ids=["link", "dangling link"])
@pytest.mark.parametrize("name", FILES)
def test_links_are_not_followed(name: str, there: bool, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if there:
        target.touch()
    (folder / name).symlink_to(target)
    text = opened(folder / "state.db")
    assert text.startswith("StoreError: ") and repr(str(target)) in text and "symbolic link" in text
    assert target.exists() == there and [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_two_names(name: str, folder: Path, tmp_path: Path) -> None:
    """Whoever came by the other name would have other owners' locks and another journal, and the
    same rows."""
    (folder / name).touch(mode=0o600)
    (tmp_path / name).hardlink_to(folder / name)
    before = everything(folder)
    for place in (folder, tmp_path):
        text = opened(place / "state.db")
        assert text.startswith("StoreError: ") and f"{name}' has 2 names" in text
    assert everything(folder) == before
    (tmp_path / name).unlink()
    assert "names" not in opened(folder / "state.db")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "FIFO"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_plain_file(name: str, make: Callable[[Path], None], folder: Path) -> None:
    make(folder / name)
    assert opened(folder / "state.db").startswith("StoreError: ") and [
        path.name for path in folder.iterdir()
    ] == [name]


@pytest.mark.parametrize("text", ["state", "./state", "../state", "~/state"])
def test_a_relative_state_folder(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYBLOCK_STATE_DIR", text)
    with pytest.raises(InvalidState, match="absolute"):
        host_store()
    monkeypatch.delenv("PYBLOCK_STATE_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", text)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    with pytest.raises(InvalidState, match=r"XDG_RUNTIME_DIR.*absolute"):
        host_store()
    assert not everything(folder)


def linked_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def linked_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [Path.touch, linked_to_nothing, linked_to_itself, os.mkfifo])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_state_folder_that_cannot_be_one(
    make: Callable[[Path], None], below: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder / "state")
    monkeypatch.setenv("PYBLOCK_STATE_DIR", str(folder / "state" / below))
    with pytest.raises(StoreError, match="state folder"):
        host_store()
    assert [path.name for path in folder.iterdir()] == ["state"]


def test_a_state_folder_behind_a_link_is_the_one_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "state").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "state")
    monkeypatch.setenv("PYBLOCK_STATE_DIR", str(folder / "state"))
    store = host_store()
    monkeypatch.setenv("PYBLOCK_STATE_DIR", str(folder / "link"))
    assert host_store() is store


@root_only
def test_a_state_folder_of_somebody_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(folder, NOBODY, NOBODY)
    monkeypatch.setenv("PYBLOCK_STATE_DIR", str(folder))
    with pytest.raises(StoreError, match=f"belongs to user {NOBODY}"):
        host_store()


@pytest.mark.parametrize(
    "path",
    ["a\0b", "x" * 300, "nowhere/state.db", "\udfff"],
    ids=["NUL", "long", "no folder", "surrogate"],
)
def test_a_path_that_cannot_be_one(path: str, folder: Path) -> None:
    assert opened(folder / path).startswith("StoreError: ")


def test_a_working_folder_that_is_gone(folder: Path) -> None:
    def child() -> str:
        gone = folder / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
        try:
            SqliteStore("state.db")
        except StoreError as error:
            return str(error)
        return "made"

    status, text = in_child(child)
    assert status == 0 and "absolute" in text
