"""Say what is at a mount point: nothing, a mount of ours and its process, a dead one, or somebody else's."""

import errno
import logging
import os
import re
import stat
import sys
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from . import control, kernel_mounts
from .errors import UserError
from .kernel_mounts import KernelMount
from .processes import alive, is_defunct, wait_end

log = logging.getLogger(__name__)

#: Seconds for the process of a mount that was just taken away to flush what it holds and leave.
LEAVE_S = 30.0
#: What this program needs while it runs: its environment and its modules.
_PROGRAM = (Path(sys.prefix).resolve(), Path(__file__).resolve().parent)
#: Where root lets ordinary users do more (fuse(8)).
FUSE_CONFIG = Path("/etc/fuse.conf")


class State(Enum):
    """Tell apart what may be at a mount point."""

    FREE = "nothing is mounted there"
    OTHER = "a file system of another type"
    SERVED = "ours: its process runs and can be asked"
    FOREIGN = "a benchfs that somebody serves whom we cannot ask: another user, or a process without its record"
    DEAD = "a benchfs whose process has died"


class Place(NamedTuple):
    """Describe a mount point. ``record`` may be there without a mount: the process has not left yet, or died."""

    #: Absolute, without symbolic links.
    path: Path
    state: State
    mount: KernelMount | None
    record: control.MountRecord | None

    def served(self) -> tuple[KernelMount, control.MountRecord]:
        """Return the mount and its record if it is ours and alive. UserError says what is there instead."""
        if self.state is State.SERVED and self.mount is not None and self.record is not None:
            return self.mount, self.record
        if self.state is State.DEAD:
            raise UserError(
                f"{self.path} is mounted, but its process has died; clean up with: benchfs umount {self.path}"
            )
        if self.state is State.FOREIGN and self.mount is not None:
            raise UserError(
                f"{self.path} was mounted by user {self.mount.user}, or its runtime files are gone: "
                f"only its own process knows more"
            )
        raise UserError(self.not_ours())

    def not_ours(self) -> str:
        """Say that no benchfs is mounted here."""
        if self.mount is not None:
            return f"{self.path} is a mount of type {self.mount.fstype}, not benchfs"
        return f"{self.path} is not mounted"


def look(mountpoint: Path) -> Place:
    """Find out what is at a mount point, without touching what may hang."""
    path = kernel_mounts.plain_path(mountpoint)
    mount = kernel_mounts.find(path)
    record = control.read_record(path)
    if mount is None:
        state = State.FREE
    elif not kernel_mounts.is_benchfs(mount):
        state = State.OTHER
    elif record is not None and alive(record.process):
        state = State.SERVED
    elif record is not None and is_defunct(record.process):
        # A thread of it may wait for a page that a request holds, which only the process could have answered. So the
        # connection stays, and hangs until it is aborted.
        state = State.DEAD
    else:
        state = State.FOREIGN if kernel_mounts.answers(path) else State.DEAD
    return Place(path, state, mount, record)


def clean_up(path: Path) -> None:
    """Take away what a dead mount left at a plain path, and free whoever waits for it. UserError."""
    mount = kernel_mounts.find(path)
    if mount is not None and kernel_mounts.is_benchfs(mount):
        kernel_mounts.abort(mount)
    try:
        kernel_mounts.detach(path)
    except OSError as error:
        if error.errno != errno.EINVAL:  # somebody else was faster
            raise UserError(f"cannot take away the dead mount at {path}: {error.strerror}") from None
    control.remove_record(path)


def check_directory(path: Path) -> None:
    """Refuse what nothing can be mounted at. UserError."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: make the directory first") from None
    except OSError as error:
        raise UserError(f"cannot use {path}: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"{path} is not a directory")
    for own in _PROGRAM:
        if own.is_relative_to(path):
            raise UserError(f"{path} holds this program (in {own}), which the mount would hide: choose another place")
    if os.geteuid() != 0 and not os.access(path, os.W_OK):
        raise UserError(f"you may not write to {path}: without root, choose a mount point of your own")


def users_may_let_others_in(config: Path = FUSE_CONFIG) -> bool:
    """Tell whether ordinary users may mount with allow_other."""
    try:
        return re.search(r"^\s*user_allow_other\s*$", config.read_text(), re.MULTILINE) is not None
    except OSError:
        return False


def prepare(mountpoint: Path, registry: Path, allow_other: bool = False) -> Path:
    """Check a mount point, clean up what a dead mount left there, return its plain path. UserError if it won't do."""
    if allow_other and os.geteuid() != 0 and not users_may_let_others_in():
        raise UserError(
            f"allow_other is for root alone here: leave it out, or have root add user_allow_other to {FUSE_CONFIG}"
        )
    place = look(mountpoint)
    while place.state is State.DEAD:
        log.warning("%s was left broken by a dead mount: cleaning up", place.path)
        clean_up(place.path)
        place = look(mountpoint)
    if place.state in (State.SERVED, State.FOREIGN):
        raise UserError(f"{place.path} is mounted already; unmount it first: benchfs umount {place.path}")
    if place.state is State.FREE and place.record is not None and not wait_end(place.record.process, LEAVE_S):
        raise UserError(f"process {place.record.process.pid}, which served {place.path} before, is still flushing")
    check_directory(place.path)
    if Path(os.path.realpath(registry)).is_relative_to(place.path):
        raise UserError(f"the registry {registry} lies inside the mount point {place.path}, where it would be hidden")
    return place.path
