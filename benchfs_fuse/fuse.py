"""Translate between the kernel's FUSE requests and the services: the only module that knows pyfuse3. Thin.

What the kernel may keep is decided here. Names and attributes carry a time-out. File data stays in the kernel's cache
over a close and an open only if the file's *epoch* (services/known.py) is what it was when the data came: then nobody
else changed the file. That is close-to-open.

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
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar, cast

import msgspec
import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from .errors import BadHandle, Exists, FsError, NoAttribute, NotADirectory, NotFound, NotSupported, Stale
from .limits import MIB, NAME_MAX
from .model import ROOT_INO, Attrs
from .rpc.messages import TIME_NOW, TIME_OMIT
from .services.files import Files, Handle
from .services.namespace import Namespace, Page

log = logging.getLogger(__name__)

#: Requests of the kernel served at once. Each holds a place and, for writes, up to 1 MiB of memory in libfuse.
TASKS_MAX = 512
#: Tasks that stay while there is nothing to do: as many as a busy program keeps under way, so that none is made anew.
TASKS_MIN = 8
#: Longest read that the kernel asks for (256 pages: FUSE_MAX_MAX_PAGES of fs/fuse/fuse_i.h).
READ_MAX = MIB
#: Read buffers kept for the next request.
BUFFERS_MAX = 16
#: Seconds that a file is kept for the kernel's second try to open it, and how often to look for one that can be kept.
HOLD_S = 0.1
HOLDS_MAX = 100
#: What st_blksize advises: the longest request, so that cp(1) and its kind need one request for each MiB.
BLOCK_SIZE_ADVISED = MIB
#: Unit of statvfs(3), and of st_blocks (inode(7)).
SPACE_UNIT = 4096
BLOCKS_UNIT = 512

CAPABILITY = b"security.capability"
DEFAULT_ACL = b"system.posix_acl_default"
#: Attributes that the kernel asks for again and again (the first one before every write) and that hardly any file has:
#: that an inode has none is remembered for as long as its epoch lasts.
_ASKED_OFTEN = frozenset({CAPABILITY, b"system.posix_acl_access", DEFAULT_ACL})

H = TypeVar("H", bound=Callable[..., Coroutine[Any, Any, Any]])


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


def guarded(handler: H) -> H:
    """Let nothing but FUSEError and cancellation out of a handler: anything else would end pyfuse3's main loop."""

    @functools.wraps(handler)
    async def run(*args: Any) -> Any:
        try:
            return await handler(*args)
        except Exception as error:  # noqa: BLE001  the one place where everything is caught, and logged
            raise FUSEError(errno_of(error, handler.__name__)) from None

    return cast(H, run)


class _Told:
    """Remember what the kernel was told about one inode that it holds; gone when it forgets the inode."""

    __slots__ = ("absent", "absent_epoch", "attrs_epoch", "data_epoch", "gone", "place", "removed")

    def __init__(self) -> None:
        #: Epochs of the attributes that it has, and of the file data that it may have.
        self.attrs_epoch = 0
        self.data_epoch = 0
        #: Extended attributes that the inode did not have in an epoch.
        self.absent: frozenset[bytes] = frozenset()
        self.absent_epoch = 0
        #: Directory and name that led the kernel to this inode last.
        self.place: tuple[int, bytes] | None = None
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
    """Serve the kernel's requests. ``nursery`` runs what must not be waited for within a request."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self, namespace: Namespace, files: Files, nursery: trio.Nursery, *, cache_timeout_s: float, xattr: bool
    ) -> None:
        self._namespace = namespace
        self._files = files
        self._nursery = nursery
        self._cache_timeout_s = cache_timeout_s
        self._xattr = xattr
        self.enable_acl = xattr
        self._told: dict[int, _Told] = {}
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, _Listing] = {}
        self._last_fh = 0
        self._buffers: list[bytearray] = []
        #: What names stand for, for a moment, while the kernel looks them up again; see ``_hold``.
        self._held: dict[tuple[int, bytes], int] = {}

    # ── attributes and names ─────────────────────────────────────────────────────────────────────────────────────────

    def _entry(self, attrs: Attrs, place: tuple[int, bytes] | None = None) -> EntryAttributes:
        """Turn attributes into what the kernel is told, and remember that it was; ``place`` is what they answer."""
        told = self._told_of(attrs.ino)
        told.attrs_epoch = self._files.known.epoch(attrs.ino)
        if place is not None:
            told.place = place
        entry = EntryAttributes()
        entry.st_ino = attrs.ino
        entry.generation = attrs.generation
        entry.entry_timeout = entry.attr_timeout = self._cache_timeout_s
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

    def _told_of(self, ino: int) -> _Told:
        told = self._told.get(ino)
        if told is None:
            told = self._told[ino] = _Told()
        return told

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
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
        return self._entry(await self._files.fresh(attrs), place)

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

        The counts are left alone: to forget an inode too early costs a cache, and the next answer remembers it again.
        """
        for ino, _ in inode_list:
            self._told.pop(ino, None)

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Return attributes; of what we removed and somebody still stands in, the last ones, with no link."""
        try:
            attrs = await self._files.getattr(inode)
        except Stale:
            told = self._told.get(inode)
            if told is None or told.removed is None:
                raise
            attrs = told.removed
        return self._entry(attrs)

    @guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Change attributes. UTIME_NOW comes as a time of this machine: pyfuse3 does not tell it from others.

        ftruncate(2), which has a handle, always sets the times; truncate(2) only if the size changes.
        """
        mode = stat.S_IMODE(attr.st_mode) if fields.update_mode else None
        uid = attr.st_uid if fields.update_uid else None
        gid = attr.st_gid if fields.update_gid else None
        size = attr.st_size if fields.update_size else None
        atime_ns = attr.st_atime_ns if fields.update_atime else TIME_OMIT
        mtime_ns = TIME_OMIT
        if fields.update_mtime:
            mtime_ns = attr.st_mtime_ns
        elif size is not None and fh is not None:
            mtime_ns = TIME_NOW
        try:
            attrs = await self._files.setattr(
                inode, mode=mode, uid=uid, gid=gid, size=size, atime_ns=atime_ns, mtime_ns=mtime_ns
            )
        except Stale:
            attrs = self._change_removed(inode, mode, uid, gid)
        return self._entry(attrs)

    def _change_removed(self, ino: int, mode: int | None, uid: int | None, gid: int | None) -> Attrs:
        """Change owner and permissions of what we removed and somebody still stands in or holds (a FIFO). Stale."""
        told = self._told.get(ino)
        if told is None or told.removed is None:
            raise Stale(f"inode {ino}")
        old = told.removed
        told.removed = msgspec.structs.replace(
            old,
            mode=old.mode if mode is None else stat.S_IFMT(old.mode) | mode,
            uid=old.uid if uid is None else uid,
            gid=old.gid if gid is None else gid,
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
    ) -> EntryAttributes:
        self._check_gone(parent)
        attrs = await self._namespace.make(parent, name, mode, ctx.uid, ctx.gid, rdev=rdev, target=target)
        return self._new(parent, name, self._files.known.see(attrs))

    def _new(self, parent: int, name: bytes, attrs: Attrs) -> EntryAttributes:
        """Tell of an inode that was just made here: it has no extended attributes."""
        self._changed(parent)
        entry = self._entry(attrs, (parent, name))
        told = self._told_of(attrs.ino)
        told.absent, told.absent_epoch = _ASKED_OFTEN, self._files.known.epoch(attrs.ino)
        return entry

    @guarded
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        """Make a file, FIFO, socket or device."""
        return await self._make(parent_inode, name, mode, ctx, rdev=rdev)

    @guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """Make a directory."""
        return await self._make(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode), ctx)

    @guarded
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        """Make a symbolic link."""
        return await self._make(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target=target)

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name that is not a directory's."""
        self._removed(parent_inode, (await self._namespace.unlink(parent_inode, name)).ino)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        self._removed(parent_inode, (await self._namespace.rmdir(parent_inode, name)).ino)

    def _removed(self, parent: int, ino: int) -> None:
        self._changed(parent)
        told, attrs = self._told.get(ino), self._files.known.get(ino)
        if told is not None and attrs is not None:
            told.removed = msgspec.structs.replace(attrs, nlink=0, ctime_ns=time.time_ns())

    @guarded
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Give an inode another name."""
        self._check_gone(new_parent_inode)
        attrs = await self._namespace.link(inode, new_parent_inode, new_name)
        self._changed(new_parent_inode)
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

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file. One that has vanished answers ESTALE: the kernel then looks the name up again, once."""
        told = self._told_of(inode)
        try:
            handle = await self._files.open(inode, flags, ctx.uid)
        except Stale:
            if told.place is not None and told.removed is None:
                await self._hold(told.place)
            raise
        if told.place is not None and self._held.get(told.place) == inode:
            del self._held[told.place]
        epoch = self._files.known.epoch(inode)
        if told.attrs_epoch != epoch:
            _invalidate_attrs(inode)
            told.attrs_epoch = epoch
        keep_cache = told.data_epoch == epoch
        told.data_epoch = epoch
        return self._file_info(handle, keep_cache)

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
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it.

        A file that another mount made meanwhile is not opened here, where the kernel would check no permissions:
        ESTALE has it look the name up and open what it finds.
        """
        self._check_gone(parent_inode)
        try:
            handle = await self._files.create(parent_inode, name, mode, ctx.uid, ctx.gid, flags)
        except Exists:
            if flags & os.O_EXCL:
                raise
            raise Stale("made elsewhere meanwhile") from None
        entry = self._new(parent_inode, name, handle.node.attrs)
        self._told_of(handle.ino).data_epoch = self._files.known.epoch(handle.ino)
        return self._file_info(handle, keep_cache=True), entry

    def _file_info(self, handle: Handle, keep_cache: bool) -> FileInfo:
        self._last_fh += 1
        self._handles[self._last_fh] = handle
        return FileInfo(fh=self._last_fh, direct_io=handle.append, keep_cache=keep_cache)

    def _handle(self, fh: int) -> Handle:
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
        handle = self._handle(fh)
        buffer = self._buffers.pop() if self._buffers and size <= READ_MAX else bytearray(max(size, READ_MAX))
        view = memoryview(buffer)[:size]
        length = await self._files.read(handle, off, view)
        if len(buffer) == READ_MAX and len(self._buffers) < BUFFERS_MAX:
            self._buffers.append(buffer)
        return cast(bytes, view[:length])  # any buffer will do

    @guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write all of ``buf``."""
        handle = self._handle(fh)
        if not handle.append:
            return await self._files.write(handle, off, buf)
        await self._files.drop_privileges(handle)
        length = await self._files.write(handle, off, buf)
        if handle.syncs:
            await self._files.fsync(handle)
        return length

    @guarded
    async def flush(self, fh: int) -> None:
        """Do what close(2) promises."""
        await self._files.flush(self._handle(fh))

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Bring a file to stable storage; its size is needed to read it, so ``datasync`` saves nothing."""
        await self._files.fsync(self._handle(fh))

    @guarded
    async def release(self, fh: int) -> None:
        """Give a handle back."""
        await self._files.release(self._handles.pop(fh))

    def invalidate_data(self, ino: int) -> None:
        """Have the kernel drop what it cached of a file: bytes that it holds were not written.

        In a thread: the kernel waits for requests under way, which may need this event loop.
        """
        self._nursery.start_soon(functools.partial(_run_in_thread, _invalidate_data, ino))

    # ── directories ──────────────────────────────────────────────────────────────────────────────────────────────────

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory and fetch its first page: that it is there is seen here, where ESTALE helps the kernel."""
        listing = _Listing(inode)
        await self._fetch(listing, 0)
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
                shown = self._entry(attrs, (listing.ino, entry.name))
                if not pyfuse3.readdir_reply(token, entry.name, shown, entry.cookie):
                    return
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
        if name not in _ASKED_OFTEN:
            return await self._getxattr(inode, name)
        told, epoch = self._told_of(inode), self._files.known.epoch(inode)
        if told.absent_epoch != epoch:
            told.absent, told.absent_epoch = frozenset(), epoch
        if name in told.absent and epoch:
            raise NoAttribute(str(name))
        try:
            return await self._getxattr(inode, name)
        except NoAttribute:
            if told.absent_epoch == epoch:
                told.absent |= {name}
            raise

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
        self._check_xattr()
        if name == DEFAULT_ACL:
            raise NotSupported("default ACLs")
        self._files.known.see(await self._namespace.setxattr(inode, name, value))  # a new epoch: it is not absent now

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        self._check_xattr()
        self._files.known.see(await self._namespace.removexattr(inode, name), own=True)

    def _check_xattr(self) -> None:
        if not self._xattr:
            raise FUSEError(errno.ENOSYS)


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


def _ignore_missing(notify: Callable[[], None]) -> None:
    """Notify the kernel; that it does not know the inode any more is no error."""
    try:
        notify()
    except OSError as error:
        if error.errno != errno.ENOENT:
            log.warning("the kernel did not take a notification: %s", error)


async def _run_in_thread(function: Callable[..., Any], *args: object) -> None:
    await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


def mount(operations: BenchfsOperations, mountpoint: str, options: Sequence[str]) -> None:
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
