"""One process of the storm: it opens sandboxes, and in each some clients attach and detach at
random until the sandbox is closed, or the process killed. Each note is written at once, so that
what it knew can be told after its death.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from kit.points import Points

from pyblock import BlockDevice, Phase, PyblockError, Sandbox, SandboxBusy, StoreBusy
from pyblock.life.recovery import Finding
from pyblock.store.sqlite.store import SqliteStore

from .notes import DeviceSeen, FindingSeen, Pen, Picture

CLIENTS = 3  # in a sandbox
CROWD = 8  # attaches that a sandbox holds at once, about
LONG = 20.0  # seconds: a deadline that is not meant to pass
# seconds: a random part of one of these, which often is too short
SHORT = (0.0, 0.001, 0.01, 0.01, 0.01, 0.03, 0.2)
SETTLES = 60.0  # seconds within which an opened sandbox has nothing under way


class Site(msgspec.Struct, frozen=True):
    """A sandbox: its machine's address, and the images that are its own.

    :ivar sticky: image to driver, for those that do not leave without a guest.
    """

    name: str
    address: str
    driver: str
    own: list[str]
    sticky: dict[str, str]


class Plan(msgspec.Struct, frozen=True):
    """:ivar step: the step to die at (kit/points.py), None for none.
    :ivar restless: whether sandboxes are closed and opened again in the middle of it all.
    """

    number: int
    seed: str
    store: Path
    images: Path
    shared: list[str]
    step: int | None
    restless: bool = True


class Token:
    """One attach that was seen to succeed, and which a detach may stand against."""

    __slots__ = ("device", "image", "pending")

    def __init__(self, device: BlockDevice, image: str) -> None:
        self.device = device
        self.image = image
        self.pending = False  # its detach is; it is called again then


class Failed(Exception):
    """A call raised; `__cause__` is what."""


class Life:
    """:param notes: the pipe to write to. :param orders: the pipe that says what to do; its end is
    the end of the process."""

    def __init__(self, plan: Plan, sites: dict[str, Site], notes: int, orders: int) -> None:
        self.plan = plan
        self.sites = sites
        self.pen = Pen(notes)
        self.orders = orders
        self.random = random.Random(plan.seed)
        self.calls = 0
        self.places: dict[str, Place] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.over: asyncio.Event
        self.store: SqliteStore
        self._rest = b""

    def run(self, first: Iterable[str]) -> None:
        if self.plan.step is not None:
            Points(self.plan.step)
        asyncio.run(self._run(first))

    async def _run(self, first: Iterable[str]) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: self.pen.write(
                "fault", text=f"{context.get('message')}: {context.get('exception')!r}"
            )
        )
        self.over = asyncio.Event()
        self.store = SqliteStore(self.plan.store)
        os.set_blocking(self.orders, False)
        loop.add_reader(self.orders, self._obey)
        for name in first:
            self._open(name)
        while not self.over.is_set() or self.tasks:
            await asyncio.wait(
                [asyncio.ensure_future(self.over.wait()), *self.tasks],
                return_when=asyncio.FIRST_COMPLETED,
            )
        loop.remove_reader(self.orders)
        self.store.close()

    def _obey(self) -> None:
        data = os.read(self.orders, 4096)
        if not data:
            os._exit(98)  # the parent has gone
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            order, _, name = line.decode().partition(" ")
            match order:
                case "open":
                    self._open(name)
                case "go":
                    self.places[name].go.set()
                case "leave":
                    self.places[name].leave()
                case "empty":
                    self.places[name].to_be_emptied = True
                    self.places[name].go.set()
                case "intrude":
                    self._begin(name, self._intrude(self.sites[name]))
                case "end":
                    for place in self.places.values():
                        place.leave()
                    self.over.set()

    def _open(self, name: str) -> None:
        self.places[name] = Place(
            self, self.sites[name], random.Random(f"{self.plan.seed} {name} {self.random.random()}")
        )
        self._begin(name, self.places[name].run())

    def _begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(partial(self._ended, name))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            why = f" from {error.__cause__!r}" if error.__cause__ is not None else ""
            self.pen.write("fault", name, text=f"{type(error).__name__}: {error}{why}")

    async def _intrude(self, site: Site) -> None:
        """Opens a sandbox that is another's, if it can."""
        sandbox = Sandbox(site.name, site.address, driver=site.driver, store=self.store)
        try:
            await sandbox.__aenter__()
        except SandboxBusy:
            self.pen.write("intruded", site.name, result="SandboxBusy")
            return
        except StoreBusy as error:
            self.pen.write("intruded", site.name, result="StoreBusy", text=str(error))
            return
        self.pen.write("opened", site.name, kind="intruder")
        self.pen.write("closing", site.name, kind="intruder", findings=seen(sandbox.recovered))
        await sandbox.close()
        self.pen.write("intruded", site.name)


class Place:
    """A sandbox, from one opening to the next; its clients, and the attaches that they have."""

    def __init__(self, life: Life, site: Site, choose: random.Random) -> None:
        self.life = life
        self.site = site
        self.random = choose
        self.pen = life.pen
        self.go = asyncio.Event()
        self.ending = asyncio.Event()
        self.left = False
        self.to_be_emptied = False
        self.tokens: list[Token] = []
        self.sandbox: Sandbox

    def leave(self) -> None:
        self.left = True
        self.go.set()
        self.ending.set()

    async def run(self) -> None:
        self.sandbox = self._sandbox()
        while not self.left:
            await self._session()
            if self.random.random() < 0.5:
                self.sandbox = self._sandbox()

    def _sandbox(self) -> Sandbox:
        return Sandbox(
            self.site.name, self.site.address, driver=self.site.driver, store=self.life.store
        )

    async def _session(self) -> None:
        name = self.site.name
        self.go.clear()
        if not self.left:
            self.ending.clear()
        self.pen.write("opening", name)
        while True:
            try:
                await self.sandbox.__aenter__()
                break
            except (SandboxBusy, StoreBusy):  # an intruder
                await asyncio.sleep(0.005)
        self.pen.write("opened", name)
        findings = [*self.sandbox.recovered]
        await self._settle(findings)
        self.tokens = [
            Token(one, image_of(one))
            for one in self._devices()
            if one.attached
            for _ in range(one.attach_count)
        ]
        probe = await self._probe()
        self.pen.write(
            "settled",
            name,
            picture=msgspec.structs.replace(picture(self.sandbox, findings), probe=probe),
        )
        await self.go.wait()
        if self.to_be_emptied:
            await self._empty()
            self.left = True
            self.ending.set()
        clients = [asyncio.create_task(self._client()) for _ in range(CLIENTS)]
        await self.ending.wait()
        self.pen.write("closing", name)
        await self.sandbox.close()
        await asyncio.gather(*clients)
        self.pen.write("closed", name)

    def _devices(self) -> list[BlockDevice]:
        return [one for one in self.sandbox.devices if isinstance(one, BlockDevice)]

    def _is_settled(self, device: BlockDevice) -> bool:
        if device.phase is Phase.ATTACHED and device.operation is None:
            return True
        return image_of(device) in self.site.sticky and device.phase in (
            Phase.ATTACH_PENDING,
            Phase.DETACHING,
            Phase.DETACH_PENDING,
        )

    async def _settle(self, findings: list[Finding]) -> None:
        """Returns when nothing is under way that can end."""
        loop = asyncio.get_running_loop()
        end, again = loop.time() + SETTLES, loop.time() + 0.5
        while not all(map(self._is_settled, self._devices())):
            await asyncio.sleep(0.005)
            if loop.time() > again:
                again = loop.time() + 0.5
                try:
                    findings += await self.sandbox.reconcile(timeout=0.5)
                except PyblockError as error:
                    if loop.time() > end:
                        self.pen.write("fault", self.site.name, text=f"it does not settle: {error}")
                        raise
            if loop.time() > end:
                self.pen.write(
                    "fault",
                    self.site.name,
                    text=f"it does not settle within {SETTLES:g} s: {self._devices()}",
                )
                raise TimeoutError

    async def _probe(self) -> tuple[int, int] | None:
        """One more image is given the lowest free index."""
        try:
            # its process died in the middle of this
            for token in [each for each in self.tokens if each.image.endswith("-probe")]:
                await self._detach(token, LONG)
            taken = set(self.sandbox.index)
            token = await self._attach(f"{self.site.name}-probe", LONG)
            index = token.device.held.index
            await self._detach(token, LONG)
        except Failed:
            return None  # its note says why
        return index, min(set(range(len(taken) + 1)) - taken)

    async def _empty(self) -> None:
        """Everything goes, and every image that may be had is had once, alone."""
        while self.tokens:
            token = self.tokens.pop()
            if token.image not in self.site.sticky:
                await self._detach(token, LONG)

    async def _client(self) -> None:
        while not self.ending.is_set():
            with contextlib.suppress(Failed):
                await self._step()
            await asyncio.sleep(self.random.random() * 0.02 if self.random.random() < 0.2 else 0)

    async def _step(self) -> None:
        """One call, or a few."""
        choose, tokens = self.random, self.tokens
        limit = choose.choice(SHORT) * choose.random() if choose.random() < 0.5 else LONG
        kinds: list[tuple[float, Callable[[], Coroutine[Any, Any, Any]]]] = [
            (
                40 if len(tokens) < CROWD else 5,
                lambda: self._attach(self._image(), limit, self._access()),
            ),
            (10 if len(tokens) < CROWD else 1, lambda: self._attach_many(limit)),
            (2, self._reconcile),
            (0.2 if self.life.plan.restless else 0, self._close),
        ]
        if tokens:
            kinds += [
                (5 * len(tokens), lambda: self._detach(self._take(), limit)),
                (len(tokens), lambda: self._detach_many(limit)),
            ]
        [run] = choose.choices([run for _, run in kinds], [weight for weight, _ in kinds])
        await run()

    async def _close(self) -> None:
        self.ending.set()

    def _image(self) -> str:
        choose = self.random
        if self.site.sticky and choose.random() < 0.03:
            return choose.choice(sorted(self.site.sticky))
        return choose.choice(self.site.own if choose.random() < 0.6 else self.life.plan.shared)

    def _access(self) -> str:
        return self.random.choice(("write", "write", "read", "share"))

    def _take(self) -> Token:
        return self.tokens.pop(self.random.randrange(len(self.tokens)))

    async def _attach(self, image: str, limit: float, access: str = "write") -> Token:
        if image not in self.life.plan.shared:
            access = "write"
        driver = self.site.sticky.get(image, "virtio-scsi")
        work = self.sandbox.attach(
            self.life.plan.images / image,
            driver=driver,
            read_only=access == "read",
            share=access == "share",
            timeout=limit,
        )
        device = await self._call("attach", [image], work, limit, access)
        token = Token(device, image)
        self.tokens.append(token)
        return token

    async def _attach_many(self, limit: float) -> None:
        choose, access = self.random, self._access()
        pool = (
            [*self.site.own, *self.life.plan.shared] if access == "write" else self.life.plan.shared
        )
        images = [choose.choice(pool) for _ in range(choose.randint(1, 4))]
        work = self.sandbox.attach_many(
            [self.life.plan.images / image for image in images],
            driver="virtio-scsi",
            read_only=access == "read",
            share=access == "share",
            timeout=limit,
        )
        devices = await self._call("attach_many", images, work, limit, access)
        self.tokens += [Token(device, image) for device, image in zip(devices, images, strict=True)]

    async def _detach(self, token: Token, limit: float) -> None:
        if token in self.tokens:
            self.tokens.remove(token)
        kind = "resume" if token.pending else "detach"
        try:
            await self._call(
                kind, [token.image], self.sandbox.detach(token.device, timeout=limit), limit
            )
        except Failed as failed:
            match type(failed.__cause__).__name__:
                case "DetachPending":
                    token.pending = True
                    self.tokens.append(token)
                case "CancelledError" | "UnknownDevice" | "NotAttached":
                    # of a cancelled one the outcome is not known, and calling again could take
                    # another's attach
                    pass
                case _:
                    self.tokens.append(token)
            raise

    async def _detach_many(self, limit: float) -> None:
        ready = [token for token in self.tokens if not token.pending]
        taken = self.random.sample(ready, min(len(ready), self.random.randint(1, 4)))
        self.tokens = [token for token in self.tokens if token not in taken]
        work = self.sandbox.detach_many([token.device for token in taken], timeout=limit)
        await self._call("detach_many", [token.image for token in taken], work, limit)

    async def _reconcile(self) -> None:
        dry = self.random.random() < 0.5
        await self._call(
            "reconcile",
            [],
            self.sandbox.reconcile(dry_run=dry, timeout=self.random.choice((0.0, 0.01, 2.0))),
            2.0,
        )

    async def _call(
        self,
        kind: str,
        images: list[str],
        work: Coroutine[Any, Any, Any],
        limit: float,
        access: str = "",
    ) -> Any:
        """Runs it, with notes around it; sometimes it is cancelled. Raises Failed."""
        life = self.life
        life.calls += 1
        cancel = (
            self.random.choice((0.0001, 0.001, 0.005, 0.03)) * self.random.random()
            if self.random.random() < 0.15
            else None
        )
        if self.to_be_emptied or any(image.endswith("-probe") for image in images):
            cancel = None
        about: dict[str, Any] = {
            "call": life.calls,
            "kind": kind,
            "images": images,
            "limit": limit,
            "sticky": any(image in self.site.sticky for image in images),
            "how": f"{access} timeout {limit:g}"
            + (f" cancelled after {cancel * 1000:.2f} ms" if cancel is not None else ""),
        }
        self.pen.write("begin", self.site.name, **about)
        task = asyncio.ensure_future(work)
        if cancel is not None:
            asyncio.get_running_loop().call_later(cancel, task.cancel)
        await asyncio.wait([task])
        if task.cancelled():
            self.pen.write("end", self.site.name, **about, result="CancelledError")
            raise Failed from asyncio.CancelledError()
        if (error := task.exception()) is not None:
            text = " / ".join([str(error), *getattr(error, "__notes__", [])])
            self.pen.write(
                "end", self.site.name, **about, result=type(error).__name__, text=text[:1000]
            )
            raise Failed from error
        result = task.result()
        self.pen.write(
            "end", self.site.name, **about, findings=seen(result) if kind == "reconcile" else []
        )
        return result


def image_of(device: BlockDevice) -> str:
    return Path(device.info.path).name


def seen(findings: Iterable[Finding]) -> list[FindingSeen]:
    return [
        FindingSeen(str(one.found), str(one.outcome), Path(one.path).name, one.drive_id, one.note)
        for one in findings
    ]


def picture(sandbox: Sandbox, findings: Iterable[Finding]) -> Picture:
    devices = []
    for one in sandbox.devices:
        assert isinstance(one, BlockDevice)
        drive = one.drive
        index, ordinal, drive_id = (
            (drive.index, drive.ordinal, drive.id) if drive is not None else (-1, -1, "")
        )
        info = one.info
        devices.append(
            DeviceSeen(
                one.id, drive_id, image_of(one), info.driver or "", str(one.phase),
                one.attach_count, index, ordinal, info.read_only,
                info.share,
            )
        )  # fmt: skip
    return Picture(devices, list(sandbox.index), seen(findings))
