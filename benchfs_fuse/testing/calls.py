"""Make system calls from data.

A `Call` is a system call's name and arguments. A `Sut` (system under test) makes calls, holding open files in numbered
slots, and answers each with a value or the name of an errno. Nothing in an answer depends on which file system gave it:
no inode numbers, no times of today, no order of entries, no directory sizes. A test plants a bug by a subclass of `Sut`
whose calls lie.
"""

import ast
import contextlib
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from benchfs_fuse.testing.syscalls import (
    DIRENT_LENGTH_MAX,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    UTIME_NOW,
    UTIME_OMIT,
    fallocate,
    futimens,
    getdents64,
    getlk,
    renameat2,
    setlk,
    timespec,
    utimensat,
)

Argument = int | bytes
Value = None | bool | int | str | bytes | tuple["Value", ...]
Fields = dict[str, Value]

# What O_DIRECT asks of offset, length and memory: the largest logical block of common disks, and a page.
DIRECT_ALIGNMENT = 4096

# Where larger files are looked at: chunks of every likely size begin and end at one of these places.
PLACES = (0, 1 << 16, 1 << 20, 1 << 22, 1 << 23, 1 << 30, 1 << 40)

# Stand for utimensat's special values among times in nanoseconds.
TIME_NOW = 1 << 62
TIME_OMIT = (1 << 62) + 1


class Kind(Enum):
    """What an argument means: decides how it is made up, printed and made simpler."""

    SLOT = auto()
    STREAM = auto()
    PATH = auto()
    TARGET = auto()
    OPEN_FLAGS = auto()
    MODE = auto()
    NODE_MODE = auto()
    DEVICE = auto()
    LENGTH = auto()
    FILL = auto()
    OFFSET = auto()
    SIZE = auto()
    WHENCE = auto()
    OWNER = auto()
    TIME = auto()
    FOLLOW = auto()
    RENAME_FLAGS = auto()
    ACCESS = auto()
    XATTR_NAME = auto()
    XATTR_VALUE = auto()
    XATTR_FLAGS = auto()
    COUNT = auto()
    MARK = auto()
    EXTENT = auto()
    SPACE_MODE = auto()
    SEEK = auto()
    LOCK = auto()
    LOCK_SOUGHT = auto()
    FLOCK = auto()
    FLAG = auto()
    ACL_NAME = auto()
    ACL_VALUE = auto()


K = Kind
CALLS: dict[str, tuple[Kind, ...]] = {
    "open": (K.SLOT, K.PATH, K.OPEN_FLAGS, K.MODE),
    "close": (K.SLOT,),
    "dup": (K.SLOT, K.SLOT),
    "read": (K.SLOT, K.LENGTH),
    "pread": (K.SLOT, K.LENGTH, K.OFFSET),
    "write": (K.SLOT, K.LENGTH, K.FILL),
    "pwrite": (K.SLOT, K.LENGTH, K.FILL, K.OFFSET),
    "lseek": (K.SLOT, K.OFFSET, K.WHENCE),
    "ftruncate": (K.SLOT, K.SIZE),
    "fsync": (K.SLOT,),
    "fdatasync": (K.SLOT,),
    "fstat": (K.SLOT,),
    "fchmod": (K.SLOT, K.MODE),
    "fchown": (K.SLOT, K.OWNER, K.OWNER),
    "futimens": (K.SLOT, K.TIME, K.TIME),
    "fsetxattr": (K.SLOT, K.XATTR_NAME, K.XATTR_VALUE, K.XATTR_FLAGS),
    "fgetxattr": (K.SLOT, K.XATTR_NAME),
    "truncate": (K.PATH, K.SIZE),
    "mkdir": (K.PATH, K.MODE),
    "deepen": (K.PATH, K.COUNT),
    "rmdir": (K.PATH,),
    "unlink": (K.PATH,),
    "symlink": (K.TARGET, K.PATH),
    "readlink": (K.PATH,),
    "link": (K.PATH, K.PATH, K.FOLLOW),
    "rename": (K.PATH, K.PATH),
    "renameat2": (K.PATH, K.PATH, K.RENAME_FLAGS),
    "chmod": (K.PATH, K.MODE),
    "chown": (K.PATH, K.OWNER, K.OWNER, K.FOLLOW),
    "utimensat": (K.PATH, K.TIME, K.TIME, K.FOLLOW),
    "mknod": (K.PATH, K.NODE_MODE, K.DEVICE),
    "stat": (K.PATH, K.FOLLOW),
    "listdir": (K.PATH,),
    "access": (K.PATH, K.ACCESS),
    "statfs": (K.PATH,),
    "setxattr": (K.PATH, K.XATTR_NAME, K.XATTR_VALUE, K.XATTR_FLAGS, K.FOLLOW),
    "getxattr": (K.PATH, K.XATTR_NAME, K.FOLLOW),
    "listxattr": (K.PATH, K.FOLLOW),
    "removexattr": (K.PATH, K.XATTR_NAME, K.FOLLOW),
    "opendir": (K.STREAM, K.PATH),
    "readdir": (K.STREAM, K.COUNT),
    "telldir": (K.STREAM, K.MARK),
    "seekdir": (K.STREAM, K.MARK),
    "closedir": (K.STREAM,),
    "chdir": (K.PATH,),
    "umask": (K.MODE,),
    "setacl": (K.PATH, K.ACL_NAME, K.ACL_VALUE),
    "open_unnamed": (K.PATH, K.OPEN_FLAGS, K.MODE),
    "fallocate": (K.SLOT, K.SPACE_MODE, K.OFFSET, K.EXTENT),
    "posix_fallocate": (K.SLOT, K.OFFSET, K.EXTENT),
    "seek_space": (K.SLOT, K.OFFSET, K.SEEK),
    "copy_file_range": (K.SLOT, K.OFFSET, K.SLOT, K.OFFSET, K.EXTENT),
    "map_write": (K.SLOT, K.LENGTH, K.FILL, K.OFFSET),
    "flock": (K.SLOT, K.FLOCK),
    "setlk": (K.SLOT, K.LOCK, K.OFFSET, K.EXTENT, K.FLAG),
    "getlk": (K.SLOT, K.LOCK_SOUGHT, K.OFFSET, K.EXTENT, K.FLAG),
}

# Bytes around each of `PLACES` that a seek over a large hole is checked by.
_WINDOW_LENGTH = 65536

_OPEN_FLAG_NAMES = ("CREAT", "EXCL", "TRUNC", "APPEND", "NOFOLLOW", "DIRECTORY", "DIRECT", "SYNC", "DSYNC", "PATH")
_RENAME_FLAG_NAMES = {
    RENAME_NOREPLACE: "RENAME_NOREPLACE",
    RENAME_EXCHANGE: "RENAME_EXCHANGE",
    RENAME_WHITEOUT: "RENAME_WHITEOUT",
}


def _render_open_flags(flags: int) -> str:
    parts = [("os.O_RDONLY", "os.O_WRONLY", "os.O_RDWR", "os.O_ACCMODE")[flags & os.O_ACCMODE]]
    rest = flags & ~os.O_ACCMODE
    for name in _OPEN_FLAG_NAMES:
        bits: int = getattr(os, f"O_{name}")
        if name == "DSYNC" and "os.O_SYNC" in parts:
            continue
        if rest & bits == bits:
            parts.append(f"os.O_{name}")
            rest &= ~bits
    if rest:
        parts.append(oct(rest))
    return " | ".join(parts)


def _render_argument(kind: Kind, argument: Argument) -> str:
    if kind is Kind.OPEN_FLAGS and isinstance(argument, int):
        return _render_open_flags(argument)
    if kind in (Kind.MODE, Kind.NODE_MODE) and isinstance(argument, int):
        return oct(argument)
    if kind is Kind.TIME and argument in (TIME_NOW, TIME_OMIT):
        return "TIME_NOW" if argument == TIME_NOW else "TIME_OMIT"
    if kind is Kind.RENAME_FLAGS and argument in _RENAME_FLAG_NAMES:
        return _RENAME_FLAG_NAMES[argument]
    if isinstance(argument, bytes) and len(argument) > 80 and len(set(argument)) == 1:
        return f"{argument[:1]!r} * {len(argument)}"
    return repr(argument)


@dataclass(frozen=True, slots=True)
class Call:
    """One system call; `uid` (and the same gid) makes it as that user, without further groups or capabilities."""

    name: str
    args: tuple[Argument, ...]
    uid: int = 0

    def __str__(self) -> str:
        """Render it as the Python that makes it again."""
        parts = [_render_argument(kind, argument) for kind, argument in zip(CALLS[self.name], self.args, strict=True)]
        user = f", uid={self.uid}" if self.uid else ""
        return f'Call("{self.name}", ({", ".join(parts)}{"," if len(parts) == 1 else ""}){user})'


def pattern(fill: int, length: int) -> bytes:
    """Make `length` bytes that depend on `fill` and, with a period of 251, on their place: a shifted copy differs."""
    period = bytes((fill + index * 7) % 251 + 1 for index in range(251))
    return (period * (length // 251 + 1))[:length]


class NothingThereError(Exception):
    """The call names a slot that holds no open file: both sides skip it."""


@dataclass(slots=True)
class _Stream:
    """A directory being read by getdents64, and what its reader is owed.

    Entries that were there, under the same name and inode, at every moment since the stream was opened (`stable`), must
    be seen exactly once on any way through it; what came or went meanwhile may or may not be.
    """

    fd: int
    stable: set[tuple[bytes, int]] | None = None
    seen: set[tuple[bytes, int]] = field(default_factory=set)
    position: int = 0
    marks: dict[int, tuple[int, set[tuple[bytes, int]]]] = field(default_factory=dict)


class Sut:
    """Make calls by their names: a method takes the arguments that `CALLS` lists and answers with a plain value."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.streams: dict[int, _Stream] = {}

    def make(self, call: Call) -> Value:
        """Make a call as its user and return its value, or the errno's name in angle brackets."""
        with _acting_as(call.uid):
            try:
                answer: Value = getattr(self, call.name)(*call.args)
            except OSError as error:
                answer = failing(error)
            except NothingThereError:
                answer = "<nothing there>"
        for stream in self.streams.values():
            with contextlib.suppress(FileNotFoundError):
                now = _entries_now(stream.fd)
                stream.stable = now if stream.stable is None else stream.stable & now
        return answer

    def close_all(self) -> None:
        """Close whatever is open."""
        for fd in self.slots.values():
            os.close(fd)
        for stream in self.streams.values():
            os.close(stream.fd)
        self.slots.clear()
        self.streams.clear()

    def fd(self, slot: int) -> int:
        """Return the open file in a slot."""
        if slot not in self.slots:
            raise NothingThereError
        return self.slots[slot]

    def _keep(self, slot: int, fd: int) -> None:
        if slot in self.slots:
            os.close(self.slots[slot])
        self.slots[slot] = fd

    def open(self, slot: int, path: bytes, flags: int, mode: int) -> Value:
        # O_NONBLOCK: a FIFO without a peer must not wait.
        self._keep(slot, os.open(path, flags | os.O_NONBLOCK, mode))
        return None

    def close(self, slot: int) -> Value:
        fd = self.fd(slot)
        del self.slots[slot]
        os.close(fd)
        return None

    def dup(self, slot: int, other: int) -> Value:
        self._keep(other, os.dup(self.fd(slot)))
        return None

    def read(self, slot: int, length: int) -> Value:
        if is_direct(self.fd(slot)):
            return None
        return os.read(self.fd(slot), length)

    def pread(self, slot: int, length: int, offset: int) -> Value:
        fd = self.fd(slot)
        if is_direct(fd):
            with mmap.mmap(-1, _round_up(length)) as buffer:
                return buffer[: os.preadv(fd, [buffer], _round_down(offset))]
        return os.pread(fd, length, offset)

    def write(self, slot: int, length: int, fill: int) -> Value:
        if is_direct(self.fd(slot)):
            return None
        return os.write(self.fd(slot), pattern(fill, length))

    def pwrite(self, slot: int, length: int, fill: int, offset: int) -> Value:
        fd = self.fd(slot)
        if is_direct(fd):
            with mmap.mmap(-1, _round_up(length)) as buffer:
                buffer.write(pattern(fill, len(buffer)))
                return os.pwritev(fd, [buffer], _round_down(offset))
        return os.pwrite(fd, pattern(fill, length), offset)

    def lseek(self, slot: int, offset: int, whence: int) -> Value:
        if stat.S_ISDIR(os.fstat(self.fd(slot)).st_mode):
            return None  # positions in a directory are cookies, each file system's own
        return os.lseek(self.fd(slot), offset, whence)

    def ftruncate(self, slot: int, size: int) -> Value:
        os.ftruncate(self.fd(slot), size)
        return None

    def fsync(self, slot: int) -> Value:
        os.fsync(self.fd(slot))
        return None

    def fdatasync(self, slot: int) -> Value:
        os.fdatasync(self.fd(slot))
        return None

    def fstat(self, slot: int) -> Value:
        return _brief(os.fstat(self.fd(slot)))

    def fchmod(self, slot: int, mode: int) -> Value:
        os.fchmod(self.fd(slot), mode)
        return None

    def fchown(self, slot: int, uid: int, gid: int) -> Value:
        os.fchown(self.fd(slot), uid, gid)
        return None

    def futimens(self, slot: int, atime: int, mtime: int) -> Value:
        futimens(self.fd(slot), _timespec(atime), _timespec(mtime))
        return None

    def fsetxattr(self, slot: int, name: bytes, value: bytes, flags: int) -> Value:
        os.setxattr(self.fd(slot), name, value, flags)
        return None

    def fgetxattr(self, slot: int, name: bytes) -> Value:
        return os.getxattr(self.fd(slot), name)

    def truncate(self, path: bytes, size: int) -> Value:
        os.truncate(path, size)
        return None

    def mkdir(self, path: bytes, mode: int) -> Value:
        os.mkdir(path, mode)
        return None

    def deepen(self, path: bytes, count: int) -> Value:
        """Make a chain of `count` directories with names of 255 bytes: sixteen of them exceed PATH_MAX."""
        for _ in range(count):
            path = path + b"/" + b"d" * 255
            os.mkdir(path)
        return None

    def rmdir(self, path: bytes) -> Value:
        os.rmdir(path)
        return None

    def unlink(self, path: bytes) -> Value:
        os.unlink(path)
        return None

    def symlink(self, target: bytes, path: bytes) -> Value:
        os.symlink(target, path)
        return None

    def readlink(self, path: bytes) -> Value:
        return os.readlink(path)

    def link(self, source: bytes, target: bytes, follow: int) -> Value:
        os.link(source, target, follow_symlinks=bool(follow))
        return None

    def rename(self, source: bytes, target: bytes) -> Value:
        os.rename(source, target)
        return None

    def renameat2(self, source: bytes, target: bytes, flags: int) -> Value:
        renameat2(source, target, flags)
        return None

    def chmod(self, path: bytes, mode: int) -> Value:
        os.chmod(path, mode)
        return None

    def chown(self, path: bytes, uid: int, gid: int, follow: int) -> Value:
        os.chown(path, uid, gid, follow_symlinks=bool(follow))
        return None

    def utimensat(self, path: bytes, atime: int, mtime: int, follow: int) -> Value:
        utimensat(path, _timespec(atime), _timespec(mtime), follow=bool(follow))
        return None

    def mknod(self, path: bytes, mode: int, device: int) -> Value:
        os.mknod(path, mode, device)
        return None

    def stat(self, path: bytes, follow: int) -> Value:
        return _brief(os.stat(path, follow_symlinks=bool(follow)))

    def listdir(self, path: bytes) -> Value:
        return tuple(sorted(os.listdir(path)))

    def access(self, path: bytes, mode: int) -> Value:
        return os.access(path, mode)

    def statfs(self, path: bytes) -> Value:
        found = os.statvfs(path)
        return (
            found.f_namemax,
            found.f_blocks >= found.f_bfree >= found.f_bavail >= 0,
            found.f_files >= found.f_ffree >= 0,
            found.f_bsize > 0 and found.f_frsize > 0,
        )

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int, follow: int) -> Value:
        os.setxattr(path, name, value, flags, follow_symlinks=bool(follow))
        return None

    def getxattr(self, path: bytes, name: bytes, follow: int) -> Value:
        return os.getxattr(path, name, follow_symlinks=bool(follow))

    def listxattr(self, path: bytes, follow: int) -> Value:
        return tuple(sorted(os.listxattr(path, follow_symlinks=bool(follow))))

    def removexattr(self, path: bytes, name: bytes, follow: int) -> Value:
        os.removexattr(path, name, follow_symlinks=bool(follow))
        return None

    def opendir(self, slot: int, path: bytes) -> Value:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        if slot in self.streams:
            os.close(self.streams[slot].fd)
        self.streams[slot] = _Stream(fd)
        return None

    def _stream(self, slot: int) -> _Stream:
        if slot not in self.streams:
            raise NothingThereError
        return self.streams[slot]

    def readdir(self, slot: int, count: int) -> Value:
        """Read `count` batches of entries; 0 means to the end. Return what is wrong with what was seen."""
        stream = self._stream(slot)
        stable = stream.stable or set()
        wrong: list[Value] = []
        done = 0
        while done < count or count == 0:
            batch = getdents64(stream.fd, DIRENT_LENGTH_MAX)
            if not batch:
                wrong.extend(("missed", name) for name, _ in sorted(stable - stream.seen))
                break
            for entry in batch:
                key = (entry.name, entry.ino)
                if key in stream.seen and key in stable:
                    wrong.append(("seen twice", entry.name))
                if entry.name not in (b".", b".."):
                    stream.seen.add(key)
                stream.position = entry.next_offset
            done += 1
        return tuple(wrong)

    def telldir(self, slot: int, mark: int) -> Value:
        stream = self._stream(slot)
        stream.marks[mark] = (stream.position, set(stream.seen))
        return None

    def seekdir(self, slot: int, mark: int) -> Value:
        """Go back to a mark; one never made means the beginning."""
        stream = self._stream(slot)
        stream.position, seen = stream.marks.get(mark, (0, set()))
        stream.seen = set(seen)
        os.lseek(stream.fd, stream.position, os.SEEK_SET)
        return None

    def closedir(self, slot: int) -> Value:
        os.close(self._stream(slot).fd)
        del self.streams[slot]
        return None

    def chdir(self, path: bytes) -> Value:
        os.chdir(path)
        return None

    def umask(self, mode: int) -> Value:
        return os.umask(mode & 0o777)

    def setacl(self, path: bytes, name: bytes, value: bytes) -> Value:
        os.setxattr(path, name, value)
        return None

    def open_unnamed(self, path: bytes, flags: int, mode: int) -> Value:
        """Open a file without a name and close it again: where it is refused the others have it, nothing follows."""
        os.close(os.open(path, flags & ~os.O_CREAT | os.O_TMPFILE, mode))
        return None

    def fallocate(self, slot: int, mode: int, offset: int, length: int) -> Value:
        fallocate(self.fd(slot), mode, offset, length)
        return None

    def posix_fallocate(self, slot: int, offset: int, length: int) -> Value:
        os.posix_fallocate(self.fd(slot), offset, length)
        return None

    def seek_space(self, slot: int, offset: int, whence: int) -> Value:
        """Seek data or a hole and go back; return what is wrong with the place that was found.

        File systems may know holes better or worse, in blocks of their own, and what is reserved or written as zeros
        may be data or not. So the places are not compared. But none lies before `offset`, data lies within the file and
        a hole at most at its end, what is passed over as a hole reads as zeros, and the position is where it says.
        """
        fd = self.fd(slot)
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            return None
        before = os.lseek(fd, 0, os.SEEK_CUR)
        size = status.st_size
        _reads_zeros(fd, max(0, offset), max(0, offset) + 1)  # sets the access time, whatever is looked at below
        try:
            found = self.seek(fd, offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO or whence != os.SEEK_DATA or not 0 <= offset < size:
                raise
            return None if _reads_zeros(fd, offset, size) else "no data found where there is"
        if os.lseek(fd, 0, os.SEEK_CUR) != found:
            return "the position is elsewhere"
        os.lseek(fd, before, os.SEEK_SET)
        if not offset <= found <= size - (whence == os.SEEK_DATA):
            return f"found at {found} from {offset} of {size}"
        if whence == os.SEEK_DATA:
            return None if _reads_zeros(fd, offset, found) else "data passed over"
        if found == size:
            return None
        try:
            end = self.seek(fd, found, os.SEEK_DATA)
        except OSError:
            end = size
        os.lseek(fd, before, os.SEEK_SET)
        return None if _reads_zeros(fd, found, max(end, found + 1)) else "a hole with data"

    def seek(self, fd: int, offset: int, whence: int) -> int:
        """Seek; a test's lie goes here, before what is found is judged."""
        return os.lseek(fd, offset, whence)

    def copy_file_range(self, slot: int, offset: int, other: int, other_offset: int, length: int) -> Value:
        """Copy until it is done or the source ends; return how much that is."""
        source, target = self.fd(slot), self.fd(other)
        if length < 0 or is_direct(source) or is_direct(target):
            return None  # the os module has no unsigned length, and what is not aligned is refused by some
        done = os.copy_file_range(source, target, length, offset, other_offset)
        count = done
        while count and done < length:
            count = os.copy_file_range(source, target, length - done, offset + done, other_offset + done)
            done += count
        return done

    def map_write(self, slot: int, length: int, fill: int, offset: int) -> Value:
        """Write by a shared mapping and msync, within the file; not where it is open to append: some refuse."""
        fd = self.fd(slot)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
            return None
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):  # what a directory's size means, each file system says for itself
            length = min(length, status.st_size - offset)
        if length <= 0 or offset < 0:
            return None
        base = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(fd, offset - base + length, mmap.MAP_SHARED, offset=base) as view:
            view[offset - base :] = pattern(fill, length)
            view.flush()
        return length

    def flock(self, slot: int, operation: int) -> Value:
        fcntl.flock(self.fd(slot), operation | fcntl.LOCK_NB)
        return None

    def setlk(self, slot: int, kind: int, start: int, length: int, ofd: int) -> Value:
        setlk(self.fd(slot), kind, start, length, ofd=bool(ofd))
        return None

    def getlk(self, slot: int, kind: int, start: int, length: int, ofd: int) -> Value:
        """Ask for what is in the way of a lock: of this open file, or of another process, which a child is."""
        fd = self.fd(slot)
        if ofd:
            return getlk(fd, kind, start, length, ofd=True)[:3]
        owner = os.getpid()

        def ask() -> Value:
            *found, pid = getlk(fd, kind, start, length, ofd=False)
            return (*found, pid == owner)

        return _in_a_child(ask)


def _in_a_child(ask: Callable[[], Value]) -> Value:
    """Ask in another process, which has the same files open but none of the locks."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = ask()
        except OSError as error:
            answer = failing(error)
        finally:
            os.write(there, repr(answer).encode())
            os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as said:
        text = said.read().decode()
    os.waitpid(child, 0)
    answered: Value = ast.literal_eval(text)
    return answered


def _reads_zeros(fd: int, start: int, stop: int) -> bool:
    """Tell whether a range reads as zeros, around `PLACES` and its ends if it is long; taken on trust if unreadable."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_DIRECT) not in (os.O_RDONLY, os.O_RDWR):
        return True
    centres = [start, stop, *PLACES]
    spans = [(max(start, at - _WINDOW_LENGTH // 2), min(stop, at + _WINDOW_LENGTH // 2)) for at in centres]
    return not any(any(os.pread(fd, last - first, first)) for first, last in spans if first < last)


def _entries_now(directory_fd: int) -> set[tuple[bytes, int]]:
    """List an open directory through a second open file, which leaves the position of the first alone."""
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory_fd)
    try:
        with os.scandir(fd) as entries:
            return {(os.fsencode(entry.name), entry.inode()) for entry in entries}
    finally:
        os.close(fd)


def is_direct(fd: int) -> bool:
    """Tell whether an open file bypasses the page cache, and so wants aligned requests."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _round_down(offset: int) -> int:
    return offset // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT


def _round_up(length: int) -> int:
    return max(1, -(-length // DIRECT_ALIGNMENT)) * DIRECT_ALIGNMENT


def _timespec(time_ns: int) -> tuple[int, int]:
    if time_ns == TIME_NOW:
        return 0, UTIME_NOW
    if time_ns == TIME_OMIT:
        return 0, UTIME_OMIT
    return timespec(time_ns)


@contextlib.contextmanager
def _acting_as(uid: int) -> Iterator[None]:
    """Take a user's ids, real ones included so that access(2) asks for that user; the saved ids remain root's."""
    if uid == 0:
        yield
        return
    os.setresgid(uid, uid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


def _brief(found: os.stat_result) -> Value:
    """Return what one stat of anything shows: format, permissions, links, owner, group, size, device."""
    return tuple(value for _, value in sorted(attributes(found).items()))


def attributes(found: os.stat_result) -> Fields:
    """Return what stat says of anything, but for inode numbers, times and the sizes of directories."""
    fields: Fields = {
        "format": stat.S_IFMT(found.st_mode),
        "mode": oct(stat.S_IMODE(found.st_mode)),
        "nlink": found.st_nlink,
        "uid": found.st_uid,
        "gid": found.st_gid,
    }
    if not stat.S_ISDIR(found.st_mode):
        fields["size"] = found.st_size
    if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        fields["rdev"] = found.st_rdev
    return fields


def failing(error: OSError) -> str:
    """Return an error as an answer: its errno's name in angle brackets."""
    return f"<{errno.errorcode[error.errno or 0]}>"
