"""What the kernel's tracepoints say, and a tracefs that is missing, closed, old, or left full by somebody who died."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchfs_fuse.errors import UserError
from benchfs_fuse.observe.kernel import KernelEvents, parse
from benchfs_fuse.observe.timeline import KernelTimes

#: As Linux 6.18 writes it.
TRACE = """\
# tracer: nop
#
# entries-in-buffer/entries-written: 8/8   #P:2
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
     dd-42      [001] ..... 11234.567890: fuse_request_send: connection 45 req 10 opcode 15 (FUSE_READ) len 80
a: b [0] x-43      [000] ..... 11234.567891: fuse_request_send: connection 46 req 12 opcode 3 (FUSE_GETATTR) len 56
          python-7       [001] ..... 11234.567999: fuse_request_end: connection 45 req 10 len 4112 error 0
          python-7       [001] ..... 11234.568001: fuse_request_end: connection 45 req 8 len 16 error -2
  <...>-44      [001] d..1. 11234.600000: fuse_request_send: connection 45 req 14 opcode 16 (FUSE_WRITE) len 4176
CPU:1 [LOST 5 EVENTS]
          python-7       [001] ..... 11234.568002: fuse_request_end: connection 46 req 12 len 120 error 0
"""


def test_lines_of_one_connection_become_times() -> None:
    assert parse(TRACE.splitlines(keepends=True), 45) == {
        10: KernelTimes(11_234_567_890_000, 11_234_567_999_000),
        14: KernelTimes(11_234_600_000_000, 0),  # not answered yet; and of 8 nobody saw the beginning
    }
    assert parse(TRACE.splitlines(), 46) == {12: KernelTimes(11_234_567_891_000, 11_234_568_002_000)}
    assert parse(TRACE.splitlines(), 4) == parse([], 45) == {}


class Tracefs:
    """Look like tracefs: whoever makes an instance gets its files."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.instances = path / "instances"
        self.instances.mkdir(parents=True)
        for event in ("fuse_request_send", "fuse_request_end"):
            (path / "events" / "fuse" / event).mkdir(parents=True)
        make = Path.mkdir

        def mkdir(directory: Path) -> None:
            make(directory)
            if directory.parent == self.instances:
                self.fill(directory)

        monkeypatch.setattr(Path, "mkdir", mkdir)

    @staticmethod
    def fill(instance: Path) -> None:
        for event in ("fuse_request_send", "fuse_request_end"):
            os.makedirs(instance / "events" / "fuse" / event)
        os.makedirs(instance / "per_cpu" / "cpu0")
        os.makedirs(instance / "per_cpu" / "cpu1")
        (instance / "per_cpu" / "cpu0" / "stats").write_text("entries: 10\noverrun: 3\ncommit overrun: 9\n")
        (instance / "per_cpu" / "cpu1" / "stats").write_text("entries: 10\noverrun: 4\ncommit overrun: 9\n")
        (instance / "trace").write_text(TRACE)

    def enabled(self, instance: Path) -> set[str]:
        return {
            (instance / "events" / "fuse" / f"fuse_request_{end}" / "enable").read_text() for end in ("send", "end")
        }


@pytest.fixture
def tracefs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracefs:
    return Tracefs(tmp_path / "tracing", monkeypatch)


def test_an_instance_of_its_own_records_one_connection(tracefs: Tracefs) -> None:
    events = KernelEvents(45, tracefs.path)
    events.begin()
    (instance,) = tracefs.instances.iterdir()
    assert instance.name == f"benchfs-{os.getpid()}"
    assert (instance / "trace_clock").read_text() == "mono"
    assert tracefs.enabled(instance) == {"1"}
    for event in ("fuse_request_send", "fuse_request_end"):
        assert (instance / "events" / "fuse" / event / "filter").read_text() == "connection == 45"
    times, lost = events.end()
    assert set(times) == {10, 14} and lost == 7
    assert (instance / "tracing_on").read_text() == "0"
    events.close()
    assert tracefs.enabled(instance) == {"0"}


def test_what_killed_processes_left_is_removed_and_what_others_have_stays(
    tracefs: Tracefs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (f"benchfs-{gone.pid}", f"benchfs-{os.getpid()}", f"benchfs-{os.getppid()}", "perf-1", "benchfs-x"):
        os.makedirs(tracefs.instances / name)
    KernelEvents(45, tracefs.path).begin()
    left = {path.name for path in tracefs.instances.iterdir()}
    assert left == {f"benchfs-{os.getpid()}", f"benchfs-{os.getppid()}", "perf-1"}


def test_no_tracefs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(UserError, match=r"is not mounted, or not for you .*mount -t tracefs nodev /"):
            KernelEvents(45, place).begin()


def test_a_kernel_without_events_of_fuse(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "instances")
    with pytest.raises(UserError, match=r"no tracepoints of FUSE \(Linux 6.11 has\)"):
        KernelEvents(45, tmp_path).begin()
    assert list((tmp_path / "instances").iterdir()) == []


def test_tracefs_is_for_root(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from benchfs_fuse.errors import UserError
from benchfs_fuse.observe.kernel import KernelEvents
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    KernelEvents(45, Path(sys.argv[1])).begin()
except UserError as error:
    print(error)
"""
    os.makedirs(tmp_path / "instances")
    (tmp_path / "instances").chmod(0)
    (tmp_path / "instances").parent.chmod(0o700)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert "is not mounted, or not for you" in done.stdout


def test_an_instance_that_cannot_be_had(tracefs: Tracefs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: Path) -> None:
        raise OSError(12, "Cannot allocate memory", str(directory))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot use .*benchfs-\d+: Cannot allocate memory"):
        KernelEvents(45, tracefs.path).begin()


def test_an_event_that_cannot_be_switched_on_leaves_nothing_on(
    tracefs: Tracefs, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def refuse(path: Path, text: str) -> int:
        if "fuse_request_end" in path.parts and path.name == "filter":
            raise OSError(22, "Invalid argument", str(path))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match=r"cannot use .*filter: Invalid argument"):
        KernelEvents(45, tracefs.path).begin()
    (instance,) = tracefs.instances.iterdir()
    assert tracefs.enabled(instance) == {"0"}


def test_an_instance_that_somebody_took_away(tracefs: Tracefs) -> None:
    events = KernelEvents(45, tracefs.path)
    events.begin()
    (instance,) = tracefs.instances.iterdir()
    instance.rename(instance.parent.parent / "gone")
    with pytest.raises(OSError, match="No such file"):
        events.end()
    events.close()
