"""What a command is about: named before the command, behind it, or by the environment."""

from __future__ import annotations

from typing import Any

from support.shell import Shell
from support.snapshot import MakeImage


def two(shell: Shell, make_image: MakeImage) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A device on each of two machines, and the second machine's address."""
    other = shell.machine("vm2")
    [one] = shell.json("attach", make_image("one"))
    [second] = shell.json("attach", make_image("two"), vm=other)
    return one, second, other


def test_behind_the_command(shell: Shell, make_image: MakeImage) -> None:
    one, second, other = two(shell, make_image)
    assert shell.json("list", "--vm", other, vm=None) == [second]
    assert shell.json("list", "--sandbox", one["sandbox"], vm=None) == [one]
    assert shell.json("list", "--vm", other) == [second]  # the later one of the two
    assert (
        shell.json("reconcile", "--vm", other, vm=None)["sandboxes"][0]["sandbox"]
        == second["sandbox"]
    )
    shell.fine("detach", second["device_id"], "--vm", other, vm=None)
    shell.fine("detach", one["device_id"], "--sandbox", one["sandbox"], vm=None)
    assert shell.json("list", vm=None) == []
    [named] = shell.json("--sandbox", "half", "attach", one["host_path"], "--vm", shell.vm, vm=None)
    assert named["sandbox"] == "half"


def test_by_the_environment(shell: Shell, make_image: MakeImage) -> None:
    one, second, other = two(shell, make_image)
    shell.environment["PYBLOCK_VM"] = other
    assert shell.json("list", vm=None) == [second]
    assert shell.json("list") == [one]
    # what is named goes alone
    assert shell.json("list", "--sandbox", one["sandbox"], vm=None) == [one]
    shell.fine("detach", second["device_id"], vm=None)
    del shell.environment["PYBLOCK_VM"]
    shell.environment["PYBLOCK_SANDBOX"] = one["sandbox"]
    assert shell.json("list", vm=None) == [one]
    assert shell.json("list", "--vm", other, vm=None) == []
    shell.fine("detach", one["device_id"], vm=None)
    shell.environment |= {"PYBLOCK_SANDBOX": "both", "PYBLOCK_VM": other}
    assert shell.json("attach", one["host_path"], vm=None)[0]["sandbox"] == "both"


def test_an_empty_variable_is_none(shell: Shell, make_image: MakeImage) -> None:
    one, second, _ = two(shell, make_image)
    shell.environment |= {"PYBLOCK_SANDBOX": "", "PYBLOCK_VM": ""}
    assert {row["sandbox"] for row in shell.json("list", vm=None)} == {
        one["sandbox"],
        second["sandbox"],
    }
    text = shell.misused("detach", "x", vm=None)
    assert "--vm" in text and "--sandbox" in text and "PYBLOCK_VM" in text


def test_commands_say_how_they_are_told(shell: Shell) -> None:
    for name in ("attach", "list", "detach", "reconcile", "import", "export"):
        text = shell.fine(name, "--help", vm=None)
        assert all(
            word in text for word in ("--vm", "--sandbox", "PYBLOCK_VM", "PYBLOCK_SANDBOX")
        ), name
