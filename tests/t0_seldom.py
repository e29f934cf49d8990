"""What is said over and over is logged now and then."""

import logging

import pytest

from benchfs_fuse.observe import seldom
from benchfs_fuse.observe.seldom import Seldom, said_seldom


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(seldom, "time", clock)
    return clock


def logger_of(name: str, filter_: Seldom) -> logging.Logger:
    logger = logging.getLogger(name)
    logger.filters[:] = [filter_]
    return logger


def test_the_same_sentence_is_said_once_in_a_while(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    logger = logger_of("test.seldom", Seldom(pause_s=60))
    for _ in range(5):
        logger.error("chunk %d is damaged", 7)
    logger.error("chunk %d is damaged", 8)
    assert caplog.messages == ["chunk 7 is damaged", "chunk 8 is damaged"]
    clock.now_s += 59
    logger.error("chunk %d is damaged", 7)
    assert len(caplog.messages) == 2
    clock.now_s += 1
    for number in (7, 8):
        logger.error("chunk %d is damaged", number)
    assert caplog.messages[2:] == ["chunk 7 is damaged (5 times more before)", "chunk 8 is damaged"]


def test_only_so_many_sentences_are_remembered(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    logger = logger_of("test.seldom.many", Seldom(sentences_max=10))
    for number in range(11):
        logger.error("%d", number)
    for number in (10, 1, 0):
        logger.error("%d", number)
    assert caplog.messages == [str(number) for number in range(11)] + ["0"]


def test_loggers_are_filtered_each_by_itself_and_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    names = ("test.seldom.one", "test.seldom.two")
    with said_seldom(*names):
        for name in names * 3:
            logging.getLogger(name).warning("%s failed", name)
    assert caplog.messages == [f"{name} failed" for name in names]
    logging.getLogger(names[0]).warning("%s failed", names[0])
    assert caplog.messages[2:] == [f"{names[0]} failed"]
