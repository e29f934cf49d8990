"""The client's side over a whole cluster in one process: names, files, gathering, what two mounts see of each other."""

import errno
import os
import random
import stat
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from whole import CHUNK, Client, Whole, whole_cluster

from benchfs_fuse.chunks.faulty import Rates
from benchfs_fuse.client import File
from benchfs_fuse.errors import (
    BadHandle,
    DaemonUnreachable,
    Exists,
    FileTooLarge,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NoAttribute,
    NoSpace,
    NotADirectory,
    NotEmpty,
    NotFound,
    Stale,
    StorageError,
    SymlinkLoop,
)
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.limits import FILE_SIZE_MAX, MIB, NAME_MAX
from benchfs_fuse.model import Attrs, DaemonId, make_ino
from benchfs_fuse.ports import Channel, Ending, Reply
from benchfs_fuse.rpc.client import Links
from benchfs_fuse.rpc.memory import MemoryChannel
from benchfs_fuse.rpc.messages import (
    Append,
    AttrsReply,
    Body,
    CommitWrite,
    GetAttr,
    Lookup,
    Make,
    Open,
    OpenCount,
    ReadChunk,
    Release,
    Request,
    SetAttr,
    SyncChunks,
    SyncMeta,
    Touch,
    TrimChunks,
    WriteChunk,
    WriteChunkReply,
)
from benchfs_fuse.services.calls import Call
from benchfs_fuse.services.files import open_files
from benchfs_fuse.services.known import Known
from benchfs_fuse.services.namespace import Namespace
from benchfs_fuse.services.write_behind import SEALED_MAX, Budget

RW = os.O_RDWR | os.O_CREAT


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_tree_made_by_one_client_is_seen_by_another() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, whole.client() as two:
        await one.fs.mkdir("/a")
        for number in range(5):
            await one.fs.mkdir(f"/a/d{number}")
            async with await one.fs.open(f"/a/d{number}/f", RW, 0o640) as file:
                await file.write(b"%d" % number, 0)
        await one.fs.symlink("a/d3", "/link")
        assert await two.fs.listdir("/") == [b"a", b"link"]
        assert await two.fs.listdir("/a") == [b"d0", b"d1", b"d2", b"d3", b"d4"]
        assert await two.fs.readlink("link") == b"a/d3"
        async with await two.fs.open("/link/f") as file:
            assert await file.read(10, 0) == b"3"
        attrs = await two.fs.stat("/a/d4/f")
        assert (stat.S_IMODE(attrs.mode), attrs.uid, attrs.gid, attrs.size, attrs.nlink) == (0o640, 1000, 1000, 1, 1)
        assert (await two.fs.stat("/link", follow=False)).mode & stat.S_IFLNK == stat.S_IFLNK


async def test_every_entry_of_a_listing_has_attributes_wherever_its_inode_lives() -> None:
    async with whole_cluster(3) as whole, whole.client() as one:
        for number in range(20):
            await one.fs.mkdir(f"/d{number}")
        entries = [entry async for entry in one.fs.scandir()]
        assert len(entries) == 20
        homes = {whole.cluster.shard_map.of_ino(entry.ino) for entry in entries}
        assert homes == {0, 1, 2}
        assert all(entry.attrs is not None and entry.attrs.is_dir and entry.attrs.ino == entry.ino for entry in entries)


async def test_a_long_listing_comes_in_pages() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        names = [b"%04d" % number for number in range(1200)]
        for name in names:
            await one.fs.mknod(b"/" + name, stat.S_IFREG | 0o600)
        assert await one.fs.listdir() == names


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        (lambda fs: fs.stat("/none"), NotFound),
        (lambda fs: fs.stat("/f/x"), NotADirectory),
        (lambda fs: fs.mkdir("/d"), Exists),
        (lambda fs: fs.rmdir("/d"), NotEmpty),
        (lambda fs: fs.rmdir("/f"), NotADirectory),
        (lambda fs: fs.remove("/d"), IsADirectory),
        (lambda fs: fs.remove("/"), InvalidArgument),
        (lambda fs: fs.stat("/" + "x" * (NAME_MAX + 1)), NameTooLong),
        (lambda fs: fs.rename("/d", "/d/e/f"), InvalidArgument),
        (lambda fs: fs.rename("/f", "/d/e", 1), Exists),
        (lambda fs: fs.stat("/loop"), SymlinkLoop),
        (lambda fs: fs.open("/loop", os.O_NOFOLLOW), SymlinkLoop),
        (lambda fs: fs.open("/d"), IsADirectory),
        (lambda fs: fs.open("/f", os.O_CREAT | os.O_EXCL), Exists),
        (lambda fs: fs.open("/", RW | os.O_EXCL), Exists),
        (lambda fs: fs.open("/loop", RW | os.O_EXCL), Exists),
        (lambda fs: fs.open("/f/x", RW | os.O_EXCL), NotADirectory),
        (lambda fs: fs.mkdir("/f/x"), NotADirectory),
        (lambda fs: fs.mkdir("/loop"), Exists),
        (lambda fs: fs.mkdir("/"), Exists),
        (lambda fs: fs.remove("/f/x"), NotADirectory),
        (lambda fs: fs.remove("/none"), NotFound),
        (lambda fs: fs.rmdir("/none/x"), NotFound),
        (lambda fs: fs.open("/none"), NotFound),
        (lambda fs: fs.readlink("/f"), InvalidArgument),
        (lambda fs: fs.getxattr("/f", b"user.none"), NoAttribute),
        (lambda fs: fs.setattr("/d", size=1), IsADirectory),
        (lambda fs: fs.setattr("/f", size=-1), InvalidArgument),
    ],
)
async def test_what_cannot_be_done_says_why(
    operation: Callable[[object], Awaitable[object]], error: type[Exception]
) -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        await one.fs.mkdir("/d")
        await one.fs.mkdir("/d/e")
        await one.fs.symlink("loop", "/loop")
        await (await one.fs.open("/f", RW)).close()
        with pytest.raises(error):
            await operation(one.fs)


async def test_a_new_name_is_not_looked_up_first() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        await one.fs.mkdir("/d")
        before = dict(whole.cluster.daemons[0].server.requests)
        file = await one.fs.open("/a", RW | os.O_EXCL)
        await one.fs.mkdir("/b")
        await one.fs.symlink("x", "/d/c")
        await one.fs.remove("/d/c")
        after = whole.cluster.daemons[0].server.requests
        grown = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
        assert grown == {"Make": 3, "Unlink": 1, "Lookup": 2}
        await file.close()


async def test_dots_and_links_in_paths() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        await one.fs.mkdir("/a")
        await one.fs.mkdir("/a/b")
        await one.fs.symlink("/a/./b", "/a/b/up")
        inner = await one.fs.stat("/a/b")
        for path in ("a/b", b"/a//b/", "/a/b/.", "/a/b/../b", "/../a/b", "/a/b/up", "/a/b/up/up"):
            assert (await one.fs.stat(path)).ino == inner.ino
        assert (await one.fs.stat("/")).ino == 1


async def test_exactly_one_of_many_creates_exclusively() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        won: list[int] = []

        async def attempt(number: int) -> None:
            fs = (one, two)[number % 2].fs
            try:
                file = await fs.open("/prize", RW | os.O_EXCL)
            except Exists:
                return
            won.append(number)
            await file.close()

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(attempt, number)
        assert len(won) == 1


async def test_extended_attributes() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        await one.fs.mkdir("/d")
        await one.fs.setxattr("/d", b"user.a", b"1")
        await one.fs.setxattr("/d", b"user.b", b"", os.XATTR_CREATE)
        with pytest.raises(Exists):
            await one.fs.setxattr("/d", b"user.a", b"2", os.XATTR_CREATE)
        assert sorted(await two.fs.listxattr("/d")) == [b"user.a", b"user.b"]
        assert await two.fs.getxattr("/d", b"user.a") == b"1"
        await two.fs.removexattr("/d", b"user.a")
        with pytest.raises(NoAttribute):
            await one.fs.removexattr("/d", b"user.a")


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("gather_bytes_max", [0, 256 * 1024, 8 * MIB])
@pytest.mark.parametrize("seed", range(3))
async def test_random_reads_writes_and_truncations_agree_with_a_plain_buffer(gather_bytes_max: int, seed: int) -> None:
    choose = random.Random(seed)
    model = bytearray()
    async with whole_cluster(3, seed) as whole, whole.client(gather_bytes_max=gather_bytes_max) as one:
        file = await one.fs.open("/f", RW)
        for _ in range(150):
            offset = choose.choice([0, choose.randrange(4 * CHUNK), len(model)])
            length = choose.choice([1, 100, 4096, CHUNK, 2 * CHUNK + 5])
            match choose.choice("wwwwrrrts"):
                case "w":
                    data = choose.randbytes(length)
                    await file.write(data, offset)
                    model.extend(bytes(max(0, offset - len(model))))
                    model[offset : offset + length] = data
                case "r":
                    assert await file.read(length, offset) == model[offset : offset + length]
                case "t":
                    await file.truncate(offset)
                    model = model[:offset] + bytes(max(0, offset - len(model)))
                case "s":
                    assert (await file.stat()).size == len(model)
        await file.close()
        assert one.files.statistics() == (0, 0, 0, 0)
        async with whole.client() as two, await two.fs.open("/f") as again:
            assert await again.read(len(model) + 1, 0) == model


async def test_small_writes_leave_as_one_request_for_each_chunk_and_one_publication() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        file = await one.fs.open("/f", RW)
        whole.network.calls.clear()
        for number in range(2 * CHUNK // 512):
            await file.write(b"%512d" % number, number * 512)
        await file.close()
        assert whole.network.calls == {WriteChunk.op: 2, CommitWrite.op: 1, Release.op: 1}


async def test_a_write_is_with_the_daemons_when_the_gather_time_is_over(autojump_clock: object) -> None:
    async with whole_cluster(2) as whole, whole.client(gather_time_s=5) as one, whole.client() as two:
        file = await one.fs.open("/f", RW)
        await file.write(b"late", 0)
        assert (await two.fs.stat("/f")).size == 0
        await trio.sleep(6)
        assert (await two.fs.stat("/f")).size == 4
        assert one.files.statistics().accepted_bytes == 0
        await file.close()


async def test_a_sparse_file_reads_zeros_and_takes_no_space() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"end", 1 << 40)
        attrs = await file.stat()
        assert attrs.size == (1 << 40) + 3 and attrs.allocated <= CHUNK
        buffer = bytearray(b"\xff" * (CHUNK + 3))
        assert await file.read_into(buffer, (1 << 40) - CHUNK) == CHUNK + 3
        assert buffer == bytes(CHUNK) + b"end"


async def test_limits_of_offsets_and_handles() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        async with await one.fs.open("/f", RW) as file:
            with pytest.raises(FileTooLarge):
                await file.write(b"xx", FILE_SIZE_MAX - 1)
            with pytest.raises(InvalidArgument):
                await file.write(b"xx", -1)
            assert await file.write(b"", 5) == 0
            assert (await file.stat()).size == 0
        async with await one.fs.open("/f") as file:
            with pytest.raises(BadHandle):
                await file.write(b"x", 0)
        async with await one.fs.open("/f", os.O_WRONLY) as file:
            with pytest.raises(BadHandle):
                await file.read(1, 0)


async def test_what_is_closed_at_one_mount_is_what_another_opens() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        for number in range(10):
            writer, reader = (one, two) if number % 2 else (two, one)
            data = b"%d" % number * (number + 1) * 1000
            async with await writer.fs.open("/f", RW | os.O_TRUNC) as file:
                await file.write(data, 0)
            async with await reader.fs.open("/f") as file:
                assert await file.read(100_000, 0) == data


async def test_appends_of_two_mounts_lose_nothing() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:

        async def append(number: int) -> None:
            async with await (one, two)[number % 2].fs.open("/log", RW | os.O_APPEND) as file:
                for line in range(20):
                    await file.write(b"%03d %03d\n" % (number, line), 0)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(append, number)
        async with await one.fs.open("/log") as file:
            lines = (await file.read(100_000, 0)).split(b"\n")
        assert lines.pop() == b""
        assert sorted(lines) == sorted(b"%03d %03d" % (number, line) for number in range(6) for line in range(20))


async def test_an_append_follows_what_was_gathered_behind_a_truncation_elsewhere() -> None:
    """The size that the mount knows is older than the truncation, and larger than what it wrote."""
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        file = await one.fs.open("/f", os.O_RDWR | os.O_CREAT)
        await file.write(b"x" * 1000, 0)
        await file.fsync()
        appending = await one.fs.open("/f", os.O_WRONLY | os.O_APPEND)
        await two.fs.setattr("/f", size=10)
        await file.write(b"first", 100)
        await appending.write(b"second", 0)
        assert await file.read(2000, 0) == b"x" * 10 + bytes(90) + b"firstsecond"
        await appending.close()
        await file.close()


async def test_an_append_follows_what_the_same_mount_has_gathered() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        plain = await one.fs.open("/f", RW)
        appending = await one.fs.open("/f", os.O_WRONLY | os.O_APPEND)
        await plain.write(b"first ", 0)
        await appending.write(b"second", 0)
        assert await plain.read(100, 0) == b"first second"
        await appending.close()
        await plain.close()


async def test_a_reserved_range_reads_as_zeros() -> None:
    """What an append has reserved and not yet written is there for others, as zeros."""
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        async with await one.fs.open("/f", RW) as file:
            await file.write(b"before", 0)
        appending = await one.fs.open("/f", os.O_WRONLY | os.O_APPEND)
        held = trio.Event()
        for store in whole.chunks:
            store.hold = held
        async with trio.open_nursery() as nursery:
            nursery.start_soon(appending.write, b"after", 0)
            await wait_all_tasks_blocked()
            for store in whole.chunks:
                store.hold = None
            async with await two.fs.open("/f") as reader:
                assert await reader.read(100, 0) == b"before" + bytes(5)
            held.set()
        async with await two.fs.open("/f") as reader:
            assert await reader.read(100, 0) == b"beforeafter"
        await appending.close()


async def test_truncating_down_and_up_brings_nothing_back() -> None:
    async with whole_cluster(3) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"x" * (5 * CHUNK), 0)
        await file.truncate(CHUNK + 10)
        await file.truncate(5 * CHUNK)
        expected = b"x" * (CHUNK + 10) + bytes(4 * CHUNK - 10)
        assert await file.read(5 * CHUNK, 0) == expected
        assert (await file.stat()).allocated <= 2 * CHUNK


async def test_an_unlinked_file_lives_while_it_is_open_here_or_elsewhere() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        async with await one.fs.open("/f", RW) as file:
            await file.write(b"x" * 3 * CHUNK, 0)
        here, there = await one.fs.open("/f", os.O_RDWR), await two.fs.open("/f")
        await one.fs.remove("/f")
        with pytest.raises(NotFound):
            await one.fs.stat("/f")
        assert await there.read(10, 2 * CHUNK) == b"x" * 10
        await here.write(b"still", 0)
        await here.fsync()
        assert (await here.stat()).nlink == 0
        await here.close()
        assert await there.read(5, 0) == b"still"
        await there.close()
        await _empty(whole)


async def _empty(whole: Whole) -> None:
    """Wait until no chunk is left anywhere."""
    for daemon in whole.cluster.daemons:
        await whole.service(daemon).metadata.wait_idle()
    assert [usage.free - usage.total for store in whole.stores for usage in await store.usage()] == [0] * len(
        whole.stores
    )


async def test_explicit_times_survive_the_close() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        file = await one.fs.open("/f", RW)
        await file.write(b"x", 0)
        await one.fs.setattr("/f", atime_ns=1, mtime_ns=2)
        await file.close()
        attrs = await one.fs.stat("/f")
        assert (attrs.atime_ns, attrs.mtime_ns) == (1, 2)


async def test_times_do_not_change_after_close() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        async with await one.fs.open("/f", RW) as file:
            await file.write(b"x" * 100, 0)
            await file.read(100, 0)
        before = await one.fs.stat("/f")
        await wait_all_tasks_blocked()
        assert await one.fs.stat("/f") == before
        assert before.atime_ns > before.mtime_ns - 10**9


async def test_reading_sets_the_access_time_as_relatime_does() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        async with await one.fs.open("/f", RW) as file:
            await file.write(b"x", 0)
        await one.fs.setattr("/f", atime_ns=1)
        for _ in range(3):
            async with await one.fs.open("/f") as file:
                await file.read(1, 0)
        assert (await one.fs.stat("/f")).atime_ns > 1
        assert whole.network.calls[Touch.op] == 1
        await one.fs.setattr("/f", atime_ns=1)
        async with await one.fs.open("/f", os.O_RDONLY | os.O_NOATIME) as file:
            await file.read(1, 0)
        assert (await one.fs.stat("/f")).atime_ns == 1


async def test_fsync_reaches_the_daemons_of_the_chunks_and_of_the_inode() -> None:
    async with whole_cluster(3) as whole, whole.client() as one:
        file = await one.fs.open("/f", RW)
        await file.write(b"x" * (3 * CHUNK), 0)
        await file.fsync()
        assert whole.network.calls[SyncChunks.op] == 3 and whole.network.calls[SyncMeta.op] == 1
        await file.write(b"y", 0)
        await file.fsync()
        assert whole.network.calls[SyncChunks.op] == 4
        await file.close()
        async with await one.fs.open("/f") as again:  # what an earlier handle wrote is synced too
            await again.fsync()
        assert whole.network.calls[SyncChunks.op] == 7


async def test_an_fsync_waits_for_the_one_that_took_its_bytes() -> None:
    async with whole_cluster(1) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"x", 0)
        await one.files.drain()
        whole.chunks[0].hold = trio.Event()
        ended: list[int] = []

        async def fsync(number: int) -> None:
            await file.fsync()
            ended.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(fsync, number)
                await wait_all_tasks_blocked()
            assert not ended
            whole.chunks[0].hold.set()
            whole.chunks[0].hold = None
        assert sorted(ended) == [0, 1]


async def test_a_flush_waits_for_what_is_being_published() -> None:
    async with whole_cluster(1) as whole, whole.client() as one, trio.open_nursery() as nursery:
        handle = await one.files.create(1, b"f", 0o600, 0, 0, os.O_RDWR)
        await one.files.write(handle, 0, b"x")
        await handle.node.writing.settle_all()
        whole.network.partition(whole.cluster.daemons[0].node, one.node)
        nursery.start_soon(one.files.drain)
        await wait_all_tasks_blocked()
        assert whole.network.calls[CommitWrite.op] == 1
        flushed = trio.Event()

        async def flush() -> None:
            await one.files.flush(handle)
            flushed.set()

        nursery.start_soon(flush)
        await wait_all_tasks_blocked()
        assert not flushed.is_set()
        whole.network.heal(whole.cluster.daemons[0].node, one.node)
        await flushed.wait()
        assert whole.network.calls[CommitWrite.op] == 1


async def test_what_a_disk_has_lost_is_reported_once_to_every_handle() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        syncing, other = await one.fs.open("/f", RW), await one.fs.open("/f", os.O_RDWR)
        await other.write(b"x", 0)
        await one.files.drain()
        whole.chunks[0].rates = Rates(failure=1.0)
        with pytest.raises(StorageError):
            await syncing.fsync()
        whole.chunks[0].rates = Rates()
        with pytest.raises(StorageError):
            await other.fsync()
        await other.fsync()
        await other.close()
        await syncing.close()


async def test_a_handle_for_synchronous_writes_syncs_each() -> None:
    async with whole_cluster(1) as whole, whole.client() as one, await one.fs.open("/f", RW | os.O_DSYNC) as file:
        await file.write(b"x", 0)
        assert (whole.network.calls[SyncChunks.op], whole.network.calls[SyncMeta.op]) == (1, 1)


# ── what fails ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_gathered_bytes_that_fail_are_reported_once_to_every_handle_and_dropped() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        dropped: list[int] = []
        one.files.on_dropped = dropped.append
        writing, other = await one.fs.open("/f", RW), await one.fs.open("/f")
        await writing.write(b"good", 0)
        await writing.fsync()
        whole.chunks[0].rates = Rates(no_space=1.0)
        await writing.write(b"bad!", 0)
        with pytest.raises(NoSpace):
            await writing.fsync()
        late = await one.fs.open("/f")
        await writing.fsync()
        assert dropped == [writing.ino]
        assert await other.read(10, 0) == b"good"
        with pytest.raises(NoSpace):
            await other.close()
        await late.close()
        await writing.close()
        assert one.files.statistics() == (0, 0, 0, 0)


async def test_a_handle_takes_no_more_bytes_until_it_has_reported_that_some_were_dropped() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        file = await one.fs.open("/f", RW)
        whole.chunks[0].rates = Rates(no_space=1.0)
        await file.write(b"x", 0)
        await one.files.drain()
        for _ in range(2):
            with pytest.raises(NoSpace):
                await file.write(b"y", 1)
        whole.chunks[0].rates = Rates()
        with pytest.raises(NoSpace):
            await file.fsync()
        await file.write(b"z", 2)
        await file.close()
        async with await one.fs.open("/f") as again:
            assert await again.read(10, 0) == b"\0\0z"


async def test_a_write_that_is_waited_for_fails_by_itself() -> None:
    async with whole_cluster(1) as whole, whole.client(gather_bytes_max=0) as one:
        file = await one.fs.open("/f", RW)
        whole.chunks[0].rates = Rates(no_space=1.0)
        with pytest.raises(NoSpace) as raised:
            await file.write(b"bad!", 0)
        assert raised.value.errno == errno.ENOSPC
        await file.close()
        assert (await one.fs.stat("/f")).size == 0


async def test_whoever_leaves_with_open_files_flushes_and_releases_them() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        good, bad = await one.fs.open("/good", RW), await one.fs.open("/bad", RW)
        await good.write(b"in time", 0)
        await one.files.drain()
        whole.chunks[0].rates = Rates(partial=1.0)
        await bad.write(b"x" * 1000, 0)
        await one.files.leave()
        whole.chunks[0].rates = Rates()
        assert one.files.statistics() == (0, 0, 0, 0)
        await whole.service(whole.cluster.daemons[0]).metadata.wait_idle()
        assert (await one.fs.stat("/good")).size == 7
        async with await one.fs.open("/bad", os.O_RDWR) as again:  # nothing of what was not published comes back
            await again.truncate(1000)
            assert await again.read(2000, 0) == bytes(1000)
        assert good.ino != bad.ino


async def test_handles_of_a_client_that_was_expelled_are_stale() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        file = await one.fs.open("/f", RW)
        one.links.expel("by the test")
        with pytest.raises(Stale):
            await file.read(1, 0)
        await file.write(b"x", 0)
        with pytest.raises(Stale):
            await file.fsync()
        with pytest.raises(Stale):
            await file.close()


async def test_what_a_client_that_was_expelled_cannot_publish_is_not_tried_again(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        files = [await one.fs.open(f"/f{number}", RW) for number in range(3)]
        for file in files:
            await file.write(b"x", 0)
        one.links.expel("by the test")
        await trio.sleep(3600)
        told = [message for message in caplog.messages if "cannot publish" in message]
        assert len(told) == len({message.split(":")[0] for message in told}) == 3
        for file in files:
            with pytest.raises(Stale):
                await file.close()
        assert one.files.statistics() == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "use",
    [
        lambda file: file.read(1, 0),
        lambda file: file.write(b"x", 0),
        lambda file: file.truncate(0),
        lambda file: file.fallocate(0, 1),
        lambda file: file.seek_data(0),
        lambda file: file.seek_hole(0),
        lambda file: file.copy_range(0, file, 1, 1),
        lambda file: file.stat(),
        lambda file: file.fsync(),
        lambda file: file.lock(),
        lambda file: file.unlock(),
    ],
)
async def test_a_file_that_was_closed_is_of_no_use(use: Callable[[File], Awaitable[object]]) -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        file, other = await one.fs.open("/f", RW), await one.fs.open("/f", os.O_RDWR)
        await file.write(b"xy", 0)
        await file.close()
        with pytest.raises(BadHandle):
            await use(file)
        assert await other.read(3, 0) == b"xy"
        await other.close()


async def test_a_file_that_is_closed_twice_is_given_back_once() -> None:
    async with whole_cluster(1) as whole, whole.client() as one, whole.client() as two:
        file, again = await one.fs.open("/f", RW), await one.fs.open("/f", os.O_RDWR)
        await file.write(b"x", 0)
        for _ in range(2):
            await again.close()
        await two.fs.remove("/f")
        assert await file.read(1, 0) == b"x"
        await file.close()
        assert one.files.statistics() == (0, 0, 0, 0)


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_whoever_is_cancelled_leaves_no_file_open(turns: int) -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        await (await one.fs.open("/f", RW)).close()

        async def use(scope: trio.CancelScope) -> None:
            with scope:
                async with await one.fs.open("/f", os.O_WRONLY) as file:
                    await file.write(b"x", 0)

        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(use, scope)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            scope.cancel()
        await wait_all_tasks_blocked()
        assert one.files.statistics() == (0, 0, 0, 0)
        assert [session.opens for session in whole.cluster.daemons[0].sessions.statuses()] == [0]


def lose_touch_after(whole: Whole, client: Client, op: int) -> None:
    """Let the daemon serve one request of this kind more, then cut the network so that the answer is lost."""
    daemon = whole.cluster.daemons[0]
    serve = daemon.server.handle_now

    def serve_and_cut(channel: Channel, op_: int, body: bytes, payload: memoryview | None, want: int) -> Reply | None:
        reply = serve(channel, op_, body, payload, want)
        if op_ == op:
            lose_touch(whole, client)
        return reply

    for channel in daemon.node.channels:
        channel._handle_now = serve_and_cut


def lose_touch(whole: Whole, client: Client) -> None:
    whole.network.partition(whole.cluster.daemons[0].node, client.node)
    whole.network.silence(whole.cluster.daemons[0].node, client.node)


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("op", [Open.op, Make.op, Release.op])
async def test_handles_are_counted_right_in_the_end_whatever_met_its_deadline(
    op: int, served: bool, autojump_clock: object
) -> None:
    async with whole_cluster(1) as whole, whole.client(op_timeout_s=10.0) as one:
        daemon = whole.cluster.daemons[0]
        first = await one.files.create(1, b"f", 0o600, 0, 0, os.O_RDWR)
        second = await one.files.open(first.ino, os.O_RDWR)
        if served:
            lose_touch_after(whole, one, op)
        else:
            lose_touch(whole, one)
        operations: dict[int, Callable[[], Awaitable[object]]] = {
            Open.op: lambda: one.files.open(first.ino, os.O_RDWR),
            Make.op: lambda: one.files.create(1, b"g", 0o600, 0, 0, os.O_RDWR),
            Release.op: lambda: one.files.release(second),
        }
        with pytest.raises(DaemonUnreachable):
            await operations[op]()
        whole.network.heal(daemon.node, one.node)
        await trio.sleep(30)
        writers = 1 if op == Release.op else 2
        assert daemon.sessions._sessions[one.links.client_id].opens == {first.ino: [0, writers]}
        assert one.files.opens() == [OpenCount(first.ino, 0, writers)]
        await one.files.release(first)
        await one.files.release(second)
        assert [session.opens for session in daemon.sessions.statuses()] == [0]


async def test_what_is_published_twice_is_counted_anew(autojump_clock: object) -> None:
    async with whole_cluster(1) as whole, whole.client(op_timeout_s=10.0) as one:
        file = await one.fs.open("/f", RW)
        await file.write(b"x", 0)
        lose_touch_after(whole, one, CommitWrite.op)
        with pytest.raises(DaemonUnreachable):
            await file.stat()
        whole.network.heal(whole.cluster.daemons[0].node, one.node)
        await file.close()
        await whole.service(whole.cluster.daemons[0]).metadata.wait_idle()
        attrs = await one.fs.stat("/f")
        assert (attrs.size, attrs.allocated) == (1, 4096)


@pytest.mark.parametrize("seed", range(4))
async def test_lossy_connections_change_nothing(seed: int) -> None:
    choose = random.Random(seed)
    async with whole_cluster(2, seed) as whole, whole.client(gather_bytes_max=256 * 1024) as one:
        whole.network.request_loss = whole.network.reply_loss = 0.05
        data = choose.randbytes(6 * CHUNK)
        async with await one.fs.open("/f", RW) as file:
            for offset in range(0, len(data), 5000):
                await file.write(data[offset : offset + 5000], offset)
        async with await one.fs.open("/f") as file:
            assert await file.read(len(data) + 1, 0) == data
        assert await one.fs.listdir("/") == [b"f"]


# ── order, bounds ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_writes_that_overlap_keep_their_order() -> None:
    async with whole_cluster(2, 7) as whole, whole.client(gather_bytes_max=64 * MIB) as one:
        file = await one.fs.open("/f", RW)
        for number in range(100):
            await file.write(b"%02d" % number * 50, number % 7)
        model = bytearray()
        for number in range(100):
            data, offset = b"%02d" % number * 50, number % 7
            model[offset : offset + 100] = data
        assert await file.read(200, 0) == model
        await file.close()


async def test_a_write_over_what_is_gathered_sends_nothing() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        file = await one.fs.open("/f", RW)
        await file.write(b"a" * 100, 0)
        await file.write(b"b" * 50, 100)
        for number in range(50):
            await file.write(b"%02d" % number, number)
        assert whole.network.calls[WriteChunk.op] == 0
        expected = b"".join(b"%02d" % number for number in range(50))
        model = bytearray(b"a" * 100 + b"b" * 50)
        for number in range(50):
            model[number : number + 2] = expected[2 * number : 2 * number + 2]
        assert await file.read(200, 0) == model
        assert whole.network.calls[WriteChunk.op] == 1
        await file.close()


async def test_runs_under_way_are_bounded_for_each_file() -> None:
    async with whole_cluster(1) as whole, whole.client(gather_bytes_max=64 * MIB) as one:
        file = await one.fs.open("/f", RW)
        whole.chunks[0].hold = trio.Event()

        async def scatter() -> None:
            for number in range(3 * SEALED_MAX):
                await file.write(b"x", 2 * number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(scatter)
            await wait_all_tasks_blocked()
            assert one.files.statistics().accepted_bytes == SEALED_MAX + 1
            whole.chunks[0].hold.set()
            whole.chunks[0].hold = None
        await file.close()
        async with await one.fs.open("/f") as again:
            assert await again.read(6 * SEALED_MAX, 0) == b"x\0" * (3 * SEALED_MAX - 1) + b"x"


async def test_a_full_budget_waits_for_room_and_not_for_the_clock() -> None:
    async with whole_cluster(1) as whole, whole.client(gather_bytes_max=2 * CHUNK, gather_time_s=1e6) as one:
        files = [await one.fs.open(f"/f{number}", RW) for number in range(5)]
        for file in files:
            for offset in range(0, CHUNK, CHUNK // 4):
                await file.write(b"x" * (CHUNK // 4), offset)
                assert one.files.statistics().accepted_bytes <= 2 * CHUNK
        for file in files:
            await file.close()


async def test_nobody_holds_room_for_later_while_others_wait_for_it() -> None:
    async with whole_cluster(1) as whole, whole.client(gather_bytes_max=2 * CHUNK, gather_time_s=1e6) as one:
        handles = [await one.files.create(1, b"%d" % number, 0o600, 0, 0, os.O_RDWR) for number in range(8)]
        whole.chunks[0].hold = trio.Event()
        async with trio.open_nursery() as nursery:
            for handle in handles:
                nursery.start_soon(one.files.write, handle, 0, b"x" * (CHUNK - 1))
            await wait_all_tasks_blocked()
            whole.chunks[0].hold.set()
            whole.chunks[0].hold = None
            with trio.fail_after(10):
                while nursery.child_tasks:
                    await trio.lowlevel.checkpoint()


async def test_a_budget_is_first_come_first_served(autojump_clock: object) -> None:
    budget = Budget(100)
    order: list[int] = []

    async def take(number: int, length: int) -> None:
        await budget.acquire(length)
        order.append(number)

    await budget.acquire(90)
    async with trio.open_nursery() as nursery:
        for number, length in enumerate([200, 5, 5]):
            nursery.start_soon(take, number, length)
            await wait_all_tasks_blocked()
        assert order == []
        budget.release(90)
        await wait_all_tasks_blocked()
        assert order == [0]
        budget.release(200)
    assert sorted(order) == [0, 1, 2] and budget.used == 10


async def test_whoever_gives_up_waiting_for_a_budget_holds_nothing() -> None:
    budget = Budget(10)
    await budget.acquire(10)
    with trio.move_on_after(0):
        await budget.acquire(5)
    budget.release(10)
    assert budget.used == 0


def _attrs(version: int) -> Attrs:
    return Attrs(7, 1, 0o100644, 1, 0, 0, 0, version, 0, 0, 0, 0, version, CHUNK, 1, 0)


def test_older_attributes_never_replace_newer_ones() -> None:
    known = Known()
    assert known.see(_attrs(5)).version == 5
    assert known.see(_attrs(4)).version == 5
    assert known.get(7) == _attrs(5)


def test_the_space_of_a_version_is_what_is_left_when_its_truncation_is_done() -> None:
    under_way, done = (msgspec.structs.replace(_attrs(5), allocated=allocated) for allocated in (9000, 4096))
    for first, second in ((under_way, done), (done, under_way)):
        known = Known()
        known.see(first)
        epoch = known.epoch(7)
        assert known.see(second) == done == known.get(7)
        assert known.epoch(7) == epoch


def test_the_epoch_changes_with_changes_of_others_alone() -> None:
    known = Known(count_max=2)
    known.see(_attrs(1))
    first = known.epoch(7)
    known.see(_attrs(2), own=True)
    known.see(_attrs(2))
    assert known.epoch(7) == first
    known.see(_attrs(4), own=True)  # version 3 was somebody else's
    second = known.epoch(7)
    assert second != first
    known.see(_attrs(5))
    assert known.epoch(7) not in (first, second, 0)
    for ino in (8, 9):
        known.see(msgspec.structs.replace(_attrs(1), ino=ino))
    assert known.get(7) is None and known.epoch(7) == 0


def test_an_inode_that_was_forgotten_and_has_not_changed_has_its_epoch_still() -> None:
    known = Known(count_max=2)
    known.see(_attrs(1))
    first = known.epoch(7)
    for ino in (8, 9):
        known.see(msgspec.structs.replace(_attrs(1), ino=ino))
    known.resume(7, first)
    assert known.epoch(7) == 0
    known.see(_attrs(1))
    assert known.epoch(7) != first
    known.resume(7, first)
    assert known.epoch(7) == first
    known.clear()
    known.see(_attrs(1))
    known.resume(7, first)
    assert known.epoch(7) not in (first, 0)


async def test_the_answer_to_what_changes_nothing_shows_changes_of_others() -> None:
    async with whole_cluster(1) as whole, whole.client() as one, whole.client() as two:
        async with await one.fs.open("/f", RW) as file:
            await file.write(b"old", 0)
        ino = file.ino

        async def change_there() -> int:
            epoch = one.files.known.epoch(ino)
            async with await two.fs.open("/f", os.O_WRONLY) as file:
                await file.write(b"new", 0)
            return epoch

        async with await one.fs.open("/f") as reading:
            before = await change_there()
            await reading.read(3, 0)  # which sets the access time
        assert whole.network.calls[Touch.op] == 1
        assert one.files.known.epoch(ino) != before
        before = await change_there()
        await one.files.setattr(ino, size=3)
        assert one.files.known.epoch(ino) != before


# ── the number of requests ───────────────────────────────────────────────────────────────────────────────────────────


async def test_requests_per_operation_on_one_daemon() -> None:
    async with whole_cluster(1) as whole, whole.client() as one:
        await (await one.fs.open("/f", RW)).close()
        calls = whole.network.calls

        async def count(operation: Callable[[], Awaitable[object]]) -> dict[int, int]:
            calls.clear()
            await operation()
            return dict(calls)

        ino = (await one.fs.stat("/f")).ino
        assert await count(lambda: one.namespace.lookup(1, b"f")) == {Lookup.op: 1}
        assert await count(lambda: one.files.getattr(ino)) == {GetAttr.op: 1}
        assert await count(lambda: one.files.setattr(ino, mode=0o600)) == {SetAttr.op: 1}

        async def create() -> None:
            await one.files.release(await one.files.create(1, b"g", 0o600, 0, 0, os.O_RDWR))

        assert await count(create) == {Make.op: 1, Release.op: 1}

        async def write() -> None:
            handle = await one.files.open(ino, os.O_RDWR)
            await one.files.write(handle, 0, b"x" * 4096)
            await one.files.flush(handle)
            await one.files.release(handle)

        assert await count(write) == {Open.op: 1, WriteChunk.op: 1, CommitWrite.op: 1, Release.op: 1}

        async def read() -> None:
            handle = await one.files.open(ino, os.O_RDONLY | os.O_NOATIME)
            assert await one.files.read(handle, 0, memoryview(bytearray(8192))) == 4096
            await one.files.release(handle)

        assert await count(read) == {Open.op: 1, ReadChunk.op: 1, Release.op: 1}

        async def append() -> None:
            handle = await one.files.open(ino, os.O_WRONLY | os.O_APPEND)
            await one.files.write(handle, 0, b"x")
            await one.files.release(handle)

        assert await count(append) == {Open.op: 1, Append.op: 1, WriteChunk.op: 1, CommitWrite.op: 1, Release.op: 1}


async def test_a_size_that_was_seen_outlives_a_start_of_the_daemon() -> None:
    async with (
        whole_cluster(1) as whole,
        whole.client() as one,
        whole.client() as two,
        await one.fs.open("/f", RW) as file,
    ):
        other = await two.fs.open("/f", os.O_RDWR)
        await file.truncate(100)
        assert (await other.stat()).size == 100
        assert await other.read(1000, 0) == bytes(100)
        await file.truncate(1)
        assert (await other.stat()).size == 1
        await whole.cluster.daemons[0].kill()
        await whole.cluster.daemons[0].start()
        await two.links.wait_connected()
        assert await other.read(1000, 0) == b"\0"
        await other.close()


async def lose_power(whole: Whole, daemon_id: int, client: Client) -> None:
    daemon = whole.cluster.daemons[daemon_id]
    await daemon.kill()
    daemon.losses += 1
    await daemon.start()
    await client.links.wait_connected()


async def test_no_fsync_succeeds_for_what_a_power_cut_may_have_taken() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        names = [f"/{number}" for number in range(3)]
        written, clean, read = [await one.fs.open(name, RW) for name in names]
        home = whole.cluster.shard_map.of_ino(written.ino)
        await written.write(b"x" * 3 * CHUNK, 0)  # chunks on both
        for handle in (written, clean, read):
            await handle.fsync()
        reader = await one.fs.open(names[2])
        await written.write(b"y" * 3 * CHUNK, 0)
        await one.files.flush(written._handle)
        await lose_power(whole, 1 - home, one)
        with pytest.raises(StorageError, match=f"daemon {1 - home} lost power"):
            await written.fsync()
        await written.fsync()  # once
        await clean.fsync()  # nothing of it lay there
        await lose_power(whole, home, one)
        for handle in (written, clean):
            with pytest.raises(StorageError, match=f"daemon {home} lost power"):
                await handle.fsync()
        assert await reader.read(10, 0) == b""
        await reader.close()
        with pytest.raises(StorageError, match="lost power"):
            await one.fs.namespace.sync_names()
        await one.fs.namespace.sync_names()


async def test_a_restart_without_a_power_cut_loses_nothing() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"x" * 3 * CHUNK, 0)
        await one.files.flush(file._handle)
        for daemon in whole.cluster.daemons:
            await daemon.kill()
            await daemon.start()
        await one.links.wait_connected()
        await file.fsync()
        await one.fs.namespace.sync_names()


async def test_power_that_is_lost_during_an_fsync_fails_it() -> None:
    async with whole_cluster(1) as whole, whole.client() as one, await one.fs.open("/f", RW) as file:
        await file.write(b"x" * CHUNK, 0)
        await file.fsync()
        raised: list[StorageError] = []

        async def sync() -> None:
            try:
                await file.fsync()
            except StorageError as error:
                raised.append(error)

        async with trio.open_nursery() as nursery:
            await whole.cluster.daemons[0].kill()
            nursery.start_soon(sync)
            await wait_all_tasks_blocked()
            await lose_power(whole, 0, one)
        assert len(raised) == 1


async def test_a_dead_daemon_stops_only_what_needs_it() -> None:
    async with whole_cluster(2) as whole, whole.client(gather_bytes_max=4 * CHUNK) as one:
        file = await one.fs.open("/f", RW)
        width = (await file.stat()).width
        of_chunk = whole.cluster.shard_map.of_chunk
        index_of = {of_chunk(file.ino, index, width): index for index in range(8)}
        home = whole.cluster.shard_map.of_ino(file.ino)
        other = DaemonId(1 - home)
        for channel in list(whole.cluster.daemons[other].node.channels):
            channel.cut_both(Ending.PEER)
        whole.network.partition(whole.cluster.daemons[other].node, one.node)
        blocked = trio.Event()

        async def fill() -> None:
            for number in range(100):
                await file.write(b"x" * CHUNK, index_of[other] * CHUNK)
                if number > 2:
                    blocked.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            await wait_all_tasks_blocked()
            assert not blocked.is_set()
            second = await one.fs.open("/second", RW)
            assert whole.cluster.shard_map.of_ino(second.ino) == home
            index = next(number for number in range(99) if of_chunk(second.ino, number, width) == home)
            for _ in range(20):
                await second.write(b"y" * CHUNK, index * CHUNK)
            assert await second.read(3, index * CHUNK) == b"yyy"
            nursery.cancel_scope.cancel()


async def test_what_is_written_while_a_size_is_published_is_published_next() -> None:
    async with whole_cluster(1) as whole, whole.client(gather_bytes_max=0) as one, trio.open_nursery() as nursery:
        daemon = whole.cluster.daemons[0]
        came, go_on = trio.Event(), trio.Event()
        publish = whole.service(daemon).handlers_now()[CommitWrite]

        async def later(request: Request, call: Call) -> Body:
            came.set()
            await go_on.wait()
            answer = publish(request, call)
            assert answer is not None
            return answer

        daemon.server.register({CommitWrite: later}, {CommitWrite: lambda request, call: None})
        file = await one.fs.open("/f", RW)
        await file.write(b"x", 0)
        nursery.start_soon(file.stat)
        await came.wait()
        await file.write(b"y", 10)
        go_on.set()
        assert (await file.stat()).size == 11


async def test_a_truncation_elsewhere_leaves_zeros_of_what_was_not_published() -> None:
    async with whole_cluster(2) as whole, whole.client(gather_bytes_max=0) as one, whole.client() as two:
        async with await one.fs.open("/f", RW) as file:
            await file.write(b"old", 0)
            await file.stat()
            await file.write(b"x" * 100, 0)  # with its daemon, and not counted yet
            await two.fs.setattr("/f", size=0)
        async with await two.fs.open("/f") as file:
            assert await file.read(200, 0) == bytes(100)


async def test_who_knew_the_size_before_a_truncation_elsewhere_reads_zeros_behind_the_cut() -> None:
    async with whole_cluster(2) as whole, whole.client() as one, whole.client() as two:
        file = await one.fs.open("/f", RW)
        await file.write(b"a" * 2 * CHUNK, 0)
        await file.fsync()
        await two.fs.setattr("/f", size=10)
        assert (await file.read(CHUNK, 0)) == b"a" * 10 + bytes(CHUNK - 10)
        assert (await file.stat()).size == 10
        assert (await file.read(CHUNK, 0)) == b"a" * 10
        await file.close()


async def test_blocks_are_right_after_a_write_met_a_truncation() -> None:
    async with whole_cluster(2) as whole, whole.client(gather_bytes_max=0) as one, whole.client() as two:
        file = await one.fs.open("/f", RW)
        await file.write(b"x", CHUNK)
        await file.stat()
        await file.write(b"x" * 100, 0)  # with its daemon, and not counted yet
        await two.fs.setattr("/f", size=0)
        assert (await file.stat()).size == 100
        await file.close()
        for daemon in whole.cluster.daemons:
            await whole.service(daemon).metadata.wait_idle()
        assert (await two.fs.stat("/f")).allocated == 0


class _Immediate:
    """Be the links to one daemon that answers without a turn of the event loop, as a spinning connection does."""

    daemons = (0,)
    shard_map = ShardMap.round_robin(1)
    repeated = 0

    def __init__(self) -> None:
        self.attrs = Attrs(make_ino(0, 5), 1, 0o100600, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, CHUNK, 1, 0)

    def to(self, daemon_id: int) -> "_Immediate":
        return self

    async def call(self, request: Request, reply: type[Body], payload: object = None, **rest: object) -> Body:
        return WriteChunkReply(0) if isinstance(request, WriteChunk) else AttrsReply(self.attrs)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cut", [False, True], ids=["settled", "truncated"])
async def test_a_write_that_was_given_up_leaves_nothing_behind_the_end(
    seed: int, cut: bool, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """A daemon that stood still reads the request before it learns that its connection has ended."""

    async def later(channel: MemoryChannel) -> None:
        await trio.sleep(1000)

    monkeypatch.setattr(MemoryChannel, "_tell_end", later)
    async with whole_cluster(2, seed) as whole, whole.client(op_timeout_s=3) as one:
        file = await one.fs.open("/f", RW)
        await file.write(b"kept", 0)
        await file.fsync()
        home, shard_map = whole.cluster.shard_map.of_ino(file.ino), whole.cluster.shard_map
        index = next(index for index in range(2) if shard_map.of_chunk(file.ino, index, 2) != home)
        stalled = whole.cluster.daemons[1 - home]
        whole.network.partition(one.node, stalled.node)
        await file.write(b"old" * 100, index * CHUNK)
        with pytest.raises(DaemonUnreachable):
            await file.fsync()
        if cut:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(file.truncate, 2)
                await wait_all_tasks_blocked()
                whole.network.heal(one.node, stalled.node)
            await wait_all_tasks_blocked()
            await file.truncate(2 * CHUNK)
            assert (await file.read(2 * CHUNK, 0)).strip(b"\0") == b"ke"
        await file.close()
        await wait_all_tasks_blocked()
        if not cut:
            whole.network.heal(one.node, stalled.node)
        await trio.sleep(10)  # it finds its way back, and gives the file back
        assert one.files.opens() == []
        for daemon in whole.cluster.daemons:
            await wait_all_tasks_blocked()
            await whole.service(daemon).metadata.wait_idle()
        async with await one.fs.open("/f", os.O_RDWR) as file:
            await file.truncate(2 * CHUNK)
            assert (await file.read(2 * CHUNK, 0)).strip(b"\0") == (b"ke" if cut else b"kept")


async def test_a_write_is_behind_a_truncation_under_way_as_a_whole() -> None:
    async with whole_cluster(2) as whole, whole.client() as one:
        file = await one.fs.open("/f", RW | os.O_DIRECT)
        await file.write(b"a" * 2 * CHUNK, 0)
        first = whole.cluster.daemons[whole.cluster.shard_map.of_chunk(file.ino, 0, 2)]
        trim = whole.service(first).chunks.handlers()[TrimChunks]
        go_on = trio.Event()

        async def later(request: Request, call: Call) -> Body:
            await go_on.wait()
            return await trim(request, call)

        first.server.register({TrimChunks: later})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.truncate, 0)
            await wait_all_tasks_blocked()
            nursery.start_soon(file.write, b"b" * 2 * CHUNK, 0)
            await wait_all_tasks_blocked()
            go_on.set()
        assert await file.read(2 * CHUNK, 0) == b"b" * 2 * CHUNK
        await file.close()


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDWR | os.O_DIRECT], ids=["gathered", "direct"])
@pytest.mark.parametrize("how", ["fails", "is given up"])
async def test_what_is_written_behind_a_truncation_that_did_not_end_well_is_kept(
    how: str, flags: int, autojump_clock: MockClock
) -> None:
    async with whole_cluster(2) as whole, whole.client() as one, trio.open_nursery() as nursery:
        file = await one.fs.open("/f", flags | os.O_CREAT)
        await file.write(b"a" * 4 * CHUNK, 0)
        await file.fsync()
        came, go_on = whole.hold_trims(file.ino, StorageError("the test says so") if how == "fails" else None)
        if how == "fails":
            with pytest.raises(StorageError):
                await file.truncate(0)
        else:
            async with trio.open_nursery() as caller:
                caller.start_soon(file.truncate, 0)
                await came.wait()
                caller.cancel_scope.cancel()
        written = trio.Event()

        async def write() -> None:
            await file.write(b"b" * 4 * CHUNK, 0)
            await file.fsync()
            written.set()

        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        assert not written.is_set()
        go_on.set()
        await written.wait()
        assert await file.read(4 * CHUNK, 0) == b"b" * 4 * CHUNK
        await file.close()


async def test_what_was_flushed_before_the_gathering_task_had_its_turn() -> None:
    links = cast(Links, _Immediate())
    async with open_files(Namespace(links), gather_bytes_max=CHUNK, gather_time_s=0.0) as files:
        handle = await files.open(_Immediate().attrs.ino, os.O_RDWR | os.O_DIRECT)
        await wait_all_tasks_blocked()
        for _ in range(3):
            await files.write(handle, 0, b"x")
            await files.flush(handle)
            await wait_all_tasks_blocked()
        assert files.statistics().dirty == 0
