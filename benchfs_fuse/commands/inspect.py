"""Look at a running file system: ``benchfs status`` and ``benchfs layout``."""

import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .. import control, kernel_mounts
from ..errors import UserError
from ..processes import alive

#: Seconds for an answer: the mount process itself gives its daemons two.
STATUS_TIMEOUT_S = 5.0
EXIT_DEGRADED = 3


def record_of(mountpoint: Path) -> control.MountRecord:
    """Return the record of a live mount. UserError says what is there instead."""
    path = kernel_mounts.plain_path(mountpoint)
    mounted = kernel_mounts.find(path)
    if mounted is None:
        raise UserError(f"{path} is not mounted")
    if not kernel_mounts.is_benchfs(mounted):
        raise UserError(f"{path} is a mount of type {mounted.fstype}, not benchfs")
    record = control.read_record(path)
    if record is None or not alive(record.process):
        raise UserError(f"{path} is mounted, but its process has died; clean up with: benchfs umount {path}")
    return record


def status(mountpoint: Path, as_json: bool) -> int:
    """Show a mount and its daemons; return EXIT_DEGRADED when a daemon is missing or the mount was expelled."""
    record = record_of(mountpoint)
    *_, report = control.ask(record, control.Question("status"), STATUS_TIMEOUT_S)
    missing = [daemon for daemon in report.daemons if not daemon.connected]
    if as_json:
        print(json.dumps({"mount": msgspec.to_builtins(record), **msgspec.to_builtins(report)}, indent=2))  # noqa: T201
    else:
        _show(record, report)
    return EXIT_DEGRADED if missing or report.expelled else 0


def _show(record: control.MountRecord, report: control.Report) -> None:
    console = Console(soft_wrap=True)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.since_s))
    console.print(f"{record.mountpoint}  cluster {record.cluster_id}, benchfs {report.version}, since {since}")
    console.print(
        f"  process {record.process.pid}, registry {record.registry}\n"
        f"  {report.handles} handles on {report.files} files, {report.dirty_files} of them with "
        f"{decimal(report.accepted_bytes)} accepted and not yet flushed"
    )
    if report.expelled:
        console.print(f"  [red]expelled: {report.expelled}; its open files are lost: unmount and mount again")
    for complaint in report.not_tuned:
        console.print(f"  [yellow]not tuned: {complaint}")
    table = Table("daemon", "address", "state", "via", "version", "free", "of", "sessions", "in flight", box=None)
    for daemon in report.daemons:
        said: dict[str, Any] = daemon.status or {}
        usage = said.get("usage", [])
        table.add_row(
            str(daemon.daemon_id),
            daemon.address,
            _state(daemon),
            daemon.transport or "–",
            said.get("version", "–"),
            decimal(sum(one["available"] for one in usage)) if usage else "–",
            decimal(sum(one["total"] for one in usage)) if usage else "–",
            str(len(said["sessions"])) if said else "–",
            str(daemon.in_flight),
        )
    console.print(table)


def _state(daemon: control.DaemonReport) -> str:
    if daemon.connected:
        return "alive" if daemon.status is not None else "[yellow]connected, silent"
    since = time.strftime("%H:%M:%S", time.localtime(daemon.missing_since_s))
    return f"[red]missing since {since}: {daemon.trouble}"


def layout(file: Path, as_json: bool) -> int:
    """Show the chunks of a file, and how much of each its daemon holds."""
    mounted = kernel_mounts.above(file)
    if not kernel_mounts.is_benchfs(mounted) or mounted is None:
        raise UserError(f"{file} is not in a benchfs mount")
    record = record_of(mounted.mountpoint)
    try:
        ino = os.stat(file, follow_symlinks=False).st_ino
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    *_, report = control.ask(record, control.Question("layout", ino), STATUS_TIMEOUT_S)
    found = report.layout
    if found is None:
        raise UserError(f"{file}: {report.trouble}")
    if as_json:
        print(json.dumps({"file": str(file), **msgspec.to_builtins(found)}, indent=2))  # noqa: T201
        return 0
    console = Console()
    console.print(
        f"{file}  inode {ino:#x} on daemon {found.daemon}, {found.size} bytes, {found.allocated} allocated, "
        f"{found.count} chunks of {found.chunk_size} bytes in rows of {found.width}"
    )
    table = Table("chunk", "at", "length", "daemon")
    for chunk in found.chunks:
        table.add_row(str(chunk.index), str(chunk.offset), str(chunk.length), str(chunk.daemon))
    if found.count > len(found.chunks):
        table.caption = f"{found.count - len(found.chunks)} more chunks are not listed"
    if found.chunks:
        console.print(table)
    return 0
