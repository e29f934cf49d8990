"""Serve the chunks of this daemon's store to mounts and to the other daemons."""

import mmap
from collections.abc import Awaitable, Callable

from ..errors import InvalidArgument
from ..limits import CHUNK_SIZE_MAX, INLINE_MAX, MIB, PAYLOAD_MAX
from ..model import ChunkId
from ..ports import ChunkStore, Reply
from ..rpc.messages import (
    Body,
    Done,
    DropChunks,
    DropChunksReply,
    ReadChunk,
    ReadChunkReply,
    Request,
    SyncChunks,
    TrimChunks,
    TrimChunksReply,
    Usage,
    UsageReply,
    WriteChunk,
    WriteChunkReply,
    encode,
)
from .calls import Call

#: Idle buffers kept for the next reads, all sizes together: a few dozen of the largest. Making one costs its page
#: faults, some 250 µs for 1 MiB.
IDLE_BYTES_MAX = 64 * MIB


class BufferPool:
    """Lend page-aligned buffers, in sizes of powers of two from INLINE_MAX to PAYLOAD_MAX."""

    def __init__(self) -> None:
        self._idle: dict[int, list[memoryview]] = {}
        self._idle_bytes = 0
        #: Bytes lent and not given back.
        self.lent_bytes = 0

    def lend(self, length: int) -> memoryview:
        """Return a buffer of ``length`` bytes or more; its contents are whatever was there."""
        assert 0 < length <= PAYLOAD_MAX
        size = max(INLINE_MAX, 1 << (length - 1).bit_length())
        self.lent_bytes += size
        idle = self._idle.get(size)
        if idle:
            self._idle_bytes -= size
            return idle.pop()
        return memoryview(mmap.mmap(-1, size))

    def give_back(self, buffer: memoryview) -> None:
        """Take a buffer back; nobody else may look at it from now on."""
        size = len(buffer)
        self.lent_bytes -= size
        if self._idle_bytes + size <= IDLE_BYTES_MAX:
            self._idle_bytes += size
            self._idle.setdefault(size, []).append(buffer)

    def forget(self, buffer: memoryview) -> None:
        """Count a buffer as given back without using it again: somebody may still write into it."""
        self.lent_bytes -= len(buffer)


class ChunkServer:
    """Translate requests for chunks into calls of the store. Sessions and fences are the server's business."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self.pool = BufferPool()

    def handlers(self) -> dict[type[Request], Callable[[Request, Call], Awaitable[Body]]]:
        """Return what serves requests without payload."""
        return {TrimChunks: self._trim, DropChunks: self._drop, SyncChunks: self._sync, Usage: self._usage}

    def bulk(self) -> dict[type[Request], Callable[[Request, memoryview | None, int], Awaitable[Reply]]]:
        """Return what serves requests with payload."""
        return {ReadChunk: self._read, WriteChunk: self._write}

    async def _read(self, request: Request, payload: memoryview | None, want: int) -> Reply:
        assert isinstance(request, ReadChunk)
        _check(request.ino, request.index, request.offset, request.length)
        if payload is not None or not 0 < request.length <= want:
            raise InvalidArgument(f"reading {request.length} bytes into room for {want}")
        buffer = self.pool.lend(request.length)
        try:
            chunk = ChunkId(request.ino, request.index)
            length = await self._store.read(chunk, request.offset, buffer[: request.length])
        except BaseException:
            self.pool.forget(buffer)
            raise
        body = encode(ReadChunkReply(length))
        return Reply(0, body, payload=buffer[:length], release=lambda: self.pool.give_back(buffer))

    async def _write(self, request: Request, payload: memoryview | None, want: int) -> Reply:
        assert isinstance(request, WriteChunk)
        if payload is None or want:
            raise InvalidArgument("writing nothing")
        _check(request.ino, request.index, request.offset, len(payload))
        grown = await self._store.write(ChunkId(request.ino, request.index), request.offset, payload)
        return Reply(0, encode(WriteChunkReply(grown)))

    async def _trim(self, request: Request, call: Call) -> Body:
        assert isinstance(request, TrimChunks)
        _check(request.ino, request.index, request.offset, 0)
        trimmed = await self._store.trim(request.ino, request.index, request.offset)
        return TrimChunksReply(trimmed.freed, trimmed.left)

    async def _drop(self, request: Request, call: Call) -> Body:
        assert isinstance(request, DropChunks)
        for ino in request.inos:
            _check(ino, 0, 0, 0)
        return DropChunksReply(await self._store.drop(request.inos))

    async def _sync(self, request: Request, call: Call) -> Body:
        assert isinstance(request, SyncChunks)
        _check(request.ino, 0, 0, 0)
        await self._store.sync(request.ino)
        return Done()

    async def _usage(self, request: Request, call: Call) -> Body:
        return UsageReply(tuple(await self._store.usage()))


def _check(ino: int, index: int, offset: int, length: int) -> None:
    """Refuse what cannot be a piece of a chunk; numbers in keys are unsigned and of 64 bits. InvalidArgument."""
    if not (0 < ino < 1 << 63 and 0 <= index < 1 << 63 and 0 <= offset <= offset + length <= CHUNK_SIZE_MAX):
        raise InvalidArgument(f"no piece of a chunk: file {ino}, chunk {index}, offset {offset}, length {length}")
