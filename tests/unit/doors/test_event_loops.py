"""A sandbox belongs to the event loop that it was opened in; from another one, or another thread's,
it is refused at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from support.snapshot import MakeImage, refused

from pyblock import BlockDevice, Sandbox, WrongEventLoop
from pyblock.life import road
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.timeout(60)

Call = Callable[[Sandbox, BlockDevice, Path], Coroutine[Any, Any, Any]]

CALLS: dict[str, Call] = {
    "attach": lambda sandbox, device, image: sandbox.attach(image, timeout=5),
    "attach once more": lambda sandbox, device, image: sandbox.attach(device.info.path, timeout=5),
    "attach_many": lambda sandbox, device, image: sandbox.attach_many([image], timeout=5),
    "detach": lambda sandbox, device, image: sandbox.detach(device, timeout=5),
    "detach_many": lambda sandbox, device, image: sandbox.detach_many([device], timeout=5),
    "reconcile": lambda sandbox, device, image: sandbox.reconcile(timeout=5),
    "forget": lambda sandbox, device, image: sandbox.forget(),
    "save": lambda sandbox, device, image: sandbox.save(image.with_name("saved")),
    "load": lambda sandbox, device, image: sandbox.load(image),
    "settle": lambda sandbox, device, image: sandbox.settle(1),
    "close": lambda sandbox, device, image: sandbox.close(),
    "road.detach": lambda sandbox, device, image: road.detach(sandbox._machine, device, None),
    "road.attach": lambda sandbox, device, image: road.attach(sandbox._machine, device, None),
    "opened again": lambda sandbox, device, image: sandbox.open(),
    "ensure": lambda sandbox, device, image: sandbox.ensure(image, device_id="b", timeout=5),
}


@pytest.mark.parametrize("threads", [False, True], ids=["second loop", "second thread"])
@pytest.mark.parametrize("name", CALLS)
def test_refused(name: str, threads: bool, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    image, other = make_image("a"), make_image("b")

    async def own() -> None:
        async with Sandbox("one", vm) as sandbox:
            device = await sandbox.attach(image)
            errors: list[BaseException] = []

            def elsewhere() -> None:
                try:
                    asyncio.run(CALLS[name](sandbox, device, other))
                except BaseException as error:
                    errors.append(error)

            with refused(sandbox, vm, WrongEventLoop, "one", "event loop"):
                if threads:
                    await asyncio.to_thread(elsewhere)
                else:
                    thread = threading.Thread(target=elsewhere)
                    thread.start()
                    while thread.is_alive():
                        await asyncio.sleep(0)
                raise errors[0]
            await sandbox.detach(device)

    asyncio.run(own())


def test_after_its_loop_has_ended(make_image: MakeImage) -> None:
    """Nothing can be done in it then but close it."""
    vm = MemoryHypervisor()
    sandbox = Sandbox("one", vm)
    device = asyncio.run(_open(sandbox, make_image("a")))
    with pytest.raises(WrongEventLoop):
        asyncio.run(sandbox.detach(device))
    assert sandbox.state().devices  # what is only looked at may be looked at
    asyncio.run(sandbox.close())
    asyncio.run(_reopened(sandbox))


async def _open(sandbox: Sandbox, image: Path) -> BlockDevice:
    await sandbox.__aenter__()
    return await sandbox.attach(image)


async def _reopened(sandbox: Sandbox) -> None:
    async with sandbox:
        for device in sandbox.devices:
            await sandbox.detach(device)
