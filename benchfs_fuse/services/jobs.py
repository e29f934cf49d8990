"""Run what goes on behind the replies of a daemon, and know when nothing of it is left."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ..errors import FsError

_log = logging.getLogger(__name__)

#: Seconds between tries of what failed behind the reply: a full or broken disk is asked again, and the log says so.
RETRY_S = 1.0


class Jobs:
    """Start tasks from synchronous code; they run while ``run`` does. Those started before wait for it."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None
        self._queued: list[tuple[Callable[..., Awaitable[None]], tuple[Any, ...]]] = []
        self._count = 0
        self._idle = trio.Event()
        self._idle.set()

    def start(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run ``function(*args)`` as a task of its own. It must not raise."""
        if self._count == 0:
            self._idle = trio.Event()
        self._count += 1
        if self._nursery is None:
            self._queued.append((function, args))
        else:
            self._nursery.start_soon(self._one, function, args)

    async def _one(self, function: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
        try:
            await function(*args)
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until cancelled. What is cancelled is finished after the next start, from the store."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            queued, self._queued = self._queued, []
            for function, args in queued:
                nursery.start_soon(self._one, function, args)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def wait_idle(self) -> None:
        """Wait until nothing is under way."""
        while self._count:
            await self._idle.wait()


async def persist(what: str, attempt: Callable[[], Awaitable[object]]) -> None:
    """Call ``attempt`` until it does not fail any more; every failure is logged as ``what``."""
    while True:
        try:
            await attempt()
            return
        except FsError as error:
            _log.warning("%s failed, trying again: %s: %s", what, type(error).__name__, error)
            await trio.sleep(RETRY_S)
