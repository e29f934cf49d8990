"""Find the mount that is to be measured, and have a directory of one's own in it for that time."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .. import control, kernel_mounts, mountpoints
from ..errors import UserError
from ..kernel_mounts import KernelMount


class Measured(NamedTuple):
    """Be a new directory in a mount of ours, which ``record`` says how to ask."""

    directory: Path
    mount: KernelMount
    record: control.MountRecord


@contextmanager
def directory_in(mountpoint: Path, purpose: str) -> Iterator[Measured]:
    """Make a directory in a directory of a mount, and take it away with all that is in it. UserError."""
    path = kernel_mounts.plain_path(mountpoint)
    mount = kernel_mounts.above(path)
    if mount is None or not kernel_mounts.is_benchfs(mount):
        raise UserError(f"{mountpoint} is not in a benchfs mount")
    _, record = mountpoints.look(mount.mountpoint).served()
    try:
        directory = Path(tempfile.mkdtemp(prefix=f"benchfs-{purpose}-", dir=path))
    except OSError as error:
        raise UserError(f"cannot write in {mountpoint}: {error.strerror}") from None
    try:
        yield Measured(directory, mount, record)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
