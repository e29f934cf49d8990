"""benchfsd as a process: it serves, stops, is killed, starts again, and refuses what is wrong with one sentence."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cluster import running_cluster
from netns import IN_PUBLIC

from benchfs_fuse.registry import Registry, init_registry

#: Seconds for what takes one: a loaded machine is slow.
PATIENCE_S = 30.0


class Daemon:
    """Run one benchfsd."""

    _numbers = itertools.count()

    def __init__(self, registry: Path, data: Path, *arguments: str, before: Sequence[str] = ()) -> None:
        self.log = data.parent / f"{data.name}.{next(self._numbers)}.log"  # two may run at once, and both say something
        reader, writer = os.pipe()
        command = [
            sys.executable,
            "-m",
            "benchfs_fuse.daemon",
            "--registry-dir",
            str(registry),
            "--data-dir",
            str(data),
        ]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*before, *command, "--listen", "127.0.0.1", "--ready-fd", str(writer), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[writer],
            )
        os.close(writer)
        with os.fdopen(reader, "rb") as ready:
            self.ready = ready.readline() == b"ready\n"

    def said(self) -> str:
        return self.log.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def sentence(self) -> str:
        """Return the one sentence with which it refused to start."""
        assert not self.ready
        assert self.process.wait(PATIENCE_S) == 1, self.said()
        sentences = [line for line in self.said().splitlines() if line.startswith("benchfsd: ")]
        assert len(sentences) == 1 and self.said().splitlines()[-1] == sentences[0], self.said()
        assert "Traceback" not in self.said()
        return sentences[0]


@contextlib.contextmanager
def running(registry: Path, data: Path, *arguments: str) -> Iterator[Daemon]:
    daemon = Daemon(registry, data, *arguments)
    try:
        assert daemon.ready, daemon.said()
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    init_registry(tmp_path / "registry", 2)
    return tmp_path / "registry"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_serves_and_stops_in_order(tmp_path: Path, registry: Path, number: signal.Signals) -> None:
    with running(registry, tmp_path / "data") as daemon, Registry(registry) as opened:
        entry = opened.find(0)
        assert entry is not None and entry.process.pid == daemon.process.pid and not entry.has_ended()
        host, _, port = entry.address.rpartition(":")
        socket.create_connection((host, int(port))).close()
        assert daemon.stop(number) == 0
        assert opened.find(0) is None
        assert "Traceback" not in daemon.said() and f"stopping: {number.name}" in daemon.said()


def test_a_killed_daemon_is_recognised_and_starts_again_as_itself(tmp_path: Path, registry: Path) -> None:
    data = tmp_path / "data"
    with Registry(registry) as opened, running(registry, tmp_path / "other"):
        with running(registry, data, "--daemon-id", "1") as daemon:
            daemon.process.kill()
            daemon.process.wait()
        assert opened.missing() == {1: f"its process {daemon.process.pid} has ended"}
        with running(registry, data):
            entry = opened.find(1)
            assert entry is not None and entry.incarnation == 2 and opened.missing() == {}


def test_garbage_on_its_socket_does_a_daemon_no_harm(tmp_path: Path, registry: Path) -> None:
    with running(registry, tmp_path / "data") as daemon, Registry(registry) as opened:
        entry = opened.find(0)
        assert entry is not None
        host, _, port = entry.address.rpartition(":")
        for garbage in (b"", b"GET / HTTP/1.0\r\n\r\n", bytes(100_000), os.urandom(1000)):
            with socket.create_connection((host, int(port))) as stranger, contextlib.suppress(ConnectionError):
                stranger.sendall(garbage)
                stranger.shutdown(socket.SHUT_WR)
                stranger.settimeout(PATIENCE_S)
                while stranger.recv(4096):
                    pass
        assert daemon.process.poll() is None
        assert daemon.stop() == 0


def test_idle_daemons_and_an_idle_mount_sleep() -> None:
    with running_cluster() as cluster:
        mount = cluster.mount()
        (mount.mountpoint / "f").write_bytes(b"x")

        def ticks() -> list[int]:
            return [
                sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
                for process in (*cluster.daemons, mount)
            ]

        subprocess.run(["sleep", "2"], check=True)  # connections are made and what was gathered is written meanwhile
        before = ticks()
        subprocess.run(["sleep", "2"], check=True)
        used = [now - then for now, then in zip(ticks(), before, strict=True)]
        assert max(used) <= 2, used  # of 200


def test_who_comes_twice_or_late_is_refused(tmp_path: Path, registry: Path) -> None:
    with running(registry, tmp_path / "data") as daemon:
        pid = daemon.process.pid
        second = Daemon(registry, tmp_path / "data").sentence()
        assert f"{tmp_path}/data is in use by another daemon, pid {pid}" in second
        subprocess.run(["cp", "-a", tmp_path / "data", tmp_path / "copy"], check=True)
        assert f"daemon 0 runs already: pid {pid} on" in Daemon(registry, tmp_path / "copy").sentence()
        with running(registry, tmp_path / "two"):
            assert "all 2 daemons of this cluster have" in Daemon(registry, tmp_path / "three").sentence()
        assert daemon.process.poll() is None


def test_what_belongs_elsewhere_is_refused(tmp_path: Path, registry: Path) -> None:
    init_registry(tmp_path / "other", 1)
    with running(registry, tmp_path / "data"):
        pass
    assert "belongs to cluster" in Daemon(tmp_path / "other", tmp_path / "data").sentence()
    assert "there is no registry at" in Daemon(tmp_path / "nowhere", tmp_path / "data").sentence()
    (registry / "secret").chmod(0o644)
    assert "open to other users: chmod 600" in Daemon(registry, tmp_path / "data").sentence()


def test_an_address_that_is_not_ours_is_refused(tmp_path: Path, registry: Path) -> None:
    sentence = Daemon(registry, tmp_path / "data", "--listen", "192.0.2.1").sentence()
    assert "cannot listen at 192.0.2.1" in sentence and "--listen" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "UCX would listen at 8.8.4.4 of outer, which can be reached from the public internet: name other devices"),
        (("--net-devices", "inner", "--listen", "8.8.4.4"), "8.8.4.4 can be reached from the public internet: choose"),
        (("--net-devices", "inner", "--listen", "0.0.0.0"), "0.0.0.0 can be reached from the public internet: choose"),
        (("--net-devices", "inner", "--listen", "10.98.0.1"), ""),
        (("--listen", "8.8.4.4", "--public"), ""),
    ],
)
def test_the_public_internet_is_not_listened_to_unless_somebody_says_so(
    tmp_path: Path, registry: Path, arguments: Sequence[str], words: str
) -> None:
    daemon = Daemon(registry, tmp_path / "data", *arguments, before=IN_PUBLIC)
    if words:
        assert words in daemon.sentence() and "--public" in daemon.sentence()
    else:
        assert daemon.ready, daemon.said()
        assert daemon.stop() == 0


def test_a_network_that_ucx_does_not_have_is_refused(tmp_path: Path, registry: Path) -> None:
    sentence = Daemon(registry, tmp_path / "data", "--tls", "nonsense").sentence()
    assert "UCX cannot be used with ucx.tls 'nonsense'" in sentence
    assert Registry(registry).missing().keys() == {0, 1}


@pytest.mark.parametrize(("options", "words"), [("ro", "Read-only file system"), ("size=64k", "No space left")])
def test_a_data_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, registry: Path, options: str, words: str
) -> None:
    """Run the daemon where its data directory is a file system of its own, in a mount namespace of its own."""
    data = tmp_path / "data"
    data.mkdir()
    script = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'
    before = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", options, str(data)]
    daemon = Daemon(registry, data, before=before)
    assert words in daemon.sentence()
    with running(registry, tmp_path / "healthy"):  # whatever the failed one left in the registry is in nobody's way
        pass


def test_wrong_settings_are_refused(tmp_path: Path, registry: Path) -> None:
    for arguments, words in (
        (("--lease", "-5"), "--lease: daemon.lease_s cannot be '-5'"),
        (("--config", str(tmp_path / "none.toml")), "cannot read the settings"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
    ):
        daemon = Daemon(registry, tmp_path / "data", *arguments)
        assert daemon.process.wait(PATIENCE_S) == 2 and words in daemon.said() and "Traceback" not in daemon.said()
        assert not (tmp_path / "data").exists()
