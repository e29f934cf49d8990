"""Answer the kernel's requests in the step in which they are read, where that can be done.

A request that goes through pyfuse3 costs some forty function calls and a turn of the event loop before and after its
handler, whatever that has to do. So the companion library asks here first. Three things may happen:

- Nobody has to be asked: whether a file lacks an attribute (the kernel wants to know before every write), bytes that
  are gathered, the close of what is flushed, a directory of which a daemon has just told. Answered at once.
- A handler (``fuse``) that is begun here ends without having waited, since a daemon's answer came while the caller
  polled for it. Answered at once.
- A handler waits. Then the request goes to pyfuse3, whose task takes up the handler where it stands (``fuse.Begun``).
  That task is the one in whose step it was begun, so nothing of trio's is in a wrong place.

The answers are the kernel's structures (linux/fuse.h), as libfuse would write them.
"""

import errno
import functools
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .companion import LEAVE, Companion, Hooks, copied
from .errors import BadHandle
from .fuse import BLOCK_SIZE_ADVISED, BLOCKS_UNIT, WAITS, BenchfsOperations, Created, Opened, Shown, begin
from .limits import KIB
from .model import Attrs
from .observe import recording
from .services.files import Files

_OPS = BenchfsOperations

#: Of linux/fuse.h: struct fuse_attr with what goes before it in struct fuse_attr_out and struct fuse_entry_out; struct
#: fuse_open_out, fuse_write_out and fuse_setattr_in.
_ATTR = "QQQqqqIIIIIIIIII"
_ATTR_OUT = struct.Struct("=QII" + _ATTR)
_ENTRY_OUT = struct.Struct("=QQQQII" + _ATTR)
_OPEN_OUT = struct.Struct("=QII")
_WRITE_OUT = struct.Struct("=II")
_SETATTR_IN = struct.Struct("=IIQQQqqqIIIIIIII")
#: Longest write that is begun here though it is sent at once: if it waits, its bytes are copied a second time.
COPIED_MAX = 64 * KIB
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME, FATTR_FH = (1 << bit for bit in range(7))
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE = 1 << 0, 1 << 1

_SECOND_NS = 10**9
#: The kernel's 32 bits of a device number, in which makedev(3) has both parts as the kernel does.
_RDEV_MAX = (1 << 32) - 1
#: Longest time-out that the kernel is told, s.
_VALID_MAX_S = 1 << 31


class Caller(NamedTuple):
    """Say who asks, as pyfuse3's RequestContext does."""

    uid: int
    gid: int
    pid: int
    umask: int


class Change(NamedTuple):
    """Hold new attributes, as pyfuse3's EntryAttributes does for setattr."""

    st_mode: int
    st_uid: int
    st_gid: int
    st_size: int
    st_atime_ns: int
    st_mtime_ns: int


class Fields(NamedTuple):
    """Say which attributes are to be changed, as pyfuse3's SetattrFields does."""

    update_mode: bool
    update_uid: bool
    update_gid: bool
    update_size: bool
    update_atime: bool
    update_mtime: bool


class AtOnce:
    """Be the hooks of the companion library that answer at once.

    ``note_turn`` is told that all other tasks have had their turn, behind each turn of the event loop.
    """

    def __init__(
        self, companion: Companion, operations: BenchfsOperations, files: Files, note_turn: Callable[[], None]
    ) -> None:
        self._companion = companion
        self._note_turn = note_turn
        self._turn = 0
        self._operations = operations
        self._files = files

    def hooks(self, others: Hooks) -> Hooks:
        """Add what this answers to other hooks."""
        return others._replace(
            lookup_now=self._lookup,
            getattr_now=self._getattr,
            setattr_now=self._setattr,
            mkdir_now=self._mkdir,
            unlink_now=self._unlink,
            rmdir_now=self._rmdir,
            rename_now=self._rename,
            open_now=self._open,
            create_now=self._create,
            read_now=self._read,
            write_now=self._write,
            flush_now=self._flush,
            release_now=self._release,
            getxattr_now=self._getxattr,
        )

    # ── what is known here ───────────────────────────────────────────────────────────────────────────────────────────

    def _getattr(self, ino: int) -> int:
        return self._begin(_OPS.getattr, (ino, None), self._pack_attrs)

    def _getxattr(self, ino: int, name: bytes) -> int:
        started_ns = time.perf_counter_ns()
        if not self._operations.lacks(ino, name):
            return LEAVE
        self._count("getxattr", started_ns, errno.ENODATA)
        return -errno.ENODATA

    def _write(self, fh: int, offset: int, address: int, size: int) -> int:
        started_ns = time.perf_counter_ns()
        take = functools.partial(copied, address, size)
        try:
            handle = self._operations.handle(fh)
        except BadHandle:
            return LEAVE
        if not self._files.write_now(handle, offset, size, take):
            if size > COPIED_MAX:
                return LEAVE
            return self._begin(_OPS.write, (fh, offset, take()), self._pack_written)
        self._operations.bytes_written += size
        self._count("write", started_ns)
        return self._pack_written(size)

    def _flush(self, fh: int, owner: int) -> int:
        started_ns = time.perf_counter_ns()
        if not self._operations.flush_now(fh, owner):
            return self._begin(_OPS.flush, (fh,), _nothing)
        self._count("flush", started_ns)
        return _nothing(None)

    def _release(self, fh: int) -> int:
        started_ns = time.perf_counter_ns()
        if not self._operations.release_soon(fh):
            return self._begin(_OPS.release, (fh,), _nothing)
        self._count("release", started_ns)
        return _nothing(None)

    def _count(self, name: str, started_ns: int, error: int = 0) -> None:
        self._operations.statistics.add(name, started_ns)
        if (recorder := recording.recorder) is not None:
            recorder.add_operation(name, *self._operations.asked(), started_ns, error)

    # ── what a handler does ──────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, handler: Callable[..., Any], arguments: tuple[Any, ...], pack: Callable[[Any], int]) -> int:
        turn = self._companion.request.turn
        if turn != self._turn:
            self._turn = turn
            self._note_turn()
        error, result = begin(self._operations, handler, *arguments)
        if error:
            return LEAVE if error == WAITS else -error
        return pack(result)

    def _caller(self) -> Caller:
        request = self._companion.request
        return Caller(request.uid, request.gid, request.pid, request.umask)

    def _lookup(self, parent: int, name: bytes) -> int:
        return self._begin(_OPS.lookup, (parent, name, None), self._pack_entry)

    def _setattr(self, ino: int, address: int) -> int:
        (
            valid, _, fh, size, _, atime_s, mtime_s, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _
        ) = _SETATTR_IN.unpack(copied(address, _SETATTR_IN.size))  # fmt: skip
        change = Change(mode, uid, gid, size, atime_s * _SECOND_NS + atime_ns, mtime_s * _SECOND_NS + mtime_ns)
        fields = Fields(
            bool(valid & FATTR_MODE),
            bool(valid & FATTR_UID),
            bool(valid & FATTR_GID),
            bool(valid & FATTR_SIZE),
            bool(valid & FATTR_ATIME),
            bool(valid & FATTR_MTIME),
        )
        handle = fh if valid & FATTR_FH else None
        return self._begin(_OPS.setattr, (ino, change, fields, handle, self._caller()), self._pack_attrs)

    def _mkdir(self, parent: int, name: bytes, mode: int) -> int:
        return self._begin(_OPS.mkdir, (parent, name, mode, self._caller()), self._pack_entry)

    def _unlink(self, parent: int, name: bytes) -> int:
        return self._begin(_OPS.unlink, (parent, name, None), _nothing)

    def _rmdir(self, parent: int, name: bytes) -> int:
        return self._begin(_OPS.rmdir, (parent, name, None), _nothing)

    def _rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> int:
        return self._begin(_OPS.rename, (parent, name, new_parent, new_name, flags, None), _nothing)

    def _open(self, ino: int, flags: int) -> int:
        return self._begin(_OPS.open, (ino, flags, self._caller()), self._pack_opened)

    def _create(self, parent: int, name: bytes, mode: int, flags: int) -> int:
        return self._begin(_OPS.create, (parent, name, mode, flags, self._caller()), self._pack_created)

    def _read(self, fh: int, offset: int, size: int) -> int:
        return self._begin(_OPS.read, (fh, offset, size), self._pack_data)

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _pack_attrs(self, shown: Shown) -> int:
        valid = _valid(shown.attr_timeout_s)
        _ATTR_OUT.pack_into(self._companion.answer, 0, *valid, 0, *_attributes(shown.attrs))
        return 1 + _ATTR_OUT.size

    def _pack_entry(self, shown: Shown) -> int:
        attrs = shown.attrs
        names_s, names_ns = _valid(shown.entry_timeout_s)
        attrs_s, attrs_ns = _valid(shown.attr_timeout_s)
        _ENTRY_OUT.pack_into(
            self._companion.answer, 0,
            attrs.ino, attrs.generation, names_s, attrs_s, names_ns, attrs_ns, *_attributes(attrs),
        )  # fmt: skip
        return 1 + _ENTRY_OUT.size

    def _pack_opened(self, opened: Opened, offset: int = 0) -> int:
        flags = (FOPEN_DIRECT_IO if opened.direct_io else 0) | (FOPEN_KEEP_CACHE if opened.keep_cache else 0)
        _OPEN_OUT.pack_into(self._companion.answer, offset, opened.fh, flags, 0)
        return 1 + offset + _OPEN_OUT.size

    def _pack_created(self, created: Created) -> int:
        self._pack_entry(created.shown)
        return self._pack_opened(created.opened, _ENTRY_OUT.size)

    def _pack_data(self, data: memoryview) -> int:
        self._companion.append(data)
        return 1

    def _pack_written(self, length: int) -> int:
        _WRITE_OUT.pack_into(self._companion.answer, 0, length, 0)
        return 1 + _WRITE_OUT.size


def _nothing(result: None) -> int:
    """Answer that it is done."""
    return 1


def _valid(timeout_s: float) -> tuple[int, int]:
    """Say how long an answer is good, in seconds and nanoseconds."""
    whole_s = int(min(timeout_s, _VALID_MAX_S))
    return whole_s, int((timeout_s - whole_s) * _SECOND_NS) if timeout_s < _VALID_MAX_S else 0


def _attributes(attrs: Attrs) -> tuple[int, ...]:
    """Return the members of struct fuse_attr."""
    atime_s, atime_ns = divmod(attrs.atime_ns, _SECOND_NS)
    mtime_s, mtime_ns = divmod(attrs.mtime_ns, _SECOND_NS)
    ctime_s, ctime_ns = divmod(attrs.ctime_ns, _SECOND_NS)
    return (
        attrs.ino, attrs.size, -(-attrs.allocated // BLOCKS_UNIT),
        atime_s, mtime_s, ctime_s, atime_ns, mtime_ns, ctime_ns,
        attrs.mode, attrs.nlink, attrs.uid, attrs.gid, attrs.rdev & _RDEV_MAX, BLOCK_SIZE_ADVISED, 0,
    )  # fmt: skip
