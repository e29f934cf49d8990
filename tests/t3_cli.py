"""The command line without a mount: help that teaches, sentences for what is wrong, and what the commands stand on."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_help import (
    PATIENCE_S,
    Done,
    Running,
    benchfs,
    clean_directory,
    holding,
    processes_below,
    refused,
    running_benchfs,
    sentence_of,
    succeeds,
)

from benchfs_fuse import cli, kernel_mounts, mount, mount_helper, mountpoints, runtime
from benchfs_fuse.commands import mounting
from benchfs_fuse.commands.bench import BENCHMARKS, Benchmark
from benchfs_fuse.config import Settings
from benchfs_fuse.datadir import DataDir
from benchfs_fuse.errors import UserError
from benchfs_fuse.holders import holders
from benchfs_fuse.kernel_mounts import KernelMount
from benchfs_fuse.processes import Starting, end, identify, uninterrupted, wait_end, wait_ready
from benchfs_fuse.registry import Registry, init_registry
from benchfs_fuse.services import files, jobs

COMMANDS = (
    *("up", "down", "init", "mount", "umount"),
    *("status", "top", "trace", "check", "torture", "layout", "doctor", "bench", "install-mount-helper"),
)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with clean_directory(tmp_path) as directory:
        (directory / "mnt").mkdir()
        yield directory


def called(capsys: pytest.CaptureFixture[str], *words: str) -> Done:
    """Call a command that starts no process, which is quicker than to run it."""
    try:
        code = cli.main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    return Done(code, *capsys.readouterr())


@pytest.mark.parametrize("fault", ["--kill=mounts", "--cut-network", "--lose-chunks", "--fill-disk"])
def test_faults_are_made_in_a_cluster_of_their_own(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = called(capsys, "torture", "/mnt", fault)
    option = fault.partition("=")[0]
    assert (done.code, done.out) == (2, "")
    assert done.err == f"benchfs: faults are made in a cluster of their own: {option} needs --local\n"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("--cut-network", "--cut-network makes network namespaces, which only root can"),
        ("--fill-disk", "--fill-disk makes small disks, which only root can"),
    ],
)
def test_faults_that_only_root_can_make(
    fault: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert called(capsys, "torture", "--local", fault) == (2, "", f"benchfs: {why}\n")


# ── help ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_names_every_command() -> None:
    text = succeeds("--help").out
    assert all(f"    {command} " in text or f"    {command}\n" in text for command in COMMANDS)
    assert "examples:" in text
    listed = cli.make_parser().format_usage()
    assert "COMMAND" in listed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    _, _, examples = text.partition("example")
    assert ("mount -t benchfs" if command == "install-mount-helper" else f"benchfs {command}") in examples
    options = text.partition("options:")[2].partition("\n\n")[0]
    assert len(options.splitlines()) >= 1
    assert f"usage: benchfs {command}" in text


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=[one.name for one in BENCHMARKS])
def test_help_of_a_benchmark_teaches(benchmark: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    text = called(capsys, "bench", benchmark.name, "--help").out
    _, _, examples = text.partition("examples:")
    assert f"benchfs bench {benchmark.name}" in examples and f"usage: benchfs bench {benchmark.name}" in text


def test_version() -> None:
    assert succeeds("--version").out.startswith("benchfs ")


# ── wrong use ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["mount", "/mnt"], "the following arguments are required: --registry-dir"),
        (["mount", "/mnt", "--registry-dir", "/r", "--registry"], "unrecognized arguments: --registry"),
        (["mount", "/mnt", "--registry-dir", "/r", "-o", "nonsense"], "unknown mount option 'nonsense'"),
        (["mount", "/mnt", "--registry-dir", "/r", "-o", "attr_timeout=-1"], "mount.attr_timeout_s cannot be '-1'"),
        (["mount", "/mnt", "--registry-dir", "/r", "--attr-timeout", "soon"], "mount.attr_timeout_s cannot be 'soon'"),
        (["mount", "/mnt", "--registry-dir", "/r", "--config", "/none"], "/none: cannot read the settings"),
        (["up", ""], "argument MOUNTPOINT: it is empty"),
        (["mount", "/mnt", "--registry-dir", ""], "argument --registry-dir: it is empty"),
        (["init", "", "--daemons", "1"], "argument REGISTRY: it is empty"),
        (["init", "/r"], "the following arguments are required: --daemons"),
        (["init", "/r", "--daemons", "2", "--chunk-size", "3M"], "cluster.chunk_size cannot be '3M'"),
        (["up", "/mnt", "--"], "a command has to follow --"),
        (["up", "/mnt", "--daemons", "0"], "a cluster has 1 to 256 daemons, not '0'"),
        (["umount", "/mnt", "--timeout", "0"], "a number of seconds above 0"),
        (["bench"], "the following arguments are required: BENCHMARK"),
        (["bench", "small", "--mode", "local"], "the following arguments are required: --registry-dir"),
        (["bench", "small", "--mode", "fast", "--registry-dir", "/r"], "invalid choice: 'fast'"),
        (["bench", "small", "--mode", "client", "--registry-dir", ""], "argument --registry-dir: it is empty"),
        (
            ["bench", "small", "--mode", "client", "--registry-dir", "/r", "--iterations", "0"],
            "a measurement has 1 to 1000000 iterations, not '0'",
        ),
        (["bench", "small", "--mode", "client", "--registry-dir", "/r", "--tls", "a b"], "ucx.tls cannot be 'a b'"),
        (["umount", "/mnt", "--timeout", "nan"], "a number of seconds above 0"),
    ],
)
def test_wrong_use_gets_one_sentence_and_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in sentence_of(called(capsys, *words), 2)


@pytest.mark.parametrize("daemons", ["0", "-1", "257", "many", "1.5", "", "²", "1e2", "99999999999999999999"])
def test_a_nonsense_number_of_daemons_is_refused(
    tmp_path: Path, daemons: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = called(capsys, "init", str(tmp_path / "r"), f"--daemons={daemons}")
    assert "a cluster has 1 to 256 daemons" in sentence_of(done, 2)
    assert not (tmp_path / "r").exists()


def test_an_environment_with_a_wrong_setting_is_refused(tmp_path: Path) -> None:
    said = refused("mount", tmp_path, "--registry-dir", tmp_path, code=2, env={"BENCHFS_MOUNT_SPIN": "1"})
    assert "BENCHFS_MOUNT_SPIN is not a setting" in said


def test_what_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "mnt").mkdir()
    assert "Not a directory" in refused("up", tmp_path / "mnt", "--data-dir", file / "below")
    assert "Not a directory" in refused("init", file / "r", "--daemons", "1")


def test_nobody_reading_is_no_traceback() -> None:
    line = f"exec {sys.executable} -m benchfs_fuse.cli doctor --json | true"
    done = subprocess.run(["sh", "-c", line], check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stderr == ""


# ── init ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_init_says_what_to_do_next(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    out = succeeds("init", registry, "--daemons", "3", "--chunk-size", "1M").out
    assert f"benchfsd --registry-dir {registry} --data-dir DIR" in out
    cluster = json.loads((registry / "cluster.json").read_text())
    assert (cluster["daemons"], cluster["chunk_size"]) == (3, 1 << 20)
    assert (registry / "secret").stat().st_mode & 0o777 == 0o600


def test_init_leaves_what_exists_alone(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    init_registry(registry, 3)
    before = {path: path.read_bytes() for path in registry.rglob("*") if path.is_file()}
    assert "exists already" in refused("init", registry, "--daemons", "2")
    assert {path: path.read_bytes() for path in registry.rglob("*") if path.is_file()} == before
    assert "No such file or directory" in refused("init", tmp_path / "none" / "registry", "--daemons", "2")


# ── what is not mounted ──────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_mounted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        return sentence_of(called(capsys, *map(str, words)))

    mnt = place / "mnt"
    assert f"{mnt} is not mounted" in refused("umount", mnt)
    assert f"{mnt} is not mounted" in refused("umount", mnt, "--force")
    assert f"{mnt} is not mounted" in refused("status", mnt)
    assert f"no local cluster is up at {mnt}" in refused("down", mnt)
    assert "is not mounted" in refused("umount", place / "none")
    (place / "file").touch()
    assert "is not in a benchfs mount" in refused("layout", place / "file")


def test_what_is_mounted_and_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("umount", "status"):
        assert sentence_of(called(capsys, command, "/proc")) == "/proc is a mount of type proc, not benchfs"
    assert "is not in a benchfs mount" in sentence_of(called(capsys, "layout", "/proc/version"))


def test_bad_mount_points_are_refused_before_anything_starts(place: Path) -> None:
    registry = place / "registry"
    init_registry(registry, 1)
    (place / "file").touch()
    for command in (["mount", "--registry-dir", registry], ["up", "--data-dir", place / "data"]):
        assert "is not a directory" in refused(*command, place / "file")
        assert "does not exist: make the directory first" in refused(*command, place / "none")
    assert not (place / "data").exists()
    assert "lies inside the mount point" in refused("mount", place, "--registry-dir", registry)
    assert "lies inside the mount point" in refused("up", place, "--data-dir", place / "data")
    assert not (place / "data").exists()


@pytest.mark.parametrize(
    "place", [Path("/"), Path(cli.__file__).parent, Path(cli.__file__).parents[1], Path(sys.prefix)]
)
def test_nothing_is_mounted_over_this_very_program(place: Path) -> None:
    with pytest.raises(UserError, match=r"holds this program .* which the mount would hide: choose another place"):
        mountpoints.check_directory(place.resolve())


def test_an_ordinary_user_mounts_where_they_may_write_and_for_themselves(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"you may not write to {place}/mnt: without root, choose"):
        mountpoints.check_directory(place / "mnt")
    monkeypatch.setattr(mountpoints, "users_may_let_others_in", lambda: False)
    with pytest.raises(UserError, match="allow_other is for root alone here: leave it out, or have root add"):
        mountpoints.prepare(place / "mnt", place / "registry", allow_other=True)


def test_names_that_cannot_be_written_down_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnt, strange = place / "mnt", place / os.fsdecode(b"\xff\xfe")
    registry = place / "registry"
    init_registry(registry, 1)
    assert "the registry '" in refused("init", strange, "--daemons", "1")
    assert "the registry '" in refused("up", mnt, "--data-dir", strange)
    with Registry(registry) as opened, pytest.raises(UserError, match=r"the data directory '.*: choose another"):
        DataDir(strange, opened)
    strange.mkdir(exist_ok=True)
    assert "has a name that is not UTF-8: choose another" in refused("up", strange, "--data-dir", place / "data")
    gone = place / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match="the current directory has gone: give the whole path of mnt"):
        kernel_mounts.plain_path(Path("mnt"))


def test_a_registry_that_is_none(place: Path) -> None:
    mnt = place / "mnt"
    assert "there is no registry at" in refused("mount", mnt, "--registry-dir", place / "none")
    assert "there is no registry at" in refused("mount", mnt, "--registry-dir", "none", cwd=place)
    registry = place / "registry"
    init_registry(registry, 1)
    (registry / "cluster.json").write_text("{")
    assert "is damaged" in refused("mount", mnt, "--registry-dir", registry)


def test_what_a_mount_tries_again_and_again_is_said_seldom(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare(*place: object) -> Path:
        for module in (files, jobs) * 3:
            logging.getLogger(module.__name__).warning("%s failed", module.__name__)
        raise UserError("by the test")

    monkeypatch.setattr(mountpoints, "prepare", prepare)
    monkeypatch.setattr(mount, "wish_short_slices", lambda: None)
    assert mount.run_mount(mount.MountOptions(place / "mnt", place, Settings())) == 1
    assert caplog.messages == [f"{module.__name__} failed" for module in (files, jobs)]


def test_a_log_that_cannot_be_written(place: Path) -> None:
    said = refused("mount", place / "mnt", "--registry-dir", place, "--log", place / "none" / "log")
    assert "cannot start benchfs_fuse.mount with the log" in said


# ── waiting for daemons ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_mount_that_waits_says_for_whom_and_can_be_interrupted(
    place: Path, number: signal.Signals, code: int
) -> None:
    init_registry(place / "registry", 2)
    with running_benchfs("mount", place / "mnt", "--registry-dir", place / "registry") as waiting:
        said = waiting.wait_error("waiting for")
        assert "2 of 2 daemons: 0 (never started), 1 (never started)" in said
        assert len(processes_below(place)) == 1
        waiting.popen.send_signal(number)
        done = waiting.wait()
    assert (done.code, done.out, done.err) == (code, "", "")
    assert processes_below(place) == []


def test_an_incomplete_cluster_is_not_mounted_with_fewer_daemons(place: Path) -> None:
    init_registry(place / "registry", 2)
    # As the command does it, with a shorter deadline.
    program = (
        "import sys, benchfs_fuse.client as client\nclient.COMPLETE_TIMEOUT_S = 0.5\n"
        "from benchfs_fuse.cli import main\nsys.exit(main())"
    )
    words = ["mount", str(place / "mnt"), "--registry-dir", str(place / "registry"), "--foreground"]
    with Running(sys.executable, "-c", program, *words) as mount:
        done = mount.wait()
    assert done.code == 1
    waiting, sentence = done.err.splitlines()
    assert "waiting for 2 of 2 daemons" in waiting
    assert sentence.startswith(
        "benchfs: gave up after 0 s without 2 of 2 daemons: 0 (never started), 1 (never started)"
    )
    assert "start what is missing with benchfsd --registry-dir" in sentence


# ── doctor ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_doctor_judges_by_its_exit_code(tmp_path: Path) -> None:
    good = succeeds("doctor", "--data-dir", tmp_path, "--json")
    assert {finding["level"] for finding in json.loads(good.out)} <= {"ok", "warn"}
    bad = benchfs("doctor", "--data-dir", tmp_path / "none")
    assert bad.code == 1 and "cannot be tried" in bad.out and bad.err == ""
    assert sorted(os.listdir(tmp_path)) == []


# ── mount(8)'s helper ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 1, "usage: mount.benchfs"),
        (["/r"], 1, "usage: mount.benchfs"),
        (["/r", "/m", "-q"], 1, "usage: mount.benchfs"),
        (["/r", "/m", "-o", "rw,nonsense"], 1, "unknown mount option 'nonsense'"),
        (["/r", "/m", "-o", "op_timeout=never"], 1, "mount.op_timeout_s cannot be 'never'"),
        (["/r", "/m", "-N", "/proc/1/ns/mnt"], 1, "nsenter"),
        (["/none", "/proc/none"], 32, "does not exist"),
        (["/r", "/m", "-f", "-o", "rw,ro"], 0, ""),
    ],
)
def test_the_mount_helper_speaks_as_mount_expects(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mount_helper.main(words) == code
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == (1 if said else 0)


def test_the_mount_helper_stands_for_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "HELPER", tmp_path / "mount.benchfs")
    mounting.install_mount_helper()
    mounting.install_mount_helper()
    assert os.listdir(tmp_path) == ["mount.benchfs"]
    helper = tmp_path / "mount.benchfs"
    assert helper.stat().st_mode & 0o777 == 0o755 and sys.executable in helper.read_text()
    done = subprocess.run([helper], check=False, capture_output=True, text=True, timeout=PATIENCE_S, cwd="/")
    assert done.returncode == 1 and done.stderr.startswith("usage: mount.benchfs")
    monkeypatch.setattr(mounting, "HELPER", tmp_path / "none" / "mount.benchfs")
    with pytest.raises(UserError, match="No such file or directory; run this as root"):
        mounting.install_mount_helper()


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> Starting:
    """Start a module with this text; ``ready`` is its descriptor."""
    (tmp_path / "started.py").write_text(f"import logging, os, signal, sys\nready = int(sys.argv[2])\n{program}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Starting("started", [], tmp_path / "log")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("sys.stderr.write('benchfs: the mouse is gone\\n')\nsys.exit(1)", "the mouse is gone"),
        ("sys.stderr.write('noise\\nbenchfsd: no cheese\\nnoise\\n')\nsys.exit(1)", "no cheese"),
        ("sys.stderr.write('usage: x\\nbenchfsd: error: bad option\\n')\nsys.exit(2)", "bad option"),
        ("raise ValueError('boom')", "started ended with code 1 before it was ready; its last words are in {log}"),
        (
            "raise ExceptionGroup('several', [ValueError('a'), KeyError('b')])",
            "started ended with code 1 before it was ready; its last words are in {log}",
        ),
        ("pass", "started ended with code 0 before it was ready; its last words are in {log}"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "started was killed by SIGKILL before it was ready; its last words are in {log}",
        ),
    ],
)
def test_what_ends_before_it_is_ready_gives_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    (tmp_path / "log").write_text("benchfs: an older failure\n")
    with pytest.raises(UserError) as caught:
        wait_ready([start(tmp_path, monkeypatch, program)])
    assert str(caught.value) == said.format(log=tmp_path / "log")


def test_what_is_ready_outlives_us_and_what_it_warned_of_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_text("2026-01-01 00:00:00,000 WARNING an older warning\n")
    program = (
        "logging.basicConfig(format='%(asctime)s %(levelname)s %(message)s', level=logging.INFO)\n"
        "logging.info('a detail')\nlogging.warning('careful')\nos.write(ready, b'ready\\n')\nsignal.pause()"
    )
    starting = start(tmp_path, monkeypatch, program)
    told: list[str] = []
    process = wait_ready([starting], told.append)[starting]
    assert told == ["careful"]
    assert identify(process.pid) == process and os.getsid(process.pid) == process.pid
    assert not wait_end(process, 0)
    assert end([process], PATIENCE_S) == []
    assert wait_end(process, 0) and identify(process.pid) is None
    os.waitpid(process.pid, 0)


def test_when_one_fails_the_others_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path, monkeypatch, "os.write(ready, b'ready\\n')\nsignal.pause()")
    one = first.process
    assert one is not None
    second = Starting("no_such_module", [], tmp_path / "log")
    with pytest.raises(UserError, match="no_such_module ended with code 1"):
        wait_ready([first, second])
    assert wait_end(one, 0)


def test_who_does_not_listen_is_killed() -> None:
    with (
        holding("signal.signal(signal.SIGTERM, signal.SIG_IGN)") as deaf,
        holding("") as polite,
    ):
        processes = [process for process in (identify(deaf.pid), identify(polite.pid)) if process is not None]
        assert len(processes) == 2
        assert end(processes, 0.5) == processes[:1]
        assert deaf.popen.wait(PATIENCE_S) == -signal.SIGKILL
        assert polite.popen.wait(PATIENCE_S) == -signal.SIGTERM
        assert end(processes, 0.0) == []


# ── who holds what ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("os.chdir(sys.argv[1])", "working directory {0}"),
        ("file = open(sys.argv[1] + '/f')", "open file {0}/f"),
        ("fd = os.open(sys.argv[1], os.O_RDONLY)", "open file {0}"),
        ("file = open(sys.argv[1] + '/f')\nos.unlink(sys.argv[1] + '/f')", "open file {0}/f"),
        (
            "fd = os.open(sys.argv[1] + '/f', os.O_RDWR)\nmapped = mmap.mmap(fd, 4096)\nos.close(fd)\n"
            "os.closerange(3, 64)",
            "mapped file {0}/f",
        ),
    ],
)
def test_who_keeps_a_directory_busy(tmp_path: Path, script: str, what: str) -> None:
    place = tmp_path / "place with space"
    place.mkdir()
    (tmp_path / "place with space and more").mkdir()
    (place / "f").write_bytes(bytes(4096))
    assert holders(place) == []
    with holding(script, place) as child:
        assert [(holder.pid, holder.what) for holder in holders(place)] == [(child.pid, what.format(place))]
        assert holders(tmp_path / "place") == []


# ── paths and runtime files ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_path_is_made_plain_without_a_look_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "second").symlink_to(tmp_path / "link" / "below")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for text, plain in (
        ("real", "real"),
        ("link", "real"),
        ("link/below/", "real/below"),
        ("second", "real/below"),
        ("./real/../link", "real"),
        ("none", "none"),
        ("loop", "loop"),
    ):
        assert kernel_mounts.plain_path(Path(text)) == tmp_path / plain
    assert kernel_mounts.plain_path(Path("/")) == Path("/")


def test_the_newest_of_stacked_mounts_is_the_one_above(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = [
        KernelMount(Path("/"), "ext4", "disk", 1),
        KernelMount(Path("/m"), kernel_mounts.FUSE_TYPE, "old", 2),
        KernelMount(Path("/m"), "tmpfs", "new", 3),
    ]
    monkeypatch.setattr(kernel_mounts, "mounts", lambda: stacked)
    assert kernel_mounts.above(Path("/m/f")) == kernel_mounts.find(Path("/m")) == stacked[2]
    assert kernel_mounts.above(Path("/mm")) == stacked[0]
    assert kernel_mounts.beneath(Path("/")) == [Path("/m"), Path("/m")]


def test_runtime_files_are_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(UserError, match="belongs to somebody else"):
        runtime.runtime_dir()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("os.geteuid", os.getuid if os.getuid() else lambda: 0)
    names = [runtime.file_for(Path("/" + text), ".log").name for text in ("a/b", "a%2Fb", "x" * 4000, "y" + "x" * 3999)]
    assert len(set(names)) == 4 and max(map(len, names)) <= 255
    with pytest.raises(UserError, match="not UTF-8"):
        runtime.file_for(Path(os.fsdecode(b"/\xff")), ".log")


def test_a_runtime_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "m").mkdir()
    program = "import os, sys\nos.geteuid = lambda: 12345\nfrom benchfs_fuse.cli import main\nsys.exit(main())"
    with Running(
        *(sys.executable, "-c", program, "umount", str(tmp_path / "m")),
        env={"XDG_RUNTIME_DIR": str(tmp_path / "file")},
    ) as child:
        assert "cannot make the runtime directory" in sentence_of(child.wait())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_end_of_what_is_not_to_be_interrupted(number: signal.Signals) -> None:
    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    done: list[int] = []

    def work() -> None:
        with uninterrupted():
            os.kill(os.getpid(), number)
            done.append(number)

    before = signal.signal(number, leave)
    try:
        with pytest.raises(SystemExit) as ended:
            work()
        assert done and ended.value.code == 128 + number
        assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)
