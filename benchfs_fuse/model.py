"""Say what an inode, a chunk and a layout are. Pure data: no I/O, no clock.

An inode number holds the virtual shard of its daemon in the bits from 48 up and a counter below, which the daemon that
made it gave (services/inodes.py). Counters are never reused, so neither are inode numbers. The root directory is shard
0, counter 1: number 1, as FUSE wants it.
"""

import enum
import stat
from typing import Annotated, NamedTuple, NewType

import msgspec

from .limits import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN, DAEMONS_MAX, SHARDS

Ino = NewType("Ino", int)
DaemonId = NewType("DaemonId", int)
#: Identity of one running client (a mount process, a daemon as a peer, a tool): 63 random bits made at its start.
ClientId = NewType("ClientId", int)

#: Numbers that come from peers, as they are checked where messages are decoded: what is counted, and what Linux gives
#: 16, 32 and 64 bits.
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Mode = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
TimeNs = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]

SHARD_SHIFT = 48
COUNTER_MASK = (1 << SHARD_SHIFT) - 1
ROOT_INO = Ino(1)


def make_ino(shard: int, counter: int) -> Ino:
    """Join a virtual shard (0 … SHARDS-1) and its counter (1 … 2**48-1) to an inode number."""
    assert 0 <= shard < SHARDS and 0 < counter <= COUNTER_MASK
    return Ino(shard << SHARD_SHIFT | counter)


def shard_of(ino: int) -> int:
    """Return the virtual shard that holds an inode."""
    return ino >> SHARD_SHIFT


#: No inode has this number or a larger one.
INO_END = SHARDS << SHARD_SHIFT


class ChunkId(NamedTuple):
    """Name one chunk: the ``index``-th piece of ``chunk_size`` bytes of the file ``ino``."""

    ino: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here


class LockKind(enum.IntEnum):
    """Tell the two kinds of advisory locks apart, which do not see each other: fcntl(2)'s and flock(2)'s."""

    POSIX = 0
    FLOCK = 1


class LockType(enum.IntEnum):
    """Say what a lock shares: F_RDLCK, F_WRLCK and F_UNLCK of fcntl(2)."""

    READ = 0
    WRITE = 1
    UNLOCK = 2


#: Last byte of a lock that reaches to the end of the file, however far that moves: OFFSET_MAX of Linux.
LOCK_END = (1 << 63) - 1


class Attrs(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Hold the attributes of one inode as its daemon knows them. Times in ns since the epoch, sizes in bytes.

    ``allocated`` counts the bytes of chunks on all daemons. ``version`` grows with every change of data or attributes:
    two equal versions mean that cached data and attributes are still right. ``parent`` is set for directories
    only (0 otherwise). ``chunk_size`` and ``width`` are the file's layout, for a directory what new files inherit.
    ``xattrs`` tells whether there are extended attributes, ACLs included.
    """

    ino: int
    generation: Count
    mode: Mode
    nlink: Count
    uid: Id
    gid: Id
    rdev: Count
    size: Count
    allocated: Count
    atime_ns: TimeNs
    mtime_ns: TimeNs
    ctime_ns: TimeNs
    version: Count
    chunk_size: Annotated[int, msgspec.Meta(ge=CHUNK_SIZE_MIN, le=CHUNK_SIZE_MAX)]
    width: Annotated[int, msgspec.Meta(ge=1, le=DAEMONS_MAX)]
    parent: int
    xattrs: bool = False

    @property
    def is_dir(self) -> bool:
        """Tell whether this is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Tell whether this is a regular file."""
        return stat.S_ISREG(self.mode)


class Entry(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Hold what a name stands for. ``kind`` is ``stat.S_IFMT`` of the mode.

    ``attrs`` is None where the inode lives with another daemon (a directory, a linked or a renamed file).
    """

    ino: int
    kind: int
    attrs: Attrs | None


class DirEntry(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Hold one row of a directory listing. ``cookie`` is the position after it: pass it to go on behind it."""

    cookie: int
    name: bytes
    ino: int
    kind: int
    attrs: Attrs | None


class DataRange(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Name ``length`` bytes at ``offset`` of chunk ``index`` that have space of their own: anything but a hole."""

    index: int
    offset: int
    length: int


class DiskUsage(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Hold the space of the file system under one data directory, in bytes and inodes.

    ``filesystem`` is equal for daemons that share one file system (host and device), so that it is counted once.
    """

    filesystem: str
    total: int
    free: int
    available: int
    files: int
    files_free: int
