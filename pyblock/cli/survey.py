"""Asking machines what they really have: one, or all that the store knows, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from pyblock.cli import session
from pyblock.cli.session import Target
from pyblock.errors import PyblockError, SandboxBusy, UnknownSandbox
from pyblock.life.recovery import Finding, Outcome
from pyblock.store import host_store
from pyblock.tasks import deadline_after

# machines: each takes a descriptor, and one that does not answer shall hold up few others
AT_ONCE = 32


class Answer(NamedTuple):
    """What came of asking one sandbox's machine.

    :ivar findings: what differs.
    :ivar error: why it could not be asked, None when it was.
    :ivar in_use: the sandbox is open in another process, so it was not asked.
    """

    sandbox_id: str
    findings: Sequence[Finding] = ()
    error: PyblockError | None = None
    in_use: bool = False

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be done by whoever asked."""
        return self.error is None and all(
            one.outcome is not Outcome.PENDING for one in self.findings
        )


class Survey(NamedTuple):
    """How machines are asked; see Sandbox.reconcile. `timeout`: seconds for each."""

    dry_run: bool
    orphans: bool
    timeout: float

    async def one(self, target: Target) -> Answer:
        """Asks one machine; another process that has the sandbox open is waited for."""
        return await self._answer(target, session.BUSY_WAIT)

    async def all(self) -> list[Answer]:
        """Asks all that the store knows but those that another process has open."""
        turns = asyncio.Semaphore(AT_ONCE)

        async def in_turn(sandbox_id: str) -> Answer | None:
            async with turns:
                try:
                    return await self._answer(
                        await session.by_sandbox(sandbox_id, deadline_after(self.timeout)), 0
                    )
                except UnknownSandbox:
                    return None  # it was closed, with nothing in it, since the store was asked
                except PyblockError as error:
                    return _without(sandbox_id, error)

        answers = await asyncio.gather(
            *map(in_turn, await host_store().sandboxes(deadline_after(self.timeout)))
        )
        return [answer for answer in answers if answer is not None]

    async def _answer(self, target: Target, wait: float) -> Answer:
        deadline = deadline_after(self.timeout)
        try:
            async with session.opened(target, deadline, wait=wait) as sandbox:
                found = await sandbox.reconcile(
                    dry_run=self.dry_run, orphans=self.orphans, timeout=session.left(deadline)
                )
                return Answer(sandbox.id, found)
        except PyblockError as error:
            return (
                Answer(target.sandbox_id, error=error)
                if wait
                else _without(target.sandbox_id, error)
            )


def _without(sandbox_id: str, error: PyblockError) -> Answer:
    if isinstance(error, SandboxBusy):
        return Answer(sandbox_id, in_use=True)
    return Answer(sandbox_id, error=error)
