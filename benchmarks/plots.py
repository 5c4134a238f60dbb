"""Three curves, drawn as SVG into docs/plots: cost against occupancy, cost of a device against
their number, memory of a sandbox.

`python benchmarks/plots.py` measures and draws; the table of ratios is another program's
(`make bench`).
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "pyblock"  # the same numbers draw the same file
import matplotlib.pyplot as plt  # noqa: E402
from memory import per_object  # noqa: E402
from rivals import Bits, Heap, LinearProbe, Roaring  # noqa: E402

import pyblock  # noqa: E402

OUT = Path("docs/plots")
CAPACITY = 65536


def median_ns(work: Callable[[], object], units: int, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / units * 1e9


def pair(index: Any, count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            index.release(index.acquire())

    return run


def ours(capacity: int, taken: int) -> pyblock.BlockIndex:
    index = pyblock.BlockIndex(capacity)
    index.acquire_many(taken)
    return index


def draw(
    name: str,
    title: str,
    x: str,
    y: str,
    curves: dict[str, list[tuple[float, float]]],
    *,
    logarithmic: str = "xy",
) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for label, points in curves.items():
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=3.5,
            linewidth=2.2 if label == "pyblock" else 1.2,
            label=label,
        )
    axes.set(title=title, xlabel=x, ylabel=y)
    if "x" in logarithmic:
        axes.set_xscale("log")
    if "y" in logarithmic:
        axes.set_yscale("log")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    print(f"{OUT / name}.svg")


def occupancy() -> None:
    rivals: dict[str, Any] = {
        "pyblock": ours,
        "set, linear probe": LinearProbe,
        "heapq": Heap,
        "bitarray": Bits,
        "pyroaring": Roaring,
    }
    curves: dict[str, list[tuple[float, float]]] = {}
    for label, make in rivals.items():
        for percent in (0, 1, 5, 10, 25, 50, 75, 90, 99, 99.9):
            count = max(2, 2000 if label != "set, linear probe" else int(2000 / (1 + percent * 20)))
            index = make(CAPACITY, int(CAPACITY * percent / 100))
            curves.setdefault(label, []).append((percent, median_ns(pair(index, count), count)))
    draw(
        "occupancy",
        f"acquire + release, {CAPACITY:,} indexes",
        "taken, %",
        "ns a pair",
        curves,
        logarithmic="y",
    )


def devices() -> None:
    curves: dict[str, list[tuple[float, float]]] = {
        "attach + detach": [],
        "attach_many, a device": [],
    }

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, f"{number}.img") for number in range(10_002)]
            for path in paths:
                with path.open("wb") as file:
                    file.truncate(1 << 20)
            for count in (1, 10, 100, 1000, 10_000):
                async with pyblock.Sandbox("plot", "memory:") as sandbox:
                    start = time.perf_counter()
                    await sandbox.attach_many(paths[:count])
                    curves["attach_many, a device"].append(
                        (count, (time.perf_counter() - start) / count * 1e6)
                    )
                    start = time.perf_counter()
                    for _ in range(100):
                        await sandbox.detach(await sandbox.attach(paths[-1]))
                    curves["attach + detach"].append(
                        (count, (time.perf_counter() - start) / 100 * 1e6)
                    )

    asyncio.run(run())
    draw("devices", "on the in-memory VMM", "devices in the sandbox", "µs", curves, logarithmic="x")


def memory() -> None:
    points = [(drives, per_object("sandbox", drives)) for drives in (0, 1, 2, 4, 8, 16, 32)]
    draw(
        "memory",
        "one sandbox, all included",
        "drives",
        "bytes",
        {"pyblock": [(float(x), y) for x, y in points]},
        logarithmic="",
    )


if __name__ == "__main__":
    occupancy()
    devices()
    memory()
