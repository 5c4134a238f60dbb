"""The devices of one sandbox: created or reused by identity, counted by user, found by ID."""

from __future__ import annotations

import os
from base64 import b32encode
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import msgspec

from pyblock.disk.drivers import DRIVERS, Driver, driver_named
from pyblock.disk.formats import RAW, check_format, not_raw
from pyblock.disk.image import block_special_path, inspect_image
from pyblock.disk.lineage import Identity
from pyblock.disk.model import DeviceInfo, check_device_id
from pyblock.errors import (
    DeviceConflict,
    InvalidImage,
    InvalidSerial,
    InvalidValue,
    NotOffered,
    UnknownDevice,
)
from pyblock.life.device import BlockDevice
from pyblock.life.generic import GenericDevice
from pyblock.life.table import HOLDING
from pyblock.vmm.base import Offer

Device = BlockDevice | GenericDevice

# by a driver that the VMM does not have, which is said when the device is to be attached
NOTHING = Offer()
# shared by all devices that have none; nobody writes to the options of an info
NO_OPTIONS: dict[str, str] = {}
OPTIONS = ("block-driver", "fstype")
# bytes of a device ID that is made up; eight letters, since QEMU reads each of them four times, for
# 4 µs
_RANDOM = 5


def check_serial(serial: str, driver: Driver, offer: Offer) -> str:
    """The serial itself, or InvalidSerial: printable ASCII without spaces, as many bytes as the
    driver carries on this VMM."""
    if not serial or not serial.isascii() or not serial.isprintable() or " " in serial:
        raise InvalidSerial(
            f"serial {serial!r} is empty or not printable ASCII without spaces", value=serial
        )
    if len(serial) > offer.serial_max:
        room = f"at most {offer.serial_max} bytes" if offer.serial_max else "no serial at all"
        text = f"serial {serial!r} has {len(serial)} bytes; {driver.name} carries {room}"
        raise InvalidSerial(text, driver=driver.name, value=serial)
    return serial


def check_options(options: dict[str, str]) -> None:
    """Raises InvalidValue for an option of a disk that nobody understands. What a loaded state has
    is not asked about."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise InvalidValue(
                f"option {name!r} is unknown; known are {', '.join(OPTIONS)}", value=name
            )
        if not isinstance(value, str):
            raise InvalidValue(f"option {name!r} is {value!r}, which is no text", value=value)


class Door(Protocol):
    """A sandbox, to the manager of its devices."""

    async def _attach_known(self, device: Device, deadline: float | None) -> None: ...

    async def _detach_known(self, device: Device, deadline: float | None) -> None: ...


class DeviceManager:
    """:param driver: the name of the driver for devices that ask for none. Raises UnknownDriver.
    :param offers: what each driver can do on their machine.

    :ivar by_id: the devices, by their IDs in the order in which they came; to be read only.
    """

    __slots__ = ("_by_identity", "_doubles", "_offers", "by_id", "driver")

    def __init__(self, driver: str, offers: Mapping[str, Offer]) -> None:
        self.driver = driver_named(driver)
        self._offers = offers
        self.by_id: dict[str, Device] = {}
        self._by_identity: dict[Identity, BlockDevice] = {}
        self._doubles = False

    def __iter__(self) -> Iterator[Device]:
        return iter(list(self.by_id.values()))

    def __len__(self) -> int:
        return len(self.by_id)

    def __contains__(self, device_id: object) -> bool:
        return device_id in self.by_id

    def find(self, device_id: str) -> Device:
        """The device of that ID. Raises UnknownDevice."""
        try:
            return self.by_id[device_id]
        except (KeyError, TypeError):
            text = f"no device {device_id!r} in this sandbox; it has {len(self.by_id)} devices"
            raise UnknownDevice(
                text, device=device_id if isinstance(device_id, str) else None, value=device_id
            ) from None

    def get(self, device_id: str) -> Device | None:
        """The device of that ID, or None."""
        return self.by_id.get(device_id)

    def obtain(self, info: DeviceInfo) -> Device:
        """The device for what the caller wants, created, or reused where the same host object is
        there already; counts one user.

        Raises InvalidImage, DescriptorsExhausted, UnknownDriver, InvalidSerial, InvalidID,
        InvalidValue (an option or the format); DeviceConflict when the host object or the ID is
        there with another driver, access, serial or ID than asked for.
        """
        if info.dev_type not in ("c", "u"):
            return self.disk(info)
        device = GenericDevice(self._new_id(info), info)
        self.by_id[device.id] = device
        device.ref_count += 1
        return device

    def drop(self, device: Device) -> None:
        """Counts one user less. A device without users that holds nothing is forgotten."""
        if device.ref_count > 1:
            device.ref_count -= 1
        else:
            device.ref_count = 0
            self.tidy(device)

    def tidy(self, device: Device) -> None:
        """Forgets the device if it has no users and holds nothing."""
        if (
            device.ref_count
            or device.attach_count
            or (isinstance(device, BlockDevice) and device.phase in HOLDING)
        ):
            return
        self.forget(device)

    def forget(self, device: Device) -> None:
        """Has the device be none of this sandbox's any more, whoever uses it."""
        if self.by_id.get(device.id) is device:
            del self.by_id[device.id]
            if (
                isinstance(device, BlockDevice)
                and device.identity is not None
                and self._by_identity.get(device.identity) is device
            ):
                del self._by_identity[device.identity]
                if self._doubles:
                    self._take_next(device.identity)

    def _take_next(self, identity: Identity) -> None:
        """A loaded state may have one image twice: the next of them is then the one that is
        found."""
        for device in self.by_id.values():
            if isinstance(device, BlockDevice) and device.identity == identity:
                self._by_identity[identity] = device
                return

    def clear(self) -> None:
        """Forgets all devices."""
        self.by_id.clear()
        self._by_identity.clear()

    async def attach(self, device_id: str, sandbox: Door, deadline: float | None = None) -> None:
        """Attaches the device of that ID in its sandbox. Raises UnknownDevice and what
        Sandbox.attach raises."""
        await sandbox._attach_known(self.find(device_id), deadline)

    async def detach(self, device_id: str, sandbox: Door, deadline: float | None = None) -> None:
        """Detaches the device of that ID in its sandbox. Raises UnknownDevice and what
        Sandbox.detach raises."""
        await sandbox._detach_known(self.find(device_id), deadline)

    def check_new(self, devices: Iterable[Device]) -> None:
        """Raises DeviceConflict when two of the devices have one ID, or one has that of a device
        which is there."""
        seen = set(self.by_id)
        for device in devices:
            if device.id in seen:
                raise DeviceConflict(f"two devices have the ID {device.id!r}", device=device.id)
            seen.add(device.id)

    def take_in(self, devices: Iterable[Device]) -> None:
        """Takes in devices, out of a saved state for example, that `check_new` was asked about."""
        for device in devices:
            self.by_id[device.id] = device
            if isinstance(device, BlockDevice) and device.identity is not None:
                self._doubles |= self._by_identity.setdefault(device.identity, device) is not device

    def disk(self, info: DeviceInfo) -> BlockDevice:
        """`obtain` for what is no device that is only counted."""
        if info.format is not None:
            check_format(info.format)
        if info.options:
            check_options(info.options)
        driver = self._driver(info) if info.driver or info.options else self.driver
        offer = self._offers.get(driver.name, NOTHING)
        path = info.path or (
            block_special_path(info.major, info.minor) if info.dev_type == "b" else ""
        )
        image = inspect_image(path, read_only=info.read_only, raw=info.format == RAW)
        if info.dev_type == "b" and not image.is_block:
            raise InvalidImage(
                f"image {path!r} is not the block device that dev_type 'b' says it is", path=path
            )
        if (device := self._by_identity.get(image.identity)) is not None:
            self._fit(device, info, image.path)
            device.ref_count += 1
            return device
        if image.looks_like is not None:
            raise not_raw(image.path, image.looks_like)
        if (info.read_only and not offer.read_only) or (info.share and not offer.share):
            what = (
                "for reading only"
                if info.read_only and not offer.read_only
                else "with other writers"
            )
            raise NotOffered(
                f"{driver.name} has no way to plug in {image.path!r} {what} on this VMM",
                driver=driver.name,
                path=image.path,
            )
        device_id = self._new_id(info)
        serial = info.serial
        if serial is not None:
            check_serial(serial, driver, offer)
        elif len(device_id) <= offer.serial_max:
            serial = device_id
        major, minor = image.number or (-1, -1)
        have = msgspec.structs.replace(
            info, path=image.path, driver=driver.name, serial=serial, id=device_id, major=major,
            minor=minor,
            options=info.options or NO_OPTIONS,
        )  # fmt: skip
        device = BlockDevice(device_id, have, image.identity, image.under, fresh=info.id is None)
        device.ref_count = 1
        self.by_id[device_id] = self._by_identity[image.identity] = device
        return device

    def _driver(self, info: DeviceInfo) -> Driver:
        name = info.driver or info.options.get("block-driver")
        return driver_named(name) if name else self.driver

    def _new_id(self, info: DeviceInfo) -> str:
        if info.id is not None:
            if check_device_id(info.id) in self.by_id:
                text = (
                    f"device ID {info.id!r} belongs to another device of this sandbox; give this "
                    "one another or leave it out"
                )
                raise DeviceConflict(text, device=info.id, path=info.path or None)
            return info.id
        while (device_id := b32encode(os.urandom(_RANDOM)).decode().lower()) in self.by_id:
            pass
        return device_id

    def _fit(self, device: BlockDevice, info: DeviceInfo, path: str) -> None:
        """Has the device that is there already be what is asked for. Raises DeviceConflict when
        that does not fit it."""
        have = device.info
        wanted: list[tuple[str, object, object]] = [
            ("access read_only", have.read_only, info.read_only),
            ("share", have.share, info.share),
        ]
        if info.driver or "block-driver" in info.options:
            wanted.append(("driver", DRIVERS[have.driver or ""].name, self._driver(info).name))
        if info.serial is not None:
            wanted.append(("serial", have.serial, info.serial))
        if info.id is not None:
            wanted.append(("ID", device.id, info.id))
        for what, had, asked in wanted:
            if had != asked:
                text = (
                    f"{path!r} is device {device.id} of this sandbox already, with {what} "
                    f"{had!r}, not {asked!r}"
                )
                raise DeviceConflict(text, device=device.id, path=path, value=asked)
        if info.format is not None and have.format is None:
            device.info = msgspec.structs.replace(have, format=info.format)
            if device.drive is not None:
                device.drive.info = device.info
