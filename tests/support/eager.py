"""An event loop whose tasks begin at once, inside `create_task`: with asyncio.eager_task_factory,
or a stand-in for it on Python 3.11.

A task may then be over before whoever made it has it in his hands.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import Any

WANTED = os.environ.get("PYBLOCK_EAGER") == "1"


def new_event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    make_eager(loop)
    return loop


def make_eager(loop: Any) -> None:
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    else:
        loop.set_task_factory(_at_once)


def _at_once(loop: Any, coro: Coroutine[Any, Any, Any], **more: Any) -> asyncio.Task[Any]:
    task = asyncio.Task(coro, loop=loop, **more)
    if loop.is_running():
        step = loop._ready.pop()  # what the task has just scheduled
        outer = asyncio.current_task(loop)
        if outer is not None:
            asyncio.tasks._leave_task(loop, outer)
        try:
            step._run()
        finally:
            if outer is not None:
                asyncio.tasks._enter_task(loop, outer)
    return task
