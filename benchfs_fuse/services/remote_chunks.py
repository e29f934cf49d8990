"""Reach the chunks of all daemons through one ChunkStore: each chunk at the daemon that its layout names."""

from collections.abc import Callable, Sequence

import trio

from ..limits import PAYLOAD_MAX
from ..model import ChunkId, DiskUsage
from ..ports import Buffer, Trimmed
from ..rpc.client import Links
from ..rpc.messages import (
    Done,
    DropChunks,
    DropChunksReply,
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
    or the freed bytes that it returns are too low. ``on_repeated`` is told the file of a write that may be such a one.
    """

    def __init__(self, links: Links, width: int, on_repeated: Callable[[int], None] = lambda ino: None) -> None:
        self._links = links
        self._width = width
        self._on_repeated = on_repeated

    async def read(self, chunk: ChunkId, offset: int, into: memoryview) -> int:
        """Read into the caller's buffer; return how many bytes from ``offset`` on exist."""
        link = self._links.to(self._links.shard_map.of_chunk(chunk.ino, chunk.index, self._width))
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
        link = self._links.to(self._links.shard_map.of_chunk(chunk.ino, chunk.index, self._width))
        view = memoryview(data)
        grown = 0
        repeated = link.repeated
        for start in range(0, len(view), PAYLOAD_MAX):
            piece = view[start : start + PAYLOAD_MAX]
            request = WriteChunk(chunk.ino, chunk.index, offset + start)
            grown += (await link.call(request, WriteChunkReply, payload=piece)).allocated_delta
        if link.repeated != repeated:
            self._on_repeated(chunk.ino)
        return grown

    async def trim(self, ino: int, index: int, offset: int) -> Trimmed:
        """Drop everything of a file at and behind a point, on every daemon."""
        freed = left = 0

        async def one(daemon_id: int) -> None:
            nonlocal freed, left
            reply = await self._links.to(daemon_id).call(TrimChunks(ino, index, offset), TrimChunksReply)
            freed, left = freed + reply.freed, left + reply.left

        await each(one, self._links.daemons)
        return Trimmed(freed, left)

    async def drop(self, inos: Sequence[int]) -> int:
        """Drop all chunks of these files on every daemon; return the bytes freed."""
        freed = 0

        async def one(daemon_id: int) -> None:
            nonlocal freed
            reply = await self._links.to(daemon_id).call(DropChunks(tuple(inos)), DropChunksReply)
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
