"""A disk as its sandbox knows it: what was asked for, what it is, and where it stands.

It holds facts and does nothing: the road on which it comes and goes is road.py's, and its phase
changes in `Machine.move` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyblock.errors import AttachPending, DetachPending, Facts, NotAttached
from pyblock.life.table import GOING, Phase

if TYPE_CHECKING:
    from pyblock.disk.lineage import Identity
    from pyblock.disk.model import BlockDrive, DeviceInfo
    from pyblock.tasks import Operation

_NEW = Phase.DETACHED  # bound once: a member of an enum takes three times as long as a name


class BlockDevice:
    """A disk that can be attached to one sandbox, any number of times at once.

    :ivar id: the device ID.
    :ivar info: what the caller asked for.
    :ivar identity: what makes two devices the same; None for one out of a saved state whose image
        was not looked at.
    :ivar under: what lies under it, and its other names.
    :ivar drive: how it is presented to the guest; None while it is detached.
    :ivar phase: where it stands in table.LIFE.
    :ivar attach_count: attaches that no detach stands against yet.
    :ivar ref_count: how many users the manager has given it to.
    :ivar kata: what the original wrote of it, kept for what pyblock does not know; b"" for nothing.
    :ivar said_count: the count that is written down, where what is written says that it is
        attached: before a removal is asked for, it must not. It may have been written along with
        another device's row.
    :ivar fresh: its ID was made up here, and no VMM has been told it yet.
    :ivar operation: the attach, detach or count of it that is under way, if there is one.
    """

    __slots__ = (
        "attach_count", "drive", "fresh", "id", "identity", "info", "kata", "operation", "phase",
        "ref_count", "said_count", "under",
    )  # fmt: skip

    def __init__(
        self,
        device_id: str,
        info: DeviceInfo,
        identity: Identity | None = None,
        under: tuple[Identity, ...] = (),
        *,
        fresh: bool = False,
    ) -> None:
        self.id = device_id
        self.info = info
        self.identity = identity
        self.under = under
        self.drive: BlockDrive | None = None
        self.phase = _NEW
        self.attach_count = 0
        self.ref_count = 0
        self.kata = b""
        self.said_count = 0
        self.fresh = fresh
        self.operation: Operation | None = None

    def __repr__(self) -> str:
        return f"<BlockDevice {self.id} {self.phase} count={self.attach_count} {self.info.path!r}>"

    @property
    def attached(self) -> bool:
        """True while the VMM is known to have it and nothing is under way."""
        return self.phase is Phase.ATTACHED

    @property
    def held(self) -> BlockDrive:
        """The drive of a device that holds one."""
        if self.drive is None:
            raise NotAttached(f"device {self.id} is not attached and has no drive", **self.facts)
        return self.drive

    @property
    def facts(self) -> Facts:
        """What an error about it knows of it."""
        if self.drive is not None:
            return self.drive.facts | Facts(device=self.id)
        return Facts(device=self.id, path=self.info.path or None, driver=self.info.driver)

    def pending(self, why: str) -> AttachPending | DetachPending:
        """What to raise while its outcome is open."""
        what = DetachPending if self.phase in GOING else AttachPending
        drive = f" (index {self.drive.index}, drive {self.drive.id})" if self.drive else ""
        stands = "attached, but not written down yet" if self.attached else str(self.phase)
        return what(
            f"device {self.id}{drive} is {stands}, and what it took stays taken: {why}",
            **self.facts,
        )


if TYPE_CHECKING:

    class AttachedDevice(BlockDevice):
        """What `attach` returns: a BlockDevice, whose drive is there until it is detached. So a
        type checker asks nobody to look whether it is; when the program runs, both are one
        class."""

        drive: BlockDrive

else:
    AttachedDevice = BlockDevice
