"""The formats that QEMU itself makes are known by what they begin with.

Not LUKS: to make one, QEMU measures the machine's speed, which fails on a busy one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kit import Machine

from pyblock import InvalidImage, Sandbox
from pyblock.disk.formats import HEAD, format_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

SIZE = 8 << 20


def create(machine: Machine, path: Path, driver: str, **more: Any) -> None:
    """Has QEMU make an image of that format; skips where it has no such driver."""
    path.touch()
    side = machine.side
    side.command("blockdev-add", {"driver": "file", "node-name": "new", "filename": str(path)})
    options = {"driver": driver, "file": "new", "size": SIZE, **more}
    reply = side.raw(
        {"execute": "blockdev-create", "arguments": {"job-id": "create", "options": options}}
    )
    if "error" in reply:
        pytest.skip(f"this QEMU makes no {driver}: {reply['error']['desc']}")
    side.wait_event("JOB_STATUS_CHANGE", id="create", status="concluded")
    [job] = side.command("query-jobs")
    side.command("job-dismiss", id="create")
    side.command("blockdev-del", {"node-name": "new"})
    assert "error" not in job, job["error"]


@pytest.mark.parametrize(
    ("driver", "name", "more"),
    [
        ("qcow2", "qcow2", {}),
        ("qcow2", "qcow2", {"version": "v2"}),
        ("qcow", "qcow", {}),
        ("qed", "qed", {}),
        ("vmdk", "vmdk", {}),
        ("vhdx", "vhdx", {}),
        ("vpc", "vhd", {"force-size": True}),
        ("vdi", "vdi", {}),
        ("parallels", "parallels", {}),
    ],
)
async def test_what_qemu_makes(
    bare_machine: Machine, tmp_path: Path, driver: str, name: str, more: dict[str, Any]
) -> None:
    path = tmp_path / "img"
    create(bare_machine, path, driver, **more)
    with path.open("rb") as file:
        assert format_of(file.read(HEAD)) == name
    async with Sandbox("s1", f"qemu:{bare_machine.qmp_path}", store=None) as sandbox:
        with pytest.raises(InvalidImage, match=f"begins like {name},"):
            await sandbox.attach(path)
        device = await sandbox.attach(path, format="raw")
        nodes = {
            node["node-name"]: node
            for node in bare_machine.side.command("query-named-block-nodes", flat=True)
        }
        node = nodes[device.held.id]
        sectors = -(-path.stat().st_size // 512)
        # its bytes, whatever they are
        assert (node["drv"], node["image"]["virtual-size"]) == ("file", sectors * 512)
