"""One piece of work that several callers wait for together: connecting to a VMM, asking it what it has.

Whoever comes while it is under way joins it. When the last one leaves (a deadline, a cancellation), it is ended, so that a silent peer
holds up nobody who comes later. An answer is for those who asked: the next caller starts anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Ended(Exception):
    """The work was ended by `end`, not by whoever waits for it."""


class SharedWork(Generic[Result]):
    """The work, while it is under way, and how many wait for it."""

    __slots__ = ("_task", "_waiters")

    def __init__(self) -> None:
        self._task: asyncio.Task[Result] | None = None
        self._waiters = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is under way, and nobody waits."""
        return self._task is None

    async def join(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Starts `work` unless it is under way, and returns or raises what it does. Raises Ended when `end` cuts it off."""
        if self._task is None or self._task.done():
            self._task, self._waiters = asyncio.create_task(work()), 0
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may be that all have left
        task = self._task
        self._waiters += 1
        try:
            await asyncio.wait([task])  # no shield: from Python 3.14 on that reports an error after a cancelled wait to the event loop
        finally:
            if self._task is task:
                self._waiters -= 1
                if not self._waiters:
                    self._task = None
                    task.cancel()
        if task.cancelled():
            raise Ended
        return task.result()

    async def end(self) -> None:
        """Ends what is under way, and returns when it is over."""
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait([task])
