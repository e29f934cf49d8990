"""Serve requests: find the session, answer retries from what was recorded, call the handler, turn errors into replies.

A handler is registered by the class of its request, in one of three kinds:

- ``handlers_now``: synchronous; returns None if it takes an await after all, before anything has happened.
- ``handlers``: asynchronous.
- ``bulk``: takes the payload and the room for the reply's payload, and makes the Reply itself. ``bulk_now``: the same,
  synchronous; returns None as ``handlers_now`` do.

A recorded request that awaits runs as a task of the server: its client may lose the connection, come back and send it
again, and then joins the task. A newer request on its slot means that the client has given it up: it is cancelled, and
the newer one served when it has ended. Every other request is cancelled with its connection.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import trio

from .. import disk
from ..errors import FsError, NotPermitted, ProtocolError, Stale, StorageError
from ..model import ClientId
from ..observe.statistics import Statistics
from ..ports import Channel, KeyValueStore, Reply
from ..services.calls import Batch, Call
from ..services.sessions import Session, SessionTable
from .messages import (
    REQUESTS,
    Body,
    DropChunks,
    Expel,
    Failure,
    Finish,
    HeldFiles,
    Hello,
    InDoubt,
    Prepare,
    Recount,
    Request,
    Secure,
    TrimChunks,
    decode,
    decode_request,
    encode,
)

R = TypeVar("R", bound=Body)

AsyncHandler = Callable[[Request, Call], Awaitable[Body]]
SyncHandler = Callable[[Request, Call], Body | None]
BulkHandler = Callable[[Request, memoryview | None, int], Awaitable[Reply]]
SyncBulkHandler = Callable[[Request, memoryview | None, int], Reply | None]

log = logging.getLogger(__name__)

#: What only daemons may ask of each other.
FROM_DAEMONS = (TrimChunks, DropChunks, Prepare, Finish, Secure, InDoubt, HeldFiles, Recount, Expel)
_NAMES = {op: cls.__name__ for op, cls in REQUESTS.items()}
#: Counts requests that nobody knows.
_UNKNOWN = "unknown"
#: Characters of an error's message that travel: it is for logs.
MESSAGE_MAX = 500


class ServedCall:
    """Stand for one request of a session; see services.calls.Call."""

    def __init__(self, store: KeyValueStore, session: Session, slot: int, seq: int) -> None:
        self._store = store
        self.session = session
        self.slot = slot
        self.seq = seq

    @property
    def client_id(self) -> ClientId:
        """Return whose request it is."""
        return self.session.client_id

    def commit(self, batch: Batch, reply: Body) -> None:
        """Write ``batch`` and the outcome in one transaction. Stale: the session has ended, nothing is written."""
        session = self.session
        if session.over.is_set():
            raise Stale("the session has ended")
        # A newer request on the slot means that the client has given this one up: its outcome must not hide the newer.
        if self.seq and session.newest[self.slot] == self.seq:
            key = disk.key_slot(disk.OUTCOME, session.client_id, self.slot)
            batch.put(key, self.seq.to_bytes(8, "big") + encode(reply))
        batch.write()


class LocalCall:
    """Stand for a request of this daemon to itself."""

    def __init__(self, client_id: ClientId) -> None:
        self._client_id = client_id

    @property
    def client_id(self) -> ClientId:
        """Return this daemon's identity as a client."""
        return self._client_id

    def commit(self, batch: Batch, reply: Body) -> None:
        """Write ``batch``: nobody will ask for the outcome."""
        batch.write()


class _Running:
    """Hold one recorded request that is being served as a task."""

    def __init__(self, seq: int) -> None:
        self.seq = seq
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.reply: Reply | None = None


class Server:
    """Be the handler of every channel of a daemon (ports.Handler, with ``handle_now``).

    ``client_id`` is this daemon's own. ``register`` everything, then ``run``, then serve.
    """

    def __init__(self, store: KeyValueStore, sessions: SessionTable, client_id: ClientId) -> None:
        self._store = store
        self._sessions = sessions
        self._local = LocalCall(client_id)
        self._handlers: dict[type[Request], AsyncHandler] = {}
        self._handlers_now: dict[type[Request], SyncHandler] = {}
        self._bulk: dict[type[Request], BulkHandler] = {}
        self._bulk_now: dict[type[Request], SyncBulkHandler] = {}
        self._ops_now: frozenset[int] = frozenset()
        self._wait_done: Callable[[Request], Awaitable[None]] = _at_once
        self.register(sessions.handlers(), sessions.handlers_now())
        self._running: dict[tuple[ClientId, int], _Running] = {}
        self._nursery: trio.Nursery | None = None
        #: Requests served so far, by the name of their class.
        self.statistics = Statistics()

    def register(
        self,
        handlers: Mapping[type[Request], AsyncHandler],
        handlers_now: Mapping[type[Request], SyncHandler] = MappingProxyType({}),
        bulk: Mapping[type[Request], BulkHandler] = MappingProxyType({}),
        wait_done: Callable[[Request], Awaitable[None]] | None = None,
        bulk_now: Mapping[type[Request], SyncBulkHandler] = MappingProxyType({}),
    ) -> None:
        """Add a service's handlers.

        ``wait_done`` waits until every daemon has done its part of a request: before that no retry is answered from
        what an earlier incarnation of this one recorded.
        """
        self._wait_done = wait_done or self._wait_done
        self._handlers.update(handlers)
        self._handlers_now.update(handlers_now)
        self._bulk.update(bulk)
        self._bulk_now.update(bulk_now)
        self._ops_now = frozenset(cls.op for cls in (*self._handlers_now, *self._bulk_now))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the tasks of recorded requests until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    @property
    def requests(self) -> dict[str, int]:
        """Return how many requests were served so far, by the name of their class."""
        return {name: durations.count for name, durations in self.statistics.durations().items()}

    # ── entrances ────────────────────────────────────────────────────────────────────────────────────────────────────

    def handle_now(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply | None:
        """Serve a request that takes no await; None: call the handler. Never raises."""
        if op not in self._ops_now:
            return None
        started_ns = time.perf_counter_ns()
        try:
            request, slot, seq = decode_request(op, body)
            session = self._admit(channel, request, payload, want)
            bulk = self._bulk_now.get(type(request))
            if bulk is not None:
                reply = bulk(request, payload, want)
                if reply is not None:
                    self.statistics.add(_NAMES[op], started_ns)
                return reply
            handler = self._handlers_now[type(request)]
            if not request.recorded:
                answer = handler(request, ServedCall(self._store, session, 0, 0))
            elif self._recall(session, request, slot, seq) is None and (session.client_id, slot) not in self._running:
                answer = handler(request, ServedCall(self._store, session, slot, seq))
            else:
                answer = None
            if answer is None:
                return None
            reply = Reply(0, encode(answer))
        except Exception as error:  # noqa: BLE001  every error is a reply
            reply = _failure(op, error)
        self.statistics.add(_NAMES.get(op, _UNKNOWN), started_ns)
        return reply

    async def __call__(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        """Serve any request; only cancellation comes out."""
        started_ns = time.perf_counter_ns()
        try:
            request, slot, seq = decode_request(op, body)
            if isinstance(request, Hello):
                return Reply(0, encode(await self._sessions.hello(channel, request)))
            session = self._admit(channel, request, payload, want)
            if not request.recorded:
                return await self._serve(request, ServedCall(self._store, session, 0, 0), payload, want)
            return await self._serve_recorded(session, request, slot, seq)
        except Exception as error:  # noqa: BLE001  every error is a reply
            return _failure(op, error)
        finally:
            self.statistics.add(_NAMES.get(op, _UNKNOWN), started_ns)

    async def call_local(self, request: Request, reply_type: type[R]) -> R:
        """Serve a request of this daemon to itself (not recorded, no payload); raise what is wrong."""
        assert not request.recorded and type(request) not in self._bulk
        answer = None
        if type(request) in self._handlers_now:
            answer = self._handlers_now[type(request)](request, self._local)
        if answer is None:
            answer = await self._handlers[type(request)](request, self._local)
        assert isinstance(answer, reply_type)
        return answer

    # ── the way of a request ─────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, channel: Channel, request: Request, payload: memoryview | None, want: int) -> Session:
        """Return the session if it may ask this. Stale, NotPermitted, ProtocolError."""
        session = self._sessions.of(channel)
        if isinstance(request, FROM_DAEMONS) and channel.peer.daemon_id < 0:
            raise NotPermitted(f"{type(request).__name__} is for daemons")
        if (payload is not None or want) and type(request) not in self._bulk:
            raise ProtocolError(f"{type(request).__name__} has no payload")
        return session

    async def _serve(self, request: Request, call: Call, payload: memoryview | None, want: int) -> Reply:
        """Call the handler of an admitted request."""
        cls = type(request)
        if cls in self._bulk:
            return await self._bulk[cls](request, payload, want)
        answer = self._handlers_now[cls](request, call) if cls in self._handlers_now else None
        if answer is None:
            if cls not in self._handlers:
                raise ProtocolError(f"nobody serves {cls.__name__} here")
            answer = await self._handlers[cls](request, call)
        return Reply(0, encode(answer))

    def _recall(self, session: Session, request: Request, slot: int, seq: int) -> Body | _Running | None:
        """Return the outcome of a recorded request that is a retry, or its task; None: it is to be served.

        Stale: the client has given this request up and used the slot again.
        """
        newest = session.newest.get(slot)
        outcome: Body | None = None
        if newest is None or newest == seq:
            stored = self._store.get(disk.key_slot(disk.OUTCOME, session.client_id, slot))
            done = int.from_bytes(stored[:8], "big") if stored is not None else 0
            if stored is not None and done == seq:
                outcome = decode(request.Reply, stored[8:])
                if newest is None:
                    self._sessions.replay(session, request, outcome)
            newest = newest or done
        if seq < newest:
            raise Stale(f"slot {slot} has gone on to {newest}")
        session.newest[slot] = seq
        # An outcome may be stored while its task goes on: other daemons are still to do their part.
        running = self._running.get((session.client_id, slot))
        return running if running is not None and running.seq == seq else outcome

    async def _serve_recorded(self, session: Session, request: Request, slot: int, seq: int) -> Reply:
        """Serve a recorded request once, however often it comes."""
        while (found := self._recall(session, request, slot, seq)) is None:
            older = self._running.get((session.client_id, slot))
            if older is None:
                break
            older.scope.cancel()
            await older.done.wait()
        if isinstance(found, Body):
            await self._wait_done(request)
            return Reply(0, encode(found))
        running = found
        if running is None:
            running = self._running[session.client_id, slot] = _Running(seq)
            call = ServedCall(self._store, session, slot, seq)
            assert self._nursery is not None
            self._nursery.start_soon(self._run, running, request, call)
        await running.done.wait()
        assert running.reply is not None
        return running.reply

    async def _run(self, running: _Running, request: Request, call: ServedCall) -> None:
        """Serve a recorded request as a task of its own."""
        with running.scope:
            try:
                running.reply = await self._serve(request, call, None, 0)
            except Exception as error:  # noqa: BLE001  every error is a reply
                running.reply = _failure(request.op, error)
        if running.scope.cancelled_caught:
            running.reply = _failure(request.op, Stale("the client has given it up"))
        # Cancelled only when the daemon stops: then nobody is told anything, and the next incarnation is asked again.
        key = call.client_id, call.slot
        if self._running.get(key) is running:
            del self._running[key]
        running.done.set()


async def _at_once(request: Request) -> None:
    """Be the ``wait_done`` of services whose requests end here."""
    del request
    await trio.lowlevel.checkpoint()


def _failure(op: int, error: Exception) -> Reply:
    """Turn an exception into a reply; one that nobody foresaw is logged with its traceback."""
    if not isinstance(error, FsError):
        name = REQUESTS[op].__name__ if op in REQUESTS else str(op)
        log.error("request %s failed unexpectedly", name, exc_info=error)
        error = StorageError(f"{name}: {error!r}")
    elif isinstance(error, StorageError):
        log.error("storage failed: %s", error)
    return Reply(error.status, encode(Failure(str(error)[:MESSAGE_MAX])))
