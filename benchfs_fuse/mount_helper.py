"""Be ``mount.benchfs``, which mount(8) runs for ``mount -t benchfs REGISTRY MOUNTPOINT -o …`` and for /etc/fstab.

mount(8) calls ``mount.benchfs REGISTRY MOUNTPOINT [-sfnv] [-N namespace] [-o options] [-t type]`` and understands the
exit codes 1 (wrong use) and 32 (mount failure); mount(8), "External helpers" and "Exit status".
"""

import getopt
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import config
from .commands.mounting import mount_in_background
from .commands.options import parse_options
from .errors import UserError

USAGE = "usage: mount.benchfs REGISTRY MOUNTPOINT [-fnsv] [-o OPTIONS]"
EXIT_USAGE = 1
EXIT_FAILED = 32


def _say(sentence: str) -> None:
    sys.stderr.write(f"mount.benchfs: {sentence}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount in the background; return when the mount answers."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        flags, places = getopt.gnu_getopt(words, "sfnvN:o:t:")
        registry, mountpoint = map(Path, places)
    except (getopt.GetoptError, ValueError):
        sys.stderr.write(USAGE + "\n")
        return EXIT_USAGE
    try:
        options = parse_options(",".join(value for flag, value in flags if flag == "-o"))
        config.load(options.settings(), os.environ)
    except UserError as error:
        _say(str(error))
        return EXIT_USAGE
    if any(flag == "-N" for flag, _ in flags):
        _say("another mount namespace (-N) is not supported: run mount inside it, with nsenter(1)")
        return EXIT_USAGE
    if ("-f", "") in flags:
        return 0
    try:
        mount_in_background(mountpoint, registry, None, options.words, _say)
    except UserError as error:
        _say(str(error))
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
