"""Check what the disk store promises beyond its port, on real files and a real ring: damage, crashes, races, bounds."""

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
import trio.testing

from benchfs_fuse.chunks.disk import DiskChunkStore
from benchfs_fuse.chunks.spread import is_spread, spread
from benchfs_fuse.chunks.table import ChunkTable
from benchfs_fuse.chunks.uring import PLAIN_LENGTH_MAX, ProbeResult, Ring
from benchfs_fuse.errors import NoSpace, NotSupported, QuotaExceeded, StorageError, UserError
from benchfs_fuse.kv.memory import MemoryStore
from benchfs_fuse.kv.rocks import RocksStore
from benchfs_fuse.limits import FILES_OPEN_MAX
from benchfs_fuse.model import ChunkId, DataRange
from benchfs_fuse.ports import Buffer, KeyValueStore

BLOCK = 4096
CHUNK = ChunkId(77, 3)


class SteeredRing(Ring):
    """Let a test hold writes up, fail them half way, and count and fail syncs."""

    def __init__(self) -> None:
        super().__init__(depth=16)
        self.hold: trio.Event | None = None
        self.write_error: OSError | None = None
        self.sync_error: OSError | None = None
        self.synced: list[str] = []
        #: What fallocate fails with: after it was done in the first half of the range.
        self.allocate_error: OSError | None = None
        self.hold_allocate: trio.Event | None = None

    async def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        if self.hold_allocate is not None:
            await self.hold_allocate.wait()
        if self.allocate_error is not None and not mode & 2:
            await super().fallocate(fd, mode, offset, length // 2)
            raise self.allocate_error
        await super().fallocate(fd, mode, offset, length)

    async def write(self, fd: int, data: Buffer, offset: int) -> None:
        if self.write_error is not None:
            await super().write(fd, memoryview(data)[: len(data) // 2], offset)
            raise self.write_error
        if self.hold is not None:
            await self.hold.wait()
        await super().write(fd, data, offset)

    async def fsync(self, fd: int, *, data_only: bool) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        self.synced.append(name.rsplit(".", 1)[0])
        if self.sync_error is not None:
            raise self.sync_error
        await super().fsync(fd, data_only=data_only)


@asynccontextmanager
async def opened(
    directory: Path, kv: KeyValueStore | None = None, *, plain: bool = False, reserve: int | None = None
) -> AsyncIterator[tuple[DiskChunkStore, SteeredRing]]:
    open_before = len(os.listdir("/proc/self/fd"))
    ring = SteeredRing()
    async with trio.open_nursery() as nursery:
        store = DiskChunkStore(
            directory, kv or MemoryStore(), ring, nursery, plain_reads=plain, plain_writes=plain, reserve=reserve
        )
        yield store, ring
        nursery.cancel_scope.cancel()
    await store.aclose()
    await ring.aclose()
    assert len(os.listdir("/proc/self/fd")) == open_before


def files(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "chunks").rglob("*") if path.is_file())


async def content(store: DiskChunkStore, chunk: ChunkId = CHUNK, length: int = 100_000) -> bytes:
    into = bytearray(b"\xaa" * length)
    return bytes(into[: await store.read(chunk, 0, memoryview(into))])


async def removed(kv: MemoryStore) -> None:
    """Wait until the background has nothing left to remove."""
    with trio.fail_after(10):
        while ChunkTable(kv).leftovers:
            await trio.testing.wait_all_tasks_blocked(0.001)


# Where files are made.


def spreadable(directory: Path) -> bool:
    """Tell whether the file system knows the flag: ext4 does, tmpfs does not."""
    directory.mkdir()
    with suppress(OSError):
        spread(str(directory))
        return is_spread(str(directory))
    return False


async def test_directories_of_chunk_files_are_spread_where_the_disk_knows_how(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, _):
        await store.write(CHUNK, 0, b"x")
    if spreadable(tmp_path / "probe"):
        assert is_spread(str(tmp_path / "chunks"))
    else:
        assert files(tmp_path)


# Damage.


async def test_what_was_cut_off_is_synced_away(tmp_path: Path) -> None:
    """A truncation is in the table at once. The file must not keep the bytes until the table grows over them again."""
    async with opened(tmp_path) as (store, ring):
        await store.write(CHUNK, 0, b"x" * 2 * BLOCK)
        await store.trim(77, 3, BLOCK + 1)
        assert ring.synced == [f"{77:016x}.{3:08x}"]
        await store.trim(77, 3, BLOCK + 1)  # whoever asks again may not know that it was done
        assert ring.synced == [f"{77:016x}.{3:08x}"] * 2
        await store.trim(77, 3, 0)
        assert len(ring.synced) == 2


@pytest.mark.parametrize("length", [0, 100, 2 * BLOCK - 1])
async def test_a_chunk_file_that_was_cut_is_an_error(tmp_path: Path, length: int) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as (store, _):
        await store.write(CHUNK, 0, b"x" * 2 * BLOCK)
        await store.write(ChunkId(77, 4), 0, b"y")
        os.truncate(files(tmp_path)[0], length)
        with pytest.raises(StorageError, match="its record says"):
            await content(store)
    async with opened(tmp_path, kv) as (store, _):
        with pytest.raises(StorageError, match="its record says"):
            await content(store)
        with pytest.raises(StorageError, match="its record says"):
            await store.write(CHUNK, 5 * BLOCK, b"x")
        with pytest.raises(StorageError, match="its record says"):
            await store.sync(77)
        assert await content(store, ChunkId(77, 4)) == b"y"
        assert await store.drop([77]) == 3 * BLOCK
        assert await content(store) == b""


async def test_a_chunk_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as (store, _):
        await store.write(CHUNK, 0, b"x")
    files(tmp_path)[0].unlink()
    async with opened(tmp_path, kv) as (store, _):
        with pytest.raises(StorageError):
            await content(store)
        with pytest.raises(StorageError):
            await store.write(CHUNK, 0, b"y")
        assert await store.trim(77, 3, 0) == (BLOCK, 0)
        await store.write(CHUNK, 0, b"y")
        assert await content(store) == b"y"


async def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.RaisesGroup(pytest.RaisesExc(UserError, match="Cannot use the data directory")):
        async with opened(tmp_path / "file"):
            pass


# Crashes.


class Crash(BaseException):
    """Stop a scenario as a crash would: nothing may catch it."""


@contextmanager
def suppress_crash() -> Iterator[None]:
    try:
        yield
    except* Crash:
        pass


async def scenario(store: DiskChunkStore, done: list[str]) -> None:
    """Go through every kind of change; note each step when it was acknowledged."""
    await store.write(CHUNK, 0, b"a" * 3 * BLOCK)
    done.append("made")
    await store.write(CHUNK, 2 * BLOCK, b"b" * 3 * BLOCK)
    done.append("grown")
    await store.write(ChunkId(77, 4), BLOCK, b"c" * 10)
    done.append("second")
    await store.trim(77, 3, BLOCK + 100)
    done.append("cut")
    await store.write(CHUNK, 4 * BLOCK, b"d" * BLOCK)
    done.append("grown again")
    await store.drop([77])
    done.append("dropped")
    await store.write(CHUNK, BLOCK, b"e" * 10)
    done.append("made again")
    await store.allocate(CHUNK, 0, 3 * BLOCK)
    done.append("allocated")
    await store.punch(CHUNK, BLOCK, 2 * BLOCK)
    done.append("punched")


STATES = {
    "": (b"", b""),
    "made": (b"a" * 3 * BLOCK, b""),
    "grown": (b"a" * 2 * BLOCK + b"b" * 3 * BLOCK, b""),
    "second": (b"a" * 2 * BLOCK + b"b" * 3 * BLOCK, bytes(BLOCK) + b"c" * 10),
    "cut": (b"a" * (BLOCK + 100), b""),
    "grown again": (b"a" * (BLOCK + 100) + bytes(3 * BLOCK - 100) + b"d" * BLOCK, b""),
    "dropped": (b"", b""),
    "made again": (bytes(BLOCK) + b"e" * 10, b""),
    "allocated": (bytes(BLOCK) + b"e" * 10 + bytes(2 * BLOCK - 10), b""),
    "punched": (bytes(3 * BLOCK), b""),
}
STEPS = list(STATES)


@pytest.mark.parametrize("hook", ["before_write", "after_write"])
@pytest.mark.parametrize("number", range(1, 16))
async def test_a_crash_at_any_write_of_the_table(tmp_path: Path, hook: str, number: int) -> None:
    """Find the state before or after the step that was interrupted, or, for a trim, between; then go on from there."""

    def crash(count: int) -> None:
        if count == number:
            raise Crash

    kv = MemoryStore()
    setattr(kv, hook, crash)
    done: list[str] = [""]
    with suppress_crash():
        async with opened(tmp_path, kv) as (store, _):
            await scenario(store, done)
            await removed(kv)
    kv = MemoryStore(kv.contents())
    async with opened(tmp_path, kv) as (store, _):
        found = (await content(store), await content(store, ChunkId(77, 4)))
        allowed = [STATES[done[-1]], *[STATES[step] for step in STEPS[STEPS.index(done[-1]) + 1 :][:1]]]
        if done[-1] == "second":
            allowed.append((STATES["cut"][0], STATES["second"][1]))
        # Unacknowledged bytes over existing ones may be there in part or whole.
        if done[-1] == "made":
            allowed.append((b"a" * 2 * BLOCK + b"b" * BLOCK, b""))
        assert found in allowed
        # Nothing that was ever cut off may come back behind the end.
        await store.write(CHUNK, 10 * BLOCK, b"end")
        behind = (await content(store))[len(found[0]) :]
        assert behind == bytes(10 * BLOCK - len(found[0])) + b"end"
        assert (await store.trim(77, 99, 0)).left == await store.drop([77])
        await removed(kv)
        assert files(tmp_path) == []
        assert kv.contents() == {}


async def test_the_crash_points_above_are_all(tmp_path: Path) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as (store, _):
        await scenario(store, [])
        await removed(kv)
    # Three chunks made (two writes each), two grown, a trim (a drop and a cut), a drop, an allocation, a hole, garbage
    # forgotten.
    assert 6 + 2 + 2 + 1 + 2 + 1 <= kv.writes <= 15


WRITER = """
import sys
from pathlib import Path
import trio
from benchfs_fuse.chunks.disk import DiskChunkStore
from benchfs_fuse.chunks.uring import Ring
from benchfs_fuse.kv.rocks import RocksStore
from benchfs_fuse.model import ChunkId

async def main():
    async with trio.open_nursery() as nursery:
        directory = Path(sys.argv[1])
        store = DiskChunkStore(directory, RocksStore(directory / "kv"), Ring(), nursery)
        for number in range(1_000_000):
            ino, index = number // 8, number % 4
            await store.write(ChunkId(ino, index), number % 8 * 3000, b"%08d" % number * 500)
            if number % 8 == 7 and ino % 3 == 2:
                await store.drop([ino - 1])
            sys.stdout.buffer.write(b"%08d\\n" % number)
            sys.stdout.buffer.flush()

trio.run(main)
"""


def write_and_kill(directory: Path, acknowledged_min: int) -> int:
    """Run a writer, kill it after so many acknowledgements; return how many it gave before it died."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(directory)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(acknowledged_min):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        return acknowledged_min + len(process.stdout.read().splitlines())


@pytest.mark.parametrize("acknowledged_min", [1, 50, 1500])
async def test_kill_9_keeps_what_was_acknowledged(tmp_path: Path, acknowledged_min: int) -> None:
    count = write_and_kill(tmp_path, acknowledged_min)
    kv = RocksStore(tmp_path / "kv")
    dropped = {ino - 1 for ino in range(2, count // 8, 3)}
    kept = [ino for ino in range((count + 7) // 8) if ino not in dropped]
    # Of the last file's fellow, nobody knows: its drop may have been under way.
    doubtful = {count // 8 - 1}
    async with opened(tmp_path, kv) as (store, _):
        expected: dict[ChunkId, bytearray] = {}
        for number in range(count):
            bytes_ = expected.setdefault(ChunkId(number // 8, number % 4), bytearray())
            offset = number % 8 * 3000
            bytes_.extend(bytes(max(0, offset + 4000 - len(bytes_))))
            bytes_[offset : offset + 4000] = b"%08d" % number * 500
        for chunk, bytes_ in expected.items():
            found = await content(store, chunk)
            if chunk.ino in dropped:
                assert found == b""
            elif chunk.ino not in doubtful and chunk != ChunkId(count // 8, count % 4):
                assert found == bytes_
        table = ChunkTable(kv)
        for ino in range((count + 8) // 8 + 1):
            allocated = sum(record.allocated for _, record in table.page(ino, 0, 100))
            assert await store.drop([ino]) == allocated
        assert kept
        with trio.fail_after(10):
            while files(tmp_path):
                await trio.testing.wait_all_tasks_blocked(0.001)
    kv.close()


# Removal in the background.


async def test_removal_never_touches_a_newer_chunk(tmp_path: Path) -> None:
    """Hold the removal before its unlink; make the chunk anew; let go."""
    go_on = trio.Event()

    class SlowSync(MemoryStore):
        async def sync(self) -> None:
            await go_on.wait()

    kv = SlowSync()
    async with opened(tmp_path, kv) as (store, _):
        await store.write(CHUNK, 0, b"old" * 1000)
        await store.drop([77])
        await trio.testing.wait_all_tasks_blocked()
        assert len(files(tmp_path)) == 1
        await store.write(CHUNK, 100, b"new")
        assert await content(store) == bytes(100) + b"new"
        assert len(files(tmp_path)) == 2
        go_on.set()
        await removed(kv)
        assert len(files(tmp_path)) == 1
        assert await content(store) == bytes(100) + b"new"


async def test_leftovers_of_an_earlier_run_are_removed_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kv = MemoryStore()

    async def never() -> None:
        await trio.sleep_forever()

    async with opened(tmp_path, kv) as (store, _):
        kv.sync = never  # type: ignore[method-assign]
        for index in range(5):
            await store.write(ChunkId(77, index), 0, b"x")
        await store.drop([77])
    assert len(files(tmp_path)) == 5
    kv = MemoryStore(kv.contents())
    caplog.set_level(logging.INFO)
    async with opened(tmp_path, kv):
        await removed(kv)
    assert files(tmp_path) == []
    assert "5 dropped chunk files of an earlier run" in caplog.text


async def test_removal_that_fails_is_tried_again_with_the_next_drop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = MemoryStore()

    def refuse(path: str) -> None:
        raise OSError(30, "Read-only file system")

    async with opened(tmp_path, kv) as (store, _):
        await store.write(CHUNK, 0, b"x")
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", refuse)
            await store.drop([77])
            with trio.fail_after(10):
                while not caplog.records:
                    await trio.testing.wait_all_tasks_blocked(0.001)
        assert "cannot remove dropped chunk files" in caplog.text
        assert len(files(tmp_path)) == 1
        await store.write(CHUNK, 0, b"x")
        await store.drop([77])
        await removed(kv)
        assert files(tmp_path) == []


# Races.


async def test_a_trim_waits_for_writes_and_holds_new_ones_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, ring):
        await store.write(CHUNK, 0, b"old" * 5000)
        hold = ring.hold = trio.Event()
        order: list[str] = []

        async def note(name: str, chunk: ChunkId, offset: int, data: bytes) -> None:
            await store.write(chunk, offset, data)
            order.append(name)

        async def cut() -> None:
            trimmed = await store.trim(77, 3, 10)
            order.append("trim")
            assert trimmed == (BLOCK * 3, 2 * BLOCK)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(note, "before", CHUNK, 15_000, b"before" * 10)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(cut)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(note, "after", CHUNK, 20, b"after")
            await trio.testing.wait_all_tasks_blocked()
            ring.hold = None
            await note("another chunk", ChunkId(77, 1), 0, b"x")
            await note("another file", ChunkId(78, 3), 0, b"x")
            assert order == ["another chunk", "another file"]
            assert len(await content(store)) == 15_000
            hold.set()
        # The trim goes on to sync what it cut off while the write that it held back is done.
        assert order[2] == "before" and sorted(order[3:]) == ["after", "trim"]
        assert await content(store) == b"oldoldoldo" + bytes(10) + b"after"


async def test_a_drop_during_a_write_leaves_nothing(tmp_path: Path) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as (store, ring):
        ring.hold = trio.Event()
        grown: list[int] = []

        async def write() -> None:
            grown.append(await store.write(CHUNK, 0, b"x" * BLOCK))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            assert await store.drop([77]) == 0
            ring.hold.set()
        assert grown == [0]
        assert await content(store) == b""
        await removed(kv)
        assert files(tmp_path) == []


async def test_a_trim_that_waits_while_its_chunk_is_dropped_frees_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, ring):
        await store.write(CHUNK, 0, b"x" * 2 * BLOCK)
        ring.hold = trio.Event()
        freed: list[int] = []

        async def cut() -> None:
            freed.append((await store.trim(77, 3, 10)).freed)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.write, CHUNK, 0, b"y")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(cut)
            await trio.testing.wait_all_tasks_blocked()
            assert await store.drop([77]) == 2 * BLOCK
            ring.hold.set()
        assert freed == [0]


# Failing writes.


@pytest.mark.parametrize("reopen", [False, True])
async def test_bytes_of_a_failed_write_do_not_show_up_later(tmp_path: Path, reopen: bool) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as (store, ring):
        await store.write(CHUNK, 0, b"good")
        ring.write_error = OSError(28, "No space left on device")
        for chunk in (CHUNK, ChunkId(77, 4)):
            with pytest.raises(NoSpace):
                await store.write(chunk, 10, b"bad" * 10_000)
        ring.write_error = None
        if not reopen:
            await check_after_failure(store)
    if reopen:
        async with opened(tmp_path, kv) as (store, _):
            await check_after_failure(store)


async def check_after_failure(store: DiskChunkStore) -> None:
    assert await content(store) == b"good"
    assert await content(store, ChunkId(77, 4)) == b""
    assert await store.write(CHUNK, 40_000, b"end") == BLOCK
    assert await store.write(ChunkId(77, 4), 40_000, b"end") == BLOCK
    assert await content(store) == b"good" + bytes(39_996) + b"end"
    assert await content(store, ChunkId(77, 4)) == bytes(40_000) + b"end"
    assert await store.drop([77]) == 3 * BLOCK


async def test_the_reserve_is_left_alone(tmp_path: Path) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as (store, _):
        await store.write(CHUNK, 0, b"x" * BLOCK)
        full = (await store.usage())[0]
    async with opened(tmp_path, kv, reserve=1 << 60) as (store, _):
        usage = (await store.usage())[0]
        assert usage.available == 0 < full.available
        assert usage.filesystem == full.filesystem
        with pytest.raises(NoSpace):
            await store.write(CHUNK, BLOCK, b"y")
        with pytest.raises(NoSpace):
            await store.write(ChunkId(78, 0), 0, b"y")
        assert len(files(tmp_path)) == 1
        assert await store.write(CHUNK, 0, b"y" * BLOCK) == 0
        assert await store.drop([77]) == BLOCK


# Sync.


async def test_sync_reaches_what_was_written_since_the_last_one(tmp_path: Path) -> None:
    kv = MemoryStore()
    names = [f"{77:016x}.{index:08x}" for index in range(4)]
    async with opened(tmp_path, kv) as (store, ring):
        for index in range(3):
            await store.write(ChunkId(77, index), 0, b"x")
        await store.write(ChunkId(78, 0), 0, b"x")
        await store.sync(77)
        assert sorted(ring.synced) == [*names[:3], "4d"]
        assert kv.syncs == 1
        ring.synced.clear()
        await store.write(ChunkId(77, 1), 5, b"y")
        await store.sync(77)
        assert ring.synced == [names[1]]
        await store.write(ChunkId(77, 3), 5, b"y")
        ring.synced.clear()
        await store.sync(77)
        assert sorted(ring.synced) == [names[3], "4d"]
        ring.synced.clear()
        await store.sync(77)
        assert ring.synced == []
        assert kv.syncs == 4
    async with opened(tmp_path, kv) as (store, ring):
        await store.sync(77)
        assert sorted(ring.synced) == [*names, "4d"]


async def test_a_failed_sync_is_reported_and_everything_synced_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, ring):
        for index in range(2):
            await store.write(ChunkId(77, index), 0, b"x")
        await store.sync(77)
        await store.write(ChunkId(77, 1), 0, b"y")
        ring.sync_error = OSError(5, "Input/output error")
        for _ in range(2):
            with pytest.raises(StorageError):
                await store.sync(77)
        ring.sync_error = None
        ring.synced.clear()
        await store.sync(77)
        assert len(ring.synced) == 2


async def test_a_second_sync_does_not_overtake_the_first(tmp_path: Path) -> None:
    """The second caller's bytes may be in the hands of the first one's sync."""
    go_on = trio.Event()

    class Slow(SteeredRing):
        async def fsync(self, fd: int, *, data_only: bool) -> None:
            await go_on.wait()
            await super().fsync(fd, data_only=data_only)

    ring = Slow()
    ended: list[int] = []
    async with trio.open_nursery() as outer:
        store = DiskChunkStore(tmp_path, MemoryStore(), ring, outer)
        await store.write(CHUNK, 0, b"x")

        async def sync(number: int) -> None:
            await store.sync(77)
            ended.append(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync, 1)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(sync, 2)
            await trio.testing.wait_all_tasks_blocked()
            assert ended == []
            go_on.set()
    assert ended == [1, 2]
    await store.aclose()
    await ring.aclose()


# Space.


def taken(path: Path) -> int:
    """Return the bytes of space that a file takes on the disk, extents of the file system's own left out."""
    return path.stat().st_blocks * 512


async def test_space_is_really_reserved_and_freed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, _):
        assert await store.allocate(CHUNK, 0, 256 * BLOCK) == 256 * BLOCK
        (path,) = files(tmp_path)
        assert path.stat().st_size == 256 * BLOCK
        reserved = taken(path)
        assert 256 * BLOCK <= reserved < 260 * BLOCK
        await store.write(CHUNK, 0, b"x" * 256 * BLOCK)
        await store.sync(77)
        assert taken(path) - reserved < 4 * BLOCK
        assert await store.punch(CHUNK, 10 * BLOCK, 200 * BLOCK) == 200 * BLOCK
        assert taken(path) <= reserved - 196 * BLOCK
        assert path.stat().st_size == 256 * BLOCK
        assert await store.allocate(CHUNK, 0, 256 * BLOCK, zero=True) == 200 * BLOCK
        assert taken(path) >= 256 * BLOCK
        assert path.read_bytes() == bytes(256 * BLOCK)


class Disk(NamedTuple):
    """Be a disk of ``size`` bytes, as statvfs(3) tells of one, that holds nothing but a directory's files."""

    directory: Path
    size: int

    def statvfs(self, path: object) -> os.statvfs_result:
        free = (self.size - sum(taken(file) for file in files(self.directory))) // BLOCK
        return os.statvfs_result((BLOCK, BLOCK, self.size // BLOCK, free, free, 0, 0, 0, 0, 255))


async def test_a_reservation_does_not_take_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", Disk(tmp_path, 2000 * BLOCK).statvfs)
    async with opened(tmp_path, reserve=(2000 - 64) * BLOCK) as (store, _):
        with pytest.raises(NoSpace):
            await store.allocate(CHUNK, 0, 1024 * BLOCK)
        assert await content(store) == b"" and not files(tmp_path)


@pytest.mark.parametrize("call", ["write", "allocate", "both"])
async def test_writes_under_way_never_take_more_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    ended: list[int] = []

    async def one(store: DiskChunkStore, number: int) -> None:
        with suppress(NoSpace):
            if call == "write" or (call == "both" and number % 2):
                ended.append(await store.write(ChunkId(number, 0), 0, bytes(256 * BLOCK)))
            else:
                ended.append(await store.allocate(ChunkId(number, 0), 0, 256 * BLOCK))

    monkeypatch.setattr(os, "statvfs", Disk(tmp_path, 2000 * BLOCK).statvfs)
    room = 3 * (256 + 2)  # what is held for a write is rounded up at both ends
    async with opened(tmp_path, reserve=(2000 - room) * BLOCK) as (store, ring):
        ring.hold = ring.hold_allocate = trio.Event()
        async with trio.open_nursery() as nursery:
            for number in range(24):
                nursery.start_soon(one, store, number)
            await trio.testing.wait_all_tasks_blocked()
            ring.hold.set()
        assert ended == [256 * BLOCK] * 3
        assert len(files(tmp_path)) == 3
        assert await store.write(ChunkId(24, 0), 0, bytes(6 * BLOCK)) == 6 * BLOCK
        with pytest.raises(NoSpace):
            await store.write(ChunkId(25, 0), 0, b"x")


async def test_space_that_a_write_did_not_take_is_there_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, 1000 * BLOCK)
    monkeypatch.setattr(os, "statvfs", disk.statvfs)
    async with opened(tmp_path, reserve=900 * BLOCK) as (store, ring):
        ring.write_error = OSError(errno.EIO, os.strerror(errno.EIO))
        for _ in range(3):
            with pytest.raises(StorageError):
                await store.write(CHUNK, 0, bytes(90 * BLOCK))
        ring.write_error = None
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.write(CHUNK, 0, bytes(90 * BLOCK))
        for _ in range(3):  # what is there already needs nothing
            await store.write(CHUNK, 0, bytes(90 * BLOCK))
        assert await store.write(CHUNK, 90 * BLOCK, bytes(10 * BLOCK)) == 10 * BLOCK
        monkeypatch.setattr(os, "statvfs", disk._replace(size=1010 * BLOCK).statvfs)
        assert await store.allocate(ChunkId(78, 0), 0, 10 * BLOCK) == 10 * BLOCK


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP, errno.EIO])
async def test_an_allocation_that_fails_gives_back_what_it_got(tmp_path: Path, number: int) -> None:
    kinds = {
        errno.ENOSPC: NoSpace,
        errno.EDQUOT: QuotaExceeded,
        errno.EOPNOTSUPP: NotSupported,
        errno.EIO: StorageError,
    }
    async with opened(tmp_path) as (store, ring):
        await store.write(CHUNK, 0, b"x" * 2 * BLOCK)
        await store.write(CHUNK, 100 * BLOCK, b"y" * BLOCK)
        await store.sync(77)
        (path,) = files(tmp_path)
        before = taken(path)
        ring.allocate_error = OSError(number, os.strerror(number))
        with pytest.raises(kinds[number]):
            await store.allocate(CHUNK, 0, 180 * BLOCK)
        with pytest.raises(kinds[number]):
            await store.allocate(CHUNK, 100 * BLOCK, 400 * BLOCK)
        ring.allocate_error = None
        expected = b"x" * 2 * BLOCK + bytes(98 * BLOCK) + b"y" * BLOCK
        assert await content(store, length=200 * BLOCK) == expected
        assert path.stat().st_size == 101 * BLOCK
        assert taken(path) - before < 4 * BLOCK
        assert await store.trim(77, 3, 0) == (3 * BLOCK, 0)


async def test_a_failed_hole_frees_nothing(tmp_path: Path) -> None:
    class Failing(SteeredRing):
        async def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "not here")

    ring = Failing()
    async with trio.open_nursery() as nursery:
        store = DiskChunkStore(tmp_path, MemoryStore(), ring, nursery)
        await store.write(CHUNK, 0, b"x" * 2 * BLOCK)
        with pytest.raises(NotSupported):
            await store.punch(CHUNK, 0, BLOCK)
        with pytest.raises(NotSupported):
            await store.allocate(CHUNK, 0, BLOCK, zero=True)
        assert await content(store) == b"x" * 2 * BLOCK
        assert (await store.map(77, 0, 0, 9, 9)).ranges == (DataRange(3, 0, 2 * BLOCK),)
        nursery.cancel_scope.cancel()
    await store.aclose()
    await ring.aclose()


@pytest.mark.parametrize("change", ["allocate", "zero", "punch", "give back"])
async def test_a_change_of_space_has_the_chunk_alone(tmp_path: Path, change: str) -> None:
    """Writes and trims wait for it, it waits for writes; reads and drops go on; a drop in the middle comes last."""
    async with opened(tmp_path) as (store, ring):
        await store.write(CHUNK, 0, b"x" * 2 * BLOCK)

        async def alter() -> None:
            if change in ("allocate", "zero"):
                await store.allocate(CHUNK, 0, 3 * BLOCK, zero=change == "zero")
            else:
                await store.punch(CHUNK, 0, 2 * BLOCK, zeros_only=change == "give back")

        if change == "give back":
            await store.allocate(CHUNK, 0, 2 * BLOCK, zero=True)
        hold = ring.hold_allocate = trio.Event()
        done: list[str] = []

        async def note(name: str, call: Callable[[], Awaitable[object]]) -> None:
            await call()
            done.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(note, "alter", alter)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(note, "write", partial(store.write, CHUNK, BLOCK, b"new"))
            await trio.testing.wait_all_tasks_blocked()
            assert len(await content(store)) == 2 * BLOCK
            assert done == []
            hold.set()
        assert done == ["alter", "write"]
        assert (await content(store))[BLOCK : BLOCK + 3] == b"new"
        hold = ring.hold_allocate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alter)
            await trio.testing.wait_all_tasks_blocked()
            await store.drop([77])
            hold.set()
        assert await content(store) == b"" and (await store.map(77, 0, 0, 9, 9)).ranges == ()


# Bounds and paths.


async def test_open_files_are_bounded(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, _):
        for index in range(FILES_OPEN_MAX + 50):
            await store.write(ChunkId(77, index), 0, b"%d" % index)
        assert store.statistics().files_open == FILES_OPEN_MAX
        for index in range(FILES_OPEN_MAX + 50):
            assert await content(store, ChunkId(77, index)) == b"%d" % index
        assert store.statistics().files_open == FILES_OPEN_MAX
        await store.drop([77])
        assert store.statistics().files_open == 0


async def test_a_file_in_use_is_not_closed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (store, ring):
        hold = ring.hold = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.write, CHUNK, 0, b"slow")
            await trio.testing.wait_all_tasks_blocked()
            ring.hold = None
            for index in range(FILES_OPEN_MAX + 50):
                await store.write(ChunkId(78, index), 0, b"x")
            hold.set()
        assert await content(store) == b"slow"


async def test_small_operations_take_the_path_that_the_probe_chose(tmp_path: Path) -> None:
    probe = ProbeResult("ext4", False, True, 50.0, 3.0, 3.0, 1.0)
    assert DiskChunkStore.plain_paths(probe) == {"plain_reads": False, "plain_writes": True}
    for plain in (False, True):
        async with opened(tmp_path / str(plain), plain=plain) as (store, _):
            for length in (BLOCK, PLAIN_LENGTH_MAX, PLAIN_LENGTH_MAX + 1):
                await store.write(CHUNK, 0, os.urandom(length))
                assert len(await content(store, length=length)) == length
            statistics = store.statistics()
            assert (statistics.plain_writes, statistics.uring_writes) == ((2, 1) if plain else (0, 3))
            assert (statistics.plain_reads, statistics.uring_reads) == ((2, 1) if plain else (0, 3))


async def test_an_overwrite_does_not_touch_the_table(tmp_path: Path) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as (store, _):
        await store.write(CHUNK, 0, bytes(10 * BLOCK))
        assert kv.writes == 2
        for number in range(10):
            await store.write(CHUNK, number * BLOCK, b"x" * BLOCK)
        assert kv.writes == 2
