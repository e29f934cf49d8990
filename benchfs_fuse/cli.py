"""Be the command ``benchfs``: parse, call, turn errors into sentences and exit codes.

Exit codes: 0 done; 1 it failed, one sentence says why; 2 wrong use or a bad setting; 3 ``status``: works, but degraded.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, config
from .errors import UserError

_EPILOG = """\
examples:
  benchfs up /mnt/benchfs                    a file system on this machine, in one command
  benchfs up /mnt/x -- make -C /mnt/x        the same for the time of one command
  benchfs init /shared/reg --daemons 4       form a cluster; then run benchfsd on each node
  benchfs mount /mnt/benchfs --registry-dir /shared/reg
"""

Run = Callable[[argparse.Namespace], int]


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
    """Give the settings of the command line on to another process."""
    words = ["--config", str(given.config)] if given.config is not None else []
    for key in config.keys().values():
        value = getattr(given, key.name, None)
        if value is None or key.name.partition(".")[0] not in sections:
            continue
        if isinstance(value, bool):
            words.append(key.option if value else key.option.replace("--", "--no-", 1))
        else:
            words += [key.option, value]
    return words


def _kernel_arguments(given: argparse.Namespace) -> list[str]:
    from .commands.options import parse_options

    options = parse_options(",".join(given.options))
    return [*(word for option in options.kernel for word in ("-o", option)), *options.arguments]


def _mount(given: argparse.Namespace) -> int:
    config.load(vars(given), os.environ)
    arguments = [*_kernel_arguments(given), *_setting_arguments(given, "mount", "ucx")]
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

    settings = config.load(vars(given), os.environ)
    mountpoint = plain_path(given.mountpoint)
    data_dir = given.data_dir.absolute() if given.data_dir is not None else local.default_data_dir(mountpoint)
    local.up(
        mountpoint,
        data_dir,
        given.daemons,
        settings.cluster.chunk_size,
        _setting_arguments(given, "ucx"),
        [*_kernel_arguments(given), *_setting_arguments(given, "mount", "ucx")],
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


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Run, text: str, **more: Any
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **more)
    parser.set_defaults(run=run)
    return parser


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="benchfs",
        description="An ad-hoc distributed file system.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"benchfs {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    one = _command(commands, "up", _up, "start a cluster on this machine and mount it")
    one.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT")
    one.add_argument("--daemons", type=int, metavar="N", help="storage daemons of a new cluster (default: 2)")
    one.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where everything is kept (default: below /var/lib/benchfs)"
    )
    one.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="as for mount(8)")
    config.add_options(one, "mount", "ucx", "cluster")
    one.set_defaults(command=[])

    one = _command(commands, "down", _down, "unmount a cluster of this machine and stop its daemons; the data stays")
    one.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT")
    one.add_argument("--force", action="store_true", help="do not flush, do not wait for anybody")

    one = _command(commands, "init", _init, "form a cluster: its id, its secret, its shard map")
    one.add_argument("registry", type=Path, metavar="REGISTRY", help="a new directory that all nodes share")
    one.add_argument("--daemons", type=int, required=True, metavar="N", help="how many daemons make it complete")
    config.add_options(one, "cluster")

    one = _command(commands, "mount", _mount, "mount a cluster; returns when the mount answers")
    one.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT")
    one.add_argument("--registry-dir", type=Path, required=True, metavar="DIR")
    one.add_argument("--foreground", action="store_true", help="stay, and say on standard error what happens")
    one.add_argument("--log", type=Path, metavar="FILE", help="where a mount in the background writes what happens")
    one.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="as for mount(8)")
    config.add_options(one, "mount", "ucx")

    one = _command(commands, "umount", _umount, "flush everything and unmount")
    one.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT")
    one.add_argument("--force", action="store_true", help="at once, in any state; says what could not be flushed")
    one.add_argument("--timeout", type=float, default=60.0, metavar="S", help="give up flushing after so long (60)")

    one = _command(commands, "status", _status, "show a mount, its daemons and what is under way")
    one.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT")
    one.add_argument("--json", action="store_true")

    one = _command(commands, "layout", _layout, "show where the chunks of a file lie")
    one.add_argument("file", type=Path, metavar="FILE")
    one.add_argument("--json", action="store_true")

    one = _command(commands, "doctor", _doctor, "tell whether this machine is ready, and what to do if not")
    one.add_argument(
        "--data-dir", type=Path, default=Path("."), metavar="DIR", help="where a daemon would keep its data"
    )
    one.add_argument("--json", action="store_true")

    _command(commands, "install-mount-helper", _install_mount_helper, "make mount -t benchfs and /etc/fstab work")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if words[:1] == ["up"] and "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    given = make_parser().parse_args(words)
    if command:
        given.command = command
    try:
        run: Run = given.run
        return run(given)
    except UserError as error:
        sys.stderr.write(f"benchfs: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
