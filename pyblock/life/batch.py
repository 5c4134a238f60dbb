"""Many attaches at once: all or none.

Each runs in a task of its own. When one fails, the others are detached again, and whoever asked
gets the first error, which says what became of each.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from pyblock.errors import ClosedMeanwhile, DeviceOutcome, PyblockError
from pyblock.life.device import AttachedDevice, BlockDevice
from pyblock.tasks import over

NOTES = 5  # different errors of a batch that are shown beside the first


class Batch:
    """:param devices: what is to be attached.
    :param attach: attaches the device at a position.
    :param detach: takes that back.
    :param begun: is called when every task has had its first turn.
    :param progress: is called with each device that is attached.
    """

    def __init__(
        self,
        devices: Sequence[BlockDevice],
        attach: Callable[[int], Awaitable[AttachedDevice]],
        detach: Callable[[BlockDevice], Awaitable[None]],
        *,
        begun: Callable[[], None],
        progress: Callable[[BlockDevice], None] | None,
    ) -> None:
        self._devices = devices
        self._attach = attach
        self._detach = detach
        self._begun = begun
        self._progress = progress
        self._attached: dict[int, AttachedDevice] = {}
        self._failed: dict[int, BaseException] = {}  # in the order in which they failed
        # what of the attached could not be detached again
        self._undoing: dict[int, BaseException] = {}

    async def run(self) -> list[AttachedDevice]:
        """The devices, attached; or what the first that failed raised, with the others as its
        notes."""
        # The tasks start in this order, and an attach reserves before it first waits: so the
        # indexes follow the positions.
        tasks = [
            asyncio.ensure_future(self._one(position)) for position in range(len(self._devices))
        ]
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
        if self._failed:
            await self.take_back(tasks)
            raise_first([*self._failed.values(), *self._undoing.values()], self.outcomes())
        return [self._attached[position] for position in range(len(self._devices))]

    async def _one(self, position: int) -> None:
        try:
            device = await self._attach(position)
        except BaseException as error:
            self._failed[position] = error
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            self._attached[position] = device
            if self._progress is not None:
                self._progress(device)

    async def take_back(self, tasks: Sequence[asyncio.Future[None]] = ()) -> None:
        """Undoes what was attached when the tasks are over. What does not end in time is
        pending."""

        async def undo() -> None:
            if tasks:
                await asyncio.wait(tasks)
            done = await asyncio.gather(
                *(self._detach(device) for device in self._attached.values()),
                return_exceptions=True,
            )
            self._undoing = {
                position: error
                for position, error in zip(self._attached, done, strict=True)
                if isinstance(error, BaseException)
            }

        # In a task of its own: another cancellation must not leave what was attached without an
        # owner. The first one waits for it, too: the sandbox, which is perhaps being closed, must
        # not cut off what is half undone.
        undoing = asyncio.ensure_future(undo())
        try:
            await over(undoing)
        except asyncio.CancelledError:
            await over(undoing)
            raise

    def outcomes(self) -> tuple[DeviceOutcome, ...]:
        """What became of each, when it was not attached for good."""
        return tuple(map(self._outcome, range(len(self._devices)), self._devices))

    def _outcome(self, position: int, device: BlockDevice) -> DeviceOutcome:
        device = self._attached.get(position, device)
        error = self._failed.get(position)
        if isinstance(error, asyncio.CancelledError):
            text = (
                f"device {device.id}: its attach was cut off; it is undone, or pending until it is"
            )
            error = ClosedMeanwhile(text, device=device.id, path=device.info.path)
        undoing = self._undoing.get(position)
        return DeviceOutcome(
            device.id,
            device.info.path,
            error,
            position in self._attached and undoing is None,
            undoing,
        )


def raise_first(errors: Sequence[BaseException], outcomes: tuple[DeviceOutcome, ...]) -> None:
    """Raises the first of the errors with the others as its notes, and all outcomes; returns when
    there is none."""
    if not errors:
        return
    first = errors[0]
    if isinstance(first, PyblockError):
        first = copy.copy(first)  # others may wait for the same, and have it raised too
        first.outcomes = outcomes
    for other, count in Counter(str(error) for error in errors[1:]).most_common(NOTES):
        first.add_note(f"also: {other}" + (f" ({count} times)" if count > 1 else ""))
    if len(errors) > NOTES + 1:
        first.add_note(f"{len(errors)} failed in all")
    raise first
