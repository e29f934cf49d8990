"""Have the kernel say when it had a request of FUSE for us, and when it had our answer: its tracepoints, for root.

The events ``fuse_request_send`` and ``fuse_request_end`` (fs/fuse/fuse_trace.h, Linux 6.11) name the connection and the
request's ``unique``. They go to a tracing instance of our own, with CLOCK_MONOTONIC (Documentation/trace/ftrace.rst),
so nobody else's tracing is disturbed; it is removed in the end, or by the next one if its process was killed. A line
of its ``trace`` file:

    dd-42  [001] ..... 1234.567890: fuse_request_send: connection 45 req 10 opcode 15 (FUSE_READ) len 80
"""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .timeline import KernelTimes

TRACEFS = Path("/sys/kernel/tracing")
#: Memory for events per processor: some 60 bytes each.
_BUFFER_KB = 16 * 1024
_EVENTS = ("fuse_request_send", "fuse_request_end")
_NAME = "benchfs-"
_LINE = re.compile(r" (\d+)\.(\d{6}): fuse_request_(send|end): connection (\d+) req (\d+) ")


class KernelEvents:
    """Record the requests of one FUSE connection, from ``begin`` to ``end``."""

    def __init__(self, connection: int, tracefs: Path = TRACEFS) -> None:
        self._instances = tracefs / "instances"
        self._instance = self._instances / f"{_NAME}{os.getpid()}"
        self._tracefs = tracefs
        self._connection = connection

    def begin(self) -> None:
        """Begin to record. UserError says why that cannot be."""
        try:
            left = os.listdir(self._instances)
        except OSError:  # also FileNotFoundError: then it is an empty directory
            raise UserError(
                f"{self._tracefs} is not mounted, or not for you (as root: mount -t tracefs nodev {self._tracefs})"
            ) from None
        if not (self._tracefs / "events" / "fuse" / _EVENTS[0]).is_dir():
            raise UserError("this kernel has no tracepoints of FUSE (Linux 6.11 has)")
        for name in left:
            pid = name.removeprefix(_NAME)
            if pid != name and (pid == str(os.getpid()) or not Path("/proc", pid).exists()):
                _remove(self._instances / name)
        try:
            self._instance.mkdir()
            self._write("trace_clock", "mono")
            self._write("buffer_size_kb", str(_BUFFER_KB))
            for event in _EVENTS:
                self._write(f"events/fuse/{event}/filter", f"connection == {self._connection}")
                self._write(f"events/fuse/{event}/enable", "1")
        except OSError as error:
            self.close()
            raise UserError(f"cannot use {error.filename or self._instance}: {error.strerror}") from None

    def end(self) -> tuple[dict[int, KernelTimes], int]:
        """Record no more; return the times of each request by ``unique``, and how many events there was no room for.

        OSError: somebody has taken the instance away.
        """
        self._write("tracing_on", "0")
        with (self._instance / "trace").open() as lines:
            times = parse(lines, self._connection)
        lost = 0
        for stats in self._instance.glob("per_cpu/cpu*/stats"):
            found = re.search(r"^overrun: (\d+)", stats.read_text(), re.MULTILINE)
            lost += int(found[1]) if found else 0
        return times, lost

    def close(self) -> None:
        """Remove the instance."""
        _remove(self._instance)

    def _write(self, name: str, text: str) -> None:
        (self._instance / name).write_text(text)


def _remove(instance: Path) -> None:
    for event in _EVENTS:
        with contextlib.suppress(OSError):
            (instance / "events" / "fuse" / event / "enable").write_text("0")
    with contextlib.suppress(OSError):
        instance.rmdir()


def parse(lines: Iterable[str], connection: int) -> dict[int, KernelTimes]:
    """Read the times of a connection's requests from trace lines."""
    times: dict[int, KernelTimes] = {}
    for line in lines:
        found = _LINE.search(line)
        if found is None or int(found[4]) != connection:
            continue
        at = int(found[1]) * 1_000_000_000 + int(found[2]) * 1000
        unique = int(found[5])
        if found[3] == "send":
            times[unique] = KernelTimes(at, 0)
        elif unique in times:
            times[unique] = times[unique]._replace(answered_ns=at)
    return times
