"""The command line with real clusters and mounts: one test for each promise, one sentence for each thing gone wrong."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_help import (
    HELD,
    PATIENCE_S,
    Done,
    Running,
    benchfs,
    clean_directory,
    daemons_of,
    go,
    holding,
    mounts_below,
    processes_below,
    records_below,
    refused,
    running_benchfs,
    seconds_since,
    sentence_of,
    succeeds,
    take_away,
    tell,
    wait_until,
)
from cluster import Cluster, Mount, running_cluster

from benchfs_fuse import control, kernel_mounts
from benchfs_fuse.commands import mounting
from benchfs_fuse.processes import alive, wait_end
from benchfs_fuse.registry import Registry
from benchfs_fuse.runtime import runtime_dir

#: Seconds that the promise gives to a forced unmount.
FORCE_S = 2.0
#: A program that opens a file, and at the next step writes what no daemon has to know of yet.
WRITTEN = 3_000_000
WRITER = f"""
file = open(sys.argv[1] + '/f', 'wb', buffering=0)
file.write(b'x')
os.fsync(file.fileno())
os.lseek(file.fileno(), 0, os.SEEK_SET)
step()
file.write(bytes({WRITTEN}))
"""

LOCKER = """
import fcntl
file = open(sys.argv[1] + '/f', 'wb', buffering=0)
fcntl.flock(file, fcntl.LOCK_EX)
"""


def nothing_runs_below(directory: Path) -> bool:
    """Tell whether no mount, no process and no record is left."""
    return mounts_below(directory) == [] and processes_below(directory) == [] and records_below(directory) == []


def record_at(mountpoint: Path) -> control.MountRecord | None:
    return control.read_record(mountpoint)


def _place() -> Path:
    """Make a directory; not below pytest's own, whose length and modes are in the way of sockets and other users."""
    directory = Path(tempfile.mkdtemp(prefix="benchfs-cli-"))
    directory.chmod(0o755)
    (directory / "mnt").mkdir()
    return directory


@pytest.fixture
def place() -> Iterator[Path]:
    directory = _place()
    with clean_directory(directory):
        yield directory
    shutil.rmtree(directory)


class Up:
    """Be a local cluster that is up; tests may take it down."""

    def __init__(self, directory: Path) -> None:
        self.mnt = directory / "mnt"
        self.data = directory / "data"
        succeeds("up", self.mnt, "--data-dir", self.data)

    @property
    def registry(self) -> Path:
        return self.data / "registry"

    def stop_daemons(self) -> None:
        """Stop all daemons as a debugger does."""
        for daemon in daemons_of(self.data):
            os.kill(daemon.pid, signal.SIGSTOP)

    def continue_daemons(self) -> None:
        for daemon in daemons_of(self.data):
            os.kill(daemon.pid, signal.SIGCONT)

    def kill_daemons(self) -> None:
        for daemon in daemons_of(self.data):
            os.kill(daemon.pid, signal.SIGKILL)
            assert wait_end(daemon, PATIENCE_S)


@pytest.fixture
def up() -> Iterator[Up]:
    """Give a cluster to a test that does with it what it likes."""
    directory = _place()
    try:
        yield Up(directory)
    finally:
        take_away(directory)
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Give a cluster to tests that leave it as it is; each mounts it for itself."""
    with running_cluster() as cluster:
        yield cluster
        take_away(cluster.directory)


@pytest.fixture
def mounted(cluster: Cluster) -> Iterator[Mount]:
    mount = cluster.mount()
    yield mount
    mount.stop()


# ── up and down ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_up_again_finds_every_file(place: Path) -> None:
    mnt, data = place / "mnt", place / "data"
    said = succeeds("up", mnt, "--data-dir", data).out
    assert str(mnt) in said and str(data) in said and f"benchfs down {mnt}" in said
    assert len(daemons_of(data)) == 2
    (mnt / "d").mkdir()
    (mnt / "d" / "f").write_bytes(b"x" * 100_000)
    assert succeeds("down", mnt) == (0, "", "")
    assert nothing_runs_below(place)
    assert list(mnt.iterdir()) == []
    succeeds("up", mnt, "--data-dir", data)
    assert (mnt / "d" / "f").read_bytes() == b"x" * 100_000
    succeeds("down", mnt)


@pytest.mark.parametrize(
    "name",
    [
        *("new\nline", "link"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("with space", "ümläut", "mnt/../mnt", "tab\tand\\\\back")
        ),
    ],
)
def test_mount_points_and_directories_may_have_any_name(place: Path, name: str) -> None:
    """Relative ones too, and those behind a symbolic link; without HOME and with a TMPDIR that is not there."""
    (place / "link").symlink_to("mnt")
    (place / name).mkdir(exist_ok=True)
    env = {"TMPDIR": str(place / "none"), "HOME": ""}
    succeeds("up", name, "--data-dir", f"data {name}".replace("/", "-"), "--daemons", "1", env=env, cwd=place)
    (place / name / "f").write_text("content")
    assert succeeds("layout", f"{name}/f", cwd=place).out
    assert succeeds("status", name, cwd=place).out
    succeeds("down", name, env=env, cwd=place)
    assert not (place / name / "f").exists()


@pytest.mark.slow
def test_a_registry_behind_a_symbolic_link(up: Up, place: Path) -> None:
    (place / "registry").symlink_to(up.data / "registry")
    (place / "other").mkdir()
    succeeds("mount", "other", "--registry-dir", "registry", cwd=place)
    succeeds("umount", "other", cwd=place)


def test_a_read_only_file_system(place: Path) -> None:
    disk = place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True, timeout=PATIENCE_S)
    try:
        (disk / "mnt").mkdir()
        (disk / "data").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True, timeout=PATIENCE_S)
        for data in ("data", "new"):
            assert "Read-only file system" in refused("up", place / "mnt", "--data-dir", disk / data)
        assert "Read-only file system" in refused("init", disk / "registry", "--daemons", "1")
        succeeds("up", disk / "mnt", "--data-dir", place / "data", "--daemons", "1")  # what is below does not matter
        succeeds("down", disk / "mnt")
    finally:
        subprocess.run(["umount", disk], check=True, timeout=PATIENCE_S)


def test_up_twice_changes_nothing(place: Path) -> None:
    mnt, data = place / "mnt", place / "data"
    succeeds("up", mnt, "--data-dir", data, "--daemons", "3", "--chunk-size", "64K")
    processes = {*processes_below(place)}
    assert len(processes) == 4
    for again in (["--data-dir", data], [], ["--daemons", "3", "--chunk-size", "64K"]):
        assert str(data) in succeeds("up", mnt, *again).out
        assert {*processes_below(place)} == processes
    (place / "other").mkdir()
    for words, said in (
        (["--daemons", "2"], "holds a cluster of 3 daemons, not 2"),
        (["--chunk-size", "1M"], "holds a cluster with chunks of 65536 bytes"),
        (["--data-dir", place / "more"], f"the cluster in {data} is up at {mnt}; take it down first"),
    ):
        assert said in refused("up", mnt, *words)
    assert f"is up at {mnt}; to mount it twice run: benchfs mount" in refused("up", place / "other", "--data-dir", data)
    assert {*processes_below(place)} == processes and not (place / "more").exists()
    succeeds("down", mnt)


def test_up_twice_at_once(place: Path) -> None:
    words = ("up", place / "mnt", "--data-dir", place / "data")
    with running_benchfs(*words) as one, running_benchfs(*words) as two:
        ended = [one.wait(), two.wait()]
    assert [done.code for done in ended] == [0, 0], ended
    assert len(processes_below(place)) == 3
    succeeds("down", place / "mnt")


def test_up_starts_what_has_died(up: Up) -> None:
    (up.mnt / "f").write_bytes(b"kept")
    (record,) = records_below(up.mnt.parent)
    first, second = daemons_of(up.data)
    for process in (record.process, second):
        os.kill(process.pid, signal.SIGKILL)
        assert wait_end(process, PATIENCE_S)
    succeeds("up", up.mnt)
    assert daemons_of(up.data)[0] == first and daemons_of(up.data)[1] != second
    assert (up.mnt / "f").read_bytes() == b"kept"
    assert succeeds("status", up.mnt).err == ""
    succeeds("down", up.mnt)


@pytest.mark.slow
def test_a_cluster_can_be_copied_and_started_elsewhere(place: Path) -> None:
    mnt, data, copy = place / "mnt", place / "data", place / "copy"
    script = f"for n in 1 2 3 4; do mkdir {mnt}/d$n; seq 100000 > {mnt}/d$n/f; done"
    succeeds("up", mnt, "--data-dir", data, "--chunk-size", "64K", "--", "sh", "-c", script)
    subprocess.run(["cp", "-a", data, copy], check=True)
    shutil.rmtree(data)
    script = f"for n in 1 2 3 4; do seq 100000 | cmp - {mnt}/d$n/f || exit 1; done"
    succeeds("up", mnt, "--data-dir", copy, "--", "sh", "-c", script)


def test_up_does_not_touch_somebody_elses_mount(cluster: Cluster, mounted: Mount) -> None:
    said = refused("up", mounted.mountpoint, "--data-dir", cluster.directory / "another")
    assert f"mounted already, from the registry {cluster.registry}" in said
    assert not (cluster.directory / "another").exists()


@pytest.mark.parametrize(
    ("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill $$", 143), (None, 127)]
)
def test_up_for_a_command_ends_with_its_exit_code(place: Path, command: str | None, code: int) -> None:
    mnt = place / "mnt"
    script = f'echo hello > "{mnt}/f"; cat "{mnt}/f"; {command}'
    words = ["sh", "-c", script] if command is not None else ["no-such-command"]
    done = benchfs("up", mnt, "--data-dir", place / "data", "--", *words)
    assert done.code == code
    if command is None:
        assert "cannot run no-such-command: No such file or directory" in sentence_of(done, 127)
    else:
        assert (done.out, done.err) == ("hello\n", "")
    assert nothing_runs_below(place)


def test_up_for_a_command_passes_on_what_it_is_told(place: Path) -> None:
    file = place / "mnt" / "f"
    script = f'trap "cat {file}; exit 3" TERM; echo told > {file}; echo ready; while :; do sleep 0.1; done'
    with running_benchfs("up", place / "mnt", "--data-dir", place / "data", "--", "sh", "-c", script) as running:
        assert running.line() == "ready\n"
        running.popen.terminate()
        done = running.wait()
    assert done == (3, "told\n", "")
    assert nothing_runs_below(place)


def test_ctrl_c_ends_the_command_and_takes_everything_down(place: Path) -> None:
    script = "echo ready; exec sleep 1000"
    with running_benchfs("up", place / "mnt", "--data-dir", place / "data", "--", "sh", "-c", script) as running:
        assert running.line() == "ready\n"
        os.killpg(running.pid, signal.SIGINT)  # what the terminal does
        done = running.wait()
    assert done == (130, "", "")
    assert nothing_runs_below(place)


def test_what_a_command_leaves_running_does_not_keep_the_cluster_up(place: Path) -> None:
    mnt = place / "mnt"
    script = f"(cd {mnt}; echo $$; exec sleep 1000 >/dev/null 2>&1) & sleep 0.2; echo kept > {mnt}/f; exit 5"
    done = benchfs("up", mnt, "--data-dir", place / "data", "--", "sh", "-c", script)
    (said,) = done.err.splitlines()
    assert done.code == 5 and "is busy: it is used by sleep (pid" in said and "all the same" in said
    assert nothing_runs_below(place)
    pid = int(said.partition("(pid ")[2].partition(",")[0])
    os.kill(pid, signal.SIGKILL)
    assert succeeds("up", mnt, "--data-dir", place / "data", "--", "cat", mnt / "f").out == "kept\n"


def test_an_up_that_is_interrupted_leaves_nothing_running(place: Path) -> None:
    mnt, data = place / "mnt", place / "data"
    data.mkdir()
    with running_benchfs("up", mnt, "--data-dir", data) as running:
        wait_until((data / "mount.log").exists, data)
        running.popen.send_signal(signal.SIGINT)
        done = running.wait()
    assert done == (130, "", "")
    assert nothing_runs_below(place)
    assert "no local cluster is up" in refused("down", mnt)


def runs_below(pid: int, module: str) -> bool:
    """Tell whether a child of a process runs a module."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return any(module.encode() in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


def test_an_up_that_is_killed_is_found_again(place: Path) -> None:
    mnt, data = place / "mnt", place / "data"
    data.mkdir()
    with running_benchfs("up", mnt, "--data-dir", data) as running:
        wait_until((data / "mount.log").exists, data)
        while not runs_below(running.popen.pid, "benchfs_fuse.mount"):  # the log is there before the process is
            os.sched_yield()
        running.popen.kill()
        assert running.wait().code == -signal.SIGKILL
    wait_until(lambda: record_at(mnt) is not None, runtime_dir())  # what it has started goes on
    succeeds("down", mnt)
    assert nothing_runs_below(place)


def test_nothing_that_up_makes_is_readable_by_others(place: Path) -> None:
    """Not even where somebody else made the directory, with the usual rights and umask."""
    mnt, data = place / "mnt", place / "data"
    data.mkdir(mode=0o755)
    before = os.umask(0o022)
    try:
        succeeds("up", mnt, "--data-dir", data)
    finally:
        os.umask(before)
    found = list(data.rglob("*"))
    assert {"registry", "daemon-0", "daemon-0.log", "mount.log", "cluster.json"} <= {path.name for path in found}
    assert [path for path in found if path.stat().st_mode & 0o077] == []
    succeeds("down", mnt)


def test_down_cleans_up_behind_a_mount_that_was_killed(up: Up) -> None:
    record = record_at(up.mnt)
    assert record is not None
    os.kill(record.process.pid, signal.SIGKILL)
    assert wait_end(record.process, PATIENCE_S)
    # The first one may meet the connection while it goes: a request that waits then is told ECONNABORTED.
    with pytest.raises(OSError, match=r"Transport endpoint is not connected|Software caused connection abort"):
        os.stat(up.mnt)
    assert succeeds("down", up.mnt) == (0, "", "")
    assert nothing_runs_below(up.mnt.parent)
    assert list(up.mnt.iterdir()) == []


def test_when_a_daemon_fails_nothing_stays(place: Path) -> None:
    mnt, data = place / "mnt", place / "data"
    succeeds("up", mnt, "--data-dir", data, "--", "true")
    (data / "daemon-1" / "identity.json").write_text("{")
    assert "identity.json is damaged" in refused("up", mnt, "--data-dir", data)
    assert nothing_runs_below(place)
    assert "no local cluster is up" in refused("down", mnt)


def test_down_refuses_while_somebody_uses_it(up: Up) -> None:
    with holding("os.chdir(sys.argv[1])", up.mnt) as holder:
        said = refused("down", up.mnt)
        assert "is busy: it is used by python" in said and f"(pid {holder.pid}, working directory {up.mnt})" in said
        assert all(map(alive, daemons_of(up.data)))
    (up.mnt / "f").write_bytes(b"x")
    second = up.mnt.with_name("second")
    second.mkdir()
    succeeds("mount", second, "--registry-dir", up.registry)
    assert f"is mounted at {second} too; unmount that first: benchfs umount {second}" in refused("down", up.mnt)
    assert (second / "f").read_bytes() == b"x"
    succeeds("umount", second)
    succeeds("down", up.mnt)


def test_down_by_force_in_any_state(up: Up) -> None:
    with holding(WRITER, up.mnt) as writer:
        up.stop_daemons()
        go(writer)
        start = time.monotonic()
        done = benchfs("down", up.mnt, "--force")
        assert seconds_since(start) < 2 * FORCE_S
    *killed, sentence = done.err.splitlines()
    assert done.code == 1 and f"{WRITTEN} bytes of 1 files were not flushed" in sentence
    assert len(killed) == 2 and all("did not stop in" in line for line in killed)
    assert nothing_runs_below(up.mnt.parent)


# ── mount and umount ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_mount_returns_when_the_mount_answers(cluster: Cluster, place: Path) -> None:
    one, two = place / "mnt", place / "two"
    two.mkdir()
    assert succeeds("mount", one, "--registry-dir", cluster.registry) == (0, "", "")
    (one / "f").write_bytes(b"hello")
    log = place / "two.log"
    done = succeeds("mount", "two", "--registry-dir", cluster.registry, "--log", "two.log", "--no-locks", cwd=place)
    assert f"this cluster is also mounted at {one}" in done.err and "hold within one mount only" in done.err
    assert "also mounted" in log.read_text()
    assert (two / "f").read_bytes() == b"hello"
    (two / "f").unlink()
    (place / "link").symlink_to("two")
    assert "is mounted already; unmount it first" in refused(
        "mount", place / "link", "--registry-dir", cluster.registry
    )
    assert succeeds("umount", place / "link") == (0, "", "")
    assert succeeds("umount", "mnt", cwd=place) == (0, "", "")


def test_foreground_stays_until_unmounted(cluster: Cluster, place: Path) -> None:
    words = ["mount", place / "mnt", "--registry-dir", cluster.registry, "--foreground"]
    for number in (signal.SIGTERM, signal.SIGINT, None):
        with running_benchfs(*words) as foreground:
            wait_until(lambda: record_at(place / "mnt") is not None, runtime_dir())
            if number is not None:
                foreground.popen.send_signal(number)
            else:
                succeeds("umount", place / "mnt")
            assert foreground.wait().code == 0
        assert nothing_runs_below(place)


def test_umount_flushes(cluster: Cluster, mounted: Mount) -> None:
    other = cluster.mount("--gather-time=3600")
    (other.mountpoint / "late").write_bytes(b"x" * 1_000_000)
    succeeds("umount", other.mountpoint)
    assert other.wait() == 0
    assert (mounted.mountpoint / "late").read_bytes() == b"x" * 1_000_000


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("os.chdir(sys.argv[1])", "working directory {0}"),
        ("file = open(sys.argv[1] + '/held', 'w')", "open file {0}/held"),
        (
            "fd = os.open(sys.argv[1] + '/held', os.O_RDWR | os.O_CREAT)\nos.ftruncate(fd, 4096)\n"
            "mapped = mmap.mmap(fd, 4096)\nos.closerange(3, 64)",
            "mapped file {0}/held",
        ),
    ],
)
def test_umount_of_a_busy_mount_names_who(mounted: Mount, script: str, what: str) -> None:
    with holding(script, mounted.mountpoint) as holder:
        said = refused("umount", mounted.mountpoint)
        assert said.startswith(f"{mounted.mountpoint} is busy: it is used by ")
        assert f"(pid {holder.pid}, {what.format(mounted.mountpoint)})" in said
        (mounted.mountpoint / "f").write_bytes(b"still works")
    succeeds("umount", mounted.mountpoint)
    assert mounted.wait() == 0


def test_umount_names_what_is_mounted_inside(mounted: Mount) -> None:
    inside = mounted.mountpoint / "inside"
    inside.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", inside], check=True)
    try:
        assert f"it is used by what is mounted at {inside}" in refused("umount", mounted.mountpoint)
    finally:
        subprocess.run(["umount", inside], check=True)


def test_umount_gives_up_flushing_at_its_deadline(up: Up) -> None:
    with holding(WRITER, up.mnt) as writer:
        up.stop_daemons()
        go(writer)
        start = time.monotonic()
        said = refused("umount", up.mnt, "--timeout", "0.5")
        assert 0.5 <= seconds_since(start) < PATIENCE_S / 2
        up.continue_daemons()
    assert f"{up.mnt} stays mounted: {WRITTEN} bytes of 1 files are not flushed after 0.5 s" in said
    assert (up.mnt / "f").stat().st_size == WRITTEN
    succeeds("down", up.mnt)


@pytest.mark.parametrize("what", ["idle", "busy", "dirty"])
def test_umount_by_force_of_a_healthy_mount_loses_nothing(cluster: Cluster, what: str) -> None:
    mount = cluster.mount("--gather-time=3600")
    script = {"idle": "", "busy": "os.chdir(sys.argv[1])", "dirty": f"{WRITER}"}[what]
    with holding(script, mount.mountpoint) as holder:
        if what == "dirty":
            go(holder)
        start = time.monotonic()
        assert succeeds("umount", mount.mountpoint, "--force") == (0, "", "")
        assert seconds_since(start) < FORCE_S
    assert mount.wait() == 0
    again = cluster.mount()
    if what == "dirty":
        assert (again.mountpoint / "f").stat().st_size == WRITTEN
    again.stop()


def test_umount_by_force_when_the_daemons_are_dead_says_what_is_lost(up: Up) -> None:
    with holding(WRITER, up.mnt) as writer:
        up.kill_daemons()
        go(writer)
        start = time.monotonic()
        said = refused("umount", up.mnt, "--force")
        assert seconds_since(start) < FORCE_S
    assert said == f"{up.mnt} is unmounted by force; {WRITTEN} bytes of 1 files were not flushed"
    assert nothing_runs_below(up.mnt.parent)


def test_umount_by_force_frees_a_process_stuck_in_a_read(up: Up) -> None:
    (up.mnt / "f").write_bytes(os.urandom(1 << 20))
    script = (
        "fd = os.open(sys.argv[1] + '/f', os.O_RDONLY | os.O_DIRECT)\nroom = mmap.mmap(-1, 1 << 20)\nstep()\n"
        "try:\n    os.readv(fd, [room])\nexcept OSError as error:\n    held()"
    )
    with holding(script, up.mnt) as reader:
        (mounted,) = mounts_below(up.mnt.parent)
        up.stop_daemons()
        tell(reader)
        waiting = kernel_mounts.connection(mounted.minor) / "waiting"
        deadline = time.monotonic() + PATIENCE_S
        while waiting.read_text().strip() == "0":  # the kernel tells nobody
            assert time.monotonic() < deadline
        start = time.monotonic()
        assert succeeds("umount", up.mnt, "--force") == (0, "", "")  # nothing was to be flushed
        assert seconds_since(start) < FORCE_S
        assert reader.line() == HELD
    assert mounts_below(up.mnt.parent) == []
    up.continue_daemons()
    succeeds("down", up.mnt)


def test_umount_by_force_when_the_mount_process_hangs(cluster: Cluster, mounted: Mount) -> None:
    mounted.signal(signal.SIGSTOP)
    start = time.monotonic()
    said = refused("umount", mounted.mountpoint, "--force")
    assert seconds_since(start) < FORCE_S
    assert said.endswith("its process did not answer, so nobody knows what was lost")
    assert mounted.wait() == -signal.SIGKILL


def test_a_dead_mount_is_told_and_cleaned_up(cluster: Cluster) -> None:
    dead = cluster.mount()
    dead.kill()
    assert "its process has died; clean up with: benchfs umount" in refused("status", dead.mountpoint)
    assert succeeds("umount", dead.mountpoint) == (0, "", "")
    assert kernel_mounts.find(dead.mountpoint) is None
    assert "is not mounted" in refused("umount", dead.mountpoint)
    succeeds("mount", dead.mountpoint, "--registry-dir", cluster.registry)
    record = record_at(dead.mountpoint)
    assert record is not None
    os.kill(record.process.pid, signal.SIGKILL)
    assert wait_end(record.process, PATIENCE_S)
    again = succeeds("mount", dead.mountpoint, "--registry-dir", cluster.registry)
    assert "was left broken by a dead mount: cleaning up" in again.err
    (dead.mountpoint / "f").write_bytes(b"x")
    succeeds("umount", dead.mountpoint)
    succeeds("mount", dead.mountpoint, "--registry-dir", cluster.registry)
    record = record_at(dead.mountpoint)
    assert record is not None
    os.kill(record.process.pid, signal.SIGKILL)
    assert wait_end(record.process, PATIENCE_S)
    assert succeeds("umount", dead.mountpoint, "--force") == (0, "", "")


@pytest.mark.slow
def test_a_mount_without_its_record_is_left_in_peace(cluster: Cluster, mounted: Mount) -> None:
    """To root, somebody else's mount looks like this."""
    (mounted.mountpoint / "kept").write_bytes(b"x")
    control.record_file(mounted.mountpoint).unlink()
    assert "only its own process knows more" in refused("status", mounted.mountpoint)
    assert "is mounted already" in refused("mount", mounted.mountpoint, "--registry-dir", cluster.registry)
    with holding("os.chdir(sys.argv[1])", mounted.mountpoint):
        assert "is busy" in refused("umount", mounted.mountpoint)
    assert (mounted.mountpoint / "kept").read_bytes() == b"x"
    succeeds("umount", mounted.mountpoint)
    assert mounted.wait() == 0


def test_a_first_sigterm_drains_and_a_second_one_leaves_at_once(up: Up) -> None:
    record = record_at(up.mnt)
    assert record is not None
    log = up.data / "mount.log"
    with holding(WRITER, up.mnt) as writer:
        up.stop_daemons()
        go(writer)
        os.kill(record.process.pid, signal.SIGTERM)
        wait_until(lambda: f"leaving: flushing {WRITTEN} bytes of 1 files" in log.read_text(), up.data)
        assert alive(record.process) and mounts_below(up.mnt.parent)
        os.kill(record.process.pid, signal.SIGTERM)
        assert wait_end(record.process, PATIENCE_S)
    assert f"left at once: {WRITTEN} bytes of 1 files were not flushed" in log.read_text()
    assert mounts_below(up.mnt.parent) == [] and record_at(up.mnt) is None
    up.continue_daemons()
    succeeds("down", up.mnt)


def test_a_sigterm_that_can_drain_loses_nothing(cluster: Cluster) -> None:
    mount = cluster.mount("--gather-time=3600")
    with holding(WRITER, mount.mountpoint) as writer:
        go(writer)
        mount.signal(signal.SIGTERM)
        assert mount.wait() == 0
    again = cluster.mount()
    assert (again.mountpoint / "f").stat().st_size == WRITTEN
    again.stop()


# ── mount(8) ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def helper() -> Iterator[None]:
    """Install the helper of mount(8) as the command does, and take it away again."""
    before = mounting.HELPER.read_bytes() if mounting.HELPER.exists() else None
    succeeds("install-mount-helper")
    yield
    if before is None:
        mounting.HELPER.unlink()
    else:
        mounting.HELPER.write_bytes(before)


def mount_8(*words: object) -> Done:
    done = subprocess.run(
        ["mount", *map(str, words)], check=False, capture_output=True, text=True, timeout=PATIENCE_S, cwd="/"
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def options_of(mountpoint: Path) -> set[str]:
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if f" {mountpoint} " in line)
    return set(line.split()[3].split(","))


def test_mount_dash_t(cluster: Cluster, place: Path, helper: None) -> None:
    mnt = place / "mnt"
    unknown = mount_8("-t", "benchfs", cluster.registry, mnt, "-o", "rw,nonsense")
    assert unknown.code == 1 and "unknown mount option 'nonsense'" in sentence_of(unknown, 1, "mount.benchfs")
    missing = mount_8("-t", "benchfs", place / "none", mnt)
    assert "there is no registry at" in sentence_of(missing, 32, "mount.benchfs")
    assert mounts_below(place) == []
    assert mount_8("-t", "benchfs", cluster.registry, mnt, "-o", "ro,noatime,noexec,nofail,_netdev").code == 0
    assert {"ro", "noexec", "nosuid", "nodev", "allow_other"} <= options_of(mnt)
    with pytest.raises(OSError, match="Read-only file system"):
        (mnt / "f").touch()
    again = mount_8("-t", "benchfs", cluster.registry, mnt)
    assert "is mounted already" in sentence_of(again, 32, "mount.benchfs")
    record = record_at(mnt)
    assert record is not None
    assert subprocess.run(["umount", mnt], check=False, timeout=PATIENCE_S).returncode == 0
    assert wait_end(record.process, PATIENCE_S)


def test_a_line_in_fstab(cluster: Cluster, place: Path, helper: None) -> None:
    mnt, fstab = place / "mnt", place / "fstab"
    fstab.write_text(f"{cluster.registry} {mnt} benchfs noatime,noexec,_netdev,nofail,attr_timeout=0 0 0\n")
    assert mount_8("-T", fstab, mnt) == (0, "", "")
    assert {"rw", "noexec"} <= options_of(mnt)
    (mnt / "f").write_bytes(b"x" * 10)
    before = (mnt / "f").stat().st_atime_ns
    os.utime(mnt / "f", ns=(0, before))
    assert (mnt / "f").read_bytes() == b"x" * 10
    succeeds("umount", mnt)
    assert mount_8("-T", fstab, mnt).code == 0
    assert (mnt / "f").stat().st_atime_ns == 0  # relatime would have moved it
    succeeds("umount", mnt)


# ── status and layout ────────────────────────────────────────────────────────────────────────────────────────────────


def test_status_shows_daemons_and_what_is_under_way(cluster: Cluster, mounted: Mount) -> None:
    with holding(WRITER, mounted.mountpoint):
        done = succeeds("status", mounted.mountpoint)
        found = json.loads(succeeds("status", mounted.mountpoint, "--json").out)
    assert f"process {mounted.pid}, registry {cluster.registry}" in done.out and done.err == ""
    assert done.out.count(" alive") == 2
    assert found["mount"]["mountpoint"] == str(mounted.mountpoint) and found["files"] == found["handles"] == 1
    pids = {daemon["status"]["pid"] for daemon in found["daemons"]}
    assert pids == {daemon.pid for daemon in cluster.daemons}
    for number, daemon in enumerate(found["daemons"]):
        assert daemon["daemon_id"] == number and daemon["connected"] and daemon["transport"]
        assert daemon["address"] in done.out
        usage = daemon["status"]["usage"][0]
        assert 0 < usage["available"] <= usage["total"]
        assert [one["label"] for one in daemon["status"]["sessions"] if one["kind"] == "mount"] == [
            str(mounted.mountpoint)
        ]


def test_status_counts_locks(mounted: Mount) -> None:
    with holding(LOCKER, mounted.mountpoint):
        done = succeeds("status", mounted.mountpoint)
        found = json.loads(succeeds("status", mounted.mountpoint, "--json").out)
    assert "  1 locks held, 0 waited for\n" in done.out and (found["locks_held"], found["locks_waiting"]) == (1, 0)
    assert sorted(daemon["status"]["locks"] for daemon in found["daemons"]) == [0, 1]


def test_status_tells_who_is_missing_since_when(up: Up) -> None:
    killed_s = time.time()
    up.kill_daemons()
    done = benchfs("status", up.mnt)
    found = json.loads(benchfs("status", up.mnt, "--json").out)
    assert done.code == 3 and done.out.count("missing since") == 2 and done.err == ""
    for daemon in found["daemons"]:
        assert not daemon["connected"] and daemon["trouble"] and daemon["trouble"] in done.out
        assert killed_s - 1 <= daemon["missing_since_s"] <= time.time()
    succeeds("up", up.mnt)
    assert (up.mnt / "f").write_bytes(b"x") == 1  # waits until they are back
    assert benchfs("status", up.mnt).code == 0
    up.stop_daemons()
    silent = benchfs("status", up.mnt)
    assert silent.code == 3 and silent.out.count("connected, silent") == 2
    up.continue_daemons()


def test_layout_shows_where_a_file_lies(mounted: Mount, place: Path) -> None:
    (mounted.mountpoint / "small").mkdir()
    os.setxattr(mounted.mountpoint / "small", "user.benchfs.chunk_size", b"65536")
    file = mounted.mountpoint / "small" / "odd [red]name[bold]"
    file.write_bytes(bytes(200_000))
    (place / "link").symlink_to(file)
    for path in (file, place / "link"):
        out = succeeds("layout", path).out
        assert "odd [red]name[bold]" in out or path != file
        assert "200000 bytes" in out and "4 chunks of 65536 bytes" in out
    found = json.loads(succeeds("layout", file, "--json").out)
    assert found["ino"] == file.stat().st_ino and found["size"] == 200_000
    assert [chunk["length"] for chunk in found["chunks"]] == [65536, 65536, 65536, 200_000 - 3 * 65536]
    assert {chunk["daemon"] for chunk in found["chunks"]} == {0, 1}
    assert "No such file or directory" in refused("layout", file.with_name("none"))
    assert "0 chunks" in succeeds("layout", mounted.mountpoint).out


# ── strangers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_garbage_at_a_daemon_disturbs_nobody(cluster: Cluster, mounted: Mount) -> None:
    with Registry(cluster.registry) as registry:
        entry = registry.find(0)
    assert entry is not None
    host, _, port = entry.address.rpartition(":")
    (mounted.mountpoint / "garbage").mkdir()
    with contextlib.ExitStack() as strangers:
        for number, garbage in enumerate((b"", b"\0" * 65536, b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000)) * 3):
            stranger = strangers.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(ConnectionError):
                stranger.sendall(garbage)
            (mounted.mountpoint / "garbage" / str(number)).write_bytes(garbage)
            assert (mounted.mountpoint / "garbage" / str(number)).read_bytes() == garbage
    assert all(daemon.alive for daemon in cluster.daemons)
    assert succeeds("status", mounted.mountpoint).err == ""


def stranger_registry(cluster: Cluster, place: Path) -> Path:
    """Copy a registry: its entries lead to the same daemons."""
    return Path(shutil.copytree(cluster.registry, place / "registry"))


def test_a_wrong_secret_is_refused(cluster: Cluster, place: Path) -> None:
    registry = stranger_registry(cluster, place)
    (registry / "secret").write_text("00" * 32 + "\n")
    said = refused("mount", place / "mnt", "--registry-dir", registry)
    assert "the cluster does not let us in" in said
    assert all(daemon.alive for daemon in cluster.daemons) and nothing_runs_below(place)


def test_a_daemon_of_another_cluster_is_refused(cluster: Cluster, place: Path) -> None:
    registry = stranger_registry(cluster, place)
    content = json.loads((registry / "cluster.json").read_text())
    (registry / "cluster.json").write_text(json.dumps({**content, "cluster_id": "0" * 32}))
    said = refused("mount", place / "mnt", "--registry-dir", registry)
    assert "the cluster does not let us in" in said
    assert nothing_runs_below(place)


def test_another_protocol_version_is_refused(cluster: Cluster, place: Path) -> None:
    program = (
        "import sys, benchfs_fuse.rpc.handshake as handshake\nhandshake.PROTOCOL_VERSION = 99\n"
        "from benchfs_fuse.cli import main\nsys.exit(main())"
    )
    words = ["mount", str(place / "mnt"), "--registry-dir", str(cluster.registry), "--foreground"]
    with Running(sys.executable, "-c", program, *words) as mount:
        said = sentence_of(mount.wait())
    assert "the cluster does not let us in" in said and "protocol version" in said
    assert nothing_runs_below(place)


# ── disks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    disk = place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], check=True)
    yield disk
    take_away(place)
    place.joinpath("mnt").mkdir(exist_ok=True)


def test_a_data_directory_that_cannot_be_written(place: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "Read-only file system" in refused("up", place / "mnt", "--data-dir", small_disk / "data")
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    succeeds("up", place / "mnt", "--data-dir", small_disk / "data", "--", "true")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "Read-only file system" in refused("up", place / "mnt", "--data-dir", small_disk / "data")
    assert mounts_below(place / "mnt") == [] and processes_below(place) == []


@pytest.fixture
def large_disk(place: Path) -> Iterator[Path]:
    """Mount a file system large enough for the whole reserve; hardly anything of it is ever written."""
    disk, image = place / "disk", place / "image"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(4 << 30)
    subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True, timeout=PATIENCE_S)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True, timeout=PATIENCE_S)
    yield disk
    take_away(place)


def fill(disk: Path, name: str, leave: int) -> None:
    """Take all space but ``leave`` bytes, what is reserved for root too, without writing."""
    space = os.statvfs(disk)
    fd = os.open(disk / name, os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(fd, 0, max(1, space.f_bfree * space.f_frsize - leave))
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017  then it has taken what there was
    finally:
        os.close(fd)


def test_a_full_data_directory(place: Path, large_disk: Path) -> None:
    mnt, data = place / "mnt", large_disk / "data"
    succeeds("up", mnt, "--data-dir", data)
    (mnt / "first").write_bytes(b"kept")
    space = os.statvfs(large_disk)
    fill(large_disk, "ballast", (space.f_bfree - space.f_bavail) * space.f_frsize + (200 << 20))
    filled = subprocess.run(
        ["dd", "if=/dev/zero", f"of={mnt}/big", "bs=1M", "count=300", "conv=fsync"],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert filled.returncode == 1 and "No space left on device" in filled.stderr
    assert (mnt / "first").read_bytes() == b"kept"
    (mnt / "big").unlink()
    succeeds("down", mnt)
    fill(large_disk, "more", 0)  # with no room at all daemons do not start, and nothing is harmed
    assert "No space left" in refused("up", mnt, "--data-dir", data)
    assert processes_below(place) == [] and kernel_mounts.find(mnt) is None
    (large_disk / "more").unlink()
    (large_disk / "ballast").unlink()
    succeeds("up", mnt, "--data-dir", data)
    assert (mnt / "first").read_bytes() == b"kept" and not (mnt / "big").exists()
    succeeds("down", mnt)


@pytest.mark.slow
def test_nothing_is_kept_inside_the_mount_itself(cluster: Cluster, mounted: Mount, place: Path) -> None:
    inside = mounted.mountpoint
    (inside / "inner").mkdir()
    assert "lies in a benchfs mount" in refused("init", inside / "registry", "--daemons", "1")
    assert "lies in a benchfs mount" in refused("up", place / "mnt", "--data-dir", inside / "inner")
    assert "lies in a benchfs mount" in refused("mount", place / "mnt", "--registry-dir", inside / "inner")
    words = ["--registry-dir", str(cluster.registry), "--data-dir", str(inside / "data")]
    daemon = subprocess.run(
        [sys.executable, "-m", "benchfs_fuse.daemon", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert "lies in a benchfs mount" in sentence_of(Done(daemon.returncode, "", daemon.stderr), 1, "benchfsd")
    assert not (inside / "data").exists() and processes_below(place) == []
