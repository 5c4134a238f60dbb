"""Which sandbox a command is about, and its hold on it: the host's store says what earlier
commands, and other programs, did.

A machine is named by its address, its sandbox by its ID; either finds the other where the store
knows them. A command is one run of an event loop, with one deadline for all that it waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

from pyblock.cli.pending import Interrupted, pending
from pyblock.errors import (
    AttachPending,
    DeadlinePassed,
    DetachPending,
    InvalidValue,
    PyblockError,
    SandboxBusy,
    SandboxConflict,
    StoreBusy,
    TransportError,
    UnknownSandbox,
)
from pyblock.life.recovery import SETTLE_TIME
from pyblock.sandbox import Sandbox
from pyblock.store import host_store
from pyblock.store.base import Store
from pyblock.store.record import Record
from pyblock.vmm import open_hypervisor

# seconds that a command waits for another that has the sandbox open, where its deadline is not
# earlier
BUSY_WAIT = 10.0
BUSY_PAUSE = 0.02
_WORDS = re.compile(r"[^A-Za-z0-9.]+")

P = ParamSpec("P")
Result = TypeVar("Result")


class Target(NamedTuple):
    """What a command is about. `store` is None for a machine that ends with the command."""

    sandbox_id: str
    vm: str
    store: Store | None


def command(work: Callable[P, Coroutine[Any, Any, Result]]) -> Callable[P, Result]:
    """A command's function, run in an event loop. Raises Interrupted on Ctrl-C, when what was begun
    is undone, or left pending."""

    @wraps(work)
    def run(*arguments: P.args, **options: P.kwargs) -> Result:
        _held.clear()
        try:
            return asyncio.run(work(*arguments, **options))
        except KeyboardInterrupt:
            raise Interrupted(_held) from None

    return run


_held: list[Sandbox] = []  # what this command has, or had, open


async def by_vm(vm: str, sandbox_id: str | None = None, deadline: float | None = None) -> Target:
    """The machine at that address, whose sandbox the store may know. Raises UnknownScheme,
    StateError, StoreError."""
    address = open_hypervisor(vm).address
    if not address:
        return Target(sandbox_id or "cli", vm, None)
    store = host_store()
    return Target(
        sandbox_id or await store.find(address, deadline) or derived_id(address), address, store
    )


async def by_sandbox(sandbox_id: str, deadline: float | None = None) -> Target:
    """The sandbox of that ID, whose machine the store knows. Raises UnknownSandbox, SandboxBusy,
    StateError, StoreError."""
    store = host_store()
    stored = await store.read(sandbox_id, deadline)
    if stored.vm:
        return Target(sandbox_id, stored.vm, store)
    text = (
        f"sandbox {sandbox_id!r} has a machine in memory, which only the process that made it can "
        "reach"
    )
    if stored.owner:
        raise SandboxBusy(f"{text}: {stored.owner}", sandbox=sandbox_id, owner=stored.owner)
    text = f"{text}; that has ended, so give it up with: pyblock forget {sandbox_id}"
    raise SandboxConflict(text, sandbox=sandbox_id, owner="")


def derived_id(vm: str) -> str:
    """A sandbox ID for a machine that has none: readable words of its address, and a digest that
    keeps two addresses apart."""
    digest = hashlib.sha256(vm.encode()).hexdigest()[:16]
    words = _WORDS.sub("-", vm).strip("-.")[-80:].strip("-.") or "vm"
    return f"{words}-{digest}"


async def known(store: Store, sandbox_ids: Iterable[str]) -> dict[str, list[Record] | PyblockError]:
    """The records of each sandbox's devices, whoever has it open, or why they cannot be told;
    nothing of one that the store does not have."""
    found: dict[str, list[Record] | PyblockError] = {}
    for sandbox_id in sandbox_ids:
        try:
            found[sandbox_id] = (await store.read(sandbox_id)).records()
        except UnknownSandbox:
            pass
        except PyblockError as error:
            found[sandbox_id] = error
    return found


@asynccontextmanager
async def opened(
    target: Target, deadline: float | None, *, wait: float = BUSY_WAIT
) -> AsyncIterator[Sandbox]:
    """The sandbox, open; its machine has not been asked yet. Errors say what is pending, and how to
    give up a machine that is gone.

    :param wait: seconds, the deadline at most, to wait for another process that has it open.
    """
    sandbox = Sandbox(target.sandbox_id, target.vm, store=target.store, recover=False)
    await _open(sandbox, deadline, wait)
    _held.append(sandbox)
    try:
        yield sandbox
    except (TransportError, DeadlinePassed, AttachPending, DetachPending) as error:
        await sandbox.close()  # which undoes what it can
        if target.store is not None and (hint := await _hint(sandbox)):
            error.add_note(hint)
        raise
    finally:
        await sandbox.close()


async def _hint(sandbox: Sandbox) -> str:
    """What a program that goes on would do by itself, and a command leaves to its user."""
    if len(sandbox.manager) and await sandbox._machine.vmm.is_gone():
        return (
            "nobody listens there; if that machine has ended, give up what belonged to it with: "
            f"pyblock forget {sandbox.id}"
        )
    return pending(sandbox)


async def _open(sandbox: Sandbox, deadline: float | None, wait: float) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + wait if deadline is None else min(loop.time() + wait, deadline)
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                await sandbox.__aenter__()
            return
        except TimeoutError:
            text = (
                f"sandbox {sandbox.id}: the deadline passed while another process was holding the "
                "store's lock"
            )
            raise StoreBusy(text, sandbox=sandbox.id) from None
        except SandboxBusy:
            if not loop.time() < until:
                raise
        await asyncio.sleep(BUSY_PAUSE)


def left(deadline: float | None) -> float | None:
    """Seconds until the deadline; None for none."""
    return None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())


async def recover(sandbox: Sandbox, deadline: float | None) -> None:
    """Has a sandbox with a past settled before it is changed, as far as half of the time that is
    left allows: the rest goes on by itself, and whatever changes the machine asks it again. Raises
    TransportError."""
    if len(sandbox.manager):
        remain = left(deadline)
        with contextlib.suppress(DeadlinePassed):
            await sandbox.reconcile(
                timeout=SETTLE_TIME if remain is None else min(SETTLE_TIME, remain / 2)
            )


def needs_store(target: Target) -> Store:
    """The store of a target that has one. Raises InvalidValue."""
    if target.store is None:
        text = (
            f"the machine {target.vm!r} ends with this command, so nothing is kept of it; give "
            "--vm an address that stays"
        )
        raise InvalidValue(text, vm=target.vm, value=target.vm)
    return target.store
