"""Plain data, no I/O: what the caller wants (DeviceInfo) and how it is presented to one sandbox
(BlockDrive).

A BlockDrive keeps integers and what the VMM reported; text that follows from them is computed when
it is asked for.
"""

from __future__ import annotations

from typing import Any, TypedDict

import msgspec

from pyblock.core.naming import scsi_address
from pyblock.disk.drivers import Driver
from pyblock.errors import Facts, InvalidID

DEVICE_ID_MAX = 255

# QEMU's id_wellformed() without its first letter, which "drive-" always provides.
_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._")


def check_device_id(text: Any) -> str:
    """The ID itself, or InvalidID: 1 to 255 of A-Z a-z 0-9 - . _, which is what QEMU takes inside
    an ID."""
    if (
        isinstance(text, str)
        and 0 < len(text) <= DEVICE_ID_MAX
        and text.isalnum()
        and text.isascii()
    ):
        return text  # nearly all are plain
    if not isinstance(text, str) or not text:
        raise InvalidID(
            f"device ID {text!r} is empty or not text; leave it out to have one chosen", value=text
        )
    if len(text) > DEVICE_ID_MAX:
        raise InvalidID(
            f"device ID {text[:40]!r}… has {len(text)} characters; at most {DEVICE_ID_MAX} are "
            "taken",
            value=text,
        )
    if not _ID_CHARACTERS.issuperset(text):
        bad = next(character for character in text if character not in _ID_CHARACTERS)
        why = f"holds {bad!r}; QEMU takes letters, digits, '-', '.' and '_' only"
        raise InvalidID(f"device ID {text!r} {why}", value=text)
    return text


class DeviceInfo(msgspec.Struct, frozen=True, gc=False):
    """What the caller wants in the guest.

    :ivar path: a disk image or a host block special. May be empty when `dev_type` is "b": it is
        then found by `major`:`minor`.
    :ivar driver: a name out of `pyblock.DRIVERS`; None takes `options["block-driver"]`, then the
        manager's (virtio-scsi unless set).
    :ivar read_only: the guest may not write.
    :ivar serial: what the guest reads as the disk's serial: printable ASCII, at most 20 bytes with
        virtio-blk, 36 with virtio-scsi. None: the device ID, where the driver can carry it whole.
    :ivar id: the device ID: 1 to 255 of A-Z a-z 0-9 - . _; None has one chosen.
    :ivar dev_type: "" for a path, "b" for a block special, "c" or "u" for a character special (a
        generic device).
    :ivar major: of a special, -1 where none is given.
    :ivar minor: likewise.
    :ivar options: Kata's DriverOptions, kept in the saved state. A disk's are `block-driver`, and
        `fstype`, which is only passed on; no others are taken. A generic device's are only kept.
    :ivar share: others of this host may write the image as well, if they say so too; what guards
        its contents is then the guests' business.
    :ivar format: "raw": it is plugged in whatever it begins with; None: an image that begins like a
        container (qcow2, vmdk, LUKS…) is refused. It has nothing to do with BlockDrive's `format`.
    """

    path: str = ""
    driver: str | None = None
    read_only: bool = False
    serial: str | None = None
    id: str | None = None
    dev_type: str = ""
    major: int = -1
    minor: int = -1
    options: dict[str, str] = {}
    share: bool = False
    format: str | None = None


class SharedOptions(TypedDict, total=False):
    """What may be said of many images at once, in the words of DeviceInfo, which explains them."""

    driver: str | None
    read_only: bool
    share: bool
    format: str | None


class DiskOptions(SharedOptions, total=False):
    """The same of one image."""

    serial: str | None


class Options(DiskOptions, total=False):
    """The same, and its device ID."""

    device_id: str | None


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where in the machine a drive sits, as its adapter chose it.

    :ivar text: the adapter's own words for it, which only the adapter reads, also after a restart;
        None where nothing is taken, or the VMM has not chosen yet.
    :ivar number: the number behind the guest's name, where the place has had its name since boot;
        None where the name follows from the drive's ordinal.
    :ivar pci_path: see BlockDrive.
    """

    text: str | None = None
    number: int | None = None
    pci_path: str | None = None


class BlockDrive(msgspec.Struct, gc=False, eq=False):
    """How a device is presented to one sandbox.

    :ivar id: the drive ID, at most 31 bytes; also the name of what the VMM was given.
    :ivar index: the block index.
    :ivar ordinal: the number behind the name among the drives of the same family, without the
        offset.
    :ivar offset: how many names of the family the guest used before ordinal 0.
    :ivar kind: the driver, with all that follows from it.
    :ivar info: what was asked for: the image, the driver by name, and the options.
    :ivar pci_path: slots from the root bus down in two hex digits, as Kata writes them: "02/00" is
        slot 0 behind the port in slot 2 (a function other than 0 is added: "02.1/00"). None where
        the drive is not on PCI.
    :ivar dev_no: the CCW device number as the guest has it: "0.0.0002".
    :ivar guest_match: what the target of the guest's `/sys/block/<name>` link contains for this
        disk and for no other.
    :ivar place: where in the machine it sits, in its adapter's words; see Place.
    :ivar verified: False where the VMM was given a path, and what it opened there could not be
        compared with what was claimed.
    :ivar known_name: a guest path that came from elsewhere (an imported state, its place) and
        stands in for the computed one.
    :ivar imported: another program plugged it in, under names that may not be ours.
    :ivar crowded: it was on its way while another of its family was, so that the guest may have
        seen either first.
    :ivar fresh: its ID was made up for this attach, so nobody else can have anything of that name;
        False once the VMM has it.
    """

    id: str
    index: int
    ordinal: int
    offset: int
    kind: Driver
    info: DeviceInfo
    pci_path: str | None = None
    dev_no: str | None = None
    guest_match: str | None = None
    place: str | None = None
    known_name: str | None = None
    imported: bool = False
    verified: bool = True
    crowded: bool = False
    fresh: bool = False

    def sit(self, place: Place) -> None:
        """Has it sit there."""
        self.place, self.pci_path = place.text, place.pci_path
        if place.number is not None:
            self.known_name = self.kind.family.path(place.number)

    @property
    def facts(self) -> Facts:
        """What an error about it knows of it."""
        return Facts(
            device=self.info.id,
            drive=self.id,
            path=self.info.path or None,
            index=self.index,
            driver=self.kind.name,
        )

    @property
    def driver(self) -> str:
        """The driver's name."""
        return self.kind.name

    @property
    def file(self) -> str:
        """The host path."""
        return self.info.path

    @property
    def format(self) -> str:
        """Kata's Format: the `fstype` among the options, "raw" where there is none."""
        return self.info.options.get("fstype") or "raw"

    @property
    def read_only(self) -> bool:
        """The guest may not write."""
        return self.info.read_only

    @property
    def serial(self) -> str | None:
        """What the guest reads as serial, None for none."""
        return self.info.serial

    @property
    def share(self) -> bool:
        """Others may write the image as well."""
        return self.info.share

    @property
    def pmem(self) -> bool:
        """True for a drive that the guest sees as persistent memory."""
        return not self.kind.family.letters

    @property
    def scsi_addr(self) -> str | None:
        """`id:lun`, a fact; None where it has none."""
        return scsi_address(self.index) if self.kind.scsi else None

    @property
    def nvdimm_id(self) -> str | None:
        """The number behind /dev/pmem, as the original keeps it; None where it is no such disk."""
        return self.guess.removeprefix(f"/dev/{self.kind.family.prefix}") if self.pmem else None

    @property
    def guess(self) -> str:
        """`/dev/sdX`, `/dev/vdX` or `/dev/pmemN`: where it is if the guest saw the drives in the
        order of their ordinals."""
        return self.known_name or self.kind.family.path(self.ordinal + self.offset)

    @property
    def predicted_name(self) -> str | None:
        """The guess, or None where it is no better than chance, since the drive was plugged in
        together with others of its family. `guest_match` is the fact that finds the disk."""
        return self.guess if not self.crowded or self.known_name else None

    @property
    def virt_path(self) -> str | None:
        """The predicted name where the original fills it (virtio-blk, virtio-blk-ccw, virtio-mmio),
        else None."""
        return self.predicted_name if self.kind.guest_path else None
