"""Join what a mount, its daemons and the kernel recorded, and say of every operation where its time went.

The time of an operation is cut into *parts*, each with the name of a stage, that follow each other without a gap: so
they add up to the whole. Where several requests of one operation are under way at once, the one that ends last gets
the time: without it, the operation would have ended earlier. What ends behind the operation had nobody wait for it, and
gets none. What is left over is the handler's own.

=============================  ========================================================================================
stage                          from ... to
=============================  ========================================================================================
kernel queue                   the kernel has the request ... it is read by the mount: other requests, and its wake-up
wait in the mount              ... its handler begins
handler                        the mount's own work, its event loop's other tasks included
wait for ...                   something in the mount that is not free (see ``recording``)
RPC send                       a request is asked for ... UCX has it, or even the daemon
wire out                       ... the daemon has taken it, its payload too: the daemon's wake-up included
daemon queue                   ... it begins to serve it
daemon handler                 the daemon's own work, its event loop's other tasks included
metadata store ...             stages of the daemon (see ``recording``)
reply                          the daemon is done ... UCX has the reply
wire back                      ... the mount has taken it, its payload too: the mount's wake-up included
wake-up                        ... the task that waited goes on
daemon and wire                a request of which the daemon recorded nothing: sent ... answered
answer                         the handler is done ... the kernel has the answer
=============================  ========================================================================================

Before the first and behind the last stage, callers spend time that nobody here sees: entering and leaving the kernel,
and waking up.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from .spans import Operation, Request, Served, Stage

KERNEL_QUEUE = "kernel queue"
MOUNT_WAIT = "wait in the mount"
HANDLER = "handler"
SEND = "RPC send"
WIRE_OUT = "wire out"
DAEMON_QUEUE = "daemon queue"
DAEMON = "daemon handler"
REPLY = "reply"
WIRE_BACK = "wire back"
WAKE_UP = "wake-up"
UNRECORDED = "daemon and wire"
ANSWER = "answer"

#: Fastest exchanges from which the offset of a daemon's clock is taken.
_CLOCK_SAMPLES = 32
#: Nanoseconds by which the offset of a clock may be wrong: half a round trip, if all of it goes in one direction.
_SLACK_NS = 200_000


class KernelTimes(NamedTuple):
    """Say when the kernel had a request, and when it had the answer; 0: not seen."""

    queued_ns: int
    answered_ns: int


class Part(NamedTuple):
    """Be a piece of an operation's time; ``daemon`` is -1 where none is concerned."""

    stage: str
    started_ns: int
    ended_ns: int
    daemon: int = -1


class Exchange(NamedTuple):
    """Be one request to a daemon, with what the daemon recorded of it, if anything, in the mount's time."""

    request: Request
    served: Served | None
    parts: tuple[Part, ...]


class Traced(NamedTuple):
    """Be one operation. ``parts`` follow each other without a gap, from the first to the last moment that is seen."""

    operation: Operation
    parts: tuple[Part, ...]
    exchanges: tuple[Exchange, ...]
    #: Whether the kernel's part is seen.
    whole: bool

    @property
    def started_ns(self) -> int:
        """Return the first moment."""
        return self.parts[0].started_ns

    @property
    def total_ns(self) -> int:
        """Return how long it took."""
        return self.parts[-1].ended_ns - self.parts[0].started_ns


class Timelines(NamedTuple):
    """Hold everything joined: operations in their order, and requests that no operation waited for."""

    operations: tuple[Traced, ...]
    behind: tuple[Exchange, ...]
    #: By daemon: nanoseconds that its clock is ahead of the mount's.
    offsets: dict[int, int]


def join(
    operations: Sequence[Operation],
    requests: Sequence[Request],
    served: Mapping[int, Sequence[Served]],
    kernel: Mapping[int, KernelTimes],
) -> Timelines:
    """Join spans of a mount, of its daemons (by daemon) and of the kernel (by ``unique``)."""
    pairs = _pair(requests, served)
    offsets = {daemon: clock_offset([pair for pair in pairs if pair[0].daemon == daemon]) for daemon in served}
    by_operation: dict[int, list[Exchange]] = defaultdict(list)
    for request, found in pairs:
        shifted = _shift(found, -offsets.get(request.daemon, 0)) if found is not None else None
        by_operation[request.operation].append(Exchange(request, shifted, _parts_of(request, shifted)))
    traced = []
    behind = by_operation.pop(0, [])
    for operation in sorted(operations, key=lambda one: one.started_ns):
        exchanges = by_operation.pop(operation.number, [])
        within = tuple(one for one in exchanges if one.request.ended_ns <= operation.ended_ns)
        behind += [one for one in exchanges if one.request.ended_ns > operation.ended_ns]
        times = kernel.get(operation.unique, KernelTimes(0, 0))
        traced.append(_trace(operation, within, times))
    for left in by_operation.values():  # of operations that were under way when the recording ended
        behind += left
    return Timelines(tuple(traced), tuple(behind), offsets)


def _pair(requests: Iterable[Request], served: Mapping[int, Sequence[Served]]) -> list[tuple[Request, Served | None]]:
    """Find what the daemon recorded of each request, in their order.

    Numbers come again after a reconnection: then the times tell, as the clock of those with a number of their own is.
    """
    asked: dict[tuple[int, int, int], list[Request]] = defaultdict(list)
    for request in requests:
        asked[request.daemon, request.number, request.op].append(request)
    known: dict[tuple[int, int, int], list[Served]] = defaultdict(list)
    for daemon, found in served.items():
        for span in found:
            known[daemon, span.number, span.op].append(span)
    pairs: list[tuple[Request, Served | None]] = []
    again = []
    for key, same in asked.items():
        if len(same) == 1 and len(known[key]) <= 1:
            pairs.append((same[0], known[key][0] if known[key] else None))
        else:
            again.append(key)
    offsets = {daemon: clock_offset([pair for pair in pairs if pair[0].daemon == daemon]) for daemon in served}
    for key in again:
        left = known[key]
        for request in asked[key]:
            offset = offsets.get(request.daemon, 0)
            first_ns = request.started_ns + offset - _SLACK_NS
            last_ns = (request.answered_ns or request.ended_ns) + offset + _SLACK_NS
            at = next((at for at, span in enumerate(left) if first_ns <= span.received_ns <= last_ns), None)
            pairs.append((request, left.pop(at) if at is not None else None))
    return sorted(pairs, key=lambda pair: pair[0].started_ns)


def clock_offset(pairs: Sequence[tuple[Request, Served | None]]) -> int:
    """Return by how many ns a daemon's clock is ahead, from the fastest exchanges, as NTP does (RFC 5905, section 8).

    0 where no exchange speaks against it: processes of one host read the same clock. What is noted behind an event may
    be noted late, when somebody else had the processor meanwhile: that a request was sent, that the reply is out. So
    what counts is that none is received before it was asked for, or answered before it was done.
    """
    exchanges = [(request, span) for request, span in pairs if span is not None and request.answered_ns]
    if all(
        request.started_ns <= span.received_ns and span.done_ns <= request.answered_ns for request, span in exchanges
    ):
        return 0
    exchanges.sort(key=lambda one: one[0].answered_ns - one[0].sent_ns - (one[1].done_ns - one[1].received_ns))
    return round(
        median(
            (span.received_ns - request.sent_ns + span.done_ns - request.answered_ns) / 2
            for request, span in exchanges[:_CLOCK_SAMPLES]
        )
    )


def _shift(span: Served, by_ns: int) -> Served:
    if not by_ns:
        return span
    return Served(
        span.client,
        span.number,
        span.op,
        span.received_ns + by_ns,
        span.started_ns + by_ns,
        span.done_ns + by_ns,
        span.ended_ns + by_ns,
        [Stage(stage.name, stage.started_ns + by_ns, stage.ended_ns + by_ns) for stage in span.stages],
    )


def _parts_of(request: Request, served: Served | None) -> tuple[Part, ...]:
    """Cut the time of one request into parts without a gap."""
    cuts: list[tuple[str, int]] = [(SEND, request.sent_ns)]
    answered_ns = request.answered_ns or request.ended_ns
    if served is None:
        cuts.append((UNRECORDED, answered_ns))
    else:
        # That it was sent is noted late where its arrival takes the processor from the sender.
        cuts[0] = SEND, min(request.sent_ns, served.received_ns)
        cuts += [(WIRE_OUT, served.received_ns), (DAEMON_QUEUE, served.started_ns)]
        for stage in _outermost(served.stages):  # what goes on behind the answer is no part of it
            cuts += [(DAEMON, min(stage.started_ns, served.done_ns)), (stage.name, min(stage.ended_ns, served.done_ns))]
        cuts += [(DAEMON, served.done_ns), (REPLY, served.ended_ns), (WIRE_BACK, answered_ns)]
    cuts.append((WAKE_UP, request.ended_ns))
    parts = []
    at = request.started_ns
    for name, end in cuts:
        limit = request.ended_ns if name == WAKE_UP else answered_ns
        end = min(max(end, at), limit)
        if end > at:
            parts.append(Part(name, at, end, request.daemon))
            at = end
    return tuple(parts)


def _outermost(stages: Iterable[Stage]) -> list[Stage]:
    """Order stages, and leave out what lies within another one."""
    kept: list[Stage] = []
    for stage in sorted(stages, key=lambda one: (one.started_ns, -one.ended_ns)):
        if not kept or stage.ended_ns > kept[-1].ended_ns:
            kept.append(stage)
    return kept


def _trace(operation: Operation, exchanges: Sequence[Exchange], kernel: KernelTimes) -> Traced:
    """Cut the time of an operation into parts."""
    parts: list[Part] = []
    received_ns = operation.received_ns if 0 < operation.received_ns <= operation.started_ns else operation.started_ns
    whole = 0 < kernel.queued_ns <= received_ns and kernel.answered_ns >= operation.started_ns
    # Handlers of the companion library answer before they end, and the kernel's times are whole microseconds.
    ended_ns = min(operation.ended_ns, kernel.answered_ns) if whole else operation.ended_ns
    if whole:
        _append(parts, Part(KERNEL_QUEUE, kernel.queued_ns, received_ns))
    _append(parts, Part(MOUNT_WAIT, received_ns, operation.started_ns))
    intervals = [(one.request.started_ns, one.request.ended_ns, one.parts) for one in exchanges]
    intervals += [
        (stage.started_ns, stage.ended_ns, (Part(stage.name, stage.started_ns, stage.ended_ns),))
        for stage in operation.stages
        if stage.ended_ns <= operation.ended_ns
    ]
    for part in _critical(operation.started_ns, ended_ns, intervals):
        _append(parts, part)
    if whole:
        _append(parts, Part(ANSWER, ended_ns, kernel.answered_ns))
    if not parts:
        parts.append(Part(HANDLER, operation.started_ns, ended_ns))
    return Traced(operation, tuple(parts), tuple(exchanges), whole)


def _critical(started_ns: int, ended_ns: int, intervals: Sequence[tuple[int, int, tuple[Part, ...]]]) -> Iterable[Part]:
    """Give each moment between two to the interval over it that ends last, or else to the handler."""
    at = ended_ns
    parts: list[Part] = []
    left = sorted(intervals, key=lambda one: one[1])
    while left and at > started_ns:
        # From the end backwards: of those that began before, the one that ends last has the time down to its begin.
        start, end, pieces = left.pop()
        if start >= at:
            continue
        if end < at:
            parts.append(Part(HANDLER, max(end, started_ns), at))
            at = max(end, started_ns)
        for piece in reversed(pieces):
            piece_end = min(piece.ended_ns, at)
            piece_start = max(piece.started_ns, started_ns)
            if piece_start < piece_end:
                parts.append(piece._replace(started_ns=piece_start, ended_ns=piece_end))
                at = piece_start
    if at > started_ns:
        parts.append(Part(HANDLER, started_ns, at))
    return reversed(parts)


def _append(parts: list[Part], part: Part) -> None:
    if part.ended_ns > part.started_ns:
        parts.append(part)


class Stall(NamedTuple):
    """Be many waits of nearly the same length in one stage: a timer rather than work."""

    stage: str
    daemon: int
    waits: int
    length_ns: int
    spread_ns: int


#: Waits shorter than this are too common to tell a timer by.
STALL_MIN_NS = 1_000_000
#: How far apart lengths may be that are nearly the same: what waking up varies by, and a share of the length.
STALL_SPREAD_NS = 100_000
STALL_SPREAD = 0.02
#: Waits of one length that make a stall: so many, and so many times as many as the lengths around it, within a quarter,
#: would have there. Work has lengths that vary by more than 5 %, which gives less than five times as many.
STALL_COUNT = 5
STALL_TIMES = 5
STALL_AROUND = 0.25


def stalls(parts: Iterable[Part]) -> list[Stall]:
    """Point out stages in which many waits have nearly the same length; the costliest first."""
    by_stage: dict[tuple[str, int], list[int]] = defaultdict(list)
    for part in parts:
        duration_ns = part.ended_ns - part.started_ns
        if duration_ns >= STALL_MIN_NS * (1 - STALL_AROUND):
            by_stage[part.stage, part.daemon].append(duration_ns)
    found = []
    for (stage, daemon), durations in by_stage.items():
        durations.sort()
        while same := _most_alike(durations):
            found.append(Stall(stage, daemon, len(same), round(median(same)), same[-1] - same[0]))
            low, high = _around(durations, same[0], same[-1])
            del durations[low:high]
    return sorted(found, key=lambda one: -one.waits * one.length_ns)


def _most_alike(durations: Sequence[int]) -> Sequence[int]:
    """Return the most of the sorted durations that make a stall; empty if none do."""
    best: Sequence[int] = ()
    for first in range(bisect_left(durations, STALL_MIN_NS), len(durations)):
        shortest = durations[first]
        spread = max(STALL_SPREAD_NS, STALL_SPREAD * shortest)
        last = bisect_right(durations, shortest + spread)
        count = last - first
        if count <= max(len(best), STALL_COUNT - 1):
            continue
        low, high = _around(durations, shortest, shortest + spread)
        expected = (high - low - count) * spread / (2 * STALL_AROUND * shortest)
        if count >= STALL_COUNT + STALL_TIMES * expected:
            best = durations[first:last]
    return best


def _around(durations: Sequence[int], shortest: float, longest: float) -> tuple[int, int]:
    """Return where the durations lie that are about as long, as a slice of the sorted durations."""
    margin = STALL_AROUND * shortest
    return bisect_left(durations, shortest - margin), bisect_right(durations, longest + margin)
