"""Errors as data: one code a class that never changes, what may be tried again, facts that survive
copies and pickles, and a form in JSON that is bounded and safe to show."""

from __future__ import annotations

import asyncio
import copy
import json
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.snapshot import MakeImage

import pyblock
from pyblock import Sandbox, blocking, errors
from pyblock.errors import DeviceOutcome, Facts, PyblockError
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor

# Programs compare with these: a code that is given out is never changed, nor given to another
# class.
CODES = {
    "PyblockError": "error",
    "CallerError": "caller-error",
    "InvalidValue": "invalid-value",
    "InvalidIndex": "invalid-index",
    "InvalidName": "invalid-name",
    "InvalidAddress": "invalid-address",
    "InvalidID": "invalid-id",
    "InvalidSerial": "invalid-serial",
    "InvalidTimeout": "invalid-timeout",
    "InvalidImage": "invalid-image",
    "UnknownDriver": "unknown-driver",
    "UnknownScheme": "unknown-scheme",
    "UnknownDevice": "unknown-device",
    "UnknownSandbox": "unknown-sandbox",
    "NotAttached": "not-attached",
    "NotOffered": "not-offered",
    "NotReleased": "not-released",
    "IndexTaken": "index-taken",
    "IndexFree": "index-free",
    "SandboxClosed": "sandbox-closed",
    "WrongEventLoop": "wrong-event-loop",
    "Conflict": "conflict",
    "SandboxBusy": "sandbox-busy",
    "ImageInUse": "image-in-use",
    "ImageReplaced": "image-replaced",
    "MachineAnswers": "machine-answers",
    "SandboxConflict": "sandbox-conflict",
    "DeviceConflict": "device-conflict",
    "CapacityError": "capacity",
    "IndexesExhausted": "indexes-exhausted",
    "SlotsExhausted": "slots-exhausted",
    "DescriptorsExhausted": "descriptors-exhausted",
    "AttachCountExhausted": "attach-count-exhausted",
    "StateError": "state-error",
    "InvalidState": "invalid-state",
    "NewerState": "newer-state",
    "StoreError": "store-error",
    "StoreBusy": "store-busy",
    "VmmRefused": "vmm-refused",
    "TransportError": "transport-error",
    "VmmUnreachable": "vmm-unreachable",
    "VmmProtocolError": "vmm-protocol-error",
    "ConnectionLost": "connection-lost",
    "DeadlinePassed": "deadline-passed",
    "ClosedMeanwhile": "closed-meanwhile",
    "AttachPending": "attach-pending",
    "DetachPending": "detach-pending",
}
RETRYABLE = {
    "SandboxBusy", "ImageInUse", "ImageReplaced", "MachineAnswers",
    "CapacityError", "IndexesExhausted", "SlotsExhausted", "DescriptorsExhausted",
    "AttachCountExhausted",
    "StoreBusy", "TransportError", "VmmUnreachable", "ConnectionLost", "DeadlinePassed",
    "AttachPending", "DetachPending",
}  # fmt: skip
ALL = Facts(
    sandbox="s1", device="d1", drive="drive-d1", path="/images/a", index=3, driver="virtio-blk",
    vm="qemu:/run/q",
    holder="s2", owner="process 7 (x)", timeout=1.5, value="v",
)  # fmt: skip


def kinds(kind: type[PyblockError] = PyblockError) -> Iterator[type[PyblockError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == "pyblock.errors":
            yield from kinds(below)


KINDS = {kind.__name__: kind for kind in kinds()}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def same(one: PyblockError, other: PyblockError) -> bool:
    """Whether two errors say the same."""
    return type(one) is type(other) and str(one) == str(other) and one.__dict__ == other.__dict__


def test_codes_are_what_they_ever_were() -> None:
    assert {name: vars(kind).get("code") for name, kind in KINDS.items()} == CODES
    assert len(set(CODES.values())) == len(CODES)


def test_what_may_be_tried_again() -> None:
    assert {name for name, kind in KINDS.items() if kind.retryable} == RETRYABLE


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    depths = {}
    for line in (errors.__doc__ or "").splitlines():
        before, _, name = line.partition("── ")
        name, indent = (name, len(before) // 4 + 1) if name else (line, 0)
        if name and name.split()[0] in KINDS:
            depths[name.split()[0]] = indent
    found = {
        name: [one for one in kind.__mro__ if issubclass(one, PyblockError)]
        for name, kind in KINDS.items()
    }
    assert depths == {name: len(line) - 1 for name, line in found.items()}


def test_every_kind_is_public() -> None:
    assert all(
        name in pyblock.__all__ and getattr(pyblock, name) is kind for name, kind in KINDS.items()
    )


@pytest.mark.parametrize(
    "name",
    [
        "SandboxBusy",
        "ImageInUse",
        "ImageReplaced",
        "MachineAnswers",
        "SandboxConflict",
        "DeviceConflict",
    ],
)
def test_what_somebody_else_has_is_no_fault_of_the_caller(name: str) -> None:
    assert issubclass(KINDS[name], errors.Conflict) and not issubclass(
        KINDS[name], errors.CallerError
    )


def test_a_state_that_cannot_be_used_is_no_fault_of_the_caller() -> None:
    assert not issubclass(errors.StateError, errors.CallerError)


@every_kind
def test_facts_are_fields(kind: type[PyblockError]) -> None:
    bare, full = kind("text"), kind("text", **ALL)
    assert {name: getattr(bare, name) for name in ALL} == dict.fromkeys(ALL)
    assert {name: getattr(full, name) for name in ALL} == ALL
    assert bare.about(**ALL) is bare and same(bare, full)
    # whoever raised it knew better
    assert same(full.about(sandbox="another", index=9), kind("text", **ALL))
    assert bare.outcomes == ()


@every_kind
def test_copies_and_pickles_keep_everything(kind: type[PyblockError]) -> None:
    error = kind("text", **ALL)
    error.add_note("a note")
    error.outcomes = (
        DeviceOutcome("d1", "/images/a", error=error),
        DeviceOutcome("d2", undone=True),
    )
    error.__cause__ = cause = OSError(5, "I/O error")
    twin = copy.copy(error)
    assert same(twin, error) and twin is not error and twin.__cause__ is cause
    twin.add_note("another")
    assert error.__notes__ == ["a note"]
    back: PyblockError = pickle.loads(pickle.dumps(error))
    assert type(back) is kind and str(back) == "text" and back.__notes__ == ["a note"]
    assert {name: getattr(back, name) for name in ALL} == ALL
    assert back.outcomes[0].error is back and back.outcomes[1] == error.outcomes[1]


def test_copies_keep_what_only_some_have() -> None:
    refused = errors.VmmRefused(
        "no", step="device-add", request={"execute": "x"}, reply={"class": "y"}, drive="d"
    )
    lost = errors.ConnectionLost("gone", sent=False)
    for error in (refused, lost):
        assert same(copy.copy(error), error) and same(copy.deepcopy(error), error)
        assert same(pickle.loads(pickle.dumps(error)), error)


def test_a_copy_shows_where_it_was_raised() -> None:
    try:
        raise errors.StoreError("text")
    except PyblockError as error:
        assert copy.copy(error).__traceback__ is error.__traceback__ is not None


def raise_in_use() -> None:
    raise errors.ImageInUse("held", holder="s2", owner="", path="/images/a")


def test_facts_cross_a_process_pool() -> None:
    spawned = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=spawned) as pool,
        pytest.raises(errors.ImageInUse, match="held") as caught,
    ):
        pool.submit(raise_in_use).result()
    assert (caught.value.holder, caught.value.owner, caught.value.path) == ("s2", "", "/images/a")


@every_kind
def test_as_json(kind: type[PyblockError]) -> None:
    body = json.loads(json.dumps(kind("text", **ALL).to_dict()))
    branch = next(
        name
        for name, one in KINDS.items()
        if issubclass(kind, one) and (one.__bases__[0] is PyblockError or kind is PyblockError)
    )
    some = {key: body.pop(key) for key in ("sent",) if key in body}
    assert body == {
        "code": kind.code,
        "branch": CODES[branch],
        "message": "text",
        "retryable": kind.retryable,
        **ALL,
    }
    assert (some != {}) is issubclass(kind, errors.TransportError)
    assert kind("").to_dict().keys() - {"sent"} == {"code", "branch", "message", "retryable"}


def test_json_holds_what_others_wrote_escaped_and_bounded() -> None:
    hostile = "\x1b[2J\u202e\udc80" + "a" * 100_000
    error = errors.VmmRefused(
        hostile,
        step="device-add",
        request={hostile: [hostile] * 1000},
        reply={
            "deep": [[[[[[[[hostile]]]]]]]],
            "nan": float("nan"),
            "inf": float("inf"),
            "long": 10**400,
            "odd": object,
            "bytes": b"\xff",
        },
        path=hostile,
        value=10**5000,
    )
    error.add_note(hostile)
    error.outcomes = tuple(
        DeviceOutcome(hostile, hostile, errors.StoreError(hostile)) for _ in range(1000)
    )
    text = json.dumps(error.to_dict(), allow_nan=False, ensure_ascii=False)
    assert text.isprintable()
    assert len(text) < 30_000_000
    small = {
        key: value
        for key, value in error.to_dict().items()
        if key in ("message", "path", "value", "reply")
    }
    assert all(len(json.dumps(value)) < 100_000 for value in small.values())
    assert error.to_dict()["outcomes"][-1] == "… (+936)"


def test_json_of_many_names_those_that_failed() -> None:
    first = errors.InvalidImage("image '/b' is empty", path="/b")
    first.outcomes = (
        DeviceOutcome("d0", "/a", undone=True),
        DeviceOutcome(None, "/b", error=first),
        DeviceOutcome(
            "d2", "/c", undone=True, undoing=errors.DetachPending("still there", device="d2")
        ),
    )
    assert first.to_dict()["outcomes"] == [
        {
            "position": 1,
            "path": "/b",
            "error": {"code": "invalid-image", "message": "image '/b' is empty", "path": "/b"},
        },
        {
            "position": 2,
            "device": "d2",
            "path": "/c",
            "undone": True,
            "undoing": {"code": "detach-pending", "message": "still there", "device": "d2"},
        },
        "… (+1)",
    ]


def test_an_unknown_fact_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="colour"):
        errors.StoreError("text", colour="blue")  # type: ignore[call-arg]


def test_old_handlers_that_still_hold() -> None:
    mixed: dict[str, type[BaseException]] = {
        "InvalidIndex": ValueError, "UnknownDevice": KeyError, "UnknownSandbox": KeyError,
        "DeadlinePassed": TimeoutError,
    }  # fmt: skip
    assert all(issubclass(KINDS[name], kind) for name, kind in mixed.items())
    assert issubclass(asyncio.TimeoutError, TimeoutError)
    assert str(errors.UnknownDevice("no device 'x'", device="x")) == "no device 'x'"


def test_a_plain_call_says_what_was_refused() -> None:
    index = pyblock.BlockIndex(4)
    index.reserve(2)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (lambda: index.reserve(2), {"code": "index-taken", "index": 2}),
        (lambda: index.release(1), {"code": "index-free", "index": 1}),
        (lambda: index.reserve(4), {"code": "invalid-index", "index": 4}),
        (lambda: index.acquire_many(9), {"code": "indexes-exhausted", "value": 9}),
        (
            lambda: pyblock.drive_index("sdq9", prefix="sd"),
            {"code": "invalid-name", "value": "sdq9"},
        ),
        (lambda: pyblock.scsi_index("1;2"), {"code": "invalid-address", "value": "1;2"}),
        (lambda: pyblock.make_name_id("drive", ""), {"code": "invalid-id", "value": ""}),
        (lambda: pyblock.BlockIndex(0), {"code": "invalid-index", "value": 0}),
        (lambda: pyblock.Sandbox("no!", "memory:"), {"code": "invalid-id"}),
        (lambda: pyblock.Sandbox("s1", "xen:1"), {"code": "unknown-scheme", "vm": "xen:1"}),
        (
            lambda: pyblock.Sandbox("s1", "memory:", driver="ide"),
            {"code": "unknown-driver", "driver": "ide"},
        ),
    ]
    for call, facts in calls:
        with pytest.raises(PyblockError) as caught:
            call()
        body = caught.value.to_dict()
        assert body.items() >= facts.items(), body


# Many at once: the first error is the one raised, and says what became of each.


def told(error: PyblockError) -> list[tuple[str | None, str | None, bool, str | None]]:
    """Each outcome as (path, code of its error, undone, code of the trouble in undoing)."""

    def code(error: BaseException | None) -> str | None:
        assert error is None or isinstance(error, PyblockError), repr(error)
        return error.code if error is not None else None

    return [(one.path, code(one.error), one.undone, code(one.undoing)) for one in error.outcomes]


@pytest.mark.anyio
async def test_an_attach_of_many_says_what_became_of_each(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    images = [str(make_image(name)) for name in "abcd"]
    async with Sandbox("s1", vm, store=None) as sandbox:
        # The second is refused; of the others, one is refused when it is to be detached again.
        vm.fail("backend-add", Fault("delay"))
        vm.fail("backend-add", Fault("refuse"))
        vm.fail("device-del", Fault("refuse"))
        with pytest.raises(errors.VmmRefused) as caught:
            await sandbox.attach_many(images)
        [kept] = sandbox.devices
        failed = [one for one in told(caught.value) if one[1]]
        assert failed == [(images[1], "vmm-refused", False, None)]
        assert [one.path for one in caught.value.outcomes if one.undoing is not None] == [
            kept.info.path
        ]
        assert sum(one.undone for one in caught.value.outcomes) == 2
        assert [one.path for one in caught.value.outcomes] == images
        assert all(one.device for one in caught.value.outcomes)
        assert any(note.startswith("also: ") for note in caught.value.__notes__)


@pytest.mark.anyio
async def test_an_attach_of_many_says_which_image_was_refused(
    make_image: MakeImage, tmp_path: Path
) -> None:
    images = [str(make_image("a")), str(tmp_path / "none"), str(make_image("b"))]
    async with Sandbox("s1", MemoryHypervisor(), store=None) as sandbox:
        with pytest.raises(errors.InvalidImage) as caught:
            await sandbox.attach_many(images)
        assert told(caught.value) == [
            (images[0], None, False, None), (images[1], "invalid-image", False, None),
            (images[2], None, False, None),
        ]  # fmt: skip
        with pytest.raises(errors.InvalidImage) as one:
            await sandbox.attach(images[1])
        assert one.value.outcomes == ()
        assert sandbox.devices == []


@pytest.mark.anyio
async def test_who_waits_for_the_same_has_an_error_of_his_own(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("s1", vm, store=None) as sandbox:
        vm.fail("backend-add", Fault("refuse"), times=9)
        image = make_image("a")
        many = await asyncio.gather(
            *(sandbox.attach_many([image, image]) for _ in range(2)), return_exceptions=True
        )
        assert all(
            isinstance(error, errors.VmmRefused) and len(error.outcomes) == 2 for error in many
        )
        assert many[0] is not many[1]


@pytest.mark.anyio
async def test_a_detach_of_many_says_what_became_of_each(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    images = [str(make_image(name)) for name in "abc"]
    async with Sandbox("s1", vm, store=None) as sandbox:
        first, second, third = await sandbox.attach_many(images)
        vm.fail("device-del", Fault("refuse"))
        with pytest.raises(errors.VmmRefused) as caught:
            await sandbox.detach_many([first, second.id, third, "nobody"])
        assert told(caught.value) == [
            (images[0], "vmm-refused", False, None),
            (images[1], None, False, None),
            (images[2], None, False, None),
            (None, "unknown-device", False, None),
        ]
        assert [one.device for one in caught.value.outcomes] == [
            first.id,
            second.id,
            third.id,
            "nobody",
        ]
        assert sandbox.devices == [first]


@pytest.mark.anyio
async def test_many_that_were_cut_off_by_closing(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    images = [str(make_image(name)) for name in "ab"]
    sandbox = Sandbox("s1", vm, store=None)
    async with sandbox:
        vm.fail("device-add", Fault("hold"))
        task = asyncio.ensure_future(sandbox.attach_many(images))
        while len(vm.devices) < 1:  # the second; the first is held
            await asyncio.sleep(0)
        closing = asyncio.ensure_future(sandbox.close())
        await asyncio.sleep(0)
        vm.let_go("device-add")
        await closing
        with pytest.raises(errors.ClosedMeanwhile) as caught:
            await task
    assert not isinstance(caught.value, errors.CallerError) and caught.value.sandbox == "s1"
    assert told(caught.value) == [
        (images[0], "closed-meanwhile", False, None),
        (images[1], None, True, None),
    ]
    assert vm.devices == {} == vm.backends


def test_the_blocking_door_says_the_same(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    images = [str(make_image(name)) for name in "ab"]
    with blocking.Sandbox("s1", vm, store=None) as sandbox:
        vm.fail("backend-add", Fault("refuse"))
        with pytest.raises(errors.VmmRefused) as caught:
            sandbox.attach_many(images)
        assert told(caught.value) == [
            (images[0], "vmm-refused", False, None),
            (images[1], None, True, None),
        ]
        devices = sandbox.attach_many(images)
        vm.fail("device-del", Fault("refuse"))
        with pytest.raises(errors.VmmRefused) as caught:
            sandbox.detach_many(devices)
        assert told(caught.value) == [
            (images[0], "vmm-refused", False, None),
            (images[1], None, False, None),
        ]


def test_to_dict_of_a_value_that_cannot_be_written() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    for value in (Odd(), {Odd(): 1}, [Odd()], {10**5000: 1}):
        assert json.dumps(pyblock.InvalidValue("odd", value=value).to_dict()["value"])
