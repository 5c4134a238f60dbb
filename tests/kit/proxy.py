"""A unix-socket proxy before a QMP monitor, which writes down every command and can spoil one of
them.

Descriptors go through, each with the command that it came with. A command is spoiled by its name,
or by its name and which of that name it is (0 is the first after `expect`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Fault(Enum):
    """What befalls a command."""

    REFUSE = auto()  # an error instead of forwarding it
    CLOSE_BEFORE = auto()  # the connection ends, QEMU never sees it
    CLOSE_AFTER = auto()  # QEMU carries it out, then the connection ends instead of the reply
    GARBAGE = auto()  # QEMU carries it out, bytes that are no JSON come instead of the reply
    DELAY = auto()  # the reply comes late
    SILENCE = auto()  # QEMU never sees it, nothing is answered
    MUTE = auto()  # QEMU carries it out, nothing is answered
    ODD = auto()  # QEMU carries it out, the reply is `odd` with the command's ID
    HOLD = auto()  # `held` is set, and it is forwarded once `let_go` is


class Proxy:
    """An asynchronous context manager; connections work until `drop`.

    :ivar commands: the names of those that were sent since `expect`.
    :ivar answered: the names of those whose replies have come back.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._target = target
        self.commands: list[str] = []
        self.answered: list[str] = []
        self.struck = False
        self.held = asyncio.Event()
        self.let_go = asyncio.Event()
        self.odd: Any = None  # what takes the place of a reply; an ID is put into an object
        self.passes_descriptors = True
        self._fault: Fault | None = None
        self._which: str | tuple[str, int] = ""
        self._clients: set[asyncio.Task[None]] = set()
        self._free = asyncio.Lock()  # QEMU serves one client at a time

    async def __aenter__(self) -> Self:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self.path))
        self._socket.listen()
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._socket.close()
        await self.drop()
        self.path.unlink(missing_ok=True)

    def expect(self, fault: Fault | None = None, which: str | tuple[str, int] = "") -> None:
        """From here on commands are counted anew, and one is spoiled, once."""
        self.commands, self.answered = [], []
        self._fault, self._which, self.struck = fault, which, False

    async def drop(self) -> None:
        """Ends every connection; new ones are welcome, and nothing is spoiled any more."""
        self._fault = None
        clients = list(self._clients)
        for client in clients:
            client.cancel()
        if clients:
            await asyncio.wait(clients)

    async def _accept(self) -> None:
        while True:
            client, _ = await asyncio.get_running_loop().sock_accept(self._socket)
            task = asyncio.create_task(self._serve(client))
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)
            # one that never began
            task.add_done_callback(lambda _, client=client: client.close())  # type: ignore[misc]

    async def _serve(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with client, contextlib.suppress(OSError, asyncio.CancelledError):
            client.setblocking(False)
            async with self._free:
                with socket.socket(
                    socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
                ) as qemu:
                    await loop.sock_connect(qemu, str(self._target))
                    await _Link(self, client, qemu).run()

    def _strikes(self, name: str) -> Fault | None:
        """Counts a command, and says what befalls it."""
        number = self.commands.count(name)
        self.commands.append(name)
        if self._fault is None or self.struck or self._which not in (name, (name, number)):
            return None
        self.struck = True
        return self._fault


class _Link:
    """One client's connection and its own to QEMU."""

    def __init__(self, proxy: Proxy, client: socket.socket, qemu: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._qemu = qemu
        self._loop = asyncio.get_running_loop()
        self._descriptors: list[int] = []  # that came, and have not gone on
        self._names: dict[Any, str] = {}  # of commands that are not answered yet, by ID
        # by the ID of a command: what its reply becomes
        self._instead: dict[Any, Callable[[bytes], bytes | None]] = {}

    async def run(self) -> None:
        """Returns when either side, or a fault, ends the connection."""
        ways = [asyncio.ensure_future(self._down()), asyncio.ensure_future(self._up())]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in done:
                with contextlib.suppress(OSError):
                    way.result()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            for descriptor in self._descriptors:
                os.close(descriptor)

    async def _up(self) -> None:
        async for command in self._commands():
            fault, number = self._proxy._strikes(command["execute"]), command.get("id")
            self._names[number] = command["execute"]
            match fault:
                case Fault.REFUSE:
                    error = {
                        "class": "GenericError",
                        "desc": f"refused by the proxy: {command['execute']}",
                    }
                    await self._loop.sock_sendall(
                        self._client, json.dumps({"error": error, "id": number}).encode() + b"\n"
                    )
                    continue
                case Fault.CLOSE_BEFORE:
                    return
                case Fault.SILENCE:
                    continue
                case Fault.CLOSE_AFTER:
                    self._instead[number] = lambda _: None
                case Fault.GARBAGE:
                    self._instead[number] = lambda _: b"\x00\xff no JSON {\n"
                case Fault.MUTE:
                    self._instead[number] = lambda _: b""
                case Fault.ODD:
                    odd = (
                        {**self._proxy.odd, "id": number}
                        if isinstance(self._proxy.odd, dict)
                        else self._proxy.odd
                    )
                    self._instead[number] = lambda _, odd=odd: json.dumps(odd).encode() + b"\n"  # type: ignore[misc]
                case Fault.DELAY:
                    await asyncio.sleep(0.02)
                case Fault.HOLD:
                    self._proxy.held.set()
                    await self._proxy.let_go.wait()
            data = json.dumps(command).encode() + b"\n"
            if (
                command["execute"] == "add-fd"
                and self._descriptors
                and self._proxy.passes_descriptors
            ):
                socket.send_fds(self._qemu, [data[:1]], [self._descriptors[0]])
                os.close(self._descriptors.pop(0))
                data = data[1:]
            await self._loop.sock_sendall(self._qemu, data)

    async def _commands(self) -> AsyncIterator[dict[str, Any]]:
        """What the client sends; it need not end a command with a newline."""
        text = ""
        while data := await self._heard():
            text += data.decode()
            while text := text.lstrip():
                try:
                    command, end = json.JSONDecoder().raw_decode(text)
                except ValueError:
                    break
                text = text[end:]
                yield command

    async def _heard(self) -> bytes:
        """What the client sent; the descriptors that came with it are kept."""
        readable = asyncio.Event()
        self._loop.add_reader(self._client, readable.set)
        try:
            while True:
                try:
                    data, descriptors, _, _ = socket.recv_fds(self._client, 65536, 8)
                    self._descriptors += descriptors
                    return data
                except BlockingIOError:
                    readable.clear()
                    await readable.wait()
        finally:
            self._loop.remove_reader(self._client)

    async def _down(self) -> None:
        rest = bytearray()
        while data := await self._loop.sock_recv(self._qemu, 65536):
            *lines, last = data.split(b"\n")
            for line in lines:
                passed: bytes | None = bytes(rest + line) + b"\n"
                rest = bytearray()
                number = json.loads(passed or b"").get("id")
                if name := self._names.pop(number, None):
                    self._proxy.answered.append(name)
                if change := self._instead.pop(number, None):
                    passed = change(passed or b"")
                if passed is None:
                    return
                await self._loop.sock_sendall(self._client, passed)
            rest += last
