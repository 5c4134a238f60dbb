"""The table of ratios: its rows, and the one JSON file that holds them with the machine they were
measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

RESULT = Path("build/bench/result.json")


@dataclass(frozen=True)
class Row:
    """One line of the table. `value` is compared with `target` in the sense of `at_most`; medians
    are nanoseconds for one unit of work."""

    name: str
    rival: str
    value: float
    target: float | None
    at_most: bool
    ours_ns: float
    rival_ns: float
    unit: str
    # CI fails past the target times this: a machine there does other things as well
    slack: float = 1.5

    @property
    def met(self) -> bool:
        return self.within(1.0)

    def within(self, slack: float) -> bool:
        if self.target is None:
            return True
        return (
            self.value <= self.target * slack if self.at_most else self.value >= self.target / slack
        )


ROWS: list[Row] = []
NOTES: list[str] = []


def write_result() -> Path:
    """Writes rows, notes and machine; returns the file."""
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(row), "met": row.met} for row in ROWS]
    RESULT.write_text(
        json.dumps(
            {"machine": machine(), "rows": rows, "notes": NOTES}, indent=1, ensure_ascii=False
        )
    )
    return RESULT


def machine() -> dict[str, str]:
    """What the numbers were taken on."""
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    qemu = (
        subprocess.run(
            ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False
        )
        if _has_qemu()
        else None
    )
    return {
        "date": date.today().isoformat(),
        "processor": f"{os.cpu_count()} x {', '.join(sorted(models))}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.stdout.splitlines()[0] if qemu and qemu.stdout else "none",
    }


def _has_qemu() -> bool:
    return any(Path(folder, "qemu-system-x86_64").exists() for folder in os.get_exec_path())
