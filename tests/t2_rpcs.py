"""Count the requests of every operation, those between daemons included: the table in docs/design.md, and its truth.

``TABLE`` is the one source. Each row says what an operation costs; its scenario does the operation in clusters of
several sizes, where the daemons' own counters must say the same. So what a row gives without N does not grow with the
number of daemons. The page in docs/ holds ``rendered(TABLE)``.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from trio.testing import wait_all_tasks_blocked
from whole import CHUNK, Client, Whole, whole_cluster

from benchfs_fuse.errors import NoSpace
from benchfs_fuse.limits import READDIR_ENTRIES_MAX
from benchfs_fuse.model import LOCK_END, ROOT_INO, Attrs, LockKind, LockType
from benchfs_fuse.rpc.messages import REQUESTS, Expel, Goodbye, Heartbeat, Hello, LockGranted, Reclaim, Status
from benchfs_fuse.services.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Handle

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"

#: What keeps sessions, and what people ask; no operation of a file system.
_BESIDES = {cls.__name__ for cls in (Hello, Heartbeat, Reclaim, Goodbye, Expel, Status)}

#: Sizes of the clusters that are measured.
DAEMONS = (2, 3, 8)

# ── where it is measured ─────────────────────────────────────────────────────────────────────────────────────────────


class Stage:
    """Hold a cluster with one client, and make what scenarios need. Daemon 0 is the root's."""

    def __init__(self, whole: Whole, client: Client) -> None:
        self.whole = whole
        self.files = client.files
        self.locks = client.locks
        self.namespace = client.namespace
        self.daemons = len(whole.cluster.daemons)
        self.last = self.daemons - 1
        self._names = count()
        self.before = Counter[str]()
        self.at_answer = Counter[str]()
        self.at_rest = Counter[str]()

    def name(self) -> bytes:
        """Return a name that is not in use."""
        return b"%d" % next(self._names)

    async def directory(self, daemon_id: int, parent: int = ROOT_INO) -> int:
        """Make a directory whose inode is on a daemon."""
        while True:
            attrs = await self.namespace.make(parent, self.name(), stat.S_IFDIR | 0o755, 0, 0)
            if self.home(attrs.ino) == daemon_id:
                return attrs.ino

    def home(self, ino: int) -> int:
        """Return the daemon of an inode."""
        return self.whole.cluster.shard_map.of_ino(ino)

    async def entry(self, parent: int, mode: int = stat.S_IFREG) -> tuple[bytes, Attrs]:
        """Make something under a new name, and say which."""
        name = self.name()
        return name, await self.namespace.make(parent, name, mode | 0o644, 0, 0, target=b"t" * stat.S_ISLNK(mode))

    async def moved(self, parent: int, origin: int) -> tuple[bytes, Attrs]:
        """Make a file in directory ``origin`` and move it into ``parent``."""
        name, attrs = await self.entry(origin)
        await self.namespace.rename(origin, name, parent, name, 0)
        return name, attrs

    async def written(self, parent: int, chunks: int = 1) -> tuple[bytes, Handle]:
        """Make a file with so many chunks, flushed; its only chunk is not with its inode. It is open for writing."""
        while True:
            name = self.name()
            handle = await self.files.create(parent, name, 0o644, 0, 0, os.O_RDWR)
            first = self.whole.cluster.shard_map.of_chunk(handle.ino, 0, handle.node.width)
            if chunks > 1 or first != self.home(handle.ino):
                break
        await self.files.write(handle, 0, bytes(chunks * CHUNK))
        await self.files.flush(handle)
        return name, handle

    async def closed(self, parent: int, chunks: int = 1) -> tuple[bytes, int]:
        """Make a file with so many chunks and close it."""
        name, handle = await self.written(parent, chunks)
        await self.files.release(handle)
        return name, handle.ino

    async def rest(self) -> Counter[str]:
        """Wait until nothing is under way; return the requests that the daemons have served."""
        await wait_all_tasks_blocked()
        for daemon in self.whole.cluster.daemons:
            await self.whole.service(daemon).metadata.wait_idle()
        await wait_all_tasks_blocked()
        return self.served()

    def served(self) -> Counter[str]:
        """Return the requests that the daemons have served so far."""
        total = Counter[str]()
        for daemon in self.whole.cluster.daemons:
            total.update(daemon.server.requests)
        total[LockGranted.__name__] = self.whole.network.calls[LockGranted.op]  # which clients serve
        return Counter({name: number for name, number in total.items() if name not in _BESIDES})

    @asynccontextmanager
    async def measured(self) -> AsyncIterator[None]:
        """Count what the block asks for, until it is answered and until nothing is left of it."""
        before = await self.rest()
        yield
        self.at_answer = self.served() - before
        self.at_rest = await self.rest() - before


Scenario = Callable[[Stage], Awaitable[None]]


class Row(NamedTuple):
    """Say what an operation costs: ``requests`` until it is answered, ``behind`` after that.

    A cost is a sum of requests, each with a factor: ``2 Lookup + N Usage + N−1 TrimChunks``, N being the daemons of the
    cluster. ``daemons_min``: the scenario needs so many.
    """

    operation: str
    requests: str
    behind: str
    scenario: Scenario
    daemons_min: int = 2


#: One term of a cost: factor in daemons, factor, request.
_TERM = re.compile(r"(?:(N)(−\d+)?|(\d+))?\s*([A-Z][A-Za-z]+)")


def terms(cost: str) -> list[tuple[int, int, str]]:
    """Read a cost: for each request how many there are per daemon, and how many besides."""
    found = []
    for term in filter(None, cost.split(" + ")):
        match = _TERM.fullmatch(term)
        assert match is not None, term
        per_daemon, less, factor, request = match.groups()
        assert request in {cls.__name__ for cls in REQUESTS.values()}, request
        if per_daemon:
            found.append((1, int(less.replace("−", "-")) if less else 0, request))
        else:
            found.append((0, int(factor or 1), request))
    return found


def counted(cost: str, daemons: int) -> Counter[str]:
    """Return the requests of a cost in a cluster of so many daemons."""
    total = Counter[str]()
    for per_daemon, besides, request in terms(cost):
        total[request] += per_daemon * daemons + besides
    return total


def summed(cost: str) -> str:
    """Add up the terms of a cost: a number, or a number of daemons and another."""
    per_daemon = sum(term[0] for term in terms(cost))
    besides = sum(term[1] for term in terms(cost))
    if not per_daemon:
        return str(besides)
    factor = "N" if per_daemon == 1 else f"{per_daemon}N"
    return factor + (f"+{besides}" if besides > 0 else f"−{-besides}" if besides else "")


# ── the scenarios ────────────────────────────────────────────────────────────────────────────────────────────────────


async def lookup_file(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, _ = await stage.entry(parent)
    async with stage.measured():
        await stage.namespace.lookup(parent, name)


async def lookup_elsewhere(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, _ = await stage.moved(parent, await stage.directory(0))
    async with stage.measured():
        await stage.namespace.lookup(parent, name)


async def getattr_(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last))
    async with stage.measured():
        await stage.files.getattr(attrs.ino)


async def setattr_(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last))
    async with stage.measured():
        await stage.files.setattr(attrs.ino, mode=0o600, uid=1)


async def extend(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last))
    async with stage.measured():
        await stage.files.setattr(attrs.ino, size=1 << 40)


async def truncate_one(stage: Stage) -> None:
    _, ino = await stage.closed(await stage.directory(stage.last))
    async with stage.measured():
        await stage.files.setattr(ino, size=0)


async def truncate_many(stage: Stage) -> None:
    _, ino = await stage.closed(await stage.directory(stage.last), 2 * stage.daemons)
    async with stage.measured():
        await stage.files.setattr(ino, size=0)


async def create(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    async with stage.measured():
        await stage.files.create(parent, b"new", 0o644, 0, 0, os.O_RDWR)


async def open_(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last))
    async with stage.measured():
        await stage.files.open(attrs.ino, os.O_RDWR)


async def close_unchanged(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last))
    handle = await stage.files.open(attrs.ino, os.O_RDWR)
    async with stage.measured():
        await stage.files.flush(handle)
        await stage.files.release(handle)


async def read_chunk(stage: Stage) -> None:
    _, ino = await stage.closed(await stage.directory(stage.last))
    handle = await stage.files.open(ino, os.O_RDONLY | os.O_NOATIME)
    async with stage.measured():
        await stage.files.read(handle, 0, memoryview(bytearray(CHUNK)))


async def read_first(stage: Stage) -> None:
    _, ino = await stage.closed(await stage.directory(stage.last))
    handle = await stage.files.open(ino, os.O_RDONLY)
    async with stage.measured():
        await stage.files.read(handle, 0, memoryview(bytearray(CHUNK)))


async def read_end(stage: Stage) -> None:
    _, ino = await stage.closed(await stage.directory(stage.last))
    handle = await stage.files.open(ino, os.O_RDONLY | os.O_NOATIME)
    async with stage.measured():
        await stage.files.read(handle, CHUNK, memoryview(bytearray(CHUNK)))


async def write_gathered(stage: Stage) -> None:
    handle = await stage.files.create(await stage.directory(stage.last), b"f", 0o644, 0, 0, os.O_RDWR)
    async with stage.measured():
        await stage.files.write(handle, 0, b"some")


async def write_direct(stage: Stage) -> None:
    handle = await stage.files.create(await stage.directory(stage.last), b"f", 0o644, 0, 0, os.O_RDWR | os.O_DIRECT)
    async with stage.measured():
        await stage.files.write(handle, 0, bytes(CHUNK))


async def flush(stage: Stage) -> None:
    handle = await stage.files.create(await stage.directory(stage.last), b"f", 0o644, 0, 0, os.O_RDWR)
    for position in range(0, CHUNK // 2, CHUNK // 8):
        await stage.files.write(handle, position, bytes(CHUNK // 8))
    async with stage.measured():
        await stage.files.flush(handle)


async def setattr_of_written(stage: Stage) -> None:
    handle = await stage.files.create(await stage.directory(stage.last), b"f", 0o644, 0, 0, os.O_RDWR)
    await stage.files.write(handle, 0, b"some")
    async with stage.measured():
        attrs = await stage.files.setattr(handle.ino, mode=0o600, mtime_ns=7)
    assert (attrs.size, attrs.mode & 0o777, attrs.mtime_ns) == (4, 0o600, 7)


async def fsync_written(stage: Stage) -> None:
    handle = await stage.files.create(await stage.directory(stage.last), b"f", 0o644, 0, 0, os.O_RDWR)
    await stage.files.write(handle, 0, b"some")
    async with stage.measured():
        await stage.files.fsync(handle)


async def fsync_opened(stage: Stage) -> None:
    _, ino = await stage.closed(await stage.directory(stage.last), 2 * stage.daemons)
    handle = await stage.files.open(ino, os.O_RDONLY)
    async with stage.measured():
        await stage.files.fsync(handle)


async def append(stage: Stage) -> None:
    flags = os.O_WRONLY | os.O_APPEND
    handle = await stage.files.create(await stage.directory(stage.last), b"f", 0o644, 0, 0, flags)
    async with stage.measured():
        await stage.files.write(handle, 0, b"line\n")


async def allocate_one(stage: Stage) -> None:
    handle = await stage.files.create(await stage.directory(stage.last), b"f", 0o644, 0, 0, os.O_RDWR)
    async with stage.measured():
        await stage.files.fallocate(handle, 0, 0, CHUNK)


async def allocate_huge(stage: Stage) -> None:
    handle = await stage.files.create(await stage.directory(stage.last), b"f", 0o644, 0, 0, os.O_RDWR)
    async with stage.measured():
        with pytest.raises(NoSpace):
            await stage.files.fallocate(handle, 0, 0, 1 << 60)


async def punch_one(stage: Stage) -> None:
    _, handle = await stage.written(await stage.directory(stage.last))
    async with stage.measured():
        await stage.files.fallocate(handle, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, CHUNK // 2)


async def punch_sparse(stage: Stage) -> None:
    _, handle = await stage.written(await stage.directory(stage.last))
    await stage.files.setattr(handle.ino, size=1 << 40)
    async with stage.measured():
        await stage.files.fallocate(handle, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1 << 40)


async def seek(stage: Stage) -> None:
    _, handle = await stage.written(await stage.directory(stage.last))
    await stage.files.setattr(handle.ino, size=1 << 40)
    async with stage.measured():
        assert await stage.files.seek(handle, 0, os.SEEK_HOLE) == CHUNK


async def copy_one(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    _, source = await stage.closed(parent)
    daemon_of = stage.whole.cluster.shard_map.of_chunk
    while True:
        target = await stage.files.create(parent, stage.name(), 0o644, 0, 0, os.O_RDWR)
        width = target.node.width
        if daemon_of(target.ino, 0, width) != daemon_of(source, 0, width):
            break
    handle = await stage.files.open(source, os.O_RDONLY | os.O_NOATIME)
    async with stage.measured():
        assert await stage.files.copy_range(handle, 0, target, 0, 1 << 40) == CHUNK


async def unlink_empty(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, _ = await stage.entry(parent)
    async with stage.measured():
        await stage.namespace.unlink(parent, name)


async def unlink_chunk(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, _ = await stage.closed(parent)
    async with stage.measured():
        await stage.namespace.unlink(parent, name)


async def unlink_chunks(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, _ = await stage.closed(parent, 2 * stage.daemons)
    async with stage.measured():
        await stage.namespace.unlink(parent, name)


async def unlink_elsewhere(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, _ = await stage.moved(parent, await stage.directory(0))
    async with stage.measured():
        await stage.namespace.unlink(parent, name)


async def close_unlinked(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, handle = await stage.written(parent)
    await stage.namespace.unlink(parent, name)
    async with stage.measured():
        await stage.files.release(handle)


async def mkdir(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    await stage.directory(stage.last, parent)  # the next one goes to the next daemon
    async with stage.measured():
        made = await stage.namespace.make(parent, b"new", stat.S_IFDIR | 0o755, 0, 0)
    assert stage.home(made.ino) != stage.last


async def rmdir(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, attrs = await stage.entry(parent, stat.S_IFDIR)
    while stage.home(attrs.ino) == stage.last:
        name, attrs = await stage.entry(parent, stat.S_IFDIR)
    async with stage.measured():
        await stage.namespace.rmdir(parent, name)


async def mkdir_deep(stage: Stage) -> None:
    deep = await stage.directory(stage.last, await stage.directory(stage.last))
    async with stage.measured():
        made = await stage.namespace.make(deep, b"new", stat.S_IFDIR | 0o755, 0, 0)
    assert stage.home(made.ino) == stage.last


async def rmdir_deep(stage: Stage) -> None:
    deep = await stage.directory(stage.last, await stage.directory(stage.last))
    name, _ = await stage.entry(deep, stat.S_IFDIR)
    async with stage.measured():
        await stage.namespace.rmdir(deep, name)


async def rename_inside(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, _ = await stage.entry(parent)
    async with stage.measured():
        await stage.namespace.rename(parent, name, parent, b"new", 0)


async def rename_beside(stage: Stage) -> None:
    old, new = await stage.directory(stage.last), await stage.directory(stage.last)
    name, _ = await stage.entry(old)
    async with stage.measured():
        await stage.namespace.rename(old, name, new, b"new", 0)


async def rename_over(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, _ = await stage.entry(parent)
    victim, _ = await stage.closed(parent)
    async with stage.measured():
        await stage.namespace.rename(parent, name, parent, victim, 0)


async def rename_across(stage: Stage) -> None:
    old, new = await stage.directory(stage.last), await stage.directory(0)
    name, _ = await stage.entry(old)
    async with stage.measured():
        await stage.namespace.rename(old, name, new, b"new", 0)


async def rename_across_over(stage: Stage) -> None:
    old, new = await stage.directory(stage.last), await stage.directory(0)
    name, _ = await stage.entry(old)
    victim, _ = await stage.entry(new)
    async with stage.measured():
        await stage.namespace.rename(old, name, new, victim, 0)


async def rename_all_apart(stage: Stage) -> None:
    old, new = await stage.directory(stage.last), await stage.directory(0)
    name, _ = await stage.moved(old, await stage.directory(1))
    victim, _ = await stage.moved(new, await stage.directory(2))
    async with stage.measured():
        await stage.namespace.rename(old, name, new, victim, 0)


async def rename_moved(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    name, _ = await stage.moved(parent, await stage.directory(0))
    async with stage.measured():
        await stage.namespace.rename(parent, name, parent, b"new", 0)


async def move_directory(stage: Stage) -> None:
    old, new = await stage.directory(stage.last), await stage.directory(stage.last)
    name, attrs = await stage.entry(old, stat.S_IFDIR)
    while stage.home(attrs.ino) != stage.last:
        name, attrs = await stage.entry(old, stat.S_IFDIR)
    async with stage.measured():
        await stage.namespace.rename(old, name, new, name, 0)


async def move_directory_apart(stage: Stage) -> None:
    old, new = await stage.directory(1), await stage.directory(2)
    name, attrs = await stage.entry(old, stat.S_IFDIR)
    while stage.home(attrs.ino) != 3:
        name, attrs = await stage.entry(old, stat.S_IFDIR)
    async with stage.measured():
        await stage.namespace.rename(old, name, new, name, 0)


async def link_here(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    _, attrs = await stage.entry(parent)
    async with stage.measured():
        await stage.namespace.link(attrs.ino, parent, b"new")


async def link_elsewhere(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    _, attrs = await stage.entry(await stage.directory(0))
    async with stage.measured():
        await stage.namespace.link(attrs.ino, parent, b"new")


async def symlink(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    async with stage.measured():
        await stage.entry(parent, stat.S_IFLNK)


async def readlink(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last), stat.S_IFLNK)
    async with stage.measured():
        await stage.namespace.readlink(attrs.ino)


async def readdir(stage: Stage) -> None:
    parent = await stage.directory(stage.last)
    for _ in range(READDIR_ENTRIES_MAX):
        await stage.entry(parent)
    async with stage.measured():
        page = await stage.namespace.readdir(parent)
    assert page.end and len(page.entries) == READDIR_ENTRIES_MAX


async def readdir_elsewhere(stage: Stage) -> None:
    parent, origin = await stage.directory(stage.last), await stage.directory(0)
    for _ in range(5):
        await stage.moved(parent, origin)
        await stage.entry(parent)
    async with stage.measured():
        page = await stage.namespace.readdir(parent)
    assert len(page.entries) == 10


async def statfs(stage: Stage) -> None:
    async with stage.measured():
        await stage.namespace.space()


async def fsyncdir(stage: Stage) -> None:
    async with stage.measured():
        await stage.namespace.sync_names()


async def getxattr(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last))
    await stage.namespace.setxattr(attrs.ino, b"user.a", b"1")
    async with stage.measured():
        await stage.namespace.getxattr(attrs.ino, b"user.a")


async def setxattr(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last))
    async with stage.measured():
        await stage.namespace.setxattr(attrs.ino, b"user.a", b"1")


async def listxattr(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last))
    async with stage.measured():
        await stage.namespace.listxattr(attrs.ino)


async def removexattr(stage: Stage) -> None:
    _, attrs = await stage.entry(await stage.directory(stage.last))
    await stage.namespace.setxattr(attrs.ino, b"user.a", b"1")
    async with stage.measured():
        await stage.namespace.removexattr(attrs.ino, b"user.a")


async def lockable(stage: Stage) -> int:
    """Open a file and return its inode."""
    _, attrs = await stage.entry(await stage.directory(stage.last))
    await stage.files.open(attrs.ino, os.O_RDWR)
    return attrs.ino


async def lock(stage: Stage) -> None:
    ino = await lockable(stage)
    async with stage.measured():
        await stage.locks.set(ino, 1, LockKind.POSIX, LockType.WRITE, 0, 99)


async def lock_waited_for(stage: Stage) -> None:
    ino = await lockable(stage)
    await stage.locks.set(ino, 1, LockKind.POSIX, LockType.WRITE)
    async with stage.measured(), trio.open_nursery() as nursery:
        nursery.start_soon(stage.locks.set, ino, 2, LockKind.POSIX, LockType.WRITE)
        await wait_all_tasks_blocked()
        await stage.locks.set(ino, 1, LockKind.POSIX, LockType.UNLOCK)


async def lock_given_up(stage: Stage) -> None:
    ino = await lockable(stage)
    await stage.locks.set(ino, 1, LockKind.FLOCK, LockType.WRITE)
    async with stage.measured(), trio.open_nursery() as nursery:
        nursery.start_soon(stage.locks.set, ino, 2, LockKind.FLOCK, LockType.WRITE)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def getlock(stage: Stage) -> None:
    ino = await lockable(stage)
    async with stage.measured():
        await stage.locks.get(ino, 1, LockType.WRITE, 0, LOCK_END)


async def drop_locks(stage: Stage) -> None:
    ino = await lockable(stage)
    for start in (0, 10, 20):
        await stage.locks.set(ino, 1, LockKind.POSIX, LockType.WRITE, start, start)
    async with stage.measured():
        await stage.locks.drop(ino, 1, LockKind.POSIX)


async def drop_nothing(stage: Stage) -> None:
    ino = await lockable(stage)
    await stage.locks.set(ino, 1, LockKind.POSIX, LockType.WRITE)
    async with stage.measured():
        await stage.locks.drop(ino, 2, LockKind.POSIX)
        await stage.locks.drop(ino, 1, LockKind.FLOCK)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

TABLE = (
    Row("lookup of a file", "Lookup", "", lookup_file),
    Row("lookup of what lies on another daemon than its name", "Lookup + GetAttr", "", lookup_elsewhere),
    Row("getattr", "GetAttr", "", getattr_),
    Row("setattr", "SetAttr", "", setattr_),
    Row("truncate to a larger size", "SetAttr", "", extend),
    Row("truncate to a smaller size, of one chunk", "SetAttr + TrimChunks", "", truncate_one),
    Row("truncate to a smaller size, with chunks on all daemons", "SetAttr + N−1 TrimChunks", "", truncate_many),
    Row("create, which opens", "Make", "", create),
    Row("open", "Open", "", open_),
    Row("close of what was not written to", "Release", "", close_unchanged),
    Row("read within a chunk", "ReadChunk", "", read_chunk),
    Row("the first read, if relatime asks for it", "ReadChunk", "Touch", read_first),
    Row("read at the end of the file", "GetAttr", "", read_end),
    Row("write, gathered", "", "", write_gathered),
    Row("flush of what was gathered of a chunk", "WriteChunk + CommitWrite", "", flush),
    Row("setattr of a file of which a chunk was gathered", "WriteChunk + CommitWrite", "", setattr_of_written),
    Row("write within a chunk, O_DIRECT or above 1 MiB", "WriteChunk", "", write_direct),
    Row("append", "Append + WriteChunk", "", append),
    Row("fsync of what was written to a chunk", "WriteChunk + CommitWrite + SyncChunks + SyncMeta", "", fsync_written),
    Row("the first fsync of an old file with chunks on all daemons", "N SyncChunks + SyncMeta", "", fsync_opened),
    Row("fallocate within a chunk, behind the end", "GetAttr + AllocateChunk + CommitWrite", "", allocate_one),
    Row("fallocate of more than there is", "GetAttr + N Usage", "", allocate_huge),
    Row("a hole within a chunk", "PunchChunk + CommitWrite", "", punch_one),
    Row("a hole of 1 TiB, with data in one chunk", "N MapChunks + PunchChunk + CommitWrite", "", punch_sparse),
    Row("seek for data or a hole in 1 TiB", "GetAttr + N MapChunks", "", seek),
    Row(
        "copy of a chunk to another daemon",
        "GetAttr + MapChunks + CopyChunk + ReadChunk + CommitWrite",
        "",
        copy_one,
    ),
    Row("unlink of an empty file", "Unlink", "", unlink_empty),
    Row("unlink of a file of one chunk", "Unlink", "DropChunks", unlink_chunk),
    Row("unlink of a file with chunks on all daemons", "Unlink", "N−1 DropChunks", unlink_chunks),
    Row(
        "unlink of a file that lies on another daemon than its name",
        "Unlink + Prepare + Finish",
        "Secure",
        unlink_elsewhere,
    ),
    Row("last close of an unlinked file of one chunk", "Release", "DropChunks", close_unlinked),
    Row("mkdir of a directory on another daemon", "Make + Prepare + Finish", "Secure", mkdir),
    Row("mkdir deep in the tree", "Make", "", mkdir_deep),
    Row("rmdir of a directory on another daemon", "Rmdir + Prepare + Finish", "Secure", rmdir),
    Row("rmdir deep in the tree", "Rmdir", "", rmdir_deep),
    Row("rename in a directory", "Rename", "", rename_inside),
    Row("rename into another directory of the same daemon", "Rename", "", rename_beside),
    Row("rename over a file of one chunk", "Rename", "DropChunks", rename_over),
    Row("rename into a directory of another daemon", "Rename + Lookup + Prepare + Finish", "Secure", rename_across),
    Row("the same, over a file", "Rename + Lookup + Prepare + Finish", "Secure", rename_across_over),
    Row(
        "the same, both files elsewhere",
        "Rename + Lookup + 3 Prepare + 3 Finish",
        "3 Secure",
        rename_all_apart,
        daemons_min=4,
    ),
    Row("rename of what lies elsewhere, in a directory", "Rename + Prepare + Finish", "Secure", rename_moved),
    Row(
        "rename of a directory into another one, both on one daemon",
        "2 Rename + 3 Lookup + GetAttr + Prepare + Finish",
        "Secure",
        move_directory,
    ),
    Row(
        "the same, all three on different daemons",
        "2 Rename + 3 Lookup + GetAttr + 3 Prepare + 3 Finish",
        "3 Secure",
        move_directory_apart,
        daemons_min=4,
    ),
    Row("link", "Link", "", link_here),
    Row("link of what lies on another daemon", "Link + GetAttr + Prepare + Finish", "Secure", link_elsewhere),
    Row("symlink, mknod", "Make", "", symlink),
    Row("readlink", "ReadLink", "", readlink),
    Row("512 entries of a listing, with attributes", "ReadDir", "", readdir),
    Row("10 entries of a listing, 5 of them lie elsewhere", "ReadDir + 5 GetAttr", "", readdir_elsewhere),
    Row("statfs", "N Usage", "", statfs),
    Row("fsync of a directory", "N SyncMeta", "", fsyncdir),
    Row("getxattr", "GetXattr", "", getxattr),
    Row("setxattr", "SetXattr", "", setxattr),
    Row("listxattr", "ListXattr", "", listxattr),
    Row("removexattr", "RemoveXattr", "", removexattr),
    Row("lock or unlock a range or a file", "SetLock", "", lock),
    Row("a lock that is waited for, and the unlock for which it waits", "2 SetLock + LockGranted", "", lock_waited_for),
    Row("a wait for a lock that is given up", "SetLock", "CancelLock", lock_given_up),
    Row("F_GETLK", "GetLock", "", getlock),
    Row("flush of a file on which the owner has locks", "SetLock", "", drop_locks),
    Row("flush of a file on which the owner has none", "", "", drop_nothing),
)


def rendered(table: tuple[Row, ...]) -> str:
    """Show the table as the page in docs/ holds it."""
    lines = ["| operation | RPCs | which | behind the answer |", "|---|---|---|---|"]
    lines += [f"| {row.operation} | {summed(row.requests)} | {row.requests} | {row.behind} |" for row in table]
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines) + "\n"


# ── the tests ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("daemons", DAEMONS)
@pytest.mark.parametrize("row", TABLE, ids=[row.operation for row in TABLE])
async def test_an_operation_costs_what_the_table_says(row: Row, daemons: int) -> None:
    daemons = max(daemons, row.daemons_min)
    async with whole_cluster(daemons) as whole, whole.client(gather_time_s=3600.0) as client:
        stage = Stage(whole, client)
        await row.scenario(stage)
        requests, behind = counted(row.requests, daemons), counted(row.behind, daemons)
        assert stage.at_rest == requests + behind
        assert not requests - stage.at_answer, "something that is waited for came after the answer"


def test_the_page_shows_the_table() -> None:
    assert rendered(TABLE) in DESIGN.read_text(), f"docs/design.md should hold:\n{rendered(TABLE)}"


async def test_what_goes_on_behind_an_answer_is_not_waited_for() -> None:
    async with whole_cluster(2) as whole, whole.client(gather_time_s=3600.0) as client:
        stage = Stage(whole, client)
        parent = await stage.directory(1)
        name, _ = await stage.closed(parent)
        held = trio.Event()
        for chunks in whole.chunks:
            chunks.hold = held
        await stage.namespace.unlink(parent, name)
        await wait_all_tasks_blocked()
        assert sum(whole.service(daemon).metadata.to_drop for daemon in whole.cluster.daemons) == 1
        held.set()
        await stage.rest()
        assert sum(whole.service(daemon).metadata.to_drop for daemon in whole.cluster.daemons) == 0
