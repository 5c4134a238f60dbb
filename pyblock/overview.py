"""This host, as its store knows it: every sandbox, its devices, and who holds an image.

It is read from records alone. No machine is asked and no sandbox opened, so it may be asked at any
time, whoever has the sandboxes open.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, NamedTuple

from pyblock.disk.image import absolute, lineage_at
from pyblock.disk.model import BlockDrive, DeviceInfo
from pyblock.errors import UnknownSandbox
from pyblock.life.table import Phase
from pyblock.loading import loading

if TYPE_CHECKING:
    from pyblock.store.base import Store
    from pyblock.store.record import Record

Relation = Literal["it", "under it", "on it"]


class KnownSandbox(NamedTuple):
    """A sandbox of the store.

    :ivar id: its ID.
    :ivar vm: the VMM's address; "" where nothing finds the machine again.
    :ivar owner: who has it open, in words; "" for nobody who lives.
    :ivar devices: how many it has.
    """

    id: str
    vm: str
    owner: str
    devices: int


class KnownDevice(NamedTuple):
    """A device of a sandbox, as it is written down.

    :ivar sandbox: the sandbox's ID.
    :ivar id: the device ID.
    :ivar info: what was asked for.
    :ivar drive: how it is presented to the guest; None where nothing is held.
    :ivar phase: where it stands; what is under way is pending.
    :ivar attach_count: attaches that no detach stands against yet.
    """

    sandbox: str
    id: str
    info: DeviceInfo
    drive: BlockDrive | None
    phase: Phase
    attach_count: int


class Holder(NamedTuple):
    """A device that has claimed an image.

    :ivar device: the device.
    :ivar owner: who has its sandbox open, in words; "" for nobody who lives.
    :ivar relation: what it has claimed: "it", what lies "under it", or what lies "on it".
    :ivar read_only: it only reads.
    :ivar share: others may write it as well, if they say so too.
    """

    device: KnownDevice
    owner: str
    relation: Relation
    read_only: bool
    share: bool


class Host:
    """:param store: which store; None: this host's.

    Every method may raise StoreError, StateError.
    """

    def __init__(self, store: Store | None = None) -> None:
        if store is None:
            with loading("the store"):
                from pyblock.store import host_store  # noqa: PLC0415
            store = host_store()
        self._store = store

    def __repr__(self) -> str:
        return f"<Host {self._store!r}>"

    async def sandboxes(self) -> list[KnownSandbox]:
        """All its sandboxes, by their IDs."""
        return [KnownSandbox(*one) for one in await self._store.standings()]

    async def devices(self, sandbox: str) -> list[KnownDevice]:
        """The devices of a sandbox, in the order in which they came. Raises UnknownSandbox."""
        stored = await self._store.read(sandbox)
        return [known(sandbox, record) for record in stored.records()]

    async def holders(self, path: str | os.PathLike[str]) -> list[Holder]:
        """Who has claimed the image at a path, what lies under it (the disk of a partition, the
        file of a loop device), or what lies on it. One that is gone is looked for by its path.

        Raises InvalidImage for what can be no path.
        """
        text = os.fsdecode(path)
        lineage = lineage_at(text)
        if lineage is None:
            return await self._holders_of_path(absolute(text))
        with loading("the store"):  # its typed schema takes long to import
            from pyblock.store.record import decode  # noqa: PLC0415

        found = []
        for one in await self._store.holders(lineage.identity, lineage.claims):
            where = f"{self._store!r}, sandbox {one.sandbox_id!r}"
            device = known(one.sandbox_id, decode(one.device_id, one.data, where=where))
            found.append(Holder(device, one.owner, one.relation, one.read_only, one.share))
        return found

    async def export(self, sandbox: str, path: str | os.PathLike[str]) -> None:
        """Writes a sandbox to a JSON file as `Sandbox.save` does. Raises UnknownSandbox."""
        with loading("a state file"):
            from pyblock import stored  # noqa: PLC0415
        await stored.export(self._store, sandbox, path)

    async def forget(self, sandbox: str) -> list[str]:
        """Gives up everything that belongs to a machine which no longer exists: devices, indexes,
        claims, also where a record cannot be read. Returns the devices' IDs.

        Raises UnknownSandbox; SandboxBusy while a process that lives has it open; MachineAnswers
        unless the machine's socket is absent or nobody listens there.
        """
        with loading("the store"):
            from pyblock import stored  # noqa: PLC0415
        return await stored.forget(self._store, sandbox)

    async def _holders_of_path(self, path: str) -> list[Holder]:
        found = []
        for sandbox in await self.sandboxes():
            try:
                devices = await self.devices(sandbox.id)
            except UnknownSandbox:
                continue  # it was closed, with nothing in it, since the store was asked
            for one in devices:
                if one.drive is not None and one.info.path == path:
                    found.append(
                        Holder(one, sandbox.owner, "it", one.info.read_only, one.info.share)
                    )
        return found


def known(sandbox: str, record: Record) -> KnownDevice:
    """A device out of its record."""
    info = record.info()
    return KnownDevice(
        sandbox, record.id, info, record.drive(info), Phase(record.phase), record.attach_count
    )


def host(store: Store | None = None) -> Host:
    """What this host has plugged in, straight from its records; see Host."""
    return Host(store)
