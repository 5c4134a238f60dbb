"""What a host has plugged in, read from its records: `pyblock.host()`, `pyblock sandboxes`,
`pyblock holders`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.loops import Loops, loop_devices
from support.shell import Shell
from support.snapshot import MakeImage, MakeStore
from support.turns import BEGUN

import pyblock
from pyblock import (
    DetachPending,
    Fault,
    InvalidImage,
    InvalidState,
    MemoryHypervisor,
    Phase,
    Sandbox,
    SandboxBusy,
    SqliteStore,
    UnknownSandbox,
    blocking,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def loops() -> Iterator[Loops]:
    with loop_devices() as loops:
        yield loops


async def test_sandboxes_and_their_devices(
    make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    store, vm, one = make_store(), MemoryHypervisor(), make_image("one")
    host = pyblock.host(store)
    assert await host.sandboxes() == []
    with pytest.raises(UnknownSandbox):
        await host.devices("s1")
    async with Sandbox("s1", vm, store=store) as sandbox:
        first = await sandbox.attach(one, driver="virtio-blk", serial="abc")
        await sandbox.attach(one)
        second = await sandbox.attach(make_image("two"), read_only=True, device_id="second")
        vm.fail("device-gone", Fault("hold"))
        with pytest.raises(DetachPending):
            await sandbox.detach(second, timeout=BEGUN)
        asked, addresses = len(vm.journal), ("", f"process {os.getpid()}")
        # another process's, which has nothing open
        for reader in (host, pyblock.host(make_store())):
            [known] = await reader.sandboxes()
            assert (known.id, known.vm, known.devices) == ("s1", addresses[0], 2)
            assert known.owner.startswith(addresses[1])
            have = await reader.devices("s1")
            assert [device.id for device in have] == [first.id, "second"]
            assert [device.attach_count for device in have] == [2, 1]
            assert [device.phase for device in have] == [Phase.ATTACHED, Phase.DETACH_PENDING]
            assert [device.info.path for device in have] == [first.info.path, second.info.path]
            assert [device.info.read_only for device in have] == [False, True]
            for device, other in zip(have, (first, second), strict=True):
                assert device.sandbox == "s1" and device.drive is not None
                told = (
                    "index",
                    "id",
                    "driver",
                    "predicted_name",
                    "guest_match",
                    "serial",
                    "pci_path",
                    "scsi_addr",
                )
                assert [getattr(device.drive, name) for name in told] == [
                    getattr(other.held, name) for name in told
                ]
        assert len(vm.journal) == asked
        vm.let_go("device-gone")
        await sandbox.settle()
    [known] = await host.sandboxes()
    assert (known.owner, known.devices) == ("", 1)


async def test_who_holds_an_image(
    make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    store, image, read = make_store(), make_image("data"), make_image("base")
    (tmp_path / "link").symlink_to(image)
    async with (
        Sandbox("s1", MemoryHypervisor(), store=store) as one,
        Sandbox("s2", MemoryHypervisor(), store=store) as two,
    ):
        writer = await one.attach(image)
        readers = [await sandbox.attach(read, read_only=True) for sandbox in (one, two)]
        host = pyblock.host(store)
        for path in (image, str(image), tmp_path / "link", os.path.relpath(image)):
            [holder] = await host.holders(path)
            assert (holder.device.sandbox, holder.device.id) == ("s1", writer.id)
            assert (holder.relation, holder.read_only, holder.share) == ("it", False, False)
            assert str(os.getpid()) in holder.owner
        found = await host.holders(read)
        assert [(holder.device.sandbox, holder.device.id) for holder in found] == [
            ("s1", readers[0].id),
            ("s2", readers[1].id),
        ]
        assert all(holder.read_only for holder in found)
        assert await host.holders(make_image("free")) == []
        assert await host.holders(tmp_path / "never was there") == []
        with pytest.raises(InvalidImage):
            await host.holders("")
        await one.detach(writer)
        assert await host.holders(image) == []


async def test_who_holds_an_image_that_is_gone(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    store, image = make_store(), make_image("data")
    async with Sandbox("s1", MemoryHypervisor(), store=store) as sandbox:
        device = await sandbox.attach(image)
        await sandbox.attach(make_image("more"))
        host, kept = pyblock.host(store), image.open("rb")  # so that its inode is nobody else's
        image.unlink()
        assert [holder.device.id for holder in await host.holders(image)] == [device.id]
        image.write_bytes(b"x")  # what is there now is another image, that nobody has
        assert await host.holders(image) == []
        kept.close()


async def test_what_lies_under_an_image_and_on_it(
    loops: Loops, make_store: MakeStore, make_image: MakeImage
) -> None:
    store, file = make_store(), make_image("file")
    loop = loops.loop(file, "--offset", "4096")
    async with Sandbox("s1", MemoryHypervisor(), store=store) as sandbox:
        on_it = await sandbox.attach(loop)
        host = pyblock.host(store)
        assert [(holder.device.id, holder.relation) for holder in await host.holders(file)] == [
            (on_it.id, "on it")
        ]
        await sandbox.detach(on_it)
        under = await sandbox.attach(file)
        assert [(holder.device.id, holder.relation) for holder in await host.holders(loop)] == [
            (under.id, "under it")
        ]


def test_without_an_event_loop(
    make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    store, image = make_store(), make_image("a")
    host = blocking.host(store)
    assert host.sandboxes() == []
    with blocking.Sandbox("s1", MemoryHypervisor(), store=store) as sandbox:
        device = sandbox.attach(image)
        assert [one.id for one in host.sandboxes()] == ["s1"]
        assert [one.id for one in host.devices("s1")] == [device.id]
        assert [one.device.id for one in host.holders(image)] == [device.id]
    with pytest.raises(UnknownSandbox):
        host.devices("s2")
    host.export("s1", tmp_path / "saved.json")
    assert host.forget("s1") == [device.id] and host.sandboxes() == []


async def test_a_sandbox_can_be_exported_and_given_up(
    make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    store, vm = make_store(), MemoryHypervisor()
    host = pyblock.host(store)
    async with Sandbox("s1", vm, store=store) as sandbox:
        device = await sandbox.attach(make_image("a"))
        await sandbox.save(tmp_path / "saved.json")
        await host.export("s1", tmp_path / "exported.json")
        with pytest.raises(SandboxBusy):
            await host.forget("s1")
    assert (tmp_path / "saved.json").read_bytes() == (tmp_path / "exported.json").read_bytes()
    assert await host.forget("s1") == [device.id]
    assert await host.sandboxes() == []


def test_both_doors_have_the_same() -> None:
    names = [
        {name for name in dir(kind) if not name.startswith("_")}
        for kind in (pyblock.Host, blocking.Host)
    ]
    assert names[0] == names[1]


async def test_a_record_that_cannot_be_read_is_said(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    store, image = make_store(), make_image("a")
    async with Sandbox("s1", MemoryHypervisor(), store=store) as sandbox:
        await sandbox.attach(image)
    await store._file.transact(lambda db: db.execute("UPDATE device SET state = x'7b7d7d'"), None)
    host = pyblock.host(store)
    assert [one.devices for one in await host.sandboxes()] == [1]
    for work in (host.devices("s1"), host.holders(image)):
        with pytest.raises(InvalidState, match="s1"):
            await work


# On the command line.


def test_sandboxes_on_the_command_line(shell: Shell, make_image: MakeImage) -> None:
    assert shell.json("sandboxes", vm=None) == []
    done = shell("sandboxes", vm=None)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "",
        "no sandbox has anything plugged in\n",
    )
    shell.fine("attach", make_image("a"), make_image("b"))
    [known] = shell.json("sandboxes", vm=None)
    assert (known["vm"], known["owner"], known["devices"]) == (shell.vm, None, 2)
    assert known["sandbox"] in shell.fine("sandboxes", vm=None)


def test_holders_on_the_command_line(shell: Shell, make_image: MakeImage) -> None:
    image = make_image("a\x1b[2J.img")
    done = shell("holders", image, vm=None)
    assert (done.returncode, done.stdout) == (0, "") and done.stderr.startswith(
        "nobody has claimed "
    )
    assert shell.json("holders", image, vm=None) == []
    [device] = shell.json("attach", image, "--share")
    [holder] = shell.json("holders", image, vm=None)
    assert holder == {
        "sandbox": device["sandbox"], "device_id": device["device_id"], "access": "write",
        "share": True, "relation": "it",
        "phase": "attached", "attach_count": 1, "owner": None, "host_path": str(image),
    }  # fmt: skip
    table = shell.fine("holders", image, vm=None)
    assert (
        device["device_id"] in table
        and "shared" in table
        and r"a\x1b[2J.img" in table
        and "\x1b" not in table
    )
    assert "empty or holds a NUL" in shell.refused("holders", "", vm=None)


def test_a_store_that_cannot_be_used(shell: Shell) -> None:
    store = shell.folder / "state.db"
    shell.folder.mkdir(mode=0o700, exist_ok=True)
    store.write_bytes(b"x" * 4096)
    store.chmod(0o600)
    for arguments in (["sandboxes"], ["holders", "a.img"]):
        assert "state.db" in shell.refused(*arguments, vm=None)


def test_the_hosts_store_is_the_one_that_is_read() -> None:
    assert isinstance(pyblock.host()._store, SqliteStore)
