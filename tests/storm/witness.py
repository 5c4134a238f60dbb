"""What a QEMU and the store themselves say: read past pyblock, so that it can judge.

Images are told by inode, whether QEMU opened a path or was handed a descriptor (/dev/fdset/N,
looked up in /proc).
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from kit import Machine, QmpRefused
from support.written import written

from .notes import DeviceSeen

READ_ONLY, SHARE = 1, 2  # the bits of `access`
FDSET = "/dev/fdset/"


class Images:
    """:param folder: where all images are."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self._names: dict[tuple[int, int], str] = {}
        for name in names:
            with (folder / name).open("xb") as file:
                file.truncate(1 << 20)
            status = (folder / name).stat()
            self._names[status.st_dev, status.st_ino] = name

    def name(self, path: str) -> str:
        """The image that a path leads to now; the path itself where it is none."""
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:
            return path
        return self._names.get((status.st_dev, status.st_ino), path)

    def claimed(self, claim: str) -> str:
        """The image that a claim of the store names ("file:<device>:<inode>")."""
        _, device, inode = claim.split(":")[:3]
        return self._names.get((int(device), int(inode)), claim)


class Open(NamedTuple):
    """An image as a QEMU has it open."""

    image: str
    read_only: bool


class Lists(NamedTuple):
    """:ivar backends: drive ID to the image behind it.
    :ivar devices: drive IDs that the guest has.
    :ivar others: images that are open without belonging to a drive.
    :ivar idle: sets of descriptors that nothing uses, with what is in them.
    :ivar gone: the devices that left since the last time.
    """

    backends: dict[str, Open]
    devices: set[str]
    others: list[str]
    idle: list[str]
    gone: set[str]


def ask_qemu(machine: Machine, images: Images) -> Lists:
    """QEMU's own lists."""
    side = machine.side
    nodes = side.command("query-named-block-nodes", flat=True)
    sets = {f"{FDSET}{one['fdset-id']}": one["fds"] for one in side.command("query-fdsets")}

    def image(file: str) -> str:
        if file.startswith(FDSET):
            fds = sets.get(file) or []
            file = f"/proc/{machine.pid}/fd/{fds[0]['fd']}" if fds else file
        return images.name(file)

    backends = {
        node["node-name"]: Open(image(node["file"]), node["ro"])
        for node in nodes
        if node["node-name"].startswith("drive-")
    }
    files = {node["file"] for node in nodes if node["node-name"] in backends}
    others = [
        f"{node['node-name']} {node['file']}"
        for node in nodes
        if node["node-name"] not in backends and node["file"] not in files
    ]
    for entry in side.command("qom-list", path="/objects"):
        if entry["name"].startswith("drive-"):
            backends[entry["name"]] = _memory(machine, images, entry["name"])
    devices = {entry["name"] for entry in side.command("qom-list", path="/machine/peripheral")}
    used = {node["file"] for node in nodes}
    idle = [f"{name} {fds}" for name, fds in sets.items() if name not in used]
    gone = {
        event.get("data", {}).get("device", "")
        for event in side.events
        if event["event"] == "DEVICE_DELETED"
    }
    side.events.clear()
    return Lists(
        backends, {name for name in devices if name.startswith("drive-")}, others, idle, gone
    )


def _memory(machine: Machine, images: Images, name: str) -> Open:
    """The image behind a memory object. A path of /proc/self means nothing later, so the mapping
    tells."""
    try:
        path, read_only = (
            machine.side.command("qom-get", path=f"/objects/{name}", property=key)
            for key in ("mem-path", "readonly")
        )
    except QmpRefused:  # it went meanwhile
        return Open("", True)
    if path.startswith("/proc/"):
        for line in Path(f"/proc/{machine.pid}/maps").read_text().splitlines():
            _, access, *_, file = line.split(None, 5)
            mapped = images.name(file.strip())
            if access.endswith("s") and mapped != file.strip():
                return Open(mapped, read_only)
    return Open(images.name(path), read_only)


class Stored(NamedTuple):
    """A device's row."""

    sandbox: str
    id: str
    phase: str
    attaches: int
    drive: str
    number: int
    image: str
    access: int

    def fits(self, other: Stored) -> bool:
        """Whether two claims on one image may both hold."""
        return (
            self.image != other.image
            or self.sandbox == other.sandbox
            or bool(self.access & other.access)
        )


def read_rows(path: Path, images: Images) -> list[Stored]:
    """The rows of all sandboxes, in one look."""
    found: list[Stored] = []
    with closing(sqlite3.connect(path, timeout=30)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'device'").fetchone():
            return found  # the first process has not come so far
        for name, device_id, state, image, access in db.execute(
            "SELECT sandbox, id, state, image, access FROM device ORDER BY rowid"
        ):
            said = written(device_id, state)
            claimed = images.claimed(image) if image is not None else ""
            found.append(
                Stored(
                    name,
                    device_id,
                    said.phase,
                    said.attach_count,
                    said.drive_id,
                    said.number,
                    claimed,
                    access or 0,
                )
            )
    return found


def rivals(rows: list[Stored]) -> list[str]:
    """Claims that may not stand beside each other."""
    by_image: dict[str, list[Stored]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    return [
        f"the store lets two have {image}: {one} and {other}"
        for image, several in by_image.items()
        if image
        for place, one in enumerate(several)
        for other in several[place + 1 :]
        if not one.fits(other)
    ]


def differences(
    devices: list[DeviceSeen], indexes: list[int], rows: list[Stored], lists: Lists
) -> list[str]:
    """Where a sandbox that has settled, its rows and its QEMU differ."""
    wrong = []
    drives = {device.drive: device for device in devices}
    if len(drives) != len(devices) or "" in drives:
        wrong.append("two of its devices have one drive ID, or one has none")
    wrong += [
        f"QEMU has the device {name}, which no device of the sandbox is"
        for name in sorted(lists.devices - drives.keys())
    ]
    wrong += [
        f"QEMU has the backend {name} ({lists.backends[name]}), which no device of the sandbox is"
        for name in sorted(lists.backends.keys() - drives.keys())
    ]
    wrong += [f"QEMU has an image open for no drive: {other}" for other in lists.others]
    for name, device in drives.items():
        if name not in lists.devices:
            wrong.append(f"QEMU has no device {name}: {device}")
        opened = lists.backends.get(name)
        if opened is None:
            wrong.append(f"QEMU has no backend {name}: {device}")
        elif opened != (device.image, device.read_only):
            wrong.append(f"QEMU has {opened} as the backend of {device}")
    for key in ("index", "ordinal"):
        numbers = [
            (device.driver if key == "ordinal" else "", getattr(device, key)) for device in devices
        ]
        if len(set(numbers)) != len(numbers):
            wrong.append(f"two devices have one {key}: {numbers}")
    if sorted(indexes) != sorted(device.index for device in devices):
        wrong.append(
            f"the indexes {indexes} are taken; its devices have "
            f"{[device.index for device in devices]}"
        )
    have = {
        row.id: _comparable(row.phase, row.attaches, row.drive, row.number, row.image, row.access)
        for row in rows
    }
    want = {
        device.id: _comparable(
            device.phase,
            device.count,
            device.drive,
            device.index,
            device.image,
            READ_ONLY * device.read_only | SHARE * device.share,
        )
        for device in devices
    }
    for device_id in sorted(have.keys() | want.keys()):
        if have.get(device_id) != want.get(device_id):
            wrong.append(
                f"device {device_id}: its row says {have.get(device_id)}, the sandbox "
                f"{want.get(device_id)}"
            )
    return wrong


def _comparable(phase: str, count: int, *rest: object) -> tuple[object, ...]:
    """Under way in memory is pending in the row; whether that is a detach or an attach being
    undone, only the row need know."""
    if phase != "attached":
        return ("pending", *rest)
    return (phase, count, *rest)
