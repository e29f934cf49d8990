"""Hold what was counted of operations: how many, and how long they took.

Durations go into buckets whose bounds grow by a quarter of an octave (19 %), so quantiles are right to that; sums and
the longest are exact.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

#: Buckets per octave, as a power of two.
_FINE = 2
#: Buckets in all: durations of up to 2^48 ns (78 hours), longer ones count as such.
BUCKETS = 48 << _FINE


def bucket_of(duration_ns: int) -> int:
    """Return the number of the bucket that a duration falls into."""
    octave = duration_ns.bit_length()
    if octave <= _FINE:
        return 0
    return min(BUCKETS - 1, (octave - _FINE << _FINE) + (duration_ns >> octave - 1 - _FINE & (1 << _FINE) - 1))


def _bounds(bucket: int) -> tuple[int, int]:
    """Return the durations of a bucket in ns: the lowest, and the lowest of the next one."""

    def lowest(number: int) -> int:
        octave, part = (number >> _FINE) + _FINE, number & (1 << _FINE) - 1
        return (1 << octave - 1) + (part << octave - 1 - _FINE) if number >= 1 << _FINE else 0

    return lowest(bucket), lowest(bucket + 1)


class Durations(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Hold what was counted of one kind of operation. ``buckets``: number of a bucket to how many fell into it."""

    count: int
    total_ns: int
    longest_ns: int
    buckets: dict[int, int]

    def quantile_ns(self, share: float) -> int:
        """Return what ``share`` of the operations took at most: the middle of the bucket where that falls."""
        if not self.count:
            return 0
        wanted = share * self.count
        for bucket in sorted(self.buckets):
            wanted -= self.buckets[bucket]
            if wanted <= 0:
                return min(self.longest_ns, sum(_bounds(bucket)) // 2)
        return self.longest_ns

    def since(self, before: "Durations | None") -> "Durations":
        """Return what came after an earlier look. ``longest_ns`` is then no more than a bound."""
        if before is None:
            return self
        buckets = {bucket: count - before.buckets.get(bucket, 0) for bucket, count in self.buckets.items()}
        return Durations(
            self.count - before.count,
            self.total_ns - before.total_ns,
            max((_bounds(bucket)[1] for bucket, count in buckets.items() if count), default=0)
            if self.longest_ns == before.longest_ns
            else self.longest_ns,
            {bucket: count for bucket, count in buckets.items() if count},
        )


class Counters(NamedTuple):
    """Count what a daemon does below its requests. The first two say what is under way now."""

    requests_in_flight: int = 0
    disk_in_flight: int = 0
    #: Operations through io_uring that were done at once, those that were waited for, and plain calls in their place.
    disk_at_once: int = 0
    disk_waited: int = 0
    disk_plain: int = 0
    #: Chunk files that had to be opened, and those that are open.
    files_opened: int = 0
    files_open: int = 0
    #: Times that the process went to sleep for want of messages.
    sleeps: int = 0


def since(now: Mapping[str, Durations], before: Mapping[str, Durations]) -> dict[str, Durations]:
    """Return what came after an earlier look, by name; names of which nothing came are left out."""
    changed = {name: durations.since(before.get(name)) for name, durations in now.items()}
    return {name: durations for name, durations in changed.items() if durations.count}


def joined(many: Iterable[Durations]) -> Durations:
    """Sum up several."""
    count = total_ns = longest_ns = 0
    buckets: dict[int, int] = {}
    for one in many:
        count, total_ns, longest_ns = count + one.count, total_ns + one.total_ns, max(longest_ns, one.longest_ns)
        for bucket, number in one.buckets.items():
            buckets[bucket] = buckets.get(bucket, 0) + number
    return Durations(count, total_ns, longest_ns, buckets)
