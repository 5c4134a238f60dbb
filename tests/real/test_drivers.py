"""Every driver that QEMU's adapter offers plugs a disk in, and says how it is found in the
guest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kit import Machine

from pyblock import Sandbox
from pyblock.vmm.qemu.adapter import OFFERS

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

ENOUGH = 60.0  # seconds: a deadline that is not meant to pass


@pytest.mark.parametrize("driver", sorted(OFFERS))
async def test_a_driver_on_offer(driver: str, start_machine: Callable[..., Machine]) -> None:
    machine = start_machine(guest=False, nvdimm_slots=1)
    async with Sandbox("one", f"qemu:{machine.qmp_path}", driver=driver, store=None) as sandbox:
        device = await sandbox.attach(machine.image("a"), read_only=True, timeout=ENOUGH)
        assert device.held.guest_match or OFFERS[driver].unlocated, (
            f"nothing finds a {driver} disk in the guest, and nothing says why"
        )
        assert device.held.verified == OFFERS[driver].descriptors
        # Its own inventory knows it, as ours and as no stranger: an attach that follows counts
        # none.
        assert await sandbox.reconcile() == [] and not sandbox._machine.allotment.offsets
