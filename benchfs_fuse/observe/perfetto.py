"""Write timelines as a file that Perfetto (ui.perfetto.dev) and chrome://tracing open: the trace event format.

The mount is one process, each daemon another one. Operations that overlap get a track each; the parts of an operation
lie under it, its requests beside it, and an arrow leads from each request to what the daemon did about it.
Source: "Trace Event Format" (docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from .spans import Served
from .timeline import Exchange, Part, Timelines

_MOUNT = 1
_DAEMONS = 100
#: Tracks for requests lie behind those for operations.
_REQUESTS = 10_000


class _Tracks:
    """Give overlapping intervals different tracks, the lowest that is free."""

    def __init__(self) -> None:
        self._ends: list[int] = []

    def take(self, started_ns: int, ended_ns: int) -> int:
        for track, end in enumerate(self._ends):
            if end <= started_ns:
                self._ends[track] = ended_ns
                return track
        self._ends.append(ended_ns)
        return len(self._ends) - 1


def write(timelines: Timelines, name_of: Callable[[int], str], file: TextIO) -> None:
    """Write everything to ``file``; ``name_of`` names a request by its op."""
    file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
    file.write(",\n".join(json.dumps(event) for event in _events(timelines, name_of)))
    file.write("\n]}\n")


def _events(timelines: Timelines, name_of: Callable[[int], str]) -> Iterator[dict[str, Any]]:
    daemons = sorted(timelines.offsets)
    yield _named("process_name", _MOUNT, 0, "mount")
    for daemon in daemons:
        yield _named("process_name", _DAEMONS + daemon, 0, f"daemon {daemon}")
    operations = _Tracks()
    for traced in sorted(timelines.operations, key=lambda one: one.started_ns):
        track = operations.take(traced.started_ns, traced.started_ns + traced.total_ns)
        about = {"unique": traced.operation.unique, "errno": traced.operation.error}
        yield _slice(
            traced.operation.name, _MOUNT, track, traced.started_ns, traced.started_ns + traced.total_ns, about
        )
        for part in traced.parts:
            yield _part(part, _MOUNT, track)
    exchanges = [one for traced in timelines.operations for one in traced.exchanges] + list(timelines.behind)
    yield from _exchanges(exchanges, name_of)


def _exchanges(exchanges: Iterable[Exchange], name_of: Callable[[int], str]) -> Iterator[dict[str, Any]]:
    requests = _Tracks()
    served_by: dict[int, _Tracks] = {}
    for number, (request, served, _) in enumerate(sorted(exchanges, key=lambda one: one.request.started_ns)):
        name, about = name_of(request.op), {"daemon": request.daemon, "number": request.number}
        track = _REQUESTS + requests.take(request.started_ns, request.ended_ns)
        yield _slice(name, _MOUNT, track, request.started_ns, request.ended_ns, about)
        if served is None:
            continue
        process = _DAEMONS + request.daemon
        at = served_by.setdefault(request.daemon, _Tracks()).take(served.received_ns, served.ended_ns)
        yield _slice(name, process, at, served.received_ns, served.ended_ns, {"number": request.number})
        for part in _nested(served):
            yield _part(part, process, at)
        arrow = {"cat": "request", "id": number, "name": name}
        yield {"ph": "s", "pid": _MOUNT, "tid": track, "ts": _us(request.started_ns), **arrow}
        yield {"ph": "f", "bp": "e", "pid": process, "tid": at, "ts": _us(served.received_ns), **arrow}


def _nested(served: Served) -> Iterator[Part]:
    """Yield a daemon's stages, each cut off where what it lies in ends: slices of a track may not overlap otherwise."""
    ends = [served.ended_ns]
    for stage in sorted(served.stages, key=lambda one: (one.started_ns, -one.ended_ns)):
        while len(ends) > 1 and ends[-1] <= stage.started_ns:
            ends.pop()
        end = min(stage.ended_ns, ends[-1])
        if max(stage.started_ns, served.received_ns) < end:
            yield Part(stage.name, max(stage.started_ns, served.received_ns), end)
            ends.append(end)


def _named(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": {"name": name}}


def _part(part: Part, process: int, track: int) -> dict[str, Any]:
    return _slice(part.stage, process, track, part.started_ns, part.ended_ns, {})


def _slice(
    name: str, process: int, track: int, started_ns: int, ended_ns: int, about: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": _us(started_ns), "dur": _us(ended_ns - started_ns)}
    return {"ph": "X", "name": name, "pid": process, "tid": track, **times, "args": about}


def _us(time_ns: int) -> float:
    return time_ns / 1000
