"""pyblock plugs block devices into running virtual machines, and knows where each one appears in
the guest.

`Sandbox` is the asyncio front door, `pyblock.blocking.Sandbox` the blocking one. What is public
stands in `__all__`; what not every program needs is imported when it is first asked for.
"""

from __future__ import annotations

import logging as _logging
import typing as _typing
from importlib import import_module as _import_module

from pyblock import errors
from pyblock.core.index import BlockIndex
from pyblock.core.naming import (
    drive_index,
    drive_name,
    drive_names,
    make_name_id,
    scsi_address,
    scsi_index,
)
from pyblock.disk.drivers import DRIVERS, Driver
from pyblock.disk.model import BlockDrive, DeviceInfo
from pyblock.errors import *  # noqa: F403
from pyblock.life.device import AttachedDevice, BlockDevice
from pyblock.life.generic import GenericDevice
from pyblock.life.recovery import Finding, Found, Outcome
from pyblock.life.table import Phase
from pyblock.life.voice import EventKind, Events, SandboxEvent
from pyblock.overview import Holder, Host, KnownDevice, KnownSandbox, host
from pyblock.sandbox import Sandbox
from pyblock.vmm.base import Hypervisor

if _typing.TYPE_CHECKING:
    from pyblock import blocking as blocking
    from pyblock.kata.schema import DeviceState
    from pyblock.store.base import Store
    from pyblock.store.sqlite.store import SqliteStore
    from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

__version__ = "0.1.0"

# A library is silent until its user sets a handler.
_logging.getLogger(__name__).addHandler(_logging.NullHandler())

# fmt: off
__all__ = [  # noqa: RUF022 - by what they are about
    # the doors; pyblock.blocking has the same ones, and its extra may be missing
    "Sandbox", "host",
    # disks
    "AttachedDevice", "BlockDevice", "BlockDrive", "DRIVERS", "DeviceInfo", "Driver",
    "GenericDevice", "Phase",
    # what a host has
    "Holder", "Host", "KnownDevice", "KnownSandbox",
    # what recovery found
    "Finding", "Found", "Outcome",
    # what a sandbox says by itself
    "Events", "EventKind", "SandboxEvent",
    # machines and stores
    "Hypervisor", "MemoryHypervisor", "Fault", "DeviceState", "SqliteStore", "Store",
    # numbers and names
    "BlockIndex", "drive_index", "drive_name", "drive_names", "make_name_id", "scsi_address",
    "scsi_index",
]
# fmt: on
__all__ += errors.__all__

_LATE = {
    "DeviceState": "pyblock.kata.schema",
    "Fault": "pyblock.vmm.memory.machine",
    "MemoryHypervisor": "pyblock.vmm.memory.machine",
    "SqliteStore": "pyblock.store.sqlite.store",
    "Store": "pyblock.store.base",
}


if not _typing.TYPE_CHECKING:  # to a type checker, a name that is not public is a mistake

    def __getattr__(name: str) -> object:
        if name == "blocking":  # loads anyio, which the asyncio front door does without
            return _import_module("pyblock.blocking")
        if name in _LATE:
            return getattr(_import_module(_LATE[name]), name)
        raise AttributeError(f"module 'pyblock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
