"""Data: every byte read is the byte written: at chunk boundaries, in holes, by mappings, appends and direct I/O."""

import errno
import fcntl
import json
import mmap
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from posix_help import ALICE, as_user, opened, refused

pytest_plugins = ("mounts",)

MIB = 1 << 20
# The default chunk size; offsets around its multiples are where a chunk ends and the next daemon's begins.
CHUNK = 4 * MIB
BOUNDARIES = (4096, MIB, CHUNK, 2 * CHUNK)


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


# --- read and write ---


@pytest.mark.parametrize(
    "length", [0, 1, 4095, 4096, 4097, MIB - 1, MIB + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17]
)
def test_what_was_written_is_read(mountpoint: Path, length: int) -> None:
    content = noise(length)
    (mountpoint / "file").write_bytes(content)
    assert (mountpoint / "file").stat().st_size == length
    assert (mountpoint / "file").read_bytes() == content


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("before", [0, 1, 2, 100])
def test_a_write_across_a_boundary(mountpoint: Path, boundary: int, before: int) -> None:
    with opened(mountpoint / "file", os.O_CREAT | os.O_RDWR) as fd:
        assert os.pwrite(fd, b"0123456789" * 20, boundary - before) == 200
        assert os.pread(fd, 300, boundary - before) == b"0123456789" * 20
        assert os.pread(fd, 5, boundary) == (b"0123456789" * 20)[before : before + 5]
        if before:
            assert os.pread(fd, before, boundary - before) == (b"0123456789" * 20)[:before]


def test_an_overwrite_changes_its_bytes_alone(mountpoint: Path) -> None:
    content = bytearray(noise(2 * CHUNK + 1000))
    path = mountpoint / "file"
    path.write_bytes(content)
    dice = random.Random(1)
    with opened(path) as fd:
        for index in range(100):
            offset, data = dice.randrange(len(content) - 10_000), noise(dice.randrange(10_000), index)
            os.pwrite(fd, data, offset)
            content[offset : offset + len(data)] = data
    assert path.read_bytes() == content


def test_reads_end_at_the_end(mountpoint: Path) -> None:
    (mountpoint / "file").write_bytes(b"0123456789")
    with opened(mountpoint / "file") as fd:
        assert os.pread(fd, 100, 5) == b"56789"
        assert os.pread(fd, 100, 10) == b""
        assert os.pread(fd, 100, 1 << 40) == b""
        assert os.pread(fd, 0, 0) == b""
        assert os.pwrite(fd, b"", 100) == 0
        assert os.fstat(fd).st_size == 10


def test_vectors(mountpoint: Path) -> None:
    with opened(mountpoint / "file", os.O_CREAT | os.O_RDWR) as fd:
        assert os.pwritev(fd, [b"one", b"", b"two", b"three"], CHUNK - 4) == 11
        parts = [bytearray(2), bytearray(4), bytearray(20)]
        assert os.preadv(fd, parts, CHUNK - 4) == 11
        assert b"".join(parts)[:11] == b"onetwothree"


def test_the_access_mode_holds(mountpoint: Path) -> None:
    (mountpoint / "file").write_bytes(b"content")
    with opened(mountpoint / "file", os.O_RDONLY) as fd:
        with refused(errno.EBADF):
            os.write(fd, b"x")
        with refused(errno.EINVAL):
            os.ftruncate(fd, 0)
    with opened(mountpoint / "file", os.O_WRONLY) as fd, refused(errno.EBADF):
        os.read(fd, 1)


def test_dup_shares_the_position_and_a_second_open_does_not(mountpoint: Path) -> None:
    (mountpoint / "file").write_bytes(b"0123456789")
    with opened(mountpoint / "file") as fd, opened(mountpoint / "file") as second:
        copy = os.dup(fd)
        assert os.read(fd, 3) == b"012"
        assert os.read(copy, 3) == b"345"
        assert os.read(second, 3) == b"012"
        os.close(copy)
        assert os.read(fd, 3) == b"678"


def test_a_write_is_seen_by_every_open_file_at_once(mountpoint: Path) -> None:
    with (
        opened(mountpoint / "file", os.O_CREAT | os.O_RDWR) as one,
        opened(mountpoint / "file") as other,
    ):
        for index in range(50):
            data = noise(1000, index)
            os.pwrite(one, data, index * 777)
            assert os.pread(other, 1000, index * 777) == data
            assert os.fstat(other).st_size == index * 777 + 1000


# --- seek ---


def test_seek(mountpoint: Path) -> None:
    (mountpoint / "file").write_bytes(b"0123456789")
    with opened(mountpoint / "file") as fd:
        assert os.lseek(fd, 4, os.SEEK_SET) == 4
        assert os.lseek(fd, 2, os.SEEK_CUR) == 6
        assert os.lseek(fd, -1, os.SEEK_END) == 9
        assert os.read(fd, 5) == b"9"
        assert os.lseek(fd, 5, os.SEEK_END) == 15
        assert os.write(fd, b"x") == 1
        assert os.fstat(fd).st_size == 16
        with refused(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)


def test_seek_for_data_and_holes_never_loses_data(mountpoint: Path) -> None:
    with opened(mountpoint / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 4096, MIB)
        os.ftruncate(fd, 2 * MIB)
        assert os.lseek(fd, 0, os.SEEK_DATA) <= MIB
        assert os.lseek(fd, MIB, os.SEEK_DATA) == MIB
        assert MIB + 4096 <= os.lseek(fd, MIB, os.SEEK_HOLE) <= 2 * MIB
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with refused(errno.ENXIO):
                os.lseek(fd, 2 * MIB, whence)


# --- holes ---


@pytest.mark.parametrize("gap", [1, 4095, 4096, MIB, CHUNK - 5, CHUNK, 3 * CHUNK + 5])
def test_a_hole_reads_as_zeros(mountpoint: Path, gap: int) -> None:
    path = mountpoint / "file"
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"begin", 0)
        os.pwrite(fd, b"end", 5 + gap)
    assert path.read_bytes() == b"begin" + bytes(gap) + b"end"


def test_a_file_of_1_tib_is_sparse(mountpoint: Path) -> None:
    far = 1 << 40
    path = mountpoint / "file"
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"far away", far - 4)
        assert os.fstat(fd).st_size == far + 4
        assert os.pread(fd, 100, far - 50) == bytes(46) + b"far away"
        assert os.pread(fd, 4096, far // 2) == bytes(4096)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks * 512 < 16 * MIB
        os.ftruncate(fd, far - 1)
        os.ftruncate(fd, far + 8)
        assert os.pread(fd, 100, far - 4) == b"far" + bytes(9)


# --- truncate ---


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_old_bytes_never_come_back(mountpoint: Path, size: int) -> None:
    content = noise(2 * CHUNK + 5000)
    path = mountpoint / "file"
    path.write_bytes(content)
    os.truncate(path, size)
    assert path.read_bytes() == content[:size]
    os.truncate(path, len(content))
    assert path.read_bytes() == content[:size] + bytes(len(content) - size)


def test_old_bytes_never_come_back_around_a_new_write(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(b"o" * 3 * CHUNK)
    with opened(path) as fd:
        os.ftruncate(fd, 100)
        os.pwrite(fd, b"new", 2 * CHUNK + 50)
        assert os.pread(fd, 3 * CHUNK, 0) == b"o" * 100 + bytes(2 * CHUNK - 50) + b"new"
    assert path.read_bytes() == b"o" * 100 + bytes(2 * CHUNK - 50) + b"new"


def test_truncate_again_and_again(mountpoint: Path) -> None:
    model = bytearray()
    dice = random.Random(2)
    path = mountpoint / "file"
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        for index in range(60):
            size = dice.randrange(2 * CHUNK)
            os.ftruncate(fd, size)
            model = model[:size] + bytes(max(0, size - len(model)))
            data, offset = noise(dice.randrange(100_000), index), dice.randrange(2 * CHUNK)
            os.pwrite(fd, data, offset)
            if data:
                model += bytes(max(0, offset - len(model)))
                model[offset : offset + len(data)] = data
            assert os.fstat(fd).st_size == len(model)
    assert path.read_bytes() == model


def test_truncate_refuses(mountpoint: Path) -> None:
    (mountpoint / "file").write_bytes(b"content")
    (mountpoint / "directory").mkdir()
    with refused(errno.EINVAL):
        os.truncate(mountpoint / "file", -1)
    with refused(errno.EISDIR):
        os.truncate(mountpoint / "directory", 0)
    with refused(errno.ENOENT):
        os.truncate(mountpoint / "missing", 0)
    with as_user(ALICE), refused(errno.EACCES):
        os.truncate(mountpoint / "file", 0)
    assert (mountpoint / "file").read_bytes() == b"content"


def test_open_truncates(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(b"content")
    with opened(path) as before, opened(path, os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(before).st_size == os.fstat(fd).st_size == 0
        os.pwrite(fd, b"x", 3)
        assert os.pread(before, 10, 0) == b"\0\0\0x"
    with as_user(ALICE), refused(errno.EACCES):
        os.open(path, os.O_RDWR | os.O_TRUNC)
    assert path.read_bytes() == b"\0\0\0x"


def test_a_file_size_limit_holds(mountpoint: Path) -> None:
    script = f"ulimit -f 1; head -c 5000 /dev/zero > {mountpoint}/file"
    assert subprocess.run(["bash", "-c", script], capture_output=True, check=False).returncode != 0
    assert (mountpoint / "file").stat().st_size == 1024
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


#: What a process with a limit of 8292 bytes may do to a file of so many bytes, and what becomes of call and size.
LIMITED = """
import ctypes, errno, json, os, resource, signal, sys

def fallocate(fd, mode, length):
    if libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")

LIMIT = 8292
CALLS = {
    "write up to it": (8000, 0, lambda fd: os.pwrite(fd, b"y" * 292, 8000)),
    "write across it": (8000, 0, lambda fd: os.pwrite(fd, b"y" * 1000, 8000)),
    "write at it": (8000, 0, lambda fd: os.pwrite(fd, b"y", LIMIT)),
    "write behind it": (8000, 0, lambda fd: os.pwrite(fd, b"y", LIMIT + 5000)),
    "append across it": (8000, os.O_APPEND, lambda fd: os.write(fd, b"y" * 1000)),
    "append at it": (LIMIT, os.O_APPEND, lambda fd: os.write(fd, b"y")),
    "truncate to it": (8000, 0, lambda fd: os.ftruncate(fd, LIMIT)),
    "truncate behind it": (8000, 0, lambda fd: os.ftruncate(fd, LIMIT + 1)),
    "truncate by name": (8000, 0, lambda fd: os.truncate(f"/proc/self/fd/{fd}", LIMIT + 1)),
    "allocate up to it": (8000, 0, lambda fd: fallocate(fd, 0, LIMIT)),
    "allocate across it": (8000, 0, lambda fd: fallocate(fd, 0, LIMIT + 1)),
    "copy across it": (300, 0, lambda fd: os.copy_file_range(source, fd, 8000, 0, 300)),
    "copy behind it": (300, 0, lambda fd: os.copy_file_range(source, fd, 100, 0, LIMIT)),
}
libc = ctypes.CDLL(None, use_errno=True)
source = os.open("source", os.O_RDWR | os.O_CREAT)
os.write(source, b"y" * 8000)
for name, (size, flags, call) in CALLS.items():
    with open(name, "wb") as file:
        file.write(b"x" * size)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
ended = {}
for name, (size, flags, call) in CALLS.items():
    fd = os.open(name, os.O_RDWR | flags)
    try:
        how = call(fd)
    except OSError as error:
        how = errno.errorcode[error.errno]
    content = os.pread(fd, 2 * LIMIT, 0)
    ended[name] = how, os.fstat(fd).st_size, content.count(b"y")
    os.close(fd)
print(json.dumps(ended))
"""


def test_what_would_pass_a_file_size_limit_is_cut_or_efbig(mountpoint: Path, tmp_path: Path) -> None:
    def ended(directory: Path) -> dict[str, tuple[int | str | None, int, int]]:
        words = [sys.executable, "-c", LIMITED]
        done = subprocess.run(words, cwd=directory, stdout=subprocess.PIPE, check=True, timeout=60)
        return {name: tuple(how) for name, how in json.loads(done.stdout).items()}

    local = ended(tmp_path)
    assert local == {
        "write up to it": (292, 8292, 292),
        "write across it": (292, 8292, 292),
        "write at it": ("EFBIG", 8000, 0),
        "write behind it": ("EFBIG", 8000, 0),
        "append across it": (292, 8292, 292),
        "append at it": ("EFBIG", 8292, 0),
        "truncate to it": (None, 8292, 0),
        "truncate behind it": ("EFBIG", 8000, 0),
        "truncate by name": ("EFBIG", 8000, 0),
        "allocate up to it": (None, 8292, 0),
        "allocate across it": ("EFBIG", 8000, 0),
        "copy across it": (7992, 8292, 7992),
        "copy behind it": ("EFBIG", 300, 0),
    }
    if os.environ.get("BENCHFS_MOUNT_COMPANION") == "false":  # then nothing can be allocated
        local |= dict.fromkeys(("allocate up to it", "allocate across it"), ("ENOTSUP", 8000, 0))
    assert ended(mountpoint) == local


# --- append ---


def test_append_goes_to_the_end_whatever_the_position(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(b"begin ")
    with opened(path, os.O_RDWR | os.O_APPEND) as fd, opened(path) as other:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"one ")
        os.pwrite(other, b"far", 20)
        os.write(fd, b"two ")
        assert os.pwrite(fd, b"three", 0) == 5  # Linux appends here too, pwrite(2), BUGS
        os.ftruncate(fd, 10)
        os.write(fd, b"end")
        assert os.lseek(fd, 0, os.SEEK_CUR) == 13
    assert path.read_bytes() == b"begin one end"


def test_appends_by_two_open_files_lose_nothing(mountpoint: Path) -> None:
    path = mountpoint / "file"
    with (
        opened(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND) as one,
        opened(path, os.O_WRONLY | os.O_APPEND) as other,
    ):
        for index in range(200):
            os.write((one, other)[index % 2], b"%4d" % index)
    assert path.read_bytes() == b"".join(b"%4d" % index for index in range(200))


# --- synchronous and direct ---


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC, os.O_SYNC | os.O_APPEND])
def test_synchronous_writes(mountpoint: Path, flag: int) -> None:
    content = noise(CHUNK + 1000)
    with opened(mountpoint / "file", os.O_CREAT | os.O_WRONLY | flag) as fd:
        for offset in range(0, len(content), 300_000):
            os.write(fd, content[offset : offset + 300_000])
    assert (mountpoint / "file").read_bytes() == content


@pytest.mark.parametrize("sync", [os.fsync, os.fdatasync])
def test_sync(mountpoint: Path, sync: Callable[[int], None]) -> None:
    with opened(mountpoint / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"content")
        sync(fd)
        assert os.pread(fd, 10, 0) == b"content"
    with opened(mountpoint / "file", os.O_RDONLY) as fd:
        sync(fd)
    with opened(mountpoint, os.O_RDONLY | os.O_DIRECTORY) as fd:
        sync(fd)
    os.sync()


def test_direct_and_buffered_see_each_other(mountpoint: Path) -> None:
    path = mountpoint / "file"
    length = 2 * MIB
    with (
        mmap.mmap(-1, length) as buffer,
        opened(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT) as direct,
        opened(path) as buffered,
    ):
        buffer[:] = noise(length)
        assert os.pwritev(direct, [buffer], CHUNK - MIB) == length
        assert os.pread(buffered, length, CHUNK - MIB) == noise(length)
        os.pwrite(buffered, noise(length, 1), CHUNK - MIB)
        assert os.preadv(direct, [buffer], CHUNK - MIB) == length
        assert buffer[:] == noise(length, 1)
        assert os.preadv(direct, [buffer], CHUNK) == MIB
        assert os.preadv(direct, [buffer], 4 * CHUNK) == 0


def test_two_direct_openers_see_each_other(mountpoint: Path) -> None:
    flags = os.O_CREAT | os.O_RDWR | os.O_DIRECT
    with (
        mmap.mmap(-1, 4096) as page,
        opened(mountpoint / "file", flags) as one,
        opened(mountpoint / "file", flags) as other,
    ):
        for index in range(20):
            page[:] = bytes([index]) * 4096
            os.pwritev(one, [page], index * 4096)
            page[:] = bytes(4096)
            assert os.preadv(other, [page], index * 4096) == 4096
            assert page[:] == bytes([index]) * 4096


# --- mappings ---


def test_a_shared_mapping_is_coherent_with_read_and_write(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(bytes(CHUNK + 8192))
    with opened(path) as fd, opened(path) as other, mmap.mmap(fd, CHUNK + 8192) as view:
        for offset in (0, 4090, MIB, CHUNK - 3, CHUNK + 8000):
            view[offset : offset + 10] = b"by mapping"
            assert os.pread(other, 10, offset) == b"by mapping"
            os.pwrite(other, b"by writing", offset)
            assert view[offset : offset + 10] == b"by writing"
        view[5000:5004] = b"kept"
    assert path.read_bytes()[5000:5004] == b"kept"


def test_a_mapping_outlives_its_descriptor(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(bytes(8192))
    with opened(path) as fd:
        view = mmap.mmap(fd, 8192)
    view[4000:4005] = b"after"
    view.flush()
    assert path.read_bytes()[4000:4005] == b"after"
    view[4000:4005] = b"later"
    view.close()
    assert path.read_bytes()[4000:4005] == b"later"


def test_a_private_mapping_keeps_its_changes_to_itself(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(b"o" * 8192)
    with opened(path) as fd, mmap.mmap(fd, 8192, mmap.MAP_PRIVATE) as view:
        assert view[:3] == b"ooo"
        view[:3] = b"xyz"
        os.pwrite(fd, b"n", 4096)
        assert view[4096:4097] == b"n"
        assert view[:3] == b"xyz"
    assert path.read_bytes()[:3] == b"ooo"


def test_the_tail_of_a_mapped_page_is_zeros_and_not_written(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(b"x" * 100)
    with opened(path) as fd:
        with mmap.mmap(fd, 100) as view:
            assert view.size() == 100
            view[99:100] = b"y"
        os.ftruncate(fd, 5000)
        with mmap.mmap(fd, 5000) as view:
            assert view[99:5000] == b"y" + bytes(4900)


def test_two_processes_share_a_mapping(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.write_bytes(bytes(4096))
    script = (
        "import mmap,sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 4096); m[7:12] = b'other'; m.close()"
    )
    with opened(path) as fd, mmap.mmap(fd, 4096) as view:
        subprocess.run(["/usr/bin/env", "python3", "-c", script, path], check=True)
        assert view[7:12] == b"other"


# --- what else programs do with files ---


def test_a_program_runs_from_here(mountpoint: Path) -> None:
    shutil.copy("/bin/echo", mountpoint / "program")
    (mountpoint / "script").write_text("#!/bin/sh\necho from a script\n")
    (mountpoint / "script").chmod(0o755)
    done = subprocess.run([mountpoint / "program", "from", "here"], capture_output=True, check=True)
    assert done.stdout == b"from here\n"
    assert subprocess.run([mountpoint / "script"], capture_output=True, check=True).stdout == b"from a script\n"
    (mountpoint / "program").chmod(0o644)
    with refused(errno.EACCES):
        subprocess.run([mountpoint / "program"], check=False)


def test_the_kernel_copies_between_files(mountpoint: Path, tmp_path: Path) -> None:
    content = noise(CHUNK + 12345)
    (mountpoint / "source").write_bytes(content)
    flags = os.O_CREAT | os.O_RDWR
    with (
        opened(mountpoint / "source", os.O_RDONLY) as source,
        opened(mountpoint / "range", flags) as by_range,
        opened(mountpoint / "sent", flags) as sent,
        opened(tmp_path / "out", flags) as out,
    ):
        copies: list[Callable[[int], int]] = [
            lambda left: os.copy_file_range(source, by_range, left),
            lambda left: os.sendfile(sent, source, None, left),
            lambda left: os.sendfile(out, source, None, left),
        ]
        for copy in copies:
            os.lseek(source, 0, os.SEEK_SET)
            left = len(content)
            while left:
                left -= copy(left)
    for path in (mountpoint / "range", mountpoint / "sent", tmp_path / "out"):
        assert path.read_bytes() == content


def test_posix_fallocate_makes_the_file_as_long(mountpoint: Path) -> None:
    with opened(mountpoint / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"kept")
        os.posix_fallocate(fd, 0, 100_000)
        assert os.fstat(fd).st_size == 100_000
        assert os.pread(fd, 10, 0) == b"kept" + bytes(6)


def test_advice_changes_nothing(mountpoint: Path) -> None:
    content = noise(MIB)
    (mountpoint / "file").write_bytes(content)
    with opened(mountpoint / "file") as fd:
        for advice in (os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_RANDOM, os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED):
            os.posix_fadvise(fd, 0, 0, advice)
            assert os.pread(fd, MIB, 0) == content


def test_locks_hold_within_a_mount(mountpoint: Path) -> None:
    path = mountpoint / "file"
    path.touch()
    with opened(path) as one, opened(path) as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        with refused(errno.EWOULDBLOCK):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+b'); "
        "fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, int(sys.argv[2]))"
    )
    with opened(path) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 10, 100)
        results = [
            subprocess.run(["python3", "-c", script, path, str(at)], capture_output=True, check=False).returncode
            for at in (95, 110)
        ]
        assert results == [1, 0]


def test_special_files_are_not_seekable(mountpoint: Path) -> None:
    os.mkfifo(mountpoint / "fifo")
    with opened(mountpoint / "fifo", os.O_RDWR) as fd:
        assert stat.S_ISFIFO(os.fstat(fd).st_mode)
        with refused(errno.ESPIPE):
            os.lseek(fd, 0, os.SEEK_SET)
