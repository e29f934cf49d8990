"""Measure what a file system gives by itself: bare io_uring and plain calls, on files like those of the chunk store."""

import enum
import errno
import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ..chunks.uring import BareRing, filesystem_of
from ..errors import UserError
from ..kernel_mounts import above
from ..limits import MIB

#: The kernel's switch for all caches of a machine (proc(5)), and what it gets: pages, entries and inodes.
_DROP_FILE = Path("/proc/sys/vm/drop_caches")
_DROP_ALL = "3"
#: Every file is visited in this one order, which no read-ahead foresees.
_SEED = 1


class Way(enum.StrEnum):
    """Name what is measured."""

    URING_WRITE = "io_uring write"
    URING_READ = "io_uring read"
    PLAIN_WRITE = "pwrite"
    PLAIN_READ = "pread"

    @property
    def writes(self) -> bool:
        """Tell whether it writes."""
        return self in (Way.URING_WRITE, Way.PLAIN_WRITE)


def measure(directory: Path, way: Way, length: int, count: int, *, cold: bool = False) -> list[int]:
    """Return the ns of ``count`` operations of ``length`` bytes, one after the other, on an unnamed file. OSError.

    Writes make the file grow from nothing, as a new file does. Reads find all of it written, and jump about in it;
    ``cold``, none of it is in the page cache.
    """
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        buffer = memoryview(mmap.mmap(-1, max(length, mmap.PAGESIZE)))[:length]
        buffer[:] = bytes(length)
        offsets = [index * length for index in range(count)] if way.writes else scattered(length, count)
        if not way.writes:
            for offset in sorted(offsets):
                _whole(os.pwritev(file.fileno(), [buffer], offset), length, directory)
        if cold:
            _forget(file.fileno())
        ring = BareRing(buffer)
        try:
            return _time_each(_operation(way, ring, file.fileno(), buffer), offsets, length, directory)
        finally:
            ring.close()


def _operation(way: Way, ring: BareRing, fd: int, buffer: memoryview) -> Callable[[int], int]:
    """Return what is timed, by offset."""
    if way is Way.URING_WRITE:
        return lambda offset: ring.write(fd, offset)
    if way is Way.URING_READ:
        return lambda offset: ring.read(fd, offset)
    if way is Way.PLAIN_WRITE:
        return lambda offset: os.pwritev(fd, [buffer], offset)
    return lambda offset: os.preadv(fd, [buffer], offset)


def _time_each(operate: Callable[[int], int], offsets: list[int], length: int, directory: Path) -> list[int]:
    times = []
    for offset in offsets:
        start = time.perf_counter_ns()
        done = operate(offset)
        times.append(time.perf_counter_ns() - start)
        _whole(done, length, directory)
    return times


def _whole(done: int, length: int, directory: Path) -> None:
    """Refuse a write that stopped short: the disk is full."""
    if done != length:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def scattered(length: int, count: int) -> list[int]:
    """Return the offsets of ``count`` blocks of ``length`` bytes in an order that no read-ahead foresees."""
    offsets = [index * length for index in range(count)]
    random.Random(_SEED).shuffle(offsets)
    return offsets


def drop_caches(data_dir: Path) -> str:
    """Have the kernel forget the pages of all chunk files below a data directory; return in words what was done.

    As root, all caches of the machine besides: what the metadata store has on disk becomes cold too.
    """
    for path in sorted((data_dir / "chunks").rglob("*")):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _forget(fd)
            finally:
                os.close(fd)
    if os.geteuid() != 0:
        return "the pages of the chunk files dropped, without root no others"
    try:
        _DROP_FILE.write_text(_DROP_ALL)
    except OSError as error:
        return f"the pages of the chunk files dropped, no others ({_DROP_FILE}: {error.strerror})"
    return "all caches of the machine dropped"


def _forget(fd: int) -> None:
    """Drop a file's pages; dirty ones have to be written first."""
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def describe(directory: Path) -> str:
    """Say in words what holds a directory."""
    mounted = above(directory)
    return f"{filesystem_of(directory)} on {mounted.source if mounted else '?'}"


def check_writable(directory: Path, length: int) -> None:
    """Refuse a directory that cannot be written, or has less than ``length`` bytes of room. UserError."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
        space = os.statvfs(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    free = space.f_bavail * space.f_frsize
    if free < length:
        raise UserError(f"{directory} has {free / MIB:.0f} MiB free, the measurement needs {-(-length // MIB)} MiB")
