"""Start real clusters for tests: daemons and mounts as processes, everything taken away again whatever happens.

What hangs is freed: a mount that does not leave is aborted through its FUSE connection, then unmounted lazily.
Only processes started here are ended, each by its pid.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fsck import complaints_on_disk
from posix_help import wait_until

from benchfs_fuse import control, kernel_mounts
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.limits import CHUNK_SIZE_DEFAULT
from benchfs_fuse.registry import init_registry
from benchfs_fuse.rpc.messages import BEHIND_REPLIES

#: Seconds that a process gets to end by itself before it is killed.
LEAVE_S = 20.0
#: Seconds for a mount to say how it is, and for daemons to finish what is left to do behind their replies.
ANSWER_S = 60.0
REST_S = 60.0


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have this process told to end when the tests are killed (prctl(2)): nobody else would stop it then."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Process:
    """Run one of our modules until it is told to end; its output is in ``log``."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environ: dict[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        self.log = log
        reader, writer = os.pipe()
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                [*before, sys.executable, "-m", module, *arguments, "--ready-fd", str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[writer],
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509  it makes one system call and takes no lock
                env={**os.environ, **(environ or {})},
            )
        os.close(writer)
        self._ready = reader

    def wait_ready(self) -> None:
        """Wait until the process says that it serves; an AssertionError carries its last words if it ends before."""
        with os.fdopen(self._ready, "rb") as ready:
            said = ready.readline()
        if not said:
            self.popen.wait()
            raise AssertionError(f"ended with code {self.popen.returncode}: {self.log.read_text()}")

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self.popen.pid

    @property
    def alive(self) -> bool:
        """Tell whether the process runs."""
        return self.popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def wait(self, timeout_s: float = LEAVE_S) -> int:
        """Wait for the end; return the exit code."""
        return self.popen.wait(timeout_s)

    def kill(self) -> None:
        """End the process as ``kill -9`` does, and wait until it is gone."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int | None:
        """Ask the process to end, kill it if it does not; return its exit code, None if it had to be killed."""
        if self.alive:
            self.signal(signal.SIGTERM)
            try:
                return self.wait()
            except subprocess.TimeoutExpired:
                self.kill()
                return None
        return self.popen.returncode


class Mount(Process):
    """Mount a cluster somewhere."""

    def __init__(
        self,
        registry: Path,
        mountpoint: Path,
        log: Path,
        arguments: Sequence[str] = (),
        before: Sequence[str] = (),
    ) -> None:
        self.mountpoint = mountpoint
        words = [str(mountpoint), "--registry-dir", str(registry), *arguments]
        super().__init__("benchfs_fuse.mount", words, log, before=before)

    def free(self) -> None:
        """Let everybody go who waits for this mount, and take it away, dead or alive."""
        for mount in kernel_mounts.mounts():
            if mount.mountpoint == self.mountpoint and kernel_mounts.is_benchfs(mount):
                kernel_mounts.abort(mount)
                with contextlib.suppress(OSError):
                    kernel_mounts.detach(self.mountpoint)
        if self.alive:
            self.kill()

    def stop(self) -> int | None:
        """Ask the mount to leave; free it if it does not."""
        code = super().stop()
        self.free()
        return code

    def report(self) -> control.Report:
        """Return what the mount says of itself and of the daemons."""
        record = control.read_record(self.mountpoint)
        assert record is not None
        *_, report = control.ask(record, control.Question("status"), ANSWER_S)
        return report

    def statuses(self) -> list[dict[str, Any]]:
        """Return what the daemons say of themselves, of those that answer."""
        return [daemon.status for daemon in self.report().daemons if daemon.status is not None]


class Cluster:
    """Be one cluster in ``directory``. A context manager. ``planted``: what is wrong with its daemons."""

    def __init__(
        self, directory: Path, daemons: int = 2, *, chunk_size: int = CHUNK_SIZE_DEFAULT, planted: str = ""
    ) -> None:
        self.directory = directory
        self._planted = planted
        self.registry = directory / "registry"
        self.daemons: list[Process] = []
        self.mounts: list[Mount] = []
        self._daemon_count = daemons
        init_registry(self.registry, daemons, chunk_size)

    def __enter__(self) -> "Cluster":
        try:
            self.daemons = [self._spawn_daemon(number) for number in range(self._daemon_count)]
            for daemon in self.daemons:
                daemon.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def data_dir(self, number: int) -> Path:
        """Return where a daemon keeps its data."""
        return self.directory / f"daemon-{number}"

    def _spawn_daemon(self, number: int) -> Process:
        self.data_dir(number).mkdir(mode=0o700, exist_ok=True)
        arguments = ["--registry-dir", str(self.registry), "--data-dir", str(self.data_dir(number))]
        log = self.directory / f"daemon-{number}.log"
        if not self._planted:
            return Process("benchfs_fuse.daemon", arguments, log)
        environ = {"PYTHONPATH": str(Path(__file__).parent), "BENCHFS_PLANTED": self._planted}
        return Process("planted_daemon", arguments, log, environ)

    def restart_daemon(self, number: int) -> None:
        """Start a daemon again over its data directory."""
        assert not self.daemons[number].alive
        self.daemons[number] = self._spawn_daemon(number)
        self.daemons[number].wait_ready()

    def mount(self, *arguments: str) -> Mount:
        """Mount the cluster at a new mount point; return when the mount answers."""
        mountpoint = Path(tempfile.mkdtemp(prefix="mnt-", dir=self.directory))
        mountpoint.chmod(0o755)
        mount = Mount(self.registry, mountpoint, self.directory / f"{mountpoint.name}.log", arguments)
        self.mounts.append(mount)
        mount.wait_ready()
        return mount

    def at_rest(self, mount: Mount) -> bool:
        """Tell, as a mount hears it, whether the daemons have nothing left to do and no unlinked file is open."""
        found = mount.statuses()
        return len(found) == self._daemon_count and not any(one[what] for one in found for what in BEHIND_REPLIES)

    def end(self) -> list[str]:
        """Wait for rest, stop everything in order, and return what is not right in the stores."""
        mount = next((mount for mount in self.mounts if mount.alive), None) or self.mount()
        wait_until(lambda: self.at_rest(mount), REST_S)
        for process in [*self.mounts, *self.daemons]:
            assert process.stop() is not None, "had to be killed"
        data_dirs = [self.data_dir(number) for number in range(self._daemon_count)]
        return complaints_on_disk(data_dirs, ShardMap.round_robin(self._daemon_count))

    def close(self) -> None:
        """Take everything away but the directory."""
        for process in [*self.mounts, *self.daemons]:
            with contextlib.suppress(ProcessLookupError):
                process.stop()


#: Make the disk of a daemon's data directory there.
MakeDisk = Callable[[Path], None]


def tmpfs_of(size: int) -> MakeDisk:
    """Have disks of ``size`` bytes, all for data, on which nobody else takes and gives back space."""

    def mount(path: Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(path)], check=True)

    return mount


@contextlib.contextmanager
def running_cluster(
    daemons: int = 2,
    *,
    chunk_size: int = CHUNK_SIZE_DEFAULT,
    make_disk: MakeDisk | None = None,
    planted: str = "",
) -> Iterator[Cluster]:
    """Run a cluster in a directory of its own, which goes with it; its daemons on disks of their own or on that one."""
    directory = Path(tempfile.mkdtemp(prefix="benchfs-test-"))
    directory.chmod(0o755)  # other users have to reach the mount points in it
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        cluster = Cluster(directory, daemons, chunk_size=chunk_size, planted=planted)
        for number in range(daemons if make_disk is not None else 0):
            assert make_disk is not None
            path = cluster.data_dir(number)
            path.mkdir(mode=0o700)
            make_disk(path)
            stack.callback(subprocess.run, ["umount", "-l", str(path)], check=True)
        yield stack.enter_context(cluster)
