"""Keep what the processes of a cluster must agree on, and where its daemons are, in a directory that they all share.

    cluster.json      Cluster: written once, by ``benchfs init``
    secret            32 random bytes in hexadecimal, mode 0600: who can read it is let in
    claims/<n>        Claim: which data directory is daemon n's
    daemons/<n>.json  DaemonEntry: where daemon n can be met; there while it is ready to serve, or was when it died

Works on NFS and Lustre: files are written under another name and renamed, or linked where exactly one may win; nothing
is locked. Changes are seen by inotify. Changes made on other hosts of a network file system raise no events: there, and
where inotify is not to be had, the directory is read every POLL_S while somebody waits for a change.

A network file system may hang. What runs reads the registry in one thread (``look``), so that only those wait for it
who need it; what starts has nothing else to do.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from .errors import DaemonUnreachable, UserError
from .kernel_mounts import above, inside_benchfs
from .layout import ShardMap
from .limits import CHUNK_SIZE_DEFAULT, DAEMONS_MAX, SHARDS
from .processes import ProcessId, alive

#: Version of everything in the registry directory; a newer one is refused.
FORMAT = 1
#: File systems on which inotify sees every change, because only this host can make one.
LOCAL_TYPES = frozenset(
    ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
)
#: Seconds between looks at a registry on a network file system, which caches directories for some seconds itself.
POLL_S = 1.0
#: Seconds for a connection to a daemon of another host, to learn whether it still lives.
PROBE_TIMEOUT_S = 2.0

_SECRET_SIZE = 32
_IN_CLOEXEC_NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK
#: inotify(7): a file was closed after writing, moved from or to here, deleted.
_IN_EVENTS = 0x8 | 0x40 | 0x80 | 0x200
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T", bound=msgspec.Struct)


class _Versioned(msgspec.Struct, frozen=True):
    """Be what every format of a file has."""

    format: int


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say what a cluster is. Shard ``s`` is held by daemon ``shards[s % len(shards)]``."""

    format: int
    cluster_id: str
    daemons: int
    chunk_size: int
    map_version: int
    shards: tuple[int, ...]

    @property
    def shard_map(self) -> ShardMap:
        """Return which daemon holds which shard."""
        return ShardMap(self.map_version, tuple(self.shards[shard % len(self.shards)] for shard in range(SHARDS)))


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say whose number it is: the data directory that keeps ``token``; host and path are for people."""

    token: str
    host: str
    data_dir: str


class DaemonEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say where a daemon can be met, and which of its starts this is."""

    daemon_id: int
    address: str
    host: str
    boot_id: str
    process: ProcessId
    started_s: float
    incarnation: int
    data_dir: str
    version: str

    def has_ended(self) -> bool:
        """Tell whether this host knows that the daemon's process has ended."""
        return self.boot_id == boot_id() and not alive(self.process)


def check_name(path: Path, what: str) -> None:
    """Refuse a path that could not be written into our files, which are JSON. UserError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the {what} {str(path)!a} has a name that is not UTF-8: choose another") from None


class _Look:
    """Be one look at an entry, for everybody who asks before it begins."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.entry: DaemonEntry | None = None
        self.trouble: Exception | None = None


def boot_id() -> str:
    """Name where a process id means one process: this boot of the kernel, this pid namespace (of a container)."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def init_registry(path: Path, daemons: int, chunk_size: int = CHUNK_SIZE_DEFAULT) -> Cluster:
    """Form a cluster: make the registry directory with everything in it, or nothing. UserError."""
    if not 1 <= daemons <= DAEMONS_MAX:
        raise UserError(f"a cluster has 1 to {DAEMONS_MAX} daemons, not {daemons}")
    path = path.absolute()
    check_name(path, "registry")
    if inside_benchfs(path):
        raise UserError(f"{path} lies in a benchfs mount: the registry must be outside")
    if os.path.lexists(path) and not _is_empty_directory(path):
        raise UserError(f"{path} exists already: choose a new directory for the registry")
    cluster = Cluster(FORMAT, secrets.token_hex(16), daemons, chunk_size, 1, tuple(range(daemons)))
    new = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        new.mkdir(mode=0o700)
        try:
            for directory in ("claims", "daemons"):
                (new / directory).mkdir(mode=0o700)
            write_file(new / "secret", secrets.token_hex(_SECRET_SIZE).encode() + b"\n")
            write_file(new / "cluster.json", msgspec.json.encode(cluster) + b"\n")
            new.rename(path)  # over an empty directory too; whoever comes second finds it filled
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"cannot make the registry {path}: {error.strerror}") from error
    return cluster


class Registry:
    """Read and change the registry directory of one cluster; a Directory for the links (rpc/client.py).

    A context manager, which lets go of the inotify watch at the end.
    """

    def __init__(self, path: Path) -> None:
        """Read what the cluster is. UserError: there is none, or it is not for us."""
        self.path = path.absolute()
        check_name(self.path, "registry")
        if inside_benchfs(self.path):
            raise UserError(f"{self.path} lies in a benchfs mount: the registry must be outside")
        try:
            (self.path / "cluster.json").stat()
            secret = (self.path / "secret").read_text().strip()
            mode = (self.path / "secret").stat().st_mode
        except FileNotFoundError as error:
            raise UserError(
                f"there is no registry at {self.path} ({Path(error.filename).name} is missing): form a cluster with "
                f"benchfs init, or check --registry-dir"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the registry {self.path}: {error}") from error
        if mode & 0o077:
            raise UserError(f"{self.path}/secret is open to other users: chmod 600 {self.path}/secret")
        try:
            self.secret = bytes.fromhex(secret)
        except ValueError:
            self.secret = b""
        cluster = read_file(self.path / "cluster.json", Cluster, FORMAT)
        if cluster is None or not cluster.shards or len(self.secret) != _SECRET_SIZE:
            raise UserError(f"the registry {self.path} is damaged: its secret or its shard map is cut off")
        self.cluster = cluster
        self._inotify: int | None = None
        self._polled = False
        #: What is to be read next, and whether something is being read.
        self._next: dict[int, _Look] = {}
        self._reading = False
        #: How often somebody has taken events, for those who were looking meanwhile.
        self._events = 0
        self._leading = False
        self._changed = trio.Event()

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *error: object) -> None:
        if self._inotify is not None:
            os.close(self._inotify)
            self._inotify = None

    # ── entries ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, daemon_id: int) -> DaemonEntry | None:
        """Return a daemon's entry, also that of a dead one; None if there is none."""
        return read_file(self._entry(daemon_id), DaemonEntry)

    async def look(self, daemon_id: int) -> DaemonEntry | None:
        """Return what ``find`` returns from now on, read in a thread; DaemonUnreachable when it cannot be read.

        However many look, and give up: there is one thread. It also begins to watch for changes, before it reads.
        """
        look = self._next.setdefault(daemon_id, _Look())
        self._read_next()
        await look.done.wait()
        if isinstance(look.trouble, UserError):
            raise DaemonUnreachable(str(look.trouble))
        if look.trouble is not None:
            raise look.trouble
        return look.entry

    def _read_next(self) -> None:
        """Read what is to be read, unless something is being read: then that goes on with it."""
        if self._reading or not self._next:
            return
        looks, self._next, self._reading = self._next, {}, True
        token = trio.lowlevel.current_trio_token()

        def read() -> None:
            for daemon_id, look in looks.items():
                try:
                    self._watch()
                    look.entry = self.find(daemon_id)
                except Exception as error:  # noqa: BLE001  raised where it was asked for
                    look.trouble = error

        def finish() -> None:
            self._reading = False
            self._read_next()
            for look in looks.values():
                look.done.set()

        def deliver(result: object) -> None:
            with contextlib.suppress(trio.RunFinishedError):  # it was read for nobody
                token.run_sync_soon(finish)

        trio.lowlevel.start_thread_soon(read, deliver)

    def publish(self, entry: DaemonEntry) -> None:
        """Write a daemon's entry: from now on it is found. UserError."""
        try:
            write_file(self._entry(entry.daemon_id), msgspec.json.encode(entry) + b"\n")
        except OSError as error:
            raise UserError(f"cannot write to the registry {self.path}: {error.strerror}") from error

    def withdraw(self, entry: DaemonEntry) -> None:
        """Remove a daemon's entry, unless a later start has replaced it."""
        if self.find(entry.daemon_id) == entry:
            with contextlib.suppress(OSError):
                self._entry(entry.daemon_id).unlink()

    def _entry(self, daemon_id: int) -> Path:
        return self.path / "daemons" / f"{daemon_id}.json"

    def missing(self) -> dict[int, str]:
        """Return the daemons that are not there, each with what is known about it."""
        found = {}
        for daemon_id in range(self.cluster.daemons):
            entry = self.find(daemon_id)
            if entry is None:
                claim = self.claims().get(daemon_id)
                found[daemon_id] = f"last seen with {claim.data_dir} on {claim.host}" if claim else "never started"
            elif entry.has_ended():
                found[daemon_id] = f"its process {entry.process.pid} has ended"
        return found

    async def wait_complete(self, timeout_s: float, report: Callable[[str], None]) -> None:
        """Wait until all daemons are there. ``report`` gets a sentence whenever the missing ones change.

        UserError when it takes longer than ``timeout_s``.
        """
        last: dict[int, str] = {}
        with trio.move_on_after(timeout_s):
            while missing := await trio.to_thread.run_sync(self._watch_missing, abandon_on_cancel=True):
                if missing != last:
                    report(f"waiting for {_list_missing(missing, self.cluster.daemons)}")
                    last = missing
                await self._wait_something()
            return
        if not last:
            raise UserError(f"gave up after {timeout_s:.0f} s: the registry {self.path} does not answer")
        raise UserError(
            f"gave up after {timeout_s:.0f} s without {_list_missing(last, self.cluster.daemons)}: "
            f"start what is missing with benchfsd --registry-dir {self.path} --data-dir DIR"
        )

    def _watch_missing(self) -> dict[int, str]:
        self._watch()
        return self.missing()

    # ── changes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def wait_changed(self, daemon_id: int, known: object) -> None:
        """Wait until ``look`` returns something other than ``known``; what cannot be read has not changed."""
        while True:
            events = self._events
            with contextlib.suppress(DaemonUnreachable):
                if await self.look(daemon_id) != known:
                    return
            if self._events == events:  # else somebody has taken an event that came behind the look
                await self._wait_something()

    def _watch(self) -> None:
        """Begin to gather events, if that was not done before. Called in threads: it may hang."""
        if self._inotify is not None:
            return
        mount = above(self.path)
        self._polled = mount is None or mount.fstype not in LOCAL_TYPES
        self._inotify = _libc.inotify_init1(_IN_CLOEXEC_NONBLOCK)
        if self._inotify < 0:
            self._inotify, self._polled = None, True
        elif _libc.inotify_add_watch(self._inotify, os.fsencode(self.path / "daemons"), _IN_EVENTS) < 0:
            self._polled = True

    async def _wait_something(self) -> None:
        """Wait until something may have changed since the last look; one waiter watches for all."""
        if self._leading:
            await self._changed.wait()
            return
        self._leading = True
        try:
            with trio.move_on_after(POLL_S if self._polled else float("inf")):
                if self._inotify is None:
                    await trio.sleep_forever()
                else:
                    await trio.lowlevel.wait_readable(self._inotify)
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._inotify, 1 << 16)
        finally:
            # Also when cancelled: then another waiter has to watch.
            self._leading = False
            self._events += 1
            self._changed.set()
            self._changed = trio.Event()

    # ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def claims(self) -> dict[int, Claim]:
        """Return who has which number."""
        found = {}
        for daemon_id in range(self.cluster.daemons):
            claim = read_file(self.path / "claims" / str(daemon_id), Claim)
            if claim is not None:
                found[daemon_id] = claim
        return found

    def claim(self, claim: Claim, wanted: int | None) -> int:
        """Take a number for a data directory that has none, the lowest that is free or the one ``wanted``. UserError.

        Two who claim at once get different numbers. Claimed twice by the same directory, it is the same number.
        """
        taken = self.claims()
        own = next((daemon_id for daemon_id, other in taken.items() if other.token == claim.token), None)
        if own is not None:
            if wanted not in (None, own):
                raise UserError(f"{claim.data_dir} is daemon {own}'s data directory, not daemon {wanted}'s")
            return own
        if wanted is not None and not 0 <= wanted < self.cluster.daemons:
            raise UserError(f"this cluster has daemons 0 to {self.cluster.daemons - 1}, not {wanted}")
        folder = self.path / "claims"
        try:
            new = folder / f".{claim.token}"
            write_file(new, msgspec.json.encode(claim) + b"\n")
            try:
                for daemon_id in range(self.cluster.daemons) if wanted is None else (wanted,):
                    with contextlib.suppress(FileExistsError):
                        os.link(new, folder / str(daemon_id))
                        sync_directory(folder)
                        return daemon_id
            finally:
                new.unlink()
        except OSError as error:
            raise UserError(f"cannot write to the registry {self.path}: {error.strerror}") from error
        taken = self.claims()
        if wanted is not None:
            holder = f"{taken[wanted].data_dir} on {taken[wanted].host}" if wanted in taken else "another directory"
            raise UserError(f"daemon {wanted} has its data in {holder}; {claim.data_dir} is new")
        holders = ", ".join(f"{n}: {other.data_dir} on {other.host}" for n, other in sorted(taken.items()))
        raise UserError(
            f"all {self.cluster.daemons} daemons of this cluster have their data directories ({holders}): "
            f"use one of those, not {claim.data_dir}"
        )


def answers(entry: DaemonEntry) -> bool:
    """Tell whether the daemon of an entry still lives: by its process on this host, by a connection from elsewhere.

    One of this host's name and another boot died with that: who listens at its port now is somebody else.
    """
    if entry.boot_id == boot_id():
        return alive(entry.process)
    if entry.host == socket.gethostname():
        return False
    host, _, port = entry.address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _list_missing(missing: dict[int, str], count: int) -> str:
    names = ", ".join(f"{daemon_id} ({why})" for daemon_id, why in missing.items())
    return f"{len(missing)} of {count} daemons: {names}"


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not os.listdir(path)


def write_file(path: Path, content: bytes) -> None:
    """Write a file, mode 0600, so that it is seen whole or not at all, also after a power cut. OSError."""
    new = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        new.rename(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def read_file(path: Path, kind: type[T], format_max: int | None = None) -> T | None:
    """Read what ``write_file`` wrote in JSON; None if there is no such file.

    With ``format_max``, the file says its format. UserError: it cannot be read, or is of a newer format.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # replaced on another host while we read (NFS): it is there, in another guise
            return read_file(path, kind, format_max)
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        if format_max is not None and (found := msgspec.json.decode(content, type=_Versioned).format) > format_max:
            raise UserError(f"{path} has format {found}, this program knows {format_max}: use the newer program")
        return msgspec.json.decode(content, type=kind)
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def sync_directory(path: Path) -> None:
    """Bring a directory's entries to stable storage. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
