"""Check the control message codec: what was encoded comes back, and any bytes give a frame or a ProtocolError."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse.errors import ProtocolError
from benchfs_fuse.limits import BODY_MAX, INLINE_MAX, PAYLOAD_MAX
from benchfs_fuse.rpc import frames

ids = st.integers(0, frames.REQUEST_ID_MAX)
codes = st.integers(0, frames.CODE_MAX)
bodies = st.binary(max_size=300)
sizes = st.sampled_from([0, 1, INLINE_MAX - 1, INLINE_MAX, INLINE_MAX + 1, PAYLOAD_MAX - 1, PAYLOAD_MAX])


@given(ids, codes, bodies, sizes)
def test_a_request_with_a_payload_comes_back(request_id: int, op: int, body: bytes, size: int) -> None:
    payload = bytes(size)
    message = frames.encode_request(request_id, op, body, payload, 0, 3)
    frame = frames.decode(memoryview(message))
    assert frame[:4] == (frames.REQUEST, request_id, op, body)
    assert (len(frame.payload), frame.bulk) == ((size, 0) if size <= INLINE_MAX else (0, size))
    assert (frame.want, frame.slot) == (0, 3 if frame.bulk else 0)
    assert len(message) <= frames.CONTROL_MAX


@given(ids, codes, bodies, sizes)
def test_a_request_with_room_comes_back(request_id: int, op: int, body: bytes, want: int) -> None:
    frame = frames.decode(memoryview(frames.encode_request(request_id, op, body, None, want)))
    assert frame == frames.Frame(frames.REQUEST, request_id, op, body, memoryview(b""), 0, want, 0)


@given(ids, codes, bodies, st.sampled_from([0, 1, INLINE_MAX, INLINE_MAX + 1, PAYLOAD_MAX]), st.data())
def test_a_reply_comes_back(request_id: int, status: int, body: bytes, want: int, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([0, 1, want or INLINE_MAX]))
    frame = frames.decode(memoryview(frames.encode_reply(request_id, status, body, bytes(size), want)))
    assert frame[:4] == (frames.REPLY, request_id, status, body)
    assert (len(frame.payload), frame.bulk) == ((0, size) if want > INLINE_MAX else (size, 0))


def test_the_largest_control_message_fits() -> None:
    message = frames.encode_request(1, 2, bytes(BODY_MAX), bytes(INLINE_MAX), 0)
    assert len(message) == frames.CONTROL_MAX
    assert len(frames.decode(memoryview(message)).body) == BODY_MAX


def test_an_inline_payload_is_a_view() -> None:
    message = bytearray(frames.encode_request(1, 2, b"body", b"payload", 0))
    frame = frames.decode(memoryview(message))
    message[-1] = ord("!")
    assert bytes(frame.payload) == b"payloa!"


@given(st.binary(max_size=200))
def test_any_bytes_give_a_frame_or_a_protocol_error(message: bytes) -> None:
    try:
        frame = frames.decode(memoryview(message))
    except ProtocolError:
        return
    assert frame.kind in (frames.REQUEST, frames.REPLY)


@given(st.binary(max_size=40), st.integers(0, 27), st.integers(0, 255), st.sampled_from([frames.REQUEST, frames.REPLY]))
def test_a_damaged_header_gives_a_frame_or_a_protocol_error(body: bytes, at: int, value: int, kind: int) -> None:
    if kind == frames.REQUEST:
        message = bytearray(frames.encode_request(7, 8, body, None, INLINE_MAX + 1))
    else:
        message = bytearray(frames.encode_reply(7, 8, body, None, INLINE_MAX + 1))
    message[at] = value
    try:
        frame = frames.decode(memoryview(message))
    except ProtocolError:
        return
    assert len(frame.body) + len(frame.payload) <= len(body)
    assert frame.bulk <= PAYLOAD_MAX and frame.want <= PAYLOAD_MAX


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        (frames.REQUEST, (0, 0, INLINE_MAX, 0)),  # a payload that belongs inside
        (frames.REQUEST, (0, 0, PAYLOAD_MAX + 1, 0)),
        (frames.REQUEST, (0, 0, 0, PAYLOAD_MAX + 1)),
        (frames.REQUEST, (0, 0, INLINE_MAX + 1, 1)),  # payloads both ways
        (frames.REQUEST, (0, 1, 0, 1)),
        (frames.REQUEST, (0, 1, INLINE_MAX + 1, 0)),  # two payloads
        (frames.REPLY, (0, 0, PAYLOAD_MAX + 1, 0)),
        (frames.REPLY, (0, 0, 0, 1)),
        (frames.REPLY, (0, 1, 1, 0)),
        (frames.REPLY, (BODY_MAX + 1, 0, 0, 0)),
        (frames.REQUEST, (0, INLINE_MAX + 1, 0, 0)),
        (3, (0, 0, 0, 0)),  # no such kind
    ],
)
def test_what_the_layout_forbids_is_refused(kind: int, lengths: tuple[int, int, int, int]) -> None:
    header = frames._HEADER.pack(frames.MAGIC, frames.VERSION, kind, 1, 2, 0, *lengths)
    with pytest.raises(ProtocolError):
        frames.decode(memoryview(header + bytes(lengths[0] + lengths[1])))


def test_a_message_has_to_be_there_as_far_as_it_says() -> None:
    message = frames.encode_request(1, 2, b"body", b"payload", 0)
    for end in range(len(message)):
        with pytest.raises(ProtocolError):
            frames.decode(memoryview(message)[:end])


def test_what_follows_a_message_means_nothing() -> None:
    message = frames.encode_request(1, 2, b"body", b"payload", 0)
    assert frames.decode(memoryview(message + b"old bytes")) == frames.decode(memoryview(message))
