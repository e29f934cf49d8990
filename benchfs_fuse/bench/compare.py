"""Do the same work in several directories, in alternating rounds, and keep what it took: ``benchfs bench compare``.

Each directory has a worker process of its own. In each round each work is done in each directory before the next work
begins, and each round begins with another directory: what the machine does meanwhile hits all alike. The report is
written after each round; a run that breaks off keeps what was measured, and leaves nothing else.
"""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .. import kernel_mounts
from ..errors import UserError
from ..limits import MIB
from ..processes import uninterrupted
from . import machine, plots, report, work
from .report import Place, Report, Sample
from .tools import may_drop_caches
from .work import WORKS, Sizes
from .worker import CLEAN_TIMEOUT_S, Hung, Order, Task, Worker

#: Where the baseline and what goes in lie unless told otherwise: memory.
SHARED_MEMORY = Path("/dev/shm")
#: No part of a work takes this long where anything proceeds at all.
STEP_TIMEOUT_S = 600.0
#: Seconds for workers that are broken off to remove what they made, and after a part that hung.
_BROKEN_OFF_S = 20.0
_HUNG_S = 5.0
#: What the directory under test and the one below the daemons' data are called in reports.
MOUNT, DISK = "mount", "disk"


class Wanted(NamedTuple):
    """Say what to compare with what, and how much of it."""

    #: A directory in a benchfs mount.
    mountpoint: Path
    #: None: a directory in memory.
    baseline: Path | None
    also: Mapping[str, Path]
    #: Where the daemons of the mount keep their data, if that is known.
    data_dir: Path | None
    sizes: Sizes
    #: A new directory, or an empty one.
    out: Path
    #: Leave what else the machine has cached alone.
    keep_caches: bool = False
    step_timeout_s: float = STEP_TIMEOUT_S


def compare(wanted: Wanted) -> Report:
    """Compare, leave a folder, return what is in it. UserError: one sentence, also about what is kept and left."""
    mounted = kernel_mounts.above(wanted.mountpoint)
    if mounted is None or not kernel_mounts.is_benchfs(mounted):
        raise UserError(f"{wanted.mountpoint} is not in a benchfs mount: mount it first (benchfs up, benchfs mount)")
    facts = machine.mount_of(mounted.mountpoint)
    with _Run(wanted, facts, mounted.mountpoint) as run:
        run.prepare()
        run.rounds()
    return run.report()


class _Run:
    """Be one comparison under way. A context manager: at its end nothing is left but the folder."""

    def __init__(self, wanted: Wanted, facts: machine.MountFacts, mountpoint: Path) -> None:
        self._wanted = wanted
        self._facts = facts
        self._machine = machine.describe()
        self._baseline = "tmpfs" if wanted.baseline is None else "baseline"
        self._directories = self._name_directories()
        self._drop = not wanted.keep_caches and may_drop_caches()
        self._works = dict(WORKS)
        self._left_out: list[str] = []
        if shutil.which("fio") is None:
            del self._works["fio"]
            self._left_out.append("fio: it is not installed")
        self._places: list[Place] = []
        self._samples: list[Sample] = []
        self._trouble = "it is under way"
        self._hangs = False
        self._workers: dict[str, Worker] = {}
        self._scratch: Path | None = None
        self._made = _make_folder(wanted.out, mountpoint)

    def _name_directories(self) -> dict[str, Path]:
        wanted = self._wanted
        named = {MOUNT: wanted.mountpoint, self._baseline: wanted.baseline or SHARED_MEMORY}
        if wanted.data_dir is not None:
            named[DISK] = wanted.data_dir
        for name, directory in wanted.also.items():
            if name in named:
                raise UserError(f"{name} is the name of {named[name]} already: give {directory} another one")
            named[name] = directory
        return named

    def report(self) -> Report:
        """Return what is known so far."""
        return Report(
            complete=not self._trouble,
            trouble=self._trouble,
            sizes=self._wanted.sizes,
            mount_name=MOUNT,
            baseline_name=self._baseline,
            places=tuple(self._places),
            machine=self._machine,
            mount=self._facts,
            cold=_COLD[self._drop],
            left_out=tuple(self._left_out),
            samples=tuple(self._samples),
        )

    # ── before ───────────────────────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> "_Run":
        return self

    def prepare(self) -> None:
        """Begin in all directories, and make what goes in. UserError."""
        wanted = self._wanted
        needed = wanted.sizes.room
        self._scratch = _scratch_directory(needed)
        written = (str(wanted.data_dir),) if wanted.data_dir is not None else ()
        with uninterrupted():
            for name, directory in self._directories.items():
                path = str(kernel_mounts.plain_path(directory))
                task = Task(path, str(self._scratch), wanted.sizes, self._drop, written)
                self._workers[name] = Worker(task)
        for name, worker in self._workers.items():
            self._places.append(Place(name, worker.hello()))
        for place in self._places:
            free = place.storage.free_bytes
            if free < needed:
                raise UserError(
                    f"{place.storage.path}: {free // MIB} MiB are free, the comparison needs {needed // MIB}"
                )
        try:
            work.stage(self._scratch, wanted.sizes)
        except OSError as error:
            raise UserError(f"cannot make what is to be copied in {self._scratch}: {error.strerror}") from None

    # ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────

    def rounds(self) -> None:
        """Do all the work. UserError: something failed, and names where."""
        count = self._wanted.sizes.rounds
        names = list(self._workers)
        with _Pace(len(self._works) * len(names) * count, sys.stderr.isatty()) as pace:
            for number in range(count):
                order = names[number % len(names) :] + names[: number % len(names)]
                for one in self._works:
                    for name in order:
                        with pace.step(one, name, f"round {number + 1} of {count}"):
                            self._do(number, one, name)
                if number + 1 < count:
                    self._keep()
        self._trouble = ""

    def _do(self, number: int, one: str, name: str) -> None:
        measuring = self._workers[name].work(Order(one), self._wanted.step_timeout_s)
        try:
            while True:
                self._samples.append(Sample(number, name, one, next(measuring)))
        except StopIteration as end:
            sentences: tuple[str, ...] = end.value
        except UserError as error:
            self._hangs = isinstance(error, Hung)
            raise UserError(f"{name} ({self._directories[name]}), {one}: {error}") from None
        for sentence in sentences:
            if (said := f"{name}: {sentence}") not in self._left_out:
                self._left_out.append(said)

    def _keep(self) -> None:
        try:
            report.save_json(self.report(), self._wanted.out)
        except OSError as error:
            raise UserError(f"cannot write to {self._wanted.out}: {error.strerror}") from None

    # ── after ────────────────────────────────────────────────────────────────────────────────────────────────────

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            self._trouble = str(error)
        elif error is not None:
            self._trouble = "it was interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else repr(error)
        with uninterrupted():
            left = self._clean_up(at_once=error is not None)
            kept = self._finish(left, drawn=error is None or isinstance(error, UserError))
        sentence = "; ".join([self._trouble, *left, *kept] if self._trouble else [*left, *kept])
        if error is None and not left and not kept:
            return
        if error is None or isinstance(error, UserError):
            raise UserError(sentence) from None
        sys.stderr.write(f"benchfs: {sentence}\n")

    def _clean_up(self, *, at_once: bool) -> list[str]:
        """End all workers; return what is left behind. One that hangs is not waited for as long as the others."""
        patience = _HUNG_S if self._hangs else _BROKEN_OFF_S if at_once else CLEAN_TIMEOUT_S
        left = [sentence for one in self._workers.values() if (sentence := one.end(patience, at_once=at_once))]
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return left

    def _finish(self, left: Sequence[str], *, drawn: bool) -> list[str]:
        """Write the folder, or take it away if nothing was measured. Return sentences about what is kept or failed.

        ``drawn``: with plots, which take some seconds.
        """
        out = self._wanted.out
        if not self._samples:
            for path in (out / report.JSON_NAME, *([out] if self._made else [])):
                with contextlib.suppress(OSError):
                    path.rmdir() if path is out else path.unlink()
            return []
        self._left_out += left
        result = self.report()
        try:
            report.save_json(result, out)  # first of all: drawing takes a while
            pictures = []
            try:
                pictures = plots.draw(result, out) if drawn else []
            except UserError as error:
                self._left_out.append(str(error))
                result = self.report()
            report.save(result, out, pictures)
        except OSError as error:
            return [f"the report in {out} is not whole: {error.strerror}"]
        return [f"what was measured so far is in {out}, marked as incomplete"] if self._trouble else []


_COLD = {
    True: "cold: after the machine's caches were dropped",
    False: "cold: only the pages of the files at hand were forgotten, names stayed cached (dropping all caches needs "
    "root, and is left out with --keep-caches)",
}


def _make_folder(out: Path, mountpoint: Path) -> bool:
    """Make sure, before anything is measured, that the report can be written; tell if the folder is new. UserError."""
    if kernel_mounts.plain_path(out).is_relative_to(mountpoint):
        raise UserError(f"{out} lies in the mount that is measured: write the report elsewhere")
    try:
        new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty: name a new folder for the report")
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"x")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    return new


def _scratch_directory(needed: int) -> Path:
    """Make a directory for what goes in and what comes out again: in memory if it has room, else where TMPDIR says."""
    for parent in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        try:
            if shutil.disk_usage(parent).free >= 3 * needed:
                return Path(tempfile.mkdtemp(prefix="benchfs-bench-scratch-", dir=parent))
        except OSError:
            continue
    raise UserError(f"neither {SHARED_MEMORY} nor {tempfile.gettempdir()} has {3 * needed // MIB} MiB to work with")


class _Pace:
    """Show what is running and how long the rest will take, by how long the same took before."""

    def __init__(self, steps: int, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)
        self._steps = steps
        self._took: dict[tuple[str, str], list[float]] = {}
        self._done = 0
        self._task: TaskID | None = None

    def __enter__(self) -> "_Pace":
        self._progress.start()
        self._task = self._progress.add_task("", total=self._steps, left="")
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def left_s(self) -> float | None:
        """Guess how many seconds the rest takes; None before there is anything to go by."""
        if not self._took:
            return None
        means = [sum(one) / len(one) for one in self._took.values()]
        return (self._steps - self._done) * sum(means) / len(means)

    @contextlib.contextmanager
    def step(self, one: str, name: str, where: str) -> Iterator[None]:
        """Do one work in one place inside the block."""
        assert self._task is not None
        left = self.left_s()
        shown = "" if left is None else f"about {int(left) // 60}:{int(left) % 60:02} left"
        self._progress.update(
            self._task, description=f"{where}: {one} in {name}", completed=self._done, left=shown, refresh=True
        )
        start = time.monotonic()
        yield
        self._took.setdefault((one, name), []).append(time.monotonic() - start)
        self._done += 1
