"""Read and change the attributes of one inode, and count who has it open. All of it concerns this daemon alone.

Nothing here awaits: a request is answered at once, or Blocked by a truncation under way, or (None) needs one itself.
"""

import stat
from collections.abc import Callable

import msgspec

from .. import acl, disk
from ..errors import FileTooLarge, InvalidArgument, IsADirectory, NotSupported, Stale
from ..limits import FILE_SIZE_MAX
from ..privileges import without
from ..rpc.messages import (
    TIME_NOW,
    TIME_OMIT,
    Append,
    AppendReply,
    AttrsReply,
    Body,
    CommitWrite,
    Done,
    GetAttr,
    Open,
    ReadLink,
    Release,
    SetAttr,
    TargetReply,
    Touch,
)
from .calls import Call, Opens
from .inodes import Draft, Inode, Inodes
from .locks import Locks

#: The extended attribute that lends a program powers, until it is changed or given away (capabilities(7)).
CAPABILITY = b"security.capability"
#: relatime: an access time older than this is set anyway (mount(8)). One day, in ns.
RELATIME_NS = 24 * 60 * 60 * 10**9


def change(draft: Draft, inode: Inode, request: SetAttr, *, written: bool = False) -> None:
    """Apply a SetAttr to an inode, the size included. What lies behind a smaller size goes before it grows again.

    ``written``: its data has changed as well, before.
    """
    if request.mode is not None:
        set_permissions(draft, inode, request.mode)
    if request.uid is not None:
        inode.uid = request.uid
    if request.gid is not None:
        inode.gid = request.gid
    inode.mode = without(inode.mode, request.taken)
    if not inode.is_dir and (request.size, request.uid, request.gid) != (None, None, None):
        remove_xattr(draft, inode, CAPABILITY)
    resized = request.size is not None and request.size != inode.size
    if request.size is not None:
        inode.size = request.size
    draft.stamp(inode, data=resized or written)
    if request.atime_ns != TIME_OMIT:
        inode.atime_ns = inode.ctime_ns if request.atime_ns == TIME_NOW else request.atime_ns
    if request.mtime_ns != TIME_OMIT:
        inode.mtime_ns = inode.ctime_ns if request.mtime_ns == TIME_NOW else request.mtime_ns


def cuts(inode: Inode, size: int) -> bool:
    """Tell whether setting the size cuts something off."""
    return size < inode.size or size == inode.size < inode.reach


def set_permissions(draft: Draft, inode: Inode, mode: int) -> None:
    """Set the permission bits, and the entries of an access ACL that go with them."""
    if stat.S_ISLNK(inode.mode):
        raise NotSupported("permissions of a symbolic link")
    inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(mode)
    if inode.xattr_size:
        key = disk.key_name(disk.XATTR, inode.ino, acl.ACCESS)
        if (value := draft.get(key)) is not None:
            draft.put(key, acl.encode(acl.with_mode(acl.decode(value), mode)))


def remove_xattr(draft: Draft, inode: Inode, name: bytes) -> bool:
    """Remove an extended attribute; tell whether there was one."""
    if not inode.xattr_size:
        return False
    key = disk.key_name(disk.XATTR, inode.ino, name)
    if draft.get(key) is None:
        return False
    draft.delete(key)
    inode.xattr_size -= len(name) + 1
    return True


def inherit(draft: Draft, inode: Inode, default: bytes) -> None:
    """Give a new inode, which has the mode that was asked for, what the default ACL of its directory makes of that.

    As posix_acl_create() of fs/posix_acl.c: what the permission bits say already is not kept; a directory hands it on.
    """
    access = acl.inherited(acl.decode(default), inode.mode)
    inode.mode = inode.mode & ~0o777 | acl.permissions_of(access)
    kept = {} if acl.is_minimal(access) else {acl.ACCESS: acl.encode(access)}
    if inode.is_dir:
        kept[acl.DEFAULT] = default
    for name, value in kept.items():
        draft.put(disk.key_name(disk.XATTR, inode.ino, name), value)
        inode.xattr_size += len(name) + 1


def _check_file(inode: Inode) -> None:
    if inode.is_dir:
        raise IsADirectory(f"inode {inode.ino}")
    if not inode.is_file:
        raise InvalidArgument(f"inode {inode.ino} is no regular file")


def _check_size(size: int) -> None:
    if size < 0:
        raise InvalidArgument(f"size {size}")
    if size > FILE_SIZE_MAX:
        raise FileTooLarge(f"size {size}")


class Attributes:
    """Serve requests on one inode. ``doubt`` and ``closed`` are told of files with failed writes, and of releases."""

    def __init__(
        self,
        inodes: Inodes,
        locks: Locks,
        opens: Opens,
        doubt: Callable[[Draft, int], None],
        closed: Callable[[int], None],
    ) -> None:
        self._inodes = inodes
        self._locks = locks
        self._opens = opens
        self._doubt = doubt
        self._closed = closed

    def getattr(self, request: GetAttr, call: Call) -> Body:
        """Return the attributes. Whoever found the name of an inode that is being made waits until it is."""
        del call
        inode = self._inodes.find(request.ino)
        if inode is None:
            self._locks.check_exclusive(disk.key(disk.INODE, request.ino))
            raise Stale(f"inode {request.ino} has gone")
        return AttrsReply(inode.attrs())

    def setattr(self, request: SetAttr, call: Call) -> Body | None:
        """Change attributes; None if that cuts a file. The size that it has already is no change.

        That size cuts off what is allocated behind it, as on ext4.
        """
        draft = self._inodes.draft()
        inode = draft.inode(request.ino)
        if request.size is not None:
            _check_file(inode)
            _check_size(request.size)
            self._locks.check_exclusive(disk.key(disk.TRUNCATING, request.ino))
            if cuts(inode, request.size):
                return None
        if request.taken and without(inode.mode, request.taken) == inode.mode:
            request = msgspec.structs.replace(request, taken=0)
        if request not in (SetAttr(request.ino), SetAttr(request.ino, size=inode.size)):
            change(draft, inode, request)
        reply = AttrsReply(inode.attrs())
        call.commit(draft, reply)
        return reply

    def commit_write(self, request: CommitWrite, call: Call) -> Body:
        """Publish written bytes, and change attributes behind them."""
        if request.change is not None and (request.change.ino != request.ino or request.change.size is not None):
            raise InvalidArgument("a change that goes with written bytes is of the same inode, and sets no size")
        draft = self._inodes.draft()
        inode = draft.inode(request.ino)
        _check_file(inode)
        _check_size(request.end)
        _check_size(request.reach)
        self._locks.check_exclusive(disk.key(disk.TRUNCATING, request.ino))
        inode.size = max(inode.size, request.end)
        inode.reach = max(inode.reach, request.reach)
        inode.allocated = max(0, inode.allocated + request.allocated_delta)
        _check_size(inode.allocated)
        if request.change is None:
            draft.stamp(inode, data=True)
        else:
            change(draft, inode, request.change, written=True)
        reply = AttrsReply(inode.attrs())
        call.commit(draft, reply)
        return reply

    def append(self, request: Append, call: Call) -> Body:
        """Reserve bytes at the end."""
        draft = self._inodes.draft()
        inode = draft.inode(request.ino)
        _check_file(inode)
        if request.length < 0:
            raise InvalidArgument(f"length {request.length}")
        offset = inode.size
        _check_size(offset + request.length)
        self._locks.check_exclusive(disk.key(disk.TRUNCATING, request.ino))
        if request.length:
            inode.size += request.length
            inode.mode = without(inode.mode, request.taken)
            remove_xattr(draft, inode, CAPABILITY)
            draft.stamp(inode, data=True)
        reply = AppendReply(offset, inode.attrs())
        call.commit(draft, reply)
        return reply

    def touch(self, request: Touch, call: Call) -> Body:
        """Set atime if it is not newer than mtime and ctime, or a day old. Not a change: the version stays."""
        draft = self._inodes.draft()
        inode = draft.inode(request.ino)
        now_ns = draft.now_ns
        if inode.atime_ns <= max(inode.mtime_ns, inode.ctime_ns) or now_ns - inode.atime_ns >= RELATIME_NS:
            inode.atime_ns = max(now_ns, inode.atime_ns)
            draft.changed(inode)
        reply = AttrsReply(inode.attrs())
        call.commit(draft, reply)
        return reply

    def open(self, request: Open, call: Call) -> Body:
        """Count a handle. Whoever opens for writing waits for the end of a truncation, which would take his data."""
        draft = self._inodes.draft()
        inode = draft.inode(request.ino)
        if request.writer:
            _check_file(inode)
            self._locks.check_exclusive(disk.key(disk.TRUNCATING, request.ino))
        reply = AttrsReply(inode.attrs())
        self._opens.add(draft, call.client_id, request.ino, int(not request.writer), int(request.writer))
        call.commit(draft, reply)
        return reply

    def release(self, request: Release, call: Call) -> Body:
        """Take handles back; the last one decides what becomes of a file without a name, or of a doubtful one."""
        draft = self._inodes.draft()
        inode = draft.find(request.ino)
        if request.doubtful and request.writers and inode is not None and inode.is_file:
            self._doubt(draft, request.ino)
        self._opens.remove(draft, call.client_id, request.ino, request.readers, request.writers)
        reply = Done()
        call.commit(draft, reply)
        self._closed(request.ino)
        return reply

    def readlink(self, request: ReadLink, call: Call) -> Body:
        """Return where a symbolic link points."""
        del call
        target = self._inodes.store.get(disk.key(disk.TARGET, request.ino))
        if target is None:
            self._inodes.get(request.ino)
            raise InvalidArgument(f"inode {request.ino} is no symbolic link")
        return TargetReply(target)
