"""The doctor, shown healthy and sick machines."""

import errno
import json
import mmap
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from benchfs_fuse import companion, doctor
from benchfs_fuse.compiled import Compiled
from benchfs_fuse.doctor import Finding
from benchfs_fuse.rpc import wire


class Probed(NamedTuple):
    buffered_write_inline: bool
    uring_write_us: float
    pwrite_us: float = 1.9


def refuse(code: int) -> None:
    raise OSError(code, os.strerror(code))


def test_a_device_that_opens_is_fine(tmp_path: Path) -> None:
    device = tmp_path / "fuse"
    device.touch()
    assert doctor.check_fuse_device(device) == Finding(str(device), "ok", "can be opened")


def test_a_missing_or_closed_device_fails(tmp_path: Path) -> None:
    missing = doctor.check_fuse_device(tmp_path / "fuse")
    assert (missing.level, missing.found) == ("fail", "missing")
    closed = doctor.check_fuse_device(tmp_path)  # a directory cannot be opened for writing
    assert (closed.level, closed.found) == ("fail", "cannot be opened: Is a directory")
    assert "chmod 666" in closed.remedy


@pytest.mark.parametrize(
    ("config", "euid", "level"),
    [
        ("user_allow_other\n", 1000, "ok"),
        ("# comment\n  user_allow_other  \n", 1000, "ok"),
        ("#user_allow_other\n", 1000, "warn"),
        ("mount_max = 1000\n", 1000, "warn"),
        ("#user_allow_other\n", 0, "ok"),
    ],
)
def test_sharing_by_ordinary_users_needs_a_line(tmp_path: Path, config: str, euid: int, level: str) -> None:
    file = tmp_path / "fuse.conf"
    file.write_text(config)
    found = doctor.check_fusermount(lambda _: "/usr/bin/fusermount3", file, euid)
    assert found.level == level
    assert ("user_allow_other" in found.remedy) == (level == "warn")


def test_a_missing_configuration_allows_nothing(tmp_path: Path) -> None:
    assert doctor.check_fusermount(lambda _: "/usr/bin/fusermount3", tmp_path / "none", 1000).level == "warn"


@pytest.mark.parametrize(("euid", "level"), [(0, "warn"), (1000, "fail")])
def test_only_root_mounts_without_fusermount(tmp_path: Path, euid: int, level: str) -> None:
    found = doctor.check_fusermount(lambda _: None, tmp_path / "none", euid)
    assert (found.level, found.cost) == (level, "only root can mount")


def test_a_helper_that_cannot_do_its_work(tmp_path: Path) -> None:
    helper, config, mtab = tmp_path / "fusermount3", tmp_path / "fuse.conf", tmp_path / "mtab"
    helper.touch(0o755)
    config.write_text("user_allow_other\n")

    def found(euid: int) -> tuple[str, str]:
        finding = doctor.check_fusermount(lambda _: str(helper), config, euid, mtab)
        return finding.level, finding.cost

    assert found(1000) == ("fail", "only root can mount")
    helper.chmod(0o4755)
    assert found(1000) == ("warn", "only root can unmount")
    assert found(0) == ("ok", "")
    mtab.touch()
    assert found(1000) == ("ok", "")


def test_a_refused_ring_fails_with_the_reason() -> None:
    assert doctor.check_io_uring(lambda: None).level == "ok"
    found = doctor.check_io_uring(lambda: refuse(errno.EPERM))
    assert (found.level, found.found) == ("fail", "refused: Operation not permitted")


@pytest.mark.parametrize(
    ("limit", "euid", "level", "found"),
    [
        (resource.RLIM_INFINITY, 1000, "ok", "unlimited"),
        (8 << 20, 1000, "ok", "8192 KiB"),
        (64 << 10, 1000, "warn", "64 KiB"),
        (64 << 10, 0, "ok", "64 KiB"),
    ],
)
def test_memlock(limit: int, euid: int, level: str, found: str) -> None:
    assert doctor.check_memlock(limit, euid)[1:3] == (level, found)


def listing(*pairs: tuple[str, str]) -> str:
    return "".join(f"#      Transport: {transport}\n#         Device: {device}\n#\n" for transport, device in pairs)


@pytest.mark.parametrize(
    ("transports", "level", "found"),
    [
        (["tcp", "posix", "cma"], "ok", "cma, posix, tcp (eth0)"),
        (["tcp", "posix"], "warn", "posix, tcp (eth0)"),
        (["tcp"], "warn", "tcp (eth0)"),
        (["posix", "cma"], "fail", "cma, posix"),
        ([], "fail", "nothing"),
        (["tcp", "xpmem", "rc_mlx5"], "ok", "rc_mlx5 (mlx5_0:1), tcp (eth0), xpmem"),
    ],
)
def test_ucx_transports(transports: list[str], level: str, found: str) -> None:
    devices = {"tcp": "eth0", "rc_mlx5": "mlx5_0:1"}
    text = listing(*((transport, devices.get(transport, "memory")) for transport in transports))
    assert doctor.check_ucx(lambda: text)[1:3] == (level, found)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), subprocess.TimeoutExpired("ucx_info", 1)])
def test_ucx_that_does_not_run_fails(error: Exception) -> None:
    def fail() -> str:
        raise error

    found = doctor.check_ucx(fail)
    assert (found.level, found.found.startswith("ucx_info does not run: ")) == ("fail", True)


def test_inline_writes(tmp_path: Path) -> None:
    fine = doctor.check_inline(tmp_path, lambda _: Probed(True, 3.2))
    assert fine[1:3] == ("ok", "inline: 3.2 µs through io_uring, 1.9 µs by pwritev")
    slow = doctor.check_inline(tmp_path, lambda _: Probed(False, 55.4))
    assert slow[1:3] == ("warn", "handed to a kernel thread: 55.4 µs through io_uring, 1.9 µs by pwritev")

    def full(_: Path) -> Probed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert doctor.check_inline(tmp_path, full)[1:3] == ("fail", "cannot be tried: No space left on device")

    def missing(_: Path) -> Probed:
        raise ImportError("No module named 'liburing'")

    assert doctor.check_inline(tmp_path, missing)[1:3] == ("fail", "cannot be tried: No module named 'liburing'")


def test_segments_are_leftovers_unless_somebody_maps_them(tmp_path: Path) -> None:
    dead, alive, other = tmp_path / "ucx_shm_posix_1", tmp_path / "ucx_shm_posix_2", tmp_path / "unrelated"
    for file in (dead, alive, other):
        file.write_bytes(bytes(1 << 20))
    with alive.open("r+b") as opened, mmap.mmap(opened.fileno(), 0):
        found = doctor.check_leftovers(tmp_path)
    assert found.level == "warn"
    assert found.found == f"1 segments of dead processes in {tmp_path}"
    assert found.cost == "1.0 MiB of memory"
    assert found.remedy == f"rm {dead}"


def test_segments_of_others_are_not_ours_to_judge(tmp_path: Path) -> None:
    (tmp_path / "ucx_shm_posix_1").touch()
    assert doctor.check_leftovers(tmp_path, euid=os.geteuid() + 1).level == "ok"


@pytest.mark.parametrize(
    ("mounts", "has_bdi", "euid", "found"),
    [
        ("30 23 0:26 / /x rw - fusectl fusectl rw", True, 0, "max_background and read_ahead_kb can be set"),
        ("30 23 0:26 / /x rw - ext4 /dev/x rw", True, 0, "cannot be set: max_background"),
        ("30 23 0:26 / /x rw - fusectl fusectl rw", False, 0, "cannot be set: read_ahead_kb"),
        ("30 23 0:26 / /x rw - fusectl fusectl rw", True, 1000, "cannot be set: max_background, read_ahead_kb"),
    ],
)
def test_knobs_need_root_and_sysfs(tmp_path: Path, mounts: str, has_bdi: bool, euid: int, found: str) -> None:
    mountinfo, bdi = tmp_path / "mountinfo", tmp_path / "bdi"
    mountinfo.write_text(mounts + "\n")
    if has_bdi:
        bdi.mkdir()
    assert doctor.check_knobs(mountinfo, bdi, euid).found == found


@pytest.mark.parametrize(
    ("check", "library"), [(doctor.check_companion, companion.LIBRARY), (doctor.check_wire, wire.COMPILED)]
)
def test_a_library_that_was_not_built_is_missed(
    tmp_path: Path, check: Callable[[Compiled], Finding], library: Compiled
) -> None:
    there = library._replace(directory=tmp_path)
    assert check(there).found == "not built"
    built = library.find()
    assert built is not None
    shutil.copy(built, tmp_path / f"{library.name}.cpython-39-x86_64-linux-gnu.so")  # is of use to another Python alone
    assert check(there).found == "not built"
    shutil.copy(built, tmp_path)
    shutil.copy(library.directory / library.source, tmp_path)
    assert check(there).level == "ok"
    with (tmp_path / library.source).open("a") as source:
        source.write("/* another version */")
    assert check(there).found == "built from another version, and left out"
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / built.name).write_bytes(b"nothing that can be loaded")
    assert check(library._replace(directory=tmp_path / "damaged")).level == "warn"


def test_versions_name_what_is_missing() -> None:
    assert doctor.check_packages(["trio"]).level == "ok"
    found = doctor.check_packages(["trio", "no-such-package"])
    assert (found.level, found.cost) == ("fail", "missing: no-such-package")


def sick(_data_dir: Path, _probe: object) -> list[Finding]:
    return [Finding("a", "ok", "fine"), Finding("b", "fail", "broken [x]", "everything", "mend it")]


def test_people_read_lines_and_programs_read_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "findings", sick)
    assert doctor.run_doctor(tmp_path, False) == 1
    assert capsys.readouterr().out == "ok   a: fine\nfail b: broken [x]\n     costs: everything\n     do: mend it\n"
    assert doctor.run_doctor(tmp_path, True) == 1
    assert json.loads(capsys.readouterr().out)[1] == {
        "name": "b",
        "level": "fail",
        "found": "broken [x]",
        "cost": "everything",
        "remedy": "mend it",
    }


def test_a_warning_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "findings", lambda *_: [Finding("a", "warn", "slow")])
    assert doctor.run_doctor(tmp_path, False) == 0
    assert capsys.readouterr().out == "warn a: slow\n"


def test_every_check_runs_on_this_machine(tmp_path: Path) -> None:
    names = [one.name for one in doctor.findings(tmp_path, lambda _: Probed(True, 1.0))]
    assert len(names) == len(set(names)) == 12


def test_addresses_that_the_world_reaches_are_told() -> None:
    assert doctor.check_public(dict).level == "ok"
    found = doctor.check_public(lambda: {"eth0": "8.8.4.4"})
    assert found.level == "warn" and "8.8.4.4 on eth0" in found.found and "--public" in found.remedy
