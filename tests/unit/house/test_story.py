"""No operation's story is longer than benchmarks/story.json allows, and the counting can be
believed."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "story.py"
STORY: dict[str, Any] = runpy.run_path(str(SCRIPT))
BUDGETS: dict[str, dict[str, int]] = STORY["budgets"]()


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    """In a process of its own: what others have made ready changes what is called."""
    code = (
        f"import asyncio, json, runpy; it = runpy.run_path({str(SCRIPT)!r}); "
        "print(json.dumps(it['counted'](asyncio.run(it['tell']()))))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    result: dict[str, dict[str, int]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("operation", BUDGETS)
def test_no_story_is_longer_than_its_budget(
    operation: str, counted: dict[str, dict[str, int]]
) -> None:
    assert STORY["excess"](operation, counted[operation], BUDGETS[operation]) is None


def test_every_operation_has_a_budget(counted: dict[str, dict[str, int]]) -> None:
    assert counted.keys() == BUDGETS.keys()


@pytest.mark.parametrize("count", [{"calls": 81, "files": 12}, {"calls": 80, "files": 13}])
def test_excess_names_both_numbers(count: dict[str, int]) -> None:
    text = STORY["excess"]("attach", count, {"calls": 80, "files": 12})
    assert (
        text
        == f"attach: {count['calls']} calls in {count['files']} files, budget 80 in 12; --tell "
        "lists them"
    )


def test_each_call_is_told_once_however_often_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "def inner():\n    yield 1\n    yield 2\n\ndef outer():\n"
        "    return [each for each in inner()]\n"
    )
    (tmp_path / "two.py").write_text(
        "import one\n\ndef twice():\n    return one.outer() + one.outer()\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import two  # type: ignore[import-not-found]  # noqa: PLC0415
    finally:
        sys.path.remove(str(tmp_path))
    teller = STORY["Teller"](tmp_path)
    with teller.listening("it"):
        assert two.twice() == [1, 2, 1, 2]
    once = [("one.py", "outer"), ("one.py", "inner")]
    assert teller.stories == {"it": [("two.py", "twice"), *once, *once]}
    assert STORY["counted"](teller.stories) == {"it": {"calls": 5, "files": 2}}
