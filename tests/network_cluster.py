"""Run a cluster over several hosts that are network namespaces, and change names over it in ways that show repeats."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from cli_help import PATIENCE_S
from cluster import Mount, Process

from benchfs_fuse import control
from benchfs_fuse.hosts import Namespace
from benchfs_fuse.registry import Registry, init_registry


def eventually(condition: Callable[[], bool]) -> None:
    """Look again and again until something is so that nobody tells us of."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)  # the processor is needed for it to happen


class NetworkCluster:
    """Hold two daemons and some mounts, each on a host that is said. A context manager."""

    def __init__(self, lease_s: float) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="benchfs-network-"))
        self.registry = self.directory / "registry"
        self._lease_s = lease_s
        self.stack = contextlib.ExitStack()
        self.stack.callback(shutil.rmtree, self.directory)
        try:
            init_registry(self.registry, 2)
            self.build()
        except BaseException:
            self.stack.close()
            raise

    def build(self) -> None:
        """Join the hosts, start the daemons, mount."""
        raise NotImplementedError

    def mend(self) -> None:
        """Let everything pass again: whoever is to leave in order needs that."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.mend()
        self.stack.close()

    def start_daemon(self, number: int, namespace: Namespace, address: str) -> Process:
        """Start a daemon over its data directory, old or new."""
        words = ["--registry-dir", str(self.registry), "--data-dir", str(self.directory / f"data{number}")]
        words += ["--daemon-id", str(number), "--listen", address, "--lease", str(self._lease_s)]
        daemon = Process("benchfs_fuse.daemon", words, self.directory / f"daemon{number}.log", before=namespace.enter)
        self.stack.callback(daemon.stop)
        daemon.wait_ready()
        return daemon

    def mount(self, name: str, namespace: Namespace, *arguments: str) -> Mount:
        """Mount the cluster from within a namespace."""
        mountpoint = self.directory / name
        mountpoint.mkdir(exist_ok=True)
        words = ["--attr-timeout=0", *arguments]
        mount = Mount(self.registry, mountpoint, self.directory / f"{name}.log", words, namespace.enter)
        self.stack.callback(mount.stop)
        mount.wait_ready()
        return mount

    def address(self, number: int) -> str:
        """Return where a daemon can be met."""
        with Registry(self.registry) as registry:
            entry = registry.find(number)
        assert entry is not None
        return entry.address


def ask(mount: Mount) -> control.Report:
    """Ask a mount how it is, as ``benchfs status`` does."""
    record = control.read_record(mount.mountpoint)
    assert record is not None
    (report,) = control.ask(record, control.Question("status"), PATIENCE_S)
    return report


def connected(mount: Mount) -> list[bool]:
    """Return to which daemons there is a connection."""
    return [daemon.connected for daemon in ask(mount).daemons]


#: Changes that are refused or seen when they are applied twice; says a line after each round. Ends when it is told to.
CHANGES = """
import os, select, sys
os.chdir(sys.argv[1])
log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
held()
round = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    os.mkdir(f"d{round}")
    os.rename(f"d{round}", f"e{round}")
    os.close(os.open(f"e{round}/f", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.link(f"e{round}/f", f"e{round}/g")
    os.unlink(f"e{round}/f")
    os.write(log, b"%d\\n" % round)
    print(round, flush=True)
    round += 1
print("end", flush=True)
"""


def check_changes(directory: Path, rounds: int) -> None:
    """Check that every change of CHANGES was applied exactly once."""
    assert (directory / "log").read_text() == "".join(f"{number}\n" for number in range(rounds))
    assert sorted(os.listdir(directory)) == sorted(["log", *(f"e{number}" for number in range(rounds))])
    for number in range(rounds):
        (only,) = os.scandir(directory / f"e{number}")
        assert only.name == "g" and only.stat().st_nlink == 1
