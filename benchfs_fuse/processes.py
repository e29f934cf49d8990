"""Start, recognise and end processes. A process is its pid and its start time: pids are reused.

Waiting for an end is waiting on a pidfd (pidfd_open(2)), never a poll of /proc.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from .errors import UserError


class ProcessId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name one process for as long as this host runs. ``started`` is in clock ticks after boot (proc(5), field 22)."""

    pid: int
    started: int


def identify(pid: int) -> ProcessId | None:
    """Return the identity of a running process; None when there is none, or only its unreaped rest."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else ProcessId(pid, int(after_name[19]))


def alive(process: ProcessId) -> bool:
    """Tell whether this very process still runs."""
    return identify(process.pid) == process


def end(process: ProcessId, deadline_s: float) -> bool:
    """Ask a process to end (SIGTERM), kill it when it has not within ``deadline_s``; tell whether asking was enough.

    It is reaped by whoever is its parent.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not alive(process):
            return True
        for signal_number, wait_s in ((signal.SIGTERM, deadline_s), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal_number)
            if select.select([pidfd], [], [], wait_s)[0]:
                return signal_number == signal.SIGTERM
        raise AssertionError("a killed process ends")
    finally:
        os.close(pidfd)


def start_module(module: str, arguments: Sequence[str], log: Path, ready_option: str) -> ProcessId:
    """Run ``python -m module`` in its own session until it says that it is ready; return what it is.

    The process gets ``ready_option FD`` and writes a line there when it serves. Its output goes to the end of ``log``.
    UserError with its last words when it ends before that.
    """
    reader, writer = os.pipe()
    try:
        with log.open("ab") as output:
            log_start = output.tell()
            child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, ready_option, str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[writer],
                start_new_session=True,
                cwd="/",
            )
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as ready:
        said = ready.readline()
    process = identify(child.pid)
    if said and process is not None:
        child.returncode = 0  # it is init's child from here on: nobody waits for it
        return process
    child.wait()
    with log.open("rb") as output:
        output.seek(log_start)
        last = output.read().decode(errors="replace").strip().splitlines()
    if not last:
        raise UserError(f"{module} ended with code {child.returncode} and said nothing; see {log}")
    raise UserError(last[-1].removeprefix("benchfs: "))
