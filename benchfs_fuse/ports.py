"""State the contracts between the rooms: chunk store, key-value store, channel. No implementation here.

Each port has several implementations, one of them in memory for tests, and one conformance suite that checks them all
(``tests/t1_*.py``).
"""

import enum
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from .model import ChunkId, ClientId, DiskUsage

#: Anything contiguous that offers bytes: bytes, bytearray, memoryview, mmap. Never copied on its way.
Buffer = bytes | bytearray | memoryview


class Trimmed(NamedTuple):
    """Report what a trim did, in bytes of allocated space: ``freed`` by it, ``left`` for this inode afterwards."""

    freed: int
    left: int


class ChunkStore(Protocol):
    """Keep chunks of file data.

    A chunk that was never written does not exist and reads as nothing. All offsets and lengths are bytes within one
    chunk. Operations on different chunks never wait for each other; on one chunk, a read that starts after a write
    returned sees it. Every method may yield; a cancelled write may have happened in part. Errors: NoSpace,
    QuotaExceeded, StorageError.
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

    async def trim(self, ino: int, index: int, offset: int) -> Trimmed:
        """Drop of file ``ino`` everything at and behind byte ``offset`` of chunk ``index``.

        What is later written behind that point starts from zeros.
        """
        ...

    async def drop(self, inos: Sequence[int]) -> int:
        """Drop all chunks of these files; return the bytes freed. Files without chunks are no error."""
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
