"""Files of a whole cluster get, lose and copy space: fallocate, seek for data and holes, copies between daemons.

The last test lets two clients do random things to two files and compares every answer with plain bytes and blocks.
"""

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

import pytest
import trio
from fsck import Stored, complaints
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked
from whole import CHUNK, Client, Whole, whole_cluster

from benchfs_fuse.chunks.faulty import Rates
from benchfs_fuse.client import File
from benchfs_fuse.errors import FsError, InvalidArgument, NoDevice, NoSpace, StorageError
from benchfs_fuse.limits import FILE_SIZE_MAX, MIB
from benchfs_fuse.model import ChunkId
from benchfs_fuse.rpc.messages import AllocateChunk, CopyChunk, MapChunks, PunchChunk, Usage, WriteChunkReply
from benchfs_fuse.services.files import COPY_MAX

BLOCK = 4096
RW = os.O_RDWR | os.O_CREAT
KEEP = 1
PUNCH = 3
ZERO = 16
TIB = 1 << 40


async def whole_content(file: File) -> bytes:
    return await file.read((await file.stat()).size, 0)


async def allocated(file: File) -> int:
    return (await file.stat()).allocated


async def data_ranges(file: File) -> list[tuple[int, int]]:
    """Walk through a file as ``cp --sparse`` does."""
    found: list[tuple[int, int]] = []
    position = 0
    while True:
        try:
            start = await file.seek_data(position)
        except NoDevice:
            return found
        position = await file.seek_hole(start)
        assert position > start
        found.append((start, position))


def fsck(whole: Whole, clients: int) -> list[str]:
    """Compare what the daemons have stored, but for what an open file leaves."""
    cluster = [
        Stored(daemon.store, {chunk: record for chunk, (record, _) in store.contents().items()})
        for daemon, store in zip(whole.cluster.daemons, whole.stores, strict=True)
    ]
    return [one for one in complaints(cluster, whole.cluster.shard_map, clients) if "session" not in one]


async def at_rest(whole: Whole) -> None:
    await wait_all_tasks_blocked()
    for daemon in whole.cluster.daemons:
        await whole.service(daemon).metadata.wait_idle()
    await wait_all_tasks_blocked()


# ── fallocate ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_allocation_extends_the_file_and_takes_space() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"x" * 100, 0)
        before = await file.stat()
        await file.fallocate(10, 5 * CHUNK)
        after = await file.stat()
        assert (after.size, after.allocated) == (5 * CHUNK + 10, 5 * CHUNK + BLOCK)
        assert after.mtime_ns > before.mtime_ns and after.ctime_ns > before.ctime_ns
        assert await whole_content(file) == b"x" * 100 + bytes(5 * CHUNK - 90)
        await file.fallocate(0, CHUNK)
        assert await allocated(file) == 5 * CHUNK + BLOCK
        await file.write(b"y" * 5 * CHUNK, 0)
        assert await allocated(file) == 5 * CHUNK + BLOCK


async def test_space_behind_the_end_is_kept_until_the_file_is_cut() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, whole.client() as two:
        async with await one.fs.open("/f", RW) as file:
            await file.write(b"x" * 10, 0)
            await file.fallocate(0, 4 * CHUNK, KEEP)
            attrs = await file.stat()
            assert (attrs.size, attrs.allocated) == (10, 4 * CHUNK)
            assert await file.read(100, 0) == b"x" * 10
            assert await data_ranges(file) == [(0, 10)]
        assert fsck(whole, 2) == []
        assert (await one.fs.stat("/f")).allocated == 4 * CHUNK
        await two.fs.setattr("/f", size=5)  # behind the cut, nothing is left of it
        assert (await one.fs.stat("/f")).allocated == BLOCK
        async with await one.fs.open("/f", RW) as file:
            await file.fallocate(0, 4 * CHUNK, KEEP)
        await two.fs.setattr("/f", size=CHUNK)
        assert (await two.fs.stat("/f")).allocated == 4 * CHUNK
        await two.fs.setattr("/f", size=CHUNK)
        assert (await two.fs.stat("/f")).allocated == CHUNK
        await at_rest(whole)
        assert fsck(whole, 2) == []


@pytest.mark.parametrize("how", ["unlink", "rename", "unlink while open", "truncate on open"])
async def test_space_behind_the_end_goes_with_the_file(how: str) -> None:
    async with whole_cluster(3) as whole, whole.client() as one:
        file = await one.fs.open("/f", RW)
        await file.fallocate(2 * CHUNK, 3 * CHUNK, KEEP)
        if how == "unlink while open":
            await one.fs.remove("/f")
        await file.close()
        if how == "unlink":
            await one.fs.remove("/f")
        elif how == "rename":
            await (await one.fs.open("/g", RW)).close()
            await one.fs.rename("/g", "/f")
        elif how == "truncate on open":
            await (await one.fs.open("/f", os.O_RDWR | os.O_TRUNC)).close()
        await at_rest(whole)
        assert all(not store.contents() for store in whole.stores)
        assert fsck(whole, 1) == []


async def test_a_hole_frees_space_and_never_changes_the_size() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"x" * (4 * CHUNK + 10), 0)
        before = await file.stat()
        await file.fallocate(CHUNK // 2 + 1, 2 * CHUNK, PUNCH)
        after = await file.stat()
        assert (after.size, after.allocated) == (4 * CHUNK + 10, 2 * CHUNK + 2 * BLOCK)
        assert after.mtime_ns > before.mtime_ns
        expected = b"x" * (CHUNK // 2 + 1) + bytes(2 * CHUNK) + b"x" * (3 * CHUNK // 2 + 9)
        assert await whole_content(file) == expected
        await file.fallocate(4 * CHUNK, BLOCK, PUNCH)  # the file's last block, which it does not fill
        assert await allocated(file) == 2 * CHUNK + BLOCK
        await file.fallocate(0, FILE_SIZE_MAX, PUNCH)
        attrs = await file.stat()
        assert (attrs.size, attrs.allocated) == (4 * CHUNK + 10, 0)
        assert await whole_content(file) == bytes(4 * CHUNK + 10)
        await file.fallocate(100 * CHUNK, CHUNK, PUNCH)
        assert (await file.stat()).size == 4 * CHUNK + 10


async def test_a_range_of_zeros_is_allocated() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"x" * 2 * CHUNK, 0)
        await file.fallocate(CHUNK - 10, 20, ZERO)
        await file.fallocate(2 * CHUNK - 10, CHUNK, ZERO | KEEP)
        attrs = await file.stat()
        assert (attrs.size, attrs.allocated) == (2 * CHUNK, 3 * CHUNK)
        expected = b"x" * (CHUNK - 10) + bytes(20) + b"x" * (CHUNK - 20) + bytes(10)
        assert await whole_content(file) == expected
        await file.fallocate(2 * CHUNK - 20, CHUNK, ZERO)
        assert await whole_content(file) == expected[: 2 * CHUNK - 20] + bytes(CHUNK)


@pytest.mark.parametrize(
    ("mode", "offset", "length", "number"),
    [
        (0, -1, 10, errno.EINVAL),
        (0, 0, 0, errno.EINVAL),
        (PUNCH, 0, -1, errno.EINVAL),
        (0, FILE_SIZE_MAX, 1, errno.EFBIG),
        (ZERO, 1, FILE_SIZE_MAX, errno.EFBIG),
        (2, 0, 10, errno.EOPNOTSUPP),
        (8, 0, 10, errno.EOPNOTSUPP),  # collapse
        (32, 0, 10, errno.EOPNOTSUPP),  # insert
        (64, 0, 10, errno.EOPNOTSUPP),  # unshare
        (ZERO | PUNCH, 0, 10, errno.EOPNOTSUPP),
        (1 << 20, 0, 10, errno.EOPNOTSUPP),
        (-1, 0, 10, errno.EOPNOTSUPP),
    ],
)
async def test_what_cannot_be_allocated_is_refused(mode: int, offset: int, length: int, number: int) -> None:
    async with whole_cluster(2) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"x" * 10, 0)
        before = await file.stat()
        with pytest.raises(FsError) as caught:
            await file.fallocate(offset, length, mode)
        assert caught.value.errno == number
        assert await file.stat() == before


async def test_who_only_reads_allocates_nothing() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        await (await one.fs.open("/f", RW)).close()
        async with await one.fs.open("/f") as file:
            for mode in (0, PUNCH, ZERO):
                with pytest.raises(FsError) as caught:
                    await file.fallocate(0, 10, mode)
                assert caught.value.errno == errno.EBADF


async def test_an_allocation_reserves_or_refuses() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        for store in whole.stores:
            store._total = 3 * CHUNK
        await file.write(b"x" * CHUNK, 0)
        with pytest.raises(NoSpace):
            await file.fallocate(0, 20 * CHUNK)
        attrs = await file.stat()
        assert (attrs.size, attrs.allocated) == (CHUNK, CHUNK)
        assert sum(store._allocated for store in whole.stores) == CHUNK
        assert await whole_content(file) == b"x" * CHUNK
        await file.fallocate(0, 2 * CHUNK)
        for store in whole.stores:
            store._total = store._allocated
        await file.write(b"y" * 2 * CHUNK, 0)  # it was reserved
        await file.fsync()


async def test_a_huge_allocation_is_refused_before_it_takes_anything() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        with pytest.raises(NoSpace):
            await file.fallocate(0, FILE_SIZE_MAX)
        assert whole.network.calls[AllocateChunk.op] == 0 and whole.network.calls[Usage.op] == 2


async def test_what_somebody_wrote_meanwhile_is_not_given_back() -> None:
    """Another client writes into what is being reserved, which then fails."""
    async with whole_cluster(2) as whole, whole.client() as one, whole.client(gather_bytes_max=0) as two:
        file, other = await one.fs.open("/f", RW), await two.fs.open("/f", RW)
        owner = whole.cluster.shard_map.of_chunk
        width = (await file.stat()).width
        index = next(number for number in range(8) if owner(file.ino, number, width) != owner(file.ino, 0, width))
        full = whole.chunks[owner(file.ino, index, width)]
        full.rates = Rates(no_space=1)
        hold = full.hold = trio.Event()

        async def write() -> None:
            await wait_all_tasks_blocked()
            await other.write(b"kept", 100)
            hold.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            with pytest.raises(NoSpace):
                await file.fallocate(0, (index + 1) * CHUNK)
        await file.stat()
        assert await other.read(10, 100) == b"kept"
        assert await allocated(other) == BLOCK
        full.rates = Rates()
        await file.close()
        await other.close()
        await at_rest(whole)
        assert fsck(whole, 2) == []


async def test_gathered_bytes_come_before_holes_and_allocations() -> None:
    async with whole_cluster(2) as whole, whole.client(gather_time_s=3600.0) as one:
        async with await one.fs.open("/f", RW) as file:
            await file.write(b"a" * 2 * BLOCK, 0)
            await file.fallocate(0, BLOCK, PUNCH)
            assert await whole_content(file) == bytes(BLOCK) + b"a" * BLOCK
            await file.write(b"b" * 2 * BLOCK, 0)
            await file.fallocate(BLOCK, BLOCK, ZERO)
            await file.write(b"c" * 10, BLOCK)
            assert await whole_content(file) == b"b" * BLOCK + b"c" * 10 + bytes(BLOCK - 10)
            await file.truncate(BLOCK)
            await file.fallocate(BLOCK, BLOCK)
            assert await whole_content(file) == b"b" * BLOCK + bytes(BLOCK)
        async with await one.fs.open("/f", os.O_RDWR | os.O_APPEND) as file:
            await file.fallocate(0, 3 * BLOCK)
            await file.write(b"end", 0)
            assert await file.read(10, 3 * BLOCK) == b"end"


async def test_a_failure_in_the_middle_is_reported_and_counted_right() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        for mode in (0, KEEP, ZERO, PUNCH):
            file = await one.fs.open("/f", RW)
            await file.write(b"x" * 4 * CHUNK, 0)
            await file.fsync()
            for chunks in whole.chunks:
                chunks.rates = Rates(partial=0.6)
            failures = 0
            for _ in range(10):
                try:
                    await file.fallocate(CHUNK // 2, 6 * CHUNK, mode)
                except StorageError:
                    failures += 1
            assert failures
            for chunks in whole.chunks:
                chunks.rates = Rates()
            assert set(await file.read(CHUNK // 2, 0)) == {ord("x")}
            await file.close()
            await at_rest(whole)
            assert fsck(whole, 1) == []


# ── seek ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_data_and_holes_are_found() -> None:
    async with whole_cluster(3) as whole, whole.client(gather_time_s=99.0) as one, await one.fs.open("/f", RW) as file:
        assert await data_ranges(file) == []
        await file.write(b"x" * 10, 3 * CHUNK + 100)  # gathered, and counted in
        await file.write(b"x" * 2 * CHUNK, 10 * CHUNK - BLOCK)
        await file.truncate(20 * CHUNK + 1)
        assert await data_ranges(file) == [
            (3 * CHUNK, 3 * CHUNK + BLOCK),
            (10 * CHUNK - BLOCK, 12 * CHUNK - BLOCK),
        ]
        assert await file.seek_hole(0) == 0
        assert await file.seek_data(3 * CHUNK + 5) == 3 * CHUNK + 5
        assert await file.seek_hole(11 * CHUNK) == 12 * CHUNK - BLOCK
        assert await file.seek_hole(20 * CHUNK) == 20 * CHUNK
        await file.write(b"x", 20 * CHUNK)
        assert await file.seek_data(12 * CHUNK) == 20 * CHUNK
        assert await file.seek_hole(20 * CHUNK) == 20 * CHUNK + 1
        for whence in (file.seek_data, file.seek_hole):
            for offset in (-1, 20 * CHUNK + 1, 1 << 60):
                with pytest.raises(NoDevice):
                    await whence(offset)
        with pytest.raises(InvalidArgument):
            await one.files.seek(file._handle, 0, os.SEEK_SET)


async def test_seeking_through_1_tib_takes_a_handful_of_requests() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"x", TIB - 1)
        await file.write(b"y", TIB // 2)
        await file.stat()
        whole.network.calls.clear()
        assert await file.seek_data(0) == TIB // 2
        assert await file.seek_hole(TIB // 2) == TIB // 2 + BLOCK
        assert await file.seek_data(TIB // 2 + BLOCK) == TIB - BLOCK
        assert await file.seek_hole(TIB - BLOCK) == TIB
        assert whole.network.calls[MapChunks.op] <= 4 * 3
        await file.fallocate(0, TIB, PUNCH)
        assert whole.network.calls[PunchChunk.op] == 2
        assert await allocated(file) == 0
        with pytest.raises(NoDevice):
            await file.seek_data(0)


async def test_a_long_file_is_mapped_in_pages() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.fallocate(0, 2500 * CHUNK)
        await file.fallocate(CHUNK, BLOCK, PUNCH)
        whole.network.calls.clear()
        assert await file.seek_hole(0) == CHUNK
        assert await file.seek_hole(CHUNK + BLOCK) == 2500 * CHUNK
        assert whole.network.calls[MapChunks.op] <= 20
        await file.fallocate(10, 2499 * CHUNK, PUNCH)
        assert await data_ranges(file) == [(0, BLOCK), (2499 * CHUNK, 2500 * CHUNK)]
        await file.fallocate(0, 2500 * CHUNK, PUNCH)
        assert await allocated(file) == 0


# ── copies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def two_files(whole: Whole, one: Client, chunk_size: int = CHUNK) -> AsyncIterator[tuple[File, File]]:
    """Open a source in chunks of the usual size, and a target in chunks of another."""
    await one.fs.mkdir("/d")
    await one.fs.setxattr("/d", b"user.benchfs.chunk_size", str(chunk_size).encode())
    async with await one.fs.open("/source", RW) as source, await one.fs.open("/d/target", RW) as target:
        assert ((await source.stat()).chunk_size, (await target.stat()).chunk_size) == (CHUNK, chunk_size)
        yield source, target


@pytest.mark.parametrize("chunk_size", [CHUNK, 4 * CHUNK, 64 * CHUNK])
@pytest.mark.parametrize("shift", [0, BLOCK, 12_345])
async def test_a_copy_is_what_was_there(chunk_size: int, shift: int) -> None:
    async with whole_cluster(3) as whole, whole.client(gather_time_s=3600.0) as one:
        async with two_files(whole, one, chunk_size) as (source, target):
            data = b"".join(b"%08d" % number for number in range(5 * CHUNK // 8)) + b"end"
            await source.write(data, 0)
            await target.write(b"old" * CHUNK, 0)
            assert await source.copy_range(100, target, shift, 1 << 40) == len(data) - 100
            expected = (b"old" * CHUNK)[:shift] + data[100:]
            assert await whole_content(target) == expected
            assert await source.copy_range(len(data), target, 0, 10) == 0
            assert await source.copy_range(len(data) + 10, target, 0, 10) == 0
            assert await source.copy_range(0, target, 0, 0) == 0
            assert await source.copy_range(3, target, 1, 10) == 10
            assert await whole_content(target) == expected[:1] + data[3:13] + expected[11:]
        assert whole.network.calls[CopyChunk.op] > 0
        await at_rest(whole)
        assert fsck(whole, 1) == []


async def test_a_copy_moves_no_data_through_the_client() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, two_files(whole, one) as (source, target):
        await source.write(b"x" * 8 * CHUNK, 0)
        await source.fsync()
        before = dict(requests(whole))
        assert await source.copy_range(0, target, 0, 8 * CHUNK) == 8 * CHUNK
        after = requests(whole)
        assert after["CopyChunk"] - before.get("CopyChunk", 0) == 8
        assert after.get("WriteChunk", 0) == before.get("WriteChunk", 0)
        owner = whole.cluster.shard_map.of_chunk
        apart = sum(owner(source.ino, index, 3) != owner(target.ino, index, 3) for index in range(8))
        assert 0 < apart < 8
        assert after.get("ReadChunk", 0) - before.get("ReadChunk", 0) == apart


def requests(whole: Whole) -> dict[str, int]:
    total: dict[str, int] = {}
    for daemon in whole.cluster.daemons:
        for name, number in daemon.server.requests.items():
            total[name] = total.get(name, 0) + number
    return total


async def test_holes_are_copied_as_holes() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, two_files(whole, one, 4 * CHUNK) as (source, target):
        await source.write(b"a" * BLOCK, 2 * CHUNK)
        await source.write(b"b" * 10, 5 * CHUNK + 100)
        await source.truncate(9 * CHUNK)
        await target.write(b"o" * 12 * CHUNK, 0)
        assert await source.copy_range(0, target, CHUNK, 1 << 40) == 9 * CHUNK
        expected = bytearray(b"o" * 12 * CHUNK)
        expected[CHUNK : 10 * CHUNK] = await whole_content(source)
        assert await whole_content(target) == expected
        assert await allocated(target) == 3 * CHUNK + 2 * BLOCK
        assert await data_ranges(target) == [
            (0, CHUNK),
            (3 * CHUNK, 3 * CHUNK + BLOCK),
            (6 * CHUNK, 6 * CHUNK + BLOCK),
            (10 * CHUNK, 12 * CHUNK),
        ]


async def test_a_sparse_tebibyte_is_copied_in_steps() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, two_files(whole, one) as (source, target):
        await source.write(b"end", TIB)
        assert await source.copy_range(0, target, 0, 2 * TIB) == COPY_MAX
        assert (await target.stat()).size == COPY_MAX
        assert await source.copy_range(TIB - 10, target, TIB - 10, 2 * TIB) == 13
        assert await target.read(20, TIB - 2) == b"\0\0end"
        assert await allocated(target) == BLOCK
        assert whole.network.calls[CopyChunk.op] == 1


async def test_a_file_is_copied_within_itself() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        data = os.urandom(3 * CHUNK)
        await file.write(data, 0)
        assert await file.copy_range(0, file, 3 * CHUNK + 5, 3 * CHUNK) == 3 * CHUNK
        assert await file.copy_range(10, file, 20, 10) == 10
        expected = bytearray(data + bytes(5) + data)
        expected[20:30] = data[10:20]
        assert await whole_content(file) == expected
        for offset, target in ((0, 5), (5, 0), (7, 7)):
            with pytest.raises(InvalidArgument):
                await file.copy_range(offset, file, target, 10)
        # What is cut off at the end of the file does not overlap.
        end = len(expected)
        assert await file.copy_range(end - 5, file, end, 100) == 5
        assert await whole_content(file) == expected + expected[-5:]


async def test_what_cannot_be_copied_is_refused() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, two_files(whole, one) as (source, target):
        await source.write(b"x" * 100, 0)
        writer = await one.fs.open("/source", os.O_WRONLY)
        reader = await one.fs.open("/d/target", os.O_RDONLY)
        appender = await one.fs.open("/d/target", os.O_RDWR | os.O_APPEND)
        for number, arguments in (
            (errno.EBADF, (writer, 0, target, 0, 10)),
            (errno.EBADF, (source, 0, reader, 0, 10)),
            (errno.EBADF, (source, 0, appender, 0, 10)),
            (errno.EINVAL, (source, -1, target, 0, 10)),
            (errno.EINVAL, (source, 0, target, -1, 10)),
            (errno.EINVAL, (source, 0, target, 0, -10)),
            (errno.EFBIG, (source, 0, target, FILE_SIZE_MAX - 5, 10)),
        ):
            with pytest.raises(FsError) as caught:
                await arguments[0].copy_range(*arguments[1:])
            assert caught.value.errno == number
        assert (await target.stat()).size == 0
        for file in (writer, reader, appender):
            await file.close()


async def test_a_copy_that_fails_tells_how_far_it_came() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        async with two_files(whole, one) as (source, target):
            data = os.urandom(40 * CHUNK)
            await source.write(data, 0)
            full = whole.stores[1 - whole.cluster.shard_map.of_chunk(target.ino, 0, 2)]
            full._total = full._allocated + 4 * CHUNK
            copied = await source.copy_range(0, target, 0, 40 * CHUNK)
            assert 0 < copied < 40 * CHUNK
            assert (await target.stat()).size == copied
            assert await whole_content(target) == data[:copied]
            with pytest.raises(NoSpace):
                await source.copy_range(copied, target, copied, 40 * CHUNK)
            assert (await target.stat()).size == copied
        await at_rest(whole)
        assert fsck(whole, 1) == []


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("loss", ["lose_request", "lose_reply"])
async def test_lost_messages_change_nothing(loss: str) -> None:
    async with whole_cluster(3) as whole, whole.client() as one:
        async with two_files(whole, one, 4 * CHUNK) as (source, target):
            data = os.urandom(6 * CHUNK)
            await source.write(data, 0)
            await source.fsync()

            async def both() -> None:
                await source.fallocate(6 * CHUNK, CHUNK)
                await source.fallocate(CHUNK, CHUNK, PUNCH)
                assert await source.seek_data(CHUNK) == 2 * CHUNK
                assert await source.copy_range(0, target, 0, 1 << 40) == 7 * CHUNK

            for _ in range(5):
                getattr(whole.network, loss)()
            await both()
            whole.network.lose_nothing()
            assert await whole_content(target) == data[:CHUNK] + bytes(CHUNK) + data[2 * CHUNK :] + bytes(CHUNK)
        await at_rest(whole)
        assert fsck(whole, 1) == []


@pytest.mark.parametrize("turns", range(0, 60, 7))
async def test_daemons_that_are_started_anew_are_asked_again(turns: int) -> None:
    async with whole_cluster(3) as whole, whole.client() as one:
        async with two_files(whole, one, 4 * CHUNK) as (source, target):
            data = os.urandom(6 * CHUNK)
            await source.write(data, 0)
            await source.fsync()

            async def work() -> None:
                await source.fallocate(6 * CHUNK, CHUNK)
                await source.fallocate(CHUNK, CHUNK, PUNCH)
                assert await source.copy_range(0, target, 0, 1 << 40) == 7 * CHUNK

            async with trio.open_nursery() as nursery:
                nursery.start_soon(work)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                for daemon in whole.cluster.daemons:
                    await daemon.kill()
                for daemon in whole.cluster.daemons:
                    await daemon.start()
            assert await whole_content(target) == data[:CHUNK] + bytes(CHUNK) + data[2 * CHUNK :] + bytes(CHUNK)
        await at_rest(whole)
        assert fsck(whole, 1) == []


@pytest.mark.parametrize("what", ["punch", "zero", "copy"])
async def test_what_was_given_up_never_lands_after_what_was_written_later(what: str) -> None:
    async with (
        whole_cluster() as whole,
        whole.client(gather_bytes_max=0) as one,
        two_files(whole, one) as (source, target),
    ):
        await source.write(b"s" * CHUNK, 0)
        await target.write(b"t" * CHUNK, 0)
        held = trio.Event()
        for chunks in whole.chunks:
            chunks.hold = held

        async def change() -> None:
            if what == "copy":
                await source.copy_range(0, target, 0, CHUNK)
            else:
                await target.fallocate(0, CHUNK, PUNCH if what == "punch" else ZERO)

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(change)
                await wait_all_tasks_blocked()
                scope.cancel()
        for chunks in whole.chunks:
            chunks.hold = None
        await target.write(b"new" * 100, 0)
        held.set()
        await wait_all_tasks_blocked()
        assert await target.read(300, 0) == b"new" * 100


async def test_senseless_requests_are_refused() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        link = one.links.to(0)
        for bad in (
            AllocateChunk(5, 0, 0, 0, False),
            AllocateChunk(5, 0, -1, 10, False),
            AllocateChunk(5, 0, 1 << 30, 1, False),
            AllocateChunk(0, 0, 0, 10, True),
            PunchChunk(5, -1, 0, 10, False),
            PunchChunk(5, 0, 10, -5, True),
            CopyChunk(0, 5, 0, 0, 5, 1, 0, 0),
            CopyChunk(0, 5, 0, 0, 5, 1, 0, 64 * MIB),
            CopyChunk(7, 5, 0, 0, 5, 1, 0, 10),
            CopyChunk(-1, 5, 0, 0, 5, 1, 0, 10),
            CopyChunk(1 << 40, 5, 0, 0, 5, 1, 0, 10),
            CopyChunk(0, 5, -1, 0, 5, 1, 0, 10),
            MapChunks(5, -1, 0, 10, 10),
            MapChunks(5, 0, 0, -1, 10),
            MapChunks(-5, 0, 0, 10, 10),
        ):
            with pytest.raises(InvalidArgument):
                await link.call(bad, bad.Reply)
        for count in (-5, 0, 1 << 60):
            await link.call(MapChunks(5, 0, 0, 10, count), MapChunks.Reply)
        copy = CopyChunk(1, 5, 0, 0, 5, 1, 0, 10)
        assert await link.call(copy, WriteChunkReply) == WriteChunkReply(0)  # nothing was there
        await wait_all_tasks_blocked()
        assert all(whole.service(daemon).chunks.pool.lent_bytes == 0 for daemon in whole.cluster.daemons)


async def test_a_daemon_that_is_away_holds_up_copies_from_itself_alone() -> None:
    async with whole_cluster(3) as whole, whole.client() as one:
        daemons = whole.cluster.daemons
        await whole.stores[0].write(ChunkId(5, 0), 0, b"here")
        await whole.stores[1].write(ChunkId(5, 0), 0, b"there")
        whole.network.partition(daemons[0].node, daemons[2].node)
        async with trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(one.links.to(0).call, CopyChunk(2, 5, 0, 0, 6, index, 0, 10), WriteChunkReply)
            await wait_all_tasks_blocked()
            with trio.fail_after(5):
                await one.links.to(0).call(CopyChunk(1, 5, 0, 0, 7, 0, 0, 5), WriteChunkReply)
                await one.links.to(0).call(CopyChunk(0, 5, 0, 0, 7, 1, 0, 4), WriteChunkReply)
            nursery.cancel_scope.cancel()
        contents = whole.stores[0].contents()
        assert (contents[ChunkId(7, 0)][1], contents[ChunkId(7, 1)][1]) == (b"there", b"here")


# ── against plain bytes ──────────────────────────────────────────────────────────────────────────────────────────────


class Plain:
    """Hold a file as bytes, and its blocks by number; ``reserved`` lie behind the end, or did."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.blocks: set[int] = set()

    def _take(self, offset: int, end: int) -> None:
        self.blocks |= set(range(offset // BLOCK, -(-end // BLOCK)))

    def _extend(self, size: int) -> None:
        self.data.extend(bytes(max(0, size - len(self.data))))

    def write(self, offset: int, data: bytes) -> None:
        if data:
            self._extend(offset + len(data))
            self.data[offset : offset + len(data)] = data
            self._take(offset, offset + len(data))

    def truncate(self, size: int) -> None:
        if size <= len(self.data):
            del self.data[size:]
            self.blocks = {block for block in self.blocks if block * BLOCK < size}
        self._extend(size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        end = offset + length
        if mode in (PUNCH, ZERO, ZERO | KEEP):
            stop = max(offset, min(end, len(self.data)))
            self.data[offset:stop] = bytes(stop - offset)
        if mode == PUNCH:
            end = min(end, -(-len(self.data) // CHUNK) * CHUNK)
            self.blocks -= set(range(-(-offset // BLOCK), end // BLOCK))
            return
        self._take(offset, end)
        if not mode & KEEP:
            self._extend(end)

    def needed(self) -> set[int]:
        """Return the blocks that hold anything but zeros."""
        return {at // BLOCK for at in range(0, len(self.data), BLOCK) if any(self.data[at : at + BLOCK])}

    def seek(self, offset: int, whence: int) -> int:
        """Find data or a hole; -1: there is none."""
        if offset >= len(self.data):
            return -1
        following = range((offset // BLOCK + 1) * BLOCK, len(self.data), BLOCK)
        for position in chain([offset], following):
            if (position // BLOCK in self.blocks) == (whence == os.SEEK_DATA):
                return position
        return -1 if whence == os.SEEK_DATA else len(self.data)

    def copy_from(self, source: "Plain", offset: int, target: int, length: int) -> int:
        length = min(length, len(source.data) - offset)
        if length <= 0:
            return 0
        position = offset
        while position < offset + length:
            end = min((position // BLOCK + 1) * BLOCK, offset + length)
            if position // BLOCK in source.blocks:
                self.write(target + position - offset, bytes(source.data[position:end]))
            else:
                self.punch_run(source, offset, target, position, offset + length)
            position = end
        self._extend(target + length)
        return length

    def punch_run(self, source: "Plain", offset: int, target: int, position: int, stop: int) -> None:
        """Make the run of holes that begins at a position a hole here; later blocks of it do nothing more."""
        if position > offset and (position - 1) // BLOCK not in source.blocks:
            return
        end = position
        while end < stop and end // BLOCK not in source.blocks:
            end = min((end // BLOCK + 1) * BLOCK, stop)
        start, end = target + position - offset, target + end - offset
        cut = max(start, min(end, len(self.data)))
        self.data[start:cut] = bytes(cut - start)
        self.blocks -= set(range(-(-start // BLOCK), end // BLOCK))


SIZE_MAX = 5 * CHUNK
OFFSETS = st.one_of(
    st.sampled_from([0, 1, BLOCK, CHUNK - 1, CHUNK, CHUNK + BLOCK, 2 * CHUNK, 3 * CHUNK]), st.integers(0, SIZE_MAX)
)
LENGTHS = st.one_of(st.sampled_from([1, BLOCK, CHUNK, 3 * CHUNK]), st.integers(1, 2 * CHUNK))
WHO = st.tuples(st.integers(0, 1), st.integers(0, 1))
MODES = st.sampled_from([0, KEEP, PUNCH, PUNCH, ZERO, ZERO | KEEP])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), WHO, OFFSETS, LENGTHS),
        st.tuples(st.just("fallocate"), WHO, OFFSETS, LENGTHS, MODES),
        st.tuples(st.just("fallocate"), WHO, OFFSETS, LENGTHS, MODES),
        st.tuples(st.just("copy"), WHO, OFFSETS, LENGTHS, st.integers(0, 1), OFFSETS),
        st.tuples(st.just("truncate"), WHO, OFFSETS),
        st.tuples(st.just("read"), WHO, OFFSETS, LENGTHS),
        st.tuples(st.just("seek"), WHO, OFFSETS),
        st.tuples(st.just("walk"), WHO),
        st.tuples(st.just("stat"), WHO),
    ),
    min_size=10,
    max_size=40,
)
FAULTS = st.lists(st.sampled_from([None] * 12 + ["lose_request", "lose_reply", "restart"]), min_size=40, max_size=40)


class Run:
    """Do steps to both; each file is open at both clients, and flushed where another is to see it."""

    def __init__(self, whole: Whole, files: list[list[File]]) -> None:
        self.whole = whole
        self.files = files
        self.plain = [Plain(), Plain()]
        self.last: list[int | None] = [None, None]
        #: After a message was sent twice, blocks are counted right at the last close and no sooner.
        self.counted = True
        self._writes = 0

    async def _see(self, client: int, number: int) -> File:
        """Return a client's file, with everything flushed that the other one did, and its new size known."""
        if self.last[number] not in (None, client):
            await self.files[1 - client][number].stat()
            await self.files[client][number].stat()
        self.last[number] = client
        return self.files[client][number]

    async def do(self, step: tuple[Any, ...], fault: str | None) -> None:
        name, who, *arguments = step
        act: Callable[..., Awaitable[None]] = getattr(self, f"_{name}")
        file = await self._see(*who)
        if fault is None:
            await act(file, who, *arguments)
            return
        self.counted = False
        if fault != "restart":
            getattr(self.whole.network, fault)()
            await act(file, who, *arguments)
            self.whole.network.lose_nothing()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(act, file, who, *arguments)
            for _ in range(len(arguments) * 5):
                await trio.lowlevel.checkpoint()
            for daemon in self.whole.cluster.daemons:
                await daemon.kill()
            for daemon in self.whole.cluster.daemons:
                await daemon.start()

    async def _write(self, file: File, who: tuple[int, int], offset: int, length: int) -> None:
        self._writes += 1
        data = (b"%d." % self._writes * length)[:length]
        await file.write(data, offset)
        self.plain[who[1]].write(offset, data)

    async def _fallocate(self, file: File, who: tuple[int, int], offset: int, length: int, mode: int) -> None:
        await file.fallocate(offset, length, mode)
        self.plain[who[1]].fallocate(mode, offset, length)

    async def _truncate(self, file: File, who: tuple[int, int], size: int) -> None:
        await file.truncate(size)
        self.plain[who[1]].truncate(size)

    async def _copy(
        self, file: File, who: tuple[int, int], offset: int, length: int, to: int, target_offset: int
    ) -> None:
        plain, target = self.plain[who[1]], self.plain[to]
        there = await self._see(who[0], to)
        clipped = min(length, len(plain.data) - offset)
        if to == who[1] and clipped > 0 and abs(offset - target_offset) < clipped:
            with pytest.raises(InvalidArgument):
                await file.copy_range(offset, there, target_offset, length)
            return
        copied = await file.copy_range(offset, there, target_offset, length)
        assert copied == target.copy_from(plain, offset, target_offset, length)
        # Where a chunk of the source ends in a block, the copy may leave zeros behind that end out.
        found = {block for start, end in await data_ranges(there) for block in range(start // BLOCK, -(-end // BLOCK))}
        seen = range(-(-len(target.data) // BLOCK))
        assert target.needed() <= found <= target.blocks
        target.blocks -= set(seen) - found

    async def _read(self, file: File, who: tuple[int, int], offset: int, length: int) -> None:
        assert await file.read(length, offset) == self.plain[who[1]].data[offset : offset + length]

    async def _seek(self, file: File, who: tuple[int, int], offset: int) -> None:
        for whence, call in ((os.SEEK_DATA, file.seek_data), (os.SEEK_HOLE, file.seek_hole)):
            expected = self.plain[who[1]].seek(offset, whence)
            try:
                assert await call(offset) == expected
            except NoDevice:
                assert expected == -1

    async def _walk(self, file: File, who: tuple[int, int]) -> None:
        plain = self.plain[who[1]]
        for start, end in await data_ranges(file):
            assert plain.seek(start, os.SEEK_DATA) == start and plain.seek(start, os.SEEK_HOLE) == end
        assert await file.read(2 * SIZE_MAX, 0) == plain.data

    async def _stat(self, file: File, who: tuple[int, int]) -> None:
        attrs, plain = await file.stat(), self.plain[who[1]]
        assert attrs.size == len(plain.data)
        if self.counted:
            assert attrs.allocated == BLOCK * len(plain.blocks)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, faults=FAULTS, seed=st.integers(0, 1000), faulty=st.booleans())
def test_two_clients_and_two_files_agree_with_plain_bytes(
    steps: list[tuple[Any, ...]], faults: list[str | None], seed: int, faulty: bool
) -> None:
    async def main() -> None:
        async with whole_cluster(3, seed) as whole, whole.client() as one, whole.client() as two:
            files = [[await client.fs.open(name, RW) for name in ("/a", "/b")] for client in (one, two)]
            run = Run(whole, files)
            for step, fault in zip(steps, faults, strict=False):
                await run.do(step, fault if faulty else None)
            for number in (0, 1):
                await run.do(("walk", (0, number)), None)
                await run.do(("stat", (1, number)), None)
            for client in files:
                for file in client:
                    await file.close()
            await at_rest(whole)
            assert fsck(whole, 2) == []

    trio.run(main, clock=MockClock(autojump_threshold=0))
