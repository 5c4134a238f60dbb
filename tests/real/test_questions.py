"""What QEMU is asked while disks are plugged in: what cannot have changed is not asked again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from kit import Machine

from pyblock import Sandbox
from pyblock.vmm.qemu.qmp import QmpSession
from pyblock.vmm.qemu.qmp_connection import Command

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

Start = Callable[..., Machine]

DISKS = 100
ENOUGH = 120.0  # seconds: a deadline that is not meant to pass


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each command was sent from now on."""
    counted: Counter[str] = Counter()
    execute = QmpSession.execute

    async def counting(
        session: QmpSession, command: str, arguments: Mapping[str, Any] | None = None, **more: Any
    ) -> Any:
        counted[command] += 1
        return await execute(session, command, arguments, **more)

    send_both = QmpSession.send_both

    async def counting_both(session: QmpSession, first: Command, second: Command) -> Any:
        counted.update((first.name, second.name))
        return await send_both(session, first, second)

    monkeypatch.setattr(QmpSession, "execute", counting)
    monkeypatch.setattr(QmpSession, "send_both", counting_both)
    return counted


async def test_a_stopped_machine_is_asked_for_its_buses_once(
    start_machine: Start, questions: Counter[str]
) -> None:
    """Its firmware numbers them, and does nothing while it is stopped. Once it was asked for each
    disk, at 2.8 ms."""
    ports = [
        f"pcie-root-port,id=p{n},chassis={n + 1},addr={0x10 + n // 8:#x}.{n % 8},multifunction=on"
        for n in range(DISKS)
    ]
    machine = start_machine(
        guest=False, ports=0, extra=[text for port in ports for text in ("-device", port)]
    )
    async with Sandbox(
        "one", f"qemu:{machine.qmp_path}", driver="virtio-blk", store=None
    ) as sandbox:
        for number in range(DISKS):
            device = await sandbox.attach(machine.image(f"i{number}"), timeout=ENOUGH)
            assert device.held.guest_match is not None  # the port alone tells it
        assert questions["device_add"] == DISKS
        assert questions["query-pci"] == 1


async def test_a_machine_that_goes_on_is_asked_again(
    start_machine: Start, questions: Counter[str]
) -> None:
    machine = start_machine(guest=False, ports=4)
    async with Sandbox(
        "one", f"qemu:{machine.qmp_path}", driver="virtio-blk", store=None
    ) as sandbox:
        for name in ("a", "b"):
            await sandbox.attach(machine.image(name), timeout=ENOUGH)
        assert questions["query-pci"] == 1
        machine.side.command("cont")
        machine.side.wait_event("RESUME")
        machine.side.command("stop")
        for name in ("c", "d"):
            await sandbox.attach(machine.image(name), timeout=ENOUGH)
        # The firmware may have numbered the buses by then or not; where it has, and all are known,
        # nothing is left to ask.
        assert questions["query-pci"] == 2


async def test_one_write_is_for_names_that_nobody_else_can_have(
    bare_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made up, and told to no VMM before: not a caller's, and not one that was there already."""
    together: list[str] = []
    send_both = QmpSession.send_both

    async def noted(session: QmpSession, first: Command, second: Command) -> Any:
        together.append(first.arguments["node-name"])
        return await send_both(session, first, second)

    monkeypatch.setattr(QmpSession, "send_both", noted)
    vm, image = f"qemu:{bare_machine.qmp_path}", bare_machine.image("image")
    async with Sandbox("one", vm, store=None) as sandbox:
        await sandbox.attach(bare_machine.image("given"), device_id="given", timeout=ENOUGH)
        assert not together
        device = await sandbox.attach(image, timeout=ENOUGH)
        assert together == [device.held.id]
        info = device.info
        # another user, who has yet to attach it: it is the same device then
        sandbox.manager.obtain(info)
        await sandbox.detach(device, timeout=ENOUGH)
        again = await sandbox.attach(image, timeout=ENOUGH)
        assert again is device and together == [device.held.id]
        await sandbox.detach(again, timeout=ENOUGH)
        await sandbox.attach(bare_machine.image("other"), timeout=ENOUGH)
        assert len(set(together)) == 2
