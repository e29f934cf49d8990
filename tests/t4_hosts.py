"""Two daemons and two mounts on four hosts, real TCP between them, and cables that are cut again and again.

The hosts are network namespaces with a cable each to a router. Both mounts change names all the time; each cut hits one
host, and counts only if traffic was seen to have stopped and an operation waited for the cable. Nothing is lost and
nothing is done twice, whoever was cut off.
"""

import contextlib
import os
import random
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

import pytest
from network_cluster import CHANGES, NetworkCluster, check_changes, connected, eventually

from benchfs_fuse.hosts import Star

SEED = int(os.environ.get("BENCHFS_TEST_SEED", "0"))
#: Seconds in which a mount has to go on after a cut: TCP's pauses between attempts double while the cable is cut.
DEADLINE_S = 120.0
#: Of so many cuts one lasts until the connections are given up. A third of the lease, less than the cut.
LONG_EVERY = 10
LEASE_S = 15.0
#: Seconds without a sign of life from a worker that has no reason to pause: then it waits for the cable.
STALLED_S = 0.5


class Hosts(NetworkCluster):
    """Have each daemon and each mount on a host of its own."""

    def build(self) -> None:
        self._star = self.stack.enter_context(Star(("store0", "store1", "work0", "work1")))
        self.hosts, self.cables = self._star.hosts, self._star.cables
        addresses = self._star.addresses
        self.daemons = [self.start_daemon(number, self.hosts[number], addresses[number]) for number in range(2)]
        self.mounts = [self.mount(f"work{number}", self.hosts[2 + number], "--op-timeout=0") for number in range(2)]

    def mend(self) -> None:
        self._star.mend()

    def passes(self, number: int) -> bool:
        """Tell whether anything passes between a host and another one."""
        if number < 2:
            return self.hosts[3 - number].reaches(self.address(number))
        return self.hosts[number].reaches(self.address(number - 2))


class Changes:
    """Change names on a mount until told to end. A context manager."""

    def __init__(self, cluster: Hosts, number: int) -> None:
        self.directory = cluster.mounts[number].mountpoint / f"of{number}"
        host = cluster.hosts[2 + number]
        host.path(self.directory).mkdir()
        program = f"held = lambda: None\n{CHANGES}"
        self._popen = subprocess.Popen(
            [*host.enter, sys.executable, "-c", program, str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.rounds = 0
        self._moved = threading.Condition()
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._popen.kill()
        self._popen.communicate()
        self._reader.join()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            if line == "end\n":
                return
            with self._moved:
                self.rounds = int(line) + 1
                self._moved.notify_all()

    def moves(self, timeout_s: float) -> bool:
        """Wait for the end of another round; tell whether it came in time."""
        with self._moved:
            before = self.rounds
            return self._moved.wait_for(lambda: self.rounds > before, timeout_s)

    def end(self) -> None:
        """Let it end after the round under way."""
        assert self._popen.stdin is not None
        self._popen.stdin.write("\n")
        self._popen.stdin.flush()
        assert self._popen.wait(DEADLINE_S) == 0
        self._reader.join()


def cuts(count: int) -> None:
    """Cut cables until ``count`` cuts have met an operation under way; then look at what was done."""
    sys.stdout.write(f"BENCHFS_TEST_SEED={SEED}\n")
    chance = random.Random(SEED)
    done = tried = 0
    with Hosts(LEASE_S) as cluster, Changes(cluster, 0) as first, Changes(cluster, 1) as second:
        workers = (first, second)
        while done < count:
            tried += 1
            assert tried <= 2 * count + 2, f"{done} of {tried} cuts met anything under way"
            for worker in workers:
                assert worker.moves(DEADLINE_S)
            victim = chance.randrange(4) if count > 2 else (1, 2)[done]
            cluster.cables[victim].cut()
            assert not cluster.passes(victim), "the cut cable passes something"
            waiting = [worker for worker in workers if not worker.moves(STALLED_S)]
            if tried % LONG_EVERY == 0 and waiting:
                number = victim - 2 if victim >= 2 else workers.index(waiting[0])
                eventually(lambda number=number: not all(connected(cluster.mounts[number])))  # type: ignore[misc]
            rounds = [worker.rounds for worker in workers]
            sys.stdout.write(f"cut {tried}: host {victim}, {len(waiting)} wait, after {rounds} rounds\n")
            cluster.cables[victim].mend()
            eventually(lambda victim=victim: cluster.passes(victim))  # type: ignore[misc]  # hosts are asked for anew
            done += bool(waiting)
        for worker in workers:
            assert worker.moves(DEADLINE_S)
            worker.end()
        for number, worker in enumerate(workers):
            for host, mount in zip(cluster.hosts[2:], cluster.mounts, strict=True):
                check_changes(host.path(mount.mountpoint / f"of{number}"), worker.rounds)
        for mount in cluster.mounts:
            assert "ERROR" not in mount.log.read_text() and "started anew" not in mount.log.read_text()


#: Take connections at a port for ever, once a line says so.
LISTEN = """
import socket, time
listener = socket.create_server(("", 4711), backlog=100)
print(flush=True)
time.sleep(1000)
"""


def test_two_hosts_are_cut_off_from_each_other_alone() -> None:
    with Star(("one", "two", "three")) as star, contextlib.ExitStack() as stack:
        for host in star.hosts:
            listener = stack.enter_context(
                subprocess.Popen([*host.enter, sys.executable, "-c", LISTEN], stdout=subprocess.PIPE)
            )
            stack.callback(listener.kill)
            assert listener.stdout is not None and listener.stdout.readline() == b"\n"

        def reached() -> list[tuple[int, int]]:
            pairs = [(0, 1), (1, 0), (0, 2), (2, 1)]
            return [pair for pair in pairs if star.hosts[pair[0]].reaches(f"{star.addresses[pair[1]]}:4711")]

        everything = reached()
        assert len(everything) == 4
        star.way(0, 1).cut()
        assert reached() == [(0, 2), (2, 1)]
        star.way(1, 0).mend()
        assert reached() == everything


def test_cut_cables_lose_nothing_and_nothing_is_done_twice() -> None:
    cuts(2)


@pytest.mark.slow
def test_many_cut_cables_lose_nothing_and_nothing_is_done_twice() -> None:
    cuts(50)
