"""Mount and unmount: ``benchfs mount``, ``benchfs umount``, ``benchfs install-mount-helper``."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .. import control, kernel_mounts
from ..errors import UserError
from ..holders import holders
from ..processes import alive, end, start_module
from ..runtime import file_for

#: Seconds that a mount process may take to leave after its file system is gone: it has nothing to wait for then.
LEAVE_S = 10.0
#: Seconds for everything that a forced unmount asks of a process that may be stuck.
FORCE_ASK_S = 0.3
FORCE_LEAVE_S = 0.5

_HELPER = Path("/sbin/mount.benchfs")


def mount_in_background(mountpoint: Path, registry: Path, log: Path | None, arguments: Sequence[str]) -> None:
    """Start a mount process and return when the mount answers. UserError with its words when it does not."""
    path = kernel_mounts.plain_path(mountpoint)
    start_module(
        "benchfs_fuse.mount",
        [str(path), "--registry-dir", str(registry.absolute()), *arguments],
        log if log is not None else file_for(path, ".log"),
        "--ready-fd",
    )


def is_alive(mountpoint: Path) -> bool:
    """Tell whether a mount of ours is there and its process runs."""
    path = kernel_mounts.plain_path(mountpoint)
    record = control.read_record(path)
    return kernel_mounts.is_benchfs(kernel_mounts.find(path)) and record is not None and alive(record.process)


def unmount(mountpoint: Path, *, force: bool = False, timeout_s: float = 60.0, missing_ok: bool = False) -> None:
    """Unmount; with ``force`` at once, whoever uses it. UserError: not mounted, busy, or something was lost."""
    path = kernel_mounts.plain_path(mountpoint)
    mounted = kernel_mounts.find(path)
    record = control.read_record(path)
    if mounted is None:
        if record is not None:
            end(record.process, FORCE_LEAVE_S if force else LEAVE_S)
            control.remove_record(path)
        if missing_ok or record is not None:
            return
        raise UserError(f"{path} is not mounted")
    if not kernel_mounts.is_benchfs(mounted):
        raise UserError(f"{path} is a mount of type {mounted.fstype}, not benchfs")
    if record is None or not alive(record.process):
        _clean_up(path)
    elif force:
        _force(path, mounted, record)
    else:
        _drain(record, timeout_s)
        _unmount_quietly(path)
        if not end(record.process, LEAVE_S):
            raise UserError(f"{path} is unmounted, but process {record.process.pid} did not leave and was killed")
        control.remove_record(path)


def _clean_up(path: Path) -> None:
    """Take away what a dead mount left."""
    with contextlib.suppress(OSError):
        kernel_mounts.detach(path)
    control.remove_record(path)
    if kernel_mounts.is_benchfs(kernel_mounts.find(path)):
        raise UserError(f"cannot take away the dead mount at {path}: not permitted")


def _drain(record: control.MountRecord, timeout_s: float) -> None:
    """Have everything flushed, with progress. UserError at the deadline: nothing is unmounted then."""
    deadline = time.monotonic() + timeout_s
    columns = (TextColumn("flushing"), BarColumn(), TextColumn("{task.fields[left]} bytes left"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = None
        for report in control.ask(record, control.Question("drain"), max(0.1, deadline - time.monotonic())):
            if task is None:
                task = progress.add_task("flushing", total=report.dirty_files or 1, left=report.accepted_bytes)
            done = (progress.tasks[0].total or 0) - report.dirty_files
            progress.update(task, completed=done, left=report.accepted_bytes)
            if time.monotonic() > deadline:
                raise UserError(
                    f"{record.mountpoint}: {report.accepted_bytes} bytes of {report.dirty_files} files are not flushed "
                    f"after {timeout_s:g} s; try again, or lose them with --force"
                )


def _unmount_quietly(path: Path) -> None:
    try:
        kernel_mounts.unmount(path)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise UserError(f"cannot unmount {path}: {error.strerror}") from None
        users = [f"{holder.command} (pid {holder.pid}, {holder.what})" for holder in holders(path)]
        raise UserError(
            f"{path} is busy: " + ("; ".join(users) if users else "somebody uses it whom only root can see")
        ) from None


def _force(path: Path, mounted: kernel_mounts.KernelMount, record: control.MountRecord) -> None:
    """End everything now. Flushes nothing: says what is lost."""
    lost: control.Report | None = None
    with contextlib.suppress(UserError):
        *_, lost = control.ask(record, control.Question("left"), FORCE_ASK_S)
    kernel_mounts.abort(mounted)
    with contextlib.suppress(OSError):
        kernel_mounts.detach(path)
    end(record.process, FORCE_LEAVE_S)
    control.remove_record(path)
    if lost is None:
        raise UserError(f"{path} is unmounted by force; its process did not answer, so nobody knows what was lost")
    if lost.accepted_bytes or lost.dirty_files:
        raise UserError(
            f"{path} is unmounted by force; {lost.accepted_bytes} bytes of {lost.dirty_files} files were not flushed"
        )


def install_mount_helper() -> None:
    """Install mount.benchfs where mount(8) looks for it, with the absolute path of this environment."""
    program = Path(sys.executable).with_name("mount.benchfs")
    if not program.exists():
        raise UserError(f"{program} does not exist: install the package into this environment first")
    script = f'#!/bin/sh\n# Installed by "benchfs install-mount-helper".\nexec {program} "$@"\n'
    new = _HELPER.with_name(".mount.benchfs.new")
    try:
        new.write_text(script)
        new.chmod(0o755)
        os.replace(new, _HELPER)
    except OSError as error:
        raise UserError(f"cannot write {_HELPER}: {error.strerror}; run this as root") from None
