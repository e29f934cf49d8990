"""Run daemons of one cluster in one process, over the network in memory, with any service behind them."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import trio

from ..kv.memory import MemoryStore
from ..layout import ShardMap
from ..model import ClientId
from ..ports import KeyValueStore, Peer
from ..rpc.client import Links
from ..rpc.memory import MemoryNetwork, MemoryNode
from ..rpc.messages import OpenCount, Request
from ..rpc.server import AsyncHandler, Server, SyncHandler
from ..services.calls import Peers
from ..services.peers import ClusterPeers
from ..services.sessions import Process, SessionTable

#: Boot id that all these "hosts" share or not, as a test likes.
HERE = "boot-here"
ELSEWHERE = "boot-elsewhere"


class Place(NamedTuple):
    """Implement Location."""

    address: str
    start: str


class MemoryDirectory:
    """Implement Directory in memory."""

    def __init__(self) -> None:
        self._places: dict[int, Place] = {}
        self._starts = 0
        self._changed = trio.Event()

    def publish(self, daemon_id: int, address: str) -> None:
        """Note where a daemon that was just started can be met."""
        self._starts += 1
        self._places[daemon_id] = Place(address, str(self._starts))
        self._tell()

    def withdraw(self, daemon_id: int) -> None:
        """Forget a daemon."""
        self._places.pop(daemon_id, None)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def find(self, daemon_id: int) -> Place | None:
        """Return where the daemon can be met."""
        return self._places.get(daemon_id)

    async def look(self, daemon_id: int) -> Place | None:
        """Return where the daemon can be met, at once."""
        return self.find(daemon_id)

    async def wait_changed(self, daemon_id: int, known: object) -> None:
        """Wait until ``find`` returns something else."""
        while self._places.get(daemon_id) == known:
            await self._changed.wait()


class Service(Protocol):
    """Say what a daemon needs of what it serves."""

    def handlers(self) -> Mapping[type[Request], AsyncHandler]:
        """Return asynchronous handlers."""
        ...

    def handlers_now(self) -> Mapping[type[Request], SyncHandler]:
        """Return synchronous handlers."""
        ...

    async def session_ended(self, client_id: ClientId, opens: Sequence[OpenCount], clean: bool) -> None:
        """Deal with the end of a session."""
        ...


class FakeProcess:
    """Implement Process by an event."""

    def __init__(self) -> None:
        self.gone = trio.Event()
        self.closed = False

    async def wait_gone(self) -> None:
        """Wait until the test says that the process has ended."""
        await self.gone.wait()

    def close(self) -> None:
        """Note that nobody watches any more."""
        self.closed = True


def peer_of(client_id: int, daemon_id: int = -1, *, pid: int = 1, boot_id: str = ELSEWHERE) -> Peer:
    """Make the identity of a node."""
    return Peer(ClientId(client_id), daemon_id, f"host{max(daemon_id, 0)}", pid, boot_id)


class MemoryDaemon:
    """Be one daemon; ``start`` and ``kill`` it as often as you like, its store stays."""

    def __init__(
        self,
        cluster: "MemoryCluster",
        daemon_id: int,
        make_service: Callable[["MemoryDaemon", KeyValueStore, SessionTable, Peers], Service],
    ) -> None:
        self._cluster = cluster
        self.daemon_id = daemon_id
        self._make_service = make_service
        self.incarnation = 0
        #: How often it was said to have lost power; whoever counts one up takes away what was not synced.
        self.losses = 0
        self.store = MemoryStore()
        self.node: MemoryNode
        self.sessions: SessionTable
        self.server: Server
        self.links: Links
        self.service: Service
        #: For the tasks of the service: they die with the daemon.
        self.nursery: trio.Nursery
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    async def start(self) -> None:
        """Start over what the store holds; returns when the daemon serves."""
        await self._cluster.nursery.start(self._run)

    async def _run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        cluster = self._cluster
        self.incarnation += 1
        self.store = MemoryStore(self.store.contents())
        self._stopped = trio.Event()
        client_id = ClientId(cluster.random.getrandbits(63))
        self.node = cluster.network.node(peer_of(client_id, self.daemon_id))
        self.sessions = SessionTable(
            self.store,
            daemon_id=self.daemon_id,
            daemons=cluster.shard_map.daemons,
            incarnation=self.incarnation,
            lease_s=cluster.lease_s,
            map_version=cluster.shard_map.version,
            boot_id=HERE,
            open_process=cluster.open_process,
            losses=self.losses,
        )
        self.server = Server(self.store, self.sessions, client_id)
        self.links = Links(
            self.node,
            cluster.directory,
            cluster.shard_map,
            client_id,
            kind="daemon",
            label=f"daemon {self.daemon_id}",
            op_timeout_s=float("inf"),
            daemons=set(cluster.shard_map.daemons) - {self.daemon_id},
        )
        peers = ClusterPeers(self.daemon_id, self.server, self.links)
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                self.service = self._make_service(self, self.store, self.sessions, peers)
                self.server.register(self.service.handlers(), self.service.handlers_now())
                await nursery.start(self.server.run)
                nursery.start_soon(self.links.run)
                await nursery.start(self.sessions.run, self.service.session_ended, peers)
                cluster.directory.publish(self.daemon_id, await self.node.listen(self.server))
                task_status.started()
                await trio.sleep_forever()
        self._stopped.set()

    async def kill(self) -> None:
        """End as ``kill -9`` would; what was written to the store stays."""
        self.node.kill()
        self._scope.cancel()
        await self._stopped.wait()


class MemoryCluster:
    """Hold the daemons of one cluster and make clients of it."""

    def __init__(
        self,
        network: MemoryNetwork,
        nursery: trio.Nursery,
        make_service: Callable[[MemoryDaemon, KeyValueStore, SessionTable, Peers], Service],
        *,
        daemons: int,
        seed: int = 0,
        lease_s: float = 60.0,
    ) -> None:
        self.network = network
        self.nursery = nursery
        self.random = random.Random(seed)
        self.lease_s = lease_s
        self.shard_map = ShardMap.round_robin(daemons)
        self.directory = MemoryDirectory()
        #: Processes of the host HERE, by pid.
        self.processes: dict[int, FakeProcess] = {}
        self.daemons = [MemoryDaemon(self, daemon_id, make_service) for daemon_id in range(daemons)]

    def open_process(self, pid: int) -> Process | None:
        """Watch a process of the host HERE."""
        return self.processes.get(pid)

    async def start(self) -> None:
        """Start all daemons."""
        for daemon in self.daemons:
            await daemon.start()

    def links(
        self,
        *,
        kind: str = "mount",
        daemon_id: int = -1,
        op_timeout_s: float = float("inf"),
        opens: Callable[[], Sequence[OpenCount]] = tuple,
        on_lost: Callable[[Sequence[int]], None] = lambda lost: None,
        pid: int = 1,
        boot_id: str = ELSEWHERE,
    ) -> tuple[Links, MemoryNode]:
        """Make a client and its node; the caller runs the links. A ``daemon_id`` goes with kind ``daemon``."""
        client_id = ClientId(self.random.getrandbits(63))
        node = self.network.node(peer_of(client_id, daemon_id, pid=pid, boot_id=boot_id))
        links = Links(
            node,
            self.directory,
            self.shard_map,
            client_id,
            kind=kind,
            label="/mnt/test",
            op_timeout_s=op_timeout_s,
            opens=opens,
            on_lost=on_lost,
        )
        return links, node
