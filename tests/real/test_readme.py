"""README's command line starts a QEMU on which README's example works, as they are written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
from kit import KitMissing
from kit.machine import find_qemu

import pyblock

README = Path(__file__).resolve().parents[2] / "README.md"
# for what README leaves to the reader; its guest has only firmware
QUIET = "-nodefaults -no-user-config -display none -accel tcg"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_first_example() -> None:
    try:
        find_qemu()
    except KitMissing as missing:
        pytest.skip(str(missing))
    with tempfile.TemporaryDirectory(prefix="pyblock-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "data.img").write_bytes(bytes(1 << 20))
        command = shlex.split(
            blocks("sh")[0].replace("\\\n", " ").replace("…", QUIET).replace("/run/vm1", name)
        )
        example = blocks("python")[0].replace("/run/vm1", name).replace("timeout=10", "timeout=1")
        with subprocess.Popen(command, cwd=folder) as qemu:
            try:
                deadline = time.monotonic() + 60
                while (
                    not (folder / "qmp.sock").exists()
                    and qemu.poll() is None
                    and time.monotonic() < deadline
                ):
                    time.sleep(0.01)
                done = subprocess.run(
                    [sys.executable, "-c", example],
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
            finally:
                qemu.kill()
    index, pci_path, name, match = done.stdout.split()
    assert (
        (index, name) == ("0", "/dev/vda")
        and re.fullmatch(r"[0-9a-f]{2}/00", pci_path)
        and match.lstrip("/").startswith("0000:00:")
    )
    assert "DetachPending" in done.stderr  # no guest is there to let go of it


def test_the_example_without_an_event_loop(tmp_path: Path) -> None:
    for name in ("a.img", "b.img"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    example = f"import pyblock\n{blocks('python')[1]}    print([one.held.index for one in devices])"
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[0, 1]\n", "")


def test_the_extras_that_it_names_are_there() -> None:
    extras = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    [named] = re.findall(r"^pip install pyblock-hotplug\[(.*)\]", README.read_text(), re.MULTILINE)
    assert named.split(",") == ["blocking", "cli"] and set(named.split(",")) <= extras.keys()


def test_the_pages_that_it_names_are_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert linked and [name for name in linked if not (README.parent / name).exists()] == []


def test_what_it_shows_type_checks(tmp_path: Path) -> None:
    """Together, as one program: the second example leaves its import to the first."""
    pytest.importorskip("mypy")
    (tmp_path / "example.py").write_text("\n".join(blocks("python")))
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--cache-dir",
        str(tmp_path / "cache"),
        "example.py",
    ]
    package = str(Path(pyblock.__file__).parents[1])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": package},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("Success: no issues found in 1 source file\n", "")
