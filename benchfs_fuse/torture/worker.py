"""Work on a mount with plain system calls, and say before and after each what is done.

    python -m benchfs_fuse.torture.worker FD

Commands come as lines of JSON on standard input; what is said goes as lines of JSON to FD, with the time (ns of
CLOCK_MONOTONIC) at the end. A line is shorter than PIPE_BUF, so a kill never leaves half of one.

    ["make", DIRECTORY, NAMES]         make it, if it is not there, and directories in it; ["made"]
    ["prepare", DIRECTORY]             make a shared directory as ``shared.Shared`` expects it; ["prepared"]
    ["look", DIRECTORY, FILE]          write all that is there to FILE, a pickled list of ``Entry``; ["looked"]
    ["work", NUMBER, SEED, DIRECTORY, SHARED, FILE, MAY_DROP]
                                       work in DIRECTORY, whose ``Tree`` lies pickled in FILE, and in SHARED, until told
                                       to stop or until something fails; ["stopped"]; MAY_DROP: disks may be full
                                       ["begin", WORDS], then ["end", RESULT], ["fail", ERRNO] or ["wrong", SENTENCE]
    ["stop"]                           end what is being done, close everything
    ["lock", DIRECTORY, WORKERS]       see that nobody but these workers (numbers) holds a lock in a shared directory;
                                       ["locked"]
    ["keep", DIRECTORY]                make files that nobody will change (``damage.Damage``); ["kept"]
    ["blocks", DIRECTORY, FILE]        read those block by block, write them to FILE, pickled; ["read"]
    ["fill", DIRECTORY]                write files until there is no room; ["full"]
    ["remove", DIRECTORY]              remove everything below and it; ["removed"]

Where one of these fails: ["cannot", SENTENCE], and the end. ["work"] says so otherwise.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pickle
import random
import select
import shutil
import stat
import sys
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from ..limits import CHUNK_SIZE_MIN
from ..testing.syscalls import KEEP_SIZE, PUNCH_HOLE, fallocate
from . import damage, shared
from .manifest import MARK, Entry, Tree, content

#: Largest file: a few chunks of the smallest size.
SIZE_MAX = 3 * CHUNK_SIZE_MIN
#: Names and directories of one tree at most: more are removed than made then.
NAMES_MAX = 30
DIRECTORIES_MAX = 8
#: Files that a worker holds open at most.
HELD_MAX = 4
#: How often a path may be ESTALE before it is taken for that.
STALE_MAX = 10
#: Seconds between two looks at who holds a lock: no event tells what its holder has written.
LOCK_PAUSE_S = 0.05
#: Bytes read at once.
READ_SIZE = 1 << 20
MODES = (0o600, 0o640, 0o644, 0o666, 0o755)
#: Chunks of one of the files that fill the disks, and how many in a row have to be refused: one alone may lie on the
#: disk that is full first.
FILL_CHUNKS = 16
FILL_REFUSED = 3


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file for the time of a block. OSError, also of the close."""
    fd = os.open(path, flags)
    try:
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of it."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def read_all(fd: int) -> bytes:
    """Read a file to its end."""
    data = bytearray()
    while part := os.pread(fd, READ_SIZE, len(data)):
        data += part
    return bytes(data)


def _found(path: Path) -> os.stat_result:
    """Return what lstat(2) says; OSError.

    Linux answers ESTALE where a directory was moved by another mount and this one renames something right now
    (docs/semantics.md).
    """
    for _ in range(STALE_MAX):
        try:
            return os.lstat(path)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return os.lstat(path)


def _mark_of(path: Path) -> str:
    try:
        return os.getxattr(path, MARK).decode()
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return ""


def look(root: Path, path: str = "") -> list[Entry]:
    """Look at everything there is at and below a directory. OSError."""
    there = _found(root / path)
    if not stat.S_ISDIR(there.st_mode):
        with opened(root / path, os.O_RDONLY) as fd:
            data = read_all(fd)
        there = os.lstat(root / path)
        size, mark = there.st_size, _mark_of(root / path)
        return [Entry(path, there.st_ino, there.st_mode, there.st_nlink, size, data, there.st_mtime_ns, mark)]
    found = [Entry(path, there.st_ino, there.st_mode, there.st_nlink, 0, b"")]
    for name in sorted(os.listdir(root / path)):
        found += look(root, f"{path}/{name}" if path else name)
    return found


def prepare(root: Path) -> None:
    """Make the shared directory."""
    for name in ("counters", "claims", *shared.PLACES):
        (root / name).mkdir(parents=True)
    for number in range(shared.COUNTERS):
        (root / "counters" / str(number)).write_bytes(b"0".ljust(20))
    for number in range(shared.TOKENS):
        (root / shared.PLACES[0] / f"{number}.0.x").write_bytes(shared.token(number))
    for number in range(shared.LOCKS):
        (root / f"lock-{number}").mkdir()
        shared.lock_file(root, number).write_bytes(shared.holder(0, 0))
    for name in ("source", "log"):
        (root / name).touch()


def lock_way(number: int) -> Callable[[int, int], None]:
    """Return how one of the locks is taken, or a counter's: of an open file description, or a process's."""
    return fcntl.lockf if number % 2 else fcntl.flock


def lock(root: Path, workers: Container[int]) -> None:
    """Take what workers lock in a shared directory, and give it back; wait while it is somebody's who may not. OSError.

    These workers may hold theirs for as long as they like: one that found no room does until it is replaced.
    """
    for number in range(shared.LOCKS):
        with opened(shared.lock_file(root, number), os.O_RDWR) as fd:
            while True:
                try:
                    lock_way(number)(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    with opened(shared.lock_file(root, number), os.O_RDONLY) as again:  # as it is elsewhere
                        if shared.worker_of(read_all(again)) in workers:
                            break
                time.sleep(LOCK_PAUSE_S)


def keep(root: Path) -> None:
    """Make files that nobody will change."""
    root.mkdir()
    for number in range(damage.FILES):
        with opened(root / str(number), os.O_CREAT | os.O_WRONLY) as fd:
            write_all(fd, damage.kept_bytes(number), 0)
            os.fsync(fd)


def blocks(path: Path) -> list[bytes | None]:
    """Read a file block by block; None: EIO. OSError: anything else."""
    found: list[bytes | None] = []
    with opened(path, os.O_RDONLY) as fd:
        while True:
            try:
                block = os.pread(fd, damage.BLOCK, len(found) * damage.BLOCK)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                found.append(None)
                continue
            if not block:
                return found
            found.append(block)


def fill(root: Path) -> None:
    """Write files until there is no room on any disk. OSError: anything else."""
    root.mkdir()
    refused = 0
    for number in itertools.count():
        try:
            with opened(root / str(number), os.O_CREAT | os.O_WRONLY) as fd:
                for index in range(FILL_CHUNKS):
                    write_all(fd, bytes(CHUNK_SIZE_MIN), index * CHUNK_SIZE_MIN)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            refused += 1
            if refused == FILL_REFUSED:
                return
        else:
            refused = 0


class _Ended(Exception):
    """End the work: something has failed and was said."""


class Work:
    """Do random things, of which this worker knows what must come of them."""

    def __init__(
        self, say: Callable[..., None], number: int, seed: int, root: Path, together: Path, tree: Tree, may_drop: bool
    ) -> None:
        self._say = say
        self._number = number
        self._random = random.Random(seed)
        self._root = root
        self._together = together
        self._tree = tree
        #: Whether accepted bytes may find no room, which is told at the close.
        self._may_drop = may_drop
        self._fds: dict[int, int] = {}
        #: The lock that is held: its number, the open file, and what was written there.
        self._lock: tuple[int, int, bytes] | None = None
        self._operations: list[Callable[[], None]] = [
            *[self._create] * 4,
            *[self._open] * 2,
            *[self._write] * 6,
            *[self._write_synced] * 2,
            *[self._append] * 2,
            *[self._truncate] * 3,
            *[self._punch] * 2,
            *[self._fsync] * 2,
            *[self._close] * 2,
            *[self._rename] * 4,
            *[self._rename_over] * 2,
            *[self._link] * 2,
            *[self._unlink] * 3,
            *[self._mkdir] * 2,
            *[self._rmdir] * 2,
            *[self._move_directory] * 2,
            self._chmod,
            self._set_mark,
            self._set_times,
            *[self._read] * 3,
            self._list,
            *[self._count] * 2,
            *[self._move_token] * 2,
            self._claim_name,
            self._log,
            *[self._hold_or_let_go] * 2,
        ]

    def go_on(self, stopped: Callable[[], bool]) -> None:
        """Work until stopped or until something fails; close everything."""
        try:
            while not stopped():
                if len(self._tree.names.files) > NAMES_MAX:
                    self._unlink()
                else:
                    self._random.choice(self._operations)()
            while self._tree.held:
                self._close()
            if self._lock is not None:
                self._hold_or_let_go()
        except _Ended:
            pass

    def _do(self, step: Callable[[], Any], *words: Any) -> None:
        self._say("begin", words)
        try:
            result = step()
        except OSError as error:
            self._say("fail", error.errno)
            raise _Ended from None
        self._tree.apply(words)
        self._say("end", result)

    def _wrong(self, sentence: str) -> None:
        self._say("wrong", sentence)
        raise _Ended

    # ── what is chosen ───────────────────────────────────────────────────────────────────────────────────────────────

    def _path(self) -> str | None:
        names = self._tree.names.files
        return self._random.choice(sorted(names)) if names else None

    def _directory(self) -> str:
        directories = sorted(self._tree.names.directories)
        # Many high up: those are spread over the daemons.
        return self._random.choice(["", *directories])

    def _new(self) -> str:
        self._tree.serial += 1
        directory = self._directory()
        return f"{directory}/{self._tree.serial}" if directory else str(self._tree.serial)

    def _piece(self) -> tuple[int, int]:
        """Return a number for some bytes, and how many."""
        return self._random.getrandbits(32), self._random.choice([1, 100, 5000, self._random.randrange(1, SIZE_MAX)])

    def _offset(self) -> int:
        return self._random.choice([0, self._random.randrange(SIZE_MAX)])

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _create(self) -> None:
        path, mode = self._new(), self._random.choice(MODES)
        number = self._tree.serial

        def step() -> None:
            self._fds[number] = os.open(self._root / path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)

        self._do(step, "create", path, number, mode)
        if len(self._tree.held) > HELD_MAX:
            self._close()

    def _open(self) -> None:
        if (path := self._path()) is None or len(self._tree.held) >= HELD_MAX:
            return
        if (number := self._tree.number_of(path)) in self._tree.held:
            return

        def step() -> None:
            self._fds[number] = os.open(self._root / path, os.O_RDWR)

        self._do(step, "open", number)

    def _some(self) -> tuple[int, str] | None:
        """Return some file, held or not, and a path if it has one."""
        paths = {number: path for path, number in self._tree.names.files.items()}
        numbers = sorted(paths.keys() | self._tree.held)
        number = self._random.choice(numbers) if numbers else None
        return None if number is None else (number, paths.get(number, ""))

    @contextlib.contextmanager
    def _fd(self, number: int, path: str, flags: int = os.O_RDWR) -> Iterator[int]:
        if number in self._fds:
            yield self._fds[number]
        else:
            with opened(self._root / path, flags) as fd:
                yield fd

    def _write(self) -> None:
        if (some := self._some()) is None:
            return
        (number, path), offset, (seed, length) = some, self._offset(), self._piece()

        def step() -> None:
            with self._fd(number, path) as fd:
                write_all(fd, content(seed, length), offset)

        self._do(step, "write", number, offset, seed, length, number not in self._fds)

    def _write_synced(self) -> None:
        if (path := self._path()) is None:
            return
        number, offset, (seed, length) = self._tree.number_of(path), self._offset(), self._piece()

        def step() -> None:
            with opened(self._root / path, os.O_WRONLY | os.O_SYNC) as fd:
                write_all(fd, content(seed, length), offset)

        self._do(step, "write_synced", number, offset, seed, length)

    def _append(self) -> None:
        if (path := self._path()) is None or (number := self._tree.number_of(path)) in self._fds:
            return
        seed, length = self._piece()
        if len(self._tree.files[number].now) > 2 * SIZE_MAX:
            return

        def step() -> None:
            with opened(self._root / path, os.O_WRONLY | os.O_APPEND) as fd:
                write_all(fd, content(seed, length), 0)  # where does not matter: open(2), O_APPEND

        self._do(step, "append", number, seed, length)

    def _truncate(self) -> None:
        if (some := self._some()) is None:
            return
        number, path = some
        size = self._random.choice([0, self._random.randrange(SIZE_MAX), len(self._tree.files[number].now) // 2])
        if path and self._random.random() < 0.5:
            self._do(lambda: os.truncate(self._root / path, size), "truncate", number, size)
            return

        def step() -> None:
            with self._fd(number, path) as fd:
                os.ftruncate(fd, size)

        self._do(step, "truncate", number, size)

    def _punch(self) -> None:
        if (some := self._some()) is None:
            return
        (number, path), offset, length = some, self._offset(), self._random.randrange(1, SIZE_MAX)

        def step() -> None:
            with self._fd(number, path) as fd:
                fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)

        self._do(step, "punch", number, offset, length)

    def _fsync(self) -> None:
        if self._fds:
            number = self._random.choice(sorted(self._fds))
            self._do(lambda: os.fsync(self._fds[number]), "fsync", number)

    def _close(self) -> None:
        if self._fds:
            number = self._random.choice(sorted(self._fds))
            self._do(lambda: os.close(self._fds.pop(number)), "close", number)

    def _read(self) -> None:
        if (some := self._some()) is None:
            return
        number, path = some
        found: list[bytes] = []

        def step() -> None:
            with self._fd(number, path, os.O_RDONLY) as fd:
                found.append(read_all(fd))
                size, links = os.fstat(fd).st_size, os.fstat(fd).st_nlink
            if (size, links) != (len(found[0]), self._tree.links(number)):
                found.append(f"{size} bytes by fstat, {links} links".encode())

        self._do(step, "read", number)
        right = bytes(self._tree.files[number].now)
        if found == [right]:
            return
        if self._may_drop and self._tree.files[number].pending and not self._tree.files[number].complaint(found[0]):
            self._do(lambda: os.close(self._fds.pop(number)), "close", number)  # which says so
            self._wrong(f"file {number} lost accepted bytes, and nobody was told by the close")
        label = path or f"file {number}, without a name,"
        if found[0] != right:
            at = next((i for i, (one, other) in enumerate(zip(found[0], right, strict=False)) if one != other), None)
            self._wrong(f"{label} gives {len(found[0])} bytes instead of {len(right)}, the first other one at {at}")
        self._wrong(f"{label} has {found[1].decode()}; {len(right)} bytes, {self._tree.links(number)} links are right")

    # ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _rename(self) -> None:
        if (old := self._path()) is not None:
            new = self._new()
            self._do(lambda: os.rename(self._root / old, self._root / new), "rename", old, new)

    def _rename_over(self) -> None:
        old, new = self._path(), self._path()
        if old is None or new is None or self._tree.number_of(old) == self._tree.number_of(new):
            return
        self._do(lambda: os.rename(self._root / old, self._root / new), "rename", old, new)

    def _link(self) -> None:
        if (old := self._path()) is not None:
            new = self._new()
            self._do(lambda: os.link(self._root / old, self._root / new), "link", old, new)

    def _unlink(self) -> None:
        if (path := self._path()) is not None:
            self._do(lambda: os.unlink(self._root / path), "unlink", path)

    def _mkdir(self) -> None:
        if len(self._tree.names.directories) < DIRECTORIES_MAX:
            path, mode = self._new(), self._random.choice((0o700, 0o755))
            self._do(lambda: os.mkdir(self._root / path, mode), "mkdir", path, mode)

    def _rmdir(self) -> None:
        path = self._directory()
        if path and not self._tree.names.children(path):
            self._do(lambda: os.rmdir(self._root / path), "rmdir", path)

    def _move_directory(self) -> None:
        old, new = self._directory(), self._new()
        if old and not f"{new}/".startswith(f"{old}/"):
            self._do(lambda: os.rename(self._root / old, self._root / new), "rename", old, new)

    def _set_mark(self) -> None:
        if (path := self._path()) is None:
            return
        marked = any(self._tree.files[self._tree.number_of(path)].marks - {""})
        mark = "" if marked and self._random.random() < 0.5 else str(self._random.getrandbits(32))

        def step() -> None:
            if mark:
                os.setxattr(self._root / path, MARK, mark.encode())
            else:
                os.removexattr(self._root / path, MARK)

        self._do(step, "setxattr", path, mark)

    def _set_times(self) -> None:
        """Set the times of a file to which nothing is still to be written."""
        if (path := self._path()) is None or self._tree.number_of(path) in self._fds:
            return
        mtime_ns = self._random.randrange(2 * 10**18)
        self._do(lambda: os.utime(self._root / path, ns=(mtime_ns, mtime_ns)), "utimens", path, mtime_ns)

    def _chmod(self) -> None:
        if (path := self._path()) is not None:
            mode = self._random.choice(MODES)
            self._do(lambda: os.chmod(self._root / path, mode), "chmod", path, mode)

    def _list(self) -> None:
        path = self._directory()
        found: list[str] = []
        self._do(lambda: found.extend(os.listdir(self._root / path)), "list", path)
        wanted = self._tree.names.children(path)
        if len(found) != len(wanted) or set(found) != wanted:
            self._wrong(f"{path}/ lists {sorted(found)} instead of {sorted(wanted)}")

    # ── shared ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _count(self) -> None:
        number = self._random.randrange(shared.COUNTERS)
        way = lock_way(number)

        def step() -> int:
            with opened(self._together / "counters" / str(number), os.O_RDWR) as fd:
                way(fd, fcntl.LOCK_EX)
                value = int(os.pread(fd, 20, 0)) + 1
                os.pwrite(fd, str(value).encode().ljust(20), 0)
                way(fd, fcntl.LOCK_UN)
            return value

        self._do(step, "count", number)

    def _move_token(self) -> None:
        number, target = self._random.randrange(shared.TOKENS), self._random.choice(shared.PLACES)
        found: list[tuple[str, str]] = []

        def seek() -> None:
            for place in shared.PLACES:
                names = os.listdir(self._together / place)
                found.extend((place, name) for name in names if name.startswith(f"{number}."))

        self._do(seek, "seek", number)
        if not found:  # it was moved meanwhile
            return
        source, name = found[-1]
        moves = int(name.split(".")[1])
        old = self._together / source / name
        new = self._together / target / f"{number}.{moves + 1}.{self._number}"

        def step() -> bool:
            try:
                os.rename(old, new)
            except FileNotFoundError:
                return False
            return True

        self._do(step, "move", number, moves, source, target)

    def _claim_name(self) -> None:
        self._tree.claim += 1
        number, way = self._tree.claim, self._random.choice(("create", "link"))
        path = self._together / "claims" / str(number)

        def step() -> bool:
            try:
                if way == "link":
                    os.link(self._together / "source", path)
                else:
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                self._tree.claim += self._random.randrange(4)  # behind who is ahead
                return False
            return True

        self._do(step, "claim", number, way)

    def _log(self) -> None:
        self._tree.serial += 1
        serial = self._tree.serial

        def step() -> None:
            with opened(self._together / "log", os.O_WRONLY | os.O_APPEND) as fd:
                write_all(fd, shared.record(self._number, serial), 0)

        self._do(step, "log", serial)

    def _hold_or_let_go(self) -> None:
        if self._lock is not None:
            self._let_go(*self._lock)
            return
        self._tree.serial += 1
        number, written = self._random.randrange(shared.LOCKS), shared.holder(self._number, self._tree.serial)

        def step() -> bool:
            fd = os.open(shared.lock_file(self._together, number), os.O_RDWR)
            try:
                lock_way(number)(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            self._lock = number, fd, written
            write_all(fd, written, 0)
            os.fsync(fd)
            return True

        self._do(step, "hold", number, self._tree.serial)

    def _let_go(self, number: int, fd: int, written: bytes) -> None:
        found: list[bytes] = []

        def step() -> None:
            with opened(shared.lock_file(self._together, number), os.O_RDONLY) as again:  # as it is elsewhere
                found.append(read_all(again))
            self._lock = None
            os.close(fd)

        self._do(step, "let_go", number)
        if found != [written]:
            self._wrong(f"lock {number} is held by {written!r}, and somebody else was there: {found[0][:40]!r}")


class _Commands:
    """Read commands from standard input."""

    def __init__(self) -> None:
        self._received = b""

    def __iter__(self) -> Iterator[list[Any]]:
        while b"\n" in self._received or self._read():
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                yield json.loads(line)

    def _read(self) -> bool:
        data = os.read(0, 1 << 16)
        self._received += data
        return bool(data)

    def waiting(self) -> bool:
        """Tell whether there is another one, or an end."""
        return bool(self._received or select.select([0], [], [], 0)[0])


def main(fd: int) -> None:
    """Obey standard input until it ends."""
    os.umask(0)

    def say(*words: Any) -> None:
        os.write(fd, json.dumps([*words, time.monotonic_ns()]).encode() + b"\n")

    commands = _Commands()
    try:
        obey(commands, say)
    except OSError as error:
        say("cannot", f"{error.strerror}: {error.filename or ''}")


def obey(commands: "_Commands", say: Callable[..., None]) -> None:
    """Do what is told. OSError: it could not be done."""
    for command in commands:
        match command:
            case ["make", str(root), list(names)]:
                Path(root).mkdir(exist_ok=True)
                for name in names:
                    (Path(root) / name).mkdir()
                say("made")
            case ["prepare", str(root)]:
                prepare(Path(root))
                say("prepared")
            case ["look", str(root), str(file)]:
                Path(file).write_bytes(pickle.dumps(look(Path(root))))
                say("looked")
            case ["work", int(number), int(seed), str(root), str(together), str(file), bool(may_drop)]:
                tree: Tree = pickle.loads(Path(file).read_bytes())
                Work(say, number, seed, Path(root), Path(together), tree, may_drop).go_on(commands.waiting)
                say("stopped")
            case ["lock", str(root), list(workers)]:
                lock(Path(root), workers)
                say("locked")
            case ["keep", str(root)]:
                keep(Path(root))
                say("kept")
            case ["blocks", str(root), str(file)]:
                numbers = range(damage.FILES)
                Path(file).write_bytes(pickle.dumps({number: blocks(Path(root) / str(number)) for number in numbers}))
                say("read")
            case ["fill", str(root)]:
                fill(Path(root))
                say("full")
            case ["remove", str(root)]:
                shutil.rmtree(root)
                say("removed")


if __name__ == "__main__":
    main(int(sys.argv[1]))
