"""Run ``benchfs`` as people do, as a process, and hold it to its word: one sentence when something is wrong."""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self
from urllib.parse import quote

import msgspec

from benchfs_fuse import control, kernel_mounts
from benchfs_fuse.commands.local import LocalCluster
from benchfs_fuse.processes import ProcessId, end, identify
from benchfs_fuse.runtime import runtime_dir

#: Seconds for any command on a loaded machine; nothing waits this long unless it hangs.
PATIENCE_S = 90.0

#: Modified, moved here, created (inotify(7)).
IN_CHANGES = 0x2 | 0x80 | 0x100
#: What a child prints when it holds what the test wants to be held.
HELD = "held\n"


class Done(NamedTuple):
    """Hold how a command ended."""

    code: int
    out: str
    err: str


def command_line(*words: object) -> list[str]:
    """Return the words that run ``benchfs``."""
    return [sys.executable, "-m", "benchfs_fuse.cli", *map(str, words)]


def benchfs(*words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Run a command to its end. Whatever it is, it leaves no traceback."""
    done = subprocess.run(
        command_line(*words),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def succeeds(*words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Run a command that works."""
    done = benchfs(*words, env=env, cwd=cwd)
    assert done.code == 0, done
    return done


def sentence_of(done: Done, code: int = 1, program: str = "benchfs") -> str:
    """Check that a command failed with ``code`` and exactly one sentence; return it."""
    assert done.code == code, done
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert len(lines) == 1, done.err
    assert lines[0].startswith(program) and ": " in lines[0], lines[0]
    return lines[0].partition(": ")[2]


def refused(*words: object, code: int = 1, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command that is refused; return its sentence."""
    done = benchfs(*words, env=env, cwd=cwd)
    assert done.out == "", done.out
    return sentence_of(done, code)


class Running:
    """Be a command or any other child that is under way. A context manager: it does not outlive the block."""

    def __init__(self, *words: str, env: Mapping[str, str] | None = None) -> None:
        self.popen = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # else a line could wait in a buffer, where select sees nothing
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()
        # After a failure it may sit in a mount that the test takes away only later.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(PATIENCE_S if error is None else 1.0)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self.popen.pid

    def line(self, stream: IO[bytes] | None = None) -> str:
        """Wait for the next line of its output (by default stdout)."""
        source = stream or self.popen.stdout
        assert source is not None
        assert select.select([source], [], [], PATIENCE_S)[0], "it said nothing"
        return source.readline().decode()

    def wait_error(self, words: str) -> str:
        """Wait for a line with ``words`` on stderr."""
        assert self.popen.stderr is not None
        while line := self.line(self.popen.stderr):
            if words in line:
                return line
        raise AssertionError(f"it ended without saying {words!r}")

    def wait(self) -> Done:
        """Wait for the end; return it with the rest of its output."""
        out, err = (said.decode() for said in self.popen.communicate(timeout=PATIENCE_S))
        assert "Traceback" not in err, err
        return Done(self.popen.returncode, out, err)


def running_benchfs(*words: object, env: Mapping[str, str] | None = None) -> Running:
    """Begin a command."""
    return Running(*command_line(*words), env=env)


def holding(script: str, *words: object, before: Sequence[str] = ()) -> Running:
    """Begin a Python program; return when it holds what it is to hold. Then it waits to be killed. ``before``: nsenter.

    It may call ``step()``: there it holds something too, and goes on when ``go`` is called.
    """
    program = (
        "import mmap, os, signal, sys\n"
        "def held():\n    print('held', flush=True)\n"
        "def step():\n    held()\n    sys.stdin.readline()\n"
        f"{script}\nheld()\nsignal.pause()\n"
    )
    child = Running(*before, sys.executable, "-c", program, *map(str, words))
    try:
        _wait_held(child)
    except BaseException:
        child.popen.kill()
        child.popen.communicate()
        raise
    return child


def go(child: Running) -> None:
    """Let a program that is in ``step`` go on; return when it holds the next thing."""
    tell(child)
    _wait_held(child)


def tell(child: Running) -> None:
    """Send a line."""
    assert child.popen.stdin is not None
    child.popen.stdin.write(b"\n")


def _wait_held(child: Running) -> None:
    line = child.line()
    assert line == HELD, f"{line!r} {child.popen.stderr and child.popen.stderr.read().decode()}"


def wait_until(condition: Callable[[], bool], directory: Path) -> None:
    """Wait until something is so in a directory: looked at after each change there (inotify(7))."""
    deadline = time.monotonic() + PATIENCE_S
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(fd, os.fsencode(directory), IN_CHANGES) >= 0, os.strerror(ctypes.get_errno())
        while not condition():
            assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], "it did not happen"
            os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def processes_below(directory: Path) -> list[ProcessId]:
    """Return the daemons and mounts that run on behalf of a directory: its path is among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        modules = (b"benchfs_fuse.daemon", b"benchfs_fuse.mount")
        if any(module in arguments for module in modules) and any(
            os.fsencode(directory) in argument for argument in arguments
        ):
            process = identify(int(entry.name))
            if process is not None:
                found.append(process)
    return found


def mounts_below(directory: Path) -> list[kernel_mounts.KernelMount]:
    """Return what is mounted below a directory."""
    return [mount for mount in kernel_mounts.mounts() if directory in mount.mountpoint.parents]


def records_below(directory: Path) -> list[control.MountRecord]:
    """Return the records of mounts below a directory."""
    return [record for record in control.records() if directory in Path(record.mountpoint).parents]


def daemons_of(data_dir: Path) -> list[ProcessId]:
    """Return the daemons of a local cluster that is up."""
    cluster = msgspec.json.decode((data_dir / "cluster.json").read_bytes(), type=LocalCluster)
    return [process for process in cluster.daemons if process is not None]


@contextlib.contextmanager
def clean_directory(directory: Path) -> Iterator[Path]:
    """Take away, at the end, every mount and process below a directory; a test that left some has failed."""
    try:
        yield directory
    finally:
        left = take_away(directory)
    assert left == [], f"left running: {left}"


def take_away(directory: Path) -> list[str]:
    """Free, unmount and end everything below a directory; return what there was."""
    left = []
    for mount in reversed(mounts_below(directory)):
        left.append(str(mount.mountpoint))
        if kernel_mounts.is_benchfs(mount):
            kernel_mounts.abort(mount)
        with contextlib.suppress(OSError):
            kernel_mounts.detach(mount.mountpoint)
    processes = processes_below(directory)
    left += [f"process {process.pid}" for process in processes]
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)  # what is stopped could not be asked
    end(processes, 5.0)
    for record in records_below(directory):
        control.remove_record(Path(record.mountpoint))
    for file in runtime_dir().glob(quote(str(directory), safe="") + "[.%]*"):
        file.unlink()  # logs and links
    return left


def seconds_since(start: float) -> float:
    """Return the seconds since a reading of time.monotonic."""
    return time.monotonic() - start
