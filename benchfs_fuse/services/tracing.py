"""Record for clients what this daemon serves, for as long as one of them wants that."""

import math
from collections.abc import Awaitable, Callable

import trio

from ..errors import InvalidArgument, NotFound
from ..limits import KIB
from ..model import ClientId
from ..observe import recording
from ..rpc.messages import Body, Request, Trace, TraceReply
from .calls import Call

#: Longest time for which a client may have a daemon record without asking again.
SECONDS_MAX = 3600.0
#: Bytes of a page, which has to fit into a body, and what a span takes at most, and a stage of a daemon.
PAGE_BYTES = 96 * KIB
SPAN_BYTES = 64
STAGE_BYTES = 48
#: Spans that are looked at for one page: those of other clients are passed over.
LOOKED_AT_MAX = 20_000


class TraceService:
    """Start and stop the process's recorder. Memory is bounded by that: the clients share what it keeps."""

    def __init__(self) -> None:
        #: Until when (trio time) who wants it.
        self._until: dict[ClientId, float] = {}
        self._changed = trio.Event()

    def handlers(self) -> dict[type[Request], Callable[[Request, Call], Awaitable[Body]]]:
        """Return the handlers for Server.register."""
        return {Trace: self._trace}

    async def run(self) -> None:
        """Stop recording when nobody wants it any more; until cancelled."""
        while True:
            now = trio.current_time()
            for client_id in [one for one, until in self._until.items() if until <= now]:
                del self._until[client_id]
            if not self._until:
                recording.stop()
            self._changed = trio.Event()
            with trio.move_on_at(min(self._until.values(), default=math.inf)):
                await self._changed.wait()

    async def _trace(self, request: Request, call: Call) -> Body:
        assert isinstance(request, Trace)
        if not (request.seconds <= SECONDS_MAX and request.after >= 0):
            raise InvalidArgument(f"tracing for {request.seconds} s from span {request.after} on")
        recorder = recording.recorder
        if request.seconds > 0:
            recorder = recorder or recording.start()
            self._until[call.client_id] = trio.current_time() + request.seconds
            self._changed.set()
            return TraceReply((), len(recorder.served), False, recorder.lost)
        if request.seconds < 0:
            self._until.pop(call.client_id, None)
            self._changed.set()
            return TraceReply((), 0, False, 0)
        if recorder is None or call.client_id not in self._until:
            raise NotFound("nothing is recorded for this client, or not any more")
        return _page(recorder, call.client_id, request.after)


def _page(recorder: recording.Recorder, client_id: ClientId, after: int) -> TraceReply:
    found = []
    position, size = after, 0
    for span in recorder.served[after : after + LOOKED_AT_MAX]:
        size += (SPAN_BYTES + STAGE_BYTES * len(span.stages)) * (span.client == client_id)
        if size > PAGE_BYTES:
            break
        position += 1
        if span.client == client_id:
            found.append(span)
    return TraceReply(tuple(found), position, position < len(recorder.served), recorder.lost)
