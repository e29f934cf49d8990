"""Find the processes that keep a mount busy, as fuser(1) does: by reading /proc, without touching the mount.

Only symbolic links in /proc are read and compared by name: a stat of a path below a hung mount would hang with it.
"""

import os
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


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


def holders(mountpoint: Path) -> list[Holder]:
    """List the processes that use anything below ``mountpoint`` (an absolute path without symbolic links).

    Without root, processes of other users are not seen.
    """
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        for what, link in _links(entry):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if _below(target.removesuffix(" (deleted)"), str(mountpoint)):
                try:
                    command = (entry / "comm").read_text().strip()
                except OSError:
                    break
                found.append(Holder(int(entry.name), command, f"{what} {target}"))
                break
    return sorted(found)
