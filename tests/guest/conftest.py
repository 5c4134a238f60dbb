"""Tests against a real kernel in a real QEMU: minutes, not seconds. See tests/kit."""

from kit.fixtures import bare_machine, guest_machine, pytest_runtest_makereport, start_machine

__all__ = ["bare_machine", "guest_machine", "pytest_runtest_makereport", "start_machine"]
