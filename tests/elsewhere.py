"""Call functions in another process, which keeps the files that it opens.

A test that starts daemons must not have files of a mount open itself: a new process inherits them until it executes
its program, then they are closed, and a close of a file with accepted bytes waits for the daemons: for the very one
that was to be started.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

#: Seconds for any call: what waits for a daemon that is being started again takes a few.
DEADLINE_S = 60.0


class Elsewhere:
    """Be another process. A context manager: at its end the process goes, and what it had open is closed."""

    def __init__(self) -> None:
        self._executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        self.run(int)  # the process starts with its first call
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After a failure it may hang until its mount is taken away, which comes later.
        self._executor.shutdown(wait=error is None, cancel_futures=True)

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Begin a call; the arguments, the result and any exception travel by pickle."""
        return self._executor.submit(function, *args, **kwargs)

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function and return what it returns."""
        return self.start(function, *args, **kwargs).result(DEADLINE_S)
