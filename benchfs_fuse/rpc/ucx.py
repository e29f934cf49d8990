"""Carry requests over UCX: shared memory between processes of one node, TCP or RDMA otherwise. Only importer of ucxx.

**One connection, one worker.** Every connection has a UCX worker of its own (2 ms to make, about seven descriptors;
2 MB where it is shared memory). What that buys: an ended connection takes everything with it, every message on its
way, every posted receive, every buffer. A delayed request of an old connection cannot reach a new one, and a dead peer
leaves nothing behind.

**Messages.** A request or reply is one control message (rpc/frames). The receiver keeps ``CONTROL_RECEIVES`` receives
posted for them, so they land without a copy; more of them wait inside UCX. A payload above ``INLINE_MAX`` is a message
of its own and always finds its receive posted: a request's goes into one of the other end's ``BULK_SLOTS`` buffers (the
caller holds that slot until the reply came), a reply's goes straight to the caller's destination. So UCX never
buffers a large message, and each end's memory per connection is bounded.

==========  ==============================================================================
tag         message (64 bits: kind in the upper 32, number in the lower)
==========  ==============================================================================
1, 0        control message
2, slot     payload of the request that names this slot
3, id       payload of the reply to the request with this id
==========  ==============================================================================

Whatever else comes would stay in UCX for as long as the connection lasts, and so would the second payload for one
slot: the connection ends when it is found. A peer that asks for more than it takes has to wait with its large reads
(``REPLY_BYTES_MAX``); one that takes nothing at all loses its connection (``UNSENT_MAX``).

**Death.** The meeting socket tells (rpc/meeting). UCX itself then has to let go of messages that will never complete.
What it takes, all of it tried with ``kill -9`` in the middle of transfers in both directions:

- Endpoints with error handling, over shared memory too (``UCX_SYSV_ERROR_HANDLING``): without it a copy from a dead
  process's memory ends *our* process.
- No rendezvous over shared memory: a half-done one crashes when its worker is destroyed. Nor over TCP where no device
  does RDMA. Eager messages are as fast.
- System V segments rather than POSIX ones: the kernel removes them with the last process; a killed process leaves its
  POSIX ones in /dev/shm for ever. What was made an instant before the kill, its peers remove (rpc/segments).
- The worker is destroyed through UCX, not through UCXX: UCXX's destructor waits for half-received messages, for ever.

**Waiting.** Each connection has a task that polls its worker while anything moves and for ``spin_us`` after that, then
arms it and sleeps on its file descriptor. A caller that is alone polls in its own call first: two scheduler passes cost
more than a request over shared memory. Where answers take longer than that, callers soon stop trying. Whoever polls
yields the processor after each poll: more processes may poll than there are processors.
"""

import ctypes
import logging
import mmap
import os
import re
import resource
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import trio

from ..errors import AuthenticationFailed, Disconnected, NotSupported, ProtocolError, StorageError, UserError
from ..limits import (
    BULK_SLOTS,
    CONNECTIONS_MAX,
    CONTROL_RECEIVES,
    IN_FLIGHT_MAX,
    INLINE_MAX,
    PAYLOAD_MAX,
    REPLY_BYTES_MAX,
    UNSENT_MAX,
)
from ..model import ClientId
from ..observe import recording, spans
from ..ports import Buffer, Channel, Ending, Handler, Peer, Reply
from . import frames, meeting, segments
from .addresses import is_public, public_devices
from .handshake import Card, Handshake, Role
from .network import handle_now_of
from .wire import Receive, load_compiled, make_wire

log = logging.getLogger(__name__)

#: What UCX gets to know unless the user has said otherwise; read by UCX when it is loaded.
ENVIRONMENT = {
    # Host memory: UCXX's own defaults are made for GPUs.
    "UCX_MEMTYPE_CACHE": "n",
    "UCX_RNDV_THRESH": "auto",
    "UCX_RNDV_FRAG_MEM_TYPE": "host",
    # TCP's default segments halve its speed (1 MiB over loopback: 0.9 ms, with these 0.4 ms).
    "UCX_TCP_TX_SEG_SIZE": "64k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
    # Shared memory with error handling: see the module's docstring.
    "UCX_SYSV_ERROR_HANDLING": "y",
    # What fails is an exception of ours; warnings about peers that died would only disturb.
    "UCX_LOG_LEVEL": "error",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}
#: Where no device registers memory, UCX need not see what is unmapped: to patch munmap(2) and its like takes it 0.4 s.
#: Without that it follows a null pointer when a rendezvous is given up; over TCP there need not be any.
WITHOUT_RDMA = {"UCX_MEM_EVENTS": "n"}
RDMA_DEVICES = Path("/sys/class/infiniband")
#: Where UCX is told how large segments of shared memory are, and the largest with which it works (1.21: with 64 KiB,
#: whose length does not go into 16 bits, transfers hang).
SEGMENTS = "UCX_SYSV_SEG_SIZE"
SEGMENT_MAX = (1 << 16) - 1
_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
#: Transport for peers that share memory with us, and for all others.
SHARED_TLS = "sysv"
REMOTE_TLS = "^sysv,posix,cma,knem,xpmem"
#: Transports that reach no other process by themselves: ``self``, and what only copies for the shared memory of others.
_ALONE = {"self", "cma", "knem"}

#: Microseconds to poll after the last thing that happened, before sleeping. A wake-up costs 25-50 µs on both sides
#: while the processor is busy, and several times that once it has gone idle, on a virtual one above all; this covers
#: what a mount does between two requests to the same daemon.
SPIN_US = 300
#: A caller whose peer has gone to sleep polls so much longer: the peer's wake-up.
WAKE_NS = 300_000
#: Who polls yields the processor after each poll, to whoever has to run there, the peer perhaps. If it does not come
#: back for so long, or a tenth of the time for which it may poll, somebody else has work for it: then polling ends, and
#: is not tried again for up to so many times.
CONTENDED_NS = 1_000_000
REST_MAX = 63
#: A payload adds to that what copying it takes: 4 GB/s is what a slow memory or a fast network does.
SPIN_BYTES_PER_NS = 4
#: A caller whose answer is moving (a large payload) polls on, but never keeps the process from the rest this long.
SPIN_US_MAX = 2000
#: Callers that polled in vain let up to this many of their successors wait without trying.
SPIN_SKIP_MAX = 15
#: Calls answered without a pause of their own let other tasks run after this many nanoseconds.
YIELD_NS = 1_000_000
#: Nanoseconds of polling between two turns of the scheduler: about as long as its turn takes.
TURN_NS = 10_000
#: The same for the only connection that is polled, while nothing is under way on it.
LONE_TURN_NS = 50_000
#: Nanoseconds that a caller polls before it looks at the time and lets other threads run.
SPIN_TURN_NS = 50_000
#: A send that cannot go on because the peer takes nothing is polled at leisure after this many nanoseconds.
STALL_NS = 20_000_000
STALL_POLL_S = 0.001
#: How often an idle worker may be found busy while it is armed on the way, before its task is woken to see to it.
SETTLE_TRIES = 8
#: Seconds for the meeting socket to say what it knows, when UCX has failed first. A dead process's sockets close within
#: microseconds of each other; a network that fails for UCX alone is as good as silent.
VERDICT_S = 1.0
#: How often, in turns in which something came, to look for messages that nobody waits for: a look takes 0.3 µs.
STRAYS_EVERY = 64
#: Descriptors of one connection: some seven of UCX's, and the meeting socket. All connections together get half of what
#: the process may have.
DESCRIPTORS_EACH = 8
#: Progress calls that let cancelled receives and a closed endpoint leave a worker before it is destroyed.
LAST_PROGRESS = 16

_CONTROL = 1 << 32
_REQUEST_BULK = 2 << 32
_REPLY_BULK = 3 << 32
_CONTROL_SIZE = -(-frames.CONTROL_MAX // mmap.PAGESIZE) * mmap.PAGESIZE


class UcxStatistics(NamedTuple):
    """Count what an engine has done. ``spins`` counts calls answered without waiting, ``sleeps`` armed waits."""

    connections: int
    in_flight: int
    bytes_in: int
    bytes_out: int
    calls: int
    served: int
    spins: int
    sleeps: int
    wakeups: int


class _Counters:
    """Hold the numbers behind UcxStatistics."""

    __slots__ = ("bytes_in", "bytes_out", "calls", "served", "sleeps", "spins", "wakeups")

    def __init__(self) -> None:
        self.bytes_in = self.bytes_out = self.calls = self.served = 0
        self.spins = self.sleeps = self.wakeups = 0


@contextmanager
def _without_blas_threads() -> Iterator[None]:
    """Import NumPy, which ucxx needs for the types of buffers, without the threads of its algebra."""
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def check_segments(text: str) -> None:
    """Refuse a size of segments of shared memory with which transfers hang. UserError."""
    match = re.fullmatch(r"(\d+)([kKmMgGtT]?)[bB]?", text.strip())
    if text.strip() == "inf" or (match and int(match[1]) << _SHIFTS[match[2].lower()] > SEGMENT_MAX):
        raise UserError(
            f"with {SEGMENTS}={text} in the environment, transfers over shared memory hang: leave it out, or set "
            "less than 64k"
        )


class Ucx:
    """Hold what is used of ucxx and of UCX itself, for this module and for measuring it. Any: ucxx has no types."""

    def __init__(self) -> None:
        check_segments(os.environ.get(SEGMENTS, ""))
        self._rdma = RDMA_DEVICES.is_dir() and any(RDMA_DEVICES.iterdir())
        for name, value in (ENVIRONMENT if self._rdma else ENVIRONMENT | WITHOUT_RDMA).items():
            os.environ.setdefault(name, value)
        with _without_blas_threads():
            import ucxx._lib.libucxx as libucxx
        from ucxx._lib.arr import Array

        self.Array: Any = Array
        self.Context: Any = libucxx.UCXContext
        self.Worker: Any = libucxx.UCXWorker
        self.Endpoint: Any = libucxx.UCXEndpoint
        self.Address: Any = libucxx.UCXAddress
        self.Tag: Any = libucxx.UCXXTag
        self.Error: type[Exception] = libucxx.UCXError
        self.features = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
        self.TagMask: Any = libucxx.UCXXTagMask
        #: The compiled part of rpc/wire, None where it was not built.
        self.compiled: Any = load_compiled()
        self._destroy = ctypes.CDLL("libucp.so.0").ucp_worker_destroy  # the library that ucxx has loaded
        self._destroy.argtypes, self._destroy.restype = [ctypes.c_void_p], None
        self._keep = ctypes.pythonapi.Py_IncRef
        self._keep.argtypes, self._keep.restype = [ctypes.py_object], None

    def make_context(self, *, shared: bool, tls: str | None = None, net_devices: str | None = None) -> Any:
        """Make the context for peers that share memory with us, or for all others. ``Ucx.Error``: UCX cannot."""
        options = {"TLS": SHARED_TLS if shared else tls or REMOTE_TLS}
        if shared or not self._rdma:
            options["RNDV_THRESH"] = "inf"
        if net_devices and not shared:
            options["NET_DEVICES"] = net_devices
        return self.Context(options, feature_flags=self.features)

    def destroy(self, worker: Any, endpoint: Any) -> None:
        """Destroy a worker with all it holds, whatever state that is in. UCXX's shells, some KB, stay for ever.

        The worker's shell would work on the worker in its destructor; it owns one file descriptor besides. The
        endpoint's shell is what UCX calls when it finds out, perhaps only now, that the other end has gone.
        """
        descriptor = worker.epoll_file_descriptor
        self._keep(worker)
        self._keep(endpoint)
        self._destroy(worker.handle)
        os.close(descriptor)


class _Call:
    """Hold one unanswered request. ``into`` and ``payload`` stay referenced until UCX is through with them."""

    __slots__ = (
        *("answered_ns", "done", "event", "frame", "into", "landing", "number", "reply", "sent_ns", "slot", "want"),
    )

    def __init__(self, number: int, into: memoryview | None, want: int, landing: Receive | None, slot: int) -> None:
        self.number = number
        #: When it was sent and answered, 0 unless somebody records.
        self.sent_ns = self.answered_ns = 0
        self.into = into
        self.want = want
        #: The posted receive of the reply's payload, None where it comes inline.
        self.landing = landing
        #: The slot of the request's payload, -1 without one.
        self.slot = slot
        self.frame: frames.Frame | None = None
        self.reply: Reply | None = None
        self.done = False
        self.event: trio.Event | None = None


class _Slot:
    """Hold one buffer for a request's payload, its posted receive, and the request that waits for it or uses it."""

    __slots__ = ("frame", "receive", "tag", "view")

    def __init__(self, view: memoryview, tag: int) -> None:
        self.view = view
        self.tag = tag
        self.receive: Receive | None = None
        self.frame: frames.Frame | None = None


async def refuse(channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
    """Serve nothing: what a connecting side answers that gave no handler."""
    return Reply(NotSupported.status, b"")


class UcxChannel:
    """Be one end of a connection; see ports.Channel. Made by UcxEngine."""

    def __init__(
        self,
        engine: "UcxEngine",
        peer: Peer,
        handler: Handler,
        transport: str,
        worker: Any,
        *,
        shared: bool,
        met_s: float,
    ) -> None:
        self._engine = engine
        self._ucx = engine.ucx
        self._counters = engine.counters
        self._peer = peer
        self._handler = handler
        self._handle_now = handle_now_of(handler)
        self._transport = transport
        #: Whether both ends are known to share memory and pids, and when they met, in seconds of the epoch.
        self._shared = shared
        self._met_s = met_s
        self._worker = worker
        self._endpoint: Any = None
        self._stream: trio.SocketStream | None = None
        # The life of the connection.
        self._ending: Ending | None = None
        self._ended = trio.Event()
        self._gone = trio.Event()
        self._scope = trio.CancelScope()
        self._failed = False
        self._verdict = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._asleep = False
        #: When UCX last had something to do, and when the other end last asked for something.
        self._active_ns = self._asked_ns = 0
        # What this end asks.
        self._calls: dict[int, _Call] = {}
        self._room = trio.Semaphore(IN_FLIGHT_MAX)
        self._bulk_room = trio.Semaphore(BULK_SLOTS)
        self._bulk_free = list(range(BULK_SLOTS))
        self._request_id = 0
        self._landing: list[_Call] = []
        self._spin_misses = 0
        self._spin_skip = 0
        # What this end serves.
        self._serving = 0
        #: Bytes of large replies that were asked for and are not out yet; requests that wait until these are fewer.
        self._reply_bytes = 0
        self._held: deque[frames.Frame] = deque()
        self._letting_in = False
        self._turns = 0
        self._filling: list[_Slot] = []
        memory = memoryview(mmap.mmap(-1, CONTROL_RECEIVES * _CONTROL_SIZE + BULK_SLOTS * PAYLOAD_MAX))
        control, bulk = memory[: CONTROL_RECEIVES * _CONTROL_SIZE], memory[CONTROL_RECEIVES * _CONTROL_SIZE :]
        self._wire = make_wire(engine.ucx, worker, control, CONTROL_RECEIVES, _CONTROL)
        self._bulk = [_Slot(bulk[i * PAYLOAD_MAX :][:PAYLOAD_MAX], _REQUEST_BULK | i) for i in range(BULK_SLOTS)]

    @property
    def peer(self) -> Peer:
        """Return who is at the other end."""
        return self._peer

    @property
    def transport(self) -> str:
        """Name what carries the bytes: ``shm``, ``tcp`` or ``rdma``."""
        return self._transport

    @property
    def in_flight(self) -> int:
        """Return how many requests of this end have no reply yet, those whose callers gave up included."""
        return len(self._calls)

    async def call(self, op: int, body: bytes, payload: Buffer | None = None, into: memoryview | None = None) -> Reply:
        """Send one request, wait for its reply; see ports.Channel.

        Does not yield where the reply is there at once, but for once in a millisecond.
        """
        await self._take(self._room)
        bulk = payload is not None and len(payload) > INLINE_MAX
        if bulk:
            try:
                await self._take(self._bulk_room)
            except BaseException:
                self._room.release()
                raise
        if self._ending is not None:
            self._give_back(bulk)
            raise Disconnected(f"the connection to {self._peer.host} has ended: {self._ending.value}")
        engine = self._engine
        answer = self._begin(op, body, payload, into, bulk)
        if not isinstance(answer, Reply):
            return await answer
        if time.perf_counter_ns() - engine.yielded_ns > YIELD_NS:
            await trio.lowlevel.checkpoint()
            engine.yielded_ns = time.perf_counter_ns()
        return answer

    def call_now(
        self, op: int, body: bytes, payload: Buffer | None = None, into: memoryview | None = None, polls: bool = True
    ) -> Reply | Awaitable[Reply] | None:
        """Begin a call without waiting for anything; see ports.Channel."""
        bulk = payload is not None and len(payload) > INLINE_MAX
        if (
            self._ending is not None
            or self._room.value == 0
            or (bulk and self._bulk_room.value == 0)
            or (polls and time.perf_counter_ns() - self._engine.yielded_ns > YIELD_NS)  # the others have their turn
        ):
            return None
        self._room.acquire_nowait()
        if bulk:
            self._bulk_room.acquire_nowait()
        if not polls:
            started_ns = recording.now()
            return self._wait_reply(self._start(op, body, payload, into, bulk), op, started_ns)
        return self._begin(op, body, payload, into, bulk)

    def _begin(
        self, op: int, body: bytes, payload: Buffer | None, into: memoryview | None, bulk: bool
    ) -> Reply | Awaitable[Reply]:
        """Send a request and poll for its reply, if nobody else waits; return that, or what waits for it."""
        engine = self._engine
        started_ns = recording.now()
        call = self._start(op, body, payload, into, bulk)
        if not engine.waiting and not call.done:
            engine.waiting = 1
            try:
                self._spin(call, call.want or (len(payload) if payload is not None else 0))
            finally:
                engine.waiting = 0
        if call.done and call.reply is not None:
            if started_ns:
                self._record(call, op, started_ns)
            return call.reply
        engine.waiting += 1
        return self._wait(call, op, started_ns)

    async def _wait(self, call: _Call, op: int, started_ns: int) -> Reply:
        """Wait for the reply of a request that was sent, as one of those who wait: the next one does not poll then."""
        try:
            return await self._wait_reply(call, op, started_ns)
        finally:
            self._engine.waiting -= 1

    async def _wait_reply(self, call: _Call, op: int, started_ns: int) -> Reply:
        """Wait for the reply of a request that was sent. Whoever was given this awaits it, at once."""
        if not call.done:
            call.event = trio.Event()  # before settling, which may find the reply
            self._settle()
            await call.event.wait()
        if started_ns:
            self._record(call, op, started_ns)
        if call.reply is None:
            raise Disconnected(f"the connection to {self._peer.host} ended while request {op} was under way")
        return call.reply

    def _record(self, call: _Call, op: int, started_ns: int) -> None:
        if (recorder := recording.recorder) is not None:
            sent_ns = call.sent_ns or started_ns
            recorder.add_request(self._peer.daemon_id, call.number, op, started_ns, sent_ns, call.answered_ns)

    @property
    def serving(self) -> int:
        """Return how many requests of the other end are being served."""
        return self._serving

    async def wait_closed(self) -> Ending:
        """Wait until the connection has ended; return why."""
        await self._ended.wait()
        assert self._ending is not None
        return self._ending

    async def aclose(self) -> None:
        """End the connection and wait until none of its requests is being served and UCX has let go of all buffers."""
        self._end(Ending.LOCAL)
        await self._gone.wait()

    # Calls: this end asks.

    async def _take(self, room: trio.Semaphore) -> None:
        """Take a place, without a scheduler pass where one is free."""
        try:
            room.acquire_nowait()
        except trio.WouldBlock:
            await room.acquire()

    def _give_back(self, bulk: bool) -> None:
        self._room.release()
        if bulk:
            self._bulk_room.release()

    def _start(self, op: int, body: bytes, payload: Buffer | None, into: memoryview | None, bulk: bool) -> _Call:
        """Post the receive for the reply's payload, send the request and its payload."""
        want = len(into) if into is not None else 0
        slot = self._bulk_free.pop() if bulk else -1
        request_id = self._request_id
        while request_id in self._calls:
            request_id = (request_id + 1) & frames.REQUEST_ID_MAX
        self._request_id = (request_id + 1) & frames.REQUEST_ID_MAX
        message = frames.encode_request(request_id, op, body, payload, want, max(slot, 0))
        landing = None
        if want > INLINE_MAX:
            assert into is not None
            landing = self._wire.receive(into, _REPLY_BULK | request_id)
        call = self._calls[request_id] = _Call(request_id, into, want, landing, slot)
        self._counters.calls += 1
        self._send(message, _CONTROL)
        if bulk and payload is not None:
            self._send(payload, _REQUEST_BULK | slot)
        call.sent_ns = recording.now()
        return call

    def _spin(self, call: _Call, size: int) -> None:
        """Poll for the reply in the caller's own time, where that has been worth it lately; longer for a payload."""
        spin_ns = self._engine.spin_ns
        if not spin_ns:
            return
        if self._spin_skip:
            self._spin_skip -= 1
            return
        now = time.perf_counter_ns()
        if now - self._active_ns > spin_ns:
            spin_ns += WAKE_NS  # the peer sleeps
        spin_ns += size // SPIN_BYTES_PER_NS
        last, end = now + spin_ns, now + SPIN_US_MAX * 1000
        while not call.done and not self._failed and self._ending is None:
            before = now
            if self._poll(SPIN_TURN_NS):
                now = time.perf_counter_ns()
                last = now + spin_ns
                continue
            now = time.perf_counter_ns()
            if now >= last or now >= end or now - before >= SPIN_TURN_NS + self._engine.contended_ns:
                self._spin_misses = min(2 * self._spin_misses + 1, SPIN_SKIP_MAX)
                self._spin_skip = self._spin_misses
                return
            os.sched_yield()  # this one lets other threads of the process run, too
        self._spin_misses = 0
        self._counters.spins += 1
        self._settle()

    def _on_reply(self, frame: frames.Frame) -> None:
        call = self._calls.get(frame.request_id)
        if call is None or call.frame is not None:
            raise ProtocolError(f"reply to request {frame.request_id}, which is not under way")
        if len(frame.payload) + frame.bulk > (call.want or INLINE_MAX):
            raise ProtocolError(f"reply of {len(frame.payload) + frame.bulk} bytes where {call.want} have room")
        if call.landing is None and frame.bulk:
            raise ProtocolError("reply followed by a payload that nobody expects")
        call.frame = frame
        if call.landing is None:
            received = len(frame.payload)
            if call.want and call.into is not None:
                call.into[:received] = frame.payload
                call.reply = Reply(frame.code, frame.body, None, received)
            else:
                call.reply = Reply(frame.code, frame.body, bytes(frame.payload) or None)
            self._finish(frame.request_id, call)
        elif call.landing.completed:
            self._on_landed(call)
        else:
            self._landing.append(call)

    def _on_landed(self, call: _Call) -> None:
        """Complete a call whose reply and payload are both there."""
        frame = call.frame
        assert frame is not None
        assert call.landing is not None
        call.landing.check_error()
        call.landing = None
        self._counters.bytes_in += frame.bulk
        call.reply = Reply(frame.code, frame.body, None, frame.bulk)
        self._finish(frame.request_id, call)

    def _finish(self, request_id: int, call: _Call) -> None:
        """Let the caller go on, with a reply or, at the end of the connection, without."""
        del self._calls[request_id]
        if call.slot >= 0:
            self._bulk_free.append(call.slot)
        self._give_back(call.slot >= 0)
        call.done = True
        call.answered_ns = recording.now()
        if call.event is not None:
            call.event.set()

    # Serving: the other end asks.

    def _on_request(self, frame: frames.Frame) -> None:
        self._serving += 1
        self._asked_ns = self._active_ns
        if self._serving > IN_FLIGHT_MAX:
            raise ProtocolError(f"more than {IN_FLIGHT_MAX} requests under way")
        if frame.want > INLINE_MAX:
            self._held.append(frame)
            self._let_in()
            return
        if not frame.bulk:
            self._dispatch(frame, frame.payload if len(frame.payload) else None, None)
            return
        slot = self._bulk[frame.slot] if frame.slot < BULK_SLOTS else None
        if slot is None or slot.frame is not None or slot.receive is None:
            raise ProtocolError(f"request with its payload in slot {frame.slot}, which is taken or does not exist")
        slot.frame = frame
        if slot.receive.completed:
            self._on_filled(slot)
        else:
            self._filling.append(slot)

    def _let_in(self) -> None:
        """Serve those that ask for large replies, as far as there is room for these."""
        if self._letting_in:
            return  # the loop below is at it
        self._letting_in = True
        try:
            while self._held and self._reply_bytes + self._held[0].want <= REPLY_BYTES_MAX and self._ending is None:
                frame = self._held.popleft()
                self._reply_bytes += frame.want
                self._dispatch(frame, None, None)
        finally:
            self._letting_in = False

    def _reply_out(self, want: int, release: Callable[[], None] | None) -> None:
        """Go on when the payload of a reply is out."""
        if release is not None:
            release()
        self._reply_bytes -= want
        self._let_in()

    def _on_filled(self, slot: _Slot) -> None:
        """Serve a request whose payload is there."""
        frame = slot.frame
        assert frame is not None and slot.receive is not None
        slot.receive.check_error()
        slot.receive = None
        self._counters.bytes_in += frame.bulk
        self._dispatch(frame, slot.view[: frame.bulk], slot)

    def _dispatch(self, frame: frames.Frame, payload: memoryview | None, slot: _Slot | None) -> None:
        """Have the handler serve a request: at once if it can, otherwise in a task."""
        recorder, served = recording.recorder, None
        if recorder is not None:
            served = recorder.receive(self._peer.client_id, frame.request_id, frame.code)
        if self._handle_now is not None:
            token = recorder.begin_served(served) if recorder is not None and served is not None else None
            try:
                reply = self._handle_now(self, frame.code, frame.body, payload, frame.want)
            except Exception:
                log.exception("request %d: the handler failed", frame.code)
                reply = Reply(StorageError.status, b"")
            finally:
                if recorder is not None and token is not None:
                    recorder.leave_served(token)
            if reply is not None:
                self._answer(frame, reply, slot, served)
                return
        if payload is not None and slot is None:
            payload = memoryview(bytes(payload))  # it lies in a control buffer, which is needed for the next message
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, frame, payload, slot, served)

    async def _serve(
        self, frame: frames.Frame, payload: memoryview | None, slot: _Slot | None, served: spans.Served | None
    ) -> None:
        if served is not None and (recorder := recording.recorder) is not None:
            recorder.begin_served(served)
        try:
            reply = await self._handler(self, frame.code, frame.body, payload, frame.want)
        except Exception:
            log.exception("request %d: the handler failed", frame.code)
            reply = Reply(StorageError.status, b"")
        self._answer(frame, reply, slot, served)
        self._settle()

    def _answer(
        self, frame: frames.Frame, reply: Reply, slot: _Slot | None, served: spans.Served | None = None
    ) -> None:
        """Send the reply and its payload, once the request's slot is free again; release the payload when it is out."""
        if served is not None:
            served.done_ns = recording.now()
        self._serving -= 1
        if self._ending is not None:
            if reply.release is not None:
                reply.release()
            return
        self._counters.served += 1
        if slot is not None:
            self._post_slot(slot)
        status, body, payload, _, release = reply
        try:
            message = frames.encode_reply(frame.request_id, status, body, payload, frame.want)
        except AssertionError:
            log.exception("request %d: the handler's reply is not allowed", frame.code)
            payload = None
            message = frames.encode_reply(frame.request_id, StorageError.status, b"", None, frame.want)
        if frame.want > INLINE_MAX:
            out = partial(self._reply_out, frame.want, release)
            self._send(payload if payload is not None else b"", _REPLY_BULK | frame.request_id, out)
        self._send(message, _CONTROL)
        if served is not None and (recorder := recording.recorder) is not None:
            recorder.end_served(served)
        if frame.want <= INLINE_MAX and release is not None:
            release()

    # UCX.

    def _send(self, data: Buffer, tag: int, release: Callable[[], None] | None = None) -> None:
        """Start sending; ``release`` is called when the buffer is out. What fails ends the connection."""
        if not self._failed:
            try:
                self._counters.bytes_out += self._wire.send(data, tag, release)
                if self._wire.unsent > UNSENT_MAX:
                    self._check_taken()
                return
            except self._ucx.Error:
                self._fail()
        if release is not None:
            release()

    def _check_taken(self) -> None:
        """End the connection to a peer that goes on asking and takes nothing."""
        if self._ending is None:
            log.warning(
                "giving up the connection to %s: it has not taken %d messages", self._peer.host, self._wire.unsent
            )
            self._end(Ending.PROTOCOL)

    def _refuse_strays(self) -> None:
        """Look for messages that nobody waits for. ProtocolError.

        Behind ``_reap`` there is none from a peer that keeps to the rules: control messages find receives posted then,
        and payloads always do.
        """
        if (length := self._wire.stray()) >= 0:
            raise ProtocolError(f"a message of {length} bytes that nobody waits for")

    def _fail(self) -> None:
        """Do without UCX, which failed, until the meeting socket has said whether the peer is dead for certain."""
        if not self._failed:
            self._failed = True
            self._verdict.deadline = trio.current_time() + VERDICT_S

    def _post_slot(self, slot: _Slot) -> None:
        slot.frame = None
        slot.receive = self._wire.receive(slot.view, slot.tag)

    def _poll(self, patience_ns: int = 0) -> bool:
        """Let UCX work and take what it has for us, or wait so long for something. Return whether anything happened."""
        if self._failed or self._ending is not None:
            return False
        try:
            found = self._wire.poll(patience_ns)
            if found is None:
                if self._wire.failed:
                    self._fail()
                return False
            self._active_ns = time.perf_counter_ns()
            self._take_messages(found)
            if self._filling or self._landing:
                self._take_payloads()
            self._turns += 1
            if self._turns % STRAYS_EVERY == 0 and self._ending is None:
                self._refuse_strays()
        except ProtocolError as error:
            self._give_up(error)
        except self._ucx.Error:
            self._fail()
        if self._wire.failed:
            self._fail()
        return True

    def _give_up(self, error: ProtocolError) -> None:
        log.warning("giving up the connection to %s: %s", self._peer.host, str(error))
        self._end(Ending.PROTOCOL)

    def _take_messages(self, found: list[frames.Frame]) -> None:
        """Take control messages in their order, until one of them ends the connection."""
        for frame in found:
            if self._ending is not None:
                return
            self._counters.bytes_in += frames.HEADER_SIZE + len(frame.body) + len(frame.payload)
            if frame.kind == frames.REPLY:
                self._on_reply(frame)
            else:
                self._on_request(frame)

    def _take_payloads(self) -> None:
        """Go on with the requests and replies whose payloads are there by now."""
        filled = [slot for slot in self._filling if slot.receive is not None and slot.receive.completed]
        if filled:
            self._filling = [slot for slot in self._filling if slot not in filled]
            for slot in filled:
                self._on_filled(slot)
        landed = [call for call in self._landing if call.landing is not None and call.landing.completed]
        if landed:
            self._landing = [call for call in self._landing if call not in landed]
            for call in landed:
                self._on_landed(call)

    def _settle(self) -> None:
        """See to it that the sleeping task will be woken, after somebody else has used the worker.

        Polling takes the events that the task's file descriptor was to tell: it has to be armed again. Where that does
        not succeed, the task is woken as if the descriptor were to be closed: a cancel scope for each sleep would cost
        a sixteenth of a small request.
        """
        if not self._asleep or self._failed or self._ending is not None:
            return
        for _ in range(SETTLE_TRIES):
            if self._wire.arm():
                return
            self._poll()
        trio.lowlevel.notify_closing(self._worker.epoll_file_descriptor)

    # The life of the connection.

    def attach(self, address: bytes) -> None:
        """Make the endpoint to the other end's worker and post all receives. Raise Disconnected if UCX cannot."""
        try:
            there = self._ucx.Address.create_from_buffer(address)
            self._endpoint = self._ucx.Endpoint.create_from_worker_address(self._worker, there, True)
        except self._ucx.Error as error:
            raise Disconnected(f"UCX cannot reach {self._peer.host}: {error}") from error
        try:
            self._wire.attach(self._endpoint)
        except self._ucx.Error as error:
            raise Disconnected(f"UCX cannot receive from {self._peer.host}: {error}") from error
        for slot in self._bulk:
            self._post_slot(slot)

    async def run(
        self,
        stream: trio.SocketStream,
        on_connect: Callable[[Channel], None] | None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep the connection going until it ends; return when nothing of it is left."""
        self._stream = stream
        try:
            async with trio.open_nursery() as self._nursery:
                try:
                    with self._scope:
                        async with trio.open_nursery() as nursery:
                            if on_connect is not None:
                                on_connect(self)
                            nursery.start_soon(self._watch)
                            nursery.start_soon(self._progress)
                            task_status.started()
                finally:
                    # Neither our callers nor the peer have to wait for what we still serve.
                    self._end(Ending.LOCAL)
                    self.let_go()
                    stream.socket.close()
                    self._nursery.cancel_scope.cancel()
        finally:
            self._engine.forget(self)
            self._gone.set()

    def _need_stream(self) -> trio.SocketStream:
        assert self._stream is not None
        return self._stream

    async def _watch(self) -> None:
        """End the connection when the meeting socket says so, or does not in time after UCX failed."""
        with self._verdict:
            self._end(await meeting.wait_end(self._need_stream()))
        self._end(Ending.SILENCE)

    async def _progress(self) -> None:
        """Let UCX work until it fails or the connection ends."""
        self._engine.awake += 1
        try:
            await self._poll_and_sleep()
        finally:
            self._engine.awake -= 1

    async def _poll_and_sleep(self) -> None:
        """Poll while anything moves and a little longer; then sleep until UCX has something."""
        engine, wire, counters = self._engine, self._wire, self._counters
        descriptor = self._worker.epoll_file_descriptor
        rest = losses = 0
        while not self._failed:
            began_ns = engine.yielded_ns = time.perf_counter_ns()
            turn_ns = TURN_NS if engine.awake > 1 or self._calls or self._serving else LONE_TURN_NS
            if self._poll(turn_ns if engine.spin_ns and not rest else 0):
                await trio.lowlevel.checkpoint()
                continue
            now = time.perf_counter_ns()
            if now - began_ns > engine.contended_ns + turn_ns:
                rest = losses = min(2 * losses + 1, REST_MAX)
            # Who waits for no answer, and is asked for nothing, has nothing to poll for: a mount between two calls.
            awaited_ns = self._active_ns if self._calls or self._serving else self._asked_ns
            if (rest or now - awaited_ns >= engine.spin_ns) and self._may_sleep() and wire.arm():
                rest = max(0, rest - 1)
                losses = losses if rest else losses // 2
                counters.sleeps += 1
                self._asleep = True
                engine.awake -= 1
                try:
                    await trio.lowlevel.wait_readable(descriptor)
                except trio.ClosedResourceError:
                    pass  # woken by _settle
                finally:
                    engine.awake += 1
                self._asleep = False
                counters.wakeups += 1
            elif wire.unsent and now - self._active_ns > STALL_NS:
                await trio.sleep(STALL_POLL_S)  # shared memory has no event for room in the peer's queue
            else:
                await trio.lowlevel.checkpoint()

    def _may_sleep(self) -> bool:
        """Look for messages that nobody waits for once more before nothing moves; they end the connection."""
        try:
            self._refuse_strays()
        except ProtocolError as error:
            self._give_up(error)
        return self._ending is None

    def _end(self, ending: Ending) -> None:
        """Decide that the connection is over; ``run`` does the rest."""
        if self._ending is None:
            self._ending = ending
            self._ended.set()
            self._scope.cancel()

    def let_go(self) -> None:
        """Make UCX let go of everything, whatever became of the peer, then fail the calls under way.

        What the peer has left half done stays in the worker, and goes with it.
        """
        calls = list(self._calls.items())
        self._landing, self._filling = [], []
        for slot in self._bulk:
            slot.receive = None
        for _, call in calls:
            call.landing = None
        self._wire.cancel()
        for _ in range(LAST_PROGRESS):
            self._worker.progress_once()
        if self._endpoint is not None:
            self._endpoint.close_blocking()  # by force, as it has error handling: waits for nobody
        for _ in range(LAST_PROGRESS):
            self._worker.progress_once()
        self._ucx.destroy(self._worker, self._endpoint)
        for release in self._wire.release():
            release()
        for request_id, call in calls:
            self._finish(request_id, call)
        if self._shared:
            self._engine.remove_segments(self._peer.pid, self._met_s)


class UcxEngine:
    """Make connections over UCX, one engine per process. An async context manager; see rpc.network.Network.

    ``peer`` is how the others see this process. ``tls`` and ``net_devices`` override UCX_TLS and UCX_NET_DEVICES; with
    either of ``tls`` and UCX_TLS set, that alone decides and shared memory is never chosen by itself. ``lease_s``
    bounds how long the silence of a peer's kernel goes unnoticed. ``spin_us`` is how long to poll before sleeping, 0 is
    never, None is what suits this machine. Unless ``public``, nothing is opened at an address of the public internet.
    """

    def __init__(
        self,
        peer: Peer,
        secret: bytes,
        cluster_id: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: str | None = None,
        net_devices: str | None = None,
        lease_s: float = 60.0,
        spin_us: int | None = None,
        public: bool = False,
    ) -> None:
        self.peer = peer
        self.ucx = Ucx()
        self.counters = _Counters()
        #: Callers inside ``call``: one that is alone may poll.
        self.waiting = 0
        #: Connections that are polled now.
        self.awake = 0
        #: When other tasks last got their turn.
        self.yielded_ns = 0
        #: On a single processor polling keeps the answer from being made.
        self.spin_ns = (SPIN_US if spin_us is None else spin_us) * 1000 if len(os.sched_getaffinity(0)) > 1 else 0
        self.contended_ns = max(CONTENDED_NS, self.spin_ns // 10)
        self._secret = secret
        self._cluster_id = cluster_id
        self._host = host
        self._port = port
        self._tls = tls or os.environ.get("UCX_TLS")
        self._net_devices = net_devices or os.environ.get("UCX_NET_DEVICES")
        self._lease_s = lease_s
        self._public = public
        self._shares = "" if self._tls else meeting.shares_of_this_process()
        self._contexts: dict[bool, Any] = {}
        self._channels: set[UcxChannel] = set()
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        #: Connections that are accepted, by what this process may have open.
        self.connections_max = min(CONNECTIONS_MAX, descriptors // 2 // DESCRIPTORS_EACH)
        self._nursery: trio.Nursery | None = None
        self._nursery_manager = trio.open_nursery()

    async def __aenter__(self) -> Self:
        """Begin. UserError when nothing can be reached with these settings, before anybody is kept waiting for it."""
        self._contexts[False] = self._make_remote_context()
        self._nursery = await self._nursery_manager.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
        try:
            await self._nursery_manager.__aexit__(kind, error, traceback)
        except BaseExceptionGroup as group:
            if group.exceptions != (error,):
                raise  # what the body alone raised goes on as it is

    def statistics(self) -> UcxStatistics:
        """Return what this engine has done so far."""
        counters = self.counters
        return UcxStatistics(
            len(self._channels),
            sum(channel.in_flight for channel in self._channels),
            *(counters.bytes_in, counters.bytes_out, counters.calls, counters.served),
            *(counters.spins, counters.sleeps, counters.wakeups),
        )

    @property
    def serving(self) -> int:
        """Return how many requests are being served."""
        return sum(channel.serving for channel in self._channels)

    @property
    def full(self) -> bool:
        """Tell whether there are as many connections as may be."""
        return len(self._channels) >= self.connections_max

    async def listen(
        self,
        handler: Handler,
        on_connect: Callable[[Channel], None] | None = None,
        *,
        host: str | None = None,
        port: int | None = None,
    ) -> str:
        """Accept connections from now on; return the address for ``connect``. Raise Disconnected if it cannot.

        UserError: at an address of the public internet, which nobody has allowed.
        """
        host = self._host if host is None else host
        try:
            listener, *others = await trio.open_tcp_listeners(self._port if port is None else port, host=host)
        except OSError as error:
            raise Disconnected(f"cannot listen at {host}: {error}") from error
        for other in others:
            await other.aclose()
        here = listener.socket.getsockname()[0]
        if not self._public and is_public(here):
            await listener.aclose()
            raise UserError(
                f"{here} can be reached from the public internet: choose another address with --listen "
                "(daemon.listen), or allow this one with --public (ucx.public)"
            )

        async def meet(stream: trio.SocketStream) -> None:
            made = _Meeting(self, Role.SERVER, handler)
            try:
                await meeting.receive(stream, made.handshake, made.answer, self._lease_s)
            except BaseException:
                made.abandon()
                raise
            await self._begin(made, stream, on_connect)

        assert self._nursery is not None, "use the engine as an async context manager"
        self._nursery.start_soon(meeting.receive_callers, listener, meet)
        return meeting.join_address(host, listener.socket.getsockname()[1])

    async def connect(self, address: str, handler: Handler | None = None) -> Channel:
        """Connect to an address that ``listen`` returned; see rpc.network.Network."""
        made = _Meeting(self, Role.CLIENT, handler or refuse)
        try:
            stream = await meeting.call_on(address, made.handshake, made.answer, self._lease_s)
        except BaseException:
            made.abandon()
            raise
        return await self._begin(made, stream, None)

    async def _begin(
        self, made: "_Meeting", stream: trio.SocketStream, on_connect: Callable[[Channel], None] | None
    ) -> Channel:
        """Set a connection going whose ends have met."""
        channel = made.channel
        assert channel is not None and self._nursery is not None
        self._channels.add(channel)
        with trio.CancelScope(shield=True):  # only until its task runs: that cleans up
            await self._nursery.start(channel.run, stream, on_connect)
        return channel

    def handshake(self, role: Role) -> Handshake:
        """Begin a handshake for one connection; for the classes of this module."""
        card = self.card(b"") if role is Role.CLIENT else None
        return Handshake(role, self._secret, self._cluster_id, card)

    def card(self, address: bytes) -> Card:
        """Say who we are; for the classes of this module."""
        client_id, daemon_id, host, pid, boot_id = self.peer
        return Card(client_id, daemon_id, host, pid, boot_id, self._shares, address)

    def make_channel(self, card: Card, handler: Handler, met_s: float) -> tuple[UcxChannel, bytes]:
        """Make this end of a connection, with a worker that both ends can use, and return the worker's address.

        ``met_s`` is when the two ends met, in seconds of the epoch.
        """
        shared = bool(self._shares) and card.shares == self._shares
        context = self._contexts.get(shared)
        try:
            if context is None:
                make = self._make_shared_context if shared else self._make_remote_context
                context = self._contexts[shared] = make()
            worker = self.ucx.Worker(context)
            worker.init_blocking_progress_mode()
            address = bytes(worker.address)
        except (self.ucx.Error, UserError) as error:
            raise Disconnected(f"UCX: {error}") from error
        peer = Peer(ClientId(card.client_id), card.daemon_id, card.host, card.pid, card.boot_id)
        transport = _transport_of(context)
        return UcxChannel(self, peer, handler, transport, worker, shared=shared, met_s=met_s), address

    def look_again(self) -> None:
        """Have UCX look anew at the network's devices for the next connection; for the classes of this module.

        A context knows those that were there when it was made. Connections that it carries keep it.
        """
        self._contexts.pop(False, None)

    def _make_shared_context(self) -> Any:
        """Make the UCX context for peers that share memory with us."""
        return self.ucx.make_context(shared=True)

    def _make_remote_context(self) -> Any:
        """Make the UCX context for all other peers. UserError when what was set leaves nothing to reach them with.

        UCX passes over names that it does not know, as long as something remains, be it only ``self``.
        """
        try:
            context = self.ucx.make_context(shared=False, tls=self._tls, net_devices=self._net_devices)
        except self.ucx.Error as error:
            raise UserError(
                f"UCX cannot be used{self._as_set()}: {error}; benchfs doctor lists what there is"
            ) from None
        resources = _resources(context)
        if self._net_devices and all(device == "memory" for _, device in resources):
            raise UserError(f"UCX finds no such network device{self._as_set()}; benchfs doctor lists what there is")
        if self._tls and not {transport for transport, _ in resources} - _ALONE:
            raise UserError(f"UCX reaches no other process{self._as_set()}; benchfs doctor lists what there is")
        open_ = public_devices(device for transport, device in resources if transport == "tcp")
        if open_ and not self._public:
            device, address = next(iter(open_.items()))
            raise UserError(
                f"UCX would listen at {address} of {device}, which can be reached from the public internet: name other "
                "devices with --net-devices (ucx.net_devices), or allow this one with --public (ucx.public)"
            )
        return context

    def _as_set(self) -> str:
        """Name the settings that UCX has to do with."""
        settings = (("ucx.tls", self._tls), ("ucx.net_devices", self._net_devices))
        named = " and ".join(f"{key} {value!r}" for key, value in settings if value)
        return f" with {named}" if named else ""

    def note_turn(self) -> None:
        """Take note that all other tasks have just had their turn: calls need not yield for a while."""
        self.yielded_ns = time.perf_counter_ns()

    def remove_segments(self, pid: int, met_s: float) -> None:
        """See to what a peer leaves behind that dies; for the classes of this module. See rpc/segments."""
        if pid == os.getpid():
            return
        try:
            left = segments.unmarked(pid, met_s)
        except (OSError, ValueError) as error:
            log.info("not looked for shared memory that process %d left behind: %s", pid, error)
            return
        if left and self._nursery is not None:
            self._nursery.start_soon(segments.remove_after, pid, left)

    def forget(self, channel: UcxChannel) -> None:
        """Drop a connection that has ended; for the classes of this module."""
        self._channels.discard(channel)


class _Meeting:
    """Give one handshake what it needs from UCX: a worker's address, then an endpoint to the other one."""

    def __init__(self, engine: UcxEngine, role: Role, handler: Handler) -> None:
        self.handshake = engine.handshake(role)
        self.channel: UcxChannel | None = None
        self._engine = engine
        self._role = role
        self._handler = handler
        self._met_s = time.time()
        self._attached = False

    async def answer(self, handshake: Handshake) -> None:
        """Do what the handshake needs now."""
        if handshake.peer is not None and self.channel is None:
            if self._role is Role.SERVER and self._engine.full:
                refusal = f"there are {self._engine.connections_max} connections, as many as this process takes"
                handshake.refuse(refusal)
                raise AuthenticationFailed(refusal)
            self.channel, address = self._engine.make_channel(handshake.peer, self._handler, self._met_s)
            if self._role is Role.CLIENT:
                handshake.give_address(address)
            else:
                handshake.give_card(self._engine.card(address))
        if handshake.address is not None and self.channel is not None and not self._attached:
            self.channel.attach(handshake.address)
            self._attached = True
            if self._role is Role.SERVER:
                handshake.give_ready()

    def abandon(self) -> None:
        """Give back what was made for a connection that did not come about.

        Perhaps one of the two ends has an address by now that UCX does not know of.
        """
        if self.channel is not None:
            self.channel.let_go()
            self._engine.look_again()


def _resources(context: Any) -> list[tuple[str, str]]:
    """Return the transports of a context, each with its device, from what UCX lists: ``… -- rc_mlx5/mlx5_0:1``."""
    return re.findall(r"-- (\w+)/(\S+)", context.info)


def _transport_of(context: Any) -> str:
    """Name what a context's connections go over."""
    found = {transport for transport, _ in _resources(context)}
    if "sysv" in found:
        return "shm"
    return "rdma" if any(name.startswith(("rc", "dc", "ud")) for name in found) else "tcp"
