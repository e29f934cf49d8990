"""Check both wires of rpc/wire between two workers of this process: what comes, in which order, what is given back."""

import gc
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from benchfs_fuse.errors import ProtocolError
from benchfs_fuse.limits import BODY_MAX, INLINE_MAX, PAYLOAD_MAX
from benchfs_fuse.rpc import frames
from benchfs_fuse.rpc.ucx import Ucx
from benchfs_fuse.rpc.wire import Wire, make_wire

CONTROL = 1 << 32
COUNT = 16
#: Bytes of a message that UCX does not take in at once, over TCP, while nobody receives.
LARGE = 32 << 20
DEADLINE_S = 20.0


def kept(found: list[frames.Frame] | None) -> list[frames.Frame]:
    """Copy the payloads, which lie in buffers that the next poll may give back."""
    return [frame._replace(payload=memoryview(bytes(frame.payload))) for frame in found or []]


class End(NamedTuple):
    """Be one end: the wire, and ucxx's worker under it."""

    wire: Wire
    worker: Any

    def hear(self, count: int) -> list[frames.Frame]:
        """Poll until so many control messages have come; their payloads are copied."""
        heard: list[frames.Frame] = []
        end_s = time.monotonic() + DEADLINE_S
        while len(heard) < count:
            assert time.monotonic() < end_s, f"{len(heard)} of {count} messages came"
            heard += kept(self.wire.poll(1000))
        return heard


class Ends(NamedTuple):
    """Be both ends, and the UCX that they were made with."""

    here: End
    there: End
    ucx: Ucx


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def make(request: pytest.FixtureRequest) -> Callable[[bool], Any]:
    """Return what makes two ends, over shared memory or TCP; they are destroyed as a connection's are."""
    return lambda shared: ends(shared, compiled=request.param)


@contextmanager
def ends(shared: bool, *, compiled: bool) -> Iterator[Ends]:
    ucx = Ucx()
    assert ucx.compiled is not None, "the compiled wire was not built"
    if not compiled:
        ucx.compiled = None
    context = ucx.make_context(shared=shared, tls="tcp")
    workers = [ucx.Worker(context) for _ in range(2)]
    for worker in workers:
        worker.init_blocking_progress_mode()
    addresses = [bytes(worker.address) for worker in workers]
    endpoints = [
        ucx.Endpoint.create_from_worker_address(worker, ucx.Address.create_from_buffer(address), True)
        for worker, address in zip(workers, reversed(addresses), strict=True)
    ]
    made = []
    for worker, endpoint in zip(workers, endpoints, strict=True):
        size = -(-frames.CONTROL_MAX // 4096) * 4096
        wire = make_wire(ucx, worker, memoryview(bytearray(COUNT * size)), COUNT, CONTROL)
        wire.attach(endpoint)
        made.append(End(wire, worker))
    try:
        yield Ends(made[0], made[1], ucx)
    finally:
        for end, endpoint in zip(made, endpoints, strict=True):
            end.wire.cancel()
            for _ in range(16):
                end.worker.progress_once()
            endpoint.close_blocking()
            ucx.destroy(end.worker, endpoint)
            end.wire.release()


def messages(rng: random.Random, count: int) -> Iterator[bytes]:
    """Return control messages, half of them damaged in the header."""
    sizes = (0, 1, 300, INLINE_MAX - 1, INLINE_MAX, INLINE_MAX + 1, PAYLOAD_MAX)
    for number in range(count):
        body, size = rng.randbytes(rng.choice((0, 1, 40, 3000))), rng.choice(sizes)
        match rng.randrange(3):
            case 0:
                message = frames.encode_request(number, 7, body, rng.randbytes(size), 0, rng.randrange(4))
            case 1:
                message = frames.encode_request(number, 7, body, None, size)
            case _:
                message = frames.encode_reply(
                    number, 7, body, rng.randbytes(size), PAYLOAD_MAX if size > INLINE_MAX else 0
                )
        if rng.random() < 0.5:
            yield message
            continue
        damaged = bytearray(message)
        for _ in range(rng.choice((1, 1, 2, 4))):
            damaged[rng.randrange(frames.HEADER_SIZE)] = rng.choice((0, 1, 2, 3, 127, 255))
        yield bytes(damaged[: rng.choice((len(damaged), len(damaged), rng.randrange(len(damaged) + 1)))])


def refusal_of(message: bytes) -> str:
    """Return why frames.decode refuses a message, nothing if it does not."""
    try:
        frames.decode(memoryview(message))
    except ProtocolError as error:
        return str(error)
    return ""


def test_the_compiled_decoder_is_that_of_frames() -> None:
    """Send messages of which many are damaged; each is what frames.decode says, or refused with the same words.

    The plain wire does not know how much has come and takes what follows in the buffer for the rest.
    """
    refused = 0
    with ends(True, compiled=True) as (here, there, _):
        for message in messages(random.Random(1), 600):
            if not (refusal := refusal_of(message)):
                here.wire.send(message, CONTROL, None)
                assert there.hear(1) == [frames.decode(memoryview(message))]
                continue
            refused += 1
            with ends(True, compiled=True) as (liar, hearer, _):
                liar.wire.send(message, CONTROL, None)
                with pytest.raises(ProtocolError, match=re.escape(refusal)):
                    hearer.hear(1)
    assert 100 < refused < 500


def test_messages_come_in_order_however_many(make: Callable[[bool], Any]) -> None:
    for shared in (True, False):
        with make(shared) as (here, there, _):
            sent = [
                frames.encode_request(number, 3, b"%d" % number, bytes([number % 251]) * 99, 0) for number in range(300)
            ]
            for message in sent:
                here.wire.send(message, CONTROL, None)
            heard: list[frames.Frame] = []
            end_s = time.monotonic() + DEADLINE_S
            while len(heard) < len(sent):
                assert time.monotonic() < end_s
                here.wire.poll(0)
                found = there.wire.poll(0) or []
                assert len(found) <= COUNT // 2  # as many receives stay posted
                heard += kept(found)
            assert heard == [frames.decode(memoryview(message)) for message in sent]


def test_a_message_of_the_greatest_size_arrives(make: Callable[[bool], Any]) -> None:
    message = frames.encode_request(1, 2, random.randbytes(BODY_MAX), random.randbytes(INLINE_MAX), 0)
    for shared in (True, False):
        with make(shared) as (here, there, _):
            here.wire.send(message, CONTROL, None)
            end_s = time.monotonic() + DEADLINE_S
            while not (heard := there.wire.poll(0)):
                assert time.monotonic() < end_s
                here.wire.poll(0)
            assert heard == [frames.decode(memoryview(message))]


def test_what_is_wrong_comes_behind_what_is_right(make: Callable[[bool], Any]) -> None:
    with make(True) as (here, there, _):
        right = frames.encode_request(5, 6, b"body", None, 0)
        here.wire.send(right, CONTROL, None)
        here.wire.send(b"\xff" * frames.HEADER_SIZE, CONTROL, None)
        assert there.hear(1) == [frames.decode(memoryview(right))]
        with pytest.raises(ProtocolError):
            there.hear(1)


def test_a_buffer_is_held_and_its_release_called_when_it_is_out(make: Callable[[bool], Any]) -> None:
    released: list[int] = []
    with make(False) as (here, there, _):
        data = bytearray(random.randbytes(LARGE))
        length = here.wire.send(data, 7, lambda: released.append(1))
        assert (length, here.wire.unsent, released) == (LARGE, 1, [])
        into = bytearray(LARGE)
        receive = there.wire.receive(into, 7)
        end_s = time.monotonic() + DEADLINE_S
        while not (receive.completed and released):
            assert time.monotonic() < end_s
            here.wire.poll(0)
            there.wire.poll(0)
        receive.check_error()
        assert (here.wire.unsent, released, here.wire.failed) == (0, [1], False)
        assert into == data
        here.wire.send(b"small", 8, lambda: released.append(2))
        while released != [1, 2]:
            here.wire.poll(0)


def test_what_was_not_sent_is_released_in_the_end(make: Callable[[bool], Any]) -> None:
    released: list[int] = []
    with make(False) as (here, there, _):
        data, into = bytearray(LARGE), bytearray(LARGE)
        here.wire.send(data, 7, lambda: released.append(1))
        landing = there.wire.receive(into, 9)
        assert not landing.completed
        del landing  # cancels it
        there.wire.poll(0)
        there.wire.receive(into, 9)
    assert here.wire.unsent == 0
    gc.collect()
    data.append(1)  # BufferError: somebody holds it
    into.append(1)


def test_a_stray_message_is_found(make: Callable[[bool], Any]) -> None:
    with make(True) as (here, there, _):
        assert there.wire.stray() == -1
        here.wire.send(frames.encode_request(5, 6, b"", None, 0), CONTROL, None)
        here.wire.send(b"stray", 77, None)
        there.hear(1)
        assert there.wire.stray() == 5


def test_arming_tells_whether_something_is_there(make: Callable[[bool], Any]) -> None:
    with make(True) as (here, there, _):
        while there.wire.poll(0) is not None:
            pass
        assert there.wire.arm()
        here.wire.send(frames.encode_request(5, 6, b"", None, 0), CONTROL, None)
        assert not there.wire.arm()
        assert len(there.hear(1)) == 1


def test_waiting_ends_with_patience_or_a_message(make: Callable[[bool], Any]) -> None:
    with make(True) as (here, there, _):
        while there.wire.poll(0) is not None:
            pass
        begun_ns = time.perf_counter_ns()
        assert there.wire.poll(2_000_000) is None
        assert time.perf_counter_ns() - begun_ns >= 2_000_000
        here.wire.send(frames.encode_request(5, 6, b"", None, 0), CONTROL, None)
        begun_ns = time.perf_counter_ns()
        assert there.wire.poll(int(DEADLINE_S * 1e9))
        assert time.perf_counter_ns() - begun_ns < DEADLINE_S * 1e9 / 2


def test_nothing_that_is_still_to_be_polled_is_slept_over(make: Callable[[bool], Any]) -> None:
    """A poll returns a part of a burst; UCX, which has delivered the rest, would let the worker be armed."""
    for shared in (True, False):
        with make(shared) as (here, there, _):
            here.wire.send(frames.encode_request(0, 6, b"", None, 0), CONTROL, None)  # so that the ends are connected
            end_s = time.monotonic() + DEADLINE_S
            while not there.wire.poll(0):
                assert time.monotonic() < end_s
                here.wire.poll(0)
            for number in range(3 * COUNT // 2):
                here.wire.send(frames.encode_request(number, 6, b"", None, 0), CONTROL, None)
            heard = 0
            while heard < 3 * COUNT // 2:
                assert time.monotonic() < end_s
                for _ in range(1000):  # all that is on its way arrives
                    here.worker.progress_once()
                    there.worker.progress_once()
                heard += len(there.wire.poll(0) or [])
                if heard < 3 * COUNT // 2:
                    assert not any(there.wire.arm() for _ in range(20)), f"{heard} were heard"
