"""Handlers that are begun by hand: answered at once where they wait for nothing, else taken up where they stand."""

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from pyfuse3 import FUSEError

from benchfs_fuse import errors
from benchfs_fuse.at_once import AtOnce
from benchfs_fuse.companion import LATER
from benchfs_fuse.fuse import WAITS, Begun, BenchfsOperations, begin, guarded, step
from benchfs_fuse.observe import recording
from benchfs_fuse.observe.statistics import Statistics
from benchfs_fuse.ports import Reply
from benchfs_fuse.services.deadline import Deadline, Parked, before_waiting, may_park
from benchfs_fuse.services.parallel import all_of, each

TIMEOUT_S = 30.0


class Operations:
    """Be as much of the operations as begun handlers need. ``event`` is what they wait for."""

    timeout_s = TIMEOUT_S

    def __init__(self) -> None:
        self.statistics = Statistics()
        self.begun: Begun | None = None
        self.unique = 2
        self.event = trio.Event()
        self.steps: list[str] = []

    def asked(self) -> tuple[int, int]:
        return self.unique, 1

    @guarded
    async def work(self, wait: Callable[["Operations"], Awaitable[object]], *failure: Exception) -> str:
        self.steps.append("begins")
        await wait(self)
        self.steps.append("ends")
        for error in failure:
            raise error
        return "result"


async def nothing(operations: Operations) -> None:
    """Wait for nothing, in a handler's coroutine."""


async def plainly(operations: Operations) -> None:
    await operations.event.wait()


async def often(operations: Operations) -> None:
    for _ in range(3):
        await trio.lowlevel.checkpoint()
    await operations.event.wait()


async def within_a_nursery(operations: Operations) -> None:
    await each(lambda _: operations.event.wait(), (1, 2))


async def within_a_nursery_for_all(operations: Operations) -> None:
    await all_of(lambda _: operations.event.wait(), (1, 2))


async def within_a_scope(operations: Operations) -> None:
    before_waiting()
    with trio.move_on_after(10 * TIMEOUT_S):
        await operations.event.wait()


async def behind_a_scope(operations: Operations) -> None:
    before_waiting()
    with trio.move_on_after(1):
        await trio.lowlevel.checkpoint()
    await operations.event.wait()


WAYS = [plainly, often, within_a_nursery, within_a_nursery_for_all, within_a_scope, behind_a_scope]


def begun_by_hand(operations: Operations, *arguments: Any) -> tuple[int, Any]:
    """Do what the companion library has done with a request."""
    handler = begin(cast(BenchfsOperations, operations), Operations.work, *arguments)
    error, result = step(handler)
    if error == WAITS:
        operations.begun = Begun(operations.unique, handler, result)
    return error, result


async def serve(operations: Operations, *arguments: Any) -> str:
    """Do what the companion library and pyfuse3 do with one request, in one task and without a pause between them."""
    error, result = begun_by_hand(operations, *arguments)
    if error == WAITS:
        return await operations.work(*arguments)
    if error:
        raise FUSEError(error)
    assert isinstance(result, str)
    return result


async def set_when_all_wait(operations: Operations) -> None:
    await trio.testing.wait_all_tasks_blocked()
    operations.steps.append("the other")
    operations.event.set()


async def test_what_waits_for_nothing_has_its_result_at_once() -> None:
    operations = Operations()
    assert begun_by_hand(operations, nothing) == (0, "result")
    assert operations.begun is None and Deadline.pending is None
    assert operations.statistics.count("work") == 1


async def test_what_fails_at_once_has_its_errno() -> None:
    operations = Operations()
    assert begun_by_hand(operations, nothing, errors.NoSpace("x")) == (
        errno.ENOSPC,
        None,
    )
    assert operations.begun is None and Deadline.pending is None
    assert operations.statistics.count("work") == 1


@pytest.mark.parametrize("wait", WAYS)
async def test_what_waits_is_taken_up_where_it_stands(wait: Callable[[Operations], Awaitable[None]]) -> None:
    operations = Operations()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(set_when_all_wait, operations)
        assert await serve(operations, wait) == "result"
    assert operations.steps == ["begins", "the other", "ends"]
    assert operations.statistics.count("work") == 1


@pytest.mark.parametrize("wait", WAYS)
async def test_who_waits_too_long_meets_the_deadline(
    wait: Callable[[Operations], Awaitable[None]], autojump_clock: trio.testing.MockClock
) -> None:
    operations = Operations()
    began_s = trio.current_time()
    with pytest.raises(FUSEError) as raised:
        await serve(operations, wait)
    assert raised.value.errno == errors.DaemonUnreachable.errno
    assert trio.current_time() - began_s == pytest.approx(TIMEOUT_S)
    assert await serve(operations, nothing) == "result"  # nothing of the scopes is left in this task


@pytest.mark.parametrize("wait", WAYS)
async def test_who_is_cancelled_while_he_waits_leaves(wait: Callable[[Operations], Awaitable[None]]) -> None:
    operations = Operations()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:

            @nursery.start_soon
            async def other() -> None:
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()

            await serve(operations, wait)
    assert scope.cancelled_caught and operations.steps == ["begins"]
    assert operations.statistics.count("work") == 1


async def test_an_error_behind_a_wait_has_its_errno() -> None:
    operations = Operations()
    operations.event.set()
    with pytest.raises(FUSEError) as raised:
        await serve(operations, often, errors.NotFound("x"))
    assert raised.value.errno == errno.ENOENT


async def test_a_scope_that_was_opened_untold_costs_the_deadline_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def untold(operations: Operations) -> None:
        with trio.CancelScope():
            await trio.lowlevel.checkpoint()

    with caplog.at_level(logging.ERROR):
        assert await serve(Operations(), untold) == "result"
    assert "before the deadline of its operation" in caplog.text


async def test_pyfuse3_takes_up_no_handler_of_another_request() -> None:
    operations = Operations()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(set_when_all_wait, operations)
        assert begun_by_hand(operations, plainly)[0] == WAITS
        begun, operations.unique = operations.begun, 4
        with pytest.raises(AssertionError, match="whose handler was begun"):
            await operations.work(plainly)
        operations.begun, operations.unique = begun, 2
        assert await operations.work(plainly) == "result"


async def test_it_is_recorded_once_with_all_of_its_time() -> None:
    operations = Operations()
    recorder = recording.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, operations, plainly)
            await trio.testing.wait_all_tasks_blocked()
            operations.event.set()
        await serve(operations, nothing)
    finally:
        recording.stop()
    assert [(one.name, one.unique, one.error) for one in recorder.operations] == [("work", 2, 0), ("work", 2, 0)]
    assert all(one.started_ns <= one.ended_ns for one in recorder.operations)


# ── parked ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Answer:
    """Be a call under way whose reply comes when the test says so."""

    def __init__(self) -> None:
        self.there = trio.Event()

    def poll(self) -> bool:
        return self.there.is_set()

    def take(self) -> Reply | None:
        return Reply(0, b"answer") if self.poll() else None

    def __await__(self) -> Generator[Any, Any, Reply]:
        return self._wait().__await__()

    async def _wait(self) -> Reply:
        await self.there.wait()
        return Reply(0, b"answer")


class Companion:
    """Hand over requests one after the other as the library does, and keep their answers."""

    def __init__(self, at_once: Callable[[Any], AtOnce], operations: Operations) -> None:
        self.request = cast(Any, SimpleNamespace(unique=0, turn=0))
        self.waiting = 0
        self.answers: dict[int, int] = {}
        self.operations = operations
        self.at_once = at_once(self)

    def more(self) -> bool:
        return self.waiting > 0

    def reply(self, unique: int, answer: int) -> None:
        assert unique not in self.answers
        self.answers[unique] = answer

    def hand_over(self, waits: Sequence[Callable[[Operations], Awaitable[object]]]) -> list[int]:
        """Return what the hooks say of requests that all wait to be read."""
        said = []
        for number, wait in enumerate(waits):
            self.waiting = len(waits) - 1 - number
            self.request.unique = self.operations.unique = 2 * (number + 1)
            said.append(self.at_once._begin(Operations.work, (wait,), lambda result: 7))
        return said


async def ask(answer: Answer) -> None:
    """Wait for an answer as a link does."""
    if may_park():
        await Parked(answer)
    if answer.take() is None:
        before_waiting()
        with trio.move_on_after(10 * TIMEOUT_S):
            await answer


def asking(answer: Answer) -> Callable[[Operations], Awaitable[object]]:
    return lambda operations: ask(answer)


@pytest.fixture
async def companion() -> AsyncIterator[Companion]:
    operations = Operations()
    made = Companion(lambda it: AtOnce(it, cast(Any, operations), cast(Any, None), lambda: None), operations)
    ended = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.at_once.serve, ended.wait)
        yield made
        ended.set()
    Deadline.others_wait = staticmethod(lambda: False)


async def test_who_waits_for_an_answer_is_parked_while_others_are_to_be_begun(companion: Companion) -> None:
    first, second = Answer(), Answer()
    assert companion.hand_over([asking(first), asking(second), nothing]) == [LATER, LATER, 7]
    assert companion.operations.steps == ["begins", "begins", "begins", "ends"]
    assert companion.answers == {} and Deadline.pending is None
    first.there.set()
    second.there.set()
    await trio.testing.wait_all_tasks_blocked()
    assert companion.answers == {2: 7, 4: 7}
    assert companion.operations.statistics.count("work") == 3


async def test_who_is_parked_and_has_no_answer_by_then_waits_for_it(companion: Companion) -> None:
    late, there = Answer(), Answer()
    assert companion.hand_over([asking(late), asking(there), nothing]) == [LATER, LATER, 7]
    there.there.set()
    await trio.testing.wait_all_tasks_blocked()
    assert companion.answers == {4: 7}
    late.there.set()
    await trio.testing.wait_all_tasks_blocked()
    assert companion.answers == {4: 7, 2: 7}


async def test_who_waits_for_something_else_behind_his_answer_holds_nobody_up(companion: Companion) -> None:
    answers = [Answer() for _ in range(3)]

    async def then_the_event(operations: Operations) -> None:
        await ask(answers[0])
        await operations.event.wait()

    assert companion.hand_over([then_the_event, asking(answers[1]), asking(answers[2]), nothing]) == [LATER] * 3 + [7]
    for answer in answers:
        answer.there.set()
    await trio.testing.wait_all_tasks_blocked()
    assert companion.answers == {4: 7, 6: 7}
    companion.operations.event.set()
    await trio.testing.wait_all_tasks_blocked()
    assert companion.answers == {2: 7, 4: 7, 6: 7}


async def test_who_asks_twice_may_be_parked_twice(companion: Companion) -> None:
    one, two = Answer(), Answer()

    async def both(operations: Operations) -> None:
        await ask(one)
        await ask(two)

    assert companion.hand_over([both, nothing]) == [LATER, 7]
    one.there.set()
    companion.waiting = 1
    await trio.testing.wait_all_tasks_blocked()
    assert companion.answers == {}
    two.there.set()
    await trio.testing.wait_all_tasks_blocked()
    assert companion.answers == {2: 7}


async def test_an_error_of_who_was_parked_is_answered(companion: Companion) -> None:
    answer = Answer()

    async def failing(operations: Operations) -> None:
        await ask(answer)
        raise errors.NoSpace("x")

    assert companion.hand_over([failing, nothing]) == [LATER, 7]
    answer.there.set()
    await trio.testing.wait_all_tasks_blocked()
    assert companion.answers == {2: -errno.ENOSPC}


async def test_who_was_parked_meets_his_deadline(companion: Companion, autojump_clock: trio.testing.MockClock) -> None:
    assert companion.hand_over([asking(Answer()), asking(Answer()), nothing]) == [LATER, LATER, 7]
    await trio.sleep(TIMEOUT_S + 1)
    assert companion.answers == dict.fromkeys((2, 4), -errors.DaemonUnreachable.errno)


async def test_serving_ends_when_all_are_answered() -> None:
    operations, answer = Operations(), Answer()
    companion = Companion(lambda it: AtOnce(it, cast(Any, operations), cast(Any, None), lambda: None), operations)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(companion.at_once.serve, trio.lowlevel.checkpoint)
        assert companion.hand_over([asking(answer), nothing]) == [LATER, 7]
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        answer.there.set()
    assert companion.answers == {2: 7}


async def test_what_was_parked_is_recorded_as_what_it_is(companion: Companion) -> None:
    answers = [Answer(), Answer()]
    recorder = recording.start()
    try:
        assert companion.hand_over([asking(answer) for answer in answers] + [nothing]) == [LATER, LATER, 7]
        for answer in answers:
            answer.there.set()
        await trio.testing.wait_all_tasks_blocked()
    finally:
        recording.stop()
    assert sorted(one.unique for one in recorder.operations) == [2, 4, 6]
    assert recording.swap(None) is None
