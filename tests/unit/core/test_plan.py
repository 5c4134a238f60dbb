"""Plans: both numbers or none."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyblock.core.index import BlockIndex
from pyblock.core.plan import plan, plan_many
from pyblock.errors import IndexesExhausted, InvalidIndex, InvalidValue


def pair(
    index: set[int], ordinals: set[int], capacity: int = 65536
) -> tuple[BlockIndex, BlockIndex]:
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


def test_exhaustion_of_either_takes_neither() -> None:
    for capacities in [(10, 5), (5, 10)]:
        index, ordinals = map(BlockIndex, capacities)
        for n in (6, 10**30):
            with pytest.raises(IndexesExhausted, match="5 of 5 free"):
                plan_many(index, ordinals, n)
        assert len(index) == len(ordinals) == 0
        plan_many(index, ordinals, 5)
        with pytest.raises(IndexesExhausted, match="0 of 5 free"):
            plan(index, ordinals)
        assert len(index) == len(ordinals) == 5


def test_one_object_as_both() -> None:
    index = BlockIndex()
    with pytest.raises(InvalidValue, match="one object"):
        plan(index, index)
    with pytest.raises(InvalidValue, match="one object"):
        plan_many(index, index, 1)
    assert len(index) == 0


@pytest.mark.parametrize("n", [-1, -(10**30)])
def test_negative_counts(n: int) -> None:
    with pytest.raises(InvalidIndex, match="negative"):
        plan_many(BlockIndex(), BlockIndex(), n)


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
