"""Look at a running file system: ``benchfs status`` and ``benchfs layout``."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.filesize import decimal

from .. import control, kernel_mounts, mountpoints
from ..errors import UserError
from .tables import columns, make_console

#: Seconds for an answer: the mount process itself gives its daemons two.
STATUS_TIMEOUT_S = 5.0
EXIT_DEGRADED = 3


def status(mountpoint: Path, as_json: bool) -> int:
    """Show a mount and its daemons; return EXIT_DEGRADED when one is missing or silent, or the mount was expelled."""
    _, record = mountpoints.look(mountpoint).served()
    *_, report = control.ask(record, control.Question("status"), STATUS_TIMEOUT_S)
    well = all(map(_is_well, report.daemons))
    if as_json:
        _write_json({"mount": msgspec.to_builtins(record), **msgspec.to_builtins(report)})
    else:
        _show(record, report)
    return 0 if well and not report.expelled else EXIT_DEGRADED


def _show(record: control.MountRecord, report: control.Report) -> None:
    console = make_console()
    console.print(
        f"{record.mountpoint}  cluster {record.cluster_id}, benchfs {report.version}, since {_time(record.since_s)}\n"
        f"  process {record.process.pid}, registry {record.registry}\n"
        f"  {report.handles} handles on {report.files} files, {report.dirty_files} of them with "
        f"{decimal(report.accepted_bytes)} accepted and not yet flushed\n"
        f"  {report.locks_held} locks held, {report.locks_waiting} waited for"
    )
    if report.expelled:
        console.print(
            f"  expelled: {report.expelled}; its open files are lost: unmount and mount again", style="bold red"
        )
    for complaint in report.not_tuned:
        console.print(f"  not tuned: {complaint}", style="yellow")
    rows = [("daemon", "address", "via", "version", "free", "of", "sessions", "locks", "in flight", "state")]
    for daemon in report.daemons:
        said: dict[str, Any] = daemon.status or {}
        usage = said.get("usage", [])
        rows.append(
            (
                str(daemon.daemon_id),
                daemon.address or "–",
                daemon.transport or "–",
                said.get("version", "–"),
                decimal(sum(one["available"] for one in usage)) if usage else "–",
                decimal(sum(one["total"] for one in usage)) if usage else "–",
                str(len(said["sessions"]) + said["more_sessions"]) if said else "–",
                str(said["locks"]) if said else "–",
                str(daemon.in_flight),
                _state(daemon),
            )
        )
    styles = [None, *(None if _is_well(daemon) else "red" for daemon in report.daemons)]
    for line, style in zip(columns(rows), styles, strict=True):
        console.print(line, style=style)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _write_json(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _is_well(daemon: control.DaemonReport) -> bool:
    return daemon.connected and daemon.status is not None


def _state(daemon: control.DaemonReport) -> str:
    if not daemon.connected:
        return f"missing since {_time(daemon.missing_since_s)}: {daemon.trouble}"
    return "alive" if daemon.status is not None else "connected, silent"


def layout(file: Path, as_json: bool) -> int:
    """Show the chunks of a file, and how much of each its daemon holds."""
    path = kernel_mounts.plain_path(file)
    mounted = kernel_mounts.above(path)
    if mounted is None or not kernel_mounts.is_benchfs(mounted):
        raise UserError(f"{file} is not in a benchfs mount")
    _, record = mountpoints.look(mounted.mountpoint).served()
    try:
        ino = os.stat(path, follow_symlinks=False).st_ino
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    *_, report = control.ask(record, control.Question("layout", ino), STATUS_TIMEOUT_S)
    found = report.layout
    if found is None:
        raise UserError(f"{file}: {report.trouble}")
    if as_json:
        _write_json({"file": str(file), **msgspec.to_builtins(found)})
        return 0
    console = make_console()
    console.print(
        f"{file}  inode {ino:#x} on daemon {found.daemon}, {found.size} bytes, {found.allocated} allocated, "
        f"{found.count} chunks of {found.chunk_size} bytes in rows of {found.width}"
    )
    rows = [
        ("chunk", "at", "length", "daemon"),
        *((str(chunk.index), str(chunk.offset), str(chunk.length), str(chunk.daemon)) for chunk in found.chunks),
    ]
    for line in columns(rows) if found.chunks else ():
        console.print(line)
    if found.count > len(found.chunks):
        console.print(f"  {found.count - len(found.chunks)} more chunks are not listed")
    return 0
