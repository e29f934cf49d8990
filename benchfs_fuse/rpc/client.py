"""Keep one session with every daemon, whatever happens to the connections, and send requests over it.

A ``Link`` is the way to one daemon, ``Links`` are the ways to all of them. A connection that breaks is made anew, at
once, then with pauses; requests that were under way are sent again. What must not be applied twice (``recorded``
requests) carries a slot and a sequence number, so that the daemon recognises the retry. A request that gets no answer
in time raises DaemonUnreachable, and says nothing about whether it was applied.

Everything is bounded per daemon: a dead one uses up neither the places nor the tasks of the others.

What a session is, seen from here: ``Hello`` on every new connection; ``Reclaim`` after the daemon was started anew
(its ``incarnation`` differs), before any other request, for open files and the locks on them; a ``Heartbeat`` when
nothing was heard for a sixth of the lease; ``Goodbye`` at the end. A daemon that refuses to resume the session has
expelled this client: its open files are gone there, so it ends everywhere (``Links.expelled``).
"""

import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import trio

from ..errors import (
    AuthenticationFailed,
    DaemonUnreachable,
    Disconnected,
    FsError,
    NotSupported,
    ProtocolError,
    Stale,
    from_status,
)
from ..layout import ShardMap
from ..limits import IN_FLIGHT_MAX
from ..model import ClientId
from ..observe import recording, spans
from ..ports import Buffer, Channel, Reply
from ..services.deadline import before_waiting
from .messages import (
    Body,
    Done,
    Failure,
    Forget,
    Goodbye,
    Heartbeat,
    Hello,
    HelloReply,
    LockClaim,
    LockGranted,
    Lookup,
    OpenCount,
    Prepare,
    ReadChunkReply,
    Reclaim,
    ReclaimReply,
    Request,
    decode,
    encode,
    encode_recorded,
)
from .network import Network

R = TypeVar("R", bound=Body)
#: Be told, once, what became of a request whose caller has gone: its answer, or None: the daemon has not done it.
Late = Callable[[R | None], None]
T = TypeVar("T")

log = logging.getLogger(__name__)

#: Requests of one process under way at one daemon; the connection's last place is kept for the heartbeat.
ORDINARY_MAX = IN_FLIGHT_MAX - 1
#: Between daemons only requests that may wait for a lock there are bounded, so that places are left for those that
#: end such waits (Finish, TrimChunks …): with all places taken by waiters, nobody would ever be done.
WAITING_MAX = IN_FLIGHT_MAX // 2
_MAY_WAIT = (Prepare, Lookup)

#: Times per lease that a silent session is checked. A connection that has fallen silent is given up at the second or
#: third of them, which leaves half of the lease to come back over a new one.
BEATS_PER_LEASE = 6
#: Seconds for the answer to a Hello or a page of Reclaim: they wait for no other request.
HELLO_TIMEOUT_S = 10.0
#: Seconds for the answer to a Goodbye at exit: a daemon that does not answer learns it by the connection's end.
GOODBYE_TIMEOUT_S = 2.0
#: Pauses between attempts to reach a daemon that is away; a new registry entry ends a pause at once. The longest is
#: below RETURN_S of services/sessions.py, so that a client that lives is back before its session ends.
PAUSE_MIN_S = 0.05
PAUSE_MAX_S = 2.0
#: Seconds for the directory to say where a daemon is, before it is tried where it was. With a pause, below RETURN_S.
LOOK_S = 1.0
#: Opens per page of a Reclaim: 20 bytes each, in a body of 128 KiB at most.
RECLAIM_PAGE = 4096
#: Locks per page of a Reclaim: 44 bytes each at most.
RECLAIM_LOCKS_PAGE = 2048


class Location(Protocol):
    """Say where a daemon can be met. Two are equal when they mean the same start of the daemon."""

    @property
    def address(self) -> str:
        """Return what ``Network.connect`` takes."""
        ...


class Directory(Protocol):
    """Know where the daemons are: the registry, as far as a link needs it."""

    async def look(self, daemon_id: int) -> Location | None:
        """Return where the daemon can be met now, None if it has never said so or has said goodbye.

        May take as long as it likes. DaemonUnreachable when it cannot be found out.
        """
        ...

    async def wait_changed(self, daemon_id: int, known: Location | None) -> None:
        """Wait until ``look`` returns something other than ``known``."""
        ...


class LinkState(NamedTuple):
    """Describe the way to one daemon, for people. ``missing_since_s`` is a time of day (Unix), 0 while connected."""

    daemon_id: int
    connected: bool
    missing_since_s: float
    #: Why the last attempt failed, empty while connected.
    trouble: str
    address: str
    transport: str
    incarnation: int
    in_flight: int


#: Stand for the turn of a request that takes no place, and of one that takes a place and no slot.
_UNBOUNDED = -2
_PLACE = -1


class _Begun(NamedTuple):
    """Hold what a request has: its turn (a slot, or one of the above), its encoded body, and how far it is.

    ``reply``: it is answered. ``waiting``: it was sent over ``channel``, and this waits for the answer.
    """

    turn: int
    body: bytes
    reply: Reply | None = None
    channel: Channel | None = None
    waiting: Awaitable[Reply] | None = None


class Link:
    """Send requests to one daemon."""

    def __init__(self, links: "Links", daemon_id: int) -> None:
        self._links = links
        self.daemon_id = daemon_id
        self._between_daemons = links.kind == "daemon"
        self._places = trio.Semaphore(WAITING_MAX if self._between_daemons else ORDINARY_MAX)
        self._slots = deque(range(ORDINARY_MAX))
        self._seqs = [0] * ORDINARY_MAX
        #: Requests that were given up and that the daemon is being told to forget.
        self._forgetting: set[trio.Event] = set()
        self._in_flight = 0
        #: Requests that were sent again: each of them may have been served before, too.
        self.repeated = 0
        self._channel: Channel | None = None
        #: Set and replaced whenever a caller that waits for a channel should look again.
        self._changed = trio.Event()
        #: Data was changed by a request that was given up, and the daemon may still do it: until it has taken our next
        #: connection, when it has ended the old one.
        self.remains = False
        self._heard = False
        #: Incarnation that knows our session and our opens; 0 before the first Hello.
        self._incarnation = 0
        self._losses = 0
        self._location: Location | None = None
        #: A time of day, for people, and the same moment by a clock that nobody sets.
        self._missing_since_s, self._missing_from_s = time.time(), time.monotonic()
        self.trouble: FsError | None = None
        #: How loudly its return is told: as its absence was.
        self._level = logging.INFO

    async def call(
        self,
        request: Request,
        reply_type: type[R],
        payload: Buffer | None = None,
        into: memoryview | None = None,
        *,
        patient: bool = False,
        polls: bool = True,
        late: Late[R] | None = None,
    ) -> R:
        """Send a request, wait for its answer, over reconnections and for at most the deadline of ``Links``
        (``patient``: for as long as it takes).

        ``payload`` and ``into`` belong to the link until this returns or raises; with ``into``, ReadChunkReply.length
        says how many bytes were received. Raise what the daemon answered; DaemonUnreachable at the deadline; Stale
        when this client was expelled. A cancelled or late request may have been applied, or may yet be, but not after a
        later one: if it is recorded, the daemon is told to forget it before it gets another recorded one. If it
        carried a buffer, its connection is closed before the buffer is given back, so that nothing arrives in it late;
        and if it changes data, so that it does not do so after what is written later.

        Unless it ``polls``, others go on meanwhile, if it can be sent at once: for what nobody waits for.

        With ``late``, a recorded request is not given up: who is cancelled or meets the deadline leaves it behind, and
        ``late`` hears what became of it.
        """
        answer = self.begin(request, reply_type, payload, into, patient=patient, polls=polls, late=late)
        return await answer if isinstance(answer, Coroutine) else answer

    def begin(
        self,
        request: Request,
        reply_type: type[R],
        payload: Buffer | None = None,
        into: memoryview | None = None,
        *,
        patient: bool = False,
        polls: bool = True,
        late: Late[R] | None = None,
    ) -> R | Coroutine[Any, Any, R]:
        """Begin what ``call`` does; return the answer, if it came while this polled for it, or what waits for it.

        That is to be awaited, by whichever task, in its next step. Raises as ``call`` does.
        """
        begun = self._begin(request, payload, into, polls)
        if begun is not None and begun.reply is not None:
            self._give_back(begun.turn)
            return self._answer(begun.reply, reply_type)
        return self._go_on(request, reply_type, payload, into, begun, patient=patient, late=late)

    async def _go_on(
        self,
        request: Request,
        reply_type: type[R],
        payload: Buffer | None,
        into: memoryview | None,
        begun: "_Begun | None",
        *,
        patient: bool,
        late: Late[R] | None,
    ) -> R:
        """Wait for the answer to a request that was sent, or for what it takes to send it."""
        timeout_s = float("inf") if patient else self._links.op_timeout_s
        self._in_flight += 1
        try:
            before_waiting()
            with trio.CancelScope(deadline=trio.current_time() + timeout_s):
                if begun is None:
                    begun = await self._take_turn(request, late)
                return await self._send_in_turn(request, reply_type, payload, into, late, begun)
        finally:
            self._in_flight -= 1
        raise DaemonUnreachable(f"{self.name} did not answer {type(request).__name__} in {self._links.op_timeout_s} s")

    def _begin(self, request: Request, payload: Buffer | None, into: memoryview | None, polls: bool) -> "_Begun | None":
        """Send a request if nothing has to be waited for first: a place, those that were given up, a connection."""
        channel = self._channel
        unbounded = self._between_daemons and not isinstance(request, _MAY_WAIT)
        if channel is None or not (unbounded or self._places.value) or (request.recorded and self._forgetting):
            return None
        if not unbounded:
            self._places.acquire_nowait()
        turn, body = self._take_slot(request, unbounded=unbounded)
        try:
            answer = channel.call_now(request.op, body, payload, into, polls)
        except BaseException:
            self._give_back(turn)
            raise
        if isinstance(answer, Reply):
            return _Begun(turn, body, answer)
        return _Begun(turn, body, None, channel, answer) if answer is not None else _Begun(turn, body)

    async def _take_turn(self, request: Request, late: Late[Any] | None) -> "_Begun":
        """Wait for a place for a request; for a recorded one behind what was given up before it."""
        unbounded = self._between_daemons and not isinstance(request, _MAY_WAIT)
        try:
            if request.recorded:
                for forgotten in tuple(self._forgetting):
                    await forgotten.wait()
            if not unbounded:
                try:
                    self._places.acquire_nowait()
                except trio.WouldBlock:
                    started_ns = recording.now()
                    await self._places.acquire()
                    recording.note(spans.PLACE, started_ns)
        except trio.Cancelled:
            if late is not None:
                late(None)
            raise
        return _Begun(*self._take_slot(request, unbounded=unbounded))

    def _take_slot(self, request: Request, *, unbounded: bool) -> tuple[int, bytes]:
        """Give a request that has its place a slot, if it is recorded; return its turn and its encoded body."""
        if unbounded:
            return _UNBOUNDED, encode(request)
        if not request.recorded:
            return _PLACE, encode(request)
        slot = self._slots.popleft()
        self._seqs[slot] += 1
        return slot, encode_recorded(request, slot, self._seqs[slot])

    def _give_back(self, turn: int) -> None:
        if turn != _UNBOUNDED:
            if turn != _PLACE:
                self._slots.append(turn)
            self._places.release()

    async def _send_in_turn(
        self,
        request: Request,
        reply_type: type[R],
        payload: Buffer | None,
        into: memoryview | None,
        late: Late[R] | None,
        begun: "_Begun",
    ) -> R:
        """Send a request that has its place, or go on with one that was sent."""
        turn, body = begun.turn, begun.body
        try:
            answer = await self._send(request, body, reply_type, payload, into, begun)
        except trio.Cancelled:
            if turn < 0:
                self._give_back(turn)
            elif late is None:
                self._forgetting.add(forgotten := trio.Event())
                self._links.start_soon(self._forget, turn, forgotten)
            else:
                self._links.start_soon(self._see_through, request, body, reply_type, turn, late)
            raise
        except BaseException:
            self._give_back(turn)
            raise
        self._give_back(turn)
        return answer

    async def _forget(self, slot: int, forgotten: trio.Event) -> None:
        """Have the daemon forget the newest request of a slot; that keeps its place until then."""
        self._seqs[slot] += 1
        try:
            await self._send(Forget(), encode_recorded(Forget(), slot, self._seqs[slot]), Done, None, None)
        except FsError as error:
            log.info("%s does not forget a request: %s", self.name, error)
        finally:
            self._forgetting.discard(forgotten)
            forgotten.set()
            self._give_back(slot)

    async def _see_through(self, request: Request, body: bytes, reply_type: type[R], slot: int, late: Late[R]) -> None:
        """Send a recorded request whose caller has gone until it is answered; it keeps its place and its slot."""
        answer: R | None = None
        try:
            answer = await self._send(request, body, reply_type, None, None)
        except FsError as error:
            log.info("%s answered a %s that nobody waits for: %s", self.name, type(request).__name__, error)
        finally:
            self._give_back(slot)
        late(answer)

    async def _send(
        self,
        request: Request,
        body: bytes,
        reply_type: type[R],
        payload: Buffer | None,
        into: memoryview | None,
        begun: "_Begun | None" = None,
    ) -> R:
        """Send an encoded request, again after each reconnection, until there is an answer; ``begun``: it was sent."""
        changes = payload is not None or request.overwrites
        waiting = begun.waiting if begun is not None else None
        while True:
            channel = begun.channel if begun is not None and waiting is not None else self._channel
            if channel is None:
                started_ns = recording.now()
                try:
                    channel = await self._wait_channel()
                except trio.Cancelled:
                    self.remains |= changes and self._channel is None
                    raise
                finally:
                    recording.note(spans.CONNECTION, started_ns)
            try:
                sent = waiting or channel.call(request.op, body, payload, into)
                waiting = None
                reply = await sent
            except Disconnected:
                self._leave(channel)
                self.repeated += 1
                continue
            except trio.Cancelled:
                if changes or into is not None:
                    self.remains |= changes and self._channel in (channel, None)
                    with trio.CancelScope(shield=True):
                        await channel.aclose()
                raise
            return self._answer(reply, reply_type)

    def _answer(self, reply: Reply, reply_type: type[R]) -> R:
        """Decode an answer; raise what it says if that is an error."""
        self._heard = True
        answer = _open(reply, reply_type)
        if isinstance(answer, ReadChunkReply) and answer.length != reply.received:
            raise ProtocolError(f"{self.name} announced {answer.length} bytes and sent {reply.received}")
        return answer

    async def wait_fenced(self) -> None:
        """Wait until nothing can change data any more that was given up before; until we are expelled at the latest."""
        while self.remains and not self._links.expelled.is_set():
            await self._changed.wait()

    async def _wait_channel(self) -> Channel:
        while self._channel is None:
            if self._links.expelled.is_set():
                raise Stale(f"this client was expelled: {self._links.expelled_why}")
            await self._changed.wait()
        return self._channel

    def _leave(self, channel: Channel) -> None:
        """Note that a channel has ended; everybody who finds it out calls this."""
        if self._channel is channel:
            self._channel = None
            self._missing_since_s, self._missing_from_s = time.time(), time.monotonic()

    def wake(self) -> None:
        """Let callers that wait for a channel look again."""
        self._changed.set()
        self._changed = trio.Event()

    def give_up(self) -> None:
        """Use the connection no more: the client was expelled."""
        if self._channel is not None:
            self._leave(self._channel)
        self.wake()

    async def wait_connected(self) -> None:
        """Wait for a connection. AuthenticationFailed: the daemon refuses us, waiting longer will not help."""
        while self._channel is None:
            if isinstance(self.trouble, AuthenticationFailed):
                raise self.trouble
            if self._links.expelled.is_set():
                raise Stale(f"this client was expelled: {self._links.expelled_why}")
            await self._changed.wait()

    # ── the connection ───────────────────────────────────────────────────────────────────────────────────────────────

    async def keep(self) -> None:
        """Keep the session with this daemon until cancelled or expelled."""
        pause_s = 0.0
        while not self._links.expelled.is_set() and not self._links.leaving:
            location = self._location
            try:
                location = await self._locate()
                if location != self._location:
                    pause_s, self._location = 0.0, location
                channel, lease_s = await self._connect(location)
            except Stale as refusal:
                self._links.expel(f"{self.name} does not know this session any more: {refusal}")
                return
            except FsError as trouble:
                self._note(trouble)
                pause_s = min(max(2 * pause_s, PAUSE_MIN_S), PAUSE_MAX_S) if location is not None else float("inf")
                with trio.move_on_after(pause_s):
                    await self._links.directory.wait_changed(self.daemon_id, location)
                continue
            if self.trouble is not None:
                away_s = time.monotonic() - self._missing_from_s
                log.log(self._level, "%s is there after %.1f s", self.name, away_s)
            pause_s, self.trouble, self._channel, self.remains = 0.0, None, channel, False
            self.wake()
            self._links.on_connected(self.daemon_id)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._beat, channel, lease_s)
                    await channel.wait_closed()
                    nursery.cancel_scope.cancel()
            finally:
                self._leave(channel)
                with trio.CancelScope(shield=True):
                    await channel.aclose()

    async def _locate(self) -> Location | None:
        """Find out where the daemon can be met; where it was last, when the directory does not tell."""
        trouble: FsError = DaemonUnreachable("the registry does not answer")
        try:
            with trio.move_on_after(LOOK_S):
                return await self._links.directory.look(self.daemon_id)
        except DaemonUnreachable as error:
            trouble = error
        if self._location is None:
            raise trouble
        return self._location

    async def _connect(self, location: Location | None) -> tuple[Channel, float]:
        """Connect and make the session known; return the channel, ready for requests, and the lease."""
        if location is None:
            raise DaemonUnreachable("it is not in the registry")
        handler = _Handler(self._links, self.daemon_id)
        channel = await self._links.network.connect(location.address, handler)
        try:
            resume = self._incarnation != 0 and not self._between_daemons
            hello = await self._say_hello(channel, resume)
            if hello.map_version != self._links.shard_map.version:
                raise ProtocolError(
                    f"its shard map is version {hello.map_version}, ours {self._links.shard_map.version}"
                )
            if resume and hello.incarnation != self._incarnation:
                await self._reclaim(channel)
            if resume and hello.losses != self._losses:
                self._links.on_power_lost(self.daemon_id)
            self._incarnation, self._losses = hello.incarnation, hello.losses
        except BaseException:
            with trio.CancelScope(shield=True):
                await channel.aclose()
            raise
        return channel, hello.lease_s

    async def _say_hello(self, channel: Channel, resume: bool) -> HelloReply:
        """Begin or resume the session. One that has ended with nothing at stake is begun anew. Stale: something was."""
        try:
            return await _ask(channel, Hello(self._links.kind, self._links.label, resume), HelloReply)
        except Stale:
            # What is under way may have been done already, and its outcome is forgotten; what was given up has gone.
            under_way = ORDINARY_MAX - len(self._slots) - len(self._forgetting)
            if not resume or under_way or any(self._held()):
                raise
            log.warning("%s has ended the session, in which nothing was open: beginning another", self.name)
            return await _ask(channel, Hello(self._links.kind, self._links.label, False), HelloReply)

    def _held(self) -> tuple[list[OpenCount], list[LockClaim]]:
        """Return what this client holds open at the daemon, and its locks there."""
        shard_map = self._links.shard_map
        return (
            [count for count in self._links.opens() if shard_map.of_ino(count.ino) == self.daemon_id],
            [claim for claim in self._links.locks() if shard_map.of_ino(claim.ino) == self.daemon_id],
        )

    async def _reclaim(self, channel: Channel) -> None:
        """Register the open handles and the locks again with a daemon that was started anew."""
        opens, locks = self._held()
        pages = [Reclaim(page, last=False) for page in _pages(opens, RECLAIM_PAGE)]
        pages += [Reclaim((), last=False, locks=page) for page in _pages(locks, RECLAIM_LOCKS_PAGE)]
        lost: list[int] = []
        for page in [*pages, Reclaim((), last=True)]:
            lost.extend((await _ask(channel, page, ReclaimReply)).lost)
        log.warning("%s was started anew: %d open files reclaimed, %d lost", self.name, len(opens), len(lost))
        if lost:
            self._links.on_lost(lost)

    async def _beat(self, channel: Channel, lease_s: float) -> None:
        """Renew the lease while nothing else does; close the channel if the daemon has fallen silent.

        That goes also for one at which requests hang that were given up, so many that they have taken every place, the
        heartbeat's too: with the connection they end, and the places are free.
        """
        interval_s = lease_s / BEATS_PER_LEASE
        while True:
            self._heard = False
            await trio.sleep(interval_s)
            if self._heard:
                continue
            with trio.move_on_after(interval_s):
                try:
                    await channel.call(Heartbeat.op, encode(Heartbeat()))
                except Disconnected:
                    return
                continue
            log.warning("%s has been silent for %.0f s: closing the connection", self.name, 2 * interval_s)
            await channel.aclose()

    def _note(self, trouble: FsError) -> None:
        """Say once per outage, and when its reason changes, that the daemon is missing."""
        known, self.trouble = self.trouble, trouble
        if known is None or type(known) is not type(trouble):
            since = time.strftime("%H:%M:%S", time.localtime(self._missing_since_s))
            # Before it was ever there, a daemon that is not registered is only late, and who is refused is told so.
            first = self._incarnation == 0 and (self._location is None or isinstance(trouble, AuthenticationFailed))
            self._level = logging.INFO if first else logging.WARNING
            log.log(self._level, "%s has been missing since %s: %s", self.name, since, trouble)
            self.wake()

    async def say_goodbye(self) -> None:
        """End the session, if there is a connection to say so."""
        channel = self._channel
        if channel is None:
            return
        try:
            with trio.move_on_after(GOODBYE_TIMEOUT_S):
                if not self._between_daemons:
                    await _ask(channel, Goodbye(), Done)
        except Disconnected:
            pass  # it is going too
        except FsError as error:
            log.warning("%s did not take our goodbye: %s", self.name, error)
        await channel.aclose()

    @property
    def connected(self) -> bool:
        """Tell whether there is a connection now."""
        return self._channel is not None

    @property
    def name(self) -> str:
        """Name the daemon in sentences."""
        return f"daemon {self.daemon_id} at {self._location.address}" if self._location else f"daemon {self.daemon_id}"

    def statistics(self) -> LinkState:
        """Return what is known about this daemon now."""
        channel = self._channel
        return LinkState(
            self.daemon_id,
            channel is not None,
            0.0 if channel is not None else self._missing_since_s,
            str(self.trouble) if self.trouble is not None else "",
            self._location.address if self._location is not None else "",
            channel.transport if channel is not None else "",
            self._incarnation,
            self._in_flight,
        )


class _Handler:
    """Serve what a daemon asks of its client: it tells of locks, and nothing else (ports.Handler)."""

    def __init__(self, links: "Links", daemon_id: int) -> None:
        self._links = links
        self._daemon_id = daemon_id

    def handle_now(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        """Serve one request. Never raises."""
        if op != LockGranted.op:
            return Reply(NotSupported.status, b"")
        try:
            self._links.on_granted(self._daemon_id, decode(LockGranted, body))
        except ProtocolError as error:
            return Reply(error.status, b"")
        return Reply(0, encode(Done()))

    async def __call__(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        """Serve one request."""
        return self.handle_now(channel, op, body, payload, want)


class Links:
    """Hold the ways to all daemons of a cluster; ``open_links`` makes and runs them.

    ``op_timeout_s`` is every call's deadline (``inf``: none). ``opens`` returns the handles to reclaim, of all daemons:
    those whose Open or Make was answered and whose Release was not. ``on_lost`` is told inodes that could not be.

    Whoever takes locks sets ``locks``, which returns those to reclaim, ``on_granted``, which is told by LockGranted,
    and ``on_connected``, which is told of each new connection to a daemon: what was to come over the old one may be
    lost.
    """

    def __init__(
        self,
        network: Network,
        directory: Directory,
        shard_map: ShardMap,
        client_id: ClientId,
        *,
        kind: str,
        label: str,
        op_timeout_s: float,
        opens: Callable[[], Sequence[OpenCount]] = tuple,
        on_lost: Callable[[Sequence[int]], None] = lambda lost: None,
        daemons: Iterable[int] | None = None,
    ) -> None:
        self.network = network
        self.directory = directory
        self.shard_map = shard_map
        self.client_id = client_id
        self.kind = kind
        self.label = label
        self.op_timeout_s = op_timeout_s
        self.opens = opens
        self.on_lost = on_lost
        self.locks: Callable[[], Sequence[LockClaim]] = tuple
        self.on_granted: Callable[[int, LockGranted], None] = lambda daemon_id, granted: None
        self.on_connected: Callable[[int], None] = lambda daemon_id: None
        #: Told of a daemon that may have lost what was not synced, before any request is answered by it again.
        self.on_power_lost: Callable[[int], None] = lambda daemon_id: None
        #: Set when a daemon has expelled this client; every call raises Stale from then on.
        self.expelled = trio.Event()
        self.expelled_why = ""
        self._nursery: trio.Nursery | None = None
        #: Set by ``say_goodbye``: connections that end are not made anew.
        self.leaving = False
        self._links = {
            daemon_id: Link(self, daemon_id)
            for daemon_id in sorted(set(shard_map.daemons) if daemons is None else set(daemons))
        }

    @property
    def daemons(self) -> tuple[int, ...]:
        """Return the daemons that these links lead to, in order."""
        return tuple(self._links)

    def to(self, daemon_id: int) -> Link:
        """Return the link to a daemon."""
        return self._links[daemon_id]

    async def run(self) -> None:
        """Keep all sessions until cancelled or expelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                for link in self._links.values():
                    self._nursery.start_soon(link.keep)
        finally:
            self._nursery = None

    def start_soon(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run a task for as long as the sessions are kept; for the links."""
        if self._nursery is not None:
            self._nursery.start_soon(function, *args)

    async def wait_connected(self) -> None:
        """Wait until every daemon was reached. AuthenticationFailed, Stale: it will not happen. Callers cancel."""
        for link in self._links.values():
            await link.wait_connected()

    @property
    def fenced(self) -> bool:
        """Tell whether ``wait_fenced`` has nothing to wait for."""
        return not any(link.remains for link in self._links.values())

    async def wait_fenced(self) -> None:
        """Wait until no daemon can change data any more by requests that were given up before."""
        for link in self._links.values():
            await link.wait_fenced()

    async def say_goodbye(self) -> None:
        """End all sessions that can be ended, within GOODBYE_TIMEOUT_S; these links are of no use after that."""
        self.leaving = True
        async with trio.open_nursery() as nursery:
            for link in self._links.values():
                nursery.start_soon(link.say_goodbye)

    def expel(self, why: str) -> None:
        """Give everything up: a daemon has ended this client's session."""
        if not self.expelled.is_set():
            log.error("%s: open files are lost, start anew", why)
            self.expelled_why = why
            self.expelled.set()
            for link in self._links.values():
                link.give_up()

    def statistics(self) -> tuple[LinkState, ...]:
        """Return what is known about each daemon now."""
        return tuple(link.statistics() for link in self._links.values())


@asynccontextmanager
async def open_links(
    network: Network,
    directory: Directory,
    shard_map: ShardMap,
    client_id: ClientId,
    *,
    kind: str,
    label: str,
    op_timeout_s: float,
    opens: Callable[[], Sequence[OpenCount]] = tuple,
    on_lost: Callable[[Sequence[int]], None] = lambda lost: None,
    daemons: Iterable[int] | None = None,
) -> AsyncIterator[Links]:
    """Keep links to all daemons (or those given) for a while; says goodbye at the end. Arguments as for Links.

    Returns at once: ``wait_connected`` waits for the daemons. ``client_id`` is the one that ``network`` proves.
    """
    links = Links(
        network,
        directory,
        shard_map,
        client_id,
        kind=kind,
        label=label,
        op_timeout_s=op_timeout_s,
        opens=opens,
        on_lost=on_lost,
        daemons=daemons,
    )
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(links.run)
        try:
            yield links
        except Exception as error:  # noqa: BLE001  raised below, where no nursery wraps it into a group
            failure = error
        finally:
            with trio.CancelScope(shield=True):
                await links.say_goodbye()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _open(reply: Reply, reply_type: type[R]) -> R:
    """Decode an answer; raise what it says if that is an error."""
    if reply.status != 0:
        raise from_status(reply.status, decode(Failure, reply.body).message if reply.body else "")
    return decode(reply_type, reply.body)


def _pages(items: Sequence[T], length: int) -> Iterator[tuple[T, ...]]:
    """Divide into pages."""
    for start in range(0, len(items), length):
        yield tuple(items[start : start + length])


async def _ask(channel: Channel, request: Request, reply_type: type[R]) -> R:
    """Ask something on a channel that is not in use yet, or no longer."""
    with trio.move_on_after(HELLO_TIMEOUT_S):
        return _open(await channel.call(request.op, encode(request)), reply_type)
    raise DaemonUnreachable(f"it did not answer {type(request).__name__} in {HELLO_TIMEOUT_S:.0f} s")
