"""Understand ``-o``: the comma-separated options of mount(8) and /etc/fstab. Unknown ones are refused."""

from typing import NamedTuple

from ..config import keys
from ..errors import UserError

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
    "allow_other": "--allow-other",
}


class MountOptions(NamedTuple):
    """Hold what ``-o`` asked for: options for the kernel, and arguments that set ours."""

    kernel: tuple[str, ...]
    arguments: tuple[str, ...]


def parse_options(text: str) -> MountOptions:
    """Split the options. UserError names the one that is unknown, or whose value is missing."""
    by_name = {
        key.option.removeprefix("--").replace("-", "_"): key
        for key in keys().values()
        if key.name.startswith(("mount.", "ucx."))
    }
    kernel: list[str] = []
    arguments: list[str] = []
    for option in filter(None, text.split(",")):
        name, equals, value = option.partition("=")
        if option in _KERNEL:
            kernel.append(option)
        elif option in _WORDS:
            arguments.append(_WORDS[option])
        elif option in _ADVICE or option.startswith(_ADVICE_PREFIXES):
            continue
        elif name == "config" and value:
            arguments += ["--config", value]
        elif equals and name in by_name and by_name[name].type is not bool:
            arguments += [by_name[name].option, value]
        else:
            known = sorted(
                [*_KERNEL, *_WORDS, "config=", *(f"{one}=" for one in by_name if by_name[one].type is not bool)]
            )
            raise UserError(f"unknown mount option {option!r}: known are {', '.join(known)}")
    return MountOptions(tuple(kernel), tuple(arguments))
