"""Tell what observing costs, in instructions: ``benchfs bench observing``.

The same operations (``observed``) run under valgrind's callgrind: on a copy of the package with every hook of the
recording taken out, with the hooks while nobody records, and while somebody does. Counts of instructions do not depend
on what else the machine does; what is left of chance is some of the work that comes by the clock, a few in a thousand.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import benchfs_fuse

from ..errors import UserError
from ..registry import init_registry
from .observed import OPERATIONS

#: Hooks, and what is left of them when they are taken out.
HOOKS = (
    (re.compile(r"^( *)recording\.note\([^()]*\)$", re.MULTILINE), r"\1pass"),
    (re.compile(r"\brecording\.now\(\)"), "0"),
    (re.compile(r"\brecording\.recorder\b"), "None"),
)
HOOK = re.compile(r"\brecording\.(?:note|now|recorder)\b")
#: Modules that switch the recording on and off, or take hooks out, which is no hook.
SWITCHES = ("recording.py", "tracing.py", "telling.py", "observing.py", "observed.py")
#: Seconds for one run: valgrind takes some fifty times as long as the processor.
RUN_S = 900.0


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold the instructions of one operation: without hooks, with hooks that do nothing, while they record."""

    operation: str
    none: int
    off: int
    on: int


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold everything counted, and how many hooks were taken out."""

    format: int
    iterations: int
    hooks: int
    rows: tuple[Row, ...]


def without_hooks(package: Path) -> int:
    """Take every hook out of a copy of the package; return how many there were. UserError if one would be left."""
    taken = 0
    for file in package.rglob("*.py"):
        if file.name in SWITCHES:
            continue
        source = file.read_text()
        for hook, rest in HOOKS:
            source, count = hook.subn(rest, source)
            taken += count
        if HOOK.search(source):
            raise UserError(f"a hook of {file.name} is written as none that can be taken out")
        file.write_text(source)
    return taken


def count(root: Path, place: Path, iterations: int, record: bool) -> list[int]:
    """Return the instructions of each of ``OPERATIONS``, all iterations together, of the package in ``root``.

    UserError when valgrind or what it runs fails.
    """
    place.mkdir()
    init_registry(place / "registry", 1)
    command = [
        *("valgrind", "--tool=callgrind", "--dump-before=getppid", f"--callgrind-out-file={place / 'count'}"),
        *(sys.executable, "-m", "benchfs_fuse.bench.observed", str(place / "registry"), str(place / "data")),
        *(str(iterations), "on" if record else "off"),
    ]
    environ = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            command, env=environ, cwd=root, capture_output=True, text=True, timeout=RUN_S, check=False
        )
    except FileNotFoundError:
        raise UserError("valgrind is not installed; as root: apt-get install valgrind") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"counting took longer than {RUN_S:g} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(f"counting failed with code {done.returncode}: {said[-1] if said else 'nothing was said'}")
    # Part 1 ends with the first mark, behind everything that warms up; then they come in pairs.
    return [_instructions(place / f"count.{2 * number + 2}") for number in range(len(OPERATIONS))]


def _instructions(dump: Path) -> int:
    totals = re.search(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE)
    if totals is None:
        raise UserError(f"valgrind wrote no totals to {dump.name}")
    return int(totals[1])


def measure(iterations: int, tell: Callable[[str], None]) -> Report:
    """Count everything; ``tell`` hears what is being counted. UserError."""
    package = Path(benchfs_fuse.__file__).parent
    with tempfile.TemporaryDirectory(prefix="benchfs-observing-") as directory:
        bare = Path(directory) / "bare"
        shutil.copytree(package, bare / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        hooks = without_hooks(bare / package.name)
        counted = {}
        for name, root, record in (("none", bare, False), ("off", package.parent, False), ("on", package.parent, True)):
            tell(f"hooks: {name}")
            found = count(root, Path(directory) / name, iterations, record)
            counted[name] = [total // iterations for total in found]
    rows = [Row(*row) for row in zip(OPERATIONS, counted["none"], counted["off"], counted["on"], strict=True)]
    return Report(1, iterations, hooks, tuple(rows))


def run_observing(iterations: int, as_json: bool) -> int:
    """Count, and show it. UserError."""
    console = Console(highlight=False)
    report = measure(iterations, _tell)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n")
    else:
        show(report, console)
    return 0


def _tell(what: str) -> None:
    sys.stderr.write(f"counting, {what}\n")


def show(report: Report, console: Console) -> None:
    """Print the rows as a table."""
    title = "instructions of one operation, in thousands: mount's handler, client, UCX, daemon, RocksDB"
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, title=title)
    table.add_column("operation")
    for head in ("no hooks", "hooks, off", "recording", "off adds", "recording adds"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in report.rows:
        counts = [f"{number / 1e3:,.1f}" for number in (row.none, row.off, row.on)]
        shares = [f"{number / row.none - 1:+.2%}" for number in (row.off, row.on)]
        table.add_row(row.operation, *counts, *shares)
    console.print(table)
    console.print(f"{report.hooks} hooks were taken out of the copy without")
