"""Every setting changes what the running system does, wherever it is set. A key without a test fails the last one."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from cli_help import (
    HELD,
    PATIENCE_S,
    benchfs,
    daemons_of,
    holding,
    refused,
    succeeds,
    take_away,
    tell,
)
from cluster import Cluster, Mount, Process, running_cluster
from netns import IN_PUBLIC

from benchfs_fuse import client, config, control
from benchfs_fuse.processes import cpu_ns
from benchfs_fuse.registry import Registry, init_registry

T = TypeVar("T", bound=Callable[..., object])

_shown: set[str] = set()


def shows(*names: str) -> Callable[[T], T]:
    """Note that a test shows the effect of these keys."""

    def note(test: T) -> T:
        _shown.update(names)
        return test

    return note


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def mounting(cluster: Cluster) -> Iterator[Callable[..., Mount]]:
    """Mount the cluster with settings, any number of times."""
    mounts: list[Mount] = []

    def mount(*arguments: str) -> Mount:
        mounts.append(cluster.mount(*arguments))
        return mounts[-1]

    yield mount
    for one in mounts:
        one.stop()


@pytest.fixture
def place() -> Iterator[Path]:
    """Make a directory for clusters of a test's own."""
    directory = Path(tempfile.mkdtemp(prefix="benchfs-config-"))
    directory.chmod(0o755)
    (directory / "mnt").mkdir()
    try:
        yield directory
    finally:
        take_away(directory)
        shutil.rmtree(directory)


def left(mount: Mount) -> control.Report:
    """Ask a mount what it has accepted and not flushed."""
    record = control.read_record(mount.mountpoint)
    assert record is not None
    (report,) = control.ask(record, control.Question("left"), PATIENCE_S)
    return report


def name(test: str) -> str:
    """Return a file name that no other test uses: they share the cluster."""
    return f"of-{test}"


# ── mount ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@shows("mount.attr_timeout_s")
def test_attributes_are_cached_for_attr_timeout(mounting: Callable[..., Mount]) -> None:
    caching, asking = mounting("--attr-timeout=3600"), mounting("--attr-timeout=0")
    changing = mounting()
    (changing.mountpoint / name("attr")).touch(0o600)

    def modes() -> list[int]:
        return [stat.S_IMODE((mount.mountpoint / name("attr")).stat().st_mode) for mount in (caching, asking)]

    assert modes() == [0o600, 0o600]
    (changing.mountpoint / name("attr")).chmod(0o644)
    assert modes() == [0o600, 0o644]


def test_a_move_to_the_same_name_may_be_told_twice(mounting: Callable[..., Mount]) -> None:
    """The kernel that remembers the old name takes both for links of one file: then rename(2) does nothing."""
    remembering, asking, moving = mounting("--attr-timeout=3600"), mounting("--attr-timeout=0"), mounting()
    old, new = name("old"), name("new")
    (moving.mountpoint / old).write_bytes(b"moved")
    for mount in (remembering, asking):
        (mount.mountpoint / old).stat()
    (moving.mountpoint / old).rename(moving.mountpoint / new)
    with pytest.raises(FileNotFoundError):
        (asking.mountpoint / old).rename(asking.mountpoint / new)
    (remembering.mountpoint / old).rename(remembering.mountpoint / new)
    for mount in (remembering, asking, moving):
        assert (mount.mountpoint / new).read_bytes() == b"moved"


@shows("mount.op_timeout_s")
def test_operations_wait_for_op_timeout(place: Path) -> None:
    mnt, patient = place / "mnt", place / "patient"
    patient.mkdir()
    data = place / "data"
    succeeds("up", mnt, "--data-dir", data, "--op-timeout", "0.3")
    succeeds("mount", patient, "--registry-dir", data / "registry", "--op-timeout", "0")
    script = (
        "step()\ntry:\n    os.mkdir(sys.argv[1] + '/d')\nexcept OSError as error:\n    print(error.errno, flush=True)\n"
        "else:\n    print(0, flush=True)"
    )
    with holding(script, patient) as waiting, holding(script.replace("/d", "/e"), mnt) as hasty:
        for daemon in daemons_of(data):
            os.kill(daemon.pid, signal.SIGSTOP)
        tell(waiting)
        tell(hasty)
        assert hasty.line() == f"{errno.EIO}\n"
        for daemon in daemons_of(data):
            os.kill(daemon.pid, signal.SIGCONT)
        assert waiting.line() == "0\n"
        assert waiting.line() == hasty.line() == HELD
    succeeds("umount", patient)
    succeeds("down", mnt)


@shows("mount.xattr")
def test_extended_attributes_are_served_with_xattr(mounting: Callable[..., Mount]) -> None:
    served, refused = mounting("--xattr"), mounting("--no-xattr")
    (served.mountpoint / name("xattr")).touch()
    os.setxattr(served.mountpoint / name("xattr"), "user.colour", b"red")
    assert os.getxattr(served.mountpoint / name("xattr"), "user.colour") == b"red"
    with pytest.raises(OSError, match="not supported"):
        os.getxattr(refused.mountpoint / name("xattr"), "user.colour")


@shows("mount.allow_other")
def test_others_get_in_with_allow_other(cluster: Cluster, mounting: Callable[..., Mount]) -> None:
    default, closed = mounting(), mounting("--no-allow-other")
    cluster.directory.chmod(0o755)

    def as_nobody(mount: Mount) -> str:
        done = subprocess.run(
            ["ls", "-d", f"{mount.mountpoint}/."],
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            user=65534,
            group=65534,
            extra_groups=[],
        )
        return done.stderr

    assert as_nobody(default) == ""
    assert "Permission denied" in as_nobody(closed)


@shows("mount.companion")
def test_the_companion_library_can_be_left_out(mounting: Callable[..., Mount]) -> None:
    for mount, reserves in ((mounting(), True), (mounting("--no-companion"), False)):
        with (mount.mountpoint / f"file {reserves}").open("wb") as file:
            if reserves:
                os.posix_fallocate(file.fileno(), 0, 65536)
                assert os.fstat(file.fileno()).st_blocks == 128
            else:
                done = subprocess.run(["fallocate", "-l64K", file.name], capture_output=True, text=True, check=False)
                assert "not supported" in done.stderr


@shows("mount.locks")
def test_locks_hold_over_the_mounts_that_want_it(mounting: Callable[..., Mount]) -> None:
    here, there, alone = mounting(), mounting("--locks"), mounting("--no-locks")
    (here.mountpoint / "locked").touch()
    with contextlib.ExitStack() as stack:
        fds = [os.open(mount.mountpoint / "locked", os.O_RDWR) for mount in (here, there, alone)]
        for fd in fds:
            stack.callback(os.close, fd)
        fcntl.flock(fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fds[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fds[2], fcntl.LOCK_EX | fcntl.LOCK_NB)


@shows("mount.noatime")
def test_access_times_stay_with_noatime(mounting: Callable[..., Mount]) -> None:
    for mount, moves in ((mounting("--noatime"), False), (mounting(), True)):
        file = mount.mountpoint / f"{name('atime')}-{moves}"
        file.write_bytes(b"x")
        os.utime(file, ns=(0, 0))
        file.read_bytes()
        assert (file.stat().st_atime_ns != 0) == moves


@shows("mount.gather_bytes_max", "mount.gather_time_s")
def test_writes_are_gathered_up_to_a_size_and_for_a_time(mounting: Callable[..., Mount]) -> None:
    at_once = mounting("--gather-bytes-max=0")
    bounded = mounting("--gather-bytes-max=2M", "--gather-time=3600")
    ample = mounting("--gather-bytes-max=64M", "--gather-time=3600")
    soon = mounting("--gather-bytes-max=64M", "--gather-time=0.01")
    with contextlib.ExitStack() as files:
        for mount in (at_once, bounded, ample, soon):
            files.enter_context(holding(GATHERED, mount.mountpoint / f"{name('gather')}-{mount.mountpoint.name}"))
        assert left(at_once).accepted_bytes == 0
        assert left(bounded).accepted_bytes <= 2 << 20
        assert left(ample).accepted_bytes == 10 * 500_000
        deadline = time.monotonic() + PATIENCE_S
        while left(soon).dirty_files:  # nobody is told when it has flushed
            assert time.monotonic() < deadline
        assert left(ample).accepted_bytes == 10 * 500_000
    # Closed by the death of a process: whoever dies is not kept until the daemons have answered.
    deadline = time.monotonic() + PATIENCE_S
    while left(ample).dirty_files:
        assert time.monotonic() < deadline


#: A program that writes to ten files, to each less than a full request, and keeps them open.
GATHERED = """
files = [open(f'{sys.argv[1]}-{number}', 'wb', buffering=0) for number in range(10)]
for file in files:
    file.write(bytes(500_000))
"""


def ask_with_pauses(directory: Path) -> None:
    """Cause a request to a daemon now and then; the pauses are longer than the longest spin of a daemon."""
    for number in range(5):
        with contextlib.suppress(FileNotFoundError):
            (directory / f"none-{number}-{time.monotonic_ns()}").stat()
        time.sleep(0.11)


@shows("mount.spin_us")
def test_a_mount_polls_for_answers_if_it_may(mounting: Callable[..., Mount]) -> None:
    """On a single processor nobody polls: the answer could not be made meanwhile."""
    lone = len(os.sched_getaffinity(0)) == 1
    for words, polls in ((["--spin=0"], False), (["--spin=2000"], not lone)):
        mount = mounting("--attr-timeout=0", *words)
        for number in range(100):
            (mount.mountpoint / f"none-{number}").exists()
        record = control.read_record(mount.mountpoint)
        assert record is not None
        *_, report = control.ask(record, control.Question("count"), PATIENCE_S)
        assert report.counts is not None
        assert (report.counts.spins > 0) == polls


#: A good part of five spins of 100 ms, and how long to look for a moment in which few others compute.
SPUN_NS = 60_000_000
LOOK_S = 120.0


@pytest.mark.slow
@shows("daemon.spin_us")
def test_spinning_costs_a_daemon_what_it_is_allowed(place: Path) -> None:
    """The longest spin, 100 ms after each request, is seen in the CPU time; on a single core nobody spins.

    Who spins yields to programs that compute, and then sleeps: so the spin is looked for until nobody is in its way.
    Who may not spin never takes that long.
    """
    lone = len(os.sched_getaffinity(0)) == 1
    mnt = place / "mnt"
    for spin_us in (0, 100_000):
        succeeds("up", mnt, "--data-dir", place / "data", env={"BENCHFS_DAEMON_SPIN_US": str(spin_us)})
        daemon = daemons_of(place / "data")[0].pid
        ask_with_pauses(mnt)  # warm
        longest_ns, end_s = 0, time.monotonic() + (LOOK_S if spin_us and not lone else 0)
        while True:
            before_ns = cpu_ns(daemon)
            ask_with_pauses(mnt)
            longest_ns = max(longest_ns, cpu_ns(daemon) - before_ns)
            if longest_ns > SPUN_NS or time.monotonic() > end_s:
                break
        succeeds("down", mnt)
        assert (longest_ns > SPUN_NS) == (spin_us > 0 and not lone), f"{spin_us} us: {longest_ns} ns"


# ── daemon ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@shows("daemon.lease_s")
def test_a_silent_mount_is_expelled_after_the_lease(place: Path) -> None:
    mnt, silent = place / "mnt", place / "silent"
    silent.mkdir()
    data = place / "data"
    succeeds("up", mnt, "--data-dir", data, env={"BENCHFS_DAEMON_LEASE_S": "1"})
    succeeds("mount", silent, "--registry-dir", data / "registry")
    record = control.read_record(silent)
    assert record is not None

    def mounts_known() -> set[str]:
        found = json.loads(succeeds("status", mnt, "--json").out)
        return {
            one["label"]
            for daemon in found["daemons"]
            for one in daemon["status"]["sessions"]
            if one["kind"] == "mount"
        }

    assert mounts_known() == {str(mnt), str(silent)}
    deadline = time.monotonic() + PATIENCE_S / 3  # half of the default lease
    # With nothing open it would begin another session.
    with holding("file = open(sys.argv[1], 'wb')", silent / "held"):
        os.kill(record.process.pid, signal.SIGSTOP)
        try:
            while mounts_known() != {str(mnt)}:
                assert time.monotonic() < deadline
        finally:
            os.kill(record.process.pid, signal.SIGCONT)
        while (expelled := benchfs("status", silent)).code == 0:  # it has to come back to be told
            assert time.monotonic() < deadline
    assert expelled.code == 3 and "expelled: daemon" in expelled.out
    benchfs("umount", silent, "--force")
    succeeds("down", mnt)


@shows("daemon.listen")
def test_daemons_are_met_where_they_listen(place: Path) -> None:
    mnt, data = place / "mnt", place / "data"

    def hosts() -> set[str]:
        with Registry(data / "registry") as registry:
            entries = [registry.find(number) for number in range(registry.cluster.daemons)]
        return {entry.address.rpartition(":")[0] for entry in entries if entry is not None}

    succeeds("up", mnt, "--data-dir", data)
    assert hosts() == {"127.0.0.1"}
    succeeds("down", mnt)
    succeeds("up", mnt, "--data-dir", data, env={"BENCHFS_DAEMON_LISTEN": "127.0.0.2"})
    assert hosts() == {"127.0.0.2"}
    succeeds("down", mnt)


# ── cluster, and which source wins ───────────────────────────────────────────────────────────────────────────────────


@shows("cluster.chunk_size")
def test_files_are_cut_by_the_clusters_chunk_size(place: Path) -> None:
    mnt, data = place / "mnt", place / "data"
    succeeds("up", mnt, "--data-dir", data, "--chunk-size", "64K")
    (mnt / "f").write_bytes(bytes(100_000))
    found = json.loads(succeeds("layout", mnt / "f", "--json").out)
    assert (found["chunk_size"], found["count"]) == (65536, 2)
    succeeds("down", mnt)


def test_the_command_line_goes_before_the_environment_before_the_file_before_the_default(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('[cluster]\nchunk_size = "1M"\n')
    settings, environ = ["--config", "settings.toml"], {"BENCHFS_CLUSTER_CHUNK_SIZE": "512K"}
    for number, (words, env, size) in enumerate(
        (
            ([], {}, 4 << 20),
            (settings, {}, 1 << 20),
            ([], {"BENCHFS_CONFIG": "settings.toml"}, 1 << 20),
            (settings, environ, 512 << 10),
            ([*settings, "--chunk-size", "256K"], environ, 256 << 10),
        )
    ):
        succeeds("init", f"registry{number}", "--daemons", "1", *words, env=env, cwd=tmp_path)
        assert json.loads((tmp_path / f"registry{number}" / "cluster.json").read_text())["chunk_size"] == size


def test_every_source_reaches_the_mount_process(cluster: Cluster, place: Path) -> None:
    """The mount runs elsewhere than the command: relative paths and all sources have to arrive."""
    mnt = place / "mnt"
    (place / "settings.toml").write_text("[mount]\nxattr = false\n")
    file = {"BENCHFS_CONFIG": "settings.toml"}
    on, off = {"BENCHFS_MOUNT_XATTR": "on"}, {"BENCHFS_MOUNT_XATTR": "off"}
    for words, env, served in (
        ([], {}, True),
        (["--config", "settings.toml"], {}, False),
        ([], file, False),
        (["-o", "config=settings.toml"], {}, False),
        ([], {**file, **on}, True),
        (["--xattr"], {**file, **off}, True),
        (["-o", "noxattr"], on, False),
        (["-o", "noxattr", "--xattr"], off, True),
    ):
        succeeds("mount", mnt, "--registry-dir", cluster.registry, *words, env=env, cwd=place)
        try:
            os.listxattr(mnt)
            assert served, (words, env)
        except OSError as error:
            assert not served and error.errno == errno.EOPNOTSUPP, (words, env)  # noqa: PT017  either is right once
        succeeds("umount", mnt)
    bad = refused("mount", mnt, "--registry-dir", cluster.registry, code=2, env={"BENCHFS_MOUNT_XATTR": "perhaps"})
    assert "environment, BENCHFS_MOUNT_XATTR: mount.xattr cannot be 'perhaps'" in bad


# ── ucx ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def transports(mount: Mount) -> set[str]:
    found = json.loads(succeeds("status", mount.mountpoint, "--json").out)
    return {daemon["transport"] for daemon in found["daemons"]}


@shows("ucx.tls")
def test_tls_narrows_the_transports(mounting: Callable[..., Mount]) -> None:
    assert transports(mounting("--tls=tcp")) == {"tcp"}
    assert transports(mounting()) == {"shm"}


@shows("ucx.net_devices")
@pytest.mark.slow
def test_net_devices_narrows_the_devices(cluster: Cluster, mounting: Callable[..., Mount], place: Path) -> None:
    mount = mounting("--tls=tcp", "--net-devices=lo")
    assert transports(mount) == {"tcp"}
    started = time.monotonic()
    for words in (("--net-devices=none0",), ("--tls=nonsense",)):
        assert "benchfs doctor lists what there is" in refused(
            "mount", place / "mnt", "--registry-dir", cluster.registry, *words
        )
        assert "benchfs doctor lists what there is" in refused(
            "up", place / "mnt", "--data-dir", place / "data", *words
        )
    assert time.monotonic() - started < client.CONNECT_TIMEOUT_S  # nobody has waited for anybody


@shows("ucx.public")
def test_public_lets_a_daemon_listen_to_the_world(tmp_path: Path) -> None:
    init_registry(tmp_path / "registry", 1)
    words = [
        "--registry-dir",
        str(tmp_path / "registry"),
        "--data-dir",
        str(tmp_path / "data"),
        "--listen",
        "10.98.0.1",
    ]
    for more, serves in ((["--no-public"], False), ([], False), (["--public"], True)):
        daemon = Process("benchfs_fuse.daemon", [*words, *more], tmp_path / "log", before=IN_PUBLIC)
        try:
            if serves:
                daemon.wait_ready()
            else:
                with pytest.raises(AssertionError, match=r"8\.8\.4\.4 of outer, which can be reached from the public"):
                    daemon.wait_ready()
        finally:
            daemon.stop()


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_key_has_a_test_of_its_effect() -> None:
    assert _shown == set(config.keys())
