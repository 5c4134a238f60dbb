"""Which sandbox a command is about, and its hold on it: the host's store says what earlier commands, and other programs, did.

A machine is named by its address, its sandbox by its ID; either finds the other where the store knows them.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from pyblock import blocking
from pyblock.errors import InvalidState, PyblockError, SandboxBusy, SandboxConflict, UnknownSandbox
from pyblock.hypervisors import open_hypervisor
from pyblock.hypervisors.base import Hypervisor
from pyblock.sandbox import Sandbox
from pyblock.stores import host_store
from pyblock.stores.base import Store

BUSY_WAIT = 10.0  # seconds that a command waits for another that has the sandbox open
BUSY_PAUSE = 0.02
_WORDS = re.compile(r"[^A-Za-z0-9.]+")

Result = TypeVar("Result")


class Target(NamedTuple):
    """What a command is about. `store` is None for a machine that ends with the command."""

    sandbox_id: str
    vm: str
    store: Store | None


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs what the store is asked for."""
    return asyncio.run(work)


def by_vm(vm: str, sandbox_id: str | None = None) -> Target:
    """The machine at that address, whose sandbox the store may know. Raises UnknownScheme, StateError, StoreError."""
    address = open_hypervisor(vm).address
    if not address:
        return Target(sandbox_id or "cli", vm, None)
    store = host_store()
    return Target(sandbox_id or run(store.find(address)) or derived_id(address), address, store)


def by_sandbox(sandbox_id: str) -> Target:
    """The sandbox of that ID, whose machine the store knows. Raises UnknownSandbox, StateError, StoreError."""
    store = host_store()
    vm = run(store.read(sandbox_id)).vm
    if not vm:
        raise SandboxConflict(f"sandbox {sandbox_id!r} has a machine in memory, which only the process that made it can reach")
    return Target(sandbox_id, vm, store)


def derived_id(vm: str) -> str:
    """A sandbox ID for a machine that has none: readable words of its address, and a digest that keeps two addresses apart."""
    digest = hashlib.sha256(vm.encode()).hexdigest()[:16]
    words = _WORDS.sub("-", vm).strip("-.")[-80:].strip("-.") or "vm"
    return f"{words}-{digest}"


def machine_of_the_dead(sandbox_id: str) -> Target | None:
    """A sandbox with a machine in memory, which ended with its process; None for others. Raises UnknownSandbox, StateError, StoreError."""
    store = host_store()
    stored = run(store.read(sandbox_id))
    return None if stored.vm else Target(sandbox_id, "memory:", store)


async def known(store: Store, sandbox_ids: Iterable[str]) -> dict[str, Sandbox | PyblockError]:
    """What the store has of each sandbox, whoever has it open, or why that cannot be told; nothing of one that it does not have."""
    found: dict[str, Sandbox | PyblockError] = {}
    for sandbox_id in sandbox_ids:
        try:
            found[sandbox_id] = await Sandbox.stored(store, sandbox_id)
        except UnknownSandbox:
            pass
        except PyblockError as error:
            found[sandbox_id] = error
    return found


@contextmanager
def opened(target: Target, *, recover: bool = True, timeout: float = BUSY_WAIT, vm: Hypervisor | None = None) -> Iterator[blocking.Sandbox]:
    """The sandbox, open. One that another command has open is waited for, that many seconds and 10 at most. `vm` stands in for its
    address."""
    deadline = time.monotonic() + min(timeout, BUSY_WAIT)
    while True:
        sandbox = blocking.Sandbox(target.sandbox_id, vm or target.vm, store=target.store, recover=recover)
        try:
            sandbox.__enter__()
            break
        except SandboxBusy:
            if not time.monotonic() < deadline:
                raise
        time.sleep(BUSY_PAUSE)
    try:
        yield sandbox
    finally:
        sandbox.close()


def needs_store(target: Target) -> Store:
    """The store of a target that has one. Raises InvalidState."""
    if target.store is None:
        raise InvalidState(f"the machine {target.vm!r} ends with this command, so nothing is kept of it; give --vm an address that stays")
    return target.store
