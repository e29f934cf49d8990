"""Counted durations: buckets, quantiles, differences of two looks, sums of several; and what counts them."""

import time
from statistics import quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse.observe.durations import BUCKETS, Durations, bucket_of, joined, since
from benchfs_fuse.observe.statistics import Statistics

#: Up to 78 hours, which is as far as the buckets go; with as many short ones as long ones.
durations_ns = st.integers(2, 48).flatmap(
    lambda bits: st.integers(1 << bits, (1 << bits + 1) - 1 if bits < 48 else 1 << 48)
)
many = st.lists(durations_ns, min_size=1, max_size=50)
#: What the module promises: bounds of buckets grow by so much.
RIGHT_TO = 0.19


def counted(values: list[int]) -> Durations:
    buckets: dict[int, int] = {}
    for value in values:
        buckets[bucket_of(value)] = buckets.get(bucket_of(value), 0) + 1
    return Durations(len(values), sum(values), max(values, default=0), buckets)


@given(durations_ns, durations_ns)
def test_longer_durations_never_fall_into_lower_buckets(one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert 0 <= bucket_of(low) <= bucket_of(high) < BUCKETS


def test_what_is_too_short_or_too_long_is_counted_as_well() -> None:
    assert bucket_of(0) == bucket_of(3) == 0
    assert bucket_of(1 << 62) == BUCKETS - 1
    assert counted([1 << 62]).quantile_ns(0.5) <= 1 << 62


@given(many, st.floats(0.01, 1.0))
def test_quantiles_are_right_to_what_is_promised(values: list[int], share: float) -> None:
    found = counted(values).quantile_ns(share)
    ordered = sorted(values)
    right = next(value for rank, value in enumerate(ordered, 1) if rank >= share * len(ordered))
    assert abs(found - right) <= RIGHT_TO * right
    assert found <= ordered[-1]


def test_quantiles_of_known_durations() -> None:
    values = [1000 * value for value in range(1, 101)]
    cuts = quantiles(values, n=100)
    for percent in (50, 90, 99):
        assert counted(values).quantile_ns(percent / 100) == pytest.approx(cuts[percent - 1], rel=RIGHT_TO)
    assert counted([]).quantile_ns(0.5) == 0


@given(many, many)
def test_what_came_since_an_earlier_look(before: list[int], after: list[int]) -> None:
    first, second = counted(before), counted(before + after)
    difference = second.since(first)
    alone = counted(after)
    assert (difference.count, difference.total_ns, difference.buckets) == (alone.count, alone.total_ns, alone.buckets)
    assert max(after) <= difference.longest_ns
    if max(after) > max(before):
        assert difference.longest_ns == max(after)
    else:
        assert difference.longest_ns <= 1.25 * max(after)  # the bound of its bucket
    assert second.since(None) == second
    assert second.since(second) == Durations(0, 0, 0, {})


@given(st.lists(many, max_size=5))
def test_sums_are_those_of_everything_counted_together(parts: list[list[int]]) -> None:
    assert joined(map(counted, parts)) == counted([value for part in parts for value in part])


def test_names_of_which_nothing_came_are_left_out() -> None:
    before = {"idle": counted([5]), "busy": counted([5])}
    now = {"idle": counted([5]), "busy": counted([5, 7]), "new": counted([9])}
    assert since(now, before) == {"busy": counted([7]), "new": counted([9])}


def test_statistics_count_by_name_and_never_go_back() -> None:
    statistics = Statistics()
    assert statistics.count("read") == 0 and statistics.durations() == {}
    begun = time.perf_counter_ns()
    statistics.add("write", begun - 1_000_000)
    statistics.add("read", begun)
    first = statistics.durations()
    statistics.add("write", begun - 5_000_000_000)
    second = statistics.durations()
    assert list(first) == ["read", "write"]
    assert statistics.count("write") == second["write"].count == sum(second["write"].buckets.values()) == 2
    assert first["write"].count == 1, "what was returned does not change"
    assert 1_000_000 <= first["write"].total_ns == first["write"].longest_ns
    assert 5_000_000_000 <= second["write"].longest_ns < second["write"].total_ns
    assert second["read"] == first["read"]
