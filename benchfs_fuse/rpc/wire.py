"""Carry the messages of one connection: start sends and receives, find what has come, say when it is time to sleep.

There are two of them, which do the same. ``_wire`` (``_wire.c``) works on UCX itself: from a message to the next look
for one there is no Python. ``PlainWire`` does it through ucxx, where there was no compiler. Who polls, for how long,
what a message means and what becomes of a failure is rpc/ucx's business.

Control messages land in ``count`` receives, which are posted in a ring. What a poll returns lies in their buffers until
the next poll: receives are posted anew when there is time, at a poll that finds nothing, or when half of them are
missing. So whoever has got his answer does not wait for that.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..compiled import Compiled
from ..errors import ProtocolError
from ..limits import BODY_MAX, INLINE_MAX, PAYLOAD_MAX
from ..ports import Buffer
from . import frames

log = logging.getLogger(__name__)

#: What is compiled of this module.
COMPILED = Compiled(Path(__file__).parent, "_wire", "_wire.c")


class Receive(Protocol):
    """Stand for one receive of a payload. Dropping it cancels it."""

    @property
    def completed(self) -> bool:
        """Tell whether it is over, one way or the other."""
        ...

    def check_error(self) -> None:
        """Raise ``Ucx.Error`` if it failed."""
        ...


class Wire(Protocol):
    """Carry messages. Made before the other end is known; ``attach`` begins. Errors are ``Ucx.Error``."""

    @property
    def unsent(self) -> int:
        """Return how many messages are not out yet."""
        ...

    @property
    def failed(self) -> bool:
        """Tell whether UCX has failed at something that was under way."""
        ...

    def attach(self, endpoint: Any) -> None:
        """Take ucxx's endpoint to the other end, and post the receives of control messages."""
        ...

    def send(self, data: Buffer, tag: int, release: Callable[[], None] | None) -> int:
        """Start sending; return the bytes. ``data`` is held until it is out; then, perhaps now, ``release`` is called.

        An error: nothing was sent, nobody is released.
        """
        ...

    def receive(self, into: Buffer, tag: int) -> Receive:
        """Post the receive of a payload. ``into`` is UCX's until it is over, or until the worker is destroyed."""
        ...

    def poll(self, patience_ns: int) -> list[frames.Frame] | None:
        """Let UCX work; return the control messages that have come, perhaps none though something was done.

        None: nothing has happened, for so many nanoseconds, in which the processor was yielded after each look.
        ProtocolError: what came is no control message. Calls the releases of what is out.
        """
        ...

    def arm(self) -> bool:
        """Have the worker's descriptor tell of what comes from now on; False: there is something for ``poll`` already.

        UCX tells of nothing twice: it is silent about what lies in a receive that ``poll`` has not come to so far.
        """
        ...

    def stray(self) -> int:
        """Return the length of a message that no receive waits for and that is no control message, -1 if none."""
        ...

    def cancel(self) -> None:
        """Cancel all receives. The worker is not used for anything new any more."""
        ...

    def release(self) -> list[Callable[[], None]]:
        """Give all buffers back, now that the worker is destroyed; return the releases that were not called."""
        ...


class PlainWire:
    """Implement Wire through ucxx.

    No request object of ucxx may outlive the worker, not even in a frame that a logged traceback keeps.
    """

    def __init__(self, ucx: Any, worker: Any, memory: memoryview, count: int, control_tag: int) -> None:
        self._ucx = ucx
        self._worker = worker
        self._endpoint: Any = None
        self._tag = ucx.Tag(control_tag)
        self._control_tag = control_tag
        self._any = (ucx.Tag(0), ucx.TagMask(0))
        size = len(memory) // count
        pieces = [memory[i * size :][:size] for i in range(count)]
        self._taken: list[tuple[memoryview, Any]] = [(piece, ucx.Array(piece)) for piece in pieces]
        self._posted: deque[tuple[memoryview, Any, Any]] = deque()
        self._taken_max = count // 2
        self._sends: list[tuple[Any, Any, Callable[[], None] | None]] = []
        #: What UCX works on until the worker is destroyed.
        self._held: list[Any] = []
        self._releases: list[Callable[[], None]] = []
        self.failed = False

    @property
    def unsent(self) -> int:
        """Return how many messages are not out yet."""
        return len(self._sends)

    def attach(self, endpoint: Any) -> None:
        """Take the endpoint and post the receives of control messages."""
        self._endpoint = endpoint
        self._post_taken()

    def send(self, data: Buffer, tag: int, release: Callable[[], None] | None) -> int:
        """Start sending."""
        array = self._ucx.Array(data)
        request = self._endpoint.tag_send(array, self._ucx.Tag(tag))
        if not request.completed:
            self._sends.append((request, array, release))
        else:
            request.check_error()
            del request
            if release is not None:
                release()
        length: int = array.nbytes
        return length

    def receive(self, into: Buffer, tag: int) -> Receive:
        """Post the receive of a payload."""
        receive: Receive = self._worker.tag_recv(self._ucx.Array(into), self._ucx.Tag(tag))
        return receive

    def poll(self, patience_ns: int) -> list[frames.Frame] | None:
        """Let UCX work; return what has come."""
        progress = self._worker.progress_once
        if len(self._taken) >= self._taken_max:
            self._post_taken()
        end = time.perf_counter_ns() + patience_ns if patience_ns else 0
        while not progress() and not self._is_there():
            self._reap()
            self._post_taken()
            if time.perf_counter_ns() >= end:
                return None
            os.sched_yield()
        while progress():
            pass
        found = self._take()
        self._reap()
        return found

    def _is_there(self) -> bool:
        return bool(self._posted) and self._posted[0][2].completed

    def _take(self) -> list[frames.Frame]:
        found: list[frames.Frame] = []
        while len(self._taken) < self._taken_max and self._is_there():
            view, array, receive = self._posted[0]
            try:
                receive.check_error()
                found.append(frames.decode(view))
            except self._ucx.Error:
                self.failed = True
                break
            except ProtocolError:
                if not found:
                    raise
                break  # first those before it: the next poll says what is wrong
            finally:
                del receive
            self._posted.popleft()
            self._taken.append((view, array))
        return found

    def _post_taken(self) -> None:
        for view, array in self._taken:
            self._posted.append((view, array, self._worker.tag_recv(array, self._tag)))
        self._taken.clear()

    def _reap(self) -> None:
        """Release what is out."""
        if not self._sends:
            return
        releases, under_way = [], []
        for request, array, release in self._sends:
            if not request.completed:
                under_way.append((request, array, release))
                continue
            self.failed = self.failed or request.status != 0
            if release is not None:
                releases.append(release)
        self._sends = under_way
        del request, under_way
        for release in releases:
            release()

    def arm(self) -> bool:
        """Have the worker's descriptor tell of what comes from now on."""
        if self._is_there():
            return False
        armed: bool = self._worker.arm()
        return armed

    def stray(self) -> int:
        """Return the length of a message that no receive waits for."""
        found = self._worker.tag_probe(*self._any)
        return found.length if found.matched and found.sender_tag != self._control_tag else -1

    def cancel(self) -> None:
        """Drop all receives and sends, but not their buffers."""
        self._held = [array for _, array, _ in [*self._sends, *self._posted]]
        self._releases = [release for _, _, release in self._sends if release is not None]
        self._sends = []
        self._posted.clear()

    def release(self) -> list[Callable[[], None]]:
        """Give all buffers back."""
        self._held = []
        return self._releases


def load_compiled() -> Any:
    """Return the module ``_wire``, None where there is none. Once ucxx has loaded UCX, which it works on."""
    if COMPILED.usable() is None:
        return None
    try:
        from . import _wire  # type: ignore[attr-defined]
    except ImportError as error:  # this UCX lacks something
        log.warning("the compiled wire is left out: %s", error)
        return None
    return _wire


def make_wire(ucx: Any, worker: Any, memory: memoryview, count: int, control_tag: int) -> Wire:
    """Make the wire of a connection: of ``count`` receives in ``memory``, which is divided among them.

    ``ucx`` is the Ucx of rpc/ucx, ``worker`` ucxx's.
    """
    if ucx.compiled is None:
        return PlainWire(ucx, worker, memory, count, control_tag)
    made: Wire = ucx.compiled.Wire(
        worker=worker.handle,
        memory=memory,
        count=count,
        control_tag=control_tag,
        body_max=BODY_MAX,
        inline_max=INLINE_MAX,
        payload_max=PAYLOAD_MAX,
        frame_type=frames.Frame,
        decode=frames.decode,
        error=ucx.Error,
    )
    return made
