"""The life of a device where a task begins at once, and may be over before whoever made it has it
(asyncio.eager_task_factory).

`make eager` runs all of tests/unit and tests/host so; these are those that once failed, and those
of what is given up.
"""

from __future__ import annotations

from typing import Any

import pytest
from support import eager
from test_given_up import *  # noqa: F403 - its tests, on another event loop
from test_interleavings import (
    test_an_unknown_outcome_is_not_guessed_when_the_vmm_is_away as test_away,  # noqa: F401
)
from test_life import image as image  # noqa: PLC0414
from test_life import test_cancellation_at_every_turn_of_the_loop as test_cancelled  # noqa: F401
from test_life import test_the_main_job as test_the_main_job  # noqa: PLC0414
from test_recovery_interleavings import (
    test_a_lost_device_ends_however_often_it_was_attached as test_lost,  # noqa: F401
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": eager.new_event_loop}
