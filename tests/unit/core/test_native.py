"""The joint between the header and Python: everything that is declared is there, and every status
has its exception."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyblock.core import _native
from pyblock.core._core import ffi, lib
from pyblock.core.index import BlockIndex
from pyblock.errors import InvalidIndex, PyblockError

ROOT = Path(__file__).resolve().parents[3]
HEADER = (ROOT / "csrc" / "pyblock.h").read_text(encoding="utf-8")
REGION = HEADER.split("/* >>> cffi */")[1].split("/* <<< cffi */")[0]
STATUSES = {name: int(value) for name, value in re.findall(r"#define PB_(E\w+) (-\d+)", REGION)}
# A declaration and the comment that stands right above it.
DECLARATIONS = re.findall(
    r"/\*((?:(?!\*/).)*)\*/\n[\w ]+?\*?(pb_\w+)\(((?:(?!\);).)*)\);", REGION, re.DOTALL
)


def test_the_header_was_understood() -> None:
    assert len(DECLARATIONS) == len(re.findall(r"\);", REGION)) == 21
    assert len(STATUSES) == 7


def test_every_define_is_in_lib() -> None:
    for name, value in re.findall(r"#define (\w+) (-?\d+)", REGION):
        assert getattr(lib, name) == int(value)


@pytest.mark.parametrize("function", [name for _, name, _ in DECLARATIONS])
def test_every_function_is_in_lib_as_declared(function: str) -> None:
    parameters = next(row[2] for row in DECLARATIONS if row[1] == function)
    assert len(ffi.typeof(getattr(lib, function)).args) == parameters.count(",") + 1


@pytest.mark.parametrize(
    "comment, function", [row[:2] for row in DECLARATIONS], ids=[row[1] for row in DECLARATIONS]
)
def test_every_status_of_a_function_has_its_exception(comment: str, function: str) -> None:
    named = {STATUSES[name] for name in re.findall(r"\bPB_(E[A-Z]+)\b", comment)}
    assert named == set(_native.FAULTS.get(function, {}))


def test_statuses_are_those_of_the_header() -> None:
    assert {name: getattr(_native, name) for name in STATUSES} == STATUSES
    assert set(STATUSES.values()) == {
        status for faults in _native.FAULTS.values() for status in faults
    }


@pytest.mark.parametrize("function", sorted(_native.FAULTS))
def test_every_fault_is_an_exception_and_says_what_to_do(function: str) -> None:
    for error, template in _native.FAULTS[function].values():
        assert issubclass(error, PyblockError | MemoryError)
        assert error is MemoryError or ":" in template or "must" in template


def test_counts_and_lists_of_the_bare_functions() -> None:
    handle = _native.index_new(100)
    _native.index_reserve_many(handle, [5, 70, 99])
    assert _native.index_list(handle, 6, 1) == [70]
    assert _native.index_list(handle, 0, 0) == []
    with pytest.raises(InvalidIndex, match="negative"):
        _native.index_list(handle, 0, -1)
    assert _native.scsi_addresses(65534, 2) == ["255:254", "255:255"]
    assert _native.scsi_addresses(3, 0) == []
    for first, count in [(65535, 2), (-1, 1), (0, -1), (2**70, 1), (0, 2**70), (0, 65537)]:
        with pytest.raises(InvalidIndex, match="65535"):
            _native.scsi_addresses(first, count)


def test_an_index_is_freed_with_its_last_reference() -> None:
    def resident() -> int:
        return int(
            re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[0]
        )

    def churn() -> None:
        for _ in range(500):
            BlockIndex(2**20).reserve(2**20 - 1)  # 130 KiB each
        gc.collect()

    churn()
    before = resident()
    churn()
    assert resident() - before < 30_000  # KiB; 500 of them kept would be 65,000


def test_only_native_touches_the_core() -> None:
    for path in (ROOT / "pyblock").rglob("*.py"):
        if path.name not in ("_native.py", "_native_build.py"):
            assert "_core" not in path.read_text(encoding="utf-8"), path


def test_the_build_refuses_a_header_without_marks() -> None:
    code = (
        "import runpy; runpy.run_path('pyblock/core/_native_build.py')['declarations']('no marks')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "RuntimeError" in done.stderr
    assert ">>> cffi" in done.stderr
