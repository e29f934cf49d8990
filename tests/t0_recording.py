"""What hooks leave behind: nothing while nobody records, a bounded number of spans while somebody does."""

import contextvars
import time
from collections.abc import Iterator

import pytest

from benchfs_fuse.limits import STAGES_MAX
from benchfs_fuse.observe import recording, spans
from benchfs_fuse.observe.spans import Stage


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    assert recording.recorder is None
    yield
    recording.stop()


def test_hooks_do_nothing_while_nobody_records() -> None:
    assert recording.now() == 0
    recording.note(spans.STORE, 0)
    recording.note(spans.STORE, 5)
    assert recording.stop() is None


def test_stages_and_requests_belong_to_what_the_task_does() -> None:
    recorder = recording.start()
    before = time.perf_counter_ns()
    recorder.add_request(0, 1, 9, before, before, before)  # nobody's
    operation = recorder.begin_operation("read", 42, before)
    started_ns = recording.now()
    recorder.add_request(1, 2, 9, started_ns, started_ns, 0)
    recording.note(spans.ROOM, started_ns)
    recorder.end_operation(operation, 5)
    recording.note(spans.ORDER, started_ns)
    recorder.add_request(2, 3, 9, before, before, before)
    assert recording.stop() is recorder
    assert [(one.operation, one.daemon) for one in recorder.requests] == [(0, 0), (operation.number, 1), (0, 2)]
    assert [one.name for one in operation.stages] == [spans.ROOM]
    assert before <= operation.started_ns <= operation.stages[0].started_ns <= operation.stages[0].ended_ns
    assert operation.stages[0].ended_ns <= operation.ended_ns <= time.perf_counter_ns()
    assert recorder.operations == [operation] and operation.error == 5


def test_what_a_daemon_asks_of_others_is_a_stage_of_what_it_serves() -> None:
    recorder = recording.start()
    operation = recorder.begin_operation("read", 42, 0)
    served = recorder.receive(7, 3, 9)
    token = recorder.begin_served(served)
    recording.note(spans.STORE, recording.now())
    recorder.add_request(1, 2, 9, recording.now(), recording.now(), 0)
    recorder.leave_served(token)
    recording.note(spans.ROOM, recording.now())
    recorder.end_served(served)
    recorder.end_operation(operation, 0)
    assert [one.name for one in served.stages] == [spans.STORE, spans.PEERS]
    assert [one.name for one in operation.stages] == [spans.ROOM]
    assert recorder.requests == [] and recorder.served == [served]
    assert served.received_ns <= served.started_ns <= served.ended_ns


def test_memory_is_bounded_and_what_is_left_out_is_counted() -> None:
    recorder = recording.start(spans_max=3)
    for number in range(5):
        operation = recorder.begin_operation("read", number, 0)
        for _ in range(STAGES_MAX + 10):
            recording.note(spans.ROOM, recording.now())
        recorder.add_request(0, number, 9, 1, 1, 1)
        recorder.end_operation(operation, 0)
        recorder.end_served(recorder.receive(7, number, 9))
    assert [len(kept) for kept in (recorder.operations, recorder.requests, recorder.served)] == [3, 3, 3]
    assert recorder.lost == 6
    assert [len(one.stages) for one in recorder.operations] == [STAGES_MAX] * 3


def test_a_task_of_an_earlier_recording_is_not_taken_for_an_operation_of_this_one() -> None:
    earlier = recording.start()
    operation = earlier.begin_operation("write", 1, 0)
    left_behind = contextvars.copy_context()  # as a task has it that the operation started
    earlier.end_operation(operation, 0)
    recorder = recording.start()
    current = recorder.begin_operation("read", 2, 0)
    left_behind.run(recorder.add_request, 0, 1, 9, 1, 1, 1)
    recorder.end_operation(current, 0)
    (request,) = recorder.requests
    assert request.operation != current.number


def test_a_hook_that_began_before_the_recording_adds_nothing() -> None:
    started_ns = recording.now()
    recorder = recording.start()
    operation = recorder.begin_operation("read", 2, 0)
    recording.note(spans.ROOM, started_ns)
    assert operation.stages == []
    recording.note(spans.ROOM, recording.now())
    recording.stop()
    recording.note(spans.ORDER, 1)
    assert [type(one) for one in operation.stages] == [Stage]
