"""What the companion library adds to a real mount: settings of the connection, kept caches, callers that are freed."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Mount, running_cluster
from posix_help import ALICE, as_user, opened, refused, unreclaimable, wait_until

from benchfs_fuse import companion, kernel_mounts

MIB = 1 << 20
#: Seconds for a caller to be freed: what a loaded machine may take. The deadline of operations is 30 s.
FREED_S = 15.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def mount(cluster: Cluster) -> Mount:
    return cluster.mount()


def status(mount: Mount) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchfs_fuse.cli", "status", str(mount.mountpoint), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def daemons_of(mount: Mount) -> list[dict[str, Any]]:
    daemons = status(mount)["daemons"]
    assert isinstance(daemons, list)
    return daemons


def served(mount: Mount, request: str) -> int:
    """Count the requests of a kind that the daemons have served."""
    return sum(daemon["status"]["requests"].get(request, 0) for daemon in daemons_of(mount))


def test_the_library_is_built_here() -> None:
    assert companion.LIBRARY.find() is not None


def test_a_hook_that_fails_answers_eio(caplog: pytest.LogCaptureFixture) -> None:
    """Where a function raises, ctypes returns what lies about: that would be sent as an answer."""

    def raising(ino: int) -> int:
        raise MemoryError("no more")

    assert companion._answering("getattr_now", raising)(1) == -errno.EIO
    assert companion._answering("getattr_now", lambda ino: ino)(105) == 105
    assert "getattr_now failed" in caplog.text and "no more" in caplog.text


def test_data_of_an_answer_is_kept_until_the_next() -> None:
    """In a process of its own: the library is loaded once, before pyfuse3."""
    script = """
import weakref
from benchfs_fuse import companion
class Buffer(bytearray): pass
library = companion.load()
assert library is not None
data = Buffer(b"x" * 1000)
seen = weakref.ref(data)
library.append(memoryview(data)[:10])
del data
assert seen() is not None
library.append(memoryview(b""))
assert seen() is None
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_connection_is_set_up_without_root(mount: Mount) -> None:
    mounted = kernel_mounts.find(mount.mountpoint)
    assert mounted is not None
    assert int((kernel_mounts.connection(mounted.minor) / "max_background").read_text()) == 256
    assert int((kernel_mounts.connection(mounted.minor) / "congestion_threshold").read_text()) == 192


def test_the_loop_does_not_wait_for_a_request_that_the_kernel_has_taken_back(mount: Mount) -> None:
    """Those of killed callers: a read that waits for the next one would hold up everything else."""
    files = {int(link.name): link.readlink() for link in Path(f"/proc/{mount.pid}/fd").iterdir()}
    (device,) = (fd for fd, path in files.items() if path == Path("/dev/fuse"))
    info = dict(line.split(":", 1) for line in Path(f"/proc/{mount.pid}/fdinfo/{device}").read_text().splitlines())
    assert int(info["flags"], 8) & os.O_NONBLOCK


# ── kept caches ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_written_and_read_stays_in_the_cache_until_it_changes_elsewhere(
    cluster: Cluster, mount: Mount
) -> None:
    other = cluster.mount()
    content = os.urandom(3 * MIB)
    path, there = mount.mountpoint / "kept", other.mountpoint / "kept"
    path.write_bytes(content)
    with unreclaimable(path):
        assert path.read_bytes() == content
        before = served(mount, "ReadChunk")
        with opened(path, os.O_RDWR) as fd:
            for round_ in range(5):  # our own writes change the times, and nothing is read again
                content = b"%d" % round_ + content[1:]
                os.pwrite(fd, b"%d" % round_, 0)
                os.fsync(fd)
                assert os.pread(fd, len(content), 0) == content
        assert path.read_bytes() == content
        assert served(mount, "ReadChunk") == before
        content = content[:-1] + bytes([content[-1] ^ 1])
        there.write_bytes(content)
        assert path.read_bytes() == content
        assert served(mount, "ReadChunk") > before


def test_a_file_that_stays_open_is_read_anew_when_its_change_elsewhere_is_noticed(
    cluster: Cluster, mount: Mount
) -> None:
    other = cluster.mount()
    path, there = mount.mountpoint / "noticed", other.mountpoint / "noticed"
    path.write_bytes(b"a" * 10_000)
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 10_000, 0) == b"a" * 10_000
        for content in (b"b" * 10_000, b"c" * 10_000, b"d" * 10_000):
            before = os.fstat(fd).st_mtime_ns
            there.write_bytes(content)
            wait_until(lambda before=before: os.fstat(fd).st_mtime_ns != before)  # type: ignore[misc]
            assert os.pread(fd, 10_000, 0) == content


def test_what_was_appended_elsewhere_is_read_as_soon_as_the_size_tells_of_it(cluster: Cluster) -> None:
    here, there = (cluster.mount("--attr-timeout", "0").mountpoint / "grows" for _ in range(2))
    here.write_bytes(b"start")
    with opened(here, os.O_RDONLY) as fd:
        for round_ in range(50):
            end = 5 + 3 * round_
            assert len(os.pread(fd, 1000, 0)) == end  # the last page is cached, zeros behind the end
            with opened(there, os.O_WRONLY | os.O_APPEND) as appending:
                os.write(appending, b"abc")
            wait_until(lambda end=end: os.fstat(fd).st_size == end + 3)  # type: ignore[misc]
            assert os.pread(fd, 3, end) == b"abc"


def test_a_change_elsewhere_is_noticed_after_an_append_of_ours(cluster: Cluster, mount: Mount) -> None:
    other = cluster.mount()
    path, there = mount.mountpoint / "both", other.mountpoint / "both"
    path.write_bytes(b"a" * 100)
    with opened(path, os.O_RDONLY) as fd:
        with opened(path, os.O_WRONLY | os.O_APPEND) as appending:
            os.write(appending, b"a" * 100)
        assert os.pread(fd, 200, 0) == b"a" * 200
        before = os.fstat(fd).st_mtime_ns
        with opened(there, os.O_WRONLY) as writing:
            os.pwrite(writing, b"b" * 200, 0)
        wait_until(lambda: os.fstat(fd).st_mtime_ns != before)
        assert os.pread(fd, 200, 0) == b"b" * 200


def test_permissions_that_change_elsewhere_together_with_data_hold(cluster: Cluster, mount: Mount) -> None:
    other = cluster.mount("--attr-timeout", "0")
    path, there = mount.mountpoint / "private", other.mountpoint / "private"
    for round_ in range(10):
        path.write_bytes(b"public %d" % round_)
        path.chmod(0o644)
        with as_user(ALICE):
            assert there.read_bytes() == b"public %d" % round_
        path.write_bytes(b"private %d" % round_)
        path.chmod(0o600)
        with as_user(ALICE), refused(errno.EACCES):
            os.open(there, os.O_RDONLY)
        assert there.read_bytes() == b"private %d" % round_


def test_an_acl_set_here_holds_at_once(mount: Mount) -> None:
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, permissions, qualifier)
        for tag, permissions, qualifier in [
            *((1, 6, 0xFFFFFFFF), (2, 0, ALICE), (4, 0, 0xFFFFFFFF), (16, 6, 0xFFFFFFFF), (32, 4, 0xFFFFFFFF)),
        ]
    )
    for number in range(10):
        path = mount.mountpoint / f"acl {number}"
        path.touch()
        path.chmod(0o604)
        os.setxattr(path, "system.posix_acl_access", acl)
        with as_user(ALICE), refused(errno.EACCES):
            os.open(path, os.O_RDONLY)


def test_an_append_is_seen_through_a_cached_handle(mount: Mount) -> None:
    path = mount.mountpoint / "appended"
    path.write_bytes(b"start")
    content = b"start"
    with opened(path, os.O_RDONLY) as cached, opened(path, os.O_WRONLY | os.O_APPEND) as appending:
        for piece in (b"a", b"bb" * 3000, b"c", os.urandom(MIB)):
            assert os.pread(cached, 2 * MIB, 0) == content
            os.write(appending, piece)
            content += piece
            assert os.pread(cached, 2 * MIB, 0) == content
    os.close(os.open(path, os.O_RDONLY))
    assert path.read_bytes() == content


# ── freed callers ────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def silent(cluster: Cluster) -> Iterator[None]:
    """Have all daemons connected and silent."""
    for daemon in cluster.daemons:
        daemon.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for daemon in cluster.daemons:
            daemon.signal(signal.SIGCONT)


@pytest.fixture
def unreachable(cluster: Cluster, mount: Mount) -> Iterator[Path]:
    """Give a file whose daemon is missing, through ``mount``; the daemon is back afterwards, and nothing is left."""
    path = mount.mountpoint / "unreachable"
    path.write_bytes(b"x" * MIB)
    layout = json.loads(
        subprocess.run(
            [sys.executable, "-m", "benchfs_fuse.cli", "layout", str(path), "--json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    pids = {daemon["daemon_id"]: daemon["status"]["pid"] for daemon in daemons_of(mount)}
    number = [daemon.pid for daemon in cluster.daemons].index(pids[layout["daemon"]])
    cluster.daemons[number].kill()
    yield path
    cluster.restart_daemon(number)
    assert path.read_bytes() == b"x" * MIB
    wait_until(lambda: status(mount)["handles"] == 0)


def waiting(program: str, path: Path) -> subprocess.Popen[bytes]:
    """Start a process that says that it is about to call, and calls."""
    prelude = "import os, signal, sys\npath = sys.argv[1]\n"
    child = subprocess.Popen([sys.executable, "-c", prelude + program, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"now\n"
    wait_until(lambda: _sleeps(child.pid))
    return child


def _sleeps(pid: int) -> bool:
    """Tell whether a process waits for an answer of the file system: in these functions of fs/fuse, or for a page."""
    return Path(f"/proc/{pid}/wchan").read_text() in (
        *("request_wait_answer", "fuse_direct_IO", "__fuse_simple_request", "folio_wait_bit_common"),
    )


CALLS = {
    "stat": "os.stat(path + '.none')",
    "open": "os.open(path, os.O_RDWR)",
    "create": "os.open(path + '.new', os.O_RDWR | os.O_CREAT)",
    "unlink": "os.unlink(path + '.none')",
    "listing": "os.listdir(os.path.dirname(path))",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_killed_caller_dies_while_its_daemon_is_unreachable(unreachable: Path, call: str) -> None:
    with waiting(f"print('now', flush=True)\n{call}", unreachable) as child:
        child.kill()
        assert child.wait(FREED_S) == -signal.SIGKILL


def test_a_signal_frees_a_caller_with_eintr(unreachable: Path) -> None:
    child = waiting(
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print('now', flush=True)\n"
        "result = libc.open(os.fsencode(path), os.O_RDONLY)\n"
        "print(result, ctypes.get_errno(), flush=True)\n",
        unreachable,
    )
    child.send_signal(signal.SIGUSR1)
    out, _ = child.communicate(timeout=FREED_S)
    assert out == b"-1 %d\n" % errno.EINTR


#: Calls on 8 MiB that no page cache holds, as lines of a program that has them open.
UNCACHED = {
    "a buffered read": "call(libc.pread, fd, room, 4096, ctypes.c_int64(1 << 20))",
    "a direct read": "call(libc.pread, direct, room, 4096, ctypes.c_int64(2 << 20))",
    "a direct write": "call(libc.pwrite, direct, room, 4096, ctypes.c_int64(2 << 20))",
    "a page fault": "mapped[3 << 20]",
    "a call given a mapping": "call(libc.write, os.memfd_create('x'), ctypes.c_void_p(start + (4 << 20)), 4096)",
    "an fsync": "call(libc.fsync, fd)",
}
#: A handled signal writes its number; so does what a call returns, with its errno.
UNCACHED_PROGRAM = """
import ctypes, mmap, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda *_: None)
def call(function, *arguments):
    print(function(*arguments), ctypes.get_errno(), flush=True)
fd, direct = os.open(sys.argv[1], os.O_RDWR), os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
mapped, page = mmap.mmap(fd, 8 << 20), mmap.mmap(-1, 4096)
room = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page)))
start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
print("now", flush=True)
sys.stdin.readline()
os.set_blocking(1, False)
signal.set_wakeup_fd(1)
"""


@contextlib.contextmanager
def held_in(cluster: Cluster, mount: Mount, names: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Have processes that wait in these calls for daemons that are silent; all has to be well afterwards."""
    paths = [mount.mountpoint / name for name in names]
    with contextlib.ExitStack() as stack:
        children = []
        for name, path in zip(names, paths, strict=True):
            path.write_bytes(bytes(8 * MIB))
            program = UNCACHED_PROGRAM + UNCACHED[name]
            child = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            stack.callback(child.kill)
            assert child.stdout is not None and child.stdout.readline() == b"now\n"
            children.append(child)
            with opened(path) as fd:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with silent(cluster):
            for child in children:
                assert child.stdin is not None
                child.stdin.write(b"go\n")
                child.stdin.flush()
                wait_until(functools.partial(_sleeps, child.pid))
            yield children
    wait_until(lambda: status(mount)["handles"] == 0)
    assert all(path.read_bytes() == bytes(8 * MIB) for path in paths)


def test_a_killed_caller_dies_while_its_daemons_are_silent(cluster: Cluster, mount: Mount) -> None:
    with held_in(cluster, mount, ["a buffered read", "a page fault", "an fsync"]) as children:
        for child in children:
            child.kill()
        assert [child.wait(FREED_S) for child in children] == [-signal.SIGKILL] * len(children)


def test_a_caller_can_handle_a_signal_while_its_daemons_are_silent(cluster: Cluster, mount: Mount) -> None:
    with held_in(cluster, mount, list(UNCACHED)) as children:
        for child in children:
            child.send_signal(signal.SIGUSR1)
        for name, child in zip(UNCACHED, children, strict=True):
            assert child.stdout is not None
            assert select.select([child.stdout], [], [], FREED_S)[0], name
            assert child.stdout.read(1) == b"%c" % signal.SIGUSR1
            if name != "a page fault":  # which is begun again
                error = errno.EFAULT if name == "a call given a mapping" else errno.EINTR
                assert (name, child.stdout.readline()) == (name, b"-1 %d\n" % error)
            child.kill()


def test_a_reader_and_a_writer_are_freed(cluster: Cluster, mount: Mount) -> None:
    path = mount.mountpoint / "long"
    path.write_bytes(b"y" * 9 * MIB)  # three chunks: one at least with the daemon that goes
    program = (
        "import mmap, os, sys\nfd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)\nroom = mmap.mmap(-1, 1 << 20)\n"
        "print('now', flush=True)\nsys.stdin.readline()\n"
        "for offset in range(0, 9 << 20, 1 << 20): os.{call}(fd, [room], offset)\n"
    )
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        program.format(call=call),
                        str(path),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            for call in ("preadv", "pwritev")
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"now\n"
        cluster.daemons[1].kill()
        try:
            for child in children:
                assert child.stdin is not None
                child.stdin.write(b"go\n")
                child.stdin.flush()
                wait_until(functools.partial(_sleeps, child.pid))
                child.kill()
                assert child.wait(FREED_S) == -signal.SIGKILL
        finally:
            cluster.restart_daemon(1)
    wait_until(lambda: status(mount)["handles"] == 0)


def test_a_process_that_exits_with_unflushed_bytes_is_freed(cluster: Cluster, mount: Mount) -> None:
    path = mount.mountpoint / "exits"
    path.write_bytes(b"")
    program = (
        "import os, sys\nfd = os.open(sys.argv[1], os.O_WRONLY)\nprint('now', flush=True)\nsys.stdin.readline()\n"
        "os.write(fd, bytes(9 << 20))\nos._exit(7)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"now\n"
        with silent(cluster):
            child.stdin.write(b"go\n")
            child.stdin.flush()
            assert child.wait(FREED_S) == 7
    wait_until(lambda: status(mount)["handles"] == 0)
    assert path.read_bytes() == bytes(9 * MIB)


def test_a_process_that_exits_with_a_lock_is_freed(cluster: Cluster, mount: Mount) -> None:
    path = mount.mountpoint / "exits-locked"
    path.write_bytes(b"")
    program = (
        "import fcntl, os, sys\nfd = os.open(sys.argv[1], os.O_RDWR)\nfcntl.lockf(fd, fcntl.LOCK_EX)\n"
        "print('now', flush=True)\nsys.stdin.readline()\nos._exit(7)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"now\n"
        with silent(cluster):
            child.stdin.write(b"go\n")
            child.stdin.flush()
            assert child.wait(FREED_S) == 7
    wait_until(lambda: status(mount)["handles"] == 0)
    with opened(cluster.mount().mountpoint / "exits-locked") as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_a_freed_caller_changed_is_read_anew(cluster: Cluster, mount: Mount) -> None:
    path = mount.mountpoint / "freed"
    path.write_bytes(b"x" * MIB)
    assert path.read_bytes() == b"x" * MIB
    program = (
        "import ctypes, os, signal, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\nfd = os.open(sys.argv[1], os.O_RDWR)\n"
        "print('now', flush=True)\nsys.stdin.readline()\n"
        "result = libc.fallocate(fd, 3, ctypes.c_int64(0), ctypes.c_int64(65536))\n"
        "print(result, ctypes.get_errno(), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"now\n"
        with silent(cluster):
            child.stdin.write(b"go\n")
            child.stdin.flush()
            wait_until(lambda: _sleeps(child.pid))
            child.send_signal(signal.SIGUSR1)
            assert child.stdout.readline() == b"-1 %d\n" % errno.EINTR
            assert child.wait(FREED_S) == 0  # its file is closed before anything is done
    wait_until(lambda: path.read_bytes() == bytes(65536) + b"x" * (MIB - 65536))


def test_pages_that_the_kernel_writes_back_wait_for_their_daemon(cluster: Cluster) -> None:
    path = cluster.mount("--gather-bytes", "0").mountpoint / "mapped"
    path.write_bytes(b"x" * MIB)
    program = (
        "import mmap, os, sys\nfd = os.open(sys.argv[1], os.O_RDWR)\nmapped = mmap.mmap(fd, 0)\n"
        "mapped[:] = b'y' * len(mapped)\nprint('now', flush=True)\nsys.stdin.readline()\n"
        "mapped.flush()\nos.fsync(fd)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"now\n"
        with silent(cluster):
            child.stdin.write(b"go\n")
            child.stdin.flush()
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(3)  # longer than a caller who dies would have to wait
        assert child.wait(FREED_S) == 0
    assert path.read_bytes() == b"y" * MIB


def test_a_signal_does_not_disturb_while_the_daemons_answer(mount: Mount) -> None:
    path = mount.mountpoint / "disturbed"
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGALRM, lambda *_: None)\nsignal.siginterrupt(signal.SIGALRM, True)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)\n"
        "import ctypes, fcntl, struct\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def lock(type):\n"
        "    whole = struct.pack('hhqqi4x', type, 0, 0, 0, 0)\n"
        "    assert libc.fcntl(fd, fcntl.F_SETLK, whole) == 0, os.strerror(ctypes.get_errno())\n"
        "for round_ in range(300):\n"
        "    fd = libc.open(os.fsencode(sys.argv[1]), os.O_RDWR | os.O_CREAT, 0o644)\n"
        "    assert fd >= 0, os.strerror(ctypes.get_errno())\n"
        "    lock(fcntl.F_WRLCK)\n"
        "    assert libc.pwrite(fd, b'abc', 3, 3 * round_) == 3, os.strerror(ctypes.get_errno())\n"
        "    assert libc.fsync(fd) == 0, os.strerror(ctypes.get_errno())\n"
        "    lock(fcntl.F_UNLCK)\n"
        "    assert libc.close(fd) == 0\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=120)
    assert path.read_bytes() == b"abc" * 300
