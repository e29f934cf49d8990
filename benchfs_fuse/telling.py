"""Collect what a mount and its daemons have counted, and what they record while somebody wants that."""

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from .client import Session
from .control import Counts, DaemonCounts, TracePart
from .errors import FsError
from .observe import recording
from .rpc.messages import Statistics, StatisticsReply, Trace, TraceReply
from .services.parallel import each

if TYPE_CHECKING:
    from .fuse import BenchfsOperations  # imports pyfuse3, before which the companion library has to be loaded

#: Seconds that a daemon has to answer when somebody wants to know something.
ANSWER_S = 2.0
#: Longest recording; memory is bounded by ``recording.SPANS_MAX`` as well.
SECONDS_MAX = 3600.0
#: Seconds for which the daemons go on when the mount should have ended the recording: what was recorded is fetched.
FETCH_S = 30.0
#: Operations or requests per line that is sent: at some 70 bytes for a stage, even with all stages that a span may
#: have they take less than a line may be long (4 MiB).
PAGE = 500


async def count(session: Session, operations: "BenchfsOperations") -> Counts:
    """Return what the mount has counted, and what those daemons have that answer at once."""
    answers: dict[int, StatisticsReply] = {}

    async def one(daemon_id: int) -> None:
        with trio.move_on_after(ANSWER_S), contextlib.suppress(FsError):
            answers[daemon_id] = await session.links.to(daemon_id).call(Statistics(), StatisticsReply)

    await each(one, session.links.daemons)
    network = session.network.statistics()
    return Counts(
        time.monotonic(),
        operations.statistics.durations(),
        operations.bytes_read,
        operations.bytes_written,
        sum(link.in_flight for link in session.links.statistics()),
        operations.absent_asked,
        operations.absent_known,
        *operations.answered(),
        network.spins,
        network.sleeps,
        tuple(
            DaemonCounts(
                daemon_id, reply.uptime_s, reply.operations, reply.bytes_read, reply.bytes_written, reply.counters
            )
            for daemon_id, reply in sorted(answers.items())
        ),
    )


async def trace(
    session: Session,
    seconds: float,
    wait_end: Callable[[], Awaitable[None]],
    send: Callable[[TracePart], Awaitable[None]],
) -> None:
    """Record here and at the daemons until ``wait_end`` returns, ``seconds`` at most; send what was recorded in parts.

    The first part says that everybody records. A daemon that does not answer has its trouble told instead.
    """
    if recording.recorder is not None:
        await send(TracePart(trouble="somebody else is tracing this mount"))
        return
    recording.start()  # so that nobody else does; what is recorded before everybody records is forgotten
    seconds = min(max(0.0, seconds), SECONDS_MAX)
    begun: dict[int, int] = {}
    troubles: dict[int, str] = {}

    async def ask(daemon_id: int, request: Trace) -> TraceReply | None:
        with trio.move_on_after(ANSWER_S):
            try:
                return await session.links.to(daemon_id).call(request, TraceReply)
            except FsError as error:
                troubles[daemon_id] = str(error)
                return None
        troubles[daemon_id] = f"did not answer in {ANSWER_S:g} s"
        return None

    async def begin(daemon_id: int) -> None:
        if (reply := await ask(daemon_id, Trace(min(seconds + FETCH_S, SECONDS_MAX)))) is not None:
            begun[daemon_id] = reply.next

    async def end(daemon_id: int) -> None:
        with trio.move_on_after(ANSWER_S), contextlib.suppress(FsError):
            await session.links.to(daemon_id).call(Trace(-1), TraceReply)

    try:
        await each(begin, session.links.daemons)
        recorder = recording.start()
        await send(TracePart(recording=True))
        with trio.move_on_after(seconds):
            await wait_end()
        recording.stop()
        await _send_own(recorder, send)
        for daemon_id, position in begun.items():
            reply = await ask(daemon_id, Trace(0, position))
            while reply is not None:
                await send(TracePart(daemon=daemon_id, served=reply.served, lost=0 if reply.more else reply.lost))
                reply = await ask(daemon_id, Trace(0, reply.next)) if reply.more else None
    finally:
        recording.stop()
        with trio.CancelScope(shield=True):  # those that were silent too: they may have begun when they go on
            await each(end, session.links.daemons)
    for daemon_id, trouble in troubles.items():
        await send(TracePart(daemon=daemon_id, trouble=trouble))


async def _send_own(recorder: recording.Recorder, send: Callable[[TracePart], Awaitable[None]]) -> None:
    for at in range(0, len(recorder.operations), PAGE):
        await send(TracePart(operations=tuple(recorder.operations[at : at + PAGE])))
    for at in range(0, len(recorder.requests), PAGE):
        await send(TracePart(requests=tuple(recorder.requests[at : at + PAGE])))
    await send(TracePart(lost=recorder.lost))
