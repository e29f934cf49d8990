"""Run a whole cluster in one process: real metadata, real servers and clients, over twins of stores and network."""

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from benchfs_fuse.chunks.faulty import FaultyChunkStore
from benchfs_fuse.chunks.memory import MemoryChunkStore, MemoryInspector
from benchfs_fuse.client import FileSystem
from benchfs_fuse.errors import FsError
from benchfs_fuse.limits import CHUNK_SIZE_MIN
from benchfs_fuse.model import ClientId
from benchfs_fuse.ports import KeyValueStore
from benchfs_fuse.rpc.client import Links
from benchfs_fuse.rpc.memory import MemoryNetwork, MemoryNode
from benchfs_fuse.rpc.messages import Body, OpenCount, Request, TrimChunks
from benchfs_fuse.rpc.server import AsyncHandler, SyncHandler
from benchfs_fuse.services.calls import Call, Peers
from benchfs_fuse.services.chunkserver import ChunkServer
from benchfs_fuse.services.file_locks import FileLocks, open_locks
from benchfs_fuse.services.files import Files, open_files
from benchfs_fuse.services.identity import open_store
from benchfs_fuse.services.metadata import MetadataService
from benchfs_fuse.services.namespace import Namespace
from benchfs_fuse.services.sessions import SessionTable
from benchfs_fuse.testing.daemons import MemoryCluster, MemoryDaemon

#: Chunks of the test cluster: the smallest, so that small files have several.
CHUNK = CHUNK_SIZE_MIN


class WholeService:
    """Be all that a daemon serves: names, attributes and chunks."""

    def __init__(self, metadata: MetadataService, chunks: ChunkServer) -> None:
        self.metadata = metadata
        self.chunks = chunks

    def handlers(self) -> Mapping[type[Request], AsyncHandler]:
        return {**self.metadata.handlers(), **self.chunks.handlers()}

    def handlers_now(self) -> Mapping[type[Request], SyncHandler]:
        return self.metadata.handlers_now()

    async def session_ended(self, client_id: ClientId, opens: Sequence[OpenCount], clean: bool) -> None:
        await self.metadata.session_ended(client_id, opens, clean)


class Client(NamedTuple):
    """Be one mount of a whole cluster, without FUSE."""

    node: MemoryNode
    links: Links
    namespace: Namespace
    files: Files
    fs: FileSystem
    locks: FileLocks


class Whole:
    """Hold a running cluster; ``chunks`` are the stores of the daemons, in which a test may plant faults.

    ``clocks``: what time it is at each daemon, ns; without them, that is the same.
    """

    def __init__(
        self,
        network: MemoryNetwork,
        nursery: trio.Nursery,
        daemons: int,
        seed: int,
        clocks: Sequence[Callable[[], int]] = (),
    ) -> None:
        self._clocks = clocks or [time.time_ns] * daemons
        self.network = network
        self.stores = [MemoryChunkStore(filesystem=f"memory{number}") for number in range(daemons)]
        self.chunks = [FaultyChunkStore(store, seed=seed + number) for number, store in enumerate(self.stores)]
        self.inspectors = [MemoryInspector(store) for store in self.stores]
        self.cluster = MemoryCluster(network, nursery, self._serve, daemons=daemons, seed=seed)

    def _serve(self, daemon: MemoryDaemon, store: KeyValueStore, sessions: SessionTable, peers: Peers) -> WholeService:
        shard_map = self.cluster.shard_map
        clock = self._clocks[daemon.daemon_id]
        incarnation = open_store(store, "test", daemon.daemon_id, shard_map, CHUNK, clock())
        metadata = MetadataService(
            store,
            daemon_id=daemon.daemon_id,
            incarnation=incarnation,
            shard_map=shard_map,
            opens=sessions,
            peers=peers,
            clock=clock,
        )
        metadata.recover()
        daemon.nursery.start_soon(metadata.run)

        async def review_after_grace() -> None:
            await sessions.wait_grace_over()
            metadata.grace_ended()

        daemon.nursery.start_soon(review_after_grace)
        chunks = ChunkServer(self.chunks[daemon.daemon_id], daemon.daemon_id, peers)
        daemon.server.register({}, {}, chunks.bulk(), metadata.wait_done)
        inspector = self.inspectors[daemon.daemon_id]
        daemon.server.register(metadata.inspection(self.chunks[daemon.daemon_id], inspector).handlers())
        daemon.server.register(metadata.recounting(inspector).handlers())
        return WholeService(metadata, chunks)

    def hold_trims(self, ino: int, first: FsError | None = None) -> tuple[trio.Event, trio.Event]:
        """Of two daemons, let the one without the inode cut nothing before the second event; the first: it was asked.

        The first time it answers with ``first``, if that is given.
        """
        home = self.cluster.shard_map.of_ino(ino)
        (elsewhere,) = (daemon for daemon in self.cluster.daemons if daemon.daemon_id != home)
        trim = self.service(elsewhere).chunks.handlers()[TrimChunks]
        came, go_on = trio.Event(), trio.Event()

        async def later(request: Request, call: Call) -> Body:
            again = came.is_set()
            came.set()
            if first is not None and not again:
                raise first
            await go_on.wait()
            return await trim(request, call)

        elsewhere.server.register({TrimChunks: later})
        return came, go_on

    def service(self, daemon: MemoryDaemon) -> WholeService:
        """Return what a daemon serves."""
        assert isinstance(daemon.service, WholeService)
        return daemon.service

    @asynccontextmanager
    async def client(
        self, *, gather_bytes_max: int = 1 << 20, gather_time_s: float = 1.0, op_timeout_s: float = float("inf")
    ) -> AsyncIterator[Client]:
        """Be a client for a while."""
        links, node = self.cluster.links(op_timeout_s=op_timeout_s)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(links.run)
            await links.wait_connected()
            namespace = Namespace(links)
            async with (
                open_locks(links) as locks,
                open_files(namespace, gather_bytes_max=gather_bytes_max, gather_time_s=gather_time_s) as files,
            ):
                links.opens, links.on_lost = files.opens, files.lose
                links.on_power_lost = files.power_lost
                yield Client(node, links, namespace, files, FileSystem(namespace, files, locks, 1000, 1000), locks)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def whole_cluster(
    daemons: int = 2, seed: int = 0, clocks: Sequence[Callable[[], int]] = ()
) -> AsyncIterator[Whole]:
    """Run a cluster for a while."""
    async with MemoryNetwork(seed) as network, trio.open_nursery() as nursery:
        whole = Whole(network, nursery, daemons, seed, clocks)
        await whole.cluster.start()
        yield whole
        nursery.cancel_scope.cancel()
