"""Read single arguments of the command line: a sentence says what is wrong with one (argparse's ``type=``)."""

import argparse
from collections.abc import Callable
from pathlib import Path


def path(text: str) -> Path:
    """Read a path. An empty one is a variable that was not set, and not the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def seconds(text: str) -> float:
    """Read how long to wait."""
    return _duration(text, "seconds", 86_400, "a day")


def seconds_or_none(text: str) -> float:
    """Read how long something is kept: 0 is not at all."""
    return 0.0 if text.strip() in ("0", "0.0") else seconds(text)


def minutes(text: str) -> float:
    """Read how long to work, in minutes."""
    return _duration(text, "minutes", 10_080, "a week")


def _duration(text: str, unit: str, most: float, name: str) -> float:
    try:
        given = float(text)
    except ValueError:
        given = -1.0
    if not 0 < given <= most:  # refuses NaN too
        raise argparse.ArgumentTypeError(f"a number of {unit} above 0, at most {name}, not {text!r}")
    return given


def some_of(*names: str) -> Callable[[str], tuple[str, ...]]:
    """Return what reads one or more of some names, with commas between them."""

    def read(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        if not set(given) <= set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(names)} or several of them, with commas, not {text!r}")
        return given

    return read


def whole(low: int, high: int, sentence: str) -> Callable[[str], int]:
    """Return what reads a whole number within bounds; ``sentence`` says what is right, with ``{}`` for the bounds."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{sentence.format(f'{low} to {high}')}, not {text!r}")
        return int(text)

    return read
