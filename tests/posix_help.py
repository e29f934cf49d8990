"""What the tests of POSIX semantics share: expected refusals, other users, open files, and waiting for others."""

import contextlib
import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ALICE = 1001
BOB = 1002

# Names and attributes may be cached for a second: what another mount did must be seen by then, with room to spare.
SEEN_DEADLINE_S = 10.0


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """Expect the system call inside to fail with this errno."""
    name = errno.errorcode[number]
    with pytest.raises(OSError, check=lambda error: errno.errorcode[error.errno or 0] == name):
        yield


@contextlib.contextmanager
def as_user(uid: int, gid: int | None = None, groups: tuple[int, ...] = ()) -> Iterator[None]:
    """Be another user, of the group with the same number if no other is given, without capabilities."""
    before = os.getgroups()
    gid = uid if gid is None else gid
    os.setgroups(groups)
    os.setresgid(gid, gid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(before)


@contextlib.contextmanager
def opened(path: Path | bytes, flags: int = os.O_RDWR, mode: int = 0o644) -> Iterator[int]:
    """Have a file open."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def unreclaimable(path: Path) -> Iterator[None]:
    """Have the kernel keep what it caches of a file, however short of memory it is; who invalidates it still can.

    Virtual machines may give idle pages back all the time (DAMON): what is cached may go a moment later.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with opened(path) as fd, mmap.mmap(fd, 0) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        if libc.mlock(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped))):
            raise OSError(ctypes.get_errno(), f"mlock of {path}: see ulimit -l")
        del first  # nothing may point into what is unmapped
        yield


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """Have another umask."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """Be in another directory, and return to this one even if it is unreachable by then."""
    with opened(Path("."), os.O_RDONLY | os.O_DIRECTORY) as here:
        os.chdir(path)
        try:
            yield
        finally:
            os.fchdir(here)


def wait_until(condition: Callable[[], bool], deadline_s: float = SEEN_DEADLINE_S) -> None:
    """Wait for what another mount or a task in the background brings about and nothing announces."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"did not come true in {deadline_s} s"
        time.sleep(0.01)


def is_fuse(path: Path) -> bool:
    """Tell whether a FUSE file system is mounted there: some promises are refusals that tmpfs does not make."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return any(line[2] == wanted and line[line.index("-") + 1].startswith("fuse") for line in lines)
