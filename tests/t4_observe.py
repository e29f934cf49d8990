"""``benchfs trace`` and ``benchfs top`` on real mounts: sums, planted delays, whatever goes wrong, nothing left on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_help import PATIENCE_S, benchfs, command_line, refused, running_benchfs, sentence_of, succeeds
from cluster import Cluster, Mount, Process, running_cluster

from benchfs_fuse import control, kernel_mounts
from benchfs_fuse.observe import timeline
from benchfs_fuse.observe.kernel import TRACEFS

EVENTS = TRACEFS / "events" / "fuse" / "fuse_request_send"
PYTHON = sys.executable


@pytest.fixture(scope="module", autouse=True)
def tracefs() -> Iterator[None]:
    """Mount tracefs where it is missing and we may; take it away again."""
    if EVENTS.is_dir() or os.geteuid() != 0:
        yield
        return
    mounted = subprocess.run(["mount", "-t", "tracefs", "nodev", TRACEFS], check=False, capture_output=True)
    yield
    if mounted.returncode == 0:
        subprocess.run(["umount", TRACEFS], check=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def mount(cluster: Cluster) -> Iterator[Mount]:
    """Mount without caches in the way; at the end nobody records, and the kernel traces nothing of ours."""
    mount = cluster.mount("--attr-timeout", "0")
    yield mount
    if mount.alive:
        assert nobody_records(mount.mountpoint)
    assert instances() == []
    mount.stop()


def instances() -> list[Path]:
    """Return what is left of our tracing in the kernel."""
    return sorted((TRACEFS / "instances").glob("benchfs-*")) if EVENTS.is_dir() else []


def kernel_tells() -> bool:
    return EVENTS.is_dir()


def record_of(mountpoint: Path) -> control.MountRecord:
    record = control.read_record(mountpoint)
    assert record is not None
    return record


def nobody_records(mountpoint: Path) -> bool:
    """Tell whether neither the mount nor a daemon records: a recording of no time finds nothing from before."""
    parts = [
        report.trace
        for report in control.ask(
            record_of(mountpoint), control.Question("trace", seconds=0.0), PATIENCE_S, lambda: None
        )
        if report.trace is not None
    ]
    assert parts[0].recording, parts[0].trouble
    # Daemons that still recorded would have told their position, and the spans of this client before it.
    return all(not part.trouble for part in parts)


def traced(mountpoint: Path, out: Path, *words: object, code: int = 0) -> dict[str, Any]:
    """Run ``benchfs trace --json``; return what it said, after checking that everything adds up."""
    done = benchfs("trace", mountpoint, "--out", out, "--json", *words)
    assert done.code == code, done
    said: dict[str, Any] = json.loads(done.out)
    adds_up(said)
    assert json.loads(out.read_text())["traceEvents"]
    return said


def adds_up(said: dict[str, Any]) -> None:
    totals = {row["operation"]: row for row in said["stages"] if not row["stage"]}
    for name, total in totals.items():
        stages = [row for row in said["stages"] if row["operation"] == name and row["stage"]]
        assert sum(row["total_us"] for row in stages) == pytest.approx(total["total_us"], abs=0.01)
        assert sum(row["share"] for row in stages) == pytest.approx(1.0)
        assert all(row["count"] <= total["count"] for row in stages)
    for one in said["slowest"]:
        assert sum(part["us"] for part in one["parts"]) == pytest.approx(one["total_us"], abs=0.01)
    assert said["operations"] == sum(row["count"] for row in totals.values())


def script(text: str, *arguments: object) -> list[object]:
    """Return the words of a command that runs Python."""
    return ["--", PYTHON, "-c", text, *arguments]


def row(said: dict[str, Any], operation: str, stage: str = "") -> dict[str, Any]:
    (found,) = (one for one in said["stages"] if (one["operation"], one["stage"]) == (operation, stage))
    assert isinstance(found, dict)
    return found


# ── what it tells ────────────────────────────────────────────────────────────────────────────────────────────────────

#: Reads one block again and again, past all caches, and measures each read itself.
READER = """
import json, mmap, os, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
block = mmap.mmap(-1, 4096)
spent = []
for _ in range(int(sys.argv[2])):
    begun = time.perf_counter_ns()
    assert os.preadv(fd, [block], 0) == 4096
    spent.append(time.perf_counter_ns() - begun)
with open(sys.argv[3], "w") as file:
    json.dump([sum(spent) / 1000, min(spent) / 1000], file)
"""


def test_stages_add_up_to_what_the_caller_measures(mount: Mount, tmp_path: Path) -> None:
    (mount.mountpoint / "f").write_bytes(b"x" * 4096)
    said = traced(
        mount.mountpoint, tmp_path / "t.json", *script(READER, mount.mountpoint / "f", 300, tmp_path / "spent")
    )
    total, (spent_us, fastest_us) = row(said, "read"), json.loads((tmp_path / "spent").read_text())
    assert total["count"] == 300
    assert 0 < total["total_us"] <= spent_us
    stages = {one["stage"] for one in said["stages"] if one["operation"] == "read"}
    assert {timeline.SEND, timeline.WIRE_OUT, timeline.DAEMON, timeline.REPLY, timeline.WIRE_BACK} <= stages
    assert timeline.UNRECORDED not in stages
    assert said["stalls"] == [] and set(said["clock_offsets_ns"].values()) == {0}
    if kernel_tells():
        assert said["whole"] == said["operations"] and said["complaints"] == []
        assert {timeline.KERNEL_QUEUE, timeline.ANSWER} <= stages
        # What is left is entering and leaving the kernel, and the caller's wake-up: little where nobody is in the way.
        drawn = [one for one in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if one["name"] == "read"]
        assert 0.5 * fastest_us <= min(one["dur"] for one in drawn) <= fastest_us
    else:
        assert said["whole"] == 0 and "the kernel's part is not seen" in said["complaints"][0]


def test_metadata_has_its_own_stages(mount: Mount, tmp_path: Path) -> None:
    work = "import os, sys\nfor n in range(20): os.mkdir(f'{sys.argv[1]}/dir-{n}')\n"
    said = traced(mount.mountpoint, tmp_path / "t.json", *script(work, mount.mountpoint))
    assert row(said, "mkdir")["count"] == row(said, "mkdir", "metadata store")["count"] == 20
    assert row(said, "mkdir", "other daemons")["count"] > 0


def test_the_companion_librarys_requests_are_seen_whole(mount: Mount, tmp_path: Path) -> None:
    work = """
import fcntl, os, sys
with open(sys.argv[1], "wb") as file:
    for n in range(20):
        os.posix_fallocate(file.fileno(), 0, 4096 * (n + 1))
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.flock(file, fcntl.LOCK_UN)
"""
    said = traced(mount.mountpoint, tmp_path / "t.json", *script(work, mount.mountpoint / "g"))
    assert row(said, "fallocate")["count"] == 20
    assert said["whole"] == (said["operations"] if kernel_tells() else 0)


def test_a_table_for_people(mount: Mount, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    work = "import os, sys\nfor n in range(50): os.stat(sys.argv[1])\nprint('said by the command')\n"
    done = succeeds("trace", mount.mountpoint, "--out", out, "--slowest", 2, *script(work, mount.mountpoint))
    lines = done.out.splitlines()
    assert "said by the command" in lines
    head = next(line for line in lines if line.split()[:2] == ["operation", "stage"])
    assert head.split() == ["operation", "stage", "count", "p50", "p99", "total", "share"]
    assert any(line.split()[:2] == ["getattr", "50"] for line in lines), done.out
    slow = lines[lines.index("slowest operations:") + 1 :][:2]
    assert all(" getattr: " in line or " lookup: " in line for line in slow), done.out
    assert lines[-1] == f"{out}: open it in https://ui.perfetto.dev"
    assert "never seen here: callers entering and leaving the kernel, and waking up" in lines
    assert any("the kernel's part is not seen" in line for line in lines) == (not kernel_tells())


def test_what_a_failed_operation_says(mount: Mount, tmp_path: Path) -> None:
    work = "import os, sys\nfor n in range(5):\n  try: os.rmdir(sys.argv[1] + '/none')\n  except OSError: pass\n"
    said = traced(mount.mountpoint, tmp_path / "t.json", "--slowest", 100, *script(work, mount.mountpoint))
    assert [one["errno"] for one in said["slowest"] if one["operation"] == "lookup"] == [2] * 5


def test_for_some_seconds_with_somebody_else_at_work(mount: Mount, tmp_path: Path) -> None:
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            os.stat(mount.mountpoint)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        begun = time.monotonic()
        said = traced(mount.mountpoint, tmp_path / "t.json", "--seconds", 0.5)
        assert time.monotonic() - begun >= 0.5
    finally:
        ended.set()
        worker.join()
    assert row(said, "getattr")["count"] > 10


# ── delays that were planted ─────────────────────────────────────────────────────────────────────────────────────────

#: Stops a process for a while, then lets it go on, as often as it is told; does one thing in the mount meanwhile.
STOPPER = """
import os, signal, sys, threading, time
pid, path, times, seconds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
for _ in range(times):
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(seconds, os.kill, (pid, signal.SIGCONT)).start()
    os.stat(path)
    time.sleep(0.002)
for _ in range(20):
    os.stat(path)
"""


def daemon_of(cluster: Cluster, mount: Mount, name: str) -> tuple[int, Process]:
    """Make a file; return the number of the daemon that knows its attributes, and its process."""
    (mount.mountpoint / name).touch()
    number = int(json.loads(succeeds("layout", mount.mountpoint / name, "--json").out)["daemon"])
    return number, process_of(cluster, mount, number)


def process_of(cluster: Cluster, mount: Mount, number: int) -> Process:
    """Return the process of a daemon: they take their numbers in any order."""
    status = json.loads(succeeds("status", mount.mountpoint, "--json").out)
    (pid,) = (one["status"]["pid"] for one in status["daemons"] if one["daemon_id"] == number)
    (process,) = (one for one in cluster.daemons if one.pid == pid)
    return process


def test_a_daemon_that_stands_still_is_where_the_time_went(cluster: Cluster, mount: Mount, tmp_path: Path) -> None:
    number, daemon = daemon_of(cluster, mount, "f")
    words = script(STOPPER, daemon.pid, mount.mountpoint / "f", 1, 0.4)
    said = traced(mount.mountpoint, tmp_path / "t.json", "--slowest", 1, *words)
    (slowest,) = said["slowest"]
    worst = max(slowest["parts"], key=lambda part: part["us"])
    assert slowest["total_us"] > 300_000
    assert worst["daemon"] == number and worst["us"] > 0.9 * slowest["total_us"]
    # The daemon wakes up with the request at hand: it is the way to it that took so long.
    assert worst["stage"] in (timeline.WIRE_OUT, timeline.DAEMON_QUEUE, timeline.DAEMON), slowest
    assert said["stalls"] == [], "once is no stall"


def test_a_mount_that_stands_still_is_told_from_its_daemons(mount: Mount, tmp_path: Path) -> None:
    (mount.mountpoint / "f").touch()
    words = script(STOPPER, mount.pid, mount.mountpoint / "f", 1, 0.4)
    said = traced(mount.mountpoint, tmp_path / "t.json", "--slowest", 1, *words)
    if kernel_tells():
        (slowest,) = said["slowest"]
        worst = max(slowest["parts"], key=lambda part: part["us"])
        assert worst["stage"] == timeline.KERNEL_QUEUE and worst["us"] > 300_000


def test_equal_waits_are_called_a_stall(cluster: Cluster, mount: Mount, tmp_path: Path) -> None:
    number, daemon = daemon_of(cluster, mount, "f")
    # Long ones: what counts as equal is a part of the length, and a busy machine adds the same to long and short ones.
    words = script(STOPPER, daemon.pid, mount.mountpoint / "f", 10, 0.25)
    said = traced(mount.mountpoint, tmp_path / "t.json", *words)
    stall = said["stalls"][0]
    assert stall["daemon"] == number and stall["waits"] >= timeline.STALL_COUNT
    assert stall["length_ns"] == pytest.approx(250e6, rel=0.1)
    done = succeeds("trace", mount.mountpoint, "--out", tmp_path / "t.json", *words)
    assert "STALL: " in done.out and "that looks like a timer, not like work" in done.out


def test_a_silent_daemon_is_told_and_ends_its_recording_when_it_is_back(
    cluster: Cluster, mount: Mount, tmp_path: Path
) -> None:
    number, _ = daemon_of(cluster, mount, "f")
    silent = process_of(cluster, mount, 1 - number)
    silent.signal(signal.SIGSTOP)
    try:
        said = traced(mount.mountpoint, tmp_path / "t.json", "--", "stat", mount.mountpoint / "f")
    finally:
        silent.signal(signal.SIGCONT)
    assert said["complaints"][-1] == f"daemon {1 - number} is not seen: did not answer in 2 s"
    assert row(said, "getattr")["count"] > 0
    assert nobody_records(mount.mountpoint)


# ── the kernel's part ────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_tracefs_it_says_so_and_goes_on(mount: Mount, tmp_path: Path) -> None:
    """Hide the tracefs from the command, in a mount namespace of its own."""
    if os.geteuid() != 0:
        pytest.fail("needs root")
    inner = command_line(
        "trace", mount.mountpoint, "--out", tmp_path / "t.json", "--json", "--", "stat", mount.mountpoint
    )
    hide = f'mount -t tmpfs none {TRACEFS} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", hide, "sh", *inner],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    said = json.loads(done.stdout)
    adds_up(said)
    assert said["whole"] == 0 < said["operations"]
    assert said["complaints"] == [
        f"the kernel's part is not seen: {TRACEFS} is not mounted, or not for you "
        f"(as root: mount -t tracefs nodev {TRACEFS})"
    ]


def test_what_a_killed_trace_leaves_is_removed_by_the_next(mount: Mount, tmp_path: Path) -> None:
    with running_benchfs(
        "trace",
        mount.mountpoint,
        "--out",
        tmp_path / "t.json",
        *script("import time; print('on', flush=True); time.sleep(100)"),
    ) as child:
        assert child.line() == "on\n"
        assert len(instances()) == (1 if kernel_tells() else 0)
        os.killpg(child.pid, signal.SIGKILL)
        child.popen.wait(PATIENCE_S)
    said = traced(mount.mountpoint, tmp_path / "t.json", "--", "stat", mount.mountpoint)
    assert said["operations"] > 0 and instances() == []


# ── how it ends ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("", 0)])
def test_the_exit_code_is_the_commands(mount: Mount, tmp_path: Path, ending: str, code: int) -> None:
    work = f"import os, sys\nos.stat(sys.argv[1])\n{ending}"
    said = traced(mount.mountpoint, tmp_path / "t.json", *script(work, mount.mountpoint), code=code)
    assert said["operations"] > 0


def test_nothing_recorded_has_its_own_code(mount: Mount, tmp_path: Path) -> None:
    said = traced(mount.mountpoint, tmp_path / "t.json", "--", "true", code=3)
    assert said["operations"] == 0 and said["stages"] == []
    done = benchfs("trace", mount.mountpoint, "--out", tmp_path / "t.json", "--", "true")
    assert done.code == 3 and "no operation reached the mount" in done.out


def test_ctrl_c_ends_early_and_reports(mount: Mount, tmp_path: Path) -> None:
    work = "import os, sys, time\nos.stat(sys.argv[1])\nprint('on', flush=True)\ntime.sleep(100)"
    with running_benchfs(
        "trace", mount.mountpoint, "--out", tmp_path / "t.json", *script(work, mount.mountpoint)
    ) as child:
        assert child.line() == "on\n"
        os.killpg(child.pid, signal.SIGINT)  # as the terminal does
        out, err = (said.decode() for said in child.popen.communicate(timeout=PATIENCE_S))
        assert child.popen.returncode == 130, err
    assert "ended early" in err and "getattr" in out
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_ctrl_c_while_seconds_pass_is_no_failure(mount: Mount, tmp_path: Path) -> None:
    with running_benchfs("trace", mount.mountpoint, "--out", tmp_path / "t.json", "--seconds", 100, "--json") as child:
        child.wait_error("recording for 100 s")
        os.stat(mount.mountpoint)
        child.popen.send_signal(signal.SIGINT)
        done = child.wait()
    assert done.code == 0 and "ended early" in done.err
    assert json.loads(done.out)["operations"] > 0


def test_a_second_trace_is_refused(mount: Mount, tmp_path: Path) -> None:
    with running_benchfs(
        "trace",
        mount.mountpoint,
        "--out",
        tmp_path / "t.json",
        *script("import time; print('on', flush=True); time.sleep(100)"),
    ) as child:
        assert child.line() == "on\n"
        other = tmp_path / "other.json"
        assert "somebody else is tracing this mount" in refused(
            "trace", mount.mountpoint, "--out", other, "--seconds", 1
        )
        assert not other.exists()
        assert len(instances()) == (1 if kernel_tells() else 0)
        os.killpg(child.pid, signal.SIGINT)
        child.popen.communicate(timeout=PATIENCE_S)


@pytest.mark.slow
def test_a_command_that_takes_longer_than_the_recording(mount: Mount, tmp_path: Path) -> None:
    work = "import os, sys, time\nos.stat(sys.argv[1])\ntime.sleep(1.5)\nos.mkdir(sys.argv[1] + '/late')"
    said = traced(mount.mountpoint, tmp_path / "t.json", "--seconds", 0.5, *script(work, mount.mountpoint))
    names = {one["operation"] for one in said["stages"]}
    assert "getattr" in names and "mkdir" not in names
    assert (mount.mountpoint / "late").is_dir(), "the command was left to its end"


def test_sigterm_ends_the_command_and_the_recording(mount: Mount, tmp_path: Path) -> None:
    work = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(100)"
    with running_benchfs("trace", mount.mountpoint, "--out", tmp_path / "t.json", *script(work)) as child:
        pid = int(child.line())
        child.popen.terminate()
        assert child.wait().code == 128 + signal.SIGTERM
    assert not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "t.json").exists()


def test_a_mount_that_dies_in_the_middle(cluster: Cluster, tmp_path: Path) -> None:
    mount = cluster.mount()
    try:
        work = "import os, signal, sys\nos.stat(sys.argv[1])\nos.kill(int(sys.argv[2]), signal.SIGKILL)"
        sentence = refused(
            "trace", mount.mountpoint, "--out", tmp_path / "t.json", *script(work, mount.mountpoint, mount.pid)
        )
        assert f"the process {mount.pid} behind {mount.mountpoint}" in sentence
        mount.wait()
        sentence = refused("trace", mount.mountpoint, "--out", tmp_path / "t.json", "--", "true")
        assert "its process has died; clean up with: benchfs umount" in sentence
        assert "its process has died" in refused("top", mount.mountpoint, "--count", 1)
    finally:
        mount.stop()
    assert instances() == [] and not (tmp_path / "t.json").exists()


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_it_cannot_write(mount: Mount, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none" / "t.json"):
        assert f"cannot write {place}: " in refused("trace", mount.mountpoint, "--out", place, "--", "true")
    done = benchfs("trace", mount.mountpoint, "--out", "/dev/full", "--", "stat", mount.mountpoint)
    assert sentence_of(done) == "cannot write /dev/full: No space left on device"
    assert "getattr" in done.out, "what was recorded is told all the same"


def test_a_command_that_cannot_be_run(mount: Mount, tmp_path: Path) -> None:
    for command, why in (("no-such-command", "No such file or directory"), (str(tmp_path), "Permission denied")):
        sentence = refused("trace", mount.mountpoint, "--out", tmp_path / "t.json", "--", command)
        assert sentence == f"cannot run {command}: {why}"
        assert not (tmp_path / "t.json").exists()


def test_an_older_file_is_replaced_only_when_there_is_a_newer_one(mount: Mount, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    out.write_text("older")
    refused("trace", mount.mountpoint, "--out", out, "--", "no-such-command")
    assert out.read_text() == "older"
    traced(mount.mountpoint, out, "--", "stat", mount.mountpoint)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--out"],
        ["--out", "f", "--seconds", "-1"],
        ["--out", "f", "--seconds", "nan"],
        ["--out", "f", "--seconds", "soon"],
        ["--out", "f", "--slowest", "-1"],
        ["--out", "f", "--"],
        ["--out", "f", "stat", "x"],
    ],
)
def test_wrong_use(tmp_path: Path, words: list[str]) -> None:
    done = benchfs("trace", tmp_path, *words, cwd=tmp_path)
    assert done.code == 2 and "--help" in done.err and done.out == ""
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_mount(tmp_path: Path) -> None:
    assert f"{tmp_path} is not mounted" in refused("trace", tmp_path, "--out", tmp_path / "t.json", "--", "true")
    assert f"{tmp_path} is not mounted" in refused("top", tmp_path, "--count", 1)
    assert "is a mount of type" in refused("top", "/proc", "--count", 1)
    assert list(tmp_path.iterdir()) == []


# ── top ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def looks(*words: object) -> list[dict[str, Any]]:
    done = succeeds("top", *words, "--json")
    return [json.loads(line) for line in done.out.splitlines()]


def test_top_counts_what_is_done(mount: Mount) -> None:
    path = mount.mountpoint / "f"
    path.write_bytes(b"x" * 4096)
    with running_benchfs("top", mount.mountpoint, "--count", 3, "--interval", 0.4, "--json") as child:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            said = [json.loads(child.line())]  # it has begun
            reads = 0
            with contextlib.closing(_block()) as block:
                while reads < 200:
                    reads += bool(os.preadv(fd, [block], 0))
            said += [json.loads(child.line()) for _ in range(2)]
        finally:
            os.close(fd)
        assert child.wait().code == 0
    read = sum(one["operations"].get("read", {"per_s": 0.0})["per_s"] * one["seconds"] for one in said)
    served = sum(
        daemon["requests"].get("ReadChunk", {"per_s": 0.0})["per_s"] * one["seconds"]
        for one in said
        for daemon in one["daemons"]
    )
    got = sum(one["read_bytes_per_s"] * one["seconds"] for one in said)
    assert round(read) == reads == round(served) and round(got) == reads * 4096
    busiest = max(
        (one["operations"]["read"] for one in said if "read" in one["operations"]), key=lambda row: row["per_s"]
    )
    assert 0 < busiest["p50_us"] <= busiest["p99_us"] <= busiest["longest_us"] and busiest["busy"] > 0
    assert [[daemon["daemon"] for daemon in one["daemons"]] for one in said] == [[0, 1]] * 3
    for one in said:
        for daemon in one["daemons"]:
            assert daemon["chunk_files_found_open"] == (1.0 if "ReadChunk" in daemon["requests"] else None)
            assert daemon["counters"]["files_open"] >= ("ReadChunk" in daemon["requests"])


def test_top_tells_what_was_answered_from_memory(mount: Mount) -> None:
    path = mount.mountpoint / "f"
    path.touch()
    os.setxattr(path, "user.some", b"so that others have to be asked for, once")
    with running_benchfs("top", mount.mountpoint, "--count", 2, "--interval", 0.5, "--json") as child:
        assert json.loads(child.line())["rare_attributes_from_memory"] is None
        for _ in range(4):
            with pytest.raises(OSError, match="No data available"):
                os.getxattr(path, "security.capability")
        said = json.loads(child.line())
        assert child.wait().code == 0
    assert said["rare_attributes_from_memory"] == 3 / 4
    assert round(said["operations"]["getxattr"]["per_s"] * said["seconds"]) == 4


@pytest.mark.slow
def test_top_tells_what_hangs(cluster: Cluster, mount: Mount) -> None:
    """What waits for a daemon that stands still, at the mount and at the daemon that needs the other one for it."""

    def depths() -> tuple[int, list[int]]:
        (said,) = looks(mount.mountpoint, "--count", 1, "--interval", 0.1)
        return said["requests_in_flight"], [one["counters"]["requests_in_flight"] for one in said["daemons"]]

    def make() -> None:
        for number in range(20):  # most of them concern both daemons
            (mount.mountpoint / f"hanging-{number}").mkdir()

    idle = depths()
    stopped = process_of(cluster, mount, 1)
    stopped.signal(signal.SIGSTOP)
    maker = threading.Thread(target=make)
    try:
        maker.start()
        deadline = time.monotonic() + PATIENCE_S
        while depths() != (1, [idle[1][0] + 1]):
            assert time.monotonic() < deadline
    finally:
        stopped.signal(signal.SIGCONT)
        maker.join()
    assert depths() == idle == (0, [idle[1][0]] * 2)


def _block() -> Any:
    import mmap

    return mmap.mmap(-1, 4096)


def test_top_for_people_and_an_idle_mount(mount: Mount) -> None:
    done = succeeds("top", mount.mountpoint, "--count", 1, "--interval", 0.2)
    assert str(mount.mountpoint) in done.out and "daemon 0" in done.out and "daemon 1" in done.out
    (said,) = looks(mount.mountpoint, "--count", 1, "--interval", 0.2)
    assert said["operations"] == {} and said["read_bytes_per_s"] == 0


@pytest.mark.slow
def test_top_with_a_daemon_that_is_silent_and_comes_back(cluster: Cluster, mount: Mount) -> None:
    for number in range(50):
        (mount.mountpoint / f"before-{number}").touch()
    stopped = process_of(cluster, mount, 0)
    stopped.signal(signal.SIGSTOP)
    try:
        with running_benchfs("top", mount.mountpoint, "--count", 2, "--interval", 0.3, "--json") as child:
            first = json.loads(child.line())
            stopped.signal(signal.SIGCONT)
            second = json.loads(child.line())
            assert child.wait().code == 0
    finally:
        stopped.signal(signal.SIGCONT)
    assert [daemon["daemon"] for daemon in first["daemons"]] == [1]
    assert [daemon["daemon"] for daemon in second["daemons"]] == [0, 1]
    # What it counted before is nothing that happened since the last look.
    assert sum(one["per_s"] for one in second["daemons"][0]["requests"].values()) * second["seconds"] < 50


def test_top_with_a_daemon_that_was_started_anew(tmp_path: Path) -> None:
    with running_cluster() as cluster:
        mount = cluster.mount()
        with running_benchfs("top", mount.mountpoint, "--count", 3, "--interval", 1, "--json") as child:
            child.line()
            cluster.daemons[1].stop()
            cluster.restart_daemon(1)
            said = [json.loads(child.line()) for _ in range(2)]
            assert child.wait().code == 0
        rates = [one["per_s"] for look in said for daemon in look["daemons"] for one in daemon["requests"].values()]
        assert rates and min(rates) > 0
        assert all(daemon["read_bytes_per_s"] >= 0 for look in said for daemon in look["daemons"])


def test_top_ends_with_ctrl_c(mount: Mount) -> None:
    with running_benchfs("top", mount.mountpoint, "--interval", 0.2, "--json") as child:
        child.line()
        child.popen.send_signal(signal.SIGINT)
        assert child.wait().code == 130


@pytest.mark.parametrize("words", [["--count", "0"], ["--interval", "-1"], ["--interval", "nan"], ["--count", "many"]])
def test_wrong_use_of_top(tmp_path: Path, words: list[str]) -> None:
    done = benchfs("top", tmp_path, *words)
    assert done.code == 2 and "see benchfs top --help" in done.err


# ── beside it ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_status_answers_and_the_mount_leaves_while_somebody_records(cluster: Cluster, tmp_path: Path) -> None:
    mount = cluster.mount()
    words = ["--", "sh", "-c", "echo on; exec sleep 100"]
    try:
        with running_benchfs("trace", mount.mountpoint, "--out", tmp_path / "t.json", *words) as child:
            assert child.line() == "on\n"
            succeeds("status", mount.mountpoint)
            succeeds("umount", mount.mountpoint)
            os.killpg(child.pid, signal.SIGINT)
            out, err = (said.decode() for said in child.popen.communicate(timeout=PATIENCE_S))
            assert child.popen.returncode == 1 and "broke off" in err and "Traceback" not in err and out == ""
    finally:
        mount.stop()
    again = cluster.mount()
    try:
        assert nobody_records(again.mountpoint)
        assert kernel_mounts.find(mount.mountpoint) is None
    finally:
        again.stop()


def test_a_time_that_is_none_harms_nobody(mount: Mount) -> None:
    reports = list(control.ask(record_of(mount.mountpoint), control.Question("trace", seconds=-5.0), PATIENCE_S))
    assert reports[-1].done and reports[0].trace is not None and reports[0].trace.recording
