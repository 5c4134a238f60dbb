"""A command that is interrupted or killed: what it says, and what the next one finds."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.shell import LONG, Shell
from support.snapshot import MakeImage

# A step that never ends and says when it was reached. What a shell starts in its background may
# have signals ignored.
HELD = """
import asyncio, signal
from pyblock.vmm.memory.machine import MemoryHypervisor
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
async def never(self, drive=None):
    print("reached", flush=True)
    await asyncio.Event().wait()
MemoryHypervisor.{step} = never
"""


@contextmanager
def held(
    shell: Shell, step: str, *arguments: str | Path, times: int = 1
) -> Iterator[subprocess.Popen[str]]:
    """A command that stands in that step, so many times over."""
    command = shell.command(*arguments, patch=HELD.format(step=step))
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=shell.environment, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for _ in range(times):
                assert process.stdout.readline() == "reached\n"
            yield process
        finally:
            process.kill()


def interrupted(process: subprocess.Popen[str]) -> str:
    """What it says when it is interrupted: one line."""
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=LONG)
    assert process.returncode == 130
    [line] = text.strip().splitlines()
    assert line.startswith("pyblock: interrupted; ")
    return line


def phases(shell: Shell) -> dict[str, str]:
    return {row["device_id"]: row["phase"] for row in shell.json("list")}


def settled(shell: Shell, line: str) -> None:
    """Does what the line says is to be done."""
    command = line.rpartition("pyblock reconcile ")[2].split()
    assert json.loads(shell("reconcile", *command, "--json", vm=None).stdout)["findings"]


def test_a_detach(shell: Shell, make_image: MakeImage) -> None:
    rows = shell.json("attach", make_image("one"), make_image("two"), make_image("three"))
    with held(
        shell, "removed", "detach", rows[0]["device_id"], rows[1]["device_id"], times=2
    ) as process:
        line = interrupted(process)
    for row in rows[:2]:
        assert f"detach of {row['device_id']}" in line
    assert rows[2]["device_id"] not in line and f"--sandbox {rows[0]['sandbox']}" in line
    assert phases(shell) == {
        row["device_id"]: phase
        for row, phase in zip(rows, ["detach-pending"] * 2 + ["attached"], strict=True)
    }
    settled(shell, line)
    assert phases(shell) == {rows[2]["device_id"]: "attached"}


@pytest.mark.parametrize("count", [1, 2])
def test_an_attach(shell: Shell, make_image: MakeImage, count: int) -> None:
    """It gets the time to undo itself; where that is not enough, it is pending."""
    with held(
        shell,
        "device_add",
        "attach",
        *(make_image(f"image{number}") for number in range(count)),
        times=count,
    ) as process:
        line = interrupted(process)
    pending = phases(shell)
    assert set(pending.values()) == {"attach-pending"} and len(pending) == count
    assert all(f"attach of {device_id}" in line for device_id in pending)
    settled(shell, line)
    assert phases(shell) == {}


def test_twice(shell: Shell, make_image: MakeImage) -> None:
    """Who does not wait for the undoing is told the same."""
    with held(shell, "device_add", "attach", make_image("image")) as process:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # it has taken the first for itself
            process.wait(0.5)
        line = interrupted(process)
    [(device_id, phase)] = phases(shell).items()
    assert phase == "attach-pending" and f"attach of {device_id}" in line
    settled(shell, line)


def test_while_nothing_is_begun(shell: Shell, make_image: MakeImage) -> None:
    [row] = shell.json("attach", make_image("one"))
    for step, *arguments in (
        ("inventory", "detach", row["device_id"]),
        ("place", "attach", str(make_image("two"))),
    ):
        with held(shell, step, *arguments) as process:
            assert interrupted(process) == "pyblock: interrupted; nothing of it is pending"
    assert phases(shell) == {row["device_id"]: "attached"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_killed(shell: Shell, make_image: MakeImage, number: signal.Signals) -> None:
    """As any runtime that dies: the store says what was intended, and the next one settles it."""
    rows = shell.json("attach", make_image("one"), make_image("two"))
    with held(shell, "removed", "detach", rows[0]["device_id"]) as process:
        process.send_signal(number)
        process.communicate(timeout=LONG)
    assert process.returncode == -number
    assert phases(shell) == {
        rows[0]["device_id"]: "detach-pending",
        rows[1]["device_id"]: "attached",
    }
    with held(shell, "device_add", "attach", make_image("three")) as process:
        process.send_signal(number)
        process.communicate(timeout=LONG)
    assert "attach-pending" in phases(shell).values()
    shell("reconcile")
    assert phases(shell) == {rows[1]["device_id"]: "attached"}
