"""Map byte ranges to chunks, chunks to virtual shards, shards to daemons. Pure arithmetic.

A file's chunks come in rows of ``width`` (the number of daemons when the file was made). The chunks of one row lie on
``width`` consecutive virtual shards, hence, with the round-robin map of a fresh cluster, on ``width`` different
daemons; where a row starts is a hash of inode and row, so that no stride through a file falls on one daemon only.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from .limits import SHARDS
from .model import DaemonId, shard_of

_MASK = (1 << 64) - 1
#: Rows whose places are remembered: those of the files at work.
ROWS_KEPT = 4096


def mix64(value: int) -> int:
    """Scatter 64 bits (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


class Extent(NamedTuple):
    """Name a piece of a byte range within one chunk: ``length`` bytes at ``offset`` of chunk ``index``.

    ``position`` is where the piece starts within the whole range.
    """

    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    offset: int
    length: int
    position: int


def extents(offset: int, length: int, chunk_size: int) -> Iterator[Extent]:
    """Cut the ``length`` bytes at file offset ``offset`` into pieces that lie in one chunk each, in order."""
    position = 0
    while position < length:
        index, within = divmod(offset + position, chunk_size)
        piece = min(length - position, chunk_size - within)
        yield Extent(index, within, piece, position)
        position += piece


def chunk_shard(ino: int, index: int, width: int) -> int:
    """Return the virtual shard of chunk ``index`` of file ``ino`` whose rows are ``width`` chunks wide."""
    row, column = divmod(index, width)
    return _row_shard(ino, row, width) + column


@lru_cache(ROWS_KEPT)
def _row_shard(ino: int, row: int, width: int) -> int:
    """Return where a row begins; the two hashes take as long as a tenth of a small request does in the caller."""
    return mix64(ino ^ mix64(row)) % (SHARDS - width + 1)


class ShardMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Map virtual shards to daemons. A newer ``version`` replaces an older one; ``daemons[s]`` holds shard ``s``."""

    version: int
    daemons: tuple[int, ...]

    @classmethod
    def round_robin(cls, count: int) -> "ShardMap":
        """Make the first map of a cluster of ``count`` daemons, numbered from 0."""
        return cls(1, tuple(shard % count for shard in range(SHARDS)))

    def __post_init__(self) -> None:
        if len(self.daemons) != SHARDS:
            raise ValueError(f"a shard map has {SHARDS} entries, this one has {len(self.daemons)}")

    def of_ino(self, ino: int) -> DaemonId:
        """Return the daemon that holds an inode. An inode number out of range is a ValueError."""
        shard = shard_of(ino)
        if not 0 <= shard < SHARDS:
            raise ValueError(f"inode number {ino} names no shard")
        return DaemonId(self.daemons[shard])

    def of_chunk(self, ino: int, index: int, width: int) -> DaemonId:
        """Return the daemon that holds a chunk."""
        return DaemonId(self.daemons[chunk_shard(ino, index, width)])

    def of_chunks(self, ino: int, indexes: Sequence[int] | range, width: int) -> set[DaemonId]:
        """Return the daemons that hold any of ``indexes``; looks at no more chunks than needed to name them all."""
        everyone = len(set(self.daemons))
        found: set[DaemonId] = set()
        for index in indexes:
            found.add(self.of_chunk(ino, index, width))
            if len(found) == everyone:
                break
        return found
