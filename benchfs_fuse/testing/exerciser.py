"""Mix reads, writes, mappings, truncations, space, copies, appends and reopens on one file, and check every byte of it.

    python -m benchfs_fuse.testing.exerciser PATH [--also PATH2] [--mode MODE] --ops N --seed S

In the spirit of fsx: a model in memory says what must be in the file. PATH is a directory. With `--also`, PATH2 is the
same directory through another mount, and the exerciser changes sides by close-to-open: it closes at one, opens at the
other, and checks the size and every byte there.
"""

import argparse
import contextlib
import enum
import errno
import mmap
import multiprocessing
import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchfs_fuse.testing.sides import space_modes
from benchfs_fuse.testing.syscalls import KEEP_SIZE, fallocate

# The file grows to this: past two chunks of the default size, so that every operation meets chunk boundaries.
SIZE_MAX = 9 << 20

# Longest single operation: some are longer than the largest FUSE request, 1 MiB.
LENGTH_MAX = 1_300_000

# How many operations pass, on average, between two looks at the whole file.
OPS_PER_CHECK = 40

# What O_DIRECT asks of offset, length and memory.
ALIGNMENT = 4096

# How many of the last operations a failure prints: what broke a byte is seldom older, and the seed tells the others.
LOG_LINES = 60

# Deadline for each process of the modes that have several.
PROCESS_DEADLINE_S = 600.0


class WrongByteError(AssertionError):
    """The file is not what was written to it; the text names seed, operation, place and the operations before."""


class FileIo:
    """The operations that the exerciser makes on its file; a test gives it one that lies."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags, 0o644)

    def close(self, fd: int) -> None:
        os.close(fd)

    def read(self, fd: int, length: int, offset: int) -> bytes:
        """Read up to `length` bytes; fewer only at the end of the file."""
        data = bytearray()
        while len(data) < length:
            piece = os.pread(fd, length - len(data), offset + len(data))
            if not piece:
                break
            data += piece
        return bytes(data)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written

    def append(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def map_read(self, fd: int, length: int, offset: int) -> bytes:
        with _mapping(fd, length, offset) as (view, start):
            return bytes(view[start : start + length])

    def map_write(self, fd: int, data: bytes, offset: int) -> None:
        with _mapping(fd, len(data), offset) as (view, start):
            view[start : start + len(data)] = data

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        fallocate(fd, mode, offset, length)

    def copy(self, fd: int, offset: int, target_offset: int, length: int) -> int:
        """Copy within the file; return how many bytes were copied, fewer than asked for only at the file's end."""
        done = 0
        while done < length:
            count = os.copy_file_range(fd, fd, length - done, offset + done, target_offset + done)
            if not count:
                break
            done += count
        return done

    def seek(self, fd: int, offset: int, whence: int) -> int | None:
        """Find data or a hole; None: there is none."""
        try:
            return os.lseek(fd, offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    def view_read(self, view: mmap.mmap, length: int, offset: int) -> bytes:
        """Read through a mapping that has been there for a while."""
        return view[offset : offset + length]

    def view_write(self, view: mmap.mmap, data: bytes, offset: int) -> None:
        view[offset : offset + len(data)] = data

    def direct_read(self, fd: int, length: int, offset: int) -> bytes:
        with mmap.mmap(-1, length) as buffer:
            return buffer[: os.preadv(fd, [buffer], offset)]

    def direct_write(self, fd: int, data: bytes, offset: int) -> None:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            done = 0
            with memoryview(buffer) as view:
                while done < len(data):
                    done += os.pwritev(fd, [view[done:]], offset + done)


@contextlib.contextmanager
def _mapping(fd: int, length: int, offset: int) -> Iterator[tuple[mmap.mmap, int]]:
    base = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(fd, offset - base + length, mmap.MAP_SHARED, offset=base) as view:
        yield view, offset - base


class Mode(enum.Enum):
    """What is exercised: all operations, aligned O_DIRECT ones, one file from many processes, or many appending."""

    MIXED = "mixed"
    DIRECT = "direct"
    REGIONS = "regions"
    APPEND = "append"


@dataclass
class _Log:
    seed: int
    lines: list[str] = field(default_factory=list)

    def failure(self, what: str) -> WrongByteError:
        last = "\n".join(f"  {index}: {line}" for index, line in list(enumerate(self.lines))[-LOG_LINES:])
        return WrongByteError(f"seed {self.seed}, operation {len(self.lines) - 1}: {what}\nlast operations:\n{last}")


class Exerciser:
    """Change one file at random and know what must be in it.

    `paths` name the same file through each mount. With `span`, only that many bytes from `base` on are touched: the
    size stays as it is, and others may change the rest of the file. `space` are the modes of fallocate to use; those
    that the file's directory takes, if None.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        seed: int,
        *,
        direct: bool = False,
        io: FileIo | None = None,
        size_max: int = SIZE_MAX,
        base: int = 0,
        span: int | None = None,
        space: frozenset[int] | None = None,
    ) -> None:
        self._paths = paths
        self._space = sorted(space_modes(paths[0].parent) if space is None else space)
        self._view: mmap.mmap | None = None
        self._random = random.Random(seed)
        self._direct = direct
        self._io = io or FileIo()
        self._size_max = size_max if span is None else span
        self._base = base
        self._fixed = span is not None
        self._log = _Log(seed)
        self._side = 0
        self._model = bytearray(span or 0)
        self._is_open = True
        self._fd = self._open(os.O_CREAT if self._fixed else os.O_CREAT | os.O_EXCL)

    @property
    def model(self) -> bytes:
        """What must be in the file, from `base` on."""
        return bytes(self._model)

    def run(self, ops: int) -> None:
        """Make `ops` operations and check the whole file at the end, from every path. Raises WrongByteError."""
        actions = self._actions()
        try:
            for _ in range(ops):
                self._random.choices(list(actions), list(actions.values()))[0]()
                if self._random.random() < 1 / OPS_PER_CHECK:
                    self._check_all()
            for _ in self._paths:
                self._switch()
        except OSError as error:
            raise self._log.failure(f"failed: {error}") from error
        finally:
            self._close()

    def _actions(self) -> dict[Callable[[], None], int]:
        """Return what this file may undergo, and how often each."""
        actions = {self._read: 6, self._write: 6, self._fsync: 1, self._switch: 2, self._copy: 3, self._seek: 3}
        if self._space:
            actions |= {self._allocate: 5}
        if not self._direct:
            actions |= {self._map_read: 4, self._map_write: 4, self._view_read: 2, self._view_write: 2, self._look: 1}
        if not self._fixed:
            actions |= {self._truncate: 3, self._write_past_end: 2}
        if not self._fixed and not self._direct:
            actions |= {self._append: 2}
        return actions

    def _read(self) -> None:
        offset, length = self._place(len(self._model) + (0 if self._fixed else ALIGNMENT))
        self._say(f"read {length} at {offset}")
        read = self._io.direct_read if self._direct else self._io.read
        self._compare(offset, self._model[offset : offset + length], read(self._fd, length, self._base + offset))

    def _write(self) -> None:
        offset, length = self._place(self._size_max)
        self._write_at(offset, length, "write")

    def _write_past_end(self) -> None:
        offset, length = self._place(self._size_max)
        gap = self._random.randrange(1 << self._random.randrange(1, 22))
        offset = min(self._aligned(len(self._model) + gap), self._size_max - length)
        if offset > len(self._model):
            self._write_at(offset, length, "write past the end")

    def _write_at(self, offset: int, length: int, name: str) -> None:
        data = self._data(length)
        self._say(f"{name} {length} at {offset}")
        write = self._io.direct_write if self._direct else self._io.write
        write(self._fd, data, self._base + offset)
        self._put(offset, data)

    def _append(self) -> None:
        length = min(self._length(), self._size_max - len(self._model))
        data = self._data(length)
        self._say(f"append {length} at {len(self._model)}")
        fd = self._open(os.O_APPEND)
        try:
            self._io.append(fd, data)
        finally:
            self._io.close(fd)
        self._model += data

    def _truncate(self) -> None:
        size = self._random.randint(0, self._size_max)
        if self._random.random() < 0.6:
            size = self._random.randint(0, len(self._model))
        self._say(f"truncate {len(self._model)} to {size}")
        self._io.truncate(self._fd, size)
        del self._model[size:]
        self._model += bytes(size - len(self._model))

    def _fsync(self) -> None:
        self._say("fsync")
        self._io.fsync(self._fd)

    def _map_read(self) -> None:
        offset, length = self._place(len(self._model))
        length = min(length, len(self._model) - offset)
        if length > 0:
            self._say(f"read {length} at {offset} by mapping")
            self._check_size()
            data = self._io.map_read(self._fd, length, self._base + offset)
            self._compare(offset, self._model[offset : offset + length], data)

    def _map_write(self) -> None:
        offset, length = self._place(len(self._model))
        length = min(length, len(self._model) - offset)
        if length > 0:
            data = self._data(length)
            self._say(f"write {length} at {offset} by mapping")
            self._check_size()
            self._io.map_write(self._fd, data, self._base + offset)
            self._put(offset, data)

    def _look(self) -> None:
        """Map the whole file, and keep that while the file changes."""
        self._say("map the file")
        self._check_size()
        self._drop_view()
        if self._model:
            self._view = mmap.mmap(self._fd, self._base + len(self._model), mmap.MAP_SHARED)

    def _drop_view(self) -> None:
        if self._view is not None:
            self._view.close()
            self._view = None

    def _place_in_view(self) -> tuple[mmap.mmap, int, int] | None:
        """Choose bytes that the file and the kept mapping both have: others behind the end would be SIGBUS."""
        if self._view is None:
            self._look()
        if self._view is None:
            return None
        size = min(len(self._view) - self._base, len(self._model))
        offset, length = self._place(size)
        length = min(length, size - offset)
        return (self._view, offset, length) if length > 0 else None

    def _view_read(self) -> None:
        if place := self._place_in_view():
            view, offset, length = place
            self._say(f"read {length} at {offset} by the kept mapping")
            data = self._io.view_read(view, length, self._base + offset)
            self._compare(offset, self._model[offset : offset + length], data)

    def _view_write(self) -> None:
        if place := self._place_in_view():
            view, offset, length = place
            data = self._data(length)
            self._say(f"write {length} at {offset} by the kept mapping")
            self._io.view_write(view, data, self._base + offset)
            self._put(offset, data)

    def _allocate(self) -> None:
        mode = self._random.choice(self._space)
        offset, length = self._place(self._size_max)
        keeps = mode & KEEP_SIZE or self._fixed
        self._say(f"fallocate {mode} of {length} at {offset}")
        self._io.fallocate(self._fd, mode, self._base + offset, length)
        end = offset + length if not keeps else min(offset + length, len(self._model))
        self._model += bytes(max(0, end - len(self._model)))
        if mode & ~KEEP_SIZE and offset < end:
            self._model[offset:end] = bytes(end - offset)

    def _copy(self) -> None:
        """Copy within the file; what overlaps must be refused."""
        offset, length = self._place(len(self._model))
        target, _ = self._place(self._size_max - length)
        length = min(length, len(self._model) - offset)
        if length <= 0:
            return
        self._say(f"copy {length} at {offset} to {target}")
        try:
            copied = self._io.copy(self._fd, self._base + offset, self._base + target, length)
        except OSError as error:
            if error.errno != errno.EINVAL or abs(target - offset) >= length:
                raise
            return
        if abs(target - offset) < length:
            raise self._log.failure("overlapping ranges are copied")
        if copied != length:
            raise self._log.failure(f"{copied} bytes are copied, must be {length}")
        self._put(target, bytes(self._model[offset : offset + length]))

    def _seek(self) -> None:
        """Walk over data and holes from somewhere on: what is not zero must be data, and the end is known."""
        size = len(self._model)
        position = self._place(size)[0] if self._random.random() < 0.7 else 0
        self._say(f"walk over data and holes from {position}")
        while position < size:
            data = self._seek_to(position, os.SEEK_DATA)
            if self._model.count(0, position, data) != data - position:
                raise self._log.failure(f"bytes from {position} to {data} are a hole, must not be")
            position = self._seek_to(data, os.SEEK_HOLE) if data < size else size
            if position < size and self._model[position]:
                raise self._log.failure(f"byte {self._base + position} is in a hole, must not be")
        if not self._fixed and self._seek_to(size, os.SEEK_DATA, missing=-1) != -1:
            raise self._log.failure(f"data is found behind the end, {size}")

    def _seek_to(self, position: int, whence: int, missing: int | None = None) -> int:
        """Return what is found, at most the size, which also stands for no data unless `missing` does."""
        size = len(self._model)
        found = self._io.seek(self._fd, self._base + position, whence)
        if found is None:
            return size if missing is None else missing
        if found - self._base < position or (not self._fixed and found > size):
            raise self._log.failure(f"seek {whence} from {self._base + position} finds {found} of {self._base + size}")
        return min(found - self._base, size)

    def _switch(self) -> None:
        """Close here, open at the next path, and check everything there: close-to-open."""
        self._close()
        self._side = (self._side + 1) % len(self._paths)
        self._say(f"reopen {self._paths[self._side]}")
        self._fd = self._open(0)
        self._is_open = True
        self._check_all()

    def _check_size(self) -> None:
        if not self._fixed:
            size = self._io.size(self._fd)
            if size != len(self._model):
                raise self._log.failure(f"size is {size}, must be {len(self._model)}")

    def _check_all(self) -> None:
        self._check_size()
        length = len(self._model) if self._fixed else len(self._model) + 1
        if self._direct:
            length = -(-length // ALIGNMENT) * ALIGNMENT
            self._compare(0, self._model, self._io.direct_read(self._fd, length, self._base))
        else:
            self._compare(0, self._model, self._io.read(self._fd, length, self._base))

    def _open(self, flags: int) -> int:
        # O_APPEND descriptors are opened for one append each: pwrite on them would append too.
        return self._io.open(self._paths[self._side], os.O_RDWR | flags | (os.O_DIRECT if self._direct else 0))

    def _close(self) -> None:
        self._drop_view()
        if self._is_open:
            self._is_open = False
            self._io.close(self._fd)

    def _say(self, line: str) -> None:
        self._log.lines.append(line)

    def _aligned(self, value: int) -> int:
        return value // ALIGNMENT * ALIGNMENT if self._direct else value

    def _length(self) -> int:
        length = self._random.randint(1, min(LENGTH_MAX, 1 << self._random.randrange(4, 22)))
        return max(ALIGNMENT, self._aligned(length)) if self._direct else length

    def _place(self, limit: int) -> tuple[int, int]:
        """Choose an offset and a length within `limit`, often at the edge of a page or of a power of two."""
        length = min(self._length(), self._size_max)
        offset = self._random.randint(0, max(0, limit - length))
        if self._random.random() < 0.4:
            edge = 1 << self._random.randrange(12, 23)
            offset = min(max(0, offset // edge * edge + self._random.randint(-2, 2)), max(0, limit - length))
        return self._aligned(offset), length

    def _data(self, length: int) -> bytes:
        return self._random.randbytes(length)

    def _put(self, offset: int, data: bytes) -> None:
        self._model += bytes(max(0, offset - len(self._model)))
        self._model[offset : offset + len(data)] = data

    def _compare(self, offset: int, expected: bytes | bytearray, found: bytes) -> None:
        if expected == found:
            return
        index = next(
            (index for index, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
            min(len(expected), len(found)),
        )
        place = f"byte {self._base + offset + index} of {self._paths[self._side]}"
        if index == min(len(expected), len(found)):
            raise self._log.failure(f"{place}: {len(found)} bytes came, must be {len(expected)}")
        raise self._log.failure(f"{place}: is {found[index]:#04x}, must be {expected[index]:#04x}")


def _run_processes(targets: Sequence[tuple[Callable[..., None], tuple[object, ...]]]) -> None:
    """Run each target in a process of its own; all must end well before the deadline. Raises WrongByteError."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=arguments) for target, arguments in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PROCESS_DEADLINE_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    if codes != [0] * len(codes):
        raise WrongByteError(f"processes ended with {codes} (None: not within {PROCESS_DEADLINE_S} s)")


def _exercise_region(path: Path, seed: int, ops: int, base: int, span: int, io: FileIo) -> None:
    exerciser = Exerciser([path], seed, io=io, base=base, span=span)
    exerciser.run(ops)
    path.with_name(f"{path.name}.model-{base}").write_bytes(exerciser.model)


def exercise_regions(paths: Sequence[Path], seed: int, ops: int, processes: int = 4, io: FileIo | None = None) -> None:
    """Let several processes change separate regions of one file, taking turns over the paths; check all from each path.

    Through one path the regions share pages and chunks; through two each region begins on a page of its own, for two
    mounts' caches are coherent by close-to-open only. Raises WrongByteError.
    """
    span = 1_500_000 if len(paths) == 1 else 1_503_232
    with paths[0].open("wb") as file:
        file.truncate(processes * span)
    _run_processes(
        [
            (_exercise_region, (paths[index % len(paths)], seed + index, ops, index * span, span, io or FileIo()))
            for index in range(processes)
        ]
    )
    for path in paths:
        content = path.read_bytes()
        for index in range(processes):
            model = path.with_name(f"{path.name}.model-{index * span}")
            if content[index * span : (index + 1) * span] != model.read_bytes():
                raise WrongByteError(f"seed {seed}: region {index} of {path} is not what its process wrote")


# A record that an appender writes: who, which one, how long the whole is; then bytes that follow from these.
_RECORD = struct.Struct("=III")


def _record(writer: int, index: int, length: int) -> bytes:
    fill = (writer * 7 + index * 13) % 251 + 1
    return _RECORD.pack(writer, index, length) + bytes([fill]) * (length - _RECORD.size)


def _append_records(path: Path, seed: int, ops: int, writer: int, io: FileIo) -> None:
    lengths = random.Random(seed)
    fd = io.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        for index in range(ops):
            io.append(fd, _record(writer, index, lengths.randint(_RECORD.size, 1 << lengths.randrange(5, 17))))
    finally:
        io.close(fd)


def exercise_append(paths: Sequence[Path], seed: int, ops: int, writers: int = 4, io: FileIo | None = None) -> None:
    """Let several processes append records to one file, taking turns over the paths.

    Afterwards every record must be there once, whole, and in its writer's order, seen from each path. Raises
    WrongByteError.
    """
    paths[0].touch()
    _run_processes(
        [
            (_append_records, (paths[index % len(paths)], seed + index, ops, index, io or FileIo()))
            for index in range(writers)
        ]
    )
    for path in paths:
        _check_records(path, seed, path.read_bytes(), ops, writers)


def _check_records(path: Path, seed: int, content: bytes, ops: int, writers: int) -> None:
    counts = [0] * writers
    offset = 0
    while offset < len(content):
        head = content[offset : offset + _RECORD.size]
        writer, index, length = _RECORD.unpack(head) if len(head) == _RECORD.size else (writers, 0, 0)
        record = content[offset : offset + length]
        if writer >= writers or index != counts[writer] or record != _record(writer, index, max(length, _RECORD.size)):
            raise WrongByteError(f"seed {seed}: {path}: no whole record, or one out of order, at byte {offset}")
        counts[writer] += 1
        offset += length
    if counts != [ops] * writers:
        raise WrongByteError(f"seed {seed}: {path}: records found {counts}, appended {ops} by each")


def exercise(mode: Mode, directory: Path, also: Path | None, seed: int, ops: int) -> None:
    """Exercise a new file in `directory`, which `also` shows through another mount. Raises WrongByteError, OSError."""
    private = Path(tempfile.mkdtemp(prefix="exerciser-", dir=directory))
    paths = [private / "file"] + ([also / private.name / "file"] if also else [])
    match mode:
        case Mode.MIXED | Mode.DIRECT:
            Exerciser(paths, seed, direct=mode is Mode.DIRECT).run(ops)
        case Mode.REGIONS:
            exercise_regions(paths, seed, ops)
        case Mode.APPEND:
            exercise_append(paths, seed, ops)
    for name in private.iterdir():
        name.unlink()
    private.rmdir()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exercise one file; on a wrong byte print what is known, leave the file for inspection, and exit with 1."""
    parser = argparse.ArgumentParser(prog="exerciser", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path, help="directory on the file system under test")
    parser.add_argument("--also", type=Path, help="the same directory through another mount")
    parser.add_argument("--mode", type=Mode, choices=list(Mode), default=Mode.MIXED)
    parser.add_argument("--ops", type=int, default=1000, help="number of operations (of each process)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        exercise(options.mode, options.path, options.also, options.seed, options.ops)
    except (WrongByteError, OSError) as error:
        sys.stdout.write(f"{options.mode.value}, {error}\n")
        return 1
    sys.stdout.write(f"{options.mode.value}: {options.ops} operations, seed {options.seed}: every byte is right\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
