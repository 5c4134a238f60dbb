"""What works without the extras, and what says which one is missing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# An interpreter to which some modules were never installed.
WITHOUT = """
import sys


class Lacking:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in LACKING else self.finder.find_spec(name, path, target)


LACKING = {lacking!r}
sys.meta_path = [Lacking(finder) for finder in sys.meta_path]
assert not LACKING & {name.partition(".")[0] for name in sys.modules}, "it is there already"
{code}
"""  # noqa: E501
ALL = ("anyio", "click", "rich")
PROGRAM = "sys.argv = ['pyblock', {arguments}]\nfrom pyblock.__main__ import main\nmain()"


def run(lacking: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    text = WITHOUT.replace("{lacking!r}", repr(set(lacking))).replace("{code}", code)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)


def pyblock(lacking: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(lacking, PROGRAM.replace("{arguments}", ", ".join(map(repr, arguments))))


def test_the_library_needs_none_of_them(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(4096))
    code = f"""
import asyncio
from pyblock import *

async def work():
    async with Sandbox("s1", "memory:", store=SqliteStore({str(tmp_path / "state.db")!r})) as sandbox:
        device = await sandbox.attach({str(image)!r})
        await sandbox.save({str(tmp_path / "saved.json")!r})
        await sandbox.detach(device)
    print("done")

asyncio.run(work())
"""  # noqa: E501
    done = run(ALL, code)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def test_the_blocking_door_names_its_extra() -> None:
    for statement in (
        "from pyblock import blocking",
        "import pyblock; pyblock.blocking",
        "import pyblock.blocking",
    ):
        code = (
            f"try:\n    {statement}\nexcept ImportError as error:\n"
            "    print(error.name, '|', error)"
        )
        assert (
            run(ALL, code).stdout
            == "anyio | pyblock.blocking needs anyio: pip install pyblock-hotplug[blocking]\n"
        )


@pytest.mark.parametrize(
    ("lacking", "what"),
    [(ALL, "click and rich"), (("click",), "click"), (("rich",), "rich")],
    ids=["all", "click", "rich"],
)
def test_the_command_line_names_its_extra(lacking: tuple[str, ...], what: str) -> None:
    for arguments in ((), ("list",), ("--help",), ("attach", "a.img")):
        done = pyblock(lacking, *arguments)
        assert (
            done.stderr
            == f"pyblock: the command line needs {what}: pip install pyblock-hotplug[cli]\n"
        )
        assert (done.stdout, done.returncode) == ("", 2)


def test_the_command_line_needs_no_other_extra() -> None:
    done = pyblock(("anyio",), "demo")
    assert (done.stderr, done.returncode) == ("", 0)
    assert "virtio-scsi" in done.stdout and done.stdout.endswith(
        "detached all: 0 devices, 0 indexes taken, 0 backends left\n"
    )


def test_what_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {requirement.partition(">")[0] for requirement in requirements}

    assert names(project["dependencies"]) == {"cffi", "msgspec"}
    assert names(extras["cli"]) == {"click", "rich"}
    assert names(extras["blocking"]) == {"anyio"}
    assert "pyblock-hotplug[blocking,cli]" in extras["test"]  # and dev and bench are made of test
    assert all("pyblock-hotplug[test]" in extras[name] for name in ("dev", "bench"))
