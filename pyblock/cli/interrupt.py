"""Ctrl-C: what a command had begun is undone, or left as the store knows it; the last line says which, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

from pyblock.device import BlockDevice, Phase
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
    """:param sandboxes: what the command had open."""

    def __init__(self, sandboxes: Iterable[Sandbox]) -> None:
        pending = list(filter(None, map(_pending, sandboxes)))
        super().__init__("; ".join(["interrupted", *(pending or ["nothing of it is pending"])]))


def _pending(sandbox: Sandbox) -> str:
    pending = [f"{_PENDING[one.phase]} of {one.id}" for one in sandbox.devices if isinstance(one, BlockDevice) and one.phase in _PENDING]
    if not pending:
        return ""
    more = f" and {len(pending) - NAMED} more" if len(pending) > NAMED else ""
    return (
        f"in sandbox {sandbox.id} is pending: {', '.join(pending[:NAMED])}{more}; what they took stays taken until they are settled by: "
        f"pyblock reconcile --sandbox {sandbox.id}"
    )
