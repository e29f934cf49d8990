"""A file without a name lives as long as somebody has it open, and gives its space back afterwards."""

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import running_cluster, tmpfs_of
from posix_help import opened, refused, wait_until, working_directory

pytest_plugins = ("mounts",)

MIB = 1 << 20
SPACE = 48 * MIB

# Space is given back in the background.
SPACE_DEADLINE_S = 30.0


@pytest.fixture
def lonely(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Give a directory on the file system under test whose space nobody else takes or gives back."""
    if "BENCHFS_TEST_DIR" in os.environ:
        yield request.getfixturevalue("mountpoint")
        return
    with running_cluster(make_disk=tmpfs_of(3 * SPACE)) as cluster:
        yield cluster.mount().mountpoint


def free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bfree * found.f_frsize


def test_an_unlinked_file_is_read_written_and_grown(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(b"content")
    with opened(path) as fd, opened(path) as other:
        path.unlink()
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 10, 0) == b"content"
        os.pwrite(fd, b"far", 5 * MIB)
        assert os.pread(other, 10, 5 * MIB) == b"far"
        assert os.fstat(other).st_size == 5 * MIB + 3
        os.fsync(fd)
        os.ftruncate(other, 3)
        assert os.pread(fd, 10, 0) == b"con"
    assert not path.exists()


def test_its_attributes_change_still(mountpoint: Path) -> None:
    path = mountpoint / "file"
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        path.unlink()
        os.fchmod(fd, 0o600)
        os.fchown(fd, 1001, 1002)
        os.utime(fd, ns=(10**18, 10**18 + 1))
        os.setxattr(fd, "user.a", b"1")
        found = os.fstat(fd)
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid, found.st_mtime_ns) == (
            0o600,
            1001,
            1002,
            10**18 + 1,
        )
        assert os.getxattr(fd, "user.a") == b"1"


def test_its_name_is_free_at_once(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(b"first")
    with opened(path) as first:
        path.unlink()
        path.write_bytes(b"second, longer")
        with opened(path) as second:
            path.unlink()
            path.write_bytes(b"third")
            assert os.pread(first, 100, 0) == b"first"
            assert os.pread(second, 100, 0) == b"second, longer"
            os.pwrite(first, b"FIRST", 0)
            assert os.pread(second, 100, 0) == b"second, longer"
            assert len({os.fstat(first).st_ino, os.fstat(second).st_ino, path.stat().st_ino}) == 3
    assert path.read_bytes() == b"third"


def test_a_file_that_a_rename_replaced_lives_on(mountpoint: Path) -> None:
    (mountpoint / "old").write_bytes(b"old")
    (mountpoint / "new").write_bytes(b"new content")
    with opened(mountpoint / "old") as fd:
        os.rename(mountpoint / "new", mountpoint / "old")
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 100, 0) == b"old"
        os.pwrite(fd, b" and more", 3)
        assert os.pread(fd, 100, 0) == b"old and more"
    assert (mountpoint / "old").read_bytes() == b"new content"


def test_another_link_keeps_the_file(mountpoint: Path) -> None:
    (mountpoint / "one").write_bytes(b"content")
    os.link(mountpoint / "one", mountpoint / "other")
    with opened(mountpoint / "one") as fd:
        (mountpoint / "one").unlink()
        assert os.fstat(fd).st_nlink == 1
        os.pwrite(fd, b"CON", 0)
    assert (mountpoint / "other").read_bytes() == b"CONtent"


def test_a_mapping_keeps_it_too(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(b"x" * 8192)
    with opened(path) as fd:
        view = mmap.mmap(fd, 8192)
    path.unlink()
    assert view[8000:8003] == b"xxx"
    view[8000:8003] = b"yyy"
    assert view[8000:8003] == b"yyy"
    view.close()


def test_it_is_opened_again_through_proc(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(b"content")
    with opened(path) as fd:
        path.unlink()
        with opened(Path(f"/proc/self/fd/{fd}")) as again:
            assert os.pread(again, 100, 0) == b"content"


def test_a_removed_directory_is_empty_and_takes_nothing(mountpoint: Path) -> None:
    directory = mountpoint / "directory"
    directory.mkdir()
    with opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd, working_directory(directory):
        directory.rmdir()
        assert os.fstat(fd).st_nlink == 0
        assert os.listdir(fd) == []
        with refused(errno.ENOENT):
            Path("file").touch()
        with refused(errno.ENOENT):
            os.mkdir("directory", dir_fd=fd)
        with refused(errno.ENOENT):
            os.getcwd()


def test_a_removed_fifo_passes_bytes_still(mountpoint: Path) -> None:
    os.mkfifo(mountpoint / "fifo")
    with opened(mountpoint / "fifo", os.O_RDWR) as fd:
        (mountpoint / "fifo").unlink()
        os.write(fd, b"through")
        assert os.read(fd, 100) == b"through"


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_times_are_set_on_what_was_removed(mountpoint: Path, kind: str) -> None:
    path = mountpoint / kind
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        os.utime(fd, ns=(5, 6))
        path.unlink() if kind == "fifo" else path.rmdir()
        before = os.fstat(fd)
        os.utime(fd, ns=(7, 8))
        after = os.fstat(fd)
        assert (after.st_atime_ns, after.st_mtime_ns) == (7, 8)
        assert after.st_ctime_ns > before.st_ctime_ns
        os.fchmod(fd, 0o711)
        assert os.fstat(fd).st_ctime_ns > after.st_ctime_ns


def test_many_open_unlinked_files(mountpoint: Path) -> None:
    fds = []
    for index in range(200):
        path = mountpoint / f"file {index}"
        fds.append(os.open(path, os.O_CREAT | os.O_RDWR))
        os.write(fds[-1], b"%d" % index)
        path.unlink()
    assert os.listdir(mountpoint) == []
    for index, fd in enumerate(fds):
        assert os.pread(fd, 10, 0) == b"%d" % index
        os.close(fd)


@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_the_space_comes_back_after_the_last_close(lonely: Path, how: str) -> None:
    path = lonely / "file"
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        before = free(lonely)
        for offset in range(0, SPACE, MIB):
            os.pwrite(fd, os.urandom(MIB), offset)
        os.fsync(fd)
        wait_until(lambda: free(lonely) < before - SPACE // 2, SPACE_DEADLINE_S)
        if how == "unlink":
            path.unlink()
        else:
            (lonely / "other").touch()
            os.rename(lonely / "other", path)
        assert os.pread(fd, 1, SPACE - 1) != b""
        assert free(lonely) < before - SPACE // 2
    wait_until(lambda: free(lonely) > before - SPACE // 2, SPACE_DEADLINE_S)
