"""Find the processes that keep a mount busy, as fuser(1) does: by reading /proc, without touching the mount.

Only symbolic links in /proc are read and compared by name: a stat of a path below a hung mount would hang with it.
"""

import os
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_DELETED = " (deleted)"


class Holder(NamedTuple):
    """Describe one process that holds something below a mount point, and what (the first thing found)."""

    pid: int
    command: str
    what: str


def _below(target: str, mountpoint: str) -> bool:
    return target == mountpoint or target.startswith(mountpoint.rstrip("/") + "/")


def _links(process: Path) -> list[tuple[str, Path]]:
    found = [("working directory", process / "cwd"), ("root", process / "root"), ("program", process / "exe")]
    for folder, what in (("fd", "open file"), ("map_files", "mapped file")):
        try:
            found += [(what, process / folder / name) for name in os.listdir(process / folder)]
        except OSError:
            continue
    return found


def _what_holds(process: Path, mountpoint: str) -> str | None:
    for what, link in _links(process):
        try:
            target = os.readlink(link).removesuffix(_DELETED)
        except OSError:
            continue
        if _below(target, mountpoint):
            return f"{what} {target}"
    return None


def holders(mountpoint: Path) -> list[Holder]:
    """List the processes that use anything below ``mountpoint`` (an absolute path without symbolic links).

    Without root, processes of other users are not seen.
    """
    found = []
    for process in _PROC.iterdir():
        if not process.name.isdigit() or (what := _what_holds(process, str(mountpoint))) is None:
            continue
        try:
            command = (process / "comm").read_text(errors="replace").strip()
        except OSError:
            continue  # it has ended
        found.append(Holder(int(process.name), command, what))
    return sorted(found)
