"""Define every request and reply: the closed set of things that processes say to each other.

Bodies are MessagePack arrays, checked against these types as they are decoded (msgspec). The frame carries ``op``; bulk
data travels beside the body (``ReadChunk`` receives it, ``WriteChunk`` sends it). A request whose class is ``recorded``
changes names or attributes and is prefixed by 12 bytes that make a retry recognisable:

    offset  size  field
    0       4     slot: index of one of the client's slots at this daemon, little endian
    4       8     seq: grows by one with every new request on the slot, little endian

The daemon stores the outcome of the newest request of every slot in the transaction that the request made, as NFSv4.1
does (RFC 8881, section 2.10.6): a request that arrives again is answered, not applied again.
"""

import struct
from typing import Annotated, Any, ClassVar, TypeVar, cast

import msgspec

from ..errors import ProtocolError
from ..limits import DAEMONS_MAX, IN_FLIGHT_MAX, LABEL_MAX, STEPS_MAX
from ..model import Attrs, Count, DataRange, DirEntry, DiskUsage, Entry, Id, LockKind, LockType, Mode, TimeNs
from ..observe.durations import Counters, Durations
from ..observe.spans import Served

#: Version of everything in this package that two processes must agree on. Any change of a message raises it.
PROTOCOL_VERSION = 1

T = TypeVar("T", bound="Body")

_RECORD_ID = struct.Struct("<IQ")


class Body(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Be one encoded request or reply."""


class Request(Body, frozen=True):
    """Ask for something. ``op`` is its number on the wire, ``Reply`` the type of the answer.

    ``overwrites``: whoever gives the request up closes its connection, so that it cannot change data later on.
    """

    op: ClassVar[int]
    Reply: ClassVar[type[Body]]
    recorded: ClassVar[bool] = False
    overwrites: ClassVar[bool] = False


class Done(Body, frozen=True):
    """Answer a request that has nothing to tell."""


class Failure(Body, frozen=True):
    """Explain a status other than 0, for logs."""

    message: str


class AttrsReply(Body, frozen=True):
    """Return the attributes of an inode."""

    attrs: Attrs


class EntryReply(Body, frozen=True):
    """Return what a name stands for. ``parent``: attributes of the directory, where a name was made in it."""

    entry: Entry
    parent: Attrs | None = None


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class HelloReply(Body, frozen=True):
    """Tell the client about the daemon. ``incarnation`` differs after every start of the daemon.

    ``lease_s``: silence after which the session ends. ``map_version``: version of the daemon's shard map. ``losses``:
    how often it may have lost what was not synced.
    """

    incarnation: int
    lease_s: float
    map_version: int
    losses: int = 0


class Hello(Request, frozen=True):
    """Begin (``resume`` false) or resume a session: the first request on every channel.

    Stale: the session to resume is unknown here, or this client was expelled; it has to start anew as another client.
    ``kind`` is ``mount``, ``daemon`` or ``tool``; ``label`` says for people what it is (the mount point).
    """

    op: ClassVar[int] = 1
    Reply: ClassVar[type[Body]] = HelloReply
    kind: str
    label: Annotated[str, msgspec.Meta(max_length=LABEL_MAX)]
    resume: bool


class OpenCount(Body, frozen=True):
    """Count the handles that a session holds on one inode."""

    ino: int
    readers: Count
    writers: Count


class LockClaim(Body, frozen=True):
    """Name one lock that a session holds: bytes ``start`` to ``end``, that one included."""

    ino: int
    kind: LockKind
    owner: int
    type: LockType
    start: int
    end: int
    pid: int


class ReclaimReply(Body, frozen=True):
    """List the inodes that could not be reclaimed: they have gone, their handles are stale."""

    lost: tuple[int, ...]


class Reclaim(Request, frozen=True):
    """Register open handles and locks again after the daemon started anew; ``last`` ends the reclaim of this session.

    All handles come before the first lock.
    """

    op: ClassVar[int] = 2
    Reply: ClassVar[type[Body]] = ReclaimReply
    opens: tuple[OpenCount, ...]
    last: bool
    locks: tuple[LockClaim, ...] = ()


class Heartbeat(Request, frozen=True):
    """Renew the lease."""

    op: ClassVar[int] = 3
    Reply: ClassVar[type[Body]] = Done


class Goodbye(Request, frozen=True):
    """End the session: its handles are released, its record goes."""

    op: ClassVar[int] = 4
    Reply: ClassVar[type[Body]] = Done


class Forget(Request, frozen=True):
    """Give up the request that came before on the same slot: by the answer it has been applied, or never will be."""

    op: ClassVar[int] = 5
    Reply: ClassVar[type[Body]] = Done
    recorded: ClassVar[bool] = True


# ── names and attributes ─────────────────────────────────────────────────────────────────────────────────────────────


class Lookup(Request, frozen=True):
    """Find ``name`` in directory ``parent``. NotFound, NotADirectory, Stale (the directory has gone)."""

    op: ClassVar[int] = 16
    Reply: ClassVar[type[Body]] = EntryReply
    parent: int
    name: bytes


class GetAttr(Request, frozen=True):
    """Return the attributes of an inode. Stale when it has gone."""

    op: ClassVar[int] = 17
    Reply: ClassVar[type[Body]] = AttrsReply
    ino: int


#: Time stamps in SetAttr: leave as it is; set to the daemon's clock. Everything else is ns since the epoch.
TIME_OMIT = -(1 << 63)
TIME_NOW = -(1 << 63) + 1


class SetAttr(Request, frozen=True):
    """Change attributes; None and TIME_OMIT leave them. Returns them all. ctime changes with every request but one:
    that sets a size to what it is and nothing else, as truncate(2) may; whoever wants the times set says TIME_NOW.

    ``size`` truncates or extends: below the old size, the chunks behind have gone on every daemon before the reply.
    ``taken`` are set-ID bits to take away (privileges.py), behind ``mode``; where there are none that is no change.
    What sets the size or an owner of a file takes its ``security.capability`` away.
    """

    op: ClassVar[int] = 18
    Reply: ClassVar[type[Body]] = AttrsReply
    recorded: ClassVar[bool] = True
    ino: int
    mode: Mode | None = None
    uid: Id | None = None
    gid: Id | None = None
    size: int | None = None
    atime_ns: TimeNs = TIME_OMIT
    mtime_ns: TimeNs = TIME_OMIT
    taken: Mode = 0


class Make(Request, frozen=True):
    """Make an inode of any type under a name: mkdir, mknod, symlink (``target``), create.

    ``mode`` holds type and permission bits. The daemon takes those of ``umask`` away, unless the parent has a default
    ACL: then the new inode inherits that instead (acl(5)), but for a symbolic link. It also applies the rules of a
    set-group-ID directory: group of the parent; directories inherit the bit. That a caller who is not in that group
    gets no set-group-ID executable is the caller's kernel's matter, which knows his groups (mode_strip_sgid() of
    fs/inode.c). ``open_readers``/``open_writers`` register a handle on the new file in the same transaction (only for
    regular files). Exists when the name is taken.
    """

    op: ClassVar[int] = 19
    Reply: ClassVar[type[Body]] = EntryReply
    recorded: ClassVar[bool] = True
    parent: int
    name: bytes
    mode: Mode
    uid: Id
    gid: Id
    rdev: Count = 0
    target: bytes = b""
    open_readers: Count = 0
    open_writers: Count = 0
    umask: Mode = 0


class RemoveReply(Body, frozen=True):
    """Name the inode that lost a name, and its attributes where this daemon holds it; and those of the directory."""

    ino: int
    attrs: Attrs | None
    parent: Attrs | None = None


class Unlink(Request, frozen=True):
    """Remove a name that is not a directory's. NotFound, IsADirectory."""

    op: ClassVar[int] = 20
    Reply: ClassVar[type[Body]] = RemoveReply
    recorded: ClassVar[bool] = True
    parent: int
    name: bytes


class Rmdir(Request, frozen=True):
    """Remove an empty directory. NotFound, NotADirectory, NotEmpty."""

    op: ClassVar[int] = 21
    Reply: ClassVar[type[Body]] = RemoveReply
    recorded: ClassVar[bool] = True
    parent: int
    name: bytes


class LinkReply(Body, frozen=True):
    """Return the attributes of the inode, and those of the directory."""

    attrs: Attrs
    parent: Attrs | None = None


class Link(Request, frozen=True):
    """Give inode ``ino`` another name. Sent to the daemon of ``parent``. NotPermitted for directories."""

    op: ClassVar[int] = 22
    Reply: ClassVar[type[Body]] = LinkReply
    recorded: ClassVar[bool] = True
    ino: int
    parent: int
    name: bytes


#: Flags of Rename: those of renameat2(2).
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


class RenameReply(Body, frozen=True):
    """Name the inode that moved, and the one that was replaced or exchanged (0: none).

    ``changed``: attributes of those of them that this daemon holds, and of the directories.
    """

    moved: int
    other: int
    changed: tuple[Attrs, ...] = ()


class Rename(Request, frozen=True):
    """Move a name. Sent to the daemon of ``old_parent``.

    Answers WrongCoordinator when a directory would change its parent: then it is sent to the daemon of the root, which
    serialises those, so that two of them cannot make a cycle.
    """

    op: ClassVar[int] = 23
    Reply: ClassVar[type[Body]] = RenameReply
    recorded: ClassVar[bool] = True
    old_parent: int
    old_name: bytes
    new_parent: int
    new_name: bytes
    flags: int


class ReadDirReply(Body, frozen=True):
    """Return one page of a directory, as much as asked for or as a body holds. ``end``: nothing follows."""

    entries: tuple[DirEntry, ...]
    end: bool
    parent: int


class ReadDir(Request, frozen=True):
    """List up to ``count`` entries behind position ``cookie`` (0: from the start), without ``.`` and ``..``.

    Attributes come with those whose inode lives here. Cookies are stable: an entry keeps its cookie while it exists,
    and new entries come last.
    """

    op: ClassVar[int] = 24
    Reply: ClassVar[type[Body]] = ReadDirReply
    ino: int
    cookie: int
    count: int


class TargetReply(Body, frozen=True):
    """Return where a symbolic link points."""

    target: bytes


class ReadLink(Request, frozen=True):
    """Read a symbolic link. InvalidArgument for anything else."""

    op: ClassVar[int] = 25
    Reply: ClassVar[type[Body]] = TargetReply
    ino: int


class Open(Request, frozen=True):
    """Register one handle (``writer``: opened for writing) and return fresh attributes. Stale when it has gone."""

    op: ClassVar[int] = 26
    Reply: ClassVar[type[Body]] = AttrsReply
    recorded: ClassVar[bool] = True
    ino: int
    writer: bool


class Release(Request, frozen=True):
    """Take handles back. ``doubtful``: writes failed or were sent twice; the daemon trims what lies behind the size and
    counts the space anew, when nobody has the file open any more.
    """

    op: ClassVar[int] = 27
    Reply: ClassVar[type[Body]] = Done
    recorded: ClassVar[bool] = True
    ino: int
    readers: Count
    writers: Count
    doubtful: bool = False


class CommitWrite(Request, frozen=True):
    """Publish what was written: the size grows to ``end`` at least, ``allocated_delta`` bytes are accounted.

    ``reach``: space may have been allocated up to this byte, though the size does not say so. mtime and ctime become
    the daemon's clock. ``change``, of this inode and without a size, is applied behind that, as one change of both.
    """

    op: ClassVar[int] = 28
    Reply: ClassVar[type[Body]] = AttrsReply
    recorded: ClassVar[bool] = True
    ino: int
    end: int
    allocated_delta: int
    reach: int = 0
    change: SetAttr | None = None


class AppendReply(Body, frozen=True):
    """Return where the reserved range starts; the attributes count it in."""

    offset: int
    attrs: Attrs


class Append(Request, frozen=True):
    """Reserve ``length`` bytes at the end of the file for the caller to write. A reader sees zeros there until then.

    Takes ``taken`` (privileges.py) and ``security.capability`` away: for these writes no kernel does.
    """

    op: ClassVar[int] = 29
    Reply: ClassVar[type[Body]] = AppendReply
    recorded: ClassVar[bool] = True
    ino: int
    length: int
    taken: Mode = 0


class Touch(Request, frozen=True):
    """Set atime to the daemon's clock if relatime's rule asks for it (mount(8)): reads that reached a mount."""

    op: ClassVar[int] = 30
    Reply: ClassVar[type[Body]] = AttrsReply
    ino: int


class ValueReply(Body, frozen=True):
    """Return the value of an extended attribute."""

    value: bytes


class GetXattr(Request, frozen=True):
    """Return an extended attribute. NoAttribute."""

    op: ClassVar[int] = 31
    Reply: ClassVar[type[Body]] = ValueReply
    ino: int
    name: bytes


class NamesReply(Body, frozen=True):
    """List names."""

    names: tuple[bytes, ...]


class ListXattr(Request, frozen=True):
    """List the names of extended attributes."""

    op: ClassVar[int] = 32
    Reply: ClassVar[type[Body]] = NamesReply
    ino: int


#: Flags of SetXattr: those of setxattr(2).
XATTR_CREATE = 1
XATTR_REPLACE = 2


class SetXattr(Request, frozen=True):
    """Set an extended attribute. Exists/NoAttribute by flags, AttributeTooBig, NoSpaceForAttribute.

    ``system.posix_acl_access`` also sets the permission bits; ``system.posix_acl_default`` is for directories alone
    (AccessDenied); for both the flags mean nothing, as on Linux. ``user.benchfs.chunk_size`` on a directory sets what
    new files in it inherit. ``taken`` are set-ID bits that an access ACL takes away (privileges.py).
    """

    op: ClassVar[int] = 33
    Reply: ClassVar[type[Body]] = AttrsReply
    recorded: ClassVar[bool] = True
    ino: int
    name: bytes
    value: bytes
    flags: int
    taken: Mode = 0


class RemoveXattr(Request, frozen=True):
    """Remove an extended attribute. NoAttribute."""

    op: ClassVar[int] = 34
    Reply: ClassVar[type[Body]] = AttrsReply
    recorded: ClassVar[bool] = True
    ino: int
    name: bytes


class SyncMeta(Request, frozen=True):
    """Bring the daemon's names and attributes to stable storage."""

    op: ClassVar[int] = 35
    Reply: ClassVar[type[Body]] = Done


# ── advisory locks ───────────────────────────────────────────────────────────────────────────────────────────────────


#: Outcomes of SetLock: it is held (or given back); it waits, LockGranted will come; somebody else has it.
LOCK_GRANTED = 0
LOCK_QUEUED = 1
LOCK_REFUSED = 2


class LockReply(Body, frozen=True):
    """Tell what became of a request for a lock. ``version`` numbers its change: later ones have higher numbers."""

    outcome: int
    version: int


class SetLock(Request, frozen=True):
    """Lock or unlock bytes ``start`` to ``end``, that one included, for an owner of this client; answered at once.

    ``ticket`` names the request if it is to wait (0: it is not); with the ticket of one that waits already, it asks
    for news. ``pid`` is for GetLock. Deadlock, NoLocks; Stale: the client does not have the inode open.
    """

    op: ClassVar[int] = 40
    Reply: ClassVar[type[Body]] = LockReply
    ino: int
    kind: LockKind
    owner: int
    type: LockType
    start: int
    end: int
    pid: int
    ticket: int


class LockHolder(Body, frozen=True):
    """Describe a lock that stands in the way. ``pid``: 0 if its owner runs on another host."""

    type: LockType
    start: int
    end: int
    pid: int


class GetLockReply(Body, frozen=True):
    """Return the first lock that stands in the way, if any."""

    holder: LockHolder | None


class GetLock(Request, frozen=True):
    """Ask which lock of another owner is in the way of one (F_GETLK). Waits while locks may be reclaimed."""

    op: ClassVar[int] = 41
    Reply: ClassVar[type[Body]] = GetLockReply
    ino: int
    kind: LockKind
    owner: int
    type: LockType
    start: int
    end: int


class CancelLockReply(Body, frozen=True):
    """Tell whether the request was waiting still; if not, it may have been granted."""

    waiting: bool


class CancelLock(Request, frozen=True):
    """End the wait of the request that ``ticket`` names."""

    op: ClassVar[int] = 42
    Reply: ClassVar[type[Body]] = CancelLockReply
    ticket: int


class LockGranted(Request, frozen=True):
    """Tell a client that the request that ``ticket`` names is granted. Version 0: it waits no more, to be sent again.

    From daemons to clients, sent once: a client that was away asks for news when it comes back.
    """

    op: ClassVar[int] = 43
    Reply: ClassVar[type[Body]] = Done
    ticket: int
    version: int


# ── chunks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class ReadChunkReply(Body, frozen=True):
    """Tell how many bytes exist from the offset on; as many come as payload."""

    length: int


class ReadChunk(Request, frozen=True):
    """Read from a chunk; the payload is received into the caller's buffer."""

    op: ClassVar[int] = 64
    Reply: ClassVar[type[Body]] = ReadChunkReply
    ino: int
    index: int
    offset: int
    length: int


class WriteChunkReply(Body, frozen=True):
    """Tell by how many bytes the allocated space grew."""

    allocated_delta: int


class WriteChunk(Request, frozen=True):
    """Write the payload into a chunk at ``offset``."""

    op: ClassVar[int] = 65
    Reply: ClassVar[type[Body]] = WriteChunkReply
    ino: int
    index: int
    offset: int


class TrimChunksReply(Body, frozen=True):
    """Tell the bytes freed on this daemon, and those of the file that are left on it."""

    freed: int
    left: int


class TrimChunks(Request, frozen=True):
    """Drop everything of a file at and behind byte ``offset`` of chunk ``index``. From daemons only.

    ``durable``: on stable storage before this is answered.
    """

    op: ClassVar[int] = 66
    Reply: ClassVar[type[Body]] = TrimChunksReply
    ino: int
    index: int
    offset: int
    durable: bool = False


class DropChunksReply(Body, frozen=True):
    """Tell the bytes freed."""

    freed: int


class DropChunks(Request, frozen=True):
    """Drop all chunks of dead files. From daemons only. ``durable``: on stable storage before this is answered."""

    op: ClassVar[int] = 67
    Reply: ClassVar[type[Body]] = DropChunksReply
    inos: tuple[int, ...]
    durable: bool = False


class SyncChunks(Request, frozen=True):
    """Bring what was written to a file on this daemon to stable storage."""

    op: ClassVar[int] = 68
    Reply: ClassVar[type[Body]] = Done
    ino: int


class UsageReply(Body, frozen=True):
    """Return the space of the file systems under this daemon."""

    usage: tuple[DiskUsage, ...]


class Usage(Request, frozen=True):
    """Ask for the space under this daemon."""

    op: ClassVar[int] = 69
    Reply: ClassVar[type[Body]] = UsageReply


class AllocateChunk(Request, frozen=True):
    """Reserve space for a piece of a chunk; with ``zero``, it reads as zeros afterwards."""

    op: ClassVar[int] = 70
    Reply: ClassVar[type[Body]] = WriteChunkReply
    overwrites: ClassVar[bool] = True
    ino: int
    index: int
    offset: int
    length: int
    zero: bool


class PunchChunkReply(Body, frozen=True):
    """Tell the bytes freed."""

    freed: int


class PunchChunk(Request, frozen=True):
    """Make a piece of a chunk zeros and free its blocks; with ``zeros_only``, those alone that hold only zeros."""

    op: ClassVar[int] = 71
    Reply: ClassVar[type[Body]] = PunchChunkReply
    overwrites: ClassVar[bool] = True
    ino: int
    index: int
    offset: int
    length: int
    zeros_only: bool


class MapChunksReply(Body, frozen=True):
    """Return data ranges in order. ``more``: chunk to go on with, None when that was all."""

    ranges: tuple[DataRange, ...]
    more: int | None


class MapChunks(Request, frozen=True):
    """Ask for a file's data on this daemon that ends behind byte ``offset`` of chunk ``index``, up to chunk ``stop``.

    About ``count`` ranges, or what one page holds.
    """

    op: ClassVar[int] = 72
    Reply: ClassVar[type[Body]] = MapChunksReply
    ino: int
    index: int
    offset: int
    stop: int
    count: int


class CopyChunk(Request, frozen=True):
    """Copy a piece of another chunk, or of another place of the same, into a chunk of this daemon.

    ``source_daemon`` holds the source; this daemon asks it. What the source does not have becomes zeros, and holes
    where whole blocks are missing at its end.
    """

    op: ClassVar[int] = 73
    Reply: ClassVar[type[Body]] = WriteChunkReply
    overwrites: ClassVar[bool] = True
    source_daemon: int
    source_ino: int
    source_index: int
    source_offset: int
    ino: int
    index: int
    offset: int
    length: int


# ── between daemons: transactions over several of them ───────────────────────────────────────────────────────────────


class TxId(Body, frozen=True):
    """Name a transaction: its coordinator, that daemon's incarnation, and a counter."""

    daemon: Annotated[int, msgspec.Meta(ge=0, lt=DAEMONS_MAX)]
    incarnation: Count
    counter: Count


class PutEntry(Body, frozen=True, tag=1):
    """Put a name into a directory. ``replaces``: the inode that the name must stand for now (0: it must be free).

    Updates the directory's times, count, and its link count if directories come or go.
    """

    parent: int
    name: bytes
    ino: int
    kind: int
    replaces: int


class DropEntry(Body, frozen=True, tag=2):
    """Take a name out of a directory; it must stand for ``ino``."""

    parent: int
    name: bytes
    ino: int


class NewInode(Body, frozen=True, tag=3):
    """Store a new inode, whose name is put elsewhere. Times are set by the daemon that stores it.

    ``default_acl``: that of its directory, which the inode inherits, if there is one; its daemon derives the access ACL
    and the permission bits from it, as two ACLs of the largest size would not fit into one message.
    """

    attrs: Attrs
    default_acl: bytes = b""


class AddLink(Body, frozen=True, tag=4):
    """Count one more name of a file. NotPermitted for directories, TooManyLinks, Conflict when it has none left."""

    ino: int


class DropLink(Body, frozen=True, tag=5):
    """Count one name of a file less; the last one makes it an orphan, which goes when nobody has it open."""

    ino: int


class DropDir(Body, frozen=True, tag=6):
    """Remove a directory inode, which must be empty (NotEmpty) and stay so until the transaction ends."""

    ino: int


class Moved(Body, frozen=True, tag=7):
    """Note that an inode got another name: its ctime changes, and a directory's ``parent`` (0: leave it)."""

    ino: int
    parent: int


Step = PutEntry | DropEntry | NewInode | AddLink | DropLink | DropDir | Moved


class Prepare(Request, frozen=True):
    """Check a daemon's steps of a transaction, lock what they touch, remember them on stable storage.

    Errors: why they can't be done.
    """

    op: ClassVar[int] = 96
    Reply: ClassVar[type[Body]] = Done
    txid: TxId
    steps: Annotated[tuple[Step, ...], msgspec.Meta(max_length=STEPS_MAX)]


class FinishReply(Body, frozen=True):
    """Return the attributes that inodes have after the steps, for those that this daemon holds."""

    attrs: tuple[Attrs, ...]


class Finish(Request, frozen=True):
    """Apply (``commit``) or forget prepared steps and unlock. A transaction that is not known here is already over.

    Counter 0, to be forgotten: everything that earlier incarnations of that daemon prepared here. They decided none of
    it, for what they decided was told before.
    """

    op: ClassVar[int] = 97
    Reply: ClassVar[type[Body]] = FinishReply
    txid: TxId
    commit: bool


class Secure(Request, frozen=True):
    """Bring what was finished to stable storage, so that its coordinator may forget it: all of these were committed.

    What a power cut has taken back is finished again before.
    """

    op: ClassVar[int] = 98
    Reply: ClassVar[type[Body]] = Done
    txids: tuple[TxId, ...]


class InDoubtReply(Body, frozen=True):
    """Name the transactions that are aborted. The ends of the others will be told."""

    aborted: tuple[TxId, ...]


class InDoubt(Request, frozen=True):
    """Ask a coordinator about transactions of its that are prepared here since before this daemon's start."""

    op: ClassVar[int] = 100
    Reply: ClassVar[type[Body]] = InDoubtReply
    txids: tuple[TxId, ...]


class HeldFile(Body, frozen=True):
    """Sum up what a daemon holds of a file: bytes, and its last chunk with the chunk's length."""

    ino: int
    allocated: int
    last: int
    length: int


class HeldFilesReply(Body, frozen=True):
    """Return some files in order: all there are below inode number ``next``."""

    files: tuple[HeldFile, ...]
    next: int


class HeldFiles(Request, frozen=True):
    """Ask what a daemon holds of the files of another, ``home``, from inode ``start`` on."""

    op: ClassVar[int] = 101
    Reply: ClassVar[type[Body]] = HeldFilesReply
    home: int
    start: int


class Recount(Request, frozen=True):
    """Say that a daemon lost what it had not synced: compare your files with their chunks. Answered when noted."""

    op: ClassVar[int] = 102
    Reply: ClassVar[type[Body]] = Done


class Expel(Request, frozen=True):
    """Fence a client for ever: its session ends here and none of its requests is served any more. From daemons only."""

    op: ClassVar[int] = 99
    Reply: ClassVar[type[Body]] = Done
    client_id: int


# ── people ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class SessionStatus(Body, frozen=True):
    """Describe one session of a daemon."""

    client_id: int
    kind: str
    label: str
    host: str
    pid: int
    connected: bool
    transport: str
    opens: int


class StatusReply(Body, frozen=True):
    """Describe a daemon: its version, space, sessions, and what it still has to do for clients long answered."""

    daemon_id: int
    version: str
    pid: int
    host: str
    data_dir: str
    uptime_s: float
    grace: bool
    usage: tuple[DiskUsage, ...]
    sessions: tuple[SessionStatus, ...]
    #: Files without a name that are still open, and dead files whose chunks are not yet dropped everywhere.
    orphans: int
    to_drop: int
    #: Files of dropped chunks that are still to be removed here, but for those that could not be.
    to_remove: int
    prepared: int
    #: Requests served so far, by the name of their class.
    requests: dict[str, int]
    #: Bytes of chunks that went out to readers and came in from writers so far.
    bytes_read: int
    bytes_written: int
    #: Ranges that are locked, and requests for locks that wait.
    locks: int
    #: Sessions for which ``sessions`` had no room.
    more_sessions: int
    #: Files are being compared with their chunks after a power cut.
    recounting: bool = False


#: What a StatusReply counts of the work that is under way for nobody who waits. All of it ends by itself, but orphans
#: that are open.
BEHIND_REPLIES = ("grace", "recounting", "orphans", "to_drop", "to_remove", "prepared")


class Status(Request, frozen=True):
    """Ask a daemon how it is."""

    op: ClassVar[int] = 112
    Reply: ClassVar[type[Body]] = StatusReply


class StatisticsReply(Body, frozen=True):
    """Return what a daemon has counted since it was started. Counters never go back."""

    uptime_s: float
    #: Requests by the name of their class, as long as they were served.
    operations: dict[str, Durations]
    bytes_read: int
    bytes_written: int
    counters: Counters


class Statistics(Request, frozen=True):
    """Ask a daemon what it has counted."""

    op: ClassVar[int] = 113
    Reply: ClassVar[type[Body]] = StatisticsReply


class TraceReply(Body, frozen=True):
    """Return a page of what was recorded of the asking client's requests.

    ``next``: where the next page begins; ``more``: whether there is one now. ``lost``: spans, of all clients, that
    there was no room for.
    """

    served: tuple[Served, ...]
    next: int
    more: bool
    lost: int


class Trace(Request, frozen=True):
    """Have a daemon record the requests it serves for ``seconds`` from now on; with 0, tell what it has recorded.

    ``after``: where the page begins. What was recorded is forgotten when the time is over, or with ``seconds`` below 0.
    """

    op: ClassVar[int] = 114
    Reply: ClassVar[type[Body]] = TraceReply
    seconds: float
    after: int = 0


# ── inspection: benchfs check ────────────────────────────────────────────────────────────────────────────────────────


class ListRecordsReply(Body, frozen=True):
    """Return a page of records as they are stored (disk.py), in order. ``more``: there are some behind the last."""

    rows: tuple[tuple[bytes, bytes], ...]
    more: bool


class ListRecords(Request, frozen=True):
    """List a daemon's inodes or names (``prefix``) from key ``start`` on."""

    op: ClassVar[int] = 120
    Reply: ClassVar[type[Body]] = ListRecordsReply
    prefix: bytes
    start: bytes


class ChunkRow(Body, frozen=True):
    """Describe one chunk of a daemon. ``trouble``: what is wrong with its file or its record."""

    ino: int
    index: int
    length: int
    allocated: int
    trouble: str


class ListChunksReply(Body, frozen=True):
    """Return a page of a daemon's chunks, in order; an empty one is the last."""

    chunks: tuple[ChunkRow, ...]


class ListChunks(Request, frozen=True):
    """List a daemon's chunks from chunk ``index`` of inode ``ino`` on, and look at their files."""

    op: ClassVar[int] = 121
    Reply: ClassVar[type[Body]] = ListChunksReply
    ino: int
    index: int


class StrayRow(Body, frozen=True):
    """Name a file among the chunk files that no record knows. ``ino`` 0: it is no chunk's."""

    folder: int
    name: str
    ino: int
    index: int
    length: int


class ListStraysReply(Body, frozen=True):
    """Return strays. ``next``: directory to go on with; ``folders``: how many there are."""

    files: tuple[StrayRow, ...]
    next: int
    folders: int


class ListStrays(Request, frozen=True):
    """List files that no record of the chunk table knows, in some directories of chunk files from one on."""

    op: ClassVar[int] = 122
    Reply: ClassVar[type[Body]] = ListStraysReply
    folder: int


class InodeState(Body, frozen=True):
    """Describe an inode: its record (empty: there is none), and whether somebody has it open.

    ``pending``: the daemon remembers that it is an orphan, or that chunks of it are still to be dropped.
    """

    ino: int
    record: bytes
    pending: bool
    held: bool


class FindInodesReply(Body, frozen=True):
    """Describe inodes, in the order in which they were asked for."""

    inodes: tuple[InodeState, ...]


class FindInodes(Request, frozen=True):
    """Look at inodes of a daemon, at each when no transaction is about to change it."""

    op: ClassVar[int] = 123
    Reply: ClassVar[type[Body]] = FindInodesReply
    inos: tuple[int, ...]


class FindNamesReply(Body, frozen=True):
    """Return the records of names, empty where there is none, in the order in which they were asked for."""

    records: tuple[bytes, ...]


class FindNames(Request, frozen=True):
    """Look at names in directories of a daemon, at each when no transaction is about to change it."""

    op: ClassVar[int] = 124
    Reply: ClassVar[type[Body]] = FindNamesReply
    places: tuple[tuple[int, bytes], ...]


class CountEntriesReply(Body, frozen=True):
    """Return a directory's record (empty: there is none) and what was counted, both of one moment."""

    record: bytes
    entries: int
    subdirectories: int


class CountEntries(Request, frozen=True):
    """Count the names in a directory of this daemon."""

    op: ClassVar[int] = 125
    Reply: ClassVar[type[Body]] = CountEntriesReply
    ino: int


class ExamineFileReply(Body, frozen=True):
    """Compare the space that a file counts with what the daemons hold of it, of one moment.

    ``state``: one of EXAMINED_*; unless it is QUIET, the rest is 0. ``beyond``: chunks that reach behind its end.
    """

    state: int
    allocated: int
    held: int
    beyond: int


#: What ExamineFile found: no such file; somebody has it open for writing, so nothing can be said; what it says.
EXAMINED_GONE = 0
EXAMINED_IN_USE = 1
EXAMINED_QUIET = 2


class ExamineFile(Request, frozen=True):
    """Compare a file with its chunks on all daemons, while nobody may publish to it or open it for writing.

    ``settle``: and then give back what lies behind its end, and count anew, unless chunks are missing.
    """

    op: ClassVar[int] = 126
    Reply: ClassVar[type[Body]] = ExamineFileReply
    ino: int
    settle: bool


class HeldChunksReply(Body, frozen=True):
    """Sum up a file's chunks on one daemon: how many, their bytes, and how many reach behind the point asked for."""

    chunks: int
    allocated: int
    beyond: int


class HeldChunks(Request, frozen=True):
    """Ask what a daemon holds of a file, and how much of it behind byte ``offset`` of chunk ``index``."""

    op: ClassVar[int] = 127
    Reply: ClassVar[type[Body]] = HeldChunksReply
    ino: int
    index: int
    offset: int


class RemoveOrphansReply(Body, frozen=True):
    """Tell the bytes freed."""

    freed: int


class RemoveOrphans(Request, frozen=True):
    """Drop this daemon's chunks of those of these inodes that exist no more, and whose chunks nobody else drops."""

    op: ClassVar[int] = 128
    Reply: ClassVar[type[Body]] = RemoveOrphansReply
    inos: tuple[int, ...]


class RemoveStrays(Request, frozen=True):
    """Remove files from a directory of chunk files, as far as no record knows them."""

    op: ClassVar[int] = 129
    Reply: ClassVar[type[Body]] = RemoveOrphansReply
    folder: int
    names: tuple[str, ...]


class RemoveInode(Request, frozen=True):
    """Remove an inode that was found to have no name. Conflict: it has changed since ``version``; NotEmpty."""

    op: ClassVar[int] = 130
    Reply: ClassVar[type[Body]] = Done
    ino: int
    version: int


class SweepRecordsReply(Body, frozen=True):
    """Return the keys of records that belong to nothing, or to another daemon, and what is wrong with each.

    ``next``: key to go on with; empty: that was all.
    """

    found: tuple[tuple[bytes, str], ...]
    next: bytes


class SweepRecords(Request, frozen=True):
    """Compare records of one ``prefix`` with those that they belong to, on this daemon; ``remove`` what nobody owns."""

    op: ClassVar[int] = 131
    Reply: ClassVar[type[Body]] = SweepRecordsReply
    prefix: bytes
    start: bytes
    remove: bool


def _requests(cls: type[Request]) -> list[type[Request]]:
    found = []
    for sub in cls.__subclasses__():
        found.append(sub)
        found.extend(_requests(sub))
    return found


#: op → class of the request.
REQUESTS: dict[int, type[Request]] = {cls.op: cls for cls in _requests(Request)}

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type[Body], msgspec.msgpack.Decoder[Any]] = {
    cls: msgspec.msgpack.Decoder(cls)
    for cls in list[type[Body]]([Failure, *REQUESTS.values(), *{request.Reply for request in REQUESTS.values()}])
}


def encode(body: Body) -> bytes:
    """Encode a reply, or a request that is not recorded."""
    return _encoder.encode(body)


def encode_recorded(request: Request, slot: int, seq: int) -> bytes:
    """Encode a recorded request with the identity that a retry repeats."""
    assert request.recorded
    return _RECORD_ID.pack(slot, seq) + _encoder.encode(request)


def decode(cls: type[T], data: bytes | memoryview) -> T:
    """Decode and check a reply, or a request that is not recorded. ProtocolError."""
    try:
        return cast(T, _decoders[cls].decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # msgspec's words for what is malformed
        raise ProtocolError(f"malformed {cls.__name__}: {error}") from None


def decode_request(op: int, data: bytes | memoryview) -> tuple[Request, int, int]:
    """Decode any request: (request, slot, seq), the latter two 0 where it is not recorded. ProtocolError."""
    cls = REQUESTS.get(op)
    if cls is None:
        raise ProtocolError(f"unknown request {op}")
    if not cls.recorded:
        return decode(cls, data), 0, 0
    if len(data) < _RECORD_ID.size:
        raise ProtocolError(f"truncated {cls.__name__}")
    slot, seq = _RECORD_ID.unpack_from(data)
    if slot >= IN_FLIGHT_MAX or seq == 0:
        raise ProtocolError(f"{cls.__name__} with slot {slot}, sequence {seq}")
    return decode(cls, memoryview(data)[_RECORD_ID.size :]), slot, seq
