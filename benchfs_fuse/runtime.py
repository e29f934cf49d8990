"""Name the files that last as long as this machine runs: one place for who is mounted where.

Root uses ``/run/benchfs``; others ``$XDG_RUNTIME_DIR/benchfs``, else ``/tmp/benchfs-UID``. The directory is mode 0700.
"""

import hashlib
import os
from pathlib import Path
from urllib.parse import quote

from .errors import UserError

#: Longest readable part of a name: with a hash and a suffix it stays below the 255 bytes of a file name.
_NAME_MAX = 160


def runtime_dir() -> Path:
    """Return the directory, made if needed. UserError when it belongs to somebody else, or cannot be made."""
    user = os.geteuid()
    if user == 0:
        path = Path("/run/benchfs")
    elif "XDG_RUNTIME_DIR" in os.environ:
        path = Path(os.environ["XDG_RUNTIME_DIR"]) / "benchfs"
    else:
        path = Path(f"/tmp/benchfs-{user}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise UserError(f"cannot make the runtime directory {path}: {error.strerror}") from None
    if status.st_uid != user or status.st_mode & 0o077:
        raise UserError(f"{path} belongs to somebody else or is open to others; remove it or make it mode 0700")
    return path


def file_for(mountpoint: Path, suffix: str) -> Path:
    """Return the path of the runtime file of one mount point (absolute, without symbolic links). UserError."""
    try:
        name = quote(str(mountpoint), safe="")
    except UnicodeEncodeError:
        raise UserError(f"the mount point {str(mountpoint)!a} has a name that is not UTF-8: choose another") from None
    if len(name) > _NAME_MAX:
        name = f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{name[-_NAME_MAX:]}"
    return runtime_dir() / (name + suffix)
