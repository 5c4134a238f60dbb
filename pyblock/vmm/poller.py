"""Waiting for what a VMM does not announce: all who wait share one question, asked again and again,
less often as time passes.

A question that fails says nothing about what it asked for, so it is asked again. Only closing ends
it.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Collection

from pyblock.errors import TransportError, VmmUnreachable

SOONEST = 0.01  # seconds until the second question
SLOWEST = 1.0  # seconds between two questions at most
GROWTH = 1.5  # of that time, from one question to the next


class _Waiters:
    """Who waits for one name: how many, and how it ended."""

    __slots__ = ("count", "error", "over")

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None
        self.over = asyncio.Event()


class Poller:
    """:param ask: asks the VMM which of all names are there.
    :param where: what errors call the VMM.
    """

    def __init__(self, ask: Callable[[], Awaitable[Collection[str]]], where: str) -> None:
        self._ask = ask
        self._where = where
        self._waiting: dict[str, _Waiters] = {}
        self._pause = SOONEST
        self._hurried = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def gone(self, name: str) -> None:
        """Returns when the VMM has said, to a question that was asked from now on, that it has
        nothing of that name. Raises VmmUnreachable when `close` ends the asking, and whatever is no
        TransportError of the question's own."""
        waiters = self._waiting.setdefault(name, _Waiters())
        waiters.count += 1
        self.hurry()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            await waiters.over.wait()
        finally:
            waiters.count -= 1
            if not waiters.count and self._waiting.get(name) is waiters:
                del self._waiting[name]
                self._hurried.set()  # nobody waits any more, or fewer
        if waiters.error is not None:
            # each has its own: whoever it goes to adds what he knows
            raise copy.copy(waiters.error)

    def hurry(self) -> None:
        """Has it asked at once: something says that the answer may be another now."""
        self._pause = SOONEST
        self._hurried.set()

    async def close(self) -> None:
        """Ends the asking, and whoever still waits."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._fail(VmmUnreachable(f"{self._where}: closed while a removal was waited for"))

    async def _run(self) -> None:
        while self._waiting:
            self._hurried.clear()
            asked = dict(self._waiting)  # who comes now is answered by the next question
            try:
                there = await self._ask()
            except TransportError:
                pass
            except Exception as error:  # the adapter is at fault, and would be again
                return self._fail(error)
            else:
                for name, waiters in asked.items():
                    if name not in there:
                        if self._waiting.get(name) is waiters:
                            del self._waiting[name]
                        waiters.over.set()
            if not self._waiting:
                return
            try:
                async with asyncio.timeout(self._pause):
                    await self._hurried.wait()
            except TimeoutError:
                self._pause = min(self._pause * GROWTH, SLOWEST)

    def _fail(self, error: Exception) -> None:
        waiting, self._waiting = self._waiting, {}
        for waiters in waiting.values():
            waiters.error = error
            waiters.over.set()
