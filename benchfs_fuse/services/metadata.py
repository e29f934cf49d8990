"""Be a daemon's names and attributes: which request is served by what, and what happens at start and as sessions end.

A request is tried *at once*, by synchronous code; most are answered so. Where that is not possible, because a lock is
held, other daemons are needed or chunks have to go first, it is served *later*, by a task that may wait.

RPCs per operation, as a client sees it, requests between daemons included; the sum for the worst common case. P stands
for a participant, another daemon whose entries or inodes change: 2 RPCs each (services/transactions.py).

    Lookup                  1; and GetAttr to the inode's daemon if that is another one
    GetAttr, ReadDir, ...   1
    Make                    1; a directory that goes to another daemon: 1 + P = 3
    Unlink, Rmdir           1; inode at another daemon: 1 + P = 3
    Link                    1; inode at another daemon: 1 + GetAttr + P = 4
    Rename of a file        1 within one daemon; into a directory of another: 1 + Lookup + P = 4; and P more for each
                            further daemon that holds the moved or the replaced inode
    Rename of a directory   in its parent: 1, + P if its inode is elsewhere. Into another directory, at the root's
                            daemon: 1, + 1 if it was sent elsewhere first, + 2 Lookup if the old parent is elsewhere and
                            1 if the new one is, + GetAttr for each directory elsewhere between the new parent and
                            the root, + P each
    SetAttr                 1; to a smaller size: + TrimChunks to each daemon with chunks of the file
    last Unlink or Release  behind the reply: DropChunks to each daemon with chunks, shared by all files of a page
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import trio

from ..errors import FsError
from ..layout import ShardMap
from ..model import ClientId
from ..ports import ChunkInspector, ChunkStore, KeyValueStore
from ..rpc.messages import (
    Append,
    Body,
    CommitWrite,
    Done,
    Finish,
    GetAttr,
    GetXattr,
    InDoubt,
    Link,
    ListXattr,
    Lookup,
    Make,
    Open,
    OpenCount,
    Prepare,
    ReadDir,
    ReadLink,
    Release,
    RemoveXattr,
    Rename,
    Request,
    Rmdir,
    Secure,
    SetAttr,
    SetXattr,
    SyncMeta,
    Touch,
    Unlink,
)
from .attributes import Attributes
from .calls import Call, Opens, Peers
from .inodes import Inodes
from .inspection import Inspection
from .jobs import Jobs, persist
from .locks import Blocked, Locks
from .names import Names
from .reaper import Reaper
from .recounting import Recounting
from .transactions import Transactions
from .truncations import Truncations
from .xattrs import Xattrs

#: Seconds that the other daemons have to be prepared for a transaction before it is given up: what it has locked
#: already must not stay locked for as long as one of them is dead.
PREPARE_TIMEOUT_S = 20.0
#: Inodes that a session has open are released so many at a time, then others have their turn.
RELEASES_MAX = 64

#: Serve at once; None: serve later.
Now = Callable[[Any, Call], Body | None]
Later = Callable[[Any, Call], Awaitable[Body]]


class _Operation(NamedTuple):
    """Say what serves a request: at once if it can, and waiting where it has to."""

    now: Now
    later: Later


def _patient(now: Now, else_: Later | None = None) -> _Operation:
    """Let a request that only locks can hold up wait for them, and hand over to ``else_`` where that is not enough."""

    async def serve(request: Request, call: Call) -> Body:
        while True:
            try:
                reply = now(request, call)
            except Blocked as blocked:
                await blocked.released.wait()
            else:
                break
        if reply is not None:
            return reply
        assert else_ is not None
        return await else_(request, call)

    return _Operation(now, serve)


def _synced(now: Now, store: KeyValueStore) -> _Operation:
    """Let a request be answered when what it has written is on stable storage."""
    patient = _patient(now)

    async def serve(request: Request, call: Call) -> Body:
        reply = await patient.later(request, call)
        await store.sync()
        return reply

    return _Operation(lambda request, call: None, serve)


class MetadataService:
    """Serve names and attributes out of one store, whose ``incarnation`` ``open_store`` returned.

    ``recover`` comes first, then ``run`` and the requests. ``clock`` returns ns since the epoch. Errors are raised
    (FsError).
    """

    def __init__(
        self,
        store: KeyValueStore,
        *,
        daemon_id: int,
        incarnation: int,
        shard_map: ShardMap,
        opens: Opens,
        peers: Peers,
        clock: Callable[[], int],
        prepare_timeout_s: float = PREPARE_TIMEOUT_S,
    ) -> None:
        self._store = store
        self._opens = opens
        self._peers = peers
        self._jobs = Jobs()
        self._locks = Locks()
        self._inodes = inodes = Inodes(store, daemon_id, shard_map, clock)
        self._truncations = Truncations(inodes, self._locks, peers, opens, self._jobs)
        self._reaper = Reaper(inodes, opens, peers, self._jobs, self._truncations)
        self._transactions = Transactions(
            inodes, self._locks, peers, self._jobs, incarnation, self._reaper.unlinked, prepare_timeout_s
        )
        self._names = Names(inodes, self._locks, opens, peers, self._transactions, incarnation)
        self._attributes = Attributes(inodes, self._locks, opens, self._truncations.doubt, self._closed)
        self._operations = self._table()
        #: Set when what nobody may reclaim any more has been looked at.
        self._reviewed = trio.Event()

    def inspection(self, chunks: ChunkStore, inspector: ChunkInspector) -> Inspection:
        """Return what shows others this daemon's records and chunks."""
        return Inspection(
            self._inodes,
            self._locks,
            self._opens,
            self._peers,
            self._reaper,
            self._truncations,
            self._reviewed,
            chunks,
            inspector,
        )

    def recounting(self, inspector: ChunkInspector) -> Recounting:
        """Return what makes good what a power cut took."""
        return Recounting(
            self._inodes, self._peers, self._jobs, self._truncations, self._reaper, self._reviewed, inspector
        )

    def _table(self) -> dict[type[Request], _Operation]:
        names, attributes, xattrs, transactions = (
            self._names,
            self._attributes,
            Xattrs(self._inodes),
            self._transactions,
        )
        return {
            Lookup: _patient(names.lookup),
            ReadDir: _patient(names.readdir),
            Make: _Operation(names.now(names.make), names.later(names.make)),
            Unlink: _Operation(names.now(names.unlink), names.later(names.unlink)),
            Rmdir: _Operation(names.now(names.rmdir), names.later(names.rmdir)),
            Link: _Operation(names.now(names.link), names.later(names.link)),
            Rename: _Operation(names.now(names.rename), names.later(names.rename, names.move)),
            GetAttr: _patient(attributes.getattr),
            SetAttr: _patient(attributes.setattr, self._truncations.truncate),
            CommitWrite: _patient(attributes.commit_write),
            Append: _patient(attributes.append),
            Touch: _patient(attributes.touch),
            Open: _patient(attributes.open),
            Release: _patient(attributes.release),
            ReadLink: _patient(attributes.readlink),
            GetXattr: _patient(xattrs.get),
            ListXattr: _patient(xattrs.names),
            SetXattr: _patient(xattrs.set),
            RemoveXattr: _patient(xattrs.remove),
            SyncMeta: _Operation(lambda request, call: None, self._sync),
            Prepare: _synced(transactions.prepare, self._store),
            Finish: _patient(transactions.finish),
            Secure: _synced(transactions.secure, self._store),
            InDoubt: _patient(transactions.in_doubt),
        }

    def handlers_now(self) -> Mapping[type[Request], Now]:
        """Return what answers requests at once; where it returns None nothing has happened, and ``handlers`` serves."""

        def attempt(now: Now) -> Now:
            def serve(request: Request, call: Call) -> Body | None:
                try:
                    return now(request, call)
                except Blocked:
                    return None

            return serve

        return {cls: attempt(operation.now) for cls, operation in self._operations.items()}

    def handlers(self) -> Mapping[type[Request], Later]:
        """Return what serves requests, waiting where it has to.

        A handler that is cancelled has done nothing, or all and recorded it; a truncation goes on and can be repeated.
        """
        return {cls: operation.later for cls, operation in self._operations.items()}

    async def _sync(self, request: SyncMeta, call: Call) -> Body:
        del request, call
        await self._store.sync()
        return Done()

    # ── start, sessions, rest ────────────────────────────────────────────────────────────────────────────────────────

    def recover(self) -> None:
        """Take up what earlier incarnations left: locks first, so that requests can be served when this returns.

        The store is to be synced before they are: nobody may get the number of this start, or of its inodes, again.
        """
        self._inodes.begin()
        self._transactions.recover()
        self._truncations.recover()
        self._reaper.recover()

    def grace_ended(self) -> None:
        """Tell that nobody may reclaim handles any more: what nobody has open goes. Also to be called without grace."""

        async def review() -> None:
            await self._reaper.review()
            self._truncations.review()
            self._reviewed.set()

        self._jobs.start(persist, "the review of open files", review)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do what goes on behind replies, until cancelled."""
        await self._jobs.run(task_status=task_status)

    async def wait_done(self, request: Request) -> None:
        """Wait until every daemon has done its part of a request whose outcome an earlier incarnation recorded."""
        await self._transactions.wait_told()
        if isinstance(request, SetAttr) and request.size is not None:
            await self._truncations.wait_cut(request.ino)

    async def wait_idle(self) -> None:
        """Wait until nothing goes on behind replies."""
        await self._jobs.wait_idle()

    async def session_ended(self, client_id: ClientId, opens: Sequence[OpenCount], clean: bool) -> None:
        """Release what a session has open. Unless it ended ``clean``, the files it wrote to are doubtful.

        The client must have been fenced at every daemon before. May be called again after a crash or cancellation.
        """
        if not clean:
            self._truncations.suspect(one.ino for one in opens if one.writers)
        blocked = list(opens)
        while blocked:
            todo, blocked = blocked, []
            waiting: Blocked | None = None
            for position, one in enumerate(todo):
                try:
                    self._release(client_id, one, clean)
                except Blocked as error:
                    waiting = error
                    blocked.append(one)
                if position % RELEASES_MAX == RELEASES_MAX - 1:
                    await trio.lowlevel.checkpoint()
            if waiting is not None:
                await waiting.released.wait()

    def _release(self, client_id: ClientId, one: OpenCount, clean: bool) -> None:
        draft = self._inodes.draft()
        inode = draft.find(one.ino)
        if one.writers and not clean and inode is not None and inode.is_file:
            self._truncations.doubt(draft, one.ino)
        self._opens.remove(draft, client_id, one.ino, one.readers, one.writers)
        draft.write()
        self._closed(one.ino)

    def _closed(self, ino: int) -> None:
        """Look at an inode of which a handle was released: what becomes of it if it was the last.

        The release itself is done: what fails here is tried again behind the reply.
        """
        try:
            self._look_after(ino)
        except FsError:

            async def again() -> None:
                self._look_after(ino)

            self._jobs.start(persist, f"the end of inode {ino}", again)

    def _look_after(self, ino: int) -> None:
        if self._opens.count(ino):
            return
        inode = self._inodes.find(ino)
        if inode is not None and inode.nlink == 0:
            self._reaper.bury(ino)
        elif ino in self._truncations.doubtful:
            self._truncations.settle(ino)

    @property
    def orphans(self) -> int:
        """Count the inodes without a name that somebody has open."""
        return self._reaper.orphans

    @property
    def to_drop(self) -> int:
        """Count the dead files whose chunks are not yet dropped everywhere."""
        return self._reaper.to_drop

    @property
    def prepared(self) -> int:
        """Count the transactions of other daemons that wait here for their end."""
        return self._transactions.prepared_count

    @property
    def locked(self) -> int:
        """Count the locks held."""
        return len(self._locks)
