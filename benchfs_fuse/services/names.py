"""Give names their meaning: make, link, rename and remove them by the rules of POSIX and Linux.

Every operation that changes names is a *planning*: a generator that looks up what it needs and returns a ``Plan`` of
steps. What lies on this daemon it reads directly; for anything else it yields an ``Ask``, which the driver puts to
the other daemon. A planning that asks nothing and whose steps are all ours is done on the spot, without an await; else
the same planning runs again with somebody to ask, and its plan is executed by two-phase commit. What was looked up may
have changed until then: Conflict, and the planning begins anew.

A rename of a directory into another directory is planned and executed by the root's daemon alone, one at a time, so
that its walk from the new parent up to the root, which refuses to move a directory into itself, stays right.
"""

import stat
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, TypeVar

import msgspec
import trio

from .. import acl, disk
from ..errors import (
    Busy,
    Conflict,
    DaemonUnreachable,
    Exists,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NotADirectory,
    NotFound,
    NotPermitted,
    Stale,
    StorageError,
    WrongCoordinator,
)
from ..layout import mix64
from ..limits import BODY_MAX, NAME_MAX, READDIR_ENTRIES_MAX, SHARDS, SYMLINK_MAX
from ..model import ROOT_INO, Attrs, DirEntry, Entry, shard_of
from ..rpc.messages import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    AddLink,
    AttrsReply,
    Body,
    DropDir,
    DropEntry,
    DropLink,
    EntryReply,
    GetAttr,
    Link,
    LinkReply,
    Lookup,
    Make,
    Moved,
    NewInode,
    PutEntry,
    ReadDir,
    ReadDirReply,
    RemoveReply,
    Rename,
    RenameReply,
    Request,
    Rmdir,
    Step,
    Unlink,
)
from .calls import Call, Opens, Peers
from .inodes import GENERATION, Draft, Inode, Inodes
from .locks import Blocked, Locks
from .transactions import AttrsOf, Plan, Transactions

#: Times that an operation is planned anew because another client was faster, before it gives up with Busy.
CONFLICTS_MAX = 100
#: Of so many directories that are made deep in the tree, one goes to another shard than its parent's.
SPREAD_EVERY = 16
#: What a row of a listing takes beside its name at most: MessagePack of 4 fields and of 16 attributes, 9 bytes each.
ROW_SIZE_MAX = 192

_KINDS = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}

T = TypeVar("T")


class Ask(NamedTuple):
    """Ask another daemon."""

    daemon_id: int
    request: Request


class Found(NamedTuple):
    """Hold what a name stands for."""

    ino: int
    kind: int

    @property
    def is_dir(self) -> bool:
        """Tell whether it is a directory."""
        return stat.S_ISDIR(self.kind)


class _OneAtATime(Exception):
    """Tell that a plan moves a directory and must be made while no other does."""


#: A planning that returns a T: a plan, or a part of one.
Asking = Generator[Ask, Body, T]
Planning = Asking[Plan]


def check_name(name: bytes) -> None:
    """Refuse what cannot be the name of an entry."""
    if len(name) > NAME_MAX:
        raise NameTooLong(f"a name of {len(name)} bytes")
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise InvalidArgument(f"{name!r} is no name")


class Names:
    """Serve requests on the entries of this daemon's directories."""

    def __init__(
        self, inodes: Inodes, locks: Locks, opens: Opens, peers: Peers, transactions: Transactions, incarnation: int
    ) -> None:
        self._inodes = inodes
        self._locks = locks
        self._opens = opens
        self._peers = peers
        self._transactions = transactions
        self._is_root = inodes.home(ROOT_INO) == inodes.daemon_id
        #: Held by the rename of a directory into another one.
        self._moves = trio.Lock()
        #: Where the next directory that is spread goes: round the shards, from another place after every start.
        self._next_shard = mix64(inodes.daemon_id << 32 | incarnation) % SHARDS
        #: Directories in a row that went to their parent's shard.
        self._beside = 0

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def lookup(self, request: Lookup, call: Call) -> Body:
        """Find a name."""
        del call
        check_name(request.name)
        self._locks.check_exclusive(disk.key_name(disk.ENTRY, request.parent, request.name))
        row = self._inodes.row(request.parent, request.name)
        if row is None:
            if not self._inodes.get(request.parent).is_dir:
                raise NotADirectory(f"inode {request.parent}")
            raise NotFound(f"{request.name!r} in directory {request.parent}")
        return EntryReply(Entry(row.ino, row.kind, self._attrs_here(row.ino)))

    def _attrs_here(self, ino: int) -> Attrs | None:
        """Return the attributes of an inode that an entry names, None if another daemon holds it."""
        if self._inodes.home(ino) != self._inodes.daemon_id:
            return None
        inode = self._inodes.find(ino)
        if inode is None:
            raise StorageError(f"an entry names inode {ino}, which is not there")
        return inode.attrs()

    def readdir(self, request: ReadDir, call: Call) -> Body:
        """List names by position."""
        del call
        directory = self._inodes.get(request.ino)
        if not directory.is_dir:
            raise NotADirectory(f"inode {request.ino}")
        if request.cookie < 0 or request.count <= 0:
            raise InvalidArgument(f"{request.count} entries behind {request.cookie}")
        count = min(request.count, READDIR_ENTRIES_MAX)
        listed = self._inodes.listing(request.ino, request.cookie, count + 1)
        entries: list[DirEntry] = []
        room = BODY_MAX - ROW_SIZE_MAX
        for cookie, name, ino, kind in listed[:count]:
            room -= len(name) + ROW_SIZE_MAX
            if room < 0:
                break
            entries.append(DirEntry(cookie, name, ino, kind, self._attrs_here(ino)))
        return ReadDirReply(tuple(entries), len(entries) == len(listed), directory.parent)

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def now(self, plan: Callable[[Draft, Any], Planning]) -> Callable[[Any, Call], Body | None]:
        """Return what serves a request at once, by itself; it returns None where other daemons are needed."""

        def serve(request: Request, call: Call) -> Body | None:
            draft = self._inodes.draft()
            planning = plan(draft, request)
            try:
                next(planning)
                planning.close()
            except StopIteration as done:
                return self._transactions.apply_here(done.value, draft, call)
            except _OneAtATime:
                pass
            return None

        return serve

    def later(
        self, plan: Callable[[Draft, Any], Planning], alone: Callable[[Draft, Any], Planning] | None = None
    ) -> Callable[[Any, Call], Awaitable[Body]]:
        """Return what serves a request with the help of other daemons; ``alone`` plans what must be one at a time."""

        async def serve(request: Request, call: Call) -> Body:
            try:
                return await self._execute(plan, request, call)
            except _OneAtATime:
                assert alone is not None
                # Who waits for a dead daemon gives up in time: the others want to move too.
                async with self._moves:
                    await self._transactions.wait_settled()
                    return await self._execute(alone, request, call, self._transactions.prepare_timeout_s)

        return serve

    async def _execute(
        self,
        plan: Callable[[Draft, Any], Planning],
        request: Request,
        call: Call,
        planning_timeout_s: float = float("inf"),
    ) -> Body:
        """Plan and do, again and again if need be. DaemonUnreachable: one plan took longer than is allowed."""
        conflicts = 0
        released: trio.Event | None = None
        while True:
            try:
                with trio.fail_after(planning_timeout_s):
                    if released is not None:
                        await released.wait()
                    made = await self._ask(plan(self._inodes.draft(), request))
                try:
                    return await self._transactions.execute(made, call)
                except (Conflict, Exists):
                    conflicts += 1
                    if conflicts == CONFLICTS_MAX:
                        raise Busy(f"{request} met others {conflicts} times") from None
            except Blocked as blocked:
                released = blocked.released
            except trio.TooSlowError:
                raise DaemonUnreachable(f"no plan for {request} in {planning_timeout_s} s") from None

    async def _ask(self, planning: Planning) -> Plan:
        """Run a planning to its end; the answers and errors of other daemons are sent into it."""
        try:
            ask = next(planning)
            while True:
                try:
                    reply = await self._peers.call(ask.daemon_id, ask.request, ask.request.Reply)
                except (NotFound, Stale) as error:
                    ask = planning.throw(error)
                else:
                    ask = planning.send(reply)
        except StopIteration as done:
            plan: Plan = done.value
            return plan

    # What plannings look up.

    def _entry(self, draft: Draft, parent: int, name: bytes) -> Asking[Found | None]:
        """Return what a name stands for, None if it is free. NotADirectory, Stale."""
        home = self._inodes.home(parent)
        if home == self._inodes.daemon_id:
            self._locks.check_exclusive(disk.key_name(disk.ENTRY, parent, name))
            row = draft.row(parent, name)
            if row is not None:
                return Found(row.ino, row.kind)
            self._directory(draft, parent)
            return None
        try:
            reply = yield Ask(home, Lookup(parent, name))
        except NotFound:
            return None
        assert isinstance(reply, EntryReply)
        return Found(reply.entry.ino, reply.entry.kind)

    def _directory(self, draft: Draft, ino: int) -> Inode:
        """Return one of this daemon's directories."""
        inode = draft.inode(ino)
        if not inode.is_dir:
            raise NotADirectory(f"inode {ino}")
        return inode

    def _attrs(self, draft: Draft, ino: int) -> Asking[Attrs]:
        """Return the attributes of an inode anywhere. Stale."""
        home = self._inodes.home(ino)
        if home == self._inodes.daemon_id:
            return draft.inode(ino).attrs()
        reply = yield Ask(home, GetAttr(ino))
        assert isinstance(reply, AttrsReply)
        return reply.attrs

    # Plannings.

    def make(self, draft: Draft, request: Make) -> Planning:
        """Plan a new inode under a name, on its parent's shard or, for some directories, on another."""
        check_name(request.name)
        _check_make(request)
        if (yield from self._entry(draft, request.parent, request.name)) is not None:
            raise Exists(f"{request.name!r} in directory {request.parent}")
        directory = self._directory(draft, request.parent)
        kind = stat.S_IFMT(request.mode) or stat.S_IFREG
        mode = kind | stat.S_IMODE(request.mode)
        default_acl = b""
        if kind != stat.S_IFLNK:
            if directory.xattr_size:
                default_acl = draft.get(disk.key_name(disk.XATTR, request.parent, acl.DEFAULT)) or b""
            if not default_acl:
                mode &= ~request.umask
        gid = request.gid
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            if kind == stat.S_IFDIR:
                mode |= stat.S_ISGID
        spread = kind == stat.S_IFDIR and self._spreads(directory)
        ino = self._inodes.allocate(self._next_shard if spread else shard_of(request.parent))
        new = Attrs(
            ino=ino,
            generation=GENERATION,
            mode=mode,
            nlink=2 if kind == stat.S_IFDIR else 1,
            uid=request.uid,
            gid=gid,
            rdev=request.rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
            size=len(request.target),
            allocated=0,
            atime_ns=0,
            mtime_ns=0,
            ctime_ns=0,
            version=1,
            chunk_size=directory.chunk_size,
            width=directory.width,
            parent=request.parent if kind == stat.S_IFDIR else 0,
        )

        def also(draft: Draft, call: Call) -> None:
            if spread:
                self._next_shard = (self._next_shard + 1) % SHARDS
                self._beside = 0
            elif kind == stat.S_IFDIR:
                self._beside += 1
            if request.target:
                draft.put(disk.key(disk.TARGET, ino), request.target)
            if request.open_readers or request.open_writers:
                self._opens.add(draft, call.client_id, ino, request.open_readers, request.open_writers)

        return Plan(
            [PutEntry(request.parent, request.name, ino, kind, 0), NewInode(new, default_acl)],
            lambda attrs_of: EntryReply(Entry(ino, kind, attrs_of(ino)), attrs_of(request.parent)),
            also,
        )

    def _spreads(self, parent: Inode) -> bool:
        """Tell whether the next directory in ``parent`` goes round the shards.

        All do in the root and in what lies there, so that people and projects share the daemons out. Further down most
        stay with their parent, where making and removing them concerns one daemon (Lustre's MDTs share directories out
        likewise: ``lfs setdirstripe``'s max-inherit-rr); every SPREAD_EVERYth goes on, for trees that begin deep.
        """
        return ROOT_INO in (parent.ino, parent.parent) or self._beside >= SPREAD_EVERY - 1

    def unlink(self, draft: Draft, request: Unlink) -> Planning:
        """Plan the removal of a name that is not a directory's."""
        check_name(request.name)
        found = yield from self._entry(draft, request.parent, request.name)
        if found is None:
            raise NotFound(f"{request.name!r} in directory {request.parent}")
        if found.is_dir:
            raise IsADirectory(f"{request.name!r} in directory {request.parent}")
        return self._removal(request, found.ino, DropLink(found.ino))

    def rmdir(self, draft: Draft, request: Rmdir) -> Planning:
        """Plan the removal of an empty directory."""
        check_name(request.name)
        found = yield from self._entry(draft, request.parent, request.name)
        if found is None:
            raise NotFound(f"{request.name!r} in directory {request.parent}")
        if not found.is_dir:
            raise NotADirectory(f"{request.name!r} in directory {request.parent}")
        return self._removal(request, found.ino, DropDir(found.ino))

    def _removal(self, request: Unlink | Rmdir, ino: int, step: Step) -> Plan:
        return Plan(
            [DropEntry(request.parent, request.name, ino), step],
            lambda attrs_of: RemoveReply(ino, attrs_of(ino), attrs_of(request.parent)),
        )

    def link(self, draft: Draft, request: Link) -> Planning:
        """Plan another name of an inode. NotFound when its last name has gone."""
        check_name(request.name)
        if (yield from self._entry(draft, request.parent, request.name)) is not None:
            raise Exists(f"{request.name!r} in directory {request.parent}")
        try:
            attrs = yield from self._attrs(draft, request.ino)
        except Stale as error:
            raise NotFound(str(error)) from None
        if attrs.is_dir:
            raise NotPermitted(f"another name for directory {request.ino}")
        if attrs.nlink == 0:
            raise NotFound(f"inode {request.ino} has no name left")

        def reply(attrs_of: AttrsOf) -> Body:
            # What a retry is told of an inode elsewhere is as old as what was looked up, but for the new name.
            now = attrs_of(request.ino) or msgspec.structs.replace(attrs, nlink=attrs.nlink + 1)
            return LinkReply(now, attrs_of(request.parent))

        kind = stat.S_IFMT(attrs.mode)
        return Plan([PutEntry(request.parent, request.name, request.ino, kind, 0), AddLink(request.ino)], reply)

    def rename(self, draft: Draft, request: Rename) -> Planning:
        """Plan a rename that changes no directory's parent."""
        return self._rename(draft, request, False)

    def move(self, draft: Draft, request: Rename) -> Planning:
        """Plan a rename while no other directory changes its parent."""
        return self._rename(draft, request, True)

    def _rename(self, draft: Draft, request: Rename, alone: bool) -> Planning:
        """Plan a rename by the rules of renameat2(2), in the order in which Linux checks them."""
        old_parent, old_name, new_parent, new_name = (
            request.old_parent,
            request.old_name,
            request.new_parent,
            request.new_name,
        )
        check_name(old_name)
        check_name(new_name)
        if request.flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise InvalidArgument(f"rename flags {request.flags}")
        exchange = request.flags == RENAME_EXCHANGE
        old = yield from self._entry(draft, old_parent, old_name)
        if old is None:
            raise NotFound(f"{old_name!r} in directory {old_parent}")
        if old.is_dir and old_parent != new_parent:
            self._check_alone(alone)
        new = yield from self._entry(draft, new_parent, new_name)
        if new is not None and request.flags == RENAME_NOREPLACE:
            raise Exists(f"{new_name!r} in directory {new_parent}")
        if new is None and exchange:
            raise NotFound(f"{new_name!r} in directory {new_parent}")
        if old_parent != new_parent:
            if old.is_dir:
                yield from self._check_not_above(draft, old.ino, new_parent)
            if exchange and new is not None and new.is_dir:
                self._check_alone(alone)
                yield from self._check_not_above(draft, new.ino, old_parent)
        if new is not None and new.ino == old.ino:
            return Plan([], lambda _: RenameReply(old.ino, 0))
        steps: list[Step] = [
            PutEntry(new_parent, new_name, old.ino, old.kind, 0 if new is None else new.ino),
            Moved(old.ino, new_parent if old.is_dir else 0),
        ]
        if new is None:
            steps.append(DropEntry(old_parent, old_name, old.ino))
        elif exchange:
            steps.append(PutEntry(old_parent, old_name, new.ino, new.kind, old.ino))
            steps.append(Moved(new.ino, old_parent if new.is_dir else 0))
        else:
            if old.is_dir and not new.is_dir:
                raise NotADirectory(f"{new_name!r} in directory {new_parent}")
            if new.is_dir and not old.is_dir:
                raise IsADirectory(f"{new_name!r} in directory {new_parent}")
            steps.append(DropEntry(old_parent, old_name, old.ino))
            steps.append(DropDir(new.ino) if new.is_dir else DropLink(new.ino))
        other = 0 if new is None else new.ino

        def reply(attrs_of: AttrsOf) -> Body:
            inodes = (attrs_of(ino) for ino in dict.fromkeys((old_parent, new_parent, old.ino, other)) if ino)
            return RenameReply(old.ino, other, tuple(attrs for attrs in inodes if attrs is not None))

        return Plan(steps, reply)

    def _check_alone(self, alone: bool) -> None:
        """Leave the plan to the root's daemon, and there to one at a time: a directory changes its parent."""
        if not self._is_root:
            raise WrongCoordinator("a directory changes its parent")
        if not alone:
            raise _OneAtATime

    def _check_not_above(self, draft: Draft, ino: int, below: int) -> Asking[None]:
        """InvalidArgument if directory ``ino`` is ``below`` or above it."""
        while below != ino:
            if below == ROOT_INO:
                return
            below = (yield from self._attrs(draft, below)).parent
        raise InvalidArgument(f"directory {ino} cannot be moved into itself")


def _check_make(request: Make) -> None:
    """Refuse combinations that make no sense."""
    kind = stat.S_IFMT(request.mode)
    if (kind and kind not in _KINDS) or request.umask & ~0o777:
        raise InvalidArgument(f"mode {request.mode:o} under umask {request.umask:o}")
    if (request.open_readers or request.open_writers) and kind not in (0, stat.S_IFREG):
        raise InvalidArgument("only a regular file can be opened as it is made")
    if kind != stat.S_IFLNK:
        if request.target:
            raise InvalidArgument("only a symbolic link has a target")
    elif len(request.target) > SYMLINK_MAX:
        raise NameTooLong(f"a target of {len(request.target)} bytes")
    elif not request.target:
        raise NotFound("a symbolic link to nothing")
    elif b"\0" in request.target:
        raise InvalidArgument("a target with a NUL")
