"""Understand ``-o``: the comma-separated options of mount(8) and /etc/fstab. Unknown ones are refused.

A value that has commas itself stands in double quotes, as mount(8) allows: ``-o ro,tls="sm,tcp"``.
"""

import argparse
import os
import re
from typing import NamedTuple

from .. import config
from ..errors import ConfigError

#: For mount(8), systemd and the boot: when and by whom to mount. They mean nothing to a file system.
_ADVICE = frozenset(
    {*("defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group", "rw", "async")}
    | {*("atime", "relatime", "default_permissions")}
)
_ADVICE_PREFIXES = ("x-", "X-", "comment=")
#: For the kernel, through libfuse.
_KERNEL = frozenset({"ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "dirsync"})
#: Other names of our settings.
_WORDS = {
    "noatime": "--noatime",
    "xattr": "--xattr",
    "noxattr": "--no-xattr",
    "locks": "--locks",
    "nolocks": "--no-locks",
    "companion": "--companion",
    "nocompanion": "--no-companion",
    "public": "--public",
    "nopublic": "--no-public",
    "allow_other": "--allow-other",
}
_OPTION = re.compile(r'(?:[^,"]|"[^"]*"?)+')


class MountOptions(NamedTuple):
    """Hold what ``-o`` asked for: options for the kernel, and arguments that set ours."""

    kernel: tuple[str, ...]
    arguments: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """Return everything as arguments of a mount process."""
        return [*(f"-o{option}" for option in self.kernel), *self.arguments]

    def settings(self) -> dict[str, object]:
        """Return the settings among them, unchecked, as ``config.load`` takes them."""
        parser = argparse.ArgumentParser()
        config.add_options(parser, "mount", "ucx")
        return {name: value for name, value in vars(parser.parse_args(self.arguments)).items() if value is not None}


def parse_options(text: str) -> MountOptions:
    """Split the options. ConfigError names the one that is unknown, or whose value is missing."""
    by_name = {
        key.option.removeprefix("--").replace("-", "_"): key
        for key in config.keys().values()
        if key.name.startswith(("mount.", "ucx.")) and key.type is not bool
    }
    kernel: list[str] = []
    arguments: list[str] = []
    for option in _OPTION.findall(text):
        name, equals, value = option.partition("=")
        value = value.removeprefix('"').removesuffix('"')
        if option in _KERNEL:
            kernel.append(option)
        elif option in _WORDS:
            arguments.append(_WORDS[option])
        elif option in _ADVICE or option.startswith(_ADVICE_PREFIXES):
            continue
        elif name == "config" and value:
            arguments.append(f"--config={os.path.abspath(value)}")
        elif equals and name in by_name:
            arguments.append(f"{by_name[name].option}={value}")
        else:
            known = sorted([*_KERNEL, *_WORDS, "config=", *(f"{one}=" for one in by_name)])
            raise ConfigError(f"unknown mount option {option!r}: known are {', '.join(known)}")
    return MountOptions(tuple(kernel), tuple(arguments))
