"""State the contracts between the rooms: chunk store, key-value store, channel. No implementation here.

Each port has several implementations, one of them in memory for tests, and one conformance suite that checks them all
(``tests/t1_*.py``).
"""

import enum
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from .model import ChunkId, ClientId, DataRange, DiskUsage

#: Anything contiguous that offers bytes: bytes, bytearray, memoryview, mmap. Never copied on its way.
Buffer = bytes | bytearray | memoryview


class Trimmed(NamedTuple):
    """Report what a trim did, in bytes of allocated space: ``freed`` by it, ``left`` for this inode afterwards."""

    freed: int
    left: int


class Mapped(NamedTuple):
    """Return a page of a file's data ranges, in order. ``more``: chunk to go on with, None when that was all."""

    ranges: tuple[DataRange, ...]
    more: int | None


class ChunkState(NamedTuple):
    """Describe one chunk of a table: its record, and what is wrong with its file or record, if anything."""

    chunk: ChunkId
    birth: int
    length: int
    allocated: int
    trouble: str


class StrayFile(NamedTuple):
    """Name a file among the chunk files that no record knows. ``chunk``: whose its name says it is, None: nobody's."""

    folder: int
    name: str
    chunk: ChunkId | None
    length: int


class FileSum(NamedTuple):
    """Sum up what one store holds of a file: bytes, and its last chunk with the chunk's length."""

    ino: int
    allocated: int
    last: int
    length: int


class Sums(NamedTuple):
    """Return some files in order: all there are below inode number ``next`` (INO_END: there are no more)."""

    files: list[FileSum]
    next: int


class Held(NamedTuple):
    """Sum up the chunks of a file in one store: how many, their space, and how many reach behind a point."""

    chunks: int
    allocated: int
    beyond: int


class ChunkStore(Protocol):
    """Keep chunks of file data.

    A chunk that was never written does not exist and reads as nothing. All offsets and lengths are bytes within one
    chunk. Operations on different chunks never wait for each other; on one chunk, a read that starts after a write
    returned sees it. Every method may yield; a cancelled write may have happened in part. Errors: NoSpace,
    QuotaExceeded, StorageError; of ``allocate`` and ``punch`` NotSupported, too, where the disk cannot do it.
    """

    async def read(self, chunk: ChunkId, offset: int, into: memoryview) -> int:
        """Read into the caller's buffer; return how many bytes from ``offset`` on exist (holes between are zeros).

        A return value below ``len(into)`` means that the chunk ends there; the rest of ``into`` is untouched.
        """
        ...

    async def write(self, chunk: ChunkId, offset: int, data: Buffer) -> int:
        """Write all of ``data``; return by how many bytes the chunk's allocated space grew. ``data`` is the caller's.

        On return the bytes survive ``kill -9`` of the process that stores them (flushed), not a power cut.
        """
        ...

    def read_now(self, chunk: ChunkId, offset: int, into: memoryview) -> int | None:
        """Do what ``read`` does if that takes no wait; None: nothing was done but to ``into``."""
        ...

    def write_now(self, chunk: ChunkId, offset: int, data: Buffer) -> int | None:
        """Do what ``write`` does if that takes no wait; None: nothing was done."""
        ...

    async def allocate(self, chunk: ChunkId, offset: int, length: int, *, zero: bool = False) -> int:
        """Reserve space for ``length`` > 0 bytes; return by how many bytes the chunk's allocated space grew.

        Writing there needs no more space. Holes become zeros that take space and count as data; the chunk reaches to
        the end of the range at least. With ``zero``, all of the range reads as zeros afterwards. NoSpace and
        QuotaExceeded: nothing was reserved, but the range may have been zeroed.
        """
        ...

    async def punch(self, chunk: ChunkId, offset: int, length: int, *, zeros_only: bool = False) -> int:
        """Make ``length`` > 0 bytes zeros and free the blocks that lie in them as a whole; return the bytes freed.

        The chunk stays as long as it is. With ``zeros_only``, blocks that hold anything but zeros are left alone: so
        what was only allocated is given back, and nothing is lost that somebody wrote there meanwhile.
        """
        ...

    async def map(self, ino: int, index: int, offset: int, stop: int, count_max: int) -> Mapped:
        """Return the data ranges of a file that end behind byte ``offset`` of chunk ``index``, up to chunk ``stop``.

        They are whole blocks, may reach behind the chunk's end, and do not touch one another within a chunk. A page
        ends with the chunk in which ``count_max`` is reached, if there may be more.
        """
        ...

    async def trim(self, ino: int, index: int, offset: int, *, durable: bool = False) -> Trimmed:
        """Drop of file ``ino`` everything at and behind byte ``offset`` of chunk ``index``.

        What is later written behind that point starts from zeros. ``durable``: no power cut brings back what is gone.
        """
        ...

    async def drop(self, inos: Sequence[int], *, durable: bool = False) -> int:
        """Drop all chunks of these files; return the bytes freed. Files without chunks are no error.

        ``durable``: no power cut brings back what is gone.
        """
        ...

    async def sync(self, ino: int) -> None:
        """Bring everything written to ``ino`` so far to stable storage. Raise StorageError if any of it was lost."""
        ...

    async def usage(self) -> list[DiskUsage]:
        """Return the space of each file system under this store, each once."""
        ...

    async def aclose(self) -> None:
        """Finish what is under way and release everything."""
        ...


class ChunkInspector(Protocol):
    """Look at a chunk store while it works. What is said is true of one moment, and nothing under way looks wrong."""

    #: Directories of chunk files; 0: there are none.
    folders: int

    @property
    def to_remove(self) -> int:
        """Return how many files of dropped chunks are still to be removed, but for those that could not be."""
        ...

    async def page(self, start: ChunkId) -> list[ChunkState]:
        """Return some of the chunks from ``start`` on, in order; an empty list: there are no more."""
        ...

    async def held(self, ino: int, index: int, offset: int) -> Held:
        """Sum up the chunks of a file, and count those that reach behind byte ``offset`` of chunk ``index``."""
        ...

    async def sums(self, start: int, wanted: Callable[[int], bool]) -> Sums:
        """Sum up some of the files that have chunks here, from inode ``start`` on, as far as they are ``wanted``."""
        ...

    async def strays(self, folders: range) -> list[StrayFile]:
        """Return the files of some directories that no record knows; of very many, some."""
        ...

    async def remove_strays(self, folder: int, names: Sequence[str]) -> int:
        """Remove those of these files that no record knows and that are chunk files; return their bytes."""
        ...


class KeyValueStore(Protocol):
    """Keep ordered byte keys and values; every ``write`` is one transaction. Used from one task at a time.

    ``get``, ``scan`` and ``write`` are synchronous and take microseconds: they do not yield. Errors: NoSpace,
    StorageError.
    """

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, None if there is none."""
        ...

    def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Iterate in key order over ``start <= key < stop``, as of the call. Writing meanwhile is allowed."""
        ...

    def write(self, puts: Sequence[tuple[bytes, bytes]], deletes: Sequence[bytes] = ()) -> None:
        """Apply all puts and deletes or none; on return they survive ``kill -9`` of this process."""
        ...

    async def sync(self) -> None:
        """Bring everything written so far to stable storage. Concurrent callers share one sync."""
        ...

    def close(self) -> None:
        """Release the store; further calls are bugs."""
        ...


class Reply(NamedTuple):
    """Answer a request: wire ``status`` (0 is success), encoded ``body``, and ``payload``.

    On the calling side ``payload`` is None when the caller gave ``into``, and ``received`` counts the bytes written
    there. On the serving side ``payload`` stays untouched by the handler until ``release`` is called: exactly once,
    when the transport no longer needs it.
    """

    status: int
    body: bytes
    payload: Buffer | None = None
    received: int = 0
    release: Callable[[], None] | None = None


class Peer(NamedTuple):
    """Say who is at the other end, as proven by the handshake."""

    client_id: ClientId
    #: Daemon number of the peer, or -1 for mounts and tools.
    daemon_id: int
    #: Host name and process id, for people.
    host: str
    pid: int
    #: Kernel boot id of the host: equal ids mean the same node, so that the process can be looked for there.
    boot_id: str


class Ending(enum.Enum):
    """Say why a connection ended."""

    #: We closed it.
    LOCAL = "closed here"
    #: The peer's kernel closed or reset it: the peer process has gone, or closed it on purpose.
    PEER = "closed by the peer"
    #: Nothing was heard for too long: the network is cut, or the peer's node has stopped.
    SILENCE = "silent"
    #: The peer broke the protocol; the connection was given up.
    PROTOCOL = "protocol broken"


class Channel(Protocol):
    """Carry requests to one authenticated peer over one connection, and its requests to the local handler."""

    @property
    def peer(self) -> Peer:
        """Return who is at the other end."""
        ...

    @property
    def transport(self) -> str:
        """Name what carries the bytes, for people: ``shm``, ``tcp``, ``rdma``, ``memory``."""
        ...

    async def call(self, op: int, body: bytes, payload: Buffer | None = None, into: memoryview | None = None) -> Reply:
        """Send one request, wait for its reply. At most one of ``payload`` (bytes to send) and ``into`` is given.

        ``into`` receives the reply's payload directly; it belongs to the channel until the call returned, and if the
        call was cancelled until the channel is closed. Raise Disconnected when the connection ends first. There is no
        deadline here: callers cancel.
        """
        ...

    def call_now(
        self, op: int, body: bytes, payload: Buffer | None = None, into: memoryview | None = None, polls: bool = True
    ) -> Reply | Awaitable[Reply] | None:
        """Begin a call without waiting for anything: return the reply if it comes at once, or else what to await.

        None: nothing was sent; ``call`` can wait for what is missing. The awaitable has to be awaited, at once, and is
        in all else like ``call``. Unless it ``polls``, nobody is kept from anything else for the reply.
        """
        ...

    async def wait_closed(self) -> "Ending":
        """Wait until the connection has ended; return why."""
        ...

    async def aclose(self) -> None:
        """End the connection; calls under way raise Disconnected. No request of this connection is served later."""
        ...


#: Serve one request: (channel, op, body, payload or None, room for the reply's payload in bytes) → Reply.
#: ``payload`` belongs to the transport and is valid until the handler returns. A handler never raises but for
#: cancellation: errors are replies.
Handler = Callable[[Channel, int, bytes, memoryview | None, int], Awaitable[Reply]]
