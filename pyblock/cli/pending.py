"""What a command had begun and could not end, by its deadline or by Ctrl-C: the store knows it, and
the command's last line says it."""

from __future__ import annotations

from collections.abc import Iterable

from pyblock.life.device import BlockDevice
from pyblock.life.table import Phase
from pyblock.sandbox import Sandbox

STATUS = 130  # as a shell reports a SIGINT
_PENDING = {
    Phase.ATTACHING: "attach",
    Phase.ATTACH_PENDING: "attach",
    Phase.DETACHING: "detach",
    Phase.DETACH_PENDING: "detach",
}
NAMED = 20  # devices that are named; the store knows them all


class Interrupted(Exception):
    """Ctrl-C.

    :param sandboxes: what the command had open.
    """

    def __init__(self, sandboxes: Iterable[Sandbox]) -> None:
        left = list(filter(None, map(pending, sandboxes)))
        super().__init__("; ".join(["interrupted", *(left or ["nothing of it is pending"])]))


def pending(sandbox: Sandbox) -> str:
    """Which devices of a sandbox are pending, and what to do; "" for none."""
    found = [
        f"{_PENDING[one.phase]} of {one.id}"
        for one in sandbox.devices
        if isinstance(one, BlockDevice) and one.phase in _PENDING
    ]
    if not found:
        return ""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return (
        f"in sandbox {sandbox.id} is pending: {', '.join(found[:NAMED])}{more}; what they took "
        "stays taken until they are settled by: "
        f"pyblock reconcile --sandbox {sandbox.id}"
    )
