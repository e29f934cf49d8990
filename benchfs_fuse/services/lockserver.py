"""Serve requests for advisory locks, and keep them in step with the sessions: one part of services/sessions.py.

The table (services/advisory.py) is memory. It lives as long as this daemon and is filled anew by the clients' Reclaim;
until every session of the last incarnation has reclaimed or has ended, it is paused. A session needs the inode open to
lock it, and its last Release takes its locks there with it; its end takes all of them, after it was fenced everywhere.

No request for a lock waits here: one that has to is put into the table, and the client is told by LockGranted. That is
sent once. If the connection breaks, the client asks again over the next one, for every request that it still waits for.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import trio

from ..errors import InvalidArgument, Stale
from ..model import LOCK_END, ClientId, LockKind, LockType
from ..rpc.messages import (
    LOCK_GRANTED,
    LOCK_QUEUED,
    LOCK_REFUSED,
    Body,
    CancelLock,
    CancelLockReply,
    GetLock,
    GetLockReply,
    LockClaim,
    LockHolder,
    LockReply,
    Request,
    SetLock,
)
from .advisory import LockTable, Owner, Place, Wanted
from .calls import Call

#: Changes that one incarnation of a daemon can number before the numbers of the next begin.
VERSIONS_SHIFT = 40

_OUTCOMES = {True: LOCK_GRANTED, False: LOCK_REFUSED, None: LOCK_QUEUED}


class Known(NamedTuple):
    """Say what the sessions know: whether a client has an inode open, and whether two run on one host."""

    has_open: Callable[[ClientId, int], bool]
    same_host: Callable[[ClientId, ClientId], bool]


class LockServer:
    """Hold the locks of one incarnation of a daemon. ``tell(client, ticket, version)`` sends LockGranted."""

    def __init__(self, incarnation: int, known: Known, tell: Callable[[ClientId, int, int], None]) -> None:
        self._known = known
        self._table = LockTable(tell, version=incarnation << VERSIONS_SHIFT)
        self._all_known = trio.Event()

    def handlers(self) -> dict[type[Request], Callable[[Request, Call], Awaitable[Body]]]:
        """Return what serves requests that wait until all locks are known."""
        return {GetLock: self._get_later}

    def handlers_now(self) -> dict[type[Request], Callable[[Request, Call], Body | None]]:
        """Return what serves requests without awaiting."""
        return {SetLock: self._set, GetLock: self._get, CancelLock: self._cancel}

    def __len__(self) -> int:
        """Return how many ranges are held and requests wait."""
        return len(self._table)

    def _set(self, request: Request, call: Call) -> Body:
        assert isinstance(request, SetLock)
        if not self._known.has_open(call.client_id, request.ino):
            raise Stale(f"inode {request.ino} is not open")
        answer = self._table.set(
            Wanted(
                Place(request.ino, request.kind),
                Owner(call.client_id, request.owner),
                request.type,
                request.start,
                request.end,
                request.pid,
                request.ticket,
            )
        )
        return LockReply(_OUTCOMES[answer.outcome], answer.version)

    def _get(self, request: Request, call: Call) -> Body | None:
        assert isinstance(request, GetLock)
        if request.type is LockType.UNLOCK or request.kind is LockKind.FLOCK or request.start > request.end:
            raise InvalidArgument(f"what is in the way of {request.type.name} of {request.kind.name}?")
        if not self._known.has_open(call.client_id, request.ino):
            raise Stale(f"inode {request.ino} is not open")
        owner = Owner(call.client_id, request.owner)
        found = self._table.get(
            Wanted(Place(request.ino, request.kind), owner, request.type, request.start, request.end)
        )
        if found is None:
            return None if self._table.paused else GetLockReply(None)
        pid = found.pid if self._known.same_host(call.client_id, found.owner.client_id) else 0
        return GetLockReply(LockHolder(found.type, found.start, found.end, pid))

    async def _get_later(self, request: Request, call: Call) -> Body:
        await self._all_known.wait()
        reply = self._get(request, call)
        assert reply is not None
        return reply

    def _cancel(self, request: Request, call: Call) -> Body:
        assert isinstance(request, CancelLock)
        return CancelLockReply(self._table.cancel(call.client_id, request.ticket))

    # ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self, client_id: ClientId, claims: Iterable[LockClaim], *, again: bool) -> None:
        """Take up the locks that a session held at the last incarnation; those on files that are lost are, too.

        ``again``: the session has reclaimed them before, or had none; then it gets nothing that is another's.
        """
        for claim in claims:
            if not 0 <= claim.start <= claim.end <= LOCK_END or claim.type is LockType.UNLOCK:
                raise InvalidArgument(f"no lock to reclaim: {claim}")
            if self._known.has_open(client_id, claim.ino):
                owner = Owner(client_id, claim.owner)
                wanted = Wanted(Place(claim.ino, claim.kind), owner, claim.type, claim.start, claim.end, claim.pid)
                if again:
                    self._table.set(wanted)
                else:
                    self._table.claim(wanted)

    def grace_over(self) -> None:
        """Go on: nobody may reclaim locks any more. May be said again."""
        if self._table.paused:
            self._table.resume()
            self._all_known.set()

    def closed(self, client_id: ClientId, ino: int) -> None:
        """Drop the locks of a client on an inode that it does not have open any more."""
        self._table.drop_ino(client_id, ino)

    def ended(self, client_id: ClientId) -> None:
        """Drop all locks of a client."""
        self._table.drop_client(client_id)
