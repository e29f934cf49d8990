"""Tell what each protection costs: ``benchfs bench protections``.

For each, two clusters of two daemons are up at once, one as it is and one with this protection taken away
(``unprotected``). The operation that pays for it is done through the client library on both, in alternating rounds.

- *recorded outcomes*: a change is written together with its outcome, so that a retry finds it (create).
- *marks of chunk files*: each file says whose it is, and is looked at when it is opened (first write to a chunk).
- *synced decisions*: what several daemons decide is synced, so that no power cut tears it (mkdir on another daemon).

What has no row costs nothing that could be taken away: fences are a look at a set in memory, handshakes and leases
belong to connections, statistics and traces have their own figures (docs/performance.md).
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import trio
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..client import FileSystem, open_cluster
from ..errors import FsError, UserError
from ..limits import KIB
from ..model import ROOT_INO
from ..processes import Starting, end, wait_ready
from ..registry import init_registry
from . import machine
from .machine import Machine
from .samples import Ratio, Samples, ratio

DAEMONS = 2
ROUNDS = 7
LENGTH = 4 * KIB
#: Seconds for a daemon to leave.
_DAEMON_S = 30.0

#: Do the operation with this number; return ns, or None if it was none that pays.
_One = Callable[[FileSystem, int], Awaitable[int | None]]


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold one protection: the operation that pays for it, its times without and with it."""

    protection: str
    operation: str
    without: Samples
    complete: Samples
    ratio: Ratio


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold everything measured, and what it was measured on."""

    format: int
    machine: Machine
    rows: tuple[Row, ...]


async def _create(fs: FileSystem, number: int) -> int:
    path = f"/f{number}"
    started_ns = time.perf_counter_ns()
    file = await fs.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    duration = time.perf_counter_ns() - started_ns
    await file.close()
    await fs.remove(path)
    return duration


async def _first_write(fs: FileSystem, number: int) -> int:
    path, data = f"/f{number}", bytes(LENGTH)
    async with await fs.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT) as file:
        started_ns = time.perf_counter_ns()
        await file.write(data, 0)
        duration = time.perf_counter_ns() - started_ns
    await fs.remove(path)
    return duration


async def _mkdir(fs: FileSystem, number: int) -> int | None:
    path = f"/d{number}"
    started_ns = time.perf_counter_ns()
    attrs = await fs.mkdir(path)
    duration = time.perf_counter_ns() - started_ns
    await fs.rmdir(path)
    daemon_of = fs.namespace.links.shard_map.of_ino
    return duration if daemon_of(attrs.ino) != daemon_of(ROOT_INO) else None


OPERATIONS: dict[str, tuple[str, _One]] = {
    "recorded outcomes": ("create", _create),
    "marks of chunk files": ("first write to a chunk, 4 KiB", _first_write),
    "synced decisions": ("mkdir on another daemon", _mkdir),
}


@contextmanager
def _daemons(place: Path, without: str) -> Iterator[Path]:
    """Have a cluster up, whole or ``without`` a protection; yield its registry. UserError."""
    registry = place / "registry"
    init_registry(registry, DAEMONS)
    module, first = ("benchfs_fuse.bench.unprotected", [without]) if without else ("benchfs_fuse.daemon", [])
    ready = wait_ready(
        [
            Starting(
                module,
                [*first, f"--registry-dir={registry}", f"--data-dir={place / f'data{number}'}", "--listen=127.0.0.1"],
                place / "log",
            )
            for number in range(DAEMONS)
        ]
    )
    try:
        yield registry
    finally:
        end(ready.values(), _DAEMON_S)


async def _alternate(registries: dict[str, Path], one: _One, iterations: int) -> dict[str, Samples]:
    rounds: dict[str, list[list[int]]] = {name: [] for name in registries}
    number = 0
    for turn in range(ROUNDS + 1):
        for name, registry in registries.items():
            async with open_cluster(registry) as fs:
                found: list[int] = []
                while len(found) < iterations:
                    number += 1
                    duration = await one(fs, number)
                    if duration is not None:
                        found.append(duration)
            if turn:  # the first one warms up
                rounds[name].append(found)
    return {name: Samples.of(found) for name, found in rounds.items()}


def run_protections(data_dir: Path, iterations: int, as_json: bool) -> int:
    """Measure, and show it. UserError."""
    before = machine.describe()
    rows = []
    for protection, (operation, one) in OPERATIONS.items():
        with ExitStack() as stack:
            registries = {}
            for without in ("", protection):
                try:
                    place = Path(tempfile.mkdtemp(prefix="benchfs-protections-", dir=data_dir))
                except OSError as error:
                    raise UserError(f"cannot write in {data_dir}: {error.strerror}") from None
                stack.callback(shutil.rmtree, place, ignore_errors=True)
                registries[without] = stack.enter_context(_daemons(place, without))
            try:
                times = trio.run(_alternate, registries, one, iterations)
            except FsError as error:
                raise UserError(f"{operation}: {error}") from None
        whole, bare = times[""], times[protection]
        rows.append(Row(protection, operation, bare, whole, ratio(whole, bare)))
    report = Report(1, before, tuple(rows))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n")
    else:
        show(report, Console(highlight=False))
    return 0


def show(report: Report, console: Console) -> None:
    """Print the rows as a table."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, title="µs for one, through the client library")
    for head in ("protection", "operation"):
        table.add_column(head)
    for head in ("p50 without", "p50 with", "with to without"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in report.rows:
        figures = (f"{row.without.median_ns / 1e3:.1f}", f"{row.complete.median_ns / 1e3:.1f}", str(row.ratio))
        table.add_row(row.protection, row.operation, *figures)
    console.print(table)
    note = machine.load_note(report.machine)
    if note:
        console.print(note)
