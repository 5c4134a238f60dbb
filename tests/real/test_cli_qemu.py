"""The command line on a real QEMU that is stopped, hangs in the middle, or has died: each command
ends by its own deadline."""

from __future__ import annotations

import os
import signal
import time

import pytest
from kit import Machine
from support.shell import Done, Shell

pytestmark = pytest.mark.timeout(300)

# Whatever is waited for that is not bounded by the command's own deadline is waited for till the
# test fails.
PATIENT = """
import pyblock.sandbox, pyblock.life.recovery, pyblock.vmm.base, pyblock.cli.session
pyblock.sandbox.OPEN_TIME = pyblock.life.recovery.CONNECT_TIMEOUT = pyblock.vmm.base.CONNECT_TIMEOUT = 10000
"""  # noqa: E501
# QEMU is stopped when it has been sent this command, so that its answer never comes.
STOPS_AT = """
import os, signal
from pyblock.vmm.qemu.qmp import QmpSession
execute, send_both = QmpSession.execute, QmpSession.send_both
async def stops(self, command, arguments=None, **more):
    if command == "{command}":
        os.kill({pid}, signal.SIGSTOP)
    return await execute(self, command, arguments, **more)
async def stops_at_both(self, first, second):
    if first.name == "{command}":
        os.kill({pid}, signal.SIGSTOP)
    return await send_both(self, first, second)
QmpSession.execute, QmpSession.send_both = stops, stops_at_both
"""


def timed(shell: Shell, arguments: list[str], vm: str, patch: str) -> Done:
    began = time.monotonic()
    done = shell(*arguments, "--timeout", "1", vm=vm, patch=patch)
    print(f"{arguments[0]} --timeout 1: {time.monotonic() - began:.1f} s")
    return done


@pytest.mark.parametrize("what", ["detach --all", "attach", "reconcile", "reconcile --dry-run"])
def test_a_stopped_machine(bare_machine: Machine, shell: Shell, what: str) -> None:
    vm = f"qemu:{bare_machine.qmp_path}"
    [row] = shell.json("attach", bare_machine.image("one"), vm=vm)
    arguments = [*what.split(), *([str(bare_machine.image("two"))] if what == "attach" else [])]
    os.kill(bare_machine.pid, signal.SIGSTOP)
    try:
        done = timed(shell, arguments, vm, PATIENT)
        assert done.returncode == 1 and "deadline" in done.stderr and "forget" not in done.stderr
        assert "still answers" in shell.refused("forget", row["sandbox"], vm=None)
    finally:
        os.kill(bare_machine.pid, signal.SIGCONT)
    assert shell.json("list", vm=vm) == [row]
    shell.fine("detach", "--all", vm=vm)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("device_del", ["detach", "--all"]), ("blockdev-add", ["attach"])],
    ids=["detach", "attach"],
)
def test_a_machine_that_stops_in_the_middle(
    bare_machine: Machine, shell: Shell, command: str, arguments: list[str]
) -> None:
    vm = f"qemu:{bare_machine.qmp_path}"
    if arguments[0] == "detach":
        shell.fine("attach", bare_machine.image("one"), vm=vm)
    else:
        arguments = ["attach", str(bare_machine.image("one"))]
    try:
        done = timed(
            shell, arguments, vm, PATIENT + STOPS_AT.format(command=command, pid=bare_machine.pid)
        )
    finally:
        os.kill(bare_machine.pid, signal.SIGCONT)
    [row] = shell.json("list", vm=vm)
    assert done.returncode == 1
    assert (
        f"is pending: {arguments[0]} of {row['device_id']};" in done.stderr
        and f"reconcile --sandbox {row['sandbox']}" in done.stderr
    )
    shell("reconcile", vm=vm)
    assert shell.json("list", vm=vm) == []
    assert not [
        node
        for node in bare_machine.side.command("query-named-block-nodes")
        if node["node-name"].startswith("drive-")
    ]


def test_a_machine_that_died(bare_machine: Machine, shell: Shell) -> None:
    vm = f"qemu:{bare_machine.qmp_path}"
    [row] = shell.json("attach", bare_machine.image("one"), vm=vm)
    bare_machine.kill()
    for arguments in (
        ["detach", "--all"],
        ["reconcile"],
        ["attach", str(bare_machine.image("two"))],
    ):
        done = shell(*arguments, vm=vm)
        assert done.returncode == 1 and f"pyblock forget {row['sandbox']}" in done.stderr
    assert shell("forget", row["sandbox"], vm=None).returncode == 0
    assert shell.json("list", vm=None) == []


def test_a_hostile_name(bare_machine: Machine, shell: Shell) -> None:
    """QEMU repeats the name in its error."""
    image = bare_machine.image("x[nope]\x1b[2J\u202e.img")
    vm = f"qemu:{bare_machine.qmp_path}"
    refuses = (
        "from pyblock.vmm.qemu.drivers import OnNode\n"
        "made = OnNode.backend\n"
        "def backend(self, drive, image, file):\n"
        "    return made(self, drive, image, drive.file + '-absent')\n"
        "OnNode.backend = backend"
    )
    done = shell("attach", image, vm=vm, patch=refuses)
    assert done.returncode == 1 and r"\x1b[2J\u202e.img-absent" in done.stderr
    assert all(char.isprintable() for char in done.stderr.rstrip("\n"))
