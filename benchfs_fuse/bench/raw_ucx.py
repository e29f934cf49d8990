"""Send messages through UCXX with nothing around them: what any transport of ours costs at least.

One process asks, the other answers; each has one worker and one endpoint, made as ``rpc.ucx`` makes them (same options,
error handling on). A round trip is ``length`` bytes there and ``ACK_LENGTH`` back, as a small write is, or a small read
in the other direction. Polling, both keep a processor busy until the message is there. Armed, both sleep on the
worker's file descriptor, as processes do that others share a node with: the difference is two wake-ups.

Everything here blocks the calling thread while it measures; that is the point.
"""

import mmap
import select
import time
from collections.abc import Callable
from typing import Any

from ..errors import Disconnected
from ..limits import PAYLOAD_MAX
from ..rpc.ucx import Ucx

#: The answer: about what one of our replies without payload takes.
ACK_LENGTH = 64
#: Longest message.
LENGTH_MAX = PAYLOAD_MAX
#: Seconds without anything from the other process after which it is given up. Round trips take milliseconds at most.
SILENCE_S = 10.0
#: Polls between two looks at the clock and at whether the other process lives.
POLLS_PER_LOOK = 4096
#: Progress calls that let a closed endpoint leave its worker (see rpc.ucx).
_LAST_PROGRESS = 16
_DATA, _ACK = 1 << 32, 2 << 32


class RawUcx:
    """Be one end. ``connect`` before anything else; ``close`` at the end."""

    def __init__(self, *, shared: bool, tls: str | None = None, net_devices: str | None = None) -> None:
        """Make the worker. Disconnected: UCX cannot use these transports."""
        self._ucx = Ucx()
        try:
            self._context: Any = self._ucx.make_context(shared=shared, tls=tls, net_devices=net_devices)
            self._worker: Any = self._ucx.Worker(self._context)
            self._worker.init_blocking_progress_mode()
        except self._ucx.Error as error:
            raise Disconnected(f"UCX: {error}") from error
        self._endpoint: Any = None
        memory = memoryview(mmap.mmap(-1, LENGTH_MAX + 2 * mmap.PAGESIZE))
        memory[:] = bytes(len(memory))  # page faults are nobody's round trip
        self._data = memory[:LENGTH_MAX]
        self._ack = memory[LENGTH_MAX : LENGTH_MAX + ACK_LENGTH]

    @property
    def address(self) -> bytes:
        """Return where the other end finds this one."""
        return bytes(self._worker.address)

    def connect(self, address: bytes) -> None:
        """Make the endpoint to the other end's worker. Disconnected."""
        try:
            there = self._ucx.Address.create_from_buffer(address)
            self._endpoint = self._ucx.Endpoint.create_from_worker_address(self._worker, there, True)
        except self._ucx.Error as error:
            raise Disconnected(f"UCX: {error}") from error

    def ask(self, length: int, count: int, *, armed: bool, lives: Callable[[], bool]) -> list[int]:
        """Do ``count`` round trips; return the ns of each. The other end has to be in ``answer`` with the same numbers.

        Disconnected: it died, or is silent.
        """
        data, ack = self._ucx.Array(self._data[:length]), self._ucx.Array(self._ack)
        data_tag, ack_tag = self._ucx.Tag(_DATA), self._ucx.Tag(_ACK)
        worker, endpoint = self._worker, self._endpoint
        times = []
        for _ in range(count):
            start = time.perf_counter_ns()
            receive = worker.tag_recv(ack, ack_tag)
            send = endpoint.tag_send(data, data_tag)
            while not (receive.completed and send.completed):
                self._wait(armed, (receive, send), lives)
            times.append(time.perf_counter_ns() - start)
            self._check(receive, send)
        return times

    def answer(
        self, length: int, count: int, *, armed: bool, lives: Callable[[], bool], ready: Callable[[], None]
    ) -> None:
        """Answer ``count`` messages; ``ready`` is called when the first can come. Disconnected, as ``ask``."""
        data, ack = self._ucx.Array(self._data[:length]), self._ucx.Array(self._ack)
        data_tag, ack_tag = self._ucx.Tag(_DATA), self._ucx.Tag(_ACK)
        worker, endpoint = self._worker, self._endpoint
        receive = worker.tag_recv(data, data_tag)
        ready()
        for left in reversed(range(count)):
            while not receive.completed:
                self._wait(armed, (receive,), lives)
            self._check(receive)
            send = endpoint.tag_send(ack, ack_tag)
            if left:
                receive = worker.tag_recv(data, data_tag)
            while not send.completed:
                self._wait(armed, (send,), lives)
            self._check(send)

    def _wait(self, armed: bool, requests: tuple[Any, ...], lives: Callable[[], bool]) -> None:
        """Let UCX work until something has happened. Disconnected."""
        worker = self._worker
        deadline = time.monotonic() + SILENCE_S
        while True:
            if armed:
                if worker.progress_once():
                    return
                if worker.arm() and not select.select([worker.epoll_file_descriptor], [], [], SILENCE_S)[0]:
                    break
            else:
                for _ in range(POLLS_PER_LOOK):
                    if worker.progress_once() or all(request.completed for request in requests):
                        return
                if not lives() or time.monotonic() > deadline:
                    break
        raise Disconnected("the other process of the raw UCX measurement has gone or is silent")

    def _check(self, *requests: Any) -> None:
        try:
            for request in requests:
                request.check_error()
        except self._ucx.Error as error:
            raise Disconnected(f"UCX: {error}") from error

    def close(self) -> None:
        """Make UCX let go of everything, whatever became of the other end."""
        if self._endpoint is not None:
            self._endpoint.close_blocking()
            for _ in range(_LAST_PROGRESS):
                self._worker.progress_once()
            self._ucx.destroy(self._worker, self._endpoint)
            self._endpoint = None
