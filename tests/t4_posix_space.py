"""Space: fallocate, holes, seek and copies between files, on a mount and on a local file system, side by side.

The local one is where temporary files lie: ext4, XFS or tmpfs know all of it.
"""

import ctypes
import errno
import mmap
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from posix_help import opened, refused

pytest_plugins = ("mounts",)

BLOCK = 4096
MIB = 1 << 20
CHUNK = 4 * MIB
KEEP, PUNCH, ZERO = 1, 3, 16
RW = os.O_RDWR | os.O_CREAT

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), which os has for mode 0 alone, and through an emulation. OSError."""
    if _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def data_ranges(fd: int) -> list[tuple[int, int]]:
    """Walk through a file by SEEK_DATA and SEEK_HOLE."""
    found: list[tuple[int, int]] = []
    position = 0
    while True:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return found
        position = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, position))


def taken(path: Path) -> int:
    return path.stat().st_blocks * 512


STEPS: list[tuple[int, int, int]] = [
    (0, 0, MIB),
    (KEEP, MIB, CHUNK),
    (0, CHUNK - 100, 200),
    (PUNCH, BLOCK, 2 * BLOCK),
    (PUNCH, 10, 100),
    (PUNCH, CHUNK - BLOCK, 2 * BLOCK),
    (PUNCH, 20 * MIB, MIB),
    (ZERO, 5 * BLOCK + 1, BLOCK),
    (ZERO, 2 * CHUNK - 5, 10),
    (ZERO | KEEP, 3 * CHUNK, MIB),
    (PUNCH, 0, 1 << 40),
]


def test_allocations_holes_and_zeros_are_those_of_a_local_file_system(mountpoint: Path, tmp_path: Path) -> None:
    content = noise(CHUNK + MIB)
    paths = (mountpoint / "file", tmp_path / "file")
    for path in paths:
        path.write_bytes(content)
    for mode, offset, length in STEPS:
        for path in paths:
            with opened(path) as fd:
                os.pwrite(fd, b"before", offset)  # gathered, and in order with what follows
                fallocate(fd, mode, offset, length)
                os.pwrite(fd, b"behind", CHUNK)
        here, there = paths
        assert here.stat().st_size == there.stat().st_size, (mode, offset, length)
        assert here.read_bytes() == there.read_bytes(), (mode, offset, length)
        assert abs(taken(here) - taken(there)) <= 2 * BLOCK, (mode, offset, length)


def test_posix_fallocate_reserves(mountpoint: Path) -> None:
    with opened(mountpoint / "file", RW) as fd:
        os.posix_fallocate(fd, 100, 3 * CHUNK)
        status = os.fstat(fd)
        assert (status.st_size, status.st_blocks * 512) == (3 * CHUNK + 100, 3 * CHUNK + BLOCK)
        os.pwrite(fd, b"x" * CHUNK, 0)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks * 512 == 3 * CHUNK + BLOCK
        with refused(errno.ENOSPC):
            os.posix_fallocate(fd, 0, 1 << 60)
        assert os.fstat(fd).st_size == 3 * CHUNK + 100


@pytest.mark.parametrize(
    ("mode", "offset", "length", "number"),
    [
        (0, -1, 10, errno.EINVAL),
        (0, 0, 0, errno.EINVAL),
        (PUNCH, 0, -1, errno.EINVAL),
        (0, (1 << 63) - 1, 1, errno.EFBIG),
        (2, 0, 10, errno.EOPNOTSUPP),
        (ZERO | PUNCH, 0, BLOCK, errno.EOPNOTSUPP),
        (1 << 10, 0, 10, errno.EOPNOTSUPP),
    ],
)
def test_senseless_allocations_are_refused_alike(
    mountpoint: Path, tmp_path: Path, mode: int, offset: int, length: int, number: int
) -> None:
    for place in (mountpoint, tmp_path):
        with opened(place / "file", RW) as fd, refused(number):
            fallocate(fd, mode, offset, length)
    for place in (mountpoint, tmp_path):
        with opened(place / "file", os.O_RDONLY) as fd, refused(errno.EBADF):
            fallocate(fd, 0, 0, 10)
        with opened(place, os.O_RDONLY) as fd, refused(errno.EBADF):
            fallocate(fd, 0, 0, 10)


@pytest.mark.parametrize("mode", [8, 32, 64])
def test_other_ways_of_fallocate_are_refused(mountpoint: Path, mode: int) -> None:
    (mountpoint / "file").write_bytes(b"x" * CHUNK)
    with opened(mountpoint / "file") as fd, refused(errno.EOPNOTSUPP):
        fallocate(fd, mode, 0, BLOCK)
    assert (mountpoint / "file").read_bytes() == b"x" * CHUNK


def test_data_and_holes_are_found_as_on_a_local_file_system(mountpoint: Path, tmp_path: Path) -> None:
    found = []
    for place in (mountpoint, tmp_path):
        with opened(place / "file", RW) as fd:
            for offset in (BLOCK, CHUNK - BLOCK, CHUNK, 10 * CHUNK, (1 << 40) - BLOCK):
                os.pwrite(fd, b"x" * BLOCK, offset)
            os.ftruncate(fd, (1 << 40) + 10)
            os.fsync(fd)
            found.append(data_ranges(fd))
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                for offset in (-1, (1 << 40) + 10, 1 << 41):
                    with refused(errno.ENXIO):
                        os.lseek(fd, offset, whence)
            assert os.lseek(fd, 5, os.SEEK_HOLE) == 5
            assert os.lseek(fd, 1 << 40, os.SEEK_HOLE) == 1 << 40
    assert found[0] == found[1] != []


def test_gathered_bytes_are_data(mountpoint: Path) -> None:
    with opened(mountpoint / "file", RW) as fd:
        os.ftruncate(fd, 10 * CHUNK)
        os.pwrite(fd, b"x", 3 * CHUNK)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 3 * CHUNK
        assert os.lseek(fd, 3 * CHUNK, os.SEEK_HOLE) == 3 * CHUNK + BLOCK


def test_what_a_mapping_wrote_is_data(mountpoint: Path, tmp_path: Path) -> None:
    target = mountpoint / "target"
    for place in (mountpoint, tmp_path):
        with opened(place / "file", RW) as fd:
            os.ftruncate(fd, 10 * CHUNK)
            with mmap.mmap(fd, 10 * CHUNK) as view:
                view[3 * CHUNK] = view[3 * CHUNK + BLOCK] = view[7 * CHUNK] = 1
                assert os.lseek(fd, 0, os.SEEK_DATA) == 3 * CHUNK
                assert os.lseek(fd, 3 * CHUNK, os.SEEK_HOLE) == 3 * CHUNK + 2 * BLOCK
                assert data_ranges(fd)[-1] == (7 * CHUNK, 7 * CHUNK + BLOCK)
                view[5 * CHUNK] = 1
                subprocess.run(["cp", "--sparse=auto", place / "file", target], check=True)
                assert [target.read_bytes()[n * CHUNK] for n in range(10)] == [0, 0, 0, 1, 0, 1, 0, 1, 0, 0]


def test_what_appends_cannot_be_mapped_shared(mountpoint: Path) -> None:
    (mountpoint / "file").write_bytes(b"x" * BLOCK)
    with opened(mountpoint / "file", os.O_RDWR | os.O_APPEND) as fd:
        with refused(errno.ENODEV):
            mmap.mmap(fd, BLOCK)
        with mmap.mmap(fd, BLOCK, mmap.MAP_PRIVATE, mmap.PROT_READ) as view:
            assert view[:] == b"x" * BLOCK


def test_a_copy_between_files_is_what_was_there(mountpoint: Path) -> None:
    content = noise(2 * CHUNK + 1234)
    with opened(mountpoint / "a", RW) as a, opened(mountpoint / "b", RW) as b:
        os.pwrite(a, content, 0)
        os.pwrite(b, b"o" * 3 * CHUNK, 0)
        assert os.pread(b, 10, 100) == b"o" * 10
        done = 0
        while count := os.copy_file_range(a, b, 1 << 30, 17 + done, 100 + done):
            done += count
        assert done == len(content) - 17
        expected = b"o" * 100 + content[17:]
        assert os.pread(b, 4 * CHUNK, 0) == expected + b"o" * (3 * CHUNK - len(expected))
        assert os.copy_file_range(a, b, 10, len(content), 0) == 0
        with refused(errno.EINVAL):
            os.copy_file_range(a, a, 100, 0, 50)
        assert os.copy_file_range(a, a, 100, 0, 3 * CHUNK) == 100
        assert os.pread(a, 200, 3 * CHUNK) == content[:100]
    with opened(mountpoint / "a", os.O_RDONLY) as a, opened(mountpoint / "b", os.O_RDONLY) as b, refused(errno.EBADF):
        os.copy_file_range(a, b, 10, 0, 0)
    with (
        opened(mountpoint / "a", os.O_RDONLY) as a,
        opened(mountpoint / "b", os.O_RDWR | os.O_APPEND) as b,
        refused(errno.EBADF),
    ):
        os.copy_file_range(a, b, 10, 0, 0)


def _sparse(path: Path) -> bytes:
    """Make a file with data, holes and runs of written zeros."""
    with opened(path, RW) as fd:
        os.pwrite(fd, noise(MIB), CHUNK)
        os.pwrite(fd, bytes(MIB), 2 * CHUNK)
        os.pwrite(fd, noise(10), 3 * CHUNK + 5)
        os.ftruncate(fd, 4 * CHUNK)
    return path.read_bytes()


@pytest.mark.parametrize(
    "command",
    [
        ["cp", "{0}", "{1}"],
        ["cp", "--reflink=auto", "{0}", "{1}"],
        ["cp", "--sparse=always", "{0}", "{1}"],
        ["cp", "--sparse=never", "{0}", "{1}"],
        ["dd", "if={0}", "of={1}", "bs=64k", "conv=sparse", "status=none"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("way", ["inside", "in", "out"])
def test_tools_copy_sparse_files(mountpoint: Path, tmp_path: Path, command: list[str], way: str) -> None:
    source = (tmp_path if way == "in" else mountpoint) / "source"
    target = (tmp_path if way == "out" else mountpoint) / "target"
    content = _sparse(source)
    subprocess.run([part.format(source, target) for part in command], check=True)
    assert target.read_bytes() == content
    if way != "out":
        expected = {"never": 4 * CHUNK, "always": MIB + BLOCK}
        sizes = [size for name, size in expected.items() if f"--sparse={name}" in command]
        assert taken(target) <= (sizes or [2 * MIB + 16 * BLOCK])[0]


def test_the_fallocate_tool_punches_zeroes_digs_and_reserves(mountpoint: Path) -> None:
    path = mountpoint / "file"

    def run(*options: str) -> None:
        subprocess.run(["fallocate", *options, path], check=True)

    run("-l", str(2 * CHUNK))
    assert (path.stat().st_size, taken(path)) == (2 * CHUNK, 2 * CHUNK)
    run("-n", "-o", str(2 * CHUNK), "-l", str(CHUNK))
    assert (path.stat().st_size, taken(path)) == (2 * CHUNK, 3 * CHUNK)
    run("-p", "-o", str(CHUNK - MIB), "-l", str(2 * MIB))
    assert taken(path) == 3 * CHUNK - 2 * MIB
    run("-z", "-o", "0", "-l", str(2 * CHUNK))
    assert taken(path) == 3 * CHUNK
    with opened(path) as fd:
        os.pwrite(fd, b"x", CHUNK)
    run("-d")
    assert taken(path) <= CHUNK + MIB  # the tool digs in pieces of st_blksize
    assert path.read_bytes() == bytes(CHUNK) + b"x" + bytes(CHUNK - 1)
    path.unlink()


def _written(fd: int) -> None:
    os.pwrite(fd, b"x", 0)


def _punched(fd: int) -> None:
    fallocate(fd, PUNCH, 0, BLOCK)


def _allocated(fd: int) -> None:
    fallocate(fd, 0, 0, BLOCK)


@pytest.mark.parametrize("change", [_written, _punched, _allocated], ids=lambda change: change.__name__)
def test_changes_of_space_set_the_times(mountpoint: Path, change: Callable[[int], None]) -> None:
    with opened(mountpoint / "file", RW) as fd:
        os.pwrite(fd, b"x" * 2 * BLOCK, 0)
        os.fsync(fd)
        before = os.fstat(fd)
        change(fd)
        after = os.fstat(fd)
        assert after.st_mtime_ns > before.st_mtime_ns and after.st_ctime_ns > before.st_ctime_ns
