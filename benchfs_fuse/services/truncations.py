"""Cut files: what lies behind the cut has gone on every daemon before the new size is seen.

A truncation holds the lock P of its inode: nobody publishes data, changes the size or opens the file for writing
meanwhile. First the P record says what is to be done, then the chunks behind the cut go, then one batch sets the size,
drops the P record and records the client's outcome. After a crash the record is found, the lock taken before anything
is served, and the truncation finished.

*Doubtful* is a file to which a client wrote that died, or that says its writes failed: data that was never published
may lie behind the size, on any daemon, and must never appear. So is a file that was cut while other clients had it
open for writing: what they publish then may count blocks that the cut took away. When nobody has the file open any more
it is *settled*: truncated to the size it has, on all daemons, its allocated bytes counted anew; what was allocated
behind the size on purpose goes, too. (While others have it open, that would destroy what they have written and not yet
published.) A P record remembers the doubt.

    P value  offset 0, 1: 1 if the file is doubtful, else 0
             offset 1: the SetAttr request as a message if it is being truncated

What other daemons have cut is on stable storage before the record goes: else a power cut there would bring old bytes
back into a file that has grown again. A power cut here may take the whole truncation back, and the bytes are gone all
the same: what was cut off and not synced is then zeros.

All daemons that hold chunks of the file are asked, not only those behind the cut: what they have left is the file's
allocated space, however often they were asked.

RPCs of a truncation: one TrimChunks to each daemon that holds chunks of the file; of settling, to every daemon.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from .. import disk
from ..errors import FsError, Stale
from ..rpc.messages import AttrsReply, Body, SetAttr, TrimChunks, TrimChunksReply, decode, encode
from .attributes import change, cuts
from .calls import Call, Opens, Peers
from .inodes import Draft, Inode, Inodes
from .jobs import Jobs, persist
from .locks import Blocked, Locks
from .parallel import each

_log = logging.getLogger(__name__)

_CERTAIN = b"\0"
_DOUBTFUL = b"\1"


class _Waiter:
    """Stand for the client that waits for a truncation. ``call`` is None once it has gone away or been answered."""

    def __init__(self, call: Call) -> None:
        self.call: Call | None = call
        self.answered = trio.Event()
        self.error: FsError | None = None
        self.reply: Body | None = None

    def answer(self, reply: Body | None, error: FsError | None) -> None:
        self.call = None
        self.reply = reply
        self.error = error
        self.answered.set()


class Truncations:
    """Cut files, and settle doubtful ones."""

    def __init__(self, inodes: Inodes, locks: Locks, peers: Peers, opens: Opens, jobs: Jobs) -> None:
        self._inodes = inodes
        self._locks = locks
        self._peers = peers
        self._opens = opens
        self._jobs = jobs
        #: Doubtful files that were not settled yet.
        self.doubtful: set[int] = set()

    async def truncate(self, request: SetAttr, call: Call) -> Body:
        """Change attributes, the size to a smaller one among them. If cancelled it goes on, and a retry repeats it.

        An error of a daemon is the client's at once; the truncation is tried again behind its back until it is done.
        """
        wanted = {disk.key(disk.TRUNCATING, request.ino): True}
        await self._locks.acquire(wanted)
        try:
            draft = self._inodes.draft()
            inode = draft.inode(request.ino)
            assert request.size is not None
            if not cuts(inode, request.size):  # somebody was faster
                change(draft, inode, request)
                reply = AttrsReply(inode.attrs())
                call.commit(draft, reply)
                self._locks.release(wanted)
                return reply
            doubt = _DOUBTFUL if request.ino in self.doubtful else _CERTAIN
            draft.put(disk.key(disk.TRUNCATING, request.ino), doubt + encode(request))
            draft.write()
        except BaseException:
            self._locks.release(wanted)
            raise
        waiter = _Waiter(call)
        self._jobs.start(self._cut, request, waiter)
        try:
            await waiter.answered.wait()
        finally:
            waiter.call = None
        if waiter.error is not None:
            raise waiter.error
        assert waiter.reply is not None
        return waiter.reply

    async def _cut(self, request: SetAttr, waiter: _Waiter | None) -> None:
        """Finish a truncation whose record is written and whose lock is held."""
        ino, size = request.ino, request.size
        assert size is not None
        inode = self._inodes.find(ino)
        left = 0
        if inode is not None:
            chunks = range(-(-inode.end // inode.chunk_size))
            daemons = self._inodes.shard_map.of_chunks(ino, chunks, inode.width)
            replies = await self._trim(
                TrimChunks(ino, *divmod(size, inode.chunk_size)),
                self._inodes.daemons if ino in self.doubtful else daemons,
                waiter,
            )
            left = sum(reply.left for reply in replies)

        def finish(draft: Draft, inode: Inode) -> None:
            inode.allocated = left
            inode.reach = 0
            change(draft, inode, request)

        await self._end(ino, finish, waiter)

    async def _trim(self, request: TrimChunks, daemons: Iterable[int], waiter: _Waiter | None) -> list[TrimChunksReply]:
        replies = []

        async def one(daemon: int) -> None:
            # What this daemon trims itself is in the log of its store before what it writes of the inode next.
            asked = msgspec.structs.replace(request, durable=daemon != self._inodes.daemon_id)

            async def attempt() -> None:
                try:
                    replies.append(await self._peers.call(daemon, asked, TrimChunksReply))
                except FsError as error:
                    if waiter is not None:
                        waiter.answer(None, error)
                    raise

            await persist(f"TrimChunks of inode {request.ino} at daemon {daemon}", attempt)

        await each(one, daemons)
        return replies

    async def _end(self, ino: int, finish: Callable[[Draft, Inode], None], waiter: _Waiter | None) -> None:
        """Write the end of a truncation, as the client's outcome if it still waits, and unlock.

        Other clients that have the file open for writing may have lost blocks that they are going to count: it is
        doubtful until they have closed it.
        """
        call = waiter.call if waiter is not None else None
        client_id = call.client_id if call is not None else None

        async def attempt() -> None:
            draft = self._inodes.draft()
            inode = draft.find(ino)
            if inode is not None and self._opens.written_by_others(ino, client_id):
                draft.put(disk.key(disk.TRUNCATING, ino), _DOUBTFUL)
                draft.after_write.append(lambda: self.doubtful.add(ino))
            else:
                draft.delete(disk.key(disk.TRUNCATING, ino))
                draft.after_write.append(lambda: self.doubtful.discard(ino))
            if inode is None:
                draft.write()
                if waiter is not None:
                    waiter.answer(None, Stale(f"inode {ino} has gone"))
                return
            finish(draft, inode)
            if waiter is None or waiter.call is None:
                draft.write()
                return
            reply = AttrsReply(inode.attrs())
            try:
                waiter.call.commit(draft, reply)
            except FsError as error:
                waiter.answer(None, error)
                raise
            waiter.answer(reply, None)

        await persist(f"end of the truncation of inode {ino}", attempt)
        self._locks.release({disk.key(disk.TRUNCATING, ino): True})
        if ino in self.doubtful and not self._opens.count(ino):
            self.settle(ino)  # the last one has closed it meanwhile

    def doubt(self, draft: Draft, ino: int) -> None:
        """Note with the draft that a file is doubtful. Blocked while it is being truncated."""
        self._locks.check_exclusive(disk.key(disk.TRUNCATING, ino))
        draft.put(disk.key(disk.TRUNCATING, ino), _DOUBTFUL)
        draft.after_write.append(lambda: self.doubtful.add(ino))

    def suspect(self, inos: Iterable[int]) -> None:
        """Take files for doubtful at once, in memory; ``doubt`` follows for each."""
        self.doubtful.update(inos)

    def settle(self, ino: int) -> None:
        """Begin to settle a doubtful file that nobody has open. A truncation under way does it by itself."""
        try:
            self._locks.take({disk.key(disk.TRUNCATING, ino): True})
        except Blocked:
            return
        self._jobs.start(self._settle, ino)

    async def _settle(self, ino: int) -> None:
        inode = self._inodes.find(ino)
        left = 0
        if inode is not None:
            request = TrimChunks(ino, *divmod(inode.size, inode.chunk_size))
            left = sum(reply.left for reply in await self._trim(request, self._inodes.daemons, None))

        def finish(draft: Draft, inode: Inode) -> None:
            if inode.allocated != left or inode.reach:
                inode.allocated, inode.reach = left, 0
                draft.stamp(inode)

        await self._end(ino, finish, None)

    @asynccontextmanager
    async def held_still(self, ino: int) -> AsyncIterator[bool]:
        """Let nobody publish to a file, cut it or open it for writing for a while.

        Yield whether all of it is published: nobody has it open for writing, and it is not doubtful.
        """
        wanted = {disk.key(disk.TRUNCATING, ino): True}
        await self._locks.acquire(wanted)
        try:
            yield not self._opens.written_by_others(ino, None) and ino not in self.doubtful
        finally:
            self._locks.release(wanted)
            if ino in self.doubtful and not self._opens.count(ino):
                self.settle(ino)  # the last one has closed it meanwhile

    async def settle_now(self, ino: int) -> None:
        """Settle a file that nobody has open as if it were doubtful, and wait for the end of that."""
        wanted = {disk.key(disk.TRUNCATING, ino): True}
        while True:
            try:
                draft = self._inodes.draft()
                self.doubt(draft, ino)
                draft.write()
                break
            except Blocked as blocked:
                await blocked.released.wait()
        if not self._opens.count(ino):
            self.settle(ino)
            await self._locks.acquire(wanted)
            self._locks.release(wanted)

    def bury(self, draft: Draft, ino: int) -> bool:
        """Forget with the draft about an inode that is dead; tell whether its chunks may lie anywhere."""
        if ino not in self.doubtful:
            return False
        draft.delete(disk.key(disk.TRUNCATING, ino))
        draft.after_write.append(lambda: self.doubtful.discard(ino))
        return True

    def recover(self) -> None:
        """Lock the files whose truncation was under way and finish it; remember the doubtful ones. Once."""
        found = []
        for key, value in self._inodes.store.scan(disk.TRUNCATING, disk.after(disk.TRUNCATING)):
            ino = disk.number(key)
            if value.startswith(_DOUBTFUL):
                self.doubtful.add(ino)
            if len(value) > 1:
                self._locks.take({key: True})
                found.append(decode(SetAttr, value[1:]))
        if found:
            self._jobs.start(self._finish_found, found)

    async def _finish_found(self, found: Sequence[SetAttr]) -> None:
        await each(lambda request: self._cut(request, None), found)
        _log.info("truncations that were under way before this start: %d finished", len(found))

    def review(self) -> None:
        """Settle the doubtful files that nobody has open: asked for when nobody may reclaim any more."""
        for ino in list(self.doubtful):
            if not self._opens.count(ino):
                self.settle(ino)
