"""Carry requests between nodes of one process, through seeded delays and faults: the twin of rpc/ucx for tests.

Every message goes through the real frame codec and takes a random number of scheduling turns, so that independent
requests overtake each other. Nothing sleeps. What a real network does to a connection can be done here on purpose:

- ``lose_request`` and ``lose_reply`` end the connection before a request was delivered, or after it was served.
- ``partition`` holds every message between two nodes, also the news that a connection has ended, until ``heal``.
  So an end that gave up can be followed by a new connection while the old one still has a request on its way: the
  delayed write that fencing is there for.
- ``silence`` ends the connections across a partition, as their leases would.
- ``kill`` ends a node as ``kill -9`` would.
"""

import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import trio

from ..errors import Disconnected, NotSupported, StorageError
from ..limits import IN_FLIGHT_MAX, INLINE_MAX
from ..ports import Buffer, Channel, Ending, Handler, Peer, Reply
from . import frames
from .network import handle_now_of

log = logging.getLogger(__name__)

#: Scheduling turns that a message takes, at most: enough for a few later requests to overtake an earlier one.
DELAY_TURNS_MAX = 4


async def refuse(channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
    """Serve nothing: what a connecting side answers that gave no handler."""
    return Reply(NotSupported.status, b"")


class _Call:
    """Hold one unanswered request of the calling end. ``reply`` stays None if the connection ends first."""

    def __init__(self, request_id: int, into: memoryview | None) -> None:
        self.request_id = request_id
        self.into = into
        self.done = trio.Event()
        self.reply: Reply | None = None


class MemoryChannel:
    """Be one end of a connection; see ports.Channel."""

    transport = "memory"

    def __init__(self, network: "MemoryNetwork", node: "MemoryNode", peer: Peer, handler: Handler) -> None:
        self._network = network
        self._node = node
        self._peer = peer
        self._handler = handler
        self._handle_now = handle_now_of(handler)
        self._other: MemoryChannel = self
        self._calls: dict[_Call, None] = {}
        self._slots = trio.Semaphore(IN_FLIGHT_MAX)
        self._request_id = 0
        self._ended = trio.Event()
        self._ending = Ending.LOCAL
        self._serving: dict[trio.CancelScope, None] = {}
        self._served = trio.lowlevel.ParkingLot()

    @property
    def peer(self) -> Peer:
        """Return who is at the other end."""
        return self._peer

    async def call(self, op: int, body: bytes, payload: Buffer | None = None, into: memoryview | None = None) -> Reply:
        """Send one request, wait for its reply; see ports.Channel."""
        await self._slots.acquire()
        if self._ended.is_set():
            self._slots.release()
            raise Disconnected(f"the connection to {self._peer.host} has ended")
        self._request_id += 1
        call = _Call(self._request_id, into)
        want = len(into) if into is not None else 0
        message = frames.encode_request(call.request_id, op, body, payload, want)
        bulk = payload if payload is not None and len(payload) > INLINE_MAX else None
        self._calls[call] = None
        self._network.calls[op] += 1
        self._network.on_call(op, self._node, self._other._node)
        self._network.start_soon(self._carry, call, op, message, bulk)
        await call.done.wait()
        if call.reply is None:
            raise Disconnected(f"the connection to {self._peer.host} ended while request {op} was under way")
        return call.reply

    async def wait_closed(self) -> Ending:
        """Wait until the connection has ended at this end; return why."""
        await self._ended.wait()
        return self._ending

    def call_now(
        self, op: int, body: bytes, payload: Buffer | None = None, into: memoryview | None = None, polls: bool = True
    ) -> Reply | Awaitable[Reply] | None:
        """Begin a call without waiting for anything: every message takes its time here."""
        return None

    async def aclose(self) -> None:
        """End the connection and wait until none of its requests is being served at this end."""
        self.cut(Ending.LOCAL)
        self._network.start_soon(self._tell_end)
        while self._serving:
            await self._served.park()
        await trio.lowlevel.checkpoint()

    def cut(self, ending: Ending) -> None:
        """End the connection at this end alone, at once: fail its calls and cancel what it serves."""
        if self._ended.is_set():
            return
        self._ending = ending
        self._ended.set()
        self._node.channels.pop(self, None)
        for call in list(self._calls):
            self._finish(call)
        for scope in self._serving:
            scope.cancel()

    def cut_both(self, ending: Ending) -> None:
        """End the connection at both ends, at once."""
        self.cut(ending)
        self._other.cut(ending)

    async def _tell_end(self) -> None:
        """Let the other end know, as late as the network allows, that this one has ended."""
        await self._network.travel(self._node, self._other._node)
        self._other.cut(Ending.PEER)

    async def _carry(self, call: _Call, op: int, message: bytes, bulk: Buffer | None) -> None:
        """Bring one request to the other end, have it served, bring the reply back."""
        network, other = self._network, self._other
        await network.travel(self._node, other._node)
        if network.loses_request(op):
            self.cut_both(Ending.PEER)
            return
        reply = await other._serve(message, bulk)
        if reply is None:
            return
        try:
            if network.loses_reply(op):
                self.cut_both(Ending.PEER)
            else:
                await network.travel(other._node, self._node)
                self._deliver(call, reply)
        finally:
            if reply.release is not None:
                reply.release()

    async def _serve(self, message: bytes, bulk: Buffer | None) -> Reply | None:
        """Run the handler for one request; None if this end has ended by now: then there is nobody to answer."""
        if self._ended.is_set():
            return None
        frame = frames.decode(memoryview(message))
        copy = bytearray(bulk if bulk is not None else frame.payload)
        payload = memoryview(copy) if copy else None
        reply = None
        with trio.CancelScope() as scope:
            self._serving[scope] = None
            try:
                if self._handle_now is not None:
                    reply = self._handle_now(self, frame.code, frame.body, payload, frame.want)
                if reply is None:
                    reply = await self._handler(self, frame.code, frame.body, payload, frame.want)
                frames.encode_reply(frame.request_id, reply.status, reply.body, reply.payload, frame.want)
            except Exception:
                log.exception("request %d: the handler failed", frame.code)
                reply = Reply(StorageError.status, b"", release=reply.release if reply is not None else None)
            finally:
                self._serving.pop(scope)
                self._served.unpark_all()
                copy[:] = b"\xdd" * len(copy)  # whoever still looks at the payload sees that it is gone
        if reply is not None and self._ended.is_set():
            if reply.release is not None:
                reply.release()
            return None
        return reply

    def _deliver(self, call: _Call, reply: Reply) -> None:
        """Hand the reply to its caller, the payload copied out of the handler's hands."""
        if call not in self._calls:
            return
        payload = reply.payload or b""
        if call.into:
            call.into[: len(payload)] = payload
            call.reply = Reply(reply.status, reply.body, received=len(payload))
        else:
            call.reply = Reply(reply.status, reply.body, bytes(payload) or None)
        self._finish(call)

    def _finish(self, call: _Call) -> None:
        self._calls.pop(call, None)
        self._slots.release()
        call.done.set()


class MemoryNode:
    """Be one process on the network: listens and connects under one identity; see rpc.network.Network."""

    def __init__(self, network: "MemoryNetwork", peer: Peer) -> None:
        self._network = network
        self.peer = peer
        #: Connections that have not ended, both those made here and those accepted.
        self.channels: dict[MemoryChannel, None] = {}  # a set would have no order, and runs would not repeat
        self._addresses: list[str] = []

    async def listen(self, handler: Handler, on_connect: Callable[[Channel], None] | None = None) -> str:
        """Accept connections from now on; return the address for ``connect``."""
        await trio.lowlevel.checkpoint()
        address = self._network.bind(self, handler, on_connect)
        self._addresses.append(address)
        return address

    async def connect(self, address: str, handler: Handler | None = None) -> Channel:
        """Connect to a listening node; Disconnected if there is none, or a partition between."""
        await trio.lowlevel.checkpoint()
        here, there = self._network.join(self, address, handler or refuse)
        self.channels[here] = None
        there._node.channels[there] = None
        return here

    def kill(self) -> None:
        """End this node as ``kill -9`` would: no more listening, no more serving; the others learn it by and by."""
        for address in self._addresses:
            self._network.unbind(address)
        for channel in list(self.channels):
            channel.cut(Ending.LOCAL)
            self._network.start_soon(channel._tell_end)


class MemoryNetwork:
    """Connect nodes of one process. An async context manager; ``seed`` decides delays and random losses.

    ``request_loss`` and ``reply_loss`` are probabilities per request, 0 unless set. ``calls`` counts requests by
    operation. For runs that repeat exactly, trio's own scheduling has to be seeded too.
    """

    def __init__(self, seed: int = 0) -> None:
        self.request_loss = 0.0
        self.reply_loss = 0.0
        self.calls: Counter[int] = Counter()
        #: Called with each request's operation as it is sent, and from which node to which.
        self.on_call: Callable[[int, MemoryNode, MemoryNode], None] = lambda op, source, target: None
        self._random = random.Random(seed)
        self._nursery: trio.Nursery | None = None
        self._nursery_manager = trio.open_nursery()
        self._listeners: dict[str, tuple[MemoryNode, Handler, Callable[[Channel], None] | None]] = {}
        self._bound = 0
        self._partitions: dict[frozenset[MemoryNode], trio.Event] = {}
        self._lose_request: list[int | None] = []
        self._lose_reply: list[int | None] = []

    async def __aenter__(self) -> Self:
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

    def node(self, peer: Peer) -> MemoryNode:
        """Add a node; ``peer`` is how the others see it."""
        return MemoryNode(self, peer)

    def lose_request(self, op: int | None = None) -> None:
        """End the connection instead of delivering the next request (of operation ``op``, or any). Adds up."""
        self._lose_request.append(op)

    def lose_reply(self, op: int | None = None) -> None:
        """Serve the next request (of operation ``op``, or any), but end the connection instead of replying. Adds up."""
        self._lose_reply.append(op)

    def lose_nothing(self) -> None:
        """Take back all losses that were asked for and have not come about."""
        self._lose_request.clear()
        self._lose_reply.clear()

    def partition(self, one: MemoryNode, other: MemoryNode) -> None:
        """Hold every message between two nodes until ``heal``; new connections between them fail."""
        self._partitions.setdefault(frozenset((one, other)), trio.Event())

    def heal(self, one: MemoryNode, other: MemoryNode) -> None:
        """Let the messages between two nodes go on, those held back included."""
        self._partitions.pop(frozenset((one, other))).set()

    def silence(self, one: MemoryNode, other: MemoryNode) -> None:
        """End every connection between two nodes at both ends, as a lease does that ran out during a partition."""
        for channel in [channel for channel in one.channels if channel.peer == other.peer]:
            channel.cut_both(Ending.SILENCE)

    def start_soon(self, task: Callable[..., object], *args: object) -> None:
        """Run a task of the network itself (a message on its way); for the classes of this module."""
        assert self._nursery is not None, "use the network as an async context manager"
        self._nursery.start_soon(task, *args)  # type: ignore[arg-type]

    async def travel(self, one: MemoryNode, other: MemoryNode) -> None:
        """Take as long as a message between two nodes takes: some turns, and to the end of a partition."""
        for _ in range(self._random.randrange(DELAY_TURNS_MAX + 1)):
            await trio.lowlevel.checkpoint()
        while (partition := self._partitions.get(frozenset((one, other)))) is not None:
            await partition.wait()

    def loses_request(self, op: int) -> bool:
        """Decide whether this request gets lost."""
        return _take(self._lose_request, op) or self._random.random() < self.request_loss

    def loses_reply(self, op: int) -> bool:
        """Decide whether the reply to this request gets lost."""
        return _take(self._lose_reply, op) or self._random.random() < self.reply_loss

    def bind(self, node: MemoryNode, handler: Handler, on_connect: Callable[[Channel], None] | None) -> str:
        """Register a listener under a new address."""
        self._bound += 1
        address = f"memory:{self._bound}"
        self._listeners[address] = (node, handler, on_connect)
        return address

    def unbind(self, address: str) -> None:
        """Forget a listener."""
        self._listeners.pop(address, None)

    def join(self, node: MemoryNode, address: str, handler: Handler) -> tuple[MemoryChannel, MemoryChannel]:
        """Make both ends of a connection to whoever listens at ``address``."""
        listener = self._listeners.get(address)
        if listener is None or frozenset((node, listener[0])) in self._partitions:
            raise Disconnected(f"nobody answers at {address}")
        there_node, there_handler, on_connect = listener
        here = MemoryChannel(self, node, there_node.peer, handler)
        there = MemoryChannel(self, there_node, node.peer, there_handler)
        here._other, there._other = there, here
        if on_connect is not None:
            on_connect(there)
        return here, there


def _take(losses: list[int | None], op: int) -> bool:
    """Use up one planned loss that fits this operation."""
    for planned in (op, None):
        if planned in losses:
            losses.remove(planned)
            return True
    return False
