"""Mount and unmount: ``benchfs mount``, ``benchfs umount``, ``benchfs install-mount-helper``."""

import contextlib
import errno
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .. import control, kernel_mounts, mountpoints
from ..errors import UserError
from ..holders import holders
from ..kernel_mounts import KernelMount
from ..mountpoints import Place, State
from ..processes import Starting, end, wait_end, wait_ready
from ..runtime import file_for

#: Seconds that a mount process may take to leave after its file system is gone: what it holds was flushed before.
LEAVE_S = 10.0
#: A forced unmount takes less than 2 s whatever hangs: this long for an answer of a process that may be stuck, twice,
FORCE_ASK_S = 0.2
#: and this long for the process to flush what it can when its file system is gone.
FORCE_LEAVE_S = 0.7

#: Where mount(8) looks for the helpers of a type.
HELPER = Path("/sbin/mount.benchfs")


def tell(sentence: str) -> None:
    """Say something to the person at the command line."""
    sys.stderr.write(f"benchfs: {sentence}\n")


def start_mount(
    mountpoint: Path, registry: Path, log: Path | None, arguments: Sequence[str], before: Sequence[str] = ()
) -> Starting:
    """Start a mount process for a plain path. By default its log is among the runtime files. ``before``: Starting."""
    return Starting(
        "benchfs_fuse.mount",
        [str(mountpoint), "--registry-dir", str(registry.absolute()), *arguments],
        log if log is not None else file_for(mountpoint, ".log"),
        before,
    )


def mount_in_background(
    mountpoint: Path,
    registry: Path,
    log: Path | None,
    arguments: Sequence[str],
    say: Callable[[str], None] = tell,
) -> None:
    """Mount, return when the mount answers. ``say`` gets its warnings until then; UserError with its last words."""
    wait_ready([start_mount(kernel_mounts.plain_path(mountpoint), registry, log, arguments)], say)


# ── unmounting ───────────────────────────────────────────────────────────────────────────────────────────────────────


def unmount(mountpoint: Path, *, force: bool = False, timeout_s: float = 60.0, missing_ok: bool = False) -> None:
    """Unmount; with ``force`` at once, whoever uses it. UserError: not mounted, busy, or something was lost.

    ``timeout_s`` bounds the flushing. ``missing_ok``: it is well if nothing is mounted.
    """
    place = mountpoints.look(mountpoint)
    if place.state is State.SERVED:
        mounted, record = place.served()
        if force:
            _force(place.path, mounted, record)
        else:
            _drain(record, timeout_s)
            _unmount_quietly(place.path)
            _see_off(place.path, record)
    elif place.state is State.DEAD:
        mountpoints.clean_up(place.path)
    elif place.state is State.FOREIGN:
        _unmount_foreign(place, force)
    elif place.state is State.FREE and place.record is not None:
        _see_off(place.path, place.record)  # unmounted by somebody else, and perhaps flushing still
    elif place.state is not State.FREE or not missing_ok:
        raise UserError(place.not_ours())


def _see_off(path: Path, record: control.MountRecord) -> None:
    """Wait for the process whose file system is gone to leave. UserError if it must be killed."""
    if not wait_end(record.process, LEAVE_S) and end([record.process], LEAVE_S):
        control.remove_record(path)
        raise UserError(f"{path} is unmounted, but process {record.process.pid} did not leave and was killed")
    control.remove_record(path)


def _unmount_foreign(place: Place, force: bool) -> None:
    """Unmount what another process serves that we cannot ask; it flushes by itself when its file system is gone."""
    assert place.mount is not None
    if os.geteuid() not in (0, place.mount.user):
        raise UserError(f"{place.path} was mounted by user {place.mount.user}: only they or root can unmount it")
    if not force:
        _unmount_quietly(place.path)
        return
    kernel_mounts.abort(place.mount)
    mountpoints.clean_up(place.path)
    raise UserError(f"{place.path} is unmounted by force; nobody could be asked, so nobody knows what was lost")


def _drain(record: control.MountRecord, timeout_s: float) -> None:
    """Have everything flushed, with progress. UserError at the deadline: nothing is unmounted then."""
    deadline = time.monotonic() + timeout_s
    columns = (TextColumn("flushing"), BarColumn(), TextColumn("{task.fields[left]} bytes left"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = None
        try:
            for report in control.ask(record, control.Question("drain"), timeout_s):
                if task is None:
                    task = progress.add_task("flushing", total=report.dirty_files or 1, left=report.accepted_bytes)
                done = (progress.tasks[0].total or 0) - report.dirty_files
                progress.update(task, completed=done, left=report.accepted_bytes)
            return
        except UserError:
            if time.monotonic() < deadline:
                raise
    *_, left = control.ask(record, control.Question("left"), FORCE_ASK_S)
    raise UserError(
        f"{record.mountpoint} stays mounted: {left.accepted_bytes} bytes of {left.dirty_files} files are not flushed "
        f"after {timeout_s:g} s; see benchfs status, try again, or lose them with --force"
    )


def _unmount_quietly(path: Path) -> None:
    """Unmount what nobody uses. UserError names who does."""
    try:
        kernel_mounts.unmount(path)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise UserError(f"cannot unmount {path}: {error.strerror}") from None
        users = [f"{holder.command} (pid {holder.pid}, {holder.what})" for holder in holders(path)]
        users += [f"what is mounted at {mounted}" for mounted in kernel_mounts.beneath(path)]
        if not users:
            users = ["a process that only root can see" if os.geteuid() else "something that is no process"]
        raise UserError(f"{path} is busy: it is used by {'; '.join(users)}") from None


def _left(record: control.MountRecord) -> control.Report | None:
    """Ask what is not flushed; None if there is no answer at once."""
    try:
        *_, report = control.ask(record, control.Question("left"), FORCE_ASK_S)
    except UserError:
        return None
    return report


def _force(path: Path, mounted: KernelMount, record: control.MountRecord) -> None:
    """End everything now: first the file system, then its process, as soon as it has flushed or cannot in time."""
    left = _left(record)
    kernel_mounts.abort(mounted)
    with contextlib.suppress(OSError):
        kernel_mounts.detach(path)
    lost = not wait_end(record.process, FORCE_LEAVE_S if left is not None else 0)
    if lost:
        left = _left(record) or left
        end([record.process], 0)
    control.remove_record(path)
    if kernel_mounts.is_benchfs(kernel_mounts.find(path)):
        raise UserError(f"cannot unmount {path}, not even by force: its process is killed, the mount point stays")
    if lost and left is None:
        raise UserError(f"{path} is unmounted by force; its process did not answer, so nobody knows what was lost")
    if lost and left is not None and (left.accepted_bytes or left.dirty_files):
        raise UserError(
            f"{path} is unmounted by force; {left.accepted_bytes} bytes of {left.dirty_files} files were not flushed"
        )


# ── mount(8) ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def install_mount_helper() -> None:
    """Install mount.benchfs where mount(8) looks for it, with the absolute path of this environment."""
    # -I: whoever calls mount(8) as root may stand in any directory and have any PYTHONPATH.
    script = (
        '#!/bin/sh\n# Installed by "benchfs install-mount-helper".\n'
        f'exec {shlex.quote(sys.executable)} -I -m benchfs_fuse.mount_helper "$@"\n'
    )
    new = HELPER.with_name(".mount.benchfs.new")
    try:
        new.write_text(script)
        new.chmod(0o755)
        os.replace(new, HELPER)
    except OSError as error:
        raise UserError(f"cannot write {HELPER}: {error.strerror}; run this as root") from None
