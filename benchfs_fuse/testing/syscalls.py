"""Reach the system calls which the os module leaves out, with its manners: bytes paths, OSError on failure."""

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Any

# <fcntl.h>
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100

# What renameat2 takes, rename(2)
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

# utimensat(2): values of tv_nsec that stand for "now" and "leave alone"
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

# Modes of fallocate(2), <linux/falloc.h>
KEEP_SIZE = 1
PUNCH_HOLE = 2
COLLAPSE_RANGE = 8
ZERO_RANGE = 16
INSERT_RANGE = 32
UNSHARE_RANGE = 64

# Locks of open files, fcntl(2): the fcntl module has these from Python 3.13 on.
F_OFD_GETLK = 36
F_OFD_SETLK = 37

# The kernel's struct flock of 64 bits: l_type, l_whence, l_start, l_len, l_pid, padding.
_FLOCK = struct.Struct("hhqqi4x")

# The kernel's struct linux_dirent64, packed: getdents64(2).
#   offset 0  size 8  d_ino
#   offset 8  size 8  d_off: where the entry after this one starts
#   offset 16 size 2  d_reclen
#   offset 18 size 1  d_type
#   offset 19         d_name, ended by NUL
_DIRENT = struct.Struct("=QqHB")

# The smallest buffer that holds any one entry: header, a name of 255 bytes, its NUL, rounded up to 8.
DIRENT_LENGTH_MAX = 280


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class _LibcDirent(ctypes.Structure):
    _fields_ = [
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    ]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Timespec), ctypes.c_int]
_libc.futimens.argtypes = [ctypes.c_int, ctypes.POINTER(_Timespec)]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.getdents64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_libc.getdents64.restype = ctypes.c_ssize_t
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.opendir.restype = ctypes.c_void_p
_libc.readdir.argtypes = [ctypes.c_void_p]
_libc.readdir.restype = ctypes.POINTER(_LibcDirent)
_libc.telldir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
_libc.seekdir.restype = None
_libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.rewinddir.restype = None
_libc.closedir.argtypes = [ctypes.c_void_p]


def _raise_errno(path: bytes | None = None) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)


def renameat2(source: bytes, target: bytes, flags: int) -> None:
    """Rename with flags, which may be any bits: refusing them is the kernel's part. Raises OSError."""
    if _libc.renameat2(AT_FDCWD, source, AT_FDCWD, target, flags) != 0:
        _raise_errno(source)


def timespec(time_ns: int) -> tuple[int, int]:
    """Split nanoseconds since 1970, which may be negative, into seconds and the nanoseconds within a second."""
    return divmod(time_ns, 1_000_000_000)


def utimensat(path: bytes, atime: tuple[int, int], mtime: tuple[int, int], *, follow: bool = True) -> None:
    """Set both times of a path, each (seconds, nanoseconds) or (0, UTIME_NOW) or (0, UTIME_OMIT). Raises OSError."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    if _libc.utimensat(AT_FDCWD, path, times, 0 if follow else AT_SYMLINK_NOFOLLOW) != 0:
        _raise_errno(path)


def futimens(fd: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set both times of an open file, as utimensat does. Raises OSError."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    if _libc.futimens(fd, times) != 0:
        _raise_errno()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2) with any mode: os.posix_fallocate has mode 0 alone, and libc emulates it. Raises OSError."""
    if _libc.fallocate(fd, mode, offset, length) != 0:
        _raise_errno()


def setlk(fd: int, kind: int, start: int, length: int, *, ofd: bool) -> None:
    """Set a lock of the process, or of the open file, without waiting; bytes count from the start. Raises OSError."""
    fcntl.fcntl(fd, F_OFD_SETLK if ofd else fcntl.F_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def getlk(fd: int, kind: int, start: int, length: int, *, ofd: bool) -> tuple[int, int, int, int]:
    """Ask for a lock in the way of one: its kind (F_UNLCK: none), start, length and process. Raises OSError."""
    asked = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    found, _, first, count, pid = _FLOCK.unpack(fcntl.fcntl(fd, F_OFD_GETLK if ofd else fcntl.F_GETLK, asked))
    return found, first, count, pid


@dataclass(frozen=True, slots=True)
class Dirent:
    """One directory entry; `next_offset` is the kernel's cookie for the entry after it."""

    ino: int
    next_offset: int
    type: int
    name: bytes


def getdents64(fd: int, length: int = DIRENT_LENGTH_MAX) -> list[Dirent]:
    """Read the next entries that fit `length` bytes, "." and ".." among them; none at the end. Raises OSError.

    A small length makes the kernel come back for almost every entry, which is what tries a file system's offsets.
    """
    buffer = ctypes.create_string_buffer(length)
    filled: int = _libc.getdents64(fd, buffer, length)
    if filled < 0:
        _raise_errno()
    raw = buffer.raw[:filled]
    entries = []
    position = 0
    while position < filled:
        ino, next_offset, record_length, type_ = _DIRENT.unpack_from(raw, position)
        name = raw[position + _DIRENT.size : position + record_length].split(b"\0", 1)[0]
        entries.append(Dirent(ino, next_offset, type_, name))
        position += record_length
    return entries


class DirStream:
    """A libc directory stream: opendir(3), readdir(3), telldir(3), seekdir(3), rewinddir(3)."""

    _stream: int | None

    def __init__(self, path: bytes) -> None:
        self._stream = _libc.opendir(path)
        if self._stream is None:
            _raise_errno(path)

    def __enter__(self) -> "DirStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def read(self) -> bytes | None:
        """Return the next name, or None at the end. Raises OSError."""
        ctypes.set_errno(0)
        entry: Any = _libc.readdir(self._stream)
        if not entry:
            if ctypes.get_errno():
                _raise_errno()
            return None
        return bytes(entry.contents.d_name)

    def tell(self) -> int:
        """Return a cookie for the present position."""
        return int(_libc.telldir(self._stream))

    def seek(self, cookie: int) -> None:
        """Go back to where `tell` gave this cookie."""
        _libc.seekdir(self._stream, cookie)

    def rewind(self) -> None:
        """Go to the start, and see the directory as it is now."""
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        """Close the stream. Raises OSError."""
        if _libc.closedir(self._stream) != 0:
            _raise_errno()
        self._stream = None
