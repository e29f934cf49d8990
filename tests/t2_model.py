"""Two clients of a whole cluster do random things while connections break, daemons die and chunk stores fail.

After each operation the cluster must have answered as a plain model does: a tree of Python objects (reference_tree.py)
and a bytearray for each file. The model knows no faults: what was acknowledged has happened, once. It keeps to the
contract of docs/semantics.md, close-to-open: before one client uses the data of a file, what the other has accepted of
it is flushed, as a program would have to see to by fsync, close or a lock of its own.

A failing plan is shrunk and printed by Hypothesis; it holds the seeds of everything that is left to chance.
"""

import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
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
from benchfs_fuse.rpc.messages import RENAME_EXCHANGE, RENAME_NOREPLACE

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

    def write(self, offset: int, data: bytes) -> None:
        """Write, with zeros before it if it lies behind the end."""
        if not data:
            return
        self.data.extend(bytes(max(0, offset - len(self.data))))
        self.data[offset : offset + len(data)] = data
        if self.blocks is not None:
            self.blocks |= set(range(offset // BLOCK, (offset + len(data) - 1) // BLOCK + 1))

    def resize(self, size: int) -> None:
        """Cut or extend."""
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
PATH = st.sampled_from(["/p", "/q", "/p/r", "/a", "/b", "/p/a", "/p/b", "/q/a", "/q/b", "/p/r/a", "/q/r"])
HANDLE = st.integers(0, HANDLES_MAX - 1)
OFFSET = st.one_of(st.sampled_from([0, 1, BLOCK, CHUNK - 1, CHUNK, 2 * CHUNK]), st.integers(0, SIZE_MAX))
LENGTH = st.one_of(st.sampled_from([0, 1, BLOCK, CHUNK]), st.integers(0, CHUNK + BLOCK))
RENAME_FLAGS = st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE])
FLAGS = st.sampled_from(
    [
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        os.O_RDWR | os.O_CREAT | os.O_APPEND,
        os.O_RDWR | os.O_DIRECT,
        os.O_RDWR,
        os.O_RDONLY,
    ]
)
#: Operations and how often each comes, compared with the others.
OPERATIONS = (
    (4, st.tuples(st.just("open"), CLIENT, PATH, FLAGS)),
    (8, st.tuples(st.just("write"), HANDLE, OFFSET, LENGTH)),
    (2, st.tuples(st.just("read"), HANDLE, OFFSET, LENGTH)),
    (1, st.tuples(st.just("fsync"), HANDLE)),
    (2, st.tuples(st.just("stat_handle"), HANDLE)),
    (2, st.tuples(st.just("cut_handle"), HANDLE, OFFSET)),
    (1, st.tuples(st.just("close"), HANDLE)),
    (2, st.tuples(st.just("append_together"), PATH, LENGTH, LENGTH)),
    (2, st.tuples(st.just("cut"), CLIENT, PATH, OFFSET)),
    (2, st.tuples(st.just("mkdir"), CLIENT, PATH)),
    (1, st.tuples(st.just("rmdir"), CLIENT, PATH)),
    (2, st.tuples(st.just("unlink"), CLIENT, PATH)),
    (2, st.tuples(st.just("link"), CLIENT, PATH, PATH)),
    (4, st.tuples(st.just("rename"), CLIENT, PATH, PATH, RENAME_FLAGS)),
    (2, st.tuples(st.just("look"), CLIENT, PATH)),
    (1, st.tuples(st.just("list"), CLIENT, PATH)),
    (1, st.tuples(st.just("make_together"), PATH)),
    (
        1,
        st.tuples(st.just("write_broken"), HANDLE, OFFSET, LENGTH, st.sampled_from(["no_space", "failure", "partial"])),
    ),
    (1, st.tuples(st.just("cut_broken"), CLIENT, PATH, OFFSET)),
    (1, st.tuples(st.just("wait"), st.floats(0.0, 3.0))),
)


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Choose among strategies, each as often as its weight says (one_of would count the same strategy once)."""
    numbers = [number for number, (weight, _) in enumerate(choices) for _ in range(weight)]
    return st.sampled_from(numbers).flatmap(lambda number: choices[number][1])


OPERATION = weighted(*OPERATIONS)
TURNS = st.integers(0, 40)
FAULT = weighted(
    (8, st.none()),
    (1, st.tuples(st.just("lose_request"), st.integers(1, 3))),
    (1, st.tuples(st.just("lose_reply"), st.integers(1, 3))),
    (1, st.tuples(st.just("restart"), st.integers(0, 2), TURNS)),
    (1, st.tuples(st.just("restart_all"), TURNS)),
)
PLAN = st.lists(st.tuples(OPERATION, FAULT), min_size=25, max_size=60)


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Run:
    """Do a plan to the cluster and to the model, and compare every answer."""

    def __init__(self, whole: Whole, clients: list[Client]) -> None:
        self.whole = whole
        self.clients = clients
        self.tree = Tree()
        self.contents: dict[Thing, Content] = {}
        self.inos: dict[Thing, int] = {}
        self.handles: list[Opened] = []
        #: Files whose blocks may be counted wrong, after a fault, until nobody has them open.
        self.uncounted: set[Thing] = set()
        self._writes = 0

    async def do(self, operation: tuple[Any, ...], fault: tuple[Any, ...] | None) -> None:
        """Do one operation while a fault strikes."""
        name, *arguments = operation
        call = getattr(self, f"_{name}")
        if fault is None or "broken" in name:
            await call(*arguments)
            return
        try:
            await self._do_under(fault, call, arguments)
        finally:
            self.uncounted.update(self.contents)

    async def _do_under(self, fault: tuple[Any, ...], call: Callable[..., Awaitable[None]], arguments: Any) -> None:
        kind, *details = fault
        if kind in ("lose_request", "lose_reply"):
            for _ in range(details[0]):
                getattr(self.whole.network, kind)()
            await call(*arguments)
            self.whole.network.lose_nothing()
            return
        daemons = self.whole.cluster.daemons
        victims = daemons if kind == "restart_all" else [daemons[details[0] % len(daemons)]]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, *arguments)
            for _ in range(details[-1]):
                await trio.lowlevel.checkpoint()
            for victim in victims:
                await victim.kill()
            for victim in victims:
                await victim.start()

    # The model's side.

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
        expected = answer = None
        wanted = found = 0
        try:
            expected = model()
        except Refused as refused:
            wanted = refused.number
        try:
            answer = await real
        except FsError as error:
            found = error.errno
        assert errno.errorcode.get(found) == errno.errorcode.get(wanted)
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
        assert await one.file.write(data, offset) == length
        content.write(len(content.data) if one.flags & os.O_APPEND else offset, data)
        content.dirty.add(one.client)

    async def _append_together(self, path: str, *lengths: int) -> None:
        """Both clients append at once: both pieces are there, whole, in one order or the other."""
        try:
            thing = self._find(path)
        except Refused:
            return
        if thing.is_dir:
            return
        await self._settle(thing, -1)
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
                assert attrs.allocated == len(content.blocks) * BLOCK

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
        def model() -> Thing:
            directory, name, _ = self._resolve(path)
            return self.tree.make(directory, name, stat.S_IFDIR)

        both = await self._same(self.clients[client].fs.mkdir(path), model)
        if both is not None:
            attrs, thing = both
            self._compare(thing, attrs)

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
        def model() -> None:
            directory, name, _ = self._resolve(path)
            self.tree.rmdir(directory, name)

        await self._same(self.clients[client].fs.rmdir(path), model)

    async def _unlink(self, client: int, path: str) -> None:
        def model() -> None:
            directory, name, _ = self._resolve(path)
            self.tree.unlink(directory, name)

        await self._same(self.clients[client].fs.remove(path), model)

    async def _link(self, client: int, path: str, new_path: str) -> None:
        def model() -> None:
            thing = self._find(path)
            directory, name, _ = self._resolve(new_path)
            self.tree.link(thing, directory, name)

        await self._same(self.clients[client].fs.link(path, new_path), model)

    async def _rename(self, client: int, path: str, new_path: str, flags: int) -> None:
        def model() -> None:
            old_directory, old_name, _ = self._resolve(path)
            new_directory, new_name, _ = self._resolve(new_path)
            self.tree.rename(old_directory, old_name, new_directory, new_name, flags)

        await self._same(self.clients[client].fs.rename(path, new_path, flags), model)

    async def _look(self, client: int, path: str) -> None:
        await self._settle_path(path, client)
        with suppress(Refused):
            await self._count(self._find(path))
        both = await self._same(self.clients[client].fs.stat(path), lambda: self._find(path))
        if both is not None:
            self._compare(both[1], both[0])

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
        assert complaints(stored, self.whole.cluster.shard_map, clients=len(self.clients)) == []

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
                    assert await file.read(2 * SIZE_MAX, 0) == self.contents[thing].data


async def run_plan(plan: list[tuple[Any, Any]], daemons: int, seed: int, gather_bytes: int) -> None:
    """Run a plan on a cluster of its own, and look at everything at the end."""
    async with (
        whole_cluster(daemons, seed=seed) as whole,
        whole.client(gather_bytes_max=gather_bytes) as one,
        whole.client(gather_bytes_max=gather_bytes) as two,
    ):
        run = Run(whole, [one, two])
        for path in ("/p", "/q", "/p/r"):
            await run.do(("mkdir", 0, path), None)
        for client, path in enumerate(("/a", "/p/a")):
            await run.do(("open", client, path, os.O_RDWR | os.O_CREAT), None)
        for operation, fault in plan:
            await run.do(operation, fault)
        await run.finish()


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with so many plans."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        chosen = given(
            plan=PLAN,
            daemons=st.sampled_from([1, 2, 3]),
            seed=st.integers(0, 1 << 16),
            gather_bytes=st.sampled_from([0, 2 * CHUNK, 1 << 20]),
        )
        slow = [HealthCheck.data_too_large, HealthCheck.too_slow]
        return settings(max_examples=count, deadline=None, print_blob=True, suppress_health_check=slow)(chosen(test))

    return decorate


@examples(60)
def test_the_cluster_does_what_a_plain_model_does(
    plan: list[tuple[Any, Any]], daemons: int, seed: int, gather_bytes: int
) -> None:
    trio.run(run_plan, plan, daemons, seed, gather_bytes, clock=MockClock(autojump_threshold=0))


@pytest.mark.slow
@examples(800)
def test_the_cluster_does_so_for_many_plans(
    plan: list[tuple[Any, Any]], daemons: int, seed: int, gather_bytes: int
) -> None:
    trio.run(run_plan, plan, daemons, seed, gather_bytes, clock=MockClock(autojump_threshold=0))


def test_a_write_that_was_sent_twice_is_counted_once() -> None:
    plan = [
        (("open", 0, "/a", os.O_RDWR | os.O_CREAT), None),
        (("write", 0, 0, CHUNK), ("lose_reply", 1)),
        (("close", 0), None),
        (("look", 1, "/a"), None),
    ]
    for daemons in (1, 3):
        trio.run(run_plan, plan, daemons, 0, 0, clock=MockClock(autojump_threshold=0))
