"""A unix-socket proxy before a QMP monitor, which writes down every command and can spoil one of them.

A command is spoiled by its number in the order of sending (0 is the first after `expect`, qmp_capabilities counts) or by its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LINE_MAX = 64 << 20  # bytes of one QMP message


class Fault(Enum):
    """What befalls a command."""

    REFUSE = auto()  # an error instead of forwarding it
    CLOSE_BEFORE = auto()  # the connection ends, QEMU never sees it
    CLOSE_AFTER = auto()  # QEMU carries it out, then the connection ends instead of the reply
    GARBAGE = auto()  # QEMU carries it out, bytes that are no JSON come instead of the reply
    DELAY = auto()  # the reply comes late
    SILENCE = auto()  # QEMU never sees it, nothing is answered
    MUTE = auto()  # QEMU carries it out, nothing is answered
    HOLD = auto()  # `held` is set, and it is forwarded once `let_go` is


class Proxy:
    """An asynchronous context manager. `commands` holds what was sent since `expect`; connections work until `drop`."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._target = target
        self.commands: list[str] = []
        self.struck = False
        self.held = asyncio.Event()
        self.let_go = asyncio.Event()
        self._fault: Fault | None = None
        self._which: int | str = ""
        self._clients: set[asyncio.Task[None]] = set()
        self._free = asyncio.Lock()  # QEMU serves one client at a time

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=LINE_MAX)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        await self.drop()
        self.path.unlink(missing_ok=True)

    def expect(self, fault: Fault | None = None, which: int | str = "") -> None:
        """From here on commands are counted anew, and one is spoiled, once."""
        self.commands = []
        self._fault, self._which, self.struck = fault, which, False

    async def drop(self) -> None:
        """Ends every connection; new ones are welcome, and nothing is spoiled any more."""
        self._fault = None
        clients = list(self._clients)
        for client in clients:
            client.cancel()
        if clients:
            await asyncio.wait(clients)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            async with self._free:
                up_reader, up_writer = await asyncio.open_unix_connection(self._target, limit=LINE_MAX)
                try:
                    await _Link(self, (reader, writer), (up_reader, up_writer)).run()
                finally:
                    up_writer.close()
                    with contextlib.suppress(OSError):
                        await up_writer.wait_closed()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._clients.discard(task)
            writer.close()

    def _strikes(self, name: str) -> Fault | None:
        """Counts a command, and says what befalls it."""
        number = len(self.commands)
        self.commands.append(name)
        if self._fault is None or self.struck or self._which not in (number, name):
            return None
        self.struck = True
        return self._fault


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One client's connection and its own to QEMU."""

    def __init__(self, proxy: Proxy, client: Stream, qemu: Stream) -> None:
        self._proxy = proxy
        self._reader, self._writer = client
        self._up_reader, self._up_writer = qemu
        self._instead: dict[Any, Callable[[bytes], bytes | None]] = {}  # by the ID of a command: what its reply becomes

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

    async def _up(self) -> None:
        async for command in self._commands():
            fault, number = self._proxy._strikes(command["execute"]), command.get("id")
            match fault:
                case Fault.REFUSE:
                    error = {"class": "GenericError", "desc": f"refused by the proxy: {command['execute']}"}
                    self._writer.write(json.dumps({"error": error, "id": number}).encode() + b"\n")
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
                case Fault.DELAY:
                    await asyncio.sleep(0.02)
                case Fault.HOLD:
                    self._proxy.held.set()
                    await self._proxy.let_go.wait()
            self._up_writer.write(json.dumps(command).encode() + b"\n")
            await self._up_writer.drain()

    async def _commands(self) -> AsyncIterator[dict[str, Any]]:
        """What the client sends; it need not end a command with a newline."""
        text = ""
        while data := await self._reader.read(65536):
            text += data.decode()
            while text := text.lstrip():
                try:
                    command, end = json.JSONDecoder().raw_decode(text)
                except ValueError:
                    break
                text = text[end:]
                yield command

    async def _down(self) -> None:
        while line := await self._up_reader.readline():
            passed: bytes | None = line
            if self._instead and (change := self._instead.pop(json.loads(line).get("id"), None)):
                passed = change(line)
            if passed is None:
                return
            self._writer.write(passed)
            await self._writer.drain()
