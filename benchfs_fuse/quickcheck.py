"""Try a directory with the tools that people use, check every byte, and time it beside another directory.

    python -m benchfs_fuse.quickcheck /mnt/benchfs --baseline /dev/shm

The same steps run in both: a real tree (Python's standard library) goes in and out with `cp -a`, one large file with
`dd`, small random blocks with `fio`, and all of it away with `rm -r`. What is read back comes past the kernel's page
cache where the file system lets go of it (tmpfs cannot: there the cache is the storage).
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .errors import UserError
from .limits import KIB, MIB

#: The large file: enough to fill every buffer on the way, little enough for a second or two.
DD_BYTES_MAX = 256 * MIB
#: Below this, dd's own start is a good part of what is measured.
DD_BYTES_MIN = 8 * MIB
#: The best of three counts: memory that a virtual machine touches first costs it several times the copying.
DD_RUNS = 3
#: Small blocks: 8192 of them, so that one fsync or one lost wake-up does not decide the figure.
FIO_BYTES = 32 * MIB
FIO_BLOCK_BYTES = 4 * KIB
#: No step takes this long where anything proceeds at all; then something hangs, and that is the answer.
STEP_TIMEOUT_S = 300.0
#: Parts of the standard library's directory that are not Python's own or say nothing new.
_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "__pycache__", "config-*")


class Step(NamedTuple):
    """Hold what one step did and how long it took."""

    name: str
    size: int
    """Bytes of file content that moved."""
    operations: int
    """Files, for steps that are about files; blocks, for steps that are about blocks; else 0."""
    time_s: float


class Entry(NamedTuple):
    """Hold what must be the same of a file, directory or link after copying."""

    mode: int
    mtime_ns: int
    size: int
    content: str
    """SHA-256 of a file, target of a link."""


def stage_tree(target: Path) -> None:
    """Copy the real tree to where it holds still: others may be writing to the original's caches."""
    shutil.copytree(sysconfig.get_path("stdlib"), target, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))


def drop_cached(*files: Path) -> None:
    """Ask the kernel to forget the clean cached pages of files, so that the next read comes from the file system."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _walk(root: Path) -> Iterator[Path]:
    yield root
    for directory, names, files in os.walk(root):
        yield from (Path(directory, name) for name in names + files)


def _regular_files(root: Path) -> list[Path]:
    return [path for path in _walk(root) if stat.S_ISREG(path.lstat().st_mode)]


def snapshot(root: Path) -> dict[str, Entry]:
    """Read everything at and below a directory: relative name → what it is."""
    found = {}
    for path in _walk(root):
        attrs = path.lstat()
        size, content = 0, ""
        if stat.S_ISREG(attrs.st_mode):
            with path.open("rb") as file:
                size, content = attrs.st_size, hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISLNK(attrs.st_mode):
            content = str(path.readlink())
        found[str(path.relative_to(root))] = Entry(attrs.st_mode, attrs.st_mtime_ns, size, content)
    return found


def refuse_difference(expected: dict[str, Entry], found: dict[str, Entry], where: Path) -> None:
    """Raise UserError that names the first entry that is missing, additional or different."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where}: {name} is not what was written: {found.get(name)} instead of {expected.get(name)}"
            )


def _run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Run a tool to its end and return its standard output; UserError if it fails, is missing or takes too long."""
    english = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=english, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} did not end within {STEP_TIMEOUT_S:.0f} s: {' '.join(map(str, command))}"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{command[0]} failed: {reason}")
    return done.stdout


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _fio_time_s(where: Path, scratch: Path, *options: str) -> float:
    """Run fio's random 4 KiB job and return the time of its reads and writes, without fio's own start."""
    fixed = (
        *("--name=quickcheck", f"--directory={where}", "--rw=randwrite", "--ioengine=psync", "--output-format=json"),
        *(f"--size={FIO_BYTES}", f"--bs={FIO_BLOCK_BYTES}", "--verify=crc32c", "--verify_fatal=1"),
        "--verify_state_save=0",
    )
    job = json.loads(_run(["fio", *fixed, *options], cwd=scratch))["jobs"][0]
    time_ms: int = job["write"]["runtime"] + job["read"]["runtime"]
    return max(time_ms, 1) / 1000  # fio counts whole milliseconds


def run_steps(where: Path, scratch: Path, tree: Path, dd_bytes: int) -> list[Step]:
    """Run all steps in an empty directory, verifying every byte; scratch is where what comes out again goes.

    Both directories are left empty. Raises UserError on the first difference or failing tool.
    """
    expected = snapshot(tree)
    tree_bytes = sum(entry.size for entry in expected.values())
    inside, outside = where / "tree", scratch / "tree"

    in_s = _timed(lambda: _run(["cp", "-a", "--", tree, inside]))
    drop_cached(*_regular_files(inside))
    refuse_difference(expected, snapshot(inside), inside)
    drop_cached(*_regular_files(inside))
    out_s = _timed(lambda: _run(["cp", "-a", "--", inside, outside]))
    refuse_difference(expected, snapshot(outside), outside)
    shutil.rmtree(outside)

    source, large, back = scratch / "source", where / "large", scratch / "back"
    with source.open("wb") as file:
        for _ in range(dd_bytes // MIB):
            file.write(os.urandom(MIB))
    dd_in_s, dd_out_s = math.inf, math.inf
    for _ in range(DD_RUNS):
        large.unlink(missing_ok=True)
        back.unlink(missing_ok=True)
        dd_in_s = min(dd_in_s, _timed(lambda: _run(["dd", f"if={source}", f"of={large}", "bs=1M"])))
        drop_cached(large)
        dd_out_s = min(dd_out_s, _timed(lambda: _run(["dd", f"if={large}", f"of={back}", "bs=1M"])))
        _run(["cmp", "--", source, back])
    source.unlink()
    back.unlink()

    fio_write_s = _fio_time_s(where, scratch, "--do_verify=0")
    # fio makes the kernel forget the file's cached pages before it starts (its option `invalidate`).
    fio_verify_s = _fio_time_s(where, scratch, "--verify_only")

    remove_s = _timed(lambda: _run(["rm", "-r", "--", inside]))
    for path in where.iterdir():
        path.unlink()
    names, blocks = len(expected), FIO_BYTES // FIO_BLOCK_BYTES
    return [
        Step("cp -a in", tree_bytes, names, in_s),
        Step("cp -a out", tree_bytes, names, out_s),
        Step("dd in 1 MiB", dd_bytes, 0, dd_in_s),
        Step("dd out 1 MiB", dd_bytes, 0, dd_out_s),
        Step("fio write 4 KiB", FIO_BYTES, blocks, fio_write_s),
        Step("fio verify 4 KiB", FIO_BYTES, blocks, fio_verify_s),
        Step("rm -r", 0, names, remove_s),
    ]


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


def _dd_bytes(target: Path, baseline: Path, tree: Path) -> int:
    """Choose the large file's size: three of it, or two more trees, have to fit beside what is there already."""
    tree_bytes = sum(path.lstat().st_blocks * 512 for path in _walk(tree))
    needed = 2 * tree_bytes + FIO_BYTES + 3 * DD_BYTES_MIN
    rooms = []
    for path in (target, baseline):
        space = os.statvfs(path)
        rooms.append(space.f_bavail * space.f_frsize)
        if rooms[-1] < needed:
            raise UserError(f"{path}: {rooms[-1] // MIB} MiB are free, the check needs {needed // MIB + 1} MiB")
    return min(DD_BYTES_MAX, (min(rooms) - 2 * tree_bytes - FIO_BYTES) // 3 // MIB * MIB)


def compare(target: Path, baseline: Path) -> tuple[list[Step], list[Step]]:
    """Run the steps in the baseline and in the target, and return the target's and the baseline's."""
    with _workplace(baseline) as beside, _workplace(target) as where:
        tree, scratch, reference = beside / "tree", beside / "scratch", beside / "reference"
        stage_tree(tree)
        dd_bytes = _dd_bytes(target, baseline, tree)
        scratch.mkdir()
        reference.mkdir()
        reference_steps = run_steps(reference, scratch, tree, dd_bytes)
        return run_steps(where, scratch, tree, dd_bytes), reference_steps


def _rate(step: Step) -> str:
    if step.operations:
        return f"{step.operations / step.time_s:,.0f}/s"
    return f"{step.size / MIB / step.time_s:,.0f} MiB/s"


def table_of(target: Path, steps: Sequence[Step], baseline: Path, reference: Sequence[Step]) -> Table:
    """Lay both runs side by side, with the ratio of their times."""
    names, tree_bytes = steps[0].operations, steps[0].size
    table = Table(title=f"every byte checked ({names:,} names with {tree_bytes / MIB:,.0f} MiB)", box=SIMPLE)
    table.add_column("step", no_wrap=True)
    for path in (target, baseline):
        table.add_column(str(path), justify="right", overflow="fold")
        table.add_column("", justify="right", no_wrap=True)
    table.add_column("times", justify="right", no_wrap=True)
    for step, other in zip(steps, reference, strict=True):
        ratio = f"{step.time_s / other.time_s:.1f} ×"
        table.add_row(step.name, f"{step.time_s:.3f} s", _rate(step), f"{other.time_s:.3f} s", _rate(other), ratio)
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
