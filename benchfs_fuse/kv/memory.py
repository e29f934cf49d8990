"""Keep keys and values in a dictionary: the twin of the RocksDB store, for tests alone.

A process that dies is played by a hook that raises from within ``write`` and a new store made over ``contents()``.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence

import trio


class MemoryStore:
    """Implement KeyValueStore in memory.

    ``before_write`` and ``after_write`` are called with the number of the write (1 for the first). What they raise
    comes out of ``write``: from the first nothing of that write has been applied, from the second all of it.
    """

    before_write: Callable[[int], None] | None = None
    after_write: Callable[[int], None] | None = None
    #: How many calls of ``write`` there have been, failed ones included, and how many syncs have ended.
    writes: int = 0
    syncs: int = 0

    def __init__(self, contents: Mapping[bytes, bytes] | None = None) -> None:
        self._values: dict[bytes, bytes] = dict(contents or {})
        self._keys: list[bytes] = sorted(self._values)
        self._closed = False

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, None if there is none."""
        assert not self._closed
        return self._values.get(key)

    def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Iterate in key order over ``start <= key < stop``, as of the call."""
        assert not self._closed
        keys = self._keys[bisect_left(self._keys, start) : bisect_left(self._keys, stop)]
        return iter([(key, self._values[key]) for key in keys])

    def write(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        """Apply all puts, then all deletes, or none."""
        assert not self._closed
        self.writes += 1
        number = self.writes
        if self.before_write is not None:
            self.before_write(number)
        for key, value in puts:
            if key not in self._values:
                insort(self._keys, key)
            self._values[key] = bytes(value)
        for key in deletes:
            if self._values.pop(key, None) is not None:
                del self._keys[bisect_left(self._keys, key)]
        if self.after_write is not None:
            self.after_write(number)

    async def sync(self) -> None:
        """Do nothing but yield: memory is as stable as it gets."""
        assert not self._closed
        await trio.lowlevel.checkpoint()
        self.syncs += 1

    def close(self) -> None:
        """Release the store; ``contents`` stays readable, so that a test can start the next one over it."""
        self._closed = True

    def contents(self) -> dict[bytes, bytes]:
        """Return a copy of everything stored."""
        return dict(self._values)
