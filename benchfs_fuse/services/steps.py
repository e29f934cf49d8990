"""Check and apply the closed set of steps that every operation on names is made of.

A step concerns one daemon. ``check`` says whether it can be done, ``apply`` does it in a draft, and once ``check``
passed nothing may change in between: either both happen without an await between them, or the locks that ``wanted``
names are held.

What a step expects of an entry or inode is what the coordinator had looked up, unlocked. Where it is no longer so the
step fails with Conflict, and the coordinator looks again.
"""

import stat
from collections.abc import Callable, Iterable

from .. import disk
from ..errors import Conflict, Exists, NotADirectory, NotEmpty, NotFound, NotPermitted, TooManyLinks
from ..limits import LINK_MAX
from ..rpc.messages import AddLink, DropDir, DropEntry, DropLink, Moved, NewInode, PutEntry, Step
from .attributes import inherit
from .inodes import ENTRY_SIZE, Draft, Inode, Row


def place(step: Step) -> int:
    """Return the inode whose daemon a step concerns."""
    if isinstance(step, PutEntry | DropEntry):
        return step.parent
    return step.attrs.ino if isinstance(step, NewInode) else step.ino


def wanted(steps: Iterable[Step]) -> dict[bytes, bool]:
    """Name the locks that steps need, and whether exclusively."""
    keys: dict[bytes, bool] = {}
    for step in steps:
        if isinstance(step, PutEntry | DropEntry):
            keys[disk.key_name(disk.ENTRY, step.parent, step.name)] = True
            keys.setdefault(disk.key(disk.INODE, step.parent), False)
        else:
            keys[disk.key(disk.INODE, place(step))] = True
    return keys


def check(draft: Draft, step: Step) -> None:
    """Raise what stands against a step."""
    match step:
        case PutEntry(parent=parent, name=name, replaces=replaces):
            _check_directory(draft, parent)
            row = draft.row(parent, name)
            if row is not None and not replaces:
                raise Exists(f"{name!r} in directory {parent}")
            if (row.ino if row is not None else 0) != replaces:
                raise Conflict(f"{name!r} in directory {parent} stands for another inode")
        case DropEntry(parent=parent, name=name, ino=ino):
            row = draft.row(parent, name)
            if row is None or row.ino != ino:
                raise Conflict(f"{name!r} in directory {parent} stands for another inode")
        case NewInode(attrs=attrs):
            if draft.find(attrs.ino) is not None:
                raise Conflict(f"inode number {attrs.ino} is taken")
        case AddLink(ino=ino):
            inode = _check_named(draft, ino)
            if inode.is_dir:
                raise NotPermitted(f"another name for directory {ino}")
            if inode.nlink >= LINK_MAX:
                raise TooManyLinks(f"inode {ino} has {inode.nlink} names")
        case DropDir(ino=ino):
            if _check_named(draft, ino).entries:
                raise NotEmpty(f"directory {ino}")
        case DropLink(ino=ino) | Moved(ino=ino):
            _check_named(draft, ino)


def _check_directory(draft: Draft, ino: int) -> None:
    directory = draft.inode(ino)
    if not directory.is_dir:
        raise NotADirectory(f"inode {ino}")
    if directory.nlink == 0:
        raise NotFound(f"directory {ino} was removed")


def _check_named(draft: Draft, ino: int) -> Inode:
    """Return an inode that must still have a name: its entry said so a moment ago."""
    inode = draft.find(ino)
    if inode is None or inode.nlink == 0:
        raise Conflict(f"inode {ino} has gone")
    return inode


def apply(draft: Draft, step: Step, unlinked: Callable[[Draft, Inode], None]) -> int:
    """Do a step; return the inode whose attributes the coordinator may want, 0 for steps on entries.

    ``unlinked`` is called with an inode that lost its last name.
    """
    match step:
        case PutEntry(parent=parent, name=name, ino=ino, kind=kind):
            _put_entry(draft, parent, name, ino, kind)
            return 0
        case DropEntry(parent=parent, name=name):
            _drop_entry(draft, parent, name)
            return 0
        case NewInode(attrs=attrs, default_acl=default_acl):
            inode = Inode.of(attrs)
            inode.atime_ns = inode.mtime_ns = inode.ctime_ns = draft.now_ns
            if default_acl:
                inherit(draft, inode, default_acl)
            draft.add(inode)
            return inode.ino
        case AddLink(ino=ino):
            inode = draft.inode(ino)
            inode.nlink += 1
            draft.stamp(inode)
            return ino
        case DropLink(ino=ino):
            inode = draft.inode(ino)
            inode.nlink -= 1
            draft.stamp(inode)
            if inode.nlink == 0:
                unlinked(draft, inode)
            return ino
        case DropDir(ino=ino):
            inode = draft.inode(ino)
            inode.nlink = 0
            draft.stamp(inode)
            unlinked(draft, inode)
            return ino
        case Moved(ino=ino, parent=parent):
            inode = draft.inode(ino)
            if parent:
                inode.parent = parent
            draft.stamp(inode)
            return ino


def _put_entry(draft: Draft, parent: int, name: bytes, ino: int, kind: int) -> None:
    """Put a name in; one that is replaced keeps its position, so that no listing shows the name twice."""
    directory = draft.inode(parent)
    row = draft.row(parent, name)
    if row is None:
        cookie = directory.next_cookie
        directory.next_cookie += 1
        directory.entries += 1
        directory.size += ENTRY_SIZE
    else:
        cookie = row.cookie
        directory.nlink -= stat.S_ISDIR(row.kind)
    directory.nlink += stat.S_ISDIR(kind)
    draft.put_row(parent, name, Row(ino, kind, cookie))
    draft.stamp(directory, data=True)


def _drop_entry(draft: Draft, parent: int, name: bytes) -> None:
    directory = draft.inode(parent)
    row = draft.row(parent, name)
    assert row is not None, "checked before"
    directory.entries -= 1
    directory.size -= ENTRY_SIZE
    directory.nlink -= stat.S_ISDIR(row.kind)
    draft.drop_row(parent, name, row)
    draft.stamp(directory, data=True)
