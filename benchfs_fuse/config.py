"""Read the settings: every key stands once, below, with its type, default, unit, bounds and meaning.

A value comes from the command line, else from the environment, else from the TOML file, else it is the default.
Whatever is unknown, of the wrong type, out of bounds or contradictory is refused with one sentence (ConfigError).
To add a key, add its statement to a section; the file's key, the variable and the command-line option follow from it:

    mount.attr_timeout_s    [mount] attr_timeout_s = 0.5    BENCHFS_MOUNT_ATTR_TIMEOUT_S=0.5    --attr-timeout 0.5
"""

import argparse
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError
from .limits import CHUNK_SIZE_DEFAULT, CHUNK_SIZE_MAX, CHUNK_SIZE_MIN, KIB, MIB

#: Names the TOML file if --config does not.
FILE_VARIABLE = "BENCHFS_CONFIG"

_HOUR_S = 3600.0
_DAY_S = 86400.0
_SIZE_SUFFIXES = {"": 1, "K": KIB, "M": MIB, "G": KIB * MIB}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class _Rule(NamedTuple):
    """Hold what a key's statement says beside its name, type and default."""

    doc: str
    unit: str = ""
    low: float = 0
    high: float = 0
    power_of_two: bool = False
    pattern: str = ""


def _key(default: object, doc: str, **rule: Any) -> Any:
    """Describe one key; a callable default is asked when the settings are read."""
    metadata = {"rule": _Rule(doc, **rule)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _is_root() -> bool:
    return os.geteuid() == 0


@dataclass(frozen=True, kw_only=True)
class MountSettings:
    """Tune one mount."""

    attr_timeout_s: float = _key(
        1.0, "how long names and attributes may be served from caches; 0 turns the caches off", unit="s", high=_HOUR_S
    )
    op_timeout_s: float = _key(
        30.0, "how long one operation may wait for daemons before it fails; 0 waits for ever", unit="s", high=_DAY_S
    )
    xattr: bool = _key(True, "serve extended attributes (and POSIX ACLs); off saves one trip per write")
    allow_other: bool = _key(_is_root, "let every user of this machine in; by default only if root mounts")
    companion: bool = _key(True, "use the companion library, where it was built, for what pyfuse3 leaves out")
    locks: bool = _key(True, "hold flock and fcntl locks over all mounts; off leaves them to the kernel of this one")
    noatime: bool = _key(False, "leave access times alone; otherwise they follow relatime")
    gather_bytes_max: int = _key(
        64 * MIB,
        "accepted writes held in the mount's memory, all files together; 0 sends each at once",
        unit="bytes",
        high=4096 * MIB,
    )
    gather_time_s: float = _key(
        1.0, "how long an accepted write may stay in the mount's memory", unit="s", low=0.001, high=_HOUR_S
    )
    spin_us: int = _key(
        200, "how long to poll for a reply before going to sleep; 0 sleeps at once", unit="µs", high=2000
    )


@dataclass(frozen=True, kw_only=True)
class DaemonSettings:
    """Tune one storage daemon."""

    spin_us: int = _key(
        200,
        "how long to poll for a request after the last one before going to sleep; 0 sleeps at once",
        unit="µs",
        high=100_000,
    )
    lease_s: float = _key(
        60.0,
        "how long a silent mount keeps its session, its open files and their space",
        unit="s",
        low=1.0,
        high=_DAY_S,
    )
    listen: str = _key(
        "",
        "address where peers meet this daemon; empty: 127.0.0.1 under `benchfs up`, else this host's address",
        pattern=r"[0-9A-Za-z.:_%-]*",
    )


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Say what a new cluster is formed with."""

    chunk_size: int = _key(
        CHUNK_SIZE_DEFAULT,
        "chunk size of new files; a directory's own setting goes first",
        unit="bytes",
        low=CHUNK_SIZE_MIN,
        high=CHUNK_SIZE_MAX,
        power_of_two=True,
    )


@dataclass(frozen=True, kw_only=True)
class UcxSettings:
    """Narrow what UCX may use, with UCX's own syntax."""

    tls: str = _key(
        "", "transports that UCX may use (UCX_TLS); empty: chosen for each peer", pattern=r"[\^\\]?[0-9A-Za-z_,:]*"
    )
    net_devices: str = _key(
        "", "network devices that UCX may use (UCX_NET_DEVICES); empty: all", pattern=r"\^?[0-9A-Za-z_.,:~-]*"
    )
    public: bool = _key(False, "listen also at addresses that can be reached from the public internet")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold every setting of one process."""

    mount: MountSettings = field(default_factory=MountSettings)
    daemon: DaemonSettings = field(default_factory=DaemonSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    ucx: UcxSettings = field(default_factory=UcxSettings)


class Key(NamedTuple):
    """Describe one key for the command line, the documents and the tests."""

    name: str
    """Section and key: "mount.attr_timeout_s"."""
    type: type[bool] | type[int] | type[float] | type[str]
    default: bool | int | float | str
    rule: _Rule

    @property
    def variable(self) -> str:
        """Name the environment variable."""
        return "BENCHFS_" + self.name.replace(".", "_").upper()

    @property
    def option(self) -> str:
        """Name the command-line option: without section and unit of time."""
        return "--" + re.sub("_(s|us)$", "", self.name.partition(".")[2]).replace("_", "-")

    @property
    def allowed(self) -> str:
        """Say in words which values are good."""
        low, high = self.rule.low, self.rule.high
        if self.type is bool:
            return "true or false"
        if self.type is str:
            return f"text that matches {self.rule.pattern}"
        if self.rule.unit == "bytes":
            kind = "a power of two" if self.rule.power_of_two else "a number"
            return f"{kind} from {_size(low)} to {_size(high)} bytes, such as 65536, 64K or 4M"
        kind = "a whole number" if self.type is int else "a number"
        return f"{kind} from {low:g} to {high:g} {self.rule.unit}"

    def parse(self, text: str) -> bool | int | float | str:
        """Turn text from the command line or the environment into a checked value; ValueError if it is not one."""
        if self.type is bool:
            if text.lower() not in _WORDS:
                raise ValueError
            return _WORDS[text.lower()]
        if self.rule.unit == "bytes":
            match = re.fullmatch(r"([0-9]+)([KMG]?)", text)
            if match is None:
                raise ValueError
            return self.check(int(match[1]) * _SIZE_SUFFIXES[match[2]])
        return self.check(self.type(text))

    def check(self, value: object) -> bool | int | float | str:
        """Give a typed value back if it is good, with its suffix resolved if it is a size; ValueError if it is not."""
        if self.rule.unit == "bytes" and isinstance(value, str):
            return self.parse(value)
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type:
            raise ValueError
        if isinstance(value, str) and not re.fullmatch(self.rule.pattern, value):
            raise ValueError
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not self.rule.low <= value <= self.rule.high:  # refuses NaN too
                raise ValueError
            if self.rule.power_of_two and int(value).bit_count() != 1:
                raise ValueError
        assert isinstance(value, bool | int | float | str)
        return value


def _size(number: float) -> str:
    for suffix in ("G", "M", "K"):
        if number and number % _SIZE_SUFFIXES[suffix] == 0:
            return f"{number // _SIZE_SUFFIXES[suffix]:.0f}{suffix}"
    return f"{number:.0f}"


def _sections() -> Iterator[tuple[str, Any]]:
    return ((section.name, section.type) for section in fields(Settings))


def keys() -> dict[str, Key]:
    """List every key by its full name, with the defaults as they are for this user."""
    found = {}
    for section, settings_type in _sections():
        defaults = settings_type()
        for one in fields(settings_type):
            name, default = f"{section}.{one.name}", getattr(defaults, one.name)
            found[name] = Key(name, type(default), default, one.metadata["rule"])
    return found


#: What one source may not say at once: the second key would be accepted and ignored.
_CONTRADICTIONS: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    (
        "mount.gather_bytes_max",
        lambda value: value == 0,
        "mount.gather_time_s",
        "nothing is gathered",
    ),
    (
        "mount.companion",
        lambda value: not value,
        "mount.locks",
        "locks are left to the kernel",
    ),
    (
        "ucx.tls",
        lambda value: set(value.split(",")) <= {"sm", "shm", "posix", "sysv", "cma", "xpmem", "knem", "self"},
        "ucx.net_devices",
        "no network is used",
    ),
)


def add_options(parser: argparse.ArgumentParser, *sections: str) -> None:
    """Add --config and the options of these sections' keys; `load` takes the parsed arguments."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings in TOML (default: $BENCHFS_CONFIG)")
    for key in keys().values():
        if key.name.partition(".")[0] not in sections:
            continue
        shown = _size(key.default) if key.rule.unit == "bytes" and isinstance(key.default, int) else key.default
        word = str(shown).lower() if key.type is bool else str(shown)
        text = (key.rule.doc + (f" (default: {word})" if word else "")).replace("%", "%%")
        if key.type is bool:
            parser.add_argument(
                key.option, dest=key.name, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            metavar = key.rule.unit or key.name.rpartition(".")[2].upper()
            parser.add_argument(key.option, dest=key.name, metavar=metavar, help=text)


def load(arguments: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """Merge command line, environment, file and defaults.

    arguments: `vars()` of what the parser made; keys that are absent or None were not given, other names are not ours.
    Raises ConfigError with one sentence that names the source, the key and what is allowed.
    """
    known = keys()
    file = arguments.get("config") or environ.get(FILE_VARIABLE)
    values: dict[str, Any] = _read_file(Path(str(file)), known) if file else {}
    values |= _read_environment(environ, known)
    values |= _read_arguments(arguments, known)
    return Settings(
        **{
            section: settings_type(
                **{name.partition(".")[2]: value for name, value in values.items() if name.startswith(section + ".")}
            )
            for section, settings_type in _sections()
        }
    )


def _checked(key: Key, value: object, source: str) -> bool | int | float | str:
    """Check a value; text is parsed unless it comes from a file, where values have types of their own."""
    try:
        return key.parse(value) if isinstance(value, str) else key.check(value)
    except ValueError:
        raise ConfigError(f"{source}: {key.name} cannot be {value!r}: {key.allowed}") from None


def _refuse_contradictions(values: Mapping[str, Any], source: str) -> None:
    for name, is_off, other, sense in _CONTRADICTIONS:
        if name in values and is_off(values[name]) and other in values:
            raise ConfigError(
                f"{source}: {name} = {values[name]!r} contradicts {other}: {sense}, leave one of them out"
            )


def _read_file(file: Path, known: Mapping[str, Key]) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: cannot read the settings: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a TOML file: {error}") from error

    values = {}
    for section, body in content.items():
        if section not in dict(_sections()):
            raise ConfigError(f"{file}: unknown section [{section}]: known are {', '.join(dict(_sections()))}")
        if not isinstance(body, dict):
            raise ConfigError(f"{file}: {section} must be a section, [{section}]")
        for name, value in body.items():
            key = known.get(f"{section}.{name}")
            if key is None:
                siblings = ", ".join(other.partition(".")[2] for other in known if other.startswith(section + "."))
                raise ConfigError(f"{file}: unknown key {section}.{name}: [{section}] has {siblings}")
            try:
                values[key.name] = key.check(value)
            except ValueError:
                raise ConfigError(f"{file}: {key.name} cannot be {value!r}: {key.allowed}") from None
    _refuse_contradictions(values, str(file))
    return values


def _read_environment(environ: Mapping[str, str], known: Mapping[str, Key]) -> dict[str, Any]:
    by_variable = {key.variable: key for key in known.values()}
    prefixes = tuple(f"BENCHFS_{section.upper()}_" for section, _ in _sections())
    values = {}
    for variable, text in environ.items():
        if variable in by_variable:
            values[by_variable[variable].name] = _checked(by_variable[variable], text, f"environment, {variable}")
        elif variable.startswith(prefixes):
            raise ConfigError(f"environment: {variable} is not a setting: known are {', '.join(by_variable)}")
    _refuse_contradictions(values, "environment")
    return values


def _read_arguments(arguments: Mapping[str, object], known: Mapping[str, Key]) -> dict[str, Any]:
    given = ((key, arguments.get(name)) for name, key in known.items())
    values = {key.name: _checked(key, value, key.option) for key, value in given if value is not None}
    _refuse_contradictions(values, "command line")
    return values
