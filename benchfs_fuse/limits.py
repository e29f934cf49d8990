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

# ── what a peer can make a process hold ──────────────────────────────────────────────────────────────────────────────
# docs/security.md tells what happens when each of these is reached (tests/t0_limits.py compares).

#: Seconds that a whole handshake on the meeting socket may take: it is a few round trips; strangers get no more.
HANDSHAKE_TIMEOUT_S = 5.0
#: Handshakes under way at one listener: more than peers that start at the same moment, few enough file descriptors.
PENDING_MAX = 128
#: One message of the handshake. A UCX worker address takes 80 to 200 bytes per device; this has room for a node with
#: many of them.
HANDSHAKE_MESSAGE_MAX = 8 * KIB
#: Connections of one process: all sessions' and daemons', and some that are being replaced.
CONNECTIONS_MAX = 4096 + 2 * DAEMONS_MAX
#: Requests that one process may have under way at one daemon; also the number of slots of recorded outcomes.
IN_FLIGHT_MAX = 128
#: Control receives posted per connection: a burst from a busy peer; only what is used takes memory.
CONTROL_RECEIVES = 16
#: Large request payloads under way per connection and direction. Each may take PAYLOAD_MAX bytes at the receiver.
BULK_SLOTS = 4
#: Payloads of replies to one connection, asked for and not yet taken by the peer: enough for all that a mount reads
#: ahead. One that is stopped holds so much of a daemon's memory and no more.
REPLY_BYTES_MAX = 64 * MIB
#: Messages to one peer that it has not taken. One that keeps to IN_FLIGHT_MAX takes two for each of its requests; there
#: may be ours to it, and some that it has taken while UCX has not said so.
UNSENT_MAX = 8 * IN_FLIGHT_MAX
#: Sessions of mounts and tools at one daemon: more than the processes of the largest job that shares one cluster.
SESSIONS_MAX = 4096
#: Characters of what a client says it is, for people: a mount point, which is a path (PATH_MAX of Linux).
LABEL_MAX = 4096
#: Open files (inodes held open) of one session at one daemon.
OPENS_MAX = 1 << 20
#: Advisory locks (ranges held, and requests that wait) of one session at one daemon: 13 MiB there if they are ranges
#: of one owner and file, 72 MiB if each is on a file of its own.
LOCKS_MAX = 1 << 16
#: Inodes per page of a directory listing.
READDIR_ENTRIES_MAX = 512
#: Ranges in one page of a map, about: 20 bytes each, and a chunk adds 512 of them at most.
RANGES_MAX = 1024
#: Inodes, names or inode numbers in one request of a check.
ITEMS_MAX = 256
#: Copies under way from one daemon to this one, of up to 4 MiB each. A daemon that is away holds up its own only.
COPIES_MAX = 8
#: Steps of a transaction at one daemon: twice what the largest rename needs.
STEPS_MAX = 16
#: Transactions whose abort came before their Prepare that are remembered: the two travel together, so a handful.
REFUSED_MAX = 1024
#: Idle buffers kept for the next reads, all sizes together: a few dozen of the largest. Making one costs its page
#: faults, some 250 µs for 1 MiB.
IDLE_BYTES_MAX = 64 * MIB
#: Chunk files kept open: opening one costs 5 to 10 µs. A quarter of the usual limit on open files of a process (1,024).
FILES_OPEN_MAX = 256
#: Files whose unsynced chunks are known one by one. Of others, all chunks are synced.
SYNC_TRACKED_MAX = 4096
#: Unsynced chunks of one file that are known one by one: 16 GiB in chunks of the default size.
SYNC_CHUNKS_MAX = 4096
#: Spans of each kind that a process keeps while it records: some 300 bytes each.
SPANS_MAX = 200_000
#: Stages that one span keeps: more than any but a copy of a large file has.
STAGES_MAX = 64
#: Inodes that a mount remembers: attributes of about 500 bytes each, 16 MB in all. Forgetting one costs a cache.
KNOWN_MAX = 32_768
#: Requests of the kernel that a mount serves at once, far above what busy programs make: a bound for what a dead daemon
#: holds up. Each takes some 10 KiB and, for a write, up to 1 MiB in libfuse until it is answered.
TASKS_MAX = 4096
