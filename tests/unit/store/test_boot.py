"""An earlier boot's rows go when the host was certainly started anew, and nobody else has the store
open; in doubt they stay."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.snapshot import MakeImage, MakeStore
from support.store_scene import Scene, as_written, facts, first_version, make_scene, rows

from pyblock import InvalidState, NewerState, Sandbox
from pyblock.store.sqlite import boot
from pyblock.store.sqlite import file as sqlite_file
from pyblock.store.sqlite.boot import Boot
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio

BOOT_ID = "/proc/sys/kernel/random/boot_id"
THIEF = """
import asyncio, sys
from pyblock import ImageInUse, Sandbox
from pyblock.vmm.memory.machine import MemoryHypervisor
from pyblock.store.sqlite.store import SqliteStore

async def steal(path, image):
    store = SqliteStore(path)
    async with Sandbox("thief", MemoryHypervisor(), store=store) as sandbox:
        try:
            await sandbox.attach(image)
        except ImageInUse as error:
            print("refused:", error)
        else:
            print("has it")
        print(await store.sandboxes())
    store.close()

asyncio.run(steal(*sys.argv[1:]))
"""


def in_a_container(boot_id: Path, *arguments: object) -> str:
    """What the thief says, in a mount namespace where something else stands in the place of the
    kernel's boot_id."""
    mount = f'mount --bind "{boot_id}" {BOOT_ID} && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    done = subprocess.run(
        [*command, sys.executable, "-c", THIEF, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("lives", [True, False], ids=["its owner lives", "its owner died"])
@pytest.mark.parametrize("what", ["a file", "another of procfs"])
async def test_a_container_with_a_boot_id_of_its_own(
    what: str, lives: bool, make_store: MakeStore, make_image: MakeImage, tmp_path: Path
) -> None:
    boot_id = Path("/proc/sys/kernel/random/uuid")  # another at each look
    if what == "a file":
        boot_id = tmp_path / "boot_id"
        boot_id.write_text("12345678-1234-1234-1234-123456789abc\n")
    store = make_store()
    scene = await make_scene(store, make_image)
    known = facts(scene.sandbox)
    if not lives:
        store.close()
    said = in_a_container(boot_id, store.path, scene.once.info.path)
    assert (
        said.startswith("refused: ")
        and "'victim'" in said
        and said.endswith("['thief', 'victim']\n")
    )
    assert in_a_container(boot_id, store.path, scene.twice.info.path).startswith("refused: ")
    kept = await as_written(make_store(), "victim")
    assert facts(kept) == known
    if lives:
        await scene.sandbox.detach(scene.once)  # it is its owner's still
        await scene.sandbox.close()


FIRST, SECOND = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"
THEN = 1_700_000_000.0
# What is noted, what is seen, and whether the rows go.
SEEN: dict[str, tuple[Boot, Boot, bool]] = {
    "the same": (Boot(FIRST, THEN), Boot(FIRST, THEN), False),
    "started anew": (Boot(FIRST, THEN), Boot(SECOND, THEN + 60), True),
    "started anew, with an earlier date": (Boot(FIRST, THEN), Boot(SECOND, THEN - 60), True),
    "the date was set": (Boot(FIRST, THEN), Boot(FIRST, THEN + 86400), False),
    "another ID, and the same start": (Boot(FIRST, THEN), Boot(SECOND, THEN + 1), False),
    "no ID of its own": (Boot(FIRST, THEN), Boot("", THEN + 60), False),
    "no ID noted": (Boot("", THEN), Boot(SECOND, THEN + 60), False),
    "no start of its own": (Boot(FIRST, THEN), Boot(SECOND, None), False),
    "no start noted": (Boot(FIRST, None), Boot(SECOND, THEN), False),
    "nothing noted": (Boot("", None), Boot(SECOND, THEN), False),
}


def seen(monkeypatch: pytest.MonkeyPatch, what: Boot) -> None:
    monkeypatch.setattr(boot, "this_boot", lambda: what)


async def made_in(
    what: Boot, store: SqliteStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> Scene:
    seen(monkeypatch, what)
    scene = await make_scene(store, make_image)
    store.close()
    return scene


@pytest.mark.parametrize("name", SEEN)
async def test_what_is_seen_at_the_next_opening(
    name: str, make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted, now, goes = SEEN[name]
    store = make_store()
    scene = await made_in(noted, store, make_image, monkeypatch)
    seen(monkeypatch, now)
    assert await store.sandboxes() == ([] if goes else ["victim"])
    if goes:
        async with Sandbox("victim", MemoryHypervisor(), store=store) as sandbox:
            assert not sandbox.devices
            async with Sandbox("other", MemoryHypervisor(), store=store) as other:
                # the claims went with them
                await other.attach_many([scene.once.info.path, scene.twice.info.path])
    else:
        assert facts(await as_written(store, "victim")) == facts(scene.sandbox)


async def test_what_this_boot_wrote_never_goes_in_it(
    make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that cannot tell the boot was here first since the host was started anew, and its
    machine runs on."""
    store = make_store()
    seen(monkeypatch, Boot(FIRST, THEN))
    await store.sandboxes()
    store.close()
    await made_in(Boot("", THEN + 60), store, make_image, monkeypatch)
    seen(monkeypatch, Boot(SECOND, THEN + 60))
    assert await store.sandboxes() == ["victim"]


async def test_nothing_goes_while_somebody_has_it_open(
    make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = make_store(), make_store()
    seen(monkeypatch, Boot(FIRST, THEN))
    scene = await make_scene(ours, make_image)
    seen(monkeypatch, Boot(SECOND, THEN + 60))
    assert await theirs.sandboxes() == ["victim"]
    await scene.sandbox.detach(scene.once)
    await scene.sandbox.close()


async def test_a_store_damaged_by_a_crash_of_the_host(
    make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    scene = await made_in(Boot(FIRST, THEN), store, make_image, monkeypatch)
    with store.path.open("r+b") as file:
        file.seek(5 * 4096)
        file.write(bytes(3 * 4096))
    damaged = store.path.read_bytes()
    for now in (Boot(FIRST, THEN), Boot("", THEN + 60)):
        seen(monkeypatch, now)
        with pytest.raises(InvalidState, match="damaged"):
            await store.sandboxes()
        assert store.path.read_bytes() == damaged
    seen(monkeypatch, Boot(SECOND, THEN + 60))
    assert await store.sandboxes() == []
    assert store.path.with_name(f"state.db.damaged-{FIRST}").read_bytes() == damaged
    async with Sandbox("victim", MemoryHypervisor(), store=store) as sandbox:
        await sandbox.attach(scene.once.info.path)


async def test_a_newer_store_of_an_earlier_boot_is_left_as_it_is(
    make_store: MakeStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    await made_in(Boot(FIRST, THEN), store, make_image, monkeypatch)
    with closing(sqlite3.connect(store.path)) as db:
        db.execute(f"PRAGMA user_version = {len(sqlite_file.MIGRATIONS) + 1}")
    before = rows(store.path)
    seen(monkeypatch, Boot(SECOND, THEN + 60))
    with pytest.raises(NewerState):
        await store.sandboxes()
    assert rows(store.path) == before


async def test_a_store_of_the_first_version_is_taken_up(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    """It had the boot_id in a table, and believed it: here one that a container may have
    written."""
    store = make_store()
    scene = await make_scene(store, make_image)
    known = facts(scene.sandbox)
    await scene.sandbox.close()
    store.close()
    before = rows(store.path)["device"]
    old = store.path.with_name("old.db")
    first_version(store.path, old, FIRST)
    old.replace(store.path)
    os.truncate(store.path.with_name("state.db-owners"), 0)
    async with Sandbox("victim", scene.vm, store=store) as again:
        assert facts(again) == known and not again.recovered
    store.close()
    assert rows(store.path)["device"] == before


def test_the_boot_as_text() -> None:
    for one in (
        Boot(FIRST, THEN),
        Boot("", THEN + 0.125),
        Boot(SECOND, None),
        Boot("", None),
        boot.this_boot(),
    ):
        again = boot.decode(boot.encode(one))
        assert again.id == one.id and again.says_as_much_as(one)
    for text in (
        b"",
        b"\n",
        b"boot\n",
        b"boot - -",
        b"boot x -\n",
        b"\xff" * 200,
        boot.encode(Boot(FIRST, THEN))[:-2],
        bytes(200),
    ):
        assert boot.decode(text) == Boot("", None)
