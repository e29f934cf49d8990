"""scripts/setup-env.sh on machines that lack things: what it installs as root, and what it asks of others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What every Debian has.
ESSENTIAL = ("sh", "tr", "cat", "cut", "head", "sort", "sha256sum", "touch", "paste", "chmod", "rm")
TOOLS = ("gcc", "pkg-config", "fusermount3", "fio", "getfattr", "setfacl")
PROVIDED = (*TOOLS, "rsync", "sqlite3", "git", "make", "valgrind", "iperf3")

APT_GET = """#!/bin/sh
echo "$*" >>{log}
[ "$1" != install ] || for tool in {tools}; do
    echo '#!/bin/sh' >{bin}/$tool
    chmod +x {bin}/$tool
done
"""


class Machine:
    """A PATH with what every Debian has, and an apt-get that writes down what it is asked for."""

    def __init__(self, directory: Path, uid: int, installs: tuple[str, ...]) -> None:
        self.bin, self.log = directory / "bin", directory / "log"
        self.bin.mkdir()
        self.log.touch()
        for tool in ESSENTIAL:
            path = shutil.which(tool)
            assert path is not None
            (self.bin / tool).symlink_to(path)
        self.script("id", f"#!/bin/sh\necho {uid}\n")
        self.script("apt-get", APT_GET.format(log=self.log, bin=self.bin, tools=" ".join(installs)))

    def script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def require(self, *groups: str) -> subprocess.CompletedProcess[str]:
        command = f". scripts/setup-env.sh; require_packages {' '.join(groups)}"
        return subprocess.run(
            ["sh", "-euc", command], cwd=ROOT, env={"PATH": str(self.bin)}, capture_output=True, text=True, check=False
        )


def test_root_installs_what_is_missing_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 0, PROVIDED)
    first = machine.require("base", "test")
    assert first.returncode == 0, first.stderr
    update, install = machine.log.read_text().splitlines()
    assert update.startswith("update")
    wanted = {
        *[
            "gcc",
            "pkg-config",
            "libfuse3-dev",
            "fuse3",
            "fio",
            "attr",
            "acl",
            "rsync",
            "sqlite3",
            "git",
            "make",
            "valgrind",
            "iperf3",
        ]
    }
    assert wanted <= set(install.split())
    assert machine.require("base", "test").returncode == 0
    assert len(machine.log.read_text().splitlines()) == 2


def test_others_are_told_exactly_what_is_missing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 1000, PROVIDED)
    for tool in PROVIDED:
        if tool not in ("rsync", "getfattr"):
            machine.script(tool, "#!/bin/sh\n")
    done = machine.require("base", "test")
    assert done.returncode == 1
    assert done.stderr.endswith("these Debian packages are missing; as root: apt-get install attr rsync\n")
    assert machine.log.read_text() == ""


def test_what_the_quick_start_does_not_need_is_not_asked_for(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 1000, PROVIDED)
    for tool in ("gcc", "pkg-config", "fusermount3", "fio"):
        machine.script(tool, "#!/bin/sh\n")
    assert machine.require("base").returncode == 0


def test_an_installation_that_does_not_help_is_an_error(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 0, ("gcc",))
    done = machine.require("base")
    assert done.returncode == 1
    assert "still missing after their installation: pkg-config libfuse3-dev fuse3 fio" in done.stderr


@pytest.mark.parametrize("script", ["quickstart", "bench-compare"])
@pytest.mark.parametrize("arguments", [["--help"], ["a", "b", "c"]])
def test_a_script_explains_itself(script: str, arguments: list[str]) -> None:
    done = subprocess.run([f"scripts/{script}", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"scripts/{script} [MOUNTPOINT" in done.stderr


def test_scripts_can_be_run_and_parsed() -> None:
    for script in ("scripts/test", "scripts/quickstart", "scripts/bench-compare", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK), script
        assert subprocess.run(["sh", "-n", script], cwd=ROOT, check=False).returncode == 0, script


@pytest.mark.parametrize("there", [[], ["pkg-config"]], ids=["no pkg-config", "no compiler"])
def test_an_installation_without_a_compiler_says_what_will_be_missing(tmp_path: Path, there: list[str]) -> None:
    (tmp_path / "bin").mkdir()
    for tool in there:
        path = shutil.which(tool)
        assert path is not None
        (tmp_path / "bin" / tool).symlink_to(path)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp"],
        cwd=ROOT,
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "benchfs-fuse: the companion library was not built (" in done.stderr
    assert "Mounts will work without: fallocate, " in done.stderr and "locks across mounts, " in done.stderr
    assert "Install gcc, pkg-config and libfuse3-dev" in done.stderr
    assert "benchfs-fuse: the compiled wire was not built (" in done.stderr
    assert "Small requests will take half as long again. Install gcc" in done.stderr
    assert not list(tmp_path.glob("lib/**/*.so"))
