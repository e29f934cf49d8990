"""Timelines: parts that add up to the whole, who is blamed for which moment, clocks of other hosts, and stalls."""

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse.observe import spans
from benchfs_fuse.observe.spans import Operation, Request, Served, Stage
from benchfs_fuse.observe.timeline import (
    ANSWER,
    DAEMON,
    DAEMON_QUEUE,
    HANDLER,
    KERNEL_QUEUE,
    MOUNT_WAIT,
    REPLY,
    SEND,
    STALL_COUNT,
    UNRECORDED,
    WAKE_UP,
    WIRE_BACK,
    WIRE_OUT,
    KernelTimes,
    Part,
    Traced,
    clock_offset,
    join,
    stalls,
)

US = 1000
MS = 1000 * US
#: A time of day, as it were: clocks do not begin at 0.
T = 5_000_000 * MS


def operation(start: int, end: int, *stages: Stage, number: int = 1, received: int | None = None) -> Operation:
    """Make an operation; times in µs from T on."""
    received_ns = 0 if received is None else T + received * US
    return Operation(number, "read", 2 * number, received_ns, T + start * US, T + end * US, 0, list(stages))


def stage(name: str, start: int, end: int) -> Stage:
    return Stage(name, T + start * US, T + end * US)


def request(start: int, end: int, *, of: int = 1, daemon: int = 0, number: int = 1, margin: int = 1) -> Request:
    """Make a request that is sent ``margin`` after its beginning and answered as long before its end."""
    return Request(of, daemon, number, 9, *(T + at * US for at in (start, start + margin, end - margin, end)))


def served_at(times_ns: Sequence[int], number: int, stages: list[Stage]) -> Served:
    """Make a served request of the times at which it was received, begun, done, and its reply out."""
    received_ns, started_ns, done_ns, ended_ns = times_ns
    return Served(7, number, 9, received_ns, started_ns, done_ns, ended_ns, stages)


def served(start: int, end: int, *stages: Stage, number: int = 1, margin: int = 1) -> Served:
    times = [T + at * US for at in (start, start + margin, end - margin, end)]
    return served_at(times, number, list(stages))


def told(parts: Iterable[Part]) -> list[tuple[str, int]]:
    """Return stages and lengths in µs."""
    return [(part.stage, (part.ended_ns - part.started_ns) // US) for part in parts]


def traced_one(
    one: Operation,
    requests: Sequence[Request] = (),
    spans_of: dict[int, list[Served]] | None = None,
    kernel: KernelTimes | None = None,
) -> Traced:
    timelines = join([one], requests, spans_of or {}, {one.unique: kernel} if kernel else {})
    (traced,) = timelines.operations
    return traced


# ── the parts add up ─────────────────────────────────────────────────────────────────────────────────────────────────

moments = st.integers(0, 60)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[int, int]:
    start = draw(moments)
    return start, start + draw(st.integers(0, 30))


@st.composite
def stages(draw: st.DrawFn) -> list[Stage]:
    names = st.sampled_from([spans.STORE, spans.SUBMIT, spans.ROOM])
    return [stage(draw(names), *draw(intervals())) for _ in range(draw(st.integers(0, 4)))]


@st.composite
def anything(draw: st.DrawFn) -> tuple[list[Operation], list[Request], dict[int, list[Served]], dict[int, KernelTimes]]:
    """Draw spans with hardly any sense in them: whatever is lost, late or clipped, the sums have to be right."""
    operations: list[Operation] = []
    requests: list[Request] = []
    served_by: dict[int, list[Served]] = {0: [], 1: []}
    kernel: dict[int, KernelTimes] = {}
    for number in range(1, draw(st.integers(1, 3)) + 1):
        start, end = draw(intervals())
        received = draw(st.none() | moments)
        operations.append(operation(start, end, *draw(stages()), number=number, received=received))
        if draw(st.booleans()):
            kernel[2 * number] = KernelTimes(T + draw(moments) * US, T + draw(moments) * US)
    for _ in range(draw(st.integers(0, 8))):
        start, end = draw(intervals())
        daemon, number = draw(st.integers(0, 1)), draw(st.integers(1, 3))
        middle = sorted(draw(st.lists(st.integers(start, end), min_size=2, max_size=2)))
        sent, answered = (T + at * US for at in middle)
        answered = draw(st.sampled_from([answered, 0]))
        of = draw(st.integers(0, 4))
        requests.append(Request(of, daemon, number, 9, T + start * US, sent, answered, T + end * US))
        if draw(st.booleans()):
            times = sorted(draw(st.lists(moments, min_size=4, max_size=4)))
            served_by[daemon].append(served_at([T + at * US for at in times], number, draw(stages())))
    return operations, requests, served_by, kernel


def adds_up(parts: Sequence[Part], started_ns: int, ended_ns: int) -> bool:
    """Tell whether parts follow each other without a gap, from one moment to another."""
    return (
        (parts[0].started_ns, parts[-1].ended_ns) == (started_ns, ended_ns)
        and all(one.ended_ns == other.started_ns for one, other in pairwise(parts))
        and (all(part.started_ns < part.ended_ns for part in parts) or started_ns == ended_ns)
    )


@given(anything())
def test_parts_add_up_to_the_whole_whatever_was_recorded(
    found: tuple[list[Operation], list[Request], dict[int, list[Served]], dict[int, KernelTimes]],
) -> None:
    operations, requests, served_by, kernel = found
    timelines = join(operations, requests, served_by, kernel)
    assert sorted(one.operation.number for one in timelines.operations) == [one.number for one in operations]
    for traced in timelines.operations:
        own = traced.operation
        received = own.received_ns if 0 < own.received_ns <= own.started_ns else own.started_ns
        times = kernel.get(own.unique)
        started_ns, ended_ns = received, own.ended_ns
        if traced.whole:
            assert times is not None
            started_ns, ended_ns = times.queued_ns, times.answered_ns
            assert started_ns <= received and own.started_ns <= ended_ns
        assert adds_up(traced.parts, started_ns, ended_ns)
        assert traced.total_ns == sum(part.ended_ns - part.started_ns for part in traced.parts) == ended_ns - started_ns
        for exchange in traced.exchanges:
            assert exchange.request.operation == own.number
    exchanges = [one for traced in timelines.operations for one in traced.exchanges] + list(timelines.behind)
    assert sorted(map(id, requests)) == sorted(id(one.request) for one in exchanges), "each request is told once"
    answers = [one.served for one in exchanges if one.served is not None]
    assert len(set(map(id, answers))) == len(answers), "each answer is told once"
    for one in exchanges:
        if one.request.ended_ns > one.request.started_ns:
            assert adds_up(one.parts, one.request.started_ns, one.request.ended_ns)


def test_every_stage_of_one_operation_in_its_order() -> None:
    traced = traced_one(
        operation(10, 100, stage(spans.ORDER, 12, 15), received=8),
        [request(20, 80, margin=5)],
        {0: [served(30, 70, stage(spans.STORE, 40, 50), stage(spans.SUBMIT, 52, 55), margin=3)]},
        KernelTimes(T, T + 110 * US),
    )
    assert traced.whole and traced.total_ns == 110 * US
    assert told(traced.parts) == [
        (KERNEL_QUEUE, 8),
        (MOUNT_WAIT, 2),
        (HANDLER, 2),
        (spans.ORDER, 3),
        (HANDLER, 5),
        (SEND, 5),
        (WIRE_OUT, 5),
        (DAEMON_QUEUE, 3),
        (DAEMON, 7),
        (spans.STORE, 10),
        (DAEMON, 2),
        (spans.SUBMIT, 3),
        (DAEMON, 12),
        (REPLY, 3),
        (WIRE_BACK, 5),
        (WAKE_UP, 5),
        (HANDLER, 20),
        (ANSWER, 10),
    ]
    assert {part.daemon for part in traced.parts if part.stage in (SEND, DAEMON, spans.STORE, WAKE_UP)} == {0}


def test_without_the_kernel_and_without_the_daemon() -> None:
    traced = traced_one(operation(10, 100), [request(20, 80)])
    assert not traced.whole
    assert told(traced.parts) == [(HANDLER, 10), (SEND, 1), (UNRECORDED, 58), (WAKE_UP, 1), (HANDLER, 20)]


def test_an_operation_that_takes_no_time() -> None:
    traced = traced_one(operation(10, 10))
    assert told(traced.parts) == [(HANDLER, 0)] and traced.total_ns == 0


def test_an_answer_that_is_out_before_the_handler_ends_is_the_end() -> None:
    # The companion library's requests are answered from within; and the kernel's times are whole microseconds.
    traced = traced_one(operation(10, 100, stage(spans.ORDER, 50, 90)), (), None, KernelTimes(T + 5 * US, T + 95 * US))
    assert traced.whole
    assert told(traced.parts) == [(KERNEL_QUEUE, 5), (HANDLER, 40), (spans.ORDER, 40), (HANDLER, 5)]


# ── who is blamed ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_parallel_requests_the_last_one_gets_the_time() -> None:
    requests = [request(10, 40, daemon=0), request(12, 90, daemon=1, number=2), request(11, 50, daemon=2)]
    traced = traced_one(operation(0, 100), requests)
    assert [(part.stage, part.daemon) for part in traced.parts] == [
        (HANDLER, -1),
        (SEND, 0),  # they are sent one after the other
        (SEND, 2),
        *((name, 1) for name in (SEND, UNRECORDED, WAKE_UP)),
        (HANDLER, -1),
    ]
    assert [length for _, length in told(traced.parts)] == [10, 1, 1, 1, 76, 1, 10]


def test_rounds_of_parallel_requests_follow_each_other() -> None:
    requests = [
        request(10, 20, daemon=0, number=1),
        request(10, 30, daemon=1, number=2),
        request(30, 70, daemon=0, number=3),
        request(31, 60, daemon=1, number=4),
    ]
    traced = traced_one(operation(0, 80), requests)
    assert [(part.stage, part.daemon) for part in traced.parts if part.stage == UNRECORDED] == [
        (UNRECORDED, 1),
        (UNRECORDED, 0),
    ]
    assert told(traced.parts)[0] == told(traced.parts)[-1] == (HANDLER, 10)


def test_nested_stages_count_as_the_outer_one() -> None:
    nested = [stage(spans.COMPLETE, 40, 50), stage(spans.DISK, 35, 60), stage(spans.STORE, 60, 65)]
    traced = traced_one(operation(10, 100), [request(20, 80)], {0: [served(30, 70, *nested)]})
    assert [one for one in told(traced.parts) if one[0] in (spans.COMPLETE, spans.DISK, spans.STORE)] == [
        (spans.DISK, 25),
        (spans.STORE, 5),
    ]


def test_stages_that_overlap_share_the_time() -> None:
    overlapping = [stage(spans.STORE, 35, 50), stage(spans.DISK, 40, 60)]
    traced = traced_one(operation(10, 100), [request(20, 80)], {0: [served(30, 70, *overlapping)]})
    assert [one for one in told(traced.parts) if one[0] in (spans.STORE, spans.DISK)] == [
        (spans.STORE, 15),
        (spans.DISK, 10),
    ]


def test_what_a_daemon_does_behind_its_answer_is_not_part_of_it() -> None:
    behind = [stage(spans.STORE, 68, 75), stage(spans.STORE, 76, 200)]
    traced = traced_one(operation(10, 100), [request(20, 90)], {0: [served(30, 70, *behind)]})
    assert told(traced.parts)[-4:] == [(REPLY, 1), (WIRE_BACK, 19), (WAKE_UP, 1), (HANDLER, 10)]
    assert (spans.STORE, 1) in told(traced.parts)


def test_a_request_that_outlives_the_operation_had_nobody_wait_for_it() -> None:
    own, later = request(20, 40, number=1), request(15, 300, daemon=1, number=2)
    timelines = join([operation(10, 100, stage(spans.ORDER, 60, 400))], [own, later], {}, {})
    (traced,) = timelines.operations
    assert told(traced.parts) == [(HANDLER, 10), (SEND, 1), (UNRECORDED, 18), (WAKE_UP, 1), (HANDLER, 60)]
    assert [one.request for one in traced.exchanges] == [own]
    assert [one.request for one in timelines.behind] == [later]


def test_requests_of_nobody_and_of_unfinished_operations_lie_behind() -> None:
    nobodys, unfinished = request(20, 40, of=0), request(50, 60, of=99, number=2)
    timelines = join([operation(10, 100)], [nobodys, unfinished], {}, {})
    assert [one.request for one in timelines.behind] == [nobodys, unfinished]
    assert told(timelines.operations[0].parts) == [(HANDLER, 90)]


def test_a_very_large_operation_is_no_trouble() -> None:
    requests = [request(10 * n, 10 * n + 15, number=n, daemon=n % 2) for n in range(20_000)]
    traced = traced_one(operation(0, 300_000), requests)
    assert adds_up(traced.parts, traced.operation.started_ns, traced.operation.ended_ns)


# ── clocks and numbers ───────────────────────────────────────────────────────────────────────────────────────────────


def moved(span: Served, by_ns: int) -> Served:
    times = (span.received_ns, span.started_ns, span.done_ns, span.ended_ns)
    shifted = [Stage(one.name, one.started_ns + by_ns, one.ended_ns + by_ns) for one in span.stages]
    return served_at([at + by_ns for at in times], span.number, shifted)


@pytest.mark.parametrize("ahead_ns", [-3_600_000 * MS, -700 * MS, -3 * MS, 0, 3 * MS, 700 * MS, 3_600_000 * MS])
def test_clocks_of_other_hosts_are_aligned(ahead_ns: int) -> None:
    generator = random.Random(1)
    requests, there, right = [], [], []
    for number in range(100):
        start = number * 1000
        out, back = generator.randrange(30, 300), generator.randrange(30, 300)
        requests.append(request(start, start + out + 100 + back, number=number))
        span = served(
            start + out, start + out + 100, stage(spans.STORE, start + out + 10, start + out + 40), number=number
        )
        right.append(span)
        there.append(moved(span, ahead_ns))
    timelines = join([], requests, {0: there}, {})
    assert abs(timelines.offsets[0] - ahead_ns) < 100 * US
    assert (timelines.offsets[0] == 0) == (ahead_ns == 0)
    for exchange, span in zip(timelines.behind, right, strict=True):
        assert exchange.served is not None
        assert abs(exchange.served.received_ns - span.received_ns) < 100 * US
        assert exchange.served.stages[0].ended_ns - exchange.served.stages[0].started_ns == 30 * US


def test_on_one_host_the_clock_is_the_same_however_late_things_are_noted() -> None:
    # The daemon notes that its reply is out when the mount has long had it; the mount that its request was sent, when
    # the daemon has long received it.
    late = served_at([T + at * US for at in (30, 31, 70, 3000)], 1, [])
    tardy = Request(1, 0, 2, 9, T + 20 * US, T + 2000 * US, T + 2001 * US, T + 2002 * US)
    pairs = [(request(20, 75), late), (tardy, served(30, 80, number=2))]
    assert clock_offset(pairs) == 0
    assert clock_offset([]) == clock_offset([(request(20, 75), None)]) == 0
    traced = traced_one(operation(10, 100), [request(20, 75)], {0: [late]})
    assert told(traced.parts)[-3:] == [(REPLY, 4), (WAKE_UP, 1), (HANDLER, 25)]
    tardily = Request(1, 0, 2, 9, T + 20 * US, T + 65 * US, T + 80 * US, T + 81 * US)
    traced = traced_one(operation(10, 100), [tardily], {0: [served(30, 70, number=2, margin=5)]})
    assert told(traced.parts)[1:5] == [(SEND, 10), (DAEMON_QUEUE, 5), (DAEMON, 30), (REPLY, 5)]


def test_numbers_come_again_after_a_reconnection() -> None:
    # The daemon kept nothing of the first one, whose connection ended before there was a reply.
    lost = Request(1, 0, 5, 9, T, T + US, T + 9 * US, T + 10 * US)
    again = request(1000, 1100, number=5)
    last = request(2000, 2100, number=5)
    others = [request(3000 + 100 * n, 3080 + 100 * n, number=10 + n) for n in range(5)]
    ahead_ns = 10_000 * MS
    there = [served(1020, 1080, number=5), served(2020, 2080, number=5)]
    there += [served(3020 + 100 * n, 3060 + 100 * n, number=10 + n) for n in range(5)]
    for by_ns in (0, ahead_ns):
        timelines = join([], [lost, again, last, *others], {0: [moved(span, by_ns) for span in there]}, {})
        found = {one.request.started_ns: one.served and one.served.received_ns for one in timelines.behind}
        assert found[lost.started_ns] is None
        assert found[again.started_ns] == pytest.approx(T + 1020 * US, abs=50 * US)
        assert found[last.started_ns] == pytest.approx(T + 2020 * US, abs=50 * US)


def test_requests_that_the_mount_did_not_record_are_passed_over() -> None:
    timelines = join(
        [], [request(1000, 1100, number=5)], {0: [served(20, 80, number=5), served(1020, 1080, number=5)]}, {}
    )
    (one,) = timelines.behind
    assert one.served is not None and one.served.received_ns == T + 1020 * US


# ── stalls ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def parts_of(stage_name: str, durations_ns: Iterable[float], daemon: int = 0) -> list[Part]:
    return [Part(stage_name, T, T + round(duration_ns), daemon) for duration_ns in durations_ns]


@pytest.mark.parametrize(
    "work_ms",
    [
        pytest.param([0.01 * n for n in range(1, 100)], id="short work"),
        pytest.param([1 + 0.35 * n for n in range(200)], id="work spread from 1 to 71 ms"),
        pytest.param(
            [2 + 0.0001 * n for n in range(40)] + [5.0 + 0.5 * n for n in range(30)], id="work of one kind too"
        ),
    ],
)
def test_a_timer_of_50_ms_among_real_work_is_found(work_ms: list[float]) -> None:
    generator = random.Random(2)
    waits: list[float] = [50 * MS + generator.randrange(300) * US for _ in range(20)]
    parts = parts_of(WIRE_OUT, [one * MS for one in work_ms] + waits)
    generator.shuffle(parts)
    worst = stalls(parts)[0]
    assert (worst.stage, worst.daemon) == (WIRE_OUT, 0)
    assert 20 <= worst.waits <= 24 and worst.length_ns == pytest.approx(50.15 * MS, rel=0.02)
    assert worst.spread_ns <= 0.02 * 51 * MS


def spread_out(seed: int) -> dict[str, list[float]]:
    """Make durations in ns as work has them."""
    generator = random.Random(seed)
    return {
        "evenly spread": [generator.uniform(1, 100) * MS for _ in range(400)],
        "disk": [generator.lognormvariate(1.5, 0.4) * MS for _ in range(400)],
        "a narrow bell": [generator.gauss(5, 0.4) * MS for _ in range(400)],
        "waking up": [generator.expovariate(1 / 0.1) * MS for _ in range(200_000)],
        "waking up late": [generator.expovariate(1 / 0.5) * MS for _ in range(20_000)],
        "four of the same": [50 * MS] * (STALL_COUNT - 1),
        "many short ones of the same": [0.5 * MS] * 1000,
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", list(spread_out(0)))
def test_work_is_no_stall(name: str, seed: int) -> None:
    assert stalls(parts_of(DAEMON, spread_out(seed)[name])) == []


def test_stages_and_daemons_are_told_apart() -> None:
    parts = parts_of(WIRE_OUT, [40 * MS] * 6, daemon=0) + parts_of(WIRE_OUT, [40 * MS] * 4, daemon=1)
    parts += parts_of(spans.STORE, [5 * MS] * 7) + parts_of(spans.STORE, [200 * MS] * 5)
    assert [(one.stage, one.daemon, one.waits, one.length_ns) for one in stalls(parts)] == [
        (spans.STORE, 0, 5, 200 * MS),
        (WIRE_OUT, 0, 6, 40 * MS),
        (spans.STORE, 0, 7, 5 * MS),
    ]
    assert stalls([]) == []
