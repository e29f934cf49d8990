"""Check every ChunkStore against one suite.

To have another implementation checked, append it to ``IMPLEMENTATIONS``.
"""

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from benchfs_fuse.chunks.disk import DiskChunkStore
from benchfs_fuse.chunks.faulty import FaultyChunkStore, Rates
from benchfs_fuse.chunks.memory import MemoryChunkStore
from benchfs_fuse.chunks.uring import Ring
from benchfs_fuse.errors import FsError, NoSpace, StorageError
from benchfs_fuse.kv.rocks import RocksStore
from benchfs_fuse.limits import MIB
from benchfs_fuse.model import ChunkId, ClientId
from benchfs_fuse.ports import ChunkStore, KeyValueStore
from benchfs_fuse.rpc.memory import MemoryNetwork
from benchfs_fuse.rpc.messages import OpenCount, Request
from benchfs_fuse.rpc.server import AsyncHandler, SyncHandler
from benchfs_fuse.services.calls import Peers
from benchfs_fuse.services.chunkserver import ChunkServer
from benchfs_fuse.services.remote_chunks import RemoteChunkStore
from benchfs_fuse.services.sessions import SessionTable
from benchfs_fuse.testing.daemons import MemoryCluster, MemoryDaemon

BLOCK = 4096
#: A data range in blocks: chunk, first block, number of blocks.
Piece = tuple[int, int, int]


class Implementation(NamedTuple):
    """Name an implementation and say how to open it in a directory of its own."""

    name: str
    open: Callable[[Path], AbstractAsyncContextManager[ChunkStore]]
    #: Opened again in the same directory, it holds what it held.
    persistent: bool


@asynccontextmanager
async def open_memory(directory: Path) -> AsyncIterator[ChunkStore]:
    store = MemoryChunkStore()
    yield store
    await store.aclose()


@asynccontextmanager
async def open_faultless(directory: Path) -> AsyncIterator[ChunkStore]:
    store = FaultyChunkStore(MemoryChunkStore(), Rates(delay=0.5), seed=1)
    yield store
    await store.aclose()


@asynccontextmanager
async def open_disk(directory: Path, plain: bool) -> AsyncIterator[ChunkStore]:
    kv = RocksStore(directory / "kv")
    ring = Ring(depth=16)
    async with trio.open_nursery() as nursery:
        store = DiskChunkStore(directory, kv, ring, nursery, plain_reads=plain, plain_writes=plain)
        yield store
        nursery.cancel_scope.cancel()
    await store.aclose()
    await ring.aclose()
    kv.close()


class ChunksAlone:
    """Be the service of a daemon that serves chunks and nothing else."""

    def __init__(self, daemon_id: int, peers: Peers) -> None:
        self.chunks = ChunkServer(MemoryChunkStore(), daemon_id, peers)

    def handlers(self) -> Mapping[type[Request], AsyncHandler]:
        return self.chunks.handlers()

    def handlers_now(self) -> Mapping[type[Request], SyncHandler]:
        return {}

    async def session_ended(self, client_id: ClientId, opens: Sequence[OpenCount], clean: bool) -> None:
        pass


@asynccontextmanager
async def open_remote(directory: Path) -> AsyncIterator[ChunkStore]:
    """Reach the chunks of three daemons, as a fourth one: mounts may not trim."""

    def serve(daemon: MemoryDaemon, store: KeyValueStore, sessions: SessionTable, peers: Peers) -> ChunksAlone:
        service = ChunksAlone(daemon.daemon_id, peers)
        daemon.server.register({}, bulk=service.chunks.bulk())
        return service

    async with MemoryNetwork(seed=1) as network, trio.open_nursery() as nursery:
        cluster = MemoryCluster(network, nursery, serve, daemons=3)
        await cluster.start()
        links, _ = cluster.links(kind="daemon", daemon_id=99)
        nursery.start_soon(links.run)
        store = RemoteChunkStore(links, width=3)
        yield store
        await store.aclose()
        nursery.cancel_scope.cancel()


IMPLEMENTATIONS = [
    Implementation("memory", open_memory, False),
    Implementation("faultless", open_faultless, False),
    Implementation("remote", open_remote, False),
    Implementation("disk", partial(open_disk, plain=False), True),
    Implementation("disk-plain", partial(open_disk, plain=True), True),
]

IDS = [implementation.name for implementation in IMPLEMENTATIONS]


@pytest.fixture(params=IMPLEMENTATIONS, ids=IDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ChunkStore]:
    async with request.param.open(tmp_path) as store:
        yield store


async def content(store: ChunkStore, chunk: ChunkId, offset: int = 0, length: int = 100_000) -> bytes:
    """Read what exists, into a buffer of other bytes, and check that nothing else was touched."""
    into = bytearray(b"\xaa" * (length + 2))
    count = await store.read(chunk, offset, memoryview(into)[1:-1])
    assert into[0] == into[-1] == 0xAA
    assert into[1 + count :] == b"\xaa" * (length + 1 - count)
    return bytes(into[1 : 1 + count])


CHUNK = ChunkId(77, 3)


async def test_what_was_never_written_reads_as_nothing(store: ChunkStore) -> None:
    assert await content(store, CHUNK) == b""
    assert await content(store, CHUNK, 5000) == b""
    await store.write(CHUNK, 0, b"x")
    assert await content(store, ChunkId(77, 2)) == b""
    assert await content(store, ChunkId(78, 3)) == b""


async def test_bytes_come_back(store: ChunkStore) -> None:
    await store.write(CHUNK, 0, b"0123456789")
    assert await content(store, CHUNK) == b"0123456789"
    assert await content(store, CHUNK, 3) == b"3456789"
    assert await content(store, CHUNK, 3, 4) == b"3456"
    assert await content(store, CHUNK, 10) == b""
    assert await content(store, CHUNK, 11) == b""
    assert await content(store, CHUNK, 0, 0) == b""
    await store.write(CHUNK, 4, b"....")
    assert await content(store, CHUNK) == b"0123....89"


@pytest.mark.parametrize("length", [1, BLOCK, 65_537, 300_000, MIB + 1])
async def test_large_and_crooked_pieces(store: ChunkStore, length: int) -> None:
    data = os.urandom(length)
    await store.write(CHUNK, 12_345, data)
    assert await content(store, CHUNK, 12_345, length + 10) == data
    assert await content(store, CHUNK, 0, 12_345) == bytes(12_345)


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))])
async def test_any_buffer_can_be_written(store: ChunkStore, make: type[bytes]) -> None:
    await store.write(CHUNK, 2, make(b"buffer"))
    assert await content(store, CHUNK) == b"\0\0buffer"


async def test_holes_are_zeros(store: ChunkStore) -> None:
    await store.write(CHUNK, 3 * BLOCK, b"end")
    await store.write(CHUNK, BLOCK, b"middle")
    assert await content(store, CHUNK) == bytes(BLOCK) + b"middle" + bytes(2 * BLOCK - 6) + b"end"


async def test_growth_is_counted_in_blocks(store: ChunkStore) -> None:
    assert await store.write(CHUNK, 0, b"x") == BLOCK
    assert await store.write(CHUNK, 1, b"x") == 0
    assert await store.write(CHUNK, BLOCK - 1, b"xx") == BLOCK
    assert await store.write(CHUNK, 0, bytes(2 * BLOCK)) == 0
    assert await store.write(CHUNK, 100 * BLOCK, bytes(BLOCK)) == BLOCK
    assert await store.write(CHUNK, 0, bytes(101 * BLOCK)) == 98 * BLOCK
    assert await store.write(ChunkId(77, 4), 0, bytes(10)) == BLOCK


async def test_blocks_double_beyond_1024_of_them(store: ChunkStore) -> None:
    """Two single blocks of 4 KiB become two of 8 KiB when the chunk grows out of 4 MiB."""
    assert await store.write(CHUNK, 0, b"x") == BLOCK
    assert await store.write(CHUNK, 5 * BLOCK, b"x") == BLOCK
    assert await store.write(CHUNK, 4 * MIB, b"x") == 2 * BLOCK + 2 * BLOCK
    assert await store.trim(77, 3, 4 * MIB) == (2 * BLOCK, 4 * BLOCK)
    assert await store.trim(77, 3, 1) == (2 * BLOCK, 2 * BLOCK)


async def test_writing_nothing_makes_nothing(store: ChunkStore) -> None:
    assert await store.write(CHUNK, 1000, b"") == 0
    assert await content(store, CHUNK) == b""
    assert await store.drop([77]) == 0


async def test_trim_drops_what_is_behind_and_nothing_else(store: ChunkStore) -> None:
    for ino in (76, 77, 78):
        for index in range(5):
            await store.write(ChunkId(ino, index), 0, b"%d/%d" % (ino, index) + bytes(2 * BLOCK))
    assert await store.trim(77, 2, BLOCK) == (2 * BLOCK + 2 * 3 * BLOCK, 2 * 3 * BLOCK + BLOCK)
    for ino in (76, 78):
        for index in range(5):
            assert (await content(store, ChunkId(ino, index)))[:4] == b"%d/%d" % (ino, index)
    assert [len(await content(store, ChunkId(77, index))) for index in range(5)] == [8196, 8196, BLOCK, 0, 0]
    assert await store.trim(77, 1, 0) == (4 * BLOCK, 3 * BLOCK)
    assert [len(await content(store, ChunkId(77, index))) for index in range(5)] == [8196, 0, 0, 0, 0]
    assert await store.trim(77, 1, 100) == (0, 3 * BLOCK)
    assert await store.trim(77, 0, 0) == (3 * BLOCK, 0)
    assert await store.trim(77, 0, 0) == (0, 0)


@pytest.mark.parametrize("offset", [0, 1, 100, BLOCK, BLOCK + 100])
async def test_old_bytes_never_come_back(store: ChunkStore, offset: int) -> None:
    await store.write(CHUNK, 0, b"o" * (3 * BLOCK))
    await store.write(ChunkId(77, 9), 0, b"o" * BLOCK)
    await store.trim(77, 3, offset)
    await store.write(CHUNK, 3 * BLOCK, b"new")
    await store.write(ChunkId(77, 9), BLOCK, b"new")
    assert await content(store, CHUNK) == b"o" * offset + bytes(3 * BLOCK - offset) + b"new"
    assert await content(store, ChunkId(77, 9)) == bytes(BLOCK) + b"new"
    await store.drop([77])
    await store.write(CHUNK, 2 * BLOCK, b"newer")
    assert await content(store, CHUNK) == bytes(2 * BLOCK) + b"newer"


async def ranges(
    store: ChunkStore, ino: int = 77, *, index: int = 0, offset: int = 0, stop: int = 1 << 40
) -> list[Piece]:
    """List a file's data ranges in blocks, page after page of all sizes."""
    pages = []
    for count_max in (1, 3, 1000):
        found: list[Piece] = []
        at, within = index, offset
        while True:
            page = await store.map(ino, at, within, stop, count_max)
            found += [(data.index, data.offset // BLOCK, data.length // BLOCK) for data in page.ranges]
            if page.more is None:
                break
            assert page.more > at
            at, within = page.more, 0
        pages.append(found)
    assert pages[0] == pages[1] == pages[2]
    return pages[0]


async def test_allocated_space_reads_as_zeros_and_counts(store: ChunkStore) -> None:
    assert await store.allocate(CHUNK, BLOCK + 1, 2 * BLOCK) == 3 * BLOCK
    assert await content(store, CHUNK) == bytes(3 * BLOCK + 1)
    assert await store.allocate(CHUNK, 0, 100) == BLOCK
    assert await store.allocate(CHUNK, 0, 4 * BLOCK) == 0
    assert await store.write(CHUNK, 0, b"x" * 4 * BLOCK) == 0
    assert await store.allocate(CHUNK, 0, 5 * BLOCK) == BLOCK
    assert await content(store, CHUNK) == b"x" * 4 * BLOCK + bytes(BLOCK)
    assert await store.trim(77, 3, 10) == (4 * BLOCK, BLOCK)


async def test_allocated_zeros_replace_what_was_there(store: ChunkStore) -> None:
    await store.write(CHUNK, 0, b"x" * 5 * BLOCK)
    assert await store.allocate(CHUNK, 100, BLOCK, zero=True) == 0
    expected = b"x" * 100 + bytes(BLOCK) + b"x" * (4 * BLOCK - 100)
    assert await content(store, CHUNK) == expected
    assert await store.allocate(CHUNK, 4 * BLOCK, 2 * BLOCK, zero=True) == BLOCK
    assert await content(store, CHUNK) == expected[: 4 * BLOCK] + bytes(2 * BLOCK)
    assert await store.allocate(ChunkId(77, 9), BLOCK, BLOCK, zero=True) == BLOCK
    assert await content(store, ChunkId(77, 9)) == bytes(2 * BLOCK)


async def test_a_punched_hole_is_zeros_and_frees_whole_blocks(store: ChunkStore) -> None:
    assert await store.punch(CHUNK, 0, BLOCK) == 0
    assert await content(store, CHUNK) == b""
    await store.write(CHUNK, 0, b"x" * (5 * BLOCK + 10))
    assert await store.punch(CHUNK, 1, 10) == 0
    assert await store.punch(CHUNK, BLOCK - 1, BLOCK + 2) == BLOCK
    assert await store.punch(CHUNK, BLOCK, BLOCK) == 0
    expected = bytearray(b"x" * (5 * BLOCK + 10))
    expected[1:11], expected[BLOCK - 1 : 2 * BLOCK + 1] = bytes(10), bytes(BLOCK + 2)
    assert await content(store, CHUNK) == expected
    assert await ranges(store) == [(3, 0, 1), (3, 2, 4)]
    assert await store.punch(CHUNK, 4 * BLOCK, 100 * BLOCK) == 2 * BLOCK
    expected[4 * BLOCK :] = bytes(BLOCK + 10)
    assert await content(store, CHUNK) == expected
    assert await store.punch(CHUNK, 50 * BLOCK, BLOCK) == 0
    assert await store.punch(CHUNK, 0, 50 * BLOCK) == 3 * BLOCK
    assert await content(store, CHUNK) == bytes(5 * BLOCK + 10)
    assert await ranges(store) == []
    assert await store.write(CHUNK, BLOCK, b"y") == BLOCK
    assert await content(store, CHUNK, 0, BLOCK + 2) == bytes(BLOCK) + b"y\0"


async def test_zeros_alone_are_given_back_on_request(store: ChunkStore) -> None:
    assert await store.punch(CHUNK, 0, BLOCK, zeros_only=True) == 0
    await store.allocate(CHUNK, 0, 600 * BLOCK)
    await store.write(CHUNK, 3 * BLOCK + 5, b"x")
    await store.write(CHUNK, 500 * BLOCK, b"y" * BLOCK)
    assert await store.punch(CHUNK, 100, 10, zeros_only=True) == 0
    assert await store.punch(CHUNK, 1, 598 * BLOCK, zeros_only=True) == 595 * BLOCK
    assert await ranges(store) == [(3, 0, 1), (3, 3, 1), (3, 500, 1), (3, 598, 2)]
    found = await content(store, CHUNK, 0, 700 * BLOCK)
    assert found == bytes(3 * BLOCK + 5) + b"x" + bytes(497 * BLOCK - 6) + b"y" * BLOCK + bytes(99 * BLOCK)


async def test_a_map_shows_what_has_space(store: ChunkStore) -> None:
    assert await ranges(store) == []
    for index in (0, 1, 2, 5, 900):
        await store.write(ChunkId(77, index), 2 * BLOCK, b"x")
        await store.allocate(ChunkId(77, index), 4 * BLOCK, 2 * BLOCK)
    await store.write(ChunkId(77, 1), 0, b"x" * 2 * BLOCK)
    await store.write(ChunkId(78, 3), 0, b"other")
    everything = [
        (0, 2, 1),
        (0, 4, 2),
        (1, 0, 3),
        (1, 4, 2),
        *((index, *run) for index in (2, 5, 900) for run in ((2, 1), (4, 2))),
    ]
    assert await ranges(store) == everything
    assert await ranges(store, index=1) == everything[2:]
    assert await ranges(store, index=1, offset=BLOCK) == everything[2:]
    assert await ranges(store, index=1, offset=3 * BLOCK) == everything[3:]
    assert await ranges(store, index=1, offset=4 * BLOCK) == everything[3:]
    assert await ranges(store, index=1, offset=6 * BLOCK) == everything[4:]
    assert await ranges(store, index=1, offset=6 * BLOCK - 1) == everything[3:]
    assert await ranges(store, stop=5) == everything[:6]
    assert await ranges(store, index=3, stop=5) == []
    assert await ranges(store, index=901) == []


async def test_a_map_of_many_chunks_comes_in_pages(store: ChunkStore) -> None:
    for index in range(0, 1400, 2):
        await store.allocate(ChunkId(77, index), 0, 1)
    assert await ranges(store) == [(index, 0, 1) for index in range(0, 1400, 2)]
    page = await store.map(77, 0, 0, 1 << 40, 10)
    assert 10 <= len(page.ranges) < 100 and page.more is not None


async def test_blocks_of_a_large_chunk_are_freed_whole(store: ChunkStore) -> None:
    await store.write(CHUNK, 8 * MIB - 1, b"x")
    await store.write(CHUNK, 0, b"x" * 4 * BLOCK)
    assert await store.punch(CHUNK, BLOCK, 2 * BLOCK) == 0
    assert await store.punch(CHUNK, BLOCK, 3 * BLOCK) == 2 * BLOCK
    assert await content(store, CHUNK, 0, 5 * BLOCK) == b"x" * BLOCK + bytes(4 * BLOCK)
    assert await store.allocate(CHUNK, 3 * BLOCK, 1) == 2 * BLOCK


async def test_drop_takes_all_chunks_of_many_files(store: ChunkStore) -> None:
    inos = [1, 2, (5 << 48) + 1, (1 << 60) - 1]
    for ino in inos:
        for index in (0, 1, 1 << 40):
            await store.write(ChunkId(ino, index), 0, b"x")
    assert await store.drop([inos[0], 999, inos[3]]) == 2 * 3 * BLOCK
    assert [len(await content(store, ChunkId(ino, 1 << 40))) for ino in inos] == [0, 1, 1, 0]
    assert await store.drop(inos) == 2 * 3 * BLOCK
    assert await store.drop(inos) == 0
    assert await store.drop([]) == 0


async def test_a_file_of_many_chunks_is_dropped_whole(store: ChunkStore) -> None:
    for index in range(700):
        await store.write(ChunkId(77, index), 0, b"x")
    assert await store.trim(77, 600, 1) == (99 * BLOCK, 601 * BLOCK)
    assert await store.drop([77]) == 601 * BLOCK
    assert await store.trim(77, 0, 0) == (0, 0)


async def test_sync_of_files_with_and_without_chunks(store: ChunkStore) -> None:
    await store.sync(77)
    for index in range(40):
        await store.write(ChunkId(77, index), 0, b"x" * 1000)
    await store.sync(77)
    await store.write(CHUNK, 0, b"y")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(store.sync, 77)
    await store.drop([77])
    await store.sync(77)


async def test_usage_names_each_file_system_once(store: ChunkStore) -> None:
    usages = await store.usage()
    assert len({usage.filesystem for usage in usages}) == len(usages) > 0
    for usage in usages:
        assert usage.total >= usage.free >= usage.available > 0
        assert usage.files >= usage.files_free > 0


async def test_writers_side_by_side_add_up(store: ChunkStore) -> None:
    total = 0

    async def write(number: int) -> None:
        nonlocal total
        for block in range(8):
            offset = (block * 16 + number) * BLOCK // 2
            grown = await store.write(CHUNK, offset, bytes([number + 1]) * (BLOCK // 2))
            total += grown

    async with trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(write, number)
    assert total == 64 * BLOCK
    expected = b"".join(bytes([number + 1]) * (BLOCK // 2) for _ in range(8) for number in range(16))
    assert await content(store, CHUNK, 0, 70 * BLOCK) == expected
    assert await store.drop([77]) == total


async def test_changes_of_all_kinds_and_reads_side_by_side_leave_a_right_count(store: ChunkStore) -> None:
    """Each block of each writer is its own byte or zero, nothing else, and the growth adds up with what was freed."""
    total = 0

    async def write(number: int) -> None:
        nonlocal total
        for turn in range(20):
            chunk = ChunkId(77, turn % 3)
            grown = await store.write(chunk, number * BLOCK, bytes([number + 1]) * BLOCK)
            total += grown
            found = await content(store, chunk, number * BLOCK, BLOCK)
            assert set(found) <= {0, number + 1}

    async def cut() -> None:
        nonlocal total
        for turn in range(20):
            if turn % 7 == 6:
                freed = await store.drop([77])
            elif turn % 7 == 5:
                freed = await store.punch(ChunkId(77, turn % 3), turn * 100, 4 * BLOCK)
            elif turn % 7 == 4:
                freed = -await store.allocate(ChunkId(77, turn % 3), turn * 100, 4 * BLOCK, zero=True)
            else:
                freed = (await store.trim(77, turn % 3, turn % 5 * BLOCK + turn)).freed
            total -= freed
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(write, number)
        nursery.start_soon(cut)
    assert (await store.trim(77, 1 << 20, 0)).left == total
    for index in range(3):
        found = await content(store, ChunkId(77, index), 0, 8 * BLOCK)
        for number in range(8):
            assert set(found[number * BLOCK :][:BLOCK]) <= {0, number + 1}
    assert await store.drop([77]) == total


# Against plain bytes.


class Model:
    """Hold chunks as plain bytes and their allocated blocks as sets of numbers."""

    def __init__(self) -> None:
        self.chunks: dict[ChunkId, tuple[bytearray, set[int]]] = {}

    def allocated(self, ino: int | None = None) -> int:
        return BLOCK * sum(len(blocks) for chunk, (_, blocks) in self.chunks.items() if ino in (None, chunk.ino))

    def write(self, chunk: ChunkId, offset: int, data: bytes) -> None:
        if not data:
            return
        bytes_, blocks = self.chunks.setdefault(chunk, (bytearray(), set()))
        bytes_.extend(bytes(max(0, offset - len(bytes_))))
        bytes_[offset : offset + len(data)] = data
        blocks.update(range(offset // BLOCK, (offset + len(data) - 1) // BLOCK + 1))

    def allocate(self, chunk: ChunkId, offset: int, length: int, zero: bool) -> None:
        known = bytes(self.chunks.get(chunk, (b"", set()))[0])[offset : offset + length]
        self.write(chunk, offset, bytes(length) if zero else known.ljust(length, b"\0"))

    def punch(self, chunk: ChunkId, offset: int, length: int) -> None:
        if chunk in self.chunks:
            bytes_, blocks = self.chunks[chunk]
            end = max(offset, min(len(bytes_), offset + length))
            bytes_[offset:end] = bytes(end - offset)
            blocks -= set(range(-(-offset // BLOCK), (offset + length) // BLOCK))

    def ranges(self, ino: int) -> list[Piece]:
        found: list[Piece] = []
        for chunk, (_, blocks) in sorted(self.chunks.items()):
            for block in sorted(blocks) if chunk.ino == ino else []:
                if found and found[-1][0] == chunk.index and sum(found[-1][1:]) == block:
                    found[-1] = (*found[-1][:2], found[-1][2] + 1)
                else:
                    found.append((chunk.index, block, 1))
        return found

    def trim(self, ino: int, index: int, offset: int) -> None:
        for chunk in [chunk for chunk in self.chunks if chunk.ino == ino and chunk.index > index]:
            del self.chunks[chunk]
        boundary = ChunkId(ino, index)
        if boundary in self.chunks:
            bytes_, blocks = self.chunks[boundary]
            del bytes_[offset:]
            blocks -= {block for block in blocks if block * BLOCK >= offset}
            if not offset:
                del self.chunks[boundary]


INOS = st.sampled_from([5, 6, (1 << 48) + 5])
INDEXES = st.sampled_from([0, 1, 2, 300])
OFFSETS = st.one_of(st.sampled_from([0, 1, 4095, 4096, 4097, 8192, 65_536, 100_000]), st.integers(0, 20_000))
LENGTHS = st.one_of(st.sampled_from([0, 1, 4096, 8192]), st.integers(0, 10_000))
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), INOS, INDEXES, OFFSETS, LENGTHS),
        st.tuples(st.just("read"), INOS, INDEXES, OFFSETS, LENGTHS),
        st.tuples(st.sampled_from(["allocate", "zero", "punch"]), INOS, INDEXES, OFFSETS, LENGTHS.filter(bool)),
        st.tuples(st.just("trim"), INOS, INDEXES, OFFSETS, st.just(0)),
        st.tuples(st.just("drop"), INOS, st.booleans().map(int), st.just(0), st.just(0)),
        st.tuples(st.just("sync"), INOS, st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=25,
)
Operation = tuple[str, int, int, int, int]


async def apply(store: ChunkStore, model: Model, operation: Operation, fill: int) -> int:
    """Do one operation on both and compare; return by how much the allocated space changed."""
    name, ino, index, offset, length = operation
    chunk = ChunkId(ino, index)
    before = model.allocated()
    if name == "write":
        data = bytes([fill]) * length
        change = await store.write(chunk, offset, data)
        model.write(chunk, offset, data)
    elif name == "read":
        expected = model.chunks.get(chunk, (b"", set()))[0][offset : offset + length]
        assert await content(store, chunk, offset, length) == expected
        change = 0
    elif name in ("allocate", "zero"):
        change = await store.allocate(chunk, offset, length, zero=name == "zero")
        model.allocate(chunk, offset, length, name == "zero")
    elif name == "punch":
        change = -await store.punch(chunk, offset, length)
        model.punch(chunk, offset, length)
    elif name == "trim":
        trimmed = await store.trim(ino, index, offset)
        model.trim(ino, index, offset)
        assert trimmed.left == model.allocated(ino)
        change = -trimmed.freed
    elif name == "drop":
        inos = [ino, 6] if index and ino != 6 else [ino]
        change = -await store.drop(inos)
        for dropped in inos:
            model.trim(dropped, 0, 0)
    else:
        assert name == "sync"
        await store.sync(ino)
        change = 0
    assert model.allocated() - before == change
    return change


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=IDS)
@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS)
def test_behaves_like_plain_bytes(implementation: Implementation, operations: list[Operation]) -> None:
    async def run() -> None:
        model = Model()
        total = 0
        pieces: list[list[Operation]] = [[]]
        for operation in operations:
            if operation[0] != "reopen":
                pieces[-1].append(operation)
            elif implementation.persistent:
                pieces.append([])
        with tempfile.TemporaryDirectory() as directory:
            for piece in pieces:
                async with implementation.open(Path(directory)) as store:
                    for number, operation in enumerate(piece):
                        total += await apply(store, model, operation, number % 255 + 1)
                    for chunk, (expected, _) in model.chunks.items():
                        assert await content(store, chunk, 0, len(expected) + 1) == expected
                    assert total == model.allocated()
                    for ino in {chunk.ino for chunk in model.chunks}:
                        assert await ranges(store, ino) == model.ranges(ino)

    trio.run(run)


# The faults.


async def test_faults_strike_alike_for_the_same_seed() -> None:
    async def outcomes(seed: int) -> list[str]:
        store = FaultyChunkStore(MemoryChunkStore(), Rates(no_space=0.2, failure=0.2, partial=0.2, delay=0.2), seed)
        found = []
        for number in range(100):
            try:
                found.append(str(await store.write(CHUNK, number * 10, b"0123456789")))
            except FsError as error:
                found.append(f"{type(error).__name__} {error}")
        assert all(store.struck[name] for name in ("no_space", "failure", "partial", "delay"))
        return found

    assert await outcomes(1) == await outcomes(1) != await outcomes(2)


async def test_each_fault_does_what_it_says() -> None:
    inner = MemoryChunkStore()
    store = FaultyChunkStore(inner, Rates(no_space=1))
    with pytest.raises(NoSpace):
        await store.write(CHUNK, 0, b"x")
    store.rates = Rates(failure=1)
    for call in (partial(store.write, CHUNK, 0, b"x"), partial(store.read, CHUNK, 0, memoryview(bytearray(1)))):
        with pytest.raises(StorageError):
            await call()
    assert await content(inner, CHUNK) == b""
    store.rates = Rates(lost_write=1)
    assert await store.write(CHUNK, 0, b"x") == 0
    assert await content(inner, CHUNK) == b""
    store.rates = Rates(partial=1)
    with pytest.raises(StorageError):
        await store.write(CHUNK, 0, b"0123456789")
    assert b"0123456789".startswith(await content(inner, CHUNK))
    store.rates = Rates()
    await store.write(CHUNK, 0, b"0123456789")
    store.rates = Rates(short_read=1)
    assert await store.read(CHUNK, 0, memoryview(bytearray(10))) < 10


async def test_a_hold_stops_every_operation() -> None:
    store = FaultyChunkStore(MemoryChunkStore())
    store.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.write, CHUNK, 0, b"x")
        nursery.start_soon(store.sync, 77)
        await trio.testing.wait_all_tasks_blocked()
        assert await content(store.inner, CHUNK) == b""
        store.hold.set()
    assert await content(store, CHUNK) == b"x"
