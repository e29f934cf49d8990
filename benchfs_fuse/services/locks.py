"""Lock what transactions have prepared, shared or exclusive, and wait by event, never by timer.

A lock is named by the key in the store that it protects:

    D directory, name   exclusive: the entry is about to change (PutEntry, DropEntry)
    I ino               shared: the directory must stay (PutEntry, DropEntry in it); exclusive: the inode itself is
                        about to change its links, to go or to be made (DropDir, AddLink, DropLink, Moved, NewInode)
    P ino               exclusive: the file is being cut; nobody else may publish data or open it for writing

Only transactions over several daemons and truncations hold locks, because only they wait between looking and changing.
Everything else runs in one go and merely checks that nobody holds what it needs. All locks of one transaction at one
daemon are taken at once, so that nobody holds one while waiting for another of the same daemon.
"""

from collections.abc import Mapping

import trio

#: Keys → whether exclusively.
Wanted = Mapping[bytes, bool]


class Blocked(Exception):
    """Tell that a lock stands in the way. Never leaves the services."""

    def __init__(self, released: trio.Event) -> None:
        super().__init__()
        self.released = released


class _Held:
    """Hold one lock: exclusive, or shared by ``sharers``. ``released`` is set when it has gone."""

    __slots__ = ("released", "sharers")

    def __init__(self, exclusive: bool) -> None:
        self.sharers = 0 if exclusive else 1
        self.released = trio.Event()


class Locks:
    """Hold the locks of one daemon, in memory; those of prepared transactions are taken again after a start."""

    def __init__(self) -> None:
        self._held: dict[bytes, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def check(self, wanted: Wanted) -> None:
        """Return if all of ``wanted`` could be taken now; raise Blocked if not."""
        if not self._held:
            return
        for key, exclusive in wanted.items():
            held = self._held.get(key)
            if held is not None and (exclusive or not held.sharers):
                raise Blocked(held.released)

    def check_exclusive(self, key: bytes) -> None:
        """Return if nobody holds ``key``; raise Blocked if somebody does."""
        if self._held and (held := self._held.get(key)) is not None:
            raise Blocked(held.released)

    def take(self, wanted: Wanted) -> None:
        """Take all of ``wanted``, which must be free."""
        self.check(wanted)
        for key, exclusive in wanted.items():
            held = self._held.get(key)
            if held is None:
                self._held[key] = _Held(exclusive)
            else:
                held.sharers += 1

    def release(self, wanted: Wanted) -> None:
        """Give back what ``take`` took; wake those who wait for it."""
        for key in wanted:
            held = self._held[key]
            if held.sharers > 1:
                held.sharers -= 1
            else:
                del self._held[key]
                held.released.set()

    async def wait_free(self, wanted: Wanted) -> None:
        """Wait until all of ``wanted`` could be taken; true until the next await."""
        while True:
            try:
                self.check(wanted)
                return
            except Blocked as blocked:
                await blocked.released.wait()

    async def acquire(self, wanted: Wanted) -> None:
        """Wait until all of ``wanted`` can be taken, then take them. Cancelled: nothing was taken."""
        await self.wait_free(wanted)
        self.take(wanted)
