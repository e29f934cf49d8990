"""``benchfs bench protections``: every protection has its row, and what was taken away is away."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cli_help import refused

from benchfs_fuse.bench import protections
from benchfs_fuse.bench.protections import OPERATIONS, Report, run_protections
from benchfs_fuse.bench.unprotected import PROTECTIONS


@pytest.mark.slow
def test_every_protection_is_measured_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protections, "ROUNDS", 1)
    assert set(OPERATIONS) == set(PROTECTIONS)
    assert run_protections(tmp_path, 3, as_json=True) == 0
    report = msgspec.json.decode(capsys.readouterr().out, type=Report)
    assert [row.protection for row in report.rows] == list(OPERATIONS)
    for row in report.rows:
        assert row.without.count == row.complete.count == 3 and row.ratio.value > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", list(PROTECTIONS))
def test_what_was_taken_away_is_away(name: str) -> None:
    """In a process of its own: it does not come back."""
    program = (
        "import sys\n"
        "from benchfs_fuse.bench.unprotected import PROTECTIONS\n"
        "from benchfs_fuse.chunks import disk\n"
        "from benchfs_fuse.kv.rocks import RocksStore\n"
        "from benchfs_fuse.rpc.server import ServedCall\n"
        "def state(): return (ServedCall.commit, disk.mark, disk.trouble_with, RocksStore.sync)\n"
        "before = state()\n"
        "PROTECTIONS[sys.argv[1]]()\n"
        "print(sum(one is not other for one, other in zip(before, state())))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, name], check=True, capture_output=True, text=True)
    assert int(done.stdout) == (2 if name == "marks of chunk files" else 1)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    assert "cannot write in" in refused("bench", "protections", "--data-dir", tmp_path / "missing")
