"""Translate between the kernel's FUSE requests and the services: the only module that knows pyfuse3. Thin.

What the kernel may keep is decided here. Names and attributes carry a time-out. File data stays in the kernel's cache
over a close and an open only if the file's *epoch* (services/known.py) is what it was when the data came: then nobody
else changed the file. That is close-to-open.

With the companion library (``companion``) the kernel drops data only when it is told to, so that writes of this mount
leave the cache as it is. It is told when a file turns out to have changed elsewhere, after an append beside cached
handles, and of changes whose caller was freed. Whoever opens the file, asks for its attributes or gets a lock is
answered when that is done: a handle that came too early would be read from the old pages. Without the library, the
kernel drops all data of a file whenever it sees another mtime.

Appending handles bypass the kernel's cache (FOPEN_DIRECT_IO): the kernel would cache the bytes at the offset that it
believes in, and the inode's daemon may have decided on another. For such files the kernel clears no set-ID bits and
calls no fsync for O_SYNC; both are done here.

One handler of pyfuse3 runs per request, at most ``TASKS_MAX`` at once. Requests that wait for a dead daemon end with
the deadline of the links (``mount.op_timeout_s``); until then they hold their places, so that more than ``TASKS_MAX``
threads that insist on a dead daemon stop the mount for that long.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Generator, Iterator, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast, overload

import msgspec
import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from .callers import read_caller
from .companion import ATIME_NOW, CAP_DONT_MASK, CAP_EXPLICIT_INVAL_DATA, MTIME_NOW, Companion
from .errors import (
    BadHandle,
    DaemonUnreachable,
    Exists,
    FsError,
    NoAttribute,
    NotADirectory,
    NotFound,
    NotSupported,
    Stale,
)
from .interrupts import Interrupts
from .limits import MIB, NAME_MAX, TASKS_MAX
from .model import ROOT_INO, Attrs, LockKind
from .observe import recording
from .observe.statistics import Statistics
from .privileges import Who
from .rpc.messages import TIME_NOW, TIME_OMIT
from .services.deadline import Deadline, before_waiting
from .services.file_locks import FileLocks
from .services.files import Files, Handle
from .services.namespace import Namespace, Page

log = logging.getLogger(__name__)

#: Tasks that stay while there is nothing to do: as many as a busy program keeps under way, so that none is made anew.
TASKS_MIN = 8
#: Longest read that the kernel asks for (256 pages: FUSE_MAX_MAX_PAGES of fs/fuse/fuse_i.h).
READ_MAX = MIB
#: Read buffers kept for the next request.
BUFFERS_MAX = 16
#: Seconds that a file is kept for the kernel's second try to open it, and how often to look for one that can be kept.
HOLD_S = 0.1
HOLDS_MAX = 100
#: Seconds for the kernel to take an answer: the caller has to wake up for that. Nobody waits for this.
TAKEN_S = 0.05
#: Seconds that a lookup of a moved directory waits, at most, until the kernel has forgotten the old place: many times
#: what that takes, unless the caller of the lookup holds a lock that is in the way, or a daemon is missing.
LEAVE_S = 0.1
#: What st_blksize advises: the longest request, so that cp(1) and its kind need one request for each MiB.
BLOCK_SIZE_ADVISED = MIB
#: Unit of statvfs(3), and of st_blocks (inode(7)).
SPACE_UNIT = 4096
BLOCKS_UNIT = 512

#: Operations that may have much to write.
FLUSHING = frozenset({"flush", "fsync", "release", "fsyncdir"})
#: FUSE_WRITE of linux/fuse.h, and its flag for pages that the kernel writes back.
OPCODE_WRITE = 16
WRITE_CACHE = 1 << 0
#: Stands for the ids of a caller of whom only the thread is known.
UNKNOWN = -1
#: Stands for the epoch of data of which the kernel may hold any: older than every other.
ANY_EPOCH = -1
#: Files whose data the kernel drops at once. Each takes a thread, until reads of it that are under way have ended.
DROPS_MAX = 40

CAPABILITY = b"security.capability"
DEFAULT_ACL = b"system.posix_acl_default"
#: Attributes that the kernel asks for again and again (the first one before every write) and that hardly any file has:
#: that an inode has none is remembered for as long as its epoch lasts.
_ASKED_OFTEN = frozenset({CAPABILITY, b"system.posix_acl_access", DEFAULT_ACL})
#: One for all inodes: a frozenset has 216 bytes, also an empty one.
_NO_NAMES: frozenset[bytes] = frozenset()

#: Who holds locks: the kernel's number of a process or of an open file description, and the kind of lock.
Owner = tuple[int, LockKind]

T = TypeVar("T")
P = ParamSpec("P")
#: What handlers are methods of.
O = TypeVar("O")  # noqa: E741


def errno_of(error: Exception, what: str) -> int:
    """Return the errno that stands for a failure; whatever is unforeseen is logged and becomes EIO."""
    if isinstance(error, ExceptionGroup):
        for leaf in _leaves(error):
            if isinstance(leaf, FsError | FUSEError):
                return leaf.errno
    elif isinstance(error, FsError | FUSEError):
        return error.errno
    log.error("%s failed", what, exc_info=error)
    return errno.EIO


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


@overload
def guarded(
    handler: Callable[Concatenate[O, P], Coroutine[Any, Any, "Shown"]],
) -> Callable[Concatenate[O, P], Coroutine[Any, Any, EntryAttributes]]: ...
@overload
def guarded(
    handler: Callable[Concatenate[O, P], Coroutine[Any, Any, "Created"]],
) -> Callable[Concatenate[O, P], Coroutine[Any, Any, tuple[FileInfo, EntryAttributes]]]: ...
@overload
def guarded(
    handler: Callable[Concatenate[O, P], Coroutine[Any, Any, "Opened"]],
) -> Callable[Concatenate[O, P], Coroutine[Any, Any, FileInfo]]: ...
@overload
def guarded(
    handler: Callable[Concatenate[O, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[O, P], Coroutine[Any, Any, T]]: ...
def guarded(handler: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Let nothing but FUSEError and cancellation out of a handler: anything else would end pyfuse3's main loop.

    The operation has a deadline, whatever it waits for: its requests have each their own, and before them it may wait
    for those of others. Only what flushes takes as long as there is progress. Count what the handler does, and record
    it if somebody wants that.
    """
    name = handler.__name__
    patient = name in FLUSHING

    @functools.wraps(handler)
    async def guard(operations: Any, *args: Any) -> Any:
        started_ns = time.perf_counter_ns()
        recorder = recording.recorder
        operation = recorder.begin_operation(name, *operations.asked()) if recorder is not None else None
        error = 0
        try:
            with Deadline(math.inf if patient else operations.timeout_s, lazily=operations.by_hand):
                return await handler(operations, *args)
            raise DaemonUnreachable(f"{name} took longer than {operations.timeout_s} s")
        except Exception as failure:  # noqa: BLE001  the one place where everything is caught, and logged
            error = errno_of(failure, name)
            raise FUSEError(error) from None
        finally:
            operations.statistics.add(name, started_ns)
            if recorder is not None and operation is not None:
                recorder.end_operation(operation, error)

    @functools.wraps(guard)
    async def run(operations: Any, *args: Any) -> Any:
        begun, operations.begun = operations.begun, None
        if begun is not None:
            assert begun.unique == operations.asked()[0], "pyfuse3 hears of the request whose handler was begun"
        result = await (begun or guard(operations, *args))
        return result.for_pyfuse3() if isinstance(result, Shown | Opened | Created) else result

    return run


class Shown(NamedTuple):
    """Be what the kernel is told of an inode: attributes, and for how long (s) the name and they are good."""

    attrs: Attrs
    entry_timeout_s: float
    attr_timeout_s: float

    def for_pyfuse3(self) -> EntryAttributes:
        """Return it as pyfuse3 takes it."""
        attrs, entry = self.attrs, EntryAttributes()
        entry.st_ino = attrs.ino
        entry.generation = attrs.generation
        entry.entry_timeout = self.entry_timeout_s
        entry.attr_timeout = self.attr_timeout_s
        entry.st_mode = attrs.mode
        entry.st_nlink = attrs.nlink
        entry.st_uid = attrs.uid
        entry.st_gid = attrs.gid
        entry.st_rdev = attrs.rdev
        entry.st_size = attrs.size
        entry.st_blksize = BLOCK_SIZE_ADVISED
        entry.st_blocks = -(-attrs.allocated // BLOCKS_UNIT)
        entry.st_atime_ns = attrs.atime_ns
        entry.st_mtime_ns = attrs.mtime_ns
        entry.st_ctime_ns = attrs.ctime_ns
        return entry


class Opened(NamedTuple):
    """Be what the kernel is told of an open file."""

    fh: int
    direct_io: bool
    keep_cache: bool

    def for_pyfuse3(self) -> FileInfo:
        """Return it as pyfuse3 takes it."""
        return FileInfo(fh=self.fh, direct_io=self.direct_io, keep_cache=self.keep_cache)


class Created(NamedTuple):
    """Be what the kernel is told of a file that was made and opened."""

    opened: Opened
    shown: Shown

    def for_pyfuse3(self) -> tuple[FileInfo, EntryAttributes]:
        """Return it as pyfuse3 takes it."""
        return self.opened.for_pyfuse3(), self.shown.for_pyfuse3()


class Begun:
    """Be a handler that was begun by hand and waits for something: who awaits this has it go on.

    It must be awaited by the task and in the step in which it was begun: so nobody can tell the difference.
    """

    def __init__(self, unique: int, handler: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        self.unique = unique
        self._handler = handler
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, Any]:
        """Go on until the handler has ended; return its result."""
        handler, waits_for = self._handler, self._waits_for
        while True:
            try:
                heard = yield waits_for
            except BaseException as error:  # noqa: BLE001  for the handler to deal with
                go_on = functools.partial(handler.throw, error)
            else:
                go_on = functools.partial(handler.send, heard)
            try:
                waits_for = go_on()
            except StopIteration as done:
                return done.value


#: What ``begin`` says of a handler that waits for something; no errno.
WAITS = -1


def begin(operations: "BenchfsOperations", handler: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """Let a ``guarded`` handler go as far as it gets without waiting; return its errno (0: none) and its own result.

    WAITS: it has more to do, and will do it when pyfuse3 calls the handler for this request, which has to come next.
    """
    begun = handler.__wrapped__(operations, *args)  # type: ignore[attr-defined]
    operations.by_hand = True
    try:
        waits_for = begun.send(None)
    except StopIteration as done:
        return 0, done.value
    except FUSEError as error:
        return error.errno, None
    finally:
        operations.by_hand = False
    before_waiting()
    assert operations.begun is None, "pyfuse3 has taken up what was begun before"
    operations.begun = Begun(operations.asked()[0], begun, waits_for)
    return WAITS, None


class _Told:
    """Remember what the kernel was told about one inode that it holds; gone when it forgets the inode."""

    __slots__ = (
        "absent",
        "absent_epoch",
        "attrs_epoch",
        "data_epoch",
        "drops",
        "epoch",
        "gone",
        "lookups",
        "permissions",
        "place",
        "removed",
        "version",
    )

    def __init__(self) -> None:
        #: Version and epoch of the inode when they were last looked at; see ``_epoch``.
        self.version = self.epoch = 0
        #: Epoch of the attributes that it has (0: unknown).
        self.attrs_epoch = 0
        #: Epoch than which none of the file data that it has is older (0: it has none).
        self.data_epoch = 0
        #: Times that it was told to drop the data.
        self.drops = 0
        #: Extended attributes that the inode did not have in an epoch.
        self.absent = _NO_NAMES
        #: Mode, owner and group that it was told last.
        self.permissions: tuple[int, int, int] | None = None
        self.absent_epoch = 0
        #: Directory and name that led the kernel to this inode last.
        self.place: tuple[int, bytes] | None = None
        #: How often a name has led it here since it forgot the inode.
        self.lookups = 0
        #: Attributes of an inode that we removed: what somebody who is still in there gets to see.
        self.removed: Attrs | None = None
        #: A directory that somebody else removed, as the kernel was told by ESTALE.
        self.gone = False


class _Listing:
    """Be one open directory, with the page that was fetched last."""

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.page: Page | None = None
        #: The page was fetched to open the directory, and nobody has read it yet.
        self.unread = True
        #: Position before the page, and when it was fetched (trio time).
        self.start = 0
        self.fetched_s = 0.0

    def holds(self, cookie: int, age_max_s: float) -> bool:
        """Tell whether the page says what follows a position, and is young enough."""
        page = self.page
        return (
            page is not None
            and self.start <= cookie
            and (cookie < page.cookie or page.end)
            and trio.current_time() - self.fetched_s <= age_max_s
        )


class BenchfsOperations(pyfuse3.Operations):
    """Serve the kernel's requests. ``nursery`` runs what must not be waited for within a request.

    ``sync`` and ``dirsync`` are the mount options: behind writes through its cache the kernel calls fsync itself, the
    rest is synced here.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self,
        namespace: Namespace,
        files: Files,
        nursery: trio.Nursery,
        *,
        cache_timeout_s: float,
        xattr: bool,
        companion: Companion | None = None,
        interrupts: Interrupts | None = None,
        locks: FileLocks | None = None,
        sync: bool = False,
        dirsync: bool = False,
    ) -> None:
        self._sync = sync
        self._dirsync = sync or dirsync
        self._namespace = namespace
        self._files = files
        self._nursery = nursery
        self._cache_timeout_s = cache_timeout_s
        self._xattr = xattr
        self._companion = companion
        self._interrupts = interrupts
        self._locks = locks
        self.enable_acl = xattr
        self._told: dict[int, _Told] = {}
        self._handles: dict[int, Handle] = {}
        #: Who has locked through a handle: gives everything back when that is released. Processes do so earlier, when
        #: they close any handle of the file; open file descriptions (flock, F_OFD_SETLK) only then.
        self._owners: dict[int, set[Owner]] = {}
        #: Owners whose locks of an inode are being given back: their next ones come behind that.
        self._giving_back: dict[tuple[int, Owner], trio.Event] = {}
        self._listings: dict[int, _Listing] = {}
        self._last_fh = 0
        self._buffers: list[bytearray] = []
        self._dropping = trio.CapacityLimiter(DROPS_MAX)
        #: What names stand for, for a moment, while the kernel looks them up again; see ``_hold``.
        self._held: dict[tuple[int, bytes], int] = {}
        #: Directories that others have moved, while the kernel is told to forget where they were.
        self._leaving: dict[int, trio.Event] = {}
        #: The handler of the request that pyfuse3 is about to hear of, if it was begun before; see at_once.
        self.begun: Begun | None = None
        #: A handler is being begun by hand.
        self.by_hand = False
        self.statistics = Statistics()
        self.bytes_read = self.bytes_written = 0
        #: Longest time for an operation, s.
        self.timeout_s = namespace.links.op_timeout_s
        #: Questions for attributes that hardly any file has, and how many were answered from memory.
        self.absent_asked = self.absent_known = 0

    def answered(self) -> tuple[int, int]:
        """Return how many requests were read from the kernel, and how many of them were answered at once."""
        return (self._companion.counts.read, self._companion.counts.at_once) if self._companion is not None else (0, 0)

    def asked(self) -> tuple[int, int]:
        """Return the kernel's name of the request that was handed over last, and when it was read; before any await."""
        if self._companion is None:
            return 0, 0
        request = self._companion.request
        return request.unique, request.received_ns

    # ── attributes and names ─────────────────────────────────────────────────────────────────────────────────────────

    def _entry(self, attrs: Attrs, place: tuple[int, bytes] | None = None) -> Shown:
        """Turn attributes into what the kernel is told, and remember that it was; ``place`` is what they answer."""
        self._remember(attrs, place)
        return self._shown(attrs)

    def _remember(self, attrs: Attrs, place: tuple[int, bytes] | None) -> None:
        """Remember that the kernel is told of an inode: it will say when it has forgotten that."""
        told = self._told_of(attrs.ino)
        told.attrs_epoch = epoch = self._epoch(attrs.ino)
        told.permissions = attrs.mode, attrs.uid, attrs.gid
        if told.data_epoch not in (0, epoch, ANY_EPOCH):
            if self._granted(CAP_EXPLICIT_INVAL_DATA):
                told.data_epoch = ANY_EPOCH
                self._nursery.start_soon(self._drop_later, attrs.ino)
            else:
                told.data_epoch = 0
        if place is not None:
            told.place = place
            told.lookups += 1

    def _shown(self, attrs: Attrs) -> Shown:
        return Shown(attrs, self._cache_timeout_s, self._cache_timeout_s)

    def _granted(self, capability: int) -> bool:
        return self._companion is not None and bool(self._companion.granted & capability)

    async def _renewed(self, attrs: Attrs) -> Attrs:
        """Return attributes when the kernel has dropped data that changed elsewhere: it does not find out by itself."""
        told = self._told.get(attrs.ino)
        if (
            told is not None
            and told.data_epoch
            and told.data_epoch != self._epoch(attrs.ino)
            and self._granted(CAP_EXPLICIT_INVAL_DATA)
        ):
            await self._drop_data(attrs.ino)
            return self._files.known.get(attrs.ino) or attrs
        return attrs

    async def _drop_data(self, ino: int) -> None:
        """Have the kernel drop what it cached of a file.

        In a thread: the kernel waits for requests under way, which may need this event loop. Whoever is interrupted in
        waiting for this leaves the data in doubt.
        """
        told, epoch = self._told_of(ino), self._epoch(ino)
        told.data_epoch = ANY_EPOCH
        told.drops += 1
        drop = told.drops
        await trio.to_thread.run_sync(_invalidate_data, ino, abandon_on_cancel=True, limiter=self._dropping)
        if told.drops == drop:
            told.data_epoch = epoch

    async def _drop_later(self, ino: int) -> None:
        """Have the kernel drop data when it has taken the answer that is being given."""
        await trio.sleep(TAKEN_S)
        await self._drop_data(ino)

    def _epoch(self, ino: int) -> int:
        """Return the epoch of an inode, 0 if nothing is remembered.

        There are more inodes that the kernel knows than are remembered. One that was forgotten, and has not changed
        since, has its epoch still: else the kernel would be told to drop all its data.
        """
        known, told = self._files.known, self._told.get(ino)
        attrs = known.get(ino)
        if told is None or attrs is None:
            return known.epoch(ino)
        if attrs.version == told.version:
            known.resume(ino, told.epoch)
        told.version, told.epoch = attrs.version, known.epoch(ino)
        return told.epoch

    def _told_of(self, ino: int) -> _Told:
        told = self._told.get(ino)
        if told is None:
            told = self._told[ino] = _Told()
        return told

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> Shown:
        """Find a name, also ``.`` and ``..`` (for file handles of NFS servers)."""
        if name == b".":
            return self._entry(await self._files.getattr(parent_inode))
        if name == b"..":
            parent = (await self._files.getattr(parent_inode)).parent
            if not parent:
                raise NotADirectory(f"inode {parent_inode}")
            return self._entry(await self._files.getattr(parent))
        place = (parent_inode, name)
        try:
            if place in self._held:
                attrs = await self._files.getattr(self._held[place])
            else:
                attrs = await self._namespace.lookup(parent_inode, name)
        except Stale:
            self._check_gone(parent_inode)
            self._told_of(parent_inode).gone = True
            raise
        if attrs.is_dir:
            await self._leave_old_place(attrs.ino, place)
        return self._entry(await self._renewed(await self._files.fresh(attrs)), place)

    async def _leave_old_place(self, ino: int, place: tuple[int, bytes]) -> None:
        """Have the kernel forget, soon, the place from which a directory was moved to another one by somebody else.

        A directory has one place in the kernel's cache of names. It moves it when it is told of the new one, but only
        if it gets the locks for that at once, which a rename under way keeps from it: ESTALE (__d_unalias of Linux'
        fs/dcache.c). It asks once more then, and no third time: that answer waits until the old place is forgotten.
        The first does not, and the second not for long: the old place's daemon may be missing, and whoever holds the
        lock of a directory may wait for this answer.
        """
        if (forgotten := self._leaving.get(ino)) is not None:
            before_waiting()
            with trio.move_on_after(LEAVE_S):
                await forgotten.wait()
            forgotten.set()  # nobody else waits for what takes so long
            return
        told = self._told.get(ino)
        if told is not None and told.place is not None and told.place[0] != place[0]:
            self._leaving[ino] = trio.Event()
            self._nursery.start_soon(self._forget_place, ino, *told.place)

    async def _forget_place(self, ino: int, parent: int, name: bytes) -> None:
        """Have the kernel forget a name that stands for nothing any more; what stands there now may be mounted on."""
        try:
            with contextlib.suppress(FsError):
                try:
                    await self._namespace.lookup(parent, name)
                except (NotFound, Stale):
                    await trio.to_thread.run_sync(
                        _invalidate_name, parent, name, abandon_on_cancel=True, limiter=self._dropping
                    )
        finally:
            self._leaving.pop(ino).set()

    def _check_gone(self, parent: int) -> None:
        """Raise NotFound for a name in a directory of which the kernel knows already that it was removed.

        The first time it hears ESTALE: it looks the path up again, and may find another directory in its place. Who
        still stands in the old one comes again, and finds nothing.
        """
        told = self._told.get(parent)
        if told is not None and told.gone and not self._namespace.links.expelled.is_set():
            raise NotFound(f"directory {parent} was removed") from None

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Forget what the kernel has forgotten. Raises nothing.

        What it has been told of again since, by an answer that has overtaken this, stays: else the place of a directory
        would not be known when somebody moves it. Not all answers are counted: to forget an inode too early costs a
        cache, and the next answer remembers it again. But an open file stays known: the kernel has its data, and will
        have to be told to drop it.
        """
        for ino, lookups in inode_list:
            told = self._told.get(ino)
            if told is None:
                continue
            told.lookups = max(0, told.lookups - lookups)
            if not told.lookups and not self._files.is_open(ino):
                del self._told[ino]
                if told.removed is not None:
                    self._files.known.forget(ino)

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> Shown:
        """Return attributes; of what we removed and somebody still stands in, the last ones, with no link.

        Data that changed elsewhere is dropped before the answer, so that nobody reads it who has seen the new size. But
        an answer that a notification has overtaken is shown by the kernel and not taken. Where permissions changed too
        it has to be taken, since the kernel asks in order to check them: there the data is dropped behind the answer.

        The kernel forgets what a directory is like whenever it changes something in it, though the answer to that said
        so: what a daemon has said within the time-out is good for the rest of it.
        """
        if (directory := self._directory_now(inode)) is not None:
            return directory
        told = self._told_of(inode)
        try:
            attrs = await self._files.getattr(inode)
            if told.permissions in (None, (attrs.mode, attrs.uid, attrs.gid)):
                attrs = await self._renewed(attrs)
        except Stale:
            if told.removed is None:
                raise
            attrs = told.removed
        return self._entry(attrs)

    def _directory_now(self, ino: int) -> Shown | None:
        """Return what the kernel is told of a directory without asking anybody, None if it has to be asked for."""
        if not self._cache_timeout_s:
            return None
        known, age_s = self._files.known.get(ino), self._files.known.age_s(ino)
        if known is None or not known.is_dir or age_s >= self._cache_timeout_s or self._is_removed(ino):
            return None
        self._remember(known, None)
        return Shown(known, self._cache_timeout_s, self._cache_timeout_s - age_s)

    @guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> Shown:
        """Change attributes. UTIME_NOW is the daemon's now, as the companion tells it from other times.

        ftruncate(2), which has a handle, always sets the times; truncate(2) only if the size changes.
        """
        flags = self._companion.request.flags if self._companion is not None else 0
        mode = stat.S_IMODE(attr.st_mode) if fields.update_mode else None
        uid = attr.st_uid if fields.update_uid else None
        gid = attr.st_gid if fields.update_gid else None
        size = attr.st_size if fields.update_size else None
        atime_ns = mtime_ns = TIME_OMIT
        if fields.update_atime:
            atime_ns = TIME_NOW if flags & ATIME_NOW else attr.st_atime_ns
        if fields.update_mtime:
            mtime_ns = TIME_NOW if flags & MTIME_NOW else attr.st_mtime_ns
        elif size is not None and fh is not None:
            mtime_ns = TIME_NOW
        change = self._files.setattr(
            inode, mode=mode, uid=uid, gid=gid, size=size, atime_ns=atime_ns, mtime_ns=mtime_ns, who=_caller(ctx)
        )
        try:
            attrs = await (self._watched(change, inode) if size is not None else change)
        except Stale:
            attrs = self._change_removed(inode, mode, uid, gid, atime_ns, mtime_ns)
        if self._sync:
            await self._namespace.sync_names()
        return self._entry(attrs)

    def _change_removed(
        self, ino: int, mode: int | None, uid: int | None, gid: int | None, atime_ns: int, mtime_ns: int
    ) -> Attrs:
        """Change the attributes of what we removed and somebody still stands in or holds (a FIFO). Stale."""
        told = self._told.get(ino)
        if told is None or told.removed is None:
            raise Stale(f"inode {ino}")
        old = told.removed
        now_ns = max(time.time_ns(), old.ctime_ns + 1)  # our clock may be behind the daemon's
        times = {TIME_OMIT: (old.atime_ns, old.mtime_ns), TIME_NOW: (now_ns, now_ns)}
        told.removed = msgspec.structs.replace(
            old,
            mode=old.mode if mode is None else stat.S_IFMT(old.mode) | mode,
            uid=old.uid if uid is None else uid,
            gid=old.gid if gid is None else gid,
            atime_ns=times[atime_ns][0] if atime_ns in times else atime_ns,
            mtime_ns=times[mtime_ns][1] if mtime_ns in times else mtime_ns,
            ctime_ns=now_ns,
        )
        return told.removed

    @guarded
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Return where a symbolic link points."""
        target = await self._namespace.readlink(inode)
        await self._files.touch(inode)
        return target

    async def _make(
        self, parent: int, name: bytes, mode: int, ctx: RequestContext, *, rdev: int = 0, target: bytes = b""
    ) -> Shown:
        self._check_gone(parent)
        umask = 0 if target else self._umask(ctx)
        attrs = await self._namespace.make(parent, name, mode, ctx.uid, ctx.gid, rdev=rdev, target=target, umask=umask)
        await self._sync_names()
        return self._new(parent, name, self._files.known.see(attrs))

    def _umask(self, ctx: RequestContext) -> int:
        """Return what is left to the daemon to take from a mode, which knows whether a default ACL goes first."""
        return ctx.umask & 0o777 if self._granted(CAP_DONT_MASK) else 0

    def _new(self, parent: int, name: bytes, attrs: Attrs) -> Shown:
        """Tell of an inode that was just made here."""
        self._changed(parent)
        return self._entry(attrs, (parent, name))

    @guarded
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> Shown:
        """Make a file, FIFO, socket or device."""
        return await self._make(parent_inode, name, mode, ctx, rdev=rdev)

    @guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> Shown:
        """Make a directory."""
        return await self._make(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode), ctx)

    @guarded
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> Shown:
        """Make a symbolic link."""
        return await self._make(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target=target)

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name that is not a directory's."""
        self._removed(parent_inode, (await self._namespace.unlink(parent_inode, name)).ino)
        await self._sync_names()

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        self._removed(parent_inode, (await self._namespace.rmdir(parent_inode, name)).ino)
        await self._sync_names()

    def _removed(self, parent: int, ino: int) -> None:
        self._changed(parent)
        self._files.known.change(ino, None)
        told, attrs = self._told.get(ino), self._files.known.get(ino)
        if told is not None and attrs is not None:
            now_ns = max(time.time_ns(), attrs.ctime_ns + 1)  # our clock may be behind the daemon's
            told.removed = msgspec.structs.replace(attrs, nlink=0, ctime_ns=now_ns)

    @guarded
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> Shown:
        """Give an inode another name."""
        self._check_gone(new_parent_inode)
        attrs = await self._namespace.link(inode, new_parent_inode, new_name)
        self._changed(new_parent_inode)
        await self._sync_names()
        return self._entry(await self._files.fresh(attrs))

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Move a name."""
        self._check_gone(parent_inode_new)
        reply = await self._namespace.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)
        self._changed(parent_inode_old)
        if flags & pyfuse3.RENAME_EXCHANGE or not reply.other:
            self._changed(parent_inode_new)
        else:
            self._removed(parent_inode_new, reply.other)
        await self._sync_names()

    async def _sync_names(self) -> None:
        """Bring a change of names to stable storage, where the mount options ask for that."""
        if self._dirsync:
            await self._namespace.sync_names()

    async def sync_data(self, handle: Handle) -> None:
        """Bring what was written past the kernel's cache to stable storage, if open(2) or mount(8) asked for that."""
        if handle.syncs or self._sync:
            await self._files.fsync(handle)

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> Opened:
        """Open a file. One that has vanished answers ESTALE: the kernel then looks the name up again, once."""
        told = self._told_of(inode)
        truncated = inode if flags & os.O_TRUNC else 0
        try:
            handle = await self._taken(self._open(inode, flags, _caller(ctx)), self._files.release, truncated)
        except Stale:
            if told.place is not None and told.removed is None:
                await self._hold(told.place)
            raise
        told = self._told_of(inode)
        if told.place is not None and self._held.get(told.place) == inode:
            del self._held[told.place]
        epoch = self._epoch(inode)
        if told.attrs_epoch != epoch:
            _invalidate_attrs(inode)
            told.attrs_epoch = epoch
        if not self._granted(CAP_EXPLICIT_INVAL_DATA):
            keep_cache = told.data_epoch == epoch and not handle.append
            told.data_epoch = 0 if handle.append else epoch
        else:
            keep_cache = told.data_epoch == epoch
            if told.data_epoch == 0 and not handle.append:
                told.data_epoch = epoch
        return self._opened(handle, keep_cache)

    async def _open(self, ino: int, flags: int, who: Who) -> Handle:
        """Open a file and have the kernel drop data that has changed elsewhere.

        It would do so by itself if it was told not to keep it, but after another open may have been answered.
        """
        handle = await self._files.open(ino, flags, who)
        await self._renewed(handle.node.attrs)
        return handle

    async def _taken(self, opening: Awaitable[T], give_back: Callable[[T], Awaitable[None]], changed: int = 0) -> T:
        """Wait for what a request opens, before any other await; give it back if the caller was freed meanwhile.

        The answer, which nobody waits for, is EINTR then, and the kernel drops its data of the inode ``changed``.
        Otherwise it has to be given in the same step.
        """
        if self._interrupts is None:
            return await opening
        unique = self._interrupts.begin()
        try:
            opened = await opening
        except BaseException:
            self._interrupts.end(unique)
            raise
        if not self._interrupts.end(unique):
            if changed:
                self.invalidate_data(changed)
            await give_back(opened)
            raise FUSEError(errno.EINTR)
        return opened

    async def _hold(self, place: tuple[int, bytes]) -> None:
        """Keep the file that a name stands for now, for as long as the kernel takes to come back for it.

        It tries once more after ESTALE. Where other mounts replace the file again and again, that would meet a file
        that has vanished too, though there always is one.
        """
        try:
            for _ in range(HOLDS_MAX):
                attrs = await self._namespace.lookup(*place)
                if not attrs.is_file:
                    return
                with contextlib.suppress(Stale):
                    handle = await self._files.open(attrs.ino, os.O_RDONLY | os.O_NOATIME)
                    self._held[place] = attrs.ino
                    self._nursery.start_soon(self._let_go, place, handle)
                    return
        except (NotFound, Stale):
            return

    async def _let_go(self, place: tuple[int, bytes], handle: Handle) -> None:
        await trio.sleep(HOLD_S)
        if self._held.get(place) == handle.ino:
            del self._held[place]
        with contextlib.suppress(FsError):
            await self._files.release(handle)

    @guarded
    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext) -> Created:
        """Make a file and open it.

        A file that another mount made meanwhile is not opened here, where the kernel would check no permissions:
        ESTALE has it look the name up and open what it finds.
        """
        self._check_gone(parent_inode)

        async def creation() -> Handle:
            handle = await self._files.create(parent_inode, name, mode, ctx.uid, ctx.gid, flags, self._umask(ctx))
            try:
                await self._sync_names()
            except BaseException:
                before_waiting()
                with trio.CancelScope(shield=True):
                    await self._files.release(handle)
                raise
            return handle

        try:
            handle = await self._taken(creation(), self._files.release)
        except Exists:
            if flags & os.O_EXCL:
                raise
            raise Stale("made elsewhere meanwhile") from None
        shown = self._new(parent_inode, name, handle.node.attrs)
        self._told_of(handle.ino).data_epoch = 0 if handle.append else self._epoch(handle.ino)
        return Created(self._opened(handle, keep_cache=True), shown)

    def _opened(self, handle: Handle, keep_cache: bool) -> Opened:
        self._last_fh += 1
        self._handles[self._last_fh] = handle
        return Opened(self._last_fh, handle.append, keep_cache)

    def handle(self, fh: int) -> Handle:
        """Return an open file. BadHandle."""
        handle = self._handles.get(fh)
        if handle is None:
            raise BadHandle(f"file handle {fh}")
        return handle

    @guarded
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read into a buffer that is used again by the next request.

        pyfuse3 copies the answer out in the same step in which this returns (fuse_read_async of its handlers.pxi does
        not await in between), so no other request can get hold of the buffer before.
        """
        handle = self.handle(fh)
        buffer = self._buffers.pop() if self._buffers and size <= READ_MAX else bytearray(max(size, READ_MAX))
        view = memoryview(buffer)[:size]
        length = await self._watched(self._files.read(handle, off, view))
        if len(buffer) == READ_MAX and len(self._buffers) < BUFFERS_MAX:
            self._buffers.append(buffer)
        self.bytes_read += length
        return cast(bytes, view[:length])  # any buffer will do

    @guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write all of ``buf``."""
        handle, who = self.handle(fh), self.caller()
        self.bytes_written += len(buf)
        if not handle.append:
            return await self._watched(self._files.write(handle, off, buf, who), handle.ino)
        return await self._watched(self._append(handle, buf, who), handle.ino)

    def caller(self) -> Who | None:
        """Return who sent the request that was handed over last; before any await.

        None: nobody tells, without the companion library; or the kernel writes pages that were changed by mapping.
        """
        if self._companion is None:
            return None
        request = self._companion.request
        if request.opcode == OPCODE_WRITE and request.flags & WRITE_CACHE:
            return None
        return functools.partial(read_caller, self._companion.pid_of(request.unique), UNKNOWN, UNKNOWN)

    async def _append(self, handle: Handle, buf: bytes, who: Who | None) -> int:
        if who is None:
            await self._files.drop_privileges(handle)
        try:
            length = await self._files.write(handle, 0, buf, who)
        finally:
            await self._drop_tail(handle)
        await self.sync_data(handle)
        return length

    async def _drop_tail(self, handle: Handle) -> None:
        """Have the kernel drop data beside which bytes were appended: the last page may hold zeros in their place."""
        told = self._told_of(handle.ino)
        others = not all(other.append for other in handle.node.handles)
        if self._granted(CAP_EXPLICIT_INVAL_DATA) and (told.data_epoch or others):
            await self._drop_data(handle.ino)

    @guarded
    async def flush(self, fh: int) -> None:
        """Do what close(2) promises; the caller's POSIX locks of the file go (fcntl(2)), behind what he has written."""
        owner = self._companion.request.lock_owner if self._companion is not None else 0
        await self._watched(self.flush_for(fh, owner))

    async def flush_for(self, fh: int, owner: int) -> None:
        """Flush a file that a process closes, known by its number as an owner of locks, and give those back."""
        handle = self.handle(fh)
        locker = (owner, LockKind.POSIX)
        for other, owners in self._owners.items():
            if locker in owners and self._handles[other].ino == handle.ino:
                owners.discard(locker)  # what this process locks from now on has nothing to do with that handle
        async with self._unlocking(handle.ino, {locker}):
            await self._files.flush(handle)

    def flush_now(self, fh: int, owner: int) -> bool:
        """Tell whether ``flush_for`` has nothing to do."""
        handle = self._handles.get(fh)
        if handle is None or not self._files.is_flushed(handle):
            return False
        locker = (owner, LockKind.POSIX)
        return (self._locks is None or not self._locks.knows(handle.ino, *locker)) and not any(
            locker in owners for owners in self._owners.values()
        )

    @contextlib.asynccontextmanager
    async def _unlocking(self, ino: int, owners: Collection[Owner]) -> AsyncIterator[None]:
        """Give the locks of owners back behind the block, whatever becomes of that; all, though some fail."""
        if self._locks is None or not owners:
            yield
            return
        done = trio.Event()
        for owner in owners:
            self._giving_back[ino, owner] = done
        try:
            yield
        finally:
            async with contextlib.AsyncExitStack() as drops:
                drops.callback(self._gave_back, ino, owners, done)
                for locker, kind in owners:
                    drops.push_async_callback(self._locks.drop, ino, locker, kind)

    def _gave_back(self, ino: int, owners: Collection[Owner], done: trio.Event) -> None:
        for owner in owners:
            if self._giving_back.get((ino, owner)) is done:
                del self._giving_back[ino, owner]
        done.set()

    async def _watched(self, work: Awaitable[T], changed: int = 0) -> T:
        """Wait for what a request does, and let its caller die meanwhile; before any other await.

        If the caller was freed, the kernel does not know what became of the data of the inode ``changed``: it drops it.
        """
        if self._interrupts is None:
            return await work
        unique = self._interrupts.begin(watch=True)
        try:
            return await work
        finally:
            if not self._interrupts.end(unique) and changed:
                self.invalidate_data(changed)

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Bring a file to stable storage; its size is needed to read it, so ``datasync`` saves nothing."""
        await self._files.fsync(self.handle(fh))

    @guarded
    async def release(self, fh: int) -> None:
        """Give a handle back, and all locks of open file descriptions that were taken through it."""
        handle = self._handles.pop(fh)
        owners = self._owners.pop(fh, set())
        try:
            async with self._unlocking(handle.ino, owners):
                if owners:
                    await self._files.settle(handle)
        finally:
            await self._files.release(handle)
        self._epoch(handle.ino)  # as of what was written through it

    def release_soon(self, fh: int) -> bool:
        """Give a handle back behind the answer, if it only reads and nothing is to be unlocked; tell whether it is."""
        handle = self._handles.get(fh)
        if handle is None or fh in self._owners or not self._files.release_soon(handle):
            return False
        del self._handles[fh]
        self._epoch(handle.ino)
        return True

    async def begin_lock(self, fh: int, owner: int, kind: LockKind) -> None:
        """Take note of who is about to lock through a handle, behind what he is giving back. BadHandle.

        RELEASE comes when close(2) has returned long since, and the kernel may have numbered another open file alike.
        """
        locker = (owner, kind)
        while (giving_back := self._giving_back.get((self.handle(fh).ino, locker))) is not None:
            await giving_back.wait()
        self._owners.setdefault(fh, set()).add(locker)

    async def revalidate(self, ino: int) -> None:
        """Have the kernel drop what it knows of a file if that changed elsewhere: its lock was taken."""
        told = self._told_of(ino)
        try:
            await self._files.getattr(ino)
        except FsError as error:  # the lock is there; what cannot be asked has changed
            log.info("inode %d: not known whether it changed elsewhere: %s", ino, error)
            told.data_epoch = ANY_EPOCH
        epoch = self._epoch(ino)
        if told.data_epoch != epoch:
            await self._drop_data(ino)
            told.attrs_epoch = 0
        elif told.attrs_epoch != epoch:
            told.attrs_epoch = epoch
            _invalidate_attrs(ino)

    def invalidate_data(self, ino: int) -> None:
        """Have the kernel drop, soon, what it cached of a file: bytes that it holds were not written, or are old."""
        self._told_of(ino).data_epoch = ANY_EPOCH
        self._nursery.start_soon(self._drop_data, ino)

    # ── directories ──────────────────────────────────────────────────────────────────────────────────────────────────

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory and fetch its first page: that it is there is seen here, where ESTALE helps the kernel."""
        listing = _Listing(inode)
        await self._taken(self._fetch(listing, 0), _nothing)
        self._last_fh += 1
        self._listings[self._last_fh] = listing
        return self._last_fh

    async def _fetch(self, listing: _Listing, cookie: int) -> Page:
        try:
            page = await self._namespace.readdir(listing.ino, cookie)
        except Stale:
            if not self._is_removed(listing.ino):
                raise
            page = Page((), True, cookie, listing.ino)
        listing.page, listing.start, listing.fetched_s = page, cookie, trio.current_time()
        return page

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory with attributes from position ``start_id`` on; ``.`` and ``..`` come first."""
        listing = self._listings[fh]
        if start_id == 0:
            if not listing.unread:
                listing.page = None
            listing.unread = False
            await self._files.touch(listing.ino)
        while True:
            page = listing.page
            if page is None or not listing.holds(start_id, self._cache_timeout_s):
                page = await self._fetch(listing, start_id)
            for cookie, name, ino in ((1, b".", listing.ino), (2, b"..", page.parent)):
                if cookie > start_id and not pyfuse3.readdir_reply(token, name, _dot(ino), cookie):
                    return
            for entry in page.entries:
                if entry.cookie <= start_id:
                    continue
                assert entry.attrs is not None, "the name space fills in all attributes"
                attrs = await self._files.fresh(entry.attrs)
                if not pyfuse3.readdir_reply(token, entry.name, self._shown(attrs).for_pyfuse3(), entry.cookie):
                    return
                self._remember(attrs, (listing.ino, entry.name))
            if page.end:
                return
            start_id = page.cookie

    def _changed(self, parent: int) -> None:
        """Drop fetched pages of a directory that we changed: they may list what is gone."""
        for listing in self._listings.values():
            if listing.ino == parent:
                listing.page = None

    @guarded
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        del self._listings[fh]

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Bring names to stable storage."""
        await self._namespace.sync_names()

    # ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Sum up the space under all daemons."""
        space = await self._namespace.space()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = SPACE_UNIT
        data.f_blocks = space.total // SPACE_UNIT
        data.f_bfree = space.free // SPACE_UNIT
        data.f_bavail = space.available // SPACE_UNIT
        data.f_files = space.files
        data.f_ffree = data.f_favail = space.files_free
        data.f_namemax = NAME_MAX
        return data

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Return an extended attribute. ENOSYS, where they are off, has the kernel never ask again."""
        self._check_xattr()
        if self.lacks(inode, name):
            raise NoAttribute(str(name))
        if name not in _ASKED_OFTEN:
            return await self._getxattr(inode, name)
        self.absent_asked += 1
        told, epoch = self._told_of(inode), self._epoch(inode)
        if told.absent_epoch != epoch:
            told.absent, told.absent_epoch = _NO_NAMES, epoch
        try:
            return await self._getxattr(inode, name)
        except NoAttribute:
            if told.absent_epoch == epoch:
                told.absent |= {name}
            raise

    def lacks(self, ino: int, name: bytes) -> bool:
        """Tell whether an inode is known not to have an attribute that the kernel asks for often, and count that."""
        if name not in _ASKED_OFTEN or not self._xattr:
            return False
        attrs = self._files.known.get(ino)
        if attrs is None or attrs.xattrs:
            told, epoch = self._told_of(ino), self._epoch(ino)
            if not epoch or told.absent_epoch != epoch or name not in told.absent:
                return False
        self.absent_asked += 1
        self.absent_known += 1
        return True

    async def _getxattr(self, ino: int, name: bytes) -> bytes:
        try:
            return await self._namespace.getxattr(ino, name)
        except Stale:
            if self._is_removed(ino):
                raise NoAttribute(f"inode {ino} was removed") from None
            raise

    def _is_removed(self, ino: int) -> bool:
        """Tell whether we removed an inode that somebody still stands in."""
        told = self._told.get(ino)
        return told is not None and told.removed is not None

    @guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """List the names of extended attributes; those of ``trusted.`` are root's to see (xattr(7))."""
        self._check_xattr()
        try:
            names = await self._namespace.listxattr(inode)
        except Stale:
            if not self._is_removed(inode):
                raise
            return []
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(b"trusted.")]

    @guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute; pyfuse3 has dealt with XATTR_CREATE and XATTR_REPLACE."""
        await self.set_xattr(inode, name, value, 0, _caller(ctx))

    async def set_xattr(self, ino: int, name: bytes, value: bytes, flags: int, who: Who | None) -> None:
        """Set an extended attribute, ``flags`` as in setxattr(2). A default ACL needs the daemon to know the umask."""
        self._check_xattr()
        if name == DEFAULT_ACL and not self._granted(CAP_DONT_MASK):
            raise NotSupported("default ACLs")
        await self._files.setxattr(ino, name, value, flags, who)
        told = self._told_of(ino)
        told.absent, told.absent_epoch = _NO_NAMES, 0  # an answer from before does not count any more

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        self._check_xattr()
        self._files.known.see(await self._namespace.removexattr(inode, name), own=True)

    def _check_xattr(self) -> None:
        if not self._xattr:
            raise FUSEError(errno.ENOSYS)


async def _nothing(page: Page) -> None:
    """Give back what takes no place anywhere."""


def _caller(ctx: RequestContext) -> Who:
    return functools.partial(read_caller, ctx.pid, ctx.uid, ctx.gid)


def _dot(ino: int) -> EntryAttributes:
    """Say as much of ``.`` or ``..`` as a listing shows; the kernel takes no attributes from them."""
    entry = EntryAttributes()
    entry.st_ino = ino
    entry.st_mode = stat.S_IFDIR
    return entry


def _invalidate_attrs(ino: int) -> None:
    """Have the kernel ask for attributes again; this does not block, also not within a request for the inode."""
    _ignore_missing(functools.partial(pyfuse3.invalidate_inode, ino, attr_only=True))


def _invalidate_data(ino: int) -> None:
    _ignore_missing(functools.partial(pyfuse3.invalidate_inode, ino))


def _invalidate_name(parent: int, name: bytes) -> None:
    _ignore_missing(functools.partial(pyfuse3.invalidate_entry, parent, name))


def _ignore_missing(notify: Callable[[], None]) -> None:
    """Notify the kernel; that it does not know the inode any more is no error."""
    try:
        notify()
    except OSError as error:
        if error.errno != errno.ENOENT:
            log.warning("the kernel did not take a notification: %s", error)


def mount(operations: pyfuse3.Operations, mountpoint: str, options: Sequence[str]) -> None:
    """Mount: from here on requests queue up. One mount in one process (libfuse's session is a global of pyfuse3).

    RuntimeError when the kernel or fusermount3 refuses; the reason went to stderr.
    """
    pyfuse3.init(operations, mountpoint, set(options))


async def serve() -> None:
    """Serve requests until the file system is unmounted, or ``stop`` is called."""
    await pyfuse3.main(min_tasks=TASKS_MIN, max_tasks=TASKS_MAX)


def stop() -> None:
    """Let ``serve`` return when the requests under way are done."""
    pyfuse3.terminate()


def unmount() -> None:
    """Take the mount away, lazily if it is busy, and free the session."""
    pyfuse3.close(unmount=True)


assert pyfuse3.ROOT_INODE == ROOT_INO
