"""Every command of an attach and of a detach goes wrong once, in every way; what pyblock then
believes is compared with what QEMU has.

Which commands there are is recorded in a run without faults, so a new one is covered by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, cast

import pytest
from kit import Machine
from kit.proxy import Fault, Proxy
from support.snapshot import drive_ids, ordinals

from pyblock import (
    AttachPending,
    BlockDevice,
    DetachPending,
    Phase,
    PyblockError,
    Sandbox,
    VmmRefused,
)
from pyblock.life import registry as manager
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.qemu.adapter import QemuHypervisor

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

Start = Callable[..., Machine]

ID = "x"
DRIVE = f"drive-{ID}"
ENOUGH = 60.0  # seconds: a deadline that is not meant to pass
PASSES = 0.05  # seconds: one that has to pass, since no answer comes
DRIVERS = ["virtio-scsi", "virtio-blk", "nvdimm"]
FAULTS = [fault for fault in Fault if fault not in (Fault.HOLD, Fault.ODD)]
TOO_EARLY = "the deadline passed before the fault struck"
UNANSWERED = (Fault.SILENCE, Fault.MUTE)
PENDING = (Phase.ATTACH_PENDING, Phase.DETACH_PENDING)


class Bench:
    """A machine that is replaced when a case left in it what nothing can remove, and the proxy
    before it."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._stack = contextlib.AsyncExitStack()

    async def renew(self) -> None:
        await self.close()
        self.machine = self._start(guest=False, nvdimm_slots=2, extra=["-action", "reboot=reset"])
        self.image = self.machine.image("disk")
        self.store = SqliteStore(self.machine.folder / "state.db")
        self.proxy = await self._stack.enter_async_context(
            Proxy(self.machine.folder / "proxy", self.machine.qmp_path)
        )

    async def close(self) -> None:
        if hasattr(self, "machine"):
            await self._stack.aclose()
            self.store.close()
            self.machine.close()

    def sandbox(self, driver: str) -> Sandbox:
        return Sandbox("s1", f"qemu:{self.proxy.path}", driver=driver, store=self.store)

    def has(self) -> set[str]:
        """What QEMU has of the drive."""
        side = self.machine.side
        found = {
            "node"
            for node in side.command("query-named-block-nodes", flat=True)
            if node["node-name"] == DRIVE
        }
        for where, what in (("/machine/peripheral", "device"), ("/objects", "object")):
            found |= {
                what for entry in side.command("qom-list", path=where) if entry["name"] == DRIVE
            }
        return found


@pytest.fixture
async def bench(start_machine: Start) -> AsyncIterator[Bench]:
    bench = Bench(start_machine)
    await bench.renew()
    trouble: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: trouble.append(context))
    yield bench
    await bench.close()
    gc.collect()
    loop.set_exception_handler(None)
    assert trouble == []


def takes(sandbox: Sandbox) -> tuple[list[int], dict[str, list[int]], bool]:
    """What the sandbox holds: indexes, ordinals, and whether the drive ID is taken."""
    return list(sandbox.index), ordinals(sandbox), DRIVE in drive_ids(sandbox)


def nothing_left(bench: Bench, sandbox: Sandbox) -> None:
    assert sandbox.devices == []
    assert takes(sandbox) == ([], {}, False)
    assert bench.has() == set()


def all_taken(sandbox: Sandbox, driver: str) -> BlockDevice:
    [device] = sandbox.devices
    assert isinstance(device, BlockDevice)
    family = {"virtio-scsi": "sd", "virtio-blk": "vd", "nvdimm": "pmem"}[driver]
    assert takes(sandbox) == ([0], {family: [0]}, True)
    assert device.held.id == DRIVE
    return device


async def quiet(sandbox: Sandbox) -> None:
    for operation in list(sandbox._machine.running):
        await operation.settled(None)


async def settle(bench: Bench, sandbox: Sandbox, driver: str) -> None:
    """Detaches over a healthy connection, as far as this machine can: nothing is left, or all is
    still taken and the machine renewed."""
    device = all_taken(sandbox, driver)
    plugged = "device" in bench.has()
    if not plugged or driver == "virtio-scsi":
        await sandbox.detach(device, timeout=ENOUGH)
    elif driver == "virtio-blk":  # only a guest, or a reset, lets go of a PCI device
        # a connection may have been lost; asking again is part of no deadline that is meant to pass
        await sandbox.reconcile()
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=PASSES)
        all_taken(sandbox, driver)
        assert {"device", "node"} <= bench.has()
        bench.machine.side.command("system_reset")
        await quiet(sandbox)
        await sandbox.detach(ID, timeout=ENOUGH)
    else:
        with pytest.raises(VmmRefused, match="not supported"):
            await sandbox.detach(device, timeout=ENOUGH)
        all_taken(sandbox, driver)
        assert {"device", "object"} <= bench.has()
        await sandbox.close()
        return await bench.renew()
    nothing_left(bench, sandbox)


async def hung_up(sandbox: Sandbox) -> None:
    """Returns when the sandbox has noticed that its connection ended."""
    session = cast(QemuHypervisor, sandbox._machine.vmm)._qmp
    while session._connection is not None:
        await asyncio.sleep(0)


async def until_struck(case: Callable[[float], Awaitable[str]]) -> str:
    """The outcome of a case, run again with a later deadline if it passed before the fault struck,
    as on a busy machine."""
    deadline = PASSES
    while (outcome := await case(deadline)) == TOO_EARLY:
        deadline *= 2
    return outcome


@pytest.fixture(params=[False, True], ids=["", "both"])
def given(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The device ID that an attach is given: ours, or none. It is then made up, as the same, and
    the node and the device are added by one write."""
    monkeypatch.setattr(manager, "b32encode", lambda _: ID.encode())
    return None if request.param else ID


async def attach_spoiled(
    bench: Bench,
    driver: str,
    fault: Fault,
    which: tuple[str, int],
    given: str | None,
    passes: float,
) -> str:
    """One case; returns how it ended."""
    async with bench.sandbox(driver) as sandbox:
        bench.proxy.expect(fault, which)
        outcome = "attached"
        try:
            await sandbox.attach(
                bench.image, device_id=given, timeout=passes if fault in UNANSWERED else ENOUGH
            )
        except PyblockError as error:
            outcome = type(error).__name__
            if bench.has():
                all_taken(sandbox, driver)
            if isinstance(error, AttachPending):
                all_taken(sandbox, driver)
        struck = bench.proxy.struck
        if fault in UNANSWERED:
            await bench.proxy.drop()
            await hung_up(sandbox)
        await quiet(sandbox)
        if not sandbox.devices:
            assert outcome != "attached"
            nothing_left(bench, sandbox)
            # and it works the next time
            device = await sandbox.attach(bench.image, device_id=ID, timeout=ENOUGH)
            assert device.phase is Phase.ATTACHED
        elif outcome == "attached":
            assert all_taken(sandbox, driver).phase is Phase.ATTACHED
        else:
            assert all_taken(sandbox, driver).phase in PENDING
        await settle(bench, sandbox, driver)
        return outcome if struck else TOO_EARLY


async def commands_of_attach(bench: Bench, driver: str, given: str | None) -> list[str]:
    async with bench.sandbox(driver) as sandbox:
        bench.proxy.expect()
        await sandbox.attach(bench.image, device_id=given, timeout=ENOUGH)
        commands = list(bench.proxy.commands)
        await settle(bench, sandbox, driver)
        return commands


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("driver", DRIVERS)
async def test_every_command_of_an_attach(
    bench: Bench, driver: str, fault: Fault, given: str | None
) -> None:
    commands = await commands_of_attach(bench, driver, given)
    assert {"qmp_capabilities", "device_add"} < set(commands)
    outcomes: dict[str, set[str]] = {}
    for number, command in enumerate(commands):
        try:
            outcome = await until_struck(
                partial(
                    attach_spoiled,
                    bench,
                    driver,
                    fault,
                    (command, commands[:number].count(command)),
                    given,
                )
            )
        except BaseException as error:
            error.add_note(f"{fault.name} at command {number} ({command}) of {commands}")
            raise
        outcomes.setdefault(command, set()).add(outcome)
    if fault is Fault.DELAY:
        assert set().union(*outcomes.values()) == {"attached"}
    if fault in (Fault.CLOSE_BEFORE, Fault.CLOSE_AFTER, Fault.GARBAGE, *UNANSWERED):
        assert outcomes["device_add"] == {"AttachPending"}
        assert outcomes["qmp_capabilities"] <= {
            "DeadlinePassed",
            "VmmProtocolError",
            "VmmUnreachable",
        }
    if fault is Fault.REFUSE:
        assert outcomes["device_add"] == {"VmmRefused"}


# Replies that QMP allows, and that are none to what was asked; and some that it does not allow.
VALUES: list[Any] = [
    5,
    None,
    "text",
    [],
    {},
    [5],
    [None],
    [{}],
    [[]],
    {"return": {}},
    -1,
    2**70,
    1.5,
    True,
]
VALUES += [
    [{"name": 5, "type": 5}],
    [{"node-name": 5}],
    [{"qdev": 5}],
    [{"bus": 0, "devices": 5}],
    [{"type": "nvdimm"}],
]
VALUES += [
    {"fd": "x", "fdset-id": 1},
    {"fd": 1, "fdset-id": -1},
    {"fd": 1},
    [{"fdset-id": 1, "fds": 5}],
]
ERRORS: list[Any] = [
    5,
    None,
    "text",
    [],
    {},
    {"class": 5, "desc": 5},
    {"class": "GenericError"},
    {"desc": "text"},
]
ODD: list[Any] = [{"return": value} for value in VALUES] + [{"error": value} for value in ERRORS]
ODD += [
    {},
    {"return": {}, "error": {"class": "GenericError", "desc": "both"}},
    [],
    5,
    None,
    "text",
    {"event": 5},
    {"QMP": {}},
]


# else each command gets some of them, and each of them befalls some commands
EVERY = 1 if os.environ.get("PYBLOCK_LONG") else 7


@pytest.mark.parametrize("driver", DRIVERS)
async def test_odd_replies_to_an_attach(bench: Bench, driver: str, given: str | None) -> None:
    """Nothing but our errors comes out, and what is known agrees with what is there."""
    commands = await commands_of_attach(bench, driver, given)
    every = EVERY if driver == "virtio-scsi" else 4 * EVERY  # the rest is the same code
    for number, command in enumerate(commands):
        for odd in ODD[number % every :: every]:
            bench.proxy.odd = odd
            try:
                await attach_spoiled(
                    bench,
                    driver,
                    Fault.ODD,
                    (command, commands[:number].count(command)),
                    given,
                    ENOUGH,
                )
            except BaseException as error:
                error.add_note(f"{odd!r} to {command}")
                raise


async def test_odd_replies_to_a_detach(bench: Bench) -> None:
    for command in ("device_del", "blockdev-del", "remove-fd"):
        for odd in ODD:
            bench.proxy.odd = odd
            try:
                await detach_spoiled(bench, Fault.ODD, command, ENOUGH)
            except BaseException as error:
                error.add_note(f"{odd!r} to {command}")
                raise


async def test_odd_replies_to_reconcile(bench: Bench) -> None:
    """Another sandbox is asked all the same, and nothing of the first is believed to be gone."""
    async with bench.sandbox("virtio-scsi") as sandbox:
        await sandbox.attach(bench.image, device_id=ID, timeout=ENOUGH)
        bench.proxy.expect()
        await sandbox.reconcile()
        commands, before = list(bench.proxy.commands), [str(one) for one in sandbox.devices]
        for number, command in enumerate(commands):
            for odd in ODD[number % EVERY :: EVERY]:
                bench.proxy.odd = odd
                bench.proxy.expect(Fault.ODD, (command, commands[:number].count(command)))
                with contextlib.suppress(PyblockError):
                    await sandbox.reconcile()
                assert [str(one) for one in sandbox.devices] == before, (command, odd)
        bench.proxy.expect()
        assert await sandbox.reconcile() == []
        await sandbox.detach(ID, timeout=ENOUGH)
        nothing_left(bench, sandbox)


async def detach_spoiled(bench: Bench, fault: Fault, command: str, passes: float) -> str:
    """One case of a virtio-scsi disk; returns how it ended."""
    driver = "virtio-scsi"
    async with bench.sandbox(driver) as sandbox:
        device = await sandbox.attach(bench.image, device_id=ID, timeout=ENOUGH)
        bench.proxy.expect(fault, command)
        outcome = "detached"
        try:
            await sandbox.detach(device, timeout=passes if fault in UNANSWERED else ENOUGH)
        except PyblockError as error:
            outcome = type(error).__name__
            all_taken(sandbox, driver)
            if isinstance(error, DetachPending):
                assert device.phase in (Phase.DETACHING, Phase.DETACH_PENDING)
        else:
            nothing_left(bench, sandbox)
        struck = bench.proxy.struck
        if fault in UNANSWERED:
            await bench.proxy.drop()
            await hung_up(sandbox)
        await quiet(sandbox)
        if ID in sandbox.manager:
            all_taken(sandbox, driver)
            if device.phase is Phase.ATTACHED:
                assert {"device", "node"} <= bench.has()
            await sandbox.detach(ID, timeout=ENOUGH)
        nothing_left(bench, sandbox)
        return outcome if struck else TOO_EARLY


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.lower())
async def test_every_command_of_a_detach(bench: Bench, fault: Fault) -> None:
    async with bench.sandbox("virtio-scsi") as sandbox:
        device = await sandbox.attach(bench.image, device_id=ID, timeout=ENOUGH)
        bench.proxy.expect()
        await sandbox.detach(device, timeout=ENOUGH)
        commands = list(bench.proxy.commands)
    assert {"device_del", "blockdev-del"} <= set(commands)
    # by name: how often a busy node is asked again differs from run to run
    for command in sorted(set(commands)):
        try:
            outcome = await until_struck(partial(detach_spoiled, bench, fault, command))
        except BaseException as error:
            error.add_note(f"{fault.name} at {command} of {commands}")
            raise
        if fault is Fault.DELAY or command == "remove-fd":
            # nothing depends on that; what it leaves, the next attach removes
            assert outcome == "detached"
        elif fault is not Fault.REFUSE:
            assert outcome == "DetachPending"


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("command", ["backend", "device_add"])
async def test_qemu_dies_half_way(
    bench: Bench, driver: str, command: str, given: str | None
) -> None:
    backend = "object-add" if driver == "nvdimm" else "blockdev-add"
    async with bench.sandbox(driver) as sandbox:
        bench.proxy.expect(Fault.HOLD, backend if command == "backend" else command)
        attach = asyncio.ensure_future(sandbox.attach(bench.image, device_id=given, timeout=ENOUGH))
        await bench.proxy.held.wait()
        bench.machine.kill()
        bench.proxy.let_go.set()
        with pytest.raises(AttachPending):
            await attach
        assert all_taken(sandbox, driver).phase is Phase.ATTACH_PENDING
        with pytest.raises(PyblockError):
            await sandbox.detach(ID, timeout=ENOUGH)
        assert all_taken(sandbox, driver).phase in PENDING


async def test_an_image_that_another_qemu_writes(bench: Bench, start_machine: Start) -> None:
    other = start_machine(guest=False)
    file = {"driver": "file", "filename": str(bench.image)}
    other.side.command("blockdev-add", {"driver": "raw", "node-name": "theirs", "file": file})
    other.side.command(
        "device_add", {"driver": "scsi-hd", "id": "theirs", "drive": "theirs", "bus": "scsi0.0"}
    )
    for driver in ("virtio-scsi", "virtio-blk"):
        async with bench.sandbox(driver) as sandbox:
            with pytest.raises(VmmRefused, match="lock") as caught:
                await sandbox.attach(bench.image, device_id=ID, timeout=ENOUGH)
            assert "lock" in caught.value.reply["desc"]
            assert caught.value.request["execute"] in ("blockdev-add", "device_add")
            nothing_left(bench, sandbox)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_what_is_pending_is_settled_without_its_image(bench: Bench, driver: str) -> None:
    async with bench.sandbox(driver) as sandbox:
        bench.proxy.expect(Fault.CLOSE_BEFORE, "device_add")
        with pytest.raises(AttachPending):
            await sandbox.attach(bench.image, device_id=ID, timeout=ENOUGH)
        all_taken(sandbox, driver)
        assert bench.has()
        bench.image.unlink()
        await sandbox.detach(ID, timeout=ENOUGH)
        nothing_left(bench, sandbox)


# A block node of the drive's name that another program made, which no device uses.


async def foreign_node(bench: Bench, sandbox: Sandbox) -> None:
    """It comes after the machine was asked what it has: such a name would not be used."""
    await sandbox.reconcile()
    path = bench.machine.folder / "foreign"
    path.write_bytes(bytes(1 << 20))
    bench.machine.side.command(
        "blockdev-add", {"driver": "file", "node-name": DRIVE, "filename": str(path)}
    )


async def test_a_foreign_node_never_reaches_the_guest(bench: Bench) -> None:
    """Under an ID that a caller gave there may be one. The device is not asked for until our own
    node is there."""
    async with bench.sandbox("virtio-scsi") as sandbox:
        await foreign_node(bench, sandbox)
        bench.proxy.expect()
        with pytest.raises(VmmRefused, match="Duplicate nodes"):
            await sandbox.attach(bench.image, device_id=ID, timeout=ENOUGH)
        assert "device_add" not in bench.proxy.commands
        assert bench.has() == {"node"} and not sandbox.devices


@pytest.mark.parametrize("given", [True], indirect=True, ids=["both"])
async def test_a_foreign_node_under_a_made_up_name(bench: Bench, given: str | None) -> None:
    """As good as impossible. The guest is made to let go of it, and the node stays."""
    async with bench.sandbox("virtio-scsi") as sandbox:
        await foreign_node(bench, sandbox)
        with pytest.raises(VmmRefused, match="Duplicate nodes") as caught:
            await sandbox.attach(bench.image, device_id=given, timeout=ENOUGH)
        assert any("somebody else's" in note for note in caught.value.__notes__)
        assert bench.has() == {"node"} and not sandbox.devices and takes(sandbox) == ([], {}, False)


@pytest.mark.parametrize("given", [True], indirect=True, ids=["both"])
async def test_a_foreign_node_that_the_guest_does_not_let_go(
    bench: Bench, given: str | None
) -> None:
    async with bench.sandbox("virtio-blk") as sandbox:
        await foreign_node(bench, sandbox)
        bench.proxy.expect()
        attach = asyncio.ensure_future(sandbox.attach(bench.image, device_id=given, timeout=ENOUGH))
        connection = cast(QemuHypervisor, sandbox._machine.vmm)._qmp._connection
        assert connection is not None
        while "device_del" not in bench.proxy.commands or connection._asked:
            await asyncio.sleep(0)
        attach.cancel()
        await asyncio.wait([attach])
        assert all_taken(sandbox, "virtio-blk").phase in PENDING
        bench.machine.side.command("system_reset")
        await quiet(sandbox)
        assert bench.has() == {"node"} and not sandbox.devices


@pytest.mark.parametrize("given", [True], indirect=True, ids=["both"])
@pytest.mark.parametrize(
    "fault",
    [Fault.CLOSE_BEFORE, Fault.CLOSE_AFTER, Fault.REFUSE],
    ids=lambda fault: fault.name.lower(),
)
async def test_what_takes_a_foreign_node_out_again_fails(
    bench: Bench, given: str | None, fault: Fault
) -> None:
    """Then nobody knows what the guest has, and all stays taken."""
    async with bench.sandbox("virtio-scsi") as sandbox:
        await foreign_node(bench, sandbox)
        bench.proxy.expect(fault, "device_del")
        with pytest.raises(PyblockError):
            await sandbox.attach(bench.image, device_id=given, timeout=ENOUGH)
        assert bench.proxy.struck and all_taken(sandbox, "virtio-scsi").phase in PENDING
        await sandbox.detach(ID, timeout=ENOUGH)
        assert not sandbox.devices and "device" not in bench.has()
