"""A device's row as a store has it, read past pyblock, so that it can be judged: what is not
written follows from the rest."""

from __future__ import annotations

import json
from typing import NamedTuple


class Written(NamedTuple):
    """What a row says of its device. `drive_id` is "" and `number` (its index) -1 where no drive is
    held."""

    phase: str
    attach_count: int
    drive_id: str
    number: int
    identity: tuple[str, int, int] | None


def written(device_id: str, data: bytes) -> Written:
    """What the row of that device says."""
    said = json.loads(data)
    index = said.get("index", -1)
    drive_id = said.get("drive_id", f"drive-{device_id}") if index >= 0 else ""
    identity = said.get("identity")
    return Written(
        said.get("phase", "attached"),
        said.get("attach_count", 1),
        drive_id,
        index,
        identity and tuple(identity),
    )
