"""The unit of cost: a cffi call that does nothing, built the way the core is built (API mode,
abi3)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

from cffi import FFI

FOLDER = Path("build/bench")


@cache
def empty_call() -> Callable[[], int]:
    """The function `int nothing(void)`."""
    builder = FFI()
    builder.cdef("int nothing(void);")
    builder.set_source(
        "pyblock_bench_nothing", "static int nothing(void) { return 0; }", py_limited_api=True
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = builder.compile(str(FOLDER))
    spec = importlib.util.spec_from_file_location("pyblock_bench_nothing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nothing: Callable[[], int] = module.lib.nothing
    return nothing
