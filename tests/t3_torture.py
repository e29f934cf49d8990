"""How a torture ends that cannot be brought to its end: bounded, with its evidence, and with a sentence."""

import contextlib
import errno
import fcntl
import os
import random
import signal
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchfs_fuse.commands import torture
from benchfs_fuse.commands.tables import make_console
from benchfs_fuse.errors import UserError
from benchfs_fuse.torture import hands, run, shared, worker
from benchfs_fuse.torture.cuts import Cut, Cuts
from benchfs_fuse.torture.hands import Hand
from benchfs_fuse.torture.manifest import Entry
from benchfs_fuse.torture.run import Plan, Verdict


class Broken:
    """Stand for a run that breaks off."""

    error: BaseException

    def __init__(self, plan: Plan, tell: object, directory: Path, stack: object) -> None:
        (directory / "log").touch()
        self.left = None if plan.mountpoint is None else plan.mountpoint / "torture-1"

    def stopped_by_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def run(self) -> Verdict:
        raise self.error


@pytest.mark.parametrize(
    ("error", "seen", "kept"),
    [
        (OSError(errno.EROFS, "Read-only file system"), UserError, True),
        (subprocess.TimeoutExpired("check", 300), UserError, True),
        (UserError("that was wrong"), UserError, True),
        (ZeroDivisionError("a bug"), ZeroDivisionError, True),
        (KeyboardInterrupt(), KeyboardInterrupt, False),
    ],
)
def test_evidence_is_kept_and_named_however_it_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    seen: type[BaseException],
    kept: bool,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(run, "_Run", Broken)
    monkeypatch.setattr(Broken, "error", error, raising=False)
    with pytest.raises(seen) as raised:
        run.torture(Plan(Path("/somewhere"), 1, 1, 1), lambda *how_far: None)
    assert [path.name for path in tmp_path.glob("*/*")] == ["log"] * kept
    if kept:
        (directory,) = tmp_path.iterdir()
        said = "".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
        assert said.endswith(f"logs are kept in {directory}, what the workers made is left in /somewhere/torture-1")


def test_who_cannot_be_killed_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "KILLED_S", 0.01)
    process = hands.Process(lambda process, words: None)
    child = process._child
    child.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(child, "kill", lambda: None)
        assert not process.end()
    assert child.poll() is None
    monkeypatch.setattr(hands, "KILLED_S", 60)
    assert process.end()
    assert child.wait() == -signal.SIGKILL
    os.close(process.fd)


def test_what_is_kept_and_left_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    some: Counter[str] = Counter()
    kept, left = tmp_path / "a", tmp_path / "b"
    verdict = Verdict(["lost"], 1, some, some, some, some, some, some, some, False, 0, 0, 0, kept, left)
    torture._show(make_console(), Plan(tmp_path, 1, 1, 1), verdict)
    said = capsys.readouterr().out.replace("\n", "")
    assert f"kept in {kept}" in said and f"left in {left}" in said


class Unseen:
    """Stand for a cluster of two mounts, and for its workers: some trees cannot be looked at."""

    mountpoints = (Path("/here"), Path("/there"))
    data_dirs = (Path("/daemon"),)
    together = "shared"

    def __init__(self) -> None:
        self.hands = [Hand(number, self.mountpoints[number // 2], f"worker-{number % 2}") for number in range(4)]

    def cable(self, place: Path) -> "Unseen":
        return self

    def cut(self) -> None: ...

    def mend(self) -> None: ...

    def passed(self) -> int:
        return 0

    def passes(self, place: Path) -> bool:
        self.asked = not getattr(self, "asked", False)  # not while it is cut
        return not self.asked

    def process_of(self, place: Path) -> int:
        return 1

    def sessions_over(self, processes: list[int], mount: Path) -> bool:
        return True

    def run(self, command: str, root: Path, *more: object) -> str:
        return ""

    def look(self, root: Path) -> list[Entry] | str:
        return [] if root.name == "worker-0" else "it failed"

    def striking(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def struck(self, strike: None) -> list[str]:
        return ["write"]


def test_what_cannot_be_looked_at_after_an_expulsion_is_said() -> None:
    unseen: Any = Unseen()
    cuts = Cuts(unseen, unseen, random.Random(0), [Cut.EXPEL], lambda hands: None, lambda hand: False)
    assert cuts.cut() == ["it failed"]


def test_locks_may_be_held_by_workers_that_are_left_and_by_nobody_else(tmp_path: Path) -> None:
    worker.prepare(tmp_path)
    path = shared.lock_file(tmp_path, 0)
    with path.open("r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(shared.holder(3, 17))
        worker.lock(tmp_path, [3])
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(worker.lock, tmp_path, [0, 1])
            with pytest.raises(TimeoutError):
                waiting.result(0.3)
            fcntl.flock(file, fcntl.LOCK_UN)
            waiting.result(10)
