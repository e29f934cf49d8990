"""Run a whole cluster on this machine: ``benchfs up`` and ``benchfs down``.

Everything lies in one directory, which outlives the cluster:

    registry/           the registry directory
    daemon-0/ …         the data directories
    daemon-0.log …      what the daemons and the mount said
    mount.log
    cluster.json        which processes run now (LocalCluster)

A link in the runtime directory leads from the mount point to it, from the first start of ``up`` to the end of ``down``:
what was left by a killed ``up`` is found and taken down too.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import msgspec

from .. import control, mountpoints
from ..errors import UserError
from ..mountpoints import Place, State
from ..processes import ProcessId, Starting, alive, end, private, uninterrupted, wait_ready
from ..registry import Registry, init_registry
from ..runtime import file_for
from .mounting import FORCE_LEAVE_S, start_mount, tell, unmount

DAEMONS_DEFAULT = 2
#: Seconds for a daemon that was asked to stop: it finishes its requests and closes its stores, which takes
#: milliseconds. One that needs longer than this is stuck.
DAEMON_STOP_S = 20.0


class LocalCluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Remember what ``up`` started: the mount point and the daemons by number."""

    mountpoint: str
    daemons: tuple[ProcessId | None, ...]

    @property
    def running(self) -> list[ProcessId]:
        """Return the daemons that run."""
        return [process for process in self.daemons if process is not None and alive(process)]


class Wanted(NamedTuple):
    """Say what cluster to bring up where. ``data_dir`` None: what is up there, or the default place."""

    mountpoint: Path
    data_dir: Path | None
    #: Number of daemons; None: as many as there are, in a new cluster DAEMONS_DEFAULT.
    daemons: int | None
    #: Bytes, for a new cluster.
    chunk_size: int
    #: Refuse an existing cluster of another chunk size.
    chunk_size_matters: bool
    daemon_arguments: Sequence[str]
    mount_arguments: Sequence[str]


def default_data_dir(mountpoint: Path) -> Path:
    """Return where the local cluster of a mount point keeps its data unless told otherwise."""
    name = str(mountpoint).strip("/").replace("/", "-") or "root"
    if os.geteuid() == 0:
        return Path("/var/lib/benchfs") / name
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "benchfs" / name


# ── what is remembered ───────────────────────────────────────────────────────────────────────────────────────────────


def _link(mountpoint: Path) -> Path:
    return file_for(mountpoint, ".up")


def data_dir_of(mountpoint: Path) -> Path | None:
    """Return the data directory of the local cluster that is up at a mount point, or was when its end came.

    ``mountpoint`` is a plain path.
    """
    try:
        return _link(mountpoint).readlink()
    except FileNotFoundError:
        return None


def _read(data_dir: Path) -> LocalCluster | None:
    try:
        return msgspec.json.decode((data_dir / "cluster.json").read_bytes(), type=LocalCluster)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise UserError(f"{data_dir}/cluster.json is damaged ({error}); remove it if no daemon runs there") from None


def _write(data_dir: Path, cluster: LocalCluster) -> None:
    new = data_dir / "cluster.json.new"
    with open(new, "wb", opener=private) as file:
        file.write(msgspec.json.encode(cluster))
    new.rename(data_dir / "cluster.json")


@contextlib.contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """Let only one ``up`` or ``down`` at a data directory; others wait until it is done."""
    fd = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# ── up ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def up(wanted: Wanted) -> Path:
    """Start what does not run yet: daemons, mount. Return the data directory.

    UserError when it cannot be: then nothing that this call has started is left, but the data.
    """
    place = mountpoints.look(wanted.mountpoint)
    linked = data_dir_of(place.path)
    data_dir = (wanted.data_dir or linked or default_data_dir(place.path)).resolve()
    _refuse_strangers(place, data_dir, linked)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(data_dir):
            place = mountpoints.look(place.path)  # somebody else may just have been at it
            _refuse_strangers(place, data_dir, data_dir_of(place.path))
            _bring_up(place, data_dir, wanted)
    except OSError as error:
        raise UserError(f"cannot use {error.filename or data_dir}: {error.strerror}") from None
    return data_dir


def _refuse_strangers(place: Place, data_dir: Path, linked: Path | None) -> None:
    """Refuse a mount point or a data directory that another cluster or mount point uses. UserError."""
    path = place.path
    if data_dir.is_relative_to(path):
        raise UserError(f"the data directory {data_dir} lies inside the mount point {path}, where it would be hidden")
    if linked is not None and linked != data_dir and (there := _read(linked)) is not None and there.running:
        raise UserError(f"the cluster in {linked} is up at {path}; take it down first: benchfs down {path}")
    if place.state is State.SERVED:
        _, record = place.served()
        if record.registry != str(data_dir / "registry"):
            raise UserError(
                f"{path} is mounted already, from the registry {record.registry}; unmount it first: "
                f"benchfs umount {path}"
            )
    elif place.state is State.FOREIGN:
        raise UserError(f"{path} is mounted already; unmount it first: benchfs umount {path}")
    elif place.state is not State.DEAD:
        mountpoints.check_directory(path)
    before = _read(data_dir)
    if before is not None and before.mountpoint != str(path) and before.running:
        raise UserError(
            f"the cluster in {data_dir} is up at {before.mountpoint}; to mount it twice run: "
            f"benchfs mount {path} --registry-dir {data_dir / 'registry'}"
        )


def _form(data_dir: Path, wanted: Wanted) -> list[Path]:
    """Form the cluster if the directory is new; return the data directories of its daemons. UserError."""
    registry = data_dir / "registry"
    if not registry.exists():
        init_registry(registry, wanted.daemons or DAEMONS_DEFAULT, wanted.chunk_size)
    with Registry(registry) as found:
        cluster = found.cluster
    if wanted.daemons not in (None, cluster.daemons):
        raise UserError(
            f"{data_dir} holds a cluster of {cluster.daemons} daemons, not {wanted.daemons}: leave --daemons out, or "
            f"choose another --data-dir"
        )
    if wanted.chunk_size_matters and wanted.chunk_size != cluster.chunk_size:
        raise UserError(
            f"{data_dir} holds a cluster with chunks of {cluster.chunk_size} bytes: leave --chunk-size out, set "
            f"another for a directory (setfattr -n user.benchfs.chunk_size), or choose another --data-dir"
        )
    folders = [data_dir / f"daemon-{index}" for index in range(cluster.daemons)]
    for folder in folders:
        folder.mkdir(mode=0o700, exist_ok=True)
    return folders


def _bring_up(place: Place, data_dir: Path, wanted: Wanted) -> None:
    folders = _form(data_dir, wanted)
    registry = data_dir / "registry"
    before = _read(data_dir)
    running: list[ProcessId | None] = list(before.daemons) if before is not None else [None] * len(folders)
    link, was_linked = _link(place.path), data_dir_of(place.path)
    if was_linked != data_dir:
        link.unlink(missing_ok=True)
        link.symlink_to(data_dir)
    starting: list[Starting] = []
    try:
        for index, folder in enumerate(folders):
            process = running[index]
            if process is not None and alive(process):
                continue
            arguments = [f"--registry-dir={registry}", f"--data-dir={folder}", f"--daemon-id={index}"]
            with uninterrupted():
                one = Starting("benchfs_fuse.daemon", [*arguments, *wanted.daemon_arguments], _log_of(folder))
                starting.append(one)
                running[index] = one.process
                _write(data_dir, LocalCluster(str(place.path), tuple(running)))
        if place.state is not State.SERVED:
            # Together with the daemons: it waits for them, and says at once what is wrong with the mount point.
            with uninterrupted():
                starting.append(start_mount(place.path, registry, data_dir / "mount.log", wanted.mount_arguments))
        wait_ready(starting)
    except BaseException:
        for one in starting:
            one.stop()
        if was_linked is None:
            link.unlink(missing_ok=True)
        raise


def _log_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".log")


# ── down ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def down(mountpoint: Path, force: bool) -> None:
    """Unmount and stop the daemons; the data stays. ``mountpoint`` is a plain path.

    UserError: no local cluster is up there; it is in use, then it stays up; with ``force``, what was lost.
    """
    data_dir = data_dir_of(mountpoint)
    if data_dir is None:
        raise UserError(f"no local cluster is up at {mountpoint} (benchfs up {mountpoint} starts one)")
    if not data_dir.is_dir():
        _link(mountpoint).unlink()
        raise UserError(f"the data directory {data_dir} of the cluster at {mountpoint} has gone")
    with _alone(data_dir), contextlib.ExitStack() as afterwards:
        if force:
            afterwards.callback(_stop, mountpoint, data_dir, FORCE_LEAVE_S)
            unmount(mountpoint, force=True, missing_ok=True)
        else:
            _refuse_other_mounts(mountpoint, data_dir)
            unmount(mountpoint, missing_ok=True)
            _stop(mountpoint, data_dir, DAEMON_STOP_S)


def _refuse_other_mounts(mountpoint: Path, data_dir: Path) -> None:
    """Refuse to stop daemons that another mount needs. UserError names it."""
    for record in control.records():
        ours = record.registry == str(data_dir / "registry") and record.mountpoint != str(mountpoint)
        if ours and alive(record.process):
            raise UserError(
                f"the cluster at {mountpoint} is mounted at {record.mountpoint} too; unmount that first: "
                f"benchfs umount {record.mountpoint}"
            )


def _stop(mountpoint: Path, data_dir: Path, timeout_s: float) -> None:
    cluster = _read(data_dir)
    if cluster is not None:
        for process in end(cluster.running, timeout_s):
            tell(f"daemon {process.pid} did not stop in {timeout_s:g} s: killed")
        (data_dir / "cluster.json").unlink(missing_ok=True)
    _link(mountpoint).unlink(missing_ok=True)


# ── up -- COMMAND ────────────────────────────────────────────────────────────────────────────────────────────────────


def run_under(mountpoint: Path, command: Sequence[str]) -> int:
    """Run a command, then take the cluster down, whatever happens; return the command's exit code as a shell does.

    What the command has left running is no reason to stay: everything is flushed and taken down under it.
    """
    code = 1
    try:
        code = _run(command)
    finally:
        down_anyhow(mountpoint)
    return code


def down_anyhow(mountpoint: Path) -> None:
    """Take a cluster down as ``down`` does, and by force if it is in use, saying so. UserError: what was lost."""
    try:
        down(mountpoint, force=False)
    except UserError as busy:
        tell(f"{busy}; taking it down all the same")
        down(mountpoint, force=True)


def _run(command: Sequence[str]) -> int:
    """Run a command to its end. It gets our signals; the terminal's Ctrl-C reaches it by itself."""
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        tell(f"cannot run {command[0]}: {error.strerror}")
        return 126 if isinstance(error, PermissionError) else 127

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    def leave_to_it(number: int, frame: FrameType | None) -> None:
        pass

    with contextlib.ExitStack() as restored:
        for number, act in ((signal.SIGTERM, pass_on), (signal.SIGHUP, pass_on), (signal.SIGINT, leave_to_it)):
            restored.callback(signal.signal, number, signal.signal(number, act))
        code = child.wait()
    return code if code >= 0 else 128 - code
