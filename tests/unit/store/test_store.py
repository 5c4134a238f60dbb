"""What one process leaves in the store, the next one takes up: devices, counts, indexes, addresses,
claims, and Kata's keys.

Two stores on one path are as those of two processes; a machine in memory outlives them as an
object.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import eager, samples
from support.snapshot import MakeImage, MakeStore, drive_ids, ordinals, plug_in

from pyblock import (
    DRIVERS,
    AttachPending,
    BlockDevice,
    DetachPending,
    DeviceInfo,
    ImageInUse,
    InvalidState,
    MachineAnswers,
    Sandbox,
    SandboxBusy,
    SandboxConflict,
    UnknownSandbox,
    VmmUnreachable,
    blocking,
)
from pyblock.kata.schema import encode
from pyblock.life.recovery import Found, Outcome
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

pytestmark = pytest.mark.anyio


def facts(sandbox: Sandbox) -> dict[str, Any]:
    """What a sandbox knows of its devices."""
    devices = [device for device in sandbox.devices if isinstance(device, BlockDevice)]
    return {
        device.id: (
            (
                device.info.path,
                device.info.driver,
                device.info.read_only,
                device.info.serial,
                device.info.share,
            ),
            *(device.identity, device.phase, device.attach_count, device.drive),
        )
        for device in devices
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {key: value[:-1] for key, value in one.items()} == {
        key: value[:-1] for key, value in other.items()
    } and all(repr(one[key][-1]) == repr(other[key][-1]) for key in one)


async def test_a_restart_keeps_everything(make_image: MakeImage, make_store: MakeStore) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        for number, driver in enumerate(DRIVERS):
            await sandbox.attach(
                make_image(driver),
                driver=driver,
                read_only=number % 2 == 0,
                device_id=f"device-{driver}",
                share=number < 2,
            )
        await sandbox.attach(make_image("long"), device_id="x" * 100)
        await sandbox.attach(make_image("gone"), device_id="gone")
        await sandbox.detach("gone")
        again = DeviceInfo(path=str(make_image("twice")))
        for _ in range(3):
            twice = await sandbox.attach(again)
        await sandbox.detach(twice)
        before, index, taken, ids = (
            facts(sandbox),
            list(sandbox.index),
            ordinals(sandbox),
            drive_ids(sandbox),
        )
    async with Sandbox("one", vm, store=make_store()) as other:
        assert same(facts(other), before) and not other.recovered
        assert (list(other.index), ordinals(other), drive_ids(other)) == (index, taken, ids)
        assert (await other.attach(again)).attach_count == 3
        assert (await other.attach(make_image("new"))).held.index == len(index)
        for device in other.devices:
            for _ in range(device.attach_count):
                await other.detach(device)
        assert not other.devices and not vm.backends and not len(other.index)
    assert await make_store().sandboxes() == []


async def test_the_same_object_is_opened_again(
    make_image: MakeImage, make_store: MakeStore
) -> None:
    vm = MemoryHypervisor(slots=1)
    sandbox = Sandbox("one", vm, driver="virtio-blk", store=make_store())
    async with sandbox:
        first = await sandbox.attach(make_image("a"))
    async with sandbox:
        [again] = sandbox.devices
        assert again is not first and again.id == first.id
        await sandbox.detach(again)
        await sandbox.attach(make_image("b"))  # the one slot is free


async def test_who_died_in_the_middle(make_image: MakeImage, make_store: MakeStore) -> None:
    """As SIGKILL leaves it: the rows say what was intended, nobody wrote what came of it."""
    vm = MemoryHypervisor()
    dead = make_store()
    sandbox = await Sandbox("one", vm, store=dead).__aenter__()
    leaving = await sandbox.attach(make_image("leaving"), device_id="leaving")
    await sandbox.attach(make_image("stays"), device_id="stays")
    vm.fail("device-add", Fault("hold"))
    vm.fail("device-gone", Fault("hold"))
    vm.fail("backend-add", Fault("hold"), times=1)
    held = [
        asyncio.create_task(sandbox.attach(make_image("early"), device_id="early")),
        asyncio.create_task(sandbox.attach(make_image("half"), device_id="half")),
        asyncio.create_task(sandbox.detach(leaving)),
    ]
    while len([step for step, _ in vm.journal if step in ("backend-add", "device-gone")]) < 5:
        await asyncio.sleep(0)
    dead.close()
    with pytest.raises(ImageInUse, match="'one'"):
        async with Sandbox("two", MemoryHypervisor(), store=make_store()) as other:
            await other.attach(make_image("other"))
            await other.attach(leaving.info.path)
    async with Sandbox("one", vm, store=make_store()) as again:
        assert {(one.device_id, one.found, one.outcome) for one in again.recovered} == {
            ("early", Found.ATTACH, Outcome.FREED),
            ("half", Found.ATTACH, Outcome.REMOVED),
            ("leaving", Found.DETACH, Outcome.REMOVED),
        }
        assert [device.id for device in again.devices] == ["stays"] and list(again.index) == [1]
        assert vm.backends.keys() == vm.devices.keys() == {"drive-stays"}
        await again.detach("leaving")  # its caller was never answered
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)


async def test_what_is_pending_stays_taken_over_restarts(
    make_image: MakeImage, make_store: MakeStore
) -> None:
    vm = MemoryHypervisor()
    image = make_image("image")
    async with Sandbox("one", vm, driver="virtio-blk", store=make_store()) as sandbox:
        device = await sandbox.attach(image, device_id="x")
        vm.fail("device-gone", Fault("lose", done=False))
        with pytest.raises(DetachPending):
            await sandbox.detach(device)
        before = facts(sandbox)
    vm.dead = True
    for _ in range(3):
        async with Sandbox("one", vm, store=make_store()) as sandbox:
            assert (
                same(facts(sandbox), before)
                and not sandbox.recovered
                and list(sandbox.index) == [0]
            )
            for work in (sandbox.attach(image), sandbox.detach("x"), sandbox.reconcile()):
                with pytest.raises(VmmUnreachable):
                    await work
            async with Sandbox("two", MemoryHypervisor(), store=make_store()) as other:
                with pytest.raises(ImageInUse, match=f"{image}.*device x of sandbox 'one'"):
                    await other.attach(image)
    vm.dead = False
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        assert [one.outcome for one in sandbox.recovered] == [
            Outcome.REMOVED
        ] and not sandbox.devices
        await sandbox.detach("x")


async def test_an_attach_that_cannot_be_undone_is_finished(
    make_image: MakeImage, make_store: MakeStore
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        vm.fail("device-add", Fault("lose"))
        with pytest.raises(AttachPending):
            await sandbox.attach(make_image("image"), driver="nvdimm", device_id="x")
    vm.fail("device-del", Fault("refuse"))
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        assert [(one.found, one.outcome) for one in sandbox.recovered] == [
            (Found.ATTACH, Outcome.FINISHED)
        ]
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        [device] = sandbox.devices
        assert (
            isinstance(device, BlockDevice)
            and device.attached
            and device.attach_count == 1
            and device.held.guest_match == "/region0/"
        )
        await sandbox.detach(device)
        assert not vm.backends


async def test_a_detach_that_is_declined_after_a_restart(
    make_image: MakeImage, make_store: MakeStore
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        device = await sandbox.attach(make_image("image"))
        vm.fail("device-gone", Fault("lose", done=False))
        with pytest.raises(DetachPending):
            await sandbox.detach(device)
    vm.fail("device-gone", Fault("refuse"))
    for outcomes in ([Outcome.KEPT], []):
        async with Sandbox("one", vm, store=make_store()) as sandbox:
            assert [one.outcome for one in sandbox.recovered] == outcomes
            [again] = sandbox.devices
            assert isinstance(again, BlockDevice) and again.attached and again.attach_count == 1
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        await sandbox.detach(device.id)
    assert not vm.backends


async def test_a_count_of_a_generic_device(make_store: MakeStore, make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        device = sandbox.manager.obtain(DeviceInfo(dev_type="c", major=10, minor=229, id="fuse"))
        await sandbox.manager.attach(device.id, sandbox)
        await sandbox.manager.attach(device.id, sandbox)
        await sandbox.detach(device)
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        [device] = sandbox.devices
        assert (device.attach_count, device.info.major) == (1, 10)
        await sandbox.detach(device)
    assert await make_store().sandboxes() == []


async def test_owners(make_store: MakeStore, make_image: MakeImage) -> None:
    one, two = make_store(), make_store()
    vm = MemoryHypervisor()
    sandbox = await Sandbox("s", vm, store=one).__aenter__()
    await sandbox.attach(make_image("a"))
    for store in (one, two):
        with pytest.raises(SandboxBusy, match="'s' belongs to process"):
            await Sandbox("s", vm, store=store).__aenter__()
    async with Sandbox("other", vm, store=two):
        pass
    one.close()  # as its process ends
    async with Sandbox("s", vm, store=two) as other:
        assert len(other.devices) == 1


async def test_a_machine_has_one_sandbox(
    make_store: MakeStore, tmp_path: Path, make_image: MakeImage
) -> None:
    addresses = []
    for name in ("vm1", "vm2"):
        (tmp_path / name).touch()
        addresses.append(f"memory:{tmp_path / name}")
    async with Sandbox("one", addresses[0], store=make_store()) as sandbox:
        with pytest.raises(SandboxConflict, match="'one'"):
            await Sandbox("two", addresses[0], store=make_store()).__aenter__()
        await sandbox.attach(make_image("a"))
    with pytest.raises(SandboxConflict, match="pyblock forget one"):
        await Sandbox("one", addresses[1], store=make_store()).__aenter__()
    async with Sandbox("one", addresses[0], store=make_store()) as sandbox:
        with pytest.raises(MachineAnswers):
            await sandbox.forget()
        (tmp_path / "vm1").unlink()
        assert len(await sandbox.forget()) == 1
        assert not sandbox.devices and not len(sandbox.index)
    async with (
        Sandbox("two", addresses[0], store=make_store()),
        Sandbox("one", addresses[1], store=make_store()) as sandbox,
    ):
        await sandbox.attach(tmp_path / "a")


async def test_a_store_for_every_machine_that_outlives_the_process(
    tmp_path: Path, make_image: MakeImage, state_dir: Path
) -> None:
    image = make_image("a")
    async with Sandbox("one", "memory:") as sandbox:
        await sandbox.attach(image)
    assert not list(state_dir.iterdir())
    (tmp_path / "vm").touch()
    async with Sandbox("one", f"memory:{tmp_path / 'vm'}") as sandbox:
        await sandbox.attach(image)
    assert (state_dir / "state.db").exists()
    # whoever says so goes without
    async with Sandbox("two", f"memory:{tmp_path / 'vm'}", store=None) as sandbox:
        assert not sandbox.devices
    with blocking.Sandbox("one", f"memory:{tmp_path / 'vm'}") as other:
        assert len(other.devices) == 1
        other.detach(other.devices[0])


@pytest.mark.parametrize("name", samples.KATA)
async def test_what_was_imported_is_kept_over_restarts(
    name: str, tmp_path: Path, make_store: MakeStore
) -> None:
    path = tmp_path / "kata.json"
    path.write_bytes(samples.text(samples.KATA[name]))
    vm = MemoryHypervisor()
    async with Sandbox("one", vm, store=make_store()) as sandbox:
        await sandbox.load(path)
        plug_in(vm, sandbox)
        before = (
            list(sandbox.index),
            ordinals(sandbox),
            drive_ids(sandbox),
            [device.ref_count for device in sandbox.devices],
        )
    for _ in range(2):
        async with Sandbox("one", vm, store=make_store()) as sandbox:
            assert (
                list(sandbox.index),
                ordinals(sandbox),
                drive_ids(sandbox),
                [device.ref_count for device in sandbox.devices],
            ) == before
            text = encode(sandbox.state())
    assert samples.without_pyblock(json.loads(text)) == samples.without_pyblock(
        samples.as_written(samples.KATA[name])
    )


async def test_an_import_that_is_refused_changes_nothing(
    tmp_path: Path, make_store: MakeStore, make_image: MakeImage
) -> None:
    images = [make_image(name) for name in "abc"]
    path = tmp_path / "kata.json"
    devices = [
        samples.device(
            number,
            samples.drive(number, File=str(image), SCSIAddr=f"0:{number}"),
            AttachCount=1,
            RefCount=1,
        )
        for number, image in enumerate(images)
    ]
    path.write_bytes(samples.text(samples.sandbox(devices, [0, 1, 2])))
    store = make_store()
    async with Sandbox("holder", MemoryHypervisor(), store=store) as holder:
        await holder.attach(images[1])
        async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
            with pytest.raises(ImageInUse, match="'holder'"):
                await sandbox.load(path)
            assert not sandbox.devices and not len(sandbox.index)
        assert await store.sandboxes() == ["holder"]
        with pytest.raises(UnknownSandbox):
            await store.read("one")
        await holder.attach(images[0])
        await holder.attach(images[2])


async def test_four_transactions_at_most(make_store: MakeStore, make_image: MakeImage) -> None:
    store = make_store()
    images = [make_image(f"image{number}") for number in range(50)]
    commits: list[str] = []
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        await sandbox.detach(await sandbox.attach(images[0]))
        assert store._file._db is not None
        store._file._db.set_trace_callback(
            lambda sql: commits.append(sql) if sql == "COMMIT" else None
        )
        await sandbox.detach(await sandbox.attach(images[0]))
        assert len(commits) == 4
        commits.clear()
        await sandbox.detach_many(await sandbox.attach_many(images))
        # A crowd of attaches shares its intents; where a task begins at once, none comes as a
        # crowd.
        assert len(commits) <= (4 * len(images) if eager.WANTED else 3 * len(images) + 2)
        store._file._db.set_trace_callback(None)


async def test_rows_that_contradict_each_other_are_refused(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    store = make_store()
    async with Sandbox("one", vm := MemoryHypervisor(), store=store) as sandbox:
        await sandbox.attach(make_image("a"))
    assert store._file._db is not None
    store._file._db.execute(
        "INSERT INTO device SELECT sandbox, 'copy', state, NULL, NULL FROM device"
    )
    for _ in range(2):
        with pytest.raises(InvalidState, match="'one'"):
            await Sandbox("one", vm, store=store).__aenter__()


def test_threads_of_the_blocking_door(make_store: MakeStore, make_image: MakeImage) -> None:
    """Many threads attach and detach one image, and each its own: as many detaches as attaches end
    it, in the store as well."""
    image, vm, store = make_image("shared"), MemoryHypervisor(), make_store()
    own = [make_image(f"own{number}") for number in range(8)]

    def work(number: int) -> None:
        for _ in range(25):
            shared = sandbox.attach(image)
            mine = sandbox.attach(own[number])
            sandbox.detach(mine)
            sandbox.detach(shared.id)

    with blocking.Sandbox("one", vm, store=store) as sandbox:
        kept = sandbox.attach(image)
        with ThreadPoolExecutor(len(own)) as pool:
            list(pool.map(work, range(len(own))))
        assert kept.attach_count == 1 and list(sandbox.index) == [0] and len(vm.backends) == 1
    with blocking.Sandbox("one", vm, store=make_store()) as sandbox:
        [device] = sandbox.devices
        assert device.attach_count == 1
        sandbox.detach(device)
    assert asyncio.run(make_store().sandboxes()) == []
