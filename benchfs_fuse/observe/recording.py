"""Record where operations spend their time, while somebody asks for it.

Off, which is the usual case, a hook costs one look at ``recorder``, which is None. On, a process keeps spans in a
bounded memory; what comes when that is full is counted alone. Times are time.perf_counter_ns().
"""

import itertools
import time
from contextvars import ContextVar, Token
from typing import TypeVar

from ..limits import SPANS_MAX, STAGES_MAX
from .spans import PEERS, Operation, Request, Served, Stage

T = TypeVar("T")


Span = Operation | Served

#: Numbers of operations. None comes again in a later recording: tasks that an operation left behind still carry it.
_numbers = itertools.count(1)

_current: ContextVar[Span | None] = ContextVar("_current", default=None)


class Recorder:
    """Keep spans. One at a time is the process's ``recorder``."""

    def __init__(self, spans_max: int = SPANS_MAX) -> None:
        self.operations: list[Operation] = []
        self.requests: list[Request] = []
        self.served: list[Served] = []
        #: Spans that there was no room for.
        self.lost = 0
        self._spans_max = spans_max

    def begin_operation(self, name: str, unique: int, received_ns: int) -> Operation:
        """Begin an operation, which is what this task does from now on; ``end_operation`` follows in the same task."""
        operation = Operation(next(_numbers), name, unique, received_ns, time.perf_counter_ns(), stages=[])
        _current.set(operation)
        return operation

    def end_operation(self, operation: Operation, error: int) -> None:
        """Take note that an operation's answer is given."""
        operation.ended_ns = time.perf_counter_ns()
        operation.error = error
        _current.set(None)
        self._keep(self.operations, operation)

    def add_operation(self, name: str, unique: int, received_ns: int, started_ns: int, error: int) -> None:
        """Take note of an operation whose answer is given now, in the step in which it began."""
        operation = Operation(next(_numbers), name, unique, received_ns, started_ns, stages=[])
        operation.ended_ns = time.perf_counter_ns()
        operation.error = error
        self._keep(self.operations, operation)

    def receive(self, client: int, number: int, op: int) -> Served:
        """Take note that a request is here, its payload too."""
        return Served(client, number, op, time.perf_counter_ns(), stages=[])

    def begin_served(self, served: Served) -> Token[Span | None]:
        """Begin to serve a request in this task; return what ``leave_served`` takes, for tasks that go on without."""
        served.started_ns = time.perf_counter_ns()
        return _current.set(served)

    def leave_served(self, token: Token[Span | None]) -> None:
        """Go on in this task with what it did before."""
        _current.reset(token)

    def end_served(self, served: Served) -> None:
        """Take note that the reply of a served request is on its way."""
        served.ended_ns = time.perf_counter_ns()
        self._keep(self.served, served)

    def add_request(self, daemon: int, number: int, op: int, started_ns: int, sent_ns: int, answered_ns: int) -> None:
        """Take note of a request whose caller goes on now. A daemon's own requests are stages of what it serves."""
        span = _current.get()
        if isinstance(span, Served):
            note(PEERS, started_ns)
            return
        operation = span.number if span is not None else 0
        request = Request(operation, daemon, number, op, started_ns, sent_ns, answered_ns, time.perf_counter_ns())
        self._keep(self.requests, request)

    def _keep(self, spans: list[T], span: T) -> None:
        if len(spans) < self._spans_max:
            spans.append(span)
        else:
            self.lost += 1


#: Who records in this process, None while nobody does. For reading; ``start`` and ``stop`` set it.
recorder: Recorder | None = None


def start(spans_max: int = SPANS_MAX) -> Recorder:
    """Begin to record, with nothing recorded so far."""
    global recorder  # noqa: PLW0603  the one switch that all hooks read
    recorder = Recorder(spans_max)
    return recorder


def stop() -> Recorder | None:
    """Record no more; return who did."""
    global recorder
    stopped, recorder = recorder, None
    return stopped


def now() -> int:
    """Return the time for ``note``; 0 while nobody records."""
    return time.perf_counter_ns() if recorder is not None else 0


def note(name: str, started_ns: int) -> None:
    """Add a stage that ends now to what this task does; nothing if ``started_ns`` is 0, or nobody records."""
    span = _current.get() if started_ns and recorder is not None else None
    if span is not None and len(span.stages) < STAGES_MAX:
        span.stages.append(Stage(name, started_ns, time.perf_counter_ns()))
