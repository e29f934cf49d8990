"""A mount without the companion library: what pyfuse3 alone gives, and nothing pretended."""

import ctypes
import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Mount, running_cluster
from posix_help import opened, refused

from benchfs_fuse.testing.tools import check_same_tree, make_tree

MIB = 1 << 20
FALLOC_FL_PUNCH_HOLE = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def mount(cluster: Cluster) -> Mount:
    return cluster.mount("--no-companion")


def test_a_tree_is_copied_in_and_out(mount: Mount, tmp_path: Path) -> None:
    tree, there, back = tmp_path / "tree", mount.mountpoint / "tree", tmp_path / "back"
    make_tree(tree)
    subprocess.run(["cp", "-a", tree, there], check=True)
    subprocess.run(["cp", "-a", there, back], check=True)
    check_same_tree(tree, there)
    check_same_tree(tree, back)


def test_space_is_not_managed(mount: Mount) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    path = mount.mountpoint / "space"
    path.write_bytes(b"x" * MIB)
    with opened(path, os.O_RDWR) as fd:
        for mode in (0, FALLOC_FL_PUNCH_HOLE):
            assert libc.fallocate(fd, mode, 0, MIB) == -1
            assert ctypes.get_errno() == errno.EOPNOTSUPP
        os.ftruncate(fd, 16 * MIB)
        assert os.lseek(fd, 4 * MIB, os.SEEK_DATA) == 4 * MIB
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 16 * MIB
        with opened(mount.mountpoint / "copy", os.O_RDWR | os.O_CREAT) as target:
            assert os.copy_file_range(fd, target, MIB, 0) == MIB
            assert os.pread(target, 2 * MIB, 0) == b"x" * MIB


def test_a_default_acl_is_refused(mount: Mount) -> None:
    directory = mount.mountpoint / "directory"
    directory.mkdir()
    done = subprocess.run(["setfacl", "-d", "-m", "u:1000:rw", directory], capture_output=True, text=True, check=False)
    assert done.returncode and "not supported" in done.stderr
    with opened(directory / "file", os.O_CREAT | os.O_WRONLY, 0o666):
        assert os.listxattr(directory / "file") == []


def test_the_umask_is_applied(mount: Mount) -> None:
    old = os.umask(0o027)
    try:
        with opened(mount.mountpoint / "masked", os.O_CREAT | os.O_WRONLY, 0o666) as fd:
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
    finally:
        os.umask(old)


def test_an_append_takes_set_id_bits(mount: Mount) -> None:
    path = mount.mountpoint / "set-id"
    path.touch()
    path.chmod(0o6755)
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_now_is_a_time_of_this_machine(mount: Mount) -> None:
    path = mount.mountpoint / "now"
    path.write_bytes(b"")
    before = path.stat().st_ctime_ns
    os.utime(path)
    after = path.stat()
    # The kernel's coarse clock may be some ms behind the daemon's.
    assert abs(after.st_mtime_ns - before) < 10**10 and after.st_ctime_ns > before


def test_attributes_are_created_and_replaced(mount: Mount) -> None:
    path = mount.mountpoint / "attributes"
    path.touch()
    with refused(errno.ENODATA):
        os.setxattr(path, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with refused(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    os.setxattr(path, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"3"


def test_data_is_close_to_open(cluster: Cluster, mount: Mount) -> None:
    other = cluster.mount("--no-companion")
    here, there = mount.mountpoint / "shared", other.mountpoint / "shared"
    for round_ in range(10):
        content = b"%d" % round_ * 5000
        here.write_bytes(content)
        assert there.read_bytes() == content
        here, there = there, here
