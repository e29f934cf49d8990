"""Reach the chunks of all daemons through one ChunkStore: each chunk at the daemon that its layout names."""

from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from ..limits import PAYLOAD_MAX
from ..model import ChunkId, DataRange, DiskUsage
from ..ports import Buffer, Mapped, Trimmed
from ..rpc.client import Link, Links
from ..rpc.messages import (
    AllocateChunk,
    CopyChunk,
    Done,
    DropChunks,
    DropChunksReply,
    MapChunks,
    MapChunksReply,
    PunchChunk,
    PunchChunkReply,
    ReadChunk,
    ReadChunkReply,
    SyncChunks,
    TrimChunks,
    TrimChunksReply,
    Usage,
    UsageReply,
    WriteChunk,
    WriteChunkReply,
)
from .parallel import each


class RemoteChunkStore:
    """Implement ChunkStore over the links, for files whose rows are ``width`` chunks wide.

    Daemons alone may trim and drop; a mount that tries is answered NotPermitted. Errors of the links (Stale,
    DaemonUnreachable) come out too. What was sent again after a reconnection may have been done before: then the growth
    or the freed bytes that it returns are too low. ``on_repeated`` is told the file of such a change.
    """

    def __init__(self, links: Links, width: int, on_repeated: Callable[[int], None] = lambda ino: None) -> None:
        self._links = links
        self._width = width
        self._on_repeated = on_repeated

    async def read(self, chunk: ChunkId, offset: int, into: memoryview) -> int:
        """Read into the caller's buffer; return how many bytes from ``offset`` on exist."""
        link = self._link(chunk)
        done = 0
        while done < len(into):
            piece = into[done : done + PAYLOAD_MAX]
            request = ReadChunk(chunk.ino, chunk.index, offset + done, len(piece))
            reply = await link.call(request, ReadChunkReply, into=piece)
            done += reply.length
            if reply.length < len(piece):
                break
        return done

    async def write(self, chunk: ChunkId, offset: int, data: Buffer) -> int:
        """Write all of ``data``; return by how many bytes the chunk's allocated space grew."""
        view = memoryview(data)
        grown = 0
        with self._watched(chunk) as link:
            for start in range(0, len(view), PAYLOAD_MAX):
                piece = view[start : start + PAYLOAD_MAX]
                request = WriteChunk(chunk.ino, chunk.index, offset + start)
                grown += (await link.call(request, WriteChunkReply, payload=piece)).allocated_delta
        return grown

    def begin_write(self, chunk: ChunkId, offset: int, data: Buffer) -> int | Coroutine[Any, Any, int]:
        """Begin to write all of ``data``, PAYLOAD_MAX at most; return the growth, or what waits for it.

        Errors as of ``write``; what waits is to be awaited, by whichever task, in its next step.
        """
        answer = self._link(chunk).begin(WriteChunk(chunk.ino, chunk.index, offset), WriteChunkReply, data)
        if isinstance(answer, WriteChunkReply):
            return answer.allocated_delta
        return self._grown(chunk, answer)

    async def _grown(self, chunk: ChunkId, answer: Coroutine[Any, Any, WriteChunkReply]) -> int:
        with self._watched(chunk):
            return (await answer).allocated_delta

    def _link(self, chunk: ChunkId) -> Link:
        return self._links.to(self.daemon_of(chunk))

    def daemon_of(self, chunk: ChunkId) -> int:
        """Return the daemon that holds a chunk."""
        return self._links.shard_map.of_chunk(chunk.ino, chunk.index, self._width)

    @contextmanager
    def _watched(self, chunk: ChunkId) -> Iterator[Link]:
        """Yield the link to a chunk's daemon, and tell if anything was sent again meanwhile."""
        link = self._link(chunk)
        repeated = link.repeated
        yield link
        if link.repeated != repeated:
            self._on_repeated(chunk.ino)

    def read_now(self, chunk: ChunkId, offset: int, into: memoryview) -> int | None:
        """Do nothing: daemons are far."""
        return None

    def write_now(self, chunk: ChunkId, offset: int, data: Buffer) -> int | None:
        """Do nothing: daemons are far."""
        return None

    async def allocate(self, chunk: ChunkId, offset: int, length: int, *, zero: bool = False) -> int:
        """Reserve space for ``length`` > 0 bytes; return by how many bytes the chunk's allocated space grew."""
        with self._watched(chunk) as link:
            request = AllocateChunk(chunk.ino, chunk.index, offset, length, zero)
            return (await link.call(request, WriteChunkReply)).allocated_delta

    async def punch(self, chunk: ChunkId, offset: int, length: int, *, zeros_only: bool = False) -> int:
        """Make a range zeros and free the blocks that lie in it as a whole; return the bytes freed."""
        with self._watched(chunk) as link:
            request = PunchChunk(chunk.ino, chunk.index, offset, length, zeros_only)
            return (await link.call(request, PunchChunkReply)).freed

    async def map(self, ino: int, index: int, offset: int, stop: int, count_max: int) -> Mapped:
        """Return the data ranges of a file that end behind byte ``offset`` of chunk ``index``, up to chunk ``stop``.

        One request to each daemon that may hold any of the chunks: a page ends where the first of theirs ends.
        """
        found: list[DataRange] = []
        ends: list[int] = []

        async def one(daemon_id: int) -> None:
            request = MapChunks(ino, index, offset, stop, count_max)
            reply = await self._links.to(daemon_id).call(request, MapChunksReply)
            found.extend(reply.ranges)
            if reply.more is not None:
                ends.append(reply.more)

        await each(one, self._links.shard_map.of_chunks(ino, range(index, stop), self._width))
        more = min(ends, default=None)
        found.sort(key=lambda data: (data.index, data.offset))
        return Mapped(tuple(data for data in found if more is None or data.index < more), more)

    async def copy(
        self, source_daemon: int, source: ChunkId, source_offset: int, chunk: ChunkId, offset: int, length: int
    ) -> int:
        """Have ``length`` bytes, PAYLOAD_MAX at most, copied between daemons; return the growth of ``chunk``."""
        with self._watched(chunk) as link:
            request = CopyChunk(source_daemon, *source, source_offset, *chunk, offset, length)
            return (await link.call(request, WriteChunkReply)).allocated_delta

    async def trim(self, ino: int, index: int, offset: int, *, durable: bool = False) -> Trimmed:
        """Drop everything of a file at and behind a point, on every daemon."""
        freed = left = 0

        async def one(daemon_id: int) -> None:
            nonlocal freed, left
            reply = await self._links.to(daemon_id).call(TrimChunks(ino, index, offset, durable), TrimChunksReply)
            freed, left = freed + reply.freed, left + reply.left

        await each(one, self._links.daemons)
        return Trimmed(freed, left)

    async def drop(self, inos: Sequence[int], *, durable: bool = False) -> int:
        """Drop all chunks of these files on every daemon; return the bytes freed."""
        freed = 0

        async def one(daemon_id: int) -> None:
            nonlocal freed
            reply = await self._links.to(daemon_id).call(DropChunks(tuple(inos), durable), DropChunksReply)
            freed += reply.freed  # in one step: the others count meanwhile

        await each(one, self._links.daemons)
        return freed

    async def sync(self, ino: int) -> None:
        """Bring everything written to ``ino`` so far to stable storage, on every daemon."""

        async def one(daemon_id: int) -> None:
            await self._links.to(daemon_id).call(SyncChunks(ino), Done)

        await each(one, self._links.daemons)

    async def usage(self) -> list[DiskUsage]:
        """Return the space of each file system under any daemon, each once."""
        found: dict[str, DiskUsage] = {}

        async def one(daemon_id: int) -> None:
            for usage in (await self._links.to(daemon_id).call(Usage(), UsageReply)).usage:
                found[usage.filesystem] = usage

        await each(one, self._links.daemons)
        return list(found.values())

    async def aclose(self) -> None:
        """Release nothing: the links belong to whoever opened them."""
        await trio.lowlevel.checkpoint()
