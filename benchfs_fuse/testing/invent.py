"""Make random sequences of calls up from a seed, such that they often meet.

Each seed draws its own few groups of calls, names, offsets and attributes ("swarm testing"): a sequence of everything
rarely does any two things to the same file. Names that were made before are named again.
"""

import fcntl
import itertools
import os
import random
import stat
from collections.abc import Callable, Sequence
from typing import TypeVar

from benchfs_fuse.testing.calls import CALLS, TIME_NOW, TIME_OMIT, Argument, Call, Kind
from benchfs_fuse.testing.sides import Depth, Plan
from benchfs_fuse.testing.syscalls import (
    KEEP_SIZE,
    PUNCH_HOLE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    UNSHARE_RANGE,
    ZERO_RANGE,
)

_NAMES = (b"a", b"b", b"c", b"d")
_ODD_NAMES = (b"n" * 255, b"n" * 256, b"\xff\xfe", b"\xc3(", b" ", b"new\nline", b"-rf", b".hidden", b".", b"..", b"")
_ODD_PATHS = (
    b"",
    b".",
    b"..",
    b"/",
    b"/a",
    b"./" * 2047 + b"a",  # 4095 bytes: the longest that PATH_MAX, which counts the NUL, admits
    b"./" * 2047 + b"aa",
    b"missing/a",
)
_POSITIONS = (0, 1, 100, 4095, 4096, 4097, 65536, (1 << 20) - 1, 1 << 20, (1 << 22) - 3, 1 << 22, (1 << 23) + 5)
_FAR_POSITIONS = (1 << 30, 1 << 40)
_LENGTHS = (0, 1, 10, 100, 4096, 5000, 8192, 65536, 70000)
# Lengths of ranges: short, as they are allocated too, or senseless.
_EXTENTS = (*_LENGTHS, (1 << 20) + 7, -1)
# What moves bytes (COLLAPSE_RANGE, INSERT_RANGE) some file systems do and some refuse; it is left to other tests.
_SPACE_MODES = (
    0,
    KEEP_SIZE,
    PUNCH_HOLE | KEEP_SIZE,
    PUNCH_HOLE | KEEP_SIZE,
    PUNCH_HOLE,
    UNSHARE_RANGE,
    1 << 10,
    -1,
)
_ZERO_MODES = (ZERO_RANGE, ZERO_RANGE | KEEP_SIZE, ZERO_RANGE | PUNCH_HOLE | KEEP_SIZE)
_MODES = (0o644, 0o600, 0o755, 0o777, 0o000, 0o4755, 0o2755, 0o2644, 0o6777, 0o1777, 0o400, 0o070)
# Major 240 is for local use, <kernel>/Documentation/admin-guide/devices.txt: no driver answers when one is opened.
_DEVICES = (os.makedev(240, 0), os.makedev(240, 77))
_TIMES = (0, 1, 999_999_999, 1_000_000_000_123_456_789, ((1 << 31) + 5) * 1_000_000_000 + 7, -1_500_000_000)
_XATTR_NAMES = (
    b"user.a",
    b"user.b",
    b"user." + b"x" * 250,
    b"user." + b"x" * 251,
    b"user.",
    b"trusted.a",
    b"security.a",
    b"a",
    b"other.a",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
)
_ACL_NAMES = (b"system.posix_acl_default", b"system.posix_acl_default", b"system.posix_acl_access")
_ACL_READ_USER_1001 = bytes.fromhex(
    "02000000"
    "0100 0600 ffffffff"  # owner rw-
    "0200 0400 e9030000"  # user 1001 r--
    "0400 0400 ffffffff"  # group r--
    "1000 0400 ffffffff"  # mask r--
    "2000 0000 ffffffff"  # others ---
)
_ACL_LIKE_MODE_640 = bytes.fromhex("02000000 0100 0600 ffffffff 0400 0400 ffffffff 2000 0000 ffffffff")
_ACL_OF_USER_AND_GROUP = bytes.fromhex(
    "02000000"
    "0100 0700 ffffffff"  # owner rwx
    "0200 0700 ea030000"  # user 1002 rwx
    "0400 0500 ffffffff"  # group r-x
    "0800 0600 e9030000"  # group 1001 rw-
    "1000 0700 ffffffff"  # mask rwx
    "2000 0500 ffffffff"  # others r-x
)
_ACL_VALUES = (_ACL_READ_USER_1001, _ACL_LIKE_MODE_640, _ACL_OF_USER_AND_GROUP)
_XATTR_VALUES = (b"", b"1", b"\0\xff", b"v" * 1000, b"v" * 65537, *_ACL_VALUES)
_RENAME_FLAGS = (
    0,
    RENAME_NOREPLACE,
    RENAME_NOREPLACE,
    RENAME_EXCHANGE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE | RENAME_EXCHANGE,
    RENAME_WHITEOUT | RENAME_EXCHANGE,
    1 << 5,
)
EXTRA_FLAGS = (os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_SYNC, os.O_DSYNC)
_FILL_MAX = 250
# Calls that act on one another; a seed draws a few of these groups.
GROUPS = (
    ("read", "pread", "write", "pwrite", "lseek", "ftruncate", "truncate", "fstat"),
    ("close", "dup", "fsync", "fdatasync", "fstat", "write", "unlink", "rename"),
    ("mkdir", "rmdir", "unlink", "rename", "link", "symlink"),
    ("mkdir", "rename", "renameat2", "rmdir"),
    ("symlink", "readlink", "link", "unlink", "stat"),
    ("chmod", "fchmod", "chown", "fchown", "utimensat", "futimens", "stat", "umask"),
    ("setxattr", "getxattr", "listxattr", "removexattr", "fsetxattr", "fgetxattr", "chmod"),
    ("opendir", "readdir", "telldir", "seekdir", "closedir", "unlink", "rename", "mkdir"),
    ("mknod", "stat", "access", "unlink"),
    ("chdir", "deepen", "listdir", "access", "statfs", "mkdir", "rmdir"),
    ("fallocate", "posix_fallocate", "seek_space", "pwrite", "ftruncate", "pread", "fstat"),
    ("copy_file_range", "seek_space", "map_write", "pwrite", "pread", "fallocate"),
    ("map_write", "pread", "pwrite", "truncate", "fsync"),
    ("flock", "setlk", "getlk", "dup", "close"),
    ("setacl", "mkdir", "mknod", "umask", "open_unnamed", "removexattr", "access"),
)

# The others weigh 1.
_WEIGHTS = {
    "open": 3.0,
    "mkdir": 2.0,
    "symlink": 2.0,
    "rename": 2.0,
    "pwrite": 2.0,
    "truncate": 2.0,
    "ftruncate": 2.0,
    "umask": 0.5,
    "chdir": 0.3,
    "deepen": 0.3,
}

# Calls that make the path at this place of their arguments, which later calls then often name.
_MAKERS = {"open": 1, "mkdir": 0, "deepen": 0, "symlink": 1, "link": 1, "rename": 1, "renameat2": 1, "mknod": 0}


_T = TypeVar("_T")


class _Inventor:
    """Make calls up from a seed."""

    def __init__(self, seed: int, *, direct: bool, zero_range: bool, about: str | None) -> None:
        self._random = random.Random(seed)
        self._direct = direct
        self._known: list[bytes] = []
        self._names = self._some_of(_NAMES, 1)
        self._calls = list(dict.fromkeys(("open", *itertools.chain(*self._groups(about)))))
        self._odd = self._random.choice((0.0, 0.0, 0.1))
        self._users = self._random.choice((0.0, 0.25))
        slots = self._random.randint(1, 3)
        # Few, so that what is written at one is what is cut, copied or sought there.
        positions = self._random.sample((*_POSITIONS, *_FAR_POSITIONS, -1), self._random.randint(2, 6))
        self._makers: dict[Kind, Callable[[], Argument]] = {
            Kind.SLOT: lambda: self._random.randrange(slots),
            Kind.STREAM: lambda: self._random.randrange(2),
            Kind.PATH: self._path,
            Kind.TARGET: self._target,
            Kind.OPEN_FLAGS: self._open_flags,
            Kind.MODE: self._one_of(self._some_of(_MODES, 2)),
            Kind.NODE_MODE: self._node_mode,
            Kind.DEVICE: self._one_of(_DEVICES),
            Kind.LENGTH: self._one_of(self._some_of(_LENGTHS, 2)),
            Kind.FILL: lambda: self._random.randint(0, _FILL_MAX),
            Kind.OFFSET: self._one_of(positions),
            Kind.SIZE: self._one_of(positions),
            Kind.WHENCE: self._one_of((os.SEEK_SET, os.SEEK_CUR, os.SEEK_END)),
            Kind.OWNER: self._one_of((0, 1001, 1002, -1)),
            Kind.TIME: lambda: self._random.choice((TIME_NOW, TIME_OMIT, *_TIMES)),
            Kind.FOLLOW: lambda: self._random.randrange(2),
            Kind.RENAME_FLAGS: self._one_of(_RENAME_FLAGS),
            Kind.ACCESS: lambda: self._random.randrange(8),
            Kind.XATTR_NAME: self._one_of(self._some_of(_XATTR_NAMES, 2)),
            Kind.XATTR_VALUE: self._one_of(self._some_of(_XATTR_VALUES, 2)),
            Kind.XATTR_FLAGS: self._one_of((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE)),
            Kind.COUNT: lambda: self._random.choice((0, 1, 2, 3, 15)),
            Kind.MARK: lambda: self._random.randrange(2),
            Kind.EXTENT: self._one_of(self._some_of(_EXTENTS, 2)),
            Kind.SPACE_MODE: self._one_of(_SPACE_MODES + _ZERO_MODES * zero_range),
            Kind.SEEK: self._one_of((os.SEEK_DATA, os.SEEK_HOLE)),
            Kind.LOCK: self._one_of((fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)),
            Kind.LOCK_SOUGHT: self._one_of((fcntl.F_RDLCK, fcntl.F_WRLCK)),
            Kind.FLOCK: self._one_of((fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_EX, fcntl.LOCK_UN, 0)),
            Kind.ACL_NAME: self._one_of(_ACL_NAMES),
            Kind.ACL_VALUE: self._one_of((*_ACL_VALUES, b"")),
            Kind.FLAG: lambda: self._random.randrange(2),
        }

    def calls(self, count: int) -> tuple[Call, ...]:
        weights = [_WEIGHTS.get(name, 1) for name in self._calls]
        return tuple(self._call(name) for name in self._random.choices(self._calls, weights, k=count))

    def _call(self, name: str) -> Call:
        args = tuple(self._makers[kind]() for kind in CALLS[name])
        if name in _MAKERS:
            made = args[_MAKERS[name]]
            assert isinstance(made, bytes)
            self._known.append(made)
        by_root = name == "deepen" or self._random.random() >= self._users
        uid = 0 if by_root else self._random.choice((1001, 1002))
        return Call(name, args, uid)

    def _groups(self, about: str | None) -> list[tuple[str, ...]]:
        """Draw one group half of the time, for what takes many calls of few sorts, else up to four."""
        first = self._random.choice([group for group in GROUPS if about in (None, "open", *group)])
        return [first, *self._random.sample(GROUPS, self._random.choice((0, 0, 0, 1, 2, 3)))]

    def _one_of(self, pool: Sequence[Argument]) -> Callable[[], Argument]:
        return lambda: self._random.choice(pool)

    def _some_of(self, pool: Sequence[_T], count_min: int) -> list[_T]:
        """Draw at least `count_min` elements, in the order of the pool, for the whole sequence."""
        count = self._random.randint(count_min, min(len(pool), max(count_min * 4, 4)))
        chosen = set(self._random.sample(range(len(pool)), count))
        return [element for index, element in enumerate(pool) if index in chosen]

    def _path(self) -> bytes:
        odd = self._random.random() < self._odd
        if odd and self._random.random() < 0.4:
            return self._random.choice(_ODD_PATHS)
        name = self._random.choice(_ODD_NAMES if odd else self._names)
        dice = self._random.random()
        if self._known and dice < 0.45:
            path = self._random.choice(self._known[-8:])
        elif self._known and dice < 0.65:
            path = self._random.choice(self._known) + b"/" + name
        else:
            path = name
        if self._random.random() < self._odd / 2:
            path = self._random.choice(
                (path + b"/", path + b"//", b"./" + path, path + b"/.", path + b"/..", b"/" + path)
            )
        return path

    def _target(self) -> bytes:
        if self._random.random() < self._odd:
            return self._random.choice((b"", b"t" * 4095, b"t" * 4096, b"/", b"..", b"self/self", b"\xff/\xfe"))
        return self._path()

    def _open_flags(self) -> int:
        flags = self._random.choice((os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_WRONLY))
        if self._random.random() < 0.6:
            flags |= os.O_CREAT
        for extra in EXTRA_FLAGS:
            if self._random.random() < 0.12:
                flags |= extra
        if self._direct and not flags & (os.O_APPEND | os.O_DIRECTORY) and self._random.random() < 0.1:
            flags |= os.O_DIRECT
        return flags

    def _node_mode(self) -> int:
        kinds = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, 0, 0o170000)
        return self._random.choice(kinds) | self._random.choice(_MODES)


def invent(seed: int, count: int, *, direct: bool = False, zero_range: bool = False, about: str | None = None) -> Plan:
    """Make up `count` calls; the same arguments give the same plan.

    `direct` admits O_DIRECT, `zero_range` fallocate with ZERO_RANGE. With `about`, that call is among them.
    """
    depth = (Depth.ANSWERS, Depth.TREES, Depth.TIMES)[seed % 3]
    return Plan(_Inventor(seed, direct=direct, zero_range=zero_range, about=about).calls(count), depth)
