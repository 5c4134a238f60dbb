"""The records of a store: what is written and how much, what is refused, and rows of older
versions."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from support import samples
from support.released_rows import DEVICES, EXPORTS, SANDBOXES
from support.snapshot import MakeImage, MakeStore, plug_in
from support.store_scene import older_store, rows

from pyblock import (
    DRIVERS,
    BlockDevice,
    DeviceInfo,
    InvalidState,
    NewerState,
    Sandbox,
    make_name_id,
    stored,
)
from pyblock.disk.drivers import VIRTIO_SCSI
from pyblock.kata import translate as persist
from pyblock.kata.schema import VERSION, decode_device, encode_device
from pyblock.kata.schema import decode as decode_file
from pyblock.kata.schema import encode as encode_file
from pyblock.kata.translate import device_from_state, device_to_state, sandbox_from_state
from pyblock.life.recorded import record_of
from pyblock.store import record
from pyblock.store.record import (
    FORM,
    Record,
    SandboxRecord,
    decode,
    decode_sandbox,
    drive_id_of,
    encode,
    encode_sandbox,
)
from pyblock.store.sqlite import old_rows
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio

PLAIN = Record(
    id="0123456789abcdef",
    path="/var/lib/runtime/sandboxes/0123456789abcdef/disks/data-0001.img",
    driver="virtio-blk",
    serial="0123456789abcdef",
    identity=("file", 65024, 9980115),
    drive_id="drive-0123456789abcdef",
    index=17,
    ordinal=16,
    place="16",
    pci_path="02/10",
    guest_match="0000:00:02.0/0000:01:10.0",
)


# What is written.


def test_a_plain_disk_is_a_short_row() -> None:
    text = encode(PLAIN)
    assert len(text) <= 260
    assert json.loads(text).keys() == {
        "path", "driver", "identity", "index", "ordinal", "place", "pci_path", "guest_match",
    }  # fmt: skip
    assert decode(PLAIN.id, text, where="here") == PLAIN


async def test_the_rows_of_a_store_are_short(make_store: MakeStore, make_image: MakeImage) -> None:
    """Their length without the path, which is as long as its user likes."""
    store, images = make_store(), [make_image(f"image{number}") for number in range(20)]
    async with Sandbox("s1", MemoryHypervisor(), store=store, driver="virtio-blk") as sandbox:
        for image in images:
            await sandbox.attach(image)
        found = rows(store.path)["device"]
    assert len(found) == len(images)
    assert max(
        len(row[3]) - len(str(image)) for row, image in zip(found, images, strict=True)
    ) <= 260 - len(PLAIN.path)


def test_what_follows_is_not_written() -> None:
    assert json.loads(
        encode(Record(id="x", driver="nvdimm", serial=None, index=0, ordinal=0, drive_id="drive-x"))
    ) == {
        "driver": "nvdimm",
        "serial": None,
        "index": 0,
    }
    assert encode_sandbox(SandboxRecord(offsets={"vd": 1})) == b""


TEXT = st.characters(codec="utf-8")
TEXTS = st.none() | st.text(TEXT, max_size=20)


@given(
    st.builds(
        Record,
        id=st.sampled_from(["a", "0123456789abcdef", "x" * 200]),
        path=st.text(TEXT, max_size=30),
        driver=st.sampled_from([*DRIVERS]),
        read_only=st.booleans(),
        share=st.booleans(),
        serial=st.sampled_from([None, "a", "0123456789abcdef", "other"]),
        format=st.sampled_from([None, "raw"]),
        options=st.dictionaries(st.sampled_from(["fstype", "x"]), st.text(TEXT, max_size=9)),
        dev_type=st.sampled_from(["", "b"]),
        major=st.integers(-1, 300),
        minor=st.integers(-1, 300),
        identity=st.none()
        | st.tuples(
            st.sampled_from(["file", "block"]), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)
        ),
        phase=st.sampled_from(["attached", "detach-pending"]),
        attach_count=st.integers(1, 2**64 - 1),
        users=st.none() | st.integers(0, 2**64 - 1),
        drive_id=st.sampled_from(["drive-a", "drive-0123456789abcdef", "other"]),
        index=st.integers(0, 2**20 - 1),
        ordinal=st.integers(0, 2**20 - 1),
        offset=st.integers(0, 9),
        place=TEXTS,
        pci_path=TEXTS,
        dev_no=TEXTS,
        guest_match=TEXTS,
        known_name=TEXTS,
        imported=st.booleans(),
        unverified=st.booleans(),
        crowded=st.booleans(),
        kata=st.sampled_from([b"", b'{"ID":"a","\xc3\xa9":[1,{"b":null}]}']).map(Raw),
    )
)
def test_a_record_comes_back(one: Record) -> None:
    text = encode(one)
    again = decode(one.id, text, where="here")
    assert again == one and bytes(again.kata) == bytes(one.kata)
    assert drive_id_of(one.id, text) == one.drive_id


# What is refused.

DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"\x00\xff",
    "half": encode(PLAIN)[:60],
    "no object": b"[1]",
    "empty": b"{}",
    "another kind of value": b'{"driver":"virtio-blk","index":"0"}',
    "unknown key": b'{"driver":"virtio-blk","index":0,"of-nobody":1}',
    "unknown driver": b'{"driver":"floppy","index":0}',
    "unknown phase": b'{"driver":"virtio-blk","index":0,"phase":"attaching"}',
    "negative index": b'{"driver":"virtio-blk","index":-2}',
    "index past the last": b'{"driver":"virtio-blk","index":1048576}',
    "ordinal past the last": b'{"driver":"virtio-blk","index":0,"ordinal":1048576}',
    "negative offset": b'{"driver":"virtio-blk","index":0,"offset":-1}',
    "negative count": b'{"driver":"virtio-blk","index":0,"attach_count":-1}',
    (
        "a count of too many bits"
    ): b'{"driver":"virtio-blk","index":0,"attach_count":18446744073709551616}',
    "attached to nobody": b'{"driver":"virtio-blk","index":0,"attach_count":0}',
    (
        "detached with a drive"
    ): b'{"driver":"virtio-blk","index":0,"attach_count":0,"phase":"detached"}',
    "attached without a drive": b'{"driver":"virtio-blk"}',
    "no kind of image": b'{"driver":"virtio-blk","index":0,"identity":["socket",1,2]}',
    "deep": b'{"kata":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "of an older version": b'{"ID":"x","Type":"block","BlockDrive":{"ID":"drive-x","Index":0}}',
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_record_is_refused(what: str) -> None:
    with pytest.raises(InvalidState, match=r"somewhere: device 'x'.*left as it is"):
        decode("x", DAMAGED[what], where="somewhere")
    assert isinstance(drive_id_of("x", DAMAGED[what]), str)


def test_an_id_that_is_none_is_refused() -> None:
    for device_id in ("", "a b", "x" * 256):
        with pytest.raises(InvalidState):
            decode(device_id, encode(PLAIN), where="somewhere")


def test_a_newer_form_is_refused() -> None:
    text = json.dumps(
        {"form": FORM + 1, "driver": "virtio-blk", "index": 0, "new": {"x": 1}, "drive_id": "d"}
    ).encode()
    with pytest.raises(NewerState, match=f"form {FORM + 1}, this one reads up to {FORM}"):
        decode("x", text, where="somewhere")
    with pytest.raises(NewerState, match="somewhere"):
        decode_sandbox(b'{"form":%d,"new":1}' % (FORM + 1), where="somewhere")
    assert drive_id_of("x", text) == "d"  # which is then nobody's orphan


def test_an_option_is_in_two_places() -> None:
    """What is asked for is written by the same names, so nothing between the two names an
    option."""
    asked = {field.name: field.default for field in msgspec.structs.fields(DeviceInfo)}
    written = {field.name: field.default for field in msgspec.structs.fields(Record)}
    assert asked.keys() <= written.keys()
    own = {"id", "driver", "serial"}  # of which a device always has one
    assert {name for name in asked if written[name] != asked[name]} == own
    info = DeviceInfo(
        "/a", "virtio-blk", True, "s", "d", "b", 8, 1, {"fstype": "ext4"}, True, "raw"
    )
    record = record_of(BlockDevice("d", info))
    assert record.info() == info


def test_what_a_newer_version_writes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "FORM", FORM + 1)
    written = encode(PLAIN), encode_sandbox(SandboxRecord(taken=[1]))
    monkeypatch.undo()
    with pytest.raises(NewerState):
        decode(PLAIN.id, written[0], where="somewhere")
    with pytest.raises(NewerState):
        decode_sandbox(written[1], where="somewhere")


def test_what_is_asked_for_stands_first() -> None:
    """It is handed over as it is, by position."""
    assert (
        Record.__struct_fields__[: len(DeviceInfo.__struct_fields__)]
        == DeviceInfo.__struct_fields__
    )


def test_every_field_is_told_once() -> None:
    """Who adds a field raises FORM: an older reader is to refuse what has it, and not to lose
    it."""
    assert (FORM, len(Record.__struct_fields__)) == (1, 30)


def test_a_field_without_a_key_travels_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a saved file, whose version then says so; which file a pyblock without that field
    refuses."""
    monkeypatch.setattr(persist, "_MORE", {"unverified": False})
    text = encode_file(
        persist.sandbox_to_state(
            "s1", SandboxRecord(), [msgspec.structs.replace(PLAIN, unverified=True)]
        )
    )
    saved = json.loads(text)
    assert saved["Pyblock"]["Version"] == VERSION and saved["Devices"][0]["Pyblock"]["More"] == {
        "unverified": True
    }
    del saved["Devices"][0]["BlockDrive"]["Pyblock"]["Unverified"]
    _, [again] = sandbox_from_state(
        decode_file(json.dumps(saved).encode(), where="a file"), VIRTIO_SCSI, where="a file"
    )
    assert again.unverified
    saved["Devices"][0]["Pyblock"]["More"] = {"unverified": 7}
    with pytest.raises(InvalidState, match="a file: device"):
        sandbox_from_state(
            decode_file(json.dumps(saved).encode(), where="a file"), VIRTIO_SCSI, where="a file"
        )
    monkeypatch.undo()
    with pytest.raises(NewerState, match=r"a file: device.*'unverified'"):
        sandbox_from_state(decode_file(text, where="a file"), VIRTIO_SCSI, where="a file")


async def test_a_row_that_cannot_be_read_stays_and_hinders_no_other_sandbox(
    make_store: MakeStore, make_image: MakeImage
) -> None:
    store, images = make_store(), [make_image(name) for name in "ab"]
    for number in range(2):
        async with Sandbox(f"s{number}", MemoryHypervisor(), store=store) as sandbox:
            await sandbox.attach(images[number])
    assert store._file._db is not None
    for text, error in ((b'{"driver":1}', InvalidState), (b'{"form":7}', NewerState)):
        store._file._db.execute("UPDATE device SET state = ? WHERE sandbox = 's0'", (text,))
        before = rows(store.path)
        with pytest.raises(error, match="'s0'"):
            await Sandbox("s0", MemoryHypervisor(), store=store).__aenter__()
        assert rows(store.path)["device"] == before["device"]
        async with Sandbox("s1", MemoryHypervisor(), store=store, recover=False) as sandbox:
            assert len(sandbox.devices) == 1


# Rows of older versions.


def without_pyblock(text: bytes) -> Any:
    return samples.without_pyblock(json.loads(text))


@pytest.mark.parametrize("version", [1, 2, 3, 4])
async def test_an_older_store_is_taken_up_unchanged(
    version: int, make_store: MakeStore, tmp_path: Path
) -> None:
    """What is exported of it is what was exported before."""
    store, path = make_store(), tmp_path / "state.json"
    older_store(store.path, version, DEVICES, SANDBOXES)
    for name in DEVICES:
        for _ in range(2):
            await stored.export(store, name, path)
            assert json.loads(path.read_bytes()) == json.loads(EXPORTS[name])
            async with Sandbox(name, MemoryHypervisor(), store=store, recover=False) as sandbox:
                await sandbox.save(path)
            assert json.loads(path.read_bytes()) == json.loads(EXPORTS[name])
    found = rows(store.path)
    assert [row[2] for row in found["device"]] == [
        device_id for each in DEVICES.values() for device_id, *_ in each
    ]
    assert not any(b'"BlockDrive"' in row[3] for row in found["device"] if row[1] == "own")


@pytest.mark.parametrize("name", DEVICES)
def test_an_old_row_means_what_a_file_does(name: str) -> None:
    for device_id, row, image, _ in DEVICES[name]:
        old = old_rows.record_of(device_id, row, image)
        told = device_from_state(decode_device(row, where="a row"), VIRTIO_SCSI, where="a row")
        assert told is not None
        assert json.loads(bytes(old.kata) or b"0") == json.loads(bytes(told.kata) or b"0")
        old.kata = told.kata
        assert old == told
        assert decode(device_id, encode(old), where="a row") == old
        assert msgspec.to_builtins(device_to_state(old)) == msgspec.to_builtins(
            device_to_state(told)
        )


def test_a_sandboxes_own_row_means_what_a_file_does() -> None:
    held = {json.loads(row)["BlockDrive"]["Index"] for _, row, image, _ in DEVICES["kata"] if image}
    told, _ = sandbox_from_state(
        decode_file(EXPORTS["kata"], where="a file"), VIRTIO_SCSI, where="a file"
    )
    old = old_rows.sandbox_record_of(SANDBOXES["kata"], held)
    assert (old.offsets, old.taken) == (told.offsets, told.taken) == ({}, [9])
    assert without_pyblock(bytes(old.kata)) == without_pyblock(bytes(told.kata))


OLD_DAMAGE: dict[str, bytes] = {
    "cut off": DEVICES["own"][0][1][:100],
    "no JSON": b"\xff\x00",
    "no object": b"[]",
    "an empty one": b"{}",
    "another's": DEVICES["own"][1][1],
    "unknown phase": DEVICES["own"][0][1].replace(b'"attached"', b'"arriving"'),
    "unknown driver": DEVICES["own"][0][1].replace(b'"virtio-scsi"', b'"floppy"'),
    "numbers for texts": DEVICES["own"][0][1].replace(b'"DevNo": ""', b'"DevNo": 7'),
    "no drive": DEVICES["own"][0][1].replace(b'"BlockDrive"', b'"Other"'),
    "an index past the last": DEVICES["own"][0][1].replace(b'"Index": 0', b'"Index": 9999999'),
    "a negative index": DEVICES["own"][0][1].replace(b'"Index": 0', b'"Index": -1'),
}


@pytest.mark.parametrize("what", OLD_DAMAGE)
async def test_a_damaged_old_row_stays_as_it_is(what: str, make_store: MakeStore) -> None:
    """It is reported, and no other sandbox's rows suffer from it."""
    store, bad = make_store(), OLD_DAMAGE[what]
    device_id, good, *claim = DEVICES["own"][0]
    assert bad != good
    others = DEVICES["own"][1:]
    older_store(
        store.path,
        4,
        {"bad": [(device_id, bad, *claim)], "own": others, "worse": []},
        {"worse": b"{nothing"},
    )
    for name in ("bad", "worse"):
        with pytest.raises(InvalidState, match=f"'{name}'"):
            await Sandbox(name, MemoryHypervisor(), store=store).__aenter__()
    async with Sandbox("own", MemoryHypervisor(), store=store, recover=False) as sandbox:
        assert len(sandbox.devices) == len(others)
    with closing(sqlite3.connect(store.path)) as db:
        assert db.execute(
            "SELECT state, image, access FROM device WHERE sandbox = 'bad'"
        ).fetchall() == [(bad, *claim)]
        assert db.execute("SELECT state FROM sandbox WHERE id = 'worse'").fetchall() == [
            (b"{nothing",)
        ]
    if b'"ID": "drive-virtio-scsi"' in bad and what not in ("cut off", "no drive"):
        async with Sandbox("own", MemoryHypervisor(), store=store, recover=False):
            # so that nobody takes it for an orphan
            assert "drive-virtio-scsi" in await store.drives_of_others("own", "")


async def test_what_was_imported_goes_on_from_old_rows(make_store: MakeStore) -> None:
    store, vm = make_store(), MemoryHypervisor()
    older_store(store.path, 4, DEVICES, SANDBOXES)
    async with Sandbox("kata", vm, store=store, recover=False) as sandbox:
        assert list(sandbox.index) == [0, 1, 2, 3, 7, 9]
        plug_in(vm, sandbox)
        found = {device.id[-1]: device for device in sandbox.devices}
        assert found["0"].ref_count == 3 and found["0"].attach_count == 2
        await sandbox.detach(found["1"].id)
    async with Sandbox("kata", vm, store=store, recover=False) as sandbox:
        saved = {device.id[-1]: device for device in sandbox.state().devices or ()}
        assert saved.keys() == found.keys() - {"1", "7"}  # the pending detach is settled before
        assert b'"Deep":{"a":[1,{"b":null}]}' in encode_device(saved["0"])


@pytest.mark.parametrize("letters", [1, 25, 26, 40, 255])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "made"])
def test_a_drive_keeps_the_id_that_the_vmm_knows(letters: int, cut: bool) -> None:
    """One that is longer than pyblock's own is not taken for what would be made of it."""
    device_id = "a" * letters
    drive_id = make_name_id("drive", device_id) if cut else f"drive-{device_id}"
    told = Record(id=device_id, driver="virtio-blk", path="/x", drive_id=drive_id, index=0)
    kept = encode(told)
    assert decode(device_id, kept, where="test").drive_id == drive_id
    assert drive_id_of(device_id, kept) == drive_id


def test_an_empty_serial_is_none() -> None:
    told = Record(id="a", driver="virtio-blk", path="/x", serial="", drive_id="drive-a", index=0)
    assert decode("a", encode(told), where="test").serial is None
