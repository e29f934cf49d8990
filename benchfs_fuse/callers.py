"""Look up what the kernel knows of a caller and FUSE does not tell: his groups and capabilities."""

import os
from pathlib import Path

from .privileges import Caller

#: CAP_FSETID of linux/capability.h.
_FSETID = 4


def read_caller(pid: int, uid: int, gid: int) -> Caller:
    """Return who it is that waits for an answer: thread ``pid``.

    Whom /proc does not show (a thread of another pid namespace has 0) is judged by his ids ``uid`` and ``gid``.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return Caller(uid == 0, frozenset((gid,)))
    fields = dict(line.split(":", 1) for line in status.splitlines())
    gids = fields["Gid"].split()  # the last one is what files are made with: the file system's (proc(5))
    capable = bool(int(fields["CapEff"], 16) >> _FSETID & 1)
    return Caller(capable and _is_of_our_users(pid), frozenset(map(int, (gids[3], *fields["Groups"].split()))))


def _is_of_our_users(pid: int) -> bool:
    """Tell whether capabilities of a thread are worth anything here: those in another user namespace are not."""
    try:
        return os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user")
    except OSError:
        return False
