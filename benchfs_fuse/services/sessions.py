"""Know the clients of this daemon: who they are, what they hold open, and when they have gone.

A session begins with ``Hello`` and survives broken connections and restarts of the daemon. It has at most one live
channel: a new one is served only when the old one's last request is over, so that no delayed request lands after its
retry. It ends

- with ``Goodbye``;
- when its process is certainly gone: its pidfd says so on this host; from elsewhere, the connection was ended over
  there and no new one came for RETURN_S;
- when nothing was heard of it for the lease, unless no other daemon was heard of either: then it is this one that is
  cut off;
- when another daemon says that it has ended there (``Expel``).

A session that held anything open here, or may have (it has not reclaimed yet), and ends without Goodbye is expelled
from every daemon before anything of it is given to others: its locks, the space of what it had open and unlinked, its
files, which are trimmed to their published size. Nothing that it still had under way, at whichever daemon, can land
behind that, and it reads nothing that has gone. That a client was expelled is remembered for ever (F records), what it
had open for writing until that is dealt with (W records), so that a crash in between is made good after the next start.

After a start, the sessions of the last incarnation have a lease's time to come back and reclaim their handles and
locks (the grace). Until all have done so, or have been ended, no inode counts as unused, and nobody gets a new lock.

Daemons are clients of each other too. Their sessions hold nothing and are not stored: they last as long as the channel.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec
import trio

from .. import disk
from ..errors import Disconnected, NotPermitted, Stale, TooManyOpen
from ..limits import OPENS_MAX, SESSIONS_MAX
from ..model import ClientId
from ..ports import Channel, Ending, KeyValueStore, Peer
from ..rpc.messages import (
    Body,
    Done,
    EntryReply,
    Expel,
    Forget,
    Goodbye,
    Heartbeat,
    Hello,
    HelloReply,
    LockGranted,
    Make,
    Open,
    OpenCount,
    Reclaim,
    ReclaimReply,
    Release,
    Request,
    SessionStatus,
    encode,
)
from .calls import Batch, Call, Peers
from .jobs import persist
from .lockserver import Known, LockServer
from .parallel import each

log = logging.getLogger(__name__)

#: What clients are.
KINDS = ("mount", "daemon", "tool")
#: Seconds that a client of another host has to come back after its connection was ended over there. Longer than the
#: longest pause of a client that lives (PAUSE_MAX_S of rpc/client.py).
RETURN_S = 5.0
#: A lease that is found to have run out this many seconds late shows that this daemon itself stood still (suspended,
#: stopped): what the clients sent meanwhile is not read yet, so that they get another lease.
STALL_S = 1.0
#: Part of the lease for which no other daemon has been heard of, each of which has a heartbeat every sixth, until this
#: one takes itself to be cut off; and how often, in a lease, it looks.
ISOLATED_PART = 0.5
ISOLATION_LOOKS = 12

#: Tell metadata that a session has ended: its open handles, and whether it ended with Goodbye. The callee removes them
#: (Opens.remove) and returns when all that follows is done or stored; what is left of them is removed then.
SessionEnded = Callable[[ClientId, Sequence[OpenCount], bool], Awaitable[None]]


class Process(Protocol):
    """Watch one process of this host."""

    async def wait_gone(self) -> None:
        """Wait until the process has ended."""
        ...

    def close(self) -> None:
        """Stop watching."""
        ...


class SessionRecord(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Be the value of an S record. ``seen_here``: the pid was one of this host when the client last said Hello."""

    kind: str
    label: str
    host: str
    pid: int
    boot_id: str
    seen_here: bool


class Session:
    """Hold what is known about one client. Changed by SessionTable and the server alone."""

    def __init__(self, client_id: ClientId, record: SessionRecord, reclaimed: bool) -> None:
        self.client_id = client_id
        self.record = record
        self.channel: Channel | None = None
        self.process: Process | None = None
        #: When the client was last heard of, and when its connection was ended over there (inf: it was not), trio time.
        self.heard_s = trio.current_time()
        self.left_s = float("inf")
        #: False while handles of the last incarnation of this daemon may come back.
        self.reclaimed = reclaimed
        #: Inodes that were named by Reclaim over the newest channel.
        self.named: set[int] = set()
        #: ino → [readers, writers]
        self.opens: dict[int, list[int]] = {}
        #: Newest sequence number seen in this incarnation, by slot.
        self.newest: dict[int, int] = {}
        #: Set when the session is ending: nothing of it is served or written any more.
        self.over = trio.Event()
        self.clean = False
        self.timer = trio.CancelScope()

    def writers(self) -> bool:
        """Tell whether anything is open for writing."""
        return any(writers for _, writers in self.opens.values())


class SessionTable:
    """Hold all sessions of this daemon, and who has which inode open (the Opens of services/calls.py).

    ``open_process`` gives a watch on a process of this host, None when there is no such pid; ``boot_id`` is this
    host's. ``run`` must be running before the first Hello is served.
    """

    def __init__(
        self,
        store: KeyValueStore,
        *,
        daemon_id: int,
        daemons: Iterable[int],
        incarnation: int,
        lease_s: float,
        map_version: int,
        boot_id: str,
        open_process: Callable[[int], Process | None],
        losses: int = 0,
    ) -> None:
        self._store = store
        self._daemon_id = daemon_id
        self._others = [other for other in sorted(set(daemons)) if other != daemon_id]
        self._hello_reply = HelloReply(incarnation, lease_s, map_version, losses)
        self._lease_s = lease_s
        self._boot_id = boot_id
        self._open_process = open_process
        self._sessions: dict[ClientId, Session] = {}
        #: No other daemon is heard of: this one is cut off, and its clients cannot help their silence.
        self._isolated = False
        #: Sessions of other daemons, by daemon number: a daemon that was started anew is another client.
        self._daemons: dict[int, Session] = {}
        self._by_channel: dict[Channel, Session] = {}
        self._counts: Counter[int] = Counter()
        self._unreclaimed: set[ClientId] = set()
        self._grace_over = trio.Event()
        self.locks = LockServer(incarnation, Known(self._has_open, self._same_host), self._tell_granted)
        self._nursery: trio.Nursery | None = None
        self._peers: Peers | None = None
        self._session_ended: SessionEnded | None = None

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(
        self,
        session_ended: SessionEnded,
        peers: Peers,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Take up the stored sessions, then watch over all until cancelled. Started: Hello may be served."""
        self._session_ended = session_ended
        self._peers = peers
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for key, value in self._store.scan(disk.SESSION, disk.after(disk.SESSION)):
                client_id = ClientId(disk.number(key))
                session = Session(client_id, msgspec.msgpack.decode(value, type=SessionRecord), reclaimed=False)
                self._sessions[client_id] = session
                self._unreclaimed.add(client_id)
                if self._fenced(client_id):
                    self._finish(session, clean=False, why="was being ended when this daemon stopped")
                elif session.record.seen_here and session.record.boot_id == self._boot_id:
                    session.process = self._open_process(session.record.pid)
                    if session.process is None:
                        self._finish(session, clean=False, why="its process has gone")
                nursery.start_soon(self._watch, session)
            self._check_grace()
            task_status.started()
            await self._watch_peers()

    @property
    def grace(self) -> bool:
        """Tell whether sessions of the last incarnation may still reclaim."""
        return not self._grace_over.is_set()

    async def wait_grace_over(self) -> None:
        """Wait until ``count`` can be 0 again: whoever looks for unused inodes looks once more then."""
        await self._grace_over.wait()

    def _check_grace(self) -> None:
        if not self._unreclaimed:
            self._grace_over.set()
            self.locks.grace_over()

    async def _watch(self, session: Session) -> None:
        """Watch over one session until it ends, then deal with its end."""
        async with trio.open_nursery() as nursery:
            if session.process is not None:
                nursery.start_soon(self._watch_process, session, session.process)
            await self._watch_lease(session)
            nursery.cancel_scope.cancel()
        if session.process is not None:
            session.process.close()
        await persist(f"the end of client {session.client_id:x}", lambda: self._end(session))

    async def _watch_process(self, session: Session, process: Process) -> None:
        await process.wait_gone()
        self._finish(session, clean=False, why="its process has gone")

    async def _watch_peers(self) -> None:
        """Find out when this daemon is cut off, and when it is so no more; then all sessions have a lease to come back.

        It could end nobody while it is: the others would not hear of it.
        """
        while True:
            await trio.sleep(self._lease_s / ISOLATION_LOOKS)
            isolated = self._hears_nobody()
            if self._isolated and not isolated:
                log.warning("other daemons are heard of again")
                for session in self._sessions.values():
                    session.heard_s = max(session.heard_s, trio.current_time())
            elif isolated and not self._isolated and self._sessions:
                log.warning("no other daemon is heard of: no client is taken for silent until one is")
            self._isolated = isolated

    def _hears_nobody(self) -> bool:
        since_s = trio.current_time() - self._lease_s * ISOLATED_PART
        return bool(self._others) and all(session.heard_s < since_s for session in self._daemons.values())

    async def _watch_lease(self, session: Session) -> None:
        """Return when the session is over, which this brings about when nothing is heard for too long."""
        while not session.over.is_set():
            deadline = min(session.heard_s + self._lease_s, session.left_s + RETURN_S)
            with trio.CancelScope(deadline=deadline) as session.timer:
                await session.over.wait()
                return
            # What the client sent may lie unread behind this timer: let the network have its turn.
            await trio.lowlevel.checkpoint()
            now = trio.current_time()
            if now > deadline + STALL_S:
                log.warning("this daemon stood still for %.1f s", now - deadline)
                session.heard_s = max(session.heard_s, now)
                session.left_s = float("inf")
            elif now >= session.left_s + RETURN_S:
                self._finish(session, clean=False, why="its connection was ended over there")
            elif self._isolated and now >= session.heard_s + self._lease_s:
                session.heard_s = now
            elif now >= session.heard_s + self._lease_s:
                self._finish(session, clean=False, why=f"nothing was heard for {self._lease_s:.0f} s")

    async def _watch_channel(self, session: Session, channel: Channel) -> None:
        """Note when a channel ends."""
        ending = await channel.wait_closed()
        await channel.aclose()
        self._by_channel.pop(channel, None)
        if session.channel is channel:
            session.channel = None
            if ending is Ending.PEER and session.process is None:
                session.left_s = trio.current_time()
                session.timer.deadline = min(session.timer.deadline, session.left_s + RETURN_S)
            if self._daemons.get(channel.peer.daemon_id) is session:
                del self._daemons[channel.peer.daemon_id]

    def _finish(self, session: Session, *, clean: bool, why: str) -> None:
        """Begin the end of a session: from here on nothing of it is served or written."""
        if session.over.is_set():
            return
        if not clean:
            log.warning("client %x (%s) ends: %s", session.client_id, describe(session.record), why)
        session.clean = clean
        session.over.set()

    async def _end(self, session: Session) -> None:
        """Deal with the end of a session; done again from the start if it fails or the daemon stops meanwhile."""
        assert self._peers is not None and self._session_ended is not None
        peers, client_id = self._peers, session.client_id
        written = {
            disk.numbers(key)[1]
            for key, _ in self._store.scan(
                disk.key(disk.WRITE_OPEN, client_id), disk.after(disk.key(disk.WRITE_OPEN, client_id))
            )
        }
        session.clean = session.clean and not written
        if not session.clean:
            held = bool(written or session.opens or not session.reclaimed)
            if held:
                self._store.write([(disk.key(disk.FENCED, client_id), b"")])
            if session.channel is not None:
                await session.channel.aclose()
            if held:

                async def expel(daemon_id: int) -> None:
                    await peers.call(daemon_id, Expel(client_id), Done)

                await each(expel, self._others)
        opens = [OpenCount(ino, readers, writers) for ino, (readers, writers) in session.opens.items()]
        opens += [OpenCount(ino, 0, 1) for ino in written if ino not in session.opens]
        self.locks.ended(client_id)
        self._reclaimed(session)  # it has nothing to reclaim any more
        self._check_grace()
        await self._session_ended(client_id, opens, session.clean)
        for ino in list(session.opens):
            self._set(session, ino, 0, 0)
        gone = [disk.key(disk.SESSION, client_id), *(disk.key2(disk.WRITE_OPEN, client_id, ino) for ino in written)]
        start = disk.key(disk.OUTCOME, client_id)
        gone += [key for key, _ in self._store.scan(start, disk.after(start))]
        self._store.write([], gone)
        del self._sessions[client_id]
        if session.channel is not None:
            self._by_channel.pop(session.channel, None)

    def _fenced(self, client_id: ClientId) -> bool:
        return self._store.get(disk.key(disk.FENCED, client_id)) is not None

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def of(self, channel: Channel) -> Session:
        """Return the session of a channel, heard of now. Stale: it has none (no Hello yet), or it has ended."""
        session = self._by_channel.get(channel)
        if session is None or session.over.is_set():
            raise Stale("no session: Hello comes first")
        session.heard_s = trio.current_time()
        return session

    async def hello(self, channel: Channel, request: Hello) -> HelloReply:
        """Begin or resume the session of the client at the other end, and fence its older channels.

        Returns when nothing that came over an older channel is being served any more. Stale, TooManyOpen.
        """
        peer = channel.peer
        if request.kind not in KINDS or (request.kind == "daemon") != (peer.daemon_id >= 0):
            raise NotPermitted(f"{peer.host} is not what it says: {request.kind}, daemon {peer.daemon_id}")
        if peer.daemon_id >= 0:
            session = self._daemons.get(peer.daemon_id)
            if session is None or session.client_id != peer.client_id:
                await self._replace_daemon(peer, request)
                session = self._daemons[peer.daemon_id]
        else:
            session = self._begin(peer, request)
            if not request.resume:  # a client that lives must find its session after a power cut here
                await self._store.sync()
        # Another Hello of this client may attach its channel meanwhile: look again each time.
        while session.channel is not None and session.channel is not channel:
            old = session.channel
            await old.aclose()
            self._by_channel.pop(old, None)
            if session.channel is old:
                session.channel = None
        if session.over.is_set():
            raise Stale("the session has ended")
        # Whoever noted the end of the older channel has taken it for the end of the daemon.
        if peer.daemon_id >= 0 and self._daemons.setdefault(peer.daemon_id, session) is not session:
            raise Stale("this daemon was started anew")
        session.named = set()
        session.heard_s = trio.current_time()
        session.left_s = float("inf")
        if session.channel is not channel:
            session.channel = channel
            self._by_channel[channel] = session
            assert self._nursery is not None
            self._nursery.start_soon(self._watch_channel, session, channel)
        return self._hello_reply

    def _begin(self, peer: Peer, request: Hello) -> Session:
        """Return the session of a mount or tool, made if it is new."""
        if self._fenced(peer.client_id):
            raise Stale("this client was expelled")
        session = self._sessions.get(peer.client_id)
        if session is None:
            if request.resume:
                raise Stale("there is no such session")
            if len(self._sessions) >= SESSIONS_MAX:
                raise TooManyOpen(f"{SESSIONS_MAX} sessions")
            # A pid that is not found here, though its owner is talking to us, belongs to another pid namespace.
            process = self._open_process(peer.pid) if peer.boot_id == self._boot_id else None
            record = SessionRecord(
                request.kind, request.label, peer.host, peer.pid, peer.boot_id, seen_here=process is not None
            )
            self._store.write([(disk.key(disk.SESSION, peer.client_id), msgspec.msgpack.encode(record))])
            session = self._sessions[peer.client_id] = Session(peer.client_id, record, reclaimed=True)
            session.process = process
            assert self._nursery is not None
            self._nursery.start_soon(self._watch, session)
        elif not request.resume:
            self._reclaimed(session)  # its first Hello was not answered: it has nothing to reclaim
        return session

    async def _replace_daemon(self, peer: Peer, request: Hello) -> None:
        """Fence the last incarnation of a daemon, then make a session for this one."""
        while (old := self._daemons.get(peer.daemon_id)) is not None and old.client_id != peer.client_id:
            old.over.set()
            if old.channel is not None:
                await old.channel.aclose()
            if self._daemons.get(peer.daemon_id) is old:
                del self._daemons[peer.daemon_id]
        record = SessionRecord(request.kind, request.label, peer.host, peer.pid, peer.boot_id, seen_here=False)
        self._daemons.setdefault(peer.daemon_id, Session(peer.client_id, record, reclaimed=True))

    def handlers(self) -> dict[type[Request], Callable[[Request, Call], Awaitable[Body]]]:
        """Return what serves the requests about sessions; Hello is served by ``hello``."""
        return {Expel: self._expel, **self.locks.handlers()}

    def handlers_now(self) -> dict[type[Request], Callable[[Request, Call], Body | None]]:
        """Return what serves requests without awaiting."""
        return {
            Reclaim: self._reclaim,
            Heartbeat: self._done,
            Forget: self._done,
            Goodbye: self._goodbye,
            **self.locks.handlers_now(),
        }

    def _done(self, request: Request, call: Call) -> Body:
        return Done()

    def _reclaim(self, request: Request, call: Call) -> Body:
        """Count handles again; said twice, it counts once; over another channel, what was said before is void."""
        assert isinstance(request, Reclaim)
        session = self._sessions.get(call.client_id)
        if session is None:
            raise NotPermitted("daemons have nothing open")
        lost = []
        batch = Batch(self._store)
        if len(session.opens.keys() | {count.ino for count in request.opens}) > OPENS_MAX:
            raise TooManyOpen(f"{OPENS_MAX} files are open")
        for count in request.opens:
            if self._store.get(disk.key(disk.INODE, count.ino)) is None:
                lost.append(count.ino)
                continue
            self._set(session, count.ino, count.readers, count.writers)
            session.named.add(count.ino)
            if count.writers:
                batch.put(disk.key2(disk.WRITE_OPEN, session.client_id, count.ino), b"")
        if request.last:
            for ino in session.opens.keys() - session.named:
                self._set(session, ino, 0, 0)
            start = disk.key(disk.WRITE_OPEN, session.client_id)
            for key, _ in self._store.scan(start, disk.after(start)):
                if disk.numbers(key)[1] not in session.opens:
                    batch.delete(key)
        batch.write()
        self.locks.claim(session.client_id, request.locks, again=session.reclaimed)
        if request.last:
            self._reclaimed(session)
        return ReclaimReply(tuple(lost))

    def _reclaimed(self, session: Session) -> None:
        session.reclaimed = True
        self._unreclaimed.discard(session.client_id)
        self._check_grace()

    def _goodbye(self, request: Request, call: Call) -> Body:
        session = self._sessions.get(call.client_id)
        if session is not None:
            self._finish(session, clean=True, why="goodbye")
        return Done()

    async def _expel(self, request: Request, call: Call) -> Body:
        """Fence a client for good; when this returns, nothing of it is being served."""
        assert isinstance(request, Expel)
        client_id = ClientId(request.client_id)
        self._store.write([(disk.key(disk.FENCED, client_id), b"")])
        await self._store.sync()
        session = self._sessions.get(client_id)
        if session is not None:
            self._finish(session, clean=False, why="it has ended at another daemon")
            if session.channel is not None:
                await session.channel.aclose()
        return Done()

    def replay(self, session: Session, request: Request, reply: Body) -> None:
        """Count the handles of a request that the last incarnation of this daemon has answered, or meant to.

        The client has not seen the answer, so it has not reclaimed them. Stale: the inode has gone meanwhile.
        """
        batch = Batch(self._store)
        if isinstance(request, Open):
            if self._store.get(disk.key(disk.INODE, request.ino)) is None:
                raise Stale(f"inode {request.ino} has gone")
            self.add(batch, session.client_id, request.ino, int(not request.writer), int(request.writer))
        elif isinstance(request, Make) and isinstance(reply, EntryReply):
            self.add(batch, session.client_id, reply.entry.ino, request.open_readers, request.open_writers)
        elif isinstance(request, Release):
            self.remove(batch, session.client_id, request.ino, request.readers, request.writers)
        batch.write()

    # ── opens ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, batch: Batch, client_id: ClientId, ino: int, readers: int, writers: int) -> None:
        """Count handles, once the batch is written. TooManyOpen, Stale (the session has ended)."""
        session = self._sessions.get(client_id)
        if session is None or session.over.is_set():
            raise Stale("the session has ended")
        if not readers and not writers:
            return
        if ino not in session.opens and len(session.opens) >= OPENS_MAX:
            raise TooManyOpen(f"{OPENS_MAX} files are open")
        if writers:
            batch.put(disk.key2(disk.WRITE_OPEN, client_id, ino), b"")
        batch.after_write.append(lambda: self._change(session, ino, readers, writers))

    def remove(self, batch: Batch, client_id: ClientId, ino: int, readers: int, writers: int) -> None:
        """Take handles back, once the batch is written; more than were counted are taken as all."""
        session = self._sessions.get(client_id)
        if session is None:
            return
        if writers >= session.opens.get(ino, (0, 0))[1]:
            batch.delete(disk.key2(disk.WRITE_OPEN, client_id, ino))
        batch.after_write.append(lambda: self._change(session, ino, -readers, -writers))

    def count(self, ino: int) -> int:
        """Return how many handles all sessions hold on ``ino``; while sessions may still reclaim, at least 1."""
        return self._counts[ino] or int(self.grace)

    def written_by_others(self, ino: int, client_id: ClientId | None) -> bool:
        """Tell whether a session other than this client's has ``ino`` open for writing, or may yet reclaim that."""
        others = (session for other, session in self._sessions.items() if other != client_id)
        return any(not session.reclaimed or session.opens.get(ino, (0, 0))[1] for session in others)

    def _change(self, session: Session, ino: int, readers: int, writers: int) -> None:
        known = session.opens.get(ino, (0, 0))
        self._set(session, ino, max(0, known[0] + readers), max(0, known[1] + writers))

    def _set(self, session: Session, ino: int, readers: int, writers: int) -> None:
        """Let a session hold so many handles on an inode."""
        self._counts[ino] += readers + writers - sum(session.opens.pop(ino, (0, 0)))
        if readers or writers:
            session.opens[ino] = [readers, writers]
        else:
            self.locks.closed(session.client_id, ino)
        if not self._counts[ino]:
            del self._counts[ino]

    # ── locks ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _has_open(self, client_id: ClientId, ino: int) -> bool:
        session = self._sessions.get(client_id)
        return session is not None and ino in session.opens

    def _same_host(self, one: ClientId, other: ClientId) -> bool:
        return one == other or self._sessions[one].record.boot_id == self._sessions[other].record.boot_id

    def _tell_granted(self, client_id: ClientId, ticket: int, version: int) -> None:
        """Send LockGranted, if there is a connection; over the next one, the client asks."""
        session = self._sessions.get(client_id)
        if session is not None and session.channel is not None:
            assert self._nursery is not None
            self._nursery.start_soon(_tell, session.channel, LockGranted(ticket, version))

    # ── people ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def statuses(self) -> tuple[SessionStatus, ...]:
        """Describe all sessions, those of other daemons last."""
        return tuple(
            SessionStatus(
                session.client_id,
                session.record.kind,
                session.record.label,
                session.record.host,
                session.record.pid,
                session.channel is not None,
                session.channel.transport if session.channel is not None else "",
                len(session.opens),
            )
            for session in [*self._sessions.values(), *self._daemons.values()]
        )


async def _tell(channel: Channel, request: LockGranted) -> None:
    with suppress(Disconnected):
        await channel.call(request.op, encode(request))


def describe(record: SessionRecord) -> str:
    """Name a client in sentences. What it says it is may be anything, and is to be one line in a log."""
    label = "".join(character if character.isprintable() else "?" for character in record.label)
    return f"{record.kind} {label} on {record.host}, pid {record.pid}"
