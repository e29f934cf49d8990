"""Meet strangers over real sockets in one process: how many are heard at once, and what the log says about them."""

import logging
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from benchfs_fuse.errors import AuthenticationFailed
from benchfs_fuse.limits import HANDSHAKE_TIMEOUT_S
from benchfs_fuse.rpc import meeting


async def refuse(stream: trio.SocketStream) -> None:
    await stream.aclose()
    raise AuthenticationFailed("a wrong secret")


async def knock(address: tuple[str, int]) -> None:
    stream = await trio.open_tcp_stream(*address)
    assert await stream.receive_some() == b""
    await stream.aclose()


async def test_the_log_keeps_few_lines_about_many_strangers(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(meeting.receive_callers, listener, refuse)
        for _ in range(meeting.TOLD_MAX + 30):
            await knock(address)
        assert [record.message for record in caplog.records] == [
            "a caller was turned away: a wrong secret"
        ] * meeting.TOLD_MAX
        await trio.sleep(meeting.TOLD_S)
        await knock(address)
        assert [record.message for record in caplog.records][meeting.TOLD_MAX :] == [
            "30 lines more like those above were kept back",
            "a caller was turned away: a wrong secret",
        ]
        nursery.cancel_scope.cancel()


async def test_who_is_silent_has_to_go_in_time_and_earlier_if_others_come(autojump_clock: MockClock) -> None:
    ended: list[float] = []

    async def listen_to(stream: trio.SocketStream) -> None:
        begun = trio.current_time()
        try:
            await stream.receive_some()
        finally:
            ended.append(trio.current_time() - begun)
            await trio.aclose_forcefully(stream)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(meeting.receive_callers, listener, listen_to, pending_max=3))
        silent = [await trio.open_tcp_stream(*address) for _ in range(5)]
        for one in silent[:2]:
            assert await one.receive_some() == b""
        assert len(ended) == 2 and max(ended) < HANDSHAKE_TIMEOUT_S
        for one in silent[2:]:
            assert await one.receive_some() == b""
        for one in silent:
            await one.aclose()
        assert ended[2:] == pytest.approx([HANDSHAKE_TIMEOUT_S] * 3)
        nursery.cancel_scope.cancel()
