"""Do work in one directory, in a process of its own, as told line by line: what hangs or dies there is not us.

The worker makes an empty directory of its own, the workplace, tells its name, and then does what each line (an Order)
asks for, answering with a line for each part (Timed) and one at the end (Done). At the end of its input, or by SIGTERM,
it removes everything that it made. It runs in a session of its own: Ctrl-C reaches whoever gives the orders, and not
the tools in between.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from ..errors import UserError
from .machine import Storage, storage_of
from .work import WORKS, At, Measure, Sizes

#: Seconds for a directory to take a new one, and to tell what it is.
HELLO_TIMEOUT_S = 60.0
#: Seconds to remove what was made: thousands of files on a slow file system.
CLEAN_TIMEOUT_S = 60.0
#: Seconds for a killed process to go. One that does not sits in a call that nothing ends.
_KILLED_S = 1.0
#: Exit code of a worker that removed all that it made.
_CLEAN = 0
_NOT_CLEAN = 4
#: What workplaces are called.
PREFIX = "benchfs-bench-"


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say where to work and how: what all orders have in common."""

    directory: str
    scratch: str
    sizes: Sizes
    drop: bool
    #: Other directories whose dirty pages have to be written before caches are dropped.
    written: tuple[str, ...] = ()


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask for one work, by its name in WORKS."""

    work: str


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say where the worker works, and what holds that."""

    workplace: str
    storage: Storage | None
    trouble: str = ""


class Timed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Tell of one part of a work, as soon as it is measured."""

    measure: Measure


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """End the answer to an order: what was left out, and in a sentence what broke the work off."""

    left_out: tuple[str, ...]
    trouble: str = ""


# ── the one who works ────────────────────────────────────────────────────────────────────────────────────────────────


class _BrokenOff(BaseException):
    """SIGTERM came."""


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise _BrokenOff


def _say(message: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def _do(order: Order, task: Task, workplace: Path) -> Done:
    place = workplace / "work"
    written = [Path(one) for one in task.written]
    at = At(place, Path(task.scratch), task.sizes, drop=task.drop, written=written)
    trouble = ""
    try:
        place.mkdir()
        for measure in WORKS[order.work](at):
            _say(Timed(measure))
        shutil.rmtree(place)
    except BrokenPipeError:
        raise
    except UserError as error:
        trouble = str(error)
    except OSError as error:
        trouble = f"{error.filename or place}: {error.strerror}"
    return Done(tuple(at.left_out), trouble)


def _removed(workplace: Path) -> bool:
    """Remove everything; tell whether it has gone. What cannot be looked at has not."""
    shutil.rmtree(workplace, ignore_errors=True)
    try:
        workplace.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def main() -> int:
    """Be the worker: the first line is the Task, the others are Orders."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, _leave)
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    directory = Path(task.directory)
    try:
        workplace = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
    except OSError as error:
        _say(Hello("", None, f"{directory}: cannot make a directory there: {error.strerror}"))
        return _CLEAN
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _say(Hello(str(workplace), storage_of(directory)))
        for line in sys.stdin.buffer:
            _say(_do(msgspec.json.decode(line, type=Order), task, workplace))
    except (BrokenPipeError, _BrokenOff):
        pass  # nobody waits for the answer any more
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        left = not _removed(workplace)
        # Whoever gave the orders removes it too, unless he was killed.
        shutil.rmtree(task.scratch, ignore_errors=True)
    return _NOT_CLEAN if left else _CLEAN


# ── the one who gives the orders ─────────────────────────────────────────────────────────────────────────────────────


class Hung(UserError):
    """Nothing was heard of a worker for too long."""


class Worker:
    """Be a worker as others see it. Every wait ends: with the answer, with its death, or at a deadline."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._said = b""
        self.workplace = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchfs_fuse.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )
        self._send(task)

    def hello(self) -> Storage:
        """Return what holds the directory. UserError: it cannot be used, or does not answer."""
        try:
            hello = msgspec.json.decode(self._line(HELLO_TIMEOUT_S), type=Hello)
        except TimeoutError:
            raise UserError(f"{self._task.directory} did not take a new directory in {HELLO_TIMEOUT_S:.0f} s") from None
        self.workplace = hello.workplace
        if hello.storage is None:
            raise UserError(hello.trouble)
        return hello.storage

    def work(self, order: Order, timeout_s: float) -> Generator[Measure, None, tuple[str, ...]]:
        """Have one work done: yield its parts, return sentences about what was left out.

        UserError: it failed, or the worker died. Hung: nothing was heard of it for ``timeout_s``.
        """
        self._send(order)
        while True:
            try:
                said = msgspec.json.decode(self._line(timeout_s), type=Timed | Done)
            except TimeoutError:
                raise Hung(f"nothing was done within {timeout_s:g} s: it hangs, or is too slow") from None
            if isinstance(said, Done):
                if said.trouble:
                    raise UserError(said.trouble)
                return said.left_out
            yield said.measure

    def end(self, timeout_s: float = CLEAN_TIMEOUT_S, *, at_once: bool = False) -> str:
        """Have everything removed, and the worker end; return "" or what is left behind, in a sentence.

        ``at_once``: break off what it does.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        if at_once:
            self._signal(signal.SIGTERM)  # not both: one of them begins the cleaning, another would break it off
        else:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        if process.returncode is None:
            process.returncode = -signal.SIGKILL  # it goes when its file system lets it: nobody waits for that
        if process.returncode == _CLEAN or not self.workplace:
            return ""
        return f"{self.workplace} could not be removed"

    def _signal(self, number: signal.Signals) -> None:
        """Reach the worker and the tools that it runs: they are one process group, which is named after the worker."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _send(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of is seen by who waits for the answer
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()

    def _line(self, timeout_s: float) -> bytes:
        """Wait for a line. TimeoutError; UserError if the worker died."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        fd = self._process.stdout.fileno()
        while b"\n" not in self._said:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            more = os.read(fd, 1 << 20)
            if not more:
                raise UserError(f"the process that worked there {self._how_it_ended()}")
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_KILLED_S)
        except subprocess.TimeoutExpired:
            return "broke off"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


if __name__ == "__main__":
    sys.exit(main())
