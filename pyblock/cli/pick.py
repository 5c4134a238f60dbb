"""Which devices of a sandbox somebody means: by ID, by a beginning that only one ID has, or by the
path of an image.

A detach takes a disk from a guest, so nothing is guessed: whatever fits two devices is refused, and
names them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pyblock.disk.image import absolute, identity_of
from pyblock.errors import InvalidID, InvalidImage, UnknownDevice
from pyblock.life.device import BlockDevice
from pyblock.life.registry import Device
from pyblock.sandbox import Sandbox

NAMED = 5  # candidates that an error names


def pick(sandbox: Sandbox, words: Iterable[str]) -> list[Device]:
    """The device that each word means. Raises UnknownDevice, and InvalidID for a word that fits
    several."""
    return [_one(sandbox, word) for word in words]


def plugged(sandbox: Sandbox) -> list[Device]:
    """All devices that the machine has, or may have."""
    return [
        device
        for device in sandbox.devices
        if isinstance(device, BlockDevice) and device.drive is not None
    ]


def _one(sandbox: Sandbox, word: str) -> Device:
    if (device := sandbox.manager.get(word)) is not None:
        return device
    found = _candidates(sandbox.devices, word)
    if len(found) > 1:
        named = ", ".join(_named(device) for device in found[:NAMED])
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        text = (
            f"{word!r} fits {len(found)} devices of sandbox {sandbox.id}: {named}{more}; say "
            "which by a longer ID"
        )
        raise InvalidID(text, sandbox=sandbox.id, value=word)
    if not found:
        raise UnknownDevice(
            f"no device {word!r} in sandbox {sandbox.id}, which has {len(sandbox.manager)}: it is "
            "no ID, no beginning of one, and no path "
            "of an image that is attached; see pyblock list",
            sandbox=sandbox.id,
            value=word,
        )
    return found[0]


def _candidates(devices: Collection[Device], word: str) -> list[Device]:
    """An empty word, as an unset variable of a shell gives it, is the beginning of no ID."""
    if not word:
        return []
    path, identity = _as_kept(word), identity_of(word)
    return [
        device
        for device in devices
        if device.id.startswith(word) or _is_of(device, word, path, identity)
    ]


def _as_kept(word: str) -> str:
    try:
        return absolute(word)
    except InvalidImage:  # no path that a device has
        return word


def _is_of(device: Device, word: str, path: str, identity: object) -> bool:
    """By what the path is now, or by its text: the image may be gone."""
    if not isinstance(device, BlockDevice) or not device.info.path:
        return False
    return device.info.path in (word, path) or (
        identity is not None and device.identity == identity
    )


def _named(device: Device) -> str:
    return f"{device.id} ({device.info.path!r})" if isinstance(device, BlockDevice) else device.id
