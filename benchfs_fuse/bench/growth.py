"""Tell what becomes of a mount's speed as things grow: ``benchfs bench growth``.

- *Files*: creating the last file beside creating the first ones, in one directory and spread over many.
- *Listings*: with attributes, per entry, of a short directory and a long one.
- *Size*: opening and reading chunks at the beginning and at the end of a large sparse file, past the page cache. Some
  at each end, in turn: which daemons a single one concerns is chance.
- *Clients*: small operations of several clients of the client library beside those of one, and how busy the
  processors were meanwhile.

Where both sides can be had at once, their rounds alternate. Files are made only once: there, early ones are compared
with late ones.
"""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import control
from ..errors import UserError
from ..limits import CHUNK_SIZE_DEFAULT, KIB
from . import machine
from .client_load import Done
from .machine import Machine, MountFacts
from .mounted import directory_in
from .samples import Ratio, Samples, ratio, ratio_of

#: Files of the smaller side, and of a window of creations; directories that files are spread over.
FEW = 1000
SPREAD = 100
#: Size of the sparse file, chunks at each end of it that are read, and bytes of each.
LARGE = 10 << 30
CHUNKS = 8
BLOCK = 4 * KIB
READS = 50
#: Clients beside one, and seconds that they work for in each round.
CLIENTS = 4
LOAD_S = 3.0
#: Alternating rounds.
ROUNDS = 5
#: Seconds for a client to be ready, or to end.
_CLIENT_S = 60.0
_WIDTH = 100


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold one comparison: times in µs, or operations per second, on the small and the large side."""

    what: str
    unit: str
    small: float
    large: float
    ratio: Ratio
    note: str = ""


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold everything measured, and what it was measured on."""

    format: int
    machine: Machine
    mount: MountFacts
    files: int
    rows: tuple[Row, ...]


def run_growth(mountpoint: Path, *, files: int, as_json: bool) -> int:
    """Measure, and show it. UserError."""
    before = machine.describe()
    shown = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        ours = stack.enter_context(directory_in(mountpoint, "growth"))
        progress = stack.enter_context(Progress(*shown, console=Console(highlight=False, stderr=True), transient=True))
        task = progress.add_task("measuring", total=2 * files + 3 * ROUNDS)
        try:
            rows = _measure(ours.directory, ours.record, files, lambda: progress.advance(task))
        except OSError as error:
            raise UserError(f"{error.filename or mountpoint}: {error.strerror}") from None
        progress.update(task, description="removing")
    report = Report(1, before, machine.mount_of(ours.mount.mountpoint), files, tuple(rows))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n")
    else:
        show(report, Console(highlight=False))
    return 0


def _measure(directory: Path, record: control.MountRecord, files: int, note: Callable[[], None]) -> list[Row]:
    one, many, short = directory / "one", directory / "many", directory / "short"
    spread = [many / str(number) for number in range(SPREAD)]
    rows = [
        _creations(f"create and close, in a directory of {files:,}", _fill([one], files, note)),
        _creations(f"create and close, {files:,} over {SPREAD} directories", _fill(spread, files, note)),
    ]
    _fill([short], FEW)
    rows.append(_listings(short, one, note))
    rows.append(_ends(directory / "large", note))
    rows.append(_clients(Path(record.registry), directory.name, note))
    return rows


def _fill(directories: Sequence[Path], files: int, note: Callable[[], None] = lambda: None) -> list[int]:
    """Make files in turn in all directories; return how long each took, in ns."""
    for place in directories:
        place.mkdir(parents=True)
    durations = []
    for number in range(files):
        path = f"{directories[number % len(directories)]}/f{number}"
        started_ns = time.perf_counter_ns()
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        durations.append(time.perf_counter_ns() - started_ns)
        note()
    return durations


def _creations(what: str, durations: Sequence[int]) -> Row:
    """Compare a window of the first creations with one of the last."""
    window = max(1, min(FEW, len(durations) // 2))
    tenth = max(1, window // 10)
    first = durations[window // 2 : window // 2 + window]
    last = durations[-window:]
    early, late = (Samples.of(part[at : at + tenth] for at in range(0, window, tenth)) for part in (first, last))
    return Row(what, "µs", early.median_ns / 1e3, late.median_ns / 1e3, ratio(late, early))


def _listings(short: Path, long: Path, note: Callable[[], None]) -> Row:
    """List with attributes, again and again; ns for each entry."""
    times: dict[Path, list[list[int]]] = {short: [], long: []}
    counts = {}
    for _ in range(ROUNDS):
        for directory, rounds in times.items():
            started_ns = time.perf_counter_ns()
            with os.scandir(directory) as entries:
                counts[directory] = sum(entry.stat(follow_symlinks=False).st_nlink for entry in entries)
            rounds.append([(time.perf_counter_ns() - started_ns) // max(1, counts[directory])])
        note()
    small, large = Samples.of(times[short]), Samples.of(times[long])
    what = f"list with attributes, an entry of {counts[short]:,} and {counts[long]:,}"
    return Row(what, "µs", small.median_ns / 1e3, large.median_ns / 1e3, ratio(large, small))


def _ends(path: Path, note: Callable[[], None]) -> Row:
    """Open, read one block past the page cache and close: of the first chunks in turn, and of the last ones."""
    block = mmap.mmap(-1, BLOCK)
    block[:] = os.urandom(BLOCK)
    first = tuple(number * CHUNK_SIZE_DEFAULT for number in range(CHUNKS))
    last = tuple(LARGE - BLOCK - offset for offset in first)
    times: dict[tuple[int, ...], list[list[int]]] = {first: [], last: []}
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT)
    for offset in (*first, *last):
        os.pwritev(file, [block], offset)
    os.close(file)
    for _ in range(ROUNDS):
        for offsets, rounds in times.items():
            durations = []
            for number in range(READS):
                offset = offsets[number % CHUNKS]
                started_ns = time.perf_counter_ns()
                file = os.open(path, os.O_RDONLY | os.O_DIRECT)
                got = os.preadv(file, [block], offset)
                os.close(file)
                durations.append(time.perf_counter_ns() - started_ns)
                if got != BLOCK:
                    raise UserError(f"{path} gives {got} bytes at {offset} instead of {BLOCK}")
            rounds.append(durations)
        note()
    early, late = (Samples.of(rounds) for rounds in times.values())
    what = f"open, read 4 KiB and close, of {LARGE >> 30} GiB: the first {CHUNKS} chunks and the last {CHUNKS}"
    return Row(what, "µs", early.median_ns / 1e3, late.median_ns / 1e3, ratio(late, early))


def _clients(registry: Path, name: str, note: Callable[[], None]) -> Row:
    """Let one client work, then several at once; compare operations per second."""
    rates: dict[int, list[float]] = {1: [], CLIENTS: []}
    busy: dict[int, list[float]] = {1: [], CLIENTS: []}
    for turn in range(ROUNDS):
        for clients, found in rates.items():
            rate, share = _load(registry, [f"{name}-{turn}-{clients}-{number}" for number in range(clients)])
            found.append(rate)
            busy[clients].append(share)
        note()
    middle = ROUNDS // 2
    one, several = (sorted(found)[middle] for found in rates.values())
    shares = [sorted(found)[middle] for found in busy.values()]
    return Row(
        f"small operations of 1 and {CLIENTS} clients",
        "1/s",
        one,
        several,
        ratio_of(rates[CLIENTS], rates[1]),
        f"processors busy {shares[0]:.0%} and {shares[1]:.0%}",
    )


def _load(registry: Path, names: Sequence[str]) -> tuple[float, float]:
    """Let clients work at once; return their operations per second, and the share of all processors that was busy."""
    with ExitStack() as stack:
        clients = []
        for name in names:
            words = [sys.executable, "-m", "benchfs_fuse.bench.client_load", str(registry), name, str(LOAD_S)]
            client = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(_end, client)
            clients.append(client)
        for client in clients:
            assert client.stdout is not None
            if client.stdout.readline() != "ready\n":
                raise UserError("a client could not begin: see the lines above")
        before = _busy()
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()
        said = []
        for client in clients:
            assert client.stdout is not None
            said.append(client.stdout.readline())
        after = _busy()
        if not all(said):
            raise UserError("a client has died: see the lines above")
        done = [msgspec.json.decode(line, type=Done) for line in said]
        share = (after[0] - before[0]) / max(1, after[1] - before[1])
        return sum(one.operations / one.seconds for one in done), share


def _end(client: subprocess.Popen[str]) -> None:
    try:
        client.communicate(timeout=_CLIENT_S)
    except subprocess.TimeoutExpired:
        client.kill()
        client.communicate()


def _busy() -> tuple[int, int]:
    """Return ticks in which all processors worked, and all ticks (proc_stat(5))."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def show(report: Report, console: Console) -> None:
    """Print the rows as a table."""
    console.width = max(console.width, _WIDTH)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, title="what grows")
    table.add_column("")
    for head in ("unit", "small", "large", "large to small"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in report.rows:
        name = f"{row.what} ({row.note})" if row.note else row.what
        table.add_row(name, row.unit, f"{row.small:,.1f}", f"{row.large:,.1f}", str(row.ratio))
    console.print(table)
    note = machine.load_note(report.machine)
    if note:
        console.print(note)
