"""What is no QMP monitor is told apart and changes nothing; once a monitor is there, the same
sandbox works."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from kit import Machine
from kit.proxy import Fault, Proxy
from support.snapshot import drive_ids, ordinals

from pyblock import DeadlinePassed, PyblockError, Sandbox, VmmProtocolError, VmmUnreachable
from pyblock.life.recovery import Outcome
from pyblock.vmm.qemu import qmp

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

ENOUGH = 60.0  # seconds: a deadline that is not meant to pass
PASSES = 0.1  # seconds: one that has to pass, since no answer comes
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, '
    b'"capabilities": []}}\r\n'
)

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(path: Path, talk: Talk) -> AsyncIterator[None]:
    """Something that listens there; its connections end with it."""
    clients: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        clients.add(task)
        try:
            await talk(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            clients.discard(task)
            writer.close()

    listening = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        listening.close()
        for client in list(clients):
            client.cancel()
        path.unlink(missing_ok=True)


def says(*texts: bytes, stay: bool) -> Talk:
    """Says one text at once and each other after having heard something; then hangs up, or stays
    without a word."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number, text in enumerate(texts):
            if number:
                await reader.read(65536)
            writer.write(text)
            await writer.drain()
        if stay:
            await asyncio.Event().wait()

    return talk


REFUSED = b'{"error": {"class": "GenericError", "desc": "no capabilities for you"}}\r\n'
HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"

SERVERS: dict[str, tuple[Talk, type[PyblockError]]] = {
    "hangs without a greeting": (says(stay=True), DeadlinePassed),
    "hangs half-way in the greeting": (says(GREETING[:30], stay=True), DeadlinePassed),
    "hangs after the greeting": (says(GREETING, stay=True), DeadlinePassed),
    "closes at once": (says(stay=False), VmmProtocolError),
    "closes half-way in the greeting": (says(GREETING[:30], stay=False), VmmProtocolError),
    "closes after the greeting": (says(GREETING, stay=False), VmmProtocolError),
    "garbage": (says(b"hello\n", stay=True), VmmProtocolError),
    "garbage that is no UTF-8": (says(b"\xff\xfe\x00\xd8\n", stay=True), VmmProtocolError),
    "another JSON": (says(b'{"hello": 1}\n', stay=True), VmmProtocolError),
    "JSON that is no object": (says(b"[1]\n", stay=True), VmmProtocolError),
    "HTTP": (says(HTTP, stay=True), VmmProtocolError),
    "HTTP after hearing something": (says(b"", HTTP, stay=False), DeadlinePassed),
    "refuses qmp_capabilities": (says(GREETING, REFUSED, stay=True), VmmProtocolError),
    "garbage after the greeting": (says(GREETING, b"hello\n", stay=True), VmmProtocolError),
    "garbage after the greeting that is no UTF-8": (
        says(GREETING, b"\x00\xff no JSON\n", stay=True),
        VmmProtocolError,
    ),
}


async def is_refused(
    sandbox: Sandbox, image: Path, kind: type[PyblockError], path: Path, timeout: float = ENOUGH
) -> None:
    with pytest.raises(kind) as caught:
        await sandbox.attach(image, device_id="x", timeout=timeout)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value) or sandbox.id in str(caught.value)
    assert (sandbox.devices, list(sandbox.index), ordinals(sandbox), drive_ids(sandbox)) == (
        [],
        [],
        {},
        set(),
    )
    assert not sandbox._machine.running


async def works(sandbox: Sandbox, machine: Machine, image: Path, path: Path) -> None:
    async with Proxy(path, machine.qmp_path):
        device = await sandbox.attach(image, device_id="x", timeout=ENOUGH)
        assert device.held.index == 0
        assert "drive-x" in {
            entry["name"] for entry in machine.side.command("qom-list", path="/machine/peripheral")
        }
        await sandbox.detach(device, timeout=ENOUGH)
        assert "drive-x" not in {
            entry["name"] for entry in machine.side.command("qom-list", path="/machine/peripheral")
        }
        await sandbox.close()


@pytest.mark.parametrize("name", SERVERS)
async def test_what_answers_is_no_monitor(bare_machine: Machine, name: str) -> None:
    talk, kind = SERVERS[name]
    path, image = bare_machine.folder / "other", bare_machine.image("disk")
    async with Sandbox("s1", f"qemu:{path}") as sandbox:
        async with server(path, talk):
            for _ in range(2):
                await is_refused(
                    sandbox, image, kind, path, PASSES if kind is DeadlinePassed else ENOUGH
                )
        await works(sandbox, bare_machine, image, path)


async def test_a_silent_one_that_stays_is_given_up(bare_machine: Machine) -> None:
    path, image = bare_machine.folder / "other", bare_machine.image("disk")
    async with Sandbox("s1", f"qemu:{path}") as sandbox, server(path, says(stay=True)):
        await is_refused(sandbox, image, DeadlinePassed, path, PASSES)
        path.unlink()  # its connections stay
        await works(sandbox, bare_machine, image, path)


async def test_no_greeting_without_a_deadline(
    bare_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "CONNECT_TIMEOUT", PASSES)
    path, image = bare_machine.folder / "other", bare_machine.image("disk")
    async with Sandbox("s1", f"qemu:{path}") as sandbox, server(path, says(stay=True)):
        with pytest.raises(VmmUnreachable, match="no QMP greeting"):
            await sandbox.attach(image, timeout=None)


def absent(path: Path) -> None:
    pass


def nobody_listens(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def datagrams(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(path))


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (absent, "No such file"),
    "regular file": (lambda path: path.write_bytes(b"x"), "not a socket"),
    "folder": (Path.mkdir, "not a socket"),
    "FIFO": (os.mkfifo, "not a socket"),
    "nobody listens": (nobody_listens, "refused"),
    "datagram socket": (datagrams, "socket"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
}


@pytest.mark.parametrize("name", PLACES)
async def test_there_is_no_monitor(bare_machine: Machine, name: str) -> None:
    make, text = PLACES[name]
    path, image = bare_machine.folder / "other", bare_machine.image("disk")
    make(path)
    async with Sandbox("s1", f"qemu:{path}") as sandbox:
        for _ in range(2):
            await is_refused(sandbox, image, VmmUnreachable, path)
        with pytest.raises(VmmUnreachable, match=text):
            await sandbox.attach(image)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        await works(sandbox, bare_machine, image, path)


async def test_length_of_a_socket_path(bare_machine: Machine) -> None:
    image = bare_machine.image("disk")
    for name, text in (("x" * 120, "107"), ("ä" * 50, "107"), ("nul\0", "null (byte|character)")):
        path = bare_machine.folder / name
        async with Sandbox("s1", f"qemu:{path}") as sandbox:
            with pytest.raises(VmmUnreachable, match=text):
                await sandbox.attach(image, timeout=ENOUGH)
            assert (sandbox.devices, list(sandbox.index)) == ([], [])
    longest = bare_machine.folder / ("x" * (107 - len(f"{bare_machine.folder}/")))
    assert len(str(longest)) == 107
    async with Sandbox("s1", f"qemu:{longest}") as sandbox:
        await works(sandbox, bare_machine, image, longest)


@pytest.mark.parametrize("fault", [Fault.CLOSE_BEFORE, Fault.GARBAGE])
async def test_a_connection_that_breaks_is_made_again(bare_machine: Machine, fault: Fault) -> None:
    images = [bare_machine.image(name) for name in ("one", "two", "three")]
    async with (
        Proxy(bare_machine.folder / "proxy", bare_machine.qmp_path) as proxy,
        Sandbox("s1", f"qemu:{proxy.path}") as sandbox,
    ):
        await sandbox.attach(images[0], timeout=ENOUGH)
        proxy.expect(fault, "blockdev-add")
        with pytest.raises(PyblockError):
            await sandbox.attach(images[1], timeout=ENOUGH)
        # the machine can be asked again
        [settled] = [one.outcome for one in await sandbox.reconcile()]
        assert settled in (Outcome.FREED, Outcome.REMOVED)
        assert (await sandbox.attach(images[2], timeout=ENOUGH)).held.index == 1
        assert list(sandbox.index) == [0, 1]
