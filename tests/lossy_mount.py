"""Mount disks that lose power, and pull the plug on them."""

import contextlib
import json
import socket
from pathlib import Path

from cluster import Process

from benchfs_fuse import kernel_mounts
from benchfs_fuse.testing.lossy_disk import Loss, Unsynced


class LossyMount(Process):
    """Be one disk, mounted at ``mountpoint``, a new directory. A context manager."""

    def __init__(self, mountpoint: Path, log: Path) -> None:
        self.mountpoint = mountpoint
        self._control = mountpoint.with_name(f"{mountpoint.name}.plug")
        mountpoint.mkdir()
        super().__init__("benchfs_fuse.testing.lossy_fs", [str(mountpoint), "--control", str(self._control)], log)

    def __enter__(self) -> "LossyMount":
        try:
            self.wait_ready()
        except BaseException:
            self.free()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.free()

    def _tell(self, command: str) -> Unsynced:
        with socket.socket(socket.AF_UNIX) as plug:
            plug.connect(str(self._control))
            plug.sendall(command.encode() + b"\n")
            with plug.makefile("rb") as answers:
                return Unsynced(**json.loads(answers.readline()))

    def unsynced(self) -> Unsynced:
        """Return what a cut could take now."""
        return self._tell("unsynced")

    def cut(self, loss: Loss, seed: int) -> Unsynced:
        """Take the power away; return what there was to lose. Everything that uses the disk is to be killed then."""
        return self._tell(f"cut {loss} {seed}")

    def power(self) -> None:
        """Give the power back: nobody may have anything open any more."""
        self._tell("power")

    def free(self) -> None:
        """Take the mount away, whatever state it is in."""
        for mount in kernel_mounts.mounts():
            if mount.mountpoint == self.mountpoint:
                kernel_mounts.abort(mount)
                with contextlib.suppress(OSError):
                    kernel_mounts.detach(self.mountpoint)
        if self.alive:
            self.kill()
