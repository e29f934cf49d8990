"""Run the cluster that is tortured: daemons and mounts below one directory, killed and started again as often as asked.

Everything that was started is this process's child: a child that was killed is reaped here.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import control, kernel_mounts
from ..commands.mounting import start_mount, unmount
from ..errors import UserError
from ..limits import CHUNK_SIZE_MIN, MIB
from ..processes import ProcessId, Starting, alive, end, wait_ready
from ..registry import init_registry

#: Seconds that a daemon may take to stop in order, and a mount to flush and leave.
STOP_S = 30.0
#: Bytes of a small disk: the journal, the store with its reserve, and the files of a dozen workers fit in.
DISK_SIZE = 64 * MIB
#: Workers are never told EIO because a daemon is being started anew, on however slow a machine; what hangs ends.
OP_TIMEOUT_S = 300


class LocalCluster:
    """Be daemons, and mounts of them, below ``directory``, which exists. A context manager: at its end all are gone."""

    def __init__(
        self, directory: Path, *, daemons: int, mounts: int, daemon_module: str, small_disks: bool = False
    ) -> None:
        self.directory = directory
        self.registry = directory / "registry"
        self.mountpoints = [directory / f"mount-{number}" for number in range(mounts)]
        self._daemon_module = daemon_module
        self._daemons: dict[int, ProcessId] = {}
        self._mounts: dict[Path, ProcessId] = {}
        #: Mounts that were killed and are not reaped.
        self._killed: list[ProcessId] = []
        self.data_dirs = [directory / f"daemon-{number}" for number in range(daemons)]
        init_registry(self.registry, daemons, CHUNK_SIZE_MIN)
        for path in (*self.mountpoints, *self.data_dirs):
            path.mkdir(mode=0o700)
        #: Disks that have to be taken away.
        self._disks: list[Path] = []
        self._small_disks = small_disks

    def __enter__(self) -> "LocalCluster":
        try:
            for data_dir in self.data_dirs if self._small_disks else []:
                self._make_disk(data_dir)
            self.start(range(len(self.data_dirs)), self.mountpoints)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _make_disk(self, path: Path) -> None:
        """Mount a small file system of its own. UserError."""
        image = path.with_suffix(".image")
        with image.open("wb") as file:
            file.truncate(DISK_SIZE)
        for command in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(path)]):
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
                raise UserError(f"cannot make a small disk: {why}") from None
        self._disks.append(path)
        path.chmod(0o700)

    # ── starting and killing ─────────────────────────────────────────────────────────────────────────────────────────

    def start(self, daemons: Iterable[int], mountpoints: Iterable[Path]) -> None:
        """Start what does not run; return when all of it serves. UserError: something ended instead."""
        starting_daemons = {number: self._start_daemon(number) for number in daemons}
        starting_mounts = {path: self._start_mount(path) for path in mountpoints}
        ready = wait_ready([*starting_daemons.values(), *starting_mounts.values()])
        self._daemons |= {number: ready[one] for number, one in starting_daemons.items()}
        self._mounts |= {path: ready[one] for path, one in starting_mounts.items()}
        while self._killed:
            os.waitpid(self._killed.pop().pid, 0)

    def _start_daemon(self, number: int) -> Starting:
        data_dir = self.data_dirs[number]
        words = [f"--registry-dir={self.registry}", f"--data-dir={data_dir}", f"--daemon-id={number}"]
        log = self.directory / f"{data_dir.name}.log"
        return Starting(self._daemon_module, [*words, "--listen=127.0.0.1"], log)

    def _start_mount(self, path: Path) -> Starting:
        log = self.directory / f"{path.name}.log"
        return start_mount(path, self.registry, log, [f"--op-timeout={OP_TIMEOUT_S}"])

    def kill(self, daemons: Sequence[int], mountpoints: Sequence[Path]) -> None:
        """End processes as ``kill -9`` does, all at once, and wait until the daemons are gone.

        A mount may have to be freed first, which the next one does at its place.
        """
        gone = [self._daemons[number] for number in daemons]
        killed = [self._mounts[path] for path in mountpoints]
        for process in gone + killed:
            os.kill(process.pid, signal.SIGKILL)
        for process in gone:
            os.waitpid(process.pid, 0)
        self._killed += killed

    def dead(self) -> list[str]:
        """Name what should run and does not."""
        names = {self.data_dirs[number].name: process for number, process in self._daemons.items()}
        names |= {path.name: process for path, process in self._mounts.items()}
        return [name for name, process in names.items() if not alive(process)]

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def at_rest(self) -> bool:
        """Tell whether the daemons have nothing left to do behind the service. UserError: the mount does not answer."""
        record = control.read_record(self.mountpoints[0])
        if record is None:
            return False
        *_, report = control.ask(record, control.Question("status"), STOP_S)
        found = [daemon.status for daemon in report.daemons if daemon.status is not None]
        idle = not any(one[what] for one in found for what in ("orphans", "to_drop", "prepared", "grace"))
        return idle and len(found) == len(self.data_dirs)

    def chunk_files(self) -> list[Path]:
        """List the chunk files of all daemons."""
        return [path for data_dir in self.data_dirs for path in (data_dir / "chunks").glob("*/*")]

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def unmount(self, path: Path) -> None:
        """Flush and unmount, as ``benchfs umount`` does. UserError: it could not be, or something was lost."""
        unmount(path, timeout_s=STOP_S)
        self._reap(self._mounts.pop(path))

    def stop(self) -> list[str]:
        """Unmount everything and stop the daemons in order; say what did not work."""
        complaints = []
        for path in list(self._mounts):
            try:
                self.unmount(path)
            except UserError as error:
                complaints.append(str(error))
        killed = end(self._daemons.values(), STOP_S)
        complaints += [f"daemon {number} did not stop" for number, one in self._daemons.items() if one in killed]
        for process in self._daemons.values():
            self._reap(process)
        self._daemons.clear()
        return complaints

    @staticmethod
    def _reap(process: ProcessId) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)

    def close(self) -> None:
        """End everything, whatever state it is in, but keep the directory."""
        for path in self.mountpoints:
            mounted = kernel_mounts.find(path)
            if mounted is not None and kernel_mounts.is_benchfs(mounted):
                kernel_mounts.abort(mounted)
                with contextlib.suppress(OSError):
                    kernel_mounts.detach(path)
        left = [*self._mounts.values(), *self._daemons.values(), *self._killed]
        end(left, 0)
        for process in left:
            self._reap(process)
        for path in self.mountpoints:
            control.remove_record(path)
        while self._disks:
            subprocess.run(["umount", "--lazy", str(self._disks.pop())], check=True)
