"""Run one plan of calls on two sides, each in a process of its own, and find the first difference.

Each side's calls are made with that side's private directory as root and working directory, so that nothing (open
files, ids, umask, a hang) outlives the run. Needs root: for chroot, chown and mknod, and for acting as other users.
"""

import contextlib
import dataclasses
import enum
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

from benchfs_fuse.testing.calls import Call, Fields, Sut, Value
from benchfs_fuse.testing.syscalls import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from benchfs_fuse.testing.witness import Witness, wait_for_tick

# A call that takes longer hangs: the slowest call of the pool reads some megabytes.
DEADLINE_S = 60.0

TIME_FIELDS = frozenset({"atime", "mtime", "ctime", "mtime to ctime"})
#: What a time shows that a call has moved.
_MOVED: frozenset[Value] = frozenset({"new", "later", "earlier"})


class Depth(enum.Enum):
    """How much to compare: answers and the end; the tree after each call; and how each call moved the times."""

    ANSWERS = enum.auto()
    TREES = enum.auto()
    TIMES = enum.auto()


@dataclass(frozen=True, slots=True)
class Plan:
    """A sequence of calls and how closely to watch them."""

    calls: tuple[Call, ...]
    depth: Depth


@dataclass(frozen=True, slots=True)
class Seen:
    """What one side showed after one call: its answer, and the tree if it was looked at."""

    answer: Value
    places: dict[bytes, Fields]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two sides first differ: after which call, at which place (b"" for its answer), in which field.

    `context` is all that the right side, the reference, showed at that place.
    """

    index: int
    call: Call
    place: bytes
    field: str
    left: Value
    right: Value
    context: Fields = dataclasses.field(default_factory=dict, compare=False)

    def kind(self) -> tuple[str, ...]:
        """Say what shrinking must keep, lest it find another bug: field, sorts of values, the call if it matters."""
        matters = self.field == "answer" or self.field in TIME_FIELDS
        return (self.field, _sort_of(self.left), _sort_of(self.right), self.call.name if matters else "")

    def __str__(self) -> str:
        """Say it in a few lines."""
        where = f"{self.field} of {self.place!r}" if self.place else self.field
        lines = [f"call {self.index}: {self.call}", f"  {where} differs"]
        if self.field == "content":
            lines.append(f"  {_first_wrong_byte(self.left, self.right)}")
        else:
            lines += [f"  left:  {_shorten(self.left)}", f"  right: {_shorten(self.right)}"]
        return "\n".join(lines)


Allowance = Callable[[Difference], bool]


class TimesApart:
    """Know which times differ since a difference was allowed: until a call moves them, they still do.

    A time that a call has set is seen as its value for as long as it stays, one by the clock as "same".
    """

    def __init__(self) -> None:
        self._apart: set[tuple[Value, str]] = set()

    def follow(self, seen: Seen) -> None:
        """Go on to what one side shows after the next call: by the new names, without what has moved there."""
        self._apart = {
            (place, name)
            for place, fields in seen.places.items()
            for name in TIME_FIELDS
            if {(place, name), (fields.get("was"), name)} & self._apart and fields.get(name) not in _MOVED
        }

    def allow(self, difference: Difference) -> None:
        """Remember a difference that was allowed, if it is one of times."""
        if difference.field in TIME_FIELDS:
            self._apart.add((difference.place, difference.field))

    def explains(self, difference: Difference) -> bool:
        """Tell whether a difference is one that was allowed before: neither side has moved that time since."""
        place, name = difference.place, difference.field
        if name == "mtime to ctime":  # left out where the mtime was set by a call
            return (place, "mtime") in self._apart and None in (difference.left, difference.right)
        return (place, name) in self._apart and not {difference.left, difference.right} & _MOVED


def _sort_of(value: Value) -> str:
    return value if isinstance(value, str) and value.startswith("<") else type(value).__name__


def _shorten(value: Value) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}… ({len(text)} characters)"


def _first_wrong_byte(left: Value, right: Value) -> str:
    if not isinstance(left, tuple) or not isinstance(right, tuple):
        return f"left: {_shorten(left)}, right: {_shorten(right)}"
    for one, other in zip(left, right, strict=False):
        assert isinstance(one, tuple) and isinstance(other, tuple)
        start, packed, other_start, other_packed = *one, *other
        assert isinstance(start, int) and isinstance(packed, bytes) and isinstance(other_packed, bytes)
        if start != other_start:
            break
        a, b = zlib.decompress(packed), zlib.decompress(other_packed)
        for index, (byte, other_byte) in enumerate(zip(a, b, strict=False)):
            if byte != other_byte:
                return f"first wrong byte at {start + index}: left {byte:#04x}, right {other_byte:#04x}"
        if len(a) != len(b):
            return f"left has {len(a)} bytes from {start}, right {len(b)}"
    return "the files have different lengths"


def _make_calls(sut_class: Callable[[], Sut], root: str, plan: Plan, answers: Connection) -> None:
    """Make a plan's calls inside `root` and send what was seen after each, in a process of its own."""
    sut = sut_class()
    os.setgroups([])
    os.umask(0o022)
    os.chroot(root)
    os.chdir("/")
    witness = Witness(sut, b"/")
    watched = plan.depth is not Depth.ANSWERS
    witness.look(content=False)
    for index, call in enumerate(plan.calls):
        if plan.depth is Depth.TIMES:
            wait_for_tick()
        answer = sut.make(call)
        last = index == len(plan.calls) - 1
        answers.send(Seen(answer, witness.look(content=last) if watched or last else {}))


def serve(answers: Connection) -> None:
    """Make the calls of every plan that arrives in a forked child, and send None after its last answer."""
    while True:
        try:
            sut_class, root, plan = answers.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            try:
                _make_calls(sut_class, root, plan, answers)
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)
        answers.send(None)


class SideFailedError(Exception):
    """A side's process broke down by itself, or did not answer: its text says in which call."""


@contextlib.contextmanager
def _private_directory(parent: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="differential-", dir=parent))
    path.chmod(0o777)
    try:
        yield path
    finally:
        shutil.rmtree(path)


class _Side:
    """One side of a pair: its directory and the process, small and without threads, that forks the children."""

    def __init__(self, name: str, parent: Path, sut_class: Callable[[], Sut], deadline_s: float) -> None:
        self.parent = parent
        self._name = name
        self._sut_class = sut_class
        self._deadline_s = deadline_s
        self._busy = False
        self._answers, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchfs_fuse.testing.side", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,
            )

    def start(self, root: Path, plan: Plan) -> None:
        """Begin a plan inside `root`."""
        self._answers.send((self._sut_class, str(root), plan))
        self._busy = True

    def receive(self, index: int, call: Call) -> Seen:
        """Return what was seen after the next call. Raises SideFailedError."""
        seen = self._receive(f"call {index}: {call}")
        if seen is None:
            raise SideFailedError(f"{self._name}: process ended in call {index}: {call}")
        return seen

    def finish(self) -> None:
        """Wait for the end of the plan, whatever it still answers."""
        while self._busy:
            self._receive("the end")

    def _receive(self, what: str) -> Seen | None:
        if not self._answers.poll(self._deadline_s):
            self._busy = False
            self.close()
            raise SideFailedError(f"{self._name}: no answer in {self._deadline_s} s to {what}")
        seen = self._answers.recv()
        assert seen is None or isinstance(seen, Seen)
        self._busy = seen is not None
        return seen

    def close(self) -> None:
        """End the process and the child that makes calls; one that is stuck in the kernel is left to the kernel."""
        self._answers.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Pair:
    """Two directories to compare: the left is the one under test, the right the reference.

    `left_sut` makes the calls on the left; a test gives one that lies. A context manager: it holds two processes.
    """

    def __init__(
        self,
        left: Path,
        right: Path,
        allowances: tuple[Allowance, ...] = (),
        left_sut: Callable[[], Sut] = Sut,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._allowances = allowances
        self._left = _Side("left", left, left_sut, deadline_s)
        self._right = _Side("right", right, Sut, deadline_s)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._left.close()
        self._right.close()

    def run(self, plan: Plan) -> Difference | None:
        """Run a plan on fresh directories on both sides; return the first difference. Raises SideFailedError."""
        with _private_directory(self._left.parent) as left_root, _private_directory(self._right.parent) as right_root:
            self._left.start(left_root, plan)
            self._right.start(right_root, plan)
            try:
                return self._first_difference(plan)
            finally:
                self._left.finish()
                self._right.finish()

    def _first_difference(self, plan: Plan) -> Difference | None:
        apart = TimesApart()
        for index, call in enumerate(plan.calls):
            left, right = self._left.receive(index, call), self._right.receive(index, call)
            apart.follow(right)
            for difference in _differences(index, call, left, right, plan.depth):
                if apart.explains(difference):
                    continue
                if not any(allows(difference) for allows in self._allowances):
                    return difference
                apart.allow(difference)
        return None

    def accepts_direct(self) -> bool:
        """Tell whether both sides open files with O_DIRECT at all (tmpfs does since Linux 6.6)."""
        return all(_accepts_direct(side.parent) for side in (self._left, self._right))

    def accepts_zero_range(self) -> bool:
        """Tell whether both sides take ZERO_RANGE (tmpfs does not)."""
        return all(ZERO_RANGE in space_modes(side.parent) for side in (self._left, self._right))


def _accepts_direct(parent: Path) -> bool:
    with _private_directory(parent) as path:
        try:
            os.close(os.open(path / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
        except OSError:
            return False
    return True


def space_modes(parent: Path) -> frozenset[int]:
    """Return those modes of fallocate, out of what we serve, that files below `parent` take. Raises OSError."""
    modes = (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)
    with _private_directory(parent) as path, (path / "probe").open("wb") as file:
        return frozenset(mode for mode in modes if _accepts_mode(file.fileno(), mode))


def _accepts_mode(fd: int, mode: int) -> bool:
    try:
        fallocate(fd, mode, 0, 1)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def _differences(index: int, call: Call, left: Seen, right: Seen, depth: Depth) -> Iterator[Difference]:
    if left.answer != right.answer:
        yield Difference(index, call, b"", "answer", left.answer, right.answer)
    for place in sorted(left.places.keys() | right.places.keys()):
        one, other = left.places.get(place), right.places.get(place)
        if one is None or other is None:
            yield Difference(index, call, place, "existence", one is not None, other is not None)
            continue
        for name in sorted(one.keys() | other.keys(), key=lambda name: (name == "content", name)):
            a, b = one.get(name), other.get(name)
            clocks = name in TIME_FIELDS and not (isinstance(a, int) or isinstance(b, int))
            if a != b and not (clocks and depth is not Depth.TIMES):
                yield Difference(index, call, place, name, a, b, other)
