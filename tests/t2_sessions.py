"""Sessions begin, survive and end when they should: daemons and clients over the network in memory, on a mock clock.

Every test names ``autojump_clock`` itself: pytest-trio looks for a clock among a test's own arguments only.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from benchfs_fuse import disk
from benchfs_fuse.errors import NoSpace, NotPermitted, Stale
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.model import Attrs, ClientId, Entry, Ino, make_ino
from benchfs_fuse.ports import Ending, KeyValueStore
from benchfs_fuse.rpc.client import Links
from benchfs_fuse.rpc.memory import MemoryNetwork, MemoryNode
from benchfs_fuse.rpc.messages import (
    AttrsReply,
    Body,
    Done,
    EntryReply,
    GetAttr,
    Heartbeat,
    Hello,
    Make,
    Open,
    OpenCount,
    Reclaim,
    Release,
    Request,
    encode,
)
from benchfs_fuse.services.calls import Batch, Call, Opens, Peers
from benchfs_fuse.services.sessions import RETURN_S, SessionTable
from benchfs_fuse.testing.daemons import HERE, FakeProcess, MemoryCluster, MemoryDaemon, peer_of

LEASE_S = 60.0
SHARDS = ShardMap.round_robin(2)
#: Files of daemon 0 and of daemon 1.
FILE, OTHER = make_ino(0, 7), make_ino(1, 7)


def attrs_of(ino: int) -> Attrs:
    return Attrs(ino, 1, 0o100644, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1 << 22, 2, 0)


class Handles:
    """Serve Open, Make and Release; remember which sessions ended with what, for as long as the test lasts."""

    ended: list[tuple[int, ClientId, tuple[OpenCount, ...], bool]]

    def __init__(self, daemon: MemoryDaemon, store: KeyValueStore, opens: Opens) -> None:
        self.daemon = daemon
        self.store = store
        self.opens = opens
        self.hold_end = trio.Event()
        self.hold_end.set()

    def handlers(self) -> Mapping[type[Request], Callable[[Request, Call], Awaitable[Body]]]:
        return {}

    def handlers_now(self) -> Mapping[type[Request], Callable[[Request, Call], Body | None]]:
        return {Open: self.open, Make: self.make, Release: self.release, GetAttr: self.get}

    def get(self, request: Request, call: Call) -> Body:
        return AttrsReply(attrs_of(FILE))

    def open(self, request: Request, call: Call) -> Body:
        assert isinstance(request, Open)
        batch = Batch(self.store)
        self.opens.add(batch, call.client_id, request.ino, int(not request.writer), int(request.writer))
        batch.put(disk.key(disk.INODE, request.ino), b"here")
        return self._done(call, batch, AttrsReply(attrs_of(request.ino)))

    def make(self, request: Request, call: Call) -> Body:
        assert isinstance(request, Make)
        batch = Batch(self.store)
        self.opens.add(batch, call.client_id, FILE, request.open_readers, request.open_writers)
        batch.put(disk.key(disk.INODE, FILE), b"here")
        return self._done(call, batch, EntryReply(Entry(FILE, 0o100000, attrs_of(FILE))))

    def release(self, request: Request, call: Call) -> Body:
        assert isinstance(request, Release)
        batch = Batch(self.store)
        self.opens.remove(batch, call.client_id, request.ino, request.readers, request.writers)
        return self._done(call, batch, Done())

    def _done(self, call: Call, batch: Batch, reply: Body) -> Body:
        call.commit(batch, reply)
        return reply

    async def session_ended(self, client_id: ClientId, opens: Sequence[OpenCount], clean: bool) -> None:
        await self.hold_end.wait()
        self.ended.append((self.daemon.daemon_id, client_id, tuple(opens), clean))


class Client:
    """Be a mount that keeps count of its handles as a mount does."""

    def __init__(self, cluster: MemoryCluster, pid: int = 1, boot_id: str = "elsewhere") -> None:
        self.handles: dict[int, list[int]] = {}
        self.lost: list[int] = []
        self.scope = trio.CancelScope()
        self.links: Links
        self.node: MemoryNode
        self.links, self.node = cluster.links(opens=self.opens, on_lost=self.lost.extend, pid=pid, boot_id=boot_id)
        cluster.nursery.start_soon(self._run)

    async def _run(self) -> None:
        with self.scope:
            await self.links.run()

    def opens(self) -> list[OpenCount]:
        return [OpenCount(ino, readers, writers) for ino, (readers, writers) in self.handles.items()]

    async def open(self, ino: int, writer: bool = False) -> None:
        await self.links.to(SHARDS.of_ino(ino)).call(Open(ino, writer), AttrsReply)
        self.handles.setdefault(ino, [0, 0])[int(writer)] += 1

    async def release(self, ino: int, writer: bool = False) -> None:
        await self.links.to(SHARDS.of_ino(ino)).call(Release(ino, int(not writer), int(writer)), Done)
        self.handles[ino][int(writer)] -= 1
        if not any(self.handles[ino]):
            del self.handles[ino]

    def kill(self) -> None:
        self.node.kill()
        self.scope.cancel()

    def cut(self, ending: Ending = Ending.PEER) -> None:
        for channel in list(self.node.channels):
            channel.cut_both(ending)


class World(MemoryCluster):
    """Hold a cluster of two daemons, and what happened to its sessions."""

    ended: list[tuple[int, ClientId, tuple[OpenCount, ...], bool]]

    def table(self, daemon_id: int) -> SessionTable:
        return self.daemons[daemon_id].sessions

    def connected(self, daemon_id: int) -> dict[int, bool]:
        return {s.client_id: s.connected for s in self.table(daemon_id).statuses() if s.kind != "daemon"}

    def stored(self, daemon_id: int, *prefixes: bytes) -> set[bytes]:
        return {key[:1] for key in self.daemons[daemon_id].store.contents() if key[:1] in prefixes}

    async def client(self, pid: int = 1, boot_id: str = "elsewhere") -> Client:
        client = Client(self, pid, boot_id)
        await client.links.wait_connected()
        return client


@pytest.fixture
async def world() -> AsyncIterator[World]:
    ended: list[tuple[int, ClientId, tuple[OpenCount, ...], bool]] = []

    def make(daemon: MemoryDaemon, store: KeyValueStore, sessions: SessionTable, peers: Peers) -> Handles:
        handles = Handles(daemon, store, sessions)
        handles.ended = ended
        return handles

    async with open_world(make) as world:
        world.ended = ended
        yield world


@asynccontextmanager
async def open_world(
    make: Callable[[MemoryDaemon, KeyValueStore, SessionTable, Peers], Handles],
) -> AsyncIterator[World]:
    async with MemoryNetwork(seed=1) as network, trio.open_nursery() as nursery:
        world = World(network, nursery, make, daemons=2, lease_s=LEASE_S)
        await world.start()
        yield world
        nursery.cancel_scope.cancel()


async def test_an_idle_session_lives_by_its_heartbeats(world: World, autojump_clock: MockClock) -> None:
    client = await world.client()
    await client.open(FILE)
    await trio.sleep(20 * LEASE_S)
    assert world.table(0).count(FILE) == 1 and world.ended == []
    await client.open(FILE)
    assert world.table(0).count(FILE) == 2


async def test_handles_are_counted_and_taken_back(world: World, autojump_clock: MockClock) -> None:
    one, two = await world.client(), await world.client()
    for client, writer in ((one, False), (one, True), (two, True)):
        await client.open(FILE, writer)
    assert world.table(0).count(FILE) == 3 and world.table(0).count(OTHER) == 0
    assert world.stored(0, disk.WRITE_OPEN) == {disk.WRITE_OPEN}
    await one.release(FILE, writer=True)
    await two.release(FILE, writer=True)
    assert world.table(0).count(FILE) == 1
    assert world.stored(0, disk.WRITE_OPEN) == set()
    await two.links.to(0).call(Release(FILE, 5, 5), Done)  # more than were counted
    assert world.table(0).count(FILE) == 1


async def test_goodbye_ends_a_session_and_its_records(world: World, autojump_clock: MockClock) -> None:
    client = await world.client()
    await client.open(FILE)
    await client.links.say_goodbye()
    await wait_all_tasks_blocked()
    assert sorted(world.ended) == [
        (0, client.links.client_id, (OpenCount(FILE, 1, 0),), True),
        (1, client.links.client_id, (), True),
    ]
    assert world.stored(0, disk.SESSION, disk.OUTCOME, disk.WRITE_OPEN, disk.FENCED) == set()
    assert world.table(0).count(FILE) == 0 and world.connected(0) == {}
    assert not client.links.expelled.is_set()  # it did not try to come back


async def test_goodbye_with_files_open_for_writing_is_no_clean_end(world: World, autojump_clock: MockClock) -> None:
    client = await world.client()
    await client.open(FILE, writer=True)
    await client.links.say_goodbye()
    await wait_all_tasks_blocked()
    assert (0, client.links.client_id, (OpenCount(FILE, 0, 1),), False) in world.ended
    assert world.stored(1, disk.FENCED) == {disk.FENCED}


async def test_a_dead_process_of_this_host_ends_its_session_at_once(world: World, autojump_clock: MockClock) -> None:
    process = world.processes[4711] = FakeProcess()
    client = await world.client(4711, HERE)
    await client.open(FILE, writer=True)
    moment = trio.current_time()
    client.kill()
    await wait_all_tasks_blocked()
    assert world.ended == []  # its connection has ended, but it may come back
    process.gone.set()
    await wait_all_tasks_blocked()
    assert trio.current_time() == moment
    assert (0, client.links.client_id, (OpenCount(FILE, 0, 1),), False) in world.ended
    assert process.closed


async def test_a_client_elsewhere_whose_connection_ended_has_a_moment_to_come_back(
    world: World, autojump_clock: MockClock
) -> None:
    stays, dies = await world.client(), await world.client()
    for client in (stays, dies):
        await client.open(FILE)
    moment = trio.current_time()
    stays.cut()
    dies.kill()
    await trio.sleep(RETURN_S - 1)
    assert world.ended == []
    await trio.sleep(2)
    assert trio.current_time() == moment + RETURN_S + 1
    assert [end for end in world.ended if end[0] == 0] == [(0, dies.links.client_id, (OpenCount(FILE, 1, 0),), False)]
    assert world.table(0).count(FILE) == 1
    await stays.open(FILE)


async def test_a_process_that_this_host_does_not_know_is_taken_as_one_of_elsewhere(
    world: World, autojump_clock: MockClock
) -> None:
    client = await world.client(99, HERE)  # another pid namespace
    client.kill()
    await trio.sleep(RETURN_S + 1)
    assert len(world.ended) == 2


async def test_silence_ends_a_session_when_its_lease_is_over(world: World, autojump_clock: MockClock) -> None:
    client = await world.client()
    await client.open(FILE, writer=True)
    for daemon in world.daemons:
        world.network.partition(client.node, daemon.node)
    await trio.sleep(LEASE_S / 2)
    assert world.ended == []
    await trio.sleep(LEASE_S)
    assert (0, client.links.client_id, (OpenCount(FILE, 0, 1),), False) in world.ended
    for daemon in world.daemons:
        world.network.heal(client.node, daemon.node)
    with pytest.raises(Stale, match="expelled"):
        await client.open(FILE)
    assert client.links.expelled.is_set()


async def test_a_client_that_one_daemon_gives_up_is_expelled_from_all(world: World, autojump_clock: MockClock) -> None:
    client = await world.client()
    await client.open(FILE, writer=True)
    await client.open(OTHER)
    world.network.partition(client.node, world.daemons[0].node)
    world.network.silence(client.node, world.daemons[0].node)
    await trio.sleep(2 * LEASE_S)
    assert {end[0] for end in world.ended} == {0, 1}
    with pytest.raises(Stale):
        await client.links.to(1).call(GetAttr(OTHER), AttrsReply)


async def test_an_expelled_client_is_refused_also_where_it_held_nothing(
    world: World, autojump_clock: MockClock
) -> None:
    """The record of it is what refuses it there, so none of them is ever forgotten."""
    client, home = await world.client(), SHARDS.of_ino(FILE)
    await client.open(FILE, writer=True)
    for daemon in world.daemons:
        world.network.partition(client.node, daemon.node)
        world.network.silence(client.node, daemon.node)
    await trio.sleep(3 * LEASE_S)
    assert world.connected(0) == world.connected(1) == {}
    other = world.daemons[1 - home]
    world.network.heal(client.node, other.node)
    with pytest.raises(Stale, match="this client was expelled"):
        await client.links.to(other.daemon_id).call(GetAttr(OTHER), AttrsReply)
    assert client.links.expelled.is_set()
    assert world.connected(0) == world.connected(1) == {}


async def test_files_are_trimmed_only_when_every_daemon_has_fenced_the_client(
    world: World, autojump_clock: MockClock
) -> None:
    client = await world.client()
    await client.open(FILE, writer=True)
    await world.daemons[1].kill()
    client.kill()
    await trio.sleep(3 * LEASE_S)
    assert world.ended == []
    await world.daemons[1].start()
    await trio.sleep(1)
    ended = [end for end in world.ended if end[0] == 0]
    assert ended == [(0, client.links.client_id, (OpenCount(FILE, 0, 1),), False)]
    key = disk.key(disk.FENCED, client.links.client_id)
    assert world.daemons[1].store.get(key) is not None


async def test_handles_are_reclaimed_after_a_restart(world: World, autojump_clock: MockClock) -> None:
    client = await world.client()
    await client.open(FILE)
    await client.open(FILE, writer=True)
    await client.open(OTHER)
    await world.daemons[0].kill()
    await world.daemons[0].start()
    await client.links.to(0).call(GetAttr(FILE), AttrsReply)
    assert not world.table(0).grace
    assert world.table(0).count(FILE) == 2 and world.table(0).count(OTHER) == 0
    assert client.lost == [] and world.ended == []


async def test_while_handles_may_come_back_every_inode_counts_as_used(world: World, autojump_clock: MockClock) -> None:
    client = await world.client()
    await client.open(FILE)
    await world.daemons[0].kill()
    world.network.partition(client.node, world.daemons[0].node)
    await world.daemons[0].start()
    world.network.partition(client.node, world.daemons[0].node)
    assert world.table(0).grace and world.table(0).count(12345) == 1
    await trio.sleep(LEASE_S / 2)
    assert world.table(0).grace
    world.network.heal(client.node, world.daemons[0].node)
    with trio.fail_after(LEASE_S / 4):
        await world.table(0).wait_grace_over()
    assert world.table(0).count(12345) == 0 and world.table(0).count(FILE) == 1


async def test_what_was_reclaimed_over_a_connection_that_broke_is_reclaimed_anew(
    world: World, autojump_clock: MockClock
) -> None:
    client = await world.client()
    await client.open(FILE)
    await client.open(FILE, writer=True)
    client.scope.cancel()
    await world.daemons[0].kill()
    await world.daemons[0].start()
    place = world.directory.find(0)
    assert place is not None
    for page in (Reclaim((OpenCount(FILE, 1, 1),), last=False), Reclaim((), last=True)):
        channel = await client.node.connect(place.address)
        for request in (Hello("mount", "/mnt/test", resume=True), page):
            assert (await channel.call(request.op, encode(request))).status == 0
    await world.table(0).wait_grace_over()
    assert world.table(0).count(FILE) == 0
    assert world.stored(0, disk.WRITE_OPEN) == set()


async def test_many_handles_are_reclaimed_in_pages_and_lost_ones_are_reported(
    world: World, autojump_clock: MockClock
) -> None:
    client = await world.client()
    count = 10_000
    for counter in range(1, count + 1):
        ino = Ino(make_ino(0, counter))
        client.handles[ino] = [1, 0]
        if counter % 1000:
            world.daemons[0].store.write([(disk.key(disk.INODE, ino), b"here")])
    await world.daemons[0].kill()
    await world.daemons[0].start()
    await client.links.to(0).call(GetAttr(FILE), AttrsReply)
    assert client.lost == [make_ino(0, counter) for counter in range(1000, count + 1, 1000)]
    status = next(status for status in world.table(0).statuses() if status.kind == "mount")
    assert status.opens == count - count // 1000


async def test_who_does_not_come_back_after_a_restart_is_ended(world: World, autojump_clock: MockClock) -> None:
    client = await world.client()
    await client.open(FILE, writer=True)
    client.kill()
    await world.daemons[0].kill()
    await world.daemons[0].start()
    assert world.table(0).grace
    await trio.sleep(LEASE_S + 1)
    assert (0, client.links.client_id, (OpenCount(FILE, 0, 1),), False) in world.ended
    assert not world.table(0).grace and world.table(0).count(FILE) == 0
    channel = await client.node.connect(world.directory.find(0).address)  # type: ignore[union-attr]
    reply = await channel.call(Hello.op, encode(Hello("mount", "", resume=False)))
    assert reply.status == Stale.status


async def test_a_process_that_died_while_the_daemon_was_down_is_ended_at_once(
    world: World, autojump_clock: MockClock
) -> None:
    world.processes[4711] = FakeProcess()
    client = await world.client(4711, HERE)
    await client.open(FILE, writer=True)
    await world.daemons[0].kill()
    client.kill()
    del world.processes[4711]
    moment = trio.current_time()
    await world.daemons[0].start()
    while len(world.ended) < 2:
        await trio.lowlevel.checkpoint()
    assert trio.current_time() == moment
    assert world.ended[-1] == (0, client.links.client_id, (OpenCount(FILE, 0, 1),), False)


async def test_an_end_that_a_crash_interrupts_is_dealt_with_after_the_next_start(
    world: World, autojump_clock: MockClock
) -> None:
    client = await world.client()
    await client.open(FILE, writer=True)
    service = world.daemons[0].service
    assert isinstance(service, Handles)
    service.hold_end = trio.Event()
    client.kill()
    await trio.sleep(RETURN_S + 1)
    assert {end[0] for end in world.ended} == {1}
    await world.daemons[0].kill()
    await world.daemons[0].start()
    await wait_all_tasks_blocked()
    assert world.ended[-1] == (0, client.links.client_id, (OpenCount(FILE, 0, 1),), False)
    assert world.stored(0, disk.SESSION, disk.OUTCOME, disk.WRITE_OPEN) == set()


async def test_an_end_that_a_full_disk_holds_up_comes_when_there_is_room(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await world.client()
    await client.open(FILE, writer=True)

    def refuse(puts: object, deletes: object = ()) -> None:
        raise NoSpace("full")

    with monkeypatch.context() as full:
        full.setattr(world.daemons[0].store, "write", refuse)
        client.kill()
        await trio.sleep(LEASE_S)
    assert client.links.client_id in world.connected(0)
    await trio.sleep(10)
    assert client.links.client_id not in world.connected(0)
    assert world.ended[-1] == (0, client.links.client_id, (OpenCount(FILE, 0, 1),), False)
    assert world.stored(0, disk.SESSION, disk.WRITE_OPEN) == set()


@pytest.mark.parametrize("request_", [Open(FILE, True), Make(1, b"x", 0o100644, 0, 0, open_writers=1)])
async def test_a_handle_whose_answer_was_lost_in_a_crash_counts_after_it(
    world: World, request_: Request, autojump_clock: MockClock
) -> None:
    client = await world.client()
    daemon = world.daemons[0]
    node = daemon.node
    world.network.lose_reply(request_.op)
    async with trio.open_nursery() as nursery:
        reply_type = request_.Reply
        nursery.start_soon(client.links.to(0).call, request_, reply_type)
        while client.node.channels and not world.table(0).count(FILE):
            await trio.lowlevel.checkpoint()
        assert world.table(0).count(FILE) == 1
        world.network.partition(client.node, node)
        await daemon.kill()
        await daemon.start()
    assert world.network.calls[request_.op] == 2
    assert world.table(0).count(FILE) == 1
    assert world.stored(0, disk.WRITE_OPEN) == {disk.WRITE_OPEN}


async def test_a_release_whose_answer_was_lost_in_a_crash_is_taken_back_once(
    world: World, autojump_clock: MockClock
) -> None:
    client = await world.client()
    for _ in range(3):
        await client.open(FILE, writer=True)
    daemon = world.daemons[0]
    world.network.lose_reply(Release.op)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.release, FILE, True)
        while world.table(0).count(FILE) == 3:
            await trio.lowlevel.checkpoint()
        world.network.partition(client.node, daemon.node)
        await daemon.kill()
        await daemon.start()
    assert world.network.calls[Release.op] == 2
    assert world.table(0).count(FILE) == 2


async def test_a_daemon_that_stood_still_does_not_blame_its_clients(world: World, autojump_clock: MockClock) -> None:
    client = await world.client()
    await client.open(FILE)
    autojump_clock.jump(10 * LEASE_S)
    await trio.sleep(1)
    assert world.ended == []
    await client.open(FILE)
    assert world.table(0).count(FILE) == 2


async def test_a_new_connection_ends_the_old_one_first(world: World, autojump_clock: MockClock) -> None:
    client_id, daemon = 42, world.daemons[0]
    node = world.network.node(peer_of(client_id))
    location = world.directory.find(0)
    assert location is not None
    old = await node.connect(location.address)
    hello = encode(Hello("mount", "/mnt/x", resume=False))
    assert (await old.call(Hello.op, hello)).status == 0
    new = await node.connect(location.address)
    assert (await new.call(Hello.op, encode(Hello("mount", "/mnt/x", resume=True)))).status == 0
    assert await old.wait_closed() is Ending.PEER
    assert (await new.call(GetAttr.op, encode(GetAttr(FILE)))).status == 0
    assert daemon.sessions.of(next(c for c in daemon.node.channels if c.peer.client_id == client_id)) is not None


async def test_who_resumes_what_is_not_there_or_claims_to_be_a_daemon_is_refused(
    world: World, autojump_clock: MockClock
) -> None:
    location = world.directory.find(0)
    assert location is not None
    channel = await world.network.node(peer_of(43)).connect(location.address)
    for hello, error in ((Hello("mount", "", True), Stale), (Hello("daemon", "", False), NotPermitted)):
        assert (await channel.call(Hello.op, encode(hello))).status == error.status
    impostor = await world.network.node(peer_of(44, daemon_id=1)).connect(location.address)
    assert (await impostor.call(Hello.op, encode(Hello("mount", "", False)))).status == NotPermitted.status


async def test_a_daemon_that_started_anew_ends_the_connection_of_its_last_incarnation(
    world: World, autojump_clock: MockClock
) -> None:
    await world.daemons[1].kill()
    location = world.directory.find(0)
    assert location is not None
    hello = encode(Hello("daemon", "daemon 1", False))
    old = await world.network.node(peer_of(100, daemon_id=1)).connect(location.address)
    assert (await old.call(Hello.op, hello)).status == 0
    new = await world.network.node(peer_of(101, daemon_id=1)).connect(location.address)
    reply = await new.call(Hello.op, hello)
    assert reply.status == 0
    assert await old.wait_closed() is Ending.PEER


async def test_a_daemon_that_connects_anew_before_its_old_connection_ended_is_heard(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a cut that only one of the two has noticed. Else this daemon takes itself to be cut off, for ever."""
    await world.daemons[1].kill()
    location = world.directory.find(0)
    assert location is not None
    hello = encode(Hello("daemon", "daemon 1", False))
    node = world.network.node(peer_of(100, daemon_id=1))
    old = await node.connect(location.address)
    assert (await old.call(Hello.op, hello)).status == 0
    (served,) = (one for one in world.daemons[0].node.channels if one.peer.client_id == 100)
    new = await node.connect(location.address)
    aclose, pauses = type(served).aclose, [0.1]

    async def aclose_late(self: object) -> None:
        """Let whoever waits for the end of the connection be faster than Hello, which ends it."""
        pause_s = pauses.pop() if self is served and pauses else 0.0
        await aclose(self)  # type: ignore[arg-type]
        await trio.sleep(pause_s)

    monkeypatch.setattr(type(served), "aclose", aclose_late)
    assert (await new.call(Hello.op, hello)).status == 0
    assert await old.wait_closed() is Ending.PEER
    silent = await world.network.node(peer_of(42)).connect(location.address)
    assert (await silent.call(Hello.op, encode(Hello("mount", "/mnt/x", False)))).status == 0
    for _ in range(12):
        assert (await new.call(Heartbeat.op, encode(Heartbeat()))).status == 0
        await trio.sleep(LEASE_S / 6)
    assert world.connected(0) == {}
