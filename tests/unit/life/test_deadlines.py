"""Every call that takes a timeout, on a machine that never answers: over when its time is, and
saying whose deadline that was.

The clock is the event loop's, which jumps (model.Loop): what takes a minute costs nothing, and
nothing depends on how fast this machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine
from typing import Any, NamedTuple

import pytest
from support.model import Loop
from support.snapshot import MakeImage

from pyblock import (
    AttachPending,
    DeadlinePassed,
    DetachPending,
    PyblockError,
    Sandbox,
    VmmUnreachable,
)
from pyblock.disk.model import BlockDrive, Place
from pyblock.life.machine import GRACE
from pyblock.sandbox import CLOSE_TIME, OPEN_TIME, RECONCILE_TIME, TIMEOUT
from pyblock.vmm.base import CONNECT_TIMEOUT, Inventory
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.timeout(120)

Work = Callable[[Sandbox, list[Any], float], Coroutine[Any, Any, Any]]


class Silent(MemoryHypervisor):
    """Does not answer where it is told not to.

    :ivar silent: the methods, or steps, that never return.
    """

    def __init__(self) -> None:
        super().__init__()
        self.silent: set[str] = set()

    async def maybe(self, name: str) -> None:
        if name in self.silent:
            await asyncio.get_running_loop().create_future()

    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        await self.maybe("inventory")
        return await super().inventory(ours)

    async def place(self, drive: BlockDrive) -> Place:
        await self.maybe("place")
        return await super().place(drive)

    async def _step(self, step: str, drive: BlockDrive, do: Callable[[], None]) -> None:
        await self.maybe(step)
        await super()._step(step, drive, do)

    async def close(self) -> None:
        await self.maybe("close")


class Asked(NamedTuple):
    """A call, where the machine is silent, what it raises, and how much longer than its timeout it
    may take."""

    work: Work
    silent: str
    raises: type[PyblockError] | None
    grace: float = 0.0


CALLS = {
    "attach, asking": Asked(
        lambda sandbox, at, t: sandbox.attach(at[2], timeout=t), "inventory", DeadlinePassed
    ),
    "attach, placing": Asked(
        lambda sandbox, at, t: sandbox.attach(at[2], timeout=t), "place", DeadlinePassed
    ),
    "attach, plugging": Asked(
        lambda sandbox, at, t: sandbox.attach(at[2], timeout=t), "device-add", AttachPending
    ),
    "attach many, asking": Asked(
        lambda sandbox, at, t: sandbox.attach_many(at[2:], timeout=t), "inventory", DeadlinePassed
    ),
    "attach many, placing": Asked(
        lambda sandbox, at, t: sandbox.attach_many(at[2:], timeout=t),
        "place",
        DeadlinePassed,
        GRACE,
    ),
    "attach many, plugging": Asked(
        lambda sandbox, at, t: sandbox.attach_many(at[2:], timeout=t),
        "device-add",
        AttachPending,
        GRACE,
    ),
    "detach, asking": Asked(
        lambda sandbox, at, t: sandbox.detach("a", timeout=t), "inventory", DeadlinePassed
    ),
    "detach, unplugging": Asked(
        lambda sandbox, at, t: sandbox.detach("a", timeout=t), "device-gone", DetachPending
    ),
    "detach many, asking": Asked(
        lambda sandbox, at, t: sandbox.detach_many(["a", "b"], timeout=t),
        "inventory",
        DeadlinePassed,
    ),
    "detach many, unplugging": Asked(
        lambda sandbox, at, t: sandbox.detach_many(["a", "b"], timeout=t),
        "device-del",
        DetachPending,
    ),
    "reconcile": Asked(
        lambda sandbox, at, t: sandbox.reconcile(timeout=t), "inventory", DeadlinePassed
    ),
    "reconcile, dry": Asked(
        lambda sandbox, at, t: sandbox.reconcile(timeout=t, dry_run=True),
        "inventory",
        DeadlinePassed,
    ),
}


class Bench:
    """A loop on that clock, and a sandbox with devices a and b on a machine that may fall
    silent."""

    def __init__(self, make_image: MakeImage) -> None:
        self.loop = Loop()
        self.vm = Silent()
        self.images: list[Any] = [make_image(name) for name in "abcd"]
        self.sandbox = Sandbox("one", self.vm, store=None)
        self.run(self._open())

    async def _open(self) -> None:
        await self.sandbox.__aenter__()
        for name in "ab":
            await self.sandbox.attach(self.images["ab".index(name)], device_id=name)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def seconds(
        self, work: Coroutine[Any, Any, Any], raises: type[BaseException] | None
    ) -> tuple[float, str]:
        began = self.loop.time()
        with pytest.raises(raises) if raises else contextlib.nullcontext() as caught:
            self.run(work)
        if raises is not None:
            assert type(caught.value) is raises  # type: ignore[union-attr]
        return self.loop.time() - began, str(caught.value) if caught is not None else ""

    def end(self) -> None:
        self.vm.silent.clear()
        self.run(self.sandbox.close())
        for task in self.loop.at_work:
            task.cancel()
        self.run(asyncio.sleep(0))
        self.loop.close()


@pytest.mark.parametrize("timeout", [0, 0.5, 3, 45, 100])
@pytest.mark.parametrize("name", CALLS)
def test_a_call(name: str, timeout: float, make_image: MakeImage) -> None:
    asked = CALLS[name]
    bench = Bench(make_image)
    bench.sandbox._machine.doubt()  # as after a lost connection
    bench.vm.silent.add(asked.silent)
    raises = asked.raises if timeout else DeadlinePassed  # while asking, which comes first
    if asked.silent == "inventory" and timeout > CONNECT_TIMEOUT:
        raises = VmmUnreachable  # that is not the caller's deadline
    seconds, text = bench.seconds(asked.work(bench.sandbox, bench.images, timeout), raises)
    assert seconds <= timeout + asked.grace
    if raises is DeadlinePassed:
        assert f"deadline of {timeout:g} s" in text and "nothing was changed" in text
        assert isinstance(DeadlinePassed(""), TimeoutError)
        assert (
            sorted(device.id for device in bench.sandbox.devices) == ["a", "b"]
            and len(bench.sandbox.index) == 2
        )
    bench.end()


def test_removals_that_reconcile_waits_for(make_image: MakeImage) -> None:
    bench = Bench(make_image)
    bench.vm.fail("device-add", Fault("lose"))
    bench.seconds(bench.sandbox.attach(bench.images[2]), AttachPending)
    bench.vm.silent.add("device-gone")
    assert bench.seconds(bench.sandbox.reconcile(timeout=7), None)[0] == 7
    bench.end()


def test_no_timeout_given(make_image: MakeImage) -> None:
    """Their defaults, which stand in the docs."""
    bench = Bench(make_image)
    bench.vm.silent.add("inventory")
    assert bench.seconds(bench.sandbox.reconcile(), DeadlinePassed)[0] == RECONCILE_TIME == 10
    bench.sandbox._machine.doubt()
    assert (
        bench.seconds(bench.sandbox.attach(bench.images[2]), VmmUnreachable)[0]
        == CONNECT_TIMEOUT
        < TIMEOUT
    )
    assert (
        bench.seconds(bench.sandbox.attach(bench.images[2], timeout=None), VmmUnreachable)[0]
        == CONNECT_TIMEOUT
    )
    bench.end()


def test_settle_and_close(make_image: MakeImage) -> None:
    bench = Bench(make_image)
    bench.vm.silent |= {"device-add", "close"}
    bench.seconds(bench.sandbox.attach(bench.images[2], timeout=1), AttachPending)
    assert bench.seconds(bench.sandbox.settle(3), None)[0] == 3
    batch = bench.loop.create_task(bench.sandbox.attach_many(bench.images[3:], timeout=None))
    bench.run(asyncio.sleep(1))
    seconds, _ = bench.seconds(bench.sandbox.close(), None)
    assert GRACE <= seconds <= CLOSE_TIME == 10
    with pytest.raises(PyblockError):
        bench.loop.run_until_complete(batch)
    bench.end()


@pytest.mark.parametrize(("given", "takes"), [(None, OPEN_TIME), (2.0, 2.0), (0.0, 0.0)])
def test_opening(given: float | None, takes: float, make_image: MakeImage, store: Any) -> None:
    """It does not fail: what is known stays as it is, and the machine is asked later."""
    bench = Bench(make_image)
    # connects with a thread's help, for which such a loop does not wait
    asyncio.run(store.sandboxes())
    vm = Silent()

    async def with_a_past() -> None:
        async with Sandbox("two", vm, store=store) as sandbox:
            await sandbox.attach(bench.images[2])

    bench.run(with_a_past())
    vm.silent.add("inventory")
    again = Sandbox("two", vm, store=store, open_timeout=given)
    assert bench.seconds(again.__aenter__(), None)[0] == takes
    assert len(again.devices) == 1
    vm.silent.clear()
    bench.run(again.close())
    bench.end()
