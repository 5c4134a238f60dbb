"""`pyblock demo`: the main job on the in-memory VMM, on any machine. `make demo` shows it on a real
guest."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from pyblock.cli import session, show
from pyblock.life.device import BlockDevice
from pyblock.life.recorded import record_of
from pyblock.sandbox import Sandbox
from pyblock.vmm.memory.machine import MemoryHypervisor

PLAN = (("virtio-scsi", 3), ("virtio-blk", 3), ("nvdimm", 1))
SIZE = 16 << 20  # bytes


WHAT = (
    "This runs on the in-memory VMM: no guest boots, so names are predictions. `make demo` in a "
    "checkout uses a real guest."
)


@click.command()
@session.command
async def demo() -> None:
    """Attach and detach seven disks on a machine that exists in memory only."""
    click.echo(WHAT)
    vm = MemoryHypervisor("demo")
    with tempfile.TemporaryDirectory() as folder:
        async with Sandbox("demo", vm) as sandbox:
            devices: list[BlockDevice] = []
            for driver, count in PLAN:
                images = [Path(folder, f"{driver}-{number}.img") for number in range(count)]
                for image in images:
                    with image.open("wb") as file:
                        file.truncate(SIZE)
                devices += await sandbox.attach_many(images, driver=driver)
            show.devices(
                [show.record(sandbox.id, record_of(device)) for device in devices], as_json=False
            )
            await sandbox.detach_many(devices)
            left = (
                f"{len(sandbox.devices)} devices, {len(sandbox.index)} indexes taken, "
                f"{len(vm.backends)} backends left"
            )
            click.echo(f"detached all: {left}")
