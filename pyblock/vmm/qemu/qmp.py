"""One QMP session: opened on first use, reopened after a loss, its failures told apart by what may
have been sent.

`TransportError.sent` tells whether anybody can know what became of a command; VmmRefused: QEMU read
it and said no. The session is our own because a client has to pass descriptors, decode replies into
types and keep no event (qemu.qmp keeps them all), at half the time a command.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from pyblock.errors import (
    ConnectionLost,
    PyblockError,
    TransportError,
    VmmProtocolError,
    VmmRefused,
    VmmUnreachable,
    shown,
)
from pyblock.tasks import Ended, SharedWork
from pyblock.vmm import unix
from pyblock.vmm.base import CONNECT_TIMEOUT
from pyblock.vmm.qemu.qmp_connection import Command, Connection

_CROWD_PAUSE = 0.05  # seconds until a monitor that too many wait for is tried again

Reply = TypeVar("Reply")


class _Left(msgspec.Struct):
    """The data of DEVICE_DELETED and of the events that say that a guest declined; a device without
    an ID has none."""

    device: str | None = None


_DECLINED = frozenset({"DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR"})
_left = msgspec.json.Decoder(_Left)
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


class Question(NamedTuple):
    """What is asked, and the type of its answer."""

    reply: Any
    command: str
    arguments: Mapping[str, Any] = {}


class QmpSession:
    """:param path: the monitor's unix socket.

    :ivar losses: how many connections have ended.
    :ivar resumes: how often it has said that the machine goes on after a stop.
    :ivar on_loss: is called when one has.
    :ivar lost: the same for whoever has opened the machine, with the reason; None for nobody.
    :ivar on_resume: is called when the machine goes on after a stop.
    :ivar waits_for: what it waits for while it is being opened, in words; "" otherwise.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.losses = 0
        self.resumes = 0
        self.on_loss: Callable[[], None] = lambda: None
        self.on_resume: Callable[[], None] = lambda: None
        self.lost: Callable[[TransportError], None] | None = None
        self.waits_for = ""
        self._connection: Connection | None = None
        self._opening: SharedWork[Connection] = SharedWork()
        self._leaving: dict[str, asyncio.Future[None]] = {}

    @property
    def peer(self) -> int:
        """The process ID at the other end, in this process's namespace; 0 while there is no
        connection, or it cannot be told."""
        return self._connection.pid if self._connection is not None else 0

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        step: str = "",
        descriptor: int | None = None,
        late: Callable[[msgspec.Raw], None] | None = None,
    ) -> msgspec.Raw:
        """Runs one command and returns its result, not decoded. See the top of the file for what is
        raised.

        :param step: what a refusal is called.
        :param descriptor: goes with the command, at most one at a time; it is the caller's again as
            soon as this returns.
        :param late: is called with a result that comes when the caller has been cancelled.
        """
        connection = await self._open()
        if descriptor is not None:
            await connection.turn()
        return await connection.send(
            command, arguments, step=step, descriptor=descriptor, late=late
        )

    async def send_both(
        self, first: Command, second: Command
    ) -> tuple[asyncio.Future[msgspec.Raw], asyncio.Future[msgspec.Raw]]:
        """Sends two commands in one write; each future is done with its reply, or raises as
        `execute` does.

        QEMU carries out the second whatever became of the first, and answers it last.
        """
        connection = await self._open()
        return connection.send_both(first, second)

    async def ask(
        self,
        reply: type[Reply],
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        step: str = "",
    ) -> Reply:
        """The same, decoded as `reply`; VmmProtocolError when it is something else."""
        return self.decoded(reply, command, await self.execute(command, arguments, step=step))

    async def ask_all(self, questions: Sequence[Question]) -> list[Any]:
        """The same for many questions, sent together: their answers, or a VmmRefused in place of
        one.

        Not a task for each: a machine is asked for dozens of properties, and a hundred may be at
        once.
        """
        connection = await self._open()
        answers = connection.send_all(
            [Command(one.command, one.arguments, one.command) for one in questions]
        )
        try:
            for last in answers[-1:]:  # by then the others are there
                with contextlib.suppress(PyblockError):
                    await last
            return [
                await self._decoded_or_refused(one, answer)
                for one, answer in zip(questions, answers, strict=True)
            ]
        finally:
            for answer in answers:
                answer.cancel()

    async def _decoded_or_refused(
        self, question: Question, answer: asyncio.Future[msgspec.Raw]
    ) -> object:
        try:
            return self.decoded(question.reply, question.command, await answer)
        except VmmRefused as refusal:
            return refusal

    def decoded(self, reply: type[Reply], command: str, raw: msgspec.Raw) -> Reply:
        """A result as `reply`. Raises VmmProtocolError when it is something else."""
        decoder = _decoders.get(reply)
        if decoder is None:
            decoder = _decoders.setdefault(reply, msgspec.json.Decoder(reply))
        try:
            answer: Reply = decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            text = f"QMP socket {self.path!r}: the reply to {command} is none: {shown(str(error))}"
            raise VmmProtocolError(text) from error
        return answer

    def send(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Sends a command whose result nobody waits for, if there is a connection."""
        if self._connection is not None:
            with contextlib.suppress(PyblockError):
                self._connection.send(command, arguments)

    async def leaving(self, device_id: str) -> asyncio.Future[None]:
        """A future that is done when QEMU reports that the device left: ask for it before the
        removal. VmmRefused: the guest declined; ConnectionLost: QEMU will report on this connection
        no more. All who ask for one device wait for the same."""
        await self._open()
        future = self._leaving.get(device_id)
        if future is None or future.done():
            future = self._leaving[device_id] = asyncio.get_running_loop().create_future()
            # it may be that nobody asks
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    def left(self, device_id: str) -> None:
        """Takes note that a device is gone."""
        if (future := self._leaving.pop(device_id, None)) is not None and not future.done():
            future.set_result(None)

    def is_gone(self) -> bool:
        """Whether the socket is absent or nobody listens there. A peer that is there and says
        nothing is not gone."""
        return unix.is_gone(self.path)

    async def close(self) -> None:
        """Ends the connection, if there is one."""
        await self._opening.end()
        if self._connection is not None:
            self._connection.close(
                ConnectionLost(f"QMP socket {self.path!r}: the connection was closed")
            )

    async def _open(self) -> Connection:
        if self._connection is not None:
            return self._connection
        try:
            return await self._opening.join(self._connect)
        except Ended:
            raise VmmUnreachable(
                f"QMP socket {self.path!r}: closed while the connection was being made"
            ) from None

    async def _connect(self) -> Connection:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                unix.check_socket(self.path, f"QMP socket {self.path!r}", hint="is QEMU running?")
                connection = Connection(
                    f"QMP socket {self.path!r}", await self._connected(), self._event, self._end
                )
                self.waits_for = f"the QMP greeting at {self.path!r}: {_why_silent(connection.pid)}"
                await connection.greeted()
                await self._negotiate(connection)
        except TimeoutError:
            raise self._given_up(connection, VmmUnreachable(self._silence(connection))) from None
        except ConnectionLost as error:
            text = f"QMP socket {self.path!r}: it hung up before the QMP greeting was over"
            raise self._given_up(connection, VmmProtocolError(text, sent=False)) from error
        except VmmRefused as error:
            text = f"QMP socket {self.path!r}: what answers does not speak QMP ({error})"
            raise self._given_up(connection, VmmProtocolError(text, sent=False)) from error
        except PyblockError as error:
            error = self._given_up(connection, error)
            if isinstance(error, VmmProtocolError):
                error.sent = False  # nothing that changes anything
            raise error
        except BaseException:
            self._given_up(
                connection,
                ConnectionLost(
                    f"QMP socket {self.path!r}: closed while the connection was being made"
                ),
            )
            raise
        finally:
            self.waits_for = ""
        self._connection = connection
        return connection

    async def _negotiate(self, connection: Connection) -> None:
        try:
            # Not out-of-band, although QEMU would then read a command while it carries out the
            # last one: what it reads while it takes a descriptor for `add-fd` crashes it. Its
            # monitor's thread goes over the descriptors with each byte that it reads, and its main
            # loop frees them meanwhile, without a lock (7.2, tcp_chr_recv and tcp_get_msgfds).
            await connection.send("qmp_capabilities")
        except VmmUnreachable as error:  # it greeted, so it was reached
            raise ConnectionLost(str(error)) from error
        if connection.ended is not None:  # right after its reply
            raise connection.ended

    def _given_up(self, connection: Connection | None, error: PyblockError) -> PyblockError:
        if connection is not None:
            connection.close(error)
        return error

    async def _connected(self) -> socket.socket:
        """A socket that is connected. One at which too many others wait is tried until the time is
        up: the kernel has no queue for that."""
        peer = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            while True:
                try:
                    peer.connect(self.path)
                    return peer
                except BlockingIOError:
                    self.waits_for = (
                        f"a place at {self.path!r}: its queue of clients is full, and QEMU serves "
                        "one at a time"
                    )
                await asyncio.sleep(_CROWD_PAUSE * random.uniform(0.5, 1.5))
        except OSError as error:
            peer.close()
            raise VmmUnreachable(
                f"QMP socket {self.path!r}: {error.strerror}; is QEMU running?"
            ) from error
        except BaseException:
            peer.close()
            raise

    def _silence(self, connection: Connection | None) -> str:
        why = (
            _why_silent(connection.pid)
            if connection is not None
            else "its queue of clients is full, and QEMU serves one at a time"
        )
        return f"QMP socket {self.path!r}: no QMP greeting within {CONNECT_TIMEOUT:g} s: {why}"

    def _event(self, name: str, data: msgspec.Raw | None) -> None:
        if name == "RESUME":
            self.resumes += 1
            return self.on_resume()
        if data is None or not (name == "DEVICE_DELETED" or name in _DECLINED):
            return
        try:
            device = _left.decode(data).device
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return  # whoever waits asks again
        if device is None:
            return
        if name == "DEVICE_DELETED":
            self.left(device)
        elif (future := self._leaving.pop(device, None)) is not None and not future.done():
            text = f"the guest declined to let go of device {device} ({name})"
            reply = {"event": name, "data": {"device": device}}
            future.set_exception(
                VmmRefused(text, step="device-gone", request={"device": device}, reply=reply)
            )

    def _end(self, error: PyblockError) -> None:
        self._connection = None
        self.losses += 1
        self.on_loss()
        if self.lost is not None and isinstance(error, TransportError):
            self.lost(error)
        leaving, self._leaving = self._leaving, {}
        for future in leaving.values():
            if not future.done():
                future.set_exception(error)


def qemu_process(pid: int) -> str:
    """What tells a process from all others of this boot, if it is a QEMU and can be looked at; else
    ""."""
    return unix.process(pid, "qemu", "kvm")


def _why_silent(pid: int) -> str:
    """What keeps a monitor from greeting, as far as can be told from here."""
    if unix.is_stopped(pid):
        return f"process {pid}, which has it open, is stopped"
    return (
        "another client may hold it, since QEMU serves one at a time (give pyblock a monitor of "
        "its own), or QEMU hangs"
    )
