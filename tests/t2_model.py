"""Two clients of a whole cluster do random things while connections break, daemons and clients die and stores fail.

After each operation the cluster must have answered as a plain model does: a tree of Python objects (reference_tree.py)
and a bytearray for each file. The model knows no faults: what was acknowledged has happened, once. It keeps to the
contract of docs/semantics.md, close-to-open: before one client uses the data of a file, what the other has accepted of
it is flushed, as a program would have to see to by fsync, close or a lock of its own.

Plans are dense: few names, many operations on the same files, and faults that strike where it hurts, as soon as a
request of a kind that the operation sends is on its way, several in one operation.

A failing plan is shrunk and printed by Hypothesis; it holds the seeds of everything that is left to chance.
"""

import copy
import errno
import math
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import pytest
import trio
from fsck import Stored, complaints
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_tree import Refused, Thing, Tree
from trio.testing import MockClock
from whole import CHUNK, Client, Whole, whole_cluster

from benchfs_fuse.chunks.faulty import Rates
from benchfs_fuse.client import File
from benchfs_fuse.errors import Exists, FsError
from benchfs_fuse.rpc.memory import MemoryNode
from benchfs_fuse.rpc.messages import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    Append,
    CommitWrite,
    DropChunks,
    Expel,
    Finish,
    Link,
    Make,
    Open,
    Prepare,
    Release,
    Rename,
    Request,
    Rmdir,
    SetAttr,
    TrimChunks,
    Unlink,
    WriteChunk,
)
from benchfs_fuse.services.sessions import RETURN_S
from benchfs_fuse.testing.daemons import MemoryDaemon

BLOCK = 4096
#: Files reach over a few chunks.
SIZE_MAX = 4 * CHUNK
#: Handles that are open at once; the oldest is closed for a new one.
HANDLES_MAX = 6
#: Virtual seconds in which everything that goes on must have come to rest.
REST_S = 600.0


class Content:
    """Hold a file's bytes, the blocks that were written (None: a failure made that unknown), and who has accepted."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.blocks: set[int] | None = set()
        self.dirty: set[int] = set()
        #: What was flushed for sure, and which bytes were written since, while somebody is dirty.
        self.flushed = b""
        self.touched = bytearray()

    def accept(self, client: int, offset: int, data: bytes) -> None:
        """Write what a client has accepted and may not have flushed."""
        if not self.dirty:
            self.flushed, self.touched = bytes(self.data), bytearray()
        self.dirty.add(client)
        self.write(offset, data)
        self.touched.extend(bytes(max(0, offset + len(data) - len(self.touched))))
        self.touched[offset : offset + len(data)] = b"\1" * len(data)

    def write(self, offset: int, data: bytes) -> None:
        """Write, with zeros before it if it lies behind the end."""
        if not data:
            return
        self.data.extend(bytes(max(0, offset - len(self.data))))
        self.data[offset : offset + len(data)] = data
        if self.blocks is not None:
            self.blocks |= set(range(offset // BLOCK, (offset + len(data) - 1) // BLOCK + 1))

    def resize(self, size: int) -> None:
        """Cut or extend, which flushes first."""
        self.dirty.clear()
        if size < len(self.data) and self.blocks is not None:
            self.blocks = {block for block in self.blocks if block < -(-size // BLOCK)}
        if size == 0:
            self.blocks = set()
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))


class Opened(NamedTuple):
    """Hold one handle of a client, and what it is a handle of."""

    client: int
    file: File
    thing: Thing
    flags: int


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CLIENT = st.integers(0, 1)
#: Few names, and those of files in directories that stay put (PLACE) more often than the others.
PLACES = ["/a", "/b", "/p/a", "/p/b", "/q/a", "/q/b"]
PLACE = st.sampled_from(PLACES)
PATH = st.sampled_from(["/a", "/p/a", "/q/a", *PLACES, "/p", "/q", "/p/r", "/q/r", "/p/r/a"])
#: Paths of what is there at the time, if anything is: of files, of files and directories.
FILE = st.tuples(st.just("file"), st.integers(0, 7))
THING = st.tuples(st.just("thing"), st.integers(0, 7))
EITHER = st.one_of(PATH, THING, FILE)
HANDLE = st.integers(0, HANDLES_MAX - 1)
OFFSET = st.one_of(st.sampled_from([0, 1, BLOCK, CHUNK - 1, CHUNK, 2 * CHUNK]), st.integers(0, SIZE_MAX))
LENGTH = st.one_of(st.sampled_from([0, 1, BLOCK, CHUNK]), st.integers(0, CHUNK + BLOCK))
#: Writes one after the other, most of which overlap while they are under way.
BURST = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, BLOCK, CHUNK - 1]), st.sampled_from([1, BLOCK, CHUNK])), min_size=2, max_size=6
)
RENAME_FLAGS = st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_EXCHANGE])
FLAGS = st.sampled_from(
    [
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        os.O_RDWR | os.O_CREAT | os.O_APPEND,
        os.O_RDWR | os.O_APPEND,
        os.O_RDWR | os.O_DIRECT,
        os.O_RDWR,
        os.O_RDONLY,
    ]
)
_EXISTING = ("file", "thing")
#: Operations on names that one request decides: of two at once, one comes first.
RACER = st.one_of(
    st.tuples(st.just("mkdir"), PLACE),
    st.tuples(st.just("rmdir"), PLACE),
    st.tuples(st.just("unlink"), PLACE),
    st.tuples(st.just("create"), PLACE),
    st.tuples(st.just("rename"), PLACE, PLACE, RENAME_FLAGS),
    st.tuples(st.just("rename"), PLACE, PLACE, RENAME_FLAGS),
)
#: Operations and how often each comes, compared with the others.
OPERATIONS = (
    (5, st.tuples(st.just("open"), CLIENT, EITHER, FLAGS)),
    (8, st.tuples(st.just("write"), HANDLE, OFFSET, LENGTH)),
    (4, st.tuples(st.just("burst"), HANDLE, BURST)),
    (2, st.tuples(st.just("read"), HANDLE, OFFSET, LENGTH)),
    (1, st.tuples(st.just("fsync"), HANDLE)),
    (2, st.tuples(st.just("stat_handle"), HANDLE)),
    (3, st.tuples(st.just("cut_handle"), HANDLE, OFFSET)),
    (3, st.tuples(st.just("close"), HANDLE)),
    (2, st.tuples(st.just("append_together"), FILE, LENGTH, LENGTH)),
    (2, st.tuples(st.just("write_while_cut"), FILE, OFFSET, LENGTH, OFFSET)),
    (2, st.tuples(st.just("cut"), CLIENT, EITHER, OFFSET)),
    (2, st.tuples(st.just("mkdir"), CLIENT, PATH)),
    (1, st.tuples(st.just("rmdir"), CLIENT, EITHER)),
    (3, st.tuples(st.just("unlink"), CLIENT, EITHER)),
    (2, st.tuples(st.just("link"), CLIENT, FILE, PATH)),
    (5, st.tuples(st.just("rename"), CLIENT, EITHER, EITHER, RENAME_FLAGS)),
    (4, st.tuples(st.just("race"), RACER, RACER)),
    (2, st.tuples(st.just("look"), CLIENT, EITHER)),
    (1, st.tuples(st.just("list"), CLIENT, PATH)),
    (1, st.tuples(st.just("make_together"), PATH)),
    (1, st.tuples(st.just("die"), CLIENT)),
    (
        1,
        st.tuples(st.just("write_broken"), HANDLE, OFFSET, LENGTH, st.sampled_from(["no_space", "failure", "partial"])),
    ),
    (1, st.tuples(st.just("cut_broken"), CLIENT, FILE, OFFSET)),
    (1, st.tuples(st.just("wait"), st.floats(0.0, 3.0))),
)
#: Requests that an operation makes the cluster send and that change something: faults strike when one is on its way.
_PUBLISH: list[type[Request]] = [WriteChunk, CommitWrite]
_CUT: list[type[Request]] = [SetAttr, TrimChunks, SetAttr, CommitWrite]
_TWO_PHASES: list[type[Request]] = [Prepare, Finish, Finish]
REQUESTS: dict[str, list[type[Request]]] = {
    "open": [Open, Make, Release, SetAttr, TrimChunks],
    "write": [*_PUBLISH, Append],
    "burst": [*_PUBLISH, WriteChunk],
    "close": [Release, *_PUBLISH, DropChunks, TrimChunks],
    "append_together": [Append, Append, *_PUBLISH, Open, Release],
    "write_while_cut": [*_CUT, *_PUBLISH, Release],
    "cut": _CUT,
    "cut_handle": _CUT,
    "mkdir": [Make, *_TWO_PHASES],
    "rmdir": [Rmdir, *_TWO_PHASES],
    "unlink": [Unlink, *_TWO_PHASES, DropChunks],
    "link": [Link, *_TWO_PHASES],
    "rename": [Rename, *_TWO_PHASES, DropChunks],
    "race": [Rename, Unlink, Make, *_TWO_PHASES, *_TWO_PHASES],
    "make_together": [Make, Release],
    "die": [Expel, TrimChunks, TrimChunks, DropChunks],
}


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Choose among strategies, each as often as its weight says (one_of would count the same strategy once)."""
    numbers = [number for number, (weight, _) in enumerate(choices) for _ in range(weight)]
    return st.sampled_from(numbers).flatmap(lambda number: choices[number][1])


OPERATION = weighted(*OPERATIONS)
#: Which of an operation's requests a fault waits for.
WHICH = st.integers(0, 7)
#: Scheduling turns after that request was sent: it is on its way, being served, or answered.
TURNS = st.sampled_from([0, 0, 1, 1, 2, 2, 3, 4, 6, 9])
#: Virtual seconds for which a daemon is down.
DOWN = st.sampled_from([0.0, 0.0, 0.0, 2.0])
STRIKE = weighted(
    (2, st.tuples(st.just("lose_request"), WHICH)),
    (3, st.tuples(st.just("lose_reply"), WHICH)),
    (4, st.tuples(st.just("restart"), WHICH, TURNS, st.booleans(), DOWN)),
    (1, st.tuples(st.just("restart_all"), WHICH, TURNS, DOWN)),
    (2, st.tuples(st.just("give_up"), WHICH, TURNS)),
)
FAULTS = weighted((5, st.just([])), (5, st.lists(STRIKE, min_size=1, max_size=3)))
PLAN = st.lists(st.tuples(OPERATION, FAULTS), min_size=25, max_size=60)


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Run:
    """Do a plan to the cluster and to the model, and compare every answer."""

    def __init__(self, whole: Whole, nursery: trio.Nursery, gather_bytes: int) -> None:
        self.whole = whole
        self.clients: list[Client] = []
        self.tree = Tree()
        self.contents: dict[Thing, Content] = {}
        self.inos: dict[Thing, int] = {}
        self.handles: list[Opened] = []
        #: Files whose blocks may be counted wrong, after a fault, until nobody has them open.
        self.uncounted: set[Thing] = set()
        #: Files that the operation under way writes to.
        self.written: set[Thing] = set()
        self._nursery = nursery
        self._gather_bytes = gather_bytes
        self._lives = [trio.CancelScope(), trio.CancelScope()]
        self._writes = 0

    async def start(self) -> None:
        """Start the clients."""
        for number in range(2):
            await self._nursery.start(self._live, number)

    async def _live(self, number: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be a client until it dies."""
        with trio.CancelScope() as self._lives[number]:
            async with self.whole.client(gather_bytes_max=self._gather_bytes) as client:
                self.clients[number : number + 1] = [client]
                task_status.started()
                await trio.sleep_forever()

    async def do(self, operation: tuple[Any, ...], faults: list[tuple[Any, ...]]) -> None:
        """Do one operation while faults strike, one after the other."""
        name, *arguments = operation
        arguments = [
            self._existing(*one) if isinstance(one, tuple) and one[0] in _EXISTING else one for one in arguments
        ]
        call = getattr(self, f"_{name}")
        if not faults or "broken" in name:
            await call(*arguments)
            return
        self.written = {thing for thing, content in self.contents.items() if content.dirty}
        self.uncounted |= self.written
        sent, received = trio.open_memory_channel[tuple[int, MemoryNode, MemoryNode]](math.inf)
        self.whole.network.on_call = lambda *of: sent.send_nowait(of)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._strike_all, name, faults, received)
                await trio.lowlevel.checkpoint()
                await call(*arguments)
                self.whole.network.on_call = lambda *of: None
                sent.close()
        finally:
            self.whole.network.lose_nothing()
            self.uncounted |= self.written

    async def _strike_all(
        self,
        name: str,
        faults: list[tuple[Any, ...]],
        received: trio.MemoryReceiveChannel[tuple[int, MemoryNode, MemoryNode]],
    ) -> None:
        for kind, which, *details in faults:
            requests = REQUESTS.get(name, _PUBLISH)
            request = requests[which % len(requests)]
            if kind in ("lose_request", "lose_reply"):
                getattr(self.whole.network, kind)(request.op)
                continue
            turns, *details = details
            async for op, source, target in received:
                if op == request.op:
                    for _ in range(turns):
                        await trio.lowlevel.checkpoint()
                    await getattr(self, f"_strike_{kind}")(source, target, *details)
                    break

    async def _strike_restart(self, source: MemoryNode, target: MemoryNode, sender: bool, down_s: float) -> None:
        by_node = {daemon.node: daemon for daemon in self.whole.cluster.daemons}
        victim = by_node.get(source if sender else target) or by_node.get(target)
        if victim is not None:  # or it was started anew meanwhile
            await self._restart([victim], down_s)

    async def _strike_restart_all(self, source: MemoryNode, target: MemoryNode, down_s: float) -> None:
        await self._restart(self.whole.cluster.daemons, down_s)

    async def _restart(self, victims: list[MemoryDaemon], down_s: float) -> None:
        for victim in victims:
            await victim.kill()
        await trio.sleep(down_s)
        for victim in victims:
            await victim.start()

    async def _strike_give_up(self, source: MemoryNode, target: MemoryNode) -> None:
        """Have the sender give up its connection: what it has sent is still on its way when it comes back."""
        for channel in list(source.channels):
            if channel.peer == target.peer:
                self._nursery.start_soon(channel.aclose)

    # The model's side.

    def _existing(self, what: str, index: int) -> str:
        """Return the path of something that is there; of something that is not if there is nothing."""

        def below(directory: Thing, path: str) -> Iterator[str]:
            for name, thing in directory.entries.items():
                if what == "thing" or not thing.is_dir:
                    yield path + os.fsdecode(name)
                yield from below(thing, f"{path}{os.fsdecode(name)}/")

        paths = list(below(self.tree.root, "/"))
        return paths[index % len(paths)] if paths else PLACES[0]

    def _resolve(self, path: str) -> tuple[Thing, bytes, Thing | None]:
        """Find the directory and the thing that a path leads to. Refused."""
        *above, name = os.fsencode(path).strip(b"/").split(b"/")
        directory = self.tree.root
        for part in above:
            thing = directory.entries.get(part)
            if thing is None:
                raise Refused(errno.ENOENT)
            if not thing.is_dir:
                raise Refused(errno.ENOTDIR)
            directory = thing
        return directory, name, directory.entries.get(name)

    def _find(self, path: str) -> Thing:
        thing = self._resolve(path)[2]
        if thing is None:
            raise Refused(errno.ENOENT)
        return thing

    async def _same(self, real: Awaitable[Any], model: Callable[[], Any]) -> tuple[Any, Any] | None:
        """Let both sides do the same; return what they say, None if both refuse, for the same reason."""
        expected = answer = told = None
        wanted = found = 0
        try:
            expected = model()
        except Refused as refused:
            wanted = refused.number
        try:
            answer = await real
        except FsError as error:
            found, told = error.errno, error
        assert errno.errorcode.get(found) == errno.errorcode.get(wanted), told
        return None if found else (answer, expected)

    async def _settle(self, thing: Thing, client: int) -> None:
        """Have what the other client has accepted of a file flushed."""
        content = self.contents[thing]
        for other in content.dirty - {client}:
            await self.clients[other].files.getattr(self.inos[thing])
        content.dirty &= {client}

    def _handle(self, index: int, writes: bool = False) -> Opened | None:
        fitting = [one for one in self.handles if not writes or one.flags & os.O_ACCMODE != os.O_RDONLY]
        return fitting[index % len(fitting)] if fitting else None

    async def _compare_data(self, file: File, thing: Thing) -> None:
        data = self.contents[thing].data
        assert await file.read(len(data) + 1, 0) == data

    def _bytes(self, length: int) -> bytes:
        """Make bytes that no other write has, none of them zero."""
        self._writes += 1
        return (b"%d." % self._writes * (length // 2 + 1))[:length]

    # Files.

    async def _open(self, client: int, path: str, flags: int) -> None:
        if len(self.handles) == HANDLES_MAX:
            await self._close(0)

        def model() -> Thing:
            directory, name, thing = self._resolve(path)
            if thing is None:
                if not flags & os.O_CREAT:
                    raise Refused(errno.ENOENT)
                thing = self.tree.make(directory, name, stat.S_IFREG)
                self.contents[thing] = Content()
            elif flags & os.O_CREAT and flags & os.O_EXCL:
                raise Refused(errno.EEXIST)
            elif thing.is_dir:
                raise Refused(errno.EISDIR)
            thing.handles += 1
            if flags & os.O_TRUNC:
                self.contents[thing].resize(0)
            return thing

        if flags & os.O_TRUNC:
            await self._settle_path(path, client)
        both = await self._same(self.clients[client].fs.open(path, flags), model)
        if both is None:
            return
        file, thing = both
        assert self.inos.setdefault(thing, file.ino) == file.ino
        self.handles.append(Opened(client, file, thing, flags))

    async def _settle_path(self, path: str, client: int) -> None:
        try:
            thing = self._resolve(path)[2]
        except Refused:
            return
        if thing in self.contents:
            await self._settle(thing, client)

    async def _write(self, index: int, offset: int, length: int) -> None:
        one = self._handle(index, writes=True)
        if one is None:
            return
        await self._settle(one.thing, one.client)
        content, data = self.contents[one.thing], self._bytes(length)
        self.written.add(one.thing)
        assert await one.file.write(data, offset) == length
        content.accept(one.client, len(content.data) if one.flags & os.O_APPEND else offset, data)

    async def _burst(self, index: int, places: list[tuple[int, int]]) -> None:
        """Write without a pause, then look."""
        for offset, length in places:
            await self._write(index, offset, length)
        one = self._handle(index, writes=True)
        if one is not None and one.flags & os.O_ACCMODE == os.O_RDWR:
            await one.file.stat()
            await self._compare_data(one.file, one.thing)

    async def _append_together(self, path: str, *lengths: int) -> None:
        """Both clients append at once: both pieces are there, whole, in one order or the other."""
        try:
            thing = self._find(path)
        except Refused:
            return
        if thing.is_dir:
            return
        await self._settle(thing, -1)
        self.written.add(thing)
        pieces = [self._bytes(length) for length in lengths]

        async def append(client: Client, data: bytes) -> None:
            async with await client.fs.open(path, os.O_WRONLY | os.O_APPEND) as file:
                assert await file.write(data, 0) == len(data)

        async with trio.open_nursery() as nursery:
            for client, data in zip(self.clients, pieces, strict=True):
                nursery.start_soon(append, client, data)
        content = self.contents[thing]
        async with await self.clients[0].fs.open(path) as file:
            end = await file.read(sum(lengths), len(content.data))
        assert end in (pieces[0] + pieces[1], pieces[1] + pieces[0])
        content.write(len(content.data), end)

    async def _write_while_cut(self, path: str, offset: int, length: int, size: int) -> None:
        """One client writes while the other truncates: either may come first, and what is cut off stays away."""
        try:
            thing = self._find(path)
        except Refused:
            return
        if thing.is_dir:
            return
        await self._settle(thing, -1)
        self.written.add(thing)
        content, data = self.contents[thing], self._bytes(length)
        old = bytes(content.data)

        async def write() -> None:
            async with await self.clients[0].fs.open(path, os.O_WRONLY) as file:
                assert await file.write(data, offset) == length

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await self.clients[1].fs.setattr(path, size=size)
        async with await self.clients[1].fs.open(path) as file:
            found = await file.read(len(old) + 2 * SIZE_MAX, 0)
        end = offset + length if data else 0
        assert len(found) in (size, max(size, end))
        cut = old[:size].ljust(len(found), b"\0")[: len(found)]
        new = bytearray(cut)
        new[offset : min(end, len(found))] = data[: max(0, len(found) - offset)]
        assert len(new) == len(found)
        # The truncation may take a part of the chunks before they are written, but nothing before its size.
        assert found[:size] == new[:size]
        for byte, before, after in zip(found[size:], cut[size:], new[size:], strict=True):
            assert byte in (before, after)
        content.data[:] = found
        content.blocks = None

    async def _read(self, index: int, offset: int, length: int) -> None:
        one = self._handle(index)
        if one is None:
            return
        await self._settle(one.thing, one.client)
        await one.file.stat()
        assert await one.file.read(length, offset) == self.contents[one.thing].data[offset : offset + length]

    async def _fsync(self, index: int) -> None:
        one = self._handle(index)
        if one is not None:
            await one.file.fsync()
            self.contents[one.thing].dirty.discard(one.client)

    async def _stat_handle(self, index: int) -> None:
        one = self._handle(index)
        if one is not None:
            await self._settle(one.thing, one.client)
            await self._count(one.thing)
            self._compare(one.thing, await one.file.stat())
            self.contents[one.thing].dirty.discard(one.client)

    async def _count(self, thing: Thing) -> None:
        """Wait until the blocks of a file that nobody has open are counted right."""
        if thing in self.uncounted and not thing.handles:
            await self.rest()
            self.uncounted.discard(thing)

    def _compare(self, thing: Thing, attrs: Any) -> None:
        """Compare attributes with the model, after everything was flushed."""
        assert self.inos.setdefault(thing, attrs.ino) == attrs.ino
        assert (attrs.nlink, stat.S_IFMT(attrs.mode)) == (thing.nlink, thing.kind)
        content = self.contents.get(thing)
        if content is not None:
            assert attrs.size == len(content.data)
            if content.blocks is not None and thing not in self.uncounted:
                assert attrs.allocated == len(content.blocks) * BLOCK, content.blocks

    async def _cut_handle(self, index: int, size: int) -> None:
        one = self._handle(index, writes=True)
        if one is not None:
            await self._settle(one.thing, one.client)
            await one.file.truncate(size)
            self.contents[one.thing].resize(size)

    async def _close(self, index: int) -> None:
        one = self._handle(index)
        if one is None:
            return
        if one.thing.names == 0 and one.flags & os.O_ACCMODE != os.O_WRONLY:  # nobody else will look at it
            await self._settle(one.thing, one.client)
            await one.file.stat()
            await self._compare_data(one.file, one.thing)
        self.handles.remove(one)
        await one.file.close()
        one.thing.handles -= 1
        self.contents[one.thing].dirty.discard(one.client)

    async def _cut(self, client: int, path: str, size: int) -> None:
        await self._settle_path(path, client)

        def model() -> None:
            thing = self._find(path)
            if thing.is_dir:
                raise Refused(errno.EISDIR)
            self.contents[thing].resize(size)

        await self._same(self.clients[client].fs.setattr(path, size=size), model)

    # Names.

    async def _mkdir(self, client: int, path: str) -> None:
        both = await self._same(self.clients[client].fs.mkdir(path), lambda: self._model_mkdir(path))
        if both is not None:
            attrs, thing = both
            self._compare(thing, attrs)

    def _model_mkdir(self, path: str) -> Thing:
        directory, name, _ = self._resolve(path)
        return self.tree.make(directory, name, stat.S_IFDIR)

    async def _make_together(self, path: str) -> None:
        """Both clients make the same name at once: one wins."""
        try:
            directory, name, thing = self._resolve(path)
        except Refused:
            return
        if thing is not None:
            return
        won: list[int] = []
        lost: list[Client] = []

        async def make(client: Client) -> None:
            try:
                async with await client.fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
                    won.append(file.ino)
            except Exists:
                lost.append(client)

        async with trio.open_nursery() as nursery:
            for client in self.clients:
                nursery.start_soon(make, client)
        ((ino,), (_,)) = won, lost
        thing = self.tree.make(directory, name, stat.S_IFREG)
        self.contents[thing], self.inos[thing] = Content(), ino

    async def _rmdir(self, client: int, path: str) -> None:
        await self._same(self.clients[client].fs.rmdir(path), lambda: self._model_rmdir(path))

    def _model_rmdir(self, path: str) -> None:
        directory, name, _ = self._resolve(path)
        self.tree.rmdir(directory, name)

    async def _unlink(self, client: int, path: str) -> None:
        await self._same(self.clients[client].fs.remove(path), lambda: self._model_unlink(path))

    def _model_unlink(self, path: str) -> None:
        directory, name, _ = self._resolve(path)
        self.tree.unlink(directory, name)

    async def _link(self, client: int, path: str, new_path: str) -> None:
        def model() -> None:
            thing = self._find(path)
            directory, name, _ = self._resolve(new_path)
            self.tree.link(thing, directory, name)

        await self._same(self.clients[client].fs.link(path, new_path), model)

    async def _rename(self, client: int, path: str, new_path: str, flags: int) -> None:
        real = self.clients[client].fs.rename(path, new_path, flags)
        await self._same(real, lambda: self._model_rename(path, new_path, flags))

    def _model_rename(self, path: str, new_path: str, flags: int) -> None:
        old_directory, old_name, _ = self._resolve(path)
        new_directory, new_name, _ = self._resolve(new_path)
        self.tree.rename(old_directory, old_name, new_directory, new_name, flags)

    async def _create(self, client: int, path: str) -> int:
        async with await self.clients[client].fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
            return file.ino

    def _model_create(self, path: str) -> Thing:
        directory, name, _ = self._resolve(path)
        thing = self.tree.make(directory, name, stat.S_IFREG)
        self.contents[thing] = Content()
        return thing

    async def _race(self, *racers: tuple[Any, ...]) -> None:
        """Both clients change names at once: each is answered as if one of them had come first, and so is the tree."""
        answers: list[Any] = [None, None]

        async def run(number: int) -> None:
            kind, *arguments = racers[number]
            fs = self.clients[number].fs
            try:
                match kind:
                    case "create":
                        answers[number] = await self._create(number, *arguments)
                    case "mkdir":
                        answers[number] = (await fs.mkdir(*arguments)).ino
                    case _:
                        calls: dict[str, Callable[..., Awaitable[None]]]
                        calls = {"rmdir": fs.rmdir, "unlink": fs.remove, "rename": fs.rename}
                        await calls[kind](*arguments)
            except FsError as error:
                answers[number] = errno.errorcode[error.errno]

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(run, number)
        before = self._state()
        for order in ((0, 1), (1, 0)):
            self._set_state(copy.deepcopy(before))
            if self._explains(racers, answers, order) and await self._is_the_tree(self.tree.root, "/"):
                return
        raise AssertionError(f"{racers} were answered {answers}")

    def _state(self) -> tuple[Any, ...]:
        return self.tree, self.contents, self.inos, self.uncounted, [one.thing for one in self.handles]

    def _set_state(self, state: tuple[Any, ...]) -> None:
        self.tree, self.contents, self.inos, self.uncounted, things = state
        self.handles = [one._replace(thing=thing) for one, thing in zip(self.handles, things, strict=True)]
        self.written &= self.contents.keys()

    def _explains(self, racers: tuple[tuple[Any, ...], ...], answers: list[Any], order: tuple[int, int]) -> bool:
        """Do both operations to the model, in an order; tell whether that explains the answers."""
        for number in order:
            kind, *arguments = racers[number]
            try:
                thing = getattr(self, f"_model_{kind}")(*arguments)
            except Refused as refused:
                if answers[number] != errno.errorcode[refused.number]:
                    return False
                continue
            if isinstance(answers[number], str):
                return False
            if thing is not None:
                self.inos[thing] = answers[number]
        return True

    async def _is_the_tree(self, directory: Thing, path: str) -> bool:
        """Tell whether the names of a directory, and all below, are what the model says."""
        found = {entry.name: entry async for entry in self.clients[0].fs.scandir(path)}
        if found.keys() != directory.entries.keys():
            return False
        for name, thing in directory.entries.items():
            if found[name].ino != self.inos.get(thing, found[name].ino):
                return False
            if thing.is_dir and not await self._is_the_tree(thing, f"{path}{os.fsdecode(name)}/"):
                return False
        return True

    async def _look(self, client: int, path: str) -> None:
        await self._settle_path(path, client)
        with suppress(Refused):
            await self._count(self._find(path))
        both = await self._same(self.clients[client].fs.stat(path), lambda: self._find(path))
        if both is None:
            return
        self._compare(both[1], both[0])
        if not both[1].is_dir:
            async with await self.clients[client].fs.open(path) as file:
                await self._compare_data(file, both[1])

    async def _list(self, client: int, path: str) -> None:
        def model() -> list[bytes]:
            thing = self._find(path)
            if not thing.is_dir:
                raise Refused(errno.ENOTDIR)
            return sorted(thing.entries)

        both = await self._same(self.clients[client].fs.listdir(path), model)
        if both is not None:
            assert both[0] == both[1]

    # Stores that fail.

    @asynccontextmanager
    async def _broken(self, rates: Rates) -> AsyncIterator[Callable[[], int]]:
        """Have the chunk stores fail for a while; yields what counts how often they did."""
        for thing in self.contents:
            await self._settle(thing, -1)
        await self.rest()
        before = sum(sum(store.struck.values()) for store in self.whole.chunks)
        for store in self.whole.chunks:
            store.rates = rates
        try:
            yield lambda: sum(sum(store.struck.values()) for store in self.whole.chunks) - before
        finally:
            for store in self.whole.chunks:
                store.rates = Rates()

    async def _write_broken(self, index: int, offset: int, length: int, kind: str) -> None:
        """Write while writes fail: each byte is the old or the new one, and whoever has the file open is told, once."""
        one = self._handle(index, writes=True)
        if one is None or one.flags & os.O_APPEND:
            return
        thing, content, data = one.thing, self.contents[one.thing], self._bytes(length)
        await self._settle(thing, -1)
        failed = False
        async with self._broken(Rates(**{kind: 0.7})) as struck:
            try:
                await one.file.write(data, offset)
            except FsError:
                failed = True
            await self.clients[one.client].files.getattr(self.inos[thing])
            faults = struck()
        sharing = [other for other in self.handles if other.thing is thing]
        for other in sharing:
            told = other.client == one.client and bool(faults) and not failed
            for wanted in (told, False):
                try:
                    await other.file.fsync()
                    reported = False
                except FsError:
                    reported = True
                assert reported == wanted
        old, new = bytes(content.data), Content()
        new.data[:] = old
        new.write(offset, data)
        attrs = await one.file.stat()
        found = await one.file.read(attrs.size, 0)
        assert len(old) <= len(found) <= len(new.data)
        for byte, before, after in zip(found, old.ljust(len(found), b"\0"), new.data, strict=False):
            assert byte in (before, after)
        if not faults:
            assert found == new.data
            content.write(offset, data)
        else:
            content.data[:] = found
            content.blocks = None
            for _ in sharing:
                await self._close(next(number for number, other in enumerate(self.handles) if other.thing is thing))
            await self.rest()

    async def _cut_broken(self, client: int, path: str, size: int) -> None:
        """Truncate while that fails: whoever asked is told, and it is done all the same."""
        try:
            thing = self._find(path)
        except Refused:
            return
        if thing.is_dir:
            return
        await self._settle(thing, -1)
        async with self._broken(Rates(failure=0.5)) as struck:
            try:
                await self.clients[client].fs.setattr(path, size=size)
            except FsError:
                assert struck()
        self.contents[thing].resize(size)
        await self.rest()

    async def _die(self, client: int) -> None:
        """Kill a client: of what it has accepted each byte is there or not, and of the rest nothing is left."""
        for thing, content in self.contents.items():
            if any(one.thing is thing and one.client != client for one in self.handles):
                await self._settle(thing, -1)  # as long as somebody else has it open, nobody can tidy up
            elif content.dirty:
                await self._settle(thing, client)
        doubtful = {thing for thing, content in self.contents.items() if content.dirty}
        for one in [one for one in self.handles if one.client == client]:
            self.handles.remove(one)
            one.thing.handles -= 1
        self.clients[client].node.kill()
        self._lives[client].cancel()
        await self._nursery.start(self._live, client)
        await trio.sleep(2 * RETURN_S)
        await self.rest()
        for thing in doubtful:
            content = self.contents[thing]
            content.dirty.clear()
            self.uncounted.discard(thing)
            if thing.names == 0:
                continue
            attrs = await self.clients[client].files.getattr(self.inos[thing])
            handle = await self.clients[client].files.open(self.inos[thing], os.O_RDONLY)
            found = bytearray(attrs.size)
            assert await self.clients[client].files.read(handle, 0, memoryview(found)) == attrs.size
            await self.clients[client].files.release(handle)
            assert len(content.flushed) <= len(found) <= len(content.data)
            for byte, before, touched in zip(
                found, content.flushed.ljust(len(found), b"\0"), content.touched.ljust(len(found), b"\0"), strict=False
            ):
                assert touched or byte == before
            content.data[:] = found
            content.blocks = None

    async def _wait(self, seconds: float) -> None:
        await trio.sleep(seconds)

    # The end.

    async def rest(self) -> None:
        """Wait until nothing goes on behind anybody's back."""
        with trio.fail_after(REST_S):
            for _ in range(3):
                for daemon in self.whole.cluster.daemons:
                    await self.whole.service(daemon).metadata.wait_idle()
                    await daemon.sessions.wait_grace_over()

    async def finish(self) -> None:
        """Close everything, then look at all there is."""
        while self.handles:
            await self._close(0)
        await self.rest()
        for client in self.clients:
            await self._compare_tree(client, self.tree.root, "/")
            counts = client.files.statistics()
            assert (counts.handles, counts.files, counts.dirty, counts.accepted_bytes) == (0, 0, 0, 0)
            assert client.files.opens() == []
        await self.rest()
        for daemon in self.whole.cluster.daemons:
            metadata = self.whole.service(daemon).metadata
            assert (metadata.orphans, metadata.to_drop, metadata.prepared, metadata.locked) == (0, 0, 0, 0)
            assert all(status.opens == 0 for status in daemon.sessions.statuses())
            assert self.whole.service(daemon).chunks.pool.lent_bytes == 0
        for links in [client.links for client in self.clients] + [one.links for one in self.whole.cluster.daemons]:
            assert all(state.in_flight == 0 for state in links.statistics())
        stored = [
            Stored(daemon.store, {chunk: record for chunk, (record, _) in store.contents().items()})
            for daemon, store in zip(self.whole.cluster.daemons, self.whole.stores, strict=True)
        ]
        found = complaints(stored, self.whole.cluster.shard_map, clients=len(self.clients))
        assert not found, found

    async def _compare_tree(self, client: Client, directory: Thing, path: str) -> None:
        assert await client.fs.listdir(path) == sorted(directory.entries)
        for name, thing in directory.entries.items():
            below = f"{path}{os.fsdecode(name)}"
            await self._count(thing)
            self._compare(thing, await client.fs.stat(below))
            if thing.is_dir:
                await self._compare_tree(client, thing, below + "/")
            else:
                async with await client.fs.open(below) as file:
                    await self._compare_data(file, thing)


async def run_plan(plan: list[tuple[Any, Any]], daemons: int, seed: int, gather_bytes: int) -> None:
    """Run a plan on a cluster of its own, and look at everything at the end."""
    async with whole_cluster(daemons, seed=seed) as whole, trio.open_nursery() as nursery:
        run = Run(whole, nursery, gather_bytes)
        await run.start()
        for path in ("/p", "/q", "/p/r"):
            await run.do(("mkdir", 0, path), [])
        for client, path in enumerate(("/a", "/p/a")):
            await run.do(("open", client, path, os.O_RDWR | os.O_CREAT), [])
        for operation, faults in plan:
            await run.do(operation, faults)
        await run.finish()
        nursery.cancel_scope.cancel()


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with so many plans."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        chosen = given(
            plan=PLAN,
            daemons=st.sampled_from([2, 3, 1]),
            seed=st.integers(0, 1 << 16),
            gather_bytes=st.sampled_from([0, 2 * CHUNK, 1 << 20]),
        )
        slow = [HealthCheck.data_too_large, HealthCheck.too_slow]
        return settings(max_examples=count, deadline=None, print_blob=True, suppress_health_check=slow)(chosen(test))

    return decorate


@examples(20)
def test_the_cluster_does_what_a_plain_model_does(
    plan: list[tuple[Any, Any]], daemons: int, seed: int, gather_bytes: int
) -> None:
    trio.run(run_plan, plan, daemons, seed, gather_bytes, clock=MockClock(autojump_threshold=0))


@pytest.mark.slow
@examples(600)
def test_the_cluster_does_so_for_many_plans(
    plan: list[tuple[Any, Any]], daemons: int, seed: int, gather_bytes: int
) -> None:
    trio.run(run_plan, plan, daemons, seed, gather_bytes, clock=MockClock(autojump_threshold=0))


def test_a_write_that_was_sent_twice_is_counted_once() -> None:
    plan = [
        (("open", 0, "/a", os.O_RDWR | os.O_CREAT), []),
        (("write", 0, 0, CHUNK), [("lose_reply", 0)]),
        (("close", 0), []),
        (("look", 1, "/a"), []),
    ]
    for daemons in (1, 3):
        trio.run(run_plan, plan, daemons, 0, 0, clock=MockClock(autojump_threshold=0))
