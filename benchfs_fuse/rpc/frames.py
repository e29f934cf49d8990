"""Say what a control message looks like: one fixed header, the body, a small payload. Pure: bytes in, bytes out.

A control message carries everything of a request or reply but a large payload. A payload above ``INLINE_MAX`` travels
as a second message, straight into its destination; the header says that it comes and how long it is.

======  ====  =====================================================================================
offset  size  field (little-endian, unsigned)
======  ====  =====================================================================================
     0     2  magic, 0xBF5E
     2     1  version of this layout, 1
     3     1  kind: 1 request, 2 reply
     4     4  request id: chosen by the caller, unique among its unanswered requests of the connection
     8     2  request: operation; reply: status (0 is success)
    10     2  request: slot that takes the payload that follows; otherwise zero
    12     4  length of the body
    16     4  length of the payload inside this message
    20     4  length of the payload that follows as a message of its own
    24     4  request: room for the reply's payload; reply: zero
    28     …  body, then inline payload; what follows in the buffer means nothing
======  ====  =====================================================================================

Where a payload goes follows from numbers that both ends know, never from a choice:

- A request's payload is inline up to ``INLINE_MAX`` and a second message above.
- A reply to a request with room above ``INLINE_MAX`` is always followed by a second message, of zero bytes if there is
  nothing to say: the caller has posted a receive for it, and a posted receive has to be completed.
- Any other reply carries its payload inline: at most the room asked for, or ``INLINE_MAX`` where the caller named none.

An empty payload is no payload.
"""

import struct
from typing import NamedTuple

from ..errors import ProtocolError
from ..limits import BODY_MAX, INLINE_MAX, PAYLOAD_MAX

MAGIC = 0xBF5E
VERSION = 1
REQUEST = 1
REPLY = 2

_HEADER = struct.Struct("<HBBIHHIIII")
HEADER_SIZE = _HEADER.size
#: Largest control message: what a receive buffer must hold.
CONTROL_MAX = HEADER_SIZE + BODY_MAX + INLINE_MAX
#: Request ids are 32 bits, so that they fit into a tag beside the message kind.
REQUEST_ID_MAX = (1 << 32) - 1
CODE_MAX = (1 << 16) - 1


class Frame(NamedTuple):
    """Hold one decoded control message.

    ``code`` is the operation of a request and the status of a reply. ``payload`` is the inline payload, a view into
    the decoded buffer (or empty). ``bulk`` counts the bytes of the payload that follows, into ``slot`` if it is a
    request's; ``want`` is the caller's room.
    """

    kind: int
    request_id: int
    code: int
    body: bytes
    payload: memoryview
    bulk: int
    want: int
    slot: int


def encode_request(
    request_id: int, op: int, body: bytes, payload: bytes | bytearray | memoryview | None, want: int, slot: int = 0
) -> bytes:
    """Encode a request. A ``payload`` above INLINE_MAX is only announced: the caller sends it itself, to ``slot``."""
    length = len(payload) if payload is not None else 0
    assert 0 <= op <= CODE_MAX and len(body) <= BODY_MAX, f"request {op}: body of {len(body)} bytes"
    assert length <= PAYLOAD_MAX and want <= PAYLOAD_MAX, f"request {op}: payload of {length}, room for {want} bytes"
    assert not (length and want), f"request {op}: a payload both ways"
    if length > INLINE_MAX:
        return _HEADER.pack(MAGIC, VERSION, REQUEST, request_id, op, slot, len(body), 0, length, want) + body
    header = _HEADER.pack(MAGIC, VERSION, REQUEST, request_id, op, 0, len(body), length, 0, want)
    return b"".join((header, body, payload)) if length and payload is not None else header + body


def encode_reply(
    request_id: int, status: int, body: bytes, payload: bytes | bytearray | memoryview | None, want: int
) -> bytes:
    """Encode the reply to a request that had room for ``want`` bytes.

    With ``want`` above INLINE_MAX the payload is only announced: the caller then sends a second message, also an empty
    one.
    """
    length = len(payload) if payload is not None else 0
    assert 0 <= status <= CODE_MAX and len(body) <= BODY_MAX, f"reply {status}: body of {len(body)} bytes"
    assert length <= (want or INLINE_MAX), f"reply {status}: payload of {length} bytes, room for {want or INLINE_MAX}"
    if want > INLINE_MAX:
        return _HEADER.pack(MAGIC, VERSION, REPLY, request_id, status, 0, len(body), 0, length, 0) + body
    header = _HEADER.pack(MAGIC, VERSION, REPLY, request_id, status, 0, len(body), length, 0, 0)
    return b"".join((header, body, payload)) if length and payload is not None else header + body


def decode(buffer: memoryview) -> Frame:
    """Decode the control message at the start of ``buffer``. Raise ProtocolError for anything else.

    The header says where the message ends: a receive posted in UCX does not tell. The frame's payload is a view: it is
    valid as long as the buffer is left alone.
    """
    if len(buffer) < HEADER_SIZE:
        raise ProtocolError(f"control message of {len(buffer)} bytes is shorter than its header")
    magic, version, kind, request_id, code, slot, body, inline, bulk, want = _HEADER.unpack_from(buffer)
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(f"control message with magic {magic:#x} and version {version}")
    if body > BODY_MAX or inline > INLINE_MAX:
        raise ProtocolError(f"control message with a body of {body} and a payload of {inline} bytes")
    end = HEADER_SIZE + body
    if len(buffer) < end + inline:
        raise ProtocolError(f"control message of {end + inline} bytes, of which {len(buffer)} came")
    if kind == REQUEST:
        if (inline and bulk) or ((inline or bulk) and want) or want > PAYLOAD_MAX:
            raise ProtocolError(f"request with payloads of {inline} and {bulk} bytes and room for {want}")
        if bulk and not INLINE_MAX < bulk <= PAYLOAD_MAX:
            raise ProtocolError(f"request followed by a payload of {bulk} bytes")
    elif kind == REPLY:
        if want or slot or (inline and bulk) or bulk > PAYLOAD_MAX:
            raise ProtocolError(f"reply with payloads of {inline} and {bulk} bytes, room for {want}, slot {slot}")
    else:
        raise ProtocolError(f"control message of unknown kind {kind}")
    return Frame(kind, request_id, code, bytes(buffer[HEADER_SIZE:end]), buffer[end : end + inline], bulk, want, slot)
