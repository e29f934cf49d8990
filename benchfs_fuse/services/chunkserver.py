"""Serve the chunks of this daemon's store to mounts and to the other daemons."""

import mmap
from collections import defaultdict
from collections.abc import Awaitable, Callable

import trio

from ..errors import InvalidArgument
from ..limits import (
    CHUNK_SIZE_MAX,
    COPIES_MAX,
    DAEMONS_MAX,
    IDLE_BYTES_MAX,
    INLINE_MAX,
    KIB,
    PAYLOAD_MAX,
    RANGES_MAX,
)
from ..model import INO_END, ChunkId
from ..ports import ChunkStore, Reply
from ..rpc.messages import (
    AllocateChunk,
    Body,
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
from .calls import Call, Peers

#: Longest read or write that may be served without a task of its own: copying it takes less time than the task.
NOW_MAX = 64 * KIB


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
    """Translate requests for chunks into calls of the store. Sessions and fences are the server's business.

    ``daemon_id`` is this daemon's number; ``peers`` reach the others, from which chunks are copied.
    """

    def __init__(self, store: ChunkStore, daemon_id: int, peers: Peers) -> None:
        self._store = store
        self._daemon_id = daemon_id
        self._peers = peers
        self._copies: defaultdict[int, trio.Semaphore] = defaultdict(lambda: trio.Semaphore(COPIES_MAX))
        self.pool = BufferPool()
        #: Bytes of chunks that went out to readers and came in from writers so far.
        self.bytes_read = 0
        self.bytes_written = 0

    def handlers(self) -> dict[type[Request], Callable[[Request, Call], Awaitable[Body]]]:
        """Return what serves requests without payload."""
        return {
            TrimChunks: self._trim,
            DropChunks: self._drop,
            SyncChunks: self._sync,
            Usage: self._usage,
            AllocateChunk: self._allocate,
            PunchChunk: self._punch,
            MapChunks: self._map,
            CopyChunk: self._copy,
        }

    def bulk(self) -> dict[type[Request], Callable[[Request, memoryview | None, int], Awaitable[Reply]]]:
        """Return what serves requests with payload."""
        return {ReadChunk: self._read, WriteChunk: self._write}

    def bulk_now(self) -> dict[type[Request], Callable[[Request, memoryview | None, int], Reply | None]]:
        """Return what serves requests with payload that take no wait: the others are left to ``bulk``."""
        return {ReadChunk: self._read_now, WriteChunk: self._write_now}

    def _read_now(self, request: Request, payload: memoryview | None, want: int) -> Reply | None:
        assert isinstance(request, ReadChunk)
        if request.length > NOW_MAX:
            return None
        _check_read(request, payload, want)
        buffer = self.pool.lend(request.length)
        try:
            chunk = ChunkId(request.ino, request.index)
            length = self._store.read_now(chunk, request.offset, buffer[: request.length])
        except BaseException:
            self.pool.give_back(buffer)
            raise
        if length is None:
            self.pool.give_back(buffer)
            return None
        return self._reply_read(buffer, length)

    def _write_now(self, request: Request, payload: memoryview | None, want: int) -> Reply | None:
        assert isinstance(request, WriteChunk)
        if payload is not None and len(payload) > NOW_MAX:
            return None
        payload = _check_write(request, payload, want)
        grown = self._store.write_now(ChunkId(request.ino, request.index), request.offset, payload)
        if grown is None:
            return None
        self.bytes_written += len(payload)
        return Reply(0, encode(WriteChunkReply(grown)))

    def _reply_read(self, buffer: memoryview, length: int) -> Reply:
        self.bytes_read += length
        body = encode(ReadChunkReply(length))
        return Reply(0, body, payload=buffer[:length], release=lambda: self.pool.give_back(buffer))

    async def _read(self, request: Request, payload: memoryview | None, want: int) -> Reply:
        assert isinstance(request, ReadChunk)
        _check_read(request, payload, want)
        buffer = self.pool.lend(request.length)
        try:
            chunk = ChunkId(request.ino, request.index)
            length = await self._store.read(chunk, request.offset, buffer[: request.length])
        except BaseException:
            self.pool.forget(buffer)
            raise
        return self._reply_read(buffer, length)

    async def _write(self, request: Request, payload: memoryview | None, want: int) -> Reply:
        assert isinstance(request, WriteChunk)
        payload = _check_write(request, payload, want)
        grown = await self._store.write(ChunkId(request.ino, request.index), request.offset, payload)
        self.bytes_written += len(payload)
        return Reply(0, encode(WriteChunkReply(grown)))

    async def _allocate(self, request: Request, call: Call) -> Body:
        assert isinstance(request, AllocateChunk)
        _check_some(request.ino, request.index, request.offset, request.length)
        chunk = ChunkId(request.ino, request.index)
        return WriteChunkReply(await self._store.allocate(chunk, request.offset, request.length, zero=request.zero))

    async def _punch(self, request: Request, call: Call) -> Body:
        assert isinstance(request, PunchChunk)
        _check_some(request.ino, request.index, request.offset, request.length)
        chunk = ChunkId(request.ino, request.index)
        freed = await self._store.punch(chunk, request.offset, request.length, zeros_only=request.zeros_only)
        return PunchChunkReply(freed)

    async def _map(self, request: Request, call: Call) -> Body:
        assert isinstance(request, MapChunks)
        _check(request.ino, request.index, request.offset, 0)
        _check(request.ino, request.stop, 0, 0)
        count = max(1, min(request.count, RANGES_MAX))
        found = await self._store.map(request.ino, request.index, request.offset, request.stop, count)
        return MapChunksReply(found.ranges, found.more)

    async def _copy(self, request: Request, call: Call) -> Body:
        assert isinstance(request, CopyChunk)
        _check_some(request.source_ino, request.source_index, request.source_offset, request.length)
        _check_some(request.ino, request.index, request.offset, request.length)
        if request.length > PAYLOAD_MAX or not 0 <= request.source_daemon < DAEMONS_MAX:
            raise InvalidArgument(f"copying {request.length} bytes at once from daemon {request.source_daemon}")
        async with self._copies[request.source_daemon]:
            buffer = self.pool.lend(request.length)
            try:
                found = await self._fetch(request, buffer[: request.length])
                target = ChunkId(request.ino, request.index)
                grown = 0
                if found:
                    grown = await self._store.write(target, request.offset, buffer[:found])
                if found < request.length:
                    grown -= await self._store.punch(target, request.offset + found, request.length - found)
            except BaseException:
                self.pool.forget(buffer)
                raise
            self.pool.give_back(buffer)
        return WriteChunkReply(grown)

    async def _fetch(self, request: CopyChunk, into: memoryview) -> int:
        """Read the source of a copy, here or there; return how many bytes of it there are."""
        if request.source_daemon == self._daemon_id:
            source = ChunkId(request.source_ino, request.source_index)
            return await self._store.read(source, request.source_offset, into)
        wanted = ReadChunk(request.source_ino, request.source_index, request.source_offset, len(into))
        return (await self._peers.call(request.source_daemon, wanted, ReadChunkReply, into=into)).length

    async def _trim(self, request: Request, call: Call) -> Body:
        assert isinstance(request, TrimChunks)
        _check(request.ino, request.index, request.offset, 0)
        trimmed = await self._store.trim(request.ino, request.index, request.offset, durable=request.durable)
        return TrimChunksReply(trimmed.freed, trimmed.left)

    async def _drop(self, request: Request, call: Call) -> Body:
        assert isinstance(request, DropChunks)
        for ino in request.inos:
            _check(ino, 0, 0, 0)
        return DropChunksReply(await self._store.drop(request.inos, durable=request.durable))

    async def _sync(self, request: Request, call: Call) -> Body:
        assert isinstance(request, SyncChunks)
        _check(request.ino, 0, 0, 0)
        await self._store.sync(request.ino)
        return Done()

    async def _usage(self, request: Request, call: Call) -> Body:
        return UsageReply(tuple(await self._store.usage()))


def _check(ino: int, index: int, offset: int, length: int) -> None:
    """Refuse what cannot be a piece of a chunk of any file. InvalidArgument."""
    if not (0 < ino < INO_END and 0 <= index < 1 << 63 and 0 <= offset <= offset + length <= CHUNK_SIZE_MAX):
        raise InvalidArgument(f"no piece of a chunk: file {ino}, chunk {index}, offset {offset}, length {length}")


def _check_read(request: ReadChunk, payload: memoryview | None, want: int) -> None:
    _check(request.ino, request.index, request.offset, request.length)
    if payload is not None or not 0 < request.length <= want:
        raise InvalidArgument(f"reading {request.length} bytes into room for {want}")


def _check_write(request: WriteChunk, payload: memoryview | None, want: int) -> memoryview:
    if payload is None or want:
        raise InvalidArgument("writing nothing")
    _check(request.ino, request.index, request.offset, len(payload))
    return payload


def _check_some(ino: int, index: int, offset: int, length: int) -> None:
    """Refuse an empty piece, too."""
    _check(ino, index, offset, length)
    if not length:
        raise InvalidArgument("an empty piece of a chunk")
