"""Do the same operations again and again while their instructions are counted; ``observing`` has valgrind run it.

    python -m benchfs_fuse.bench.observed REGISTRY DATA COUNT off|on

A daemon, a client's session and a mount's handlers in one process, so that nobody's instructions are missing: names in
RocksDB, messages over UCX. Chunks are in memory, since valgrind does not know all that io_uring's binding does. Nobody
polls: how long that takes is up to the clock. ``mark`` ends a count: valgrind sees it by the name of its system call.
"""

import os
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import trio

from .. import config
from ..chunks.memory import MemoryChunkStore, MemoryInspector
from ..client import open_session
from ..daemon import serve
from ..datadir import DataDir
from ..fuse import BenchfsOperations
from ..kv.rocks import RocksStore
from ..limits import KIB
from ..model import ROOT_INO, ClientId
from ..observe import recording
from ..observe.durations import Counters
from ..ports import Peer
from ..registry import DaemonEntry, Registry, boot_id
from ..rpc.ucx import UcxEngine
from ..services.identity import open_store

#: What is counted, in this order.
OPERATIONS = ("getattr", "read 4 KiB", "create, close")
LENGTH = 4 * KIB
#: Operations before those that are counted.
WARM = 50
LEASE_S = 60.0


class _Caller:
    """Be who calls."""

    uid = gid = umask = 0
    pid = os.getpid()


def mark() -> None:
    """End a count; nothing else here makes this system call."""
    os.getppid()


async def _serve(place: Path, data_dir: Path, *, task_status: trio.TaskStatus[DaemonEntry]) -> None:
    with Registry(place) as registry, DataDir(data_dir, registry, None) as data:
        cluster = registry.cluster
        store = RocksStore(data.path / "meta")
        chunks = MemoryChunkStore()
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
            client_id = ClientId(secrets.randbits(63))
            peer = Peer(client_id, data.daemon_id, socket.gethostname(), os.getpid(), boot_id())
            async with UcxEngine(
                peer,
                registry.secret,
                bytes.fromhex(cluster.cluster_id),
                host="127.0.0.1",
                lease_s=LEASE_S,
                spin_us=0,
            ) as network:
                await serve(
                    registry,
                    data,
                    store,
                    chunks,
                    MemoryInspector(chunks),
                    network,
                    client_id,
                    incarnation=incarnation,
                    lease_s=LEASE_S,
                    counters=Counters,
                    on_ready=task_status.started,
                )
        finally:
            store.close()


async def _count(one: Callable[[int], Awaitable[Any]], count: int) -> None:
    for number in range(WARM):
        await one(number)
    mark()
    for number in range(WARM, WARM + count):
        await one(number)
    mark()


async def work(place: Path, data_dir: Path, count: int, record: bool) -> None:
    """Do ``count`` of each of ``OPERATIONS``, with a mark before and behind them, recording or not."""
    caller = cast(Any, _Caller())
    settings = config.Settings(mount=config.MountSettings(spin_us=0))
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve, place, data_dir)
        async with open_session(place, settings, kind="tool", label="observed") as session:
            ops = BenchfsOperations(session.namespace, session.files, nursery, cache_timeout_s=0.0, xattr=False)
            info, entry = await ops.create(ROOT_INO, b"file", 0o600, os.O_RDWR, caller)
            await ops.write(info.fh, 0, bytes(LENGTH))
            await ops.fsync(info.fh, False)

            async def create(number: int) -> None:
                made, _ = await ops.create(ROOT_INO, b"%d" % number, 0o600, os.O_RDWR, caller)
                await ops.flush(made.fh)
                await ops.release(made.fh)

            steps: dict[str, Callable[[int], Awaitable[Any]]] = {
                "getattr": lambda number: ops.getattr(entry.st_ino, caller),
                "read 4 KiB": lambda number: ops.read(info.fh, 0, LENGTH),
                "create, close": create,
            }
            if record:
                recording.start(1 << 20)
            for name in OPERATIONS:
                await _count(steps[name], count)
            recording.stop()
            await ops.release(info.fh)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(work, Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "on")
