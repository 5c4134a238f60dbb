"""A module that is imported when it is first needed: inside a call, where no file can be opened
perhaps."""

from __future__ import annotations

from types import TracebackType

from pyblock.errors import PyblockError, StoreError


class loading:
    """Around an import: has it raise a typed error when its file cannot be read. The import is
    tried again by the next call.

    A class, because a generator made a context manager takes as long as the import.
    """

    __slots__ = ("_error", "_what")

    def __init__(self, what: str, error: type[PyblockError] = StoreError) -> None:
        self._what = what
        self._error = error

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        trouble: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(trouble, OSError):
            advice = "close files, or raise the limit (ulimit -n)"
            why = f"its code cannot be loaded: {trouble.strerror or trouble}; {advice}"
            raise self._error(f"{self._what} cannot be used: {why}") from trouble
