"""Have hosts of one's own, as far as network and mounts go: namespaces joined by virtual cables that can be cut.

A namespace lives as long as one process of it, which ends with whoever made it: nothing is named, so nothing is left.
Root only.
"""

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .errors import UserError

#: UCX finds the network's devices in /sys, which has to be this network's, and nobody else's. Then wait for the end of
#: the standard input.
_HOLD = 'hostname "$1" && mount --make-private /sys && mount -t sysfs sysfs /sys && echo && exec cat'
#: Seconds for a command that changes a network, and for a connection to be made where there is one.
_COMMAND_S = 30.0
_REACH_S = 1.0
#: Wait until a device runs: the kernel says so up to a second after both ends of a cable are up (linkwatch), which it
#: tells to who listens (rtnetlink(7), netdevice(7): SIOCGIFFLAGS, IFF_RUNNING).
_WAIT_RUNNING = """
import fcntl, socket, struct, sys
news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
news.bind((0, 1))
news.settimeout(20)
flags = struct.Struct("16sH14x")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any:
    while not flags.unpack(fcntl.ioctl(any, 0x8913, flags.pack(sys.argv[1].encode(), 0)))[1] & 0x40:
        try:
            news.recv(65536)
        except TimeoutError:
            sys.exit(f"{sys.argv[1]} does not run")
"""
#: Where our modules are found.
_ROOT = Path(__file__).parent.parent


class Namespace:
    """Be a host with a name, its loopback up, and mounts of its own. A context manager. UserError: it cannot be made.

    With ``shares_mounts``, what is mounted below a shared mount point (mount(8), "Shared subtree operations") is seen
    from both sides.
    """

    def __init__(self, name: str, *, shares_mounts: bool = False) -> None:
        propagation = f"--propagation={'unchanged' if shares_mounts else 'private'}"
        try:
            self._holder = subprocess.Popen(
                ["unshare", "--net", "--mount", propagation, "--uts", "sh", "-c", _HOLD, "sh", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us
            )
        except OSError as error:
            raise UserError(f"no network namespace can be made: {error.strerror}: {error.filename}") from None
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"\n":
            why = self._holder.communicate()[1].decode(errors="replace").strip()
            raise UserError(f"no network namespace can be made: {why}")
        try:
            self.ip("link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it: it lives on while something of it runs."""
        self._holder.kill()
        self._holder.communicate()

    @property
    def pid(self) -> int:
        """Return a process of the namespace."""
        return self._holder.pid

    @property
    def enter(self) -> list[str]:
        """Return the words in front of a command that is to run here."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--root", f"--wdns={_ROOT}", "--"]

    def path(self, path: Path) -> Path:
        """Return the way to what is at ``path`` here, from any other mount namespace."""
        return Path(f"/proc/{self.pid}/root{path}")

    def ip(self, *words: str) -> None:
        """Run ip(8) here. UserError."""
        self.run("ip", *words)

    def run(self, *words: str) -> None:
        """Run a command here. UserError."""
        command = [*self.enter, *words]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_COMMAND_S, start_new_session=True
        )
        if done.returncode:
            raise UserError(f"{' '.join(words)}, in a network namespace: {done.stderr.strip()}")

    def count(self, protocol: str, name: str) -> int:
        """Return one of the kernel's counters of this namespace (/proc/net/snmp)."""
        lines = Path(f"/proc/{self.pid}/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith(f"{protocol}:"))
        return int(values[names.index(name)])

    def received(self, device: str) -> int:
        """Return how many packets have come in over a device (/proc/net/dev)."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == device:
                return int(counts.split()[1])
        raise KeyError(device)

    def reaches(self, address: str) -> bool:
        """Tell whether a TCP connection to ``host:port`` can be made from here, within a second."""
        host, _, port = address.rpartition(":")
        program = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))"
        command = [*self.enter, sys.executable, "-c", program, host, port, str(_REACH_S)]
        done = subprocess.run(
            command, check=False, stderr=subprocess.DEVNULL, timeout=_COMMAND_S, start_new_session=True
        )
        return done.returncode == 0


class Cable:
    """Join two hosts: ``near`` has address 10.99.``number``.1, ``far`` ….2. ``device`` is its name at both ends."""

    def __init__(self, near: Namespace, far: Namespace, number: int) -> None:
        self.near_address, self.far_address = f"10.99.{number}.1", f"10.99.{number}.2"
        self._near, self._far, self.device = near, far, f"cable{number}"
        words = ["link", "add", self.device, "type", "veth", "peer", "name", self.device, "netns", str(far.pid)]
        near.ip(*words)
        for namespace, address in ((near, self.near_address), (far, self.far_address)):
            namespace.ip("address", "add", f"{address}/24", "dev", self.device)
            namespace.ip("link", "set", self.device, "up")

    def wait_running(self) -> None:
        """Wait until the kernel has both ends running: UCX takes no device before. UserError: they do not."""
        for namespace in (self._near, self._far):
            namespace.run(sys.executable, "-c", _WAIT_RUNNING, self.device)

    def cut(self) -> None:
        """Let nothing pass. The near end keeps its address; the far one loses its routes."""
        self._far.ip("link", "set", self.device, "down")

    def mend(self) -> None:
        """Let everything pass again."""
        self._far.ip("link", "set", self.device, "up")

    def passed(self) -> int:
        """Return how many packets have come out of it so far, at both ends."""
        return self._near.received(self.device) + self._far.received(self.device)


class Way:
    """Be the way between two hosts, through a router that can drop what one sends to the other, and nothing else."""

    def __init__(self, router: Namespace, one_address: str, other_address: str) -> None:
        self._router = router
        self._directions = ((one_address, other_address), (other_address, one_address))

    def cut(self) -> None:
        """Let nothing pass, in neither direction; nobody is told (ip-rule(8), blackhole)."""
        self._change("add")

    def mend(self) -> None:
        """Let everything pass again."""
        self._change("del")

    def _change(self, verb: str) -> None:
        for source, target in self._directions:
            self._router.ip("rule", verb, "from", source, "to", target, "blackhole")


class Star:
    """Be hosts with a cable each to a router between them. A context manager. UserError: it cannot be made.

    ``addresses`` are those of the hosts, in the order of their names.
    """

    def __init__(self, names: Sequence[str], *, shares_mounts: bool = False) -> None:
        with contextlib.ExitStack() as stack:
            self._router = router = stack.enter_context(Namespace("router"))
            router.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            self.hosts = [stack.enter_context(Namespace(name, shares_mounts=shares_mounts)) for name in names]
            self.cables = [Cable(host, router, number) for number, host in enumerate(self.hosts)]
            self.addresses = [cable.near_address for cable in self.cables]
            for host, cable in zip(self.hosts, self.cables, strict=True):
                host.ip("route", "add", "default", "via", cable.far_address)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def way(self, one: int, other: int) -> Way:
        """Return the way between two hosts."""
        return Way(self._router, self.addresses[one], self.addresses[other])

    def mend(self) -> None:
        """Mend all cables."""
        for cable in self.cables:
            cable.mend()
