"""Ask and change the kernel's mount table without ever touching what is mounted: a hung mount must not hang us.

Sources: proc(5) for /proc/self/mountinfo, umount(2), Documentation/filesystems/fuse/fuse.rst for ``abort``.
"""

import contextlib
import ctypes
import errno
import os
import re
import select
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from .errors import UserError

FUSE_TYPE = "fuse.benchfs"

_CONNECTIONS = Path("/sys/fs/fuse/connections")
_MNT_FORCE = 1
_MNT_DETACH = 2
#: Symbolic links followed at the end of a path: MAXSYMLINKS of Linux (include/linux/namei.h).
_SYMLINKS_MAX = 40
#: Seconds for a healthy mount to say how much space there is: what needs longer is stuck, but served.
_ANSWER_S = 1.0
_ESCAPE = re.compile(rb"\\([0-7]{3})")
_USER = re.compile(rb"(?:^|,)user_id=([0-9]+)")
_libc = ctypes.CDLL(None, use_errno=True)


class KernelMount(NamedTuple):
    """Describe one mount: where, of what type and source, and the minor number that names its FUSE connection."""

    mountpoint: Path
    fstype: str
    source: str
    minor: int
    #: Who mounted it, for FUSE.
    user: int | None = None
    #: The device as the kernel names it, "major:minor", and all options, of the mount and of its file system.
    device: str = ""
    options: str = ""


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def mounts() -> list[KernelMount]:
    """List what is mounted in this mount namespace, oldest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        before, _, behind = line.partition(b" - ")
        fields, tail = before.split(b" "), behind.split(b" ")
        minor = int(fields[2].partition(b":")[2])
        user = _USER.search(tail[-1])
        found.append(
            KernelMount(
                Path(_unescape(fields[4])),
                tail[0].decode(),
                _unescape(tail[1]),
                minor,
                int(user[1]) if user is not None else None,
                fields[2].decode(),
                ",".join(dict.fromkeys(f"{fields[5].decode()},{tail[-1].decode(errors='replace')}".split(","))),
            )
        )
    return found


def plain_path(path: Path) -> Path:
    """Make a path absolute and free of symbolic links without asking what may be mounted at it, which may hang.

    readlink(2) of a directory is answered by the kernel alone; a stat of it is not. UserError: nobody knows where a
    relative path starts.
    """
    try:
        absolute = Path(os.path.abspath(path))
    except FileNotFoundError:
        raise UserError(f"the current directory has gone: give the whole path of {path}") from None
    for _ in range(_SYMLINKS_MAX):
        if absolute == absolute.parent:
            break
        absolute = Path(os.path.realpath(absolute.parent)) / absolute.name
        try:
            absolute = Path(os.path.normpath(absolute.parent / os.readlink(absolute)))
        except OSError:
            break
    return absolute


def find(mountpoint: Path) -> KernelMount | None:
    """Return the newest mount at exactly this path, whatever its type; None when nothing is mounted there."""
    path = plain_path(mountpoint)
    return next((mount for mount in reversed(mounts()) if mount.mountpoint == path), None)


def above(path: Path) -> KernelMount | None:
    """Return the mount that holds ``path``: the deepest mount point on the way down to it, the newest if stacked."""
    place = plain_path(path)
    holding = [mount for mount in reversed(mounts()) if place.is_relative_to(mount.mountpoint)]
    return max(holding, key=lambda mount: len(mount.mountpoint.parts), default=None)


def beneath(mountpoint: Path) -> list[Path]:
    """List the mount points inside a mount (a plain path): they keep it busy."""
    return [mount.mountpoint for mount in mounts() if mountpoint in mount.mountpoint.parents]


def answers(mountpoint: Path) -> bool:
    """Tell whether a process still serves a FUSE mount, however slowly. Asked by a child, which may hang for us."""
    child = subprocess.Popen(
        ["stat", "--file-system", "--", str(mountpoint)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert child.stderr is not None
    with child.stderr as said:
        if not select.select([said], [], [], _ANSWER_S)[0]:
            child.kill()  # which may take until the mount is freed: nobody waits for it
            child.returncode = -signal.SIGKILL
            return True
        trouble = said.read()
    child.wait()
    return b"not connected" not in trouble


def inside_benchfs(path: Path) -> bool:
    """Tell whether a path lies in a benchfs mount."""
    mount = above(path)
    return mount is not None and mount.fstype == FUSE_TYPE


def is_benchfs(mount: KernelMount | None) -> bool:
    """Tell whether a mount is one of ours."""
    return mount is not None and mount.fstype == FUSE_TYPE


def connection(minor: int) -> Path:
    """Return the directory with the knobs of a FUSE connection; it may not exist, or not be ours to change.

    Where nobody has mounted fusectl, as in containers, root does it here.
    """
    if not os.path.ismount(_CONNECTIONS) and os.geteuid() == 0:
        _libc.mount(b"fusectl", os.fsencode(_CONNECTIONS), b"fusectl", 0, None)
    return _CONNECTIONS / str(minor)


def abort(mount: KernelMount) -> bool:
    """End a FUSE connection: everybody who waits for it gets an error at once. Tell whether we were allowed to."""
    with contextlib.suppress(OSError):
        (connection(mount.minor) / "abort").write_text("1")
        return True
    return False


def unmount(mountpoint: Path) -> None:
    """Unmount what nobody uses. A busy mount raises OSError with errno EBUSY."""
    _unmount(mountpoint, 0, "-u")


def detach(mountpoint: Path) -> None:
    """Take a mount out of the name space at once, whoever uses it (lazy unmount)."""
    _unmount(mountpoint, _MNT_DETACH | _MNT_FORCE, "-uz")


def _unmount(mountpoint: Path, flags: int, fusermount_flag: str) -> None:
    path = plain_path(mountpoint)
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(path), flags) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        return
    try:
        result = subprocess.run(
            ["fusermount3", fusermount_flag, "--", str(path)], check=False, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise UserError("fusermount3 is missing: install the Debian package fuse3") from None
    if result.returncode != 0:
        code = errno.EBUSY if "busy" in result.stderr else errno.EPERM
        raise OSError(code, result.stderr.strip() or "fusermount3 failed", str(path))
