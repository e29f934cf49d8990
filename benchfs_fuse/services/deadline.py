"""Bound what an operation waits for, at no cost where it waits for nothing.

A cancel scope of trio's costs 5 to 7 µs, as much as a tenth of a small request, and most requests are answered without
having waited. So the scope of an operation that is begun by hand (``lazily``) is entered by ``before_waiting``: by
whoever is about to open a scope or a nursery of his own, which would have to lie within it, or when it waits at last.
"""

import logging
from types import TracebackType
from typing import ClassVar

import trio

log = logging.getLogger(__name__)


class Deadline:
    """Bound a block, which is cancelled when its time is over; as trio.move_on_after, but see the module.

    The time is counted from where the scope is entered: what runs before waits for nothing.
    """

    #: That of what is being begun now and has not waited yet.
    pending: "ClassVar[Deadline | None]" = None

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """End. The cancellation by the deadline goes no further."""
        if Deadline.pending is self:
            Deadline.pending = None
        return bool(self._scope is not None and self._scope.__exit__(kind, error, traceback))


def before_waiting() -> None:
    """Enter the scope of the operation that is being begun, if there is one: something is to be waited for."""
    deadline, Deadline.pending = Deadline.pending, None
    if deadline is not None:
        deadline.enter()


def _scopes_now() -> object:
    """Return what is another object if another scope is open. It is trio's own; without it, nothing is checked."""
    return getattr(trio.lowlevel.current_task(), "_cancel_status", None)
