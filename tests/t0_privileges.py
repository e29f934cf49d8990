"""What is taken of set-ID bits, against a table that was measured on ext4 and tmpfs (Linux 6.18)."""

import pytest

from benchfs_fuse.privileges import Caller, has_set_id, without

GID = 3001
ROOT = Caller(True, frozenset([0]))
ROOT_WITHOUT_FSETID = Caller(False, frozenset([0]))
MEMBER = Caller(False, frozenset([1001, GID]))
STRANGER = Caller(False, frozenset([1001]))

#: Permission bits before, and what a write, a truncation or fallocate(2), a chown, an access ACL leaves.
MEASURED = [
    (ROOT, 0o6777, 0o6777, 0o0777, 0o6777),
    (ROOT, 0o6767, 0o6767, 0o2767, 0o6767),
    (ROOT_WITHOUT_FSETID, 0o6777, 0o0777, 0o0777, 0o4777),
    (ROOT_WITHOUT_FSETID, 0o6767, 0o0767, 0o0767, 0o4767),
    (MEMBER, 0o6777, 0o0777, 0o0777, 0o6777),
    (MEMBER, 0o6767, 0o2767, 0o2767, 0o6767),
    (STRANGER, 0o6777, 0o0777, 0o0777, 0o4777),
    (STRANGER, 0o6767, 0o0767, 0o0767, 0o4767),
    (ROOT, 0o2777, 0o2777, 0o0777, 0o2777),
    (ROOT, 0o2767, 0o2767, 0o2767, 0o2767),
    (MEMBER, 0o2767, 0o2767, 0o2767, 0o2767),
    (STRANGER, 0o2767, 0o0767, 0o0767, 0o0767),
    (STRANGER, 0o1777, 0o1777, 0o1777, 0o1777),
]


@pytest.mark.parametrize(("caller", "mode", "written", "given_away", "acl_set"), MEASURED)
def test_what_is_left(caller: Caller, mode: int, written: int, given_away: int, acl_set: int) -> None:
    assert without(mode, caller.takes_by_write(GID)) == written
    assert without(mode, caller.takes_by_chown(GID)) == given_away
    assert without(mode, caller.takes_by_acl(GID)) == acl_set
    assert has_set_id(mode) == bool(mode & 0o6000)
