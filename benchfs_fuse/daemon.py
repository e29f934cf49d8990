"""Run one storage daemon: ``benchfsd --registry-dir DIR --data-dir DIR``. Here its rooms meet.

It serves until SIGTERM or SIGINT, which end it in order; a second one ends it at once. Either way nothing that was
acknowledged is lost. Exit codes: 0 stopped, 1 refused with a sentence, 2 a wrong setting or argument.
"""

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from . import __version__, config
from .chunks.disk import DiskChunkStore
from .chunks.uring import Ring, probe_inline
from .datadir import DataDir
from .errors import Disconnected, UserError
from .kv.rocks import RocksStore
from .model import ClientId
from .ports import ChunkStore, KeyValueStore, Peer
from .processes import identify, say_ready
from .registry import DaemonEntry, Registry, boot_id
from .rpc.client import Links
from .rpc.messages import Body, Request, Status, StatusReply
from .rpc.network import Network
from .rpc.server import Server
from .rpc.ucx import UcxEngine
from .services.calls import Call
from .services.chunkserver import ChunkServer
from .services.identity import open_store
from .services.metadata import MetadataService
from .services.peers import ClusterPeers
from .services.sessions import SessionTable

log = logging.getLogger(__name__)

#: An address of a network for documentation (RFC 5737): connecting a datagram socket to it sends nothing and tells
#: which of our own addresses would be used towards other hosts.
_SOMEWHERE = ("192.0.2.1", 9)


class DaemonOptions(NamedTuple):
    """Say how to run a daemon. ``daemon_id`` insists on a number; ``ready_fd`` gets a line when the daemon serves."""

    registry_dir: Path
    data_dir: Path
    daemon_id: int | None
    settings: config.Settings
    ready_fd: int | None


class PidWatch:
    """Watch a process of this host by its pidfd (pidfd_open(2)): an event, and no other process is taken for it."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd

    @classmethod
    def open(cls, pid: int) -> "PidWatch | None":
        """Begin to watch; None if there is no such process in this pid namespace, or it cannot be watched."""
        try:
            return cls(os.pidfd_open(pid))
        except OSError:
            return None

    async def wait_gone(self) -> None:
        """Wait until the process has ended."""
        await trio.lowlevel.wait_readable(self._pidfd)

    def close(self) -> None:
        """Stop watching."""
        os.close(self._pidfd)


async def serve(
    registry: Registry,
    data: DataDir,
    store: KeyValueStore,
    chunks: ChunkStore,
    network: Network,
    client_id: ClientId,
    *,
    incarnation: int,
    lease_s: float,
    on_ready: Callable[[DaemonEntry], None],
) -> None:
    """Serve the opened stores on a network until cancelled; ``on_ready`` is called when it begins."""
    daemon_id, shard_map = data.daemon_id, registry.cluster.shard_map
    started_s = time.time()
    sessions = SessionTable(
        store,
        daemon_id=daemon_id,
        daemons=shard_map.daemons,
        incarnation=incarnation,
        lease_s=lease_s,
        map_version=shard_map.version,
        boot_id=boot_id(),
        open_process=PidWatch.open,
    )
    server = Server(store, sessions, client_id)
    links = Links(
        network,
        registry,
        shard_map,
        client_id,
        kind="daemon",
        label=f"daemon {daemon_id}",
        op_timeout_s=float("inf"),
        daemons=set(shard_map.daemons) - {daemon_id},
    )
    peers = ClusterPeers(daemon_id, server, links)
    metadata = MetadataService(
        store,
        daemon_id=daemon_id,
        incarnation=incarnation,
        shard_map=shard_map,
        opens=sessions,
        peers=peers,
        clock=time.time_ns,
    )
    chunk_server = ChunkServer(chunks)

    async def status(request: Request, call: Call) -> Body:
        return StatusReply(
            daemon_id,
            __version__,
            os.getpid(),
            socket.gethostname(),
            str(data.path),
            time.time() - started_s,
            sessions.grace,
            tuple(await chunks.usage()),
            sessions.statuses(),
            metadata.orphans,
            metadata.to_drop,
            metadata.prepared,
            server.requests,
        )

    async def review_after_grace() -> None:
        await sessions.wait_grace_over()
        metadata.grace_ended()

    server.register(metadata.handlers(), metadata.handlers_now())
    server.register({**chunk_server.handlers(), Status: status}, bulk=chunk_server.bulk())
    metadata.recover()
    async with trio.open_nursery() as nursery:
        await nursery.start(metadata.run)
        await nursery.start(server.run)
        nursery.start_soon(links.run)
        await nursery.start(sessions.run, metadata.session_ended, peers)
        nursery.start_soon(review_after_grace)
        process = identify(os.getpid())
        assert process is not None
        try:
            address = await network.listen(server)
        except Disconnected as error:
            raise UserError(f"{error}; choose an address of this host with --listen") from error
        entry = DaemonEntry(
            daemon_id,
            address,
            socket.gethostname(),
            boot_id(),
            process,
            started_s,
            incarnation,
            str(data.path),
            __version__,
        )
        registry.publish(entry)
        try:
            on_ready(entry)
            await trio.sleep_forever()
        finally:
            registry.withdraw(entry)


async def run_daemon(options: DaemonOptions) -> None:
    """Open everything, serve until cancelled, close everything. UserError, alone or in a group."""
    settings = options.settings
    with Registry(options.registry_dir) as registry, DataDir(options.data_dir, registry, options.daemon_id) as data:
        cluster = registry.cluster
        store = RocksStore(data.path / "meta")
        try:
            incarnation = open_store(
                store, cluster.cluster_id, data.daemon_id, cluster.shard_map, cluster.chunk_size, time.time_ns()
            )

            def announce(entry: DaemonEntry) -> None:
                log.info(
                    "daemon %d of cluster %s serves %s at %s",
                    entry.daemon_id,
                    cluster.cluster_id,
                    data.path,
                    entry.address,
                )
                say_ready(options.ready_fd)

            async with open_chunks(data.path, store) as chunks:
                client_id = ClientId(secrets.randbits(63))
                peer = Peer(client_id, data.daemon_id, socket.gethostname(), os.getpid(), boot_id())
                async with UcxEngine(
                    peer,
                    registry.secret,
                    bytes.fromhex(cluster.cluster_id),
                    host=settings.daemon.listen or host_address(),
                    tls=settings.ucx.tls or None,
                    net_devices=settings.ucx.net_devices or None,
                    lease_s=settings.daemon.lease_s,
                    spin_us=settings.daemon.spin_us,
                ) as network:
                    await serve(
                        registry,
                        data,
                        store,
                        chunks,
                        network,
                        client_id,
                        incarnation=incarnation,
                        lease_s=settings.daemon.lease_s,
                        on_ready=announce,
                    )
        finally:
            store.close()


@asynccontextmanager
async def open_chunks(directory: Path, store: KeyValueStore) -> AsyncIterator[ChunkStore]:
    """Open the chunk store of a data directory. UserError."""
    try:
        probe = await probe_inline(directory)
        ring = Ring()
    except OSError as error:
        raise UserError(
            f"cannot use io_uring in {directory}: {error.strerror}; benchfs doctor tells what this machine allows"
        ) from error
    log.info(
        "%s is on %s: buffered writes take %.1f µs through io_uring, %.1f µs by a plain call, so small ones go %s",
        directory,
        probe.filesystem,
        probe.uring_write_us,
        probe.pwrite_us,
        "through io_uring" if probe.buffered_write_inline else "the plain way",
    )
    chunks: DiskChunkStore | None = None
    try:
        async with trio.open_nursery() as nursery:
            chunks = DiskChunkStore(directory, store, ring, nursery, **DiskChunkStore.plain_paths(probe))
            yield chunks
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            if chunks is not None:
                await chunks.aclose()
            await ring.aclose()


def host_address() -> str:
    """Return this host's own address towards other hosts; the loopback's when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_SOMEWHERE)
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


async def _run_until_signalled(options: DaemonOptions) -> None:
    """Run the daemon; the first signal to stop cancels it, the second ends the process."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            running = trio.CancelScope()

            async def obey() -> None:
                async for number in signals:
                    if running.cancel_called:
                        os._exit(128 + number)
                    log.info("stopping: %s", signal.Signals(number).name)
                    running.cancel()

            nursery.start_soon(obey)
            with running:
                await run_daemon(options)
            nursery.cancel_scope.cancel()


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the command ``benchfsd``."""
    parser = argparse.ArgumentParser(prog="benchfsd", description="Run one storage daemon of a benchfs cluster.")
    parser.add_argument("--registry-dir", type=Path, required=True, metavar="DIR", help="the registry of the cluster")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="where this daemon keeps its data")
    parser.add_argument("--daemon-id", type=int, metavar="N", help="insist on being daemon N (default: as it comes)")
    parser.add_argument("--ready-fd", type=int, metavar="FD", help="write a line to this descriptor when serving")
    parser.add_argument("--version", action="version", version=f"benchfsd {__version__}")
    config.add_options(parser, "daemon", "ucx")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        settings = config.load(vars(given), os.environ)
        options = DaemonOptions(given.registry_dir, given.data_dir, given.daemon_id, settings, given.ready_fd)
        trio.run(_run_until_signalled, options)
        code = 0
    except* UserError as group:
        error = _first(group)
        sys.stderr.write(f"benchfsd: {error}\n")
        code = error.exit_code
    return code


def _first(group: BaseExceptionGroup[UserError]) -> UserError:
    """Return the first error of a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, UserError)
    return error


if __name__ == "__main__":
    sys.exit(main())
