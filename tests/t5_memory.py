"""Memory is bounded, and what was used for names that are gone is given back: real daemons under a real mount."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pyfuse3
import pytest
from cluster import Cluster, Mount, Process, running_cluster
from elsewhere import Elsewhere
from posix_help import wait_until
from pyfuse3 import RequestContext
from whole import whole_cluster

from benchfs_fuse.fuse import BenchfsOperations
from benchfs_fuse.limits import CHUNK_SIZE_MIN, MIB
from benchfs_fuse.model import Attrs
from benchfs_fuse.services.known import Known
from benchfs_fuse.testing.syscalls import DirStream

DAEMONS = 2
DIRECTORIES = 20
#: Processes that work at once.
WORKERS = 4
#: Seconds for what goes on in the background: the chunks of so many files.
DEADLINE_S = 300.0
#: A second cycle may add so much to what a process had after the first.
GROWTH_MAX = 0.05


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running_cluster(DAEMONS) as cluster:
        yield cluster


def resident(process: Process) -> int:
    """Return the bytes of memory that a process has, shared libraries included."""
    match = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def at_rest(cluster: Cluster, mount: Mount) -> bool:
    """Tell whether nothing is open and nobody has anything left to do."""
    report = mount.report()
    mine = report.handles == report.files == report.dirty_files == report.accepted_bytes == 0
    return mine and cluster.at_rest(mount)


def make(directory: Path, count: int) -> None:
    """Make a directory with files, a tenth of which have some content."""
    directory.mkdir()
    for number in range(count):
        fd = os.open(directory / f"file{number}", os.O_CREAT | os.O_WRONLY)
        if number % 10 == 0:
            os.write(fd, b"content")
        os.close(fd)


def look(directory: Path, count: int) -> None:
    """List a directory with attributes."""
    with os.scandir(directory) as entries:
        assert sum(entry.stat().st_nlink for entry in entries) == count


def remove(directory: Path, count: int) -> None:
    """Remove a directory and what is in it."""
    for number in range(count):
        os.unlink(directory / f"file{number}")
    directory.rmdir()


def cycle(cluster: Cluster, mount: Mount, files: int) -> None:
    """Make, list and remove files, some directories at a time; say how long it took."""
    count = files // DIRECTORIES
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Elsewhere()) for _ in range(WORKERS)]
        for step in (make, look, remove):
            start_s = time.monotonic()
            working = [
                workers[number % WORKERS].start(step, mount.mountpoint / f"d{number}", count)
                for number in range(DIRECTORIES)
            ]
            for future in working:
                future.result()
            cost_us = (time.monotonic() - start_s) / files * 1e6
            sys.stdout.write(f"{files} files, {WORKERS} processes, {step.__name__}: {cost_us:.0f} µs each\n")
    wait_until(lambda: at_rest(cluster, mount), DEADLINE_S)


def check_stores(cluster: Cluster) -> None:
    """Stop everything in order and look into the stores: nothing but the root is left."""
    assert cluster.end() == []
    data_dirs = [cluster.data_dir(number) for number in range(DAEMONS)]
    assert [path for data in data_dirs for path in (data / "chunks").glob("*/*")] == []


def test_nothing_is_left_of_1500_files(cluster: Cluster) -> None:
    mount = cluster.mount()
    cycle(cluster, mount, 1500)
    for daemon in mount.report().daemons:
        assert daemon.in_flight <= 1  # the question itself
        assert daemon.status is not None
        sessions = cast(list[dict[str, object]], daemon.status["sessions"])
        assert [session["opens"] for session in sessions if session["kind"] == "mount"] == [0]
    assert os.listdir(mount.mountpoint) == []
    check_stores(cluster)


@pytest.mark.slow
def test_a_second_cycle_of_200000_files_takes_no_more_memory(cluster: Cluster) -> None:
    mount = cluster.mount()
    processes: dict[str, Process] = {"mount": mount}
    processes |= {f"daemon {number}": daemon for number, daemon in enumerate(cluster.daemons)}
    fresh = {name: resident(process) for name, process in processes.items()}
    cycle(cluster, mount, 200_000)
    first = {name: resident(process) for name, process in processes.items()}
    cycle(cluster, mount, 200_000)
    second = {name: resident(process) for name, process in processes.items()}
    for name in processes:
        sizes = [f"{found[name] / MIB:.1f}" for found in (fresh, first, second)]
        sys.stdout.write(f"{name}: {sizes[0]} MiB at first, {sizes[1]} after one cycle, {sizes[2]} after two\n")
    for name in processes:
        assert second[name] <= first[name] * (1 + GROWTH_MAX), name
    check_stores(cluster)


@pytest.mark.slow
def test_directories_of_many_entries(cluster: Cluster) -> None:
    """Times are reported, for people: each entry should cost as much in a long directory as in a short one."""
    mount = cluster.mount()
    for count in (1000, 10_000, 100_000):
        directory = mount.mountpoint / f"of{count}"
        directory.mkdir()
        times = [time.monotonic()]
        for number in range(count):
            os.mknod(directory / f"entry{number}")
        times.append(time.monotonic())
        names: list[bytes] = []
        places: list[int] = []
        with DirStream(os.fsencode(directory)) as stream:
            places.append(stream.tell())
            while (name := stream.read()) is not None:
                names.append(name)
                places.append(stream.tell())
            times.append(time.monotonic())
            assert len(set(names)) == len(names) == count + 2
            for position in range(0, len(names), len(names) // 50):
                stream.seek(places[position])
                assert stream.read() == names[position]
        times.append(time.monotonic())
        for name in names:
            if name not in (b".", b".."):
                os.unlink(os.fsencode(directory) + b"/" + name)
        times.append(time.monotonic())
        for what, start, end in (("made", 0, 1), ("listed", 1, 2), ("removed", 3, 4)):
            sys.stdout.write(f"{count} entries {what}: {(times[end] - times[start]) / count * 1e6:.1f} µs each\n")
        assert os.listdir(directory) == []
        directory.rmdir()
    wait_until(lambda: at_rest(cluster, mount), DEADLINE_S)
    check_stores(cluster)


async def test_the_handlers_remember_nothing_of_what_the_kernel_forgot(monkeypatch: pytest.MonkeyPatch) -> None:
    class Caller:
        uid = gid = pid = umask = 0

    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda inode, attr_only=False: None)
    context = cast(RequestContext, Caller())
    async with whole_cluster(2) as whole, whole.client() as client:
        ops = BenchfsOperations(client.namespace, client.files, whole.cluster.nursery, cache_timeout_s=1.0, xattr=True)
        inos = []
        for number in range(1000):
            info, entry = await ops.create(1, b"%d" % number, 0o600, os.O_RDWR, context)
            inos.append(entry.st_ino)
            await ops.flush(info.fh)
            await ops.release(info.fh)
        assert len(ops._told) == 1000
        for number, ino in enumerate(inos):
            await ops.unlink(1, b"%d" % number, context)
            await ops.forget([(ino, 1)])
        assert (ops._told, ops._handles, ops._listings) == ({}, {}, {})
        assert [ino for ino in inos if client.files.known.get(ino) is not None] == []
        counts = client.files.statistics()
        assert counts == (0, 0, 0, 0)
        for daemon in whole.cluster.daemons:
            metadata = whole.service(daemon).metadata
            await metadata.wait_idle()
            assert (metadata.orphans, metadata.to_drop, metadata.prepared, metadata.locked) == (0, 0, 0, 0)


def test_what_is_known_of_inodes_is_bounded() -> None:
    known = Known(count_max=100)
    attrs = Attrs(1, 1, 0o100600, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, CHUNK_SIZE_MIN, 1, 0)
    for ino in range(1, 1001):
        known.see(msgspec.structs.replace(attrs, ino=ino))
    assert sum(known.get(ino) is not None for ino in range(1, 1001)) == 100
    assert known.get(1000) is not None
