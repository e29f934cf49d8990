"""Be the one name space of a cluster: every operation on names and attributes, sent to the daemon that it concerns.

Nothing is remembered here. A name and its inode may lie on different daemons; between asking the one for the name and
the other for the inode, another client may have removed or replaced it. Then the inode is gone (Stale) though the name
was there: the name is looked up again, at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import trio

from ..errors import DaemonUnreachable, InvalidArgument, NameTooLong, NotFound, Stale, StorageError, WrongCoordinator
from ..limits import NAME_MAX, READDIR_ENTRIES_MAX
from ..model import ROOT_INO, Attrs, DirEntry, DiskUsage, Entry
from ..rpc.client import Late, Link, Links
from ..rpc.messages import (
    AttrsReply,
    Done,
    EntryReply,
    GetAttr,
    GetXattr,
    LinkReply,
    ListXattr,
    Lookup,
    Make,
    NamesReply,
    Open,
    ReadDir,
    ReadDirReply,
    ReadLink,
    Release,
    RemoveReply,
    RemoveXattr,
    Rename,
    RenameReply,
    Rmdir,
    SetAttr,
    SetXattr,
    Status,
    StatusReply,
    SyncMeta,
    TargetReply,
    Touch,
    Unlink,
    Usage,
    UsageReply,
    ValueReply,
)
from ..rpc.messages import Link as LinkRequest
from .deadline import before_waiting
from .parallel import each

#: Times that a name is looked up whose inode was gone each time: another client replaces it as fast as we look.
LOOKUPS_MAX = 100
#: GetAttr requests under way for one page of a listing: a few round trips per page, and places left for others.
LISTING_REQUESTS_MAX = 32
#: Seconds that a daemon has to say how much space it has, before its last words stand for it: `df` is for people.
SPACE_TIMEOUT_S = 2.0


class Page(NamedTuple):
    """Hold a part of a directory listing; every entry has its attributes. ``end``: nothing follows."""

    entries: tuple[DirEntry, ...]
    end: bool
    #: Position behind this page.
    cookie: int
    #: The directory's own parent.
    parent: int


class Space(NamedTuple):
    """Sum up the file systems under all daemons, in bytes and inodes."""

    total: int
    free: int
    available: int
    files: int
    files_free: int


class Namespace:
    """Send operations on names and attributes to the daemons that hold them.

    Every method raises what the daemon answered (FsError), DaemonUnreachable at the deadline of the links, and may have
    been applied if it is cancelled. ``late`` and ``patient`` are those of ``Link.call``.
    """

    def __init__(self, links: Links) -> None:
        self.links = links
        #: Told of directories that are being changed for this client, and what they are like then, as far as is known.
        self.on_changed: Callable[[int, Attrs | None], None] = lambda ino, attrs: None
        #: Daemons that lost power since the last ``sync_names``.
        self._power_lost: set[int] = set()
        #: What each daemon last said of its space.
        self._usage: dict[int, tuple[DiskUsage, ...]] = {}

    def link_of(self, ino: int) -> Link:
        """Return the way to the daemon that holds an inode. Stale for numbers that no inode can have."""
        try:
            return self.links.to(self.links.shard_map.of_ino(ino))
        except ValueError as error:
            raise Stale(str(error)) from None

    async def getattr(self, ino: int) -> Attrs:
        """Return the attributes of an inode. Stale when it has gone."""
        return (await self.link_of(ino).call(GetAttr(ino), AttrsReply)).attrs

    async def setattr(self, request: SetAttr) -> Attrs:
        """Change attributes, return them all."""
        return (await self.link_of(request.ino).call(request, AttrsReply)).attrs

    async def lookup(self, parent: int, name: bytes) -> Attrs:
        """Return the attributes of what a name stands for. NotFound, NotADirectory, Stale (the directory has gone)."""
        _check_name(name)
        for _ in range(LOOKUPS_MAX):
            entry = (await self.link_of(parent).call(Lookup(parent, name), EntryReply)).entry
            if (attrs := await self._attrs_of(entry)) is not None:
                return attrs
        raise NotFound(f"{name!r} was replaced {LOOKUPS_MAX} times while it was looked up")

    async def _attrs_of(self, entry: Entry) -> Attrs | None:
        """Return the attributes that belong to an entry, None when its inode has gone meanwhile."""
        if entry.attrs is not None:
            return entry.attrs
        try:
            return await self.getattr(entry.ino)
        except Stale:
            return None

    async def make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        *,
        rdev: int = 0,
        target: bytes = b"",
        reader: bool = False,
        writer: bool = False,
        umask: int = 0,
        late: Late[EntryReply] | None = None,
    ) -> Attrs:
        """Make an inode under a name, see Make; ``reader`` or ``writer`` registers a handle on it. Exists.

        ``umask`` 0: ``mode`` holds what it left already.
        """
        _check_name(name)
        request = Make(parent, name, mode, uid, gid, rdev, target, int(reader), int(writer), umask)
        with self._changing(parent) as told:
            reply = await self.link_of(parent).call(request, EntryReply, late=late)
            told.append(reply.parent)
        attrs = await self._attrs_of(reply.entry)
        if attrs is None:
            raise NotFound(f"{name!r} was removed as soon as it was made")
        return attrs

    async def unlink(self, parent: int, name: bytes) -> RemoveReply:
        """Remove a name that is not a directory's; tell whose."""
        _check_name(name)
        with self._changing(parent) as told:
            reply = await self.link_of(parent).call(Unlink(parent, name), RemoveReply)
            told += (reply.parent, reply.attrs)
        return reply

    async def rmdir(self, parent: int, name: bytes) -> RemoveReply:
        """Remove an empty directory; tell which."""
        _check_name(name)
        with self._changing(parent) as told:
            reply = await self.link_of(parent).call(Rmdir(parent, name), RemoveReply)
            told.append(reply.parent)
        return reply

    @contextmanager
    def _changing(self, *parents: int) -> Iterator[list[Attrs | None]]:
        """Tell what becomes of directories that are changed; the block appends what the daemon says of all inodes."""
        told: list[Attrs | None] = []
        try:
            yield told
        finally:
            for parent in parents:
                self.on_changed(parent, None)
            for attrs in told:
                if attrs is not None:
                    self.on_changed(attrs.ino, attrs)

    async def link(self, ino: int, parent: int, name: bytes) -> Attrs:
        """Give an inode another name."""
        _check_name(name)
        with self._changing(parent) as told:
            reply = await self.link_of(parent).call(LinkRequest(ino, parent, name), LinkReply)
            told += (reply.parent, reply.attrs)
        return reply.attrs

    async def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> RenameReply:
        """Move a name; ``flags`` as in renameat2(2)."""
        _check_name(old_name)
        _check_name(new_name)
        request = Rename(old_parent, old_name, new_parent, new_name, flags)
        with self._changing(old_parent, new_parent) as told:
            try:
                reply = await self.link_of(old_parent).call(request, RenameReply)
            except WrongCoordinator:
                reply = await self.link_of(ROOT_INO).call(request, RenameReply)
            told += reply.changed
        return reply

    async def readdir(self, ino: int, cookie: int = 0, count: int = READDIR_ENTRIES_MAX) -> Page:
        """List up to ``count`` entries behind position ``cookie``, all with attributes.

        A page may hold fewer, even none, though more follow: names that are removed while it is put together are left
        out. ``end`` tells.
        """
        reply = await self.link_of(ino).call(ReadDir(ino, cookie, count), ReadDirReply)
        behind = reply.entries[-1].cookie if reply.entries else cookie
        elsewhere = [entry for entry in reply.entries if entry.attrs is None]
        if not elsewhere:
            return Page(reply.entries, reply.end, behind, reply.parent)
        found = await self._attrs_of_all(ino, elsewhere)
        entries = [
            entry if entry.attrs is not None else DirEntry(entry.cookie, entry.name, attrs.ino, attrs.mode, attrs)
            for entry in reply.entries
            if (attrs := entry.attrs or found.get(entry.cookie)) is not None
        ]
        return Page(tuple(entries), reply.end, behind, reply.parent)

    async def _attrs_of_all(self, parent: int, entries: Iterable[DirEntry]) -> dict[int, Attrs]:
        """Fetch attributes, some at a time; return them by cookie. What was removed meanwhile is left out."""
        places = trio.Semaphore(LISTING_REQUESTS_MAX)
        found: dict[int, Attrs] = {}

        async def one(entry: DirEntry) -> None:
            async with places:
                try:
                    found[entry.cookie] = await self.getattr(entry.ino)
                except Stale:
                    with suppress(NotFound, Stale):
                        found[entry.cookie] = await self.lookup(parent, entry.name)

        await each(one, entries)
        return found

    async def readlink(self, ino: int) -> bytes:
        """Return where a symbolic link points."""
        return (await self.link_of(ino).call(ReadLink(ino), TargetReply)).target

    async def open(self, ino: int, writer: bool, late: Late[AttrsReply] | None = None) -> Attrs:
        """Register a handle; return fresh attributes. Stale when the inode has gone."""
        return (await self.link_of(ino).call(Open(ino, writer), AttrsReply, late=late)).attrs

    async def release(
        self,
        ino: int,
        writer: bool,
        doubtful: bool = False,
        late: Late[Done] | None = None,
        *,
        patient: bool = False,
        polls: bool = True,
    ) -> None:
        """Take a handle back; ``doubtful``: writes failed, what lies behind the size is to be trimmed."""
        request = Release(ino, int(not writer), int(writer), doubtful)
        await self.link_of(ino).call(request, Done, late=late, patient=patient, polls=polls)

    async def touch(self, ino: int) -> Attrs:
        """Note that the file was read, as relatime asks for."""
        return (await self.link_of(ino).call(Touch(ino), AttrsReply)).attrs

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        """Return an extended attribute. NoAttribute."""
        return (await self.link_of(ino).call(GetXattr(ino, name), ValueReply)).value

    async def listxattr(self, ino: int) -> Sequence[bytes]:
        """List the names of extended attributes."""
        return (await self.link_of(ino).call(ListXattr(ino), NamesReply)).names

    async def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0, taken: int = 0) -> Attrs:
        """Set an extended attribute; ``flags`` as in setxattr(2), see SetXattr."""
        return (await self.link_of(ino).call(SetXattr(ino, name, value, flags, taken), AttrsReply)).attrs

    async def removexattr(self, ino: int, name: bytes) -> Attrs:
        """Remove an extended attribute. NoAttribute."""
        return (await self.link_of(ino).call(RemoveXattr(ino, name), AttrsReply)).attrs

    async def sync_names(self) -> None:
        """Bring the names and attributes on all daemons to stable storage.

        All of them: a directory's entries lie with its daemon, but the inodes of its subdirectories lie elsewhere.
        """

        async def one(daemon_id: int) -> None:
            await self.links.to(daemon_id).call(SyncMeta(), Done)

        await each(one, self.links.daemons)
        lost, self._power_lost = self._power_lost, set()
        if lost:
            raise StorageError(f"daemons {sorted(lost)} lost power, and with it names that were not synced")

    def power_lost(self, daemon_id: int) -> None:
        """Take note that a daemon may have lost names that were not synced: the next ``sync_names`` says so."""
        self._power_lost.add(daemon_id)

    async def space(self) -> Space:
        """Sum up the space of the cluster; a file system that carries several daemons counts once.

        For a daemon that is missing or silent its last words count; one that has never said anything counts for
        nothing. DaemonUnreachable when nothing is known of any.
        """
        told: set[int] = set()

        async def one(daemon_id: int) -> None:
            link = self.links.to(daemon_id)
            if daemon_id in self._usage and not link.connected:
                return
            before_waiting()
            with trio.move_on_after(SPACE_TIMEOUT_S), suppress(DaemonUnreachable, StorageError):
                self._usage[daemon_id] = (await link.call(Usage(), UsageReply)).usage
                told.add(daemon_id)

        await each(one, self.links.daemons)
        if not self._usage:
            raise DaemonUnreachable(f"none of {len(self.links.daemons)} daemons says how much space it has")
        found: dict[str, DiskUsage] = {}
        for daemon_id in sorted(self._usage, key=told.__contains__):  # what was said just now goes last, and stays
            found.update((usage.filesystem, usage) for usage in self._usage[daemon_id])
        usages = found.values()
        return Space(
            sum(usage.total for usage in usages),
            sum(usage.free for usage in usages),
            sum(usage.available for usage in usages),
            sum(usage.files for usage in usages),
            sum(usage.files_free for usage in usages),
        )

    async def status(self, daemon_id: int) -> StatusReply:
        """Ask a daemon how it is."""
        return await self.links.to(daemon_id).call(Status(), StatusReply)


def _check_name(name: bytes) -> None:
    """Refuse what is no name of one entry before anybody is asked."""
    if len(name) > NAME_MAX:
        raise NameTooLong(f"{len(name)} bytes")
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise InvalidArgument(f"{name!r} is no name")
