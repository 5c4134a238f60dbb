"""The house: which of pyblock's modules may import which, and how high it stands.

Every import counts, wherever it stands: at the top of a file, under TYPE_CHECKING, inside a
function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pyblock

PACKAGE = Path(pyblock.__file__).parent

# From the ground up: a room may import rooms that stand before it, and no other. A room is a folder
# or a file of the package; behind it, modules that stand elsewhere, and belong there.
HOUSE: dict[str, str] = {
    "errors": "",
    "loading": "",
    "tasks": "",
    "core": "",
    "disk": "",
    "vmm": "",
    "store": "",
    "life": "",
    "kata": "",
    "sandbox": "",
    "overview": "stored",
    "blocking": "",
    "cli": "",
    "pyblock": "",
    "__main__": "",
}

# What is still wrong. A line goes when it holds no more; none comes.
UPWARD = """
"""
CIRCLES = """
"""
FLOORS = 9


@cache
def modules() -> dict[str, Path]:
    """The modules of the package by name; a package goes by its folder's."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("pyblock", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, source: str, names: Iterable[str]) -> set[str]:
    """Which modules out of `names` the module of that name imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*name.split(".")[: -node.level], *([base] if base else [])])
            for alias in node.names:  # a module, or a name in one
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in names else base)
    return (found & set(names)) - {name}


@cache
def arrows() -> dict[str, set[str]]:
    names = set(modules())
    return {name: imported(name, path.read_text(), names) for name, path in modules().items()}


def room(module: str) -> str:
    """The room of HOUSE in which a module belongs."""
    inner = module.removeprefix("pyblock.")
    for name, others in HOUSE.items():
        if inner in others.split():
            return name
    first = inner.partition(".")[0]
    for name, others in HOUSE.items():
        if first == name or first in others.split():
            return name
    pytest.fail(f"{module} has no place in HOUSE: say in which room it belongs")


def lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if line.strip()}


def compare(found: set[str], allowed: set[str], what: str) -> None:
    new, gone = "\n  ".join(sorted(found - allowed)), "\n  ".join(sorted(allowed - found))
    assert not new, f"{what}:\n  {new}"
    assert not gone, f"mended since, so to be struck from the list of {what}:\n  {gone}"


def circles(graph: dict[str, set[str]]) -> Iterator[set[str]]:
    """The sets of nodes each of which reaches all of its set."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            for one in graph[ahead.pop()] - found:
                found.add(one)
                ahead.append(one)
        reach[start] = found
    seen: set[str] = set()
    for one in graph:
        if one in reach[one] and one not in seen:
            circle = {other for other in reach[one] if one in reach[other]}
            seen |= circle
            yield circle


def height(graph: dict[str, set[str]]) -> dict[str, int]:
    """On which floor each node stands: one above the highest that it imports. A circle is one
    node."""
    whole = {node: frozenset({node}) for node in graph}
    for circle in circles(graph):
        whole |= dict.fromkeys(circle, frozenset(circle))
    below = {
        one: {whole[other] for node in one for other in graph[node]} - {one}
        for one in set(whole.values())
    }
    floors: dict[frozenset[str], int] = {}
    for one in TopologicalSorter(below).static_order():
        floors[one] = 1 + max((floors[other] for other in below[one]), default=0)
    return {node: floors[one] for node, one in whole.items()}


def test_imports_go_down_the_list_only() -> None:
    order = list(HOUSE)
    upward = {
        f"{name} -> {other}"
        for name, others in arrows().items()
        for other in others
        if order.index(room(name)) < order.index(room(other))
    }
    compare(upward, lines(UPWARD), "imports that go up: the lower room must not know the upper one")


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = {" ".join(sorted(circle)) for circle in circles(arrows())}
    allowed = {" ".join(sorted(line.split())) for line in lines(CIRCLES)}
    compare(found, allowed, "modules that import each other in a circle")


def test_the_house_is_not_higher_than_it_was() -> None:
    graph: dict[str, set[str]] = {name: set() for name in HOUSE}
    for name, others in arrows().items():
        graph[room(name)] |= {room(other) for other in others} - {room(name)}
    floors = height(graph)
    shown = "\n".join(
        f"{floor:3} {node}" for node, floor in sorted(floors.items(), key=lambda pair: -pair[1])
    )
    assert max(floors.values()) <= FLOORS, (
        f"{max(floors.values())} floors of rooms, at most {FLOORS} are wanted:\n{shown}"
    )


def test_every_room_is_a_room() -> None:
    """A module that HOUSE names is there, lest a slip of the pen has one be nobody's."""
    inner = {name.removeprefix("pyblock.") for name in modules()} | {"_core"}
    folders = {name.partition(".")[0] for name in inner}
    for name, others in HOUSE.items():
        assert name in folders or any(other in inner | folders for other in others.split()), (
            f"nothing stands in the room {name!r}"
        )


# The judges themselves.


def test_what_counts_as_an_import() -> None:
    names = {
        "pyblock",
        "pyblock.a",
        "pyblock.b",
        "pyblock.c",
        "pyblock.sub",
        "pyblock.sub.d",
        "pyblock.sub.e",
    }
    source = (
        "import os\nfrom pyblock.b import x\nif TYPE_CHECKING:\n    import pyblock.c\ndef f():\n"
        "    from pyblock.sub import d\n"
    )
    assert imported("pyblock.a", source, names) == {"pyblock.b", "pyblock.c", "pyblock.sub.d"}
    assert imported(
        "pyblock.sub.d", "from . import e\nfrom ..a import x\nfrom pyblock import Sandbox", names
    ) == {
        "pyblock",
        "pyblock.a",
        "pyblock.sub.e",
    }


def test_what_counts_as_a_circle_and_a_floor() -> None:
    graph: dict[str, set[str]] = {
        "a": {"b"},
        "b": {"c"},
        "c": {"b", "d"},
        "d": set(),
        "e": {"a", "d"},
    }
    assert list(circles(graph)) == [{"b", "c"}]
    assert height(graph) == {"d": 1, "b": 2, "c": 2, "a": 3, "e": 4}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())
