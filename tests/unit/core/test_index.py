"""The block index against a set with a linear probe, in every state that a random user can bring it
to, and under threads."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import oracle
from support.children import in_child

from pyblock.core.index import BlockIndex
from pyblock.errors import IndexesExhausted, IndexFree, IndexTaken, InvalidIndex

CAPACITIES = [1, 2, 63, 64, 65, 127, 128, 4095, 4096, 4097, 65536, 262144, 262145, 2**20]
OUTSIDE_INT64 = [
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    -(10**30),
    pytest.param(10**5000, id="10^5000"),
]


class Machine(RuleBasedStateMachine):
    """Does everything to a BlockIndex and to the oracle; indexes are drawn near the borders of
    words and levels."""

    @initialize(capacity=st.sampled_from([1, 63, 64, 65, 4096, 4097, 65536, 2**20]))
    def start(self, capacity: int) -> None:
        self.index, self.naive = BlockIndex(capacity), oracle.NaiveIndex(capacity)

    def near(self, seed: int) -> int:
        border = [0, 64, 128, 4096, 8192, 65536, 262144, self.naive.capacity][seed % 8]
        return border + (seed // 8) % 7 - 3

    @rule()
    def acquire(self) -> None:
        try:
            want = self.naive.acquire()
        except oracle.Full:
            with pytest.raises(IndexesExhausted):
                self.index.acquire()
        else:
            assert self.index.acquire() == want

    @rule(n=st.one_of(st.integers(0, 200), st.sampled_from([4032, 4096, 4097])))
    def acquire_many(self, n: int) -> None:
        try:
            want = self.naive.acquire_many(n)
        except oracle.Full:
            with pytest.raises(IndexesExhausted):
                self.index.acquire_many(n)
        else:
            assert self.index.acquire_many(n) == want

    @rule(seed=st.integers(0, 1000))
    def reserve(self, seed: int) -> None:
        value = self.near(seed)
        if not 0 <= value < self.naive.capacity:
            with pytest.raises(InvalidIndex):
                self.index.reserve(value)
        elif value in self.naive.taken:
            with pytest.raises(IndexTaken):
                self.index.reserve(value)
        else:
            self.index.reserve(value)
            self.naive.taken.add(value)

    @rule(seeds=st.lists(st.integers(0, 1000), max_size=5))
    def reserve_many(self, seeds: list[int]) -> None:
        values = [self.near(seed) for seed in seeds]
        bad = self.naive.first_bad(values)
        if bad is None:
            self.index.reserve_many(values)
            self.naive.taken.update(values)
        else:
            with pytest.raises(
                IndexTaken if 0 <= bad < self.naive.capacity else InvalidIndex,
                match=f"index {bad}[, ]",
            ):
                self.index.reserve_many(values)

    @rule(seed=st.integers(0, 1000))
    def release(self, seed: int) -> None:
        value = self.near(seed)
        if not 0 <= value < self.naive.capacity:
            with pytest.raises(InvalidIndex):
                self.index.release(value)
        elif value not in self.naive.taken:
            with pytest.raises(IndexFree):
                self.index.release(value)
        else:
            self.index.release(value)
            self.naive.taken.remove(value)

    @rule(seed=st.integers(0, 1000))
    def contains(self, seed: int) -> None:
        assert (self.near(seed) in self.index) == (self.near(seed) in self.naive.taken)

    @rule()
    def iterate(self) -> None:
        assert list(self.index) == sorted(self.naive.taken)

    @invariant()
    def same_count(self) -> None:
        if hasattr(self, "index"):
            assert len(self.index) == len(self.naive.taken)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_fills_to_the_last_and_no_further(capacity: int) -> None:
    index = BlockIndex(capacity)
    assert index.acquire_many(capacity) == list(range(capacity))
    with pytest.raises(IndexesExhausted, match=f"0 of {capacity} free"):
        index.acquire()
    for hole in {0, capacity // 2, capacity - 1}:
        index.release(hole)
        assert hole not in index
        assert index.acquire() == hole
    assert len(index) == index.capacity == capacity


@pytest.mark.parametrize("capacity", [0, -1, 2**20 + 1, *OUTSIDE_INT64])
def test_capacity_out_of_range(capacity: int) -> None:
    with pytest.raises(InvalidIndex, match=r"1 \.\.\. 1048576"):
        BlockIndex(capacity)


@pytest.mark.parametrize("capacity", [65, 4097, 65536, 2**20])
def test_high_indexes_reserved_first(capacity: int) -> None:
    index = BlockIndex(capacity)
    index.reserve_many({capacity - 1, 64, 0})
    assert index.acquire_many(63) == list(range(1, 64))
    assert list(index) == sorted({*range(65), capacity - 1})


def test_batches_are_all_or_none() -> None:
    index = BlockIndex(100)
    index.reserve(50)
    refused: list[tuple[Callable[[], object], type[Exception]]] = [
        (lambda: index.acquire_many(100), IndexesExhausted),
        (lambda: index.acquire_many(10**30), IndexesExhausted),
        (lambda: index.acquire_many(-1), InvalidIndex),
        (lambda: index.acquire_many(-(10**30)), InvalidIndex),
        (lambda: index.reserve_many([1, 2, 50]), IndexTaken),
        (lambda: index.reserve_many([1, 2, 1]), IndexTaken),
        (lambda: index.reserve_many([1, 2, 100]), InvalidIndex),
        (lambda: index.reserve_many([1, 2, -1]), InvalidIndex),
        (lambda: index.reserve_many([1, 2, 2**70]), InvalidIndex),
        (lambda: index.reserve_many([1, 1, 2**70]), IndexTaken),
        (lambda: index.reserve_many(cast(Any, [1, 2.0])), TypeError),
        (lambda: index.reserve_many(cast(Any, [1, None])), TypeError),
    ]
    for attempt, error in refused:
        with pytest.raises(error):
            attempt()
        assert list(index) == [50]
    assert index.acquire_many(0) == []
    index.reserve_many(iter([3, 1]))
    index.reserve_many(())
    assert list(index) == [1, 3, 50]


def test_double_release_and_release_of_a_free_one() -> None:
    index = BlockIndex(4096)
    with pytest.raises(IndexFree, match="index 7 "):
        index.release(7)
    with pytest.raises(IndexFree, match="index 4095 "):
        index.release(4095)
    index.release(index.acquire())
    with pytest.raises(IndexFree, match="index 0 "):
        index.release(0)
    assert len(index) == 0


@pytest.mark.parametrize("value", [-1, 4096, 2**20, *OUTSIDE_INT64])
def test_values_out_of_range(value: int) -> None:
    index = BlockIndex(4096)
    assert value not in index
    for attempt in (index.reserve, index.release, lambda each: index.reserve_many([each])):
        with pytest.raises(InvalidIndex, match=r"0 \.\.\. 4095"):
            attempt(value)


@pytest.mark.parametrize("value", [None, "1", 1.0, b"1", [1]])
def test_values_of_another_type(value: Any) -> None:
    index = BlockIndex(64)
    attempts: list[Callable[[Any], object]] = [
        index.reserve,
        index.release,
        index.__contains__,
        index.acquire_many,
        BlockIndex,
    ]
    for attempt in attempts:
        with pytest.raises(TypeError):
            attempt(value)
    assert len(index) == 0


def test_iteration_over_many_chunks_and_changes_meanwhile() -> None:
    index = BlockIndex()
    index.acquire_many(5000)
    for odd in range(1, 5000, 2):
        index.release(odd)
    assert list(index) == list(range(0, 5000, 2))
    seen = []
    for each in index:
        seen.append(each)
        index.release(each)
    assert seen == list(range(0, 5000, 2))
    assert len(index) == 0


@given(st.sets(st.integers(0, 2**20 - 1), max_size=50))
def test_iteration_is_ascending(values: set[int]) -> None:
    index = BlockIndex(2**20)
    index.reserve_many(values)
    assert list(index) == sorted(values)
    assert len(index) == len(values)


def test_memory_is_small_while_few_are_in_use() -> None:
    index = BlockIndex(2**20)
    sizes = []
    for _ in range(64):
        index.acquire()
        sizes.append(index.memory)
    assert max(sizes) <= 512
    index.acquire_many(2**20 - 64)
    assert index.memory < 2**20 / 8 * 1.05


def test_repr_truth_and_slots() -> None:
    index = BlockIndex()
    assert index
    index.acquire()
    assert repr(index) == "BlockIndex(capacity=65536, taken=1)"
    assert not hasattr(index, "__dict__")


def test_threads_never_share_an_index() -> None:
    """8 threads, 1,000,000 pairs of acquire and release; each writes its number into what it was
    given."""
    index, threads, pairs = BlockIndex(4096), 8, 125_000
    owner = [0] * 4096
    start = threading.Barrier(threads)

    def work(me: int) -> int:
        acquire, release, shared = index.acquire, index.release, 0
        start.wait()
        for _ in range(pairs // 4):
            mine = [acquire(), acquire(), acquire(), acquire()]
            for each in mine:
                shared += owner[each] != 0
                owner[each] = me
            for each in mine:
                shared += owner[each] != me
                owner[each] = 0
                release(each)
        return shared

    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(work, range(1, threads + 1))) == 0
    assert len(index) == 0
    assert index.acquire() == 0


def test_threads_and_batches() -> None:
    """Batches of several threads together are exactly the lowest indexes."""
    index = BlockIndex()
    with ThreadPoolExecutor(8) as pool:
        got = [each for batch in pool.map(index.acquire_many, [100] * 400) for each in batch]
    assert sorted(got) == list(range(40_000))


def test_asked_after_it_was_deleted() -> None:
    """As by what is in one circle with it, and is deleted after it."""
    asked: list[str] = []

    class Asks:
        def __init__(self) -> None:
            self.index = BlockIndex()
            self.circle = self

        def __del__(self) -> None:
            try:
                asked.append(repr(self.index))
            except AttributeError:
                asked.append("deleted")

    for _ in range(10):
        Asks()
    gc.collect()
    index = BlockIndex()
    index.__del__()
    with pytest.raises(AttributeError):
        index.acquire()
    assert len(asked) == 10


def test_a_child_forked_while_threads_are_inside() -> None:
    """It has the index, but not the threads: no lock is taken for ever, and no step is half
    done."""
    index, over, many = BlockIndex(65536), threading.Event(), 5000

    def churn() -> None:
        while not over.is_set():
            taken = index.acquire_many(many)
            for each in taken:
                index.release(each)

    def look() -> str:
        signal.alarm(60)  # ends a child that waits for ever
        count = len(index)
        taken = set(index)
        lowest = next(number for number in range(65536) if number not in taken)
        return f"{len(taken) - count} {index.acquire() - lowest} {len(index) - count}"

    with ThreadPoolExecutor(3) as pool:
        churning = [pool.submit(churn) for _ in range(3)]
        try:
            for _ in range(100):
                assert in_child(look) == (0, "0 0 1")
        finally:
            over.set()
        assert [each.result() for each in churning] == [None] * 3
