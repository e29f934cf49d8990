"""Name every failure once: domain exception, wire status and errno in one total table.

Services raise these and nothing else. The RPC server turns one into its ``status`` number, the RPC client turns the
number back into the same class, and the FUSE adapter turns the class into its ``errno``. Status numbers are part of
the wire format: never renumber, only append.
"""

import errno
from typing import ClassVar


class BenchfsError(Exception):
    """Stand at the root of everything this package raises on purpose."""


class UserError(BenchfsError):
    """Carry one sentence for the person at the command line: what failed, where, what to do."""

    exit_code: ClassVar[int] = 1


class ConfigError(UserError):
    """Refuse a configuration key, value or combination."""

    exit_code = 2


class FsError(BenchfsError):
    """Fail one operation with an errno. The message is for logs; the caller sees ``errno`` alone."""

    status: ClassVar[int]
    errno: ClassVar[int]


class StorageError(FsError):
    """Storage failed or is damaged (also: anything unforeseen inside a daemon)."""

    status, errno = 1, errno.EIO


class NotFound(FsError):
    """No such name, or no such inode."""

    status, errno = 2, errno.ENOENT


class Exists(FsError):
    """The name is taken."""

    status, errno = 3, errno.EEXIST


class NotADirectory(FsError):
    """A directory was needed."""

    status, errno = 4, errno.ENOTDIR


class IsADirectory(FsError):
    """Anything but a directory was needed."""

    status, errno = 5, errno.EISDIR


class NotEmpty(FsError):
    """The directory still has entries."""

    status, errno = 6, errno.ENOTEMPTY


class NameTooLong(FsError):
    """A name is longer than 255 bytes."""

    status, errno = 7, errno.ENAMETOOLONG


class InvalidArgument(FsError):
    """The request makes no sense (EINVAL)."""

    status, errno = 8, errno.EINVAL


class AccessDenied(FsError):
    """Permission bits forbid it (EACCES)."""

    status, errno = 9, errno.EACCES


class NotPermitted(FsError):
    """Only the owner or root may do it (EPERM)."""

    status, errno = 10, errno.EPERM


class NoSpace(FsError):
    """A daemon's disk is full."""

    status, errno = 11, errno.ENOSPC


class QuotaExceeded(FsError):
    """A quota under a daemon is used up."""

    status, errno = 12, errno.EDQUOT


class FileTooLarge(FsError):
    """The offset is beyond the largest file size."""

    status, errno = 13, errno.EFBIG


class TooManyLinks(FsError):
    """The inode's link count is at its limit."""

    status, errno = 14, errno.EMLINK


class Stale(FsError):
    """The inode, handle or session has gone (ESTALE)."""

    status, errno = 15, errno.ESTALE


class NoAttribute(FsError):
    """No such extended attribute (ENODATA)."""

    status, errno = 16, errno.ENODATA


class AttributeTooBig(FsError):
    """An extended attribute's value is too large (E2BIG)."""

    status, errno = 17, errno.E2BIG


class RangeError(FsError):
    """A name or buffer is outside its range (ERANGE)."""

    status, errno = 18, errno.ERANGE


class NotSupported(FsError):
    """The operation is refused by design (EOPNOTSUPP)."""

    status, errno = 19, errno.EOPNOTSUPP


class Busy(FsError):
    """The object is in use (EBUSY)."""

    status, errno = 20, errno.EBUSY


class BadHandle(FsError):
    """The file handle is unknown or was not opened for this (EBADF)."""

    status, errno = 22, errno.EBADF


class TooManyOpen(FsError):
    """A limit on handles, sessions or inodes was reached (ENFILE)."""

    status, errno = 23, errno.ENFILE


class DaemonUnreachable(FsError):
    """The daemon that this operation needs did not answer before the operation's deadline."""

    status, errno = 24, errno.EIO


class ProtocolError(FsError):
    """The peer sent what the protocol does not allow."""

    status, errno = 25, errno.EIO


class AuthenticationFailed(FsError):
    """The peer could not prove the cluster's secret, or speaks another version."""

    status, errno = 26, errno.EACCES


class NoSpaceForAttribute(FsError):
    """The extended attributes of one inode take too much room (ENOSPC)."""

    status, errno = 27, errno.ENOSPC


class Disconnected(FsError):
    """The connection to the peer ended while the request was under way; it may or may not have been applied.

    Internal to the RPC client, which reconnects and sends again; callers see it as DaemonUnreachable.
    """

    status, errno = 28, errno.EIO


class WrongCoordinator(FsError):
    """Another daemon has to coordinate this operation (renames of directories go to the root's daemon). Internal."""

    status, errno = 29, errno.EIO


class Conflict(FsError):
    """Another operation changed what this one had looked up: look again. Internal to the coordinator."""

    status, errno = 30, errno.EIO


class SymlinkLoop(FsError):
    """Too many symbolic links, or O_NOFOLLOW met one (ELOOP)."""

    status, errno = 31, errno.ELOOP


class NoDevice(FsError):
    """No such device or address (ENXIO)."""

    status, errno = 32, errno.ENXIO


class WouldBlock(FsError):
    """Somebody else has what the caller does not want to wait for (EAGAIN)."""

    status, errno = 33, errno.EAGAIN


class Deadlock(FsError):
    """To wait for a lock would be to wait for oneself (EDEADLK)."""

    status, errno = 34, errno.EDEADLK


class NoLocks(FsError):
    """The limit of locks was reached (ENOLCK)."""

    status, errno = 35, errno.ENOLCK


def _subclasses(cls: type[FsError]) -> list[type[FsError]]:
    found = []
    for sub in cls.__subclasses__():
        found.append(sub)
        found.extend(_subclasses(sub))
    return found


#: Wire status → class. Status 0 means success and is no exception.
BY_STATUS: dict[int, type[FsError]] = {cls.status: cls for cls in _subclasses(FsError)}

#: errno of the operating system → class, for what a daemon's disk answers. Everything else becomes StorageError.
BY_DISK_ERRNO: dict[int, type[FsError]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: QuotaExceeded,
    errno.EFBIG: FileTooLarge,
    errno.ENFILE: TooManyOpen,
    errno.EMFILE: TooManyOpen,
    errno.EOPNOTSUPP: NotSupported,
}


def from_status(status: int, message: str) -> FsError:
    """Rebuild the exception that a reply's status names; an unknown number is the peer's fault."""
    cls = BY_STATUS.get(status)
    return cls(message) if cls is not None else ProtocolError(f"unknown status {status}: {message}")


def from_disk(error: OSError, where: str) -> FsError:
    """Translate what the disk under a daemon answered; ``where`` names the file or chunk for the log."""
    return BY_DISK_ERRNO.get(error.errno or 0, StorageError)(f"{where}: {error}")
