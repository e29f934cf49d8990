"""Remember the newest attributes that this process has seen of each inode, and whether somebody else changed it.

Replies overtake each other: a lookup that was answered before a write was published may be processed after it. Versions
tell which is newer, so nobody is ever shown attributes older than those shown before.

The *epoch* of an inode changes whenever its version moved otherwise than by one change of our own. As long as it stays
the same, what a kernel cached of the file's data is still right.
"""

import math
import time
from collections import OrderedDict
from itertools import count

import msgspec

from ..limits import KNOWN_MAX
from ..model import Attrs


class _Fact:
    """Hold what is known of one inode."""

    __slots__ = ("attrs", "epoch", "seen_s")

    def __init__(self, attrs: Attrs, epoch: int) -> None:
        self.attrs = attrs
        self.epoch = epoch
        #: When a daemon said so last (monotonic); long ago if the inode is being changed.
        self.seen_s = 0.0


class Known:
    """Hold the newest attributes by inode, those of the ``count_max`` inodes seen last."""

    def __init__(self, count_max: int = KNOWN_MAX) -> None:
        self._count_max = count_max
        self._facts: OrderedDict[int, _Fact] = OrderedDict()
        self._epochs = count(1)
        #: Epochs up to this one are of no use any more.
        self._cleared = 0

    def see(self, attrs: Attrs, own: bool = False) -> Attrs:
        """Take attributes that a daemon sent; return the newest ones known of this inode.

        ``own``: they answer a change that this process asked for.
        """
        fact = self._facts.get(attrs.ino)
        if fact is None:
            if len(self._facts) >= self._count_max:
                self._facts.popitem(last=False)
            fact = self._facts[attrs.ino] = _Fact(attrs, next(self._epochs))
        elif attrs.version > fact.attrs.version:
            if not own or attrs.version != fact.attrs.version + 1:
                fact.epoch = next(self._epochs)
            fact.attrs = attrs
        elif attrs.version == fact.attrs.version and attrs != fact.attrs:
            # A read sets the access time and leaves the version; a truncation frees space behind its new version.
            fact.attrs = msgspec.structs.replace(
                fact.attrs,
                atime_ns=max(attrs.atime_ns, fact.attrs.atime_ns),
                allocated=min(attrs.allocated, fact.attrs.allocated),
            )
        if attrs.version >= fact.attrs.version:
            fact.seen_s = time.monotonic()
        self._facts.move_to_end(attrs.ino)
        return fact.attrs

    def age_s(self, ino: int) -> float:
        """Return how long ago a daemon said what is known of an inode; infinity if that is nothing, or in doubt."""
        fact = self._facts.get(ino)
        return time.monotonic() - fact.seen_s if fact is not None and fact.seen_s else math.inf

    def change(self, ino: int, attrs: Attrs | None) -> None:
        """Take note of a change of our own, and of what a daemon says the inode is like behind it; None: in doubt."""
        if attrs is not None:
            self.see(attrs, own=True)
        elif (fact := self._facts.get(ino)) is not None:
            fact.seen_s = 0.0

    def get(self, ino: int) -> Attrs | None:
        """Return the newest attributes seen of an inode, None if they are not remembered."""
        fact = self._facts.get(ino)
        return fact.attrs if fact is not None else None

    def epoch(self, ino: int) -> int:
        """Return the epoch of an inode; 0 if nothing is remembered. No two epochs ever are equal by chance."""
        fact = self._facts.get(ino)
        return fact.epoch if fact is not None else 0

    def resume(self, ino: int, epoch: int) -> None:
        """Give an inode the epoch back that it had before it was forgotten, as it has the same version as then.

        Nothing happens if everything was forgotten in between: after a power cut another change may have that version.
        """
        fact = self._facts.get(ino)
        if fact is not None and epoch > self._cleared:
            fact.epoch = epoch

    def forget(self, ino: int) -> None:
        """Forget an inode: it has gone, and nobody will ask for it again."""
        self._facts.pop(ino, None)

    def clear(self) -> None:
        """Forget everything: a daemon was started anew, and may have lost what it had not synced."""
        self._facts.clear()
        self._cleared = next(self._epochs)
