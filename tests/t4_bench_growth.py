"""``benchfs bench growth`` on a real mount: what it measures, what it says, and that nothing of it stays."""

from pathlib import Path

import msgspec
import pytest
from cli_help import benchfs, refused
from rich.console import Console

from benchfs_fuse.bench import growth
from benchfs_fuse.bench.growth import CLIENTS, Report, run_growth

pytest_plugins = ("mounts",)

FILES = 60


@pytest.mark.slow
def test_everything_is_measured_and_nothing_stays(
    mountpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("ROUNDS", 3), ("LOAD_S", 0.2), ("FEW", 10), ("SPREAD", 5), ("READS", 3)):
        monkeypatch.setattr(growth, name, value)
    assert run_growth(mountpoint, files=FILES, as_json=True) == 0
    report = msgspec.json.decode(capsys.readouterr().out, type=Report)
    assert [row.unit for row in report.rows] == ["µs"] * 4 + ["1/s"]
    for row in report.rows:
        assert row.small > 0 and row.large > 0 and 0 < row.ratio.low <= row.ratio.value <= row.ratio.high
    assert f"of 10 and {FILES}" in report.rows[2].what and f"{CLIENTS} clients" in report.rows[4].what
    assert "processors busy" in report.rows[4].note
    assert list(mountpoint.iterdir()) == []
    growth.show(report, Console(highlight=False))
    table = capsys.readouterr().out
    assert "large to small" in table and all(row.what.split(",")[0] in table for row in report.rows)


def test_bad_places_are_told(tmp_path: Path, mountpoint: Path) -> None:
    assert "is not in a benchfs mount" in refused("bench", "growth", tmp_path)
    assert "growth is seen with 20 to 10000000 files" in refused("bench", "growth", mountpoint, "--files", 1, code=2)
    assert "examples:" in benchfs("bench", "growth", "--help").out
