"""Be the files of one mount: open handles, reads, writes that are gathered, and what the mount knows meanwhile.

Everything below works on inode numbers and handles; names are the name space's matter.

**What is where.** ``_Node`` is one file that has handles here; it lives from its first open to its last release. Its
``WriteBehind`` holds accepted bytes; ``Known`` holds the newest attributes. A byte is on its way from *accepted* (in a
run) over *written* (its daemon has it) to *published* (the inode's daemon counts it). ``_flush`` takes everything that
was accepted before to the end of that way; it is what every operation does first that could otherwise tell or do the
wrong thing: getattr and everything that hands out attributes, setattr, append, fallocate, seek, a copy between files,
fsync, close. The space of a file, below its bytes, is the matter of ``FileSpace``.

**Scheduling.** One event loop; code between two awaits is atomic. Tasks of our own: one for each sealed run, one that
flushes what has been dirty for ``gather_time_s``, one for each flush that it starts, one for each touch, one for each
handle that is given back behind the answer.

**Locks**, each per node; ``order`` is taken before the others, those never together:

- ``order``: held while a write is accepted, or begun if it does not gather, by an append until its range is reserved,
  by setattr, fallocate and a copy into the file from their flush to their answer. So a truncation never falls between
  the pieces of a write or between the chunks of an allocation, and no bytes are accepted that a truncation or a hole
  under way would have to take. A flush does not take it: a writer may hold it while it waits for room, and a flush
  makes room.
- ``publishing``: held during CommitWrite. So sizes and growth are published one after the other, each once; whoever
  flushes meanwhile waits for it.
- ``syncing``: held while an fsync waits for chunks. One that finds nothing left to sync waits for who took it.

**Races, one by one.**

- *Write and flush.* A flush takes what was accepted before it began; what comes later is somebody else's.
- *Read and write.* A read first waits for the runs that it overlaps. What is accepted after that is concurrent with it.
- *Publish and getattr.* Replies overtake each other; ``Known`` keeps the newest version, so no older size is shown.
- *Release and open.* The node leaves the table in the same step in which its last handle goes, after a flush. An open
  that comes later makes a new node; one that came before keeps the old one.
- *Copy and write.* What is written to the source after its flush may be copied or not; so may what another mount does.
- *Failure and report.* A run sets the error of every handle before it counts as written; whoever flushes and then looks
  at its handle's error sees it.
- *Truncation elsewhere.* Another mount may cut what we have written and not published. Publishing then makes the file
  grow again, with zeros, as if our write had come last.
- *Touch and close.* A close waits for the touch that its reads have caused, so atime does not change after it.

**Errors.** A write that is waited for raises. Gathered bytes that cannot be written are dropped; every handle that was
open then reports it at its next fsync, and at a close before that, once each, and takes no more bytes until the first
of them: whoever copies a large file to a full disk learns it soon. The one who mounted is told (``on_dropped``), to
drop the kernel's pages too. The last release tells the daemon that what lies behind the size is doubtful.

For whoever adds an ``await``: between it and the line before, every handle may be closed, the size may change and runs
may come and go. Look again at what you knew.
"""

import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import trio

from .. import acl
from ..errors import (
    BadHandle,
    DaemonUnreachable,
    FileTooLarge,
    FsError,
    InvalidArgument,
    IsADirectory,
    NoDevice,
    NoSpace,
    NotSupported,
    Stale,
    StorageError,
)
from ..layout import extents
from ..limits import FILE_SIZE_MAX
from ..model import Attrs, ChunkId
from ..observe import recording, spans
from ..privileges import SETID, Who, has_set_id, without
from ..rpc.client import Links
from ..rpc.messages import (
    TIME_NOW,
    TIME_OMIT,
    Append,
    AppendReply,
    AttrsReply,
    CommitWrite,
    Done,
    EntryReply,
    OpenCount,
    SetAttr,
    SyncChunks,
    SyncMeta,
)
from .deadline import before_waiting
from .jobs import persist
from .known import Known
from .namespace import Namespace
from .parallel import all_of, background
from .remote_chunks import RemoteChunkStore
from .space import FileSpace
from .write_behind import RUN_MAX, Budget, WriteBehind, accepted_bytes

log = logging.getLogger(__name__)

#: relatime's rule lets an access time grow at least this old (mount(8)).
_DAY_NS = 86_400 * 10**9

#: Bits of fallocate(2)'s mode (linux/falloc.h), and which of their combinations there are here.
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
FALLOCATE_MODES = (
    0,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_ZERO_RANGE,
    FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
)
#: Larger allocations first ask all daemons for their space, lest one that cannot be had fills the disks in trying.
ALLOCATE_UNSEEN_MAX = 1 << 30
#: Handles that are given back at a time behind the answer; further ones are given back before.
RELEASING_MAX = 64
#: Bytes of one copy_range: about a second, in which nobody else can write to the file through this mount.
COPY_MAX = 1 << 30


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
        #: Gathered bytes were dropped, or a disk has lost bytes, since this handle last reported; since it was last
        #: synced. Processes share a handle (fork, dup): who closes it may not be who wants to know what is safe.
        self.error: FsError | None = None
        self.unsafe: FsError | None = None
        self.touched = bool(flags & os.O_NOATIME)
        #: It was given back, or is being given back.
        self.released = False
        #: O_SYNC or O_DSYNC: whoever writes has to call fsync (the kernel does for files that it caches).
        self.syncs = self.writes and bool(flags & os.O_DSYNC)

    @property
    def ino(self) -> int:
        """Return the inode number."""
        return self.node.ino

    def fail(self, error: FsError) -> None:
        """Take note that bytes of the file are lost."""
        self.error = self.unsafe = error

    def take_error(self) -> None:
        """Raise, once, that bytes are lost; an fsync will say so, too."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def take_unsafe(self) -> None:
        """Raise, once, that bytes are lost that were to be synced."""
        error, self.error, self.unsafe = self.unsafe, None, None
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
        #: How often publishing or syncing has failed since a daemon did not answer.
        self.unanswered = 0
        self.syncing = trio.Lock()
        self.writing: WriteBehind
        self.store: RemoteChunkStore
        self.space: FileSpace
        #: Something may be dirty whose place no append has reserved: the next append has to come behind it.
        self.placed = False
        #: Whether an fsync has asked all daemons of the file: before, what earlier handles wrote may not be synced.
        self.synced_once = False
        #: Daemons that an fsync is asking.
        self.being_synced: set[int] = set()
        #: The daemons may hold parts of dropped bytes behind the size, or more than was counted.
        self.doubtful = False
        #: A truncation of ours failed or was given up: it may go on, and take what is written meanwhile.
        self.cutting = False
        #: The daemon has restarted and does not know the inode any more.
        self.lost = False
        #: Set when the touch under way has ended.
        self.touching: trio.Event | None = None

    @property
    def attrs(self) -> Attrs:
        """Return the newest attributes known."""
        self.remember()
        return self._attrs

    def remember(self) -> None:
        """Keep the newest attributes known, for when ``Known`` forgets them."""
        newest = self._known.get(self.ino)
        if newest is not None:
            self._attrs = newest

    @property
    def size(self) -> int:
        """Return the size with everything accepted counted in."""
        return max(self.attrs.size, self.writing.end)

    def check_answered(self, unanswered: int) -> None:
        """Raise DaemonUnreachable if ``unanswered`` has grown: who has waited for that does not begin to wait anew."""
        if self.unanswered != unanswered:
            raise DaemonUnreachable(f"a daemon of inode {self.ino} has not answered others who asked before")

    @property
    def dirty(self) -> bool:
        """Tell whether anything is accepted and not published, or on its way to be."""
        return self.writing.pending or self.writing.unpublished or self.publishing.locked()


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
        namespace.on_changed = self.known.change
        self._links: Links = namespace.links
        self._nursery = nursery
        self._gather = gather_bytes_max > 0
        self._gather_time_s = gather_time_s
        self._atime = atime
        #: Called with the inode of gathered bytes that could not be written, or of a change that failed halfway.
        self.on_dropped: Callable[[int], None] = lambda ino: None
        share = gather_bytes_max // len(self._links.daemons)
        self._budgets = {daemon_id: Budget(share) for daemon_id in self._links.daemons}
        self._stores: dict[int, RemoteChunkStore] = {}
        self._nodes: dict[int, _Node] = {}
        #: Handles that are given back behind the answer, and what is set when they are.
        self._releasing: dict[Handle, trio.Event] = {}
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
        taken: int = 0,
        who: Who | None = None,
    ) -> Attrs:
        """Change attributes behind everything that was written before; return them all. ``size`` truncates.

        ``taken`` are set-ID bits to take away; those that the change itself takes are found out if it is told ``who``
        asks for it.
        """
        if size is not None:
            _check_range(size, 0)
        if who is not None and (size, uid, gid) != (None, None, None):
            old = self.known.get(ino) or await self.getattr(ino)
            if has_set_id(old.mode) and not old.is_dir:
                caller = who()
                taken |= caller.takes_by_write(old.gid) if size is not None else caller.takes_by_chown(old.gid)
        request = SetAttr(ino, mode, uid, gid, size, atime_ns, mtime_ns, taken)
        node = self._nodes.get(ino)
        if node is not None:
            await _acquire(node.order)
        try:
            if node is not None and size is None and node.dirty and node.touching is None:
                published = await self._flush(node, request)
                if published is not None:
                    return published
            elif node is not None:
                await self._quiet(node)
            if size is not None and ino in self._opens:
                await self._wait_fenced()
            resized = node if size is not None else None
            if resized is not None:
                resized.cutting = True
            attrs = await self.namespace.setattr(request)
            if resized is not None:
                resized.cutting = False
        finally:
            if node is not None:
                node.order.release()
        # A size alone may be what the file has already, set-ID bits may have gone: then it answers no change of ours.
        changed = (mode, uid, gid) != (None, None, None) or (atime_ns, mtime_ns) != (TIME_OMIT, TIME_OMIT)
        return self.known.see(attrs, own=changed)

    async def _wait_fenced(self) -> None:
        """Wait until nothing of what we gave up can land behind a truncation. DaemonUnreachable."""
        before_waiting()
        with trio.move_on_after(self._links.op_timeout_s):
            await self._links.wait_fenced()
            return
        raise DaemonUnreachable("a write that was given up may still take place")

    async def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0, who: Who | None = None) -> Attrs:
        """Set an extended attribute, ``flags`` as in setxattr(2); an access ACL may take the set-group-ID bit away."""
        taken = 0
        if who is not None and name == acl.ACCESS:
            old = self.known.get(ino) or await self.getattr(ino)
            if has_set_id(old.mode):
                taken = who().takes_by_acl(old.gid)
        return self.known.see(await self.namespace.setxattr(ino, name, value, flags, taken), own=True)

    # ── handles ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self, ino: int, flags: int, who: Who | None = None) -> Handle:
        """Open a regular file with ``flags`` of open(2), O_CREAT and O_EXCL left out. Stale: the inode has gone.

        O_TRUNC takes set-ID bits away, by ``who`` it is.
        """
        writer = flags & os.O_ACCMODE != os.O_RDONLY

        def late(reply: AttrsReply | None) -> None:
            if reply is not None:
                self._unwanted(ino, writer)

        attrs = await self.namespace.open(ino, writer, late)
        self._count_open(ino, writer)
        handle = self._add_handle(self.known.see(attrs), flags)
        if flags & os.O_TRUNC:  # also of a reader, as open(2) does on Linux
            try:
                await self.setattr(ino, size=0, mtime_ns=TIME_NOW, who=who)
            except BaseException:
                before_waiting()
                with trio.CancelScope(shield=True):
                    await self.release(handle)
                raise
        return handle

    async def create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, flags: int, umask: int = 0
    ) -> Handle:
        """Make a regular file and open it. Exists: the name is taken, by whatever. ``umask`` as of Namespace.make."""
        writer = flags & os.O_ACCMODE != os.O_RDONLY

        def late(reply: EntryReply | None) -> None:
            if reply is not None:
                self._unwanted(reply.entry.ino, writer)

        attrs = await self.namespace.make(
            parent,
            name,
            stat.S_IFREG | stat.S_IMODE(mode),
            uid,
            gid,
            reader=not writer,
            writer=writer,
            umask=umask,
            late=late,
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
        node.space = FileSpace(node.ino, node.chunk_size, store, node.writing)
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
            handle.fail(error)
        self.on_dropped(node.ino)

    async def settle(self, handle: Handle) -> None:
        """Bring everything accepted to the daemons, as far as that works: who fails learns it from flush and fsync."""
        with suppress(FsError):
            await self._quiet(handle.node)

    def is_flushed(self, handle: Handle) -> bool:
        """Tell whether ``flush`` has nothing to do, nothing to wait for and no error to raise."""
        return handle.error is None and not handle.node.dirty and handle.node.touching is None

    async def flush(self, handle: Handle) -> None:
        """Do what close(2) promises: everything accepted is with the daemons, or its error is raised."""
        await handle.node.writing.settle_all()
        handle.take_error()
        await self._quiet(handle.node)
        handle.take_error()

    def release_soon(self, handle: Handle) -> bool:
        """Give a handle that only reads back in a task of its own, unless there are many of these; tell whether it is.

        Nobody waits for what a close leaves to be done. Whoever has written goes on with the next file, at the same
        daemon as likely as not, where this would be in his way.
        """
        if handle.writes or handle.released or len(self._releasing) >= RELEASING_MAX:
            return False
        handle.released = True
        self._drop_handle(handle)  # in this step: the kernel may forget the inode before the task has its turn
        self._releasing[handle] = trio.Event()
        self._nursery.start_soon(self._release_soon, handle)
        return True

    async def _release_soon(self, handle: Handle) -> None:
        try:
            with suppress(FsError):
                await self._tell_released(handle, polls=False)
        finally:
            self._releasing.pop(handle).set()

    async def release(self, handle: Handle) -> None:
        """Give a handle back, once. Whoever is cancelled, or meets an error, leaves it to go on by itself.

        What cannot be flushed any more is dropped; nobody is there to be told.
        """
        if handle.released:
            return
        handle.released = True
        node = handle.node
        try:
            if handle.writes:
                await self._quiet(node)
        except FsError:
            node.doubtful = True
        except trio.Cancelled:
            handle.released = False
            self._links.start_soon(self._release_behind, handle)
            raise
        self._drop_handle(handle)
        await self._tell_released(handle)

    def _drop_handle(self, handle: Handle) -> None:
        """Count a handle as given back here; with the last one the file goes."""
        node = handle.node
        node.handles.discard(handle)
        if not node.handles and self._nodes.get(node.ino) is node:
            del self._nodes[node.ino]
            self._dirty.pop(node, None)

    async def _tell_released(self, handle: Handle, *, polls: bool = True) -> None:
        """Have the daemon take a handle back; ``polls`` as for Link.call."""
        node = handle.node
        ino, writer, doubtful = node.ino, handle.writes, node.doubtful and handle.writes

        def late(reply: Done | None) -> None:
            if reply is not None:
                self._count_release(ino, writer)
            else:
                self._links.start_soon(self._give_back, ino, writer, doubtful)

        if doubtful and not self._links.fenced:
            self._links.start_soon(self._give_back, ino, writer, doubtful)
            return
        try:
            await self.namespace.release(ino, writer, doubtful, late, polls=polls)
        except DaemonUnreachable:
            raise  # ``late`` hears more
        except FsError:
            late(None)
            raise
        self._count_release(ino, writer)

    async def _release_behind(self, handle: Handle) -> None:
        with suppress(FsError):
            await self.release(handle)

    def _unwanted(self, ino: int, writer: bool) -> None:
        """Take note of a handle that a daemon has registered for somebody who has gone."""
        self._count_open(ino, writer)
        self._links.start_soon(self._give_back, ino, writer, False)

    async def _give_back(self, ino: int, writer: bool, doubtful: bool) -> None:
        """Have the daemon take back a handle that it still counts, however long that takes.

        While a write of ours that was given up may yet land, nothing behind the end of a doubtful file can be trimmed.
        """
        if doubtful:
            await self._links.wait_fenced()

        async def attempt() -> None:
            with suppress(Stale):  # with the session, all its handles have gone
                await self.namespace.release(ino, writer, doubtful, patient=True)

        await persist(f"Release of inode {ino}", attempt)
        self._count_release(ino, writer)

    def _count_open(self, ino: int, writer: bool) -> None:
        self._opens.setdefault(ino, [0, 0])[writer] += 1

    def _count_release(self, ino: int, writer: bool) -> None:
        counts = self._opens[ino]
        counts[writer] -= 1
        if counts == [0, 0]:
            del self._opens[ino]

    def is_open(self, ino: int) -> bool:
        """Tell whether there are handles of a file here."""
        return ino in self._nodes

    def opens(self) -> Sequence[OpenCount]:
        """List the handles that the daemons should know: for a daemon that was started anew."""
        for node in self._nodes.values():
            node.remember()
        self.known.clear()
        return [OpenCount(ino, readers, writers) for ino, (readers, writers) in self._opens.items()]

    def lose(self, inos: Sequence[int]) -> None:
        """Give up files that a daemon, started anew, does not know any more: their handles are stale."""
        for ino in inos:
            node = self._nodes.pop(ino, None)
            if node is not None:
                node.lost = True

    def power_lost(self, daemon_id: int) -> None:
        """Take note that a daemon may have lost what was not synced: whoever could believe it to be synced is told.

        That is every handle that writes to a file of which the daemon holds the inode, or chunks that were written.
        """
        error = StorageError(f"daemon {daemon_id} lost power, and with it what was not synced")
        for node in self._nodes.values():
            home = self._links.shard_map.of_ino(node.ino)
            if home == daemon_id or daemon_id in node.writing.unsynced | node.being_synced:
                for handle in node.handles:
                    if handle.writes:
                        handle.fail(error)
        self.namespace.power_lost(daemon_id)

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def read(self, handle: Handle, offset: int, into: memoryview) -> int:
        """Read into the caller's buffer from ``offset`` on; return how many bytes there were, 0 at the end.

        All of ``into`` may be overwritten. It belongs to the call until that returns or raises.
        """
        node = handle.node
        if not handle.reads:
            raise BadHandle("not open for reading")
        self.check_open(handle)
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

    async def write(
        self, handle: Handle, offset: int, data: bytes | bytearray | memoryview, who: Who | None = None
    ) -> int:
        """Write all of ``data`` at ``offset``, or at the end of a handle that appends; return its length.

        On return the bytes are accepted (gathered), or flushed if the handle or the mount does not gather. ``data``
        belongs to the call until it returns. ``who`` writes, if that is to take set-ID bits away: before the bytes.
        """
        node = handle.node
        length = len(data)
        if self.write_now(handle, offset, length, lambda: data if isinstance(data, bytes) else bytes(data)):
            return length
        self._check_writable(handle)
        if length == 0:
            return 0
        if handle.append:
            await self._append(handle, memoryview(data), who)
            return length
        _check_range(offset, length)
        if who is not None:
            await self.drop_privileges(handle, who)
        if not self._gather or handle.flags & os.O_DIRECT or length > RUN_MAX:
            # Behind a truncation or a hole under way; those that come later wait for what is begun here.
            await self._turn(node)
            node.placed = True
            node.order.release()
            try:
                await node.writing.write(offset, memoryview(data))
            except BaseException:  # cancelled, too
                node.doubtful = True
                raise
        else:
            await self._turn(node)
            node.placed = True
            try:
                await node.writing.accept(offset, data if isinstance(data, bytes) else bytes(data))
            finally:
                node.order.release()
        self._note_dirty(node)
        return length

    def write_now(self, handle: Handle, offset: int, length: int, take: Callable[[], bytes]) -> bool:
        """Accept ``length`` bytes as ``write`` does, if there is nothing to wait for or to refuse; tell whether it did.

        ``take``, called once and only then, hands the bytes over.
        """
        node = handle.node
        if (
            not self._gather
            or not handle.writes
            or handle.append
            or handle.flags & os.O_DIRECT
            or handle.released
            or handle.error is not None
            or node.lost
            or node.cutting
            or node.order.locked()
            or not 0 < length <= RUN_MAX
            or not 0 <= offset <= FILE_SIZE_MAX - length
            or has_set_id(node.attrs.mode)
            or not node.writing.accept_now(offset, length, take)
        ):
            return False
        node.placed = True
        self._note_dirty(node)
        return True

    async def _turn(self, node: _Node) -> None:
        """Take ``order``, behind the end of a truncation of ours that failed or was given up."""
        await _acquire(node.order)
        if not node.cutting:
            return
        try:
            # Nothing is reserved at the end; but the daemon answers when nothing is being cut off any more.
            reply = await self.namespace.link_of(node.ino).call(Append(node.ino, 0, 0), AppendReply)
            self.known.see(reply.attrs)
            node.cutting = False
        except BaseException:
            node.order.release()
            raise

    async def _append(self, handle: Handle, data: memoryview, who: Who | None) -> None:
        """Reserve a range at the end of the file, then write it. Bytes that could not be written read as zeros."""
        node = handle.node
        await _acquire(node.order)
        try:
            if node.dirty and node.placed:
                await self._flush(node)
            node.placed = False
            taken = 0
            if who is not None and has_set_id(node.attrs.mode):
                taken = who().takes_by_write(node.attrs.gid)
            request = Append(node.ino, len(data), taken)
            reply = await self.namespace.link_of(node.ino).call(request, AppendReply)
        finally:
            node.order.release()
        self.known.see(reply.attrs, own=True)
        try:
            await node.writing.write(reply.offset, data)
        except BaseException:
            node.doubtful = True
            raise
        self._note_dirty(node)

    async def drop_privileges(self, handle: Handle, who: Who | None = None) -> None:
        """Take set-ID bits away, as what changes the data must where the kernel does not; without any, this is free.

        ``who`` changes it; None stands for somebody of the group without CAP_FSETID.
        """
        attrs = handle.node.attrs
        if has_set_id(attrs.mode):
            taken = SETID if who is None else who().takes_by_write(attrs.gid)
            if without(attrs.mode, taken) != attrs.mode:
                await self.setattr(handle.ino, taken=taken)

    async def fsync(self, handle: Handle) -> None:
        """Bring everything written to the file here, and its attributes, to stable storage.

        The chunks and the inode at the same time: what a power cut leaves of the one without the other was not synced.
        """
        node = handle.node
        self.check_open(handle)
        await node.writing.settle_all()
        handle.take_unsafe()

        async def sync_inode() -> None:
            await self._quiet(node)
            await self.namespace.link_of(node.ino).call(SyncMeta(), Done)

        async def sync_chunks() -> None:
            unanswered = node.unanswered
            async with node.syncing:
                node.check_answered(unanswered)
                await self._sync_data(node, handle)

        await all_of(lambda sync: sync(), (sync_chunks, sync_inode))
        handle.take_unsafe()  # power may have been lost meanwhile

    async def _sync_data(self, node: _Node, handle: Handle) -> None:
        daemons = node.writing.unsynced
        if not node.synced_once:
            count = -(-node.size // node.chunk_size)
            daemons |= self._links.shard_map.of_chunks(node.ino, range(count), node.width)
        node.writing.unsynced, node.being_synced = set(), daemons
        try:
            await all_of(lambda daemon_id: self._sync_chunks(daemon_id, node.ino), daemons)
        except BaseException as error:
            node.writing.unsynced |= daemons
            node.unanswered += isinstance(error, DaemonUnreachable)
            if isinstance(error, StorageError):  # a disk says once that it lost bytes, which may be anybody's
                for other in node.handles - {handle}:
                    other.fail(error)
            raise
        finally:
            node.being_synced = set()
        node.synced_once = True

    async def _sync_chunks(self, daemon_id: int, ino: int) -> None:
        await self._links.to(daemon_id).call(SyncChunks(ino), Done)

    # ── space ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def fallocate(self, handle: Handle, mode: int, offset: int, length: int) -> None:
        """Reserve, free or zero a range, behind everything that was written before, as ``mode`` of fallocate(2) says.

        When this raises NoSpace, a part of the range below the old size may be reserved, or zeroed.
        """
        node = handle.node
        if offset < 0 or length <= 0:
            raise InvalidArgument(f"fallocate of {length} bytes at {offset}")
        if mode not in FALLOCATE_MODES:
            raise NotSupported(f"fallocate with mode {mode:#x}")
        self._check_writable(handle)
        _check_range(offset, length)
        await self._turn(node)
        try:
            if node.dirty:
                await self._flush(node)
            end = offset + length
            if end > node.size:
                self.known.see(await self.namespace.getattr(node.ino))
            try:
                if mode & FALLOC_FL_PUNCH_HOLE:
                    # To the end of the last chunk: the file's last block is in the range, also if the size is not.
                    await node.space.punch(offset, min(end, -(-node.size // node.chunk_size) * node.chunk_size))
                    grown_to = 0
                else:
                    await self._check_space(node, length)
                    await node.space.allocate(offset, length, node.size, zero=bool(mode & FALLOC_FL_ZERO_RANGE))
                    grown_to = 0 if mode & FALLOC_FL_KEEP_SIZE else end
            except BaseException as error:  # cancelled, too: what is under way may be done or not
                node.doubtful = True
                if isinstance(error, FsError):
                    self.on_dropped(node.ino)
                raise
            finally:
                self._note_dirty(node)
            node.writing.publish_soon(grown_to)
            await self._publish(node)
        finally:
            node.order.release()

    async def _check_space(self, node: _Node, length: int) -> None:
        """Refuse at once what the disks cannot hold, before any part of it is taken from everybody else. NoSpace."""
        if length > ALLOCATE_UNSEEN_MAX:
            space = await self.namespace.space()
            if length - node.attrs.allocated > space.available:
                raise NoSpace(f"{length} bytes to allocate, {space.available} available")

    async def seek(self, handle: Handle, offset: int, whence: int) -> int:
        """Return the first data or hole at or behind ``offset``, as os.SEEK_DATA or os.SEEK_HOLE asks. NoDevice."""
        node = handle.node
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise InvalidArgument(f"seek with {whence}")
        self.check_open(handle)
        if node.dirty:
            await self._flush(node)
        size = self.known.see(await self.namespace.getattr(node.ino)).size
        if not 0 <= offset < size:
            raise NoDevice(f"offset {offset} in a file of {size} bytes")
        if whence == os.SEEK_DATA:
            return await node.space.data_from(offset, size)
        return await node.space.hole_from(offset, size)

    async def copy_range(self, source: Handle, offset: int, target: Handle, target_offset: int, length: int) -> int:
        """Have the daemons copy bytes from one file to another, or within one; return how many, 0 at the source's end.

        That may be fewer than asked for: COPY_MAX at most, and what was copied before something failed. Ranges of one
        file that overlap are an InvalidArgument.
        """
        here, there = source.node, target.node
        if not source.reads or target.append:
            raise BadHandle("copying what cannot be read, or into what appends")
        self.check_open(source)
        self._check_writable(target)
        if offset < 0 or target_offset < 0 or length < 0:
            raise InvalidArgument(f"copying {length} bytes from {offset} to {target_offset}")
        if here.dirty:
            await self._flush(here)
        await self._turn(there)
        try:
            if there.dirty:
                await self._flush(there)
            size = self.known.see(await self.namespace.getattr(here.ino)).size
            length = min(length, size - offset, COPY_MAX)
            if length <= 0:
                return 0
            _check_range(target_offset, length)
            if here is there and abs(offset - target_offset) < length:
                raise InvalidArgument("copying between ranges that overlap")
            try:
                copied = await there.space.copy_from(here.space, offset, target_offset, length)
            except BaseException as error:
                there.doubtful = True
                if isinstance(error, FsError):
                    self.on_dropped(there.ino)
                raise
            finally:
                self._note_dirty(there)
            if copied < length:
                there.doubtful = True
                self.on_dropped(there.ino)
            there.writing.publish_soon(target_offset + copied)
            await self._publish(there)
        finally:
            there.order.release()
        self._touch_soon(source)
        return copied

    def _check_writable(self, handle: Handle) -> None:
        if not handle.writes:
            raise BadHandle("not open for writing")
        self.check_open(handle)
        if handle.error is not None:
            raise handle.error

    def check_open(self, handle: Handle) -> None:
        """Refuse a handle that was given back (BadHandle), or lost with the memory of its daemon (Stale)."""
        if handle.released:
            raise BadHandle(f"a handle of inode {handle.ino} that was closed")
        if handle.node.lost:
            raise Stale(f"inode {handle.ino} was lost when its daemon was started anew")

    # ── flushing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _quiet(self, node: _Node) -> None:
        """Flush, and wait for the touch under way."""
        if node.dirty:
            await self._flush(node)
        if node.touching is not None:
            await node.touching.wait()

    async def _flush(self, node: _Node, change: SetAttr | None = None) -> Attrs | None:
        """Take what was accepted so far to its daemons, then tell the inode's daemon.

        That changes attributes with the same request, if that is asked for; return them then. None: it had not to be
        told any more, and nothing is changed. Raise if it cannot be told; then it stays unpublished. Errors of the
        bytes themselves are with the handles.
        """
        writing, attrs = node.writing, None
        await writing.settle_all()
        if writing.unpublished or node.publishing.locked():
            attrs = await self._publish(node, change)
        if not node.dirty:
            self._dirty.pop(node, None)
        return attrs

    async def _publish(self, node: _Node, change: SetAttr | None = None) -> Attrs | None:
        """Tell the inode's daemon what was written, if nobody has meanwhile; return the attributes then."""
        writing, unanswered = node.writing, node.unanswered
        await _acquire(node.publishing)
        try:
            if not writing.unpublished:
                return None
            node.check_answered(unanswered)
            end, growth, reach = writing.unpublished_end, writing.unpublished_growth, writing.unpublished_reach
            writing.unpublished = False
            try:
                request = CommitWrite(node.ino, end, growth, reach, change)
                attrs = (await self.namespace.link_of(node.ino).call(request, AttrsReply)).attrs
            except BaseException as error:
                writing.unpublished = True
                node.doubtful = True  # it may have been applied, and its growth is counted again
                node.unanswered += isinstance(error, DaemonUnreachable)
                raise
            attrs = self.known.see(attrs, own=True)
            writing.unpublished_growth -= growth
            if writing.unpublished_end == end:
                writing.unpublished_end = 0
            if writing.unpublished_reach == reach:
                writing.unpublished_reach = 0
            return attrs
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
        """Flush where nobody waits for it: what cannot be published stays, for the next try and whoever closes.

        A client that was expelled tries once.
        """
        try:
            await self._flush(node)
        except FsError as error:
            log.warning("inode %d: cannot publish what was written: %s", node.ino, error)
        if node.handles and not self._links.expelled.is_set():
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
        for released in list(self._releasing.values()):
            await released.wait()

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
            self.known.see(await self.namespace.touch(node.ino))
        except FsError as error:
            log.info("inode %d: access time not set: %s", node.ino, error)
        finally:
            node.touching.set()
            node.touching = None

    async def touch(self, ino: int) -> None:
        """Set the access time of a directory or a symbolic link that was read, if relatime asks for it."""
        attrs = self.known.get(ino)
        if self._atime and attrs is not None and _touch_due(attrs):
            self.known.see(await self.namespace.touch(ino))


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
        started_ns = recording.now()
        await lock.acquire()
        recording.note(spans.ORDER, started_ns)


def _check_range(offset: int, length: int) -> None:
    if offset < 0:
        raise InvalidArgument(f"offset {offset}")
    if offset + length > FILE_SIZE_MAX:
        raise FileTooLarge(f"{offset} + {length}")


def _touch_due(attrs: Attrs) -> bool:
    """Apply relatime's rule (mount(8))."""
    atime_ns = attrs.atime_ns
    return atime_ns <= attrs.mtime_ns or atime_ns <= attrs.ctime_ns or time.time_ns() - atime_ns >= _DAY_NS
