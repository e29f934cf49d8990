"""Keep chunks as files in a data directory, one file per chunk, known by the chunk table.

    chunks/<ino & 0xff>/<ino>.<index>.<birth>      all in hexadecimal

``birth`` is a random number that a chunk gets when it is made and keeps in its record. So a chunk that is dropped and
made again has another file: removing the old one may take its time and can never touch the newer chunk, nor can old
bytes come back.

Order of events, so that ``kill -9`` at any point leaves the table right:

    making    record (length 0), file
    writing   data, record if it changes, acknowledgement. A longer file than its record says holds the bytes of a write
              that nobody acknowledged: they are cut off when the file is next opened, or used after a failed write.
    trimming  record, file, sync of the file: a crash between leaves a file that is too long, see above
    allocating, punching
              file, record: a crash between leaves space that is not counted, or a hole that counts as allocated zeros
    dropping  record becomes garbage in one transaction; later, in the background: store synced, files unlinked in a
              thread, garbage forgotten

A file that is missing or another's (identity.py) is a StorageError, and so are the bytes that a file lacks which is
shorter than its record says: never zeros (but see ``_reach``). After a power cut that may happen to what was changed
and not synced; bytes that were synced are always there. What is cut off or dropped needs no file: a damaged chunk can
always be removed, and a trim in it leaves what is before the cut as damaged as it was.

Open files are cached by chunk alone: all are opened O_RDWR, so that one serves whoever reads, writes, cuts or syncs.

One chunk's operations: reads and writes run side by side. A trim, an allocation or a punch has the chunk alone but for
reads: it waits until no write to it is under way, and holds new ones back. A drop waits for nothing: what was under way
counts as done before it. ``Record`` is changed only in stretches without ``await``.
"""

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import trio

from ..errors import FsError, NoSpace, StorageError, UserError, from_disk
from ..limits import CHUNK_SIZE_MAX, FILES_OPEN_MAX, MIB, SYNC_CHUNKS_MAX, SYNC_TRACKED_MAX
from ..model import ChunkId, DiskUsage
from ..observe import recording, spans
from ..ports import Buffer, KeyValueStore, Mapped, Trimmed
from .identity import begin_marking, mark, trouble_with
from .spread import spread
from .table import GRANULE_MIN, ChunkTable, Record
from .uring import PLAIN_LENGTH_MAX, ProbeResult, Ring

log = logging.getLogger(__name__)

#: Directories under ``chunks``: 200,000 files make 800 entries each.
DIRECTORIES = 256
#: Chunks dropped, summed up or removed at one go: a few milliseconds without a look at anything else.
PAGE_MAX = 256
#: Chunk files of one ``sync`` that are at the disk at once.
SYNC_TASKS_MAX = 16
#: Space that data never takes, so that the metadata store can always write, removals above all: eight memtables.
RESERVE_MAX = 64 * MIB
#: On a small file system the reserve is this part of it.
RESERVE_PART = 32
#: Inodes that chunks never take, so that the metadata store can always make files: some at each start, and some dozens
#: at most for a compaction. On a small file system it is the same part of all.
INODES_RESERVE_MAX = 256
#: Look at the free space again after so many bytes: what others take meanwhile goes unseen for so long.
SPACE_STEP = 16 * MIB
#: Bytes looked at in one go for whether they are all zeros.
ZEROS_STEP = MIB
#: Mode of fallocate(2) that makes a hole: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE (linux/falloc.h).
_PUNCH = 3


class DiskStatistics(NamedTuple):
    """Count reads and writes by the way they went, and what is open."""

    uring_reads: int
    uring_writes: int
    plain_reads: int
    plain_writes: int
    files_open: int
    #: Files that had to be opened so far.
    files_opened: int


class _File:
    """Hold one open chunk file with its record and who is using it."""

    __slots__ = ("barrier", "chunk", "fd", "gone", "idle", "made", "record", "torn", "users", "writers")

    def __init__(self, chunk: ChunkId, record: Record, fd: int) -> None:
        self.chunk = chunk
        self.record = record
        self.fd = fd
        #: Operations that need ``fd``; those of them that write.
        self.users = 0
        self.writers = 0
        #: The chunk was dropped; the file is closed by its last user.
        self.gone = False
        #: It was empty when it was opened: its mark is not synced.
        self.made = False
        #: A write failed: the file may be longer than its record.
        self.torn = False
        #: Set when the trim, allocation or punch under way has ended; None if there is none.
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
        lost_power: bool = False,
        name: str = "this daemon",
    ) -> None:
        """Open the chunks under ``directory``, make what is missing; raise UserError if that cannot be.

        ``name`` says in errors whose chunks these are. ``nursery`` runs the removal of files; being cancelled there
        loses nothing. ``plain_reads`` and ``plain_writes`` let small operations go around the ring (``plain_paths``).
        ``reserve`` overrides the space kept free, in bytes. ``lost_power``: the machine was started anew at some time,
        see ``_reach``. Existing chunks are adopted without looking at them; what an earlier run left to be removed is
        removed.
        """
        self._directory = str(directory / "chunks")
        self._store = store
        self._ring = ring
        self._nursery = nursery
        self._plain_reads = plain_reads
        self._plain_writes = plain_writes
        self._lost_power = lost_power
        self._opened_count = 0
        self._uring_read_count = self._uring_write_count = self._plain_read_count = self._plain_write_count = 0
        self._files: OrderedDict[ChunkId, _File] = OrderedDict()
        self.table = ChunkTable(store)
        self._name = name
        #: Chunks written since their last sync, of files that are tracked, and whether they were made; see ``sync``.
        self._unsynced: OrderedDict[int, dict[int, bool]] = OrderedDict()
        self._sync_locks: WeakValueDictionary[int, trio.Lock] = WeakValueDictionary()
        #: Files made in each directory, and how many of them had been made when it was last synced. At start, nobody
        #: knows: one more than synced.
        self._entries_made = [1] * DIRECTORIES
        self._entries_synced = [0] * DIRECTORIES
        self._removing = False
        #: How far in the list the removal has come: what is left below could not be removed for now.
        self.removed_to = 0
        try:
            os.makedirs(self._directory, exist_ok=True)
            with suppress(OSError):  # not ext4: nothing is known to be gained
                spread(self._directory)
            for number in range(DIRECTORIES):
                os.makedirs(f"{self._directory}/{number:02x}", exist_ok=True)
            for path in (self._directory, str(directory)):
                _fsync_directory(path)
            self.marking = begin_marking(self._directory, empty=self.table.empty)
            self._filesystem = f"{_boot_id()}:{directory.stat().st_dev}"
            space = os.statvfs(self._directory)
        except OSError as error:
            raise UserError(f"Cannot use the data directory {directory}: {error}.") from error
        self._reserve = (
            min(RESERVE_MAX, space.f_blocks * space.f_frsize // RESERVE_PART) if reserve is None else reserve
        )
        #: Bytes that may be allocated before the free space is looked at again, and bytes held by what is under way.
        self._space = self._held = 0
        if self.table.leftovers:
            log.info("%d dropped chunk files of an earlier run are being removed", self.table.leftovers)
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
            self._opened_count,
        )

    async def read(self, chunk: ChunkId, offset: int, into: memoryview) -> int:
        """Read into the caller's buffer; return how many bytes from ``offset`` on exist."""
        try:
            file = self._lookup(chunk)
        except StorageError as error:
            return self._read_hole(chunk, offset, into, error)
        if file is None:
            return 0
        wanted = min(len(into), file.record.length - offset)
        if wanted <= 0:
            return 0
        file.users += 1
        try:
            if self._plain_reads and wanted <= PLAIN_LENGTH_MAX:
                self._plain_read_count += 1
                started_ns = recording.now()
                count = os.preadv(file.fd, [into[:wanted]], offset)
                recording.note(spans.DISK, started_ns)
            else:
                self._uring_read_count += 1
                count = await self._ring.read(file.fd, into[:wanted], offset)
        except OSError as error:
            raise from_disk(error, self._where(chunk)) from error
        finally:
            self._release(file)
        if count == wanted:
            return count
        # It may have been trimmed meanwhile.
        left = max(0, min(wanted, file.record.length - offset))
        if count < left:
            reach = max(offset + count, self._reach(os.lseek(file.fd, 0, os.SEEK_END)))
            if file.record.holds_any(reach, offset + left):
                raise StorageError(self._lost(file) or f"{self._named(chunk, file.record.birth)} ended in a read")
            into[count:left] = bytes(left - count)
        return left

    async def write(self, chunk: ChunkId, offset: int, data: Buffer) -> int:
        """Write all of ``data``; return by how many bytes the chunk's allocated space grew.

        Cancelled before it begins or not at all.
        """
        length = len(data)
        if not length:
            return 0
        file = await self._enter(chunk)
        if self._plain_writes and length <= PLAIN_LENGTH_MAX:
            return self._write_plain(chunk, file, offset, data)
        with self._writing(chunk, file, offset, length) as file:
            self._uring_write_count += 1
            await self._ring.write(file.fd, data, offset)
            return self._note_written(chunk, file, offset, length)

    def _write_plain(self, chunk: ChunkId, file: _File | None, offset: int, data: Buffer) -> int:
        with self._writing(chunk, file, offset, len(data)) as file:
            self._plain_write_count += 1
            started_ns = recording.now()
            _write_all(file.fd, data, offset)
            recording.note(spans.DISK, started_ns)
            return self._note_written(chunk, file, offset, len(data))

    @contextmanager
    def _writing(self, chunk: ChunkId, file: _File | None, offset: int, length: int) -> Iterator[_File]:
        """Hold a chunk's open file, or make it, for a write that there is space for."""
        growth = self._check_space(Record(0) if file is None else file.record, offset, length)
        if file is None:
            file = self._make(chunk)
        self._check_length(file, offset)
        file.users += 1
        file.writers += 1
        self._hold(growth)
        try:
            yield file
        except BaseException as error:
            file.torn = True
            self._space = -growth  # it may have taken what is on no record: the next one looks anew
            if isinstance(error, OSError):
                raise from_disk(error, self._where(chunk)) from error
            raise
        finally:
            self._hold(-growth)
            file.writers -= 1
            if not file.writers and file.idle is not None:
                file.idle.set()
            self._release(file)

    def _note_written(self, chunk: ChunkId, file: _File, offset: int, length: int) -> int:
        """Keep the record of what was written; return by how much the allocated space grew."""
        if file.gone:
            return 0
        record = file.record.with_write(offset, length)
        grown = record.allocated - file.record.allocated
        if record is not file.record:
            self.table.put(chunk, record)
            file.record = record
            self._space -= grown
        self._note_unsynced(file)
        return grown

    def read_now(self, chunk: ChunkId, offset: int, into: memoryview) -> int | None:
        """Read by a plain call what the page cache holds, if that is short; None otherwise."""
        try:
            file = self._lookup(chunk)
        except StorageError:
            return None  # ``read`` meets it again
        if file is None:
            return 0
        wanted = min(len(into), file.record.length - offset)
        if wanted <= 0:
            return 0
        if wanted > PLAIN_LENGTH_MAX:
            return None
        started_ns = recording.now()
        try:
            # Where io_uring hands reads over (tmpfs), RWF_NOWAIT is refused, and a plain read never waits for a disk.
            count = os.preadv(file.fd, [into[:wanted]], offset, 0 if self._plain_reads else os.RWF_NOWAIT)
        except OSError:
            return None  # BlockingIOError: the disk has to be asked; others ``read`` meets again
        recording.note(spans.DISK, started_ns)
        if count < wanted:
            return None
        self._plain_read_count += 1
        return count

    def write_now(self, chunk: ChunkId, offset: int, data: Buffer) -> int | None:
        """Write by a plain call, where short writes go that way, and nobody has the chunk alone; None otherwise."""
        if not self._plain_writes or not 0 < len(data) <= PLAIN_LENGTH_MAX:
            return None
        file = self._lookup(chunk)
        if file is not None and file.barrier is not None:
            return None
        return self._write_plain(chunk, file, offset, data)

    async def allocate(self, chunk: ChunkId, offset: int, length: int, *, zero: bool = False) -> int:
        """Reserve space for ``length`` > 0 bytes; return by how many bytes the chunk's allocated space grew."""
        known = await self._enter(chunk)
        growth = self._check_space(Record(0) if known is None else known.record, offset, length)
        if known is None:
            self._make(chunk)
        self._hold(growth)
        try:
            async with self._alone(chunk) as file:
                if file is None:  # dropped meanwhile: that came last
                    return 0
                self._check_length(file, CHUNK_SIZE_MAX)
                try:
                    if zero and offset < file.record.length:
                        await self._ring.fallocate(file.fd, _PUNCH, offset, length)
                    await self._ring.fallocate(file.fd, 0, offset, length)
                except OSError as error:
                    file.torn = True
                    await self._give_back(file, offset, length)
                    raise from_disk(error, f"allocation in {self._where(chunk)}") from error
                return self._put(file, file.record.with_write(offset, length))
        finally:
            self._hold(-growth)

    async def punch(self, chunk: ChunkId, offset: int, length: int, *, zeros_only: bool = False) -> int:
        """Make a range zeros and free the blocks that lie in it as a whole; return the bytes freed."""
        async with self._alone(chunk) as file:
            if file is None:
                return 0
            freed = 0
            for start, end in await self._zeros(file, offset, length) if zeros_only else [(offset, offset + length)]:
                try:
                    await self._ring.fallocate(file.fd, _PUNCH, start, end - start)
                except OSError as error:
                    raise from_disk(error, f"hole in {self._where(chunk)}") from error
                freed -= self._put(file, file.record.without(start, end - start))
            return freed

    async def map(self, ino: int, index: int, offset: int, stop: int, count_max: int) -> Mapped:
        """Return the data ranges of a file that end behind byte ``offset`` of chunk ``index``, up to chunk ``stop``."""
        await trio.lowlevel.checkpoint()
        return self.table.map(ino, index, offset, stop, count_max)

    async def trim(self, ino: int, index: int, offset: int, *, durable: bool = False) -> Trimmed:
        """Drop of file ``ino`` everything at and behind byte ``offset`` of chunk ``index``."""
        freed = await self._shorten(ChunkId(ino, index), offset) if offset else 0
        if offset:
            await self._sync_cut(ChunkId(ino, index), offset)
        dropped = await self._drop_from(ino, index + 1 if offset else index)
        left = index = 0
        while page := self.table.page(ino, index, PAGE_MAX):
            left += sum(record.allocated for _, record in page)
            index = page[-1][0] + 1
            if len(page) < PAGE_MAX:
                break
            await trio.lowlevel.checkpoint()
        if durable:
            await self._store.sync()
        return Trimmed(freed + dropped, left)

    async def drop(self, inos: Sequence[int], *, durable: bool = False) -> int:
        """Drop all chunks of these files; return the bytes freed, which the disk has back a little later."""
        freed = sum([await self._drop_from(ino, 0) for ino in inos])
        if durable:
            await self._store.sync()
        return freed

    async def sync(self, ino: int) -> None:
        """Bring everything written to ``ino`` so far to stable storage.

        Which chunks need it is known of files that were synced since the start and not too long ago; of others, all
        count as written. A failure is raised by the sync that meets it, and all chunks of the file count as written
        again. The kernel reports a failed write-back once; the bytes are lost. Bytes that a chunk file lacks are told
        once, too: by the first sync after the start.
        """
        lock = self._sync_locks.get(ino)
        if lock is None:
            lock = self._sync_locks[ino] = trio.Lock()
        async with lock:
            known = self._unsynced.pop(ino, None)
            self._unsynced[ino] = {}
            try:
                lost = await self._sync_chunks(ino, known)
            except BaseException:
                self._unsynced.pop(ino, None)
                raise
            while len(self._unsynced) > SYNC_TRACKED_MAX:
                self._unsynced.popitem(last=False)
            if lost and known is None:
                raise StorageError(lost)

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

    def path(self, chunk: ChunkId, birth: int) -> str:
        """Return where the file of a chunk lies."""
        return f"{self._directory}/{chunk.ino % DIRECTORIES:02x}/{chunk.ino:016x}.{chunk.index:08x}.{birth:016x}"

    def folder(self, number: int) -> str:
        """Return the directory of the chunk files of every inode whose number ends in ``number``."""
        return f"{self._directory}/{number:02x}"

    def _where(self, chunk: ChunkId) -> str:
        """Name a chunk in errors: its inode is what ``find -inum`` takes."""
        return f"chunk {chunk.index} of inode {chunk.ino} on {self._name}"

    def _named(self, chunk: ChunkId, birth: int) -> str:
        """Name a chunk and its file."""
        return f"{self._where(chunk)}, {self.path(chunk, birth)}"

    def _check_length(self, file: _File, offset: int) -> None:
        """Refuse to write from ``offset`` on to a file that lost what is before: that would become zeros. StorageError.

        What it has lost can be written anew, from there on.
        """
        if lost := self._lost(file, offset):
            raise StorageError(lost)

    def _lost(self, file: _File, end: int = CHUNK_SIZE_MAX) -> str:
        """Say so if a file lacks bytes before ``end`` that were written; a hole is no loss."""
        size, record = os.lseek(file.fd, 0, os.SEEK_END), file.record
        if size >= record.length or not record.holds_any(self._reach(size), min(end, record.length)):
            return ""
        return f"{self._named(file.chunk, record.birth)} has {size} bytes, its record says {record.length}"

    def _reach(self, size: int) -> int:
        """Return how far a file of that size can be read.

        A power cut takes what was written behind the synced end of a file, and the record does not tell which bytes of
        a block were written: the rest of the block in which the file ends is zeros then, as it was.
        """
        return -(-size // GRANULE_MIN) * GRANULE_MIN if self._lost_power else size

    def _read_hole(self, chunk: ChunkId, offset: int, into: memoryview, error: StorageError) -> int:
        """Read from a chunk whose file cannot be used, as far as the table alone tells what is there; or raise that."""
        record = self.table.get(chunk)
        if record is None:
            return 0
        count = max(0, min(len(into), record.length - offset))
        if record.holds_any(offset, offset + count):
            raise error
        into[:count] = bytes(count)
        return count

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
        record = self.table.get(chunk)
        return None if record is None else self._open(chunk, record)

    def _make(self, chunk: ChunkId) -> _File:
        """Make a chunk that has no record. A crash before its file is there leaves a record of length 0, which may.

        NoSpace: its file would be one of those that are kept.
        """
        space = os.statvfs(self._directory)
        kept = min(INODES_RESERVE_MAX, space.f_files // RESERVE_PART)  # none where inodes are not counted: f_files is 0
        if space.f_favail < kept:
            raise NoSpace(f"{space.f_favail} inodes left, {kept} are kept")
        record = Record(int.from_bytes(os.urandom(8)))
        self.table.put(chunk, record)
        return self._open(chunk, record)

    def _open(self, chunk: ChunkId, record: Record) -> _File:
        path = self.path(chunk, record.birth)
        flags = os.O_RDWR
        if record.length == 0:
            flags |= os.O_CREAT
            self._entries_made[chunk.ino % DIRECTORIES] += 1
        started_ns = recording.now()
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise from_disk(error, self._where(chunk)) from error
        recording.note(spans.DISK, started_ns)
        self._opened_count += 1
        file = _File(chunk, record, fd)
        try:
            size = os.fstat(fd).st_size
            if record.length:
                # What is there of a file that is too short is good: a power cut may take what was not synced.
                trouble = trouble_with(fd, record.cut(size), self.marking.everywhere)
                if trouble:
                    raise StorageError(f"{self._named(chunk, record.birth)} {trouble}")
            else:
                file.made = True
                if self.marking.possible:
                    mark(fd, record.birth)
            if size > record.length:
                self._cut(file)
                os.fdatasync(fd)  # a later record may say that it is longer: what was there must not come back then
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise from_disk(error, self._named(chunk, record.birth)) from error
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
        """Make a file no longer than its record in the table says. If that fails, ``_lookup`` tries again."""
        file.torn = True  # until it has succeeded
        record = self.table.get(file.chunk)
        if record is None:
            return
        file.record = record
        try:
            if os.lseek(file.fd, 0, os.SEEK_END) > record.length:  # a file that lost bytes must not get zeros for them
                os.ftruncate(file.fd, record.length)
        except OSError as error:
            raise from_disk(error, self._where(file.chunk)) from error
        file.torn = False

    def _check_space(self, record: Record, offset: int, length: int) -> int:
        """Return the bytes to hold while a write is under way: what it may allocate at most. NoSpace: the reserve's.

        What others hold and have allocated already counts twice where the free space is looked at meanwhile: the last
        bytes of a disk may be refused to somebody while others are writing.
        """
        growth = length + 2 * record.granule
        if growth <= self._space:
            return growth
        growth = record.with_write(offset, length).allocated - record.allocated
        if growth > max(0, self._space):
            space = os.statvfs(self._directory)
            free = space.f_bavail * space.f_frsize - self._reserve
            if growth > free - self._held:
                raise NoSpace(
                    f"{free} bytes free above the reserve of {self._reserve}, {growth} needed and {self._held} held by "
                    f"writes under way"
                )
            self._space = max(growth, min(free - self._held, SPACE_STEP))
        return growth

    def _hold(self, growth: int) -> None:
        """Keep space for a write under way, or end doing so: what it has allocated is counted by then."""
        self._held += growth
        self._space -= growth

    async def _enter(self, chunk: ChunkId) -> _File | None:
        """Return a chunk's open file when nobody has it alone, None if there is no such chunk."""
        while True:
            file = self._lookup(chunk)
            if file is None or file.barrier is None:
                return file
            await file.barrier.wait()

    @asynccontextmanager
    async def _alone(self, chunk: ChunkId) -> AsyncIterator[_File | None]:
        """Have a chunk without writes under way for a while; None if there is no such chunk (any more)."""
        file = await self._enter(chunk)
        if file is None:
            yield None
            return
        barrier = file.barrier = trio.Event()
        file.users += 1
        try:
            while file.writers:
                file.idle = trio.Event()
                await file.idle.wait()
            if file.torn:
                self._cut(file)
            yield None if file.gone else file
        finally:
            file.idle = file.barrier = None
            barrier.set()
            self._release(file)

    def _put(self, file: _File, record: Record) -> int:
        """Give a file that nobody else writes to another record; return by how much its allocated space grew."""
        if file.gone:
            return 0
        grown = record.allocated - file.record.allocated
        if record != file.record:
            try:
                self.table.put(file.chunk, record)
            except BaseException:
                file.torn = True
                raise
            file.record = record
            self._space -= max(0, grown)
        self._note_unsynced(file)
        return grown

    def _note_unsynced(self, file: _File) -> None:
        ino, index = file.chunk
        unsynced = self._unsynced.get(ino)
        if unsynced is not None:
            unsynced[index] = unsynced.get(index, False) or file.made
            if len(unsynced) > SYNC_CHUNKS_MAX:
                del self._unsynced[ino]

    async def _give_back(self, file: _File, offset: int, length: int) -> None:
        """Free what an allocation that failed has got of a range, but for what lies behind the file's record."""
        end = min(offset + length, file.record.length)
        for start, stop in file.record.holes(offset, end):
            with suppress(OSError):  # it is not counted, and a later write or punch finds it
                await self._ring.fallocate(file.fd, _PUNCH, start, stop - start)

    async def _zeros(self, file: _File, offset: int, length: int) -> list[tuple[int, int]]:
        """Return the runs of allocated blocks, wholly in a range, that hold nothing but zeros."""
        granule = file.record.granule
        found: list[tuple[int, int]] = []
        zeros = bytes(granule)
        buffer = bytearray(max(ZEROS_STEP, granule))
        for first, last in file.record.ranges(offset):
            start = max(first, -(-offset // granule) * granule)
            stop = min(last, (offset + length) // granule * granule)
            for position in range(start, stop, len(buffer)):
                piece = memoryview(buffer)[: stop - position]
                try:
                    count = await self._ring.read(file.fd, piece, position)
                except OSError as error:
                    raise from_disk(error, self._where(file.chunk)) from error
                piece[count:] = bytes(len(piece) - count)
                found += (
                    (position + at, position + at + granule)
                    for at in range(0, len(piece), granule)
                    if buffer.startswith(zeros, at)
                )
        return _joined(found)

    async def _shorten(self, chunk: ChunkId, offset: int) -> int:
        """Cut one chunk off at ``offset`` > 0; return the bytes freed."""
        record = self.table.get(chunk)
        if record is None or record.length <= offset:
            return 0
        try:
            self._lookup(chunk)
        except StorageError as error:
            if chunk in self._files:
                raise
            # It is damaged, and nobody is at work on it. What is cut off is not missed.
            log.warning("cut at %d without its file: %s", offset, error)
            self.table.put(chunk, record.cut(offset))
            return record.allocated - record.cut(offset).allocated
        async with self._alone(chunk) as file:
            # No await from here on.
            if file is None or file.record.length <= offset:
                return 0
            record = file.record.cut(offset)
            freed = file.record.allocated - record.allocated
            self.table.put(chunk, record)
            self._cut(file)
            return freed

    async def _sync_cut(self, chunk: ChunkId, offset: int) -> None:
        """Let no power cut bring back what was cut off at ``offset``: the record may say by then that it is longer."""
        record = self.table.get(chunk)
        if record is not None and record.length == offset:
            with suppress(StorageError):  # damaged as it was
                await self._sync_chunk(chunk, made=False)

    async def _drop_from(self, ino: int, index: int) -> int:
        """Drop the chunks of a file from ``index`` on; return the bytes freed."""
        freed = 0
        while page := self.table.page(ino, index, PAGE_MAX):
            self.table.bury(ino, page)
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
        for the next drop or the next start, and holds nothing else up.
        """
        error: Exception | None = None
        self.removed_to = self.table.first_garbage
        try:
            while garbage := self.table.garbage(PAGE_MAX, self.removed_to):
                await self._store.sync()
                paths = [self.path(piece.chunk, piece.birth) for piece in garbage]
                failed = await trio.to_thread.run_sync(_unlink_all, paths)
                self.table.forget(piece for piece, path in zip(garbage, paths, strict=True) if path not in failed)
                error = next(iter(failed.values()), error)
                self.removed_to = garbage[-1].sequence + 1
                if error is None:
                    self.table.first_garbage = self.removed_to
        except FsError as trouble:
            error = trouble
        finally:
            self._removing = False
        if error is not None:
            log.warning("cannot remove dropped chunk files: %s", error)

    @property
    def to_remove(self) -> int:
        """Return how many files of dropped chunks are still to be removed, but for those that could not be."""
        return self.table.next_garbage - self.removed_to if self._removing else 0

    async def sync_table(self) -> None:
        """Bring the table to stable storage: files whose records are gone may be removed then."""
        await self._store.sync()

    async def _sync_chunks(self, ino: int, known: dict[int, bool] | None) -> str:
        """Sync the chunks ``known`` to have been written, or all, with their directory and the table, side by side.

        The marks of those that were made are synced, too; an overwrite needs no more than its data. Return a sentence
        on one that lacks bytes, if there is any.
        """
        chunks = list((dict.fromkeys(self._all_indexes(ino), True) if known is None else known).items())
        errors: list[FsError] = []
        lost = ""

        async def collect(step: Callable[[], Awaitable[None]]) -> None:
            try:
                await step()
            except FsError as error:
                errors.append(error)

        async def some_chunks() -> None:
            nonlocal lost
            while chunks:
                index, made = chunks.pop()
                lost = await self._sync_chunk(ChunkId(ino, index), made) or lost

        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, self._store.sync)
            if self._entries_synced[ino % DIRECTORIES] < self._entries_made[ino % DIRECTORIES]:
                nursery.start_soon(collect, partial(self._sync_directory, ino % DIRECTORIES))
            for _ in range(min(SYNC_TASKS_MAX, len(chunks))):
                nursery.start_soon(collect, some_chunks)
        if errors:
            raise errors[0]
        return lost

    def _all_indexes(self, ino: int) -> list[int]:
        found: list[int] = []
        while page := self.table.page(ino, found[-1] + 1 if found else 0, PAGE_MAX):
            found += (index for index, _ in page)
            if len(page) < PAGE_MAX:
                break
        return found

    async def _sync_chunk(self, chunk: ChunkId, made: bool) -> str:
        """Sync one chunk; return a sentence if it lacks bytes."""
        file = self._lookup(chunk)
        if file is None:
            return ""
        file.users += 1
        try:
            await self._ring.fsync(file.fd, data_only=not made)
            if made:
                file.made = False
            if not os.fstat(file.fd).st_nlink and not file.gone:
                raise StorageError(f"{self._named(chunk, file.record.birth)} is missing")
            return self._lost(file)
        except OSError as error:
            raise from_disk(error, f"sync of {self._where(chunk)}") from error
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


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges, given in order, that touch each other."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def _unlink_all(paths: list[str]) -> dict[str, OSError]:
    """Unlink files, return what failed; those that are not there were unlinked before a crash, or never made."""
    failed = {}
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            failed[path] = error
    return failed


def _fsync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _boot_id() -> str:
    """Return what tells this running machine from all others (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
