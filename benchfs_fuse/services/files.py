"""Be the files of one mount: open handles, reads, writes that are gathered, and what the mount knows meanwhile.

Everything below works on inode numbers and handles; names are the name space's matter.

**What is where.** ``_Node`` is one file that has handles here; it lives from its first open to its last release. Its
``WriteBehind`` holds accepted bytes; ``Known`` holds the newest attributes. A byte is on its way from *accepted* (in a
run) over *written* (its daemon has it) to *published* (the inode's daemon counts it). ``_flush`` takes everything that
was accepted before to the end of that way; it is what every operation does first that could otherwise tell or do the
wrong thing: getattr and everything that hands out attributes, setattr, append, fsync, close.

**Scheduling.** One event loop; code between two awaits is atomic. Tasks of our own: one for each sealed run, one that
flushes what has been dirty for ``gather_time_s``, one for each flush that it starts, one for each touch.

**Locks**, each per node and never two at once:

- ``order``: held while a write is accepted, by an append until its range is reserved, by setattr from its flush to its
  answer. So a truncation never falls between the pieces of a write, and no bytes are accepted that a truncation under
  way would have to cut. A flush does not take it: a writer may hold it while it waits for room, and a flush makes room.
- ``publishing``: held during CommitWrite. So sizes and growth are published one after the other, each once.

**Races, one by one.**

- *Write and flush.* A flush takes what was accepted before it began; what comes later is somebody else's.
- *Read and write.* A read first waits for the runs that it overlaps. What is accepted after that is concurrent with it.
- *Publish and getattr.* Replies overtake each other; ``Known`` keeps the newest version, so no older size is shown.
- *Release and open.* The node leaves the table in the same step in which its last handle goes, after a flush. An open
  that comes later makes a new node; one that came before keeps the old one.
- *Failure and report.* A run sets the error of every handle before it counts as written; whoever flushes and then looks
  at its handle's error sees it.
- *Truncation elsewhere.* Another mount may cut what we have written and not published. Publishing then makes the file
  grow again, with zeros, as if our write had come last.
- *Touch and close.* A close waits for the touch that its reads have caused, so atime does not change after it.

**Errors.** A write that is waited for raises. Gathered bytes that cannot be written are dropped; every handle that was
open then reports it once, at its next fsync or close, and takes no more bytes until then: whoever copies a large file
to a full disk learns it soon. The one who mounted is told (``on_dropped``), to drop the kernel's pages too. The last
release tells the daemon that what lies behind the size is doubtful.

For whoever adds an ``await``: between it and the line before, every handle may be closed, the size may change and runs
may come and go. Look again at what you knew.
"""

import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from ..errors import BadHandle, FileTooLarge, FsError, InvalidArgument, IsADirectory, Stale
from ..layout import extents
from ..limits import FILE_SIZE_MAX
from ..model import Attrs, ChunkId
from ..rpc.client import Links
from ..rpc.messages import (
    TIME_NOW,
    TIME_OMIT,
    Append,
    AppendReply,
    AttrsReply,
    CommitWrite,
    Done,
    OpenCount,
    SyncChunks,
    SyncMeta,
)
from .known import Known
from .namespace import Namespace
from .parallel import all_of, background
from .remote_chunks import RemoteChunkStore
from .write_behind import RUN_MAX, Budget, WriteBehind, accepted_bytes

log = logging.getLogger(__name__)

#: relatime's rule lets an access time grow at least this old (mount(8)).
_DAY_NS = 86_400 * 10**9


class FilesStatistics(NamedTuple):
    """Count what a mount holds; all zero when nothing is open and everything was released."""

    handles: int
    files: int
    #: Files with bytes that are not published.
    dirty: int
    #: Bytes that no daemon has yet.
    accepted_bytes: int


class Handle:
    """Be one open file. Made by ``Files`` alone."""

    def __init__(self, node: "_Node", flags: int) -> None:
        self.node = node
        #: Of open(2).
        self.flags = flags
        access = flags & os.O_ACCMODE
        self.reads = access != os.O_WRONLY
        self.writes = access != os.O_RDONLY
        self.append = self.writes and bool(flags & os.O_APPEND)
        #: Gathered bytes were dropped since this handle last reported.
        self.error: FsError | None = None
        self.touched = bool(flags & os.O_NOATIME)
        #: O_SYNC or O_DSYNC: whoever writes has to call fsync (the kernel does for files that it caches).
        self.syncs = self.writes and bool(flags & os.O_DSYNC)

    @property
    def ino(self) -> int:
        """Return the inode number."""
        return self.node.ino

    def take_error(self) -> None:
        """Raise, once, that gathered bytes were dropped."""
        error, self.error = self.error, None
        if error is not None:
            raise error


class _Node:
    """Hold what handles of one inode share."""

    def __init__(self, attrs: Attrs, known: Known) -> None:
        self.ino = attrs.ino
        self.chunk_size = attrs.chunk_size
        self.width = attrs.width
        self._attrs = attrs
        self._known = known
        self.handles: set[Handle] = set()
        self.order = trio.Lock()
        self.publishing = trio.Lock()
        self.writing: WriteBehind
        self.store: RemoteChunkStore
        #: Whether an fsync has asked all daemons of the file: before, what earlier handles wrote may not be synced.
        self.synced_once = False
        #: The daemons may hold parts of dropped bytes behind the size, or more than was counted.
        self.doubtful = False
        #: The daemon has restarted and does not know the inode any more.
        self.lost = False
        #: Set when the touch under way has ended.
        self.touching: trio.Event | None = None

    @property
    def attrs(self) -> Attrs:
        """Return the newest attributes known."""
        newest = self._known.get(self.ino)
        if newest is not None:
            self._attrs = newest
        return self._attrs

    @property
    def size(self) -> int:
        """Return the size with everything accepted counted in."""
        return max(self.attrs.size, self.writing.end)

    @property
    def dirty(self) -> bool:
        """Tell whether anything is accepted and not published."""
        return self.writing.pending or self.writing.unpublished


class Files:
    """Open, read and write files; keep what this mount knows of them. Made by ``open_files``."""

    def __init__(
        self,
        namespace: Namespace,
        nursery: trio.Nursery,
        *,
        gather_bytes_max: int,
        gather_time_s: float,
        atime: bool,
    ) -> None:
        self.namespace = namespace
        self.known = Known()
        self._links: Links = namespace.links
        self._nursery = nursery
        self._gather = gather_bytes_max > 0
        self._gather_time_s = gather_time_s
        self._atime = atime
        #: Called with the inode of gathered bytes that could not be written.
        self.on_dropped: Callable[[int], None] = lambda ino: None
        share = gather_bytes_max // len(self._links.daemons)
        self._budgets = {daemon_id: Budget(share) for daemon_id in self._links.daemons}
        self._stores: dict[int, RemoteChunkStore] = {}
        self._nodes: dict[int, _Node] = {}
        #: Handles that the daemons have registered: readers, writers by inode.
        self._opens: dict[int, list[int]] = {}
        #: Dirty nodes and when their time is over; the oldest first, as every one gets the same time.
        self._dirty: dict[_Node, float] = {}
        self._dirtied = trio.Event()

    # ── attributes ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def getattr(self, ino: int) -> Attrs:
        """Return the attributes of an inode, with everything counted in that this mount has accepted."""
        node = self._nodes.get(ino)
        if node is not None:
            await self._quiet(node)
        return self.known.see(await self.namespace.getattr(ino))

    async def fresh(self, attrs: Attrs) -> Attrs:
        """Return what to show for attributes that a daemon sent: never older than what was written or shown here."""
        node = self._nodes.get(attrs.ino)
        if node is not None and node.dirty:
            await self._quiet(node)
        return self.known.see(attrs)

    async def setattr(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int = TIME_OMIT,
        mtime_ns: int = TIME_OMIT,
    ) -> Attrs:
        """Change attributes behind everything that was written before; return them all. ``size`` truncates."""
        if size is not None:
            _check_range(size, 0)
        node = self._nodes.get(ino)
        if node is None:
            return self.known.see(
                await self.namespace.setattr(
                    ino, mode=mode, uid=uid, gid=gid, size=size, atime_ns=atime_ns, mtime_ns=mtime_ns
                ),
                own=True,
            )
        await _acquire(node.order)
        try:
            await self._quiet(node)
            attrs = await self.namespace.setattr(
                ino, mode=mode, uid=uid, gid=gid, size=size, atime_ns=atime_ns, mtime_ns=mtime_ns
            )
        finally:
            node.order.release()
        return self.known.see(attrs, own=True)

    # ── handles ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self, ino: int, flags: int, uid: int = 0) -> Handle:
        """Open a regular file with ``flags`` of open(2), O_CREAT and O_EXCL left out. Stale: the inode has gone."""
        writer = flags & os.O_ACCMODE != os.O_RDONLY
        attrs = await self.namespace.open(ino, writer)
        self._count_open(ino, writer)
        handle = self._add_handle(self.known.see(attrs), flags)
        if flags & os.O_TRUNC:  # also of a reader, as open(2) does on Linux
            try:
                await self.setattr(
                    ino, size=0, mode=_without_privileges(attrs.mode) if uid else None, mtime_ns=TIME_NOW
                )
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self.release(handle)
                raise
        return handle

    async def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int, flags: int) -> Handle:
        """Make a regular file and open it. Exists: the name is taken, by whatever."""
        writer = flags & os.O_ACCMODE != os.O_RDONLY
        attrs = await self.namespace.make(
            parent, name, stat.S_IFREG | stat.S_IMODE(mode), uid, gid, reader=not writer, writer=writer
        )
        self._count_open(attrs.ino, writer)
        handle = self._add_handle(self.known.see(attrs), flags)
        handle.node.synced_once = True
        return handle

    def _add_handle(self, attrs: Attrs, flags: int) -> Handle:
        node = self._nodes.get(attrs.ino)
        if node is None:
            node = self._nodes[attrs.ino] = self._make_node(attrs)
        handle = Handle(node, flags)
        node.handles.add(handle)
        return handle

    def _make_node(self, attrs: Attrs) -> _Node:
        if attrs.is_dir:
            raise IsADirectory(f"inode {attrs.ino}")
        node = _Node(attrs, self.known)
        store = self._stores.get(attrs.width)
        if store is None:
            store = self._stores[attrs.width] = RemoteChunkStore(self._links, attrs.width, self._doubt)
        node.store = store
        node.writing = WriteBehind(
            attrs.ino,
            attrs.chunk_size,
            attrs.width,
            store,
            self._links.shard_map,
            self._budgets,
            self._nursery,
            lambda error: self._drop(node, error),
        )
        return node

    def _doubt(self, ino: int) -> None:
        """Take note that a write may have been counted too low: the last release has the file counted anew."""
        node = self._nodes.get(ino)
        if node is not None:
            node.doubtful = True

    def _drop(self, node: _Node, error: FsError) -> None:
        """Take note that gathered bytes are lost."""
        node.doubtful = True
        for handle in node.handles:
            handle.error = error
        self.on_dropped(node.ino)

    async def flush(self, handle: Handle) -> None:
        """Do what close(2) promises: everything accepted is with the daemons, or its error is raised."""
        await self._quiet(handle.node)
        handle.take_error()

    async def release(self, handle: Handle) -> None:
        """Give a handle back. What cannot be flushed any more is dropped; nobody is there to be told."""
        node = handle.node
        try:
            if handle.writes:
                await self._quiet(node)
        except FsError:
            node.doubtful = True
        node.handles.discard(handle)
        if not node.handles and self._nodes.get(node.ino) is node:
            del self._nodes[node.ino]
            self._dirty.pop(node, None)
        doubtful = node.doubtful and handle.writes
        try:
            await self.namespace.release(node.ino, handle.writes, doubtful)
        finally:
            self._count_release(node.ino, handle.writes)

    def _count_open(self, ino: int, writer: bool) -> None:
        self._opens.setdefault(ino, [0, 0])[writer] += 1

    def _count_release(self, ino: int, writer: bool) -> None:
        counts = self._opens[ino]
        counts[writer] -= 1
        if counts == [0, 0]:
            del self._opens[ino]

    def opens(self) -> Sequence[OpenCount]:
        """List the handles that the daemons should know: for a daemon that was started anew."""
        self.known.clear()
        return [OpenCount(ino, readers, writers) for ino, (readers, writers) in self._opens.items()]

    def lose(self, inos: Sequence[int]) -> None:
        """Give up files that a daemon, started anew, does not know any more: their handles are stale."""
        for ino in inos:
            node = self._nodes.pop(ino, None)
            if node is not None:
                node.lost = True

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def read(self, handle: Handle, offset: int, into: memoryview) -> int:
        """Read into the caller's buffer from ``offset`` on; return how many bytes there were, 0 at the end.

        All of ``into`` may be overwritten. It belongs to the call until that returns or raises.
        """
        node = handle.node
        if not handle.reads:
            raise BadHandle("not open for reading")
        self._check_alive(node)
        writing = node.writing
        if writing.pending:
            await writing.settle(offset, len(into))
        size = node.size
        if offset >= size:
            self.known.see(await self.namespace.getattr(node.ino))
            size = node.size
        length = min(len(into), size - offset)
        if length <= 0:
            return 0
        self._touch_soon(handle)
        store, ino, chunk_size = node.store, node.ino, node.chunk_size

        async def read_piece(piece: tuple[int, int, memoryview]) -> None:
            index, within, view = piece
            found = await store.read(ChunkId(ino, index), within, view)
            if found < len(view):
                view[found:] = bytes(len(view) - found)

        if offset % chunk_size + length <= chunk_size:
            await read_piece((offset // chunk_size, offset % chunk_size, into[:length]))
        else:
            pieces = [
                (extent.index, extent.offset, into[extent.position : extent.position + extent.length])
                for extent in extents(offset, length, chunk_size)
            ]
            await all_of(read_piece, pieces)
        return length

    async def write(self, handle: Handle, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Write all of ``data`` at ``offset``, or at the end of a handle that appends; return its length.

        On return the bytes are accepted (gathered), or flushed if the handle or the mount does not gather. ``data``
        belongs to the call until it returns.
        """
        node = handle.node
        if not handle.writes:
            raise BadHandle("not open for writing")
        self._check_alive(node)
        if handle.error is not None:
            raise handle.error
        length = len(data)
        if length == 0:
            return 0
        if handle.append:
            await self._append(handle, memoryview(data))
            return length
        _check_range(offset, length)
        if not self._gather or handle.flags & os.O_DIRECT or length > RUN_MAX:
            try:
                await node.writing.write(offset, memoryview(data))
            except FsError:
                node.doubtful = True
                raise
        else:
            await _acquire(node.order)
            try:
                await node.writing.accept(offset, data if isinstance(data, bytes) else bytes(data))
            finally:
                node.order.release()
        self._note_dirty(node)
        return length

    async def _append(self, handle: Handle, data: memoryview) -> None:
        """Reserve a range at the end of the file, then write it. Bytes that could not be written read as zeros."""
        node = handle.node
        await _acquire(node.order)
        try:
            if node.dirty and node.size > node.attrs.size:
                await self._flush(node)
            request = Append(node.ino, len(data))
            reply = await self.namespace.link_of(node.ino).call(request, AppendReply)
        finally:
            node.order.release()
        self.known.see(reply.attrs, own=True)
        try:
            await node.writing.write(reply.offset, data)
        except FsError:
            node.doubtful = True
            raise
        self._note_dirty(node)

    async def drop_privileges(self, handle: Handle) -> None:
        """Clear the set-ID bits as a write must, where the kernel does not.

        Whose write it is, nobody tells us: root's, which keeps the bits on other file systems, takes them too.
        """
        mode = handle.node.attrs.mode
        if _without_privileges(mode) is not None:
            await self.setattr(handle.ino, mode=_without_privileges(mode))

    async def fsync(self, handle: Handle) -> None:
        """Bring everything written to the file here, and its attributes, to stable storage."""
        node = handle.node
        self._check_alive(node)
        await self._quiet(node)
        handle.take_error()
        daemons = node.writing.unsynced
        if not node.synced_once:
            count = -(-node.size // node.chunk_size)
            daemons |= self._links.shard_map.of_chunks(node.ino, range(count), node.width)
        node.writing.unsynced = set()
        try:
            await all_of(lambda daemon_id: self._sync_chunks(daemon_id, node.ino), daemons)
        except BaseException:
            node.writing.unsynced |= daemons
            raise
        node.synced_once = True
        await self.namespace.link_of(node.ino).call(SyncMeta(), Done)

    async def _sync_chunks(self, daemon_id: int, ino: int) -> None:
        await self._links.to(daemon_id).call(SyncChunks(ino), Done)

    def _check_alive(self, node: _Node) -> None:
        if node.lost:
            raise Stale(f"inode {node.ino} was lost when its daemon was started anew")

    # ── flushing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _quiet(self, node: _Node) -> None:
        """Flush, and wait for the touch under way."""
        if node.dirty:
            await self._flush(node)
        if node.touching is not None:
            await node.touching.wait()

    async def _flush(self, node: _Node) -> None:
        """Take what was accepted so far to its daemons, then tell the inode's daemon.

        Raise if it cannot be told; then it stays unpublished. Errors of the bytes themselves are with the handles.
        """
        writing = node.writing
        await writing.settle_all()
        if writing.unpublished:
            await self._publish(node)
        if not node.dirty:
            self._dirty.pop(node, None)

    async def _publish(self, node: _Node) -> None:
        writing = node.writing
        await _acquire(node.publishing)
        try:
            if not writing.unpublished:
                return
            end, growth = writing.unpublished_end, writing.unpublished_growth
            writing.unpublished = False
            try:
                request = CommitWrite(node.ino, end, growth)
                attrs = (await self.namespace.link_of(node.ino).call(request, AttrsReply)).attrs
            except BaseException:
                writing.unpublished = True
                raise
            self.known.see(attrs, own=True)
            writing.unpublished_growth -= growth
            if writing.unpublished_end == end:
                writing.unpublished_end = 0
        finally:
            node.publishing.release()

    def _note_dirty(self, node: _Node) -> None:
        """See to it that what was accepted does not stay longer than the gather time."""
        if node not in self._dirty and node.dirty:
            self._dirty[node] = trio.current_time() + self._gather_time_s
            self._dirtied.set()

    async def run(self) -> None:
        """Flush every file whose gather time is over, until cancelled."""
        while True:
            while not self._dirty:  # what was dirty may be flushed before this task has its turn
                self._dirtied = trio.Event()
                await self._dirtied.wait()
            node, deadline = next(iter(self._dirty.items()))
            await trio.sleep_until(deadline)
            if self._dirty.get(node) == deadline:
                del self._dirty[node]
                self._nursery.start_soon(self._flush_behind, node)

    async def _flush_behind(self, node: _Node) -> None:
        """Flush where nobody waits for it: what cannot be published stays, and whoever closes tries again."""
        try:
            await self._flush(node)
        except FsError as error:
            log.warning("inode %d: cannot publish what was written: %s", node.ino, error)
        if node.handles:
            self._note_dirty(node)

    async def drain(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Flush every file; errors stay with the handles. ``on_progress`` is called after each file."""

        async def one(node: _Node) -> None:
            await self._flush_behind(node)
            on_progress()

        await all_of(one, [node for node in self._nodes.values() if node.dirty])

    async def leave(self) -> None:
        """Flush everything and give every handle back: nobody will. What cannot be flushed is dropped.

        The daemons are told which files are doubtful then, as a goodbye alone would not tell them.
        """

        async def one(node: _Node) -> None:
            for handle in list(node.handles):
                try:
                    await self.release(handle)
                except FsError as error:
                    log.warning("inode %d: cannot be given back: %s", node.ino, error)

        await self.drain()
        await all_of(one, list(self._nodes.values()))

    def statistics(self) -> FilesStatistics:
        """Count what is open and what is under way."""
        nodes = self._nodes.values()
        return FilesStatistics(
            sum(len(node.handles) for node in nodes),
            len(nodes),
            sum(node.dirty for node in nodes),
            accepted_bytes(list(self._budgets.values())),
        )

    # ── access times ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _touch_soon(self, handle: Handle) -> None:
        """Have the access time set, once for each handle, if relatime asks for it; nobody waits but a close."""
        if handle.touched or not self._atime:
            return
        handle.touched = True
        node = handle.node
        if node.touching is None and _touch_due(node.attrs):
            node.touching = trio.Event()
            self._nursery.start_soon(self._touch, node)

    async def _touch(self, node: _Node) -> None:
        assert node.touching is not None
        try:
            self.known.see(await self.namespace.touch(node.ino), own=True)
        except FsError as error:
            log.info("inode %d: access time not set: %s", node.ino, error)
        finally:
            node.touching.set()
            node.touching = None

    async def touch(self, ino: int) -> None:
        """Set the access time of a directory or a symbolic link that was read, if relatime asks for it."""
        attrs = self.known.get(ino)
        if self._atime and attrs is not None and _touch_due(attrs):
            self.known.see(await self.namespace.touch(ino), own=True)


@asynccontextmanager
async def open_files(
    namespace: Namespace,
    *,
    gather_bytes_max: int,
    gather_time_s: float,
    atime: bool = True,
) -> AsyncIterator[Files]:
    """Run the files of a mount. Ends at once: whoever wants everything flushed drains before.

    ``gather_bytes_max`` bounds the accepted bytes of all files, shared out evenly over the daemons; 0 gathers nothing.
    """
    async with background() as nursery:
        files = Files(
            namespace,
            nursery,
            gather_bytes_max=gather_bytes_max,
            gather_time_s=gather_time_s,
            atime=atime,
        )
        nursery.start_soon(files.run)
        yield files


async def _acquire(lock: trio.Lock) -> None:
    """Take a lock without a turn of the event loop if it is free."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()


def _check_range(offset: int, length: int) -> None:
    if offset < 0:
        raise InvalidArgument(f"offset {offset}")
    if offset + length > FILE_SIZE_MAX:
        raise FileTooLarge(f"{offset} + {length}")


def _without_privileges(mode: int) -> int | None:
    """Return a mode without the bits that a write takes away (chown(2), inode(7)); None if there are none."""
    taken = mode & stat.S_ISUID
    if mode & stat.S_IXGRP:
        taken |= mode & stat.S_ISGID
    return stat.S_IMODE(mode & ~taken) if taken else None


def _touch_due(attrs: Attrs) -> bool:
    """Apply relatime's rule (mount(8))."""
    atime_ns = attrs.atime_ns
    return atime_ns <= attrs.mtime_ns or atime_ns <= attrs.ctime_ns or time.time_ns() - atime_ns >= _DAY_NS
