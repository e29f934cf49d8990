"""Be the other process of a measurement, and talk to it: it answers raw UCX messages and measures the storage there.

    python -m benchfs_fuse.bench.peer       reads a Task from standard input, writes its address to standard output

It ends when its standard input does, that is with whoever started it. Both sides prove the cluster's secret to each
other as all our processes do (rpc.handshake), so it may listen where a daemon may. Between two orders it sleeps: what
is measured beside it has the machine for itself.

Orders and answers are msgpack with their length in front, on the meeting socket: this is the one place where that is
used again after the handshake.
"""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import trio

from ..errors import AuthenticationFailed, Disconnected, ProtocolError, UserError
from ..model import ClientId
from ..ports import Ending
from ..rpc import meeting
from ..rpc.handshake import Card, Handshake, Role
from . import storage
from .raw_ucx import RawUcx

#: Longest order or answer: the times of a round.
_MESSAGE_MAX = 1 << 20
#: Seconds of a peer's silence, as everywhere by default.
_LEASE_S = 60.0
#: Seconds that the process gets to say where it is: it loads UCX.
_START_S = 60.0

T = TypeVar("T", bound=msgspec.Struct)


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tell a new process what it needs: whom to let in, where to listen, which storage to measure ("": none)."""

    secret: str
    cluster_id: str
    listen: str
    data_dir: str
    tls: str
    net_devices: str


class Ping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ping"):
    """Answer ``count`` messages of ``length`` bytes."""

    length: int
    count: int
    armed: bool


class Store(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="store"):
    """Measure the storage there: one round of ``count`` operations of ``length`` bytes, reads perhaps ``cold``."""

    way: storage.Way
    length: int
    count: int
    cold: bool


class Drop(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="drop"):
    """Have the kernel forget what it caches of the daemon's files."""


class Describe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="describe"):
    """Say what the storage there is."""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answer an order. ``trouble``: why it could not be done."""

    times_ns: tuple[int, ...] = ()
    said: str = ""
    trouble: str = ""


_ORDERS = msgspec.msgpack.Decoder(Ping | Store | Drop | Describe)


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _send(stream: trio.SocketStream, message: msgspec.Struct) -> None:
    body = msgspec.msgpack.encode(message)
    await stream.send_all(len(body).to_bytes(4, "big") + body)


async def _receive(stream: trio.SocketStream) -> bytes:
    """Return the next message; empty at the end. ProtocolError."""
    head = await _exactly(stream, 4)
    length = int.from_bytes(head, "big")
    if length > _MESSAGE_MAX:
        raise ProtocolError(f"a message of {length} bytes between the processes of a measurement")
    return await _exactly(stream, length) if head else b""


async def _exactly(stream: trio.SocketStream, length: int) -> bytes:
    """Return ``length`` bytes; empty if the other side has hung up."""
    data = b""
    while len(data) < length:
        piece = await stream.receive_some(length - len(data))
        if not piece:
            return b""
        data += piece
    return data


def _lives(stream: trio.SocketStream) -> bool:
    return meeting.is_over(stream) is not Ending.PEER


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Meeting:
    """Give a handshake what it needs, a raw worker's address and an endpoint, on either side."""

    def __init__(self, task: Task, role: Role) -> None:
        self._task = task
        self._role = role
        self._shares = "" if task.tls or os.environ.get("UCX_TLS") else meeting.shares_of_this_process()
        card = self._card(b"") if role is Role.CLIENT else None
        self.handshake = Handshake(role, bytes.fromhex(task.secret), bytes.fromhex(task.cluster_id), card)
        self.raw: RawUcx | None = None
        self.shared = False
        self._connected = False

    def _card(self, address: bytes) -> Card:
        return Card(ClientId(1), -1, socket.gethostname(), os.getpid(), meeting.boot_id(), self._shares, address)

    async def answer(self, handshake: Handshake) -> None:
        """Do what the handshake needs now."""
        if handshake.peer is not None and self.raw is None:
            self.shared = bool(self._shares) and handshake.peer.shares == self._shares
            tls = self._task.tls or os.environ.get("UCX_TLS")
            self.raw = RawUcx(shared=self.shared, tls=tls, net_devices=self._task.net_devices or None)
            if self._role is Role.CLIENT:
                handshake.give_address(self.raw.address)
            else:
                handshake.give_card(self._card(self.raw.address))
        if handshake.address is not None and self.raw is not None and not self._connected:
            self._connected = True
            self.raw.connect(handshake.address)
            if self._role is Role.SERVER:
                handshake.give_ready()

    def close(self) -> None:
        """Give back what was made."""
        if self.raw is not None:
            self.raw.close()


async def _serve(stream: trio.SocketStream, raw: RawUcx, data_dir: Path | None) -> None:
    """Carry out orders until the other side hangs up."""
    while body := await _receive(stream):
        order = _ORDERS.decode(body)
        try:
            if isinstance(order, Ping):
                await _ping(stream, raw, order)
                continue
            answer = await _obey(order, data_dir)
        except OSError as error:
            answer = Answer(trouble=f"{error.filename or data_dir}: {error.strerror}")
        await _send(stream, answer)


async def _ping(stream: trio.SocketStream, raw: RawUcx, order: Ping) -> None:
    ready = len(body := msgspec.msgpack.encode(Answer())).to_bytes(4, "big") + body
    with socket.socket(fileno=os.dup(stream.socket.fileno())) as plain:  # a few bytes: they fit into the socket

        def say_ready() -> None:
            plain.sendall(ready)

        raw.answer(order.length, order.count, armed=order.armed, lives=lambda: _lives(stream), ready=say_ready)


async def _obey(order: Store | Drop | Describe, data_dir: Path | None) -> Answer:
    if data_dir is None:
        return Answer(trouble="no data directory was named there")
    if isinstance(order, Drop):
        return Answer(said=await trio.to_thread.run_sync(storage.drop_caches, data_dir))
    if isinstance(order, Describe):
        return Answer(said=storage.describe(data_dir))
    return Answer(tuple(storage.measure(data_dir, order.way, order.length, order.count, cold=order.cold)))


async def _run(task: Task) -> None:
    """Meet one asker after the other until standard input ends."""
    data_dir = Path(task.data_dir) if task.data_dir else None

    async def end_with_parent() -> None:
        await trio.to_thread.run_sync(sys.stdin.buffer.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()

    async def meet(stream: trio.SocketStream) -> None:
        met = _Meeting(task, Role.SERVER)
        try:
            await meeting.receive(stream, met.handshake, met.answer, _LEASE_S)
        except BaseException:
            met.close()
            raise
        nursery.start_soon(attend, stream, met)

    async def attend(stream: trio.SocketStream, met: _Meeting) -> None:
        assert met.raw is not None
        try:
            with suppress(Disconnected, ProtocolError, trio.BrokenResourceError, msgspec.MsgspecError):
                async with stream:
                    await _serve(stream, met.raw, data_dir)
        finally:
            met.close()

    listener, *_ = await trio.open_tcp_listeners(0, host=task.listen)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_with_parent)
        sys.stdout.write(meeting.join_address(task.listen, listener.socket.getsockname()[1]) + "\n")
        sys.stdout.flush()
        nursery.start_soon(meeting.receive_callers, listener, meet)


def main() -> int:
    """Be the process."""
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    trio.run(_run, task)
    os._exit(0)  # a thread may still wait for standard input


# ── the asker ────────────────────────────────────────────────────────────────────────────────────────────────────────


class PeerProcess(NamedTuple):
    """Hold a started process, and where it listens."""

    popen: "subprocess.Popen[bytes]"
    address: str


@contextmanager
def started(task: Task) -> Iterator[PeerProcess]:
    """Run a process for the time of the block. UserError: it did not come up."""
    popen = subprocess.Popen(
        [sys.executable, "-m", "benchfs_fuse.bench.peer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us, who then end it
    )
    assert popen.stdin is not None and popen.stdout is not None
    try:
        with suppress(BrokenPipeError):
            popen.stdin.write(msgspec.json.encode(task) + b"\n")
            popen.stdin.flush()
        address = popen.stdout.readline().decode().strip()
        if not address:
            raise UserError(f"the process for raw measurements ended with code {popen.wait()} before it was ready")
        yield PeerProcess(popen, address)
    finally:
        popen.stdin.close()
        popen.stdout.close()
        popen.kill()
        popen.wait()


class Asker:
    """Have the other process measure, and measure with it. Made by ``open_asker``. Methods raise UserError."""

    def __init__(self, stream: trio.SocketStream, raw: RawUcx, shared: bool) -> None:
        self._stream = stream
        self._raw = raw
        #: Whether the raw messages go through shared memory.
        self.shared = shared

    async def round_trips(self, length: int, count: int, *, armed: bool = False) -> list[int]:
        """Return the ns of ``count`` round trips with ``length`` bytes. Blocks the event loop while they run."""
        try:
            await self._order(Ping(length, count, armed))
            return self._raw.ask(length, count, armed=armed, lives=lambda: _lives(self._stream))
        except Disconnected as error:
            raise UserError(str(error)) from None

    async def storage(self, way: storage.Way, length: int, count: int, *, cold: bool = False) -> list[int]:
        """Return the ns of ``count`` operations on the storage there."""
        return list((await self._order(Store(way, length, count, cold))).times_ns)

    async def drop_caches(self) -> str:
        """Have the kernel there forget the data directory's cached pages; return in words what was done."""
        return (await self._order(Drop())).said

    async def describe(self) -> str:
        """Return what the storage there is."""
        return (await self._order(Describe())).said

    async def _order(self, order: msgspec.Struct) -> Answer:
        try:
            await _send(self._stream, order)
            body = await _receive(self._stream)
        except (trio.BrokenResourceError, ProtocolError) as error:
            raise UserError(f"the process for raw measurements has gone: {error}") from None
        if not body:
            raise UserError("the process for raw measurements has gone")
        answer = msgspec.msgpack.decode(body, type=Answer)
        if answer.trouble:
            raise UserError(f"raw measurement: {answer.trouble}")
        return answer


@asynccontextmanager
async def open_asker(address: str, task: Task) -> AsyncIterator[Asker]:
    """Meet the process at an address; ``task`` as it has it, as far as both must agree. UserError."""
    met = _Meeting(task, Role.CLIENT)
    try:
        try:
            stream = await meeting.call_on(address, met.handshake, met.answer, _LEASE_S)
        except (Disconnected, AuthenticationFailed, ProtocolError) as error:
            raise UserError(f"no raw measurements with {address}: {error}") from None
        assert met.raw is not None
        async with stream:
            yield Asker(stream, met.raw, met.shared)
    finally:
        met.close()


if __name__ == "__main__":
    sys.exit(main())
