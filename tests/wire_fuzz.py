"""Make requests and control messages that no honest peer sends, from valid ones of every type, by seeded mutation."""

import random
import stat
import struct
from collections.abc import Collection
from typing import Any, NamedTuple

import msgspec

from benchfs_fuse.errors import FsError
from benchfs_fuse.limits import BODY_MAX, IN_FLIGHT_MAX, INLINE_MAX, PAYLOAD_MAX
from benchfs_fuse.model import LOCK_END, Attrs, LockKind, LockType
from benchfs_fuse.rpc import frames
from benchfs_fuse.rpc import messages as m

#: Numbers at which codes break: signs, widths of keys and of MessagePack, limits of ours and of the kernel.
NUMBERS = (
    *(0, 1, -1, 2, 127, 128, 255, 256, -128, 65535, 65536, 1 << 31, -(1 << 31), (1 << 32) - 1, 1 << 32, 1 << 40),
    *((1 << 60), (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), IN_FLIGHT_MAX, PAYLOAD_MAX, PAYLOAD_MAX + 1),
)
#: Names that must not lead anywhere.
NAMES = (
    *(b"", b".", b"..", b"/", b"a/b", b"/etc/passwd", b"../../../canary", b"a\0b", b"\xff\xfe", b"x" * 255, b"x" * 256),
    *(b"x" * 70_000, b"system.posix_acl_access", b"user.benchfs.chunk_size", b"I", b"D", b"C", b"S"),
)
#: Requests that change what they name: a peer that holds the secret may do that, to its own files.
CHANGING = (
    *(m.SetAttr, m.Make, m.Unlink, m.Rmdir, m.Link, m.Rename, m.CommitWrite, m.Append, m.SetXattr, m.RemoveXattr),
    *(m.WriteChunk, m.TrimChunks, m.DropChunks, m.AllocateChunk, m.PunchChunk, m.CopyChunk, m.Prepare, m.Expel),
    *(m.RemoveInode, m.Touch),
)
_HEADER = struct.Struct("<HBBIHHIIII")


def examples(parent: int, ino: int, client_id: int) -> list[m.Request]:
    """Return a valid request of every type, about a directory and a file in it."""
    attrs = Attrs(ino, 1, stat.S_IFREG | 0o644, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 4 << 20, 1, 0)
    txid = m.TxId(7, 1, 1)
    return [
        m.Hello("mount", "/mnt/fuzz", False),
        m.Reclaim(
            (m.OpenCount(ino, 1, 1),), True, (m.LockClaim(ino, LockKind.POSIX, 9, LockType.WRITE, 0, LOCK_END, 1),)
        ),
        m.Heartbeat(),
        m.Goodbye(),
        m.Forget(),
        m.Lookup(parent, b"name"),
        m.GetAttr(ino),
        m.SetAttr(ino, mode=0o600, size=10, mtime_ns=m.TIME_NOW),
        m.Make(parent, b"new", stat.S_IFREG | 0o644, 0, 0, open_writers=1, umask=0o22),
        m.Make(parent, b"link", stat.S_IFLNK | 0o777, 0, 0, target=b"../somewhere"),
        m.Make(parent, b"dir", stat.S_IFDIR | 0o755, 0, 0),
        m.Unlink(parent, b"new"),
        m.Rmdir(parent, b"dir"),
        m.Link(ino, parent, b"other"),
        m.Rename(parent, b"other", parent, b"third", 0),
        m.ReadDir(parent, 0, 100),
        m.ReadLink(ino),
        m.Open(ino, True),
        m.Release(ino, 1, 1, True),
        m.CommitWrite(ino, 4096, 4096),
        m.CommitWrite(ino, 4096, 4096, 0, m.SetAttr(ino, mode=0o600, mtime_ns=7)),
        m.Append(ino, 100),
        m.Touch(ino),
        m.GetXattr(ino, b"user.a"),
        m.ListXattr(ino),
        m.SetXattr(ino, b"user.a", b"value", 0),
        m.RemoveXattr(ino, b"user.a"),
        m.SyncMeta(),
        m.SetLock(ino, LockKind.POSIX, 9, LockType.WRITE, 0, LOCK_END, 1, 5),
        m.GetLock(ino, LockKind.POSIX, 9, LockType.WRITE, 0, 100),
        m.CancelLock(5),
        m.LockGranted(5, 1),
        m.ReadChunk(ino, 0, 0, 4096),
        m.WriteChunk(ino, 0, 0),
        m.TrimChunks(ino, 0, 100),
        m.DropChunks((ino,)),
        m.SyncChunks(ino),
        m.Usage(),
        m.AllocateChunk(ino, 0, 0, 8192, True),
        m.PunchChunk(ino, 0, 0, 4096, False),
        m.MapChunks(ino, 0, 0, 10, 100),
        m.CopyChunk(0, ino, 0, 0, ino, 1, 0, 4096),
        m.Prepare(
            txid,
            (
                m.PutEntry(parent, b"p", ino, stat.S_IFREG, 0),
                m.DropEntry(parent, b"q", ino),
                m.NewInode(attrs),
                m.AddLink(ino),
                m.DropLink(ino),
                m.DropDir(parent),
                m.Moved(ino, parent),
            ),
        ),
        m.Prepare(m.TxId(7, 1, 2), (m.Moved(ino, 0),)),
        m.Finish(txid, False),
        m.Finish(m.TxId(7, 1, 2), True),
        m.Secure((txid,)),
        m.InDoubt((txid,)),
        m.HeldFiles(0, 0),
        m.Recount(),
        m.Expel(client_id + 1),
        m.Status(),
        m.Statistics(),
        m.Trace(0.1, 0),
        m.ListRecords(b"I", b""),
        m.ListChunks(ino, 0),
        m.ListStrays(0),
        m.FindInodes((ino, parent)),
        m.FindNames(((parent, b"name"),)),
        m.CountEntries(parent),
        m.ExamineFile(ino, True),
        m.HeldChunks(ino, 0, 0),
        m.RemoveOrphans((ino,)),
        m.RemoveStrays(0, ("../../../canary", f"{ino:016x}.00000000.{1:016x}")),
        m.RemoveInode(ino, 1),
        m.SweepRecords(b"I", b"", False),
    ]


class Message(NamedTuple):
    """Hold what is sent: a control message, and perhaps a payload for a slot behind it."""

    control: bytes
    payload: bytes | None = None
    slot: int = 0
    #: Its frame is wrong: whoever gets it may end the connection.
    bad: bool = False


class Fuzzer:
    """Draw messages. ``spared``: inode numbers that no changing request of ours may name, as they are another's."""

    def __init__(self, seed: int, requests: list[m.Request], spared: Collection[int]) -> None:
        self.random = random.Random(seed)
        self._requests = requests
        self._spared = frozenset(spared)
        self._interesting = (*NUMBERS, *spared)
        self._request_id = 0

    def next(self) -> Message:
        """Return the next message: mostly one whose frame is right, so that what is in it gets looked at."""
        self._request_id = (self._request_id + 1) % (1 << 31)
        if self.random.random() < 0.03:
            return self._bad_frame()._replace(bad=True)
        while True:
            request = self.random.choice(self._requests)
            body = self._body(request)
            op = request.op if self.random.random() < 0.97 else self.random.choice([*m.REQUESTS, 0, 999, 65535])
            if len(body) <= BODY_MAX and self._harmless(op, body):
                return self._framed(op, body)

    def valid(self, request: m.Request) -> Message:
        """Return a request without a change."""
        self._request_id = (self._request_id + 1) % (1 << 31)
        body = encode(request, self.random.randrange(IN_FLIGHT_MAX), self.random.randrange(1, 100))
        return Message(frames.encode_request(self._request_id, request.op, body, None, 0))

    # ── bodies ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _body(self, request: m.Request) -> bytes:
        rng = self.random
        if request.recorded and rng.random() < 0.05:
            prefix = struct.pack("<IQ", rng.choice((0, 127, 128, (1 << 32) - 1)), rng.choice((0, 1, (1 << 64) - 1)))
        else:
            prefix = struct.pack("<IQ", rng.randrange(IN_FLIGHT_MAX), rng.randrange(1, 1000))
        fields = msgspec.msgpack.decode(m.encode(request))
        kind = rng.random()
        if kind < 0.75:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                fields = self._changed(fields)
        try:
            body = bytearray(msgspec.msgpack.encode(fields))
        except OverflowError:
            body = bytearray()
        if kind > 0.9 and body:
            self._damage(body)
        return (prefix if request.recorded else b"") + bytes(body)

    def _changed(self, value: Any) -> Any:
        """Return a decoded body with one thing in it changed."""
        rng = self.random
        if isinstance(value, list) and value:
            choice = rng.random()
            if choice < 0.05:
                return value[:-1]
            if choice < 0.1:
                return [*value, rng.choice(NUMBERS)]
            if choice < 0.13:
                return value * rng.choice((2, 100, 5000))
            at = rng.randrange(len(value))
            return [*value[:at], self._changed(value[at]), *value[at + 1 :]]
        if rng.random() < 0.04:
            return rng.choice((None, True, [], [[]], {}, float("nan"), -1.5, "text", b"bytes", 3, [1] * 1000))
        if isinstance(value, bytes):
            return rng.choice((*NAMES, rng.randbytes(rng.randrange(300))))
        if isinstance(value, str):
            return rng.choice(("", "..", "../x", "daemon", "tool", "mount", "a\nb", "x" * 100_000, "\x1b[31m", "\0"))
        if isinstance(value, bool):
            return not value
        if isinstance(value, float):
            return rng.choice((float("inf"), float("nan"), -1.0, 1e300, 0.0))
        return rng.choice((*self._interesting, rng.getrandbits(64), rng.getrandbits(12)))

    def _damage(self, data: bytearray) -> None:
        for _ in range(self.random.choice((1, 2, 8))):
            at = self.random.randrange(len(data))
            match self.random.randrange(4):
                case 0:
                    data[at] = self.random.randrange(256)
                case 1:
                    data[at] ^= 1 << self.random.randrange(8)
                case 2:
                    del data[at + 1 :]
                case _:
                    data[at:at] = self.random.randbytes(self.random.randrange(1, 20))

    def _harmless(self, op: int, body: bytes) -> bool:
        """Tell whether a request would be refused or changes nothing of what is another's."""
        try:
            request, _, _ = m.decode_request(op, body)
        except FsError:
            return True
        return not isinstance(request, CHANGING) or not self._spared & set(_numbers(msgspec.to_builtins(request)))

    # ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _framed(self, op: int, body: bytes) -> Message:
        rng = self.random
        wants = op == m.ReadChunk.op or rng.random() < 0.02
        want = rng.choice((1, 4096, INLINE_MAX, INLINE_MAX + 1, 65536, PAYLOAD_MAX)) if wants else 0
        payload = rng.randbytes(rng.choice((1, 4096, INLINE_MAX, 65536))) if op == m.WriteChunk.op else None
        if want or payload is None:
            return Message(frames.encode_request(self._request_id, op, body, None, want))
        slot = rng.randrange(4)
        bulk = payload if len(payload) > INLINE_MAX else None
        return Message(frames.encode_request(self._request_id, op, body, payload, 0, slot), bulk, slot)

    def _bad_frame(self) -> Message:
        rng = self.random
        message = bytearray(self._framed(m.Heartbeat.op, m.encode(m.Heartbeat())).control)
        fields = list(_HEADER.unpack_from(message))
        match rng.randrange(5):
            case 0:
                return Message(rng.randbytes(rng.choice((0, 1, 27, 28, 29, 1000, frames.CONTROL_MAX))))
            case 1:
                return Message(bytes(message[: rng.randrange(len(message))]))
            case 2:  # longer than any receive has room for
                return Message(bytes(message) + bytes(frames.CONTROL_MAX + rng.choice((1, 10_000))))
            case 3:
                at = rng.randrange(len(fields))
                width = (2, 1, 1, 4, 2, 2, 4, 4, 4, 4)[at]
                fields[at] = rng.choice((0, 1, 2, 3, 5, INLINE_MAX + 1, PAYLOAD_MAX + 1, -1)) % (1 << 8 * width)
                return Message(_HEADER.pack(*fields) + bytes(message[_HEADER.size :]))
            case _:
                self._damage(message)
                return Message(bytes(message))


def encode(request: m.Request, slot: int = 0, seq: int = 1) -> bytes:
    """Encode any request."""
    return m.encode_recorded(request, slot, seq) if request.recorded else m.encode(request)


def _numbers(value: Any) -> list[int]:
    """List all whole numbers in a decoded body."""
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int) else []
