"""A state that cannot be used has its own error; the sandbox stays as it was, and the file too,
even when something is saved onto it."""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support import samples
from support.snapshot import Busy, MakeImage, snapshot

from pyblock import InvalidState, NewerState, Sandbox, StateError, StoreError
from pyblock.kata.schema import VERSION, encode
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio

KATA = samples.sandbox([samples.SCSI[0], samples.SCSI[1], samples.VFIO], [0, 1])


@pytest.fixture
async def empty() -> AsyncIterator[Sandbox]:
    async with Sandbox("s2", MemoryHypervisor()) as sandbox:
        yield sandbox


@pytest.fixture
async def own(busy: Busy) -> Any:
    """What pyblock writes of two attached disks: "scsi" at index 0, "blk" at index 1."""
    return json.loads(encode(busy.sandbox.state()))


async def is_refused(sandbox: Sandbox, path: Path, kind: type[StateError]) -> str:
    """The message of the refusal to load, which changed neither sandbox nor file."""
    text = path.read_bytes()
    before = snapshot(sandbox), encode(sandbox.state())
    with pytest.raises(kind) as caught:
        await sandbox.load(path)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value)
    assert (snapshot(sandbox), encode(sandbox.state())) == before
    assert path.read_bytes() == text
    return str(caught.value)


async def is_not_overwritten(sandbox: Sandbox, path: Path, kind: type[StateError]) -> None:
    text, names = path.read_bytes(), os.listdir(path.parent)  # noqa: PTH208
    with pytest.raises(kind, match="left as it is"):
        await sandbox.save(path)
    assert path.read_bytes() == text
    assert os.listdir(path.parent) == names  # noqa: PTH208


async def test_cut_off_at_every_byte(
    busy: Busy, empty: Sandbox, own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    # six thousand threads' turns prove nothing here
    monkeypatch.setattr(asyncio, "to_thread", at_once)
    path = tmp_path / "state"
    for whole in (json.dumps(own).encode(), samples.text(KATA)):
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            await is_refused(empty, path, InvalidState)
            if length:  # an empty file says nothing that could be lost
                await is_not_overwritten(busy.sandbox, path, InvalidState)


NOT_STATES = {
    "text": b"hello",
    "two": b"{} {}",
    "number": b"5",
    "null": b"null",
    "list": b"[]",
    "NUL": b"\0" * 100,
    "not UTF-8": b'{"Devices": "\xff\xfe"}',
    "image": b"\xeb\x63\x90" + b"\0" * 4000,
    "qcow2": b"QFI\xfb" + b"\0" * 500,
    "deep": b"[" * 100_000,
    "deep inside": b'{"x": ' + b"[" * 100_000,
    "byte order mark": b"\xef\xbb\xbf{}",
    "comment": b"{} // state",
    "NaN": b'{"x": NaN}',
}


@pytest.mark.parametrize("name", NOT_STATES)
async def test_what_is_no_json_object(
    busy: Busy, empty: Sandbox, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "state"
    path.write_bytes(NOT_STATES[name])
    await is_refused(empty, path, InvalidState)
    await is_not_overwritten(busy.sandbox, path, InvalidState)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value that pyblock has a type for."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += [(*path, key), *places(inner, (*path, key))]
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            found += [(*path, number), *places(inner, (*path, number))]
    return found


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    state = copy.deepcopy(state)
    at = state
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return state


def wrong_for(value: Any, path: tuple[Any, ...]) -> list[Any]:
    """Values of other types than this one's."""
    values = ["text", 5, 1.5, True, [1], {"a": 1}]
    if path[-1] == "PCIPath":
        return [5, True, [1]]  # versions of the original wrote both a text and an object
    if path[-1] == "Identity":
        return ["text", 5, {"a": 1}, [1], ["file", "1", 2], ["file", 1]]
    if path[-1] in (
        "DriverOptions",
        "BlockIndexMap",
        "BlockDrive",
        "Devices",
        "Pyblock",
        "Offsets",
    ) or isinstance(value, dict):
        return [one for one in values if not isinstance(one, type(value))]
    # bool is an int for Python, not for JSON
    return [one for one in values if type(one) is not type(value)]


async def test_wrong_type_for_every_key(
    busy: Busy, empty: Sandbox, own: Any, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    tried = 0
    for where in places(own):
        value = own
        for key in where:
            value = value[key]
        for wrong in wrong_for(value, where):
            path.write_bytes(samples.text(changed(own, where, wrong)))
            try:
                await is_refused(empty, path, InvalidState)
            except pytest.fail.Exception as error:
                pytest.fail(f"{where} = {wrong!r} instead of {value!r}: {error}")
            await is_not_overwritten(busy.sandbox, path, InvalidState)
            tried += 1
    assert tried > 200


@pytest.mark.parametrize("version", [VERSION + 1, 10**6, 2**62])
async def test_newer_version(
    busy: Busy, empty: Sandbox, own: Any, tmp_path: Path, version: int
) -> None:
    path = tmp_path / "state"
    own["Pyblock"]["Version"] = version
    for state in (
        own,
        {"Pyblock": {"Version": version}},
        {"Devices": {"in": "another shape"}, "Pyblock": {"Version": version, "New": 1}},
    ):
        path.write_bytes(samples.text(state))
        assert str(version) in await is_refused(empty, path, NewerState)
        await is_not_overwritten(busy.sandbox, path, NewerState)


# of the state, its first device (scsi) and its second (blk)
Change = Callable[[Any, Any, Any], object]

CONTRADICTIONS: dict[str, tuple[Change, str]] = {
    "two drives, one index": (lambda s, a, b: b["BlockDrive"].update(Index=0), "index 0"),
    "two devices, one ID": (lambda s, a, b: b.update(ID="scsi"), "'scsi'"),
    "two drives, one ID": (lambda s, a, b: b["BlockDrive"].update(ID="drive-scsi"), "two drives"),
    "attached without drive": (lambda s, a, b: a.pop("BlockDrive"), "no BlockDrive"),
    "attached with drive null": (lambda s, a, b: a.update(BlockDrive=None), "no BlockDrive"),
    "attached, count 0": (lambda s, a, b: a.update(AttachCount=0), "AttachCount 0"),
    "detached, count 1": (lambda s, a, b: a["Pyblock"].update(Phase="detached"), "AttachCount 1"),
    "attach-pending, count 1": (
        lambda s, a, b: a["Pyblock"].update(Phase="attach-pending"),
        "AttachCount 1",
    ),
    "SCSIAddr of another index": (lambda s, a, b: a["BlockDrive"].update(SCSIAddr="0:1"), "'0:1'"),
    "SCSIAddr malformed": (lambda s, a, b: a["BlockDrive"].update(SCSIAddr="x"), "'x'"),
    "negative AttachCount": (lambda s, a, b: a.update(AttachCount=-1), "-1"),
    "negative RefCount": (lambda s, a, b: a.update(RefCount=-1), "-1"),
    "negative index": (lambda s, a, b: b["BlockDrive"].update(Index=-1), "-1"),
    "negative scsi index": (lambda s, a, b: a["BlockDrive"].update(Index=-1), "-1"),
    "index beyond capacity": (lambda s, a, b: b["BlockDrive"].update(Index=65536), "65536"),
    "index beyond 63 bits": (lambda s, a, b: b["BlockDrive"].update(Index=2**63), str(2**63)),
    "map: beyond capacity": (
        lambda s, a, b: s["HypervisorState"]["BlockIndexMap"].update({"65536": {}}),
        "65536",
    ),
    "map: negative": (
        lambda s, a, b: s["HypervisorState"]["BlockIndexMap"].update({"-1": {}}),
        "-1",
    ),
    "map: not a number": (
        lambda s, a, b: s["HypervisorState"]["BlockIndexMap"].update({"x": {}}),
        "'x'",
    ),
    "map: empty": (lambda s, a, b: s["HypervisorState"]["BlockIndexMap"].update({"": {}}), "''"),
    "map: other digits": (
        lambda s, a, b: s["HypervisorState"]["BlockIndexMap"].update({"\u0663": {}}),
        "BlockIndexMap",
    ),
    "map: very long": (
        lambda s, a, b: s["HypervisorState"]["BlockIndexMap"].update({"9" * 5000: {}}),
        "9999",
    ),
    "phase unknown": (lambda s, a, b: a["Pyblock"].update(Phase="flying"), "'flying'"),
    "phase not for saving": (lambda s, a, b: a["Pyblock"].update(Phase="attaching"), "'attaching'"),
    "driver unknown": (lambda s, a, b: a["Pyblock"].update(Driver="virtio-ide"), "'virtio-ide'"),
    "two drives, one ordinal": (
        lambda s, a, b: b.update(
            a
            | {
                "ID": "b",
                "BlockDrive": a["BlockDrive"] | {"ID": "b", "Index": 1, "SCSIAddr": "0:1"},
            }
        ),
        "0",
    ),
    "ordinal beyond capacity": (
        lambda s, a, b: a["BlockDrive"]["Pyblock"].update(Ordinal=65536),
        "65536",
    ),
    "negative offset": (lambda s, a, b: b["BlockDrive"]["Pyblock"].update(Offset=-1), "-1"),
    "negative offset of a family": (lambda s, a, b: s["Pyblock"]["Offsets"].update(vd=-1), "-1"),
    "drive without ID": (lambda s, a, b: a["BlockDrive"].update(ID=""), "no ID"),
    "device without ID": (lambda s, a, b: a.update(ID=""), "''"),
    "device ID malformed": (lambda s, a, b: a.update(ID="a b"), "'a b'"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
async def test_contradictions(empty: Sandbox, own: Any, tmp_path: Path, name: str) -> None:
    change, text = CONTRADICTIONS[name]
    change(own, *own["Devices"])
    path = tmp_path / "state"
    path.write_bytes(samples.text(own))
    assert text in await is_refused(empty, path, InvalidState)


async def test_contradiction_in_what_the_original_wrote(empty: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "state"
    for change in ({"Index": 1}, {"SCSIAddr": "1:0"}, {"ID": ""}):
        state = copy.deepcopy(KATA)
        state["Devices"][0]["BlockDrive"].update(change)
        path.write_bytes(samples.text(state))
        await is_refused(empty, path, InvalidState)


async def test_index_beyond_a_smaller_capacity(own: Any, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(samples.text(own))
    async with Sandbox("s2", MemoryHypervisor(), capacity=1) as small:
        await is_refused(small, path, InvalidState)


async def test_places_that_hold_no_state(
    busy: Busy, empty: Sandbox, make_image: MakeImage, tmp_path: Path
) -> None:
    for path in (tmp_path / "absent", tmp_path, tmp_path / "scsi.img" / "under"):
        with pytest.raises(InvalidState) as caught:
            await empty.load(path)
        assert str(path) in str(caught.value)
    image = make_image("disk")
    for path in (image, Path(busy.scsi.info.path)):
        await is_refused(empty, path, InvalidState)
        await is_not_overwritten(busy.sandbox, path, InvalidState)
    with pytest.raises(InvalidState):
        await busy.sandbox.save(tmp_path)
    with pytest.raises(StoreError, match="absent"):
        await busy.sandbox.save(tmp_path / "absent" / "state")


async def test_a_fifo_is_no_state_and_nobody_waits_for_it(
    busy: Busy, empty: Sandbox, tmp_path: Path
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(InvalidState, match="fifo"):
        await empty.load(path)
    with pytest.raises(InvalidState, match="fifo"):
        await busy.sandbox.save(path)
    assert path.is_fifo()


async def test_a_failed_load_does_not_hinder_the_next(
    empty: Sandbox, own: Any, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    bad = copy.deepcopy(own)
    bad["Devices"][1]["BlockDrive"]["Index"] = 0
    path.write_bytes(samples.text(bad))
    await is_refused(empty, path, InvalidState)
    path.write_bytes(samples.text(own))
    await empty.load(path)
    assert list(empty.index) == [0, 1]
    assert [device.id for device in empty.devices] == ["scsi", "blk"]
