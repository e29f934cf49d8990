"""Encode POSIX ACLs as Linux keeps them in two extended attributes, and relate them to permission bits.

offset      size  field (linux/posix_acl_xattr.h), little endian
0           4     version: 2
4 + 8 * n   2     tag
6 + 8 * n   2     permissions: 4 read, 2 write, 1 execute
8 + 8 * n   4     user or group id for USER and GROUP, else 2**32 - 1
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from .errors import InvalidArgument, NotSupported

#: The extended attributes: who may do what with an inode, and what the inodes made in a directory inherit.
ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

VERSION = 2
#: Tags (linux/posix_acl.h), in the order in which they must come.
USER_OBJ = 0x01
USER = 0x02
GROUP_OBJ = 0x04
GROUP = 0x08
MASK = 0x10
OTHER = 0x20
#: What stands for an id where there is none, and is no id (ACL_UNDEFINED_ID).
NO_ID = (1 << 32) - 1

_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")


class AclEntry(NamedTuple):
    """Grant ``permissions`` (rwx as 4, 2, 1) to what ``tag`` and ``id`` name."""

    tag: int
    permissions: int
    id: int = NO_ID


Acl = Sequence[AclEntry]


def encode(acl: Acl) -> bytes:
    """Encode an ACL."""
    return _HEADER.pack(VERSION) + b"".join(_ENTRY.pack(*entry) for entry in acl)


def decode(value: bytes) -> Acl:
    """Decode and check an ACL; empty if there are no entries, which asks for its removal.

    InvalidArgument: malformed, or not an ACL by the rules of posix_acl_valid() in fs/posix_acl.c; NotSupported: another
    version.
    """
    if not value:
        return ()
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise InvalidArgument(f"an ACL of {len(value)} bytes")
    if _HEADER.unpack_from(value)[0] != VERSION:
        raise NotSupported(f"an ACL of version {_HEADER.unpack_from(value)[0]}")
    acl = [AclEntry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :])]
    if acl and not _valid(acl):
        raise InvalidArgument("entries that make no ACL")
    return acl


def _valid(acl: Acl) -> bool:
    """Tell whether entries come in order, the three owners' once each, and with a mask where one is needed."""
    tags = [entry.tag for entry in acl]
    if tags != sorted(tags) or not set(tags) <= {USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER}:
        return False
    if any(tags.count(tag) != 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER)) or tags.count(MASK) > 1:
        return False
    if (USER in tags or GROUP in tags) and MASK not in tags:
        return False
    return all(0 <= entry.permissions <= 7 and (entry.tag not in (USER, GROUP) or entry.id != NO_ID) for entry in acl)


def permissions_of(acl: Acl) -> int:
    """Return the nine permission bits that go with an ACL: the mask, if there is one, stands for the group."""
    found = {entry.tag: entry.permissions for entry in acl}
    return found[USER_OBJ] << 6 | found.get(MASK, found[GROUP_OBJ]) << 3 | found[OTHER]


def is_minimal(acl: Acl) -> bool:
    """Tell whether permission bits say the same as this ACL, so that it need not be kept."""
    return len(acl) == 3


def with_mode(acl: Acl, mode: int) -> Acl:
    """Return the ACL after chmod(2) to ``mode``: a mask changes in place of the group's entry."""
    group = MASK if any(entry.tag == MASK for entry in acl) else GROUP_OBJ
    bits = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    return [entry._replace(permissions=bits.get(entry.tag, entry.permissions)) for entry in acl]


def inherited(default: Acl, mode: int) -> Acl:
    """Return the access ACL of what is made with ``mode`` in a directory with this default ACL: no more than both say.

    As posix_acl_create_masq() of fs/posix_acl.c. Its permission bits (``permissions_of``) are those of the new inode.
    """
    return with_mode(default, permissions_of(default) & mode)
