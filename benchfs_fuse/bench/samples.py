"""Hold measured times as they were taken, and say about them only what they bear. Pure.

Everything that is compared is measured in alternating rounds: ours, floor, ours, floor … A round lasts long enough for
a median and short enough that the machine is the same for both. What is reported of a comparison is the median of the
rounds' ratios, and how far apart the rounds were: on a machine that is shared, that spread is the truth about it.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

import msgspec

from ..limits import MIB

_NS_PER_S = 1_000_000_000


class Samples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold the durations of one operation in ns, round by round, in the order in which they were taken.

    There is at least one round, and none is empty. msgspec writes it to JSON and reads it back as it is.
    """

    rounds: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Refuse what no measurement gives. ValueError (from msgspec: ValidationError)."""
        if not self.rounds or not all(self.rounds):
            raise ValueError("a measurement has rounds, and a round has samples")
        if min(map(min, self.rounds)) < 0:
            raise ValueError("no duration is negative")

    @classmethod
    def of(cls, rounds: Iterable[Sequence[int]]) -> "Samples":
        """Make samples of rounds; empty ones (somebody was interrupted) are left out. ValueError: nothing is left."""
        return cls(tuple(tuple(one) for one in rounds if one))

    @property
    def count(self) -> int:
        """Return how many operations were timed."""
        return sum(map(len, self.rounds))

    @property
    def total_ns(self) -> int:
        """Return the sum of all durations."""
        return sum(map(sum, self.rounds))

    @property
    def mean_ns(self) -> float:
        """Return the arithmetic mean."""
        return self.total_ns / self.count

    @property
    def max_ns(self) -> int:
        """Return the longest."""
        return max(map(max, self.rounds))

    @property
    def min_ns(self) -> int:
        """Return the shortest."""
        return min(map(min, self.rounds))

    def percentiles_ns(self, *percents: float) -> list[int]:
        """Return, for each of ``percents``, the smallest sample that so many percent do not exceed (nearest rank)."""
        ordered = sorted(duration for one in self.rounds for duration in one)
        return [ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] for percent in percents]

    @property
    def p50_ns(self) -> int:
        """Return the median: half of all take no longer."""
        return self.percentiles_ns(50)[0]

    @property
    def p90_ns(self) -> int:
        """Return what nine of ten do not exceed."""
        return self.percentiles_ns(90)[0]

    @property
    def p99_ns(self) -> int:
        """Return what 99 of 100 do not exceed."""
        return self.percentiles_ns(99)[0]

    @property
    def medians_ns(self) -> list[float]:
        """Return the median of each round."""
        return [float(median(one)) for one in self.rounds]

    @property
    def median_ns(self) -> float:
        """Return the median of the rounds' medians: what comparisons are made of."""
        return float(median(self.medians_ns))

    @property
    def rate(self) -> float:
        """Return operations per second, one after the other."""
        return self.count * _NS_PER_S / max(1, self.total_ns)

    def bytes_per_s(self, length: int) -> float:
        """Return the throughput if each operation moved ``length`` bytes."""
        return self.rate * length

    def summary(self) -> "Summary":
        """Return the figures that a table shows."""
        p50, p90, p99 = self.percentiles_ns(50, 90, 99)
        return Summary(
            self.count, p50 / 1e3, p90 / 1e3, p99 / 1e3, self.max_ns / 1e3, self.mean_ns / 1e3, round(self.rate, 1)
        )


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sum up samples: microseconds, and operations per second one after the other."""

    count: int
    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float
    mean_us: float
    rate: float


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say how many times one thing takes of another: the median over the rounds, and the extremes among them."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Write ``1.32 (1.28-1.41)``."""
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"

    def differs(self, other: "Ratio") -> bool:
        """Tell whether two ratios are apart beyond noise: no round of one lies among the rounds of the other."""
        return self.low > other.high or self.high < other.low


def ratio(ours: Samples, floor: Samples) -> Ratio:
    """Compare two measurements whose rounds alternated, round by round; what one has more of is left out."""
    return ratio_of(ours.medians_ns, [max(1.0, base) for base in floor.medians_ns])  # a clock may not see what is short


def ratio_of(ours: Iterable[float], floor: Iterable[float]) -> Ratio:
    """Compare figures of rounds that alternated, round by round; what one has more of is left out."""
    ratios = [own / base for own, base in zip(ours, floor, strict=False)]
    return Ratio(median(ratios), min(ratios), max(ratios))


class Moved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say how many bytes one round moved in how many ns: at least one of each."""

    bytes: int
    ns: int

    def __post_init__(self) -> None:
        """Refuse what no measurement gives. ValueError (from msgspec: ValidationError)."""
        if self.bytes < 1 or self.ns < 1:
            raise ValueError("a round moves bytes, and that takes time")

    @property
    def mib_per_s(self) -> float:
        """Return the throughput in MiB/s."""
        return self.bytes / MIB * _NS_PER_S / self.ns


class Throughput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold what the rounds of a measurement moved, in their order, and the median of their MiB/s."""

    rounds: tuple[Moved, ...]
    mib_per_s: float

    @classmethod
    def of(cls, rounds: Iterable[Moved]) -> "Throughput":
        """Sum up rounds, of which there is at least one."""
        kept = tuple(rounds)
        return cls(kept, median(one.mib_per_s for one in kept))

    @property
    def rates(self) -> list[float]:
        """Return the MiB/s of each round."""
        return [one.mib_per_s for one in self.rounds]

    def __str__(self) -> str:
        """Write ``1,234 (1,150-1,301)``: the median and the extremes, in MiB/s."""
        return f"{self.mib_per_s:,.0f} ({min(self.rates):,.0f}-{max(self.rates):,.0f})"

    def times(self, base: "Throughput") -> Ratio:
        """Say how many times as fast this is as something whose rounds alternated with these."""
        return ratio_of(self.rates, base.rates)


class Spread(NamedTuple):
    """Say how rounds of one measurement differ: the extremes of their medians, in ns."""

    low_ns: float
    high_ns: float


def spread(samples: Samples) -> Spread:
    """Return how far apart the rounds' medians are."""
    medians = samples.medians_ns
    return Spread(min(medians), max(medians))
