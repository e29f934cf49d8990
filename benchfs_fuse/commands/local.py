"""Run a whole cluster on this machine: ``benchfs up`` and ``benchfs down``.

Everything lies in one directory, which outlives the cluster:

    registry/           the registry directory
    daemon-0/ …         the data directories
    daemon-0.log …      what the daemons and the mount said
    mount.log
    cluster.json        which processes run now (LocalCluster)

A link in the runtime directory leads from the mount point to it.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ..errors import UserError
from ..processes import ProcessId, alive, end, start_module
from ..registry import init_registry
from ..runtime import file_for
from .mounting import is_alive, mount_in_background, unmount

#: A daemon that was asked to stop finishes its requests and closes its stores; that takes milliseconds, so a
#: daemon that needs longer than this is stuck.
DAEMON_STOP_S = 20.0


class LocalCluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Remember what ``up`` started: the mount point and the daemons by number."""

    mountpoint: str
    daemons: tuple[ProcessId | None, ...]


def default_data_dir(mountpoint: Path) -> Path:
    """Return where the local cluster of a mount point keeps its data unless told otherwise."""
    name = str(mountpoint).strip("/").replace("/", "-") or "root"
    if os.geteuid() == 0:
        return Path("/var/lib/benchfs") / name
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "benchfs" / name


def _read(data_dir: Path) -> LocalCluster | None:
    try:
        return msgspec.json.decode((data_dir / "cluster.json").read_bytes(), type=LocalCluster)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise UserError(f"{data_dir}/cluster.json is damaged ({error}); remove it if no daemon runs there") from None


def _write(data_dir: Path, cluster: LocalCluster) -> None:
    new = data_dir / "cluster.json.new"
    new.write_bytes(msgspec.json.encode(cluster))
    new.rename(data_dir / "cluster.json")


def _daemon_dirs(data_dir: Path) -> list[Path]:
    return sorted(data_dir.glob("daemon-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))


def _daemons_wanted(data_dir: Path, daemons: int | None, chunk_size: int) -> int:
    """Return how many daemons to run; form the cluster if the directory is new."""
    registry = data_dir / "registry"
    if not registry.exists():
        count = daemons or 2
        init_registry(registry, count, chunk_size)
        for index in range(count):
            (data_dir / f"daemon-{index}").mkdir(mode=0o700, exist_ok=True)
        return count
    count = len(_daemon_dirs(data_dir))
    if daemons not in (None, count):
        raise UserError(
            f"{data_dir} holds a cluster of {count} daemons, not {daemons}: leave --daemons out, or choose another "
            f"--data-dir"
        )
    return count


def up(
    mountpoint: Path,
    data_dir: Path,
    daemons: int | None,
    chunk_size: int,
    daemon_arguments: Sequence[str],
    mount_arguments: Sequence[str],
) -> None:
    """Start what does not run yet: daemons, mount. When it fails, nothing is left behind but the data.

    ``chunk_size`` (bytes) is used when the cluster is formed.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the data directory {data_dir}: {error.strerror}") from None
    before = _read(data_dir)
    count = _daemons_wanted(data_dir, daemons, chunk_size)
    running = before.daemons if before is not None else ()
    if before is not None and before.mountpoint != str(mountpoint) and any(p and alive(p) for p in running):
        raise UserError(
            f"the cluster in {data_dir} is up at {before.mountpoint}; to mount it twice run: "
            f"benchfs mount {mountpoint} --registry-dir {data_dir / 'registry'}"
        )
    processes: list[ProcessId | None] = [*running, *[None] * (count - len(running))]
    started: list[ProcessId] = []
    registry = data_dir / "registry"
    try:
        for index, folder in enumerate(_daemon_dirs(data_dir)):
            process = processes[index]
            if process is not None and alive(process):
                continue
            process = start_module(
                "benchfs_fuse.daemon",
                [
                    "--registry-dir",
                    str(registry),
                    "--data-dir",
                    str(folder),
                    "--listen",
                    "127.0.0.1",
                    *daemon_arguments,
                ],
                data_dir / f"daemon-{index}.log",
                "--ready-fd",
            )
            started.append(process)
            processes[index] = process
        _write(data_dir, LocalCluster(str(mountpoint), tuple(processes)))
        if not is_alive(mountpoint):
            mount_in_background(mountpoint, registry, data_dir / "mount.log", mount_arguments)
    except BaseException:
        for process in started:
            end(process, DAEMON_STOP_S)
        raise
    link = file_for(mountpoint, ".up")
    with contextlib.suppress(FileNotFoundError):
        link.unlink()
    link.symlink_to(data_dir)


def down(mountpoint: Path, force: bool) -> None:
    """Unmount and stop the daemons; the data stays. UserError when no local cluster is up there, or it is busy."""
    link = file_for(mountpoint, ".up")
    try:
        data_dir = link.readlink()
    except FileNotFoundError:
        raise UserError(f"no local cluster is up at {mountpoint} (benchfs up {mountpoint} starts one)") from None
    unmount(mountpoint, force=force, missing_ok=True)
    cluster = _read(data_dir)
    if cluster is not None:
        for process in cluster.daemons:
            if process is not None and not end(process, DAEMON_STOP_S):
                sys.stderr.write(f"benchfs: daemon {process.pid} did not stop in {DAEMON_STOP_S:.0f} s: killed\n")
        (data_dir / "cluster.json").unlink(missing_ok=True)
    link.unlink(missing_ok=True)


@contextlib.contextmanager
def _downed_at_the_end(mountpoint: Path) -> Iterator[None]:
    try:
        yield
    finally:
        down(mountpoint, force=False)


def run_under(mountpoint: Path, command: Sequence[str]) -> int:
    """Run a command, then take the cluster down, whatever happens; return the command's exit code as a shell does."""
    with _downed_at_the_end(mountpoint):
        try:
            code = subprocess.run(command, check=False).returncode
        except FileNotFoundError:
            sys.stderr.write(f"benchfs: {command[0]}: no such command\n")
            return 127
        except PermissionError:
            sys.stderr.write(f"benchfs: {command[0]}: not executable\n")
            return 126
        except KeyboardInterrupt:
            return 130
    return code if code >= 0 else 128 - code
