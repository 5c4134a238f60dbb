"""What is done with a sandbox in a store without a machine: it is exported, or given up."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from support.snapshot import MakeImage, MakeStore
from support.store_scene import rows

from pyblock import InvalidState, MachineAnswers, Sandbox, SandboxBusy, UnknownSandbox, stored
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio


async def test_what_is_exported_is_what_is_saved(
    make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    store, saved, exported = make_store(), tmp_path / "saved", tmp_path / "exported"
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        for driver in ("virtio-scsi", "virtio-blk", "nvdimm"):
            await sandbox.attach(make_image(driver), driver=driver, share=driver == "nvdimm")
        await sandbox.save(saved)
        await stored.export(store, "one", exported)  # whoever has it open
    assert _without_offsets(saved) == _without_offsets(exported)
    with pytest.raises(UnknownSandbox):
        await stored.export(store, "two", exported)


def _without_offsets(path: Path) -> Any:
    state = json.loads(path.read_bytes())
    del state["Pyblock"]["Offsets"]  # they are asked for anew
    return state


async def test_a_machine_in_memory_is_given_up_when_its_process_has_let_go(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    store, image = make_store(), make_image("a")
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        device = await sandbox.attach(image)
        before = rows(store.path)
        with pytest.raises(SandboxBusy):
            await stored.forget(store, "one")
        assert rows(store.path) == before
    assert await stored.forget(store, "one") == [device.id]
    assert not rows(store.path)["device"] and not rows(store.path)["sandbox"]
    with pytest.raises(UnknownSandbox):
        await stored.forget(store, "one")


async def test_a_machine_that_answers_is_not_given_up(
    make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    store, path = make_store(), tmp_path / "qmp.sock"
    await store.open_sandbox("one", f"qemu:{path}")
    await store.close_sandbox("one")
    with socket.socket(socket.AF_UNIX) as listening:
        await store.open_sandbox("one", f"qemu:{path}")
        await store.write("one", list, own=b'{"taken":[7]}')
        await store.close_sandbox("one")
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(MachineAnswers, match="still answers"):
            await stored.forget(store, "one")
        assert rows(store.path)["sandbox"][0][3] is None  # nobody has it open
        assert (await store.read("one")).record().taken == [7]
    assert await stored.forget(store, "one") == []  # nobody listens there
    assert await store.sandboxes() == []


async def test_what_cannot_be_read_can_be_given_up(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    store = make_store()
    async with Sandbox("one", MemoryHypervisor(), store=store) as sandbox:
        device = await sandbox.attach(make_image("a"))
    assert store._file._db is not None
    store._file._db.execute("UPDATE device SET state = x'00'")
    with pytest.raises(InvalidState):
        await Sandbox("one", MemoryHypervisor(), store=store).__aenter__()
    assert await stored.forget(store, "one") == [device.id]
    async with Sandbox("two", MemoryHypervisor(), store=store) as other:
        await other.attach(device.info.path)
