"""The fixtures of the kit: a conftest takes them by importing them.

What this machine lacks skips the test with what to install; with PYBLOCK_REQUIRE_GUEST=1 (CI) it
fails, so that nothing is skipped unseen. A failed test's report shows the end of the kernel logs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from .initramfs import KitMissing
from .machine import Machine

STARTED = pytest.StashKey[list[Machine]]()


@contextmanager
def started(machine: str = "q35", **options: Any) -> Iterator[Machine]:
    """A running Machine, or a skip; for fixtures of a wider scope than one test."""
    try:
        built = Machine(machine, **options)
    except KitMissing as missing:
        if os.environ.get("PYBLOCK_REQUIRE_GUEST") == "1":
            pytest.fail(f"PYBLOCK_REQUIRE_GUEST=1 and {missing}", pytrace=False)
        pytest.skip(str(missing))
    with built:
        yield built


@pytest.fixture
def start_machine(request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """Starts machines that live until the test ends; takes what Machine takes."""
    machines: list[Machine] = request.node.stash.setdefault(STARTED, [])
    with ExitStack() as stack:

        def start(machine: str = "q35", **options: Any) -> Machine:
            machines.append(stack.enter_context(started(machine, **options)))
            return machines[-1]

        yield start


@pytest.fixture
def bare_machine(start_machine: Callable[..., Machine]) -> Machine:
    """A paused q35 without a guest, there in 50 ms: for what QMP alone can show."""
    return start_machine(guest=False)


@pytest.fixture
def guest_machine(start_machine: Callable[..., Machine]) -> Machine:
    """A q35 with a guest that answers, `scsi0.0`, four root ports and four nvdimm slots."""
    return start_machine(nvdimm_slots=4)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [
            (f"machine {machine.folder}", machine.log_tail())
            for machine in item.stash.get(STARTED, [])
        ]
    return report
