"""What an adapter may be beside QEMU's, and that nothing above it minds: tests/support/scripted.py
has one of each shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from support.scripted import Chooser, Member, Polled, Pool, Scripted, Stepped, refusal
from support.snapshot import MakeImage

from pyblock import (
    AttachPending,
    BlockDevice,
    ConnectionLost,
    DetachPending,
    NotOffered,
    NotReleased,
    Phase,
    PyblockError,
    Sandbox,
    SlotsExhausted,
    VmmProtocolError,
    VmmRefused,
    VmmUnreachable,
)
from pyblock.life.recovery import Found, Outcome
from pyblock.store.sqlite.store import SqliteStore
from pyblock.vmm import poller
from pyblock.vmm.base import Hypervisor, Offer
from pyblock.vmm.memory.machine import Fault, MemoryHypervisor
from pyblock.vmm.poller import Poller

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

PASSES = 0.05  # seconds: a deadline that has to pass, since nothing comes


async def until(what: Callable[[], object]) -> None:
    """Returns when something is so, which only other tasks can bring about."""
    while not what():
        await asyncio.sleep(0.001)


def phase_of(device: BlockDevice) -> Phase:
    """Its phase as it is now, whatever it was compared with before."""
    return device.phase


# A pool whose members have had their names since boot.

POOL = {
    "p0": Member(1),
    "p1": Member(2, read_only=True),
    "p2": Member(3),
    "p3": Member(4, read_only=True),
}


async def test_the_name_of_a_pool_is_the_members(make_image: MakeImage) -> None:
    """Index and ordinal are given out as ever, and say nothing of the name."""
    vm = Pool(POOL)
    async with Sandbox("one", vm, driver="virtio-mmio") as sandbox:
        first = await sandbox.attach(make_image("a"), read_only=True)
        second = await sandbox.attach(make_image("b"))
        third = await sandbox.attach(make_image("c"), read_only=True)
        names = [
            (one.held.index, one.held.place, one.held.predicted_name, one.held.guest_match)
            for one in (first, second, third)
        ]
        assert names == [
            (0, "p1", "/dev/vdc", "/vdc"),
            (1, "p0", "/dev/vdb", "/vdb"),
            (2, "p3", "/dev/vde", "/vde"),
        ]
        assert first.held.virt_path == "/dev/vdc"
        # One of a crowd has its name all the same.
        [fourth] = await sandbox.attach_many([make_image("d")])
        assert fourth.held.predicted_name == "/dev/vdd"
        with pytest.raises(SlotsExhausted, match="prepare more"):
            await sandbox.attach(make_image("e"))
        assert len(sandbox.devices) == 4 and list(sandbox.index) == [0, 1, 2, 3]
        # Its members are no strangers: only the root disk counts.
        assert await sandbox.reconcile() == [] and sandbox._machine.allotment.offsets == {"vd": 1}


async def test_a_pool_after_a_restart(make_image: MakeImage, store: SqliteStore) -> None:
    """The record has the place, and only the adapter reads it; a member that serves none of ours is
    none of ours."""
    vm = Pool(POOL, "scripted:pool")
    async with Sandbox("one", vm, driver="virtio-mmio", store=store) as sandbox:
        kept = await sandbox.attach(make_image("a"), read_only=True)
        lost = await sandbox.attach(make_image("b"))
        before = (kept.held.place, kept.held.predicted_name, kept.held.guest_match)
    vm.disks["p0"] = vm.PLACEHOLDER
    async with Sandbox("one", vm.restarted(), driver="virtio-mmio", store=store) as sandbox:
        assert [(one.found, one.device_id) for one in sandbox.recovered] == [(Found.LOST, lost.id)]
        [again] = sandbox.devices
        assert isinstance(again, BlockDevice)
        assert (again.held.place, again.held.predicted_name, again.held.guest_match) == before
        new = await sandbox.attach(make_image("c"))
        assert new.held.place == "p0" and new.held.predicted_name == "/dev/vdb"


# One that cannot tell when the guest has let go.


async def test_what_is_taken_away_by_force_needs_a_word(make_image: MakeImage) -> None:
    vm = Pool(POOL)
    async with Sandbox("one", vm, driver="virtio-mmio") as sandbox:
        device = await sandbox.attach(make_image("a"))
        assert await sandbox.attach(make_image("b"), device_id="b")
        sent = list(vm.sent)
        with pytest.raises(NotReleased, match="released=True"):
            await sandbox.detach(device)
        with pytest.raises(NotReleased):
            await sandbox.detach_many([device, "b"])
        assert device.phase is Phase.ATTACHED and vm.sent == sent
        await sandbox.detach(device, released=True)
        assert vm.sent == [*sent, "swap back"] and vm.disks["p0"] == vm.PLACEHOLDER
        await sandbox.detach_many(["b"], released=True)
        assert not sandbox.devices and not vm.taken


async def test_a_count_needs_no_word(make_image: MakeImage) -> None:
    """Nothing is taken away but by the last detach."""
    image = make_image("a")
    async with Sandbox("one", Pool(POOL), driver="virtio-mmio") as sandbox:
        device = await sandbox.attach(image)
        assert await sandbox.attach(image) is device
        await sandbox.detach(device)
        assert phase_of(device) is Phase.ATTACHED and device.attach_count == 1
        with pytest.raises(NotReleased):
            await sandbox.detach(device)


async def test_where_it_can_be_told_the_word_changes_nothing(make_image: MakeImage) -> None:
    vm = MemoryHypervisor()
    async with Sandbox("one", vm) as sandbox:
        device = await sandbox.attach(make_image("a"))
        vm.fail("device-gone", Fault("refuse"))
        with pytest.raises(VmmRefused) as caught:
            await sandbox.detach(device, released=True)
        assert caught.value.keeps and phase_of(device) is Phase.ATTACHED


# One that chooses the place itself.


async def test_a_vmm_that_chooses_the_place(make_image: MakeImage, store: SqliteStore) -> None:
    vm = Chooser(2, "scripted:chooser")
    async with Sandbox("one", vm, driver="virtio-blk", store=store) as sandbox:
        first, second = [await sandbox.attach(make_image(name)) for name in ("a", "b")]
        assert [
            (one.held.place, one.held.pci_path, one.held.guest_match) for one in (first, second)
        ] == [
            ("slot0", "00", "/slot0/"),
            ("slot1", "01", "/slot1/"),
        ]
        # The row was written before the VMM said that it has no slot: nothing of it is left.
        with pytest.raises(SlotsExhausted, match="no slot left"):
            await sandbox.attach(make_image("c"), device_id="c")
        assert list(sandbox.index) == [0, 1] and "c" not in sandbox.manager
        await sandbox.detach(first)
        third = await sandbox.attach(make_image("d"), device_id="d")
        assert (third.held.index, third.held.place) == (0, "slot0")
    async with Sandbox("one", vm, driver="virtio-blk", store=store) as sandbox:
        assert sandbox.recovered == ()
        assert sorted(
            one.held.place or "" for one in sandbox.devices if isinstance(one, BlockDevice)
        ) == ["slot0", "slot1"]
        await sandbox.detach("d")
        assert vm.disks.keys() == {"slot1"}


async def test_a_place_that_was_never_told(make_image: MakeImage, store: SqliteStore) -> None:
    """The VMM chose, and its reply was lost: the record has no place, and the disk is found all the
    same, after a restart too."""
    image = make_image("a")
    vm = Chooser(2, "scripted:chooser")
    async with Sandbox("one", vm, driver="virtio-blk", store=store) as sandbox:
        for _ in range(2):
            vm.script["reply to add"] = [ConnectionLost("lost")]
            with pytest.raises(AttachPending):
                await sandbox.attach(image)
            assert [one.outcome for one in await sandbox.reconcile()] == [Outcome.REMOVED]
            assert not vm.disks and not sandbox.devices
        vm.script["reply to add"] = [ConnectionLost("lost")]
        with pytest.raises(AttachPending):
            await sandbox.attach(image)
        [device] = sandbox.devices
        assert isinstance(device, BlockDevice) and device.held.place is None and vm.disks
    vm.ours.clear()
    async with Sandbox("one", vm, driver="virtio-blk", store=store) as sandbox:
        assert [one.outcome for one in sandbox.recovered] == [Outcome.REMOVED] and not vm.disks
        assert (await sandbox.attach(image)).held.place is not None


async def test_what_comes_while_the_machine_is_asked_is_no_stranger(make_image: MakeImage) -> None:
    """The VMM has it under a name of its own, which the adapter knows to be ours; a stranger it
    does not know counts."""
    vm = Chooser(4)
    vm.disks["root"] = "/images/root"
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        await sandbox.attach(make_image("a"))
        assert sandbox._machine.allotment.offsets == {"vd": 1}
        vm.answer.clear()
        asked = vm.sent.count("inventory")
        question = asyncio.create_task(sandbox.reconcile(orphans=True))
        await until(lambda: vm.sent.count("inventory") > asked)
        late = await sandbox.attach(make_image("b"))
        vm.answer.set()
        assert await question == []
        assert late.phase is Phase.ATTACHED and late.held.predicted_name == "/dev/vdc"
        assert (await sandbox.attach(make_image("c"))).held.predicted_name == "/dev/vdd"


# One that is asked whether a disk has left.


async def test_all_who_wait_share_one_question(
    make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # so that nothing but what is said here has it asked
    monkeypatch.setattr(poller, "SOONEST", 3600.0)
    monkeypatch.setattr(poller, "SLOWEST", 3600.0)
    vm = Polled()
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        devices = await sandbox.attach_many([make_image(f"i{number}") for number in range(20)])
        detach = asyncio.create_task(sandbox.detach_many(devices, timeout=None))
        await until(
            lambda: len(vm.leaving) == 20 and vm.poller._task is not None and "poll" in vm.sent
        )
        asked = vm.sent.count("poll")
        # all came in one turn of the event loop, or while the first was on its way
        assert asked <= 2
        for device in devices:
            vm.eject(device.held.id)
        vm.poller.hurry()
        await detach
        assert vm.sent.count("poll") == asked + 1 and not sandbox.devices
        assert vm.poller._task is None or vm.poller._task.done() or not vm.poller._waiting


async def test_a_question_that_fails_is_no_outcome(make_image: MakeImage) -> None:
    """The connection is lost, and comes back: nobody's device is pending for that."""
    vm = Polled()
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        device = await sandbox.attach(make_image("a"))
        vm.script["poll"] = [
            ConnectionLost("gone"),
            VmmUnreachable("away"),
            VmmProtocolError("odd"),
        ]
        detach = asyncio.create_task(sandbox.detach(device, timeout=None))
        await until(lambda: vm.sent.count("poll") > 3)
        assert phase_of(device) is Phase.DETACHING and not detach.done()
        vm.eject(device.held.id)
        await detach


async def test_a_deadline_ends_one_wait_and_a_late_confirmation_the_job(
    make_image: MakeImage,
) -> None:
    vm = Polled()
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        device = await sandbox.attach(make_image("a"))
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=PASSES)
        assert phase_of(device) is Phase.DETACH_PENDING
        vm.eject(device.held.id)
        await until(lambda: not sandbox.devices)
        await sandbox.detach(device)  # quiet: it was told "pending"


async def test_closing_ends_the_asking(make_image: MakeImage) -> None:
    vm = Polled()
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        device = await sandbox.attach(make_image("a"))
        with pytest.raises(DetachPending):
            await sandbox.detach(device, timeout=PASSES)
    assert not vm.poller._waiting and vm.poller._task is None
    asked = len(vm.sent)
    await asyncio.sleep(0)
    assert len(vm.sent) == asked


async def test_whoever_waits_at_the_close_is_told() -> None:
    async def ask() -> set[str]:
        return {"a"}

    polls = Poller(ask, "it")
    waiting = [asyncio.create_task(polls.gone("a")) for _ in range(2)]
    await until(lambda: polls._waiting and polls._waiting["a"].count == 2)
    await polls.close()
    for task in waiting:
        with pytest.raises(VmmUnreachable, match="closed while"):
            await task


async def test_an_answer_that_is_older_than_the_wait_says_nothing() -> None:
    answer, asked = asyncio.Event(), 0

    async def ask() -> set[str]:
        nonlocal asked
        asked += 1
        if asked == 1:
            await answer.wait()
            return set()  # as it was before "b" came
        return {"b"} if asked == 2 else set()

    polls = Poller(ask, "it")
    first = asyncio.create_task(polls.gone("a"))
    await until(lambda: asked == 1)
    second = asyncio.create_task(polls.gone("b"))
    await until(lambda: "b" in polls._waiting)
    answer.set()
    await first
    await until(lambda: asked >= 2)
    await second
    assert asked == 3
    await polls.close()


async def test_a_question_of_an_adapter_at_fault_ends_the_wait() -> None:
    async def ask() -> set[str]:
        raise KeyError("a form that nobody thought of")

    polls = Poller(ask, "it")
    with pytest.raises(KeyError):
        await polls.gone("a")
    await polls.close()


async def test_who_goes_away_is_not_asked_for() -> None:
    asked = 0

    async def ask() -> set[str]:
        nonlocal asked
        asked += 1
        return {"a"}

    polls = Poller(ask, "it")
    task = asyncio.create_task(polls.gone("a"))
    await until(lambda: asked)
    task.cancel()
    await until(lambda: polls._task is not None and polls._task.done())
    assert not polls._waiting


# One whose steps fail.

LOST = ConnectionLost("lost")
UNSENT = VmmUnreachable("not sent")


@pytest.mark.parametrize("place", range(3))
async def test_a_refused_step_takes_back_those_before(place: int, make_image: MakeImage) -> None:
    vm, name = Stepped(), Stepped.NAMES[place]
    vm.script[name] = [refusal(name)]
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        with pytest.raises(VmmRefused, match=f"{name}: no"):
            await sandbox.attach(make_image("a"))
        done = Stepped.NAMES[:place]
        assert vm.sent == [*done, name, *(f"undo {one}" for one in reversed(done))]
        assert not sandbox.devices and not len(sandbox.index) and not any(vm.parts.values())


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("error", [LOST, UNSENT, KeyError("odd")], ids=["lost", "unsent", "broken"])
async def test_a_step_of_which_nobody_knows(
    place: int, error: Exception, make_image: MakeImage
) -> None:
    """Only where nothing was sent at all it is known that nothing is there. Recovery settles the
    rest."""
    vm, name = Stepped(), Stepped.NAMES[place]
    vm.script[name] = [error]
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        known = place == 0 and error is UNSENT
        with pytest.raises(VmmUnreachable if known else AttachPending):
            await sandbox.attach(make_image("a"))
        # nothing is undone: what is there is not known
        assert vm.sent == [*Stepped.NAMES[:place], name]
        assert len(sandbox.devices) == len(sandbox.index) == (0 if known else 1)
        findings = await sandbox.reconcile()
        assert [one.outcome for one in findings] == (
            [] if known else [Outcome.REMOVED if place else Outcome.FREED]
        )
        assert not sandbox.devices and not len(sandbox.index) and not any(vm.parts.values())


@pytest.mark.parametrize(
    "error", [LOST, refusal("undo one"), KeyError("odd")], ids=["lost", "refused", "broken"]
)
async def test_a_step_that_cannot_be_taken_back(error: Exception, make_image: MakeImage) -> None:
    vm = Stepped()
    vm.script = {"three": [refusal("three")], "undo one": [error]}
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        # the first error, and the trouble as its note
        with pytest.raises(VmmRefused, match="three: no") as caught:
            await sandbox.attach(make_image("a"))
        assert any("undoing it failed too" in note for note in caught.value.__notes__)
        [device] = sandbox.devices
        assert isinstance(device, BlockDevice) and device.phase is Phase.ATTACH_PENDING
        await sandbox.detach(device)
        assert not any(vm.parts.values())


@pytest.mark.parametrize(
    ("step", "error", "phase"),
    [
        ("remove", refusal("remove"), Phase.ATTACHED),
        ("remove", UNSENT, Phase.ATTACHED),
        ("remove", LOST, Phase.DETACH_PENDING),
        ("wait", refusal("wait"), Phase.ATTACHED),
        ("wait", UNSENT, Phase.DETACH_PENDING),
        ("wait", LOST, Phase.DETACH_PENDING),
        ("wait", KeyError("odd"), Phase.DETACH_PENDING),
        ("rest", refusal("rest"), Phase.DETACH_PENDING),
        ("rest", UNSENT, Phase.DETACH_PENDING),
    ],
)
async def test_a_removal_that_fails(
    step: str, error: Exception, phase: Phase, make_image: MakeImage
) -> None:
    vm = Stepped()
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        device = await sandbox.attach(make_image("a"))
        vm.script[step] = [error]
        with pytest.raises((PyblockError, KeyError)) as caught:
            await sandbox.detach(device)
        assert device.phase is phase
        if isinstance(error, VmmRefused):
            assert isinstance(caught.value, VmmRefused) and caught.value.keeps == (step != "rest")
        await sandbox.detach(device)
        assert not sandbox.devices and not any(vm.parts.values())


# Offers.


async def test_what_is_not_offered_is_refused(make_image: MakeImage) -> None:
    class Plain(Scripted):
        offers = {"virtio-blk": Offer(read_only=False, share=False)}  # noqa: RUF012

    vm = Plain()
    async with Sandbox("one", vm, driver="virtio-blk") as sandbox:
        with pytest.raises(NotOffered, match="for reading only"):
            await sandbox.attach(make_image("a"), read_only=True)
        with pytest.raises(NotOffered, match="with other writers"):
            await sandbox.attach(make_image("b"), share=True)
        assert not vm.sent and not sandbox.devices
        device = await sandbox.attach(make_image("c"), device_id="c")
        assert device.info.serial is None  # it carries none, not even the ID


def adapters() -> list[tuple[str, Hypervisor, str]]:
    made: list[Hypervisor] = [MemoryHypervisor(), Pool(POOL), Chooser(1), Polled(), Stepped()]
    return [(type(vm).__name__, vm, driver) for vm in made for driver in vm.offers]


@pytest.mark.parametrize(
    ("vm", "driver"),
    [(vm, driver) for _, vm, driver in adapters()],
    ids=[f"{a}-{d}" for a, _, d in adapters()],
)
async def test_every_driver_on_offer_ends_with_an_address(
    vm: Hypervisor, driver: str, tmp_path: Path, make_image: MakeImage
) -> None:
    async with Sandbox("one", vm, driver=driver, store=None) as sandbox:
        device = await sandbox.attach(make_image("a"))
        assert device.held.guest_match or vm.offers[driver].unlocated, (
            f"nothing finds a {driver} disk in the guest, and nothing says why"
        )
