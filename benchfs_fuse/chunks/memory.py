"""Keep chunks in a dictionary: the twin of the disk store, for tests alone. Counts allocated space the same way."""

from collections.abc import Callable, Sequence

import trio

from ..errors import NoSpace
from ..model import INO_END, ChunkId, DataRange, DiskUsage
from ..ports import Buffer, ChunkState, FileSum, Held, Mapped, StrayFile, Sums, Trimmed
from .table import Record, mapped

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
        grown = self._grow(chunk, offset, len(data))
        self._chunks[chunk][1][offset : offset + len(data)] = data
        return grown

    def _grow(self, chunk: ChunkId, offset: int, length: int) -> int:
        """Give a range space, with zeros where there was none; return the growth."""
        record, content = self._chunks.get(chunk, (Record(0), bytearray()))
        changed = record.with_write(offset, length)
        grown = changed.allocated - record.allocated
        if grown > self._total - self._allocated:
            raise NoSpace(f"{self._total - self._allocated} bytes free, {grown} needed")
        content.extend(bytes(max(0, offset + length - len(content))))
        self._chunks[chunk] = (changed, content)
        self._allocated += grown
        return grown

    def read_now(self, chunk: ChunkId, offset: int, into: memoryview) -> int | None:
        """Do nothing: everything yields here, so that tests meet what may happen meanwhile."""
        return None

    def write_now(self, chunk: ChunkId, offset: int, data: Buffer) -> int | None:
        """Do nothing: everything yields here, so that tests meet what may happen meanwhile."""
        return None

    async def allocate(self, chunk: ChunkId, offset: int, length: int, *, zero: bool = False) -> int:
        """Reserve space for ``length`` > 0 bytes; return by how many bytes the chunk's allocated space grew."""
        await trio.lowlevel.checkpoint()
        grown = self._grow(chunk, offset, length)
        if zero:
            self._chunks[chunk][1][offset : offset + length] = bytes(length)
        return grown

    async def punch(self, chunk: ChunkId, offset: int, length: int, *, zeros_only: bool = False) -> int:
        """Make a range zeros and free the blocks that lie in it as a whole; return the bytes freed."""
        await trio.lowlevel.checkpoint()
        if chunk not in self._chunks:
            return 0
        record, content = self._chunks[chunk]
        changed = record
        if zeros_only:
            granule = record.granule
            for start in range(-(-offset // granule) * granule, (offset + length) // granule * granule, granule):
                if not any(content[start : start + granule]):
                    changed = changed.without(start, granule)
        else:
            changed = record.without(offset, length)
            end = max(offset, min(offset + length, len(content)))
            content[offset:end] = bytes(end - offset)
        self._chunks[chunk] = (changed, content)
        self._allocated -= record.allocated - changed.allocated
        return record.allocated - changed.allocated

    async def map(self, ino: int, index: int, offset: int, stop: int, count_max: int) -> Mapped:
        """Return the data ranges of a file that end behind byte ``offset`` of chunk ``index``, up to chunk ``stop``."""
        await trio.lowlevel.checkpoint()
        found: list[DataRange] = []
        for at in sorted(chunk.index for chunk in self._chunks if chunk.ino == ino and index <= chunk.index < stop):
            if len(found) >= count_max:
                return Mapped(tuple(found), at)
            found += mapped(at, self._chunks[ChunkId(ino, at)][0], offset if at == index else 0)
        return Mapped(tuple(found), None)

    async def trim(self, ino: int, index: int, offset: int, *, durable: bool = False) -> Trimmed:
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

    async def drop(self, inos: Sequence[int], *, durable: bool = False) -> int:
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


class MemoryInspector:
    """Implement ChunkInspector for the store in memory. Tests say what is to be wrong: files have no records there."""

    folders = 1

    def __init__(self, store: MemoryChunkStore) -> None:
        self._store = store
        #: Chunks whose files are damaged, and how.
        self.troubles: dict[ChunkId, str] = {}
        self.stray_files: list[StrayFile] = []

    @property
    def to_remove(self) -> int:
        """Return 0: what is dropped is gone."""
        return 0

    async def page(self, start: ChunkId) -> list[ChunkState]:
        """Return two of the chunks from ``start`` on, in order, so that there are several pages of a few."""
        await trio.lowlevel.checkpoint()
        contents = self._store.contents()
        return [
            ChunkState(chunk, record.birth, record.length, record.allocated, self.troubles.get(chunk, ""))
            for chunk in sorted(chunk for chunk in contents if chunk >= start)[:2]
            for record, _ in [contents[chunk]]
        ]

    async def held(self, ino: int, index: int, offset: int) -> Held:
        """Sum up the chunks of a file, and count those that reach behind byte ``offset`` of chunk ``index``."""
        await trio.lowlevel.checkpoint()
        own = [(chunk.index, record) for chunk, (record, _) in self._store.contents().items() if chunk.ino == ino]
        beyond = sum(at > index or (at == index and record.length > offset) for at, record in own)
        return Held(len(own), sum(record.allocated for _, record in own), beyond)

    async def sums(self, start: int, wanted: Callable[[int], bool]) -> Sums:
        """Sum up two of the files from inode ``start`` on."""
        await trio.lowlevel.checkpoint()
        files: dict[int, FileSum] = {}
        for chunk, (record, _) in sorted(self._store.contents().items()):
            if chunk.ino >= start and wanted(chunk.ino):
                allocated = record.allocated + (files[chunk.ino].allocated if chunk.ino in files else 0)
                files[chunk.ino] = FileSum(chunk.ino, allocated, chunk.index, record.length)
        found = list(files.values())
        return Sums(found[:2], found[2].ino if len(found) > 2 else INO_END)

    async def strays(self, folders: range) -> list[StrayFile]:
        """Return what the test says."""
        await trio.lowlevel.checkpoint()
        return self.stray_files

    async def remove_strays(self, folder: int, names: Sequence[str]) -> int:
        """Remove what the test has put there."""
        await trio.lowlevel.checkpoint()
        gone = [file for file in self.stray_files if file.name in names and file.chunk is not None]
        self.stray_files = [file for file in self.stray_files if file not in gone]
        return sum(file.length for file in gone)
