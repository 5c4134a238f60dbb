"""What a caller may use on a sandbox is the same at both doors."""

from __future__ import annotations

import inspect

import pytest

from pyblock import Sandbox, blocking
from pyblock.life.machine import Machine

CONTEXTS = {"__aenter__": "__enter__", "__aexit__": "__exit__"}


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_the_names_are_the_same() -> None:
    assert public(Sandbox) == public(blocking.Sandbox)


@pytest.mark.parametrize("name", sorted(public(blocking.Sandbox)))
def test_the_parameters_are_the_same(name: str) -> None:
    ours, theirs = getattr(Sandbox, name), getattr(blocking.Sandbox, name)
    if isinstance(ours, property):
        assert isinstance(theirs, property)
        return
    have, other = (inspect.signature(one).parameters for one in (ours, theirs))
    assert list(have) == list(other)
    assert [(one.kind, one.default) for one in have.values()] == [
        (one.kind, one.default) for one in other.values()
    ]


def test_both_are_context_managers() -> None:
    for ours, theirs in CONTEXTS.items():
        assert hasattr(Sandbox, ours) and hasattr(blocking.Sandbox, theirs)


def test_neither_door_is_open_to_what_a_machine_does() -> None:
    """A caller who could take numbers, or write rows, could break what always holds."""
    machine = public(Machine)
    assert {"move", "take", "give_back", "intend", "write", "plug", "unplug"} <= machine
    # a file's at the door, records in the machine
    assert not machine & public(Sandbox) - {"id", "manager", "load"}
