"""Where state lives: the host's store (SQLite), and a JSON file for export and import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pyblock.errors import InvalidState, StoreError
from pyblock.loading import loading
from pyblock.store import files

if TYPE_CHECKING:
    from pyblock.store.base import Store

STORE_FILE = "state.db"

_opened: dict[Path, Store] = {}  # one connection to a store serves the whole process


def state_folder() -> Path:
    """`$PYBLOCK_STATE_DIR` if set, else `/run/pyblock` for root, else `$XDG_RUNTIME_DIR/pyblock`.
    Made if absent, private to its user.

    Raises InvalidState when there is none, or its path depends on the folder in which one works;
    StoreError when it cannot be made, or others may write there.
    """
    if text := os.environ.get("PYBLOCK_STATE_DIR"):
        folder = _absolute("PYBLOCK_STATE_DIR", text)
    elif os.geteuid() == 0:
        folder = Path("/run/pyblock")
    elif text := os.environ.get("XDG_RUNTIME_DIR"):
        folder = _absolute("XDG_RUNTIME_DIR", text) / "pyblock"
    else:
        raise InvalidState(
            "no state folder: set PYBLOCK_STATE_DIR (or XDG_RUNTIME_DIR), or say store=None to go "
            "without a store"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        files.check_folder(folder)
    except (OSError, RuntimeError) as error:
        # the latter: links that lead in a circle, before Python 3.13
        why = getattr(error, "strerror", None) or error
        if folder.is_symlink() and not folder.exists():
            why = "it is a symbolic link that leads nowhere"
        text = (
            f"state folder {str(folder)!r} cannot be made: {why}; name another in PYBLOCK_STATE_DIR"
        )
        raise StoreError(text, path=str(folder)) from error
    return folder


def _absolute(variable: str, text: str) -> Path:
    if not text.startswith("/"):
        raise InvalidState(
            f"{variable} is {text!r}, which is another folder after each chdir; set it to an "
            "absolute path",
            value=text,
        )
    return Path(text)


def host_store() -> Store:
    """The store of this host, `state.db` in the state folder; the same object throughout a process.
    Not opened yet. Raises as `state_folder` does."""
    with loading("the store"):
        # sqlite3 would be a tenth of the time to import pyblock
        from pyblock.store.sqlite.store import SqliteStore  # noqa: PLC0415

    path = state_folder() / STORE_FILE
    store = _opened.get(path)
    if store is None:
        store = _opened.setdefault(path, SqliteStore(path))
    return store
