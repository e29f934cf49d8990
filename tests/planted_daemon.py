"""Be a daemon with a fault, which BENCHFS_PLANTED names: the torture has to find it.

early     some writes are acknowledged, and done later
twice     the recorded outcome of a request is ignored: a retry is applied anew
skipped   some participants of a transaction do not do their part
forgotten what was prepared for a transaction is forgotten by a restart
unfenced  some writes take long, and the end of their connection does not wait for them: they land behind the end of the
          session
resumed   likewise, but so long that they land behind what came over the next connection
afterwards likewise, but longer than a lease; they land behind the end of the session, when the next mount comes
alone     whoever ends a session tells no other daemon
slow      no fault: the same writes take as long, and the end of their connection waits for them
busy      no fault: the first who asks how much space there is has to wait
quota     no fault: chunk files may not grow when QUOTA bytes of their disk are used
"""

import errno
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import trio

from benchfs_fuse import daemon
from benchfs_fuse.chunks.uring import Ring
from benchfs_fuse.errors import FsError
from benchfs_fuse.model import ClientId
from benchfs_fuse.ports import Buffer, Channel, Reply
from benchfs_fuse.rpc.messages import (
    Body,
    Finish,
    Hello,
    HelloReply,
    OpenCount,
    Request,
    WriteChunk,
    WriteChunkReply,
    encode,
)
from benchfs_fuse.rpc.server import Server
from benchfs_fuse.services.calls import Call
from benchfs_fuse.services.chunkserver import ChunkServer
from benchfs_fuse.services.metadata import MetadataService
from benchfs_fuse.services.sessions import SessionTable
from benchfs_fuse.services.transactions import Transactions

#: Seconds by which a write is late; and that one takes which is long: longer than a mount takes to be started anew, or
#: than a cut until connections are given up, and what comes after it.
LATE_S = 0.3
LONG_S = 4.0
LONGEST_S = 20.0
#: Seconds for a write that is to outlast a lease, and for the next mount to come when the session has ended.
OUTLASTING_S = 40.0
#: Seconds for the first answer about space: more than SPACE_TIMEOUT_S of services/namespace.py.
BUSY_S = 3.0
#: Bytes that may be used.
QUOTA = 32 << 20
#: One of so many is hurt.
SELDOM = 10


def _seldom() -> Callable[[], bool]:
    count = 0

    def hurt() -> bool:
        nonlocal count
        count += 1
        return count % SELDOM == 0

    return hurt


def plant_early() -> None:
    write, write_now, hurt = ChunkServer._write, ChunkServer._write_now, _seldom()

    async def early(self: ChunkServer, request: Request, payload: memoryview | None, want: int) -> Reply:
        assert isinstance(request, WriteChunk)
        if payload is None or not hurt():
            return await write(self, request, payload, want)
        data = memoryview(bytearray(payload))

        async def later() -> None:
            await trio.sleep(LATE_S)
            await write(self, request, data, want)

        trio.lowlevel.spawn_system_task(later)
        return Reply(0, encode(WriteChunkReply(0)))

    def never(self: ChunkServer, request: Request, payload: memoryview | None, want: int) -> Reply | None:
        return None

    assert write_now is not never
    ChunkServer._write, ChunkServer._write_now = early, never  # type: ignore[method-assign]


def plant_slow(pause: Callable[[], Awaitable[None]], *, fenced: bool) -> None:
    write, hurt = ChunkServer._write, _seldom()

    async def slow(self: ChunkServer, request: Request, payload: memoryview | None, want: int) -> Reply:
        assert isinstance(request, WriteChunk)
        if payload is None or not hurt():
            return await write(self, request, payload, want)
        data = memoryview(bytearray(payload))
        outcome: list[Reply | FsError] = []
        done = trio.Event()

        async def at_leisure() -> None:
            await pause()
            try:
                outcome.append(await write(self, request, data, want))
            except FsError as error:
                outcome.append(error)
            done.set()

        trio.lowlevel.spawn_system_task(at_leisure)
        with trio.CancelScope(shield=fenced):  # what is served is cancelled when its connection ends
            await done.wait()
        (answer,) = outcome
        if isinstance(answer, FsError):
            raise answer
        return answer

    ChunkServer._write = slow  # type: ignore[method-assign]
    ChunkServer._write_now = lambda self, request, payload, want: None  # type: ignore[method-assign]


def plant_afterwards() -> None:
    """Between the end of a session and the next mount the torture looks at what is there, and then once more."""
    session_ended, hello = MetadataService.session_ended, SessionTable.hello
    ended, begun = [trio.Event()], [trio.Event()]

    def happened(events: list[trio.Event]) -> None:
        events[-1].set()
        events.append(trio.Event())

    async def noted_end(self: MetadataService, client_id: ClientId, opens: Sequence[OpenCount], clean: bool) -> None:
        await session_ended(self, client_id, opens, clean)
        if not clean:
            happened(ended)

    async def noted_hello(self: SessionTable, channel: Channel, request: Hello) -> HelloReply:
        reply = await hello(self, channel, request)
        if request.kind == "mount" and not request.resume:
            happened(begun)
        return reply

    async def outlast() -> None:
        with trio.move_on_after(OUTLASTING_S) as scope:
            await ended[-1].wait()
            scope.deadline = trio.current_time() + OUTLASTING_S
            await begun[-1].wait()

    MetadataService.session_ended = noted_end  # type: ignore[method-assign]
    SessionTable.hello = noted_hello  # type: ignore[method-assign]
    plant_slow(outlast, fenced=False)


def plant_alone() -> None:
    begin = SessionTable.__init__

    def alone(self: SessionTable, *more: Any, **names: Any) -> None:
        begin(self, *more, **names)
        self._others = []

    SessionTable.__init__ = alone  # type: ignore[method-assign]


def plant_quota() -> None:
    """Answer for the disk: where the chunk store calls it, and as it would."""
    write, fallocate, plain = Ring.write, Ring.fallocate, os.pwritev

    def check(fd: int, length: int, end: int) -> None:
        space = os.fstatvfs(fd)
        if end > os.fstat(fd).st_size and (space.f_blocks - space.f_bfree) * space.f_frsize + length > QUOTA:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    async def checked_write(self: Ring, fd: int, data: Buffer, offset: int) -> None:
        check(fd, len(data), offset + len(data))
        await write(self, fd, data, offset)

    async def checked_fallocate(self: Ring, fd: int, mode: int, offset: int, length: int) -> None:
        if mode == 0:
            check(fd, length, offset + length)
        await fallocate(self, fd, mode, offset, length)

    def checked_plain(fd: int, buffers: Sequence[Buffer], offset: int, *flags: int) -> int:
        length = sum(len(buffer) for buffer in buffers)
        check(fd, length, offset + length)
        return plain(fd, buffers, offset, *flags)

    Ring.write, Ring.fallocate = checked_write, checked_fallocate  # type: ignore[method-assign]
    os.pwritev = checked_plain  # type: ignore[assignment]


def plant_busy() -> None:
    usage, waits = ChunkServer._usage, [BUSY_S]

    async def busy(self: ChunkServer, request: Request, call: Call) -> Body:
        if waits:
            await trio.sleep(waits.pop())
        return await usage(self, request, call)

    ChunkServer._usage = busy  # type: ignore[method-assign]


def plant_twice() -> None:
    recall = Server._recall

    def twice(self: Server, *more: Any) -> Any:
        found = recall(self, *more)
        return None if isinstance(found, Body) else found

    Server._recall = twice  # type: ignore[method-assign, assignment]


def plant_skipped() -> None:
    finish, hurt = Transactions.finish, _seldom()

    def skipped(self: Transactions, request: Finish, call: Call) -> Body:
        if request.commit and hurt():
            request = Finish(request.txid, False)
        return finish(self, request, call)

    Transactions.finish = skipped  # type: ignore[method-assign]


def plant_forgotten() -> None:
    hold, recover = Transactions._hold, Transactions.recover

    def forgotten(self: Transactions) -> None:
        Transactions._hold = lambda self, key, steps: None  # type: ignore[method-assign]
        recover(self)
        Transactions._hold = hold  # type: ignore[method-assign]

    Transactions.recover = forgotten  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[], None]] = {
    "early": plant_early,
    "twice": plant_twice,
    "skipped": plant_skipped,
    "forgotten": plant_forgotten,
    "unfenced": partial(plant_slow, partial(trio.sleep, LONG_S), fenced=False),
    "resumed": partial(plant_slow, partial(trio.sleep, LONGEST_S), fenced=False),
    "afterwards": plant_afterwards,
    "alone": plant_alone,
    "slow": partial(plant_slow, partial(trio.sleep, LONG_S), fenced=True),
    "busy": plant_busy,
    "quota": plant_quota,
}

if __name__ == "__main__":
    PLANTS[os.environ["BENCHFS_PLANTED"]]()
    sys.exit(daemon.main())
