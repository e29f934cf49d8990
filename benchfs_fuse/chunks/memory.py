"""Keep chunks in a dictionary: the twin of the disk store, for tests alone. Counts allocated space the same way."""

from collections.abc import Sequence

import trio

from ..errors import NoSpace
from ..model import ChunkId, DiskUsage
from ..ports import Buffer, Trimmed
from .table import Record

#: What ``usage`` shows unless told otherwise: enough for any test, and no round number of anything.
TOTAL = 1 << 40


class MemoryChunkStore:
    """Implement ChunkStore in memory. Every method yields once, before it acts."""

    def __init__(self, total: int = TOTAL, filesystem: str = "memory") -> None:
        """Make an empty store that allocates up to ``total`` bytes."""
        self._total = total
        self._filesystem = filesystem
        self._chunks: dict[ChunkId, tuple[Record, bytearray]] = {}
        self._allocated = 0
        #: The files of all calls of ``sync`` so far, in order.
        self.synced: list[int] = []

    async def read(self, chunk: ChunkId, offset: int, into: memoryview) -> int:
        """Read into the caller's buffer; return how many bytes from ``offset`` on exist."""
        await trio.lowlevel.checkpoint()
        if chunk not in self._chunks:
            return 0
        found = self._chunks[chunk][1][offset : offset + len(into)]
        into[: len(found)] = found
        return len(found)

    async def write(self, chunk: ChunkId, offset: int, data: Buffer) -> int:
        """Write all of ``data``; return by how many bytes the chunk's allocated space grew."""
        await trio.lowlevel.checkpoint()
        if not data:
            return 0
        record, content = self._chunks.get(chunk, (Record(0), bytearray()))
        changed = record.with_write(offset, len(data))
        grown = changed.allocated - record.allocated
        if grown > self._total - self._allocated:
            raise NoSpace(f"{self._total - self._allocated} bytes free, {grown} needed")
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data
        self._chunks[chunk] = (changed, content)
        self._allocated += grown
        return grown

    async def trim(self, ino: int, index: int, offset: int) -> Trimmed:
        """Drop of file ``ino`` everything at and behind byte ``offset`` of chunk ``index``."""
        await trio.lowlevel.checkpoint()
        freed = self._drop(ino, index + 1 if offset else index)
        boundary = ChunkId(ino, index)
        if boundary in self._chunks:
            record, content = self._chunks[boundary]
            del content[offset:]
            self._chunks[boundary] = (record.cut(offset), content)
            freed += record.allocated - record.cut(offset).allocated
        self._allocated -= freed
        return Trimmed(freed, sum(record.allocated for found, (record, _) in self._chunks.items() if found.ino == ino))

    async def drop(self, inos: Sequence[int]) -> int:
        """Drop all chunks of these files; return the bytes freed."""
        await trio.lowlevel.checkpoint()
        freed = sum(self._drop(ino, 0) for ino in inos)
        self._allocated -= freed
        return freed

    def _drop(self, ino: int, index: int) -> int:
        gone = [chunk for chunk in self._chunks if chunk.ino == ino and chunk.index >= index]
        return sum(self._chunks.pop(chunk)[0].allocated for chunk in gone)

    async def sync(self, ino: int) -> None:
        """Note that ``ino`` was synced."""
        await trio.lowlevel.checkpoint()
        self.synced.append(ino)

    async def usage(self) -> list[DiskUsage]:
        """Return the space as of ``total``."""
        await trio.lowlevel.checkpoint()
        free = self._total - self._allocated
        return [DiskUsage(self._filesystem, self._total, free, free, 1 << 20, (1 << 20) - len(self._chunks))]

    def contents(self) -> dict[ChunkId, tuple[Record, bytes]]:
        """Return a copy of everything stored."""
        return {chunk: (record, bytes(content)) for chunk, (record, content) in self._chunks.items()}

    async def aclose(self) -> None:
        """Do nothing but yield; what is stored stays readable."""
        await trio.lowlevel.checkpoint()
