"""POSIX ACLs: their encoding, what makes one, and how they go with permission bits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse import acl
from benchfs_fuse.acl import GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, AclEntry
from benchfs_fuse.errors import FsError, InvalidArgument, NotSupported

PERMISSIONS = st.integers(0, 7)
IDS = st.integers(0, acl.NO_ID - 1)
MINIMAL = [AclEntry(USER_OBJ, 6), AclEntry(GROUP_OBJ, 4), AclEntry(OTHER, 0)]
NAMED = [AclEntry(USER_OBJ, 6), AclEntry(USER, 7, 1000), AclEntry(GROUP_OBJ, 4), AclEntry(MASK, 5), AclEntry(OTHER, 1)]


@st.composite
def acls(draw: st.DrawFn) -> list[AclEntry]:
    users = [AclEntry(USER, draw(PERMISSIONS), uid) for uid in draw(st.lists(IDS, max_size=3))]
    groups = [AclEntry(GROUP, draw(PERMISSIONS), gid) for gid in draw(st.lists(IDS, max_size=3))]
    masked = bool(users or groups) or draw(st.sampled_from([False, True]))
    mask = [AclEntry(MASK, draw(PERMISSIONS))] if masked else []
    return [
        AclEntry(USER_OBJ, draw(PERMISSIONS)),
        *users,
        AclEntry(GROUP_OBJ, draw(PERMISSIONS)),
        *groups,
        *mask,
        AclEntry(OTHER, draw(PERMISSIONS)),
    ]


@given(acls())
def test_what_is_encoded_is_decoded(entries: list[AclEntry]) -> None:
    assert acl.decode(acl.encode(entries)) == entries


@given(st.binary(max_size=60) | st.binary(max_size=56).map(lambda rest: b"\2\0\0\0" + rest))
def test_any_bytes_are_an_acl_or_refused(value: bytes) -> None:
    try:
        entries = acl.decode(value)
    except FsError:
        return
    if entries:
        assert acl.encode(entries) == value
        assert 0 <= acl.permissions_of(entries) <= 0o777


def test_the_encoding_is_that_of_linux() -> None:
    """As ``setfacl -m u:1000:rwx`` stores it for a file of mode 0640."""
    entries = [
        AclEntry(USER_OBJ, 6),
        AclEntry(USER, 7, 1000),
        AclEntry(GROUP_OBJ, 4),
        AclEntry(MASK, 7),
        AclEntry(OTHER, 0),
    ]
    assert acl.encode(entries).hex() == (
        "02000000"
        + "01000600ffffffff"
        + "02000700e8030000"
        + "04000400ffffffff"
        + "10000700ffffffff"
        + "20000000ffffffff"
    )


@pytest.mark.parametrize(
    "entries",
    [
        MINIMAL[1:],
        MINIMAL[:2],
        [*MINIMAL, MINIMAL[2]],
        [MINIMAL[0], *MINIMAL],
        MINIMAL[::-1],
        [entry for entry in NAMED if entry.tag != MASK],
        [*NAMED[:4], NAMED[3], NAMED[4]],
        [AclEntry(USER_OBJ, 8), *MINIMAL[1:]],
        [MINIMAL[0], AclEntry(USER, 7), *NAMED[2:]],
        [MINIMAL[0], AclEntry(0x40, 7), *NAMED[2:]],
        [MINIMAL[0], NAMED[2], AclEntry(USER, 7, 1), *NAMED[3:]],
    ],
)
def test_what_makes_no_acl_is_refused(entries: list[AclEntry]) -> None:
    with pytest.raises(InvalidArgument):
        acl.decode(acl.encode(entries))


def test_another_version_is_not_supported() -> None:
    with pytest.raises(NotSupported):
        acl.decode(b"\1\0\0\0")
    with pytest.raises(InvalidArgument):
        acl.decode(b"\2\0\0")
    assert acl.decode(b"\2\0\0\0") == []
    assert acl.decode(b"") == ()


def test_permission_bits_of_an_acl() -> None:
    assert acl.permissions_of(MINIMAL) == 0o640
    assert acl.permissions_of(NAMED) == 0o651
    assert acl.is_minimal(MINIMAL)
    assert not acl.is_minimal(NAMED)


def test_chmod_changes_the_mask_where_there_is_one() -> None:
    assert acl.with_mode(MINIMAL, 0o753) == [AclEntry(USER_OBJ, 7), AclEntry(GROUP_OBJ, 5), AclEntry(OTHER, 3)]
    changed = acl.with_mode(NAMED, 0o100720)
    assert changed == [AclEntry(USER_OBJ, 7), NAMED[1], NAMED[2], AclEntry(MASK, 2), AclEntry(OTHER, 0)]


def created(default: list[AclEntry], mode: int) -> tuple[list[AclEntry], int, bool]:
    """Do what posix_acl_create_masq() of fs/posix_acl.c does, in its own order: ACL, mode, whether the ACL is kept."""
    entries = [list(entry) for entry in default]
    kept = False
    group_obj = mask_obj = None
    masked = mode
    for entry in entries:
        if entry[0] == USER_OBJ:
            entry[1] &= masked >> 6 | ~0o7
            masked &= entry[1] << 6 | ~0o700
        elif entry[0] in (USER, GROUP):
            kept = True
        elif entry[0] == GROUP_OBJ:
            group_obj = entry
        elif entry[0] == OTHER:
            entry[1] &= masked | ~0o7
            masked &= entry[1] | ~0o7
        else:
            mask_obj = entry
            kept = True
    group = mask_obj or group_obj
    assert group is not None
    group[1] &= masked >> 3 | ~0o7
    masked &= group[1] << 3 | ~0o70
    return [AclEntry(*entry) for entry in entries], mode & ~0o777 | masked & 0o777, kept


@given(acls(), st.integers(0, 0o7777))
def test_an_acl_is_inherited_as_linux_does_it(default: list[AclEntry], mode: int) -> None:
    access = acl.inherited(default, mode)
    expected, expected_mode, kept = created(default, mode)
    assert access == expected
    assert mode & ~0o777 | acl.permissions_of(access) == expected_mode
    assert acl.is_minimal(access) == (not kept)


@given(acls(), st.integers(0, 0o7777))
def test_an_acl_after_chmod_says_that_mode(entries: list[AclEntry], mode: int) -> None:
    assert acl.permissions_of(acl.with_mode(entries, mode)) == mode & 0o777
