"""Be the command ``benchfs``: parse, call, turn errors into sentences and exit codes.

Exit codes: 0 done; 1 it failed, one sentence says why; 2 wrong use or a bad setting; 3 ``status``: works, but degraded;
3, 4, 5 ``check``: only left-overs were found, something is damaged, something could not be decided; 3 ``torture``:
there is no verdict;
130 and 143 interrupted (Ctrl-C, SIGTERM), after cleaning up. ``up -- COMMAND``: the command's own.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from . import __version__, config
from .commands.arguments import minutes, path, seconds, some_of, whole
from .commands.bench import BENCHMARKS
from .errors import ConfigError, UserError
from .limits import DAEMONS_MAX

_EXAMPLES = """\
examples:
  benchfs up /mnt/benchfs                    a file system on this machine, in one command
  benchfs up /mnt/x -- make -C /mnt/x        the same for the time of one command
  benchfs init /shared/reg --daemons 4       form a cluster; then run benchfsd on each node
  benchfs mount /mnt/benchfs --registry-dir /shared/reg

Every command has --help. docs/operations.md lists the settings.
"""
_EXAMPLES_UP = """\
Daemons and mount run in the background. Run again, it starts what does not run; the data directory keeps everything
for the next time. With a command after --, it runs that, takes everything down again, and ends with its exit code.

examples:
  benchfs up /mnt/benchfs
  benchfs up /mnt/x --daemons 4 --data-dir /big/x
  benchfs up /mnt/x -- make -C /mnt/x
"""
_EXAMPLES_DOWN = """\
Refuses while somebody uses the file system, and names them. A later "benchfs up" finds every file.

examples:
  benchfs down /mnt/benchfs
  benchfs down /mnt/benchfs --force          at once; says what could not be flushed
"""
_EXAMPLES_INIT = """\
The registry is a directory that all nodes see (NFS, Lustre, …). Whoever can read it may use the cluster.

example:
  benchfs init /shared/reg --daemons 4
  benchfsd --registry-dir /shared/reg --data-dir /local/benchfs     on each storage node
"""
_EXAMPLES_MOUNT = """\
Waits for all daemons of the cluster, and says which are missing. The process stays in the background; it ends with
"benchfs umount". One cluster may be mounted many times.

examples:
  benchfs mount /mnt/benchfs --registry-dir /shared/reg
  benchfs mount /mnt/benchfs --registry-dir /shared/reg -o ro,noexec --attr-timeout 0
"""
_EXAMPLES_UMOUNT = """\
Names the processes that keep it busy. --force takes less than two seconds, whatever hangs: it frees everybody who
waits for the file system, and says what could not be flushed.

examples:
  benchfs umount /mnt/benchfs
  benchfs umount /mnt/benchfs --force
"""
_EXAMPLES_STATUS = """\
Exit code 3: it works, but a daemon is missing or silent, or this mount was expelled.

examples:
  benchfs status /mnt/benchfs
  benchfs status /mnt/benchfs --json | jq '.daemons[] | select(.connected | not)'
"""
_EXAMPLES_CHECK = """\
Works while the cluster is in use; all its daemons have to be there. Exit codes: 0 nothing is wrong, or everything was
removed; 3 only orphaned or leaked things were found; 4 something is damaged; 5 nothing was found, but something changed
too often to be compared. --repair removes what is orphaned or leaked, for good: look at what is found first.

examples:
  benchfs check /mnt/benchfs
  benchfs check /shared/reg --json | jq '.findings[] | select(.category == "damaged") | .path'
  benchfs check /mnt/benchfs --repair
"""
_EXAMPLES_TORTURE = """\
Workers do everything to files of their own and to shared ones, and keep a manifest of what was acknowledged. In the end
all of it is compared on a fresh mount, and benchfs check has to find nothing. --local makes a cluster of two daemons
and two mounts below a temporary directory ($TMPDIR), and takes it down again. In an existing mount, work is done in a
new directory, and nothing is killed. Ctrl-C and SIGTERM end it early: what was done is compared all the same.
--cut-network, for root, puts each daemon and each mount behind a cable of its own (network namespaces), and cuts one
after the other, or just what one mount and one daemon say to each other: for moments, until connections are given up,
or for longer than the lease.

Exit codes: 0 sound; 1 something acknowledged is lost or wrong; 2 wrong use; 3 it could not be done to its end.

examples:
  benchfs torture /mnt/benchfs --minutes 1
  benchfs torture --local --minutes 10 --kill daemons,mounts
  benchfs torture --local --minutes 10 --kill daemons,mounts --seed 42 --json
  benchfs torture --local --minutes 10 --cut-network
"""
_EXAMPLES_TOP = """\
p50 and p99 are right to 19 %. ``busy`` is the time of all operations of a kind together, so it may exceed 100 %.

examples:
  benchfs top /mnt/benchfs
  benchfs top /mnt/benchfs --count 10 --json | jq '.operations.write.p99_us'
"""
_EXAMPLES_TRACE = """\
For each kind of operation: how often, how long, and in which stage the time went; stages add up to the whole. As root
the kernel's part is seen too. At most 200,000 operations are kept. With COMMAND, the exit code is the command's; 3:
nothing was recorded.

examples:
  benchfs trace /mnt/benchfs --seconds 5 --out trace.json
  benchfs trace /mnt/benchfs --out trace.json -- cp -r /usr/include /mnt/benchfs/
"""
_EXAMPLES_LAYOUT = """\
example:
  benchfs layout /mnt/benchfs/big.dat
"""
_EXAMPLES_DOCTOR = """\
For each thing it looks at: what it found, what that costs, what to do. Exit code 1: something has to be done first.

example:
  benchfs doctor --data-dir /local/benchfs
"""
_EXAMPLES_BENCH = """\
Every figure stands beside a floor that was measured in the same run, in alternating rounds. docs/performance.md tells
how to read them. Run them with nothing else on the machine.

example:
  benchfs bench small --mode local --registry-dir /tmp/reg --data-dir /data/bench
"""
_EXAMPLES_HELPER = """\
Needs root. Writes /sbin/mount.benchfs, which runs the benchfs of this environment.

examples, afterwards:
  mount -t benchfs /shared/reg /mnt/benchfs -o ro
  in /etc/fstab:  /shared/reg  /mnt/benchfs  benchfs  noatime,_netdev,nofail  0  0
"""

Run = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Say what is wrong in one sentence; take no abbreviations, so that scripts survive new options."""

    def __init__(self, **more: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _init(given: argparse.Namespace) -> int:
    from .registry import init_registry

    settings = config.load(vars(given), os.environ)
    init_registry(given.registry, given.daemons, settings.cluster.chunk_size)
    sys.stdout.write(
        f"formed a cluster of {given.daemons} daemons in {given.registry}; on each storage node run:\n"
        f"  benchfsd --registry-dir {given.registry} --data-dir DIR\n"
    )
    return 0


def _setting_arguments(given: argparse.Namespace, *sections: str) -> list[str]:
    """Give the settings of the command line on to another process, which has another working directory."""
    file = given.config or os.environ.get(config.FILE_VARIABLE)
    words = [f"--config={Path(file).absolute()}"] if file else []
    for key in config.keys().values():
        value = getattr(given, key.name, None)
        if value is None or key.name.partition(".")[0] not in sections:
            continue
        if isinstance(value, bool):
            words.append(key.option if value else key.option.replace("--", "--no-", 1))
        else:
            words.append(f"{key.option}={value}")
    return words


def _mount_arguments(given: argparse.Namespace) -> tuple[config.Settings, list[str]]:
    """Check all settings; return them, and the arguments for a mount process. Options go before ``-o``. ConfigError."""
    from .commands.options import parse_options

    options = parse_options(",".join(given.options))
    stated = {name: value for name, value in vars(given).items() if value is not None}
    settings = config.load({**options.settings(), **stated}, os.environ)
    given.config = stated.get("config") or options.settings().get("config")
    return settings, [*options.words, *_setting_arguments(given, "mount", "ucx")]


def _mount(given: argparse.Namespace) -> int:
    _, arguments = _mount_arguments(given)
    if given.foreground:
        from .mount import main as mount_main

        return mount_main([str(given.mountpoint), "--registry-dir", str(given.registry_dir), *arguments])
    from .commands.mounting import mount_in_background

    mount_in_background(given.mountpoint, given.registry_dir, given.log, arguments)
    return 0


def _umount(given: argparse.Namespace) -> int:
    from .commands.mounting import unmount

    unmount(given.mountpoint, force=given.force, timeout_s=given.timeout)
    return 0


def _up(given: argparse.Namespace) -> int:
    from .commands import local
    from .kernel_mounts import plain_path

    settings, mount_arguments = _mount_arguments(given)
    mountpoint = plain_path(given.mountpoint)
    # Nobody else has to reach the daemons of a local cluster, unless somebody says so.
    listen: list[str] = []
    device: list[str] = []
    if not settings.daemon.listen:
        listen = ["--listen=127.0.0.1"]
        if not (settings.ucx.tls or settings.ucx.net_devices or os.environ.keys() & {"UCX_TLS", "UCX_NET_DEVICES"}):
            device = ["--net-devices=lo"]
    data_dir = local.up(
        local.Wanted(
            mountpoint,
            given.data_dir,
            given.daemons,
            settings.cluster.chunk_size,
            getattr(given, "cluster.chunk_size") is not None,
            [*listen, *device, *_setting_arguments(given, "ucx")],
            [*device, *mount_arguments],
        )
    )
    if given.command:
        return local.run_under(mountpoint, given.command)
    sys.stdout.write(f"{mountpoint} is mounted; data in {data_dir}; take it down with: benchfs down {mountpoint}\n")
    return 0


def _down(given: argparse.Namespace) -> int:
    from .commands import local
    from .kernel_mounts import plain_path

    local.down(plain_path(given.mountpoint), given.force)
    return 0


def _status(given: argparse.Namespace) -> int:
    from .commands.inspect import status

    return status(given.mountpoint, given.json)


def _check(given: argparse.Namespace) -> int:
    from .commands.check import check

    settings = config.load(vars(given), os.environ)
    return check(given.place, repair=given.repair, as_json=given.json, settings=settings)


def _torture(given: argparse.Namespace) -> int:
    from .commands.torture import draw_seed, run_torture
    from .torture.run import Plan

    if given.local == (given.mountpoint is not None):
        raise ConfigError("say where: a mount point, or --local for a cluster made for it")
    for name in ("kill", "cut_network", "lose_chunks", "fill_disk"):
        if vars(given)[name] and not given.local:
            raise ConfigError(f"faults are made in a cluster of their own: --{name.replace('_', '-')} needs --local")
    if given.fill_disk and os.geteuid() != 0:
        raise ConfigError("--fill-disk makes small disks, which only root can")
    if given.cut_network and os.geteuid() != 0:
        raise ConfigError("--cut-network makes network namespaces, which only root can")
    seed = draw_seed() if given.seed is None else given.seed
    plan = Plan(
        given.mountpoint,
        given.minutes * 60,
        seed,
        given.workers,
        frozenset(given.kill),
        given.lose_chunks,
        given.fill_disk,
        given.cut_network,
    )
    return run_torture(plan, as_json=given.json)


def _top(given: argparse.Namespace) -> int:
    from .commands.top import top

    return top(given.mountpoint, interval_s=given.interval, count=given.count, as_json=given.json)


def _trace(given: argparse.Namespace) -> int:
    from .commands.trace import trace

    seconds = given.seconds if given.seconds is not None or given.command else 10.0
    return trace(
        given.mountpoint,
        seconds=seconds,
        command=given.command,
        out=given.out,
        slowest=given.slowest,
        as_json=given.json,
    )


def _layout(given: argparse.Namespace) -> int:
    from .commands.inspect import layout

    return layout(given.file, given.json)


def _doctor(given: argparse.Namespace) -> int:
    from .doctor import run_doctor

    return run_doctor(given.data_dir, given.json)


def _install_mount_helper(given: argparse.Namespace) -> int:
    from .commands.mounting import install_mount_helper

    install_mount_helper()
    sys.stdout.write("mount -t benchfs REGISTRY MOUNTPOINT works now, and so do lines of type benchfs in /etc/fstab\n")
    return 0


# ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = _Parser(prog="benchfs", description="An ad-hoc distributed file system.", epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"benchfs {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Run, text: str, examples: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=examples)
        one.set_defaults(run=run)
        return one

    one = command("up", _up, "start a cluster on this machine and mount it", _EXAMPLES_UP)
    one.usage = "benchfs up MOUNTPOINT [options] [-- COMMAND …]"
    one.add_argument("mountpoint", type=path, metavar="MOUNTPOINT")
    count = whole(1, DAEMONS_MAX, "a cluster has {} daemons")
    one.add_argument("--daemons", type=count, metavar="N", help="storage daemons of a new cluster (default: 2)")
    one.add_argument(
        "--data-dir", type=path, metavar="DIR", help="where everything is kept (default: below /var/lib/benchfs)"
    )
    _add_mount_options(one)
    config.add_options(one, "mount", "ucx", "cluster")
    one.set_defaults(command=[])

    one = command(
        "down", _down, "unmount a cluster of this machine and stop its daemons; the data stays", _EXAMPLES_DOWN
    )
    one.add_argument("mountpoint", type=path, metavar="MOUNTPOINT")
    one.add_argument("--force", action="store_true", help="at once, whoever uses it")

    one = command("init", _init, "form a cluster: its id, its secret, its shard map", _EXAMPLES_INIT)
    one.add_argument("registry", type=path, metavar="REGISTRY", help="a new directory that all nodes share")
    one.add_argument("--daemons", type=count, required=True, metavar="N", help="how many daemons make it complete")
    config.add_options(one, "cluster")

    one = command("mount", _mount, "mount a cluster; returns when the mount answers", _EXAMPLES_MOUNT)
    one.add_argument("mountpoint", type=path, metavar="MOUNTPOINT")
    one.add_argument("--registry-dir", type=path, required=True, metavar="DIR", help="the registry of the cluster")
    one.add_argument("--foreground", action="store_true", help="stay, and say on standard error what happens")
    one.add_argument("--log", type=path, metavar="FILE", help="where a mount in the background writes what happens")
    _add_mount_options(one)
    config.add_options(one, "mount", "ucx")

    one = command("umount", _umount, "flush everything and unmount", _EXAMPLES_UMOUNT)
    one.add_argument("mountpoint", type=path, metavar="MOUNTPOINT")
    one.add_argument("--force", action="store_true", help="at once, in any state; says what could not be flushed")
    one.add_argument(
        "--timeout", type=seconds, default=60.0, metavar="S", help="give up flushing after so long (default: 60)"
    )

    one = command("status", _status, "show a mount, its daemons and what is under way", _EXAMPLES_STATUS)
    one.add_argument("mountpoint", type=path, metavar="MOUNTPOINT")
    one.add_argument("--json", action="store_true", help="for programs")

    one = command("layout", _layout, "show where the chunks of a file lie", _EXAMPLES_LAYOUT)
    one.add_argument("file", type=path, metavar="FILE")
    one.add_argument("--json", action="store_true", help="for programs")

    one = command("check", _check, "compare what all daemons hold; name what is damaged or left over", _EXAMPLES_CHECK)
    one.add_argument(
        "place", type=path, metavar="MOUNTPOINT|REGISTRY", help="where the cluster is mounted, or its registry"
    )
    one.add_argument("--repair", action="store_true", help="remove what is orphaned or leaked")
    one.add_argument("--json", action="store_true", help="for programs")
    config.add_options(one, "ucx")

    title = "work, kill processes, cut networks, and see that nothing acknowledged is lost"
    one = command("torture", _torture, title, _EXAMPLES_TORTURE)
    one.add_argument("mountpoint", type=path, nargs="?", metavar="MOUNTPOINT", help="work in an existing mount")
    one.add_argument("--local", action="store_true", help="make a cluster for it, which may be hurt")
    one.add_argument("--minutes", type=minutes, default=1.0, metavar="M", help="how long to work (default: 1)")
    one.add_argument(
        "--seed", type=whole(0, 2**63 - 1, "a whole number of {}"), metavar="S", help="what to do at random"
    )
    one.add_argument(
        "--workers", type=whole(1, 64, "{} workers"), default=6, metavar="N", help="processes that work (default: 6)"
    )
    one.add_argument(
        "--kill", type=some_of("daemons", "mounts"), default=(), metavar="WHAT", help="daemons, mounts, or both"
    )
    one.add_argument("--cut-network", action="store_true", help="have hosts of their own, and cut them off (root)")
    one.add_argument("--fill-disk", action="store_true", help="have small disks, fill and empty them (root)")
    one.add_argument("--lose-chunks", action="store_true", help="remove chunk files, and cut them short")
    one.add_argument("--json", action="store_true", help="for programs")

    one = command("top", _top, "show what a mount and its daemons are doing, second by second", _EXAMPLES_TOP)
    one.add_argument("mountpoint", type=path, metavar="MOUNTPOINT")
    one.add_argument("--interval", type=seconds, default=1.0, metavar="S", help="between two looks (default: 1)")
    one.add_argument(
        "--count", type=whole(1, 1_000_000, "{} looks"), metavar="N", help="look so often (default: until Ctrl-C)"
    )
    one.add_argument("--json", action="store_true", help="for programs: one line for each look")

    one = command("trace", _trace, "record where operations spend their time", _EXAMPLES_TRACE)
    one.usage = "benchfs trace MOUNTPOINT --out FILE [--seconds S] [options] [-- COMMAND …]"
    one.add_argument("mountpoint", type=path, metavar="MOUNTPOINT")
    one.add_argument("--out", type=path, required=True, metavar="FILE", help="written for Perfetto (ui.perfetto.dev)")
    one.add_argument(
        "--seconds", type=seconds, metavar="S", help="how long to record at most (default: 10, or until COMMAND ends)"
    )
    one.add_argument(
        "--slowest", type=whole(0, 1000, "{} operations"), default=5, metavar="N", help="show so many (default: 5)"
    )
    one.add_argument("--json", action="store_true", help="for programs")
    one.set_defaults(command=[])

    one = command("doctor", _doctor, "tell whether this machine is ready, and what to do if not", _EXAMPLES_DOCTOR)
    one.add_argument(
        "--data-dir", type=path, default=Path(), metavar="DIR", help="where a daemon would keep its data (default: .)"
    )
    one.add_argument("--json", action="store_true", help="for programs")

    group = commands.add_parser("bench", help="measure", description="Measure.", epilog=_EXAMPLES_BENCH)
    benchmarks = group.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for benchmark in BENCHMARKS:
        text = benchmark.text[0].upper() + benchmark.text[1:] + "."
        one = benchmarks.add_parser(benchmark.name, help=benchmark.text, description=text, epilog=benchmark.examples)
        benchmark.add(one)
        one.set_defaults(run=benchmark.run)

    command(
        "install-mount-helper", _install_mount_helper, "make mount -t benchfs and /etc/fstab work", _EXAMPLES_HELPER
    )
    return parser


def _add_mount_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="as for mount(8): ro, nosuid, noexec, noatime, attr_timeout=0, …",
    )


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does: by an exception, so that it cleans up."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    command: list[str] = []
    if words[:1] in (["up"], ["trace"]) and "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
        if not command:
            parser.error("a command has to follow --")
    given = parser.parse_args(words)
    if command:
        given.command = command
    run: Run = given.run
    try:
        with _ended_by_signals():
            code = run(given)
            sys.stdout.flush()
        return code
    except UserError as error:
        sys.stderr.write(f"benchfs: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        sys.stderr.write(f"benchfs: {error.filename or 'the system'}: {error.strerror or error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
