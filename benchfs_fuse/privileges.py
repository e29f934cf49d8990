"""Say what a write, a truncation, a chown or an ACL takes from a file: the set-ID bits that lend its owner's powers.

Linux decides by who does it (setattr_should_drop_suidgid() of fs/attr.c, posix_acl_update_mode() of fs/posix_acl.c).
Over FUSE it does not do all of it (docs/design.md says what). What is to be taken is a set of bits:

    SETID   the set-user-ID bit, and the set-group-ID bit of what its group may execute
    SETGID  the set-group-ID bit, also of what its group may not execute
"""

import stat
from collections.abc import Callable
from typing import NamedTuple

SETID = 1
SETGID = 2


class Caller(NamedTuple):
    """Hold what Linux looks at: whether a caller has CAP_FSETID, and which groups he is in."""

    fsetid: bool
    groups: frozenset[int]

    def _is_stranger(self, gid: int) -> bool:
        """Tell whether he may not keep the set-group-ID bit of a file of that group."""
        return not self.fsetid and gid not in self.groups

    def takes_by_write(self, gid: int) -> int:
        """Return what his writing to a file of group ``gid``, or cutting it, takes away."""
        return 0 if self.fsetid else SETID | SETGID * self._is_stranger(gid)

    def takes_by_chown(self, gid: int) -> int:
        """Return what his giving away a file that was of group ``gid`` takes away; of a directory nothing is taken."""
        return SETID | SETGID * self._is_stranger(gid)

    def takes_by_acl(self, gid: int) -> int:
        """Return what his setting the access ACL of a file or directory of group ``gid`` takes away."""
        return SETGID * self._is_stranger(gid)


#: Find out who it is that calls; only asked where there is something to take away.
Who = Callable[[], Caller]


def has_set_id(mode: int) -> bool:
    """Tell whether there is anything to take away."""
    return bool(mode & (stat.S_ISUID | stat.S_ISGID))


def without(mode: int, taken: int) -> int:
    """Return a mode without what is taken away."""
    if taken & SETID:
        mode &= ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            mode &= ~stat.S_ISGID
    if taken & SETGID:
        mode &= ~stat.S_ISGID
    return mode
