"""Many attaches at once: all or none.

Each runs in a task of its own. When one fails, the others are detached again, and whoever asked gets the first error.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from pyblock.device import BlockDevice
from pyblock.tasks import over

NOTES = 5  # different errors of a batch that are shown beside the first


class Batch:
    """:param attach: attaches the device at a position.
    :param detach: takes that back.
    :param begun: is called when every task has had its first turn.
    :param progress: is called with each device that is attached.
    """

    def __init__(
        self,
        attach: Callable[[int], Awaitable[BlockDevice]],
        detach: Callable[[BlockDevice], Awaitable[None]],
        *,
        begun: Callable[[], None],
        progress: Callable[[BlockDevice], None] | None,
    ) -> None:
        self._attach = attach
        self._detach = detach
        self._begun = begun
        self._progress = progress
        self._attached: dict[int, BlockDevice] = {}
        self._errors: list[BaseException] = []

    async def run(self, count: int) -> list[BlockDevice]:
        """The devices at positions 0 … count - 1, attached; or what the first that failed raised, with the others as its notes."""
        # The tasks start in this order, and an attach reserves before it first waits: so the indexes follow the positions.
        tasks = [asyncio.ensure_future(self._one(position)) for position in range(count)]
        try:
            try:
                await asyncio.sleep(0)
            finally:
                self._begun()
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await self.take_back(tasks)
            raise
        if self._errors:
            await self.take_back(tasks)
            raise_first(self._errors)
        return [self._attached[position] for position in range(count)]

    async def _one(self, position: int) -> None:
        try:
            device = await self._attach(position)
        except BaseException as error:
            self._errors.append(error)
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            self._attached[position] = device
            if self._progress is not None:
                self._progress(device)

    async def take_back(self, tasks: Sequence[asyncio.Future[None]] = ()) -> None:
        """Undoes what was attached when the tasks are over. Trouble goes behind the errors; what does not end in time is pending."""

        async def undo() -> None:
            if tasks:
                await asyncio.wait(tasks)
            done = await asyncio.gather(*(self._detach(device) for device in self._attached.values()), return_exceptions=True)
            self._errors.extend(error for error in done if isinstance(error, BaseException))

        # In a task of its own: another cancellation must not leave what was attached without an owner. The first one waits for it, too:
        # the sandbox, which is perhaps being closed, must not cut off what is half undone.
        undoing = asyncio.ensure_future(undo())
        try:
            await over(undoing)
        except asyncio.CancelledError:
            await over(undoing)
            raise


def raise_first(errors: list[BaseException]) -> None:
    """Raises the first of the errors with the others as its notes; returns when there is none."""
    if errors:
        for other, count in Counter(str(error) for error in errors[1:]).most_common(NOTES):
            errors[0].add_note(f"also: {other}" + (f" ({count} times)" if count > 1 else ""))
        if len(errors) > NOTES + 1:
            errors[0].add_note(f"{len(errors)} failed in all")
        raise errors[0]
