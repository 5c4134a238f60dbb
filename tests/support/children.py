"""A function run in a forked child: for what may only happen to a process of its own, as another
user or a death half-way."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable

NOBODY = 65534


def in_child(function: Callable[[], str], *, uid: int | None = None) -> tuple[int, str]:
    """The child's exit status (negative: the signal that killed it), and the text that the function
    returned or its traceback."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # of forking beside threads; the child touches none of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 99
        try:
            os.close(reader)
            if uid is not None:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            text = function()
            status = 0
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(writer, text.encode()[:60000])
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text
