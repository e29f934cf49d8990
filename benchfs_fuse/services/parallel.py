"""Do the same for several things at once, with errors that come out by themselves and not in groups."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import islice
from typing import TypeVar

import trio

from .deadline import before_waiting

T = TypeVar("T")


async def each(function: Callable[[T], Awaitable[None]], items: Iterable[T]) -> None:
    """Call ``function`` with every item, all at once, and wait for all. The first error cancels the others."""
    todo = list(items)
    if len(todo) == 1:
        await function(todo[0])
        return
    first: Exception | None = None

    async def one(item: T) -> None:
        nonlocal first
        try:
            await function(item)
        except Exception as error:  # noqa: BLE001  raised below, where no nursery wraps it into a group
            first = first or error
            nursery.cancel_scope.cancel()

    before_waiting()
    async with trio.open_nursery() as nursery:
        for item in todo:
            nursery.start_soon(one, item)
    if first is not None:
        raise first


async def all_of(function: Callable[[T], Awaitable[None]], items: Iterable[T]) -> None:
    """Call ``function`` with every item, all at once, and wait for all to end; then raise the first error.

    For work that must not be broken off because something beside it failed.
    """
    todo = list(items)
    if len(todo) == 1:
        await function(todo[0])
        return
    first: Exception | None = None

    async def one(item: T) -> None:
        nonlocal first
        try:
            await function(item)
        except Exception as error:  # noqa: BLE001  raised below, when the others have ended
            first = first or error

    before_waiting()
    async with trio.open_nursery() as nursery:
        for item in todo:
            nursery.start_soon(one, item)
    if first is not None:
        raise first


async def some_at_once(function: Callable[[T], Awaitable[None]], items: Iterable[T], tasks_max: int) -> None:
    """Call ``function`` with every item, in their order, ``tasks_max`` at once.

    After an error no more are begun; when those under way have ended, the first one is raised.
    """
    todo = iter(items)
    errors: list[Exception] = []

    async def some(item: T | None) -> None:
        while item is not None and not errors:
            try:
                await function(item)
            except Exception as error:  # noqa: BLE001  raised below, when the others have ended
                errors.append(error)
            item = next(todo, None)

    before_waiting()
    async with trio.open_nursery() as nursery:
        for item in islice(todo, tasks_max):
            nursery.start_soon(some, item)
    if errors:
        raise errors[0]


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """Run tasks beside a block and cancel them at its end. What the block raises comes out by itself."""
    failure: Exception | None = None
    before_waiting()
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:  # noqa: BLE001  raised below, where no nursery wraps it into a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
