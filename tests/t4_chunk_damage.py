"""A chunk file that is missing, short, foreign or unusable is EIO, never zeros and never another file's bytes.

First the store on a real disk, then a real mount: what the reader gets, and what the daemon's log says.
"""

import errno
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from cluster import Cluster, running_cluster
from trio.testing import wait_all_tasks_blocked

from benchfs_fuse.chunks.disk import DiskChunkStore
from benchfs_fuse.chunks.uring import Ring
from benchfs_fuse.errors import StorageError
from benchfs_fuse.kv.memory import MemoryStore
from benchfs_fuse.limits import CHUNK_SIZE_MIN
from benchfs_fuse.model import ChunkId

BLOCK = 4096
LENGTH = 3 * BLOCK
CHUNK = ChunkId(77, 3)
OTHER = ChunkId(77, 4)


def _missing(file: Path, other: Path) -> None:
    file.unlink()


def _empty(file: Path, other: Path) -> None:
    os.truncate(file, 0)


def _short(file: Path, other: Path) -> None:
    os.truncate(file, LENGTH - 1)


def _other_moved_here(file: Path, other: Path) -> None:
    other.rename(file)


def _other_linked_here(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(other)


def _copy_of_other(file: Path, other: Path) -> None:
    file.unlink()
    shutil.copy(other, file)


def _a_strangers_file(file: Path, other: Path) -> None:
    file.unlink()
    file.write_bytes(b"?" * 2 * LENGTH)


def _directory(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


def _full_directory(file: Path, other: Path) -> None:
    _directory(file, other)
    (file / "x").write_bytes(b"x")


def _fifo(file: Path, other: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _loop(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(file)


#: Every way to damage the file of CHUNK, and what the error says of it.
DAMAGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "missing": (_missing, "No such file"),
    "empty": (_empty, "has 0 bytes, its record says 12288"),
    "one byte short": (_short, "has 12287 bytes, its record says 12288"),
    "another chunk's file moved there": (_other_moved_here, "file of another chunk"),
    "a link to another chunk's file": (_other_linked_here, "file of another chunk"),
    "a copy of another chunk's file": (_copy_of_other, "carries no mark"),
    "a stranger's longer file": (_a_strangers_file, "carries no mark"),
    "an empty directory": (_directory, "Is a directory"),
    "a directory": (_full_directory, "Is a directory"),
    "a FIFO": (_fifo, "no regular file"),
    "a link to itself": (_loop, "Too many levels"),
}
#: Those that leave a part of it.
SHORT = ("empty", "one byte short")
WHOLE = [name for name in DAMAGES if name not in SHORT]
damages = pytest.mark.parametrize("damage", DAMAGES, ids=[name.replace(" ", "-") for name in DAMAGES])
whole_damages = pytest.mark.parametrize("damage", WHOLE, ids=[name.replace(" ", "-") for name in WHOLE])


@asynccontextmanager
async def opened(
    directory: Path, kv: MemoryStore, *, plain: bool = False, lost_power: bool = False
) -> AsyncIterator[DiskChunkStore]:
    ring = Ring()
    async with trio.open_nursery() as nursery:
        store = DiskChunkStore(
            directory,
            kv,
            ring,
            nursery,
            plain_reads=plain,
            plain_writes=plain,
            reserve=0,
            lost_power=lost_power,
            name="daemon 5",
        )
        yield store
        nursery.cancel_scope.cancel()
    await store.aclose()
    await ring.aclose()


def path_of(directory: Path, chunk: ChunkId = CHUNK) -> Path:
    (path,) = (directory / "chunks").rglob(f"{chunk.ino:016x}.{chunk.index:08x}.*")
    return path


async def removed(store: DiskChunkStore) -> None:
    """Wait until the background has tried to remove everything that was dropped."""
    with trio.fail_after(10):
        while store.to_remove:
            await wait_all_tasks_blocked(0.001)


async def content(store: DiskChunkStore, chunk: ChunkId = CHUNK) -> bytes:
    into = bytearray(b"\xaa" * 2 * LENGTH)
    return bytes(into[: await store.read(chunk, 0, memoryview(into))])


async def make(store: DiskChunkStore) -> None:
    """Make two chunks with a hole in each."""
    for chunk, letter in ((CHUNK, b"a"), (OTHER, b"b")):
        await store.write(chunk, 0, letter * BLOCK)
        await store.write(chunk, 2 * BLOCK, letter * BLOCK)
        assert await content(store, chunk) == letter * BLOCK + bytes(BLOCK) + letter * BLOCK


@whole_damages
@pytest.mark.parametrize("plain", [False, True], ids=["uring", "plain"])
async def test_nothing_is_read_from_or_written_to_a_damaged_chunk(tmp_path: Path, damage: str, plain: bool) -> None:
    change, says = DAMAGES[damage]
    kv = MemoryStore()
    async with opened(tmp_path, kv, plain=plain) as store:
        await make(store)
    file = path_of(tmp_path)
    change(file, path_of(tmp_path, OTHER))
    expected = f"(?s)chunk 3 of inode 77 on daemon 5.*{says}"
    async with opened(tmp_path, kv, plain=plain) as store:
        for _ in range(2):  # the second time is like the first
            with pytest.raises(StorageError, match=expected) as raised:
                await content(store)
            assert str(file) in str(raised.value)
            for offset in (0, BLOCK, 5 * BLOCK):
                with pytest.raises(StorageError, match=expected):
                    await store.write(CHUNK, offset, b"x")
                with pytest.raises(StorageError, match=expected):
                    await store.allocate(CHUNK, offset, BLOCK)
            with pytest.raises(StorageError, match=expected):
                await store.punch(CHUNK, 0, BLOCK)
            with pytest.raises(StorageError, match=r"chunk . of inode 77 on daemon 5"):
                await store.sync(77)
        # What the table knows is untouched, and so is what lies beside it.
        assert [(one.index, one.offset, one.length) for one in (await store.map(77, 3, 0, 4, 9)).ranges] == [
            (3, 0, BLOCK),
            (3, 2 * BLOCK, BLOCK),
        ]
        into = bytearray(b"?" * BLOCK)
        assert await store.read(CHUNK, BLOCK, memoryview(into)) == BLOCK
        assert into == bytes(BLOCK), "a hole is zeros"
        if "moved" not in damage:
            assert await content(store, OTHER) == b"b" * BLOCK + bytes(BLOCK) + b"b" * BLOCK


@pytest.mark.parametrize("there", [0, 1, BLOCK + 5, LENGTH - 1])
@pytest.mark.parametrize("plain", [False, True], ids=["uring", "plain"])
async def test_what_is_there_of_a_short_chunk_is_good(tmp_path: Path, there: int, plain: bool) -> None:
    """A power cut takes what was not synced, and a chunk is synced up to somewhere."""
    whole = b"a" * BLOCK + bytes(BLOCK) + b"a" * BLOCK
    kv = MemoryStore()
    async with opened(tmp_path, kv, plain=plain) as store:
        await make(store)
    os.truncate(path_of(tmp_path), there)
    expected = f"(?s)chunk 3 of inode 77 on daemon 5.*has {there} bytes, its record says {LENGTH}"
    async with opened(tmp_path, kv, plain=plain) as store:
        into = bytearray(LENGTH)
        assert await store.read(CHUNK, 0, memoryview(into)[:there]) == there
        assert into[:there] == whole[:there]
        into[:BLOCK] = b"?" * BLOCK
        assert await store.read(CHUNK, BLOCK, memoryview(into)[:BLOCK]) == BLOCK
        assert into[:BLOCK] == bytes(BLOCK)  # the hole is one, whatever was lost
        for offset, length in ((0, LENGTH), (LENGTH - 1, 1)):
            with pytest.raises(StorageError, match=expected):
                await store.read(CHUNK, offset, memoryview(into)[:length])
        with pytest.raises(StorageError, match=expected):
            await store.allocate(CHUNK, 0, BLOCK)
        with pytest.raises(StorageError, match=expected):
            await store.write(CHUNK, LENGTH, b"x")
        with pytest.raises(StorageError, match=expected):
            await store.sync(77)
        await store.sync(77)  # it has been told
        await store.write(CHUNK, 0, b"b" * there)
        with pytest.raises(StorageError, match=expected):
            await content(store)
        await store.write(CHUNK, there, b"c" * (LENGTH - there))
        assert await content(store) == b"b" * there + b"c" * (LENGTH - there)
        await store.write(CHUNK, 5 * BLOCK, b"d")
        await store.sync(77)


async def test_the_block_in_which_a_file_ends_is_whole_after_a_power_cut(tmp_path: Path) -> None:
    """A log was synced to the middle of a block and written on: its pages are read as a whole."""
    kv = MemoryStore()
    async with opened(tmp_path, kv) as store:
        await store.write(CHUNK, 0, b"s" * (BLOCK + 100))
        await store.sync(77)
        await store.write(CHUNK, BLOCK + 100, b"u" * 2 * BLOCK)
    os.truncate(path_of(tmp_path), BLOCK + 100)
    async with opened(tmp_path, kv, lost_power=True) as store:
        into = bytearray(b"?" * 3 * BLOCK)
        assert await store.read(CHUNK, 0, memoryview(into)[: 2 * BLOCK]) == 2 * BLOCK
        assert into[: 2 * BLOCK] == b"s" * (BLOCK + 100) + bytes(BLOCK - 100)
        assert await store.read(CHUNK, BLOCK + 200, memoryview(into)[:100]) == 100
        assert into[:100] == bytes(100)
        for offset, length in ((0, 3 * BLOCK), (2 * BLOCK, 1), (2 * BLOCK + 50, 10)):
            with pytest.raises(StorageError, match="its record says"):
                await store.read(CHUNK, offset, memoryview(into)[:length])
        with pytest.raises(StorageError, match="its record says"):
            await store.write(CHUNK, 2 * BLOCK + 1, b"x")
        await store.write(CHUNK, BLOCK + 200, b"x" * BLOCK)
        assert await store.read(CHUNK, BLOCK, memoryview(into)[:300]) == 300
        assert into[:300] == b"s" * 100 + bytes(100) + b"x" * 100


@damages
async def test_a_damaged_chunk_can_be_dropped_and_made_again(tmp_path: Path, damage: str) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as store:
        await make(store)
    DAMAGES[damage][0](path_of(tmp_path), path_of(tmp_path, OTHER))
    async with opened(tmp_path, kv) as store:
        assert await store.drop([77]) == 4 * BLOCK
        await store.write(CHUNK, BLOCK, b"new")
        assert await content(store) == bytes(BLOCK) + b"new"


@pytest.mark.parametrize("cut", [1, BLOCK, LENGTH - 1])
@damages
async def test_a_damaged_chunk_can_be_cut_and_stays_damaged(tmp_path: Path, damage: str, cut: int) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as store:
        await make(store)
    DAMAGES[damage][0](path_of(tmp_path), path_of(tmp_path, OTHER))
    async with opened(tmp_path, kv) as store:
        await store.trim(77, 3, cut)
        if damage == "one byte short":  # nothing that is left of it was lost
            assert await content(store) == (b"a" * BLOCK + bytes(BLOCK) + b"a" * BLOCK)[:cut]
        else:
            with pytest.raises(StorageError):
                await content(store)
        assert await store.trim(77, 0, 0) == ((BLOCK if cut <= BLOCK else 2 * BLOCK), 0)
        assert await content(store) == b""


@pytest.mark.parametrize("length", [0, 1, LENGTH - 1])
async def test_a_file_that_is_cut_while_it_is_open_gets_no_zeros(tmp_path: Path, length: int) -> None:
    """The daemon keeps files open: whoever cuts one then is noticed at the next operation."""
    async with opened(tmp_path, MemoryStore()) as store:
        await make(store)
        os.truncate(path_of(tmp_path), length)
        for _ in range(2):
            for change in (
                store.write(CHUNK, LENGTH, b"x" * BLOCK),
                store.write(CHUNK, 5 * BLOCK, b"x"),
                store.allocate(CHUNK, 0, 5 * BLOCK),
            ):
                with pytest.raises(StorageError, match="its record says"):
                    await change
            with pytest.raises(StorageError, match="its record says"):
                await content(store)
        await store.trim(77, 3, 2 * BLOCK)  # makes the file no longer than it is
        if length < 2 * BLOCK:
            with pytest.raises(StorageError):
                await content(store)
        else:
            assert await content(store) == b"a" * BLOCK + bytes(BLOCK)


async def test_a_file_that_is_removed_while_it_is_open_fails_the_next_sync(tmp_path: Path) -> None:
    async with opened(tmp_path, MemoryStore()) as store:
        await make(store)
        await store.sync(77)
        path_of(tmp_path).unlink()
        await store.sync(77)  # nothing to do: the chunk has not changed
        await store.write(CHUNK, 0, b"x")
        with pytest.raises(StorageError, match=r"chunk 3 of inode 77 on daemon 5, .* is missing"):
            await store.sync(77)


async def test_a_longer_file_is_cut_to_its_record(tmp_path: Path) -> None:
    """It holds the bytes of a write that nobody acknowledged."""
    kv = MemoryStore()
    async with opened(tmp_path, kv) as store:
        await make(store)
    with path_of(tmp_path).open("ab") as file:
        file.write(b"?" * 10 * BLOCK)
    async with opened(tmp_path, kv) as store:
        assert await content(store) == b"a" * BLOCK + bytes(BLOCK) + b"a" * BLOCK
        await store.write(CHUNK, 4 * BLOCK, b"x")
        assert await content(store) == b"a" * BLOCK + bytes(BLOCK) + b"a" * BLOCK + bytes(BLOCK) + b"x"


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.EPERM])
async def test_a_file_that_cannot_be_opened_is_an_error(
    tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as store:
        await make(store)
    real = os.open

    def refuse(path: str, *more: int) -> int:
        if str(path).endswith(path_of(tmp_path).name):
            raise OSError(error, os.strerror(error))
        return real(path, *more)

    async with opened(tmp_path, kv) as store:
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(StorageError, match="chunk 3 of inode 77 on daemon 5"):
            await content(store)
        assert await content(store, OTHER) != b""
        monkeypatch.undo()
        assert await content(store) == b"a" * BLOCK + bytes(BLOCK) + b"a" * BLOCK


async def test_a_copy_of_the_directory_with_or_without_attributes_can_be_read(tmp_path: Path) -> None:
    """Who copies without them loses the recognition of strangers, not the data."""
    kv = MemoryStore()
    async with opened(tmp_path / "original", kv) as store:
        await make(store)
        assert store.marking.everywhere
    shutil.copytree(tmp_path / "original", tmp_path / "with")
    shutil.copytree(tmp_path / "original", tmp_path / "without", copy_function=shutil.copyfile)
    for number in (tmp_path / "without" / "chunks", *(tmp_path / "without" / "chunks").iterdir()):
        os.removexattr(number, "user.benchfs.birth") if os.listxattr(number) else None
    for name, everywhere in (("with", True), ("without", False)):
        async with opened(tmp_path / name, MemoryStore(kv.contents())) as store:
            assert store.marking.everywhere is everywhere
            assert await content(store) == b"a" * BLOCK + bytes(BLOCK) + b"a" * BLOCK
            await store.write(ChunkId(77, 9), 0, b"new")
        for one in (CHUNK, ChunkId(77, 9)):
            path_of(tmp_path / name, OTHER).exists()
            assert os.listxattr(path_of(tmp_path / name, one)) == (
                ["user.benchfs.birth"] if everywhere or one.index == 9 else []
            )


async def test_one_file_that_cannot_be_removed_holds_no_other_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kv = MemoryStore()
    async with opened(tmp_path, kv) as store:
        await make(store)
    _full_directory(path_of(tmp_path), path_of(tmp_path, OTHER))
    async with opened(tmp_path, kv) as store:
        await store.drop([77])
        await removed(store)
        assert [path.name.split(".")[1] for path in (tmp_path / "chunks").glob("*/*")] == ["00000003"]
        assert [piece.chunk for piece in store.table.garbage(9)] == [CHUNK]
        assert "cannot remove dropped chunk files" in caplog.text
        # It stays on the list, behind which things go on.
        await store.write(OTHER, 0, b"x")
        await store.drop([77])
        await removed(store)
        assert [piece.chunk for piece in store.table.garbage(9)] == [CHUNK]
    shutil.rmtree(path_of(tmp_path))
    async with opened(tmp_path, kv) as store:
        await removed(store)
        assert store.table.garbage(9) == []


# ── through a mount ──────────────────────────────────────────────────────────────────────────────────────────────────

SIZE = 8 * CHUNK_SIZE_MIN
EIO = os.strerror(errno.EIO)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(chunk_size=CHUNK_SIZE_MIN) as cluster:
        yield cluster


def restart(cluster: Cluster, change: Callable[[], None]) -> None:
    """Stop the daemons, do something to their disks, start them again."""
    for mount in cluster.mounts:
        mount.stop()
    for daemon in cluster.daemons:
        daemon.stop()
    change()
    for number in range(len(cluster.daemons)):
        cluster.restart_daemon(number)


def chunk_file(cluster: Cluster, ino: int, index: int) -> tuple[int, Path]:
    """Find the daemon and the file of a chunk."""
    (found,) = [
        (number, path)
        for number in range(2)
        for path in (cluster.data_dir(number) / "chunks").rglob(f"{ino:016x}.{index:08x}.*")
    ]
    return found


def pattern(letter: str) -> bytes:
    return b"".join(f"{letter}{at:07}".encode() for at in range(SIZE // 8))


class Damaged(NamedTuple):
    """Say what was done to chunk 2 of a file, and where that lies."""

    damage: str
    ino: int
    daemon: int
    file: Path


def test_a_reader_gets_eio_and_the_log_says_where(cluster: Cluster) -> None:
    mount = cluster.mount().mountpoint
    todo = []
    for damage in DAMAGES:
        (mount / damage).write_bytes(pattern("a"))
        (mount / f"beside {damage}").write_bytes(pattern("b"))
        ino, other_ino = (mount / damage).stat().st_ino, (mount / f"beside {damage}").stat().st_ino
        daemon, file = chunk_file(cluster, ino, 2)
        _, other = next(found for index in range(8) if (found := chunk_file(cluster, other_ino, index))[0] == daemon)
        todo.append((Damaged(damage, ino, daemon, file), other))

    def damage_all() -> None:
        for one, other in todo:
            if "short" in one.damage:
                os.truncate(one.file, CHUNK_SIZE_MIN - 1)
            else:
                DAMAGES[one.damage][0](one.file, other)

    restart(cluster, damage_all)
    mount = cluster.mount().mountpoint
    start = 2 * CHUNK_SIZE_MIN
    for one, _ in todo:
        with (mount / one.damage).open("rb", buffering=0) as reader:
            for _ in range(2):
                with pytest.raises(OSError, match=EIO):
                    os.pread(reader.fileno(), BLOCK, start + CHUNK_SIZE_MIN - BLOCK)
            # Everything else of the file is there.
            assert os.pread(reader.fileno(), BLOCK, start - BLOCK) == pattern("a")[start - BLOCK : start]
            assert os.pread(reader.fileno(), SIZE, start + CHUNK_SIZE_MIN) == pattern("a")[start + CHUNK_SIZE_MIN :]
        daemon_id = json.loads((cluster.data_dir(one.daemon) / "identity.json").read_text())["daemon_id"]
        said = cluster.daemons[one.daemon].log.read_text()
        assert said.count(f"storage failed: chunk 2 of inode {one.ino} on daemon {daemon_id}") == 1  # it was read twice
        assert str(one.file) in said
        # What the log names can be found, and removed.
        assert [path.name for path in mount.iterdir() if path.stat().st_ino == one.ino] == [one.damage]
        (mount / one.damage).unlink()
        assert not (mount / one.damage).exists()


def test_a_writer_gets_eio_and_holes_stay_zeros(cluster: Cluster) -> None:
    mount = cluster.mount().mountpoint
    with (mount / "sparse").open("wb") as writer:
        os.pwrite(writer.fileno(), b"x" * BLOCK, 2 * CHUNK_SIZE_MIN)
        os.truncate(writer.fileno(), SIZE)
    ino = (mount / "sparse").stat().st_ino
    _, file = chunk_file(cluster, ino, 2)
    restart(cluster, file.unlink)
    mount = cluster.mount().mountpoint
    with (mount / "sparse").open("r+b", buffering=0) as both:
        assert os.pread(both.fileno(), 2 * CHUNK_SIZE_MIN, 0) == bytes(2 * CHUNK_SIZE_MIN)
        assert os.pread(both.fileno(), SIZE, 3 * CHUNK_SIZE_MIN) == bytes(SIZE - 3 * CHUNK_SIZE_MIN)
        os.pwrite(both.fileno(), b"y", 2 * CHUNK_SIZE_MIN + 1)
        with pytest.raises(OSError, match=EIO):
            os.fsync(both.fileno())
    # Cut off, the damage is gone, and what comes there starts from zeros.
    os.truncate(mount / "sparse", 2 * CHUNK_SIZE_MIN)
    os.truncate(mount / "sparse", SIZE)
    assert (mount / "sparse").read_bytes() == bytes(SIZE)
