"""What is done with a sandbox in a store without a machine: it is exported, or given up.

The records are read as they are written, whoever has the sandbox open.
"""

from __future__ import annotations

import asyncio
import os

from pyblock.errors import MachineAnswers, knowing
from pyblock.kata import file as json_file
from pyblock.kata.translate import sandbox_to_state
from pyblock.store.base import Row, Store
from pyblock.vmm import open_hypervisor
from pyblock.vmm.base import typed


async def export(store: Store, sandbox_id: str, path: str | os.PathLike[str]) -> None:
    """Writes a sandbox as the original's state file, atomically and synced, with every key that was
    loaded; see Sandbox.save.

    Raises UnknownSandbox; StateError when a record cannot be read, or the file there is something
    else; StoreError.
    """
    stored = await store.read(sandbox_id)
    state = sandbox_to_state(sandbox_id, stored.record(), stored.records())
    await asyncio.to_thread(json_file.write, path, state)


async def forget(store: Store, sandbox_id: str) -> list[str]:
    """Gives up everything that belongs to a machine which no longer exists: devices, indexes,
    claims. Returns the devices' IDs.

    Records that cannot be read are given up as well. Raises UnknownSandbox; SandboxBusy while a
    process that lives has it open; MachineAnswers unless the machine's socket is absent or nobody
    listens there; UnknownScheme, StoreError.
    """
    # "": it was in the memory of a process, which has ended if the sandbox can be had
    vm = (await store.read(sandbox_id)).vm
    with knowing(sandbox=sandbox_id):
        stored = await store.open_sandbox(sandbox_id, vm)
        try:
            if vm:
                await _gone(sandbox_id, vm)
            given_up = [device_id for device_id, _ in stored.devices]
            await store.write(
                sandbox_id, lambda: [Row(device_id, None) for device_id in given_up], own=b""
            )
        finally:
            await store.close_sandbox(sandbox_id)
    return given_up


async def _gone(sandbox_id: str, vm: str) -> None:
    adapter = open_hypervisor(vm)
    try:
        with typed(f"sandbox {sandbox_id}: finding out whether its machine is gone"):
            if await adapter.is_gone():
                return
    finally:
        await adapter.close()
    text = (
        f"sandbox {sandbox_id}: its machine {vm} still answers; detach its devices, or end it first"
    )
    raise MachineAnswers(text, sandbox=sandbox_id, vm=vm)
