"""``benchfs trace``: record where operations spend their time, say it in tables, write it for Perfetto."""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .. import control, mountpoints
from ..errors import UserError
from ..limits import SPANS_MAX
from ..observe import perfetto
from ..observe.kernel import KernelEvents
from ..observe.spans import Operation, Request, Served
from ..observe.timeline import KernelTimes, Part, Stall, Timelines, Traced, join, stalls
from ..rpc.messages import REQUESTS
from .tables import columns, make_console

#: Seconds for the mount and its daemons to hand over what they recorded.
FETCH_S = 60.0
#: Longest recording, for commands that take their time.
SECONDS_MAX = 3600.0
#: Exit code when nothing was recorded at all.
EXIT_NOTHING = 3
#: Parts of one operation that are told one by one.
PARTS_MAX = 30
#: Daemons that parts of one name lie on are told apart by this suffix.
_AT = " @{}"


class Recorded(NamedTuple):
    """Hold everything that was recorded, joined. ``complaints``: what is missing, for people."""

    timelines: Timelines
    stalls: tuple[Stall, ...]
    complaints: tuple[str, ...]


class Row(msgspec.Struct, frozen=True):
    """Sum up one stage of one kind of operation, or all of it (``stage`` empty). Times in microseconds.

    ``share``: of the time of all operations of that kind. ``count``: operations that have the stage.
    """

    operation: str
    stage: str
    count: int
    p50_us: float
    p99_us: float
    total_us: float
    share: float


class _Meanwhile:
    """Be what goes on while everybody records: a command, or time that passes. A context manager: it ends the command.

    The recording ends with the command, or earlier: the command itself has all the time that it needs.
    """

    def __init__(self, command: Sequence[str], seconds: float | None, console: Console, as_json: bool) -> None:
        self._command = command
        self._seconds = seconds
        self._console = console
        #: Programs read our output: that of the command goes elsewhere.
        self._output = sys.stderr if as_json else None
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            self._child.wait()

    @property
    def seconds(self) -> float:
        """Return how long to record at most."""
        return self._seconds if self._seconds is not None else SECONDS_MAX

    def run(self) -> None:
        """Return when the recording is to end: also when somebody presses Ctrl-C, which reaches the command by itself.

        UserError when there is no such command.
        """
        try:
            if not self._command:
                _wait(self.seconds, self._console)
                return
            try:
                self._child = subprocess.Popen(self._command, stdout=self._output)
            except OSError as error:
                raise UserError(f"cannot run {self._command[0]}: {error.strerror}") from None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(self.seconds)
        except KeyboardInterrupt:
            self._console.print("ended early")

    def wait_code(self) -> int:
        """Wait for the end of the command; return its exit code as a shell does, 0 without a command."""
        code = self._child.wait() if self._child is not None else 0
        return code if code >= 0 else 128 - code


def trace(
    mountpoint: Path, *, seconds: float | None, command: Sequence[str], out: Path, slowest: int, as_json: bool
) -> int:
    """Record for ``seconds`` (with a command: until it ends), report, and write ``out``; return the exit code."""
    mount, record = mountpoints.look(mountpoint).served()
    is_new = not out.exists()
    try:
        out.open("a").close()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    console = Console(stderr=True, highlight=False, markup=False)
    with _Meanwhile(command, seconds, console, as_json) as meanwhile:
        try:
            recorded = _record(record, mount.minor, meanwhile)
        except BaseException:
            if is_new:
                out.unlink(missing_ok=True)
            raise
        failure: OSError | None = None
        try:
            with out.open("w") as file:
                perfetto.write(recorded.timelines, _name_of, file)
        except OSError as error:
            failure = error
        rows = summary(recorded.timelines.operations)
        if as_json:
            _write_json(record, rows, recorded, slowest)
        else:
            _show(make_console(), rows, recorded, slowest)
        if not as_json and failure is None:
            make_console().print(f"{out}: open it in https://ui.perfetto.dev")
        code = meanwhile.wait_code()
    if failure is not None:
        raise UserError(f"cannot write {out}: {failure.strerror}")
    return code or (0 if recorded.timelines.operations else EXIT_NOTHING)


def _record(record: control.MountRecord, minor: int, meanwhile: _Meanwhile) -> Recorded:
    complaints: list[str] = []
    kernel = KernelEvents(minor)
    try:
        kernel.begin()
        seen = True
    except UserError as error:
        complaints.append(f"the kernel's part is not seen: {error}")
        seen = False
    operations: list[Operation] = []
    requests: list[Request] = []
    served: dict[int, list[Served]] = defaultdict(list)
    times: dict[int, KernelTimes] = {}
    try:
        question = control.Question("trace", seconds=meanwhile.seconds)
        for report in control.ask(record, question, FETCH_S, meanwhile.run):
            part = report.trace
            if part is None:
                continue
            operations += part.operations
            requests += part.requests
            if part.daemon >= 0:
                served[part.daemon] += part.served
            if part.lost:
                whose = f"daemon {part.daemon}" if part.daemon >= 0 else "the mount"
                complaints.append(f"{whose} had no room for {part.lost} spans more than {SPANS_MAX}")
            if part.trouble:
                if part.daemon < 0:
                    raise UserError(part.trouble)
                complaints.append(f"daemon {part.daemon} is not seen: {part.trouble}")
        if seen:
            try:
                times, lost = kernel.end()
            except OSError as error:
                complaints.append(f"the kernel's part is not seen: {error.filename}: {error.strerror}")
            else:
                if lost:
                    complaints.append(f"the kernel had no room for {lost} events")
    finally:
        if seen:
            kernel.close()
    timelines = join(operations, requests, served, times)
    parts = [part for traced in timelines.operations for part in traced.parts]
    parts += [part for exchange in timelines.behind for part in exchange.parts]
    return Recorded(timelines, tuple(stalls(parts)), tuple(complaints))


def _wait(seconds: float, console: Console) -> None:
    console.print(f"recording for {seconds:g} s; Ctrl-C ends it")
    shown = (TextColumn("recording"), BarColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console, transient=True) as progress:
        task = progress.add_task("", total=seconds)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            progress.update(task, completed=seconds - left)


def _name_of(op: int) -> str:
    return REQUESTS[op].__name__ if op in REQUESTS else str(op)


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


def summary(operations: Iterable[Traced]) -> list[Row]:
    """Sum up operations by kind, the costliest first, each followed by its stages, the costliest first."""
    by_name: dict[str, list[Traced]] = defaultdict(list)
    for traced in operations:
        by_name[traced.operation.name].append(traced)
    rows = []
    for name, kind in sorted(by_name.items(), key=lambda item: -sum(one.total_ns for one in item[1])):
        total_ns = sum(one.total_ns for one in kind)
        rows.append(_row(name, "", [one.total_ns for one in kind], total_ns))
        stages: dict[str, list[int]] = defaultdict(list)
        for traced in kind:
            sums: dict[str, int] = defaultdict(int)
            for part in traced.parts:
                sums[part.stage] += part.ended_ns - part.started_ns
            for stage, sum_ns in sums.items():
                stages[stage].append(sum_ns)
        rows += [
            _row(name, stage, durations, total_ns)
            for stage, durations in sorted(stages.items(), key=lambda item: -sum(item[1]))
        ]
    return rows


def _row(name: str, stage: str, durations: Sequence[int], total_ns: int) -> Row:
    ordered = sorted(durations)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    share = sum(ordered) / total_ns if total_ns else 0.0
    return Row(name, stage, len(ordered), statistics.median(ordered) / 1000, p99 / 1000, sum(ordered) / 1000, share)


def _show(console: Console, rows: Sequence[Row], recorded: Recorded, slowest: int) -> None:
    operations = recorded.timelines.operations
    if rows:
        table = [("operation", "stage", "count", "p50", "p99", "total", "share")]
        table += [
            (
                row.operation if not row.stage else "",
                row.stage,
                str(row.count),
                _time(row.p50_us),
                _time(row.p99_us),
                _time(row.total_us),
                f"{row.share:.1%}",
            )
            for row in rows
        ]
        for line, style in zip(columns(table), [None, *(None if row.stage else "bold" for row in rows)], strict=True):
            console.print(line, style=style)
    else:
        console.print("no operation reached the mount")
    found = _slowest(operations, slowest)
    if found:
        console.print("\nslowest operations:", style="bold")
    for traced in found:
        failed = f" (errno {traced.operation.error})" if traced.operation.error else ""
        console.print(f"  {_time(traced.total_ns / 1000)}  {traced.operation.name}{failed}: {_told(traced.parts)}")
    behind = recorded.timelines.behind
    if behind:
        console.print(f"\n{len(behind)} requests to daemons for which no operation waited (write-behind and its kind)")
    for stall in recorded.stalls:
        console.print(
            f"STALL: {stall.waits} times {_time(stall.length_ns / 1000)} (within {_time(stall.spread_ns / 1000)}) "
            f"in {_where(stall)}: that looks like a timer, not like work",
            style="bold red",
        )
    if any(not traced.whole for traced in operations):
        console.print(
            "not seen: the kernel's queue, the mount's wake-up and the kernel taking the answer "
            f"(of {sum(not traced.whole for traced in operations)} operations)"
        )
    console.print("never seen here: callers entering and leaving the kernel, and waking up")
    for complaint in recorded.complaints:
        console.print(complaint, style="yellow")


def _slowest(operations: Iterable[Traced], count: int) -> list[Traced]:
    return sorted(operations, key=lambda one: -one.total_ns)[:count]


def _told(parts: Sequence[Part]) -> str:
    """Tell parts in their order; many are summed up, the costliest first."""
    lengths = [(_where(part), part.ended_ns - part.started_ns) for part in parts]
    if len(lengths) > PARTS_MAX:
        sums: dict[str, int] = defaultdict(int)
        for where, length_ns in lengths:
            sums[where] += length_ns
        lengths = sorted(sums.items(), key=lambda item: -item[1])
    return ", ".join(f"{where} {_time(length_ns / 1000)}" for where, length_ns in lengths)


def _where(part: Part | Stall) -> str:
    return part.stage + (_AT.format(part.daemon) if part.daemon >= 0 else "")


def _time(us: float) -> str:
    if us < 10_000:
        return f"{us:.1f} µs"
    return f"{us / 1000:.1f} ms" if us < 10_000_000 else f"{us / 1e6:.1f} s"


def _write_json(record: control.MountRecord, rows: Sequence[Row], recorded: Recorded, slowest: int) -> None:
    operations = recorded.timelines.operations
    content: dict[str, Any] = {
        "mountpoint": record.mountpoint,
        "operations": len(operations),
        "whole": sum(traced.whole for traced in operations),
        "requests_behind": len(recorded.timelines.behind),
        "clock_offsets_ns": recorded.timelines.offsets,
        "stages": msgspec.to_builtins(rows),
        "slowest": [
            {
                "operation": traced.operation.name,
                "errno": traced.operation.error,
                "total_us": traced.total_ns / 1000,
                "parts": [
                    {"stage": part.stage, "us": (part.ended_ns - part.started_ns) / 1000, "daemon": part.daemon}
                    for part in traced.parts
                ],
            }
            for traced in _slowest(operations, slowest)
        ],
        "stalls": [stall._asdict() for stall in recorded.stalls],
        "complaints": recorded.complaints,
    }
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
