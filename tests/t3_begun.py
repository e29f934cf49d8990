"""Handlers that are begun by hand: answered at once where they wait for nothing, else taken up where they stand."""

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import trio
from pyfuse3 import FUSEError

from benchfs_fuse import errors
from benchfs_fuse.fuse import WAITS, Begun, BenchfsOperations, begin, guarded
from benchfs_fuse.observe import recording
from benchfs_fuse.observe.statistics import Statistics
from benchfs_fuse.services.deadline import Deadline, before_waiting
from benchfs_fuse.services.parallel import all_of, each

TIMEOUT_S = 30.0


class Operations:
    """Be as much of the operations as begun handlers need. ``event`` is what they wait for."""

    timeout_s = TIMEOUT_S

    def __init__(self) -> None:
        self.statistics = Statistics()
        self.begun: Begun | None = None
        self.by_hand = False
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


async def serve(operations: Operations, *arguments: Any) -> str:
    """Do what the companion library and pyfuse3 do with one request, in one task and without a pause between them."""
    error, result = begin(cast(BenchfsOperations, operations), Operations.work, *arguments)
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
    assert begin(cast(BenchfsOperations, operations), Operations.work, nothing) == (0, "result")
    assert operations.begun is None and Deadline.pending is None and not operations.by_hand
    assert operations.statistics.count("work") == 1


async def test_what_fails_at_once_has_its_errno() -> None:
    operations = Operations()
    assert begin(cast(BenchfsOperations, operations), Operations.work, nothing, errors.NoSpace("x")) == (
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
        assert begin(cast(BenchfsOperations, operations), Operations.work, plainly) == (WAITS, None)
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
