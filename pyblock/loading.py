"""A module that is imported when it is first needed: inside a call, where no file can be opened perhaps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyblock.errors import PyblockError, StoreError


@contextmanager
def loading(what: str, error: type[PyblockError] = StoreError) -> Iterator[None]:
    """Around an import: has it raise a typed error when its file cannot be read. The import is tried again by the next call."""
    try:
        yield
    except OSError as trouble:
        advice = "close files, or raise the limit (ulimit -n)"
        raise error(f"{what} cannot be used: its code cannot be loaded: {trouble.strerror or trouble}; {advice}") from trouble
