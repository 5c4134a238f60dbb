"""`pyblock demo`: the main job on the in-memory VMM, on any machine. `make demo` shows it on a real guest."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from pyblock import blocking
from pyblock.cli import show
from pyblock.hypervisors.memory import MemoryHypervisor

PLAN = (("virtio-scsi", 3), ("virtio-blk", 3), ("nvdimm", 1))
SIZE = 16 << 20  # bytes


@click.command()
def demo() -> None:
    """Attach and detach seven disks on a machine that exists in memory only."""
    click.echo("This runs on the in-memory VMM: no guest boots, so names are predictions. `make demo` in a checkout uses a real guest.")
    vm = MemoryHypervisor("demo")
    with tempfile.TemporaryDirectory() as folder, blocking.Sandbox("demo", vm) as sandbox:
        for driver, count in PLAN:
            images = [Path(folder, f"{driver}-{number}.img") for number in range(count)]
            for image in images:
                with image.open("wb") as file:
                    file.truncate(SIZE)
            sandbox.attach_many(images, driver=driver)
        devices = [device for device in sandbox.devices if hasattr(device, "drive")]
        show.devices([show.record(sandbox.id, device) for device in devices], as_json=False)  # type: ignore[arg-type]
        sandbox.detach_many(devices)
        click.echo(f"detached all: {len(sandbox.devices)} devices, {len(sandbox.index)} indexes taken, {len(vm.backends)} backends left")
