"""Hear of the end of a process of this host, by its pidfd."""

import errno
import logging
import os

import trio

log = logging.getLogger(__name__)

#: How pidfd_open(2) says that no process has a number: none has, a thread does that is no process, or nothing could.
_NO_PROCESS = (errno.ESRCH, errno.ENOENT, errno.EINVAL)


class PidWatch:
    """Watch a process of this host by its pidfd (pidfd_open(2)): an event, and no other process is taken for it.

    One that cannot be watched, for want of descriptors or of rights, does not end as far as is known: -1.
    """

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd

    @classmethod
    def open(cls, pid: int) -> "PidWatch | None":
        """Begin to watch; None if there is no such process in this pid namespace."""
        try:
            return cls(os.pidfd_open(pid))
        except OSError as error:
            if error.errno in _NO_PROCESS:
                return None
            log.warning("cannot watch process %d: %s; its end will not be heard of", pid, error.strerror)
            return cls(-1)

    async def wait_gone(self) -> None:
        """Wait until the process has ended."""
        if self._pidfd < 0:
            await trio.sleep_forever()
        await trio.lowlevel.wait_readable(self._pidfd)

    def close(self) -> None:
        """Stop watching."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
