"""Let a client compare what the daemons of a cluster hold while it is in use (services/checking.py does that).

A daemon shows its own records page by page, and answers for moments: what belongs together on one daemon is looked at
without an await in between, or as of one call of ``scan``; what a transaction is about to change is looked at when
that has ended; the chunks of a file while its publications are held up. No handler works for longer than about a
millisecond without a look at anything else.

What is removed is looked at once more by the daemon itself, whatever the client believes: never anything that a name,
an open file, a prepared transaction or a pending removal still needs.
"""

from collections.abc import Awaitable, Callable, Mapping
from itertools import islice

import msgspec
import trio

from .. import disk
from ..comparison import Problem, home_of
from ..errors import Conflict, InvalidArgument, NotEmpty, Stale
from ..limits import ITEMS_MAX, KIB
from ..model import ChunkId
from ..ports import ChunkInspector, ChunkStore
from ..rpc.messages import (
    EXAMINED_GONE,
    EXAMINED_IN_USE,
    EXAMINED_QUIET,
    Body,
    ChunkRow,
    CountEntries,
    CountEntriesReply,
    Done,
    ExamineFile,
    ExamineFileReply,
    FindInodes,
    FindInodesReply,
    FindNames,
    FindNamesReply,
    HeldChunks,
    HeldChunksReply,
    InodeState,
    ListChunks,
    ListChunksReply,
    ListRecords,
    ListRecordsReply,
    ListStrays,
    ListStraysReply,
    RemoveInode,
    RemoveOrphans,
    RemoveOrphansReply,
    RemoveStrays,
    Request,
    StrayRow,
    SweepRecords,
    SweepRecordsReply,
)
from .calls import Batch, Call, Opens, Peers
from .inodes import Inode, Inodes
from .locks import Locks
from .parallel import each
from .reaper import Reaper
from .truncations import Truncations

#: Records of one page, and their bytes: what a body holds, and about a millisecond.
RECORDS_MAX = 512
RECORDS_BYTES = 96 * KIB
#: Records looked at in one go where each takes a look at another one.
STEP_MAX = 128
#: Directories of chunk files in one request: some thousand files of an ordinary cluster.
FOLDERS_MAX = 16
#: Seconds for the other daemons to tell what they hold of a file, whose writers wait meanwhile.
EXAMINE_S = 5.0

_LISTED = (disk.INODE, disk.ENTRY)
_SWEPT = (disk.INODE, disk.ENTRY, disk.POSITION, disk.XATTR, disk.TARGET, disk.WRITE_OPEN, disk.OUTCOME)
_decode = msgspec.msgpack.Decoder(Inode).decode


class Inspection:
    """Serve the requests of ``benchfs check``. ``reviewed``: what nobody may reclaim any more has been looked at."""

    def __init__(
        self,
        inodes: Inodes,
        locks: Locks,
        opens: Opens,
        peers: Peers,
        reaper: Reaper,
        truncations: Truncations,
        reviewed: trio.Event,
        chunks: ChunkStore,
        inspector: ChunkInspector,
    ) -> None:
        self._inodes = inodes
        self._store = inodes.store
        self._locks = locks
        self._opens = opens
        self._peers = peers
        self._reaper = reaper
        self._truncations = truncations
        self._reviewed = reviewed
        self._chunks = chunks
        self._inspector = inspector

    def handlers(self) -> Mapping[type[Request], Callable[[Request, Call], Awaitable[Body]]]:
        """Return the handlers for Server.register."""
        return {
            ListRecords: self._list_records,
            ListChunks: self._list_chunks,
            ListStrays: self._list_strays,
            FindInodes: self._find_inodes,
            FindNames: self._find_names,
            CountEntries: self._count_entries,
            ExamineFile: self._examine,
            HeldChunks: self._held,
            RemoveOrphans: self._remove_orphans,
            RemoveStrays: self._remove_strays,
            RemoveInode: self._remove_inode,
            SweepRecords: self._sweep,
        }

    # ── what is there ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _list_records(self, request: Request, call: Call) -> Body:
        assert isinstance(request, ListRecords)
        start = _start(request.prefix, request.start, _LISTED)
        await trio.lowlevel.checkpoint()
        rows: list[tuple[bytes, bytes]] = []
        room = RECORDS_BYTES
        for key, value in self._store.scan(start, disk.after(request.prefix)):
            room -= len(key) + len(value)
            if rows and (room < 0 or len(rows) == RECORDS_MAX):
                return ListRecordsReply(tuple(rows), True)
            rows.append((key, value))
        return ListRecordsReply(tuple(rows), False)

    async def _list_chunks(self, request: Request, call: Call) -> Body:
        assert isinstance(request, ListChunks)
        _check_numbers(request.ino, request.index)
        page = await self._inspector.page(ChunkId(request.ino, request.index))
        return ListChunksReply(
            tuple(ChunkRow(one.chunk.ino, one.chunk.index, one.length, one.allocated, one.trouble) for one in page)
        )

    async def _list_strays(self, request: Request, call: Call) -> Body:
        assert isinstance(request, ListStrays)
        folders = self._inspector.folders
        if not 0 <= request.folder <= folders:
            raise InvalidArgument(f"directory {request.folder} of {folders}")
        behind = min(request.folder + FOLDERS_MAX, folders)
        files = await self._inspector.strays(range(request.folder, behind))
        rows = tuple(StrayRow(file.folder, file.name, *(file.chunk or (0, 0)), file.length) for file in files)
        return ListStraysReply(rows, behind, folders)

    async def _find_inodes(self, request: Request, call: Call) -> Body:
        assert isinstance(request, FindInodes)
        _check_count(request.inos)
        found = []
        for position, ino in enumerate(request.inos):
            if position % STEP_MAX == 0:
                await trio.lowlevel.checkpoint()
            _check_numbers(ino)
            await self._locks.wait_free({disk.key(disk.INODE, ino): False})
            state = self._state(ino)
            if state.pending and state.record and not state.held and not self._reviewed.is_set():
                await self._reviewed.wait()
                await self._locks.wait_free({disk.key(disk.INODE, ino): False})
                state = self._state(ino)
            found.append(state)
        return FindInodesReply(tuple(found))

    def _state(self, ino: int) -> InodeState:
        return InodeState(
            ino,
            self._store.get(disk.key(disk.INODE, ino)) or b"",
            self._store.get(disk.key(disk.DEAD, ino)) is not None,
            self._opens.count(ino) > 0,
        )

    async def _find_names(self, request: Request, call: Call) -> Body:
        assert isinstance(request, FindNames)
        _check_count(request.places)
        found = []
        for position, (parent, name) in enumerate(request.places):
            if position % STEP_MAX == 0:
                await trio.lowlevel.checkpoint()
            _check_numbers(parent)
            key = disk.key_name(disk.ENTRY, parent, name)
            await self._locks.wait_free({key: False})
            found.append(self._store.get(key) or b"")
        return FindNamesReply(tuple(found))

    async def _count_entries(self, request: Request, call: Call) -> Body:
        assert isinstance(request, CountEntries)
        _check_numbers(request.ino)
        await trio.lowlevel.checkpoint()
        # Both as of now; the rows are read while others go on.
        record = self._store.get(disk.key(disk.INODE, request.ino)) or b""
        prefix = disk.key(disk.ENTRY, request.ino)
        rows = self._store.scan(prefix, disk.key(disk.ENTRY, request.ino + 1))
        entries = subdirectories = 0
        while page := list(islice(rows, RECORDS_MAX)):
            entries += len(page)
            subdirectories += sum(value[16:18] == _DIRECTORY for _, value in page)
            await trio.lowlevel.checkpoint()
        return CountEntriesReply(record, entries, subdirectories)

    async def _sweep(self, request: Request, call: Call) -> Body:
        assert isinstance(request, SweepRecords)
        start = _start(request.prefix, request.start, _SWEPT)
        await trio.lowlevel.checkpoint()
        found: list[tuple[bytes, str]] = []
        batch = Batch(self._store)
        rows = list(islice(self._store.scan(start, disk.after(request.prefix)), STEP_MAX))
        for key, value in rows:
            problem = self._problem_with(request.prefix, key, value)
            if problem is not None:
                found.append((key, problem))
                if problem is Problem.RECORD and request.remove:
                    batch.delete(key)
        batch.write()
        return SweepRecordsReply(tuple(found), rows[-1][0] + b"\0" if len(rows) == STEP_MAX else b"")

    def _problem_with(self, prefix: bytes, key: bytes, value: bytes) -> Problem | None:
        """Say what is wrong with a record, from what lies beside it on this daemon."""
        number = disk.number(key)
        if prefix in (disk.WRITE_OPEN, disk.OUTCOME):
            return None if self._has(disk.SESSION, number) else Problem.RECORD
        if prefix in (disk.XATTR, disk.TARGET):
            return None if self._has(disk.INODE, number) else Problem.RECORD
        if prefix == disk.POSITION:
            row = self._store.get(disk.key_name(disk.ENTRY, number, value[10:]))
            cookie = key[9:17]
            known = row is not None and row[8:16] == cookie and (row[:8], row[16:18]) == (value[:8], value[8:10])
            return None if known else Problem.RECORD
        if home_of(self._inodes.shard_map, number) != self._inodes.daemon_id:
            return Problem.MISPLACED
        if prefix == disk.ENTRY:
            if not self._has(disk.INODE, number):
                return Problem.NO_DIRECTORY
            position = self._store.get(disk.POSITION + key[1:9] + value[8:16])
            return None if position == value[:8] + value[16:18] + key[9:] else Problem.UNLISTED
        try:
            inode = _decode(value)
        except msgspec.DecodeError:
            return Problem.UNREADABLE
        if not (inode.is_file or inode.is_dir) and inode.mode & 0o170000 == 0o120000:
            return None if self._has(disk.TARGET, number) else Problem.NO_TARGET
        return None

    def _has(self, prefix: bytes, number: int) -> bool:
        return self._store.get(disk.key(prefix, number)) is not None

    # ── space ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _examine(self, request: Request, call: Call) -> Body:
        assert isinstance(request, ExamineFile)
        _check_numbers(request.ino)
        reply = ExamineFileReply(EXAMINED_IN_USE, 0, 0, 0)
        with trio.move_on_after(EXAMINE_S):
            async with self._truncations.held_still(request.ino) as quiet:
                inode = self._inodes.find(request.ino)
                if inode is None or not inode.is_file:
                    return ExamineFileReply(EXAMINED_GONE, 0, 0, 0)
                if quiet:
                    reply = await self._compare(inode)
        off = reply.held > reply.allocated or (reply.beyond and reply.held == reply.allocated)
        if request.settle and off and not self._opens.count(request.ino):
            await self._truncations.settle_now(request.ino)
        return reply

    async def _compare(self, inode: Inode) -> ExamineFileReply:
        replies: list[HeldChunksReply] = []

        async def ask(daemon: int) -> None:
            request = HeldChunks(inode.ino, *divmod(inode.end, inode.chunk_size))
            replies.append(await self._peers.call(daemon, request, HeldChunksReply))

        await each(ask, self._inodes.daemons)
        held, beyond = sum(one.allocated for one in replies), sum(one.beyond for one in replies)
        return ExamineFileReply(EXAMINED_QUIET, inode.allocated, held, beyond)

    async def _held(self, request: Request, call: Call) -> Body:
        assert isinstance(request, HeldChunks)
        _check_numbers(request.ino, request.index, request.offset)
        return HeldChunksReply(*await self._inspector.held(request.ino, request.index, request.offset))

    # ── removing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _remove_orphans(self, request: Request, call: Call) -> Body:
        """Drop chunks of inodes that have gone and are not being dropped: no number is given twice."""
        assert isinstance(request, RemoveOrphans)
        _check_count(request.inos)
        homes: dict[int, list[int]] = {}
        for ino in request.inos:
            _check_numbers(ino)
            homes.setdefault(home_of(self._inodes.shard_map, ino), []).append(ino)
        gone = homes.pop(-1, [])
        for home, inos in homes.items():
            reply = await self._peers.call(home, FindInodes(tuple(inos)), FindInodesReply)
            gone += [state.ino for state in reply.inodes if not state.record and not state.pending]
        return RemoveOrphansReply(await self._chunks.drop(gone) if gone else 0)

    async def _remove_strays(self, request: Request, call: Call) -> Body:
        assert isinstance(request, RemoveStrays)
        _check_count(request.names)
        if not 0 <= request.folder < self._inspector.folders:
            raise InvalidArgument(f"directory {request.folder} of {self._inspector.folders}")
        return RemoveOrphansReply(await self._inspector.remove_strays(request.folder, request.names))

    async def _remove_inode(self, request: Request, call: Call) -> Body:
        assert isinstance(request, RemoveInode)
        ino = request.ino
        _check_numbers(ino)
        await self._locks.wait_free({disk.key(disk.INODE, ino): True})
        draft = self._inodes.draft()
        inode = draft.find(ino)
        if inode is None:
            raise Stale(f"inode {ino} has gone")
        if inode.version != request.version:
            raise Conflict(f"inode {ino} has changed")
        prefix = disk.key(disk.ENTRY, ino)
        if inode.is_dir and (inode.entries or next(self._store.scan(prefix, disk.key(disk.ENTRY, ino + 1)), None)):
            raise NotEmpty(f"directory {ino}")
        if inode.nlink == 0 and self._store.get(disk.key(disk.DEAD, ino)) is not None:
            if not self._opens.count(ino):
                self._reaper.bury(ino)
            return Done()
        inode.nlink = 0
        draft.stamp(inode)
        self._reaper.unlinked(draft, inode)
        reply = Done()
        call.commit(draft, reply)
        return reply


_DIRECTORY = (0o040000).to_bytes(2, "big")


def _start(prefix: bytes, start: bytes, allowed: tuple[bytes, ...]) -> bytes:
    """Return where a page begins. InvalidArgument."""
    if prefix not in allowed or (start and not start.startswith(prefix)):
        raise InvalidArgument(f"records from {start!r} of {prefix!r}")
    return start or prefix


def _check_count(items: tuple[object, ...]) -> None:
    if len(items) > ITEMS_MAX:
        raise InvalidArgument(f"{len(items)} at once")


def _check_numbers(*numbers: int) -> None:
    """Refuse what is no number of a key: unsigned, and with room for the one behind it. InvalidArgument."""
    if not all(0 <= number < (1 << 64) - 1 for number in numbers):
        raise InvalidArgument(f"numbers {numbers}")
