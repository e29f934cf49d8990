"""Two mounts of one cluster: what one closed, the other opens; names have one winner; appends lose nothing."""

import errno
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier, Event

import pytest
from posix_help import opened, refused, wait_until

from benchfs_fuse.testing.exerciser import exercise_append
from benchfs_fuse.testing.tools import check_same_tree, make_tree, run

pytest_plugins = ("mounts",)

MIB = 1 << 20
CHUNK = 4 * MIB
ROUNDS = 20


@pytest.fixture
def mounts(mountpoint: Path, mountpoint2: Path) -> tuple[Path, Path]:
    return mountpoint, mountpoint2


def both_ways(mounts: tuple[Path, Path]) -> list[tuple[Path, Path]]:
    return [mounts, (mounts[1], mounts[0])]


def is_gone(path: Path) -> bool:
    return not path.exists()


def has_no_name(fd: int) -> bool:
    return os.fstat(fd).st_nlink == 0


def at_once(actions: Sequence[Callable[[], object]]) -> list[BaseException | None]:
    """Run actions in threads that start together; return what each raised."""
    barrier = Barrier(len(actions))

    def run_one(action: Callable[[], object]) -> BaseException | None:
        barrier.wait()
        try:
            action()
        except OSError as error:
            return error
        return None

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run_one, actions))


def refused_with(result: BaseException | None, number: int) -> bool:
    return isinstance(result, OSError) and result.errno == number


def winners(actions: Sequence[Callable[[], object]], refusals: tuple[int, ...]) -> int:
    """Run actions at once; count those that succeed, and see that all others are refused as they should be."""
    results = at_once(actions)
    for result in results:
        assert result is None or (isinstance(result, OSError) and result.errno in refusals), result
    return sum(result is None for result in results)


# --- close-to-open ---


@pytest.mark.parametrize("length", [0, 1, 5000, MIB + 7, 2 * CHUNK + 13])
def test_what_was_closed_here_is_read_there(mounts: tuple[Path, Path], length: int) -> None:
    for index, (here, there) in enumerate(both_ways(mounts)):
        content = random.Random(length + index).randbytes(length)
        (here / f"file {index}").write_bytes(content)
        assert (there / f"file {index}").read_bytes() == content
        assert (there / f"file {index}").stat().st_size == length


def test_each_open_sees_the_last_close(mounts: tuple[Path, Path]) -> None:
    dice = random.Random(1)
    size_max = CHUNK + 100_000
    content = bytearray(b"begin")
    (mounts[0] / "file").write_bytes(content)
    for index in range(2 * ROUNDS):
        here, there = both_ways(mounts)[index % 2]
        assert (here / "file").read_bytes() == content
        with opened(here / "file") as fd:
            match index % 4:
                case 0:  # grow
                    content += dice.randbytes(dice.randrange(1, 200_000))
                    os.pwrite(fd, content, 0)
                case 1:  # same size, other bytes
                    content[:] = dice.randbytes(len(content))
                    os.pwrite(fd, content, 0)
                case 2:  # shrink
                    del content[len(content) // 2 :]
                    os.ftruncate(fd, len(content))
                case 3:  # grow by a hole
                    hole = dice.randrange(1, size_max // ROUNDS)
                    content += bytes(hole) + b"x"
                    os.pwrite(fd, b"x", len(content) - 1)
        with opened(there / "file", os.O_RDONLY) as fd:
            assert os.fstat(fd).st_size == len(content)
            assert os.pread(fd, 2 * size_max, 0) == content


def test_what_was_synced_here_is_read_by_an_open_there(mounts: tuple[Path, Path]) -> None:
    for index, (here, there) in enumerate(both_ways(mounts)):
        with opened(here / f"file {index}", os.O_CREAT | os.O_RDWR) as fd:
            for round_ in range(5):
                os.pwrite(fd, b"round %d" % round_, round_ * MIB)
                os.fsync(fd)
                assert (there / f"file {index}").read_bytes()[-7:] == b"round %d" % round_


def test_a_file_kept_open_there_is_fresh_at_the_next_open(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    (here / "file").write_bytes(b"a" * 10_000)
    with opened(there / "file", os.O_RDONLY) as old:
        assert os.pread(old, 10_000, 0) == b"a" * 10_000
        (here / "file").write_bytes(b"b" * 20_000)
        assert (there / "file").read_bytes() == b"b" * 20_000


def test_cut_and_grown_there_old_bytes_stay_away_here(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    (here / "file").write_bytes(b"o" * (CHUNK + 5000))
    os.truncate(there / "file", 10)
    os.truncate(there / "file", CHUNK + 100)
    assert (here / "file").read_bytes() == b"o" * 10 + bytes(CHUNK + 90)


def test_a_tree_copied_in_here_is_whole_there(mounts: tuple[Path, Path], tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    run(["cp", "-a", tree, mounts[0] / "tree"])
    check_same_tree(tree, mounts[1] / "tree")


# --- names and attributes ---


def test_new_names_are_seen_at_once(mounts: tuple[Path, Path]) -> None:
    for index in range(ROUNDS):
        here, there = both_ways(mounts)[index % 2]
        assert not (there / f"file {index}").exists()
        (here / f"file {index}").touch()
        assert (there / f"file {index}").exists()
        assert len(os.listdir(there)) == index + 1


def test_listings_are_fresh(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    for index in range(ROUNDS):
        (here / f"file {index}").touch()
        assert f"file {index}" in os.listdir(there)
        (here / f"file {index}").unlink()
        assert os.listdir(there) == []


def test_removed_and_renamed_names_are_seen_soon(mounts: tuple[Path, Path]) -> None:
    for index, (here, there) in enumerate(both_ways(mounts)):
        (here / f"file {index}").write_bytes(b"content")
        assert (there / f"file {index}").read_bytes() == b"content"
        os.rename(here / f"file {index}", here / f"renamed {index}")
        assert (there / f"renamed {index}").read_bytes() == b"content"
        wait_until(partial(is_gone, there / f"file {index}"))
        (here / f"renamed {index}").unlink()
        wait_until(partial(is_gone, there / f"renamed {index}"))


def test_attributes_are_seen_soon(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    (here / "file").write_bytes(b"content")
    assert (there / "file").stat().st_size == 7
    (here / "file").chmod(0o4711)
    wait_until(lambda: (there / "file").stat().st_mode & 0o7777 == 0o4711)
    os.chown(here / "file", 1001, 1002)
    wait_until(lambda: ((there / "file").stat().st_uid, (there / "file").stat().st_gid) == (1001, 1002))
    os.utime(here / "file", ns=(10**18, 10**18 + 7))
    wait_until(lambda: (there / "file").stat().st_mtime_ns == 10**18 + 7)
    os.setxattr(here / "file", "user.a", b"1")
    wait_until(lambda: os.listxattr(there / "file") == ["user.a"])
    os.link(here / "file", here / "link")
    wait_until(lambda: (there / "file").stat().st_nlink == 2)
    with opened(here / "file") as fd:
        os.pwrite(fd, b"x", 99)
    wait_until(lambda: (there / "file").stat().st_size == 100)


def test_both_tell_the_same_of_a_file(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    (here / "file").write_bytes(b"content")
    (here / "directory").mkdir()
    for name in ("file", "directory"):
        one, other = (here / name).stat(), (there / name).stat()
        fields = ("st_ino", "st_mode", "st_nlink", "st_size", "st_blocks", "st_mtime_ns", "st_ctime_ns")
        assert [getattr(one, field) for field in fields] == [getattr(other, field) for field in fields]
    assert os.statvfs(here).f_blocks == os.statvfs(there).f_blocks


def test_a_file_that_is_replaced_over_and_over_is_always_there(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    (here / "file").write_bytes(b"0" * 1000)

    def replace() -> None:
        for index in range(50):
            (here / "new").write_bytes(b"%d" % (index % 10) * 1000)
            os.rename(here / "new", here / "file")

    def read() -> None:
        for _ in range(100):
            content = (there / "file").read_bytes()
            assert len(content) == 1000
            assert len(set(content)) == 1

    assert at_once([replace, read]) == [None, None]
    wait_until(lambda: (there / "file").read_bytes() == b"9" * 1000)  # names are cached for a second


# --- one winner ---


def create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def test_exclusive_creation_has_one_winner(mounts: tuple[Path, Path]) -> None:
    for index in range(ROUNDS):
        assert winners([partial(create, root / f"file {index}") for root in mounts * 2], (errno.EEXIST,)) == 1


def test_mkdir_link_and_symlink_have_one_winner(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    (here / "source").touch()
    for index in range(ROUNDS):
        name = f"name {index}"
        actions = [
            partial(os.mkdir, here / name),
            partial(os.mkdir, there / name),
            partial(os.link, here / "source", here / name),
            partial(os.symlink, "target", there / name),
        ]
        assert winners(actions, (errno.EEXIST,)) == 1
    assert len(os.listdir(here)) == len(os.listdir(there)) == ROUNDS + 1


def test_removal_and_rename_have_one_winner(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    for index in range(ROUNDS):
        name = f"file {index}"
        (mounts[index % 2] / name).touch()
        actions = [
            partial(os.unlink, here / name),
            partial(os.unlink, there / name),
            partial(os.rename, here / name, here / f"{name} moved"),
            partial(os.rename, there / name, there / f"{name} moved too"),
        ]
        assert winners(actions, (errno.ENOENT,)) == 1


def test_concurrent_renames_of_directories_make_no_cycle(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    for index in range(ROUNDS):
        one, other = f"one {index}", f"other {index}"
        (here / one).mkdir()
        (here / other).mkdir()
        actions = [
            partial(os.rename, here / one, here / other / one),
            partial(os.rename, there / other, there / one / other),
        ]
        assert winners(actions, (errno.ENOENT, errno.EINVAL)) == 1
        assert {path.name for path in here.rglob(f"* {index}")} == {one, other}


def test_a_directory_that_was_moved_there_is_found_here_while_others_are_renamed(mounts: tuple[Path, Path]) -> None:
    """The kernel gives up if it does not get its locks at two attempts: without our help, at a third of these."""
    here, there = mounts
    for path in (here / "from", here / "to", here / "one", here / "other", here / "from" / "0"):
        path.mkdir()
    (here / "one" / "file").touch()
    assert (here / "from" / "0").is_dir()
    lost = 0
    ended = Event()

    def rename() -> None:
        while not ended.is_set():
            os.rename(here / "one" / "file", here / "other" / "file")
            os.rename(here / "other" / "file", here / "one" / "file")

    with ThreadPoolExecutor(1) as pool:
        renaming = pool.submit(rename)
        try:
            for index in range(10 * ROUNDS):
                old, new = ("from", "to") if index % 2 == 0 else ("to", "from")
                os.rename(there / old / f"{index}", there / new / f"{index + 1}")
                found = at_once([(here / new / f"{index + 1}").stat])
                assert found == [None] or refused_with(found[0], errno.ESTALE)
                lost += found != [None]
        finally:
            ended.set()
        renaming.result()
    assert lost < ROUNDS / 2


def test_a_directory_is_removed_only_while_empty(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    for index in range(ROUNDS):
        directory = f"directory {index}"
        (here / directory).mkdir()
        file = there / directory / "file"
        results = at_once([partial(os.rmdir, here / directory), partial(create, file)])
        assert sum(result is None for result in results) == 1
        assert file.exists() == (results[1] is None)


# --- appends ---


@pytest.mark.parametrize("seed", range(3))
def test_appends_from_both_lose_nothing(mounts: tuple[Path, Path], seed: int) -> None:
    exercise_append([mounts[0] / "file", mounts[1] / "file"], seed, 50)


def test_appends_in_turn_go_to_the_end(mounts: tuple[Path, Path]) -> None:
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
    with opened(mounts[0] / "file", flags) as one, opened(mounts[1] / "file", flags) as other:
        for index in range(100):
            os.write((one, other)[index % 2], b"%4d" % index)
    assert (mounts[0] / "file").read_bytes() == b"".join(b"%4d" % index for index in range(100))
    assert (mounts[1] / "file").read_bytes() == b"".join(b"%4d" % index for index in range(100))


# --- open and unlinked ---


@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_a_file_removed_here_lives_on_where_it_is_open(mounts: tuple[Path, Path], how: str) -> None:
    for index, (here, there) in enumerate(both_ways(mounts)):
        path = f"file {index}"
        (here / path).write_bytes(b"content")
        with opened(there / path) as fd, opened(there / path) as second:
            if how == "unlink":
                (here / path).unlink()
            else:
                (here / "new").write_bytes(b"new")
                os.rename(here / "new", here / path)
            assert os.pread(fd, 100, 0) == b"content"
            os.pwrite(fd, b"far", CHUNK)
            os.fsync(fd)
            assert os.pread(second, 100, CHUNK) == b"far"
            os.ftruncate(fd, 3)
            assert os.fstat(fd).st_size == 3
            wait_until(partial(has_no_name, fd))
        if how == "rename":
            assert (there / path).read_bytes() == b"new"


def test_a_directory_removed_here_takes_nothing_there(mounts: tuple[Path, Path]) -> None:
    here, there = mounts
    (here / "directory").mkdir()
    with opened(there / "directory", os.O_RDONLY | os.O_DIRECTORY) as fd:
        (here / "directory").rmdir()
        with refused(errno.ENOENT):
            os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
