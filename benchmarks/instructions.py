"""How many instructions the core's functions take, counted by valgrind: an exact guard, unlike any
clock.

The counts of a run are the same in the next run, whatever else the machine does. They differ a
little with the compiler, so the budget names the compiler that it was measured with, and another is
allowed more slack. For another kind of processor it says nothing: there only the rule is checked
that needs no budget, that an index costs the same however many are taken.

    python benchmarks/instructions.py --check     against benchmarks/instructions.json
    python benchmarks/instructions.py --update    writes what was counted there
    python benchmarks/instructions.py --table     in Markdown

--csrc FOLDER counts another core. Without valgrind it says so and succeeds, unless
PYBLOCK_REQUIRE_BENCH=1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
BUDGETS = HERE / "instructions.json"
CSRC = HERE.parent / "csrc"

# The default compiler's code moves a little with its minor versions and with libc; another's
# differs more, but not by an algorithm.
SLACK = 0.05
SLACK_OTHER_COMPILER = 0.25
SLACK_LEAST = 4  # instructions, since 5 % of a short function is none

# Acquire and release may differ by this over all occupancies: the search goes over up to three full
# words at its top level.
FLAT = 32


class Missing(Exception):
    """What counting needs is not on this machine."""


class Host(NamedTuple):
    """What a budget holds for."""

    compiler: str
    machine: str


def compiler() -> str:
    return os.environ.get("CC") or "cc"


def this_host() -> Host:
    done = subprocess.run(
        [compiler(), "-dM", "-E", "-"], input="", capture_output=True, text=True, check=True
    )
    macros = dict(re.findall(r"#define (__clang_major__|__GNUC__) (\d+)", done.stdout))
    name, version = (
        ("clang", macros["__clang_major__"])
        if "__clang_major__" in macros
        else ("gcc", macros["__GNUC__"])
    )
    return Host(f"{name} {version}", platform.machine())


def count(csrc: Path) -> dict[str, int]:
    """The instructions of each scenario, with those of the core behind `csrc`."""
    if not shutil.which("valgrind") or not shutil.which(compiler()):
        raise Missing(
            f"valgrind and {compiler()} are needed to count instructions; run: scripts/setup bench"
        )
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "instructions")
        sources = [HERE / "instructions.c", *sorted(csrc.glob("*.c"))]
        flags = [
            "-std=c11",
            "-pthread",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-O2",
            "-gdwarf-4",
            f"-I{csrc}",
        ]
        # DWARF 4, since valgrind 3.19 stumbles over clang's 5.
        # Bound at the start: the first call of a libc function would otherwise count the search for
        # it.
        subprocess.run([compiler(), *flags, *sources, "-o", program, "-Wl,-z,now"], check=True)
        valgrind = [
            "valgrind",
            "--tool=callgrind",
            "--collect-atstart=no",
            f"--callgrind-out-file={folder}/out",
        ]
        # libc's memcpy is another one on each generation of processors; without the newer sets of
        # instructions it is nearly one.
        environment = {
            **os.environ,
            "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-AVX512F,-AVX512VL,-ERMS,-FSRM,-AVX2_Usable",
        }
        done = subprocess.run(
            [*valgrind, program], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"callgrind failed:\n{done.stderr}")
        counts = dict(
            _read(path)
            for path in sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        )
    counts.pop("", None)  # at the program's end
    marks = counts.pop("nothing")
    return {scenario: number - marks for scenario, number in counts.items()}


def _read(path: Path) -> tuple[str, int]:
    text = path.read_text(encoding="utf-8")
    name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
    total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
    return name[1] if name else "", int(total[1]) if total else 0


def budget(number: int, slack: float) -> int:
    return number + max(int(number * slack), SLACK_LEAST)


def check(counts: dict[str, int]) -> list[str]:
    """What is wrong with the counts; prints what they were held against."""
    saved = json.loads(BUDGETS.read_text(encoding="utf-8"))
    host = this_host()
    wrong = []
    for function in ("acquire", "release"):
        of = {
            scenario: number
            for scenario, number in counts.items()
            if scenario.startswith(f"{function}, ")
        }
        least, most = min(of, key=of.__getitem__), max(of, key=of.__getitem__)
        if of[most] - of[least] > FLAT:
            wrong.append(
                f"{most}: {of[most]} instructions, but {least}: {of[least]}; at most {FLAT} apart "
                "are allowed"
            )
    if host.machine != saved["machine"]:
        print(
            f"instructions: the budget is for {saved['machine']}, this is {host.machine}: only "
            "checked that occupancy does not matter"
        )
        return wrong
    slack = SLACK if host.compiler == saved["compiler"] else SLACK_OTHER_COMPILER
    print(
        f"instructions: budget measured with {saved['compiler']}, this is {host.compiler}: "
        f"{slack:.0%} slack"
    )
    if counts.keys() != saved["counts"].keys():
        wrong.append(
            "scenarios without a count or a budget: "
            f"{', '.join(sorted(counts.keys() ^ saved['counts'].keys()))}; run --update"
        )
    for scenario, number in counts.items():
        allowed = budget(saved["counts"].get(scenario, number), slack)
        if number > allowed:
            wrong.append(f"{scenario}: {number} instructions, budget {allowed}")
    return wrong


def table(counts: dict[str, int]) -> str:
    lines = ["| scenario | instructions | each |", "| --- | ---: | ---: |"]
    for scenario, number in counts.items():
        times = re.search(r" of (\d+)$", scenario)
        lines.append(
            f"| {scenario} | {number:,} | {number / int(times[1]):.1f} |"
            if times
            else f"| {scenario} | {number:,} | |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Counts the instructions of the core's functions.")
    what = parser.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("check", "fail when a budget is exceeded"),
        ("update", "write the budgets"),
        ("table", "print the counts"),
    ):
        what.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--csrc", type=Path, default=CSRC, help="the core to count")
    asked = parser.parse_args()
    try:
        counts = count(asked.csrc.resolve())
    except Missing as missing:
        print(f"instructions: SKIPPED: {missing}", file=sys.stderr)
        return 1 if os.environ.get("PYBLOCK_REQUIRE_BENCH") == "1" else 0
    if asked.table:
        print(table(counts))
    if asked.update:
        host = this_host()
        BUDGETS.write_text(
            json.dumps(
                {"compiler": host.compiler, "machine": host.machine, "counts": counts}, indent=4
            )
            + "\n"
        )
    wrong = check(counts) if asked.check else []
    for line in wrong:
        print(f"instructions: {line}", file=sys.stderr)
    if asked.check and not wrong:
        print(f"instructions: {len(counts)} scenarios within their budgets")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
