"""What is said about measured times follows from them."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse.bench.samples import Moved, Ratio, Samples, Throughput, ratio, ratio_of, spread

ROUNDS = st.lists(st.lists(st.integers(0, 10**12), min_size=1, max_size=20), min_size=1, max_size=6)


@given(ROUNDS)
def test_figures_are_ordered_and_lie_within_the_samples(rounds: list[list[int]]) -> None:
    samples = Samples.of(rounds)
    flat = [one for some in rounds for one in some]
    p50, p90, p99 = samples.percentiles_ns(50, 90, 99)
    assert samples.min_ns == min(flat) <= p50 <= p90 <= p99 <= samples.max_ns == max(flat)
    assert {p50, p90, p99} <= set(flat)
    assert samples.min_ns <= samples.mean_ns <= samples.max_ns
    assert samples.count == len(flat) and samples.total_ns == sum(flat)


@given(ROUNDS, st.floats(0.1, 100))
def test_a_percentile_is_the_smallest_sample_that_so_many_do_not_exceed(
    rounds: list[list[int]], percent: float
) -> None:
    (found,) = Samples.of(rounds).percentiles_ns(percent)
    flat = [one for some in rounds for one in some]
    assert sum(one <= found for one in flat) * 100 >= percent * len(flat) * (1 - 1e-12)
    assert sum(one < found for one in flat) * 100 < percent * len(flat) * (1 + 1e-12)


@given(ROUNDS)
def test_samples_survive_json(rounds: list[list[int]]) -> None:
    samples = Samples.of(rounds)
    assert msgspec.json.decode(msgspec.json.encode(samples), type=Samples) == samples


@given(ROUNDS, st.integers(2, 1000))
def test_what_takes_n_times_as_long_has_the_ratio_n(rounds: list[list[int]], times: int) -> None:
    floor = Samples.of([[one + 1 for one in some] for some in rounds])
    ours = Samples.of([[(one + 1) * times for one in some] for some in rounds])
    found = ratio(ours, floor)
    assert found.low <= found.value <= found.high
    assert [found.low, found.value, found.high] == pytest.approx([times] * 3)
    assert not found.differs(ratio(ours, floor))


@given(ROUNDS, ROUNDS)
def test_a_ratio_lies_among_those_of_its_rounds(ours: list[list[int]], floor: list[list[int]]) -> None:
    found = ratio(Samples.of(ours), Samples.of(floor))
    assert 0 <= found.low <= found.value <= found.high


def test_a_throughput_is_the_median_of_its_rounds() -> None:
    slow, fast = (Throughput.of(Moved(size << 20, 500_000_000) for size in sizes) for sizes in ((1, 3, 2), (4, 6, 5)))
    assert slow.rates == pytest.approx([2, 6, 4]) and slow.mib_per_s == pytest.approx(4)
    assert str(fast) == "10 (8-12)"
    assert fast.times(slow) == ratio_of(fast.rates, slow.rates) == Ratio(2.5, 2.0, 4.0)
    assert msgspec.json.decode(msgspec.json.encode(fast), type=Throughput) == fast


@pytest.mark.parametrize("moved", [(0, 1), (1, 0), (-1, 1)])
def test_no_round_moves_nothing_or_takes_no_time(moved: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a round moves bytes"):
        Moved(*moved)


def test_ratios_differ_only_where_no_round_of_one_lies_among_the_others() -> None:
    before = Ratio(1.0, 0.9, 1.1)
    assert before.differs(Ratio(1.3, 1.2, 1.4)) and before.differs(Ratio(0.5, 0.4, 0.6))
    assert not before.differs(Ratio(1.3, 1.1, 1.4)) and not before.differs(Ratio(1.0, 0.5, 2.0))


def test_known_figures() -> None:
    samples = Samples.of([[1000, 2000, 3000], [], [5000, 4000]])
    assert samples.percentiles_ns(50, 90, 99) == [3000, 5000, 5000]
    assert samples.medians_ns == [2000, 4500] and samples.median_ns == 3250
    assert spread(samples) == (2000, 4500)
    assert samples.rate == 5e9 / 15000 and samples.bytes_per_s(10) == samples.rate * 10
    summary = samples.summary()
    assert (summary.count, summary.p50_us, summary.p90_us, summary.max_us, summary.mean_us) == (5, 3.0, 5.0, 5.0, 3.0)


@pytest.mark.parametrize("rounds", [[], [[]], [[], []]])
def test_no_samples_are_none(rounds: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="rounds"):
        Samples.of(rounds)


@pytest.mark.parametrize(
    "text", [b'{"rounds":[]}', b'{"rounds":[[]]}', b'{"rounds":[[-1]]}', b'{"rounds":[[1]],"x":1}']
)
def test_what_no_measurement_gives_is_refused(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=Samples)
