"""The differential finds what it is for: two alike agree, every planted lie is caught and shown in a few calls."""

import errno
import fcntl
import functools
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchfs_fuse.testing.calls import CALLS, Call, Sut, Value, pattern
from benchfs_fuse.testing.differential import ALLOWANCES, DifferenceFoundError, check, reproduction, shrink
from benchfs_fuse.testing.invent import invent
from benchfs_fuse.testing.sides import Depth, Difference, Pair, Plan, SideFailedError
from benchfs_fuse.testing.syscalls import RENAME_NOREPLACE, getdents64

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


ANSWERS = [
    (WrongErrno, {"answer"}),
    (WrongByte, {"answer", "content"}),
    (LostTruncate, {"size", "answer", "content", "allocated"}),
    (OldBytesReturn, {"answer", "content"}),
    (StaleSize, {"answer"}),
    (LinkIsCopy, {"nlink", "same inode as", "answer", "allocated"}),
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


def smallest_difference(pair: Pair, depth: Depth) -> tuple[Plan, Difference]:
    for seed in SEEDS:
        plan = replace(invent(seed, CALLS_PER_RUN), depth=depth)
        found = pair.run(plan)
        if found is not None:
            return shrink(plan, found, pair.run)
    pytest.fail("the lie was not found out")


@pytest.mark.parametrize(("lie", "fields", "depth"), LIES, ids=[lie.__name__ for lie, _, _ in LIES])
def test_a_lie_is_caught_and_shown_in_few_calls(
    plain_dir: Path, reference: Path, lie: type[Sut], fields: set[str], depth: Depth
) -> None:
    with Pair(plain_dir, reference, left_sut=lie) as pair:
        plan, difference = smallest_difference(pair, depth)
        assert difference.field in fields
        assert len(plan.calls) <= 5
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
        ("now", ("chmod", "mtime to ctime", "<", "=")),
        ("now", ("utimensat", "mtime", "same", "later")),
        ("chown-nothing", ("chown", "ctime", "same", "later")),
        ("set-id", ("pwrite", "mode", "0o4755", "0o4711")),
    ],
)
def test_an_allowance_allows_no_more_than_it_says(name: str, difference: tuple[str, str, Value, Value]) -> None:
    call, field, left, right = difference
    found = Difference(0, Call(call, ()), b"/a", field, left, right, {"size moved": True})
    assert not ALLOWANCES[name](found)


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
        time.sleep(3)
        return None


class Dies(Sut):
    def mkdir(self, path: bytes, mode: int) -> Value:
        os._exit(1)


@pytest.mark.parametrize(("lie", "words"), [(Hangs, "no answer"), (Dies, "process ended")])
def test_a_call_that_never_answers_is_named(plain_dir: Path, reference: Path, lie: type[Sut], words: str) -> None:
    plan = Plan((Call("stat", (b"/", 1)), Call("mkdir", (b"a", 0o755))), Depth.ANSWERS)
    with (
        Pair(plain_dir, reference, left_sut=lie, deadline_s=1) as pair,
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
