"""pyblock plugs block devices into running virtual machines, and knows where each one appears in the guest.

`Sandbox` is the asyncio front door, `pyblock.blocking.Sandbox` the blocking one. Importing pyblock loads no network library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyblock.device import BlockDevice as BlockDevice
from pyblock.device import DeviceReceiver as DeviceReceiver
from pyblock.drivers import DRIVERS as DRIVERS
from pyblock.drivers import Driver as Driver
from pyblock.errors import *  # noqa: F403 - the whole tree of exceptions is public
from pyblock.generic import GenericDevice as GenericDevice
from pyblock.index import BlockIndex as BlockIndex
from pyblock.manager import DeviceManager as DeviceManager
from pyblock.model import BlockDrive as BlockDrive
from pyblock.model import DeviceInfo as DeviceInfo
from pyblock.naming import (
    drive_index as drive_index,
)
from pyblock.naming import (
    drive_name as drive_name,
)
from pyblock.naming import (
    drive_names as drive_names,
)
from pyblock.naming import (
    make_name_id as make_name_id,
)
from pyblock.naming import (
    scsi_address as scsi_address,
)
from pyblock.naming import (
    scsi_index as scsi_index,
)
from pyblock.recovery import Finding as Finding
from pyblock.recovery import Found as Found
from pyblock.recovery import Outcome as Outcome
from pyblock.sandbox import Sandbox as Sandbox
from pyblock.table import Phase as Phase

if TYPE_CHECKING:
    from pyblock import blocking as blocking
    from pyblock.state import DeviceState as DeviceState
    from pyblock.stores.base import Store as Store
    from pyblock.stores.sqlite import SqliteStore as SqliteStore

__version__ = "0.1.0"

# What not every program needs, and takes long to import.
_LATE = {"DeviceState": "pyblock.state", "SqliteStore": "pyblock.stores.sqlite", "Store": "pyblock.stores.base"}


def __getattr__(name: str) -> Any:
    if name == "blocking":  # loads anyio, which the asyncio front door does without
        return import_module("pyblock.blocking")
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module 'pyblock' has no attribute {name!r}")
