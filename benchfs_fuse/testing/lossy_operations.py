"""Answer the kernel's requests from a disk that loses power: what ``lossy_fs`` mounts."""

import errno
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from ..limits import MIB, NAME_MAX
from .lossy_disk import PAGE, Disk, File, Loss, Refused

#: What df says. Nobody fills it: memory ends before.
_SPACE_BYTES = 65536 * MIB
_INODES = 1 << 20
#: Modes of fallocate(2) as in linux/falloc.h.
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16

H = TypeVar("H", bound=Callable[..., Coroutine[Any, Any, Any]])


def _guarded(handler: H) -> H:
    """Turn what the model refuses into an errno; without power everything is EIO."""

    @wraps(handler)
    async def guard(self: "LossyOperations", *args: Any) -> Any:
        if not self.powered:
            raise FUSEError(errno.EIO)
        try:
            return await handler(self, *args)
        except Refused as error:
            raise FUSEError(error.number) from None
        except KeyError:
            raise FUSEError(errno.ESTALE) from None

    return cast(H, guard)


class LossyOperations(pyfuse3.Operations):
    """Serve the kernel's requests from a disk."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self) -> None:
        self.disk = Disk()
        self._left: Disk | None = None
        self._handles: dict[int, int] = {}
        self._listings: dict[int, list[tuple[bytes, int]]] = {}
        self._last_fh = 0

    # ── power ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def powered(self) -> bool:
        """Tell whether there is power."""
        return self._left is None

    def cut(self, loss: Loss, seed: int) -> None:
        """Take the power away."""
        if self._left is None:
            self._left = self.disk.left(loss, seed)

    def power(self) -> None:
        """Give the power back."""
        if self._left is not None:
            self.disk, self._left = self._left, None

    # ── names and attributes ─────────────────────────────────────────────────────────────────────────────────────────

    def _entry(self, ino: int) -> EntryAttributes:
        node = self.disk.nodes[ino]
        entry = EntryAttributes()
        entry.st_ino = ino
        entry.entry_timeout = entry.attr_timeout = 0.0
        if isinstance(node, File):
            entry.st_mode = stat.S_IFREG | node.mode
            entry.st_nlink = 1
            entry.st_size = node.size
            entry.st_blocks = len(node.pages) * (PAGE // 512)
        else:
            entry.st_mode = stat.S_IFDIR | node.mode
            entry.st_nlink = 2
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.st_blksize = PAGE
        return entry

    @_guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name."""
        return self._entry(self.disk.find(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Keep everything: a cut may bring it back."""

    @_guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Return attributes."""
        return self._entry(inode)

    @_guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Change size or mode; nobody here looks at owners and times."""
        if fields.update_mode:
            self.disk.nodes[inode].mode = stat.S_IMODE(attr.st_mode)
        if fields.update_size:
            self.disk.file(inode).resize(self.disk.tick(), attr.st_size)
        return self._entry(inode)

    @_guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """Make a directory."""
        return self._entry(self.disk.make(parent_inode, name, stat.S_IMODE(mode), directory=True))

    @_guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name that is not a directory's."""
        self.disk.remove(parent_inode, name)

    @_guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        self.disk.remove(parent_inode, name, directory=True)

    @_guarded
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Give a file another name."""
        self.disk.link(inode, new_parent_inode, new_name)
        return self._entry(inode)

    @_guarded
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
        if flags:
            raise FUSEError(errno.EINVAL)
        self.disk.rename(parent_inode_old, name_old, parent_inode_new, name_new)

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self, ino: int) -> int:
        self._last_fh += 1
        self._handles[self._last_fh] = ino
        return self._last_fh

    @_guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file."""
        file = self.disk.file(inode)
        if flags & os.O_TRUNC:
            file.resize(self.disk.tick(), 0)
        return FileInfo(fh=self._open(inode))

    @_guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it."""
        ino = self.disk.make(parent_inode, name, stat.S_IMODE(mode))
        return FileInfo(fh=self._open(ino)), self._entry(ino)

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read."""
        return self.disk.file(self._handles[fh]).read(off, size)

    @_guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write all of ``buf``: into the disk's cache."""
        self.disk.file(self._handles[fh]).write(self.disk.tick(), off, buf)
        return len(buf)

    async def flush(self, fh: int) -> None:
        """Do nothing: a close makes nothing durable."""

    @_guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make a file durable."""
        self.disk.file(self._handles[fh]).sync(data_only=datasync)

    async def release(self, fh: int) -> None:
        """Give a handle back."""
        del self._handles[fh]

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """Reserve, free or zero a range; space is not counted here. Refused."""
        file, moment, end = self.disk.file(self._handles[fh]), self.disk.tick(), offset + length
        if mode & ~(_KEEP_SIZE | _PUNCH_HOLE | _ZERO_RANGE):
            raise Refused(errno.EOPNOTSUPP)
        if mode & (_PUNCH_HOLE | _ZERO_RANGE):
            file.zero(moment, offset, end)
        if not mode & _KEEP_SIZE and end > file.size:
            file.resize(moment, end)

    # ── directories ──────────────────────────────────────────────────────────────────────────────────────────────────

    @_guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory: what it lists is what it holds now."""
        self._listings[fh := self._open(inode)] = list(self.disk.directory(inode).entries.items())
        return fh

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory."""
        listing = self._listings[fh]
        for index in range(start_id, len(listing)):
            name, ino = listing[index]
            if not pyfuse3.readdir_reply(token, name, self._entry(ino), index + 1):
                return

    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        del self._handles[fh], self._listings[fh]

    @_guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make the entries of a directory durable."""
        self.disk.sync_directory(self._handles[fh])

    # ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Say that there is room."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = PAGE
        data.f_blocks = data.f_bfree = data.f_bavail = _SPACE_BYTES // PAGE
        data.f_files = data.f_ffree = data.f_favail = _INODES
        data.f_namemax = NAME_MAX
        return data

    def _xattrs(self, ino: int) -> dict[str, bytes]:
        return self.disk.nodes[ino].xattrs

    def _set_xattrs(self, ino: int, xattrs: dict[str, bytes]) -> None:
        node = self.disk.nodes[ino]
        if isinstance(node, File):
            node.set_xattrs(self.disk.tick(), xattrs)
        else:
            node.xattrs = xattrs

    @_guarded
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Return an extended attribute."""
        value = self._xattrs(inode).get(os.fsdecode(name))
        if value is None:
            raise FUSEError(errno.ENODATA)
        return value

    @_guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        self._set_xattrs(inode, {**self._xattrs(inode), os.fsdecode(name): value})

    @_guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """List the names of extended attributes."""
        return [os.fsencode(name) for name in self._xattrs(inode)]
