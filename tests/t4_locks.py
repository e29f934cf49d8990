"""Locks across two real mounts: processes that exclude each other, wait, are interrupted and are killed."""

import fcntl
import os
import random
import select
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Mount, running_cluster
from posix_help import opened, wait_until

from benchfs_fuse import control
from benchfs_fuse.testing.syscalls import getlk, setlk

#: Seconds for what takes milliseconds: what a loaded machine may take.
SOON_S = 20.0

F_OFD_SETLK, F_OFD_SETLKW = 37, 38

#: Take a lock of one of three kinds, as ``lock(fd, kind, type, wait)``; whole file.
LOCKING = f"""
import errno, fcntl, os, signal, struct, sys, time
OPS = {{"posix": (fcntl.F_SETLK, fcntl.F_SETLKW), "ofd": ({F_OFD_SETLK}, {F_OFD_SETLKW})}}
def lock(fd, kind, type, wait=True):
    if kind == "flock":
        op = {{fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}}[type]
        fcntl.flock(fd, op | (0 if wait else fcntl.LOCK_NB))
    else:
        fcntl.fcntl(fd, OPS[kind][wait], struct.pack("hhqqi4x", type, 0, 0, 0, 0))
"""

#: Add one to the number in a file, again and again; say each time that it is done.
COUNTING = (
    LOCKING
    + """
path, kind, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
for _ in range(rounds):
    fd = os.open(path, os.O_RDWR)
    lock(fd, kind, fcntl.F_WRLCK)
    number = int(os.pread(fd, 20, 0) or b"0")
    os.pwrite(fd, b"%020d" % (number + 1), 0)
    lock(fd, kind, fcntl.F_UNLCK)
    os.write(1, b".")
    os.close(fd)
"""
)

#: Wait for a lock; say before and after; a SIGUSR1 raises, and what it raised is told.
WAITING = (
    LOCKING
    + """
def interrupt(number, frame):
    raise InterruptedError
signal.signal(signal.SIGUSR1, interrupt)
fd = os.open(sys.argv[1], os.O_RDWR)
os.write(1, b"w")
try:
    lock(fd, sys.argv[2], fcntl.F_WRLCK)
    os.write(1, b"g")
except InterruptedError:
    os.write(1, b"i")
sys.stdin.read()
"""
)

#: Insert rows, each in a transaction of its own.
INSERTING = """
import sqlite3, sys
path, name, rows = sys.argv[1:]
db = sqlite3.connect(path, timeout=120, isolation_level=None)
for number in range(int(rows)):
    db.execute("begin immediate")
    db.execute("insert into rows values (?, ?)", (name, number))
    db.execute("commit")
"""

pytest_plugins = ("mounts",)

KINDS = ("posix", "ofd", "flock")


def run(script: str, *arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def said(process: "subprocess.Popen[bytes]", within_s: float = SOON_S) -> bytes:
    """Return what a process says next; empty if it says nothing within that time."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], within_s)
    return os.read(process.stdout.fileno(), 1) if ready else b""


@pytest.fixture
def waiters() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Collect processes that are killed at the end."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def take(path: Path, kind: str, wait: bool = False) -> int:
    """Lock a file exclusively; return the descriptor, which holds the lock."""
    fd = os.open(path, os.O_RDWR)
    try:
        if kind == "flock":
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            ops = {"posix": (fcntl.F_SETLK, fcntl.F_SETLKW), "ofd": (F_OFD_SETLK, F_OFD_SETLKW)}[kind]
            fcntl.fcntl(fd, ops[wait], struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    except BaseException:
        os.close(fd)
        raise
    return fd


@pytest.mark.parametrize("kind", KINDS)
def test_many_processes_of_two_mounts_count_together_though_some_are_killed(
    mountpoint: Path, mountpoint2: Path, kind: str
) -> None:
    (mountpoint / "number").write_bytes(b"%020d" % 0)
    rounds, choose = 25, random.Random(kind)
    doomed = choose.sample(range(8), 3)
    processes = [
        run(COUNTING, (mountpoint, mountpoint2)[at % 2] / "number", kind, 1_000_000 if at in doomed else rounds)
        for at in range(8)
    ]
    told = 0
    for at in doomed:
        for _ in range(choose.randrange(2, 10)):
            assert said(processes[at], 120) == b"."
            told += 1
        processes[at].kill()
    for at, process in enumerate(processes):
        dots = process.communicate(timeout=240)[0]
        told += len(dots)
        assert process.returncode == (-signal.SIGKILL if at in doomed else 0)
        assert at in doomed or len(dots) == rounds
    # Who was killed may have counted once without telling.
    assert told <= int((mountpoint / "number").read_bytes()) <= told + len(doomed)


#: Say, for each number that comes in, whether it is the byte to be read under a shared lock of a byte of one's own.
READING = """
import fcntl, os, sys
fd, own = os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2])
for line in sys.stdin:
    fcntl.lockf(fd, fcntl.LOCK_SH, 1, own)
    os.write(1, b"y" if os.pread(fd, 1, 500_000) == bytes([int(line)]) else b"n")
    fcntl.lockf(fd, fcntl.LOCK_UN, 1, own)
"""


def test_all_who_get_locks_at_once_read_what_was_written_elsewhere(mountpoint: Path, mountpoint2: Path) -> None:
    """The first one has the kernel drop its pages; the others do not go on before that is done."""
    path, there = mountpoint / "together", mountpoint2 / "together"
    path.write_bytes(bytes(1 << 20))
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READING, str(path), str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for number in range(6)
    ]
    fd = os.open(there, os.O_RDWR)
    try:
        for round_ in range(1, 101):
            fcntl.lockf(fd, fcntl.LOCK_EX, 1, 100)
            os.pwrite(fd, bytes([round_]), 500_000)
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, 100)
            for reader in readers:
                assert reader.stdin is not None
                reader.stdin.write(b"%d\n" % round_)
                reader.stdin.flush()
            assert [said(reader) for reader in readers] == [b"y"] * 6
    finally:
        os.close(fd)
        for reader in readers:
            reader.kill()
            reader.communicate()


def test_sqlite_from_two_mounts_loses_nothing(mountpoint: Path, mountpoint2: Path) -> None:
    with sqlite3.connect(mountpoint / "db") as db:
        db.execute("create table rows (name text, number integer)")
    db.close()
    rows = 15
    places = (mountpoint, mountpoint2) * 3
    processes = [run(INSERTING, place / "db", number, rows) for number, place in enumerate(places)]
    for process in processes:
        process.communicate(timeout=280)
        assert process.returncode == 0
    for place in (mountpoint, mountpoint2):
        db = sqlite3.connect(place / "db")
        assert db.execute("select count(*), count(distinct name || '/' || number) from rows").fetchone() == (
            rows * len(processes),
            rows * len(processes),
        )
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        db.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_interrupts_who_waits_for_a_lock(
    mountpoint: Path, mountpoint2: Path, kind: str, waiters: list["subprocess.Popen[bytes]"]
) -> None:
    (mountpoint / "f").touch()
    fd = take(mountpoint / "f", kind)
    waiter = run(WAITING, mountpoint2 / "f", kind)
    waiters.append(waiter)
    assert said(waiter) == b"w" and said(waiter, 1.0) == b""
    waiter.send_signal(signal.SIGUSR1)
    assert said(waiter) == b"i"
    os.close(fd)
    _free_soon(mountpoint / "f", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_waiter_leaves_nothing_behind(
    mountpoint: Path, mountpoint2: Path, kind: str, waiters: list["subprocess.Popen[bytes]"]
) -> None:
    (mountpoint / "f").touch()
    fd = take(mountpoint / "f", kind)
    waiter = run(WAITING, mountpoint2 / "f", kind)
    waiters.append(waiter)
    assert said(waiter) == b"w" and said(waiter, 1.0) == b""
    waiter.kill()
    waiter.wait(SOON_S)
    os.close(fd)
    _free_soon(mountpoint2 / "f", kind)


def _free_soon(path: Path, kind: str) -> None:
    """Check that a lock can be had, as soon as the kernel has closed what was killed."""

    def free() -> bool:
        try:
            os.close(take(path, kind))
        except BlockingIOError:
            return False
        return True

    wait_until(free, SOON_S)


@pytest.mark.parametrize("kind", KINDS)
def test_who_waits_goes_on_when_the_holder_is_killed(
    mountpoint: Path, mountpoint2: Path, kind: str, waiters: list["subprocess.Popen[bytes]"]
) -> None:
    (mountpoint / "f").touch()
    holder, waiter = run(WAITING, mountpoint / "f", kind), None
    waiters.append(holder)
    assert said(holder) == b"w" and said(holder) == b"g"
    waiter = run(WAITING, mountpoint2 / "f", kind)
    waiters.append(waiter)
    assert said(waiter) == b"w" and said(waiter, 1.0) == b""
    holder.kill()
    assert said(waiter) == b"g"


def test_a_child_that_ends_takes_no_lock_of_its_parent_along(mountpoint: Path, mountpoint2: Path) -> None:
    """The parent has closed what both shared, and locks the file anew: the last close of the old one is another's."""
    path = mountpoint / "inherited"
    path.touch()
    first = take(path, "posix")
    reader, writer = os.pipe()
    with subprocess.Popen(["cat"], stdin=reader, pass_fds=[first]) as child:
        os.close(reader)
        os.close(first)
        second = take(path, "posix")
        os.close(writer)
        assert child.wait(SOON_S) == 0
    try:
        (mountpoint / "behind it").touch()  # RELEASE was sent before this, and its requests go on in order
        with pytest.raises(BlockingIOError):
            os.close(take(mountpoint2 / "inherited", "posix"))
    finally:
        os.close(second)
    os.close(take(mountpoint2 / "inherited", "posix"))


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """Give a cluster whose processes may be killed."""
    with running_cluster() as cluster:
        yield cluster


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "flock" else pytest.mark.slow) for kind in KINDS]
)
def test_who_waits_goes_on_when_the_holders_mount_is_killed(
    own_cluster: Cluster, kind: str, waiters: list["subprocess.Popen[bytes]"]
) -> None:
    doomed, other = own_cluster.mount(), own_cluster.mount()
    (doomed.mountpoint / "f").touch()
    holder = run(WAITING, doomed.mountpoint / "f", kind)
    waiters.append(holder)
    assert said(holder) == b"w" and said(holder) == b"g"
    waiter = run(WAITING, other.mountpoint / "f", kind)
    waiters.append(waiter)
    assert said(waiter) == b"w" and said(waiter, 1.0) == b""
    doomed.kill()
    assert said(waiter) == b"g"


def in_grace(mount: Mount) -> bool:
    """Tell whether a daemon is missing, or waits for mounts to claim their locks: then nobody else gets any."""
    record = control.read_record(mount.mountpoint)
    assert record is not None
    *_, report = control.ask(record, control.Question("status"), SOON_S)
    return any(daemon.status is None or daemon.status["grace"] for daemon in report.daemons)


@pytest.mark.slow
def test_locks_are_kept_over_a_restart_of_the_daemons(own_cluster: Cluster) -> None:
    one, other = own_cluster.mount(), own_cluster.mount()
    held = {}
    for kind in KINDS:
        (one.mountpoint / kind).touch()
        held[kind] = take(one.mountpoint / kind, kind)
    for daemon in own_cluster.daemons:
        daemon.kill()
    for number in range(len(own_cluster.daemons)):
        own_cluster.restart_daemon(number)
    wait_until(lambda: not in_grace(other), SOON_S)
    for kind, fd in held.items():
        with pytest.raises(BlockingIOError):
            take(other.mountpoint / kind, kind)
        os.close(fd)
        _free_soon(other.mountpoint / kind, kind)


def test_a_deadlock_of_two_mounts_is_refused(
    mountpoint: Path, mountpoint2: Path, waiters: list["subprocess.Popen[bytes]"]
) -> None:
    (mountpoint / "f").touch()
    script = (
        LOCKING
        + """
def one(op, byte):
    fcntl.fcntl(fd, op, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, byte, 1, 0))
fd = os.open(sys.argv[1], os.O_RDWR)
mine = int(sys.argv[2])
one(fcntl.F_SETLK, mine)
os.write(1, b"h")
sys.stdin.readline()
try:
    one(fcntl.F_SETLKW, 1 - mine)
    os.write(1, b"g")
except OSError as error:
    os.write(1, b"d" if error.errno == errno.EDEADLK else b"?")
"""
    )
    both = [run(script, place / "f", number) for number, place in enumerate((mountpoint, mountpoint2))]
    waiters += both
    assert [said(process) for process in both] == [b"h", b"h"]
    for process in both:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert sorted(said(process) for process in both) == [b"d", b"g"]


def test_f_getlk_names_the_process_that_holds_a_lock(
    mountpoint: Path, mountpoint2: Path, waiters: list["subprocess.Popen[bytes]"]
) -> None:
    (mountpoint / "f").touch()
    holder = run(WAITING, mountpoint / "f", "posix")
    waiters.append(holder)
    assert said(holder) == b"w" and said(holder) == b"g"
    fd = os.open(mountpoint2 / "f", os.O_RDWR)
    asked = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 5, 1, 0)
    type_, _, start, length, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    os.close(fd)
    assert (type_, start, length, pid) == (fcntl.F_WRLCK, 0, 0, holder.pid)


def test_getlk_names_who_took_a_lock_of_an_open_file_description(mountpoint: Path) -> None:
    path = mountpoint / "described"
    path.write_bytes(b"0123456789")
    with opened(path) as one, opened(path) as other:
        setlk(one, fcntl.F_WRLCK, 2, 3, ofd=True)
        assert getlk(other, fcntl.F_RDLCK, 0, 0, ofd=False) == (fcntl.F_WRLCK, 2, 3, os.getpid())
        setlk(one, fcntl.F_UNLCK, 2, 3, ofd=True)
        assert getlk(other, fcntl.F_RDLCK, 0, 0, ofd=False)[0] == fcntl.F_UNLCK
