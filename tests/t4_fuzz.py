"""Fuzz a live daemon: strangers at its meeting socket, and peers that hold the secret and send what nobody should.

Whatever they do, the daemon lives, its memory is where it was, it says little about it, an honest client beside them is
served the whole time, and nothing of that client's is touched: neither its files nor its handles and locks.

BENCHFS_TEST_SEED gives other choices.
"""

import contextlib
import os
import random
import re
import secrets
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import msgspec
import pytest
import trio
import trio.lowlevel
from cluster import Process
from wire_fuzz import Fuzzer, Message, examples

from benchfs_fuse.client import File, FileSystem, open_cluster
from benchfs_fuse.errors import AuthenticationFailed
from benchfs_fuse.limits import (
    BULK_SLOTS,
    FILES_OPEN_MAX,
    IN_FLIGHT_MAX,
    MIB,
    PAYLOAD_MAX,
    PENDING_MAX,
    REPLY_BYTES_MAX,
)
from benchfs_fuse.model import ClientId
from benchfs_fuse.ports import Peer
from benchfs_fuse.registry import Registry, boot_id, init_registry
from benchfs_fuse.rpc import frames, handshake
from benchfs_fuse.rpc import messages as m
from benchfs_fuse.rpc.handshake import Handshake, Role
from benchfs_fuse.rpc.meeting import TOLD_MAX
from benchfs_fuse.rpc.ucx import UcxChannel, UcxEngine

SEED = int(os.environ.get("BENCHFS_TEST_SEED", "0"))

FRAMES = 2_000
FRAMES_ALL = 100_000
#: Each part takes half a minute on two cores with little else to do, and has a daemon of its own.
PARTS = 10
DEADLINE_PART_S = 280.0
#: Frames between two looks at whether they were dealt with: below what one connection may have under way.
BATCH = 50
#: Connections of strangers, one after the other.
STRANGERS = 150
STRANGERS_ALL = 3_000
#: Seconds that anything of an honest client may take beside them on a machine with much else to do.
SERVED_S = 30.0
#: Bytes by which the daemon may grow behind its warm-up: what allocators keep, and the memtables of its store (8 MiB
#: each) that the first frames did not fill; and for each connection the shells of its dead worker (rpc/ucx.py).
GROWTH_MAX = 24 * MIB
GROWTH_PER_CONNECTION = 40_000
#: Lines in the log that one connection may cause.
LINES_PER_CONNECTION = 3


class Target(NamedTuple):
    """Be the daemon that everything is thrown at."""

    process: Process
    registry: Path
    data: Path
    log: Path
    host: str
    port: int

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def resident(self) -> int:
        """Return the bytes of its memory that are no file's: Python's buffers are shared mappings of nothing."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return sum(int(size) * 1024 for size in re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", status))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    """Run a daemon between files that are not its own."""
    sys.stdout.write(f"BENCHFS_TEST_SEED={SEED}\n")
    registry, data = tmp_path / "registry", tmp_path / "data"
    init_registry(registry, 1)
    data.mkdir(mode=0o755)
    arguments = ["--registry-dir", str(registry), "--data-dir", str(data), "--listen", "127.0.0.1"]
    process = Process("benchfs_fuse.daemon", arguments, tmp_path / "log")
    try:
        process.wait_ready()
        with Registry(registry) as opened:
            entry = opened.find(0)
        assert entry is not None
        host, _, port = entry.address.rpartition(":")
        around = (tmp_path, registry, data)
        for place in around:
            (place / "canary").write_text("untouched")
        before = [names(place) for place in around]
        yield Target(process, registry, data, tmp_path / "log", host, int(port))
        assert [names(place) for place in around] == before
        assert all((place / "canary").read_text() == "untouched" for place in around)
        assert process.stop() == 0, "it had to be killed"
        said = process.log.read_text()
        assert "Traceback" not in said and "unexpectedly" not in said and "Error" not in said, said[:6000]
    finally:
        process.kill()


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


# ── the honest client beside them ────────────────────────────────────────────────────────────────────────────────────


class Honest:
    """Use the daemon all the time, and know what must be there."""

    def __init__(self, fs: FileSystem, parent: int, file: File, nameless: File) -> None:
        self._fs = fs
        self._file = file
        self._nameless = nameless
        self.inos = (file.ino, nameless.ino)
        self.parent = parent
        self.turns = 0
        self.longest_s = 0.0

    async def look(self) -> None:
        """Read, write, list and lock; see that all is as it was."""
        begun_s = time.monotonic()
        with trio.fail_after(SERVED_S):
            assert await self._file.read(100_000, 0) == CONTENT
            assert await self._nameless.read(100, 0) == b"nameless"
            await self._file.write(CONTENT[:1000], 0)
            await self._file.fsync()
            assert sorted(name for name in await self._fs.listdir("/honest")) == [b"file"]
            assert (await self._fs.stat("/honest/file")).size == len(CONTENT)
        self.longest_s = max(self.longest_s, time.monotonic() - begun_s)
        self.turns += 1

    async def run(self) -> None:
        while True:
            await self.look()
            await trio.sleep(0.05)


CONTENT = bytes(range(256)) * 200


@asynccontextmanager
async def honest(target: Target) -> AsyncIterator[Honest]:
    """Run the honest client; it has done something meanwhile, and never waited for long."""
    async with open_cluster(target.registry) as fs:
        await fs.mkdir("/honest")
        async with (
            await fs.open("/honest/file", os.O_RDWR | os.O_CREAT) as file,
            await fs.open("/honest/nameless", os.O_RDWR | os.O_CREAT) as nameless,
        ):
            await file.write(CONTENT, 0)
            await nameless.write(b"nameless", 0)
            await nameless.fsync()
            await file.fsync()
            await fs.remove("/honest/nameless")
            await file.lock()
            client = Honest(fs, (await fs.stat("/honest")).ino, file, nameless)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.run)
                yield client
                nursery.cancel_scope.cancel()
            await client.look()
            assert client.turns > 1
            sys.stdout.write(f"the honest client: {client.turns} turns, the longest took {client.longest_s:.3f} s\n")


# ── strangers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def card(**changes: object) -> handshake.Card:
    return msgspec.structs.replace(
        handshake.Card(secrets.randbits(63), -1, "stranger", os.getpid(), boot_id(), "", b""), **changes
    )


class Words:
    """Know what strangers may say: a recorded conversation, the cluster's id, and no secret."""

    def __init__(self, target: Target, seed: int) -> None:
        self.random = random.Random(seed)
        with Registry(target.registry) as registry:
            self.cluster_id = bytes.fromhex(registry.cluster.cluster_id)
            secret = registry.secret
        recorded, server = Handshake(Role.CLIENT, secret, self.cluster_id, card()), None
        server = Handshake(Role.SERVER, secret, self.cluster_id)
        self.hello = recorded.to_send()
        server.receive(self.hello)
        recorded.receive(server.to_send())
        self.card = recorded.to_send()
        server.receive(self.card)
        server.give_card(card(address=b"address"))
        recorded.receive(server.to_send())
        recorded.give_address(b"address")
        self.address = recorded.to_send()

    def liar(self) -> Handshake:
        """Begin as somebody with a wrong secret."""
        return Handshake(Role.CLIENT, self.random.randbytes(32), self.cluster_id, card())

    def pieces(self) -> list[bytes]:
        """Return what one stranger sends, without listening."""
        rng = self.random
        all_ = self.hello + self.card + self.address
        match rng.randrange(8):
            case 0:
                return [rng.randbytes(rng.choice((0, 1, 6, 7, 100, 10_000)))]
            case 1:
                return [all_[: rng.randrange(len(all_))]]
            case 2:
                damaged = bytearray(all_)
                for _ in range(rng.choice((1, 2, 10))):
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
                return [bytes(damaged)]
            case 3:  # another version; another cluster
                return [struct.pack("<4sBHI", b"BFSH", 1, 52, rng.choice((0, 2, (1 << 32) - 1))) + bytes(48)]
            case 4:
                return [
                    struct.pack("<4sBH", b"BFSH", rng.randrange(256), rng.choice((0, 8192, 8193, 65535)))
                    + bytes(70_000)
                ]
            case 5:  # replayed, as it was
                return [self.hello, self.card, self.address]
            case 6:
                return [self.card + self.hello]
            case _:
                return [self.hello, struct.pack("<4sBH", b"BFSH", rng.randrange(2, 6), 40) + rng.randbytes(40)]


def answered(target: Target, pieces: list[bytes]) -> bytes:
    """Say these pieces to the daemon; return all that it answers until it hangs up or has nothing more to say."""
    heard = b""
    place = (target.host, target.port)
    with socket.create_connection(place, SERVED_S) as stranger, contextlib.suppress(OSError):
        for piece in pieces:
            stranger.sendall(piece)
        stranger.shutdown(socket.SHUT_WR)
        while data := stranger.recv(65536):
            heard += data
    return heard


def kinds(heard: bytes) -> list[int]:
    """Return the kinds of the handshake messages in what was heard."""
    found = []
    while heard:
        magic, kind, length = struct.unpack_from("<4sBH", heard)
        assert magic == b"BFSH"
        found.append(kind)
        heard = heard[7 + length :]
    return found


def throw_strangers(target: Target, count: int, seed: int) -> None:
    words = Words(target, seed)
    for _ in range(count):
        heard = answered(target, words.pieces())
        # A greeting and a sentence at most: never a card, which has the address of a UCX worker.
        assert set(kinds(heard)) <= {1, 5} and len(heard) < 500
    liar = words.liar()
    heard = answered(target, [liar.to_send()])
    liar.receive(heard)
    assert kinds(answered(target, [words.hello, liar.to_send()])) == [1, 5]


async def strangers(target: Target, count: int) -> None:
    async with honest(target) as client:
        await trio.to_thread.run_sync(throw_strangers, target, 30, SEED + 1)
        memory, descriptors, lines = target.resident(), target.descriptors(), len(target.lines())
        await trio.to_thread.run_sync(throw_strangers, target, count, SEED)
        await client.look()
        assert target.resident() < memory + GROWTH_MAX
        assert target.descriptors() <= descriptors + 1
        assert len(target.lines()) <= lines + TOLD_MAX


async def test_strangers_learn_and_cost_nothing(target: Target) -> None:
    await strangers(target, STRANGERS)


@pytest.mark.slow
async def test_many_strangers_learn_and_cost_nothing(target: Target) -> None:
    await strangers(target, STRANGERS_ALL)


async def test_strangers_that_stay_silent_keep_nobody_out(target: Target) -> None:
    """Twice as many as there are places say half a greeting and nothing more."""
    hello = Words(target, SEED).hello
    async with honest(target):
        descriptors = target.descriptors()
        with contextlib.ExitStack() as stack:
            silent = []
            for number in range(2 * PENDING_MAX):
                silent.append(stack.enter_context(socket.create_connection((target.host, target.port), SERVED_S)))
                silent[-1].sendall(hello[: number % len(hello)])
            assert target.descriptors() <= descriptors + PENDING_MAX + 1
            with trio.fail_after(SERVED_S):
                async with open_cluster(target.registry) as another:
                    assert await another.listdir("/honest") == [b"file"]
            # The first have had to go, and the last have not.
            assert await trio.to_thread.run_sync(silent[0].recv, 10_000) == b""
            for one in silent[-PENDING_MAX // 2 :]:
                one.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    assert one.recv(10_000)  # a greeting for those who said a whole one


# ── peers that hold the secret ───────────────────────────────────────────────────────────────────────────────────────


class Rogue:
    """Connect as a peer does, and send anything."""

    def __init__(self, engine: UcxEngine, address: str) -> None:
        self._engine = engine
        self._address = address
        self.channel: UcxChannel
        self.heard: dict[int, frames.Frame] = {}
        self.connections = 0
        #: How many replies came, by their status.
        self.codes = Counter[int]()

    async def connect(self, daemon_id: int = -1, *, anew: bool = False) -> None:
        """Open a connection and say Hello over it, as another client if need be."""
        while True:
            if anew or self._engine.peer.daemon_id != daemon_id:
                self._engine.peer = self._engine.peer._replace(
                    client_id=ClientId(secrets.randbits(63)), daemon_id=daemon_id
                )
            channel = await self._engine.connect(self._address)
            assert isinstance(channel, UcxChannel)
            self.channel = channel
            self.connections += 1
            kind = "mount" if daemon_id < 0 else "daemon"
            reply = await channel.call(m.Hello.op, m.encode(m.Hello(kind, "/mnt/rogue", False)))
            if reply.status == 0:
                break
            anew = True  # that client was expelled, or is ending
            await channel.aclose()
        self.heard = {}
        # Replies come to what it knows nothing of, and payloads that it does not wait for.
        setattr(channel, "_on_reply", self._hear)  # noqa: B010
        setattr(channel, "_refuse_strays", lambda: None)  # noqa: B010

    def _hear(self, frame: frames.Frame) -> None:
        self.heard[frame.request_id] = frame
        self.codes[frame.code] += 1

    @property
    def ended(self) -> bool:
        return self.channel._ending is not None or self.channel._failed

    def send(self, message: Message) -> None:
        if not self.ended:
            self.channel._send(message.control, 1 << 32)
        if message.payload is not None and not self.ended:
            self.channel._send(message.payload, 2 << 32 | message.slot)

    async def settle(self) -> bool:
        """Wait until the daemon has taken what was sent; tell whether the connection is still of use."""
        mark = (1 << 32) - 7
        self.heard.pop(mark, None)
        self.send(Message(frames.encode_request(mark, m.Heartbeat.op, m.encode(m.Heartbeat()), None, 0)))
        with trio.fail_after(SERVED_S):
            while mark not in self.heard:
                if self.ended:
                    await self.channel.aclose()
                    return False
                await trio.sleep(0.001)
        if self.heard[mark].code:  # the session has ended: it said Goodbye
            await self.channel.aclose()
            return False
        return True


@asynccontextmanager
async def rogue(target: Target, tls: str | None = None) -> AsyncIterator[Rogue]:
    with Registry(target.registry) as registry:
        cluster_id, secret = bytes.fromhex(registry.cluster.cluster_id), registry.secret
    peer = Peer(ClientId(secrets.randbits(63)), -1, "rogue", os.getpid(), boot_id())
    async with UcxEngine(peer, secret, cluster_id, tls=tls) as engine:
        yield Rogue(engine, target.address)


async def throw_frames(peer: Rogue, fuzzer: Fuzzer, count: int) -> None:
    """Send so many frames, a fifth of the connections as a daemon's."""
    await peer.connect()
    for number in range(count):
        message = fuzzer.next()
        peer.send(message)
        if not message.bad and number % BATCH:
            continue
        if not await peer.settle():
            await peer.connect(7 if fuzzer.random.random() < 0.2 else -1)
        elif fuzzer.random.random() < 0.02:
            await peer.channel.aclose()
            await peer.connect(anew=True)
    await peer.channel.aclose()


async def make_files(target: Target) -> tuple[int, int]:
    """Make the directory and the file that the rogue's requests are about."""
    async with open_cluster(target.registry) as fs:
        await fs.mkdir("/rogue")
        async with await fs.open("/rogue/name", os.O_RDWR | os.O_CREAT) as file:
            await file.write(bytes(10_000), 0)
            return (await fs.stat("/rogue")).ino, file.ino


async def frames_from_a_rogue(target: Target, count: int, seed: int) -> None:
    parent, ino = await make_files(target)
    async with honest(target) as client, rogue(target) as peer:
        requests = examples(parent, ino, 0)
        assert {type(request) for request in requests} == set(m.REQUESTS.values())
        fuzzer = Fuzzer(seed, requests, (*client.inos, 1, client.parent))
        await throw_frames(peer, fuzzer, min(count, FRAMES) // 2)
        memory, lines, descriptors = target.resident(), len(target.lines()), target.descriptors()
        before = peer.connections
        await throw_frames(peer, fuzzer, count - min(count, FRAMES) // 2)
        made = peer.connections - before
        await client.look()
        growth = target.resident() - memory
        # Most were taken for requests, and many for good ones.
        assert peer.codes.total() > count / 2 and peer.codes[0] > count / 10, peer.codes
        sys.stdout.write(f"{count} frames, {peer.codes}, {peer.connections} connections, {growth / MIB:.1f} MiB more\n")
        assert growth < GROWTH_MAX + made * GROWTH_PER_CONNECTION
        assert len(target.lines()) - lines <= made * LINES_PER_CONNECTION + 10
        # Chunk files are kept open, and a descriptor for the process of each session until its lease is over. A
        # connection that is left behind has eight.
        with trio.fail_after(SERVED_S):
            while target.descriptors() > descriptors + FILES_OPEN_MAX + made:  # noqa: ASYNC110  another process's
                await trio.sleep(0.05)


async def test_no_frame_harms_a_daemon_or_others(target: Target) -> None:
    await frames_from_a_rogue(target, FRAMES, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
async def test_100000_frames_harm_neither_a_daemon_nor_others(target: Target, part: int) -> None:
    with trio.fail_after(DEADLINE_PART_S):
        await frames_from_a_rogue(target, FRAMES_ALL // PARTS, SEED + part)


async def test_messages_that_nobody_waits_for_end_their_connection(target: Target) -> None:
    """They would pile up in UCX: with a tag of no meaning, or one payload after the other for a slot."""
    async with honest(target), rogue(target) as peer:
        for tag in (9 << 32, 0, 2 << 32 | BULK_SLOTS, 2 << 32):
            await peer.connect()
            memory = target.resident()
            with trio.fail_after(SERVED_S):
                while not peer.ended:
                    peer.channel._send(bytes(MIB), tag)
                    await trio.sleep(0.001)
            assert target.resident() < memory + REPLY_BYTES_MAX + GROWTH_MAX
            await peer.channel.aclose()
    assert "that nobody waits for" in target.log.read_text()


@asynccontextmanager
async def deaf(peer: Rogue) -> AsyncIterator[None]:
    """Take nothing of what comes over the connection, for as long as it lasts."""
    await peer.connect()
    with mock.patch.object(peer.channel, "_poll", return_value=False):
        yield
    await peer.channel.aclose()


async def test_who_takes_no_replies_holds_little_memory(target: Target) -> None:
    """It asks for 512 MiB at once."""
    async with open_cluster(target.registry) as fs, await fs.open("/large", os.O_RDWR | os.O_CREAT) as large:
        await large.write(os.urandom(PAYLOAD_MAX), 0)
        await large.fsync()
        async with honest(target), rogue(target) as peer, deaf(peer):
            memory = target.resident()
            read = m.encode(m.ReadChunk(large.ino, 0, 0, PAYLOAD_MAX))
            for number in range(IN_FLIGHT_MAX):
                peer.send(Message(frames.encode_request(number, m.ReadChunk.op, read, None, PAYLOAD_MAX)))
                await trio.sleep(0.005)
            assert not peer.ended
            assert target.resident() < memory + REPLY_BYTES_MAX + GROWTH_MAX


async def test_who_takes_no_replies_and_goes_on_asking_loses_its_connection(target: Target) -> None:
    async with honest(target), rogue(target) as peer, deaf(peer):
        memory = target.resident()
        with trio.fail_after(SERVED_S):
            while not peer.ended:
                for _ in range(8):  # as many as fit into shared memory at once: what waits here needs a poll to go out
                    peer.send(Message(frames.encode_request(1, m.GetAttr.op, m.encode(m.GetAttr(1)), None, 0)))
                await trio.sleep(0.003)
        assert target.resident() < memory + GROWTH_MAX
    assert "it has not taken" in target.log.read_text()


async def test_who_holds_no_secret_is_never_told_an_address(target: Target) -> None:
    """Neither the address that a worker has, nor a worker made for it."""
    words = Words(target, SEED)
    descriptors = target.descriptors()
    for _ in range(20):
        liar = words.liar()
        with socket.create_connection((target.host, target.port), SERVED_S) as stranger:
            stranger.sendall(liar.to_send())
            liar.receive(stranger.recv(10_000))
            stranger.sendall(liar.to_send())
            with pytest.raises(AuthenticationFailed, match="could not prove"):
                liar.receive(stranger.recv(10_000))
            assert target.descriptors() <= descriptors + 1
            assert liar.peer is None and liar.address is None


def test_nothing_in_registry_and_data_directory_is_readable_by_others(target: Target) -> None:
    """Not even where somebody else made the directory, with the usual rights and umask."""
    found = [path for place in (target.registry, target.data) for path in place.rglob("*") if path.name != "canary"]
    assert any(path.parent.name == "meta" for path in found) and any(path.parent.name == "daemons" for path in found)
    assert [path for path in found if path.is_file() and path.stat().st_mode & 0o077] == []
    assert [path for path in found if path.is_dir() and path.stat().st_mode & 0o077] == []
