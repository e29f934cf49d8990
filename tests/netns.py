"""Give tests hosts of their own, as far as network and mounts go: namespaces joined by virtual cables that can be cut.

A namespace lives as long as one process of it, which ends with the tests: nothing is named, so nothing can be left.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

from cluster import end_with_parent

#: UCX finds the network's devices in /sys, which has to be this network's. Then wait to be killed.
_HOLD = 'hostname "$1" && mount -t sysfs sysfs /sys && echo && exec sleep infinity'
_PUBLIC = """
mount -t sysfs sysfs /sys && ip link set lo up
for each in inner:10.98.0.1 outer:8.8.4.4; do
    name=${each%:*}
    ip link add "$name" type veth peer name "$name-end" && ip link set "$name-end" up
    ip address add "${each#*:}/24" dev "$name" && ip link set "$name" up
done
exec "$@"
"""
#: Run what follows on a host of its own, with a private address on one device and one of the world's on another.
IN_PUBLIC = ["unshare", "--net", "--mount", "sh", "-c", _PUBLIC, "sh"]
_ROOT = Path(__file__).parent.parent


class Namespace:
    """Be a host with a name, its loopback up, and mounts of its own. A context manager."""

    def __init__(self, name: str) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "sh", "-c", _HOLD, "sh", name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=end_with_parent,  # noqa: PLW1509  it makes one system call and takes no lock
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"\n", "no namespaces can be made"
        self.ip("link", "set", "lo", "up")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._holder.send_signal(signal.SIGKILL)
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
        """Run ip(8) here."""
        self.run("ip", *words)

    def run(self, *words: str) -> None:
        """Run a command here."""
        subprocess.run([*self.enter, *words], check=True, timeout=30)

    def count(self, protocol: str, name: str) -> int:
        """Return one of the kernel's counters of this namespace (/proc/net/snmp)."""
        lines = Path(f"/proc/{self.pid}/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith(f"{protocol}:"))
        return int(values[names.index(name)])

    def reaches(self, address: str) -> bool:
        """Tell whether a TCP connection to ``host:port`` can be made from here, within a second."""
        host, _, port = address.rpartition(":")
        program = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.0)"
        command = [*self.enter, sys.executable, "-c", program, host, port]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL, timeout=30).returncode == 0


class Cable:
    """Join two hosts: ``near`` has address 10.99.``number``.1, ``far`` ….2."""

    def __init__(self, near: Namespace, far: Namespace, number: int) -> None:
        self.near_address, self.far_address = f"10.99.{number}.1", f"10.99.{number}.2"
        self._far, self._name = far, f"cable{number}"
        words = ["link", "add", self._name, "type", "veth", "peer", "name", self._name, "netns", str(far.pid)]
        near.ip(*words)
        for namespace, address in ((near, self.near_address), (far, self.far_address)):
            namespace.ip("address", "add", f"{address}/24", "dev", self._name)
            namespace.ip("link", "set", self._name, "up")

    def cut(self) -> None:
        """Let nothing pass. The near end keeps its address; the far one loses its routes."""
        self._far.ip("link", "set", self._name, "down")

    def mend(self) -> None:
        """Let everything pass again."""
        self._far.ip("link", "set", self._name, "up")
