"""The suite holds without the companion library too, but for what rests on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: Longer than any file takes on a loaded machine.
DEADLINE_S = 900.0

#: What tries a mounted file system: files and patterns of them.
SUITE = (
    *("t4_posix_*.py", "t4_acl_ext4.py", "t4_set_id.py", "t4_locks.py", "t4_bad_input.py", "t4_differential.py"),
    *("t4_two_mounts.py", "t4_tools.py", "t4_exerciser.py", "t4_mount_smoke.py", "t4_crash.py", "t4_space.py"),
)
#: What of that is left out, files or single tests, and why: t4_without_companion.py says what is refused instead.
LEFT_OUT = {
    "t4_posix_space.py": "fallocate, holes and copies are served by the library",
    "t4_acl_ext4.py": "default ACLs need the umask, which the kernel gives to the library alone",
    "t4_set_id.py": "who writes is told to the library alone",
    "t4_locks.py": "locks over several mounts are served by the library",
    "t4_bad_input.py": "what the library serves is refused in another way without it",
    "t4_differential.py": "it makes calls that the library serves",
    "t4_crash.py::test_a_mount_that_is_killed_while_it_drops_pages_is_cleaned_up": "the kernel drops them by itself",
}


FILES = {path.name: path for pattern in SUITE for path in sorted(TESTS.glob(pattern))}


def test_what_is_left_out_is_in_the_suite() -> None:
    for name in LEFT_OUT:
        file, _, test = name.partition("::")
        assert f"def {test}" in FILES[file].read_text(), name


@pytest.mark.slow
@pytest.mark.parametrize("file", [name for name in FILES if name not in LEFT_OUT])
def test_the_suite_passes_without_the_companion_library(tmp_path: Path, file: str) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"]
    left_out = [f"--deselect={TESTS.name}/{name}" for name in LEFT_OUT if "::" in name]
    environ = os.environ | {"BENCHFS_MOUNT_COMPANION": "false", "BENCHFS_REQUIRE_DEVICES": "1"}
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(  # noqa: PLW1510
            [*words, *left_out, FILES[file]], env=environ, stdout=log, stderr=log, timeout=DEADLINE_S
        )
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, said[-20_000:]
    assert " 0 failed, 0 skipped," in said
