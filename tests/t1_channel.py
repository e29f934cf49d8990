"""Check that every transport keeps the contract of ports.Channel.

Memory; UCX over TCP and over shared memory, each with the compiled wire and with the plain one.
"""

import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import NamedTuple

import pytest
import trio
import trio.testing

from benchfs_fuse.errors import Disconnected, NotFound, NotSupported, StorageError
from benchfs_fuse.limits import BODY_MAX, IN_FLIGHT_MAX, INLINE_MAX, PAYLOAD_MAX
from benchfs_fuse.model import ClientId
from benchfs_fuse.ports import Channel, Ending, Peer, Reply
from benchfs_fuse.rpc.memory import MemoryNetwork
from benchfs_fuse.rpc.network import Network
from benchfs_fuse.rpc.ucx import UcxEngine

CLIENT = Peer(ClientId(11), -1, "client", 101, "boot")
SERVER = Peer(ClientId(22), 3, "server", 202, "boot")

SECRET = bytes(range(32))
CLUSTER = b"cluster-id-16-by"

SUM, READ, ERROR, WAIT, HOLD, BUG, WHO = range(1, 8)

#: Everything around the two borders where a payload changes its way.
SIZES = [0, 1, 4096, INLINE_MAX - 1, INLINE_MAX, INLINE_MAX + 1, 1 << 20, PAYLOAD_MAX - 1, PAYLOAD_MAX]


def pattern(size: int, seed: int = 0) -> bytes:
    """Make bytes that show when they are shifted, cut or from elsewhere."""
    unit = bytes((i * 7 + i // 251 + seed) & 0xFF for i in range(4093))
    return (unit * (size // len(unit) + 1))[:size]


class Service:
    """Serve the operations of these tests and write down what happened."""

    def __init__(self) -> None:
        self.started: Counter[int] = Counter()
        self.running = 0
        self.running_max = 0
        self.finished: Counter[int] = Counter()
        self.releases: Counter[int] = Counter()
        self.replies = 0
        self.gate = trio.Event()
        self.arrived = trio.Event()
        self.channels: list[Channel] = []

    async def __call__(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        self.started[op] += 1
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        try:
            reply = await self._serve(channel, op, body, payload, want)
            self.finished[op] += 1
            self.replies += 1
            return reply._replace(release=partial(self.releases.update, [self.replies]))
        finally:
            self.running -= 1

    async def _serve(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        if op == SUM:
            return Reply(0, b"%d %d " % (len(payload or b""), zlib.crc32(payload or b"")) + body)
        if op == READ:
            size, seed = map(int, body.split())
            return Reply(0, body, memoryview(pattern(size, seed)))
        if op == ERROR:
            return Reply(NotFound.status, b"no such thing")
        if op == WAIT:
            self.arrived.set()
            await self.gate.wait()
            return Reply(0, body, bytes(min(want, PAYLOAD_MAX)) or None)
        if op == HOLD:
            self.arrived.set()
            with trio.CancelScope(shield=True):
                await self.gate.wait()
            return Reply(0, body)
        if op == WHO:
            reply = await channel.call(SUM, b"asked back", pattern(INLINE_MAX + 5))
            return Reply(0, reply.body)
        raise RuntimeError("a bug in the handler")

    def assert_released(self) -> None:
        """Check that the transport gave back every reply exactly once."""
        assert self.releases == Counter(range(1, self.replies + 1))


class Pair(NamedTuple):
    """Hold both ends of one connection, the services behind them, and how to connect once more."""

    client: Channel
    server: Channel
    here: Service
    there: Service
    network: Network
    address: str


@asynccontextmanager
async def memory_networks() -> AsyncIterator[tuple[Network, Network]]:
    async with MemoryNetwork(seed=7) as network:
        yield network.node(CLIENT), network.node(SERVER)


@asynccontextmanager
async def ucx_networks(tls: str | None, *, compiled: bool = True) -> AsyncIterator[tuple[Network, Network]]:
    async with (
        UcxEngine(CLIENT, SECRET, CLUSTER, tls=tls) as client,
        UcxEngine(SERVER, SECRET, CLUSTER, tls=tls) as server,
    ):
        for engine in (client, server):
            assert engine.ucx.compiled is not None, "the compiled wire was not built"
            if not compiled:
                engine.ucx.compiled = None
        yield client, server
        assert client.statistics().connections == server.statistics().connections == 0


Networks = Callable[[], AbstractAsyncContextManager[tuple[Network, Network]]]
NETWORKS: dict[str, Networks] = {
    "memory": memory_networks,
    "shm": partial(ucx_networks, None),
    "tcp": partial(ucx_networks, "tcp"),
    "shm, plain": partial(ucx_networks, None, compiled=False),
    "tcp, plain": partial(ucx_networks, "tcp", compiled=False),
}


@pytest.fixture(params=NETWORKS)
def transport(request: pytest.FixtureRequest) -> str:
    """Name the transport under test."""
    return str(request.param)


@pytest.fixture
async def pair(transport: str) -> AsyncIterator[Pair]:
    """Connect two ends; afterwards check that every reply was released and no handler is left."""
    here, there = Service(), Service()
    with trio.fail_after(60):
        async with NETWORKS[transport]() as (client_network, server_network):
            address = await server_network.listen(there, there.channels.append)
            client = await client_network.connect(address, here)
            yield Pair(client, there.channels[0], here, there, client_network, address)
            await client.aclose()
            await there.channels[0].aclose()
            assert (here.running, there.running) == (0, 0)
        here.assert_released()
        there.assert_released()


async def test_each_end_knows_the_other(pair: Pair, transport: str) -> None:
    assert (pair.client.peer, pair.server.peer) == (SERVER, CLIENT)
    assert pair.client.transport == pair.server.transport == transport.partition(",")[0]


@pytest.mark.parametrize("size", SIZES)
async def test_a_payload_arrives(pair: Pair, size: int) -> None:
    payload = pattern(size)
    reply = await pair.client.call(SUM, b"body", payload)
    assert reply == Reply(0, b"%d %d body" % (size, zlib.crc32(payload)))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_any_buffer_can_be_sent(pair: Pair, kind: type[bytes] | type[bytearray] | type[memoryview]) -> None:
    for size in (5, INLINE_MAX + 5):
        payload = pattern(size)
        reply = await pair.client.call(SUM, b"", kind(payload))
        assert reply.body == b"%d %d " % (size, zlib.crc32(payload))


@pytest.mark.parametrize("size", SIZES)
async def test_a_reply_fills_the_room(pair: Pair, size: int) -> None:
    into = bytearray(b"\xee" * size)
    reply = await pair.client.call(READ, b"%d 3" % size, into=memoryview(into))
    assert reply == Reply(0, b"%d 3" % size, received=size)
    assert into == pattern(size, 3)


@pytest.mark.parametrize("room", [1000, INLINE_MAX, INLINE_MAX + 1, PAYLOAD_MAX])
@pytest.mark.parametrize("size", [0, 1, 999])
async def test_a_shorter_reply_leaves_the_rest(pair: Pair, room: int, size: int) -> None:
    into = bytearray(b"\xee" * room)
    reply = await pair.client.call(READ, b"%d 0" % size, into=memoryview(into))
    assert reply.received == size
    assert into[:size] == pattern(size)
    assert into[size:] == b"\xee" * (room - size)


@pytest.mark.parametrize("size", [0, 1, INLINE_MAX])
async def test_a_small_payload_needs_no_room(pair: Pair, size: int) -> None:
    reply = await pair.client.call(READ, b"%d 9" % size)
    assert bytes(reply.payload or b"") == pattern(size, 9)


@pytest.mark.parametrize("size", [0, 1, BODY_MAX - 32, BODY_MAX])
async def test_a_body_arrives_and_comes_back(pair: Pair, size: int) -> None:
    body = b"0 " + b" " * (size - 3) + b"5" if size >= 3 else b"0 5"
    assert (await pair.client.call(READ, body)).body == body


@pytest.mark.parametrize("room", [0, 1, INLINE_MAX, INLINE_MAX + 1, PAYLOAD_MAX])
async def test_an_error_reply_reaches_a_caller_with_room(pair: Pair, room: int) -> None:
    into = bytearray(b"\xee" * room)
    for _ in range(3):
        assert await pair.client.call(ERROR, b"", into=memoryview(into)) == Reply(NotFound.status, b"no such thing")
    assert into == b"\xee" * room


@pytest.mark.parametrize("size", [0, 1, INLINE_MAX + 1])
async def test_an_error_reply_reaches_a_caller_with_a_payload(pair: Pair, size: int) -> None:
    assert await pair.client.call(ERROR, b"", bytes(size)) == Reply(NotFound.status, b"no such thing")


@pytest.mark.parametrize("room", [0, 100, INLINE_MAX + 1])
async def test_a_failing_handler_is_an_error_reply(pair: Pair, room: int, caplog: pytest.LogCaptureFixture) -> None:
    into = memoryview(bytearray(room))
    assert await pair.client.call(BUG, b"", into=into) == Reply(StorageError.status, b"")
    assert "a bug in the handler" in caplog.text
    # The same where the reply is too large for the caller's room, or for a caller that named none.
    assert (await pair.client.call(READ, b"%d 0" % (room + INLINE_MAX + 1), into=into)).status == StorageError.status
    assert (await pair.client.call(SUM, b"", b"still alive")).status == 0


async def test_requests_go_both_ways(pair: Pair) -> None:
    payload = pattern(PAYLOAD_MAX, 4)
    reply = await pair.server.call(SUM, b"", payload)
    assert reply.body == b"%d %d " % (len(payload), zlib.crc32(payload))
    into = bytearray(1 << 20)
    assert (await pair.server.call(READ, b"%d 8" % len(into), into=memoryview(into))).received == len(into)
    assert into == pattern(len(into), 8)
    # A handler may ask the caller something before it answers.
    asked = pattern(INLINE_MAX + 5)
    assert (await pair.client.call(WHO, b"")).body == b"%d %d asked back" % (len(asked), zlib.crc32(asked))


async def test_hundreds_of_calls_at_once(pair: Pair) -> None:
    done = 0

    async def one(channel: Channel, number: int) -> None:
        nonlocal done
        size = (number * 977) % (3 * INLINE_MAX)
        if number % 3 == 0:
            payload = pattern(size, number)
            reply = await channel.call(SUM, b"%d" % number, payload)
            assert reply.body == b"%d %d %d" % (size, zlib.crc32(payload), number)
        elif number % 3 == 1:
            into = bytearray(size + number % 7)
            reply = await channel.call(READ, b"%d %d" % (size, number), into=memoryview(into))
            assert reply.received == size
            assert into[:size] == pattern(size, number)
        else:
            assert (await channel.call(ERROR, b"", into=memoryview(bytearray(size)))).status == NotFound.status
        done += 1

    async with trio.open_nursery() as nursery:
        for number in range(400):
            nursery.start_soon(one, pair.client if number % 2 else pair.server, number)
    assert done == 400


async def test_replies_overtake_each_other(pair: Pair) -> None:
    order = []

    async def slow() -> None:
        assert (await pair.client.call(WAIT, b"slow")).body == b"slow"
        order.append("slow")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(slow)
        await pair.there.arrived.wait()
        for _ in range(3):
            await pair.client.call(SUM, b"")
            order.append("fast")
        pair.there.gate.set()
    assert order == ["fast", "fast", "fast", "slow"]


async def test_requests_in_flight_are_bounded(pair: Pair) -> None:
    replies = []

    async def one() -> None:
        replies.append(await pair.client.call(WAIT, b""))

    async with trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT_MAX + 40):
            nursery.start_soon(one)
        while pair.there.running < IN_FLIGHT_MAX:
            await trio.testing.wait_all_tasks_blocked()
        # The other direction has room of its own.
        assert (await pair.server.call(SUM, b"")).status == 0
        assert pair.there.running == IN_FLIGHT_MAX
        pair.there.gate.set()
    assert len(replies) == IN_FLIGHT_MAX + 40
    assert pair.there.running_max == IN_FLIGHT_MAX


@pytest.mark.parametrize("room", [0, 100, INLINE_MAX + 1, PAYLOAD_MAX])
@pytest.mark.parametrize("size", [0, 100, INLINE_MAX + 1, PAYLOAD_MAX])
async def test_a_caller_may_give_up(pair: Pair, room: int, size: int) -> None:
    if room and size:
        room = 0
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            into = memoryview(bytearray(room)) if room else None
            nursery.start_soon(pair.client.call, WAIT, b"", bytes(size) if size else None, into)
        await pair.there.arrived.wait()
        nursery.cancel_scope.cancel()
    # The late replies go nowhere, and the connection works on.
    assert (await pair.client.call(SUM, b"")).status == 0
    pair.there.gate.set()
    assert (await pair.client.call(READ, b"%d 1" % room, into=memoryview(bytearray(room)))).received == room
    while pair.there.running:
        await trio.testing.wait_all_tasks_blocked()


async def test_calls_given_up_still_count_until_answered(pair: Pair) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT_MAX):
            nursery.start_soon(pair.client.call, WAIT, b"")
        while pair.there.running < IN_FLIGHT_MAX:
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with trio.move_on_after(0.05) as scope:
        await pair.client.call(SUM, b"")
    assert scope.cancelled_caught
    pair.there.gate.set()
    assert (await pair.client.call(SUM, b"")).status == 0


@pytest.mark.parametrize("room", [0, INLINE_MAX + 1])
@pytest.mark.parametrize("size", [0, INLINE_MAX + 1])
@pytest.mark.parametrize("closer", ["client", "server"])
async def test_calls_under_way_fail_when_either_end_closes(pair: Pair, closer: str, room: int, size: int) -> None:
    failed = 0
    if room and size:
        room = 0

    async def one() -> None:
        nonlocal failed
        into = memoryview(bytearray(room)) if room else None
        with pytest.raises(Disconnected):
            await pair.client.call(WAIT, b"", bytes(size) if size else None, into)
        failed += 1

    async with trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT_MAX + 10):  # some of them are still waiting for their turn
            nursery.start_soon(one)
        await pair.there.arrived.wait()
        await (pair.client if closer == "client" else pair.server).aclose()
    assert failed == IN_FLIGHT_MAX + 10
    endings = (Ending.LOCAL, Ending.PEER)
    assert await pair.client.wait_closed() == endings[closer == "server"]
    assert await pair.server.wait_closed() == endings[closer == "client"]
    with pytest.raises(Disconnected):
        await pair.client.call(SUM, b"")
    await pair.server.aclose()
    assert pair.there.running == 0


async def test_closing_waits_for_what_cannot_be_cancelled(pair: Pair) -> None:
    closed = trio.Event()

    async def one() -> None:
        with pytest.raises(Disconnected):
            await pair.client.call(HOLD, b"")

    async def close() -> None:
        await pair.server.aclose()
        assert pair.there.running == 0
        closed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await pair.there.arrived.wait()
        nursery.start_soon(close)
        nursery.start_soon(close)
        assert await pair.server.wait_closed() == Ending.LOCAL
        await trio.testing.wait_all_tasks_blocked()
        assert not closed.is_set()
        pair.there.gate.set()
        await closed.wait()
    assert pair.there.finished[HOLD] == 1


async def test_nothing_is_served_after_the_end(pair: Pair) -> None:
    async with trio.open_nursery() as nursery:

        async def one() -> None:
            with pytest.raises(Disconnected):
                await pair.client.call(SUM, b"", bytes(INLINE_MAX + 1))

        for _ in range(50):
            nursery.start_soon(one)
        await pair.client.aclose()
    await pair.server.aclose()
    served = pair.there.started.copy()
    again = await pair.network.connect(pair.address)
    assert (await again.call(SUM, b"")).status == 0
    assert pair.there.started[SUM] == served[SUM] + 1
    await again.aclose()


async def test_one_handler_may_end_its_own_connection(pair: Pair) -> None:
    async def suicide(channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        await channel.aclose()
        raise AssertionError("the request's own scope was cancelled")

    doomed = await pair.network.connect(pair.address, suicide)
    with pytest.raises(Disconnected):
        await pair.there.channels[1].call(SUM, b"")
    assert await doomed.wait_closed() == Ending.LOCAL


async def test_a_connection_without_a_handler_refuses(pair: Pair) -> None:
    mute = await pair.network.connect(pair.address)
    for room in (0, INLINE_MAX + 1):
        reply = await pair.there.channels[1].call(SUM, b"", into=memoryview(bytearray(room)))
        assert reply == Reply(NotSupported.status, b"")
    await mute.aclose()


async def test_the_short_way_is_tried_first(pair: Pair) -> None:
    class Quick(Service):
        def handle_now(
            self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int
        ) -> Reply | None:
            if op == ERROR:
                raise RuntimeError("a bug in the short way")
            if op == SUM:
                self.replies += 1
                release = partial(self.releases.update, [self.replies])
                return Reply(0, b"now", bytes(payload or b"")[:want] or None, release=release)
            return None

    quick = Quick()
    channel = await pair.network.connect(pair.address, quick)
    server = pair.there.channels[1]
    assert (await server.call(SUM, b"", bytes(INLINE_MAX + 1))).body == b"now"
    assert (await server.call(SUM, b"", b"small")).body == b"now"
    into = bytearray(PAYLOAD_MAX)
    assert (await server.call(READ, b"%d 6" % PAYLOAD_MAX, into=memoryview(into))).received == PAYLOAD_MAX
    assert into == pattern(PAYLOAD_MAX, 6)
    assert (await server.call(ERROR, b"")).status == StorageError.status
    assert quick.started == Counter({READ: 1})
    await channel.aclose()
    await server.aclose()
    quick.assert_released()


async def test_nobody_answers_at_a_wrong_address(pair: Pair) -> None:
    with pytest.raises(Disconnected):
        await pair.network.connect("127.0.0.1:1")


async def test_an_error_passes_through_as_it_is(transport: str) -> None:
    async def fail() -> None:
        async with NETWORKS[transport]() as (client, server):
            await client.connect(await server.listen(Service()))
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
