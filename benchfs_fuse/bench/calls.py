"""Time single system calls on a mount and on the floor below it: ``benchfs bench calls``.

The floor is ``memory_fs``, mounted for the time of the run with the same time-out for attributes: what the kernel,
FUSE, pyfuse3 and Python cost with no cluster behind. Both do the same in alternating rounds. Data goes past the page
cache (O_DIRECT), names and attributes past the kernel's other caches where the time-out is 0.

What a call costs in processor time is counted besides, of the process of the mount and those of its daemons on this
host: polling for answers counts, too.
"""

import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import control, processes
from ..errors import UserError
from ..limits import KIB, MIB
from . import machine
from .floors import memory_mount
from .machine import Machine, MountFacts
from .mounted import directory_in
from .samples import Ratio, Samples, Summary, ratio

#: Bytes of one short and of one long read or write, and how many of each a file holds.
SHORT = 4 * KIB
SHORT_COUNT = 64
LONG = MIB
LONG_COUNT = 16
#: Long calls take so much longer that a part of the others' number does.
LONG_PART = 8
#: Seconds for processes that have answered everything to come to rest: longer than they poll.
_REST_S = 0.2
#: Seconds for the mount to say who its daemons are.
_ANSWER_S = 5.0
_WIDTH = 110
_OURS, _FLOOR = "mount", "floor"


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold the times of one system call (or two that belong together) on one file system, and what they cost there.

    ``cpu_us``: processor time of one, of the processes that serve it. ``ratio``: of the mount's time to the floor's.
    """

    name: str
    bytes: int
    on: str
    samples: Samples
    summary: Summary
    cpu_us: float
    ratio: Ratio | None = None


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold everything measured, and what it was measured on."""

    format: int
    machine: Machine
    mount: MountFacts
    attr_timeout_s: float
    calls: tuple[Call, ...]


class _Subject(NamedTuple):
    """Be one file system: a directory on it, and the processes that serve it."""

    name: str
    directory: Path
    processes: tuple[int, ...]


#: Do one call: the number of the repetition says to which name or place.
_One = Callable[[int], object]


@contextmanager
def _calls(directory: Path) -> Iterator[Mapping[tuple[str, int], _One]]:
    """Yield what to do in a directory, in order: what one makes, a later one uses and removes."""
    short, long = mmap.mmap(-1, SHORT), mmap.mmap(-1, LONG)
    short[:] = os.urandom(SHORT)
    at = f"{directory}/"
    with ExitStack() as stack:

        def opened(name: str) -> int:
            file = os.open(at + name, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
            stack.callback(os.close, file)
            return file

        small, large = opened("small"), opened("large")
        for place in range(SHORT_COUNT):
            os.pwritev(small, [short], place * SHORT)
        for place in range(LONG_COUNT):
            os.pwritev(large, [long], place * LONG)
        yield {
            ("create, close", 0): lambda i: os.close(os.open(f"{at}f{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
            ("stat", 0): lambda i: os.stat(f"{at}f{i}"),
            ("fstat", 0): lambda i: os.fstat(small),
            ("open, close", 0): lambda i: os.close(os.open(f"{at}f{i}", os.O_RDONLY)),
            ("rename", 0): lambda i: os.rename(f"{at}f{i}", f"{at}g{i}"),
            ("unlink", 0): lambda i: os.unlink(f"{at}g{i}"),
            ("mkdir", 0): lambda i: os.mkdir(f"{at}d{i}"),
            ("rmdir", 0): lambda i: os.rmdir(f"{at}d{i}"),
            ("write", SHORT): lambda i: os.pwritev(small, [short], i * 7 % SHORT_COUNT * SHORT),
            ("read", SHORT): lambda i: os.preadv(small, [short], i * 7 % SHORT_COUNT * SHORT),
            ("write", LONG): lambda i: os.pwritev(large, [long], i % LONG_COUNT * LONG),
            ("read", LONG): lambda i: os.preadv(large, [long], i % LONG_COUNT * LONG),
        }


def measure(
    subjects: Sequence[_Subject], iterations: int, rounds: int, note: Callable[[str], None]
) -> list[tuple[str, int, dict[str, tuple[Samples, float]]]]:
    """Time all calls on all subjects in alternating rounds; return, by subject, samples and processor time of one."""
    with ExitStack() as stack:
        calls = {subject.name: stack.enter_context(_calls(subject.directory)) for subject in subjects}
        names = list(next(iter(calls.values())))
        times: dict[tuple[tuple[str, int], str], list[list[int]]] = {}
        cpu_ns: dict[tuple[tuple[str, int], str], int] = {}
        for _ in range(rounds):
            for subject in subjects:
                for name in names:
                    count = max(1, iterations // (LONG_PART if name[1] >= LONG else 1))
                    before = _cpu_ns(subject.processes)
                    times.setdefault((name, subject.name), []).append(_time(calls[subject.name][name], count))
                    cpu_ns[name, subject.name] = (
                        cpu_ns.get((name, subject.name), 0) + _cpu_ns(subject.processes) - before
                    )
                note(subject.name)
        found = []
        for name in names:
            by_subject = {}
            for subject in subjects:
                samples = Samples.of(times[name, subject.name])
                by_subject[subject.name] = (samples, cpu_ns[name, subject.name] / samples.count / 1000)
            found.append((*name, by_subject))
        return found


def _time(call: _One, count: int) -> list[int]:
    durations = []
    for number in range(count):
        started_ns = time.perf_counter_ns()
        call(number)
        durations.append(time.perf_counter_ns() - started_ns)
    return durations


def _cpu_ns(pids: Sequence[int]) -> int:
    """Sum up the processor time of processes, when they have come to rest: what they do behind an answer counts."""
    processes.wait_rest(pids, _REST_S)
    return sum(processes.cpu_ns(pid) for pid in pids)


def run_calls(mountpoint: Path, *, iterations: int, rounds: int, attr_timeout_s: float, as_json: bool) -> int:
    """Measure, and show it. UserError."""
    console = Console(highlight=False, stderr=True)
    with ExitStack() as stack:
        ours = stack.enter_context(directory_in(mountpoint, "calls"))
        *_, status = control.ask(ours.record, control.Question("status"), _ANSWER_S)
        before = machine.describe()
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchfs-calls-")))
        floor = stack.enter_context(memory_mount(place, f"--attr-timeout={attr_timeout_s}"))
        served = (ours.record.process.pid, *_daemons_here(status.daemons, before.host))
        subjects = (
            _Subject(_FLOOR, floor, (_served_by(floor),)),
            _Subject(_OURS, ours.directory, served),
        )
        shown = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*shown, console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=rounds * len(subjects))
            try:
                found = measure(subjects, iterations, rounds, lambda name: progress.advance(task))
            except OSError as error:
                raise UserError(f"{error.filename or mountpoint}: {error.strerror}") from None
    report = Report(1, before, machine.mount_of(ours.mount.mountpoint), attr_timeout_s, tuple(_rows(found)))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n")
    else:
        show(report, Console(highlight=False))
    return 0


def _served_by(floor: Path) -> int:
    """Return the process behind the floor: the one that was started with its path."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"benchfs_fuse.bench.memory_fs" in words and os.fsencode(floor) in words:
            return int(process.name)
    raise UserError("the floor has ended")


def _daemons_here(daemons: Sequence[control.DaemonReport], host: str) -> list[int]:
    """Return the processes of those daemons that run on this host."""
    said = [daemon.status for daemon in daemons if daemon.status is not None]
    return [int(str(status["pid"])) for status in said if status.get("host") == host]


def _rows(found: Sequence[tuple[str, int, dict[str, tuple[Samples, float]]]]) -> Iterator[Call]:
    for name, length, by_subject in found:
        floor, ours = by_subject[_FLOOR], by_subject[_OURS]
        yield Call(name, length, _FLOOR, floor[0], floor[0].summary(), floor[1])
        yield Call(name, length, _OURS, ours[0], ours[0].summary(), ours[1], ratio(ours[0], floor[0]))


def show(report: Report, console: Console) -> None:
    """Print the calls as a table."""
    console.width = max(console.width, _WIDTH)
    title = f"µs for one, attributes kept for {report.attr_timeout_s:g} s"
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, title=title)
    table.add_column("", no_wrap=True)
    for head in ("floor p50", "p99", "mount p50", "p90", "p99", "times the floor", "cpu floor", "cpu mount"):
        table.add_column(head, justify="right", no_wrap=True)
    for floor, ours in zip(report.calls[::2], report.calls[1::2], strict=True):
        name = f"{ours.name} {ours.bytes // KIB} KiB" if ours.bytes else ours.name
        cells = (
            floor.summary.p50_us,
            floor.summary.p99_us,
            ours.summary.p50_us,
            ours.summary.p90_us,
            ours.summary.p99_us,
        )
        table.add_row(
            name, *(f"{one:.1f}" for one in cells), str(ours.ratio), f"{floor.cpu_us:.0f}", f"{ours.cpu_us:.0f}"
        )
    console.print(table)
    console.print("cpu: processor time of one call in the processes that serve it, polling included")
    note = machine.load_note(report.machine)
    if note:
        console.print(note)
