"""Hold docs/operations.md to the program: every setting with its default, every command, the numbers that it names."""

import argparse
from pathlib import Path

import pytest

from benchfs_fuse import client, config, limits, mount
from benchfs_fuse.chunks import disk
from benchfs_fuse.cli import make_parser
from benchfs_fuse.commands import mounting
from benchfs_fuse.services import sessions

TEXT = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]


def shown(key: config.Key) -> str:
    """Return a default as people write it."""
    default = key.default
    if key.name == "mount.allow_other":
        return "true for root, else false"
    if isinstance(default, bool):
        return str(default).lower()
    if key.rule.unit == "bytes":
        assert int(default) % limits.MIB == 0
        return f"{int(default) // limits.MIB}M"
    return f"{default:g}" if isinstance(default, int | float) else default or "empty"


def test_every_setting_is_listed_with_its_option_and_default() -> None:
    keys = config.keys()
    listed = {cells[0].strip("`"): cells[1:] for cells in ROWS if cells[0].strip("`") in keys}
    assert list(listed) == list(keys)
    for name, key in keys.items():
        option, default, meaning = listed[name]
        assert (option, default) == (f"`{key.option}`", shown(key))
        assert meaning


def choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def test_every_command_and_every_benchmark_is_listed() -> None:
    listed = [cells[0].strip("`").split()[1:] for cells in ROWS if cells[0].startswith("`benchfs ")]
    commands = choices(make_parser())
    assert {words[0] for words in listed} == set(commands)
    assert sorted(words[1] for words in listed if words[0] == "bench") == sorted(choices(commands["bench"]))


@pytest.mark.parametrize(
    "words",
    [
        f"waits up to {client.COMPLETE_TIMEOUT_S:.0f} s for the daemons that are missing",
        f"within {sessions.RETURN_S:.0f} s",
        f"what can\nbe flushed in {mounting.FORCE_LEAVE_S} s",
        f"a reserve of {disk.RESERVE_MAX // limits.MIB} MiB (1/{disk.RESERVE_PART} of",
        f"and {disk.INODES_RESERVE_MAX} inodes likewise",
        f"1 to {limits.DAEMONS_MAX}.",
        f"max_background` | {mount.MAX_BACKGROUND} |",
        f"congestion_threshold` | {mount.CONGESTION_THRESHOLD} |",
        f"read_ahead_kb` | {mount.READ_AHEAD_KB} |",
    ],
)
def test_numbers_are_those_of_the_program(words: str) -> None:
    assert words in TEXT
