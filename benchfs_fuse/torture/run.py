"""Run a torture from its begin to its verdict.

Workers go on while processes are killed and come back, and hosts are cut off and joined again. In the end everything
that was acknowledged is compared with what a fresh mount shows, the daemons have to come to rest, ``benchfs check`` has
to find nothing, and when all files are removed no chunk may be left. The first complaint ends the run.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from .. import mountpoints
from ..errors import UserError
from ..kernel_mounts import plain_path
from .cluster import LocalCluster, wait_until
from .cuts import CUTS, LEASE_S, Cut, Cuts
from .damage import DIRECTORY, Damage
from .hands import Hand, Hands

DAEMONS = 2
MOUNTS = 2
#: Seconds for the daemons to finish what goes on behind the service, a dead mount's files included.
REST_S = 120.0
#: Longest pause between two kills, and longest time that something stays dead on purpose, s.
PAUSE_S = 1.0
DEAD_S = 0.3
#: Where the disks are filled, and the operations that may then fail: names, holes and removals may not.
FILL = "fill"
TAKES_SPACE = ("write", "write_synced", "append", "fsync", "close", "log", "count", "hold")
#: Share of the moments between kills in which a chunk file is taken away.
LOSE_SHARE = 0.3
#: Longest wait for an operation of the kind that is aimed at, s; and mean time after its begin to strike, s.
AIM_S = 0.5
AIM_DELAY_S = 0.001
#: Shares of kills that strike all daemons, and a mount together with daemons.
ALL_SHARE = 0.4
BOTH_SHARE = 0.2
#: Kinds of operations that are aimed at.
AIMS = (
    *("create", "write", "write_synced", "append", "truncate", "punch", "fsync", "close", "rename", "link", "unlink"),
    *("mkdir", "rmdir", "chmod", "setxattr", "utimens", "read", "count", "move", "claim", "log", "hold"),
)
#: Seconds for ``benchfs check``.
CHECK_S = 300.0

DAEMON_KILLS = "daemons"
MOUNT_KILLS = "mounts"


class Plan(NamedTuple):
    """Say what to do. ``mountpoint`` None: a cluster of one's own, which can be hurt."""

    mountpoint: Path | None
    seconds: float
    seed: int
    workers: int
    #: What is killed: DAEMON_KILLS, MOUNT_KILLS.
    kill: frozenset[str] = frozenset()
    #: Whether chunk files are taken away from files that nobody changes.
    lose_chunks: bool = False
    #: Whether the disks are filled and emptied.
    fill_disk: bool = False
    #: Whether hosts are cut off the network.
    cut_network: bool = False
    #: End when so many kills and so many cuts have struck.
    kills_max: int | None = None
    cuts_max: int | None = None
    #: Which cuts there are, in any order.
    cuts: Sequence[Cut] = CUTS
    #: What is started as a daemon: tests plant faults.
    daemon_module: str = "benchfs_fuse.daemon"


class Verdict(NamedTuple):
    """Say what came of it. ``complaints`` empty: everything that was acknowledged is there."""

    complaints: list[str]
    seconds: float
    operations: Counter[str]
    #: Kills by what was killed: those that struck operations under way, and those that met none.
    kills: Counter[str]
    missed: Counter[str]
    #: Operations under way when something was killed, by kind.
    struck: Counter[str]
    #: Cuts by what was cut off for how long, and the operations under way all the time, likewise.
    cuts: Counter[str]
    cuts_missed: Counter[str]
    cut_off: Counter[str]
    #: A signal ended it early.
    interrupted: bool
    #: Chunk files that were taken away or cut short.
    lost_chunks: int
    #: How often the disks were full, and operations that were refused for that.
    fills: int
    refused: int
    #: Where everything was kept, because something is wrong; and where what was made in a mount of others was left.
    kept: Path | None
    left: Path | None


#: Be told what is going on: seconds so far, operations, kills and cuts.
Tell = Callable[[str, float, int, int], None]


def torture(plan: Plan, tell: Tell) -> Verdict:
    """Do it. Main thread only: SIGINT and SIGTERM end it early. UserError: it could not be done."""
    directory = Path(tempfile.mkdtemp(prefix="benchfs-torture-"))
    keep, run = True, None
    try:
        with ExitStack() as stack:
            run = _Run(plan, tell, directory, stack)
            with run.stopped_by_signals():
                verdict = run.run()
        keep = bool(verdict.complaints)
        if keep:
            (directory / "complaints").write_text("".join(f"{one}\n" for one in verdict.complaints))
    except (UserError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{error}; {_kept(directory, run)}") from error
    except KeyboardInterrupt:
        keep = False
        raise
    except Exception as error:
        error.add_note(_kept(directory, run))
        raise
    finally:
        if not keep:
            shutil.rmtree(directory)
    return verdict


def _kept(directory: Path, run: "_Run | None") -> str:
    left = f", what the workers made is left in {run.left}" if run is not None and run.left is not None else ""
    return f"logs are kept in {directory}{left}"


class _Run:
    """Be one run."""

    def __init__(self, plan: Plan, tell: Tell, directory: Path, stack: ExitStack) -> None:
        self._plan = plan
        self._tell = tell
        self._directory = directory
        self._random = random.Random(plan.seed)
        self._stop = False
        self._kills: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()
        self._struck: Counter[str] = Counter()
        self._cluster: LocalCluster | None = None
        self._damage: Damage | None = None
        self._cuts: Cuts | None = None
        self._fills = 0
        self._refused = 0
        self._full = False
        # The directories in the root, and those in them, are spread over the daemons: there is more to go wrong.
        self._base = "" if plan.mountpoint is None else f"torture-{os.getpid()}/"
        if plan.mountpoint is None:
            self._cluster = LocalCluster(
                directory,
                daemons=DAEMONS,
                mounts=MOUNTS,
                daemon_module=plan.daemon_module,
                small_disks=plan.fill_disk,
                lease_s=LEASE_S if plan.cut_network else None,
            )
            mounts, self._registry = self._cluster.mountpoints, self._cluster.registry
        else:
            mountpoint = plain_path(plan.mountpoint)
            self._registry = Path(mountpoints.look(mountpoint).served()[1].registry)
            mounts = [mountpoint]
        self._mounts = mounts
        self._stack = stack
        self._hands = Hands(directory, mounts, self._base, plan.workers, plan.seed, plan.fill_disk)
        if self._cluster is not None and plan.cut_network:
            self._cuts = Cuts(self._cluster, self._hands, self._random, plan.cuts, self._aim, self._found_no_room)
        self._begun_s = time.monotonic()
        #: What was made in a mount of others, until it is removed.
        self.left: Path | None = None

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the work; a second one ends everything at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self) -> Verdict:
        """Go through all of it."""
        self._show("starting")
        # Below the workers: a process that waits for a mount is freed by the end of the mount.
        self._stack.enter_context(self._hands)
        if self._cluster is not None:
            self._stack.enter_context(self._cluster)
        before = self._check() if self._cluster is None else []
        complaints = self._prepare() or self._work() or self._finish(before)
        interrupted, cuts = self._stop, self._cuts
        return Verdict(
            complaints,
            time.monotonic() - self._begun_s,
            self._hands.acknowledged,
            self._kills,
            self._missed,
            self._struck,
            cuts.done if cuts is not None else Counter(),
            cuts.missed if cuts is not None else Counter(),
            cuts.struck if cuts is not None else Counter(),
            interrupted,
            len(self._damage.left) if self._damage is not None else 0,
            self._fills,
            self._refused,
            self._directory if complaints else None,
            self.left,
        )

    def _show(self, what: str) -> None:
        done = sum(self._hands.acknowledged.values())
        cuts = self._cuts.done.total() if self._cuts is not None else 0
        self._tell(what, time.monotonic() - self._begun_s, done, self._kills.total() + cuts)

    # ── working ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _prepare(self) -> list[str]:
        """Make what workers need. UserError: nothing can be made there."""
        mount = self._mounts[0]
        sentence = self._hands.run("make", mount / self._base, [Path(hand.name).name for hand in self._hands.hands])
        if not sentence and self._cluster is None:
            self.left = mount / self._base
        if sentence := sentence or self._hands.run("prepare", mount / self._hands.together):
            raise UserError(sentence)
        if self._plan.lose_chunks and self._cluster is not None:
            if sentence := self._hands.run("keep", mount / DIRECTORY):
                return [sentence]
            kept = self._hands.look(mount / DIRECTORY)
            if isinstance(kept, str):
                return [kept]
            self._damage = Damage(self._cluster, kept, self._random)
        return self._hands.start(self._hands.hands)

    def _work(self) -> list[str]:
        end_s = time.monotonic() + self._plan.seconds
        while not self._stop and (left_s := end_s - time.monotonic()) > 0:
            self._show("working")
            self._pause(min(left_s, self._random.uniform(0, PAUSE_S)))
            complaints = self._strike()
            if self._damage is not None and self._random.random() < LOSE_SHARE:
                self._damage.lose()
            complaints = complaints or self._fill(not self._full) or self._revive() or self._look_after()
            if complaints:
                return complaints
            if self._struck_enough():
                break
        return self._fill(False) or self._revive() or self._hands.stop() or self._revive(False) or self._look_after()

    def _strike(self) -> list[str]:
        """Kill something, or cut something off."""
        ways = [self._kill] if self._plan.kill else []
        if self._cuts is not None:
            ways.append(self._cuts.cut)
        return self._random.choice(ways)() if ways and not self._stop else []

    def _struck_enough(self) -> bool:
        """Tell whether there were as many faults as were wanted."""
        cuts = self._cuts.done.total() if self._cuts is not None else 0
        wanted = ((self._plan.kills_max, self._kills.total()), (self._plan.cuts_max, cuts))
        enough = [done >= most for most, done in wanted if most is not None]
        return bool(enough) and all(enough)

    def _pause(self, seconds: float) -> None:
        with self._hands.changed:
            self._hands.changed.wait_for(lambda: self._stop, seconds)

    def _look_after(self) -> list[str]:
        complaints = self._hands.complaints()
        complaints += [
            f"{hand.label}: {hand.under_way} failed with {errno.errorcode.get(hand.failed or 0, hand.failed)}"
            for hand in self._hands.failed()
            if not self._found_no_room(hand)
        ]
        if self._cluster is not None:
            complaints += [f"{name} has died by itself" for name in self._cluster.dead()]
        return complaints

    def _fill(self, full: bool) -> list[str]:
        """Fill the disks, or make room, which always works."""
        if not self._plan.fill_disk or full == self._full:
            return []
        sentence = self._hands.run("fill" if full else "remove", self._mounts[0] / FILL)
        self._full = full
        self._fills += full
        return [sentence] if sentence else []

    def _found_no_room(self, hand: Hand) -> bool:
        """Tell whether a worker's operation failed as it may on a full disk."""
        under_way = hand.under_way
        return (
            self._plan.fill_disk
            and hand.failed == errno.ENOSPC
            and under_way is not None
            and under_way[0] in TAKES_SPACE
        )

    def _revive(self, go_on: bool = True) -> list[str]:
        """Have workers that found no room begin anew."""
        refused = [hand for hand in self._hands.failed() if self._found_no_room(hand)]
        for hand in refused:
            self._hands.bury(hand)
        self._refused += len(refused)
        if not go_on:
            for hand in refused:
                hand.failed = None  # it is compared in the end
            return []
        return self._restart(refused)

    def _kill(self) -> list[str]:
        """Kill something and start it again; the workers of a dead mount begin anew."""
        assert self._cluster is not None
        daemons, mounts = self._victims()
        hands = [hand for hand in self._hands.hands if hand.mount in mounts]
        self._aim(hands)
        with self._hands.striking() as strike:
            killed = self._cluster.kill(daemons, mounts)
        for hand in hands:
            self._hands.kill(hand)
        self._pause(self._random.choice([0, self._random.uniform(0, DEAD_S)]))
        self._cluster.start(daemons, mounts)
        # What their mount had sent may be done until then, and not afterwards.
        if killed and not wait_until(partial(self._cluster.sessions_over, killed, self._mounts[0])):
            return [f"the session of {mounts[0].name}, which was killed, does not end"]
        for hand in hands:
            self._hands.bury(hand)
        struck = self._hands.struck(strike)
        title = " and ".join(name for name, some in ((DAEMON_KILLS, daemons), (MOUNT_KILLS, mounts)) if some)
        (self._kills if struck else self._missed)[title] += 1
        self._struck.update(struck)
        return self._restart(hands)

    def _aim(self, hands: Sequence[Hand]) -> None:
        """Wait for somewhere in an operation of one of these workers; of any, if there are none."""
        self._hands.wait_under_way(hands or self._hands.hands, self._random.choice(AIMS), AIM_S)
        time.sleep(min(self._random.expovariate(1 / AIM_DELAY_S), 10 * AIM_DELAY_S))

    def _restart(self, hands: Sequence[Hand]) -> list[str]:
        return self._hands.start(hands) if hands else []

    def _victims(self) -> tuple[list[int], list[Path]]:
        """Choose daemons and mounts to kill."""
        both = self._plan.kill == {DAEMON_KILLS, MOUNT_KILLS}
        what = {self._random.choice(sorted(self._plan.kill))}
        if both and self._random.random() < BOTH_SHARE:
            what = set(self._plan.kill)
        everything = self._random.random() < ALL_SHARE
        daemons = list(range(DAEMONS)) if everything else [self._random.randrange(DAEMONS)]
        mounts = [self._random.choice(self._mounts)]
        return daemons if DAEMON_KILLS in what else [], mounts if MOUNT_KILLS in what else []

    # ── comparing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, before: Sequence[str]) -> list[str]:
        """Compare everything on a fresh mount, check the cluster, remove everything."""
        self._show("comparing")
        if self._cluster is not None:
            for path in self._mounts:
                self._cluster.unmount(path)
            if self._damage is not None:
                self._damage.lose()  # at least one
                self._cluster.kill(range(DAEMONS), [])  # which had the files open
            self._cluster.start(range(DAEMONS) if self._damage is not None else [], self._mounts[:1])
        complaints = self._compare(self._mounts[0])
        if complaints:
            return complaints
        self._show("checking")
        complaints = self._rest() or [one for one in self._check() if one not in before]
        if complaints:
            return complaints
        self._show("removing")
        roots = [self._base] if self._base else [self._hands.together, *(hand.name for hand in self._hands.hands)]
        roots += [DIRECTORY] if self._damage is not None else []
        for root in roots:
            if sentence := self._hands.run("remove", self._mounts[0] / root):
                return [sentence]
        self.left = None
        complaints = self._rest() or [one for one in self._check(removed=True) if one not in before]
        if complaints or self._cluster is None:
            return complaints
        return self._left_over() or self._cluster.stop()

    def _compare(self, mount: Path) -> list[str]:
        complaints = []
        for hand in self._hands.hands:
            found = self._hands.look(mount / hand.name)
            complaints += [found] if isinstance(found, str) else self._hands.settle(hand, found)
        found = self._hands.look(mount / self._hands.together)
        complaints += [found] if isinstance(found, str) else self._hands.shared.compare(found)
        if self._damage is not None:
            blocks = self._hands.blocks(mount / DIRECTORY)
            complaints += [blocks] if isinstance(blocks, str) else self._damage.compare(blocks)
        return complaints

    def _rest(self) -> list[str]:
        """Wait until the daemons have nothing left to do."""
        if self._cluster is None:
            return []
        if wait_until(self._cluster.at_rest, REST_S):
            return []
        return [f"the daemons have not come to rest after {REST_S:g} s"]

    def _check(self, *, removed: bool = False) -> list[str]:
        """Run ``benchfs check``; return what it finds. ``removed``: what was taken away is not missed any more."""
        command = [sys.executable, "-m", "benchfs_fuse.cli", "check", str(self._registry), "--json"]
        if self._cluster is not None:
            command = [*self._cluster.enter, *command]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHECK_S, check=False, start_new_session=True
        )
        if not done.stdout:
            return [f"benchfs check failed: {done.stderr.strip()}"]
        said = json.loads(done.stdout)
        findings: list[dict[str, Any]] = [*said["findings"], *said["undecided"]]
        missed: list[str] = []
        if self._damage is not None and not removed:
            findings, missed = self._damage.without(findings)
        return missed + [
            f"benchfs check: {one['problem']}: {one['path'] or ''} inode {one['ino']}, chunk {one['chunk']}, "
            f"daemon {one['daemon']}; {one['what']}"
            for one in findings
        ]

    def _left_over(self) -> list[str]:
        assert self._cluster is not None
        left = self._cluster.chunk_files()
        return [f"{len(left)} chunk files are left when all files are removed: {left[0]}"] if left else []
