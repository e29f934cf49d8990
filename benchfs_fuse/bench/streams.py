"""Tell what a second daemon costs a sequential stream, or gains it: ``benchfs bench streams``.

A cluster of one daemon and one of two are up at once, each with a mount, as ``benchfs up`` makes them. In alternating
rounds a new file is written from its beginning to its end, through the page cache and closed, and read for the first
time: nothing of it is cached, neither by the mount nor below the daemons. What comes out is held against what went in,
its beginnings and lengths while it is read, all of it afterwards.
"""

import errno
import mmap
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import kernel_mounts, mountpoints
from ..commands import local
from ..errors import UserError
from ..limits import CHUNK_SIZE_DEFAULT, MIB
from ..mountpoints import State
from ..processes import uninterrupted
from . import machine, storage, tools
from .machine import Machine, Storage
from .samples import Moved, Ratio, Throughput

#: Daemons of the clusters.
ONE, TWO = 1, 2
#: Bytes of one read or write.
REQUEST = MIB
#: Room beyond one file for each cluster: stores, journals, and what is dropped of the file before only behind its end.
_ROOM_BESIDE = 64 * MIB
#: At the beginning of each request: the number of the file, and that of the request in it.
_HEAD = struct.Struct("<QQ")
#: What follows in each: no device and no file system makes it any shorter.
_NOISE = random.Random(REQUEST).randbytes(REQUEST)


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold what was done, how fast with one daemon and with two, and how many times as fast with two in each round."""

    what: str
    one: Throughput
    two: Throughput
    ratio: Ratio


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold everything measured, and what it was measured on. ``size``: bytes of each file. ``cold``: how, in words."""

    format: int
    machine: Machine
    storage: Storage
    size: int
    cold: str
    rows: tuple[Row, ...]


class Cluster(NamedTuple):
    """Be a cluster that is up, and its mount."""

    daemons: int
    mountpoint: Path
    data_dir: Path

    @property
    def file(self) -> Path:
        """Return where the file is written."""
        return self.mountpoint / "stream"

    def forget(self) -> str:
        """Have nothing of the file cached, by mount and daemons; return in words what was done. OSError."""
        file = os.open(self.file, os.O_RDONLY)
        try:
            os.fsync(file)  # only what is on the disk can be dropped
        finally:
            os.close(file)
        tools.drop_cached(self.file)
        said = [storage.drop_caches(self.data_dir / f"daemon-{number}") for number in range(self.daemons)]
        return said[-1]


@contextmanager
def cluster(place: Path, daemons: int) -> Iterator[Cluster]:
    """Have a cluster up and mounted below a directory for the time of the block. UserError."""
    found = Cluster(daemons, place / f"mount-{daemons}", place / f"cluster-{daemons}")
    found.mountpoint.mkdir()
    wanted = local.Wanted(
        found.mountpoint, found.data_dir, daemons, CHUNK_SIZE_DEFAULT, False, ["--listen=127.0.0.1"], []
    )
    try:
        local.up(wanted)
        yield found
    finally:
        with uninterrupted():
            if local.data_dir_of(found.mountpoint) is not None:  # it is up, or was
                local.down_anyhow(found.mountpoint)


# ── a stream ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(path: Path, size: int, number: int) -> Moved:
    """Write the file with this number, and close it. OSError."""
    data = bytearray(_NOISE)
    started_ns = time.perf_counter_ns()
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        for index in range(size // REQUEST):
            _HEAD.pack_into(data, 0, number, index)
            if os.write(file, data) != REQUEST:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)
    return Moved(size, time.perf_counter_ns() - started_ns)


def read(path: Path, size: int, number: int) -> Moved:
    """Read the file with this number from its beginning to its end. OSError; UserError: it is not what was written."""
    data = memoryview(mmap.mmap(-1, REQUEST))
    data[:] = bytes(REQUEST)  # page faults are no reading
    started_ns = time.perf_counter_ns()
    for index in _requests(path, data):
        if index * REQUEST >= size or _HEAD.unpack_from(data) != (number, index):
            raise _other(path, index)
    took_ns = time.perf_counter_ns() - started_ns
    check(path, size, number)
    return Moved(size, took_ns)


def check(path: Path, size: int, number: int) -> None:
    """See that a file is the one with this number, every byte of it. OSError; UserError: it is not."""
    data = memoryview(mmap.mmap(-1, REQUEST))
    index = -1
    for index in _requests(path, data):
        if _HEAD.unpack_from(data) != (number, index) or data[_HEAD.size :] != _NOISE[_HEAD.size :]:
            raise _other(path, index)
    if (index + 1) * REQUEST != size:
        raise _other(path, index + 1)


def _requests(path: Path, into: memoryview) -> Iterator[int]:
    """Read a file, request by request; yield their numbers. OSError; UserError: one is cut short."""
    file = os.open(path, os.O_RDONLY)
    try:
        index = 0
        while got := os.readv(file, [into]):
            if got != REQUEST:
                raise UserError(f"{path} gives {got} bytes at {index * REQUEST} instead of {REQUEST}")
            yield index
            index += 1
    finally:
        os.close(file)


def _other(path: Path, index: int) -> UserError:
    return UserError(f"{path} does not hold what was written, from byte {index * REQUEST} on")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run_streams(data_dir: Path, *, rounds: int, size_mib: int, as_json: bool) -> int:
    """Measure, and show it. UserError."""
    size = size_mib * MIB
    storage.check_writable(data_dir, 2 * (size + _ROOM_BESIDE))
    before = machine.describe()
    with ExitStack() as stack:
        shown = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        progress = stack.enter_context(Progress(*shown, console=Console(highlight=False, stderr=True), transient=True))
        task = progress.add_task("measuring", total=2 * (rounds + 1))
        place = stack.enter_context(_place(data_dir))
        clusters = [stack.enter_context(cluster(place, daemons)) for daemons in (ONE, TWO)]
        written, first_read, cold = _alternate(clusters, rounds, size, lambda: progress.advance(task))
        progress.update(task, description="removing")
    rows = [
        Row(what, found[ONE], found[TWO], found[TWO].times(found[ONE]))
        for what, found in (("write and close", written), ("read for the first time", first_read))
    ]
    report = Report(1, before, machine.storage_of(data_dir), size, cold, tuple(rows))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n")
    else:
        show(report, Console(highlight=False))
    return 0


@contextmanager
def _place(data_dir: Path) -> Iterator[Path]:
    """Have a directory of one's own in a directory for the time of the block. UserError."""
    try:
        place = Path(tempfile.mkdtemp(prefix="benchfs-streams-", dir=kernel_mounts.plain_path(data_dir)))
    except OSError as error:
        raise UserError(f"{data_dir} cannot be written: {error.strerror}") from None
    try:
        yield place
    finally:
        with uninterrupted():
            shutil.rmtree(place, ignore_errors=True)


def _alternate(
    clusters: list[Cluster], rounds: int, size: int, note: Callable[[], None]
) -> tuple[dict[int, Throughput], dict[int, Throughput], str]:
    """Do the rounds; return, by the number of daemons, what was written and read, and how caches were dropped."""
    written: dict[int, list[Moved]] = {one.daemons: [] for one in clusters}
    first_read: dict[int, list[Moved]] = {one.daemons: [] for one in clusters}
    cold = ""
    for turn in range(rounds + 1):
        for one in clusters if turn % 2 else reversed(clusters):
            try:
                wrote = write(one.file, size, turn)
                cold = one.forget()
                got = read(one.file, size, turn)
                one.file.unlink()
            except OSError as error:
                raise _trouble(one, error) from None
            if turn:  # the first one warms up
                written[one.daemons].append(wrote)
                first_read[one.daemons].append(got)
            note()
    return _sum_up(written), _sum_up(first_read), cold


def _sum_up(found: dict[int, list[Moved]]) -> dict[int, Throughput]:
    return {daemons: Throughput.of(rounds) for daemons, rounds in found.items()}


def _trouble(one: Cluster, error: OSError) -> UserError:
    """Say what an error means."""
    who = f"the mount of the cluster with {one.daemons} daemon{'s' if one.daemons > 1 else ''}"
    if mountpoints.look(one.mountpoint).state is not State.SERVED:
        return UserError(f"{who} has died ({error.strerror})")
    return UserError(f"{who}: {error.filename or one.file}: {error.strerror}")


def show(report: Report, console: Console) -> None:
    """Print the rows as a table."""
    console.print(f"a file of {report.size // MIB} MiB in requests of {REQUEST // MIB} MiB, MiB/s")
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for head in ("one daemon", "two daemons", "two to one"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(row.what, str(row.one), str(row.two), str(row.ratio))
    console.print(table)
    console.print(f"medians and extremes of {len(report.rows[0].one.rounds)} rounds; before reading: {report.cold}")
    note = machine.load_note(report.machine)
    if note:
        console.print(note)
