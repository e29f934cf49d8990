"""Keep chunks as files in a data directory, one file per chunk, known by the chunk table.

    chunks/<ino & 0xff>/<ino>.<index>.<birth>      all in hexadecimal

``birth`` is a random number that a chunk gets when it is made and keeps in its record. So a chunk that is dropped and
made again has another file: removing the old one may take its time and can never touch the newer chunk, nor can old
bytes come back.

Order of events, so that ``kill -9`` at any point leaves the table right:

    making    record (length 0), file
    writing   data, record if it changes, acknowledgement. A longer file than its record says holds the bytes of a write
              that nobody acknowledged: they are cut off when the file is next opened, or used after a failed write.
    trimming  record, file: a crash between leaves a file that is too long, see above
    dropping  record becomes garbage in one transaction; later, in the background: store synced, files unlinked in a
              thread, garbage forgotten

A file that is missing or shorter than its record says is a StorageError, never zeros. After a power cut that may
happen to chunks that were changed and not synced.

One chunk's operations: reads and writes run side by side. A trim of the chunk waits until no write to it is under way,
and holds new ones back; then it works without yielding. A drop waits for nothing: a write that was under way counts as
done before it. ``Record`` and file size are changed only in stretches without ``await``.
"""

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import trio

from ..errors import FsError, NoSpace, StorageError, UserError, from_disk
from ..limits import MIB
from ..model import ChunkId, DiskUsage
from ..ports import Buffer, KeyValueStore, Trimmed
from .table import ChunkTable, Record
from .uring import PLAIN_LENGTH_MAX, ProbeResult, Ring

log = logging.getLogger(__name__)

#: Chunk files kept open: opening one costs 5 to 10 µs. A quarter of the usual limit on open files of a process (1,024).
FILES_OPEN_MAX = 256
#: Directories under ``chunks``: 200,000 files make 800 entries each.
DIRECTORIES = 256
#: Chunks dropped, summed up or removed at one go: a few milliseconds without a look at anything else.
PAGE_MAX = 256
#: Files whose unsynced chunks are known one by one. Of others, all chunks are synced.
SYNC_TRACKED_MAX = 4096
#: Unsynced chunks of one file that are known one by one: 16 GiB in chunks of the default size.
SYNC_CHUNKS_MAX = 4096
#: Chunk files of one ``sync`` that are at the disk at once.
SYNC_TASKS_MAX = 16
#: Space that data never takes, so that the metadata store can always write, removals above all: eight memtables.
RESERVE_MAX = 64 * MIB
#: On a small file system the reserve is this part of it.
RESERVE_PART = 32
#: Look at the free space again after so many bytes: what others take meanwhile goes unseen for so long.
SPACE_STEP = 16 * MIB


class DiskStatistics(NamedTuple):
    """Count reads and writes by the way they went, and what is open."""

    uring_reads: int
    uring_writes: int
    plain_reads: int
    plain_writes: int
    files_open: int


class _File:
    """Hold one open chunk file with its record and who is using it."""

    __slots__ = ("barrier", "chunk", "fd", "gone", "idle", "record", "torn", "users", "writers")

    def __init__(self, chunk: ChunkId, record: Record, fd: int) -> None:
        self.chunk = chunk
        self.record = record
        self.fd = fd
        #: Operations that need ``fd``; those of them that write.
        self.users = 0
        self.writers = 0
        #: The chunk was dropped; the file is closed by its last user.
        self.gone = False
        #: A write failed: the file may be longer than its record.
        self.torn = False
        #: Set when the trim under way has ended; None if there is none.
        self.barrier: trio.Event | None = None
        #: Set when no write is under way any more; None if nobody waits for that.
        self.idle: trio.Event | None = None


class DiskChunkStore:
    """Implement ChunkStore on a directory, a key-value store and a ring."""

    def __init__(
        self,
        directory: Path,
        store: KeyValueStore,
        ring: Ring,
        nursery: trio.Nursery,
        *,
        plain_reads: bool = False,
        plain_writes: bool = False,
        reserve: int | None = None,
    ) -> None:
        """Open the chunks under ``directory``, make what is missing; raise UserError if that cannot be.

        ``nursery`` runs the removal of files; being cancelled there loses nothing. ``plain_reads`` and ``plain_writes``
        let small operations go around the ring (``plain_paths``). ``reserve`` overrides the space kept free, in bytes.
        Existing chunks are adopted without looking at them; what an earlier run left to be removed is removed.
        """
        self._directory = str(directory / "chunks")
        self._store = store
        self._ring = ring
        self._nursery = nursery
        self._plain_reads = plain_reads
        self._plain_writes = plain_writes
        self._uring_read_count = self._uring_write_count = self._plain_read_count = self._plain_write_count = 0
        self._files: OrderedDict[ChunkId, _File] = OrderedDict()
        self._table = ChunkTable(store)
        #: Chunks written since their last sync, of files that are tracked; see ``sync``.
        self._unsynced: OrderedDict[int, set[int]] = OrderedDict()
        self._sync_locks: WeakValueDictionary[int, trio.Lock] = WeakValueDictionary()
        #: Files made in each directory, and how many of them had been made when it was last synced. At start, nobody
        #: knows: one more than synced.
        self._entries_made = [1] * DIRECTORIES
        self._entries_synced = [0] * DIRECTORIES
        self._removing = False
        try:
            for number in range(DIRECTORIES):
                os.makedirs(f"{self._directory}/{number:02x}", exist_ok=True)
            for path in (self._directory, str(directory)):
                _fsync_directory(path)
            self._filesystem = f"{_boot_id()}:{directory.stat().st_dev}"
            space = os.statvfs(self._directory)
        except OSError as error:
            raise UserError(f"Cannot use the data directory {directory}: {error}.") from error
        self._reserve = (
            min(RESERVE_MAX, space.f_blocks * space.f_frsize // RESERVE_PART) if reserve is None else reserve
        )
        #: Bytes that may be allocated before the free space is looked at again.
        self._space = 0
        if self._table.leftovers:
            log.info("%d dropped chunk files of an earlier run are being removed", self._table.leftovers)
            self._start_removing()

    @staticmethod
    def plain_paths(probe: ProbeResult) -> dict[str, bool]:
        """Return the keyword arguments that let small operations be plain calls where io_uring hands them over."""
        return {"plain_reads": not probe.buffered_read_inline, "plain_writes": not probe.buffered_write_inline}

    def statistics(self) -> DiskStatistics:
        """Return the counters."""
        return DiskStatistics(
            self._uring_read_count,
            self._uring_write_count,
            self._plain_read_count,
            self._plain_write_count,
            len(self._files),
        )

    async def read(self, chunk: ChunkId, offset: int, into: memoryview) -> int:
        """Read into the caller's buffer; return how many bytes from ``offset`` on exist."""
        file = self._lookup(chunk)
        if file is None:
            return 0
        wanted = min(len(into), file.record.length - offset)
        if wanted <= 0:
            return 0
        file.users += 1
        try:
            if self._plain_reads and wanted <= PLAIN_LENGTH_MAX:
                self._plain_read_count += 1
                count = os.preadv(file.fd, [into[:wanted]], offset)
            else:
                self._uring_read_count += 1
                count = await self._ring.read(file.fd, into[:wanted], offset)
        except OSError as error:
            raise from_disk(error, f"chunk {chunk}") from error
        finally:
            self._release(file)
        if count == wanted:
            return count
        # It may have been trimmed meanwhile.
        left = max(0, min(wanted, file.record.length - offset))
        if count < left:
            raise StorageError(f"chunk {chunk}: file ends at {offset + count}, its record at {file.record.length}")
        return left

    async def write(self, chunk: ChunkId, offset: int, data: Buffer) -> int:
        """Write all of ``data``; return by how many bytes the chunk's allocated space grew.

        Cancelled before it begins or not at all.
        """
        length = len(data)
        if not length:
            return 0
        while True:
            file = self._lookup(chunk)
            if file is None or file.barrier is None:
                break
            await file.barrier.wait()
        self._check_space(Record(0) if file is None else file.record, offset, length)
        if file is None:
            file = self._make(chunk)
        file.users += 1
        file.writers += 1
        try:
            if self._plain_writes and length <= PLAIN_LENGTH_MAX:
                self._plain_write_count += 1
                _write_all(file.fd, data, offset)
            else:
                self._uring_write_count += 1
                await self._ring.write(file.fd, data, offset)
            # No await from here on: the record must not change between its reading and its writing.
            if file.gone:
                return 0
            record = file.record.with_write(offset, length)
            grown = record.allocated - file.record.allocated
            if record is not file.record:
                self._table.put(chunk, record)
                file.record = record
                self._space -= grown
            unsynced = self._unsynced.get(chunk.ino)
            if unsynced is not None:
                unsynced.add(chunk.index)
                if len(unsynced) > SYNC_CHUNKS_MAX:
                    del self._unsynced[chunk.ino]
            return grown
        except BaseException as error:
            file.torn = True
            if isinstance(error, OSError):
                raise from_disk(error, f"chunk {chunk}") from error
            raise
        finally:
            file.writers -= 1
            if not file.writers and file.idle is not None:
                file.idle.set()
            self._release(file)

    async def trim(self, ino: int, index: int, offset: int) -> Trimmed:
        """Drop of file ``ino`` everything at and behind byte ``offset`` of chunk ``index``."""
        freed = await self._shorten(ChunkId(ino, index), offset) if offset else 0
        dropped = await self._drop_from(ino, index + 1 if offset else index)
        left = index = 0
        while page := self._table.page(ino, index, PAGE_MAX):
            left += sum(record.allocated for _, record in page)
            index = page[-1][0] + 1
            if len(page) < PAGE_MAX:
                break
            await trio.lowlevel.checkpoint()
        return Trimmed(freed + dropped, left)

    async def drop(self, inos: Sequence[int]) -> int:
        """Drop all chunks of these files; return the bytes freed, which the disk has back a little later."""
        return sum([await self._drop_from(ino, 0) for ino in inos])

    async def sync(self, ino: int) -> None:
        """Bring everything written to ``ino`` so far to stable storage.

        Which chunks need it is known of files that were synced since the start and not too long ago; of others, all
        count as written. A failure is raised by the sync that meets it, and all chunks of the file count as written
        again. The kernel reports a failed write-back once; the bytes are lost.
        """
        lock = self._sync_locks.get(ino)
        if lock is None:
            lock = self._sync_locks[ino] = trio.Lock()
        async with lock:
            known = self._unsynced.pop(ino, None)
            self._unsynced[ino] = set()
            try:
                await self._sync_chunks(ino, known)
            except BaseException:
                self._unsynced.pop(ino, None)
                raise
            while len(self._unsynced) > SYNC_TRACKED_MAX:
                self._unsynced.popitem(last=False)

    async def usage(self) -> list[DiskUsage]:
        """Return the space of the file system under the data directory. The reserve counts as not available."""
        await trio.lowlevel.checkpoint()
        try:
            space = os.statvfs(self._directory)
        except OSError as error:
            raise from_disk(error, self._directory) from error
        unit = space.f_frsize
        available = max(0, space.f_bavail * unit - self._reserve)
        return [
            DiskUsage(
                self._filesystem, space.f_blocks * unit, space.f_bfree * unit, available, space.f_files, space.f_ffree
            )
        ]

    async def aclose(self) -> None:
        """Close all files. Nothing may be under way; garbage that is left is removed by the next start."""
        for file in self._files.values():
            assert not file.users
            os.close(file.fd)
        self._files.clear()
        await trio.lowlevel.checkpoint()

    def _path(self, chunk: ChunkId, birth: int) -> str:
        return f"{self._directory}/{chunk.ino % DIRECTORIES:02x}/{chunk.ino:016x}.{chunk.index:08x}.{birth:016x}"

    def _lookup(self, chunk: ChunkId) -> _File | None:
        """Return a chunk's open file, None if there is no such chunk; cut it if it is too long.

        It stays open until the next await, and longer only for its users.
        """
        file = self._files.get(chunk)
        if file is not None:
            self._files.move_to_end(chunk)
            if file.torn and not file.writers:
                self._cut(file)
            return file
        record = self._table.get(chunk)
        return None if record is None else self._open(chunk, record)

    def _make(self, chunk: ChunkId) -> _File:
        """Make a chunk that has no record. A crash before its file is there leaves a record of length 0, which may."""
        record = Record(int.from_bytes(os.urandom(8)))
        self._table.put(chunk, record)
        return self._open(chunk, record)

    def _open(self, chunk: ChunkId, record: Record) -> _File:
        path = self._path(chunk, record.birth)
        flags = os.O_RDWR
        if record.length == 0:
            flags |= os.O_CREAT
            self._entries_made[chunk.ino % DIRECTORIES] += 1
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise from_disk(error, f"chunk {chunk}") from error
        file = _File(chunk, record, fd)
        try:
            size = os.fstat(fd).st_size
            if size < record.length:
                raise StorageError(f"{path} has {size} bytes, its record says {record.length}")
            if size > record.length:
                self._cut(file)
        except BaseException:
            os.close(fd)
            raise
        self._files[chunk] = file
        self._close_oldest()
        return file

    def _close_oldest(self) -> None:
        """Keep the bound on open files, as far as they are not in use."""
        if len(self._files) <= FILES_OPEN_MAX:
            return
        newest = next(reversed(self._files))
        for chunk, file in self._files.items():
            if not file.users and chunk != newest:
                os.close(file.fd)
                del self._files[chunk]
                return

    def _release(self, file: _File) -> None:
        file.users -= 1
        if file.gone and not file.users:
            os.close(file.fd)

    def _cut(self, file: _File) -> None:
        """Make a file as long as its record in the table says. If that fails, ``_lookup`` tries again."""
        file.torn = True  # until it has succeeded
        record = self._table.get(file.chunk)
        if record is None:
            return
        file.record = record
        try:
            os.ftruncate(file.fd, record.length)
        except OSError as error:
            raise from_disk(error, f"chunk {file.chunk}") from error
        file.torn = False

    def _check_space(self, record: Record, offset: int, length: int) -> None:
        """Raise NoSpace if a write would allocate out of the reserve."""
        if length + 2 * record.granule <= self._space:
            return
        grown = record.with_write(offset, length).allocated - record.allocated
        if grown <= max(0, self._space):
            return
        space = os.statvfs(self._directory)
        free = space.f_bavail * space.f_frsize - self._reserve
        if grown > free:
            raise NoSpace(f"{free} bytes free above the reserve of {self._reserve}, {grown} needed")
        self._space = max(grown, min(free, SPACE_STEP))

    async def _shorten(self, chunk: ChunkId, offset: int) -> int:
        """Cut one chunk off at ``offset`` > 0; return the bytes freed."""
        while True:
            record = self._table.get(chunk)
            if record is None or record.length <= offset:
                return 0
            file = self._lookup(chunk)
            assert file is not None
            if file.barrier is None:
                break
            await file.barrier.wait()
        barrier = file.barrier = trio.Event()
        file.users += 1
        try:
            while file.writers:
                file.idle = trio.Event()
                await file.idle.wait()
            # No await from here on.
            if file.gone or file.record.length <= offset:
                return 0
            record = file.record.cut(offset)
            freed = file.record.allocated - record.allocated
            self._table.put(chunk, record)
            self._cut(file)
            return freed
        finally:
            file.idle = file.barrier = None
            barrier.set()
            self._release(file)

    async def _drop_from(self, ino: int, index: int) -> int:
        """Drop the chunks of a file from ``index`` on; return the bytes freed."""
        freed = 0
        while page := self._table.page(ino, index, PAGE_MAX):
            self._table.bury(ino, page)
            for index, record in page:
                freed += record.allocated
                file = self._files.pop(ChunkId(ino, index), None)
                if file is not None:
                    file.gone = True
                    if not file.users:
                        os.close(file.fd)
            self._start_removing()
            if len(page) < PAGE_MAX:
                break
            index += 1
            await trio.lowlevel.checkpoint()
        return freed

    def _start_removing(self) -> None:
        if not self._removing:
            self._removing = True
            self._nursery.start_soon(self._remove_garbage)

    async def _remove_garbage(self) -> None:
        """Remove the files of dropped chunks until none is left.

        The store is synced first: no power cut brings a record back whose file is gone. What fails stays on the list
        for the next drop or the next start.
        """
        try:
            while garbage := self._table.garbage(PAGE_MAX):
                await self._store.sync()
                paths = [self._path(piece.chunk, piece.birth) for piece in garbage]
                await trio.to_thread.run_sync(_unlink_all, paths)
                self._table.forget(garbage)
        except (OSError, FsError) as error:
            log.warning("cannot remove dropped chunk files: %s", error)
        finally:
            self._removing = False

    async def _sync_chunks(self, ino: int, known: set[int] | None) -> None:
        """Sync the chunks ``known`` to have been written, or all, with their directory and the table, side by side."""
        indexes = self._all_indexes(ino) if known is None else list(known)
        errors: list[FsError] = []

        async def collect(step: Callable[[], Awaitable[None]]) -> None:
            try:
                await step()
            except FsError as error:
                errors.append(error)

        async def some_chunks() -> None:
            while indexes:
                await self._sync_chunk(ChunkId(ino, indexes.pop()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, self._store.sync)
            if self._entries_synced[ino % DIRECTORIES] < self._entries_made[ino % DIRECTORIES]:
                nursery.start_soon(collect, partial(self._sync_directory, ino % DIRECTORIES))
            for _ in range(min(SYNC_TASKS_MAX, len(indexes))):
                nursery.start_soon(collect, some_chunks)
        if errors:
            raise errors[0]

    def _all_indexes(self, ino: int) -> list[int]:
        found: list[int] = []
        while page := self._table.page(ino, found[-1] + 1 if found else 0, PAGE_MAX):
            found += (index for index, _ in page)
            if len(page) < PAGE_MAX:
                break
        return found

    async def _sync_chunk(self, chunk: ChunkId) -> None:
        file = self._lookup(chunk)
        if file is None:
            return
        file.users += 1
        try:
            await self._ring.fsync(file.fd, data_only=True)
        except OSError as error:
            raise from_disk(error, f"sync of chunk {chunk}") from error
        finally:
            self._release(file)

    async def _sync_directory(self, number: int) -> None:
        made = self._entries_made[number]
        path = f"{self._directory}/{number:02x}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                await self._ring.fsync(fd, data_only=False)
            finally:
                os.close(fd)
        except OSError as error:
            raise from_disk(error, f"sync of {path}") from error
        self._entries_synced[number] = max(made, self._entries_synced[number])


def _write_all(fd: int, data: Buffer, offset: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwritev(fd, [left], offset)
        if count == 0:
            raise OSError(errno.EIO, "write made no progress")
        left = left[count:]
        offset += count


def _unlink_all(paths: list[str]) -> None:
    """Unlink files; those that are not there were unlinked before a crash, or never made."""
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _fsync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _boot_id() -> str:
    """Return what tells this running machine from all others (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
