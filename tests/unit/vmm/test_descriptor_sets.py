"""Which set of descriptors is whose: an answer of QEMU that is older than what happened meanwhile
changes nothing about that."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pyblock import ConnectionLost, VmmProtocolError
from pyblock.disk.image import open_image
from pyblock.vmm.qemu.descriptors import DescriptorSets
from pyblock.vmm.qemu.qmp import QmpSession

pytestmark = pytest.mark.anyio


class Monitor(QmpSession):
    """QEMU's sets, as it keeps them: the lowest free number is the next."""

    def __init__(self) -> None:
        super().__init__("nowhere")
        self.sets: dict[int, str] = {}
        self.breaks = False
        self.first_fd = 10

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, **_: Any
    ) -> msgspec.Raw:
        assert command == "add-fd" and arguments is not None
        number = min(set(range(len(self.sets) + 1)) - self.sets.keys())
        self.sets[number] = arguments["opaque"]
        if self.breaks:
            self._end(ConnectionLost("it broke right behind the reply"))
        return msgspec.Raw(msgspec.json.encode({"fdset-id": number, "fd": self.first_fd + number}))

    def send(self, command: str, arguments: Mapping[str, Any]) -> None:
        assert command == "remove-fd"
        self.sets.pop(arguments["fdset-id"], None)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    return path


async def hand_over(sets: DescriptorSets, drive_id: str, image: Path) -> int:
    with open_image(str(image), read_only=False) as opened:
        passed = await sets.pass_image(drive_id, opened)
    assert passed is not None
    return passed.set


async def test_a_drive_that_came_back_while_qemu_was_asked(image: Path) -> None:
    """Found by the storm: the answer knew its set of before, whose number was another drive's by
    then."""
    monitor = Monitor()
    sets = DescriptorSets(monitor)
    assert await hand_over(sets, "drive-a", image) == 0
    with sets.watched() as moved:
        answer = {"drive-a": 0}
        sets.remove("drive-a")
        assert await hand_over(sets, "drive-b", image) == 0
        assert await hand_over(sets, "drive-a", image) == 1
    sets.learn(answer, (), moved)
    sets.remove("drive-a")
    assert set(monitor.sets) == {0}
    sets.remove("drive-b")
    assert not monitor.sets


async def test_a_drive_that_came_while_qemu_was_asked(image: Path) -> None:
    """Its set is there and its node not yet: that is no set that nobody uses."""
    monitor = Monitor()
    sets = DescriptorSets(monitor)
    with sets.watched() as moved:
        assert await hand_over(sets, "drive-a", image) == 0
    sets.learn({}, [0], moved)
    assert await hand_over(sets, "drive-b", image) == 1
    assert set(monitor.sets) == {0, 1}


async def test_what_nobody_uses_goes_before_the_next_comes(image: Path) -> None:
    monitor = Monitor()
    monitor.sets = {0: "pb:f1:2", 1: "pb:f1:3"}
    sets = DescriptorSets(monitor)
    with sets.watched() as moved:
        pass
    sets.learn({"drive-a": 1}, [0], moved)
    assert await hand_over(sets, "drive-b", image) == 0
    sets.remove("drive-a")
    assert set(monitor.sets) == {0}


async def test_a_drive_that_went_while_qemu_was_asked(image: Path) -> None:
    monitor = Monitor()
    sets = DescriptorSets(monitor)
    await hand_over(sets, "drive-a", image)
    with sets.watched() as moved:
        sets.remove("drive-a")
    sets.learn({"drive-a": 0}, (), moved)
    assert not sets.drive_ids


async def test_a_number_is_worth_nothing_on_another_connection(image: Path) -> None:
    """Another QEMU, or this one after it has cleaned up, may have another image under it."""
    monitor = Monitor()
    sets = DescriptorSets(monitor)
    monitor.breaks = True
    with pytest.raises(ConnectionLost) as caught:
        await hand_over(sets, "drive-a", image)
    assert not caught.value.sent  # nothing that uses it
    assert not sets.drive_ids
    sets.note("drive-b", 0)
    monitor._end(ConnectionLost("it broke"))
    monitor.sets = {0: "another QEMU's"}
    sets.remove("drive-b")
    assert monitor.sets


async def test_what_was_unused_in_another_machine_stays(image: Path) -> None:
    monitor = Monitor()
    sets = DescriptorSets(monitor)
    sets.learn({}, [0], moved=set())
    monitor._end(ConnectionLost("it broke"))
    monitor.sets = {0: "another QEMU's"}
    monitor.on_resume()  # what is in use is not known, so nothing can be told to be unused
    assert await hand_over(sets, "drive-a", image) == 1
    assert 0 in monitor.sets


@pytest.mark.parametrize("program", ["cat", "qemu-system-none"])
async def test_the_number_is_looked_up_in_qemu_alone(
    program: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in between has its own descriptors under that number, and has passed on the right one
    all the same."""
    path = tmp_path / program
    shutil.copy(shutil.which("cat") or "", path)
    with subprocess.Popen([str(path)], stdin=subprocess.PIPE) as peer:
        monkeypatch.setattr(QmpSession, "peer", peer.pid)
        monitor = Monitor()
        monitor.first_fd = 0  # where the peer has a pipe
        sets = DescriptorSets(monitor)
        if program == "cat":
            assert await hand_over(sets, "drive-a", image) == 0
        else:
            with pytest.raises(VmmProtocolError, match="another file"):
                await hand_over(sets, "drive-a", image)
            assert not monitor.sets


async def test_a_set_whose_node_is_about_to_come_is_not_removed_for_the_next(image: Path) -> None:
    """Found by the storm: QEMU had listed the set of one that was being passed, and the next one,
    which goes before its node, had it removed as unused, and got its number."""
    monitor = Monitor()
    sets = DescriptorSets(monitor)
    answered = asyncio.Event()
    execute = monitor.execute

    async def slow(*arguments: Any, **more: Any) -> msgspec.Raw:
        raw = await execute(*arguments, **more)
        answered.set()
        await asyncio.sleep(0)
        return raw

    monitor.execute = slow  # type: ignore[method-assign]
    first = asyncio.ensure_future(hand_over(sets, "drive-a", image))
    second = asyncio.ensure_future(hand_over(sets, "drive-b", image))
    await answered.wait()
    sets.learn({}, [0], moved=set())
    assert list(await asyncio.gather(first, second)) == [0, 1]
    assert set(monitor.sets) == {0, 1}
