"""Remember what one worker did to its tree, and at which level each of it was acknowledged; tell what may not be.

Nobody but its worker changes a tree, so its every state is known, as far as it was acknowledged. Names and attributes
are flushed when their call returns. Bytes are *accepted* when ``write`` returns, *flushed* when ``close`` or ``fsync``
returns. While the mount lives all of it holds. When the mount was killed, what was only accepted may be lost, write by
write and in parts; what was begun and not answered may have been done or not, names as a whole.
"""

import random
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

#: What a worker says of one operation: its kind, then its arguments (``Tree.apply``).
Words = Sequence[Any]

#: Differences that a complaint names.
NAMED_MAX = 5
#: Operations that change names.
NAME_KINDS = ("create", "mkdir", "rmdir", "link", "unlink", "rename")
#: Operations that change when a file was modified, to what nobody knows.
DATA_KINDS = ("write", "write_synced", "append", "truncate", "punch")
#: The extended attribute that workers set.
MARK = "user.torture"


def content(number: int, length: int) -> bytes:
    """Return the bytes that a number stands for."""
    return random.Random(number).randbytes(length)


class Entry(NamedTuple):
    """Be one name that is there. ``path`` is relative to where was looked; of a directory ``data`` is empty."""

    path: str
    ino: int
    mode: int
    links: int
    size: int
    data: bytes
    #: When a file was modified, ns; and what its ``MARK`` says, empty: it has none.
    mtime_ns: int = 0
    mark: str = ""

    @property
    def is_directory(self) -> bool:
        """Tell whether it is a directory."""
        return stat.S_ISDIR(self.mode)


class File:
    """Be one file: its bytes as its worker sees them (``now``), and as they are whatever is lost (``flushed``)."""

    def __init__(self, mode: int) -> None:
        #: Permission bits; more than one if the last change of them was not answered.
        self.modes = {mode}
        #: What ``MARK`` may say, likewise.
        self.marks = {""}
        #: When it may have been modified, ns; None if that was not set since.
        self.mtimes: set[int] | None = None
        self.now = bytearray()
        self.flushed = bytearray()
        #: Offset and bytes of each write since that may be lost.
        self.pending: list[tuple[int, bytes]] = []
        #: Sizes that it may have beside those that ``flushed`` and ``pending`` give.
        self.sizes: set[int] = set()
        #: 0 until somebody has looked.
        self.ino = 0

    @staticmethod
    def _put(buffer: bytearray, offset: int, data: bytes) -> None:
        buffer.extend(bytes(max(0, offset + len(data) - len(buffer))))
        buffer[offset : offset + len(data)] = data

    def write(self, offset: int, data: bytes) -> None:
        """Accept a write."""
        self._put(self.now, offset, data)
        self.pending.append((offset, data))

    def write_through(self, offset: int, data: bytes) -> None:
        """Take a write that is flushed by itself, whatever was accepted before."""
        self._put(self.now, offset, data)
        self._put(self.flushed, offset, data)
        self._forget(offset, offset + len(data))

    def flush(self) -> None:
        """Note that everything is flushed."""
        self.flushed[:] = self.now
        self.pending.clear()
        self.sizes.clear()

    def truncate(self, size: int) -> None:
        """Cut or extend."""
        for buffer in (self.now, self.flushed):
            del buffer[size:]
            buffer.extend(bytes(size - len(buffer)))
        self._forget(size, None)

    def punch(self, offset: int, length: int) -> None:
        """Make a hole, as far as the file reaches."""
        for buffer in (self.now, self.flushed):
            end = min(offset + length, len(buffer))
            if offset < end:
                buffer[offset:end] = bytes(end - offset)
        # Where a write ended may still become the size.
        pending, self.pending = self.pending, []
        for start, data in pending:
            one, other = max(0, offset - start), max(0, offset + length - start)
            self.pending.append((start, data[:one] + bytes(len(data[one:other])) + data[other:]))

    def _forget(self, start: int, end: int | None) -> None:
        """Let what is pending between two offsets be nobody's business any more."""
        kept = []
        for offset, data in self.pending:
            if before := data[: max(0, start - offset)]:
                kept.append((offset, before))
            if end is not None and (after := data[max(0, end - offset) :]):
                kept.append((max(offset, end), after))
        self.pending = kept

    def doubt(self, words: Words) -> None:
        """Take what was begun and not answered: it may have been done, or not."""
        if words[0] in DATA_KINDS:
            self.mtimes = None
        match words:
            case ["write" | "write_synced", _, offset, number, length, *_]:
                self.pending.append((offset, content(number, length)))
            case ["append", _, number, length]:
                self.pending.append((len(self.now), content(number, length)))
            case ["truncate", _, size]:
                self.sizes.add(size)
            case ["punch", _, offset, length]:
                self.pending.append((offset, bytes(max(0, min(offset + length, len(self.now)) - offset))))

    def _may_have(self, size: int) -> bool:
        if size == len(self.flushed) or size in self.sizes:
            return True
        return any(max(offset, len(self.flushed)) < size <= offset + len(data) for offset, data in self.pending)

    def complaint(self, found: bytes) -> str:
        """Say what is wrong with the bytes that are there; empty: nothing."""
        if found == self.flushed:
            return ""
        if not self._may_have(len(found)):
            return f"has {len(found)} bytes; {len(self.flushed)} are flushed, {len(self.now)} accepted"
        right = bytearray(self.flushed[: len(found)].ljust(len(found), b"\0"))
        for offset, data in self.pending:
            end = min(offset + len(data), len(found))
            if found[offset:end] == data[: max(0, end - offset)]:
                right[offset:end] = found[offset:end]
        if found == right:
            return ""
        for at, (there, wanted) in enumerate(zip(found, right, strict=True)):
            if there != wanted and not any(
                offset <= at < offset + len(data) and data[at - offset] == there for offset, data in self.pending
            ):
                flushed = self.flushed[at] if at < len(self.flushed) else 0
                unsure = sum(offset <= at < offset + len(data) for offset, data in self.pending)
                return f"has {there} at {at} of {len(found)}, flushed is {flushed}, {unsure} writes there may be lost"
        return ""

    def adopt(self, found: bytes) -> None:
        """Take what is there as what is: it was found right."""
        self.now[:] = found
        self.flush()


class Names:
    """Be the shape of a tree: the files' numbers by path, and the directories' permission bits by path, "" the top."""

    def __init__(self, files: Mapping[str, int], directories: Mapping[str, int]) -> None:
        self.files = dict(files)
        self.directories = dict(directories)

    def copy(self) -> "Names":
        """Return another one of the same shape."""
        return Names(self.files, self.directories)

    def apply(self, words: Words) -> None:
        """Change a name."""
        match words:
            case ["create", path, number, _]:
                self.files[path] = number
            case ["link", old, new]:
                self.files[new] = self.files[old]
            case ["unlink", path]:
                del self.files[path]
            case ["mkdir", path, mode]:
                self.directories[path] = mode
            case ["rmdir", path]:
                del self.directories[path]
            case ["rename", old, new] if old in self.files:
                self.files[new] = self.files.pop(old)
            case ["rename", old, new]:
                self.files = {_moved(path, old, new): number for path, number in self.files.items()}
                self.directories = {_moved(path, old, new): mode for path, mode in self.directories.items()}

    def fits(self, found: Iterable[Entry]) -> bool:
        """Tell whether these are the names that are there."""
        return self._kinds() == {entry.path: entry.is_directory for entry in found}

    def _kinds(self) -> dict[str, bool]:
        return dict.fromkeys(self.files, False) | dict.fromkeys(self.directories, True)

    def difference(self, found: Iterable[Entry]) -> str:
        """Say how the names that are there differ."""
        there = {(entry.path, entry.is_directory) for entry in found}
        wanted = set(self._kinds().items())
        parts = []
        for title, some in (("missing", wanted - there), ("not to be there", there - wanted)):
            if some:
                names = [path + "/" * is_directory for path, is_directory in sorted(some)]
                parts.append(f"{title}: {', '.join(names[:NAMED_MAX])}{' …' if len(names) > NAMED_MAX else ''}")
        return "; ".join(parts)

    def children(self, directory: str) -> set[str]:
        """Return the names in a directory."""
        start = f"{directory}/" if directory else ""
        return {
            path[len(start) :]
            for path in (*self.files, *self.directories)
            if path and path.startswith(start) and "/" not in path[len(start) :]
        }


def _moved(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if f"{path}/".startswith(f"{old}/") else path


class Tree:
    """Be one worker's tree. The worker has one of its own, by which it works, and whoever listens to it another."""

    def __init__(self) -> None:
        self.names = Names({}, {"": 0o755})
        self.files: dict[int, File] = {}
        #: Files that the worker holds open, with a name or without.
        self.held: set[int] = set()
        #: Numbers given to names, files and records so far: none comes again.
        self.serial = 0
        #: The shared name that its worker wanted last.
        self.claim = 0

    def number_of(self, path: str) -> int:
        """Return the number of a file."""
        return self.names.files[path]

    def links(self, number: int) -> int:
        """Count the names of a file."""
        return sum(one == number for one in self.names.files.values())

    def apply(self, words: Words) -> None:
        """Take what was acknowledged. Kinds that change nothing may come too."""
        kind = words[0]
        self._count(words)
        if kind in NAME_KINDS:
            self.names.apply(words)
        if kind in DATA_KINDS:
            self.files[words[1]].mtimes = None
        match words:
            case ["create", _, number, mode]:
                self.files[number] = File(mode)
                self.held.add(number)
            case ["write", number, offset, seed, length, closes]:
                self.files[number].write(offset, content(seed, length))
                if closes:
                    self.files[number].flush()
            case ["write_synced", number, offset, seed, length]:
                self.files[number].write_through(offset, content(seed, length))
            case ["append", number, seed, length]:
                self.files[number].write(len(self.files[number].now), content(seed, length))
                self.files[number].flush()
            case ["truncate", number, size]:
                self.files[number].truncate(size)
            case ["punch", number, offset, length]:
                self.files[number].punch(offset, length)
            case ["fsync", number]:
                self.files[number].flush()
            case ["open", number]:
                self.held.add(number)
            case ["close", number]:
                self.files[number].flush()
                self.held.discard(number)
            case ["chmod", path, mode] if path in self.names.directories:
                self.names.directories[path] = mode
            case ["chmod", path, mode]:
                self.files[self.number_of(path)].modes = {mode}
            case ["setxattr", path, mark]:
                self.files[self.number_of(path)].marks = {mark}
            case ["utimens", path, mtime_ns]:
                self.files[self.number_of(path)].mtimes = {mtime_ns}
        if kind in ("unlink", "rename", "close"):
            self._drop()

    def _count(self, words: Words) -> None:
        """Note which numbers were given."""
        match words:
            case ["create", _, number, _] | ["log", number] | ["hold", _, number]:
                self.serial = max(self.serial, number)
            case ["mkdir", path, _] | ["link" | "rename", _, path]:
                self.serial = max(self.serial, int(path.rpartition("/")[2]))
            case ["claim", number, _]:
                self.claim = max(self.claim, number)

    def _drop(self) -> None:
        """Forget files that nobody can reach any more."""
        kept = self.held.union(self.names.files.values())
        self.files = {number: file for number, file in self.files.items() if number in kept}

    def settle(self, found: Sequence[Entry], under_way: Words | None) -> list[str]:
        """Compare with what is there after the worker's end; say what is wrong.

        ``under_way``: what it had begun and not told the end of. Without complaints the tree is then what is there.
        """
        self.held.clear()
        self._drop()
        directory_modes: dict[str, set[int]] = {path: {mode} for path, mode in self.names.directories.items()}
        if under_way is not None:
            self._count(under_way)
            match under_way:
                case ["chmod", path, mode] if path in directory_modes:
                    directory_modes[path].add(mode)
                case ["chmod", path, mode]:
                    self.files[self.number_of(path)].modes.add(mode)
                case ["setxattr", path, mark]:
                    self.files[self.number_of(path)].marks.add(mark)
                case ["utimens", path, mtime_ns]:
                    file = self.files[self.number_of(path)]
                    file.mtimes = None if file.mtimes is None else file.mtimes | {mtime_ns}
                case [kind, number, *_] if kind not in NAME_KINDS and number in self.files:
                    self.files[number].doubt(under_way)
                case [kind, *_] if kind in NAME_KINDS and not self.names.fits(found):
                    after = self.names.copy()
                    after.apply(under_way)
                    if after.fits(found):
                        self.apply(under_way)
                        self.held.clear()
                        self._drop()
                        directory_modes = {path: {mode} for path, mode in self.names.directories.items()}
        if not self.names.fits(found):
            return [self.names.difference(found)]
        entries = {entry.path: entry for entry in found}
        complaints = [*self._directory_complaints(entries, directory_modes), *self._file_complaints(entries)]
        if not complaints:
            self._adopt(entries)
        return complaints

    def _directory_complaints(self, entries: Mapping[str, Entry], modes: Mapping[str, set[int]]) -> Iterator[str]:
        for path in self.names.directories:
            entry = entries[path]
            inside = sum(other.rpartition("/")[0] == path for other in self.names.directories if other)
            if entry.links != 2 + inside:
                yield f"{path}/ has {entry.links} links and {inside} directories in it"
            if path and stat.S_IMODE(entry.mode) not in modes[path]:
                yield f"{path}/ has mode {stat.S_IMODE(entry.mode):o}, not {_octal(modes[path])}"

    def _file_complaints(self, entries: Mapping[str, Entry]) -> Iterator[str]:
        paths: dict[int, list[str]] = {}
        for path, number in self.names.files.items():
            paths.setdefault(number, []).append(path)
        inodes: dict[int, int] = {}
        for number, its in paths.items():
            file, entry = self.files[number], entries[its[0]]
            known = file.ino or entry.ino
            if any(entries[path].ino != known for path in its):
                yield f"{', '.join(its)} should be inode {known}, not {[entries[path].ino for path in its]}"
                continue
            if inodes.setdefault(entry.ino, number) != number:
                yield f"{its[0]} is the same file as {paths[inodes[entry.ino]][0]}"
            if entry.links != len(its):
                yield f"{its[0]} has {entry.links} links and {len(its)} names"
            if stat.S_IMODE(entry.mode) not in file.modes:
                yield f"{its[0]} has mode {stat.S_IMODE(entry.mode):o}, not {_octal(file.modes)}"
            if entry.mark not in file.marks:
                yield f"{its[0]} is marked {entry.mark!r}, not {' or '.join(map(repr, sorted(file.marks)))}"
            if file.mtimes is not None and entry.mtime_ns not in file.mtimes:
                yield f"{its[0]} was modified at {entry.mtime_ns} ns, not {' or '.join(map(str, sorted(file.mtimes)))}"
            if entry.size != len(entry.data):
                yield f"{its[0]} has {entry.size} bytes and gives {len(entry.data)}"
            if sentence := file.complaint(entry.data):
                yield f"{its[0]} {sentence}"

    def _adopt(self, entries: Mapping[str, Entry]) -> None:
        for path, number in self.names.files.items():
            entry = entries[path]
            self.files[number].adopt(entry.data)
            self.files[number].modes = {stat.S_IMODE(entry.mode)}
            self.files[number].marks = {entry.mark}
            if self.files[number].mtimes is not None:
                self.files[number].mtimes = {entry.mtime_ns}
            self.files[number].ino = entry.ino
        for path in self.names.directories:
            self.names.directories[path] = stat.S_IMODE(entries[path].mode)


def _octal(modes: Iterable[int]) -> str:
    return " or ".join(f"{mode:o}" for mode in sorted(modes))
