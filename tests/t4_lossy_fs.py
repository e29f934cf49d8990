"""Use the mounted disk that loses power with plain programs: what they synced is there after a cut."""

import errno
import mmap
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lossy_mount import LossyMount

from benchfs_fuse.testing.lossy_disk import PAGE, Loss

#: Cuts after which a program that syncs nothing must have lost something, and kept something: each is a coin at least.
TRIES = 30


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LossyMount]:
    directory = tmp_path_factory.mktemp("lossy")
    with LossyMount(directory / "disk", directory / "disk.log") as mount:
        yield mount
        sys.stdout.write((directory / "disk.log").read_text())


@pytest.fixture
def disk(lossy: LossyMount) -> Path:
    """Give the disk, empty."""
    subprocess.run(["find", lossy.mountpoint, "-mindepth", "1", "-delete"], check=True)
    sync(lossy.mountpoint)
    return lossy.mountpoint


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def cut(lossy: LossyMount, loss: Loss = Loss.RANDOM, seed: int = 0) -> None:
    lossy.cut(loss, seed)
    lossy.power()


def test_it_is_a_file_system(lossy: LossyMount, disk: Path) -> None:
    content = os.urandom(3 * PAGE + 17)
    (disk / "directory").mkdir()
    path = disk / "directory" / "file"
    path.write_bytes(content)
    assert path.read_bytes() == content and path.stat().st_size == len(content)
    os.truncate(path, PAGE + 1)
    os.truncate(path, 2 * PAGE)
    assert path.read_bytes() == content[: PAGE + 1] + bytes(PAGE - 1)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 3 * PAGE)
        with mmap.mmap(file.fileno(), 0) as mapping:
            assert mapping[:PAGE] == content[:PAGE] and mapping[3 * PAGE] == ord("x")
            mapping[0:3] = b"abc"
    assert path.read_bytes()[:4] == b"abc" + content[3:4]
    os.link(path, disk / "other")
    path.rename(disk / "new")
    assert sorted(os.listdir(disk)) == ["directory", "new", "other"]
    assert (disk / "other").stat().st_ino == (disk / "new").stat().st_ino
    (disk / "directory").rmdir()
    (disk / "new").unlink()
    with pytest.raises(FileNotFoundError):
        (disk / "new").stat()
    with (disk / "other").open("rb") as open_file:
        (disk / "other").unlink()
        assert open_file.read(3) == b"abc"
    assert os.statvfs(disk).f_bavail > 0


def test_sqlite_keeps_what_it_has_committed(lossy: LossyMount, disk: Path) -> None:
    """A database that syncs in the right order loses nothing, whatever is cut: so the model keeps what it has to.

    Its usual setting does not sync the directory when a transaction is over: the model takes the last one back.
    """
    for seed in range(5):
        with sqlite3.connect(disk / "data", isolation_level=None) as database:
            database.execute("PRAGMA synchronous = EXTRA")
            database.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER)")
            done = database.execute("SELECT count(*) FROM t").fetchone()[0]
            assert done == 20 * seed
            for number in range(20):
                database.execute("INSERT INTO t VALUES (?)", (number,))
        database.close()
        cut(lossy, seed=seed)


@pytest.mark.parametrize("loss", list(Loss))
def test_what_was_synced_is_there(lossy: LossyMount, disk: Path, loss: Loss) -> None:
    content = os.urandom(10 * PAGE)
    for seed in range(5):
        path = disk / f"file{seed}"
        path.write_bytes(content)
        sync(path)
        sync(disk)
        os.setxattr(path, "user.a", b"1")
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), b"y" * PAGE, 2 * PAGE)
        cut(lossy, loss, seed)
        found = path.read_bytes()
        assert found[: 2 * PAGE] == content[: 2 * PAGE] and found[3 * PAGE :] == content[3 * PAGE :]
        assert sorted(os.listdir(disk)) == [f"file{number}" for number in range(seed + 1)]


def test_who_does_not_sync_loses(lossy: LossyMount, disk: Path) -> None:
    """Replace a file as careless programs do, without fsync: some seed leaves neither the old nor the new content."""
    path, new = disk / "file", disk / "file.new"
    seen = set()
    for seed in range(TRIES):
        path.write_bytes(b"old" * PAGE)
        sync(path)
        sync(disk)
        new.write_bytes(b"new" * PAGE)
        new.rename(path)
        sync(disk)
        cut(lossy, seed=seed)
        content = path.read_bytes()
        seen.add("new" if content == b"new" * PAGE else "old" if content == b"old" * PAGE else "damaged")
    assert seen == {"new", "damaged"}
    for seed in range(TRIES):
        path.write_bytes(b"old")
        sync(path)
        new.write_bytes(b"new")
        sync(new)
        new.rename(path)  # the directory is not synced
        cut(lossy, seed=seed)
        assert path.read_bytes() in (b"old", b"new")
        seen.add(path.read_bytes().decode())
        sync(disk)
    assert seen == {"new", "old", "damaged"}


def test_without_power_everything_fails(lossy: LossyMount, disk: Path) -> None:
    (disk / "file").write_bytes(b"x")
    with (disk / "file").open("r+b") as file:
        lossy.cut(Loss.ALL, 0)
        calls: list[Callable[[], object]] = [
            lambda: os.pwrite(file.fileno(), b"y", 0),
            lambda: os.fsync(file.fileno()),
            lambda: os.listdir(disk),
            (disk / "new").mkdir,
        ]
        for call in calls:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                call()
    lossy.power()
    assert os.listdir(disk) == []
