"""The package's face: what `import pyblock` offers, and what it loads."""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyblock
from pyblock import errors

ROOT = Path(__file__).resolve().parents[3]

# What importing pyblock may load beside the standard library.
# the last is msgspec's, where it is there
NEEDED = {"_cffi_backend", "msgspec", "typing_extensions"}
# And what of that library it does not: each would be felt.
HEAVY = {
    "sqlite3",
    "http",
    "urllib",
    "email",
    "xml",
    "json",
    "tempfile",
    "multiprocessing",
    "unittest",
    "argparse",
}
# Modules of its own that wait until they are asked for.
LATE = (
    "pyblock.__main__", "pyblock.core._native_build", "pyblock.blocking", "pyblock.cli",
    "pyblock.vmm.memory.machine",
    "pyblock.vmm.qemu.adapter", "pyblock.vmm.qemu.qmp", "pyblock.life.ledger",
    "pyblock.kata.translate", "pyblock.kata.schema",
    "pyblock.store",
)  # fmt: skip


def loaded(statement: str) -> set[str]:
    """The modules that a statement loads in a fresh interpreter."""
    code = (
        f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - "
        "before))"
    )
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_what_is_public_is_there() -> None:
    assert len(set(pyblock.__all__)) == len(pyblock.__all__)
    assert [name for name in pyblock.__all__ if not hasattr(pyblock, name)] == []
    assert dir(pyblock) == sorted([*pyblock.__all__, "__version__"])
    names: dict[str, object] = {}
    exec("from pyblock import *", names)
    assert names.keys() - {"__builtins__"} == set(pyblock.__all__)


def test_every_error_is_public() -> None:
    tree = {
        name
        for name, one in vars(errors).items()
        if isinstance(one, type) and issubclass(one, errors.PyblockError)
    }
    assert tree <= set(errors.__all__) <= set(pyblock.__all__)


def test_what_is_not_public_is_not_there() -> None:
    for name in ("DeviceManager", "DeviceReceiver", "SandBox", "Any"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(pyblock, name)


@pytest.mark.parametrize("page", ["README.md", "docs/recovery.md"])
def test_what_the_pages_name_is_public(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"\bpyblock\.([A-Za-z]\w+)", text))
    # a class that is called by its name alone
    named |= set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][A-Za-z]+)+)[`.(]", text))
    assert named, "it names nothing any more: this test looks for the wrong thing"
    assert {
        name for name in named if not hasattr(pyblock, name) and not hasattr(builtins, name)
    } == set()


def test_to_a_type_checker_that_is_all(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    names = ", ".join([*pyblock.__all__, "blocking"])
    (tmp_path / "fine.py").write_text(f"from pyblock import {names}\n\nprint({names})\n")
    (tmp_path / "wrong.py").write_text(
        "import pyblock\n\npyblock.blocking.host()\npyblock.DeviceManager\npyblock.nonsense\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--cache-dir",
        str(tmp_path / "cache"),
        "fine.py",
        "wrong.py",
    ]
    package = str(Path(pyblock.__file__).parents[2])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": package},
        capture_output=True,
        text=True,
        check=False,
    )
    said = re.findall(r"^(\w+\.py:\d+): error: .*\"(\w+)\"", done.stdout, re.MULTILINE)
    assert said == [("wrong.py:4", "DeviceManager"), ("wrong.py:5", "nonsense")], done.stdout


def test_what_importing_loads() -> None:
    names = loaded("import pyblock")
    tops = {name.partition(".")[0] for name in names}
    assert {name for name in tops if name not in sys.stdlib_module_names} - {"pyblock"} <= NEEDED
    assert tops & HEAVY == set()
    assert {name for name in names if name.startswith(LATE)} == set()


def test_what_is_late_is_loaded_when_it_is_asked_for() -> None:
    assert {"pyblock.blocking", "anyio"} <= loaded("from pyblock import blocking")
    assert "pyblock.vmm.memory.machine" in loaded("from pyblock import MemoryHypervisor, Fault")
    assert "sqlite3" in loaded("from pyblock import SqliteStore")
