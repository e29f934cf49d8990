"""Run the cluster that is tortured: daemons and mounts below one directory, killed and started again as often as asked.

Everything that was started is this process's child: a child that was killed is reaped here.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from .. import control, kernel_mounts
from ..commands.mounting import start_mount, unmount
from ..errors import UserError
from ..hosts import Cable, Star, Way
from ..limits import CHUNK_SIZE_MIN, MIB
from ..processes import ProcessId, Starting, alive, end, wait_ready
from ..registry import Registry, init_registry
from ..rpc.messages import BEHIND_REPLIES

#: Seconds that a daemon may take to stop in order, and a mount to flush and leave.
STOP_S = 30.0
#: Bytes of a small disk: the journal, the store with its reserve, and the files of a dozen workers fit in.
DISK_SIZE = 64 * MIB
#: Seconds for what is to come soon, on however slow a machine, and between two looks whether it has: nobody tells.
SOON_S = 60.0
LOOK_S = 0.1
#: Workers are never told EIO because a daemon is being started anew, on however slow a machine; what hangs ends.
OP_TIMEOUT_S = 300


def wait_until(condition: Callable[[], bool], timeout_s: float = SOON_S) -> bool:
    """Look again and again whether something is so that nobody tells of; tell whether it came in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(LOOK_S)
    return True


class Pair(NamedTuple):
    """Be a mount and a daemon, as far as they reach each other."""

    mount: Path
    daemon: int


class LocalCluster:
    """Be daemons, and mounts of them, below ``directory``, which exists. A context manager: at its end all are gone.

    With ``lease_s``, every daemon and every mount lives on a host of its own, behind a cable that can be cut, and that
    is the daemons' lease. Mounts are seen from here all the same.
    """

    def __init__(
        self,
        directory: Path,
        *,
        daemons: int,
        mounts: int,
        daemon_module: str,
        small_disks: bool = False,
        lease_s: float | None = None,
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
        self._small_disks = small_disks
        self._lease_s = lease_s
        #: The hosts: the daemons' in their order, then the mounts'.
        self._star: Star | None = None
        #: What lies below the processes.
        self._below = ExitStack()

    def __enter__(self) -> "LocalCluster":
        try:
            if self._lease_s is not None:
                self._below.enter_context(_shared_mount(self.directory))
                names = [path.name for path in (*self.data_dirs, *self.mountpoints)]
                self._star = self._below.enter_context(Star(names, shares_mounts=True))
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
        _run("cannot make a small disk", "mkfs.ext4", "-q", str(image))
        _run("cannot make a small disk", "mount", "-o", "loop", str(image), str(path))
        self._below.callback(_detach, path)
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
        if self._star is None:
            return Starting(self._daemon_module, [*words, "--listen=127.0.0.1"], log)
        words += [f"--listen={self._star.addresses[number]}", "--tls=tcp", f"--lease={self._lease_s}"]
        return Starting(self._daemon_module, words, log, self._star.hosts[number].enter)

    def _start_mount(self, path: Path) -> Starting:
        log = self.directory / f"{path.name}.log"
        words = [f"--op-timeout={OP_TIMEOUT_S}"]
        if self._star is None:
            return start_mount(path, self.registry, log, words)
        return start_mount(path, self.registry, log, [*words, "--tls=tcp"], self._star.hosts[self._host(path)].enter)

    def kill(self, daemons: Sequence[int], mountpoints: Sequence[Path]) -> list[ProcessId]:
        """End processes as ``kill -9`` does, all at once, and wait until the daemons are gone; return the mounts'.

        A mount may have to be freed first, which the next one does at its place.
        """
        gone = [self._daemons[number] for number in daemons]
        killed = [self._mounts[path] for path in mountpoints]
        for process in gone + killed:
            os.kill(process.pid, signal.SIGKILL)
        for process in gone:
            os.waitpid(process.pid, 0)
        self._killed += killed
        return killed

    def dead(self) -> list[str]:
        """Name what should run and does not."""
        names = {self.data_dirs[number].name: process for number, process in self._daemons.items()}
        names |= {path.name: process for path, process in self._mounts.items()}
        return [name for name, process in names.items() if not alive(process)]

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, path: Path) -> control.Report | None:
        """Ask a mount how it is, and its daemons; None if there is none. UserError: it does not answer."""
        record = control.read_record(path)
        if record is None:
            return None
        *_, report = control.ask(record, control.Question("status"), STOP_S)
        return report

    def _said(self, path: Path) -> list[dict[str, Any]] | None:
        """Return what all daemons say of themselves, as a mount hears it; None if one of them says nothing."""
        report = self.ask(path)
        found = [daemon.status for daemon in report.daemons if daemon.status is not None] if report is not None else []
        return cast(list[dict[str, Any]], found) if len(found) == len(self.data_dirs) else None

    def at_rest(self) -> bool:
        """Tell whether the daemons have nothing left to do behind the service. UserError: the mount does not answer."""
        found = self._said(self.mountpoints[0])
        return found is not None and not any(one[what] for one in found for what in BEHIND_REPLIES)

    def process_of(self, path: Path) -> ProcessId:
        """Return the process of a mount that was started."""
        return self._mounts[path]

    def sessions_over(self, mounts: Iterable[ProcessId], asked: Path) -> bool:
        """Tell whether all daemons have dealt with the end of what these processes had, asked over another mount.

        Nothing that those had sent is done after that.
        """
        found, pids = self._said(asked), {process.pid for process in mounts}
        return found is not None and not any(one["pid"] in pids for said in found for one in said["sessions"])

    def holds(self, pair: Pair, asked: Path) -> bool:
        """Tell whether a mount has anything open at a daemon, which is asked over another mount."""
        found, pid = self._said(asked), self._mounts[pair.mount].pid
        return found is not None and any(one["pid"] == pid and one["opens"] for one in found[pair.daemon]["sessions"])

    def chunk_files(self) -> list[Path]:
        """List the chunk files of all daemons."""
        return [path for data_dir in self.data_dirs for path in (data_dir / "chunks").glob("*/*")]

    # ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _host(self, place: int | Path) -> int:
        """Return the host of a daemon or of a mount."""
        return place if isinstance(place, int) else len(self.data_dirs) + self.mountpoints.index(place)

    def cable(self, place: int | Path) -> Cable:
        """Return the cable of the host of a daemon or of a mount."""
        assert self._star is not None
        return self._star.cables[self._host(place)]

    def way(self, pair: Pair) -> Way:
        """Return the way between the hosts of a mount and of a daemon."""
        assert self._star is not None
        return self._star.way(self._host(pair.mount), self._host(pair.daemon))

    def passes(self, place: int | Path | Pair) -> bool:
        """Tell whether a connection can be made to the host of a daemon, or from that of a mount to a daemon."""
        assert self._star is not None
        match place:
            case Pair(mount=from_, daemon=daemon):
                pass
            case int(daemon):
                from_ = self.mountpoints[0]
            case Path() as from_:
                daemon = 0
        with Registry(self.registry) as registry:
            entry = registry.find(daemon)
        return entry is not None and self._star.hosts[self._host(from_)].reaches(entry.address)

    def parted(self, pair: Pair) -> bool:
        """Tell whether no connection can be made between these two, while the mount reaches all other daemons."""
        others = (Pair(pair.mount, other) for other in range(len(self.data_dirs)) if other != pair.daemon)
        return not self.passes(pair) and all(self.passes(other) for other in others)

    @property
    def enter(self) -> list[str]:
        """Return the words in front of a command that is to reach the daemons."""
        return self._star.hosts[-1].enter if self._star is not None else []

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
        self._below.close()


@contextmanager
def _shared_mount(path: Path) -> Iterator[None]:
    """Have what is mounted below a directory seen by all hosts, and from here. UserError."""
    _run("cannot share mounts", "mount", "--bind", str(path), str(path))
    try:
        # Of its own: whoever shares the file system that the directory lies in has no part in it.
        _run("cannot share mounts", "mount", "--make-private", str(path))
        _run("cannot share mounts", "mount", "--make-shared", str(path))
        yield
    finally:
        _detach(path)


def _detach(path: Path) -> None:
    _run(f"cannot take away what is mounted at {path}", "umount", "--lazy", str(path))


def _run(trouble: str, *command: str) -> None:
    """Run a command that Ctrl-C does not end. UserError."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, start_new_session=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise UserError(f"{trouble}: {why}") from None
