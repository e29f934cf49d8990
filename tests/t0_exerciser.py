"""The exerciser finds what it is for: an honest file passes, every planted lie is caught and named."""

import mmap
import os
import time
from pathlib import Path

import pytest

from benchfs_fuse.testing.exerciser import (
    ALIGNMENT,
    Exerciser,
    FileIo,
    Mode,
    WrongByteError,
    exercise,
    exercise_append,
    exercise_regions,
    main,
)
from benchfs_fuse.testing.syscalls import KEEP_SIZE, PUNCH_HOLE

pytest_plugins = ("mounts",)

OPS = 400


class WrongAtBoundary(FileIo):
    """The last byte before the second chunk is lost."""

    def write(self, fd: int, data: bytes, offset: int) -> None:
        super().write(fd, data, offset)
        if offset < 1 << 22 <= offset + len(data):
            os.pwrite(fd, b"\0", (1 << 22) - 1)


class OffByOne(FileIo):
    """A read past 1 MiB begins a byte late."""

    def read(self, fd: int, length: int, offset: int) -> bytes:
        return super().read(fd, length, offset + (offset > 1 << 20))


class LostTruncate(FileIo):
    """A truncation to less is forgotten."""

    def truncate(self, fd: int, size: int) -> None:
        if size > self.size(fd):
            super().truncate(fd, size)


class OldBytesReturn(FileIo):
    """A file that grows again shows what was cut off."""

    def __init__(self) -> None:
        self._cut = b""

    def truncate(self, fd: int, size: int) -> None:
        before = self.size(fd)
        content = os.pread(fd, before, 0)
        super().truncate(fd, size)
        if size < before:
            self._cut = content
        elif self._cut:
            os.pwrite(fd, self._cut[before:size], before)


class StaleSize(FileIo):
    """fstat shows the size at the open."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        self._sizes[fd] = os.fstat(fd).st_size
        return fd

    def size(self, fd: int) -> int:
        return self._sizes[fd]


class LostMapping(FileIo):
    """What was written by a mapping is lost if it is less than a page."""

    def map_write(self, fd: int, data: bytes, offset: int) -> None:
        if len(data) >= 4096:
            super().map_write(fd, data, offset)


class KeptMappingLoses(FileIo):
    """What was written by a mapping that has been there for a while is lost."""

    def view_write(self, view: mmap.mmap, data: bytes, offset: int) -> None:
        pass


class PunchesNothing(FileIo):
    """A hole is not punched."""

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        super().fallocate(fd, KEEP_SIZE if mode & PUNCH_HOLE else mode, offset, length)


class PunchesTooFar(FileIo):
    """A punch takes a page too many."""

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        super().fallocate(fd, mode, offset, length + 4096 * bool(mode & PUNCH_HOLE))


class AllocatesLess(FileIo):
    """An allocation leaves the size."""

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        super().fallocate(fd, mode | KEEP_SIZE, offset, length)


class CopiesShifted(FileIo):
    """A copy begins a byte late."""

    def copy(self, fd: int, offset: int, target_offset: int, length: int) -> int:
        return super().copy(fd, offset, target_offset + 1, length - 1) + 1 if length > 1 else length


class PassesDataOver(FileIo):
    """There is no data in the second MiB."""

    def seek(self, fd: int, offset: int, whence: int) -> int | None:
        found = super().seek(fd, offset, whence)
        if whence == os.SEEK_DATA and found is not None and 1 << 20 <= found < 2 << 20:
            return super().seek(fd, 2 << 20, whence)
        return found


class AppendsOverwrite(FileIo):
    """An append goes a byte before the end."""

    def append(self, fd: int, data: bytes) -> None:
        size = os.fstat(fd).st_size
        if size:
            os.ftruncate(fd, size - 1)
        super().append(fd, data)


class AppendsInPieces(FileIo):
    """An append is two requests, between which another's may come."""

    def append(self, fd: int, data: bytes) -> None:
        os.write(fd, data[:8])
        os.sched_yield()
        os.write(fd, data[8:])


class AppendsByStaleSize(FileIo):
    """An append trusts the size that it read before."""

    def append(self, fd: int, data: bytes) -> None:
        size = os.fstat(fd).st_size
        time.sleep(0.001)  # long enough for the others to append meanwhile, whatever else the machine does
        other = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
        os.pwrite(other, data, size)
        os.close(other)


class StaleAfterSwitch(FileIo):
    """The other mount goes on showing what it read first."""

    def __init__(self) -> None:
        self._first: bytes | None = None
        self._stale: set[int] = set()

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        self._stale -= {fd}
        if path.parent.name == "other":
            self._stale |= {fd}
        return fd

    def read(self, fd: int, length: int, offset: int) -> bytes:
        if fd not in self._stale:
            return super().read(fd, length, offset)
        if self._first is None:
            self._first = super().read(fd, os.fstat(fd).st_size, 0)
        return self._first[offset : offset + length].ljust(min(length, os.fstat(fd).st_size - offset), b"\0")


class DirectTearsPages(FileIo):
    """A direct write of several pages loses the last."""

    def direct_write(self, fd: int, data: bytes, offset: int) -> None:
        kept = len(data) - ALIGNMENT if len(data) > ALIGNMENT else len(data)
        os.ftruncate(fd, max(os.fstat(fd).st_size, offset + len(data)))
        super().direct_write(fd, data[:kept], offset)


@pytest.mark.parametrize(
    "lie",
    [
        WrongAtBoundary,
        OffByOne,
        LostTruncate,
        OldBytesReturn,
        StaleSize,
        LostMapping,
        AppendsOverwrite,
        KeptMappingLoses,
        PunchesNothing,
        PunchesTooFar,
        AllocatesLess,
        CopiesShifted,
        PassesDataOver,
    ],
)
def test_a_lie_is_caught(plain_dir: Path, lie: type[FileIo]) -> None:
    with pytest.raises(WrongByteError, match=r"seed 3, operation \d+: (bytes?|size|seek)(.|\n)*last operations:\n"):
        Exerciser([plain_dir / "file"], 3, io=lie()).run(2 * OPS)


def test_a_stale_read_at_the_other_mount_is_caught(plain_dir: Path) -> None:
    (plain_dir / "other").symlink_to(".")
    with pytest.raises(WrongByteError, match=r"of .*other/file: "):
        Exerciser([plain_dir / "file", plain_dir / "other" / "file"], 3, io=StaleAfterSwitch()).run(OPS)


def test_a_direct_write_cut_short_is_caught(plain_dir: Path) -> None:
    with pytest.raises(WrongByteError):
        Exerciser([plain_dir / "file"], 3, direct=True, io=DirectTearsPages()).run(OPS)


@pytest.mark.parametrize("lie", [AppendsInPieces, AppendsByStaleSize])
def test_lost_and_torn_appends_are_caught(plain_dir: Path, lie: type[FileIo]) -> None:
    with pytest.raises(WrongByteError, match=r"at byte|records found"):
        exercise_append([plain_dir / "file"], 3, 400, io=lie())


class SpillsOver(FileIo):
    """A long write writes a byte too many."""

    def write(self, fd: int, data: bytes, offset: int) -> None:
        super().write(fd, data + b"\0" if len(data) > 100_000 else data, offset)


def test_a_region_changed_by_somebody_else_is_caught(plain_dir: Path) -> None:
    with pytest.raises(WrongByteError, match=r"processes ended with|region"):
        exercise_regions([plain_dir / "file"], 3, 100, processes=2, io=SpillsOver())


@pytest.mark.parametrize("mode", list(Mode))
def test_an_honest_file_passes_and_leaves_nothing(plain_dir: Path, mode: Mode) -> None:
    exercise(mode, plain_dir, None, 5, 100)
    exercise(mode, plain_dir, plain_dir, 6, 100)
    assert list(plain_dir.iterdir()) == []


def test_the_same_seed_makes_the_same_file(plain_dir: Path) -> None:
    exercisers = [
        Exerciser([plain_dir / name], seed, size_max=1 << 20) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    for exerciser in exercisers:
        exerciser.run(OPS)
    models = [exerciser.model for exerciser in exercisers]
    assert models[0] == models[1] != models[2]
    assert (plain_dir / "a").read_bytes() == models[0]


def test_the_command_line_says_how_it_went(plain_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(plain_dir), "--ops", "50", "--seed", "4"]) == 0
    assert "every byte is right" in capsys.readouterr().out
    assert main([str(plain_dir / "missing"), "--ops", "50"]) == 1
    assert "missing" in capsys.readouterr().out
