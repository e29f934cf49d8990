"""The differential finds what it is for: two alike agree, every planted lie is caught and shown in a few calls."""

import contextlib
import errno
import fcntl
import functools
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchfs_fuse.testing.calls import CALLS, Call, Sut, Value, is_direct, pattern
from benchfs_fuse.testing.differential import ALLOWANCES, DifferenceFoundError, check, reproduction, shrink
from benchfs_fuse.testing.invent import invent
from benchfs_fuse.testing.sides import Depth, Difference, Pair, Plan, Seen, SideFailedError, TimesApart
from benchfs_fuse.testing.syscalls import KEEP_SIZE, PUNCH_HOLE, RENAME_NOREPLACE, getdents64

pytest_plugins = ("mounts",)

SEEDS = range(200)
CALLS_PER_RUN = 60


class WrongErrno(Sut):
    """A directory that is not empty is called busy."""

    def rmdir(self, path: bytes) -> Value:
        try:
            return super().rmdir(path)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise OSError(errno.EBUSY, "busy") from error
            raise


class WrongByte(Sut):
    """The last byte of a long write is another."""

    def pwrite(self, slot: int, length: int, fill: int, offset: int) -> Value:
        if length == 5000:
            return os.pwrite(self.fd(slot), pattern(fill, length - 1) + b"\0", offset)
        return super().pwrite(slot, length, fill, offset)


class LostTruncate(Sut):
    """Cutting an open file short does nothing."""

    def ftruncate(self, slot: int, size: int) -> Value:
        if 0 <= size < os.fstat(self.fd(slot)).st_size:
            return None
        return super().ftruncate(slot, size)


class OldBytesReturn(Sut):
    """What a truncation cut off is there again when the file grows."""

    def __init__(self) -> None:
        super().__init__()
        self._cut: dict[int, bytes] = {}

    def truncate(self, path: bytes, size: int) -> Value:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            self._truncate(fd, size)
        finally:
            os.close(fd)
        return None

    def ftruncate(self, slot: int, size: int) -> Value:
        self._truncate(self.fd(slot), size)
        return None

    def _truncate(self, fd: int, size: int) -> None:
        ino, before = os.fstat(fd).st_ino, os.fstat(fd).st_size
        readable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        content = os.pread(fd, before, 0) if readable and 0 <= size < before <= 1 << 24 else b""
        os.ftruncate(fd, size)
        if size < before:
            self._cut[ino] = content
        elif self._cut.get(ino):
            os.pwrite(fd, self._cut[ino][before:size], before)


class StaleSize(Sut):
    """fstat tells the size of the first time that it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[int, Value] = {}

    def fstat(self, slot: int) -> Value:
        return self._first.setdefault(os.fstat(self.fd(slot)).st_ino, super().fstat(slot))


class LinkIsCopy(Sut):
    """A link to a file is a copy of it."""

    def link(self, source: bytes, target: bytes, follow: int) -> Value:
        super().link(source, target, follow)
        if os.path.isfile(target) and not os.path.islink(target):
            content = Path(os.fsdecode(target)).read_bytes() if os.path.getsize(target) < 1 << 20 else b""
            os.unlink(target)
            Path(os.fsdecode(target)).write_bytes(content)
        return None


class ChmodModifies(Sut):
    """chmod moves mtime too."""

    def chmod(self, path: bytes, mode: int) -> Value:
        answer = super().chmod(path, mode)
        os.utime(path, ns=(os.stat(path).st_atime_ns, time.time_ns()))
        return answer


class WriteLeavesMtime(Sut):
    """A write leaves mtime as it was."""

    def pwrite(self, slot: int, length: int, fill: int, offset: int) -> Value:
        before = os.fstat(self.fd(slot))
        answer = super().pwrite(slot, length, fill, offset)
        os.utime(self.fd(slot), ns=(before.st_atime_ns, before.st_mtime_ns))
        return answer


class SeekSkips(Sut):
    """The entry at which a reader of a directory resumes is lost."""

    def seekdir(self, slot: int, mark: int) -> Value:
        answer = super().seekdir(slot, mark)
        getdents64(self.streams[slot].fd)
        return answer


class KeepsSetuid(Sut):
    """A change of owner leaves the setuid bit."""

    def chown(self, path: bytes, uid: int, gid: int, follow: int) -> Value:
        before = os.stat(path, follow_symlinks=bool(follow)).st_mode if os.path.exists(path) else 0
        answer = super().chown(path, uid, gid, follow)
        if os.path.isfile(path) and not os.path.islink(path):
            os.chmod(path, before & 0o7777)
        return answer


class ForgetsXattrFlags(Sut):
    """XATTR_CREATE replaces."""

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int, follow: int) -> Value:
        return super().setxattr(path, name, value, flags & ~os.XATTR_CREATE, follow)


class AppendsWhereItWas(Sut):
    """O_APPEND is forgotten."""

    def open(self, slot: int, path: bytes, flags: int, mode: int) -> Value:
        return super().open(slot, path, flags & ~os.O_APPEND, mode)


class NoreplaceReplaces(Sut):
    """RENAME_NOREPLACE replaces."""

    def renameat2(self, source: bytes, target: bytes, flags: int) -> Value:
        return super().renameat2(source, target, 0 if flags == RENAME_NOREPLACE else flags)


class PunchKeeps(Sut):
    """A hole is not punched."""

    def fallocate(self, slot: int, mode: int, offset: int, length: int) -> Value:
        punches = mode == PUNCH_HOLE | KEEP_SIZE
        return super().fallocate(slot, KEEP_SIZE if punches else mode, offset, length)


class AllocationForgetsSize(Sut):
    """An allocation leaves the size."""

    def fallocate(self, slot: int, mode: int, offset: int, length: int) -> Value:
        return super().fallocate(slot, mode or KEEP_SIZE, offset, length)


class PretendsToAllocate(Sut):
    """A way of fallocate that nobody knows succeeds, and does nothing."""

    def fallocate(self, slot: int, mode: int, offset: int, length: int) -> Value:
        try:
            return super().fallocate(slot, mode, offset, length)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return None
            raise


class PosixAllocatesLess(Sut):
    """posix_fallocate leaves the last byte out."""

    def posix_fallocate(self, slot: int, offset: int, length: int) -> Value:
        return super().posix_fallocate(slot, offset, length - 1 if length > 1 else length)


class DataIsPassedOver(Sut):
    """A seek of data finds what comes behind the next hole."""

    def seek(self, fd: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_DATA:
            offset = super().seek(fd, offset, os.SEEK_HOLE)
        return super().seek(fd, offset, whence)


class HoleIsAnywhere(Sut):
    """A seek of a hole finds one where it begins."""

    def seek(self, fd: int, offset: int, whence: int) -> int:
        found = super().seek(fd, offset, whence)
        return os.lseek(fd, offset, os.SEEK_SET) if whence == os.SEEK_HOLE else found


class CopiesTheNextByte(Sut):
    """A copy begins a byte late."""

    def copy_file_range(self, slot: int, offset: int, other: int, other_offset: int, length: int) -> Value:
        return super().copy_file_range(slot, offset + 1, other, other_offset, length)


class LosesMappings(Sut):
    """What a mapping writes is lost."""

    def map_write(self, slot: int, length: int, fill: int, offset: int) -> Value:
        before = self.pread(slot, length, offset) if length and offset >= 0 and not is_direct(self.fd(slot)) else b""
        answer = super().map_write(slot, length, fill, offset)
        if isinstance(before, bytes):
            os.pwrite(self.fd(slot), before, offset)
        return answer


class LocksNothing(Sut):
    """flock always succeeds."""

    def flock(self, slot: int, operation: int) -> Value:
        with contextlib.suppress(BlockingIOError):
            super().flock(slot, operation)
        return None


class LocksTooMuch(Sut):
    """A lock of bytes is one of the whole file."""

    def setlk(self, slot: int, kind: int, start: int, length: int, ofd: int) -> Value:
        whole = start > 0 and length > 0
        return super().setlk(slot, kind, 0 if whole else start, 0 if whole else length, ofd)


class KeepsLocks(Sut):
    """A lock that was given back stays."""

    def setlk(self, slot: int, kind: int, start: int, length: int, ofd: int) -> Value:
        return None if kind == fcntl.F_UNLCK else super().setlk(slot, kind, start, length, ofd)


class InheritsNothing(Sut):
    """A default ACL is not handed down."""

    def mkdir(self, path: bytes, mode: int) -> Value:
        super().mkdir(path, mode)
        with contextlib.suppress(OSError):
            os.removexattr(path, "system.posix_acl_default")
        return None


class RefusesUnnamed(Sut):
    """O_TMPFILE is refused."""

    def open_unnamed(self, path: bytes, flags: int, mode: int) -> Value:
        super().open_unnamed(path, flags, mode)
        raise OSError(errno.EOPNOTSUPP, "refused")


ANSWERS = [
    (PunchKeeps, {"answer", "content", "allocated"}),
    (AllocationForgetsSize, {"answer", "size", "content", "allocated"}),
    (PretendsToAllocate, {"answer"}),
    (PosixAllocatesLess, {"answer", "size", "content", "allocated"}),
    (DataIsPassedOver, {"answer", "position"}),
    (HoleIsAnywhere, {"answer", "position"}),
    (CopiesTheNextByte, {"answer", "content", "size"}),
    (LosesMappings, {"answer", "content"}),
    (LocksNothing, {"answer"}),
    (LocksTooMuch, {"answer"}),
    (KeepsLocks, {"answer"}),
    (InheritsNothing, {"answer", "xattr system.posix_acl_default"}),
    (RefusesUnnamed, {"answer"}),
    (WrongErrno, {"answer"}),
    (WrongByte, {"answer", "content"}),
    (LostTruncate, {"size", "answer", "content", "allocated"}),
    (OldBytesReturn, {"answer", "content"}),
    (StaleSize, {"answer"}),
    (LinkIsCopy, {"nlink", "mode", "same inode as", "answer", "allocated"}),
    (SeekSkips, {"answer"}),
    (KeepsSetuid, {"mode", "answer"}),
    (ForgetsXattrFlags, {"answer"}),
    (AppendsWhereItWas, {"answer", "content", "size", "position"}),
    (NoreplaceReplaces, {"answer"}),
]
TIMES = [
    (ChmodModifies, {"mtime", "mtime to ctime"}),
    (WriteLeavesMtime, {"mtime", "mtime to ctime"}),
]
LIES = [(lie, fields, Depth.ANSWERS) for lie, fields in ANSWERS] + [(lie, fields, Depth.TIMES) for lie, fields in TIMES]


def smallest_difference(pair: Pair, depth: Depth, about: str) -> tuple[Plan, Difference]:
    for seed in SEEDS:
        plan = replace(invent(seed, CALLS_PER_RUN, about=about), depth=depth)
        found = pair.run(plan)
        if found is not None:
            return shrink(plan, found, pair.run)
    pytest.fail("the lie was not found out")


#: Lies that take seconds to find and shrink each.
DEAR = (LocksNothing, AppendsWhereItWas, AllocationForgetsSize, HoleIsAnywhere, PunchKeeps, LinkIsCopy, SeekSkips)


@pytest.mark.parametrize(
    ("lie", "fields", "depth"),
    [pytest.param(*one, id=one[0].__name__, marks=[pytest.mark.slow] if one[0] in DEAR else []) for one in LIES],
)
def test_a_lie_is_caught_and_shown_in_few_calls(
    plain_dir: Path, reference: Path, lie: type[Sut], fields: set[str], depth: Depth
) -> None:
    with Pair(plain_dir, reference, left_sut=lie) as pair:
        about = next((name for name in vars(lie) if name in CALLS), "seek_space")
        plan, difference = smallest_difference(pair, depth, about)
        assert difference.field in fields
        assert len(plan.calls) <= 6
        assert pair.run(plan) == difference
    with Pair(plain_dir, reference) as pair:
        assert pair.run(plan) is None


def test_check_raises_with_the_program_that_shows_it(plain_dir: Path, reference: Path) -> None:
    with (
        Pair(plain_dir, reference, left_sut=WrongByte) as pair,
        pytest.raises(DifferenceFoundError, match="CALLS = ") as found,
    ):
        check_all(pair, SEEDS)
    assert any(call.name == "pwrite" for call in found.value.plan.calls)


def check_all(pair: Pair, seeds: range) -> None:
    for seed in seeds:
        check(pair, seed, CALLS_PER_RUN)


def test_tmpfs_agrees_with_itself(plain_dir: Path, reference: Path) -> None:
    with Pair(plain_dir, reference) as pair:
        check_all(pair, range(15))


def test_what_holds_the_temporary_files_agrees_with_tmpfs(tmp_path: Path, reference: Path) -> None:
    with Pair(tmp_path, reference, tuple(ALLOWANCES.values())) as pair:
        check_all(pair, range(15))


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("atime", ("chmod", "mtime", "same", "later")),
        ("allocated", ("chmod", "size", 0, 1)),
        ("xattr-ctime", ("chmod", "ctime", "same", "later")),
        ("xattr-ctime", ("setxattr", "mtime", "same", "later")),
        ("truncate-times", ("truncate", "mtime", "same", "later")),
        ("seekdir", ("readdir", "answer", "<EINVAL>", None)),
        ("nodev", ("open", "answer", "<EACCES>", None)),
        ("chown-nothing", ("chown", "ctime", "same", "later")),
        ("unnamed", ("open", "answer", "<ENOTSUP>", None)),
        ("unnamed", ("open_unnamed", "answer", "<EACCES>", None)),
        ("ofd-pid", ("getlk", "answer", (1, 0, 0, False), (1, 0, 0, True))),
        ("ofd-pid", ("getlk", "answer", (1, 0, 0, True), (0, 0, 0, False))),
        ("ofd-pid", ("getlk", "answer", (1, 0, 0, True), (2, 0, 0))),
        ("map-times", ("pwrite", "mtime", "same", "later")),
        ("map-times", ("map_write", "size", 0, 1)),
    ],
)
def test_an_allowance_allows_no_more_than_it_says(name: str, difference: tuple[str, str, Value, Value]) -> None:
    call, field, left, right = difference
    found = Difference(0, Call(call, ()), b"/a", field, left, right, {"size moved": True})
    assert not ALLOWANCES[name](found)


def test_times_that_were_allowed_to_differ_are_no_news_until_they_move() -> None:
    """futimens, truncate to the same size (allowed to move the times or not), any other call."""
    apart = TimesApart()
    call = Call("getxattr", (b"/f", b"user.a"))

    def differs(field: str, left: Value, right: Value, place: bytes = b"/f") -> bool:
        return not apart.explains(Difference(0, call, place, field, left, right))

    def shows(place: bytes, was: bytes, mtime: Value) -> None:
        apart.follow(Seen(None, {place: {"was": was, "mtime": mtime}}))

    assert differs("mtime", 7, "same")
    apart.allow(Difference(0, call, b"/f", "mtime", 7, "later"))
    shows(b"/f", b"/f", "same")
    assert not differs("mtime", 7, "same")
    assert not differs("mtime to ctime", None, "<")
    assert differs("mtime to ctime", ">", "<")
    assert differs("mtime", "later", "same")
    assert differs("ctime", 7, "same")
    assert differs("mtime", 7, "same", b"/g")
    shows(b"/g", b"/f", "same")  # it was renamed
    assert not differs("mtime", 7, "same", b"/g")
    assert differs("mtime", 7, "same")
    shows(b"/g", b"/g", "later")
    assert differs("mtime", 7, "later", b"/g")
    shows(b"/g", b"/g", "same")
    assert differs("mtime", 7, "same", b"/g")


def test_nothing_is_left_behind(plain_dir: Path, reference: Path) -> None:
    files_open = len(os.listdir("/proc/self/fd"))
    here = Path.cwd()
    with Pair(plain_dir, reference) as pair:
        check(pair, 2, CALLS_PER_RUN)
    assert list(plain_dir.iterdir()) == []
    assert list(reference.iterdir()) == []
    assert Path.cwd() == here
    assert len(os.listdir("/proc/self/fd")) == files_open


class Hangs(Sut):
    def mkdir(self, path: bytes, mode: int) -> Value:
        time.sleep(60)
        return None


class Dies(Sut):
    def mkdir(self, path: bytes, mode: int) -> Value:
        os._exit(1)


@pytest.mark.parametrize(("lie", "words", "deadline_s"), [(Hangs, "no answer", 3), (Dies, "process ended", 60)])
def test_a_call_that_never_answers_is_named(
    plain_dir: Path, reference: Path, lie: type[Sut], words: str, deadline_s: float
) -> None:
    plan = Plan((Call("stat", (b"/", 1)), Call("mkdir", (b"a", 0o755))), Depth.ANSWERS)
    with (
        Pair(plain_dir, reference, left_sut=lie, deadline_s=deadline_s) as pair,
        pytest.raises(SideFailedError, match=f"left: {words}.* call 1.*mkdir"),
    ):
        pair.run(plan)


def test_the_reproduction_is_python_that_rebuilds_the_plan() -> None:
    plan = invent(seed=5, count=300, direct=True)
    difference = Difference(0, plan.calls[0], b"/a", "size", 1, 2)
    names: dict[str, object] = {"__name__": "reproduction"}
    exec(compile(reproduction(plan, difference, 5), "reproduction", "exec"), names)
    assert names["CALLS"] == plan.calls


def test_a_seed_always_gives_the_same_plan() -> None:
    assert invent(7, 100) == invent(7, 100)
    assert invent(7, 100) != invent(8, 100)


class Tally(Sut):
    """Write down which calls succeeded and which errnos came."""

    def __init__(self, log: str) -> None:
        super().__init__()
        self._log = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def make(self, call: Call) -> Value:
        answer = super().make(call)
        os.write(self._log, f"{call.name} {answer if isinstance(answer, str) else 'ok'}\n".encode())
        return answer


# What these are refused is refused before the file system hears of it, or needs a file of a kind seldom open.
SELDOM_FAIL = {
    "access",
    "lseek",
    "close",
    "dup",
    "fsync",
    "fdatasync",
    "fstat",
    "readdir",
    "telldir",
    "seekdir",
    "closedir",
    "umask",
}


def test_every_call_succeeds_and_fails_in_the_sequences(plain_dir: Path, reference: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Pair(plain_dir, reference, left_sut=functools.partial(Tally, str(log))) as pair:
        for seed in SEEDS:
            assert pair.run(replace(invent(seed, CALLS_PER_RUN, direct=True), depth=Depth.ANSWERS)) is None
    seen = set(log.read_text().splitlines())
    assert {name for name in CALLS if f"{name} ok" not in seen} == set()
    assert {name for name in CALLS if not any(line.startswith(f"{name} <E") for line in seen)} <= SELDOM_FAIL
