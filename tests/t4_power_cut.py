"""Cut the power under real daemons: what was synced is there, what was not is there or not, but whole.

The daemons' data directories lie on disks that keep what was synced and, of the rest, whatever the seed says
(``benchfs_fuse/testing/lossy_disk.py``). A client works on the cluster and says what it does (``power_work.py``); in
the middle of it one daemon or all lose power, are killed, and started again over what is left. Then everything is
compared with what was acknowledged (``power_manifest.py``), and with itself (``fsck.py``).

BENCHFS_TEST_SEED gives other cuts. The same number gives the same choices, but daemons and clients take their turns as
they like: what fails is tried again a few times with its number.
"""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from cluster import Cluster, Process, end_with_parent
from fsck import complaints_on_disk
from lossy_mount import LossyMount
from power_manifest import Manifest
from power_work import Found

from benchfs_fuse.kv.rocks import RocksStore
from benchfs_fuse.layout import ShardMap
from benchfs_fuse.limits import CHUNK_SIZE_MIN
from benchfs_fuse.services.identity import BOOT
from benchfs_fuse.testing.lossy_disk import Loss

DAEMONS = 2
SEED = int(os.environ.get("BENCHFS_TEST_SEED", "0"))
#: Seconds for anything that takes one or two.
DEADLINE_S = 60.0
#: Acknowledged operations before the power goes: between these.
OPERATIONS = (20, 400)
OPERATIONS_SHORT = (20, 150)
#: Tries to meet a moment at which something is under way and something is not synced.
TRIES_MAX = 5


class LossyCluster(Cluster):
    """Be a cluster whose data directories lie on disks that lose power."""

    def __init__(self, directory: Path, disks: list[LossyMount]) -> None:
        self.disks = disks
        super().__init__(directory, len(disks), chunk_size=CHUNK_SIZE_MIN)

    def data_dir(self, number: int) -> Path:
        return self.disks[number].mountpoint / "data"

    def spawn_daemon(self, number: int) -> Process:
        arguments = ["--registry-dir", str(self.registry), "--data-dir", str(self.data_dir(number))]
        return Process("benchfs_fuse.daemon", arguments, self.directory / f"daemon-{number}.log")

    _spawn_daemon = spawn_daemon

    def cut(self, victims: list[int], loss: Loss, seed: int) -> int:
        """Take the power of some daemons; return how much there was to lose."""
        lost = [self.disks[number].cut(loss, seed + number) for number in victims]
        for number in victims:
            self.daemons[number].kill()
        for number in victims:
            self.disks[number].power()
            self._reboot(number)
        return sum(one.pages + one.names for one in lost)

    def _reboot(self, number: int) -> None:
        """Let a daemon find that it was started on another boot of its machine."""
        store = RocksStore(self.data_dir(number) / "meta")
        if store.get(BOOT) is not None:
            store.write([(BOOT, b"before")])
        store.close()

    def start(self, numbers: list[int]) -> None:
        """Start daemons, all at once."""
        for number in numbers:
            self.daemons[number] = self.spawn_daemon(number)
        for number in numbers:
            self.daemons[number].wait_ready()


class Worker:
    """Be the process that works on the cluster. A context manager."""

    def __init__(self, registry: Path, log: Path) -> None:
        self._lines: SimpleQueue[list[Any] | None] = SimpleQueue()
        with log.open("ab") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("power_work.py")), str(registry)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509  it makes one system call and takes no lock
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def tell(self, *words: Any) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(words).encode() + b"\n")
        self.popen.stdin.flush()

    def hear(self) -> list[Any] | None:
        """Return what is said next, None when nothing more will come."""
        return self._lines.get(timeout=DEADLINE_S)

    def expect(self, word: str) -> None:
        assert self.hear() == [word]

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def ready(self) -> None:
        """Say once more that it is ready."""
        self._lines.put(["ready"])

    def leave(self) -> None:
        """Let the process end in order."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        assert self.popen.wait(DEADLINE_S) == 0

    def kill(self) -> None:
        """End the process, and let all be read that it has said."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        if self.alive:
            self.popen.kill()
            self.popen.wait()
        self._reader.join()
        self.popen.stdin.close()
        self.popen.stdout.close()


@contextmanager
def lossy_cluster() -> Iterator[LossyCluster]:
    directory = Path(tempfile.mkdtemp(prefix="benchfs-test-"))
    try:
        with ExitStack() as stack:
            disks = [LossyMount(directory / f"disk-{number}", directory / "disks.log") for number in range(DAEMONS)]
            for disk in disks:
                stack.enter_context(disk)
            cluster = LossyCluster(directory, disks)
            stack.enter_context(cluster)
            yield cluster
    finally:
        for log in sorted(directory.glob("*.log")):  # pytest shows it if the test failed
            sys.stdout.write(f"{log.name}:\n{log.read_text()}\n")
        shutil.rmtree(directory)


class Series:
    """Cut the power of a cluster again and again."""

    def __init__(self, cluster: LossyCluster, stack: ExitStack) -> None:
        self._cluster = cluster
        self._stack = stack
        self._worker = self._new_worker()

    def _new_worker(self) -> Worker:
        return self._stack.enter_context(Worker(self._cluster.registry, self._cluster.directory / "worker.log"))

    def _hear(self) -> list[Any]:
        words = self._worker.hear()
        assert words is not None, (self._cluster.directory / "worker.log").read_text()
        return words

    def cut(self, seed: int, operations: tuple[int, int]) -> bool:
        """Work, cut, start again, compare; tell whether anything was under way, and anything not synced."""
        chance = random.Random(seed)
        loss = chance.choice([Loss.ALL, Loss.RANDOM, Loss.RANDOM, Loss.TAIL])
        victims = chance.choice([[0], [1], [0, 1], [0, 1]])
        count = chance.randrange(*operations)
        manifest = Manifest()
        self._worker.expect("ready")
        self._worker.tell("remove")
        self._worker.expect("removed")
        self._worker.tell("work", f"work{seed}", seed)
        while manifest.acknowledged < count:
            manifest.take(self._hear())
            assert not manifest.failures
        to_lose = self._cluster.cut(victims, loss, seed)
        self._worker.kill()
        while (words := self._worker.hear()) is not None:
            manifest.take(words)
        under_way = len(manifest.under_way)
        manifest.end()
        self._worker = self._new_worker()
        self._cluster.start(victims)
        complaints = list(manifest.complaints(self.look()))
        sys.stdout.write(
            f"cut {seed}: daemons {victims}, loss {loss}, {manifest.acknowledged} operations, "
            f"{manifest.syncs} syncs, {under_way} under way, {to_lose} to lose\n"
        )
        assert complaints == []
        return under_way > 0 and to_lose > 0

    def look(self) -> list[Found]:
        """Return everything that is in the cluster."""
        path = self._cluster.directory / "found"
        self._worker.expect("ready")
        self._worker.tell("dump", str(path))
        self._worker.expect("dumped")
        self._worker.ready()
        return [Found(*row) for row in pickle.loads(path.read_bytes())]

    def end(self, *, empty: bool) -> list[str]:
        """Stop everything in order; return what does not fit in the stores. Chunks may lack what was not synced."""
        self._worker.expect("ready")
        if empty:
            self._worker.tell("remove")
            self._worker.expect("removed")
        self._worker.tell("rest")
        self._worker.expect("rested")
        self._worker.leave()
        for daemon in self._cluster.daemons:
            assert daemon.stop() is not None, "had to be killed"
        data_dirs = [self._cluster.data_dir(number) for number in range(DAEMONS)]
        found = complaints_on_disk(data_dirs, ShardMap.round_robin(DAEMONS))
        return [sentence for sentence in found if empty or "lacks bytes" not in sentence]


def cuts(count: int, seed: int, *, empty: bool = True, operations: tuple[int, int] = OPERATIONS) -> None:
    """Do so many cuts that count; at the end compare the stores, ``empty`` or full."""
    sys.stdout.write(f"BENCHFS_TEST_SEED={SEED}\n")
    done = tried = 0
    with lossy_cluster() as cluster, ExitStack() as stack:
        series = Series(cluster, stack)
        while done < count:
            assert tried < count + TRIES_MAX, "nothing was under way"
            done += series.cut(seed + tried, operations)
            tried += 1
        assert series.end(empty=empty) == []


def test_what_was_synced_outlives_power_cuts() -> None:
    cuts(5, SEED, operations=OPERATIONS_SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("series", range(1, 13))
def test_what_was_synced_outlives_many_power_cuts(series: int) -> None:
    cuts(10, SEED + 1000 * series, empty=bool(series % 2))
