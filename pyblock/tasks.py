"""Work that outlives its callers: a task, and those who wait for it.

A deadline or a cancellation ends the waiting, never an operation: a VMM that was sent half of it
would be left half done. It goes on in its own task, and looks at `abandoned` to learn that nobody
waits for it any more. Work that several wait for together ends with the last of them.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from enum import StrEnum
from typing import Any, Generic, TypeVar

from pyblock.errors import DeadlinePassed, InvalidTimeout, said

Result = TypeVar("Result")

log = logging.getLogger(__name__)


# Whose operation this task is, for the log of those who know drives only.
SANDBOX: ContextVar[str | None] = ContextVar("sandbox", default=None)

TIMEOUT_MAX = 1e9  # seconds, 30 years: beyond it a clock's fractions are lost


class Deadline(float):
    """An event loop's time in seconds, which remembers how many seconds the caller gave: for
    errors.

    :ivar given: those seconds.
    """

    __slots__ = ("given",)

    given: float


def given(deadline: float | None) -> float | None:
    """The seconds that the caller gave, where the deadline knows them."""
    return deadline.given if isinstance(deadline, Deadline) else None


def passed(deadline: float | None, doing: str) -> DeadlinePassed:
    """What to raise when a caller's deadline has passed and nothing was changed."""
    which = f"deadline of {deadline.given:g} s" if isinstance(deadline, Deadline) else "deadline"
    text = f"the {which} that was given passed while {doing}; nothing was changed"
    return DeadlinePassed(text, timeout=given(deadline))


def deadline_after(timeout: float | None) -> float | None:
    """The event loop's time that many seconds from now; None (no deadline) stays None. Raises
    InvalidTimeout unless 0 <= timeout <= 1e9."""
    if timeout is None:
        return None
    if (
        isinstance(timeout, bool)
        or not isinstance(timeout, (int, float))
        or not 0 <= timeout <= TIMEOUT_MAX
    ):
        raise InvalidTimeout(
            f"timeout {said(timeout)} is not a number of seconds that is 0 or more; None waits "
            "without end",
            value=timeout,
        )
    deadline = Deadline(asyncio.get_running_loop().time() + timeout)
    deadline.given = timeout
    return deadline


async def over(future: asyncio.Future[Any]) -> None:
    """Returns when it is over, however it ended. A cancellation ends the waiting only."""
    await asyncio.wait([future])


class Waiters(StrEnum):
    """Who waits for an operation."""

    AWAITED = "awaited"  # by all who ever asked
    LEFT = "left by some"  # who may ask again what became of it
    ABANDONED = "abandoned"  # nobody does; an attach is then undone


class Operation(ABC):
    """A task and who waits for it.

    :ivar waiters: who hears of its outcome.
    :ivar undoing: nobody asked for a removal: abandoned, it undoes itself, and should be given the
        time for that.
    :ivar done: it is over.
    :ivar error: what it ended in, None where it succeeded.
    """

    __slots__ = ("_task", "_waiting", "_wakers", "done", "error", "undoing", "waiters")

    def __init__(self, waiters: Waiters = Waiters.AWAITED, *, undoing: bool = False) -> None:
        self.waiters = waiters
        self.undoing = undoing
        self.done = False
        self.error: BaseException | None = None
        self._waiting = 0
        self._wakers: list[asyncio.Future[None]] = []
        # Made by whoever it belongs to, who keeps it until it is over: the event loop holds its
        # tasks weakly. It may be over before that has returned (asyncio's eager tasks).
        self._task: asyncio.Task[None] | None = None

    @abstractmethod
    async def work(self) -> None:
        """What it does."""

    async def _run(self) -> None:
        try:
            await self.work()
        except BaseException as error:
            self.error = error
            if not isinstance(error, Exception | asyncio.CancelledError):
                raise
            if self.waiters is Waiters.ABANDONED:
                log.warning("an operation that nobody waits for any more ended in: %s", error)
        finally:
            self.done = True
            for waker in self._wakers:
                if not waker.done():
                    waker.set_result(None)

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it."""
        return self.waiters is Waiters.ABANDONED

    @property
    def succeeded(self) -> bool:
        """True when it is over and raised nothing."""
        return self.done and self.error is None

    def cancel(self) -> None:
        """Ends the work where it stands; what it was about is then left with an unknown outcome."""
        assert self._task is not None  # nobody knows of an operation that was not started
        self._task.cancel()

    async def settled(self, deadline: float | None) -> None:
        """Returns when the operation is over, however it ended. Raises TimeoutError when the
        deadline passes first. A cancellation ends the waiting only."""
        if self.done:
            # eager tasks: others have their turn, however many operations follow
            return await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        waker = loop.create_future()
        self._wakers.append(waker)
        timer = loop.call_at(deadline, _expire, waker) if deadline is not None else None
        try:
            await waker
        finally:
            self._wakers.remove(waker)
            if timer is not None:
                timer.cancel()

    async def watch(self) -> None:
        """Returns, or raises, what the work did, for one whose coming and going changes nothing."""
        await self.settled(None)
        if self.error is not None:
            raise self.error

    async def result(self, deadline: float | None) -> None:
        """Returns, or raises, what the work did. A deadline (TimeoutError) or cancellation ends the
        waiting, and perhaps leaves it abandoned."""
        if self.waiters is Waiters.ABANDONED:
            self.waiters = Waiters.LEFT
        self._waiting += 1
        try:
            await self.settled(deadline)
        finally:
            self._waiting -= 1
            if not self.done:
                self.waiters = Waiters.LEFT if self._waiting else Waiters.ABANDONED
        if self.error is not None:
            raise self.error


def _expire(waker: asyncio.Future[None]) -> None:
    if not waker.done():
        waker.set_exception(TimeoutError())


class Ended(Exception):
    """The work was ended by `end`, not by whoever waits for it."""


class SharedWork(Generic[Result]):
    """One piece of work that several callers wait for together (connecting to a VMM, asking it what
    it has), while it is under way, and how many do.

    Whoever comes meanwhile joins it. When the last one leaves (a deadline, a cancellation), it is
    ended, so that a silent peer holds up nobody who comes later. An answer is for those who asked:
    the next caller starts anew.
    """

    __slots__ = ("_task", "_waiters")

    def __init__(self) -> None:
        self._task: asyncio.Task[Result] | None = None
        self._waiters = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is under way, and nobody waits."""
        return self._task is None

    async def join(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Starts `work` unless it is under way, and returns or raises what it does. Raises Ended
        when `end` cuts it off."""
        if self._task is None or self._task.done():
            self._task, self._waiters = asyncio.create_task(work()), 0
            # it may be that all have left
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        task = self._task
        self._waiters += 1
        try:
            # no shield: from Python 3.14 on that reports an error after a cancelled wait to the
            # event loop
            await asyncio.wait([task])
        finally:
            if self._task is task:
                self._waiters -= 1
                if not self._waiters:
                    self._task = None
                    task.cancel()
        if task.cancelled():
            raise Ended
        if (error := task.exception()) is not None:
            raise copy.copy(error)  # each has its own: whoever it goes to adds what he knows
        return task.result()

    async def end(self) -> None:
        """Ends what is under way, and returns when it is over."""
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait([task])
