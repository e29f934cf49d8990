"""Keep the advisory locks of one daemon: who holds which bytes of which inode, who waits, and who would wait for ever.

Pure logic: no I/O, no clock. What happened to a request that waited is told by a callback, in the step that brings it
about. The rules are those of Linux for a local file system (fcntl(2), flock(2)):

- Locks of the two kinds do not see each other. Locks of one owner never stand in its own way: a new one replaces what
  the owner had of these bytes, which splits, joins, upgrades or downgrades it.
- A request is granted if no *held* lock stands in its way, whatever waits: a reader that holds a lock twice, through
  two handles, would otherwise wait for a writer that waits for it. What waits is granted in the order in which it came,
  as soon as nothing held is in its way; so of those that exclude each other the first comes first.
- POSIX: a request that would wait for its own owner, over whatever other owners of any inode of this daemon, is a
  Deadlock. Owners are what waits here, as on Linux: of a process with several threads it is assumed that one that waits
  means all. Locks on inodes of other daemons are not seen.
- flock: a conversion gives the old lock back first, also if it then has to wait or is refused. So two owners that both
  convert a shared lock do not block each other.

While ``paused``, no owner gets bytes that it does not have: there may be locks that are not known yet.

Limits: LOCKS_MAX ranges and waiting requests of one client; an unlock that would split a range counts like a lock, as
on Linux. A grant may exceed it by two.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Generic, NamedTuple, TypeVar

from ..errors import Deadlock, InvalidArgument, NoLocks
from ..limits import LOCKS_MAX
from ..model import LOCK_END, ClientId, LockKind, LockType

V = TypeVar("V")

_START, _END = itemgetter(0), itemgetter(1)


class Ranges(Generic[V]):
    """Give values to ranges of bytes. Pieces are sorted and disjoint; neighbours of equal value are one piece."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int, V]] = []

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[tuple[int, int, V]]:
        return iter(self._pieces)

    def overlapping(self, start: int, end: int) -> list[tuple[int, int, V]]:
        """Return the pieces that have bytes between ``start`` and ``end``, whole."""
        first = bisect_left(self._pieces, start, key=_END)
        return self._pieces[first : bisect_right(self._pieces, end, first, key=_START)]

    def segments(self, start: int, end: int) -> list[tuple[int, int, V | None]]:
        """Divide ``start`` to ``end`` into pieces, cut to size, and gaps (None)."""
        found: list[tuple[int, int, V | None]] = []
        for first, last, value in self.overlapping(start, end):
            if start < first:
                found.append((start, first - 1, None))
            found.append((max(start, first), min(end, last), value))
            start = last + 1
        if start <= end:
            found.append((start, end, None))
        return found

    def change(self, start: int, end: int, new: Callable[[V | None], V | None]) -> None:
        """Give every piece and gap between ``start`` and ``end`` the value that ``new`` makes of its own."""
        pieces = self._pieces
        first = bisect_left(pieces, start - 1, key=_END)
        last = bisect_right(pieces, end + 1, first, key=_START)
        old = pieces[first:last]
        made = [(piece[0], min(piece[1], start - 1), piece[2]) for piece in old if piece[0] < start]
        for one, other, value in self.segments(start, end):
            changed = new(value)
            if changed is not None:
                made.append((one, other, changed))
        made += [(max(piece[0], end + 1), piece[1], piece[2]) for piece in old if piece[1] > end]
        joined: list[tuple[int, int, V]] = []
        for piece in made:
            if joined and joined[-1][1] + 1 == piece[0] and joined[-1][2] == piece[2]:
                joined[-1] = (joined[-1][0], piece[1], piece[2])
            else:
                joined.append(piece)
        pieces[first:last] = joined


class Owner(NamedTuple):
    """Name whoever holds locks: one of the owners that a client knows by number."""

    client_id: ClientId
    number: int


class Place(NamedTuple):
    """Name what is locked: one inode, by locks of one kind."""

    ino: int
    kind: LockKind


class Held(NamedTuple):
    """Describe the lock on one range."""

    type: LockType
    pid: int


class Wanted(NamedTuple):
    """Be one request for a lock. ``ticket`` is its client's name for it; 0: it does not wait."""

    place: Place
    owner: Owner
    type: LockType
    start: int
    end: int
    pid: int = 0
    ticket: int = 0


class Answer(NamedTuple):
    """Say what became of a request: True, done; False, refused; None, it waits. ``version`` is that of its change."""

    outcome: bool | None
    version: int


class Conflict(NamedTuple):
    """Describe a lock that stands in the way."""

    owner: Owner
    type: LockType
    start: int
    end: int
    pid: int


#: A request that waits: its client and its ticket.
_Ticket = tuple[ClientId, int]


class _Locked:
    """Hold what is locked and wanted at one place."""

    __slots__ = ("held", "waiting", "writers")

    def __init__(self) -> None:
        self.held: dict[Owner, Ranges[Held]] = {}
        #: Owners that hold anything exclusively: the only ones in a reader's way.
        self.writers: set[Owner] = set()
        #: Requests in the order in which they came.
        self.waiting: dict[_Ticket, Wanted] = {}


class LockTable:
    """Hold all advisory locks of a daemon.

    ``on_granted(client, ticket, version)`` is called for each request that waited and is granted, with the version of
    the change; with version 0 for one that waits no more because it never could be granted (Deadlock if asked again).
    Versions grow from ``version`` on. ``paused`` until ``resume``.
    """

    def __init__(
        self, on_granted: Callable[[ClientId, int, int], None], *, version: int = 0, locks_max: int = LOCKS_MAX
    ) -> None:
        self._on_granted = on_granted
        self._locks_max = locks_max
        #: Number of the newest change.
        self.version = version
        self.paused = True
        self._places: dict[Place, _Locked] = {}
        #: Requests that wait, by ticket, and those for POSIX locks by owner.
        self._tickets: dict[_Ticket, Wanted] = {}
        self._waiting: dict[Owner, dict[_Ticket, Wanted]] = {}
        #: Ranges and waiting requests of each client, and at which places: owners and requests, counted.
        self._counts: Counter[ClientId] = Counter()
        self._where: dict[ClientId, Counter[Place]] = {}

    def __len__(self) -> int:
        """Return how many ranges are held and requests wait."""
        return sum(self._counts.values())

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def set(self, wanted: Wanted) -> Answer:
        """Lock or unlock. A request whose ticket waits already goes on waiting (version 0: it changes nothing).

        InvalidArgument, Deadlock, NoLocks: nothing happened.
        """
        if not 0 <= wanted.start <= wanted.end <= LOCK_END or wanted.ticket < 0:
            raise InvalidArgument(f"lock of bytes {wanted.start} to {wanted.end}")
        flock = wanted.place.kind is LockKind.FLOCK
        if flock and (wanted.start, wanted.end) != (0, LOCK_END):
            raise InvalidArgument("flock locks whole files")
        if (wanted.owner.client_id, wanted.ticket) in self._tickets:
            return Answer(None, 0)
        self._check_limit(wanted)
        covered = self._covered(wanted)
        replaces = self._holds(wanted)
        if flock and replaces and not covered:
            self._apply(wanted._replace(type=LockType.UNLOCK))
        outcome: bool | None = True
        if covered or (not self.paused and next(self._conflicts(wanted), None) is None):
            self._apply(wanted)
        elif not wanted.ticket:
            outcome = False
        elif self._deadlocked(wanted):
            raise Deadlock(f"inode {wanted.place.ino}, bytes {wanted.start} to {wanted.end}")
        else:
            outcome = None
            self._enqueue(wanted)
        answer = Answer(outcome, self.version)
        if replaces and (outcome or flock):
            self._wake(wanted.place, wanted.start, wanted.end)
        return answer

    def get(self, wanted: Wanted) -> Conflict | None:
        """Return the lock that stands in the way of a request, the first one in the file if there are several."""
        return min(self._conflicts(wanted), key=lambda conflict: conflict.start, default=None)

    def cancel(self, client_id: ClientId, ticket: int) -> bool:
        """Let a request wait no more; False if it does not wait."""
        wanted = self._tickets.get((client_id, ticket))
        if wanted is not None:
            self._dequeue(wanted)
        return wanted is not None

    def claim(self, wanted: Wanted) -> None:
        """Give an owner back what it held before this table was made, whatever stands in the way.

        Nothing should. What does is a lock that was given back and whose owner has not heard so: it says it again.
        NoLocks.
        """
        self._check_limit(wanted)
        self._apply(wanted)

    def drop_client(self, client_id: ClientId) -> None:
        """Forget a client: what it holds, and what it waits for."""
        for place in list(self._where.get(client_id, ())):
            self._drop(client_id, place)

    def drop_ino(self, client_id: ClientId, ino: int) -> None:
        """Forget what a client holds and waits for at one inode."""
        for kind in LockKind:
            self._drop(client_id, Place(ino, kind))

    def _drop(self, client_id: ClientId, place: Place) -> None:
        locked = self._places.get(place)
        if locked is None:
            return
        for wanted in [wanted for wanted in locked.waiting.values() if wanted.owner.client_id == client_id]:
            self._dequeue(wanted)
        for owner in [owner for owner in locked.held if owner.client_id == client_id]:
            self._apply(Wanted(place, owner, LockType.UNLOCK, 0, LOCK_END))
        self._wake(place, 0, LOCK_END)

    def resume(self) -> None:
        """Grant what nothing stands in the way of, now that all locks are known."""
        self.paused = False
        for place in list(self._places):
            self._wake(place, 0, LOCK_END)
        for wanted in list(self._tickets.values()):
            if self._deadlocked(wanted):
                self._dequeue(wanted)
                self._on_granted(wanted.owner.client_id, wanted.ticket, 0)

    # ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_limit(self, wanted: Wanted) -> None:
        """Raise NoLocks if a request could add to what its client holds, and that is too much already."""
        if self._counts[wanted.owner.client_id] < self._locks_max:
            return
        if wanted.type is LockType.UNLOCK:
            locked = self._places.get(wanted.place)
            held = locked.held.get(wanted.owner) if locked is not None else None
            pieces = held.overlapping(wanted.start, wanted.end) if held is not None else []
            if not any(start < wanted.start and wanted.end < end for start, end, _ in pieces):
                return
        raise NoLocks(f"{self._locks_max} locks")

    def _covered(self, wanted: Wanted) -> bool:
        """Tell whether the owner has all these bytes already, so that it gets nothing that could be another's."""
        if wanted.type is LockType.UNLOCK:
            return True
        locked = self._places.get(wanted.place)
        held = locked.held.get(wanted.owner) if locked is not None else None
        return held is not None and all(
            value is not None and value.type >= wanted.type for _, _, value in held.segments(wanted.start, wanted.end)
        )

    def _holds(self, wanted: Wanted) -> bool:
        """Tell whether the owner has any of these bytes."""
        locked = self._places.get(wanted.place)
        held = locked.held.get(wanted.owner) if locked is not None else None
        return held is not None and bool(held.overlapping(wanted.start, wanted.end))

    def _conflicts(self, wanted: Wanted) -> Iterator[Conflict]:
        """Yield the locks that stand in the way."""
        locked = self._places.get(wanted.place)
        if locked is None:
            return
        exclusive = wanted.type is LockType.WRITE
        for owner in locked.held if exclusive else locked.writers:
            if owner != wanted.owner:
                for start, end, held in locked.held[owner].overlapping(wanted.start, wanted.end):
                    if exclusive or held.type is LockType.WRITE:
                        yield Conflict(owner, held.type, start, end, held.pid)

    def _deadlocked(self, wanted: Wanted) -> bool:
        """Tell whether a request would wait for its own owner."""
        if wanted.place.kind is LockKind.FLOCK:
            return False
        seen: set[Owner] = set()
        todo = [wanted]
        while todo:
            for owner in {conflict.owner for conflict in self._conflicts(todo.pop())} - seen:
                if owner == wanted.owner:
                    return True
                seen.add(owner)
                todo.extend(self._waiting.get(owner, {}).values())
        return False

    def _apply(self, wanted: Wanted) -> None:
        """Change what an owner holds."""
        self.version += 1
        place, owner = wanted.place, wanted.owner
        locked = self._places.get(place)
        held = locked.held.get(owner) if locked is not None else None
        if held is None:
            if wanted.type is LockType.UNLOCK:
                return
            locked = locked or self._places.setdefault(place, _Locked())
            held = locked.held[owner] = Ranges()
            self._where.setdefault(owner.client_id, Counter())[place] += 1
        assert locked is not None
        before = len(held)
        lock = Held(wanted.type, wanted.pid) if wanted.type is not LockType.UNLOCK else None
        held.change(wanted.start, wanted.end, lambda old: lock)
        self._count(owner.client_id, len(held) - before)
        if wanted.type is LockType.WRITE:
            locked.writers.add(owner)
        elif owner in locked.writers and not any(value.type is LockType.WRITE for _, _, value in held):
            locked.writers.discard(owner)
        if not held:
            del locked.held[owner]
            self._leave(owner.client_id, place, locked)

    def _wake(self, place: Place, start: int, end: int) -> None:
        """Grant what waits for bytes between ``start`` and ``end`` and can have them, in the order in which it came.

        A grant may be a downgrade, for which others wait that were passed by already: then once more from the first.
        """
        locked = self._places.get(place)
        again = locked is not None and not self.paused
        while again:
            assert locked is not None
            again = False
            taken: Owner | None = None  # who has all of these bytes exclusively now
            for wanted in list(locked.waiting.values()):
                if wanted.start > end or wanted.end < start or taken not in (None, wanted.owner):
                    continue
                if next(self._conflicts(wanted), None) is not None:
                    continue
                downgrade = wanted.type is LockType.READ and wanted.owner in locked.writers
                self._dequeue(wanted)
                self._apply(wanted)
                self._on_granted(wanted.owner.client_id, wanted.ticket, self.version)
                if wanted.type is LockType.WRITE and wanted.start <= start and end <= wanted.end:
                    taken = wanted.owner
                if downgrade:
                    start, end, again = min(start, wanted.start), max(end, wanted.end), True
                    break

    def _enqueue(self, wanted: Wanted) -> None:
        ticket = (wanted.owner.client_id, wanted.ticket)
        self._places.setdefault(wanted.place, _Locked()).waiting[ticket] = wanted
        self._tickets[ticket] = wanted
        if wanted.place.kind is LockKind.POSIX:
            self._waiting.setdefault(wanted.owner, {})[ticket] = wanted
        self._count(wanted.owner.client_id, 1)
        self._where.setdefault(wanted.owner.client_id, Counter())[wanted.place] += 1

    def _dequeue(self, wanted: Wanted) -> None:
        ticket = (wanted.owner.client_id, wanted.ticket)
        locked = self._places[wanted.place]
        del locked.waiting[ticket], self._tickets[ticket]
        if wanted.place.kind is LockKind.POSIX:
            waiting = self._waiting[wanted.owner]
            del waiting[ticket]
            if not waiting:
                del self._waiting[wanted.owner]
        self._count(wanted.owner.client_id, -1)
        self._leave(wanted.owner.client_id, wanted.place, locked)

    def _count(self, client_id: ClientId, number: int) -> None:
        self._counts[client_id] += number
        if not self._counts[client_id]:
            del self._counts[client_id]

    def _leave(self, client_id: ClientId, place: Place, locked: _Locked) -> None:
        """Forget a place that nobody holds or waits for any more."""
        where = self._where[client_id]
        where[place] -= 1
        if not where[place]:
            del where[place]
            if not where:
                del self._where[client_id]
        if not locked.held and not locked.waiting:
            del self._places[place]
