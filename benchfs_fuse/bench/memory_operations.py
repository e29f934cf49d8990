"""Answer the kernel's requests from memory, as directly as right answers allow: what ``memory_fs`` mounts."""

import errno
import os
import stat
import time
from collections.abc import Sequence

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from .. import acl, fuse
from ..companion import ATIME_NOW, CAP_DONT_MASK, MTIME_NOW, Companion, Hooks
from ..limits import NAME_MAX
from ..model import ROOT_INO
from ..services.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, FALLOCATE_MODES

#: What df says: nobody fills it, as memory ends before.
_SPACE_BYTES = 1 << 40
_INODES = 1 << 30


class _Inode:
    """Be one inode. ``entry`` is what the kernel is told, changed in place."""

    __slots__ = ("data", "entry", "names", "opens", "parent", "target", "xattrs")

    def __init__(self, ino: int, mode: int, timeout_s: float, ctx: RequestContext | None, rdev: int = 0) -> None:
        self.data = bytearray()
        self.names: dict[bytes, int] = {}
        self.target = b""
        self.xattrs: dict[bytes, bytes] = {}
        self.opens = 0
        self.parent: int = ROOT_INO
        entry = self.entry = EntryAttributes()
        entry.st_ino = ino
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = timeout_s
        entry.st_mode = mode
        entry.st_nlink = 2 if stat.S_ISDIR(mode) else 1
        entry.st_uid = ctx.uid if ctx is not None else os.geteuid()
        entry.st_gid = ctx.gid if ctx is not None else os.getegid()
        entry.st_rdev = rdev
        entry.st_size = 0
        entry.st_blksize = fuse.BLOCK_SIZE_ADVISED
        entry.st_blocks = 0
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = time.time_ns()

    def resize(self, size: int) -> None:
        """Cut or extend the data; tell of the size."""
        if size < len(self.data):
            del self.data[size:]
        elif size > len(self.data):
            self.data.extend(bytes(size - len(self.data)))
        self.told_size()

    def told_size(self) -> None:
        """Tell of the size of the data."""
        self.entry.st_size = len(self.data)
        self.entry.st_blocks = -(-len(self.data) // fuse.BLOCKS_UNIT)

    def changed(self) -> None:
        """Move mtime and ctime."""
        self.entry.st_mtime_ns = self.entry.st_ctime_ns = time.time_ns()


class MemoryOperations(pyfuse3.Operations):
    """Serve the kernel's requests from memory."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, *, timeout_s: float, xattr: bool, library: Companion | None) -> None:
        self._timeout_s = timeout_s
        self._xattr = xattr
        self._library = library
        self.enable_acl = xattr
        self._inodes: dict[int, _Inode] = {ROOT_INO: _Inode(ROOT_INO, stat.S_IFDIR | 0o755, timeout_s, None)}
        self._last_ino: int = ROOT_INO
        self._handles: dict[int, _Inode] = {}
        self._listings: dict[int, list[tuple[bytes, int]]] = {}
        self._last_fh = 0

    # ── attributes and names ─────────────────────────────────────────────────────────────────────────────────────────

    def _of(self, ino: int) -> _Inode:
        inode = self._inodes.get(ino)
        if inode is None:
            raise FUSEError(errno.ESTALE)
        return inode

    def _child(self, parent: int, name: bytes) -> _Inode:
        ino = self._of(parent).names.get(name)
        if ino is None:
            raise FUSEError(errno.ENOENT)
        return self._inodes[ino]

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name."""
        if name == b".":
            return self._of(parent_inode).entry
        if name == b"..":
            return self._of(self._of(parent_inode).parent).entry
        return self._child(parent_inode, name).entry

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Forget nothing: what has no name and no handle any more has gone already."""

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Return attributes."""
        return self._of(inode).entry

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Change attributes."""
        flags = self._library.request.flags if self._library is not None else 0
        one = self._of(inode)
        entry, now_ns = one.entry, time.time_ns()
        if fields.update_mode:
            entry.st_mode = stat.S_IFMT(entry.st_mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            entry.st_uid = attr.st_uid
        if fields.update_gid:
            entry.st_gid = attr.st_gid
        if fields.update_size:
            one.resize(attr.st_size)
            entry.st_mtime_ns = now_ns
        if fields.update_atime:
            entry.st_atime_ns = now_ns if flags & ATIME_NOW else attr.st_atime_ns
        if fields.update_mtime:
            entry.st_mtime_ns = now_ns if flags & MTIME_NOW else attr.st_mtime_ns
        entry.st_ctime_ns = now_ns
        return entry

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Return where a symbolic link points."""
        return self._of(inode).target

    def _make(self, parent: int, name: bytes, mode: int, ctx: RequestContext, rdev: int = 0) -> _Inode:
        directory = self._of(parent)
        if name in directory.names:
            raise FUSEError(errno.EEXIST)
        if len(name) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        if self._library is not None and self._library.granted & CAP_DONT_MASK and not stat.S_ISLNK(mode):
            mode &= ~(ctx.umask & 0o777)
        self._last_ino += 1
        inode = self._inodes[self._last_ino] = _Inode(self._last_ino, mode, self._timeout_s, ctx, rdev)
        inode.parent = parent
        directory.names[name] = self._last_ino
        if stat.S_ISDIR(mode):
            directory.entry.st_nlink += 1
        directory.changed()
        return inode

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        """Make a file, FIFO, socket or device."""
        return self._make(parent_inode, name, mode, ctx, rdev).entry

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """Make a directory."""
        return self._make(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode), ctx).entry

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        """Make a symbolic link."""
        inode = self._make(parent_inode, name, stat.S_IFLNK | 0o777, ctx)
        inode.target = target
        inode.entry.st_size = len(target)
        return inode.entry

    def _unname(self, directory: _Inode, name: bytes) -> None:
        """Take a name away, and the inode with its last one."""
        ino = directory.names.pop(name)
        inode = self._inodes[ino]
        if stat.S_ISDIR(inode.entry.st_mode):
            inode.entry.st_nlink = 0
            directory.entry.st_nlink -= 1
        else:
            inode.entry.st_nlink -= 1
        inode.entry.st_ctime_ns = time.time_ns()
        directory.changed()
        self._end(inode)

    def _end(self, inode: _Inode) -> None:
        if inode.entry.st_nlink == 0 and not inode.opens:
            self._inodes.pop(inode.entry.st_ino, None)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name that is not a directory's."""
        if stat.S_ISDIR(self._child(parent_inode, name).entry.st_mode):
            raise FUSEError(errno.EISDIR)
        self._unname(self._of(parent_inode), name)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        inode = self._child(parent_inode, name)
        if not stat.S_ISDIR(inode.entry.st_mode):
            raise FUSEError(errno.ENOTDIR)
        if inode.names:
            raise FUSEError(errno.ENOTEMPTY)
        self._unname(self._of(parent_inode), name)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Give an inode another name."""
        one, directory = self._of(inode), self._of(new_parent_inode)
        if new_name in directory.names:
            raise FUSEError(errno.EEXIST)
        directory.names[new_name] = inode
        directory.changed()
        one.entry.st_nlink += 1
        one.entry.st_ctime_ns = time.time_ns()
        return one.entry

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Move a name, over another or not, or exchange two."""
        old, new = self._of(parent_inode_old), self._of(parent_inode_new)
        inode = self._child(parent_inode_old, name_old)
        there = new.names.get(name_new)
        if flags & pyfuse3.RENAME_EXCHANGE:
            other = self._child(parent_inode_new, name_new)
            old.names[name_old], new.names[name_new] = other.entry.st_ino, inode.entry.st_ino
            other.parent, inode.parent = parent_inode_old, parent_inode_new
        else:
            if there is not None:
                if flags & pyfuse3.RENAME_NOREPLACE:
                    raise FUSEError(errno.EEXIST)
                if self._inodes[there].names:
                    raise FUSEError(errno.ENOTEMPTY)
                if there == inode.entry.st_ino:
                    return
                self._unname(new, name_new)
            del old.names[name_old]
            new.names[name_new] = inode.entry.st_ino
            inode.parent = parent_inode_new
            if stat.S_ISDIR(inode.entry.st_mode):
                old.entry.st_nlink -= 1
                new.entry.st_nlink += 1
        inode.entry.st_ctime_ns = time.time_ns()
        old.changed()
        new.changed()

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self, inode: _Inode, flags: int) -> FileInfo:
        inode.opens += 1
        self._last_fh += 1
        self._handles[self._last_fh] = inode
        append = bool(flags & os.O_APPEND) and flags & os.O_ACCMODE != os.O_RDONLY
        return FileInfo(fh=self._last_fh, direct_io=append, keep_cache=not append)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file."""
        one = self._of(inode)
        if flags & os.O_TRUNC:
            one.resize(0)
            one.changed()
        return self._open(one, flags)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it."""
        inode = self._make(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode), ctx)
        return self._open(inode, flags), inode.entry

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return a piece of the file itself: pyfuse3 copies it out before anything else can happen."""
        return memoryview(self._handles[fh].data)[off : off + size]  # type: ignore[return-value]  # any buffer will do

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write all of ``buf``; of a file opened to append, where the kernel says."""
        inode = self._handles[fh]
        data = inode.data
        if off > len(data):
            data.extend(bytes(off - len(data)))
        data[off : off + len(buf)] = buf
        inode.told_size()
        inode.changed()
        return len(buf)

    async def flush(self, fh: int) -> None:
        """Do nothing: everything is where it will ever be."""

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Do nothing: memory is as stable as it gets."""

    async def release(self, fh: int) -> None:
        """Give a handle back."""
        inode = self._handles.pop(fh)
        inode.opens -= 1
        self._end(inode)

    # ── directories ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory: what it lists is what it holds now."""
        one = self._of(inode)
        self._last_fh += 1
        self._listings[self._last_fh] = [(b".", inode), (b"..", one.parent), *one.names.items()]
        return self._last_fh

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory with attributes."""
        listing = self._listings[fh]
        for index in range(start_id, len(listing)):
            name, ino = listing[index]
            inode = self._inodes.get(ino)
            if inode is not None and not pyfuse3.readdir_reply(token, name, inode.entry, index + 1):
                return

    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        del self._listings[fh]

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Do nothing: see ``fsync``."""

    # ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Say that there is room."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = fuse.SPACE_UNIT
        data.f_blocks = data.f_bfree = data.f_bavail = _SPACE_BYTES // fuse.SPACE_UNIT
        data.f_files = data.f_ffree = data.f_favail = _INODES
        data.f_namemax = NAME_MAX
        return data

    def _check_xattr(self) -> None:
        if not self._xattr:
            raise FUSEError(errno.ENOSYS)

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Return an extended attribute."""
        self._check_xattr()
        value = self._of(inode).xattrs.get(name)
        if value is None:
            raise FUSEError(errno.ENODATA)
        return value

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """List the names of extended attributes."""
        self._check_xattr()
        return list(self._of(inode).xattrs)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        self._check_xattr()
        _set_xattr(self._of(inode), name, value)

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        self._check_xattr()
        if self._of(inode).xattrs.pop(name, None) is None:
            raise FUSEError(errno.ENODATA)

    # ── what the companion library adds ──────────────────────────────────────────────────────────────────────────────

    def hooks(self, library: Companion) -> Hooks:
        """Return what serves the operations that pyfuse3 has no handlers for: answered at once."""

        def fallocate(request: int, fh: int, mode: int, offset: int, length: int) -> None:
            inode = self._handles[fh]
            end = offset + length
            if mode not in FALLOCATE_MODES:
                library.reply_error(request, errno.EOPNOTSUPP)
                return
            if not mode & FALLOC_FL_KEEP_SIZE and end > len(inode.data):
                inode.resize(end)
            if mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
                stop = min(end, len(inode.data))
                inode.data[offset:stop] = bytes(max(0, stop - offset))
            inode.changed()
            library.reply_error(request, 0)

        def lseek(request: int, fh: int, offset: int, whence: int) -> None:
            size = len(self._handles[fh].data)
            if offset >= size:
                library.reply_error(request, errno.ENXIO)
            else:
                library.reply_offset(request, offset if whence == os.SEEK_DATA else size)

        def copy(request: int, fh: int, offset: int, target_fh: int, target_offset: int, length: int, _: int) -> None:
            source, target = self._handles[fh], self._handles[target_fh]
            piece = bytes(memoryview(source.data)[offset : offset + length])
            if target_offset > len(target.data):
                target.resize(target_offset)
            target.data[target_offset : target_offset + len(piece)] = piece
            target.told_size()
            target.changed()
            library.reply_count(request, len(piece))

        def setxattr(request: int, ino: int, name: bytes, value: bytes, flags: int, uid: int) -> None:
            inode = self._inodes.get(ino)
            if inode is None:
                library.reply_error(request, errno.ESTALE)
            elif flags & os.XATTR_CREATE and name in inode.xattrs:
                library.reply_error(request, errno.EEXIST)
            elif flags & os.XATTR_REPLACE and name not in inode.xattrs:
                library.reply_error(request, errno.ENODATA)
            else:
                _set_xattr(inode, name, value)
                library.reply_error(request, 0)

        return Hooks(fallocate=fallocate, lseek=lseek, copy_file_range=copy, setxattr=setxattr if self._xattr else None)


def _set_xattr(inode: _Inode, name: bytes, value: bytes) -> None:
    """Set an extended attribute; an ACL that says no more than the mode's bits becomes these."""
    if name == acl.ACCESS:
        entries = acl.decode(value)
        inode.entry.st_mode = inode.entry.st_mode & ~0o777 | acl.permissions_of(entries)
        if acl.is_minimal(entries):
            inode.xattrs.pop(name, None)
            return
    inode.xattrs[name] = value
