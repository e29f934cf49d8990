"""Meet peers on a plain TCP socket: the handshake runs over it, and then it stays open as the sign of life.

UCX has no way of its own to say at once that a peer which shares memory with us has died. The kernel has: it closes a
dead process's sockets. So each connection keeps its meeting socket, on which nobody says anything any more. End of file
or a reset means that the peer's process has gone or has closed on purpose; silence of the peer's kernel beyond the
lease means that the network is cut or the node is down. The kernel's keepalive asks, so an idle process sleeps.

Strangers get ``HANDSHAKE_TIMEOUT_S`` and a bounded number of places. When the places are full, the one who has been
there longest has to go: honest peers are through within milliseconds, so it is never them.
"""

import errno
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable

import trio

from ..errors import AuthenticationFailed, Disconnected, ProtocolError
from ..limits import HANDSHAKE_TIMEOUT_S, PENDING_MAX
from ..ports import Ending
from .handshake import Handshake

log = logging.getLogger(__name__)

#: Seconds to wait for free file descriptors before the next accept: nothing tells when one becomes free.
ACCEPT_RETRY_S = 0.1

#: Lines in the log about callers who got nowhere, in so many seconds; of more than that only the number is told.
TOLD_MAX = 20
TOLD_S = 60.0

_READ_SIZE = 4096
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)

Answer = Callable[[Handshake], Awaitable[None]]


def shares_of_this_process() -> str:
    """Name everything that two processes must have in common for UCX's shared memory to work between them.

    The same boot of the same kernel; the same user (segments have mode 0600); the same IPC namespace (System V
    segments), network namespace (the unix sockets that wake a sleeping receiver), pid and user namespace (UCX looks
    for its peer in /proc). See namespaces(7).
    """
    names = ("ipc", "net", "pid", "user")
    return " ".join([boot_id(), str(os.geteuid()), *(os.readlink(f"/proc/self/ns/{name}") for name in names)])


def boot_id() -> str:
    """Return the kernel's boot id: equal on one node until it boots again."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` (``[host]:port`` for IPv6). Raise Disconnected where there is nothing to split."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise Disconnected(f"{address!r} is no address: host:port is needed")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """Write host and port the way ``split_address`` reads them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def call_on(address: str, handshake: Handshake, answer: Answer, lease_s: float) -> trio.SocketStream:
    """Connect to a listener and run the handshake; the stream is the caller's afterwards.

    ``answer`` is called whenever the other side has said something and does what the handshake then needs. Raise
    Disconnected when nobody answers in time, AuthenticationFailed and ProtocolError as the handshake does.
    """
    host, port = split_address(address)
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT_S):
            stream = await trio.open_tcp_stream(host, port)
            try:
                await _talk(stream, handshake, answer)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
    except trio.TooSlowError:
        raise Disconnected(f"{address} did not answer within {HANDSHAKE_TIMEOUT_S:g} s") from None
    except (OSError, trio.BrokenResourceError) as error:
        raise Disconnected(f"{address}: {error}") from error
    _watch_over(stream, lease_s)
    return stream


async def receive_callers(
    listener: trio.SocketListener,
    meet: Callable[[trio.SocketStream], Awaitable[None]],
    pending_max: int = PENDING_MAX,
) -> None:
    """Accept for ever; run ``meet`` for each caller with a deadline, at most ``pending_max`` at a time.

    ``meet`` owns the stream and raises Disconnected, AuthenticationFailed or ProtocolError.
    """
    pending: dict[trio.CancelScope, None] = {}
    tell = _Telling().tell

    async def one(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await meet(stream)
        except Disconnected as error:
            tell(logging.INFO, f"a caller went away: {error}")
        except (AuthenticationFailed, ProtocolError) as error:
            tell(logging.WARNING, f"a caller was turned away: {error}")
        finally:
            pending.pop(scope, None)

    async with listener, trio.open_nursery() as nursery:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                tell(logging.ERROR, f"cannot accept connections: {error}")
                await trio.sleep(ACCEPT_RETRY_S)
                continue
            if len(pending) >= pending_max:
                oldest = next(iter(pending))
                del pending[oldest]
                oldest.cancel()
            scope = trio.CancelScope(deadline=trio.current_time() + HANDSHAKE_TIMEOUT_S)
            pending[scope] = None
            nursery.start_soon(one, stream, scope)


class _Telling:
    """Write lines into the log, not more than a few in a while: strangers could fill a disk with them."""

    def __init__(self) -> None:
        self._since_s = -math.inf
        self._told = self._kept_back = 0

    def tell(self, level: int, sentence: str) -> None:
        """Write one line, or count it."""
        now_s = trio.current_time()
        if now_s >= self._since_s + TOLD_S:
            if self._kept_back:
                log.warning("%d lines more like those above were kept back", self._kept_back)
            self._since_s, self._told, self._kept_back = now_s, 0, 0
        if self._told == TOLD_MAX:
            self._kept_back += 1
            return
        self._told += 1
        log.log(level, "%s", sentence)


async def receive(stream: trio.SocketStream, handshake: Handshake, answer: Answer, lease_s: float) -> None:
    """Run the handshake with a caller; close the stream unless it succeeds. Errors as in ``call_on``."""
    try:
        await _talk(stream, handshake, answer)
    except BaseException as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error, (OSError, trio.BrokenResourceError)):
            raise Disconnected(f"the caller vanished: {error}") from error
        raise
    _watch_over(stream, lease_s)


async def wait_end(stream: trio.SocketStream) -> Ending:
    """Wait until the meeting socket says that the connection is over; return why."""
    try:
        data = await stream.socket.recv(1)
    except OSError as error:
        return Ending.SILENCE if error.errno in _SILENT else Ending.PEER
    return Ending.PROTOCOL if data else Ending.PEER


def is_over(stream: trio.SocketStream) -> Ending | None:
    """Look, without waiting, whether the meeting socket says that the connection is over."""
    with socket.socket(fileno=os.dup(stream.socket.fileno())) as plain:
        try:
            data = plain.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            return Ending.SILENCE if error.errno in _SILENT else Ending.PEER
        return Ending.PROTOCOL if data else Ending.PEER


async def _talk(stream: trio.SocketStream, handshake: Handshake, answer: Answer) -> None:
    """Carry bytes between socket and handshake until it is done. One refusal is sent as far as it goes."""
    try:
        while True:
            if data := handshake.to_send():
                await stream.send_all(data)
            if handshake.done:
                return
            received = await stream.receive_some(_READ_SIZE)
            if not received:
                raise Disconnected("the other side hung up during the handshake")
            handshake.receive(received)
            if not handshake.done:
                await answer(handshake)
    except (AuthenticationFailed, ProtocolError):
        await stream.send_all(handshake.to_send())
        raise


def _watch_over(stream: trio.SocketStream, lease_s: float) -> None:
    """Let the kernel find out about a cut network: after ``lease_s`` seconds without an answer the socket fails.

    Half of the lease passes before the first question, then four questions follow (tcp(7): TCP_KEEPIDLE and friends;
    TCP_USER_TIMEOUT bounds the whole).
    """
    idle_s = max(1, math.floor(lease_s / 2))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, math.floor(lease_s / 8)))
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, math.floor(lease_s * 1000)))
