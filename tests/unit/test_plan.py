"""Plans: both numbers or none, and texts that are those of the single functions."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyblock.errors import IndexesExhausted, InvalidID, InvalidIndex, InvalidName, InvalidValue
from pyblock.index import BlockIndex
from pyblock.naming import drive_name, make_name_id, scsi_address
from pyblock.plan import PlannedDrive, plan, plan_many, plan_text


def pair(index: set[int], ordinals: set[int], capacity: int = 65536) -> tuple[BlockIndex, BlockIndex]:
    both = BlockIndex(capacity), BlockIndex(capacity)
    both[0].reserve_many(index)
    both[1].reserve_many(ordinals)
    return both


def test_plan_takes_the_lowest_of_both() -> None:
    index, ordinals = pair({0, 1, 3}, {0})
    assert plan(index, ordinals) == (2, 1)
    assert plan(index, ordinals) == (4, 2)
    assert plan_many(index, ordinals, 3) == ([5, 6, 7], [3, 4, 5])
    assert plan_many(index, ordinals, 0) == ([], [])


@given(st.sets(st.integers(0, 300)), st.sets(st.integers(0, 300)), st.integers(0, 200))
def test_plan_many_is_many_plans(taken: set[int], named: set[int], n: int) -> None:
    one, many = pair(taken, named), pair(taken, named)
    indexes, numbers = plan_many(*many, n)
    assert list(zip(indexes, numbers, strict=True)) == [plan(*one) for _ in range(n)]


small = st.sets(st.integers(0, 60), max_size=40)
texts = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1, max_size=60)


@given(small, small, st.lists(texts, max_size=40), st.sampled_from(["vd", "sd", "", "é"]), st.integers(0, 2000), st.booleans())
def test_plan_text_is_the_single_functions(taken: set[int], named: set[int], ids: list[str], prefix: str, offset: int, scsi: bool) -> None:
    drives = plan_text(*pair(taken, named), ids, prefix=prefix, offset=offset, scsi=scsi)
    indexes, numbers = plan_many(*pair(taken, named), len(ids))
    assert drives == [
        PlannedDrive(i, n, make_name_id("drive", each), scsi_address(i) if scsi else None, drive_name(n + offset, prefix))
        for i, n, each in zip(indexes, numbers, ids, strict=True)
    ]


def test_plan_text_of_ten_thousand() -> None:
    index, ordinals = BlockIndex(), BlockIndex()
    drives = plan_text(index, ordinals, (f"volume-{i}" for i in range(10_000)), kind="disk", prefix="sd", scsi=True)
    assert drives[703] == PlannedDrive(703, 703, "disk-volume-703", "2:191", "sdaab")
    assert len(index) == len(ordinals) == len(drives) == 10_000


def test_exhaustion_of_either_takes_neither() -> None:
    for capacities in [(10, 5), (5, 10)]:
        index, ordinals = map(BlockIndex, capacities)
        for attempt in (
            lambda a=index, b=ordinals: plan_many(a, b, 6),
            lambda a=index, b=ordinals: plan_many(a, b, 10**30),
            lambda a=index, b=ordinals: plan_text(a, b, ["1"] * 6, prefix="vd", scsi=True),
        ):
            with pytest.raises(IndexesExhausted, match="5 of 5 free"):
                attempt()
        assert len(index) == len(ordinals) == 0
        plan_many(index, ordinals, 5)
        with pytest.raises(IndexesExhausted, match="0 of 5 free"):
            plan(index, ordinals)
        assert len(index) == len(ordinals) == 5


def test_one_object_as_both() -> None:
    index = BlockIndex()
    for attempt in (
        lambda: plan(index, index),
        lambda: plan_many(index, index, 1),
        lambda: plan_text(index, index, ["1"], prefix="vd", scsi=True),
    ):
        with pytest.raises(InvalidValue, match="one object"):
            attempt()
    assert len(index) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device_ids": ["a", ""]}, InvalidID, "empty"),
        ({"device_ids": ["a", "b\nc"]}, InvalidID, "newline"),
        ({"device_ids": ["a", "\n"]}, InvalidID, "newline"),
        ({"device_ids": ["a", "\ud800"]}, InvalidID, "surrogate"),
        ({"kind": ""}, InvalidID, "empty"),
        ({"kind": "a\nb"}, InvalidID, "newline"),
        ({"kind": "k" * 17, "device_ids": ["1" * 15]}, InvalidID, ">= 32"),
        ({"kind": "k" * 31}, InvalidID, "shorter kind"),
        ({"prefix": "v\n"}, InvalidName, "newline"),
        ({"prefix": "p" * 31}, InvalidName, "31 bytes"),
        ({"prefix": "p" * 30, "offset": 25}, InvalidName, "31 bytes"),
        ({"offset": -1}, InvalidIndex, "offset -1"),
        ({"offset": 2**63 - 1}, InvalidIndex, "offset"),
        ({"offset": 2**80}, InvalidIndex, "offset"),
        ({"offset": 1.0}, TypeError, "."),
        ({"device_ids": ["a", 1]}, TypeError, "."),
        ({"device_ids": ["a", None]}, TypeError, "."),
        ({"kind": None}, TypeError, "."),
        ({"prefix": None}, TypeError, "."),
    ],
)
def test_refusals_take_nothing(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    index, ordinals = BlockIndex(), BlockIndex()
    whole: dict[str, object] = {"device_ids": ["a", "b"], "kind": "drive", "prefix": "vd", "offset": 0, "scsi": True, **arguments}
    with pytest.raises(error, match=message):
        plan_text(index, ordinals, **whole)  # type: ignore[arg-type]
    assert len(index) == len(ordinals) == 0


@pytest.mark.parametrize("n", [-1, -(10**30)])
def test_negative_counts(n: int) -> None:
    with pytest.raises(InvalidIndex, match="negative"):
        plan_many(BlockIndex(), BlockIndex(), n)


def test_no_scsi_address_past_the_last() -> None:
    index, ordinals = BlockIndex(2**20), BlockIndex(2**20)
    index.acquire_many(65535)
    with pytest.raises(InvalidIndex, match="65535"):
        plan_text(index, ordinals, ["a", "b"], prefix="sd", scsi=True)
    assert (len(index), len(ordinals)) == (65535, 0)
    assert [drive.index for drive in plan_text(index, ordinals, ["a", "b"], prefix="vd", scsi=False)] == [65535, 65536]


def test_plans_of_two_indexes_named_both_ways_do_not_wait_for_each_other() -> None:
    one, other, threads, rounds, n = BlockIndex(2**20), BlockIndex(2**20), 8, 100, 1000
    start = threading.Barrier(threads)

    def work(me: int) -> None:
        index, ordinals = (one, other) if me % 2 else (other, one)
        start.wait()
        for _ in range(rounds):
            plan_many(index, ordinals, n)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    assert len(one) == len(other) == threads * rounds * n


def test_threads_plan_distinct_texts() -> None:
    index, ordinals = BlockIndex(), BlockIndex()

    def work(me: int) -> list[PlannedDrive]:
        return plan_text(index, ordinals, [f"{me}-{i}" for i in range(50)], prefix="vd", offset=1, scsi=True)

    with ThreadPoolExecutor(8) as pool:
        drives = [(me, i, drive) for me, batch in enumerate(pool.map(work, range(200))) for i, drive in enumerate(batch)]
    assert sorted(drive.index for _, _, drive in drives) == list(range(10_000))
    assert sorted(drive.ordinal for _, _, drive in drives) == list(range(10_000))
    for me, i, drive in drives:
        assert drive.id == f"drive-{me}-{i}"
        assert drive.scsi_address == scsi_address(drive.index)
        assert drive.name == drive_name(drive.ordinal + 1)
