"""Join the rooms of a daemon: a batch of changes, the call it belongs to, and the way to the other daemons.

A request is served as a ``Call``. A handler reads and changes through a ``Batch`` and ends with ``call.commit(batch,
reply)``, which writes the batch together with the recorded outcome in one transaction of the store: a retry of the
same request finds the outcome and is answered with it.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from ..model import ClientId
from ..ports import KeyValueStore
from ..rpc.messages import Body, Request

R = TypeVar("R", bound=Body)


class Batch:
    """Collect changes to the store; ``get`` sees them before they are written. Used once, then thrown away."""

    def __init__(self, store: KeyValueStore) -> None:
        self._store = store
        self._changes: dict[bytes, bytes | None] = {}
        #: Called in order after the batch was written: changes of what is kept in memory.
        self.after_write: list[Callable[[], None]] = []

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key`` as it will be."""
        if key in self._changes:
            return self._changes[key]
        return self._store.get(key)

    def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Iterate over what is in the store now; changes of this batch are not seen."""
        return self._store.scan(start, stop)

    def put(self, key: bytes, value: bytes) -> None:
        """Set ``key``."""
        self._changes[key] = value

    def delete(self, key: bytes) -> None:
        """Remove ``key``; that it does not exist is no error."""
        self._changes[key] = None

    def write(self) -> None:
        """Apply everything in one transaction, then run ``after_write``. NoSpace, StorageError: nothing happened."""
        if self._changes:
            puts = [(key, value) for key, value in self._changes.items() if value is not None]
            self._store.write(puts, [key for key, value in self._changes.items() if value is None])
        for change in self.after_write:
            change()


class Call(Protocol):
    """Stand for one request that is being served."""

    @property
    def client_id(self) -> ClientId:
        """Return whose request it is."""
        ...

    def commit(self, batch: Batch, reply: Body) -> None:
        """Write ``batch`` and, for a recorded request, ``reply`` as its outcome, in one transaction."""
        ...


class Opens(Protocol):
    """Know which sessions hold which inodes open at this daemon."""

    def add(self, batch: Batch, client_id: ClientId, ino: int, readers: int, writers: int) -> None:
        """Count handles, once the batch is written. TooManyOpen, Stale (the session has ended)."""
        ...

    def remove(self, batch: Batch, client_id: ClientId, ino: int, readers: int, writers: int) -> None:
        """Take handles back, once the batch is written; more than were counted are taken as all."""
        ...

    def count(self, ino: int) -> int:
        """Return how many handles all sessions hold on ``ino``; while sessions may still reclaim, at least 1."""
        ...

    def written_by_others(self, ino: int, client_id: ClientId | None) -> bool:
        """Tell whether a session other than this client's has ``ino`` open for writing, or may yet reclaim that."""
        ...


class Peers(Protocol):
    """Reach every daemon of the cluster, this one included (which is served without a connection)."""

    async def call(self, daemon_id: int, request: Request, reply: type[R], into: memoryview | None = None) -> R:
        """Send a request that is not recorded and wait for its answer, over reconnections, for as long as it takes.

        ``into`` receives the payload of another daemon's answer. Raise what the other daemon answered (FsError);
        InvalidArgument if there is no such daemon. Callers who cannot wait cancel.
        """
        ...
