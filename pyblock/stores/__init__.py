"""Where state lives: the host's store (SQLite), and a JSON file for export and import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pyblock.errors import InvalidState, StoreError

if TYPE_CHECKING:
    from pyblock.stores.base import Store

STORE_FILE = "state.db"

_opened: dict[Path, Store] = {}  # one connection to a store serves the whole process


def state_folder() -> Path:
    """`$PYBLOCK_STATE_DIR` if set, else `/run/pyblock` for root, else `$XDG_RUNTIME_DIR/pyblock`. Made if absent, private to its user.

    Raises InvalidState when there is none, StoreError when it cannot be made.
    """
    if text := os.environ.get("PYBLOCK_STATE_DIR"):
        folder = Path(text)
    elif os.geteuid() == 0:
        folder = Path("/run/pyblock")
    elif text := os.environ.get("XDG_RUNTIME_DIR"):
        folder = Path(text, "pyblock")
    else:
        raise InvalidState("no state folder: set PYBLOCK_STATE_DIR (or XDG_RUNTIME_DIR), or say store=None to go without a store")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"state folder {str(folder)!r} cannot be made: {error.strerror}; name another in PYBLOCK_STATE_DIR") from error
    return folder


def host_store() -> Store:
    """The store of this host, `state.db` in the state folder; the same object throughout a process. Not opened yet."""
    from pyblock.stores.sqlite import SqliteStore  # noqa: PLC0415 - sqlite3 would be a tenth of the time to import pyblock

    path = state_folder().resolve() / STORE_FILE
    store = _opened.get(path)
    if store is None:
        store = _opened.setdefault(path, SqliteStore(path))
    return store
