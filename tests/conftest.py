"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from snapshot import Busy, MakeImage

from pyblock import Sandbox
from pyblock.hypervisors.memory import MemoryHypervisor


@pytest.fixture
def anyio_backend() -> str:
    """Everything that waits is asyncio."""
    return "asyncio"


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """Makes sparse disk images of 1 MiB in the test's folder."""

    def make(name: str) -> Path:
        path = tmp_path / name
        with path.open("xb") as file:
            file.truncate(1 << 20)
        return path

    return make


@pytest.fixture
async def busy(make_image: MakeImage) -> AsyncIterator[Busy]:
    """A sandbox on a machine in memory with two disks in it, so that there is something that a refusal could spoil."""
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm) as sandbox:
        scsi = await sandbox.attach(make_image("scsi.img"), device_id="scsi", serial="SCSI-1")
        blk = await sandbox.attach(make_image("blk.img"), device_id="blk", driver="virtio-blk")
        yield Busy(sandbox, vm, scsi, blk)
