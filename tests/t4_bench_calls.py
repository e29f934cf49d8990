"""``benchfs bench calls`` on a real mount: what it measures, what it says, and that nothing of it stays."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cli_help import benchfs, refused
from cluster import running_cluster

from benchfs_fuse import kernel_mounts, processes
from benchfs_fuse.bench import calls
from benchfs_fuse.bench.calls import Report
from benchfs_fuse.errors import UserError
from benchfs_fuse.limits import KIB, MIB

pytest_plugins = ("mounts",)

CALLS = [
    *(("create, close", 0), ("stat", 0), ("fstat", 0), ("open, close", 0), ("rename", 0), ("unlink", 0)),
    *(("mkdir", 0), ("rmdir", 0), ("write", 4 * KIB), ("read", 4 * KIB), ("write", MIB), ("read", MIB)),
]


def floors() -> list[Path]:
    return [mount.mountpoint for mount in kernel_mounts.mounts() if mount.fstype == "fuse.benchfs-floor"]


def test_processor_time_is_counted_when_a_process_rests() -> None:
    """What is shorter than a tick counts, too, and a process that runs is not at rest."""
    worker = "import sys\nfor line in sys.stdin:\n    sum(range(10_000))\n    print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        counted = []
        for _ in range(20):
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            assert processes.wait_rest([process.pid], 60)
            counted.append(processes.cpu_ns(process.pid))
        assert counted == sorted(set(counted))
        process.stdin.close()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        assert not processes.wait_rest([busy.pid], 0.05)
        busy.kill()


def test_every_call_is_timed_on_both_and_nothing_stays(mountpoint: Path) -> None:
    done = benchfs("bench", "calls", mountpoint, "--iterations", 8, "--rounds", 2, "--json")
    assert done.code == 0, done.err
    report = msgspec.json.decode(done.out, type=Report)
    assert [(call.name, call.bytes, call.on) for call in report.calls] == [
        (*call, on) for call in CALLS for on in ("floor", "mount")
    ]
    for call in report.calls:
        assert [len(one) for one in call.samples.rounds] == [1 if call.bytes == MIB else 8] * 2
        assert call.cpu_us > 0, "somebody has served it"
        assert (call.ratio is None) == (call.on == "floor")
    assert list(mountpoint.iterdir()) == []
    assert floors() == []


def test_the_table_shows_both_and_the_ratio(mountpoint: Path) -> None:
    done = benchfs("bench", "calls", mountpoint, "--iterations", 2, "--rounds", 1)
    assert done.code == 0, done.err
    for name, length in CALLS:
        words = f"{name} {length // KIB} KiB" if length else name
        (line,) = [line for line in done.out.splitlines() if line.strip().startswith(f"{words} ")]
        assert len(line.removeprefix(f" {words}").split()) == 9  # seven figures, one of which comes with a range
    assert "times the floor" in done.out


def test_bad_places_are_told(tmp_path: Path, first_mount: Path, mountpoint: Path) -> None:
    assert "is not in a benchfs mount" in refused("bench", "calls", tmp_path)
    assert "a round has 1 to 100000 iterations" in refused("bench", "calls", mountpoint, "--iterations", 0, code=2)
    assert "No such file" in refused("bench", "calls", first_mount / "missing")
    assert floors() == []


def test_a_mount_that_dies_in_the_middle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_cluster() as cluster:
        mount = cluster.mount()
        real = calls._time

        def timed(call: Callable[[int], object], count: int) -> list[int]:
            if len(floors()) == 1 and mount.alive:
                mount.kill()
            return real(call, count)

        monkeypatch.setattr(calls, "_time", timed)
        with pytest.raises(UserError, match="Transport endpoint is not connected"):
            calls.run_calls(mount.mountpoint, iterations=1, rounds=1, attr_timeout_s=1.0, as_json=True)
        assert floors() == []
