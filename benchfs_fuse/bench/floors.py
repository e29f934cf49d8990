"""Measure the floors by themselves, and alternate floors with what stands on them: ``benchfs bench floors``.

Raw UCX between two processes of this machine (``raw_ucx``), over shared memory and TCP, polling and armed; raw storage
(``storage``) in a data directory and in memory. The floor under a mount is ``memory_fs``; ``memory_mount`` mounts it.
"""

import secrets
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import trio
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .. import kernel_mounts
from ..errors import UserError
from ..limits import KIB, MIB
from ..processes import Starting, end, wait_ready
from . import machine, peer, storage
from .machine import Machine, Storage
from .samples import Samples, Summary

#: Where tmpfs is on every Linux.
MEMORY = Path("/dev/shm")
ROUNDS = 5
#: Lengths of messages and of storage operations: what small files, pages and chunks are made of.
MESSAGE_LENGTHS = (64, 4 * KIB, 16 * KIB, MIB, 4 * MIB)
STORAGE_LENGTHS = (KIB, 4 * KIB, 16 * KIB, MIB)
#: From this length on, so many times fewer operations: they take so much longer.
_LONG = MIB
_LONG_PART = 8
_UNITS = ((MIB, "MiB"), (KIB, "KiB"), (1, "B"))
#: Columns of the table: a narrower terminal wraps it, which is better than to cut figures off.
_WIDTH = 100
#: Seconds for the floor to leave.
_LEAVE_S = 10.0

#: One round: the ns of each of its operations.
Measured = Callable[[], Awaitable[Sequence[int]]]


async def alternate(rounds: int, subjects: Mapping[str, Measured]) -> dict[str, Samples]:
    """Measure one round of each in turn, ``rounds`` times: what the machine does besides meets all of them alike."""
    times: dict[str, list[Sequence[int]]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, measure in subjects.items():
            times[name].append(await measure())
    return {name: Samples.of(some) for name, some in times.items()}


@contextmanager
def memory_mount(mountpoint: Path, *arguments: str) -> Iterator[Path]:
    """Have the floor under a mount at a directory for the time of the block; ``arguments`` as of ``memory_fs``.

    UserError when it cannot be mounted.
    """
    path = kernel_mounts.plain_path(mountpoint)
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchfs-floor-"))) / "log"
        starting = Starting("benchfs_fuse.bench.memory_fs", [str(path), *arguments], log)
        process = wait_ready([starting])[starting]
        try:
            yield path
        finally:
            mounted = kernel_mounts.find(path)
            if mounted is not None and end([process], _LEAVE_S):
                kernel_mounts.abort(mounted)  # what hangs in it goes free
                kernel_mounts.detach(path)


# ── the raw floors ───────────────────────────────────────────────────────────────────────────────────────────────────


class Floor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold one floor: what was done ("shm, polling", "pwrite" …) with how many bytes where, and the times."""

    kind: str
    name: str
    length: int
    samples: Samples
    summary: Summary


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold the raw floors of a machine and a directory."""

    format: int
    machine: Machine
    storage: Storage
    floors: tuple[Floor, ...]


async def measure(data_dir: Path, iterations: int) -> list[Floor]:
    """Measure all raw floors, everything in turn within each round. UserError."""
    with ExitStack() as stack:
        subjects: dict[tuple[str, str, int], Measured] = {}
        for transport in ("shm", "tcp"):
            await _add_messages(stack, transport, iterations, subjects)
        for directory in (data_dir, MEMORY):
            _add_storage(directory, iterations, subjects)
        named = {repr(key): key for key in subjects}
        try:
            found = await alternate(ROUNDS, {name: subjects[key] for name, key in named.items()})
        except OSError as error:
            raise UserError(f"{error.filename or data_dir}: {error.strerror}") from None
        return [Floor(*named[name], samples, samples.summary()) for name, samples in found.items()]


async def _add_messages(
    stack: ExitStack, transport: str, iterations: int, subjects: dict[tuple[str, str, int], Measured]
) -> None:
    """Start the other process of one transport, and add what to do with it."""
    tls = "" if transport == "shm" else "tcp"
    task = peer.Task(secrets.token_hex(32), secrets.token_hex(16), "127.0.0.1", "", tls, "")
    process = stack.enter_context(peer.started(task))

    def one(length: int, armed: bool) -> Measured:
        async def measured() -> list[int]:
            async with peer.open_asker(process.address, task) as asker:
                await asker.round_trips(length, 1, armed=armed)  # UCX connects when the first message goes
                return await asker.round_trips(length, _count(iterations, length), armed=armed)

        return measured

    for armed in (False, True):
        for length in MESSAGE_LENGTHS:
            subjects[f"UCX {transport}", "armed" if armed else "polling", length] = one(length, armed)


def _add_storage(directory: Path, iterations: int, subjects: dict[tuple[str, str, int], Measured]) -> None:
    def one(way: storage.Way, length: int) -> Measured:
        async def measured() -> list[int]:
            return storage.measure(directory, way, length, _count(iterations, length))

        return measured

    for way in storage.Way:
        for length in STORAGE_LENGTHS:
            subjects[f"{storage.describe(directory)}", way, length] = one(way, length)


def _count(iterations: int, length: int) -> int:
    """Return how many operations of a length make one round."""
    return max(1, iterations // ROUNDS // (_LONG_PART if length >= _LONG else 1))


def run_floors(data_dir: Path, iterations: int, as_json: bool) -> int:
    """Measure, and show it. UserError."""
    storage.check_writable(data_dir, _count(iterations, _LONG) * _LONG)
    before = machine.describe()
    floors = trio.run(measure, data_dir, iterations)
    report = Report(1, before, machine.storage_of(data_dir), tuple(floors))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n")
    else:
        console = Console(highlight=False)
        console.width = max(console.width, _WIDTH)
        show(report, console)
    return 0


def show(report: Report, console: Console) -> None:
    """Print the floors as a table."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, title="µs for one, and MiB/s")
    for name in ("floor", "", "length", "p50", "p90", "p99", "max", "MiB/s"):
        table.add_column(name, justify="left" if name in ("floor", "") else "right", no_wrap=True)
    for floor in report.floors:
        figures = floor.summary
        unit, name = next((unit, name) for unit, name in _UNITS if floor.length >= unit)
        table.add_row(
            floor.kind,
            floor.name,
            f"{floor.length // unit} {name}",
            *(f"{one:.1f}" for one in (figures.p50_us, figures.p90_us, figures.p99_us, figures.max_us)),
            f"{floor.length / MIB * 1e6 / max(figures.p50_us, 0.001):,.0f}",
        )
    console.print(table)
    note = machine.load_note(report.machine)
    if note:
        console.print(note)
