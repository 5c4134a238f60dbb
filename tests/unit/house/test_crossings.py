"""No operation crosses into C more often than benchmarks/crossings.json allows, and the counting
itself can be believed."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "crossings.py"
CROSSINGS: dict[str, Any] = runpy.run_path(str(SCRIPT))
BUDGETS: dict[str, dict[str, int]] = CROSSINGS["budgets"]()


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    result: dict[str, dict[str, int]] = CROSSINGS["count"]()
    return result


@pytest.mark.parametrize("operation", BUDGETS)
def test_no_more_crossings_than_the_budget(
    operation: str, counted: dict[str, dict[str, int]]
) -> None:
    assert CROSSINGS["excess"](operation, counted[operation], BUDGETS[operation]) is None


def test_every_operation_has_a_budget(counted: dict[str, dict[str, int]]) -> None:
    assert counted.keys() == BUDGETS.keys()


def test_a_plan_is_one_crossing(counted: dict[str, dict[str, int]]) -> None:
    assert counted["plan of one device"] == {"pb_plan": 1}


def test_excess_names_both_numbers() -> None:
    text = CROSSINGS["excess"]("attach", {"pb_plan": 1, "pb_make_id": 2}, {"pb_plan": 1})
    assert text == "attach: 3 crossings, budget 1; more than there: {'pb_make_id': 2}"


def test_functions_are_counted_wherever_they_are_bound() -> None:
    """At import or at the call, and no more than really happen."""
    code = f"""
import runpy
lib = runpy.run_path({str(SCRIPT)!r})["install"]()
from pyblock import BlockIndex
index = BlockIndex(8)
before = lib.calls.copy()
for _ in range(3):
    index.release(index.acquire())
index.acquire_many(2)
assert dict(lib.calls - before) == {{"pb_index_acquire": 3, "pb_index_release": 3, "pb_index_acquire_many": 1}}, lib.calls
"""  # noqa: E501
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1], check=True)
