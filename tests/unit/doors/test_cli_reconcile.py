"""`pyblock reconcile` of one sandbox and of all: who is asked, who is not, what that takes, and
what the last line says."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.shell import Shell
from support.snapshot import MakeImage

from pyblock import Sandbox

# Whatever is waited for that is not bounded by the command's own deadline is waited for till the
# test fails.
PATIENT = """
import pyblock.sandbox, pyblock.life.recovery, pyblock.vmm.base, pyblock.cli.session
pyblock.sandbox.OPEN_TIME = pyblock.life.recovery.CONNECT_TIMEOUT = pyblock.vmm.base.CONNECT_TIMEOUT = 10000
"""  # noqa: E501
PATIENT_ALSO_FOR_OWNERS = PATIENT + "pyblock.cli.session.BUSY_WAIT = 10000\n"


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[str]:
    """The address of a machine that takes connections and never says a word, as a stopped QEMU
    does."""
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(64)
        yield f"qemu:{path}"


def with_past(shell: Shell, tmp_path: Path, vm: str) -> tuple[str, str]:
    """Has the store know a sandbox with one disk on a machine, which is not asked; returns its ID
    and the disk's."""
    state = tmp_path / "kata.json"
    state.write_bytes(samples.text(samples.sandbox(samples.SCSI[:1], [0])))
    shell.fine("import", state, vm=vm)
    [row] = shell.json("list", vm=vm)
    return row["sandbox"], row["device_id"]


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_a_machine_that_does_not_answer(
    shell: Shell, tmp_path: Path, silent: str, make_image: MakeImage
) -> None:
    sandbox, device_id = with_past(shell, tmp_path, silent)
    commands: list[list[Any]] = [
        ["detach", device_id],
        ["detach", "--all"],
        ["attach", make_image("other")],
        ["reconcile"],
    ]
    commands += [["reconcile", "--dry-run"]]
    for arguments in commands:
        done = shell(*arguments, "--timeout", "0.2", vm=silent, patch=PATIENT)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        # it may be there yet
        assert sandbox in done.stderr and "deadline" in done.stderr and "forget" not in done.stderr
        assert done.stderr.count("\n") == (2 if "reconcile" in arguments else 1)
    done = shell("reconcile", "--timeout", "0.2", vm=None, patch=PATIENT)
    assert (
        done.returncode == 1
        and last_line(done.stderr)
        == "0 sandboxes asked, nothing differs, 0 in use (not asked), 1 failed"
    )
    assert [row["device_id"] for row in shell.json("list", vm=silent)] == [device_id]


def test_a_machine_that_is_gone(
    shell: Shell, tmp_path: Path, silent: str, make_image: MakeImage
) -> None:
    sandbox, device_id = with_past(shell, tmp_path, silent)
    (tmp_path / "qmp").unlink()
    commands: list[list[Any]] = [["detach", device_id], ["attach", make_image("other")]]
    for arguments in commands:
        assert f"pyblock forget {sandbox}" in shell.refused(*arguments, vm=silent)
    for vm in (silent, None):
        done = shell("reconcile", vm=vm)
        assert done.returncode == 1 and f"pyblock forget {sandbox}" in done.stderr
    [asked] = json.loads(shell("reconcile", "--json", vm=None).stdout)["sandboxes"]
    assert f"pyblock forget {sandbox}" in asked["error"]
    failure = asked["failure"]
    assert (failure["code"], failure["retryable"], failure["sandbox"]) == (
        "vmm-unreachable",
        True,
        sandbox,
    )
    assert failure["vm"] == silent and any(
        f"pyblock forget {sandbox}" in note for note in failure["notes"]
    )


def test_a_machine_that_never_had_anything(
    shell: Shell, tmp_path: Path, make_image: MakeImage
) -> None:
    assert "forget" not in shell.refused("attach", make_image("one"), vm=f"qemu:{tmp_path}/absent")


def beside_a_daemon(
    shell: Shell, folder: Path, count: int, work: Callable[[], Awaitable[None]]
) -> None:
    """Runs it while this process has so many sandboxes open, each on a machine of its own with one
    disk."""

    async def daemon() -> None:
        sandboxes = [
            Sandbox(f"sb{number}", shell.machine(f"vm-{number}")) for number in range(count)
        ]
        for sandbox in sandboxes:
            await sandbox.__aenter__()
            image = folder / f"{sandbox.id}.img"
            image.write_bytes(b"x" * 4096)
            await sandbox.attach(image)
        try:
            await work()
        finally:
            for sandbox in sandboxes:
                await sandbox.close()

    shell.run_in_store(daemon)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=str)
def test_beside_a_daemon(
    shell: Shell, tmp_path: Path, make_image: MakeImage, more: list[str]
) -> None:
    [row] = shell.json("attach", make_image("free"))
    (tmp_path / "vm1").write_text("")  # started anew: it has nothing

    async def work() -> None:
        done = await asyncio.to_thread(
            shell, "reconcile", *more, vm=None, patch=PATIENT_ALSO_FOR_OWNERS
        )
        assert done.returncode == 0
        assert row["device_id"] in done.stdout and "sb0" not in done.stdout
        assert done.stderr == "1 sandbox asked, 1 differs, 3 in use (not asked), 0 failed\n"
        answer = json.loads(
            (
                await asyncio.to_thread(
                    shell, "reconcile", "--json", vm=None, patch=PATIENT_ALSO_FOR_OWNERS
                )
            ).stdout
        )
        assert {one["sandbox"]: (one["error"], one["in_use"]) for one in answer["sandboxes"]} == {
            **({row["sandbox"]: (None, False)} if more else {}),  # else it went with its only disk
            **{f"sb{number}": (None, True) for number in range(3)},
        }
        # The one that was named is waited for, and who has it is said.
        named = await asyncio.to_thread(
            shell, "reconcile", "--sandbox", "sb0", "--timeout", "0.1", vm=None
        )
        assert named.returncode == 1 and "belongs to process" in named.stderr
        assert (
            last_line(named.stderr)
            == "0 sandboxes asked, nothing differs, 0 in use (not asked), 1 failed"
        )

    beside_a_daemon(shell, tmp_path, 3, work)


def test_several_are_asked_side_by_side(shell: Shell, tmp_path: Path) -> None:
    """Each machine answers only when all have been asked, so whoever asks one after the other ends
    with errors; and no more at once than the limit."""
    count = 5

    async def work() -> None:
        pass

    beside_a_daemon(shell, tmp_path, count, work)
    together = f"""
import asyncio
from pyblock.vmm.memory.file import FileMachine
inventory = FileMachine.inventory
asked = 0
async def answer(self, ours=()):
    global asked, all_asked
    asked += 1
    if asked == 1: all_asked = asyncio.Event()
    if asked == {count}: all_asked.set()
    await all_asked.wait()
    return await inventory(self, ours)
FileMachine.inventory = answer
"""
    done = shell("reconcile", vm=None, patch=PATIENT + together)
    assert (done.returncode, done.stdout) == (0, "")
    assert (
        done.stderr == f"{count} sandboxes asked, nothing differs, 0 in use (not asked), 0 failed\n"
    )
    few = """
import pyblock.cli.survey
pyblock.cli.survey.AT_ONCE = 2
from pyblock.vmm.memory.file import FileMachine
import asyncio
inventory = FileMachine.inventory
now = most = 0
async def answer(self, ours=()):
    global now, most
    now += 1
    most = max(now, most)
    for _ in range(50): await asyncio.sleep(0)
    now -= 1
    assert most <= 2
    return await inventory(self, ours)
FileMachine.inventory = answer
"""
    assert shell("reconcile", vm=None, patch=few).stderr == done.stderr


def test_one_that_fails_holds_up_no_other(
    shell: Shell, tmp_path: Path, silent: str, make_image: MakeImage
) -> None:
    sandbox, _ = with_past(shell, tmp_path, silent)
    [lost] = shell.json("attach", make_image("lost"))
    (tmp_path / "vm1").write_text("")
    done = shell("reconcile", "--timeout", "0.5", vm=None, patch=PATIENT)
    assert done.returncode == 1
    assert lost["device_id"] in done.stdout and f"sandbox {sandbox}: " in done.stderr
    assert last_line(done.stderr) == "1 sandbox asked, 1 differs, 0 in use (not asked), 1 failed"
