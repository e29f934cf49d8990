"""Hold writes that were accepted and send them behind the caller's back, in an order that nobody can tell from none.

Contiguous writes of one file grow into a *run*, within one chunk. A run is *sealed* when it is full, when a write
follows that does not continue it, or when somebody wants it sent; from then on it is under way. A sealed run waits for
the earlier ones that it overlaps, and for nothing else: so bytes of one file never change places.

Memory is bounded by a ``Budget`` for each daemon: writes to one that does not answer fill its budget and wait, writes
to the others go on. Whoever has to wait for a budget has the runs sealed that hold it, so the wait ends by their being
written, not by a clock.

Sizes are published late: ``unpublished`` says that chunks were written of which the inode's daemon has not been told.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import trio

from ..errors import FsError, StorageError
from ..layout import ShardMap, extents
from ..limits import IN_FLIGHT_MAX, MIB
from ..model import ChunkId
from ..observe import recording, spans
from .parallel import all_of
from .remote_chunks import RemoteChunkStore

#: Longest run: a request of this length costs so little per byte already that longer ones gain nothing, and the
#: kernel sends no longer writes.
RUN_MAX = MIB
#: Runs of one file under way, but for those that are written at once: more than a daemon takes at a time would wait.
SEALED_MAX = IN_FLIGHT_MAX


class _Waiter(NamedTuple):
    length: int
    granted: trio.Event


class Budget:
    """Bound the accepted bytes that wait for one daemon. First come, first served."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.used = 0
        self._waiting: deque[_Waiter] = deque()
        #: Files whose growing run counts against this budget.
        self.growing: set[WriteBehind] = set()

    @property
    def short(self) -> bool:
        """Tell whether anybody waits for room: then nobody may hold some for a run that grows."""
        return bool(self._waiting)

    def _fits(self, length: int) -> bool:
        return self.used == 0 or self.used + length <= self._bytes_max

    def acquire_now(self, length: int) -> bool:
        """Take room for ``length`` bytes if there is some; tell whether there was."""
        if self._waiting or not self._fits(length):
            return False
        self.used += length
        return True

    async def acquire(self, length: int) -> None:
        """Take room for ``length`` bytes; wait until there is some. More than there ever is waits for all of it."""
        if self.acquire_now(length):
            return
        for holder in list(self.growing):
            holder.seal()
        started_ns = recording.now()
        waiter = _Waiter(length, trio.Event())
        self._waiting.append(waiter)
        try:
            await waiter.granted.wait()
        except trio.Cancelled:
            if waiter.granted.is_set():
                self.release(length)
            else:
                self._waiting.remove(waiter)
            raise
        recording.note(spans.ROOM, started_ns)

    def release(self, length: int) -> None:
        """Give room back."""
        self.used -= length
        while self._waiting and self._fits(self._waiting[0].length):
            waiter = self._waiting.popleft()
            self.used += waiter.length
            waiter.granted.set()


class Run:
    """Hold contiguous bytes of one chunk. ``parts`` are not changed by anybody else while the run lives."""

    __slots__ = ("daemon_id", "index", "length", "offset", "parts", "within", "written")

    def __init__(self, offset: int, index: int, within: int, daemon_id: int) -> None:
        #: Where the run starts in the file, and in its chunk.
        self.offset = offset
        self.index = index
        self.within = within
        self.daemon_id = daemon_id
        self.parts: list[bytes | bytearray | memoryview] = []
        self.length = 0
        #: Set when the run is with its daemon, or has failed.
        self.written = trio.Event()

    @property
    def end(self) -> int:
        """Return where the run ends in the file."""
        return self.offset + self.length

    @property
    def data(self) -> bytes | bytearray | memoryview:
        """Return the run's bytes as one; travelling without a detour where they are a whole object already."""
        data = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        if isinstance(data, memoryview) and isinstance(data.obj, bytes) and len(data.obj) == len(data):
            return data.obj
        return data

    def overlaps(self, offset: int, end: int) -> bool:
        """Tell whether the run holds any byte of a range of the file."""
        return self.offset < end and offset < self.end

    def add(self, part: bytes | memoryview) -> None:
        """Append bytes."""
        self.parts.append(part)
        self.length += len(part)

    def replace(self, offset: int, data: bytes) -> None:
        """Put bytes over bytes that the run holds already; ``offset`` is one of the file."""
        held = self.parts[0]
        if len(self.parts) > 1 or not isinstance(held, bytearray):
            held = bytearray().join(self.parts)
            self.parts = [held]
        start = offset - self.offset
        held[start : start + len(data)] = data


class WriteBehind:
    """Hold the accepted writes of one file.

    ``budgets`` by daemon; ``on_failed`` is told what a run failed with that nobody waits for, its bytes are dropped.
    """

    def __init__(
        self,
        ino: int,
        chunk_size: int,
        width: int,
        store: RemoteChunkStore,
        shard_map: ShardMap,
        budgets: dict[int, Budget],
        nursery: trio.Nursery,
        on_failed: Callable[[FsError], None],
    ) -> None:
        self._ino = ino
        self._chunk_size = chunk_size
        self._width = width
        self._store = store
        self._shard_map = shard_map
        self._budgets = budgets
        self._nursery = nursery
        self._on_failed = on_failed
        self._growing: Run | None = None
        #: Sealed runs, oldest first.
        self._sealed: dict[Run, None] = {}
        #: What the inode's daemon is still to be told: end of the bytes written, end of what was allocated without
        #: being written, growth of the allocated space.
        self.unpublished = False
        self.unpublished_end = 0
        self.unpublished_reach = 0
        self.unpublished_growth = 0
        #: Daemons that were written to since ``unsynced`` was emptied.
        self.unsynced: set[int] = set()

    @property
    def pending(self) -> bool:
        """Tell whether bytes are held that no daemon has yet."""
        return self._growing is not None or bool(self._sealed)

    @property
    def end(self) -> int:
        """Return how far accepted bytes reach that the inode's daemon does not count yet, 0 if there are none."""
        growing = self._growing.end if self._growing is not None else 0
        return max(self.unpublished_end, growing, max((run.end for run in self._sealed), default=0))

    async def accept(self, offset: int, data: bytes) -> None:
        """Take ``data``, which nobody changes any more, to be written later. Waits for room alone.

        Calls for one file follow each other. When cancelled, a beginning of ``data`` may have been accepted.
        """
        if self.accept_now(offset, len(data), lambda: data):
            return
        run = self._growing
        if run is not None and self._continues(run, offset, len(data)):
            await self._budgets[run.daemon_id].acquire(len(data))
            if self._growing is run:
                self._grow(run, data)
                return
            self._budgets[run.daemon_id].release(len(data))
        for piece in self._pieces(offset, memoryview(data)):
            while len(self._sealed) >= SEALED_MAX:
                await next(iter(self._sealed)).written.wait()
            await self._budgets[piece.daemon_id].acquire(piece.length)
            self._begin(piece)

    def accept_now(self, offset: int, length: int, take: Callable[[], bytes]) -> bool:
        """Take ``length`` bytes as ``accept`` does, if that has nothing to wait for; tell whether it did.

        ``take``, called once and only then, hands them over. What crosses the border of two chunks has to wait.
        """
        run = self._growing
        if run is not None and run.offset <= offset and offset + length <= run.end:
            run.replace(offset, take())
            return True
        if run is not None and self._continues(run, offset, length):
            if not self._budgets[run.daemon_id].acquire_now(length):
                return False
            self._grow(run, take())
            return True
        index, within = divmod(offset, self._chunk_size)
        if length > RUN_MAX or within + length > self._chunk_size or len(self._sealed) >= SEALED_MAX:
            return False
        piece = Run(offset, index, within, self._shard_map.of_chunk(self._ino, index, self._width))
        if not self._budgets[piece.daemon_id].acquire_now(length):
            return False
        piece.add(take())
        self._begin(piece)
        return True

    def _continues(self, run: Run, offset: int, length: int) -> bool:
        """Tell whether bytes may be added to a run."""
        return (
            run.end == offset
            and run.length + length <= RUN_MAX
            and run.within + run.length + length <= self._chunk_size
        )

    def _begin(self, run: Run) -> None:
        """Let a run grow, for which there is room, in place of the one that has grown so far."""
        self.seal()
        self._growing = run
        self._budgets[run.daemon_id].growing.add(self)
        self._seal_if_full(run)

    def _grow(self, run: Run, data: bytes) -> None:
        run.add(data)
        self._seal_if_full(run)

    def _seal_if_full(self, run: Run) -> None:
        full = run.length >= RUN_MAX or run.within + run.length == self._chunk_size
        if full or self._budgets[run.daemon_id].short:
            self.seal()

    def _pieces(self, offset: int, data: memoryview) -> list[Run]:
        """Cut bytes into runs of at most RUN_MAX, each within one chunk."""
        runs = []
        for extent in extents(offset, len(data), self._chunk_size):
            daemon_id = self._shard_map.of_chunk(self._ino, extent.index, self._width)
            for start in range(0, extent.length, RUN_MAX):
                run = Run(offset + extent.position + start, extent.index, extent.offset + start, daemon_id)
                position = extent.position + start
                run.add(data[position : position + min(RUN_MAX, extent.length - start)])
                runs.append(run)
        return runs

    def seal(self) -> None:
        """Start to send the run that is growing, if there is one."""
        run = self._growing
        if run is None:
            return
        self._seal(run)
        self._nursery.start_soon(self._write_behind, run)

    def _seal(self, run: Run) -> None:
        self._growing = None
        self._budgets[run.daemon_id].growing.discard(self)
        self._sealed[run] = None

    def _send_lone(self) -> None:
        """Send the run that is growing, the only one there is, as far as that goes without waiting for anything.

        A small file is closed within one step so, if its daemon answers at once.
        """
        run = self._growing
        assert run is not None and not self._sealed
        self._seal(run)
        waits = False
        try:
            answer = self._store.begin_write(ChunkId(self._ino, run.index), run.within, run.data)
            if isinstance(answer, int):
                self.note(run.daemon_id, answer, end=run.end)
            else:
                waits = True
                self._nursery.start_soon(self._write_behind, run, answer)
        except Exception as error:
            self.note(run.daemon_id, 0, reach=run.end)
            self._on_failed(error if isinstance(error, FsError) else StorageError(f"a write failed: {error!r}"))
            if not isinstance(error, FsError):
                raise
        finally:
            if not waits:
                self._end(run)
                self._budgets[run.daemon_id].release(run.length)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write ``data`` now, behind everything accepted before that it overlaps; it is the caller's until then.

        Raise the first error, when everything has come to its end. When cancelled, any part may have been written.
        """
        self.seal()
        runs = self._pieces(offset, data)
        for run in runs:
            self._sealed[run] = None
        await all_of(self._write, runs)

    async def _write_behind(self, run: Run, begun: Awaitable[int] | None = None) -> None:
        try:
            await self._write(run, begun)
        except FsError as error:
            self._on_failed(error)
        finally:
            self._budgets[run.daemon_id].release(run.length)

    async def _write(self, run: Run, begun: Awaitable[int] | None = None) -> None:
        """Write a run behind the earlier ones that it overlaps; ``begun`` waits for the end of what was begun."""
        try:
            for earlier in self._overlapped_by(run):
                if not earlier.written.is_set():
                    await earlier.written.wait()
            grown = await (begun or self._store.write(ChunkId(self._ino, run.index), run.within, run.data))
            self.note(run.daemon_id, grown, end=run.end)  # not before: a sync that began meanwhile may have missed it
        except BaseException:
            self.note(run.daemon_id, 0, reach=run.end)  # a part of it may be there: a truncation has to find it
            raise
        finally:
            self._end(run)

    def _end(self, run: Run) -> None:
        """Count a run as written, or failed."""
        del self._sealed[run]
        run.written.set()

    def note(self, daemon_id: int, grown: int, *, end: int = 0, reach: int = 0) -> None:
        """Count what a daemon has done to a chunk: by how much that grew, and how far the file's bytes or space go."""
        self.unsynced.add(daemon_id)
        self.unpublished = True
        self.unpublished_end = max(self.unpublished_end, end)
        self.unpublished_reach = max(self.unpublished_reach, reach)
        self.unpublished_growth += grown

    def publish_soon(self, end: int) -> None:
        """Have the inode's daemon told of a change, and that the file reaches to ``end`` at least."""
        self.unpublished = True
        self.unpublished_end = max(self.unpublished_end, end)

    def _overlapped_by(self, run: Run) -> list[Run]:
        """List the earlier runs under way that a run overlaps, latest first: who waits for it has waited for others."""
        earlier = []
        for other in self._sealed:
            if other is run:
                break
            if other.overlaps(run.offset, run.end):
                earlier.append(other)
        earlier.reverse()
        return earlier

    async def settle(self, offset: int, length: int) -> None:
        """Wait until what was accepted of a range before the call is with its daemons, or has failed."""
        end = offset + length
        if self._growing is not None and self._growing.overlaps(offset, end):
            self.seal()
        started_ns = recording.now()
        for run in list(self._sealed):
            if run.overlaps(offset, end):
                await run.written.wait()
        recording.note(spans.WRITTEN, started_ns)

    async def settle_all(self) -> None:
        """Wait until everything accepted before the call is with its daemons, or has failed."""
        if self._growing is not None:
            if self._sealed:
                self.seal()
            else:
                self._send_lone()
        if not self._sealed:
            return
        started_ns = recording.now()
        for run in list(self._sealed):
            await run.written.wait()
        recording.note(spans.WRITTEN, started_ns)


def accepted_bytes(budgets: Sequence[Budget]) -> int:
    """Sum up the accepted bytes that no daemon has yet."""
    return sum(budget.used for budget in budgets)
