"""The suite holds without the companion library too, but for what rests on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: Longer than the whole of it takes on a loaded machine.
DEADLINE_S = 1800.0

#: What is left out, and why: t4_without_companion.py says what these are refused.
LEFT_OUT = {
    "t4_posix_space.py": "fallocate, holes and copies are served by the library",
    "t4_acl_ext4.py": "default ACLs need the umask, which the kernel gives to the library alone",
    "t4_set_id.py": "who writes is told to the library alone",
    "t4_locks.py": "locks over several mounts are served by the library",
    "t4_bad_input.py": "what the library serves is refused in another way without it",
    "t4_differential.py": "it makes calls that the library serves",
}
SUITE = ("t4_posix_*.py", "t4_two_mounts.py", "t4_tools.py", "t4_exerciser.py", "t4_mount_smoke.py")


@pytest.mark.slow
def test_the_suite_passes_without_the_companion_library(tmp_path: Path) -> None:
    files = [path for pattern in SUITE for path in sorted(TESTS.glob(pattern)) if path.name not in LEFT_OUT]
    assert len(files) > len(SUITE)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"]
    environ = os.environ | {"BENCHFS_MOUNT_COMPANION": "false", "BENCHFS_REQUIRE_DEVICES": "1"}
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([*words, *map(str, files)], env=environ, stdout=log, stderr=log, timeout=DEADLINE_S)  # noqa: PLW1510
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, said[-20_000:]
    assert " 0 failed, 0 skipped," in said
