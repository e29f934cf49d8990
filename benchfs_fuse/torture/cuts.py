"""Cut hosts off the network while workers work; see that nothing passes meanwhile, and that nothing is lost by it.

A cable is cut when operations are under way, and mended after moments, or when something has come of it (``Cut``). A
cut counts if operations were under way all the time. That nothing passes is seen twice: a connection cannot be made,
and not one packet has come out of the cable at either end. Otherwise there is no verdict.

Or a mount and one daemon are cut off from each other, and reach all others. Then packets are not counted, as others
pass: no connection between the two can be made, neither at the begin of the cut nor at its end, and one to the others
can. Where the mount is expelled meanwhile, the operations that were under way until then count.

A mount that was cut off for longer than its lease is expelled, by all daemons, also if it was cut off from one of them
at which it has something open. What its workers had done is looked at through another mount before the cable is
mended, when all daemons have dealt with the end of its session, and its locks can be had; and again when it has learnt
of that, and everything that it had still to send was on its way. In between nothing may have changed. A mount that
reaches other daemons learns of it from them, before the way is mended.
"""

import errno
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from ..errors import UserError
from .cluster import SOON_S, LocalCluster, Pair, wait_until
from .hands import Hand, Hands, Strike
from .manifest import Entry

#: The daemons' lease, s. A mount gives a connection up within half of it, and has the rest to come back.
LEASE_S = 20.0
#: Shortest and longest pause, s, beside the time, up to a second each, that it takes to see that no connection can be
#: made.
PAUSE_S = (0.3, 2.5)


class Cut(Enum):
    """Say when a cable is mended."""

    #: After moments: connections outlive it, or may.
    PAUSE = "short"
    #: When the connections over it were given up: new ones are made, and requests are sent again.
    BREAK = "until connections were given up"
    #: When the lease of the mount behind it has run out.
    EXPEL = "longer than the lease"
    #: Likewise, where the mount is cut off from one daemon alone.
    EXPEL_BY_ONE = "longer than the lease of one"


#: How often which, of so many cuts.
CUTS = (*[Cut.PAUSE] * 14, *[Cut.BREAK] * 4, Cut.EXPEL, Cut.EXPEL_BY_ONE)


def _mount(place: Path | int | Pair) -> Path | None:
    """Return the mount that is cut off."""
    match place:
        case Pair(mount=mount):
            return mount
        case Path():
            return place
    return None


def _title(place: Path | int | Pair) -> str:
    match place:
        case Pair():
            return "a mount from a daemon"
        case Path():
            return "a mount"
    return "a daemon"


class Cuts:
    """Cut one cable after the other. ``aim`` waits for a moment in which some of the workers have something under way.

    ``excused`` tells whether a worker's operation failed as it may anyhow. ``kinds`` come in any order, each as often
    as it is among them. UserError: a cable that is cut lets something pass.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        hands: Hands,
        chance: random.Random,
        kinds: Sequence[Cut],
        aim: Callable[[Sequence[Hand]], None],
        excused: Callable[[Hand], bool],
    ) -> None:
        self._cluster = cluster
        self._hands = hands
        self._random = chance
        self._kinds = kinds
        #: What is left of them until they begin anew.
        self._left: list[Cut] = []
        self._aim = aim
        self._excused = excused
        #: Cuts by who was cut off and for how long: those that met operations under way, and those that met none.
        self.done: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        #: Operations that were under way all the time, by kind.
        self.struck: Counter[str] = Counter()

    def cut(self) -> list[str]:
        """Cut and mend one cable, or one way; say what is wrong. Returns when traffic passes and all workers work."""
        if not self._left:
            self._left = self._random.sample(self._kinds, len(self._kinds))
        kind = self._left.pop()
        mount = self._random.choice(self._cluster.mountpoints)
        daemon = self._random.randrange(len(self._cluster.data_dirs))
        match kind:
            case Cut.EXPEL:
                return self._cut(kind, mount)
            case Cut.EXPEL_BY_ONE:
                return self._cut(kind, Pair(mount, daemon))
        places: list[Path | int | Pair] = [mount, daemon, Pair(mount, daemon)]
        return self._cut(kind, self._random.choice(places))

    def _cut(self, kind: Cut, place: Path | int | Pair) -> list[str]:
        hands = [hand for hand in self._hands.hands if hand.mount == _mount(place)]
        before: dict[Hand, list[Entry]] = {}
        complaints: list[str] = []
        self._aim(hands)
        with self._nothing_passes(place) as strike:
            match kind, place:
                case Cut.EXPEL, Path():
                    complaints = self._wait_over(place, hands, before)
                case Cut.EXPEL_BY_ONE, Pair():
                    # It holds what the daemon knows that it holds: nothing of it gets there.
                    if self._cluster.holds(place, self._other(place.mount)):
                        complaints = self._wait_over(place.mount, hands, before)
                        complaints = complaints or self._see_expelled(place.mount, hands)
                        strike.struck += self._hands.failed_since(strike, hands)
                case Cut.BREAK, _:
                    complaints = self._wait_given_up(place)
                case _:
                    time.sleep(self._random.uniform(*PAUSE_S))
        if not wait_until(lambda: self._cluster.passes(place)):
            raise UserError("a cable that is mended lets no connection pass")
        mount = _mount(place)
        if mount is not None and before and not complaints:
            complaints = self._see_expelled(mount, hands) or self._replace(mount, hands, before)
        struck = self._hands.struck(strike)
        if kind is Cut.EXPEL_BY_ONE and not before:
            struck = []  # nothing was open there
        title = f"of {_title(place)}, {kind.value}"
        (self.done if struck else self.missed)[title] += 1
        self.struck.update(struck)
        return complaints

    @contextmanager
    def _nothing_passes(self, place: Path | int | Pair) -> Iterator[Strike]:
        """Cut for the time of a block, and note what is under way. UserError: something passes."""
        if isinstance(place, Pair):
            way = self._cluster.way(place)
            way.cut()
            with self._hands.striking() as strike:
                self._see_parted(place)
                yield strike
                self._see_parted(place)
            way.mend()
            return
        cable = self._cluster.cable(place)
        cable.cut()
        with self._hands.striking() as strike:
            passed = cable.passed()
            if self._cluster.passes(place):
                raise UserError("a cable that is cut lets a connection pass")
            yield strike
            if cable.passed() != passed:
                raise UserError("a cable that is cut lets packets pass")
        cable.mend()

    def _see_parted(self, pair: Pair) -> None:
        if not self._cluster.parted(pair):
            raise UserError("a way that is cut lets a connection pass, or others do not")

    def _other(self, mount: Path) -> Path:
        """Return another mount."""
        return next(path for path in self._cluster.mountpoints if path != mount)

    def _wait_given_up(self, place: Path | int | Pair) -> list[str]:
        """Wait until whoever is cut off from a daemon has given its connection up."""

        def given_up() -> bool:
            mount = _mount(place)
            mounts = [mount] if mount is not None else self._cluster.mountpoints
            daemon_id = place.daemon if isinstance(place, Pair) else place
            reports = [self._cluster.ask(path) for path in mounts]
            return not any(
                daemon.connected
                for report in reports
                if report is not None
                for daemon in report.daemons
                if isinstance(place, Path) or daemon.daemon_id == daemon_id
            )

        if wait_until(given_up, LEASE_S):
            return []
        return [f"connections over a cable that was cut are not given up after {LEASE_S:g} s"]

    def _wait_over(self, place: Path, hands: Sequence[Hand], before: dict[Hand, list[Entry]]) -> list[str]:
        """Wait for the end of a mount's session; see that its locks can be had, look at what its workers had done."""
        other = self._other(place)
        process = self._cluster.process_of(place)
        if not wait_until(lambda: self._cluster.sessions_over([process], other), LEASE_S + SOON_S):
            return [f"the session of {place.name}, which was cut off, has not ended {SOON_S:g} s after its lease"]
        others = [hand.number for hand in self._hands.hands if hand not in hands]
        if sentence := self._hands.run("lock", other / self._hands.together, others):
            return [sentence]
        for hand in hands:
            found = self._hands.look(other / hand.name)
            if isinstance(found, str):
                return [found]
            before[hand] = found
        return []

    def _see_expelled(self, place: Path, hands: Sequence[Hand]) -> list[str]:
        """See that an expelled mount says so, to its workers too."""

        def says_so() -> bool:
            report = self._cluster.ask(place)
            return report is not None and bool(report.expelled)

        if not wait_until(says_so):
            return [f"{place.name} does not say that it was expelled"]
        if not self._hands.wait_failed(hands):
            return [f"{place.name} was expelled, and a worker goes on: {[hand.under_way for hand in hands]}"]
        return [
            f"{hand.label}: {hand.under_way} failed with {errno.errorcode.get(hand.failed, hand.failed)}, not ESTALE"
            for hand in hands
            if hand.failed not in (None, errno.ESTALE) and not self._excused(hand)
        ]

    def _replace(self, place: Path, hands: Sequence[Hand], before: dict[Hand, list[Entry]]) -> list[str]:
        """Mount anew in the place of an expelled mount; see that all is as it was before."""
        complaints: list[str] = []
        self._cluster.kill([], [place])
        for hand in hands:
            self._hands.bury(hand)
            complaints += self._hands.settle(hand, before[hand])
        self._cluster.start([], [place])
        if complaints:
            return complaints
        return [f"{one} (after the end of its session)" for one in self._hands.start(hands)]
