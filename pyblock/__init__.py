"""pyblock plugs block devices into running virtual machines, and knows where each one appears in the guest.

`Sandbox` is the asyncio front door, `pyblock.blocking.Sandbox` the blocking one. What is public
stands in `__all__`; what not every program needs is imported when it is first asked for.
"""

# ruff: noqa: F403, F405 - all of the tree of errors is public

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from pyblock.device import BlockDevice
from pyblock.drivers import DRIVERS, Driver
from pyblock.errors import *
from pyblock.generic import GenericDevice
from pyblock.hypervisors.base import Hypervisor
from pyblock.index import BlockIndex
from pyblock.model import BlockDrive, DeviceInfo
from pyblock.naming import drive_index, drive_name, drive_names, make_name_id, scsi_address, scsi_index
from pyblock.recovery import Finding, Found, Outcome
from pyblock.sandbox import Sandbox
from pyblock.table import Phase

if _TYPE_CHECKING:
    from pyblock import blocking
    from pyblock.hypervisors.memory import Fault, MemoryHypervisor
    from pyblock.state import DeviceState
    from pyblock.stores.base import Store
    from pyblock.stores.sqlite import SqliteStore

__version__ = "0.1.0"

# fmt: off
__all__ = [  # noqa: RUF022 - by what they are about
    # doors
    "Sandbox", "blocking",
    # disks
    "BlockDevice", "BlockDrive", "DRIVERS", "DeviceInfo", "Driver", "GenericDevice", "Phase",
    # what recovery found
    "Finding", "Found", "Outcome",
    # machines and stores
    "Hypervisor", "MemoryHypervisor", "Fault", "DeviceState", "SqliteStore", "Store",
    # numbers and names
    "BlockIndex", "drive_index", "drive_name", "drive_names", "make_name_id", "scsi_address",
    "scsi_index",
    # errors, as their tree has them
    "PyblockError",
    "CallerError",
    "InvalidValue", "InvalidIndex", "InvalidName", "InvalidAddress", "InvalidID", "InvalidSerial",
    "InvalidTimeout", "InvalidImage", "ImageReplaced", "UnknownDriver", "UnknownScheme",
    "UnknownDevice", "DeviceConflict", "NotAttached", "IndexTaken", "IndexFree", "SandboxClosed",
    "WrongEventLoop", "SandboxBusy", "MachineAnswers", "SandboxConflict", "UnknownSandbox",
    "ImageInUse", "StateError", "InvalidState", "NewerState",
    "CapacityError", "IndexesExhausted", "SlotsExhausted", "DescriptorsExhausted",
    "AttachCountExhausted",
    "VmmRefused",
    "TransportError", "VmmUnreachable", "VmmProtocolError", "ConnectionLost",
    "StoreError", "StoreBusy", "DeadlinePassed", "AttachPending", "DetachPending",
]
# fmt: on

_LATE = {
    "DeviceState": "pyblock.state",
    "Fault": "pyblock.hypervisors.memory",
    "MemoryHypervisor": "pyblock.hypervisors.memory",
    "SqliteStore": "pyblock.stores.sqlite",
    "Store": "pyblock.stores.base",
}


if not _TYPE_CHECKING:  # to a type checker, a name that is not public is a mistake

    def __getattr__(name: str) -> object:
        if name == "blocking":  # loads anyio, which the asyncio front door does without
            return _import_module("pyblock.blocking")
        if name in _LATE:
            return getattr(_import_module(_LATE[name]), name)
        raise AttributeError(f"module 'pyblock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
