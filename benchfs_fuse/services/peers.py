"""Reach every daemon from within a daemon: the others over links, this one without a connection."""

from typing import TypeVar

from ..errors import InvalidArgument
from ..rpc.client import Links
from ..rpc.messages import Body, Request
from ..rpc.server import Server

R = TypeVar("R", bound=Body)


class ClusterPeers:
    """Implement Peers (services/calls.py). The links are of kind ``daemon``, without a deadline."""

    def __init__(self, daemon_id: int, server: Server, links: Links) -> None:
        self._daemon_id = daemon_id
        self._server = server
        self._links = links

    async def call(self, daemon_id: int, request: Request, reply: type[R], into: memoryview | None = None) -> R:
        """Send a request that is not recorded and wait for its answer, for as long as it takes."""
        if daemon_id == self._daemon_id:
            assert into is None
            return await self._server.call_local(request, reply)
        if daemon_id not in self._links.daemons:
            raise InvalidArgument(f"there is no daemon {daemon_id}")
        return await self._links.to(daemon_id).call(request, reply, into=into)
