"""Check the errors' table and the message codec: every status comes back, any bytes are accepted or refused."""

import contextlib
import errno

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse import errors
from benchfs_fuse.limits import IN_FLIGHT_MAX
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
    m.Make(1, b"x", 0o100644, 0, 0, open_writers=1),
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
