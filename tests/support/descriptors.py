"""What this process has open, and how many more it may open."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def descriptors() -> dict[str, str]:
    """What this process has open, by number."""
    found = {}
    for one in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # of the listing's own
            found[one.name] = str(one.readlink())
    return found


@contextmanager
def no_more_than(more: int) -> Iterator[None]:
    """So many descriptors more can be opened, and no more."""
    lowest = os.dup(2)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
