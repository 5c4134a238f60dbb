"""The host's side of a device: what a path really is, when two paths are the same thing, and the
thing itself, opened.

A block special is its major:minor (a loop device what it is a loop over), a file its (st_dev,
st_ino): never its spelling. Whatever is said of an image comes from one descriptor on it, so that a
path which means something else a moment later changes nothing about what was said.

The path that is kept is the caller's, put behind the working directory where it was relative, and
otherwise as it is: it is what the caller looks for in a listing (`/dev/disk/by-id/…`, what another
program wrote down), and the kernel resolves it as it did the first time, from any working
directory. `..` stays in it, for behind a link it leads elsewhere than the text says. The real path
would be another text after a reboot (`/dev/sdb`), a wrong one after a rename, and none at all for a
deleted file or a memfd.
Since what a path leads to may change, it is opened anew for each attach, and compared with what was
claimed.
"""

from __future__ import annotations

import os
import stat
from types import TracebackType
from typing import NamedTuple, Self

from pyblock.disk.formats import BEHIND, BEHIND_AT, FIRST, HEAD, format_of, not_raw
from pyblock.disk.lineage import (
    SYSFS_BLOCK,
    USED_UP,
    Identity,
    Lineage,
    identity_from,
    in_words,
    lineage_of,
)
from pyblock.errors import DescriptorsExhausted, ImageReplaced, InvalidImage

# with a descriptor: what was opened, whatever its own path leads to by now
_SELF = "/proc/self/fd/"
_EFFECTIVE = os.access in os.supports_effective_ids
# bytes: the unit of a block device's `size` in sysfs, whatever the disk's own sector size
_SECTOR = 512

_WHAT = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
}


class HostImage(NamedTuple):
    """What a path was found to be.

    :ivar path: absolute.
    :ivar identity: what makes it the same image.
    :ivar size: bytes.
    :ivar under: what lies under it, and its other names: who writes there writes to it.
    :ivar number: major and minor of a block special; None for a file.
    :ivar looks_like: the name of the format that it begins like, if it is none that is plugged in
        and was looked for.
    """

    path: str
    identity: Identity
    size: int
    under: tuple[Identity, ...] = ()
    number: tuple[int, int] | None = None
    looks_like: str | None = None

    @property
    def is_block(self) -> bool:
        """True for a block special, whatever is behind it; False for a file."""
        return self.number is not None


class OpenedImage:
    """An image that is open; a context manager. Its descriptor belongs to one attach: locks and
    flags are shared by all its copies.

    :ivar fd: the descriptor, read-only or for reading and writing as the drive is; -1 when it is
        closed.
    :ivar path: absolute.
    :ivar identity: what makes it the same image.
    :ivar under: what lies under it.
    :ivar size: bytes, when it was opened.
    :ivar is_block: True for a block special, whatever is behind it; False for a file.
    """

    __slots__ = ("fd", "identity", "is_block", "path", "size", "under")

    def __init__(self, fd: int, path: str, lineage: Lineage, size: int, *, is_block: bool) -> None:
        self.fd = fd
        self.path = path
        self.identity, self.under = lineage.identity, lineage.under
        self.size = size
        self.is_block = is_block
        _open.add(self)

    def __repr__(self) -> str:
        return f"<OpenedImage {self.path!r} {self.identity} fd={self.fd}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def check_path(self) -> None:
        """For whoever can only be told the path. Raises ImageReplaced when it leads to something
        else by now."""
        try:
            now = identity_from(os.stat(self.path))  # noqa: PTH116
        except OSError:
            now = None
        if now != identity_from(os.fstat(self.fd)):
            text = in_words(now) if now is not None else "nothing that is a disk"
            raise ImageReplaced(
                f"what is at {self.path!r} now ({text}) is not what was claimed "
                f"({in_words(self.identity)}); attach it again",
                path=self.path,
            )

    def close(self) -> None:
        """Closes the descriptor; once is enough, twice does no harm."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _open.discard(self)
            os.close(fd)


_open: set[OpenedImage] = set()


def _after_fork() -> None:
    # The child shares the descriptions with the parent, and with the VMM that was handed them: it
    # would keep the VMM's locks on the images.
    for image in list(_open):
        image.close()


os.register_at_fork(after_in_child=_after_fork)


def lineage_at(path: str) -> Lineage | None:
    """What a path leads to, and what lies under that; None when there is no file or block special,
    or it cannot be looked at. Raises DescriptorsExhausted."""
    try:
        identity = identity_from(os.stat(path))  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return lineage_of(identity, path) if identity is not None else None


def identity_of(path: str) -> Identity | None:
    """The identity of what a path leads to; None as `lineage_at`. Raises DescriptorsExhausted."""
    lineage = lineage_at(path)
    return lineage.identity if lineage is not None else None


def is_file(path: str) -> bool:
    """Whether the path leads to a regular file."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
    except (OSError, ValueError):
        return False


def block_special_path(major: int, minor: int, *, sysfs: str = SYSFS_BLOCK) -> str:
    """The path under /dev of the block special major:minor, out of `/sys/dev/block/M:m/uevent`.
    Raises InvalidImage when there is none."""
    where = f"{sysfs}/{major}:{minor}/uevent"
    try:
        lines = _read(where).splitlines()
    except OSError as error:
        raise InvalidImage(
            f"no block device {major}:{minor} on this host ({where}: {error.strerror})", path=where
        ) from error
    name = next((line[len("DEVNAME=") :] for line in lines if line.startswith("DEVNAME=")), "")
    if not name:
        raise InvalidImage(f"block device {major}:{minor} has no DEVNAME in {where}", path=where)
    return f"/dev/{name}"


def inspect_image(path: str, *, read_only: bool, raw: bool = False) -> HostImage:
    """Looks at a disk image or host block special. Does not open it for writing, for on a block
    device closing that again would be news to udev; only for reading what it begins with, and
    asking a loop device what it is a loop over.

    :param raw: what it begins with is not looked at.
    Raises InvalidImage when it is missing, may not be read (or written, unless `read_only`), is
    empty, or is something else; DescriptorsExhausted.
    """
    path = absolute(path)
    fd, found, size = _look(path)
    try:
        wanted = os.R_OK if read_only else os.R_OK | os.W_OK
        if not os.access(f"{_SELF}{fd}", wanted, effective_ids=_EFFECTIVE):
            why = (
                f"image {path!r} may not be {_need(read_only=read_only)} by user "
                f"{os.geteuid()}{_without_proc()}"
            )
            raise InvalidImage(why, path=path)
        kind, major, minor = found
        if kind == "block":
            size = _block_size(major, minor)
        if size == 0:
            raise _empty(path)
        looks_like = None if raw else _look_inside(path, fd)
        if kind == "file":
            return HostImage(path, found, size, (), None, looks_like)
        lineage = lineage_of(found, f"{_SELF}{fd}")
        return HostImage(path, lineage.identity, size, lineage.claims, (major, minor), looks_like)
    finally:
        os.close(fd)


def open_image(path: str, *, read_only: bool) -> OpenedImage:
    """Opens a disk image or host block special, for reading only or for reading and writing. Never
    opens anything else: to open a FIFO or a terminal can wait, and does something to whoever has
    its other end.

    Raises InvalidImage when it is missing, cannot be opened so, is empty, or is something else;
    DescriptorsExhausted.
    """
    return _opened(absolute(path), read_only=read_only)


def _opened(path: str, *, read_only: bool) -> OpenedImage:
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    look, found, size = _look(path)
    try:
        fd = _reopen(path, look, flags)
    finally:
        os.close(look)
    try:
        is_block = found[0] == "block"
        if is_block:
            size = os.lseek(fd, 0, os.SEEK_END)
        if size == 0:
            raise _empty(path)
        lineage = lineage_of(found, f"{_SELF}{fd}") if is_block else Lineage(found)
        return OpenedImage(fd, path, lineage, size, is_block=is_block)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise InvalidImage(
                f"image {path!r} has no size: {error.strerror}", path=path
            ) from error
        raise


def open_claimed(
    path: str,
    identity: Identity | None,
    under: tuple[Identity, ...] = (),
    *,
    read_only: bool,
    raw: bool = False,
) -> OpenedImage:
    """Opens what was claimed: an image of this identity, with no more lying under it, that begins
    like none but a raw one.

    :param raw: what it begins with is not looked at.
    Raises as `open_image`; ImageReplaced when the path leads to something else by now, or to what
    was not there when it could have been claimed (None).
    """
    image = _opened(path if path.startswith("/") else absolute(path), read_only=read_only)
    try:
        if image.identity != identity or not set(image.under) <= set(under):
            raise _replaced(image, identity, under)
        if not raw and (name := _begins_like(path, image.fd)) is not None:
            raise not_raw(path, name)
    except BaseException:
        image.close()
        raise
    return image


def _replaced(
    image: OpenedImage, identity: Identity | None, under: tuple[Identity, ...]
) -> ImageReplaced:
    path = image.path
    if identity is None:
        why = (
            "was not there when its device was loaded, so nobody claimed it; attach it anew, by "
            "its path"
        )
        return ImageReplaced(f"image {path!r} {why}", path=path)
    was, now = (
        _all_in_words(*lineage) for lineage in ((identity, under), (image.identity, image.under))
    )
    why = f"({now}) is not what was claimed ({was}): it was replaced meanwhile; attach it again"
    return ImageReplaced(f"what is at {path!r} now {why}", path=path)


def _all_in_words(identity: Identity, under: tuple[Identity, ...]) -> str:
    return in_words(identity) + (f" over {', '.join(map(in_words, under))}" if under else "")


def absolute(path: str) -> str:
    """The path as a device keeps it. Raises InvalidImage for what cannot be one."""
    if not path or "\0" in path:
        why = "is empty or holds a NUL; give the path of a disk image or block device"
        raise InvalidImage(f"image path {path!r} {why}", path=path)
    if not path.startswith("/"):
        try:
            path = f"{os.getcwd()}/{path}"  # noqa: PTH109
        except OSError as error:
            why = f"the working directory is gone ({error.strerror})"
            raise InvalidImage(
                f"image path {path!r} is relative, and {why}; give an absolute path", path=path
            ) from error
    if "//" in path or "/./" in path:
        # these two mean nothing, wherever they stand; a last "/" or "/." does
        first, *inner, last = path.split("/")
        path = "/".join([first, *(part for part in inner if part not in ("", ".")), last])
    try:
        path.encode()
    except UnicodeEncodeError:
        why = "is not UTF-8; neither a VMM's JSON nor a saved state can hold it"
        raise InvalidImage(f"image path {path!r} {why}", path=path) from None
    return path


def _look(path: str) -> tuple[int, Identity, int]:
    """A descriptor that only stands for what is there, its own number, and a file's size. Raises
    InvalidImage for what is no disk."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in USED_UP:
            raise _used_up(path, error) from error
        raise InvalidImage(f"image {path!r}: {error.strerror}", path=path) from error
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            return fd, ("file", status.st_dev, status.st_ino), status.st_size
        identity = identity_from(status)
        if identity is None:
            kind = _WHAT.get(stat.S_IFMT(status.st_mode), "not a file")
            raise InvalidImage(
                f"image {path!r} is {kind}; a regular file or a block device is needed", path=path
            )
    except BaseException:
        os.close(fd)
        raise
    return fd, identity, status.st_size


def _reopen(path: str, look: int, flags: int) -> int:
    """A descriptor for reading, or reading and writing, on what `look` stands for."""
    try:
        return os.open(f"{_SELF}{look}", flags)
    except OSError as error:
        if error.errno in USED_UP:
            raise _used_up(path, error) from error
        why = f"by user {os.geteuid()}: {error.strerror}{_without_proc()}"
        raise InvalidImage(
            f"image {path!r} cannot be {_need(read_only=not flags & os.O_RDWR)} {why}", path=path
        ) from error


def _look_inside(path: str, look: int) -> str | None:
    fd = _reopen(path, look, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _begins_like(path, fd)
    finally:
        os.close(fd)


def _begins_like(path: str, fd: int) -> str | None:
    """The name of the format that it begins like, if it is none that is plugged in."""
    try:
        head = os.pread(fd, HEAD, 0)
        # as nearly all
        return format_of(head) if head[:1] in FIRST or head.startswith(BEHIND, BEHIND_AT) else None
    except OSError as error:
        why = f"the beginning of image {path!r} cannot be read: {error.strerror}"
        raise InvalidImage(
            f"{why}; say format='raw' if it is to be plugged in all the same", path=path
        ) from error


def _need(*, read_only: bool) -> str:
    return "read" if read_only else "read and written (attach it read-only if that is meant)"


def _without_proc() -> str:
    return (
        ""
        if os.path.exists("/proc/self/fd")  # noqa: PTH110
        else "; /proc is not mounted, and without it no image can be opened"
    )


def _used_up(path: str, error: OSError) -> DescriptorsExhausted:
    why = f"{error.strerror}; raise the limit of open files (ulimit -n)"
    return DescriptorsExhausted(f"{path!r} cannot be opened now: {why}", path=path)


def _empty(path: str) -> InvalidImage:
    return InvalidImage(
        f"image {path!r} is empty; give it a size first, for example with truncate", path=path
    )


def _read(path: str) -> str:
    # pathlib would be a tenth of the time to import pyblock
    with open(path) as file:  # noqa: PTH123
        return file.read()


def _block_size(major: int, minor: int) -> int:
    where = f"{SYSFS_BLOCK}/{major}:{minor}/size"
    try:
        return int(_read(where)) * _SECTOR
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in USED_UP:
            raise _used_up(where, error) from error
        raise InvalidImage(
            f"block device {major}:{minor} has no readable size in {where}", path=where
        ) from error
