"""Whose turn it is: what a test waits for, instead of waiting for some time.

Time orders nothing. A test waits until something is so, or until everybody else waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

SOON = 0.05  # seconds: a deadline meant to pass
# seconds: the same, where the VMM must have been reached by then, on a busy machine too
BEGUN = 1.0
LATE = 30.0  # seconds: one that is not


async def until(condition: Callable[[], object]) -> None:
    """Returns when it is so; fails when it never is."""
    async with asyncio.timeout(LATE):
        while not condition():
            await asyncio.sleep(0.001)


async def at_rest() -> None:
    """Returns when each other task of this event loop waits for what is still to come: a thread, a
    socket, a clock, or whoever asks."""
    loop: Any = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(0)
        if not loop._ready:
            # whoever had something to do had its turn before this one, and left nothing
            return
