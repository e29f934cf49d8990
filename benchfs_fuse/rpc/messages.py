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
from typing import Any, ClassVar, TypeVar, cast

import msgspec

from ..errors import ProtocolError
from ..limits import IN_FLIGHT_MAX
from ..model import Attrs, DirEntry, DiskUsage, Entry

#: Version of everything in this package that two processes must agree on. Any change of a message raises it.
PROTOCOL_VERSION = 1

T = TypeVar("T", bound="Body")

_RECORD_ID = struct.Struct("<IQ")


class Body(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Be one encoded request or reply."""


class Request(Body, frozen=True):
    """Ask for something. ``op`` is its number on the wire, ``Reply`` the type of the answer."""

    op: ClassVar[int]
    Reply: ClassVar[type[Body]]
    recorded: ClassVar[bool] = False


class Done(Body, frozen=True):
    """Answer a request that has nothing to tell."""


class Failure(Body, frozen=True):
    """Explain a status other than 0, for logs."""

    message: str


class AttrsReply(Body, frozen=True):
    """Return the attributes of an inode."""

    attrs: Attrs


class EntryReply(Body, frozen=True):
    """Return what a name stands for."""

    entry: Entry


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class HelloReply(Body, frozen=True):
    """Tell the client about the daemon. ``incarnation`` differs after every start of the daemon.

    ``lease_s``: silence after which the session ends. ``map_version``: version of the daemon's shard map.
    """

    incarnation: int
    lease_s: float
    map_version: int


class Hello(Request, frozen=True):
    """Begin (``resume`` false) or resume a session: the first request on every channel.

    Stale: the session to resume is unknown here, or this client was expelled; it has to start anew as another client.
    ``kind`` is ``mount``, ``daemon`` or ``tool``; ``label`` says for people what it is (the mount point).
    """

    op: ClassVar[int] = 1
    Reply: ClassVar[type[Body]] = HelloReply
    kind: str
    label: str
    resume: bool


class OpenCount(Body, frozen=True):
    """Count the handles that a session holds on one inode."""

    ino: int
    readers: int
    writers: int


class ReclaimReply(Body, frozen=True):
    """List the inodes that could not be reclaimed: they have gone, their handles are stale."""

    lost: tuple[int, ...]


class Reclaim(Request, frozen=True):
    """Register open handles again after the daemon started anew; ``last`` ends the reclaim of this session."""

    op: ClassVar[int] = 2
    Reply: ClassVar[type[Body]] = ReclaimReply
    opens: tuple[OpenCount, ...]
    last: bool


class Heartbeat(Request, frozen=True):
    """Renew the lease."""

    op: ClassVar[int] = 3
    Reply: ClassVar[type[Body]] = Done


class Goodbye(Request, frozen=True):
    """End the session: its handles are released, its record goes."""

    op: ClassVar[int] = 4
    Reply: ClassVar[type[Body]] = Done


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
    """

    op: ClassVar[int] = 18
    Reply: ClassVar[type[Body]] = AttrsReply
    recorded: ClassVar[bool] = True
    ino: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int = TIME_OMIT
    mtime_ns: int = TIME_OMIT


class Make(Request, frozen=True):
    """Make an inode of any type under a name: mkdir, mknod, symlink (``target``), create.

    ``mode`` holds type and permission bits, the umask already applied. ``open_readers``/``open_writers`` register a
    handle on the new file in the same transaction (only for regular files). The daemon applies the rules of a
    set-group-ID directory (group of the parent; directories inherit the bit). Exists when the name is taken.
    """

    op: ClassVar[int] = 19
    Reply: ClassVar[type[Body]] = EntryReply
    recorded: ClassVar[bool] = True
    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int
    rdev: int = 0
    target: bytes = b""
    open_readers: int = 0
    open_writers: int = 0


class RemoveReply(Body, frozen=True):
    """Name the inode that lost a name, and its attributes where this daemon holds it."""

    ino: int
    attrs: Attrs | None


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


class Link(Request, frozen=True):
    """Give inode ``ino`` another name. Sent to the daemon of ``parent``. NotPermitted for directories."""

    op: ClassVar[int] = 22
    Reply: ClassVar[type[Body]] = AttrsReply
    recorded: ClassVar[bool] = True
    ino: int
    parent: int
    name: bytes


#: Flags of Rename: those of renameat2(2).
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


class RenameReply(Body, frozen=True):
    """Name the inode that moved, and the one that was replaced or exchanged (0: none)."""

    moved: int
    other: int


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
    readers: int
    writers: int
    doubtful: bool = False


class CommitWrite(Request, frozen=True):
    """Publish what was written: the size grows to ``end`` at least, ``allocated_delta`` bytes are accounted.

    mtime and ctime become the daemon's clock.
    """

    op: ClassVar[int] = 28
    Reply: ClassVar[type[Body]] = AttrsReply
    recorded: ClassVar[bool] = True
    ino: int
    end: int
    allocated_delta: int


class AppendReply(Body, frozen=True):
    """Return where the reserved range starts; the attributes count it in."""

    offset: int
    attrs: Attrs


class Append(Request, frozen=True):
    """Reserve ``length`` bytes at the end of the file for the caller to write. A reader sees zeros there until then."""

    op: ClassVar[int] = 29
    Reply: ClassVar[type[Body]] = AppendReply
    recorded: ClassVar[bool] = True
    ino: int
    length: int


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

    ``system.posix_acl_access`` also sets the permission bits; ``user.benchfs.chunk_size`` on a directory sets what
    new files in it inherit.
    """

    op: ClassVar[int] = 33
    Reply: ClassVar[type[Body]] = AttrsReply
    recorded: ClassVar[bool] = True
    ino: int
    name: bytes
    value: bytes
    flags: int


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
    """Drop everything of a file at and behind byte ``offset`` of chunk ``index``. From daemons only."""

    op: ClassVar[int] = 66
    Reply: ClassVar[type[Body]] = TrimChunksReply
    ino: int
    index: int
    offset: int


class DropChunksReply(Body, frozen=True):
    """Tell the bytes freed."""

    freed: int


class DropChunks(Request, frozen=True):
    """Drop all chunks of dead files. From daemons only."""

    op: ClassVar[int] = 67
    Reply: ClassVar[type[Body]] = DropChunksReply
    inos: tuple[int, ...]


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


# ── between daemons: transactions over several of them ───────────────────────────────────────────────────────────────


class TxId(Body, frozen=True):
    """Name a transaction: its coordinator, that daemon's incarnation, and a counter."""

    daemon: int
    incarnation: int
    counter: int


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
    """Store a new inode, whose name is put elsewhere. Times are set by the daemon that stores it."""

    attrs: Attrs


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
    """Check a daemon's steps of a transaction, lock what they touch, remember them. Errors: why they can't be done."""

    op: ClassVar[int] = 96
    Reply: ClassVar[type[Body]] = Done
    txid: TxId
    steps: tuple[Step, ...]


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
    prepared: int
    #: Requests served so far, by the name of their class.
    requests: dict[str, int]


class Status(Request, frozen=True):
    """Ask a daemon how it is."""

    op: ClassVar[int] = 112
    Reply: ClassVar[type[Body]] = StatusReply


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
    except msgspec.DecodeError as error:
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
