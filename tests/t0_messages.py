"""Check the errors' table and the message codec: every status comes back, any bytes are accepted or refused."""

import contextlib
import errno
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_fuzz import Fuzzer, encode, examples

from benchfs_fuse import errors
from benchfs_fuse.limits import BODY_MAX, IN_FLIGHT_MAX, PAYLOAD_MAX
from benchfs_fuse.rpc import frames
from benchfs_fuse.rpc import messages as m


def all_errors() -> list[type[errors.FsError]]:
    return errors._subclasses(errors.FsError)


def test_every_error_has_its_own_status_and_an_errno() -> None:
    classes = all_errors()
    assert len({cls.status for cls in classes}) == len(classes)
    for cls in classes:
        assert cls.status > 0
        assert cls.errno in errno.errorcode


@pytest.mark.parametrize("cls", all_errors())
def test_a_status_comes_back_as_its_class(cls: type[errors.FsError]) -> None:
    assert type(errors.from_status(cls.status, "why")) is cls


def test_an_unknown_status_is_the_peers_fault() -> None:
    assert type(errors.from_status(9999, "why")) is errors.ProtocolError


def test_disk_errors_keep_their_meaning() -> None:
    assert type(errors.from_disk(OSError(errno.ENOSPC, "full"), "x")) is errors.NoSpace
    assert type(errors.from_disk(OSError(errno.EIO, "bad"), "x")) is errors.StorageError


def test_every_request_has_its_own_number() -> None:
    classes = m._requests(m.Request)
    assert len({cls.op for cls in classes}) == len(classes) == len(m.REQUESTS)


EXAMPLES: list[m.Request] = [
    m.Lookup(1, b"\xff name"),
    m.SetAttr(5, mode=0o644, mtime_ns=m.TIME_NOW),
    m.Make(1, b"x", 0o100644, 0, 0, open_writers=1, umask=0o22),
    m.Rename(1, b"a", 2, b"b", m.RENAME_EXCHANGE),
    m.Prepare(m.TxId(0, 1, 2), (m.PutEntry(1, b"a", 7, 0o100000, 0), m.DropLink(9), m.Moved(3, 0))),
    m.Reclaim((m.OpenCount(4, 1, 0),), True),
]


@pytest.mark.parametrize("request_", EXAMPLES, ids=lambda request: type(request).__name__)
def test_requests_come_back(request_: m.Request) -> None:
    data = m.encode_recorded(request_, 3, 17) if request_.recorded else m.encode(request_)
    assert m.decode_request(request_.op, data) == (request_, *((3, 17) if request_.recorded else (0, 0)))


@given(op=st.sampled_from(sorted(m.REQUESTS)) | st.integers(0, 300), data=st.binary(max_size=200))
def test_any_bytes_give_a_request_or_a_protocol_error(op: int, data: bytes) -> None:
    try:
        request, slot, _seq = m.decode_request(op, data)
    except errors.ProtocolError:
        return
    assert request.op == op
    assert 0 <= slot < IN_FLIGHT_MAX


@given(request_=st.sampled_from(EXAMPLES), cut=st.integers(0, 40), flip=st.integers(0, 400), value=st.integers(0, 255))
def test_mutated_requests_are_accepted_or_refused(request_: m.Request, cut: int, flip: int, value: int) -> None:
    data = bytearray(m.encode_recorded(request_, 1, 1) if request_.recorded else m.encode(request_))
    data[flip % len(data)] = value
    with contextlib.suppress(errors.ProtocolError):
        decoded, _slot, seq = m.decode_request(request_.op, bytes(data[: len(data) - cut]))
        assert type(decoded) is type(request_)
        assert seq > 0 or not request_.recorded


def test_unknown_fields_are_refused() -> None:
    too_many = msgspec.msgpack.encode([1, b"name", 3])
    with pytest.raises(errors.ProtocolError):
        m.decode_request(m.Lookup.op, too_many)


def test_a_slot_out_of_range_is_refused() -> None:
    with pytest.raises(errors.ProtocolError):
        m.decode_request(m.Unlink.op, m.encode_recorded(m.Unlink(1, b"x"), IN_FLIGHT_MAX, 1))


@given(cls=st.sampled_from(sorted(m._decoders, key=lambda cls: cls.__name__)), data=st.binary(max_size=300))
def test_any_bytes_give_a_reply_or_a_protocol_error(cls: type[m.Body], data: bytes) -> None:
    with contextlib.suppress(errors.ProtocolError):
        assert type(m.decode(cls, data)) is cls


@given(seed=st.integers(0, 1 << 32))
def test_mutations_of_every_request_are_accepted_or_refused(seed: int) -> None:
    """Those that tests/t4_fuzz.py sends to a real daemon."""
    fuzzer = Fuzzer(seed, examples(1, 5, 7), ())
    for _ in range(20):
        control = memoryview(fuzzer.next().control)
        with contextlib.suppress(errors.ProtocolError):
            frame = frames.decode(control)
            assert len(frame.body) <= BODY_MAX and frame.bulk <= PAYLOAD_MAX and frame.want <= PAYLOAD_MAX
            request, _, _ = m.decode_request(frame.code, frame.body)
            # What was accepted can be said again.
            assert repr(m.decode_request(frame.code, encode(request))[0]) == repr(request)  # NaN differs from itself


@pytest.mark.parametrize("body", [b"\x93\xa1\xff\xa1a\xc2", b"\x93\xa5mount\xa2\xc3\x28\xc2"])
def test_text_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(errors.ProtocolError, match="malformed Hello"):
        m.decode_request(m.Hello.op, body)


@pytest.mark.parametrize("item", [b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01"])
def test_a_body_that_is_nested_deeply_is_refused(item: bytes) -> None:
    for op in m.REQUESTS:
        with pytest.raises(errors.ProtocolError):
            m.decode_request(op, b"\1\0\0\0\1\0\0\0\0\0\0\0"[: 12 * m.REQUESTS[op].recorded] + item * 20_000)


@pytest.mark.parametrize("op", sorted(m.REQUESTS))
def test_a_count_that_is_not_kept_takes_no_memory(op: int) -> None:
    """Four thousand million items are announced, and none comes."""
    prefix = b"\1\0\0\0\1\0\0\0\0\0\0\0"[: 12 * m.REQUESTS[op].recorded]
    tracemalloc.start()
    try:
        for start in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\x91\xdd", b"\x92\x01\xdd", b"\x93\x01\x01\xc6"):
            with pytest.raises(errors.ProtocolError):
                m.decode_request(op, prefix + start + b"\xff\xff\xff\xff")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("request_", "field", "value"),
    [
        *((m.SetAttr(5, mode=0o644), field, value) for field in ("mode", "uid", "gid") for value in (-1, 1 << 32)),
        *((m.SetAttr(5), field, 1 << 63) for field in ("atime_ns", "mtime_ns")),
        *((m.Make(1, b"x", 0, 0, 0), field, -1) for field in ("mode", "uid", "gid", "open_readers", "open_writers")),
        *((m.Release(5, 1, 1), field, -1) for field in ("readers", "writers")),
        *((m.TxId(1, 1, 1), field, -1) for field in ("daemon", "incarnation", "counter")),
        (m.TxId(1, 1, 1), "daemon", 1 << 16),
    ],
)
def test_numbers_out_of_range_are_refused(request_: m.Request | m.TxId, field: str, value: int) -> None:
    wrong = msgspec.structs.replace(request_, **{field: value})
    if isinstance(wrong, m.TxId):
        wrong = m.Finish(wrong, True)
    with pytest.raises(errors.ProtocolError):
        m.decode_request(wrong.op, encode(wrong))
