"""Model a disk that loses power: what programs see now, and what a cut may leave of it. Pure.

What is *durable* is exactly what was asked for, as weak as POSIX allows and weaker than any real file system:

- fsync(2) of a file makes its bytes, its size and its attributes durable, fdatasync(2) bytes and size. Not its name.
- fsync(2) of a directory makes the changes of its entries durable. Not the directory's own name, nor what the entries
  stand for: a name may survive and its file be empty.

Everything else is kept or dropped at the cut, each piece for itself, in any combination:

- a page is what it was when it was synced, what it is now, something in between, or a mixture of two of these in
  sectors of 512 bytes; a file may have its new size and zeros for its new bytes;
- each change of a directory is there or not; a later one may be there without an earlier one. A rename leaves the old
  name, the new one, or both (of a directory: not both), never neither.

A cut keeps nothing that was not synced, or a random choice, or everything up to some moment.
"""

import enum
import errno
import os
import random
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

PAGE = 4096
#: What a disk writes as a whole.
SECTOR = 512
#: Versions of one page that are remembered, the synced and the newest included; a log rewrites its last page for each
#: record. Where some are forgotten, a lost tail may take a little more of that page.
VERSIONS_MAX = 16
#: Number of the root directory.
ROOT = 1

_ZEROS = bytes(PAGE)

T = TypeVar("T")


class Loss(enum.StrEnum):
    """Say what a cut keeps of what was not synced."""

    ALL = "all"
    RANDOM = "random"
    #: What came after some moment is lost, what came before it is kept.
    TAIL = "tail"


class Refused(Exception):
    """Say why a call fails: ``number`` is the errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Version(NamedTuple, Generic[T]):
    """Hold what something was from moment ``since`` on."""

    since: int
    value: T


class _History(Generic[T]):
    """Hold the versions of something since it was synced: the synced one first, the newest last."""

    __slots__ = ("versions",)

    def __init__(self, value: T, since: int = 0) -> None:
        self.versions = [Version(since, value)]

    @property
    def now(self) -> T:
        return self.versions[-1].value

    def change(self, moment: int, value: T) -> None:
        self.versions.append(Version(moment, value))
        if len(self.versions) > VERSIONS_MAX:
            del self.versions[VERSIONS_MAX // 2]

    def sync(self) -> None:
        del self.versions[:-1]


class _Cut:
    """Choose among versions."""

    def __init__(self, loss: Loss, chance: random.Random, moment: int) -> None:
        self._loss = loss
        self._random = chance
        self._moment = moment
        self._bias = 0.0

    def begin(self) -> None:
        """Begin with another file: of some all is kept, of some nothing."""
        self._bias = self._random.choice([0.0, 0.25, 0.5, 0.9, 1.0])

    def kept(self, moment: int) -> bool:
        """Tell whether a change of that moment is kept."""
        if self._loss is Loss.RANDOM:
            return self._random.random() < self._bias
        return self._loss is Loss.TAIL and moment <= self._moment

    def choose(self, history: _History[T]) -> T:
        """Choose one version of several."""
        versions = history.versions
        if self._loss is not Loss.RANDOM:
            return [version.value for version in versions if version is versions[0] or self.kept(version.since)][-1]
        if self._random.random() < self._bias:
            return versions[-1].value
        return versions[self._random.choice([0, self._random.randrange(len(versions))])].value

    def choose_page(self, history: _History[bytes]) -> bytes:
        """Choose a version of a page, or a torn one."""
        page = self.choose(history)
        if self._loss is Loss.RANDOM and len(history.versions) > 1 and self._random.random() < 0.25:
            other = self.choose(history)
            parts = (self._random.choice((page, other))[at : at + SECTOR] for at in range(0, PAGE, SECTOR))
            page = b"".join(parts)
        return page


class File:
    """Be a file: pages, a size, and attributes. What does not change between syncs has no history."""

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.pages: dict[int, bytes] = {}
        self._changed: dict[int, _History[bytes]] = {}
        self._size = _History(0)
        self._xattrs: _History[dict[str, bytes]] = _History({})

    @property
    def size(self) -> int:
        """Return the size."""
        return self._size.now

    @property
    def xattrs(self) -> dict[str, bytes]:
        """Return the extended attributes; not to be changed."""
        return self._xattrs.now

    @property
    def unsynced(self) -> int:
        """Count the pages that are not as they were when they were synced."""
        return len(self._changed)

    def set_xattrs(self, moment: int, xattrs: dict[str, bytes]) -> None:
        """Replace the extended attributes."""
        self._xattrs.change(moment, xattrs)

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on."""
        end = min(offset + length, self.size)
        pieces = []
        while offset < end:
            index, at = divmod(offset, PAGE)
            count = min(PAGE - at, end - offset)
            pieces.append(self.pages.get(index, _ZEROS)[at : at + count])
            offset += count
        return b"".join(pieces)

    def write(self, moment: int, offset: int, data: bytes) -> None:
        """Write all of ``data``."""
        end = offset + len(data)
        done = 0
        while done < len(data):
            index, at = divmod(offset + done, PAGE)
            piece = data[done : done + PAGE - at]
            old = self.pages.get(index, _ZEROS)
            self._put(moment, index, old[:at] + piece + old[at + len(piece) :])
            done += len(piece)
        if end > self.size:
            self._size.change(moment, end)

    def resize(self, moment: int, size: int) -> None:
        """Cut or extend."""
        if size < self.size:
            self.zero(moment, size, self.size)
        if size != self.size:
            self._size.change(moment, size)

    def zero(self, moment: int, offset: int, end: int) -> None:
        """Make a range zeros, as far as there is anything; the size stays."""
        end = max(offset, min(end, self.size))
        first, last = offset // PAGE, -(-end // PAGE)
        for index in [index for index in self.pages if first <= index < last]:
            start, stop = max(0, offset - index * PAGE), min(PAGE, end - index * PAGE)
            old = self.pages[index]
            self._put(moment, index, old[:start] + bytes(stop - start) + old[stop:])

    def _put(self, moment: int, index: int, page: bytes) -> None:
        history = self._changed.get(index)
        if history is None:
            history = self._changed[index] = _History(self.pages.get(index, _ZEROS))
        history.change(moment, page)
        if page == _ZEROS:
            self.pages.pop(index, None)
        else:
            self.pages[index] = page

    def sync(self, data_only: bool) -> None:
        """Make durable what there is now."""
        self._changed.clear()
        self._size.sync()
        if not data_only:
            self._xattrs.sync()

    def left(self, cut: _Cut) -> "File":
        """Return what a cut leaves."""
        cut.begin()
        found = File(self.mode)
        size = cut.choose(self._size)
        pages = dict(self.pages)
        for index, history in self._changed.items():
            pages[index] = cut.choose_page(history)
        for index, page in pages.items():
            page = page[: max(0, size - index * PAGE)].ljust(PAGE, b"\0")
            if page != _ZEROS:
                found.pages[index] = page
        found._size = _History(size)
        found._xattrs = _History(cut.choose(self._xattrs))
        return found


class Directory:
    """Be a directory: its entries now, and those that are durable."""

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.entries: dict[bytes, int] = {}
        self.durable: dict[bytes, int] = {}
        self.xattrs: dict[str, bytes] = {}


class _Change:
    """Be one unsynced change of an entry: to ``ino``, or away from it if ``gone``.

    ``needs``: the other half of a rename. The old name goes only if the new one is there.
    """

    __slots__ = ("gone", "ino", "kept", "moment", "name", "needs", "parent")

    def __init__(
        self, moment: int, parent: int, name: bytes, ino: int, gone: bool = False, needs: "_Change | None" = None
    ) -> None:
        self.moment = moment
        self.parent = parent
        self.name = name
        self.ino = ino
        self.gone = gone
        self.needs = needs
        #: It is durable, or something later that is has taken its place.
        self.kept = False

    def apply(self, entries: dict[bytes, int]) -> None:
        """Make the change, as far as there is anything to change."""
        self.kept = True
        if not self.gone:
            entries[self.name] = self.ino
        elif entries.get(self.name) == self.ino:
            del entries[self.name]


def _attached(entries: dict[int, dict[bytes, int]]) -> set[int]:
    """Return the directories that have a path."""
    found, todo = {ROOT}, [ROOT]
    while todo:
        for ino in entries[todo.pop()].values():
            if ino in entries and ino not in found:
                found.add(ino)
                todo.append(ino)
    return found


class Unsynced(NamedTuple):
    """Count what a cut may take: pages of files, and changes of directories."""

    pages: int
    names: int


class Disk:
    """Be the whole disk. Inode numbers are never used twice, nor by what is left after a cut. Raises Refused."""

    def __init__(self, first_ino: int = ROOT + 1) -> None:
        self.nodes: dict[int, File | Directory] = {ROOT: Directory(0o755)}
        self.next_ino = first_ino
        self._moment = 0
        self._pending: list[_Change] = []

    def unsynced(self) -> Unsynced:
        """Count what a cut may take."""
        pages = sum(node.unsynced for node in self.nodes.values() if isinstance(node, File))
        return Unsynced(pages, len(self._pending))

    # ── what programs do ─────────────────────────────────────────────────────────────────────────────────────────────

    def file(self, ino: int) -> File:
        """Return a file."""
        node = self.nodes[ino]
        if isinstance(node, Directory):
            raise Refused(errno.EISDIR)
        return node

    def directory(self, ino: int) -> Directory:
        """Return a directory."""
        node = self.nodes[ino]
        if isinstance(node, File):
            raise Refused(errno.ENOTDIR)
        return node

    def find(self, parent: int, name: bytes) -> int:
        """Return what a name stands for."""
        ino = self.directory(parent).entries.get(name)
        if ino is None:
            raise Refused(errno.ENOENT)
        return ino

    def tick(self) -> int:
        """Return the next moment: every change has its own."""
        self._moment += 1
        return self._moment

    def make(self, parent: int, name: bytes, mode: int, *, directory: bool = False) -> int:
        """Make a file or a directory; return its number."""
        self._check_free(parent, name)
        ino = self.next_ino
        self.next_ino += 1
        self.nodes[ino] = Directory(mode) if directory else File(mode)
        self._change(_Change(self.tick(), parent, name, ino))
        return ino

    def link(self, ino: int, parent: int, name: bytes) -> None:
        """Give a file another name."""
        self.file(ino)
        self._check_free(parent, name)
        self._change(_Change(self.tick(), parent, name, ino))

    def _check_free(self, parent: int, name: bytes) -> None:
        if name in self.directory(parent).entries:
            raise Refused(errno.EEXIST)

    def remove(self, parent: int, name: bytes, *, directory: bool = False) -> None:
        """Remove a name: of an empty directory, or of anything else."""
        ino = self.find(parent, name)
        node = self.nodes[ino]
        if isinstance(node, Directory) != directory:
            raise Refused(errno.ENOTDIR if directory else errno.EISDIR)
        if isinstance(node, Directory) and node.entries:
            raise Refused(errno.ENOTEMPTY)
        self._change(_Change(self.tick(), parent, name, ino, gone=True))

    def rename(self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes) -> None:
        """Move a name, over another if there is one."""
        ino = self.find(old_parent, old_name)
        there = self.directory(new_parent).entries.get(new_name)
        if there == ino:
            return
        if there is not None:
            replaced = self.nodes[there]
            if isinstance(replaced, Directory) != isinstance(self.nodes[ino], Directory):
                raise Refused(errno.EISDIR if isinstance(replaced, Directory) else errno.ENOTDIR)
            if isinstance(replaced, Directory) and replaced.entries:
                raise Refused(errno.ENOTEMPTY)
        moment = self.tick()
        new = _Change(moment, new_parent, new_name, ino)
        self._change(new)
        self._change(_Change(moment, old_parent, old_name, ino, gone=True, needs=new))

    def _change(self, change: _Change) -> None:
        entries = self.directory(change.parent).entries
        if change.gone:
            del entries[change.name]
        else:
            entries[change.name] = change.ino
        self._pending.append(change)

    def sync_directory(self, ino: int) -> None:
        """Make the entries of a directory durable; of what was moved out of it, also the new names."""
        for change in self._pending:
            if change.parent == ino and not change.kept:
                if change.needs is not None:
                    self._make_durable(change.needs)
                self._make_durable(change)
        self._pending = [change for change in self._pending if not change.kept]

    def _make_durable(self, change: _Change) -> None:
        if change.kept:
            return
        change.apply(self.directory(change.parent).durable)
        if change.needs is not None:  # the directory into which it went has to be there
            self._make_name_durable(change.needs.parent)
        for earlier in self._pending:
            if earlier is change:
                break
            if (earlier.parent, earlier.name) == (change.parent, change.name):
                earlier.kept = True

    def _make_name_durable(self, ino: int) -> None:
        for change in self._pending:
            if change.ino == ino and not change.gone and not change.kept:
                self._make_durable(change)
                self._make_name_durable(change.parent)

    # ── the cut ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def left(self, loss: Loss, seed: int) -> "Disk":
        """Return what a cut leaves; this disk is not to be used any more."""
        chance = random.Random(seed)
        cut = _Cut(loss, chance, chance.randint(0, self._moment))
        entries = {ino: dict(node.durable) for ino, node in self.nodes.items() if isinstance(node, Directory)}
        self._choose_names(cut, entries)
        found = Disk(self.next_ino)
        self._copy(ROOT, ROOT, entries, found, {ROOT: ROOT}, cut)
        return found

    def _choose_names(self, cut: _Cut, entries: dict[int, dict[bytes, int]]) -> None:
        """Apply some of the pending changes to the durable entries, such that every rename leaves a name."""
        cut.begin()
        renames = {id(change.needs) for change in self._pending}
        moved = True  # of renames of directories, all before one that is lost are kept, so that none is below itself
        for change in self._pending:
            is_directory = isinstance(self.nodes[change.ino], Directory)
            here = entries[change.parent]
            if change.needs is not None:
                kept = change.needs.kept and (is_directory or cut.kept(change.moment))
                kept = kept and change.needs.parent in _attached(entries)
            else:
                kept = cut.kept(change.moment)
                if is_directory and id(change) in renames:
                    kept = moved = moved and kept and change.parent in _attached(entries)
                # What would be removed or replaced here may hold what was not moved out of it.
                kept = kept and not entries.get(here.get(change.name, 0))
            if kept:
                change.apply(here)

    def _copy(
        self,
        ino: int,
        new_ino: int,
        entries: dict[int, dict[bytes, int]],
        found: "Disk",
        numbers: dict[int, int],
        cut: _Cut,
    ) -> None:
        """Copy a directory and what is below it."""
        old = self.directory(ino)
        new = found.nodes[new_ino] = Directory(old.mode)
        new.xattrs = old.xattrs
        for name, child in sorted(entries[ino].items()):
            if child not in numbers:
                numbers[child] = found.next_ino
                found.next_ino += 1
                node = self.nodes[child]
                if isinstance(node, Directory):
                    self._copy(child, numbers[child], entries, found, numbers, cut)
                else:
                    found.nodes[numbers[child]] = node.left(cut)
            new.entries[name] = new.durable[name] = numbers[child]

    def walk(self, ino: int = ROOT, path: bytes = b"") -> Iterator[tuple[bytes, int]]:
        """Yield path and number of everything below a directory."""
        for name, child in self.directory(ino).entries.items():
            yield path + b"/" + name, child
            if isinstance(self.nodes[child], Directory):
                yield from self.walk(child, path + b"/" + name)
