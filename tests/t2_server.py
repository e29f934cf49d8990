"""Requests reach their daemon once, whatever happens to connections: links and servers over the network in memory."""

import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from benchfs_fuse.chunks.memory import MemoryChunkStore
from benchfs_fuse.errors import (
    DaemonUnreachable,
    NotFound,
    NotPermitted,
    ProtocolError,
    Stale,
    StorageError,
)
from benchfs_fuse.model import Attrs, ClientId, Entry, make_ino
from benchfs_fuse.ports import Ending, KeyValueStore
from benchfs_fuse.rpc import client
from benchfs_fuse.rpc.client import ORDINARY_MAX, Link, Links
from benchfs_fuse.rpc.memory import MemoryNetwork, MemoryNode
from benchfs_fuse.rpc.messages import (
    AttrsReply,
    Body,
    CommitWrite,
    Done,
    EntryReply,
    Expel,
    Failure,
    Finish,
    FinishReply,
    Forget,
    GetAttr,
    Heartbeat,
    Lookup,
    OpenCount,
    ReadChunk,
    ReadChunkReply,
    Request,
    SyncMeta,
    TxId,
    WriteChunk,
    WriteChunkReply,
    decode,
    encode,
)
from benchfs_fuse.services.calls import Batch, Call, Peers
from benchfs_fuse.services.chunkserver import ChunkServer
from benchfs_fuse.services.sessions import SessionTable
from benchfs_fuse.testing.daemons import MemoryCluster, MemoryDaemon

LEDGER = b"Z"


def attrs_of(ino: int, size: int = 0) -> Attrs:
    return Attrs(ino, 1, 0o100644, 1, 0, 0, 0, size, 0, 0, 0, 0, 1, 1 << 22, 2, 0)


class Ledger:
    """Write down every CommitWrite that is applied. Odd inodes are served as tasks, even ones at once.

    A request for ``gated`` waits for ``gate`` before it is applied. GetAttr fails as ``failure`` says.
    """

    def __init__(self, store: KeyValueStore) -> None:
        self.store = store
        self.gated = -1
        self.gate = trio.Event()
        self.serving = 0
        self.serving_max = 0
        self.failure: Exception | None = None
        self.peers: Peers | None = None

    def handlers(self) -> Mapping[type[Request], Callable[[Request, Call], Awaitable[Body]]]:
        return {CommitWrite: self.commit_later, SyncMeta: self.wait}

    def handlers_now(self) -> Mapping[type[Request], Callable[[Request, Call], Body | None]]:
        return {CommitWrite: self.commit_now, GetAttr: self.get, Finish: self.finish}

    def commit_now(self, request: Request, call: Call) -> Body | None:
        assert isinstance(request, CommitWrite)
        return None if request.ino % 2 or request.ino == self.gated else self.apply(request, call)

    async def commit_later(self, request: Request, call: Call) -> Body:
        assert isinstance(request, CommitWrite)
        if request.ino == self.gated:
            await self.gate.wait()
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        return self.apply(request, call)

    def apply(self, request: CommitWrite, call: Call) -> Body:
        batch = Batch(self.store)
        key = LEDGER + request.end.to_bytes(8, "big")
        batch.put(key, (int.from_bytes(batch.get(key) or b"", "big") + 1).to_bytes(8, "big"))
        reply = AttrsReply(attrs_of(request.ino, request.end))
        call.commit(batch, reply)
        return reply

    async def wait(self, request: Request, call: Call) -> Body:
        self.serving += 1
        self.serving_max = max(self.serving_max, self.serving)
        try:
            await self.gate.wait()
        finally:
            self.serving -= 1
        return Done()

    def get(self, request: Request, call: Call) -> Body:
        assert isinstance(request, GetAttr)
        if self.failure is not None:
            raise self.failure
        return AttrsReply(attrs_of(request.ino))

    def finish(self, request: Request, call: Call) -> Body:
        return FinishReply(())

    async def session_ended(self, client_id: ClientId, opens: Sequence[OpenCount], clean: bool) -> None:
        pass


def ledger(daemon: MemoryDaemon) -> Ledger:
    assert isinstance(daemon.service, Ledger)
    return daemon.service


def applied(daemon: MemoryDaemon) -> Counter[int]:
    rows = daemon.store.contents().items()
    return Counter(
        {int.from_bytes(key[1:], "big"): int.from_bytes(value, "big") for key, value in rows if key[:1] == LEDGER}
    )


def make_ledger(daemon: MemoryDaemon, store: KeyValueStore, sessions: SessionTable, peers: Peers) -> Ledger:
    service = Ledger(store)
    service.peers = peers
    return service


@asynccontextmanager
async def open_cluster(daemons: int, seed: int = 0) -> AsyncIterator[MemoryCluster]:
    async with MemoryNetwork(seed) as network, trio.open_nursery() as nursery:
        cluster = MemoryCluster(network, nursery, make_ledger, daemons=daemons, seed=seed)
        await cluster.start()
        yield cluster
        nursery.cancel_scope.cancel()


async def connect(cluster: MemoryCluster, op_timeout_s: float = float("inf")) -> Links:
    links, _ = cluster.links(op_timeout_s=op_timeout_s)
    cluster.nursery.start_soon(links.run)
    await links.wait_connected()
    return links


def cut(cluster: MemoryCluster, daemon_id: int) -> None:
    """End all connections of a daemon."""
    for channel in list(cluster.daemons[daemon_id].node.channels):
        channel.cut_both(Ending.PEER)


async def test_a_request_is_answered() -> None:
    async with open_cluster(2) as cluster:
        links = await connect(cluster)
        assert links.daemons == (0, 1)
        assert (await links.to(1).call(GetAttr(5), AttrsReply)).attrs.ino == 5
        assert cluster.daemons[1].server.requests == {"Hello": 1 + 1, "GetAttr": 1}  # the other daemon said Hello too
        assert cluster.daemons[0].server.requests == {"Hello": 1 + 1}


@pytest.mark.parametrize("seed", range(8))
async def test_recorded_requests_are_applied_once_over_lossy_connections(seed: int, autojump_clock: object) -> None:
    async with open_cluster(3, seed) as cluster:
        links = await connect(cluster)
        cluster.network.request_loss = cluster.network.reply_loss = 0.1
        sent: list[Counter[int]] = [Counter() for _ in range(3)]

        async def client(number: int) -> None:
            choose = random.Random(seed * 1000 + number)
            for step in range(12):
                daemon_id, ident = choose.randrange(3), number * 100 + step + 1
                sent[daemon_id][ident] += 1
                request = CommitWrite(make_ino(daemon_id, 1 + choose.randrange(9)), ident, 0)
                assert (await links.to(daemon_id).call(request, AttrsReply)).attrs.size == ident

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(client, number)
        assert [applied(daemon) for daemon in cluster.daemons] == sent
        assert cluster.network.calls[3] == 0  # nobody needed a heartbeat to get on


@pytest.mark.parametrize("seed", range(4))
async def test_recorded_requests_are_applied_once_while_a_daemon_is_killed(seed: int, autojump_clock: object) -> None:
    async with open_cluster(2, seed) as cluster:
        links = await connect(cluster)
        done: Counter[int] = Counter()

        async def client(number: int) -> None:
            for step in range(30):
                ident = number * 100 + step + 1
                await links.to(0).call(CommitWrite(1 + (number + step) % 7, ident, 0), AttrsReply)
                done[ident] += 1

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(client, number)
            for kills in range(4):
                while len(done) < (kills + 1) * 50:
                    await trio.lowlevel.checkpoint()
                await cluster.daemons[0].kill()
                await cluster.daemons[0].start()
        assert applied(cluster.daemons[0]) == done


async def test_a_retry_joins_the_request_that_still_runs() -> None:
    async with open_cluster(1) as cluster:
        links = await connect(cluster)
        service = ledger(cluster.daemons[0])
        service.gated = 4
        async with trio.open_nursery() as nursery:
            nursery.start_soon(links.to(0).call, CommitWrite(4, 77, 0), AttrsReply)
            for _ in range(3):
                await wait_all_tasks_blocked()
                cut(cluster, 0)
            await wait_all_tasks_blocked()
            service.gate.set()
        assert applied(cluster.daemons[0]) == {77: 1}
        assert cluster.network.calls[CommitWrite.op] == 4


@pytest.mark.parametrize("broken", [False, True], ids=["same connection", "new connection"])
async def test_a_request_that_was_given_up_is_not_applied_after_a_newer_one(
    broken: bool, autojump_clock: object
) -> None:
    async with open_cluster(1) as cluster:
        links = await connect(cluster, op_timeout_s=3)
        daemon, node = cluster.daemons[0], links.network
        assert isinstance(node, MemoryNode)
        service = ledger(daemon)
        service.gated = 4

        async def give_up(number: int) -> None:
            with pytest.raises(DaemonUnreachable):
                await links.to(0).call(CommitWrite(4, 1000 + number, 0), AttrsReply)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(give_up, number)
            await wait_all_tasks_blocked()
            if broken:
                cluster.network.partition(node, daemon.node)
        if broken:
            cluster.network.silence(node, daemon.node)
            cluster.network.heal(node, daemon.node)
        await links.to(0).call(CommitWrite(2, 1, 0), AttrsReply)
        service.gate.set()
        await wait_all_tasks_blocked()
        assert applied(daemon) == {1: 1}
        assert links.to(0).statistics().in_flight == 0


async def test_all_places_are_free_again_when_what_took_them_was_given_up(autojump_clock: object) -> None:
    async with open_cluster(1) as cluster:
        links = await connect(cluster, op_timeout_s=3)
        ledger(cluster.daemons[0]).gated = 4
        failed = 0

        async def give_up() -> None:
            nonlocal failed
            with pytest.raises(DaemonUnreachable):
                await links.to(0).call(CommitWrite(4, 1000, 0), AttrsReply)
            failed += 1

        async with trio.open_nursery() as nursery:
            for _ in range(ORDINARY_MAX + 20):
                nursery.start_soon(give_up)
        await links.to(0).call(CommitWrite(2, 1, 0), AttrsReply)
        await wait_all_tasks_blocked()
        assert failed == ORDINARY_MAX + 20
        assert cluster.network.calls[Forget.op] == ORDINARY_MAX
        assert applied(cluster.daemons[0]) == {1: 1}


async def test_requests_that_were_given_up_and_hang_take_the_places_until_the_heartbeat_misses_one(
    autojump_clock: object,
) -> None:
    async with open_cluster(1) as cluster:
        links = await connect(cluster, op_timeout_s=3)
        failed = 0

        async def give_up() -> None:
            nonlocal failed
            with pytest.raises(DaemonUnreachable):
                await links.to(0).call(SyncMeta(), Done)
            failed += 1

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for _ in range(ORDINARY_MAX):
                    nursery.start_soon(give_up)
        assert failed == 2 * ORDINARY_MAX
        with trio.fail_after(cluster.lease_s / 2):
            await links.to(0).call(GetAttr(5), AttrsReply, patient=True)
        assert not links.expelled.is_set()
        assert ledger(cluster.daemons[0]).serving == 0


async def test_what_a_client_had_under_way_is_not_applied_once_it_is_expelled() -> None:
    async with open_cluster(2) as cluster:
        links = await connect(cluster)
        service = ledger(cluster.daemons[0])
        service.gated = 4

        async def fail() -> None:
            with pytest.raises(Stale):
                await links.to(0).call(CommitWrite(4, 1, 0), AttrsReply)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await wait_all_tasks_blocked()
            peers = ledger(cluster.daemons[1]).peers
            assert peers is not None
            await peers.call(0, Expel(links.client_id), Done)
            service.gate.set()
            await wait_all_tasks_blocked()
        assert links.expelled.is_set()
        assert applied(cluster.daemons[0]) == {}


async def test_requests_in_flight_are_bounded_for_each_daemon_by_itself() -> None:
    async with open_cluster(2) as cluster:
        links = await connect(cluster)
        service = ledger(cluster.daemons[0])
        async with trio.open_nursery() as nursery:
            for _ in range(ORDINARY_MAX + 100):
                nursery.start_soon(links.to(0).call, SyncMeta(), Done)
            await wait_all_tasks_blocked()
            assert service.serving == ORDINARY_MAX
            assert links.to(0).statistics().in_flight == ORDINARY_MAX + 100
            assert (await links.to(1).call(GetAttr(5), AttrsReply)).attrs.ino == 5
            service.gate.set()
        assert service.serving_max == ORDINARY_MAX
        assert links.to(0).statistics().in_flight == 0


async def test_a_dead_daemon_fails_its_own_requests_at_their_deadline_only(autojump_clock: object) -> None:
    async with open_cluster(2) as cluster:
        links = await connect(cluster, op_timeout_s=30)
        await cluster.daemons[0].kill()
        started, failed = trio.current_time(), 0

        async def fail() -> None:
            nonlocal failed
            with pytest.raises(DaemonUnreachable, match="daemon 0 at memory:1 did not answer SyncMeta in 30 s"):
                await links.to(0).call(SyncMeta(), Done)
            failed += 1

        async with trio.open_nursery() as nursery:
            for _ in range(ORDINARY_MAX + 10):
                nursery.start_soon(fail)
            for _ in range(10):
                await links.to(1).call(GetAttr(5), AttrsReply)
            assert trio.current_time() == started and failed == 0
        assert trio.current_time() == started + 30
        state = links.to(0).statistics()
        assert not state.connected and state.missing_since_s > 0 and "nobody answers" in state.trouble


async def test_an_outage_is_logged_once_with_its_beginning_and_its_end(
    autojump_clock: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = Counter[Link]()

    async def count(link: Link) -> client.Location | None:
        tries[link] += 1
        return await locate(link)

    locate = Link._locate
    monkeypatch.setattr(Link, "_locate", count)
    async with open_cluster(1) as cluster:
        links = await connect(cluster, op_timeout_s=30)
        for outage in range(1, 3):
            tries.clear()
            await cluster.daemons[0].kill()
            async with trio.open_nursery() as nursery:

                async def fail() -> None:
                    for _ in range(20):
                        with pytest.raises(DaemonUnreachable):
                            await links.to(0).call(SyncMeta(), Done)

                for _ in range(10):
                    nursery.start_soon(fail)
            assert tries[links.to(0)] > 100
            missing = [message for message in caplog.messages if "missing" in message]
            since = time.strftime("%H:%M:%S", time.localtime(links.to(0).statistics().missing_since_s))
            assert len(missing) == outage
            assert missing[-1].startswith(f"daemon 0 at memory:{outage} has been missing since {since}: ")
            await cluster.daemons[0].start()
            await links.to(0).call(GetAttr(5), AttrsReply)
            assert len([message for message in caplog.messages if "is there after" in message]) == outage


async def test_a_daemon_that_comes_back_elsewhere_is_found_at_once(autojump_clock: object) -> None:
    async with open_cluster(1) as cluster:
        links = await connect(cluster)
        await cluster.daemons[0].kill()
        await trio.sleep(100)  # the pauses between attempts are at their longest
        moment = trio.current_time()
        await cluster.daemons[0].start()
        await links.to(0).call(GetAttr(5), AttrsReply)
        assert trio.current_time() == moment


async def test_errors_come_back_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    async with open_cluster(1) as cluster:
        links = await connect(cluster)
        service = ledger(cluster.daemons[0])
        service.failure = NotFound("no such thing")
        with pytest.raises(NotFound, match="no such thing"):
            await links.to(0).call(GetAttr(5), AttrsReply)
        service.failure = ZeroDivisionError("what nobody foresaw")
        with pytest.raises(StorageError, match="what nobody foresaw"):
            await links.to(0).call(GetAttr(5), AttrsReply)
        assert "Traceback" in caplog.text
        service.failure = None
        await links.to(0).call(GetAttr(5), AttrsReply)


async def test_strangers_to_the_session_are_refused() -> None:
    async with open_cluster(1) as cluster:
        links, node = cluster.links()
        channel = await node.connect("memory:1")
        for op, body, error in (
            (GetAttr.op, encode(GetAttr(5)), Stale),
            (Heartbeat.op, encode(Heartbeat()), Stale),
            (9999, b"", ProtocolError),
            (GetAttr.op, b"\xc1", ProtocolError),
            (CommitWrite.op, b"short", ProtocolError),
        ):
            reply = await channel.call(op, body)
            assert reply.status == error.status, decode(Failure, reply.body)
        await channel.aclose()
        cluster.nursery.start_soon(links.run)
        with pytest.raises(NotPermitted):
            await links.to(0).call(Finish(TxId(0, 1, 1), True), FinishReply)
        with pytest.raises(ProtocolError):
            await links.to(0).call(GetAttr(5), AttrsReply, payload=b"unasked for")


async def test_daemons_reach_each_other_and_themselves() -> None:
    async with open_cluster(2) as cluster:
        peers = ledger(cluster.daemons[0]).peers
        assert peers is not None
        for daemon_id in (0, 1):
            await peers.call(daemon_id, Finish(TxId(0, 1, 1), True), FinishReply)
        assert cluster.network.calls[Finish.op] == 1  # itself it reaches without a connection
        ledger(cluster.daemons[0]).failure = NotFound("not here")
        with pytest.raises(NotFound):
            await peers.call(0, GetAttr(3), AttrsReply)


async def test_waiting_requests_of_daemons_leave_room_for_those_that_end_the_wait() -> None:
    async with open_cluster(2) as cluster:
        peers = ledger(cluster.daemons[0]).peers
        assert peers is not None

        released = trio.Event()

        async def lookup(request: Request, call: Call) -> Body:
            await released.wait()
            return EntryReply(Entry(1, 0, None))

        async def finish(request: Request, call: Call) -> Body:
            released.set()
            return FinishReply(())

        del cluster.daemons[1].server._handlers_now[Finish]
        cluster.daemons[1].server.register({Lookup: lookup, Finish: finish})
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for _ in range(500):
                    nursery.start_soon(peers.call, 1, Lookup(1, b"x"), EntryReply)
                await wait_all_tasks_blocked()
                await peers.call(1, Finish(TxId(0, 1, 1), True), FinishReply)


# ── payloads ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def open_chunk_cluster(seed: int = 0) -> AsyncIterator[tuple[MemoryCluster, Links, ChunkServer]]:
    async with open_cluster(1, seed) as cluster:
        peers = ledger(cluster.daemons[0]).peers
        assert peers is not None
        chunks = ChunkServer(MemoryChunkStore(), 0, peers)
        cluster.daemons[0].server.register(chunks.handlers(), bulk=chunks.bulk())
        yield cluster, await connect(cluster), chunks


async def read(link: Link, length: int) -> bytes:
    room = bytearray(length)
    reply = await link.call(ReadChunk(5, 0, 0, length), ReadChunkReply, into=memoryview(room))
    return bytes(room[: reply.length])


@pytest.mark.parametrize("length", [1, 4096, 1 << 20])
async def test_payloads_go_both_ways_and_buffers_come_back(length: int) -> None:
    async with open_chunk_cluster() as (_, links, chunks):
        data = random.Random(length).randbytes(length)
        reply = await links.to(0).call(WriteChunk(5, 0, 0), WriteChunkReply, payload=data)
        assert reply.allocated_delta >= length
        assert await read(links.to(0), length) == data
        assert await read(links.to(0), 2 * length) == data
        room = bytearray(10)
        missing = await links.to(0).call(ReadChunk(5, 9, 0, 10), ReadChunkReply, into=memoryview(room))
        assert missing.length == 0
        await wait_all_tasks_blocked()
        assert chunks.pool.lent_bytes == 0


@pytest.mark.parametrize("seed", range(20))
async def test_a_delayed_write_of_an_old_connection_never_lands_after_its_retry(seed: int) -> None:
    async with open_chunk_cluster(seed) as (cluster, links, _):
        node = links.network
        daemon = cluster.daemons[0]
        old, new = b"old" * 100, b"new" * 100
        async with trio.open_nursery() as nursery:
            nursery.start_soon(links.to(0).call, WriteChunk(5, 0, 0), WriteChunkReply, old)
            await trio.lowlevel.checkpoint()
            cluster.network.partition(node, daemon.node)  # type: ignore[arg-type]
            await wait_all_tasks_blocked()
            for channel in list(node.channels):  # type: ignore[attr-defined]
                channel.cut(Ending.SILENCE)
            await wait_all_tasks_blocked()
            cluster.network.heal(node, daemon.node)  # type: ignore[arg-type]
        await links.to(0).call(WriteChunk(5, 0, 0), WriteChunkReply, new)
        await wait_all_tasks_blocked()
        assert await read(links.to(0), 300) == new


@pytest.mark.parametrize("turns", range(1, 12))
async def test_a_cancelled_read_closes_its_connection_so_that_nothing_arrives_late(turns: int) -> None:
    async with open_chunk_cluster() as (_, links, _):
        await links.to(0).call(WriteChunk(5, 0, 0), WriteChunkReply, b"x" * 100)
        room = bytearray(100)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                request = ReadChunk(5, 0, 0, 100)
                nursery.start_soon(lambda: links.to(0).call(request, ReadChunkReply, into=memoryview(room)))
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        at_cancel = bytes(room)
        await wait_all_tasks_blocked()
        assert room == at_cancel
        assert await read(links.to(0), 100) == b"x" * 100
