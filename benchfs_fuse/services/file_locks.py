"""Be the advisory locks of one mount: ask their daemons, wait, and know what is held.

**What is where.** The table of an inode's daemon decides (services/advisory.py). ``_Lane`` is one owner's locks of one
kind on one inode, as far as this mount knows them: what it reclaims from a daemon that was started anew, what a release
has to give back (an owner that holds nothing costs no request), and what an interrupted request has to restore.

**Order.** A retry must never bring back a lock that was given back since, or the reverse. Nothing of the recorded
requests is needed for that: their slots recognise a retry, but do not order two requests, and cost a transaction each;
and here every request may be applied twice. Three things suffice:

- A lane has at most one request under way (``order``); the next leaves when the last is answered. So a request that is
  sent again is always the newest of its lane.
- A request is never given up while its lane lives: it is sent by a task of its own, without a deadline. Whoever waits
  for it may leave, at his deadline or by cancellation; the task goes on.
- A request of an old connection is not served once a new one is (services/sessions.py).

**Waiting.** The answer to a request may be that it waits. Then it is under way no more, and others of its lane may
follow: another thread may give back what the waited for need. LockGranted tells its end. As this is no answer, it may
overtake or be overtaken by answers, and what a lane holds would be unclear. So every change has the daemon's version;
while anything of the lane waits, each byte remembers its newest change, and an older one does not touch it.

**A lost connection** may have taken a LockGranted along, and a daemon that was started anew knows of no waiting. So
everything that waits asks again over each new connection: with its ticket it keeps its place, if it still has one, and
if it was granted meanwhile, it gets what its owner has already.

**Leaving.** Whoever leaves leaves nothing behind. First a CancelLock; if that comes too late, the request may have been
granted (it has not, if the daemon was started anew). Then every byte of it is set to what the lane held, without giving
up any in between. One case can be refused, an exclusive lock that was downgraded by the request; then it stays shared.
Other requests of the lane that waited for the same bytes ask again if their grant was older than that.

**Errors.** WouldBlock, Deadlock, NoLocks; Stale: the file or the session is lost; DaemonUnreachable: the daemon did not
answer before the deadline of the links, and the request is taken back when it does. To wait for a lock takes as long as
it takes.
"""

import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import trio

from ..errors import DaemonUnreachable, FsError, InvalidArgument, Stale, WouldBlock
from ..layout import ShardMap
from ..model import LOCK_END, LockKind, LockType
from ..rpc.client import Links
from ..rpc.messages import (
    LOCK_GRANTED,
    LOCK_QUEUED,
    LOCK_REFUSED,
    CancelLock,
    CancelLockReply,
    GetLock,
    GetLockReply,
    LockClaim,
    LockGranted,
    LockReply,
    SetLock,
)
from .advisory import Ranges
from .deadline import before_waiting
from .parallel import background

log = logging.getLogger(__name__)


class LocksStatistics(NamedTuple):
    """Count what a mount knows of locks; all zero when nothing is held and nothing waits."""

    #: Owners that hold something or ask for it, for each inode and kind.
    owners: int
    #: Ranges held.
    ranges: int
    #: Requests that may have to wait.
    waiting: int


class _Mark(NamedTuple):
    """Describe the newest change of a range; UNLOCK is kept while older ones may still come."""

    type: LockType
    pid: int
    version: int


class _Lane:
    """Hold one owner's locks of one kind on one inode."""

    def __init__(self, ino: int, owner: int, kind: LockKind) -> None:
        self.ino = ino
        self.owner = owner
        self.kind = kind
        #: Held by the task whose request is under way.
        self.order = trio.Lock()
        #: Tasks and requests that need the lane.
        self.users = 0
        #: Something has waited since the lane was last without users: changes may be heard of in another order.
        self.unordered = False
        #: Version of the newest restoration.
        self.restored = 0
        self._marks: Ranges[_Mark] = Ranges()

    def note(self, type_: LockType, start: int, end: int, pid: int, version: int) -> None:
        """Take note of a change."""
        if self.unordered:
            mark = _Mark(type_, pid, version)
            self._marks.change(start, end, lambda old: old if old is not None and old.version > version else mark)
        else:
            plain = _Mark(type_, pid, 0) if type_ is not LockType.UNLOCK else None
            self._marks.change(start, end, lambda old: plain)

    def settle(self) -> None:
        """Forget in which order the changes came: there will be no older one."""
        if self.unordered:
            self.unordered = False
            self._marks.change(
                0,
                LOCK_END,
                lambda old: old._replace(version=0) if old is not None and old.type is not LockType.UNLOCK else None,
            )

    def held(self, start: int = 0, end: int = LOCK_END) -> Iterator[tuple[int, int, LockType, int]]:
        """Yield the ranges that are held: first and last byte, type, pid."""
        for first, last, mark in self._marks.overlapping(start, end):
            if mark.type is not LockType.UNLOCK:
                yield first, last, mark.type, mark.pid

    def segments(self, start: int, end: int) -> list[tuple[int, int, LockType, int]]:
        """Divide bytes into those held and those not (UNLOCK)."""
        return [
            (first, last, mark.type, mark.pid) if mark is not None else (first, last, LockType.UNLOCK, 0)
            for first, last, mark in self._marks.segments(start, end)
        ]

    def clear(self) -> None:
        """Forget everything: the daemon has."""
        self._marks = Ranges()


class _Attempt:
    """Be one request for a lock, or to unlock."""

    def __init__(self, lane: _Lane, request: SetLock) -> None:
        self.lane = lane
        self.request = request
        self.sent = False
        #: Set when the daemon has said that it waits, or anything final.
        self.answered = trio.Event()
        self.done = trio.Event()
        self.error: FsError | None = None
        #: Nobody waits for it any more.
        self.left = False

    def finish(self, error: FsError | None = None) -> None:
        """Let whoever waits for it go on."""
        if not self.done.is_set():
            self.error = error
            self.answered.set()
            self.done.set()


class FileLocks:
    """Lock the files of one mount. Made by ``open_locks``.

    ``owner`` is any number of 64 bits that names whose a lock is, unique within the mount. The file must be open here.
    """

    def __init__(self, links: Links, nursery: trio.Nursery) -> None:
        self._links = links
        self._map: ShardMap = links.shard_map
        self._nursery = nursery
        self._lanes: dict[tuple[int, int, LockKind], _Lane] = {}
        self._tickets = itertools.count(1)
        #: Requests that may have to wait, by ticket, until they are granted, refused or taken back.
        self._waiting: dict[int, _Attempt] = {}

    async def set(
        self,
        ino: int,
        owner: int,
        kind: LockKind,
        type_: LockType,
        start: int = 0,
        end: int = LOCK_END,
        wait: bool = True,
        pid: int = 0,
    ) -> None:
        """Lock or unlock bytes ``start`` to ``end``, that one included (LOCK_END: however long the file gets).

        WouldBlock: somebody else has it, and ``wait`` is false. Cancelled: everything is, or soon will be, as before,
        but for an unlock, which is done. Returns, also to a task that was cancelled, if the lock was granted before.
        """
        if not 0 <= start <= end <= LOCK_END:
            raise InvalidArgument(f"lock of bytes {start} to {end}")
        lane = self._lane(ino, owner, kind)
        ticket = next(self._tickets) if wait and type_ is not LockType.UNLOCK else 0
        attempt = _Attempt(lane, SetLock(ino, kind, owner, type_, start, end, pid, ticket))
        if ticket:
            self._waiting[ticket] = attempt
            lane.users += 1
            lane.unordered = True
        self._start(lane, self._ask, attempt)
        try:
            before_waiting()
            with trio.move_on_after(self._links.op_timeout_s):
                await attempt.answered.wait()
            if not attempt.answered.is_set():
                raise DaemonUnreachable(f"no answer to a lock in {self._links.op_timeout_s} s")
            if not attempt.done.is_set():
                await attempt.done.wait()
        except (trio.Cancelled, DaemonUnreachable):
            if not attempt.done.is_set():
                attempt.left = True
                self._start(lane, self._take_back, attempt)
                raise
            # It ended in the very step in which it was cancelled. So it has happened, and whoever asked has to know:
            # the cancellation waits for him at his next checkpoint.
        self._forget(attempt)
        if attempt.error is not None:
            raise attempt.error

    async def get(
        self, ino: int, owner: int, type_: LockType, start: int, end: int
    ) -> tuple[LockType, int, int, int] | None:
        """Return a POSIX lock of another owner that is in the way of one: type, first and last byte, pid.

        The pid is 0 if the other is on another host.
        """
        request = GetLock(ino, LockKind.POSIX, owner, type_, start, end)
        holder = (await self._links.to(self._daemon(ino)).call(request, GetLockReply)).holder
        return (holder.type, holder.start, holder.end, holder.pid) if holder is not None else None

    def knows(self, ino: int, owner: int, kind: LockKind) -> bool:
        """Tell whether an owner may hold something of an inode, or is about to."""
        return (ino, owner, kind) in self._lanes

    async def drop(self, ino: int, owner: int, kind: LockKind) -> None:
        """Give back everything that an owner holds of an inode; what it waits for goes on waiting.

        Costs nothing if it holds nothing.
        """
        if self.knows(ino, owner, kind):
            with suppress(Stale):  # then the daemon has dropped it already
                await self.set(ino, owner, kind, LockType.UNLOCK)

    def not_held(self, ino: int, owner: int, kind: LockKind, start: int, end: int) -> list[tuple[int, int]]:
        """Return those ranges of bytes (first and last) of which an owner holds nothing now."""
        lane = self._lanes.get((ino, owner, kind))
        if lane is None:
            return [(start, end)]
        return [(first, last) for first, last, type_, _ in lane.segments(start, end) if type_ is LockType.UNLOCK]

    # ── lanes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _daemon(self, ino: int) -> int:
        try:
            return self._map.of_ino(ino)
        except ValueError as error:
            raise Stale(str(error)) from None

    def _lane(self, ino: int, owner: int, kind: LockKind) -> _Lane:
        self._daemon(ino)
        lane = self._lanes.get((ino, owner, kind))
        if lane is None:
            lane = self._lanes[ino, owner, kind] = _Lane(ino, owner, kind)
        return lane

    def _start(self, lane: _Lane, function: Callable[[_Attempt], Awaitable[None]], attempt: _Attempt) -> None:
        """Run a task that needs the lane."""

        async def run() -> None:
            try:
                async with lane.order:
                    await function(attempt)
            finally:
                self._leave(lane)

        lane.users += 1
        self._nursery.start_soon(run)

    def _leave(self, lane: _Lane) -> None:
        """Count one user less; the last one forgets a lane that holds nothing."""
        lane.users -= 1
        if not lane.users:
            lane.settle()
            if next(lane.held(), None) is None:
                del self._lanes[lane.ino, lane.owner, lane.kind]

    def _forget(self, attempt: _Attempt) -> None:
        """Await no more news of a request."""
        if self._waiting.pop(attempt.request.ticket, None) is not None:
            self._leave(attempt.lane)

    # ── requests; each holds the lane's order ────────────────────────────────────────────────────────────────────────

    async def _send(self, lane: _Lane, request: SetLock) -> LockReply:
        """Send a request, for as long as it takes, and note what it changed but for a lock: that is the caller's."""
        try:
            reply = await self._links.to(self._daemon(lane.ino)).call(request, LockReply, patient=True)
        except Stale:
            lane.clear()
            raise
        if request.type is LockType.UNLOCK or (lane.kind is LockKind.FLOCK and reply.outcome != LOCK_GRANTED):
            lane.note(LockType.UNLOCK, request.start, request.end, 0, reply.version)
        return reply

    async def _ask(self, attempt: _Attempt) -> None:
        """Send a request, for the first time or to hear whether it was granted."""
        lane, request = attempt.lane, attempt.request
        if attempt.done.is_set() or (attempt.left and request.type is not LockType.UNLOCK):
            return
        if request.type is LockType.UNLOCK and next(lane.held(request.start, request.end), None) is None:
            attempt.finish()
            return
        attempt.sent = True
        try:
            reply = await self._send(lane, request)
        except FsError as error:
            attempt.finish(error)
            return
        if reply.outcome == LOCK_GRANTED:
            self._granted(attempt, reply.version)
        elif reply.outcome == LOCK_REFUSED:
            attempt.finish(WouldBlock(f"inode {request.ino}, bytes {request.start} to {request.end}"))
        else:
            assert reply.outcome == LOCK_QUEUED and request.ticket
            attempt.answered.set()

    def _granted(self, attempt: _Attempt, version: int) -> None:
        """Take a lock, unless nobody wants it any more: then it is on its way back."""
        request = attempt.request
        if attempt.done.is_set() or (attempt.left and request.type is not LockType.UNLOCK):
            return
        if request.type is not LockType.UNLOCK:
            attempt.lane.note(request.type, request.start, request.end, request.pid, version)
        attempt.finish()

    async def _take_back(self, attempt: _Attempt) -> None:
        """Undo a request that nobody waits for any more."""
        request = attempt.request
        try:
            if attempt.sent and not attempt.done.is_set() and request.type is not LockType.UNLOCK:
                await self._undo(attempt.lane, request)
        except FsError as error:
            log.log(
                logging.INFO if isinstance(error, Stale) else logging.WARNING,
                "inode %d: a lock could not be taken back: %s",
                request.ino,
                error,
            )
        finally:
            self._forget(attempt)

    async def _undo(self, lane: _Lane, request: SetLock) -> None:
        """Let a request wait no more; if it was granted, restore what the lane held of its bytes."""
        if request.ticket:
            link = self._links.to(self._daemon(lane.ino))
            if (await link.call(CancelLock(request.ticket), CancelLockReply, patient=True)).waiting:
                return
        for start, end, type_, pid in lane.segments(request.start, request.end):
            again = SetLock(lane.ino, lane.kind, lane.owner, type_, start, end, pid, 0)
            reply = await self._send(lane, again)
            if reply.outcome != LOCK_GRANTED and lane.kind is LockKind.POSIX:
                type_ = LockType.READ
            if type_ is not LockType.UNLOCK and (reply.outcome == LOCK_GRANTED or lane.kind is LockKind.POSIX):
                lane.note(type_, start, end, pid, reply.version)
            lane.restored = reply.version

    # ── what the daemons tell ────────────────────────────────────────────────────────────────────────────────────────

    def granted(self, daemon_id: int, told: LockGranted) -> None:
        """Take note of LockGranted."""
        del daemon_id
        attempt = self._waiting.get(told.ticket)
        if attempt is None:
            return
        if told.version <= attempt.lane.restored:
            self._start(attempt.lane, self._ask, attempt)
        else:
            self._granted(attempt, told.version)

    def reconnected(self, daemon_id: int) -> None:
        """Ask again for everything that waits at a daemon, in the order in which it was asked for."""
        for attempt in list(self._waiting.values()):
            if self._daemon(attempt.lane.ino) == daemon_id:
                self._start(attempt.lane, self._ask, attempt)

    def claims(self) -> list[LockClaim]:
        """List all locks: for a daemon that was started anew."""
        return [
            LockClaim(lane.ino, lane.kind, lane.owner, type_, start, end, pid)
            for lane in self._lanes.values()
            for start, end, type_, pid in lane.held()
        ]

    async def run(self) -> None:
        """Wait for the end of the session, and let everybody go who waits for a lock then."""
        await self._links.expelled.wait()
        for attempt in list(self._waiting.values()):
            attempt.finish(Stale(f"this client was expelled: {self._links.expelled_why}"))

    def statistics(self) -> LocksStatistics:
        """Count what is held and what waits."""
        lanes = self._lanes.values()
        return LocksStatistics(len(lanes), sum(1 for lane in lanes for _ in lane.held()), len(self._waiting))


@asynccontextmanager
async def open_locks(links: Links) -> AsyncIterator[FileLocks]:
    """Run the locks of a mount for as long as its links."""
    async with background() as nursery:
        locks = FileLocks(links, nursery)
        links.locks, links.on_granted, links.on_connected = locks.claims, locks.granted, locks.reconnected
        nursery.start_soon(locks.run)
        yield locks
