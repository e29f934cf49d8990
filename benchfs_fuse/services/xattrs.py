"""Keep extended attributes: those of users, of trusted programs, of security modules, and POSIX ACLs.

Who may do what to which name is decided by the kernel (xattr(7)); here are the rules that do not depend on the caller.
``user.benchfs.chunk_size`` is no stored attribute but the layout itself: of a file what it has, of a directory what new
files in it get. It is not listed, so that copying tools do not carry it along.
"""

import re
import stat

from .. import acl, disk
from ..errors import (
    AccessDenied,
    AttributeTooBig,
    Exists,
    InvalidArgument,
    NoAttribute,
    NoSpaceForAttribute,
    NotPermitted,
    NotSupported,
    RangeError,
)
from ..limits import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN, KIB, MIB, XATTR_LIST_MAX, XATTR_NAME_MAX, XATTR_VALUE_MAX
from ..privileges import without
from ..rpc.messages import (
    XATTR_CREATE,
    XATTR_REPLACE,
    AttrsReply,
    Body,
    GetXattr,
    ListXattr,
    NamesReply,
    RemoveXattr,
    SetXattr,
    ValueReply,
)
from .attributes import remove_xattr, set_permissions
from .calls import Call
from .inodes import Draft, Inode, Inodes

CHUNK_SIZE = b"user.benchfs.chunk_size"
_OURS = b"user.benchfs."
_PREFIXES = (b"user.", b"trusted.", b"security.")

_SIZE = re.compile(rb"([0-9]{1,19})([KM]?)")
_UNITS = {b"": 1, b"K": KIB, b"M": MIB}


def parse_chunk_size(value: bytes) -> int:
    """Read a chunk size: decimal, in bytes or with K or M behind it. InvalidArgument."""
    match = _SIZE.fullmatch(value.strip())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if not CHUNK_SIZE_MIN <= size <= CHUNK_SIZE_MAX or size & (size - 1):
        raise InvalidArgument(f"chunk size {value!r}: a power of two from {CHUNK_SIZE_MIN} to {CHUNK_SIZE_MAX}")
    return size


class Xattrs:
    """Serve requests on extended attributes. None of them waits."""

    def __init__(self, inodes: Inodes) -> None:
        self._inodes = inodes

    def get(self, request: GetXattr, call: Call) -> Body:
        """Return a value."""
        del call
        value = self._inodes.store.get(disk.key_name(disk.XATTR, request.ino, request.name))
        if value is None:
            inode = self._inodes.get(request.ino)
            if not request.name.startswith(_PREFIXES) and request.name not in (acl.ACCESS, acl.DEFAULT):
                raise NotSupported(f"attribute {request.name!r}")
            if request.name in _PREFIXES:
                raise InvalidArgument(f"attribute {request.name!r}")
            if request.name != CHUNK_SIZE or not (inode.is_file or inode.is_dir):
                raise NoAttribute(f"{request.name!r} of inode {request.ino}")
            value = b"%d" % inode.chunk_size
        return ValueReply(value)

    def names(self, request: ListXattr, call: Call) -> Body:
        """List the names."""
        del call
        if not self._inodes.get(request.ino).xattr_size:
            return NamesReply(())
        prefix = disk.key(disk.XATTR, request.ino)
        found = self._inodes.store.scan(prefix, disk.after(prefix))
        return NamesReply(tuple(key[len(prefix) :] for key, _ in found))

    def set(self, request: SetXattr, call: Call) -> Body:
        """Set a value, or what it stands for."""
        draft = self._inodes.draft()
        inode = draft.inode(request.ino)
        if len(request.name) > XATTR_NAME_MAX:
            raise RangeError(f"a name of {len(request.name)} bytes")
        if len(request.value) > XATTR_VALUE_MAX:
            raise AttributeTooBig(f"{request.name!r}: {len(request.value)} bytes")
        if request.flags & ~(XATTR_CREATE | XATTR_REPLACE):
            raise InvalidArgument(f"flags {request.flags}")
        if request.name == CHUNK_SIZE and inode.is_dir:
            if request.flags & XATTR_CREATE:
                raise Exists(f"{request.name!r} of inode {inode.ino}")
            inode.chunk_size = parse_chunk_size(request.value)
        elif request.name == acl.ACCESS:
            self._set_access_acl(draft, inode, request.value)
            inode.mode = without(inode.mode, request.taken)
        elif request.name == acl.DEFAULT:
            self._set_default_acl(draft, inode, request.value)
        else:
            _check_name(inode, request.name)
            _store(draft, inode, request.name, request.value, request.flags)
        return self._commit(draft, inode, call)

    def _commit(self, draft: Draft, inode: Inode, call: Call) -> Body:
        draft.stamp(inode)
        reply = AttrsReply(inode.attrs())
        call.commit(draft, reply)
        return reply

    def _set_access_acl(self, draft: Draft, inode: Inode, value: bytes) -> None:
        """Set the permission bits from an ACL, and keep it if they do not say it all."""
        entries = _decode_acl(inode, value)
        if not entries:
            remove_xattr(draft, inode, acl.ACCESS)
            return
        mode = inode.mode & ~0o777 | acl.permissions_of(entries)
        if acl.is_minimal(entries):
            remove_xattr(draft, inode, acl.ACCESS)
        else:
            _store(draft, inode, acl.ACCESS, value, 0)
        set_permissions(draft, inode, mode)

    def _set_default_acl(self, draft: Draft, inode: Inode, value: bytes) -> None:
        """Set what the inodes that are made in a directory inherit. Kept also if it says no more than bits could."""
        entries = _decode_acl(inode, value)
        if entries and not inode.is_dir:
            raise AccessDenied(f"a default ACL of inode {inode.ino}, which is no directory")
        if entries:
            _store(draft, inode, acl.DEFAULT, value, 0)
        else:
            remove_xattr(draft, inode, acl.DEFAULT)

    def remove(self, request: RemoveXattr, call: Call) -> Body:
        """Remove a value. As on other file systems, an ACL that is not there can be removed."""
        draft = self._inodes.draft()
        inode = draft.inode(request.ino)
        if request.name in (acl.ACCESS, acl.DEFAULT):
            remove_xattr(draft, inode, request.name)
        else:
            _check_name(inode, request.name)
            if not remove_xattr(draft, inode, request.name):
                raise NoAttribute(f"{request.name!r} of inode {inode.ino}")
        return self._commit(draft, inode, call)


def _decode_acl(inode: Inode, value: bytes) -> acl.Acl:
    """Decode an ACL that is to be set; empty to remove it."""
    if stat.S_ISLNK(inode.mode):
        raise NotSupported("an ACL of a symbolic link")
    return acl.decode(value)


def _check_name(inode: Inode, name: bytes) -> None:
    """Refuse names that no value can be kept under."""
    if not name.startswith(_PREFIXES) or name.startswith(_OURS):
        raise NotSupported(f"attribute {name!r}")
    if name in _PREFIXES or b"\0" in name:
        raise InvalidArgument(f"attribute {name!r}")
    if name.startswith(b"user.") and not (inode.is_file or inode.is_dir):
        raise NotPermitted(f"{name!r} of inode {inode.ino}, which is neither file nor directory")


def _store(draft: Draft, inode: Inode, name: bytes, value: bytes, flags: int) -> None:
    key = disk.key_name(disk.XATTR, inode.ino, name)
    if draft.get(key) is None:
        if flags & XATTR_REPLACE:
            raise NoAttribute(f"{name!r} of inode {inode.ino}")
        if inode.xattr_size + len(name) + 1 > XATTR_LIST_MAX:
            raise NoSpaceForAttribute(f"the names of inode {inode.ino} take {inode.xattr_size} bytes")
        inode.xattr_size += len(name) + 1
    elif flags & XATTR_CREATE:
        raise Exists(f"{name!r} of inode {inode.ino}")
    draft.put(key, value)
