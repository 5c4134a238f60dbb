"""One sandbox's state in one JSON file, replaced as a whole: a crash leaves the old file or the new
one, never a mixture.

A file that is there and is not such a state (or a newer one) is never overwritten.
"""

from __future__ import annotations

# else asyncio.to_thread, in which this runs, imports it when perhaps nothing can be opened
import concurrent.futures.thread  # noqa: F401
import contextlib
import os
import stat
import tempfile
from pathlib import Path

from pyblock.errors import InvalidState, StoreError
from pyblock.kata.schema import SandboxState, decode, encode
from pyblock.store import files

# bytes; 2^20 drives of under 256 bytes each, more than a sandbox can hold in practice
FILE_MAX = 256 * 2**20


def read(path: str | os.PathLike[str]) -> SandboxState:
    """The state in a file. Raises InvalidState (also when the file cannot be read) and
    NewerState."""
    where = os.fspath(path)
    try:
        files.refuse(where)
        with open(where, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidState(f"state file {where!r} is not a file; it is left as it is")
            text = file.read(FILE_MAX + 1)
    except OSError as error:
        raise InvalidState(f"state file {where!r} cannot be read: {error.strerror}") from error
    if len(text) > FILE_MAX:
        raise InvalidState(
            f"state file {where!r} has over {FILE_MAX} bytes; it is no saved sandbox"
        )
    return decode(text, where=f"state file {where!r}")


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO would wait for a writer


def write(path: str | os.PathLike[str], state: SandboxState) -> None:
    """Replaces the file: temporary file beside it, fsync, rename, fsync of the folder. The file is
    private to its user (mode 0600).

    Raises InvalidState or NewerState, having changed nothing, when something else is in its place,
    a file of a store above all; StoreError when it cannot be written.
    """
    try:
        _replace(Path(path), state)
    except OSError as error:
        raise StoreError(
            f"state file {os.fspath(path)!r} cannot be written: {error.strerror or error}; it is "
            "the old one or the new"
        ) from error


def _replace(target: Path, state: SandboxState) -> None:
    files.refuse(target)
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and (not target.is_file() or target.stat().st_size):
        read(target)
    text = encode(state)
    handle, temporary = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=".new", dir=target.parent
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)  # noqa: PTH105
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
