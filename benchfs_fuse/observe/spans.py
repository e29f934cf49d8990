"""Define what is recorded of operations: spans, and the stages within them.

- ``Operation``: one request of the kernel that a mount handles.
- ``Request``: one request that a mount sends to a daemon, for an operation or behind its back.
- ``Served``: one request that a daemon serves.

An operation and a served request hold *stages* besides: intervals in which they did, or waited for, something with a
name. Times are in ns of CLOCK_MONOTONIC (clock_gettime(2)), the same for all processes of a host.
"""

import msgspec

#: Where a daemon's time goes. An interval of such a name may lie in another one's.
STORE = "metadata store"
SUBMIT = "io_uring submit"
COMPLETE = "io_uring completion"
DISK = "plain disk call"
PEERS = "other daemons"
#: What a mount waits for itself.
PLACE = "wait for a place"
CONNECTION = "wait for a daemon"
ORDER = "wait for the file's order"
ROOM = "wait for room to gather"
WRITTEN = "wait for gathered writes"


class Stage(msgspec.Struct, frozen=True, array_like=True):
    """Name an interval within a span."""

    name: str
    started_ns: int
    ended_ns: int


class Operation(msgspec.Struct, array_like=True):
    """Be one request of the kernel. ``unique`` is the kernel's name for it, 0 where nobody tells.

    ``received_ns``: when it was read from the kernel, 0 where nobody tells. ``error``: errno, 0 for success.
    """

    number: int
    name: str
    unique: int
    received_ns: int
    started_ns: int
    ended_ns: int = 0
    error: int = 0
    stages: list[Stage] = []


class Request(msgspec.Struct, frozen=True, array_like=True):
    """Be one request to a daemon: asked for, sent, answered (0: never), and when its caller went on.

    ``operation``: number of the operation whose caller waits, or that left it behind; 0 for none.
    """

    operation: int
    daemon: int
    number: int
    op: int
    started_ns: int
    sent_ns: int
    answered_ns: int
    ended_ns: int


class Served(msgspec.Struct, array_like=True):
    """Be one request that a daemon serves: received, begun, done, its reply on its way."""

    client: int
    number: int
    op: int
    received_ns: int
    started_ns: int = 0
    done_ns: int = 0
    ended_ns: int = 0
    stages: list[Stage] = []
