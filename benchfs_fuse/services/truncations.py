"""Cut files: one step for whoever looks at them, and what lay behind a cut never appears again.

A truncation holds the lock P of its inode: nobody publishes data, changes the size or opens the file for writing
meanwhile. First one batch sets the size, writes the P record and records the client's outcome: from then on the file is
shorter for everybody, and its ``reach`` tells how far its chunks still go. Then the chunks behind the cut go, and one
batch more sets the allocated space and drops the P record. After a crash the record is found, the lock taken before
anything is served, and the truncation finished. A retry is answered when it is: what its client writes next must not be
cut off.

*Doubtful* is a file to which a client wrote that died, or that says its writes failed: data that was never published
may lie behind the size, on any daemon, and must never appear. So is a file that was cut while other clients had it
open for writing: what they publish then may count blocks that the cut took away. When nobody has the file open any more
it is *settled*: truncated to the size it has, on all daemons, its allocated bytes counted anew; what was allocated
behind the size on purpose goes, too. (While others have it open, that would destroy what they have written and not yet
published.) A P record remembers the doubt.

    P value  offset 0, 1: 1 if the file is doubtful, else 0
             offset 1, 1: 1 if it is being truncated, else missing

What other daemons have cut is on stable storage before the record goes: else a power cut there would bring old bytes
back into a file that has grown again. A power cut here may take the whole truncation back, and the bytes are gone all
the same: what was cut off and not synced is then zeros.

All daemons that hold chunks of the file are asked, not only those behind the cut: what they have left is the file's
allocated space, however often they were asked.

RPCs of a truncation: one TrimChunks to each daemon that holds chunks of the file; of a doubtful one, to every daemon.
"""

import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from .. import disk
from ..errors import FsError, Stale
from ..model import Attrs, ClientId
from ..rpc.messages import AttrsReply, Body, SetAttr, TrimChunks, TrimChunksReply
from .attributes import change, cuts
from .calls import Call, Opens, Peers
from .inodes import Draft, Inode, Inodes
from .jobs import Jobs, persist
from .locks import Blocked, Locks
from .parallel import each

_log = logging.getLogger(__name__)

_CERTAIN = b"\0"
_DOUBTFUL = b"\1"
_CUT = b"\1"


class _Waiter:
    """Stand for the client that waits for a truncation; ``client_id`` is None once it has gone or been answered."""

    def __init__(self, client_id: ClientId) -> None:
        self.client_id: ClientId | None = client_id
        self.answered = trio.Event()
        self.error: FsError | None = None
        self.attrs: Attrs | None = None

    def answer(self, answer: Attrs | FsError) -> None:
        """Take an answer, if it is the first, and go on."""
        if self.answered.is_set():
            return
        self.client_id = None
        if isinstance(answer, FsError):
            self.error = answer
        else:
            self.attrs = answer
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
        """Change attributes, the size to a smaller one among them. It goes on if cancelled.

        An error of a daemon is the client's at once; it is tried again behind the client's back until it is done.
        """
        wanted = {disk.key(disk.TRUNCATING, request.ino): True}
        await self._locks.acquire(wanted)
        try:
            draft = self._inodes.draft()
            inode = draft.inode(request.ino)
            assert request.size is not None
            cut = cuts(inode, request.size)  # somebody may have been faster
            if cut:
                inode.reach = inode.end
                doubt = _DOUBTFUL if request.ino in self.doubtful else _CERTAIN
                draft.put(disk.key(disk.TRUNCATING, request.ino), doubt + _CUT)
            change(draft, inode, request)
            reply = AttrsReply(inode.attrs())
            call.commit(draft, reply)
        except BaseException:
            self._locks.release(wanted)
            raise
        if not cut:
            self._locks.release(wanted)
            return reply
        waiter = _Waiter(call.client_id)
        self._jobs.start(self._cut, request.ino, waiter)
        try:
            await waiter.answered.wait()
        finally:
            waiter.client_id = None
        if waiter.error is not None:
            raise waiter.error
        assert waiter.attrs is not None
        return AttrsReply(waiter.attrs)

    async def wait_cut(self, ino: int) -> None:
        """Wait until no truncation of an inode is under way."""
        await self._locks.wait_free({disk.key(disk.TRUNCATING, ino): True})

    async def _cut(self, ino: int, waiter: _Waiter | None) -> None:
        """Let the chunks behind the size go of a file whose lock is held and whose record is written."""
        inode = self._inodes.find(ino)
        left = 0
        if inode is not None:
            request = TrimChunks(ino, *divmod(inode.size, inode.chunk_size))
            left = sum(reply.left for reply in await self._trim(request, self._holders(inode), waiter))
        await self._end(ino, left, waiter)

    def _holders(self, inode: Inode) -> Iterable[int]:
        """Return the daemons on which chunks of a file may be."""
        if inode.ino in self.doubtful:
            return self._inodes.daemons
        chunks = range(-(-inode.end // inode.chunk_size))
        return self._inodes.shard_map.of_chunks(inode.ino, chunks, inode.width)

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
                        waiter.answer(error)
                    raise

            await persist(f"TrimChunks of inode {request.ino} at daemon {daemon}", attempt)

        await each(one, daemons)
        return replies

    async def _end(self, ino: int, left: int, waiter: _Waiter | None) -> None:
        """Write the end of a truncation, after which ``left`` bytes are allocated, unlock, and answer the client.

        Other clients that have the file open for writing may have lost blocks that they are going to count: it is
        doubtful until they have closed it.
        """
        client_id = waiter.client_id if waiter is not None else None

        async def attempt() -> None:
            draft = self._inodes.draft()
            inode = draft.find(ino)
            if inode is not None and self._opens.written_by_others(ino, client_id):
                draft.put(disk.key(disk.TRUNCATING, ino), _DOUBTFUL)
                draft.after_write.append(lambda: self.doubtful.add(ino))
            else:
                draft.delete(disk.key(disk.TRUNCATING, ino))
                draft.after_write.append(lambda: self.doubtful.discard(ino))
            if inode is not None:
                if left > inode.allocated:  # that it is less is seen without a new version (services/known.py)
                    draft.stamp(inode)
                inode.allocated, inode.reach = left, 0
                draft.changed(inode)
            try:
                draft.write()
            except FsError as error:
                if waiter is not None:
                    waiter.answer(error)
                raise
            if waiter is not None:
                waiter.answer(Stale(f"inode {ino} has gone") if inode is None else inode.attrs())

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
        self._jobs.start(self._cut, ino, None)

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
        await self.wait_cut(ino)
        draft = self._inodes.draft()
        self.doubt(draft, ino)
        draft.write()
        if not self._opens.count(ino):
            self.settle(ino)
            await self.wait_cut(ino)

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
                found.append(disk.number(key))
        if found:
            self._jobs.start(self._finish_found, found)

    async def _finish_found(self, found: Sequence[int]) -> None:
        await each(lambda ino: self._cut(ino, None), found)
        _log.info("truncations that were under way before this start: %d finished", len(found))

    def review(self) -> None:
        """Settle the doubtful files that nobody has open: asked for when nobody may reclaim any more."""
        for ino in list(self.doubtful):
            if not self._opens.count(ino):
                self.settle(ino)
