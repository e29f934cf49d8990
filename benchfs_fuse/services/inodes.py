"""Keep inodes, directory entries and inode numbers in a daemon's store: their records, and a draft of changes to them.

Records (keys: ``disk.py``)

    key                  value
    I ino                ``Inode`` as a MessagePack array
    D directory, name    offset 0, 8: ino; 8, 8: cookie; 16, 2: kind (S_IFMT of the mode); big endian
    O directory, cookie  offset 0, 8: ino; 8, 2: kind; 10: name; big endian
    N                    8 bytes: numbers below this one may be in use; big endian

An inode number holds the shard, then (bits 40 to 47) the daemon that made it, then that daemon's counter. So a daemon
numbers a directory that another daemon will hold without asking it, and no number is ever given twice.
"""

import stat
import struct
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from .. import disk
from ..errors import NoSpace, Stale
from ..layout import ShardMap
from ..model import Attrs, Ino, make_ino
from ..ports import KeyValueStore
from .calls import Batch

#: First position in a directory: below are 0, the start, and what a mount may use for ``.`` and ``..``.
COOKIE_FIRST = 3
#: What one entry adds to the size of a directory, in bytes. Any constant would do; tools only look for 0.
ENTRY_SIZE = 32
#: Inode numbers are never used twice, so one generation is enough.
GENERATION = 1

#: The counter of an inode number in its 48 bits: the upper 8 are the daemon that made it (DAEMONS_MAX is 256).
MAKER_SHIFT = 40
#: Numbers that each start reserves, synced before it serves, and as many that it leaves out before them. A power cut
#: may take back what was reserved later, but not so much of it; a number given twice would find the chunks that its
#: first file left on other daemons. There is room for half a million starts.
RESERVE_START = 1 << 20
#: Numbers reserved by one write when those are used up.
RESERVE = 1024
#: The first counter; 1 is the root's.
COUNTER_FIRST = 2

_ROW = struct.Struct(">QQH")
_POSITION = struct.Struct(">QH")


class Inode(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Hold an inode as it is stored: the attributes in the order of ``Attrs``, then what only its daemon knows.

    ``entries``: names in this directory. ``next_cookie``: position of the next one. ``xattr_size``: bytes of the names
    of its extended attributes, each with a NUL, as listxattr(2) counts them. ``nlink`` of a directory is 2 and one
    more for each subdirectory, or 0 when it was removed. ``reach``: space may be allocated up to this byte of a file,
    also behind its size, until the file is cut.
    """

    ino: int
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    allocated: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    version: int
    chunk_size: int
    width: int
    parent: int
    entries: int = 0
    next_cookie: int = COOKIE_FIRST
    xattr_size: int = 0
    reach: int = 0

    @classmethod
    def of(cls, attrs: Attrs) -> "Inode":
        """Make an inode with these attributes that nothing belongs to yet."""
        return cls(*msgspec.structs.astuple(attrs)[:-1])

    @property
    def is_dir(self) -> bool:
        """Tell whether this is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Tell whether this is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def end(self) -> int:
        """Return how far the chunks of a file may reach."""
        return max(self.size, self.reach)

    def attrs(self) -> Attrs:
        """Return the attributes."""
        return Attrs(
            self.ino,
            self.generation,
            self.mode,
            self.nlink,
            self.uid,
            self.gid,
            self.rdev,
            self.size,
            self.allocated,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.version,
            self.chunk_size,
            self.width,
            self.parent,
            self.xattr_size > 0,
        )


class Row(NamedTuple):
    """Hold what a directory says about a name: inode number, kind (S_IFMT of the mode), position."""

    ino: int
    kind: int
    cookie: int


class Listed(NamedTuple):
    """Hold one name of a listing."""

    cookie: int
    name: bytes
    ino: int
    kind: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Inode).decode


class Inodes:
    """Read the records of one daemon, number new inodes, and open drafts. ``clock`` returns ns since the epoch."""

    def __init__(self, store: KeyValueStore, daemon_id: int, shard_map: ShardMap, clock: Callable[[], int]) -> None:
        self.store = store
        self.daemon_id = daemon_id
        self.shard_map = shard_map
        self.clock = clock
        self.daemons = tuple(sorted(set(shard_map.daemons)))
        reserved = store.get(disk.COUNTER)
        self._next = self._bound = COUNTER_FIRST if reserved is None else int.from_bytes(reserved, "big")

    def begin(self) -> None:
        """Reserve the numbers of a start. The store is to be synced before any of them is given."""
        self._next = self._bound = self._bound + RESERVE_START
        self._reserve(RESERVE_START)

    def draft(self) -> "Draft":
        """Begin a set of changes."""
        return Draft(self)

    def home(self, ino: int) -> int:
        """Return the daemon that holds an inode. Stale for what cannot be an inode number."""
        try:
            return self.shard_map.of_ino(ino)
        except ValueError as error:
            raise Stale(str(error)) from None

    def find(self, ino: int) -> Inode | None:
        """Return an inode, None if this daemon has no such inode."""
        record = self.store.get(disk.key(disk.INODE, ino))
        return None if record is None else _decode(record)

    def get(self, ino: int) -> Inode:
        """Return an inode. Stale when it has gone."""
        inode = self.find(ino)
        if inode is None:
            raise Stale(f"inode {ino} has gone")
        return inode

    def row(self, parent: int, name: bytes) -> Row | None:
        """Return what a name stands for, None if the directory has no such name."""
        record = self.store.get(disk.key_name(disk.ENTRY, parent, name))
        if record is None:
            return None
        ino, cookie, kind = _ROW.unpack(record)
        return Row(ino, kind, cookie)

    def listing(self, parent: int, cookie: int, count: int) -> list[Listed]:
        """Return up to ``count`` names behind position ``cookie``, in order of their positions."""
        start = disk.key2(disk.POSITION, parent, cookie + 1)
        found = []
        for key, value in self.store.scan(start, disk.after(disk.key(disk.POSITION, parent))):
            ino, kind = _POSITION.unpack_from(value)
            found.append(Listed(disk.numbers(key)[1], value[_POSITION.size :], ino, kind))
            if len(found) == count:
                break
        return found

    def allocate(self, shard: int) -> Ino:
        """Return a new inode number on a shard, this daemon's or another's. NoSpace when there is none left."""
        if self._next >= 1 << MAKER_SHIFT:
            raise NoSpace("this daemon has given all its inode numbers")
        if self._next == self._bound:
            self._reserve(RESERVE)
        counter = self.daemon_id << MAKER_SHIFT | self._next
        self._next += 1
        return make_ino(shard, counter)

    def _reserve(self, count: int) -> None:
        self.store.write([(disk.COUNTER, (self._bound + count).to_bytes(8, "big"))])
        self._bound += count


class Draft(Batch):
    """Collect the changes of one operation to inodes and entries; reads see them. Lives between two awaits, no longer.

    Every inode is decoded once, changed in place, and encoded when the draft is written.
    """

    def __init__(self, inodes: Inodes) -> None:
        super().__init__(inodes.store)
        self._inodes = inodes
        self._loaded: dict[int, Inode | None] = {}
        self._rows: dict[tuple[int, bytes], Row | None] = {}
        self._changed: dict[int, Inode] = {}
        self.now_ns = inodes.clock()

    def find(self, ino: int) -> Inode | None:
        """Return an inode as it will be, None if there is none. A removed one is still shown, with nlink 0."""
        if ino in self._loaded:
            return self._loaded[ino]
        inode = self._loaded[ino] = self._inodes.find(ino)
        return inode

    def inode(self, ino: int) -> Inode:
        """Return an inode as it will be. Stale when it has gone."""
        inode = self.find(ino)
        if inode is None:
            raise Stale(f"inode {ino} has gone")
        return inode

    def attrs(self, ino: int) -> Attrs | None:
        """Return the attributes of an inode as they will be, None if this daemon does not hold it."""
        inode = self.find(ino)
        return None if inode is None else inode.attrs()

    def stamp(self, inode: Inode, data: bool = False) -> None:
        """Note a change of an inode: ctime and version, and mtime if its ``data`` changed.

        ctime comes from the daemon's clock and never runs backwards, nor do two changes get the same.
        """
        inode.ctime_ns = max(self.now_ns, inode.ctime_ns + 1)
        if data:
            inode.mtime_ns = inode.ctime_ns
        inode.version += 1
        self.changed(inode)

    def changed(self, inode: Inode) -> None:
        """Note that an inode is to be written."""
        self._changed[inode.ino] = inode

    def add(self, inode: Inode) -> None:
        """Store a new inode."""
        self._loaded[inode.ino] = self._changed[inode.ino] = inode

    def remove(self, inode: Inode) -> None:
        """Remove an inode's record."""
        self._changed.pop(inode.ino, None)
        self.delete(disk.key(disk.INODE, inode.ino))

    def row(self, parent: int, name: bytes) -> Row | None:
        """Return what a name will stand for, None if there will be no such name."""
        place = (parent, name)
        if place in self._rows:
            return self._rows[place]
        row = self._rows[place] = self._inodes.row(parent, name)
        return row

    def put_row(self, parent: int, name: bytes, row: Row) -> None:
        """Set what a name stands for."""
        self._rows[parent, name] = row
        self.put(disk.key_name(disk.ENTRY, parent, name), _ROW.pack(row.ino, row.cookie, row.kind))
        self.put(disk.key2(disk.POSITION, parent, row.cookie), _POSITION.pack(row.ino, row.kind) + name)

    def drop_row(self, parent: int, name: bytes, row: Row) -> None:
        """Remove a name."""
        self._rows[parent, name] = None
        self.delete(disk.key_name(disk.ENTRY, parent, name))
        self.delete(disk.key2(disk.POSITION, parent, row.cookie))

    def write(self) -> None:
        """Apply everything in one transaction, then run ``after_write``. NoSpace, StorageError: nothing happened."""
        for ino, inode in self._changed.items():
            self.put(disk.key(disk.INODE, ino), _encode(inode))
        super().write()
