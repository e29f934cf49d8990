"""Say what names mean, once more and plainly: a tree of Python objects, by POSIX and the Linux manual pages alone."""

import errno
import stat
from dataclasses import dataclass, field

from benchfs_fuse.rpc.messages import RENAME_EXCHANGE, RENAME_NOREPLACE


class Refused(Exception):
    """Fail with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.number = number


@dataclass(eq=False)
class Thing:
    """Be an inode. ``names``: how many entries it has; ``entries`` and ``parent`` are a directory's."""

    kind: int
    names: int = 1
    handles: int = 0
    parent: "Thing | None" = None
    entries: dict[bytes, "Thing"] = field(default_factory=dict)

    @property
    def is_dir(self) -> bool:
        return self.kind == stat.S_IFDIR

    @property
    def gone(self) -> bool:
        """Tell whether nobody can reach it any more."""
        return self.names == 0 and self.handles == 0

    @property
    def nlink(self) -> int:
        if not self.is_dir or self.names == 0:
            return self.names
        return 2 + sum(thing.is_dir for thing in self.entries.values())


class Tree:
    """Be a file system that holds names alone."""

    def __init__(self) -> None:
        self.root = Thing(stat.S_IFDIR)

    def _enter(self, directory: Thing) -> None:
        if directory.gone:
            raise Refused(errno.ESTALE)
        if not directory.is_dir:
            raise Refused(errno.ENOTDIR)

    def _find(self, directory: Thing, name: bytes) -> Thing:
        self._enter(directory)
        if name not in directory.entries:
            raise Refused(errno.ENOENT)
        return directory.entries[name]

    def lookup(self, directory: Thing, name: bytes) -> Thing:
        return self._find(directory, name)

    def _check_free(self, directory: Thing, name: bytes) -> None:
        self._enter(directory)
        if name in directory.entries:
            raise Refused(errno.EEXIST)

    def make(self, directory: Thing, name: bytes, kind: int) -> Thing:
        self._check_free(directory, name)
        if directory.names == 0:
            raise Refused(errno.ENOENT)
        thing = directory.entries[name] = Thing(kind, parent=directory)
        return thing

    def link(self, thing: Thing, directory: Thing, name: bytes) -> None:
        self._check_free(directory, name)
        if thing.gone:
            raise Refused(errno.ENOENT)
        if thing.is_dir:
            raise Refused(errno.EPERM)
        if thing.names == 0 or directory.names == 0:
            raise Refused(errno.ENOENT)
        directory.entries[name] = thing
        thing.names += 1

    def unlink(self, directory: Thing, name: bytes) -> Thing:
        thing = self._find(directory, name)
        if thing.is_dir:
            raise Refused(errno.EISDIR)
        del directory.entries[name]
        thing.names -= 1
        return thing

    def rmdir(self, directory: Thing, name: bytes) -> Thing:
        thing = self._find(directory, name)
        if not thing.is_dir:
            raise Refused(errno.ENOTDIR)
        if thing.entries:
            raise Refused(errno.ENOTEMPTY)
        del directory.entries[name]
        thing.names = 0
        return thing

    def rename(self, old_dir: Thing, old_name: bytes, new_dir: Thing, new_name: bytes, flags: int) -> None:
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise Refused(errno.EINVAL)
        old = self._find(old_dir, old_name)
        self._enter(new_dir)
        new = new_dir.entries.get(new_name)
        if new is not None and flags == RENAME_NOREPLACE:
            raise Refused(errno.EEXIST)
        if new is None and flags == RENAME_EXCHANGE:
            raise Refused(errno.ENOENT)
        if old.is_dir and self._is_below(new_dir, old):
            raise Refused(errno.EINVAL)
        if new is not None and new.is_dir and flags == RENAME_EXCHANGE and self._is_below(old_dir, new):
            raise Refused(errno.EINVAL)
        if new is old:
            return
        if new_dir.names == 0:
            raise Refused(errno.ENOENT)
        if flags == RENAME_EXCHANGE:
            assert new is not None
            old_dir.entries[old_name], new_dir.entries[new_name] = new, old
            new.parent, old.parent = old_dir, new_dir
            return
        if new is not None:
            if old.is_dir and not new.is_dir:
                raise Refused(errno.ENOTDIR)
            if new.is_dir and not old.is_dir:
                raise Refused(errno.EISDIR)
            if new.entries:
                raise Refused(errno.ENOTEMPTY)
            new.names -= 1
        del old_dir.entries[old_name]
        new_dir.entries[new_name] = old
        old.parent = new_dir

    def _is_below(self, directory: Thing | None, top: Thing) -> bool:
        """Tell whether a directory is ``top`` or lies below it."""
        while directory is not None:
            if directory is top:
                return True
            directory = directory.parent
        return False
