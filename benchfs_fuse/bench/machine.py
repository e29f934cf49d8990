"""Say on what machine something was measured, and through what mount: a figure without that says nothing.

Nothing is loaded for it: versions come from the packages' own records, UCX is whatever UCXX would load.
"""

import ctypes
import importlib.metadata
import os
import platform
import socket
import time
from pathlib import Path

import msgspec

from .. import __version__, control, kernel_mounts, mountpoints
from ..limits import KIB

#: What decides about speed, in the order in which reports show it.
PACKAGES = ("pyfuse3", "trio", "ucxx-cu12", "libucx-cu12", "liburing", "rocksdict", "msgspec")
#: Seconds for a mount to say which transports it uses.
_ANSWER_S = 5.0
_SYS = Path("/sys")


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Describe a machine at one moment. ``load`` is the load average (1, 5, 15 min): what else was running."""

    host: str
    taken_s: float
    kernel: str
    distribution: str
    cpu: str
    #: Processors that this process may use, and that there are.
    cpus: int
    cpus_all: int
    memory_bytes: int
    virtual: bool
    load: tuple[float, float, float]
    #: benchfs, Python, libfuse and the packages; "" where one is missing.
    versions: dict[str, str]
    #: The variables that change what UCX does.
    ucx_environment: dict[str, str]


class Storage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Describe what holds a directory: file system, device, mount options, and the device's knobs where it has any."""

    path: str
    filesystem: str
    source: str
    mountpoint: str
    options: str
    free_bytes: int
    #: Files below /sys → what they say.
    knobs: dict[str, str]


class MountFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Describe a benchfs mount: how the kernel has it, its knobs, and how it reaches its daemons."""

    storage: Storage
    version: str
    #: Daemon number → transport ("shm", "tcp", "rdma", "" while it is not connected).
    transports: dict[str, str]
    not_tuned: tuple[str, ...]
    #: What the mount process was started with.
    arguments: tuple[str, ...]


def describe() -> Machine:
    """Describe this machine now."""
    return Machine(
        socket.gethostname(),
        time.time(),
        platform.release(),
        _distribution(),
        _field(Path("/proc/cpuinfo"), "model name"),
        len(os.sched_getaffinity(0)),
        os.cpu_count() or 0,
        int(_field(Path("/proc/meminfo"), "MemTotal").partition(" ")[0] or 0) * KIB,
        " hypervisor " in f"{_field(Path('/proc/cpuinfo'), 'flags')} ",
        os.getloadavg(),
        versions(),
        {name: value for name, value in sorted(os.environ.items()) if name.startswith("UCX_")},
    )


def versions() -> dict[str, str]:
    """Return the versions of everything that decides about speed."""
    found = {"benchfs": __version__, "python": platform.python_version(), "libfuse": _libfuse()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def storage_of(path: Path) -> Storage:
    """Describe what holds a path that exists. OSError."""
    mounted = kernel_mounts.above(path)
    assert mounted is not None, "the root is mounted"
    space = os.statvfs(path)
    return Storage(
        str(path),
        mounted.fstype,
        mounted.source,
        str(mounted.mountpoint),
        mounted.options,
        space.f_bavail * space.f_frsize,
        _knobs(mounted),
    )


def mount_of(mountpoint: Path) -> MountFacts:
    """Describe a benchfs mount that serves. UserError: it does not answer, or nothing of ours is mounted there."""
    _, record = mountpoints.look(mountpoint).served()
    *_, report = control.ask(record, control.Question("status"), _ANSWER_S)
    return MountFacts(
        storage_of(mountpoint),
        report.version,
        {str(daemon.daemon_id): daemon.transport for daemon in report.daemons},
        report.not_tuned,
        tuple(os.fsdecode(Path(f"/proc/{record.process.pid}/cmdline").read_bytes()).strip("\0").split("\0")[3:]),
    )


def load_note(machine: Machine) -> str:
    """Say in a sentence if other work was under way, else nothing: such figures are good for ratios only."""
    busy = machine.load[0]
    if busy <= 0.5 * machine.cpus:
        return ""
    return f"load average {busy:.1f} on {machine.cpus} processors: other work was under way, look at ratios only"


def _knobs(mounted: kernel_mounts.KernelMount) -> dict[str, str]:
    """Read what the kernel lets one set for a mount or its device; what cannot be read is left out."""
    paths = [_SYS / "class" / "bdi" / mounted.device / "read_ahead_kb"]
    if mounted.fstype.startswith("fuse"):
        connection = kernel_mounts.connection(mounted.minor)
        paths += [connection / "max_background", connection / "congestion_threshold"]
    else:
        queue = _SYS / "dev" / "block" / mounted.device / "queue"
        paths += [queue / name for name in ("scheduler", "nr_requests", "write_cache", "rotational")]
    found = {}
    for path in paths:
        try:
            found[str(path)] = path.read_text().strip()
        except OSError:
            continue
    return found


def _field(file: Path, name: str) -> str:
    """Return the first value of a ``name: value`` file of /proc; "" if it has none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _libfuse() -> str:
    """Return the version of the libfuse that pyfuse3 would load; "" without one."""
    try:
        library = ctypes.CDLL("libfuse3.so.3")
    except OSError:
        return ""
    library.fuse_pkgversion.restype = ctypes.c_char_p
    said: bytes = library.fuse_pkgversion()
    return said.decode()
