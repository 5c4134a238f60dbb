"""The block drivers, as data: how each presents a drive to the guest.

A driver here is what Kata calls `block-driver`. A new one is a row of this table, a recipe in every
adapter that offers it, and a row in the tests that go over DRIVERS.
"""

from __future__ import annotations

import msgspec

from pyblock.core.naming import drive_name
from pyblock.errors import UnknownDriver


class Family(msgspec.Struct, frozen=True):
    """Disks that the guest's kernel numbers together, lowest free first.

    :ivar prefix: what their names begin with.
    :ivar letters: True for `vda`, `vdb`…; False for `pmem0`, `pmem1`….
    """

    prefix: str
    letters: bool = True

    def path(self, number: int) -> str:
        """The guest's path of the disk with this number (>= 0). Raises InvalidName where the name
        passes 31 bytes."""
        return (
            "/dev/" + drive_name(number, self.prefix)
            if self.letters
            else f"/dev/{self.prefix}{number}"
        )


SD = Family("sd")
VD = Family("vd")
PMEM = Family("pmem", letters=False)
FAMILIES = {family.prefix: family for family in (SD, VD, PMEM)}


class Driver(msgspec.Struct, frozen=True):
    """One way to present a drive.

    :ivar name: the text that callers and the saved state use.
    :ivar family: the guest's names for it.
    :ivar scsi: True when its address is `id:lun`, which follows from the block index.
    :ivar guest_path: True when `virt_path` is filled; Kata leaves it empty where the guest finds
        the disk by address.
    :ivar offset: the block offset it starts with when the VMM says nothing: Firecracker's root disk
        is vda.
    """

    name: str
    family: Family
    scsi: bool = False
    guest_path: bool = True
    offset: int = 0


VIRTIO_SCSI = Driver("virtio-scsi", SD, scsi=True, guest_path=False)
VIRTIO_BLK = Driver("virtio-blk", VD)
VIRTIO_BLK_CCW = Driver("virtio-blk-ccw", VD)
VIRTIO_MMIO = Driver("virtio-mmio", VD, offset=1)
NVDIMM = Driver("nvdimm", PMEM, guest_path=False)

DRIVERS = {
    driver.name: driver for driver in (VIRTIO_SCSI, VIRTIO_BLK, VIRTIO_BLK_CCW, VIRTIO_MMIO, NVDIMM)
}


def driver_named(name: str) -> Driver:
    """The driver of that name. Raises UnknownDriver, naming the known ones."""
    try:
        return DRIVERS[name]
    except (KeyError, TypeError):
        text = f"unknown block driver {name!r}; known are {', '.join(DRIVERS)}"
        raise UnknownDriver(
            text, driver=name if isinstance(name, str) else None, value=name
        ) from None
