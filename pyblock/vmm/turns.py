"""One turn of an event loop, shared by all connections in it: how many messages are handed over.

With many VMMs at work many answers are there at once, and each is followed by some work of whoever
waited for it. All in one turn, they would keep everything else in the loop waiting for as long.
"""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

MESSAGES_MAX = 4  # in one turn; what follows an answer takes 0.1 to 0.3 ms


class Turn:
    """:ivar left: how many more messages may be handed over in this turn."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MESSAGES_MAX

    def take(self, loop: asyncio.AbstractEventLoop) -> None:
        """Takes note that one is handed over; `loop` is the turn's.

        The next turn is asked for when half of them are gone: for each message alone, that would
        be a turn of its own.
        """
        self.left -= 1
        if self.left == MESSAGES_MAX // 2:
            loop.call_soon(self._over)

    def _over(self) -> None:
        self.left = MESSAGES_MAX


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turn] = WeakKeyDictionary()


def turn_of(loop: asyncio.AbstractEventLoop) -> Turn:
    """The turn that an event loop is in."""
    return _turns.setdefault(loop, Turn())
