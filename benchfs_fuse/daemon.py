"""Run one storage daemon: ``benchfsd --registry-dir DIR --data-dir DIR``. Here its rooms meet.

It serves until SIGTERM or SIGINT, which end it in order; a second one ends it at once. Either way nothing that was
acknowledged is lost. Exit codes: 0 stopped, 1 refused with a sentence, 2 a wrong setting or argument.
"""

import argparse
import itertools
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from . import __version__, config
from .chunks.disk import DiskChunkStore
from .chunks.inspector import DiskInspector
from .chunks.uring import Ring, probe_inline
from .datadir import DataDir
from .errors import Disconnected, UserError
from .kv.rocks import RocksStore
from .limits import BODY_MAX
from .model import ClientId
from .observe.durations import Counters
from .observe.seldom import said_seldom
from .ports import ChunkInspector, ChunkStore, KeyValueStore, Peer
from .processes import identify, say_ready
from .registry import DaemonEntry, Registry, boot_id
from .rpc.client import Links
from .rpc.messages import (
    Body,
    Request,
    SessionStatus,
    Statistics,
    StatisticsReply,
    Status,
    StatusReply,
    encode,
)
from .rpc.network import Network
from .rpc.pidwatch import PidWatch
from .rpc.server import Server
from .rpc.ucx import UcxEngine
from .scheduling import wish_short_slices
from .services.calls import Call
from .services.chunkserver import ChunkServer
from .services.identity import open_store, power_losses
from .services.jobs import Jobs
from .services.metadata import MetadataService
from .services.peers import ClusterPeers
from .services.sessions import SessionTable
from .services.tracing import TraceService

log = logging.getLogger(__name__)

#: An address of a network for documentation (RFC 5737): connecting a datagram socket to it sends nothing and tells
#: which of our own addresses would be used towards other hosts.
_SOMEWHERE = ("192.0.2.1", 9)
#: Seconds for the registry to take our entry away. If it hangs, the entry stays, and is known for a dead one's.
WITHDRAW_S = 2.0


class DaemonOptions(NamedTuple):
    """Say how to run a daemon. ``daemon_id`` insists on a number; ``ready_fd`` gets a line when the daemon serves."""

    registry_dir: Path
    data_dir: Path
    daemon_id: int | None
    settings: config.Settings
    ready_fd: int | None


async def serve(
    registry: Registry,
    data: DataDir,
    store: KeyValueStore,
    chunks: ChunkStore,
    inspector: ChunkInspector,
    network: Network,
    client_id: ClientId,
    *,
    incarnation: int,
    lease_s: float,
    counters: Callable[[], Counters],
    on_ready: Callable[[DaemonEntry], None],
) -> None:
    """Serve the opened stores on a network until cancelled; ``on_ready`` is called when it begins."""
    daemon_id, shard_map = data.daemon_id, registry.cluster.shard_map
    started_s = time.monotonic()
    sessions = SessionTable(
        store,
        daemon_id=daemon_id,
        daemons=shard_map.daemons,
        incarnation=incarnation,
        lease_s=lease_s,
        map_version=shard_map.version,
        boot_id=boot_id(),
        open_process=PidWatch.open,
        losses=power_losses(store),
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
    chunk_server = ChunkServer(chunks, daemon_id, peers)
    recounting = metadata.recounting(inspector)

    async def status(request: Request, call: Call) -> Body:
        everybody = sessions.statuses()
        listed = everybody[: _fitting(everybody)]
        return StatusReply(
            daemon_id,
            __version__,
            os.getpid(),
            socket.gethostname(),
            str(data.path),
            time.monotonic() - started_s,
            sessions.grace,
            tuple(await chunks.usage()),
            listed,
            metadata.orphans,
            metadata.to_drop,
            inspector.to_remove,
            metadata.prepared,
            server.requests,
            chunk_server.bytes_read,
            chunk_server.bytes_written,
            len(sessions.locks),
            len(everybody) - len(listed),
            recounting.pending,
        )

    async def statistics(request: Request, call: Call) -> Body:
        return StatisticsReply(
            time.monotonic() - started_s,
            server.statistics.durations(),
            chunk_server.bytes_read,
            chunk_server.bytes_written,
            counters(),
        )

    tracing = TraceService()

    async def review_after_grace() -> None:
        await sessions.wait_grace_over()
        metadata.grace_ended()

    server.register(metadata.handlers(), metadata.handlers_now(), wait_done=metadata.wait_done)
    server.register(chunk_server.handlers(), bulk=chunk_server.bulk(), bulk_now=chunk_server.bulk_now())
    server.register({**tracing.handlers(), Status: status, Statistics: statistics})
    server.register(metadata.inspection(chunks, inspector).handlers())
    server.register(recounting.handlers())
    metadata.recover()
    recounting.recover()
    await store.sync()
    async with trio.open_nursery() as nursery:
        await nursery.start(metadata.run)
        await nursery.start(server.run)
        nursery.start_soon(links.run)
        nursery.start_soon(tracing.run)
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
            with trio.move_on_after(WITHDRAW_S, shield=True):
                await trio.to_thread.run_sync(registry.withdraw, entry, abandon_on_cancel=True)


def _fitting(sessions: Sequence[SessionStatus]) -> int:
    """Return how many sessions a StatusReply has room for: the rest of its body holds paths and counters."""
    sizes = itertools.accumulate(len(encode(session)) for session in sessions)
    return sum(size <= BODY_MAX // 2 for size in sizes)


async def run_daemon(options: DaemonOptions) -> None:
    """Open everything, serve until cancelled, close everything. UserError, alone or in a group."""
    settings = options.settings
    with Registry(options.registry_dir) as registry, DataDir(options.data_dir, registry, options.daemon_id) as data:
        cluster = registry.cluster
        store = RocksStore(data.path / "meta")
        try:
            incarnation = open_store(
                store,
                cluster.cluster_id,
                data.daemon_id,
                cluster.shard_map,
                cluster.chunk_size,
                time.time_ns(),
                boot_id(),
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

            async with open_chunks(data.path, store, data.daemon_id) as (chunks, ring):
                client_id = ClientId(secrets.randbits(63))
                peer = Peer(client_id, data.daemon_id, socket.gethostname(), os.getpid(), boot_id())
                async with UcxEngine(
                    peer,
                    registry.secret,
                    bytes.fromhex(cluster.cluster_id),
                    host=settings.daemon.listen or host_address(),
                    tls=settings.ucx.tls or None,
                    net_devices=settings.ucx.net_devices or None,
                    public=settings.ucx.public,
                    lease_s=settings.daemon.lease_s,
                    spin_us=settings.daemon.spin_us,
                ) as network:
                    await serve(
                        registry,
                        data,
                        store,
                        chunks,
                        DiskInspector(chunks),
                        network,
                        client_id,
                        incarnation=incarnation,
                        lease_s=settings.daemon.lease_s,
                        counters=lambda: _count(network, chunks, ring),
                        on_ready=announce,
                    )
        finally:
            store.close()


@asynccontextmanager
async def open_chunks(
    directory: Path, store: KeyValueStore, daemon_id: int
) -> AsyncIterator[tuple[DiskChunkStore, Ring]]:
    """Open the chunk store of a daemon's data directory, and the ring that it works with. UserError."""
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
            paths = DiskChunkStore.plain_paths(probe)
            chunks = DiskChunkStore(
                directory, store, ring, nursery, name=f"daemon {daemon_id}", lost_power=power_losses(store) > 0, **paths
            )
            yield chunks, ring
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            if chunks is not None:
                await chunks.aclose()
            await ring.aclose()


def _count(network: UcxEngine, chunks: DiskChunkStore, ring: Ring) -> Counters:
    messages, disk, operations = network.statistics(), chunks.statistics(), ring.statistics()
    return Counters(
        requests_in_flight=network.serving,
        disk_in_flight=operations.in_flight,
        disk_at_once=operations.at_once,
        disk_waited=operations.waited,
        disk_plain=disk.plain_reads + disk.plain_writes,
        files_opened=disk.files_opened,
        files_open=disk.files_open,
        sleeps=messages.sleeps,
    )


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
        wish_short_slices()
        options = DaemonOptions(given.registry_dir, given.data_dir, given.daemon_id, settings, given.ready_fd)
        with _own_rules():
            trio.run(_run_until_signalled, options)
        code = 0
    except* UserError as group:
        error = _first(group)
        sys.stderr.write(f"benchfsd: {error}\n")
        code = error.exit_code
    return code


@contextmanager
def _own_rules() -> Iterator[None]:
    """Set what holds for a whole process while a daemon runs in it."""
    # Whatever it makes is its user's alone, wherever the data directory lies and whoever made that.
    umask = os.umask(0o077)
    # Connections take descriptors; the usual soft limit is for programs that use select(2).
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        # What peers cause, they may cause again and again; so is what fails behind a reply tried again and again.
        with said_seldom(Server.__module__, Jobs.__module__):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.umask(umask)


def _first(group: BaseExceptionGroup[UserError]) -> UserError:
    """Return the first error of a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, UserError)
    return error


if __name__ == "__main__":
    sys.exit(main())
