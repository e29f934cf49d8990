"""Hold a connection of ours against iperf3, over TCP between two network namespaces: ``benchfs bench network``.

Two hosts of one's own (``hosts``) are joined by one cable, a pair of virtual devices. In each round iperf3 sends
through it for some seconds, then a connection of ours does (``connection``): writes go the way that iperf3 sends,
reads the other way.

Everything ends with this process, whatever ends it: the hosts have no names and live as long as who made them, the ends
of our connection end with their standard input, and the kernel ends iperf3 (PR_SET_PDEATHSIG).
"""

import os
import secrets
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import IO, Self

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import UserError
from ..hosts import Cable, Namespace
from ..limits import MIB
from ..processes import how_ended
from . import machine
from .connection import Answer, Order, Task
from .machine import Machine
from .samples import Moved, Ratio, Throughput

#: Requests under way at once: as many large writes as a connection has slots for (limits.BULK_SLOTS).
IN_FLIGHT = 4
LENGTHS = (MIB, 4 * MIB)
#: Seconds for a process to begin (ours loads UCX), and for an answer beyond what was asked for.
PATIENCE_S = 60.0
IPERF3 = "iperf3"
#: What iperf3 says when it can be reached.
_LISTENING = b"Server listening"
_NS_PER_S = 1_000_000_000


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold reads or writes of one length, and how many times as fast they were as iperf3 in the same round."""

    operation: str
    length: int
    moved: Throughput
    ratio: Ratio


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold everything measured, and what it was measured on."""

    format: int
    machine: Machine
    iperf3_version: str
    #: Of each measurement in each round.
    seconds: int
    in_flight: int
    iperf3: Throughput
    rows: tuple[Row, ...]


# ── iperf3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Sum(msgspec.Struct, frozen=True):
    bytes: int
    seconds: float


class _End(msgspec.Struct, frozen=True):
    sum_received: _Sum | None = None


class _Start(msgspec.Struct, frozen=True):
    version: str = ""


class _Said(msgspec.Struct, frozen=True):
    """Be what is wanted of what iperf3 says with --json."""

    start: _Start = _Start()
    end: _End = _End()
    error: str = ""


def _command(host: Namespace, *words: str) -> list[str]:
    """Return the command that runs iperf3 on a host, and lets it not outlive us."""
    return [*host.enter, "setpriv", "--pdeathsig=KILL", IPERF3, *words]


@contextmanager
def _iperf3_server(host: Namespace, address: str) -> Iterator[None]:
    """Have iperf3 listen for one client. UserError."""
    words = ("--server", "--one-off", f"--bind={address}", "--interval=0", "--forceflush")
    server = subprocess.Popen(
        _command(host, *words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,  # else a line could wait in a buffer, where select sees nothing
        start_new_session=True,  # Ctrl-C is for us
    )
    assert server.stdout is not None
    last = b""
    try:
        while not (line := _line(server.stdout, PATIENCE_S, "the server of iperf3")).startswith(_LISTENING):
            if not line:
                said = last.decode(errors="replace").strip()
                raise UserError(f"the server of iperf3 {how_ended(server.wait())} before it listened: {said}")
            last = line
        yield
    finally:
        server.kill()
        server.stdout.close()
        server.wait()


def _line(stream: IO[bytes], timeout_s: float, who: str) -> bytes:
    """Wait for the next line; empty at the end. UserError: none came in time."""
    if not select.select([stream], [], [], timeout_s)[0]:
        raise UserError(f"{who} has said nothing for {timeout_s:.0f} s: it hangs")
    return stream.readline()


def _iperf3(near: Namespace, far: Namespace, address: str, seconds: int) -> tuple[Moved, str]:
    """Let iperf3 send from the far end to the near one; return what arrived there, and its version. UserError."""
    with _iperf3_server(near, address):
        try:
            done = subprocess.run(
                _command(far, f"--client={address}", f"--time={seconds}", "--json"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=seconds + PATIENCE_S,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"iperf3 did not end within {error.timeout:.0f} s") from None
    try:
        said = msgspec.json.decode(done.stdout, type=_Said)
    except msgspec.DecodeError:
        said = _Said(error=done.stderr.decode(errors="replace").strip())
    received = said.end.sum_received
    if done.returncode or said.error or received is None or not received.bytes:
        raise UserError(f"iperf3 {how_ended(done.returncode)}: {said.error or 'it says nothing about what it sent'}")
    return Moved(received.bytes, round(received.seconds * _NS_PER_S)), said.start.version


# ── our connection ───────────────────────────────────────────────────────────────────────────────────────────────────


class Side:
    """Be one end of our connection, a process on a host. A context manager."""

    def __init__(self, host: Namespace, task: Task) -> None:
        self._name = f"the {'server' if task.serves else 'client'} of our connection"
        self.popen = subprocess.Popen(
            [*host.enter, sys.executable, "-m", "benchfs_fuse.bench.connection"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us
        )
        self._tell(task)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.popen.kill()
        self.popen.communicate()

    def _tell(self, message: msgspec.Struct) -> None:
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and perhaps said why
            self.popen.stdin.write(msgspec.json.encode(message) + b"\n")

    def hear(self, beyond_s: float = 0.0) -> Answer:
        """Return what it says next, for which it takes some time and ``beyond_s`` seconds. UserError: it has died."""
        assert self.popen.stdout is not None
        line = _line(self.popen.stdout, PATIENCE_S + beyond_s, self._name)
        if not line:
            raise UserError(f"{self._name} {how_ended(self.popen.wait())}")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.trouble:
            raise UserError(f"{self._name} could not go on: {answer.trouble}")
        return answer

    def measure(self, order: Order) -> Moved:
        """Have a round done. UserError."""
        self._tell(order)
        moved = self.hear(order.seconds).moved
        assert moved is not None, "there was no trouble"
        return moved


@contextmanager
def connection(near: Namespace, far: Namespace, cable: Cable) -> Iterator[tuple[Side, Side]]:
    """Have a server at the near end of a cable and a client at the far one, which asks it; yield both. UserError."""
    keys = (secrets.token_hex(32), secrets.token_hex(16))
    with ExitStack() as stack:
        server = stack.enter_context(Side(near, Task(True, cable.near_address, cable.device, *keys)))
        address = server.hear().address
        client = stack.enter_context(Side(far, Task(False, address, cable.device, *keys)))
        client.hear()  # nothing is measured while it begins
        yield server, client


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run_network(*, rounds: int, seconds: int, as_json: bool) -> int:
    """Measure, and show it. UserError."""
    if os.geteuid() != 0:
        raise UserError("bench network makes network namespaces, which only root may: run it as root")
    if shutil.which(IPERF3) is None:
        raise UserError("iperf3 is not installed: apt-get install iperf3")
    report = _measure(rounds, seconds)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n")
    else:
        show(report, Console(highlight=False))
    return 0


def _measure(rounds: int, seconds: int) -> Report:
    before = machine.describe()
    orders = [Order(writes, length, IN_FLIGHT, seconds) for length in LENGTHS for writes in (False, True)]
    floor: list[Moved] = []
    ours: dict[Order, list[Moved]] = {order: [] for order in orders}
    version = ""
    with ExitStack() as stack:
        shown = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        progress = stack.enter_context(Progress(*shown, console=Console(highlight=False, stderr=True), transient=True))
        task = progress.add_task("measuring", total=rounds * (1 + len(orders)))
        near, far = (stack.enter_context(Namespace(name)) for name in ("near", "far"))
        cable = Cable(near, far, 1)
        cable.wait_running()
        _, client = stack.enter_context(connection(near, far, cable))
        for _ in range(rounds):
            moved, version = _iperf3(near, far, cable.near_address, seconds)
            floor.append(moved)
            progress.advance(task)
            for order in orders:
                ours[order].append(client.measure(order))
                progress.advance(task)
    base = Throughput.of(floor)
    rows = []
    for order, found in ours.items():
        moved_by_us = Throughput.of(found)
        rows.append(Row("write" if order.writes else "read", order.length, moved_by_us, moved_by_us.times(base)))
    return Report(1, before, version, seconds, IN_FLIGHT, base, tuple(rows))


def show(report: Report, console: Console) -> None:
    """Print the rows as a table."""
    console.print(f"TCP between two network namespaces, {report.in_flight} requests of ours under way")
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for head in ("MiB/s", "times iperf3"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_row(report.iperf3_version, str(report.iperf3), "")
    for row in report.rows:
        table.add_row(f"{row.operation} {row.length // MIB} MiB", str(row.moved), str(row.ratio))
    console.print(table)
    console.print(f"medians and extremes of {len(report.iperf3.rounds)} rounds of {report.seconds} s each")
    note = machine.load_note(report.machine)
    if note:
        console.print(note)
