"""Builds pyblock.core._core: the C files of csrc/ behind the declarations of csrc/pyblock.h.

The declarations are not repeated here. They are read out of the header itself, from the region
between its two marks, because a copy that drifts from its C is noticed by nobody: a result declared
too narrow is just wrong.

Switches, all read from the environment at build time:
    PYBLOCK_SANITIZE   what -fsanitize takes: "address,undefined" or "thread"
    PYBLOCK_DEBUG=1    debug information and no optimisation
    PYBLOCK_WERROR=1   every warning is an error
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

# setuptools wants sources relative to the project's root, which is where it runs this file; the
# header is found from anywhere.
CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = ["csrc/id.c", "csrc/index.c", "csrc/name.c", "csrc/plan.c", "csrc/scsi.c"]
HEADERS = ["csrc/internal.h", "csrc/pyblock.h"]

# cffi's glue is compiled with the same arguments and bears no more; tests/c/Makefile holds our own
# files to more.
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wno-unused-parameter"]


def declarations(header: str) -> str:
    """What stands between the marks `>>> cffi` and `<<< cffi` of the header."""
    try:
        _, rest = header.split("/* >>> cffi */")
        region, _ = rest.split("/* <<< cffi */")
    except ValueError:
        raise RuntimeError(
            f"{CSRC / 'pyblock.h'}: the marks '>>> cffi' and '<<< cffi' must stand there once "
            "each, in this order"
        ) from None
    return region


def flags() -> tuple[list[str], list[str]]:
    """The compiler's and the linker's arguments, from the switches."""
    compiler = ["-std=c11", "-pthread", "-fvisibility=hidden", *WARNINGS]
    linker = ["-pthread"]
    if os.environ.get("PYBLOCK_WERROR") == "1":
        compiler += ["-Werror"]
    if os.environ.get("PYBLOCK_DEBUG") == "1":
        compiler += ["-g", "-O0", "-UNDEBUG"]
    if sanitizers := os.environ.get("PYBLOCK_SANITIZE"):
        compiler += [
            f"-fsanitize={sanitizers}",
            "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer",
            "-g",
            "-O1",
        ]
        linker += [f"-fsanitize={sanitizers}"]
    return compiler, linker


def make_builder() -> FFI:
    compiler, linker = flags()
    builder = FFI()
    builder.cdef(declarations((CSRC / "pyblock.h").read_text(encoding="utf-8")))
    builder.set_source(
        "pyblock.core._core",
        '#include "pyblock.h"',
        sources=SOURCES,
        depends=HEADERS,
        include_dirs=["csrc"],
        extra_compile_args=compiler,
        extra_link_args=linker,
        py_limited_api=True,
    )
    return builder


ffibuilder = make_builder()
