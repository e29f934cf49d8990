"""Kill daemons and mounts of a real cluster with SIGKILL: what was acknowledged stays, once; what nobody holds goes."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from cluster import Cluster, Mount, running_cluster, tmpfs_of
from elsewhere import Elsewhere
from posix_help import opened, wait_until
from strain import Strain

from benchfs_fuse import control, mountpoints
from benchfs_fuse.limits import CHUNK_SIZE_MIN, MIB
from benchfs_fuse.processes import is_defunct

#: Chunks are small, so that small files have chunks on every daemon.
CHUNK = CHUNK_SIZE_MIN
DAEMONS = 2
#: Seconds for what takes one or two: a restart, the end of a dead mount, chunks dropped in the background.
DEADLINE_S = 60.0
#: Where the random operations begin: another number gives others.
SEED = int(os.environ.get("BENCHFS_TEST_SEED", "0"))
#: Operations of each worker around one restart, which takes about a second.
STEPS = 100


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running_cluster(DAEMONS, chunk_size=CHUNK) as cluster:
        yield cluster
        for log in sorted(cluster.directory.glob("*.log")):  # pytest shows it if the test failed
            sys.stdout.write(f"{log.name}:\n{log.read_text()}\n")


@pytest.fixture
def alone() -> Iterator[Cluster]:
    """Run a cluster on disks that nobody else uses."""
    with running_cluster(DAEMONS, chunk_size=CHUNK, make_disk=tmpfs_of(256 * MIB)) as cluster:
        yield cluster


def held_bytes(cluster: Cluster) -> list[int]:
    """Return what the chunk files of each daemon take on its disk."""
    return [
        sum(path.stat().st_blocks * 512 for path in (cluster.data_dir(number) / "chunks").glob("*/*"))
        for number in range(DAEMONS)
    ]


def in_flight(mount: Mount) -> bool:
    """Tell whether a mount waits for a daemon."""
    return any(daemon.in_flight for daemon in mount.report().daemons)


def restart(cluster: Cluster, victims: Sequence[int]) -> None:
    """Kill daemons, all at once, and start them again."""
    for number in victims:
        cluster.daemons[number].popen.kill()
    for number in victims:
        cluster.daemons[number].wait()
    for number in victims:
        cluster.restart_daemon(number)


# ── daemons ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param([0], id="one", marks=pytest.mark.slow),
        pytest.param([1], id="other", marks=pytest.mark.slow),
        pytest.param([0, 1], id="all"),
    ],
)
def test_operations_go_on_when_daemons_are_killed(cluster: Cluster, victims: list[int]) -> None:
    sys.stdout.write(f"BENCHFS_TEST_SEED={SEED}\n")
    one, two = cluster.mount(), cluster.mount()
    strains = []
    for number, mount in enumerate((one, one, two)):
        root = mount.mountpoint / f"work{number}"
        root.mkdir()
        strains.append(Strain(root, SEED + number))
    with Elsewhere() as first, Elsewhere() as second, Elsewhere() as third:
        workers = (first, second, third)
        for _ in range(4):
            before = [strain.done for strain in strains]
            working = [
                worker.start(Strain.go_on, strain, STEPS) for worker, strain in zip(workers, strains, strict=True)
            ]
            restart(cluster, victims)
            strains = [future.result(DEADLINE_S) for future in working]
            assert [strain.done for strain in strains] == [count + STEPS for count in before]
    wait_until(lambda: cluster.at_rest(one), DEADLINE_S)
    for mount in (one, two, cluster.mount()):
        for strain in strains:
            strain.check(mount.mountpoint / strain.root.name)
    assert cluster.end() == []


def race(directory: Path, count: int) -> list[int]:
    """Try to make so many files; return those that nobody else had made."""
    won = []
    for name in range(count):
        with contextlib.suppress(FileExistsError), opened(directory / str(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY):
            won.append(name)
    return won


@pytest.mark.slow
def test_one_winner_when_daemons_are_killed(cluster: Cluster) -> None:
    """Two mounts race for the same new names: each name has one maker, also if his answer was lost at first."""
    count = 500
    with Elsewhere() as one, Elsewhere() as other:
        racing = [runner.start(race, cluster.mount().mountpoint, count) for runner in (one, other)]
        for victim in (0, 1):
            restart(cluster, [victim])
        won = [future.result(DEADLINE_S) for future in racing]
    assert sorted(won[0] + won[1]) == list(range(count))
    assert len(os.listdir(cluster.mount().mountpoint)) == count
    assert cluster.end() == []


def test_what_was_flushed_survives_the_death_of_all(cluster: Cluster) -> None:
    mount = cluster.mount()
    top = mount.mountpoint
    (top / "sub").mkdir()
    content = os.urandom(5 * CHUNK + 17)
    (top / "sub" / "closed").write_bytes(content)
    os.symlink("sub/closed", top / "link")
    os.setxattr(top / "sub" / "closed", "user.a", b"1")
    with Elsewhere() as holder:
        fd, other = (holder.run(os.open, top / name, os.O_CREAT | os.O_RDWR) for name in ("open", "accepted"))
        holder.run(os.pwrite, fd, content, CHUNK // 2)
        assert holder.run(os.fstat, fd).st_size == CHUNK // 2 + len(content)  # which flushes
        holder.run(os.pwrite, other, content, 0)  # accepted: the mount lives
        restart(cluster, [0, 1])
        assert holder.run(os.pread, fd, len(content), CHUNK // 2) == content
        holder.run(os.pwrite, fd, b"after", 3)
        assert holder.run(os.pread, other, 2 * len(content), 0) == content
    second = cluster.mount().mountpoint
    assert (second / "link").read_bytes() == content
    assert os.getxattr(second / "sub" / "closed", "user.a") == b"1"
    assert (second / "accepted").read_bytes() == content
    assert (second / "open").read_bytes() == b"\0\0\0after".ljust(CHUNK // 2, b"\0") + content
    wait_until(lambda: cluster.at_rest(mount), DEADLINE_S)
    assert cluster.end() == []


def test_files_without_a_name_outlive_their_daemons(cluster: Cluster) -> None:
    mount, other = cluster.mount(), cluster.mount()
    content = os.urandom(6 * CHUNK)
    before = held_bytes(cluster)
    with Elsewhere() as holder:
        fds = []
        for number in range(4):
            path = mount.mountpoint / str(number)
            path.write_bytes(content)
            fds += [holder.run(os.open, top / str(number), os.O_RDWR) for top in (mount.mountpoint, other.mountpoint)]
            path.unlink()
        assert sum(held_bytes(cluster)) >= sum(before) + 4 * len(content)
        restart(cluster, [0, 1])
        for fd in fds:
            assert holder.run(os.pread, fd, 10, 0) == content[:10]
            holder.run(os.pwrite, fd, b"still", 2 * CHUNK)
            holder.run(os.fsync, fd)
            assert holder.run(os.fstat, fd).st_nlink == 0
        restart(cluster, [1])
        for fd in fds:
            assert holder.run(os.pread, fd, 5, 2 * CHUNK) == b"still"
            assert holder.run(os.pread, fd, len(content), 3 * CHUNK) == content[3 * CHUNK :]
        assert sum(one["orphans"] for one in mount.statuses()) == 4
    wait_until(lambda: cluster.at_rest(mount) and held_bytes(cluster) == before, DEADLINE_S)
    assert cluster.end() == []


@pytest.mark.slow
def test_what_was_closed_while_its_daemon_was_away_is_freed(cluster: Cluster) -> None:
    """The last close of an unlinked file finds no daemon: it waits, and the space comes back."""
    mount = cluster.mount()
    before = held_bytes(cluster)
    path = mount.mountpoint / "file"
    path.write_bytes(bytes(8 * CHUNK))
    with opened(path):
        path.unlink()
        for daemon in cluster.daemons:
            daemon.kill()
    for number in range(DAEMONS):
        cluster.restart_daemon(number)
    wait_until(lambda: cluster.at_rest(mount) and held_bytes(cluster) == before, DEADLINE_S)
    assert cluster.end() == []


# ── mounts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def ends(cluster: Cluster, mount: Mount, other: Mount) -> Callable[[], bool]:
    """Return whether the daemons have dealt with the end of a mount, as another one is told."""

    def gone() -> bool:
        return cluster.at_rest(other) and all(
            session["label"] != str(mount.mountpoint) for daemon in other.statuses() for session in daemon["sessions"]
        )

    return gone


def test_a_killed_mount_gives_everything_back(alone: Cluster) -> None:
    doomed, other = alone.mount("--gather-time", "3600"), alone.mount()
    top, seen = doomed.mountpoint, other.mountpoint
    (seen / "mine").write_bytes(b"untouched")
    published = os.urandom(3 * CHUNK)
    (top / "published").write_bytes(published)
    before = held_bytes(alone)
    free = os.statvfs(seen).f_bfree
    with Elsewhere() as holder, opened(seen / "mine") as mine:
        for number in range(3):
            path = top / f"unlinked{number}"
            path.write_bytes(os.urandom(8 * MIB))
            holder.run(os.open, path, os.O_RDWR)
            path.unlink()
        # Data that lies with the daemons and was never published: beyond the end, and in a file of its own.
        grown = holder.run(os.open, top / "published", os.O_WRONLY | os.O_DIRECT)
        holder.run(os.pwrite, grown, b"x" * (8 * CHUNK), 3 * CHUNK)
        fresh = holder.run(os.open, top / "fresh", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        holder.run(os.pwrite, fresh, b"y" * (8 * CHUNK), 0)
        accepted = holder.run(os.open, top / "accepted", os.O_CREAT | os.O_WRONLY)
        holder.run(os.pwrite, accepted, b"z" * 1000, 0)
        assert sum(held_bytes(alone)) >= sum(before) + 24 * MIB + 16 * CHUNK
        assert os.statvfs(seen).f_bfree < free - 24 * MIB // 4096
        doomed.kill()
        wait_until(ends(alone, doomed, other), DEADLINE_S)
        wait_until(lambda: held_bytes(alone) == before, DEADLINE_S)
        wait_until(lambda: os.statvfs(seen).f_bfree > free - MIB // 4096, DEADLINE_S)
        assert os.pread(mine, 100, 0) == b"untouched"
        os.pwrite(mine, b"U", 0)
    doomed.free()
    assert (seen / "mine").read_bytes() == b"Untouched"
    assert (seen / "published").read_bytes() == published
    assert [(seen / name).stat().st_size for name in ("fresh", "accepted")] == [0, 0]
    os.truncate(seen / "published", 11 * CHUNK)
    assert (seen / "published").read_bytes() == published + bytes(8 * CHUNK)
    os.truncate(seen / "fresh", 8 * CHUNK)
    assert (seen / "fresh").read_bytes() == bytes(8 * CHUNK)
    assert alone.end() == []


def test_a_mount_killed_with_its_daemons_gives_everything_back(cluster: Cluster) -> None:
    """Nobody who remembers is left: the stores alone say what was open."""
    doomed = cluster.mount("--gather-time", "3600")
    top = doomed.mountpoint
    (top / "kept").write_bytes(b"kept")
    before = held_bytes(cluster)
    with Elsewhere() as holder:
        for number in range(3):
            path = top / f"unlinked{number}"
            path.write_bytes(os.urandom(10 * CHUNK))
            holder.run(os.open, path, os.O_RDWR)
            path.unlink()
        fresh = holder.run(os.open, top / "fresh", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        holder.run(os.pwrite, fresh, b"y" * (8 * CHUNK), 0)
        doomed.popen.kill()
        restart(cluster, [0, 1])
        doomed.free()
    other = cluster.mount()
    wait_until(ends(cluster, doomed, other), DEADLINE_S)
    wait_until(lambda: held_bytes(cluster) == before, DEADLINE_S)
    assert sorted(os.listdir(other.mountpoint)) == ["fresh", "kept"]
    assert (other.mountpoint / "fresh").stat().st_size == 0
    assert cluster.end() == []


def test_the_other_mount_does_not_wait_for_a_killed_one(cluster: Cluster) -> None:
    doomed, other = cluster.mount(), cluster.mount()
    shared = other.mountpoint / "shared"
    shared.write_bytes(b"1")
    with Elsewhere() as holder:
        holder.run(os.open, doomed.mountpoint / "shared", os.O_RDWR)
        doomed.popen.kill()
        start_s = time.monotonic()
        shared.write_bytes(b"2")
        (other.mountpoint / "new").mkdir()
        shared.unlink()
        assert time.monotonic() - start_s < DEADLINE_S / 4
    doomed.free()
    wait_until(ends(cluster, doomed, other), DEADLINE_S)
    assert cluster.end() == []


def read_at(path: Path, offset: int) -> str:
    """Say what became of a read."""
    try:
        with opened(path) as fd:
            os.pread(fd, 10, offset)
    except OSError as error:
        return str(error)
    return "there was something to read"


def test_a_mount_that_is_killed_while_it_drops_pages_is_cleaned_up(cluster: Cluster) -> None:
    """Its thread waits in the kernel for a page, which a read holds that nobody will answer: so it cannot end."""
    doomed, other = cluster.mount("--attr-timeout", "0"), cluster.mount()
    (other.mountpoint / "file").write_bytes(os.urandom(8 * CHUNK))
    path = doomed.mountpoint / "file"
    record = control.read_record(doomed.mountpoint)
    assert record is not None
    *_, report = control.ask(record, control.Question("layout", path.stat().st_ino), DEADLINE_S)
    assert report.layout is not None
    far = next(chunk for chunk in report.layout.chunks if chunk.daemon != report.layout.daemon)

    def waits_for_a_page() -> bool:
        tasks = Path(f"/proc/{doomed.pid}/task")
        return any("folio" in (task / "wchan").read_text() for task in tasks.iterdir())

    identities = [json.loads((cluster.data_dir(number) / "identity.json").read_text()) for number in range(DAEMONS)]
    silent = cluster.daemons[[one["daemon_id"] for one in identities].index(far.daemon)]
    silent.signal(signal.SIGSTOP)
    with Elsewhere() as reader, Elsewhere() as looker:
        try:
            reading = reader.start(read_at, path, far.offset)
            wait_until(lambda: in_flight(doomed), DEADLINE_S)
            os.truncate(other.mountpoint / "file", 9 * CHUNK)
            looker.start(Path.read_bytes, path)  # which sees that it has changed
            wait_until(waits_for_a_page, DEADLINE_S)
            doomed.popen.kill()
            wait_until(lambda: is_defunct(record.process), DEADLINE_S)
            place = mountpoints.look(doomed.mountpoint)
            assert place.state is mountpoints.State.DEAD
            mountpoints.clean_up(place.path)
            assert reading.result(DEADLINE_S) != "there was something to read"
            doomed.wait()
        finally:
            silent.signal(signal.SIGCONT)
            doomed.free()
