"""Check rpc/ucx between real processes: killed and stopped peers, strangers, nothing left behind, nothing used idle."""

import ctypes
import gc
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
import ucx_peer
from ucx_peer import CLUSTER, CPU, FLOOD, READ, SECRET, SEGMENT, SUM

from benchfs_fuse.errors import AuthenticationFailed, Disconnected, UserError
from benchfs_fuse.limits import (
    CONNECTIONS_MAX,
    HANDSHAKE_TIMEOUT_S,
    INLINE_MAX,
    PAYLOAD_MAX,
    PENDING_MAX,
    REPLY_BYTES_MAX,
)
from benchfs_fuse.model import ClientId
from benchfs_fuse.ports import Channel, Ending, Peer, Reply
from benchfs_fuse.rpc import meeting, segments, ucx
from benchfs_fuse.rpc.ucx import UcxEngine

ME = Peer(ClientId(1), -1, "tests", os.getpid(), "boot")

#: How often to kill: enough to meet a transfer in many states, and to see a leak.
ROUNDS = 3
ROUNDS_ALL = 50
#: Bytes by which a process may grow: per killed peer the shells of dead workers; once, what Python keeps for the
#: next time. A forgotten connection would be 18 MB, a forgotten worker 2 MB.
GROWTH_MAX = 100_000
SLACK_MAX = 8 << 20


@pytest.fixture(
    params=[("", True), ("tcp", True), ("", False), ("tcp", False)], ids=["shm", "tcp", "shm, plain", "tcp, plain"]
)
def tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Choose a transport, and the wire of this process; that of its peers is the compiled one."""
    tls, compiled = request.param
    if not compiled:
        monkeypatch.setattr(ucx, "load_compiled", lambda: None)
    return str(tls)


@asynccontextmanager
async def peer_process(tls: str) -> AsyncIterator[tuple[trio.Process, str]]:
    """Run the peer; it is killed afterwards."""
    command = [sys.executable, ucx_peer.__file__, tls]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
        )
        try:
            assert process.stdout is not None
            address = b""
            while not address.endswith(b"\n"):
                piece = await process.stdout.receive_some()
                assert piece, "the peer did not start"
                address += piece
            yield process, address.decode().strip()
        finally:
            process.kill()


@asynccontextmanager
async def engine(tls: str) -> AsyncIterator[UcxEngine]:
    with trio.fail_after(600):  # fifty peers that come and go on a busy machine
        async with UcxEngine(ME, SECRET, CLUSTER, tls=tls or None) as engine:
            yield engine


def resources(peers: Collection[int]) -> tuple[int, int, int]:
    """Count what a leak would show in: descriptors, bytes of memory, System V segments of ours and of ``peers``."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for the next time is no leak
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGESIZE"), len(segments_of({os.getpid(), *peers}))


def segments_of(pids: Collection[int]) -> set[int]:
    """Return the ids of the System V segments that some processes have made."""
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return {int(shmid) for _, shmid, _, _, creator, *_ in rows if int(creator) in pids}


async def all_removed(pids: Collection[int]) -> None:
    """Wait until nothing is left of the segments of processes that have ended: their peers remove them."""
    with trio.fail_after(30):
        while segments_of(pids):
            await trio.lowlevel.checkpoint()


async def transfer(channel: Channel, op: int, done: list[int]) -> None:
    """Send or fetch large payloads, every byte checked, until the connection ends."""
    payload = ucx_peer.buffer(PAYLOAD_MAX)
    payload[:] = random.randbytes(PAYLOAD_MAX)
    with suppress(Disconnected):
        while True:
            if op == SUM:
                assert int((await channel.call(SUM, b"", payload)).body) == zlib.crc32(payload)
            else:
                into = ucx_peer.buffer(PAYLOAD_MAX)
                reply = await channel.call(READ, b"", into=into)
                assert (reply.received, int(reply.body)) == (PAYLOAD_MAX, zlib.crc32(into))
            done[0] += 1


async def kill_in_the_middle(engine: UcxEngine, tls: str, number: int) -> int:
    """Move large payloads both ways, asked for by both ends; kill the peer; see that all hear of it. Return its pid."""
    async with peer_process(tls) as (process, address), trio.open_nursery() as nursery:
        channel = await engine.connect(address, ucx_peer.Service(nursery))
        assert channel.transport == (tls or "shm")
        await channel.call(FLOOD, b"")
        done = [0]
        async with trio.open_nursery() as transfers:
            for _ in range(3):
                transfers.start_soon(transfer, channel, SUM, done)
                transfers.start_soon(transfer, channel, READ, done)
            while done[0] < 4 + number % 7:
                await trio.lowlevel.checkpoint()
            process.kill()
        assert await channel.wait_closed() == Ending.PEER
        await channel.aclose()
    return process.pid


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(ROUNDS_ALL, marks=pytest.mark.slow)])
async def test_killed_peers_leave_nothing_behind(tls: str, rounds: int) -> None:
    async with engine(tls) as here:
        killed = [await kill_in_the_middle(here, tls, number) for number in range(3)]
        descriptors, memory, _ = resources(killed)
        killed += [await kill_in_the_middle(here, tls, number) for number in range(rounds)]
        await all_removed(killed)
        descriptors_now, memory_now, segments_now = resources(killed)
        assert descriptors_now == descriptors
        assert segments_now == 0
        assert memory_now - memory < SLACK_MAX + rounds * GROWTH_MAX
        assert here.statistics().connections == 0


async def test_segment_that_a_killed_peer_has_just_made_is_removed() -> None:
    async with engine("") as here, peer_process("") as (process, address):
        channel = await here.connect(address)
        made = int((await channel.call(SEGMENT, b"")).body)
        await channel.aclose()
        other = await here.connect(address)
        assert made in segments_of([process.pid])  # who closed has nobody's death to see to, as yet
        process.kill()
        await process.wait()
        assert await other.wait_closed() == Ending.PEER
        await all_removed([process.pid])


async def test_nothing_is_removed_for_a_peer_that_may_be_elsewhere() -> None:
    """Where the transports are set, nobody has compared hosts, and a pid may be another program's here."""
    async with engine("sysv,tcp") as here, peer_process("sysv,tcp") as (process, address):
        channel = await here.connect(address)
        made = int((await channel.call(SEGMENT, b"")).body)
        process.kill()
        await process.wait()
        await channel.wait_closed()
        await channel.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert made in segments_of([process.pid])
        await trio.run_process(["ipcrm", "--shmem-id", str(made)])


async def test_only_what_the_dead_peer_made_is_removed() -> None:
    made = int(ctypes.CDLL(None).shmget(0, 4096, 0o660))
    dead = await trio.lowlevel.open_process(["true"])
    await dead.wait()
    try:
        assert made in segments.unmarked(os.getpid(), time.time())
        assert made not in segments.unmarked(os.getpid(), time.time() + 5), "from before the two met"
        await segments.remove_after(dead.pid, [made])
        assert made in segments_of([os.getpid()])
    finally:
        await trio.run_process(["ipcrm", "--shmem-id", str(made)])
    assert made not in segments.unmarked(os.getpid(), 0)


async def test_connections_that_close_leave_nothing_behind(tls: str) -> None:
    async with peer_process(tls) as (_, address), engine(tls) as here:
        kept = await here.connect(address)

        async def once() -> None:
            channel = await here.connect(address)
            payload = os.urandom(INLINE_MAX + 1)
            assert int((await channel.call(SUM, b"", payload)).body) == zlib.crc32(payload)
            await channel.aclose()

        for _ in range(5):
            await once()
        descriptors, memory, segments = resources([])
        for _ in range(50):
            await once()
        descriptors_now, memory_now, segments_now = resources([])
        assert descriptors_now == descriptors
        assert segments_now <= segments
        assert memory_now - memory < SLACK_MAX + 50 * GROWTH_MAX
        assert (await kept.call(CPU, b"")).status == 0


async def test_idle_processes_sleep(tls: str) -> None:
    async with peer_process(tls) as (_, address), engine(tls) as here:
        channel = await here.connect(address)
        await channel.call(SUM, b"", bytes(PAYLOAD_MAX))
        theirs = int((await channel.call(CPU, b"")).body)
        ours = time.process_time_ns()
        sleeps = here.statistics().sleeps
        await trio.sleep(1)
        # 5 ms in a second is 0.5 %; polling would use all of it.
        assert time.process_time_ns() - ours < 5_000_000
        assert int((await channel.call(CPU, b"")).body) - theirs < 5_000_000
        assert here.statistics().sleeps - sleeps < 10


async def test_a_stopped_peer_is_not_dead(tls: str) -> None:
    async with peer_process(tls) as (process, address), engine(tls) as here:
        channel = await here.connect(address)
        await channel.call(CPU, b"")
        os.kill(process.pid, signal.SIGSTOP)
        payload = os.urandom(PAYLOAD_MAX)
        bodies = []

        async def ask() -> None:
            bodies.append((await channel.call(SUM, b"", payload)).body)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
            ours = time.process_time_ns()
            await trio.sleep(0.5)
            # Shared memory has no event for room in the peer's queue: it is polled, at leisure.
            assert time.process_time_ns() - ours < 200_000_000
            assert not bodies
            os.kill(process.pid, signal.SIGCONT)
        assert bodies == [b"%d" % zlib.crc32(payload)] * 10


async def test_a_cancelled_caller_and_a_killed_peer(tls: str) -> None:
    async with peer_process(tls) as (process, address), engine(tls) as here:
        channel = await here.connect(address)
        await channel.call(CPU, b"")
        os.kill(process.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(channel.call, SUM, b"", bytes(PAYLOAD_MAX))
                nursery.start_soon(channel.call, READ, b"", None, memoryview(bytearray(PAYLOAD_MAX)))
            while here.statistics().in_flight < 4 + 5:  # four requests with large payloads go out at a time
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert here.statistics().in_flight > 0
        process.kill()
        assert await channel.wait_closed() == Ending.PEER
        await channel.aclose()
        assert here.statistics().in_flight == 0


async def test_shared_memory_needs_everything_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    async with peer_process("") as (_, address):
        async with engine("") as here:
            assert (await here.connect(address)).transport == "shm"
        elsewhere = meeting.shares_of_this_process().replace("net:[", "net:[1")
        monkeypatch.setattr(meeting, "shares_of_this_process", lambda: elsewhere)
        async with engine("") as here:
            channel = await here.connect(address)
            assert channel.transport == "tcp"
            assert (await channel.call(CPU, b"")).status == 0


async def test_what_the_user_says_of_transports_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    async with peer_process("") as (_, address), engine("") as here:
        assert (await here.connect(address)).transport == "tcp"


@pytest.mark.parametrize("size", ["64k", "65536", "64KB", "128K", "1m", "1t", "inf"])
def test_segments_with_which_transfers_hang_are_refused(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("UCX_SYSV_SEG_SIZE", size)
    with pytest.raises(UserError, match=f"UCX_SYSV_SEG_SIZE={size} in the environment"):
        ucx.Ucx()


@pytest.mark.parametrize("size", ["", "8k", "65535", "60KB", "auto"])
def test_other_segments_are_ucxs_matter(size: str) -> None:
    ucx.check_segments(size)


@pytest.mark.parametrize(
    ("tls", "net_devices", "words"),
    [
        ("nonsense", None, "UCX cannot be used with ucx.tls 'nonsense': .*; benchfs doctor lists what there is"),
        ("tcp", "none0", "UCX cannot be used with ucx.tls 'tcp' and ucx.net_devices 'none0': "),
        (None, "none0", "UCX finds no such network device with ucx.net_devices 'none0'; "),
        ("sm", "none0", "UCX finds no such network device with ucx.tls 'sm' and ucx.net_devices 'none0'; "),
        ("self,cma", None, "UCX reaches no other process with ucx.tls 'self,cma'; "),
        ("^tcp,sm", None, r"UCX reaches no other process with ucx.tls '\^tcp,sm'; "),
    ],
)
async def test_settings_that_leave_nothing_to_ucx_are_refused_at_the_start(
    tls: str | None, net_devices: str | None, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        async with UcxEngine(ME, SECRET, CLUSTER, tls=tls, net_devices=net_devices):
            raise AssertionError("it began")


async def test_the_environment_of_ucx_is_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "none0")
    with pytest.raises(UserError, match=r"no such network device with ucx\.net_devices 'none0'"):
        async with UcxEngine(ME, SECRET, CLUSTER):
            raise AssertionError("it began")


async def test_strangers_get_nowhere_and_hinder_nobody() -> None:
    async with peer_process("tcp") as (_, address), engine("tcp") as here:
        host, port = meeting.split_address(address)
        wrong_secret = UcxEngine(ME, bytes(32), CLUSTER, tls="tcp")
        async with wrong_secret:
            with pytest.raises(AuthenticationFailed, match="secret"):
                await wrong_secret.connect(address)
        other_cluster = UcxEngine(ME, SECRET, b"another cluster!", tls="tcp")
        async with other_cluster:
            with pytest.raises(AuthenticationFailed, match="different clusters"):
                await other_cluster.connect(address)
        for garbage in (b"GET / HTTP/1.0\r\n\r\n", bytes(100), os.urandom(10_000)):
            stream = await trio.open_tcp_stream(host, port)
            await stream.send_all(garbage)
            answer = b""
            try:
                while piece := await stream.receive_some():
                    answer += piece
            except trio.BrokenResourceError:
                pass
            assert len(answer) < 200
            await stream.aclose()
        # Silent strangers fill all places; the honest one gets through at once, the silent ones have to go.
        silent = [await trio.open_tcp_stream(host, port) for _ in range(PENDING_MAX + 30)]
        with trio.fail_after(HANDSHAKE_TIMEOUT_S / 2):
            channel = await here.connect(address)
            assert (await channel.call(CPU, b"")).status == 0
            assert await silent[0].receive_some() == b""
        for stream in silent:
            await stream.aclose()
        assert (await channel.call(CPU, b"")).status == 0


async def test_a_listener_that_says_nothing_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, UcxEngine(ME, SECRET, CLUSTER, tls="tcp") as here:
        port = listener.socket.getsockname()[1]
        with pytest.raises(Disconnected, match="did not answer within 5 s"):
            await here.connect(f"127.0.0.1:{port}")


async def test_the_kernel_asks_silent_peers_within_the_lease() -> None:
    async with peer_process("tcp") as (_, address), UcxEngine(ME, SECRET, CLUSTER, tls="tcp", lease_s=8) as here:
        channel = await here.connect(address)
        stream = channel._need_stream()  # type: ignore[attr-defined]
        assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, interval, count, timeout_ms = (
            stream.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        )
        assert idle + interval * count <= 8
        assert timeout_ms == 8000


async def test_one_connection_too_many_is_refused_until_another_ends(tls: str) -> None:
    async def serve(channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        return Reply(0, b"")

    async with engine(tls) as there, engine(tls) as here:
        there.connections_max = 2
        address = await there.listen(serve)
        channels = [await here.connect(address) for _ in range(2)]
        with pytest.raises(AuthenticationFailed, match="refused: there are 2 connections, as many as"):
            await here.connect(address)
        assert [(await channel.call(1, b"")).status for channel in channels] == [0, 0]
        await channels[0].aclose()
        with trio.fail_after(30):
            while there.full:  # noqa: ASYNC110  the other end has to hear of it
                await trio.sleep(0.01)
        await (await here.connect(address)).aclose()


async def test_there_are_no_more_connections_than_descriptors_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert UcxEngine(ME, SECRET, CLUSTER).connections_max <= CONNECTIONS_MAX
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert UcxEngine(ME, SECRET, CLUSTER).connections_max == 64


async def test_large_replies_wait_until_the_others_are_taken(tls: str) -> None:
    """More than REPLY_BYTES_MAX are asked for at once: all come, and never more of them are made than that."""
    lent = most = 0

    def give_back(want: int) -> None:
        nonlocal lent
        lent -= want

    async def serve(channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        nonlocal lent, most
        lent += want
        most = max(most, lent)
        await trio.lowlevel.checkpoint()
        return Reply(0, b"", ucx_peer.buffer(want), release=partial(give_back, want))

    async with engine(tls) as there, engine(tls) as here:
        channel = await here.connect(await there.listen(serve))
        async with trio.open_nursery() as nursery:
            for _ in range(REPLY_BYTES_MAX // PAYLOAD_MAX * 2):
                nursery.start_soon(partial(channel.call, 1, b"", into=ucx_peer.buffer(PAYLOAD_MAX)))
        assert most == REPLY_BYTES_MAX
        await channel.aclose()
        assert lent == 0
