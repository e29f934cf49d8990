"""State what the rest of the system knows of a network: listen, connect, and a shorter way to serve."""

from collections.abc import Callable
from typing import Protocol, cast

from ..ports import Channel, Handler, Reply

#: Serve one request at once, without a task of its own: same arguments as a Handler, and None if it takes an await
#: after all (then nothing may have happened yet). Never raises.
HandleNow = Callable[[Channel, int, bytes, memoryview | None, int], Reply | None]


class Network(Protocol):
    """Make channels between processes that hold the cluster's secret."""

    async def listen(self, handler: Handler, on_connect: Callable[[Channel], None] | None = None) -> str:
        """Accept connections from now on and return the address for ``connect``. ``handler`` serves their requests.

        ``on_connect`` sees every new channel before its first request is served.
        """
        ...

    async def connect(self, address: str, handler: Handler | None = None) -> Channel:
        """Connect to an address that ``listen`` returned; ``handler`` serves the other end's requests.

        Raise Disconnected when nobody answers, AuthenticationFailed when the other end is not of this cluster.
        There is no deadline but the handshake's: callers cancel.
        """
        ...


def handle_now_of(handler: Handler) -> HandleNow | None:
    """Return the handler's short way: the method ``handle_now`` of a handler that is an object with one."""
    return cast(HandleNow | None, getattr(handler, "handle_now", None))
