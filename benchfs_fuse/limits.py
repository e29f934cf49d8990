"""Bound everything, in one place, each bound with its reason. Bytes unless the name says otherwise."""

KIB = 1 << 10
MIB = 1 << 20

#: Longest name in a directory: NAME_MAX of Linux (limits.h).
NAME_MAX = 255
#: Longest symbolic link target: PATH_MAX of Linux less its NUL (limits.h).
SYMLINK_MAX = 4095
#: Largest file: FUSE and the kernel carry offsets as signed 64 bit (MAX_LFS_FILESIZE).
FILE_SIZE_MAX = (1 << 63) - 1
#: Most hard links to one inode: what ext4 allows a file (65,000), so that tools meet no surprise.
LINK_MAX = 65_000
#: Largest value of one extended attribute: XATTR_SIZE_MAX of Linux (limits.h).
XATTR_VALUE_MAX = 64 * KIB
#: Longest name of an extended attribute: XATTR_NAME_MAX of Linux (limits.h).
XATTR_NAME_MAX = 255
#: Names of all extended attributes of one inode together: XATTR_LIST_MAX of Linux (limits.h).
XATTR_LIST_MAX = 64 * KIB

#: Virtual shards of a cluster: enough to spread evenly over hundreds of daemons, few enough to list in one small file.
SHARDS = 4096
#: Most daemons of one cluster: every daemon still gets 16 shards.
DAEMONS_MAX = 256

#: Chunk sizes: a power of two. Below 64 KiB the work per byte explodes; above 1 GiB a file no longer spreads.
CHUNK_SIZE_MIN = 64 * KIB
CHUNK_SIZE_MAX = 1 << 30
CHUNK_SIZE_DEFAULT = 4 * MIB

#: Largest body (encoded metadata, inline payload excluded) of one request or reply: an extended attribute of
#: 64 KiB or a page of directory entries, with room for its frame.
BODY_MAX = 128 * KIB
#: Payloads up to this travel inside the control message: one copy costs less than a second message.
INLINE_MAX = 16 * KIB
#: Largest payload of one read or write RPC: the gather buffer of a mount; above it a transfer gains nothing.
PAYLOAD_MAX = 4 * MIB

#: Requests that one process may have under way at one daemon; also the number of slots of recorded outcomes.
IN_FLIGHT_MAX = 128
#: Open files (inodes held open) of one session at one daemon.
OPENS_MAX = 1 << 20
#: Inodes per page of a directory listing.
READDIR_ENTRIES_MAX = 512
#: Seconds that a whole handshake on the meeting socket may take: it is a few round trips; strangers get no more.
HANDSHAKE_TIMEOUT_S = 5.0
