"""The suite's own rules: what is left out, what a missing device does, and what the end of a run says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFTEST = (Path(__file__).parent / "conftest.py").read_text()
TESTS = """
import pytest

def test_passes(): pass

def test_fails(): assert False

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.skip(reason="not on a Sunday")
def test_skipped(): pass

@pytest.mark.xfail(reason="the kernel drops it")
def test_expected(): assert False
"""


def run(directory: Path, file: str, *arguments: str, conftest: str = CONFTEST, **environ: str) -> str:
    (directory / "conftest.py").write_text(conftest)
    (directory / file).write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "setup.cfg"), "--rootdir", str(directory)]
    inherited = {name: text for name, text in os.environ.items() if name != "BENCHFS_REQUIRE_DEVICES"}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments, str(directory)],
        cwd=ROOT,
        env=inherited | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_the_end_gives_counts_and_reasons(tmp_path: Path) -> None:
    shown = run(tmp_path, "t0_x.py")
    assert "1 passed, 1 failed, 1 skipped, 1 expected failures\n" in shown
    assert "1 slow or exhaustive tests left out: scripts/test --all runs them\n" in shown
    assert "not on a Sunday" in shown
    assert "the kernel drops it" in shown


def test_all_leaves_nothing_out(tmp_path: Path) -> None:
    shown = run(tmp_path, "t0_x.py", "--all")
    assert "2 passed, 1 failed, 1 skipped, 1 expected failures\n" in shown
    assert "left out" not in shown


@pytest.mark.parametrize(
    ("environ", "counts"),
    [
        ({}, "0 passed, 0 failed, 4 skipped, 0 expected failures"),
        ({"BENCHFS_REQUIRE_DEVICES": "1"}, "0 passed, 2 failed, 1 skipped, 1 expected failures"),
    ],
)
def test_a_missing_device_skips_by_hand_and_fails_in_ci(tmp_path: Path, environ: dict[str, str], counts: str) -> None:
    lacking = CONFTEST + '\ndef missing_devices() -> str:\n    return "/dev/fuse missing"\n'
    shown = run(tmp_path, "t4_x.py", conftest=lacking, **environ)
    assert counts in shown
    assert "/dev/fuse missing" in shown


def test_levels_without_devices_run_without_them(tmp_path: Path) -> None:
    lacking = CONFTEST + '\ndef missing_devices() -> str:\n    return "/dev/fuse missing"\n'
    shown = run(tmp_path, "t3_x.py", conftest=lacking, BENCHFS_REQUIRE_DEVICES="1")
    assert "1 passed, 1 failed, 1 skipped, 1 expected failures\n" in shown


def test_two_long_byte_strings_are_compared_at_once_where_ci_is_set(tmp_path: Path) -> None:
    (tmp_path / "t0_bytes.py").write_text(
        'def test_bytes():\n    assert b"".join(b"%d." % n for n in range(30000)) == b"0.1.2,3.4" * 20000\n'
    )
    ended = ("-o", "faulthandler_timeout=60", "-o", "faulthandler_exit_on_timeout=true")
    shown = run(tmp_path, "t0_x.py", "-k", "test_bytes", *ended, CI="true")
    assert "At index 5 diff: b'.' != b','" in shown


def test_several_processes_end_with_the_same_counts(tmp_path: Path) -> None:
    (tmp_path / "t0_y.py").write_text("def test_passes_too(): pass\n")
    shown = run(tmp_path, "t0_x.py", "-n", "2", "--dist", "loadfile")
    assert "2 passed, 1 failed, 1 skipped, 1 expected failures\n" in shown
    assert "1 slow or exhaustive tests left out: scripts/test --all runs them\n" in shown
    assert "not on a Sunday" in shown
