"""Ratios, not times: each row runs ours and a rival in turn, and compares the medians of one run.

pytest-benchmark times ours; its set-up hook, which runs before every round, times the rival. The
rows stand in the JSON result as `extra_info`, and in one table at the end. `--short` takes few
rounds and fails on rows that miss by more than the slack: CI's form.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from rows import NOTES, ROWS, Row, write_result

ROUNDS, SHORT_ROUNDS = 25, 7

Work = Callable[..., object]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--short",
        action="store_true",
        help="few rounds; rows that miss their target by more than the slack fail",
    )


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return SHORT_ROUNDS if request.config.getoption("--short") else ROUNDS


@pytest.fixture
def short(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--short"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Takes a row up into the table; in the short form a row far off its target fails."""

    def take(row: Row) -> None:
        ROWS.append(row)
        if request.config.getoption("--short"):
            sense = "at most" if row.at_most else "at least"
            assert row.within(row.slack), (
                f"{row.name}: {row.value:.3g} against {row.rival}, {sense} {row.target} with "
                f"slack {row.slack}"
            )

    return take


@pytest.fixture
def versus(
    request: pytest.FixtureRequest, benchmark: Any, rounds: int, record: Callable[[Row], None]
) -> Callable[..., Row]:
    """Runs ours and a rival in turn. `at_most`: ours/rival may not exceed it. `at_least`:
    rival/ours must reach it.

    Both are timed by the clock of the test's mark (`benchmark(timer=…)`), else by the wall's.
    """
    marker = request.node.get_closest_marker("benchmark")
    clock: Callable[[], float] = marker.kwargs["timer"] if marker is not None else time.perf_counter

    def run(
        name: str,
        ours: Work,
        rival_name: str,
        rival: Work,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        ours_units: float = 1,
        rival_units: float = 1,
        unit: str = "call",
        rounds: int = rounds,
        slack: float = 1.5,
        prepare_ours: Callable[[], tuple[Any, ...]] = tuple,
        prepare_rival: Callable[[], tuple[Any, ...]] = tuple,
    ) -> Row:
        """What `prepare_…` returns is passed to the work, anew for every round and outside of its
        time."""
        rival_times: list[float] = []

        def before() -> tuple[tuple[Any, ...], dict[str, Any]]:
            arguments = prepare_rival()
            start = clock()
            rival(*arguments)
            rival_times.append(clock() - start)
            return prepare_ours(), {}

        benchmark.pedantic(ours, setup=before, rounds=rounds, warmup_rounds=2)
        mine = benchmark.stats.stats.median / ours_units
        theirs = statistics.median(rival_times[2:]) / rival_units
        value = theirs / mine if at_least is not None else mine / theirs
        row = Row(
            name=name,
            rival=rival_name,
            value=value,
            target=at_least if at_least is not None else at_most,
            at_most=at_least is None,
            ours_ns=mine * 1e9,
            rival_ns=theirs * 1e9,
            unit=unit,
            slack=slack,
        )
        benchmark.extra_info.update(asdict(row), met=row.met)
        record(row)
        return row

    return run


@pytest.fixture
def note() -> Callable[[str], None]:
    """A line below the table: what was measured and has no target."""
    return NOTES.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ratios in this run")
    width = max(len(row.name) for row in ROWS)
    rivals = max(len(row.rival) for row in ROWS)
    write(
        f"{'what':{width}}  {'against':{rivals}}  {'ratio':>9}  {'target':>10}  {'ours':>11}  "
        f"{'rival':>11}"
    )
    for row in ROWS:
        target = (
            "-" if row.target is None else ("≤ " if row.at_most else "≥ ") + f"{row.target:.4g}"
        )
        verdict = "" if row.met else "  MISS"
        times = f"{_time(row.ours_ns):>11}  {_time(row.rival_ns):>11}"
        write(
            f"{row.name:{width}}  {row.rival:{rivals}}  {row.value:9.3f}  {target:>10}  {times}  "
            f"a {row.unit}{verdict}"
        )
    for line in NOTES:
        write(line)
    missed = sum(not row.met for row in ROWS)
    write(f"{len(ROWS)} rows, {missed} missed")
    write(f"result: {write_result()}")


def _time(ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{ns:.1f} ns"
