"""One connection to a QMP monitor: bytes to messages, and each reply to whoever asked. Knows no
command.

Nothing here grows with what the peer sends: a line has an end, events are handed on and forgotten,
and a peer that sends too many of them loses its connection. The socket is read and written here and
not by a transport of asyncio's, since a descriptor has to leave with the first byte of its own
command. What waits to be sent goes in one write; of what has come, a few messages are handed over
in each turn of the event loop.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import random
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import msgspec

from pyblock.errors import (
    ConnectionLost,
    PyblockError,
    VmmProtocolError,
    VmmRefused,
    VmmUnreachable,
    shown,
)
from pyblock.vmm.turns import turn_of
from pyblock.vmm.unix import peer_of

# bytes of one message: a listing of block nodes has 0.9 KB a disk, and a sandbox 65,536 disks
LINE_MAX = 64 << 20
EVENTS_MAX = 100_000  # within EVENTS_TIME; 10,000 disks that leave at once send 20,000
EVENTS_TIME = 10.0  # seconds
# commands; a sandbox of 65,536 disks that lets go of all of them at once sends as many
UNANSWERED_MAX = 100_000
UNSENT_MAX = 64 << 20  # bytes that wait for a peer that does not read
_TIDY_MIN = 100  # commands that wait before it is looked for those that nobody waits for any more
# messages before the greeting: replies that an earlier client did not wait for (QEMU 10)
STRAYS_MAX = 64
_CHUNK = 65536
_TOGETHER_MAX = 64  # commands in one write


class Refusal(msgspec.Struct, frozen=True):
    """QMP's error."""

    kind: str = msgspec.field(name="class")
    desc: str


class Message(msgspec.Struct, frozen=True):
    """Whatever a monitor sends; what is not set was not there."""

    id: int | str | None = None
    returned: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="return", default=msgspec.UNSET)
    error: Refusal | msgspec.UnsetType = msgspec.UNSET
    event: str | msgspec.UnsetType = msgspec.UNSET
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    greeting: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="QMP", default=msgspec.UNSET)


_decoder = msgspec.json.Decoder(Message)
_encoder = msgspec.json.Encoder()


class Command(NamedTuple):
    """A command to be sent; `step` is what its refusal is called."""

    name: str
    arguments: Mapping[str, Any]
    step: str


class Request:
    """A command on its way.

    :ivar number: its ID.
    :ivar begun: a byte of it was sent.
    :ivar behind: the command that it was sent together with, right behind it.
    :ivar descriptor: its own, closed when it has left.
    :ivar late: is called with the reply when whoever asked has gone.
    """

    __slots__ = (
        "arguments",
        "begun",
        "behind",
        "command",
        "data",
        "descriptor",
        "future",
        "late",
        "number",
        "step",
    )

    def __init__(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        step: str,
        number: int,
        descriptor: int | None = None,
        late: Callable[[msgspec.Raw], None] | None = None,
        behind: Request | None = None,
    ) -> None:
        self.command = command
        self.number = number
        self.arguments = arguments
        self.step = step
        self.descriptor = descriptor
        self.late = late
        self.behind = behind
        self.begun = False
        message = (
            {"execute": command, "id": number}
            if not arguments
            else {"execute": command, "arguments": arguments, "id": number}
        )
        self.data = memoryview(_encoder.encode(message) + b"\n")
        self.future: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()

    @property
    def wanted(self) -> bool:
        """Whether it is to be sent: a byte of it was, or somebody waits for it. Of two that belong
        together, the first one decides."""
        leading = self.behind or self
        return leading.begun or not leading.future.cancelled()


class _Greeting(msgspec.Struct, frozen=True):
    capabilities: list[Any] = []


_greeting = msgspec.json.Decoder(_Greeting)


class Connection:
    """:param where: what errors call the peer.
    :param peer: a connected socket, which belongs to the connection from now on.
    :param on_event: is called with the name and data of each event.
    :param on_end: is called once, with the reason, when the connection has ended.

    :ivar ended: why it ended; None while it stands.
    :ivar offers: the capabilities that the peer's greeting names.
    :ivar pid: the process at the other end, 0 where that is not known.
    """

    def __init__(
        self,
        where: str,
        peer: socket.socket,
        on_event: Callable[[str, msgspec.Raw | None], None],
        on_end: Callable[[PyblockError], None],
    ) -> None:
        self.ended: PyblockError | None = None
        self.offers: list[Any] = []
        self.pid = peer_of(peer)
        self._where = where
        self._socket = peer
        self._on_event = on_event
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._greeting: asyncio.Future[None] = self._loop.create_future()
        self._greeting.add_done_callback(lambda done: done.cancelled() or done.exception())
        # else a stray reply could be taken for one of ours
        self._numbers = count(random.randrange(1000, 10000))
        self._asked: dict[int | str | None, Request] = {}
        self._unsent: deque[Request] = deque()
        self._unsent_size = 0
        self._tidy_at = _TIDY_MIN
        # for the peer to read: the event loop tells when the socket takes more
        self._waiting = False
        self._line = bytearray()  # the beginning of a message whose end has not come
        # messages that have come and wait for the loop's next turn, the next one last
        self._held: list[bytes] = []
        self._turn = turn_of(self._loop)
        self._passing: Request | None = None  # with a descriptor, until it is answered
        self._passed = asyncio.Event()
        self._strays = 0
        self._events = 0
        self._events_since = self._loop.time()
        peer.setblocking(False)
        self._loop.add_reader(peer, self._readable)

    async def greeted(self) -> None:
        """Returns when the peer has greeted as a QMP monitor does. Raises VmmProtocolError when it
        says something else, or hangs up."""
        await self._greeting

    async def turn(self) -> None:
        """Returns when no descriptor is on its way. The caller then sends one before it next waits.

        QEMU keeps the last descriptor that it has read, and gives it to the next `add-fd` that it
        *carries out*: of two on their way at once, each may get the other's file, without a word.
        """
        while self._passing is not None:
            await self._passed.wait()

    def send(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        step: str = "",
        descriptor: int | None = None,
        late: Callable[[msgspec.Raw], None] | None = None,
    ) -> asyncio.Future[msgspec.Raw]:
        """Sends a command; the future is done with its reply.

        VmmRefused: the peer said no. ConnectionLost and VmmProtocolError: the connection ended
        after the first byte had been sent. VmmUnreachable: it ended before. A future that is
        cancelled changes nothing once a byte was sent: a command is never cut, and `late` gets its
        reply. Before, the command may be left out: a machine that was stopped for long is not to
        work off what nobody waits for.
        """
        self._check(command)
        try:
            descriptor = None if descriptor is None else os.dup(descriptor)
        except OSError as error:
            raise VmmUnreachable(
                f"{self._where}: {command} was not sent: {error.strerror} in this process"
            ) from error
        request = Request(
            command, arguments, step or command, next(self._numbers), descriptor, late
        )
        if descriptor is not None:
            self._passing = request
            self._passed.clear()
        self._enqueue(request)
        return request.future

    def send_both(
        self, first: Command, second: Command
    ) -> tuple[asyncio.Future[msgspec.Raw], asyncio.Future[msgspec.Raw]]:
        """Sends two commands in one write, so that no answer is waited for in between. See
        `send`.

        The peer carries out the second whatever became of the first. When nobody waits for the
        first any more and no byte of it was sent, both may be left out; never one of them.
        """
        self._check(first.name)
        leading = Request(*first, next(self._numbers))
        following = Request(*second, next(self._numbers), behind=leading)
        self._enqueue(leading, following)
        return leading.future, following.future

    def send_all(self, commands: Sequence[Command]) -> list[asyncio.Future[msgspec.Raw]]:
        """Sends commands that have nothing to do with each other, in as few writes as possible. See
        `send`."""
        for command in commands[:1]:
            self._check(command.name)
        requests = [Request(*command, next(self._numbers)) for command in commands]
        self._enqueue(*requests)
        return [request.future for request in requests]

    def _check(self, command: str) -> None:
        """Raises VmmUnreachable when nothing can be sent."""
        if self.ended is not None:
            raise VmmUnreachable(
                f"{self._where}: the connection was gone before {command} was sent ({self.ended})"
            )
        if len(self._unsent) >= self._tidy_at:
            self._tidy()
        if self._unsent_size > UNSENT_MAX or len(self._asked) >= UNANSWERED_MAX:
            waiting = (
                f"{self._unsent_size} bytes wait to be read by the peer, {len(self._asked)} "
                "commands for its answer"
            )
            raise VmmUnreachable(f"{self._where}: {waiting}; {command} was not sent")

    def _enqueue(self, *requests: Request) -> None:
        at_once = not self._unsent
        for request in requests:
            self._asked[request.number] = request
            self._unsent_size += len(request.data)
            self._unsent.append(request)
        if at_once:
            self._writable()

    def close(self, error: PyblockError) -> None:
        """Ends the connection for that reason, if it stands."""
        if self.ended is not None:
            return
        self.ended = error
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._line.clear()
        self._held.clear()
        asked, self._asked = self._asked, {}
        for request in self._unsent:
            if request.descriptor is not None:
                os.close(request.descriptor)
        self._unsent.clear()
        self._answered(self._passing)
        for request in asked.values():
            if not request.future.done():
                _fail(request.future, self._lost(request, error))
        if not self._greeting.done():
            self._greeting.set_exception(error)
        self._on_end(error)

    def _lost(self, request: Request, error: PyblockError) -> PyblockError:
        if not request.begun:
            return VmmUnreachable(
                f"{self._where}: the connection ended before {request.command} was sent ({error})"
            )
        if isinstance(error, VmmProtocolError):
            return VmmProtocolError(f"{error}; {request.command} was not answered")
        return ConnectionLost(
            f"{self._where}: the connection broke before {request.command} was answered ({error})"
        )

    def _tidy(self) -> None:
        kept: deque[Request] = deque()
        for request in self._unsent:
            if request.wanted:
                kept.append(request)
                continue
            del self._asked[request.number]
            self._unsent_size -= len(request.data)
            if request.descriptor is not None:
                os.close(request.descriptor)
            self._answered(request)
        self._unsent = kept
        self._tidy_at = max(_TIDY_MIN, 2 * len(kept))

    def _writable(self) -> None:
        while self._unsent:
            together = [self._unsent[0]]
            for request in islice(self._unsent, 1, _TOGETHER_MAX):
                if request.descriptor is not None:  # leaves with the first byte of its own command
                    break
                together.append(request)
            try:
                self._sent(
                    self._socket.sendmsg(
                        [request.data for request in together], _rights(together[0].descriptor)
                    )
                )
            except (BlockingIOError, InterruptedError):
                if not self._waiting:
                    self._waiting = True
                    self._loop.add_writer(self._socket, self._writable)
                return
            except OSError as error:
                return self.close(ConnectionLost(f"{self._where}: {error.strerror}"))
        if self._waiting:
            self._waiting = False
            self._loop.remove_writer(self._socket)

    def _sent(self, size: int) -> None:
        """Takes note of how many bytes have left."""
        self._unsent_size -= size
        while size:
            request = self._unsent[0]
            request.begun = True
            if request.descriptor is not None:
                os.close(request.descriptor)
                request.descriptor = None
            if size < len(request.data):
                request.data = request.data[size:]
                return
            size -= len(request.data)
            self._unsent.popleft()

    def _readable(self) -> None:
        if self._held or not self._turn.left:
            return  # what has come stays in the socket, and the loop says so again in its next turn
        try:
            data = self._socket.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            return self.close(ConnectionLost(f"{self._where}: {error.strerror}"))
        if not data:
            return self.close(ConnectionLost(f"{self._where}: the peer hung up"))
        *lines, rest = data.split(b"\n")
        if lines and self._line:
            lines[0], self._line = bytes(self._line) + lines[0], bytearray()
        self._line += rest
        if len(self._line) > LINE_MAX:
            return self.close(
                VmmProtocolError(f"{self._where}: a message has over {LINE_MAX} bytes")
            )
        lines.reverse()
        self._held = lines
        self._hand_over()

    def _hand_over(self) -> None:
        while self._held:
            if not self._turn.left:
                self._loop.call_soon(self._hand_over)
                return
            line = self._held.pop()
            if line and not line.isspace():
                self._turn.take(self._loop)
                self._message(line)

    def _message(self, line: bytes) -> None:
        try:
            message = _decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            text = shown(line[:200].decode(errors="replace"), 80)
            return self.close(
                VmmProtocolError(
                    f"{self._where}: what answers does not speak QMP ({shown(str(error))}: {text})"
                )
            )
        if not self._greeting.done():
            self._greet(message)
        elif message.event is not msgspec.UNSET:
            self._event(message.event, None if message.data is msgspec.UNSET else message.data)
        elif message.id is not None:
            self._reply(message)
        elif message.error is not msgspec.UNSET:
            # of a command that it could not read, whichever that was
            self.close(
                VmmProtocolError(
                    f"{self._where}: the peer could not read a command: {shown(message.error.desc)}"
                )
            )
        else:
            text = shown(line[:200].decode(errors="replace"), 80)
            self.close(
                VmmProtocolError(
                    f"{self._where}: a message is neither an event nor a reply: {text}"
                )
            )

    def _greet(self, message: Message) -> None:
        if message.greeting is not msgspec.UNSET:
            # then it offers none
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                self.offers = _greeting.decode(message.greeting).capabilities
            return self._greeting.set_result(None)
        self._strays += 1
        if (message.id is None and message.event is msgspec.UNSET) or self._strays > STRAYS_MAX:
            self.close(
                VmmProtocolError(f"{self._where}: what answers does not speak QMP (no greeting)")
            )

    def _event(self, name: str, data: msgspec.Raw | None) -> None:
        self._events += 1
        if self._events > EVENTS_MAX:
            now = self._loop.time()
            if now - self._events_since < EVENTS_TIME:
                text = (
                    f"{self._where}: the peer sent {self._events} events within {EVENTS_TIME:g} "
                    f"s, the last {shown(name, 40)!r}"
                )
                return self.close(VmmProtocolError(text))
            self._events, self._events_since = 1, now
        self._on_event(name, data)

    def _reply(self, message: Message) -> None:
        request = self._asked.get(message.id)
        if request is None:
            return  # to an earlier client
        if not request.begun:  # it cannot know of it
            return self.close(
                VmmProtocolError(
                    f"{self._where}: the peer answered {request.command} before it was sent"
                )
            )
        del self._asked[message.id]
        self._answered(request)
        future = request.future
        if future.cancelled():
            if request.late is not None and message.returned is not msgspec.UNSET:
                request.late(message.returned)
        elif (message.error is msgspec.UNSET) == (message.returned is msgspec.UNSET):
            text = (
                f"{self._where}: the reply to {request.command} has to say either what it returns "
                "or what is wrong"
            )
            _fail(future, VmmProtocolError(text))
        elif message.error is not msgspec.UNSET:
            _fail(future, _refused(request, message.error))
        elif message.returned is not msgspec.UNSET:
            future.set_result(message.returned)

    def _answered(self, request: Request | None) -> None:
        if request is not None and request is self._passing:
            self._passing = None
            self._passed.set()


def _fail(future: asyncio.Future[msgspec.Raw], error: PyblockError) -> None:
    future.set_exception(error)
    future.exception()  # it may be that nobody asks


def _rights(descriptor: int | None) -> list[tuple[int, int, array.array[int]]]:
    """What goes along with a write that passes a descriptor."""
    return (
        []
        if descriptor is None
        else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    )


def _refused(request: Request, refusal: Refusal) -> VmmRefused:
    text = shown(refusal.desc)
    return VmmRefused(
        f"QEMU refused {request.command}: {text}",
        step=request.step,
        request={"execute": request.command, "arguments": request.arguments or {}},
        reply={"class": shown(refusal.kind, 80), "desc": text},
    )
