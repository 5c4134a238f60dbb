"""Every error, raised for real through the public doors, with the facts that it carries.

A row of SCENES is how it comes about, and what `to_dict` has to hold of it; a class without a row
fails.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.descriptors import no_more_than
from support.held_store import Gate, HeldStore, SlowMachine, locked
from support.snapshot import MakeImage
from support.turns import BEGUN, SOON, until
from test_errors import CODES, KINDS

import pyblock
from pyblock import (
    AttachPending,
    ConnectionLost,
    DeviceInfo,
    Fault,
    MemoryHypervisor,
    PyblockError,
    Sandbox,
    blocking,
)
from pyblock.disk.model import BlockDrive
from pyblock.life.table import ATTACH_COUNT_MAX
from pyblock.vmm.base import Inventory, Offer

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

# Nothing raises these themselves: they are what others have in common.
COMMON = {"PyblockError", "Conflict", "CapacityError", "StateError", "TransportError"}


class Scene(NamedTuple):
    """Sandbox "one", open, with its machine and its store; an image, and a folder."""

    sandbox: Sandbox
    vm: MemoryHypervisor
    store: HeldStore
    image: Path
    folder: Path


Provoke = Callable[[Scene], Awaitable[object]]
SCENES: dict[str, tuple[Provoke, Callable[[Scene], dict[str, Any]]]] = {}


def provokes(code: str, **facts: Any) -> Callable[[Provoke], Provoke]:
    """A row: `facts` that are callable are asked about the scene."""

    def add(provoke: Provoke) -> Provoke:
        assert code not in SCENES
        SCENES[code] = (
            provoke,
            lambda scene: {
                name: fact(scene) if callable(fact) else fact for name, fact in facts.items()
            },
        )
        return provoke

    return add


def image(scene: Scene) -> str:
    return str(scene.image)


def at(name: str) -> Callable[[Scene], str]:
    return lambda scene: str(scene.folder / name)


@provokes("caller-error", sandbox="one")
async def loading_into_a_full_one(scene: Scene) -> None:
    await scene.sandbox.attach(scene.image)
    await scene.sandbox.restore(scene.sandbox.state())


@provokes("invalid-value", value=-1)
async def offset(scene: Scene) -> None:
    Sandbox("two", scene.vm, block_offset=-1)


@provokes("invalid-index", value=0)
async def capacity(scene: Scene) -> None:
    Sandbox("two", scene.vm, capacity=0)


@provokes("invalid-name", value="vdA")
async def name(scene: Scene) -> None:
    pyblock.drive_index("vdA")


@provokes("invalid-address", value="1:256")
async def address(scene: Scene) -> None:
    pyblock.scsi_index("1:256")


@provokes("invalid-id", sandbox="one", value="a/b")
async def device_id(scene: Scene) -> None:
    await scene.sandbox.attach(scene.image, device_id="a/b")


@provokes("invalid-serial", sandbox="one", value="s p", driver=None)
async def serial(scene: Scene) -> None:
    await scene.sandbox.attach(scene.image, serial="s p")


@provokes("invalid-timeout", value=-1)
async def timeout(scene: Scene) -> None:
    await scene.sandbox.attach(scene.image, timeout=-1)


@provokes("invalid-image", sandbox="one", path=at("none"))
async def no_image(scene: Scene) -> None:
    await scene.sandbox.attach(scene.folder / "none")


@provokes("unknown-driver", sandbox="one", driver="ide", value="ide")
async def driver(scene: Scene) -> None:
    await scene.sandbox.attach(scene.image, driver="ide")


@provokes("unknown-scheme", vm="xen:7")
async def scheme(scene: Scene) -> None:
    Sandbox("two", "xen:7")


@provokes("unknown-device", sandbox="one", device="nobody")
async def no_device(scene: Scene) -> None:
    await scene.sandbox.detach("nobody")


@provokes("unknown-sandbox", sandbox="nobody", path=lambda scene: str(scene.store.path))
async def no_sandbox(scene: Scene) -> None:
    await pyblock.host(scene.store).devices("nobody")


@provokes("not-attached", sandbox="one", device="a", path=image)
async def not_attached(scene: Scene) -> None:
    scene.sandbox.manager.obtain(DeviceInfo(str(scene.image), id="a"))
    await scene.sandbox.detach("a")


class Rough(MemoryHypervisor):
    offers: Mapping[str, Offer] = {"virtio-blk": Offer(read_only=False, removal="forced")}


@provokes("not-offered", sandbox="two", driver="virtio-blk", path=image)
async def not_offered(scene: Scene) -> None:
    async with Sandbox("two", Rough(), driver="virtio-blk", store=None) as other:
        await other.attach(scene.image, read_only=True)


@provokes(
    "not-released",
    sandbox="two",
    driver="virtio-blk",
    device="a",
    drive="drive-a",
    index=0,
    path=image,
)
async def not_released(scene: Scene) -> None:
    async with Sandbox("two", Rough(), driver="virtio-blk", store=None) as other:
        await other.detach(await other.attach(scene.image, device_id="a"))


@provokes("index-taken", index=0, value=0)
async def index_taken(scene: Scene) -> None:
    await scene.sandbox.attach(scene.image)
    scene.sandbox.index.reserve(0)


@provokes("index-free", index=5, value=5)
async def index_free(scene: Scene) -> None:
    scene.sandbox.index.release(5)


@provokes("sandbox-closed", sandbox="two")
async def closed(scene: Scene) -> None:
    await Sandbox("two", scene.vm).attach(scene.image)


@provokes("wrong-event-loop", sandbox="one")
async def other_loop(scene: Scene) -> None:
    found: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(scene.sandbox.detach("a"))
        except PyblockError as error:
            found.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    raise found[0]


@provokes(
    "sandbox-busy",
    sandbox="one",
    owner=lambda scene: f"process {os.getpid()} (__main__.py)",
    path=lambda scene: str(scene.store.path),
)
async def busy(scene: Scene) -> None:
    async with Sandbox("one", MemoryHypervisor(), store=scene.store):
        pass


@provokes(
    "image-in-use",
    sandbox="one",
    device="a",
    drive="drive-a",
    index=0,
    path=image,
    holder="two",
    owner="",
)
async def in_use(scene: Scene) -> None:
    async with Sandbox("two", MemoryHypervisor(), store=scene.store) as other:
        await other.attach(scene.image)
    await scene.sandbox.attach(scene.image, device_id="a")


@provokes("image-replaced", sandbox="one", device="a", drive="drive-a", path=image)
async def replaced(scene: Scene) -> None:
    gate = scene.store.hold()
    attach = asyncio.create_task(scene.sandbox.attach(scene.image, device_id="a"))
    await until(lambda: gate.reached)
    scene.image.with_name("new").write_bytes(b"n" * 512)
    scene.image.with_name("new").rename(scene.image)
    gate.let_go()
    await attach


@provokes("machine-answers", sandbox="one")
async def answers(scene: Scene) -> None:
    await scene.sandbox.forget()


@provokes(
    "sandbox-conflict", sandbox="two", holder="two", vm=lambda scene: f"memory:{scene.folder}/first"
)
async def two_machines(scene: Scene) -> None:
    for machine in ("first", "second"):
        (scene.folder / machine).touch()
        async with Sandbox("two", f"memory:{scene.folder}/{machine}", store=scene.store) as other:
            await other.attach(scene.image)


@provokes("device-conflict", sandbox="one", device="a", path=image, value=True)
async def another_form(scene: Scene) -> None:
    await scene.sandbox.attach(scene.image, device_id="a")
    await scene.sandbox.attach(scene.image, read_only=True)


@provokes("indexes-exhausted", sandbox="two", device="b", path=at("other"))
async def no_index(scene: Scene) -> None:
    other = scene.folder / "other"
    other.write_bytes(bytes(512))
    async with Sandbox("two", MemoryHypervisor(), capacity=1, store=None) as small:
        await small.attach(scene.image)
        await small.attach(other, device_id="b")


@provokes(
    "slots-exhausted",
    sandbox="two",
    device="a",
    drive="drive-a",
    index=0,
    path=image,
    driver="virtio-blk",
)
async def no_slot(scene: Scene) -> None:
    async with Sandbox("two", MemoryHypervisor(slots=0), store=None) as small:
        await small.attach(scene.image, device_id="a", driver="virtio-blk")


@provokes("descriptors-exhausted", sandbox="one", path=image)
async def no_descriptor(scene: Scene) -> None:
    with no_more_than(0):
        await scene.sandbox.attach(scene.image)


@provokes("attach-count-exhausted", sandbox="one", device="a", drive="drive-a", index=0, path=image)
async def no_count(scene: Scene) -> None:
    device = await scene.sandbox.attach(scene.image, device_id="a")
    device.attach_count = ATTACH_COUNT_MAX
    try:
        await scene.sandbox.attach(scene.image)
    finally:
        device.attach_count = 1


@provokes("invalid-state", sandbox="one", path=at("state"))
async def bad_state(scene: Scene) -> None:
    (scene.folder / "state").write_text("{")
    await scene.sandbox.load(scene.folder / "state")


@provokes("newer-state", sandbox="one", path=at("state"))
async def newer_state(scene: Scene) -> None:
    (scene.folder / "state").write_text('{"Pyblock": {"Version": 99}}')
    await scene.sandbox.load(scene.folder / "state")


@provokes("store-error", sandbox="one", path=at("absent/state"))
async def no_store(scene: Scene) -> None:
    await scene.sandbox.save(scene.folder / "absent/state")


@provokes(
    "store-busy",
    sandbox="one",
    device="a",
    drive="drive-a",
    index=0,
    path=lambda scene: str(scene.store.path),
)
async def store_busy(scene: Scene) -> None:
    with locked(scene.store):
        await scene.sandbox.attach(scene.image, device_id="a", timeout=SOON)


@provokes(
    "vmm-refused", sandbox="one", device="a", drive="drive-a", index=0, path=image,
    driver="virtio-scsi",
    step="device-add", request="drive-a", reply="told to refuse",
)  # fmt: skip
async def vmm_refuses(scene: Scene) -> None:
    scene.vm.fail("device-add", Fault("refuse"))
    await scene.sandbox.attach(scene.image, device_id="a")


@provokes(
    "vmm-unreachable",
    sandbox="two",
    sent=False,
    vm=lambda scene: f"qemu:{scene.folder}/qmp",
    path=at("qmp"),
)
async def nobody_there(scene: Scene) -> None:
    async with Sandbox("two", f"qemu:{scene.folder}/qmp", store=None) as other:
        await other.attach(scene.image)


@provokes(
    "vmm-protocol-error", sandbox="two", vm=lambda scene: f"memory:{scene.folder}/vm", path=at("vm")
)
async def no_protocol(scene: Scene) -> None:
    (scene.folder / "vm").write_text("what is this")
    async with Sandbox("two", f"memory:{scene.folder}/vm", store=None) as other:
        await other.attach(scene.image)


class Breaking(MemoryHypervisor):
    async def inventory(self, ours: Collection[BlockDrive] = ()) -> Inventory:
        raise ConnectionLost("it hung up while it was asked")


@provokes("connection-lost", sandbox="two", sent=True)
async def lost(scene: Scene) -> None:
    async with Sandbox("two", Breaking(), store=None) as other:
        await other.reconcile()


@provokes("deadline-passed", sandbox="two", timeout=SOON)
async def too_late(scene: Scene) -> None:
    vm = SlowMachine()
    vm.answer = Gate()
    async with Sandbox("two", vm, store=None) as other:
        await other.attach(scene.image, timeout=SOON)


@provokes("closed-meanwhile", sandbox="two")
async def closed_meanwhile(scene: Scene) -> None:
    vm = MemoryHypervisor()
    other = Sandbox("two", vm, store=None)
    async with other:
        vm.fail("device-add", Fault("hold"))
        task = asyncio.create_task(other.attach_many([scene.image]))
        await until(lambda: "device-add" in [step for step, _ in vm.journal])
        closing = asyncio.create_task(other.close())
        await asyncio.sleep(0)
        vm.let_go("device-add")
        await closing
    await task


@provokes(
    "attach-pending", sandbox="one", device="a", drive="drive-a", index=0, path=image, timeout=BEGUN
)
async def attach_pending(scene: Scene) -> None:
    scene.vm.fail("device-add", Fault("hold"))
    try:
        await scene.sandbox.attach(scene.image, device_id="a", timeout=BEGUN)
    finally:
        scene.vm.let_go("device-add")


@provokes(
    "detach-pending", sandbox="one", device="a", drive="drive-a", index=0, path=image, timeout=BEGUN
)
async def detach_pending(scene: Scene) -> None:
    device = await scene.sandbox.attach(scene.image, device_id="a")
    scene.vm.fail("device-gone", Fault("hold"))
    try:
        await scene.sandbox.detach(device, timeout=BEGUN)
    finally:
        scene.vm.let_go("device-gone")


def test_every_error_is_provoked() -> None:
    assert {CODES[name] for name in KINDS if name not in COMMON} == SCENES.keys()


@pytest.mark.parametrize("code", SCENES)
async def test_provoked(code: str, store: HeldStore, make_image: MakeImage, tmp_path: Path) -> None:
    vm = MemoryHypervisor()
    provoke, facts = SCENES[code]
    async with Sandbox("one", vm, store=store) as sandbox:
        scene = Scene(sandbox, vm, store, make_image("image"), tmp_path)
        expected = facts(scene)
        with pytest.raises(PyblockError) as caught:
            await provoke(scene)
    body = caught.value.to_dict()
    assert body["code"] == code
    assert {name: body.get(name) for name in expected} == expected


async def test_nothing_raised_after_sending_is_the_callers_fault(
    store: HeldStore, make_image: MakeImage
) -> None:
    """Whatever befalls whichever step, and whatever befalls the undoing."""
    steps = ["backend-add", "device-add", "device-del", "device-gone", "backend-del"]
    kinds = [
        Fault("refuse"),
        Fault("lose"),
        Fault("lose", done=False),
        Fault("break"),
        Fault("break", done=False),
    ]
    picture = make_image("image")
    seen = set()
    for step in steps:
        for fault in kinds:
            for also in (None, "backend-del"):
                vm = MemoryHypervisor()
                async with Sandbox("one", vm, store=None) as sandbox:
                    vm.fail(step, fault)
                    if also is not None:
                        vm.fail(also, Fault("refuse"))
                    try:
                        await sandbox.detach(await sandbox.attach(picture))
                    except PyblockError as error:
                        assert not isinstance(error, pyblock.CallerError | pyblock.Conflict), (
                            step,
                            fault,
                            also,
                        )
                        assert (
                            error.sandbox == "one"
                            and error.drive is not None
                            and error.path == str(picture)
                        )
                        seen.add(type(error))
    assert {AttachPending, pyblock.DetachPending, pyblock.VmmRefused} <= seen


def test_the_blocking_door_raises_the_same(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    with blocking.Sandbox("one", vm, store=None) as sandbox:
        vm.fail("backend-add", Fault("refuse"))
        with pytest.raises(pyblock.VmmRefused) as caught:
            sandbox.attach(make_image("image"), device_id="a")
    assert (caught.value.sandbox, caught.value.device, caught.value.step) == (
        "one",
        "a",
        "backend-add",
    )
