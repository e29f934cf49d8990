"""Look at this machine before anyone mounts: what is there, what its lack costs, and what to do about it.

Every check is a function that returns one Finding and raises nothing; what it looks at is a parameter, so that tests
can show it a sick machine. UCX is asked in a process of its own: nothing of it is ever loaded here.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import trio
from rich.console import Console
from rich.text import Text

from . import __version__, companion, mountpoints
from .compiled import Compiled
from .limits import KIB, MIB
from .rpc import wire
from .rpc.addresses import public_devices

#: What the kernel grants since 5.16 (MLOCK_LIMIT): less was configured by somebody.
MEMLOCK_MIN = 8 * MIB
#: ucx_info opens every device that it knows: a second here, more where drivers are slow; then it hangs.
UCX_INFO_TIMEOUT_S = 30.0

_SHARED_MEMORY = {"posix", "sysv", "xpmem"}
_SINGLE_COPY = {"cma", "knem", "xpmem"}
#: io_uring_setup(2): the same number on every architecture.
_SYS_IO_URING_SETUP = 425
#: sizeof(struct io_uring_params), linux/io_uring.h.
_IO_URING_PARAMS_SIZE = 120
#: Packages that decide what this file system can do, in the order in which they are shown.
_PACKAGES = ("pyfuse3", "trio", "ucxx-cu12", "libucx-cu12", "liburing", "rocksdict", "msgspec")

Level = Literal["ok", "warn", "fail"]
_STYLES: Mapping[Level, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class Finding(NamedTuple):
    """Report one check. ``warn`` costs something, ``fail`` stops mounts or daemons from working."""

    name: str
    level: Level
    found: str
    cost: str = ""
    """What it costs; empty if nothing."""
    remedy: str = ""
    """What to do; empty if nothing."""


class InlineProbe(Protocol):
    """What the check needs to know of the chunk store's probe: microseconds of buffered 4 KiB writes."""

    @property
    def buffered_write_inline(self) -> bool:
        """True if io_uring completes them without a kernel worker thread."""
        ...

    @property
    def uring_write_us(self) -> float:
        """Return the time through io_uring."""
        ...

    @property
    def pwrite_us(self) -> float:
        """Return the time of a plain call."""
        ...


def set_up_ring() -> None:
    """Set up the smallest io_uring and close it again; OSError with the kernel's reason if it may not be."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_IO_URING_SETUP, 1, ctypes.create_string_buffer(_IO_URING_PARAMS_SIZE))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(fd)


def check_fuse_device(device: Path = Path("/dev/fuse")) -> Finding:
    """Open the device that every mount needs."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Finding(
            str(device), "fail", "missing", "nothing can be mounted", "as root: modprobe fuse; in a container: --device"
        )
    except OSError as error:
        found = f"cannot be opened: {error.strerror}"
        return Finding(str(device), "fail", found, "nothing can be mounted", f"as root: chmod 666 {device}")
    return Finding(str(device), "ok", "can be opened")


def check_fusermount(
    find: Callable[[str], str | None] = shutil.which,
    config: Path = mountpoints.FUSE_CONFIG,
    euid: int | None = None,
    mtab: Path = Path("/etc/mtab"),
) -> Finding:
    """Find the helper that mounts for ordinary users, and whether it lets them share and unmount what they mount."""
    is_root = (os.geteuid() if euid is None else euid) == 0
    path = find("fusermount3")
    if path is None:
        level: Level = "warn" if is_root else "fail"
        return Finding("fusermount3", level, "missing", "only root can mount", "install the package fuse3")
    allowed = mountpoints.users_may_let_others_in(config)
    if is_root:
        return Finding("fusermount3", "ok", f"{path}, user_allow_other {'set' if allowed else 'not set'}")
    if not os.stat(path).st_mode & stat.S_ISUID:
        return Finding("fusermount3", "fail", f"{path} is not setuid", "only root can mount", f"chmod u+s {path}")
    if not mtab.exists():
        remedy = f"as root: ln -s /proc/self/mounts {mtab}"
        return Finding("fusermount3", "warn", f"{path}, but no {mtab}", "only root can unmount", remedy)
    if allowed:
        return Finding("fusermount3", "ok", f"{path}, user_allow_other set")
    return Finding(
        "fusermount3",
        "warn",
        f"{path}, user_allow_other not set",
        "a mount by an ordinary user is for this user alone",
        f"as root: echo user_allow_other >> {config}",
    )


def check_io_uring(probe: Callable[[], None] = set_up_ring) -> Finding:
    """Set up a ring: kernels may lack io_uring, and administrators and containers may forbid it."""
    try:
        probe()
    except OSError as error:
        return Finding(
            "io_uring",
            "fail",
            f"refused: {error.strerror}",
            "no daemon can run here",
            "sysctl kernel.io_uring_disabled=0; in a container: a seccomp profile that allows io_uring_setup",
        )
    return Finding("io_uring", "ok", "a ring can be set up")


def check_memlock(limit: int | None = None, euid: int | None = None) -> Finding:
    """Read how much memory may be locked: RDMA registers what it transfers, io_uring what is registered with it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // KIB} KiB"
    if limit == resource.RLIM_INFINITY or limit >= MEMLOCK_MIN or (os.geteuid() if euid is None else euid) == 0:
        return Finding("memlock", "ok", found)
    return Finding(
        "memlock", "warn", found, "RDMA and registered buffers fail beyond it", "ulimit -l, /etc/security/limits.conf"
    )


def list_ucx_transports() -> str:
    """Return what ``ucx_info -d`` of the UCX that UCXX loads prints; OSError or SubprocessError if it cannot run."""
    environ = dict(os.environ)
    spec = importlib.util.find_spec("libucx")
    bundled = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    # libucx's own load.py reads this variable too.
    if bundled is None or environ.get("RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY", "false").lower() != "false":
        command = "ucx_info"
    else:
        command = str(bundled / "bin" / "ucx_info")
        environ["LD_LIBRARY_PATH"] = f"{bundled / 'lib'}:{environ.get('LD_LIBRARY_PATH', '')}"
    return subprocess.run(
        [command, "-d"], env=environ, capture_output=True, text=True, timeout=UCX_INFO_TIMEOUT_S, check=True
    ).stdout


def check_ucx(listing: Callable[[], str] = list_ucx_transports) -> Finding:
    """Find UCX's transports: TCP is needed, shared memory and RDMA make it fast."""
    try:
        text = listing()
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(
            "UCX", "fail", f"ucx_info does not run: {error}", "no daemon and no mount can run here", "reinstall"
        )
    pairs = re.findall(r"Transport: (\S+)\n#\s+Device: (\S+)", text)
    transports = {transport for transport, _ in pairs}
    found = ", ".join(sorted({t if device == "memory" else f"{t} ({device})" for t, device in pairs})) or "nothing"
    if "tcp" not in transports:
        return Finding("UCX", "fail", found, "peers cannot meet: no TCP", "bring a network interface up, lo at least")
    if not transports & _SHARED_MEMORY:
        return Finding(
            "UCX", "warn", found, "peers on one node talk over TCP, several times slower", "give the container /dev/shm"
        )
    if not transports & _SINGLE_COPY:
        return Finding(
            "UCX",
            "warn",
            found,
            "large transfers on one node are copied twice",
            "allow process_vm_readv: kernel.yama.ptrace_scope, the container's seccomp profile",
        )
    return Finding("UCX", "ok", found)


def check_public(listing: Callable[[], Mapping[str, str]] | None = None) -> Finding:
    """Look for network devices with addresses of the public internet, which daemons and mounts do not use unasked."""
    every = [name for _, name in socket.if_nameindex()]
    public = public_devices(every) if listing is None else listing()
    if not public:
        return Finding("network", "ok", f"no address of the public internet on {', '.join(every)}")
    return Finding(
        "network",
        "warn",
        ", ".join(
            f"{address} on {device} can be reached from the public internet" for device, address in public.items()
        ),
        "daemons and mounts that would listen there do not start; traffic is not encrypted",
        "name other devices with --net-devices and --listen, or allow it with --public",
    )


def check_inline(data_dir: Path, probe: Callable[[Path], InlineProbe]) -> Finding:
    """Measure whether the file system under the data directory completes buffered io_uring writes inline."""
    name = f"writes in {data_dir}"
    try:
        result = probe(data_dir)
    except (OSError, ImportError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return Finding(name, "fail", f"cannot be tried: {reason}", "no daemon can use it", "choose another")
    times = f"{result.uring_write_us:.1f} µs through io_uring, {result.pwrite_us:.1f} µs by pwritev"
    if result.buffered_write_inline:
        return Finding(name, "ok", f"inline: {times}")
    return Finding(
        name,
        "warn",
        f"handed to a kernel thread: {times}",
        "a wake-up more for each write through io_uring; daemons use pwritev for small ones",
        "a data directory on XFS",
    )


def _mapped_files(proc: Path) -> set[str]:
    found: set[str] = set()
    for maps in proc.glob("[0-9]*/maps"):
        try:
            found.update(re.findall(r"/\S*/ucx_shm_\S+", maps.read_text(errors="replace")))
        except OSError:
            continue  # it ended, or is another user's: then its segments are not ours to judge
    return found


def check_leftovers(directory: Path = Path("/dev/shm"), proc: Path = Path("/proc"), euid: int | None = None) -> Finding:
    """Find shared-memory segments of UCX that no living process has mapped; for others than root, their own."""
    euid = os.geteuid() if euid is None else euid
    mapped = _mapped_files(proc)
    dead = []
    for file in directory.glob("ucx_shm_*"):
        attrs = file.lstat()
        if euid in (0, attrs.st_uid) and str(file) not in mapped:
            dead.append((file, attrs.st_blocks * 512))
    if not dead:
        return Finding("shared memory", "ok", f"no leftovers in {directory}")
    size = sum(size for _, size in dead)
    return Finding(
        "shared memory",
        "warn",
        f"{len(dead)} segments of dead processes in {directory}",
        f"{size / MIB:.1f} MiB of memory",
        f"rm {' '.join(sorted(str(file) for file, _ in dead))}",
    )


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and not os.statvfs(path).f_flag & os.ST_RDONLY


def check_knobs(
    mountinfo: Path = Path("/proc/self/mountinfo"), bdi: Path = Path("/sys/class/bdi"), euid: int | None = None
) -> Finding:
    """Find out whether a mount can be tuned from outside: requests in flight (fusectl) and read-ahead (bdi).

    The companion library sets the first without root; nothing else sets the second. The same fusectl file system holds
    ``abort``, which frees the callers of a hung mount.
    """
    if (os.geteuid() if euid is None else euid) != 0:
        missing = ["max_background", "read_ahead_kb"]
        remedy = "mount as root"
    else:
        has_fusectl = re.search(r" - fusectl ", mountinfo.read_text()) is not None
        has_bdi = bdi.is_dir() and _writable(bdi.resolve())
        missing = [*(() if has_fusectl else ("max_background",)), *(() if has_bdi else ("read_ahead_kb",))]
        remedy = "" if has_fusectl else "mount -t fusectl fusectl /sys/fs/fuse/connections"
    if not missing:
        return Finding("FUSE knobs", "ok", "max_background and read_ahead_kb can be set")
    costs = {
        "max_background": "12 requests in flight without the companion library; nobody frees callers of a hung mount",
        "read_ahead_kb": "read-ahead of 128 KiB",
    }
    return Finding(
        "FUSE knobs", "warn", f"cannot be set: {', '.join(missing)}", "; ".join(costs[name] for name in missing), remedy
    )


def check_companion(library: Compiled = companion.LIBRARY) -> Finding:
    """Find the companion library, which is built with the package where there is a compiler."""
    return _check_compiled(
        "companion library",
        library,
        "no fallocate, holes, copies on the daemons, locks across mounts, default ACLs, kept caches, interrupts",
        "install gcc, pkg-config and libfuse3-dev, then the package again",
    )


def check_wire(library: Compiled = wire.COMPILED) -> Finding:
    """Find the compiled half of rpc/wire, which is built likewise."""
    return _check_compiled(
        "compiled wire", library, "small requests take half as long again", "install gcc, then the package again"
    )


def _check_compiled(name: str, compiled: Compiled, cost: str, remedy: str) -> Finding:
    library = compiled.find()
    if library is not None and compiled.is_current(library):
        return Finding(name, "ok", "built")
    found = "not built" if library is None else "built from another version, and left out"
    return Finding(name, "warn", found, cost, remedy)


def check_packages(names: Iterable[str] = _PACKAGES) -> Finding:
    """List the versions of what this file system stands on."""
    versions = [f"benchfs-fuse {__version__}", f"Python {platform.python_version()}", f"Linux {platform.release()}"]
    missing = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    found = ", ".join(versions)
    if missing:
        return Finding("versions", "fail", found, f"missing: {', '.join(missing)}", "pip install benchfs-fuse")
    return Finding("versions", "ok", found)


def findings(data_dir: Path, probe_inline: Callable[[Path], InlineProbe]) -> list[Finding]:
    """Run every check, in the order in which a mount needs what it checks."""
    return [
        check_packages(),
        check_fuse_device(),
        check_fusermount(),
        check_companion(),
        check_wire(),
        check_io_uring(),
        check_memlock(),
        check_ucx(),
        check_public(),
        check_inline(data_dir, probe_inline),
        check_leftovers(),
        check_knobs(),
    ]


def text_of(results: Iterable[Finding]) -> Text:
    """Lay findings out for people: a line for each, and beneath it what it costs and what to do."""
    text = Text()
    for one in results:
        text.append(f"{one.level:<5}", style=_STYLES[one.level]).append(f"{one.name}: {one.found}\n")
        for label, content in (("costs", one.cost), ("do", one.remedy)):
            if content:
                text.append(f"     {label}: ", style="dim").append(f"{content}\n")
    return text


def json_of(results: Iterable[Finding]) -> str:
    """Lay findings out for programs: a list of objects with the fields of Finding."""
    return json.dumps([one._asdict() for one in results], indent=2, ensure_ascii=False)


def _probe(data_dir: Path) -> InlineProbe:
    from .chunks.uring import probe_inline  # here, so that a missing liburing is a finding and not an ImportError

    return trio.run(probe_inline, data_dir)


def run_doctor(data_dir: Path, as_json: bool) -> int:
    """Check this machine, print what was found, and return 1 if anything fails, else 0. Runs outside of trio."""
    results = findings(data_dir, _probe)
    if as_json:
        sys.stdout.write(json_of(results) + "\n")
    else:
        Console(soft_wrap=True).print(text_of(results), end="")
    return int(any(one.level == "fail" for one in results))
