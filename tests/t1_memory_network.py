"""Check the faults of the network in memory: what tests of sessions, retries and fencing are built on."""

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from benchfs_fuse.errors import Disconnected
from benchfs_fuse.model import ClientId
from benchfs_fuse.ports import Channel, Ending, Peer, Reply
from benchfs_fuse.rpc.memory import MemoryNetwork, MemoryNode

WRITE, OTHER, SLOW = 1, 2, 3


class Daemon:
    """Serve, and write down what was served in which order."""

    def __init__(self) -> None:
        self.served: list[tuple[int, bytes]] = []
        self.channels: list[Channel] = []
        self.cancelled = 0
        self.releases = 0

    def release(self) -> None:
        self.releases += 1

    async def __call__(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        self.served.append((op, body))
        if op == SLOW:
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                self.cancelled += 1
                raise
        return Reply(0, body, release=self.release)


class World:
    """Hold a network of two nodes, a daemon on one of them and a client on the other."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.network = network
        self.client: MemoryNode = network.node(Peer(ClientId(1), -1, "client", 1, "boot"))
        self.server: MemoryNode = network.node(Peer(ClientId(2), 0, "server", 2, "boot"))
        self.daemon = Daemon()
        self.address = ""

    async def connect(self) -> Channel:
        return await self.client.connect(self.address)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with MemoryNetwork(seed=3) as network:
        world = World(network)
        world.address = await world.server.listen(world.daemon, world.daemon.channels.append)
        with trio.fail_after(10):
            yield world


async def test_a_lost_request_was_not_served(world: World) -> None:
    world.network.lose_request(WRITE)
    channel = await world.connect()
    assert (await channel.call(OTHER, b"")).status == 0
    with pytest.raises(Disconnected):
        await channel.call(WRITE, b"lost")
    assert world.daemon.served == [(OTHER, b"")]
    assert await channel.wait_closed() == await world.daemon.channels[0].wait_closed() == Ending.PEER
    again = await world.connect()
    assert (await again.call(WRITE, b"again")).status == 0


async def test_the_request_of_a_lost_reply_was_served(world: World) -> None:
    world.network.lose_reply()
    channel = await world.connect()
    with pytest.raises(Disconnected):
        await channel.call(WRITE, b"served")
    assert world.daemon.served == [(WRITE, b"served")]
    assert world.daemon.releases == 1


async def test_losses_come_as_often_as_they_should(world: World) -> None:
    world.network.request_loss = 0.5
    lost = 0
    for _ in range(200):
        channel = await world.connect()
        try:
            await channel.call(WRITE, b"")
        except Disconnected:
            lost += 1
    assert 60 < lost < 140
    assert len(world.daemon.served) == 200 - lost
    assert world.network.calls == {WRITE: 200}


async def test_independent_requests_overtake_each_other(world: World) -> None:
    channel = await world.connect()
    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(channel.call, WRITE, b"%02d" % number)
    assert world.daemon.served != sorted(world.daemon.served)
    assert len(world.daemon.served) == 50


async def test_a_partition_delays_and_a_new_connection_can_come_first(world: World) -> None:
    old = await world.connect()
    await old.call(OTHER, b"")
    world.network.partition(world.client, world.server)
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            with pytest.raises(Disconnected):
                await old.call(WRITE, b"late")

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Disconnected):
            await world.connect()
        await old.aclose()
    # The server knows nothing of the end yet: the delayed write arrives unless it ends the old connection itself.
    old_at_server = world.daemon.channels[0]
    world.network.heal(world.client, world.server)
    new = await world.connect()
    await new.call(WRITE, b"retry")
    assert await old_at_server.wait_closed() == Ending.PEER
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(world.daemon.served[1:]) in ([(WRITE, b"retry")], [(WRITE, b"late"), (WRITE, b"retry")])


async def test_a_fenced_connection_serves_nothing_late(world: World) -> None:
    old = await world.connect()
    await old.call(OTHER, b"")
    world.network.partition(world.client, world.server)
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            with pytest.raises(Disconnected):
                await old.call(WRITE, b"late")

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        await old.aclose()
    await world.daemon.channels[0].aclose()
    world.network.heal(world.client, world.server)
    await trio.testing.wait_all_tasks_blocked()
    assert world.daemon.served == [(OTHER, b"")]


async def test_silence_ends_both_ends_for_themselves(world: World) -> None:
    channel = await world.connect()
    world.network.partition(world.client, world.server)
    world.network.silence(world.client, world.server)
    assert await channel.wait_closed() == await world.daemon.channels[0].wait_closed() == Ending.SILENCE


async def test_a_killed_node_is_gone_for_all(world: World) -> None:
    channel = await world.connect()
    async with trio.open_nursery() as nursery:

        async def slow() -> None:
            with pytest.raises(Disconnected):
                await channel.call(SLOW, b"")

        nursery.start_soon(slow)
        while not world.daemon.served:
            await trio.lowlevel.checkpoint()
        world.server.kill()
    assert world.daemon.cancelled == 1
    assert await channel.wait_closed() == Ending.PEER
    assert not world.client.channels and not world.server.channels
    with pytest.raises(Disconnected):
        await world.connect()
