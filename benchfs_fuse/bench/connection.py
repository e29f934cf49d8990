"""Be one end of a connection of ours, for ``bench network``: a server, or who asks it.

    python -m benchfs_fuse.bench.connection       reads a Task from standard input

The server says where it listens, and serves. The asker says when it is connected, and does one Order after the other.
Orders and answers are a line of JSON each. Both end when their standard input does, that is with whoever started them.

The connection is a daemon's and a mount's: ``rpc.ucx`` with handshake, requests, slots for payloads and replies. What
stands behind it in a daemon is left out: what was written has arrived where it would be handed on to the disk, and what
is read lies in memory. Payloads are what ``content`` says, so that each end can tell whether it has what was sent.
"""

import contextlib
import mmap
import os
import random
import socket
import sys
import time
import zlib
from functools import cache

import msgspec
import trio

from ..errors import FsError, ProtocolError, UserError
from ..model import ClientId
from ..ports import Channel, Peer, Reply
from ..rpc import meeting
from ..rpc.ucx import UcxEngine
from .samples import Moved

#: Requests of these tests: take a payload; give one; take one and sum it up; say how many bytes TAKE has taken so far.
TAKE, GIVE, SUM, COUNT = range(1, 5)
TLS = "tcp"
_NS_PER_S = 1_000_000_000


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tell a new process which end it is, ``server`` or not; the server's address; and what both have to know."""

    serves: bool
    #: Of the server: the host where it is to listen; of the asker: where it does, with the port.
    address: str
    device: str
    secret: str
    cluster_id: str


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask for a round: payloads of ``length`` bytes, ``in_flight`` of them under way at once, for so many seconds."""

    writes: bool
    length: int
    in_flight: int
    seconds: float


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say what a round has moved; before the first, where the server is. ``trouble``: why that could not be."""

    moved: Moved | None = None
    address: str = ""
    trouble: str = ""


@cache
def content(length: int) -> bytes:
    """Return what a payload of a length holds: noise, the same for everybody."""
    return random.Random(length).randbytes(length)


class Service:
    """Serve one asker without delay. A Handler."""

    def __init__(self) -> None:
        self._taken = 0

    def handle_now(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        """Serve a request at once."""
        if op == GIVE:
            return Reply(0, b"", memoryview(content(want)))
        if op == COUNT:
            return Reply(0, _number(self._taken))
        length = len(payload) if payload is not None else 0
        if op == SUM:
            return Reply(0, _number(zlib.crc32(payload if payload is not None else b"")))
        if op != TAKE:
            return Reply(ProtocolError.status, b"")
        self._taken += length
        return Reply(0, _number(length))

    async def __call__(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        """Serve a request."""
        return self.handle_now(channel, op, body, payload, want)


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")


async def _ask(channel: Channel, op: int, payload: bytes | None = None) -> int:
    """Ask for a number. FsError."""
    reply = await channel.call(op, b"", payload)
    if reply.status:
        raise ProtocolError(f"the server refuses request {op}")
    return int.from_bytes(reply.body, "big")


async def _write(channel: Channel, data: bytes) -> None:
    """Write a payload. FsError: also if it did not arrive as a whole."""
    taken = await _ask(channel, TAKE, data)
    if taken != len(data):
        raise ProtocolError(f"{taken} bytes of {len(data)} have arrived at the server")


async def _read(channel: Channel, into: memoryview) -> None:
    """Read a payload. FsError: also if it did not come as a whole."""
    reply = await channel.call(GIVE, b"", into=into)
    if reply.status or reply.received != len(into):
        raise ProtocolError(f"{reply.received} bytes of {len(into)} have come from the server")


async def check(channel: Channel, order: Order) -> None:
    """See that what is sent is what arrives, for one payload of an order; this also sets the way going. FsError."""
    expected = content(order.length)
    if order.writes:
        if await _ask(channel, SUM, expected) != zlib.crc32(expected):
            raise ProtocolError(f"what arrives at the server is not what was sent ({order.length} bytes)")
    else:
        into = bytearray(order.length)
        await _read(channel, memoryview(into))
        _refuse_other(into)


def _refuse_other(found: bytes | bytearray | memoryview) -> None:
    if found != content(len(found)):
        raise ProtocolError(f"what comes from the server is not what it has ({len(found)} bytes)")


async def measure(channel: Channel, order: Order) -> Moved:
    """Do a round: begin requests for so many seconds, and count what they move, until the last is answered. FsError.

    What has arrived is looked at outside of the timing, before and after it.
    """
    await check(channel, order)
    before = await _ask(channel, COUNT)
    rooms = [memoryview(mmap.mmap(-1, order.length)) for _ in range(order.in_flight)]
    for room in rooms:
        room[:] = bytes(order.length)  # page faults are nobody's transfer
    data = content(order.length)
    requests = 0
    troubles: list[FsError] = []

    async def work(room: memoryview) -> None:
        nonlocal requests
        try:
            while True:  # at least once, however late it is
                await (_write(channel, data) if order.writes else _read(channel, room))
                requests += 1
                if time.perf_counter_ns() >= deadline_ns:
                    break
        except FsError as error:
            troubles.append(error)
            nursery.cancel_scope.cancel()

    started_ns = time.perf_counter_ns()
    deadline_ns = started_ns + int(order.seconds * _NS_PER_S)
    async with trio.open_nursery() as nursery:
        for room in rooms:
            nursery.start_soon(work, room)
    took_ns = time.perf_counter_ns() - started_ns
    if troubles:
        raise troubles[0]
    taken = await _ask(channel, COUNT) - before
    if taken != (requests * order.length if order.writes else 0):
        raise ProtocolError(f"{requests} requests were answered, but the server has taken {taken} bytes")
    for room in [] if order.writes else rooms:
        _refuse_other(room)
    return Moved(requests * order.length, took_ns)


# ── the processes ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Voice:
    """Give answers on what was standard output. What UCX logs there goes to standard error from here on."""

    def __init__(self) -> None:
        self._descriptor = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(self, answer: Answer) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more
            os.write(self._descriptor, msgspec.json.encode(answer) + b"\n")


async def _run(task: Task, voice: _Voice) -> None:
    peer = Peer(ClientId(1 + task.serves), task.serves - 1, socket.gethostname(), os.getpid(), meeting.boot_id())
    keys = (bytes.fromhex(task.secret), bytes.fromhex(task.cluster_id))
    host = task.address if task.serves else "127.0.0.1"
    async with UcxEngine(peer, *keys, host=host, tls=TLS, net_devices=task.device) as engine:
        if task.serves:
            voice.say(Answer(address=await engine.listen(Service())))
            await trio.to_thread.run_sync(sys.stdin.buffer.read)
            return
        channel = await engine.connect(task.address)
        voice.say(Answer(address=task.address))
        while line := await trio.to_thread.run_sync(sys.stdin.buffer.readline):
            order = msgspec.json.decode(line, type=Order)
            try:
                answer = Answer(await measure(channel, order))
            except FsError as error:
                answer = Answer(trouble=str(error))
            voice.say(answer)


def main() -> int:
    """Be the process that standard input says."""
    voice = _Voice()
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    try:
        trio.run(_run, task, voice)
    except (FsError, UserError) as error:
        voice.say(Answer(trouble=str(error)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
