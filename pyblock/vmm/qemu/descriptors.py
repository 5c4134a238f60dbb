"""The sets of descriptors in one QEMU: an image goes there as the open file that was claimed, and
not as a path that may lead elsewhere.

A set is marked with the image's identity, which outlives this process, and stays until its node has
gone. What a killed process or a paused machine leaves behind is removed before the next image is
passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated

import msgspec

from pyblock.disk.image import OpenedImage
from pyblock.disk.lineage import Identity
from pyblock.errors import ConnectionLost, VmmProtocolError, VmmRefused
from pyblock.vmm.qemu.qmp import QmpSession, qemu_process
from pyblock.vmm.unix import is_open_as

_MARK = "pb:"
_MARKED = re.compile(_MARK + r"([fb])([0-9a-f]{1,16}):([0-9a-f]{1,16})")
_KINDS = {"f": "file", "b": "block"}
_SET = re.compile(r"/dev/fdset/([0-9]{1,10})")
# `blockdev-add` reads the number of a set as an int of C
_Number = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Passed(msgspec.Struct, frozen=True):
    """Where an image went: the set's number, and the descriptor's in QEMU's process."""

    set: _Number = msgspec.field(name="fdset-id")
    descriptor: _Number = msgspec.field(name="fd")


class _Member(msgspec.Struct, frozen=True):
    fd: int
    opaque: str | None = None


class MarkedSet(msgspec.Struct, frozen=True):
    """A set as QEMU lists it."""

    number: Annotated[int, msgspec.Meta(ge=0)] = msgspec.field(name="fdset-id")
    members: list[_Member] = msgspec.field(name="fds")

    @property
    def image(self) -> Identity | None:
        """The image that pyblock passed in it; None for a set of others."""
        return next(
            (image for one in self.members if (image := _image_behind(one.opaque)) is not None),
            None,
        )


class DescriptorSets:
    """:param qmp: QEMU's monitor."""

    def __init__(self, qmp: QmpSession) -> None:
        self._qmp = qmp
        # drive ID to the set that its node has open, None where it opened a path
        self._sets: dict[str, int | None] = {}
        self._unused: list[int] = []  # seen, and used by no node
        self._look_again = False
        self._known = False  # of all drives, what their nodes have open
        self._watches: list[set[str]] = []
        self._one = asyncio.Lock()
        self._waiting = 0  # for their turn to pass one
        qmp.on_resume, qmp.on_loss = self._resumed, self._lost

    @property
    def drive_ids(self) -> frozenset[str]:
        """The drives of which it is known what their nodes have open."""
        return frozenset(self._sets)

    @contextlib.contextmanager
    def watched(self) -> Iterator[set[str]]:
        """The drives that come or go meanwhile. An answer that QEMU is giving in the meantime may
        be older than they are."""
        moved: set[str] = set()
        self._watches.append(moved)
        try:
            yield moved
        finally:
            self._watches = [each for each in self._watches if each is not moved]

    def learn(
        self, sets: Mapping[str, int | None], unused: Sequence[int], moved: Collection[str]
    ) -> None:
        """Takes what QEMU was found to have.

        :param sets: the set of each drive's node, None where it opened a path.
        :param unused: those of ours that no node uses.
        :param moved: drives that came or went while QEMU was asked: of them its answer says
            nothing.
        """
        ours = {name: number for name, number in self._sets.items() if name in moved}
        self._sets = {name: number for name, number in sets.items() if name not in moved} | ours
        self._unused = list(unused)
        self._known = True

    def closed(self) -> None:
        """Takes note that nothing is under way any more: what comes next may be in another event
        loop."""
        self._one = asyncio.Lock()

    def _lost(self) -> None:
        """Whatever answers next may be another QEMU, whose numbers are others' sets: it is asked
        what it has."""
        self._sets.clear()
        self._unused.clear()
        self._known = False

    async def pass_image(self, drive_id: str, image: OpenedImage) -> Passed | None:
        """Hands the image's descriptor to QEMU. None where none arrives: a proxy passes none on, or
        QEMU can have no more open.

        Raises VmmProtocolError when QEMU can be seen to have got something else; nothing is then
        left of it.
        """
        mark = f"{_MARK}{image.identity[0][0]}{image.identity[1]:x}:{image.identity[2]:x}"
        self._waiting += 1
        try:
            await self._one.acquire()
        finally:
            self._waiting -= 1
        try:
            await self._sweep()
            losses = self._qmp.losses
            raw = await self._qmp.execute(
                "add-fd",
                {"opaque": mark},
                step="backend-add",
                descriptor=image.fd,
                late=self._remove_late,
            )
            self._check_losses(losses, drive_id)
            passed = self._qmp.decoded(Passed, "add-fd", raw)
            # before anybody else has a turn: what is not noted is removed as unused
            self.note(drive_id, passed.set)
        except VmmRefused as refusal:
            if "SCM_RIGHTS" in refusal.reply["desc"]:
                return None
            raise
        finally:
            self._one.release()
        if self._waiting:
            # the next one goes first: it is then answered while QEMU works at what follows here
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                self.remove(drive_id)
                raise
            self._check_losses(losses, drive_id)
        # Of something in between that passes descriptors on, the number says nothing.
        if is_open_as(self._qmp.peer, passed.descriptor, image) is False and qemu_process(
            self._qmp.peer
        ):
            self.remove(drive_id)
            text = (
                f"QMP socket {self._qmp.path!r}: QEMU got another file than {image.path!r} for "
                f"drive {drive_id}"
            )
            raise VmmProtocolError(text, sent=False)
        return passed

    def _check_losses(self, losses: int, drive_id: str) -> None:
        """The next command would open a new connection, where the number may be another image's."""
        if self._qmp.losses != losses:
            text = (
                f"QMP socket {self._qmp.path!r}: the connection ended when the image of drive "
                f"{drive_id} had just been handed over"
            )
            raise ConnectionLost(text, sent=False)

    def note(self, drive_id: str, number: int | None) -> None:
        """Takes note of the set that a drive's node has open, None where it opened a path."""
        self._sets[drive_id] = number
        self._moved(drive_id)

    def remove(self, drive_id: str) -> None:
        """Has the drive's set removed. Nobody waits for it: what is not carried out is found as
        unused."""
        number = self._sets.pop(drive_id, None)
        self._moved(drive_id)
        if number is not None:
            self._qmp.send("remove-fd", {"fdset-id": number})

    def _moved(self, drive_id: str) -> None:
        for moved in self._watches:
            moved.add(drive_id)

    def _resumed(self) -> None:
        # while it was stopped, QEMU 7.2 closed nothing that it was told to remove
        self._look_again = True

    async def _sweep(self) -> None:
        """Removes what nobody uses. Commands are worked off in the order in which they are sent, so
        nothing else can get the number."""
        if self._look_again and self._known:  # else those in use would be taken for unused
            self._look_again = False
            self._unused = [
                each.number
                for each in await self._qmp.ask(list[MarkedSet], "query-fdsets")
                if each.image is not None
            ]
        unused, self._unused = self._unused, []
        in_use = set(self._sets.values())
        for number in unused:
            if number not in in_use:
                self._qmp.send("remove-fd", {"fdset-id": number})

    def _remove_late(self, raw: msgspec.Raw) -> None:
        with contextlib.suppress(VmmProtocolError):
            self._qmp.send("remove-fd", {"fdset-id": self._qmp.decoded(Passed, "add-fd", raw).set})


def set_behind(file: str) -> int | None:
    """The number of the set that a block node of that file has open; None for another file."""
    found = _SET.fullmatch(file)
    return int(found[1]) if found else None


def _image_behind(opaque: str | None) -> Identity | None:
    found = _MARKED.fullmatch(opaque or "")
    return (_KINDS[found[1]], int(found[2], 16), int(found[3], 16)) if found else None
