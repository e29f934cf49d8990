"""A daemon's rooms, wired as the program wires them, over twins of stores and network and a real registry."""

import errno
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from hung import Hung

from benchfs_fuse import daemon
from benchfs_fuse.chunks.memory import MemoryChunkStore, MemoryInspector
from benchfs_fuse.daemon import host_address, serve
from benchfs_fuse.datadir import DataDir
from benchfs_fuse.kv.memory import MemoryStore
from benchfs_fuse.limits import BODY_MAX
from benchfs_fuse.model import ROOT_INO, ClientId
from benchfs_fuse.observe.durations import Counters
from benchfs_fuse.ports import Ending, Peer
from benchfs_fuse.registry import DaemonEntry, Registry, init_registry
from benchfs_fuse.rpc import client, server
from benchfs_fuse.rpc.client import Links, open_links
from benchfs_fuse.rpc.memory import MemoryNetwork, MemoryNode
from benchfs_fuse.rpc.messages import (
    EntryReply,
    Hello,
    Make,
    ReadChunk,
    ReadChunkReply,
    Statistics,
    StatisticsReply,
    Status,
    StatusReply,
    WriteChunk,
    WriteChunkReply,
    decode,
    encode,
)
from benchfs_fuse.rpc.pidwatch import PidWatch
from benchfs_fuse.services import jobs
from benchfs_fuse.services.identity import open_store


class Daemon:
    """Hold what outlives a start of a daemon."""

    def __init__(self, folder: Path, network: MemoryNetwork) -> None:
        self.folder = folder
        self.network = network
        self.contents: dict[bytes, bytes] = {}
        self.chunks = MemoryChunkStore()
        self.starts = 0
        self.node: MemoryNode
        self.stopped = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        """Serve until the scope that ``start`` returned is cancelled."""
        self.starts += 1
        self.stopped = trio.Event()
        with Registry(self.folder.parent / "registry") as registry, DataDir(self.folder, registry) as data:
            cluster = registry.cluster
            store = MemoryStore(self.contents)
            incarnation = open_store(
                store, cluster.cluster_id, data.daemon_id, cluster.shard_map, cluster.chunk_size, 1
            )
            client_id = ClientId(1000 * self.starts + data.daemon_id)
            node = self.node = self.network.node(Peer(client_id, data.daemon_id, "host", 1, "elsewhere"))

            def on_ready(entry: DaemonEntry) -> None:
                assert entry.incarnation == incarnation == self.starts
                task_status.started(scope)

            with trio.CancelScope() as scope:
                await serve(
                    registry,
                    data,
                    store,
                    self.chunks,
                    MemoryInspector(self.chunks),
                    node,
                    client_id,
                    incarnation=incarnation,
                    lease_s=60.0,
                    counters=Counters,
                    on_ready=on_ready,
                )
            node.kill()
            self.contents = store.contents()
        self.stopped.set()


@asynccontextmanager
async def open_client(registry: Registry, network: MemoryNetwork) -> AsyncIterator[Links]:
    node = network.node(Peer(ClientId(7), -1, "host", 1, "elsewhere"))
    shard_map = registry.cluster.shard_map
    async with open_links(
        node, registry, shard_map, ClientId(7), kind="mount", label="/mnt/x", op_timeout_s=20
    ) as links:
        yield links


async def test_two_daemons_serve_names_and_chunks_through_restarts(tmp_path: Path) -> None:
    init_registry(tmp_path / "registry", 2, 1 << 20)
    async with MemoryNetwork(seed=1) as network, trio.open_nursery() as nursery:
        daemons = [Daemon(tmp_path / name, network) for name in ("one", "two")]
        with trio.fail_after(30), Registry(tmp_path / "registry") as registry:
            scopes = [await nursery.start(daemon.run) for daemon in daemons]
            await registry.wait_complete(10, lambda sentence: None)
            async with open_client(registry, network) as links:
                made = []
                for number in range(4):  # directories are spread, so this reaches both daemons
                    request = Make(ROOT_INO, b"d%d" % number, 0o040755, 0, 0)
                    made.append((await links.to(0).call(request, EntryReply)).entry.ino)
                assert {registry.cluster.shard_map.of_ino(ino) for ino in made} == {0, 1}
                for daemon_id in (0, 1):
                    data = b"data of %d" % daemon_id
                    await links.to(daemon_id).call(WriteChunk(9, daemon_id, 0), WriteChunkReply, data)
                    scopes[daemon_id].cancel()
                    await daemons[daemon_id].stopped.wait()
                    assert registry.find(daemon_id) is None
                    scopes[daemon_id] = await nursery.start(daemons[daemon_id].run)
                    room = bytearray(100)
                    into = memoryview(room)
                    reply = await links.to(daemon_id).call(ReadChunk(9, daemon_id, 0, 100), ReadChunkReply, into=into)
                    assert room[: reply.length] == data
                    status = await links.to(daemon_id).call(Status(), StatusReply)
                    assert (status.daemon_id, status.pid, status.host) == (daemon_id, os.getpid(), socket.gethostname())
                    assert status.requests["ReadChunk"] == 1 and not status.grace and len(status.usage) == 1
                    mounts = [session for session in status.sessions if session.kind == "mount"]
                    assert [(session.label, session.connected) for session in mounts] == [("/mnt/x", True)]
        nursery.cancel_scope.cancel()
    assert os.listdir(tmp_path / "registry" / "daemons") == []


async def test_a_status_has_room_whatever_the_sessions_are(tmp_path: Path) -> None:
    init_registry(tmp_path / "registry", 1, 1 << 20)
    async with MemoryNetwork(seed=1) as network, trio.open_nursery() as nursery:
        with trio.fail_after(30), Registry(tmp_path / "registry") as registry:
            await nursery.start(Daemon(tmp_path / "one", network).run)
            entry = registry.find(0)
            assert entry is not None
            for number in range(40):
                node = network.node(Peer(ClientId(100 + number), -1, "host", 1, "elsewhere"))
                channel = await node.connect(entry.address)
                await channel.call(Hello.op, encode(Hello("mount", "x" * 4000, False)))
            reply = await channel.call(Status.op, encode(Status()))
            status = decode(StatusReply, reply.body)
            assert len(reply.body) <= BODY_MAX
            assert 10 < len(status.sessions) < 40 and len(status.sessions) + status.more_sessions == 40
        nursery.cancel_scope.cancel()


async def test_a_daemon_is_as_old_as_it_is_when_its_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_registry(tmp_path / "registry", 1, 1 << 20)
    real = time.time
    async with MemoryNetwork(seed=1) as network, trio.open_nursery() as nursery:
        with trio.fail_after(30), Registry(tmp_path / "registry") as registry:
            await nursery.start(Daemon(tmp_path / "one", network).run)
            monkeypatch.setattr(time, "time", lambda: real() - 3600)
            async with open_client(registry, network) as links:
                status = await links.to(0).call(Status(), StatusReply)
                statistics = await links.to(0).call(Statistics(), StatisticsReply)
            assert 0 <= status.uptime_s <= statistics.uptime_s < 60
        nursery.cancel_scope.cancel()


async def test_while_the_registry_hangs_daemons_are_met_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LOOK_S", 0.01)
    monkeypatch.setattr(daemon, "WITHDRAW_S", 0.01)
    init_registry(tmp_path / "registry", 1, 1 << 20)
    async with MemoryNetwork(seed=1) as network, trio.open_nursery() as nursery:
        one = Daemon(tmp_path / "one", network)
        with trio.fail_after(30), Registry(tmp_path / "registry") as registry:
            scope = await nursery.start(one.run)
            entry = tmp_path / "registry" / "daemons" / "0.json"
            async with open_client(registry, network) as links:
                await links.to(0).call(Make(ROOT_INO, b"before", 0o040755, 0, 0), EntryReply)
                with Hung(entry) as hung:
                    for channel in list(one.node.channels):
                        channel.cut_both(Ending.PEER)
                    await links.to(0).call(Make(ROOT_INO, b"meanwhile", 0o040755, 0, 0), EntryReply)
                    scope.cancel()  # a daemon stops even so
                    await one.stopped.wait()
                    hung.recover()
                await nursery.start(one.run)  # found where it is now
                await links.to(0).call(Make(ROOT_INO, b"after", 0o040755, 0, 0), EntryReply)
        nursery.cancel_scope.cancel()


async def test_the_end_of_a_process_is_an_event() -> None:
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, ["sleep", "60"], check=False))
        watch = PidWatch.open(process.pid)
        assert watch is not None
        with trio.move_on_after(0) as scope:
            await watch.wait_gone()
        assert scope.cancelled_caught
        process.terminate()
        with trio.fail_after(10):
            await watch.wait_gone()
        watch.close()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("pid", [1 << 22, 0])
async def test_what_is_no_process_cannot_be_watched(pid: int) -> None:
    assert PidWatch.open(pid) is None


async def test_a_process_that_cannot_be_watched_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    watch = PidWatch.open(os.getpid())
    assert watch is not None
    with trio.move_on_after(0) as scope:
        await watch.wait_gone()
    assert scope.cancelled_caught
    watch.close()


def test_what_a_daemon_tries_again_and_again_is_said_seldom(caplog: pytest.LogCaptureFixture) -> None:
    with daemon._own_rules():
        for module in (server, jobs) * 3:
            logging.getLogger(module.__name__).warning("%s failed", module.__name__)
    assert caplog.messages == [f"{module.__name__} failed" for module in (server, jobs)]


def test_this_hosts_address_is_one_of_its_own() -> None:
    with socket.create_server((host_address(), 0)):
        pass
