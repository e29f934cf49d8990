"""Keep a log from growing with what is said over and over: a program that reads a damaged file asks without end."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds for which a sentence is not said again.
PAUSE_S = 60.0
#: Sentences remembered; with more of them at once the oldest may be said again.
SENTENCES_MAX = 1024


class Seldom(logging.Filter):
    """Let each sentence of a logger through once in ``pause_s``; the next time it says how many were left out."""

    def __init__(self, pause_s: float = PAUSE_S, sentences_max: int = SENTENCES_MAX) -> None:
        super().__init__()
        self._pause_s = pause_s
        self._sentences_max = sentences_max
        #: When each sentence was said, and how often not, since; the oldest first.
        self._said: dict[str, list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is to be logged; add to it what was left out."""
        sentence, now = record.getMessage(), time.monotonic()
        said = self._said.get(sentence)
        if said is not None and now - said[0] < self._pause_s:
            said[1] += 1
            return False
        left_out = int(self._said.pop(sentence)[1]) if said is not None else 0
        if len(self._said) >= self._sentences_max:
            del self._said[next(iter(self._said))]
        self._said[sentence] = [now, 0]
        if left_out:
            record.msg, record.args = f"{sentence} ({left_out} times more before)", ()
        return True


@contextmanager
def said_seldom(*loggers: str) -> Iterator[None]:
    """Let these loggers, each by itself, say a sentence once in PAUSE_S for a while."""
    filters = [(logging.getLogger(name), Seldom()) for name in loggers]
    for logger, seldom in filters:
        logger.addFilter(seldom)
    try:
        yield
    finally:
        for logger, seldom in filters:
            logger.removeFilter(seldom)
