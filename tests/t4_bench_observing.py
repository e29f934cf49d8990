"""``benchfs bench observing``: every hook is taken out where it should be, and what is counted keeps its promise."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import benchfs_fuse
from benchfs_fuse.bench.observed import OPERATIONS
from benchfs_fuse.bench.observing import SWITCHES, Report, count, run_observing, without_hooks
from benchfs_fuse.errors import UserError


def test_no_hook_is_left_in_the_copy_and_it_works(tmp_path: Path) -> None:
    package = tmp_path / "benchfs_fuse"
    shutil.copytree(Path(benchfs_fuse.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    taken = without_hooks(package)
    assert taken > 20
    left = [
        (file.name, line)
        for file in package.rglob("*.py")
        if file.name not in SWITCHES
        for line in file.read_text().splitlines()
        if re.search(r"\brecording\.", line)
    ]
    assert left == []
    program = "import benchfs_fuse.fuse, benchfs_fuse.daemon; print(benchfs_fuse.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == package


def test_without_valgrind_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="valgrind is not installed"):
        count(tmp_path, tmp_path / "place", 1, False)


@pytest.mark.slow
def test_hooks_cost_less_than_a_hundredth_and_recording_less_than_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_observing(300, as_json=True) == 0
    report = msgspec.json.decode(capsys.readouterr().out, type=Report)
    assert [row.operation for row in report.rows] == list(OPERATIONS)
    for row in report.rows:
        assert row.none < row.on
        assert row.off < row.none * 1.01
        assert row.on < row.none * 1.10
