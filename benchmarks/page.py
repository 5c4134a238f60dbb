"""Writes docs/benchmarks.md out of the last result: the plots, and the table with its machine and
date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rows import RESULT

PAGE = Path("docs/benchmarks.md")
PLOTS = {
    "occupancy": "Cost of acquire + release against occupancy",
    "devices": "Cost of a device against the number of devices",
    "memory": "Memory of one sandbox",
}


def line(row: dict[str, Any]) -> str:
    target = (
        "" if row["target"] is None else ("≤ " if row["at_most"] else "≥ ") + f"{row['target']:.3g}"
    )
    verdict = "" if row["target"] is None else ("met" if row["met"] else "**missed**")
    return f"| {row['name']} | {row['rival']} | {row['value']:,.3g} | {target} | {verdict} |"


def main() -> None:
    result = json.loads(RESULT.read_text())
    machine = result["machine"]
    text = [
        "# Benchmarks",
        "",
        "Ratios of one run, written by `make bench`. Method, bias and what bounds the misses:",
        "[benchmarks/README.md](../benchmarks/README.md).",
        "",
        (
            f"{machine['date']}; {machine['processor']}; Linux {machine['kernel']}; CPython "
            f"{machine['python']}; {machine['qemu']}."
        ),
        "",
        *(f"![{title}](plots/{name}.svg)\n" for name, title in PLOTS.items()),
        "| what | against | ratio | target | |",
        "| --- | --- | --- | --- | --- |",
        *map(line, result["rows"]),
        "",
        *(f"- {note}" for note in result["notes"]),
    ]
    PAGE.write_text("\n".join(text).rstrip() + "\n")
    print(PAGE)


if __name__ == "__main__":
    main()
