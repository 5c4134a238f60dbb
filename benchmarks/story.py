"""How long the story of an attach and a detach is: the calls of pyblock's own functions and the
distinct files that they stand in, counted exactly, and held against benchmarks/story.json.

Whoever reads what one attach does walks through as many. Each is counted as the second of its kind
on a machine in memory, so that nothing is made ready on the way: a generator or a coroutine once,
however often it goes on, a comprehension not at all (whether it is a call depends on the Python).

    python benchmarks/story.py --check     fails where there are more than the budget has
    python benchmarks/story.py --update    writes what was counted there
    python benchmarks/story.py --table     with each file's share
    python benchmarks/story.py --tell      every call, in its order
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
BUDGETS = HERE / "story.json"
sys.path.insert(0, str(HERE.parent))  # what is counted is the pyblock beside this file

COMPREHENSIONS = frozenset({"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"})

Count = dict[str, int]  # "calls" and "files"
Story = list[tuple[str, str]]  # file below pyblock/ and qualified name of each call, in order


class Teller:
    """Tells what is called while it listens; the frames are kept, so that no two are taken for
    one."""

    def __init__(self, package: Path) -> None:
        self._package = f"{package}/"
        self._frames: dict[int, FrameType] = {}
        self.stories: dict[str, Story] = {}

    @contextmanager
    def listening(self, name: str) -> Iterator[None]:
        story = self.stories[name] = []

        def profile(frame: FrameType, event: str, _: Any) -> None:
            code = frame.f_code
            if (
                event != "call"
                or not code.co_filename.startswith(self._package)
                or id(frame) in self._frames
            ):
                return
            self._frames[id(frame)] = frame
            if code.co_name not in COMPREHENSIONS:
                story.append((code.co_filename.removeprefix(self._package), code.co_qualname))

        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(None)


async def tell() -> dict[str, Story]:
    """The story of each operation."""
    import pyblock  # noqa: PLC0415 - the one beside this file
    from pyblock.store.sqlite.store import SqliteStore  # noqa: PLC0415
    from pyblock.vmm.memory.machine import MemoryHypervisor  # noqa: PLC0415

    teller = Teller(Path(pyblock.__file__).parent)
    with tempfile.TemporaryDirectory() as folder:
        images = [Path(folder, str(number)) for number in range(3)]
        for image in images:
            image.write_bytes(bytes(4096))
        for kind, store in (("", None), (" with a store", SqliteStore(Path(folder, "state.db")))):
            async with pyblock.Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
                await sandbox.attach(images[0])
                await sandbox.detach(await sandbox.attach(images[1]))
                with teller.listening(f"attach{kind}"):
                    device = await sandbox.attach(images[2])
                with teller.listening(f"detach{kind}"):
                    await sandbox.detach(device)
    return teller.stories


def counted(stories: dict[str, Story]) -> dict[str, Count]:
    return {
        name: {"calls": len(story), "files": len({file for file, _ in story})}
        for name, story in stories.items()
    }


def budgets() -> dict[str, Count]:
    saved: dict[str, Count] = json.loads(BUDGETS.read_text(encoding="utf-8"))
    return saved


def excess(operation: str, count: Count, budget: Count) -> str | None:
    """What is wrong, or None."""
    if all(count[what] <= budget[what] for what in count):
        return None
    return (
        f"{operation}: {count['calls']} calls in {count['files']} files, budget {budget['calls']} "
        f"in {budget['files']}; --tell lists them"
    )


def check(counts: dict[str, Count]) -> list[str]:
    saved = budgets()
    wrong = [
        text
        for name, count in counts.items()
        if (text := excess(name, count, saved.get(name, count)))
    ]
    if odd := counts.keys() ^ saved.keys():
        wrong.append(
            f"operations without a count or a budget: {', '.join(sorted(odd))}; run --update"
        )
    return wrong


def table(stories: dict[str, Story]) -> str:
    lines = ["| operation | calls | files | of which |", "| --- | ---: | ---: | --- |"]
    for name, story in stories.items():
        files = Counter(file for file, _ in story)
        shares = ", ".join(
            f"{file.removesuffix('.py')} {number}" for file, number in files.most_common()
        )
        lines.append(f"| {name} | {len(story)} | {len(files)} | {shares} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Counts the calls and files of an attach and a detach."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("check", "update", "table", "tell"):
        what.add_argument(f"--{name}", action="store_true")
    asked = parser.parse_args()
    stories = asyncio.run(tell())
    counts = counted(stories)
    if asked.table:
        print(table(stories))
    if asked.tell:
        for name, story in stories.items():
            print(f"{name}:", *(f"  {file:28} {function}" for file, function in story), sep="\n")
    if asked.update:
        BUDGETS.write_text(json.dumps(counts, indent=4) + "\n", encoding="utf-8")
    wrong = check(counts) if asked.check else []
    for line in wrong:
        print(f"story: {line}", file=sys.stderr)
    if asked.check and not wrong:
        print(f"story: {len(counts)} operations within their budgets")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
