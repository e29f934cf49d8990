"""Start, recognise and end processes. A process is its pid and its start time: pids are reused.

Waiting for an end is waiting on a pidfd (pidfd_open(2)), never a poll of /proc.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import msgspec

from .errors import UserError

#: Seconds for the kernel to take away what was killed. What needs longer sits in a call that nothing interrupts: nobody
#: can do more about it.
KILLED_S = 0.5
#: Seconds for what has just started to end in order, before it is killed: it holds nothing that takes longer.
STOPPED_S = 5.0
#: Seconds between looks at what a starting process says, for the eyes of who waits for it. Nothing else waits for it.
LOOK_S = 0.2

#: Seconds between looks whether processes rest.
_REST_LOOK_S = 0.0005

#: How our programs say, in one sentence, why they end (argparse puts "error: " in front).
_SENTENCE = re.compile(r"benchfsd?: (?:error: )?(.+)")
#: How they log what people should know.
_WARNING = re.compile(r"[-0-9]+ [:,0-9]+ (?:WARNING|ERROR) (.+)")


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


def is_defunct(process: ProcessId) -> bool:
    """Tell whether this very process was ended and is still there: unreaped, or with a thread that cannot end yet."""
    try:
        after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return after_name[0] in "ZX" and int(after_name[19]) == process.started


def wait_rest(pids: Iterable[int], timeout_s: float) -> bool:
    """Wait until no thread of processes runs, seen twice in a row; tell whether that came in time.

    Nothing tells of it, so this looks: for measurements, never for progress.
    """
    deadline = time.monotonic() + timeout_s
    looks = 0
    while looks < 2:
        if time.monotonic() > deadline:
            return False
        looks = 0 if any(_runs(pid) for pid in pids) else looks + 1
        time.sleep(_REST_LOOK_S)
    return True


def _runs(pid: int) -> bool:
    """Tell whether a thread of a process runs or is about to."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            if stat.read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False


def cpu_ns(pid: int) -> int:
    """Sum up the processor time of a process's threads, in ns; 0: none is left.

    The kernel adds what a thread has used when it stops running, and at ticks (4 ms): nobody else knows what one that
    runs just now has used since (Documentation/scheduler/sched-stats.rst). See ``wait_rest``.
    """
    total = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            total += int(thread.read_text().split()[0])
    return total


#: Signals that do not end a process that has not said what to do about them (signal(7)).
_HARMLESS = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
_HARMLESS |= {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
#: The bit of a process's flags in /proc/PID/stat that says that it exits: PF_EXITING of include/linux/sched.h.
_EXITING = 4


class _Signals(NamedTuple):
    """Hold the signals of a thread, a bit for each from the lowest on: pending, blocked, ignored, handled."""

    pending: int
    blocked: int
    ignored: int
    caught: int


def _status(thread_id: int) -> tuple[str, _Signals]:
    """Return the state of a thread (one letter) and its signals; OSError if it has gone."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{thread_id}/status").read_text().splitlines())
    own, shared, *masks = (int(status[name], 16) for name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"))
    return status["State"].split()[0], _Signals(own | shared, *masks)


def is_dying(thread_id: int) -> bool:
    """Tell whether a thread has gone, exits, or has a signal pending that will end it."""
    try:
        if int(Path(f"/proc/{thread_id}/stat").read_text().rpartition(")")[2].split()[6]) & _EXITING:
            return True
        _, signals = _status(thread_id)
    except OSError:
        return True
    survived = signals.blocked | signals.ignored | signals.caught | sum(1 << (number - 1) for number in _HARMLESS)
    return bool(signals.pending & ~survived)


def is_held(thread_id: int) -> bool:
    """Tell whether a thread cannot handle a signal that it was sent, because the kernel has it wait (state D)."""
    try:
        state, signals = _status(thread_id)
    except OSError:
        return False
    return state == "D" and bool(signals.pending & signals.caught & ~signals.blocked)


# ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Watch:
    """Hold a process by its pidfd: a signal through it reaches no other. ProcessLookupError when it has gone."""

    def __init__(self, process: ProcessId) -> None:
        self.process = process
        self.pidfd = os.pidfd_open(process.pid)
        if not alive(process):
            os.close(self.pidfd)
            raise ProcessLookupError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.pidfd)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


def _wait_gone(watches: Collection[_Watch], timeout_s: float) -> list[_Watch]:
    """Wait until all have ended; return those that have not in time."""
    deadline = time.monotonic() + timeout_s
    left = list(watches)
    while left:
        ended = select.select([watch.pidfd for watch in left], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ended:
            break
        left = [watch for watch in left if watch.pidfd not in ended]
    return left


def wait_end(process: ProcessId, timeout_s: float) -> bool:
    """Wait until a process has ended by itself; tell whether it has."""
    try:
        with _Watch(process) as watch:
            return not _wait_gone([watch], timeout_s)
    except ProcessLookupError:
        return True


def end(processes: Iterable[ProcessId], timeout_s: float) -> list[ProcessId]:
    """Ask processes to end (SIGTERM), kill those that have not within ``timeout_s``; return those that were killed.

    They are reaped by whoever is their parent.
    """
    with contextlib.ExitStack() as stack:
        watches = []
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                watches.append(stack.enter_context(_Watch(process)))
        for watch in watches:
            watch.signal(signal.SIGTERM)
        stuck = _wait_gone(watches, timeout_s)
        for watch in stuck:
            watch.signal(signal.SIGKILL)
        _wait_gone(stuck, KILLED_S)
        return [watch.process for watch in stuck]


# ── starting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


#: What ends a command from outside: each raises an exception wherever it is just then (cli).
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back until the end of the block: what is started in it is on record by then.

    Main thread only.
    """
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for one in held:
        signal.raise_signal(one)


def private(path: str, flags: int) -> int:
    """Open a file that, if it is made here, is its user's alone: an opener for ``open``."""
    return os.open(path, flags, 0o600)


def how_ended(code: int) -> str:
    """Say in words what a return code of subprocess means."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class Starting:
    """Be a module of ours that was started as ``python -m`` in its own session and is not ready yet.

    It gets ``--ready-fd FD`` and calls ``say_ready`` when it serves. Its output goes to the end of ``log``. ``before``:
    words in front of the command, which run it elsewhere as the same process (nsenter(1)).
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Path, before: Sequence[str] = ()) -> None:
        self._module = module
        self._log = log
        self._ready, writer = os.pipe()
        try:
            try:
                with open(log, "ab", opener=private) as output:
                    self._log_start = output.tell()
                    self._child = subprocess.Popen(
                        [*before, sys.executable, "-m", module, *arguments, "--ready-fd", str(writer)],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        pass_fds=[writer],
                        start_new_session=True,
                        cwd="/",
                    )
            finally:
                os.close(writer)
        except OSError as error:
            os.close(self._ready)
            raise UserError(f"cannot start {module} with the log {log}: {error.strerror}") from None

    @property
    def process(self) -> ProcessId | None:
        """Return what the process is, None if it has ended."""
        return identify(self._child.pid)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the process is ready or has ended."""
        return self._ready

    def finish(self) -> ProcessId:
        """Return what the process is, once ``fileno`` is readable. UserError: it has ended; says why."""
        ready = os.read(self._ready, 1)
        os.close(self._ready)
        process = self.process
        if ready and process is not None:
            self._child.returncode = 0  # it is init's child from here on: nobody waits for it
            return process
        self._child.wait()
        raise UserError(self._reason())

    def stop(self) -> None:
        """End the process if it has not been finished with."""
        if self._child.returncode is None:
            process = self.process
            if process is not None:
                end([process], STOPPED_S)
            self._child.poll()
            os.close(self._ready)

    def open_log(self) -> BinaryIO:
        """Open the log where this process begins in it."""
        said = self._log.open("rb")
        said.seek(self._log_start)
        return said

    def _reason(self) -> str:
        """Say why it ended: its own last sentence, or else where to look."""
        with self.open_log() as log:
            said = log.read().decode(errors="replace")
        sentences = [match[1] for line in said.splitlines() if (match := _SENTENCE.match(line))]
        if sentences:
            return sentences[-1]
        return (
            f"{self._module} {how_ended(self._child.returncode)} before it was ready; its last words are in {self._log}"
        )


def say_ready(ready_fd: int | None) -> None:
    """Tell whoever started this process, and waits for it, that it serves."""
    if ready_fd is not None:
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more
            os.write(ready_fd, b"ready\n")
        os.close(ready_fd)


def wait_ready(
    starting: Sequence[Starting], tell: Callable[[str], None] = lambda sentence: None
) -> dict[Starting, ProcessId]:
    """Wait until all are ready; return what they are.

    ``tell`` gets the warnings that they log meanwhile. UserError when one ends instead: then, and when the wait is
    interrupted, none of them is left.
    """
    ready: dict[Starting, ProcessId] = {}
    with contextlib.ExitStack() as logs:
        said = [logs.enter_context(one.open_log()) for one in starting]
        try:
            while waiting := [one for one in starting if one not in ready]:
                for one in select.select(waiting, [], [], LOOK_S)[0]:
                    ready[one] = one.finish()
                for log in said:
                    _tell_warnings(log, tell)
        except BaseException:
            for one in starting:
                one.stop()
            end(ready.values(), STOPPED_S)
            raise
    return ready


def _tell_warnings(log: BinaryIO, tell: Callable[[str], None]) -> None:
    """Tell the warnings in the whole lines that were added to a log."""
    while line := log.readline():
        if not line.endswith(b"\n"):
            log.seek(-len(line), os.SEEK_CUR)
            return
        if match := _WARNING.match(line.decode(errors="replace")):
            tell(match[1])
