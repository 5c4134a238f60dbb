"""A device that needs no plugging: a host device node that is only counted, as the original's
GenericDevice is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyblock.errors import AttachCountExhausted, NotAttached
from pyblock.life.table import ATTACH_COUNT_MAX

if TYPE_CHECKING:
    from pyblock.disk.model import DeviceInfo


class GenericDevice:
    """Counts attaches and touches no VMM.

    :ivar id: the device ID.
    :ivar info: what the caller asked for.
    :ivar attach_count: attaches that no detach stands against yet.
    :ivar ref_count: how many users the manager has given it to.
    :ivar kata: what the original wrote of it, kept for what pyblock does not know; b"" for nothing.
    """

    __slots__ = ("attach_count", "id", "info", "kata", "ref_count")

    def __init__(self, device_id: str, info: DeviceInfo) -> None:
        self.id = device_id
        self.info = info
        self.attach_count = 0
        self.ref_count = 0
        self.kata = b""

    def __repr__(self) -> str:
        return (
            f"<GenericDevice {self.id} count={self.attach_count} {self.info.dev_type} "
            f"{self.info.major}:{self.info.minor}>"
        )

    def attach(self) -> None:
        """Counts one attach. Raises AttachCountExhausted."""
        if self.attach_count >= ATTACH_COUNT_MAX:
            text = (
                f"device {self.id} is attached {self.attach_count} times, which is all the count "
                "can hold"
            )
            raise AttachCountExhausted(text, device=self.id)
        self.attach_count += 1

    def detach(self) -> None:
        """Takes one attach back. Raises NotAttached."""
        if self.attach_count == 0:
            text = f"device {self.id} is not attached; every detach needs an attach of its own"
            raise NotAttached(text, device=self.id)
        self.attach_count -= 1
