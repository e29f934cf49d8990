"""Compare what daemons hold: names with inodes, inodes with chunks. Pure; what was read, and when, is others' matter.

``Comparison`` is fed everything, inodes first, and says what does not fit together. Of a cluster at rest that is the
truth. Of one in use it is suspicion, as its parts were read one after the other: services/checking.py looks again.
"""

import enum
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from .layout import ShardMap
from .model import ROOT_INO

#: Most names of a path that are followed: more than PATH_MAX has room for.
_DEPTH_MAX = 4096


class Category(enum.StrEnum):
    """Tell what is lost from what is merely left."""

    #: Something that somebody made is not as it was, or cannot be reached.
    DAMAGED = "damaged"
    #: Something is there that belongs to nothing.
    ORPHANED = "orphaned"
    #: Space or records are taken that nothing counts.
    LEAKED = "leaked"


class Problem(enum.StrEnum):
    """Be everything that may be wrong, for people and programs."""

    NO_INODE = "name without an inode"
    NO_DIRECTORY = "name in a directory that is not there"
    KIND = "name of another kind than its inode"
    UNLISTED = "name that its directory does not list"
    MISPLACED = "held by the wrong daemon"
    LINKS = "wrong link count"
    ENTRIES = "wrong count of entries"
    PARENT = "directory that believes to be elsewhere"
    SEVERAL = "directory with several names"
    UNREACHABLE = "directory without a name, with entries"
    CIRCLE = "directories that contain each other"
    NO_TARGET = "symbolic link without a target"
    CHUNK_FILE = "damaged chunk file"
    LOST = "chunks are missing"
    LOST_RECORD = "chunk file whose record is lost"
    UNREADABLE = "damaged record"
    NAMELESS = "inode without a name"
    CHUNKS = "chunks without an inode"
    STRAY_FILE = "chunk file without a record"
    UNUSED = "removed inode that nobody has open"
    SPACE = "space that its file does not count"
    RECORD = "record without an owner"

    @property
    def category(self) -> Category:
        """Say what kind of problem this is."""
        return _CATEGORIES.get(self, Category.DAMAGED)


_CATEGORIES = {
    Problem.NAMELESS: Category.ORPHANED,
    Problem.CHUNKS: Category.ORPHANED,
    Problem.STRAY_FILE: Category.ORPHANED,
    Problem.UNUSED: Category.LEAKED,
    Problem.SPACE: Category.LEAKED,
    Problem.RECORD: Category.LEAKED,
}


class InodeFacts(NamedTuple):
    """Hold of an inode what can be compared. ``end``: how far its chunks may reach. See services/inodes.py."""

    daemon: int
    ino: int
    mode: int
    nlink: int
    end: int
    allocated: int
    chunk_size: int
    width: int
    parent: int
    entries: int
    version: int

    @property
    def is_dir(self) -> bool:
        """Tell whether this is a directory."""
        return stat.S_ISDIR(self.mode)


class NameFacts(NamedTuple):
    """Hold one name of a directory."""

    daemon: int
    parent: int
    name: bytes
    ino: int
    kind: int


class ChunkFacts(NamedTuple):
    """Hold one record of a chunk table, and what is wrong with the chunk's file, if anything."""

    daemon: int
    ino: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    length: int
    allocated: int
    trouble: str


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Be one thing that is wrong. ``daemon`` holds it; ``what`` says more than ``problem``.

    ``index`` is a chunk's, -1 elsewhere. ``parent`` and ``name`` are set where a name is concerned. ``size``: bytes
    that are lost or taken. ``version``: the inode's as it was compared. ``file``: a chunk file, below ``chunks``.
    """

    problem: Problem
    daemon: int
    ino: int
    index: int = -1
    parent: int = 0
    name: bytes = b""
    what: str = ""
    size: int = 0
    version: int = 0
    file: str = ""


def link_findings(inode: InodeFacts, names: Sequence[NameFacts]) -> Iterator[Finding]:
    """Compare an inode with all names that stand for it."""

    def found(problem: Problem, what: str) -> Finding:
        return Finding(
            problem=problem,
            daemon=inode.daemon,
            ino=inode.ino,
            what=what,
            version=inode.version,
            size=inode.allocated if problem is Problem.NAMELESS else 0,
        )

    if inode.is_dir:
        wanted = inode.ino != ROOT_INO
        if not names and wanted:
            if not inode.nlink:
                yield found(Problem.UNUSED, "a directory that was removed")
            elif inode.entries:
                yield found(Problem.UNREACHABLE, f"{inode.entries} entries cannot be reached")
            else:
                yield found(Problem.NAMELESS, "an empty directory")
        elif len(names) > wanted:
            yield found(Problem.SEVERAL, f"{len(names)} names: {', '.join(map(_place, names))}")
        elif names and inode.parent != names[0].parent:
            yield found(Problem.PARENT, f"named by {_place(names[0])}, believes to be in directory {inode.parent}")
        if names and not inode.nlink:
            yield found(Problem.LINKS, "it has a name and counts as removed")
    elif not names:
        if inode.nlink:
            yield found(Problem.NAMELESS, f"link count {inode.nlink}, {inode.end} bytes long")
        else:
            yield found(Problem.UNUSED, f"{inode.end} bytes long")
    elif inode.nlink != len(names):
        yield found(Problem.LINKS, f"{len(names)} names, link count {inode.nlink}")


def entry_findings(inode: InodeFacts, entries: int, subdirectories: int) -> Iterator[Finding]:
    """Compare a directory with how many names it has, and how many of them are directories'."""
    wrong = []
    if inode.entries != entries:
        wrong.append(f"{entries} entries, counts {inode.entries}")
    if inode.nlink and inode.nlink != 2 + subdirectories:
        wrong.append(f"{subdirectories} subdirectories, link count {inode.nlink}")
    if wrong:
        yield Finding(problem=Problem.ENTRIES, daemon=inode.daemon, ino=inode.ino, what="; ".join(wrong))


def space_findings(daemon: int, ino: int, allocated: int, held: int, beyond: int) -> Iterator[Finding]:
    """Compare the bytes that a file counts with those that its chunks have, ``beyond`` chunks reach behind its end."""
    if allocated > held:
        what = f"it counts {allocated} bytes, its chunks have {held}"
        yield Finding(problem=Problem.LOST, daemon=daemon, ino=ino, what=what, size=allocated - held)
    elif held > allocated or beyond:
        what = f"it counts {allocated} bytes, its chunks have {held}, {beyond} of them reach behind its end"
        yield Finding(problem=Problem.SPACE, daemon=daemon, ino=ino, what=what, size=held - allocated)


def circles(parents: Mapping[int, int]) -> Iterator[tuple[int, ...]]:
    """Yield each circle of directories, given the parent of each; the root's is not asked for."""
    done: set[int] = {ROOT_INO}
    for start in parents:
        chain: dict[int, None] = {}
        ino = start
        while ino not in done and ino not in chain and ino in parents:
            chain[ino] = None
            ino = parents[ino]
        if ino in chain:
            members = list(chain)
            yield tuple(members[members.index(ino) :])
        done.update(chain)


def home_of(shard_map: ShardMap, ino: int) -> int:
    """Return the daemon that should hold an inode, -1 for what cannot be an inode's number."""
    try:
        return shard_map.of_ino(ino)
    except ValueError:
        return -1


class _Space:
    """Sum up the chunks of one file."""

    __slots__ = ("beyond", "held")

    def __init__(self) -> None:
        self.held = 0
        self.beyond = 0


class Comparison:
    """Take in what the daemons hold, inodes before chunks; say what does not fit."""

    def __init__(self, shard_map: ShardMap) -> None:
        self._shard_map = shard_map
        self.inodes: dict[int, InodeFacts] = {}
        self.names: defaultdict[int, list[NameFacts]] = defaultdict(list)
        self.name_count = self.chunk_count = self.chunk_bytes = 0
        self._entries: Counter[int] = Counter()
        self._subdirectories: Counter[int] = Counter()
        self._space: defaultdict[int, _Space] = defaultdict(_Space)
        #: (daemon, ino) → chunks, bytes.
        self._without_inode: defaultdict[tuple[int, int], Counter[str]] = defaultdict(Counter)
        self._found: list[Finding] = []

    def add_inode(self, inode: InodeFacts) -> None:
        """Take in an inode."""
        self.inodes[inode.ino] = inode
        if home_of(self._shard_map, inode.ino) != inode.daemon:
            self._found.append(Finding(problem=Problem.MISPLACED, daemon=inode.daemon, ino=inode.ino, what="an inode"))

    def add_name(self, name: NameFacts) -> None:
        """Take in a name."""
        self.name_count += 1
        self.names[name.ino].append(name)
        self._entries[name.parent] += 1
        self._subdirectories[name.parent] += stat.S_ISDIR(name.kind)
        if home_of(self._shard_map, name.parent) != name.daemon:
            self._found.append(_of_name(Problem.MISPLACED, name, "a name"))

    def add_chunk(self, chunk: ChunkFacts) -> None:
        """Take in a record of a chunk table."""
        self.chunk_count += 1
        self.chunk_bytes += chunk.allocated
        inode = self.inodes.get(chunk.ino)
        if inode is None:
            self._without_inode[chunk.daemon, chunk.ino].update(chunks=1, bytes=chunk.allocated)
            return
        space = self._space[chunk.ino]
        space.held += chunk.allocated
        space.beyond += chunk.index * inode.chunk_size + chunk.length > inode.end
        if self._shard_map.of_chunk(chunk.ino, chunk.index, inode.width) != chunk.daemon:
            self._found.append(_of_chunk(Problem.MISPLACED, chunk, "a chunk"))
        if chunk.trouble:
            self._found.append(_of_chunk(Problem.CHUNK_FILE, chunk, chunk.trouble))

    def findings(self) -> Iterator[Finding]:
        """Say everything that does not fit together."""
        yield from self._found
        for names in self.names.values():
            yield from self._without_an_inode(names)
        for inode in self.inodes.values():
            yield from link_findings(inode, self.names.get(inode.ino, ()))
            if inode.is_dir:
                entries, subdirectories = self._entries[inode.ino], self._subdirectories[inode.ino]
                yield from entry_findings(inode, entries, subdirectories)
            space = self._space.get(inode.ino)
            held, beyond = (space.held, space.beyond) if space is not None else (0, 0)
            yield from space_findings(inode.daemon, inode.ino, inode.allocated, held, beyond)
        for circle in circles({inode.ino: inode.parent for inode in self.inodes.values() if inode.is_dir}):
            yield circle_finding(self.inodes, circle)
        for (daemon, ino), sums in self._without_inode.items():
            yield Finding(
                problem=Problem.CHUNKS, daemon=daemon, ino=ino, what=f"{sums['chunks']} chunks", size=sums["bytes"]
            )

    def _without_an_inode(self, names: Iterable[NameFacts]) -> Iterator[Finding]:
        for name in names:
            inode = self.inodes.get(name.ino)
            if inode is None:
                yield _of_name(Problem.NO_INODE, name, f"it names inode {name.ino}")
            elif stat.S_IFMT(inode.mode) != name.kind:
                yield _of_name(Problem.KIND, name, f"it says {name.kind:o}, inode {name.ino} has mode {inode.mode:o}")
            if name.parent not in self.inodes:
                yield _of_name(Problem.NO_DIRECTORY, name, f"directory {name.parent}")

    def path_of(self, ino: int) -> str:
        """Return a path to an inode, escaped where it cannot be printed; nothing if no name leads there."""
        parts: list[str] = []
        while ino != ROOT_INO and len(parts) < _DEPTH_MAX:
            names = self.names.get(ino)
            if not names:
                return ""
            parts.append(printable(names[0].name))
            ino = names[0].parent
        return "/" + "/".join(reversed(parts)) if ino == ROOT_INO else ""

    def path_to(self, finding: Finding) -> str:
        """Return the path of what a finding is about; nothing if it has none."""
        if not finding.name:
            return self.path_of(finding.ino)
        above = self.path_of(finding.parent)
        return f"{above.rstrip('/')}/{printable(finding.name)}" if above else ""


def circle_finding(inodes: Mapping[int, InodeFacts], circle: Sequence[int]) -> Finding:
    """Say that directories contain each other."""
    first = min(circle)
    at = circle.index(first)
    return Finding(
        problem=Problem.CIRCLE,
        daemon=inodes[first].daemon,
        ino=first,
        what="inodes " + ", ".join(map(str, (*circle[at:], *circle[:at]))),
    )


def _of_name(problem: Problem, name: NameFacts, what: str) -> Finding:
    return Finding(problem=problem, daemon=name.daemon, ino=name.ino, parent=name.parent, name=name.name, what=what)


def _of_chunk(problem: Problem, chunk: ChunkFacts, what: str) -> Finding:
    size = chunk.allocated if problem is Problem.CHUNK_FILE else 0
    return Finding(problem=problem, daemon=chunk.daemon, ino=chunk.ino, index=chunk.index, what=what, size=size)


def _place(name: NameFacts) -> str:
    return f"{printable(name.name)!r} in directory {name.parent}"


def printable(name: bytes) -> str:
    """Return a name as text that any terminal takes."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
