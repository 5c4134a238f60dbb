"""Tests against a real QEMU that is paused and has no guest: milliseconds each. See tests/kit."""

from kit.fixtures import bare_machine, pytest_runtest_makereport, start_machine

__all__ = ["bare_machine", "pytest_runtest_makereport", "start_machine"]
