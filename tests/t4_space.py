"""Space: what is allocated and what is given back on every daemon, holes, old bytes that stay gone, and a full disk."""

import contextlib
import errno
import itertools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Mount, running_cluster, tmpfs_of
from planted_daemon import QUOTA
from posix_help import opened, refused, wait_until

from benchfs_fuse.limits import CHUNK_SIZE_MIN, KIB, MIB

#: Chunks are small, so that small files have chunks on every daemon.
CHUNK = CHUNK_SIZE_MIN
DAEMONS = 2
BLOCK = 4 * KIB
TIB = 1 << 40
#: Seconds for what goes on in the background.
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(DAEMONS, chunk_size=CHUNK) as cluster:
        yield cluster
        assert cluster.end() == []


@pytest.fixture(scope="module")
def mount(cluster: Cluster) -> Mount:
    return cluster.mount()


@pytest.fixture
def work(cluster: Cluster, mount: Mount) -> Iterator[Path]:
    """Yield an empty directory, and leave no chunk of it behind: the next test begins with what it holds by itself."""
    before = held(cluster)
    with tempfile.TemporaryDirectory(dir=mount.mountpoint) as path:
        yield Path(path)
    wait_until(lambda: held(cluster) == before, DEADLINE_S)


def held(cluster: Cluster) -> list[int]:
    """Return how many bytes the chunk files of each daemon take on its disk."""
    total = []
    for number in range(DAEMONS):
        total.append(0)
        for path in (cluster.data_dir(number) / "chunks").glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                total[-1] += path.stat().st_blocks * 512
    return total


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


# ── given back ───────────────────────────────────────────────────────────────────────────────────────────────────────


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def cut_while_open(path: Path) -> None:
    with opened(path) as fd:
        os.ftruncate(fd, 0)


def open_truncating(path: Path) -> None:
    path.open("wb").close()


def rename_over(path: Path) -> None:
    other = path.with_name("other")
    other.touch()
    other.rename(path)


def rename_over_open(path: Path) -> None:
    with opened(path):
        rename_over(path)


def unlink_open(path: Path) -> None:
    with opened(path) as fd:
        path.unlink()
        os.pwrite(fd, bytes(2 * CHUNK), 40 * CHUNK)


def unlink_both_names(path: Path) -> None:
    other = path.with_name("other")
    os.link(path, other)
    path.unlink()
    other.unlink()


def remove_tree(path: Path) -> None:
    subprocess.run(["rm", "-r", str(path.parent)], check=True)
    path.parent.mkdir()


GIVING_BACK = [
    cut_to_nothing,
    cut_while_open,
    open_truncating,
    rename_over,
    rename_over_open,
    Path.unlink,
    unlink_open,
    unlink_both_names,
    remove_tree,
]


@pytest.mark.parametrize("give_back", GIVING_BACK, ids=lambda function: function.__name__)
def test_every_daemon_gives_its_chunks_back(cluster: Cluster, work: Path, give_back: Callable[[Path], None]) -> None:
    before = held(cluster)
    path = work / "file"
    path.write_bytes(os.urandom(32 * CHUNK))
    assert all(now >= then + 8 * CHUNK for now, then in zip(held(cluster), before, strict=True))
    assert sum(held(cluster)) >= sum(before) + 32 * CHUNK
    give_back(path)
    wait_until(lambda: held(cluster) == before, DEADLINE_S)


def test_a_cut_in_the_middle_gives_back_what_lies_behind(cluster: Cluster, work: Path) -> None:
    before = held(cluster)
    path = work / "file"
    path.write_bytes(os.urandom(32 * CHUNK))
    os.truncate(path, 5 * CHUNK + BLOCK + 1)
    assert allocated(path) == 5 * CHUNK + 2 * BLOCK
    wait_until(lambda: sum(held(cluster)) == sum(before) + 5 * CHUNK + 2 * BLOCK, DEADLINE_S)


# ── old bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, BLOCK, CHUNK - 1, CHUNK, 3 * CHUNK + BLOCK + 5])
def test_what_was_cut_off_stays_gone(work: Path, size: int) -> None:
    path, content = work / "file", os.urandom(8 * CHUNK)
    path.write_bytes(content)
    os.truncate(path, size)
    os.truncate(path, 8 * CHUNK)
    assert path.read_bytes() == content[:size].ljust(8 * CHUNK, b"\0")
    with opened(path) as fd:
        os.pwrite(fd, b"end", 7 * CHUNK)
        os.ftruncate(fd, size)
        os.pwrite(fd, b"far", 8 * CHUNK)
        assert os.pread(fd, 9 * CHUNK, 0) == content[:size].ljust(8 * CHUNK, b"\0") + b"far"


def test_old_bytes_stay_gone_when_daemons_start_again(cluster: Cluster, mount: Mount, work: Path) -> None:
    sizes = (0, BLOCK + 1, 3 * CHUNK + 5)
    content = os.urandom(8 * CHUNK)
    for size in sizes:
        (work / str(size)).write_bytes(content)
        os.truncate(work / str(size), size)
    replaced = work / "replaced"
    replaced.write_bytes(content)
    (work / "short").write_bytes(b"short")
    (work / "short").rename(replaced)
    for number in range(DAEMONS):
        cluster.daemons[number].kill()
        cluster.restart_daemon(number)
    for size in sizes:
        os.truncate(work / str(size), 8 * CHUNK)
        assert (work / str(size)).read_bytes() == content[:size].ljust(8 * CHUNK, b"\0")
    os.truncate(replaced, 8 * CHUNK)
    assert replaced.read_bytes() == b"short".ljust(8 * CHUNK, b"\0")


# ── holes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sparse_file_of_a_tebibyte(cluster: Cluster, work: Path) -> None:
    before = held(cluster)
    path = work / "file"
    places = (0, 3 * CHUNK - 2, TIB // 3, TIB - 5)
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        os.ftruncate(fd, TIB)
        for place in places:
            os.pwrite(fd, b"there", place)
        os.fsync(fd)
    assert path.stat().st_size == TIB
    assert allocated(path) == 5 * BLOCK  # one of the places lies in two chunks
    assert sum(held(cluster)) - sum(before) <= 5 * CHUNK
    with opened(path) as fd:
        for place in places:
            start = max(0, place - CHUNK)
            assert os.pread(fd, CHUNK + 5, start).strip(b"\0") in (b"there", b"therethere")
        assert os.pread(fd, MIB, TIB // 2) == bytes(MIB)
        os.ftruncate(fd, TIB // 3 + 2)
    assert path.stat().st_size == TIB // 3 + 2
    assert allocated(path) == 4 * BLOCK
    os.truncate(path, TIB)
    with opened(path) as fd:
        assert os.pread(fd, CHUNK, TIB // 3) == b"th".ljust(CHUNK, b"\0")
        assert os.pread(fd, 5, TIB - 5) == bytes(5)
    path.unlink()
    wait_until(lambda: held(cluster) == before, DEADLINE_S)


def test_holes_in_and_across_chunks_read_as_zeros_and_take_no_space(work: Path) -> None:
    path = work / "file"
    written = [(BLOCK, 10), (3 * BLOCK - 5, 10), (CHUNK - 7, 14), (5 * CHUNK + BLOCK, BLOCK), (9 * CHUNK + 1, 1)]
    content = bytearray(12 * CHUNK)
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        for offset, length in reversed(written):
            data = os.urandom(length)
            content[offset : offset + length] = data
            os.pwrite(fd, data, offset)
        os.ftruncate(fd, 12 * CHUNK)
        blocks = {position // BLOCK for offset, length in written for position in (offset, offset + length - 1)}
        assert os.fstat(fd).st_blocks * 512 == len(blocks) * BLOCK
    assert path.read_bytes() == content
    for step in (100, BLOCK + 1, CHUNK + 3):
        with opened(path) as fd:
            assert b"".join(os.pread(fd, step, start) for start in range(0, 12 * CHUNK, step)) == content


def test_du_counts_what_is_allocated(cluster: Cluster, work: Path) -> None:
    before = sum(held(cluster))
    lengths = (1, BLOCK, BLOCK + 1, CHUNK, 3 * CHUNK + 1)
    for length in lengths:
        (work / str(length)).write_bytes(os.urandom(length))
    with opened(work / "sparse", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, bytes(BLOCK), 7 * CHUNK)
    os.link(work / "1", work / "another name")
    wanted = sum(-(-length // BLOCK) * BLOCK for length in lengths) + BLOCK
    out = subprocess.run(["du", "-s", "-B1", str(work)], check=True, capture_output=True, text=True).stdout
    assert int(out.split()[0]) == wanted
    assert wanted <= sum(held(cluster)) - before <= 2 * wanted
    for length in lengths:  # overwriting takes no more
        with opened(work / str(length)) as fd:
            os.pwrite(fd, os.urandom(length), 0)
        assert allocated(work / str(length)) == -(-length // BLOCK) * BLOCK


def test_df_counts_a_shared_file_system_once(cluster: Cluster, mount: Mount) -> None:
    mounted, below = os.statvfs(mount.mountpoint), os.statvfs(cluster.directory)
    assert mounted.f_blocks * mounted.f_frsize == below.f_blocks * below.f_frsize
    out = subprocess.run(["df", "-B1", "--output=size", str(mount.mountpoint)], check=True, capture_output=True).stdout
    assert int(out.split()[1]) == below.f_blocks * below.f_frsize


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────

#: Each daemon's disk, and its inodes where those are few.
DISK = 64 * MIB
INODES = 512


def mount_few_inodes(path: Path) -> None:
    """Make a small disk that has room for few files."""
    image = path.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(DISK)
    subprocess.run(["mkfs.ext4", "-q", "-N", str(INODES), str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
    path.chmod(0o700)


@pytest.fixture
def small() -> Iterator[Cluster]:
    """Run a cluster on small disks."""
    with running_cluster(DAEMONS, chunk_size=CHUNK, make_disk=tmpfs_of(DISK)) as cluster:
        yield cluster


def fill(path: Path, flags: int = 0, number: int = errno.ENOSPC) -> int:
    """Write until there is no room; return how many MiB were taken before the error was seen."""
    with opened(path, os.O_CREAT | os.O_WRONLY | flags) as fd:
        taken = 0
        with refused(number):
            while taken < 4 * DISK // MIB:
                os.pwrite(fd, bytes([taken % 255 + 1]) * MIB, taken * MIB)
                taken += 1
        with contextlib.suppress(OSError):  # what gathered bytes failed with is said once more
            os.fsync(fd)
    return taken


def test_df_follows(small: Cluster) -> None:
    mountpoint = small.mount().mountpoint

    def free() -> int:
        found = os.statvfs(mountpoint)
        return found.f_bfree * found.f_frsize

    before, path = free(), mountpoint / "file"
    path.write_bytes(os.urandom(32 * MIB))
    assert before - 33 * MIB < free() <= before - 32 * MIB
    path.unlink()
    wait_until(lambda: free() > before - MIB, DEADLINE_S)


def test_df_adds_up_different_file_systems(small: Cluster) -> None:
    found = os.statvfs(small.mount().mountpoint)
    assert found.f_blocks * found.f_frsize == DAEMONS * DISK


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(0, id="gathered"),
        pytest.param(os.O_DIRECT, id="direct", marks=pytest.mark.slow),
        pytest.param(os.O_SYNC, id="synchronous", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk(small: Cluster, flags: int) -> None:
    fill_and_make_room(small, flags, errno.ENOSPC, DISK)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(0, id="gathered"),
        pytest.param(os.O_DIRECT, id="direct", marks=pytest.mark.slow),
        pytest.param(os.O_SYNC, id="synchronous", marks=pytest.mark.slow),
    ],
)
def test_a_quota_that_is_reached(flags: int) -> None:
    """The daemons are told EDQUOT where they write to their chunk files: the kernels that run the tests have no quotas.

    (They lack QFMT_V2 and XFS_QUOTA.) So everything but the kernel's own count is real, from the call to the disk up to
    the caller.
    """
    with running_cluster(DAEMONS, chunk_size=CHUNK, make_disk=tmpfs_of(DISK), planted="quota") as cluster:
        fill_and_make_room(cluster, flags, errno.EDQUOT, QUOTA)


def fill_and_make_room(cluster: Cluster, flags: int, number: int, room: int) -> None:
    """Take all of ``room`` bytes of each daemon; see that this fails with that errno, tears nothing, can be undone."""
    mount = cluster.mount()
    top = mount.mountpoint
    precious = os.urandom(3 * MIB)
    (top / "precious").write_bytes(precious)
    (top / "old").write_bytes(b"old" * CHUNK)
    taken = fill(top / "big", flags, number)
    assert taken >= room // MIB
    # Nothing is torn: every block holds what was written, or nothing.
    with opened(top / "big") as fd:
        size = os.fstat(fd).st_size
        for start in range(0, size, BLOCK):
            block = os.pread(fd, BLOCK, start)
            assert block in (bytes([start // MIB % 255 + 1]) * len(block), bytes(len(block)))
    assert (top / "precious").read_bytes() == precious
    assert (top / "old").read_bytes() == b"old" * CHUNK
    # What fits into no block that is there already is refused, and says so by the close at the latest.
    fd = os.open(top / "new", os.O_CREAT | os.O_WRONLY)
    with refused(number):
        try:
            os.write(fd, os.urandom(4 * MIB))
        finally:
            os.close(fd)
    # Names, removals and truncations go on.
    (top / "directory").mkdir()
    os.rename(top / "old", top / "directory" / "old")
    os.truncate(top / "directory" / "old", 5)
    assert (top / "directory" / "old").read_bytes() == b"oldol"
    (top / "new").unlink()
    (top / "big").unlink()

    def empty() -> bool:
        found = os.statvfs(top)
        return found.f_bavail * found.f_frsize > DAEMONS * DISK - room

    wait_until(empty, DEADLINE_S)
    again = os.urandom(room // 2)
    (top / "again").write_bytes(again)
    assert (top / "again").read_bytes() == again
    assert cluster.end() == []


def make(path: Path) -> bool:
    """Make a file of one byte; tell whether there was room for it."""
    try:
        path.write_bytes(b"x")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def test_inodes_that_are_used_up() -> None:
    with running_cluster(DAEMONS, chunk_size=CHUNK, make_disk=mount_few_inodes) as cluster:
        top = cluster.mount().mountpoint
        (top / "precious").write_bytes(b"precious" * CHUNK)
        names = itertools.count()
        made, refusals = [], 0
        while refusals < 20:  # in a row: one disk is full before the other
            path = top / str(next(names))
            if make(path):
                made.append(path)
                refusals = 0
            else:
                refusals += 1
                assert path.read_bytes() == b""
        assert len(made) > DAEMONS * INODES // 3
        found = os.statvfs(top)
        assert found.f_ffree < found.f_files // 16  # df -i has shown it coming
        # Names and what has its chunks go on, also after a daemon has died and come back.
        for daemon in range(DAEMONS):
            cluster.daemons[daemon].kill()
            cluster.restart_daemon(daemon)
        (top / "directory").mkdir()
        os.rename(made[0], top / "directory" / "moved")
        with opened(top / "precious") as fd:
            os.pwrite(fd, b"PRECIOUS", 0)
            os.fsync(fd)
        assert (top / "precious").read_bytes() == b"PRECIOUS" + b"precious" * (CHUNK - 1)
        assert (top / "directory" / "moved").read_bytes() == b"x"
        assert all(path.read_bytes() == b"x" for path in made[1::4])
        for path in made[1:]:
            path.unlink()
        wait_until(lambda: os.statvfs(top).f_ffree > found.f_ffree + len(made) // 2, DEADLINE_S)
        assert all(make(top / f"again {number}") for number in range(50))
        assert cluster.end() == []


def test_room_that_runs_out_is_reported_once_to_each_handle(small: Cluster) -> None:
    top = small.mount().mountpoint
    fill(top / "big", os.O_DIRECT)
    (top / "file").touch()
    with opened(top / "file") as one, opened(top / "file") as other:
        os.pwrite(one, os.urandom(MIB), 0)
        for fd in (one, other):
            with refused(errno.ENOSPC):
                os.fsync(fd)
            os.fsync(fd)
    assert small.end() == []


def test_overwriting_needs_no_room(small: Cluster) -> None:
    top = small.mount().mountpoint
    (top / "file").write_bytes(bytes(2 * MIB))
    fill(top / "big", os.O_DIRECT)
    content = os.urandom(2 * MIB)
    with opened(top / "file") as fd:
        os.pwrite(fd, content, 0)
        os.fsync(fd)
    assert (top / "file").read_bytes() == content
    assert small.end() == []
