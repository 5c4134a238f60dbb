"""One QMP session, over QEMU's own client: opened on first use, reopened after a loss, its failures told apart by what may have been sent.

VmmUnreachable and VmmProtocolError: nothing was sent. VmmRefused: QEMU read the command and said no. ConnectionLost: nobody knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Mapping
from typing import Any

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.protocol import ConnectError, StateError
from qemu.qmp.qmp_client import GreetingError

from pyblock.errors import ConnectionLost, PyblockError, VmmProtocolError, VmmRefused, VmmUnreachable
from pyblock.hypervisors.base import CONNECT_TIMEOUT
from pyblock.shared import Ended, SharedWork

# The client logs each failure that it also raises; a program that wants them sets a handler of its own.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

_SOCKET_PATH_MAX = 107  # bytes: sun_path of sockaddr_un less its NUL
_EVENTS = {"DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR"}


class _Client(QMPClient):
    """The hooks for messages write each of them out for the debug log, logged or not, which is a third of the time of a command."""

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class QmpSession:
    """:param path: the monitor's unix socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._client: QMPClient | None = None
        self._opening: SharedWork[QMPClient] = SharedWork()
        self._watching: list[asyncio.Task[None]] = []
        self._leaving: dict[str, asyncio.Future[None]] = {}

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, step: str = "") -> Any:
        """Runs one command and returns its result. `step` is what a refusal is called; see the top of the file for what is raised."""
        client = await self._open()
        try:
            return await client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise VmmRefused(
                f"QEMU refused {command}: {error}",
                step=step or command,
                request={"execute": command, "arguments": arguments or {}},
                reply={"class": error.error_class, "desc": str(error)},
            ) from error
        except StateError as error:
            raise VmmUnreachable(f"QMP socket {self.path!r}: the connection was gone before {command} was sent") from error
        except (ExecInterruptedError, QMPError, EOFError, OSError) as error:
            raise ConnectionLost(f"QMP socket {self.path!r}: the connection broke before {command} was answered ({error})") from error

    async def leaving(self, device_id: str) -> asyncio.Future[None]:
        """A future that is done when QEMU reports that the device left: ask for it before the removal. VmmRefused: the guest declined;
        ConnectionLost: QEMU will report on this connection no more."""
        await self._open()
        future = self._leaving.get(device_id)
        if future is None or future.done():
            future = self._leaving[device_id] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may be that nobody asks
        return future

    def left(self, device_id: str) -> None:
        """Takes note that a device is gone."""
        if (future := self._leaving.pop(device_id, None)) is not None and not future.done():
            future.set_result(None)

    def forget(self, device_id: str) -> None:
        """Takes note that nobody waits for the device to leave."""
        if (future := self._leaving.pop(device_id, None)) is not None:
            future.cancel()

    def is_gone(self) -> bool:
        """Whether the socket is absent or nobody listens there. A peer that is there and says nothing is not gone."""
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)) as probe:
            try:
                probe.connect(self.path)
            except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
                return True
            except OSError:
                pass  # taken, or not to be touched by this user: something is there
        return False

    async def close(self) -> None:
        """Ends the connection, if there is one."""
        await self._opening.end()
        await self._end(ConnectionLost(f"QMP socket {self.path!r}: the connection was closed"))

    async def _open(self) -> QMPClient:
        client = self._client
        if client is not None and client.runstate is Runstate.RUNNING:
            return client
        try:
            return await self._opening.join(self._connect)
        except Ended:
            raise VmmUnreachable(f"QMP socket {self.path!r}: closed while the connection was being made") from None

    async def _connect(self) -> QMPClient:
        await self._end(ConnectionLost(f"QMP socket {self.path!r}: the connection broke"))
        self._check_socket()
        client = _Client("pyblock")
        listener = EventListener(names=_EVENTS)
        client.register_listener(listener)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                try:
                    await client.connect(self.path)
                except ConnectError as error:
                    # QEMU 10 may send a new client, before the greeting, a reply that the one before did not wait for.
                    if not isinstance(error.exc, GreetingError):
                        raise
                    await client.connect(self.path)
        except TimeoutError:
            raise VmmUnreachable(f"QMP socket {self.path!r}: no QMP greeting within {CONNECT_TIMEOUT:g} s") from None
        except ConnectError as error:
            cause = error.exc
            if isinstance(cause, (EOFError, BrokenPipeError, ConnectionResetError)):
                raise VmmProtocolError(f"QMP socket {self.path!r}: it hung up before the QMP greeting was over") from error
            if isinstance(cause, OSError):
                raise VmmUnreachable(f"QMP socket {self.path!r}: {cause.strerror or cause}; is QEMU running?") from error
            raise VmmProtocolError(f"QMP socket {self.path!r}: what answers does not speak QMP ({cause or error})") from error
        self._client = client
        self._watching = [asyncio.create_task(self._listen(listener)), asyncio.create_task(self._watch(client))]
        return client

    def _check_socket(self) -> None:
        if len(os.fsencode(self.path)) > _SOCKET_PATH_MAX:
            raise VmmUnreachable(f"QMP socket {self.path!r}: a unix socket's path has at most {_SOCKET_PATH_MAX} bytes")
        try:
            mode = os.stat(self.path).st_mode  # noqa: PTH116
        except (OSError, ValueError) as error:
            raise VmmUnreachable(f"QMP socket {self.path!r}: {getattr(error, 'strerror', error)}; is QEMU running?") from error
        if not stat.S_ISSOCK(mode):
            raise VmmUnreachable(f"QMP socket {self.path!r} is not a socket")

    async def _listen(self, listener: EventListener) -> None:
        async for event in listener:
            data = event.get("data")
            device = data.get("device") if isinstance(data, dict) else None
            if not isinstance(device, str):
                continue
            if event["event"] == "DEVICE_DELETED":
                self.left(device)
            elif (future := self._leaving.pop(device, None)) is not None and not future.done():
                text = f"the guest declined to let go of device {device} ({event['event']})"
                future.set_exception(VmmRefused(text, step="device-gone", request={"device": device}, reply=dict(event)))

    async def _watch(self, client: QMPClient) -> None:
        while client.runstate is Runstate.RUNNING:
            await client.runstate_changed()
        self._watching[1:] = []  # this task ends by itself
        await self._end(ConnectionLost(f"QMP socket {self.path!r}: the connection broke"))

    async def _end(self, error: PyblockError) -> None:
        client, self._client = self._client, None
        watching, self._watching = self._watching, []
        for task in watching:
            task.cancel()
        for future in self._leaving.values():
            if not future.done():
                future.set_exception(error)
        self._leaving.clear()
        if client is not None:
            with contextlib.suppress(Exception):  # it raises whatever ended the connection, a UnicodeDecodeError for instance
                await client.disconnect()
        if watching:
            await asyncio.wait(watching)
