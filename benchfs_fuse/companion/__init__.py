"""Bind the companion library (companion.c), which gives a pyfuse3 file system what pyfuse3 leaves out.

It has to be loaded before pyfuse3: ``load`` does that, and returns None where the library was not built (no compiler,
or no headers of libfuse, when the package was installed). Everything then works as far as pyfuse3 alone takes it.

The library calls ``Hooks`` in the thread of pyfuse3's loop, from within that loop: a hook starts what it has to do and
returns; the answer is given later, in the same thread, by one of the ``reply_`` methods, exactly once for each request
(an opaque number). docs/companion.md has the account of why this is sound.
"""

import ctypes
import errno
import logging
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..compiled import Compiled

log = logging.getLogger(__name__)

#: Capabilities of the connection: FUSE_CAP_* of libfuse's fuse_common.h.
CAP_POSIX_LOCKS = 1 << 1
CAP_DONT_MASK = 1 << 6
CAP_SPLICE_READ = 1 << 9
CAP_FLOCK_LOCKS = 1 << 10
CAP_AUTO_INVAL_DATA = 1 << 12
CAP_PARALLEL_DIROPS = 1 << 18
CAP_EXPLICIT_INVAL_DATA = 1 << 25

#: Flags of SETATTR requests: FATTR_* of linux/fuse.h.
ATIME_NOW = 1 << 7
MTIME_NOW = 1 << 8

#: Longest answer that is given at once, bytes.
ANSWER_MAX = 256

#: The library that this binds.
LIBRARY = Compiled(Path(__file__).parent, "_library", "companion.c")


class Request(ctypes.Structure):
    """Say of the request that was handed to pyfuse3 last what libfuse does not: good until a handler's first await.

    ``unique`` names it in the kernel's protocol. ``flags`` are those of SETATTR, WRITE and RELEASE; ``lock_owner`` is
    that of FLUSH and RELEASE. ``pid`` is the thread that sent it; 0: the kernel itself, or one that cannot be seen.
    ``umask`` is that of CREATE and MKDIR. ``turn`` counts the turns of the event loop in which pyfuse3 asked for one.
    ``received_ns``: CLOCK_MONOTONIC, as time.perf_counter_ns gives it, when it had been read from the kernel.
    """

    unique: int
    lock_owner: int
    received_ns: int
    opcode: int
    flags: int
    pid: int
    uid: int
    gid: int
    umask: int
    turn: int
    _fields_ = (
        ("unique", ctypes.c_uint64),
        ("lock_owner", ctypes.c_uint64),
        ("received_ns", ctypes.c_uint64),
        ("opcode", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("umask", ctypes.c_uint32),
        ("turn", ctypes.c_uint32),
    )


class _Wishes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("want", "unwanted", "max_background", "congestion_threshold")),
        ("soon_ns", ctypes.c_uint64),
    )


class RequestCounts(ctypes.Structure):
    """Count the requests that were read, and those of them that were answered at once."""

    read: int
    at_once: int
    _fields_ = (("read", ctypes.c_uint64), ("at_once", ctypes.c_uint64))


class _Data(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("size", ctypes.c_uint64))


class _Granted(ctypes.Structure):
    want: int
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("capable", "want", "proto_minor"))


_U64, _I64, _U32, _INT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int
_PROTOTYPES = {
    "fallocate": ctypes.CFUNCTYPE(None, _U64, _U64, _INT, _I64, _I64),
    "lseek": ctypes.CFUNCTYPE(None, _U64, _U64, _I64, _INT),
    "copy_file_range": ctypes.CFUNCTYPE(None, _U64, _U64, _I64, _U64, _I64, _U64, _INT),
    "getlk": ctypes.CFUNCTYPE(None, _U64, _U64, _U64, _INT, _I64, _I64),
    "setlk": ctypes.CFUNCTYPE(None, _U64, _U64, _U64, _U64, _INT, _INT, _I64, _I64, _INT, _INT, _U64),
    "setxattr": ctypes.CFUNCTYPE(None, _U64, _U64, ctypes.c_char_p, ctypes.c_void_p, _U64, _INT, ctypes.c_uint32),
    "interrupt": ctypes.CFUNCTYPE(None, _U64),
    "lookup_now": ctypes.CFUNCTYPE(_INT, _U64, ctypes.c_char_p),
    "getattr_now": ctypes.CFUNCTYPE(_INT, _U64),
    "setattr_now": ctypes.CFUNCTYPE(_INT, _U64, ctypes.c_void_p),
    "mkdir_now": ctypes.CFUNCTYPE(_INT, _U64, ctypes.c_char_p, _U32),
    "unlink_now": ctypes.CFUNCTYPE(_INT, _U64, ctypes.c_char_p),
    "rmdir_now": ctypes.CFUNCTYPE(_INT, _U64, ctypes.c_char_p),
    "rename_now": ctypes.CFUNCTYPE(_INT, _U64, ctypes.c_char_p, _U64, ctypes.c_char_p, _U32),
    "open_now": ctypes.CFUNCTYPE(_INT, _U64, _U32),
    "create_now": ctypes.CFUNCTYPE(_INT, _U64, ctypes.c_char_p, _U32, _U32),
    "read_now": ctypes.CFUNCTYPE(_INT, _U64, _U64, _U32),
    "write_now": ctypes.CFUNCTYPE(_INT, _U64, _U64, ctypes.c_void_p, _U32),
    "flush_now": ctypes.CFUNCTYPE(_INT, _U64, _U64),
    "release_now": ctypes.CFUNCTYPE(_INT, _U64),
    "getxattr_now": ctypes.CFUNCTYPE(_INT, _U64, ctypes.c_char_p),
}
#: What a hook says that leaves a request to pyfuse3.
LEAVE = 0


class _Hooks(ctypes.Structure):
    _fields_ = tuple(_PROTOTYPES.items())


class Hooks(NamedTuple):
    """Hold the functions that serve added operations; None leaves one out. All numbers are as the kernel sent them.

    ``request`` is to be answered with the reply in brackets, or by ``reply_error``. Locks are given by type (F_RDLCK,
    F_WRLCK, F_UNLCK), start and length (0: to the end of the file), as in struct flock.
    """

    #: (request, fh, mode, offset, length) [reply_error 0]
    fallocate: Callable[[int, int, int, int, int], None] | None = None
    #: (request, fh, offset, whence) [reply_offset]
    lseek: Callable[[int, int, int, int], None] | None = None
    #: (request, fh, offset, target fh, target offset, length, flags) [reply_count]
    copy_file_range: Callable[[int, int, int, int, int, int, int], None] | None = None
    #: (request, inode, owner, type, start, length) [reply_lock]
    getlk: Callable[[int, int, int, int, int, int], None] | None = None
    #: (request, inode, fh, owner, flock or not, type, start, length, pid, wait, unique) [reply_error 0]
    setlk: Callable[[int, int, int, int, int, int, int, int, int, int, int], None] | None = None
    #: (request, inode, name, value, flags, user) [reply_error 0]
    setxattr: Callable[[int, int, bytes, bytes, int, int], None] | None = None
    #: (unique): the caller of a request was sent a signal. No answer.
    interrupt: Callable[[int], None] | None = None

    # Answers before pyfuse3 hears of a request: one more than the bytes that lie in ``Companion.answer``, -errno, or
    # LEAVE. ``Companion.request`` says who asks. What lies at an address is the library's again when the hook returns.
    #: (directory, name)
    lookup_now: Callable[[int, bytes], int] | None = None
    #: (inode)
    getattr_now: Callable[[int], int] | None = None
    #: (inode, address of struct fuse_setattr_in)
    setattr_now: Callable[[int, int], int] | None = None
    #: (directory, name, mode)
    mkdir_now: Callable[[int, bytes, int], int] | None = None
    #: (directory, name)
    unlink_now: Callable[[int, bytes], int] | None = None
    #: (directory, name)
    rmdir_now: Callable[[int, bytes], int] | None = None
    #: (directory, name, new directory, new name, flags)
    rename_now: Callable[[int, bytes, int, bytes, int], int] | None = None
    #: (inode, flags)
    open_now: Callable[[int, int], int] | None = None
    #: (directory, name, mode, flags)
    create_now: Callable[[int, bytes, int, int], int] | None = None
    #: (fh, offset, size)
    read_now: Callable[[int, int, int], int] | None = None
    #: (fh, offset, address, size)
    write_now: Callable[[int, int, int, int], int] | None = None
    #: (fh, owner)
    flush_now: Callable[[int, int], int] | None = None
    #: (fh)
    release_now: Callable[[int], int] | None = None
    #: (inode, name)
    getxattr_now: Callable[[int, bytes], int] | None = None


class Companion:
    """Be the loaded library. One per process, as it is one session per process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._hooks = _Hooks.in_dll(library, "benchfs_hooks")
        self._wishes = _Wishes.in_dll(library, "benchfs_wishes")
        self._granted = _Granted.in_dll(library, "benchfs_granted")
        self.request = Request.in_dll(library, "benchfs_request")
        #: Where hooks that answer at once put their answers, as linux/fuse.h has them.
        self.answer = memoryview((ctypes.c_char * ANSWER_MAX).in_dll(library, "benchfs_answer")).cast("B")
        self.counts = RequestCounts.in_dll(library, "benchfs_counts")
        self._data = _Data.in_dll(library, "benchfs_data")
        self._callbacks: list[Any] = []
        #: What the library has the address of.
        self._kept = memoryview(b"")
        self._reply_err = _function(library, "fuse_reply_err", _U64, _INT)
        self._reply_write = _function(library, "fuse_reply_write", _U64, ctypes.c_size_t)
        self._reply_lseek = _function(library, "fuse_reply_lseek", _U64, _I64)
        self._reply_lock = _function(library, "fuse_reply_lock", _U64, ctypes.c_char_p)
        self._free_caller = _function(library, "benchfs_free_caller", _U64)
        self._write_back = _function(library, "benchfs_write_back", _U64, _I64, _I64)
        library.benchfs_asked.argtypes, library.benchfs_asked.restype = [_U64], ctypes.c_uint32

    def wish(self, *, want: int, unwanted: int, max_background: int, congestion_threshold: int) -> None:
        """Say what the connection shall be, before the file system is mounted; ``granted`` tells what came of it.

        ``want`` and ``unwanted`` are capabilities.
        """
        wishes = self._wishes
        wishes.want, wishes.unwanted = want, unwanted
        wishes.max_background, wishes.congestion_threshold = max_background, congestion_threshold

    def wait_for_next(self, soon_ns: int) -> None:
        """Have the library wait so many nanoseconds for the next request behind one that was answered at once."""
        self._wishes.soon_ns = soon_ns

    @property
    def granted(self) -> int:
        """Return the capabilities that the connection has; 0 before the kernel has said hello."""
        return self._granted.want

    def hook(self, hooks: Hooks) -> None:
        """Add operations, before the file system is mounted."""
        setxattr = hooks.setxattr

        def copy_xattr(request: int, ino: int, name: bytes, value: int, size: int, flags: int, uid: int) -> None:
            assert setxattr is not None
            setxattr(request, ino, name, ctypes.string_at(value, size), flags, uid)

        functions = hooks._replace(setxattr=None)._asdict()
        if setxattr is not None:
            functions["setxattr"] = copy_xattr
        for name, function in functions.items():
            if function is not None:
                callback = _PROTOTYPES[name](_answering(name, function) if name.endswith("_now") else function)
                self._callbacks.append(callback)
                setattr(self._hooks, name, callback)

    def pid_of(self, unique: int) -> int:
        """Return which thread (its id) sent a request; 0 where that was forgotten (thousands of requests ago)."""
        return int(self._library.benchfs_asked(unique))

    def free_caller(self, unique: int) -> bool:
        """Answer a request with EINTR while its handler goes on; tell whether it was still waited for.

        What the handler answers later is dropped: nobody releases a handle that it opens.
        """
        return bool(self._free_caller(unique) == 0)

    def write_back(self, ino: int, offset: int, length: int) -> None:
        """Have the kernel write its dirty pages of a range back and forget them; a length of 0 reaches to the end.

        Not in the thread of the loop: this returns when the loop has answered the WRITE requests. That the kernel does
        not know the inode is no error.
        """
        error = self._write_back(ino, offset, length)
        if error not in (0, errno.ENOENT):
            raise OSError(error, os.strerror(error))

    def append(self, data: memoryview) -> None:
        """Add data to the answer that is given at once; it is the caller's again when the hook has returned."""
        self._kept = data
        if len(data):
            self._data.at, self._data.size = ctypes.addressof(ctypes.c_char.from_buffer(data)), len(data)

    def reply_error(self, request: int, error: int) -> None:
        """Answer with an errno, or 0."""
        self._reply_err(request, error)

    def reply_count(self, request: int, count: int) -> None:
        """Answer how many bytes were copied."""
        self._reply_write(request, count)

    def reply_offset(self, request: int, offset: int) -> None:
        """Answer where lseek has found something."""
        self._reply_lseek(request, offset)

    def reply_lock(self, request: int, kind: int, start: int, length: int, pid: int) -> None:
        """Answer which lock stands in the way (``kind`` F_UNLCK: none)."""
        # struct flock of fcntl(2) where off_t has 64 bits, aligned.
        self._reply_lock(request, struct.pack("@hhqqi", kind, os.SEEK_SET, start, length, pid))


def _answering(name: str, function: Callable[..., int]) -> Callable[..., int]:
    """Have a hook that answers give an answer whatever happens: where Python raises, ctypes returns what lies about.

    EIO, since something may have been done.
    """

    def run(*args: Any) -> int:
        try:
            return function(*args)
        except BaseException:  # there is nobody above who could take it
            log.exception("%s failed", name)
            return -errno.EIO

    return run


def copied(address: int, size: int) -> bytes:
    """Return a copy of what lies at an address that a hook was given."""
    return ctypes.string_at(address, size)


def _function(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = list(arguments), ctypes.c_int
    return function


def load() -> Companion | None:
    """Load the library, before pyfuse3; None where it was not built, or was built from another version."""
    library = LIBRARY.usable()
    if library is None:
        return None
    assert "pyfuse3" not in sys.modules, "the companion library comes first"
    return Companion(ctypes.CDLL(str(library), mode=os.RTLD_GLOBAL | os.RTLD_NOW))
