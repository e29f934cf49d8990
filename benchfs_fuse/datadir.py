"""Take a data directory: one daemon at a time, always the same daemon, always of the same cluster.

identity.json   Identity
lock            locked (flock) by the daemon that runs; holds its pid
meta/           the metadata store
chunks/         the chunk store
"""

import contextlib
import fcntl
import os
import secrets
import socket
from pathlib import Path

import msgspec

from . import disk
from .errors import UserError
from .kernel_mounts import inside_benchfs
from .registry import Claim, Registry, answers, check_name, read_file, sync_directory, write_file

#: What may lie in a directory that is taken for the first time: what mkfs makes, and what an attempt leaves.
_HARMLESS = frozenset(("lost+found", "lock"))


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say whose a data directory is. ``daemon_id`` is None while it is being taken for the first time."""

    format: int
    cluster_id: str
    token: str
    daemon_id: int | None


def _make(path: Path) -> None:
    """Make a directory and what is missing above it, on stable storage: what is synced in it would go with its name."""
    if not path.is_dir():
        _make(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        sync_directory(path.parent)


class DataDir:
    """Hold a data directory for as long as the object is open (a context manager)."""

    def __init__(self, path: Path, registry: Registry, wanted: int | None = None) -> None:
        """Lock the directory, made if it is missing, and find out which daemon it is; a new one gets a number.

        ``wanted`` insists on a number. UserError says what is wrong; nothing has been changed then.
        """
        self.path = path.absolute()
        check_name(self.path, "data directory")
        if inside_benchfs(self.path):
            raise UserError(f"{self.path} lies in a benchfs mount: the data directory must be outside")
        try:
            _make(self.path)
            strange = sorted({*os.listdir(self.path)} - _HARMLESS)
            if strange and "identity.json" not in strange:
                raise UserError(
                    f"{self.path} is not empty (it has {strange[0]}) and no data directory of benchfs: "
                    f"choose an empty or a new directory"
                )
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"cannot use the data directory {self.path}: {error.strerror}") from error
        try:
            self._take_lock()
            self.daemon_id = self._identify(registry, wanted)
        except OSError as error:
            os.close(self._lock)
            raise UserError(f"cannot use the data directory {self.path}: {error.strerror}") from error
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> "DataDir":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._lock)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise UserError(f"the data directory {self.path} is in use by another daemon, pid {holder}") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)

    def _identify(self, registry: Registry, wanted: int | None) -> int:
        file = self.path / "identity.json"
        cluster_id = registry.cluster.cluster_id
        identity = read_file(file, Identity, disk.FORMAT)
        if identity is None:
            identity = Identity(disk.FORMAT, cluster_id, secrets.token_hex(16), None)
            # First the token, then the number: what is claimed is never lost.
            write_file(file, msgspec.json.encode(identity) + b"\n")
        if identity.cluster_id != cluster_id:
            raise UserError(
                f"the data directory {self.path} belongs to cluster {identity.cluster_id}, "
                f"not to {cluster_id} of {registry.path}"
            )
        if identity.daemon_id is not None and wanted not in (None, identity.daemon_id):
            raise UserError(f"{self.path} is daemon {identity.daemon_id}'s data directory, not daemon {wanted}'s")
        claim = Claim(identity.token, socket.gethostname(), str(self.path))
        try:
            daemon_id = registry.claim(claim, wanted if identity.daemon_id is None else identity.daemon_id)
        except UserError:
            if identity.daemon_id is None:
                with contextlib.suppress(OSError):
                    file.unlink()
            raise
        if identity.daemon_id is None:
            numbered = msgspec.structs.replace(identity, daemon_id=daemon_id)
            write_file(file, msgspec.json.encode(numbered) + b"\n")
        entry = registry.find(daemon_id)
        if entry is not None and answers(entry):
            raise UserError(
                f"daemon {daemon_id} runs already: pid {entry.process.pid} on {entry.host}, "
                f"with the data directory {entry.data_dir}"
            )
        return daemon_id
