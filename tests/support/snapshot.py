"""What a sandbox and its machine in memory hold, as a value: taken before and after a refusal, the
two must be equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from pyblock import BlockDevice, PyblockError, Sandbox
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm.memory.machine import MemoryHypervisor

MakeImage = Callable[[str], Path]
MakeStore = Callable[..., SqliteStore]


class Busy(NamedTuple):
    """A sandbox with two disks in it, and its machine."""

    sandbox: Sandbox
    vm: MemoryHypervisor
    scsi: BlockDevice
    blk: BlockDevice


def _device(device: Any) -> tuple[Any, ...]:
    drive = (
        msgspec.structs.astuple(device.drive)
        if isinstance(device, BlockDevice) and device.drive
        else None
    )
    phase = device.phase if isinstance(device, BlockDevice) else None
    return (id(device), device.id, device.info, phase, device.attach_count, device.ref_count, drive)


def ordinals(sandbox: Sandbox) -> dict[str, list[int]]:
    """The ordinals that are taken, by family."""
    return {
        prefix: list(taken)
        for prefix, taken in sandbox._machine.allotment._ordinals.items()
        if len(taken)
    }


def drive_ids(sandbox: Sandbox) -> set[str]:
    """The drive IDs that are taken."""
    return set(sandbox._machine.allotment._drive_ids)


def snapshot(sandbox: Sandbox) -> dict[str, Any]:
    """Everything that an operation of a sandbox may change."""
    return {
        "devices": [_device(device) for device in sandbox.manager],
        "identities": {
            identity: device.id for identity, device in sandbox.manager._by_identity.items()
        },
        "index": list(sandbox.index),
        "ordinals": ordinals(sandbox),
        "drive IDs": drive_ids(sandbox),
        "operations": len(sandbox._machine.running),
    }


def machine(vm: MemoryHypervisor) -> dict[str, Any]:
    """What the machine has, and every step that it was ever asked for."""
    slots = vm._slots
    return {
        "backends": dict(vm.backends),
        "devices": dict(vm.devices),
        "journal": list(vm.journal),
        "slots": slots,
    }


def plug_in(vm: MemoryHypervisor, sandbox: Sandbox) -> None:
    """Gives the machine what a loaded sandbox says that it has."""
    for device in sandbox.devices:
        if isinstance(device, BlockDevice) and device.drive is not None:
            drive = device.drive
            vm.backends[drive.id] = drive.file
            vm.devices[drive.id] = f"{drive.driver} {drive.place or f'told {drive.index}'}"
    vm._places = set(vm.devices.values())


@contextmanager
def refused(
    sandbox: Sandbox, vm: MemoryHypervisor, kind: type[PyblockError], *texts: str
) -> Iterator[None]:
    """The body raises exactly this error, all the texts are in its message, and nothing was changed
    or sent."""
    before = snapshot(sandbox), machine(vm)
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    for text in texts:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (snapshot(sandbox), machine(vm)) == before
