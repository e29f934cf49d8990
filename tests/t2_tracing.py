"""Recording on demand: a daemon's part of it on a mock clock, and a mount that collects everybody's.

Every test names its clock itself: pytest-trio looks for one among a test's own arguments only.
"""

import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from benchfs_fuse import control, telling
from benchfs_fuse.client import Session
from benchfs_fuse.control import TracePart
from benchfs_fuse.errors import DaemonUnreachable, FsError, InvalidArgument, NotFound
from benchfs_fuse.limits import BODY_MAX, STAGES_MAX
from benchfs_fuse.model import ClientId
from benchfs_fuse.observe import recording
from benchfs_fuse.observe.recording import Recorder
from benchfs_fuse.observe.spans import Served, Stage
from benchfs_fuse.rpc.messages import Trace, TraceReply, encode
from benchfs_fuse.services.calls import Batch
from benchfs_fuse.services.tracing import LOOKED_AT_MAX, SECONDS_MAX, TraceService

ANN, BOB = ClientId(1), ClientId(2)
LONGEST = (1 << 63) - 1


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    assert recording.recorder is None
    yield
    recording.stop()


def is_on() -> bool:
    return recording.recorder is not None


# ── a daemon ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Caller:
    """Be whose request it is."""

    def __init__(self, client_id: ClientId) -> None:
        self.client_id = client_id

    def commit(self, batch: Batch, reply: object) -> None:
        raise AssertionError("nothing is stored")


class Tracing:
    """Ask a daemon's service as its clients do."""

    def __init__(self, service: TraceService) -> None:
        self._handler = service.handlers()[Trace]

    async def ask(self, client_id: ClientId, seconds: float, after: int = 0) -> TraceReply:
        reply = await self._handler(Trace(seconds, after), Caller(client_id))
        assert isinstance(reply, TraceReply)
        await wait_all_tasks_blocked()
        return reply


@asynccontextmanager
async def tracing() -> AsyncIterator[Tracing]:
    service = TraceService()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        await wait_all_tasks_blocked()
        yield Tracing(service)
        nursery.cancel_scope.cancel()


def serve(client_id: ClientId, count: int, stages: int = 0) -> list[Served]:
    """Have ``count`` requests served; return their spans."""
    recorder = recording.recorder
    assert recorder is not None
    made = []
    for number in range(count):
        span = Served(client_id, number, 9, 1, 2, 3, stages=[Stage("metadata store", 1, 2)] * stages)
        recorder.end_served(span)
        made.append(span)
    return made


async def pages(daemon: Tracing, client_id: ClientId, after: int) -> tuple[list[Served], list[TraceReply]]:
    spans: list[Served] = []
    replies = []
    while True:
        reply = await daemon.ask(client_id, 0, after)
        replies.append(reply)
        spans += reply.served
        assert reply.next > after or not reply.more
        after = reply.next
        if not reply.more:
            return spans, replies


async def test_recording_begins_and_ends_when_a_client_says_so(mock_clock: MockClock) -> None:
    async with tracing() as daemon:
        with pytest.raises(NotFound):
            await daemon.ask(ANN, 0)
        assert not is_on()
        assert await daemon.ask(ANN, 10) == TraceReply((), 0, False, 0)
        assert is_on()
        made = serve(ANN, 3)
        assert await daemon.ask(ANN, 0) == TraceReply(tuple(made), 3, False, 0)
        assert await daemon.ask(ANN, 0, 2) == TraceReply((made[2],), 3, False, 0)
        assert await daemon.ask(ANN, -1) == TraceReply((), 0, False, 0)
        assert not is_on()
        with pytest.raises(NotFound):
            await daemon.ask(ANN, 0)
        await daemon.ask(ANN, -1)  # twice is no trouble


async def test_recording_ends_by_itself_when_nobody_asks_any_more(mock_clock: MockClock) -> None:
    async with tracing() as daemon:
        await daemon.ask(ANN, 10)
        mock_clock.jump(9.9)
        await wait_all_tasks_blocked()
        assert is_on()
        await daemon.ask(ANN, 10)  # goes on
        mock_clock.jump(9.9)
        await wait_all_tasks_blocked()
        assert is_on()
        mock_clock.jump(0.2)
        await wait_all_tasks_blocked()
        assert not is_on()
        await daemon.ask(BOB, 5)
        with pytest.raises(NotFound):  # not what was recorded before
            await daemon.ask(ANN, 0)


async def test_clients_see_their_own_requests_from_when_they_began(mock_clock: MockClock) -> None:
    async with tracing() as daemon:
        await daemon.ask(ANN, 100)
        early = serve(ANN, 2)
        serve(BOB, 2)
        position = (await daemon.ask(BOB, 10)).next
        assert position == 4
        late = serve(BOB, 3)
        more = serve(ANN, 1)
        assert (await pages(daemon, BOB, position))[0] == late
        assert (await pages(daemon, ANN, 0))[0] == early + more
        await daemon.ask(ANN, -1)
        assert is_on(), "somebody else still wants it"
        assert (await pages(daemon, BOB, position))[0] == late
        mock_clock.jump(10)
        await wait_all_tasks_blocked()
        assert not is_on()


async def test_pages_fit_into_a_body_however_large_spans_are(mock_clock: MockClock) -> None:
    async with tracing() as daemon:
        await daemon.ask(ANN, 10)
        recorder = recording.recorder
        assert recorder is not None
        stage = Stage("io_uring completion", LONGEST, LONGEST)
        largest = Served(LONGEST, (1 << 32) - 1, 255, LONGEST, LONGEST, LONGEST, LONGEST, [stage] * STAGES_MAX)
        made = []
        for number in range(1000):
            span = msgspec.structs.replace(largest, client=ANN, number=number)
            recorder.end_served(span)
            made.append(span)
        found, replies = await pages(daemon, ANN, 0)
        assert found == made
        assert 10 < len(replies) < 60
        as_sent = [
            msgspec.structs.replace(
                reply, served=tuple(msgspec.structs.replace(one, client=LONGEST) for one in reply.served)
            )
            for reply in replies
        ]
        assert max(len(encode(reply)) for reply in as_sent) <= BODY_MAX


async def test_one_page_looks_at_so_many_spans_and_no_more(mock_clock: MockClock) -> None:
    async with tracing() as daemon:
        await daemon.ask(ANN, 10)
        serve(BOB, LOOKED_AT_MAX + 5)
        (last,) = serve(ANN, 1)
        assert await daemon.ask(ANN, 0) == TraceReply((), LOOKED_AT_MAX, True, 0)
        assert await daemon.ask(ANN, 0, LOOKED_AT_MAX) == TraceReply((last,), LOOKED_AT_MAX + 6, False, 0)


async def test_what_there_was_no_room_for_is_told(mock_clock: MockClock) -> None:
    async with tracing() as daemon:
        recording.start(spans_max=2)
        await daemon.ask(ANN, 10)
        made = serve(ANN, 5)
        assert await daemon.ask(ANN, 0) == TraceReply(tuple(made[:2]), 2, False, 3)


@pytest.mark.parametrize(
    ("seconds", "after"),
    [(SECONDS_MAX + 1, 0), (math.inf, 0), (math.nan, 0), (10.0, -1), (0.0, -1), (-1.0, -5)],
)
async def test_bad_input_is_refused(mock_clock: MockClock, seconds: float, after: int) -> None:
    async with tracing() as daemon:
        with pytest.raises(InvalidArgument):
            await daemon.ask(ANN, seconds, after)
        assert not is_on()


async def test_a_page_behind_the_end_is_empty(mock_clock: MockClock) -> None:
    async with tracing() as daemon:
        await daemon.ask(ANN, SECONDS_MAX)
        serve(ANN, 2)
        assert (await daemon.ask(ANN, 0, 1 << 40)).served == ()
        assert not (await daemon.ask(ANN, 0, 1 << 40)).more
        await daemon.ask(ANN, -math.inf)
        assert not is_on()


# ── a mount ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Daemon:
    """Record as a daemon does, but not in the recorder of this process. ``answer`` may wait, raise, or do something."""

    def __init__(self, daemon_id: int) -> None:
        self.daemon_id = daemon_id
        self.on = False
        self.spans = [Served(ANN, daemon_id * 100 + number, 9, 1, 2, 3, 4) for number in range(5)]
        self.lost = 0
        self.asked: list[Trace] = []
        self.answer: Callable[[Trace], Any] = self._at_once

    async def _at_once(self, request: Trace) -> None:
        await trio.lowlevel.checkpoint()

    async def call(self, request: Trace, reply_type: type[TraceReply]) -> TraceReply:
        self.asked.append(request)
        await self.answer(request)
        if request.seconds:
            self.on = request.seconds > 0
            return TraceReply((), 1 if self.on else 0, False, 0)
        assert self.on
        found = self.spans[request.after : request.after + 2]
        end = request.after + len(found)
        return TraceReply(tuple(found), end, end < len(self.spans), self.lost)


class Cluster:
    """Stand for the links of a session."""

    def __init__(self, daemons: int = 2) -> None:
        self.all = [Daemon(daemon_id) for daemon_id in range(daemons)]
        self.links = self

    @property
    def daemons(self) -> tuple[int, ...]:
        return tuple(range(len(self.all)))

    def to(self, daemon_id: int) -> Daemon:
        return self.all[daemon_id]

    @property
    def session(self) -> Session:
        return cast(Session, self)

    def nobody_records(self) -> bool:
        return not is_on() and not any(daemon.on for daemon in self.all)


class Client:
    """Be who asked: collect the parts, end when told."""

    def __init__(self) -> None:
        self.parts: list[TracePart] = []
        self.began = trio.Event()
        self.end = trio.Event()

    async def send(self, part: TracePart) -> None:
        await trio.lowlevel.checkpoint()
        self.parts.append(part)
        if part.recording:
            self.began.set()

    def troubles(self) -> dict[int, str]:
        return {part.daemon: part.trouble for part in self.parts if part.trouble}

    def served(self, daemon_id: int) -> list[Served]:
        return [span for part in self.parts if part.daemon == daemon_id for span in part.served]


async def forever(request: Trace) -> None:
    await trio.sleep_forever()


def do(recorder: Recorder | None, count: int) -> None:
    """Have ``count`` operations done with a request each."""
    assert recorder is not None
    for number in range(count):
        operation = recorder.begin_operation("read", number, 0)
        recorder.add_request(0, number, 9, 1, 1, 1)
        recorder.end_operation(operation, 0)


async def test_everybody_records_until_the_client_says_so(autojump_clock: MockClock) -> None:
    cluster, client = Cluster(), Client()
    cluster.all[1].lost = 7
    async with trio.open_nursery() as nursery:
        nursery.start_soon(telling.trace, cluster.session, 100.0, client.end.wait, client.send)
        await client.began.wait()
        assert is_on() and all(daemon.on for daemon in cluster.all)
        assert cluster.all[0].asked == [Trace(100.0 + telling.FETCH_S)]
        do(recording.recorder, telling.PAGE + 1)
        client.end.set()
    assert cluster.nobody_records()
    assert client.parts[0] == TracePart(recording=True)
    assert [len(part.operations) for part in client.parts if part.operations] == [telling.PAGE, 1]
    assert [len(part.requests) for part in client.parts if part.requests] == [telling.PAGE, 1]
    for daemon in cluster.all:
        assert client.served(daemon.daemon_id) == daemon.spans[1:]
    assert [(part.daemon, part.lost) for part in client.parts if part.lost] == [(1, 7)]
    assert client.troubles() == {}


async def test_recording_ends_when_the_time_is_over(autojump_clock: MockClock) -> None:
    cluster, client = Cluster(), Client()
    start = trio.current_time()
    await telling.trace(cluster.session, 10.0, client.end.wait, client.send)
    assert trio.current_time() - start == pytest.approx(10.0)
    assert cluster.nobody_records() and client.served(1) == cluster.all[1].spans[1:]


async def test_a_recording_has_its_longest_time(autojump_clock: MockClock) -> None:
    cluster, client = Cluster(), Client()
    start = trio.current_time()
    await telling.trace(cluster.session, 1e9, client.end.wait, client.send)
    assert trio.current_time() - start == pytest.approx(telling.SECONDS_MAX)
    assert max(request.seconds for request in cluster.all[0].asked) <= SECONDS_MAX


@pytest.mark.parametrize("seconds", [-5.0, -math.inf, math.nan])
async def test_a_time_that_is_none_ends_at_once(autojump_clock: MockClock, seconds: float) -> None:
    cluster, client = Cluster(), Client()
    start = trio.current_time()
    await telling.trace(cluster.session, seconds, client.end.wait, client.send)
    assert trio.current_time() == start and client.parts[0].recording and cluster.nobody_records()


async def test_only_one_records_at_a_time(autojump_clock: MockClock) -> None:
    cluster, client, other, third = Cluster(), Client(), Client(), Client()
    async with trio.open_nursery() as nursery:
        # Both at once: one of them has not yet heard from its daemons when the other asks.
        nursery.start_soon(telling.trace, cluster.session, 100.0, client.end.wait, client.send)
        nursery.start_soon(telling.trace, cluster.session, 100.0, client.end.wait, other.send)
        await wait_all_tasks_blocked()
        winner, loser = (client, other) if client.began.is_set() else (other, client)
        assert loser.parts == [TracePart(trouble="somebody else is tracing this mount")]
        do(recording.recorder, 1)
        await telling.trace(cluster.session, 100.0, third.end.wait, third.send)
        assert third.parts == loser.parts
        assert is_on() and all(daemon.on for daemon in cluster.all), "they do not disturb who records"
        client.end.set()
    assert sum(len(part.operations) for part in winner.parts) == 1
    assert cluster.nobody_records()


async def test_a_missing_and_a_silent_daemon_are_told_and_the_others_seen(autojump_clock: MockClock) -> None:
    cluster, client = Cluster(3), Client()

    async def missing(request: Trace) -> None:
        raise DaemonUnreachable("daemon 0 is not in the registry")

    cluster.all[0].answer, cluster.all[1].answer = missing, forever
    async with trio.open_nursery() as nursery:
        nursery.start_soon(telling.trace, cluster.session, 100.0, client.end.wait, client.send)
        await client.began.wait()
        do(recording.recorder, 3)
        client.end.set()
    assert client.troubles() == {0: "daemon 0 is not in the registry", 1: "did not answer in 2 s"}
    assert client.served(2) == cluster.all[2].spans[1:]
    assert sum(len(part.operations) for part in client.parts) == 3
    # One that was silent may do later what it was asked: then it also ends.
    assert [request.seconds for request in cluster.all[1].asked] == [130.0, -1]
    assert cluster.nobody_records()


@pytest.mark.parametrize("error", [DaemonUnreachable("gone"), NotFound("nothing is recorded for this client")])
async def test_a_daemon_that_goes_away_in_the_middle_is_told(autojump_clock: MockClock, error: FsError) -> None:
    cluster, client = Cluster(), Client()

    async def goes(request: Trace) -> None:
        if request.after >= 3:
            raise error

    cluster.all[0].answer = goes
    client.end.set()
    await telling.trace(cluster.session, 100.0, client.end.wait, client.send)
    assert client.troubles() == {0: str(error)}
    assert client.served(0) == cluster.all[0].spans[1:3], "what was there is kept"
    assert client.served(1) == cluster.all[1].spans[1:]
    assert cluster.nobody_records()


async def test_a_daemon_that_falls_silent_is_told(autojump_clock: MockClock) -> None:
    cluster, client = Cluster(), Client()

    async def falls_silent(request: Trace) -> None:
        if request.seconds == 0:
            await trio.sleep_forever()

    cluster.all[1].answer = falls_silent
    client.end.set()
    await telling.trace(cluster.session, 100.0, client.end.wait, client.send)
    assert client.troubles() == {1: "did not answer in 2 s"}
    assert cluster.nobody_records()


@pytest.mark.parametrize("parts", range(7))
async def test_a_client_that_goes_ends_the_recording_everywhere(autojump_clock: MockClock, parts: int) -> None:
    cluster, client = Cluster(), Client()

    async def send(part: TracePart) -> None:
        if len(client.parts) == parts:
            raise trio.BrokenResourceError
        await client.send(part)
        if part.recording:
            do(recording.recorder, 1)

    client.end.set()
    with pytest.raises(trio.BrokenResourceError):
        await telling.trace(cluster.session, 100.0, client.end.wait, send)
    assert cluster.nobody_records() and len(client.parts) == parts
    assert all(daemon.asked[-1].seconds < 0 for daemon in cluster.all)


@pytest.mark.parametrize("at", ["beginning", "recording", "fetching"])
async def test_a_mount_that_leaves_ends_the_recording_everywhere(autojump_clock: MockClock, at: str) -> None:
    cluster, client = Cluster(), Client()

    async def waits(request: Trace) -> None:
        if (at == "beginning" and request.seconds > 0) or (at == "fetching" and request.seconds == 0):
            await trio.sleep(1.0)

    cluster.all[0].answer = waits
    if at == "fetching":
        client.end.set()
    with trio.move_on_after(0.5) as scope:
        await telling.trace(cluster.session, 100.0, client.end.wait, client.send)
    assert scope.cancelled_caught and cluster.nobody_records()


def test_the_longest_line_can_be_read() -> None:
    recorder = Recorder()
    for _ in range(telling.PAGE):
        operation = recorder.begin_operation("copy_file_range", LONGEST, LONGEST)
        operation.number = operation.started_ns = LONGEST
        operation.stages.extend([Stage("wait for the file's order", LONGEST, LONGEST)] * STAGES_MAX)
        recorder.end_operation(operation, 0)
    report = control.Report(False, 0, 0, 0, 0, trace=TracePart(operations=tuple(recorder.operations)))
    assert len(msgspec.json.encode(report)) < control._LINE_MAX
