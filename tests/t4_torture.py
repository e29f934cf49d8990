"""``benchfs torture``: real runs find nothing, and find what is planted."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from cluster import running_cluster

from benchfs_fuse.torture.cuts import CUTS, Cut
from benchfs_fuse.torture.hands import Hands
from benchfs_fuse.torture.run import DAEMON_KILLS, MOUNT_KILLS, Plan, Verdict, _Run, torture

#: Where the random operations begin: another number gives others.
SEED = int(os.environ.get("BENCHFS_TEST_SEED", "0"))
BOTH = frozenset({DAEMON_KILLS, MOUNT_KILLS})


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep everything below the test's own directory."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def run(plan: Plan) -> Verdict:
    sys.stdout.write(f"BENCHFS_TEST_SEED={plan.seed}\n")
    verdict = torture(plan, lambda *how_far: None)
    sys.stdout.write(f"{verdict}\n")
    return verdict


def local(seconds: float, seed: int = SEED) -> Plan:
    return Plan(None, seconds, seed, workers=4)


def test_a_short_torture_finds_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[tuple[bool, list[str]]] = []

    def check_and_note(self: _Run, *, removed: bool = False) -> list[str]:
        checks.append((removed, check(self, removed=removed)))
        return checks[-1][1]

    check = _Run._check
    monkeypatch.setattr(_Run, "_check", check_and_note)
    verdict = run(local(60)._replace(kill=BOTH, lose_chunks=True, kills_max=3))
    assert verdict.complaints == []
    assert verdict.kills.total() == 3
    assert verdict.struck.total() >= 3
    assert verdict.lost_chunks > 0
    assert checks == [(False, []), (True, [])]  # with everything there, and with nothing there
    assert nothing_left(directory)


def test_what_a_worker_cannot_do_is_said(directory: Path) -> None:
    with Hands(directory, [directory], "", 0, 0, False) as hands:
        missing = directory / "missing"
        assert hands.run("look", missing, str(directory / "found")) == (
            f"look {missing} failed: No such file or directory: {missing}"
        )
        (directory / "there").mkdir()
        assert hands.run("remove", directory / "there") == ""


@pytest.mark.slow
def test_300_kills_lose_nothing(directory: Path) -> None:
    killed = {DAEMON_KILLS: 0, MOUNT_KILLS: 0}
    for number, kill in enumerate((frozenset({DAEMON_KILLS}), frozenset({MOUNT_KILLS}), BOTH)):
        verdict = run(local(3600, SEED + number)._replace(kill=kill, kills_max=100))
        assert verdict.complaints == []
        for name in killed:
            killed[name] += sum(count for title, count in verdict.kills.items() if name in title)
    assert sum(killed.values()) >= 300
    assert min(killed.values()) > 100
    assert list(directory.iterdir()) == []


@pytest.mark.slow
def test_full_disks_lose_nothing(directory: Path) -> None:
    verdict = run(local(40)._replace(kill=frozenset({DAEMON_KILLS}), fill_disk=True))
    assert verdict.complaints == []
    assert verdict.fills > 0
    assert verdict.refused > 0
    assert list(directory.iterdir()) == []


@pytest.mark.slow
def test_short_cuts_lose_nothing(directory: Path) -> None:
    verdict = run(local(60)._replace(cut_network=True, cuts=[Cut.PAUSE], cuts_max=2))
    assert verdict.complaints == []
    assert verdict.cuts.total() == 2
    assert verdict.cut_off.total() >= 2
    assert nothing_left(directory)


@pytest.mark.slow
def test_50_cuts_lose_nothing(directory: Path) -> None:
    verdict = run(local(3600)._replace(cut_network=True, cuts=CUTS, cuts_max=50))
    assert verdict.complaints == []
    assert verdict.cuts.total() == 50
    assert {title.partition(", ")[2] for title in verdict.cuts} == {kind.value for kind in Cut}
    assert {title.partition(", ")[0] for title in verdict.cuts} == {
        "of a daemon",
        "of a mount",
        "of a mount from a daemon",
    }
    assert nothing_left(directory)


@pytest.mark.slow
def test_cuts_longer_than_the_lease_let_nothing_land_late(directory: Path) -> None:
    verdict = run(local(600)._replace(cut_network=True, cuts=[Cut.EXPEL], cuts_max=3))
    assert verdict.complaints == []
    assert verdict.cuts == {f"of a mount, {Cut.EXPEL.value}": 3}
    assert nothing_left(directory)


@pytest.mark.slow
def test_cuts_from_one_daemon_longer_than_the_lease_let_nothing_land_late(directory: Path) -> None:
    """The mount reaches the other daemon all the time."""
    verdict = run(local(600)._replace(cut_network=True, cuts=[Cut.EXPEL_BY_ONE], cuts_max=3))
    assert verdict.complaints == []
    assert verdict.cuts == {f"of a mount from a daemon, {Cut.EXPEL_BY_ONE.value}": 3}
    assert verdict.operations["hold"] > 0 and verdict.operations["let_go"] > 0
    assert nothing_left(directory)


@pytest.mark.slow
def test_cuts_kills_and_full_disks_together_lose_nothing(directory: Path) -> None:
    plan = local(1200)._replace(kill=BOTH, cut_network=True, fill_disk=True, lose_chunks=True)
    verdict = run(plan._replace(kills_max=5, cuts_max=5, cuts=[Cut.PAUSE, Cut.EXPEL]))
    assert verdict.complaints == []
    assert verdict.kills.total() >= 5 and verdict.cuts.total() >= 5
    assert verdict.fills > 0
    assert nothing_left(directory)


def nothing_left(directory: Path) -> bool:
    """Tell whether all files are gone, and nothing is mounted below a directory, in any namespace."""
    tables = []
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):  # the process has ended
            tables.append(path.read_text())
    return list(directory.iterdir()) == [] and not any(str(directory) in table for table in tables)


def planted(monkeypatch: pytest.MonkeyPatch, fault: str, by: str | Cut) -> Plan:
    """Return what finds a fault that is planted in the daemons: by kills, or cuts."""
    monkeypatch.setenv("BENCHFS_PLANTED", fault)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    plan = local(600)._replace(workers=6, daemon_module="planted_daemon")
    return plan._replace(cut_network=True, cuts=[by]) if isinstance(by, Cut) else plan._replace(kill=frozenset({by}))


@pytest.mark.parametrize(
    ("fault", "by"),
    [
        ("early", DAEMON_KILLS),  # a write is acknowledged before it is done
        pytest.param("twice", DAEMON_KILLS, marks=pytest.mark.slow),  # a retry is applied anew
        # A participant of a transaction leaves its part out.
        pytest.param("skipped", DAEMON_KILLS, marks=pytest.mark.slow),
        pytest.param("forgotten", DAEMON_KILLS, marks=pytest.mark.slow),  # an intent does not outlive its daemon
        pytest.param("unfenced", MOUNT_KILLS, marks=pytest.mark.slow),  # a write lands after the end of its session
        # A write lands after its retry, and what came after that.
        pytest.param("resumed", Cut.BREAK, marks=pytest.mark.slow),
        # A write lands after the end of its session and what was seen then, of a mount that was cut off.
        pytest.param("afterwards", Cut.EXPEL, marks=pytest.mark.slow),
        # Who is cut off from one daemon goes on at the others.
        pytest.param("alone", Cut.EXPEL_BY_ONE, marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch, fault: str, by: str | Cut) -> None:
    plan = planted(monkeypatch, fault, by)
    verdict = run(plan)
    assert verdict.complaints != []
    assert not any("has died by itself" in one for one in verdict.complaints)
    assert by is not Cut.EXPEL or all("(after the end of its session)" in one for one in verdict.complaints)
    assert verdict.seconds < plan.seconds
    assert verdict.kept is not None and (verdict.kept / "complaints").read_text().splitlines() == verdict.complaints


@pytest.mark.slow
def test_writes_that_take_long_behind_a_fence_are_no_fault(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "a fence left out" is found by is not that writes take long."""
    verdict = run(planted(monkeypatch, "slow", MOUNT_KILLS)._replace(kills_max=25))
    assert verdict.complaints == []
    assert verdict.kills.total() == 25
    assert nothing_left(directory)


def command(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "benchfs_fuse.cli", "torture", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_what_cannot_be_tortured_gets_a_sentence_and_code_3(directory: Path) -> None:
    with running_cluster() as cluster:
        mountpoint = cluster.mount("-o", "ro").mountpoint
        with command(str(mountpoint), "--minutes", "0.03", "--workers", "2") as process:
            output, error = process.communicate(timeout=120)
    assert (process.returncode, output) == (3, "")
    assert len(error.splitlines()) == 1 and "there is no verdict: make " in error and "Read-only file system" in error
    (kept,) = directory.iterdir()
    assert f"logs are kept in {kept}" in error


def test_a_mount_is_tortured_without_faults() -> None:
    with running_cluster() as cluster:
        mountpoint = cluster.mount().mountpoint
        with command(str(mountpoint), "--minutes", "0.03", "--workers", "2", "--seed", "7", "--json") as process:
            output, error = process.communicate(timeout=120)
        assert (process.returncode, error) == (0, "")
        said = json.loads(output)
        assert said["sound"] and said["complaints"] == []
        assert said["operations"]["write"] > 0
        assert said["again"] == f"benchfs torture {mountpoint} --minutes 0.03 --seed 7 --workers 2"
        assert list(mountpoint.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGINT, []),
        pytest.param(signal.SIGTERM, [], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, ["--cut-network"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_it_early_with_a_verdict(directory: Path, number: signal.Signals, more: list[str]) -> None:
    with command("--local", "--minutes", "60", "--workers", "2", *more) as process:
        deadline = time.monotonic() + 60
        while not list(directory.glob("*/mount-0/worker-1/*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, number)  # as from a terminal
        output, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert "which a signal cut short" in output
    assert output.splitlines()[-1].startswith("sound")
    assert nothing_left(directory)
