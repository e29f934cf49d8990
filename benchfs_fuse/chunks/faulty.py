"""Put faults in front of any chunk store, for tests alone: failures that a disk may show, and bugs planted on purpose.

Failures follow the contract (an error is raised, or it takes long), so everything above must cope with them. Planted
bugs break it (a write is lost, a read comes up short): they are there to show that a test would notice.

All chance comes from one seed: the same calls in the same order meet the same faults.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from ..errors import NoSpace, StorageError
from ..model import ChunkId, DiskUsage
from ..ports import Buffer, ChunkStore, Mapped, Trimmed

#: Most checkpoints that a delayed operation passes: enough for other tasks to get in between several times.
DELAY_CHECKPOINTS_MAX = 10


@dataclass(frozen=True)
class Rates:
    """Say how often each fault strikes, from 0 (never) to 1 (always)."""

    #: A write or an allocation raises NoSpace and has done nothing.
    no_space: float = 0.0
    #: Any operation raises StorageError and has done nothing.
    failure: float = 0.0
    #: A write, an allocation or a punch raises StorageError after a part of it was done.
    partial: float = 0.0
    #: Any operation first lets other tasks run, up to ``DELAY_CHECKPOINTS_MAX`` times.
    delay: float = 0.0
    #: Planted: a write does nothing and reports success.
    lost_write: float = 0.0
    #: Planted: a read reports fewer bytes than there are.
    short_read: float = 0.0


class FaultyChunkStore:
    """Implement ChunkStore over another one, with faults. Without ``rates`` and hold it is transparent."""

    def __init__(self, inner: ChunkStore, rates: Rates | None = None, seed: int = 0) -> None:
        self.inner = inner
        self.rates = rates or Rates()
        #: While set to an event, every operation waits for it before anything else.
        self.hold: trio.Event | None = None
        self._random = random.Random(seed)
        #: How often each fault has struck.
        self.struck = dict.fromkeys(("no_space", "failure", "partial", "delay", "lost_write", "short_read"), 0)

    def _strikes(self, fault: str) -> bool:
        rate: float = getattr(self.rates, fault)
        if not rate or self._random.random() >= rate:
            return False
        self.struck[fault] += 1
        return True

    async def _before(self, what: str) -> None:
        if self.hold is not None:
            await self.hold.wait()
        if self._strikes("delay"):
            for _ in range(self._random.randint(1, DELAY_CHECKPOINTS_MAX)):
                await trio.lowlevel.checkpoint()
        if self._strikes("failure"):
            raise StorageError(f"injected failure of {what}")

    async def read(self, chunk: ChunkId, offset: int, into: memoryview) -> int:
        """Read into the caller's buffer; return how many bytes from ``offset`` on exist."""
        await self._before("read")
        count = await self.inner.read(chunk, offset, into)
        return self._random.randrange(count) if count and self._strikes("short_read") else count

    async def write(self, chunk: ChunkId, offset: int, data: Buffer) -> int:
        """Write all of ``data``; return by how many bytes the chunk's allocated space grew."""
        await self._before("write")
        if self._strikes("no_space"):
            raise NoSpace("injected")
        if self._strikes("lost_write"):
            return 0
        if self._strikes("partial"):
            await self.inner.write(chunk, offset, memoryview(data)[: self._random.randrange(len(data) + 1)])
            raise StorageError("injected failure in the middle of a write")
        return await self.inner.write(chunk, offset, data)

    def read_now(self, chunk: ChunkId, offset: int, into: memoryview) -> int | None:
        """Do nothing: faults take their time."""
        return None

    def write_now(self, chunk: ChunkId, offset: int, data: Buffer) -> int | None:
        """Do nothing: faults take their time."""
        return None

    async def allocate(self, chunk: ChunkId, offset: int, length: int, *, zero: bool = False) -> int:
        """Reserve space for ``length`` > 0 bytes; return by how many bytes the chunk's allocated space grew."""
        await self._before("allocate")
        if self._strikes("no_space"):
            raise NoSpace("injected")
        if self._strikes("partial"):
            await self.inner.allocate(chunk, offset, self._random.randint(1, length), zero=zero)
            raise StorageError("injected failure in the middle of an allocation")
        return await self.inner.allocate(chunk, offset, length, zero=zero)

    async def punch(self, chunk: ChunkId, offset: int, length: int, *, zeros_only: bool = False) -> int:
        """Make a range zeros and free the blocks that lie in it as a whole; return the bytes freed."""
        await self._before("punch")
        if self._strikes("partial"):
            await self.inner.punch(chunk, offset, self._random.randint(1, length), zeros_only=zeros_only)
            raise StorageError("injected failure in the middle of a punch")
        return await self.inner.punch(chunk, offset, length, zeros_only=zeros_only)

    async def map(self, ino: int, index: int, offset: int, stop: int, count_max: int) -> Mapped:
        """Return the data ranges of a file that end behind byte ``offset`` of chunk ``index``, up to chunk ``stop``."""
        await self._before("map")
        return await self.inner.map(ino, index, offset, stop, count_max)

    async def trim(self, ino: int, index: int, offset: int, *, durable: bool = False) -> Trimmed:
        """Drop of file ``ino`` everything at and behind byte ``offset`` of chunk ``index``."""
        await self._before("trim")
        return await self.inner.trim(ino, index, offset, durable=durable)

    async def drop(self, inos: Sequence[int], *, durable: bool = False) -> int:
        """Drop all chunks of these files; return the bytes freed."""
        await self._before("drop")
        return await self.inner.drop(inos, durable=durable)

    async def sync(self, ino: int) -> None:
        """Bring everything written to ``ino`` so far to stable storage."""
        await self._before("sync")
        await self.inner.sync(ino)

    async def usage(self) -> list[DiskUsage]:
        """Return the space of each file system under this store."""
        await self._before("usage")
        return await self.inner.usage()

    async def aclose(self) -> None:
        """Close the store behind. No faults here."""
        await self.inner.aclose()
