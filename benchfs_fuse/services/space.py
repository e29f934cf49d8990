"""Reserve, free, find and copy the space of one file: what fallocate(2), lseek(2) and copy_file_range(2) come down to.

The daemons alone know which blocks of a file have space. So everything here asks them and has them do it, chunk by
chunk, a few at once; what the mount has gathered must have been flushed before. What is never asked for chunk by chunk
is where data is: a page of every daemon's data ranges covers as much of the file as it may, be that a tebibyte.

Growth and ends are counted with the file's ``WriteBehind``, and published by whoever called.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from ..errors import FsError, NoDevice, NoSpace, QuotaExceeded
from ..layout import Extent, extents
from ..limits import PAYLOAD_MAX
from ..model import ChunkId
from .parallel import some_at_once
from .remote_chunks import RemoteChunkStore
from .write_behind import WriteBehind

#: Chunks of one call that are worked on at once: enough to keep several daemons busy.
PIECES_MAX = 16
#: Data ranges in one page of each daemon: some 20 KiB.
PAGE_MAX = 1024


class _Piece(NamedTuple):
    """Name bytes to be copied, by their position in the whole range, or a hole to be made there."""

    position: int
    length: int
    data: bool


class FileSpace:
    """Work on the space of one file, as a range of bytes over its chunks."""

    def __init__(self, ino: int, chunk_size: int, store: RemoteChunkStore, writing: WriteBehind) -> None:
        self._ino = ino
        self._chunk_size = chunk_size
        self._store = store
        self._writing = writing

    async def allocate(self, offset: int, length: int, size: int, *, zero: bool) -> None:
        """Reserve space for a range, and with ``zero`` make it zeros. The file's size stays ``size``.

        NoSpace, QuotaExceeded: what this has newly reserved behind the size is given back, but for blocks that somebody
        has written to meanwhile. Other errors leave any part of it done.
        """
        made: list[Extent] = []

        async def one(piece: Extent) -> None:
            chunk = ChunkId(self._ino, piece.index)
            grown = await self._store.allocate(chunk, piece.offset, piece.length, zero=zero)
            start = offset + piece.position
            self._count(chunk, grown, reach=start + piece.length)
            if start >= size and grown >= piece.length:
                made.append(piece)

        try:
            await some_at_once(one, extents(offset, length, self._chunk_size), PIECES_MAX)
        except (NoSpace, QuotaExceeded):
            with suppress(FsError):  # what cannot be given back now is given back when the file is settled
                await some_at_once(partial(self._punch, zeros_only=True), made, PIECES_MAX)
            raise

    async def punch(self, offset: int, end: int) -> None:
        """Make a range zeros and free its blocks."""
        first, stop = offset // self._chunk_size, -(-end // self._chunk_size)
        if stop - first <= PIECES_MAX:
            await some_at_once(self._punch, extents(offset, end - offset, self._chunk_size), PIECES_MAX)
            return
        while offset < end:
            ranges, after = await self._page(offset, end, PAGE_MAX)
            chunks = sorted({start // self._chunk_size for start, _ in ranges})
            await some_at_once(self._punch, list(self._within(chunks, offset, after)), PIECES_MAX)
            offset = after

    def _within(self, chunks: list[int], offset: int, end: int) -> Iterator[Extent]:
        """Yield the parts of chunks that lie in a range."""
        for index in chunks:
            start = max(offset, index * self._chunk_size)
            stop = min(end, (index + 1) * self._chunk_size)
            yield from extents(start, stop - start, self._chunk_size)

    async def _punch(self, piece: Extent, *, zeros_only: bool = False) -> None:
        chunk = ChunkId(self._ino, piece.index)
        self._count(chunk, -await self._store.punch(chunk, piece.offset, piece.length, zeros_only=zeros_only))

    def _count(self, chunk: ChunkId, grown: int, reach: int = 0) -> None:
        self._writing.note(self._store.daemon_of(chunk), grown, reach=reach)

    async def data_from(self, offset: int, size: int) -> int:
        """Return the first byte at or behind ``offset`` that is data. NoDevice: there is none below ``size``."""
        while offset < size:
            ranges, offset = await self._page(offset, size, 1)
            if ranges:
                return ranges[0][0]
        raise NoDevice(f"no data of inode {self._ino} up to {size}")

    async def hole_from(self, offset: int, size: int) -> int:
        """Return the first byte at or behind ``offset`` that is in a hole; the end of the file is one."""
        while offset < size:
            ranges, after = await self._page(offset, size, PAGE_MAX)
            for start, end in ranges:
                if start > offset:
                    break
                offset = end
            if offset < after:
                break
        return offset

    async def _page(self, offset: int, end: int, count_max: int) -> tuple[list[tuple[int, int]], int]:
        """Return data ranges of a part of a range of the file, in order, and how far that part reaches."""
        size = self._chunk_size
        index, within = divmod(offset, size)
        page = await self._store.map(self._ino, index, within, -(-end // size), count_max)
        after = end if page.more is None else page.more * size
        ranges = []
        for data in page.ranges:
            start = max(offset, data.index * size + data.offset)
            stop = min(after, data.index * size + min(data.offset + data.length, size))
            if start < stop:
                ranges.append((start, stop))
        return ranges, after

    async def copy_from(self, source: "FileSpace", offset: int, target_offset: int, length: int) -> int:
        """Have the daemons copy a range of ``source`` into this file, holes as holes; return how many bytes.

        An error after the beginning was copied is not raised: then it is fewer bytes, and behind them anything may have
        been copied. The caller publishes the end.
        """
        copied = 0
        while copied < length:
            ranges, after = await source._page(offset + copied, offset + length, PAGE_MAX)
            pieces = list(self._cut(source, ranges, offset, target_offset, copied, after - offset))
            missing = set(pieces)

            async def one(piece: _Piece, missing: set[_Piece] = missing) -> None:
                if piece.data:
                    await self._copy(source, offset + piece.position, target_offset + piece.position, piece.length)
                else:
                    start = target_offset + piece.position
                    await self.punch(start, start + piece.length)
                missing.discard(piece)

            try:
                await some_at_once(one, pieces, PIECES_MAX)
            except FsError:
                copied = min(piece.position for piece in missing)
                if not copied:
                    raise
                return copied
            copied = after - offset
        return copied

    def _cut(
        self,
        source: "FileSpace",
        ranges: list[tuple[int, int]],
        offset: int,
        target_offset: int,
        position: int,
        end: int,
    ) -> Iterator[_Piece]:
        """Cut positions up to ``end`` into holes and pieces of data, each within one chunk here and one there."""
        for start, stop in ranges:
            if offset + position < start:
                yield _Piece(position, start - offset - position, data=False)
                position = start - offset
            while position < stop - offset:
                room = min(
                    stop - offset - position,
                    source._chunk_size - (offset + position) % source._chunk_size,
                    self._chunk_size - (target_offset + position) % self._chunk_size,
                    PAYLOAD_MAX,
                )
                yield _Piece(position, room, data=True)
                position += room
        if position < end:
            yield _Piece(position, end - position, data=False)

    async def _copy(self, source: "FileSpace", offset: int, target_offset: int, length: int) -> None:
        """Copy bytes that lie in one chunk here and one there."""
        index, within = divmod(offset, source._chunk_size)
        target_index, target_within = divmod(target_offset, self._chunk_size)
        from_, to = ChunkId(source._ino, index), ChunkId(self._ino, target_index)
        daemon_id = source._store.daemon_of(from_)
        self._count(to, await self._store.copy(daemon_id, from_, within, to, target_within, length))
