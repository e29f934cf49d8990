"""Time the small operations of the client library beside what they stand on: ``benchfs bench small``. No FUSE.

**What is measured.** One caller, one operation after the other: create a file (``FileSystem.open`` with O_CREAT and
O_EXCL), write 1, 4 or 16 KiB behind the end of a file, read as much from somewhere in it. Gathering is off, so a write
returns when the daemon that holds the chunk has it. That nothing was gathered, cached or sent twice is not believed but
counted: the daemons' own counters before and after must differ by exactly the operations and their bytes.

**Beside what.** In each round, right after ours: raw UCX round trips of that length between the same two hosts over the
same kind of transport, and raw storage operations of that length in the daemon's data directory. ``floor`` is the round
trip and the faster way to the storage together: what nobody who sends a message and touches a file can go below. A
create has the round trip alone.
"""

import contextlib
import enum
import logging
import math
import os
import secrets
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns
from typing import NamedTuple

import msgspec
import trio
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..client import File, FileSystem, open_cluster
from ..config import Settings
from ..errors import FsError, NotFound, UserError
from ..limits import KIB, MIB
from ..processes import ProcessId, Starting, end, wait_ready
from ..registry import Registry, init_registry
from . import machine, peer, storage
from .samples import Ratio, Samples, Summary, ratio
from .storage import Way

#: What the ancestor of this system was measured with.
LENGTHS = (1 * KIB, 4 * KIB, 16 * KIB)
#: Message of a request without payload, for the floor of a create.
_REQUEST_LENGTH = 64
#: Rounds of ours and floors in turn: enough for a median and its spread.
ROUNDS = 5
#: Seconds that one operation may wait for a daemon: here nothing takes long, so then it has died.
_OP_TIMEOUT_S = 10.0
#: Seconds for the daemon to stop before it is killed.
_STOP_S = 20.0
#: Room that a run needs beside its files: logs, the metadata store.
_SPARE_BYTES = 64 * MIB
#: Columns of the table: a narrower terminal wraps it, which is better than to cut figures off.
_WIDTH = 120
#: Where the server says, in the registry directory, how its process for raw measurements is met.
_MEETING_FILE = "bench-small.json"


class Mode(enum.StrEnum):
    """Say which end this process is."""

    LOCAL = "local"
    SERVER = "server"
    CLIENT = "client"


class Wanted(NamedTuple):
    """Say what to measure where."""

    mode: Mode
    registry: Path
    data_dir: Path | None
    iterations: int
    warm_up: int
    as_json: bool
    settings: Settings


class Counted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say by how much the daemons' counters have grown over all rounds of one case."""

    requests: dict[str, int]
    bytes_read: int
    bytes_written: int


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold one operation: its times, the floors' ("ucx", "io_uring", "plain") of the same rounds, the counters."""

    name: str
    length: int
    samples: Samples
    summary: Summary
    floors: dict[str, Samples]
    #: How many times the floor ours takes; None where no floor was measured.
    ratio: Ratio | None
    #: By how many µs our p50 is above the floor's.
    above_us: float | None
    counted: Counted | None


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold a run. ``trouble`` says why it is not complete."""

    format: int
    mode: str
    iterations: int
    warm_up: int
    complete: bool
    trouble: str
    machine: machine.Machine
    #: What carries our requests, and what the raw messages go over ("" where none were measured).
    transport: str
    raw_transport: str
    #: File system under the daemon, and what was done before cold reads.
    storage: str
    cold: str
    cases: tuple[Case, ...]


class _Meet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say where a server's process for raw measurements is."""

    address: str


#: One round of something: so many operations, the ns of each.
Round = Callable[[int], Awaitable[Sequence[int]]]


def shares(total: int, rounds: int = ROUNDS) -> list[int]:
    """Cut a number of iterations into as even rounds as it goes, none of them empty."""
    rounds = min(rounds, total)
    return [total // rounds + (index < total % rounds) for index in range(rounds)]


# ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Run:
    """Measure over an open cluster, and keep what was measured whatever happens."""

    def __init__(self, fs: FileSystem, asker: peer.Asker | None, iterations: int, warm_up: int) -> None:
        self._fs = fs
        self._asker = asker
        self._iterations = iterations
        self._warm_up = warm_up
        self._name = f"/.bench-small-{secrets.token_hex(4)}"
        self._made: list[str] = []
        self.cases: list[Case] = []
        #: What carries our requests, and the raw messages.
        self.transport = "+".join(sorted({link.transport for link in fs.namespace.links.statistics()}))
        self.raw_transport = ""
        if asker is not None:
            self.raw_transport = "shm" if asker.shared else self.transport if self.transport != "shm" else "tcp"
        self.storage = ""
        self.cold = ""

    async def measure(self) -> None:
        """Measure everything; UserError and FsError as they come. What is finished is in ``cases``."""
        if self._asker is not None:
            self.storage = await self._asker.describe()
        await self._creates()
        for length in LENGTHS:
            await self._file(length)

    async def clean_up(self) -> None:
        """Remove the files, as far as that works."""
        with contextlib.suppress(FsError):
            while self._made:
                with contextlib.suppress(NotFound):
                    await self._fs.remove(self._made.pop())

    async def _creates(self) -> None:
        numbers = iter(range(self._warm_up + self._iterations))

        async def create(count: int) -> list[int]:
            times = []
            for _ in range(count):
                path = f"{self._name}-{next(numbers)}"
                self._made.append(path)
                start = perf_counter_ns()
                file = await self._fs.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                times.append(perf_counter_ns() - start)
                await file.close()
            await self.clean_up()
            return times

        await create(self._warm_up)
        await self._case("create", 0, create, {"Make": self._iterations}, {})

    async def _file(self, length: int) -> None:
        """Write a file of as many pieces as there are iterations, read it warm, then cold."""
        total = self._warm_up + self._iterations
        path = f"{self._name}-{length}"
        self._made.append(path)
        data = os.urandom(length)
        # Not in ``async with``: if anything fails, to close it could take as long again.
        file = await self._fs.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        offsets = iter(range(0, total * length, length))

        async def write(count: int) -> list[int]:
            times = []
            for _, offset in zip(range(count), offsets, strict=False):
                start = perf_counter_ns()
                await file.write(data, offset)
                times.append(perf_counter_ns() - start)
            return times

        await write(self._warm_up)
        ways = {"io_uring": Way.URING_WRITE, "plain": Way.PLAIN_WRITE}
        await self._case("write", length, write, {"WriteChunk": self._iterations}, ways)
        ways = {"io_uring": Way.URING_READ, "plain": Way.PLAIN_READ}
        await _reader(file, data, total, self._iterations)(self._warm_up)
        read = _reader(file, data, total, self._iterations)
        await self._case("read", length, read, {"ReadChunk": self._iterations}, ways)
        if self._asker is not None:
            read = _reader(file, data, total, self._iterations)
            await self._case("read cold", length, read, {"ReadChunk": self._iterations}, ways, cold=True)
        await file.close()

    async def _case(
        self,
        name: str,
        length: int,
        ours: Round,
        expected: dict[str, int],
        ways: dict[str, Way],
        *,
        cold: bool = False,
    ) -> None:
        """Measure ours and the floors in turn, look at the counters, and keep what there is."""
        times: list[Sequence[int]] = []
        floors: dict[str, list[Sequence[int]]] = {}
        asker = self._asker
        before = await self._counters()
        try:
            for count in shares(self._iterations):
                if asker is not None and cold:
                    self.cold = await asker.drop_caches()
                times.append(await ours(count))
                if asker is None:
                    continue
                round_trips = await asker.round_trips(length or _REQUEST_LENGTH, count)
                floors.setdefault("ucx", []).append(round_trips)
                for floor, way in ways.items():
                    floors.setdefault(floor, []).append(await asker.storage(way, length, count, cold=cold))
        except BaseException:
            if any(times):
                self.cases.append(_make_case(name, length, times, floors, None))
            raise
        after = await self._counters()
        counted = _grown(before, after)
        self.cases.append(_make_case(name, length, times, floors, counted))
        check_counted(name, length, counted, expected)

    async def _counters(self) -> Counted:
        """Return the sums of the daemons' counters."""
        requests: dict[str, int] = {}
        bytes_read = bytes_written = 0
        for daemon_id in self._fs.namespace.links.daemons:
            status = await self._fs.namespace.status(daemon_id)
            for name, count in status.requests.items():
                requests[name] = requests.get(name, 0) + count
            bytes_read += status.bytes_read
            bytes_written += status.bytes_written
        return Counted(requests, bytes_read, bytes_written)


def _reader(file: File, data: bytes, total: int, count_max: int) -> Round:
    """Return what reads pieces of a file, each at most once, in an order that no read-ahead foresees; checks them."""
    offsets = iter(storage.scattered(len(data), total)[:count_max])
    buffer = bytearray(len(data))

    async def read(count: int) -> list[int]:
        times = []
        for _, offset in zip(range(count), offsets, strict=False):
            start = perf_counter_ns()
            found = await file.read_into(buffer, offset)
            times.append(perf_counter_ns() - start)
            if found != len(data) or buffer != data:
                raise UserError(f"{found} bytes read at {offset} are not the {len(data)} that were written there")
        return times

    return read


def _grown(before: Counted, after: Counted) -> Counted:
    requests = {
        name: count - before.requests.get(name, 0)
        for name, count in after.requests.items()
        if count != before.requests.get(name, 0) and name != "Status"
    }
    return Counted(requests, after.bytes_read - before.bytes_read, after.bytes_written - before.bytes_written)


def check_counted(name: str, length: int, counted: Counted, expected: dict[str, int]) -> None:
    """Refuse figures that the daemons do not confirm. UserError."""
    for request, count in expected.items():
        moved = {"WriteChunk": counted.bytes_written, "ReadChunk": counted.bytes_read}.get(request, 0)
        if counted.requests.get(request, 0) != count or moved != count * length:
            raise UserError(
                f"{count} times {name} of {length} bytes, but the daemons counted {counted.requests.get(request, 0)} "
                f"{request} requests with {moved} bytes: is somebody else using this cluster?"
            )


def _make_case(
    name: str,
    length: int,
    times: Sequence[Sequence[int]],
    floors: dict[str, list[Sequence[int]]],
    counted: Counted | None,
) -> Case:
    ours = Samples.of(times)
    measured = {floor: Samples.of(rounds) for floor, rounds in floors.items()}
    floor = floor_of(measured)
    above_us = round((ours.p50_ns - floor.p50_ns) / 1e3, 3) if floor is not None else None
    return Case(
        name,
        length,
        ours,
        ours.summary(),
        measured,
        ratio(ours, floor) if floor is not None else None,
        above_us,
        counted,
    )


def floor_of(measured: dict[str, Samples]) -> Samples | None:
    """Add up, round by round, the median round trip and the median of the faster way to the storage, if any."""
    if "ucx" not in measured:
        return None
    ways = [measured[name].medians_ns for name in ("io_uring", "plain") if name in measured]
    best = [min(some) for some in zip(*ways, strict=False)] if ways else [0.0] * len(measured["ucx"].rounds)
    return Samples.of([[math.ceil(wire + disk)] for wire, disk in zip(measured["ucx"].medians_ns, best, strict=False)])


# ── the client ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Outcome:
    """Hold what came of a run, complete or not."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.trouble = ""
        self.exit_code = 0

    def fail(self, trouble: str, exit_code: int = 1) -> None:
        """Take note of the first trouble."""
        if not self.trouble:
            self.trouble, self.exit_code = trouble, exit_code


def _task(registry: Registry, listen: str, data_dir: Path | None, settings: Settings) -> peer.Task:
    return peer.Task(
        registry.secret.hex(),
        registry.cluster.cluster_id,
        listen,
        str(data_dir.absolute()) if data_dir is not None else "",
        settings.ucx.tls,
        settings.ucx.net_devices,
    )


async def _measure(wanted: Wanted, address: str, task: peer.Task, daemon: ProcessId | None) -> _Outcome:
    """Be the client: measure until done, interrupted, or something fails. Raises nothing of that."""
    outcome = _Outcome()
    notices = logging.StreamHandler()
    notices.setFormatter(logging.Formatter("benchfs: %(message)s"))
    logging.getLogger("benchfs_fuse").addHandler(notices)
    mount = replace(wanted.settings.mount, gather_bytes_max=0, op_timeout_s=_OP_TIMEOUT_S)
    settings = replace(wanted.settings, mount=mount)

    async def obey(signals: AsyncIterator[int]) -> None:
        async for number in signals:
            outcome.fail(f"interrupted by {signal.Signals(number).name}", 128 + number)
            nursery.cancel_scope.cancel()

    async def watch(process: ProcessId) -> None:
        pidfd = os.pidfd_open(process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        outcome.fail("the daemon has died in the middle")
        nursery.cancel_scope.cancel()

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, signals)
            if daemon is not None:
                nursery.start_soon(watch, daemon)
            try:
                async with _opened(wanted.registry, settings, address, task) as (fs, asker):
                    notices.setLevel(logging.CRITICAL + 1)  # from here on the outcome tells
                    outcome.run = run = Run(fs, asker, wanted.iterations, wanted.warm_up)
                    try:
                        await run.measure()
                    finally:
                        with trio.CancelScope(shield=True, deadline=trio.current_time() + _OP_TIMEOUT_S):
                            if all(link.connected for link in fs.namespace.links.statistics()):
                                await run.clean_up()
            except FsError as error:
                outcome.fail(f"{_words(error)} in the middle: {error}")
            except UserError as error:
                outcome.fail(str(error), error.exit_code)
            nursery.cancel_scope.cancel()
    return outcome


def _words(error: FsError) -> str:
    """Say in words what an operation failed with."""
    return os.strerror(error.errno).lower() if error.errno else "it failed"


@asynccontextmanager
async def _opened(
    registry: Path, settings: Settings, address: str, task: peer.Task
) -> AsyncIterator[tuple[FileSystem, peer.Asker | None]]:
    async with open_cluster(registry, settings=settings) as fs:
        if not address:
            yield fs, None
            return
        async with peer.open_asker(address, task) as asker:
            yield fs, asker


# ── the modes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_small(wanted: Wanted) -> int:
    """Be one end, or both; return the exit code. UserError before anything was measured."""
    before = machine.describe()
    if wanted.mode is Mode.CLIENT:
        return _tell(wanted, _client(wanted), before)
    if wanted.data_dir is None:
        raise UserError(f"--mode {wanted.mode} needs --data-dir: where the daemon keeps its data")
    with _served(wanted, wanted.data_dir) as (daemon, process, task):
        if wanted.mode is Mode.SERVER:
            return _serve(wanted, daemon, process, task)
        outcome = trio.run(_measure, wanted, process.address, task, daemon)
    return _tell(wanted, outcome, before)


def _client(wanted: Wanted) -> _Outcome:
    with Registry(wanted.registry) as registry:
        task = _task(registry, "", None, wanted.settings)
        try:
            address = msgspec.json.decode((registry.path / _MEETING_FILE).read_bytes(), type=_Meet).address
        except FileNotFoundError:
            address = ""
        except (OSError, msgspec.MsgspecError) as error:
            raise UserError(f"cannot read {registry.path / _MEETING_FILE}: {error}") from None
    return trio.run(_measure, wanted, address, task, None)


@contextlib.contextmanager
def _served(wanted: Wanted, data_dir: Path) -> Iterator[tuple[ProcessId, peer.PeerProcess, peer.Task]]:
    """Run a daemon and a process for raw measurements; at the end, take away what was formed for it. UserError."""
    made = not os.path.lexists(data_dir)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        empty = not any(data_dir.iterdir())
    except OSError as error:
        raise UserError(f"cannot use the data directory {data_dir}: {error.strerror}") from None
    formed = not os.path.lexists(wanted.registry)
    starting: Starting | None = None
    process: ProcessId | None = None
    try:
        total = (wanted.iterations + wanted.warm_up) * sum(LENGTHS)
        storage.check_writable(data_dir, 2 * total + _SPARE_BYTES)
        if formed:
            init_registry(wanted.registry, 1)
        with Registry(wanted.registry) as registry:
            if registry.cluster.daemons != 1:
                raise UserError(
                    f"{wanted.registry} is the registry of {registry.cluster.daemons} daemons: name a new directory, "
                    f"or start them all and use --mode client"
                )
            listen = wanted.settings.daemon.listen or ("127.0.0.1" if wanted.mode is Mode.LOCAL else "")
            ucx = [f"--{key}={value}" for key, value in _ucx_options(wanted.settings) if value]
            words = [f"--registry-dir={wanted.registry.absolute()}", f"--data-dir={data_dir.absolute()}", *ucx]
            log = wanted.registry / "bench-small.log"
            starting = Starting("benchfs_fuse.daemon", [*words, *([f"--listen={listen}"] if listen else [])], log)
            process = wait_ready([starting])[starting]
            entry = registry.find(0)
            assert entry is not None, "the daemon serves"
            task = _task(registry, entry.address.rpartition(":")[0].strip("[]"), data_dir, wanted.settings)
        with peer.started(task) as other:
            yield process, other, task
    finally:
        if process is not None:
            end([process], _STOP_S)
        with contextlib.suppress(OSError):
            (wanted.registry / "bench-small.log").unlink()
        if formed:
            shutil.rmtree(wanted.registry, ignore_errors=True)
            if empty:
                _empty(data_dir)
        if made:
            with contextlib.suppress(OSError):
                data_dir.rmdir()


def _ucx_options(settings: Settings) -> tuple[tuple[str, str], ...]:
    return ("tls", settings.ucx.tls), ("net-devices", settings.ucx.net_devices)


def _empty(data_dir: Path) -> None:
    """Remove what a daemon has made in a directory that was empty."""
    for path in data_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _serve(wanted: Wanted, daemon: ProcessId, process: peer.PeerProcess, task: peer.Task) -> int:
    """Be the server until Ctrl-C, or until the daemon ends. UserError then."""
    meeting = wanted.registry / _MEETING_FILE
    try:
        meeting.write_bytes(msgspec.json.encode(_Meet(process.address)))
        sys.stdout.write(
            f"serving {task.data_dir} at {process.address}; on another node run:\n"
            f"  benchfs bench small --mode client --registry-dir {wanted.registry.absolute()}\n"
            f"Ctrl-C ends it\n"
        )
        sys.stdout.flush()
        return trio.run(_wait, daemon)
    finally:
        meeting.unlink(missing_ok=True)


async def _wait(daemon: ProcessId) -> int:
    code = 0
    pidfd = os.pidfd_open(daemon.pid)

    async def obey(signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            nursery.cancel_scope.cancel()

    async def watch() -> None:
        nonlocal code
        await trio.lowlevel.wait_readable(pidfd)
        sys.stderr.write("benchfs: the daemon has ended\n")
        code = 1
        nursery.cancel_scope.cancel()

    try:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(obey, signals)
                nursery.start_soon(watch)
    finally:
        os.close(pidfd)
    return code


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _tell(wanted: Wanted, outcome: _Outcome, before: machine.Machine) -> int:
    """Print what was measured, then what went wrong; return the exit code."""
    run = outcome.run
    report = Report(
        1,
        wanted.mode,
        wanted.iterations,
        wanted.warm_up,
        not outcome.trouble,
        outcome.trouble,
        before,
        run.transport if run is not None else "",
        run.raw_transport if run is not None else "",
        run.storage if run is not None else "",
        run.cold if run is not None else "",
        tuple(run.cases) if run is not None else (),
    )
    if wanted.as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n")
    elif report.cases:
        console = Console(highlight=False)
        console.width = max(console.width, _WIDTH)
        show(report, console)
    if outcome.trouble:
        kept = f"; what was measured until then is above ({len(report.cases)} rows)" if report.cases else ""
        sys.stderr.write(f"benchfs: {outcome.trouble}{kept}\n")
    return outcome.exit_code


def show(report: Report, console: Console) -> None:
    """Print a report as a table."""
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"µs, {report.iterations} iterations of each after {report.warm_up}",
    )
    for name in ("", "p50", "p90", "p99", "max", "per s", "raw UCX", "io_uring", "plain", "above", "times the floor"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for case in report.cases:
        label = f"{case.name} {case.length // KIB} KiB" if case.length else case.name
        figures = case.summary
        floors = [
            f"{case.floors[name].p50_ns / 1e3:.1f}" if name in case.floors else "–"
            for name in ("ucx", "io_uring", "plain")
        ]
        table.add_row(
            label,
            *(f"{one:.1f}" for one in (figures.p50_us, figures.p90_us, figures.p99_us, figures.max_us)),
            f"{figures.rate:,.0f}",
            *floors,
            f"{case.above_us:+.1f}" if case.above_us is not None else "–",
            str(case.ratio) if case.ratio is not None else "–",
        )
    console.print(table)
    console.print(
        f"requests go over {report.transport or '?'}, raw messages over {report.raw_transport or 'nothing'}; "
        f"data on {report.storage or '?'}; " + (f"before cold reads: {report.cold}" if report.cold else "no cold reads")
    )
    console.print("counted by the daemons:")
    for case in report.cases:
        if case.counted is not None:
            console.print(f"  {case.name} {case.length or ''}: {_counts(case.counted)}")
    note = machine.load_note(report.machine)
    if note:
        console.print(note)


def _counts(counted: Counted) -> str:
    words = [f"{count} {name}" for name, count in sorted(counted.requests.items(), key=lambda item: -item[1])]
    return f"{', '.join(words)}; {counted.bytes_written} bytes written, {counted.bytes_read} read"
