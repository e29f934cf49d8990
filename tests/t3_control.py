"""The control socket goes on whatever one question does."""

import logging
from pathlib import Path

import msgspec
import pytest
import trio

from benchfs_fuse import control
from benchfs_fuse.control import Asker, Question, Report


async def ask(path: Path, line: bytes) -> bytes:
    """Send one line; return everything that is answered."""
    stream = await trio.open_unix_socket(path)
    async with stream:
        await stream.send_all(line)
        answered = b""
        while more := await stream.receive_some():
            answered += more
        return answered


async def test_a_question_that_fails_ends_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def answer(question: Question, asker: Asker) -> None:
        if question.command == "layout":
            raise ValueError("unforeseen")
        await asker.send(Report(True, question.ino, 0, 0, 0))

    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve, tmp_path / "socket", answer)
        with caplog.at_level(logging.ERROR):
            assert await ask(tmp_path / "socket", b'{"command": "layout"}\n') == b""
        assert "unforeseen" in caplog.text
        assert await ask(tmp_path / "socket", b"no question\n") == b""
        answered = await ask(tmp_path / "socket", b'{"command": "status", "ino": 7}\n')
        assert msgspec.json.decode(answered, type=Report).handles == 7
        nursery.cancel_scope.cancel()
