"""Be the reference for advisory locks: a table of bytes → owners and a list of who waits, with the rules of Linux."""

from benchfs_fuse.errors import Deadlock
from benchfs_fuse.model import ClientId, LockKind, LockType
from benchfs_fuse.services.advisory import Owner, Place, Wanted

READ, WRITE, UNLOCK = LockType.READ, LockType.WRITE, LockType.UNLOCK
POSIX, FLOCK = LockKind.POSIX, LockKind.FLOCK

#: Bytes that the model knows; requests reach up to the last one or to the end of the file.
BYTES = 12


class Plain:
    """Keep locks as a table of bytes → owners, and wait lists as a list, with the rules of Linux."""

    def __init__(self) -> None:
        self.bytes: dict[Place, list[dict[Owner, LockType]]] = {}
        self.waiting: list[Wanted] = []
        self.granted: list[int] = []

    def _of(self, wanted: Wanted) -> list[dict[Owner, LockType]]:
        table = self.bytes.setdefault(wanted.place, [{} for _ in range(BYTES)])
        return table[wanted.start : wanted.end + 1]

    def blockers(self, wanted: Wanted) -> set[Owner]:
        return {
            owner
            for held in self._of(wanted)
            for owner, type_ in held.items()
            if owner != wanted.owner and WRITE in (type_, wanted.type)
        }

    def apply(self, wanted: Wanted) -> None:
        for held in self._of(wanted):
            held.pop(wanted.owner, None)
            if wanted.type is not UNLOCK:
                held[wanted.owner] = wanted.type

    def deadlocked(self, wanted: Wanted) -> bool:
        reached, todo = set[Owner](), self.blockers(wanted)
        while todo:
            owner = todo.pop()
            reached.add(owner)
            for other in self.waiting:
                if other.owner == owner and other.place.kind is POSIX:
                    todo |= self.blockers(other) - reached
        return wanted.place.kind is POSIX and wanted.owner in reached

    def set(self, wanted: Wanted) -> bool | type[Deadlock] | None:
        if wanted.type is UNLOCK:
            self.apply(wanted)
            self.wake()
            return True
        flock = wanted.place.kind is FLOCK
        if flock and any(
            held.get(wanted.owner, READ) < wanted.type or wanted.owner not in held for held in self._of(wanted)
        ):
            self.apply(wanted._replace(type=UNLOCK))
        outcome: bool | None = True
        if not self.blockers(wanted):
            self.apply(wanted)
        elif not wanted.ticket:
            outcome = False
        elif self.deadlocked(wanted):
            return Deadlock
        else:
            self.waiting.append(wanted)
            outcome = None
        self.wake()
        return outcome

    def wake(self) -> None:
        """Grant the first that can be, then look again from the first."""
        while (ready := next((wanted for wanted in self.waiting if not self.blockers(wanted)), None)) is not None:
            self.waiting.remove(ready)
            self.apply(ready)
            self.granted.append(ready.ticket)

    def drop(self, client_id: ClientId) -> None:
        self.waiting = [wanted for wanted in self.waiting if wanted.owner.client_id != client_id]
        for table in self.bytes.values():
            for held in table:
                for owner in [owner for owner in held if owner.client_id == client_id]:
                    del held[owner]
        self.wake()
