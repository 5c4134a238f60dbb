"""An option that nobody understands is not taken in silence."""

from __future__ import annotations

import pytest
from support import samples
from support.snapshot import Busy, MakeImage, refused

from pyblock import DeviceInfo, InvalidValue, Sandbox
from pyblock.kata.schema import decode
from pyblock.vmm.memory.machine import MemoryHypervisor

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"cache": "none"}, ("'cache'", "block-driver, fstype")),
        ({"block-driver": "virtio-blk", "aio": "native"}, ("'aio'",)),
        ({"Block-Driver": "virtio-blk"}, ("'Block-Driver'",)),
        ({"": ""}, ("''",)),
        ({"fstype": 5}, ("'fstype'", "5")),
        ({"block-driver": None}, ("'block-driver'", "None")),
        ({5: "x"}, ("5",)),
    ],
)
async def test_unknown_options_are_refused_by_name(
    busy: Busy, make_image: MakeImage, options: dict[str, str], texts: tuple[str, ...]
) -> None:
    with refused(busy.sandbox, busy.vm, InvalidValue, *texts):
        await busy.sandbox.attach(DeviceInfo(path=str(make_image("img")), options=options))


async def test_known_options(make_image: MakeImage) -> None:
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        device = await sandbox.attach(
            DeviceInfo(
                path=str(make_image("img")), options={"block-driver": "virtio-blk", "fstype": "xfs"}
            )
        )
        assert (device.held.driver, device.held.format) == ("virtio-blk", "xfs")


async def test_a_generic_devices_options_are_only_kept(busy: Busy) -> None:
    device = busy.sandbox.manager.obtain(
        DeviceInfo(dev_type="c", major=10, minor=229, options={"x": "y"})
    )
    assert device.info.options == {"x": "y"}


async def test_a_loaded_state_keeps_whatever_it_has() -> None:
    options = {"block-driver": "virtio-scsi", "io.katacontainers.hypothetical": "x"}
    state = samples.sandbox(
        [samples.device(0, samples.drive(0, SCSIAddr="0:0"), DriverOptions=options)], [0]
    )
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        await sandbox.restore(decode(samples.text(state), where="a sample"))
        [saved] = sandbox.state().devices or []
        assert saved.driver_options == options


@pytest.mark.parametrize("option", ["limits", "id", "path", "dev_type", "serial", "device_id"])
async def test_an_option_that_nobody_knows(make_image: MakeImage, option: str) -> None:
    image = make_image("one")
    async with Sandbox("s1", MemoryHypervisor()) as sandbox:
        with pytest.raises(TypeError, match=f"{option}; there are driver"):
            await sandbox.attach_many([image], **{option: None})  # type: ignore[arg-type]
        if option in ("serial", "device_id"):
            await sandbox.attach(image, **{option: "x"})  # type: ignore[arg-type]
        else:
            with pytest.raises(TypeError, match=f"{option}; there are driver"):
                await sandbox.attach(image, **{option: None})  # type: ignore[arg-type]
            assert not sandbox.devices
