"""Bound what an operation waits for, at no cost where it waits for nothing.

A cancel scope of trio's costs 5 to 7 µs, as much as a tenth of a small request, and most requests are answered without
having waited. So the scope of an operation that is begun by hand (``lazily``) is entered by ``before_waiting``: by
whoever is about to open a scope or a nursery of his own, which would have to lie within it, or when it waits at last.
"""

import logging
from collections.abc import Callable, Generator
from types import TracebackType
from typing import ClassVar

import trio

from ..observe import recording
from ..ports import Waiting

log = logging.getLogger(__name__)


class Deadline:
    """Bound a block, which is cancelled when its time is over; as trio.move_on_after, but see the module.

    The time is counted from where the scope is entered: what runs before waits for nothing.
    """

    #: That of what is being begun now and has not waited yet.
    pending: "ClassVar[Deadline | None]" = None
    #: Tells whether others wait to be begun; set by who begins by hand.
    others_wait: ClassVar[Callable[[], bool]] = staticmethod(lambda: False)

    def __init__(self, seconds: float, *, lazily: bool) -> None:
        self._seconds = seconds
        self._lazily = lazily
        self._scope: trio.CancelScope | None = None
        self._status = _scopes_now() if lazily else None

    def __enter__(self) -> None:
        """Begin. What begins ``lazily`` must not be awaited before ``before_waiting`` was called, or it has ended."""
        if self._lazily:
            assert Deadline.pending is None, "one operation at a time is begun by hand"
            Deadline.pending = self
        else:
            self.enter()

    def enter(self) -> None:
        """Enter the scope, unless somebody has opened another one without saying so: that one would end first."""
        if self._lazily and _scopes_now() is not self._status:
            log.error("a scope was opened before the deadline of its operation", stack_info=True)
            return
        self._scope = trio.move_on_after(self._seconds)
        self._scope.__enter__()

    def move_here(self) -> None:
        """Be that of what runs now, in another task than before. The scope was not entered yet."""
        assert Deadline.pending is None and self._scope is None
        self._status = _scopes_now()
        Deadline.pending = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """End. The cancellation by the deadline goes no further."""
        if Deadline.pending is self:
            Deadline.pending = None
        return bool(self._scope is not None and self._scope.__exit__(kind, error, traceback))


class Parked:
    """Say, as what a coroutine yields, that an operation begun by hand waits for an answer, and for nothing else yet.

    Nothing of the task in whose step it was begun has a part in it then: any other may take it up, by ``take_up`` and
    then a step of ``handler``.
    """

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self._deadline, Deadline.pending = Deadline.pending, None
        self._span = recording.swap(None)

    def __await__(self) -> Generator["Parked", None, None]:
        """Wait until somebody takes it up."""
        yield self

    def poll(self) -> bool:
        """Look for the answer for as long as that may be worth it; tell whether it is there."""
        return self._waiting.poll()

    def take_up(self) -> None:
        """Have the operation go on in the step of the task that runs now."""
        assert self._deadline is not None
        self._deadline.move_here()
        recording.swap(self._span)


def may_park() -> bool:
    """Tell whether an operation is begun by hand, beside which others wait to be begun."""
    return Deadline.pending is not None and Deadline.others_wait()


def before_waiting() -> None:
    """Enter the scope of the operation that is being begun, if there is one: something is to be waited for."""
    deadline, Deadline.pending = Deadline.pending, None
    if deadline is not None:
        deadline.enter()


def _scopes_now() -> object:
    """Return what is another object if another scope is open. It is trio's own; without it, nothing is checked."""
    return getattr(trio.lowlevel.current_task(), "_cancel_status", None)
