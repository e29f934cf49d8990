"""Run the tools that people use, and hold what comes out of a directory against what went in."""

import ctypes
import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

#: Whoever may write here makes the whole machine forget what it can read again (proc_sys_vm(5)).
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_libc = ctypes.CDLL(None, use_errno=True)


class Entry(NamedTuple):
    """Hold what must be the same of a file, directory or link after copying."""

    mode: int
    mtime_ns: int
    size: int
    content: str
    """SHA-256 of a file, target of a link."""


def run_tool(
    command: Sequence[str | Path], timeout_s: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end, in English; UserError if it fails, is missing or takes too long."""
    english = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=english, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not end within {timeout_s:.0f} s: {' '.join(map(str, command))}") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{command[0]} failed: {reason}")
    return done


def walk(root: Path) -> Iterator[Path]:
    """Yield a directory and everything below it."""
    yield root
    for directory, names, files in os.walk(root):
        yield from (Path(directory, name) for name in names + files)


def regular_files(root: Path) -> list[Path]:
    """List the regular files below a directory."""
    return [path for path in walk(root) if stat.S_ISREG(path.lstat().st_mode)]


def drop_cached(*files: Path) -> None:
    """Ask the kernel to forget the clean cached pages of files, so that the next read comes from the file system."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def may_drop_caches() -> bool:
    """Tell whether this process may make the machine forget everything that is cached."""
    try:
        os.close(os.open(DROP_CACHES, os.O_WRONLY))
    except OSError:
        return False
    return True


def drop_all_caches(written: Iterable[Path]) -> None:
    """Make the machine forget cached pages, names and inodes. ``written``: where there may be dirty pages. OSError."""
    for path in written:
        fd = os.open(path, os.O_RDONLY)
        try:
            if _libc.syncfs(fd) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(path))
        finally:
            os.close(fd)
    DROP_CACHES.write_text("3")


def snapshot(root: Path) -> dict[str, Entry]:
    """Read everything at and below a directory: relative name → what it is."""
    found = {}
    for path in walk(root):
        attrs = path.lstat()
        size, content = 0, ""
        if stat.S_ISREG(attrs.st_mode):
            with path.open("rb") as file:
                size, content = attrs.st_size, hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISLNK(attrs.st_mode):
            content = str(path.readlink())
        found[str(path.relative_to(root))] = Entry(attrs.st_mode, attrs.st_mtime_ns, size, content)
    return found


def refuse_difference(expected: dict[str, Entry], found: dict[str, Entry], where: Path) -> None:
    """Raise UserError that names the first entry that is missing, additional or different."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where}: {name} is not what was written: {found.get(name)} instead of {expected.get(name)}"
            )
