"""The files of a store, and whose they are: whoever may write them, or put others in their place,
has a say over every sandbox.

A store is a database, what SQLite keeps beside it, and the owners' file. None may be reached
through a link: beside another name of the same database there would be another owners' file, and
its users would not see each other live.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from pyblock.errors import InvalidState, StoreError

OWNERS = "-owners"
BESIDE = ("-wal", "-shm", "-journal", OWNERS)  # what is added to the database's name

used: set[str] = set()  # databases that this process has opened

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def owners_of(path: Path) -> Path:
    """The owners' file of a database."""
    return path.with_name(path.name + OWNERS)


def check(path: Path) -> None:
    """Raises StoreError when a file of this database, or its folder, is not this user's alone, or
    is no plain file. Makes nothing.

    Raises OSError when they cannot be looked at.
    """
    check_folder(path.parent)
    for suffix in ("", *BESIDE):
        try:
            file = os.lstat(f"{path}{suffix}")
        except FileNotFoundError:
            continue
        name = f"{path}{suffix}"
        what = f"store file {name!r}"
        if stat.S_ISLNK(file.st_mode):
            target = os.readlink(f"{path}{suffix}")  # noqa: PTH115
            text = (
                f"{what} is a symbolic link to {target!r}, which is not followed; name the folder "
                "of the store itself"
            )
            raise StoreError(text, path=name)
        if not stat.S_ISREG(file.st_mode):
            raise StoreError(
                f"{what} is no plain file; remove it, or name another folder in PYBLOCK_STATE_DIR",
                path=name,
            )
        if file.st_nlink > 1:
            text = (
                f"{what} has {file.st_nlink} names (hard links), and each would be another store; "
                "leave it the one that is used"
            )
            raise StoreError(text, path=name)
        _check_user(what, name, file)


def check_folder(folder: Path) -> None:
    """Raises StoreError unless it is a folder that only this user may write. Raises OSError when it
    cannot be looked at."""
    status = os.stat(folder)  # noqa: PTH116 - with `path`, which is one line below
    what = f"state folder {str(folder)!r}"
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(
            f"{what} is no folder; name another in PYBLOCK_STATE_DIR", path=str(folder)
        )
    _check_user(what, str(folder), status)


def _check_user(what: str, path: str, status: os.stat_result) -> None:
    user = os.geteuid()
    if status.st_uid != user:
        text = (
            f"{what} belongs to user {status.st_uid}, not to {user}, which this process is; name "
            "a folder of your own"
        )
        raise StoreError(text, path=path)
    others = status.st_mode & _OTHERS_MAY_WRITE
    if status.st_gid == user:
        # the group that many systems give each user, which has the user's number and no other
        # member
        others &= ~stat.S_IWGRP
    if others:
        mode = stat.S_IMODE(status.st_mode)
        raise StoreError(
            f"{what} may be written by others (mode {mode:o}); take that from them: chmod go-w",
            path=path,
        )


def refuse(path: str | os.PathLike[str]) -> None:
    """Raises InvalidState when a path names a file of a store, under whatever name. Opens nothing:
    to close a database would drop the locks that SQLite has on it for this process, and with them
    what was written last."""
    try:
        where = os.path.realpath(path)
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise InvalidState(
            f"state file {os.fspath(path)!r} cannot be a file: {error}; give another name"
        ) from error
    owner = next((where.removesuffix(suffix) for suffix in BESIDE if where.endswith(suffix)), None)
    beside = owner is not None and os.path.lexists(owner)
    if where in used or beside or _is_one_used(where):
        raise InvalidState(
            f"state file {os.fspath(path)!r} is a file of a store; it is left as it is, give "
            "another name"
        )


def _is_one_used(where: str) -> bool:
    identity = _identity(where)
    return identity is not None and any(
        identity == _identity(database + suffix) for database in used for suffix in ("", *BESIDE)
    )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return None
        raise
    return status.st_dev, status.st_ino
