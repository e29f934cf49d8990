"""Try a directory with the tools that people use, check every byte, and time it beside another directory.

    python -m benchfs_fuse.quickcheck /mnt/benchfs --baseline /dev/shm

The same works as those of ``benchfs bench compare``, or parts of them: a real tree (Python's standard library) goes in
and out with cp and away with ``rm -r``, a large file in and out with cp and with dd, blocks are written and read with
fio. What is read back cold comes past the kernel's page cache where the file system lets go of it (tmpfs cannot: there
the cache is the storage).
"""

import argparse
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .bench import tools, work
from .bench.report import rate_of
from .bench.work import At, Measure, Sizes
from .errors import UserError
from .limits import MIB

#: The large file: enough to fill every buffer on the way, little enough for a second or two.
LARGE_BYTES_MAX = 256 * MIB
#: Below this, cp's own start is a good part of what is measured.
LARGE_BYTES_MIN = 8 * MIB
#: The best of three counts: memory that a virtual machine touches first costs it several times the copying.
LARGE_RUNS = 3
#: Small blocks: 2048 of them, so that one lost wake-up does not decide the figure. Four times as much in large ones.
FIO_BYTES = 8 * MIB
#: Parts of the standard library's directory that are not Python's own or say nothing new.
_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "__pycache__", "config-*")


def stage_tree(target: Path) -> None:
    """Copy the real tree to where it holds still: others may be writing to the original's caches."""
    shutil.copytree(sysconfig.get_path("stdlib"), target, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))


def run_steps(where: Path, scratch: Path, sizes: Sizes) -> list[Measure]:
    """Do all works in an empty directory, verifying every byte; ``scratch`` holds what goes in.

    Raises UserError on the first difference or failing tool.
    """
    at = At(where, scratch, sizes, drop=False)
    measures = list(work.copy_tree(at))
    runs = [list(work.copy_large(at)) for _ in range(LARGE_RUNS)]
    measures += [min(same, key=lambda one: one.time_ns) for same in zip(*runs, strict=True)]
    measures += work.copy_dd_once(at)
    measures += work.run_fio(at)
    return measures


@contextmanager
def _workplace(directory: Path) -> Iterator[Path]:
    try:
        place = Path(tempfile.mkdtemp(prefix="quickcheck-", dir=directory))
    except OSError as error:
        raise UserError(f"{directory}: cannot make a directory there: {error.strerror}") from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _large_bytes(target: Path, baseline: Path, tree: Path) -> int:
    """Choose the large file's size: five of it, or two more trees, have to fit beside what is there already."""
    tree_bytes = sum(path.lstat().st_blocks * 512 for path in tools.walk(tree))
    taken = 2 * tree_bytes + 5 * FIO_BYTES
    needed = taken + 5 * LARGE_BYTES_MIN
    rooms = []
    for path in (target, baseline):
        space = os.statvfs(path)
        rooms.append(space.f_bavail * space.f_frsize)
        if rooms[-1] < needed:
            raise UserError(f"{path}: {rooms[-1] // MIB} MiB are free, the check needs {needed // MIB + 1} MiB")
    return min(LARGE_BYTES_MAX, (min(rooms) - taken) // 5 // MIB * MIB)


def compare(target: Path, baseline: Path) -> tuple[list[Measure], list[Measure]]:
    """Run the steps in the baseline and in the target, and return the target's and the baseline's."""
    with _workplace(baseline) as beside, _workplace(target) as where:
        scratch, reference = beside / "scratch", beside / "reference"
        scratch.mkdir()
        reference.mkdir()
        stage_tree(scratch / "tree")
        sizes = Sizes("check", 1, 0, _large_bytes(target, baseline, scratch / "tree"), FIO_BYTES, 0, 0)
        work.stage_large(scratch, sizes)
        reference_steps = run_steps(reference, scratch, sizes)
        shutil.rmtree(reference)
        return run_steps(where, scratch, sizes), reference_steps


def table_of(target: Path, steps: Sequence[Measure], baseline: Path, reference: Sequence[Measure]) -> Table:
    """Lay both runs side by side, with the ratio of their times."""
    names, tree_bytes = steps[0].operations, steps[0].size
    table = Table(title=f"every byte checked ({names:,} names with {tree_bytes / MIB:,.0f} MiB)", box=SIMPLE)
    table.add_column("step", no_wrap=True)
    for path in (target, baseline):
        table.add_column(str(path), justify="right", overflow="fold")
    table.add_column("times", justify="right", no_wrap=True)
    others = {(other.name, other.heat): other for other in reference}
    for step in steps:
        other = others.get((step.name, step.heat))  # what one of them refuses (direct I/O), it does not have
        name = f"{step.name}, {step.heat}" if step.heat else step.name
        shown = [rate_of(one.time_ns, one.operations, one.size) if one else "–" for one in (step, other)]
        table.add_row(name, *shown, f"{step.time_ns / other.time_ns:.1f} ×" if other else "–")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the directory named on the command line with the baseline; 1 if anything was not as written."""
    parser = argparse.ArgumentParser(prog="python -m benchfs_fuse.quickcheck", description=__doc__.partition("\n")[0])
    parser.add_argument("target", metavar="DIRECTORY", type=Path)
    parser.add_argument("--baseline", metavar="DIRECTORY", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args(argv)
    try:
        steps, reference = compare(arguments.target, arguments.baseline)
    except UserError as error:
        sys.stderr.write(f"quickcheck: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"quickcheck: {error.filename}: {error.strerror}\n")
        return 1
    Console().print(table_of(arguments.target, steps, arguments.baseline, reference))
    return 0


if __name__ == "__main__":
    sys.exit(main())
