"""Free callers that wait for an answer when a signal comes, so that nobody sits in a call that only an abort ends.

The kernel tells of a signal to the caller of a request that is under way (FUSE_INTERRUPT). What waits for a lock gives
up at once, as POSIX asks for. Everything else goes on in here, since its change may be made already at a daemon; only
its caller is freed, with EINTR or by its death:

- at once, if the caller is dying, or if a daemon is missing;
- after ``GRACE_S`` otherwise. Programs are not prepared for EINTR from a file, and many get signals all the time
  (timers, children that end): what a daemon answers in the usual time is not to fail because of one.

The kernel does not tell of every signal: not of those to who waits for direct reads and writes or for read-ahead, nor
that a process that closes a file does so because it exits. What reads, writes or closes is therefore looked at every
``GRACE_S``, and freed if it is dying, or cannot get at a signal that it handles: at the first look if a daemon is
missing, else at the second one that finds it so. Who waited for read-ahead then asks for the page himself, which the
kernel does tell about.

What a freed request would have opened is closed again by whoever served it, and what it changed is dropped by the
kernel, which does not know of it (``begin``, ``end``).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import trio

from .companion import Companion
from .rpc.client import Links

log = logging.getLogger(__name__)

#: Seconds that an interrupted request has to end by itself: many times what any takes while all daemons answer.
GRACE_S = 1.0


class _Watched(NamedTuple):
    """Be a caller (thread id) that may get signals untold; say when to look (trio time), and what was seen last."""

    pid: int
    when: float
    held: bool = False


class Interrupts:
    """Know which requests may be interrupted how.

    ``is_dying`` tells whether a thread (its id) is about to end, ``is_held`` whether it cannot get at a signal.
    """

    def __init__(
        self, companion: Companion, links: Links, is_dying: Callable[[int], bool], is_held: Callable[[int], bool]
    ) -> None:
        self._companion = companion
        self._links = links
        self._is_dying = is_dying
        self._is_held = is_held
        self._nursery: trio.Nursery | None = None
        #: Requests that give up when they are interrupted.
        self._waits: dict[int, trio.CancelScope] = {}
        #: Requests whose handlers have to know whether the caller was freed, and those of them whose caller was.
        self._under_way: set[int] = set()
        self._freed: set[int] = set()
        #: Those of them whose caller may get signals untold; the oldest first.
        self._watched: dict[int, _Watched] = {}
        self._watching = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Free callers until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                while not self._watched:
                    self._watching = trio.Event()
                    await self._watching.wait()
                await trio.sleep_until(next(iter(self._watched.values())).when)
                self._look(trio.current_time())

    def _look(self, now: float) -> None:
        """Free those who are dying or held among the requests that have been watched long enough."""
        for unique, watched in [item for item in self._watched.items() if item[1].when <= now]:
            del self._watched[unique]
            held = self._is_held(watched.pid)
            if self._is_dying(watched.pid) or (held and (watched.held or not self._all_connected())):
                self._free(unique)
            else:
                self._watched[unique] = _Watched(watched.pid, now + GRACE_S, held)

    def signal(self, unique: int) -> None:
        """Take note that the caller of a request was sent a signal: the hook ``interrupt``."""
        wait = self._waits.get(unique)
        if wait is not None:
            wait.cancel()
        elif self._nursery is not None:
            self._nursery.start_soon(self._free_soon, unique)

    async def _free_soon(self, unique: int) -> None:
        pid = self._companion.pid_of(unique)
        if not (pid and self._is_dying(pid)) and self._all_connected():
            await trio.sleep(GRACE_S)
        self._free(unique)

    def _all_connected(self) -> bool:
        return all(self._links.to(daemon_id).connected for daemon_id in self._links.daemons)

    def _free(self, unique: int) -> None:
        if self._companion.free_caller(unique):
            log.info("request %d was interrupted", unique)
            if unique in self._under_way:
                self._freed.add(unique)

    # ── for the handlers; a request is named by Companion.request.unique ─────────────────────────────────────────────

    @contextmanager
    def waiting(self, unique: int) -> Iterator[trio.CancelScope]:
        """Cancel the block when the request is interrupted."""
        with trio.CancelScope() as scope:
            self._waits[unique] = scope
            try:
                yield scope
            finally:
                del self._waits[unique]

    def begin(self, *, watch: bool = False) -> int:
        """Note that the handler of the request that is being handled has to know whether the caller was freed.

        ``watch``: look whether the caller got a signal. Return what ``end`` takes.
        """
        request = self._companion.request
        unique, pid = request.unique, request.pid
        self._under_way.add(unique)
        if watch and pid:  # not of the kernel itself, or of a thread that cannot be seen
            self._watched[unique] = _Watched(pid, trio.current_time() + GRACE_S)
            self._watching.set()
        return unique

    def end(self, unique: int) -> bool:
        """Tell whether somebody takes the answer, to be given in the same step; False: the caller was freed."""
        self._under_way.discard(unique)
        self._watched.pop(unique, None)
        if unique not in self._freed:
            return True
        self._freed.discard(unique)
        return False


def _is_dropped_answer(record: logging.LogRecord) -> bool:
    return "fuse_reply_* failed with" in str(record.msg) and record.args == ("No such file or directory",)


def hush() -> None:
    """Keep pyfuse3 from logging as an error that nobody waited for an answer any more."""
    logging.getLogger("pyfuse3").addFilter(lambda record: not _is_dropped_answer(record))
