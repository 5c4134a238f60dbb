"""How often an operation crosses into C: counted exactly, and held against
benchmarks/crossings.json.

A crossing costs what a Python call or two cost, and what it brings back costs more, so their number
is what the layers above the core are designed by. Counting happens in a process of its own, where a
stand-in for `pyblock.core._core` is in place before pyblock is imported: so it does not matter
where, when and under which name a function of the core was bound.

    python benchmarks/crossings.py --check     fails where there are more than the budget has
    python benchmarks/crossings.py --update    writes what was counted there
    python benchmarks/crossings.py --table     with each function's share

The end of a BlockIndex crosses too, but whenever its last reference goes: pb_index_free is not
counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
BUDGETS = HERE / "crossings.json"
NOT_COUNTED = frozenset({"pb_index_free"})

Counts = dict[str, int]


class CountingLib:
    """The core's lib with every function counted; constants are as they are."""

    def __init__(self, lib: Any) -> None:
        self.calls: Counter[str] = Counter()
        for name in dir(lib):
            value = getattr(lib, name)
            setattr(
                self,
                name,
                self._counted(name, value)
                if callable(value) and name not in NOT_COUNTED
                else value,
            )

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return function(*arguments)

        return call


def install() -> CountingLib:
    """Puts the stand-in in place. Only in a process that has not imported pyblock."""
    if "pyblock" in sys.modules:
        raise RuntimeError("pyblock is imported already, and has bound the core's functions")
    package = find_spec("pyblock")
    folders = (
        [f"{folder}/core" for folder in package.submodule_search_locations or ()] if package else []
    )
    spec = PathFinder.find_spec("pyblock.core._core", folders)
    if spec is None or spec.loader is None:
        raise RuntimeError("pyblock.core._core is not built; run: scripts/setup python")
    core: Any = module_from_spec(spec)
    spec.loader.exec_module(core)
    stand_in: Any = ModuleType("pyblock.core._core")
    stand_in.ffi, stand_in.lib = core.ffi, CountingLib(core.lib)
    sys.modules["pyblock.core._core"] = stand_in
    counting: CountingLib = stand_in.lib
    return counting


class Scenarios:
    """Each scenario once, after what it needs has been made ready; in the counting process only,
    which imports pyblock late."""

    def __init__(self, lib: CountingLib) -> None:
        self.lib = lib
        self.counted: dict[str, Counts] = {}

    @contextmanager
    def scenario(self, name: str) -> Iterator[None]:
        before = self.lib.calls.copy()
        yield
        self.counted[name] = dict(sorted((self.lib.calls - before).items()))

    def texts(self) -> None:
        """The second of a kind: the first may make others ready besides."""
        pyblock: Any = import_module("pyblock")
        plan: Any = import_module("pyblock.core.plan").plan
        index, ordinals = pyblock.BlockIndex(), pyblock.BlockIndex()
        work: dict[str, Callable[[], object]] = {
            "plan of one device": partial(plan, index, ordinals),
            "drive_name, ready": partial(pyblock.drive_name, 5),
            "scsi_address, ready": partial(pyblock.scsi_address, 5),
            "make_name_id, short": partial(pyblock.make_name_id, "drive", "0123456789abcdef"),
            "make_name_id, shortened": partial(
                pyblock.make_name_id, "drive", "0123456789abcdef" * 4
            ),
        }
        for name, call in work.items():
            call()
            with self.scenario(name):
                call()

    async def sandbox(self, folder: Path) -> None:
        sandbox_of: Any = import_module("pyblock").Sandbox
        machine: Any = import_module("pyblock.vmm.memory.machine").MemoryHypervisor
        images = [folder / str(number) for number in range(105)]
        for image in images:
            image.write_bytes(bytes(512))
        async with sandbox_of("one", machine()) as sandbox:
            await sandbox.attach(images[0])
            with self.scenario("attach"):
                device = await sandbox.attach(images[1])
            with self.scenario("detach"):
                await sandbox.detach(device)
            with self.scenario("attach_many of 100"):
                await sandbox.attach_many(images[1:101])
        async with sandbox_of("two", machine()) as sandbox:
            await sandbox.attach_many(images[:4])
            saved = sandbox.state()
        async with sandbox_of("two", machine()) as sandbox:
            with self.scenario("restore of 4 drives"):
                await sandbox.restore(saved)


def count() -> dict[str, Counts]:
    """The crossings of each scenario, by function, counted in a process of its own."""
    # the same pyblock as here
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, __file__, "--count"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"counting failed:\n{done.stderr}")
    counted: dict[str, Counts] = json.loads(done.stdout)
    return counted


def budgets() -> dict[str, Counts]:
    saved: dict[str, Counts] = json.loads(BUDGETS.read_text(encoding="utf-8"))
    return saved


def excess(scenario: str, counted: Counts, budget: Counts) -> str | None:
    """What is wrong, or None: the sum counts, not which function it is made of."""
    number, allowed = sum(counted.values()), sum(budget.values())
    if number <= allowed:
        return None
    more = {name: calls for name, calls in counted.items() if calls > budget.get(name, 0)}
    return f"{scenario}: {number} crossings, budget {allowed}; more than there: {more}"


def check(counted: dict[str, Counts]) -> list[str]:
    saved = budgets()
    wrong = [
        text
        for name, calls in counted.items()
        if (text := excess(name, calls, saved.get(name, calls)))
    ]
    if odd := counted.keys() ^ saved.keys():
        wrong.append(
            f"scenarios without a count or a budget: {', '.join(sorted(odd))}; run --update"
        )
    return wrong


def table(counted: dict[str, Counts]) -> str:
    lines = ["| operation | crossings | of which |", "| --- | ---: | --- |"]
    for name, calls in counted.items():
        shares = ", ".join(f"{function} {number}" for function, number in calls.items())
        lines.append(f"| {name} | {sum(calls.values())} | {shares} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Counts crossings into C.")
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("check", "update", "table"):
        what.add_argument(f"--{name}", action="store_true")
    what.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.count:
        scenarios = Scenarios(install())
        scenarios.texts()
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(scenarios.sandbox(Path(folder)))
        print(json.dumps(scenarios.counted))
        return 0
    counted = count()
    if asked.table:
        print(table(counted))
    if asked.update:
        BUDGETS.write_text(json.dumps(counted, indent=4) + "\n", encoding="utf-8")
    wrong = check(counted) if asked.check else []
    for line in wrong:
        print(f"crossings: {line}", file=sys.stderr)
    if asked.check and not wrong:
        print(f"crossings: {len(counted)} operations within their budgets")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
