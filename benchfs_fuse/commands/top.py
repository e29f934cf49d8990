"""``benchfs top``: what a mount and its daemons are doing, second by second."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from .. import control, mountpoints
from ..errors import UserError
from ..observe.durations import Durations, joined, since
from .tables import columns, make_console

#: Seconds for an answer: the mount process itself gives its daemons two.
ANSWER_S = 5.0


class Rates(NamedTuple):
    """Say what happened between two looks, ``seconds`` apart. ``before`` and ``now`` hold the counters."""

    seconds: float
    before: control.Counts
    now: control.Counts
    report: control.Report

    @property
    def operations(self) -> dict[str, Durations]:
        """Return the operations of the mount."""
        return since(self.now.operations, self.before.operations)

    def daemons(self) -> Iterator[tuple[control.DaemonCounts, control.DaemonCounts | None, dict[str, Durations]]]:
        """Yield each daemon that answered: its counters, those of the last look, and its requests since.

        One that was started anew since has counted from zero; of one that was silent at the last look nothing is known.
        """
        known = {daemon.daemon_id: daemon for daemon in self.before.daemons}
        for daemon in self.now.daemons:
            before = known.get(daemon.daemon_id, daemon) if daemon.uptime_s > self.seconds else None
            yield daemon, before, since(daemon.operations, before.operations if before is not None else {})


def top(mountpoint: Path, *, interval_s: float, count: int | None, as_json: bool) -> int:
    """Show rates every ``interval_s``, ``count`` times (None: until interrupted); return the exit code."""
    _, record = mountpoints.look(mountpoint).served()
    console = make_console()
    looks = _looks(record, interval_s, count)
    if as_json or not console.is_terminal:
        for rates in looks:
            if as_json:
                sys.stdout.write(json.dumps(_plain(rates)) + "\n")
            else:
                console.print("\n".join(_lines(record, rates)) + "\n")
            sys.stdout.flush()
        return 0
    with Live(console=console, screen=count is None, auto_refresh=False) as live:
        for rates in looks:
            live.update(Text("\n".join(_lines(record, rates))), refresh=True)
    return 0


def _looks(record: control.MountRecord, interval_s: float, count: int | None) -> Iterator[Rates]:
    before, _ = _look(record)
    while count is None or count > 0:
        time.sleep(interval_s)
        now, report = _look(record)
        yield Rates(now.time_s - before.time_s, before, now, report)
        before = now
        count = count - 1 if count is not None else None


def _look(record: control.MountRecord) -> tuple[control.Counts, control.Report]:
    *_, report = control.ask(record, control.Question("count"), ANSWER_S)
    if report.counts is None:
        raise UserError(f"the process {record.process.pid} behind {record.mountpoint} counts nothing")
    return report.counts, report


def _lines(record: control.MountRecord, rates: Rates) -> list[str]:
    before, now, report, seconds = rates.before, rates.now, rates.report, rates.seconds
    lines = [
        f"{record.mountpoint}  {time.strftime('%H:%M:%S')}  {now.in_flight} requests under way at the daemons, "
        f"{decimal(report.accepted_bytes)} accepted and not flushed, {report.handles} handles",
        f"  read {_bytes(now.bytes_read - before.bytes_read, seconds)}, "
        f"written {_bytes(now.bytes_written - before.bytes_written, seconds)}; "
        f"answered by daemons without sleeping: {_percent(_spun(rates))}",
        f"  answered at once: {_percent(_at_once(rates))}; "
        f"rare attributes answered from memory: "
        f"{_percent(_remembered(rates))}",
        "",
    ]
    table = [("operation", "per second", "p50", "p99", "longest", "busy")]
    for name, durations in _busiest(rates.operations):
        table.append((name, *_told(durations, seconds)))
    lines += columns(table)
    for daemon, last, requests in rates.daemons():
        counters = daemon.counters
        lines += [
            "",
            f"daemon {daemon.daemon_id}  {counters.requests_in_flight} requests and {counters.disk_in_flight} disk "
            f"operations under way, "
            f"read {_bytes(daemon.bytes_read - (last.bytes_read if last is not None else 0), seconds)}, "
            f"written {_bytes(daemon.bytes_written - (last.bytes_written if last is not None else 0), seconds)}; "
            f"chunk files found open: {_percent(_found_open(daemon, last, requests))}",
        ]
        rows = [(name, *_told(durations, seconds)) for name, durations in _busiest(requests)]
        total = joined(requests.values())
        if total.count:
            lines += columns(
                [("request", "per second", "p50", "p99", "longest", "busy"), *rows, ("all", *_told(total, seconds))]
            )
    return lines


def _spun(rates: Rates) -> float | None:
    """Return which part of the answers came before anybody slept."""
    spins = rates.now.spins - rates.before.spins
    return _part(spins, spins + rates.now.sleeps - rates.before.sleeps)


def _at_once(rates: Rates) -> float | None:
    """Return which part of the kernel's requests was answered in the step in which it was read."""
    now, before = rates.now, rates.before
    return _part(now.at_once - before.at_once, now.requests - before.requests)


def _remembered(rates: Rates) -> float | None:
    """Return which part of the questions for rare attributes the mount answered by itself."""
    now, before = rates.now, rates.before
    return _part(now.absent_known - before.absent_known, now.absent_asked - before.absent_asked)


def _found_open(
    daemon: control.DaemonCounts, last: control.DaemonCounts | None, requests: Mapping[str, Durations]
) -> float | None:
    """Return which part of the reads and writes of chunks found the file open."""
    opened = daemon.counters.files_opened - (last.counters.files_opened if last is not None else 0)
    touched = sum(requests[name].count for name in ("ReadChunk", "WriteChunk") if name in requests)
    return _part(touched - opened, touched)


def _busiest(operations: Mapping[str, Durations]) -> list[tuple[str, Durations]]:
    return sorted(operations.items(), key=lambda item: -item[1].total_ns)


def _told(durations: Durations, seconds: float) -> tuple[str, str, str, str, str]:
    return (
        f"{durations.count / seconds:.0f}",
        _us(durations.quantile_ns(0.5)),
        _us(durations.quantile_ns(0.99)),
        _us(durations.longest_ns),
        f"{durations.total_ns / 1e9 / seconds:.0%}",
    )


def _us(time_ns: int) -> str:
    return f"{time_ns / 1000:.0f} µs" if time_ns < 10_000_000 else f"{time_ns / 1e6:.0f} ms"


def _bytes(count: int, seconds: float) -> str:
    return f"{decimal(round(count / seconds))}/s"


def _part(some: int, of: int) -> float | None:
    return max(0, some) / of if of > 0 else None


def _percent(part: float | None) -> str:
    return f"{part:.0%}" if part is not None else "–"


def _plain(rates: Rates) -> dict[str, Any]:
    """Return rates for programs: per second, durations in microseconds."""
    seconds = rates.seconds
    return {
        "time_s": time.time(),
        "seconds": seconds,
        "requests_in_flight": rates.now.in_flight,
        "accepted_bytes": rates.report.accepted_bytes,
        "read_bytes_per_s": (rates.now.bytes_read - rates.before.bytes_read) / seconds,
        "written_bytes_per_s": (rates.now.bytes_written - rates.before.bytes_written) / seconds,
        "answered_without_sleeping": _spun(rates),
        "rare_attributes_from_memory": _remembered(rates),
        "operations": _plain_operations(rates.operations, seconds),
        "daemons": [
            {
                "daemon": daemon.daemon_id,
                "uptime_s": daemon.uptime_s,
                "read_bytes_per_s": (daemon.bytes_read - (last.bytes_read if last is not None else 0)) / seconds,
                "written_bytes_per_s": (daemon.bytes_written - (last.bytes_written if last is not None else 0))
                / seconds,
                "chunk_files_found_open": _found_open(daemon, last, requests),
                "counters": daemon.counters._asdict(),
                "requests": _plain_operations(requests, seconds),
            }
            for daemon, last, requests in rates.daemons()
        ],
    }


def _plain_operations(operations: Mapping[str, Durations], seconds: float) -> dict[str, dict[str, float]]:
    return {
        name: {
            "per_s": durations.count / seconds,
            "p50_us": durations.quantile_ns(0.5) / 1000,
            "p99_us": durations.quantile_ns(0.99) / 1000,
            "longest_us": durations.longest_ns / 1000,
            "busy": durations.total_ns / 1e9 / seconds,
        }
        for name, durations in _busiest(operations)
    }
