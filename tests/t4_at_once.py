"""What is answered in the step in which it is read, on real mounts: that it is, and that the answers are the same."""

import contextlib
import ctypes
import errno
import itertools
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Mount, Process, running_cluster
from posix_help import opened, refused, wait_until

from benchfs_fuse import control
from benchfs_fuse.services.files import RELEASING_MAX

KIB = 1 << 10
#: Names and attributes go past the kernel's caches: every question is one for the mount.
UNCACHED = ("--attr-timeout", "0")

POLLS = len(os.sched_getaffinity(0)) > 1
#: Where the kernel has who waits for an answer: functions of fs/fuse.
WAITING = ("request_wait_answer", "__fuse_simple_request")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def mount(cluster: Cluster) -> Mount:
    return cluster.mount(*UNCACHED)


@pytest.fixture(scope="module")
def plain(cluster: Cluster) -> Mount:
    """Mount so that libfuse writes all answers."""
    return cluster.mount(*UNCACHED, "--no-companion")


def counted(mount: Mount) -> tuple[int, int]:
    """Return how many requests a mount has read, and answered at once."""
    record = control.read_record(mount.mountpoint)
    assert record is not None
    *_, report = control.ask(record, control.Question("count"), 10)
    assert report.counts is not None
    return report.counts.requests, report.counts.at_once


def shares(mount: Mount, work: Callable[[], object]) -> float:
    """Do something many times; return which part of the requests was answered at once."""
    before = counted(mount)
    for _ in range(200):
        work()
    read, at_once = (now - then for now, then in zip(counted(mount), before, strict=True))
    assert read >= 200
    return at_once / read


def test_what_nobody_has_to_be_asked_for_is_always_answered_at_once(mount: Mount) -> None:
    with opened(mount.mountpoint / "gathered", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x")
        assert shares(mount, lambda: os.write(fd, b"x" * 100)) > 0.95  # each write, and a question about capabilities
        assert shares(mount, lambda: os.pwrite(fd, b"y" * 100, 0)) > 0.95


@pytest.mark.skipif(not POLLS, reason="on one processor nobody polls for an answer")
def test_small_calls_are_mostly_answered_at_once(mount: Mount) -> None:
    """Not all, and not while others need the processors: then a daemon takes longer than the mount polls."""
    path = mount.mountpoint / "small"
    path.write_bytes(b"x" * KIB)
    with opened(path) as fd:
        wait_until(lambda: shares(mount, lambda: os.fstat(fd)) > 0.5)
    wait_until(lambda: shares(mount, lambda: os.stat(path)) > 0.5)


@pytest.mark.skipif(not POLLS, reason="on one processor nobody polls for an answer")
def test_closing_a_small_file_is_answered_at_once(mount: Mount) -> None:
    """The bytes and the new size go to their daemons in one step. Each write asks about capabilities first."""
    with opened(mount.mountpoint / "closed", os.O_WRONLY | os.O_CREAT) as fd:

        def write_and_close() -> None:
            os.pwrite(fd, b"x" * 100, 0)
            os.close(os.dup(fd))

        wait_until(lambda: shares(mount, write_and_close) > 0.8)


def test_closes_do_not_wait_for_the_daemon_to_take_the_handles_back(cluster: Cluster, mount: Mount) -> None:
    path = mount.mountpoint / "given back"
    path.write_bytes(b"x" * KIB)
    fds = [os.open(path, os.O_RDONLY) for _ in range(100)]
    wait_until(lambda: opens_of(mount) == 1)
    read, at_once = counted(mount)
    with stopped(cluster.daemons):
        for fd in fds:
            os.close(fd)
        wait_until(lambda: counted(mount)[0] >= read + 200)  # a FLUSH and a RELEASE each
        assert 100 + RELEASING_MAX <= counted(mount)[1] - at_once < 200, "so many are given back at a time"
    wait_until(lambda: opens_of(mount) == 0)
    os.unlink(path)
    wait_until(lambda: cluster.at_rest(mount))


def opens_of(mount: Mount) -> int:
    """Return how many files the daemons know that mounts hold open."""
    return sum(session["opens"] for status in mount.statuses() for session in status["sessions"])


RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd = -100
    if libc.renameat2(at_cwd, os.fsencode(old), at_cwd, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@pytest.mark.skipif(not POLLS, reason="on one processor nobody polls for an answer")
@pytest.mark.parametrize("rename", [os.rename, lambda old, new: renameat2(old, new, RENAME_NOREPLACE)])
def test_renames_of_both_kinds_are_answered_at_once(mount: Mount, rename: Callable[[Path, Path], None]) -> None:
    """Linux has two requests for it: with and without flags. Two of three requests are lookups."""
    names = [mount.mountpoint / "renamed", mount.mountpoint / "renamed back"]
    names[0].write_bytes(b"x")
    turn = itertools.count()

    def there_or_back() -> None:
        number = next(turn) % 2
        rename(names[number], names[1 - number])

    wait_until(lambda: shares(mount, there_or_back) > 0.7)
    (left,) = (path for path in names if path.exists())
    left.unlink()


def test_flags_of_renames_hold(mount: Mount) -> None:
    one, two = mount.mountpoint / "flags one", mount.mountpoint / "flags two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    with refused(errno.EEXIST):
        renameat2(one, two, RENAME_NOREPLACE)
    renameat2(one, two, RENAME_EXCHANGE)
    assert (one.read_bytes(), two.read_bytes()) == (b"2", b"1")
    one.rename(two)
    assert not one.exists() and two.read_bytes() == b"2"


@pytest.mark.parametrize("umask", [0, 0o027, 0o777])
def test_the_umask_counts(mount: Mount, plain: Mount, umask: int) -> None:
    made = []
    before = os.umask(umask)
    try:
        for where in (mount, plain):
            root = where.mountpoint / f"umask {umask:o} {where.mountpoint.name}"
            os.mkdir(root, 0o777)
            root.chmod(0o777)
            os.mkdir(root / "directory", 0o1775)
            with opened(root / "file", os.O_CREAT | os.O_WRONLY, 0o6666):
                pass
            made.append([stat.S_IMODE((root / name).lstat().st_mode) for name in ("directory", "file")])
    finally:
        os.umask(before)
    assert made[0] == made[1]


@contextlib.contextmanager
def stopped(daemons: Sequence[Process]) -> Iterator[None]:
    """Have daemons stand still."""
    for daemon in daemons:
        daemon.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for daemon in daemons:
            daemon.signal(signal.SIGCONT)


# ── the answers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def described(path: Path) -> dict[str, Any]:
    """Return all that stat(2) says."""
    found = path.lstat()
    return {name: getattr(found, name) for name in dir(found) if name.startswith("st_") and name != "st_dev"}


def make_device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o640, os.makedev(4095, 0xFFFFF))


def make_set_id(path: Path) -> None:
    path.write_bytes(b"")
    os.chown(path, 0xFFFFFFF0, 0x80000001)
    path.chmod(0o6755)


def make_old(path: Path) -> None:
    path.write_bytes(b"")
    os.utime(path, ns=(-1, -(10**18) + 1))


def make_new(path: Path) -> None:
    path.write_bytes(b"")
    os.utime(path, ns=(4 * 10**18 + 999_999_999, 2**62 + 7))


def make_large(path: Path) -> None:
    path.write_bytes(b"x" * 5000)
    os.truncate(path, 2**60 + 1)


def make_linked(path: Path) -> None:
    path.write_bytes(b"x" * KIB)
    os.link(path, f"{path}-again")


KINDS: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "device": make_device,
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
    "link": lambda path: path.symlink_to("somewhere" * 20),
    "set-ID": make_set_id,
    "before 1970": make_old,
    "far from now": make_new,
    "large": make_large,
    "two names": make_linked,
}


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_are_told_as_libfuse_tells_them(mount: Mount, plain: Mount, kind: str) -> None:
    for maker, tag in ((mount, "here"), (plain, "there")):
        name = f"{kind} made {tag}"
        KINDS[kind](maker.mountpoint / name)
        here, there = (described(where.mountpoint / name) for where in (mount, plain))
        assert here == there
    assert here["st_ino"] > 1


@pytest.fixture(scope="module")
def remembering(cluster: Cluster) -> Mount:
    """Mount so that the kernel keeps what it is told at once."""
    return cluster.mount("--attr-timeout", "3600")


def test_what_changes_answer_is_what_the_kernel_goes_by(remembering: Mount, plain: Mount) -> None:
    """Of the answers to create, mkdir, chmod, chown, utimes and truncate, all attributes are kept."""
    root, other = remembering.mountpoint / "kept", plain.mountpoint / "kept"
    root.mkdir(0o3775)
    path, there = root / "file", other / "file"
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o4640):
        assert described(path) == described(there)
    steps: Sequence[Callable[[], object]] = (
        lambda: path.chmod(0o751),
        lambda: os.chown(path, 1234, 5678),
        lambda: os.utime(path, ns=(1, 2)),
        lambda: os.utime(path),
        lambda: os.truncate(path, 123_456),
        lambda: path.rename(f"{path}2").rename(path),
    )
    for step in steps:
        step()
        assert described(path) == described(there)


def test_time_outs_are_told(cluster: Cluster, remembering: Mount) -> None:
    path = remembering.mountpoint / "asked once"
    path.write_bytes(b"x")
    path.stat()
    before = counted(remembering)
    for _ in range(100):
        path.stat()
    assert counted(remembering)[0] - before[0] < 10


def test_errors_are_told(mount: Mount) -> None:
    root = mount.mountpoint / "errors"
    (root / "directory" / "full").mkdir(parents=True)
    (root / "file").write_bytes(b"x")
    cases: Sequence[tuple[int, Callable[[], object]]] = (
        (errno.ENOENT, lambda: os.stat(root / "none")),
        (errno.ENOENT, lambda: os.unlink(root / "none")),
        (errno.EEXIST, lambda: os.mkdir(root / "file")),
        (errno.EEXIST, lambda: os.open(root / "file", os.O_CREAT | os.O_EXCL)),
        (errno.ENOTEMPTY, lambda: os.rmdir(root / "directory")),
        (errno.ENOTDIR, lambda: os.rename(root / "directory", root / "file")),
        (errno.ENAMETOOLONG, lambda: os.stat(root / ("n" * 300))),
        (errno.ENODATA, lambda: os.getxattr(root / "file", "security.capability")),
    )
    for number, call in cases:
        with refused(number):
            call()


@pytest.mark.parametrize("length", [1, 4095, 4096, 65_537, 1 << 20, (1 << 20) + 1, 5 << 20])
@pytest.mark.parametrize("flags", [0, os.O_DIRECT, os.O_APPEND])
def test_data_comes_back(mount: Mount, plain: Mount, length: int, flags: int) -> None:
    if flags == os.O_DIRECT:
        length = -(-length // 4096) * 4096
    content = os.urandom(length)
    name = f"data {length} {flags}"
    path = mount.mountpoint / name
    with opened(path, os.O_RDWR | os.O_CREAT | (flags & os.O_APPEND)) as fd:
        assert os.write(fd, content) == length
        assert os.pread(fd, length + 1, 0) == content
        assert os.pread(fd, 1, length) == b""
    assert (plain.mountpoint / name).read_bytes() == path.read_bytes() == content


def test_a_daemon_that_stands_still_holds_up_what_asks_it_and_nothing_else(cluster: Cluster, mount: Mount) -> None:
    """What waits goes on behind pyfuse3, and what nobody has to be asked for is answered meanwhile."""
    path = mount.mountpoint / "held up"
    looking = "import os, sys; sys.stdin.readline(); print(os.stat(sys.argv[1]).st_size)"
    # Begun before the file is open here: a child that closes what it inherits waits for the daemons, too.
    look = subprocess.Popen(
        [sys.executable, "-c", looking, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x" * KIB)
        os.fsync(fd)
        os.write(fd, b"y")
        assert look.stdin is not None
        with stopped(cluster.daemons):
            look.stdin.write("look\n")
            look.stdin.flush()
            wait_until(lambda: Path(f"/proc/{look.pid}/wchan").read_text() in WAITING)
            assert all(os.write(fd, b"z") == 1 for _ in range(10))
            assert look.poll() is None
        size, _ = look.communicate(timeout=60)
        assert KIB < int(size) <= KIB + 11
    assert path.read_bytes() == b"x" * KIB + b"y" + b"z" * 10
