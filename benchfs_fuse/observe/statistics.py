"""Count operations and how long they take: always on, so some 0.3 µs for each and a bounded memory.

Counters never go back: whoever wants a rate takes the difference of two looks (``durations.since``).
"""

import time

from .durations import BUCKETS, Durations, bucket_of


class _Counting:
    __slots__ = ("buckets", "count", "longest_ns", "total_ns")

    def __init__(self) -> None:
        self.count = self.total_ns = self.longest_ns = 0
        self.buckets = [0] * BUCKETS


class Statistics:
    """Count operations by name, from one thread."""

    def __init__(self) -> None:
        self._by_name: dict[str, _Counting] = {}

    def add(self, name: str, started_ns: int) -> None:
        """Count one operation that began at ``started_ns`` (time.perf_counter_ns) and has ended now."""
        duration_ns = time.perf_counter_ns() - started_ns
        counting = self._by_name.get(name)
        if counting is None:
            counting = self._by_name[name] = _Counting()
        counting.count += 1
        counting.total_ns += duration_ns
        if duration_ns > counting.longest_ns:
            counting.longest_ns = duration_ns
        counting.buckets[bucket_of(duration_ns)] += 1

    def count(self, name: str) -> int:
        """Return how many operations of a name there were."""
        counting = self._by_name.get(name)
        return counting.count if counting is not None else 0

    def durations(self) -> dict[str, Durations]:
        """Return everything counted so far, by name."""
        return {
            name: Durations(
                counting.count,
                counting.total_ns,
                counting.longest_ns,
                {bucket: count for bucket, count in enumerate(counting.buckets) if count},
            )
            for name, counting in sorted(self._by_name.items())
        }
