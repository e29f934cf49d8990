"""The mount process from outside: real daemons, a real mount, signals, the control socket, and bad mount points."""

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from cluster import Cluster, Mount, running_cluster

from benchfs_fuse import control, kernel_mounts
from benchfs_fuse.client import FileSystem, open_cluster
from benchfs_fuse.errors import NotFound, UserError
from benchfs_fuse.limits import MIB

#: Seconds that a question to a mount process may take.
ASK_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def mount(cluster: Cluster) -> Iterator[Mount]:
    mount = cluster.mount()
    yield mount
    mount.stop()


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


def refused(cluster: Cluster, mountpoint: Path, *arguments: str) -> str:
    """Try to mount; return the one sentence that says why not."""
    done = subprocess.run(
        [sys.executable, "-m", "benchfs_fuse.mount", mountpoint, "--registry-dir", cluster.registry, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("benchfs: ") and "Traceback" not in done.stderr
    return sentence


def record_of(mount: Mount) -> control.MountRecord:
    record = control.read_record(mount.mountpoint)
    assert record is not None and record.process.pid == mount.pid
    return record


@pytest.mark.slow
def test_daemons_that_are_busy_do_not_fail_a_mount(tmp_path: Path) -> None:
    with Cluster(tmp_path, planted="busy") as cluster:
        assert os.statvfs(cluster.mount().mountpoint).f_blocks > 0


def test_copies_come_back_as_they_were(mount: Mount, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(9 * MIB + 17))
    run("cp", source, mount.mountpoint / "copy")
    run("dd", f"if={source}", f"of={mount.mountpoint / 'dd'}", "bs=1M", "oflag=direct", "conv=fsync")
    run("dd", f"if={mount.mountpoint / 'copy'}", f"of={tmp_path / 'back'}", "bs=64k", "iflag=direct")
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (source, mount.mountpoint / "copy", mount.mountpoint / "dd", tmp_path / "back")
    ]
    assert len(set(digests)) == 1
    assert (mount.mountpoint / "copy").stat().st_blocks * 512 >= 9 * MIB


def test_what_mount_and_df_show(cluster: Cluster, mount: Mount) -> None:
    found = kernel_mounts.find(mount.mountpoint)
    record = record_of(mount)
    assert found is not None and (found.fstype, found.source) == ("fuse.benchfs", f"benchfs#{record.cluster_id}")
    total = os.statvfs(mount.mountpoint)
    below = os.statvfs(cluster.directory)
    assert total.f_blocks * total.f_frsize == below.f_blocks * below.f_frsize  # two daemons, one file system


def test_the_control_socket_answers(mount: Mount) -> None:
    record = record_of(mount)
    with (mount.mountpoint / "f").open("wb", buffering=0) as file:
        file.write(b"x" * 1000)
        (left,) = control.ask(record, control.Question("left"), ASK_S)
        assert (left.handles, left.files, left.dirty_files, left.accepted_bytes) == (1, 1, 1, 1000)
        *_, drained = control.ask(record, control.Question("drain"), ASK_S)
        assert (drained.dirty_files, drained.accepted_bytes) == (0, 0)
    (status,) = control.ask(record, control.Question("status"), ASK_S)
    assert [daemon.daemon_id for daemon in status.daemons] == [0, 1]
    for daemon in status.daemons:
        assert daemon.connected and daemon.status is not None and daemon.transport
        assert daemon.status["daemon_id"] == daemon.daemon_id


def test_sigterm_flushes_unmounts_and_leaves(cluster: Cluster) -> None:
    first, second = cluster.mount(), cluster.mount()
    with (first.mountpoint / "late").open("wb", buffering=0) as file:
        file.write(b"in time")
        first.signal(signal.SIGTERM)
        assert first.wait() == 0
        with contextlib.suppress(OSError):  # the mount has gone from under it
            file.close()
    assert kernel_mounts.find(first.mountpoint) is None and control.read_record(first.mountpoint) is None
    assert (second.mountpoint / "late").read_bytes() == b"in time"
    second.stop()


def test_unmounting_from_outside_ends_the_process(cluster: Cluster) -> None:
    mount = cluster.mount()
    (mount.mountpoint / "f").write_bytes(b"x")
    kernel_mounts.unmount(mount.mountpoint)
    assert mount.wait() == 0
    assert control.read_record(mount.mountpoint) is None


def test_a_second_mount_says_once_what_does_not_hold(cluster: Cluster) -> None:
    said = "locks (flock, fcntl) hold within one mount only"
    with contextlib.ExitStack() as stack:
        first, second, third = (cluster.mount(*words) for words in ([], ["--no-locks"], ["--no-companion"]))
        for mount in (first, second, third):
            stack.callback(mount.stop)
        assert said not in first.log.read_text()
        for mount in (second, third):
            assert mount.log.read_text().count(said) == 1
            assert str(first.mountpoint) in mount.log.read_text()


def test_bad_mount_points(cluster: Cluster, mount: Mount, tmp_path: Path) -> None:
    assert "does not exist" in refused(cluster, tmp_path / "none")
    (tmp_path / "file").touch()
    assert "is not a directory" in refused(cluster, tmp_path / "file")
    assert "is mounted already" in refused(cluster, mount.mountpoint)
    assert "lies inside the mount point" in refused(cluster, cluster.directory)
    mounted = kernel_mounts.find(mount.mountpoint)
    assert mounted is not None and mount.alive


def test_a_mount_point_that_a_dead_mount_left_broken_is_cleaned_up(cluster: Cluster) -> None:
    dead = cluster.mount()
    dead.kill()
    with pytest.raises(OSError, match="not connected"):
        os.statvfs(dead.mountpoint)
    again = Mount(cluster.registry, dead.mountpoint, cluster.directory / "again.log")
    try:
        again.wait_ready()
        (again.mountpoint / "f").write_bytes(b"x")
        assert (again.mountpoint / "f").read_bytes() == b"x"
    finally:
        again.stop()


def test_a_registry_that_is_none(tmp_path: Path, cluster: Cluster) -> None:
    (tmp_path / "mnt").mkdir()
    assert "there is no registry" in refused(cluster, tmp_path / "mnt", "--registry-dir", str(tmp_path / "none"))


def test_read_only_and_options_of_the_kernel(cluster: Cluster) -> None:
    mount = cluster.mount("-o", "ro", "-o", "noexec")
    with pytest.raises(OSError, match="Read-only"):
        (mount.mountpoint / "f").touch()
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(mount.mountpoint) in line)
    assert {"ro", "noexec", "nosuid", "nodev", "default_permissions"} <= set(line.split()[3].split(","))
    mount.stop()


async def test_a_program_without_fuse_sees_the_same_files(cluster: Cluster, mount: Mount) -> None:
    (mount.mountpoint / "made by the mount").write_bytes(b"1" * 100_000)

    async def visit() -> None:
        async with open_cluster(cluster.registry) as fs:
            async with await fs.open("/made by the mount") as file:
                buffer = bytearray(200_000)
                assert await file.read_into(buffer, 0) == 100_000
                assert buffer[:100_000] == b"1" * 100_000
            async with await fs.open("/made by the program", os.O_RDWR | os.O_CREAT) as file:
                await file.write(b"2" * 10_000_000, 0)
            assert b"made by the mount" in await fs.listdir()
            await fs.stat("/none")

    with pytest.raises(NotFound):  # by itself, not in a group
        await visit()
    assert (mount.mountpoint / "made by the program").read_bytes() == b"2" * 10_000_000
    assert (mount.mountpoint / "made by the program").stat().st_uid == os.geteuid()


async def test_what_a_program_wrote_is_flushed_though_it_fails_or_is_cancelled(cluster: Cluster, mount: Mount) -> None:
    async def write(fs: FileSystem, name: str) -> None:
        await (await fs.open(f"/{name}", os.O_RDWR | os.O_CREAT)).write(name.encode(), 0)

    async def fail() -> None:
        async with open_cluster(cluster.registry) as fs:
            await write(fs, "failed")
            raise RuntimeError("the program's own")

    with pytest.raises(RuntimeError, match="the program's own"):
        await fail()
    with trio.CancelScope() as scope:
        async with open_cluster(cluster.registry) as fs:
            await write(fs, "cancelled")
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    for name in ("failed", "cancelled"):
        assert (mount.mountpoint / name).read_bytes() == name.encode()


async def test_a_program_is_told_in_a_sentence_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no registry"):
        async with open_cluster(tmp_path):
            pass


def test_settings_of_a_mount_have_an_effect(cluster: Cluster) -> None:
    slow = cluster.mount("--attr-timeout", "0", "--no-xattr", "--noatime", "--gather-bytes-max", "0")
    fast = cluster.mount()
    path = slow.mountpoint / "f"
    path.write_bytes(b"x")
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(path, "user.a", b"1")
    os.utime(path, ns=(1, 2))
    with path.open("rb") as file:
        file.read()
    assert path.stat().st_atime_ns == 1
    os.chmod(fast.mountpoint / "f", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600  # at once, from no cache
    with path.open("wb", buffering=0) as file:
        file.write(b"y" * 1000)
        (left,) = control.ask(record_of(slow), control.Question("left"), ASK_S)
        assert left.accepted_bytes == 0
    with (fast.mountpoint / "f").open("rb") as file:
        file.read()
    assert (fast.mountpoint / "f").stat().st_atime_ns > 1
    slow.stop()
    fast.stop()


def test_an_operation_that_needs_a_dead_daemon_fails_in_time(cluster: Cluster) -> None:
    mount = cluster.mount("--op-timeout", "1", "--attr-timeout", "0")
    for number in range(4):
        (mount.mountpoint / f"d{number}").mkdir()
    cluster.daemons[1].kill()
    began = time.monotonic()
    answers = []
    for number in range(4):
        try:
            (mount.mountpoint / f"d{number}" / "none").exists()
            answers.append(0)
        except OSError as error:
            answers.append(error.errno or -1)
    assert set(answers) <= {0, errno.EIO} and errno.EIO in answers
    assert time.monotonic() - began < 30
    cluster.restart_daemon(1)
    for number in range(4):
        (mount.mountpoint / f"d{number}").rmdir()
    mount.stop()


def test_a_killed_daemon_comes_back_and_nothing_is_lost(cluster: Cluster, mount: Mount) -> None:
    path = mount.mountpoint / "survivor"
    with path.open("wb", buffering=0) as file:
        file.write(b"before ")
        os.fsync(file.fileno())
        for number in range(2):
            cluster.daemons[number].kill()
            cluster.restart_daemon(number)
        file.write(b"after")
    assert path.read_bytes() == b"before after"
