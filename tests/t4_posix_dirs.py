"""Directories: what a listing shows, also while entries come, go and change their names."""

import errno
import os
import random
import stat
from collections import Counter
from pathlib import Path

import pytest
from posix_help import opened, refused, working_directory

from benchfs_fuse.testing.syscalls import DirStream, getdents64

pytest_plugins = ("mounts",)

# Names long enough that one page of entries holds a few dozen: a listing takes many requests.
LONG = "-" * 100

READ_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def fill(directory: Path, count: int, suffix: str = LONG) -> set[bytes]:
    directory.mkdir(exist_ok=True)
    names = [f"{index:05}{suffix}" for index in range(count)]
    for name in names:
        os.mknod(directory / name)
    return {os.fsencode(name) for name in names}


def rest(fd: int) -> list[bytes]:
    """Read from the present position to the end, by the smallest buffers, without "." and ".."."""
    names = []
    while entries := getdents64(fd):
        names += [entry.name for entry in entries]
    return [name for name in names if name not in (b".", b"..")]


def some(fd: int, count: int) -> list[bytes]:
    """Read at least `count` entries."""
    names: list[bytes] = []
    while len(names) < count and (entries := getdents64(fd)):
        names += [entry.name for entry in entries if entry.name not in (b".", b"..")]
    return names


def test_a_listing_shows_each_entry_with_its_number_and_type(mountpoint: Path) -> None:
    (mountpoint / "file").touch()
    (mountpoint / "directory").mkdir()
    (mountpoint / "link").symlink_to("file")
    os.mkfifo(mountpoint / "fifo")
    os.mknod(mountpoint / "socket", stat.S_IFSOCK | 0o600)
    os.mknod(mountpoint / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with opened(mountpoint, READ_DIRECTORY) as fd:
        entries = getdents64(fd, 65536)
    assert len(entries) == 8
    for entry in entries:
        found = os.lstat(os.fsencode(mountpoint) + b"/" + entry.name)
        assert entry.type == stat.S_IFMT(found.st_mode) >> 12
        if entry.name != b"..":
            assert entry.ino == found.st_ino


@pytest.mark.parametrize("count", [0, 1, 30, 31, 32, 33, 1100])
def test_a_listing_is_complete(mountpoint: Path, count: int) -> None:
    names = fill(mountpoint / "directory", count)
    with opened(mountpoint / "directory", READ_DIRECTORY) as fd:
        assert Counter(rest(fd)) == Counter(names)
        assert rest(fd) == []
    assert {os.fsencode(name) for name in os.listdir(mountpoint / "directory")} == names


@pytest.mark.slow
def test_a_directory_of_100000_entries(mountpoint: Path) -> None:
    names = fill(mountpoint / "directory", 100_000, "")
    assert {os.fsencode(name) for name in os.listdir(mountpoint / "directory")} == names
    with os.scandir(mountpoint / "directory") as entries:
        assert len({entry.inode() for entry in entries}) == 100_000
    for name in random.Random(0).sample(sorted(names), 100):
        assert os.stat(os.fsencode(mountpoint) + b"/directory/" + name).st_size == 0
    for name in names:
        os.unlink(os.fsencode(mountpoint) + b"/directory/" + name)
    (mountpoint / "directory").rmdir()


def test_names_of_all_lengths_are_listed(mountpoint: Path) -> None:
    for length in range(1, 256):
        os.mknod(mountpoint / ("n" * length))
    with opened(mountpoint, READ_DIRECTORY) as fd:
        assert sorted(map(len, rest(fd))) == list(range(1, 256))


def test_seekdir_returns_to_every_place(mountpoint: Path) -> None:
    fill(mountpoint / "directory", 200)
    with DirStream(os.fsencode(mountpoint / "directory")) as stream:
        places = [stream.tell()]
        names = []
        while (name := stream.read()) is not None:
            names.append(name)
            places.append(stream.tell())
        assert len(names) == 202
        order = list(range(len(places)))
        random.Random(3).shuffle(order)
        for index in order:
            stream.seek(places[index])
            assert stream.read() == (names[index] if index < len(names) else None)
        stream.rewind()
        assert stream.read() == names[0]


def test_every_cookie_of_the_kernel_resumes_after_its_entry(mountpoint: Path) -> None:
    fill(mountpoint / "directory", 100)
    with opened(mountpoint / "directory", READ_DIRECTORY) as fd:
        entries = getdents64(fd, 1 << 20)
        for index, entry in enumerate(entries):
            os.lseek(fd, entry.next_offset, os.SEEK_SET)
            following = getdents64(fd)
            if index + 1 < len(entries):
                assert following[0] == entries[index + 1]
            else:
                assert following == []


def test_removing_what_was_read_loses_nothing(mountpoint: Path) -> None:
    names = fill(mountpoint / "directory", 300)
    directory = os.fsencode(mountpoint / "directory")
    seen = []
    with opened(mountpoint / "directory", READ_DIRECTORY) as fd:
        while batch := some(fd, 1):
            seen += batch
            for name in batch:
                os.unlink(directory + b"/" + name)
    assert Counter(seen) == Counter(names)
    os.rmdir(directory)


def test_entries_that_stay_are_seen_once_while_others_come_and_go(mountpoint: Path) -> None:
    names = fill(mountpoint / "directory", 300)
    directory = mountpoint / "directory"
    dice = random.Random(4)
    stay = set(dice.sample(sorted(names), 150))
    going = sorted(names - stay)
    seen: list[bytes] = []
    with opened(directory, READ_DIRECTORY) as fd:
        for index, name in enumerate(going):
            seen += some(fd, 2)
            path = directory / os.fsdecode(name)
            match index % 3:
                case 0:
                    path.unlink()
                case 1:
                    os.rename(path, directory / f"renamed {index}{LONG}")
                case 2:
                    os.mknod(directory / f"new {index}{LONG}")
        seen += rest(fd)
    counts = Counter(seen)
    assert {name: counts[name] for name in stay} == dict.fromkeys(stay, 1)


def test_a_place_is_found_again_after_its_entry_is_gone(mountpoint: Path) -> None:
    names = fill(mountpoint / "directory", 100)
    directory = os.fsencode(mountpoint / "directory")
    with opened(mountpoint / "directory", READ_DIRECTORY) as fd:
        entries = getdents64(fd, 1 << 20)
        middle = len(entries) // 2
        for entry in entries[middle - 5 : middle + 5]:
            if entry.name in names:
                os.unlink(directory + b"/" + entry.name)
        os.lseek(fd, entries[middle - 1].next_offset, os.SEEK_SET)
        assert Counter(rest(fd)) == Counter(entry.name for entry in entries[middle + 5 :])


def test_rewinding_shows_the_directory_as_it_is_now(mountpoint: Path) -> None:
    fill(mountpoint / "directory", 50)
    with DirStream(os.fsencode(mountpoint / "directory")) as stream:
        while stream.read() is not None:
            pass
        os.mknod(mountpoint / "directory" / "new")
        os.unlink(mountpoint / "directory" / f"00007{LONG}")
        stream.rewind()
        names = set(iter(stream.read, None))
    assert b"new" in names
    assert os.fsencode(f"00007{LONG}") not in names
    assert len(names) == 50 + 2


def test_two_readers_do_not_disturb_each_other(mountpoint: Path) -> None:
    names = fill(mountpoint / "directory", 200)
    with (
        opened(mountpoint / "directory", READ_DIRECTORY) as one,
        opened(mountpoint / "directory", READ_DIRECTORY) as other,
    ):
        seen_by_one = some(one, 70)
        seen_by_other = some(other, 20)
        seen_by_one += rest(one)
        seen_by_other += rest(other)
    assert Counter(seen_by_one) == Counter(seen_by_other) == Counter(names)


def test_a_listing_shows_what_has_just_changed(mountpoint: Path) -> None:
    for index in range(30):
        os.mknod(mountpoint / f"file {index}")
        assert len(os.listdir(mountpoint)) == index + 1
    for index in range(30):
        os.rename(mountpoint / f"file {index}", mountpoint / f"renamed {index}")
        assert f"renamed {index}" in os.listdir(mountpoint)
    for index in range(30):
        os.unlink(mountpoint / f"renamed {index}")
        assert len(os.listdir(mountpoint)) == 29 - index


def test_what_is_not_a_directory_is_not_listed(mountpoint: Path) -> None:
    (mountpoint / "file").touch()
    with refused(errno.ENOTDIR):
        DirStream(os.fsencode(mountpoint / "file"))
    with refused(errno.ENOENT):
        DirStream(os.fsencode(mountpoint / "missing"))


def test_directories_nest_deeply(mountpoint: Path) -> None:
    with working_directory(mountpoint):
        for depth in range(200):
            os.mkdir(f"d{depth}")
            os.chdir(f"d{depth}")
        Path("bottom").write_text("deep")
        for _ in range(200):
            os.chdir("..")
        assert os.getcwd() == str(mountpoint)
    deep = mountpoint.joinpath(*(f"d{depth}" for depth in range(200)), "bottom")
    assert deep.read_text() == "deep"


def test_operations_are_relative_to_an_open_directory_wherever_it_moves(mountpoint: Path) -> None:
    (mountpoint / "one").mkdir()
    with opened(mountpoint / "one", READ_DIRECTORY) as fd:
        os.rename(mountpoint / "one", mountpoint / "other")
        os.mkdir("below", dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.rename("file", "below/file", src_dir_fd=fd, dst_dir_fd=fd)
        assert os.listdir(fd) == ["below"]
        os.fsync(fd)
    assert (mountpoint / "other" / "below" / "file").exists()
