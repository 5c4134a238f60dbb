"""What a store keeps, and the few ways to change it: a row for each device, which also holds the
claim on its image.

A row is written before the VMM is touched and again after. It exists from the first attach until
the VMM says that the device is gone, so a claim cannot outlive its device, nor a device its claim.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from pyblock.disk.lineage import Identity
from pyblock.errors import ImageInUse
from pyblock.store.record import Record, SandboxRecord, decode, decode_sandbox

PATIENCE = 60.0  # seconds that a write without a deadline of its own waits for another process


class Claim(NamedTuple):
    """What a device may do with its image: one writes or many read, unless all of them say `share`.

    It holds against claims on the same image, on what lies under it, and on what lies on it.

    :ivar under: what lies under the image, and its other names.
    """

    identity: Identity
    read_only: bool
    share: bool
    under: tuple[Identity, ...] = ()

    def fits(self, other: Claim) -> bool:
        """Whether both may hold."""
        return (self.read_only and other.read_only) or (self.share and other.share)


class Row(NamedTuple):
    """A device as the store shall have it from now on.

    :ivar device_id: its ID.
    :ivar record: what `record.encode` made of it; None: it goes, and its claim with it.
    :ivar claim: the claim it holds, if any.
    :ivar claiming: the claim is new, so others' are to be looked at.
    """

    device_id: str
    record: bytes | None
    claim: Claim | None = None
    claiming: bool = False


class Stored(NamedTuple):
    """A sandbox as the store has it.

    :ivar sandbox_id: its ID.
    :ivar vm: the VMM's address, "" where nothing finds the machine again.
    :ivar owner: who has it open, in words; "" for nobody who lives.
    :ivar own: the sandbox's own record as it is written, b"" for nothing.
    :ivar devices: the IDs of its devices, in the order in which they came, and their records as
        they are written.
    :ivar where: what errors call it.
    :ivar opening: which opening of a sandbox by this process it is, where it was opened; 0 where it
        was read.
    """

    sandbox_id: str
    vm: str
    owner: str
    own: bytes
    devices: Sequence[tuple[str, bytes]]
    where: str
    opening: int = 0

    def record(self) -> SandboxRecord:
        """The sandbox's own record. Raises InvalidState, NewerState."""
        return decode_sandbox(self.own, where=self.where)

    def records(self) -> list[Record]:
        """Those of its devices. Raises InvalidState, NewerState, for the first that cannot be
        read."""
        return [decode(device_id, data, where=self.where) for device_id, data in self.devices]


class Standing(NamedTuple):
    """A sandbox in a list of all.

    :ivar sandbox_id: its ID.
    :ivar vm: the VMM's address, "" where nothing finds the machine again.
    :ivar owner: who has it open, in words; "" for nobody who lives.
    :ivar devices: how many it has.
    """

    sandbox_id: str
    vm: str
    owner: str
    devices: int


Relation = Literal["it", "under it", "on it"]


class Claimant(NamedTuple):
    """A device that has claimed an image, what lies under it, or what lies on it.

    :ivar sandbox_id: the sandbox of the device.
    :ivar owner: who has that open, in words; "" for nobody who lives.
    :ivar device_id: the device's ID.
    :ivar claimed: what it has claimed.
    :ivar relation: what that is to the image.
    :ivar read_only: it only reads.
    :ivar share: others may write it as well.
    :ivar data: its record as it is written.
    """

    sandbox_id: str
    owner: str
    device_id: str
    claimed: Identity
    relation: Relation
    read_only: bool
    share: bool
    data: bytes


class Store(Protocol):
    """Many processes use one at once, and survive each other's death. A deadline is an event-loop
    time in seconds, None for PATIENCE.

    Every method may raise StoreError, StoreBusy (the deadline passed), InvalidState and NewerState;
    nothing is then changed.
    """

    async def open_sandbox(self, sandbox_id: str, vm: str, deadline: float | None = None) -> Stored:
        """Makes this process the owner of a sandbox, made where it is absent, and returns what the
        store has of it.

        Raises SandboxBusy when a process that lives owns it; SandboxConflict when it is there with
        another VMM, or the VMM belongs to another sandbox.
        """

    async def close_sandbox(self, sandbox_id: str, deadline: float | None = None) -> None:
        """Gives the ownership up. A sandbox of which nothing is kept is forgotten."""

    def abandon(
        self, sandbox_id: str, opening: int, loop: asyncio.AbstractEventLoop | None = None
    ) -> bool:
        """Gives the ownership up for one who was deleted without closing: at once in this process,
        and with the next write, or the loop's next turn, for all others. Returns whether that
        opening still was the owner. Raises nothing, waits for nothing."""

    async def write(
        self,
        sandbox_id: str,
        rows: Callable[[], Sequence[Row]],
        deadline: float | None = None,
        *,
        own: bytes | None = None,
        all_or_none: bool = False,
    ) -> dict[str, ImageInUse]:
        """Writes rows of a sandbox that this process owns, all in one transaction; `rows` is asked
        when that has begun.

        Returns, by device ID, the rows that were left out because their claim does not fit one that
        is held: of the same image by another sandbox, of what lies under it or on it by another
        device; the errors say so without a subject, since a store knows no path.

        :param own: the sandbox's own record, where it is to change.
        :param all_or_none: with a row that would be left out, nothing is written.
        """

    async def meet(self, sandbox_id: str, machine: str, deadline: float | None = None) -> None:
        """Writes down which machine answers for a sandbox that this process owns: a text that two
        addresses of one machine have in common.

        Raises SandboxConflict when the same one answers for another sandbox.
        """

    async def drives_of_others(
        self, sandbox_id: str, machine: str, deadline: float | None = None
    ) -> set[str]:
        """The drive IDs of all other sandboxes whose machine may be this one: it is the same, or
        nobody knows ("")."""

    async def read(self, sandbox_id: str, deadline: float | None = None) -> Stored:
        """What it has of one sandbox. Raises UnknownSandbox."""

    async def find(self, vm: str, deadline: float | None = None) -> str | None:
        """The ID of the sandbox of this VMM, None if there is none."""

    async def sandboxes(self, deadline: float | None = None) -> list[str]:
        """The IDs of all its sandboxes, sorted."""

    async def standings(self, deadline: float | None = None) -> list[Standing]:
        """All its sandboxes, by their IDs."""

    async def holders(
        self, image: Identity, under: Sequence[Identity] = (), deadline: float | None = None
    ) -> list[Claimant]:
        """The devices of all sandboxes that have claimed an image, what lies under it, or what lies
        on it.

        :param under: what lies under the image, and its other names.
        """

    def close(self) -> None:
        """Closes what it holds open. A later call opens it again; sandboxes that are open stay this
        process's only until then."""
