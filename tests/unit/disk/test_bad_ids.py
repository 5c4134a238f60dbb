"""IDs and serials: what a VMM could not carry whole is refused, and what has to be shortened stays
apart."""

from __future__ import annotations

from typing import Any

import pytest
from support.snapshot import Busy, MakeImage, drive_ids, refused

from pyblock import DeviceConflict, InvalidID, InvalidSerial, Sandbox, make_name_id
from pyblock.core.naming import ID_MAX
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio

BAD_CHARACTERS = [
    " ",
    "\t",
    "\n",
    "\0",
    "\x7f",
    "/",
    "\\",
    ":",
    ",",
    ";",
    "=",
    "+",
    "@",
    "$",
    "#",
    "%",
    "&",
    "*",
    "(",
    "'",
    '"',
    "ä",
    "é",
    "中",
    "💾",
]


@pytest.mark.parametrize(
    "character", BAD_CHARACTERS, ids=[f"U+{ord(character):04X}" for character in BAD_CHARACTERS]
)
@pytest.mark.parametrize("where", ["{}", "{}id", "i{}d", "id{}"])
async def test_characters_that_qemu_refuses(
    busy: Busy, make_image: MakeImage, character: str, where: str
) -> None:
    device_id = where.format(character)
    with refused(busy.sandbox, busy.vm, InvalidID, repr(device_id), repr(character)):
        await busy.sandbox.attach(make_image("new"), device_id=device_id)


@pytest.mark.parametrize("device_id", ["", "\ud800", 5, 1.5, b"id", ["id"], ("id",), True])
async def test_what_is_no_id(busy: Busy, make_image: MakeImage, device_id: Any) -> None:
    with refused(busy.sandbox, busy.vm, InvalidID, repr(device_id)):
        await busy.sandbox.attach(make_image("new"), device_id=device_id)


async def test_length_of_an_id(busy: Busy, make_image: MakeImage) -> None:
    device = await busy.sandbox.attach(make_image("longest"), device_id="x" * 255)
    assert device.id == "x" * 255
    with refused(busy.sandbox, busy.vm, InvalidID, "x" * 40, "256"):
        await busy.sandbox.attach(make_image("new"), device_id="x" * 256)


@pytest.mark.parametrize("device_id", ["a", "-", ".", "_", "0", "A.b_C-9", "x" * 25, "x" * 26])
async def test_ids_that_are_fine(busy: Busy, make_image: MakeImage, device_id: str) -> None:
    device = await busy.sandbox.attach(make_image("new"), device_id=device_id)
    assert device.id == device_id
    assert len(device.held.id) <= ID_MAX
    if len(device_id) <= 25:
        assert device.held.id == f"drive-{device_id}"


@pytest.mark.parametrize(
    "sandbox_id", ["", " ", "a b", "-a", ".a", "a/b", "ä", "a\n", "x" * 129, 5, None, b"s1"]
)
def test_sandbox_ids(sandbox_id: Any) -> None:
    with pytest.raises(InvalidID) as caught:
        Sandbox(sandbox_id, "memory:")
    assert repr(sandbox_id) in str(caught.value)


async def test_long_ids_with_one_beginning_stay_apart(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        devices = [
            await sandbox.attach(
                make_image(f"image{n}"), device_id="same-in-the-first-25-bytes" + str(n) * 20
            )
            for n in range(3)
        ]
        names = {device.held.id for device in devices}
        assert len(names) == 3
        assert all(len(drive_id) <= ID_MAX for drive_id in names)
        assert names == vm.devices.keys() == vm.backends.keys()
        await sandbox.detach_many(devices)
        assert (vm.devices, drive_ids(sandbox)) == ({}, set())


LONG = "a-device-id-of-more-than-twenty-five-bytes"
# short enough to be carried as it is
LOOKALIKE = make_name_id("drive", LONG).removeprefix("drive-")


async def test_an_id_is_shortened_otherwise_where_anothers_looks_like_that(
    make_image: MakeImage,
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        lookalike = await sandbox.attach(make_image("first"), device_id=LOOKALIKE)
        long = await sandbox.attach(make_image("second"), device_id=LONG)
        assert lookalike.held.id == f"drive-{LOOKALIKE}" == make_name_id("drive", LONG)
        assert long.held.id != lookalike.held.id
        assert len(long.held.id) <= ID_MAX
        assert vm.devices.keys() == {long.held.id, lookalike.held.id}
        await sandbox.detach(lookalike)
        assert vm.devices.keys() == {long.held.id}


async def test_an_id_that_fits_is_refused_where_anothers_was_shortened_to_it(
    make_image: MakeImage,
) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        await sandbox.attach(make_image("first"), device_id=LONG)
        path = make_image("second")
        with refused(sandbox, vm, DeviceConflict, LOOKALIKE):
            await sandbox.attach(path, device_id=LOOKALIKE)
        assert (await sandbox.attach(path)).held.index == 1


CARRIES = {"virtio-blk": 20, "virtio-blk-ccw": 20, "virtio-scsi": 36, "virtio-mmio": 0, "nvdimm": 0}


@pytest.mark.parametrize("driver", CARRIES)
async def test_length_of_a_serial(busy: Busy, make_image: MakeImage, driver: str) -> None:
    room = CARRIES[driver]
    if room:
        device = await busy.sandbox.attach(make_image("fits"), driver=driver, serial="s" * room)
        assert device.held.serial == "s" * room
    serial = "s" * (room + 1)
    with refused(
        busy.sandbox,
        busy.vm,
        InvalidSerial,
        repr(serial),
        str(room) if room else "no serial",
        driver,
    ):
        await busy.sandbox.attach(make_image("new"), driver=driver, serial=serial)


@pytest.mark.parametrize(
    "serial",
    [
        "",
        " ",
        "two words",
        " lead",
        "trail ",
        "tab\t",
        "nul\0",
        "line\n",
        "é",
        "中文",
        "\x7f",
        "\ud800",
    ],
)
@pytest.mark.parametrize("driver", ["virtio-scsi", "virtio-blk"])
async def test_characters_of_a_serial(
    busy: Busy, make_image: MakeImage, driver: str, serial: str
) -> None:
    with refused(busy.sandbox, busy.vm, InvalidSerial, repr(serial)):
        await busy.sandbox.attach(make_image("new"), driver=driver, serial=serial)


@pytest.mark.parametrize("driver", CARRIES)
async def test_the_id_is_the_serial_only_where_it_fits_whole(
    busy: Busy, make_image: MakeImage, driver: str
) -> None:
    for length in (20, 21, 36, 37):
        device = await busy.sandbox.attach(
            make_image(f"image{length}"), driver=driver, device_id="i" * length
        )
        assert device.held.serial == ("i" * length if length <= CARRIES[driver] else None)
