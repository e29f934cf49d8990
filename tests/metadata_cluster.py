"""Run the metadata of several daemons in one process: requests, crashes at any write or message, and what must hold.

A daemon here is a MetadataService over a MemoryStore with the least around it that the contracts ask for. It dies as
``kill -9`` would let it: its tasks are gone, its store keeps what was written, its messages stop; it starts anew at
once. Or as a power cut would let it: then its store keeps what was synced, and of the rest a prefix. A client sends a
request again, with the same slot and sequence number, until it is answered.
"""

import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import trio

from benchfs_fuse import disk
from benchfs_fuse.errors import FsError, TooManyOpen, WrongCoordinator
from benchfs_fuse.kv.memory import MemoryStore
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.limits import CHUNK_SIZE_DEFAULT
from benchfs_fuse.model import ROOT_INO, Attrs, ClientId, Ino, make_ino
from benchfs_fuse.rpc.messages import (
    Body,
    CommitWrite,
    DropChunks,
    DropChunksReply,
    EntryReply,
    Link,
    Lookup,
    Make,
    ReadDir,
    Rename,
    Request,
    Rmdir,
    TrimChunks,
    TrimChunksReply,
    Unlink,
    decode,
    encode,
)
from benchfs_fuse.services.calls import Batch
from benchfs_fuse.services.identity import open_store
from benchfs_fuse.services.inodes import COOKIE_FIRST, ENTRY_SIZE, Inode, Inodes
from benchfs_fuse.services.metadata import MetadataService
from benchfs_fuse.services.names import SPREAD_EVERY

R = TypeVar("R", bound=Body)

#: What one daemon has stored: records and chunks.
Contents = tuple[dict[bytes, bytes], dict[tuple[int, int], int]]

CLIENT = ClientId(1)
#: In place of a daemon that dies.
EVERYBODY = -1
#: What a daemon says to another has no client of interest.
DAEMON_CLIENT = ClientId(1000)


class Crash(Exception):
    """Stand for ``kill -9``: nobody but the harness catches it."""


class PowerStore(MemoryStore):
    """Be a store that knows what was synced, and what was written since."""

    def __init__(self, contents: Mapping[bytes, bytes] | None = None) -> None:
        super().__init__(contents)
        self._synced = self.contents()
        self._tail: list[tuple[Sequence[tuple[bytes, bytes]], Sequence[bytes]]] = []

    def write(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        super().write(puts, deletes)
        self._tail.append((puts, deletes))

    async def sync(self) -> None:
        count = len(self._tail)
        await super().sync()
        self.keep(count)

    def keep(self, count: int) -> None:
        """Note that the oldest writes are on stable storage."""
        for puts, deletes in self._tail[:count]:
            self._synced.update(puts)
            for key in deletes:
                self._synced.pop(key, None)
        del self._tail[:count]

    def killed(self) -> "PowerStore":
        """Return what the next life of the daemon finds when this one was killed: everything."""
        found = PowerStore(self.contents())
        found._synced, found._tail = self._synced, self._tail
        return found

    def left(self, share: float) -> "PowerStore":
        """Return what it finds after a power cut, with a part of what was not synced."""
        self.keep(round(len(self._tail) * share))
        return PowerStore(self._synced)


class Handles:
    """Implement Opens. It outlives the daemon, as if every client reclaimed its handles at once."""

    def __init__(self) -> None:
        self.held: Counter[tuple[ClientId, int, bool]] = Counter()
        self.grace = False
        self.full = False

    def add(self, batch: Batch, client_id: ClientId, ino: int, readers: int, writers: int) -> None:
        if self.full:
            raise TooManyOpen("the test says so")
        batch.after_write.append(lambda: self._change(client_id, ino, readers, writers))

    def remove(self, batch: Batch, client_id: ClientId, ino: int, readers: int, writers: int) -> None:
        batch.after_write.append(lambda: self._change(client_id, ino, -readers, -writers))

    def _change(self, client_id: ClientId, ino: int, readers: int, writers: int) -> None:
        for writer, number in ((False, readers), (True, writers)):
            key = (client_id, ino, writer)
            self.held[key] = max(0, self.held[key] + number)

    def count(self, ino: int) -> int:
        return sum(number for (_, held, _), number in self.held.items() if held == ino) or int(self.grace)

    def written_by_others(self, ino: int, client_id: ClientId | None) -> bool:
        return any(
            held == ino and writer and other != client_id and number
            for (other, held, writer), number in self.held.items()
        )


class Called:
    """Implement Call for a request of a client; slot 0 records nothing."""

    def __init__(self, store: MemoryStore, client_id: ClientId, slot: int, seq: int) -> None:
        self._store = store
        self.client_id = client_id
        self._slot = slot
        self._seq = seq
        self.commits = 0

    def commit(self, batch: Batch, reply: Body) -> None:
        self.commits += 1
        if self._seq:
            batch.put(
                disk.key_slot(disk.OUTCOME, self.client_id, self._slot), self._seq.to_bytes(8, "big") + encode(reply)
            )
        batch.write()

    def recorded(self, reply: type[Body]) -> Body | None:
        """Return the outcome if this request was served before."""
        found = self._store.get(disk.key_slot(disk.OUTCOME, self.client_id, self._slot)) if self._seq else None
        if found is None or int.from_bytes(found[:8], "big") != self._seq:
            return None
        return decode(reply, found[8:])


class _Answer:
    """Hold the answer to one request, or the knowledge that there will be none."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: Body | None = None
        self.error: FsError | None = None
        self.scope = trio.CancelScope()


class _Peers:
    """Implement Peers for one life of one daemon."""

    def __init__(self, cluster: "Cluster", node: "Node") -> None:
        self._cluster = cluster
        self._node = node
        self._life = node.life

    async def call(self, daemon_id: int, request: Request, reply: type[R], into: memoryview | None = None) -> R:
        cluster, target = self._cluster, self._cluster.nodes[daemon_id]
        assert not request.recorded and into is None
        while True:
            await self._check_alive()
            await cluster.on_message(self._node, target, request)
            await target.up.wait()
            await self._check_alive()
            cluster.messages[type(request).__name__] += 1
            cluster.point("sent", self._node, target)
            await self._check_alive()
            answer = cluster.serve(target, request, lambda store: Called(store, DAEMON_CLIENT, 0, 0))
            try:
                await answer.done.wait()
            finally:
                # A daemon that dies ends its connections, and what was served over them is cancelled.
                if self._node.dying:
                    answer.scope.cancel()
            cluster.point("served", self._node, target)
            await self._check_alive()
            if answer.error is not None:
                raise answer.error
            if answer.reply is not None:
                assert isinstance(answer.reply, reply)
                return answer.reply

    async def _check_alive(self) -> None:
        """Never return in a daemon that has died: nothing it still does reaches anybody."""
        if self._node.life != self._life or self._node.dying:
            await trio.sleep_forever()


class Node:
    """Be one daemon, through its lives."""

    def __init__(self, cluster: "Cluster", daemon_id: int) -> None:
        self._cluster = cluster
        self.daemon_id = daemon_id
        self.store = PowerStore()
        self.handles = Handles()
        #: Allocated bytes of the chunks here: (ino, index) → bytes. What a request dropped is gone for good.
        self.chunks: dict[tuple[int, int], int] = {}
        self.life = 0
        self.dying = False
        #: It dies by a power cut.
        self.loses = False
        self.up = trio.Event()
        self.answers: set[_Answer] = set()
        self.scope = trio.CancelScope()
        self.nursery: trio.Nursery
        self.service: MetadataService

    async def run(self) -> None:
        """Live, die, and live again."""
        while True:
            with trio.CancelScope() as self.scope:
                try:
                    await self._live()
                except* Crash:
                    self.die()
            if not self.dying:
                return

    async def _live(self) -> None:
        cluster = self._cluster
        self.life += 1
        self.dying = False
        losing, self.loses = self.loses, False
        self.store = self.store.left(cluster.kept) if losing else self.store.killed()
        incarnation = open_store(
            self.store, "test", self.daemon_id, cluster.shard_map, CHUNK_SIZE_DEFAULT, cluster.clock()
        )
        self.service = MetadataService(
            self.store,
            daemon_id=self.daemon_id,
            incarnation=incarnation,
            shard_map=cluster.shard_map,
            opens=self.handles,
            peers=_Peers(cluster, self),
            clock=cluster.clock,
            prepare_timeout_s=cluster.prepare_timeout_s,
        )
        self.service.recover()
        await self.store.sync()
        self.store.before_write = lambda number: self._on_write("write")
        self.store.after_write = lambda number: self._on_write("written")
        async with trio.open_nursery() as self.nursery:
            await self.nursery.start(self.service.run)
            self.service.grace_ended()
            self.up.set()
            await trio.sleep_forever()

    def _on_write(self, where: str) -> None:
        if self.dying:
            raise Crash
        self._cluster.point(where, self)
        if self.dying:
            raise Crash

    def die(self) -> None:
        """End at once; the next life begins when the tasks of this one are over."""
        if self.dying:
            return
        self.dying = True
        self.up = trio.Event()
        for answer in self.answers:
            answer.done.set()
        self.answers.clear()
        self.scope.cancel()

    def stop(self) -> None:
        """End for good."""
        self.scope.cancel()


class Cluster:
    """Hold the daemons, and do to them what a test asks for."""

    def __init__(self, daemons: int, seed: int = 0, prepare_timeout_s: float = float("inf")) -> None:
        self.shard_map = ShardMap.round_robin(daemons)
        self.prepare_timeout_s = prepare_timeout_s
        self._now_ns = 10**18
        self.nodes = [Node(self, daemon_id) for daemon_id in range(daemons)]
        #: Requests between daemons so far, by class.
        self.messages: Counter[str] = Counter()
        self._seqs: Counter[tuple[ClientId, int]] = Counter()
        self.random = random.Random(seed)
        #: Seconds of the mock clock that messages between daemons take, at most.
        self.delay_s_max = 0.0
        #: Points passed since ``count_points``, and which daemon dies at which of them.
        self.points: list[tuple[str, tuple[int, ...]]] = []
        self._dies_at: tuple[int, int] | None = None
        #: Whether who dies loses power, and what a power cut keeps of what was not synced.
        self.cuts_power = False
        self.kept = 0.0
        #: Called before a message is delivered; a test may wait here, or raise.
        self.gate: Callable[[int, int, Request], Any] | None = None

    def clock(self) -> int:
        """Return a time that only grows."""
        self._now_ns += 1000
        return self._now_ns

    def advance(self, ns: int) -> None:
        """Let time pass on the daemons' clocks."""
        self._now_ns += ns

    def home(self, ino: int) -> Node:
        """Return the daemon that holds an inode."""
        return self.nodes[self.shard_map.of_ino(ino)]

    # ── crashes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def count_points(self, dies_at: tuple[int, int] | None = None) -> None:
        """Begin to number the crash points; ``dies_at``: (number, daemon) of the one that dies there, or EVERYBODY."""
        self.points = []
        self._dies_at = dies_at

    def point(self, what: str, *nodes: Node) -> None:
        """Pass a point at which one of ``nodes`` may die."""
        number = len(self.points)
        self.points.append((what, tuple(node.daemon_id for node in nodes)))
        if self._dies_at is not None and self._dies_at[0] == number:
            for node in self.nodes:
                if self._dies_at[1] in (node.daemon_id, EVERYBODY):
                    node.loses = self.cuts_power
                    node.die()

    # ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def on_message(self, source: Node, target: Node, request: Request) -> None:
        """Let a message take its time."""
        if self.gate is not None:
            await self.gate(source.daemon_id, target.daemon_id, request)
        if self.delay_s_max:
            await trio.sleep(self.random.random() * self.delay_s_max)

    def serve(self, node: Node, request: Request, call: Callable[[MemoryStore], Called]) -> _Answer:
        """Let a daemon serve a request; neither reply nor error when it is done: the daemon died first."""
        answer = _Answer()
        if node.dying:
            answer.done.set()
        else:
            node.answers.add(answer)
            node.nursery.start_soon(self._serve, node, request, call(node.store), answer)
        return answer

    async def _serve(self, node: Node, request: Request, call: Called, answer: _Answer) -> None:
        with answer.scope:
            try:
                answer.reply = await self._serve_here(node, request, call)
            except FsError as error:
                answer.error = error
            except Crash:
                node.die()
        if node.dying:
            answer.reply = answer.error = None
        node.answers.discard(answer)
        answer.done.set()

    async def _serve_here(self, node: Node, request: Request, call: Called) -> Body:
        reply = self._serve_chunks(node, request) or call.recorded(request.Reply)
        if reply is None and self.random.random() < 0.5:
            reply = node.service.handlers_now()[type(request)](request, call)
        if reply is None:
            reply = await node.service.handlers()[type(request)](request, call)
            assert call.commits == 1 or not request.recorded, "a recorded request commits exactly once"
        return reply

    def _serve_chunks(self, node: Node, request: Request) -> Body | None:
        """Be the chunk store of a daemon, as far as metadata asks for it."""
        chunks = node.chunks
        if isinstance(request, DropChunks):
            gone = [key for key in chunks if key[0] in request.inos]
            return DropChunksReply(sum(chunks.pop(key) for key in gone))
        if isinstance(request, TrimChunks):
            freed = 0
            for key in [key for key in chunks if key[0] == request.ino and key[1] >= request.index]:
                keep = min(chunks[key], request.offset) if key[1] == request.index else 0
                freed += chunks[key] - keep
                chunks[key] = keep
                if not keep:
                    del chunks[key]
            left = sum(length for key, length in chunks.items() if key[0] == request.ino)
            return TrimChunksReply(freed, left)
        return None

    def write_chunk(self, attrs: Attrs, index: int, length: int) -> None:
        """Store a chunk of a file, as a client does before it publishes."""
        self.nodes[self.shard_map.of_chunk(attrs.ino, index, attrs.width)].chunks[attrs.ino, index] = length

    def chunks_of(self, ino: int) -> set[int]:
        """Return the indexes of a file's chunks on all daemons."""
        return {key[1] for node in self.nodes for key in node.chunks if key[0] == ino}

    # ── the client ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def ask(self, request: Request, client_id: ClientId = CLIENT, slot: int = 0, patient: bool = True) -> Any:
        """Send a request where it belongs, again and again until it is answered; raise what is wrong.

        Unless ``patient``, it is sent once, and Crash raised if the daemon died.
        """
        node = self.nodes[self.shard_map.of_ino(_concerns(request))]
        try:
            return await self._ask_at(node, request, client_id, slot, patient)
        except WrongCoordinator:
            return await self._ask_at(self.home(ROOT_INO), request, client_id, slot, patient)

    async def ask_once(self, request: Request, patient: bool) -> None:
        """Send a request; what becomes of it is not of interest."""
        with contextlib.suppress(FsError, Crash):
            await self.ask(request, patient=patient)

    async def _ask_at(self, node: Node, request: Request, client_id: ClientId, slot: int, patient: bool) -> Body:
        seq = 0
        if request.recorded:
            self._seqs[client_id, slot] += 1
            seq = self._seqs[client_id, slot]
        while True:
            await node.up.wait()
            answer = self.serve(node, request, lambda store: Called(store, client_id, slot, seq))
            await answer.done.wait()
            if answer.error is not None:
                raise answer.error
            if answer.reply is not None:
                assert isinstance(answer.reply, request.Reply)
                return answer.reply
            if not patient:
                raise Crash

    async def mkdir(self, parent: int, name: bytes, on: int | None = None) -> int:
        """Make a directory; ``on`` names the daemon that it has to be on."""
        if on is not None:
            self.steer(parent, on)
        reply: EntryReply = await self.ask(Make(parent, name, 0o40755, 0, 0))
        assert on is None or self.shard_map.of_ino(reply.entry.ino) == on
        return reply.entry.ino

    def steer(self, parent: int, on: int) -> None:
        """Let the coordinator put its next directory on a daemon: there is no way to ask for that, but in a test."""
        names = self.home(parent).service._names
        while self.shard_map.of_ino(make_ino(names._next_shard, 1)) != on:
            names._next_shard = (names._next_shard + 1) % len(self.shard_map.daemons)
        names._beside = SPREAD_EVERY

    async def create(self, parent: int, name: bytes) -> int:
        """Make a regular file."""
        reply: EntryReply = await self.ask(Make(parent, name, 0o100644, 0, 0))
        return reply.entry.ino

    async def write(self, ino: int, length: int) -> None:
        """Write and publish the first bytes of a file; one chunk at least."""
        attrs = self.attrs(ino)
        chunks = range(-(-length // attrs.chunk_size))
        for index in chunks:
            self.write_chunk(attrs, index, min(attrs.chunk_size, length - index * attrs.chunk_size))
        await self.ask(CommitWrite(ino, length, length))

    async def lookup(self, parent: int, name: bytes) -> int:
        """Return the inode number that a name stands for."""
        reply: EntryReply = await self.ask(Lookup(parent, name))
        return reply.entry.ino

    async def names(self, ino: int) -> list[bytes]:
        """List a directory."""
        return [entry.name for entry in (await self.ask(ReadDir(ino, 0, 500))).entries]

    async def wait_idle(self) -> None:
        """Wait until nothing goes on behind replies, at any daemon."""
        for _ in range(3):
            for node in self.nodes:
                await node.up.wait()
                await node.service.wait_idle()

    async def sync(self) -> None:
        """Bring everything to stable storage."""
        for node in self.nodes:
            await node.store.sync()

    def contents(self) -> list[Contents]:
        """Return what all daemons have stored."""
        return [(node.store.contents(), dict(node.chunks)) for node in self.nodes]

    # ── what must hold ───────────────────────────────────────────────────────────────────────────────────────────────

    def records(self, prefix: bytes) -> Iterator[tuple[Node, bytes, bytes]]:
        """Yield all records of one kind of all daemons."""
        for node in self.nodes:
            for key, value in node.store.scan(prefix, disk.after(prefix)):
                yield node, key, value

    def inode(self, ino: int) -> Inode | None:
        """Return an inode straight from its store."""
        return Inodes(self.home(ino).store, 0, self.shard_map, self.clock).find(ino)

    def attrs(self, ino: int) -> Attrs:
        """Return an inode's attributes straight from its store."""
        inode = self.inode(ino)
        assert inode is not None
        return inode.attrs()

    def tree(self, ino: int = ROOT_INO) -> dict[bytes, Any]:
        """Return a directory as a dictionary: a subdirectory as another one, anything else as its inode number."""
        reader = Inodes(self.home(ino).store, 0, self.shard_map, self.clock)
        return {
            listed.name: self.tree(listed.ino) if listed.kind == 0o40000 else listed.ino
            for listed in reader.listing(ino, 0, 10**6)
        }

    def check(self) -> None:
        """Check all stores against each other: call when nothing goes on."""
        inodes: dict[int, Inode] = {}
        for node, key, value in self.records(disk.INODE):
            inode = msgspec.msgpack.decode(value, type=Inode)
            assert inode.ino == disk.number(key)
            assert self.home(inode.ino) is node
            inodes[inode.ino] = inode
        links: Counter[int] = Counter()
        subdirectories: Counter[int] = Counter()
        entries: Counter[int] = Counter()
        rows: set[tuple[int, int, bytes, int, int]] = set()
        for node, key, value in self.records(disk.ENTRY):
            parent, name = disk.number(key), key[9:]
            ino, cookie, kind = int.from_bytes(value[:8], "big"), int.from_bytes(value[8:16], "big"), value[16:]
            assert self.home(parent) is node
            assert ino in inodes, f"{name!r} stands for inode {ino}, which is not there"
            assert int.from_bytes(kind, "big") == inodes[ino].mode & 0o170000
            assert COOKIE_FIRST <= cookie < inodes[parent].next_cookie
            links[ino] += 1
            entries[parent] += 1
            if inodes[ino].is_dir:
                subdirectories[parent] += 1
                assert inodes[ino].parent == parent
            rows.add((parent, cookie, name, ino, int.from_bytes(kind, "big")))
        positions = {
            (*disk.numbers(key), value[10:], int.from_bytes(value[:8], "big"), int.from_bytes(value[8:10], "big"))
            for _, key, value in self.records(disk.POSITION)
        }
        assert rows == positions
        dead = {disk.number(key): value for _, key, value in self.records(disk.DEAD)}
        for ino, inode in inodes.items():
            if inode.nlink == 0:
                assert links[ino] == 0
                assert self.home(ino).handles.count(ino), f"inode {ino} has no name and nobody has it open"
                assert dead.pop(ino) == b"", f"nothing remembers that inode {ino} is an orphan"
            elif inode.is_dir:
                assert links[ino] == (ino != ROOT_INO)
                assert inode.nlink == 2 + subdirectories[ino]
            else:
                assert inode.nlink == links[ino], f"inode {ino}"
            if inode.is_dir:
                assert inode.entries == entries[ino]
                assert inode.size == ENTRY_SIZE * entries[ino]
        assert not dead, f"dead files are still to be dropped: {dead}"
        sizes: Counter[int] = Counter()
        for _, key, _ in self.records(disk.XATTR):
            sizes[disk.number(key)] += len(key) - 9 + 1
        assert all(inodes[ino].xattr_size == size for ino, size in sizes.items())
        assert sum(inode.xattr_size for inode in inodes.values()) == sizes.total()
        targets = {disk.number(key) for _, key, _ in self.records(disk.TARGET)}
        assert targets == {ino for ino, inode in inodes.items() if inode.mode & 0o170000 == 0o120000}
        assert list(self.records(disk.TRANSACTION)) == []
        assert list(self.records(disk.TRUNCATING)) == []
        for node in self.nodes:
            assert node.service.locked == 0
            assert node.service.prepared == 0
            assert node.service.to_drop == 0
            assert node.service._truncations.doubtful == set()
            assert node.service.orphans == sum(
                1 for ino, inode in inodes.items() if inode.nlink == 0 and self.home(ino) is node
            )
            assert {ino for ino, _ in node.chunks} <= inodes.keys(), "chunks of files that have gone"


def _concerns(request: Request) -> Ino:
    """Return the inode by which a request finds its daemon."""
    if isinstance(request, Make | Unlink | Rmdir | Link | Lookup):
        return Ino(request.parent)
    if isinstance(request, Rename):
        return Ino(request.old_parent)
    ino = getattr(request, "ino", None)
    assert isinstance(ino, int)
    return Ino(ino)


@asynccontextmanager
async def cluster_of(
    daemons: int,
    seed: int = 0,
    prepare_timeout_s: float = float("inf"),
    contents: Sequence[Contents] = (),
) -> AsyncIterator[Cluster]:
    """Run a cluster for a while, over copies of ``contents``. Its daemons stop when the block ends."""
    cluster = Cluster(daemons, seed, prepare_timeout_s)
    for node, (records, chunks) in zip(cluster.nodes, contents, strict=False):
        node.store = PowerStore(records)
        node.chunks = dict(chunks)
    async with trio.open_nursery() as nursery:
        for node in cluster.nodes:
            nursery.start_soon(node.run)
        await cluster.wait_idle()
        yield cluster
        nursery.cancel_scope.cancel()
