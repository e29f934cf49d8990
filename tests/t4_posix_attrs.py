"""Attributes: owners, modes, the setuid rules, times, link counts, inode numbers, blocks."""

import errno
import mmap
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from posix_help import ALICE, BOB, as_user, opened, refused, umask

from benchfs_fuse.testing.syscalls import UTIME_NOW, UTIME_OMIT, utimensat
from benchfs_fuse.testing.witness import wait_for_tick

pytest_plugins = ("mounts",)

# The mount may gather writes and cache attributes for a second each: after this, nothing is left to change.
SETTLE_S = 1.3


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def make(path: Path, bits: int = 0o644, uid: int = 0, content: bytes = b"") -> Path:
    path.write_bytes(content)
    os.chown(path, uid, uid)
    path.chmod(bits)
    return path


# --- modes and owners at creation ---


@pytest.mark.parametrize(("mask", "expected"), [(0o000, 0o666), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_takes_bits_from_new_files(mountpoint: Path, mask: int, expected: int) -> None:
    with umask(mask):
        os.close(os.open(mountpoint / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(mountpoint / "directory", 0o777)
        os.mkfifo(mountpoint / "fifo", 0o666)
    assert mode(mountpoint / "file") == expected
    assert mode(mountpoint / "directory") == 0o777 & ~mask
    assert mode(mountpoint / "fifo") == expected


def test_new_files_belong_to_their_maker(mountpoint: Path) -> None:
    with as_user(ALICE, BOB):
        (mountpoint / "file").touch()
        (mountpoint / "directory").mkdir()
        (mountpoint / "link").symlink_to("file")
    for name in ("file", "directory", "link"):
        found = (mountpoint / name).lstat()
        assert (found.st_uid, found.st_gid) == (ALICE, BOB)


def test_a_setgid_directory_hands_its_group_down(mountpoint: Path) -> None:
    parent = mountpoint / "parent"
    parent.mkdir()
    os.chown(parent, 0, BOB)
    parent.chmod(0o2777)
    with as_user(ALICE):
        (parent / "file").touch()
        (parent / "directory").mkdir()
        (parent / "link").symlink_to("file")
    assert {(parent / name).lstat().st_gid for name in ("file", "directory", "link")} == {BOB}
    assert mode(parent / "directory") & stat.S_ISGID
    assert not mode(parent / "file") & stat.S_ISGID


def test_a_file_made_without_write_permission_is_writable_to_its_maker(mountpoint: Path) -> None:
    with as_user(ALICE), opened(mountpoint / "file", os.O_CREAT | os.O_RDWR, 0o400) as fd:
        assert os.write(fd, b"content") == 7
    assert mode(mountpoint / "file") == 0o400


# --- chmod ---


@pytest.mark.parametrize("bits", [0o000, 0o777, 0o4755, 0o2755, 0o1755, 0o7777, 0o2644])
def test_chmod_sets_all_twelve_bits(mountpoint: Path, bits: int) -> None:
    (mountpoint / "directory").mkdir()
    for path in (make(mountpoint / "file"), mountpoint / "directory"):
        path.chmod(bits)
        assert mode(path) == bits
    with opened(mountpoint / "file", os.O_RDONLY) as fd:
        os.fchmod(fd, 0o600)
    assert mode(mountpoint / "file") == 0o600


def test_chmod_is_for_the_owner(mountpoint: Path) -> None:
    path = make(mountpoint / "file", 0o666, ALICE)
    with as_user(BOB), refused(errno.EPERM):
        path.chmod(0o777)
    with as_user(ALICE):
        path.chmod(0o600)
    assert mode(path) == 0o600


def test_chmod_by_an_owner_outside_the_group_drops_setgid(mountpoint: Path) -> None:
    path = make(mountpoint / "file", 0o755, ALICE)
    os.chown(path, ALICE, BOB)
    with as_user(ALICE):
        path.chmod(0o2755)
    assert mode(path) == 0o755
    with as_user(ALICE, groups=(BOB,)):
        path.chmod(0o2755)
    assert mode(path) == 0o2755


# --- chown ---


def test_chown_changes_what_it_is_told_to(mountpoint: Path) -> None:
    path = make(mountpoint / "file")
    for uid, gid, expected in ((ALICE, -1, (ALICE, 0)), (-1, BOB, (ALICE, BOB)), (0, 0, (0, 0)), (-1, -1, (0, 0))):
        os.chown(path, uid, gid)
        assert (path.stat().st_uid, path.stat().st_gid) == expected
    large = 4_000_000_000
    os.chown(path, large, large)
    assert (path.stat().st_uid, path.stat().st_gid) == (large, large)


def test_chown_of_a_link_leaves_its_target(mountpoint: Path) -> None:
    make(mountpoint / "file")
    (mountpoint / "link").symlink_to("file")
    os.lchown(mountpoint / "link", ALICE, ALICE)
    assert (mountpoint / "link").lstat().st_uid == ALICE
    assert (mountpoint / "file").stat().st_uid == 0


def test_chown_is_for_root_and_chgrp_for_members(mountpoint: Path) -> None:
    path = make(mountpoint / "file", 0o644, ALICE)
    with as_user(ALICE), refused(errno.EPERM):
        os.chown(path, BOB, -1)
    with as_user(ALICE), refused(errno.EPERM):
        os.chown(path, -1, BOB)
    with as_user(ALICE, groups=(BOB,)):
        os.chown(path, -1, BOB)
    assert path.stat().st_gid == BOB


@pytest.mark.parametrize(("before", "after"), [(0o4755, 0o755), (0o6755, 0o755), (0o2755, 0o755), (0o2745, 0o2745)])
def test_chown_drops_setuid_and_setgid(mountpoint: Path, before: int, after: int) -> None:
    path = make(mountpoint / "file", before)
    os.chown(path, ALICE, ALICE)
    assert mode(path) == after


def test_chown_of_a_directory_keeps_its_bits(mountpoint: Path) -> None:
    (mountpoint / "directory").mkdir()
    (mountpoint / "directory").chmod(0o6755)
    os.chown(mountpoint / "directory", ALICE, ALICE)
    assert mode(mountpoint / "directory") == 0o6755


# --- the setuid bits and writing ---


def _write(path: Path) -> None:
    with opened(path) as fd:
        os.write(fd, b"x")


def _write_direct(path: Path) -> None:
    with opened(path, os.O_WRONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as page:
        os.write(fd, page)


def _truncate(path: Path) -> None:
    os.truncate(path, 1)


def _open_truncating(path: Path) -> None:
    with opened(path, os.O_WRONLY | os.O_TRUNC):
        pass


@pytest.mark.parametrize("change", [_write, _write_direct, _truncate, _open_truncating])
@pytest.mark.parametrize(("before", "after"), [(0o4777, 0o777), (0o2777, 0o777), (0o6777, 0o777), (0o2767, 0o2767)])
def test_a_users_write_drops_the_setuid_bits(
    mountpoint: Path, change: Callable[[Path], None], before: int, after: int
) -> None:
    path = make(mountpoint / "file", before, BOB, b"content")
    with as_user(ALICE, groups=(BOB,)):
        change(path)
    assert mode(path) == after


def test_roots_write_keeps_the_setuid_bits(mountpoint: Path) -> None:
    path = make(mountpoint / "file", 0o6755, ALICE, b"content")
    _write(path)
    assert mode(path) == 0o6755


# --- permissions ---


@pytest.mark.parametrize(
    ("bits", "uid", "groups", "may_read", "may_write"),
    [
        (0o600, ALICE, (), True, True),
        (0o600, BOB, (), False, False),
        (0o060, ALICE, (ALICE,), False, False),
        (0o060, BOB, (ALICE,), True, True),
        (0o006, BOB, (), True, True),
        (0o006, ALICE, (), False, False),
        (0o440, BOB, (ALICE,), True, False),
        (0o200, ALICE, (), False, True),
    ],
)
def test_permission_bits_hold(
    mountpoint: Path, bits: int, uid: int, groups: tuple[int, ...], may_read: bool, may_write: bool
) -> None:
    path = make(mountpoint / "file", bits, ALICE, b"content")
    with as_user(uid, groups=groups):
        assert os.access(path, os.R_OK) == may_read
        assert os.access(path, os.W_OK) == may_write
        for flags, may in ((os.O_RDONLY, may_read), (os.O_WRONLY, may_write)):
            if may:
                os.close(os.open(path, flags))
            else:
                with refused(errno.EACCES):
                    os.open(path, flags)


def test_directories_need_search_to_enter_and_write_to_change(mountpoint: Path) -> None:
    directory = mountpoint / "directory"
    directory.mkdir()
    make(directory / "file", 0o666)
    directory.chmod(0o744)
    with as_user(ALICE):
        assert os.listdir(directory) == ["file"]
        with refused(errno.EACCES):
            os.stat(directory / "file")
    directory.chmod(0o711)
    with as_user(ALICE):
        assert (directory / "file").stat().st_size == 0
        with refused(errno.EACCES):
            os.listdir(directory)
        with refused(errno.EACCES):
            os.unlink(directory / "file")
        with refused(errno.EACCES):
            os.mkdir(directory / "new")


def test_a_sticky_directory_protects_others_files(mountpoint: Path) -> None:
    directory = mountpoint / "directory"
    directory.mkdir()
    directory.chmod(0o1777)
    make(directory / "alices", 0o666, ALICE)
    with as_user(BOB):
        with refused(errno.EPERM):
            os.unlink(directory / "alices")
        with refused(errno.EPERM):
            os.rename(directory / "alices", directory / "bobs")
    with as_user(ALICE):
        os.unlink(directory / "alices")


# --- times set by utimensat ---


@pytest.mark.parametrize(
    ("atime", "mtime"),
    [
        ((1_000_000_000, 123_456_789), (1_100_000_000, 987_654_321)),
        ((0, 0), (0, 1)),
        ((1, 999_999_999), (2**31 + 5, 7)),
        ((2**32 + 1, 1), (1, 1)),
        ((-2, 500_000_000), (-1_000_000_000, 1)),
    ],
)
def test_times_are_kept_to_the_nanosecond(mountpoint: Path, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    path = make(mountpoint / "file")
    utimensat(os.fsencode(path), atime, mtime)
    found = path.stat()
    assert found.st_atime_ns == atime[0] * 10**9 + atime[1]
    assert found.st_mtime_ns == mtime[0] * 10**9 + mtime[1]


def test_now_and_omit(mountpoint: Path) -> None:
    path = make(mountpoint / "file")
    utimensat(os.fsencode(path), (5, 5), (6, 6))
    before = path.stat()
    wait_for_tick()
    start_ns = time.time_ns()
    utimensat(os.fsencode(path), (0, UTIME_OMIT), (0, UTIME_NOW))
    found = path.stat()
    assert found.st_atime_ns == 5 * 10**9 + 5
    assert abs(found.st_mtime_ns - start_ns) < 2 * 10**9
    assert found.st_ctime_ns > before.st_ctime_ns
    utimensat(os.fsencode(path), (0, UTIME_OMIT), (0, UTIME_OMIT))
    assert path.stat() == found


def test_times_of_a_link_are_its_own(mountpoint: Path) -> None:
    path = make(mountpoint / "file")
    before = path.stat()
    (mountpoint / "link").symlink_to("file")
    utimensat(os.fsencode(mountpoint / "link"), (1, 2), (3, 4), follow=False)
    assert (mountpoint / "link").lstat().st_mtime_ns == 3 * 10**9 + 4
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_who_may_set_times(mountpoint: Path) -> None:
    path = make(mountpoint / "file", 0o666, ALICE)
    with as_user(BOB):
        with refused(errno.EPERM):
            utimensat(os.fsencode(path), (1, 1), (1, 1))
        with refused(errno.EPERM):
            utimensat(os.fsencode(path), (0, UTIME_NOW), (0, UTIME_OMIT))
        utimensat(os.fsencode(path), (0, UTIME_NOW), (0, UTIME_NOW))
    path.chmod(0o644)
    with as_user(BOB), refused(errno.EACCES):
        utimensat(os.fsencode(path), (0, UTIME_NOW), (0, UTIME_NOW))
    with as_user(ALICE):
        utimensat(os.fsencode(path), (1, 1), (1, 1))


def test_a_new_file_has_its_three_times_from_now(mountpoint: Path) -> None:
    start_ns = time.time_ns()
    found = make(mountpoint / "file").stat()
    for time_ns in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns):
        assert abs(time_ns - start_ns) < 2 * 10**9


# --- times moved by calls ---


def moved(path: Path, action: Callable[[], object]) -> set[str]:
    """Tell which of mtime and ctime an action moves, and see that none runs backwards."""
    before = path.lstat()
    wait_for_tick()
    action()
    after = path.lstat()
    assert after.st_mtime_ns >= before.st_mtime_ns
    assert after.st_ctime_ns >= before.st_ctime_ns
    return {name for name in ("mtime", "ctime") if getattr(after, f"st_{name}_ns") > getattr(before, f"st_{name}_ns")}


BOTH = {"mtime", "ctime"}


def test_writing_moves_mtime_and_ctime(mountpoint: Path) -> None:
    path = make(mountpoint / "file", content=b"content")
    assert moved(path, lambda: _write(path)) == BOTH
    assert moved(path, lambda: os.truncate(path, 3)) == BOTH
    assert moved(path, lambda: os.truncate(path, 30)) == BOTH
    assert moved(path, lambda: path.write_bytes(b"")) == BOTH
    assert moved(path, path.read_bytes) == set()
    with opened(path) as fd:
        assert moved(path, lambda: os.write(fd, b"x")) == BOTH
        assert moved(path, lambda: os.write(fd, b"")) == set()
        assert moved(path, lambda: os.fsync(fd)) == set()


def test_a_write_by_mapping_moves_mtime_and_ctime(mountpoint: Path) -> None:
    path = make(mountpoint / "file", content=bytes(4096))

    def write() -> None:
        with opened(path) as fd, mmap.mmap(fd, 4096) as view:
            view[0] = 1
            view.flush()

    assert moved(path, write) == BOTH


def test_attributes_and_links_move_ctime_alone(mountpoint: Path) -> None:
    path = make(mountpoint / "file")
    assert moved(path, lambda: path.chmod(0o600)) == {"ctime"}
    assert moved(path, lambda: os.chown(path, ALICE, ALICE)) == {"ctime"}
    assert moved(path, lambda: os.link(path, mountpoint / "link")) == {"ctime"}
    assert moved(path, lambda: os.unlink(mountpoint / "link")) == {"ctime"}
    assert moved(path, lambda: os.setxattr(path, "user.a", b"1")) == {"ctime"}
    assert moved(path, lambda: os.removexattr(path, "user.a")) == {"ctime"}


def test_changes_of_a_directory_move_its_mtime_and_ctime(mountpoint: Path) -> None:
    one, other = mountpoint / "one", mountpoint / "other"
    one.mkdir()
    other.mkdir()
    assert moved(one, (one / "file").touch) == BOTH
    assert moved(one, (one / "directory").mkdir) == BOTH
    assert moved(one, lambda: (one / "link").symlink_to("file")) == BOTH
    assert moved(one, lambda: os.mkfifo(one / "fifo")) == BOTH
    assert moved(one, lambda: os.link(one / "file", one / "second")) == BOTH
    assert moved(one, lambda: os.rename(one / "file", one / "renamed")) == BOTH
    assert moved(one, lambda: os.rename(one / "renamed", other / "file")) == BOTH
    assert moved(other, lambda: os.rename(other / "file", one / "file")) == BOTH
    assert moved(one, (one / "second").unlink) == BOTH
    assert moved(one, (one / "directory").rmdir) == BOTH
    assert moved(one, lambda: (one / "file").write_bytes(b"x")) == set()
    assert moved(one, lambda: os.listdir(one)) == set()


def test_a_directory_that_moves_keeps_its_mtime(mountpoint: Path) -> None:
    (mountpoint / "one").mkdir()
    (mountpoint / "one" / "file").touch()
    before = (mountpoint / "one").stat().st_mtime_ns
    wait_for_tick()
    os.rename(mountpoint / "one", mountpoint / "other")
    assert (mountpoint / "other").stat().st_mtime_ns == before


def test_times_do_not_change_after_close(mountpoint: Path) -> None:
    path = mountpoint / "file"
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        for index in range(20):
            os.pwrite(fd, b"x" * 1000, index * 1000)
    closed = path.stat()
    time.sleep(SETTLE_S)
    later = path.stat()
    assert (later.st_mtime_ns, later.st_ctime_ns) == (closed.st_mtime_ns, closed.st_ctime_ns)


def test_a_time_that_was_set_is_not_overrun_by_an_earlier_write(mountpoint: Path) -> None:
    path = mountpoint / "file"
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"content")
        os.utime(fd, ns=(10**18, 10**18))
    assert path.stat().st_mtime_ns == 10**18
    time.sleep(SETTLE_S)
    assert path.stat().st_mtime_ns == 10**18


def test_atime_follows_relatime_where_a_read_reaches_the_file_system(mountpoint: Path) -> None:
    path = make(mountpoint / "file", content=bytes(4096))

    def read() -> int:
        wait_for_tick()
        with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as page:
            os.preadv(fd, [page], 0)
        return path.stat().st_atime_ns

    utimensat(os.fsencode(path), (5, 5), (0, UTIME_OMIT))
    first = read()
    assert first > 5 * 10**9 + 5
    assert read() == first
    wait_for_tick()
    _write(path)
    assert read() > first


# --- counts and numbers ---


def test_a_directory_counts_its_subdirectories(mountpoint: Path) -> None:
    directory = mountpoint / "directory"
    directory.mkdir()
    assert directory.stat().st_nlink == 2
    for index in range(3):
        (directory / f"d{index}").mkdir()
        (directory / f"f{index}").touch()
    assert directory.stat().st_nlink == 5
    (directory / "d0").rmdir()
    os.rename(directory / "d1", mountpoint / "out")
    assert directory.stat().st_nlink == 3


def test_inode_numbers_are_unique_and_stay(mountpoint: Path) -> None:
    for index in range(200):
        (mountpoint / f"file {index}").touch()
    numbers = {path.name: path.stat().st_ino for path in mountpoint.iterdir()}
    assert len(set(numbers.values())) == 200
    assert 0 not in numbers.values()
    with os.scandir(mountpoint) as entries:
        assert {entry.name: entry.inode() for entry in entries} == numbers
    time.sleep(SETTLE_S)
    assert {path.name: path.stat().st_ino for path in mountpoint.iterdir()} == numbers
    assert {path.stat().st_dev for path in mountpoint.iterdir()} == {mountpoint.stat().st_dev}


def test_an_inode_number_is_not_reused_while_somebody_holds_it(mountpoint: Path) -> None:
    with opened(mountpoint / "held", os.O_CREAT | os.O_RDWR) as fd:
        held = os.fstat(fd).st_ino
        os.unlink(mountpoint / "held")
        for index in range(200):
            (mountpoint / f"file {index}").touch()
        assert held not in {path.stat().st_ino for path in mountpoint.iterdir()}
        assert os.fstat(fd).st_ino == held


def test_blocks_count_what_is_written(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.touch()
    assert path.stat().st_blocks == 0
    with opened(path) as fd:
        os.ftruncate(fd, 1 << 30)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks == 0
        os.pwrite(fd, b"x" * (1 << 20), 1 << 29)
        os.fsync(fd)
        assert 2048 <= os.fstat(fd).st_blocks <= 2048 + 64
        os.ftruncate(fd, 0)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks == 0


def test_statfs_is_sound(mountpoint: Path) -> None:
    found = os.statvfs(mountpoint)
    assert found.f_namemax == 255
    assert found.f_blocks >= found.f_bfree >= found.f_bavail > 0
    assert found.f_frsize >= 512
    with opened(mountpoint, os.O_RDONLY) as fd:
        assert os.fstatvfs(fd).f_blocks == found.f_blocks
