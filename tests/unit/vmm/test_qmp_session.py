"""A session against servers that send too much, too little, or what would drive a terminal: nothing
grows, and each is told by name."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pyblock import (
    ConnectionLost,
    DeadlinePassed,
    Sandbox,
    VmmProtocolError,
    VmmRefused,
    VmmUnreachable,
)
from pyblock.disk.drivers import VIRTIO_SCSI
from pyblock.disk.model import BlockDrive, DeviceInfo
from pyblock.vmm.qemu import qmp, qmp_connection
from pyblock.vmm.qemu.adapter import QemuHypervisor
from pyblock.vmm.qemu.qmp import QmpSession, Question
from pyblock.vmm.qemu.qmp_connection import Command as Wanted
from pyblock.vmm.turns import MESSAGES_MAX

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, '
    b'"capabilities": ["oob"]}}\r\n'
)
EVENT = (
    b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "BLOCK_IO_ERROR", "data": '
    b'{"device": "drive-x", "reason": "no"}}\r\n'
)
ENOUGH = 60.0  # seconds: a deadline that is not meant to pass

Command = dict[str, Any]
Answer = Callable[[Command, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def path() -> Iterator[Path]:
    # short: a unix socket's path ends at 107 bytes
    with tempfile.TemporaryDirectory(prefix="pyblock-") as folder:
        yield Path(folder, "qmp")


def reply(command: Command, value: Any = None) -> bytes:
    return (
        json.dumps({"return": {} if value is None else value, "id": command["id"]}).encode()
        + b"\r\n"
    )


@asynccontextmanager
async def monitor(path: Path, answer: Answer, *, behind: bytes = b"") -> AsyncIterator[None]:
    """Greets, takes capabilities, and leaves the rest to `answer`. `behind` goes out with the first
    reply to the capabilities."""
    clients: set[asyncio.Task[None]] = set()
    more = [behind]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        clients.add(task)
        try:
            writer.write(GREETING)
            while line := await reader.readline():
                command = json.loads(line)
                if command["execute"] == "qmp_capabilities":
                    writer.write(reply(command) + (more.pop() if more else b""))
                else:
                    await answer(command, writer)
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
        if clients:
            await asyncio.wait(clients)


async def answered(command: Command, writer: asyncio.StreamWriter) -> None:
    writer.write(reply(command))


@asynccontextmanager
async def opened(path: Path, answer: Answer = answered) -> AsyncIterator[QmpSession]:
    session = QmpSession(str(path))
    async with monitor(path, answer):
        try:
            yield session
        finally:
            await session.close()


async def test_events_are_kept_nowhere(path: Path) -> None:
    """50,000 of them, below what a peer may send at once, beside commands that are answered."""

    async def talkative(command: Command, writer: asyncio.StreamWriter) -> None:
        for _ in range(50):
            writer.write(EVENT * 100)
            await writer.drain()
        writer.write(reply(command))

    async with opened(path, talkative) as session:
        await session.execute("query-status")
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(9):
                await session.execute("query-status")
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # one byte an event would be 45,000 bytes, qemu.qmp's 1.7 KB 75 MB
        assert after - before < 500_000


async def test_a_flood_loses_its_connection(path: Path) -> None:
    sent = 0

    async def flood(command: Command, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < 1_000_000:
            writer.write(EVENT * 1000)
            await writer.drain()
            sent += 1000

    async with opened(path, flood) as session:
        gone = await session.leaving("drive-x")
        with pytest.raises(VmmProtocolError, match="events within") as caught:
            await session.execute("query-status")
        assert caught.value.sent
        assert sent < 1_000_000
        with pytest.raises(VmmProtocolError):
            await gone


async def test_a_line_without_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_connection, "LINE_MAX", 1 << 20)

    async def endless(command: Command, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with opened(path, endless) as session:
        with pytest.raises(VmmProtocolError, match="over 1048576 bytes"):
            await session.execute("query-status")


async def test_a_peer_that_does_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_connection, "UNSENT_MAX", 1 << 20)

    async def deaf(command: Command, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with opened(path, deaf) as session:
        going: list[asyncio.Future[Any]] = []
        with pytest.raises(VmmUnreachable, match="wait to be read"):
            for _ in range(1000):
                task = asyncio.ensure_future(session.execute("x", {"text": "x" * 10_000}))
                going.append(task)
                await asyncio.sleep(0)
                if task.done():
                    task.result()
        await session.close()
        ends = await asyncio.gather(*going, return_exceptions=True)
        # some were on their way, the others were not sent
        assert {type(end) for end in ends} == {ConnectionLost, VmmUnreachable}


async def test_what_nobody_waits_for_any_more_is_not_sent(path: Path) -> None:
    """A caller looks at a stopped machine again and again. When it goes on, it has little to catch
    up with."""
    stopped = asyncio.Event()
    heard: list[str] = []

    async def answer(command: Command, writer: asyncio.StreamWriter) -> None:
        heard.append(command["execute"])
        await stopped.wait()
        await answered(command, writer)

    async with opened(path, answer) as session:
        first = asyncio.create_task(session.execute("first"))
        while not heard:
            await asyncio.sleep(0)
        for number in range(5000):
            asking = asyncio.create_task(
                session.execute("query", {"padding": "x" * 1000, "number": number})
            )
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking])
        stopped.set()
        await first
        await session.execute("last")
        assert heard[0] == "first" and heard[-1] == "last"
        assert len(heard) < 2000  # what the sockets and the server's reader hold
        assert session._connection is not None and not session._connection._asked


async def test_a_removal_is_asked_for_again_once_at_a_time(path: Path) -> None:
    """Whoever calls detach again and again while QEMU is stopped does not pile up requests."""
    heard, goes_on = asyncio.Event(), asyncio.Event()
    count = 0

    async def answer(command: Command, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += command["execute"] == "device_del"
        heard.set()
        await goes_on.wait()
        await answered(command, writer)

    async with monitor(path, answer):
        adapter = QemuHypervisor(str(path))
        drive = BlockDrive("drive-x", 0, 0, 0, VIRTIO_SCSI, DeviceInfo("/x"))
        for _ in range(100):
            adapter.nudge(drive)
        await heard.wait()
        adapter.nudge(drive)
        goes_on.set()
        while adapter._nudges:
            await asyncio.sleep(0)
        assert count == 1
        adapter.nudge(drive)
        while adapter._nudges:
            await asyncio.sleep(0)
        assert count == 2
        await adapter.close()


async def test_a_peer_that_reads_and_never_answers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp_connection, "UNANSWERED_MAX", 10)

    async def mute(command: Command, writer: asyncio.StreamWriter) -> None:
        pass

    async with opened(path, mute) as session:
        for _ in range(10):  # whoever asked has gone, and the answer may still come
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await session.execute("query-status")
        for _ in range(30):
            with pytest.raises((VmmUnreachable, TimeoutError)) as caught:
                async with asyncio.timeout(0.01):
                    await session.execute("query-status")
            if isinstance(caught.value, VmmUnreachable):
                assert "10 commands for its answer" in str(caught.value)
                return
        pytest.fail("more than ten commands wait for an answer")


class Node(msgspec.Struct):
    name: str = msgspec.field(name="node-name")


async def test_a_large_reply_is_read_in_linear_time(path: Path) -> None:
    """Twice as much takes about twice as long: what was read is not looked at again with every
    piece that comes."""
    node = {"node-name": "drive-x", "file": "x" * 800}

    async def large(command: Command, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(command, [node] * command["arguments"]["count"]))

    async with opened(path, large) as session:
        costs = []
        for count in (1, 2_500, 40_000):
            begun = time.process_time()
            assert len(await session.ask(list[Node], "query", {"count": count})) == count
            costs.append(time.process_time() - begun)
        assert costs[2] < 16 * costs[1] * 4  # quadratic would be 256 times as much


async def test_replies_of_an_earlier_client(path: Path) -> None:
    async def stray(command: Command, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'{"return": {"fd": 5}, "id": 3}\r\n{"return": {}, "id": "libvirt-7"}\r\n'
            + reply(command, {"node-name": "x"})
        )

    async with opened(path, stray) as session:
        assert (await session.ask(Node, "query")).name == "x"


async def test_a_command_that_was_cancelled_is_answered_to_nobody(path: Path) -> None:
    held = asyncio.Event()

    async def slow(command: Command, writer: asyncio.StreamWriter) -> None:
        if command["execute"] == "slow":
            await held.wait()
        writer.write(reply(command, {"node-name": command["execute"]}))

    async with opened(path, slow) as session:
        late: list[bytes] = []
        await session.execute("first")
        task = asyncio.create_task(
            session.execute("slow", late=lambda raw: late.append(bytes(raw)))
        )
        await asyncio.sleep(0)
        other = asyncio.create_task(session.ask(Node, "other"))
        await asyncio.sleep(0)
        task.cancel()
        held.set()
        assert (await other).name == "other"
        await asyncio.wait([task])
        assert task.cancelled()
        assert late == [b'{"node-name": "slow"}']


async def test_what_would_drive_a_terminal_is_escaped(path: Path) -> None:
    async def rude(command: Command, writer: asyncio.StreamWriter) -> None:
        error = {
            "class": "Generic\x1b[2J",
            "desc": "Could not open '\x1b]0;owned\x07\u202egmi.\n" + "x" * 10_000,
        }
        writer.write(json.dumps({"error": error, "id": command["id"]}).encode() + b"\r\n")

    async with opened(path, rude) as session:
        with pytest.raises(VmmRefused) as caught:
            await session.execute("blockdev-add")
    for text in (str(caught.value), caught.value.reply["desc"], caught.value.reply["class"]):
        assert text.isprintable() and len(text) < 1000
    assert "owned" in str(caught.value)


async def test_each_descriptor_goes_with_its_own_command(path: Path) -> None:
    """The next is sent when the one before is answered, also when whoever sent that has gone."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.setblocking(False)
        session = QmpSession(str(path))
        files = [os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)]
        loop = asyncio.get_running_loop()
        try:
            first = asyncio.create_task(
                session.execute("add-fd", {"opaque": "null"}, descriptor=files[0])
            )
            peer, _ = await loop.sock_accept(listening)
            with peer:
                peer.setblocking(True)
                peer.settimeout(ENOUGH)
                peer.sendall(GREETING)
                peer.setblocking(False)
                command = json.loads(await loop.sock_recv(peer, 65536))
                await loop.sock_sendall(peer, reply(command))
                await until_readable(peer)
                data, got, _, _ = socket.recv_fds(peer, 65536, 8)
                second = asyncio.create_task(
                    session.execute("add-fd", {"opaque": "zero"}, descriptor=files[1])
                )
                first.cancel()
                for _ in range(20):
                    await asyncio.sleep(0)
                with pytest.raises(BlockingIOError):
                    peer.recv(1)
                await loop.sock_sendall(peer, reply(json.loads(data)))
                await until_readable(peer)
                data, more, _, _ = socket.recv_fds(peer, 65536, 8)
                await loop.sock_sendall(peer, reply(json.loads(data)))
                await second
                assert json.loads(data)["arguments"]["opaque"] == "zero"
                assert [str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in got + more] == [
                    "/dev/null",
                    "/dev/zero",
                ]
                for fd in got + more:
                    os.close(fd)
        finally:
            await session.close()
            for fd in files:
                os.close(fd)


async def until_readable(peer: socket.socket) -> None:
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(peer, readable.set)
    try:
        async with asyncio.timeout(ENOUGH):
            await readable.wait()
    finally:
        asyncio.get_running_loop().remove_reader(peer)


# A monitor that does not greet.


async def test_a_monitor_that_another_client_holds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "CONNECT_TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        session = QmpSession(str(path))
        with pytest.raises(VmmUnreachable, match=r"no QMP greeting .*another client may hold it"):
            await session.execute("query-status")
        going = asyncio.create_task(session.execute("query-status"))
        while not session.waits_for:
            await asyncio.sleep(0)
        assert "another client" in session.waits_for  # for whoever has a deadline of its own
        going.cancel()
        await session.close()


async def test_a_monitor_whose_queue_is_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses a further client at once; it is tried again until the time is up, or there
    is a place."""
    monkeypatch.setattr(qmp, "CONNECT_TIMEOUT", 0.2)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0)
        crowd = []
        try:
            while True:
                client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                crowd.append(client)
                client.connect(str(path))
        except BlockingIOError:
            pass
        session = QmpSession(str(path))
        with pytest.raises(VmmUnreachable, match="queue of clients is full"):
            await session.execute("query-status")
        for client in crowd:
            client.close()
        await session.close()


async def test_a_deadline_says_what_it_was_waited_for(path: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        async with Sandbox("one", f"qemu:{path}", store=None) as sandbox:
            for call in (sandbox.attach(image, timeout=0.05), sandbox.reconcile(timeout=0.05)):
                with pytest.raises(DeadlinePassed, match="another client may hold it"):
                    await call
            assert not sandbox.devices


STOPPED = (
    "import os, signal, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); "
    "s.listen(); print(flush=True); signal.pause()"
)


async def test_a_process_that_is_stopped_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "CONNECT_TIMEOUT", 0.05)
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(path)], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            session = QmpSession(str(path))
            with pytest.raises(
                VmmUnreachable, match=f"process {process.pid}, which has it open, is stopped"
            ):
                await session.execute("query-status")
            await session.close()
        finally:
            process.kill()


async def test_a_connection_that_ends_as_it_begins(path: Path) -> None:
    """What ended it came with the very reply that opened it. It is not kept for the commands to
    come."""
    session = QmpSession(str(path))
    async with monitor(path, answered, behind=b"no JSON {\n"):
        with pytest.raises(VmmProtocolError, match="does not speak QMP"):
            await session.execute("query-a")
        assert bytes(await session.execute("query-b")) == b"{}"
        await session.close()


# Two commands in one write.

NODE = Wanted("blockdev-add", {"node-name": "drive-x"}, "backend-add")
DEVICE = Wanted("device_add", {"id": "drive-x"}, "device-add")


def refusal(command: Command) -> bytes:
    error = {"class": "GenericError", "desc": f"no {command['execute']}"}
    return json.dumps({"error": error, "id": command["id"]}).encode() + b"\r\n"


@asynccontextmanager
async def by_hand(path: Path) -> AsyncIterator[tuple[QmpSession, socket.socket]]:
    """A session, and its peer as a socket that is greeted and left alone from then on."""
    loop = asyncio.get_running_loop()
    session = QmpSession(str(path))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.setblocking(False)
        opening = asyncio.create_task(session.execute("query-first"))
        peer, _ = await loop.sock_accept(listening)
        with peer:
            peer.setblocking(False)
            await loop.sock_sendall(peer, GREETING)
            for _ in range(2):
                await loop.sock_sendall(peer, reply(json.loads(await loop.sock_recv(peer, 65536))))
            await opening
            try:
                yield session, peer
            finally:
                await session.close()


async def ends(futures: tuple[asyncio.Future[msgspec.Raw], ...]) -> list[Any]:
    """What each of them ended in: an error's type, or the reply."""
    async with asyncio.timeout(ENOUGH):
        found = await asyncio.gather(*futures, return_exceptions=True)
    return [type(one) if isinstance(one, BaseException) else bytes(one) for one in found]


@pytest.mark.parametrize("offered", [["oob"], [], ["other"], "text", [5]], ids=str)
async def test_out_of_band_is_not_asked_for(path: Path, offered: object) -> None:
    """With it QEMU reads a command while it carries out the one before, and crashes when that one
    passes a descriptor."""
    greeting = json.dumps({"QMP": {"version": {}, "capabilities": offered}}).encode() + b"\r\n"
    asked: list[Command] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        while line := await reader.readline():
            asked.append(json.loads(line))
            writer.write(reply(asked[-1]))
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        session = QmpSession(str(path))
        await session.execute("query-status")
        await session.close()
    assert asked[0]["execute"] == "qmp_capabilities"
    assert not asked[0].get("arguments")


@pytest.mark.parametrize("refused", [(), (0,), (1,), (0, 1)], ids=str)
async def test_both_go_in_one_write(path: Path, refused: tuple[int, ...]) -> None:
    async with by_hand(path) as (session, peer):
        both = await session.send_both(NODE, DEVICE)
        lines = [json.loads(line) for line in peer.recv(65536).splitlines()]  # all of it is there
        assert [(one["execute"], one["arguments"]) for one in lines] == [NODE[:2], DEVICE[:2]]
        peer.sendall(
            b"".join(
                refusal(one) if number in refused else reply(one)
                for number, one in enumerate(lines)
            )
        )
        assert await ends(both) == [
            VmmRefused if number in refused else b"{}" for number in range(2)
        ]
        for number in refused:
            error = both[number].exception()
            assert isinstance(error, VmmRefused) and error.step == (NODE, DEVICE)[number].step


async def test_both_end_with_the_connection(path: Path) -> None:
    """Before either is answered, and between the two answers."""
    async with by_hand(path) as (session, peer):
        both = await session.send_both(NODE, DEVICE)
        peer.close()
        assert await ends(both) == [ConnectionLost, ConnectionLost]
    path.unlink()
    async with by_hand(path) as (session, peer):
        both = await session.send_both(NODE, DEVICE)
        first, _ = peer.recv(65536).splitlines()
        peer.sendall(reply(json.loads(first)))
        peer.close()
        assert await ends(both) == [b"{}", ConnectionLost]


async def test_an_odd_answer_to_the_first_of_both(path: Path) -> None:
    async with by_hand(path) as (session, peer):
        both = await session.send_both(NODE, DEVICE)
        first, second = (json.loads(line) for line in peer.recv(65536).splitlines())
        peer.sendall(json.dumps({"id": first["id"]}).encode() + b"\n" + reply(second))
        assert await ends(both) == [VmmProtocolError, b"{}"]


async def test_how_much_of_both_was_sent(path: Path) -> None:
    """Each is told by its own bytes: of what the peer may have read nobody can know, of the rest
    everybody."""
    large = Wanted("blockdev-add", {"node-name": "x" * (1 << 20)}, "backend-add")
    async with by_hand(path) as (session, _):
        first, second = await session.send_both(large, DEVICE)
        third, fourth = await session.send_both(NODE, DEVICE)
        await session.close()
        assert await ends((first, second, third, fourth)) == [ConnectionLost, *[VmmUnreachable] * 3]
        with pytest.raises(VmmUnreachable, match="before device_add was sent"):
            second.result()


async def test_both_are_cut_in_the_second(path: Path) -> None:
    large = Wanted("device_add", {"id": "x" * (1 << 20)}, "device-add")
    async with by_hand(path) as (session, peer):
        both = await session.send_both(NODE, large)
        first, _, _ = peer.recv(65536).partition(b"\n")
        await asyncio.get_running_loop().sock_sendall(peer, reply(json.loads(first)))
        await both[0]
        await session.close()
        assert await ends(both) == [b"{}", ConnectionLost]


async def test_neither_is_sent_when_nobody_waits_for_the_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them alone would be half of what was wanted."""
    monkeypatch.setattr(qmp_connection, "_TIDY_MIN", 1)
    loop = asyncio.get_running_loop()
    async with by_hand(path) as (session, peer):
        assert session._connection is not None
        session._connection._tidy_at = 1
        large = asyncio.ensure_future(session.execute("large", {"text": "x" * (1 << 20)}))
        await asyncio.sleep(0)
        for cancelled in ((0,), (1,), (0, 1), ()):
            both = await session.send_both(NODE, DEVICE)
            for number in cancelled:
                both[number].cancel()
        last = asyncio.ensure_future(session.execute("last"))
        await asyncio.sleep(0)
        heard = b""
        while b'"last"' not in heard:
            heard += await loop.sock_recv(peer, 1 << 20)
        names = [json.loads(line)["execute"] for line in heard.splitlines()]
        assert names == ["large", *["blockdev-add", "device_add"] * 2, "last"]
        await loop.sock_sendall(
            peer, b"".join(reply(json.loads(line)) for line in heard.splitlines())
        )
        await asyncio.gather(large, last)


async def test_a_descriptor_leaves_with_its_own_command(path: Path) -> None:
    """Also when it waits behind others, with which it could have gone in one write."""
    loop, size = asyncio.get_running_loop(), 1 << 20
    async with by_hand(path) as (session, peer):
        waiting = [asyncio.ensure_future(session.execute("large", {"text": "x" * size}))]
        waiting += [
            asyncio.ensure_future(session.execute(f"query-{number}")) for number in range(3)
        ]
        await asyncio.sleep(0)
        with open("/dev/null", "rb") as file:  # noqa: PTH123
            waiting.append(
                asyncio.ensure_future(session.execute("add-fd", descriptor=file.fileno()))
            )
            await asyncio.sleep(0)
        waiting.append(asyncio.ensure_future(session.execute("query-last")))
        await asyncio.sleep(0)
        heard, found = b"", []
        while b"query-last" not in heard:
            await until_readable(peer)
            # in the end byte by byte, as QEMU
            data, descriptors, _, _ = socket.recv_fds(peer, max(1, size - len(heard)), 8)
            found += [(heard.count(b"\n"), descriptor) for descriptor in descriptors]
            heard += data
        [(line, descriptor)] = found
        assert json.loads(heard.splitlines()[line])["execute"] == "add-fd"
        assert str(Path(f"/proc/self/fd/{descriptor}").readlink()) == "/dev/null"
        os.close(descriptor)
        await until_readable(peer)
        heard += peer.recv(65536)
        await loop.sock_sendall(
            peer, b"".join(reply(json.loads(one)) for one in heard.splitlines())
        )
        await asyncio.gather(*waiting)


# Many questions at once.

QUESTIONS = [Question(Node, "query", {"number": number}) for number in range(100)]


async def test_many_questions_are_one_write(path: Path) -> None:
    async with by_hand(path) as (session, peer):
        assert await session.ask_all([]) == []
        asking = asyncio.ensure_future(session.ask_all(QUESTIONS))
        await asyncio.sleep(0)
        assert not asking.done()
        lines = [json.loads(line) for line in peer.recv(1 << 20).splitlines()]
        assert [line["arguments"]["number"] for line in lines] == list(range(100))
        peer.sendall(
            b"".join(
                refusal(line) if number == 7 else reply(line, {"node-name": f"n{number}"})
                for number, line in enumerate(lines)
            )
        )
        answers = await asking
        assert isinstance(answers.pop(7), VmmRefused)
        assert [answer.name for answer in answers] == [
            f"n{number}" for number in range(100) if number != 7
        ]


async def test_one_of_many_answers_is_none(path: Path) -> None:
    async with by_hand(path) as (session, peer):
        asking = asyncio.ensure_future(session.ask_all(QUESTIONS))
        await asyncio.sleep(0)
        lines = [json.loads(line) for line in peer.recv(1 << 20).splitlines()]
        peer.sendall(
            b"".join(
                reply(line, 5 if number == 7 else {"node-name": "n"})
                for number, line in enumerate(lines)
            )
        )
        with pytest.raises(VmmProtocolError, match="the reply to query is none"):
            await asking


async def test_many_questions_and_the_end(path: Path) -> None:
    """The peer hangs up after some of the answers; whoever asked gets no half of them."""
    async with by_hand(path) as (session, peer):
        asking = asyncio.ensure_future(session.ask_all(QUESTIONS))
        await asyncio.sleep(0)
        peer.sendall(
            b"".join(
                reply(json.loads(line), {"node-name": "n"})
                for line in peer.recv(1 << 20).splitlines()[:50]
            )
        )
        peer.close()
        with pytest.raises(ConnectionLost):
            await asking


# How much is done in one turn of the event loop.


async def test_a_few_answers_are_handed_over_in_each_turn(path: Path) -> None:
    """However many have come, on one connection or on several: whoever else is in the loop has its
    turn in between."""
    with tempfile.TemporaryDirectory(prefix="pyblock-") as folder:
        async with by_hand(path) as one, by_hand(Path(folder, "other")) as other:
            futures: list[asyncio.Future[msgspec.Raw]] = []
            for session, peer in (one, other):
                assert session._connection is not None
                futures += [session._connection.send("query-status") for _ in range(100)]
                peer.sendall(
                    b"".join(reply(json.loads(line)) for line in peer.recv(65536).splitlines())
                )
            most, done = 0, 0
            while done < len(futures):
                await asyncio.sleep(0)
                now = sum(future.done() for future in futures)
                most, done = max(most, now - done), now
            assert 0 < most <= MESSAGES_MAX


async def test_what_waits_for_its_turn_comes_before_the_end(path: Path) -> None:
    async with by_hand(path) as (session, peer):
        assert session._connection is not None
        futures = tuple(session._connection.send("query-status") for _ in range(50))
        peer.sendall(
            b"".join(reply(json.loads(line)) for line in peer.recv(65536).splitlines()[:40])
        )
        peer.close()
        assert await ends(futures) == [b"{}"] * 40 + [ConnectionLost] * 10
